"""Hyperparameters: keyword-only, annotated arguments of a method's constructors,
checked by their annotations.

An argument that is annotated as a :class:`~promptkit.method.Method` or a
:class:`~promptkit.clip.FrozenCLIP` (a host, a teacher, further backbones) is an object
and no hyperparameter: see ``Method.objects``.
"""

import inspect
import math
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np

from promptkit.errors import InputError, unknown


@cache
def arguments(cls, root) -> dict[str, tuple[Any, Any]]:
    """``{name: (annotation, default)}``, from the constructors of a class and of those
    that it extends, below ``root``.

    Raises:
        TypeError: an argument has no annotation, so nothing could check it.
    """
    found = {}
    for base in cls.__mro__:
        if base is root:
            break
        if "__init__" not in vars(base):
            continue
        hints = typing.get_type_hints(base.__init__)
        parameters = inspect.signature(base.__init__).parameters.values()
        for p in parameters:
            if p.kind is p.KEYWORD_ONLY:
                if p.name == "host":
                    hints.setdefault("host", root)
                if p.name not in hints:
                    raise TypeError(
                        f"argument {p.name!r} of {base.__name__} has no annotation;"
                        f" write {p.name}: int = ..., say"
                    )
                found.setdefault(p.name, (hints[p.name], p.default))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def holds(hint, kinds: tuple[type, ...]) -> bool:
    """Whether an annotation asks for one of these classes, or several of them."""
    if isinstance(hint, type) and not typing.get_origin(hint):
        return issubclass(hint, kinds)
    return any(holds(part, kinds) for part in typing.get_args(hint))


def plain(value):
    """A number of NumPy's, as ``np.linspace`` gives them, as Python's own; the same in
    what lists and dictionaries hold.
    """
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


def check(owner: str, known: dict[str, tuple[Any, Any]], given: dict) -> dict:
    """The arguments with their defaults filled in.

    Args:
        owner: what a message calls the method.
        known: as :func:`arguments` gives them.
        given: name -> value.

    Raises:
        InputError: one is unknown (with the nearest name), missing, or is not what its
            annotation asks for.
    """
    given = plain(given)
    for name, value in given.items():
        if name not in known:
            raise unknown(f"hyperparameter of {owner}", name, known)
        hint = known[name][0]
        if not fits(value, hint):
            raise InputError(f"{owner}: {name} must be {describe(hint)}, got {value!r}")
    filled = {name: given.get(name, default) for name, (_, default) in known.items()}
    for name, value in filled.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"{owner} needs {name}=, {describe(known[name][0])}")
    return filled


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
    float: ("a number", lambda v: type(v) in (int, float) and math.isfinite(v)),
    str: ("a text", lambda v: isinstance(v, str)),
    dict: ("a dictionary", lambda v: isinstance(v, dict)),
    types.NoneType: ("None", lambda v: v is None),
    Any: ("anything", lambda v: True),
}


def fits(value, hint) -> bool:
    """Whether a value is what an annotation asks for."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return any(value == c and type(value) is type(c) for c in args)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin in (list, tuple):
        items = args[0] if args else Any
        return isinstance(value, list | tuple) and all(fits(v, items) for v in value)
    return _KINDS[origin][1](value) if origin in _KINDS else isinstance(value, origin)


def describe(hint) -> str:
    """What an annotation asks for, in words."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, args))
    if origin in (list, tuple):
        return f"a list, each item {describe(args[0])}" if args else "a list"
    return _KINDS[origin][0] if origin in _KINDS else f"a {origin.__name__}"
