"""Every fixture of a folder against the method of its name: ``pytest tests/parity
--fixtures DIR``.

Fixtures of kind "common" go through :func:`check_common`, the same for all methods:
what is special about a method (how its hyperparameters and parameters are called in its
own repository) is asked of the method. Fixtures of kind "own" go to the function of
their method and part in ``own.py`` or ``own_METHOD.py``, which the folder is searched
for.
"""

import inspect
import json
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from own import ALSO, BEFORE, OWN, close, described_images
from seeded import seeded

from promptkit.method import Batch
from promptkit.recipe import Recipe
from promptkit.registry import from_official, methods

CLOSE = {"rtol": 1e-3, "atol": 1e-3}  # logits are scaled by 100
RELATIVE = {"rtol": 1e-3, "atol": 1e-6}
for found in sorted(Path(__file__).parent.glob("own_*.py")):
    module = import_module(found.stem)
    OWN.update(getattr(module, "OWN", {}))
    ALSO.update(getattr(module, "ALSO", {}))
    BEFORE.update(getattr(module, "BEFORE", {}))


def test_fixture(parity_path, request):
    path = parity_path
    fixture = json.loads(path.read_text())
    if "method" not in fixture:  # of the benchmark's protocol, without arrays
        return OWN[fixture.get("name", path.stem).partition("-")[0], None](
            None, fixture, {}
        )
    arrays = {
        name: torch.from_numpy(array)
        for name, array in np.load(path.with_suffix(".npz")).items()
    }
    known = methods()
    for name in (fixture["method"], fixture.get("host")):
        assert name is None or name in known, (
            f"no registered method {name!r} for {path.name}"
        )
    clip = request.getfixturevalue("parity_clip")
    if fixture["kind"] == "common":
        objects = {"host": fixture["host"]} if "host" in fixture else {}
        taught = any(name.startswith("teacher_") for name in arrays)
        if "teacher_parameters" in fixture or taught:
            objects["teacher"] = request.getfixturevalue("parity_teacher")
        check_common(known[fixture["method"]], clip, fixture, arrays, objects)
    else:
        check = OWN.get((fixture["method"], fixture.get("part"))) or OWN.get(
            (fixture["method"], None)
        )
        assert check, (
            f"no own*.py has a check for part {fixture.get('part')!r} of"
            f" {fixture['method']}"
        )
        check(clip, fixture, arrays)


def check_common(cls, clip, fixture, arrays, objects):
    """Features, logits, loss, gradients and the losses of a few steps from the same
    parameters and images, as far as the fixture has them.
    """
    method = make(cls, clip, fixture, arrays, objects)
    labels = (
        torch.tensor(fixture["labels"])
        if isinstance(fixture.get("labels"), list)
        else None
    )
    images = described_images(fixture)
    batch = Batch(
        images=images, labels=labels, generator=torch.Generator().manual_seed(0)
    )
    if "batch_pairs" in fixture:  # what learns from texts has these, not images
        pairs = [fixture["all_pairs"][i] for i in fixture["batch_pairs"]]
        batch.texts = [pair["target"] for pair in pairs]
        batch.labels = torch.tensor([pair["label"] for pair in pairs])

    compared = [close(method.logits(batch), arrays, "logits")]
    with torch.no_grad():
        image = method.eval().image_features(images)
        if "image_features" in arrays:
            assert_features(arrays["image_features"], image, method.adapt(image))
        if "text_features" in arrays:
            assert_features(
                arrays["text_features"],
                method.text_features(image if method.conditional else None),
            )
    if fixture.get("new_classnames") and "logits_new" in arrays:
        method.set_classes(fixture["new_classnames"])
        # without a flaw of the official code, where the fixture has both
        clean = "logits_new_clean" in arrays
        close(
            method.logits(batch), arrays, "logits_new_clean" if clean else "logits_new"
        )
        method.set_classes(fixture["classnames"])

    before = BEFORE.get(fixture["method"], lambda *step: None)
    if "loss" in arrays:
        before(method, fixture, batch, "loss")
        compared.append(check_gradients(method, batch, arrays))
    missing = {
        name.partition("/")[2] for name in arrays if name.startswith("gradnorm/")
    } - set(method.official_names())
    assert not missing, f"parameters that the method does not have: {sorted(missing)}"

    optimizers = fixture.get("optimizer") or {}
    if "trace" not in optimizers:
        optimizers = {"trace": optimizers} if optimizers else {}
    suffix = "_optimizer"  # of another trace
    optimizers |= {
        key.removesuffix(suffix): fixture[key]
        for key in fixture
        if key.endswith(suffix)
    }
    for name, described in optimizers.items():
        if name not in arrays:
            continue
        method = make(cls, clip, fixture, arrays, objects).train()
        before(method, fixture, batch, name)
        trace, optimizer = [], make_optimizer(method, described)
        for _ in arrays[name]:
            optimizer.zero_grad()
            trace.append(method.backward(batch))
            optimizer.step()
        compared.append(close(torch.stack(trace), arrays, name, atol=1e-5))
        if name == "trace":
            close(method.logits(batch), arrays, "logits_after")
    assert any(compared), f"{fixture['name']} has no array to compare"

    if fixture["method"] in ALSO:
        ALSO[fixture["method"]](
            make(cls, clip, fixture, arrays, objects).train(), fixture, arrays, batch
        )


