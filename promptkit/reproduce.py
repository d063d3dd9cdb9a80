"""Execute the chapters through papermill, one after another, in several processes, or
on a Dask cluster.
"""

import ast
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import nbformat

from promptkit.errors import InputError, unknown
from promptkit.parameters import names, whole_numbers
from promptkit.recipe import PROFILES
from promptkit.results import results_dir, write_text
from promptkit.workers import parallel, sweep_temporaries

# A chapter declares what it takes in its cell tagged "parameters"; these names mean the
# same.
SPELLINGS = {
    "datasets": ("datasets", "data"),
    "dataset": ("dataset",),
    "seeds": ("seeds",),
    "seed": ("seed",),
}

ADDRESS = re.compile(r" at 0x[0-9a-f]+(?=>)")  # of an object in memory
TABLE = re.compile(r'<table id="(T_[0-9a-f]{5})"')  # of pandas' Styler

# A kernel that starts and ends sooner: importing torch makes a million objects that
# stay, among which garbage is looked for in vain, and an interpreter takes seconds to
# free them one by one.
# And one that ends with the process that started it: ipykernel's own watch waits for
# process 1 to adopt it, which a desktop's session manager does in its place.
KERNEL = "; ".join(
    [
        "import atexit, gc, os, sys",
        f"sys.path.append({str(Path(__file__).parents[1])!r})",
        "from promptkit.workers import end_with_parent",
        "end_with_parent(int(os.environ.get('JPY_PARENT_PID') or os.getppid()))",
        "gc.set_threshold(200_000)",
        "from ipykernel.kernelapp import launch_new_instance",
        "launch_new_instance()",
        "atexit._run_exitfuncs()",
        "os._exit(0)",
    ]
)


@dataclass(frozen=True)
class Job:
    """One execution of a chapter."""

    chapter: Path
    output: Path
    parameters: dict
    environment: dict

    @property
    def name(self) -> str:
        """What a report calls it: the output's name without its ending."""
        return self.output.stem


@dataclass(frozen=True)
class Report:
    """How an execution went; ``error`` is empty where it went well."""

    name: str
    seconds: float
    output: Path
    error: str = ""


def find_chapters(folder="notebooks") -> list[Path]:
    """The chapters ``NN_name.ipynb`` of a folder, in the order of their numbers."""
    paths = sorted(
        path
        for path in Path(folder).glob("*.ipynb")
        if re.fullmatch(r"\d+_\w+", path.stem)
    )
    if not paths:
        raise InputError(
            f"no chapters (NN_name.ipynb) in {Path(folder).resolve()}; run from the"
            " repository's root"
        )
    return paths


def select_chapters(wanted, paths: list[Path]) -> list[Path]:
    """Pick chapters.

    Args:
        wanted: "all" or None, or a comma-separated text or list of numbers ("03" or
            "3"), ranges ("02-05") and names ("coop" or "03_coop").
        paths: what :func:`find_chapters` found.

    Raises:
        InputError: one of them names no chapter; the text gives the nearest names.
    """
    wanted = (
        wanted.replace(",", " ").split()
        if isinstance(wanted, str)
        else [str(word) for word in wanted or []]
    )
    if not wanted or wanted == ["all"]:
        return list(paths)
    names = {path: (path.stem, path.name, path.stem.split("_", 1)[1]) for path in paths}
    chosen = []
    for word in wanted:
        low, _, high = word.partition("-")
        numbers = (
            range(int(low), int(high or low) + 1)
            if low.isdigit() and (high or low).isdigit()
            else ()
        )
        found = [
            path
            for path in paths
            if int(path.stem.split("_")[0]) in numbers or word in names[path]
        ]
        if not found:
            raise unknown(
                "chapter",
                word,
                [path.stem for path in paths]
                + [path.stem.split("_", 1)[1] for path in paths],
            )
        chosen += found
    return [path for path in paths if path in chosen]


