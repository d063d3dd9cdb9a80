"""Tip-Adapter: remember the few shots, and ask which of them an image resembles.

Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification; Zhang et al.,
ECCV 2022; arXiv 2207.09519.

Deviations: the published code searches alpha and beta on all validation images, and on
ImageNet on the test images; here it is the validation images of the few-shot draw, and
without any the configured values stay. It draws its shots by itself, with repetition
where a class has too few. Its constant factor 100 is here the backbone's own logit
scale, 100 for OpenAI's weights. Everything is float32 by default, where it is in half
precision. New classes, which it does not serve, are those of zero-shot CLIP.
"""

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F

from promptkit.clip import zero_shot_features
from promptkit.data import frozen_features, transform
from promptkit.data.benchmark import ENSEMBLE, PLAIN
from promptkit.errors import InputError, expect, expect_templates
from promptkit.heads import TrainedRows
from promptkit.method import Method, register
from promptkit.picture import Head, Picture, value
from promptkit.published import Published, transfer, usual
from promptkit.recipe import Recipe

# alpha, and the upper ends of the search, of beta and of alpha
OPTIONS = {
    "imagenet": (1.17, 7, 3),
    "caltech101": (3.0, 12, 5),
    "oxford_pets": (1.17, 7, 3),
    "stanford_cars": (3.0, 20, 10),
    "oxford_flowers": (10.0, 50, 50),
    "food101": (1.17, 10, 10),
    "fgvc_aircraft": (5.0, 30, 30),
    "sun397": (1.17, 12, 10),
    "dtd": (2.0, 13, 13),
    "eurosat": (2.0, 12, 10),
    "ucf101": (3.0, 7, 3),
}
RUN = Published(
    ("RN50", "RN101", "ViT-B-32", "ViT-B-16", "RN50x16"),
    (1, 2, 4, 8, 16),
    "Tip-Adapter: its configurations and log",
    "Ten augmented passes, alpha and the ranges of the search by dataset; the search on"
    " the validation images of the draw.",
)
NEW = "As few-shot. New classes, which were never run, are zero-shot CLIP's."
PUBLISHED = {
    "few-shot": RUN,
    "base-to-new": replace(RUN, shots=(16,), notes=NEW, extrapolation=True),
} | transfer(
    usual(
        "Tip-Adapter: its table of shifted ImageNets",
        "As few-shot. Other datasets, which were never run, are zero-shot CLIP's.",
        backbones=("RN50",),
    ),
    shifts_alone=True,
)


def options_of(dataset) -> tuple:
    """(alpha, S_b, S_a) of a dataset; ImageNet's elsewhere."""
    return OPTIONS.get(dataset.name if dataset else "", OPTIONS["imagenet"])


def template_of(dataset) -> str | list[str]:
    """The seven of ImageNet and its shifts, the one of any other dataset."""
    if dataset is not None and dataset.name.startswith("imagenet"):
        return list(ENSEMBLE)
    return dataset.template if dataset else PLAIN


