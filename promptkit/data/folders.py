"""What lies in folders of images, without what systems and programs leave there."""

import hashlib
import json
import os
import time
import warnings
from pathlib import Path

from promptkit.data.images import SUFFIXES
from promptkit.files import cache_folder, write_atomically

# Folders that unpackers, file managers and servers leave beside people's own.
_LEFT = {
    "__macosx", "$recycle.bin", "system volume information", "@eadir", "lost+found",
}  # fmt: skip
# Files that stand beside images and nobody takes for one.
_BESIDE = (
    ".txt", ".md", ".json", ".csv", ".tsv", ".xml", ".html", ".db", ".ini", ".py",
    ".npy", ".mat",
)  # fmt: skip


def counts(name: str) -> bool:
    """Whether a file or folder of this name is the user's: hidden ones (.DS_Store,
    ._1.png, .ipynb_checkpoints) and what systems leave are not.
    """
    return not name.startswith(".") and name.lower() not in _LEFT


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return counts(name) and name.lower().endswith(SUFFIXES)


def left_out(folder) -> list[str]:
    """The files in a folder and below it that count and are no images by their names;
    without texts and tables, which nobody takes for one. In the order of their names.
    """
    names = [name for *_, names in _folders(folder) for name in filter(counts, names)]
    beside = (*SUFFIXES, *_BESIDE)
    return sorted(name for name in names if not name.lower().endswith(beside))


def unread(names) -> str:
    """What is said of files that are left out: "3 files (.heic) are no images that can
    be read".
    """
    kinds = sorted({Path(name).suffix.lower() for name in names} - {""})
    kinds = f" ({', '.join(kinds[:5])})" if kinds else ""
    return f"{len(names)} files{kinds} are no images that can be read"


def inside(folder) -> tuple[list[str], list[str]]:
    """The folders and the images in a folder that count, sorted by code point."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    folders = [e.name for e in entries if counts(e.name) and e.is_dir()]
    images = [e.name for e in entries if is_image(e.name) and not e.is_dir()]
    return folders, images


def images_in(folder) -> list[Path]:
    """All images in a folder and below it that count, sorted by path."""
    return sorted(Path(folder, path) for path in _walk(folder)[1])


def scan(folder: Path, remember: bool = False) -> dict[str, dict[str, int]]:
    """The images below each folder of `folder`, sorted by code point: {class folder:
    {relative path: size in bytes}}.

    Args:
        folder (Path): holds a folder a class.
        remember (bool): keep what was found in the cache folder, for as long as no
            folder below changes: a million files take seconds to list. A size is then
            the one that was found the first time.
    """
    folder = Path(folder)
    where = str(folder.resolve())
    name = hashlib.sha256(os.fsencode(where)).hexdigest()[:24]
    index = cache_folder("folders") / f"{name}.json"
    known = _read_index(index, where) if remember and index.exists() else {}
    found = {name: _known(folder / name, known.get(name)) for name in inside(folder)[0]}
    if remember and found != known:
        lasting = {name: part for name, part in found.items() if _settled(part[0])}
        text = json.dumps([_checksum(where, lasting), lasting])
        write_atomically(index, lambda file: file.write(text.encode()))
    return {
        name: {f"{name}/{path}": size for path, size in files.items()}
        for name, (_, files) in found.items()
    }


def _checksum(where, found):
    return hashlib.sha256(json.dumps([where, found]).encode()).hexdigest()


def _read_index(path, where):
    """{class folder: [{folder below: when it changed}, {image: size}]}"""
    try:
        checksum, known = json.loads(path.read_text(encoding="utf-8"))
        if checksum == _checksum(where, known):
            return known
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    warnings.warn(
        f"damaged list of the files in {where}, {path}: making it again", stacklevel=3
    )
    return {}


def _known(folder, known):
    """What is known of a class folder, if no folder in it changed since, else what is
    there now.
    """
    if known is not None:
        try:
            if known[0] == {at: os.stat(folder / at).st_mtime_ns for at in known[0]}:
                return known
        except OSError:
            pass  # a folder below is gone
    changed, files = _walk(folder)
    return [changed, dict(sorted(files.items()))]


def _walk(folder):
    """{folder below: when it changed}, {image below: size}, by relative paths."""
    changed, files = {}, {}
    for where, ns, names in _folders(folder):
        at = Path(where).relative_to(folder).as_posix()
        at = "" if at == "." else at
        changed[at] = ns
        for name in filter(is_image, names):
            path = Path(where, name)
            files[f"{at}/{name}".lstrip("/")] = (
                path.stat().st_size if path.exists() else -1
            )
    return changed, files


def _folders(folder):
    """(folder, when it changed, names of the files in it) of a folder and those below
    that count, each once, by whatever links it is reached.
    """
    seen = set()
    for where, below, names in os.walk(folder, followlinks=True):
        stat = os.stat(where)
        place = stat.st_dev, stat.st_ino
        below[:] = sorted(filter(counts, below)) if place not in seen else []
        if place not in seen:
            seen.add(place)
            yield where, stat.st_mtime_ns, names


def _settled(changed):
    """Whether a folder changed long enough ago for its time to tell the next change."""
    return time.time_ns() - max(changed.values()) > 20_000_000
