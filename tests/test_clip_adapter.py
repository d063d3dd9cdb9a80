"""CLIP-Adapter's own statements."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.errors import InputError
from promptkit.export import Deployed, export_program
from promptkit.method import Batch
from promptkit.methods.clip_adapter import CLIPAdapter
from promptkit.recipe import Setting
from promptkit.registry import build, recipe
from promptkit.testing import NAMES, toy_dataset


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_blend_is_the_papers(tiny_clip, images):
    method = build(
        "clip_adapter", tiny_clip, NAMES, ratio=0.3, text_ratio=0.6, adapter="both"
    )
    text = tiny_clip.encode_text(
        [f"a photo of a {name}." for name in method.classnames]
    )
    image, state = tiny_clip.encode_image(images), method.state_dict()

    def blend(x, side, share):
        down, up = (state[f"{side}_adapter.{part}.weight"] for part in ("down", "up"))
        return share * ((x @ down.T).relu() @ up.T).relu() + (1 - share) * x

    f = F.normalize(blend(image, "image", 0.3), dim=-1)
    w = F.normalize(blend(text, "text", 0.6), dim=-1)
    expected = tiny_clip.logit_scale * f @ w.T
    torch.testing.assert_close(method.logits(images), expected, rtol=1e-4, atol=1e-4)
    signed = build("clip_adapter", tiny_clip, NAMES, last_relu=False).image_adapter
    assert (method.image_adapter(image) >= 0).all() and (signed(image) < 0).any()


def test_without_a_share_it_is_zero_shot(tiny_clip, images):
    plain = build("clip", tiny_clip, NAMES)
    for options in ({"ratio": 0.0}, {"text_ratio": 0.0, "adapter": "text"}):
        method = build("clip_adapter", tiny_clip, NAMES, **options)
        torch.testing.assert_close(method.logits(images), plain.logits(images))
    templates = ["a photo of a {}.", "a sketch of {}."]
    both = [
        build(m, tiny_clip, NAMES, template=templates) for m in ("clip", "clip_adapter")
    ]
    text = [F.normalize(method.text_features(), dim=-1) for method in both]
    torch.testing.assert_close(*text)


def test_a_side_has_an_adapter_or_not(tiny_clip):
    for side, names in (
        ("image", {"image"}),
        ("text", {"text"}),
        ("both", {"image", "text"}),
    ):
        method = build("clip_adapter", tiny_clip, NAMES, adapter=side, reduction=3)
        shapes = {n: tuple(p.shape) for n, p in method.named_parameters()}
        expected = {f"{n}_adapter.down.weight": (8, 24) for n in names}
        assert shapes == expected | {f"{n}_adapter.up.weight": (24, 8) for n in names}


def test_it_takes_the_datasets_template_and_exports(tiny_clip, images):
    dataset = replace(toy_dataset(tiny_clip), template="a drawing of {}.")
    method = build("clip_adapter", tiny_clip, dataset.classnames)
    before = method.logits(images)
    method.aim(dataset)
    assert not torch.allclose(method.logits(images), before)
    program = export_program(method).module()
    torch.testing.assert_close(
        program(images), method.logits(images), rtol=0, atol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(
            Deployed(method)(images), method(Batch(images=images))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio must be from 0 to 1, got 1.5"),
        ({"text_ratio": -0.1}, "text_ratio must be from 0 to 1"),
        ({"reduction": 25}, "reduction must be from 1 to 24"),
        ({"template": "no hole"}, "template must be one sentence or more"),
        ({"adapter": "audio"}, "adapter must be one of 'image', 'text', 'both'"),
    ],
)
def test_bad_options(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("clip_adapter", tiny_clip, NAMES, **options)


def test_official_options(tiny_clip):
    options = {"ratio": 0.6, "reduction": 2, "dataset": "DescribableTextures"}
    method = CLIPAdapter.from_official(tiny_clip, NAMES, options)
    assert method.option("template") == "{} texture." and method.ratio == 0.6
    assert method.image_adapter.down.weight.shape == (12, 24)
    with pytest.raises(InputError, match="feature_dim is 1024.*have 24 channels"):
        CLIPAdapter.from_official(tiny_clip, NAMES, {"feature_dim": 1024})


def test_recipes():
    few = recipe("clip_adapter", Setting("few-shot", "dtd", 16, "full"))
    assert (few.optimizer, few.lr, few.epochs) == ("sgd", 1e-5, 200)
    base = recipe("clip_adapter", Setting("base-to-new", "dtd", 16, "full"))
    assert (base.optimizer, base.lr, base.epochs) == ("adadelta", 0.25, 50)
