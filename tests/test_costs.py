"""What runs cost: the table, the arithmetic over it, the page and what the command line
says.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from real_data import real_root  # noqa: F401
from rich.console import Console
from test_cli import promptkit
from test_pages import rows as runs_of
from test_protocols import tiny, toy
from test_results import base_new, table

from promptkit import costs, data, pages, plots
from promptkit import runs as running
from promptkit.errors import InputError
from promptkit.recipe import Recipe
from promptkit.registry import methods, specs
from promptkit.runs import Run, estimate, plan

ROOT = Path(__file__).parents[1]
WHERE = ("A processor", "fp32", "ViT-B-16-quickgelu")


def row(method="coop", classes=50, **values):
    """A measured row, of round numbers: a fifth of a step is the text tower's."""
    known = {"method": method, "classes": classes, "batch": 32, "parameters": 8192}
    known |= {"step": 10.0, "step_share": 0.8, "step_plain": 20.0, "step_text": 0.2}
    known |= {"step_memory": 300.0, "kept_text": 50.0, "kept_image": 0.0}
    known |= {"room": 2048.0, "test": 0.5, "test_share": 0.8, "test_plain": 0.6}
    return known | {"test_text": 0.0} | values


def without_step(method, **values):
    """Of a method that learns nothing."""
    kept = {k: v for k, v in row(method).items() if k[:4] not in ("step", "kept")}
    return kept | {"parameters": 0} | values


@pytest.fixture
def made(tmp_path):
    """A function from rows to the costs of a table that holds them alone."""

    def make(*rows):
        path = tmp_path / "made.csv"
        path.unlink(missing_ok=True)
        costs.merge(rows, *WHERE, path)
        (found,) = costs.every(path)
        return found

    return make


# --- a step, an image -----------------------------------------------------------------


def test_one_row_grows_with_classes_and_batch(made):
    """At 50 classes 8 s are the image tower's, with a batch of 32, and 2 s the text
    tower's.
    """
    found = made(row())
    assert found.step("coop", 50, 32) == 10
    assert found.step("coop", 100, 32) == pytest.approx(8 + 4)
    assert found.step("coop", 25, 16) == pytest.approx(4 + 1)
    assert found.memory("coop", 50, 32) == 300
    assert found.memory("coop", 150, 32) == pytest.approx(300 + 2.4 * 2 * 50)


def test_what_outgrows_its_room_is_computed_twice(made):
    found = made(row(), row("maple", batch=4, kept_text=0.0, kept_image=200.0))
    # 5,000 classes keep 5,000 MiB: half as much again, and no more memory than the
    # room; what was measured held 2.4 times of the 50 MiB that it kept.
    assert found.step("coop", 5000, 32) == pytest.approx(8 + 1.5 * 200)
    assert found.memory("coop", 5000, 32) == pytest.approx(300 - 2.4 * 50 + 2048)
    assert found.step("maple", 50, 64) == pytest.approx(1.5 * 8 * 16 + 2)
    assert found.memory("maple", 50, 64) == pytest.approx(300 - 2.4 * 200 + 2048)
    full = made(row(kept_text=3000.0))  # as measured, it is in the seconds already
    assert full.step("coop", 100, 32) == pytest.approx(8 + 4)
    assert full.memory("coop", 100, 32) == 300


def test_two_rows_are_a_line(made):
    """Whatever the text tower's share is said to be; of three the two nearest count."""
    found = made(row(classes=50), row(classes=100, step=14.0, step_memory=400.0))
    assert found.step("coop", 75, 32) == pytest.approx(12)
    assert found.step("coop", 200, 32) == pytest.approx(22)
    assert found.memory("coop", 200, 32) == pytest.approx(600)
    # 8 s and 11.2 s of these are the image tower's: half of them with half the batch
    assert found.step("coop", 50, 16) == pytest.approx(4 + 2)
    assert found.step("coop", 100, 16) == pytest.approx(5.6 + 2.8)
    three = made(row(), row(classes=100, step=14.0), row(classes=500, step=54.0))
    assert three.step("coop", 75, 32) == pytest.approx(12)
    assert three.step("coop", 300, 32) == pytest.approx(34)
    assert three.step("coop", 10, 32) == pytest.approx(6.8)


