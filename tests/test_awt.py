"""AWT: its weights, transport and adapters, against independent computations."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog, minimize

from promptkit.adapters import Adapter
from promptkit.data import transform
from promptkit.errors import InputError
from promptkit.export import Deployed
from promptkit.method import REGISTRY, Batch, register
from promptkit.methods.awt import AWT
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, load_method, recipe
from promptkit.sets import entropy, entropy_with
from promptkit.testing import NAMES, PROMISES, toy_dataset
from promptkit.train import fit
from promptkit.transport import sinkhorn

SAID = {name: [f"{name} fact {i}." for i in range(5)] for name in NAMES}


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch, tiny_clip):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    build("clip", tiny_clip, NAMES)  # all others are registered by now
    kept = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(kept)


@pytest.fixture
def dataset(tiny_clip):
    return replace(toy_dataset(tiny_clip), descriptions=SAID)


def made(clip, **options):
    return build("awt", clip, NAMES, **{"views": 5, "descriptions": SAID} | options)


def drawn(*shape, seed=0, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_sets(B=2, C=3, V=6, D=4):
    cost = 1 - 0.5 * drawn(B, C, V, D).clamp(-2, 2)
    a, b = drawn(B, V, seed=1).log_softmax(1), drawn(B, C, D, seed=2).log_softmax(2)
    return cost, a, b


# --- transport against other solvers --------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_sinkhorn_against_the_dual_by_lbfgs(epsilon):
    """The entropic plan maximises its concave dual, whatever finds the maximum."""
    cost, log_a, log_b = random_sets()
    cost, log_a, log_b = cost.double(), log_a.double(), log_b.double()
    plan = sinkhorn(cost, log_a, log_b, epsilon, iterations=4000, threshold=0.0)[0]
    torch.testing.assert_close(plan.sum(3), log_a[:, None].exp().expand(-1, 3, -1))
    V, D = cost.shape[2:]
    for i in range(len(cost)):
        a = log_a[i].exp()
        for c in range(cost.shape[1]):
            K, b = (-cost[i, c] / epsilon).exp(), log_b[i, c].exp()

            def dual(x, K=K, a=a, b=b):
                x = torch.tensor(x, requires_grad=True)
                f, g = x[:V], x[V:]
                total = (f.exp()[:, None] * K * g.exp()).sum()
                value = total - f @ a - g @ b
                value.backward()
                return value.item(), x.grad.numpy()

            start = torch.zeros(V + D).double().numpy()
            best = minimize(
                dual, start, jac=True, method="L-BFGS-B",
                options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10},
            ).x  # fmt: skip
            x = torch.from_numpy(best)
            expected = x[:V].exp()[:, None] * K * x[V:].exp()
            torch.testing.assert_close(plan[i, c], expected, rtol=1e-4, atol=1e-7)


def test_a_sharp_sinkhorn_is_the_linear_programme():
    """As epsilon falls the cost of the plan falls to the optimal one; costs that would
    underflow as kernels do not.
    """
    cost, log_a, log_b = (x.double() for x in random_sets(B=1, C=1))
    V, D = cost.shape[2:]
    rows = torch.zeros(V + D, V, D)
    for v in range(V):
        rows[v, v] = 1
    for d in range(D):
        rows[V + d, :, d] = 1
    both = torch.cat([log_a[0].exp(), log_b[0, 0].exp()])
    exact = linprog(
        cost.flatten().numpy(), A_eq=rows.flatten(1).numpy(), b_eq=both.numpy()
    ).fun
    found = []
    for epsilon in (0.3, 0.03, 0.002):
        plan = sinkhorn(cost, log_a, log_b, epsilon, 4000, 0.0)[0]
        found.append((plan * cost).sum().item())
    assert found[0] > found[1] > found[2] > exact - 1e-6
    assert found[2] == pytest.approx(exact, abs=2e-3)
    far = sinkhorn(cost.float() + 1000, log_a.float(), log_b.float(), 0.1)[0]
    assert far.isfinite().all() and far.sum().item() == pytest.approx(1, abs=1e-3)


def test_sinkhorn_is_the_published_loop_image_by_image():
    """Without logarithms, each image until its own scalings rest; together, until all
    do on average.
    """
    cost, log_a, log_b = (x.double() for x in random_sets(B=3))
    cost[1] *= 3  # takes longer
    plan, steps, changes = sinkhorn(cost, log_a, log_b, 0.1)
    assert len(set(steps.tolist())) > 1
    for i in range(3):
        K, a, b = (-cost[i] / 0.1).exp(), log_a[i].exp(), log_b[i].exp()
        r, q = torch.ones(3, 6).double(), torch.ones(3, 4).double()
        for n in range(100):
            before = r
            r = a / (K @ q[..., None])[..., 0]
            q = b / (K.mT @ r[..., None])[..., 0]
            change = (r - before).abs().mean()
            torch.testing.assert_close(changes[i, n], change, rtol=1e-3, atol=1e-5)
            if change < 1e-2:
                break
        assert steps[i] == n + 1 and not changes[i, n + 1 :].any()
        expected = r[..., None] * K * q[:, None]
        torch.testing.assert_close(plan[i], expected, rtol=1e-3, atol=1e-7)
        alone = sinkhorn(cost[i : i + 1], log_a[i : i + 1], log_b[i : i + 1], 0.1)[0]
        torch.testing.assert_close(alone[0], plan[i])
    torch.testing.assert_close(plan.sum(2), log_b.exp())
    whole = sinkhorn(cost, log_a, log_b, 0.1, together=True)[1]
    assert len(set(whole.tolist())) == 1
    assert steps.min() <= whole[0] <= steps.max()


@pytest.mark.parametrize("size", [1.0, 40.0, 300.0])
def test_the_entropy_after_one_class_is_replaced(size):
    base, own = size * drawn(2, 4), size * drawn(2, 4, 3, seed=1)
    found = entropy_with(base, own)
    for b in range(2):
        for c in range(4):
            for d in range(3):
                logits = base[b].double().clone()
                logits[c] = own[b, c, d]
                expected = entropy(logits, 0).float()
                assert found[b, c, d].item() == pytest.approx(
                    expected.item(), rel=1e-3, abs=1e-5
                )
    assert torch.equal(entropy_with(base[:, :1], own[:, :1]), torch.zeros(2, 1, 3))


# --- the method -----------------------------------------------------------------------


def test_one_view_and_one_sentence_are_clip(tiny_clip, dataset):
    images = transform(tiny_clip, dataset.train.images())
    method = made(tiny_clip, views=1, sentences=0)
    clip = build("clip", tiny_clip, NAMES, template="a photo of a {}.")
    torch.testing.assert_close(
        method.logits(images), clip.logits(images), rtol=1e-3, atol=1e-2
    )


def test_without_weights_and_transport_it_is_the_mean(tiny_clip, dataset):
    method = made(tiny_clip, weighting=False, transport=False)
    pixels = dataset.train.images()[:3]
    views = method.eval().views(pixels, torch.Generator().manual_seed(3))
    assert views.shape == (3, 5, 3, 32, 32)
    torch.testing.assert_close(views[:, 0], transform(tiny_clip, pixels))
    f = F.normalize(tiny_clip.encode_image(views.flatten(0, 1)), dim=-1).view(3, 5, -1)
    texts = []
    for key, name in zip(NAMES, method.classnames, strict=True):
        start = f"a photo of a {name}."
        texts += [start, *(f"{start} {key} fact {i}." for i in range(5))]
    w = F.normalize(tiny_clip.encode_text(texts), dim=-1).view(5, 6, -1)
    expected = 100 * torch.einsum("bve,cde->bc", f, w) / 30
    batch = Batch(views=views)
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-3, atol=1e-3)
    weighted = made(tiny_clip, transport=False)
    moved = made(tiny_clip)
    scores = [m.logits(batch) for m in (method, weighted, moved)]
    assert not torch.allclose(scores[0], scores[1])
    assert (scores[2] - scores[1]).mean() > 0  # transport finds the nearer pairs


def test_sentences_follow_the_dataset(tiny_clip, dataset, tmp_path):
    method = build("awt", tiny_clip, NAMES, views=3)
    assert [len(own) for own in method.texts] == [1] * 5
    few = replace(dataset, descriptions=SAID | {NAMES[2]: ["only one."]})
    method.aim(few)
    assert [len(own) for own in method.texts] == [2] * 5
    assert method.texts[0] == [
        "a photo of a red square, a toy.",
        "a photo of a red square, a toy. red square fact 0.",
    ]
    loaded = load_method(method.save(tmp_path / "awt.safetensors"), tiny_clip)
    assert loaded.texts == method.texts
    method.aim(replace(few, name="food101"))
    assert method.texts[4][0] == "a photo of a pug from Food101."
    method.aim(replace(dataset, descriptions={NAMES[0]: ["alone"]}))
    with pytest.raises(InputError, match="no sentences about 'green circle'"):
        method.text_features()


def test_the_views_of_the_two_forms(tiny_clip, dataset):
    pixels = dataset.train.images()[:2]
    for adapters in (False, True):
        method = made(tiny_clip, adapters=adapters, train_views=3)
        views = [
            method.eval().views(pixels, torch.Generator().manual_seed(n))
            for n in (0, 0, 1)
        ]
        assert torch.equal(views[0], views[1])
        assert torch.equal(views[0][:, 0], views[2][:, 0])
        assert not torch.equal(views[0][:, 1], views[2][:, 1])
    views = method.train().views(pixels, torch.Generator().manual_seed(0))
    assert views.shape[1] == 3
    assert not torch.equal(views[:, 0], transform(tiny_clip, pixels))


def test_adapters_start_as_nothing_and_learn(tiny_clip, dataset):
    batch = Batch(views=drawn(2, 4, 3, 32, 32))
    plain, method = made(tiny_clip), made(tiny_clip, adapters=True, rate=8)
    torch.testing.assert_close(
        method.logits(batch), plain.logits(batch), rtol=1e-3, atol=1e-3
    )
    image, text = method.eval().features(batch)
    assert max(map(float, method.distances(batch, image, text))) < 1e-6
    for tower, blocks in (("image", 2), ("text", 3)):
        mine = method.adapters[tower].modules()
        downs = [m.down.weight for m in mine if isinstance(m, Adapter)]
        assert len(downs) == 2 * blocks
        assert all(torch.equal(w, downs[0]) for w in downs)
    quick = Recipe(epochs=6, batch_size=10, lr=0.05, augment=False, warmup_epochs=0)
    history = fit(method, dataset, quick, progress=False)
    assert history.losses[-1] < history.losses[0]
    assert all(m.up.weight.any() for m in method.modules() if isinstance(m, Adapter))


def test_a_training_step_draws_sentences_that_all_share(tiny_clip, dataset):
    method = made(tiny_clip, adapters=True, train_sentences=3).train()
    batch = Batch(
        views=drawn(2, 2, 3, 32, 32),
        labels=torch.tensor([0, 1]),
        generator=torch.Generator().manual_seed(0),
    )
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))[:2]
    _, text = method.features(batch)
    chosen = [0, *(1 + order).tolist()]
    assert method._drawn == chosen
    torch.testing.assert_close(
        text, method.frozen_text[:, chosen], rtol=1e-3, atol=1e-4
    )
    assert method.eval().text_features().shape[1] == 6


def test_adapters_change_the_branches_of_their_blocks(tiny_clip):
    """Against a block written out: attention and MLP each pass through one."""
    method = made(
        tiny_clip, adapters=True, layers=[1], parts=["mlp"], towers=["image"],
        scale=0.5, rate=4,
    )  # fmt: skip
    assert {n.split(".")[3] for n, _ in method.named_parameters()} == {"1"}
    assert "scale" not in "".join(method.state_dict())
    with torch.no_grad():
        for p in method.parameters():
            p.copy_(drawn(*p.shape, std=0.3))
    images, visual = drawn(2, 3, 32, 32), tiny_clip.model.visual
    adapter = method.adapters["image"]["mlp"]["1"]
    block = visual.transformer.resblocks[1]
    hook = block.mlp.register_forward_hook(
        lambda m, args, h: h + 0.5 * adapter.up(F.gelu(adapter.down(h)))
    )
    try:
        expected = visual(images)
    finally:
        hook.remove()
    torch.testing.assert_close(
        method.image_features(images), expected, rtol=1e-3, atol=1e-4
    )
    plain = tiny_clip.encode_image(images)
    assert not torch.allclose(expected, plain, atol=1e-2)


class FewShot(AWT):
    """AWT with adapters unless it is told otherwise."""

    name = "few"

    def __init__(self, clip, classnames, *, adapters: bool = True, views: int = 4,
                 rate: int = 8, **options):  # fmt: skip
        super().__init__(
            clip, classnames, adapters=adapters, views=views, rate=rate, **options
        )

    @classmethod
    def recipe(cls, setting):
        return replace(super().recipe(setting), hparams={})


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_the_few_shot_form_keeps_the_promises(promise, tiny_clip, tmp_path):
    register(FewShot)
    promise("few", tiny_clip, tmp_path)


def test_published_options(tiny_clip):
    options = {"down_rate": 8, "adapter_layers": [1], "text": False, "scale": 0.5}
    few = AWT.from_official(tiny_clip, NAMES, options | {"num_desc": 3})
    assert list(few.adapters) == ["image"] and few.solver["together"]
    assert {n.split(".")[3] for n, _ in few.named_parameters()} == {"1"}
    names, own = few.official_names(), few.state_dict()
    state = {key: own[ours].clone() for key, ours in names.items()}
    assert all(key.split(".")[2] == "0" for key in state)
    numbered = {k.replace(".0.", ".1.", 1): v + 1 for k, v in state.items()}
    few.load_official(numbered)  # by its block
    for key, ours in names.items():
        torch.testing.assert_close(few.state_dict()[ours], state[key] + 1)
    attention = AWT.from_official(tiny_clip, NAMES, {"mlp": False, "scale": -1})
    assert all("attn" in name for name, _ in attention.named_parameters())
    assert any("scale" in name for name, _ in attention.named_parameters())
    zero = AWT.from_official(tiny_clip, NAMES, {"sinkhorn_eps": 0.2})
    assert not zero.n_parameters and not zero.solver["together"]


def test_recipes_and_what_does_not_fit(tiny_clip):
    few = recipe("awt", Setting("few-shot", shots=4, profile="full"))
    many = recipe("awt", Setting("few-shot", shots=16, profile="full"))
    assert (few.lr, few.epochs, few.hparams["rate"]) == (0.002, 20, 384)
    assert (many.lr, many.epochs, many.hparams["rate"]) == (0.008, 25, 256)
    asked = Setting("few-shot", profile="full", hparams={"adapters": False})
    assert recipe("awt", asked).epochs == 0
    assert not recipe("awt", Setting("base-to-new", profile="full")).trains
    for name, value in (
        ("views", 0), ("sentences", -1), ("template", "a photo"), ("epsilon", 0.0),
        ("text_temperature", 0.0), ("threshold", -1.0), ("parts", ["ln"]),
        ("towers", []), ("layers", [9]), ("rate", 0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            made(tiny_clip, adapters=True, **{name: value})
    with pytest.raises(InputError, match="cannot be exported: .* views"):
        Deployed(made(tiny_clip))
