"""Images in files: told apart by their content, and decoded when they are asked for."""

import hashlib
import os
import struct
import warnings
from copy import copy
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from promptkit.data.content import Digests, workers
from promptkit.errors import InputError

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm",
)  # fmt: skip
# of damaged EXIF data, of which only the orientation is read
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
_UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_TURNS = {  # by the EXIF tag Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Files:
    """Images that are read when they are indexed: `files[rows]` is a list of RGB images
    (3, H, W) uint8, of any sizes.

    Args:
        folder (Path): where `paths` start.
        paths (list[str]): the files, with forward slashes.
        sizes (list[int | None] | None): their sizes in bytes, where they are known
            already; a size of 0 or below is looked at again.
        turn (bool): turn photos as their EXIF data say.

    Raises:
        InputError: files are missing or empty; the message names the first.
    """

    def __init__(
        self,
        folder: Path,
        paths: list[str],
        sizes: list[int | None] | None = None,
        turn: bool = False,
    ):
        # absolute, as the working directory may change before images are read
        self.folder, self.paths, self.turn = Path(folder).absolute(), paths, turn
        self._digests = Digests(self.folder)
        sizes = sizes or [None] * len(paths)
        found = {
            path: self._size(path)
            for path, size in zip(paths, sizes, strict=True)
            if size is None or size <= 0
        }
        bad = [path for path in paths if found.get(path, 1) <= 0]
        if bad:
            what = (
                "missing or empty"
                if len(bad) > 1
                else "empty"
                if found[bad[0]] == 0
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
        turns = [self.turn] * len(paths)
        images = (
            [read_image(paths[0], self.turn)]
            if len(paths) == 1
            else list(workers().map(read_image, paths, turns))
        )
        return images if rows.dim() else images[0]

    def again(self) -> "Files":
        """The same files, their content to be looked at anew."""
        files = copy(self)
        files.__dict__.pop("key", None)
        return files

    def same_as(self, other) -> bool:
        """Whether `other` lists the same files."""
        return other is self or (
            isinstance(other, Files)
            and (other.folder, other.paths) == (self.folder, self.paths)
        )

    def digests(self, rows: torch.Tensor | None = None) -> list[bytes]:
        """What tells images apart, of the files at `rows` or of all: their content, and
        whether they are turned. Only files that changed or are new are read.

        Raises:
            InputError: a file is missing, empty or cannot be read.
        """
        paths = self.paths if rows is None else [self.paths[n] for n in rows.tolist()]
        found = self._digests.of(paths)
        return [digest + b"turned" for digest in found] if self.turn else found

    @cached_property
    def key(self) -> str:
        """Names the images by their content alone, in their order: the same wherever
        the folder lies and whatever the files are called.
        """
        digests = self.digests()
        return hashlib.sha256(b"\n".join([b"images", *digests])).hexdigest()[:32]


def read_image(path, turn: bool = False) -> torch.Tensor:
    """An image file as (3, H, W) uint8, in RGB.

    Integers of 16 bits and floats from 0 to 1 become what the same picture has in 8
    bits.

    Args:
        turn: as the photo's EXIF data say, so that it stands upright. The benchmark's
            images are read as they lie in the file, as its own code does.

    Raises:
        InputError: it is missing, damaged, cut short, no image, or of numbers whose
            range is not clear.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise InputError(f"{path} is no file but a pipe or a device: name an image")
    try:
        with Image.open(path) as image:
            image.load()
            rgb = _rgb(image, path)
            method = _TURNS.get(_orientation(image)) if turn else None
            return pil_to_tensor(rgb if method is None else rgb.transpose(method))
    except FileNotFoundError:
        raise InputError(f"there is no image {path}; get the files again") from None
    except PermissionError as error:
        raise InputError(f"cannot read the image {path} ({error.strerror})") from None
    except InputError:
        raise
    except _UNREADABLE as error:
        empty = os.path.isfile(path) and os.path.getsize(path) == 0
        raise InputError(
            f"damaged image {path} ({'it is empty' if empty else error}); get the file"
            " again, or remove it from the lists"
        ) from None


def _orientation(image):
    try:
        return image.getexif().get(0x0112)
    except Exception:  # of many kinds, for damaged EXIF data: the image is fine
        return None


def _rgb(image, path):
    """The decoded image in 8 bits and RGB."""
    if image.mode in ("La", "RGBa"):  # colours that were multiplied by their opacity
        image = image.convert(image.mode[:-1] + "A")
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    numbers, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        whole, clear = 1.0, bool(((numbers >= 0) & (numbers <= 1)).all())
    else:  # of "I", 32 bits: PGM and some PNG files hold 16 of them
        whole = 2 ** int(tags.get(258, (16,))[0]) - 1  # bits a sample, in TIFF
        clear = image.mode != "I" or image.format in ("PPM", "PNG")
    if not clear:
        raise InputError(
            f"the numbers in {path} have no clear range ({numbers.dtype} from"
            f" {numbers.min()} to {numbers.max()}): save it with 8 or 16 bits, or as"
            " floats from 0 to 1"
        )
    grey = (numbers.astype(np.float64) * (255 / whole)).round().clip(0, 255)
    grey = 255 - grey if tags.get(262) == 0 else grey  # where 0 stands for white
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
