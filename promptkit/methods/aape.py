"""AAPE: sentences about a class are condensed for each image, and a small network
learns to supply what they say from the image alone.

Aggregate-and-Adapt Natural Language Prompts for Downstream Generalization of CLIP;
Huang et al., NeurIPS 2024; arXiv 2410.23698.

This is a reconstruction. The authors' code is not public, and the paper's own equations
and hyperparameters were not at hand: from it are the parts, what each of them reads, is
taught by and is left of it at test time, and that the tasks are classification and
retrieval among others. The layers, their sizes and initial values, the exact losses,
their weights and the whole recipe are ours, so its numbers are not the paper's.
"""

from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from promptkit.clip import zero_shot_features
from promptkit.descriptions import (
    nothing_said,
    said_of,
    sentence_features,
    sentences_of,
)
from promptkit.errors import expect, expect_templates
from promptkit.method import Method, register
from promptkit.methods.clip import CLIP
from promptkit.picture import Bridge, Picture, learned
from promptkit.published import Published, everywhere
from promptkit.recipe import Recipe


class Aggregator(nn.Module):
    """Multi-head attention of an image over sentences, without order: the summary.

    Args:
        d: the width of features.
        heads: H; each reads d / H coordinates.
    """

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = (nn.Parameter(torch.randn(d, d) / d**0.5) for _ in range(2))
        self.v, self.out = (nn.Parameter(torch.eye(d)) for _ in range(2))

    def forward(self, image: Tensor, sentences: Tensor, there: Tensor):
        """Summaries (B, d), normalised, and attention (B, H, M).

        Args:
            image: (B, d), normalised.
            sentences: (B, M, d), normalised, padded to M.
            there: (B, M), which of them are sentences and no padding.
        """
        B, M, d = sentences.shape
        q = (image @ self.q.T).view(B, self.heads, -1)
        k = (sentences @ self.k.T).view(B, M, self.heads, -1)
        v = (sentences @ self.v.T).view(B, M, self.heads, -1)
        scores = torch.einsum("bhd,bmhd->bhm", q, k) / (d / self.heads) ** 0.5
        attention = scores.masked_fill(~there[:, None], -torch.inf).softmax(dim=-1)
        summary = torch.einsum("bhm,bmhd->bhd", attention, v).flatten(1) @ self.out.T
        return F.normalize(summary, dim=-1), attention


class Generator(nn.Module):
    """The network that sees the image alone, (B, d) -> (B, d), normalised: the AAPE."""

    def __init__(self, d: int, hidden: int):
        super().__init__()
        first, second = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.w1, self.b1 = first.weight, first.bias
        self.w2, self.b2 = second.weight, second.bias

    def forward(self, image: Tensor) -> Tensor:
        h = F.linear(image, self.w1, self.b1).relu()
        return F.normalize(F.linear(h, self.w2, self.b2), dim=-1)


