"""Datasets by name or path: the mini world's, the benchmark's and one's own."""

import hashlib
import json
import os
import warnings
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from promptkit.data import benchmark, own, world
from promptkit.data.names import names_for, warn_of_codes
from promptkit.data.render import SIZE
from promptkit.data.samples import base_new, draw, few_shot, subset
from promptkit.data.splits import Dataset, Split
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
from promptkit.descriptions import descriptions_for, file_in
from promptkit.errors import unknown
from promptkit.files import cache_folder, lock, write_atomically

__all__ = [
    "Dataset",
    "Split",
    "base_new",
    "draw",
    "few_shot",
    "from_listing",
    "list_datasets",
    "load_dataset",
    "stamped_labels",
    "subset",
]

SPLITS = {
    "train": (1, 32),
    "val": (2, 8),
    "test": (100, 25),
}  # name: (seed, images a class)


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


def load_dataset(name, root=None, *, classnames=None, descriptions=None) -> Dataset:
    """A dataset by name, or one's own by its path.

    Args:
        name: one of :func:`list_datasets`, or the path of a folder of class folders, of
            a CSV file or of a split file, see :func:`promptkit.data.own.read`.
        root: folder of the real datasets; by default $PROMPTKIT_DATA, else ./data.
        classnames: a file of other names for the classes, see
            :func:`promptkit.data.names.names_for`.
        descriptions: sentences for every class: a JSON file or a dict, see
            :func:`promptkit.descriptions.descriptions_for`; or a folder of such files,
            each called like its dataset, see :func:`promptkit.descriptions.file_in`.

    Raises:
        InputError: unknown name (the message lists the nearest valid ones), data that
            is missing or damaged, or files that do not fit the classes.
    """
    name = os.fspath(name)
    mine = name not in list_datasets() and own.is_path(name)
    dataset = _real(name, root) if name in benchmark.TABLE else _of(name, mine)
    if classnames is not None:
        dataset = _renamed(dataset, names_for(classnames, dataset.classnames))
    if mine:
        warn_of_codes(dataset.classnames, name)
    told = "" if descriptions is None else _told(descriptions)
    if descriptions is not None and os.path.isdir(_expanded(descriptions)):
        file = file_in(descriptions, dataset.name)
        if file is None:
            warnings.warn(
                f"{descriptions} has no file about {dataset.name}, which stays without",
                stacklevel=2,
            )
        descriptions = file
    if descriptions is not None:
        said = descriptions_for(descriptions, dataset.classnames)
        told = "" if said == dataset.descriptions else told
        dataset = replace(dataset, descriptions=said, described=told)
    return dataset


def _told(given):
    """What to call sentences that are given: the name of their file or folder, and a
    part of the digest of what it holds.
    """
    if not isinstance(given, str | os.PathLike):
        name, content = "given", json.dumps(given, sort_keys=True, default=str).encode()
    else:
        path = Path(_expanded(given)).absolute()
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        files = [file for file in files if file.is_file()]
        name, content = path.name, b"\0".join(file.read_bytes() for file in files)
    return f"{name}#{hashlib.sha256(content).hexdigest()[:6]}"


def _expanded(path):
    named = isinstance(path, str | os.PathLike)
    return os.path.expanduser(path) if named else ""


def _of(name, mine):
    return _own(name) if mine else _mini(name)


def _renamed(dataset, names):
    """The dataset with other names for its classes; what is said of them stays."""
    said = {
        new: dataset.descriptions[old]
        for old, new in zip(dataset.classnames, names, strict=True)
        if old in dataset.descriptions
    }
    return replace(dataset, classnames=names, descriptions=said)


def _real(name, root):
    entry = benchmark.TABLE[name]
    folder = benchmark.data_root(root).resolve() / entry.folder
    changed = tuple(
        path.stat().st_mtime_ns if path.exists() else 0
        for path in (folder, folder / (entry.split_file or ""))
    )
    templates = (
        benchmark.ENSEMBLE
        if name == "imagenet"
        else (*benchmark.ENSEMBLE, entry.template)
    )
    return from_listing(
        name,
        entry.title,
        _listing(name, folder.parent, changed),
        template=entry.template,
        templates=templates,
        shifts=entry.shifts,
    )


@lru_cache(32)
def _listing(name, root, changed):
    return benchmark.read(name, root)


def _own(path):
    name, listing = own.name_of(path), own.read(path)
    place = str(Path(path).expanduser().absolute())
    return from_listing(name, name, listing, template=PLAIN, path=place)


def from_listing(name: str, title: str, listing: benchmark.Listing, **more) -> Dataset:
    """The dataset of images in files that have been listed and checked."""

    # anew, as files may have changed since they were listed; the same for one list
    files = {id(files): files.again() for files in listing.files.values()}

    def split(part):
        mine = files[id(listing.files[part])]
        labels = torch.tensor(
            [item[1] for item in getattr(listing, part)], dtype=torch.long
        )
        return Split(labels, lambda: mine, torch.arange(len(labels)))

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
        descriptions=facts(task),
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
        path = cache_folder("images") / f"{key}-{SIZE}px.npy"
        with lock(path):
            images = _kept(path, (len(labels), 3, SIZE, SIZE))
            if images is None:
                images = draw_all()
                write_atomically(path, lambda file: _keep(file, images))
        return torch.from_numpy(images)

    def draw_all():
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
        return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))

    split = Split(labels, source, torch.arange(len(labels)), key)
    return split


def _keep(file, images):
    np.save(file, images)
    file.write(hashlib.sha256(images).digest())


def _kept(path, shape):
    """The images of a file of the cache folder, or None; a damaged one is announced."""
    if not path.exists():
        return None
    try:
        with open(path, "rb") as file:
            images = np.load(file)
            fits = images.shape == shape and images.dtype == np.uint8
            if fits and file.read() == hashlib.sha256(images).digest():
                return images
    except Exception:  # numpy raises a dozen kinds for a damaged file
        pass
    warnings.warn(f"damaged cache {path}: drawing its images again", stacklevel=4)
    return None


# Part of every cache key: raise it when a change of the world changes its pictures.
WORLD_VERSION = 2
