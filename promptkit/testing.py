"""What every method promises, as checks that anybody's method can be put through.

With pytest, in a package of one's own::

    import pytest
    import my_package  # registers "mine"
    from promptkit.testing import PROMISES, tiny_clip

    @pytest.mark.parametrize("promise", PROMISES, ids=lambda f: f.__name__)
    def test_promises(promise, tmp_path, monkeypatch):
        monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
        promise("mine", tiny_clip(), tmp_path)

Each takes the name of a method, as ``build`` does, a CLIP and an empty folder, and
raises an AssertionError where the promise is broken.
"""

import copy
import json
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from promptkit.clip import FrozenCLIP
from promptkit.data import Dataset, Split, transform
from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.recipe import Setting
from promptkit.registry import build, load_method, nesting, objects, recipe
from promptkit.train import accuracy, fit

NAMES = ["red square", "green_circle", "blue star", "an old, grey teapot", "pug"]


def toy_dataset(clip, classnames=NAMES, shots=4, seed=0):
    """Few images of made-up classes, at CLIP's image size."""
    generator = torch.Generator().manual_seed(seed)
    size, labels = (
        clip.image_size,
        torch.arange(len(classnames)).repeat_interleave(shots),
    )
    colours = torch.randint(
        0, 256, (len(classnames), 3, 4, 4), generator=generator
    ).float()

    def split(part):
        noise = 40 * torch.randn(len(labels), 3, size, size, generator=generator)
        pixels = (
            (F.interpolate(colours, (size, size))[labels] + noise)
            .clamp(0, 255)
            .to(torch.uint8)
        )
        return Split(
            labels,
            lambda: pixels,
            torch.arange(len(labels)),
            f"toy-{part}-{seed}-{shots}-{len(classnames)}",
        )

    template = "a photo of a {}, a toy."
    return Dataset(
        "toy",
        "Toys",
        list(classnames),
        template,
        split("train"),
        split("val"),
        split("test"),
    )


def tiny_clip(
    seed: int = 0, layers: int = 3, quick_gelu: bool = True, **kwargs
) -> FrozenCLIP:
    """A tiny random CLIP with the real vocabulary, whose attention is far from
    uniform.
    """
    model = open_clip.CLIP(
        embed_dim=24,
        vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32),
        text_cfg=dict(width=32, heads=2, layers=layers),
        quick_gelu=quick_gelu,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "logit_scale":
                p.fill_(torch.tensor(100.0).log())
            elif "ln_" in name and name.endswith("weight"):
                p.normal_(1.0, 0.2, generator=generator)
            elif p.dim() == 1 or "embedding" in name:
                p.normal_(0, 0.3, generator=generator)
            else:
                p.normal_(0, 1.5 * p[0].numel() ** -0.5, generator=generator)
    return FrozenCLIP(model, name="tiny", **kwargs)


def described(dataset):
    """The dataset with sentences about its classes, for methods that read some."""
    said = {n: [f"A {n} is round.", f"This is a {n}."] for n in dataset.classnames}
    return replace(dataset, descriptions=said)


def _make(spec, clip, names=NAMES, seed=0, **hparams):
    """Built and aimed as a run does it, at a dataset that describes its classes; a
    teacher that it needs is CoOp on the same CLIP.
    """
    for name, cls in objects(spec).items():
        if name in cls.needs():
            hparams.setdefault(name, build("coop", clip, names, seed=3))
    method = build(spec, clip, names, seed=seed, **hparams)
    method.aim(described(toy_dataset(clip, names, shots=1)))
    return method


def batch_of(dataset, clip, n=None, method=None):
    """Images, labels and frozen features; with a method also its views in training, if
    it reads any.
    """
    images = transform(clip, dataset.train.images())[:n]
    batch = Batch(
        images=images,
        labels=dataset.train.labels[:n],
        features=clip.encode_image(images),
        texts=[f"a {dataset.classnames[c]}" for c in dataset.train.labels[:n]],
        generator=torch.Generator().manual_seed(0),
    )
    if method is not None and "views" in method.reads.split("+"):
        batch.views = method.views(dataset.train.images()[:n], batch.generator)
    return batch


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
    method = _make(spec, clip, dataset.classnames)
    return method, fit(method, dataset, replace(ours, **changes), seed, progress=False)


def trains(spec, clip, folder):
    """The loss falls, only the method's own parameters change, and CLIP's never do."""
    dataset = toy_dataset(clip)
    frozen = {name: p.detach().clone() for name, p in clip.named_parameters()}
    start = _make(spec, clip)
    method, history = few_steps(spec, clip, dataset)
    if learns(method):
        assert history.losses[-1] < history.losses[0]
        before, after = dict(start.named_parameters()), dict(method.named_parameters())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(p.dtype == torch.float32 for p in after.values())
    else:
        assert history.steps == 0
    assert all(torch.equal(frozen[name], p) for name, p in clip.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters())
    assert not {id(p) for p in method.parameters()} & {id(p) for p in clip.parameters()}
    assert not any("clip." in name for name in method.state_dict())
    assert 0 <= accuracy(method, dataset.test) <= 100


