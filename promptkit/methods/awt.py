"""AWT: many views of an image, many sentences about a class, compared by optimal
transport.

AWT: Transferring Vision-Language Models via Augmentation, Weighting, and
Transportation; Zhu et al., NeurIPS 2024; arXiv 2407.04603.

Without ``adapters`` nothing is learned. With them this is its few-shot form, which
trains small adapters in both towers through the same score.

Deviations: everything is float32 by default, where the published runs encode in half
precision. Sinkhorn's iterations run in the logarithmic domain where the kernel could
underflow, and each image has its own stopping rule, so that a score does not depend on
the other images of a batch; the published few-shot code stops a batch together
(``together``). Where a class has fewer sentences than are asked for, all classes have
as many as it has. EuroSAT's class names, which that code rewrites, are the dataset's
own here.
"""

import re
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptkit.adapters import Adapter, Adapters
from promptkit.data import transform
from promptkit.errors import expect
from promptkit.method import register
from promptkit.picture import Picture
from promptkit.prompts import assemble
from promptkit.published import Published, everywhere
from promptkit.recipe import Recipe
from promptkit.sets import Sets
from promptkit.views import drawn_views, views_of

PLAIN = "a photo of a {}"
# The published code's; elsewhere the dataset's own.
TEMPLATES = {
    "oxford_pets": "a photo of a {} from OxfordPets",
    "oxford_flowers": "a photo of a {}, a type of flower",
    "fgvc_aircraft": "a photo of a {} from Fine-Grained Visual Classification of"
    " Aircraft",
    "dtd": "a photo of a {}, which is a type of texture, or a type of pattern",
    "eurosat": "satellite photo of the {}",
    "food101": "a photo of a {} from Food101",
    "ucf101": "a photo of a person doing {}",
    "imagenet_sketch": "a sketch photo of a {}",
    "imagenet_r": "a rendition photo of a {}",
}


def template_of(dataset) -> str:
    """What a class of a dataset is called, without the full stop."""
    if dataset is None:
        return PLAIN
    return TEMPLATES.get(dataset.name, dataset.template.removesuffix("."))


