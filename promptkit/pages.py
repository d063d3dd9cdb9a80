"""Pages of the book that are made from what was measured: the leaderboard, what the
methods cost, and the collected claims.
"""

import json
import math
from pathlib import Path
from textwrap import wrap

import matplotlib.pyplot as plt
import pandas as pd

from promptkit.costs import Costs, every, work
from promptkit.data import DATASETS, MINI_TASKS
from promptkit.data.tasks import PLAIN
from promptkit.errors import InputError
from promptkit.files import write_atomically
from promptkit.grids import grid, known
from promptkit.plots import base_new_plane, cost_plane
from promptkit.recipe import TRANSFER, Setting
from promptkit.registry import methods, parse, recipe, specs
from promptkit.results import (
    Claim,
    check_claim,
    differences,
    label,
    load_claims,
    newest_weights,
    options_of,
    paper_numbers,
    results_dir,
    summarise,
)
from promptkit.runs import Plan

# What the papers say of each other's methods.
COMPARED = [
    ("coop", "above", "clip", "base"),
    ("coop", "below", "clip", "new"),
    ("cocoop", "above", "coop", "new"),
    ("cocoop", "above", "coop", "hm"),
    ("kgcoop", "above", "coop", "new"),
    ("kgcoop", "above", "coop", "hm"),
    ("prograd", "above", "coop", "new"),
    ("prograd", "above", "coop", "hm"),
    ("maple", "above", "coop", "hm"),
    ("maple", "above", "ivlp", "hm"),
    ("promptsrc", "above", "ivlp", "new"),
    ("promptsrc", "above", "maple", "hm"),
    ("promptsrc", "above", "coop", "hm"),
]
SEEDS = (1, 2, 3, 4, 5)
LEAST = 3  # seeds that a method has to have for the leaderboard
LEFT_OUT = ("tpt", "awt")  # of the leaderboard: minutes a run, in their own chapters
# Dear by their recipes' own numbers: they are ranked as their chapters run them.
RANKED_AS = {
    "argue": {"epochs": 100},
    "promptkd": {"epochs": 20},
    "upl": {"members": 4},
}
# Whose rows stand for a method's own: CoCoOp's authors print zero-shot CLIP and CoOp.
ROW_OF = {"clip": "2203.05557", "coop": "2203.05557"}
# Made anew without their code: their papers' numbers are of something else.
RECONSTRUCTED = ("aape", "kapt", "logoprompt", "qnet")
WHERE = {"base": "on base classes", "new": "on new classes", "hm": "in harmonic mean"}


def equal_host(
    plugin: str, protocol="base-to-new", dataset="sat", shots=16, profile="mini"
) -> tuple[str, dict]:
    """A plug-in's host, trained by the plug-in's recipe: its name and overrides, as
    ``sweep`` takes them.

    Papers compare a plug-in with its host at equal settings, which are not always the
    host's own.
    """
    setting, host = Setting(protocol, dataset, shots, profile), parse(plugin)[1]
    plan, own = recipe(plugin, setting), recipe(host, setting)
    changed = _changes(_filled(host, own.hparams), _filled(host, plan.hparams["host"]))
    stages = [*plan.parts()]  # the plug-in's own come first
    stage = stages[-len([*own.parts()])]
    fields = {key: getattr(stage, key) for key in ("epochs", "lr", "batch_size")}
    return host, changed | {
        key: value for key, value in fields.items() if value != getattr(own, key)
    }


def _filled(spec, hparams):
    """Hyperparameters with their defaults, those of a host nested in "host"."""
    cls, host = methods()[parse(spec)[0]], parse(spec)[1]
    known = cls.hyperparameters()
    filled = {n: hparams.get(n, default) for n, (_, default) in known.items()}
    inner = {"host": _filled(host, hparams.get("host", {}))} if host else {}
    return filled | inner


def _changes(had, wanted):
    """What of ``wanted`` is not ``had``, nested as they are."""
    changed = {key: value for key, value in wanted.items() if value != had[key]}
    if "host" in changed:
        changed["host"] = _changes(had["host"], wanted["host"])
    return changed


