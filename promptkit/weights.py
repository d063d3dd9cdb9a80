"""Weights as files, read as data: whatever a file holds, none of its code runs.

safetensors holds tensors alone. What `torch.save` and TorchScript write are pickles,
which name functions to call; here they are read by an unpickler that knows how to
rebuild a tensor and takes every other object as the dict of its attributes.
"""

import codecs
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from inspect import isfunction
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from promptkit.errors import InputError

__all__ = ["Opaque", "clip_state", "read_checkpoint", "recorded", "state_dict"]

# Where checkpoints keep the tensors among other things, and what was asked for.
_STATES = ("state_dict", "model_state_dict", "model_state", "model")
_SETTINGS = ("args", "config", "cfg", "hparams", "opt", "model_cfg")
_OPENAI = {"input_resolution", "context_length", "vocab_size"}
_AGAIN = "copy or download it again"


class Opaque(dict):
    """An object of any class in a checkpoint: its attributes and items, without what it
    could do.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __call__(self, *args, **kwargs):
        return Opaque()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {"state": state})

    def append(self, item):
        self[len(self)] = item

    def extend(self, items):
        for item in items:
            self.append(item)

    add = append
    __hash__ = object.__hash__


def read_checkpoint(path) -> dict:
    """What a checkpoint file holds: tensors on the CPU, numbers, texts, lists, dicts.

    Objects of other classes (a scheduler, a configuration) are an `Opaque`, the dict of
    their attributes.

    Args:
        path (str | os.PathLike): safetensors, a file of `torch.save` of any suffix such
            as model.pth.tar-50, or an archive of TorchScript, of which the tensors are
            read by name.

    Returns:
        dict: as it was saved. `state_dict` finds the tensors in it.

    Raises:
        InputError: the file is missing, cannot be read, is damaged, or is none of
            these.
    """
    path = Path(path).expanduser()

    def refuse(what):
        return InputError(f"the file {str(path)!r} {what}")

    if path.is_dir():
        raise refuse("is a folder: name the file of weights in it")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise InputError(f"the weights file {str(path)!r} does not exist") from None
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    if not head:
        raise refuse(f"is empty: {_AGAIN}")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise refuse("is a web page, not weights: download the file itself")
    if head.startswith(b"version https://git-lfs"):
        raise refuse("is a pointer of Git LFS, not weights: fetch it by 'git lfs pull'")
    try:
        if head[4:9] == b"\0\0\0\0{":
            from safetensors.torch import load_file

            found = load_file(path)
        elif head.startswith(b"PK"):
            found = _read_zip(path)
        elif head.startswith(b"\x80"):  # torch.save before version 1.6
            found = _read_torch(path)
        else:
            raise refuse("holds no weights: it is neither safetensors nor of torch")
    except InputError:
        raise
    except pickle.UnpicklingError:  # torch's own is a page long
        raise refuse(
            "is no file of torch.save, or holds objects that cannot be read safely:"
            " save its state dict alone"
        ) from None
    except Exception as error:  # each format has errors of its own
        raise refuse(f"is damaged or cut off ({_line(error)}): {_AGAIN}") from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise refuse(f"holds a {kind} and not a dict of tensors: save a state dict")
    return found


def _read_torch(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pickle's protocol
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_zip(path: Path):
    if not zipfile.is_zipfile(path):
        raise ValueError("the end of the archive is missing")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if PurePosixPath(name).name == "data.pkl"]
        if len(pickles) != 1:
            numpy = bool(names) and all(name.endswith(".npy") for name in names)
            raise InputError(
                f"the file {str(path)!r} is"
                f" {'an archive of numpy' if numpy else 'a zip archive'} and no weights"
                " of torch: convert them to a state dict or safetensors"
            )
        folder = pickles[0].removesuffix("data.pkl")
        script = any(name.startswith(f"{folder}code/") for name in names)
        if not script:
            try:
                return _read_torch(path)
            except pickle.UnpicklingError:  # it holds more than tensors
                pass
        found = _Unpickler(archive, folder).load()
    return dict(_flat(found)) if script else found


class _Unpickler(pickle.Unpickler):
    """Calls nothing but the functions below, whatever the pickle asks for."""

    def __init__(self, archive: zipfile.ZipFile, folder: str):
        super().__init__(archive.open(f"{folder}data.pkl"), encoding="utf-8")
        self.archive, self.folder = archive, folder
        self.storages: dict[str, Tensor] = {}
        order = f"{folder}byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are big-endian")

    def find_class(self, module, name):
        known = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None and module in ("torch", "torch.storage"):
            known = _DTYPES.get(name)
        if known is None:
            return type(name, (Opaque,), {})
        # A pickle can set attributes of what it names, so a function is named anew.
        return (lambda *args: known(*args)) if isfunction(known) else known

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        if not isinstance(dtype, torch.dtype):
            raise ValueError("it holds numbers of an unknown type")
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        storage = self.storages[key]
        if len(storage) < count:
            raise ValueError(f"numbers are missing from {key}")
        return storage


def _tensor(storage, offset, size, stride, *_):
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= len(storage):
        raise ValueError("a tensor is larger than its numbers")
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data, *_):
    return data


class _Dtype(Opaque):
    def __init__(self, code="", *args):
        super().__init__()
        self.code = code


def _number(dtype, raw=b""):
    """A scalar of numpy as a plain number."""
    if not re.fullmatch(r"[biuf]\d+", getattr(dtype, "code", "")):
        return Opaque()
    return np.frombuffer(raw, np.dtype(dtype.code))[0].item()


_KNOWN = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _number,
    ("_codecs", "encode"): lambda text, coding: codecs.encode(text, "latin1"),
}
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _flat(tree: dict, prefix: str = ""):
    """(dotted name, tensor) of a module that was read as a tree of attributes."""
    if "_modules" in tree:  # a module saved whole; else one of TorchScript
        parts = (tree.get(key) or {} for key in ("_parameters", "_buffers", "_modules"))
        tree = {name: value for part in parts for name, value in part.items()}
    for name, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Opaque):
            yield from _flat(value, f"{prefix}{name}.")


def state_dict(checkpoint: dict) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: its own, or those under "state_dict" or
    "model".

    Raises:
        InputError: if there are none.
    """
    tree, depth = checkpoint, 0
    while depth < 3 and (key := next((k for k in _STATES if k in tree), None)):
        if not isinstance(tree[key], dict):
            break
        tree, depth = tree[key], depth + 1
    if isinstance(tree, Opaque):
        return dict(_flat(tree))
    found = {key: value for key, value in tree.items() if isinstance(value, Tensor)}
    if not found:
        only = f", only {_some(checkpoint)}" if checkpoint else ""
        raise InputError(f"there are no tensors in it{only}")
    return found


