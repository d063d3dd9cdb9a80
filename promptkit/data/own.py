"""One's own images: a folder of class folders, a list of paths and labels, or a split
file of the benchmark's form.
"""

import csv
import io
import os
import random
import re
import warnings
from collections import Counter
from pathlib import Path

from promptkit.data.benchmark import (
    PARTS,
    TABLE,
    Listing,
    cut_three,
    cut_two,
    read_split,
)
from promptkit.data.folders import counts, inside, left_out, scan, unread
from promptkit.data.names import read_text, trimmed
from promptkit.data.tasks import SHIFTS, TASKS, WORDS
from promptkit.errors import InputError, unknown
from promptkit.files import some

FOLDERS = {  # names of folders and entries of lists, in any capitalisation
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
LISTS = (".csv", ".tsv", ".json")
BUILT_IN = (*TASKS, *SHIFTS, WORDS, *TABLE)
EXPECTED = (
    "expected is a folder a class with its images, or folders train, val and test that"
    " hold these"
)


def is_path(name: str) -> bool:
    """Whether a dataset's name is rather meant as a path."""
    return (
        "/" in name
        or "\\" in name
        or name.startswith((".", "~"))
        or name.lower().endswith(LISTS)
        or os.path.isdir(name)
    )


def name_of(path) -> str:
    """What to call the data at a path, in tables and in names of files: the path's last
    part, with "my-" before it where that is a dataset's name already.
    """
    return _called(_parts(path)[-1:])


def names_of(paths) -> list[str]:
    """What to call the data at several paths: as much of each path, from its end, as it
    takes to tell them apart, such as a_photos and b_photos. The same path twice has one
    name.
    """
    places = [Path(path).expanduser().resolve() for path in paths]
    parts, names = {place: _parts(place) for place in places}, {}
    for place, mine in parts.items():
        others = [other for other in parts.values() if other != mine]
        for n in range(1, len(mine) + 1):
            name = _called(mine[-n:])
            if name not in [_called(other[-n:]) for other in others]:
                break
        start, n = name, 2
        while name in names.values():  # /a/b, /a_b and /a/b.csv are called alike
            name, n = f"{start}-{n}", n + 1
        names[place] = name
    return [names[place] for place in places]


def labels(datasets) -> dict[str, str]:
    """{path: what to call the data there} of those datasets that are one's own."""
    paths = [
        name
        for name in datasets
        if isinstance(name, str) and name not in BUILT_IN and is_path(name)
    ]
    return dict(zip(paths, names_of(paths), strict=True))


def _parts(path):
    path = Path(path).expanduser().resolve()
    last = path.stem if path.suffix.lower() in LISTS else path.name
    return [*path.parts[1:-1], last or "images"]


def _called(parts):
    name = "_".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)
    return f"my-{name}" if name in BUILT_IN else name


def read(path) -> Listing:
    """The images of a folder or of a list.

    A folder holds a folder a class, or folders train, val and test that do; classes are
    the folders' names, in sorted order. A CSV file has the columns path (from its own
    folder), label (the class name) and, if one likes, split (train, val or test). A
    split file is the benchmark's, ``{"train": [[path, label, class name], ...],
    "val": ..., "test": ...}``, and is found in a folder as ``split_zhou_NAME.json``.
    What has no division at all is cut 50/20/30 % a class by a generator of seed 1;
    where only validation images are missing, 20 % of each class for training are set
    apart (of those with at least 3 images). A warning says which.

    Raises:
        InputError: nothing is there, the layout is none of these, there is one class
            only, a class is empty or too small, a label is unknown, or an image is
            missing.
    """
    path = Path(path).expanduser()
    if not os.path.exists(path):  # a name that is too long for the system too
        raise InputError(f"there is no folder or CSV file {path}")
    if path.is_dir():
        listing = _read_folder(path)
    elif path.suffix.lower() == ".json" and path.is_file():
        listing = _read_split(path)
    elif path.suffix.lower() in LISTS and path.is_file():
        listing = _labelled(path.parent, _read_list(path), path)
    else:
        raise InputError(f"{path} is neither a folder nor a CSV file: {EXPECTED}")
    listing.turn = True
    listing.check(name_of(path))
    _say_untested(_several(listing, path), path)
    return listing


def _say_untested(listing, path):
    tested = {label for _, label, *_ in listing.test}
    names = [n for y, n in enumerate(listing.classnames) if y not in tested]
    if names:
        warnings.warn(
            f"{path}: the class {some(names)} has no test images, so nothing is"
            " measured on it",
            stacklevel=5,
        )


def _several(listing, path):
    if len(listing.classnames) < 2:
        raise InputError(
            f"{path} has one class only, {listing.classnames[0]!r}, so there is nothing"
            f" to tell apart: {EXPECTED}"
        )
    return listing


