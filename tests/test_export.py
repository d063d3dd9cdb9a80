"""A trained method as a network of its own: torch.export, ONNX, traces, compilation."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.testing import assert_close

from promptkit.clip import load_clip
from promptkit.data import load_dataset, transform
from promptkit.errors import InputError
from promptkit.export import (
    Deployed,
    export_checkpoint,
    export_onnx,
    export_program,
)
from promptkit.method import Batch
from promptkit.registry import build

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning"
)

NAMES = ["dog", "golden retriever", "red fox"]
ONNX = ["coop", "kgcoop", "prograd", "maple", "promptsrc", "dept(coop)"]
SPECS = [*ONNX, "ivlp", "clip", "waffleclip", "dept(maple)", "waffleclip max"]


def trained(clip, spec):
    """A method whose parameters are far from where they started."""
    spec, _, aggregate = spec.partition(" ")
    options = {"aggregate": aggregate} if aggregate else {}
    method = build(spec, clip, NAMES, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return method


def images(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def logits(method, x):
    return method.logits(Batch(images=x))


@pytest.mark.parametrize("spec", SPECS)
def test_logits_are_those_of_the_method(tiny_clip, spec):
    """Also after torch.export and torch.jit.trace, at batches that were not traced."""
    method = trained(tiny_clip, spec)
    network = Deployed(method)
    program = export_program(method).module()
    traced = torch.jit.trace(network, images(2))
    for n in (1, 3, 32):
        x = images(n, seed=n)
        eager = logits(method, x)
        assert eager.shape == (n, 3) and eager.std() > 0.5
        for run in (network, program, traced):
            assert_close(run(x), eager, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spec", ONNX)
def test_onnx_gives_the_same_logits(tiny_clip, spec, tmp_path):
    import onnxruntime

    assert abs(tiny_clip.logit_scale.item() - 100) < 1e-3
    method = trained(tiny_clip, spec)
    path = export_onnx(method, tmp_path / "new" / "method.onnx")
    assert [p.name for p in path.parent.iterdir()] == ["method.onnx"]
    session = onnxruntime.InferenceSession(path)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("images", ["batch", 3, 32, 32])
    assert (result.name, result.shape) == ("logits", ["batch", 3])
    for n in (1, 3, 32):
        x = images(n, seed=n)
        (found,) = session.run(None, {"images": x.numpy()})
        assert_close(torch.from_numpy(found), logits(method, x), rtol=0, atol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    facts = {key: json.loads(value) for key, value in facts.items()}
    assert facts["classnames"] == NAMES and facts["image_size"] == 32
    assert facts["mean"] == pytest.approx(tiny_clip.mean)
    assert facts["std"] == pytest.approx(tiny_clip.std)
    assert (facts["interpolation"], facts["resize_mode"]) == ("bicubic", "shortest")
    assert facts["method"] == spec and facts["trained_on"] == NAMES
    assert facts["hparams"] == json.loads(json.dumps(method.hparams))
    assert facts["fingerprint"] == tiny_clip.fingerprint


@pytest.mark.parametrize("spec", ["coop", "dept(coop)", "maple"])
def test_a_network_is_a_copy(tiny_clip, spec):
    """Aiming the method at other classes, or training it on, does not reach it."""
    method, x = trained(tiny_clip, spec), images(4)
    before, network = logits(method, x), Deployed(method)
    method.set_classes(["cat", "owl"])
    with torch.no_grad():
        for p in method.parameters():
            p.zero_()
    method.train()
    assert_close(network(x), before, rtol=0, atol=1e-5)
    assert network.classnames == NAMES and not network.train().training
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert all(p.requires_grad for p in method.parameters())
    assert not network(x).requires_grad
    assert_close(Deployed(method)(x), logits(method, x), rtol=0, atol=1e-5)


def test_it_compiles_whole(tiny_clip):
    method, x = trained(tiny_clip, "maple"), images(5)
    compiled = torch.compile(Deployed(method), backend="eager", fullgraph=True)
    assert_close(compiled(x), logits(method, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "spec, why",
    [
        ("cocoop", "each image has its own"),
        ("dept(cocoop)", "each image has its own"),
        ("tpt", "it adapts to each image"),
        ("tpt(coop)", "it adapts to each image"),
        ("tpt(cocoop)", "it adapts to each image"),
    ],
)
def test_methods_that_depend_on_the_image_are_refused(tiny_clip, spec, why, tmp_path):
    method = build(spec, tiny_clip, NAMES)
    message = f"^{spec.replace('(', '.')[:-1]}.* cannot be exported: .*{why}"
    for attempt in (
        lambda: Deployed(method),
        lambda: export_program(method),
        lambda: export_onnx(method, tmp_path / "m.onnx"),
    ):
        with pytest.raises(InputError, match=message):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(make_clip, precision, tmp_path):
    method, x = trained(make_clip(precision=precision), "maple"), images(3)
    program = export_program(method).module()
    assert_close(program(x), logits(method, x), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match=f"CLIP is in {precision}: export.* as .pt2"):
        export_onnx(method, tmp_path / "m.onnx")


def test_what_is_no_method(tiny_clip, tmp_path):
    with pytest.raises(InputError, match="only a method can be exported, not 3"):
        Deployed(3)
    with pytest.raises(InputError, match="ends in .onnx or .pt2, not 'm.pt'"):
        export_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.pt")


def test_missing_packages_are_named(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"onnxscript is needed.*promptkit\[export\]"):
        export_onnx(trained(tiny_clip, "coop"), tmp_path / "m.onnx")


def test_a_saved_method_without_this_package(tmp_path):
    """The file, a picture and the advice of the module give the package's answer, in a
    process that has neither.
    """
    clip, dataset = load_clip("mini", device="cpu"), load_dataset("pets")
    method = build("coop", clip, dataset.classnames[:5])
    saved = method.save(tmp_path / "m.safetensors")
    onnx = export_checkpoint(saved, tmp_path / "m.onnx")
    names = dataset.classnames[5:9]
    program = export_checkpoint(saved, tmp_path / "m.pt2", names)
    x = transform(clip, dataset.test.images()[:3])
    torch.save(x, tmp_path / "x.pt")
    code = """
        import json, sys, torch, onnxruntime
        x, found = torch.load("x.pt"), {"promptkit.json": ""}
        program = torch.export.load("m.pt2", extra_files=found).module()
        session = onnxruntime.InferenceSession("m.onnx")
        logits = session.run(None, {"images": x.numpy()})[0], program(x).detach()
        assert not {"promptkit", "open_clip"} & set(sys.modules)
        print(json.dumps([*(each.tolist() for each in logits), found]))
    """
    env = os.environ | {"PYTHONPATH": ""}
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    by_onnx, by_program, found = json.loads(out)
    assert json.loads(found["promptkit.json"])["classnames"] == names
    assert_close(torch.tensor(by_onnx), logits(method, x), rtol=0, atol=1e-4)
    method.set_classes(names)
    assert_close(torch.tensor(by_program), logits(method, x), rtol=0, atol=1e-4)
    assert onnx.parent == program.parent == tmp_path