def compared(runs: pd.DataFrame, method: str = "") -> list[Claim]:
    """What the papers say of each other's methods, decided by averages over the tasks.

    Args:
        runs: base-to-new rows of the mini profile. What they lack is left out.
        method: only what is said of this one, by its name; "dept" is about all of its
            hosts. A host is compared with its plug-in at equal settings.
    """
    known = set(label(runs))
    rows = [
        (f"{title(a)} is {way} {title(b)} {WHERE[split]}.", a, b, split, way)
        for a, way, b, split in COMPARED
    ]
    rows += [
        (
            f"{methods()[parse(plugin)[0]].title} raises"
            f" {title(parse(plugin)[1])} {where}, at equal settings.",
            plugin,
            host,
            split,
            "above",
        )
        for host, plugin in _pairs(runs)
        for split, where in WHERE.items()
    ]
    return [
        check_claim(
            text,
            differences(runs, a, b, split, average=True)
            * (1 if way == "above" else -1),
        )
        for text, a, b, split, way in rows
        if {a, b} <= known and method in ("", a.partition("(")[0])
    ]


def _pairs(runs):
    """(host at the plug-in's settings, plug-in) as the labels of runs that hold
    both.
    """
    known = set(label(runs))
    plugins = sorted(name for name in known if " | " not in name and name[-1] == ")")
    return [(host, name) for host, name in _hosts(plugins) if host in known]


def _hosts(plugins):
    """(label of the host at the plug-in's settings, plug-in) of each."""
    for plugin in plugins:
        host, overrides = equal_host(plugin)
        options = options_of(overrides)
        yield f"{host} | {options}" if options else host, plugin


def ranked() -> list[str]:
    """What stands on the leaderboard: every method, plug-ins over the first host of
    their papers. The grid of plug-ins over hosts is a chapter of its own.
    """
    known = {name: cls for name, cls in methods().items() if name not in LEFT_OUT}
    return [
        f"{name}({cls.hosts[0]})"
        if cls.plugin and not cls.default_host_learns
        else name
        for name, cls in known.items()
    ]


def asked(datasets=MINI_TASKS, seeds=SEEDS) -> list[Plan]:
    """The runs of the leaderboard, on all tasks of the mini world, and the hosts of
    plug-ins at the plug-ins' settings.
    """
    plugins = [spec for spec in ranked() if parse(spec)[1]]
    hosts = [equal_host(plugin) for plugin in plugins]
    own = [(name, RANKED_AS.get(name, {})) for name in ranked()]
    entries = [*own, ("clip", {"template": PLAIN}), *hosts]
    return grid("base-to-new", entries, datasets, seeds)