def _labelled(folder, items, path):
    """The Listing of (path, class name) pairs by split, divided where they are not."""
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
    _cut(_several(listing, path), path)
    return listing


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
        few = _set_apart(listing, generator)
        done = (
            f"20 % of each class's training images were set apart for validation{few}"
        )
    elif listing.train and not listing.test:
        listing.test = listing.val
        few = _set_apart(listing, generator)
        done = (
            "the validation images serve for testing, and 20 % of each class's training"
            f" images for validation{few}"
        )
    else:
        return
    warnings.warn(f"{path}: {done}, with seed 1", stacklevel=6)


def _set_apart(listing, generator):
    """Take images for validation from those for training, but for classes that have too
    few, and return what is said of these.
    """
    count = Counter(name for *_, name in listing.train)
    left = [item for item in listing.train if count[item[2]] < 3]
    enough = [item for item in listing.train if count[item[2]] >= 3]
    listing.train, listing.val = cut_two(enough, generator)
    listing.train += left
    few = [name for name in count if count[name] < 3]
    return f" (none of {some(few)}, with fewer than 3)" if few else ""


# --- folders --------------------------------------------------------------------------


def _read_folder(path):
    top = _unwrapped(path)
    split = _split_file(top)
    if split is not None:
        return _read_split(split)
    folders, images = inside(top)
    for at in {path, top}:
        lists = [e.name for e in os.scandir(at) if e.name.lower().endswith(LISTS[:2])]
        if others := sorted(filter(counts, lists)):
            advice = f"{others[0]} in {at} is not read; to use it, give its own path"
            if not folders:
                raise InputError(f"{top} holds no class folders, and {advice}")
            warnings.warn(advice, stacklevel=5)
    if not folders:
        what = f"{len(images)} images, all of" if images else "no class folders with"
        raise InputError(
            f"{top} holds {what} {'one class' if images else 'images'}: {EXPECTED}"
        )
    _say_loose(top, images)
    items, skipped = {part: [] for part in PARTS}, []
    for at, part in _divided(top, folders).items():
        for name, paths in scan(top / at).items():
            others = left_out(top / at / name)
            if not paths:
                also = f"; {unread(others)}: convert them to .jpg" if others else ""
                raise InputError(
                    f"the class folder {top / at / name} holds no images: fill or"
                    f" remove it{also}"
                )
            skipped += others
            start = f"{at}/" if at else ""
            items[part] += [(f"{start}{image}", trimmed(name)) for image in paths]
    if not any(items.values()):
        raise InputError(f"{top} holds no class folders with images: {EXPECTED}")
    if skipped:
        warnings.warn(
            f"{path}: {unread(skipped)}, such as {skipped[0]}, and are left out:"
            " convert them to .jpg",
            stacklevel=4,
        )
    return _labelled(top, items, path)


def _say_loose(folder, images):
    if images:
        warnings.warn(
            f"{folder}: {len(images)} images lie beside the class folders, such as"
            f" {images[0]}, and are left out",
            stacklevel=5,
        )


def _unwrapped(folder, divided=False):
    """The first folder down a path of folders that hold nothing else, as archives leave
    them; not past one that is a split, unless it lies in one.
    """
    for _ in range(20):
        folders, images = inside(folder)
        only = folder / folders[0] if len(folders) == 1 and not images else None
        if only is None or _split_file(folder) is not None:
            return folder
        below, direct = inside(only)
        wraps = below and not direct or _split_file(only) is not None
        split = _part(only.name) and not _are_parts(below) and not divided
        if not wraps or split:
            return folder
        folder = only
    raise InputError(f"{folder} lies too deep: {EXPECTED}")


def _part(name):
    return FOLDERS.get(name.strip().lower())


def _are_parts(names):
    return all(map(_part, names))


def _divided(top, folders):
    """{folder of class folders: split}: {"": "train"} if there are no splits.

    Raises:
        InputError: some folders look like splits and others like classes.
    """
    kinds = {name: inside(top / name) for name in folders}
    parts = {name: _part(name) for name in folders if _part(name)}
    whole = [n for n, (below, images) in kinds.items() if below and not images]
    if not parts:
        for name in whole:
            below = kinds[name][0]
            if _are_parts(below):
                raise InputError(
                    f"{top} holds class folders with splits in them, such as"
                    f" {name}/{below[0]}: {EXPECTED}"
                )
        return {"": "train"}
    others = [n for n in folders if n not in parts and any(kinds[n])]
    flat = [name for name, (below, images) in kinds.items() if images and not below]
    flat = [name for name in flat if name in parts]
    if others and not parts.keys() & whole and len(parts) == 1:
        return {"": "train"}  # "train" may be a class, beside buses
    if others:
        raise InputError(
            f"{top} holds both splits ({', '.join(parts)}) and other folders with"
            f" images ({', '.join(others[:3])}): {EXPECTED}"
        )
    if flat:
        raise InputError(
            f"{top / flat[0]} holds {len(kinds[flat[0]][1])} images that are in no"
            f" class folder: {EXPECTED}"
        )
    found = {}
    for name, part in parts.items():
        _say_loose(top / name, kinds[name][1])
        if part in found:
            raise InputError(
                f"{top} holds two folders for {part}, {found[part]} and {name}: join"
                " them"
            )
        found[part] = name
    ordered = {found[part]: part for part in PARTS if part in found}
    return {
        _unwrapped(top / name, True).relative_to(top).as_posix(): part
        for name, part in ordered.items()
    }


