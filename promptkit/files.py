"""Where files are kept, and how they are written: whole or not at all, one process at
a time.
"""

import hashlib
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
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        mask = os.umask(0)
        os.umask(mask)
        # a temporary file is private, a result is not
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
