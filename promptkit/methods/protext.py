"""ProText: deep text prompts learned from sentences alone, without an image.

Learning to Prompt with Text Only Supervision for Vision-Language Models; Khattak et
al., AAAI 2025; arXiv 2401.02418.

Deviations: everything is float32 by default; the published code rounds the deep prompts
to half precision where they enter a block. Of recipes that differ between the paper and
its code, the code's are followed, which its numbers belong to. As in that code, and not
as in the paper's figure, the prompts take the place of the first words in place of
being put before them. A sentence that is longer than the text tower reads is cut.
"""

import warnings
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F

from promptkit.descriptions import (
    Texts,
    key_of,
    nothing_said,
    sentence_features,
    sentences_of,
)
from promptkit.errors import expect
from promptkit.files import same, some
from promptkit.method import register
from promptkit.methods.ivlp import IVLP
from promptkit.methods.maple import overwritten
from promptkit.picture import Picture, Target, learned
from promptkit.prompts import Template
from promptkit.published import Published, dataset_of
from promptkit.recipe import Recipe

WORDS = "a photo of a"  # of what a class is called in training, up to 4 tokens
# What follows them at test time where the dataset decides; elsewhere "{}.".
ENDINGS = {
    "oxford_pets": "{}, a type of pet.",
    "oxford_flowers": "{}, a type of flower.",
    "fgvc_aircraft": "{}, a type of aircraft.",
    "dtd": "{}, a type of a texture.",
    "eurosat": "centered satellite photo of {}.",
    "food101": "{}, a type of food.",
}
# Tokens, learning rate, epochs.
BASE_TO_NEW = {
    "imagenet": (4, 0.03, 30),
    "caltech101": (16, 0.0025, 30),
    "oxford_pets": (4, 0.03, 50),
    "stanford_cars": (8, 0.0025, 30),
    "oxford_flowers": (4, 0.0025, 150),
    "food101": (8, 0.0025, 50),
    "fgvc_aircraft": (4, 0.03, 200),
    "sun397": (8, 0.03, 30),
    "dtd": (4, 0.03, 200),
    "eurosat": (16, 0.0025, 30),
    "ucf101": (16, 0.03, 30),
}
ALL_CLASSES = {
    "imagenet": (16, 0.0025, 200),
    "caltech101": (16, 0.03, 30),
    "oxford_pets": (4, 0.03, 50),
    "stanford_cars": (8, 0.03, 20),
    "oxford_flowers": (4, 0.0025, 300),
    "food101": (16, 0.03, 30),
    "fgvc_aircraft": (4, 0.03, 200),
    "sun397": (16, 0.03, 150),
    "dtd": (16, 0.03, 200),
    "eurosat": (4, 0.0025, 300),
    "ucf101": (8, 0.0025, 100),
}
OTHERS = (4, 0.03, 200)  # as for DTD and FGVC-Aircraft, in base-to-new


def ending_of(dataset) -> str:
    """What follows "a photo of a" for a dataset; in the mini world its template's."""
    if dataset is None:
        return "{}."
    template = dataset.template
    if dataset.world == "mini" and template.startswith(f"{WORDS} "):
        return template.removeprefix(f"{WORDS} ")
    return ENDINGS.get(dataset.name, "{}.")


