"""WaffleCLIP: random words in the place of descriptions, and the baselines that it
questions.

Waffling around for Performance: Visual Classification with Random Words and Broad
Concepts; Roth et al., ICCV 2023; arXiv 2306.07282.

Deviations: scores are multiplied by CLIP's logit scale; features are float32 by
default, where the published runs use half precision. The published lists of words and
descriptors do not come with this package: without ``words`` random words are the most
frequent ones of CLIP's own vocabulary, and without descriptors random strings are of
the letters a to z. With them, the sentences are those of the published code, word by
word, in each of its modes.
"""

import math
import string
from functools import cached_property
from typing import Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.published import Published
from promptkit.recipe import PROTOCOLS, Recipe

N_WORDS = 4330  # of the default list; the published one is as long

# What the published scripts call all classes of a dataset; ImageNet and DTD, too
# diverse, have no such word.
CONCEPTS = {
    "cub": "bird",
    "eurosat": "land use",
    "food101": "food",
    "oxford_pets": "breed",
    "places365": "place",
}

ENSEMBLES = (  # OpenAI's 80 templates in the place of "A photo of a "
    "prompt_ensemble",
    "context_prompt_ensemble",
    "gpt_descriptions_and_prompt_ensemble",
    "waffle_and_prompt_ensemble",
)
BUDGETED = (
    "random_descriptions",
    "shared_random_descriptions",
    "random_description_words",
    "shared_random_description_words",
)
CHARACTERS = ("waffle_characters", "adaptive_random_characters")
WORDED = (
    "waffle",
    "waffle_and_gpt",
    "waffle_and_prompt_ensemble",
    "adaptive_randomness",
    "adaptive_randomness_and_gpt_descriptions",
)
# The options that one mode reads and another does not.
READ_BY = {
    "pairs": (*ENSEMBLES, *CHARACTERS, *WORDED),
    "budget": BUDGETED,
    "words": WORDED,
}


