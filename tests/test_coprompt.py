"""What CoPrompt promises: adapters that mix, consistency with frozen features of a
second view and a drawn sentence, views of its own.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import load_dataset
from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.methods.coprompt import CoPrompt, sentences_of
from promptkit.randaugment import OPERATIONS, augmented
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import fit

SAID = {  # as files spell them: other case, underscores, lists of different lengths
    name.title(): [f"a {name} on a table", f"some {name}, seen from above", f"{name}!"]
    for name in NAMES
} | {"pug": ["a small dog", "a dog that snores"]}
del SAID["Pug"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def batch_for(method, n=4):
    dataset, generator = toy_dataset(method.clip), torch.Generator().manual_seed(3)
    images = dataset.train.images()[: 2 * n : 2]
    return Batch(
        views=method.views(images, generator),
        labels=dataset.train.labels[: 2 * n : 2],
        generator=generator,
    )


def coprompt(clip, **options):
    options = {"n_ctx": 2, "descriptions": SAID} | options
    return build("coprompt", clip, NAMES, **options).train()


def test_the_loss_compares_with_frozen_features_of_view_and_sentence(tiny_clip):
    for kind in ("cosine", "mse"):
        method = coprompt(tiny_clip, lam=2.0, consistency=kind)
        batch = batch_for(method)
        drawn, k = iter([1]), 1
        method.sentence = lambda batch, drawn=drawn: next(drawn)
        sentences = [
            next(v for key, v in SAID.items() if key.lower() == name.lower())[k]
            for name in NAMES
        ]
        prompted = tiny_clip.text(
            method.context.prompt(), method.text_edit()
        )[0]  # fmt: skip
        text = 0.2 * method.adapter_text(prompted) + 0.8 * prompted
        image = method.image_features(batch.views[:, 0])
        image = 0.1 * method.adapter_image(image) + 0.9 * image
        pairs = [
            (text, tiny_clip.encode_text(sentences)),
            (image, tiny_clip.encode_image(batch.views[:, 1])),
        ]
        total = F.cross_entropy(method.score(image, text), batch.labels)
        for a, b in pairs:
            a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
            far = 1 - (a * b).sum(-1).mean()
            total = total + 2.0 * (far if kind == "cosine" else (a - b).square().mean())
        torch.testing.assert_close(method.loss(batch), total, rtol=1e-4, atol=1e-5)
        assert list(drawn) == []


def test_sentences_are_drawn_one_a_step_from_as_many_as_all_have(tiny_clip):
    method = coprompt(tiny_clip)
    assert method.bank.shape == (2, len(NAMES), tiny_clip.embed_dim)  # the pug has two
    generator = torch.Generator().manual_seed(0)
    drawn = {method.sentence(Batch(generator=generator)) for _ in range(20)}
    assert drawn == {0, 1}
    method.set_classes(["pug"])
    assert method.bank.shape[1] == 1
    method.set_classes(["pug", "heron"])  # at test it needs no sentence
    assert method.logits(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(InputError, match="no sentences about 'heron'"):
        method.bank.sum()


def test_without_consistency_and_adapters_it_is_maple(tiny_clip):
    options = {"n_ctx": 2, "depth": 2}
    bare = coprompt(tiny_clip, lam=0.0, image_ratio=0.0, text_ratio=0.0, depth=2)
    maple = build("maple", tiny_clip, NAMES, **options).train()
    batch = batch_for(bare)
    plain = replace(batch, images=batch.views[:, 0], views=None)
    torch.testing.assert_close(bare.loss(batch), maple.loss(plain))
    method = coprompt(tiny_clip, depth=2)
    assert not torch.allclose(method.logits(plain), maple.logits(plain))
    with pytest.raises(InputError, match="two views of each image"):
        method.train().loss(plain)


def test_views_are_two_draws_of_one_image(tiny_clip):
    method = coprompt(tiny_clip)
    wide = torch.randint(0, 256, (3, 40, 90), dtype=torch.uint8)
    views = method.views([wide] * 12, torch.Generator().manual_seed(0))
    assert views.shape == (12, 2, 3, 32, 32)
    assert sum(not torch.equal(a, b) for a, b in views) >= 10
    again = method.views([wide] * 12, torch.Generator().manual_seed(0))
    assert torch.equal(views, again)


def test_operations_have_their_strength(tiny_clip, monkeypatch):
    """Of single operations on known pixels, by the rules of RandAugment at 10 of 30."""
    import numpy as np
    from PIL import Image

    pixels = np.random.RandomState(0).randint(0, 256, (224, 224, 3), dtype=np.uint8)
    image, first, second = Image.fromarray(pixels), (0.9, 0, 0), (0.1, 0.5, 0.5)

    def made(name, random=first):
        return np.asarray(OPERATIONS[name](image, random)).astype(int)

    old = pixels.astype(int)
    assert np.array_equal(made("posterize"), old & 0b11111000)
    assert np.array_equal(made("solarize"), np.where(old < 256 / 3, old, 255 - old))
    lighter = (old + 110 / 3).clip(0, 255).astype(np.uint8).astype(int)
    assert np.array_equal(
        made("solarize_add"), np.where(lighter < 128, lighter, 255 - lighter)
    )
    assert np.array_equal(made("invert"), 255 - old)
    assert abs(made("brightness") - 0.7 * old).max() <= 1
    for random, sign in ((first, -1), (second, 1)):
        shift = 33  # of 33.3 pixels, nearest
        moved = made("translate_x", random)
        inside = slice(shift, -shift - 1)
        target = np.roll(old, -sign * shift, axis=1)
        assert np.array_equal(moved[:, inside], target[:, inside])
    grey = (made("cutout", second) == (125, 123, 114)).all(-1)
    assert 13 * 13 <= grey.sum() <= 15 * 15 and grey[112, 112]
    assert len(OPERATIONS) == 16

    calls = []
    for name, operation in OPERATIONS.items():
        monkeypatch.setitem(
            OPERATIONS,
            name,
            lambda x, u, o=operation, n=name: calls.append(n) or o(x, u),
        )
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        augmented(torch.zeros(3, 8, 8, dtype=torch.uint8), tiny_clip, generator)
    assert len(calls) == 400 and set(calls) == set(OPERATIONS)
    pairs = set(zip(calls[::2], calls[1::2], strict=True))
    assert any(a == b for a, b in pairs)  # with replacement


def test_sentences_come_from_the_dataset_or_a_warning(tiny_clip):
    toys = toy_dataset(tiny_clip)
    told = replace(toys, descriptions={name: [f"one {name}"] for name in NAMES})
    plan = Recipe(epochs=2, batch_size=10, lr=0.01, augment=False)
    method = build("coprompt", tiny_clip, NAMES, n_ctx=2)
    method.aim(told)
    history = fit(method, told, plan, progress=False)
    assert history.steps == 4
    expected = F.normalize(tiny_clip.encode_text([f"one {n}" for n in NAMES]), dim=-1)
    torch.testing.assert_close(method.bank[0], expected, rtol=1e-4, atol=1e-5)
    method.aim(toys)
    with pytest.warns(UserWarning, match="nothing is said about the classes of toy"):
        fit(method, toys, plan, progress=False)


def test_published_settings():
    flowers = recipe(
        "coprompt", Setting("base-to-new", "oxford_flowers", profile="full")
    )
    assert flowers.hparams == {"n_ctx": 4, "lam": 8.0, "depth": 9}
    food = recipe("coprompt", Setting("base-to-new", "food101", profile="full"))
    assert food.epochs == 5 and food.hparams["lam"] == 0.5
    sun = recipe("coprompt", Setting("base-to-new", "sun397", profile="full"))
    assert "depth" not in sun.hparams and sun.lr == 0.0035
    options = {"DISTILL": "kl", "prompt_depth": 9, "ctx_init": "a photo of a"}
    ours = CoPrompt.official_hparams(options)
    assert ours == {"consistency": "mse", "depth": 9, "init": "a photo of a"}


def test_phrases_of_the_mini_world_become_sentences_that_name_their_class():
    pets = load_dataset("pets")
    name = pets.classnames[0]
    first = f"a photo of a {name}, a type of pet with {pets.descriptions[name][0]}."
    assert sentences_of(pets)[name][0] == first
    whole = replace(pets, descriptions={name: [f"The {name} sleeps."]})
    assert sentences_of(whole) == whole.descriptions
    real = replace(pets, world="real")
    assert sentences_of(real) == pets.descriptions
    assert sentences_of(None) == {}
