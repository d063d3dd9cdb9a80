"""What runs cost: measured steps and test images, put together to time and memory.

The table ``assets/costs.csv`` has a row a machine, precision, model, method and number
of classes, as ``benchmarks/limit.py`` measures and merges it; see ``COLUMNS``. A run
takes the steps of its recipe, all stages, and its test images, times the seconds of
one. At another number of classes or batch size than measured

- with rows of two numbers of classes or more: a line through the two nearest ones;
- with one: the text tower's share of the operations (``step_text``) grows with the
  classes, all else with the batch. Where what a tower keeps for the gradient outgrows
  its ``room`` it computes that part twice, which takes half as much again. Memory grows
  with what is kept, ``BESIDE`` MiB a MiB: too much where other parts need more.

What the table cannot know: image features that are cached make a step cheaper where a
recipe does not augment; the steps of all stages are taken to cost the same, those that
were measured (the last stage's); a run whose hyperparameters are not those of the
base-to-new recipe has other steps. What is done once (features of a pool, a cache, a
teacher's training, reading the images again) is not counted. A GPU is another machine.
"""

import math
import platform
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from promptkit import identity
from promptkit.data.benchmark import DATASETS
from promptkit.data.benchmark import TABLE as BENCHMARK
from promptkit.errors import InputError, unknown
from promptkit.files import some, write_atomically
from promptkit.recipe import Recipe, Setting
from promptkit.registry import nesting, recipe, supervision
from promptkit.results import PROBE, run_path

TABLE = Path(__file__).parent / "assets" / "costs.csv"
KEYS = ["machine", "precision", "model", "method", "classes"]
COLUMNS = {  # and their units
    **dict.fromkeys(KEYS, ""),
    "batch": "images a step",
    "parameters": "numbers that are learned",
    "step": "seconds of a training step",
    "step_share": "the least that its calls of the towers need / step",
    "step_plain": "seconds of open_clip's own towers for the same calls",
    "step_text": "the text tower's share of its operations",
    "step_memory": "MiB above rest, at most",
    "kept_text": "MiB that the text tower keeps for the gradient",
    "kept_image": "MiB that the image tower keeps for the gradient",
    "room": "MiB that a tower may keep before it computes twice",
    "test": "seconds of a test image, by itself",
    "test_share": "as step_share",
    "test_plain": "as step_plain",
    "test_text": "as step_text",
}
WHOLE = ["classes", "batch", "parameters", "step_memory", "room"]
NEEDED = ["method", "classes", "batch", "test", "test_text"]  # of a measured row
OF_STEPS = ["step_text", "step_memory", "kept_text", "kept_image", "room"]
BESIDE = 2.4  # MiB held at a time where one is kept: CoOp's, from 50 to 500 classes
TWICE = 1.5  # a forward pass more, where a backward pass costs as much as one


# --- the table ------------------------------------------------------------------------


def machine(device="cpu") -> str:
    """What the table calls a machine: its card, or its processor."""
    name = identity.of_device(device)
    if name != "cpu":
        return name
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(x.partition(":")[2] for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):  # Linux alone has it
        name = platform.processor() or platform.machine()
    for mark in ("(R)", "(TM)", "(r)", "(tm)"):
        name = name.replace(mark, "")
    return " ".join(name.split())


