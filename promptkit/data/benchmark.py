"""The eleven datasets of the benchmark and the four shifts of ImageNet, read from disk
in the field's own formats.

The folders are those that were prepared for CoOp's code (Zhou et al. 2022). A file
`split_zhou_NAME.json` fixes which images are for training, validation and testing.
Where it is missing, the images are divided by the rules of that code from the official
annotations; such a division is not the published one, and a warning says so. Where that
code takes the order in which a file system lists a folder, this one sorts.

Class names are the benchmark's, with their underscores; prompts turn those into spaces.
"""

import json
import os
import random
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path, PurePosixPath

import open_clip

from promptkit.data.folders import inside, scan
from promptkit.data.images import Files
from promptkit.errors import InputError
from promptkit.files import write_atomically

PLAIN = "a photo of a {}."
# Seven of the eighty templates of Radford et al. 2021; a dataset other than ImageNet
# adds its own.
ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

PARTS = ("train", "val", "test")
Item = tuple  # (path below the dataset's folder, label, class name[, size in bytes])


@dataclass
class Listing:
    """The images of a dataset by split, as its files list them.

    Attributes:
        folder: where paths start.
        classnames: by label; by default those of the items for training.
        source_rows: for a shifted version, which classes of the source its own are.
        files: the images themselves by split, once :meth:`check` has found the lists
            sound.
        turn: whether photos are turned as their EXIF data say.
        state: "ready"; "home-made", of its division; "differs" from the benchmark's
            counts.
        notes: what is worth knowing of how the lists were made.
    """

    folder: Path
    train: list[Item] = field(default_factory=list)
    val: list[Item] = field(default_factory=list)
    test: list[Item] = field(default_factory=list)
    classnames: list[str] | None = None
    source_rows: list[int] | None = None
    files: dict[str, Files] = field(default_factory=dict)
    turn: bool = False
    state: str = "ready"
    notes: list[str] = field(default_factory=list)

    def check(self, title: str) -> "Listing":
        """The listing with its class names and files.

        Raises:
            InputError: labels and names do not agree, or images are missing.
        """
        where = f"{title} in {self.folder}"
        if self.classnames is None:
            names = {}
            for path, label, name, *_ in self.train:
                if names.setdefault(label, name) != name:
                    raise InputError(
                        f"{where}: label {label} of {path} is both {names[label]!r} and"
                        f" {name!r}"
                    )
            missing = next(label for label in count() if label not in names)
            if missing <= max(names, default=0):
                raise InputError(f"{where}: no training image has the label {missing}")
            self.classnames = [names[label] for label in sorted(names)]
        for part in PARTS:
            for path, label, name, *_ in getattr(self, part):
                if not 0 <= label < len(self.classnames):
                    raise InputError(
                        f"{where}: label {label} ({name}) of {path} is out of range, "
                        f"there are {len(self.classnames)} classes for training"
                    )
                if self.classnames[label] != name:
                    raise InputError(
                        f"{where}: label {label} of {path} is {name!r}, not"
                        f" {self.classnames[label]!r}"
                    )
        if not self.test:
            raise InputError(f"{where} has no test images")
        for part in PARTS:
            items = getattr(self, part)
            same = part == "test" and self.test is self.val
            sizes = [item[3] if len(item) > 3 else None for item in items]
            self.files[part] = (
                self.files["val"]
                if same
                else Files(self.folder, [item[0] for item in items], sizes, self.turn)
            )
        return self

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Classes, then images for training, validation and testing."""
        return (len(self.classnames), *(len(getattr(self, part)) for part in PARTS))


@dataclass(frozen=True)
class Entry:
    """What is known of a dataset.

    Attributes:
        title: its usual name.
        loader: its name in CoOp's code and in the name of its split file.
        folder: below the data root. needs: what lies in it, by which a download is
            known to be of this dataset.
        counts: classes, then images for training, validation and testing.
        make: builds the Listing of a folder with a generator, where there is no split
            file.
        images: what the paths of a split file are relative to; None if there is no such
            file.
    """

    title: str
    loader: str
    folder: str
    needs: tuple[str, ...]
    counts: tuple[int, int, int, int]
    make: Callable[[Path, random.Random], Listing]
    images: str | None = None
    template: str = PLAIN
    shifts: tuple[str, ...] = ()

    @property
    def split_file(self) -> str | None:
        return None if self.images is None else f"split_zhou_{self.loader}.json"


def data_root(root=None) -> Path:
    """The folder of the real datasets: `root`, else $PROMPTKIT_DATA, else ./data."""
    return Path(root or os.environ.get("PROMPTKIT_DATA") or "data").expanduser()


def read(
    name: str, root=None, generator: random.Random | None = None, keep: bool = True
) -> Listing:
    """The lists of a dataset's images.

    Args:
        name: a key of TABLE.
        generator: divides the images where there is no split file; by default one of
            seed 1.
        keep: write such a division beside the images, marked as home-made, so that it
            stays the same.

    Raises:
        InputError: files are missing, damaged or do not fit each other; the message
            names them.
    """
    entry, folder = TABLE[name], data_root(root) / TABLE[name].folder
    if not folder.is_dir():
        raise InputError(
            f"{entry.title} is not in {folder}: {remedy(name, root)}, or say by root="
            " (--root) or $PROMPTKIT_DATA where the datasets are"
        )
    if entry.split_file and (folder / entry.split_file).exists():
        listing, made_by = read_split(folder / entry.split_file, entry.images)
        listing.check(entry.title)
    else:
        made_by = "promptkit, seed 1" if entry.split_file else None
        listing = entry.make(folder, generator or random.Random(1)).check(entry.title)
        if made_by and keep:
            _write_split(folder / entry.split_file, entry.images, listing, made_by)
    _compare(listing, name, folder, made_by)
    for note in listing.notes:
        warnings.warn(note, stacklevel=2)
    if name == "imagenet" and not listing.train:
        listing.notes.append(
            f"there is no {folder / 'images' / 'train'}: it can be tested on, which"
            " takes images/val alone, and not trained on"
        )
    return listing


def _compare(listing, name, folder, made_by):
    """What a listing has in common with the published one."""
    entry = TABLE[name]
    counts = listing.counts
    if name == "imagenet" and not listing.train:  # testing needs no more
        counts = (counts[0], entry.counts[1], *counts[2:])
    if made_by:
        listing.state = "home-made"
        listing.notes.append(
            f"the division of {entry.title} in {folder} is home-made ({made_by}), not"
            f" the published {entry.split_file}: accuracies on it cannot be compared"
            " with the papers'"
        )
    elif counts != entry.counts:
        listing.state = "differs"
        numbers = "{} classes and {} + {} + {} images".format
        listing.notes.append(
            f"{entry.title} in {folder} has {numbers(*listing.counts)}, the benchmark's"
            f" has {numbers(*entry.counts)}: accuracies on it cannot be compared with"
            " the papers'"
        )
    drawn = list(folder.glob("split_fewshot/*.pkl"))
    if drawn:
        listing.notes.append(
            f"{folder / 'split_fewshot'} holds {len(drawn)} files with draws of CoOp's"
            " code; they are pickles, which could run code, and are not read: images"
            " are drawn anew by the same rule, on ImageNet others; to use such a draw,"
            " export it as JSON (see 'Your own images' in the book) and give it to"
            " few_shot(..., draw=FILE)"
        )


def remedy(name: str, root=None) -> str:
    """How to get a dataset that is missing."""
    if name == "imagenet":
        return (
            "get it from image-net.org and put its images into images/train/nXXXXXXXX"
            " and images/val/nXXXXXXXX of that folder, with classnames.txt beside"
            " images"
        )
    return (
        "get it with 'promptkit data download"
        f" {name}{'' if root is None else f' --root {root}'}'"
    )


# --- split files ----------------------------------------------------------------------


def read_split(path: Path, images: str) -> tuple[Listing, str | None]:
    """The listing of a split file, not checked yet, and who made it if it is home-made.

    Args:
        images: the folder beside the file that its paths start from; "." for its own.

    Raises:
        InputError: the file is damaged, or an item is not [path, label, class name].
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        parts = {part: content[part] for part in PARTS}
    except KeyError as error:
        raise InputError(
            f"the split file {path} has no list {error}: get it again"
        ) from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(f"damaged split file {path} ({error}): get it again") from None
    prefix = "" if images == "." else f"{images}/"
    listing = Listing(path.parent)
    for part, rows in parts.items():
        for n, row in enumerate(rows if isinstance(rows, list) else [rows]):
            try:
                impath, label, classname = row
                whole = not isinstance(label, bool) and int(label) == float(label)
                label = int(label)
                safe = (
                    not impath.startswith("/")
                    and ".." not in PurePosixPath(impath).parts
                )
                fits = isinstance(classname, str) and whole and label >= 0 and safe
            except (TypeError, ValueError, AttributeError, OverflowError):
                fits = False
            if not fits:
                raise InputError(
                    f'{path}: item {n} of "{part}" must be [path, label, class name],'
                    f" not {row!r}"
                )
            getattr(listing, part).append((prefix + impath, label, classname))
    return listing, content.get("made_by")


