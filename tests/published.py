"""One folder a dataset, its lists written out by hand in the published formats, and
what they say.

Lines and rows have the form of the real files, odd names included. They are few: what
is checked is that each is read as it stands there.
"""

from pathlib import Path
from typing import NamedTuple

from real_data import picture


class Published(NamedTuple):
    """A folder below the data root: its files, and what must be read from them.

    Attributes:
        files: {path: text}.
        classnames: by label.
        images: the folder that the paths of `parts` start from.
        parts: {split: [(path, label), ...]}.
        others: images and other files that lie there and count for nothing.
        source_rows: of a shifted version, its classes among ImageNet's.
    """

    folder: str
    files: dict
    classnames: list
    images: str
    parts: dict
    others: tuple = ()
    source_rows: list | None = None


CALTECH = """{
    "train": [
        [
            "Faces/image_0345.jpg",
            0,
            "face"
        ],
        [
            "accordion/image_0001.jpg",
            3,
            "accordion"
        ],
        ["Leopards/image_0084.jpg", 1, "leopard"],
        ["Motorbikes/image_0798.jpg", 2, "motorbike"],
        ["water_lilly/image_0002.jpg", 5, "water_lilly"],
        ["airplanes/image_0001.jpg", 4, "airplane"]
    ],
    "val": [["airplanes/image_0800.jpg", 4, "airplane"]],
    "test": [
        ["water_lilly/image_0031.jpg", 5, "water_lilly"],
        ["Faces/image_0001.jpg", 0, "face"]
    ]
}"""
PETS = """{
    "train": [["Abyssinian_1.jpg", 0, "abyssinian"],
              ["saint_bernard_108.jpg", 2, "saint_bernard"],
              ["american_pit_bull_terrier_191.jpg", 1, "american_pit_bull_terrier"]],
    "val": [["Abyssinian_103.jpg", 0, "abyssinian"]],
    "test": [["saint_bernard_1.jpg", 2, "saint_bernard"],
             ["Abyssinian_201.jpg", 0, "abyssinian"]]
}"""
CARS = """{
    "train": [["cars_train/00001.jpg", 0, "2000 AM General Hummer SUV"],
              ["cars_train/08144.jpg", 1, "2012 Ram C/V Cargo Van Minivan"],
              ["cars_train/00031.jpg", 2, "2012 smart fortwo Convertible"]],
    "val": [["cars_train/00002.jpg", 1, "2012 Ram C/V Cargo Van Minivan"]],
    "test": [["cars_test/00001.jpg", 2, "2012 smart fortwo Convertible"],
             ["cars_test/08041.jpg", 0, "2000 AM General Hummer SUV"]]
}"""
FLOWERS = """{
    "train": [["image_06734.jpg", 0, "pink primrose"],
              ["image_05087.jpg", 1, "hard-leaved pocket orchid"],
              ["image_03311.jpg", 2, "colt's foot"],
              ["image_06589.jpg", 3, "bird of paradise"]],
    "val": [["image_06735.jpg", 0, "pink primrose"]],
    "test": [["image_03309.jpg", 2, "colt's foot"],
             ["image_05090.jpg", 1, "hard-leaved pocket orchid"]]
}"""
FOOD = """{
    "train": [["apple_pie/1005649.jpg", 0, "apple_pie"],
              ["cr\\u00e8me_br\\u00fbl\\u00e9e/9.jpg", 1,
               "cr\\u00e8me_br\\u00fbl\\u00e9e"],
              ["macaroni_and_cheese/1051.jpg", 2, "macaroni_and_cheese"]],
    "val": [["apple_pie/1011328.jpg", 0, "apple_pie"]],
    "test": [["macaroni_and_cheese/999047.jpg", 2, "macaroni_and_cheese"]]
}"""
SUN = """{
    "train": [["a/abbey/sun_aakbdcgfpksytcwj.jpg", 0, "abbey"],
              ["a/airplane_cabin/sun_abckqrfhcxjfuzwh.jpg", 1, "airplane_cabin"],
              ["c/church/outdoor/sun_aaehgobogpvxlkyn.jpg", 3, "outdoor church"],
              ["c/church/indoor/sun_aaajcxtcmqwlkxvq.jpg", 2, "indoor church"]],
    "val": [["a/abbey/sun_aaoeotnlqzbmvgbd.jpg", 0, "abbey"]],
    "test": [["c/church/indoor/sun_bxzzzabvrgrjmvzd.jpg", 2, "indoor church"]]
}"""
DTD = """{
    "train": [["banded/banded_0002.jpg", 0, "banded"],
              ["polka-dotted/polka-dotted_0181.jpg", 1, "polka-dotted"],
              ["zigzagged/zigzagged_0065.jpg", 2, "zigzagged"]],
    "val": [["zigzagged/zigzagged_0001.jpg", 2, "zigzagged"]],
    "test": [["polka-dotted/polka-dotted_0001.jpg", 1, "polka-dotted"]]
}"""
EUROSAT = """{
    "train": [["AnnualCrop/AnnualCrop_2195.jpg", 0, "Annual Crop Land"],
              ["Forest/Forest_1.jpg", 1, "Forest"],
              ["HerbaceousVegetation/HerbaceousVegetation_1.jpg", 2,
               "Herbaceous Vegetation Land"],
              ["Highway/Highway_2500.jpg", 3, "Highway or Road"],
              ["SeaLake/SeaLake_1.jpg", 4, "Sea or Lake"]],
    "val": [["Forest/Forest_3000.jpg", 1, "Forest"]],
    "test": [["SeaLake/SeaLake_10.jpg", 4, "Sea or Lake"],
             ["Highway/Highway_3.jpg", 3, "Highway or Road"]]
}"""
UCF = """{
    "train": [["Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg", 0, "Apply_Eye_Makeup"],
              ["Handstand_Pushups/v_HandStandPushups_g08_c01.jpg", 1,
               "Handstand_Pushups"],
              ["Yo_Yo/v_YoYo_g25_c05.jpg", 2, "Yo_Yo"]],
    "val": [["Yo_Yo/v_YoYo_g08_c01.jpg", 2, "Yo_Yo"]],
    "test": [["Handstand_Pushups/v_HandStandPushups_g01_c01.jpg", 1,
              "Handstand_Pushups"]]
}"""
WNIDS = """\
n01440764 tench
n01443537 goldfish
n01498041 stingray
n02012849 crane bird
n03126707 construction crane
n03710721 one-piece bathing suit
n03773504 missile
n04008634 missile
n15075141 toilet paper
"""
V2 = "imagenetv2-matched-frequency-format-val"