def leaderboard(folder="book", runs: pd.DataFrame | None = None) -> Path:
    """Write ``leaderboard.md`` and its figure into a folder.

    Ranked are methods that were measured on all datasets that any was, with three seeds
    or more.

    Args:
        folder: of the book's pages.
        runs: base-to-new rows of the mini profile; by default those that
            :func:`asked` names, as far as they are stored or ship.

    Raises:
        InputError: there are no such runs.
    """
    runs = known(asked()) if runs is None else runs
    if not len(runs):
        raise InputError(
            "none of the leaderboard's runs are there: make them by 'promptkit evidence"
            " fill --chapters leaderboard'"
        )
    tasks = runs["dataset"].nunique()
    seeds = runs.loc[runs["seed"] > 0, "seed"].nunique()
    whole = _whole(runs)
    names = {name: _shown(name) for name in whole["label"].unique()}
    missing = sorted(title(name) for name in ranked() if name not in names)
    with _drawing():
        figure = base_new_plane(whole, _pairs(whole), names)
        _save(figure, folder, "leaderboard")
    text = f"""# Leaderboard

The methods of this book on the same footing: the {tasks} tasks of the mini world, 16
images a class, up to {seeds} seeds, training on the base classes and testing on base
and on new ones. Each method follows its own paper's recipe, as the one rule of
{{py:func}}`promptkit.recipe.for_profile` puts it. Zero-shot CLIP uses each task's own
template; the contexts of most methods start from "a photo of a", and KgCoOp, TCP,
ProGrad and PromptSRC are drawn towards hand-written prompts, among them the task's own.
A row marked * is a host trained by the recipe of the plug-in in brackets. One marked †
reads sentences about the classes that it is tested on, new ones too; those of the mini
world are true, and say of a class all that makes it one. PromptKD has the 20 epochs of
its paper, ArGue 100 epochs in place of 300 and UPL four contexts in place of 16, as in
their chapters.

```{{figure}} _static/leaderboard.svg
:alt: Each method as a point, base accuracy across, new accuracy up; lines of equal H.
Accuracy on base and on new classes, averages of {tasks} tasks; dotted lines join equal
harmonic means, arrows lead from a host to its plug-in.
```

{_ranking(summarise(whole))}

Means over seeds in percent, ± half the 95 % interval. *Reported* is the harmonic mean
of the paper's own average over the eleven real datasets on ViT-B/16, of zero-shot CLIP
and CoOp that of CoCoOp's paper: another world, shown for its order and not for its
digits. It is empty where the paper has no such row, also if others reran the method,
and for reconstructions.{_open(missing)}

## What the papers say of each other

Differences of the averages over tasks, with 95 % intervals over seeds. They are taken
in the claim's direction: a positive one speaks for it, also where it says "below".

{_claims(compared(whole))}

## How this page was made

```bash
promptkit evidence fill --chapters leaderboard --workers 2
promptkit pages
```

The first makes what does not ship with the package yet, the second writes this page.
"""
    return write_atomically(
        Path(folder) / "leaderboard.md", lambda file: file.write(text.encode())
    )


def _open(names) -> str:
    """A paragraph on the methods that are not ranked yet."""
    if not names:
        return ""
    why = f"Not ranked, as they have not run on all tasks with {LEAST} seeds yet: "
    lines = wrap(f"{why}{', '.join(names)}.", 88, break_on_hyphens=False)
    return "\n\n" + "\n".join(lines)


def _whole(runs) -> pd.DataFrame:
    """Of each label the seeds that ran on all datasets that any did; labels with fewer
    than three of them, or than any has, are left out, if they draw anything.
    """
    runs = newest_weights(runs).reset_index(drop=True)
    own = label(runs).isin(
        [f"{name} | {options_of(given)}" for name, given in RANKED_AS.items()]
    )
    runs = runs[own | ~runs["method"].isin(RANKED_AS)]
    runs = runs.assign(options=runs["options"].mask(own, ""))
    runs = runs.assign(label=label(runs))
    complete = runs.groupby(["label", "seed"])["dataset"].transform("nunique")
    runs = runs[complete == runs["dataset"].nunique()]
    count = runs.groupby("label")["seed"].transform("nunique")
    drawn = runs["seed"] > 0
    return runs[~drawn | (count >= min(LEAST, count.max()))]


def _drawing():
    """What makes the names inside of an SVG the same each time."""
    return plt.rc_context({"svg.hashsalt": "promptkit"})


def _save(figure, folder, name):
    image = Path(folder) / "_static" / f"{name}.svg"
    write_atomically(
        image,
        lambda file: figure.savefig(file, format="svg", metadata={"Date": None}),
    )
    plt.close(figure)


