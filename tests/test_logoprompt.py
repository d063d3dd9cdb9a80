"""What LoGoPrompt promises: names written into images, a loss and a choice between
them.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.errors import InputError
from promptkit.export import Deployed
from promptkit.lettering import colours, written
from promptkit.method import Batch
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import fit

QUICK = Recipe(epochs=2, batch_size=10, lr=0.05, augment=False)
TWICE = replace(QUICK, stages=(replace(QUICK, epochs=3, lr=0.02),))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def logoprompt(clip, names=NAMES, **options):
    return build("logoprompt", clip, names, **options)


def batch_for(clip, n=6):
    dataset = toy_dataset(clip)
    rows = torch.arange(0, 3 * n, 3)
    images = clip.normalize(dataset.train.images(rows).float() / 255)
    generator = torch.Generator().manual_seed(2)
    return Batch(images=images, labels=dataset.train.labels[rows], generator=generator)


def probabilities(method, images):
    image = F.normalize(method.clip.encode_image(images), dim=-1)
    text = F.normalize(method.text_features(), dim=-1)
    return (method.clip.logit_scale * image @ text.T).softmax(-1)


def pasted(method, images, generator=None):
    """Every image with every class's name, by hand: (B, C, 3, S, S)."""
    places = method.places(images, generator)
    blocks = method.blocks(torch.arange(len(method.classnames)), generator)
    height, width = method.size
    x = images[:, None].repeat(1, len(blocks), 1, 1, 1)
    for b, (top, left) in enumerate(places.tolist()):
        x[b, :, :, top : top + height, left : left + width] = blocks
    return x


def test_the_loss_sets_the_right_name_against_hard_ones(tiny_clip):
    for k in (1, 2, 9):
        method = logoprompt(tiny_clip, k=k).train()
        batch = batch_for(tiny_clip)
        places, made = method.places(batch.images, batch.generator), {}
        method.places = lambda images, generator, p=places: p
        method.blocks = lambda classes, generator, m=method: m.__class__.blocks(
            m, classes
        )
        loss = method.loss(batch)
        loss.backward()
        method.blocks = lambda classes, generator, m=method: m.__class__.blocks(
            m, classes
        )
        x = pasted(method, batch.images, batch.generator)
        p, total = probabilities(method, batch.images), 0
        for b, y in enumerate(batch.labels.tolist()):
            own = probabilities(method, x[b]).diagonal()
            others = [c for c in p[b].argsort(descending=True).tolist() if c != y][:k]
            below = sum(torch.maximum(p[b, c], own[c]) for c in others)
            total = total - (torch.minimum(p[b, y], own[y]) / below).log()
            made[b] = len(others)
        assert set(made.values()) == {min(k, len(NAMES) - 1)}
        torch.testing.assert_close(loss, total / len(p), rtol=1e-3, atol=1e-4)


def test_the_best_guesses_are_tried_with_their_names(tiny_clip, monkeypatch):
    images, passes = batch_for(tiny_clip).images, []
    method = logoprompt(tiny_clip, k=2)
    p = probabilities(method, images)
    x = pasted(method, images)
    own = torch.stack([probabilities(method, each).diagonal() for each in x])
    top = p.topk(2).indices
    expected = p.scatter(1, top, torch.maximum(p, own).gather(1, top))
    image = type(tiny_clip).image
    monkeypatch.setattr(
        type(tiny_clip),
        "image",
        lambda *a, **k: passes.append(len(a[1])) or image(*a, **k),
    )
    logits = method.logits(images)
    torch.testing.assert_close(logits.exp(), expected, rtol=1e-3, atol=1e-5)
    assert sum(passes) == len(images) * (1 + 2)
    assert all(label in row for label, row in zip(logits.argmax(1), top, strict=True))
    passes.clear()  # what was encoded is found again, by another method too
    again = logoprompt(tiny_clip, k=2, seed=5)
    assert torch.equal(again.logits(images), logits) and sum(passes) == len(images)
    passes.clear()
    logoprompt(tiny_clip, k=2, place="top").logits(images)
    assert sum(passes) == len(images) * (1 + 2)


