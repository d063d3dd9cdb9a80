"""RandAugment: random operations on an image, at magnitude 10 of 30.

RandAugment: Practical Automated Data Augmentation with a Reduced Search Space; Cubuk et
al., NeurIPS 2020; arXiv 1909.13719. The operations and their strengths are those of
CoPrompt's code (arXiv 2306.01195); distances, which it gives for 224 pixels, are scaled
to the image.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil


def augmented(image, clip, generator):
    """An image (3, H, W) uint8 squeezed to S x S, then two random operations: (3, S, S)
    uint8.
    """
    size = [clip.image_size] * 2
    x = pil.resize(pil.to_pil_image(image), size, InterpolationMode(clip.interpolation))
    operations = list(OPERATIONS.values())
    for n in torch.randint(len(operations), (2,), generator=generator).tolist():
        x = operations[n](x, torch.rand(3, generator=generator).tolist())
    return pil.pil_to_tensor(x)


def _warp(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _sign(random):
    return -1 if random[0] > 0.5 else 1


def _solarize_add(image):
    """36.67 is added to every value, then those from 128 on are inverted."""
    pixels = np.asarray(image).astype(int) + 110 / 3
    return ImageOps.solarize(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), 128)


def _cutout(image, random):
    """A grey square at a random place."""
    side, image = 40 / 3 * image.width / 224, image.copy()
    x = int(max(0, random[1] * image.width - side / 2))
    y = int(max(0, random[2] * image.height - side / 2))
    box = (x, y, min(image.width, x + side), min(image.height, y + side))
    ImageDraw.Draw(image).rectangle(box, (125, 123, 114))
    return image


# (image, three numbers from 0 to 1) -> image
OPERATIONS = {
    "autocontrast": lambda x, u: ImageOps.autocontrast(x),
    "equalize": lambda x, u: ImageOps.equalize(x),
    "invert": lambda x, u: ImageOps.invert(x),
    "rotate": lambda x, u: x.rotate(_sign(u) * 10),
    "posterize": lambda x, u: ImageOps.posterize(x, 5),
    "solarize": lambda x, u: ImageOps.solarize(x, 256 / 3),
    "solarize_add": lambda x, u: _solarize_add(x),
    "color": lambda x, u: ImageEnhance.Color(x).enhance(0.7),
    "contrast": lambda x, u: ImageEnhance.Contrast(x).enhance(0.7),
    "brightness": lambda x, u: ImageEnhance.Brightness(x).enhance(0.7),
    "sharpness": lambda x, u: ImageEnhance.Sharpness(x).enhance(0.7),
    "shear_x": lambda x, u: _warp(x, 1, _sign(u) * 0.1, 0, 0, 1, 0),
    "shear_y": lambda x, u: _warp(x, 1, 0, 0, _sign(u) * 0.1, 1, 0),
    "cutout": lambda x, u: _cutout(x, u),
    "translate_x": lambda x, u: _warp(
        x, 1, 0, _sign(u) * 100 / 3 * x.width / 224, 0, 1, 0
    ),
    "translate_y": lambda x, u: _warp(
        x, 1, 0, 0, 0, 1, _sign(u) * 100 / 3 * x.height / 224
    ),
}
