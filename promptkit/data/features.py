"""From images to what a method reads: CLIP's transforms, and frozen features that are computed once."""

import hashlib
from functools import lru_cache

import torch
import torch.nn.functional as F

from promptkit.files import cache_folder, write_atomically


def transform(clip, images, augment: bool = False, generator: torch.Generator | None = None) -> torch.Tensor:
    """Images (B, 3, H, W) uint8 -> (B, 3, S, S) float, normalised as `clip` wants them, on its device.

    Testing: shorter side to S (bicubic), centre crop. Training (`augment`): a random resized crop of 8-100 % of the
    area and 3/4-4/3 in shape (bicubic), flipped in half of the cases; the same for every method, as in CoOp's code.
    """
    size = clip.image_size
    x = images.to(clip.device).float() / 255
    if augment:
        x = torch.stack([_random_crop(image, size, generator) for image in x])
    else:
        height, width = x.shape[-2:]
        if min(height, width) != size:
            scale = size / min(height, width)
            x = F.interpolate(x, (round(height * scale), round(width * scale)), mode="bicubic", antialias=True)
        top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
        x = x[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(v, device=x.device).view(3, 1, 1) for v in (clip.mean, clip.std))
    return (x.clamp(0, 1) - mean) / std


def _random_crop(image, size, generator):
    from torchvision.transforms.v2.functional import resized_crop

    height, width = image.shape[-2:]
    for _ in range(10):
        area, log_ratio = torch.rand(2, generator=generator).tolist()
        area, ratio = height * width * (0.08 + 0.92 * area), (4 / 3) ** (2 * log_ratio - 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if w <= width and h <= height:
            break
    else:
        w = h = min(height, width)
    top = int(torch.randint(height - h + 1, (), generator=generator))
    left = int(torch.randint(width - w + 1, (), generator=generator))
    crop = resized_crop(image, top, left, h, w, [size, size], interpolation=3, antialias=True)
    return crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop


@lru_cache(64)
def _features_of_source(clip, source, key: str) -> torch.Tensor:
    identity = f"{clip.fingerprint}-{clip.image_size}-{clip.precision}-{key}"
    path = cache_folder("features") / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.pt"
    if path.exists():
        return torch.load(path, weights_only=True, map_location=clip.device)
    computed = torch.cat([clip.encode_image(transform(clip, images)) for images in source().split(256)]).float()
    write_atomically(path, lambda f: torch.save(computed.cpu(), f))
    return computed


def features(clip, split) -> torch.Tensor:
    """Frozen image features of a split, (N, E) float32, not normalised: computed once for the data they come from.

    Kept in memory and in the cache folder, under the weights' fingerprint, the data's key and the test transform.
    """
    return _features_of_source(clip, split.source, split.key)[split.rows.to(clip.device)]
