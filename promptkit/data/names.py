"""Names of classes, from files that people write."""

import re
import warnings
from pathlib import Path

from promptkit.errors import InputError
from promptkit.files import read_json, read_text, same, short, some, trimmed


def read_names(path) -> list[str]:
    """Class names from a text file, one a line, or from a JSON list.

    Blanks around a name and blank lines are dropped.

    Raises:
        InputError: the file cannot be read, is not in UTF-8, or names no class or one
            class twice.
    """
    if Path(path).suffix.lower() == ".json":
        content = read_json(path)
        if not isinstance(content, list):
            raise InputError(f'{path} must hold a list of names: ["heron", "fox", ...]')
        return _checked(list(enumerate(content, 1)), path, "entry")
    lines = enumerate(read_text(path).split("\n"), 1)
    return _checked([(n, line) for n, line in lines if trimmed(line)], path, "line")


def names_for(path, folders: list[str]) -> list[str]:
    """New names for the classes of a dataset.

    The file lists them in the order of the classes, one a line as in
    :func:`read_names`, or says by lines ``folder,name``, ``folder<TAB>name`` or
    ``folder name``, or as JSON ``{"folder": "name"}``, which is whose.

    Args:
        folders: the classes' present names, in order: those of their folders.

    Raises:
        InputError: as in :func:`read_names`; a class has no name, or there are more or
            fewer names than classes.
    """
    pairs = _pairs(path, folders)
    if pairs is None:
        names = read_names(path)
        if len(names) != len(folders):
            raise InputError(
                f"{path} has {len(names)} names for {len(folders)} classes"
                f" ({some(folders)}): it needs a line a class in this order, or"
                " 'folder,name'"
            )
        return names
    missing = [name for name in folders if name not in pairs]
    if missing:
        raise InputError(f"{path} has no name for the class {some(missing)}")
    if len(pairs) > len(folders):
        unknown = [name for name in pairs if name not in folders]
        warnings.warn(
            f"{path} also names what is no class here: {some(unknown)}", stacklevel=3
        )
    return _checked([(repr(name), pairs[name]) for name in folders], path, "class")


def _pairs(path, folders):
    """{folder: name} if the file is of that form, else None."""
    if Path(path).suffix.lower() == ".json":
        content = read_json(path)
        return content if isinstance(content, dict) else None
    lines = [
        (n, trimmed(line)) for n, line in enumerate(read_text(path).split("\n"), 1)
    ]
    lines = [(n, line) for n, line in lines if line]
    cuts = {
        mark: [(n, *map(trimmed, line.partition(mark)[::2])) for n, line in lines]
        for mark in "\t,; "
    }
    known = {
        mark: sum(folder in folders and name != "" for _, folder, name in cut)
        for mark, cut in cuts.items()
    }
    mark = max(known, key=known.get)
    # In a plain list of names, one or the other may begin as a folder is called.
    if not known[mark] or known[mark] < len(folders) / 2:
        return None
    pairs = {}
    for n, folder, name in cuts[mark]:
        if (folder.casefold(), name.casefold()) == ("folder", "name"):
            continue  # a head
        if not name or folder in pairs:
            what = "is named twice" if folder in pairs else "has no name"
            raise InputError(
                f"{path}: {folder!r} {what} in line {n}; a line must be 'folder,name'"
            )
        pairs[folder] = name
    return pairs


def warn_of_codes(classnames: list[str], title: str) -> None:
    """A warning if classes bear numbers or WordNet ids, which CLIP knows nothing of, or
    names that it reads alike.
    """
    codes = [name for name in classnames if re.fullmatch(r"n\d{7,8}|\d+", name)]
    if codes:
        kind = "WordNet id" if codes[0].startswith("n") else "number"
        which, what = f"class {codes[0]!r} bears", f"a {kind}"
        if len(codes) > 1:
            which, what = f"classes {some(codes)} bear", f"{kind}s"
        warnings.warn(
            f"{title}: the {which} {what} for a name, which tells CLIP nothing: give"
            " names by --classnames FILE, in Python load_dataset(...,"
            " classnames=FILE), a line 'folder,name' a class",
            stacklevel=3,
        )
    seen = {}
    for name in classnames:
        if seen.setdefault(same(name), name) != name:
            warnings.warn(
                f"{title}: the classes {seen[same(name)]!r} and {name!r} read alike to"
                " CLIP: if they are one, give them one name",
                stacklevel=3,
            )


def _checked(entries, path, kind):
    """Names as (where, name) pairs, trimmed; refused if empty, unprintable or
    repeated.
    """
    names, seen = [], {}
    for where, name in entries:
        if not isinstance(name, str) or not trimmed(name):
            raise InputError(f"{path}: the name of {kind} {where} is {short(name)}")
        name = trimmed(name)
        if not name.isprintable():
            raise InputError(
                f"{path}: the name {name!r} of {kind} {where} holds a sign that cannot"
                " be printed"
            )
        if seen.setdefault(same(name), where) != where:
            raise InputError(
                f"{path} names the class {name!r} twice: {kind} {seen[same(name)]} and"
                f" {kind} {where}"
            )
        names.append(name)
    if not names:
        raise InputError(f"{path} names no class")
    return names
