"""ATPrompt: learned tokens anchored at a few attribute words, and the search for them.

Advancing Textual Prompt Learning with Anchored Attributes; Li et al., ICCV 2025; arXiv
2412.09442.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights and the contexts in half precision. An attribute word has as many tokens as it
has, where the published code takes one of each and counts on (``one_token``). The words
are those of the dataset trained on, as in the paper; the published code puts a target's
own words between the source's tokens. The search samples its validation batches, where
that code sees the same first 100 images at each step. Dropping deep tokens (``deep``)
follows the paper's text: no code of it was published.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Literal

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import nn

from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.methods.coop import check_words
from promptkit.picture import Picture, learned
from promptkit.plugin import Plugin
from promptkit.prompts import Context
from promptkit.published import Published, transfer
from promptkit.recipe import Recipe, learning_rate
from promptkit.towers import Edits, Prompt, Replace
from promptkit.train import make_optimizer, reader, shuffled

# The paper's: five words that a language model proposed, and those that were found.
BASES = {
    "imagenet": "color size shape habitat behavior",
    "caltech101": "shape color material function size",
    "oxford_pets": "loyalty affection playfulness energy intelligence",
    "stanford_cars": "design engine performance luxury color",
    "oxford_flowers": "color flower habitat growth season",
    "food101": "flavor texture origin ingredients preparation",
    "fgvc_aircraft": "design capacity range engines liveries",
    "sun397": "architecture environment structure design function",
    "dtd": "pattern texture color design structure",
    "eurosat": "habitat foliage infrastructure terrain watercourse",
    "ucf101": "precision coordination technique strength control",
}
ATTRIBUTES = {
    "imagenet": "color shape",
    "caltech101": "shape size",
    "oxford_pets": "playfulness energy",
    "stanford_cars": "luxury",
    "oxford_flowers": "color habitat growth",
    "food101": "flavor preparation",
    "fgvc_aircraft": "design range",
    "sun397": "function",
    "dtd": "pattern color design",
    "eurosat": "habitat",
    "ucf101": "precision",
    # Of the mini world's tasks: what search_attributes finds with seed 1 among all
    # combinations of at most three words of pool_of, on training and validation images
    # of base classes alone, in as many epochs as make 200 steps.
    "mini": "tail",
    "objects": "shape",
    "pets": "tail body slim",
    "cars": "wheels",
    "flowers": "center leaves pointed",
    "food": "square dots bowl",
    "planes": "wings tail fuselage",
    "scenes": "sun",
    "textures": "curved",
    "sat": "ground bright dark",
    "actions": "legs",
}
DEFAULT = "color shape"  # ImageNet's, for all other data


class AttributeContext(Context):
    """A context whose class tokens T stand behind attribute words A_j, each of which
    has learned tokens T_j before it::

        end:    SOS | T_1 | A_1 | T_2 | A_2 | T | name . EOT
        middle: SOS | T_1 | A_1 | T | name | T_2 | A_2 | . EOT
        front:  SOS | T | name | T_1 | A_1 | T_2 | A_2 | . EOT

    Args:
        attributes: the words, in order.
        n_att: the length of each T_j.
        one_token: as the published code counts: an attribute has one token, and where
            it has more, what was counted too few stands before the name.
        others: as for :class:`~promptkit.prompts.Context`.
    """

    def __init__(
        self, clip, classnames, attributes, n_att, *, one_token=False, **others
    ):
        self.attributes, self.n_att, self.one_token = attributes, n_att, one_token
        super().__init__(clip, classnames, **others)
        self.before = nn.ParameterList(
            torch.empty(n, clip.width).normal_(0, 0.01) for n in n_att
        )

    @property
    def ahead(self) -> int:
        """How many attributes stand before the class name."""
        n = len(self.attributes)
        return {"end": n, "middle": (n + 1) // 2, "front": 0}[self.position]

    @property
    def slot(self):
        return sum(n > 0 for n in self.n_att[: self.ahead])

    @property
    def start(self):
        if self.one_token and self.position == "end":  # as if all T_j had T's length
            return 1 + len(self.attributes) * (1 + self.length)
        return self.template.starts[self.slot]

    def pattern(self, names):
        ids, heads = [self.clip.encode(word) for word in self.attributes], []
        if self.one_token:
            blank = self.clip.encode("X")
            row = sum(
                (blank * n + word for n, word in zip(self.n_att, ids, strict=True)), []
            )
            row += blank * self.length
            counted = [sum(self.n_att[: j + 1]) + j for j in range(len(ids))]
            ids = [row[at : at + 1] for at in counted]
            heads = row[counted[-1] + 1 + self.length :]
        tails = [
            heads + self.clip.encode(self.ending.replace("{}", name)) for name in names
        ]
        sizes = [len(self.clip.encode(name)) for name in names]
        own = [tail[:n] for tail, n in zip(tails, sizes, strict=True)]
        rest = [tail[n:] for tail, n in zip(tails, sizes, strict=True)]
        groups = [
            [*([n] if n else []), torch.tensor(word)]
            for n, word in zip(self.n_att, ids, strict=True)
        ]
        first, second = sum(groups[: self.ahead], []), sum(groups[self.ahead :], [])
        if self.position == "end":
            return [*first, self.length, tails]
        return [*first, self.length, own, *second, rest]

    def prompt(self, vectors=None):
        vectors = self.vectors if vectors is None else vectors
        before = [tokens for tokens in self.before if len(tokens)]
        return self.template(*before[: self.slot], vectors, *before[self.slot :])


@register
class ATPrompt(Plugin):
    r"""A host whose prompt says a few attributes before the class name, each behind
    learned tokens of its own.

    .. math:: t_c = [\mathrm{SOS}]\,[T_1]\,[\mathrm{color}]\,[T_2]\,[\mathrm{shape}]\,
       [T]\,[\mathrm{class}_c]\,[.]\,[\mathrm{EOT}]

    What the host does to its context (CoCoOp's shift, MaPLe's deep prompts and their
    projections) it does to the class tokens T alone; the rest enters at the input, and
    lives on as it is. The words are found by :func:`search_attributes`, or are the
    paper's (`ATTRIBUTES`).

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        host: the method to extend. The number of its tokens is T's, and where it puts
            the class name ("middle" and "front" as in :class:`AttributeContext`).
        attributes: the words. None: "color" and "shape".
        n_att: how many tokens T_j stand before each, or before all alike. None: as many
            as in T. 0: none, the words stand together.
        init: words that T starts from; empty: normal, std 0.02. The host's own words
            play no part.
        deep: what happens to T_j and the words in the blocks where the host replaces
            its prompts. "retain": nothing. "partial": T_j is replaced too, by learned
            tokens of the block. "full": and the words by their embeddings.
        one_token: an attribute has one token, and deep prompts stand where all T_j as
            long as T put them, as in the published code, for its checkpoints.

    Raises:
        InputError: a hyperparameter, the host or a class name does not fit, or the
            whole is too long for the text tower.
    """

    name = "atprompt"
    title = "ATPrompt"
    year = 2024
    paper = "2412.09442"
    kind = "plug-in"
    hosts = ("coop", "cocoop", "kgcoop", "maple", "dept(coop)")
    picture = Picture(
        text=(
            "SOS",
            learned("$T_1$"),
            "color",
            learned("$T_2$"),
            "shape",
            learned("$T$"),
            "[class]",
            ".",
            "EOT",
        )
    )
    official_hyperparameters = {
        "attributes": "attributes",
        "n_att": "n_att",
        "one_token": "one_token",
        "host": None,  # this and what the host takes: it is named and made already
        "n_ctx": None,
        "class_token_position": None,
        "prompt_depth": None,
    }
    published = {
        "base-to-new": Published(
            ("ViT-B-16",),
            (16,),
            "ATPrompt: its base-to-new runs",
            "Attributes, epochs and lengths by host and dataset, as its notes have"
            " them. Over hosts that its repository lacks, their own settings.",
        ),
        "few-shot": Published(
            ("ViT-B-16",),
            (16,),
            "ATPrompt: its base-to-new runs",
            "The settings of base-to-new.",
            extrapolation=True,
        ),
    } | transfer(
        Published(
            ("ViT-B-16",),
            (16,),
            "ATPrompt: its cross-dataset runs",
            "Over CoOp 10 epochs, CoCoOp 5, MaPLe 2 of depth 3; ImageNet's attributes"
            " on all targets, and all of their classes.",
        )
    )

    def __init__(
        self,
        clip,
        classnames,
        *,
        host: Method,
        attributes: list[str] | None = None,
        n_att: int | list[int] | None = None,
        init: str = "",
        deep: Literal["retain", "partial", "full"] = "retain",
        one_token: bool = False,
    ):
        super().__init__(clip, classnames, host=host)
        old = getattr(host, "context", None)
        if type(old) is not Context:
            raise InputError(
                "atprompt puts attributes around a learned context: its host must have"
                f" one, as CoOp has, not {host.spec}"
            )
        words = DEFAULT.split() if attributes is None else list(attributes)
        n_att = old.length if n_att is None else n_att
        lengths = [n_att] * len(words) if isinstance(n_att, int) else list(n_att)
        check_attributes(words, lengths, n_att)
        check_words(old.length, init)
        self.host.nest()[-1].context = AttributeContext(
            clip,
            self.classnames,
            words,
            lengths,
            one_token=one_token,
            length=old.length,
            words=init or None,
            position=old.position,
            class_specific=old.class_specific,
            ending=old.ending,
        )
        edit = host.text_edit()
        blocks = sorted(edit.prompts) if isinstance(edit, Replace) else []
        expect(deep == "retain" or blocks, "deep", deep, "'retain' over a shallow host")
        self.blocks = () if deep == "retain" else blocks
        self.deep = nn.ParameterList(
            torch.empty(n, clip.width).normal_(0, 0.01)
            for _ in self.blocks
            for n in lengths
        )
        self.words = deep == "full"
        dropped = tuple(f"token_middle{n or ''}" for n in range(4))
        self.official_dropped = (*self.official_dropped, *dropped)

    def text_edit(self):
        context, edits = self.context, []
        ids = [self.clip.encode(word) for word in context.attributes]
        for at, block in enumerate(self.blocks):
            start = 1
            for j, (n, word) in enumerate(zip(context.n_att, ids, strict=True)):
                tokens = self.deep[at * len(ids) + j]
                if self.words:
                    tokens = torch.cat([tokens, self.clip.embed(word)])
                edits.append(Replace({block: (start, tokens)}))
                start += n + len(word)
        return Edits(super().text_edit(), *edits) if edits else super().text_edit()

    def official_names(self):
        names, path = super().official_names(), "host." * (len(self.nest()) - 1)
        for j in range(len(self.context.before)):
            names[f"prompt_learner.ctx_att{j + 1}"] = f"{path}context.before.{j}"
        return names

    def official_state(self, state):
        """The published code always makes three attribute contexts; those that it does
        not use are dropped.
        """
        unused = [
            f"ctx_att{j + 1}" for j in range(3) if j >= len(self.context.attributes)
        ]
        kept = {k: v for k, v in state.items() if k.rpartition(".")[2] not in unused}
        return super().official_state(kept)

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any plug-in; attributes are counted as the published code does."""
        return {"one_token": True} | super().official_hparams(hyperparameters)

    @classmethod
    def recipe(cls, setting):
        """The paper's, by the innermost host and the dataset; over other hosts than
        CoOp, CoCoOp and MaPLe theirs, with the attributes of the dataset.
        """
        theirs, data, cross = setting.host.recipe, setting.dataset, setting.transfer
        own = {"attributes": ATTRIBUTES.get(data, DEFAULT).split()}
        context = {"init": "", "n_ctx": 4}
        if len(setting.host.names) > 1:
            recipe = theirs
        elif setting.host.names[0] == "coop":
            context["n_ctx"] = 4 if cross or data == "dtd" else 2
            epochs = 10 if cross or data == "imagenet" else 100
            recipe = Recipe(hparams=context, epochs=epochs)
        elif setting.host.names[0] == "cocoop":
            long = ("stanford_cars", "oxford_flowers", "eurosat")
            length = 6 if data in long else 4 if data == "ucf101" else 2
            context["n_ctx"] = 4 if cross else length
            recipe = Recipe(hparams=context, epochs=5 if cross else 10, batch_size=1)
        elif setting.host.names[0] == "maple" and cross:
            recipe = replace(theirs, hparams=context | {"depth": 3})
        elif setting.host.names[0] == "maple":
            context["n_ctx"] = 2 if data in ("fgvc_aircraft", "ucf101") else 4
            long = ("caltech101", "oxford_pets", "oxford_flowers", "eurosat")
            epochs = 10 if data in long else 5
            recipe = replace(theirs, hparams=context, epochs=epochs)
        else:
            recipe = theirs
        return replace(recipe, hparams=own | {"host": recipe.hparams})


