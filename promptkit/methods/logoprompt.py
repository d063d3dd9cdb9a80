"""LoGoPrompt: class names are written into the image, and classifying is choosing the
right one.

LoGoPrompt: Synthetic Text Images Can Be Good Visual Prompts for Vision-Language Models;
Shi and Yang, ICCV 2023; arXiv 2309.01155.

DERIVED FROM THE PAPER: no code is public. Loss and inference are the paper's equations;
what it does not say is ours: names are written in DejaVu Sans, which matplotlib brings,
as large as fits a band across the image; the colours of both text and band are drawn
for each step, and follow from the name at test; the place at test follows from the
image, both also in training without augmentation, so that features can be kept; the
loss is a mean over the batch; the network behind class-specific contexts has
32 hidden units, a zero last layer and a shared context added to it, and the second
stage has a tenth of the first one's rate. The tunable pixels of the paper's few-shot
setting, and its cache of training features, are left out.
"""

import textwrap
import zlib
from dataclasses import replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from promptkit.clip import zero_shot_features
from promptkit.data.store import Store
from promptkit.errors import InputError, expect
from promptkit.files import cache_folder
from promptkit.method import Method, register
from promptkit.methods.coop import CoOp, check_words
from promptkit.picture import LABELS, Picture, Target, learned
from promptkit.prompts import Context
from promptkit.published import Published

CHUNK = 64  # images with names that are encoded at once at test


