"""Images in files: found, told apart from others, and decoded when they are asked
for.
"""

import hashlib
import json
import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from promptkit.errors import InputError
from promptkit.files import cache_folder, write_atomically

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".webp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
warnings.filterwarnings(
    "ignore", category=UserWarning, module=r"PIL\."
)  # of damaged EXIF data, which nobody reads
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


class Files:
    """Images that are read when they are indexed: `files[rows]` is a list of RGB images
    (3, H, W) uint8, of any sizes.

    Args:
        folder (Path): where `paths` start.
        paths (list[str]): the files, with forward slashes.
        sizes (list[int | None] | None): their sizes in bytes, where they are known
            already.

    Raises:
        InputError: files are missing or empty; the message names the first.
    """

    def __init__(
        self, folder: Path, paths: list[str], sizes: list[int | None] | None = None
    ):
        self.folder, self.paths = Path(folder), paths
        self.sizes = [
            self._size(p) if s is None else s
            for p, s in zip(paths, sizes or [None] * len(paths), strict=True)
        ]
        bad = [path for path, size in zip(paths, self.sizes, strict=True) if size <= 0]
        if bad:
            what = (
                "missing or empty"
                if len(bad) > 1
                else "empty"
                if 0 in self.sizes
                else "missing"
            )
            verb = (
                f"{len(bad)} of {len(paths)} images are"
                if len(bad) > 1
                else "the image is"
            )
            raise InputError(
                f"{verb} {what}: {self.folder / bad[0]}; get the files again"
            )

    def _size(self, path):
        try:
            return os.stat(self.folder / path).st_size
        except OSError:
            return -1

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: torch.Tensor):
        paths = [self.folder / self.paths[row] for row in rows.reshape(-1).tolist()]
        images = (
            [read_image(paths[0])]
            if len(paths) == 1
            else list(workers().map(read_image, paths))
        )
        return images if rows.dim() else images[0]

    @cached_property
    def identity(self) -> str:
        """Hash of the relative paths and the sizes: the same wherever the folder
        lies.
        """
        digest = hashlib.sha256()
        for path, size in zip(self.paths, self.sizes, strict=True):
            digest.update(f"{path}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


def workers() -> ThreadPoolExecutor:
    """Threads that decode and resize images; PIL leaves Python's lock to others while
    it does.
    """
    return _workers(os.getpid())  # threads do not survive a fork


@lru_cache(1)
def _workers(process):
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), "images")


def read_image(path) -> torch.Tensor:
    """An image file as (3, H, W) uint8, in RGB.

    Raises:
        InputError: it is missing, damaged, cut short or no image.
    """
    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"there is no image {path}; get the files again") from None
    except _UNREADABLE as error:
        raise InputError(
            f"damaged image {path} ({error}); get the file again, or remove it from the"
            " lists"
        ) from None


def scan(folder: Path, remember: bool = False) -> dict[str, dict[str, int]]:
    """The images below each folder of `folder`, sorted by code point: {class folder:
    {relative path: size in bytes}}.

    Args:
        folder (Path): holds a folder a class.
        remember (bool): keep what was found in the cache folder, for as long as no
            class folder changes: a million files take seconds to list.
    """
    folder = Path(folder)
    classes = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )
    index = (
        cache_folder("folders")
        / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    )
    known = {}
    if remember and index.exists():
        try:
            known = json.loads(index.read_text())
        except ValueError:
            index.unlink(missing_ok=True)
    found = {name: _scan_class(folder / name, known.get(name)) for name in classes}
    if remember and found != known:
        write_atomically(index, lambda file: file.write(json.dumps(found).encode()))
    return {
        name: {f"{name}/{path}": size for path, size in files.items()}
        for name, (_, files) in found.items()
    }


def _scan_class(folder, known):
    """[when the folder changed, {relative path: size}]"""
    changed = os.stat(folder).st_mtime_ns
    if known and known[0] == changed:
        return known
    files = {}
    for where, _, names in os.walk(folder):
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = Path(where, name)
                files[path.relative_to(folder).as_posix()] = (
                    path.stat().st_size if path.exists() else -1
                )
    return [changed, dict(sorted(files.items()))]
