"""WaffleCLIP: random words in the place of descriptions, and the baselines that it
questions.

Waffling around for Performance: Visual Classification with Random Words and Broad
Concepts; Roth et al., ICCV 2023; arXiv 2306.07282.

As in the published code alone, all classes share the list of one random class, its name
replaced wherever it occurs, and "which is" stands before every text that begins with
the letter a.

Deviations: scores are multiplied by CLIP's logit scale; features are float32 by
default, where the published runs use half precision. The published lists of words and
descriptors do not come with this package: without ``words`` random words are the most
frequent ones of CLIP's own vocabulary, and without descriptors random strings are of
the letters a to z. With them, "waffle" and "waffle_and_gpt" say the published
sentences, word by word; the other modes draw in an order of our own, and those with
templates join the sentences of both parts.
"""

from typing import Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F

from promptkit.descriptions import linked
from promptkit.errors import InputError, expect
from promptkit.method import Method, register
from promptkit.picture import Picture
from promptkit.published import Published
from promptkit.recipe import PROTOCOLS, Recipe
from promptkit.waffle import frequent_words, joined, shared, spoken, torn, waffle

TEMPLATES = [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]  # 80

# What the paper calls all classes of a dataset; ImageNet and DTD, too diverse, have no
# such word.
CONCEPTS = {
    "cub": "bird",
    "eurosat": "land use",
    "food101": "food",
    "oxford_pets": "breed",
    "places365": "place",
}
WORDED = ("waffle", "adaptive_waffle", "waffle_and_gpt", "waffle_and_prompt_ensemble")
LETTERED = ("waffle_characters", "adaptive_waffle_characters")
TEMPLATED = ("prompt_ensemble", "gpt_descriptions_and_prompt_ensemble")
RANDOM = ("random_descriptions", "shared_random_descriptions")
OWN = ("gpt_descriptions", "swapped_descriptions", "scrambled_descriptions")
# Options that one mode reads and another does not.
READ_BY = {"pairs": WORDED + LETTERED + TEMPLATED, "budget": RANDOM, "words": WORDED}