@register
class LoGoPrompt(Method):
    r"""A context, trained so that of all names written into an image the right one
    helps and the others do not.

    x_c is the image x with the name of class c written over a part of it, and p(c | .)
    CLIP's probabilities over all classes, with CoOp's prompts. For an image of class y,
    and the K other classes with the largest p(c | x),

    .. math:: L = -\log \frac{\min\bigl(p(y \mid x),\, p(y \mid x_y)\bigr)}
       {\sum_{k=1}^{K} \max\bigl(p(c_k \mid x),\, p(c_k \mid x_{c_k})\bigr)},

    which has no lower bound. At test the K classes with the largest p(c | x) are tried,

    .. math:: \hat y = \arg\max_{c \in \mathrm{top}_K}
       \max\bigl(p(c \mid x),\, p(c \mid x_c)\bigr).

    The logits are the logarithms of these scores, of log p(c | x) for other classes. No
    gradient enters the image tower.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        k: K; all others where there are fewer.
        n_ctx: M, vectors of the context. None: 4, or the number of words.
        init: words that the vectors start from; empty: normal, std 0.02.
        class_specific: each class has a context of its own: in the first stage of
            training a small network makes it from the feature of "a photo of a {}.", in
            the second it is tuned freely. New classes have what the network makes.
        height, width: pixels of what a name is written on; None: a seventh of the
            image's side, and all of it.
        place: where it stands: at random, or at the top or the bottom.
        bounded: add the numerator to the denominator, so that the loss is not negative.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "logoprompt"
    title = "LoGoPrompt"
    year = 2023
    paper = "2309.01155"
    kind = "prompt"
    reads = "images+features"
    picture = Picture(
        text=("SOS", learned("$v_1$ … $v_M$"), "[class]", ".", "EOT"),
        image=("CLS", "patches, a class name over some"),
        targets=(Target(LABELS, "selection"),),
        images="an image $x$, and with names $x_c$",
        several=("image",),
        note="at test the K likeliest classes are tried with their names",
    )
    official_hyperparameters = {  # as the paper's symbols; there are no official ones
        "K": "k",
        "n_ctx": "n_ctx",
        "ctx_init": "init",
        "class_specific_context": "class_specific",
        "patch_height": "height",
        "patch_width": "width",
        "place": "place",
        "bounded": "bounded",
        "patch_top_left_per_image": None,  # places of given images, never chosen
        "logit_scale": None,  # the backbone's
    }
    published = {
        protocol: Published(
            (backbone,),
            shots,
            "LoGoPrompt: its paper",
            note,
            extrapolation=protocol == "cross-dataset",
        )
        for protocol, backbone, shots, note in [
            ("base-to-new", "ViT-B-16", (16,), "CoOp's optimisation, 4 vectors, K 5."),
            (
                "few-shot", "RN50", (1, 2, 4, 8, 16),
                "CoOp's optimisation, 16 vectors, K 5; without tuned pixels.",
            ),
            ("domain-generalization", "ViT-B-16", (16,), "As base-to-new, 50 epochs."),
            ("cross-dataset", "ViT-B-16", (16,), "As domain generalization."),
        ]
    }  # fmt: skip

    def __init__(
        self,
        clip,
        classnames,
        *,
        k: int = 5,
        n_ctx: int | None = None,
        init: str = "a photo of a",
        class_specific: bool = False,
        height: int | None = None,
        width: int | None = None,
        place: Literal["random", "top", "bottom"] = "random",
        bounded: bool = False,
    ):
        super().__init__(clip, classnames)
        expect(k >= 1, "k", k, "at least 1")
        check_words(n_ctx, init)
        side = clip.image_size
        for name, pixels in {"height": height, "width": width}.items():
            fits = pixels is None or 1 <= pixels <= side
            expect(fits, name, pixels, f"from 1 to the {side} pixels of an image")
        self.k, self.place, self.bounded = k, place, bounded
        self.size = height or max(round(side / 7), 1), width or side
        self.keep = True  # features of names that follow from the image
        self.drawn = True  # names in training stand at random, in random colours
        self.context = Context(
            clip,
            self.classnames,
            length=n_ctx or (None if init else 4),
            words=init or None,
        )
        self.class_specific, self.stage = class_specific, 0
        if class_specific:
            M, D = self.context.vectors.shape
            self.make = nn.Sequential(
                nn.Linear(clip.embed_dim, 32), nn.ReLU(), nn.Linear(32, M * D)
            )
            nn.init.zeros_(self.make[2].weight)
            nn.init.zeros_(self.make[2].bias)
            self.own = nn.Parameter(torch.zeros(len(self.classnames), M, D))
            self.register_buffer("tuned", torch.tensor(False))

    # --- contexts ---------------------------------------------------------------------

    @cached_property
    def plain(self):
        """Frozen features of "a photo of a {}.", (C, E), normalised."""
        return zero_shot_features(self.clip, self.classnames, "a photo of a {}.")

    @cached_property
    def rows(self):
        """For each class its row among those trained on, -1 for a new one: (C,)."""
        row = {name: n for n, name in reversed([*enumerate(self.trained_on)])}
        rows = [row.get(name, -1) for name in self.classnames]
        return torch.tensor(rows, device=self.clip.device)

    def vectors(self, image_features=None):
        """(M, D); class-specific, (C, M, D)."""
        shared = self.context.vectors
        if not self.class_specific:
            return shared
        made = shared + self.make(self.plain).unflatten(-1, shared.shape)
        if not self.tuned:
            return made
        known = (self.rows >= 0)[:, None, None]
        return torch.where(known, self.own[self.rows.clamp(min=0)], made)

    # --- names in images --------------------------------------------------------------

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
        every = (
            self.fixed if generator is None else colours(len(self.letters), generator)
        )
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
        if K == 0:
            return images.new_zeros(B, 0, self.clip.embed_dim)
        places = self.places(images, generator)
        flat, owners = classes.flatten(), torch.arange(B).repeat_interleave(K)

        def encode(rows):
            x = images[owners[rows].to(images.device)]
            blocks = self.blocks(flat[rows.to(flat.device)], generator)
            for image, block, (top, left) in zip(
                x, blocks, places[owners[rows]].tolist(), strict=True
            ):
                height, width = block.shape[-2:]
                image[:, top : top + height, left : left + width] = block
            return self.clip.encode_image(x)

        if generator is None and self.keep:
            features = self._kept(images, flat.tolist(), owners.tolist(), encode)
        else:
            features = encode(torch.arange(B * K))
        return features.view(B, K, -1)

    def _kept(self, images, classes, owners, encode):
        """Features (n, E) from the cache folder; what is not there is encoded in chunks
        and put in.
        """
        about = (
            f"{self.clip.fingerprint} {self.clip.precision} {self.size} {self.place}"
        )
        file = f"names-{blake2b(about.encode(), digest_size=12).hexdigest()}.sqlite"
        store = Store(cache_folder("features") / file, "cache of names in images")
        distinct = sorted(set(classes))
        blocks = self.blocks(torch.tensor(distinct, device=images.device))
        block_of = dict(zip(distinct, digests(blocks), strict=True))
        image_of = digests(images)
        keys = [image_of[b] + block_of[c] for b, c in zip(owners, classes, strict=True)]
        found = store.get(keys)
        missing = [n for n, key in enumerate(keys) if key not in found]
        chunks = torch.tensor(missing, dtype=torch.long).split(CHUNK)
        bar = tqdm(
            total=len(missing), desc="names in images", unit="image", leave=False,
            disable=len(chunks) < 8,
        )  # fmt: skip
        with bar:
            for rows in chunks if missing else ():
                features = encode(rows).float().cpu().numpy().astype("<f4")
                some = zip(rows.tolist(), features, strict=True)
                some = {keys[n]: feature.tobytes() for n, feature in some}
                store.put(some)
                found |= some
                bar.update(len(rows))
        values = np.stack([np.frombuffer(found[key], "<f4") for key in keys])
        return torch.from_numpy(values).to(images.device)

    # --- selection --------------------------------------------------------------------

    def encode(self, batch):
        """Of the images without names: those that the batch carries, if any."""
        return super().encode(batch) if batch.features is None else batch.features

    def confident(self, batch, image, text, classes, generator=None, score=None):
        """log p(c | x) of all classes (B, C), and log p(c | x_c) of some, (B, K)."""
        score = score or self.score
        plain = score(image, text).log_softmax(dim=-1)
        classes = classes(plain.detach())  # (B, K)
        if batch.images is None:
            raise InputError("logoprompt writes into images, and the batch holds none")
        given = self.named(batch.images, classes, generator).flatten(0, 1)
        given = score(given, text).log_softmax(dim=-1)  # (B K, C)
        return plain, given.gather(1, classes.reshape(-1, 1)).view_as(classes), classes

    def hard(self, plain, labels):
        """The classes other than the label with the largest log p(c | x): (B, K)."""
        k = min(self.k, plain.shape[1] - 1)
        return plain.scatter(1, labels[:, None], -torch.inf).topk(k).indices

    def losses(self, batch, image, text, score=None):
        """L of each image, (B,)."""
        y = batch.labels

        def pick(plain):
            return torch.cat([y[:, None], self.hard(plain, y)], dim=1)

        generator = batch.generator or torch.default_generator
        generator = generator if self.drawn else None
        plain, own, classes = self.confident(batch, image, text, pick, generator, score)
        plain = plain.gather(1, classes)  # (B, 1 + K)
        right = torch.minimum(plain[:, 0], own[:, 0])
        below = torch.maximum(plain[:, 1:], own[:, 1:])
        if self.bounded or below.shape[1] == 0:
            below = torch.cat([right[:, None], below], dim=1)
        return below.logsumexp(dim=1) - right

    def criterion(self, batch, image, text, score=None):
        return self.losses(batch, image, text, score).mean()

    def forward(self, batch):
        image, text = self.features(batch)
        plain, own, top = self.confident(batch, image, text, self.candidates)
        return plain.scatter(1, top, torch.maximum(plain.gather(1, top), own))

    def candidates(self, plain):
        """The classes with the largest log p(c | x), best first: (B, K)."""
        return plain.topk(min(self.k, plain.shape[1])).indices

    # --- training ---------------------------------------------------------------------

    def begin(self, classnames):
        if self.class_specific and len(self.own) != len(classnames):
            raise InputError(
                f"the contexts of this {self.name} were made for {len(self.own)}"
                f" classes: build it with the {len(classnames)} that it is to learn"
            )
        super().begin(classnames)

    def prepare(self, dataset, recipe, generator, stage):
        """The second stage starts from what the first one's network makes."""
        self.stage, self.drawn = stage, recipe.augment
        if self.class_specific:
            self.tuned.fill_(False)
            if stage == 1:
                self.own.data.copy_(self.vectors().detach())
                self.tuned.fill_(True)
            self.own.requires_grad_(stage == 1)
            for part in (self.make, self.context):
                part.requires_grad_(stage == 0)
        return super().prepare(dataset, recipe, generator, stage)

    def param_groups(self, recipe):
        """One context for all classes has a single stage: there is nothing to tune in a
        second.
        """
        later = not self.class_specific and self.stage > 0
        return [] if later else super().param_groups(recipe)

    # --- files of others --------------------------------------------------------------

    def official_names(self):
        return {"ctx": "own" if self.class_specific else "context.vectors"}

    def load_official(self, state):
        super().load_official(state)
        if self.class_specific:
            self.tuned.fill_(True)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; without words a length asks for random vectors."""
        ours = super().official_hparams(hyperparameters)
        if "n_ctx" in ours and not ours.get("init"):
            ours["init"] = ""
        return ours

    @classmethod
    def recipe(cls, setting):
        """CoOp's for each protocol, as in the paper, then the second stage of
        class-specific contexts.
        """
        first = CoOp.recipe(setting)
        hparams = (
            {"init": "", "n_ctx": 16} if "n_ctx" in first.hparams else first.hparams
        )
        specific = setting.hparams.get("class_specific", True)
        second = (replace(first, hparams={}, lr=0.1 * first.lr),) if specific else ()
        hparams = hparams | {"class_specific": specific}
        return replace(first, hparams=hparams, stages=second)


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
