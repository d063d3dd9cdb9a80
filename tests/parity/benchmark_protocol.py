"""The benchmark's protocol against what its official loaders and scheduler compute."""

import json
import os
import random
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch

from promptkit.data import Dataset, Split, base_new, few_shot
from promptkit.data.benchmark import PARTS, TABLE, cut_two, read
from promptkit.data.datasets import draw, from_listing
from promptkit.recipe import Recipe, learning_rate


def check_benchmark(clip, fixture, arrays):
    """Learning rates by epoch, seeded draws and their halves, the cut for validation,
    and whole runs of loaders.
    """
    for schedule in fixture.get("schedule", ()):
        rates = schedule.pop("lr_of_epoch")
        recipe = Recipe(**schedule)
        assert [
            learning_rate(recipe, epoch) for epoch in range(len(rates))
        ] == pytest.approx(rates, rel=1e-12)
    if "fewshot" in fixture:
        check_draws(fixture["fewshot"])
    if "split_trainval" in fixture:
        cut, counts = fixture["split_trainval"], {}
        items = fixture["fewshot"]["train"]
        for item in items:
            counts[item[1]] = counts.get(item[1], 0) + 1
        parts = cut_two(
            [i for i in items if counts[i[1]] >= 3],
            random.Random(cut["seed"]),
            cut["p_val"],
        )
        assert [[item[0] for item in part] for part in parts] == [
            cut["train"],
            cut["val"],
        ]
    for name, run in fixture.get("loaders", {}).items():
        with (
            tempfile.TemporaryDirectory() as root,
            mock.patch.dict(os.environ, PROMPTKIT_CACHE=f"{root}/cache"),
        ):
            check_loader(name, run, Path(root))


def check_draws(fewshot):
    """The images drawn for training and validation, and what of them is of base and of
    new classes.
    """

    def split(part):
        labels = torch.tensor([label for _, label, _ in fewshot[part]])
        return Split(labels, None, torch.arange(len(labels)), part)

    def items(dataset, part):
        drawn = getattr(dataset, part)
        labels = drawn.labels.tolist()
        rows = [fewshot[part][row] for row in drawn.rows.tolist()]
        assert [dataset.classnames[label] for label in labels] == [
            name for _, _, name in rows
        ]
        return [
            [path, label, name]
            for (path, _, name), label in zip(rows, labels, strict=True)
        ]

    names = dict(sorted({label: name for _, label, name in fewshot["train"]}.items()))
    train, val = split("train"), split("val")
    everything = Dataset(
        "x", "x", list(names.values()), "{}", train, val, train.take([])
    )
    for run in fewshot["runs"]:
        drawn = few_shot(everything, run["shots"], run["seed"])
        halves = dict(zip(("base", "new"), base_new(drawn), strict=True))
        for part in ("train", "val"):
            assert [path for path, _, _ in items(drawn, part)] == run[part]
            for half in halves.keys() & run.keys():
                assert items(halves[half], part) == run[half][part], half


def check_loader(name, run, root):
    """A loader's lists from a tree of files: seeded, divided if need be, drawn,
    restricted to a half.
    """
    loader = name.partition(" ")[0]
    key = next(key for key, entry in TABLE.items() if entry.loader == loader)
    assert TABLE[key].folder == run["folder"]
    for path, content in run["files"].items():
        write(root / run["folder"] / path, content)
    generator = random.Random(run["seed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these trees are smaller than the benchmark's
        dataset = from_listing(key, key, read(key, root, generator), template="{}")
    if run["shots"] > 0:
        dataset = draw(dataset, run["shots"], generator)
    if run["subsample"] != "all":
        dataset = base_new(dataset)[run["subsample"] == "new"]
    assert (
        dataset.classnames == run["classnames"]
        and len(dataset.classnames) == run["num_classes"]
    )
    for part in PARTS:
        split = getattr(dataset, part)
        rows, labels = split.rows.tolist(), split.labels.tolist()
        paths = split.source().paths
        items = [
            [paths[row], y, dataset.classnames[y]]
            for row, y in zip(rows, labels, strict=True)
        ]
        if (
            part == "train" and not items
        ):  # of a shifted set, whose official loader hands out its test list again
            assert run["train"] == run["test"]
        else:
            assert items == run.get(part, items), f"{name}: {part}"


def write(path, content):
    """A file of a fixture: text, JSON, MATLAB arrays, or 0 for an image whose content
    does not matter.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mat":
        scipy.io.savemat(path, {key: matlab(value) for key, value in content.items()})
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_text(content or "an image")


def matlab(rows):
    """1 x n: a struct array of [fname, class], a cell array of strings, or numbers."""
    if isinstance(rows[0], str):
        return np.array([rows], dtype=object)
    if isinstance(rows[0], list):
        array = np.zeros((1, len(rows)), dtype=[("fname", object), ("class", object)])
        for i, (file, label) in enumerate(rows):
            array[0, i] = (file, label)
        return array
    return np.array([rows])
