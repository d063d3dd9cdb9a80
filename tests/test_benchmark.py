"""The eleven real datasets, the four shifts of ImageNet and one's own images, in small
folders of the true formats.
"""

import json
import random
import shutil
import sys
import time
import warnings

import numpy as np
import pytest
import scipy.io
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES
from PIL import Image
from real_data import CLASSNAMES, EACH, NAMES, make, picture, real_root  # noqa: F401
from scipy.stats import ks_2samp
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from promptkit import build, data, load_method
from promptkit.data import images
from promptkit.data.benchmark import ENSEMBLE, TABLE
from promptkit.data.own import name_of
from promptkit.errors import InputError
from promptkit.protocols import (
    base_to_new,
    cross_dataset,
    domain_generalization,
    few_shot,
)
from promptkit.results import paper_numbers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*cannot be compared with the papers'"),
    pytest.mark.filterwarnings("ignore:class name 'missile'"),
    pytest.mark.filterwarnings("ignore:ks_2samp"),
]
features_module = sys.modules[
    "promptkit.data.features"
]  # the package's name for it is that of its function
SHIFTED = TABLE["imagenet"].shifts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PROMPTKIT_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


# --- names and folders ----------------------------------------------------------------


def test_the_table_is_the_benchmarks():
    assert data.DATASETS == (
        "imagenet",
        "caltech101",
        "oxford_pets",
        "stanford_cars",
        "oxford_flowers",
        "food101",
        "fgvc_aircraft",
        "sun397",
        "dtd",
        "eurosat",
        "ucf101",
    )
    assert set(data.list_datasets()) >= {*data.DATASETS, *SHIFTED, *data.MINI_TASKS}
    assert {*data.DATASETS, *SHIFTED} <= set(paper_numbers()["dataset"])
    assert sum(TABLE[name].counts[0] for name in data.DATASETS) == 2191
    assert all("{}" in entry.template for entry in TABLE.values())


@pytest.mark.parametrize("name", TABLE)
def test_every_dataset_is_read_with_or_without_split_file(name, tmp_path, monkeypatch):
    make(name, tmp_path / "with")
    make(name, tmp_path / "without", split_file=False)
    for root in ("with", "without"):
        dataset = data.load_dataset(name, tmp_path / root)
        classes = len(CLASSNAMES[name])
        assert dataset.classnames == CLASSNAMES[name] and dataset.name == name
        assert dataset.template == TABLE[name].template
        if name in SHIFTED:
            assert (len(dataset.train), len(dataset.val)) == (0, 0)
        elif name == "imagenet":
            assert dataset.train.labels.bincount().tolist() == [EACH["train"]] * classes
            assert dataset.val.key == dataset.test.key and len(dataset.val) == len(
                dataset.test
            )
        else:
            whole = dataset.train.labels.bincount() + dataset.val.labels.bincount()
            assert whole.tolist() == [EACH["train"] + EACH["val"]] * classes
        assert dataset.test.labels.bincount().tolist() == [EACH["test"]] * classes
        for split in (
            dataset.train,
            dataset.val,
            dataset.test,
        ):  # the colour of an image tells its class
            for image, label in zip(split.images(), split.labels.tolist(), strict=True):
                label = (
                    label if dataset.source_rows is None else dataset.source_rows[label]
                )
                colour = np.random.default_rng(label).integers(40, 216, 3)
                assert (
                    image.dtype == torch.uint8
                    and abs(image.float().mean((1, 2)).numpy() - colour).max() < 25
                )
    monkeypatch.setenv("PROMPTKIT_DATA", str(tmp_path / "with"))
    assert (
        data.load_dataset(name).test.key
        == data.load_dataset(name, tmp_path / "with").test.key
    )


def test_labels_follow_the_split_file(tmp_path):
    folder = make("dtd", tmp_path)
    rows = {
        "train": [
            ["zigzagged/zigzagged_0001.jpg", 1, "zigzagged"],
            ["banded/banded_0001.jpg", 0, "striped"],
        ]
    }
    rows |= {"val": [], "test": [["banded/banded_0002.jpg", 0, "striped"]]}
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps(rows))
    dataset = data.load_dataset("dtd", tmp_path)
    assert dataset.classnames == [
        "striped",
        "zigzagged",
    ] and dataset.train.labels.tolist() == [1, 0]
    assert dataset.train.source().paths == [
        "images/zigzagged/zigzagged_0001.jpg",
        "images/banded/banded_0001.jpg",
    ]