@register
class ProText(IVLP):
    r"""Prompts that turn a class's bare name into what a sentence about it says.

    .. math:: L = \lambda\,\frac{1}{PE} \sum_{p=1}^{P}
       \bigl\lVert \hat g_{\mathrm{prompted}}(\text{"a photo of a [class } c_p]."\!)
       - \hat g(\text{sentence } p) \bigr\rVert^2

    The map is learned on pairs of a class and one of its sentences, and serves classes
    that nothing was said of. The image tower is CLIP's own. For pairs of templates,
    describe the classes by these.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        descriptions: ``{class: [sentence, ...]}``; keys without a class are left out,
            and case and underscores do not count. None: those of the dataset it is
            aimed at.
        loss: "mse", times ``weight``, or "l1", whose weight is 1.
        weight: λ.
        ending: the text around the class name behind "a photo of a" at test time; None:
            that of the dataset it is aimed at. Of no effect without these words.
        n_ctx: tokens a block. Up to 4 take the place of "a photo of a", more stand
            before the class name alone.
        depth: J, blocks with prompts; None: three quarters, 9 of 12.
        init: the words that the first block's start from at test time; empty: normal,
            std 0.02. None: "a photo of a", or with more than 4 tokens no words.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "protext"
    title = "ProText"
    year = 2024
    paper = "2401.02418"
    kind = "prompt"
    supervision = "texts"
    picture = Picture(
        text=("SOS", learned("$p_0$"), "[class]", ".", "EOT"),
        blocks=("1", "2 … J", "J+1 … L"),
        text_blocks={1: learned("$p_i$")},
        text_reference=Target("frozen CLIP,\na sentence", "MSE"),
        targets=(),
        images="an image $x$, at test time alone",
    )
    from_dataset = {"descriptions": sentences_of, "ending": ending_of}
    official_hyperparameters = {
        "n_ctx_text": "n_ctx",
        "N_CTX_TEXT": "n_ctx",
        "ctx_init": "init",
        "CTX_INIT": "init",
        "prompt_depth_text": "depth",
        "PROMPT_DEPTH_TEXT": "depth",
        "loss": "loss",
        "loss_weight": "weight",
        "descriptions": "descriptions",
        "cross_dataset": None,  # whether the dataset's ending counts
        "CROSS_DATASET": None,
        "dataset": None,  # stands for its ending, see official_hparams
    }
    published = {
        protocol: Published(("ViT-B-16",), (), f"ProText: its {runs}", notes)
        for protocol, runs, notes in (
            ("few-shot", "text-only supervised runs",
             "Sentences about all classes, no images."),
            ("base-to-new", "base-to-new runs",
             "Sentences about the base classes, no images."),
            ("cross-dataset", "cross-dataset run",
             "Sentences about ImageNet's classes; 5 of 10 epochs warm up."),
            ("domain-generalization", "text-only supervised run on ImageNet",
             "16 tokens, 200 epochs."),
        )
    }  # fmt: skip

    def __init__(
        self,
        clip,
        classnames,
        *,
        descriptions: dict | None = None,
        loss: Literal["mse", "l1"] = "mse",
        weight: float = 1000.0,
        ending: str | None = "{}.",
        n_ctx: int | None = None,
        depth: int | None = None,
        init: str | None = None,
    ):
        expect(depth != 0, "depth", depth, "at least 1: something has to learn")
        super().__init__(
            clip, classnames, n_ctx=n_ctx, depth=depth, depth_vision=0, init=init
        )
        expect(weight > 0, "weight", weight, "above 0")
        fits = ending is None or "{}" in ending
        expect(fits, "ending", ending, "a text with {} for the class name")
        self.distance, self.weight = loss, weight
        self.words = (init is None or bool(init)) and self.context.length <= 4
        self.reads, self.reads_at_test = "texts", "features"
        self._targets: dict[str, torch.Tensor] = {}

    def set_classes(self, classnames):
        self.context.ending = self.option("ending") if self.words else "{}."
        super().set_classes(classnames)

    # --- pairs of a class and a sentence ----------------------------------------------

    @cached_property
    def inputs(self) -> list[str]:
        """What each class is called in training: its key in the descriptions; up to 4
        tokens after "a photo of a", more as the file spells it, underscores and all.
        """
        keys = key_of(self.option("descriptions"), self.classnames)
        keys = [key or name for key, name in zip(keys, self.classnames, strict=True)]
        short = self.context.length <= 4
        return [f"{key.replace('_', ' ') if short else key}." for key in keys]

    @cached_property
    def lessons(self) -> Template:
        """The prompts that :attr:`inputs` are read in."""
        n = self.context.length
        rest = self.clip.encode(WORDS)[n:] if n <= 4 else []
        pattern = [n, torch.tensor(rest, dtype=torch.long), self.inputs]
        return Template(self.clip, self.classnames, pattern)

    def pairs(self) -> list[tuple[int, str]]:
        """(class, sentence), in the order of the descriptions."""
        said = self.option("descriptions")
        label = {}
        for c, name in enumerate(self.classnames):
            label.setdefault(same(name), c)
        known = [key for key in said if same(key) in label]
        return [(label[same(key)], text) for key in known for text in said[key]]

    def prepare(self, dataset, recipe, generator, stage):
        """The pairs, in the place of images; classes that nothing is said of are named
        in a warning.
        """
        pairs = self.pairs()
        if not pairs:
            raise nothing_said(self.spec, self.classnames)
        silent = set(range(len(self.classnames))) - {label for label, _ in pairs}
        if silent:
            names = [self.classnames[c] for c in sorted(silent)]
            warnings.warn(f"nothing is said of {some(names)}", stacklevel=2)
        labels, texts = zip(*pairs, strict=True)
        return replace(dataset, train=Texts(list(texts), torch.tensor(labels)))

    def targets(self, texts: list[str]) -> torch.Tensor:
        """Frozen features (P, E) of sentences, normalised; each is computed once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._targets]
        if new:
            features = sentence_features(self.clip, new)
            self._targets.update(zip(new, features, strict=True))
        return torch.stack([self._targets[text] for text in texts])

    # --- training ---------------------------------------------------------------------

    def named(self, labels: torch.Tensor) -> torch.Tensor:
        """Prompted features (P, E) of the names of classes (P,), normalised; each class
        is encoded once.
        """
        classes, where = labels.unique(return_inverse=True)
        prompt = self.lessons(self.context.vectors, classes=classes)
        return F.normalize(self.clip.text(prompt, self.text_edit())[0], dim=-1)[where]

    def loss(self, batch):
        ours, goal = self.named(batch.labels), self.targets(batch.texts)
        if self.distance == "l1":
            return F.l1_loss(ours, goal)
        return self.weight * F.mse_loss(ours, goal)

    def finish(self, dataset, recipe, generator):
        self._targets.clear()

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for IVLP; with ``cross_dataset`` a dataset stands for its ending."""
        ours = overwritten(super(IVLP, cls).official_hparams(hyperparameters))
        flags = [hyperparameters.get(k) for k in ("cross_dataset", "CROSS_DATASET")]
        if any(flags):
            dataset = hyperparameters.get("dataset")
            name = dataset and dataset_of(dataset)
            ours["ending"] = ENDINGS.get(name, "{}.") if name else None
        return ours

    @classmethod
    def recipe(cls, setting):
        """Those of the published configurations."""
        hparams, name = {}, setting.dataset
        if setting.protocol == "cross-dataset":
            n_ctx, lr, epochs = 4, 0.03, 10
            hparams = {"ending": None}
        elif setting.protocol == "domain-generalization":
            n_ctx, lr, epochs = ALL_CLASSES["imagenet"]
        else:
            few = setting.protocol == "few-shot"
            n_ctx, lr, epochs = (ALL_CLASSES if few else BASE_TO_NEW).get(name, OTHERS)
        return Recipe(
            hparams={"n_ctx": n_ctx} | hparams,
            epochs=epochs,
            batch_size=256,
            optimizer="adamw",
            lr=lr,
            weight_decay=0.1,
            options={"betas": (0.9, 0.98), "eps": 1e-8},
            warmup_epochs=5,
        )
