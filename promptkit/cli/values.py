"""Values of options as people write them: settings, datasets, numbers, files."""

import ast
import json
import math
import re
import types
import typing
from pathlib import Path

from promptkit.cli.console import say
from promptkit.errors import InputError, unknown
from promptkit.parameters import names


def datasets(text, profile, option="--data") -> list[str]:
    """Names of datasets and paths of one's own; "all" depends on the profile's world.

    Raises:
        InputError: one is unknown, or named twice.
    """
    from promptkit import data
    from promptkit.data.own import is_path

    known = data.list_datasets()
    found = names(option, text, known)
    if found == ["all"]:
        return list(data.DATASETS if profile == "full" else data.MINI_TASKS)
    for name in found:
        if name not in known and not is_path(name):
            raise unknown("dataset", name, known)
    return found


def choose_profile(profile, text, model) -> str:
    """The profile that is asked for; if none is, the papers' recipes where both data
    and weights are real.

    Args:
        text: as ``--data`` gives it, or None.
    """
    from promptkit.clip import MINI
    from promptkit.data.benchmark import TABLE
    from promptkit.data.own import is_path
    from promptkit.recipe import PROFILES

    if profile is not None and profile not in PROFILES:
        raise unknown("profile", profile, PROFILES)
    chosen = [] if text in (None, "all") else datasets(text, profile)
    real = [name for name in chosen if name in TABLE or is_path(name)]
    real_weights = model is not None and model not in MINI
    if not (real and real_weights) or profile in ("full", "smoke"):
        return profile or "mini"
    if profile is None:
        say(f"profile full: {', '.join(real)} and {model} are real")
        return "full"
    say(
        "Warning: the profile mini shortens recipes for the embedded world; for"
        f" {', '.join(real)} with {model} the papers' recipes are --profile full"
    )
    return profile


def naming(classnames: Path | None, descriptions: Path | None) -> dict:
    """Files of class names and of sentences, as a run takes them."""
    given = {"classnames": classnames, "descriptions": descriptions}
    for name, path in given.items():
        folder = name == "descriptions" and path is not None
        if folder and path.expanduser().is_dir():
            continue
        if path is not None and not path.expanduser().is_file():
            raise InputError(f"--{name}: there is no file {path}")
    return {k: str(p.expanduser()) for k, p in given.items() if p is not None}


def class_names(classes: str | None, file: Path | None) -> list[str] | None:
    """The names of ``--classes`` or ``--classes-file``; None if neither is given."""
    if classes is not None and file is not None:
        raise InputError("give the class names once: by --classes or by --classes-file")
    if file is not None:
        from promptkit.data.names import read_names

        return read_names(file)
    if classes is None:
        return None
    from promptkit.data.names import same

    found = [name.strip() for name in classes.split(",") if name.strip()]
    if not found:
        raise InputError(f"--classes names nothing: {classes!r}")
    seen = {}
    for name in found:  # blanks belong to a name: "red fox,otter"
        if seen.setdefault(same(name), name) != name or found.count(name) > 1:
            raise InputError(f"--classes names {name!r} twice: {classes!r}")
    return found


# --- settings -------------------------------------------------------------------------


def settings(method: str, texts, **options) -> dict:
    """Overrides of a recipe and of hyperparameters, by what each of them is declared
    to take; those of a plug-in's host are nested in "host".

    Args:
        method: as ``build`` takes it.
        texts: of ``--set``.
        options: fields of the recipe that have options of their own; None: not given.

    Raises:
        InputError: a name is unknown or given twice, or a value does not fit.
    """
    overrides = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        *hosts, name = key.strip().split(".")
        if not equals or not name.isidentifier() or any(h != "host" for h in hosts):
            raise InputError(
                f"--set takes KEY=VALUE, such as n_ctx=4 or host.n_ctx=4, not {text!r}"
            )
        inner = overrides
        for _ in hosts:
            inner = inner.setdefault("host", {})
        if name in inner:
            raise InputError(f"--set {key.strip()} is given twice")
        inner[name] = _value(method, len(hosts), name, value)
    for name, value in options.items():
        if value is None:
            continue
        if name in overrides:
            raise InputError(
                f"give {name} once: by --{name.replace('_', '-')} or by --set"
            )
        overrides[name] = value
    return overrides


def _value(method, depth, name, text):
    from promptkit.recipe import Recipe
    from promptkit.registry import nesting
    from promptkit.runs import PROBE, RECIPE_FIELDS

    if not depth and name in RECIPE_FIELDS:
        return read(name, text, typing.get_type_hints(Recipe)[name])
    if method == PROBE:
        return text  # which refuses all of them, in its own words
    classes = nesting(method)
    if depth >= len(classes):
        raise InputError(f"{method} has no host whose {name} could be set")
    known = classes[depth].hyperparameters()
    if name in known:
        return read(name, text, known[name][0])
    objects = classes[depth].objects()
    if name in objects and name != "host":
        return text.strip()
    fields = () if depth else sorted(RECIPE_FIELDS)
    choices = [*known, *(set(objects) - {"host"}), *fields]
    raise unknown(f"hyperparameter of {classes[depth].name}", name, choices)


def read(name: str, text: str, hint):
    """A value from its text, by the annotation of what it is for.

    A text is taken as it stands, in quotes or without; a list or a dictionary is
    written as in Python or JSON.

    Raises:
        InputError: the text is nothing of what the annotation asks for.
    """
    bare = text.strip()
    origin, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    hints = parts if origin in (typing.Union, types.UnionType) else (hint,)
    if types.NoneType in hints and bare.lower() in ("none", "null"):
        return None
    for kind in sorted(hints, key=lambda kind: kind is str):  # a text would fit always
        try:
            return _read_as(text if kind is str else bare, kind)
        except (ValueError, KeyError, SyntaxError, MemoryError, RecursionError):
            continue
    from promptkit.hyperparameters import describe

    comma = float in hints and re.fullmatch(r"[+-]?\d*,\d+", bare)
    advice = "; write a decimal point" if comma else ""
    raise InputError(f"{name} must be {describe(hint)}, got {text!r}{advice}")


def _read_as(text, kind):
    origin = typing.get_origin(kind) or kind
    if origin is typing.Literal:
        return {str(c): c for c in typing.get_args(kind)}[_unquoted(text)]
    if kind is str:
        return _unquoted(text)
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text):
            raise ValueError(text)
        return int(text)
    if kind is float:
        value = float(text)
        if not math.isfinite(value) or "_" in text:
            raise ValueError(text)
        return value
    if origin in (list, tuple, dict):
        value = _literal(text)
        if not isinstance(value, dict if origin is dict else list | tuple):
            raise ValueError(text)
        return value if origin is dict else origin(value)
    if kind is typing.Any:
        return _literal(text)
    raise ValueError(text)


def _literal(text):
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def _unquoted(text):
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text
        return value if isinstance(value, str) else text
    return text