def with_dept(dataset: str) -> tuple[int, float]:
    """The number of tokens and the weight of DePT's second head in the paper's runs of
    DePT over ATPrompt over CoOp.
    """
    n_ctx = 2 if dataset in ("oxford_pets", "stanford_cars") else 4
    weights = {"caltech101": 0.6, "dtd": 0.6, "stanford_cars": 0.6, "ucf101": 0.5}
    return n_ctx, weights.get(dataset, 0.7)


def check_attributes(words: list[str], lengths: list[int], n_att) -> None:
    """Raise an InputError unless there is a length from 0 for each attribute."""
    fits = words and all(word.strip() and "{}" not in word for word in words)
    expect(fits, "attributes", words, "one word or more, such as ['color', 'shape']")
    fits = len(lengths) == len(words) and all(n >= 0 for n in lengths)
    expect(fits, "n_att", n_att, f"from 0, or {len(words)} of them, one an attribute")


# --- the search -----------------------------------------------------------------------


class AttributeSearch(Method):
    r"""All combinations of a few words at once, each with learned tokens of its own and
    a weight.

    With the class features W_k of CoOp's prompts with the attributes of combination k,

    .. math:: z = \sum_k \mathrm{softmax}(\alpha)_k \; s\,\hat f^\top \hat W_k

    Tokens and weights are trained in turns, see :meth:`step`.

    Args:
        bases: the words to combine, in order.
        n_ctx: tokens before the class name.
        n_att: tokens before each attribute; None: as many.
        most: of the words that a combination has; None: all of them.
        only: these combinations alone, in place of all.
        one_token: as in :class:`ATPrompt`.
    """

    def __init__(
        self,
        clip,
        classnames,
        *,
        bases: list[str],
        n_ctx: int = 4,
        n_att: int | None = None,
        most: int | None = None,
        only: list[list[str]] | None = None,
        one_token: bool = False,
    ):
        super().__init__(clip, classnames)
        n_att = n_ctx if n_att is None else n_att
        check_attributes(bases, [n_att] * len(bases), n_att)
        expect(len({*bases}) == len(bases), "bases", bases, "different words")
        most = len(bases) if most is None else most
        expect(1 <= most <= len(bases), "most", most, f"from 1 to {len(bases)}")
        sizes = range(1, most + 1)
        every = [list(c) for n in sizes for c in combinations(bases, n)]
        fits = only is None or (only and all(words in every for words in only))
        expect(fits, "only", only, f"some of the combinations of {bases}")
        self.combinations = every if only is None else only
        self.contexts = nn.ModuleList(
            AttributeContext(
                clip,
                self.classnames,
                words,
                [n_att] * len(words),
                one_token=one_token,
                length=n_ctx,
            )
            for words in self.combinations
        )
        self.alpha = nn.Parameter(torch.rand(len(self.combinations)))

    def set_classes(self, classnames):
        super().set_classes(classnames)
        for context in self.contexts:
            context.set_classes(self.classnames)

    @property
    def weights(self):
        """(K,), the share of each combination."""
        return self.alpha.softmax(dim=0)

    def text_features(self, image_features=None):
        """(K, C, E): prompts of one length go through the tower together, as groups."""
        prompts = [context.prompt() for context in self.contexts]
        alike = {}
        for k, prompt in enumerate(prompts):
            alike.setdefault(
                (prompt.prefix.shape[1], prompt.suffix.shape[1]), []
            ).append(k)
        parts, order = [], sum(alike.values(), [])
        for ks in alike.values():
            suffix = torch.stack([prompts[k].suffix for k in ks])
            prefix = torch.cat([prompts[k].prefix for k in ks])
            parts.append(self.clip.text(Prompt(prefix, suffix, prompts[ks[0]].eot)))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def each(self, image, text):
        """Logits of each combination, (K, B, C)."""
        image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
        return self.clip.logit_scale * image @ text.transpose(1, 2)

    def score(self, image, text):
        return torch.einsum("k,kbc->bc", self.weights, self.each(image, text))

    def param_groups(self, recipe):
        return [{"params": list(self.contexts.parameters())}]

    def step(self, batch, validation, theta, alpha):
        """The tokens follow a training batch, then the weights a validation batch, each
        with the other held still.

        Args:
            theta, alpha: the optimizers.

        Returns:
            Both losses, each before its step.
        """
        theta.zero_grad()
        trained = self.loss(batch)
        trained.backward()
        theta.step()
        with torch.no_grad():
            image, text = self.encode(validation), self.text_features()
        alpha.zero_grad()
        validated = self.criterion(validation, image, text)
        validated.backward()
        alpha.step()
        return trained.item(), validated.item()


