"""An image as a weighted set of views, a class as one of sentences, compared by optimal
transport.

AWT: Transferring Vision-Language Models via Augmentation, Weighting, and
Transportation; Zhu et al., NeurIPS 2024; arXiv 2407.04603.
"""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkit.descriptions import as_many, said_of
from promptkit.errors import expect
from promptkit.method import Method
from promptkit.transport import sinkhorn


class Sets(Method):
    r"""The set of an image's views against the set of a class's sentences; nothing is
    learned. A subclass says how it makes :meth:`views` and encodes them.

    With scaled cosines :math:`Z_{vjc}` of view v with sentence j of class c, views and
    sentences weigh by how certain they leave the prediction,

    .. math:: a = \mathrm{softmax}_v(-H_v / \tau), \qquad
       b_c = \mathrm{softmax}_j(-H_{cj} / \tau'),

    :math:`H_v` of the mean over sentences, :math:`H_{cj}` of view 0 with sentence j in
    place of the mean of class c. A class is scored by the mean cosine under the
    entropic transport plan between the two weighted sets,

    .. math:: z_c = \sum_{v,j} T_{vjc} Z_{vjc}, \qquad T = \mathrm{diag}(r)\,K\,
       \mathrm{diag}(q), \qquad K = \exp(-(1 - Z / s) / \epsilon)

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        views: V, the whole image first, then random crops.
        descriptions: ``{class name: [sentence, ...]}``. None: those of the dataset that
            it is aimed at. Without any a class has one sentence.
        sentences: of each class's descriptions the first so many; with the template
            alone they are J = sentences + 1.
        template: with "{}" for the class name, no full stop behind it. None: that of
            the dataset that it is aimed at.
        weighting: False: all views, and all sentences of a class, weigh the same.
        transport: False: every view meets every sentence, T = a b.
        image_temperature, text_temperature: tau and tau'.
        epsilon, iterations, threshold: of Sinkhorn's iterations, which stop where the
            scalings r change by less than the threshold on average.
        together: whether a batch stops together.

    Raises:
        InputError: a hyperparameter does not fit, or some classes have descriptions and
            one has none.
    """

    reads = "views"
    from_dataset = {
        "descriptions": lambda dataset: dict(dataset.descriptions) if dataset else {},
        "template": lambda dataset: (
            dataset.template.removesuffix(".") if dataset else "a photo of a {}"
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
    ):
        super().__init__(clip, classnames)
        expect(views >= 1, "views", views, "at least 1")
        expect(iterations >= 1, "iterations", iterations, "at least 1")
        expect(sentences >= 0, "sentences", sentences, "at least 0")
        expect(threshold >= 0, "threshold", threshold, "at least 0")
        expect(epsilon > 0, "epsilon", epsilon, "above 0")
        self.temperatures = image_temperature, text_temperature
        for kind, value in zip(("image", "text"), self.temperatures, strict=True):
            expect(value > 0, f"{kind}_temperature", value, "above 0")
        given = template is None or "{}" in template
        expect(given, "template", template, "a text with {} for the class name")
        self.n_views, self.sentences = views, sentences
        self.weighting, self.transport = weighting, transport
        self.solver = {"epsilon": epsilon, "iterations": iterations}
        self.solver |= {"threshold": threshold, "together": together}

    # --- sentences --------------------------------------------------------------------

    @cached_property
    def texts(self) -> list[list[str]]:
        """J sentences of each class."""
        said, names = self.option("descriptions"), self.classnames
        pairs = zip(names, said_of(said, names), strict=True)
        about = {name: list(texts or ()) for name, texts in pairs}
        about = as_many(about) if self.sentences and any(about.values()) else {}
        starts = [self.option("template").replace("{}", name) for name in names]
        lists = [about.get(name, [])[: self.sentences] for name in names]
        return [
            [f"{start}.", *(f"{start}. {text}" for text in own)]
            for start, own in zip(starts, lists, strict=True)
        ]

    @cached_property
    def frozen_text(self) -> Tensor:
        """Features (C, J, E) of the sentences."""
        every = [text for own in self.texts for text in own]
        features = self.clip.encode_text(every)
        return features.unflatten(0, (len(self.texts), -1))

    def text_features(self, image_features=None):
        """Of each class's sentences, (C, J, E)."""
        return self.frozen_text

    # --- weighting and transportation -------------------------------------------------

    def score(self, image, text):
        """Logits (B, C) of views (B, V, E) and sentences (C, J, E)."""
        image, text = (F.normalize(x.float(), dim=-1) for x in (image, text))
        scale = self.clip.logit_scale.float()
        z = scale * torch.einsum("bve,cje->bcvj", image, text)
        with torch.no_grad():
            plan = self.plan(z, scale)
        return (plan * z).sum(dim=(2, 3))

    def tempered(self) -> tuple[float, float]:
        """tau and tau', as they hold now."""
        return self.temperatures

    def log_weights(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log a, (B, V), and log b, (B, C, J), of scaled cosines (B, C, V, J)."""
        B, C, V, J = z.shape
        if not self.weighting:
            a, b = z.new_zeros(B, V), z.new_zeros(B, C, J)
            return a.log_softmax(dim=1), b.log_softmax(dim=2)
        by_image, by_text = self.tempered()
        a = -entropy(z.mean(dim=3), dim=1) / by_image
        b = -entropy_with(z[:, :, 0].mean(dim=2), z[:, :, 0]) / by_text
        return a.log_softmax(dim=1), b.log_softmax(dim=2)

    def plan(self, z: Tensor, scale) -> Tensor:
        """T, (B, C, V, J), of scaled cosines."""
        log_a, log_b = self.log_weights(z)
        if not self.transport:
            return (log_a[:, None, :, None] + log_b[:, :, None, :]).exp()
        return sinkhorn(1 - z / scale, log_a, log_b, **self.solver)[0]


def entropy(logits: Tensor, dim: int) -> Tensor:
    """Of softmax(logits) over a dimension, in nats."""
    log_p = logits.log_softmax(dim=dim)
    return -(log_p.exp() * log_p).sum(dim=dim)


def entropy_with(base: Tensor, own: Tensor) -> Tensor:
    """The entropy, (B, C, J), of softmax(base) over C classes after the entry c of base
    (B, C) was replaced by own[:, c, j].

    With the others' log-sum L and mean m under their softmax, that of l beside them is
    p (log S - l) + (1 - p) (log S - m), where S = e^L + e^l and p = e^l / S: no (C, C,
    J) tensor, and no difference of large sums.
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