# --- lists ----------------------------------------------------------------------------


def _split_file(folder):
    """The path of the field's own split file in a folder, None if there is none."""
    found = sorted(path for path in folder.glob("split_zhou_*.json") if path.is_file())
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InputError(
            f"{folder} holds several split files ({names}): give one's path"
        )
    return found[0] if found else None


def _read_split(path):
    """The Listing of a split file, whose paths start at its folder or one in it."""
    listing, _ = read_split(path, ".")
    firsts = [getattr(listing, part)[:1] for part in PARTS]
    firsts = [image for ((image, *_),) in filter(None, firsts)]
    if not firsts:
        raise InputError(f"{path} lists no images")
    folders = inside(path.parent)[0]
    for folder in sorted(
        ["", *folders], key=lambda name: (name != "", name != "images")
    ):
        if all((path.parent / folder / image).is_file() for image in firsts):
            break
    else:
        raise InputError(
            f"{path}: the image {firsts[0]} is neither in its folder nor in one of"
            f" {', '.join(folders) or 'those beside it, as there are none'}"
        )
    start = f"{folder}/" if folder else ""
    for part in PARTS:
        items = [(start + image, y, name) for image, y, name in getattr(listing, part)]
        setattr(listing, part, items)
    return listing


def _read_list(path):
    """{split: [(path of an image, class name)]} of a CSV file."""
    head, rows = _table(path)
    missing = [column for column in ("path", "label") if column not in head]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r}, but {', '.join(head) or 'none'}: it"
            " needs path and label, and may have split"
        )
    at = {column: head.index(column) for column in ("path", "label")}
    split = head.index("split") if "split" in head else None
    if split is not None and not any(row[split] for _, row in rows):
        split = None
    items, seen, left, again = {part: [] for part in PARTS}, {}, [], []
    for n, row in rows:
        image, name = row[at["path"]], row[at["label"]]
        if not image or not name:
            raise InputError(
                f"{path}: line {n} has no {'path' if not image else 'label'}"
            )
        part = "train" if split is None else _part(row[split])
        if part is None:
            if not row[split]:
                raise InputError(f"{path}: line {n} has no split")
            raise unknown(f"split in line {n} of {path}", row[split], PARTS)
        image = _image_path(image, path.parent)
        if _left_behind(image):
            left.append(image)
            continue
        first, *said = seen.setdefault(os.path.normpath(image), (n, name, part))
        if said != [name, part]:
            raise InputError(
                f"{path}: lines {first} and {n} say different things of {image}"
            )
        if first != n:  # an image might be trained and tested on
            again.append(image)
            continue
        items[part].append((image, name))
    for images, what in ((left, "what programs leave"), (again, "an image again")):
        if images:
            warnings.warn(
                f"{path}: {len(images)} of {len(rows)} lines list {what}, such as"
                f" {images[0]}, and are left out",
                stacklevel=5,
            )
    if not any(items.values()):
        raise InputError(f"{path} lists no images")
    return items


def _table(path):
    """The columns' names in lower case, and (line, fields) of each row, trimmed."""
    lines = read_text(path).split("\n")
    if not any(map(trimmed, lines)):
        raise InputError(f"the CSV file {path} is empty")
    mark = None
    start = next(n for n, line in enumerate(lines) if trimmed(line))
    if said := re.fullmatch(r'"?sep=(.)"?', trimmed(lines[start])):  # as Excel says it
        mark, start = said[1], start + 1
    head = next(filter(trimmed, lines[start:]), "")
    mark = mark or max(",;\t|", key=head.count)
    reader = csv.reader(
        io.StringIO("\n".join(lines[start:])),
        delimiter=mark,
        skipinitialspace=True,
        strict=True,
    )
    rows = []
    try:
        for row in reader:
            row = list(map(trimmed, row))
            if any(row):
                rows.append((start + reader.line_num, row))
    except csv.Error as error:
        raise InputError(
            f"damaged CSV file {path} (line {start + reader.line_num}: {error})"
        ) from None
    if not rows:
        raise InputError(f"the CSV file {path} is empty")
    head = [name.lower() for name in rows.pop(0)[1]]
    twice = [name for name in head if name and head.count(name) > 1]
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}")
    for n, row in rows:
        row += [""] * (len(head) - len(row))
        if any(row[len(head) :]):
            raise InputError(
                f"{path}: line {n} has {len(row)} fields, the first line {len(head)}: a"
                f" field that holds {mark!r} must stand in quotes"
            )
    return head, rows


def _image_path(text, folder):
    """A path as it is written on any system, with forward slashes."""
    if "\\" in text and not (folder / text).exists():
        text = text.replace("\\", "/")
    return os.path.expanduser(text)


def _left_behind(image):
    *folders, name = image.split("/")
    return name.startswith("._") or bool(
        {"__MACOSX", ".ipynb_checkpoints"} & {*folders}
    )