@dataclass
class Found:
    """What a search went through."""

    combinations: list[list[str]]  # K of them
    weights: torch.Tensor  # (epochs + 1, K), of the start and after each epoch
    losses: list[tuple[float, float]]  # of the tokens and of the weights, one a step

    @property
    def best(self) -> list[str]:
        """The combination of the largest weight: pass it as ``attributes``."""
        return self.combinations[self.weights[-1].argmax()]


def search_attributes(
    clip,
    dataset,
    bases: list[str] | None = None,
    *,
    recipe: Recipe | None = None,
    seed: int = 1,
    alpha_lr: float = 0.02,
    validation: int = 100,
    **options,
) -> Found:
    """Which attributes to anchor the prompts of a dataset at, by gradient descent.

    Args:
        dataset: the few-shot training images, of the base classes alone where new ones
            shall stay unseen, and its validation images. Without such, or where they
            are the test images, half of the training images take their place.
        bases: the words. None: the paper's for this dataset, else :func:`pool_of`.
        recipe: of the tokens. None: the paper's 40 epochs.
        alpha_lr: learning rate of the weights' Adam.
        validation: images of a validation batch, at most.
        options: of :class:`AttributeSearch`.

    Raises:
        InputError: there are too few images or no words, or an option does not fit.
    """
    dataset = dataset.for_training()
    recipe = Recipe(epochs=40) if recipe is None else recipe
    if bases is None:
        bases = BASES.get(dataset.name, "").split() or pool_of(dataset)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        search = AttributeSearch(clip, dataset.classnames, bases=bases, **options)
    train, val = dataset.train, dataset.val
    if len(val) == 0:
        rows = train.labels.argsort(stable=True)
        train, val = train.take(rows[::2].tolist()), train.take(rows[1::2].tolist())
    if len(train) == 0 or len(val) == 0:
        raise InputError(f"{dataset.name} has too few images to search attributes on")
    read, read_val = (
        reader(search, train, generator, recipe),
        reader(search, val, generator, replace(recipe, augment=False)),
    )
    theta = make_optimizer(search, recipe)
    alpha = torch.optim.Adam([search.alpha], lr=alpha_lr, betas=(0.5, 0.999))
    curve, losses = [search.weights.detach().clone()], []
    for epoch in range(recipe.epochs):
        for group in theta.param_groups:
            group["lr"] = learning_rate(recipe, epoch, group["peak_lr"])
        batches = shuffled(len(train), recipe.batch_size, generator)
        for rows in islice(batches, recipe.steps(len(train))):
            chosen = torch.randperm(len(val), generator=generator)[:validation]
            pair = (read(rows).to(clip.device), read_val(chosen).to(clip.device))
            losses.append(search.step(*pair, theta, alpha))
        curve.append(search.weights.detach().clone())
    return Found(search.combinations, torch.stack(curve).cpu(), losses)


def pool_of(dataset, n: int = 5) -> list[str]:
    """The n words that the descriptions of most classes share: what is said of all
    classes is an attribute, and what differs its value. In place of a language model's
    list; ties go by the order of the descriptions.

    Raises:
        InputError: the dataset has no descriptions, or they share no words.
    """
    names = set(re.findall(r"[a-z]+", " ".join(dataset.classnames).lower()))
    counts = Counter()
    for name in dataset.classnames:
        said = " ".join(dataset.descriptions.get(name, [])).lower()
        words = dict.fromkeys(re.findall(r"[a-z]{3,}", said))
        counts.update(w for w in words if w not in ENGLISH_STOP_WORDS | names)
    if not counts:
        raise InputError(
            f"{dataset.name} has no descriptions to take attributes from: name them,"
            " bases=['color', 'shape', ...]"
        )
    return [word for word, _ in counts.most_common(n)]