@register
class WaffleCLIP(Method):
    r"""A class is a list of sentences, "A photo of a [class], which has [something].",
    and its score their mean cosine.

    .. math:: p(y = c \mid x) \propto
       \exp\Bigl(s\,\frac1n \sum_{i=1}^{n} \cos(f(x), g(t_{c,i}))\Bigr)

    WaffleCLIP's sentences end in random words and random strings of characters, in
    turns and the same for all classes. Nothing is learned.

    Random strings have as many groups of characters, and random words as many words, as
    the names of the classes have words on average. The groups are counted at blanks
    alone, in the names as ``descriptors`` spells them: an underscore there is a letter,
    as in the published code. Draws run over the classes in the order of the
    descriptors, where these cover all classes, and their sentences alone are kept.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        mode: what the sentences say. "waffle"; "waffle_characters": random strings
            alone; "clip": nothing; "gpt_descriptions": the descriptors of the class;
            "waffle_and_gpt": a mixture of both; and of descriptors torn from their
            classes: "random_descriptions": each class draws from all,
            "shared_random_descriptions": one draw for all classes,
            "random_description_words" and "shared_random_description_words": the same
            of sentences of random words of all descriptors, "swapped_descriptions":
            each class has those of another, "scrambled_descriptions": the words of its
            own, drawn anew. Not shared by all classes: "adaptive_randomness",
            "adaptive_random_characters", "adaptive_randomness_and_gpt_descriptions".
            Of OpenAI's 80 templates, drawn with repetition: "prompt_ensemble",
            "context_prompt_ensemble" (with the concept),
            "gpt_descriptions_and_prompt_ensemble", "waffle_and_prompt_ensemble".
        concept: what all classes are, for "A photo of a [concept]: a [class]"; empty:
            none. None: what the published scripts call those of the dataset that it is
            aimed at, see `CONCEPTS`.
        pairs: random words and random strings, so many of each; of templates twice as
            many.
        budget: of random descriptors, in units of the mean number of a class.
        repetition: of the random draws; the published ones are 0 to 6. None: one less
            than the seed that the method is built with, so that seeds 1 to 7 are those.
        descriptors: ``{class name: [descriptor, ...]}``. None: those of the dataset
            that it is aimed at.
        words: to draw random words from. None: the 4,330 most frequent ones of CLIP's
            vocabulary.
        aggregate: "mean" or "max" of the cosines, or "merge": the cosine with the
            normalised mean.
        before, separator, after: the texts around class name and descriptor.
        preface: a text in front of sentences with a descriptor.
        clauses: write "which has", "which is" or "which" before a descriptor.

    Raises:
        InputError: a hyperparameter does not fit or the mode does not read it, or the
            mode needs descriptors and a class has none.
    """

    name = "waffleclip"
    title = "WaffleCLIP"
    year = 2023
    paper = "2306.07282"
    kind = "training-free"
    supervision = "none"
    from_dataset = {
        "descriptors": lambda dataset: dict(dataset.descriptions) if dataset else {},
        "concept": lambda dataset: CONCEPTS.get(dataset.name, "") if dataset else "",
    }
    official_hyperparameters = {
        "mode": "mode",
        "concept": "concept",
        "waffle_count": "pairs",
        "randomization_budget": "budget",
        "rep": "repetition",
        "reps": "repetition",  # one of them: a method has one
        "aggregate": "aggregate",
        "merge_predictions": None,  # "merge", whatever the aggregate
        "descriptors": "descriptors",
        "word_list": "words",
        "label_before_text": "before",
        "label_after_text": "after",
        "descriptor_separator": "separator",
        "pre_descriptor_text": "preface",
        "apply_descriptor_modification": "clauses",
        "dont_apply_descriptor_modification": None,  # its opposite
        "concept_label_before_text": None,  # of a run with a concept: concept
        "seed": None,  # each repetition sets its own
        "vmf_scale": None,  # read by no line
    }
    published = {
        protocol: Published(
            ("RN50", "ViT-B-32", "ViT-L-14"),
            (),
            "WaffleCLIP: `replicate_key_runs.sh`",
            "All classes, torchvision's splits, 7 repetitions. 15 pairs, without a"
            " concept; `concept=None` takes the scripts' (EuroSAT: land use, Food101:"
            " food, OxfordPets: breed). Words and letters differ unless the published"
            " lists are given.",
            extrapolation=protocol == "base-to-new",
        )
        for protocol in PROTOCOLS
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        mode: Literal[
            "waffle",
            "waffle_characters",
            "clip",
            "gpt_descriptions",
            "waffle_and_gpt",
            "random_descriptions",
            "shared_random_descriptions",
            "swapped_descriptions",
            "scrambled_descriptions",
            "random_description_words",
            "shared_random_description_words",
            "adaptive_randomness",
            "adaptive_random_characters",
            "adaptive_randomness_and_gpt_descriptions",
            "prompt_ensemble",
            "context_prompt_ensemble",
            "gpt_descriptions_and_prompt_ensemble",
            "waffle_and_prompt_ensemble",
        ] = "waffle",
        concept: str | None = "",
        pairs: int = 15,
        budget: int = 1,
        repetition: int | None = None,
        descriptors: dict | None = None,
        words: list[str] | None = None,
        aggregate: Literal["mean", "max", "merge"] = "mean",
        before: str = "A photo of a ",
        separator: str = ", ",
        after: str = ".",
        preface: str = "",
        clauses: bool = True,
    ):
        super().__init__(clip, classnames)
        expect(pairs >= 1, "pairs", pairs, "at least 1")
        expect(budget >= 1, "budget", budget, "at least 1")
        expect(words is None or len(words) > 0, "words", words, "one word or more")
        fits = repetition is None or 0 <= repetition < 2**32
        expect(fits, "repetition", repetition, "from 0 to 4294967295")
        given = {
            "pairs": pairs != 15,
            "budget": budget != 1,
            "words": words is not None,
        }
        idle = [name for name in given if given[name] and mode not in READ_BY[name]]
        if idle:
            raise InputError(
                f"mode {mode!r} does not read {idle[0]}: leave it out, or choose one of"
                f" {', '.join(READ_BY[idle[0]])}"
            )
        self.mode, self.aggregate = mode, aggregate
        self.pairs, self.budget, self.words = pairs, budget, words
        self.opening = before
        self.separator, self.after = separator, after
        self.preface, self.clauses = preface, clauses
        if repetition is None:
            repetition = max(torch.initial_seed() - 1, 0) % 2**32
        self.register_buffer("repetition", torch.tensor(repetition))

    @property
    def descriptors(self) -> dict[str, list[str]]:
        """Those of each class, as they stand."""
        return self.option("descriptors")

    @property
    def before(self) -> str:
        """The text before the class name."""
        concept = self.option("concept")
        return f"{self.opening}{concept}: a " if concept else self.opening

    def sentences(self) -> list[list[str]]:
        """The sentences of each class."""
        rows = {spoken(key): key for key in self.descriptors}
        covered = all(name in rows for name in self.classnames)
        keys = list(self.descriptors) if covered else self.classnames
        lists = self._lists(keys, np.random.RandomState(int(self.repetition)))
        at = {spoken(key): i for i, key in enumerate(keys)}
        return [lists[at[name]] for name in self.classnames]

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
            cosine = torch.stack([(image @ part.T).amax(dim=-1) for part in text], -1)
        else:
            merge = self.aggregate == "merge"
            cosine = image @ (F.normalize(text, dim=-1) if merge else text).T
        return self.clip.logit_scale * cosine

    # --- the sentences of each mode, in the order of the published draws --------------

    def _lists(self, keys: list[str], rng) -> list[list[str]]:
        """The sentences for each of the names ``keys``."""
        names, mode, pairs = [spoken(key) for key in keys], self.mode, self.pairs
        if mode == "clip":
            return [[f"{self.before}{name}{self.after}"] for name in names]
        if mode in ("prompt_ensemble", "context_prompt_ensemble"):
            drawn = templates(rng, 2 * pairs)
            topic = self.before.split("A photo of a ")[-1].split(":")[0] + ": a "
            topic = topic if mode == "context_prompt_ensemble" else ""
            return [
                [t.replace("{}", topic + name) + self.after for t in drawn]
                for name in names
            ]
        alphabet = self._alphabet(keys)
        if mode == "waffle_and_prompt_ensemble":
            drawn = templates(rng, pairs)
            lists = [
                [
                    self._say(name, text, t.replace("{}", name))
                    for t in drawn
                    for text in self._random(alphabet, rng)
                ]
                for name in names
            ]
            return _shared(lists, names, rng)
        if mode in CHARACTERS or mode in ("waffle", "adaptive_randomness"):
            lists = [self._waffle(name, alphabet, pairs, rng) for name in names]
            return _shared(lists, names, rng) if mode.startswith("waffle") else lists
        own = self._own()
        if mode == "gpt_descriptions_and_prompt_ensemble":
            drawn = templates(rng, 2 * pairs)
            return [
                [
                    self._say(name, str(rng.choice(mine)), t.replace("{}", name))
                    for t in drawn
                ]
                for name, mine in zip(names, own, strict=True)
            ]
        if mode in ("waffle_and_gpt", "adaptive_randomness_and_gpt_descriptions"):
            return self._mixed(alphabet, names, own, rng)
        texts = self._torn(own, rng)
        return [
            [self._say(name, text) for text in mine]
            for name, mine in zip(names, texts, strict=True)
        ]

    def _say(self, name: str, descriptor: str, named: str | None = None) -> str:
        clause = linked(descriptor) if self.clauses else descriptor
        named = f"{self.before}{name}" if named is None else named
        return f"{self.preface}{named}{self.separator}{clause}{self.after}"

    def _own(self) -> list[list[str]]:
        known = {spoken(key) for key in self.descriptors}
        lacking = [name for name in self.classnames if name not in known]
        if not any(self.descriptors.values()):
            lacking = self.classnames
        if lacking:
            raise InputError(
                f"mode {self.mode!r} needs descriptors, and there are none of"
                f" {lacking[0]!r}: pass descriptors={{class name: [descriptor, ...]}},"
                " or aim at a dataset that has some"
            )
        return [list(texts) or [""] for texts in self.descriptors.values()]

    def _torn(self, own: list[list[str]], rng) -> list[list[str]]:
        """Descriptors for each class, its own or torn from their classes."""
        if self.mode == "swapped_descriptions":
            return [own[i] for i in rng.permutation(len(own))]
        if self.mode == "scrambled_descriptions":
            rng.permutation(len(own))  # drawn by the published code, and never used
            return [_scrambled(mine, rng) for mine in own]
        if self.mode == "gpt_descriptions":
            return own
        every = [text for mine in own for text in mine]  # with repetitions
        n = math.ceil(len(every) / len(own)) * self.budget
        if self.mode.endswith("_words"):
            length = math.ceil(np.mean([len(text.split(" ")) for text in every]))
            words = np.unique([word for text in every for word in text.split(" ")])
            words = [word.replace(",", "").replace(".", "") for word in words]
            every = [" ".join(rng.choice(words, length)) for _ in every]
        if self.mode.startswith("shared"):
            return [rng.choice(every, n, replace=n > len(every)).tolist()] * len(own)
        n = min(n, len(every))
        return [rng.choice(every, n, replace=False).tolist() for _ in own]

    def _mixed(self, alphabet, names, own, rng) -> list[list[str]]:
        """Random words, random strings and the class's own descriptors."""
        pairs = int(2 / 3 * self.pairs)

        def described(name, mine, n):
            return [self._say(name, str(rng.choice(mine, 1)[0])) for _ in range(n)]

        if self.mode == "waffle_and_gpt":
            lists = [self._waffle(name, alphabet, pairs, rng) for name in names]
            lists = [
                texts + described(name, mine, 2 * pairs)
                for texts, name, mine in zip(
                    _shared(lists, names, rng), names, own, strict=True
                )
            ]
        else:
            lists = [
                [
                    text
                    for _ in range(pairs)
                    for text in self._waffle(name, alphabet, 1, rng)
                    + described(name, mine, 2)
                ]
                for name, mine in zip(names, own, strict=True)
            ]
        return [rng.choice(each, 3 * pairs, replace=False).tolist() for each in lists]

    def _waffle(self, name: str, alphabet: tuple, pairs: int, rng) -> list[str]:
        return [
            self._say(name, text)
            for _ in range(pairs)
            for text in self._random(alphabet, rng)
        ]

    def _random(self, alphabet: tuple, rng) -> list[str]:
        """Random words, unless the mode has none, and a random string."""
        words, n_words, characters, groups, size = alphabet

        def pick(choices):  # without replacement, which permutes the whole list
            return str(rng.choice(choices, 1, replace=False)[0])

        out = []
        if self.mode in WORDED:
            out.append(" ".join(pick(words) for _ in range(n_words)))
        out.append(
            ", ".join(
                "".join(pick(characters) for _ in range(size)) for _ in range(groups)
            )
        )
        return out

    def _alphabet(self, keys: list[str]):
        """What random texts are made of: words, how many, characters, in how many
        groups, of which size.
        """
        split = [spoken(key).split(" ") for key in keys]
        n_words = max(round(np.mean([len(words) for words in split])), 1)
        length = round(np.mean([np.mean([len(w) for w in words]) for words in split]))
        known = {
            c for texts in self.descriptors.values() for text in texts for c in text
        }
        characters = sorted(known - set(" ,.")) or list(string.ascii_lowercase)
        groups = round(np.mean([key.count(" ") for key in keys])) + 1
        n = math.ceil(np.mean([max(map(len, key.split(" "))) for key in keys]))
        n += groups - n % groups
        words = np.array([word[:length] for word in self._vocabulary])
        return words, n_words, np.array(characters), groups, n // groups

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
    def official_hparams(cls, hyperparameters):
        """As for any method; options that the mode does not read are left out, as the
        published code takes them without effect.
        """
        ours = super().official_hparams(hyperparameters)
        if hyperparameters.get("merge_predictions"):
            ours["aggregate"] = "merge"
        if hyperparameters.get("dont_apply_descriptor_modification"):
            ours["clauses"] = False
        mode = ours.get("mode", "waffle")
        return {
            name: value
            for name, value in ours.items()
            if value is not None and mode in READ_BY.get(name, (mode,))
        }

    @classmethod
    def from_official(cls, clip, classnames, hyperparameters, **objects):
        """As for any method; without descriptors the names are counted as they are
        spelt here, underscores and all.
        """
        ours = cls.official_hparams(hyperparameters)
        own = {"descriptors": {name: [] for name in classnames}} | ours
        return cls(clip, classnames, **own, **objects)

    @classmethod
    def recipe(cls, setting):
        """Nothing is learned."""
        return Recipe(epochs=0, augment=False)


