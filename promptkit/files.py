"""Where files are kept, and how they are written: whole or not at all, one process at
a time; and how those that people write are read.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from filelock import FileLock

from promptkit.errors import InputError


def cache_folder(name: str = "") -> Path:
    """$PROMPTKIT_CACHE, or promptkit in the user's cache folder; made if missing.

    Raises:
        InputError: it cannot be made.
    """
    base = (
        os.environ.get("PROMPTKIT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "promptkit"
    )
    folder = Path(base) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set"
            " $PROMPTKIT_CACHE to one that can"
        ) from None
    return folder


def lock(path) -> FileLock:
    """A lock, held by one process at a time, on what is made at a path: `with
    lock(path): ...`. It ends with the process that holds it, however that ends.
    """
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:24]
    return FileLock(cache_folder("locks") / f"{name}.lock")


def check_writable(folder, option: str) -> None:
    """InputError unless files can be written in a folder, or it can be made."""
    there = Path(folder).absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(
            f"{option}: {folder} cannot be written, as {there} is no folder where files"
            " can be made"
        )


def write_atomically(path, write) -> Path:
    """Call `write(file)` on a temporary binary file beside `path`, then move it into
    place.

    Raises:
        OSError: that cannot be done; it names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = f".{path.stem[:40]}{path.suffix}-"  # a file's name has at most 255 bytes
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=name)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        mask = os.umask(0)
        os.umask(mask)
        # a temporary file is private, a result is not
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    return path


# --- files that people write ----------------------------------------------------------

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


def read_json(path):
    """What a JSON file in UTF-8 holds.

    Raises:
        InputError: as in :func:`read_text`; it is damaged, or has a key twice.
    """

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


def some(names) -> str:
    """A few of them, for a message."""
    names = [repr(name) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[: 3 if more else 4]) + more


def short(value) -> str:
    """What it looks like, for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
