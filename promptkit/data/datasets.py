"""Datasets by name or path, few-shot samples, base and new classes."""

import math
import os
import random
import warnings
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch

from promptkit.data import benchmark, own, world
from promptkit.data.tasks import (
    ENSEMBLE,
    PLAIN,
    SHIFTS,
    TASKS,
    WORDS,
    Task,
    draw_options,
    facts,
)
from promptkit.errors import InputError, unknown
from promptkit.files import cache_folder, write_atomically

SPLITS = {
    "train": (1, 32),
    "val": (2, 8),
    "test": (100, 25),
}  # name: (seed, images a class)


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        labels: (N,) int64.
        source: `source()` gives all images of the underlying data: (M, 3, H, W) uint8,
            or Files that are read when they are indexed.
        rows: (N,) int64, which of them are in this split.
        key: names the underlying data, for caches of what is computed from it.
    """

    labels: torch.Tensor
    source: object
    rows: torch.Tensor
    key: str

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices=None) -> torch.Tensor | list[torch.Tensor]:
        """Images as (n, 3, H, W) uint8: those at `indices` of the split, or all.

        Images of real datasets differ in size, so they are a list of n tensors (3, H,
        W). They are read anew each time.
        """
        return self.source()[self.rows if indices is None else self.rows[indices]]

    def take(self, indices, labels=None) -> "Split":
        """The split of the items at `indices`, with other `labels` if given."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return replace(
            self,
            labels=self.labels[indices] if labels is None else labels,
            rows=self.rows[indices],
        )


@dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
        template: the hand-written prompt, "{}" for the class name; templates: an
            ensemble of prompts.
        train, val, test: splits; the shifted sets have a test split alone (train and
            val are empty). ImageNet has no validation images of its own: its val is its
            test.
        facts: descriptive phrases by class name; empty if there are none.
        shifts: names of its shifted versions.
        source_rows: in a shifted version, which of the source's classes its own are;
            None elsewhere.
        variants: templates that single methods use instead, by the method's name.
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
    shifts: tuple[str, ...] = ()
    source_rows: list[int] | None = None
    variants: dict = field(default_factory=dict)
    official: str = ""
    world: str = "real"
    pool: Split | None = None
    pool_classnames: list = field(default_factory=list)

    @property
    def descriptions(self):
        return self.facts

    @property
    def identity(self):
        import hashlib

        t = [self.classnames] + [
            [s.key, s.rows.tolist(), s.labels.tolist()]
            for s in (self.train, self.val, self.test)
        ]
        return hashlib.sha256(repr(t).encode()).hexdigest()

    @property
    def unlabelled(self):
        s = self.pool or self.train
        return replace(s, labels=torch.full_like(s.labels, -1))

    def for_training(self):
        return replace(
            self,
            test=self.test.take([]),
            val=self.val.take([])
            if self.val.key == self.test.key and self.val.key
            else self.val,
        )


def list_datasets() -> list[str]:
    """Names that `load_dataset` knows: the mini world's tasks and shifts, then the real
    datasets and shifts.
    """
    return [*TASKS, *SHIFTS, WORDS, *benchmark.TABLE]


def stamped_labels(split: Split) -> torch.Tensor:
    """For a split of "objects-words": the label (N,) of the word on each image, never
    the image's own.
    """
    classes = len(TASKS["objects"].classes)
    return (split.labels + 1 + split.rows % (classes - 1)) % classes


def load_dataset(name: str, root=None) -> Dataset:
    """A dataset by name, or one's own by its path.

    Args:
        name: one of :func:`list_datasets`, or the path of a folder of class folders or
            of a CSV file, see
            :func:`promptkit.data.own.read`.
        root: folder of the real datasets; by default $PROMPTKIT_DATA, else ./data.

    Raises:
        InputError: unknown name (the message lists the nearest valid ones), or data
            that is missing or damaged.
    """
    name = os.fspath(name)
    if name in benchmark.TABLE:
        folder = benchmark.data_root(root).resolve() / benchmark.TABLE[name].folder
        split = folder / (benchmark.TABLE[name].split_file or "")
        changed = tuple(
            path.stat().st_mtime_ns if path.exists() else 0 for path in (folder, split)
        )
        return _real(name, folder.parent, changed)
    if name not in list_datasets() and own.is_path(name):
        return _own(name)
    return _mini(name)


@lru_cache(32)
def _real(name, root, changed):
    entry, listing = benchmark.TABLE[name], benchmark.read(name, root)
    templates = (
        benchmark.ENSEMBLE
        if name == "imagenet"
        else (*benchmark.ENSEMBLE, entry.template)
    )
    more = dict(
        template=entry.template,
        templates=templates,
        shifts=entry.shifts,
        variants=entry.variants,
        official=entry.loader,
    )
    return from_listing(name, entry.title, listing, **more)


def _own(path):
    name, listing = own.name_of(path), own.read(path)
    name = f"my-{name}" if name in list_datasets() else name
    return from_listing(name, name, listing, template=PLAIN)


def from_listing(name: str, title: str, listing: benchmark.Listing, **more) -> Dataset:
    """The dataset of images in files that have been listed and checked."""

    def split(part):
        files = listing.files[part]
        labels = torch.tensor(
            [item[1] for item in getattr(listing, part)], dtype=torch.long
        )
        return Split(
            labels, lambda: files, torch.arange(len(labels)), f"{name}-{files.identity}"
        )

    splits = {part: split(part) for part in benchmark.PARTS}
    return Dataset(
        name,
        title,
        listing.classnames,
        **splits,
        source_rows=listing.source_rows,
        **more,
    )


