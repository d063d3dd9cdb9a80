"""Views of one image, for methods that look at it many times: crops, flips, and these
mixed with distorted ones (AugMix, Hendrycks et al. 2020), as TPT's code draws them.
"""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from promptkit.errors import InputError


def views_of(method, batch) -> Tensor:
    """The views (B, V, 3, S, S) of a batch for a method; where images came without
    their pixels, its `views` makes them of these, each image's as if it were alone.

    Raises:
        InputError: the batch holds neither views nor images.
    """
    if batch.views is not None:
        return batch.views
    if batch.images is None:
        raise InputError(
            f"{method.spec} reads views of images, and the batch holds none"
        )
    pixels = method.clip.denormalize(batch.images.cpu()).clamp(0, 1) * 255
    draws = [torch.Generator().manual_seed(0) for _ in pixels]
    each = zip(pixels.round().byte(), draws, strict=True)
    return torch.cat([method.views(x[None], generator) for x, generator in each])


def drawn_views(
    clip, images, n: int, mixes: bool, generator: torch.Generator, severity: float = 1
) -> Tensor:
    """Views (B, n, 3, S, S), normalised, of B images (3, H, W) uint8; see
    :func:`image_views`. All that is random follows from the generator.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    rng = np.random.RandomState(seed)
    with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own
        torch.manual_seed(seed)
        views = [
            image_views(
                v2.functional.to_pil_image(x), n, clip.image_size, mixes, rng, severity
            )
            for x in images
        ]
    return clip.normalize(torch.stack(views))


def image_views(
    image: Image.Image,
    n: int,
    size: int,
    mixes: bool,
    rng: np.random.RandomState,
    severity: float = 1,
) -> Tensor:
    """Views of one image, (n, 3, size, size) with values around 0..1: the centre crop,
    then random ones.

    Crops and flips draw from torch's global generator, all else from ``rng``, in the
    order of the published code.
    """
    whole = v2.Compose(
        [v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    )
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    views = [_tensor(whole(image))]
    for _ in range(n - 1):
        x = crop(image)
        views.append(augmix(x, rng, severity) if mixes else _tensor(x))
    return torch.stack(views)


def augmix(
    image: Image.Image, rng: np.random.RandomState, severity: float = 1
) -> Tensor:
    """An image mixed with three chains of one to three operations each, (3, S, S)
    (Hendrycks et al. 2020).
    """
    weights, share = rng.dirichlet([1.0] * 3), rng.beta(1.0, 1.0)
    mixed = torch.zeros_like(plain := _tensor(image))
    for weight in weights:
        x = image
        for _ in range(rng.randint(1, 4)):
            x = OPERATIONS[rng.choice(list(OPERATIONS))](x, severity, rng)
        mixed += weight * _tensor(x)
    return share * plain + (1 - share) * mixed


def _tensor(image: Image.Image) -> Tensor:
    return v2.functional.pil_to_tensor(image).float() / 255  # (3, H, W)


def _amount(most: float, severity: float, rng) -> float:
    return rng.uniform(0.1, severity) * most / 10


def _signed(amount: float, rng) -> float:
    return -amount if rng.uniform() > 0.5 else amount


def _warp(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


OPERATIONS = {  # (image, severity, rng) -> image
    "autocontrast": lambda x, n, rng: ImageOps.autocontrast(x),
    "equalize": lambda x, n, rng: ImageOps.equalize(x),
    "posterize": lambda x, n, rng: ImageOps.posterize(x, 4 - int(_amount(4, n, rng))),
    "rotate": lambda x, n, rng: x.rotate(
        _signed(int(_amount(30, n, rng)), rng), resample=Image.Resampling.BILINEAR
    ),
    "solarize": lambda x, n, rng: ImageOps.solarize(x, 256 - int(_amount(256, n, rng))),
    "shear_x": lambda x, n, rng: _warp(
        x, 1, _signed(_amount(0.3, n, rng), rng), 0, 0, 1, 0
    ),
    "shear_y": lambda x, n, rng: _warp(
        x, 1, 0, 0, _signed(_amount(0.3, n, rng), rng), 1, 0
    ),
    "translate_x": lambda x, n, rng: _warp(
        x, 1, 0, _signed(int(_amount(x.width / 3, n, rng)), rng), 0, 1, 0
    ),
    "translate_y": lambda x, n, rng: _warp(
        x, 1, 0, 0, 0, 1, _signed(int(_amount(x.height / 3, n, rng)), rng)
    ),
}