@register
class WaffleCLIP(Method):
    r"""A class is a list of sentences, "A photo of a [class], which has [something].",
    and its score their mean cosine.

    .. math:: p(y = c \mid x) \propto
       \exp\Bigl(s\,\frac1n \sum_{i=1}^{n} \cos(f(x), g(t_{c,i}))\Bigr)

    WaffleCLIP's sentences end in random words and random strings of characters, in
    turns and the same for all classes. Nothing is learned.

    Random words and strings are about as long as the names of the classes, as
    ``descriptors`` spells these. Draws run over the classes in the order of the
    descriptors, where these cover all.

    Args:
        clip: the frozen backbone.
        classnames: the C class names.
        mode: what the sentences say. "waffle"; "waffle_characters": random strings
            alone; "adaptive_waffle", "adaptive_waffle_characters": the same, drawn for
            each class; "clip": nothing; "gpt_descriptions": the descriptors of the
            class; "waffle_and_gpt": a mixture of both. Of descriptors torn from their
            classes: "random_descriptions": each class draws from all,
            "shared_random_descriptions": one draw for all classes,
            "swapped_descriptions": each class has those of another,
            "scrambled_descriptions": the words of its own, drawn anew. Of OpenAI's 80
            templates, drawn with repetition: "prompt_ensemble",
            "waffle_and_prompt_ensemble", "gpt_descriptions_and_prompt_ensemble".
        concept: what all classes are, for "A photo of a [concept]: a [class]"; empty:
            none. None: that of the dataset that it is aimed at, see `CONCEPTS`.
        pairs: random words and random strings, so many of each; of templates twice as
            many.
        budget: of random descriptors, in units of the mean number of a class; at most
            all are drawn.
        repetition: of the random draws; the published ones are 0 to 6. None: one less
            than the seed that the method is built with, so that seeds 1 to 7 are those.
        descriptors: ``{class name: [descriptor, ...]}``. None: those of the dataset
            that it is aimed at.
        words: to draw random words from. None: the 4,330 most frequent ones of CLIP's
            vocabulary.
        aggregate: "mean" or "max" of the cosines, or "merge": the cosine with the
            normalised mean.
        before, separator, after: the texts around class name and descriptor.

    Raises:
        InputError: a hyperparameter does not fit or the mode does not read it, or the
            mode needs descriptors and a class has none.
    """

    name = "waffleclip"
    title = "WaffleCLIP"
    year = 2023
    paper = "2306.07282"
    kind = "training-free"
    picture = Picture(
        text=("SOS", "A photo of a", "[class]", ", which has mlkd.", "EOT"),
        text_feature="mean class feature $w_c$",
        targets=(),
        prompts="30 sentences for each class; their ends are random",
        several=("text",),
    )
    supervision = "none"
    from_dataset = {
        "descriptors": lambda dataset: dict(dataset.descriptions) if dataset else {},
        "concept": lambda dataset: CONCEPTS.get(dataset.name, "") if dataset else "",
    }
    official_hyperparameters = {
        "mode": "mode",
        "waffle_count": "pairs",
        "randomization_budget": "budget",
        "rep": "repetition",
        "aggregate": "aggregate",
        "merge_predictions": None,  # "merge", whatever the aggregate
        "descriptors": "descriptors",
        "word_list": "words",
        "label_before_text": "before",
        "label_after_text": "after",
        "descriptor_separator": "separator",
        "concept_label_before_text": None,  # the other's value in a run with a concept
    }
    published = {
        protocol: Published(
            ("RN50", "ViT-B-32", "ViT-L-14"),
            (),
            "WaffleCLIP: its runs of 15 pairs",
            "All classes, torchvision's splits, 7 repetitions. Without a concept;"
            " `concept=None` takes the paper's. Words and letters differ unless the"
            " published lists are given. Of this benchmark it ran ImageNet, V2,"
            " EuroSAT, Food101, Pets and DTD.",
            extrapolation=protocol == "base-to-new",
        )
        for protocol in PROTOCOLS
    }

    def __init__(
        self,
        clip,
        classnames,
        *,
        mode: Literal["clip", *WORDED, *LETTERED, *TEMPLATED, *RANDOM, *OWN] = "waffle",
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
    ):
        super().__init__(clip, classnames)
        least = 2 if mode == "waffle_and_gpt" else 1  # two thirds of 1 are none
        expect(pairs >= least, "pairs", pairs, f"at least {least}")
        expect(budget >= 1, "budget", budget, "at least 1")
        expect(words is None or len(words) > 0, "words", words, "one word or more")
        fits = repetition is None or 0 <= repetition < 2**32
        expect(fits, "repetition", repetition, "from 0 to 4294967295")
        given = {"pairs": pairs != 15, "budget": budget != 1, "words": words}
        idle = [name for name in given if given[name] and mode not in READ_BY[name]]
        if idle:
            raise InputError(
                f"mode {mode!r} does not read {idle[0]}: leave it out, or choose one of"
                f" {', '.join(READ_BY[idle[0]])}"
            )
        self.mode, self.aggregate = mode, aggregate
        self.pairs, self.budget, self.words = pairs, budget, words
        self.opening, self.separator, self.after = before, separator, after
        if repetition is None:
            repetition = max(torch.initial_seed() - 1, 0) % 2**32
        self.register_buffer("repetition", torch.tensor(repetition))

    @property
    def descriptors(self) -> dict[str, list[str]]:
        """Those of each class, as they stand."""
        return self.option("descriptors")

    @property
    def topic(self) -> str:
        """What stands before the class name where all classes have a concept."""
        concept = self.option("concept")
        return f"{concept}: a " if concept else ""

    @property
    def before(self) -> str:
        """The text before the class name."""
        return self.opening + self.topic

    def sentences(self) -> list[list[str]]:
        """The sentences of each class."""
        keys = list(self.descriptors)
        if not {*map(spoken, keys)} >= {*self.classnames}:
            keys = self.classnames
        lists = self._lists(keys, np.random.RandomState(int(self.repetition)))
        at = {spoken(key): i for i, key in enumerate(keys)}
        return [lists[at[name]] for name in self.classnames]

    def text_features(self, image_features=None):
        """The mean of each class's normalised sentence features, (C, E): its cosine is
        not 1 with any of them. With "max" the features themselves, (n_c, E) each.
        """
        lists = self.sentences()
        texts = [text for texts in lists for text in texts]
        parts = F.normalize(self.clip.encode_text(texts), dim=-1)
        parts = parts.split([len(texts) for texts in lists])
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

    # --- the sentences of each mode ---------------------------------------------------

    def _lists(self, keys: list[str], rng) -> list[list[str]]:
        """The sentences for each of the names ``keys``."""
        mode, names = self.mode, [spoken(key) for key in keys]
        if mode == "clip":
            return [[f"{self.before}{name}{self.after}"] for name in names]
        lists = [[] for _ in names]
        n = int(2 / 3 * self.pairs) if mode == "waffle_and_gpt" else self.pairs
        if mode in WORDED + LETTERED:
            words = self.words or frequent_words(self.clip) if mode in WORDED else None
            letters = "".join(map("".join, self.descriptors.values()))
            lists = self._say(names, waffle(keys, n, words, letters, rng))
            if not mode.startswith("adaptive"):
                lists = shared(lists, names, rng)
        if "ensemble" in mode:  # drawn with repetition, in their order
            drawn = [TEMPLATES[i] for i in sorted(rng.choice(80, 2 * n))]
            topics = [self.topic + name for name in names]
            said = [[text.replace("{}", topic) for text in drawn] for topic in topics]
            lists = joined(lists, said)
        if mode == "waffle_and_gpt":
            own = [[rng.choice(d, 1)[0] for _ in range(2 * n)] for d in self._own()]
            lists = joined(lists, self._say(names, own))
            return [rng.choice(each, 3 * n, replace=False).tolist() for each in lists]
        if "descriptions" in mode:
            texts = torn(self._own(), mode, self.budget, rng)
            lists = joined(lists, self._say(names, texts))
        return lists

    def _say(self, names: list[str], lists: list) -> list[list[str]]:
        """A sentence about each name for each of its descriptors."""
        between, end = self.separator, self.after
        return [
            [f"{self.before}{name}{between}{linked(text)}{end}" for text in texts]
            for name, texts in zip(names, lists, strict=True)
        ]

    def _own(self) -> list[list[str]]:
        some = any(self.descriptors.values())
        known = {spoken(key) for key in self.descriptors if some}
        lacking = [name for name in self.classnames if name not in known]
        if lacking:
            raise InputError(
                f"mode {self.mode!r} needs descriptors, and there are none of"
                f" {lacking[0]!r}: pass descriptors={{class name: [descriptor, ...]}},"
                " or aim at a dataset that has some"
            )
        return [list(texts) or [""] for texts in self.descriptors.values()]

    @classmethod
    def official_hparams(cls, hyperparameters):
        """As for any method; options that the mode does not read are left out, as one
        configuration serves several modes.
        """
        ours = super().official_hparams(hyperparameters)
        if hyperparameters.get("merge_predictions"):
            ours["aggregate"] = "merge"
        mode = ours.get("mode", "waffle")
        return {k: v for k, v in ours.items() if mode in READ_BY.get(k, (mode,))}

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
