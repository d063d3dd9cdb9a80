"""TPT: tune the prompt for one test image, without labels.

Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models; Shu et
al., NeurIPS 2022; arXiv 2209.07511.

Alone it starts from "a photo of a"; over a host, ``tpt(coop)`` or ``tpt(cocoop)``, from
the context that the host has learned.

Deviations: everything is float32 by default, where the published code runs float32
weights under autocast; the 64 views are encoded once, where that code encodes them at
every step; several images are adapted together, each with its own context and optimizer
state; at least one view is kept. As in that code, CoCoOp's Meta-Net reads the image
feature without normalisation here.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from promptkit.errors import InputError, expect, unknown
from promptkit.method import Method, register
from promptkit.methods.cocoop import CoCoOp
from promptkit.methods.coop import CoOp
from promptkit.picture import Bridge, Picture, Target
from promptkit.plugin import Plugin
from promptkit.published import Published
from promptkit.recipe import Recipe


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
    from_dataset = {"augmix": lambda dataset: mixes(dataset)}
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
        protocol: Published(
            ("RN50", "ViT-B-16"),
            (16,),
            "TPT: its scripts",
            note + " The scripts' default is RN50 and their seed 0. Over CoOp they want"
            " a context of 4 vectors.",
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
        expect(
            augmix is not False or severity == 1,
            "severity",
            severity,
            "left out where augmix=False distorts nothing",
        )
        self.n_views, self.selection, self.steps = views, selection, steps
        self.step_size, self.decay, self.severity = step_size, decay, severity

    def views(self, images, generator):
        """The views of images: (B, V, 3, S, S), normalised, the centre crop first.

        Args:
            images: B tensors (3, H, W) uint8.
            generator: of all that is random.
        """
        size, seed = (
            self.clip.image_size,
            int(torch.randint(2**31, (), generator=generator)),
        )
        rng = np.random.RandomState(seed)
        with torch.random.fork_rng(
            devices=[]
        ):  # torchvision's transforms draw from torch's own generator
            torch.manual_seed(seed)
            stacks = [
                image_views(
                    v2.functional.to_pil_image(x),
                    self.n_views,
                    size,
                    self.option("augmix"),
                    rng,
                    self.severity,
                )
                for x in images
            ]
        return self.clip.normalize(torch.stack(stacks))

    def forward(self, batch):
        if self.training:
            return self.host(batch)
        views = views_of(self, batch)
        features = self.clip.encode_image(
            views.flatten(0, 1).to(self.clip.device)
        )  # (B * V, E)
        return self.tune(features.unflatten(0, views.shape[:2])).logits

    def start(self, image):
        """The context (B, 1 or C, M, D) that images with features (B, E) start from."""
        host = self.host
        if host.conditional:
            vectors = host.vectors(image, normalize=False)
        else:
            vectors = host.vectors()
        if vectors.dim() < 4:  # the same for every image
            vectors = vectors if vectors.dim() == 3 else vectors[None]
            vectors = vectors.expand(len(image), -1, -1, -1)
        return vectors.detach().clone()

    @torch.enable_grad()
    def tune(self, image) -> Adapted:
        """Tune the context for each of B images, given the features of their views, (B,
        V, E).
        """
        start = self.start(image[:, 0])
        vectors = start.clone().requires_grad_()
        # One optimizer over all contexts does to each what its own would: AdamW works
        # number by number.
        optimizer = torch.optim.AdamW(
            [vectors], lr=self.step_size, weight_decay=self.decay
        )
        image = F.normalize(image.detach(), dim=-1)

        def logits_of(image):  # (B, v, E) -> (B, v, C)
            text = F.normalize(
                self.clip.text(self.host.context.prompt(vectors)), dim=-1
            )  # (B, C, E)
            return self.clip.logit_scale * image @ text.transpose(1, 2)

        def chosen(x):  # (B, V, ...) -> (B, k, ...)
            return x.gather(1, selected[..., None].expand(-1, -1, x.shape[-1]))

        every = logits_of(image)
        entropy = entropy_of(every.detach().log_softmax(dim=-1))  # (B, V)
        selected = entropy.argsort(dim=-1)[
            :, : max(int(image.shape[1] * self.selection), 1)
        ]  # (B, k)
        losses, gradient = [], torch.zeros_like(start)
        for step in range(self.steps):
            loss = marginal_entropy(
                logits_of(chosen(image)) if step else chosen(every)
            )  # (B,)
            (vectors.grad,) = torch.autograd.grad(loss.sum(), vectors)
            gradient = gradient if step else vectors.grad
            losses.append(loss.detach())
            optimizer.step()
        with torch.no_grad():
            final = logits_of(image[:, :1]).squeeze(1)
        losses = torch.stack(losses) if losses else entropy.new_zeros(0, len(entropy))
        return Adapted(
            final,
            every.detach(),
            entropy,
            selected,
            losses,
            start,
            vectors.detach(),
            gradient,
        )

    def official_state(self, state):
        """This method's code calls CoCoOp's learner "prompt_generator"."""
        renamed = {
            key.replace("prompt_generator.", "prompt_learner."): value
            for key, value in state.items()
        }
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
        own = cls.official_hparams(hyperparameters)
        words = hyperparameters.get("ctx_init") or ""
        if host == "cocoop":
            words = hyperparameters.get("prompt_prefix") or words or "a photo of a"
            extended = CoCoOp(clip, classnames, init=words.replace("_", " "))
            return cls(clip, classnames, host=extended, **own, **objects)
        words = words.replace("_", " ").split()
        position = hyperparameters.get("class_token_position") or "end"
        split = hyperparameters.get("split_idx")
        if position == "middle" and split is not None and "[CLS]" not in words:
            expect(words, "split_idx", split, "left out where no words are split")
            words.insert(split, "[CLS]")
        if "[CLS]" in words:
            position = "middle"
        extended = CoOp(
            clip,
            classnames,
            n_ctx=None if words else hyperparameters.get("n_ctx") or 4,
            init=" ".join(words),
            position=position,
        )
        return cls(clip, classnames, host=extended, **own, **objects)

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


def mixes(dataset) -> bool:
    """AugMix, but on ImageNet and its shifts, and on what takes their place."""
    if dataset is None:
        return False
    return not dataset.shifts and dataset.source_rows is None


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy (B,), in nats, of the mean prediction of k views: logits (B, k, C)."""
    return entropy_of(
        logits.log_softmax(dim=-1).logsumexp(dim=1) - math.log(logits.shape[1])
    )