def test_templates():
    texts = {name: TABLE[name].template for name in TABLE}
    assert texts["eurosat"] == "a centered satellite photo of {}."
    assert texts["food101"] == "a photo of {}, a type of food."
    plain = {
        texts[name]
        for name in ("imagenet", "stanford_cars", "sun397", "caltech101", *SHIFTED)
    }
    assert plain == {"a photo of a {}."}
    chosen = [OPENAI_IMAGENET_TEMPLATES[n]("{}") for n in (73, 7, 44, 69, 35, 67, 64)]
    assert list(ENSEMBLE) == chosen


def test_ensembles(tmp_path):
    for name in ("imagenet", "imagenet_a", "dtd"):
        make(name, tmp_path)
    assert data.load_dataset("imagenet", tmp_path).templates == ENSEMBLE
    assert data.load_dataset("imagenet_a", tmp_path).templates == (
        *ENSEMBLE,
        "a photo of a {}.",
    )
    assert data.load_dataset("dtd", tmp_path).templates == (*ENSEMBLE, "{} texture.")


def test_a_home_made_split_is_kept_marked_and_announced(tmp_path):
    folder = make("eurosat", tmp_path, split_file=False)
    path = folder / "split_zhou_EuroSAT.json"
    with pytest.warns(
        UserWarning, match="home-made .* not the published split_zhou_EuroSAT.json"
    ):
        first = data.load_dataset("eurosat", tmp_path)
    text = path.read_text()
    content = json.loads(text)
    assert content["made_by"] == "promptkit, seed 1" and content["train"][0][
        0
    ].startswith("AnnualCrop/")
    assert text.startswith('{\n    "train": [\n        [\n') and sorted(
        folder.iterdir()
    ) == [folder / "2750", path]
    data.datasets._listing.cache_clear()
    with pytest.warns(UserWarning, match="home-made"):  # also when it is read
        again = data.load_dataset("eurosat", tmp_path)
    assert again.train.source().paths == first.train.source().paths
    assert [len(split) for split in (first.train, first.val, first.test)] == [20, 8, 12]
    path.unlink()
    folder.chmod(0o500)  # a folder that cannot be written serves as well
    try:
        data.datasets._listing.cache_clear()
        assert (
            data.load_dataset("eurosat", tmp_path).train.source().paths
            == first.train.source().paths
        )
    finally:
        folder.chmod(0o700)


def test_a_published_split_is_not_announced_but_a_part_of_the_benchmark_is(tmp_path):
    make("eurosat", tmp_path)
    with pytest.warns(UserWarning) as said:
        data.load_dataset("eurosat", tmp_path)
    (text,) = [str(warning.message) for warning in said]
    assert (
        "has 4 classes and 20 + 8 + 12 images, the benchmark's has 10 classes and 13500"
        " + 5400 + 8100 images" in text
    )


def test_changed_files_are_read_anew(tmp_path):
    folder = make("eurosat", tmp_path)
    assert len(data.load_dataset("eurosat", tmp_path).test) == 12
    path = folder / "split_zhou_EuroSAT.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"test": content["test"][:5]}))
    assert len(data.load_dataset("eurosat", tmp_path).test) == 5


