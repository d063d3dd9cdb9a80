"""ProText: pairs of names and sentences, and the map that is learned from them."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import base_new, few_shot, load_dataset
from promptkit.descriptions import sentence_features
from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.methods.protext import ENDINGS, ProText
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, recipe
from promptkit.runs import Run, plan
from promptkit.testing import toy_dataset
from promptkit.towers import plain_text
from promptkit.train import fit

NAMES = ["yin_yang", "polka-dotted", "707-320"]
SAID = {
    "707-320": ["It has four engines.", "A 707-320 is long."],
    "Yin_Yang": ["A circle."],
    "tractor": ["Two large wheels."],
    "polka-dotted": ["Many dots.", "Dots, in rows."],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def by_hand(method, texts):
    """Prompted features of whole texts: the prompts overwrite tokens 1 .. n of each
    tokenised text, at the input and at the blocks with prompts.
    """
    clip, n = method.clip, method.context.length
    ids = clip.tokenize(texts)
    eot = ids.argmax(dim=-1)
    x = clip.embed(ids) + clip.model.positional_embedding[: ids.shape[1]]
    prompts = [method.context.vectors, *method.deep]
    here = clip.model.positional_embedding[1 : 1 + n]
    mask = clip.model.attn_mask[: ids.shape[1], : ids.shape[1]]
    for i, block in enumerate(clip.model.transformer.resblocks):
        if i < len(prompts):
            own = (prompts[i] + (here if i == 0 else 0)).expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], own, x[:, 1 + n :]], dim=1)
        x = block(x, attn_mask=mask)
    x = clip.model.ln_final(x)[torch.arange(len(x)), eot]
    return F.normalize(x @ clip.model.text_projection, dim=-1)


@pytest.mark.parametrize("n_ctx", [1, 2, 4, 6])
@pytest.mark.parametrize("depth", [1, 2])
def test_names_of_training_and_test(tiny_clip, n_ctx, depth):
    """Up to 4 tokens: "a photo of a", without underscores. More: placeholders; keys
    keep their underscores in training and lose them at test time.
    """
    options = {"n_ctx": n_ctx, "depth": depth, "descriptions": SAID}
    method = build("protext", tiny_clip, NAMES, **options)
    words = "a photo of a" if n_ctx <= 4 else " ".join("X" * n_ctx)
    spoken = "Yin Yang" if n_ctx <= 4 else "Yin_Yang"
    texts = [f"{words} {name}." for name in (spoken, *NAMES[1:])]
    labels = torch.tensor([2, 0, 0, 1])
    expected = by_hand(method, texts)[labels]
    torch.testing.assert_close(method.named(labels), expected, rtol=1e-3, atol=1e-5)
    tested = by_hand(method, [f"{words} {n.replace('_', ' ')}." for n in NAMES])
    ours = F.normalize(method.text_features(), dim=-1)
    torch.testing.assert_close(ours, tested, rtol=1e-3, atol=1e-5)


def test_pairs_are_in_the_order_of_the_file(tiny_clip):
    method = build("protext", tiny_clip, NAMES, descriptions=SAID)
    assert method.pairs() == [
        (2, "It has four engines."),
        (2, "A 707-320 is long."),
        (0, "A circle."),
        (1, "Many dots."),
        (1, "Dots, in rows."),
    ]
    method.set_classes(["tractor"])
    assert method.pairs() == [(0, "Two large wheels.")]


@pytest.mark.parametrize(("loss", "scale"), [("mse", 7.0), ("l1", 1.0)])
def test_the_loss_is_a_sum_over_pairs(tiny_clip, loss, scale):
    options = {"loss": loss, "weight": 7.0, "descriptions": SAID}
    method = build("protext", tiny_clip, NAMES, **options)
    batch = Batch(labels=torch.tensor([0, 2, 0]), texts=["One.", "Two twos.", "One."])
    prompted = method.named(batch.labels)
    goal = F.normalize(tiny_clip.encode_text(batch.texts), dim=-1)
    apart = (prompted - goal).abs()
    terms = apart if loss == "l1" else apart.square()
    torch.testing.assert_close(method.loss(batch), scale * terms.mean())
    if loss == "mse":  # a cosine loss
        cosine = (prompted * goal).sum(-1)
        expected = 7.0 * 2 / tiny_clip.embed_dim * (1 - cosine).mean()
        torch.testing.assert_close(method.loss(batch), expected)


def test_it_never_meets_an_image_and_serves_new_classes(tiny_clip, monkeypatch):
    dataset = replace(toy_dataset(tiny_clip, NAMES), descriptions=SAID)
    method = build("protext", tiny_clip, NAMES)
    method.aim(dataset)
    before = method.loss(batch_of(method)).item()
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_clip), "image", lambda *a, **k: pytest.fail("an image"))
        quick = Recipe(epochs=20, batch_size=8, optimizer="adamw", lr=0.01)
        fit(method, dataset, quick, progress=False)
    assert method.loss(batch_of(method)).item() < 0.8 * before
    method.set_classes(["teapot", "sea_lion"])
    images = torch.randn(2, 3, 32, 32)
    image = F.normalize(tiny_clip.encode_image(images), dim=-1)
    text = by_hand(method, ["a photo of a teapot.", "a photo of a sea lion."])
    expected = tiny_clip.logit_scale * image @ text.T
    torch.testing.assert_close(method.logits(images), expected, rtol=1e-3, atol=1e-3)


def batch_of(method):
    labels, texts = zip(*method.pairs(), strict=True)
    return Batch(labels=torch.tensor(labels), texts=list(texts))


def test_base_to_new_trains_on_sentences_about_base_classes(tiny_clip):
    dataset = load_dataset("sat")
    planned = plan(Run("base-to-new", "protext", "sat", clip=tiny_clip))
    given = planned.training_set()
    base, new = base_new(few_shot(dataset, 1, 1))
    assert given.classnames == base.classnames and planned.config["shots"] == 0
    method = planned.build(given)
    train = method.prepare(given, Recipe(), None, 0).train
    assert set(train.labels.tolist()) == set(range(len(base.classnames)))
    said = " ".join(train.sentences)
    assert all(name in said for name in base.classnames)
    assert not any(name in said for name in new.classnames)


def test_what_is_not_said(tiny_clip):
    dataset = toy_dataset(tiny_clip, NAMES)
    method = build("protext", tiny_clip, NAMES)
    quick = Recipe(epochs=1, optimizer="adamw", lr=0.01)
    with pytest.raises(InputError, match="there are none about the classes 'yin yang'"):
        fit(method, dataset, quick, progress=False)
    method.aim(replace(dataset, descriptions={"707-320": ["Four engines."]}))
    with pytest.warns(UserWarning, match="nothing is said of 'yin yang', 'polka-dott"):
        fit(method, dataset, quick, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.aim(replace(dataset, descriptions=SAID))
        fit(method, dataset, quick, progress=False)


@pytest.mark.parametrize("name", ["oxford_pets", "eurosat", "sun397"])
def test_endings_of_datasets(tiny_clip, name):
    dataset = replace(toy_dataset(tiny_clip, NAMES), name=name)
    transfer = recipe("protext", Setting("cross-dataset", "imagenet", profile="full"))
    assert transfer.hparams == {"n_ctx": 4, "ending": None} and transfer.lr == 0.03
    method = build("protext", tiny_clip, NAMES, **transfer.hparams)
    method.aim(dataset)
    ending = ENDINGS.get(name, "{}.")
    texts = [f"a photo of a {ending.replace('{}', n.replace('_', ' '))}" for n in NAMES]
    ours = F.normalize(method.text_features(), dim=-1)
    torch.testing.assert_close(ours, by_hand(method, texts), rtol=1e-3, atol=1e-5)
    plain = by_hand(method, [f"a photo of a {n.replace('_', ' ')}." for n in NAMES])
    torch.testing.assert_close(
        method.named(torch.arange(3)), plain, rtol=1e-3, atol=1e-5
    )
    longer = build("protext", tiny_clip, NAMES, n_ctx=6, ending=None)
    longer.aim(dataset)
    assert longer.context.ending == "{}."


def test_official_options(tiny_clip):
    asked = {"n_ctx_text": 4, "ctx_init": "a photo of a", "prompt_depth_text": 2}
    flags = {"cross_dataset": True, "dataset": "OxfordPets", "loss": "l1"}
    method = ProText.from_official(tiny_clip, NAMES, asked | flags)
    assert method.context.ending == "{}, a type of pet." and method.distance == "l1"
    assert len(method.deep) == 1
    flags["cross_dataset"] = False
    plain = ProText.from_official(tiny_clip, NAMES, asked | flags)
    assert plain.context.ending == "{}."
    bare = ProText.from_official(tiny_clip, NAMES, asked | {"ctx_init": None})
    assert not bare.words and bare.inputs[0] == "yin yang."
    with pytest.raises(InputError, match="unknown official dataset 'OxfordPet'"):
        flags = {"cross_dataset": True, "dataset": "OxfordPet"}
        ProText.from_official(tiny_clip, NAMES, asked | flags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be at least 1"),
        ({"weight": 0.0}, "weight must be above 0"),
        ({"ending": "a pet."}, "ending must be a text with {} for the class name"),
        ({"loss": "mae"}, "loss must be one of 'mse', 'l1'"),
    ],
)
def test_what_does_not_fit(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("protext", tiny_clip, NAMES, **options)


def test_features_of_targets_are_those_of_sentences(tiny_clip):
    method = build("protext", tiny_clip, NAMES, descriptions=SAID)
    texts = ["A circle.", "Many dots.", "A circle."]
    first, again = method.targets(texts), method.targets(texts)
    assert torch.equal(first, again) and torch.equal(first[0], first[2])
    torch.testing.assert_close(first, sentence_features(tiny_clip, texts))
    ids = tiny_clip.tokenize(texts)
    plain = plain_text(tiny_clip.model, tiny_clip.embed(ids), ids.argmax(-1))
    torch.testing.assert_close(first, F.normalize(plain, dim=-1), rtol=1e-3, atol=1e-5)
