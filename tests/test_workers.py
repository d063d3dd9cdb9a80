"""Processes that share the work: what they answer, how they die, how they end."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from promptkit import workers
from promptkit.errors import InputError
from promptkit.workers import (
    WorkerError,
    parallel,
    same_measurement,
    sweep_temporaries,
    with_absolute_paths,
)

ROOT = Path(__file__).parents[1]


def square(x, offset=0):
    return x * x + offset


def fatal(x, by=signal.SIGKILL):
    if x == 2:
        os.kill(os.getpid(), by)
    return x


def fatal_exit(x):
    if x == 2:
        os._exit(7)
    return x


def told(item, sentence):
    return f"{item}: {sentence}"


def whereabouts(x, meeting):
    print("not an answer")  # must not get among them
    (meeting / x).touch()
    while len(list(meeting.iterdir())) < 2:  # so that no process answers both calls
        time.sleep(0.01)
    return os.getpid(), os.getcwd(), os.environ.get("PLACE"), list(sys.path)


def wait_or_return(x):
    time.sleep(60 if x else 0)


def complain(x):
    raise InputError(f"{x} is wrong")


class Stubborn(Exception):
    def __init__(self, a, b):  # cannot be unpickled: its arguments are lost
        super().__init__(a)


def stubborn(x):
    raise Stubborn(x, x)


# --- processes ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_by_item(count):
    found = dict(parallel(square, [1, 2, 3], count, offset=1))
    assert found == {1: 2, 2: 5, 3: 10}


def test_functions_of_a_notebook():
    """They have no module to be imported from."""
    code = "def f(x):\n    return x + shift\nshift = 5"
    space = {"__name__": "__main__"}
    exec(code, space)
    assert dict(parallel(space["f"], [1, 2], 2)) == {1: 6, 2: 7}


def test_a_worker_stands_where_its_parent_does(tmp_path, monkeypatch):
    meetings = tmp_path / "first", tmp_path / "second"
    for meeting in meetings:
        meeting.mkdir()
    first = dict(parallel(whereabouts, "ab", 2, meeting=meetings[0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", "here")
    monkeypatch.syspath_prepend(tmp_path / "more")
    second = dict(parallel(whereabouts, "ab", 2, meeting=meetings[1]))
    for pid, folder, place, path in second.values():
        assert pid != os.getpid() and folder == str(tmp_path) and place == "here"
        assert path[0] == str(tmp_path / "more")
    # The same processes, which had been started elsewhere.
    assert {pid for pid, *_ in second.values()} <= {pid for pid, *_ in first.values()}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (fatal, "its process was ended by SIGKILL, as the system does when memory"),
        (fatal_exit, "its process ended with exit code 7"),
    ],
)
def test_a_death_is_the_failure_of_its_item_alone(function, reason):
    found = dict(parallel(function, [1, 2, 3, 4], 2, failed=told))
    assert {x: y for x, y in found.items() if x != 2} == {1: 1, 3: 3, 4: 4}
    assert found[2].startswith(f"2: {reason}")
    with pytest.raises(WorkerError, match=reason):
        list(parallel(function, [1, 2], 2))


def test_errors_travel():
    with pytest.raises(InputError, match="1 is wrong") as caught:
        list(parallel(complain, [1], apart=True))
    assert "in complain" in caught.value.__notes__[0]
    with pytest.raises(WorkerError, match="Stubborn: 1"):
        list(parallel(stubborn, [1], apart=True))
    with pytest.raises((TypeError, pickle.PicklingError)):
        list(parallel(square, [lambda: 0, open(os.devnull)], 2))


def test_whoever_stops_listening_ends_the_others(tmp_path):
    began = time.monotonic()
    results = parallel(time.sleep, [0.01, 60], 2)
    next(results)
    results.close()
    assert time.monotonic() - began < 30


def heeding_signals():
    """Undo what a background shell or nohup does: children inherit ignored signals."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def running(tmp_path):
    """Starts a Python process of this package, waits until it says that it is at work,
    and leaves none behind, however a test ends.
    """
    started = []

    def start(body, **popen):
        script = tmp_path / "script.py"
        script.write_text(body)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=heeding_signals,
            **popen,
        )
        started.append(process)
        return process, list(map(int, process.stdout.readline().split()))

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except OSError:
        return False