@lru_cache(None)
def _mini(name):
    shifts, rows = (), None
    if name in TASKS:
        task, title, options = TASKS[name], TASKS[name].title, draw_options(name)
        splits = {
            what: _drawn(task, name, seed, each, options)
            for what, (seed, each) in SPLITS.items()
        }
        shifts = tuple(SHIFTS) if name == "mini" else ()
    elif name in SHIFTS:
        (title, options), task = SHIFTS[name], TASKS["mini"]
        test = _drawn(
            task, name, 300 + list(SHIFTS).index(name), SPLITS["test"][1], options
        )
        splits, rows = (
            dict(train=test.take([]), val=test.take([]), test=test),
            list(range(len(task.classes))),
        )
    elif name == WORDS:
        title, task = "Objects under wrong words", TASKS["objects"]
        test = _drawn(
            task, name, 400, SPLITS["test"][1], draw_options("objects"), stamped=True
        )
        splits = dict(train=test.take([]), val=test.take([]), test=test)
    else:
        raise unknown("dataset", name, list_datasets())
    templates = (
        tuple(dict.fromkeys([task.template, *ENSEMBLE]))
        if task.template != PLAIN
        else ENSEMBLE
    )
    more = dict(
        templates=templates,
        facts=facts(task),
        shifts=shifts,
        source_rows=rows,
        world="mini",
    )
    return Dataset(name, title, task.classnames, task.template, **splits, **more)


def _drawn(
    task: Task, name: str, seed: int, each: int, options: dict, stamped: bool = False
) -> Split:
    """`each` images a class, drawn when first asked for and then kept in memory and in
    the cache folder.
    """
    labels = torch.arange(len(task.classes)).repeat_interleave(each)
    key = f"{name}-{seed}-{each}-{WORLD_VERSION}"

    @lru_cache(None)
    def source() -> torch.Tensor:
        path = cache_folder("images") / f"{key}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path))
        words = (
            [task.classnames[i] for i in stamped_labels(split)]
            if stamped
            else [""] * len(labels)
        )
        images = []
        for n, (label, word) in enumerate(zip(labels.tolist(), words, strict=False)):
            rng = world.random_generator(
                7_000 + seed, list(TASKS).index(task.name), label, n % each
            )
            images.append(
                world.draw(*task.classes[label], rng, word=word, **options)[0]
            )
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
        source_rows=(
            None
            if dataset.source_rows is None
            else [dataset.source_rows[c] for c in classes]
        ),
        train=part(dataset.train),
        val=part(dataset.val),
        test=part(dataset.test),
    )


def base_new(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Base classes, the first ceil(n/2) labels, and new classes, the rest, each
    relabelled from 0.

    Raises:
        InputError: fewer than two classes.
    """
    n = len(dataset.classnames)
    if n < 2:
        raise InputError(
            f"base and new classes need at least 2 classes, {dataset.name!r} has {n}"
        )
    half = math.ceil(n / 2)
    return subset(dataset, list(range(half))), subset(dataset, list(range(half, n)))


def few_shot(dataset: Dataset, shots: int, seed: int) -> Dataset:
    """The dataset with `shots` training images a class and min(shots, 4) validation
    images a class; see :func:`draw`.

    Args:
        seed: of Python's generator, which does nothing else.

    Raises:
        InputError: shots below 1; a class without training images.

    A warning says when no class has as many images: then all are taken.
    """
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise InputError(f"shots must be a whole number of at least 1, not {shots!r}")
    if len(dataset.train) == 0:
        raise InputError(
            f"{dataset.name!r} has no training images: it is made for testing alone"
        )
    counts = torch.bincount(dataset.train.labels, minlength=len(dataset.classnames))
    fewest, most = int(counts.argmin()), int(counts.argmax())
    if counts[fewest] == 0:
        raise InputError(
            f"class {dataset.classnames[fewest]!r} of {dataset.name!r} has no training"
            " images"
        )
    if counts[most] < shots:
        warnings.warn(
            f"{shots} shots are more than {dataset.name!r} has: class"
            f" {dataset.classnames[most]!r} has {int(counts[most])} training images and"
            " no class has more, so all of them are taken",
            stacklevel=2,
        )
    return draw(dataset, shots, random.Random(seed))


def draw(dataset: Dataset, shots: int, generator: random.Random) -> Dataset:
    """The draw of CoOp's code (Zhou et al. 2022), which all later papers share.

    It goes class by class in order of first appearance, over all classes, before any
    base/new selection, first for training and then for validation. A class with fewer
    images gives all it has. Validation images that are the test set are left as they
    are.
    """

    def sample(split, each):
        by_label = {}
        for row, label in enumerate(split.labels.tolist()):
            by_label.setdefault(label, []).append(row)
        drawn = (
            rows if len(rows) < each else generator.sample(rows, each)
            for rows in by_label.values()
        )
        return split.take([row for rows in drawn for row in rows])

    train, val = sample(dataset.train, shots), dataset.val
    if val.key != dataset.test.key:
        val = sample(val, min(shots, 4))
    return replace(dataset, train=train, val=val)