PUBLISHED = {
    "caltech101": Published(
        "caltech-101",
        {"split_zhou_Caltech101.json": CALTECH},
        ["face", "leopard", "motorbike", "accordion", "airplane", "water_lilly"],
        "101_ObjectCategories",
        {
            "train": [
                ("Faces/image_0345.jpg", 0),
                ("accordion/image_0001.jpg", 3),
                ("Leopards/image_0084.jpg", 1),
                ("Motorbikes/image_0798.jpg", 2),
                ("water_lilly/image_0002.jpg", 5),
                ("airplanes/image_0001.jpg", 4),
            ],
            "val": [("airplanes/image_0800.jpg", 4)],
            "test": [("water_lilly/image_0031.jpg", 5), ("Faces/image_0001.jpg", 0)],
        },
        ("101_ObjectCategories/BACKGROUND_Google/image_0001.jpg",),
    ),
    "oxford_pets": Published(
        "oxford_pets",
        {"split_zhou_OxfordPets.json": PETS},
        ["abyssinian", "american_pit_bull_terrier", "saint_bernard"],
        "images",
        {
            "train": [
                ("Abyssinian_1.jpg", 0),
                ("saint_bernard_108.jpg", 2),
                ("american_pit_bull_terrier_191.jpg", 1),
            ],
            "val": [("Abyssinian_103.jpg", 0)],
            "test": [("saint_bernard_1.jpg", 2), ("Abyssinian_201.jpg", 0)],
        },
        ("images/Abyssinian_100.mat",),
    ),
    "stanford_cars": Published(
        "stanford_cars",
        {"split_zhou_StanfordCars.json": CARS},
        [
            "2000 AM General Hummer SUV",
            "2012 Ram C/V Cargo Van Minivan",
            "2012 smart fortwo Convertible",
        ],
        ".",
        {
            "train": [
                ("cars_train/00001.jpg", 0),
                ("cars_train/08144.jpg", 1),
                ("cars_train/00031.jpg", 2),
            ],
            "val": [("cars_train/00002.jpg", 1)],
            "test": [("cars_test/00001.jpg", 2), ("cars_test/08041.jpg", 0)],
        },
    ),
    "oxford_flowers": Published(
        "oxford_flowers",
        {"split_zhou_OxfordFlowers.json": FLOWERS},
        [
            "pink primrose",
            "hard-leaved pocket orchid",
            "colt's foot",
            "bird of paradise",
        ],
        "jpg",
        {
            "train": [
                ("image_06734.jpg", 0),
                ("image_05087.jpg", 1),
                ("image_03311.jpg", 2),
                ("image_06589.jpg", 3),
            ],
            "val": [("image_06735.jpg", 0)],
            "test": [("image_03309.jpg", 2), ("image_05090.jpg", 1)],
        },
    ),
    "food101": Published(
        "food-101",
        {"split_zhou_Food101.json": FOOD},
        ["apple_pie", "crème_brûlée", "macaroni_and_cheese"],
        "images",
        {
            "train": [
                ("apple_pie/1005649.jpg", 0),
                ("crème_brûlée/9.jpg", 1),
                ("macaroni_and_cheese/1051.jpg", 2),
            ],
            "val": [("apple_pie/1011328.jpg", 0)],
            "test": [("macaroni_and_cheese/999047.jpg", 2)],
        },
    ),
    "fgvc_aircraft": Published(
        "fgvc_aircraft",
        {
            "variants.txt": "707-320\nA340-300\nCessna 172\nF-16A/B\nF/A-18\n",
            "images_variant_train.txt": (
                "1025794 707-320\n0481847 F/A-18\n2192707 Cessna 172\n"
                "0062765 A340-300\n1240561 F-16A/B\n"
            ),
            "images_variant_val.txt": "1025800 F-16A/B\n",
            "images_variant_test.txt": "1514522 707-320\n0747566 Cessna 172\n",
        },
        ["707-320", "A340-300", "Cessna 172", "F-16A/B", "F/A-18"],
        "images",
        {
            "train": [
                ("1025794.jpg", 0),
                ("0481847.jpg", 4),
                ("2192707.jpg", 2),
                ("0062765.jpg", 1),
                ("1240561.jpg", 3),
            ],
            "val": [("1025800.jpg", 3)],
            "test": [("1514522.jpg", 0), ("0747566.jpg", 2)],
        },
        ("images_box.txt", "families.txt"),
    ),
    "sun397": Published(
        "sun397",
        {"split_zhou_SUN397.json": SUN},
        ["abbey", "airplane_cabin", "indoor church", "outdoor church"],
        "SUN397",
        {
            "train": [
                ("a/abbey/sun_aakbdcgfpksytcwj.jpg", 0),
                ("a/airplane_cabin/sun_abckqrfhcxjfuzwh.jpg", 1),
                ("c/church/outdoor/sun_aaehgobogpvxlkyn.jpg", 3),
                ("c/church/indoor/sun_aaajcxtcmqwlkxvq.jpg", 2),
            ],
            "val": [("a/abbey/sun_aaoeotnlqzbmvgbd.jpg", 0)],
            "test": [("c/church/indoor/sun_bxzzzabvrgrjmvzd.jpg", 2)],
        },
    ),
    "dtd": Published(
        "dtd",
        {"split_zhou_DescribableTextures.json": DTD},
        ["banded", "polka-dotted", "zigzagged"],
        "images",
        {
            "train": [
                ("banded/banded_0002.jpg", 0),
                ("polka-dotted/polka-dotted_0181.jpg", 1),
                ("zigzagged/zigzagged_0065.jpg", 2),
            ],
            "val": [("zigzagged/zigzagged_0001.jpg", 2)],
            "test": [("polka-dotted/polka-dotted_0001.jpg", 1)],
        },
        ("imdb/imdb.mat", "labels/test1.txt", "images/waffled/.directory"),
    ),
    "eurosat": Published(
        "eurosat",
        {"split_zhou_EuroSAT.json": EUROSAT},
        [
            "Annual Crop Land",
            "Forest",
            "Herbaceous Vegetation Land",
            "Highway or Road",
            "Sea or Lake",
        ],
        "2750",
        {
            "train": [
                ("AnnualCrop/AnnualCrop_2195.jpg", 0),
                ("Forest/Forest_1.jpg", 1),
                ("HerbaceousVegetation/HerbaceousVegetation_1.jpg", 2),
                ("Highway/Highway_2500.jpg", 3),
                ("SeaLake/SeaLake_1.jpg", 4),
            ],
            "val": [("Forest/Forest_3000.jpg", 1)],
            "test": [("SeaLake/SeaLake_10.jpg", 4), ("Highway/Highway_3.jpg", 3)],
        },
    ),
    "ucf101": Published(
        "ucf101",
        {"split_zhou_UCF101.json": UCF},
        ["Apply_Eye_Makeup", "Handstand_Pushups", "Yo_Yo"],
        "UCF-101-midframes",
        {
            "train": [
                ("Apply_Eye_Makeup/v_ApplyEyeMakeup_g08_c01.jpg", 0),
                ("Handstand_Pushups/v_HandStandPushups_g08_c01.jpg", 1),
                ("Yo_Yo/v_YoYo_g25_c05.jpg", 2),
            ],
            "val": [("Yo_Yo/v_YoYo_g08_c01.jpg", 2)],
            "test": [("Handstand_Pushups/v_HandStandPushups_g01_c01.jpg", 1)],
        },
    ),
    "imagenet": Published(
        "imagenet",
        {"classnames.txt": WNIDS},
        ["crane bird", "construction crane", "missile", "missile"],
        "images",
        {
            "train": [
                ("train/n02012849/n02012849_10018.JPEG", 0),
                ("train/n02012849/n02012849_9.JPEG", 0),
                ("train/n03126707/n03126707_1.JPEG", 1),
                ("train/n03773504/n03773504_3.JPEG", 2),
                ("train/n04008634/n04008634_2.JPEG", 3),
            ],
            "val": [
                ("val/n02012849/ILSVRC2012_val_00002138.JPEG", 0),
                ("val/n03126707/ILSVRC2012_val_00000293.JPEG", 1),
                ("val/n03773504/ILSVRC2012_val_00049999.JPEG", 2),
                ("val/n04008634/ILSVRC2012_val_00000001.JPEG", 3),
            ],
            "test": [
                ("val/n02012849/ILSVRC2012_val_00002138.JPEG", 0),
                ("val/n03126707/ILSVRC2012_val_00000293.JPEG", 1),
                ("val/n03773504/ILSVRC2012_val_00049999.JPEG", 2),
                ("val/n04008634/ILSVRC2012_val_00000001.JPEG", 3),
            ],
        },
        ("images/.DS_Store", "images/val/._n02012849", "images/train/.cache/x.JPEG"),
    ),
    "imagenetv2": Published(
        "imagenetv2",
        {"classnames.txt": "".join(f"n{n:08d} name {n}\n" for n in range(11))},
        [f"name {n}" for n in range(11)],
        V2,
        {
            "train": [],
            "val": [],
            "test": [
                ("0/0af3f1b55de791c4144e2fb6d7dfe96dfc22d3fc.jpeg", 0),
                ("2/7a3e4ef6b5b4d0d7b6a9f0b8b5b1c9d2b0f6e9aa.jpeg", 2),
                ("10/2fd5d5c5b7f4f3a4b6d0e9d8c7b6a5f4e3d2c1b0.jpeg", 10),
            ],
        },
        source_rows=list(range(11)),
    ),
    "imagenet_sketch": Published(
        "imagenet-sketch",
        {"classnames.txt": WNIDS},
        ["tench", "toilet paper"],
        "images",
        {
            "train": [],
            "val": [],
            "test": [
                ("n01440764/sketch_0.JPEG", 0),
                ("n01440764/sketch_10.JPEG", 0),
                ("n15075141/sketch_5.JPEG", 1),
            ],
        },
        source_rows=[0, 8],
    ),
    "imagenet_a": Published(
        "imagenet-adversarial",
        {"classnames.txt": WNIDS, "imagenet-a/README.txt": "not an image\n"},
        ["stingray", "missile"],
        "imagenet-a",
        {
            "train": [],
            "val": [],
            "test": [
                ("n01498041/0.000116_digital clock _ digital clock_0.865662.jpg", 0),
                ("n04008634/0.016394_jeep _ jeep_0.40837958.jpg", 1),
            ],
        },
        source_rows=[2, 7],
    ),
    "imagenet_r": Published(
        "imagenet-rendition",
        {"classnames.txt": WNIDS, "imagenet-r/README.txt": "not an image\n"},
        ["goldfish", "missile"],
        "imagenet-r",
        {
            "train": [],
            "val": [],
            "test": [
                ("n01443537/art_0.jpg", 0),
                ("n01443537/videogame_12.jpg", 0),
                ("n03773504/toy_3.jpg", 1),
            ],
        },
        source_rows=[1, 6],
    ),
}


def publish(name: str, root: Path) -> Published:
    """Write a dataset's folder below a root; an image's colour tells its label."""
    what = PUBLISHED[name]
    folder = root / what.folder
    for path, content in what.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")
    for items in what.parts.values():
        for n, (path, label) in enumerate(items):
            picture(folder / what.images / path, label, n)
    for path in what.others:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    return what
