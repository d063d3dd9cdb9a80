"""UPL: what is chosen from the pool, and what an ensemble of contexts is."""

import pytest
import torch
import torch.nn.functional as F

from promptkit.clip import zero_shot_features
from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.methods.upl import UPL, select
from promptkit.recipe import Recipe
from promptkit.registry import build
from promptkit.testing import NAMES, tiny_clip, toy_dataset
from promptkit.train import fit


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def probabilities():
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(40, 6, generator=generator)).softmax(-1)


@pytest.mark.parametrize("k", [1, 3, 16, -1])
def test_the_most_confident_of_each_predicted_class(k):
    p = probabilities()
    p[:, 2] = 0  # never predicted
    wanted = []
    for c in range(p.shape[1]):
        mine = [i for i in range(len(p)) if p[i].argmax() == c]
        mine = sorted(mine, key=lambda i: -p[i, c].item())
        wanted += [(i, c) for i in (mine if k < 0 else mine[:k])]
    index, labels, confidence = select(p, "per_class", k)
    assert list(zip(index.tolist(), labels.tolist(), strict=True)) == wanted
    assert torch.equal(confidence, p[index, labels])


def test_the_other_rules():
    p = probabilities()
    confidence, label = p.max(dim=-1)
    index, labels, values = select(p, "global", 2)
    assert set(index.tolist()) == set(confidence.topk(12).indices.tolist())
    assert (values.diff() <= 0).all() and torch.equal(labels, label[index])
    index, *_ = select(p, "threshold", 2, 0.8)
    assert set(index.tolist()) == set((confidence > 0.8).nonzero()[:, 0].tolist())
    both, labels, _ = select(p, "per_class_or_threshold", 2, 0.8)
    wanted = set(index.tolist()) | set(select(p, "per_class", 2)[0].tolist())
    assert set(both.tolist()) == wanted and (labels.diff() >= 0).all()
    tied = select(torch.tensor([[0.0, 1.0]] * 4), "per_class", 2)
    assert tied[0].tolist() == [0, 1]  # in the order of the pool


def test_backbones_label_by_the_mean_of_their_probabilities(tiny_clip):
    dataset, other = toy_dataset(tiny_clip), tiny_clip_2()
    method = build("upl", tiny_clip, NAMES, backbones=[other], members=1, top_k=2)
    method.aim(dataset)
    p = 0
    for clip in (tiny_clip, other):
        text = zero_shot_features(clip, NAMES, dataset.template)
        images = clip.normalize(dataset.train.images().float() / 255)
        image = F.normalize(clip.encode_image(images), dim=-1)
        p = p + (clip.logit_scale * image @ text.T).softmax(-1) / 2
    index, labels, _ = select(p, k=2)
    given = method.prepare(dataset, Recipe(), torch.Generator(), 0)
    assert torch.equal(given.train.rows, index)
    assert torch.equal(given.train.labels, labels)


def tiny_clip_2():
    return tiny_clip(seed=5)


def test_one_member_is_coop_and_many_do_not_touch_each_other(tiny_clip):
    dataset = toy_dataset(tiny_clip)
    images = tiny_clip.normalize(dataset.train.images().float() / 255)
    batch = Batch(images=images, labels=dataset.train.labels)
    ours = build("upl", tiny_clip, NAMES, members=3, n_ctx=4)
    grads = []
    total = ours.train().backward(batch)
    for r in range(3):
        coop = build("coop", tiny_clip, NAMES, n_ctx=4)
        coop.load_official({"ctx": ours.context.vectors.detach()[r, 0]})
        grads.append(coop.train().backward(batch))
        torch.testing.assert_close(
            ours.context.vectors.grad[r, 0], coop.context.vectors.grad
        )
        single = build("upl", tiny_clip, NAMES, members=1, n_ctx=4)
        single.load_official({"ctx": coop.context.vectors.detach()})
        torch.testing.assert_close(single.logits(batch), coop.logits(batch))
    torch.testing.assert_close(total, torch.stack(grads).sum())


@pytest.mark.parametrize("options", [{}, {"position": "middle"}, {"position": "front"}])
@pytest.mark.parametrize("class_specific", [False, True])
def test_the_ensemble_is_the_mean_of_its_members_logits(
    tiny_clip, options, class_specific
):
    options = options | {"n_ctx": 3, "class_specific": class_specific}
    method = build("upl", tiny_clip, NAMES, members=4, **options)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    members = []
    for vectors in method.context.vectors.detach():
        coop = build("coop", tiny_clip, NAMES, **options)
        coop.load_official({"ctx": vectors if class_specific else vectors[0]})
        members.append(coop.logits(images))
    assert (members[0] - members[1]).abs().max() > 0.1
    torch.testing.assert_close(method.logits(images), torch.stack(members).mean(0))


def test_checkpoints_of_several_runs_are_one_ensemble(tiny_clip):
    method = build("upl", tiny_clip, NAMES, members=2, n_ctx=4)
    runs = {f"prompt_learner.ctx/{r}": torch.full((4, 32), r + 0.5) for r in range(2)}
    method.load_official(runs)
    assert method.context.vectors[:, 0, 0, 0].tolist() == [0.5, 1.5]
    with pytest.raises(InputError, match="missing: prompt_learner.ctx"):
        method.load_official({"ctx/0": torch.zeros(4, 32)})
    with pytest.raises(InputError, match="wrong shape"):
        method.load_official({"ctx": torch.zeros(4, 32)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, or -1 for all, got 0"),
        ({"threshold": 1.5}, "threshold must be from 0 to 1, got 1.5"),
        ({"members": 0}, "members must be at least 1, got 0"),
        ({"init": "a photo of a"}, "members must be 1 where all would start from"),
        ({"template": "a photo"}, "template must be one sentence or more"),
        ({"rule": "per class"}, "rule must be one of 'per_class'"),
        ({"backbones": ["ViT-B-32"]}, "backbones must be a list, each item a Frozen"),
    ],
)
def test_what_does_not_fit(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("upl", tiny_clip, NAMES, **options)


def test_nothing_above_the_threshold(tiny_clip):
    dataset = toy_dataset(tiny_clip)
    method = build("upl", tiny_clip, NAMES, rule="threshold", threshold=1.0, members=1)
    with pytest.raises(InputError, match="no image of toy has a confidence above"):
        fit(method, dataset, UPL.recipe(None), progress=False)