def costs(folder="book", runs: pd.DataFrame | None = None, table=None) -> Path:
    """Write ``costs.md`` and its figure into a folder: what each method learns, what a
    step and a test image take, and what the real benchmark takes by that.

    The text stands on the table of costs and the methods' recipes, the figure on runs.

    Args:
        folder: of the book's pages.
        runs: base-to-new rows of the mini profile, as for :func:`leaderboard`; those
            of its methods that it ranks are drawn, hosts at other settings aside.
        table: file of a table of costs, see :mod:`promptkit.costs`; by default the one
            that ships.

    Raises:
        InputError: there are no such runs, or the table is damaged.
    """
    runs = known(asked()) if runs is None else runs
    drawn = _whole(runs) if len(runs) else runs
    drawn = drawn[drawn["label"].isin(ranked())] if len(drawn) else drawn
    if not len(drawn):
        raise InputError(
            "none of the leaderboard's runs are there: make them by 'promptkit evidence"
            " fill --chapters leaderboard'"
        )
    with _drawing():
        names = {name: title(name) for name in drawn["label"].unique()}
        _save(cost_plane(drawn, names), folder, "costs")
    measured = "\n\n".join(map(_costs, every(table)))
    text = f"""# What it costs

What a method learns, how long it trains and tests, and the memory that this takes: on
the mini world as this book's runs took it, and on the real benchmark as the papers'
recipes would.

```{{figure}} _static/costs.svg
:alt: Each method as a point, seconds of a run across, harmonic mean up.
What a run on the mini world takes, training and testing, on one thread of a processor,
and the harmonic mean of base and new accuracy. On the dotted line are the methods that
no cheaper one exceeds.
```

The mini world is small, its recipes do not augment, and the features of its images are
computed once: methods that leave the image tower alone are cheap there. On real images,
with crops and flips that are drawn anew, every step runs both towers. In the figure
PromptKD has the 20 epochs of its paper, and UPL four contexts in place of 16, as in
their chapters.

## How the numbers come about

On each machine below, one training step and one test image of a method were measured,
at the true size of the model and by its recipe for base-to-new, whose hyperparameters
stand for those of the other protocols. All else is arithmetic: the steps of the paper's
recipe, all stages, times the seconds of one, and the test images times the seconds of
one, for 16 shots, one seed, and all datasets of the protocol together. These are
estimates, for comparing methods and planning a week, and not measured runs.

- **Other numbers of classes.** A step has to do with 5 to 1,000 classes. Where a method
  was measured with two numbers of them, a line through both tells the time of a step.
  Else the text tower's share of the operations grows in proportion to the classes, all
  else to the batch. Where a tower would keep more than its room for the gradient
  (2 GiB, on a card half its memory), it computes that part twice.
- **Memory** is what the largest step adds, at most, to a process that holds CLIP
  (0.6 GiB in float32) and the libraries (0.7 GiB). It grows with what is kept for the
  gradient.
- **Stages** of one method all cost what the last does.
- **Not counted** are what is done once, such as the features of a pool of images,
  Tip-Adapter's cache or the training of a teacher, and what a slow disk takes.
- **Cached features.** A recipe without crops and flips reads image features that are
  computed once, where its method asks for no more; these steps cost less than told.
- **Processors** are measured in processor time, summed over threads: with several, the
  clock shows less. Test images go one by one; a card likes batches better.
- **A card is another machine.** No row here tells its times but its own.

A dash stands where this says nothing: a step was not measured, or how many there are
depends on the sentences that come with the data.

{measured}

## The numbers of your card

```bash
bash benchmarks/gpu.sh
promptkit pages
```

The first measures a handful of methods on the card and puts their rows into
`promptkit/assets/costs.csv`, under the card's name; `METHODS="coop maple"` chooses
others. The second adds the card to this page. Both files make a pull request. A single
method, here on a processor:

```bash
python benchmarks/limit.py maple --classes 100 --costs promptkit/assets/costs.csv
```
"""
    return write_atomically(
        Path(folder) / "costs.md", lambda file: file.write(text.encode())
    )


def _costs(found: Costs) -> str:
    """What one machine measured, and the real benchmark by that."""
    lacking = [s for s in {*specs(), *ranked(), *LEFT_OUT} if s not in found.methods]
    left_out = "; ".join(sorted(map(title, lacking), key=str.lower))
    note = f"Not measured here: {left_out}." if lacking else ""
    return f"""## {found.machine}, {found.precision}

One training step and one test image, {found.model}. *By open_clip* is what the same
step takes where every class and every image goes through open_clip's own towers at full
length.

{_measured(found)}

{note}

### Base-to-new

Eleven datasets; training on half of the classes, tests on either half.

{_bills(found, ["base-to-new"], DATASETS)}

### Few-shot

Eleven datasets, all classes.

{_bills(found, ["few-shot"], DATASETS)}

### From ImageNet

Trained once on all of its classes, and tested on ImageNet and ten other datasets
(cross-dataset) or its four shifts (domain generalization).

{_bills(found, TRANSFER, ["imagenet"])}"""


