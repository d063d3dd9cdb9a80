"""Parts of a dataset: few-shot samples, base and new classes."""

import math
import random
import warnings
from dataclasses import replace
from pathlib import PurePosixPath

import torch

from promptkit.data.images import Files
from promptkit.data.names import read_json
from promptkit.data.splits import Dataset, Split
from promptkit.errors import InputError


def subset(dataset: Dataset, classes: list[int]) -> Dataset:
    """The dataset with these classes alone, relabelled 0, 1, ... in the order given.

    Its pool, images without labels, stays that of all classes.
    """
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


def few_shot(dataset: Dataset, shots: int, seed: int, draw=None) -> Dataset:
    """The dataset with `shots` training images a class and min(shots, 4) validation
    images a class; see :func:`draw`.

    Args:
        seed: of Python's generator, which does nothing else.
        draw: a JSON file ``{"train": [path, ...], "val": [path, ...]}`` of the images
            to take instead, such as another program drew. Paths are those of the
            dataset's files, or end like them.

    Raises:
        InputError: shots below 1; a class without training images; a file `draw` that
            does not fit the dataset or the shots.

    A warning says when no class has as many images: then all are taken.
    """
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise InputError(f"shots must be a whole number of at least 1, not {shots!r}")
    if len(dataset.train) == 0:
        raise InputError(
            f"{dataset.name!r} has no training images here: it serves for testing alone"
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
    if draw is not None:
        return _given(dataset, shots, draw)
    return _draw(dataset, shots, random.Random(seed))


def draw(dataset: Dataset, shots: int, generator: random.Random) -> Dataset:
    """The draw of CoOp's code (Zhou et al. 2022), which all later papers share.

    It goes class by class in order of first appearance, over all classes, before any
    base/new selection, first for training and then for validation. A class with fewer
    images gives all it has. Validation images that are the test set are left as they
    are. All images for training stay at hand as the pool, without labels.
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
    if not dataset.val_is_test:
        val = sample(val, min(shots, 4))
    return _drawn(dataset, train, val)


_draw = draw


def _drawn(dataset, train, val):
    pool = {}
    if dataset.pool is None:
        pool = dict(pool=dataset.unlabelled, pool_classnames=list(dataset.classnames))
    return replace(dataset, train=train, val=val, **pool)


def _given(dataset, shots, path):
    """The dataset with the images that a file lists."""
    content = read_json(path)
    if not isinstance(content, dict) or "train" not in content:
        raise InputError(
            f'{path} must hold {{"train": [path, ...], "val": [path, ...]}}'
        )
    wanted = {"train": shots}
    if not dataset.val_is_test and len(dataset.val):
        wanted["val"] = min(shots, 4)
    parts = {"train": dataset.train, "val": dataset.val}
    for part, each in wanted.items():
        split = parts[part]
        rows = _rows(split, content.get(part), f'"{part}" of {path}', dataset.name)
        parts[part] = split.take(rows)
        classes = len(dataset.classnames)
        there = torch.bincount(split.labels, minlength=classes).clamp(max=each)
        given = torch.bincount(parts[part].labels, minlength=classes)
        if (wrong := (given != there).nonzero()).numel():
            label = int(wrong[0])
            raise InputError(
                f'"{part}" of {path} gives {int(given[label])} images of the class'
                f" {dataset.classnames[label]!r}, a draw of {shots} shots has"
                f" {int(there[label])}"
            )
    return _drawn(dataset, **parts)


def _rows(split: Split, listed, where, name):
    """The positions in a split of the images that are listed by path."""
    source = split.source()
    if not isinstance(source, Files):
        raise InputError(f"{name!r} has no files that {where} could name")
    if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
        raise InputError(f"{where} must be a list of paths")
    by_name = {}
    for at, row in enumerate(split.rows.tolist()):
        path = PurePosixPath(source.paths[row])
        by_name.setdefault(path.name, []).append((at, path.parts))
    rows = {}
    for text in listed:
        path = PurePosixPath(text.replace("\\", "/"))
        fits = [
            at for at, parts in by_name.get(path.name, ()) if _tails(parts, path.parts)
        ]
        if len(fits) != 1:
            what = "none" if not fits else f"{len(fits)}"
            raise InputError(f"{where}: {what} of the images of {name!r} is {text!r}")
        if fits[0] in rows:
            raise InputError(f"{where} lists {text!r} twice")
        rows[fits[0]] = text
    return list(rows)


def _tails(one, other):
    """Whether one path ends like the other."""
    n = min(len(one), len(other))
    return one[-n:] == other[-n:]