def test_many_names_are_encoded_in_chunks(tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr("promptkit.lettering.CHUNK", 4)
    images = batch_for(tiny_clip).images
    method, whole = logoprompt(tiny_clip), logoprompt(tiny_clip)
    whole.keep = False
    torch.testing.assert_close(
        method.logits(images), whole.logits(images), rtol=1e-4, atol=1e-4
    )
    assert "names in images" in capsys.readouterr().err


def test_a_place_follows_from_the_image(tiny_clip):
    images = batch_for(tiny_clip).images
    method = logoprompt(tiny_clip, height=6, width=9)
    places = method.places(images)
    assert len({tuple(place) for place in places.tolist()}) > 1
    for n, image in enumerate(images):
        assert torch.equal(method.places(image[None])[0], places[n])
    assert (
        (places >= 0).all()
        and (places[:, 0] <= 26).all()
        and (places[:, 1] <= 23).all()
    )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([method.places(images, generator) for _ in range(60)])
    assert drawn.amin(0).tolist() == [0, 0] and drawn.amax(0).tolist() == [26, 23]
    for place, expected in [("top", [0, 0]), ("bottom", [26, 23])]:
        fixed = logoprompt(tiny_clip, height=6, width=9, place=place)
        assert fixed.places(images).tolist() == [expected] * len(images)
        assert fixed.places(images, generator).tolist() == [expected] * len(images)


def test_names_are_written_inside_and_large():
    names = ["pug", "polka-dotted", "707-320", "hard-leaved pocket orchid", "É", "i",
             "2012 Ferrari FF Coupe", "a b c d e f g", "x" * 90]  # fmt: skip
    for height, width in [(32, 224), (32, 32), (5, 32), (1, 1), (64, 20)]:
        for name in names:
            mask = written(name, height, width)
            assert mask.shape == (1, height, width) and mask.dtype == torch.uint8
            assert mask.float().mean() > 0, (name, height, width)
    band = written("pug", 32, 224)[0] > 128
    rows, columns = band.any(1).nonzero(), band.any(0).nonzero()
    assert rows.max() - rows.min() >= 24  # it fills the height,
    assert abs(columns.min() - (223 - columns.max())) <= 1  # and is centred
    square = written("fire truck", 32, 32)[0] > 100
    assert (~square[14:18].any(1)).any()  # two lines where that is larger
    assert not torch.equal(written("cat", 32, 224), written("cot", 32, 224))
    assert torch.equal(written("cat", 32, 224), written("cat", 32, 224))


def test_two_colours_that_can_be_told_apart(tiny_clip):
    drawn = colours(500, torch.Generator().manual_seed(0))
    light = drawn @ torch.tensor([0.299, 0.587, 0.114])
    assert ((light[:, 0] - light[:, 1]).abs() >= 0.4).all() and len(
        drawn.unique()
    ) > 900
    method = logoprompt(tiny_clip, height=32)
    pixels = tiny_clip.denormalize(method.blocks(torch.arange(len(NAMES))))
    for c in range(len(NAMES)):
        ink, ground = method.fixed[c]
        letters = method.letters[c, 0]
        assert torch.allclose(pixels[c][:, letters == 0].mT, ground, atol=1e-4)
        assert torch.allclose(pixels[c][:, letters == 1].mT, ink, atol=1e-4)
    method.set_classes(["pug", *NAMES[:2]])  # the colours of a name are its own
    again = method.blocks(torch.tensor([0, 1]))
    expected = logoprompt(tiny_clip, height=32).blocks(torch.tensor([4, 0]))
    assert torch.equal(again, expected)
    generator = torch.Generator().manual_seed(0)
    other = method.blocks(torch.tensor([0, 0]), generator)
    assert torch.equal(*other) and not torch.equal(other[0], again[0])


def test_the_bounded_loss_is_no_gain_below_zero(tiny_clip):
    batch = batch_for(tiny_clip)
    free, bounded = (
        logoprompt(tiny_clip, bounded=b).train() for b in (False, True)
    )  # fmt: skip
    image, text = free.features(batch)
    ours = []
    for method in (free, bounded):
        batch.generator.manual_seed(4)
        ours.append(method.losses(batch, image, text))
    torch.testing.assert_close(ours[1], F.softplus(ours[0]), rtol=1e-4, atol=1e-5)
    one = logoprompt(tiny_clip, ["pug"]).train()
    batch.labels = torch.zeros_like(batch.labels)
    assert one.backward(batch) == 0


def test_contexts_of_classes_follow_in_two_stages(tiny_clip, tmp_path):
    dataset = toy_dataset(tiny_clip)
    options = {"n_ctx": 3, "init": "", "class_specific": True}
    method = logoprompt(tiny_clip, **options)
    shared = method.context.vectors.detach().clone()
    start = method.vectors()  # the network's last layer is zero
    torch.testing.assert_close(start, shared.expand(len(NAMES), -1, -1))
    fit(method, dataset, QUICK, progress=False)
    made = method.vectors().detach().clone()
    assert not method.tuned and not torch.allclose(made[0], made[1])
    once = {name: p.clone() for name, p in method.make.state_dict().items()}

    both = logoprompt(tiny_clip, **options)
    history = fit(both, dataset, TWICE, progress=False)
    assert history.steps == 4 + 6 and both.tuned
    for name, p in both.make.state_dict().items():
        assert torch.equal(p, once[name])  # the second stage leaves it alone
    tuned = both.vectors().detach()
    assert torch.equal(tuned, both.own) and not torch.allclose(tuned, made)
    still = replace(QUICK, stages=(replace(QUICK, epochs=1, warmup_lr=0.0),))
    resting = logoprompt(tiny_clip, **options)
    fit(resting, dataset, still, progress=False)
    assert resting.tuned  # it starts from what the network makes
    torch.testing.assert_close(resting.vectors().detach(), made)
    loaded = load_method(both.save(tmp_path / "m.safetensors"), tiny_clip)
    for each in (both, loaded):
        each.set_classes(["teapot", "pug", "red square"])
        new = each.vectors()
        assert torch.equal(new[1], tuned[4]) and torch.equal(new[2], tuned[0])
        expected = each.context.vectors + each.make(each.plain).view(3, 3, -1)
        torch.testing.assert_close(new[0], expected[0])
    with pytest.raises(InputError, match="made for 5 classes: build it with the 3"):
        fit(both, replace(dataset, classnames=both.classnames), QUICK, progress=False)


def test_names_are_encoded_once_where_images_are_not_augmented(tiny_clip, monkeypatch):
    method, passes = logoprompt(tiny_clip), []
    image = type(tiny_clip).image
    monkeypatch.setattr(
        type(tiny_clip),
        "image",
        lambda *a, **k: passes.append(len(a[1])) or image(*a, **k),
    )
    fit(method, toy_dataset(tiny_clip), replace(QUICK, epochs=8), progress=False)
    images = 20  # of 5 classes, all of which are tried
    assert sum(passes) == images + images * 5
    passes.clear()
    fit(method, toy_dataset(tiny_clip), replace(QUICK, augment=True), progress=False)
    assert sum(passes) == 2 * images * (1 + 5)  # drawn anew at every step


def test_one_context_has_one_stage(tiny_clip):
    method = logoprompt(tiny_clip)
    assert fit(method, toy_dataset(tiny_clip), TWICE, progress=False).steps == 4


def test_what_is_refused(tiny_clip):
    for options, message in [
        ({"k": 0}, "k must be at least 1"),
        ({"height": 33}, "height must be from 1 to the 32 pixels"),
        ({"n_ctx": 16}, "n_ctx must be the number of words"),
        ({"place": "left"}, "place must be one of"),
    ]:
        with pytest.raises(InputError, match=message):
            logoprompt(tiny_clip, **options)
    with pytest.raises(InputError, match="logoprompt cannot be exported"):
        Deployed(logoprompt(tiny_clip))
    with pytest.raises(InputError, match="holds none"):
        logoprompt(tiny_clip).logits(Batch(features=torch.randn(2, 24)))


def test_the_papers_settings():
    few = recipe("logoprompt", Setting("few-shot", "dtd", 16, "full"))
    assert few.hparams == {"init": "", "n_ctx": 16, "class_specific": True}
    assert (few.epochs, few.stages[0].epochs) == (200, 200)
    assert few.stages[0].lr == pytest.approx(0.0002)
    asked = {"class_specific": False}
    new = recipe("logoprompt", Setting("base-to-new", "imagenet", hparams=asked))
    assert not new.stages and new.hparams["init"] == "a photo of a"
