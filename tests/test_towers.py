"""The towers compute what open_clip's plain full-length pass computes, with less
work.
"""

import copy
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from promptkit.prompts import Context, assemble
from promptkit.towers import Edit, Edits, Prompt, Replace, plain_text

NAMES = [
    "dog",
    "golden retriever",
    "St.",
    "a class whose name takes quite a few more tokens",
    "x",
]
EXACT = dict(rtol=1e-5, atol=2e-5)


def plain(clip, prompt, edit=None):
    """(G, C, E) through all 77 positions; `edit(layer, x)` sees (N, 77, D) at the input
    of each block.
    """
    model, (G, P, _) = clip.model, prompt.prefix.shape
    x = prompt.full().flatten(0, 1)  # (GC, P+T, D)
    eot = prompt.eot.repeat(G) + P
    if edit is None:
        return plain_text(model, x, eot).view(G, len(prompt.eot), -1)
    x = F.pad(x, (0, 0, 0, 77 - x.shape[1])) + model.positional_embedding
    for layer, block in enumerate(model.transformer.resblocks):
        x = block(edit(layer, x), attn_mask=model.attn_mask)
    x = model.ln_final(x)[torch.arange(len(x)), eot] @ model.text_projection
    return x.view(G, len(prompt.eot), -1)


def check(ours, oracle, *learned, theirs=None):
    """Features agree, and so do the gradients of a random function of them; `theirs`
    are the oracle's own parameters.
    """
    assert_close(ours, oracle, **EXACT)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    a = torch.autograd.grad(ours, learned, weights)
    b = torch.autograd.grad(oracle, theirs or learned, weights)
    for x, y in zip(a, b, strict=True):
        assert y.abs().max() > 1e-3
        assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())


def random(*shape, seed=0, scale=0.3):
    return (
        scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    ).requires_grad_()


@pytest.fixture(params=["packed", "bucketed", "recomputed"])
def mode(request, tiny_clip, monkeypatch):
    """The three ways in which classes run: all in one pass, by length, and in chunks
    with recomputation.
    """
    tower = tiny_clip.text_tower
    if request.param == "bucketed":
        make = tower._make_plan
        monkeypatch.setattr(tower, "_make_plan", lambda *args: make(*args[:-1], False))
        monkeypatch.setattr("promptkit.towers._BUCKET", 1.0)
    if request.param == "recomputed":
        monkeypatch.setattr(tower, "budget", 100_000)
    tower._plans.clear()
    yield request.param
    tower._plans.clear()


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("class_specific", [False, True])
def test_context_is_exact(tiny_clip, mode, position, class_specific):
    context = Context(
        tiny_clip, NAMES, 5, position=position, class_specific=class_specific, std=0.3
    )
    prompt = context.prompt()
    plan = tiny_clip.text_tower._plan(
        prompt.eot, 1, prompt.prefix.shape[1], 0, True, True
    )
    assert (plan.packing is not None) == (mode == "packed")
    assert plan.recompute == (mode == "recomputed")
    check(tiny_clip.text(prompt), plain(tiny_clip, context.prompt()), context.vectors)


@pytest.mark.parametrize(
    "shape", [(4, 1, 3, 32), (4, 5, 3, 32)], ids=["by image", "by image and class"]
)
@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_groups_are_exact(tiny_clip, mode, position, shape):
    context = Context(tiny_clip, NAMES, 3, position=position)
    vectors = random(*shape)
    ours = tiny_clip.text(context.prompt(vectors))
    assert ours.shape == (4, 5, 24)
    check(ours, plain(tiny_clip, context.prompt(vectors)), vectors)


@pytest.mark.parametrize("kind", ["(n, D)", "(G, 1, n, D)"])
@pytest.mark.parametrize("position", ["end", "middle"])
def test_deep_text_prompts_are_exact(tiny_clip, mode, kind, position):
    """Blocks 1 and 2 replace positions 1..4, which straddle the name when it is in the
    middle.
    """
    G = 3 if kind.startswith("(G") else 1
    vectors, deep = (
        random(G, 1, 4, 32),
        [random(*((G, 1) if G > 1 else ()), 4, 32, seed=i) for i in (1, 2)],
    )
    context = Context(tiny_clip, NAMES, 4, position=position)
    edit = Replace({1: (1, deep[0]), 2: (1, deep[1])})

    def replace(layer, x):
        if layer == 0:
            return x
        tokens = (
            deep[layer - 1]
            .reshape(-1, 1, 4, 32)
            .expand(G, len(NAMES), -1, -1)
            .flatten(0, 1)
        )
        return torch.cat([x[:, :1], tokens, x[:, 5:]], dim=1)

    # What the first block makes of the vectors is read by later positions, so their
    # gradient is not zero.
    check(
        tiny_clip.text(context.prompt(vectors), edit),
        plain(tiny_clip, context.prompt(vectors), replace),
        vectors,
        *deep,
    )


