"""AWT: many views of an image, many sentences about a class, compared by optimal
transport.

AWT: Transferring Vision-Language Models via Augmentation, Weighting, and
Transportation; Zhu et al., NeurIPS 2024; arXiv 2407.04603.

Without ``adapters`` nothing is learned. With them this is its few-shot form, which
trains small adapters in both towers through the same score.

Deviations: everything is float32 by default, where the published runs encode in half
precision. Sinkhorn's iterations run in the logarithmic domain, and each image has its
own stopping rule, so that a score does not depend on the other images of a batch; the
published few-shot code stops a batch together (``together``). Where a class has fewer
sentences than are asked for, all classes have as many as it has. EuroSAT's class names,
which that code rewrites, are the dataset's own here.
"""

import copy
import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

from promptkit.data import transform
from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.methods.tpt import image_views, views_of
from promptkit.picture import Picture
from promptkit.prompts import assemble
from promptkit.published import Published, everywhere
from promptkit.recipe import Recipe
from promptkit.towers import Edit

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
PARTS, TOWERS = ("attn", "mlp"), ("image", "text")


@register
class AWT(Method):
    r"""The set of an image's views against the set of a class's sentences.

    With scaled cosines :math:`Z_{vdc}` of view v with sentence d of class c, views and
    sentences weigh by how certain they leave the prediction,

    .. math:: a = \mathrm{softmax}_v(-H_v / \tau), \qquad
       b_c = \mathrm{softmax}_d(-H_{cd} / \tau'),

    :math:`H_v` of the mean over sentences, :math:`H_{cd}` of view 0 with sentence d in
    place of the mean of class c. A class is scored by the mean cosine under the
    entropic transport plan between the two weighted sets,

    .. math:: z_c = \sum_{v,d} T_{vdc} Z_{vdc}, \qquad T = \mathrm{diag}(r)\,K\,
       \mathrm{diag}(q), \qquad K = \exp(-(1 - Z / s) / \epsilon)

    The few-shot form puts an adapter h + scale up(GELU(down h)) behind attention and
    MLP of the blocks, and holds the features near those without adapters (L1). T is a
    constant in its backward pass.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        views: V, the whole image first, then random crops.
        descriptions: ``{class name: [sentence, ...]}``. None: those of the dataset that
            it is aimed at. Without any a class has one sentence.
        sentences: of each class's descriptions the first so many; with the template
            alone they are D = sentences + 1.
        template: with "{}" for the class name, no full stop behind it. None: that of
            the dataset that it is aimed at.
        weighting: False: all views, and all sentences of a class, weigh the same.
        transport: False: every view meets every sentence, T = a b.
        image_temperature, text_temperature: tau and tau'.
        epsilon, iterations, threshold: of Sinkhorn's iterations, which stop where the
            scalings r change by less than the threshold on average.
        together: whether a batch stops together.
        adapters: the few-shot form.
        layers: blocks with adapters; None: all.
        parts: of "attn" and "mlp", behind which they stand; None: both.
        towers: of "image" and "text", those that have them; None: both.
        rate: a tower's width over that of the bottleneck.
        scale: of the adapters; None: learned, from 1.
        train_views, train_sentences: of a training step; the template alone is always
            among the sentences, the others are drawn, the same for all classes.
        train_image_temperature, train_text_temperature: tau and tau' there.
        image_weight, text_weight: of the two distances.

    Raises:
        InputError: a hyperparameter does not fit, or some classes have descriptions and
            one has none.
    """

    name = "awt"
    title = "AWT"
    year = 2024
    paper = "2407.04603"
    kind = "test-time"
    reads = "views"
    picture = Picture(
        text=("SOS", "a photo of a", "[class]", ".", "a sentence", "EOT"),
        score="optimal transport",
        targets=(),
        prompts="51 sentences for each class",
        images="51 views of an image",
        several=("text", "image"),
        note="the few-shot form learns adapters in the blocks of both towers",
    )
    from_dataset = {
        "descriptions": lambda dataset: dict(dataset.descriptions) if dataset else {},
        "template": lambda dataset: template_of(dataset),
    }
    official_hyperparameters = {
        "num_descriptor": "sentences",
        "num_desc": "sentences",
        "n_views": "views",
        "descriptions": "descriptions",
        "template": "template",
        "image_temperature": "image_temperature",
        "text_temperature": "text_temperature",
        "sinkhorn_eps": "epsilon",
        "sinkhorn_threshold": "threshold",
        "sinkhorn_max_iterations": "iterations",
        "desc_per_batch": "train_sentences",
        "views_per_batch": "train_views",
        "adapter_layers": "layers",
        "positions": "parts",
        "towers": "towers",
        "down_rate": "rate",
        "scale": "scale",
        "distil_image": "image_weight",
        "distil_text": "text_weight",
        **dict.fromkeys(("visual", "text", *PARTS)),  # these: see official_hparams
        "learnable_scale": None,
        "train_temperatures": None,
        "test_temperatures": None,
        "n_prompts": None,  # follows from the number of descriptions
    }
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
        views: int = 51,
        descriptions: dict | None = None,
        sentences: int = 50,
        template: str | None = None,
        weighting: bool = True,
        transport: bool = True,
        image_temperature: float = 0.5,
        text_temperature: float = 0.5,
        epsilon: float = 0.1,
        iterations: int = 100,
        threshold: float = 1e-2,
        together: bool = False,
        adapters: bool = False,
        layers: list[int] | None = None,
        parts: list[str] | None = None,
        towers: list[str] | None = None,
        rate: int = 256,
        scale: float | None = None,
        train_views: int = 8,
        train_sentences: int = 8,
        train_image_temperature: float = 1.0,
        train_text_temperature: float = 1.0,
        image_weight: float = 10.0,
        text_weight: float = 25.0,
    ):
        super().__init__(clip, classnames)
        for name, value in (
            ("views", views), ("iterations", iterations), ("rate", rate),
            ("train_views", train_views), ("train_sentences", train_sentences),
        ):  # fmt: skip
            expect(value >= 1, name, value, "at least 1")
        expect(sentences >= 0, "sentences", sentences, "at least 0")
        self.temperatures = image_temperature, text_temperature
        self.train_temperatures = train_image_temperature, train_text_temperature
        expect(epsilon > 0, "epsilon", epsilon, "above 0")
        both = {"": self.temperatures, "train_": self.train_temperatures}
        for start, pair in both.items():
            for kind, value in zip(("image", "text"), pair, strict=True):
                expect(value > 0, f"{start}{kind}_temperature", value, "above 0")
        for name, value in (
            ("threshold", threshold), ("image_weight", image_weight),
            ("text_weight", text_weight),
        ):  # fmt: skip
            expect(value >= 0, name, value, "at least 0")
        given = template is None or "{}" in template
        expect(given, "template", template, "a text with {} for the class name")
        for name, value, known in (("parts", parts, PARTS), ("towers", towers, TOWERS)):
            fits = value is None or (len(value) > 0 and set(value) <= set(known))
            expect(fits, name, value, f"of {known[0]!r} and {known[1]!r}, or both")
        self.n_views, self.sentences, self.train_views = views, sentences, train_views
        self.weighting, self.transport = weighting, transport
        self.solver = {"epsilon": epsilon, "iterations": iterations}
        self.solver |= {"threshold": threshold, "together": together}
        self.train_sentences = train_sentences
        self.weights = image_weight, text_weight
        self.adapters = nn.ModuleDict()
        self.layers = layers
        if adapters:
            self._add_adapters(towers or TOWERS, parts or PARTS, rate, scale)
        self._drawn = None  # the sentences of a training step

    def _add_adapters(self, towers, parts, rate, scale):
        """All adapters of a tower are copies of one."""
        for name in towers:
            tower, width = (
                (self.clip.image_tower, self.clip.vision_width)
                if name == "image"
                else (self.clip.text_tower, self.clip.width)
            )
            blocks = len(tower.blocks)
            layers = range(blocks) if self.layers is None else self.layers
            fits = len(layers) and all(0 <= layer < blocks for layer in layers)
            expect(fits, "layers", self.layers, f"some of the {blocks} blocks, from 0")
            first = Adapter(width, max(width // rate, 1), scale)
            self.adapters[name] = nn.ModuleDict(
                {
                    part: nn.ModuleDict(
                        {str(layer): copy.deepcopy(first) for layer in layers}
                    )
                    for part in parts
                }
            )

    # --- sentences --------------------------------------------------------------------

    @cached_property
    def texts(self) -> list[list[str]]:
        """D sentences of each class."""
        said = {
            key.replace("_", " "): list(texts)
            for key, texts in self.option("descriptions").items()
        }
        lists = [said.get(name, []) for name in self.classnames]
        lacking = [n for n, own in zip(self.classnames, lists, strict=True) if not own]
        if lacking and len(lacking) < len(lists) and self.sentences:
            raise InputError(
                f"{self.name} needs descriptions of every class or of none, and there"
                f" are none of {lacking[0]!r}: pass descriptions={{class name:"
                " [sentence, ...]}"
            )
        n = min(self.sentences, *map(len, lists)) if lists else 0
        starts = [self.option("template").replace("{}", n) for n in self.classnames]
        return [
            [f"{start}.", *(f"{start}. {text}" for text in own[:n])]
            for start, own in zip(starts, lists, strict=True)
        ]

    @cached_property
    def frozen_text(self) -> Tensor:
        """Features (C, D, E) of the sentences without adapters."""
        every = [text for own in self.texts for text in own]
        features = self.clip.encode_text(every)
        return features.unflatten(0, (len(self.texts), -1))

    @cached_property
    def _prompts(self) -> list:
        """The prompt of all classes for each of the D sentences."""
        return [
            assemble(self.clip, self.classnames, [list(texts)])
            for texts in zip(*self.texts, strict=True)
        ]

    def text_edit(self):
        return Adapted(self.adapters["text"]) if "text" in self.adapters else None

    def text_features(self, image_features=None):
        """Of each class's sentences, (C, D, E); in a training step of those drawn."""
        edit = self.text_edit()
        if edit is None:
            return self.frozen_text[:, self._chosen]
        parts = [self.clip.text(self._prompts[d], edit)[0] for d in self._chosen]
        return torch.stack(parts, dim=1)

    @property
    def _chosen(self) -> list[int]:
        """The sentences that are compared now."""
        every = list(range(len(self.texts[0])))
        return self._drawn if self.training and self._drawn else every

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
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's own
            torch.manual_seed(seed)
            rng, size = np.random.RandomState(seed), self.clip.image_size
            views = [
                image_views(to_pil_image(x), self.n_views, size, False, rng)
                for x in images
            ]
        return self.clip.normalize(torch.stack(views))

    def image_edit(self):
        return Adapted(self.adapters["image"]) if "image" in self.adapters else None

    def encode(self, batch):
        """Features (B, V, E) of the views."""
        batch.views = views_of(self, batch)
        views = batch.views.to(self.clip.device)
        return self.image_features(views.flatten(0, 1)).unflatten(0, views.shape[:2])

    # --- weighting and transportation -------------------------------------------------

    def features(self, batch):
        trains = self.training and len(self.adapters) > 0
        self._drawn = self.draw(batch.generator) if trains else None
        return super().features(batch)

    def score(self, image, text):
        """Logits (B, C) of views (B, V, E) and sentences (C, D, E)."""
        image, text = (
            F.normalize(image.float(), dim=-1),
            F.normalize(text.float(), dim=-1),
        )
        scale = self.clip.logit_scale.float()
        z = scale * torch.einsum("bve,cde->bcvd", image, text)
        with torch.no_grad():
            plan = self.plan(z, scale)
        return (plan * z).sum(dim=(2, 3))

    def log_weights(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log a, (B, V), and log b, (B, C, D), of scaled cosines (B, C, V, D)."""
        B, C, V, D = z.shape
        if not self.weighting:
            a, b = z.new_zeros(B, V), z.new_zeros(B, C, D)
        else:
            train = self.training and len(self.adapters) > 0
            by_image, by_text = self.train_temperatures if train else self.temperatures
            a = -entropy(z.mean(dim=3), dim=1) / by_image
            b = -entropy_with(z[:, :, 0].mean(dim=2), z[:, :, 0]) / by_text
        return a.log_softmax(dim=1), b.log_softmax(dim=2)

    def plan(self, z: Tensor, scale) -> Tensor:
        """T, (B, C, V, D), of scaled cosines."""
        log_a, log_b = self.log_weights(z)
        if not self.transport:
            return (log_a[:, None, :, None] + log_b[:, :, None, :]).exp()
        cost = 1 - z / scale
        return sinkhorn(cost, log_a, log_b, **self.solver)[0]

    def regularizer(self, batch, image, text):
        """The distances from the features without adapters."""
        if not len(self.adapters):
            return 0.0
        by_image, by_text = self.weights
        of_images, of_texts = self.distances(batch, image, text)
        return by_image * of_images + by_text * of_texts

    def distances(self, batch, image, text) -> tuple[Tensor, Tensor]:
        """Mean absolute difference of normalised features, of images and of texts."""
        frozen = self.clip.encode_image(batch.views.flatten(0, 1).to(image.device))
        pairs = (
            (image, frozen.view_as(image)),
            (text, self.frozen_text[:, self._chosen]),
        )
        return tuple(
            F.l1_loss(F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1))
            for ours, theirs in pairs
        )

    # --- the names of its own repository ----------------------------------------------

    def official_names(self):
        learner = {
            "image": "visual_adapter_learner", "text": "text_adapter_learner"
        }  # fmt: skip
        leaves = {"down": "down_proj", "up": "up_proj", "scale": "scale"}
        names = {}
        for ours, _ in self.adapters.named_parameters():
            tower, part, layer, leaf, *rest = ours.split(".")
            number = layer if self.layers is None else self.layers.index(int(layer))
            official = [learner[tower], f"adapt_{part}", str(number), leaves[leaf]]
            names[".".join([*official, *rest])] = f"adapters.{ours}"
        return names

    def official_state(self, state):
        """Adapters of some blocks may be numbered by these, or one after another."""
        blocks = {key.split(".")[2] for key in state if "adapter_learner.adapt_" in key}
        if self.layers is None or blocks != {str(layer) for layer in self.layers}:
            return state
        renumbered = {}
        for key, value in state.items():
            parts = key.split(".")
            if "adapter_learner.adapt_" in key:
                parts[2] = str(self.layers.index(int(parts[2])))
            renumbered[".".join(parts)] = value
        return renumbered

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method. Options of the adapters ask for the few-shot form, which
        solves a batch together; a scale of -1 is learned, and "visual", "text", "attn"
        and "mlp" switch adapters off where they are false.
        """
        ours = super().official_hparams(hyperparameters)
        switches = {"towers": {"visual": "image", "text": "text"}}
        switches |= {"parts": {part: part for part in PARTS}}
        for name, official in switches.items():
            named = [official.get(place, place) for place in ours.get(name) or ()]
            off = [k for k in official if not hyperparameters.get(k, True)]
            if named or off:
                some = named or official.values()
                ours[name] = [k for k in some if k not in {official[o] for o in off}]
        known = {"layers", "parts", "rate", "scale", "train_sentences", "towers"}
        if known & set(ours) or "learnable_scale" in hyperparameters:
            ours |= {"adapters": True, "together": True}
            learned = hyperparameters.get("learnable_scale")
            learned = ours.get("scale", -1) == -1 if learned is None else learned
            ours["scale"] = None if learned else float(ours.get("scale", 1.0))
        for where in ("train", "test"):
            given = hyperparameters.get(f"{where}_temperatures")
            prefix = "train_" if where == "train" else ""
            for name, value in zip(("image", "text"), given or (), strict=False):
                ours[f"{prefix}{name}_temperature"] = value
        return ours

    @classmethod
    def recipe(cls, setting):
        """Zero-shot, but few-shot in the few-shot protocol unless it is asked for
        without adapters.
        """
        few = setting.protocol == "few-shot"
        if not setting.hparams.get("adapters", few):
            return Recipe(hparams={}, epochs=0, augment=False)
        many = setting.shots >= 8
        hparams = {"adapters": True, "rate": 256 if many else 384}
        if setting.dataset == "imagenet":
            hparams["train_sentences"] = 4
        return Recipe(
            hparams,
            epochs=25 if many else 20,
            batch_size=16,
            lr=0.008 if many else 0.002,
            warmup_epochs=5,
            warmup="linear",
        )


def template_of(dataset) -> str:
    """What a class of a dataset is called, without the full stop."""
    if dataset is None:
        return PLAIN
    return TEMPLATES.get(dataset.name, dataset.template.removesuffix("."))


class Adapter(nn.Module):
    """h + scale up(GELU(down h)) of (..., width); the identity at first."""

    def __init__(self, width: int, bottleneck: int, scale: float | None):
        super().__init__()
        self.down, self.up = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.scale = nn.Parameter(torch.ones(1)) if scale is None else scale

    def forward(self, h):
        return h + self.scale * self.up(F.gelu(self.down(h)))


class Adapted(Edit):
    """Adapters behind the residual branches of some blocks: part -> block -> module."""

    def __init__(self, adapters: nn.ModuleDict):
        self.adapters = adapters

    def branch(self, layer, part, h, span):
        blocks = self.adapters[part] if part in self.adapters else {}
        return blocks[str(layer)](h) if str(layer) in blocks else h


# --- entropies and transport ----------------------------------------------------------


def entropy(logits: Tensor, dim: int) -> Tensor:
    """Of softmax(logits) over a dimension, in nats."""
    log_p = logits.log_softmax(dim=dim)
    return -(log_p.exp() * log_p).sum(dim=dim)


def entropy_with(base: Tensor, own: Tensor) -> Tensor:
    """The entropy, (B, C, D), of softmax(base) over C classes after the entry c of base
    (B, C) was replaced by own[:, c, d].

    With the others' log-sum L and mean m under their softmax, that of l beside them is
    p (log S - l) + (1 - p) (log S - m), where S = e^L + e^l and p = e^l / S: no (C, C,
    D) tensor, and no difference of large sums.
    """
    C = base.shape[1]
    others = base[:, None].expand(-1, C, -1).masked_fill(
        torch.eye(C, dtype=torch.bool, device=base.device), -math.inf
    )  # (B, C, C)  # fmt: skip
    total = others.logsumexp(dim=2)[..., None]  # L, (B, C, 1)
    share = (others - total).exp().nan_to_num()  # one class has no others
    mean = (share @ base[..., None]).nan_to_num()  # m, (B, C, 1)
    log_sum = torch.logaddexp(total, own)
    p, rest = (own - log_sum).exp(), (total - log_sum).exp()
    return p * (log_sum - own) + rest * (log_sum - mean)


def sinkhorn(
    cost: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    epsilon: float = 0.1,
    iterations: int = 100,
    threshold: float = 1e-2,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropic transport plans between a set of B images' and C classes' sets.

    Args:
        cost: (B, C, V, D).
        log_a: (B, V), logarithms of the weights of the views.
        log_b: (B, C, D), of the sentences.
        epsilon, iterations, threshold: an image is done where its scalings r change by
            less than the threshold on average over classes and views.
        together: all images stop when this holds on average over them too.

    Returns:
        The plans (B, C, V, D), whose sums over views are b exactly; how many iterations
        each image took, (B,); and the change of its scalings in each, (B, iterations),
        0 where it was done.
    """
    kernel = -cost / epsilon
    r, q = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[:, :, 0])  # logarithms
    going = torch.ones(len(cost), dtype=torch.bool, device=cost.device)
    steps = torch.zeros(len(cost), dtype=torch.long, device=cost.device)
    changes = []
    for _ in range(iterations):
        new_r = log_a[:, None] - (kernel + q[:, :, None]).logsumexp(dim=3)
        new_q = log_b - (kernel + new_r[..., None]).logsumexp(dim=2)
        change = (new_r.exp() - r.exp()).abs().mean(dim=(1, 2))  # (B,)
        r = torch.where(going[:, None, None], new_r, r)
        q = torch.where(going[:, None, None], new_q, q)
        steps += going
        changes.append(change * going)
        going &= (change.mean() if together else change) >= threshold
        if not going.any():
            break
    plan = (kernel + r[..., None] + q[:, :, None]).exp()
    return plan, steps, torch.stack(changes, dim=1)
