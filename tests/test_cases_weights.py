"""Weights as other programs leave them: the right value or one clear sentence, and no
code of a file is run.
"""

import argparse
import copy
import json
import os
import pickle
import warnings
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from open_clip import CLIP
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from promptkit.clip import load_clip
from promptkit.errors import InputError
from promptkit.registry import build
from promptkit.weights import Opaque, clip_state, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

VISION = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
TEXT = dict(width=32, heads=2, layers=2)
NAME = "ViT-tiny-test"
OTHER = dict(mean=(0.5,) * 3, std=(0.2,) * 3, interpolation="bilinear")
TAGS = {
    "openai": open_clip.pretrained._pcfg(quick_gelu=True),
    "other": open_clip.pretrained._pcfg(**OTHER, resize_mode="squash"),
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
TEXTS = ["a photo of a dog.", "cat"]


@pytest.fixture(scope="module", autouse=True)
def configurations():
    """Two names of one architecture, and two tags that it was published with."""
    config = dict(embed_dim=24, vision_cfg=VISION, text_cfg=TEXT)
    known = {NAME: config, f"{NAME}-quickgelu": config | {"quick_gelu": True}}
    with pytest.MonkeyPatch.context() as patch:
        for name, one in known.items():
            patch.setitem(open_clip.factory._MODEL_CONFIGS, name, one)
        patch.setitem(open_clip.pretrained._PRETRAINED, NAME, TAGS)
        yield


@pytest.fixture(scope="module")
def models():
    """The same weights with plain GELU and with QuickGELU, {False: ..., True: ...}."""
    torch.manual_seed(0)
    both = {quick: CLIP(24, VISION, TEXT, quick_gelu=quick) for quick in (False, True)}
    with torch.no_grad():
        for name, p in both[False].named_parameters():
            if p.dim() > 1 and name != "logit_scale":
                p.mul_(4)
    both[True].load_state_dict(both[False].state_dict())
    return {quick: model.eval() for quick, model in both.items()}


@pytest.fixture(scope="module")
def state(models):
    return models[True].state_dict()


def features(model):
    with torch.no_grad():
        text = model.encode_text(open_clip.tokenize(TEXTS))
        return torch.cat([text, model.encode_image(IMAGES)])


def check(clip, model, tolerance=1e-4):
    """The CLIP computes what open_clip's model does."""
    ours = torch.cat([clip.encode_text(TEXTS), clip.encode_image(IMAGES)])
    assert_close(ours, features(model), rtol=tolerance, atol=tolerance)


# --- the activation -------------------------------------------------------------------


def test_the_activations_differ(models):
    assert (features(models[True]) - features(models[False])).abs().max() > 0.01


def test_an_unknown_activation_is_asked_for(models, state, tmp_path):
    file = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": state}, file)
    with pytest.raises(InputError, match="--like openai.*--quickgelu, --no-quickgelu"):
        load_clip(NAME, file, "cpu")
    for quick in (True, False):
        check(load_clip(NAME, file, "cpu", quickgelu=quick), models[quick])
    check(load_clip(f"{NAME}-quickgelu", file, "cpu"), models[True])
    with pytest.raises(InputError, match="name says QuickGELU and quickgelu=False"):
        load_clip(f"{NAME}-quickgelu", file, "cpu", quickgelu=False)


def test_a_fine_tune_follows_the_tag_that_it_started_from(models, state, tmp_path):
    file = tmp_path / "epoch_1.pt"
    torch.save(state, file)
    clip = load_clip(NAME, file, "cpu", like="openai")
    check(clip, models[True])
    assert clip.mean == open_clip.OPENAI_DATASET_MEAN
    assert (clip.interpolation, clip.resize_mode) == ("bicubic", "shortest")
    clip = load_clip(NAME, file, "cpu", like="other")
    check(clip, models[False])
    assert (clip.mean, clip.std) == (OTHER["mean"], OTHER["std"])
    assert (clip.interpolation, clip.resize_mode) == ("bilinear", "squash")
    assert (
        clip.normalize(torch.full((1, 3, 1, 1), 0.7)).flatten().tolist()
        == [pytest.approx(1.0)] * 3
    )
    check(load_clip(NAME, file, "cpu", like="openai", quickgelu=False), models[False])
    with pytest.raises(InputError, match="like= 'opnai'; did you mean 'openai'"):
        load_clip(NAME, file, "cpu", like="opnai")


@pytest.mark.parametrize(
    "entry, quick",
    [
        ({"args": argparse.Namespace(force_quick_gelu=True, lr=0.1)}, True),
        ({"args": argparse.Namespace(model="ViT-B-32-quickgelu")}, True),
        ({"config": {"model_cfg": {"quick_gelu": True}}}, True),
        ({"config": {"quick_gelu": False}}, False),
        ({"args": argparse.Namespace(force_quick_gelu=False, model="ViT-B-32")}, None),
        ({"config": "quick_gelu"}, None),
    ],
)
def test_a_checkpoint_may_say_it(models, state, tmp_path, entry, quick):
    file = tmp_path / "epoch_1.pt"
    torch.save({"state_dict": state} | entry, file)
    if quick is None:
        with pytest.raises(InputError, match="nothing says whether"):
            load_clip(NAME, file, "cpu")
        return
    check(load_clip(NAME, file, "cpu"), models[quick])
    other = "other" if quick else "openai"
    with pytest.raises(InputError, match=r"activation differs \(the file .*like= "):
        load_clip(NAME, file, "cpu", like=other)


@pytest.mark.parametrize("quick", [True, False])
def test_a_folder_of_the_hub_says_it(models, state, tmp_path, quick):
    file, config = tmp_path / "open_clip_model.safetensors", {"embed_dim": 24}
    save_file(state, file)
    config |= {"quick_gelu": True} if quick else {}
    preprocess = {"mean": [0.5] * 3, "std": [0.2] * 3, "resize_mode": "squash"}
    beside = tmp_path / "open_clip_config.json"
    beside.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    clip = load_clip(NAME, file, "cpu")
    check(clip, models[quick])
    assert (clip.mean, clip.std) == ((0.5,) * 3, (0.2,) * 3)
    assert (clip.interpolation, clip.resize_mode) == ("bicubic", "squash")
    beside.write_text("{")
    with pytest.raises(InputError, match="open_clip_config.json' is damaged"):
        load_clip(NAME, file, "cpu")


def test_the_record_loads_the_same_again(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    for options in ({"like": "other"}, {"quickgelu": False}, {"precision": "bf16"}):
        name = f"{NAME}-quickgelu" if "precision" in options else NAME
        clip = load_clip(name, "a.pt", "cpu", **options)
        source = json.loads(json.dumps(clip.source))
        monkeypatch.chdir("/")
        again = load_clip(**source, device="cpu")
        assert again.fingerprint == clip.fingerprint and again.source == clip.source
        assert (again.precision, again.dtype) == (clip.precision, clip.dtype)
        monkeypatch.chdir(tmp_path)


# --- formats --------------------------------------------------------------------------


def wrapped(state):
    """Name of the case and what is saved."""
    yield "state dict", state
    yield "trained in parallel", {"state_dict": prefixed(state, "module.")}
    yield "compiled", {"model": prefixed(state, "_orig_mod.")}
    yield "lightning", {"state_dict": prefixed(state, "model.") | {"loss.w": ONES}}
    yield "in the model", prefixed(state, "module.model.")
    yield "nested", {"model": {"state_dict": state}, "optimizer": {"state": {}}}
    yield "double", {key: value.double() for key, value in state.items()}
    yield "scale of shape (1,)", state | {"logit_scale": state["logit_scale"][None]}
    yield "with the mask", state | {"attn_mask": torch.ones(77, 77)}


ONES = torch.ones(3)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("case", range(9))
def test_wrappers(models, state, tmp_path, case):
    title, saved = list(wrapped(state))[case]
    torch.save(saved, tmp_path / "w.pt")
    torch.save(saved, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for file in ("w.pt", "old.bin"):
        check(load_clip(NAME, tmp_path / file, "cpu", quickgelu=True), models[True])


@pytest.mark.parametrize("dtype, tolerance", [("float16", 0.05), ("bfloat16", 0.3)])
def test_half_precision_files(models, state, tmp_path, dtype, tolerance):
    half = {key: value.to(getattr(torch, dtype)) for key, value in state.items()}
    torch.save(half, tmp_path / "w.pt")
    save_file(half, tmp_path / "w.safetensors")
    exact = copy.deepcopy(models[True])
    exact.load_state_dict(half)
    for file in ("w.pt", "w.safetensors"):
        clip = load_clip(NAME, tmp_path / file, "cpu", quickgelu=True)
        assert clip.dtype == torch.float32
        check(clip, exact)
        difference = clip.encode_image(IMAGES) - models[True].encode_image(IMAGES)
        assert difference.abs().max() < tolerance


def test_a_model_saved_whole(models, tmp_path):
    torch.save({"model": models[True], "epoch": 3}, tmp_path / "whole.pt")
    check(load_clip(NAME, tmp_path / "whole.pt", "cpu", quickgelu=True), models[True])


def published(state):
    """An archive of TorchScript as OpenAI published its models."""
    root = nn.Module()
    facts = dict(input_resolution=32, context_length=77, vocab_size=49408)
    facts = {key: torch.tensor(value) for key, value in facts.items()}
    for key, value in (state | facts).items():
        parent, (*parents, leaf) = root, key.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_buffer(leaf, value)
    root.forward = lambda x: x
    return torch.jit.trace_module(root, {"forward": torch.zeros(1)})


def test_torchscript_is_read_as_data(models, state, tmp_path, monkeypatch):
    published(state).save(tmp_path / "ViT-B-32.pt")

    def never(*args, **kwargs):
        raise AssertionError("code of the archive is loaded")

    monkeypatch.setattr(torch.jit, "load", never)
    monkeypatch.setattr(torch._C, "import_ir_module", never)
    clip = load_clip(NAME, tmp_path / "ViT-B-32.pt", "cpu")
    check(clip, models[True])
    assert clip.source["quickgelu"] is True


# --- no code --------------------------------------------------------------------------


class Marker(nn.Module):  # loading it as TorchScript writes a file
    def __init__(self):
        super().__init__()
        self.x, self.training = torch.zeros(3), False

    def forward(self, x):
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.x, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.x, self.training = state
        torch.save(torch.ones(1), "code_ran")


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_no_code_of_a_file_runs(models, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(Marker()).save("script.pt")
    evil = Call(os.system, "touch code_ran")
    torch.save(state | {"x": evil}, "evil.pt")
    torch.save(state | {"x": evil}, "old.pt", _use_new_zipfile_serialization=False)
    with open("plain.pt", "wb") as file:
        pickle.dump({"x": evil}, file)
    hidden = Call(getattr, Call(__import__, "os"), "system")
    written = Call(eval, "open('code_ran', 'w')")
    torch.save(state | {"x": [hidden], "y": written}, "both.pt")
    if os.path.exists("code_ran"):  # scripting may try it out
        os.remove("code_ran")
    assert read_checkpoint("script.pt") == {}
    found = read_checkpoint("evil.pt")
    assert isinstance(found["x"], Opaque) and torch.equal(
        found["visual.proj"], state["visual.proj"]
    )
    assert isinstance(read_checkpoint("both.pt")["x"][0], Opaque)
    for file in ("old.pt", "plain.pt"):
        with pytest.raises(InputError, match=f"{file}' is .*"):
            read_checkpoint(file)
    for file in ("script.pt", "old.pt", "plain.pt"):
        with pytest.raises(InputError, match=f"the file '.*{file}'"):
            load_clip(NAME, file, "cpu", quickgelu=True)
    for file in ("evil.pt", "both.pt"):  # their tensors are what they are
        check(load_clip(NAME, file, "cpu", quickgelu=True), models[True])
    assert not os.path.exists("code_ran")


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes of whatever was named before it."""
    evil = (
        b"\x80\x02}(X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x0c\x00\x00\x00__defaults__K\x01K\x02\x86s\x86bu."
    )
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("e/data.pkl", evil)
        archive.writestr("e/code/x.py", "")
    from promptkit import weights

    before = weights._tensor.__defaults__
    read_checkpoint(tmp_path / "e.pt")
    assert weights._tensor.__defaults__ == before


# --- checkpoints of methods -----------------------------------------------------------


def dassl(folder, learned):
    """A checkpoint as Dassl writes it: scheduler and numbers of numpy included."""
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.grad = torch.ones(4)
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    saved = {
        "state_dict": learned,
        "epoch": np.int64(50),
        "val_result": np.float64(71.5),
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": schedule, "last_epoch": 49},
        "args": argparse.Namespace(shots=16, root="/data"),
    }
    path = folder / "model.pth.tar-50"
    torch.save(saved, path)
    return path


def test_official_checkpoints_of_methods(tiny_clip, tmp_path):
    vectors = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    learned = {"ctx": vectors.half(), "token_prefix": torch.zeros(2, 1, 32)}
    path = dassl(tmp_path, learned)
    found = read_checkpoint(path)
    assert found["epoch"] == 50 and found["val_result"] == 71.5
    assert type(found["epoch"]) is int and type(found["val_result"]) is float
    assert found["args"] == {"shots": 16, "root": "/data"}
    assert torch.equal(found["state_dict"]["ctx"], vectors.half())
    momentum = found["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones(4))
    method = build("coop", tiny_clip, ["dog", "cat"], n_ctx=4)
    method.load_official(found)
    assert torch.equal(method.context.vectors.detach(), vectors.half().float())
    # The names of numpy before version 2.
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "old.tar", "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy._core." in b"".join(parts.values())
    assert read_checkpoint(tmp_path / "old.tar")["val_result"] == 71.5
    with pytest.raises(InputError, match=r"what a method has learned \(ctx, token_pre"):
        load_clip(NAME, path, "cpu", quickgelu=True)


def test_views_and_parameters_keep_their_values(tmp_path):
    """Transposed, shared, empty, of all types, and beside what only data can be."""
    base = torch.arange(12.0).view(3, 4)
    saved = {
        "t": base.t(),
        "row": base[1],
        "parameter": nn.Parameter(base[:, 2]),
        "empty": torch.empty(0, 3),
        "number": torch.tensor(2.5),
        "long": torch.tensor([2**40]),
        "flags": torch.tensor([True, False]),
        "bytes": torch.tensor([255], dtype=torch.uint8),
        "bf16": torch.tensor([1.5], dtype=torch.bfloat16),
        "other": Call(os.getcwd),
    }
    torch.save(saved, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert isinstance(found.pop("other"), Opaque)
    for key, value in found.items():
        assert value.dtype == saved[key].dtype and torch.equal(value, saved[key].data)


# --- what is no weights ---------------------------------------------------------------


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def damaged(state, folder):
    """(file, what is said of it)."""

    def file(name, data):
        (folder / name).write_bytes(data)
        return folder / name

    def saved(name, value):
        torch.save(value, folder / name)
        return folder / name

    for name, share in (("a.pt", 0.5), ("b.pt", 0.01), ("c.pt", 0.999)):
        cut(saved(name, state), share)
        yield name, "is damaged or cut off .*download it again"
    for name, share in (("a.safetensors", 0.5), ("b.safetensors", 0.001)):
        save_file(state, folder / name)
        cut(folder / name, share)
        yield name, "is damaged or cut off .*download it again"
    torch.save(state, folder / "o.bin", _use_new_zipfile_serialization=False)
    cut(folder / "o.bin", 0.5)
    yield "o.bin", "is damaged or cut off|cannot be read safely"
    published(state).save(folder / "script.pt")
    cut(folder / "script.pt", 0.5)
    yield "script.pt", "is damaged or cut off"
    yield file("empty.pt", b"").name, "is empty: copy or download it again"
    html = b"\xef\xbb\xbf \n<!DOCTYPE html><html>404</html>"
    yield file("page.pt", html).name, "is a web page, not weights"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    yield file("lfs.safetensors", pointer).name, "is a pointer of Git LFS"
    for name in ("text.safetensors", "text.pt", "text.pth.tar"):
        yield file(name, b"not weights").name, "neither safetensors nor of torch"
    np.savez(folder / "big.npz", a=np.zeros(3))
    yield "big.npz", "is an archive of numpy"
    np.save(folder / "one.npy", np.zeros(3))
    yield "one.npy", "neither safetensors nor of torch"
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("weights/model.pt", b"1")
    yield "a.zip", "is a zip archive and no weights"
    (folder / "folder").mkdir()
    yield "folder", "is a folder: name the file"
    yield "gone.pt", "does not exist"
    yield saved("list.pt", [1, 2]).name, "holds a list and not a dict"
    yield saved("tensor.pt", ONES).name, "holds a Tensor and not a dict"
    yield saved("other.pt", {"weights": ONES}).name, "no CLIP of open_clip's, but wei"
    yield saved("none.pt", {"epoch": 1}).name, "no tensors in it, only epoch"
    hf = {"text_model.embeddings.weight": ONES, "vision_model.x": ONES}
    yield saved("hf.bin", hf).name, "in the format of transformers"
    two = prefixed(state, "student.") | prefixed(state, "teacher.")
    yield saved("two.pt", two).name, "several CLIPs, under 'student.', 'teacher.'"
    lacking = {key: value for key, value in state.items() if "ln_final" not in key}
    yield saved("lacking.pt", lacking).name, "missing: ln_final.weight and 1 more"
    more = state | {"logit_bias": torch.zeros(())}
    yield saved("more.pt", more).name, "are unknown: logit_bias"
    nan = state | {"visual.proj": state["visual.proj"] * float("nan")}
    yield saved("nan.pt", nan).name, "are not finite: visual.proj"
    wide = CLIP(24, VISION | {"width": 64}, TEXT).state_dict()
    yield (
        saved("wide.pt", wide).name,
        r"of other shapes: visual.class_embedding is \(64,\) and not \(32,\) and",
    )
    deep = CLIP(24, VISION, TEXT | {"layers": 3}).state_dict()
    yield (
        saved("deep.pt", deep).name,
        r"are unknown: transformer.resblocks.2.*11 more",
    )
    long = CLIP(24, VISION, TEXT | {"context_length": 248}).state_dict()
    yield saved("long.pt", long).name, r"of other shapes: positional_embedding is \(248"


def test_what_is_no_weights_says_so(state, tmp_path):
    for name, message in damaged(state, tmp_path):
        with pytest.raises(InputError, match=f"file '.*{name}' .*({message})") as error:
            load_clip(NAME, tmp_path / name, "cpu", quickgelu=True)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400, name


def test_a_file_that_may_not_be_read(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "w.pt")

    def denied(self, *args):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(InputError, match="w.pt' cannot be read: Permission denied"):
        read_checkpoint(tmp_path / "w.pt")


def test_positions_of_another_image_size_are_interpolated_with_a_word(tmp_path):
    large = CLIP(24, VISION | {"image_size": 48}, TEXT, quick_gelu=True)
    torch.save(large.state_dict(), tmp_path / "large.pt")
    with pytest.warns(UserWarning, match="reads 36 patches.*this one reads 16"):
        clip = load_clip(NAME, tmp_path / "large.pt", "cpu", quickgelu=True)
    positions = clip.model.visual.positional_embedding
    assert torch.equal(positions[0], large.visual.positional_embedding[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = clip_state(read_checkpoint(tmp_path / "large.pt"))
    assert own.keys() == large.state_dict().keys()
