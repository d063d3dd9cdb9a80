"""MMA's own statements."""

import pytest
import torch

from promptkit.errors import InputError
from promptkit.export import export_program
from promptkit.method import Batch
from promptkit.methods.mma import MMA
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import fit

LOUD = {"scale": 0.5, "width": 8}


@pytest.fixture
def batch():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(images=images, labels=torch.tensor([0, 3, 1, 4]))


def adapter(method, side, level, h):
    """What the paper's formula makes of h, by the layers' own names."""
    own = dict(getattr(method, f"{side}_adapter")[str(level)].items())
    middle = method.image_middle if side == "image" else None
    middle = (middle or method.shared_adapter)[str(level)]
    return method.scale * own["up"](middle(own["down"](h).relu()).relu())


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_towers_are_the_papers(tiny_clip, batch, start, shared):
    """Against whole sequences through open_clip's own blocks."""
    method = build("mma", tiny_clip, NAMES, start=start, end=2, shared=shared, **LOUD)
    model, levels = tiny_clip.model, range(start, 3)

    def through(x, blocks, side, **mask):
        first = 3 - len(blocks)  # the text tower has one block more, its first
        for level, block in enumerate(blocks, start=first):
            adapted = level > 0 and level in levels
            y = adapter(method, side, level, block.ln_1(x)) if adapted else 0.0
            x = block(x, **mask) + y
        return x

    ids = tiny_clip.tokenize([f"a photo of a {name}." for name in method.classnames])
    n, eot = ids.shape[1], (ids == tiny_clip.tokenizer.eot_token_id).int().argmax(1)
    e = tiny_clip.embed(ids)
    e = e + adapter(method, "text", 0, e) if start == 0 else e
    mask = model.attn_mask[:n, :n]
    x = e + model.positional_embedding[:n]
    x = through(x, model.transformer.resblocks, "text", attn_mask=mask)
    x = model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection
    torch.testing.assert_close(method.text_features(), x, rtol=1e-4, atol=1e-4)

    visual = model.visual
    x = visual.conv1(batch.images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(4, 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding)
    x = x + adapter(method, "image", 0, x) if start == 0 else x
    x = through(x, visual.transformer.resblocks, "image")
    x = visual.ln_post(x[:, 0]) @ visual.proj
    ours = method.image_features(batch.images)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_gradients_are_divided_by_the_scale_above_level_0(tiny_clip, batch):
    """Those of the loss itself, from finite differences, times 1 / s."""
    method = build("mma", tiny_clip, NAMES, start=0, end=1, **LOUD).train()
    method.backward(batch)
    for level, factor in ((0, 1.0), (1, 1 / method.scale)):
        for layer in (
            method.text_adapter[str(level)]["up"],
            method.image_adapter[str(level)]["down"],
            method.shared_adapter[str(level)],
        ):
            bias, grad, losses = layer.bias, layer.bias.grad, []
            direction = grad / grad.norm()
            for sign in (1, -1):
                with torch.no_grad():
                    bias += sign * 3e-3 * direction
                    losses.append(method.loss(batch).item())
                    bias -= sign * 3e-3 * direction
            slope = (losses[0] - losses[1]) / 6e-3
            assert grad.norm().item() == pytest.approx(factor * slope, rel=0.1)


def test_almost_without_scale_it_is_clip_and_learns_all_the_same(tiny_clip, batch):
    method = build("mma", tiny_clip, NAMES, scale=1e-9)
    plain = build("clip", tiny_clip, NAMES)
    torch.testing.assert_close(method.logits(batch), plain.logits(batch))
    grads = {}
    for scale in (1e-3, 1e-4):  # the same adapters, close to CLIP both times
        method = build("mma", tiny_clip, NAMES, scale=scale, seed=1, start=1).train()
        method.backward(batch)
        grads[scale] = method.shared_adapter["1"].weight.grad
    torch.testing.assert_close(grads[1e-3], grads[1e-4], rtol=0.1, atol=1e-2)


def test_only_what_is_adapted_learns(tiny_clip):
    method = build("mma", tiny_clip, NAMES, start=2, end=2, width=4)
    D, r = 32, 4
    assert method.n_parameters == 2 * (2 * D * r + r + D) + r * r + r
    apart = build("mma", tiny_clip, NAMES, start=2, end=2, width=4, shared=False)
    assert apart.n_parameters == method.n_parameters + r * r + r
    for share, levels in ((None, "2"), (0.1, "2"), (1.0, "12")):
        upper = build("mma", tiny_clip, NAMES, share=share)
        assert set(upper.text_adapter) == set(upper.image_adapter) == set(levels)
    for parameter in method.parameters():
        if parameter.dim() == 1:
            assert not parameter.any()
    std = method.shared_adapter["2"].weight.std().item()
    assert 0.3 < std / (2 / r) ** 0.5 < 2


def test_it_trains_at_the_published_rate_and_exports(tiny_clip, batch):
    dataset = toy_dataset(tiny_clip)
    method = build("mma", tiny_clip, dataset.classnames)
    plan = Recipe(epochs=4, batch_size=20, lr=0.0015, warmup_epochs=0, augment=False)
    history = fit(method, dataset, plan, progress=False)
    assert history.losses[-1] < history.losses[0]
    ours = method.logits(batch)
    program = export_program(method).module()
    torch.testing.assert_close(program(batch.images), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 3}, "start must be from 0 to 2 blocks, got 3"),
        ({"start": -4}, "start must be from 0 to 2 blocks, got -4"),
        ({"start": 1, "share": 0.5}, "share must be left out beside start"),
        ({"share": 0.0}, "share must be above 0"),
        ({"start": 2, "end": 1}, "end must be from start to 2 blocks"),
        ({"width": 0}, "width must be at least 1"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"template": "a photo"}, "template must be one sentence"),
    ],
)
def test_bad_options(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("mma", tiny_clip, NAMES, **options)


def test_official_options(tiny_clip):
    options = {"adapter_start": 1, "adapter_end": 2, "adapter_dim": 5}
    options |= {"adapter_scale": 0.1, "text_ctx": "a photo of a"}
    method = MMA.from_official(tiny_clip, NAMES, options)
    assert method.template == "a photo of a {}." and method.scale == 0.1
    assert set(method.text_adapter) == {"1", "2"}
    bare = MMA.from_official(tiny_clip, NAMES, {"text_ctx": ""})
    assert bare.template == "{}."
    glued = build("mma", tiny_clip, NAMES, template="pre-{}, post")
    plain = build("clip", tiny_clip, NAMES, template="pre-{}, post")
    torch.testing.assert_close(
        torch.nn.functional.normalize(glued.text_features(), dim=-1),
        plain.text_features(),
        atol=1e-2,
        rtol=0,
    )


def test_recipes():
    base = recipe("mma", Setting("base-to-new", "imagenet", 16, "full"))
    assert (base.batch_size, base.epochs, base.warmup_epochs) == (128, 5, 0)
    far = recipe("mma", Setting("cross-dataset", "imagenet", 16, "full"))
    assert far.hparams == {"share": 1 / 3} and far.epochs == 1
