"""Work in other processes: started, ended with their parent, and never waited for in
vain.

A worker is an interpreter of its own that answers calls through two pipes. It needs no
temporary folder and no shared memory, its death is the failure of its own call alone,
and it ends by itself when its parent is gone, however that came about: the pipe closes.
(Linux could kill it too, by PR_SET_PDEATHSIG, but does so when the *thread* that
started it ends, which a worker that is used again survives.)
"""

import atexit
import contextlib
import dataclasses
import os
import pickle
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from promptkit.errors import InputError

IDLE = 300  # seconds that a worker is kept for the next calls
GRACE = 2  # seconds that a worker has to remove what it was writing
PATIENCE = 30  # seconds without any Dask worker
STALE = 60  # seconds after which nobody writes to a temporary file any more
_START = (
    "import os, pickle, sys; calls = os.fdopen(os.dup(0), 'rb'); "
    "sys.path[:] = pickle.load(calls); "
    "from promptkit.workers import serve; serve(calls, {parent})"
)
_TEMPORARY = re.compile(
    r"\..+\.(json|safetensors|pt|npy|npz|ipynb|csv|md)-[a-z0-9_]{8}"
)


class WorkerError(RuntimeError):
    """A worker, or the cluster, is gone; the message says what happened to it."""


def parallel(
    function: Callable,
    items: Iterable,
    workers: int = 1,
    scheduler: str | None = None,
    *,
    failed: Callable | None = None,
    apart: bool = False,
    **arguments,
) -> Iterator[tuple]:
    """Yield ``(item, function(item, **arguments))`` for each item as it is done.

    Args:
        workers: 1 runs here and in order; more run in so many processes of one thread
            each, in this process's folder and environment.
        scheduler: address of a Dask scheduler (``tcp://host:8786``); replaces
            ``workers``.
        failed: function (item, sentence) -> what to yield in place of the result of an
            item whose worker died; by default that ends everything by an error.
        apart: use a process even for one worker or one item.

    Raises:
        InputError: the scheduler cannot be reached.
        WorkerError: a worker died and nothing is said about such items, or the
            scheduler or all of its workers were lost.
        Exception: what the function raises; what is under way is ended then.
    """
    items = list(items)
    if scheduler:
        yield from _on_dask(function, items, scheduler, failed, arguments)
    elif apart or (workers > 1 and len(items) > 1):
        count = min(max(workers, 1), len(items))
        yield from _in_processes(function, items, count, failed, arguments)
    else:
        for item in items:
            yield item, function(item, **arguments)


# --- processes ------------------------------------------------------------------------