def reproduce(
    chapters=None,
    profile="mini",
    data=None,
    seeds=None,
    output=None,
    workers=1,
    scheduler=None,
    folder="notebooks",
    fan_out=False,
    progress=True,
    root=None,
    fresh=None,
    **parameters,
) -> list[Report]:
    """Execute chapters and report on each; one that fails keeps its old notebook, and
    the others go on.

    Args:
        chapters: see :func:`select_chapters`.
        profile: "smoke", "mini" or "full".
        data: names of datasets, or "all"; a chapter's own choice by default.
        seeds: list of seeds; a chapter's own choice by default.
        output: folder for the executed notebooks. By default profile "mini" refreshes
            the notebooks in place and the others write to ``reproduced/<profile>``.
        workers: chapters executed at the same time.
        scheduler: address of a Dask scheduler whose workers share this file system;
            replaces ``workers``.
        folder: where the chapters are.
        fan_out: first execute each chapter once for every dataset and seed, to spread a
            long run over the workers (kept below ``<output>/parts``), then once over
            all of them, which finds every run stored.
        progress: show a bar a chapter, and a line when one is done.
        root: folder of the real datasets, which chapters find in $PROMPTKIT_DATA.
        fresh: a results folder in which all runs are made, in place of reading those
            that are stored or ship; notebooks go to ``reproduced/fresh`` by default.
        parameters: other parameters (model, shots, ...); a chapter gets those that it
            declares.

    Raises:
        InputError: unknown chapter or profile, a chapter without a cell tagged
            "parameters", or a parameter that none of the chapters takes.
    """
    if profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    paths = select_chapters(chapters, find_chapters(folder))
    data = data if data in (None, "all") else names("data", data)
    given = {
        "profile": profile,
        "datasets": data,
        "seeds": None if seeds is None else whole_numbers("seeds", seeds),
        **parameters,
    }
    given = {key: value for key, value in given.items() if value is not None}
    declared = {path: declared_parameters(path) for path in paths}
    for key in set(given) - {"profile"}:
        if not any(_spelled(key, given[key], names) for names in declared.values()):
            raise InputError(
                f"none of the chapters {', '.join(p.stem for p in paths)} takes a"
                f" parameter {key!r}"
            )
    in_place = output is None and profile == "mini" and fresh is None
    default = profile if fresh is None else "fresh"
    target = Path(output or Path("reproduced") / default)
    # The mini CLIP's products are too small to share: a second thread would only wait
    # for the first.
    cores = max(1, (os.cpu_count() or 1) // max(1, workers)) if profile == "full" else 1
    environment = {
        "PROMPTKIT_RESULTS": str(results_dir().resolve()),
        "OMP_NUM_THREADS": str(cores),
    }
    if fresh is not None:
        environment["PROMPTKIT_RESULTS"] = str(Path(fresh).resolve())
        environment["PROMPTKIT_EVIDENCE"] = "none"
    if root is not None:
        environment["PROMPTKIT_DATA"] = str(Path(root).resolve())

    def job(path, folder, suffix="", **more):
        settings = {}
        for key, value in (given | more).items():
            settings |= _spelled(key, value, declared[path])
        settings = {
            key: value
            for key, value in settings.items()
            if value != declared[path][key]
        }
        return Job(
            path.resolve(),
            (Path(folder) / f"{path.stem}{suffix}.ipynb").resolve(),
            settings,
            environment,
        )

    stages = [[job(path, path.parent if in_place else target) for path in paths]]
    if fan_out and data not in (None, "all") and seeds:
        cells = [
            (path, name, seed) for path in paths for name in data for seed in seeds
        ]
        parts = [
            job(p, target / "parts", f"-{d}-seed{s}", datasets=[d], seeds=[s])
            for p, d, s in cells
        ]
        stages.insert(0, parts)
    elif fan_out:
        raise InputError(
            "to fan out over datasets and seeds, name the datasets and the seeds"
        )
    return [
        report
        for stage in stages
        for report in _run_stage(stage, workers, scheduler, progress)
    ]


def _run_stage(jobs, workers, scheduler, progress):
    alone = progress and workers == 1 and not scheduler
    reports = []
    # In a process of its own: nbclient answers Ctrl-C and SIGTERM itself, by failing
    # the one chapter at work.
    execution = {"failed": _died, "apart": True, "progress_bar": alone}
    sweep_temporaries(*{job.output.parent for job in jobs})
    for job, report in parallel(execute_chapter, jobs, workers, scheduler, **execution):
        reports.append(report)
        if progress:
            state = (
                f"FAILED: {report.error}"
                if report.error
                else f"-> {os.path.relpath(report.output)}"
            )
            print(
                f"[{len(reports)}/{len(jobs)}] {job.name} {report.seconds:.0f} s"
                f" {state}",
                file=sys.stderr,
                flush=True,
            )
    return sorted(reports, key=lambda report: report.name)


def _died(job, sentence):
    return Report(job.name, 0.0, job.output, sentence)


def declared_parameters(path) -> dict:
    """Name -> default of what a chapter's cell tagged "parameters" assigns.

    Raises:
        InputError: the file is no notebook, or has no such cell.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        cell = next(
            cell
            for cell in notebook.cells
            if "parameters" in cell.metadata.get("tags", [])
        )
    except StopIteration:
        raise InputError(f"{path} has no cell tagged 'parameters'") from None
    except (
        Exception
    ) as error:  # nbformat raises its own and json's errors for a damaged file
        raise InputError(f"cannot read the notebook {path}: {error}") from None
    found = {}
    for node in ast.parse(cell.source).body:
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        for target in targets:
            if isinstance(target, ast.Name):
                try:
                    found[target.id] = ast.literal_eval(node.value)
                except ValueError:
                    found[target.id] = ast.unparse(
                        node.value
                    )  # computed: equal to no value that can be given
    return found


def _spelled(key, value, names):
    """The parameter under the name that a chapter declares for it; {} where it takes
    none.
    """
    for name in SPELLINGS.get(key, (key,)):
        if name in names:
            return {name: value}
    single = (
        key[:-1] if key.endswith("s") else None
    )  # a chapter about one dataset takes a list of one
    if (
        single in SPELLINGS
        and single in names
        and isinstance(value, list)
        and len(value) == 1
    ):
        return {single: value[0]}
    return {}


@contextlib.contextmanager
def environment(settings: dict[str, str]):
    """Variables of the environment for a while; afterwards all are as they were."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def execute_chapter(job: Job, progress_bar=False) -> Report:
    """Execute one chapter with this very interpreter and write it whole, or not at all.

    What papermill notes about the machine (paths, times) is dropped, so that an
    executed notebook changes only where its outputs do.
    """
    import papermill

    from promptkit.kernel import Manager

    started = time.perf_counter()
    error = ""
    try:
        with tempfile.TemporaryDirectory() as kernels, environment(job.environment):
            os.environ["JUPYTER_PATH"] = _own_kernel(kernels)
            notebook = papermill.execute_notebook(
                str(job.chapter),
                None,
                parameters=job.parameters,
                kernel_name="python3",
                language="python",
                progress_bar=progress_bar,
                cwd=str(job.chapter.parent),
                autosave_cell_every=0,
                kernel_manager_class=Manager,
            )
        write_text(job.output, nbformat.writes(_clean(notebook)) + "\n")
    except papermill.PapermillExecutionError as failure:
        cell = failure.exec_count or failure.cell_index
        error = f"cell {cell}: {failure.ename}: {failure.evalue}"
    except Exception as failure:  # a dead kernel, a full disk: like a failing cell
        error = f"{type(failure).__name__}: {failure}"
    return Report(job.name, time.perf_counter() - started, job.output, error)


def _own_kernel(folder):
    """Describe a kernel of this very interpreter, for one execution alone; returns the
    JUPYTER_PATH to it.
    """
    home = Path(folder) / "kernels" / "python3"
    home.mkdir(parents=True)
    argv = [sys.executable, "-c", KERNEL, "-f", "{connection_file}"]
    (home / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
    )
    return os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")]))


def _clean(notebook):
    """Without what differs from one execution to the next and nobody reads afterwards:
    papermill's notes, times, progress bars, objects' addresses, tables' random names.
    """
    tables = count()
    for part in (notebook, *notebook.cells):
        part.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(out for out in cell.outputs if not _progress(out))
            for data in (out.get("data", {}) for out in cell.outputs):
                if "text/plain" in data:
                    data["text/plain"] = ADDRESS.sub("", data["text/plain"])
                if name := TABLE.search(data.get("text/html", "")):
                    html, new = data["text/html"], f"T_{next(tables):05x}"
                    data["text/html"] = html.replace(name[1], new)
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
    return notebook


def _joined(outputs) -> list:
    """What was printed in one go, in one piece: the kernel cuts it where it likes."""
    found = []
    for output in outputs:
        before = found[-1] if found else {}
        if "text" in output and before.get("name") == output.get("name"):
            before["text"] += output["text"]
        else:
            found.append(output)
    return found


def _progress(output) -> bool:
    text = output.get("text", "")
    return output.get("name") == "stderr" and ("\r" in text or not text.strip())