WORKING = """
import os, sys, time
from pathlib import Path
from promptkit.workers import parallel, stop_on_signals
def work(x):
    Path(f"{x}.pid").write_text(str(os.getpid()))
    time.sleep(60)
def watch():
    while len(list(Path(".").glob("*.pid"))) < 2:
        time.sleep(0.05)
    time.sleep(0.2)
    print(*(p.read_text() for p in Path(".").glob("*.pid")), flush=True)
import threading
threading.Thread(target=watch, daemon=True).start()
stop_on_signals(lambda: None)
list(parallel(work, [1, 2], 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_workers_end_with_their_parent(running, number):
    process, pids = running(WORKING)
    assert len(pids) == 2 and all(map(is_alive, pids))
    process.send_signal(getattr(signal, number))
    process.wait(10)
    until = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


WRITING = """
import os, sys, time
from pathlib import Path
from promptkit.files import write_atomically
from promptkit.workers import parallel
def work(x):
    def write(file):
        Path(f"{x}.pid").write_text(str(os.getpid()))
        while True:
            file.write(b"x")
            time.sleep(0.05)
    write_atomically(f"{x}.json", write)
def watch():
    while len(list(Path(".").glob("*.pid"))) < 2:
        time.sleep(0.05)
    time.sleep(0.5)
    print(*(p.read_text() for p in Path(".").glob("*.pid")), flush=True)
