"""TCP: prompts of each class, made from what the frozen CLIP knows of it.

TCP: Textual-based Class-aware Prompt tuning for Visual-Language Model; Yao et al., CVPR
2024; arXiv 2311.18231.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights, the context and the embedding network in half precision. The published code
holds TCP over CoOp's context alone; over other hosts, which the abstract announces, the
same rule is applied here: as many tokens are inserted as the host's context has. As in
that code's configuration, and perhaps not as in the paper ("a photo of a"), the context
starts at random, and 50 epochs are run though the file is named ep100.
"""

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from promptkit.clip import zero_shot_features
from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.methods.coop import CoOp, words_first
from promptkit.picture import Bridge, Picture, Target, learned
from promptkit.plugin import Plugin
from promptkit.published import dataset_of, transfer, usual
from promptkit.recipe import Recipe
from promptkit.towers import Edits, Replace

PLAIN = "a photo of a {}."
# The published code's, of the frozen features and behind the context; elsewhere the
# dataset's own and "{}.".
TEMPLATES = {
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "fgvc_aircraft": "a photo of an aircraft {}.",
    "dtd": "a photo of a {}, a type of texture.",
    "eurosat": "a centered satellite photo of {}.",
    "food101": "a photo of a {}, a type of food.",
    "ucf101": "a photo of a person doing {}.",
}
ENDINGS = {
    "oxford_pets": "{}, a type of pet.",
    "oxford_flowers": "{}, a type of flower.",
    "fgvc_aircraft": "{}, a type of aircraft.",
    "dtd": "{} texture.",
    "stanford_cars": "{}, a type of car",
    "food101": "{}, a type of food.",
    "ucf101": "person doing {}.",
}


class Embedding(nn.Module):
    """A bottleneck of two layers from class features (C, E) to n tokens of each class,
    (C, n, D).
    """

    def __init__(self, features: int, hidden: int, n: int, width: int):
        super().__init__()
        self.n = n
        self.linear1 = nn.Linear(features, hidden)
        self.linear2 = nn.Linear(hidden, n * width)

    def forward(self, x):
        h = self.linear1(x)
        h = h * torch.sigmoid(1.702 * h)  # QuickGELU
        return self.linear2(h).unflatten(-1, (self.n, -1))


class Blend(Replace):
    """At the input of a block, a weighted mean of the tokens there and new ones."""

    def __init__(self, layer: int, start: int, tokens, weight: float):
        super().__init__({layer: (start, tokens)})
        self.weight = weight

    def before(self, layer, x, span):
        return torch.lerp(x, super().before(layer, x, span), self.weight)


