"""What a paper ran itself: the backbone, the shots and the runs behind each recipe.

A method says so in its class attribute ``published``, one entry a protocol, and the
book's page *Recipes and their sources* is made from it.
"""

from dataclasses import dataclass, replace

from promptkit.errors import unknown
from promptkit.recipe import PROTOCOLS, TRANSFER


@dataclass(frozen=True)
class Published:
    """The run that a recipe follows, in one protocol.

    Args:
        backbones: that it was published with, as open_clip calls them; empty: none, as
            for methods without such a run.
        shots: images a class that it was published with; empty: it needs none.
        source: the repository, and which of its runs the settings are from.
        notes: what the recipe here takes, and what else is to know.
        extrapolation: no such run was published: the settings are those of `source`,
            carried over.
    """

    backbones: tuple[str, ...]
    shots: tuple[int, ...]
    source: str
    notes: str = ""
    extrapolation: bool = False

    def beside(self, clip: str, shots: int) -> str:
        """How a run with another backbone or number of shots differs; "" if it does
        not.

        Args:
            clip: name of the backbone, such as "ViT-B-16".
            shots: images a class.
        """
        plain = clip.removesuffix("-quickgelu")
        if self.extrapolation:
            return (
                f"no such run was published: settings carried over from {self.source}"
            )
        unusual = [plain] if self.backbones and plain not in self.backbones else []
        if self.shots and shots not in self.shots:
            unusual.append(f"{shots} shots")
        if not unusual:
            return ""
        ran = ", ".join(self.backbones) or "any backbone"
        ran += f" and {', '.join(map(str, self.shots))} shots" if self.shots else ""
        return f"published with {ran} ({self.source}), not with {' and '.join(unusual)}"


def usual(
    source: str,
    notes: str = "",
    *,
    backbones: tuple[str, ...] = ("ViT-B-16",),
    shots: tuple[int, ...] = (16,),
    extrapolation: bool = False,
) -> Published:
    """A run with ViT-B/16 and 16 images a class, as most papers have it, or with what
    is given.
    """
    return Published(backbones, shots, source, notes, extrapolation)


# Datasets as CoOp's code and its copies call them.
DATASETS = {
    "ImageNet": "imagenet",
    "Caltech101": "caltech101",
    "OxfordPets": "oxford_pets",
    "StanfordCars": "stanford_cars",
    "OxfordFlowers": "oxford_flowers",
    "Food101": "food101",
    "FGVCAircraft": "fgvc_aircraft",
    "SUN397": "sun397",
    "DescribableTextures": "dtd",
    "EuroSAT": "eurosat",
    "UCF101": "ucf101",
    "ImageNetV2": "imagenetv2",
    "ImageNetSketch": "imagenet_sketch",
    "ImageNetA": "imagenet_a",
    "ImageNetR": "imagenet_r",
}


def dataset_of(official: str) -> str:
    """Our name of a dataset from its official one, such as "OxfordPets".

    Raises:
        InputError: there is no such dataset.
    """
    if official not in DATASETS:
        raise unknown("official dataset", official, DATASETS)
    return DATASETS[official]


def everywhere(published: Published) -> dict[str, Published]:
    """The same run behind the recipe of every protocol."""
    return dict.fromkeys(PROTOCOLS, published)


def transfer(published: Published, shifts_alone=False) -> dict[str, Published]:
    """The same run behind the recipes of both protocols that train on ImageNet.

    Args:
        shifts_alone: other datasets than its shifted versions were never tested.
    """
    found = dict.fromkeys(TRANSFER, published)
    if shifts_alone:
        found["cross-dataset"] = replace(published, extrapolation=True)
    return found


def table(methods: dict, protocols=PROTOCOLS) -> str:
    """A Markdown section a method: for each protocol the published run and what the
    recipe here takes.

    Args:
        methods: registered methods by name.
    """
    sections = []
    for cls in methods.values():
        rows = [
            "| protocol | backbones | shots | settings from | here |",
            "| :-- | :-- | :-- | :-- | :-- |",
        ]
        for protocol in protocols:
            run = getattr(cls, "published", {}).get(protocol)
            if run is None:
                continue
            here = f"**Extrapolation.** {run.notes}" if run.extrapolation else run.notes
            cells = [
                protocol,
                ", ".join(run.backbones) or "—",
                ", ".join(map(str, run.shots)) or ("none" if run.backbones else "—"),
                run.source,
                here,
            ]
            rows.append("| " + " | ".join(cells) + " |")
        sections.append(f"## {cls.title}\n\n" + "\n".join(rows))
    return "\n\n".join(sections)
