"""KAPT: encyclopedia texts of the classes, as words, as learned tokens and as queries.

Knowledge-Aware Prompt Tuning for Generalizable Vision-Language Models; Kan et al., ICCV
2023; arXiv 2308.11186.

This is a reconstruction. There is no public code, and of the paper only the abstract,
the summary of its method and the caption of its overview could be read. Those state
that texts of the classes are retrieved; that a summary in words (the discrete prompt)
and learned tokens made from the whole text (the continuous prompt) stand before the
class name; and that an adaptation head gathers cues from the visual tokens, conditioned
on the text features. All equations, sizes and settings here are ours, and satisfy that.
"""

import re
import warnings
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import nn

from promptkit.descriptions import by_class, said_of
from promptkit.errors import expect
from promptkit.method import Method, register
from promptkit.picture import Bridge, Picture, Target, learned, made
from promptkit.prompts import Context, Template
from promptkit.published import Published, everywhere
from promptkit.recipe import Recipe

WORDS, TOKENS = 12, 20  # the most that a summary of our making has


class SummaryContext(Context):
    """A context with other words before it for each class: SOS | summary_c | v_c | name
    . EOT. A summary that does not fit loses its last tokens.
    """

    summaries: dict[str, str] = {}  # by class name

    def pattern(self, names):
        said = [self.clip.encode(self.summaries.get(name, "")) for name in names]
        tails = [self.clip.encode(self.ending.replace("{}", name)) for name in names]
        room = self.clip.context_length - 2 - self.length  # SOS and EOT
        pairs = zip(said, tails, strict=True)
        said = [ids[: max(room - len(tail), 0)] for ids, tail in pairs]
        return [said, self.length, tails]


class Prompter(nn.Module):
    """A bottleneck of two layers from text features (C, E) to shifts of M tokens, (C,
    M, D); zero at first.
    """

    def __init__(self, features: int, hidden: int, length: int, width: int):
        super().__init__()
        first, self.length = nn.Linear(features, hidden), length
        self.w1, self.b1 = first.weight, first.bias
        self.w2 = nn.Parameter(torch.zeros(length * width, hidden))
        self.b2 = nn.Parameter(torch.zeros(length * width))

    def forward(self, x):
        h = F.relu(F.linear(x, self.w1, self.b1))
        return F.linear(h, self.w2, self.b2).unflatten(-1, (self.length, -1))


