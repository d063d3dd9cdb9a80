"""The weak detectors: the mixture that they choose, and how it is found."""

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import base_new, transform
from promptkit.errors import InputError
from promptkit.export import Deployed, export_program
from promptkit.method import Batch
from promptkit.methods.weak_detectors import WeakDetectors, separations
from promptkit.recipe import Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import accuracy


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def batch(tiny_clip):
    images = transform(tiny_clip, toy_dataset(tiny_clip).train.images())
    return Batch(images=images)


def made(clip, name="coop", **options):
    """Over a host whose parameters are far from where they started."""
    method = build(f"weak_detectors({name})", clip, NAMES, **options).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.host.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return method


DETECTORS = ("msp", "entropy", "energy", "energy_twice")


@pytest.mark.parametrize("host", ["coop", "cocoop"])
@pytest.mark.parametrize("detector", [*DETECTORS, "constant"])
def test_the_mixture_is_that_of_the_mixed_class_features(
    tiny_clip, batch, host, detector
):
    """(B, C, E) of them, each normalised after it is mixed."""
    sharpness = 0.3 if detector == "constant" else 5.0
    method = made(tiny_clip, host, detector=detector, sharpness=sharpness)
    with torch.no_grad():
        image, text = method.features(batch)
        done = method.compete(image, text)
    f = F.normalize(image, dim=-1)
    zero = tiny_clip.encode_text([f"a photo of a {n}." for n in method.classnames])
    torch.testing.assert_close(method.zero_shot, zero)
    s = done.weight
    if detector == "constant":
        assert torch.equal(s, torch.full_like(s, 0.3))
    else:
        assert s.std() > 0 or detector == "energy_twice"
        gap = 5 * (method.detect(done.tuned_logits) - method.detect(done.zero_logits))
        torch.testing.assert_close(s, 1 / (1 + torch.exp(-gap)))
    mixed = (1 - s)[:, None, None] * zero + s[:, None, None] * text
    expected = 100 * (F.normalize(mixed, dim=-1) @ f[:, :, None]).squeeze(-1)
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-3, atol=1e-3)


def test_detectors_by_hand(tiny_clip):
    method = made(tiny_clip)
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    p = logits.softmax(-1)
    ln3 = torch.tensor(3.0).log()
    energy = logits.exp().sum(-1).log() / (ln3 + 100)
    expected = {
        "msp": p.max(-1).values,
        "entropy": (p * p.log()).sum(-1) / ln3,
        "energy": energy,
        "energy_twice": energy / 100,
    }
    for name in DETECTORS:
        found = method.detect(logits, name)
        torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-4)
        assert found[0] > found[1]  # the first is the surer
    alone = method.detect(logits[:, :1], "entropy")
    assert alone.isfinite().all()


def test_its_ends_are_the_host_and_clip(tiny_clip, batch):
    """At sigma 1 and 0, also where logits are mixed; a large W chooses the surer."""
    for host in ("coop", "maple", "dept(coop)"):
        one = made(tiny_clip, host, detector="constant", sharpness=1.0)
        torch.testing.assert_close(
            one.logits(batch), one.host.logits(batch), rtol=1e-4, atol=1e-3
        )
        none = made(tiny_clip, host, detector="constant", sharpness=0.0)
        clip = build("clip", tiny_clip, NAMES, template="a photo of a {}.")
        torch.testing.assert_close(
            none.logits(batch), clip.logits(batch), rtol=1e-4, atol=1e-3
        )
    hard = made(tiny_clip, sharpness=1e9)
    done = hard.compete(*hard.features(batch))
    logits, tuned = hard.logits(batch), done.weight > 0.5
    ends = torch.where(tuned[:, None], done.tuned_logits, done.zero_logits)
    torch.testing.assert_close(logits, ends.detach(), rtol=1e-4, atol=1e-3)
    assert 0 < tuned.sum() < len(tuned)


@pytest.mark.parametrize("host", ["maple", "dept(cocoop)", "dept(maple)"])
def test_over_a_host_whose_features_cannot_be_mixed(tiny_clip, batch, host):
    """z' is CLIP's, of its own features; the logits are mixed."""
    method = made(tiny_clip, host, sharpness=8.0)
    assert not method.mixes_features
    assert "features" in (method.reads_at_test or method.reads).split("+")
    z = method.host.logits(batch)
    f = F.normalize(tiny_clip.encode_image(batch.images), dim=-1)
    zero = 100 * f @ F.normalize(method.zero_shot, dim=-1).T
    s = torch.sigmoid(8 * (z.softmax(-1).amax(-1) - zero.softmax(-1).amax(-1)))[:, None]
    expected = (1 - s) * zero + s * z
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-3, atol=1e-3)


def test_it_is_the_outermost_where_it_mixes_logits(tiny_clip, batch):
    with pytest.raises(InputError, match=r"cannot extend weak_det.*maple.*encode\(\)"):
        build("dept(weak_detectors(maple))", tiny_clip, NAMES)
    inner = build("dept(weak_detectors(coop))", tiny_clip, NAMES)  # mixes features
    assert inner.logits(batch).shape == (len(batch), len(NAMES))