@pytest.mark.parametrize(
    "shape", [(5, 2, 32), (3, 5, 2, 32)], ids=["by class", "by group and class"]
)
def test_deep_prompts_of_each_class_are_exact(tiny_clip, mode, shape):
    """Class-aware prompts: the shared prefix ends, at block 1, where the classes' own
    tokens begin.
    """
    G = shape[0] if len(shape) == 4 else 1
    vectors, deep = random(G, 1, 4, 32), random(*shape, seed=1)
    context = Context(tiny_clip, NAMES, 4)

    def replace(layer, x):
        if layer != 1:
            return x
        tokens = deep.reshape(-1, 5, 2, 32).expand(G, -1, -1, -1).flatten(0, 1)
        return torch.cat([x[:, :2], tokens, x[:, 4:]], dim=1)

    ours = tiny_clip.text(context.prompt(vectors), Replace({1: (2, deep)}))
    check(ours, plain(tiny_clip, context.prompt(vectors), replace), vectors, deep)


class Adapter(Edit):
    """Adds a low-rank function of the block's input to its output, and scales the
    branches.
    """

    def __init__(self, down, up, scale):
        self.down, self.up, self.scale = down, up, scale

    def after(self, layer, x_in, x_out, span):
        return x_out + torch.relu(x_in @ self.down) @ self.up if layer else x_out

    def branch(self, layer, part, h, span):
        return h * self.scale if part == "mlp" else h - h * self.scale


def adapted(blocks, x, adapter, mask=None):
    """The blocks of open_clip with `Adapter` written out."""
    for layer, block in enumerate(blocks):
        h = block.attention(block.ln_1(x), attn_mask=mask)
        y = x + h - h * adapter.scale
        y = y + block.mlp(block.ln_2(y)) * adapter.scale
        x = y + torch.relu(x @ adapter.down) @ adapter.up if layer else y
    return x


def test_text_adapters_are_exact(tiny_clip, mode):
    adapter = Adapter(random(32, 4), random(4, 32, seed=1), random(32, seed=2))
    model, prompt = tiny_clip.model, assemble(tiny_clip, NAMES, ["a photo of a {}."])
    x = prompt.full()[0]
    x = F.pad(x, (0, 0, 0, 77 - x.shape[1])) + model.positional_embedding
    x = adapted(model.transformer.resblocks, x, adapter, model.attn_mask)
    oracle = (
        model.ln_final(x)[torch.arange(5), prompt.eot + prompt.prefix.shape[1]]
        @ model.text_projection
    )
    check(
        tiny_clip.text(prompt, adapter)[0],
        oracle,
        adapter.down,
        adapter.up,
        adapter.scale,
    )


class Norms(Edit):
    """Layer norms of its own, by name such as ln_1 of block 0 or ln_post of none."""

    def __init__(self, own):
        self.own = own

    def norm(self, layer, which, weight, bias):
        return self.own.get((layer, which), (weight, bias))


def replaced(clip, names):
    """An edit with random layer norms, its parameters, and a copy of the model with
    layer norms of these values in their place, whose parameters follow in order.
    """
    model = copy.deepcopy(clip.model)
    own, theirs = {}, []
    for n, (layer, which, path) in enumerate(names):
        module = model.get_submodule(path)
        own[layer, which] = (
            (1 + random(32, seed=2 * n)).detach().requires_grad_(),
            random(32, seed=2 * n + 1),
        )
        values = [x.detach().clone() for x in own[layer, which]]
        module.weight, module.bias = map(torch.nn.Parameter, values)
        theirs += [module.weight, module.bias]
    return Norms(own), [x for pair in own.values() for x in pair], model, theirs


def test_text_norms_are_exact(tiny_clip, mode):
    block = "transformer.resblocks"
    names = [(i, ln, f"{block}.{i}.{ln}") for i in range(3) for ln in ("ln_1", "ln_2")]
    edit, learned, model, theirs = replaced(
        tiny_clip, [*names, (None, "ln_final", "ln_final")]
    )
    prompt = assemble(tiny_clip, NAMES, ["a photo of a {}."])
    eot = prompt.eot + prompt.prefix.shape[1]
    ours = tiny_clip.text(prompt, Edits(Replace({}), edit))[0]
    oracle = plain_text(model, prompt.full()[0], eot)
    check(ours, oracle, *learned, theirs=theirs)
    with torch.no_grad():
        assert_close(tiny_clip.text(prompt, edit)[0], ours, **EXACT)
    assert not torch.allclose(tiny_clip.text(prompt)[0], ours, atol=1e-2)


