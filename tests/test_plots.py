"""The figures: what they show, and that they do without colour; the playground."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from test_results import base_new, record, table

from promptkit.errors import InputError
from promptkit.plots import (
    average_bars,
    base_new_bars,
    base_new_plane,
    change_map,
    difference_bars,
    few_shot_curves,
    image_grid,
    loss_curve,
    option_curves,
    similarity_map,
    spread_labels,
)
from promptkit.widgets import Playground


@pytest.fixture(autouse=True)
def close():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before  # styles do not leak
    plt.close("all")


def few_shot_runs():
    runs = [
        record(method, d, s, "few-shot", shots=n, all=50 + n + s)
        for method in ("coop", "kgcoop", "linear-probe") for d in ("pets", "cars")
        for n in (1, 4, 16) for s in (1, 2, 3)
    ]  # fmt: skip
    return table(
        *runs,
        *(record("clip", d, 0, "few-shot", shots=0, all=55) for d in ("pets", "cars")),
    )


def test_few_shot_curves():
    figure = few_shot_curves(few_shot_runs(), names={"coop": "CoOp"})
    panels = [axis for axis in figure.axes if axis.axison]
    assert [axis.get_title() for axis in panels] == [
        "average of 2 datasets",
        "cars",
        "pets",
    ]
    assert all(axis.get_xlabel() and "%" in axis.get_ylabel() for axis in panels)
    handles, texts = panels[0].get_legend_handles_labels()
    assert set(texts) == {"CoOp", "kgcoop", "linear-probe", "clip (zero-shot)"}
    lines = {
        text: handle.lines[0] if hasattr(handle, "lines") else handle
        for handle, text in zip(handles, texts, strict=True)
    }
    assert (
        lines["clip (zero-shot)"].get_marker() == "*"
        and lines["clip (zero-shot)"].get_xdata()[0] == 0
    )
    assert lines["linear-probe"].get_linestyle() == ":"
    looks = {(line.get_marker(), line.get_linestyle()) for line in lines.values()}
    assert len(looks) == 4  # told apart without colour
    figure.canvas.draw()


def test_one_dataset_needs_no_average():
    figure = few_shot_curves(few_shot_runs(), datasets=["pets"])
    assert [axis.get_title() for axis in figure.axes] == ["pets"]


def test_base_new_bars():
    runs = table(
        *(base_new(80 + s, 60, seed=s) for s in (1, 2, 3)),
        base_new(70, 65, method="clip", seed=0, shots=0),
    )
    figure = base_new_bars(runs, names={"clip": "CLIP"})
    (axis,) = figure.axes
    assert {t.get_text() for t in axis.get_xticklabels()} == {
        "CLIP",
        "coop",
    } and "%" in axis.get_ylabel()
    assert len({bar.get_hatch() for bar in axis.patches}) == 3
    assert {t.get_text() for t in axis.texts} >= {"82.0", "60.0", "70.0", "65.0"}
    figure.canvas.draw()


@pytest.mark.parametrize("draw", [few_shot_curves, base_new_bars])
def test_nothing_to_draw(draw):
    with pytest.raises(InputError, match="runs to draw"):
        draw(table(record(protocol="cross-dataset", dataset="mini", pets=60)))


def test_image_grid():
    images = np.random.default_rng(0).integers(0, 255, (10, 3, 8, 8), dtype=np.uint8)
    figure = image_grid(images, [str(i) for i in range(10)], columns=4)
    assert len(figure.axes) == 12 and figure.axes[9].get_title() == "9"
    assert len(image_grid([images[0], images[1][:, :4]]).axes) == 2  # of any sizes
    with pytest.raises(InputError, match=r"takes images \(3, H, W\).*not \(8, 8\)"):
        image_grid(images[0])


def test_loss_curve():
    figure = loss_curve({"CoOp": [3, 2, 1], "KgCoOp": [3, 2.5, 2]}, smooth=2)
    (axis,) = figure.axes
    assert (
        axis.lines[0].get_ydata().tolist() == [3, 2.5, 1.5]
        and "nats" in axis.get_ylabel()
    )
    assert (
        axis.lines[0].get_linestyle() != axis.lines[1].get_linestyle()
        and axis.get_legend()
    )
    loss_curve([3, 2, 1])


def test_similarity_map():
    figure = similarity_map(np.eye(3), list("abc"), list("xyz"), "features")
    assert (
        figure.axes[0].get_title() == "features"
        and figure.axes[1].get_ylabel() == "cosine similarity"
    )
    assert [t.get_text() for t in figure.axes[0].texts][:2] == ["1.00", "0.00"]
    with pytest.raises(InputError, match="do not match"):
        similarity_map(np.eye(3), list("ab"), list("xyz"))


def playground():
    images = np.zeros((2, 3, 8, 8), np.uint8)
    asked = []

    def classify(index, names, template):
        asked.append((index, names, template))
        return [0.9, *[0.1 / (len(names) - 1)] * (len(names) - 1)]

    return (
        Playground(classify, images, ["first", "second"], ["pug", "cat & dog"]),
        asked,
    )


def test_playground_answers_its_controls():
    widget, asked = playground()
    widget.choice.value = 1
    widget.names.value = "van, teapot, pug"
    widget.template.value = "a sketch of a {}."
    assert asked[-1] == (1, ["van", "teapot", "pug"], "a sketch of a {}.")
    assert "90.0% van" in widget.view.value
    widget.template.value = "no place"
    assert "needs {}" in widget.view.value


def test_playground_is_static_html_without_a_kernel():
    widget, _ = playground()
    bundle = widget._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert (
        "cat &amp; dog" in bundle["text/html"]
        and "data:image/png;base64," in bundle["text/html"]
    )


def test_difference_bars_are_sorted():
    cells = [(d, s) for d in ("pets", "cars") for s in (1, 2)]
    ours = [
        base_new(80 + s, 60 + 5 * (d == "cars"), dataset=d, seed=s) for d, s in cells
    ]
    runs = table(
        *ours, *(base_new(70, 60, dataset=d, method="kgcoop", seed=s) for d, s in cells)
    )
    figure = difference_bars(runs, "coop", "kgcoop", names={"coop": "CoOp"})
    left, right = figure.axes
    assert (
        left.get_title() == "base classes"
        and "CoOp − kgcoop (points)" in left.get_xlabel()
    )
    assert (
        [bar.get_width() for bar in right.patches]
        == sorted(bar.get_width() for bar in right.patches)
        == [0, 5]
    )
    assert [text.get_text() for text in right.get_yticklabels()] == ["pets", "cars"]


def test_average_bars():
    figure = average_bars(
        few_shot_runs().query("shots in [0, 16]"), "clip", names={"coop": "CoOp"}
    )
    (axis,) = figure.axes
    assert axis.get_xlabel() == "test accuracy (%), average of 2 datasets"
    assert axis.get_xlim()[0] == 0
    texts = [text.get_text() for text in axis.get_yticklabels()]
    assert texts[0] == "CoOp" and set(texts) == {
        "CoOp",
        "kgcoop",
        "linear-probe",
        "clip",
    }
    assert {text.get_text() for text in axis.texts} == {"68.0", "55.0"}
    assert [
        line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"
    ] == [55]
    with pytest.raises(InputError, match="no runs with a split 'hm'"):
        average_bars(few_shot_runs(), split="hm")


def test_option_curves_read_the_overrides():
    runs = [
        base_new(70 + k, 60, seed=s, overrides={"lam": k, "epochs": 3})
        for k in (1, 2, 4)
        for s in (1, 2)
    ]
    figure = option_curves(table(*runs), "lam", xlabel="weight λ")
    (axis,) = figure.axes
    assert axis.get_xlabel() == "weight λ"
    line = next(c for c in axis.containers if c.get_label() == "base classes")
    assert list(line[0].get_xdata()) == [1, 2, 4] and list(line[0].get_ydata()) == [
        71,
        72,
        74,
    ]
    with pytest.raises(InputError, match="no runs were given the option 'n_ctx'"):
        option_curves(table(*runs), "n_ctx")


def test_base_new_plane_draws_arrows():
    cells = [(d, s) for d in ("pets", "cars") for s in (1, 2)]
    plugin = [
        base_new(85, 62 + s, method="dept(coop)", seed=s, dataset=d) for d, s in cells
    ]
    runs = table(*(base_new(80, 60 + s, seed=s, dataset=d) for d, s in cells), *plugin)
    figure = base_new_plane(runs, [("coop", "dept(coop)")], {"coop": "CoOp"})
    (axis,) = figure.axes
    texts = [text for text in axis.texts if text.get_text() in ("CoOp", "dept(coop)")]
    assert len(texts) == 2 and any(
        getattr(text, "arrow_patch", None) for text in axis.texts
    )
    assert len({line.get_marker() for line in axis.lines}) == 2
    figure.canvas.draw()


def test_labels_of_near_points_do_not_cover_each_other():
    near = [("coop", 80.0), ("cocoop", 80.1), ("kgcoop", 80.2), ("maple", 70)]
    runs = table(
        *(
            base_new(base, base - 20, method=name, seed=s)
            for name, base in near
            for s in (1, 2)
        )
    )
    figure = base_new_plane(runs)
    figure.canvas.draw()
    boxes = [
        text.get_window_extent()
        for text in figure.axes[0].texts
        if text.get_text() in dict(near)
    ]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(boxes) == 4 and not any(a.overlaps(b) for a, b in pairs)


@pytest.mark.parametrize("apart", [(0.0, 0.02), (0.004, 0.02), (-0.004, 0.02)])
def test_labels_of_points_that_touch_stay_on_their_own_sides(apart):
    """At the left edge, with something in the way where the upper one's would be."""
    lower = np.array([0.02, 0.5])
    figure, axis = plt.subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.annotate("in the way", lower, (6, 16), textcoords="offset points")
    beside = {"textcoords": "offset points"}
    upper = axis.annotate("upper", lower + apart, (6, 4), **beside)
    under = axis.annotate("lower", lower, (6, 4), **beside)
    spread_labels([under, upper])
    assert under.get_window_extent().y1 < upper.get_window_extent().y0


def test_change_map():
    """Every cell has its number and interval, bold where the interval has one sign;
    what was not measured is hatched.
    """
    cells = [
        ("CoOp", "DePT", 2.0, 1.0, 3.0),
        ("CoOp", "TCP", -0.5, -2.0, 1.0),
        ("MaPLe", "TCP", 1.0, np.nan, np.nan),
    ]
    cells = pd.DataFrame(cells, columns=["row", "column", "mean", "low", "high"])
    figure = change_map(cells)
    axis = figure.axes[0]
    texts = {text.get_text(): text for text in axis.texts}
    assert set(texts) == {"+2.0", "[+1.0, +3.0]", "-0.5", "[-2.0, +1.0]", "+1.0"}
    assert texts["+2.0"].get_fontweight() == "bold"
    assert texts["-0.5"].get_fontweight() == "normal"
    assert [patch.get_hatch() for patch in axis.patches] == ["///"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["CoOp", "MaPLe"]
    with pytest.raises(InputError):
        change_map(pd.concat([cells, cells]))
