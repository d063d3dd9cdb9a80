"""Where files are kept, and how they are written: whole or not at all."""

import os
import tempfile
from pathlib import Path


def cache_folder(name: str = "") -> Path:
    """$PROMPTKIT_CACHE, or promptkit in the user's cache folder; made if missing."""
    base = (
        os.environ.get("PROMPTKIT_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        / "promptkit"
    )
    folder = Path(base) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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
        os.chmod(
            temporary, 0o666 & ~mask
        )  # a temporary file is private, a result is not
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
