"""AAPE: who is taught by what, what is left at test time, and its logits in full."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.clip import zero_shot_features
from promptkit.descriptions import sentence_features
from promptkit.errors import InputError
from promptkit.export import Deployed
from promptkit.method import Batch
from promptkit.recipe import Recipe
from promptkit.registry import build, load_method
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import fit

SAID = {
    name: [f"{name} with part {i}." for i in range(1 + c)]
    for c, name in enumerate(NAMES)
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tiny_clip):
    return replace(toy_dataset(tiny_clip), descriptions=SAID)


def aimed(clip, dataset, **options):
    method = build("aape", clip, NAMES, seed=3, **options)
    method.aim(dataset)
    return method


def stirred(method):
    """With parameters far from where they start."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return method


def batch_of(clip, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, clip.embed_dim, generator=generator)
    return Batch(features=features, labels=torch.arange(n) % len(NAMES))


def test_it_starts_as_zero_shot_clip(tiny_clip, dataset):
    batch = batch_of(tiny_clip)
    method = aimed(tiny_clip, dataset)
    plain = build("clip", tiny_clip, NAMES, template=dataset.template)
    torch.testing.assert_close(
        method.logits(batch), plain.logits(batch), rtol=1e-4, atol=1e-3
    )


def test_logits_are_those_of_the_class_weights_in_full(tiny_clip, dataset):
    method, batch = stirred(aimed(tiny_clip, dataset)), batch_of(tiny_clip)
    f = F.normalize(batch.features, dim=-1)
    t = zero_shot_features(tiny_clip, NAMES, dataset.template)
    p = method.generator(f)
    both = torch.cat(
        [p[:, None].expand(-1, len(t), -1), t.expand(len(f), -1, -1)], dim=-1
    )  # (B, C, 2E)
    w = F.normalize(both @ method.fusion.weight.T, dim=-1)
    expected = tiny_clip.logit_scale * (w @ f[:, :, None])[..., 0]
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-4, atol=1e-3)


def test_each_part_is_taught_by_its_own_term(tiny_clip, dataset):
    """Distillation leaves the aggregator alone; the reward moves nothing else."""
    method, batch = stirred(aimed(tiny_clip, dataset)), batch_of(tiny_clip)
    image = F.normalize(batch.features, dim=-1)
    own = [x[batch.labels] for x in method.references]

    def moved(term):
        method.zero_grad(set_to_none=True)
        term.backward()
        named = method.named_parameters()
        some = {n for n, p in named if p.grad is not None and p.grad.any()}
        return {name.partition(".")[0] for name in some}

    distill, reward = method.terms(image, *own)
    assert moved(distill) == {"generator"}
    assert moved(reward) == {"aggregator"}
    ce = F.cross_entropy(method(batch), batch.labels)
    assert moved(ce) == {"generator", "fusion"}
    torch.testing.assert_close(method.loss(batch), ce + distill + reward)
    assert 0 <= distill <= 4 and 0 <= reward <= 2


def test_the_summary_is_of_the_class_s_own_sentences_in_any_order(tiny_clip, dataset):
    method, batch = stirred(aimed(tiny_clip, dataset)), batch_of(tiny_clip)
    image = F.normalize(batch.features, dim=-1)
    summary = method.summary(image, *(x[batch.labels] for x in method.references))
    for b, label in enumerate(batch.labels.tolist()):
        r = sentence_features(tiny_clip, SAID[NAMES[label]][::-1])[None]  # reversed
        there = torch.ones(r.shape[:2], dtype=torch.bool)
        alone, attention = method.aggregator(image[b : b + 1], r, there)
        torch.testing.assert_close(summary[b], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attention.sum(-1), torch.ones(1, 8))
    one = build("aape", tiny_clip, NAMES, aggregate="mean", descriptions=SAID)
    rows = [sentence_features(tiny_clip, SAID[n]).mean(0) for n in NAMES]
    mean = one.summary(None, *one.references)
    torch.testing.assert_close(mean, F.normalize(torch.stack(rows), dim=-1))
    drawn = build("aape", tiny_clip, NAMES, aggregate="random", descriptions=SAID)
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        some = drawn.summary(torch.zeros(5, 1), *drawn.references, generator)
        for c, name in enumerate(NAMES):
            near = sentence_features(tiny_clip, SAID[name]) - some[c]
            assert near.norm(dim=-1).min() < 1e-5


