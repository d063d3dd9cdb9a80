"""What every registered method promises; a new method is tested here without a
change.
"""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from test_train import NAMES, toy_dataset

from promptkit.clip import FrozenCLIP
from promptkit.data import transform
from promptkit.errors import InputError
from promptkit.method import Batch, Method
from promptkit.recipe import Setting
from promptkit.registry import build, load_method, methods, recipe, specs
from promptkit.train import accuracy, fit

SPECS = specs()
pytestmark = pytest.mark.parametrize("spec", SPECS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tiny_clip_bf16(tiny_clip):
    return FrozenCLIP(
        copy.deepcopy(tiny_clip.model), tiny_clip.tokenizer, precision="bf16"
    )


def make(spec, clip, names=NAMES, seed=0, **hparams):
    return build(spec, clip, names, seed=seed, **hparams)


def batch_of(dataset, clip, n=None):
    images = transform(clip, dataset.train.images())[:n]
    return Batch(
        images=images,
        labels=dataset.train.labels[:n],
        features=clip.encode_image(images),
        generator=torch.Generator().manual_seed(0),
    )


def learns(method):
    return method.n_parameters > 0


def few_steps(spec, clip, dataset, seed=1, epochs=25):
    """The paper's own optimizer and rate on all images at once, without
    augmentation.
    """
    ours = recipe(spec, Setting(dataset=dataset.name, shots=4, profile="full"))
    changes = {
        "epochs": epochs,
        "batch_size": len(dataset.train),
        "warmup_epochs": 0,
        "augment": False,
    }
    method = make(spec, clip, dataset.classnames)
    return method, fit(method, dataset, replace(ours, **changes), seed, progress=False)


def test_describes_itself(spec):
    cls = methods()[spec.partition("(")[0]]
    assert (
        cls.__module__ == f"promptkit.methods.{cls.name}"
        and cls.title
        and cls.kind
        and cls.__doc__
    )
    assert 2020 < cls.year < 2030 and cls.paper.replace(".", "").isdigit()
    for protocol in (
        "few-shot",
        "base-to-new",
        "cross-dataset",
        "domain-generalization",
    ):
        ours = recipe(spec, Setting(protocol, profile="full"))
        host = {"host": Method.__new__(Method)} if cls.plugin else {}
        cls.check(ours.hparams | host)


def test_trains(spec, tiny_clip):
    """The loss falls, only the method's own parameters change, and CLIP's never do."""
    dataset = toy_dataset(tiny_clip)
    frozen = {name: p.detach().clone() for name, p in tiny_clip.named_parameters()}
    start = make(spec, tiny_clip)
    method, history = few_steps(spec, tiny_clip, dataset)
    if learns(method):
        assert history.losses[-1] < history.losses[0]
        before, after = dict(start.named_parameters()), dict(method.named_parameters())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(p.dtype == torch.float32 for p in after.values())
    else:
        assert history.steps == 0
    assert all(torch.equal(frozen[name], p) for name, p in tiny_clip.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in tiny_clip.parameters())
    assert not {id(p) for p in method.parameters()} & {
        id(p) for p in tiny_clip.parameters()
    }
    assert not any("clip." in name for name in method.state_dict())
    assert 0 <= accuracy(method, dataset.test) <= 100


def test_saves_and_loads(spec, tiny_clip, tmp_path):
    dataset = toy_dataset(tiny_clip)
    method, _ = few_steps(spec, tiny_clip, dataset, epochs=2)
    batch = batch_of(dataset, tiny_clip)
    path = method.save(tmp_path / "new" / "method.safetensors")
    loaded = load_method(path, tiny_clip)
    assert (
        type(loaded) is type(method)
        and loaded.hparams == method.hparams
        and loaded.spec == spec
    )
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["promptkit"])
    assert (
        config["clip"]["fingerprint"] == tiny_clip.fingerprint
        and config["hparams"] == method.hparams
    )

    config["clip"]["fingerprint"] = "0" * 64
    data = path.read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(
        data.replace(tiny_clip.fingerprint.encode(), b"0" * len(tiny_clip.fingerprint))
    )
    with pytest.raises(InputError, match="trained on the weights"):
        load_method(other, tiny_clip)
    damaged = [data[: len(data) // 2], b"", b"not a file of weights"]
    if learns(method):
        damaged.append(data[:-1] + bytes([data[-1] ^ 1]))
    for content in damaged:
        other.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_method(other, tiny_clip)
    with pytest.raises(InputError, match="no method file"):
        load_method(tmp_path / "nothing", tiny_clip)


def test_re_aims_at_other_classes(spec, tiny_clip):
    dataset, new = toy_dataset(tiny_clip), ["teapot", "sea_lion"]
    method, _ = few_steps(spec, tiny_clip, dataset, epochs=2)
    batch = batch_of(dataset, tiny_clip)
    before = method.logits(batch)
    learned = {name: p.detach().clone() for name, p in method.named_parameters()}
    method.set_classes(new)
    assert method.classnames == ["teapot", "sea lion"]
    assert method.logits(batch).shape == (len(batch), 2)
    assert all(torch.equal(learned[name], p) for name, p in method.named_parameters())
    method.set_classes(NAMES)
    assert torch.equal(method.logits(batch), before)
    for bad in ([], ["cat", ""], "cat", [1]):
        with pytest.raises(InputError):
            method.set_classes(bad)


def test_is_deterministic(spec, tiny_clip):
    dataset = toy_dataset(tiny_clip)
    runs = [few_steps(spec, tiny_clip, dataset, epochs=2) for _ in range(2)]
    assert runs[0][1].losses == runs[1][1].losses
    states = [method.state_dict() for method, _ in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_runs_in_bf16(spec, tiny_clip_bf16, tiny_clip):
    dataset = toy_dataset(tiny_clip)
    method, history = few_steps(spec, tiny_clip_bf16, dataset, epochs=3)
    assert all(p.dtype == torch.float32 for p in method.parameters())
    assert all(loss == loss for loss in history.losses)
    batch = batch_of(dataset, tiny_clip)
    half = make(spec, tiny_clip_bf16).logits(Batch(images=batch.images))
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half,
        make(spec, tiny_clip).logits(Batch(images=batch.images)),
        rtol=0.05,
        atol=0.5,
    )


@pytest.mark.parametrize("classes", [1, 300])
def test_number_of_classes(spec, tiny_clip, classes):
    names = [f"thing number {i}" for i in range(classes)]
    method = make(spec, tiny_clip, names)
    batch = batch_of(toy_dataset(tiny_clip), tiny_clip, 3)
    batch.labels = torch.tensor([0, classes - 1, classes // 2])
    assert method.logits(batch).shape == (3, classes)
    assert method.predict(batch.images).shape == (3,)
    if learns(method):
        assert torch.isfinite(method.train().backward(batch))


def test_batch_of_one(spec, tiny_clip):
    method = make(spec, tiny_clip)
    dataset = toy_dataset(tiny_clip)
    one, all_of_them = batch_of(dataset, tiny_clip, 1), batch_of(dataset, tiny_clip)
    torch.testing.assert_close(
        method.logits(one), method.logits(all_of_them)[:1], rtol=1e-4, atol=1e-4
    )
    if learns(method):
        assert torch.isfinite(method.train().backward(one))


def test_refuses_bad_hyperparameters(spec, tiny_clip):
    cls = methods()[spec.partition("(")[0]]
    known = cls.hyperparameters()
    for name in known:
        with pytest.raises(InputError, match=name):
            make(spec, tiny_clip, **{name: object()})
    nearest = next(iter(known), None)
    with pytest.raises(InputError, match=f"unknown.*{nearest or ''}"):
        make(spec, tiny_clip, **{f"{nearest or 'anything'}x": 1})
    with pytest.raises(InputError, match="FrozenCLIP"):
        make(spec, torch.nn.Linear(1, 1))


def test_official_names_fit_its_state(spec, tiny_clip):
    """A state dict under the official names loads; unknown, missing and misshapen
    parameters are named.
    """
    method, other = make(spec, tiny_clip), make(spec, tiny_clip, seed=7)
    names, state = method.official_names(), method.state_dict()
    assert set(names.values()) <= set(state)
    official = {key: state[ours].clone() for key, ours in names.items()}
    checkpoint = {
        "state_dict": official | {"prompt_learner.token_prefix": torch.zeros(2)},
        "epoch": 3,
    }
    other.load_official(checkpoint)
    for ours in names.values():
        assert torch.equal(other.state_dict()[ours], state[ours])
    with pytest.raises(InputError, match="unknown: nonsense.weight"):
        other.load_official(official | {"nonsense.weight": torch.zeros(2)})
    for key in list(names)[:1]:
        with pytest.raises(InputError, match=f"missing: {key}"):
            other.load_official({k: v for k, v in official.items() if k != key})
        with pytest.raises(InputError, match=f"wrong shape: {key}"):
            other.load_official(official | {key: torch.zeros(1, 2, 3)})
