"""ATPrompt: learned tokens anchored at a few attribute words.

Advancing Textual Prompt Learning with Anchored Attributes; Li et al., ICCV 2025; arXiv
2412.09442. The search for the words is :mod:`promptkit.attributes`.

Deviations: everything is float32 by default, where the published runs keep CLIP's
weights and the contexts in half precision. An attribute word has as many tokens as it
has, where the published code takes one of each and counts on (``one_token``). The words
are those of the dataset trained on, as in the paper; the published code puts a target's
own words between the source's tokens. Dropping deep tokens (``deep``) follows the
paper's text: no code of it was published. Its transfer runs test the best of several
seeds, here it is their mean; over DePT batches are of 4 (32 in the paper) and the head
has the host's rate, as released.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from promptkit.errors import InputError, expect
from promptkit.method import REGISTRY, Method, register
from promptkit.methods.coop import check_words
from promptkit.methods.dept import with_attributes
from promptkit.picture import Picture, learned
from promptkit.plugin import Plugin
from promptkit.prompts import Context
from promptkit.published import transfer, usual
from promptkit.recipe import Recipe
from promptkit.towers import Edits, Replace

# The paper's, that its search found for each dataset.
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
    # combinations of at most three words of promptkit.attributes.pool_of, on training
    # and validation images of base classes alone, in as many epochs as make 200 steps.
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
    def slot(self) -> int:
        """How many attributes stand before the class tokens."""
        n = len(self.attributes)
        return {"end": n, "middle": (n + 1) // 2, "front": 0}[self.position]

    @property
    def start(self):
        if self.one_token and self.position == "end":  # as if all T_j had T's length
            return 1 + len(self.attributes) * (1 + self.length)
        return self.template.starts[self.slot]

    def pattern(self, names):
        encode = self.clip.encode
        ids, extra = [encode(word) for word in self.attributes], []
        if self.one_token:
            blank, row = encode("X"), []
            for n, word in zip(self.n_att, ids, strict=True):
                row += blank * n + word
            row += blank * self.length
            counted = [sum(self.n_att[: j + 1]) + j for j in range(len(ids))]
            ids = [row[at : at + 1] for at in counted]
            extra = row[counted[-1] + 1 + self.length :]
        own, rest = [], []
        for name in names:
            tail = extra + encode(self.ending.replace("{}", name))
            size = len(encode(name))
            own.append(tail[:size])
            rest.append(tail[size:])
        pairs = list(zip(self.n_att, map(torch.tensor, ids), strict=True))
        first, second = sum(pairs[: self.slot], ()), sum(pairs[self.slot :], ())
        return [*first, self.length, own, *second, rest]

    def prompt(self, vectors=None):
        vectors = self.vectors if vectors is None else vectors
        before = list(self.before)
        return self.template(*before[: self.slot], vectors, *before[self.slot :])


@register
class ATPrompt(Plugin):
    r"""A host whose prompt says a few attributes before the class name, each behind
    learned tokens of its own.

    .. math:: t_c = [\mathrm{SOS}]\,[T_1]\,[\mathrm{color}]\,[T_2]\,[\mathrm{shape}]\,
       [T]\,[\mathrm{class}_c]\,[.]\,[\mathrm{EOT}]

    What the host does to its context (CoCoOp's shift, MaPLe's deep prompts and their
    projections) it does to the class tokens T alone; the rest enters at the input, and
    lives on as it is. The words are the paper's (`ATTRIBUTES`), or are found by
    :func:`promptkit.attributes.search_attributes`.

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
        text=("SOS", learned("$T_1$"), "color", learned("$T_2$"), "shape",
              learned("$T$"), "[class]", ".", "EOT")
    )  # fmt: skip
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
        "base-to-new": usual(
            "ATPrompt: its base-to-new runs",
            "Attributes, epochs and lengths by host and dataset, as its notes have"
            " them. Over hosts that its repository lacks, their own settings.",
        ),
        "few-shot": usual(
            "ATPrompt: its base-to-new runs",
            "The settings of base-to-new.",
            extrapolation=True,
        ),
    } | transfer(
        usual(
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
            clip, self.classnames, words, lengths, one_token=one_token,
            length=old.length, words=init or None, position=old.position,
            class_specific=old.class_specific, ending=old.ending,
        )  # fmt: skip
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
        # The published code always makes three attribute contexts.
        unused = [f"ctx_att{j}" for j in (1, 2, 3) if j > len(words)]
        self.official_dropped = (*self.official_dropped, "token_middle", *unused)

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

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any plug-in; attributes are counted as the published code does."""
        return {"one_token": True} | super().official_hparams(hyperparameters)

    @classmethod
    def recipe(cls, setting):
        """The paper's, by the innermost host and the dataset; over other hosts than
        CoOp, CoCoOp and MaPLe theirs, with the attributes of the dataset and, as T
        starts at random, without words of the host's own.
        """
        recipe, data, cross = setting.host.recipe, setting.dataset, setting.transfer
        own = {"attributes": ATTRIBUTES.get(data, DEFAULT).split()}
        context = {"init": "", "n_ctx": 4}
        match setting.host.names:
            case ("coop",):
                context["n_ctx"] = 4 if cross or data == "dtd" else 2
                epochs = 10 if cross or data == "imagenet" else 100
                recipe = Recipe(hparams=context, epochs=epochs)
            case ("cocoop",):
                long = data in ("stanford_cars", "oxford_flowers", "eurosat")
                context["n_ctx"] = 4 if cross or data == "ucf101" else 6 if long else 2
                epochs = 5 if cross else 10
                recipe = Recipe(hparams=context, epochs=epochs, batch_size=1)
            case ("maple",) if cross:
                recipe = replace(recipe, hparams=context | {"depth": 3})
            case ("maple",):
                context["n_ctx"] = 2 if data in ("fgvc_aircraft", "ucf101") else 4
                long = ("caltech101", "oxford_pets", "oxford_flowers", "eurosat")
                epochs = 10 if data in long else 5
                recipe = replace(recipe, hparams=context, epochs=epochs)
            case ("dept", "coop"):  # the same model as dept(atprompt(coop))
                theirs, dept = with_attributes(setting)
                recipe = replace(recipe, hparams=dept | {"host": theirs})
            case names:
                hparams = _wordless(recipe.hparams, names)
                recipe = replace(recipe, hparams=hparams)
        return replace(recipe, hparams=own | {"host": recipe.hparams})


def _wordless(hparams: dict, names: tuple[str, ...]) -> dict:
    """Hyperparameters of nested hosts, of which the innermost starts at random, with as
    many tokens as its words had.
    """
    if len(names) > 1:
        return hparams | {"host": _wordless(hparams.get("host", {}), names[1:])}
    known = REGISTRY[names[0]].hyperparameters()
    if "init" not in known:  # ProGrad's words are those of its template
        return hparams | ({"words": False} if "words" in known else {})
    four = {"n_ctx": 4} if known["n_ctx"][1] is None else {}
    return four | hparams | {"init": ""}


def check_attributes(words: list[str], lengths: list[int], n_att) -> None:
    """Raise an InputError unless there is a length from 0 for each attribute."""
    fits = words and all(word.strip() and "{}" not in word for word in words)
    expect(fits, "attributes", words, "one word or more, such as ['color', 'shape']")
    fits = len(lengths) == len(words) and all(n >= 0 for n in lengths)
    expect(fits, "n_att", n_att, f"from 0, or {len(words)} of them, one an attribute")
