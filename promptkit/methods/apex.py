"""APEX: a linear map behind the text tower, prompts in the image tower, and both mixed
with what was before them by how far a class is from those that were trained.

Towards Difficulty-Agnostic Efficient Transfer Learning for Vision-Language Models; Yang
et al., EMNLP 2024, pages 2066-2085; arXiv 2311.15569.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights and the context in half precision. The features that are mixed in are those of
the frozen CLIP, as the paper says; in the published code its image tower carries random
prompts, which nothing trains. As in that code, and not as printed in the paper, the
adapted image feature has the weight alpha, and the distance to the nearest class is 1
minus the largest cosine. The transfer runs train on images at the test transform; the
published ones squash them. These follow the released configuration (rate 0.02, batches
of 32, 6 epochs); the paper's text has 0.15, batches of 16 and 15 epochs, 5 on ImageNet,
with crops and flips.
"""

from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.methods.ivlp import IVLP
from promptkit.picture import Picture, learned
from promptkit.prompts import Context
from promptkit.published import transfer, usual
from promptkit.recipe import Recipe


@register
class APEX(IVLP):
    r"""Prompts in both towers, and a linear map of the text features, trained by the
    cross-entropy alone; at test time an ensemble, by the classes.

    With features w~ of the prompted text tower, z of the prompted image tower and z' of
    the frozen one, and cosines S of the frozen class features, of the trained classes i
    and a class c,

    .. math:: w_c = \alpha_c\,(\tilde w_c A + b) + (1 - \alpha_c)\,\tilde w_c, \qquad
       f = \bar\alpha\,z + (1 - \bar\alpha)\,z'

    .. math:: \alpha_c = \exp\bigl(-\beta\,d_c\,[\,n_c > \epsilon\,]\bigr), \qquad
       d_c = 1 - \operatorname{mean}_i S_{ic}, \qquad n_c = 1 - \max_i S_{ic}

    A trained class, or one nearer to one than epsilon, has alpha 1, and A alone
    answers: where all have, the ensemble is the trained model. The mean of alpha runs
    over the classes that it is aimed at. In training alpha is 1.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx, n_ctx_vision: tokens a block that learn, in the text tower the first
            of the template.
        depth: blocks of the text tower with prompts.
        depth_vision: of the image tower; None: as many as the tower with fewer has, 12;
            0: none.
        template: the prompt, and the sentence that distances are measured by.
        beta: how fast alpha falls with the distance.
        threshold: epsilon.
        ensemble: the sides that are mixed.
        alpha: of every class, in place of the formula (the paper's ablation).

    Raises:
        InputError: a hyperparameter does not fit, or the whole is too long for the text
            tower.
    """

    name = "apex"
    title = "APEX"
    year = 2023
    paper = "2311.15569"
    kind = "prompt and adapter"
    reads_at_test = "images+features"
    at_test = ("beta", "threshold", "ensemble", "alpha")
    picture = Picture(
        text=("SOS", learned("$v_1$ $v_2$"), "of a", "[class]", ".", "EOT"),
        image=("CLS", "patches of the image", learned("$q_0$")),
        blocks=("1", "2 … L"),
        image_blocks={1: learned("$q_i$")},
        text_out=learned("linear map $A$, $b$"),
        note="far from the trained classes, both are mixed with less adapted features",
    )
    official_hyperparameters = {
        "n_ctx_vision": "n_ctx_vision",
        "n_ctx_text": "n_ctx",
        "depth_vision": "depth_vision",
        "depth_text": "depth",
        "prompt_depth_vision": "depth_vision",
        "prompt_depth_text": "depth",
        "ctx_init": "template",
        "beta": "beta",
        "threshold": "threshold",
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        "base-to-new": usual(
            "APEX: its base-to-new runs",
            "Adadelta at 0.15, 15 epochs; of ImageNet 5, as the paper and a"
            " configuration say, where the released script runs 15. 20 seeds.",
        ),
        "few-shot": usual(
            "APEX: its base-to-new runs",
            "The settings of base-to-new.",
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "APEX: its cross-dataset configuration",
            "Depth 3, Adadelta at 0.02, 6 epochs, batches of 32, no augmentation.",
        )
    )
    official_dropped = (
        *IVLP.official_dropped,
        "trained_tokenized_prompts",  # follow from the class names
        "clip_model_temp",  # a second copy of the frozen CLIP
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int = 2,
        n_ctx_vision: int = 2,
        depth: int = 1,
        depth_vision: int | None = None,
        template: str = "a photo of a {}.",
        beta: float = 4.0,
        threshold: float = 0.05,
        ensemble: Literal["both", "text", "image", "none"] = "both",
        alpha: float | None = None,
    ):
        if depth_vision is None:
            blocks = (clip.text_tower.blocks, clip.image_tower.blocks)
            depth_vision = min(map(len, blocks))
        expect(depth >= 1, "depth", depth, "at least 1")
        expect(n_ctx >= 1, "n_ctx", n_ctx, "at least 1")
        super().__init__(
            clip,
            classnames,
            n_ctx=n_ctx,
            n_ctx_vision=n_ctx_vision if depth_vision else None,
            depth=depth,
            depth_vision=depth_vision,
            init="",
        )
        fine = template.count("{}") == 1
        expect(fine, "template", template, "one sentence with {} for the class name")
        before, hole, after = template.partition("{}")
        words, _, glued = before.rpartition(" ")
        tokens = len(clip.encode(words))
        expect(
            n_ctx <= tokens,
            "n_ctx",
            n_ctx,
            f"at most the {tokens} tokens of {template!r} before the class name, which"
            " they replace",
        )
        self.context = Context(
            clip,
            self.classnames,
            n_ctx,
            words=words,
            ending=glued + hole + after,
            overwrite=True,
        )
        expect(beta >= 0, "beta", beta, "at least 0")
        expect(threshold >= 0, "threshold", threshold, "at least 0")
        fine = alpha is None or 0 <= alpha <= 1
        expect(fine, "alpha", alpha, "from 0 to 1, or None")
        self.template, self.beta, self.threshold = template, beta, threshold
        self.fixed, self.ensemble = alpha, ensemble
        self.matrix = nn.Parameter(torch.eye(clip.embed_dim))
        self.bias = nn.Parameter(torch.zeros(1, clip.embed_dim))

    @cached_property
    def distances(self):
        """d and n, each (C,), of the classes from the trained ones."""

        def frozen(names):
            texts = [self.template.replace("{}", name) for name in names]
            return F.normalize(self.clip.encode_text(texts), dim=-1)

        similarity = frozen(self.trained_on) @ frozen(self.classnames).T
        return 1 - similarity.mean(0), (1 - similarity.amax(0)).clamp(min=0)

    @cached_property
    def mixing(self):
        """alpha, (C,), how much of what was trained each class takes, and its mean."""
        average, nearest = self.distances
        alpha = (-self.beta * average * (nearest > self.threshold)).exp()
        if self.fixed is not None:
            alpha = torch.full_like(alpha, self.fixed)
        return alpha, alpha.mean().item()

    def text_features(self, image_features=None):
        prompted = super().text_features()  # w~, (C, E)
        adapted = prompted @ self.matrix + self.bias
        alpha = 1.0 if self.training else self.mixing[0][:, None]
        if self.ensemble not in ("both", "text"):
            return adapted
        return alpha * adapted + (1 - alpha) * prompted

    def encode(self, batch):
        image = super().encode(batch)  # z, (B, E)
        share = 1.0 if self.training else self.mixing[1]
        if share == 1 or self.ensemble not in ("both", "image"):
            return image
        frozen = batch.features
        if frozen is None:
            frozen = self.clip.encode_image(batch.images)
        return share * image + (1 - share) * frozen

    def official_names(self):
        return super().official_names() | {
            "VPT_adapter_text_matrix": "matrix",
            "VPT_adapter_text_bias": "bias",
        }

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; "#" stands for the class name in the published code.

        Raises:
            InputError: an initial text lacks it: the published code then writes prompts
                without class names.
        """
        ours = Method.official_hparams.__func__(cls, hyperparameters)
        if "template" in ours:
            text = ours["template"] or ""
            if "#" not in text:
                raise InputError(
                    f"ctx_init={text!r} has no '#' where the class name would stand,"
                    " and the published code then writes prompts without it: put one in"
                )
            ours["template"] = text.replace("_", " ").replace("#", "{}")
        return {name: value for name, value in ours.items() if value is not None}

    @classmethod
    def recipe(cls, setting):
        """The paper's; few-shot runs, which it has not, take the settings of
        base-to-new.
        """
        options = {"optimizer": "adadelta", "weight_decay": 1e-3}
        if setting.transfer:
            return Recipe(
                hparams={"depth_vision": 3},
                epochs=6,
                lr=0.02,
                warmup_lr=0.001,
                augment=False,
                **options,
            )
        epochs = 5 if setting.dataset == "imagenet" else 15
        return Recipe(epochs=epochs, batch_size=16, lr=0.15, warmup_lr=0.01, **options)


def transfer_difficulty(labels, predicted, classes: int) -> float:
    r"""Relative transfer difficulty of a dataset, the paper's measure of how much worse
    than elsewhere a frozen CLIP does on it.

    .. math:: \mathrm{RTD} = \frac{1/C}{\text{precision of zero-shot CLIP}}

    1 / C is the precision of guessing; precision is the mean over the classes, 0 for
    one that is never predicted.

    Args:
        labels, predicted: (N,), such as of :func:`promptkit.train.predictions`.
        classes: C.
    """
    from sklearn.metrics import precision_score  # slow to import

    names = list(range(classes))
    precision = precision_score(
        labels, predicted, labels=names, average="macro", zero_division=0
    )
    return 1 / (classes * precision) if precision else float("inf")
