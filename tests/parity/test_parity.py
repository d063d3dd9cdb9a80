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
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import (
    Arrays,
    close,
    close_features,
    close_gradient,
    close_prompts,
)
from own import ALONG, ALSO, BEFORE, OWN, described_images
from own_argue import check_sampling
from own_awt import numbered
from seeded import seeded

from promptkit.method import Batch
from promptkit.recipe import Recipe
from promptkit.registry import from_official, methods

GRADIENTS = ("grad/", "gradnorm/")
for found in sorted(Path(__file__).parent.glob("own_*.py")):
    module = import_module(found.stem)
    OWN.update(getattr(module, "OWN", {}))
    ALSO.update(getattr(module, "ALSO", {}))
    BEFORE.update(getattr(module, "BEFORE", {}))
    ALONG.update(getattr(module, "ALONG", {}))


def test_fixture(parity_path, request):
    path = parity_path
    fixture = json.loads(path.read_text())
    if "method" not in fixture:  # of the benchmark's protocol, without arrays
        return OWN[fixture.get("name", path.stem).partition("-")[0], None](
            None, fixture, {}
        )
    stored = np.load(path.with_suffix(".npz"))
    arrays = Arrays({name: torch.from_numpy(stored[name]) for name in stored})
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
    assert arrays, f"{path.name} has no array to compare"
    left = ", ".join(sorted(arrays.unread))
    assert not left, f"arrays of {path.name} were not compared: {left}"


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

    close(method.logits(batch), arrays, "logits")
    check_features(method, images, arrays)
    close_prompts(method, arrays)
    if fixture.get("new_classnames") and "logits_new" in arrays:
        method.set_classes(fixture["new_classnames"])
        # without a flaw of the official code, where the fixture has both
        clean = "logits_new_clean" in arrays
        close(
            method.logits(batch), arrays, "logits_new_clean" if clean else "logits_new"
        )
        method.set_classes(fixture["classnames"])

    before = BEFORE.get(fixture["method"], lambda *step: None)
    if any(name == "loss" or name.startswith(GRADIENTS) for name in arrays):
        before(method, fixture, batch, "loss")
        check_gradients(method, batch, arrays)
    for name, described in optimizers_of(fixture).items():
        if name in arrays:
            method = make(cls, clip, fixture, arrays, objects).train()
            before(method, fixture, batch, name)
            optimizer = make_optimizer(method, described)
            along = ALONG.get(fixture["method"]) if name == "trace" else None
            check_trace(method, batch, optimizer, arrays, name, along)
    assert "trace" not in arrays.unread, (
        f"{fixture['name']} has a trace and describes no optimizer for it"
    )

    if fixture["method"] in ALSO:
        ALSO[fixture["method"]](
            make(cls, clip, fixture, arrays, objects).train(), fixture, arrays, batch
        )


def check_features(method, images, arrays):
    """Image features, and text features of all images or of one."""
    with torch.no_grad():
        image = method.eval().image_features(images)
        close_features(arrays, "image_features", image, method.adapt(image))
        of_one = [name for name in arrays if re.fullmatch(r"text_features_\d+", name)]
        if not of_one and "text_features" not in arrays:
            return
        text = method.text_features(image if method.conditional else None)
        for name in of_one:
            mine = text[int(name.rpartition("_")[2])] if method.conditional else text
            close_features(arrays, name, mine)
        close_features(arrays, "text_features", text)


def check_gradients(method, batch, arrays):
    """The training loss and what it leaves in each parameter."""
    learnables = dict(method.named_parameters())
    method.train()
    close(method.backward(batch), arrays, "loss", atol=1e-6)
    names = method.official_names()
    stored = {name.partition("/")[2] for name in arrays if name.startswith(GRADIENTS)}
    missing = sorted(stored - set(names))
    assert not missing, f"parameters that the method does not have: {missing}"
    for official in sorted(stored):
        grad = learnables[names[official]].grad
        assert grad is not None, f"{official} got no gradient"
        close_gradient(grad, arrays, official)


def optimizers_of(fixture):
    """The described optimizers by the names of the traces that they made."""
    described = fixture.get("optimizer") or {}
    if "trace" not in described:
        described = {"trace": described} if described else {}
    suffix = "_optimizer"  # of another trace
    return described | {
        key.removesuffix(suffix): fixture[key]
        for key in fixture
        if key.endswith(suffix)
    }


def check_trace(method, batch, optimizer, arrays, name, along):
    """The losses of a few steps, what is recorded along them, and the logits after."""
    trace, beside = [], []
    for _ in arrays[name]:
        beside += [along(method, batch)] if along else []
        optimizer.zero_grad()
        trace.append(method.backward(batch))
        optimizer.step()
    close(torch.stack(trace), arrays, name, atol=1e-5)
    for key in beside[0] if beside else ():
        close(torch.stack([step[key] for step in beside]), arrays, key)
    close(method.logits(batch), arrays, name.replace("trace", "logits_after", 1))


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
                    first = official[name].flatten()[: stored.numel()]
                    close(first.view_as(stored), arrays, array[1], atol=1e-5)
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
    cls, lr = getattr(torch.optim, kind), rate_of(method, described)
    known = set(inspect.signature(cls).parameters) - {"params", "lr"}
    options = {name: value for name, value in described.items() if name in known}
    return cls(method.param_groups(Recipe(lr=lr)), lr=lr, **options)