def _measured(found) -> str:
    lines = [
        "| method | learned | classes | batch | step | by open_clip | memory |"
        " test image |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    rows = [row for method in found.methods for row in found.rows(method)]
    rows.sort(key=lambda row: (row["step"] if row["step"] > 0 else 0, row["test"]))
    for row in rows:
        cells = [title(row["method"]), f"{row['parameters']:,.0f}"]
        cells += [f"{row['classes']:.0f}"]
        trains = row["step"] > 0
        cells += [f"{row['batch']:.0f}" if trains else ""]
        cells += [
            _seconds(row[key]) if trains else "" for key in ("step", "step_plain")
        ]
        cells += [_unit(f"{row['step_memory']:,.0f}", "MiB") if trains else ""]
        cells += [_seconds(row["test"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _bills(found, protocols, datasets) -> str:
    """A table of what the methods take in protocols that train the same, cheapest
    first.
    """
    tests = ["testing"] if len(protocols) == 1 else [f"testing, {p}" for p in protocols]
    heads = ["method", "steps", "training", *tests, "memory"]
    rows = []
    for method in found.methods:
        try:
            works = [[work(method, p, name) for name in datasets] for p in protocols]
        except InputError:  # it learns from sentences
            rows.append((math.inf, [title(method)]))
            continue
        steps = sum(one.steps for one in works[0])
        cells = [title(method), f"{steps:,}" if steps else "none"]
        try:
            costs = [[found.of(one) for one in of] for of in works]
        except InputError:  # it was measured without training
            rows.append((math.inf, cells))
            continue
        training = sum(cost.training for cost in costs[0])
        testing = [sum(cost.testing for cost in of) for of in costs]
        most = max(cost.memory for cost in costs[0])
        cells += [_hours(training) if steps else ""]
        cells += [
            *map(_hours, testing),
            _unit(f"{most / 1024:.1f}", "GiB") if steps else "",
        ]
        rows.append((training + sum(testing), cells))
    lines = [
        f"| {' | '.join(heads)} |",
        f"| --- |{' --: |' * (len(heads) - 1)}",
    ]
    for _, cells in sorted(rows, key=lambda row: row[0]):
        cells += ["—"] * (len(heads) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _seconds(seconds) -> str:
    return _unit(f"{seconds:.2f}" if seconds < 10 else f"{seconds:,.0f}", "s")


def _hours(seconds) -> str:
    hours = seconds / 3600
    return _unit(f"{hours:.1f}" if hours < 10 else f"{hours:,.0f}", "h")


def _unit(number, unit) -> str:
    return f"{number}\u00a0{unit}"


def claims(folder="book", results=None) -> Path:
    """Write ``claims.md`` into a folder: every chapter's claims with their verdicts, as
    the chapters stored them.

    Raises:
        InputError: no chapter has stored any.
    """
    found = load_claims(results)
    if not found:
        raise InputError(
            f"no claims in {results_dir(results)}: execute the chapters first"
            " (promptkit reproduce)"
        )
    every = [claim for claims in found.values() for claim in claims]
    counts = pd.Series([claim.verdict for claim in every]).value_counts()
    summary = ", ".join(
        f"{counts.get(verdict, 0)} {words}" for verdict, words in VERDICTS.items()
    )
    parts = "\n\n".join(
        f"## {_heading(folder, chapter)}\n\n{_claims(claims, chapter)}"
        for chapter, claims in found.items()
    )
    text = f"""# Claims

What the papers say, what this book asks beside it (such rows say "ours" or "not a claim
of the paper"), and what the chapters measured: {len(every)} claims, {summary}. A claim
holds when the whole 95 % interval of the measured difference is on its side, does not
hold when the whole interval is on the other, and is undecided in between.

- Everything here was measured on the mini world, where a chapter does not say
  otherwise: a claim about the real benchmark that does not hold here may well hold
  there, and the chapters look for the reason.
- Differences are taken in the claim's direction: a positive one speaks for it, also
  where the claim says "below". *Asked* is how large it must be. Points are percentage
  points of accuracy.
- Intervals are over the values that the column names. Of several seeds on each of
  several tasks the spread within each task counts: {{eq}}`eq-interval`.
- An undecided claim says how many such values would decide it if their mean and spread
  stayed as they are: an order of magnitude, not a promise.

{parts}
"""
    return write_atomically(
        Path(folder) / "claims.md", lambda file: file.write(text.encode())
    )


def _heading(folder, chapter) -> str:
    """What a chapter beside the folder of the book's pages is about: its title up to
    the colon, else its name.
    """
    notebook = Path(folder).resolve().parent / "notebooks" / f"{chapter}.ipynb"
    if not notebook.exists():
        return chapter
    first = "".join(
        json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"]
    )
    return first.splitlines()[0].lstrip("# ").partition(":")[0]


VERDICTS = {"holds": "hold", "does not hold": "do not", "undecided": "are undecided"}


def title(spec: str) -> str:
    """What a figure calls a method: ``"dept(maple)"`` -> ``"DePT + MaPLe"``."""
    name, host = parse(spec)
    return methods()[name].title + (f" + {title(host)}" if host else "")


def _ranking(summary) -> str:
    recipes = {}  # whose a host follows
    for host, plugin in _hosts(spec for spec in ranked() if parse(spec)[1]):
        recipes.setdefault(host, []).append(methods()[parse(plugin)[0]].title)
    average = summary[
        (summary["dataset"] == "average") & summary["split"].isin(["base", "new", "hm"])
    ]
    reported = paper_numbers(
        protocol="base-to-new",
        dataset="average",
        metric="hm",
        backbone="ViT-B/16",
        shots=[0, 16],
    )
    rows = []
    for name, part in average.assign(label=label(average)).groupby("label", sort=False):
        cells = part.set_index("split")
        method, _, options = name.partition(" | ")
        paper = ROW_OF.get(method, methods()[parse(method)[0]].paper)
        own = reported[(reported["method"] == method) & (reported["paper"] == paper)]
        told = len(own) and not options and parse(method)[0] not in RECONSTRUCTED
        texts = [
            f"{cells.loc[s, 'mean']:.1f}{_half(cells.loc[s])}"
            for s in ("base", "new", "hm")
        ]
        shown = f"{own['value'].iloc[0]:.2f}" if told else ""
        seeds = int(cells.loc["hm", "seeds"])
        texts.append(str(seeds) if seeds > 1 else "")  # zero-shot CLIP draws nothing
        whose = recipes.get(name, []) if options else []
        row = _shown(name) + f" ({' and '.join(whose)})" * bool(whose)
        rows.append((cells.loc["hm", "mean"], [row, *texts, shown]))
    rows.sort(key=lambda row: -row[0])
    lines = [
        "| method | base | new | harmonic mean | seeds | reported |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for _, cells in rows)])


def _shown(name) -> str:
    """What page and figure call a label: zero-shot CLIP with its template, a host with
    a star, and a dagger where sentences say what new classes are.
    """
    method, _, options = name.partition(" | ")
    template = (
        f", “{options.removeprefix('template=')}”"
        if method == "clip" and options
        else ""
    )
    told = "†" * methods()[parse(method)[0]].reads_sentences
    return title(method) + (template or "*" * bool(options)) + told


def _half(cell) -> str:
    half = (cell["high"] - cell["low"]) / 2
    return "" if half != half else f"\u00a0±\u00a0{half:.1f}"


def _claims(claims: list[Claim], chapter: str = "") -> str:
    """A table of claims, whose intervals are of 95 %; of a chapter, each row leads
    there.
    """
    lines = [
        "| claim | asked | measured | verdict |" + " chapter |" * bool(chapter),
        "| --- | --- | --- | --- |" + " --- |" * bool(chapter),
    ]
    link = f" {{doc}}`{chapter[:2]} </notebooks/{chapter}>` |" if chapter else ""
    for claim in claims:
        verdict = f"**{claim.verdict}**"
        if claim.would_decide():
            verdict += f": {claim.would_decide()}"
        cells = (claim.text, claim.criterion, claim.measured(named=False), verdict)
        texts = " | ".join(cell.replace("|", "\\|") for cell in cells)
        lines.append(f"| {texts} |{link}")
    return "\n".join(lines)
