"""Images, folders, lists, names, archives and caches as people have them: each is read
as it is meant, or refused in one sentence, and nothing is lost or left behind.
"""

import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import random
import stat
import struct
import tarfile
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from zlib import compress
from zlib import crc32 as zlib_crc

import numpy as np
import pytest
import torch
from PIL import Image
from published import PUBLISHED, publish
from real_data import make, picture

from promptkit import data
from promptkit.data import content, datasets, own
from promptkit.data.archives import unpack
from promptkit.data.benchmark import TABLE
from promptkit.data.check import check
from promptkit.data.features import frozen_features
from promptkit.data.folders import images_in, scan
from promptkit.data.images import Files, read_image
from promptkit.data.names import names_for, read_names
from promptkit.data.store import Store
from promptkit.descriptions import descriptions_for, read_descriptions
from promptkit.errors import InputError
from promptkit.probe import linear_probe

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*with seed 1$"),
    pytest.mark.filterwarnings("ignore:.*cannot be compared with the papers'"),
    pytest.mark.filterwarnings("ignore:.*, and are left out"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PROMPTKIT_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def tree(folder="."):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*"))


def image(path, value=0, size=(6, 5)):
    """A plain image without compression, so that all of one size have equal files."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)
    return path


def classes(root, names=("fox", "heron"), each=5, start=0):
    for label, name in enumerate(names):
        for n in range(each):
            image(Path(root, name, f"{n}.bmp"), (start + 40 * label + n) % 256)
    return root


def settle():
    """Wait until what was written last is older than a tick of the file system."""
    time.sleep(0.03)


def counted(monkeypatch):
    """The files that are read for their content from here on."""
    read, digest = [], content.Digests._digest
    monkeypatch.setattr(
        content.Digests, "_digest", lambda self, p: read.append(p) or digest(self, p)
    )
    return read


# --- 01, 02, 18, 27: what is measured belongs to the pixels ---------------------------


def test_case_01_equal_names_and_sizes_are_told_apart_by_their_pixels(tiny_clip):
    classes("first/scans")
    classes("fixed/scans", start=100)
    first, fixed = (data.load_dataset(f"{name}/scans") for name in ("first", "fixed"))
    assert [p.stat().st_size for p in images_in("first")] == [
        p.stat().st_size for p in images_in("fixed")
    ]
    assert first.name == fixed.name and first.test.key != fixed.test.key
    assert first.identity != fixed.identity
    for dataset in (first, fixed, first):
        expected = tiny_clip.encode_image(
            data.transform(tiny_clip, dataset.test.images())
        )
        torch.testing.assert_close(frozen_features(tiny_clip, dataset.test), expected)


def test_case_01_the_same_pixels_are_found_under_other_names(tiny_clip, monkeypatch):
    classes("here")
    one = data.load_dataset("./here")
    expected = frozen_features(tiny_clip, one.test)
    assert one.identity and one.train.key
    os.rename("here", "there")
    for n, path in enumerate(images_in("there")):
        path.rename(path.with_name(f"{n:03}_renamed.bmp"))
    two = data.load_dataset("./there")
    assert two.identity == one.identity and two.train.key == one.train.key
    monkeypatch.setattr("promptkit.data.features.transform", None)
    assert torch.equal(frozen_features(tiny_clip, two.test), expected)


@pytest.mark.parametrize("how", ["write", "rename", "times put back"])
def test_case_01_27_a_file_replaced_in_place_has_other_features(how, tiny_clip):
    classes("birds")
    test = data.load_dataset("./birds").test
    before = frozen_features(tiny_clip, test)
    settle()
    key = data.load_dataset("./birds").test.key
    path = test.source().folder / test.source().paths[2]
    times, size = path.stat(), path.stat().st_size
    if how == "rename":
        image("new.bmp", 250).replace(path)
    else:
        image(path, 250)
    if how == "times put back":
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size
    fresh = data.load_dataset("./birds").test
    assert fresh.key != key
    for split in (test, fresh):  # one that was loaded before, and one after
        after = frozen_features(tiny_clip, split)
        assert (after != before).any(dim=1).tolist() == [
            n == 2 for n in range(len(test))
        ]


def test_case_01_two_changes_within_a_tick_of_the_clock_are_seen():
    for n in range(20):
        image("a/x.bmp", n)
        image("a/y.bmp", 99)
        one = Files(Path("a"), ["x.bmp", "y.bmp"]).key
        image("a/x.bmp", n + 100)
        assert Files(Path("a"), ["x.bmp", "y.bmp"]).key != one


def test_case_01_a_second_start_reads_nothing(monkeypatch):
    classes("birds")
    settle()
    read = counted(monkeypatch)
    first = data.load_dataset("./birds").identity
    assert sorted(read) == [
        p.relative_to("birds").as_posix() for p in images_in("birds")
    ]
    read.clear()
    assert data.load_dataset("./birds").identity == first and not read
    image("birds/fox/0.bmp", 77)
    settle()
    assert data.load_dataset("./birds").identity != first and read == ["fox/0.bmp"]


def test_case_01_only_the_files_of_a_split_are_read(monkeypatch, tiny_clip):
    classes("birds/train", each=9)
    classes("birds/val")
    classes("birds/test", start=100)
    settle()
    read = counted(monkeypatch)
    drawn = data.few_shot(data.load_dataset("./birds"), 2, 1)
    assert not read
    frozen_features(tiny_clip, drawn.train)
    assert len(read) == 4 and all(path.startswith("train/") for path in read)
    assert drawn.train.identity and len(read) == 4
    assert drawn.identity and len(read) == 4 + 4 + 10


def test_case_01_a_killed_reading_keeps_what_it_has(monkeypatch):
    classes("birds", each=600)
    settle()
    source, digest = Files(Path("birds"), _paths("birds")), content.Digests._digest

    def killed(self, path):
        if path == "heron/99.bmp":
            raise KeyboardInterrupt
        return digest(self, path)

    monkeypatch.setattr(content.Digests, "_digest", killed)
    with pytest.raises(KeyboardInterrupt):
        source.digests()
    monkeypatch.setattr(content.Digests, "_digest", digest)
    read = counted(monkeypatch)
    again = Files(Path("birds"), _paths("birds"))
    assert len(again.digests()) == 1200 and len(read) == 1200 - 2 * 512


def _paths(folder):
    return [path.relative_to(folder).as_posix() for path in images_in(folder)]


def test_case_01_features_are_made_anew_when_asked(tiny_clip, monkeypatch):
    classes("birds")
    for split in (data.load_dataset("./birds").test, data.load_dataset("sat").val):
        expected = frozen_features(tiny_clip, split)
        (path,) = (Path("../cache/features")).iterdir()
        store = Store(path, "feature cache")
        names = data.features._names(split, split.rows)
        wrong = np.zeros(tiny_clip.embed_dim, "<f4").tobytes()
        store.put(dict.fromkeys(names, wrong))
        assert not frozen_features(tiny_clip, split).any()
        again = frozen_features(tiny_clip, split, force=True)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(frozen_features(tiny_clip, split), again)


def test_case_01_images_that_change_while_they_are_read(tiny_clip, monkeypatch):
    classes("birds")
    test = data.load_dataset("./birds").test
    module = data.features
    transform = module.transform

    def changing(clip, images):
        image(test.source().folder / test.source().paths[0], 200)
        return transform(clip, images)

    monkeypatch.setattr(module, "transform", changing)
    with pytest.raises(InputError, match="changed while they were read"):
        frozen_features(tiny_clip, test)
    monkeypatch.setattr(module, "transform", transform)
    expected = tiny_clip.encode_image(transform(tiny_clip, test.images()))
    torch.testing.assert_close(frozen_features(tiny_clip, test), expected)


def test_case_02_corrected_labels_are_another_dataset():
    classes("photos", each=6)
    for file, names in (("wrong", "heron,fox"), ("right", "fox,heron")):
        pairs = zip(("fox", "heron"), names.split(","), strict=True)
        rows = [f"photos/{at}/{n}.bmp,{y}" for at, y in pairs for n in range(6)]
        Path(f"{file}.csv").write_text("path,label\n" + "\n".join(rows))
    wrong, right = (data.load_dataset(f"{name}.csv") for name in ("wrong", "right"))
    assert wrong.classnames == right.classnames
    assert wrong.identity != right.identity
    assert wrong.train.identity != right.train.identity
    Path("copy.csv").write_bytes(Path("right.csv").read_bytes())
    assert data.load_dataset("copy.csv").identity == right.identity


def test_identity_covers_names_labels_rows_and_order_and_nothing_else():
    classes("birds", each=10)
    base = data.load_dataset("./birds")

    def take(*args):
        return replace(base, train=base.train.take(*args))

    others = [
        replace(base, classnames=["a", "b"]),
        take([1, 0]),
        take([0, 1]),
        take([0, 1], torch.tensor([0, 1])),
        replace(base, val=base.test),
    ]
    found = [dataset.identity for dataset in (base, *others)]
    assert len(set(found)) == 6 and all(len(name) == 32 for name in found)
    same = replace(base, template="{}", name="x", title="y", path="z")
    assert same.identity == base.identity == data.load_dataset("birds/").identity
    mini, pets = data.load_dataset("mini"), data.load_dataset("pets")
    assert mini.identity != pets.identity == data.load_dataset("pets").identity
    assert pets.train.key == "pets-1-32-2"  # images in memory are known by name


def test_case_27_an_empty_image_of_imagenet_mended_in_place(tiny_clip):
    root = make("imagenet", Path("data"))
    path = next((root / "images/val/n01440764").iterdir())
    whole = path.read_bytes()
    path.write_bytes(b"")
    settle()
    for _ in range(2):
        with pytest.raises(InputError, match=f"the image is empty: .*{path.name}"):
            data.load_dataset("imagenet", "data")
    path.write_bytes(whole)
    dataset = data.load_dataset("imagenet", "data")
    before = frozen_features(tiny_clip, dataset.test)
    other = sorted((root / "images/val/n01443537").iterdir())[0]
    other.write_bytes(picture(Path("x.jpg"), 3, 3).read_bytes())
    after = frozen_features(tiny_clip, data.load_dataset("imagenet", "data").test)
    assert (after != before).any(dim=1).sum() == 1
    settle()
    whole = other.read_bytes()
    other.write_bytes(b"")  # emptied after the list was made
    with pytest.raises(InputError, match=f"the image is empty: .*{other.name}"):
        frozen_features(tiny_clip, data.load_dataset("imagenet", "data").test)
    other.write_bytes(whole)
    frozen_features(tiny_clip, data.load_dataset("imagenet", "data").test)


def test_case_18_a_dataset_knows_its_absolute_path(folder):
    classes("birds")
    assert data.load_dataset("birds").path == str(folder / "birds")
    assert data.load_dataset("sat").path == ""
    make("dtd", Path("data"))
    assert data.load_dataset("dtd").path == ""


# --- 03: layouts ----------------------------------------------------------------------

SPLIT = {
    "train": [
        [f"{c}/{n}.bmp", y, c] for y, c in enumerate(("fox", "heron")) for n in (0, 1)
    ],
    "val": [[f"{c}/2.bmp", y, c] for y, c in enumerate(("fox", "heron"))],
    "test": [
        [f"{c}/{n}.bmp", y, c] for y, c in enumerate(("fox", "heron")) for n in (3, 4)
    ],
}


def junk(*paths):
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")


def wrapped(root):
    classes("data/animals/pets/all")
    junk("data/__MACOSX/animals/._x.png", "data/.DS_Store", "data/animals/readme.txt")


def hidden(root):
    classes("data")
    for name in ("fox", "heron"):
        image(f"data/{name}/.ipynb_checkpoints/0-checkpoint.bmp")
        junk(f"data/{name}/._0.bmp", f"data/{name}/Thumbs.db", "data/desktop.ini")
    image("data/.cache/0.bmp")
    image("data/$RECYCLE.BIN/0.bmp")
    image("data/@eaDir/0.bmp")


def split_file(root, at="images", name="split_zhou_Pets.json"):
    classes(f"data/{at}")
    Path("data", name).write_text(json.dumps(SPLIT))


def parts(*names, root="data"):
    def build(_):
        for n, name in enumerate(names):
            classes(f"{root}/{name}", start=90 * n)

    return build


def also(build, *more):
    def both(root):
        build(root)
        for path in more:
            image(f"data/{path}")

    return both


LAYOUTS = {  # what is written below data/, and (images by split, classes)
    "classes": (lambda _: classes("data"), (4, 2, 4)),
    "capitals": (parts("Train", "Test"), (8, 2, 10)),
    "shouted": (parts("TRAIN", "VAL", "TEST"), (10, 10, 10)),
    "other words": (parts("training", "validation", "Testing"), (10, 10, 10)),
    "valid": (parts("train", "Valid", "test"), (10, 10, 10)),
    "train only": (parts("train"), (4, 2, 4)),
    "test only": (parts("test"), (0, 0, 10)),
    "unzipped too deep": (wrapped, (4, 2, 4)),
    "splits too deep": (parts("train", "test", root="data/a/b"), (8, 2, 10)),
    "splits in themselves": (parts("train/train", "test/test"), (8, 2, 10)),
    "hidden": (hidden, (4, 2, 4)),
    "split file, images": (split_file, (4, 2, 4)),
    "split file beside": (lambda r: split_file(r, "."), (4, 2, 4)),
    "split file, other": (lambda r: split_file(r, "2750"), (4, 2, 4)),
    "split file too deep": (
        lambda r: (split_file(r), os.renames("data", "x/pets"), os.rename("x", "data")),
        (4, 2, 4),
    ),
    "loose image": (also(lambda _: classes("data"), "cover.bmp"), (4, 2, 4)),
    "loose in a split": (also(parts("train", "test"), "train/x.bmp"), (8, 2, 10)),
    "deeper": (
        lambda _: [
            image(f"data/{c}/{d}/{n}.bmp", n)
            for c in ("fox", "heron")
            for d in ("day", "night")
            for n in range(3)
        ],
        (6, 2, 4),
    ),
    "folder without images": (
        lambda _: (parts("train", "test")(_), junk("data/labels/x.xml")),
        (8, 2, 10),
    ),
    "upper-case suffixes": (
        lambda _: [
            image(f"data/{c}/{n}.BMP", n) for c in ("fox", "heron") for n in range(5)
        ],
        (4, 2, 4),
    ),
    "a link to a class": (
        lambda _: (
            classes("else"),
            Path("data").mkdir(),
            [
                os.symlink(Path("else", c).resolve(), f"data/{c}")
                for c in ("fox", "heron")
            ],
        ),
        (4, 2, 4),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore:.*lie beside the class folders")
def test_case_03_layouts_that_are_understood(layout):
    build, counts = LAYOUTS[layout]
    build("data")
    found = data.load_dataset("./data")
    assert found.classnames == ["fox", "heron"]
    assert tuple(len(s) for s in (found.train, found.val, found.test)) == counts
    every = [
        path
        for split in (found.train, found.val, found.test)
        for path in np.array(split.source().paths)[split.rows]
    ]
    assert len(set(every)) == len(every)
    for split in (found.train, found.val, found.test):
        for path, label in zip(split.source().paths, split.labels, strict=True):
            assert f"{found.classnames[label]}/" in path and "/." not in path


def test_case_03_a_class_may_be_called_train():
    classes("data", ("bus", "train", "tram"))
    assert data.load_dataset("./data").classnames == ["bus", "train", "tram"]


def test_case_03_a_split_file_by_its_own_path():
    split_file(None, name="split_zhou_Pets.json")
    for path in ("data/split_zhou_Pets.json", "./data"):
        found = data.load_dataset(path)
        assert found.train.labels.tolist() == [0, 0, 1, 1]
        assert found.train.source().paths[0] == "images/fox/0.bmp"
        assert found.train.source().turn
    assert data.load_dataset("data/split_zhou_Pets.json").name == "split_zhou_Pets"
    os.rename("data/split_zhou_Pets.json", "data/mine.JSON")
    assert len(data.load_dataset("data/mine.JSON").test) == 4


def test_case_03_what_is_left_out_is_said():
    classes("data")
    image("data/cover.bmp")
    Path("data/labels.csv").write_text("path,label\n")
    with pytest.warns(UserWarning) as said:
        data.load_dataset("./data")
    texts = "\n".join(str(warning.message) for warning in said)
    assert "1 images lie beside the class folders, such as cover.bmp" in texts
    assert "labels.csv in data is not read; to use it, give its own path" in texts


def said_of(path):
    """(the dataset at a path, what was warned of)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dataset = data.load_dataset(path)
        assert dataset.identity
    return dataset, "\n".join(str(warning.message) for warning in said)


def test_pictures_of_other_forms_are_named():
    classes("data")
    junk("data/fox/x.heic", "data/heron/y.avif", "data/fox/notes.txt")
    image("data/fox/0.bmp").rename("data/fox/0.jfif")
    dataset, said = said_of("./data")
    assert sum(dataset.test.labels == 0) == 2 and len(dataset.train) == 4
    assert "2 files (.avif, .heic) are no images that can be read, such as x" in said
    junk("data/otter/x.heic")
    message = r"otter holds no images: fill or remove it; 1 files \(.heic\) are no"
    with pytest.raises(InputError, match=message):
        data.load_dataset("./data")


def test_links_below_a_class_are_followed_once():
    classes("data")
    classes("else", ("more",), start=200)
    for at, to in (("data/fox/more", "else/more"), ("data/fox/more/up", "data/fox")):
        Path(at).symlink_to(Path(to).resolve())
    found = scan(Path("data"))
    assert len(found["fox"]) == 10 and "fox/more/0.bmp" in found["fox"]


def test_a_class_that_is_not_tested_is_named():
    lines = [
        f"data/{c}/{n}.bmp,{c},{'test' if n > 2 and c != 'fox' else 'train'}"
        for c in ("fox", "heron", "otter")
        for n in range(5)
    ]
    classes("data", ("fox", "heron", "otter"))
    Path("list.csv").write_text("\n".join(["path,label,split", *lines]))
    _, said = said_of("list.csv")
    assert "the class 'fox' has no test images, so nothing is measured on it" in said


def test_copies_of_pictures_are_named_once():
    for part, start in (("train", 0), ("val", 10), ("test", 20)):
        classes(f"data/{part}", start=start)
    image("data/test/fox/a.bmp", 3)
    image("data/val/heron/b.bmp", 10)
    _, said = said_of("./data")
    assert "1 test images are training images too, such as test/fox/a.bmp" in said
    assert "1 images stand in a second class too, such as val/heron/b.bmp" in said
    assert said_of("./data")[1] == ""


def test_classes_with_one_training_image_are_left_undivided():
    classes("data/train", each=1)
    classes("data/test", start=100)
    dataset, said = said_of("./data")
    assert dataset.train.labels.tolist() == [0, 1] and len(dataset.val) == 0
    classes("data/train", ("fox",), start=20)
    dataset, said = said_of("./data")
    assert dataset.train.labels.tolist() == [0, 0, 0, 0, 1] and len(dataset.val) == 1
    assert "for validation (none of 'heron', with fewer than 3), with seed 1" in said


REFUSED = {  # what is written below data/, and what is said
    "nothing": (lambda _: Path("data").mkdir(), "data holds no class folders"),
    "images alone": (lambda _: image("data/1.bmp"), "holds 1 images, all of one class"),
    "one class": (lambda _: classes("data", ["heron"]), "one class only, 'heron'"),
    "one class, split": (
        lambda _: [classes(f"data/{s}", ["heron"]) for s in ("train", "test")],
        "one class only, 'heron'",
    ),
    "one class, split file": (
        lambda _: (
            split_file(_),
            Path("data/split_zhou_Pets.json").write_text(
                json.dumps(
                    {p: [r for r in rows if r[1] == 0] for p, rows in SPLIT.items()}
                )
            ),
        ),
        "one class only, 'fox'",
    ),
    "empty class": (
        lambda _: (classes("data"), Path("data/wren").mkdir()),
        "the class folder data/wren holds no images: fill or remove it",
    ),
    "hidden images only": (
        lambda _: (classes("data"), junk("data/wren/._1.png")),
        "data/wren holds no images",
    ),
    "splits and classes": (
        also(parts("train", "test"), "wren/1.bmp"),
        r"both splits \(test, train\) and other folders with images \(wren\): expec",
    ),
    "one split and classes": (
        also(parts("train"), "wren/1.bmp"),
        r"both splits \(train\) and other folders",
    ),
    "splits in classes": (
        parts("fox/train", "fox/test", "heron/train", "heron/test"),
        "holds class folders with splits in them, such as fox/test: expected is",
    ),
    "images in a split": (
        also(parts("train"), "test/1.bmp", "test/2.bmp"),
        "data/test holds 2 images that are in no class folder",
    ),
    "two folders a split": (
        parts("train", "val", "valid"),
        "two folders for val, val and valid: join them",
    ),
    "unknown class": (
        also(parts("train", "test"), "test/wren/1.bmp"),
        "no training image has the label 'wren' of test/wren/1.bmp in test",
    ),
    "two split files": (
        lambda r: (split_file(r), split_file(r, name="split_zhou_X.json")),
        "holds several split files .*: give one's path",
    ),
    "split file without images": (
        lambda r: (split_file(r), os.rename("data/images/fox", "data/images/dog")),
        "the image fox/0.bmp is neither in its folder nor in one of images",
    ),
    "damaged split file": (
        lambda r: (split_file(r), Path("data/split_zhou_Pets.json").write_text("{")),
        "damaged split file",
    ),
    "split file of something else": (
        lambda r: (split_file(r), Path("data/split_zhou_Pets.json").write_text("{}")),
        "has no list 'train'",
    ),
    "a list and no classes": (
        lambda r: (image("data/1.bmp"), Path("data/l.csv").write_text("path,label\n")),
        "holds no class folders, and l.csv in data is not read",
    ),
    "too deep": (lambda _: classes("data/" + "a/" * 22), "lies too deep"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_case_03_layouts_that_are_refused(layout):
    build, message = REFUSED[layout]
    build("data")
    before = tree()
    with pytest.raises(InputError, match=message):
        data.load_dataset("./data")
    assert tree() == before


def test_hidden_files_never_count_anywhere(monkeypatch):
    hidden(None)
    assert [str(p) for p in images_in("data")] == [
        f"data/{c}/{n}.bmp" for c in ("fox", "heron") for n in range(5)
    ]
    assert list(scan(Path("data"))) == ["fox", "heron"]
    make("eurosat", Path("root"), split_file=False)
    image("root/eurosat/2750/Forest/.ipynb_checkpoints/Forest_1-checkpoint.bmp")
    junk("root/eurosat/2750/Forest/._Forest_1.jpg", "root/eurosat/2750/.x/1.jpg")
    found = data.load_dataset("eurosat", "root")
    assert len(found.train) + len(found.val) + len(found.test) == 40


# --- 04: names and sentences ----------------------------------------------------------

NAME_LISTS = {  # bytes of a file, and its names or what is said
    "plain": (b"heron\nfox\n", ["heron", "fox"]),
    "no last newline": (b"heron\nfox", ["heron", "fox"]),
    "windows": (b"heron\r\nfox\r\n", ["heron", "fox"]),
    "old mac": (b"heron\rfox\r", ["heron", "fox"]),
    "bom": ("heron\nfox\n".encode("utf-8-sig"), ["heron", "fox"]),
    "bom and windows": ("Bär\r\nfox\r\n".encode("utf-8-sig"), ["Bär", "fox"]),
    "blanks": (b"  heron \t\n\n   \n\xc2\xa0fox\n", ["heron", "fox"]),
    "invisible": ("heron\n\ufefffox\u200b\n".encode(), ["heron", "fox"]),
    "two words": (
        b"great grey owl\npolka-dotted\n",
        ["great grey owl", "polka-dotted"],
    ),
    "other writing": ("サギ\nлиса\n".encode(), ["サギ", "лиса"]),
    "commas": (b"crane, bird\ncrane, machine\n", ["crane, bird", "crane, machine"]),
    "separators inside": (b"a\x0bb\nfox\n", "holds a sign that cannot be printed"),
    "cp1252": (
        "Bär\nfox\n".encode("cp1252"),
        "line 1 is not UTF-8, probably WINDOWS-1252",
    ),
    "latin-1, later": (
        "fox\nBär\n".encode("latin-1"),
        "line 2 is not UTF-8, .*iconv -f WIN",
    ),
    "utf-16": ("heron\nfox\n".encode("utf-16"), "it is in UTF-16: save it as UTF-8"),
    "utf-16 without mark": ("heron\nfox\n".encode("utf-16-le"), "it is in UTF-16LE"),
    "utf-16 big": ("heron\nfox\n".encode("utf-16-be"), "it is in UTF-16BE"),
    "utf-32": ("heron\nfox\n".encode("utf-32"), "it is in UTF-32"),
    "shift-jis": (
        "サギ\x81\n".encode("shift-jis", "replace") + b"\x81\x8d",
        "not in UTF-8",
    ),
    "binary": (
        b"heron\n\0\1\2 fox and more text",
        "is no text: it holds bytes of zero",
    ),
    "empty": (b"", "names no class"),
    "blank": (b" \n\n", "names no class"),
    "bom alone": (b"\xef\xbb\xbf", "names no class"),
    "twice": (b"heron\nfox\nheron\n", "the class 'heron' twice: line 1 and line 3"),
    "twice to clip": (
        b"red_fox\nRed fox\n",
        "the class 'Red fox' twice: line 1 and line 2",
    ),
}


@pytest.mark.parametrize("case", NAME_LISTS)
def test_case_04_lists_of_names(case):
    content, expected = NAME_LISTS[case]
    Path("names.txt").write_bytes(content)
    if isinstance(expected, list):
        assert read_names("names.txt") == expected
    else:
        with pytest.raises(InputError, match=f"names.txt .*{expected}|{expected}"):
            read_names("names.txt")


def test_case_04_lists_of_names_that_are_no_files():
    with pytest.raises(InputError, match="there is no file nowhere.txt"):
        read_names("nowhere.txt")
    Path("x.txt").mkdir()
    with pytest.raises(InputError, match="cannot read x.txt"):
        read_names(Path("x.txt"))
    Path("x.json").write_text('["heron", "fox"]')
    assert read_names("x.json") == ["heron", "fox"]
    for text in (
        '{"a": "heron"}',
        '"heron"',
        "[1]",
        '[""]',
        "[]",
        "[",
        "nul",
        "[" * 9999,
    ):
        Path("x.json").write_text(text)
        with pytest.raises(InputError, match="x.json"):
            read_names("x.json")


FOLDERS = ["n01", "n02", "n03"]
RENAMED = {  # a file's name and text, and the new names or what is said
    "in order": ("txt", "heron\nfox\nowl\n", ["heron", "fox", "owl"]),
    "in order, with commas": (
        "txt",
        "heron, grey\nfox\nowl\n",
        ["heron, grey", "fox", "owl"],
    ),
    "commas": ("txt", "n02,fox\nn03, owl \nn01,heron\n", ["heron", "fox", "owl"]),
    "commas in names": (
        "txt",
        "n02,fox\nn03,owl\nn01,heron, grey\n",
        ["heron, grey", "fox", "owl"],
    ),
    "semicolons": ("csv", "n02;fox\nn03;owl\nn01;heron\n", ["heron", "fox", "owl"]),
    "a head": (
        "csv",
        "folder,name\nn02,fox\nn03,owl\nn01,heron\n",
        ["heron", "fox", "owl"],
    ),
    "tabs": (
        "tsv",
        "n02\tfox\nn03\tgreat owl\nn01\theron\n",
        ["heron", "fox", "great owl"],
    ),
    "blanks": (
        "txt",
        "n01 heron, Ardea\nn02 red fox\nn03 owl\n",
        ["heron, Ardea", "red fox", "owl"],
    ),
    "json": (
        "json",
        '{"n03": "owl", "n01": "heron", "n02": "fox"}',
        ["heron", "fox", "owl"],
    ),
    "json list": ("json", '["heron", "fox", "owl"]', ["heron", "fox", "owl"]),
    "too few": ("txt", "heron\nfox\n", "2 names for 3 classes"),
    "too many": ("txt", "heron\nfox\nowl\nwren\n", "4 names for 3 classes"),
    "one missing": ("txt", "n01,heron\nn02,fox\n", "no name for the class 'n03'"),
    "one without name": (
        "txt",
        "n01,heron\nn02,fox\nn03,\n",
        "'n03' has no name in line 3",
    ),
    "one without comma": (
        "txt",
        "n01,heron\nn02,fox\nn03 owl\n",
        "'n03 owl' has no name in line 3",
    ),
    "a folder twice": (
        "txt",
        "n01,heron\nn01,fox\nn02,fox\nn03,owl\n",
        "'n01' is named twice",
    ),
    "a name twice": (
        "txt",
        "n01,fox\nn02,Fox\nn03,owl\n",
        "'Fox' twice: class 'n01' and class 'n02'",
    ),
    "json, missing": ("json", '{"n01": "heron"}', "no name for the class 'n02', 'n03'"),
    "json, number": (
        "json",
        '{"n01": 1, "n02": "a", "n03": "b"}',
        "name of class 'n01' is 1",
    ),
    "json, twice": ("json", '{"n01": "a", "n01": "b"}', "has the key 'n01' twice"),
    "json, null": ("json", "null", "must hold a list of names"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_case_04_other_names_for_the_classes(case):
    suffix, text, expected = RENAMED[case]
    path = Path(f"names.{suffix}")
    path.write_text(text)
    if isinstance(expected, list):
        assert names_for(path, FOLDERS) == expected
        classes("data", FOLDERS)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*bears? ")
            found = data.load_dataset("./data", classnames=path)
        assert found.classnames == expected
        (row,) = (found.test.labels == 2).nonzero()[:1, 0].tolist()
        assert found.test.source().paths[row].startswith("n03/")
    else:
        with pytest.raises(InputError, match=expected):
            names_for(path, FOLDERS)


def test_case_04_names_of_more_than_the_classes_are_said():
    Path("all.txt").write_text("n04 wren\nn01 heron\nn03 owl\nn02 fox\n")
    with pytest.warns(UserWarning, match="also names what is no class here: 'n04'"):
        assert names_for("all.txt", FOLDERS) == ["heron", "fox", "owl"]


@pytest.mark.parametrize(
    "names, said",
    [
        (
            ["n02085620", "n02085937"],
            "classes 'n02085620', 'n02085937' bear WordNet ids",
        ),
        (["1", "2", "3"], "the classes '1', '2', '3' bear numbers for a name"),
        (["007", "heron"], "the class '007' bears a number for a name"),
        (["heron", "Heron"], "the classes 'Heron' and 'heron' read alike to CLIP"),
        (["red fox", "red_fox"], "the classes 'red fox' and 'red_fox' read alike"),
        (["707-320", "n02", "4x4"], None),
    ],
)
def test_case_04_classes_that_tell_clip_nothing(names, said):
    classes("data", names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.load_dataset("./data")
    texts = [str(w.message) for w in caught if "with seed 1" not in str(w.message)]
    assert len(texts) == (said is not None) and all(said in text for text in texts)
    assert said is None or "alike" in said or "--classnames FILE" in texts[0]


def test_names_and_sentences_of_a_built_in_dataset():
    pets = data.load_dataset("pets")
    Path("names.txt").write_text(
        "".join(f"{name},my {name}\n" for name in pets.classnames)
    )
    mine = data.load_dataset("pets", classnames="names.txt")
    assert mine.classnames == [f"my {name}" for name in pets.classnames]
    assert list(mine.descriptions.values()) == list(pets.descriptions.values())
    assert mine.identity != pets.identity and mine.train.key == pets.train.key
    said = {name.upper(): [f"a {name}"] for name in pets.classnames}
    said = data.load_dataset("pets", descriptions=said)
    assert said.descriptions == {name: [f"a {name}"] for name in pets.classnames}
    assert said.identity == pets.identity


DESCRIBED = {  # a JSON file, and sentences by class or what is said
    "lists": (
        '{"heron": ["a bird", "grey"], "red fox": ["a fur"]}',
        ("a bird", "a fur"),
    ),
    "one sentence": ('{"heron": "a bird", "red fox": "a fur"}', ("a bird", "a fur")),
    "case": ('{"HERON": ["a bird"], "Red_Fox": ["a fur"]}', ("a bird", "a fur")),
    "blanks": (
        '{" heron ": ["a  bird "], "red  fox": [" a fur"]}',
        ("a bird", "a fur"),
    ),
    "unicode": (
        '{"heron": ["ein Vögelchen"], "red fox": ["毛皮"]}',
        ("ein Vögelchen", "毛皮"),
    ),
    "missing": ('{"heron": ["a bird"]}', "no sentences for the class 'red_fox'"),
    "none fit": ('{"owl": ["a bird"]}', "'heron', 'red_fox'; the file describes 'owl'"),
    "empty list": (
        '{"heron": [], "red fox": ["x"]}',
        "'heron' must have a list of sentences",
    ),
    "empty sentence": (
        '{"heron": [" "], "red fox": ["x"]}',
        "'heron' must have a list",
    ),
    "numbers": ('{"heron": [1], "red fox": ["x"]}', "'heron' must have a list"),
    "nested": ('{"heron": {"a": 1}, "red fox": ["x"]}', "'heron' must have a list"),
    "null": ('{"heron": null, "red fox": ["x"]}', "'heron' must have a list"),
    "twice": ('{"heron": ["a"], "heron": ["b"]}', "has the key 'heron' twice"),
    "twice to clip": (
        '{"heron": ["a"], "Heron": ["b"]}',
        "'heron' and 'Heron', which are the same",
    ),
    "list": ('["a bird"]', "must be a JSON object"),
    "empty": ("", "damaged JSON file"),
    "nothing": ("{}", "must be a JSON object"),
    "cut": ('{"heron": ["a b', "damaged JSON file"),
    "deep": ("[" * 100_000, "damaged JSON file"),
}


@pytest.mark.parametrize("case", DESCRIBED)
def test_sentences_of_classes(case):
    text, expected = DESCRIBED[case]
    Path("said.json").write_text(text, encoding="utf-8")
    classes("data", ("heron", "red_fox"))
    if isinstance(expected, tuple):
        found = data.load_dataset("./data", descriptions="said.json").descriptions
        assert list(found) == ["heron", "red_fox"]
        assert tuple(sentences[0] for sentences in found.values()) == expected
    else:
        with pytest.raises(InputError, match=expected):
            data.load_dataset("./data", descriptions="said.json")


def test_sentences_of_other_classes_are_said_and_encodings_named():
    Path("said.json").write_bytes(
        '{"Bär": ["brown"], "fox": ["red"]}'.encode("utf-8-sig")
    )
    assert read_descriptions("said.json") == {"Bär": ["brown"], "fox": ["red"]}
    with pytest.warns(UserWarning, match="describes what is no class here: 'Bär'"):
        assert descriptions_for("said.json", ["fox"]) == {"fox": ["red"]}
    Path("said.json").write_bytes('{"Bär": ["brown"]}'.encode("cp1252"))
    with pytest.raises(InputError, match="probably WINDOWS-1252"):
        read_descriptions("said.json")
    with pytest.raises(InputError, match="must be a JSON object"):
        data.load_dataset("pets", descriptions=["a bird"])


# --- 05: lists ------------------------------------------------------------------------

HEAD, ROWS = "path,label", [(c, n) for c in ("fox", "heron") for n in range(4)]


def rows(line, head=HEAD, newline="\n"):
    lines = [line.format(c=c, n=n, i=i) for i, (c, n) in enumerate(ROWS)]
    return newline.join([head, *lines, ""])


GOOD = {  # the text of a CSV file
    "plain": rows("{c}/{n}.bmp,{c}"),
    "backslashes": rows("{c}\\{n}.bmp,{c}"),
    "a dot in front": rows("./{c}/{n}.bmp,{c}"),
    "backslashes, dot": rows(".\\{c}\\{n}.bmp,{c}"),
    "blanks": rows(" {c}/{n}.bmp ,  {c} ", " path , label"),
    "quotes": rows('"{c}/{n}.bmp","{c}"', '"path","label"'),
    "quotes after blanks": rows('{c}/{n}.bmp, "{c}"'),
    "semicolons": rows("{c}/{n}.bmp;{c}", "path;label"),
    "tabs": rows("{c}/{n}.bmp\t{c}", "path\tlabel"),
    "pipes": rows("{c}/{n}.bmp|{c}", "path|label"),
    "excel says sep": "sep=;\n" + rows("{c}/{n}.bmp;{c}", "path;label"),
    "capitals": rows("{c}/{n}.bmp,{c}", "Path,LABEL"),
    "other order": rows("{c},7,{c}/{n}.bmp", "label,note,path"),
    "windows": rows("{c}/{n}.bmp,{c}", newline="\r\n"),
    "old mac": rows("{c}/{n}.bmp,{c}", newline="\r"),
    "blank lines": "\n\n" + rows("{c}/{n}.bmp,{c}\n"),
    "lines of commas": rows("{c}/{n}.bmp,{c}\n,"),
    "trailing commas": rows("{c}/{n}.bmp,{c},,"),
    "an empty column": rows("{c}/{n}.bmp,{c},,", "path,label,,"),
    "empty split column": rows("{c}/{n}.bmp,{c},", "path,label,split"),
    "absolute": rows("HERE/{c}/{n}.bmp,{c}"),
    "absolute, backslashes": rows("BACK\\{c}\\{n}.bmp,{c}"),
    "repeated lines": rows("{c}/{n}.bmp,{c}\n{c}//{n}.bmp,{c}"),
    "what a Mac leaves": rows("{c}/{n}.bmp,{c}\n{c}/._{n}.bmp,{c}"),
    "upper-case suffix": rows("{c}/{n}.bmp,{c}"),
}


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("case", GOOD)
def test_case_05_lists_that_are_understood(case, bom, folder):
    classes(".", each=4)
    here = str(folder)
    text = GOOD[case].replace("HERE", here).replace("BACK", here.replace("/", "\\"))
    path = "list.CSV" if case == "upper-case suffix" else "list.csv"
    Path(path).write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    found = data.load_dataset(path)
    assert found.classnames == ["fox", "heron"] and found.name == "list"
    assert [len(s) for s in (found.train, found.val, found.test)] == [4, 2, 2]
    for split in (found.train, found.val, found.test):
        for path, label, pixels in zip(
            split.source().paths, split.labels, split.images(), strict=True
        ):
            assert int(pixels[0, 0, 0]) == 40 * label + int(Path(path).stem)


SPLITS = {  # what people write for a split
    "train val test": ("train", "val", "test"),
    "capitals": ("Train", "VAL", "Test"),
    "other words": ("training", "validation", "Testing"),
    "blanks": (" train ", "valid", " test"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_case_05_splits_in_lists(case):
    classes(".", each=4)
    words = [SPLITS[case][at] for at in (0, 0, 1, 2)]
    lines = [f"{c}/{n}.bmp,{c},{words[n]}" for c, n in ROWS]
    Path("list.csv").write_text("\n".join(["path,label,Split", *lines]))
    found = data.load_dataset("list.csv")
    assert [len(s) for s in (found.train, found.val, found.test)] == [4, 2, 2]
    assert found.test.source().paths == ["fox/3.bmp", "heron/3.bmp"]


BAD = {  # the bytes of a CSV file, and what is said
    "empty": (b"", "the CSV file list.csv is empty"),
    "blank": (b"\n \n", "the CSV file list.csv is empty"),
    "bom alone": (b"\xef\xbb\xbf", "the CSV file list.csv is empty"),
    "sep alone": (b"sep=;\n", "the CSV file list.csv is empty"),
    "head alone": (b"path,label\n", "lists no images"),
    "no head": (b"fox/0.bmp,fox\n", "no column 'path', but fox/0.bmp, fox"),
    "other columns": (b"file,label\n", "has no column 'path', but file, label"),
    "no label": (b"path,class\n", "has no column 'label', but path, class"),
    "a column twice": (b"path,label,Label\n", "has two columns 'label'"),
    "no path": (b"path,label\n,fox\n", "line 2 has no path"),
    "no name": (b"path,label\nfox/0.bmp, \n", "line 2 has no label"),
    "too short": (b"path,label\nfox/0.bmp\n", "line 2 has no label"),
    "too long": (
        b"path,label\nfox/0.bmp,fox, red\n",
        "line 2 has 3 fields, the first line 2: a field that holds ',' must stand in",
    ),
    "open quotes": (b'path,label\n"fox/0.bmp,fox\n', "damaged CSV file list.csv .line"),
    "text after quotes": (b'path,label\n"fox"/0.bmp,fox\n', "damaged CSV file"),
    "unknown split": (
        b"path,label,split\nfox/0.bmp,fox,tset\n",
        "unknown split in line 2 of list.csv 'tset'; did you mean 'test'",
    ),
    "split for some": (
        b"path,label,split\nfox/0.bmp,fox,train\nfox/1.bmp,fox,\n",
        "line 3 has no split",
    ),
    "two labels": (
        b"path,label\nfox/0.bmp,fox\n./fox/0.bmp,heron\n",
        "lines 2 and 3 say different things of ./fox/0.bmp",
    ),
    "two splits": (
        b"path,label,split\nfox/0.bmp,fox,train\nfox/0.bmp,fox,test\n",
        "lines 2 and 3 say different things of fox/0.bmp",
    ),
    "one class": (
        "".join(
            f"{line}\n" for line in [HEAD, *(f"fox/{n}.bmp,fox" for n in range(4))]
        ).encode(),
        "list.csv has one class only, 'fox'",
    ),
    "missing images": (
        rows("x/{c}/{n}.bmp,{c}").encode(),
        "images are missing or empty: .*/x/fox/",
    ),
    "too few": (
        b"path,label\nfox/0.bmp,fox\nheron/0.bmp,heron\n",
        "class 'fox' has 1 images",
    ),
    "cp1252": (rows("{c}/{n}.bmp,{c}\u00e4").encode("cp1252"), "probably WINDOWS-1252"),
    "utf-16": (rows("{c}/{n}.bmp,{c}").encode("utf-16"), "it is in UTF-16"),
    "a spreadsheet": (b"PK\3\4\x14\0\6\0\x08\0\0\0!\0b\xee\x9dh" * 9, "is no text|UTF"),
}


@pytest.mark.parametrize("case", BAD)
def test_case_05_lists_that_are_refused(case):
    classes(".", each=4)
    content, message = BAD[case]
    Path("list.csv").write_bytes(content)
    before = tree()
    with pytest.raises(InputError, match=message):
        data.load_dataset("list.csv")
    assert tree() == before


# --- 06: pictures ---------------------------------------------------------------------

RAMP = np.linspace(0, 65535, 48 * 32).reshape(48, 32).astype(np.uint16)
GREY = (RAMP >> 8).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP[::-1], np.roll(RAMP, 7)], -1)
RGB = (COLOURS >> 8).astype(np.uint8)


def tiff(path, samples, kind=1, white=False):
    """An uncompressed TIFF file of 1 or 3 samples a pixel, as scanners write them."""
    samples = np.ascontiguousarray(samples)
    height, width, count = *samples.shape[:2], samples[0, 0].size
    bits, body = 8 * samples.dtype.itemsize, samples.tobytes()
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, 0 if white else 2 if count == 3 else 1),
        (273, 4, 8),
        (277, 3, count),
        (278, 4, height),
        (279, 4, len(body)),
        (339, 3, kind),
    ]
    at, extra, entries = 8 + len(body) + 2 + 12 * len(tags) + 4, b"", b""
    for tag, form, value in tags:
        if count == 3 and tag in (258, 339):
            entries += struct.pack("<HHII", tag, form, 3, at + len(extra))
            extra += struct.pack("<3H", *[value] * 3)
        else:
            entries += struct.pack("<HHII", tag, form, 1, value)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    Path(path).write_bytes(head + body + directory + extra)


def png16(path, samples):
    """A PNG file of 16 bits a sample: grey, grey and opacity, colour or both."""
    height, width, count = *samples.shape[:2], samples[0, 0].size

    def chunk(name, content):
        crc = zlib_crc(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[count]
    lines = samples.astype(">u2").reshape(height, -1)
    body = b"".join(b"\0" + line.tobytes() for line in lines)
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + chunk(b"IDAT", compress(body))
        + chunk(b"IEND", b"")
    )


def pgm(path, samples, whole=65535):
    head = f"P{5 if samples.ndim == 2 else 6} 32 48 {whole}\n".encode()
    Path(path).write_bytes(head + samples.astype(">u2").tobytes())


def pillow(pixels, mode=None, **options):
    def write(path):
        made = Image.fromarray(pixels)
        (made.convert(mode) if mode else made).save(path, **options)

    return write


OPAQUE = np.full_like(RAMP, 65535)
HALF = np.full_like(RAMP, 30000)
PICTURES = {  # file name: how it is written, and its 8-bit twin
    "grey16.png": (lambda p: png16(p, RAMP), GREY),
    "greyalpha16.png": (lambda p: png16(p, np.stack([RAMP, HALF], -1)), GREY),
    "rgb16.png": (lambda p: png16(p, COLOURS), RGB),
    "rgba16.png": (lambda p: png16(p, np.dstack([COLOURS, OPAQUE])), RGB),
    "grey16.tif": (lambda p: tiff(p, RAMP), GREY),
    "grey16_inverted.tif": (lambda p: tiff(p, RAMP, white=True), 255 - GREY),
    "rgb16.tif": (lambda p: tiff(p, COLOURS), RGB),
    "float32.tif": (lambda p: tiff(p, (RAMP / 65535).astype("<f4"), 3), GREY),
    "float32_inverted.tif": (
        lambda p: tiff(p, (RAMP / 65535).astype("<f4"), 3, white=True),
        255 - GREY,
    ),
    "float_pillow.tiff": (pillow((RAMP / 65535).astype(np.float32)), GREY),
    "grey16.pgm": (lambda p: pgm(p, RAMP), GREY),
    "rgb16.ppm": (lambda p: pgm(p, COLOURS), RGB),
    "grey10.pgm": (lambda p: pgm(p, RAMP >> 6, 1023), GREY),
    "dark16.png": (lambda p: png16(p, RAMP // 100), GREY // 100),
    "grey8.png": (pillow(GREY), GREY),
    "alpha.png": (pillow(np.dstack([RGB, GREY])), RGB),
    "greyalpha.png": (pillow(np.dstack([GREY, GREY])), GREY),
    "palette.png": (pillow(GREY, "P"), GREY),
    "palette.gif": (pillow(GREY), GREY),
    "transparent.png": (pillow(GREY, "P", transparency=0), GREY),
    "bilevel.png": (pillow(GREY > 127), np.where(GREY > 127, 255, 0)),
    "cmyk.tif": (pillow(RGB, "CMYK"), RGB),
    "alpha.webp": (
        pillow(np.dstack([RGB, OPAQUE >> 8]).astype("u1"), lossless=True),
        RGB,
    ),
    "png_called.jpg": (lambda p: Image.fromarray(RGB).save(p, "PNG"), RGB),
}


@pytest.mark.parametrize("name", PICTURES)
def test_case_06_pictures_are_like_their_twins_in_8_bits(name):
    write, twin = PICTURES[name]
    write(name)
    twin = np.asarray(twin).astype(int)
    twin = twin if twin.ndim == 3 else np.repeat(twin[..., None], 3, -1)
    for turn in (False, True):
        pixels = read_image(name, turn)
        assert pixels.dtype == torch.uint8 and pixels.shape == (3, 48, 32)
        assert abs(pixels.permute(1, 2, 0).numpy().astype(int) - twin).max() <= 1


NUMBERS = {  # samples of no clear range, or no picture
    "floats to 255": lambda p: tiff(p, GREY.astype("<f4"), 3),
    "floats below 0": lambda p: tiff(p, (RAMP / 65535 - 0.5).astype("<f4"), 3),
    "not a number": lambda p: tiff(p, np.full((48, 32), np.nan, "<f4"), 3),
    "infinite": lambda p: tiff(p, np.full((48, 32), np.inf, "<f4"), 3),
    "32-bit integers": lambda p: tiff(p, RAMP.astype("<u4")),
    "signed 32 bits": lambda p: tiff(p, RAMP.astype("<i4"), 2),
    "signed 16 bits": lambda p: tiff(p, (RAMP // 2).astype("<i2"), 2),
}


@pytest.mark.parametrize("case", NUMBERS)
def test_case_06_numbers_without_a_clear_range_are_refused(case):
    NUMBERS[case]("x.tif")
    with pytest.raises(InputError, match="the numbers in x.tif have no clear range"):
        read_image("x.tif")


def saved(form, **options):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, form, **options)
    return buffer.getvalue()


UNREADABLE = {
    "empty": b"",
    "text": b"<html>404</html>",
    "cut jpeg": saved("JPEG")[:-200],
    "cut png": saved("PNG")[:-30],
    "cut webp": saved("WEBP")[:60],
    "cut tiff": saved("TIFF")[:1000],
    "head of a png": saved("PNG")[:20],
    "flipped png": saved("PNG")[:60] + b"xxxx" + saved("PNG")[64:],
    "zeros": bytes(500),
    "an archive": b"PK\3\4" + bytes(100),
    "a huge png": saved("PNG")[:16] + b"\x7f\xff\xff\xff" * 2 + saved("PNG")[24:],
    "floats in colour": None,
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_case_06_damaged_pictures_are_named(case):
    if UNREADABLE[case] is None:
        tiff("x.png", (COLOURS / 65535).astype("<f4"), 3)
    else:
        Path("x.png").write_bytes(UNREADABLE[case])
    with pytest.raises(InputError, match="damaged image x.png .* get the file again"):
        read_image("x.png")
    if case == "empty":
        with pytest.raises(InputError, match="it is empty"):
            read_image("x.png")


def test_case_06_pictures_that_are_not_there():
    with pytest.raises(InputError, match="there is no image x.png"):
        read_image("x.png")
    Path("x.png").mkdir()
    with pytest.raises(InputError, match="image x.png"):
        read_image("x.png")


UPRIGHT = np.zeros((40, 60, 3), np.uint8)
UPRIGHT[:20, :, 0], UPRIGHT[:, 30:, 1] = 255, 255
UNDO = {  # EXIF orientation: how the pixels lie in the file
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", UNDO)
def test_case_06_photos_stand_upright(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = np.ascontiguousarray(UNDO[orientation](UPRIGHT))
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    path = f"x.{form}"
    Image.fromarray(lying).save(path, exif=exif, **options.get(form, {}))
    for turn, expected in ((True, UPRIGHT), (False, lying)):
        pixels = read_image(path, turn).permute(1, 2, 0).numpy().astype(int)
        assert pixels.shape == expected.shape and abs(pixels - expected).max() < 8


def test_case_06_own_photos_are_turned_and_the_benchmarks_are_not(tiny_clip):
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.ascontiguousarray(UNDO[6](UPRIGHT)))
    for name in ("fox", "heron"):
        for n in range(4):
            Path("mine", name).mkdir(parents=True, exist_ok=True)
            lying.save(f"mine/{name}/{n}.png", exif=exif)
    mine = data.load_dataset("./mine")
    assert mine.train.images()[0].shape == (3, 40, 60)
    make("eurosat", Path("root"))
    theirs = data.load_dataset("eurosat", "root").test
    path = theirs.source().folder / theirs.source().paths[0]
    lying.save(path, "PNG", exif=exif)
    assert theirs.images([0])[0].shape == (3, 60, 40)
    # one file, read in two ways, has two features
    turned = frozen_features(tiny_clip, mine.train.take([0]))
    lies = frozen_features(tiny_clip, theirs.take([0]))
    assert (turned != lies).any() and mine.train.key != theirs.key


def test_case_06_damaged_exif_data_do_no_harm():
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x63\0" * 9
    Image.fromarray(RGB).save("x.jpg", exif=exif)
    assert read_image("x.jpg", turn=True).shape == (3, 48, 32)
    odd = Image.Exif()
    odd[0x0112] = 77
    Image.fromarray(RGB).save("y.jpg", exif=odd)
    assert read_image("y.jpg", turn=True).shape == (3, 48, 32)


# --- 09: archives ---------------------------------------------------------------------


def member(name, kind=tarfile.REGTYPE, link="", body=b"1", size=None):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = (
        kind,
        link,
        len(body) if size is None else size,
    )
    return info, io.BytesIO(body)


def tar(*members, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for info, body in members:
            archive.addfile(info, body if info.isreg() else None)
    return buffer.getvalue()


def zipped(*names, body=b"1" * 300, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name twice
        with zipfile.ZipFile(buffer, "w", compression) as archive:
            for name in names:
                archive.writestr(name, body)
    return buffer.getvalue()


def special(name, kind):
    info = zipfile.ZipInfo(name)
    info.external_attr = (kind | 0o777) << 16
    return info


def flipped(content, at, bit=4):
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]


def encrypted():
    content = bytearray(zipped("a/1.jpg"))
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    return bytes(content)


def lying_zip(change):
    content = bytearray(zipped("a/1.jpg"))
    for mark, at in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        start = content.index(mark) + at
        content[start : start + 4] = struct.pack("<I", 300 + change)
    return bytes(content)


PLAIN = tar(member("a/1.jpg", body=b"x" * 700), member("a/2.jpg", body=b"y" * 700))
LONG = tar(member("a/1.jpg", body=random.Random(0).randbytes(5000)), mode="w:gz")
ARCHIVES = {  # the bytes of an archive, and what is said
    "link": (tar(member("l", tarfile.SYMTYPE, "a")), "unsafe archive .*'l' is a link"),
    "link to nowhere": (tar(member("a/l", tarfile.SYMTYPE, "b")), "'a/l' is a link"),
    "absolute link": (
        tar(member("l", tarfile.SYMTYPE, "/tmp"), member("l/x")),
        "is a link",
    ),
    "link above": (tar(member("l", tarfile.SYMTYPE, ".."), member("l/x")), "is a link"),
    "chain of links": (
        tar(
            *(
                member(f"{'x' * 200}{n}", tarfile.SYMTYPE, f"{'x' * 200}{n - 1}/..")
                for n in range(30)
            )
        ),
        "is a link",
    ),
    "hard link": (tar(member("a"), member("b", tarfile.LNKTYPE, "a")), "'b' is a link"),
    "link that would be skipped": (
        tar(member("x.pkl", tarfile.SYMTYPE, "/etc/passwd")),
        "'x.pkl' is a link",
    ),
    "link after files": (
        tar(member("a/1.jpg"), member("z", tarfile.SYMTYPE, "a")),
        "'z' is a",
    ),
    "pipe": (tar(member("p", tarfile.FIFOTYPE)), "'p' is a device"),
    "device": (tar(member("d", tarfile.CHRTYPE)), "'d' is a device"),
    "above": (tar(member("../evil.txt")), "is a path outside"),
    "above, later": (tar(member("a/../../evil.txt")), "is a path outside"),
    "absolute": (tar(member("/evil.txt")), "is a path outside"),
    "drive": (tar(member("C:/evil.txt")), "is a path outside"),
    "backslashes": (tar(member("..\\evil.txt")), "is a path outside"),
    "name too long": (tar(member("a/" + "n" * 300)), "is a name too long"),
    "too deep": (tar(member("d/" * 600 + "x")), "is a name too long"),
    "file, then folder": (
        tar(member("a"), member("a/b")),
        "'a/b' is a file and a folder",
    ),
    "folder, then file": (
        tar(member("a/b"), member("a")),
        "'a' is a file and a folder",
    ),
    "flip in a name": (flipped(PLAIN, 1024 + 512 + 2), "damaged archive .* removed"),
    "flip in a size": (flipped(PLAIN, 1024 + 512 + 130), "damaged archive"),
    "flip in a checksum": (flipped(PLAIN, 1024 + 512 + 150), "damaged archive"),
    "flip in the first head": (flipped(PLAIN, 3), "damaged archive"),
    "flip in gz": (flipped(LONG, 2000), "damaged archive"),
    "flip in gz's end": (flipped(LONG, len(LONG) - 6), "damaged archive"),
    "flip in bz2": (flipped(bz2.compress(PLAIN), 60), "damaged archive"),
    "flip in xz": (flipped(lzma.compress(PLAIN), 60), "damaged archive"),
    "cut": (PLAIN[:1200], "damaged archive"),
    "cut between files": (PLAIN[: 512 + 1024], "damaged archive"),
    "cut gz": (LONG[:3000], "damaged archive"),
    "size that lies": (
        tar(member("a/1.jpg"))[:124] + b"77777777777\0" + tar(member("a/1.jpg"))[136:],
        "damaged archive",
    ),
    "text": (b"<html>404</html>", "neither a zip nor a tar file"),
    "empty": (b"", "neither a zip nor a tar file"),
    "gz of text": (gzip.compress(b"hello"), "damaged archive|neither"),
    "zip: link": (zipped(special("l", stat.S_IFLNK)), "'l' is a link"),
    "zip: pipe": (zipped(special("p", stat.S_IFIFO)), "'p' is a device"),
    "zip: above": (zipped("a.jpg", "../evil.txt"), "is a path outside"),
    "zip: absolute": (zipped("/evil.txt"), "is a path outside"),
    "zip: drive": (zipped("C:\\evil.txt"), "is a path outside"),
    "zip: name too long": (zipped("n" * 300), "is a name too long"),
    "zip: file, then folder": (zipped("a", "a/b"), "is a file and a folder at once"),
    "zip: flip": (flipped(zipped("a/1.jpg"), 100), "damaged archive"),
    "zip: flip, packed": (
        flipped(
            zipped(
                "a/1.jpg", body=bytes(range(256)) * 4, compression=zipfile.ZIP_DEFLATED
            ),
            120,
        ),
        "damaged archive",
    ),
    "zip: cut": (zipped("a/1.jpg")[:-30], "damaged archive"),
    "zip: encrypted": (encrypted(), "is encrypted: unpack it by hand"),
    "zip: larger than it is": (lying_zip(50), "damaged archive"),
    "zip: smaller than it is": (lying_zip(-50), "damaged archive"),
    "zip: of a petabyte": (lying_zip(2**32 - 400), "damaged archive|more space"),
}


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("case", ARCHIVES)
def test_case_09_archives_that_are_refused(case, there, folder):
    body, message = ARCHIVES[case]
    Path("x.bin").write_bytes(body)
    if there:
        image("out/kept.bmp")
    before = set(tree()) - {"x.bin"}
    with pytest.raises(InputError, match=message) as raised:
        unpack(Path("x.bin"), Path("out"))
    assert "\n" not in str(raised.value)
    assert set(tree()) - {"x.bin"} == before
    assert Path("x.bin").exists() != ("removed" in str(raised.value))
    assert not list(folder.parent.rglob("evil.txt")) and not Path("/evil.txt").exists()


WELL = {  # the bytes of an archive, and what it holds
    "dots": (tar(member("./", tarfile.DIRTYPE), member("./a/1.jpg")), ["a", "a/1.jpg"]),
    "folders": (tar(member("a", tarfile.DIRTYPE), member("a/1.jpg")), ["a", "a/1.jpg"]),
    "gz": (LONG, ["a", "a/1.jpg"]),
    "bz2": (bz2.compress(PLAIN), ["a", "a/1.jpg", "a/2.jpg"]),
    "xz": (lzma.compress(PLAIN), ["a", "a/1.jpg", "a/2.jpg"]),
    "a file twice": (tar(member("1"), member("1", body=b"22")), ["1"]),
    "skipped": (
        tar(
            member("a/1.jpg"),
            member("__MACOSX/a/._1.jpg"),
            member("a/._1.jpg"),
            member("p.pkl"),
            member(".DS_Store"),
        ),
        ["a", "a/1.jpg"],
    ),
    "a colon": (tar(member("10:30.jpg")), ["10:30.jpg"]),
    "a long path": (tar(member("/".join(["d" * 200] * 10) + "/x")), None),
    "other writing": (tar(member("été/ü.jpg")), ["été", "été/ü.jpg"]),
    "a zip within": (tar(member("a.zip", body=zipped("1.jpg"))), ["a.zip"]),
    "zip": (zipped("a/1.jpg", "a/2.jpg"), ["a", "a/1.jpg", "a/2.jpg"]),
    "zip, backslashes": (zipped("a\\1.jpg"), ["a", "a/1.jpg"]),
    "zip, dots": (zipped("./a/1.jpg"), ["a", "a/1.jpg"]),
    "zip, skipped": (
        zipped("a/1.jpg", "__MACOSX/a/._1.jpg", "x.pkl"),
        ["a", "a/1.jpg"],
    ),
}


@pytest.mark.parametrize("case", WELL)
def test_case_09_archives_that_are_unpacked(case):
    body, expected = WELL[case]
    Path("x.bin").write_bytes(body)
    image("out/kept.bmp")
    for _ in range(2):  # once more changes nothing
        unpack(Path("x.bin"), Path("out"))
        if expected is not None:
            assert tree("out") == sorted([*expected, "kept.bmp"])
        assert tree() == sorted(["out", "x.bin", *(f"out/{p}" for p in tree("out"))])
    if case == "a file twice":
        assert Path("out/1").read_bytes() == b"22"


def test_case_09_a_file_where_a_folder_stands():
    Path("x.tar").write_bytes(PLAIN)
    image("out/b.bmp")
    Path("out/a").write_text("mine")
    with pytest.raises(InputError, match="out/a is a file where a folder belongs"):
        unpack(Path("x.tar"), Path("out"))
    assert tree() == ["out", "out/a", "out/b.bmp", "x.tar"]
    assert Path("out/a").read_text() == "mine"
    Path("out/a").unlink()
    Path("out/a/1.jpg").mkdir(parents=True)
    with pytest.raises(InputError, match="1.jpg is a folder where a file belongs"):
        unpack(Path("x.tar"), Path("out"))
    assert tree("out") == ["a", "a/1.jpg", "b.bmp"]


def test_case_09_an_interruption_leaves_nothing(monkeypatch):
    Path("x.tar").write_bytes(PLAIN)
    extract = tarfile.TarFile.extract

    def interrupted(self, info, *args, **kwargs):
        if info.name == "a/2.jpg":
            raise KeyboardInterrupt
        return extract(self, info, *args, **kwargs)

    monkeypatch.setattr(tarfile.TarFile, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(Path("x.tar"), Path("out"))
    assert tree() == ["x.tar"]


# --- 14: names of data sets -----------------------------------------------------------


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/photos", "b/photos"], ["a_photos", "b_photos"]),
        (["a/photos", "b/birds"], ["photos", "birds"]),
        (["x/a/photos", "y/a/photos"], ["x_a_photos", "y_a_photos"]),
        (["a/photos", "a/photos/"], ["photos", "photos"]),
        (["a/photos", "./a/../a/photos"], ["photos", "photos"]),
        (["a/photos", "a/photos.csv"], ["photos", "photos-2"]),
        (["a/pets", "b/pets"], ["a_pets", "b_pets"]),
        (["a/pets", "dtd/"], ["my-pets", "my-dtd"]),
        (["a/b c.v2", "d/e"], ["b_c.v2", "e"]),
        (["p", "a/p", "b/a/p"], None),
        (["a/b/x", "a_b/x", "c/x"], None),
        ([], []),
    ],
)
def test_case_14_as_much_of_a_path_as_it_takes(paths, names):
    found = own.names_of(paths)
    assert names is None or found == names
    places = [Path(path).resolve() for path in paths]
    for (one, a), (two, b) in itertools.combinations(
        zip(places, found, strict=True), 2
    ):
        assert (a == b) == (one == two)
    assert not set(found) & set(data.list_datasets())
    assert all(name == name.strip("_") and "/" not in name for name in found)
    if len(set(places)) == 1 == len(set(found)):
        assert found[0] == own.name_of(paths[0])


# --- 19: caches -----------------------------------------------------------------------


def damage(content, how):
    rng = random.Random(how)
    if how == "cut":
        return content[: len(content) // 2]
    if how == "cut a little":
        return content[:-5]
    if how == "added to":
        return content + b"more"
    if how == "empty":
        return b""
    if how == "garbage":
        return rng.randbytes(len(content))
    at = rng.randrange(len(content) // 2, len(content) - 200)
    return content[:at] + rng.randbytes(100) + content[at + 100 :]


HOWS = ["cut", "cut a little", "added to", "empty", "garbage", "overwritten"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.filterwarnings("ignore:.*damaged")
def test_case_19_damaged_features_and_digests_are_made_anew(how, tiny_clip):
    classes("birds", each=30)
    settle()
    dataset = data.load_dataset("./birds")
    key, expected = dataset.test.key, frozen_features(tiny_clip, dataset.test)
    for name in ("features", "digests"):
        (path,) = Path("../cache", name).glob("*.sqlite")
        path.write_bytes(damage(path.read_bytes(), how))
        dataset = data.load_dataset("./birds")
        assert dataset.test.key == key
        again = frozen_features(tiny_clip, dataset.test)
        torch.testing.assert_close(again, expected, rtol=1e-5, atol=1e-6)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            frozen_features(tiny_clip, dataset.test)


@pytest.mark.parametrize("how", ["cut", "garbage", "added to"])
def test_case_19_a_damaged_cache_is_announced(how, tiny_clip):
    datasets._mini.cache_clear()  # images may be in memory
    frozen_features(tiny_clip, data.load_dataset("sat").val)
    for path in (
        *Path("../cache/features").iterdir(),
        *Path("../cache/images").iterdir(),
    ):
        path.write_bytes(damage(path.read_bytes(), how))
    datasets._mini.cache_clear()
    with pytest.warns(UserWarning, match="damaged .*cache") as said:
        frozen_features(tiny_clip, data.load_dataset("sat").val)
    assert len(said) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((80, 3, 224, 224), np.uint8),
        np.zeros((8, 3, 48, 48), np.uint8),
        np.zeros((80, 3, 48, 48), np.float32),
        np.zeros((80, 48, 48, 3), np.uint8),
        np.zeros((80, 3, 48, 48), np.uint8),  # of the right form, but not what was kept
        np.array([{"a": 1}], dtype=object),
        "npz",
    ],
    ids=["224 px", "fewer", "floats", "turned", "black", "pickle", "npz"],
)
def test_case_19_other_images_in_the_cache(wrong):
    datasets._mini.cache_clear()
    expected = data.load_dataset("sat").val.images().clone()
    (path,) = Path("../cache/images").iterdir()
    with open(path, "wb") as file:
        np.savez(file, x=1) if isinstance(wrong, str) else np.save(file, wrong)
    datasets._mini.cache_clear()
    with pytest.warns(UserWarning, match=f"damaged cache .*{path.name}: drawing"):
        assert torch.equal(data.load_dataset("sat").val.images(), expected)
    datasets._mini.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(data.load_dataset("sat").val.images(), expected)


INDEXES = [
    "",
    "{",
    "null",
    "[]",
    "{}",
    "[1, 2]",
    '[["a"], {}]',
    '{"fox": [1, {"x": 2}]}',
    '["0", {"fox": [{"": 1}, {"../../x.png": 1}]}]',
    "[" * 5000,
    '"x"',
    "3.5",
    "[null, null, null]",
    "\ud800",
]


@pytest.mark.parametrize("text", INDEXES)
def test_case_19_a_list_of_files_with_garbage(text):
    classes("birds")
    settle()
    expected = scan(Path("birds"), remember=True)
    (index,) = Path("../cache/folders").iterdir()
    index.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.warns(UserWarning, match="damaged list of the files in .*birds"):
        assert scan(Path("birds"), remember=True) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan(Path("birds"), remember=True) == expected


def test_case_19_a_list_of_another_folders_files():
    for name, count in (("birds", 5), ("other", 3)):
        classes(name, each=count)
        os.utime(f"{name}/fox", (1, 1))
        os.utime(f"{name}/heron", (1, 1))
    scan(Path("birds"), remember=True)
    (index,) = Path("../cache/folders").iterdir()
    expected = scan(Path("other"), remember=True)
    (other,) = set(Path("../cache/folders").iterdir()) - {index}
    other.write_bytes(index.read_bytes())
    with pytest.warns(UserWarning, match="damaged list"):
        assert scan(Path("other"), remember=True) == expected


def test_a_new_image_in_a_deeper_folder_is_seen():
    image("birds/fox/day/1.bmp")
    image("birds/heron/1.bmp")
    settle()
    scan(Path("birds"), remember=True)
    image("birds/fox/day/2.bmp")
    assert "fox/day/2.bmp" in scan(Path("birds"), remember=True)["fox"]


def _fill(path, start, done):
    store = Store(path, "cache")
    for n in range(start, start + 40):
        store.put({bytes([n, m]): bytes([m]) * 2000 for m in range(20)})
    done.put(len(store.get([bytes([n, 0]) for n in range(256)])))


def test_case_19_processes_fill_one_cache_at_once(folder):
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    workers = [
        context.Process(target=_fill, args=(folder / "x.sqlite", start, done))
        for start in (0, 20, 100)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert all(done.get(timeout=5) >= 40 for _ in workers)
    found = Store(folder / "x.sqlite", "cache").get(
        [bytes([n, m]) for n in range(256) for m in range(20)]
    )
    assert len(found) == 20 * (60 + 40)
    assert all(value == key[1:] * 2000 for key, value in found.items())


def test_case_19_a_cache_that_cannot_be_written(folder, monkeypatch, tiny_clip):
    Path("file").write_text("x")
    monkeypatch.setenv("PROMPTKIT_CACHE", "file")
    with pytest.raises(InputError, match=r"the cache folder file/\w+ cannot be made"):
        frozen_features(tiny_clip, data.load_dataset("sat").val)


def test_case_19_two_downloads_at_once(monkeypatch):
    from promptkit.data import download

    source = make("eurosat", Path("source"))
    running, most, fetched = [], [], []

    def fetch(remote, work):
        running.append(1)
        most.append(len(running))
        fetched.append(remote)
        time.sleep(0.2)
        with zipfile.ZipFile(work / "x.zip", "w") as archive:
            for path in sorted(source.rglob("*")):
                archive.write(path, f"eurosat/{path.relative_to(source)}")
        running.pop()
        return work / "x.zip"

    monkeypatch.setattr(download, "remotes_of", lambda *args: ["one"])
    monkeypatch.setattr(download, "fetch", fetch)
    failed = []

    def one():
        try:
            download.download("eurosat", "root")
        except BaseException as error:
            failed.append(error)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed and max(most) == 1 and len(fetched) == 1
    waits = [w for w in said if "another process downloads EuroSAT" in str(w.message)]
    assert len(waits) == 2
    assert tree("root/eurosat") == tree("source/eurosat")
    assert tree("root") == ["eurosat", *(f"eurosat/{p}" for p in tree("root/eurosat"))]


# --- 23, 24, 26, 29, 30: the benchmark ------------------------------------------------


def of_these_counts(monkeypatch, name, *counts):
    monkeypatch.setitem(TABLE, name, replace(TABLE[name], counts=counts))


def test_case_23_a_split_file_that_cannot_be_told_apart_is_named(monkeypatch):
    make("eurosat", Path("root"))
    of_these_counts(monkeypatch, "eurosat", 4, 20, 8, 12)
    report = check("eurosat", "root")
    assert report.state == "ready"
    assert report.note.startswith(
        "whether split_zhou_EuroSAT.json is the published one cannot be told"
    )
    assert "'promptkit data download eurosat --force'" in report.note
    with warnings.catch_warnings():  # not at every run
        warnings.simplefilter("error")
        data.load_dataset("eurosat", "root")
    make("fgvc_aircraft", Path("root"))  # has no split file
    of_these_counts(monkeypatch, "fgvc_aircraft", 4, 20, 8, 12)
    assert check("fgvc_aircraft", "root").note == ""


def test_case_24_the_probe_is_not_tuned_on_test_images(tiny_clip):
    make("imagenet", Path("root"))
    drawn = data.few_shot(data.load_dataset("imagenet", "root"), 2, 1)
    with pytest.raises(
        InputError, match="imagenet has no validation images of its own .* is its test"
    ):
        linear_probe(tiny_clip, drawn)
    sat = data.load_dataset("sat")
    with pytest.raises(InputError, match="sat has no validation images of its own"):
        linear_probe(tiny_clip, replace(sat, val=sat.val.take([])))


def test_case_26_draws_of_the_official_code(monkeypatch):
    root = make("imagenet", Path("root"))
    for n in (1, 2):
        (root / "split_fewshot").mkdir(exist_ok=True)
        (root / "split_fewshot" / f"shot_{n}-seed_1.pkl").write_bytes(b"cos\nsystem")
    with pytest.warns(
        UserWarning, match="split_fewshot holds 2 files with draws .* JSON"
    ):
        dataset = data.load_dataset("imagenet", "root")
    assert "split_fewshot" in check("imagenet", "root").note
    folders = sorted(p.name for p in (root / "images/train").iterdir())
    names = [f"{wnid}/{wnid}_{n}.JPEG" for wnid in folders for n in (4, 1)]
    for prefix in ("", "images/train/", "/data/imagenet/images/train/", "train\\"):
        Path("draw.json").write_text(json.dumps({"train": [prefix + x for x in names]}))
        drawn = data.few_shot(dataset, 2, 7, draw="draw.json")
        paths = np.array(drawn.train.source().paths)[drawn.train.rows]
        assert paths.tolist() == [f"images/train/{name}" for name in names]
        assert drawn.train.labels.tolist() == [y for y in range(6) for _ in range(2)]
        assert len(drawn.val) == len(dataset.test) and len(drawn.pool) == 30
    assert drawn.identity != data.few_shot(dataset, 2, 7).identity


DRAW = {"train": [f"Forest/Forest_{n}.jpg" for n in (1, 2)], "val": ["Forest_3.jpg"]}
DRAWS = {  # a file, and what is said; the dataset has one training image of two classes
    "text": ("x", "damaged JSON file"),
    "list": ("[]", 'must hold {"train"'),
    "no train": ('{"val": []}', 'must hold {"train"'),
    "no val": (
        '{"train": ["fox/0.bmp", "heron/0.bmp"]}',
        '"val" of draw.json must be a list',
    ),
    "numbers": (
        '{"train": [1], "val": []}',
        '"train" of draw.json must be a list of paths',
    ),
    "unknown": (
        '{"train": ["fox/9.bmp"], "val": []}',
        "none of the images of 'birds' is 'fox/9",
    ),
    "of the test": (
        '{"train": ["fox/4.bmp"], "val": []}',
        "none of the images .* is 'fox/4",
    ),
    "two fit": (
        '{"train": ["0.bmp"], "val": []}',
        "2 of the images of 'birds' is '0.bmp",
    ),
    "twice": (
        '{"train": ["fox/0.bmp", "./fox/0.bmp"], "val": []}',
        "lists './fox/0.bmp' twice",
    ),
    "too few": (
        '{"train": ["fox/0.bmp"], "val": ["fox/2.bmp", "heron/2.bmp"]}',
        "gives 0 images of the class 'heron', a draw of 1 shots has 1",
    ),
    "too many": (
        '{"train": ["fox/0.bmp", "fox/1.bmp", "heron/0.bmp"], "val": []}',
        "gives 2 images of the class 'fox', a draw of 1 shots has 1",
    ),
}


@pytest.mark.parametrize("case", DRAWS)
def test_case_26_draws_that_do_not_fit(case):
    split_file(None)
    os.rename("data", "birds")
    text, message = DRAWS[case]
    Path("draw.json").write_text(text)
    dataset = data.load_dataset("./birds")
    with pytest.raises(InputError, match=message):
        data.few_shot(dataset, 1, 1, draw="draw.json")
    good = {"train": ["fox/1.bmp", "heron/0.bmp"], "val": ["heron/2.bmp", "fox/2.bmp"]}
    Path("draw.json").write_text(json.dumps(good))
    drawn = data.few_shot(dataset, 1, 1, draw="draw.json")
    assert drawn.train.rows.tolist() == [1, 2] and drawn.val.rows.tolist() == [1, 0]
    assert drawn.train.labels.tolist() == [0, 1] and drawn.val.labels.tolist() == [1, 0]
    with pytest.raises(InputError, match="'pets' has no files that"):
        data.few_shot(data.load_dataset("pets"), 1, 1, draw="draw.json")


def test_case_29_imagenet_for_testing_alone(monkeypatch):
    root = make("imagenet", Path("root"))
    of_these_counts(monkeypatch, "imagenet", 6, 30, 18, 18)
    assert check("imagenet", "root").note == ""
    os.rename(root / "images/train", root / "elsewhere")
    datasets._listing.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.load_dataset("imagenet", "root")
    assert len(dataset.test) == 18 and len(dataset.train) == 0
    report = check("imagenet", "root")
    assert (
        report.state == "ready" and "images/train: it can be tested on" in report.note
    )
    with pytest.raises(InputError, match="'imagenet' has no training images here"):
        data.few_shot(dataset, 1, 1)
    of_these_counts(monkeypatch, "imagenet", 6, 30, 19, 19)
    assert check("imagenet", "root").state == "differs"


def test_case_29_imagenet_without_its_list_of_names(monkeypatch):
    for label in range(1000):
        image(f"root/imagenet/images/val/n{label:08d}/x.bmp").rename(
            f"root/imagenet/images/val/n{label:08d}/x.JPEG"
        )
    of_these_counts(monkeypatch, "imagenet", 1000, 9, 1000, 1000)
    with pytest.warns(UserWarning) as said:
        dataset = data.load_dataset("imagenet", "root")
    assert dataset.classnames[134] == "crane bird"
    (text,) = [str(warning.message) for warning in said]
    assert "names that come with open_clip, which are the published ones" in text
    assert check("imagenet", "root").state == "ready"


@pytest.mark.parametrize("name", PUBLISHED)
def test_case_30_lists_written_by_hand_are_read_as_they_stand(name):
    what = publish(name, Path("root"))
    dataset = data.load_dataset(name, "root")
    assert dataset.classnames == what.classnames
    assert dataset.source_rows == what.source_rows
    for part, expected in what.parts.items():
        split = getattr(dataset, part)
        start = "" if what.images == "." else f"{what.images}/"
        found = [
            (path.removeprefix(start), label)
            for path, label in zip(
                split.source().paths, split.labels.tolist(), strict=True
            )
        ]
        assert found == [(path, label) for path, label in expected]
        for (_, label), pixels in zip(expected, split.images(), strict=True):
            colour = np.random.default_rng(label).integers(40, 216, 3)
            assert abs(pixels.float().mean((1, 2)).numpy() - colour).max() < 25
    if len(dataset.train) and name != "imagenet":
        drawn = data.few_shot(dataset, 1, 1)
        assert sorted(drawn.train.labels.tolist()) == list(range(len(what.classnames)))


# --- what methods are given -----------------------------------------------------------


def test_the_pool_is_the_whole_training_split_without_labels():
    pets = data.load_dataset("pets")
    assert pets.pool is None and pets.pool_classnames == []
    assert torch.equal(pets.unlabelled.rows, pets.train.rows)
    assert pets.unlabelled.labels.unique().tolist() == [-1]
    drawn = data.few_shot(pets, 2, 1)
    base, new = data.base_new(drawn)
    for part in (drawn, base, new, data.subset(new, [3]), data.few_shot(drawn, 1, 1)):
        assert torch.equal(part.pool.rows, pets.train.rows)
        assert part.pool.labels.unique().tolist() == [-1]
        assert part.pool_classnames == pets.classnames and part.unlabelled is part.pool
    assert len(base.train) == 20 and len(base.pool) == 640


def test_what_learns_is_given_no_test_images():
    drawn = data.few_shot(data.load_dataset("pets"), 2, 1)
    given = drawn.for_training()
    assert len(given.test) == 0 and torch.equal(given.val.rows, drawn.val.rows)
    assert torch.equal(given.train.rows, drawn.train.rows) and given.pool is drawn.pool
    make("imagenet", Path("root"))
    imagenet = data.load_dataset("imagenet", "root")
    assert imagenet.val_is_test and not drawn.val_is_test
    given = imagenet.for_training()
    assert len(given.test) == len(given.val) == 0 and len(given.train) == 30


def test_digests_are_of_the_content_alone():
    image("a/x.bmp", 3)
    found = Files(Path("a"), ["x.bmp"]).digests()
    expected = hashlib.blake2b(Path("a/x.bmp").read_bytes(), digest_size=16).digest()
    assert found == [expected]
    assert Files(Path("a"), ["x.bmp"], turn=True).digests() == [expected + b"turned"]
    with pytest.raises(InputError, match="there is no image .*/a/y.bmp"):
        Files(Path("a"), ["y.bmp"], [5]).digests()
    with pytest.raises(InputError, match="cannot read .*/a .Is a directory"):
        Files(Path("."), ["a"], [5]).digests()