def spoken(key: str) -> str:
    """A class name as sentences say it."""
    return key.replace("_", " ")


def linked(descriptor: str) -> str:
    """A descriptor as a clause; its first letters decide, as in the published code,
    whatever they begin.
    """
    if descriptor.startswith("a") or descriptor.startswith("used"):
        return f"which is {descriptor}"
    if descriptor.startswith(("has", "often", "typically", "may", "can")):
        return f"which {descriptor}"
    return f"which has {descriptor}"


def templates(rng, n: int) -> list[str]:
    """n of OpenAI's 80 templates, drawn with repetition and sorted, as the published
    code spells them: a capital first, no full stop.
    """
    every = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    drawn = sorted(rng.choice(len(every), n, replace=True))
    return [every[i][0].upper() + every[i][1:].removesuffix(".") for i in drawn]


def _shared(lists: list[list[str]], names: list[str], rng) -> list[list[str]]:
    """The list of one class for all, its name replaced wherever it occurs in a
    sentence, as in the published code.
    """
    chosen = int(rng.choice(len(names)))
    return [
        [text.replace(names[chosen], name) for text in lists[chosen]] for name in names
    ]


def _scrambled(descriptors: list[str], rng) -> list[str]:
    words = [word.replace(".", "") for text in descriptors for word in text.split(" ")]
    return [
        " ".join(rng.choice(words, len(text.split(" ")), replace=True))
        for text in descriptors
    ]