class Head(nn.Module):
    """Attention of C class features over the visual tokens of each image; what it adds
    is zero at first.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (
            nn.Parameter(torch.empty(width, width).normal_(0, width**-0.5))
            for _ in range(3)
        )
        self.out = nn.Parameter(torch.zeros(width, width))

    def attention(self, tokens, text):
        """a, (B, C, H, N), of normalised class features (C, E) over visual tokens (B,
        N, E).
        """
        q = F.linear(text, self.q).unflatten(-1, (self.heads, -1))  # (C, H, d)
        k = F.linear(tokens, self.k).unflatten(-1, (self.heads, -1))  # (B, N, H, d)
        scores = torch.einsum("chd,bnhd->bchn", q, k)
        return (scores * q.shape[-1] ** -0.5).softmax(dim=-1)

    def gather(self, attention, tokens):
        """h, (B, C, E): what each of C classes attends to; their mean attention gives
        their mean.
        """
        v = F.linear(tokens, self.v).unflatten(-1, (self.heads, -1))  # (B, N, H, d)
        heads = torch.einsum("bchn,bnhd->bchd", attention, v)
        return F.linear(heads.flatten(2), self.out)


@register
class KAPT(Method):
    r"""Prompts with what is known of a class, and image features that look for it.

    With the frozen, normalised feature g_c of the description of class c, its summary
    S_c, and all visual tokens Z of an image, the class token first,

    .. math:: V_c = P + W_2\,\mathrm{ReLU}(W_1 g_c + b_1) + b_2, \qquad
       t_c = [\mathrm{SOS}]\,[S_c]\,[V_c]\,[\mathrm{class}_c]\,[.]\,[\mathrm{EOT}],

    .. math:: h_c = W_o\,\mathrm{Attention}(W_q \hat w_c, W_k Z, W_v Z), \qquad
       z = s\,\cos\Bigl(Z_0 + \frac1C \sum_{c'} h_{c'},\ w_c\Bigr)

    with w_c the text feature of t_c. At first it is CLIP with summaries and a random
    context: W_2, b_2 and W_o start at zero. A class without a description has no
    summary, and its bare name for a text.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        n_ctx: M, the number of learned tokens.
        bottleneck: width of the network that makes them.
        heads: of the attention; must divide the width of the features.
        head: "pooled": one image feature with the mean cue of the classes, as above, so
            that a score depends on which classes there are; "per_class": each class has
            its own; "none": the class token alone, the ablation.
        discrete, continuous: have S_c, and what g_c adds to P; False: the ablations.
        descriptions: ``{class name: [sentence, ...]}``. None: those of the dataset that
            it is aimed at.
        summaries: ``{class name: words}``. None: the first 12 words of each description
            that are no stop words and not in the class name, of at most 20 tokens.
        scale: s. None: CLIP's own.

    Raises:
        InputError: a hyperparameter or a class name does not fit, or the whole is too
            long for the text tower even without a summary.
    """

    name = "kapt"
    title = "KAPT"
    year = 2023
    paper = "2308.11186"
    kind = "prompt"
    reads = "features+tokens"
    reads_sentences = True
    picture = Picture(
        text=("SOS", "summary", made("$V_c$"), "[class]", ".", "EOT"),
        text_reference=Target("description\nin frozen CLIP"),
        image_out=learned("adaptation head"),
        bridges=(Bridge(learned("prompter"), "text reference", "text tokens"),),
        note="the head attends from the class features to all visual tokens",
    )
    from_dataset = {
        "descriptions": lambda dataset: dict(dataset.descriptions) if dataset else {}
    }
    official_hyperparameters = {
        "n_ctx": "n_ctx",
        "bottleneck": "bottleneck",
        "heads": "heads",
        "head": "head",
        "logit_scale": "scale",
        "descriptions": "descriptions",
        "summaries": "summaries",
        "new_classnames": None,  # further classes of the lists, see from_official
        "new_descriptions": None,
        "new_summaries": None,
    }
    published = everywhere(
        Published(
            (),
            (16,),
            "KAPT: a reconstruction",
            "The settings are CoOp's, of 50 epochs, and not the paper's.",
            extrapolation=True,
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        n_ctx: int = 4,
        bottleneck: int = 32,
        heads: int = 8,
        head: Literal["pooled", "per_class", "none"] = "pooled",
        discrete: bool = True,
        continuous: bool = True,
        descriptions: dict | None = None,
        summaries: dict | None = None,
        scale: float | None = None,
    ):
        super().__init__(clip, classnames)
        for name, value in (("n_ctx", n_ctx), ("bottleneck", bottleneck)):
            expect(value >= 1, name, value, "at least 1")
        fits = heads >= 1 and clip.embed_dim % heads == 0
        expect(fits, "heads", heads, f"a divisor of the {clip.embed_dim} features")
        expect(scale is None or scale > 0, "scale", scale, "above 0")
        for name, given in (("descriptions", descriptions), ("summaries", summaries)):
            texts = sum(map(sentences, (given or {}).values()), [])
            fits = all(isinstance(text, str) for text in texts)
            expect(fits, name, given, "a dictionary of texts by class name")
        self.discrete, self.pooling, self.scale = discrete, head, scale
        self.context = SummaryContext(clip, self.classnames, n_ctx)
        sizes = clip.embed_dim, bottleneck, n_ctx, clip.width
        self.prompter = Prompter(*sizes) if continuous else None
        self.head = None if head == "none" else Head(clip.embed_dim, heads)
        self.reads = "features" if head == "none" else "features+tokens"

    # --- what is known of the classes -------------------------------------------------

    def told(self, texts: dict) -> list[str]:
        """What texts say of each class, in one; empty where they say nothing."""
        return [" ".join(sentences(x or "")) for x in said_of(texts, self.classnames)]

    @property
    def knowledge(self) -> list[str]:
        """K_c: the text of each class, its bare name where nothing is said of it."""
        told = zip(self.told(self.option("descriptions")), self.classnames, strict=True)
        return [text or name for text, name in told]

    @property
    def summary(self) -> list[str]:
        """S_c of each class, empty where nothing is said of it."""
        if not self.discrete:
            return [""] * len(self.classnames)
        if self.hparams["summaries"] is not None:
            return self.told(self.hparams["summaries"])
        pairs = zip(self.knowledge, self.classnames, strict=True)
        return [summarised(text, name, self.clip.encode) for text, name in pairs]

    def set_classes(self, classnames):
        """Aim at other classes and what is known of them."""
        super().set_classes(classnames)
        said = self.option("descriptions")
        told = zip(self.told(said), self.classnames, strict=True)
        lacking = [name for text, name in told if not text]
        if said and lacking:
            warnings.warn(
                f"nothing is said of {lacking[0]!r} and {len(lacking) - 1} others in"
                f" the descriptions of {self.spec}: their names stand alone",
                stacklevel=2,
            )
        self.context.summaries = dict(zip(self.classnames, self.summary, strict=True))
        self.context.set_classes(self.classnames)

    @cached_property
    def described(self):
        """g, (C, E): the frozen, normalised features of the classes' texts, which are
        cut where they are longer than the text tower reads.
        """
        prompt = Template(self.clip, self.classnames, [self.knowledge], truncate=True)()
        with torch.no_grad():
            return F.normalize(self.clip.text(prompt)[0], dim=-1)

    def vectors(self, image_features=None):
        """V, (C, M, D), or P, (M, D), without a continuous part."""
        P = self.context.vectors
        return P if self.prompter is None else P + self.prompter(self.described)

    # --- the image side ---------------------------------------------------------------

    def encode(self, batch):
        """Z, (B, 1 + N, E): the class token, then the local tokens; unnormalised. The
        class token alone, (B, E), without a head.
        """
        image = super().encode(batch)
        if self.head is None:
            return image
        return torch.cat([image[:, None], batch.tokens], dim=1)

    def score(self, image, text):
        """Logits (B, C) of visual tokens (B, 1 + N, E), or of the class token alone,
        (B, E), and class features (C, E).
        """
        Z = image.float() if image.dim() == 3 else image[:, None].float()
        w = F.normalize(text.float(), dim=-1)
        z = Z[:, :1]  # (B, 1, E)
        if self.head is not None:
            a = self.head.attention(Z, w)  # (B, C, H, 1 + N)
            if self.pooling == "pooled":
                a = a.mean(dim=1, keepdim=True)
            z = z + self.head.gather(a, Z)  # (B, 1 or C, E)
        scale = self.clip.logit_scale if self.scale is None else self.scale
        return scale * (F.normalize(z, dim=-1) * w).sum(dim=-1)

    def official_names(self):
        """There is no repository: the reconstruction's own."""
        names = {name: name for name, _ in self.named_parameters()}
        return {"context": names.pop("context.vectors")} | names

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, **objects):
        """As for any method; texts may be lists in the order of the classes, and of
        ``new_classnames`` behind them.
        """
        ours = cls.official_hparams(hyperparameters)
        lists = ("descriptions", "summaries")
        ours = by_class(ours, hyperparameters, classnames, *lists)
        return cls(clip, classnames, **ours, **objects)

    @classmethod
    def recipe(cls, setting):
        """CoOp's optimisation, 50 epochs, 10 on ImageNet; ours, as all of it."""
        return Recipe(epochs=10 if setting.dataset == "imagenet" else 50)


def sentences(texts) -> list[str]:
    """One text or several, as a list."""
    return [texts] if isinstance(texts, str) else list(texts)


def summarised(text: str, name: str, encode) -> str:
    """The first words of a text that are no stop words, no words of the class name and
    no repetitions.
    """
    left = ENGLISH_STOP_WORDS | set(re.findall(r"[\w-]+", name.lower()))
    words = [w for w in re.findall(r"[\w-]+", text.lower()) if w not in left]
    words = list(dict.fromkeys(words))[:WORDS]
    while len(encode(" ".join(words))) > TOKENS:
        words.pop()
    return " ".join(words)
