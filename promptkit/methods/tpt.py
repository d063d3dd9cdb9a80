"""TPT: tune the prompt for one test image, without labels.

Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models; Shu et
al., NeurIPS 2022; arXiv 2209.07511.

Alone it starts from "a photo of a"; over a host, ``tpt(coop)`` or ``tpt(cocoop)``, from
the context that the host has learned.

Deviations: everything is float32 by default, where the published code runs float32
weights under autocast; the 64 views are encoded once, where that code encodes them at
every step; several images are adapted together, each with its own context and optimizer
state; at least one view is kept. As in that code, CoCoOp's Meta-Net reads the image
feature without normalisation here; int(V rho) views are kept, where the paper has a
percentile; and crops of ImageNet and its shifts are flipped too, which the paper does
not say.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkit.errors import InputError, expect, unknown
from promptkit.method import Method, register
from promptkit.methods.cocoop import CoCoOp
from promptkit.methods.coop import CoOp
from promptkit.picture import Bridge, Picture, Target
from promptkit.plugin import Plugin
from promptkit.published import usual
from promptkit.recipe import Recipe
from promptkit.views import drawn_views, views_of


def mixes(dataset) -> bool:
    """AugMix, but on ImageNet and its shifts, and on what takes their place."""
    if dataset is None:
        return False
    return not dataset.shifts and dataset.source_rows is None


@dataclass
class Adapted:
    """What became of B images with V views, k of them confident, and C classes."""

    logits: Tensor  # (B, C), of the image itself with the adapted context
    view_logits: Tensor  # (B, V, C), before the first step
    entropy: Tensor  # (B, V), in nats
    selected: Tensor  # (B, k), ascending in entropy
    losses: Tensor  # (steps, B), each before its step
    start: Tensor  # (B, 1 or C, M, D), the context before
    vectors: Tensor  # (B, 1 or C, M, D), and after
    gradient: Tensor  # (B, 1 or C, M, D), of the first step


@register
class TPT(Plugin):
    r"""For each image, one step on the context that makes the mean prediction of its
    confident views confident.

    Of V views, the image itself and random crops of it, the share rho with the lowest
    entropy is kept; the context v moves against the entropy of their mean prediction,

    .. math:: \bar p_c = \frac1k \sum_{i \in S} p(y = c \mid x_i, v), \qquad
       L(v) = -\sum_c \bar p_c \log \bar p_c,

    the image is classified with the new context, and the next image starts afresh.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        host: where the context comes from: CoOp, a method that extends it, or CoCoOp.
            None: "a photo of a".
        views: V, the image itself included.
        selection: rho, the share of views that is kept; at least one is.
        steps: of AdamW; the views are selected before the first.
        step_size, decay: learning rate and weight decay of AdamW.
        augmix: whether views are mixed with distorted ones. None: on every dataset but
            ImageNet and its shifts (in the mini world: the main set and its shifts),
            where they are crops and flips.
        severity: of AugMix's distortions, from 0.1 to 10.

    Raises:
        InputError: a hyperparameter does not fit, or the host has no context to tune.
    """

    name = "tpt"
    title = "TPT"
    year = 2022
    paper = "2209.07511"
    kind = "test-time"
    picture = Picture(
        bridges=(Bridge("one step\nper image", "score", "text tokens"),),
        targets=(Target("mean over the confident views", "entropy"),),
        note="the next test image starts afresh",
        images="64 views of one test image",
        several=("image",),
    )
    reads_at_test = "views"
    replaces = (
        "score", "adapt", "text_features", "text_edit", "image_features",
        "image_prompt", "image_edit",
    )  # fmt: skip
    from_dataset = {"augmix": mixes}
    hosts = ("coop", "cocoop")
    default_host = (CoOp, {"init": "a photo of a"})
    official_hyperparameters = {
        "selection_p": "selection",
        "tta_steps": "steps",
        "n_views": "views",
        "augmix": "augmix",
        "severity": "severity",
        "n_selected": None,  # follows from views and selection
        "ctx_init": None,  # these five make the host, see from_official
        "n_ctx": None,
        "class_token_position": None,
        "split_idx": None,
        "prompt_prefix": None,
        "learned_cls": None,  # of another task; refused if it is true
    }
    published = {
        protocol: usual(
            "TPT: its scripts",
            note + " The scripts' default is RN50 and their seed 0. Over CoOp they want"
            " a context of 4 vectors.",
            backbones=("RN50", "ViT-B-16"),
            extrapolation=not note.startswith("ImageNet"),
        )
        for protocol, note in {
            "cross-dataset": "ImageNet's host, or the words alone.",
            "domain-generalization": "ImageNet's host, or the words alone.",
            "few-shot": "The host learns on the dataset itself.",
            "base-to-new": "The host learns on the base classes.",
        }.items()
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        host: Method | None = None,
        views: int = 64,
        selection: float = 0.1,
        steps: int = 1,
        step_size: float = 5e-3,
        decay: float = 1e-2,
        augmix: bool | None = None,
        severity: float = 1.0,
    ):
        if getattr(host, "context", None) is None:
            raise InputError(
                "TPT tunes a context: its host must be CoOp, CoCoOp or KgCoOp, say,"
                f" not {host.spec}"
            )
        super().__init__(clip, classnames, host=host)
        expect(views >= 1, "views", views, "at least 1")
        expect(0 < selection <= 1, "selection", selection, "above 0 and at most 1")
        expect(steps >= 0, "steps", steps, "at least 0")
        expect(step_size >= 0, "step_size", step_size, "at least 0")
        expect(decay >= 0, "decay", decay, "at least 0")
        expect(0.1 <= severity <= 10, "severity", severity, "from 0.1 to 10")
        acts = augmix is not False or severity == 1
        expected = "left out where augmix=False distorts nothing"
        expect(acts, "severity", severity, expected)
        self.n_views, self.selection, self.steps = views, selection, steps
        self.step_size, self.decay, self.severity = step_size, decay, severity

    def views(self, images, generator):
        """(B, V, 3, S, S), normalised, of B images (3, H, W) uint8, the centre crop
        first.
        """
        how = self.n_views, self.option("augmix"), generator, self.severity
        return drawn_views(self.clip, images, *how)

    def forward(self, batch):
        if self.training:
            return self.host(batch)
        views = views_of(self, batch).to(self.clip.device)
        features = self.clip.encode_image(views.flatten(0, 1))  # (B * V, E)
        return self.tune(features.unflatten(0, views.shape[:2])).logits

    def start(self, image):
        """The context (B, 1 or C, M, D) that images with features (B, E) start from."""
        host = self.host
        options = {"normalize": False} if host.conditional else {}
        vectors = host.vectors(image, **options)  # (M, D), (C, M, D) or (B, 1, M, D)
        vectors = vectors if vectors.dim() > 2 else vectors[None]
        return vectors.expand(len(image), -1, -1, -1).detach().clone()

    @torch.enable_grad()
    def tune(self, image) -> Adapted:
        """Tune the context for each of B images, given the features of their views, (B,
        V, E).
        """
        start = self.start(image[:, 0])
        vectors = start.clone().requires_grad_()
        # One optimizer over all contexts does to each what its own would: AdamW works
        # number by number.
        how = {"lr": self.step_size, "weight_decay": self.decay}
        optimizer = torch.optim.AdamW([vectors], **how)
        image = F.normalize(image.detach(), dim=-1)

        def logits_of(image):  # (B, v, E) -> (B, v, C)
            text = self.clip.text(self.host.context.prompt(vectors))  # (B, C, E)
            text = F.normalize(text, dim=-1)
            return self.clip.logit_scale * image @ text.transpose(1, 2)

        def chosen(x):  # (B, V, ...) -> (B, k, ...)
            return x.gather(1, selected[..., None].expand(-1, -1, x.shape[-1]))

        every = logits_of(image)
        entropy = entropy_of(every.detach().log_softmax(dim=-1))  # (B, V)
        k = max(int(image.shape[1] * self.selection), 1)
        selected = entropy.argsort(dim=-1)[:, :k]  # (B, k)
        losses, gradient = [], torch.zeros_like(start)
        for step in range(self.steps):
            logits = logits_of(chosen(image)) if step else chosen(every)
            loss = marginal_entropy(logits)  # (B,)
            (vectors.grad,) = torch.autograd.grad(loss.sum(), vectors)
            gradient = gradient if step else vectors.grad
            losses.append(loss.detach())
            optimizer.step()
        with torch.no_grad():
            final = logits_of(image[:, :1]).squeeze(1)
        losses = torch.stack(losses) if losses else entropy.new_zeros(0, len(entropy))
        before, after = every.detach(), vectors.detach()
        return Adapted(final, before, entropy, selected, losses, start, after, gradient)

    def official_state(self, state):
        """This method's code calls CoCoOp's learner "prompt_generator"."""
        old, new = "prompt_generator.", "prompt_learner."
        renamed = {key.replace(old, new): value for key, value in state.items()}
        return super().official_state(renamed)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method.

        Raises:
            InputError: a name is unknown, or the class token is to be learned.
        """
        expect(
            not hyperparameters.get("learned_cls"),
            "learned_cls",
            True,
            "False: learned class tokens belong to Bongard-HOI, which is not here",
        )
        ours = super(Plugin, cls).official_hparams(hyperparameters)
        return {name: value for name, value in ours.items() if value is not None}

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, *, host="", **objects):
        """As for any method; without a host the phrase "ctx_init" starts the context,
        in which "[CLS]" may mark the place of the class name.
        """
        if host not in ("", "coop", "cocoop"):
            raise unknown("host of the published TPT", host, ["coop", "cocoop"])
        own, given = cls.official_hparams(hyperparameters), hyperparameters.get
        words, n_ctx = given("ctx_init") or "", given("n_ctx") or 4
        if host == "cocoop":
            words = (given("prompt_prefix") or words).replace("_", " ")
            size = None if words else n_ctx
            made = CoCoOp(clip, classnames, n_ctx=size, init=words)
            return cls(clip, classnames, host=made, **own, **objects)
        words, split = words.replace("_", " ").split(), given("split_idx")
        position = given("class_token_position") or "end"
        if position == "middle" and split is not None and "[CLS]" not in words:
            expect(words, "split_idx", split, "left out where no words are split")
            words.insert(split, "[CLS]")
        made = CoOp(
            clip,
            classnames,
            n_ctx=None if words else n_ctx,
            init=" ".join(words),
            position="middle" if "[CLS]" in words else position,
        )
        return cls(clip, classnames, host=made, **own, **objects)

    @classmethod
    def recipe(cls, setting):
        """Nothing is trained; over a host, the host is. A context of CoOp has the 4
        vectors that the published code wants.
        """
        if setting.host is None:
            return Recipe(epochs=0, augment=False)
        plan = super().recipe(setting)
        if plan.hparams["host"].get("n_ctx") == 16 and setting.host.names[0] == "coop":
            return replace(plan, hparams={"host": {"n_ctx": 4}})
        return plan


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy (B,), in nats, of the mean prediction of k views: logits (B, k, C)."""
    total = logits.log_softmax(dim=-1).logsumexp(dim=1)  # (B, C)
    return entropy_of(total - math.log(logits.shape[1]))


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy (...,), in nats, of log-probabilities (..., C)."""
    return -(log_p.exp() * log_p).sum(dim=-1)
