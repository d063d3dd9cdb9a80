"""Small folders in the true formats of the eleven datasets and the four shifts of
ImageNet.

`make(name, root)` writes one of them; the fixture `real_root` has all of them. Images
are noise around one colour a class, so that a method can learn something.
"""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from promptkit.data.benchmark import TABLE, read

NAMES = {
    "caltech101": ["Faces", "Leopards", "accordion", "airplanes"],
    "oxford_pets": ["Abyssinian", "american_bulldog", "Bengal", "boxer"],
    "stanford_cars": [
        "AM General Hummer SUV 2000",
        "Audi TTS Coupe 2012",
        "Ram C/V Cargo Van 2012",
        "Audi R8 2012",
    ],
    "oxford_flowers": [
        "pink primrose",
        "hard-leaved pocket orchid",
        "canterbury bells",
        "sweet pea",
    ],
    "food101": ["apple_pie", "baby_back_ribs", "baklava", "waffles"],
    "fgvc_aircraft": ["707-320", "737-200", "A300B4", "Cessna 172"],
    "sun397": [
        "/a/abbey",
        "/a/airplane_cabin",
        "/c/church/indoor",
        "/c/church/outdoor",
    ],
    "dtd": ["banded", "blotchy", "polka-dotted", "zigzagged"],
    "eurosat": ["AnnualCrop", "Forest", "Highway", "SeaLake"],
    "ucf101": ["ApplyEyeMakeup", "YoYo", "TaiChi", "Archery"],
}
CLASSNAMES = {
    **NAMES,
    "caltech101": ["face", "leopard", "accordion", "airplane"],
    "oxford_pets": ["abyssinian", "american_bulldog", "bengal", "boxer"],
    "stanford_cars": [
        "2000 AM General Hummer SUV",
        "2012 Audi TTS Coupe",
        "2012 Ram C/V Cargo Van",
        "2012 Audi R8",
    ],
    "sun397": ["abbey", "airplane_cabin", "indoor church", "outdoor church"],
    "eurosat": ["Annual Crop Land", "Forest", "Highway or Road", "Sea or Lake"],
    "ucf101": ["Apply_Eye_Makeup", "Yo_Yo", "Tai_Chi", "Archery"],
}
WNIDS = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n03773504": "missile",
    "n04008634": "missile",
    "n04285008": "sports car",
    "n04509417": "unicycle",
}
CLASSNAMES["imagenet"] = CLASSNAMES["imagenetv2"] = CLASSNAMES["imagenet_sketch"] = (
    list(WNIDS.values())
)
CLASSNAMES["imagenet_a"] = CLASSNAMES["imagenet_r"] = [
    "goldfish",
    "missile",
    "unicycle",
]
EACH = {
    "train": 5,
    "val": 2,
    "test": 3,
}  # images a class, in the ratio of a 50/20/30 cut


def picture(path: Path, label: int, number: int = 0) -> Path:
    """An image whose colour tells its class, in one of the sizes and modes that real
    folders hold.
    """
    rng = np.random.default_rng([label, number])
    colour = np.random.default_rng(label).integers(40, 216, 3)
    height, width = rng.integers(36, 70, 2)
    pixels = np.clip(colour + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(
        np.uint8
    )
    image = Image.fromarray(pixels)
    image = (
        image.convert("CMYK")
        if number % 7 == 5 and path.suffix.lower() != ".png"
        else image
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)
    return path


def make(name: str, root: Path, split_file: bool = True, each: dict = EACH) -> Path:
    """Write the folder of a dataset below `root`, with its split file or with the
    official annotations alone.
    """
    folder = root / TABLE[name].folder
    globals()[f"_{name}"](folder, each)
    if split_file and TABLE[name].split_file:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(name, root)
        path = folder / TABLE[name].split_file
        content = json.loads(path.read_text())
        content.pop("made_by", None)
        path.write_text(json.dumps(content, indent=4))
    return folder


@pytest.fixture
def real_root(tmp_path) -> Path:
    """A root with all fifteen datasets."""
    for name in TABLE:
        make(name, tmp_path / "data")
    return tmp_path / "data"


def _each(names, each, *parts):
    """(part, label, name, number of the image) of all images of some splits."""
    n = 0
    for part in parts or each:
        for label, name in enumerate(names):
            for _ in range(each[part]):
                n += 1
                yield part, label, name, n


def _write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def _class_folders(folder, names, each, form):
    for label, name in enumerate(names):
        for n in range(1, sum(each.values()) + 1):
            picture(folder / name / form.format(name, n), label, n)


def _caltech101(folder, each):
    _class_folders(
        folder / "101_ObjectCategories", NAMES["caltech101"], each, "image_{1:04d}.jpg"
    )
    for ignored in ("BACKGROUND_Google", "Faces_easy"):
        picture(folder / "101_ObjectCategories" / ignored / "image_0001.jpg", 9)


def _oxford_pets(folder, each):
    lines = {"trainval": [], "test": []}
    for part, label, name, n in _each(NAMES["oxford_pets"], each):
        picture(folder / "images" / f"{name}_{n}.jpg", label, n)
        lines["test" if part == "test" else "trainval"].append(
            f"{name}_{n} {label + 1} 1 {label + 1}"
        )
    for part, rows in lines.items():
        _write(folder / "annotations" / f"{part}.txt", rows)


def _stanford_cars(folder, each):
    rows = {"train": [], "test": []}
    for part, label, _, _ in _each(NAMES["stanford_cars"], each):
        part = "test" if part == "test" else "train"
        file = f"{len(rows[part]) + 1:05d}.jpg"
        picture(folder / f"cars_{part}" / file, label, len(rows[part]))
        rows[part].append((file, label + 1))
    (folder / "devkit").mkdir()
    for part, path in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        array = np.zeros(
            (1, len(rows[part])),
            [("bbox_x1", object), ("class", object), ("fname", object)],
        )
        array[0] = [(1, label, file) for file, label in rows[part]]
        scipy.io.savemat(folder / path, {"annotations": array})
    names = np.array([NAMES["stanford_cars"]], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def _oxford_flowers(folder, each):
    labels = []
    for _, label, _, n in _each(NAMES["oxford_flowers"], each):
        picture(folder / "jpg" / f"image_{n:05d}.jpg", label, n)
        labels.append(label + 1)
    scipy.io.savemat(
        folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)}
    )
    names = {str(label + 1): name for label, name in enumerate(NAMES["oxford_flowers"])}
    (folder / "cat_to_name.json").write_text(json.dumps(names))


