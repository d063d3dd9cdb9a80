"""From images to what a method reads: CLIP's transforms, and frozen features that are
computed once.
"""

import hashlib
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from tqdm import tqdm

from promptkit.data.images import Files, workers
from promptkit.errors import InputError
from promptkit.files import cache_folder, write_atomically

BICUBIC = InterpolationMode.BICUBIC


def transform(
    clip,
    images,
    augment: bool = False,
    generator: torch.Generator | None = None,
    crop: tuple[float, float] = (0.08, 1.0),
) -> torch.Tensor:
    """Images as `clip` wants them: (B, 3, S, S) float, normalised, on its device.

    Testing: shorter side to S, centre crop. Training (`augment`): a random crop of
    a share (`crop`) of the area and 3/4-4/3 in shape, resized, flipped in half of the cases; the
    same for every method, as in CoOp's code (Zhou et al. 2022). Both resize by PIL,
    bicubic.

    Args:
        images: (B, 3, H, W) uint8, or a list of B tensors (3, H, W) uint8 of any sizes.
        generator: draws crops and flips, image by image.
    """
    size = clip.image_size
    if (
        not augment
        and isinstance(images, torch.Tensor)
        and images.shape[-2:] == (size, size)
    ):
        x = images
    else:
        crops = [
            _draw_crop(image.shape, generator, crop) if augment else None for image in images
        ]
        x = torch.stack(
            list(workers().map(_resize, images, crops, [size] * len(images)))
        )
    return clip.normalize(x.to(clip.device).float() / 255)


def _resize(image, crop, size):  # (3, H, W) uint8 -> (3, S, S) uint8
    image = pil.to_pil_image(image)
    if crop is None:
        image = pil.center_crop(pil.resize(image, size, BICUBIC), [size, size])
    else:
        *box, flip = crop
        image = pil.resized_crop(image, *box, [size, size], BICUBIC)
        image = pil.hflip(image) if flip else image
    return pil.pil_to_tensor(image)


def _draw_crop(shape, generator, share=(0.08, 1.0)):
    """(top, left, height, width, whether to flip), by the rule of torchvision's
    RandomResizedCrop.
    """
    height, width = shape[-2:]
    for _ in range(10):
        area, log_ratio = torch.rand(2, generator=generator).tolist()
        area, ratio = (
            height * width * (share[0] + (share[1] - share[0]) * area),
            (4 / 3) ** (2 * log_ratio - 1),
        )
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (), generator=generator))
            left = int(torch.randint(width - w + 1, (), generator=generator))
            break
    else:  # a very long image: the largest part of a permitted shape, in the middle
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        top, left = (height - h) // 2, (width - w) // 2
    return top, left, h, w, bool(torch.rand((), generator=generator) < 0.5)


def frozen_features(clip, split) -> torch.Tensor:
    """Frozen image features of a split, (N, E) float32, not normalised, on the CLIP's
    device: computed once.

    They are kept in a memory-mapped file of the cache folder, a row an image of the
    underlying data, under the weights' fingerprint, the precision, the data's key and
    the test transform. Rows that are asked for and not there are computed in chunks,
    each of which is there at once: after an interruption the rest follows. Of images in
    files only those are computed, of images in memory all.
    """
    if len(split) == 0:
        return torch.zeros(0, clip.embed_dim, device=clip.device)
    store, rows = _store(clip, split), split.rows.numpy()
    missing = np.unique(rows[store["done"][rows] == 0])
    if len(missing):
        _fill(clip, split, store, missing)
    return torch.from_numpy(store["feature"][rows]).to(clip.device)


def _store(clip, split):
    """The rows of the underlying data as a memory-mapped array: feature (E,) and
    whether it is done.
    """
    identity = (
        f"{clip.fingerprint}-{clip.image_size}-{clip.precision}-{split.key}-test"
        " transform by PIL"
    )
    path = (
        cache_folder("features")
        / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.rows"
    )
    row = np.dtype([("feature", "<f4", (clip.embed_dim,)), ("done", "<u4")])
    size = path.stat().st_size if path.exists() else 0
    if size % row.itemsize or size <= split.rows.max() * row.itemsize:
        if size:
            warnings.warn(
                f"damaged feature cache {path}: computing it again", stacklevel=3
            )
        nbytes = len(split.source()) * row.itemsize
        write_atomically(
            path, lambda file: file.truncate(nbytes)
        )  # zeros that take no space until they are written
    return np.memmap(path, row, "r+")


@torch.no_grad()
def _fill(clip, split, store, rows):
    source = split.source()
    slow = isinstance(source, Files)
    chunks = torch.as_tensor(rows if slow else np.arange(len(store))).split(
        64 if slow else 256
    )
    need, folder = sum(map(len, chunks)) * store.itemsize, cache_folder("features")
    if (
        shutil.disk_usage(folder).free < need
    ):  # a memory-mapped file cannot say so itself: the process would be killed
        raise InputError(
            f"{folder} has no space for {need / 1e9:.2g} GB of image features: make"
            " room, or set $PROMPTKIT_CACHE"
        )
    bar = tqdm(
        total=sum(map(len, chunks)),
        desc="image features",
        unit="image",
        disable=not slow,
        leave=False,
    )
    with (
        bar,
        ThreadPoolExecutor(1) as ahead,
    ):  # reads the next chunk while the GPU works on this one
        read = [ahead.submit(lambda chunk: transform(clip, source[chunk]), chunks[0])]
        for n, chunk in enumerate(chunks):
            images = read.pop().result()
            if n + 1 < len(chunks):
                read.append(
                    ahead.submit(
                        lambda chunk: transform(clip, source[chunk]), chunks[n + 1]
                    )
                )
            store["feature"][chunk.numpy()] = (
                clip.encode_image(images).float().cpu().numpy()
            )
            store.flush()
            store["done"][chunk.numpy()] = 1
            bar.update(len(chunk))
        store.flush()