class _Worker:
    """A process of one thread; this end of its pipes."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(parent=os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # torch reads it when imported
            start_new_session=True,  # Ctrl-C is this process's to answer
        )
        self._send(sys.path)

    def _send(self, value):
        pickle.dump(value, self.process.stdin)
        self.process.stdin.flush()

    def call(self, place: dict, call: bytes):
        """(whether it went well, result or exception) of a pickled call."""
        try:
            self._send((place, call))
            answer = pickle.load(self.process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            _end([self])
            raise WorkerError(_obituary(self.process.returncode)) from None
        return pickle.loads(answer)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self):
        """Let it end when it has nothing to do."""
        try:
            self.process.stdin.close()
        except OSError:
            pass  # it has ended before


def _obituary(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    reason = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{reason}"


_idle: list[_Worker] = []
_lock = threading.Lock()


def _take() -> _Worker:
    """A worker that waits for calls, or else a new one."""
    with _lock:
        while _idle:
            worker = _idle.pop()
            if worker.alive:
                return worker
    return _Worker()


def _keep(worker: _Worker):
    """Let a worker wait for the next calls, for a while."""

    def dismiss():
        with _lock:
            if worker not in _idle:
                return
            _idle.remove(worker)
        worker.close()
        worker.process.wait()

    with _lock:
        _idle.append(worker)
    timer = threading.Timer(IDLE, dismiss)
    timer.daemon = True
    timer.start()


@atexit.register
def _dismiss_all():
    while _idle:
        _idle.pop().close()


def _end(workers):
    """End workers that are busy, so that they can remove what they were writing."""
    for worker in workers:
        worker.process.terminate()
    until = time.monotonic() + GRACE
    for worker in workers:
        try:
            worker.process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()


def _in_processes(function, items, count, failed, arguments):
    import cloudpickle  # takes functions of a notebook along

    place = {"path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ)}
    place["environment"]["OMP_NUM_THREADS"] = "1"
    calls = [cloudpickle.dumps((function, item, arguments)) for item in items]
    waiting, done = queue.SimpleQueue(), queue.SimpleQueue()
    for i in range(len(items)):
        waiting.put(i)
    busy, stopped = set(), threading.Event()

    def work():
        while not stopped.is_set():
            try:
                i = waiting.get_nowait()
            except queue.Empty:
                return
            worker = None
            try:
                worker = _take()
                busy.add(worker)
                outcome = worker.call(place, calls[i])
            except Exception as error:  # it died, or could not be started
                outcome = False, error
            busy.discard(worker)
            if worker and worker.alive and not stopped.is_set():
                _keep(worker)
            done.put((i, *outcome))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for _ in items:
            i, well, outcome = done.get()
            if well:
                yield items[i], outcome
            elif failed and isinstance(outcome, WorkerError):
                yield items[i], failed(items[i], str(outcome))
            else:
                raise outcome
    finally:
        stopped.set()
        _end(list(busy))


def serve(calls, parent: int):
    """The other end: answer calls until the pipe closes or the parent is gone."""
    import cloudpickle

    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)  # what is printed must not get among the answers

    def leave(number, _frame):
        os.dup2(nowhere, 2)  # whatever is interrupted must not complain
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.showwarning = lambda message, *_: print(
        f"Warning: {message}", file=sys.stderr
    )
    waiting = queue.SimpleQueue()

    def listen():
        while True:
            try:
                waiting.put(pickle.load(calls))
            except (EOFError, OSError, pickle.UnpicklingError):
                return _end_this_process()

    threading.Thread(target=listen, daemon=True).start()
    end_with_parent(parent)
    try:
        while True:
            place, call = waiting.get()
            pickle.dump(_answer(cloudpickle, place, call), answers)
            answers.flush()
    except SystemExit as end:  # taking torch apart would take seconds
        os._exit(end.code if isinstance(end.code, int) else 1)


def _answer(cloudpickle, place, call) -> bytes:
    """A call's (whether it went well, result or exception), pickled."""
    try:
        sys.path[:] = place["path"]
        os.environ.clear()
        os.environ.update(place["environment"])
        os.chdir(place["folder"])
        function, item, arguments = pickle.loads(call)
        return cloudpickle.dumps((True, function(item, **arguments)))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            error.add_note(f"In a worker process:\n{trace}")
            pickle.loads(answer := cloudpickle.dumps((False, error)))
            return answer
        except Exception:  # an exception that cannot travel
            sentence = f"{type(error).__name__}: {error}"
            return cloudpickle.dumps((False, WorkerError(sentence)))


def end_with_parent(parent: int):
    """End this process soon after its parent, also one that was killed.

    Args:
        parent: process id; that of another parent means that it is gone already.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        _end_this_process()

    if os.name == "posix":  # elsewhere a launcher may stand between the two
        threading.Thread(target=watch, daemon=True).start()


def _end_this_process():
    """From another thread: let the main thread remove what it was writing, but end."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)


# --- a Dask cluster -------------------------------------------------------------------


def _on_dask(function, items, scheduler, failed, arguments):
    from distributed import Client, KilledWorker

    try:
        client = Client(scheduler, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {scheduler} ({error})"
        ) from None
    try:
        suspects = []
        for item, outcome in _submitted(client, function, items, arguments):
            # Dask fails all that a dead worker had been given: each is tried alone.
            if isinstance(outcome, KilledWorker) and len(items) > 1:
                suspects.append(item)
            else:
                yield item, _judged(item, outcome, failed)
        for suspect in suspects:
            for item, outcome in _submitted(client, function, [suspect], arguments):
                yield item, _judged(item, outcome, failed)
    finally:
        # Nobody waits for what is still under way, or for a scheduler that is lost.
        client.close(timeout=GRACE)


def _submitted(client, function, items, arguments):
    """Yield (item, result or exception) as they are done."""
    from distributed import CancelledError, wait

    submit, futures = client.submit, {}
    for item in items:
        futures[submit(function, item, pure=False, **arguments)] = item
    pending, seen = set(futures), time.monotonic()
    while pending:
        done = ()
        try:
            with contextlib.suppress(TimeoutError):
                done, pending = wait(pending, timeout=2, return_when="FIRST_COMPLETED")
            if client.scheduler_info(n_workers=1)["workers"]:
                seen = time.monotonic()
        except (CancelledError, OSError):  # OSError: the connection is closed
            raise _gone(client, "the Dask scheduler") from None
        for future in done:
            failure = future.exception()
            yield futures[future], future.result() if failure is None else failure
        if time.monotonic() - seen > PATIENCE:
            raise _gone(client, "every worker of the Dask scheduler")


