"""What a number belongs to: the code, the data and the texts that it was measured with.

A run is found again by all of these, so that an old number never passes for new code, a
corrected label or another set of images.
"""

import ast
import hashlib
import inspect
import json
import linecache
import platform
import sys
from dataclasses import replace
from functools import cache
from importlib import import_module, metadata

import torch

from promptkit.errors import InputError
from promptkit.registry import nesting
from promptkit.results import PROBE

# What every number stands on: from pictures and names to tokens, through the towers,
# to a step and a score.
CORE = (
    "data.world",
    "data.render",
    "data.tasks",
    "data.samples",
    "clip",
    "frozen",
    "towers",
    "prompts",
    "method",
    "plugin",
    "recipe",
    "train",
    "data.features",
)
# What a method's file imports and no number stands on: tables, pictures, messages. The
# parts of ``data`` that count are named above; texts have a hash of their own.
ASIDE = ("data", "errors", "files", "picture", "published", "registry", "results")


def of_code(spec: str) -> str:
    """Hash of the code of a method, of its hosts, of what their files import and of the
    core they stand on: syntax trees without docstrings.

    So a run is made again when a method changes, wherever it was defined, and not when
    somebody rewords a comment. The linear probe's is its module's.
    """
    if spec == PROBE:
        return _module("promptkit.probe")
    sources = [_module(f"promptkit.{name}") for name in CORE]
    for cls in nesting(spec):
        sources += [_class(base) for base in cls.__mro__]
    return _hash("".join(sources))


def _class(cls) -> str:
    module = cls.__module__
    if module in ("builtins", "abc", "typing") or module.startswith("torch."):
        return ""
    if module in ("promptkit.method", "promptkit.plugin"):
        return ""  # part of the core
    loaded = sys.modules.get(module)
    if module != "__main__" and getattr(loaded, "__file__", None):
        return "".join(_module(name) for name in sorted(_imported(module)))
    return _typed(cls)


def with_source(cls):
    """A class that a process made by hand, ready for another one, which cannot read its
    source: it takes that along.
    """
    cls._source = _typed(cls)
    return cls


def _typed(cls) -> str:
    """A class of a notebook's cell, which has no file: the source of its functions is
    known, and with it the cell's; what is no function is told by its value.
    """
    if "_source" in vars(cls):
        return cls._source
    members = [getattr(f, "__func__", f) for f in vars(cls).values()]
    functions = [f for f in members if inspect.isfunction(f)]
    for function in functions:
        cell = "".join(linecache.getlines(function.__code__.co_filename))
        for node in ast.walk(ast.parse(cell)):
            first = function.__code__.co_firstlineno
            inside = isinstance(node, ast.ClassDef) and node.name == cls.__name__
            if inside and node.lineno <= first <= node.end_lineno:
                return ast.dump(_plain(node))
    if functions:
        raise InputError(
            f"the source of {cls.__qualname__} cannot be read, so its results could not"
            " be told from those of another version: define it in a file or a notebook"
        )
    return repr(sorted((k, repr(v)) for k, v in vars(cls).items() if k[:2] != "__"))


@cache
def _imported(module: str) -> frozenset[str]:
    """A module and those of the package that it imports, and they import, beyond the
    core.
    """
    found, todo = set(), [module]
    passed = {f"promptkit.{name}" for name in CORE}
    while todo:
        name = todo.pop()
        found.add(name)
        for node in ast.walk(_tree(name)):
            origin = node.module if isinstance(node, ast.ImportFrom) else None
            if origin == "promptkit":
                names = {f"promptkit.{alias.name}" for alias in node.names}
            else:
                names = {origin} if (origin or "").startswith("promptkit.") else set()
            for other in names - found - passed:
                if other.split(".")[1] not in ASIDE:
                    todo.append(other)
    return frozenset(found)


@cache
def _module(name: str) -> str:
    return _hash(ast.dump(_plain(_tree(name))))


def _tree(name):
    return ast.parse(inspect.getsource(import_module(name)))


def _plain(tree):
    """A syntax tree without its docstrings."""
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            node.body = node.body[1:]
    return tree


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def of_texts(spec: str, hparams: dict, dataset) -> str:
    """Hash of what a method takes from a dataset beside its images: templates,
    descriptions. Empty if it takes nothing.
    """
    taken = []
    for cls in nesting(spec):
        asked = {name: default for name, (_, default) in cls.hyperparameters().items()}
        asked |= {key: value for key, value in hparams.items() if key != "host"}
        for name, take in cls.from_dataset.items():
            if asked[name] is None:
                taken.append([cls.name, name, take(dataset)])
        hparams = hparams.get("host") or {}
    return _hash(json.dumps(taken, sort_keys=True, default=str)) if taken else ""


def reads_descriptions(spec: str, hparams: dict, dataset) -> bool:
    """Whether a method takes what a dataset says of its classes."""
    said = [replace(dataset, descriptions=d) for d in ({}, {"a class": ["a sentence"]})]
    return len({of_texts(spec, hparams, each) for each in said}) > 1


@cache
def versions() -> dict[str, str]:
    """Versions that a result notes: promptkit, torch, open_clip, python."""
    found = {"python": platform.python_version()}
    for key, package in (
        ("promptkit", "promptkit"),
        ("torch", "torch"),
        ("open_clip", "open_clip_torch"),
    ):
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            found[key] = "checkout"
    return found


def of_device(device) -> str:
    """What a result calls a device."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