def test_training_is_the_hosts(tiny_clip, batch):
    batch.labels = toy_dataset(tiny_clip).train.labels
    for host in ("coop", "maple", "kgcoop"):
        method = made(tiny_clip, host).train()
        losses = method.loss(batch), method.host.loss(batch)
        assert torch.equal(*losses)
        assert method.n_parameters == method.host.n_parameters


def test_templates(tiny_clip, tmp_path):
    """The host's own where it has one, as the published code of each; else the
    dataset's; else what was asked for.
    """
    dataset = toy_dataset(tiny_clip)
    pets = dataset.__class__(**{**vars(dataset), "name": "oxford_pets"})
    said = {
        "coop": "a photo of a {}, a toy.",
        "kgcoop": "a photo of a {}, a type of pet.",
        "prograd": "a type of pet, a photo of a {}.",  # its recipe's
    }
    asked = {"prograd": {"template": said["prograd"]}}
    for host, template in said.items():
        method = made(tiny_clip, host, host=asked.get(host, {}))
        method.aim(pets)
        texts = [template.replace("{}", name) for name in method.classnames]
        torch.testing.assert_close(method.zero_shot, tiny_clip.encode_text(texts))
        loaded = load_method(method.save(tmp_path / f"{host}.safetensors"), tiny_clip)
        assert loaded.template == method.template
        given = made(tiny_clip, host, template="my {}.")
        given.aim(pets)
        assert given.template == "my {}."


def test_separations(tiny_clip):
    """50 where both halves are alike, as AUROC counts pairs by hand elsewhere."""
    dataset = toy_dataset(tiny_clip)
    method = made(tiny_clip)
    method.aim(dataset)
    same = separations(method, dataset, toy_dataset(tiny_clip))
    assert same == pytest.approx(dict.fromkeys(("msp", "entropy", "energy"), 50.0))
    base, new = base_new(dataset)
    found, gaps = separations(method, base, new), []
    for part in (base, new):
        method.aim(part)
        images = transform(tiny_clip, part.test.images())
        done = method.compete(*method.features(Batch(images=images)))
        gaps.append((done.tuned_score - done.zero_score).detach())
    wins = (gaps[0][:, None] > gaps[1]).double()
    wins += 0.5 * (gaps[0][:, None] == gaps[1])
    assert found["msp"] == pytest.approx(100 * wins.mean().item())
    assert 0 <= accuracy(method, new.test) <= 100


def test_it_is_exported_like_its_host(tiny_clip, batch):
    for host in ("coop", "maple"):
        method = made(tiny_clip, host)
        expected = method.logits(batch)
        for network in (Deployed(method), export_program(method).module()):
            torch.testing.assert_close(
                network(batch.images), expected, rtol=1e-4, atol=1e-3
            )
    with pytest.raises(InputError, match="each image has its own"):
        Deployed(made(tiny_clip, "cocoop"))


def test_published_options(tiny_clip):
    make = WeakDetectors.from_official
    options = {"base": "KGCOOP", "n_ctx": 16, "csc": False, "dataset": "OxfordPets"}
    kg = make(tiny_clip, NAMES, options | {"mode": "alpha_4"})
    assert kg.host.context.length == 4 and (kg.detector, kg.sharpness) == ("entropy", 4)
    assert kg.template == "a photo of a {}, a type of pet."
    options |= {"base": "COOP", "class_token_position": "front", "mode": "SOFTmsp_8"}
    coop = make(tiny_clip, NAMES, options | {"dataset": "DescribableTextures"})
    assert coop.host.context.position == "front" and coop.host.context.length == 16
    assert coop.template == "{} texture."
    grad = make(tiny_clip, NAMES, {"base": "PROGRAD", "dataset": "Food101"})
    assert grad.template == "a type of food, a photo of {}."
    # the context and the name alone, without words of a template between them
    pets = {"base": "PROGRAD", "n_ctx": 4, "dataset": "OxfordPets"}
    for csc in (False, True):
        context = make(tiny_clip, NAMES, pets | {"csc": csc}).host.context
        assert context.class_specific == csc and not context._extra
    words = make(tiny_clip, NAMES, pets | {"n_ctx": 16, "ctx_init": True})
    assert len(words.host.context._extra) == 1  # eight words are nine tokens
    for wrong in ({"base": "maple"}, {"mode": "SOFTmax_3"}, {"odd": 1}):
        with pytest.raises(InputError, match="unknown"):
            make(tiny_clip, NAMES, wrong)
    over = recipe("weak_detectors(coop)", Setting("base-to-new", profile="full"))
    assert (over.hparams, over.epochs) == ({"host": {"n_ctx": 16}}, 50)
    with pytest.raises(InputError, match="template must be a sentence with {}"):
        made(tiny_clip, template="a photo")
