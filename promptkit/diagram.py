"""The picture of a method: CLIP's two towers with what is frozen, what learns and what
is put in where. One style for all, which reads in black and white.
"""

import base64
import html
import io
from dataclasses import replace

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from matplotlib.textpath import TextPath

from promptkit.errors import InputError
from promptkit.picture import FROZEN, LEARNED, MADE, VALUE, Picture, part
from promptkit.plots import style
from promptkit.registry import nesting, parse

DPI = 100  # so that a unit of the picture is a pixel of the book
WIDTH = 800
COLUMNS = {"text": (15, 335), "image": (465, 785)}  # left and right edge of a tower
MIDDLE = 400
BOX = 32  # height
TALL = 38  # of a feature: two lines
SIDE = 96  # width of what is put into a row of blocks
SIZE = 9.0  # of the letters, in points
DARK = "0.15"
LOOKS = {
    FROZEN: {"facecolor": "white", "edgecolor": "0.35", "linewidth": 1.0},
    LEARNED: {"facecolor": DARK, "edgecolor": "black", "linewidth": 1.0},
    MADE: {"facecolor": "white", "edgecolor": "0.35", "linewidth": 1.0, "hatch": "///"},
    VALUE: {"facecolor": "white", "edgecolor": "0.35", "linewidth": 1.0},
}
LEGEND = {FROZEN: "frozen", LEARNED: "learned", MADE: "made from what is learned"}


class _Described(Figure):
    """A figure with alt text, which notebooks and the book give to its image."""

    alt = ""

    def _repr_html_(self):
        data = io.BytesIO()
        self.savefig(data, dpi=2 * DPI)  # sharp on dense screens too
        return (
            f'<img alt="{html.escape(self.alt)}" width="{WIDTH}"'
            ' style="max-width: 100%; height: auto; background: white"'
            f' src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"'
            "/>"
        )


def picture(spec: str) -> tuple[Picture, str]:
    """What a method, or plug-ins around one, says of itself, and its name in words.

    Raises:
        InputError: the method is unknown or has no picture.
    """
    outer, *hosts = nesting(spec)
    if outer.picture is None:
        raise InputError(f"{outer.name} has no picture: set {outer.__name__}.picture")
    if not hosts:
        return outer.picture, outer.title
    host = parse(spec)[1]
    if host is None:  # the default host does not learn
        below, title, theirs = hosts[0].picture, outer.title, ()
    else:
        below, title = picture(host)
        title, theirs = f"{outer.title} over {title}", below.targets
    targets = dict.fromkeys((*theirs, *outer.picture.targets))
    return replace(outer.picture.over(below), targets=tuple(targets)), title


def towers(method: str | Picture) -> Figure:
    """Draw a method in CLIP's two towers.

    Args:
        method: as :func:`promptkit.registry.build` takes it, such as "coop" or
            "dept(maple)", or a :class:`~promptkit.picture.Picture`.

    Returns:
        The matplotlib figure; its ``alt`` says in words what it shows.

    Raises:
        InputError: the method is unknown or has no picture, or the picture names a
            place that it does not have.
    """
    what, title = (method, "") if isinstance(method, Picture) else picture(method)
    with style():
        return _Drawing(what).figure(what.alt(title))