def entropy_of(log_p: Tensor) -> Tensor:
    """Entropy (...,), in nats, of log-probabilities (..., C)."""
    return -(log_p.exp() * log_p).sum(dim=-1)


# --- views ----------------------------------------------------------------------------


def views_of(method: Method, batch) -> Tensor:
    """The views (B, V, 3, S, S) of a batch; where images came without their pixels,
    views are made of these, each image's as if it were alone.
    """
    if batch.views is not None:
        return batch.views
    if batch.images is None:
        raise InputError(
            f"{method.spec} reads views of images, and the batch holds none"
        )
    pixels = method.clip.denormalize(batch.images.cpu()).clamp(0, 1) * 255
    return torch.cat(
        [
            method.views(x[None], torch.Generator().manual_seed(0))
            for x in pixels.round().byte()
        ]
    )


def image_views(
    image: Image.Image,
    n: int,
    size: int,
    mixes: bool,
    rng: np.random.RandomState,
    severity: float = 1,
) -> Tensor:
    """Views of one image, (n, 3, size, size) with values around 0..1: the centre crop,
    then random ones.

    Crops and flips draw from torch's global generator, all else from ``rng``, in the
    order of the published code.
    """
    whole = v2.Compose(
        [v2.Resize(size, v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    )
    crop = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    views = [_tensor(whole(image))]
    for _ in range(n - 1):
        x = crop(image)
        views.append(augmix(x, rng, severity) if mixes else _tensor(x))
    return torch.stack(views)


def augmix(
    image: Image.Image, rng: np.random.RandomState, severity: float = 1
) -> Tensor:
    """An image mixed with three chains of one to three operations each, (3, S, S)
    (Hendrycks et al. 2020).
    """
    weights, share = rng.dirichlet([1.0] * 3), rng.beta(1.0, 1.0)
    mixed = torch.zeros_like(plain := _tensor(image))
    for weight in weights:
        x = image
        for _ in range(rng.randint(1, 4)):
            x = OPERATIONS[rng.choice(list(OPERATIONS))](x, severity, rng)
        mixed += weight * _tensor(x)
    return share * plain + (1 - share) * mixed


def _tensor(image: Image.Image) -> Tensor:
    return v2.functional.pil_to_tensor(image).float() / 255  # (3, H, W)


def _amount(most: float, severity: float, rng) -> float:
    return rng.uniform(0.1, severity) * most / 10


def _signed(amount: float, rng) -> float:
    return -amount if rng.uniform() > 0.5 else amount


def _warp(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


OPERATIONS = {  # (image, severity, rng) -> image
    "autocontrast": lambda x, n, rng: ImageOps.autocontrast(x),
    "equalize": lambda x, n, rng: ImageOps.equalize(x),
    "posterize": lambda x, n, rng: ImageOps.posterize(x, 4 - int(_amount(4, n, rng))),
    "rotate": lambda x, n, rng: x.rotate(
        _signed(int(_amount(30, n, rng)), rng), resample=Image.Resampling.BILINEAR
    ),
    "solarize": lambda x, n, rng: ImageOps.solarize(x, 256 - int(_amount(256, n, rng))),
    "shear_x": lambda x, n, rng: _warp(
        x, 1, _signed(_amount(0.3, n, rng), rng), 0, 0, 1, 0
    ),
    "shear_y": lambda x, n, rng: _warp(
        x, 1, 0, 0, _signed(_amount(0.3, n, rng), rng), 1, 0
    ),
    "translate_x": lambda x, n, rng: _warp(
        x, 1, 0, _signed(int(_amount(x.width / 3, n, rng)), rng), 0, 1, 0
    ),
    "translate_y": lambda x, n, rng: _warp(
        x, 1, 0, 0, 0, 1, _signed(int(_amount(x.height / 3, n, rng)), rng)
    ),
}
