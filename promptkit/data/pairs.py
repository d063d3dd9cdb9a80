"""The pairs of images and captions that the mini CLIPs are pre-trained on, drawn from
the mini world.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from promptkit.data.tasks import all_texts
from promptkit.data.world import FAMILIES, Picture, caption, draw, random_generator
from promptkit.files import cache_folder, write_atomically

WORLD_SEED = 20210303
# Families that also appear as sketches and renditions.
STYLED = ("thing", "pet", "car", "flower", "dish", "plane")
NAMING, OTHER = 3, 5  # captions of an image that name its class, and that do not
LONGEST = 48  # tokens of a caption that are kept


def _draw_one(index: int) -> tuple[np.ndarray, Picture]:
    """Image number `index` of the pre-training world, a pure function of its number."""
    rng = random_generator(WORLD_SEED, index)
    families = list(FAMILIES.values())
    family = families[
        rng.choice(
            len(families),
            p=np.array([f.share for f in families]) / sum(f.share for f in families),
        )
    ]
    unnamed = family.attributes and rng.random() < 0.35
    label = -1 if unnamed else int(rng.integers(len(family.names)))
    style = (
        ("sketch", "rendition", "")[min(2, int(rng.random() / 0.055))]
        if family.name in STYLED
        else ""
    )
    return draw(
        family.name,
        label,
        rng,
        deviation=0.12,
        scale=(0.6, 1.0),
        clutter_range=(0, 3),
        style=style,
    )


def _draw_many(indices) -> tuple[np.ndarray, list[Picture]]:
    drawn = [_draw_one(i) for i in indices]
    return np.stack([image for image, _ in drawn]), [picture for _, picture in drawn]


def noise_words(tokenizer) -> list[str]:
    """1500 common words of CLIP's vocabulary that mean nothing in this world: the
    irrelevant words of web captions.
    """
    meant = {
        word
        for family in FAMILIES.values()
        for name in family.names
        for word in name.split()
    }
    for family in FAMILIES.values():
        for bundle in family.bundles:
            meant.update(word for fact in family.facts(bundle) for word in fact.split())
    words = []
    for i in range(700, 49406):
        token = tokenizer.decoder[i]
        word = token.removesuffix("</w>")
        if (
            token.endswith("</w>")
            and len(word) >= 4
            and word.isascii()
            and word.isalpha()
            and word not in meant
        ):
            words.append(word)
            if len(words) == 1500:
                return words
    return words


def corpus(images: int, progress=True) -> tuple[np.ndarray, np.ndarray, list[Picture]]:
    """The pre-training world, cached on disk.

    Args:
        images: N, how many.

    Returns: images (N, 48, 48, 3) uint8; token ids of their captions (N, NAMING +
    OTHER, LONGEST) uint16 padded with 0, those that name the class first; and what each
    image shows.
    """
    stem = str(cache_folder("pretraining") / f"{WORLD_SEED}-{images}")
    image_file, picture_file = Path(f"{stem}-images.npy"), Path(f"{stem}-pictures.json")
    caption_file = Path(f"{stem}-{NAMING}+{OTHER}-captions.npy")
    jobs = np.array_split(np.arange(images), max(1, images // 200))

    def made(function, what):
        with ProcessPoolExecutor() as pool:
            results = pool.map(function, jobs)
            yield from tqdm(results, what, len(jobs), disable=not progress)

    if not (image_file.exists() and picture_file.exists()):
        drawn = list(made(_draw_many, "drawing"))
        pictures = [asdict(picture) for _, some in drawn for picture in some]
        write_atomically(picture_file, lambda f: f.write(json.dumps(pictures).encode()))
        drawn = np.concatenate([some for some, _ in drawn])
        write_atomically(image_file, lambda f: np.save(f, drawn))
    if not caption_file.exists():
        ids = np.concatenate(list(made(partial(_captions, picture_file), "captions")))
        write_atomically(caption_file, lambda f: np.save(f, ids))
    # copied on write, as torch wants arrays that can be written
    arrays = (np.load(file, mmap_mode="c") for file in (image_file, caption_file))
    return *arrays, _pictures(picture_file)


@lru_cache(1)  # a worker reads them once for all its jobs
def _pictures(file: Path) -> list[Picture]:
    return [
        Picture(**p | {"bundle": tuple(p["bundle"])})
        for p in json.loads(file.read_text())
    ]


@lru_cache(1)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _captions(picture_file: Path, indices) -> np.ndarray:
    """Token ids of the captions of images, a pure function of their numbers."""
    pictures, tokenizer = _pictures(picture_file), _tokenizer()
    words = noise_words(tokenizer)
    ids = np.zeros((len(indices), NAMING + OTHER, LONGEST), np.uint16)
    for row, n in zip(ids, indices, strict=True):
        rng = random_generator(WORLD_SEED + 1, int(n))
        for k in range(NAMING + OTHER):
            elsewhere = rng.random() < 0.04  # the caption belongs to another image
            of = pictures[rng.integers(len(pictures)) if elsewhere else n]
            text = caption(of, rng, k < NAMING and of.label >= 0, words)
            tokens = tokenizer.encode(text)[: LONGEST - 2]
            tokens = [tokenizer.sot_token_id, *tokens, tokenizer.eot_token_id]
            row[k, : len(tokens)] = tokens
    return ids


def vocabulary(captions: np.ndarray) -> np.ndarray:
    """The token ids (V,) int64 that captions or the tasks' own texts use, and 0, which
    neither does: padding.
    """
    tasks = {i for text in all_texts() for i in _tokenizer().encode(text)}
    return np.union1d(np.unique(captions), [0, *tasks]).astype(np.int64)