def _width(text: str, size: float = SIZE) -> float:
    """Of its longest line, in pixels; without a renderer, so that any backend will
    do.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    extents = [TextPath((0, 0), line, size=size).get_extents() for line in lines]
    return max((e.width for e in extents), default=0) * DPI / 72


class _Drawing:
    """Shapes and places; rows are stacked from below, then the arrows join them."""

    def __init__(self, what: Picture):
        self.what = what
        self.shapes, self.texts = [], []
        self.at = {}  # name of a place: its box (left, bottom, right, top)
        self.states = {FROZEN}
        self._stack()
        self._join()

    def figure(self, alt: str) -> Figure:
        size = (WIDTH / DPI, self.top / DPI)
        figure = plt.figure(figsize=size, dpi=DPI, FigureClass=_Described)
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(0, WIDTH), ylim=(0, self.top))
        axis.set_axis_off()
        for shape in self.shapes:
            axis.add_patch(shape)
        for x, y, label, look in self.texts:
            axis.text(x, y, label, **look)
        figure.alt = alt
        plt.close(figure)  # a notebook's cell shows its value, not all open figures too
        return figure

    # --- primitives -------------------------------------------------------------------

    def write(self, x, y, label, size=SIZE, ha="center", **look):
        look = {"va": "center", "fontsize": size, "ha": ha, "zorder": 5} | look
        self.texts.append((x, y, label, look))

    def box(self, thing, left, bottom, right, top, place=None):
        p = part(thing, VALUE)
        self.states.add(p.state)
        shape = {"zorder": 3, "gid": p.state} | LOOKS[p.state]
        corner, size = (left, bottom), (right - left, top - bottom)
        if p.state == VALUE:
            round_ = "round,pad=0,rounding_size=12"
            self.shapes.append(FancyBboxPatch(corner, *size, boxstyle=round_, **shape))
        else:
            self.shapes.append(Rectangle(corner, *size, **shape))
        size = min(SIZE, SIZE * (right - left - 6) / max(_width(p.label), 1))
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        look = {"color": "white" if p.state == LEARNED else "black", "gid": p.state}
        look |= {"bbox": ground} if p.state == MADE else {}
        self.write((left + right) / 2, (bottom + top) / 2, p.label, size, **look)
        if place:
            self.at[place] = (left, bottom, right, top)

    def arrow(self, *points, heads="-|>", dashed=False):
        self.shapes.append(
            FancyArrowPatch(
                path=Path(points), arrowstyle=heads, mutation_scale=9,
                linestyle=(0, (4, 2.5)) if dashed else "-", linewidth=1.1,
                facecolor="black", edgecolor="black", joinstyle="miter",
                capstyle="butt", shrinkA=0, shrinkB=0, zorder=2,
            )
        )  # fmt: skip

    # --- rows, from below -------------------------------------------------------------

    def _stack(self):
        what = self.what
        lanes = any("tokens" in b.target or "tokens" in b.source for b in what.bridges)
        both = any("tokens" in b.target and "tokens" in b.source for b in what.bridges)
        self.legend_y = 16
        y = 34
        if what.note:
            self.write(MIDDLE, y + 6, what.note, style="italic")
            y += 22
        for side, words in (("text", what.prompts), ("image", what.images)):
            self.write(COLUMNS[side][0], y + 6, words, ha="left")
        y += 20
        self.lane = y + (BOX / 2 if both else 8)
        y += (BOX + 10 if both else 24) if lanes else 6
        for side in COLUMNS:
            self._tokens(side, y)
        y += BOX
        self.foot = y
        y += 20 + (8 if what.several else 0)
        y = self._towers(y) + 20
        if what.text_out or what.image_out:
            for side, (left, right) in COLUMNS.items():
                out = getattr(what, f"{side}_out")
                if out:
                    self.box(out, left + 60, y, right - 60, y + BOX, f"{side} out")
            y += BOX + 20
        for side in COLUMNS:
            self._features(side, y)
        y += TALL + 20
        y = self._scores(y)
        self.top = self._targets(y) + 10

    def _tokens(self, side, y):
        segments = [part(p) for p in getattr(self.what, side)]
        left, right = COLUMNS[side]
        natural = [
            max(_width(p.label) + 12, 20 if p.state == FROZEN else 32) for p in segments
        ]
        gap = 4
        spare = right - left - gap * (len(segments) - 1)
        scale = spare / sum(natural)
        if side in self.what.several:  # more rows behind this one
            for k in (1, 2):
                self.shapes.append(
                    Rectangle((left + 4 * k, y + 4 * k), right - left - 4 * k, BOX,
                              zorder=1 - k / 10, **LOOKS[FROZEN])
                )  # fmt: skip
            self.shapes.append(
                Rectangle((left, y), right - left, BOX, zorder=1.5, color="white")
            )
        x, moving = left, []
        for p, width in zip(segments, natural, strict=True):
            width *= scale
            self.box(p, x, y, x + width, y + BOX)
            if p.state != FROZEN:
                moving.append((x, x + width))
            x += width + gap
        # The last of them are the class context, and what bridges begin and end at.
        first, last = moving[-1] if moving else (left, right)
        self.at[f"{side} tokens"] = (first, y, last, y + BOX)

    def _towers(self, y):
        what = self.what
        single = len(what.blocks) == 1
        height = 44 if single else BOX + 2
        top = y + 8 + len(what.blocks) * (height + 6) + 20
        for side, (left, right) in COLUMNS.items():
            self.shapes.append(
                Rectangle((left, y), right - left, top - y, zorder=1, gid=FROZEN,
                          facecolor="0.94", edgecolor="0.35", linewidth=1.0)
            )  # fmt: skip
            name = getattr(what, f"{side}_tower")
            middle = (left + right) / 2
            self.write(middle, top - 13, name, fontweight="bold")
            foot = self.foot + (8 if side in what.several else 0)
            self.arrow((middle, foot), (middle, y))
            inserted = getattr(what, f"{side}_blocks")
            for row in range(len(what.blocks)):
                low = y + 8 + row * (height + 6)
                inner, outer = (right, left) if side == "text" else (left, right)
                inward = 1 if side == "text" else -1
                end = inner - inward * 8
                if row in inserted:
                    side_end = end - inward * SIDE
                    self.box(
                        inserted[row],
                        min(end, side_end), low + 2, max(end, side_end),
                        low + height - 2, f"{side} {row}",
                    )  # fmt: skip
                    end = side_end - inward * 20
                    mid = low + height / 2
                    self.arrow((side_end, mid), (end, mid))
                start = outer + inward * 8
                low_x, high_x = min(start, end), max(start, end)
                self.box(part(what.row(row)), low_x, low, high_x, low + height)
            self.at[f"{side} tower"] = (left, low, right, low + height)
        self.tower = (y, top)
        return top

    def _features(self, side, y):
        left, right = COLUMNS[side]
        what, middle = self.what, (left + right) / 2
        feature = getattr(what, f"{side}_feature")
        reference = getattr(what, f"{side}_reference")
        tower = self.tower[1]
        if reference is None:
            mine = (middle - 85, middle + 85)
        else:
            mine, other = (left, left + 122), (right - 122, right)
            if side == "image":
                mine, other = other, mine
            self.box(reference.part, other[0], y, other[1], y + TALL,
                     f"{side} reference")  # fmt: skip
            if reference.loss:
                self.arrow(
                    (min(mine[1], other[1]), y + TALL / 2),
                    (max(mine[0], other[0]), y + TALL / 2),
                    heads="<|-|>", dashed=True,
                )  # fmt: skip
                self.write(middle, y + TALL / 2 + 11, reference.loss)
        self.box(feature, mine[0], y, mine[1], y + TALL, f"{side} feature")
        x = sum(mine) / 2
        if f"{side} out" in self.at:
            out = self.at[f"{side} out"]
            self.arrow((middle, tower), (middle, out[1]))
            x = min(max(x, out[0] + 20), out[2] - 20)
            self.arrow((x, out[3]), (x, y))
        else:
            self.arrow((x, tower), (x, y))

    def _scores(self, y):
        what = self.what
        rows = [(what.score, ("text", "image"))]
        rows += [(head.part, head.reads) for head in what.heads]
        labels = [*(part(p).label for p, _ in rows), what.fusion]
        half = max(70, *(_width(label) / 2 + 12 for label in labels))
        start = y
        for i, (p, reads) in enumerate(rows):
            place = "score" if i == 0 else f"head {i}"
            self.box(p, MIDDLE - half, y, MIDDLE + half, y + BOX, place)
            for side in reads:
                left, _, right, top = self.at[f"{side} feature"]
                x = (left + right) / 2
                edge = MIDDLE - half if side == "text" else MIDDLE + half
                self.arrow((x, top), (x, y + BOX / 2), (edge, y + BOX / 2))
            y += BOX + 8
        self.head = y - 8
        if what.heads:
            self.shapes.append(
                Rectangle((MIDDLE - half - 8, start - 8), 2 * half + 16,
                          y - start + 8 + 18, zorder=0.5, fill=False,
                          edgecolor="0.35", linestyle=":", linewidth=1.2)
            )  # fmt: skip
            self.write(MIDDLE, y + 4, what.fusion)
            self.head = y + 18
            y += 22
        return y

    def _targets(self, y):
        targets = self.what.targets
        if not targets:
            return y
        y += 24 if len(targets) == 1 else 32
        widths = [max(110, _width(part(t.part).label) + 24) for t in targets]
        # A loss is written beside its arrow, left of the middle where there are two.
        gap = 40
        x = MIDDLE - (sum(widths) + gap * (len(targets) - 1)) / 2
        for i, (target, width) in enumerate(zip(targets, widths, strict=True)):
            self.box(target.part, x, y, x + width, y + BOX)
            middle, head = x + width / 2, self.head
            reach = MIDDLE + 30 * (2 * i - len(targets) + 1)
            bend = head + 12
            points = [(middle, y), (reach, head)]
            if len(targets) > 1:
                points = [(middle, y), (middle, bend), (reach, bend), (reach, head)]
            self.arrow(*points, heads="<|-|>", dashed=True)
            left = len(targets) > 1 and i < len(targets) / 2
            self.write(
                (middle if len(targets) > 1 else MIDDLE) + (-8 if left else 8),
                (y + (bend if len(targets) > 1 else head)) / 2 + 1,
                target.loss,
                ha="right" if left else "left",
            )
            x += width + gap
        return y + BOX

    # --- what joins them --------------------------------------------------------------

    def _join(self):
        floating = [b for b in self.what.bridges if self._level(b) is None]
        # Several share the space between the towers, those that the score feeds left.
        floating.sort(key=lambda b: b.source.startswith("image"))
        for bridge in self.what.bridges:
            self._bridge(bridge, floating)
        self._legend()

    def _level(self, bridge) -> float | None:
        """The height of a bridge that has one: that of the row that it leads to."""
        ends = (bridge.target, bridge.source)
        if all("tokens" in end for end in ends):
            return self.lane
        for end in ends:
            if end not in self.at and end != "score":
                known = ", ".join(sorted(self.at))
                raise InputError(
                    f"a bridge has no place {end!r} to end; it has {known}"
                )
            if end.split()[-1].isdigit() or end.endswith("out"):
                _, low, _, high = self.at[end]
                return (low + high) / 2
        return None

    def _bridge(self, bridge, floating):
        y, label = self._level(bridge), part(bridge.part).label
        half, x = min(max(_width(label) / 2 + 8, 30), 50), MIDDLE
        if y is None:
            y = sum(self.tower) / 2
            if len(floating) > 1:
                shift = 2 * floating.index(bridge) - 1
                half, x, y = 34, x + 27 * shift, y - 24 * shift
            taken = [self._level(b) for b in self.what.bridges if b not in floating]
            while any(abs(y - level) < BOX for level in taken):
                y += BOX / 4
        tall = max(BOX - 6, 10 + 15 * (label.count("\n") + 1))
        low, high = y - tall / 2, y + tall / 2
        self.box(bridge.part, x - half, low, x + half, high)
        for end, tail in ((bridge.source, True), (bridge.target, False)):
            left, bottom, right, top = self.at[end]
            on_left = end.startswith("text")
            inner = right if on_left else left
            edge = x - half if on_left else x + half
            middle = (bottom + top) / 2
            if "tokens" in end:
                foot = (left + right) / 2
                start = (edge, y) if y == self.lane else (x, low)
                corner = [] if y == self.lane else [(x, self.lane)]
                points = [start, *corner, (foot, self.lane), (foot, bottom)]
            elif end.endswith("feature") and f"{end.split()[0]} reference" in self.at:
                # Its reference stands beside it: the arrow passes below both.
                foot = inner - 20 if on_left else inner + 20
                under = bottom - 10
                points = [(x, high), (x, under), (foot, under), (foot, bottom)]
            elif end == "score":
                points = [(x, high), (x, bottom)]
            elif abs(middle - y) < 1:
                points = [(edge, y), (inner, y)]
            else:
                start = (x, high if middle > y else low)
                points = [start, (x, middle), (inner, middle)]
            if tail:
                points = points[::-1]
            self.arrow(*points, heads="<|-|>" if bridge.both else "-|>")

    def _legend(self):
        x, y = COLUMNS["text"][0], self.legend_y
        for state, words in LEGEND.items():
            if state in self.states:
                self.shapes.append(
                    Rectangle((x, y - 7), 22, 14, zorder=3, gid=state, **LOOKS[state])
                )
                self.write(x + 28, y, words, ha="left")
                x += 28 + _width(words) + 24
        losses = [*self.what.targets, self.what.text_reference]
        losses.append(self.what.image_reference)
        if any(t and t.loss for t in losses):
            self.arrow((x, y), (x + 34, y), heads="<|-|>", dashed=True)
            self.write(x + 40, y, "loss", ha="left")
