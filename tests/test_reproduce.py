"""Chapters through papermill: selection, parameters, execution in place and elsewhere,
failures.
"""

import asyncio
import json
import re
import sys
from pathlib import Path
from queue import Empty

import nbformat
import pytest

from promptkit import kernel
from promptkit.errors import InputError
from promptkit.kernel import Channel
from promptkit.reproduce import (
    Job,
    declared_parameters,
    execute_chapter,
    find_chapters,
    reproduce,
    select_chapters,
)

PARAMETERS = (
    'profile = "mini"\ndatasets = ["pets"]\nseeds = [1, 2, 3]\nshots: int = 16\noutput'
    " = None"
)
SHOW = (
    "import json, os, sys\n"
    "where = [sys.executable, os.getcwd(), os.environ['PROMPTKIT_RESULTS']]\n"
    "print(json.dumps([profile, datasets, seeds, *where]))"
)

# For a process that executes notebooks: nbclient takes the kernel's manager from there,
# and ours looks for messages that were missed.
PATIENT = """
import jupyter_client
from promptkit.kernel import Manager
jupyter_client.AsyncKernelManager = Manager
"""


def chapter(folder, name, *cells, parameters=PARAMETERS):
    """Write a notebook with a parameters cell; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(
        cells=[first, *map(nbformat.v4.new_code_cell, cells)]
    )
    nbformat.write(notebook, folder / name)
    return folder / name


def printed(path):
    """What the last cell of an executed notebook printed, as JSON."""
    return json.loads(nbformat.read(path, 4).cells[-1].outputs[0]["text"])


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PROMPTKIT_RESULTS", raising=False)
    for name in (
        "01_mini_world.ipynb",
        "02_clip.ipynb",
        "03_coop.ipynb",
        "10_maple.ipynb",
    ):
        chapter(tmp_path / "notebooks", name, SHOW)
    (tmp_path / "notebooks" / "scratch.ipynb").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, ["01", "02", "03", "10"]),
        ("all", ["01", "02", "03", "10"]),
        ("03", ["03"]),
        ("3, 10", ["03", "10"]),
        ("02-05", ["02", "03"]),
        ("3-12", ["03", "10"]),  # numbers may be missing
        ("coop", ["03"]),
        (["10_maple", 1], ["01", "10"]),
        ("mini_world", ["01"]),
    ],
)
def test_selection(book, wanted, found):
    paths = find_chapters(book / "notebooks")
    assert [path.stem[:2] for path in select_chapters(wanted, paths)] == found


def test_unknown_chapters(book):
    paths = find_chapters(book / "notebooks")
    with pytest.raises(InputError, match="unknown chapter 'cop'; did you mean 'coop'"):
        select_chapters("cop", paths)
    with pytest.raises(InputError, match="unknown chapter '04'"):
        select_chapters("04", paths)
    with pytest.raises(InputError, match="no chapters .* repository's root"):
        find_chapters(book)


def test_declared_parameters(book, tmp_path):
    declared = declared_parameters(book / "notebooks" / "03_coop.ipynb")
    assert declared == {
        "profile": "mini",
        "datasets": ["pets"],
        "seeds": [1, 2, 3],
        "shots": 16,
        "output": None,
    }
    with pytest.raises(InputError, match="cannot read the notebook .*scratch"):
        declared_parameters(book / "notebooks" / "scratch.ipynb")
    nbformat.write(nbformat.v4.new_notebook(), tmp_path / "04_none.ipynb")
    with pytest.raises(
        InputError, match="04_none.ipynb has no cell tagged 'parameters'"
    ):
        declared_parameters(tmp_path / "04_none.ipynb")


def test_in_place_with_this_interpreter(book):
    (report,) = reproduce("coop", progress=False)
    path = book / "notebooks" / "03_coop.ipynb"
    assert report.error == "" and report.output == path.resolve() and report.seconds > 0
    profile, datasets, seeds, executable, where, results = printed(path)
    assert (profile, datasets, seeds) == ("mini", ["pets"], [1, 2, 3])
    assert Path(executable).samefile(sys.executable) and where == str(path.parent)
    assert results == str(
        book / "results"
    )  # beside the folder of the notebooks, wherever a chapter runs
    notebook = nbformat.read(path, 4)
    assert (
        len(notebook.cells) == 2
    )  # defaults are not injected: the committed notebook keeps its cells
    assert (
        "papermill" not in notebook.metadata
        and "papermill" not in notebook.cells[-1].metadata
    )
    assert str(book) not in json.dumps(notebook.metadata)
    assert sorted(p.name for p in path.parent.iterdir() if p.name.startswith(".")) == []


def test_output_folder_and_parameters(book):
    before = (book / "notebooks" / "02_clip.ipynb").read_bytes()
    (report,) = reproduce("02", "smoke", "pets,cars", [1], book / "out", progress=False)
    assert report.output == book / "out" / "02_clip.ipynb" and not report.error
    assert printed(report.output)[:3] == ["smoke", ["pets", "cars"], [1]]
    assert (book / "notebooks" / "02_clip.ipynb").read_bytes() == before


def test_a_failing_chapter_is_reported_and_the_others_go_on(book, capsys):
    failing = chapter(book / "notebooks", "02_clip.ipynb", "1 / 0")
    before = failing.read_bytes()
    reports = reproduce("02,03")
    assert [bool(report.error) for report in reports] == [True, False]
    assert "ZeroDivisionError: division by zero" in reports[0].error
    assert failing.read_bytes() == before
    shown = capsys.readouterr().err
    assert "02_clip" in shown and "FAILED" in shown and "[2/2] 03_coop" in shown


def test_chapters_in_parallel(book):
    reports = reproduce(
        "02,03", "smoke", output=book / "out", workers=2, progress=False
    )
    assert [(report.name, report.error) for report in reports] == [
        ("02_clip", ""),
        ("03_coop", ""),
    ]
    assert all(printed(report.output)[0] == "smoke" for report in reports)


def test_a_dying_kernel_is_a_failure(book):
    path = chapter(book / "notebooks", "03_coop.ipynb", "import os; os._exit(1)")
    report = execute_chapter(Job(path, path, {}, {}))
    assert "died" in report.error.lower()


def test_fan_out_executes_every_part_and_then_all(book, monkeypatch):
    jobs = []

    def record(function, items, *arguments, **options):
        jobs.append([(job.output.relative_to(book), job.parameters) for job in items])
        return iter(())

    monkeypatch.setattr("promptkit.reproduce.parallel", record)
    reproduce(
        "03",
        "full",
        ["a", "b"],
        [1, 2],
        fan_out=True,
        workers=2,
        shots=4,
        progress=False,
    )
    parts, last = jobs
    assert [str(path) for path, _ in parts] == [
        f"reproduced/full/parts/03_coop-{d}-seed{s}.ipynb" for d in "ab" for s in (1, 2)
    ]
    assert parts[0][1] == {
        "profile": "full",
        "datasets": ["a"],
        "seeds": [1],
        "shots": 4,
    }
    assert last == [
        (
            Path("reproduced/full/03_coop.ipynb"),
            parts[0][1] | {"datasets": ["a", "b"], "seeds": [1, 2]},
        )
    ]
    with pytest.raises(InputError, match="name the datasets and the seeds"):
        reproduce("03", fan_out=True)


def test_a_chapter_gets_what_it_declares(book, monkeypatch):
    chapter(
        book / "notebooks",
        "02_clip.ipynb",
        SHOW,
        parameters='profile = "mini"\ndataset = "pets"\nseed = 1',
    )
    jobs = []
    monkeypatch.setattr(
        "promptkit.reproduce.parallel",
        lambda f, items, *a, **k: jobs.extend(items) or iter(()),
    )
    reproduce("02,03", "mini", "cars", [2], "out", shots=1, progress=False)
    assert jobs[0].parameters == {"dataset": "cars", "seed": 2}
    assert jobs[1].parameters == {"datasets": ["cars"], "seeds": [2], "shots": 1}
    with pytest.raises(
        InputError, match="none of the chapters 02_clip takes a parameter 'shots'"
    ):
        reproduce("02", shots=1)
    with pytest.raises(InputError, match="unknown profile 'mimi'.*'mini'"):
        reproduce("02", "mimi")


def test_widgets_are_kept_as_saved_state(book):
    code = "import ipywidgets\nipywidgets.HTML('hello')"
    path = chapter(book / "notebooks", "03_coop.ipynb", code)
    assert not execute_chapter(Job(path, path, {}, {})).error
    assert (
        "application/vnd.jupyter.widget-state+json"
        in nbformat.read(path, 4).metadata.widgets
    )


def test_progress_bars_leave_no_trace(book):
    """Warnings stay."""
    bar = "import sys, time\nfrom tqdm import tqdm\nfor _ in tqdm(range(3)):\n    pass"
    warning = "print('watch out', file=sys.stderr, flush=True)"
    path = chapter(book / "notebooks", "04_cocoop.ipynb", bar, warning)
    assert not execute_chapter(Job(path, path, {}, {})).error
    shown = [cell.outputs for cell in nbformat.read(path, 4).cells[1:]]
    assert shown[0] == [] and shown[1][0]["text"] == "watch out\n"


def test_what_is_printed_in_one_go_is_one_output(book):
    code = (
        "import sys\n"
        "for text in ('a', '\\n', 'b'):\n"
        "    print(text, end='', flush=True)\n"
        "print('c', file=sys.stderr, flush=True)\n"
        "print('d')"
    )
    path = chapter(book / "notebooks", "04_cocoop.ipynb", code)
    assert not execute_chapter(Job(path, path, {}, {})).error
    outputs = nbformat.read(path, 4).cells[1].outputs
    assert [out["text"] for out in outputs] == ["a\nb", "c\n", "d\n"]


def test_the_same_tables_are_written_the_same(book):
    code = (
        "import pandas as pd\n"
        "from IPython.display import display\n"
        "for n in (1, 2):\n"
        "    display(pd.DataFrame({'a': [n]}).style.format('{:.1f}'))\n"
        "display(object())"
    )
    path = chapter(book / "notebooks", "04_cocoop.ipynb", code)
    texts = []
    for _ in range(2):
        assert not execute_chapter(Job(path, path, {}, {})).error
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    outputs = nbformat.read(path, 4).cells[1].outputs
    shown = "".join(out["data"].get("text/html", "") for out in outputs)
    assert {f"T_0000{n}_row0_col0" for n in (0, 1)} <= set(re.findall(r"T_\w+", shown))


def test_a_message_that_was_not_announced_is_found(book, monkeypatch):
    """An event loop that misses ZeroMQ's one sign of a message looks again."""

    class Deaf:
        def __init__(self):
            self.waits = []

        async def poll(self, timeout):
            self.waits.append(timeout)
            return len(self.waits) == 3

    class Silent(Channel):
        def __init__(self):
            self.socket = Deaf()

        async def _recv(self):
            return "the message"

    channel = Silent()
    assert asyncio.run(channel.get_msg()) == "the message"
    assert channel.socket.waits == [1000 * kernel.PATIENCE] * 3
    channel = Silent()
    assert asyncio.run(channel.get_msg(timeout=60)) == "the message"
    assert channel.socket.waits == [1000 * kernel.PATIENCE] * 3
    with pytest.raises(Empty):
        asyncio.run(Silent().get_msg(timeout=0.2))
    asked, get = [], Channel.get_msg

    def noted(*args, **more):
        asked.append(1)
        return get(*args, **more)

    monkeypatch.setattr(Channel, "get_msg", noted)
    path = chapter(book / "notebooks", "05_kgcoop.ipynb", "1 + 1")
    assert not execute_chapter(Job(path, path, {}, {})).error
    assert asked  # a chapter's kernel is read by it