@pytest.mark.parametrize("aggregate", ["attention", "mean"])
def test_sentences_and_aggregator_are_gone_after_training(
    tiny_clip, dataset, tmp_path, aggregate
):
    method, batch = aimed(tiny_clip, dataset, aggregate=aggregate), batch_of(tiny_clip)
    quick = Recipe(epochs=3, batch_size=8, lr=0.05, augment=False)
    fit(method, dataset, quick, progress=False)
    assert method.aggregator is None
    assert not any("aggregator" in name for name in method.state_dict())
    path = method.save(tmp_path / "aape.safetensors")
    loaded = load_method(path, tiny_clip)
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    loaded.aim(toy_dataset(tiny_clip, ["teapot", "sea_lion"]))  # nothing said of them
    assert loaded.logits(batch).shape == (6, 2)
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        Deployed(method)(images), method.logits(images), rtol=1e-4, atol=1e-3
    )
    fit(method, dataset, quick, progress=False)  # once more


def test_a_killed_training_goes_on_to_the_same_bits(tiny_clip, dataset, tmp_path):
    quick = Recipe(epochs=3, batch_size=8, lr=0.05, augment=False)
    whole = aimed(tiny_clip, dataset)
    expected = fit(whole, dataset, quick, progress=False)
    killed, path = aimed(tiny_clip, dataset), tmp_path / "run.pt"

    def end_epoch(epoch, recipe, outer=None):
        if epoch == 1:
            raise KeyboardInterrupt

    killed.end_epoch = end_epoch
    with pytest.raises(KeyboardInterrupt):
        fit(killed, dataset, quick, progress=False, checkpoint=path)
    again = aimed(tiny_clip, dataset)
    history = fit(again, dataset, quick, progress=False, checkpoint=path)
    assert history.losses == expected.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_retrieval(tiny_clip):
    """Its task is CLIP's own loss on fused images; it starts as CLIP."""
    method = build("aape", tiny_clip, NAMES, distill=0.5, reward=2.0)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4, tiny_clip.embed_dim, generator=generator)
    captions = torch.randn(4, 3, tiny_clip.embed_dim, generator=generator)
    f, r = F.normalize(image, dim=-1), F.normalize(captions, dim=-1)
    torch.testing.assert_close(method.fused(image), f)
    positive = torch.tensor([0, 2, 1, 1])
    found = method.retrieval_loss(image, captions, positive)
    z = tiny_clip.logit_scale * f @ r[torch.arange(4), positive].T
    task = -(z.log_softmax(1).diagonal() + z.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(found["task"], task)
    total = task + 0.5 * found["distill"] + 2 * found["reward"]
    torch.testing.assert_close(found["loss"], total)


def test_what_is_not_said(tiny_clip, dataset):
    bare = replace(dataset, descriptions=SAID | {"pug": []})
    for said in (bare, replace(dataset, descriptions={})):
        method = aimed(tiny_clip, said)
        with pytest.raises(InputError, match="there are none about the classes"):
            fit(method, said, Recipe(epochs=1, augment=False), progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 7}, "heads must be a divisor of the 24 of a feature, got 7"),
        ({"sentences": 0}, "sentences must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"distill": -1.0}, "distill must be at least 0"),
        ({"template": []}, "template must be one sentence or more"),
        ({"aggregate": "mlp"}, "aggregate must be one of 'attention', 'mean'"),
    ],
)
def test_what_does_not_fit(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("aape", tiny_clip, NAMES, **options)
