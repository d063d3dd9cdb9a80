"""Sentences about classes, from the files that papers come with.

All of them are one JSON object a dataset, UTF-8, ``{class: [text, ...]}``:

- CuPL's prompts of GPT-3, which ProText reads: 10 to 90 sentences a class.
- The visual descriptors of Menon & Vondrick, which WaffleCLIP questions: a few phrases
  such as "four legs". A class may have none.
- CoPrompt's sentences, from CaFo: 10 or 50, as many for each class; AWT's: 50 or more.
- KAPT's knowledge: ``{class: "a paragraph"}``.

Keys differ from the benchmark's class names in case and underscores, their order is
arbitrary, and some describe no class: they are matched here once, for every method.
"""

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from promptkit.errors import InputError
from promptkit.files import read_json, same, short, some, trimmed
from promptkit.prompts import Template

# What files call the benchmark's datasets, once the words in DECORATION are gone.
CALLED = {
    "imagenet": ("cupl_image",),
    "caltech101": ("cal", "caltech", "caltech_101"),
    "oxford_pets": ("pets", "oxfordpets", "pet"),
    "stanford_cars": ("cars", "stanfordcars", "car"),
    "oxford_flowers": ("flower", "flowers", "flowers102", "oxfordflowers"),
    "food101": ("food", "food_101"),
    "fgvc_aircraft": ("airplane", "aircraft", "fgvc", "fgvcaircraft"),
    "sun397": ("sun",),
    "dtd": ("texture", "textures", "describabletextures"),
    "ucf101": ("ucf",),
    "imagenetv2": ("imagenet_v2",),
    "imagenet_sketch": ("imagenetsketch",),
    "imagenet_a": ("imageneta",),
    "imagenet_r": ("imagenetr",),
}
DECORATION = r"^descriptors_|_prompts?(_full)?$|_descriptions?$"
SAME_CLASSES = ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


def read_descriptions(path, empty: bool = False) -> dict[str, list[str]]:
    """Sentences by class name, from a JSON file {"heron": ["a grey bird", ...], ...},
    or {"heron": "a grey bird"}, in the order of the file.

    Args:
        empty: let a class have no sentences, as in files of visual descriptors.

    Raises:
        InputError: the file cannot be read, is not in UTF-8, or holds something else;
            the message names the class.
    """
    return descriptions_of(read_json(path), path, empty)


def file_in(folder, dataset: str) -> Path | None:
    """The JSON file about a dataset in a folder of such files, by the names that the
    papers' collections have for it; None if there is none.

    The shifted versions of ImageNet have its classes, and its file will do.

    Raises:
        InputError: several files are about it.
    """
    names = {same(name) for name in (dataset, *CALLED.get(dataset, ()))}
    files = sorted(Path(folder).expanduser().glob("*.json"))
    found = [
        path
        for path in files
        if same(re.sub(DECORATION, "", path.stem.lower())) in names
    ]
    if len(found) > 1:
        raise InputError(
            f"{folder} has {some([path.name for path in found])} about {dataset}: name"
            " the file that is meant"
        )
    if not found and dataset in SAME_CLASSES:
        return file_in(folder, "imagenet")
    return found[0] if found else None


def descriptions_of(
    content, where="descriptions", empty: bool = False
) -> dict[str, list[str]]:
    """Sentences by class name, checked: {class: [sentence, ...]}.

    Raises:
        InputError: it is something else, or names a class twice.
    """
    if not isinstance(content, dict) or not content:
        raise InputError(
            f'{where} must be a JSON object {{"class": ["a sentence", ...], ...}}, not'
            f" {short(content)}"
        )
    found, seen = {}, {}
    for name, sentences in content.items():
        sentences = [sentences] if isinstance(sentences, str) else sentences
        if empty and isinstance(sentences, list | tuple):  # also [""]
            blank = [text for text in sentences if text == ""]
            sentences = sentences if len(blank) < len(sentences) else []
        fits = isinstance(name, str) and isinstance(sentences, list | tuple)
        if (
            not fits
            or not (sentences or empty)
            or not all(isinstance(text, str) and trimmed(text) for text in sentences)
        ):
            raise InputError(
                f"{where}: {name!r} must have a list of sentences, not"
                f" {short(sentences)}"
            )
        if seen.setdefault(same(trimmed(name)), name) != name:
            raise InputError(
                f"{where} has {seen[same(trimmed(name))]!r} and {name!r}, which are the"
                " same class"
            )
        found[trimmed(name)] = [" ".join(text.split()) for text in sentences]
    return found


def descriptions_for(
    given, classnames: list[str], where="descriptions"
) -> dict[str, list[str]]:
    """Sentences for each class of a dataset, by its own name there.

    Names are compared without regard to case, underscores standing for blanks. What
    belongs to no class is left out, with a warning.

    Args:
        given: a file as in :func:`read_descriptions`, or a dict like its content.

    Raises:
        InputError: as in :func:`read_descriptions`; a class has no sentences.
    """
    if isinstance(given, str | os.PathLike):
        given, where = read_descriptions(given), given
    else:
        given = descriptions_of(given, where)
    by_name = {same(name): sentences for name, sentences in given.items()}
    missing = [name for name in classnames if same(name) not in by_name]
    if missing:
        raise InputError(
            f"{where}: no sentences for the class {some(missing)}; the file describes"
            f" {some(list(given))}"
        )
    wanted = {same(name) for name in classnames}
    unknown = [name for name in given if same(name) not in wanted]
    if unknown:
        warnings.warn(
            f"{where} also describes what is no class here: {some(unknown)}",
            stacklevel=3,
        )
    return {name: by_name[same(name)] for name in classnames}


