"""The control of LoGoPrompt: names stand on plates as the mini world draws them, which
its CLIP was taught to read.
"""

import zlib
from functools import cached_property

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from promptkit.data.render import DARK, LIGHT, word_mask
from promptkit.method import register
from promptkit.methods.logoprompt import LoGoPrompt


@register
class Plates(LoGoPrompt):
    r"""LoGoPrompt with other lettering: bold capitals, dark on light or light on dark,
    on a plate over the lowest third of the image.

    Loss, selection and recipe are LoGoPrompt's.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        k, n_ctx, init, class_specific, bounded: as in LoGoPrompt.
    """

    name = "plates"
    title = "Names on plates"
    published = {}

    def __init__(
        self,
        clip,
        classnames,
        *,
        k: int = 5,
        n_ctx: int | None = None,
        init: str = "a photo of a",
        class_specific: bool = False,
        bounded: bool = False,
    ):
        chosen = {"k": k, "n_ctx": n_ctx, "init": init, "bounded": bounded}
        chosen |= {"class_specific": class_specific, "place": "bottom"}
        super().__init__(clip, classnames, height=clip.image_size // 3, **chosen)

    @cached_property
    def letters(self):
        """How much of each pixel is ink, (C, 1, h, w), from 0 to 1."""
        height, width = self.size
        plates = []
        for name in self.classnames:
            plate = Image.new("L", (144, 48))
            plate.paste(word_mask(name), (6, 4))
            plate = plate.resize((width, height), Image.Resampling.BOX)
            plates.append(pil_to_tensor(plate))
        return torch.stack(plates).to(self.clip.device).float() / 255

    @cached_property
    def fixed(self):
        """Ink and ground, (C, 2, 3): seven names of ten are dark on light."""
        pair = torch.tensor([DARK, LIGHT]).float() / 255
        light = [zlib.crc32(name.encode()) % 10 < 7 for name in self.classnames]
        return torch.stack([pair if on else pair.flip(0) for on in light])

    def blocks(self, classes, generator=None):
        """The same colours in training and at test: (n, 3, h, w)."""
        return super().blocks(classes)

    def official_names(self):
        return {}  # nobody published it
