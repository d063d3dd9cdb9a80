"""What ArGue's paper says of it, against computations of its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from promptkit.data import frozen_features
from promptkit.errors import InputError
from promptkit.methods.argue import TEMPLATES
from promptkit.recipe import Setting
from promptkit.registry import build, load_method, recipe
from promptkit.sampling import kmeans, sampled
from promptkit.testing import NAMES, batch_of, few_steps, toy_dataset

CLEAN = [name.replace("_", " ") for name in NAMES]
FEATURES = ["has a red rim", "has four sides", "is seen at sea", "may bark", "is flat"]
SAID = {name: [f"{name} which {f}" for f in FEATURES] for name in NAMES}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tiny_clip):
    described = {name: ["red rim", "a long tail", "may bark", "flat"] for name in CLEAN}
    return replace(toy_dataset(tiny_clip), descriptions=described)


@pytest.fixture
def batch(tiny_clip, dataset):
    return batch_of(dataset, tiny_clip)


def test_logits_are_means_over_attributes(tiny_clip, batch):
    """At first, with the words "a photo of a", no w and CLIP's own norms."""
    method = build("argue", tiny_clip, NAMES, attributes=SAID, clusters=0)
    texts = [f"a photo of a {n} which {f}." for n in CLEAN for f in FEATURES]
    text = F.normalize(tiny_clip.encode_text(texts), dim=-1)
    image = F.normalize(batch.features, dim=-1)
    each = (tiny_clip.logit_scale * image @ text.T).unflatten(1, (len(NAMES), -1))
    torch.testing.assert_close(
        method.logits(batch), each.mean(-1), rtol=1e-4, atol=1e-3
    )


def test_without_attributes_it_is_coop(tiny_clip, batch):
    coop = build("coop", tiny_clip, NAMES, init="a photo of a")
    method = build(
        "argue", tiny_clip, NAMES, reg_weight=0.0, correction=False, tune_norms=False
    )
    assert method.reads == "features" and method.n_parameters == coop.n_parameters
    torch.testing.assert_close(method.loss(batch), coop.loss(batch))
    torch.testing.assert_close(
        method.logits(batch), coop.logits(batch), rtol=1e-4, atol=1e-3
    )


def test_both_regularisers(tiny_clip, batch):
    templates = ["a sketch of a {}.", "my {}."]
    given = {"negatives": {n: [f"no {n}", f"air around {n}"] for n in CLEAN}}
    method = build(
        "argue", tiny_clip, NAMES, templates=templates, neg_weight=3.0, **given
    )
    scale, C = tiny_clip.logit_scale, len(CLEAN)
    p = F.normalize(
        tiny_clip.encode_text([f"a photo of a {n}." for n in CLEAN]), dim=-1
    )
    first = 0.0
    for template in templates:
        q = tiny_clip.encode_text([template.replace("{}", n) for n in CLEAN])
        table = scale * p @ F.normalize(q, dim=-1).T  # rows: prompts
        first -= table.log_softmax(dim=0).diagonal().sum() / (2 * C)
    texts = [f"a photo of a {t}." for n in CLEAN for t in given["negatives"][n]]
    n = F.normalize(tiny_clip.encode_text(texts), dim=-1)
    image = F.normalize(batch.features, dim=-1)
    answers = (scale * image @ n.T).unflatten(1, (C, 2)).mean(2).softmax(dim=1)
    second = (answers * answers.log()).sum() / (len(image) * C)
    method.eval()  # without noise
    loss = method.loss(batch) - F.cross_entropy(method(batch), batch.labels)
    torch.testing.assert_close(loss, 5 * first + 3 * second, rtol=1e-3, atol=1e-4)
    drawn = {method.train().loss(batch).item() for _ in range(8)}
    assert len(drawn) > 1  # with noise in about half of the steps


def test_norms_learn_at_a_tenth_of_the_rate(tiny_clip, batch, dataset):
    method, _ = few_steps("argue", tiny_clip, dataset, epochs=2)
    plan = recipe("argue", Setting("base-to-new", "dtd", 16, "full"))
    first, norms = method.param_groups(plan)
    assert norms["lr"] == pytest.approx(0.0032) and "lr" not in first
    blocks = tiny_clip.model.visual.transformer.resblocks
    assert len(norms["params"]) == 4 * len(blocks)
    for block, own in zip(blocks, method.norms, strict=True):
        assert not torch.equal(own["ln_2"].weight, block.ln_2.weight)
        assert not block.ln_2.weight.requires_grad
    shifted = method.image_features(batch.images)
    assert not torch.allclose(shifted, batch.features, atol=1e-5)
    assert (plan.epochs, plan.warmup_epochs, plan.clip_norm) == (300, 7, 1.0)