def test_pickles_are_never_read(tmp_path):
    folder = make("imagenet", tmp_path)
    (folder / "preprocessed.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "split_fewshot").mkdir()
    (folder / "split_fewshot" / "shot_2-seed_1.pkl").write_bytes(b"no pickle")
    drawn = data.few_shot(data.load_dataset("imagenet", tmp_path), 2, 1)
    generator = random.Random(1)
    assert drawn.train.rows.tolist() == [
        row for y in range(6) for row in generator.sample(range(5 * y, 5 * y + 5), 2)
    ]
    assert len(drawn.val) == len(drawn.test)  # ImageNet has no draw for validation


def test_classes_with_few_images_give_all_they_have(tmp_path):
    folder = make("caltech101", tmp_path)
    path = folder / "split_zhou_Caltech101.json"
    content = json.loads(path.read_text())
    content["train"] = [
        row for n, row in enumerate(content["train"]) if n not in (0, 1)
    ]
    path.write_text(json.dumps(content))
    dataset = data.load_dataset("caltech101", tmp_path)
    assert data.few_shot(dataset, 4, 1).train.labels.bincount().tolist() == [3, 4, 4, 4]
    assert data.few_shot(dataset, 4, 1).train.rows.tolist()[:3] == [
        0,
        1,
        2,
    ]  # in their order, without a draw
    with pytest.warns(
        UserWarning,
        match="6 shots are more than 'caltech101' has: class 'leopard' has 5",
    ):
        assert data.few_shot(dataset, 6, 1).train.labels.bincount().tolist() == [
            3,
            5,
            5,
            5,
        ]


# --- ImageNet and its shifts ----------------------------------------------------------


def test_shifts_know_their_classes_in_the_source(real_root):  # noqa: F811
    source = data.load_dataset("imagenet", real_root)
    assert (
        source.shifts
        == SHIFTED
        == ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
    )
    assert data.load_dataset("mini").shifts == tuple(data.SHIFTS)
    for name in source.shifts:
        shift = data.load_dataset(name, real_root)
        assert [source.classnames[row] for row in shift.source_rows] == shift.classnames
    assert shift.source_rows == [1, 3, 5]
    assert data.subset(shift, [2, 0]).source_rows == [5, 1]


def test_imagenetv2_is_in_the_order_of_numbers(tmp_path):
    folder = tmp_path / "imagenetv2"
    for label in range(12):
        picture(
            folder / "imagenetv2-matched-frequency-format-val" / str(label) / "x.jpeg",
            label,
        )
    wnids = [f"n{label:08d} name {label}" for label in range(12)]
    (folder / "classnames.txt").write_text("\n".join(wnids))
    test = data.load_dataset("imagenetv2", tmp_path).test
    assert test.labels.tolist() == list(range(12))
    assert [path.split("/")[1] for path in test.source().paths] == [
        str(label) for label in range(12)
    ]


def test_class_names_of_imagenet_serve_its_shifts(tmp_path):
    make("imagenet", tmp_path)
    (make("imagenet_r", tmp_path) / "classnames.txt").unlink()
    assert (
        data.load_dataset("imagenet_r", tmp_path).classnames == CLASSNAMES["imagenet_r"]
    )
    shutil.rmtree(tmp_path / "imagenet")
    data.datasets._listing.cache_clear()
    with pytest.raises(InputError, match="classnames.txt is missing: it holds a line"):
        data.load_dataset("imagenet_r", tmp_path)


def test_open_clip_knows_the_thousand_names(tmp_path):
    for label in range(1000):
        folder = tmp_path / "imagenet" / "images" / "val" / f"n{label:08d}"
        folder.mkdir(parents=True)
        (folder / "x.JPEG").write_bytes(b"x")
    with pytest.warns(
        UserWarning, match="taking the class names that come with open_clip"
    ):
        dataset = data.load_dataset("imagenet", tmp_path)
    assert dataset.classnames[:2] == ["tench", "goldfish"] and len(dataset.train) == 0
    assert sorted(
        {n for n in dataset.classnames if dataset.classnames.count(n) > 1}
    ) == ["missile", "sunglasses"]
    with pytest.raises(InputError, match="no training images"):
        data.few_shot(dataset, 1, 1)


def test_a_method_serves_two_classes_of_one_name(tmp_path, tiny_clip):
    make("imagenet", tmp_path)
    dataset = data.load_dataset("imagenet", tmp_path)
    with pytest.warns(
        UserWarning,
        match="'missile' appears twice, at positions 2 and 3: no text tells the two",
    ):
        method = build("coop", tiny_clip, dataset.classnames, n_ctx=2, init="")
    logits = method.logits(
        data.transform(tiny_clip, dataset.test.images(torch.arange(4)))
    )
    assert logits.shape == (4, 6) and torch.equal(logits[:, 2], logits[:, 3])
    assert (
        load_method(method.save(tmp_path / "x.safetensors"), tiny_clip).classnames
        == method.classnames
    )


def test_long_lists_of_files_are_remembered(tmp_path, monkeypatch):
    folder = make("imagenet", tmp_path)
    time.sleep(0.03)  # what changed just now is not remembered
    first = data.load_dataset("imagenet", tmp_path)
    assert first.train.key
    # from here on only the cache folder can answer
    monkeypatch.setattr(images.os, "walk", None)
    data.datasets._listing.cache_clear()
    assert data.load_dataset("imagenet", tmp_path).train.key == first.train.key
    monkeypatch.undo()
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    picture(folder / "images" / "train" / "n01440764" / "new.JPEG", 0)
    data.datasets._listing.cache_clear()
    assert len(data.load_dataset("imagenet", tmp_path).train) == len(first.train) + 1
    for index in (tmp_path / "cache" / "folders").iterdir():
        index.write_text("{")
    data.datasets._listing.cache_clear()
    with pytest.warns(UserWarning, match="damaged list of the files in .*imagenet"):
        assert len(data.load_dataset("imagenet", tmp_path).train) == 31


# --- damaged folders ------------------------------------------------------------------


SPLIT = "split_zhou_DescribableTextures.json"
CARS = "devkit/cars_meta.mat"
V2 = "imagenetv2-matched-frequency-format-val"


def split(**lists):
    """A change of DTD's split file."""

    def change(folder):
        content = json.loads((folder / SPLIT).read_text())
        (folder / SPLIT).write_text(json.dumps(content | lists))

    return change


def text(path, content):
    return lambda folder: (folder / path).write_text(content)


def mat(path, **arrays):
    return lambda folder: scipy.io.savemat(folder / path, arrays)


def more(path):
    return lambda folder: picture(folder / path, 0)


def gone(path):
    return lambda folder: (
        shutil.rmtree(folder / path)
        if (folder / path).is_dir()
        else (folder / path).unlink()
    )


def heap(folder):
    shutil.rmtree(folder / "images/val")
    picture(folder / "images/val/ILSVRC2012_val_1.JPEG", 0)


NAME_0 = [["banded/banded_0001.jpg", 0, "a"], ["banded/banded_0002.jpg", 0, "b"]]
DAMAGES = {  # dataset: changes of its folder, and what the error says
    "dtd": [  # with its split file
        (text(SPLIT, '{"train": ['), f"damaged split file .*{SPLIT} .* get it again"),
        (text(SPLIT, "{}"), f"{SPLIT} has no list 'train'"),
        (text(SPLIT, "[]"), f"damaged split file .*{SPLIT}"),
        (
            split(val=[["a.jpg", 1]]),
            r'item 0 of "val" must be \[path, label, class name\]',
        ),
        (split(test=[["a.jpg", "x", "banded"]]), 'item 0 of "test" must be'),
        (split(test=[["a.jpg", -1, "banded"]]), 'item 0 of "test" must be'),
        (split(test=[["../../x.jpg", 0, "banded"]]), 'item 0 of "test" must be'),
        (split(test=[["/etc/x.jpg", 0, "banded"]]), 'item 0 of "test" must be'),
        (
            split(test=[["x.jpg", 4, "new"]]),
            "label 4 .new. of images/x.jpg is out of range, there are 4",
        ),
        (
            split(test=[["x.jpg", 1, "new"]]),
            "label 1 of images/x.jpg is 'new', not 'blotchy'",
        ),
        (
            split(train=[["banded/banded_0001.jpg", 1, "b"]]),
            "no training image has the label 0",
        ),
        (
            split(train=NAME_0),
            "label 0 of images/banded/banded_0002.jpg is both 'a' and 'b'",
        ),
        (
            split(test=[["1.jpg", 0, "banded"]] * 2),
            "2 of 2 images are missing or empty: .*images/1.jpg",
        ),
        (
            text("images/banded/banded_0001.jpg", ""),
            "image is empty: .*banded_0001.jpg; get the files again",
        ),
        (split(test=[]), "has no test images"),
    ],
    "oxford_pets": [  # this one and the following have no split file
        (gone("annotations/test.txt"), "annotations/test.txt is missing"),
        (
            text("annotations/test.txt", "a_1\n"),
            "a line must be 'image class species breed', not 'a_1'",
        ),
    ],
    "stanford_cars": [
        (text(CARS, "MATLAB 5.0"), f"damaged file .*{CARS}"),
        (mat(CARS, other=[1]), f"damaged file .*{CARS} .*KeyError"),
        (
            mat(CARS, class_names=np.array([["Audi 2012"]], object)),
            "class 2 of .*jpg is out of range, there are 1",
        ),
        (
            gone("cars_test_annos_withlabels.mat"),
            "cars_test_annos_withlabels.mat is missing",
        ),
    ],
    "oxford_flowers": [
        (gone("cat_to_name.json"), "cat_to_name.json is missing"),
        (
            text("cat_to_name.json", '{"1": "rose"}'),
            "cat_to_name.json has no name for class '2'",
        ),
        (text("cat_to_name.json", "x"), "damaged file .*cat_to_name.json"),
    ],
    "fgvc_aircraft": [
        (
            text("images_variant_val.txt", "17 747\n"),
            "the variant '747' of image 17 is not in variants.txt",
        ),
        (gone("images_variant_test.txt"), "images_variant_test.txt is missing"),
    ],
    "sun397": [
        (
            text("Testing_01.txt", "/z/zoo/1.jpg\n"),
            "the class '/z/zoo' of /z/zoo/1.jpg is not in ClassName.txt",
        ),
        (gone("ClassName.txt"), "ClassName.txt is missing"),
    ],
    "ucf101": [
        (
            text("ucfTrainTestlist/testlist01.txt", "Yoga/v.avi\n"),
            "the action 'Yoga' .* is not in classInd.txt",
        ),
    ],
    "food101": [
        (gone("images"), "the folder .*food-101/images is missing"),
        (
            lambda folder: (folder / "images/zucchini").mkdir(),
            "the class folder .*zucchini holds no images",
        ),
        (more("images/zucchini/1.jpg"), "class 'zucchini' has 1 images; .* at least 4"),
    ],
    "imagenet": [
        (text("classnames.txt", "n01440764\n"), "a line must be 'wnid class name'"),
        (
            gone("images/val/n01440764"),
            "train and val hold different classes, such as n01440764",
        ),
        (
            heap,
            (
                "images/val holds no class folders; sort its images into folders named"
                " by wnid"
            ),
        ),
    ],
    "imagenet_a": [
        (
            more("imagenet-a/n99/1.jpg"),
            "imagenet-a/n99 is of no class in classnames.txt",
        )
    ],
    "imagenetv2": [
        (more(f"{V2}/n01440764/1.jpg"), "n01440764 must be a label from 0 to 5"),
        (more(f"{V2}/6/1.jpg"), "/6 must be a label from 0 to 5"),
    ],
}
CASES = [(name, *case) for name, cases in DAMAGES.items() for case in cases]


@pytest.mark.parametrize(
    "name, change, message",
    CASES,
    ids=[f"{name}-{n}" for n, (name, *_) in enumerate(CASES)],
)
def test_damaged_folders_are_named(name, change, message, tmp_path):
    folder = make(name, tmp_path, split_file=name == "dtd")
    change(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=message) as raised:
        data.load_dataset(name, tmp_path)
    assert str(folder) in str(raised.value) or "zucchini" in message
    assert (
        sorted(folder.rglob("*")) == before
    )  # no split of damaged files is left behind


@pytest.mark.parametrize("name", TABLE)
def test_missing_datasets_say_how_to_get_them(name, tmp_path):
    with pytest.raises(
        InputError,
        match=(
            "image-net.org" if name == "imagenet" else f"promptkit data download {name}"
        ),
    ):
        data.load_dataset(name, tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"is not in .*data"):
        data.load_dataset(name)


@pytest.mark.parametrize("content", [b"not an image", b"\xff\xd8\xff\xe0", "truncated"])
def test_damaged_images_are_named_when_they_are_read(content, tmp_path):
    make("eurosat", tmp_path)
    split = data.load_dataset("eurosat", tmp_path).test
    path = split.source().folder / split.source().paths[1]
    path.write_bytes(path.read_bytes()[:400] if content == "truncated" else content)
    with pytest.raises(InputError, match=f"damaged image {path} .* get the file again"):
        split.images(torch.arange(4))
    path.unlink()
    with pytest.raises(InputError, match=f"no image {path}"):
        split.images([1])


# --- images ---------------------------------------------------------------------------


def test_images_are_read_when_asked_for(tmp_path, monkeypatch):
    make("oxford_pets", tmp_path)
    read, read_image = [], images.read_image
    monkeypatch.setattr(
        images, "read_image", lambda path, *a: read.append(path) or read_image(path, *a)
    )
    split = data.load_dataset("oxford_pets", tmp_path).train
    assert not read
    some = split.images(torch.tensor([3, 1, 3]))
    assert len(read) == 3 and len(some) == 3 and torch.equal(some[0], some[2])
    assert len({tuple(image.shape) for image in split.images()}) > 5  # of many sizes
    path = split.source().folder / split.source().paths[split.rows[1]]
    assert np.array_equal(
        some[1].permute(1, 2, 0).numpy(), np.asarray(Image.open(path).convert("RGB"))
    )
    assert (
        torch.equal(split.take([1, 2]).images([0])[0], some[1])
        and len(split.images([])) == 0
    )


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "I;16", "CMYK"])
def test_all_modes_become_rgb(mode, tmp_path):
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 12), 700, np.uint16))
    else:
        image = Image.fromarray(np.full((9, 12, 3), 90, np.uint8)).convert(mode)
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    assert images.read_image(next(tmp_path.glob("x.*"))).shape == (3, 9, 12)