@register
class TCP(Plugin):
    r"""Tokens that a small network makes from each class's frozen text feature take the
    place of the context in the middle of the text tower.

    With the normalised feature g_c of a hand-written prompt of class c, and the input x
    of text block l,

    .. math:: T_c = W_2\,\sigma(W_1 g_c + b_1) + b_2 \in \mathbb R^{n \times D}, \\
       x_{1 \dots n} \leftarrow \omega\,T_c + (1 - \omega)\,x_{1 \dots n}, \qquad
       L = L_{ce} + \lambda\,\frac1C \sum_c \bigl(1 - \cos(w_c, g_c)\bigr)

    A class that was not trained has tokens of its own, made from its name. The context
    acts on what stands behind it in the blocks before l. The penalty is KgCoOp's.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        host: the method to extend, whose context stands before the class name. None:
            CoOp with 4 vectors, which learn along; ``host={...}`` sets its
            hyperparameters.
        kg_weight: lambda; 0 leaves the features free.
        layer: l, the block (from 0) at whose input the tokens go in, or several. None:
            after two thirds of the blocks, 8 of 12.
        insert_weight: omega, or one for each layer; 1 replaces.
        n_tokens: n. None: as many as the context has.
        hidden: width of the bottleneck. None: a quarter of the features' width, 128 of
            512.
        template: of the hand-written prompt. None: that of the dataset it is aimed at,
            "a photo of a {}." before.
        ending: what follows the context, where no host is named: words and "{}" for the
            class name. None: that of the dataset, "{}." before.

    Raises:
        InputError: a hyperparameter, the host or a class name does not fit, or the
            whole is too long for the text tower.
    """

    name = "tcp"
    title = "TCP"
    year = 2023
    paper = "2311.18231"
    kind = "plug-in"
    supervision = "shots"
    hosts = ("coop", "cocoop", "kgcoop", "maple", "promptsrc")
    default_host = (CoOp, {"n_ctx": 4})
    default_host_learns = True
    picture = Picture(
        text_reference=Target("frozen CLIP,\na template", "1 − cos"),
        bridges=(Bridge(learned("network $T$"), "text reference", "text tower"),),
        note="at block $l$ tokens $T_c$ take the context's place",
    )
    from_dataset = {
        "template": lambda d: TEMPLATES.get(d.name, d.template) if d else PLAIN,
        "ending": lambda d: ENDINGS.get(d.name, "{}.") if d else "{}.",
    }
    official_hyperparameters = {
        "KG_WEIGHT": "kg_weight",
        "INSERT_LAYER": "layer",
        "INSERT_WEIGHT": "insert_weight",
        "N_CLASS_PROMPT": "n_tokens",
        "META_HIDDEN": "hidden",
        "FROZEN_TEMPLATE": "template",
        "TEMPLATE": "ending",
        "N_CTX": None,  # these two make the host, see from_official
        "CTX_INIT": None,
        "DATASET": None,  # stands for its templates, see official_hparams
        "CSC": None,  # the published code breaks where it is true
        "CLASS_TOKEN_POSITION": None,  # ignored: the name follows the context
        "W": None,  # ignored: the published code passes it on and reads it nowhere
        "PREC": None,  # the backbone's: load_clip(precision=...)
    }
    published = {
        "base-to-new": usual(
            "TCP: its base-to-new script",
            "50 epochs of Adam, 25 on ImageNet and SUN397, as its code has it; its"
            " readme asks for an epsilon of 1e-3. Over a named host, that host's run.",
        ),
        "few-shot": usual(
            "TCP: its base-to-new script",
            "The same. Its few-shot runs, of 4 shots, are not in its repository.",
            shots=(4,),
            extrapolation=True,
        ),
    } | transfer(
        usual(
            "TCP: its base-to-new script",
            "The same. Its cross-dataset runs are not in its repository.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        host: Method | None = None,
        kg_weight: float = 8.0,
        layer: int | list[int] | None = None,
        insert_weight: float | list[float] = 1.0,
        n_tokens: int | None = None,
        hidden: int | None = None,
        template: str | None = None,
        ending: str | None = None,
    ):
        _check_context(host)
        super().__init__(clip, classnames, host=host)
        blocks = len(clip.text_tower.blocks)
        layers = blocks * 2 // 3 if layer is None else layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        fits = layers and sorted(layers) == sorted({*layers} & {*range(blocks)})
        expect(fits, "layer", layer, f"blocks from 0 to {blocks - 1}, each once")
        weights = insert_weight
        if isinstance(weights, int | float):
            weights = [weights] * len(layers)
        fits = len(weights) == len(layers) and all(0 <= w <= 1 for w in weights)
        expect(fits, "insert_weight", insert_weight, "from 0 to 1, one for each layer")
        n_tokens = host.context.length if n_tokens is None else n_tokens
        hidden = max(clip.embed_dim // 4, 1) if hidden is None else hidden
        for name, value in (("n_tokens", n_tokens), ("hidden", hidden)):
            expect(value >= 1, name, value, "at least 1")
        expect(kg_weight >= 0, "kg_weight", kg_weight, "at least 0")
        for name, text in (("template", template), ("ending", ending)):
            expect(text is None or "{}" in text, name, text, "a text with {}")
        self.kg_weight = kg_weight
        self.inserted = list(zip(layers, weights, strict=True))
        self.meta_net = Embedding(clip.embed_dim, hidden, n_tokens, clip.width)

    def set_classes(self, classnames):
        """Aim at other classes; without a named host, the context's sentence ends as
        the dataset's do.
        """
        context = self.context
        if self.alone:
            context.ending = self.option("ending")
        elif self.hparams["ending"] is not None:
            raise InputError(
                f"the prompt of {self.spec} is its host's: leave ending out, or name no"
                " host"
            )
        before = self.clip.encode(context.ending.partition("{}")[0])
        room, n = context.length + len(before), self.meta_net.n
        fits = n <= room
        expect(fits, "n_tokens", n, f"at most the {room} tokens before the class name")
        super().set_classes(classnames)

    @cached_property
    def anchor(self):
        """g, (C, E), normalised: features of the hand-written prompts."""
        return zero_shot_features(self.clip, self.classnames, self.option("template"))

    def class_tokens(self):
        """T, (C, n, D): the tokens of each class."""
        return self.meta_net(self.anchor)

    def text_edit(self):
        _check_context(self.host)  # KAPT's words in front of it come with the classes
        start, tokens = self.context.start, self.class_tokens()
        edits = [Blend(layer, start, tokens, w) for layer, w in self.inserted]
        return Edits(super().text_edit(), *edits)

    def regularizer(self, batch, image, text):
        cosine = F.cosine_similarity(text, self.anchor, dim=-1)  # (C,), or (B, C)
        penalty = self.kg_weight * (1 - cosine.mean())
        return super().regularizer(batch, image, text) + penalty

    def official_names(self):
        own = self.meta_net.named_parameters(prefix="meta_net")
        own = {f"prompt_learner.{name}": name for name, _ in own}
        return super().official_names() | own

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any plug-in; a dataset stands for its templates, and of a template the
        first N_CTX words are the context's.
        """
        given = {k: v for k, v in hyperparameters.items() if v is not None}
        expect(not given.get("CSC"), "CSC", True, "False: one context for all classes")
        ours = super(Plugin, cls).official_hparams(given)
        if given.get("DATASET"):
            dataset = dataset_of(given["DATASET"])
            ours.setdefault("template", TEMPLATES.get(dataset, PLAIN))
            ours.setdefault("ending", ENDINGS.get(dataset, "{}."))
        if "TEMPLATE" in given:
            n = 4 if given.get("CTX_INIT") else given.get("N_CTX", 4)
            before, name, after = given["TEMPLATE"].partition("{}")
            words = before.split()
            fits = len(words) >= n
            expect(fits, "N_CTX", n, f"at most the {len(words)} words before the name")
            ours["ending"] = " ".join([*words[n:], name]) + after
        return ours

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, *, host=None, **objects):
        """As for any method; without a host N_CTX and CTX_INIT are its own context's,
        and any true CTX_INIT means "a photo of a".
        """
        own = cls.official_hparams(hyperparameters)
        if host is None:
            init = "a photo of a" if hyperparameters.get("CTX_INIT") else ""
            n_ctx = hyperparameters.get("N_CTX") or 4
            host = words_first({"n_ctx": n_ctx, "init": init})
        else:
            own.pop("ending", None)  # the host's prompt is its own
        return cls(clip, classnames, host=host, **own, **objects)

    @classmethod
    def recipe(cls, setting):
        """The published one; over a named host that host's, and over KgCoOp, which has
        it already, without a second penalty.
        """
        if setting.host is not None:
            own = {"kg_weight": 0.0} if "kgcoop" in setting.host.names else {}
            recipe = super().recipe(setting)
            return replace(recipe, hparams=recipe.hparams | own)
        epochs = 25 if setting.dataset in ("imagenet", "sun397") else 50
        return Recipe(epochs=epochs, optimizer="adam", options={"eps": 1e-3})


def _check_context(host) -> None:
    """A context at the same place for every class."""
    context = getattr(host, "context", None)
    if context is None or context.position != "end" or context.start is None:
        raise InputError(
            "tcp inserts tokens where the context is: its host must have one before"
            f" the class name, at the same place for each, as CoOp has, not {host.spec}"
        )
