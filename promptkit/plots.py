"""The figures of the chapters; they read in black and white: markers, line styles and
hatches beside hues.
"""

import re
from contextlib import contextmanager
from itertools import cycle, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.transforms import Bbox

from promptkit.errors import InputError
from promptkit.results import (
    PROBE,
    differences,
    harmonic_mean,
    interval,
    label,
    summarise,
)

MARKERS = "o s ^ D v P X <".split()
LINES = ["-", "--", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (5, 1))]
HATCHES = ["", "///", "...", "xxx", "\\\\\\", "++"]
SPLITS = {
    "base": "base classes",
    "new": "new classes",
    "hm": "harmonic mean",
    "all": "all classes",
}


@contextmanager
def style():
    """The look of every figure, as a context; nothing leaks into the caller's
    settings.
    """
    # Notebooks choose their backend when it is first needed and become interactive
    # then; were that to happen below, leaving the context would undo it and later
    # figures would not be shown.
    plt.switch_backend(plt.get_backend())
    with (
        sns.axes_style("whitegrid"),
        sns.plotting_context("notebook", font_scale=0.8),
        sns.color_palette("colorblind"),
    ):
        with plt.rc_context(
            {"legend.frameon": True, "hatch.linewidth": 0.6, "savefig.bbox": "tight"}
        ):
            yield