def _write_split(path, images, listing, made_by):
    """As the toolbox writes it, with a mark of its own that the toolbox does not
    read.
    """
    start = 0 if images == "." else len(images) + 1
    parts = {
        part: [[path[start:], y, c] for path, y, c in getattr(listing, part)]
        for part in PARTS
    }
    text = json.dumps(parts | {"made_by": made_by}, indent=4)
    try:
        write_atomically(path, lambda file: file.write(text.encode()))
    except OSError:
        pass  # of a folder that cannot be written: the same generator divides alike


# --- the rules by which CoOp's code divides images ------------------------------------


def cut_three(
    groups: Iterable[tuple[int, str, list[str]]], generator: random.Random
) -> dict[str, list[Item]]:
    """50/20/30 % of each (label, class name, paths) for training, validation and
    testing, shuffled.

    Raises:
        InputError: a class has too few images for that.
    """
    parts = {part: [] for part in PARTS}
    for label, name, paths in groups:
        paths = list(paths)
        generator.shuffle(paths)
        train, val = round(0.5 * len(paths)), round(0.2 * len(paths))
        if min(train, val, len(paths) - train - val) < 1:
            raise InputError(
                f"class {name!r} has {len(paths)} images; to divide them 50/20/30 it"
                " takes at least 4"
            )
        for part, some in zip(
            parts,
            (paths[:train], paths[train : train + val], paths[train + val :]),
            strict=True,
        ):
            parts[part] += [(path, label, name) for path in some]
    return parts