def load(path=None) -> pd.DataFrame:
    """All rows of a table of costs, by default of the one that ships, with the columns
    ``COLUMNS``; what was not measured is missing.

    Raises:
        InputError: it is damaged.
    """
    path = Path(path or TABLE)
    try:
        rows = pd.read_csv(path)
        return rows[list(COLUMNS)].astype(dict.fromkeys(WHOLE, "Int64"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"damaged table of costs {path} ({error}): install promptkit anew, or get"
            " the file again from its repository"
        ) from None


def merge(
    rows: Iterable[dict], machine: str, precision: str, model: str, path=None
) -> int:
    """Put measured rows into a table of costs, in place of those of the same machine,
    precision, model, method and number of classes. Returns how many rows it has then.

    Args:
        rows: as ``benchmarks/limit.py`` measures them; those with an "error" are left
            out.
        path: of a table, which is made if missing; by default the one that ships.

    Raises:
        InputError: a row lacks its method or its numbers, or the table is damaged.
    """
    path = Path(path or TABLE)
    rows = [row for row in rows if "error" not in row]
    for row in rows:
        for key in NEEDED + OF_STEPS * ("step" in row):
            if row.get(key) is None:
                raise InputError(
                    f"the measured row of {row.get('method')!r} has no {key!r}: measure"
                    " it anew by benchmarks/limit.py"
                )
    where = {"machine": machine, "precision": precision, "model": model}
    tables = [pd.DataFrame([row | where for row in rows], columns=list(COLUMNS))]
    if path.exists():
        tables.insert(0, load(path))
    table = pd.concat([t for t in tables if len(t)] or tables, ignore_index=True)
    table = table.drop_duplicates(KEYS, keep="last").sort_values(KEYS)
    for name in COLUMNS:
        if name in WHOLE:
            table[name] = table[name].astype(float).round().astype("Int64")
        elif name not in KEYS:
            table[name] = table[name].map(lambda x: float(f"{x:.4g}"))
    text = table.to_csv(index=False, lineterminator="\n")
    write_atomically(path, lambda file: file.write(text.encode()))
    return len(table)


# --- what a run has to do -------------------------------------------------------------


class Size(NamedTuple):
    """A dataset: how many classes, training and test images."""

    classes: int
    train: int
    test: int


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        method: its spec, such as "dept(coop)".
        stages: (steps, batch size) of each stage of training; empty where nothing is
            learned.
        classes: those that a training step has to do with.
        tests: (classes, images) of each test.
    """

    method: str
    stages: tuple[tuple[int, int], ...]
    classes: int
    tests: tuple[tuple[int, int], ...]

    @property
    def steps(self) -> int:
        return sum(steps for steps, _ in self.stages)


def work(method: str, protocol: str, dataset: str, shots: int = 16) -> Work:
    """What a run of the real benchmark has to do by its paper's recipe; no data is
    needed for it.

    Args:
        method: as :func:`promptkit.registry.build` takes it.
        protocol: one of ``promptkit.recipe.PROTOCOLS``.
        dataset: one of ``promptkit.data.benchmark.TABLE``, trained on; a cross-dataset
            run is tested on the others of the eleven too, domain-generalization on its
            shifts.
        shots: training images a class.

    Raises:
        InputError: unknown names; a method that learns from sentences, whose number
            depends on the data.
    """
    if dataset not in BENCHMARK:
        raise unknown("dataset of the real benchmark", dataset, BENCHMARK)
    targets = ()
    if protocol == "cross-dataset":
        targets = tuple(name for name in DATASETS if name != dataset)
    elif protocol == "domain-generalization":
        targets = BENCHMARK[dataset].shifts
    setting = Setting(protocol, dataset, shots, "full")
    sizes = [_published(name) for name in (dataset, *targets)]
    return _work(method, recipe(method, setting), protocol, sizes, shots)


def _published(name) -> Size:
    classes, train, _, test = BENCHMARK[name].counts
    return Size(classes, train, test)


def work_of(plan) -> Work:
    """What a :class:`~promptkit.runs.Plan` has to do, by the sizes of its data.

    Raises:
        InputError: it is a linear probe, which takes no steps, or learns from
            sentences.
    """
    run = plan.run
    if run.method == PROBE:
        raise InputError("the linear probe is not among the methods with known costs")
    sizes = [
        Size(len(data.classnames), len(data.train), len(data.test))
        for data in (plan.source, *plan.targets)
    ]
    return _work(run.method, plan.recipe, run.protocol, sizes, run.shots, run.max_steps)


def _work(method, recipe: Recipe, protocol, sizes, shots, most=None) -> Work:
    source, kinds = sizes[0], supervision(method)
    classes, tests = source.classes, [(size.classes, size.test) for size in sizes]
    if protocol == "base-to-new":
        base = math.ceil(classes / 2)
        seen = round(source.test * base / classes)
        tests = [(base, seen), (classes - base, source.test - seen)]
        classes = classes if kinds == {"pool"} else base
    stages, left = [], math.inf if most is None else most
    for part in recipe.parts() if recipe.trains else ():
        images = _images(method, kinds, recipe, source.train, classes, shots)
        steps = min(part.steps(images) * part.epochs, left)
        left -= steps
        stages.append((steps, min(part.batch_size, images)))
    return Work(method, tuple(stages), classes, tuple(tests))


def _images(method, kinds, recipe, there, classes, shots) -> int:
    """Training images; those that UPL picks of its pool where it picks so many a
    class.
    """
    if "shots" in kinds:
        return min(shots * classes, there)
    if "pool" in kinds:
        _, default = nesting(method)[0].hyperparameters().get("top_k", (None, -1))
        picked = recipe.hparams.get("top_k", default)
        return there if picked == -1 else min(picked * classes, there)
    raise InputError(
        f"{method} learns from sentences, and how many there are depends on the data:"
        " its steps cannot be told"
    )


# --- what that takes ------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Seconds of training and testing, and the most MiB above rest that a training step
    takes (0 where nothing is learned).
    """

    training: float
    testing: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.training + self.testing


class Costs:
    """Measured costs on one machine, at one precision, of one model.

    Args:
        rows: of :func:`load`, all of one machine, precision and model.

    Attributes:
        name: such as "Intel Xeon Processor, fp32, ViT-B-16-quickgelu".

    Raises:
        InputError: there are no rows, or they are of several machines.
    """

    def __init__(self, rows: pd.DataFrame):
        if len(rows[KEYS[:3]].drop_duplicates()) != 1:
            raise InputError(
                "costs are of one machine, precision and model: give the rows of one"
            )
        self.machine, self.precision, self.model = rows.iloc[0][KEYS[:3]]
        self.name = f"{self.machine}, {self.precision}, {self.model}"
        floats = rows.astype({name: float for name in COLUMNS if name not in KEYS[:4]})
        self._rows = {
            method: part.sort_values("classes").to_dict("records")
            for method, part in floats.groupby("method")
        }

    @property
    def methods(self) -> list[str]:
        """The specs that were measured."""
        return list(self._rows)

    def rows(self, method: str) -> list[dict]:
        """The measured rows of a method, fewer classes first; empty if there are
        none.
        """
        return self._rows.get(method, [])

    def step(self, method: str, classes: int, batch: int) -> float:
        """Seconds of a training step.

        Raises:
            InputError: none was measured.
        """
        rows = self._measured(method, "step")
        return _line(rows, classes, lambda row, more: _seconds(row, more, batch))

    def memory(self, method: str, classes: int, batch: int) -> float:
        """MiB above rest that a training step takes at most.

        Raises:
            InputError: none was measured.
        """
        rows = self._measured(method, "step")
        return _line(rows, classes, lambda row, more: _memory(row, more, batch))

    def test(self, method: str, classes: int) -> float:
        """Seconds of a test image among so many classes.

        Raises:
            InputError: none was measured.
        """

        def seconds(row, more):
            return row["test"] * (1 + row["test_text"] * (more - 1))

        return _line(self._measured(method, "test"), classes, seconds)

    def of(self, work: Work) -> Cost:
        """What a run takes.

        Raises:
            InputError: its method was not measured.
        """
        training, memory = 0.0, 0.0
        for steps, batch in work.stages:
            training += steps * self.step(work.method, work.classes, batch)
            memory = max(memory, self.memory(work.method, work.classes, batch))
        tests = [n * self.test(work.method, classes) for classes, n in work.tests]
        return Cost(training, sum(tests), memory)

    def total(self, plans: Iterable) -> tuple[float, list[str]]:
        """Seconds of several plans together, and the methods of those whose cost is not
        known, which are left out. What the two transfer protocols share is trained
        once, and so is what runs share that differ at test time alone.
        """
        seconds, left_out, trained = 0.0, set(), set()
        for plan in plans:
            run = plan.run
            try:
                cost = self.of(work_of(plan))
            except InputError:
                left_out.add(run.method)
                continue
            seconds += cost.testing
            key = plan.training, run.protocol if plan.students else ""
            if key not in trained:
                seconds += cost.training
            trained.add(key)
        return seconds, sorted(left_out)

    def _measured(self, method, what):
        rows = [row for row in self.rows(method) if not math.isnan(row[what])]
        if not rows:
            raise InputError(
                f"no {what} of {method!r} was measured on {self.name}: benchmarks/"
                "limit.py measures it and puts it into the table of costs"
            )
        return rows


def _line(rows, classes, value) -> float:
    """The value at a number of classes: of the only row, with so many times its own
    classes; or on a line through the two nearest rows as they were measured.

    Args:
        value: a function of a row and of how many times the classes it is asked for.
    """
    if len(rows) == 1:
        return value(rows[0], classes / rows[0]["classes"])
    i = bisect([row["classes"] for row in rows[1:-1]], classes)
    low, high = rows[i : i + 2]
    share = (classes - low["classes"]) / (high["classes"] - low["classes"])
    return max(value(low, 1) + share * (value(high, 1) - value(low, 1)), 0.0)


def _seconds(row, more, batch):
    shares = {"text": row["step_text"], "image": 1 - row["step_text"]}
    return row["step"] * sum(
        shares[tower] * grown * (TWICE if kept <= row["room"] < kept * grown else 1)
        for tower, grown, kept in _towers(row, more, batch)
    )


def _memory(row, more, batch):
    def held(kept):  # with the gradients and products beside it
        return BESIDE * kept if kept <= row["room"] else row["room"]

    change = sum(
        held(kept * grown) - held(kept) for _, grown, kept in _towers(row, more, batch)
    )
    return max(row["step_memory"] + change, 0.0)


def _towers(row, more, batch):
    """(tower, how many times as much as was measured it has to do, MiB it kept)."""
    return [
        ("text", more, row["kept_text"]),
        ("image", batch / row["batch"], row["kept_image"]),
    ]


def every(path=None) -> list[Costs]:
    """The costs of a table, one a machine, precision and model, those of the most
    methods first; by default of the table that ships.
    """
    found = [Costs(rows) for _, rows in load(path).groupby(KEYS[:3])]
    return sorted(found, key=lambda costs: -len(costs.methods))


def choose(methods: Iterable[str], device="cpu", path=None) -> Costs:
    """The costs that know the most of these methods; of several, those of the machine
    at hand.

    Raises:
        InputError: the table is empty or damaged.
    """
    found, asked, here = every(path), set(methods), machine(device)
    if not found:
        raise InputError(
            f"the table of costs {path or TABLE} is empty: benchmarks/limit.py fills it"
        )
    return max(
        found,
        key=lambda costs: (len(asked & set(costs.methods)), costs.machine == here),
    )


# --- in words -------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Such as "90 seconds", "12 minutes", "5.2 hours" or "12 days"."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 86400:,.0f} days"


def told(plans: Iterable, device="cpu") -> str:
    """What those of several plans that are not stored yet take by the table that ships,
    in words.

    Args:
        plans: a list of :class:`~promptkit.runs.Plan`.
    """
    plans = list(plans)
    todo = [plan for plan in plans if not run_path(plan.config).exists()]
    costs = choose([plan.run.method for plan in todo], device)
    seconds, left_out = costs.total(todo)
    return (
        f"{len(todo)} of {len(plans)} runs to do: about {duration(seconds)} on one"
        f" {costs.name}, by the table of costs{_without(left_out)}"
    )


def scaled(plans: Iterable, plan, batch: int, seconds: float) -> str:
    """What several plans take, in words, where a step of one of them takes so many
    seconds: in the proportions of the table that ships. Empty if it does not know that
    step.
    """
    plans = list(plans)
    costs = choose([plan.run.method for plan in plans], plan.clip.device)
    try:
        own = costs.step(plan.run.method, work_of(plan).classes, batch)
    except InputError:
        return ""
    total, left_out = costs.total(plans)
    return (
        f"about {duration(total * seconds / own)} for {len(plans)} runs with their"
        f" tests, in the proportions measured on {costs.name}{_without(left_out)}"
    )


def _without(methods) -> str:
    return f"; without {some(methods)}: not known" if methods else ""
