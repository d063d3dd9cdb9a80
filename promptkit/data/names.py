"""Names of classes, from files that people write."""

import json
import re
import warnings
from pathlib import Path

from promptkit.errors import InputError

_MARKS = (  # of encodings, at the start of a file; the longer ones first
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def read_text(path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, whose lines end
    in newlines alone.

    Raises:
        InputError: there is no such file, or it is of another encoding; the message
            names the likely one and how to convert it.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    if encoding is None and b"\0" in content:
        encoding = "UTF-16LE" if content[1:2] == b"\0" else "UTF-16BE"
        if content.count(b"\0") not in range(len(content) // 4, len(content) + 1):
            raise InputError(f"{path} is no text: it holds bytes of zero")
    if encoding is None:
        try:
            text = content.decode("utf-8-sig")
            return text.replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            try:
                content.decode("cp1252")
                encoding = "WINDOWS-1252"
            except UnicodeDecodeError:
                raise InputError(
                    f"{path} is not in UTF-8 (line {line}), nor in an encoding that can"
                    " be told: save it as UTF-8"
                ) from None
            likely = f"line {line} is not UTF-8, probably {encoding}"
    else:
        likely = f"it is in {encoding}"
    raise InputError(
        f"{path} must be in UTF-8, but {likely}: save it as UTF-8 (in Excel as 'CSV"
        " UTF-8'), or convert it by iconv"
        f" -f {encoding} -t UTF-8 '{path}' > new{path.suffix}"
    )


def trimmed(text: str) -> str:
    """Text without blanks and invisible marks around it."""
    return text.strip().strip("\ufeff\u200b").strip()


def same(name: str) -> str:
    """What two names share that CLIP reads alike: case, and underscores for blanks, are
    nothing to it.
    """
    return " ".join(name.replace("_", " ").split()).casefold()


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


def read_json(path):
    def once(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{path} has the key {twice!r} twice")
        return found

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"damaged JSON file {path} ({error})") from None


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


def some(names) -> str:
    """A few of them, for a message."""
    names = [repr(name) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def short(value) -> str:
    """What it looks like, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
