"""Controls differ from their methods in the one thing that they say."""

import pytest
import torch
import torch.nn.functional as F

from promptkit.clip import zero_shot_features
from promptkit.controls.plain_map import PlainMap
from promptkit.methods.qnet import Coupler
from promptkit.recipe import PROTOCOLS, Setting
from promptkit.registry import _known, build, methods, recipe, specs
from promptkit.testing import PROMISES, toy_dataset
from promptkit.train import reader

CONTROLS = sorted(set(_known()) - set(methods()))
NAMES = ["red square", "green_circle", "blue star"]


def batch_of(method, dataset):
    read = reader(
        method, dataset.train, torch.Generator(), recipe(method.name, Setting())
    )
    return read(torch.arange(len(dataset.train)))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", CONTROLS)
def test_promise(name, promise, tiny_clip, tmp_path):
    promise(name, tiny_clip, tmp_path)


def test_controls_are_known_and_not_listed():
    known = {"described", "distilled", "misled", "retold", "uncoupled"}
    known |= {"plain_map", "plates", "unperturbed"}
    assert known <= set(CONTROLS)
    assert not set(CONTROLS) & set(specs())
    for name in CONTROLS:
        for protocol in PROTOCOLS:
            hparams = recipe(name, Setting(protocol, "eurosat", profile="full")).hparams
            _known()[name].check(hparams)


def test_distillation_adds_the_divergence_to_the_loss(tiny_clip):
    data = toy_dataset(tiny_clip, NAMES)
    grads = {}
    for name, more in (("prograd", {"lam": 0.0}), ("distilled", {"alpha": 0.5})):
        method = build(name, tiny_clip, NAMES, **more).train()
        batch = batch_of(method, data)
        method.backward(batch)
        grads[name] = method.context.vectors.grad
    _, (domain,), (general,) = build("prograd", tiny_clip, NAMES).gradients(batch)
    torch.testing.assert_close(grads["prograd"], domain)
    torch.testing.assert_close(grads["distilled"], domain + 0.5 * general)


def test_without_sharing_the_gradients_of_the_towers_stay_apart(tiny_clip):
    data = toy_dataset(tiny_clip, NAMES)
    made = {
        n: build(n, tiny_clip, NAMES, depth=2, seed=1) for n in ("maple", "uncoupled")
    }
    losses = {n: m.train().backward(batch_of(m, data)) for n, m in made.items()}
    torch.testing.assert_close(losses["maple"], losses["uncoupled"])
    shared, apart = made["maple"], made["uncoupled"]
    for p, text, image in zip(
        [shared.context.vectors, *shared.deep],
        [apart.context.vectors, *apart.deep],
        apart.own,
        strict=True,
    ):
        assert image.grad.any() and text.grad.any()
        torch.testing.assert_close(p.grad, text.grad + image.grad, rtol=1e-3, atol=1e-6)


def test_described_classes_have_their_sentences_mean_and_others_their_template(
    tiny_clip,
):
    said = {"Red_Square": ["a red shape.", "four corners."], "nothing": ["a void."]}
    method = build("described", tiny_clip, NAMES, descriptions=said)
    plain = build("clip", tiny_clip, NAMES).text_features()
    rows = F.normalize(tiny_clip.encode_text(said["Red_Square"]), dim=-1)
    features = method.text_features()
    torch.testing.assert_close(features[0], F.normalize(rows.mean(dim=0), dim=-1))
    torch.testing.assert_close(features[1:], plain[1:])


def test_what_is_retold_of_a_class(tiny_clip):
    said = {
        "red square": ["a red square with corners."],
        "green_circle": ["a green circle.", "a green circle, round and whole."],
        "blue star": ["a blue star with spikes."],
    }

    def pairs(told):
        method = build("retold", tiny_clip, NAMES, told=told, descriptions=said)
        method.taken["templates"] = ["a photo of a {}."]
        return method.pairs()

    swapped = [
        (0, "a red square."),
        (0, "a red square, round and whole."),
        (1, "a green circle with spikes."),
        (2, "a blue star with corners."),
    ]
    assert pairs("swapped") == swapped
    assert pairs("longest")[1] == (1, "a green circle, round and whole.")
    named = [
        (c, f"a photo of a {name.replace('_', ' ')}.") for c, name in enumerate(NAMES)
    ]
    assert pairs("templates") == named


def test_misled_classes_have_the_sentences_of_the_next(tiny_clip):
    said = {"red square": ["a."], "green_circle": ["b.", "c."], "blue star": ["d."]}
    true, there = build("aape", tiny_clip, NAMES, descriptions=said).references
    other, kept = build("misled", tiny_clip, NAMES, descriptions=said).references
    torch.testing.assert_close(other, true[[1, 2, 0]])
    assert kept.tolist() == there[[1, 2, 0]].tolist()


def test_without_perturbations_frozen_clip_reads_what_the_learner_reads(tiny_clip):
    data = toy_dataset(tiny_clip, NAMES)
    made = {
        n: build(n, tiny_clip, NAMES, n_ctx=2, seed=1)
        for n in ("coprompt", "unperturbed")
    }
    images = data.train.images()[:3]
    views = {
        n: m.views(images, torch.Generator().manual_seed(5)) for n, m in made.items()
    }
    first = views["coprompt"][:, 0]
    assert not torch.equal(first, views["coprompt"][:, 1])
    for k in (0, 1):
        torch.testing.assert_close(views["unperturbed"][:, k], first)
    expected = zero_shot_features(tiny_clip, NAMES, "a photo of a {}.")
    torch.testing.assert_close(made["unperturbed"].bank[0], expected)
    kept = build("unperturbed", tiny_clip, NAMES, second_view=True)
    again = kept.views(images, torch.Generator().manual_seed(5))
    torch.testing.assert_close(again, views["coprompt"])
    torch.testing.assert_close(kept.bank[0], expected)


def test_plain_maps_start_as_large_as_quaternion_layers():
    D, Dv = 256, 192
    torch.manual_seed(0)
    x = torch.randn(64, D)
    layer = Coupler(D, Dv, "imaginary", "none")
    made = {None: PlainMap(D, Dv, None), 54: PlainMap(D, Dv, 54)}
    expected = layer(x).std().item()
    for plain in made.values():
        assert plain(x).std().item() == pytest.approx(expected, rel=0.1)
        assert not plain.bias.any()
    weights = {rank: sum(f.numel() for f in m.factors) for rank, m in made.items()}
    assert weights[None] == D * Dv
    assert weights[54] == pytest.approx(D * Dv / 2, rel=0.02)


def test_plates_cover_the_lowest_third_in_two_colours(tiny_clip):
    method, side = build("plates", tiny_clip, NAMES), tiny_clip.image_size
    plate = method.blocks(torch.arange(3))
    assert plate.shape == (3, 3, side // 3, side)
    images = torch.zeros(2, 3, side, side)
    assert method.places(images).tolist() == [[side - side // 3, 0]] * 2
    drawn = method.blocks(torch.arange(3), torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, plate)
    assert 0 < method.letters.mean() < 1 and method.letters[0].std() > 0
    ink, ground = method.fixed.unbind(1)
    assert ((ink - ground).abs().amin(dim=1) > 0.4).all()
