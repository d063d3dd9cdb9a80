"""The evidence kept up: what the book asks for, what of it is missing, and whether the
runs that ship still come out.

What a chapter asks for is found by executing it with a recorder in place of the runner,
so there is no second list of its experiments.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pandas as pd

from promptkit import evidence, pages
from promptkit.data import MINI_TASKS, load_dataset
from promptkit.errors import InputError, unknown
from promptkit.files import cache_folder, write_atomically
from promptkit.grids import RECORDER, execute_all
from promptkit.reproduce import environment, find_chapters, reproduce, select_chapters
from promptkit.results import find_run, read_run, results_dir, run_files
from promptkit.runs import Plan, Run, plan

TOLERANCE = 2.0  # points that a run may be away, as another processor rounds otherwise
LEADERBOARD = "leaderboard"  # the page that asks for runs beside the chapters


@dataclass(frozen=True)
class Status:
    """What a chapter or page asks for, as numbers of runs."""

    name: str
    asked: int
    there: int
    loose: int  # shipped, but measured with other code
    missing: int
    minutes: float  # of one core, for what is missing and loose


def requests(chapters=None, folder="notebooks") -> dict[str, list[Run]]:
    """What the book asks for: {chapter or page: [Run, ...]}, mini profile.

    A chapter is executed for it, on made-up numbers and once for its text and this
    package: the answer is kept in the cache folder.

    Args:
        chapters: see :func:`promptkit.reproduce.select_chapters`; "leaderboard" names
            the page.

    Raises:
        InputError: a chapter failed; the text has its error.
    """
    words = [] if chapters in (None, "all") else chapters.replace(",", " ").split()
    found, others = {}, [word for word in words if word != LEADERBOARD]
    if not words or LEADERBOARD in words:
        found[LEADERBOARD] = [planned.run for planned in pages.asked()]
    if words and not others:
        return found
    paths = select_chapters(others, find_chapters(folder))
    package = _package()
    kept = {
        path: cache_folder("asked") / f"{_key(path, package)}.jsonl" for path in paths
    }
    for path in paths:
        if not kept[path].exists():
            _record(path, kept[path], folder)
    for path in paths:
        lines = kept[path].read_text(encoding="utf-8").splitlines()
        found[path.stem] = [_run(json.loads(line)) for line in dict.fromkeys(lines)]
    return found


def _package() -> str:
    """Names the package's code."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _key(path, package):
    """Names a chapter's code and the package's."""
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join([*sources, package]).encode()).hexdigest()[:16]


def _run(fields):
    return Run(**fields | {"targets": tuple(fields["targets"])})


def _record(path, kept, folder):
    with tempfile.TemporaryDirectory() as scratch:
        note = Path(scratch) / "asked.jsonl"
        note.touch()
        settings = {RECORDER: str(note), "PROMPTKIT_RESULTS": f"{scratch}/results"}
        with environment(settings):
            (report,) = reproduce(
                [path.stem], output=scratch, folder=folder, progress=False
            )
        if report.error:
            raise InputError(
                f"what {path.stem} asks for is not known: it fails at {report.error}"
            )
        text = note.read_bytes()
        write_atomically(kept, lambda file: file.write(text))


def status(chapters=None, folder="notebooks") -> list[Status]:
    """What each chapter and page asks for, and how much of it ships."""
    shipped = evidence.load()
    known = set(shipped["asked"])
    costs = shipped.drop_duplicates("asked").groupby("method")["seconds"].mean()
    found = []
    for name, runs in requests(chapters, folder).items():
        plans = _distinct(runs)
        open_, loose = [], 0
        for key, planned in plans.items():
            if evidence.find(planned.config) is None:
                open_.append(planned)
                loose += key in known
        seconds = sum(_cost(planned, costs) for planned in open_)
        there, missing = len(plans) - len(open_), len(open_) - loose
        found.append(
            Status(name, len(plans), there, loose, missing, round(seconds / 60, 1))
        )
    return found


def _cost(planned, costs):
    """Seconds that a run takes about: as those of its method, else of all."""
    method = planned.config["method"]
    if method in costs:
        return float(costs[method])
    return float(costs.mean()) if len(costs) else 10.0


def _distinct(runs: Iterable[Run]) -> dict[str, Plan]:
    plans = (plan(run) for run in runs)
    return {evidence.asked(planned.config): planned for planned in plans}