def rate_of(method, described):
    """The recorded learning rate, of several the one that the method's own are
    multiples of.
    """
    if "groups" not in described:
        return described["lr"]
    theirs = sorted({group["lr"] for group in described["groups"]})
    groups = method.param_groups(Recipe(lr=1.0))
    ours = sorted({group.get("lr", 1.0) for group in groups})
    for lr in theirs:
        if [lr * x for x in ours] == pytest.approx(theirs):
            return lr
    raise AssertionError(f"the rates {theirs} are no multiple of the method's {ours}")


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


# --- the checks themselves ------------------------------------------------------------

ALTERED = [  # which of a fixture's arrays are kept; the last of them is altered
    ("coop-default", "eot"),
    ("coop-default", "tokens"),
    ("coop-middle-csc", "tokens"),
    ("cocoop-default", "text_features_0"),
    ("kgcoop-default", "loss_ce"),
    ("kgcoop-default", "trace", "trace_score"),
    ("prograd-default", "grad_xe/prompt_learner.ctx"),
    ("prograd-default", "gradnorm_kl/prompt_learner.ctx"),
    ("prograd-default", "trace", "trace_cosine"),
    ("dept-coop", "loss_itm"),
    ("dept-coop", "loss_cat"),
    ("dept-coop", "logits_cat_train"),
    ("promptsrc-default", "zero_shot_image_features"),
    ("promptsrc-default", "terms"),
    ("caspl-boosting", "tokens"),
    ("atprompt-coop_front", "tokens"),
    ("tpt-default", "ctx_init"),
    ("waffleclip-default", "image_features"),
]


def copied(name, folder, arrays, **changes):
    """A fixture of this folder with some of its arrays and other entries."""
    here = Path(__file__).parent / "fixtures" / name
    fixture = json.loads(here.with_suffix(".json").read_text()) | changes
    path = folder / f"{name}.json"
    path.write_text(json.dumps(fixture))
    stored = np.load(here.with_suffix(".npz"))
    if isinstance(arrays, list | tuple):
        arrays = {array: stored[array] for array in arrays}
    np.savez(path.with_suffix(".npz"), **arrays)
    return path


@pytest.mark.parametrize(("name", "kept"), [(n, kept) for n, *kept in ALTERED])
def test_an_altered_array_fails(name, kept, tmp_path, request):
    stored = np.load(Path(__file__).parent / "fixtures" / f"{name}.npz")
    arrays = {array: stored[array].copy() for array in kept}
    arrays |= {array: arrays[array][:1] for array in kept if array[:5] == "trace"}
    arrays[kept[-1]].flat[0] += 7
    if name == "tpt-default":  # compared before any image is
        changes = {"batch": 1, "n_views": 1}
    else:
        changes = {"prompts": {}} if name == "waffleclip-default" else {}
    path = copied(name, tmp_path, arrays, **changes)
    with pytest.raises(AssertionError, match=kept[-1].replace("/", ".")):
        test_fixture(path, request)


def test_unknown_arrays_and_traces_without_an_optimizer_fail(tmp_path, request):
    logits = np.load(Path(__file__).parent / "fixtures" / "coop-default.npz")["logits"]
    path = copied("coop-default", tmp_path, {"logits": logits, "logits_odd": logits})
    with pytest.raises(AssertionError, match="not compared: logits_odd"):
        test_fixture(path, request)
    path = copied("coop-default", tmp_path, ["logits", "trace"], optimizer=None)
    with pytest.raises(AssertionError, match="describes no optimizer"):
        test_fixture(path, request)


def test_upl_without_an_ensemble_has_one_member(tmp_path, request):
    one = {"prompt_learner.ctx/0": {"shape": [16, 512], "std": 0.02}}
    options = {"template": "a photo of a {}.", "top_k": 3, "n_ctx": 16}
    kept = ["train_index", "train_label", "logits", "logits/0"]
    sgd = {"name": "torch.optim.SGD", "lr": 0.002, "steps": 1}
    changes = {"hyperparameters": options, "parameters": one, "optimizer": sgd}
    test_fixture(copied("upl-default", tmp_path, kept, **changes), request)


def test_recorded_rates_are_the_method_s(tiny_clip):
    method = from_official("dept(coop)", tiny_clip, ["cat", "dog"], {"N_CTX": 2})
    for rates in ((0.002, 0.013), (0.013, 0.002)):
        groups = [{"params": "some", "lr": rate} for rate in rates]
        assert rate_of(method, {"groups": groups}) == 0.002
    with pytest.raises(AssertionError, match="no multiple of the method's"):
        rate_of(method, {"groups": [{"lr": 0.002}, {"lr": 0.02}]})


def test_adapters_may_be_numbered_by_their_blocks(tiny_clip):
    options = {"adapter_layers": [1], "positions": ["attn"], "down_rate": 8}
    method = from_official("awt", tiny_clip, ["cat"], options | {"num_desc": 2})
    consecutive = set(method.official_names())
    by_block = {name.replace(".0.", ".1.") for name in consecutive}
    assert by_block.isdisjoint(consecutive)
    assert set(numbered(method, by_block)) == consecutive
    assert set(numbered(method, by_block).values()) == by_block


def test_attributes_are_sampled_of_one_class_by_cosine():
    fixture = {"attributes": [["a"], ["b"]], "hyperparameters": {}}
    with pytest.raises(AssertionError, match="one class, not 2"):
        check_sampling(None, fixture, {})
    fixture = {"attributes": [["a"]], "hyperparameters": {"mode": "euclidean"}}
    with pytest.raises(AssertionError, match="not 'euclidean'"):
        check_sampling(None, fixture, {})