def _food101(folder, each):
    _class_folders(folder / "images", NAMES["food101"], each, "{1:06d}.jpg")
    _write(folder / "meta" / "classes.txt", NAMES["food101"])


def _fgvc_aircraft(folder, each):
    lines = {part: [] for part in each}
    for part, label, name, n in _each(NAMES["fgvc_aircraft"], each):
        picture(folder / "images" / f"{1000000 + n}.jpg", label, n)
        lines[part].append(f"{1000000 + n} {name}")
    _write(folder / "variants.txt", NAMES["fgvc_aircraft"])
    for part, rows in lines.items():
        _write(folder / f"images_variant_{part}.txt", rows)


def _sun397(folder, each):
    lines = {"Training": [], "Testing": []}
    for part, label, name, n in _each(NAMES["sun397"], each):
        picture(folder / "SUN397" / f"{name[1:]}/sun_{n:04d}.jpg", label, n)
        lines["Testing" if part == "test" else "Training"].append(
            f"{name}/sun_{n:04d}.jpg"
        )
    _write(folder / "ClassName.txt", NAMES["sun397"])
    for part, rows in lines.items():
        _write(folder / f"{part}_01.txt", rows)


def _dtd(folder, each):
    _class_folders(folder / "images", NAMES["dtd"], each, "{0}_{1:04d}.jpg")
    _write(folder / "labels" / "train1.txt", ["banded/banded_0001.jpg"])


def _eurosat(folder, each):
    _class_folders(folder / "2750", NAMES["eurosat"], each, "{0}_{1}.jpg")


def _ucf101(folder, each):
    lines = {"train": [], "test": []}
    for part, label, name, n in _each(NAMES["ucf101"], each):
        cut = "_".join(re.findall("[A-Z][^A-Z]*", name))
        picture(
            folder / "UCF-101-midframes" / cut / f"v_{name}_g{n:02d}_c01.jpg", label, n
        )
        lines["test" if part == "test" else "train"].append(
            f"{name}/v_{name}_g{n:02d}_c01.avi {label + 1}"
        )
    lists = folder / "ucfTrainTestlist"
    _write(
        lists / "classInd.txt",
        [f"{label + 1} {name}" for label, name in enumerate(NAMES["ucf101"])],
    )
    _write(lists / "trainlist01.txt", lines["train"])
    _write(lists / "testlist01.txt", [line.split()[0] for line in lines["test"]])


def _wnid_folders(images, wnids, count, form="{}_{}.JPEG"):
    for wnid in wnids:
        label = list(WNIDS).index(wnid)
        for n in range(count):
            picture(images / wnid / form.format(wnid, n), label, n)


def _classnames(folder):
    _write(
        folder / "classnames.txt", [f"{wnid} {name}" for wnid, name in WNIDS.items()]
    )


def _imagenet(folder, each):
    _classnames(folder)
    _wnid_folders(folder / "images" / "train", WNIDS, each["train"])
    _wnid_folders(
        folder / "images" / "val", WNIDS, each["test"], "ILSVRC2012_val_{}_{}.JPEG"
    )


def _imagenetv2(folder, each):
    _classnames(folder)
    for label in range(len(WNIDS)):
        for n in range(each["test"]):
            picture(
                folder
                / "imagenetv2-matched-frequency-format-val"
                / str(label)
                / f"{n}.jpeg",
                label,
                n,
            )


def _imagenet_sketch(folder, each):
    _classnames(folder)
    _wnid_folders(folder / "images", WNIDS, each["test"], "sketch_{1}.JPEG")


def _imagenet_a(folder, each, images="imagenet-a"):
    _classnames(folder)
    wnids = [
        wnid for wnid in WNIDS if wnid not in ("n01440764", "n03773504", "n04285008")
    ]
    _wnid_folders(folder / images, wnids, each["test"], "{1}.jpg")
    _write(folder / images / "README.txt", ["not an image"])


def _imagenet_r(folder, each):
    _imagenet_a(folder, each, "imagenet-r")