def test_edits_apply_in_order(tiny_clip):
    context, deep = Context(tiny_clip, NAMES, 2), random(2, 32)
    a, b = Replace({1: (1, deep)}), Replace({1: (1, 2 * deep), 2: (1, deep)})
    both = tiny_clip.text(context.prompt(), Edits(a, None, b))
    assert_close(both, tiny_clip.text(context.prompt(), b))
    assert not torch.allclose(both, tiny_clip.text(context.prompt(), a))
    assert Edits(Adapter(*[deep] * 3)).all_rows and not Edits(a).all_rows
    assert Edits(a, Replace({1: (2, random(5, 1, 32))})).shared(1, 3) == 2


@pytest.mark.parametrize("groups", [1, 3])
def test_text_tokens(tiny_clip, mode, groups):
    """All positions up to EOT, through the final layer norm and projection, and zeros
    after.
    """
    prompt = Context(tiny_clip, NAMES, 3).prompt(random(groups, 1, 3, 32))
    features, tokens = tiny_clip.text(prompt, tokens=True)
    assert_close(features, tiny_clip.text(prompt), **EXACT)
    model, P = tiny_clip.model, prompt.prefix.shape[1]
    x = (
        F.pad(prompt.full().flatten(0, 1), (0, 0, 0, 77 - P - prompt.suffix.shape[1]))
        + model.positional_embedding
    )
    x = (
        model.ln_final(model.transformer(x, attn_mask=model.attn_mask))
        @ model.text_projection
    )
    x = x.view(groups, 5, 77, -1)
    assert tokens.shape == (groups, 5, P + prompt.suffix.shape[1], 24)
    for c, eot in enumerate((prompt.eot + P).tolist()):
        assert_close(tokens[:, c, : eot + 1], x[:, c, : eot + 1], **EXACT)
        assert not tokens[:, c, eot + 1 :].any()
        assert_close(tokens[:, c, eot], features[:, c], **EXACT)


def test_plans_belong_to_their_prompts(tiny_clip):
    """A plan is found by the identity of the positions of EOT: in a copied tower that
    identity may be another tensor's, and a tensor may change in place.
    """
    tower, prompt = tiny_clip.text_tower, Context(tiny_clip, NAMES, 3).prompt()
    tower._plans.clear()
    before = tiny_clip.text(prompt)
    for key, (eot, _) in tower._plans.items():
        tower._plans[key] = eot.clone(), "of another prompt"
    assert torch.equal(tiny_clip.text(prompt), before)
    short = assemble(tiny_clip, ["dog", "cat"], ["a photo of a very large {}."])
    assert_close(tiny_clip.text(short), plain(tiny_clip, short), **EXACT)
    short.eot[0] -= 1  # the full stop before EOT
    assert_close(tiny_clip.text(short), plain(tiny_clip, short), **EXACT)


def test_inference_mode(tiny_clip):
    """Tensors of it have no version; the same values as without."""
    context = Context(tiny_clip, NAMES, 3)
    before = tiny_clip.text(context.prompt())
    with torch.inference_mode():
        context.set_classes(NAMES[::-1])
        assert_close(tiny_clip.text(context.prompt()).flip(1), before, **EXACT)


def test_plain_operations_where_nothing_learns(tiny_clip, monkeypatch):
    """No function of our own is on the way, so that the towers can be traced."""
    import promptkit.frozen as frozen

    context, images = Context(tiny_clip, NAMES, 3), torch.randn(2, 3, 32, 32)
    text, image = tiny_clip.text(context.prompt()), tiny_clip.image(images)
    learned = Context(tiny_clip, NAMES, 3, class_specific=True).prompt()
    for name in ("_Linear", "_MLP", "_PackedAttention", "_PrefixAttention"):
        monkeypatch.delattr(frozen, name)
    with torch.no_grad():
        assert torch.equal(tiny_clip.text(context.prompt()), text)
        assert torch.equal(tiny_clip.image(images), image)
        assert_close(tiny_clip.text(context.prompt(), Edit()), text, **EXACT)
        assert_close(tiny_clip.text(learned, Edit()), tiny_clip.text(learned), **EXACT)


