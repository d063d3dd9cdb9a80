"""WaffleCLIP: random words in the place of descriptions, and the baselines that it
questions.

Waffling around for Performance: Visual Classification with Random Words and Broad
Concepts; Roth et al., ICCV 2023; arXiv 2306.07282.

Deviations: class names stand in the sentences directly, where the published code
replaces the name of one class by another in the finished sentence, prefix and all;
scores are multiplied by CLIP's logit scale; the default words are the most frequent
ones of CLIP's own vocabulary. The random draws are those of the published code, number
by number.
"""

import math
import string
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.recipe import Recipe

N_WORDS = 4330  # of the default list; the published one is as long


@register
class WaffleCLIP(Method):
    r"""A class is a list of sentences, "A photo of a [class], which has [something].",
    and its score their mean cosine.

    .. math:: p(y = c \mid x) \propto \exp\Bigl(s\,\frac1n \sum_{i=1}^{n} \cos(f(x), g(t_{c,i}))\Bigr)

    WaffleCLIP's sentences end in random words and random strings of characters, in
    turns and the same for all classes. Nothing is learned.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        mode: what the sentences say. "waffle"; "waffle_characters": random strings
            alone; "clip": nothing; "gpt_descriptions": the descriptors of the class;
            "waffle_and_gpt": a mixture of both; and of descriptors torn from their
            classes: "random_descriptions": each class draws from all,
            "shared_random_descriptions": one draw for all classes,
            "swapped_descriptions": each class has those of another,
            "scrambled_descriptions": the words of its own in random order and number.
        concept: what all classes are, for "A photo of a [concept]: a [class]"; empty:
            none.
        pairs: random words and random strings, so many of each.
        repetition: of the random draws. None: it follows from the seed that the method
            is built with.
        descriptors: ``{class name: [descriptor, ...]}``. None: those of the dataset
            that it is aimed at.
        words: to draw random words from. None: the 4,330 most frequent ones of CLIP's
            vocabulary.
        underscores: the names had underscores for spaces, which the statistics of the
            random strings then count as letters, as in the published runs on Food101.
            None: as they are in the dataset that it is aimed at.
        aggregate: "mean" or "max" of the cosines, or "merge": the cosine with the
            normalised mean.

    Raises:
        InputError: a hyperparameter does not fit, or the mode needs descriptors and a
            class has none.
    """

    name = "waffleclip"
    title = "WaffleCLIP"
    year = 2023
    paper = "2306.07282"
    kind = "training-free"
    supervision = "none"
    from_dataset = {
        "descriptors": lambda dataset: dataset.descriptions if dataset else {},
        "underscores": lambda dataset: (
            dataset is not None and any("_" in name for name in dataset.classnames)
        ),
    }
    official_hyperparameters = {
        "mode": "mode",
        "concept": "concept",
        "waffle_count": "pairs",
        "reps": "repetition",
        "aggregate": "aggregate",
        "descriptors": "descriptors",
        "word_list": "words",
        "label_before_text": None,
        "concept_label_before_text": None,
        "label_after_text": None,
        "descriptor_separator": None,
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        mode: Literal[
            "waffle", "waffle_characters", "clip", "gpt_descriptions", "waffle_and_gpt", "random_descriptions",
            "shared_random_descriptions", "swapped_descriptions", "scrambled_descriptions",
        ] = "waffle",
        concept: str = "",
        pairs: int = 15,
        repetition: int | None = None,
        descriptors: dict | None = None,
        words: list[str] | None = None,
        underscores: bool | None = None,
        aggregate: Literal["mean", "max", "merge"] = "mean",
    ):  # fmt: skip
        super().__init__(clip, classnames)
        expect(pairs >= 1, "pairs", pairs, "at least 1")
        expect(words is None or len(words) > 0, "words", words, "one word or more")
        fits = repetition is None or 0 <= repetition < 2**32
        expect(fits, "repetition", repetition, "from 0 to 4294967295")
        self.mode, self.concept, self.pairs, self.aggregate = (
            mode,
            concept,
            pairs,
            aggregate,
        )
        self.words = words
        drawn = (
            torch.randint(2**31, ()) if repetition is None else torch.tensor(repetition)
        )
        self.register_buffer("repetition", drawn)

    @property
    def descriptors(self) -> dict[str, list[str]]:
        """Those of each class, as they stand."""
        return _by_name(self.option("descriptors"))

    @property
    def underscores(self) -> bool:
        """Whether the names have underscores for spaces."""
        return self.option("underscores")

    def sentences(self) -> list[list[str]]:
        """The sentences of each class."""
        before = f"A photo of a {self.concept}: a " if self.concept else "A photo of a "
        if self.mode == "clip":
            return [[f"{before}{name}."] for name in self.classnames]
        lists = self._descriptors(np.random.RandomState(int(self.repetition)))
        return [
            [f"{before}{name}, {linked(descriptor)}." for descriptor in descriptors]
            for name, descriptors in zip(self.classnames, lists, strict=True)
        ]

    def text_features(self, image_features=None):
        """The mean of each class's normalised sentence features, (C, E): its cosine is
        not 1 with any of them.
        """
        lists = self.sentences()
        features = F.normalize(
            self.clip.encode_text([text for texts in lists for text in texts]), dim=-1
        )
        parts = features.split([len(texts) for texts in lists])  # (n_c, E) each
        if self.aggregate == "max":
            return parts
        return torch.stack([part.mean(dim=0) for part in parts])

    def score(self, image, text):
        image = F.normalize(image, dim=-1)
        if self.aggregate == "max":
            cosine = torch.stack(
                [(image @ part.T).amax(dim=-1) for part in text], dim=-1
            )
        else:
            cosine = (
                image
                @ (F.normalize(text, dim=-1) if self.aggregate == "merge" else text).T
            )
        return self.clip.logit_scale * cosine

    # --- what the sentences end in ----------------------------------------------------

    def _descriptors(self, rng) -> list[list[str]]:
        """A list for each class, drawn from ``rng`` in the order of the published
        code.
        """
        C = len(self.classnames)
        if self.mode in ("waffle", "waffle_characters"):
            lists = [
                self._waffle(rng, self.pairs) for _ in range(C)
            ]  # drawn for all classes; one is kept
            return [lists[rng.choice(C)]] * C
        own = self._own()
        if self.mode == "gpt_descriptions":
            return own
        if self.mode == "waffle_and_gpt":
            pairs = int(2 / 3 * self.pairs)
            lists = [self._waffle(rng, pairs) for _ in range(C)]
            shared = lists[rng.choice(C)]
            mixed = [
                shared + [rng.choice(mine, 1)[0] for _ in range(2 * pairs)]
                for mine in own
            ]
            return [
                list(rng.choice(every, 3 * pairs, replace=False)) for every in mixed
            ]
        if self.mode == "swapped_descriptions":
            return [own[i] for i in rng.permutation(C)]
        if self.mode == "scrambled_descriptions":
            return [_scrambled(mine, rng) for mine in own]
        every = sorted({descriptor for mine in own for descriptor in mine})
        n = min(math.ceil(np.mean([len(mine) for mine in own])), len(every))
        if self.mode == "shared_random_descriptions":
            return [list(rng.choice(every, n, replace=False))] * C
        return [list(rng.choice(every, n, replace=False)) for _ in range(C)]

    def _own(self) -> list[list[str]]:
        lacking = [name for name in self.classnames if name not in self.descriptors]
        if lacking:
            raise InputError(
                f"mode {self.mode!r} needs descriptors, and there are none of"
                f" {lacking[0]!r}: pass descriptors={{class name: [descriptor, ...]}},"
                " or aim at a dataset that has some"
            )
        return [list(self.descriptors[name]) or [""] for name in self.classnames]

    def _waffle(self, rng, pairs) -> list[str]:
        """Random words and random strings, in turns."""
        keys = (
            [name.replace(" ", "_") for name in self.classnames]
            if self.underscores
            else self.classnames
        )
        n_words = max(
            round(np.mean([len(name.split()) for name in self.classnames])), 1
        )
        length = round(
            np.mean(
                [
                    np.mean([len(word) for word in name.split()])
                    for name in self.classnames
                ]
            )
        )
        words = np.array([word[:length] for word in self._vocabulary])
        known = "".join(text for texts in self.descriptors.values() for text in texts)
        characters = np.array(
            sorted(set(known) - set(" ,.")) or list(string.ascii_lowercase)
        )
        groups = round(np.mean([key.count(" ") for key in keys])) + 1
        n = math.ceil(
            np.mean([max(len(chunk) for chunk in key.split()) for key in keys])
        )
        n += groups - n % groups

        def pick(choices):  # without replacement, which permutes the whole list
            return rng.choice(choices, 1, replace=False)[0]

        out = []
        for _ in range(pairs):
            if self.mode != "waffle_characters":
                out.append(" ".join(pick(words) for _ in range(n_words)))
            parts = [
                "".join(pick(characters) for _ in range(n // groups))
                for _ in range(groups)
            ]
            out.append(", ".join(parts))
        return out

    @cached_property
    def _vocabulary(self) -> list[str]:
        if self.words is not None:
            return self.words
        entries = sorted(self.clip.tokenizer.encoder.items(), key=lambda item: item[1])
        whole = [
            entry.removesuffix("</w>") for entry, _ in entries if entry.endswith("</w>")
        ]
        return [
            word
            for word in whole
            if word.isascii() and word.isalpha() and len(word) > 2
        ][:N_WORDS]

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, **objects):
        """As for any method; names with underscores are counted as the published code
        counts them.
        """
        underscores = any("_" in name for name in classnames)
        return cls(
            clip,
            classnames,
            underscores=underscores,
            **cls.official_hparams(hyperparameters),
            **objects,
        )

    @classmethod
    def recipe(cls, setting):
        """Nothing is learned."""
        return Recipe(epochs=0, augment=False)


def linked(descriptor: str) -> str:
    """A descriptor as a clause; its first letters decide, as in the published code,
    whatever they begin.
    """
    if descriptor.startswith("a") or descriptor.startswith("used"):
        return f"which is {descriptor}"
    if descriptor.startswith(("has", "often", "typically", "may", "can")):
        return f"which {descriptor}"
    return f"which has {descriptor}"


def _by_name(descriptors: dict) -> dict:
    return {name.replace("_", " "): list(texts) for name, texts in descriptors.items()}


def _scrambled(descriptors: list[str], rng) -> list[str]:
    words = [word for descriptor in descriptors for word in descriptor.split()] or [""]
    return [
        " ".join(rng.choice(words, max(len(text.split()), 1))) for text in descriptors
    ]
