"""Numbers and names as people and programs hand them over: one, several, or a text of
several.
"""

import ast
import operator
import os
import re

from promptkit.errors import InputError

LARGEST = 2**32 - 1  # that every generator takes as a seed
MOST = 10_000  # a longer list is a slip of the finger


def whole_numbers(name: str, value, least: int = 0) -> list[int]:
    """Whole numbers of a parameter: ``3``, ``[1, 2]``, or as text ``"1,4"``, ``"1-3"``
    or ``"[1, 2]"``.

    Args:
        name: of the parameter, for the error.
        value: a number, several of them, or a text.
        least: the smallest that is allowed.

    Raises:
        InputError: one is no whole number, is too small, or is named twice, or there
            are none.
    """
    out = []
    for part in _parts(value):
        low, high = _span(part)
        if low is None or high < low:
            raise InputError(
                f"{name} takes whole numbers such as 1, 1,4 or 1-3, not {value!r}"
            )
        if high > LARGEST:
            raise InputError(f"{name} takes whole numbers up to {LARGEST:,}")
        if low < least:
            raise InputError(f"{name} takes whole numbers from {least}, not {low}")
        if high - low + len(out) >= MOST:
            raise InputError(f"{name} takes at most {MOST:,} numbers, not {value!r}")
        out += range(low, high + 1)
    return _distinct(name, out, value)


def _span(part):
    """(first, last) of a number or of a range in a text; (None, None) for others."""
    if isinstance(part, str):
        found = re.fullmatch(r"(-?\d+)(?:\s*-\s*(\d+))?", part.strip())
        if not found or len(part) > 40:
            return None, None
        return int(found[1]), int(found[2] or found[1])
    try:
        number = operator.index(part)  # of numpy too; a float is refused
    except TypeError:
        return None, None
    return (None, None) if isinstance(part, bool) else (number, number)


def names(name: str, value, known=()) -> list[str]:
    """Names of a parameter: ``"pets"``, ``["pets", "cars"]``, or as text
    ``"pets,cars"`` or ``"['pets', 'cars']"``.

    Args:
        name: of the parameter, for the error.
        value: a name, several, or a text.
        known: names of which one in the text may be followed by a blank and another;
            what is not among them may hold blanks, as the path of a folder may.

    Raises:
        InputError: one is no text or is named twice, or there are none.
    """
    out = []
    for part in _parts(value):
        if not isinstance(part, str):
            raise InputError(f"{name} takes names, not {value!r}")
        part = part.strip()
        words = part.split()
        several = len(words) > 1 and not os.path.exists(os.path.expanduser(part))
        out += words if several and (not known or set(words) & set(known)) else [part]
    return _distinct(name, [word for word in out if word], value)


def _parts(value) -> list:
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy
    if isinstance(value, list | tuple | set | range):
        return list(value)
    if not isinstance(value, str):
        return [value]
    text = value.strip()
    if text.startswith(("[", "(")) and text.endswith(("]", ")")):
        try:
            found = ast.literal_eval(text)
            return list(found) if isinstance(found, list | tuple) else [found]
        except (ValueError, SyntaxError):  # a shell has eaten the quotes
            text = text[1:-1]
    elif os.path.exists(os.path.expanduser(text)):  # a path may hold a comma
        return [text]
    return text.split(",")


def _distinct(name, found, value):
    if not found:
        raise InputError(f"{name} names nothing: {value!r}")
    twice = next((x for n, x in enumerate(found) if x in found[:n]), None)
    if twice is not None:
        raise InputError(f"{name} names {twice!r} twice: {value!r}")
    return found