def test_no_graph_where_nothing_learns(tiny_clip):
    prompt = assemble(tiny_clip, NAMES, ["a photo of a {}."])
    assert not tiny_clip.text(prompt).requires_grad
    assert not tiny_clip.image(torch.zeros(2, 3, 32, 32)).requires_grad
    assert not tiny_clip.text(prompt, Edit()).requires_grad
    context = Context(tiny_clip, NAMES)
    assert tiny_clip.text(context.prompt()).requires_grad
    with torch.no_grad():
        assert not tiny_clip.text(context.prompt()).requires_grad
    tiny_clip.text(context.prompt()).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in tiny_clip.parameters())


def test_shared_prefix_is_computed_once(tiny_clip, monkeypatch):
    """The rows that reach the MLPs are those of the prefix once and of the names, not
    77 a class.
    """
    import promptkit.towers as towers

    rows = []
    monkeypatch.setattr(
        towers, "mlp", lambda x, *args: rows.append(x[..., 0].numel()) or 0 * x
    )
    prompt = Context(tiny_clip, ["dog", "cat", "owl"], 16).prompt()
    tiny_clip.text(prompt)
    assert rows == [
        17 + 3 * 3,
        17 + 3 * 3,
        3,
    ]  # name, ".", EOT; in the last block EOT alone


def test_exact_gelu_and_layer_scale(make_clip):
    clip = make_clip(quick_gelu=False)
    for block in clip.model.transformer.resblocks:
        block.ls_1 = torch.nn.Identity()
        block.ls_2 = torch.nn.Linear(32, 32, bias=False).requires_grad_(False)
    context = Context(clip, NAMES, 3)
    check(clip.text(context.prompt()), plain(clip, context.prompt()), context.vectors)
    images = torch.randn(2, 3, 32, 32)
    assert_close(clip.image(images), clip.model.encode_image(images), **EXACT)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.03), ("fp16", 0.004)])
def test_half_precision(make_clip, precision, tolerance):
    """Within a few units of the last place of the cosine, and gradients keep their
    direction.
    """
    half, full = make_clip(precision=precision), make_clip()
    images = torch.randn(3, 3, 32, 32)
    weights = torch.randn(1, 5, 24)
    grads = []
    for clip in (half, full):
        vectors = random(4, 32)
        text = clip.text(Context(clip, NAMES, 4).prompt(vectors))
        grads.append(torch.autograd.grad(text, vectors, weights)[0])
        assert (
            text.dtype == grads[-1].dtype == clip.image(images).dtype == torch.float32
        )
    text = [
        clip.text(Context(clip, NAMES, 4).prompt(random(4, 32)))
        for clip in (half, full)
    ]
    assert (1 - F.cosine_similarity(*text, dim=-1)).max() < tolerance
    assert (
        1 - F.cosine_similarity(half.image(images), full.image(images), dim=-1)
    ).max() < tolerance
    assert F.cosine_similarity(*[g.flatten() for g in grads], dim=0) > 1 - 5 * tolerance


# The image tower


def plain_images(clip, images, prompt=None, edit=None):
    """All tokens of the last block, (B, 1+N+n, Dv)."""
    v = clip.model.visual
    x = v.conv1(images).flatten(2).transpose(1, 2)
    x = (
        torch.cat([v.class_embedding.expand(len(x), 1, -1), x], dim=1)
        + v.positional_embedding
    )
    if prompt is not None:
        x = torch.cat([x, prompt.expand(len(x), -1, -1)], dim=1)
    x = v.ln_pre(x)
    for layer, block in enumerate(v.transformer.resblocks):
        x = block(edit(layer, x) if edit else x)
    return x


@pytest.fixture(params=["whole", "recomputed"])
def image_mode(request, tiny_clip, monkeypatch):
    if request.param == "recomputed":
        monkeypatch.setattr(tiny_clip.image_tower, "budget", 200_000)


@pytest.mark.parametrize("by_image", [False, True])
def test_image_prompts_are_exact(tiny_clip, image_mode, by_image):
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompt, deep = (
        random(*((7,) if by_image else ()), 3, 32),
        random(*((7,) if by_image else ()), 3, 32, seed=1),
    )
    features, tokens = tiny_clip.image(
        images, prompt, Replace({1: (17, deep)}), tokens=True
    )
    assert features.shape == (7, 24) and tokens.shape == (7, 16, 24)

    def replace(layer, x):
        return (
            torch.cat([x[:, :17], deep.expand(7, -1, -1)], dim=1) if layer == 1 else x
        )

    v = tiny_clip.model.visual
    oracle = v.ln_post(plain_images(tiny_clip, images, prompt, replace)) @ v.proj
    check(torch.cat([features[:, None], tokens], dim=1), oracle[:, :17], prompt, deep)
    alone = tiny_clip.image(images, prompt, Replace({1: (17, deep)}))
    check(
        alone,
        v.ln_post(plain_images(tiny_clip, images, prompt, replace)[:, 0]) @ v.proj,
        prompt,
        deep,
    )