def fill(
    chapters=None, folder="notebooks", workers=1, scheduler=None, minutes=None,
    stale=(), prune=False, progress=True,
) -> tuple[int, int]:  # fmt: skip
    """Make the runs that the book asks for and that do not ship, and ship them.

    They are made seed by seed, so that what is there at any time is about as much of
    everything, and stored as they are made, in ``fill`` of the results folder: when
    this is killed, the next one goes on from there.

    Args:
        chapters, folder: see :func:`requests`.
        workers, scheduler: see :func:`promptkit.grids.execute_all`.
        minutes: stop after so many.
        stale: methods whose shipped rows are to be made anew by the code as it is.
        prune: drop rows that nothing asks for any more.

    Returns: how many runs were added, and how many are still missing.

    Raises:
        InputError: an unknown method, or one whose shipped rows other code made.
    """
    asked = {}
    for runs in requests(chapters, folder).values():
        asked |= _distinct(runs)
    shipped = evidence.load()
    for method in stale:
        if method not in set(shipped["method"]):
            raise unknown("method of the evidence", method, set(shipped["method"]))
    old = shipped[shipped["method"].isin(stale)]["asked"].unique()
    stuck = {
        spec
        for planned in asked.values()
        for spec in evidence.specs(planned.config)
        if spec in set(shipped["method"]) and not evidence.stamped(spec)
    }
    if stuck := stuck - set(stale):
        raise InputError(
            f"the shipped runs of {', '.join(sorted(stuck))} were measured with other"
            " code: audit them (promptkit evidence audit), or make them anew (promptkit"
            f" evidence fill --stale {min(stuck)})"
        )
    todo = {
        key: planned
        for key, planned in asked.items()
        if key in set(old) or evidence.find(planned.config) is None
    }
    todo = dict(sorted(todo.items(), key=lambda item: item[1].run.seed))
    where = results_dir() / "fill"
    execute_all(
        todo.values(), workers, scheduler, progress, where, shipped=False,
        seconds=None if minutes is None else 60 * minutes,
    )  # fmt: skip
    made = [find_run(planned.config, where) for planned in todo.values()]
    made = [record for record in made if record is not None]
    dropped = set(old)
    if prune and not chapters:
        dropped |= set(shipped["asked"]) - set(asked)
    evidence.add(made, dropped)
    return len(made), len(todo) - len(made)


@dataclass(frozen=True)
class Audit:
    """A run that ships, made again."""

    method: str
    what: str
    apart: float  # points, the largest difference of its numbers


def audit(
    sample=20, seed=0, methods=None, tolerance=TOLERANCE, workers=1, scheduler=None,
    minutes=None, give=True, progress=True,
) -> list[Audit]:  # fmt: skip
    """Repeat shipped runs and compare: one of every method and protocol, and a random
    sample. Where all runs of a method agree it gets its stamp.

    Args:
        sample: runs beside the one of every method and protocol.
        seed: of the draw.
        methods: those to look at; default: all.
        tolerance: points that a number may be away.
        minutes: stop after so many; the quickest runs come first.
        give: stamp what agrees.

    Returns: one an audited run, the furthest apart first.

    Raises:
        InputError: nothing ships; an unknown method; a run that can be asked for no
            more, as another recipe, other weights or data are asked for now.
    """
    chosen = choose(evidence.load(), sample, seed, methods)
    return repeat(chosen, tolerance, workers, scheduler, minutes, give, progress)


def choose(rows: pd.DataFrame, sample: int, seed=0, methods=None) -> list[Plan]:
    """One shipped run of every method and protocol, of the smallest dataset that it has
    (the cheapest), and a random sample of the rest; those that took least time first.

    Where seeds are further apart than the tolerance, another processor's rounding
    changes a run as another seed does: such runs are not repeated, unless a method has
    no other; then those whose seeds are nearest.
    """
    runs = rows.drop_duplicates("asked")
    if methods is not None:
        for method in methods:
            if method not in set(runs["method"]):
                raise unknown("method of the evidence", method, set(runs["method"]))
        runs = runs[runs["method"].isin(methods)]
    if not len(runs):
        raise InputError("no runs ship with the package: there is nothing to audit")
    size = runs["dataset"].map(lambda name: len(load_dataset(name).classnames))
    apart = runs["asked"].map(_apart(rows)).fillna(0).clip(lower=TOLERANCE)
    runs = runs.assign(size=size, apart=apart).sample(frac=1, random_state=seed)
    runs = runs.sort_values(["apart", "size"], kind="stable")
    first = runs.drop_duplicates(["method", "protocol"])
    rest = runs[~runs["asked"].isin(first["asked"]) & (runs["apart"] == TOLERANCE)]
    rest = rest.sample(min(sample, len(rest)), random_state=seed)
    keys = pd.concat([first, rest]).sort_values("seconds", kind="stable")["asked"]
    return [_again(rows[rows["asked"] == key]) for key in keys]


