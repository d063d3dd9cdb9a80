"""CoPrompt: MaPLe with adapters on both features, held to what frozen CLIP makes of
another view and another sentence.

Consistency-guided Prompt Learning for Vision-Language Models; Roy and Etemad, ICLR
2024; arXiv 2306.01195.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights, the context, its projection and the adapters in half precision. The published
sentences do not come with this package: they are given by ``descriptions``, or the
dataset's own are taken; where there are none, "a photo of a {}." is the only sentence,
and a warning says so. The mini world says phrases of its classes ("two antennas"); they
are put behind its templates, as nearly all published sentences name their class.
Classes with different numbers of sentences keep as many as the shortest list has.
Distances of the augmentation are those of 224 pixels, scaled to the image size. A
network that is aimed elsewhere keeps its own depth and length; the published code
resets them by the dataset that it is tested on.
"""

import warnings
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from promptkit.descriptions import as_many, said_of
from promptkit.errors import InputError, expect
from promptkit.method import register
from promptkit.methods.maple import MaPLe
from promptkit.picture import Bridge, Picture, Target, learned, made
from promptkit.published import Published, transfer
from promptkit.randaugment import augmented
from promptkit.recipe import Recipe

PLAIN = "a photo of a {}."
# (depth, n_ctx, lam, epochs) where they are not 12, 4, 8, 8, as in the published code.
SETTINGS = {
    "caltech101": (12, 4, 4.0, 8),
    "oxford_pets": (12, 2, 0.1, 8),
    "stanford_cars": (12, 4, 4.0, 8),
    "oxford_flowers": (9, 4, 8.0, 8),
    "food101": (9, 4, 0.5, 5),
    "fgvc_aircraft": (9, 4, 2.0, 8),
    "dtd": (12, 2, 8.0, 8),
    "eurosat": (12, 2, 0.1, 8),
    "ucf101": (12, 4, 2.0, 8),
}


def sentences_of(dataset) -> dict[str, list[str]]:
    """What a dataset says of its classes, by class name; a phrase of the mini world
    becomes "a photo of a NAME with PHRASE.", in the template of its task.
    """
    said = dict(dataset.descriptions) if dataset else {}
    if not said or dataset.world != "mini":
        return said
    opening = dataset.template.rstrip(".") + " with "
    return {
        name: [
            text if text.endswith(".") else opening.replace("{}", name) + text + "."
            for text in texts
        ]
        for name, texts in said.items()
    }