def test_a_test_image(made):
    found = made(row(), row("cocoop", test_text=0.5))
    assert found.test("coop", 1000) == 0.5  # what is made of the names is made once
    assert found.test("cocoop", 100) == pytest.approx(0.25 + 0.5)
    line = made(row("cocoop"), row("cocoop", 100, test=0.7))
    assert line.test("cocoop", 150) == pytest.approx(0.9)


def test_what_was_not_measured_is_said(made):
    found = made(without_step("clip"))
    assert found.test("clip", 50) == 0.5
    for what in (
        lambda: found.step("clip", 50, 32),
        lambda: found.test("coop", 50),
        lambda: found.of(costs.work("coop", "few-shot", "dtd")),
    ):
        with pytest.raises(InputError, match="was measured on A processor, fp32"):
            what()


# --- a run ----------------------------------------------------------------------------


def test_work_by_the_published_counts():
    """DTD has 47 classes, 24 of them base, and 1,692 test images."""
    work = costs.work("coop", "base-to-new", "dtd")
    assert work.stages == ((200 * (24 * 16 // 32), 32),) and work.steps == 2400
    assert work.classes == 24 and work.tests == ((24, 864), (23, 828))
    assert costs.work("maple", "few-shot", "dtd", 1).stages == ((5 * 11, 4),)
    assert costs.work("coop", "few-shot", "imagenet").steps == 50 * 500
    assert costs.work("clip", "few-shot", "dtd").stages == ()
    work = costs.work("maple", "cross-dataset", "imagenet")
    assert work.steps == 2 * 4000 and len(work.tests) == 11
    assert work.tests[:2] == ((1000, 50_000), (100, 2465))
    work = costs.work("maple", "domain-generalization", "imagenet")
    assert work.tests[1:] == ((1000, 10_000), (1000, 50_889), (200, 7500), (200, 30000))


def test_work_of_stages_pools_and_sentences():
    two = costs.work("logoprompt", "few-shot", "dtd")
    assert two.stages == ((200 * 23, 32), (200 * 23, 32))
    pool = costs.work("upl", "base-to-new", "dtd")  # 16 images of each of all classes
    assert pool.classes == 47 and pool.steps == 50 * (47 * 16 // 32)
    with pytest.raises(InputError, match="learns from sentences"):
        costs.work("protext", "few-shot", "dtd")
    with pytest.raises(InputError, match="did you mean 'dtd'"):
        costs.work("coop", "few-shot", "dtdd")


def plan_for(protocol, **options):
    """Of CoOp on a toy dataset of 24 images."""
    return plan(Run(protocol, "coop", toy(), clip=tiny(), **options))


@pytest.mark.parametrize("protocol", ["few-shot", "base-to-new"])
@pytest.mark.parametrize("options", [{}, {"max_steps": 3}, {"profile": "full"}])
def test_work_of_a_plan_is_what_it_does(protocol, options):
    plan = plan_for(protocol, shots=4, **options)
    work = costs.work_of(plan)
    training = plan.training_set()
    assert work.steps == plan.steps(len(training.train)) > 0
    assert work.classes == len(training.classnames)
    tested = [plan.source]
    if protocol == "base-to-new":
        tested = data.base_new(plan.source)
    assert work.tests == tuple((len(d.classnames), len(d.test)) for d in tested)


def test_a_run(made):
    """2,400 steps of 8 + 0.96 s, 1,692 images of half a second."""
    cost = made(row()).of(costs.work("coop", "base-to-new", "dtd"))
    assert cost.training == pytest.approx(2400 * (8 + 2 * 24 / 50))
    assert cost.testing == pytest.approx(846)
    assert cost.seconds == cost.training + cost.testing
    assert cost.memory == pytest.approx(300 - 2.4 * 50 * 26 / 50)


def plan_of(method, protocol, seed=1, shots=16):
    """A plan as far as its costs go: ten classes of 20 training and 10 test images,
    and an epoch of batches of 32.
    """
    source = SimpleNamespace(
        name="ten", classnames=[""] * 10, train=range(200), test=range(100)
    )
    targets = [source] if protocol != "few-shot" else []
    run = Run(protocol, method, "ten", shots=shots, seed=seed)
    return SimpleNamespace(
        run=run, source=source, targets=targets, recipe=Recipe(epochs=1),
        clip=SimpleNamespace(device="cpu"), config={}, students=[],
        training=(method, seed, "" if targets else protocol),
    )  # fmt: skip


def test_several_runs(made):
    """5 steps of 8.4 s and 50 s of testing, twice where there is a target; what both
    transfers train is trained once.
    """
    found = made(row())
    alone = found.total([plan_of("coop", "few-shot")])
    assert alone == (pytest.approx(42 + 50), [])
    both = [
        plan_of("coop", p, seed)
        for p in ("cross-dataset", "domain-generalization")
        for seed in (1, 2)
    ]
    assert found.total(both)[0] == pytest.approx(2 * 42 + 4 * 100)
    more = [plan_of("maple", "few-shot"), plan_of("linear-probe", "few-shot")]
    assert found.total([*both, *more]) == (
        pytest.approx(484),
        ["linear-probe", "maple"],
    )


def test_in_the_proportions_of_the_table(made, tmp_path, monkeypatch):
    """A step that takes half of the table's 8.4 s halves everything."""
    made(row())
    monkeypatch.setattr(costs, "TABLE", tmp_path / "made.csv")
    plans = [plan_of("coop", "few-shot", seed) for seed in range(20)]
    text = costs.scaled(plans, plans[0], 32, 4.2)
    assert text.startswith("about 15 minutes for 20 runs") and "A processor" in text
    assert "without" not in text
    mixed = [*plans, plan_of("maple", "few-shot")]
    assert costs.scaled(mixed, mixed[0], 32, 4.2).endswith(
        "; without 'maple': not known"
    )
    assert costs.scaled(mixed, mixed[-1], 32, 4.2) == ""


def test_durations():
    seconds = [0.4, 90, 150, 4000, 10_000, 100_000, 250_000, 1e9]
    assert [costs.duration(n) for n in seconds] == [
        "0 seconds", "90 seconds", "2 minutes", "67 minutes", "2.8 hours", "27.8 hours",
        "3 days", "11,574 days",
    ]  # fmt: skip


# --- the table ------------------------------------------------------------------------


def test_merging_replaces_the_same_and_keeps_the_others(tmp_path):
    path = tmp_path / "new" / "costs.csv"
    assert costs.merge([row(), row("maple"), without_step("clip")], *WHERE, path) == 3
    before = costs.load(path)
    assert costs.merge([row(step=7.123456)], *WHERE, path) == 3
    assert costs.merge([row(classes=100)], *WHERE, path) == 4
    assert costs.merge([row(step=1.0)], "A card", "bf16", WHERE[2], path) == 5
    failed = {"method": "coop", "error": "out of memory"}
    assert costs.merge([failed], *WHERE, path) == 5
    table = costs.load(path).set_index(costs.KEYS)
    assert table.loc[(*WHERE, "coop", 50), "step"] == 7.123
    assert table.loc[(*WHERE, "coop", 100), "step"] == 10
    assert table.loc[("A card", "bf16", WHERE[2], "coop", 50), "step"] == 1
    kept = before.set_index(costs.KEYS).drop((*WHERE, "coop", 50))
    assert table.loc[kept.index].equals(kept)
    first, second = costs.every(path)
    assert first.name == "A processor, fp32, ViT-B-16-quickgelu"
    assert first.methods == ["clip", "coop", "maple"] and second.methods == ["coop"]
    assert [one["classes"] for one in first.rows("coop")] == [50, 100]


def test_what_cannot_be_merged_or_read(tmp_path):
    path = tmp_path / "costs.csv"
    costs.merge([row()], *WHERE, path)
    before = path.read_bytes()
    for key in ("classes", "test", "step_text", "room"):
        bad = {name: value for name, value in row().items() if name != key}
        with pytest.raises(InputError, match=f"'coop' has no '{key}'"):
            costs.merge([bad], *WHERE, path)
    assert path.read_bytes() == before
    for content in (b"", b"machine,step\na,b\n", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged table of costs"):
            costs.merge([row()], *WHERE, path)
        assert path.read_bytes() == content


def test_the_costs_that_know_most_are_chosen(tmp_path, monkeypatch):
    path = tmp_path / "costs.csv"
    costs.merge([row(), row("maple")], *WHERE, path)
    costs.merge([row()], "A card", "fp32", WHERE[2], path)
    monkeypatch.setattr(costs, "machine", lambda device: "A card")
    assert costs.choose(["coop"], path=path).machine == "A card"
    assert costs.choose(["coop", "maple"], path=path).machine == "A processor"
    path.write_text(",".join(costs.COLUMNS) + "\n")
    with pytest.raises(InputError, match="is empty"):
        costs.choose(["coop"], path=path)
    with pytest.raises(InputError, match="give the rows of one"):
        costs.Costs(costs.load(path))


def test_a_machine_has_a_name(tmp_path, monkeypatch):
    info = "processor\t: 0\nmodel name\t: Intel(R) Xeon(R)  Processor\n"
    monkeypatch.setattr(costs.Path, "read_text", lambda *args, **more: info)
    assert costs.machine() == "Intel Xeon Processor"
    monkeypatch.setattr(costs.Path, "read_text", lambda *args, **more: "nothing")
    assert costs.machine()


def test_the_table_that_ships():
    """Every method has a row or is named on the page, and what is measured can be."""
    table = costs.load()
    page = (ROOT / "book" / "costs.md").read_text()
    (said,) = re.findall(r"^Not measured here: (.+)\.$", page, re.MULTILINE) or [""]
    named = set(said.split("; "))
    there = set(table["method"])
    assert {pages.title(spec) for spec in specs() if spec not in there} <= named
    assert not {pages.title(spec) for spec in there} & named
    assert not table.duplicated(costs.KEYS).any()
    trained = table.dropna(subset="step")
    assert (table["test"] > 0).all() and (trained["step"] > 0).all()
    for name in ("step_text", "test_text"):
        assert table[name].dropna().between(0, 1).all()
    for name in ("step_share", "test_share"):  # a share of one could not be undercut
        assert table[name].dropna().between(0, 1.1).all()
    assert (trained["parameters"] > 0).all()


# --- the page -------------------------------------------------------------------------


def runs():
    """Of four methods, one of which ranks nowhere, on two tasks."""
    tables = [
        runs_of("coop", 80, 50), runs_of("kgcoop", 75, 66), runs_of("clip", 60, 65),
        runs_of("coop", 82, 51, {"n_ctx": 16}),
    ]  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def test_the_page_is_what_promptkit_pages_writes(tmp_path):
    page = pages.costs(tmp_path, runs())
    assert page.read_text() == (ROOT / "book" / "costs.md").read_text(), (
        "write the page anew by 'promptkit pages'"
    )


def test_a_page_of_a_made_table(tmp_path, made):
    made(row(), row("maple", batch=4, step=2.0), without_step("clip"))
    where = tmp_path / "book"
    page = pages.costs(where, runs(), tmp_path / "made.csv").read_text()
    page = page.replace("\u00a0", " ")
    assert "## A processor, fp32" in page
    measured, base, few, transfer = re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE)
    assert [line.split(" | ")[0] for line in measured.splitlines()[2:]] == [
        "| Zero-shot CLIP",
        "| MaPLe",
        "| CoOp",
    ]
    assert "| CoOp | 8,192 | 50 | 32 | 10 s | 20 s | 300 MiB | 0.50 s |" in measured
    works = [costs.work("coop", "few-shot", name) for name in data.DATASETS]
    steps = sum(work.steps for work in works)
    hours = sum(n * (8 + 2 * w.classes / 50) for w in works for n, _ in w.stages) / 3600
    tests = sum(images for work in works for _, images in work.tests) / 2 / 3600
    assert f"| CoOp | {steps:,} | {hours:,.0f} h | {tests:.0f} h | 2.5 GiB |" in few
    assert f"| Zero-shot CLIP | none |  | {tests:.0f} h |  |" in few
    # 8,000 steps of 1.6 s and, with 20 times the classes, 20 times 0.4 s
    assert "| MaPLe | 8,000 | 21 h |" in transfer
    assert base != few and "| CoOp |" in base
    (said,) = re.findall(r"^Not measured here: (.+)\.$", page, re.MULTILINE)
    assert "KgCoOp" in said.split("; ") and "CoOp" not in said.split("; ")
    image = where / "_static" / "costs.svg"
    first = image.read_bytes()
    pages.costs(where, runs(), tmp_path / "made.csv")
    assert image.read_bytes() == first  # made anew, it is the same
    with pytest.raises(InputError, match="fill --chapters leaderboard"):
        pages.costs(where, runs().iloc[:0])


def test_the_figure_of_accuracy_against_cost():
    made = [
        base_new(60 + k, 60, method=name, seed=s, dataset=d) | {"seconds": seconds + s}
        for k, (name, seconds) in enumerate([("coop", 10), ("maple", 5), ("kgcoop", 1)])
        for d in ("pets", "cars")
        for s in (1, 2, 90)
    ]
    figure = plots.cost_plane(table(*made), {"coop": "CoOp"})
    (axis,) = figure.axes
    at = {}
    for text, line in zip(axis.texts, axis.lines[1:], strict=True):
        at[text.get_text()] = line.get_xdata()[0], line.get_ydata()[0]
    assert at["CoOp"] == (12, 60) and at["maple"][0] == 7 and at["kgcoop"][0] == 3
    assert at["maple"][1] == pytest.approx(2 * 61 * 60 / 121)
    assert axis.get_xscale() == "log" and "seconds" in axis.get_xlabel()
    assert list(axis.lines[0].get_xdata()) == [3]  # the cheapest is the best, too
    figure.canvas.draw()
    plt.close(figure)


def test_labels_of_thirty_methods_do_not_cover_each_other():
    """Nor any point, nor do they leave the figure, even where the points crowd."""
    names = [*methods()][:30]
    made = [
        base_new(70 + k % 6 / 2, 60, method=name, seed=s) | {"seconds": 9 + k // 3}
        for k, name in enumerate(names)
        for s in (1, 2)
    ]
    figure = plots.cost_plane(table(*made), {name: f"{name} + CoOp" for name in names})
    figure.canvas.draw()
    (axis,) = figure.axes
    texts = [text for text in axis.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    points = [axis.transData.transform(text.xy) for text in texts]
    assert len(boxes) == len(names)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(figure.bbox.contains(x, y) for b in boxes for x, y in (b.p0, b.p1))
    plt.close(figure)


# --- the command line -----------------------------------------------------------------


def test_the_benchmark_says_what_it_will_cost(
    real_root,  # noqa: F811
    made,
    tmp_path,
    monkeypatch,
):
    """And of what is stored already, that it costs nothing."""
    made(row(), without_step("clip"))
    monkeypatch.setattr(costs, "TABLE", tmp_path / "made.csv")
    monkeypatch.setattr(running, "load_clip", lambda *args, **kwargs: tiny())
    monkeypatch.setattr("promptkit.cli.console.err", Console(width=300, stderr=True))
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    running._clip.cache_clear()
    words = ["reproduce", "--profile", "full", "--root", real_root, "--max-steps", 1]
    words += ["--seeds", 1, "--data", "eurosat", "--protocols", "few-shot"]
    said = promptkit(*words, "--methods", "clip,coop,kgcoop")[1]
    assert "3 of 3 runs to do: about" in said and "without 'kgcoop': not known" in said
    assert "on one A processor, fp32, ViT-B-16-quickgelu" in said
    assert re.search(r"together  about \d+ seconds for 3 runs", said)
    said = promptkit(*words, "--methods", "clip,coop")[1]
    assert "0 of 2 runs to do: about 0 seconds" in said
    running._clip.cache_clear()


def test_an_estimate_of_several_runs(made, tmp_path, monkeypatch):
    made(row())
    monkeypatch.setattr(costs, "TABLE", tmp_path / "made.csv")
    one = plan_for("few-shot", profile="full", overrides={"n_ctx": 2})
    assert set(estimate(one)) == set(estimate(one, [one])) == {"estimate"}
    assert re.match(r"about \d+ .* for 2 runs", estimate(one, [one, one])["together"])
    made(row("maple"))  # which says nothing of CoOp's step
    assert set(estimate(one, [one, one])) == {"estimate"}