def test_training_images_choose_the_attributes(tiny_clip, dataset, batch, tmp_path):
    """Of each cluster the best; the choice is saved, and other classes have theirs from
    texts alone.
    """
    method = build("argue", tiny_clip, NAMES, attributes=SAID, clusters=2)
    blind = method.attributes
    assert {len(texts) for texts in blind} <= {1, 2}
    method.prepare(dataset.for_training(), None, None, 0)
    features = frozen_features(tiny_clip, dataset.train)
    for c, (name, texts) in enumerate(zip(NAMES, method.attributes, strict=True)):
        mine = F.normalize(features[dataset.train.labels == c], dim=-1)
        text = F.normalize(tiny_clip.encode_text(SAID[name]), dim=-1)
        agreement = (text @ mine.T).mean(1)
        labels, _ = kmeans(text, 2)
        best = {
            SAID[name][max((labels == k).nonzero()[:, 0], key=lambda i: agreement[i])]
            for k in labels.unique()
        }
        assert {*texts} == best
    loaded = load_method(method.save(tmp_path / "argue.safetensors"), tiny_clip)
    assert loaded.attributes == method.attributes
    chosen = method.attributes
    method.set_classes([NAMES[1], "pot"])
    assert method.attributes[0] == chosen[1] and {*method.attributes[1]} == {"pot"}
    assert loaded.logits(batch).shape == (len(batch), len(NAMES))


def test_clusters_are_those_of_cosine_k_means():
    """Against Lloyd's algorithm in numpy; a cluster may lose all its members."""
    generator = torch.Generator().manual_seed(0)
    for n in (1, 3, 6):
        x = F.normalize(torch.randn(12, 5, generator=generator), dim=-1)
        labels, centroids = kmeans(x, n)
        points, centres = x.double().numpy(), x[:n].double().numpy()
        for _ in range(100):
            unit = centres / np.maximum(np.linalg.norm(centres, axis=1), 1e-8)[:, None]
            own = (points @ unit.T).argmax(axis=1)
            centres = np.stack(
                [
                    points[own == k].mean(axis=0) if (own == k).any() else 0 * points[0]
                    for k in range(n)
                ]
            )
        assert labels.tolist() == own.tolist()
        torch.testing.assert_close(
            centroids.double(), torch.from_numpy(centres), rtol=1e-4, atol=1e-5
        )
    same = F.normalize(torch.ones(4, 5), dim=-1)
    labels, centroids = kmeans(same, 2)
    assert labels.tolist() == [0] * 4 and not centroids[1].any()


def test_without_images_the_attribute_nearest_to_its_centre_stays(tiny_clip):
    texts = [f"cat which {f}" for f in FEATURES]
    sample = sampled(tiny_clip, texts, 2)
    for k in sample.labels.unique():
        members = (sample.labels == k).nonzero()[:, 0]
        to_centre = sample.features[members] @ sample.centroids[k]
        assert members[to_centre.argmax()] in sample.chosen


def test_attributes_follow_the_dataset(tiny_clip, dataset):
    method = build("argue", tiny_clip, NAMES, clusters=0)
    assert method.attributes == [[name] for name in CLEAN]
    method.aim(dataset)
    assert method.attributes[0] == [
        "red square which has red rim",
        "red square which is a long tail",
        "red square which may bark",
        "red square which has flat",
    ]
    assert len(TEMPLATES) == 35 and method.option("templates") == TEMPLATES


def test_the_regulariser_may_know_other_classes(tiny_clip, batch):
    method = build("argue", tiny_clip, NAMES, reg_names=[*NAMES, "sea_lion"])
    assert method.references.shape[1] == len(NAMES) + 1
    assert torch.isfinite(method.loss(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reg_weight": -1.0}, "reg_weight"),
        ({"clusters": -1}, "clusters"),
        ({"attributes": {"pug": []}}, "attributes"),
        ({"negatives": {"pug": [""]}}, "negatives"),
        ({"templates": ["a photo"]}, "templates"),
        ({"reg_names": []}, "reg_names"),
        ({"n_ctx": 3}, "n_ctx"),
    ],
)
def test_bad_options(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("argue", tiny_clip, NAMES, **options)


def test_negatives_are_equally_many(tiny_clip, batch):
    uneven = {"pug": ["no pug", "air"]}
    method = build("argue", tiny_clip, NAMES, negatives=uneven, neg_weight=1.0)
    with pytest.raises(InputError, match="equally many"):
        method.loss(batch)