def test_image_adapters_are_exact(tiny_clip, image_mode):
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    adapter, v = (
        Adapter(random(32, 4), random(4, 32, seed=1), random(32, seed=2)),
        tiny_clip.model.visual,
    )
    x = torch.cat(
        [
            v.class_embedding.expand(7, 1, -1),
            v.conv1(images).flatten(2).transpose(1, 2),
        ],
        dim=1,
    )
    x = adapted(v.transformer.resblocks, v.ln_pre(x + v.positional_embedding), adapter)
    oracle = v.ln_post(x[:, 0]) @ v.proj
    check(
        tiny_clip.image(images, edit=adapter),
        oracle,
        adapter.down,
        adapter.up,
        adapter.scale,
    )


def test_image_norms_are_exact(tiny_clip, image_mode):
    block = "visual.transformer.resblocks"
    names = [(i, ln, f"{block}.{i}.{ln}") for i in range(2) for ln in ("ln_1", "ln_2")]
    names += [(None, ln, f"visual.{ln}") for ln in ("ln_pre", "ln_post")]
    edit, learned, model, theirs = replaced(tiny_clip, names)
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = tiny_clip.image(images, edit=edit)
    check(ours, model.encode_image(images), *learned, theirs=theirs)
    doubled = Norms({key: (2 * w, 2 * b) for key, (w, b) in edit.own.items()})
    assert_close(tiny_clip.image(images, edit=Edits(doubled, edit)), ours, **EXACT)


def test_models_without_a_norm_before_the_blocks(make_clip):
    clip = make_clip()
    clip.model.visual.ln_pre = torch.nn.Identity()
    images = torch.randn(2, 3, 32, 32)
    assert_close(clip.image(images), clip.model.encode_image(images), **EXACT)


def test_class_attention(tiny_clip):
    images, v = torch.randn(2, 3, 32, 32), tiny_clip.model.visual
    features, tokens, attention = tiny_clip.image(images, tokens=True, attention=True)
    first, last = v.transformer.resblocks
    x = last.ln_1(first(v._embeds(images)))
    _, weights = last.attn(x, x, x, need_weights=True)  # averaged over heads
    assert_close(attention, weights[:, 0, 1:], **EXACT)
    assert_close(features, tiny_clip.image(images), **EXACT)


def test_encode_image_in_chunks(tiny_clip, monkeypatch):
    images = torch.randn(9, 3, 32, 32)
    whole = tiny_clip.encode_image(images)
    assert_close(whole, tiny_clip.model.encode_image(images), **EXACT)
    monkeypatch.setattr(tiny_clip.image_tower, "budget", 1)
    assert_close(tiny_clip.encode_image(images), whole, **EXACT)
    assert tiny_clip.encode_image(images[:0]).shape == (0, 24)


def test_many_classes_stay_within_the_budget():
    """Forward and backward of 1,500 classes, whose activations are eight times the
    budget.
    """
    code = """
        import resource, open_clip, torch
        from promptkit.clip import FrozenCLIP
        from promptkit.towers import Prompt
        vision = dict(layers=1, width=32, head_width=16, patch_size=8, image_size=32)
        text = dict(width=128, heads=2, layers=12)
        model = open_clip.CLIP(24, vision, text, quick_gelu=True)
        clip = FrozenCLIP(model, budget=64 * 2**20)
        prefix = torch.randn(1, 17, 128, requires_grad=True)
        prompt = Prompt(prefix, torch.randn(1500, 10, 128), torch.arange(1500) % 10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        clip.text(prompt).square().sum().backward()
        assert prefix.grad.abs().max() > 0
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    env = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", textwrap.dedent(code)]
    out = subprocess.run(
        command, env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    kept = 1500 * 5.5 * 12 * 10 * 128 * 4  # bytes, if every activation were kept
    grown = int(out.split()[-1]) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 0.3 * kept


def test_prompt_full(tiny_clip):
    prompt = Prompt(torch.zeros(2, 3, 32), torch.ones(5, 4, 32), torch.full((5,), 3))
    assert prompt.full().shape == (2, 5, 7, 32)
    assert prompt.full().sum() == 2 * 5 * 4 * 32