def check_gradients(method, batch, arrays):
    """The training loss and what it leaves in each parameter."""
    learnables = dict(method.named_parameters())
    method.train()
    loss = method.backward(batch)
    close(loss, arrays, "loss", atol=1e-6)
    for official, ours in method.official_names().items():
        if f"gradnorm/{official}" not in arrays:
            continue
        grad = learnables[ours].grad
        assert grad is not None, f"{official} got no gradient"
        norm = arrays[f"gradnorm/{official}"].double()
        named = partial("{}: {}".format, official)  # leads the message of a failure
        torch.testing.assert_close(grad.double().norm(), norm, **RELATIVE, msg=named)
        stored = arrays.get(f"grad/{official}", grad.new_zeros(0))
        # single values are small differences of large ones: they are held to the scale
        # of the whole
        scale = max(
            stored.abs().max().item() if len(stored) else 0.0,
            norm.item() / grad.numel() ** 0.5,
        )
        torch.testing.assert_close(
            grad.flatten()[: len(stored)], stored, rtol=1e-3, atol=1e-3 * scale
        )
    return True


def make(cls, clip, fixture, arrays, objects):
    """The method with the fixture's options and parameters; what it must initialise
    itself is checked.
    """
    beside = {
        key: fixture[key] for key in fixture if key in cls.official_hyperparameters
    }  # descriptions, ...
    others = {key: thing for key, thing in objects.items() if key != "host"}
    spec = f"{cls.name}({objects['host']})" if "host" in objects else cls.name
    method = from_official(
        spec, clip, fixture["classnames"], fixture["hyperparameters"] | beside, **others
    )
    names, state, official = method.official_names(), method.state_dict(), {}
    assert fixture.get("parameters"), f"{fixture['name']} describes no parameters"
    for group in ("parameters", "frozen_parameters", "teacher_parameters"):
        for name, p in fixture.get(group, {}).items():
            if "init" in p:
                assert name in names, f"the method has no parameter {name}"
                official[name] = state[names[name]].clone()
                array = re.search(r"array (\w+)", p["init"])
                if array and array[1] in arrays:
                    stored = arrays[array[1]]
                    torch.testing.assert_close(
                        official[name].flatten()[: stored.numel()], stored.flatten()
                    )
            else:
                value = seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
                mean = p.get("mean", 0.0)
                mean = torch.eye(len(value)) if mean == "eye" else mean
                official[name] = mean + value
    for name, said in fixture.get("state", {}).items():
        if name in names:  # what it remembers, described by the call that makes it
            call = re.search(
                r"seeded\([\"']([^\"']+)[\"'], \(([^)]+)\), ([\d.]+)\)", said
            )
            value = seeded(call[1], map(int, call[2].split(",")), float(call[3]))
            unit = "normalize(" in said
            official[name] = torch.nn.functional.normalize(value) if unit else value
    method.load_official(official)
    return method


def make_optimizer(method, described):
    """The recorded optimizer over the method's own groups; ``described`` is a dict, or
    a sentence.
    """
    if isinstance(described, str):
        options = {
            name: float(value)
            for name, value in re.findall(
                r"(lr|momentum|weight_decay)[ =]([\d.e-]+\d)", described
            )
        }
        described = {"type": described.partition("(")[0], **options}
    kind = next(
        described[key] for key in ("type", "optimizer", "name") if key in described
    ).rpartition(".")[2]
    cls = getattr(torch.optim, kind)
    lr = described["lr"] if "lr" in described else described["groups"][0]["lr"]
    known = set(inspect.signature(cls).parameters) - {"params", "lr"}
    options = {name: value for name, value in described.items() if name in known}
    return cls(method.param_groups(Recipe(lr=lr)), lr=lr, **options)


def assert_features(stored, *ours):
    """Fixtures store features normalised or not, before a trained head or behind it,
    and sometimes their first columns alone.
    """
    normalised = [torch.nn.functional.normalize(each, dim=-1) for each in ours]
    width = stored.shape[-1]
    versions = [
        features[..., :width]
        for features in (*ours, *normalised)
        if features.shape[-1] >= width
    ]
    if not any(torch.allclose(features, stored, **CLOSE) for features in versions):
        torch.testing.assert_close(
            min(versions, key=lambda f: (f - stored).abs().max()), stored, **CLOSE
        )


def test_unregistered_methods_fail(tmp_path):
    """A fixture that nothing implements must not pass by being skipped."""

    class Request:
        def getfixturevalue(self, name):
            return None

    (tmp_path / "x-default.json").write_text(
        json.dumps({"method": "no such method", "kind": "common"})
    )
    np.savez(tmp_path / "x-default.npz", logits=np.zeros(1))
    with pytest.raises(AssertionError, match="no registered method"):
        test_fixture(tmp_path / "x-default.json", Request())
