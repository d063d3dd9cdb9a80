"""The eleven tasks of the mini world and the four shifts of its main set: their
classes, templates and images.
"""

from dataclasses import dataclass

from promptkit.data.world import BRANDS, FAMILIES

PLAIN = "a photo of a {}."
ENSEMBLE = (
    PLAIN,
    "itap of a {}.",
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a close-up photo of a {}.",
    "a {}.",
)


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    template: str
    classes: tuple  # (family, label) pairs, in class order

    @property
    def classnames(self) -> list[str]:
        return [FAMILIES[family].names[label] for family, label in self.classes]


def _of(family, labels):
    return tuple((family, i) for i in labels)


_CARS = range(len(BRANDS) * 5)
_MIX = [
    _of("pet", range(20, 30)),
    _of("flower", range(24, 32)),
    _of("dish", range(20, 28)),
    _of("car", [i for i in _CARS if i % 5 == 4]),
    _of("thing", range(2, 34, 4)),
]
_MAIN = tuple(
    c for half in (0, 1) for group in _MIX for c in group[half::2]
)  # both halves hold every family

TASKS = {
    task.name: task
    for task in (
        Task("mini", "Mini (main set)", PLAIN, _MAIN),
        Task("objects", "Objects", PLAIN, _of("thing", range(36))),
        Task("pets", "Pets", "a photo of a {}, a type of pet.", _of("pet", range(20))),
        Task("cars", "Cars", "a photo of a {}, a type of car.",
             _of("car", [i for k in (0, 1, 2, 3) for i in _CARS if i % 5 == k])),
        Task("flowers", "Flowers", "a photo of a {}, a type of flower.",
             _of("flower", range(24))),
        Task("food", "Food", "a photo of {}, a type of food.", _of("dish", range(20))),
        Task("planes", "Planes", "a photo of a {}, a type of aircraft.",
             _of("plane", range(20))),
        Task("scenes", "Scenes", "a photo of a {} scene.", _of("scene", range(16))),
        Task("textures", "Textures", "a photo of a {} texture.",
             _of("texture", range(20))),
        Task("sat", "Satellite", "a satellite photo of {}.",
             _of("satellite", range(10))),
        Task("actions", "Actions", "a photo of a person {}.",
             _of("action", range(20))),
    )
}  # fmt: skip
MINI_TASKS = tuple(TASKS)

# How the images of each shift of the main set differ from the task's own.
SHIFTS = {
    "mini-v2": (
        "Mini-V2 (resampled)",
        dict(scale=(0.6, 1.0), clutter_range=(0, 3), deviation=0.12, strength=1.5),
    ),
    "mini-sketch": ("Mini-Sketch", dict(style="pencil")),
    "mini-a": (
        "Mini-A (hard)",
        dict(scale=(0.5, 0.9), clutter_range=(1, 4), hard=True),
    ),
    "mini-r": ("Mini-R (renditions)", dict(style="print")),
}

# The objects with another object's name on a plate: what an image tower that reads
# falls for.
WORDS = "objects-words"


def draw_options(task: str) -> dict:
    """What a task's images ask of `world.draw` beyond its defaults."""
    if task == "objects":
        return dict(scale=(0.85, 1.0), clutter_range=(0, 0))
    return {"actions": dict(scale=(0.8, 1.0)), "sat": dict(strength=0.6)}.get(task, {})


def facts(task: Task) -> dict[str, list[str]]:
    """Descriptive phrases a class, as captions of the world use them: {class name:
    ["pointy ears", ...]}.
    """
    return {
        FAMILIES[family].names[label]: (
            FAMILIES[family].facts(FAMILIES[family].bundles[label])
        )
        for family, label in task.classes
    }


def all_texts() -> list[str]:
    """Every template, class name and description of every task."""
    texts = [task.template for task in TASKS.values()] + list(ENSEMBLE)
    for task in TASKS.values():
        for name, phrases in facts(task).items():
            texts += [name, *phrases]
    return texts
