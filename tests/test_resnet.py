"""CLIP's ResNets: features as open_clip's own, the methods that they serve, and those
that work inside a ViT and say so.
"""

import copy
import json
import os
import subprocess
import sys

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from promptkit.clip import FrozenCLIP, load_clip
from promptkit.errors import InputError
from promptkit.export import export_onnx, export_program
from promptkit.method import Batch, Method
from promptkit.registry import build, methods, specs
from promptkit.testing import NAMES, saves_and_loads, tiny_clip, trains
from promptkit.towers import Edit

TEXTS = ["a photo of a dog.", "cat"]
TEXT = dict(width=32, heads=2, layers=2)
TINY = dict(embed_dim=24, text_cfg=TEXT, quick_gelu=True)
TINY["vision_cfg"] = dict(layers=[1, 2, 1, 1], width=16, image_size=64)
INSIDE = {"maple", "ivlp", "promptsrc", "mma", "apex"}  # at least


def randomised(config, seed=0):
    """A model all of whose weights matter: open_clip starts its residual branches at
    zero, and norms that have seen nothing let an image fade on its way.
    """
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config).eval()
    with torch.no_grad():
        for part in model.visual.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.0)
                part.bias.normal_(0, 0.1)
                part.momentum = 1.0  # the statistics of what it sees next
        size = model.visual.image_size
        model.visual.train()(torch.randn(4, 3, size, size))
        model.visual.eval()
        model.logit_scale.fill_(torch.tensor(100.0).log())
    return model


@pytest.fixture(scope="module")
def resnet():
    return FrozenCLIP(randomised(TINY), name="RN-tiny")


def images(clip, n=3):
    size = clip.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4"])
def test_features_are_open_clips_at_true_shapes(name):
    model = randomised(open_clip.get_model_config(f"{name}-quickgelu"))
    clip = FrozenCLIP(model, name=name)
    width = {"RN50": 1024, "RN101": 512, "RN50x4": 640}[name]
    assert (clip.embed_dim, clip.vit) == (width, False)
    assert clip.image_size == (288 if name == "RN50x4" else 224)
    x = images(clip, 2)
    with torch.no_grad():
        image = model.encode_image(x)
        text = model.encode_text(open_clip.tokenize(TEXTS))
    assert (image[0] - image[1]).abs().max() > 0.1 * image.abs().max()
    assert_close(clip.encode_image(x), image)
    assert_close(clip.encode_text(TEXTS), text, rtol=1e-4, atol=1e-4)