def cut_two(
    items: list[Item], generator: random.Random, share: float = 0.2
) -> tuple[list[Item], list[Item]]:
    """Items for training, and a share of each class for validation, shuffled.

    Raises:
        InputError: a class has too few images for that.
    """
    groups, train, val = {}, [], []
    for item in items:
        groups.setdefault(item[1], []).append(item)
    for group in groups.values():
        n = round(share * len(group))
        if n < 1:
            raise InputError(
                f"class {group[0][2]!r} has {len(group)} images; to divide them 80/20"
                " it takes at least 3"
            )
        generator.shuffle(group)
        val += group[:n]
        train += group[n:]
    return train, val


# --- one reader a dataset, for folders without split file -----------------------------


def _lines(path):
    try:
        return [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig").splitlines()
            if line.strip()
        ]
    except FileNotFoundError:
        raise InputError(
            f"the file {path} is missing: get it, or the dataset's split file, again"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"damaged file {path} ({error}): get it again") from None


def _mat(path, key):
    """An array of a MATLAB file."""
    if not path.exists():
        raise InputError(
            f"the file {path} is missing: get it, or the dataset's split file, again"
        )
    from scipy.io import loadmat  # slow to import, and needed by two datasets alone

    try:
        return loadmat(path)[key]
    except Exception as error:  # scipy raises a dozen kinds for a damaged file
        raise InputError(
            f"damaged file {path} ({type(error).__name__}: {error}): get it again"
        ) from None


def _folders(folder, images, names=None):
    """(label, class name, paths) of class folders in sorted order; `names` renames or,
    with None, drops one.
    """
    names, where = names or {}, folder / images
    if not where.is_dir():
        raise InputError(f"the folder {where} is missing: get the dataset again")
    found = {
        name: paths
        for name, paths in scan(where).items()
        if names.get(name, name) is not None
    }
    for name, paths in found.items():
        if not paths:
            raise InputError(
                f"the class folder {where / name} holds no images: get the dataset"
                " again, or remove it"
            )
    if not found:
        raise InputError(f"{where} holds no class folders: get the dataset again")
    rows = enumerate(found.items())
    return [
        (y, names.get(name, name), [f"{images}/{p}" for p in paths])
        for y, (name, paths) in rows
    ]