import threading
threading.Thread(target=watch, daemon=True).start()
list(parallel(work, [1, 2], 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", ["SIGKILL", "SIGINT"])
def test_workers_remove_what_they_were_writing(tmp_path, running, number):
    process, pids = running(WRITING, stderr=subprocess.DEVNULL)
    assert len(list(tmp_path.glob(".*.json-*"))) == 2
    process.send_signal(getattr(signal, number))
    process.wait(10)
    until = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not list(tmp_path.glob(".*"))


STUBBORN = """
import time
from promptkit.workers import stop_on_signals
stop_on_signals(lambda: print("last", flush=True))
print("ready", flush=True)
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.parametrize("twice", [False, True])
def test_who_swallows_a_signal_is_ended_all_the_same(tmp_path, twice):
    script = tmp_path / "script.py"
    script.write_text(STUBBORN)
    process = subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # until it sleeps
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    if twice:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 143 and process.stdout.read() == "last\n"
    assert time.monotonic() - began < (2.5 if twice else 10)


def test_ignored_signals_stay_ignored(monkeypatch):
    """As nohup asks for."""
    set_to = {}
    monkeypatch.setattr(signal, "signal", lambda n, handler: set_to.update({n: 1}))
    ignored = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(signal, "getsignal", lambda n: ignored.get(n))
    workers.stop_on_signals(lambda: None)
    assert set(set_to) == {signal.SIGINT, signal.SIGTERM}


# --- what is left behind --------------------------------------------------------------


def test_stale_temporaries_alone_are_swept(tmp_path):
    old = time.time() - 2 * workers.STALE
    stale = [".coop-sat.json-abc123_x", ".a.safetensors-00000000", ".1.ipynb-zz_zz_zz"]
    kept = [
        ".env",
        ".a.json",
        "a.json-abcdefgh",
        ".notes.txt-abcdefgh",
        ".a.json-short",
    ]
    for name in (*stale, *kept):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (old, old))
    (tmp_path / ".young.json-abcdefgh").write_text("")
    sweep_temporaries(tmp_path, tmp_path / "missing")
    assert {p.name for p in tmp_path.iterdir()} == {*kept, ".young.json-abcdefgh"}


def test_a_run_sweeps_its_results_and_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    old = time.time() - 2 * workers.STALE
    for folder in ("results/few-shot", "results/trained", "results/mine", "cache/x"):
        path = tmp_path / folder / ".a.json-abcdefgh"
        path.parent.mkdir(parents=True)
        path.write_text("")
        os.utime(path, (old, old))
    workers.sweep_results(tmp_path / "results")
    left = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob(".*")]
    assert left == ["results/mine/.a.json-abcdefgh"]  # no folder of ours


# --- other machines -------------------------------------------------------------------


def test_absolute_paths(tmp_path, monkeypatch):
    from promptkit.runs import Run  # here, so that workers need not import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTKIT_DATA", "real")
    (tmp_path / "photos").mkdir()
    (tmp_path / "weights.pt").write_text("")
    run = Run(
        "few-shot", "coop", "photos", ("./other", "pets"), pretrained="weights.pt"
    )
    sent = with_absolute_paths(run)
    assert sent.dataset == str(tmp_path / "photos")
    assert sent.targets == (str(tmp_path / "other"), "pets")
    assert sent.pretrained == str(tmp_path / "weights.pt")
    assert sent.root == str(tmp_path / "real")
    named = with_absolute_paths(Run("few-shot", "coop", "pets", pretrained="openai"))
    assert (named.dataset, named.targets, named.pretrained) == ("pets", (), "openai")
    given = with_absolute_paths(Run("few-shot", "coop", "pets", root="~/data"))
    assert given.root == str(Path("~/data").expanduser())


def test_what_is_measured_must_be_what_was_asked_for():
    asked = {"data": {"photos": "3f2a"}, "recipe": {"lr": 0.1}, "targets": ["a", "b"]}
    assert same_measurement(asked, {**asked}) is None
    here = asked | {"data": {"photos": "77c1"}, "targets": ["a"]}
    sentence = same_measurement(asked, here)
    assert "data.photos is '77c1' and not '3f2a'" in sentence
    assert "targets[1] is None and not 'b'" in sentence and "same files" in sentence
    many = same_measurement({str(n): n for n in range(9)}, {})
    assert "and 7 more" in many


@pytest.fixture
def cluster(request, monkeypatch):
    """A Dask cluster of two processes, which gives up an item after so many deaths of
    its worker; by default never, so that it is not the one to speak.
    """
    pytest.importorskip("distributed")
    import dask
    from distributed import LocalCluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    settings = {
        "distributed.scheduler.allowed-failures": getattr(request, "param", 1000),
        "distributed.worker.daemon": False,
    }
    with (
        dask.config.set(settings),
        LocalCluster(2, threads_per_worker=1, dashboard_address=None) as cluster,
    ):
        yield cluster


@pytest.mark.parametrize("cluster", [0], indirect=True, ids=["at once"])
def test_a_dask_worker_that_dies_fails_its_item_alone(cluster):
    address = cluster.scheduler_address
    assert dict(parallel(square, [1, 2, 3], scheduler=address)) == {1: 1, 2: 4, 3: 9}
    found = dict(parallel(fatal, [1, 2, 3, 4], scheduler=address, failed=told))
    assert {x: y for x, y in found.items() if x != 2} == {1: 1, 3: 3, 4: 4}
    assert found[2] == "2: every Dask worker that tried it died"
    with pytest.raises(WorkerError, match="every Dask worker that tried it died"):
        list(parallel(fatal, [2], scheduler=address))


def test_a_cluster_that_is_lost_is_an_error(cluster, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 2)
    results = parallel(wait_or_return, [0, 60], scheduler=cluster.scheduler_address)
    next(results)
    cluster.scale(0)
    began = time.monotonic()
    with pytest.raises(WorkerError, match="every worker of the Dask scheduler"):
        list(results)
    assert time.monotonic() - began < 30


def test_a_scheduler_that_is_lost_is_an_error(cluster, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 2)
    results = parallel(wait_or_return, [0, 60], scheduler=cluster.scheduler_address)
    next(results)
    cluster.close()
    began = time.monotonic()
    with pytest.raises(WorkerError, match="the Dask scheduler at tcp://.* is gone"):
        list(results)
    assert time.monotonic() - began < 30


def test_no_scheduler_is_an_error():
    with pytest.raises(InputError, match="no Dask scheduler answers at tcp://"):
        list(parallel(square, [1], scheduler="tcp://127.0.0.1:9"))
