"""PromptSRC: deep prompts that regulate themselves against the frozen CLIP.

Self-regulating Prompts: Foundational Model Adaptation without Forgetting; Khattak et
al., ICCV 2023; arXiv 2307.06948.

Deviations: everything is float32 by default, where the paper's runs keep CLIP's weights
and the context in half precision. The epoch average covers what learns alone; the
published code averages all weights, the frozen ones too, and in half precision these
come back as themselves up to rounding only: its tested towers carry that noise, these
do not. The average's mean and width are given as fractions of the training. As in that
code, and not as in the paper's formulas, the feature terms are means over all entries.
"""

from dataclasses import replace
from functools import cached_property
from typing import Literal

import open_clip
import torch
import torch.nn.functional as F

from promptkit.errors import expect, expect_templates
from promptkit.method import register
from promptkit.methods.ivlp import IVLP
from promptkit.picture import Target
from promptkit.published import transfer, usual

# OpenAI's templates for ImageNet, those that the published code uses and in its order.
_PLAIN = "a photo of a {}."
_OPENAI = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
TEMPLATES = [_PLAIN, *(text for text in _OPENAI[:60] if text != _PLAIN)]


def templates_of(dataset) -> list[str]:
    """The 60; in the mini world, whose CLIP never read them, its own."""
    mini = dataset is not None and dataset.world == "mini"
    return list(dataset.templates) if mini else TEMPLATES