def test_images_in_parts_and_one_at_a_time(resnet):
    x = images(resnet, 5)
    small = FrozenCLIP(copy.deepcopy(resnet.model), budget=1)
    one = torch.cat([resnet.encode_image(image[None]) for image in x])
    whole = resnet.encode_image(x)
    assert_close(whole, one, rtol=1e-4, atol=1e-5)
    assert_close(small.encode_image(x), one, rtol=1e-4, atol=1e-5)
    x.requires_grad_()
    resnet.image(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(("precision", "off"), [("bf16", 2e-3), ("fp16", 5e-5)])
def test_half_precision(resnet, precision, off):
    half = FrozenCLIP(copy.deepcopy(resnet.model), precision=precision)
    assert half.model.visual.layer2[0].conv1.weight.dtype == half.dtype != torch.float32
    assert half.model.visual.bn1.weight.dtype == torch.float32
    whole, ours = resnet.encode_image(images(resnet)), half.encode_image(images(half))
    assert ours.dtype == torch.float32
    assert 0 < (1 - torch.cosine_similarity(whole, ours)).max() < off


def test_fingerprints_tell_weights_statistics_and_heads_apart(resnet):
    def print_of(change):
        model = copy.deepcopy(resnet.model)
        change(model.visual)
        return FrozenCLIP(model).fingerprint

    def statistics(visual):
        visual.bn1.running_mean.add_(1)

    def heads(visual):
        visual.attnpool.num_heads = 4

    prints = [print_of(change) for change in (lambda visual: None, statistics, heads)]
    assert prints[0] == resnet.fingerprint and len(set(prints)) == 3


def test_there_is_nothing_inside(resnet):
    x = images(resnet, 1)
    for asked in (
        {"prompt": torch.zeros(2, 32)}, {"edit": Edit()}, {"tokens": True},
        {"attention": True},
    ):  # fmt: skip
        with pytest.raises(InputError, match="is a ResNet: .* take a CLIP with a ViT"):
            resnet.image(x, **asked)
    with pytest.raises(InputError, match=r"must be \(B, 3, 64, 64\)"):
        resnet.encode_image(x[..., :32])


# --- methods --------------------------------------------------------------------------


def inside(spec):
    return any(methods()[name].needs_vit({}) for name in spec.strip(")").split("("))


OUTSIDE = [spec for spec in specs() if not inside(spec)]


def test_every_method_is_on_one_side():
    names = {name for name, cls in methods().items() if cls.needs_vit({})}
    assert names >= INSIDE and "coop" not in names and "dept" not in names
    assert {"coop", "kgcoop", "clip_adapter", "tip_adapter", "tpt"} <= set(OUTSIDE)


@pytest.mark.parametrize("spec", OUTSIDE)
def test_methods_that_leave_the_image_tower_alone(resnet, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    trains(spec, resnet, tmp_path)
    saves_and_loads(spec, resnet, tmp_path)


@pytest.mark.parametrize("spec", [spec for spec in specs() if inside(spec)])
def test_the_others_refuse_with_the_reason(resnet, spec):
    message = "works on the tokens inside a ViT, and the image tower of 'RN-tiny' is a"
    with pytest.raises(InputError, match=message):
        build(spec, resnet, NAMES)


def test_prompts_in_the_text_tower_alone_are_no_reason(resnet):
    x = images(resnet)
    for name in ("ivlp", "apex"):
        method = build(name, resnet, NAMES, depth_vision=0)
        assert_close(method.image_features(x), resnet.encode_image(x))
        assert method.logits(x).shape == (3, len(NAMES))


def test_local_tokens_are_a_reason_wherever_they_are_asked_for(resnet):
    class Asked(Method):
        name = "asked"

        def __init__(self, clip, classnames):
            super().__init__(clip, classnames)
            self.reads_at_test = "features+tokens"

    Asked(tiny_clip(), NAMES)
    with pytest.raises(InputError, match="asked works on the tokens inside a ViT"):
        Asked(resnet, NAMES)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("spec", ["coop", "clip_adapter", "tip_adapter_f"])
def test_it_is_exported(resnet, spec, tmp_path):
    import onnxruntime

    method = build(spec, resnet, NAMES)
    x = images(resnet)
    expected = method.logits(Batch(images=x))
    program = export_program(method).module()
    assert_close(program(x), expected, rtol=0, atol=1e-3)
    session = onnxruntime.InferenceSession(export_onnx(method, tmp_path / "m.onnx"))
    (found,) = session.run(None, {"images": x.numpy()})
    assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-3)


# --- weights --------------------------------------------------------------------------


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "RN-tiny-test", TINY)


@pytest.mark.parametrize("counted", [True, False])
def test_weights_of_a_file(resnet, named, tmp_path, counted):
    """With the counts of the norms, or without, as models in half precision lack."""
    state = {
        f"module.{name}": value.clone()
        for name, value in resnet.model.state_dict().items()
        if counted or "num_batches_tracked" not in name
    }
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    clip = load_clip("RN-tiny-test", tmp_path / "w.pt", device="cpu")
    x = images(clip)
    assert_close(clip.encode_image(x), resnet.encode_image(x))
    state.pop("module.visual.bn1.running_mean")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match="missing: visual.bn1.running_mean"):
        load_clip("RN-tiny-test", tmp_path / "w.pt", device="cpu")


def test_coop_runs_on_rn50_from_the_command_line(tmp_path):
    """From a file of weights and a folder of images to stored accuracies."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**open_clip.get_model_config("RN50"))
    state = {name: value.half() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    del model, state
    for part, n in (("train", 2), ("val", 1), ("test", 2)):
        for c, name in enumerate(("green", "red")):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                colour = (200 * c, 200 - 200 * c, 40 * i)
                Image.new("RGB", (90, 80), colour).save(folder / f"{i}.png")
    how = ["--data", "./photos", "--model", "RN50", "--pretrained", "w.safetensors"]
    how += ["--like", "openai", "--shots", "2", "--epochs", "2", "--profile", "mini"]
    env = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    env |= {"PROMPTKIT_CACHE": "cache", "PROMPTKIT_RESULTS": "results"}

    def run(method, *more):
        command = [sys.executable, "-m", "promptkit", "run", method, *how, *more]
        return subprocess.run(
            command, capture_output=True, text=True, env=os.environ | env, cwd=tmp_path
        )

    done = run("coop", "--set", "n_ctx=2")
    assert done.returncode == 0, done.stderr
    (stored,) = (tmp_path / "results" / "few-shot").glob("coop-*.json")
    assert json.loads(stored.read_text())["config"]["model"].startswith("RN50/")
    done = run("maple")
    assert done.returncode == 2
    assert "maple works on the tokens inside a ViT" in " ".join(done.stderr.split())
