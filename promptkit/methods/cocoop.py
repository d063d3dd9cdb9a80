"""CoCoOp: a context that every image shifts.

Conditional Prompt Learning for Vision-Language Models; Zhou et al., CVPR 2022; arXiv
2203.05557.

Deviations: everything is float32 by default, where the paper's runs keep CLIP's
weights, context and Meta-Net in half precision; the classes of all images go through
the text tower together, where the published code takes one image at a time.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import nn

from promptkit.method import Method, register
from promptkit.methods.coop import CoOp, check_words, words_first
from promptkit.picture import Bridge, learned
from promptkit.prompts import Context
from promptkit.published import usual
from promptkit.recipe import PROTOCOLS, Recipe


class MetaNet(nn.Module):
    """A bottleneck of two layers from image features (B, E) to shifts of the context
    (B, D).
    """

    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear1 = nn.Linear(features, max(features // 16, 1))
        self.linear2 = nn.Linear(max(features // 16, 1), width)

    def forward(self, x):
        return self.linear2(F.relu(self.linear1(x)))


@register
class CoCoOp(Method):
    r"""CoOp's context, plus one vector that a small network makes from the image, added
    to every token of it.

    .. math:: v_m(x) = v_m + \pi(x), \quad
       \pi(x) = W_2\,\mathrm{ReLU}(W_1 \bar f(x) + b_1) + b_2, \\
       p(y = c \mid x) \propto
       \exp(s \cos(f(x), g([v_1(x)] \dots [v_M(x)]\,[\mathrm{class}_c]\,.)))

    with the normalised image feature :math:`\bar f(x)`. Every image has class features
    of its own, so B images and C classes are B x C prompts; those of one image share
    its context.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx: M, the number of vectors. None: 4, or the number of words in ``init``.
        init: words whose embeddings the vectors start from; empty: normal, std 0.02.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower.
    """

    name = "cocoop"
    title = "CoCoOp"
    year = 2022
    paper = "2203.05557"
    kind = "conditional prompt"
    conditional = True
    picture = replace(
        CoOp.picture,
        text=("SOS", learned("$v_1+π(x)$ … $v_M+π(x)$"), "[class]", ".", "EOT"),
        bridges=(Bridge(learned("Meta-Net $π$"), "image feature", "text tokens"),),
        prompts="prompts for each class and image",
    )
    official_hyperparameters = {
        "N_CTX": "n_ctx",
        "CTX_INIT": "init",
        "n_ctx": "n_ctx",  # as other configurations write it
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        protocol: usual(
            "CoOp: its runs of CoCoOp",
            "The same 10 epochs of single images.",
            extrapolation=protocol == "few-shot",
        )
        for protocol in PROTOCOLS
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int | None = None,
        init: str = "a photo of a",
    ):
        super().__init__(clip, classnames)
        check_words(n_ctx, init)
        self.context = Context(
            clip,
            self.classnames,
            length=n_ctx or (None if init else 4),
            words=init or None,
        )
        self.meta_net = MetaNet(clip.embed_dim, clip.width)

    def shift(self, image_features, normalize=True):
        """pi, (B, D): what images with features (B, E) add to every vector of the
        context.
        """
        if normalize:
            image_features = F.normalize(image_features, dim=-1)
        return self.meta_net(image_features)

    def vectors(self, image_features=None, normalize=True):
        shift = self.shift(image_features, normalize)[:, None, None]  # (B, 1, 1, D)
        return self.context.vectors + shift  # (B, 1, M, D)

    def official_names(self):
        parts = [
            f"meta_net.{layer}.{part}"
            for layer in ("linear1", "linear2")
            for part in ("weight", "bias")
        ]
        return {"prompt_learner.ctx": "context.vectors"} | {
            f"prompt_learner.{part}": part for part in parts
        }

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; initial words set the length, where there are any."""
        return words_first(super().official_hparams(hyperparameters))

    @classmethod
    def recipe(cls, setting):
        """The paper's, the same for all protocols: batches of one image."""
        return Recipe(hparams={"init": "a photo of a"}, epochs=10, batch_size=1)