@register
class PromptSRC(IVLP):
    r"""IVLP, held near the frozen CLIP in features and predictions, its prompts
    averaged over the epochs.

    With normalised prompted features w, f and logits z, and those of the frozen CLIP
    w', f', z' (w' the mean over 60 templates),

    .. math:: L = L_{ce}(z) + \lambda_t\,\overline{|w - w'|}
       + \lambda_i\,\overline{|f - f'|} \\
       + \frac{\lambda_z}{BC} \sum_{b,c} q'_{bc} (\log q'_{bc} - \log q_{bc}),
       \qquad q = \mathrm{softmax}(z)

    The final prompts are the average over epochs e = 1 .. E, weighted by a Gaussian in
    e.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        text_weight, image_weight, logit_weight: of the three terms.
        templates: of the frozen text features. None: the 60, or those of the mini
            world's tasks.
        averaging: "gaussian", "uniform", or "last" for the last epoch alone.
        gpa_mean, gpa_std: mean and width of the Gaussian, in fractions of the epochs:
            15 and 1 of 20.
        n_ctx, n_ctx_vision, depth, depth_vision, init: the prompts, as in IVLP.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "promptsrc"
    title = "PromptSRC"
    picture = replace(
        IVLP.picture,
        text_reference=Target("frozen CLIP,\nmany templates", "L1"),
        image_reference=Target("frozen CLIP,\nno prompts", "L1"),
        targets=(*IVLP.picture.targets, Target("zero-shot CLIP", "divergence")),
        note="in the end all prompts are their weighted average over the epochs",
    )
    reads = "images+features"
    reads_at_test = "images"
    from_dataset = {"templates": templates_of}
    official_hyperparameters = IVLP.official_hyperparameters | {
        "text_loss_weight": "text_weight",
        "image_loss_weight": "image_weight",
        "logit_loss_weight": "logit_weight",
        "templates": "templates",
        "gpa_mean": "gpa_mean",
        "gpa_std": "gpa_std",
        "max_epoch": None,  # the unit of the two before, see official_hparams
    }
    published = {
        "base-to-new": usual("PromptSRC: its base-to-new runs", "The same."),
        "few-shot": usual(
            "PromptSRC: its few-shot runs",
            "The same, with its two averages by dataset.",
            shots=(1, 2, 4, 8, 16),
        ),
    } | transfer(
        usual(
            "PromptSRC: its configuration `...ep20...cross_datasets`",
            "The same. The script names a configuration of 5 epochs that does not"
            " exist, and its test loads epoch 20.",
        )
    )
    official_dropped = (
        *IVLP.official_dropped,
        "ZS_image_encoder",
    )  # a second copy of the frozen tower

    def __init__(
        self,
        clip,
        classnames,
        *,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
        templates: list[str] | None = None,
        averaging: Literal["gaussian", "uniform", "last"] = "gaussian",
        gpa_mean: float = 0.75,
        gpa_std: float = 0.05,
        n_ctx: int | None = None,
        n_ctx_vision: int | None = None,
        depth: int | None = None,
        depth_vision: int | None = None,
        init: str | None = None,
    ):
        prompts = {
            "n_ctx": n_ctx,
            "n_ctx_vision": n_ctx_vision,
            "depth": depth,
            "depth_vision": depth_vision,
        }
        super().__init__(clip, classnames, **prompts, init=init)
        weights = {
            "text_weight": text_weight,
            "image_weight": image_weight,
            "logit_weight": logit_weight,
        }
        for name, weight in weights.items():
            expect(weight >= 0, name, weight, "at least 0")
        expect(gpa_std > 0, "gpa_std", gpa_std, "above 0")
        expect_templates("templates", self.option("templates"))
        self.weights = tuple(weights.values())
        self.averaging, self.gpa_mean, self.gpa_std = averaging, gpa_mean, gpa_std

    @cached_property
    def anchor(self):
        """w', (C, E), normalised: the mean of the templates' raw features, computed
        when training first asks.
        """
        templates = self.option("templates")
        texts = [
            template.replace("{}", name)
            for template in templates
            for name in self.classnames
        ]
        features = self.clip.encode_text(texts).view(
            len(templates), len(self.classnames), -1
        )  # (K, C, E)
        return F.normalize(features.mean(0), dim=-1)

    def terms(self, batch, image, text):
        """The three weighted regularisers, each (), of prompted features (B, E) and (C,
        E).
        """
        with torch.no_grad():
            frozen = (
                self.clip.encode_image(batch.images)
                if batch.features is None
                else batch.features
            )  # (B, E)
            target = self.score(frozen, self.anchor).log_softmax(dim=-1)  # (B, C)
        by_text, by_image, by_logits = self.weights
        logits = self.score(image, text).log_softmax(dim=-1)
        return (
            by_text * (F.normalize(text, dim=-1) - self.anchor).abs().mean(),
            by_image
            * (F.normalize(image, dim=-1) - F.normalize(frozen, dim=-1)).abs().mean(),
            by_logits
            * F.kl_div(logits, target, reduction="sum", log_target=True)
            / logits.numel(),
        )

    def regularizer(self, batch, image, text):
        return sum(self.terms(batch, image, text)) if any(self.weights) else 0.0

    def epoch_weights(self, epochs):
        """The weight of each epoch in the average, (epochs,), summing to 1."""
        if self.averaging == "last":
            return F.one_hot(torch.tensor(epochs - 1), epochs).double()
        if self.averaging == "uniform":
            return torch.full((epochs,), 1 / epochs, dtype=torch.float64)
        e = torch.arange(1, epochs + 1, dtype=torch.float64)
        return (
            -((e - self.gpa_mean * epochs) ** 2) / (2 * (self.gpa_std * epochs) ** 2)
        ).softmax(dim=0)

    @torch.no_grad()
    def end_epoch(self, epoch, recipe, outer=None):
        """Add this epoch's parameters to the average; after the last epoch the average
        takes their place. What is tested together is averaged together: a plug-in's
        parameters too.
        """
        weight = self.epoch_weights(recipe.epochs)[epoch].item()
        for name, p in (outer or self).named_parameters():
            before = self.training_state.get(name, 0.0) if epoch else 0.0
            self.training_state[name] = before + weight * p.detach()
            if epoch == recipe.epochs - 1:
                p.copy_(self.training_state[name])

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for IVLP; the average's mean and width become fractions of max_epoch, 20
        where it is not given. Options that describe a plain loss, and weigh no
        regulariser, are IVLP's: it has none, and tests the last epoch.
        """
        ours = super().official_hparams(hyperparameters)
        for name in ("gpa_mean", "gpa_std"):
            if name in ours:
                ours[name] = ours[name] / hyperparameters.get("max_epoch", 20)
        weights = ("text_weight", "image_weight", "logit_weight")
        if "loss" in hyperparameters and not set(weights) & set(ours):
            ours |= dict.fromkeys(weights, 0.0) | {"averaging": "last"}
        return ours

    @classmethod
    def recipe(cls, setting):
        """The paper's, with the average of each protocol."""
        base = super().recipe(setting)
        if setting.protocol in ("cross-dataset", "domain-generalization"):
            average = (6 / 20, 10 / 20)
        elif setting.protocol == "few-shot":
            broad = (
                "imagenet",
                "caltech101",
                "oxford_pets",
                "food101",
                "ucf101",
                "sun397",
            )
            average = (
                (30 / 50, 30 / 50) if setting.dataset in broad else (45 / 50, 5 / 50)
            )
        else:
            average = (15 / 20, 1 / 20)
        return replace(
            base, hparams=base.hparams | {"gpa_mean": average[0], "gpa_std": average[1]}
        )
