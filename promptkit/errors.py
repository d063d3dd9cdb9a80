"""Errors that a reader of the message can act on."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used. The message is one sentence: what is wrong, and what
    would be right.
    """


def unknown(kind: str, name: object, choices: Iterable[str]) -> InputError:
    """The error for a name that is not one of `choices`, led by the nearest of them.

    Args:
        kind (str): what the name should have named, such as "method" or "model".
        name (object): the offending value.
        choices (Iterable[str]): the valid names.

    Returns:
        InputError: ready to raise.
    """
    choices = list(choices)
    by_lower = {choice.lower(): choice for choice in choices}
    near = [
        by_lower[c]
        for c in difflib.get_close_matches(str(name).lower(), by_lower, n=3, cutoff=0.5)
    ]
    shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:76]}..."
    message = f"unknown {kind} {shown}"
    if near:
        message += f"; did you mean {' or '.join(repr(choice) for choice in near)}?"
    if not choices:
        return InputError(message)
    # A long list helps nobody: with a suggestion at hand, a few names show what the
    # rest look like.
    shown = choices if len(choices) <= 40 else near or choices[:20]
    if shown is not near:
        more = f", ... ({len(choices)} in all)" if len(shown) < len(choices) else ""
        message += (
            f"{'' if near else ';'} {'C' if near else 'c'}hoose from:"
            f" {', '.join(shown)}{more}"
        )
    return InputError(message)


def expect(holds: bool, name: str, value, expected: str) -> None:
    """Raise InputError "NAME must be EXPECTED, got VALUE" unless ``holds``; for ranges,
    in constructors.
    """
    if not holds:
        raise InputError(f"{name} must be {expected}, got {value!r}")


def expect_templates(name: str, given: str | Iterable[str] | None) -> None:
    """Raise InputError unless each template has a place for the class name; None is
    nothing to check.
    """
    templates = [given] if isinstance(given, str) else given
    fine = templates is None or (bool(templates) and all("{}" in t for t in templates))
    wanted = "one sentence or more, each with {} in place of the class name"
    expect(fine, name, given, wanted)