def _gone(client, what):
    return WorkerError(
        f"{what} at {client.scheduler.address} is gone; what was finished is stored,"
        " and the same command goes on from there"
    )


def _judged(item, outcome, failed):
    """A result, or what is said in its place."""
    from distributed import KilledWorker

    if not isinstance(outcome, BaseException):
        return outcome
    if isinstance(outcome, KilledWorker):
        sentence = "every Dask worker that tried it died"
    elif failed is None:
        raise outcome
    else:
        sentence = f"{type(outcome).__name__}: {outcome}"
    if failed is None:
        raise WorkerError(sentence)
    return failed(item, sentence)


def with_absolute_paths(run):
    """A run as another folder's process finds it: the paths of its data and weights are
    absolute, and the folder of the real datasets is this process's.

    Args:
        run: :class:`promptkit.runs.Run`.
    """
    from promptkit.data import data_root
    from promptkit.data.own import is_path

    def absolute(text, is_path=os.path.exists):
        path = os.path.expanduser(text) if isinstance(text, str | Path) else ""
        return os.path.abspath(path) if path and is_path(path) else text

    files = ("pretrained", "classnames", "descriptions")
    labels = {absolute(path, is_path): text for path, text in run.labels.items()}
    return dataclasses.replace(
        run,
        dataset=absolute(run.dataset, is_path),
        targets=tuple(absolute(target, is_path) for target in run.targets),
        root=os.path.abspath(os.path.expanduser(run.root or data_root())),
        labels=labels,
        **{name: absolute(getattr(run, name)) for name in files},
    )


def same_measurement(client: dict, worker: dict) -> str | None:
    """What a worker would measure differently; None if nothing.

    Args:
        client, worker: the configuration of the same run in either process.

    Returns:
        A sentence that names what differs, with both values.
    """
    ours, theirs = dict(_flat(client)), dict(_flat(worker))
    keys = [k for k in ours | theirs if ours.get(k) != theirs.get(k)]
    if not keys:
        return None
    shown = "; ".join(
        f"{key} is {theirs.get(key)!r} and not {ours.get(key)!r}" for key in keys[:3]
    )
    more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
    return (
        f"the worker would measure something else ({shown}{more}): give it the same"
        " files, weights and version of promptkit"
    )


def _flat(value, key=""):
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value:
        for n, part in enumerate(value):
            yield from _flat(part, f"{key}[{n}]")
    else:
        yield key, value


# --- being stopped --------------------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end; ``code`` is the exit code that says so."""

    def __init__(self, number: int):
        super().__init__(number)
        self.code = 128 + number


def stop_on_signals(last_words: Callable[[], None]):
    """Let SIGINT, SIGTERM and SIGHUP raise :class:`Stopped` in the main thread, and end
    the process if that has not ended it soon, or at the second signal.

    Args:
        last_words: called before the process is ended in that way.
    """
    seen = []

    def end(code):
        last_words()
        os._exit(code)

    def stop(number, _frame):
        code = 128 + number
        if seen:
            end(code)
        seen.append(number)
        # A library may swallow the exception, or a thread keep the process from ending.
        timer = threading.Timer(GRACE + 1, end, [code])
        timer.daemon = True
        timer.start()
        raise Stopped(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # by nohup
            signal.signal(number, stop)


def sweep_temporaries(*folders):
    """Remove what killed processes were writing, once nobody can be writing it still.

    Args:
        folders: looked through without those inside them; one may be missing.
    """
    for folder in map(Path, folders):
        for path in folder.glob(".*"):
            try:
                age = time.time() - path.stat().st_mtime
                if _TEMPORARY.fullmatch(path.name) and age > STALE:
                    path.unlink(missing_ok=True)
            except OSError:
                pass  # another process was faster, or the folder is read-only


def sweep_results(folder):
    """:func:`sweep_temporaries` in a results folder and in the cache."""
    from promptkit.files import cache_folder
    from promptkit.results import FOLDERS

    cache = cache_folder()
    sweep_temporaries(
        *(Path(folder) / name for name in FOLDERS),
        cache,
        *(path for path in cache.rglob("*") if path.is_dir()),
    )