# --- for methods ----------------------------------------------------------------------


def sentences_of(dataset) -> dict[str, list[str]]:
    """What a dataset says of its classes, in sentences: of the mini world, whose facts
    are phrases, one with each phrase and one with all of them.
    """
    if dataset is None:
        return {}
    if dataset.world != "mini":
        return dict(dataset.descriptions)
    said = {}
    for name, phrases in dataset.descriptions.items():
        start = dataset.template.replace("{}", name).rstrip(".")
        parts = [*phrases, " and ".join(phrases)] if len(phrases) > 1 else phrases
        said[name] = [f"{start} with {part}." for part in parts]
    return said


def linked(descriptor: str) -> str:
    """A visual descriptor as a clause, by Menon & Vondrick's rule: its first letters
    decide, whatever they begin.
    """
    if descriptor.startswith(("a", "used")):
        return f"which is {descriptor}"
    if descriptor.startswith(("has", "often", "typically", "may", "can")):
        return f"which {descriptor}"
    return f"which has {descriptor}"


def key_of(said: dict, classnames: list[str]) -> list[str | None]:
    """For each class the key of ``said`` that names it, None if none does."""
    keys = {same(key): key for key in said}
    return [keys.get(same(name)) for name in classnames]


def said_of(said: dict, classnames: list[str]) -> list:
    """For each class what ``said`` holds of it, None if nothing."""
    return [said.get(key) for key in key_of(said, classnames)]


def by_class(ours: dict, official: dict, classnames: list[str], *names: str) -> dict:
    """Hyperparameters of which some ``names`` may be lists in the order of the classes,
    as some configurations write them, as {class: texts}; behind them those of further
    classes, "new_classnames", as ``new_NAME``.

    Args:
        ours: hyperparameters by our names.
        official: what the configuration holds.

    Raises:
        InputError: a list is not as long as its classes, or two classes of one name
            have different texts.
    """
    new = official.get("new_classnames") or []
    found = dict(ours)
    for name in names:
        if not isinstance(ours.get(name), list):
            continue
        found[name] = {}
        lists = {name: classnames}
        if official.get(f"new_{name}"):
            lists[f"new_{name}"] = new
        for key, classes in lists.items():
            texts = ours[name] if key == name else official[key]
            if len(texts) != len(classes):
                raise InputError(
                    f"{key} has texts for {len(texts)} classes, and there are"
                    f" {len(classes)}: give one item a class"
                )
            for classname, of_class in zip(classes, texts, strict=True):
                if found[name].setdefault(classname, of_class) != of_class:
                    raise InputError(
                        f"{name} differ for two classes that are both called"
                        f" {classname!r}: texts are found by the class name here"
                    )
    return found


def nothing_said(spec: str, classnames: list[str]) -> InputError:
    """The error for a method that learns from sentences, of classes without any."""
    return InputError(
        f"{spec} learns from sentences, and there are none about the classes"
        f" {some(classnames)}: load the dataset with descriptions=FILE, or pass"
        " descriptions={class: [sentence, ...]}"
    )


def as_many(said: dict[str, list[str]], n: int | None = None) -> dict[str, list[str]]:
    """The same number of sentences for each class: the first n, over again where there
    are fewer; None: as many as the class with the fewest has.

    Raises:
        InputError: a class has none.
    """
    none = [name for name, texts in said.items() if not texts]
    if none:
        raise InputError(
            f"there are no sentences about {some(none)}: pass descriptions={{class"
            " name: [sentence, ...]} for all classes"
        )
    n = min(map(len, said.values()), default=0) if n is None else n
    return {
        name: [texts[i % len(texts)] for i in range(n)] for name, texts in said.items()
    }


@torch.no_grad()
def sentence_features(clip, texts: list[str]) -> Tensor:
    """Features of sentences, (N, E), normalised. What is longer than the text tower
    reads is cut, EOT staying its last token, as all published loaders do it.
    """
    room = clip.context_length - 2  # SOS and EOT
    distinct = list(dict.fromkeys(texts))
    long = {text for text in distinct if len(clip.encode(text)) > room}
    fits = [text for text in distinct if text not in long]
    found = dict(zip(fits, clip.encode_text(fits), strict=True)) if fits else {}
    for text in long:
        prompt = Template(clip, ["cut"], [[text]], truncate=True)()
        found[text] = clip.text(prompt)[0, 0]
    return F.normalize(torch.stack([found[text] for text in texts]), dim=-1)


@dataclass(frozen=True)
class Texts:
    """N sentences to train on, in the place of a split of images.

    Attributes:
        sentences: the texts.
        labels: (N,) positions of the classes that they describe.
    """

    sentences: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.sentences)

    def texts(self, indices: Tensor) -> list[str]:
        """Those at these positions."""
        return [self.sentences[i] for i in indices.tolist()]

    def take(self, indices) -> "Texts":
        """Those at ``indices`` alone."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return Texts(self.texts(indices), self.labels[indices])