@register
class TipAdapter(TrainedRows, Method):
    r"""A cache of the few-shot images beside the zero-shot classifier; nothing learns.

    .. math:: z = s\,\hat f\,\hat w^\top + \alpha\,\phi(\hat f K^\top)\,V, \qquad
       \phi(a) = \exp(-\beta\,(1 - a))

    K, (M, E), are the features of the M training images, each the normalised mean of
    several augmented passes, and V, (M, C), their one-hot labels: the cache sums the
    affinities over the images of each class. alpha and beta are chosen on validation
    images, by a grid.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        alpha: weight of the cache, 0 is zero-shot CLIP; beta: its sharpness. What the
            search starts from, and what stays where there is none. alpha None: the
            paper's for the dataset it is aimed at, ImageNet's before.
        passes: augmented passes over the training images; without augmentation one.
        cache_size: keys a class; of more images, groups are averaged. None: all.
        search: choose alpha and beta on the validation images, if there are any.
        search_scale: where their grids from 0.1 on end, of beta and of alpha; None: the
            paper's for the dataset.
        search_step: the number of values of beta and of alpha; None: 200 and 20.
        template: of the hand-written prompts, or several for an ensemble. None: that of
            the dataset, for ImageNet the paper's seven.

    Raises:
        InputError: a hyperparameter does not fit.
    """

    name = "tip_adapter"
    title = "Tip-Adapter"
    year = 2021
    paper = "2207.09519"
    kind = "adapter"
    picture = Picture(
        heads=(Head(value("cache of few-shot features"), ("image",)),),
        fusion="sum of both on trained classes, the cosine alone on new ones",
        targets=(),
    )
    from_dataset = {
        "alpha": lambda dataset: options_of(dataset)[0],
        "search_scale": lambda dataset: list(options_of(dataset)[1:]),
        "template": template_of,
    }
    official_hyperparameters = {
        "init_alpha": "alpha",
        "init_beta": "beta",
        "augment_epoch": "passes",
        "search_hp": "search",
        "search_scale": "search_scale",
        "search_step": "search_step",
        "templates": "template",
        "template": "template",
        # Of the draw, the fine-tuning and the stores of features.
        **dict.fromkeys(("shots", "F", "lr", "train_epoch")),
        **dict.fromkeys(("load_cache", "load_pre_feat")),
    }
    published = PUBLISHED

    def __init__(
        self,
        clip,
        classnames,
        *,
        alpha: float | None = None,
        beta: float = 1.0,
        passes: int = 10,
        cache_size: int | None = None,
        search: bool = True,
        search_scale: list[float] | None = None,
        search_step: list[int] | None = None,
        template: str | list[str] | None = None,
    ):
        super().__init__(clip, classnames)
        alpha, scale = self.option("alpha"), self.option("search_scale")
        expect(alpha >= 0, "alpha", alpha, "at least 0")
        expect(beta >= 0, "beta", beta, "at least 0")
        expect(passes >= 1, "passes", passes, "at least 1")
        steps = search_step or [200, 20]
        fits = cache_size is None or cache_size >= 1
        expect(fits, "cache_size", cache_size, "at least 1")
        fits = len(scale) == 2 and min(scale) >= 0.1
        expect(fits, "search_scale", scale, "two numbers from 0.1, for beta and alpha")
        fits = len(steps) == 2 and min(steps) >= 1
        expect(fits, "search_step", steps, "two numbers from 1, for beta and alpha")
        expect_templates("template", template)
        self.passes, self.cache_size, self.search_step = passes, cache_size, steps
        C = len(self.classnames)
        # Before any image is seen: a key of zeros a class, which favours none.
        self.register_buffer("keys", torch.zeros(C, clip.embed_dim))  # (M, E)
        self.register_buffer("values", torch.eye(C))  # (M, C)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("beta", torch.tensor(float(beta)))

    @cached_property
    def classifier(self):
        """w, (C, E), of length 1."""
        return zero_shot_features(self.clip, self.classnames, self.option("template"))

    def text_features(self, image_features=None):
        return self.classifier

    def affinity(self, image):
        """Of image features (B, E) to the keys, (B, M)."""
        return F.normalize(image.float(), dim=-1) @ self.keys.T

    def cache_logits(self, image, beta=None):
        """What the cache says of the trained classes, (B, C), of image features."""
        beta = self.beta if beta is None else beta
        return (-beta * (1 - self.affinity(image))).exp() @ self.values

    def score(self, image, text):
        logits = super().score(image, text)
        if self.rows is None:
            return logits
        return logits + self.alpha * self.cache_logits(image)[:, self.rows]

    def remember(self, features, labels):
        """Fill the cache: image features (M, E), not normalised, and labels (M,)."""
        if self.cache_size is not None:
            groups = [
                (part.mean(0), c)
                for c in range(len(self.trained_on))
                for part in features[labels == c].tensor_split(self.cache_size)
                if len(part)
            ]
            means, classes = zip(*groups, strict=True)
            features, labels = torch.stack(means), torch.tensor(classes)
        keys = F.normalize(features, dim=-1)
        values = F.one_hot(labels, len(self.trained_on)).float()
        self.fill(keys, values.to(keys.device))

    def fill(self, keys, values):
        """Put in keys (M, E) and values (M, C)."""
        self.keys, self.values = keys, values

    def prepare(self, dataset, recipe, generator, stage):
        split = dataset.train
        if len(split) == 0:
            raise InputError(f"{dataset.name} has no training images")
        if recipe.augment:
            mean = self._augmented(split, recipe, generator)
        else:
            mean = frozen_features(self.clip, split)
        self.remember(mean, split.labels)
        self.alpha.fill_(self.option("alpha"))
        self.beta.fill_(self.hparams["beta"])
        return dataset

    def _augmented(self, split, recipe, generator):
        """Features (M, E) of a split, the mean of augmented passes."""
        how = {"augment": True, "generator": generator, "crop": recipe.crop}
        mean = 0.0
        for _ in range(self.passes):
            features = [
                self.clip.encode_image(transform(self.clip, split.images(rows), **how))
                for rows in torch.arange(len(split)).split(64)
            ]
            mean = mean + torch.cat(features) / self.passes
        return mean

    @torch.no_grad()
    def accuracies(self, image, labels):
        """Of every pair of the grid on image features (N, E), in percent: (betas,
        alphas) and the two grids.
        """
        betas, alphas = (
            torch.tensor([0.1 + i * (top - 0.1) / n for i in range(n)])
            for top, n in zip(
                self.option("search_scale"), self.search_step, strict=True
            )
        )
        plain = super().score(image, self.classifier)[:, None]  # (N, 1, C)
        labels, found = labels.to(plain.device)[:, None], []
        for beta in betas.tolist():
            cache = self.cache_logits(image, beta)[:, None]  # (N, 1, C)
            logits = plain + alphas.to(plain.device)[:, None] * cache  # (N, alphas, C)
            hits = logits.argmax(-1) == labels
            found.append(100 * hits.double().mean(0).cpu())
        return torch.stack(found), betas, alphas

    def choose(self, image, labels):
        """Set alpha and beta to the best pair on image features (N, E); of equal ones
        the smallest beta, then the smallest alpha.
        """
        found, betas, alphas = self.accuracies(image, labels)
        if found.max() > 0:
            at = int((found.flatten() == found.max()).nonzero()[0])
            self.beta.fill_(betas[at // len(alphas)])
            self.alpha.fill_(alphas[at % len(alphas)])

    def finish(self, dataset, recipe, generator):
        if self.hparams["search"] and len(dataset.val):
            features = frozen_features(self.clip, dataset.val)
            self.choose(features, dataset.val.labels)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; an option that is nothing (None) is not given."""
        ours = super().official_hparams(hyperparameters)
        return {name: value for name, value in ours.items() if value is not None}

    @classmethod
    def recipe(cls, setting):
        """The paper's: nothing is trained."""
        augment = setting.profile == "full"  # the mini world's features are cached
        return Recipe(epochs=0, augment=augment, crop=(0.5, 1.0))