def clip_state(checkpoint: dict) -> dict[str, Tensor]:
    """The state dict of open_clip's CLIP in a checkpoint; prefixes such as "module."
    are dropped, and so is what stands beside a CLIP that has one.

    Raises:
        InputError: if there is none, or more than one.
    """
    state, mark = state_dict(checkpoint), "visual.conv1.weight"
    found = [k for k in state if k == mark or k.endswith(f".{mark}")]
    if not found:
        what = f"it holds no CLIP of open_clip's, but {_some(state)}"
        parts = {part for key in state for part in key.split(".")}
        if parts & {"prompt_learner", "ctx", "token_prefix"}:
            what = (
                f"it holds what a method has learned ({_some(state)}), and not the"
                " weights of a CLIP"
            )
        elif any("text_model." in key for key in state):
            what = "it is in the format of transformers; convert it to open_clip's"
        raise InputError(what)
    if len(found) > 1:
        names = ", ".join(repr(key.removesuffix(mark)) for key in found)
        raise InputError(f"it holds several CLIPs, under {names}: save one alone")
    prefix = found[0].removesuffix(mark)
    state = {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and not key.endswith("attn_mask")  # never learned
    }
    return {key: value for key, value in state.items() if key not in _OPENAI}


def recorded(checkpoint: dict, path) -> tuple[bool | None, dict]:
    """What a checkpoint says of itself, or open_clip_config.json beside it.

    Returns:
        tuple[bool | None, dict]: whether its weights want QuickGELU, None where nothing
            says so, and the preprocessing, {} likewise.
    """
    if state_dict(checkpoint).keys() >= _OPENAI:  # as it published its models
        return True, {}
    beside = Path(path).expanduser().parent / "open_clip_config.json"
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        quick = bool(config["model_cfg"].get("quick_gelu", False))
        return quick, dict(config.get("preprocess_cfg") or {})
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"the file {str(beside)!r} is damaged ({_line(error)}): {_AGAIN}"
        ) from None
    entries = [checkpoint[key] for key in _SETTINGS if key in checkpoint]
    entries = [entry for entry in entries if isinstance(entry, dict)]
    entries += [e["model_cfg"] for e in entries if isinstance(e.get("model_cfg"), dict)]
    for entry in entries:
        for key in ("quick_gelu", "quickgelu"):
            if isinstance(entry.get(key), bool):
                return entry[key], {}
        if entry.get("force_quick_gelu") is True:
            return True, {}
        if str(entry.get("model", "")).lower().endswith("-quickgelu"):
            return True, {}
    return None, {}


def _some(items) -> str:
    names = [str(name) for name in items]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "nothing"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
