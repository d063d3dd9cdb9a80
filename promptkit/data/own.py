"""One's own images: a folder of class folders, or a CSV file of paths and labels."""

import random
import re
import warnings
from pathlib import Path

import pandas as pd

from promptkit.data.benchmark import PARTS, Listing, cut_three, cut_two
from promptkit.data.images import scan
from promptkit.errors import InputError, unknown

FOLDERS = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


def is_path(name: str) -> bool:
    """Whether a dataset's name is rather meant as a path."""
    return (
        "/" in name
        or "\\" in name
        or name.startswith((".", "~"))
        or name.endswith(".csv")
        or Path(name).is_dir()
    )


def name_of(path) -> str:
    """What to call the data at a path, in tables and in names of files."""
    path = Path(path).expanduser().resolve()
    return re.sub(r"[^\w.-]+", "_", path.stem if path.suffix == ".csv" else path.name)


def read(path) -> Listing:
    """The images of a folder or a CSV file.

    A folder holds a folder a class, or folders train, val and test that do; classes are
    the folders' names, in sorted order. A CSV file has the columns path (from its own
    folder), label (the class name) and, if one likes, split (train, val or test). What
    has no division at all is cut 50/20/30 % a class by a generator of seed 1; where
    only validation images are missing, 20 % of each class for training are set apart. A
    warning says which.

    Raises:
        InputError: nothing is there, a class is empty or too small, a label is unknown,
            or an image is missing.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        folder, items = path, _read_folder(path)
    elif path.suffix == ".csv" and path.exists():
        folder, items = path.parent, _read_csv(path)
    else:
        raise InputError(f"there is no folder or CSV file {path}")
    names = sorted({name for part in PARTS for _, name in items[part]})
    if items["train"]:
        trained = {name for _, name in items["train"]}
        for part in ("val", "test"):
            for image, name in items[part]:
                if name not in trained:
                    raise InputError(
                        f"{path}: no training image has the label {name!r} of {image}"
                        f" in {part}"
                    )
    label = {name: n for n, name in enumerate(names)}
    listing = Listing(
        folder,
        **{
            part: [(image, label[name], name) for image, name in items[part]]
            for part in PARTS
        },
    )
    listing.classnames = names
    _cut(listing, path)
    return listing.check(name_of(path))


def _cut(listing, path):
    """Divide what is not divided, and say so."""
    generator = random.Random(1)
    if listing.train and not listing.val and not listing.test:
        groups = {}
        for image, label, name in listing.train:
            groups.setdefault(label, (label, name, []))[2].append(image)
        for part, items in cut_three(
            [groups[label] for label in sorted(groups)], generator
        ).items():
            setattr(listing, part, items)
        done = (
            "all images were divided 50/20/30 % a class for training, validation and"
            " testing"
        )
    elif listing.train and not listing.val:
        listing.train, listing.val = cut_two(listing.train, generator)
        done = "20 % of each class's training images were set apart for validation"
    elif listing.train and not listing.test:
        listing.test, listing.val = listing.val, []
        listing.train, listing.val = cut_two(listing.train, generator)
        done = (
            "the validation images serve for testing, and 20 % of each class's training"
            " images for validation"
        )
    else:
        return
    warnings.warn(f"{path}: {done}, with seed 1", stacklevel=4)


def _read_folder(path):
    """{split: [(path of an image, class name)]}"""
    inside = {
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    }
    divided = inside and (
        inside <= set(FOLDERS) or len(inside & set(FOLDERS)) > 1
    )  # "train" may be a class
    items = {part: [] for part in PARTS}
    for folder in sorted(inside & set(FOLDERS)) if divided else [""]:
        for name, paths in scan(path / folder).items():
            if not paths:
                raise InputError(
                    f"the class folder {path / folder / name} holds no images: fill or"
                    " remove it"
                )
            part = FOLDERS[folder] if divided else "train"
            items[part] += [
                (f"{folder}/{image}" if divided else image, name) for image in paths
            ]
    if not any(items.values()):
        raise InputError(f"{path} holds no class folders with images")
    return items


def _read_csv(path):
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"damaged CSV file {path} ({error})") from None
    missing = [column for column in ("path", "label") if column not in table]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r}: it needs path and label, and may"
            " have split"
        )
    items = {part: [] for part in PARTS}
    parts = table["split"] if "split" in table else ["train"] * len(table)
    for n, (image, name, part) in enumerate(
        zip(table["path"], table["label"], parts, strict=True)
    ):
        if not image or not name.strip():
            raise InputError(
                f"{path}: line {n + 2} has no {'path' if not image else 'label'}"
            )
        if part not in PARTS:
            raise unknown(f"split in line {n + 2} of {path}", part, PARTS)
        items[part].append((image, name))
    if not len(table):
        raise InputError(f"{path} lists no images")
    return items