def few_shot_curves(
    runs: pd.DataFrame,
    zero_shot="clip",
    datasets=None,
    names=None,
    columns=3,
    level=0.95,
):
    """Accuracy against shots: a panel for the average and one for each dataset.

    A star at 0 shots marks the zero-shot method, dotted lines are linear probes, bars
    are intervals over seeds.

    Args:
        runs: tidy rows of the few-shot protocol.
        zero_shot: method drawn as the star.
        datasets: the panels, in this order; all by default.
        names: dict from method (or "method | options") to what the legend calls it.
        columns: panels in a row.

    Returns:
        The matplotlib figure.
    """
    table = _table(runs, "few-shot", level)
    panels = list(datasets or (d for d in table["dataset"].unique() if d != "average"))
    panels = ["average", *panels] if len(panels) > 1 else panels
    methods = [name for name in table["label"].unique() if name != zero_shot]
    with style():
        rows = -(-len(panels) // columns)
        size = (3.1 * min(columns, len(panels)), 2.5 * rows + 0.5)
        figure, axes = plt.subplots(
            rows,
            min(columns, len(panels)),
            figsize=size,
            squeeze=False,
            layout="constrained",
        )
        colours = sns.color_palette("colorblind", len(methods))
        for axis, panel in zip(axes.flat, panels, strict=False):
            cells = table[(table["dataset"] == panel) & (table["split"] == "all")]
            looks = zip(methods, colours, cycle(MARKERS), cycle(LINES))
            for name, colour, marker, line in looks:
                curve = cells[cells["label"] == name].sort_values("shots")
                line = ":" if name == PROBE else line
                error = _errors(curve)
                axis.errorbar(
                    curve["shots"], curve["mean"], yerr=error,
                    label=(names or {}).get(name, name), color=colour, marker=marker,
                    linestyle=line, markersize=4.5, linewidth=1.4, capsize=2,
                )  # fmt: skip
            star = cells[cells["label"] == zero_shot]
            if len(star):
                text = (names or {}).get(zero_shot, f"{zero_shot} (zero-shot)")
                axis.plot(
                    0,
                    star["mean"].iloc[0],
                    "*",
                    color="black",
                    markersize=10,
                    label=text,
                    clip_on=False,
                    zorder=5,
                )
            axis.set_title(
                _panel_title(panel, cells),
                fontweight="bold" if panel == "average" else "normal",
            )
            axis.set_xticks(sorted({0, *cells["shots"]}))
            axis.set_xlabel("training images a class (shots)")
            axis.set_ylabel("test accuracy (%)")
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        _legend_below(figure, axes.flat[0])
    return figure


def base_new_bars(runs: pd.DataFrame, dataset="average", names=None, level=0.95):
    """Base, new and harmonic mean of each method side by side, with intervals over
    seeds and their numbers.

    Args:
        runs: tidy rows of the base-to-new protocol.
        dataset: one dataset's name or "average".
        names: dict from method (or "method | options") to what the axis calls it, in
            the order of the bars.
    """
    table = _table(runs, "base-to-new", level)
    table = table[table["dataset"] == dataset]
    if not len(table):
        raise InputError(f"no base-to-new runs of dataset {dataset!r} to draw")
    measured = list(table["label"].unique())
    methods = [name for name in names or () if name in measured]
    methods += [name for name in measured if name not in methods]
    with style():
        figure, axis = plt.subplots(
            figsize=(1.6 + 1.5 * len(methods), 3.4), layout="constrained"
        )
        shades = [sns.color_palette("colorblind")[i] for i in (0, 1, 7)]
        for i, split in enumerate(("base", "new", "hm")):
            cells = table[table["split"] == split].set_index("label").reindex(methods)
            x = np.arange(len(methods)) + 0.27 * (i - 1)
            axis.bar(
                x,
                cells["mean"],
                0.25,
                color=shades[i],
                alpha=0.6,
                edgecolor="black",
                hatch=HATCHES[i],
                label=SPLITS[split],
            )
            axis.errorbar(
                x,
                cells["mean"],
                yerr=_errors(cells),
                fmt="none",
                ecolor="black",
                capsize=3,
                linewidth=1,
            )
            top = cells["mean"].where(cells["high"].isna(), cells["high"])
            for at, height, value in zip(x, top, cells["mean"], strict=True):
                if np.isfinite(value):
                    axis.annotate(
                        f"{value:.1f}",
                        (at, height),
                        (0, 2),
                        textcoords="offset points",
                        ha="center",
                        fontsize=8,
                    )
        axis.set_ylim(0, 108)  # bars compare by their length, so they start at 0
        axis.set_xticks(
            np.arange(len(methods)), [(names or {}).get(name, name) for name in methods]
        )
        axis.set_ylabel("test accuracy (%)")
        axis.set_title(_panel_title(dataset, table))
        axis.grid(axis="x", visible=False)
        _legend_below(figure, axis)
    return figure


def difference_bars(
    runs: pd.DataFrame, a: str, b: str, splits=("base", "new"), names=None, level=0.95
):
    """What ``a`` gains or loses against ``b``, task by task, sorted; bars are intervals
    over seeds.

    Args:
        runs: tidy rows of one protocol.
        a, b: methods, or "method | options"; see :func:`promptkit.results.differences`.
        splits: a panel each; those of the protocol, such as "base" and "new", or "all".
        names: dict from method to what the title calls it.
    """
    first, second = ((names or {}).get(name, name) for name in (a, b))
    with style():
        figure, axes = plt.subplots(
            1,
            len(splits),
            figsize=(4.2 * len(splits), 3.4),
            squeeze=False,
            layout="constrained",
        )
        for axis, split in zip(axes.flat, splits, strict=True):
            by_task = differences(runs, a, b, split).groupby("target")
            cells = pd.DataFrame(
                [interval(values, level) for _, values in by_task], list(by_task.groups)
            )
            cells = cells.set_axis(["mean", "low", "high"], axis=1).sort_values("mean")
            shade = sns.color_palette("colorblind")[0]
            axis.barh(
                cells.index,
                cells["mean"],
                color=shade,
                alpha=0.6,
                edgecolor="black",
                height=0.7,
            )
            axis.errorbar(
                cells["mean"],
                cells.index,
                xerr=_errors(cells),
                fmt="none",
                ecolor="black",
                capsize=2,
                lw=1,
            )
            axis.axvline(0, color="black", linewidth=1)
            axis.axvline(
                cells["mean"].mean(),
                color="black",
                linestyle=":",
                linewidth=1.2,
                label="average",
            )
            axis.set_xlabel(f"{first} − {second} (points)")
            axis.set_title(SPLITS.get(split, split))
            axis.grid(axis="y", visible=False)
        named = axes[0, 0].get_legend_handles_labels()
        figure.legend(*named, loc="outside lower center")  # bars go both ways
    return figure


def average_bars(
    runs: pd.DataFrame, reference=None, split="all", names=None, level=0.95
):
    """One number a method: its mean over the tasks, or over the targets of a transfer,
    with its interval over seeds.

    Args:
        runs: tidy rows of one protocol.
        reference: method, or "method | options", that a dotted line is drawn at.
        split: of the protocol, such as "all" or "hm".
        names: dict from method to what the axis calls it, in the order of the bars.
    """
    table = summarise(runs, level)
    table = table.assign(label=label(table)).query("split == @split")
    if not len(table):
        raise InputError(f"no runs with a split {split!r} to draw")
    several = "average" in set(table["target"])
    table = table[
        table["target"] == ("average" if several else table["target"].iloc[0])
    ]
    table = table.set_index("label")
    order = [name for name in names or () if name in table.index]
    table = table.loc[[*order, *(name for name in table.index if name not in order)]]
    texts = [(names or {}).get(name, name) for name in table.index]
    with style():
        figure, axis = plt.subplots(
            figsize=(6, 0.8 + 0.33 * len(table)), layout="constrained"
        )
        error = _errors(table)
        axis.barh(
            texts, table["mean"], xerr=error, capsize=3, color="lightgrey",
            edgecolor="black",
        )  # fmt: skip
        for row, (value, half) in enumerate(zip(table["mean"], error[1], strict=True)):
            axis.annotate(
                f"{value:.1f}", (value + half, row), (5, 0),
                textcoords="offset points", va="center", backgroundcolor="white",
                fontsize=8,
            )  # fmt: skip
        if reference is not None:
            axis.axvline(table["mean"][reference], color="black", linestyle=":")
        n = table["datasets"].max()
        axis.set_xlabel(
            f"test accuracy (%), average of {n} datasets"
            if several and n > 1
            else "test accuracy (%)"
        )
        axis.set_xlim(0, 105)  # bars compare by their length, so they start at 0
        axis.grid(axis="y", visible=False)
        axis.invert_yaxis()
    return figure


def option_curves(
    runs: pd.DataFrame, option: str, default=None, xlabel=None, splits=None, level=0.95
):
    """Accuracy, averaged over tasks, against the values of an option that runs were
    given.

    Args:
        runs: tidy rows of one method and protocol.
        option: name of a hyperparameter or of a field of the recipe, as it was given in
            the runs' overrides.
        default: the value of runs to which it was not given; they are left out if None.
        xlabel: its name on the axis.
        splits: the curves; all that the protocol has by default.
    """
    table = summarise(runs, level)
    panel = (
        "average" if "average" in set(table["dataset"]) else table["dataset"].iloc[0]
    )
    table = table[table["dataset"] == panel]
    given = table["options"].str.extract(rf"(?:^|, ){re.escape(option)}=([^,]*)")[0]
    table = table.assign(
        at=pd.to_numeric(given.fillna(str(default)), errors="coerce")
    ).dropna(subset="at")
    if not len(table):
        raise InputError(f"no runs were given the option {option!r}")
    splits = splits or [split for split in SPLITS if split in set(table["split"])]
    with style():
        figure, axis = plt.subplots(figsize=(4.6, 3.5), layout="constrained")
        for split, marker, line in zip(splits, MARKERS, cycle(LINES), strict=False):
            cells = table[table["split"] == split].sort_values("at")
            axis.errorbar(
                cells["at"], cells["mean"], yerr=_errors(cells), marker=marker,
                linestyle=line, capsize=2, label=SPLITS.get(split, split),
            )  # fmt: skip
        axis.set_xlabel(xlabel or option)
        axis.set_ylabel("test accuracy (%)")
        axis.set_title(_panel_title(panel, table))
        _legend_below(figure, axis)
    return figure


def base_new_plane(runs: pd.DataFrame, arrows=(), names=None):
    """Methods as points, averaged over tasks: base accuracy across, new accuracy up;
    lines of equal harmonic mean.

    Args:
        runs: tidy rows of the base-to-new protocol.
        arrows: pairs of labels (from, to), "method" or "method | options", to join,
            such as a host and a plug-in.
        names: dict from label to what the figure calls it.
    """
    table = _table(runs, "base-to-new", 0.95).query("dataset == 'average'")
    points = table.pivot_table(
        index="label", columns="split", values="mean", sort=False
    )
    with style():
        figure, axis = plt.subplots(
            figsize=(5.4, 4.2) if len(points) < 9 else (8.0, 6.2 + len(points) // 20),
            layout="constrained",
        )
        points = points[["base", "new"]]
        texts = _points(axis, points, names)
        arrows = [(points.loc[start], points.loc[end]) for start, end in arrows]
        for tail, head in arrows:
            look = {
                "arrowstyle": "->",
                "color": "0.3",
                "shrinkA": 6,
                "shrinkB": 6,
                "lw": 1.2,
            }
            axis.annotate("", head, tail, arrowprops=look)
        axis.margins(0.18)
        limits = axis.get_xlim(), axis.get_ylim()
        base, new = np.meshgrid(
            np.linspace(*limits[0], 60), np.linspace(*limits[1], 60)
        )
        lines = axis.contour(
            base,
            new,
            harmonic_mean(base, new),
            6,
            colors="grey",
            linewidths=0.6,
            linestyles=":",
        )
        axis.clabel(lines, fmt="H = %.0f", fontsize=7)
        axis.set_xlabel("accuracy on base classes (%)")
        axis.set_ylabel("accuracy on new classes (%)")
        axis.set_title(_panel_title("average", table))
        spread_labels(texts, arrows)
    return figure


def cost_plane(runs: pd.DataFrame, names=None):
    """Methods as points: seconds of a run across, on a log axis, harmonic mean up; a
    dotted line joins those that no cheaper one exceeds.

    Args:
        runs: tidy rows of the base-to-new protocol. Seconds are the median over a
            method's runs, accuracies are averaged over tasks.
        names: dict from label to what the figure calls it.
    """
    table = _table(runs, "base-to-new", 0.95).query("dataset == 'average'")
    hm = table[table["split"] == "hm"].set_index("label")["mean"]
    runs = runs.assign(label=label(runs)).drop_duplicates(["label", "dataset", "seed"])
    seconds = runs.groupby("label")["seconds"].median()
    points = pd.DataFrame({"seconds": seconds, "hm": hm}).loc[list(hm.index)]
    best = points.sort_values(["seconds", "hm"], ascending=[True, False])
    best = best[best["hm"] >= best["hm"].cummax()]
    with style():
        figure, axis = plt.subplots(figsize=(8.0, 6.2), layout="constrained")
        axis.set_xscale("log")
        axis.step(
            best["seconds"], best["hm"], ":", where="post", color="0.4", linewidth=1
        )
        texts = _points(axis, points, names)
        axis.margins(0.12)
        axis.set_xlabel("seconds of a run, median over tasks and seeds")
        axis.set_ylabel("harmonic mean of base and new accuracy (%)")
        axis.set_title(_panel_title("average", table))
        spread_labels(texts)
    return figure


def _points(axis, points, names):
    """A point a row, at its two columns; returns their labels, which spread_labels puts
    in place.
    """
    looks = zip(
        points.itertuples(), cycle(sns.color_palette("colorblind")), cycle(MARKERS)
    )
    texts = []
    for (name, x, y), colour, marker in looks:
        axis.plot(x, y, marker, color=colour, markeredgecolor="black", markersize=8)
        texts.append(
            axis.annotate(
                (names or {}).get(name, name), (x, y), (6, 4),
                textcoords="offset points", fontsize=8,
            )
        )  # fmt: skip
    return texts


def spread_labels(texts, lines=()):
    """Put each label beside its point, or near to it at the end of a line, where it
    covers no point, none of the lines (pairs of ends) and nothing placed before it, and
    its own line neither, and no point that touches its own is nearer, unless there is
    no such place. Call it last: where the axes change later, labels stay.

    Args:
        texts: annotations of one axis at their points, placed in points from them
            (``textcoords="offset points"``).
        lines: pairs of ends, in data coordinates.
    """
    figure, axis = texts[0].figure, texts[0].axes
    figure.draw_without_rendering()
    pixel = figure.dpi / 72

    def along(tail, head):
        """Small boxes on the way between two places."""
        way = np.linspace(tail, head, 2 + int(np.hypot(*(head - tail)) / 4))
        return [Bbox([at - pixel, at + pixel]) for at in way]

    places = [axis.transData.transform(text.xy) for text in texts]
    spots = [Bbox([at - 5 * pixel, at + 5 * pixel]) for at in places]
    taken = list(spots)
    others = [text for text in axis.texts if text not in texts and text.get_text()]
    taken += [text.get_window_extent() for text in others]
    for ends in lines:
        taken += along(*axis.transData.transform(np.array(ends, float)))
    beside = [(6, 4), (6, -11), (-6, 4), (-6, -11)]
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = [
        (r * np.cos(turn), r * np.sin(turn) - 3)
        for r in range(16, 120, 8)
        for turn in turns
    ]
    labels = []
    for text, place, own in zip(texts, places, spots, strict=True):
        crossed = [*labels, *(spot for spot in spots if not spot.overlaps(own))]
        pairs = zip(places, spots, strict=True)
        touching = [at for at, spot in pairs if spot.overlaps(own)]
        # In a crowd a line may cross something; the last is for where no place is free.
        for x, y, may_cross in [
            *((x, y, False) for x, y in [*beside, *around]),
            *((x, y, True) for x, y in around),
            (*beside[0], True),
        ]:
            text.set_position((x, y))
            text.set_horizontalalignment("left" if x > 0 else "right")
            box, line = text.get_window_extent(), []
            end = place + pixel * np.array([x, y + 3])
            nearest = min(np.hypot(*(end - at)) for at in touching)
            own_side = np.hypot(*(end - place)) <= nearest
            if (x, y) not in beside:
                line = along(place, end)
            inside = axis.bbox.x0 < box.x0 and box.x1 < axis.bbox.x1
            inside = inside and axis.bbox.y0 < box.y0 and box.y1 < axis.bbox.y1
            free = not any(box.overlaps(other) for other in taken)
            crossing = any(part.overlaps(other) for part in line for other in crossed)
            if inside and free and (may_cross or own_side and not crossing):
                break
        labels.append(box)
        taken += [box, *line]
        if line:
            axis.annotate(
                "", text.xy, (x, y + 3), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": "0.5", "lw": 0.6, "shrinkA": 0},
            )  # fmt: skip


def image_grid(images, titles=None, columns=8, size=1.2):
    """Images in rows.

    Args:
        images: (n, 3, H, W) uint8 tensor or array, or a list of n images (3, H, W) of
            any sizes.
        titles: n texts, or None.
    """
    images = [np.asarray(image) for image in images]
    wrong = next(
        (image.shape for image in images if image.ndim != 3 or image.shape[0] != 3),
        None,
    )
    if wrong or not images:
        raise InputError(
            f"an image grid takes images (3, H, W), one or more, not {wrong or 'none'}"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    with style():
        figure, axes = plt.subplots(
            rows, columns,
            figsize=(size * columns, (size + 0.25 * (titles is not None)) * rows),
            squeeze=False, layout="constrained",
        )  # fmt: skip
        for axis in axes.flat:
            axis.set_axis_off()
        for i, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
            axis.imshow(image.transpose(1, 2, 0), interpolation="nearest")
            if titles is not None:
                axis.set_title(titles[i], fontsize=7, pad=2)
    return figure


def loss_curve(losses, xlabel="step", ylabel="loss (nats)", smooth=1):
    """Training loss against steps.

    Args:
        losses: list of numbers, or a dict from a curve's name to such a list.
        smooth: width in steps of the running mean.
    """
    curves = losses if isinstance(losses, dict) else {"": losses}
    with style():
        figure, axis = plt.subplots(figsize=(5, 2.8), layout="constrained")
        for (name, values), line, marker in zip(
            curves.items(), cycle(LINES), cycle(MARKERS)
        ):
            values = (
                pd.Series(np.asarray(values, float))
                .rolling(smooth, min_periods=1)
                .mean()
            )
            every = max(1, len(values) // 8)
            axis.plot(
                values.index + 1,
                values,
                linestyle=line,
                marker=marker,
                markevery=every,
                markersize=4,
                label=name,
            )
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        if len(curves) > 1:
            axis.legend()
    return figure


def similarity_map(matrix, rows, columns, title="", unit="cosine similarity", digits=2):
    """A heat map with its numbers written in, e.g. of image features against class
    names.

    Args:
        matrix: (R, C) numbers; rows, columns: R and C labels.
    """
    matrix = np.asarray(matrix, float)
    if matrix.shape != (len(rows), len(columns)):
        raise InputError(
            f"{matrix.shape} similarities do not match {len(rows)} rows and"
            f" {len(columns)} columns"
        )
    with style():
        figure, axis = plt.subplots(
            figsize=(1.8 + 0.6 * len(columns), 1.2 + 0.38 * len(rows)),
            layout="constrained",
        )
        sns.heatmap(
            matrix, annot=matrix.size <= 400, fmt=f".{digits}f", cmap="gray_r",
            xticklabels=columns, yticklabels=rows, linewidths=0.5,
            cbar_kws={"label": unit}, annot_kws={"fontsize": 7}, ax=axis,
        )  # fmt: skip
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=45)
        plt.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
        axis.tick_params(axis="y", rotation=0)
    return figure


def change_map(cells: pd.DataFrame, rows=None, columns=None, unit="points"):
    """A heat map of changes with their intervals: what each column, such as a plug-in,
    adds to each row, such as a host. Bold numbers have an interval on one side of 0;
    hatched cells were not measured.

    Args:
        cells: a row a change: the columns row, column, mean, low and high.
        rows, columns: in this order; by default as they come.
        unit: of the changes.

    Raises:
        InputError: there are no changes, or two of one cell.
    """
    if not len(cells) or cells.duplicated(["row", "column"]).any():
        raise InputError("a map of changes takes one change a cell, and one at least")
    rows = list(rows or cells["row"].unique())
    columns = list(columns or cells["column"].unique())
    at = {(cell["row"], cell["column"]): cell for _, cell in cells.iterrows()}
    largest = max(cells["mean"].abs().max(), 1e-9)
    with style():
        figure, axis = plt.subplots(
            figsize=(1.6 + 1.15 * len(columns), 1.0 + 0.55 * len(rows)),
            layout="constrained",
        )
        grid = np.full((len(rows), len(columns)), np.nan)
        for (r, row), (c, column) in product(enumerate(rows), enumerate(columns)):
            if (row, column) not in at:
                look = {"facecolor": "white", "edgecolor": "0.7", "hatch": "///"}
                axis.add_patch(plt.Rectangle((c - 0.5, r - 0.5), 1, 1, lw=0, **look))
                continue
            cell = at[row, column]
            grid[r, c] = cell["mean"]
            sure = cell["low"] > 0 or cell["high"] < 0
            strong = abs(cell["mean"]) > 0.6 * largest
            look = {"ha": "center", "color": "white" if strong else "black"}
            weight = "bold" if sure else "normal"
            axis.text(
                c, r - 0.02, f"{cell['mean']:+.1f}", va="bottom", fontsize=9,
                fontweight=weight, **look,
            )  # fmt: skip
            if np.isfinite(cell["low"]):
                ends = f"[{cell['low']:+.1f}, {cell['high']:+.1f}]"
                axis.text(c, r + 0.06, ends, va="top", fontsize=6.5, **look)
        image = axis.imshow(
            grid, cmap="PuOr", vmin=-largest, vmax=largest, aspect="auto"
        )
        figure.colorbar(image, label=f"change ({unit})")
        axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(visible=False)
    return figure


def _table(runs, protocol, level):
    runs = runs[runs["protocol"] == protocol]
    if not len(runs):
        raise InputError(f"no {protocol} runs to draw")
    table = summarise(runs, level)
    return table.assign(label=label(table))


def _errors(cells):
    """(2, n) distances from the mean to the ends of its interval; 0 where there is
    none.
    """
    return np.nan_to_num(
        np.stack([cells["mean"] - cells["low"], cells["high"] - cells["mean"]])
    ).clip(0)


def _panel_title(panel, cells):
    n = cells["datasets"].max()
    return (
        panel
        if panel != "average"
        else f"average of {n} datasets"
        if n > 1
        else "one dataset"
    )


def _legend_below(figure, axis):
    handles, texts = axis.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(4, len(texts)))
