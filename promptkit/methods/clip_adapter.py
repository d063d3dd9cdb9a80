"""CLIP-Adapter: a small residual network on the frozen features.

CLIP-Adapter: Better Vision-Language Models with Feature Adapters; Gao et al., IJCV
2024; arXiv 2110.04544.

Deviations: as in the published code, and not as in the paper's formula, a ReLU follows
the second layer too (``last_relu``). The published code is that of the image adapter
alone, without the settings of its runs: the text adapter has the same form,
the few-shot recipe has the paper's rate and CoOp's momentum and weight decay, and the
other protocols, which the paper has not, are run as the APEX paper did (arXiv
2311.15569).
"""

from functools import cached_property
from typing import Literal

from torch import nn

from promptkit.clip import zero_shot_features
from promptkit.data.benchmark import TABLE
from promptkit.errors import InputError, expect, expect_templates
from promptkit.method import Method, register
from promptkit.picture import Picture, learned
from promptkit.published import Published, dataset_of, transfer, usual
from promptkit.recipe import Recipe

PLAIN = "a photo of a {}."


class Bottleneck(nn.Module):
    r"""A(x) = ReLU(ReLU(x W_1) W_2), (..., E) -> (..., E), of width E / reduction."""

    def __init__(self, width: int, reduction: int, last_relu: bool):
        super().__init__()
        self.down = nn.Linear(width, width // reduction, bias=False)
        self.up = nn.Linear(width // reduction, width, bias=False)
        self.last_relu = last_relu

    def forward(self, x):
        x = self.up(self.down(x).relu())
        return x.relu() if self.last_relu else x


@register
class CLIPAdapter(Method):
    r"""Frozen image features f, blended with what a bottleneck makes of them.

    .. math:: f^\star = \alpha\,A_v(f) + (1 - \alpha)\,f, \qquad
       w^\star = \beta\,A_t(w) + (1 - \beta)\,w, \\
       A(x) = \mathrm{ReLU}(\mathrm{ReLU}(x W_1) W_2)

    Features are blended before they are normalised. w are those of hand-written
    prompts. By default the image side alone has an adapter, w* = w; no gradient passes
    through a tower.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        ratio: alpha, the share of the adapted image features; 0 is zero-shot CLIP.
        text_ratio: beta, likewise of the class features; None: ``ratio``.
        adapter: the side that has one, or "both".
        reduction: E over the width of the bottleneck.
        last_relu: the ReLU after W_2; False is the paper's formula.
        template: of the hand-written prompts, with "{}" for the class name, or several
            for an ensemble. None: that of the dataset it is aimed at, "a photo of a
            {}." before.

    Raises:
        InputError: a hyperparameter does not fit.
    """

    name = "clip_adapter"
    title = "CLIP-Adapter"
    year = 2021
    paper = "2110.04544"
    kind = "adapter"
    picture = Picture(image_out=learned("adapter, mixed with its input"))
    from_dataset = {"template": lambda dataset: dataset.template if dataset else PLAIN}
    official_hyperparameters = {
        "ratio": "ratio",
        "reduction": "reduction",
        "template": "template",
        "feature_dim": None,  # the backbone's, see from_official
        "dataset": None,  # stands for its template, see official_hparams
        "DATASET": None,
    }
    published = {
        "few-shot": Published(
            ("RN50", "RN101", "ViT-B-32", "ViT-B-16"),
            (1, 2, 4, 8, 16),
            "CLIP-Adapter: its paper, and Tip-Adapter's on its runs",
            "200 epochs, told of ImageNet, by SGD at the paper's rate, 0.00001, one"
            " template a dataset; momentum and weight decay, which are not told, are"
            " CoOp's. Share 0.2, the published code's; the paper's best is up to 0.8 on"
            " some datasets.",
        ),
        "base-to-new": usual(
            "CLIP-Adapter: as run in the APEX paper",
            "Adadelta at 0.25, 50 epochs, 20 seeds; batches of 16, decay and warm-up"
            " are APEX's own. Its released configuration has SGD.",
        ),
    } | transfer(
        usual(
            "CLIP-Adapter: as run in the APEX paper",
            "The settings of base-to-new: those of its transfer runs are not told.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        ratio: float = 0.2,
        text_ratio: float | None = None,
        adapter: Literal["image", "text", "both"] = "image",
        reduction: int = 4,
        last_relu: bool = True,
        template: str | list[str] | None = None,
    ):
        super().__init__(clip, classnames)
        expect(0 <= ratio <= 1, "ratio", ratio, "from 0 to 1")
        text_ratio = ratio if text_ratio is None else text_ratio
        expect(0 <= text_ratio <= 1, "text_ratio", text_ratio, "from 0 to 1")
        E = clip.embed_dim
        expect(1 <= reduction <= E, "reduction", reduction, f"from 1 to {E}")
        expect_templates("template", template)
        self.ratio, self.text_ratio = ratio, text_ratio
        self.image_adapter, self.text_adapter = (
            Bottleneck(E, reduction, last_relu) if adapter in (side, "both") else None
            for side in ("image", "text")
        )

    @cached_property
    def frozen_text(self):
        """w, (C, E): not normalised of one template, of length 1 of an ensemble."""
        template = self.option("template")
        templates = [template] if isinstance(template, str) else template
        if len(templates) > 1:
            return zero_shot_features(self.clip, self.classnames, templates)
        texts = [templates[0].replace("{}", name) for name in self.classnames]
        return self.clip.encode_text(texts)

    def text_features(self, image_features=None):
        text = self.frozen_text
        if self.text_adapter is None:
            return text
        return self.text_ratio * self.text_adapter(text) + (1 - self.text_ratio) * text

    def adapt(self, features):
        if self.image_adapter is None:
            return features
        return self.ratio * self.image_adapter(features) + (1 - self.ratio) * features

    def official_names(self):
        if self.image_adapter is None:
            return {}
        return {
            "adapter.fc.0.weight": "image_adapter.down.weight",
            "adapter.fc.2.weight": "image_adapter.up.weight",
        }

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; a dataset stands for its template."""
        ours = super().official_hparams(hyperparameters)
        ours = {name: value for name, value in ours.items() if value is not None}
        dataset = hyperparameters.get("DATASET", hyperparameters.get("dataset"))
        if dataset and "template" not in ours:
            ours["template"] = TABLE[dataset_of(dataset)].template
        return ours

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, **objects):
        """As for any method; the published code names the width of the features.

        Raises:
            InputError: it is not this backbone's.
        """
        width = hyperparameters.get("feature_dim") or clip.embed_dim
        if width != clip.embed_dim:
            raise InputError(
                f"feature_dim is {width}, and the features of {clip.name!r} have"
                f" {clip.embed_dim} channels: leave it out"
            )
        return super().from_official(clip, classnames, hyperparameters, **objects)

    @classmethod
    def recipe(cls, setting):
        """The paper's few-shot runs; the other protocols as the APEX paper ran them."""
        if setting.protocol == "few-shot":
            return Recipe(epochs=200, batch_size=32, lr=1e-5, warmup_epochs=0)
        return Recipe(
            epochs=50,
            batch_size=16,
            optimizer="adadelta",
            lr=0.25,
            weight_decay=1e-3,
            warmup_lr=0.01,
        )
