"""Datasets, few-shot samples, base and new classes."""

import math
import random
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from promptkit.data.tasks import ENSEMBLE, PLAIN, SHIFTS, TASKS, WORDS, Task, draw_options, facts
from promptkit.data.world import draw, random_generator
from promptkit.errors import InputError, unknown
from promptkit.files import cache_folder, write_atomically

SPLITS = {"train": (1, 32), "val": (2, 8), "test": (100, 25)}  # name: (seed, images a class)


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        labels: (N,) int64.
        source: `source()` gives all images of the underlying data, (M, 3, H, W) uint8.
        rows: (N,) int64, which of them are in this split.
        key: names the underlying data, for caches of what is computed from it.
    """

    labels: torch.Tensor
    source: object
    rows: torch.Tensor
    key: str

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices=None) -> torch.Tensor:
        """Images as (n, 3, H, W) uint8: those at `indices` of the split, or all."""
        return self.source()[self.rows if indices is None else self.rows[indices]]

    def take(self, indices, labels=None) -> "Split":
        """The split of the items at `indices`, with other `labels` if given."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return replace(self, labels=self.labels[indices] if labels is None else labels, rows=self.rows[indices])


@dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
        template: the hand-written prompt, "{}" for the class name; templates: an ensemble of prompts.
        train, val, test: splits; the shifted sets have a test split alone (train and val are empty).
        facts: descriptive phrases by class name; empty if there are none.
    """

    name: str
    title: str
    classnames: list[str]
    template: str
    train: Split
    val: Split
    test: Split
    templates: tuple = ENSEMBLE
    facts: dict = field(default_factory=dict)


def list_datasets() -> list[str]:
    """Names that `load_dataset` knows: the eleven tasks of the mini world, then the shifts of its main set."""
    return [*TASKS, *SHIFTS, WORDS]


def stamped_labels(split: Split) -> torch.Tensor:
    """For a split of "objects-words": the label (N,) of the word on each image, never the image's own."""
    classes = len(TASKS["objects"].classes)
    return (split.labels + 1 + split.rows % (classes - 1)) % classes


@lru_cache(None)
def load_dataset(name: str) -> Dataset:
    """A dataset by name.

    Raises:
        InputError: unknown name; the message lists the nearest valid ones.
    """
    if name in TASKS:
        task, title, options = TASKS[name], TASKS[name].title, draw_options(name)
        splits = {what: _drawn(task, name, seed, each, options) for what, (seed, each) in SPLITS.items()}
    elif name in SHIFTS:
        (title, options), task = SHIFTS[name], TASKS["mini"]
        test = _drawn(task, name, 300 + list(SHIFTS).index(name), SPLITS["test"][1], options)
        splits = dict(train=test.take([]), val=test.take([]), test=test)
    elif name == WORDS:
        title, task = "Objects under wrong words", TASKS["objects"]
        test = _drawn(task, name, 400, SPLITS["test"][1], draw_options("objects"), stamped=True)
        splits = dict(train=test.take([]), val=test.take([]), test=test)
    else:
        raise unknown("dataset", name, list_datasets())
    templates = tuple(dict.fromkeys([task.template, *ENSEMBLE])) if task.template != PLAIN else ENSEMBLE
    return Dataset(name, title, task.classnames, task.template, **splits, templates=templates, facts=facts(task))


def _drawn(task: Task, name: str, seed: int, each: int, options: dict, stamped: bool = False) -> Split:
    """`each` images a class, drawn when first asked for and then kept in memory and in the cache folder."""
    labels = torch.arange(len(task.classes)).repeat_interleave(each)
    key = f"{name}-{seed}-{each}-{WORLD_VERSION}"

    @lru_cache(None)
    def source() -> torch.Tensor:
        path = cache_folder("images") / f"{key}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        words = [task.classnames[i] for i in stamped_labels(split)] if stamped else [""] * len(labels)
        images = []
        for n, (label, word) in enumerate(zip(labels.tolist(), words, strict=False)):
            rng = random_generator(7_000 + seed, list(TASKS).index(task.name), label, n % each)
            images.append(draw(*task.classes[label], rng, word=word, **options)[0])
        images = np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
        write_atomically(path, lambda f: np.save(f, images))
        return torch.from_numpy(images)

    split = Split(labels, source, torch.arange(len(labels)), key)
    return split


WORLD_VERSION = 2  # part of every cache key: raise it when a change of the world changes its pictures


def subset(dataset: Dataset, classes: list[int]) -> Dataset:
    """The dataset with these classes alone, relabelled 0, 1, ... in the order given."""
    new_label = torch.full((len(dataset.classnames),), -1)
    new_label[torch.as_tensor(classes)] = torch.arange(len(classes))

    def part(split):
        labels = new_label[split.labels]
        kept = (labels >= 0).nonzero().squeeze(1)
        return split.take(kept, labels[kept])

    return replace(
        dataset,
        classnames=[dataset.classnames[c] for c in classes],
        train=part(dataset.train),
        val=part(dataset.val),
        test=part(dataset.test),
    )


def base_new(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Base classes, the first ceil(n/2) labels, and new classes, the rest, each relabelled from 0.

    Raises:
        InputError: fewer than two classes.
    """
    n = len(dataset.classnames)
    if n < 2:
        raise InputError(f"base and new classes need at least 2 classes, {dataset.name!r} has {n}")
    half = math.ceil(n / 2)
    return subset(dataset, list(range(half))), subset(dataset, list(range(half, n)))


def few_shot(dataset: Dataset, shots: int, seed: int) -> Dataset:
    """The dataset with `shots` training images a class and min(shots, 4) validation images a class.

    Python's generator, seeded with `seed`, draws class by class in order of first appearance, over all classes, before
    any base/new selection: the draw of CoOp's code (Zhou et al. 2022), which all later papers share.

    Raises:
        InputError: shots below 1, or more than the smallest class has.
    """
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise InputError(f"shots must be a whole number of at least 1, not {shots!r}")
    generator = random.Random(seed)

    def sample(split, each):
        by_label = {}
        for row, label in enumerate(split.labels.tolist()):
            by_label.setdefault(label, []).append(row)
        return split.take([row for rows in by_label.values() for row in generator.sample(rows, min(each, len(rows)))])

    counts = torch.bincount(dataset.train.labels, minlength=len(dataset.classnames))
    if len(dataset.train) == 0:
        raise InputError(f"{dataset.name!r} has no training images: it is made for testing alone")
    if counts.min() < shots:
        smallest = int(counts.argmin())
        raise InputError(
            f"{shots} shots are more than {dataset.name!r} has: class {dataset.classnames[smallest]!r} has "
            f"{int(counts.min())} training images"
        )
    return replace(dataset, train=sample(dataset.train, shots), val=sample(dataset.val, min(shots, 4)))