def _apart(rows) -> pd.Series:
    """Of each run by what it asked for: the standard deviation over the seeds of what
    it measured, that of the number that spreads most; NaN with fewer than three seeds,
    which hardly tell it.
    """
    rows = rows[rows["split"] != "hm"]
    same = ["method", "overrides", "protocol", "profile", "model", "dataset", "shots"]
    seeds = rows.groupby([*same, "target", "split"])["value"]
    spread = seeds.transform("std").where(seeds.transform("size") > 2)
    return spread.groupby(rows["asked"]).max()


def _again(rows) -> Plan:
    """The plan of a shipped run, from its rows."""
    row, names = rows.iloc[0], set(rows["target"])
    overrides = json.loads(row["overrides"])
    model, _, weights = row["model"].partition("/")
    targets = ()
    if row["protocol"] == "cross-dataset":
        targets = tuple(n for n in MINI_TASKS if n in names - {row["dataset"]})
    planned = plan(
        Run(
            row["protocol"],
            row["method"],
            row["dataset"],
            targets,
            int(row["shots"]) or 16,  # 0 and 0 are of methods that have neither
            int(row["seed"]) or 1,
            model,
            weights or None,
            precision=row["precision"],
            profile=row["profile"],
            max_steps=overrides.pop("max_steps", None),
            overrides=overrides,
        )
    )
    if evidence.asked(planned.config) != row["asked"]:
        raise InputError(
            f"the shipped runs of {row['method']} ({row['protocol']} on"
            f" {row['dataset']}) can be asked for no more: its recipe, the weights or"
            " the data are other ones now; make what is missing by 'promptkit evidence"
            " fill --prune'"
        )
    return planned


def repeat(
    plans: list[Plan], tolerance=TOLERANCE, workers=1, scheduler=None, minutes=None,
    give=True, progress=True,
) -> list[Audit]:  # fmt: skip
    """Make shipped runs again, compare them, and stamp the methods of which all agree
    (none is stamped of which the time was too short for one).
    """
    with tempfile.TemporaryDirectory() as scratch:
        execute_all(
            plans, workers, scheduler, progress, scratch, shipped=False,
            seconds=None if minutes is None else 60 * minutes,
        )  # fmt: skip
        found = compared(scratch)
    made = Counter(one.method for one in found)
    asked = Counter(planned.config["method"] for planned in plans)
    wrong = {one.method for one in found if one.apart > tolerance}
    if give:
        evidence.stamp({m for m in made if made[m] == asked[m]} - wrong)
    return found


def compared(folder) -> list[Audit]:
    """The runs of a results folder beside those that ship, the furthest apart first;
    what does not ship is left out.
    """
    old = evidence.load().set_index(["asked", "target", "split"])["value"].to_dict()
    found = []
    for path in run_files(folder):
        record = read_run(path)
        config, key = record["config"], evidence.asked(record["config"])
        rows = {
            (key, row["target"], row["split"]): row["value"] for row in record["rows"]
        }
        if rows.keys() <= old.keys():
            apart = max(abs(value - old[spot]) for spot, value in rows.items())
            what = f"{config['protocol']} on {config['dataset']}, seed {config['seed']}"
            found.append(Audit(config["method"], what, float(apart)))
    return sorted(found, key=lambda one: -one.apart)


def table(found: list[Audit], tolerance=TOLERANCE) -> pd.DataFrame:
    """An audit as rows: method, runs, how far apart at most, and whether it agrees."""
    rows = pd.DataFrame([vars(one) for one in found])
    out = rows.groupby("method")["apart"].agg(["size", "max"]).reset_index()
    out.columns = ["method", "runs", "apart"]
    return out.assign(agrees=out["apart"] <= tolerance)