def saves_and_loads(spec, clip, folder):
    dataset = toy_dataset(clip)
    method, _ = few_steps(spec, clip, dataset, epochs=2)
    batch = batch_of(dataset, clip)
    path = method.save(folder / "new" / "method.safetensors")
    loaded = load_method(path, clip)
    assert (
        type(loaded) is type(method)
        and loaded.hparams == method.hparams
        and loaded.spec == spec
    )
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["promptkit"])
    assert (
        config["clip"]["fingerprint"] == clip.fingerprint
        and config["hparams"] == method.hparams
    )

    stranger = FrozenCLIP(copy.deepcopy(clip.model), clip.tokenizer)
    with torch.no_grad():
        stranger.model.logit_scale.add_(1)
    with pytest.raises(InputError, match="trained on the weights"):
        load_method(path, stranger)
    data, other = path.read_bytes(), folder / "other.safetensors"
    damaged = [data[: len(data) // 2], b"", b"not a file of weights"]
    edited = data.replace(clip.fingerprint.encode(), b"0" * len(clip.fingerprint))
    damaged.append(edited)
    if learns(method):
        damaged.append(data[:-1] + bytes([data[-1] ^ 1]))
    for content in damaged:
        other.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            load_method(other, clip)
    with pytest.raises(InputError, match="no method file"):
        load_method(folder / "nothing", clip)


def re_aims_at_other_classes(spec, clip, folder):
    dataset, new = toy_dataset(clip), ["teapot", "sea_lion"]
    method, _ = few_steps(spec, clip, dataset, epochs=2)
    batch = batch_of(dataset, clip)
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


def is_deterministic(spec, clip, folder):
    dataset = toy_dataset(clip)
    runs = [few_steps(spec, clip, dataset, epochs=2) for _ in range(2)]
    assert runs[0][1].losses == runs[1][1].losses
    states = [method.state_dict() for method, _ in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def runs_in_bf16(spec, clip, folder):
    """Below float32 in the matrix products alone: what it learns stays float32."""
    dataset = toy_dataset(clip)
    half_clip = FrozenCLIP(copy.deepcopy(clip.model), clip.tokenizer, precision="bf16")
    method, history = few_steps(spec, half_clip, dataset, epochs=3)
    assert all(p.dtype == torch.float32 for p in method.parameters())
    assert all(loss == loss for loss in history.losses)
    batch = batch_of(dataset, clip)
    half = _make(spec, half_clip).logits(Batch(images=batch.images))
    assert half.dtype == torch.float32
    torch.testing.assert_close(
        half,
        _make(spec, clip).logits(Batch(images=batch.images)),
        rtol=0.05,
        atol=1.0,
    )


def takes_any_number_of_classes(spec, clip, folder):
    """One class, and three hundred."""
    for classes in (1, 300):
        names = [f"thing number {i}" for i in range(classes)]
        method = _make(spec, clip, names)
        batch = batch_of(toy_dataset(clip), clip, 3, method)
        batch.labels = torch.tensor([0, classes - 1, classes // 2])
        assert method.logits(batch).shape == (3, classes)
        assert method.predict(batch.images).shape == (3,)
        if learns(method):
            assert torch.isfinite(method.train().backward(batch))


def takes_a_batch_of_one(spec, clip, folder):
    method = _make(spec, clip)
    dataset = toy_dataset(clip)
    one, all_of_them = batch_of(dataset, clip, 1), batch_of(dataset, clip)
    torch.testing.assert_close(
        method.logits(one), method.logits(all_of_them)[:1], rtol=1e-4, atol=1e-4
    )
    normalised = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)
    if learns(method) and not any(isinstance(m, normalised) for m in method.modules()):
        one = batch_of(dataset, clip, 1, method)
        assert torch.isfinite(method.train().backward(one))


def refuses_bad_hyperparameters(spec, clip, folder):
    cls = nesting(spec)[0]
    known = cls.hyperparameters()
    for name in known:
        with pytest.raises(InputError, match=name):
            _make(spec, clip, **{name: object()})
    nearest = next(iter(known), None)
    with pytest.raises(InputError, match=f"unknown.*{nearest or ''}"):
        _make(spec, clip, **{f"{nearest or 'anything'}x": 1})
    with pytest.raises(InputError, match="FrozenCLIP"):
        _make(spec, torch.nn.Linear(1, 1))


def loads_official_names(spec, clip, folder):
    """A state dict under the official names loads; unknown, missing and misshapen
    parameters are named.
    """
    method, other = _make(spec, clip), _make(spec, clip, seed=7)
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


PROMISES = [
    trains,
    saves_and_loads,
    re_aims_at_other_classes,
    is_deterministic,
    runs_in_bf16,
    takes_any_number_of_classes,
    takes_a_batch_of_one,
    refuses_bad_hyperparameters,
    loads_official_names,
]
