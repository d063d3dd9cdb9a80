"""The picture of every method: it is drawn, reads in black and white and says in words
what it shows; a new method is tested here without a change.
"""

import matplotlib

matplotlib.use("Agg")

import base64
import re
from dataclasses import replace
from itertools import combinations

import pytest
from matplotlib.colors import to_rgb
from test_plots import close  # noqa: F401  leaves no figures, no changed style

from promptkit.diagram import LOOKS, WIDTH, picture, towers
from promptkit.errors import InputError
from promptkit.method import REGISTRY, Method, register
from promptkit.picture import (
    FROZEN,
    LEARNED,
    MADE,
    Bridge,
    Head,
    Picture,
    Target,
    learned,
    made,
    plain,
    value,
)
from promptkit.registry import build, specs

# What methods to come need beyond those of the package.
TO_COME = {
    "tcp": Picture(
        text=("SOS", learned("$v_1$ … $v_4$"), "[class]", ".", "EOT"),
        blocks=("1 … 8", "9", "10 … L"),
        text_blocks={1: made("$T_c$")},
        bridges=(Bridge(learned("bottleneck"), "text reference", "text 1"),),
        text_reference=Target("frozen CLIP,\ntemplate", "1 − cos"),
    ),
    "mma": Picture(
        blocks=("1 … 4", "5 … L"),
        text_blocks={1: learned("adapter")},
        image_blocks={1: learned("adapter")},
        bridges=(
            Bridge(learned("shared\nprojection"), "text 1", "image 1", both=True),
        ),
    ),
    "clip_adapter": Picture(image_out=learned("adapter, mixed with its input")),
    "tip_adapter": Picture(
        heads=(Head(learned("cache of few-shot features"), ("image",)),),
        fusion="sum of both",
    ),
    "promptkd": Picture(
        text=("SOS", "teacher's $v$", "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", learned("$q_0$")),
        image_out=learned("projector"),
        text_tower="teacher's text tower",
        image_tower="student's image tower",
        targets=(Target("teacher's prediction", "divergence"),),
        images="an image $x$ without a label",
    ),
    "textrefiner": Picture(
        text_out=learned("aggregation"),
        bridges=(
            Bridge(
                learned("MLP and cache\nof local tokens"), "image tower", "text out"
            ),
        ),
    ),
    "kapt": Picture(
        text=("SOS", "summary", learned("$V_c$"), "[class]", ".", "EOT"),
        text_reference=Target("frozen CLIP,\ndescription"),
        image_out=learned("adaptation"),
        bridges=(
            Bridge(learned("prompter"), "text reference", "text tokens"),
            Bridge(value("reads"), "text feature", "image out"),
        ),
    ),
    "awt": Picture(score="optimal transport", targets=(), several=("text", "image")),
}
PICTURES = [*specs(), *TO_COME.values()]


def name(thing):
    return thing if isinstance(thing, str) else None


@pytest.mark.parametrize("method", PICTURES, ids=name)
def test_texts_are_readable(method):
    figure = towers(method)
    figure.canvas.draw()
    (axis,) = figure.axes
    assert figure.bbox.width == WIDTH
    boxes = {text: text.get_window_extent() for text in axis.texts}
    for text, box in boxes.items():
        assert text.get_fontsize() >= 7, text
        assert box.x0 >= 0 <= box.y0, text
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(boxes.items(), 2):
        assert not a.overlaps(b), (one, other)


@pytest.mark.parametrize("method", PICTURES, ids=name)
def test_boxes_lie_apart_and_hold_their_labels(method):
    figure = towers(method)
    figure.canvas.draw()
    (axis,) = figure.axes
    parts = [p for p in axis.patches if p.get_gid() and p.get_zorder() == 3]
    boxes = [p.get_window_extent() for p in parts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    for text in axis.texts:
        if text.get_gid():
            label = text.get_window_extent()
            inside = [box for box in boxes if box.overlaps(label)]
            assert len(inside) == 1, text
            assert inside[0].x0 <= label.x0 and label.x1 <= inside[0].x1, text
            assert inside[0].y0 <= label.y0 and label.y1 <= inside[0].y1, text


@pytest.mark.parametrize("method", PICTURES, ids=name)
def test_states_are_told_apart_without_colour(method):
    (axis,) = towers(method).axes
    what = method if isinstance(method, Picture) else picture(method)[0]
    said = {plain(p.label): p.state for p, _ in what.parts()}
    assert {p.get_gid() for p in axis.patches} >= set(said.values()) - {MADE}
    for text in axis.texts:
        if text.get_gid() == LEARNED:
            assert text.get_color() == "white"
    for patch in axis.patches:
        light = sum(to_rgb(patch.get_facecolor())) / 3
        if patch.get_gid() == LEARNED:
            assert light < 0.3
        elif patch.get_gid():
            assert light > 0.9
            assert (patch.get_gid() == MADE) == bool(patch.get_hatch())


@pytest.mark.parametrize("method", PICTURES, ids=name)
def test_alt_text_names_what_is_learned(method):
    figure = towers(method)
    what = method if isinstance(method, Picture) else picture(method)[0]
    parts = [p for p, _ in what.parts() if p.state == LEARNED]
    for p in parts:
        assert plain(p.label) in figure.alt.partition("Learned:")[2]
    assert parts or "Learned: nothing" in figure.alt
    assert not re.search(r"[$\\{}\n]", figure.alt)


@pytest.mark.parametrize("spec", specs())
def test_learned_parts_are_drawn_where_something_learns(spec, tiny_clip):
    method = build(spec, tiny_clip, ["pug", "cat"])
    states = {p.state for p, _ in picture(spec)[0].parts()}
    assert (LEARNED in states) == (method.n_parameters > 0 or spec == "tpt")


def test_notebooks_get_the_alt_text():
    figure = towers("dept(maple)")
    page = figure._repr_html_()
    assert 'alt="Diagram of DePT over MaPLe' in page and f'width="{WIDTH}"' in page
    data = base64.b64decode(re.search(r"base64,([^\"]*)", page)[1])
    assert data.startswith(b"\x89PNG")


def test_a_plugin_draws_on_its_host():
    below, above = picture("maple")[0], picture("dept(maple)")[0]
    assert above.text == below.text and above.bridges == below.bridges
    assert above.heads and above.targets == below.targets
    losses = [target.loss for target in picture("tpt(coop)")[0].targets]
    assert losses == ["cross-entropy", "entropy"]
    assert [target.loss for target in picture("tpt")[0].targets] == ["entropy"]


def test_what_cannot_be_drawn():
    nowhere = replace(
        picture("coop")[0], bridges=(Bridge("x", "image out", "text tokens"),)
    )
    with pytest.raises(InputError, match="no place 'image out'"):
        towers(nowhere)
    with pytest.raises(InputError, match="no row 3"):
        towers(Picture(text_blocks={3: learned("x")}))
    with pytest.raises(InputError, match="no method|unknown method"):
        towers("nobody")


def test_a_method_without_a_picture():
    kept = dict(REGISTRY)
    try:
        register(type("Plain", (Method,), {"name": "plain"}))
        with pytest.raises(InputError, match="plain has no picture: set Plain.picture"):
            towers("plain")
    finally:
        REGISTRY.clear()
        REGISTRY.update(kept)


def test_looks_differ_in_fill_and_not_in_hue():
    fills = [LOOKS[state] for state in (FROZEN, LEARNED, MADE)]
    assert len({(look["facecolor"], look.get("hatch")) for look in fills}) == 3
    for look in LOOKS.values():
        for key in ("facecolor", "edgecolor"):
            assert len(set(to_rgb(look[key]))) == 1