@register
class AAPE(Method):
    r"""Class weights from an image's own prompt embedding p and the classes' templates
    t.

    .. math:: w_{bc} = W\,[\,p_b;\,\hat t_c\,], \qquad
       z_{bc} = s \cos(f_b, w_{bc}), \\
       L = L_{ce} + \lambda \overline{\lVert p_b - \mathrm{sg}(s_b) \rVert^2}
       + \mu\,\overline{(1 - \hat f_b^\top s_b)}

    In training an attention module, the aggregator, makes the summary s_b of the
    sentences about an image's class, taught by CLIP's reward alone; p_b, made from the
    image, learns to lie at it. Then sentences and aggregator are gone, and new classes
    need none. Before training it is zero-shot CLIP.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        descriptions: ``{class: [sentence, ...]}``, read in training alone. None: those
            of the dataset it is aimed at.
        sentences: of each class, at most so many.
        template: of t, or several for their mean. None: that of the dataset it is aimed
            at, "a photo of a {}." before.
        heads: of the aggregator.
        hidden: width of the generator; None: that of the features.
        distill, reward: λ and μ.
        aggregate: what condenses the sentences: "attention"; their "mean"; one of them,
            "random".

    Attributes:
        aggregator: None after training, and where none is needed.

    Raises:
        InputError: a hyperparameter or a class name does not fit.
    """

    name = "aape"
    title = "AAPE"
    year = 2024
    paper = "2410.23698"
    kind = "adapter"
    supervision = "shots+texts"
    picture = Picture(
        text_out=learned("$W$"),
        bridges=(Bridge(learned("generator of $p$"), "image feature", "text out"),),
        note="in training a learned aggregator of sentences teaches the generator",
    )
    from_dataset = {"descriptions": sentences_of} | CLIP.from_dataset
    official_hyperparameters = {
        "heads": "heads",
        "generator_hidden": "hidden",
        "lambda_distill": "distill",
        "mu_reward": "reward",
        "d": None,  # the backbone's
        "logit_scale": None,
        "prompts_per_class": None,  # described: as many as there are
        "captions_per_image": None,
    }
    published = everywhere(
        Published(
            (),
            (),
            "none: a reconstruction",
            "The usual 16 shots and 50 epochs, of ImageNet 10; ours, not the paper's.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        descriptions: dict | None = None,
        sentences: int = 20,
        template: str | list[str] | None = None,
        heads: int = 8,
        hidden: int | None = None,
        distill: float = 1.0,
        reward: float = 1.0,
        aggregate: Literal["attention", "mean", "random"] = "attention",
    ):
        super().__init__(clip, classnames)
        d = clip.embed_dim
        for name, value, least in (
            ("sentences", sentences, 1), ("heads", heads, 1),
            ("distill", distill, 0), ("reward", reward, 0),
        ):  # fmt: skip
            expect(value >= least, name, value, f"at least {least}")
        expect(d % heads == 0, "heads", heads, f"a divisor of the {d} of a feature")
        expect(hidden is None or hidden >= 1, "hidden", hidden, "at least 1")
        expect_templates("template", template)
        self.sentences, self.heads, self.aggregate = sentences, heads, aggregate
        self.distill, self.reward = distill, reward
        self.generator = Generator(d, hidden or d)
        self.fusion = nn.Linear(2 * d, d, bias=False)  # W
        with torch.no_grad():  # [0 | I]: the template alone
            self.fusion.weight.copy_(torch.eye(d, 2 * d).roll(d, dims=1))
        self.aggregator = Aggregator(d, heads) if aggregate == "attention" else None

    # --- training alone: the summary --------------------------------------------------

    @cached_property
    def references(self) -> tuple[Tensor, Tensor]:
        """Features (C, M, E) of the sentences about each class, normalised and padded
        to the longest list, and which of them are none, (C, M).
        """
        said = said_of(self.option("descriptions"), self.classnames)
        lists = [list(texts or [])[: self.sentences] for texts in said]
        silent = [n for n, x in zip(self.classnames, lists, strict=True) if not x]
        if silent:
            raise nothing_said(self.spec, silent)
        features = sentence_features(self.clip, [text for x in lists for text in x])
        each = features.split([len(x) for x in lists])
        padded = nn.utils.rnn.pad_sequence(list(each), batch_first=True)
        counts = torch.tensor([len(x) for x in lists], device=features.device)
        return padded, torch.arange(padded.shape[1]).to(counts) < counts[:, None]

    def summary(self, image: Tensor, sentences: Tensor, there: Tensor, generator=None):
        """s, (B, E), normalised, of images (B, E) and their sentences (B, M, E) of
        which some are there (B, M).
        """
        if self.aggregate == "attention":
            return self.aggregator(image, sentences, there)[0]
        if self.aggregate == "mean":
            return F.normalize((sentences * there[..., None]).sum(dim=1), dim=-1)
        chance = torch.rand(there.shape, generator=generator).to(there.device)
        chosen = chance.masked_fill(~there, -1).argmax(dim=1)
        return sentences[torch.arange(len(image)), chosen]

    def terms(self, image: Tensor, sentences: Tensor, there: Tensor, generator=None):
        """Distillation and reward, each (), before they are weighted; arguments as for
        :meth:`summary`. The summary is no subject of the distillation.
        """
        s, p = self.summary(image, sentences, there, generator), self.generator(image)
        distill = (p - s.detach()).square().sum(dim=-1).mean()
        return distill, (1 - (image * s).sum(dim=-1)).mean()

    def prepare(self, dataset, recipe, generator, stage):
        """Whoever trains it again needs the aggregator again; sentences are looked up
        at once.
        """
        if self.aggregate == "attention" and self.aggregator is None:
            self.aggregator = Aggregator(self.clip.embed_dim, self.heads)
            self.aggregator.to(self.clip.device)
        _ = self.references
        return dataset

    def regularizer(self, batch, image, text):
        sentences, there = (x[batch.labels] for x in self.references)
        image = F.normalize(image.float(), dim=-1)
        distill, reward = self.terms(image, sentences, there, batch.generator)
        return self.distill * distill + self.reward * reward

    def finish(self, dataset, recipe, generator):
        """What made the summaries is gone."""
        self.aggregator = None
        vars(self).pop("references", None)

    def load_state_dict(self, state, *args, **options):
        """As for any module; what was saved after training holds no aggregator."""
        if not any(name.startswith("aggregator.") for name in state):
            self.aggregator = None
        return super().load_state_dict(state, *args, **options)

    # --- classification ---------------------------------------------------------------

    def text_features(self, image_features=None):
        """The templates' part of the class weights, W_t t, (C, E)."""
        t = zero_shot_features(self.clip, self.classnames, self.option("template"))
        return self.project(t)

    def project(self, templates: Tensor) -> Tensor:
        """W_t t of template features (C, E), normalised."""
        return F.linear(templates, self.fusion.weight[:, templates.shape[-1] :])

    def score(self, image, text):
        """Logits (B, C) without ever holding the (B, C, E) class weights."""
        f = F.normalize(image.float(), dim=-1)
        u = F.linear(self.generator(f), self.fusion.weight[:, : f.shape[-1]])  # W_g p
        dot = (f * u).sum(dim=-1, keepdim=True) + f @ text.T  # f . w
        square = u.square().sum(-1, keepdim=True) + 2 * u @ text.T
        square = square + text.square().sum(dim=-1)  # |w|²
        return self.clip.logit_scale * dot / square.clamp(min=1e-12).sqrt()

    # --- image-text retrieval ---------------------------------------------------------

    def fused(self, image: Tensor) -> Tensor:
        """What stands for images (B, E) among captions: W [p; f], normalised."""
        f = F.normalize(image.float(), dim=-1)
        both = torch.cat([self.generator(f), f], dim=-1)  # (B, 2E)
        return F.normalize(self.fusion(both), dim=-1)

    def retrieval_loss(
        self, image: Tensor, captions: Tensor, positive: Tensor
    ) -> dict[str, Tensor]:
        """The loss of captioned images and its parts, "task", "distill" and "reward",
        each ().

        Args:
            image: (B, E).
            captions: (B, M, E), features of those of each image, which take the place
                of the sentences about a class.
            positive: (B,), which of its captions each image is compared with.
        """
        f, captions = (F.normalize(x.float(), dim=-1) for x in (image, captions))
        chosen = captions[torch.arange(len(f)), positive]
        similarity = self.clip.logit_scale * self.fused(f) @ chosen.T  # (B, B)
        own = torch.arange(len(f), device=f.device)
        task = sum(F.cross_entropy(z, own) for z in (similarity, similarity.T)) / 2
        there = torch.ones(captions.shape[:2], dtype=torch.bool, device=f.device)
        distill, reward = self.terms(f, captions, there)
        loss = task + self.distill * distill + self.reward * reward
        return {"loss": loss, "task": task, "distill": distill, "reward": reward}

    def official_names(self):
        """There is no official code; these are the names of the equations."""
        names = [f"generator.{part}" for part in ("w1", "b1", "w2", "b2")]
        if self.aggregator is not None:
            names += [f"aggregator.{part}" for part in ("q", "k", "v", "out")]
        return {name: name for name in names} | {"fusion.w": "fusion.weight"}

    @classmethod
    def recipe(cls, setting):
        """Ours."""
        return Recipe(epochs=10 if setting.dataset == "imagenet" else 50)