def _by_folder(images, names=None):
    def make(folder, generator):
        return Listing(folder, **cut_three(_folders(folder, images, names), generator))

    return make


CALTECH = {
    "BACKGROUND_Google": None,
    "Faces_easy": None,
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
EUROSAT = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def _pets(folder, generator):
    def items(path):
        out = []
        for line in _lines(path):
            name, label, *rest = [*line.split(), "", ""]
            if len(rest) != 4 or not label.isdigit():
                raise InputError(
                    f"{path}: a line must be 'image class species breed', not {line!r}"
                )
            out.append(
                (f"images/{name}.jpg", int(label) - 1, name.rpartition("_")[0].lower())
            )
        return out

    train, val = cut_two(items(folder / "annotations" / "trainval.txt"), generator)
    return Listing(folder, train, val, items(folder / "annotations" / "test.txt"))


def _cars(folder, generator):
    names = []
    for cell in _mat(folder / "devkit" / "cars_meta.mat", "class_names")[0]:
        *words, year = str(cell[0]).split(" ")
        names.append(
            " ".join([year, *words])
        )  # the year, last word of the official name, comes first

    def items(images, path):
        out = []
        for row in _mat(path, "annotations")[0]:
            try:
                label, file = int(row["class"].item()) - 1, str(row["fname"].item())
            except (ValueError, IndexError, KeyError) as error:
                raise InputError(
                    f"damaged file {path} ({error}): get it again"
                ) from None
            if not 0 <= label < len(names):
                raise InputError(
                    f"{path}: class {label + 1} of {file} is out of range, there are"
                    f" {len(names)}"
                )
            out.append((f"{images}/{file}", label, names[label]))
        return out

    train, val = cut_two(
        items("cars_train", folder / "devkit" / "cars_train_annos.mat"), generator
    )
    return Listing(
        folder,
        train,
        val,
        items("cars_test", folder / "cars_test_annos_withlabels.mat"),
    )


def _flowers(folder, generator):
    labels, groups = _mat(folder / "imagelabels.mat", "labels").reshape(-1).tolist(), {}
    path = folder / "cat_to_name.json"
    try:
        names = json.loads("\n".join(_lines(path)))
        for n, label in enumerate(labels):
            name = names[str(label)]
            groups.setdefault(label, (label - 1, name, []))[2].append(
                f"jpg/image_{n + 1:05d}.jpg"
            )
    except KeyError as error:
        raise InputError(
            f"{path} has no name for class {error} of imagelabels.mat: get both again"
        ) from None
    except (ValueError, TypeError) as error:
        raise InputError(f"damaged file {path} ({error}): get it again") from None
    return Listing(folder, **cut_three(groups.values(), generator))


def _aircraft(folder, generator):
    names = _lines(folder / "variants.txt")
    labels = {name: label for label, name in enumerate(names)}

    def items(part):
        path, out = folder / f"images_variant_{part}.txt", []
        for line in _lines(path):
            image, _, name = line.partition(" ")
            if name not in labels:
                raise InputError(
                    f"{path}: the variant {name!r} of image {image} is not in"
                    " variants.txt"
                )
            out.append((f"images/{image}.jpg", labels[name], name))
        return out

    return Listing(folder, *map(items, ("train", "val", "test")))


def _sun(folder, generator):
    labels = {
        line: label for label, line in enumerate(_lines(folder / "ClassName.txt"))
    }

    def items(path):
        out = []
        for line in _lines(path):
            name = line.rpartition("/")[0]
            if name not in labels:
                raise InputError(
                    f"{path}: the class {name!r} of {line} is not in ClassName.txt"
                )
            out.append(
                (f"SUN397{line}", labels[name], " ".join(reversed(name.split("/")[2:])))
            )
        return out

    train, val = cut_two(items(folder / "Training_01.txt"), generator)
    return Listing(folder, train, val, items(folder / "Testing_01.txt"))


def _ucf(folder, generator):
    lists, labels = folder / "ucfTrainTestlist", {}
    for line in _lines(lists / "classInd.txt"):
        number, _, name = line.partition(" ")
        labels[name] = int(number) - 1 if number.isdigit() else len(labels)

    def items(path):
        out = []
        for line in _lines(path):
            action, _, file = line.split(" ")[0].partition("/")
            if action not in labels:
                raise InputError(
                    f"{path}: the action {action!r} of {line} is not in classInd.txt"
                )
            name = "_".join(re.findall("[A-Z][^A-Z]*", action))
            out.append(
                (
                    f"UCF-101-midframes/{name}/{file.replace('.avi', '.jpg')}",
                    labels[action],
                    name,
                )
            )
        return out

    train, val = cut_two(items(lists / "trainlist01.txt"), generator)
    return Listing(folder, train, val, items(lists / "testlist01.txt"))


# --- ImageNet and its shifts ----------------------------------------------------------


def _wnids(folder, notes):
    """{wnid: class name} in sorted order, of a folder's classnames.txt or of the one in
    imagenet's; else of open_clip, which is noted.
    """
    imagenet = folder.parent / "imagenet"
    for path in (folder / "classnames.txt", imagenet / "classnames.txt"):
        if path.exists():
            pairs = [line.partition(" ")[::2] for line in _lines(path)]
            if not all(name for _, name in pairs):
                raise InputError(
                    f"{path}: a line must be 'wnid class name'; get the file again"
                )
            return dict(sorted(pairs))
    images = next(
        (
            path
            for path in (imagenet / "images/train", imagenet / "images/val")
            if path.is_dir()
        ),
        None,
    )
    wnids = inside(images)[0] if images else []
    if len(wnids) != 1000:
        raise InputError(
            f"{folder / 'classnames.txt'} is missing: it holds a line 'wnid class name'"
            " for each class"
        )
    notes.append(
        f"there is no {folder / 'classnames.txt'}; taking the class names that come"
        " with open_clip, which are the published ones"
    )
    return dict(zip(wnids, open_clip.IMAGENET_CLASSNAMES, strict=True))


def _wnid_folders(folder, images, names):
    """{wnid: {path: size}}, the wnids sorted and all among `names`."""
    where = folder / images
    if not where.is_dir():
        raise InputError(f"the folder {where} is missing")
    found = scan(where, remember=True)
    if not found:
        raise InputError(
            f"{where} holds no class folders; sort its images into folders named by"
            " wnid (nXXXXXXXX)"
        )
    for wnid, paths in found.items():
        if wnid not in names:
            raise InputError(
                f"the folder {where / wnid} is of no class in classnames.txt"
            )
        if not paths:
            raise InputError(f"the class folder {where / wnid} holds no images")
    return found


def _sized(images, found, names):
    return [(f"{images}/{path}", label, names[label], size)
            for label, paths in found for path, size in paths.items()]  # fmt: skip


def _imagenet(folder, generator):
    """Labels follow the sorted folders of images/train; what is called validation there
    is the test set.
    """
    notes = []
    names = _wnids(folder, notes)
    test = _wnid_folders(folder, "images/val", names)
    train = (
        _wnid_folders(folder, "images/train", names)
        if (folder / "images" / "train").is_dir()
        else {}
    )
    differ = sorted(set(train) ^ set(test)) if train else []
    if differ:
        raise InputError(
            f"{folder / 'images'}: train and val hold different classes, such as"
            f" {differ[0]}"
        )
    classnames = [names[wnid] for wnid in test]
    train = _sized("images/train", enumerate(train.values()), classnames)
    test = _sized("images/val", enumerate(test.values()), classnames)
    return Listing(folder, train, test, test, classnames, notes=notes)


def _shift(images):
    """Class folders named by wnid: their own classes, labelled from 0 in sorted
    order.
    """

    def make(folder, generator):
        notes = []
        names = _wnids(folder, notes)
        found = _wnid_folders(folder, images, names)
        classnames = [names[wnid] for wnid in found]
        return Listing(
            folder,
            test=_sized(images, enumerate(found.values()), classnames),
            classnames=classnames,
            source_rows=[list(names).index(wnid) for wnid in found],
            notes=notes,
        )

    return make


def _imagenetv2(folder, generator):
    """Class folders named by label; "10" comes after "2"."""
    images, notes = "imagenetv2-matched-frequency-format-val", []
    classnames = list(_wnids(folder, notes).values())
    where = folder / images
    if not where.is_dir():
        raise InputError(f"the folder {where} is missing")
    found = scan(where, remember=True)
    for name in found:
        if not name.isdecimal() or int(name) >= len(classnames):
            raise InputError(
                f"the folder {where / name} must be a label from 0 to"
                f" {len(classnames) - 1}"
            )
    by_label = sorted((int(name), paths) for name, paths in found.items())
    return Listing(
        folder,
        test=_sized(images, by_label, classnames),
        classnames=classnames,
        source_rows=list(range(len(classnames))),
        notes=notes,
    )


# --- the table ------------------------------------------------------------------------

TABLE = {
    "imagenet": Entry(
        "ImageNet", "ImageNet", "imagenet", ("images",),
        (1000, 1_281_167, 50_000, 50_000), _imagenet,
        shifts=("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"),
    ),
    "caltech101": Entry(
        "Caltech101", "Caltech101", "caltech-101", ("101_ObjectCategories",),
        (100, 4_128, 1_649, 2_465), _by_folder("101_ObjectCategories", CALTECH),
        "101_ObjectCategories",
    ),
    "oxford_pets": Entry(
        "OxfordPets", "OxfordPets", "oxford_pets", ("images", "annotations"),
        (37, 2_944, 736, 3_669), _pets, "images",
        "a photo of a {}, a type of pet.",
    ),
    "stanford_cars": Entry(
        "StanfordCars", "StanfordCars", "stanford_cars", ("cars_train", "cars_test"),
        (196, 6_509, 1_635, 8_041), _cars, ".",
    ),
    "oxford_flowers": Entry(
        "Flowers102", "OxfordFlowers", "oxford_flowers", ("jpg",),
        (102, 4_093, 1_633, 2_463), _flowers, "jpg",
        "a photo of a {}, a type of flower.",
    ),
    "food101": Entry(
        "Food101", "Food101", "food-101", ("images",),
        (101, 50_500, 20_200, 30_300), _by_folder("images"), "images",
        "a photo of {}, a type of food.",
    ),
    "fgvc_aircraft": Entry(
        "FGVCAircraft", "FGVCAircraft", "fgvc_aircraft", ("images", "variants.txt"),
        (100, 3_334, 3_333, 3_333), _aircraft, None,
        "a photo of a {}, a type of aircraft.",
    ),
    "sun397": Entry(
        "SUN397", "SUN397", "sun397", ("SUN397",),
        (397, 15_880, 3_970, 19_850), _sun, "SUN397",
    ),
    "dtd": Entry(
        "DTD", "DescribableTextures", "dtd", ("images",),
        (47, 2_820, 1_128, 1_692), _by_folder("images"), "images",
        "{} texture.",
    ),
    "eurosat": Entry(
        "EuroSAT", "EuroSAT", "eurosat", ("2750",),
        (10, 13_500, 5_400, 8_100), _by_folder("2750", EUROSAT), "2750",
        "a centered satellite photo of {}.",
    ),
    "ucf101": Entry(
        "UCF101", "UCF101", "ucf101", ("UCF-101-midframes",),
        (101, 7_639, 1_898, 3_783), _ucf, "UCF-101-midframes",
        "a photo of a person doing {}.",
    ),
    "imagenetv2": Entry(
        "ImageNetV2", "ImageNetV2", "imagenetv2",
        ("imagenetv2-matched-frequency-format-val",),
        (1000, 0, 0, 10_000), _imagenetv2,
    ),
    "imagenet_sketch": Entry(
        "ImageNet-Sketch", "ImageNetSketch", "imagenet-sketch", ("images",),
        (1000, 0, 0, 50_889), _shift("images"),
    ),
    "imagenet_a": Entry(
        "ImageNet-A", "ImageNetA", "imagenet-adversarial", ("imagenet-a",),
        (200, 0, 0, 7_500), _shift("imagenet-a"),
    ),
    "imagenet_r": Entry(
        "ImageNet-R", "ImageNetR", "imagenet-rendition", ("imagenet-r",),
        (200, 0, 0, 30_000), _shift("imagenet-r"),
    ),
}  # fmt: skip

DATASETS = tuple(TABLE)[:11]