@register
class CoPrompt(MaPLe):
    r"""MaPLe's prompts and two bottlenecks, trained for the labels and for agreement
    with frozen CLIP under perturbations.

    With the prompted features t_c of the classes and f of an image, and bottlenecks A
    of two layers, each followed by a ReLU and without biases,

    .. math:: w_c = r_t A_t(t_c) + (1 - r_t)\,t_c, \qquad
       g = r_v A_v(f) + (1 - r_v) f,

    .. math:: L = L_{ce} + \lambda \Bigl[
       \frac1C \sum_c \bigl(1 - \cos(w_c, w'_{c,k})\bigr) +
       \frac1B \sum_b \bigl(1 - \cos(g_b, f'_b)\bigr) \Bigr].

    w'_{c,k} is frozen CLIP's feature of the k-th sentence about class c, with one
    random k a step for all classes; f'_b is its feature of a second random augmentation
    of the image, of which the prompted towers read the first. Inference needs neither;
    the adapters stay.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        lam: lambda; 0 trains for the labels alone.
        consistency: "cosine", or "mse": the mean squared difference of all entries of
            the normalised features.
        reduction: how many times narrower than the features a bottleneck is.
        image_ratio, text_ratio: r_v and r_t; 0 leaves that adapter out.
        descriptions: sentences by class name, an equal number for each. None: those of
            the dataset it is aimed at.
        n_ctx, init: as in MaPLe.
        depth: J, blocks with prompts; None: all.

    Raises:
        InputError: a hyperparameter or a class name does not fit, the whole is too long
            for the text tower, or, in training, a class has no sentence.
    """

    name = "coprompt"
    title = "CoPrompt"
    year = 2023
    paper = "2306.01195"
    reads = "views"
    reads_at_test = "images"
    picture = Picture(
        text=("SOS", learned("$p_0$"), "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", made(r"$\tilde{p}_0$")),
        blocks=("1", "2 … L"),
        text_blocks={1: learned("$p_i$")},
        image_blocks={1: made(r"$\tilde{p}_i$")},
        bridges=(
            Bridge(learned("$A_0$"), "text tokens", "image tokens"),
            Bridge(learned("$A_i$"), "text 1", "image 1"),
        ),
        text_out=learned("adapter, mixed in"),
        image_out=learned("adapter, mixed in"),
        text_reference=Target("frozen CLIP,\na sentence", "1 − cos"),
        image_reference=Target("frozen CLIP,\nsecond view", "1 − cos"),
    )
    from_dataset = {"descriptions": sentences_of}
    official_hyperparameters = MaPLe.official_hyperparameters | {
        "consistency_weight": "lam",
        "consistency": "consistency",
        "DISTILL": "consistency",
        "adapter_reduction": "reduction",
        "image_adapter_ratio": "image_ratio",
        "text_adapter_ratio": "text_ratio",
        "descriptions": "descriptions",
    }
    published = {
        "base-to-new": Published(
            ("ViT-B-16",),
            (16,),
            "CoPrompt: its base-to-new runs",
            "Depth, length, lambda and epochs by dataset, as in the code.",
        ),
        "few-shot": Published(
            ("ViT-B-16",),
            (16,),
            "CoPrompt: its base-to-new runs",
            "The settings of base-to-new: the repository has no few-shot runs.",
            extrapolation=True,
        ),
    } | transfer(
        Published(
            ("ViT-B-16",),
            (16,),
            "CoPrompt: its base-to-new runs",
            "The settings of base-to-new on ImageNet: the paper has the numbers, the"
            " repository no script.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        lam: float = 8.0,
        consistency: Literal["cosine", "mse"] = "cosine",
        reduction: int = 4,
        image_ratio: float = 0.1,
        text_ratio: float = 0.2,
        descriptions: dict | None = None,
        n_ctx: int = 4,
        depth: int | None = None,
        init: str | None = None,
    ):
        if depth is None:
            depth = min(len(clip.text_tower.blocks), len(clip.image_tower.blocks))
        super().__init__(clip, classnames, n_ctx=n_ctx, depth=depth, init=init)
        expect(lam >= 0, "lam", lam, "at least 0")
        E = clip.embed_dim
        fits = 1 <= reduction <= E
        expect(fits, "reduction", reduction, f"from 1 to the {E} of a feature")
        expect(0 <= image_ratio <= 1, "image_ratio", image_ratio, "from 0 to 1")
        expect(0 <= text_ratio <= 1, "text_ratio", text_ratio, "from 0 to 1")
        self.lam, self.consistency = lam, consistency
        self.image_ratio, self.text_ratio = image_ratio, text_ratio
        self.adapter_image = bottleneck(E, reduction)
        self.adapter_text = bottleneck(E, reduction)

    # --- adapters, in training and at test --------------------------------------------

    def adapt(self, features):
        r = self.image_ratio
        return r * self.adapter_image(features) + (1 - r) * features

    def text_features(self, image_features=None):
        r, prompted = self.text_ratio, super().text_features(image_features)  # (C, E)
        return r * self.adapter_text(prompted) + (1 - r) * prompted

    # --- consistency ------------------------------------------------------------------

    def views(self, images, generator):
        """Two augmentations of each image, (B, 2, 3, S, S), drawn independently."""
        made = [augmented(x, self.clip, generator) for x in images for _ in range(2)]
        pixels = torch.stack(made).to(self.clip.device).float() / 255
        return self.clip.normalize(pixels).unflatten(0, (-1, 2))

    def encode(self, batch):
        """Of the first view in training, of the image at test."""
        if batch.images is None and batch.views is not None:
            return self.adapt(self.image_features(batch.views[:, 0]))
        return super().encode(batch)

    @cached_property
    def bank(self):
        """Frozen features of the sentences, (N, C, E), normalised, computed when
        training first asks.
        """
        names = self.classnames
        said = self.option("descriptions") or {
            n: [PLAIN.replace("{}", n)] for n in names
        }
        pairs = zip(names, said_of(said, names), strict=True)
        about = as_many({name: texts or [] for name, texts in pairs})
        rows = zip(*(about[name] for name in names), strict=True)
        texts = [text for row in rows for text in row]  # N for each of C
        features = self.clip.encode_text(texts).unflatten(0, (-1, len(names)))
        return F.normalize(features, dim=-1)

    def sentence(self, batch) -> int:
        """k, the sentence of this step."""
        return int(torch.randint(len(self.bank), (), generator=batch.generator))

    def regularizer(self, batch, image, text):
        if not self.lam:
            return 0.0
        if batch.views is None or batch.views.shape[1] < 2:
            raise InputError(
                "coprompt compares two views of each image: the batch must hold views,"
                " (B, 2, 3, H, W), as method.views() makes them"
            )
        target = self.clip.encode_image(batch.views[:, 1])  # (B, E)
        return self.lam * (
            self.distance(text, self.bank[self.sentence(batch)])
            + self.distance(image, target)
        )

    def distance(self, ours, frozen):
        """Of features (n, E) from those of the frozen CLIP, their mean, ()."""
        if self.consistency == "cosine":
            return 1 - F.cosine_similarity(ours, frozen, dim=-1).mean()
        return F.mse_loss(F.normalize(ours, dim=-1), F.normalize(frozen, dim=-1))

    def prepare(self, dataset, recipe, generator, stage):
        if self.lam and not self.option("descriptions"):
            warnings.warn(
                f"nothing is said about the classes of {dataset.name}: coprompt takes"
                f" {PLAIN!r} for the only sentence; give some by descriptions",
                stacklevel=2,
            )
        return super().prepare(dataset, recipe, generator, stage)

    # --- the published code -----------------------------------------------------------

    def official_names(self):
        names = super().official_names()
        for adapter in ("adapter_image", "adapter_text"):
            for layer in (0, 2):
                names[f"{adapter}.fc.{layer}.weight"] = f"{adapter}.{layer}.weight"
        return names

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for MaPLe; every consistency that is not "cosine" is a squared
        difference.
        """
        ours = super().official_hparams(hyperparameters)
        if ours.get("consistency", "cosine") != "cosine":
            ours["consistency"] = "mse"
        return ours

    @classmethod
    def recipe(cls, setting):
        """The published code's for each dataset, the same for all protocols."""
        depth, n_ctx, lam, epochs = SETTINGS.get(setting.dataset, (12, 4, 8.0, 8))
        hparams = {"n_ctx": n_ctx, "lam": lam}
        hparams |= {"depth": depth} if depth < 12 else {}  # of 12: all is the default
        return Recipe(hparams=hparams, epochs=epochs, batch_size=4, lr=0.0035)


def bottleneck(features: int, reduction: int) -> nn.Sequential:
    """Two layers (..., E) -> (..., E), each followed by a ReLU, without biases."""
    narrow = features // reduction
    return nn.Sequential(
        nn.Linear(features, narrow, bias=False),
        nn.ReLU(),
        nn.Linear(narrow, features, bias=False),
        nn.ReLU(),
    )
