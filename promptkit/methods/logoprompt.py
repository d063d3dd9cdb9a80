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

from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import nn

from promptkit.clip import zero_shot_features
from promptkit.errors import InputError, expect
from promptkit.lettering import WritesNames
from promptkit.method import Method, register
from promptkit.methods.coop import CoOp, check_words
from promptkit.picture import LABELS, Picture, Target, learned
from promptkit.prompts import Context
from promptkit.published import usual


@register
class LoGoPrompt(WritesNames, Method):
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
        "base-to-new": usual(
            "LoGoPrompt: its paper",
            "CoOp's optimisation, 4 vectors, K 5; class-specific, with a second stage"
            " (ours) of as many epochs at a tenth of the rate.",
        ),
        "few-shot": usual(
            "LoGoPrompt: its paper",
            "CoOp's optimisation, 16 vectors, K 5; without tuned pixels;"
            " class-specific, with a second stage (ours) of as many epochs at a tenth"
            " of the rate.",
            backbones=("RN50",),
            shots=(1, 2, 4, 8, 16),
        ),
        "domain-generalization": usual(
            "LoGoPrompt: its paper", "As base-to-new, 50 epochs."
        ),
        "cross-dataset": usual(
            "LoGoPrompt: its paper", "As domain generalization.", extrapolation=True
        ),
    }

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
        self.drawn = True  # names in training stand at random, in random colours
        length = n_ctx or (None if init else 4)
        self.context = Context(clip, self.classnames, length, words=init or None)
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

    # --- selection --------------------------------------------------------------------

    def encode(self, batch):
        """Of the images without names: those that the batch carries, if any."""
        if batch.features is None or batch.images is None:
            return super().encode(batch)
        return batch.features

    def confident(self, batch, image, text, classes, generator=None, score=None):
        """log p(c | x) of all classes (B, C), and log p(c | x_c) of some, (B, K)."""
        score = score or self.score
        plain = score(image, text).log_softmax(dim=-1)
        classes = classes(plain.detach())  # (B, K)
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
        return dataset

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
        random = {"init": "", "n_ctx": 16}
        hparams = random if "n_ctx" in first.hparams else first.hparams
        specific = setting.hparams.get("class_specific", True)
        second = (replace(first, hparams={}, lr=0.1 * first.lr),) if specific else ()
        hparams = hparams | {"class_specific": specific}
        return replace(first, hparams=hparams, stages=second)
