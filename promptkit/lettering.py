"""Class names written into images: as large as fits, in two colours that can be told
apart, and what the image tower makes of such images.
"""

import textwrap
import zlib
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from promptkit.data.store import Store
from promptkit.files import cache_folder

CHUNK = 64  # images with names that are encoded at once where they are kept


class WritesNames:
    """Mixed into a method that reads images with names written over a part of them
    (LoGoPrompt).

    Attributes:
        size: height and width in pixels of what a name is written on.
        place: where it stands: "random", "top" or "bottom".
        keep: whether features are kept in the cache folder where all of an image with a
            name follows from the two.
    """

    size: tuple[int, int]
    place: str
    keep: bool = True

    @cached_property
    def letters(self):
        """How much of each pixel is ink, (C, 1, h, w), from 0 to 1."""
        masks = [written(name, *self.size) for name in self.classnames]
        return torch.stack(masks).to(self.clip.device).float() / 255

    @cached_property
    def fixed(self):
        """Colours at test, (C, 2, 3): they follow from the name."""
        names = [zlib.crc32(name.encode()) for name in self.classnames]
        drawn = [colours(1, torch.Generator().manual_seed(seed)) for seed in names]
        return torch.cat(drawn)

    def blocks(self, classes, generator=None):
        """Names on coloured ground for the n classes (n,), normalised: (n, 3, h, w)."""
        every = self.fixed
        if generator is not None:
            every = colours(len(self.letters), generator)
        ink, ground = every.to(classes.device)[classes, :, :, None, None].unbind(1)
        letters = self.letters[classes]
        return self.clip.normalize(letters * ink + (1 - letters) * ground)

    def places(self, images, generator=None):
        """Top and left (B, 2) of what stands in each of (B, 3, S, S)."""
        room = torch.tensor(images.shape[-2:]) - torch.tensor(self.size) + 1
        if self.place == "bottom":
            return (room - 1).expand(len(images), 2)
        if self.place == "top":
            return torch.zeros(len(images), 2, dtype=torch.long)
        if generator is not None:
            each = [torch.randint(n, (len(images),), generator=generator) for n in room]
            return torch.stack(each, dim=1)
        bytes_ = (255 * self.clip.denormalize(images)).round().long().cpu()
        sums = torch.stack([bytes_.sum((1, 2, 3)), bytes_[:, 0].sum((1, 2))], dim=1)
        return sums % room

    @torch.no_grad()
    def named(self, images, classes, generator=None):
        """Features (B, K, E) of images (B, 3, S, S), each with each of its K classes'
        names in it, (B, K); all names of one image in one place.
        """
        B, K = classes.shape
        places, (height, width) = self.places(images, generator), self.size
        flat, owners = classes.flatten(), torch.arange(B).repeat_interleave(K)

        def encode(rows):
            x = images[owners[rows].to(images.device)]
            blocks = self.blocks(flat[rows.to(flat.device)], generator)
            at = places[owners[rows]].tolist()
            for image, block, (top, left) in zip(x, blocks, at, strict=True):
                image[:, top : top + height, left : left + width] = block
            return self.clip.encode_image(x)

        if generator is None and self.keep:
            features = self._kept(images, flat.tolist(), owners.tolist(), encode)
        else:
            features = encode(torch.arange(B * K))
        return features.view(B, K, -1)

    def _kept(self, images, classes, owners, encode):
        """Features (n, E) from the cache folder, by the pixels of image and block; what
        is not there is encoded in chunks and put in.
        """
        clip = self.clip
        about = f"{clip.fingerprint} {clip.precision} {self.size} {self.place}"
        file = f"names-{blake2b(about.encode(), digest_size=12).hexdigest()}.sqlite"
        store = Store(cache_folder("features") / file, "cache of names in images")
        distinct = sorted(set(classes))
        blocks = self.blocks(torch.tensor(distinct, device=images.device))
        block_of = dict(zip(distinct, digests(blocks), strict=True))
        image_of = digests(images)
        keys = [image_of[b] + block_of[c] for b, c in zip(owners, classes, strict=True)]
        found = store.get(keys)
        missing = [n for n, key in enumerate(keys) if key not in found]
        chunks = torch.tensor(missing).split(CHUNK) if missing else ()
        with tqdm(
            total=len(missing), desc="names in images", unit="image", leave=False,
            disable=len(chunks) < 8,
        ) as bar:  # fmt: skip
            for rows in chunks:
                features = encode(rows).float().cpu().numpy().astype("<f4")
                now = zip(rows.tolist(), features, strict=True)
                now = {keys[n]: feature.tobytes() for n, feature in now}
                store.put(now)
                found |= now
                bar.update(len(rows))
        values = np.stack([np.frombuffer(found[key], "<f4") for key in keys])
        return torch.from_numpy(values).to(images.device)


def digests(images) -> list[bytes]:
    """What tells n images (n, 3, h, w) apart."""
    pixels = images.detach().float().cpu().contiguous().numpy()
    return [blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]


def colours(n: int, generator) -> torch.Tensor:
    """Of ink and ground, n times, (n, 2, 3) from 0 to 1: uniform, where they differ by
    0.4 in luminance; black on white where 32 draws do not.
    """
    drawn = torch.rand(n, 32, 2, 3, generator=generator)
    light = drawn @ torch.tensor([0.299, 0.587, 0.114])  # (n, 32, 2)
    apart = (light[..., 0] - light[..., 1]).abs() >= 0.4
    chosen = drawn[torch.arange(n), apart.float().argmax(dim=1)]
    black_on_white = torch.tensor([[0.0] * 3, [1.0] * 3])
    return torch.where(apart.any(dim=1)[:, None, None], chosen, black_on_white)


def written(name: str, height: int, width: int) -> torch.Tensor:
    """A name in white on black, (1, h, w) uint8: centred, in the lines in which it is
    largest.
    """
    path = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 48, layout_engine=ImageFont.Layout.BASIC)
    longest = max(map(len, name.split()))
    best = None
    for columns in range(longest, max(len(name), longest) + 1):
        lines = textwrap.wrap(name, columns, break_on_hyphens=False)
        text, pen = "\n".join(lines), ImageDraw.Draw(Image.new("L", (1, 1)))
        box = pen.multiline_textbbox((0, 0), text, font=font, align="center")
        left, top = int(box[0]) - 1, int(box[1]) - 1
        size = max(int(box[2]) + 1 - left, 1), max(int(box[3]) + 1 - top, 1)
        scale = min(width / size[0], height / size[1])
        if best is None or scale > best[0]:
            best = scale, text, (-left, -top), size
    scale, text, corner, size = best
    large = Image.new("L", size)
    ImageDraw.Draw(large).multiline_text(corner, text, 255, font=font, align="center")
    small = [max(1, min(round(scale * n), most)) for n, most in
             zip(size, (width, height), strict=True)]  # fmt: skip
    image = Image.new("L", (width, height))
    at = (width - small[0]) // 2, (height - small[1]) // 2
    image.paste(large.resize(small, Image.Resampling.LANCZOS), at)
    return pil_to_tensor(image)