@register
class AWT(Sets):
    r"""The set of an image's views against the set of a class's sentences.

    The few-shot form puts an adapter h + scale up(GELU(down h)) behind attention and
    MLP of the blocks. Its loss is the cross-entropy of the same score, in which T is a
    constant, and holds the features near those without adapters,

    .. math:: L = L_{ce} + \lambda_i\,\overline{|\hat f - \hat f'|}
       + \lambda_t\,\overline{|\hat w - \hat w'|}

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        adapters: the few-shot form.
        layers: blocks with adapters; None: all.
        parts: of "attn" and "mlp", behind which they stand; None: both.
        towers: of "image" and "text", those that have them; None: both.
        rate: a tower's width over that of the bottleneck.
        scale: of the adapters; None: learned, from 1.
        train_views, train_sentences: of a training step; the template alone is always
            among the sentences, the others are drawn, the same for all classes.
        train_image_temperature, train_text_temperature: tau and tau' there.
        image_weight, text_weight: lambda_i and lambda_t, of the two distances.
        views, descriptions, sentences: as in :class:`~promptkit.sets.Sets`.
        template: likewise; None: the published one of the dataset it is aimed at.
        weighting, transport, image_temperature, text_temperature: likewise.
        epsilon, iterations, threshold, together: likewise.

    Raises:
        InputError: a hyperparameter does not fit, or some classes have descriptions and
            one has none.
    """

    name = "awt"
    title = "AWT"
    year = 2024
    paper = "2407.04603"
    kind = "test-time"
    picture = Picture(
        text=("SOS", "a photo of a", "[class]", ".", "a sentence", "EOT"),
        score="optimal transport",
        targets=(),
        prompts="51 sentences for each class",
        images="51 views of an image",
        several=("text", "image"),
        note="the few-shot form learns adapters in the blocks of both towers",
    )
    from_dataset = Sets.from_dataset | {"template": template_of}
    official_hyperparameters = {
        **{name: name for name in ("descriptions", "template", "towers", "scale")},
        "num_descriptor": "sentences",
        "num_desc": "sentences",
        "n_views": "views",
        "image_temperature": "image_temperature",
        "text_temperature": "text_temperature",
        "sinkhorn_eps": "epsilon",
        "sinkhorn_threshold": "threshold",
        "sinkhorn_max_iterations": "iterations",
        "desc_per_batch": "train_sentences",
        "views_per_batch": "train_views",
        "adapter_layers": "layers",
        "positions": "parts",
        "down_rate": "rate",
        "distil_image": "image_weight",
        "distil_text": "text_weight",
        **dict.fromkeys(  # these: see official_hparams
            ("visual", "text", "attn", "mlp", "learnable_scale", "train_temperatures",
             "test_temperatures")
        ),
        "n_prompts": None,  # follows from the number of descriptions
    }  # fmt: skip
    published = everywhere(
        Published(
            ("ViT-B-16",),
            (),
            "AWT: its zero-shot code",
            "Without adapters: 51 views, 50 sentences a class.",
        )
    ) | {
        "few-shot": Published(
            ("ViT-B-16",),
            (1, 2, 4, 8, 16),
            "AWT: its few-shot code",
            "Adapters of rate 384 at 0.002 for 20 epochs, from 8 shots on 256 at 0.008"
            " for 25; its weights (10, 25), which it changes for some datasets. Tested"
            " on 51 views. Its sentences are another set than the zero-shot code's.",
        ),
        "base-to-new": Published(
            ("ViT-B-16",), (), "AWT: its zero-shot code", "The same.", True
        ),
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        adapters: bool = False,
        layers: list[int] | None = None,
        parts: list[Literal["attn", "mlp"]] | None = None,
        towers: list[Literal["image", "text"]] | None = None,
        rate: int = 256,
        scale: float | None = None,
        train_views: int = 8,
        train_sentences: int = 8,
        train_image_temperature: float = 1.0,
        train_text_temperature: float = 1.0,
        image_weight: float = 10.0,
        text_weight: float = 25.0,
        **options,
    ):
        super().__init__(clip, classnames, **options)
        counts = {"train_views": train_views, "train_sentences": train_sentences}
        for name, n in (counts | {"rate": rate}).items():
            expect(n >= 1, name, n, "at least 1")
        self.train_temperatures = train_image_temperature, train_text_temperature
        self.weights = image_weight, text_weight
        for n, kind in enumerate(("image", "text")):
            t, weight = self.train_temperatures[n], self.weights[n]
            expect(t > 0, f"train_{kind}_temperature", t, "above 0")
            expect(weight >= 0, f"{kind}_weight", weight, "at least 0")
        self.train_views, self.train_sentences = train_views, train_sentences
        self._drawn = None  # the sentences of a training step
        self.adapters, self.layers = nn.ModuleDict(), layers
        if not adapters:
            return
        parts = ["attn", "mlp"] if parts is None else parts
        towers = ["image", "text"] if towers is None else towers
        expect(len(parts) > 0, "parts", parts, "of 'attn' and 'mlp', or both")
        expect(len(towers) > 0, "towers", towers, "of 'image' and 'text', or both")
        for name in towers:
            width = clip.vision_width if name == "image" else clip.width
            blocks = len(getattr(clip, f"{name}_tower").blocks)
            mine = range(blocks) if layers is None else layers
            fits = len(mine) and all(0 <= layer < blocks for layer in mine)
            expect(fits, "layers", layers, f"some of the {blocks} blocks, from 0")
            first = Adapter(width, max(width // rate, 1), scale)
            self.adapters[name] = Adapters(first, mine, parts)

    @property
    def learning(self) -> bool:
        """Whether it takes a training step of the few-shot form."""
        return self.training and len(self.adapters) > 0

    # --- sentences --------------------------------------------------------------------

    @cached_property
    def _prompts(self) -> list:
        """The prompt of all classes for each of the J sentences."""
        return [
            assemble(self.clip, self.classnames, [list(texts)])
            for texts in zip(*self.texts, strict=True)
        ]

    def text_edit(self):
        return self.adapters["text"].edit() if "text" in self.adapters else None

    def text_features(self, image_features=None):
        """Of each class's sentences, (C, J, E); in a training step of those drawn."""
        edit = self.text_edit()
        if edit is None:
            return self.frozen_text[:, self._chosen]
        parts = [self.clip.text(self._prompts[d], edit)[0] for d in self._chosen]
        return torch.stack(parts, dim=1)

    @property
    def _chosen(self) -> list[int]:
        """The sentences that are compared now."""
        every = list(range(len(self.texts[0])))
        return self._drawn if self.learning and self._drawn else every

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self._drawn = None

    def draw(self, generator) -> list[int]:
        """The sentences of a training step: the template alone, and random others."""
        n = torch.randperm(len(self.texts[0]) - 1, generator=generator)
        return [0, *(1 + n[: self.train_sentences - 1]).tolist()]

    # --- views ------------------------------------------------------------------------

    def views(self, images, generator):
        """Views (B, V, 3, S, S): the centre crop, then random crops and flips; in
        training random ones alone. Those of the few-shot form are resized as all
        training images are, those of the zero-shot form bilinearly.
        """
        n = self.train_views if self.training else self.n_views - 1
        if len(self.adapters):
            whole = [] if self.training else [transform(self.clip, images)]
            crops = [transform(self.clip, images, True, generator) for _ in range(n)]
            return torch.stack([*whole, *crops], dim=1)
        return drawn_views(self.clip, images, self.n_views, False, generator)

    def image_edit(self):
        return self.adapters["image"].edit() if "image" in self.adapters else None

    def encode(self, batch):
        """Features (B, V, E) of the views."""
        batch.views = views_of(self, batch)
        views = batch.views.to(self.clip.device)
        return self.image_features(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    # --- a training step --------------------------------------------------------------

    def features(self, batch):
        self._drawn = self.draw(batch.generator) if self.learning else None
        return super().features(batch)

    def tempered(self):
        return self.train_temperatures if self.learning else self.temperatures

    def regularizer(self, batch, image, text):
        """The distances from the features without adapters."""
        if not len(self.adapters):
            return 0.0
        pairs = zip(self.weights, self.distances(batch, image, text), strict=True)
        return sum(weight * distance for weight, distance in pairs)

    def distances(self, batch, image, text) -> tuple[Tensor, Tensor]:
        """Mean absolute difference of normalised features, of images and of texts."""
        frozen = self.clip.encode_image(batch.views.flatten(0, 1).to(image.device))
        theirs = frozen.view_as(image), self.frozen_text[:, self._chosen]
        return tuple(
            F.l1_loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1))
            for x, y in zip((image, text), theirs, strict=True)
        )

    # --- the names of its own repository ----------------------------------------------

    def official_names(self):
        learner = dict(image="visual_adapter_learner", text="text_adapter_learner")
        leaves = dict(down="down_proj", up="up_proj", scale="scale")
        names = {}
        for ours, _ in self.adapters.named_parameters():
            tower, part, block, leaf, *rest = ours.split(".")
            number = block if self.layers is None else self.layers.index(int(block))
            official = [learner[tower], f"adapt_{part}", str(number), leaves[leaf]]
            names[".".join([*official, *rest])] = f"adapters.{ours}"
        return names

    def official_state(self, state):
        """Adapters of some blocks may be numbered by these, or one after another."""
        place = {str(block): str(n) for n, block in enumerate(self.layers or ())}
        numbers = re.compile(r"(?<=_adapter_learner\.)(adapt_\w+\.)(\d+)")
        if {found[2] for key in state for found in numbers.finditer(key)} != set(place):
            return state
        return {
            numbers.sub(lambda found: found[1] + place[found[2]], key): value
            for key, value in state.items()
        }

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method. Options of the adapters ask for the few-shot form, which
        solves a batch together; a scale of -1 is learned, and "visual", "text", "attn"
        and "mlp" switch adapters off where they are false.
        """
        ours = super().official_hparams(hyperparameters)
        for name, official in (
            ("towers", {"visual": "image", "text": "text"}),
            ("parts", {"attn": "attn", "mlp": "mlp"}),
        ):
            on = {official[k] for k in official if hyperparameters.get(k, True)}
            named = [official.get(x, x) for x in ours.get(name) or official]
            if ours.get(name) or len(on) < 2:
                ours[name] = [x for x in named if x in on]
        known = {"layers", "parts", "rate", "scale", "train_sentences", "towers"}
        if known & set(ours) or "learnable_scale" in hyperparameters:
            scale = ours.get("scale", -1)
            learned = hyperparameters.get("learnable_scale", scale == -1)
            ours |= {"adapters": True, "together": True}
            ours["scale"] = None if learned else float(ours.get("scale", 1))
        for start, when in (("", "test"), ("train_", "train")):
            given = hyperparameters.get(f"{when}_temperatures") or ()
            for kind, value in zip(("image", "text"), given, strict=False):
                ours[f"{start}{kind}_temperature"] = value
        return ours

    @classmethod
    def recipe(cls, setting):
        """Zero-shot, but few-shot in the few-shot protocol unless it is asked for
        without adapters.
        """
        few = setting.protocol == "few-shot"
        if not setting.hparams.get("adapters", few):
            return Recipe(epochs=0, augment=False)
        many = setting.shots >= 8
        hparams = {"adapters": True, "rate": 256 if many else 384}
        if setting.dataset == "imagenet":
            hparams["train_sentences"] = 4
        epochs, lr = (25, 0.008) if many else (20, 0.002)
        return Recipe(
            hparams, epochs=epochs, batch_size=16, lr=lr, warmup_epochs=5,
            warmup="linear",
        )  # fmt: skip
