"""Texts that describe nothing, to set beside those that do: random words and strings,
and descriptors torn from their classes (WaffleCLIP, arXiv 2306.07282).
"""

import math
import re
import string

import numpy as np


def frequent_words(clip, n: int = 4330) -> list[str]:
    """The n most frequent words of CLIP's own vocabulary, of three letters or more; by
    default as many as WaffleCLIP's published list has.
    """
    encoder = clip.tokenizer.encoder
    whole = re.compile(r"([a-z]{3,})</w>")
    entries = map(whole.fullmatch, sorted(encoder, key=encoder.get))
    return [entry[1] for entry in entries if entry][:n]


def waffle(
    keys: list[str],
    pairs: int,
    words: list[str] | None,
    letters: str,
    rng: np.random.RandomState,
) -> list[list[str]]:
    """For each class name random words and a random string, in turns, ``pairs`` times.

    There are as many words, and groups of characters in a string, as the names have
    words on average; groups are counted at blanks alone.

    Args:
        keys: class names; an underscore stands for a blank in words, and is a letter in
            strings.
        words: to draw from; None: strings alone.
        letters: to draw from, blanks, commas and full stops left out; empty: a to z.
    """
    split = [spoken(key).split(" ") for key in keys]
    n_words = max(round(np.mean([len(each) for each in split])), 1)
    length = round(np.mean([np.mean([len(w) for w in each]) for each in split]))
    words = None if words is None else np.array([word[:length] for word in words])
    letters = sorted(set(letters) - set(" ,.")) or list(string.ascii_lowercase)
    groups = round(np.mean([key.count(" ") for key in keys])) + 1
    n = math.ceil(np.mean([max(map(len, key.split(" "))) for key in keys]))
    size = (n + groups - n % groups) // groups  # of each group

    def pick(choices, n):  # one by one without replacement: each permutes them all
        return [rng.choice(choices, 1, replace=False)[0] for _ in range(n)]

    def pair():
        worded = [] if words is None else [" ".join(pick(words, n_words))]
        strings = ["".join(pick(letters, size)) for _ in range(groups)]
        return [*worded, ", ".join(strings)]

    return [[text for _ in range(pairs) for text in pair()] for _ in keys]


def torn(own: list[list[str]], mode: str, budget: int, rng) -> list[list[str]]:
    """Descriptors for each class, from those of its own, by WaffleCLIP's mode.

    Args:
        budget: of random ones, in units of the mean number of a class.
    """
    if mode == "swapped_descriptions":
        return [own[i] for i in rng.permutation(len(own))]
    if mode == "scrambled_descriptions":
        return [scrambled(mine, rng) for mine in own]
    every = [text for mine in own for text in mine]  # with its repetitions
    n = min(math.ceil(len(every) / len(own)) * budget, len(every))
    if mode == "shared_random_descriptions":
        return [rng.choice(every, n, replace=False)] * len(own)
    if mode == "random_descriptions":
        return [rng.choice(every, n, replace=False) for _ in own]
    return own


def spoken(key: str) -> str:
    """A class name as sentences say it."""
    return key.replace("_", " ")


def shared(lists: list[list[str]], names: list[str], rng) -> list[list[str]]:
    """The list of one class for all, its name replaced wherever it occurs in a
    sentence, as in the published code.
    """
    chosen = int(rng.choice(len(names)))
    return [
        [text.replace(names[chosen], name) for text in lists[chosen]] for name in names
    ]


def joined(lists: list[list[str]], others: list[list[str]]) -> list[list[str]]:
    return [[*mine, *more] for mine, more in zip(lists, others, strict=True)]


def scrambled(descriptors: list[str], rng) -> list[str]:
    """As many words as each has, drawn from those of all, without full stops."""
    split = [text.replace(".", "").split() for text in descriptors]
    every = [word for words in split for word in words] or [""]
    return [" ".join(rng.choice(every, len(words))) for words in split]
