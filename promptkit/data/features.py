"""From images to what a method reads: CLIP's transforms, and frozen features that are
computed once.
"""

import hashlib
import shutil

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil
from tqdm import tqdm

from promptkit.data.content import ahead, workers
from promptkit.data.images import Files
from promptkit.data.store import Store
from promptkit.errors import InputError
from promptkit.files import cache_folder

INTERPOLATIONS = {mode.value: mode for mode in InterpolationMode}


def transform(
    clip,
    images,
    augment: bool = False,
    generator: torch.Generator | None = None,
    crop: tuple[float, float] = (0.08, 1.0),
) -> torch.Tensor:
    """Images as `clip` wants them: (B, 3, S, S) float, normalised, on its device.

    Testing: shorter side to S, centre crop (or both sides to S, as the weights want).
    Training (`augment`): a random crop of a
    share (`crop`) of the area and 3/4-4/3 in shape, resized, flipped in half of the
    cases; the
    same for every method, as in CoOp's code (Zhou et al. 2022). Both resize by PIL,
    bicubic unless the weights want another interpolation.

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
            _draw_crop(image.shape, generator, crop) if augment else None
            for image in images
        ]
        how = [(size, INTERPOLATIONS[clip.interpolation], clip.resize_mode)]
        x = torch.stack(list(workers().map(_resize, images, crops, how * len(images))))
    return clip.normalize(x.to(clip.device).float() / 255)


def _resize(image, crop, how):  # (3, H, W) uint8 -> (3, S, S) uint8
    size, interpolation, mode = how
    image = pil.to_pil_image(image)
    if crop is None:
        short = size if mode == "shortest" else [size, size]
        image = pil.center_crop(pil.resize(image, short, interpolation), [size, size])
    else:
        *box, flip = crop
        image = pil.resized_crop(image, *box, [size, size], interpolation)
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


def frozen_features(clip, split, force: bool = False) -> torch.Tensor:
    """Frozen image features of a split, (N, E) float32, not normalised, on the CLIP's
    device: computed once.

    They are kept in the cache folder under the weights' fingerprint, the precision, the
    test transform and what tells an image apart: its file's content, or the key of data
    in memory and the row there. So a file that is replaced has other features, and one
    that is renamed or moved has the same. What is not there is computed in chunks, each
    of which is kept at once: after an interruption the rest follows. Of images in files
    only those are computed, of images in memory all.

    Args:
        force: compute them again, and keep these.

    Raises:
        InputError: an image is missing or damaged, or the cache folder has no space.
    """
    if len(split) == 0:
        return torch.zeros(0, clip.embed_dim, device=clip.device)
    store, names = _store(clip), _names(split, split.rows)
    found = {} if force else _get(clip, store, names)
    if len(found) < len(set(names)):
        _fill(clip, split, store, names, found)
    features = np.stack([found[name] for name in names])
    return torch.from_numpy(features).to(clip.device)


def _store(clip):
    identity = (
        f"{clip.fingerprint}-{clip.image_size}-{clip.precision}-test transform by PIL"
    )
    name = hashlib.sha256(identity.encode()).hexdigest()[:24]
    return Store(cache_folder("features") / f"{name}.sqlite", "feature cache")


def _names(split, rows):
    """What tells the images at rows of the underlying data apart, of whichever split
    they are.
    """
    if split.name is None:
        return split.source().digests(rows)
    start = hashlib.blake2b(split.name.encode(), digest_size=12).digest()
    return [start + int(row).to_bytes(4, "big") for row in rows]


def _get(clip, store, names):
    """{name: feature (E,) float32} of those that are there."""
    found = store.get(list(dict.fromkeys(names)))
    return {
        name: np.frombuffer(value, "<f4")
        for name, value in found.items()
        if len(value) == 4 * clip.embed_dim
    }


@torch.no_grad()
def _fill(clip, split, store, names, found):
    """Compute and keep the features of a split's images that were not found."""
    source = split.source()
    slow = isinstance(source, Files)
    if slow:
        rows = dict(zip(names, split.rows.tolist(), strict=True))
        called = {row: name for name, row in rows.items() if name not in found}
        chunks = torch.tensor(sorted(called)).split(64)
    else:
        chunks = torch.arange(len(source)).split(256)
        called = dict(enumerate(_names(split, range(len(source)))))
    count, folder = sum(map(len, chunks)), cache_folder("features")
    need = 4 * clip.embed_dim * count
    if shutil.disk_usage(folder).free < need:
        raise InputError(
            f"{folder} has no space for {need / 1e9:.2g} GB of image features: make"
            " room, or set $PROMPTKIT_CACHE"
        )

    def read(chunk):
        images = transform(clip, source[chunk])
        now = [called[row] for row in chunk.tolist()]
        if slow and source.digests(chunk) != now:
            raise InputError(
                f"images in {source.folder} changed while they were read: wait until"
                " all are written, and give the same command again"
            )
        return now, images

    bar = tqdm(
        total=count, desc="image features", unit="image", disable=not slow, leave=False
    )
    with bar:
        for now, images in ahead(read, chunks, most=1):
            features = clip.encode_image(images).float().cpu().numpy().astype("<f4")
            computed = dict(zip(now, features, strict=True))
            store.put({name: row.tobytes() for name, row in computed.items()})
            found |= computed
            bar.update(len(now))