SIZES = [
    (64, 96),
    (500, 375),
    (31, 57),
    (32, 32),
    (33, 32),
    (120, 40),
    (300, 20),
    (32, 64),
    (7, 9),
]


def test_test_transform_is_that_of_the_papers(tiny_clip):
    """Resize and crop as torchvision does with PIL images, to the bit."""
    paper = transforms.Compose(
        [
            transforms.Resize(32, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop((32, 32)),
            transforms.ToTensor(),
            transforms.Normalize(tiny_clip.mean, tiny_clip.std),
        ]
    )
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in SIZES]
    ours = data.transform(
        tiny_clip, [torch.from_numpy(x).permute(2, 0, 1) for x in pixels]
    )
    assert ours.shape == (len(SIZES), 3, 32, 32)
    torch.testing.assert_close(
        ours,
        torch.stack([paper(Image.fromarray(x)) for x in pixels]),
        rtol=0,
        atol=1e-6,
    )
    batch = torch.from_numpy(rng.integers(0, 256, (4, 3, 48, 40), np.uint8))
    assert torch.equal(
        data.transform(tiny_clip, batch), data.transform(tiny_clip, list(batch))
    )


def test_train_transform_is_that_of_the_papers(tiny_clip, monkeypatch):
    """RandomResizedCrop and flip of PIL images, to the bit, for the same box."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    paper = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(tiny_clip.mean, tiny_clip.std)]
    )
    crop = transforms.RandomResizedCrop(
        (32, 32), (0.08, 1.0), interpolation=InterpolationMode.BICUBIC
    )
    flipped = 0
    for n, (h, w) in enumerate(SIZES * 4):
        pixels = rng.integers(0, 256, (h, w, 3), np.uint8)
        generator.manual_seed(n)
        *box, flip = features_module._draw_crop((3, h, w), generator)
        monkeypatch.setattr(crop, "get_params", lambda *_, box=tuple(box): box)
        expected = crop(Image.fromarray(pixels))
        expected = (
            expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else expected
        )
        generator.manual_seed(n)
        ours = data.transform(
            tiny_clip, [torch.from_numpy(pixels).permute(2, 0, 1)], True, generator
        )[0]
        torch.testing.assert_close(ours, paper(expected), rtol=0, atol=1e-6)
        flipped += flip
    assert 8 < flipped < 28


@pytest.mark.parametrize("height, width", [(64, 96), (375, 500), (20, 300), (300, 20)])
def test_crops_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    ours = np.array(
        [
            features_module._draw_crop((3, height, width), generator)[:4]
            for _ in range(3000)
        ]
    )
    image = torch.zeros(3, height, width)
    params = transforms.RandomResizedCrop.get_params
    theirs = np.array([params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-4
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (
        ours[:, 1] + ours[:, 3] <= width
    ).all()


# --- features -------------------------------------------------------------------------


def test_features_of_files_are_computed_once_and_only_where_asked(
    tmp_path, tiny_clip, monkeypatch
):
    make("oxford_pets", tmp_path / "here")
    split = data.load_dataset("oxford_pets", tmp_path / "here").train
    expected = tiny_clip.encode_image(data.transform(tiny_clip, split.images()))
    read, read_image = [], images.read_image
    monkeypatch.setattr(
        images, "read_image", lambda path, *a: read.append(path) or read_image(path, *a)
    )
    part = split.take([3, 1, 3])
    torch.testing.assert_close(
        data.frozen_features(tiny_clip, part), expected[[3, 1, 3]], rtol=1e-4, atol=1e-5
    )
    assert len(read) == 2
    torch.testing.assert_close(
        data.frozen_features(tiny_clip, split), expected, rtol=1e-4, atol=1e-5
    )
    assert len(read) == len(split)
    shutil.move(tmp_path / "here", tmp_path / "there")  # the same data elsewhere
    moved = data.load_dataset("oxford_pets", tmp_path / "there").train
    torch.testing.assert_close(
        data.frozen_features(tiny_clip, moved), expected, rtol=1e-4, atol=1e-5
    )
    assert (
        len(read) == len(split)
        and len(data.frozen_features(tiny_clip, split.take([]))) == 0
    )


def test_features_differ_by_what_they_depend_on(tmp_path, tiny_clip, make_clip):
    make("dtd", tmp_path)
    split = data.load_dataset("dtd", tmp_path).test
    folder = tmp_path / "cache" / "features"

    def files():
        return len(list(folder.iterdir()))

    before = data.frozen_features(tiny_clip, split)
    assert files() == 1
    data.frozen_features(make_clip(1), split)
    data.frozen_features(make_clip(precision="bf16"), split)
    assert files() == 3
    picture(split.source().folder / split.source().paths[0], 7, 7)  # another size
    for again in (split, data.load_dataset("dtd", tmp_path).test):
        after = data.frozen_features(tiny_clip, again)
        assert (after != before).any(dim=1).tolist() == [True] + [False] * 11


def test_features_go_on_after_an_interruption(tmp_path, tiny_clip, monkeypatch):
    make("food101", tmp_path, each={"train": 20, "val": 8, "test": 12})
    split = data.load_dataset("food101", tmp_path).train
    path = split.source().folder / split.source().paths[70]
    whole = path.read_bytes()
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="damaged image"):
        data.frozen_features(tiny_clip, split)
    path.write_bytes(whole)
    read, read_image = [], images.read_image
    monkeypatch.setattr(
        images, "read_image", lambda path, *a: read.append(path) or read_image(path, *a)
    )
    computed = data.frozen_features(tiny_clip, split)
    assert len(read) == len(split) - 64  # the first chunk was there
    expected = tiny_clip.encode_image(data.transform(tiny_clip, split.images()))
    torch.testing.assert_close(computed, expected, rtol=1e-4, atol=1e-5)


def test_a_damaged_cache_is_made_anew(tmp_path, tiny_clip):
    make("dtd", tmp_path)
    split = data.load_dataset("dtd", tmp_path).test
    expected = data.frozen_features(tiny_clip, split)
    (path,) = (tmp_path / "cache" / "features").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=f"damaged feature cache {path}"):
        again = data.frozen_features(tiny_clip, split)
    assert torch.equal(again, expected)


def test_features_need_space(tmp_path, tiny_clip, monkeypatch):
    make("dtd", tmp_path)
    usage = shutil._ntuple_diskusage(100, 99, 1)
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"has no space .* \$PROMPTKIT_CACHE"):
        data.frozen_features(tiny_clip, data.load_dataset("dtd", tmp_path).test)


# --- one's own images -----------------------------------------------------------------


def own_folder(root, *parts, classes=("red_kite", "barn owl"), each=5):
    for part in parts or [""]:
        for label, name in enumerate(classes):
            for n in range(each):
                picture(root / part / name / f"{n}.png", label, n)
    return root


def test_a_folder_of_classes(tmp_path):
    folder = own_folder(tmp_path / "my birds", each=10)
    (folder / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="50/20/30 % a class .* seed 1"):
        birds = data.load_dataset(str(folder))
    assert birds.name == name_of(folder) == "my_birds" and birds.classnames == [
        "barn owl",
        "red_kite",
    ]
    assert [len(s) for s in (birds.train, birds.val, birds.test)] == [10, 4, 6]
    everything = [
        path for s in (birds.train, birds.val, birds.test) for path in s.source().paths
    ]
    assert len(set(everything)) == 20 and everything[0].startswith("barn owl/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = data.load_dataset(folder)
    assert (
        again.train.source().paths == birds.train.source().paths
        and again.template == "a photo of a {}."
    )
    assert data.base_new(data.few_shot(birds, 2, 1))[0].train.labels.tolist() == [0, 0]


def test_a_folder_of_splits(tmp_path):
    folder = own_folder(tmp_path / "birds", "train", "val", "test")
    (folder / "extra").mkdir()
    birds = data.load_dataset(str(folder))
    assert [len(s) for s in (birds.train, birds.val, birds.test)] == [10, 10, 10]
    shutil.rmtree(folder / "val")
    with pytest.warns(
        UserWarning, match="20 % of each class's training images were set apart"
    ):
        birds = data.load_dataset(str(folder))
    assert [len(s) for s in (birds.train, birds.val, birds.test)] == [8, 2, 10]
    (folder / "test").rename(folder / "valid")
    with pytest.warns(UserWarning, match="the validation images serve for testing"):
        birds = data.load_dataset(str(folder))
    assert [len(s) for s in (birds.train, birds.val, birds.test)] == [8, 2, 10]
    (folder / "valid").rename(folder / "test")
    shutil.rmtree(folder / "train")
    (folder / "extra").rmdir()
    birds = data.load_dataset(str(folder))
    assert len(birds.train) == 0 and len(birds.test) == 10


def test_a_table_of_images(tmp_path):
    own_folder(tmp_path / "birds", each=4)
    rows = [
        f"birds/{name}/{n}.png,{name}"
        for name in ("red_kite", "barn owl")
        for n in range(4)
    ]
    (tmp_path / "birds.csv").write_text("path,label\n" + "\n".join(rows))
    with pytest.warns(UserWarning, match="50/20/30"):
        birds = data.load_dataset("birds.csv")
    assert birds.name == "birds" and birds.classnames == ["barn owl", "red_kite"]
    assert [len(s) for s in (birds.train, birds.val, birds.test)] == [4, 2, 2]
    parts = ["train", "train", "val", "test"] * 2
    rows = [f"{row},{part}" for row, part in zip(rows, parts, strict=True)]
    (tmp_path / "birds.csv").write_text("path,label,split\n" + "\n".join(rows))
    birds = data.load_dataset(str(tmp_path / "birds.csv"))
    assert birds.test.source().paths == ["birds/red_kite/3.png", "birds/barn owl/3.png"]
    assert birds.test.labels.tolist() == [1, 0] and birds.test.images()[0].shape[0] == 3


def test_known_names_come_before_folders(tmp_path):
    own_folder(tmp_path / "pets", each=10)
    assert data.load_dataset("pets").title == "Pets"
    with pytest.warns(UserWarning, match="50/20/30"):
        assert data.load_dataset("./pets").name == "my-pets"


def test_own_data_that_cannot_be_used(tmp_path):
    def fails(message, path):
        with pytest.raises(InputError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data.load_dataset(str(path))

    def table(text):
        (tmp_path / "t.csv").write_text(text)
        return tmp_path / "t.csv"

    fails("no folder or CSV file nowhere/else", "nowhere/else")
    fails("no folder or CSV file .*no.csv", "no.csv")
    fails("unknown dataset 'birdz'", "birdz")
    (tmp_path / "empty").mkdir()
    fails("empty holds no class folders with images", tmp_path / "empty")
    folder = own_folder(tmp_path / "birds")
    (folder / "wren").mkdir()
    fails("class folder .*wren holds no images", folder)
    picture(folder / "wren" / "1.png", 3)
    fails(
        "class 'wren' has 1 images; to divide them 50/20/30 it takes at least 4", folder
    )
    split = own_folder(tmp_path / "split", "train", "test", "val")
    picture(split / "test" / "wren" / "1.png", 3)
    fails("no training image has the label 'wren' of test/wren/1.png in test", split)
    fails("the CSV file .*t.csv is empty", table(""))
    fails("t.csv has no column 'label'", table("path,name\na,b\n"))
    fails("t.csv lists no images", table("path,label\n"))
    fails("line 3 has no label", table("path,label\na.png,x\nb.png,\n"))
    fails("line 2 has no path", table("path,label\n,x\n"))
    fails(
        "unknown split in line 2 of .*t.csv 'tset'; did you mean 'test'",
        table("path,label,split\na.png,x,tset\n"),
    )
    rows = "".join(f"birds/barn owl/{n}.png,owl\n" for n in range(4))
    fails("t.csv has one class only, 'owl'", table(f"path,label\n{rows}"))
    rows += "".join(f"birds/red_kite/{n}.png,kite\n" for n in range(4))
    fails(
        "the image is missing: .*9.png", table(f"path,label\n{rows}birds/9.png,owl\n")
    )
    (folder / "barn owl" / "0.png").write_bytes(b"")
    fails("the image is empty: .*barn owl/0.png", table(f"path,label\n{rows}"))
    (folder / "barn owl" / "0.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match="50/20/30"):
        owls = data.load_dataset(str(table(f"path,label\n{rows}")))
    with pytest.raises(InputError, match="damaged image .*barn owl/0.png"):
        [split.images() for split in (owls.train, owls.val, owls.test)]


# --- through the protocols ------------------------------------------------------------


@pytest.fixture
def quick(real_root, tiny_clip):  # noqa: F811
    """Options of a short run on the real folders that keeps nothing."""
    return dict(
        clip=tiny_clip,
        epochs=1,
        results=False,
        progress=False,
        root=str(real_root),
    )


def test_every_protocol_runs_on_real_folders(quick, monkeypatch):
    options = quick | dict(shots=2)
    context = dict(n_ctx=2, init="")
    (row,) = few_shot("coop", "eurosat", **context, **options).itertuples()
    assert (row.dataset, row.target, row.split) == ("eurosat", "eurosat", "all")
    rows = base_to_new(
        "coop", "oxford_flowers", profile="full", **context, **options
    )  # with augmented images
    assert list(rows["split"]) == ["base", "new", "hm"]
    rows = cross_dataset("coop", "imagenet", ["dtd", "ucf101"], **context, **options)
    assert list(rows["target"]) == ["imagenet", "dtd", "ucf101"]
    rows = domain_generalization("coop", "imagenet", **context, **options)
    assert list(rows["target"]) == ["imagenet", *SHIFTED]
    monkeypatch.setenv("PROMPTKIT_DATA", options.pop("root"))
    assert few_shot("coop", "eurosat", **context, **options)["value"][0] == row.value


def test_methods_that_read_images_read_files(quick):
    options = quick | dict(shots=1)
    for profile in ("mini", "full"):
        few_shot("maple", "dtd", profile=profile, depth=2, **options)
    few_shot("tpt", "dtd", views=3, **options)


def test_own_images_run_by_their_path(tmp_path, tiny_clip):
    own_folder(tmp_path / "birds", "train", "val", "test")
    (row,) = few_shot(
        "clip",
        str(tmp_path / "birds"),
        clip=tiny_clip,
        progress=False,
        results=tmp_path,
    ).itertuples()
    assert row.dataset == "birds" and 0 <= row.value <= 100
    assert list(tmp_path.glob("few-shot/clip-birds-*.json"))


def test_the_command_line_takes_paths_and_real_names(tmp_path):
    from promptkit.cli.values import datasets as _datasets

    own_folder(tmp_path / "my birds", "train", "test")
    assert _datasets("./my birds", "mini") == ["./my birds"] and _datasets(
        "my birds", "mini"
    ) == ["my birds"]
    assert _datasets("dtd, ./x.csv", "full") == ["dtd", "./x.csv"]
    assert _datasets("all", "full") == list(data.DATASETS) and _datasets(
        "all", "mini"
    ) == list(data.MINI_TASKS)
    with pytest.raises(InputError, match="did you mean 'dtd'"):
        _datasets("dtdd", "full")
