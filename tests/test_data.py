"""The mini world: pictures, tasks, few-shot draws, splits and the feature cache."""

import random
import sys

import numpy as np
import pytest
import torch

from promptkit import data
from promptkit.data import datasets
from promptkit.data.render import PATTERNS, SIZE, pattern_mask
from promptkit.data.tasks import TASKS, all_texts
from promptkit.data.world import FAMILIES, caption, draw, exposure, random_generator
from promptkit.errors import InputError

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@families
def test_an_image_is_a_function_of_its_seed(family):
    first, what = draw(family.name, 1, random_generator(3))
    again, _ = draw(family.name, 1, random_generator(3))
    other, _ = draw(family.name, 1, random_generator(4))
    assert first.shape == (SIZE, SIZE, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()
    assert what.family == family.name and what.label == 1


def test_images_are_the_same_on_every_machine():
    """Mean grey levels as drawn where the weights were made; if they change,
    WORLD_VERSION must too.
    """
    means = [
        draw(name, 0, random_generator(5, i))[0].mean()
        for i, name in enumerate(FAMILIES)
    ]
    assert means == pytest.approx(REFERENCE_MEANS, abs=0.02)


REFERENCE_MEANS = [
    116.185,
    165.665,
    156.284,
    34.08,
    169.666,
    166.047,
    119.339,
    101.636,
    132.501,
    193.408,
    183.436,
]


@families
def test_classes_differ_in_their_attributes(family):
    assert len(set(family.names)) == len(family.names) == len(family.bundles)
    for i, bundle in enumerate(family.bundles):
        for other in family.bundles[:i]:
            assert (
                sum(a != b for a, b in zip(bundle, other, strict=True))
                >= family.distance
            )


@families
def test_exposure_is_even_over_the_halves(family):
    shares, half = exposure(family), len(family.names) // 2
    assert np.exp(np.log(shares).mean()) == pytest.approx(1)
    assert 3 < shares.max() / shares.min() < 4.1
    assert abs(np.log(shares[:half]).mean() - np.log(shares[half:]).mean()) < 0.35


def test_homonyms_are_there_on_purpose():
    names = {name: set(family.names) for name, family in FAMILIES.items()}
    assert names["pet"] & names["flower"] == {"faiki", "kainek", "tainda"}
    assert names["pet"] & names["dish"] == {"dozor", "hasix", "koora"}
    assert names["flower"] & names["dish"] == {"rovath", "vaizor", "volis"}
    assert names["pet"] & names["thing"] == {"rocket"}
    assert names["scene"] & names["satellite"] == {"forest", "desert"}


@families
def test_captions_name_the_class_when_told_to(family):
    rng = random_generator(8)
    _, picture = draw(family.name, 2, rng)
    named = [caption(picture, rng, True, ["noise", "words"]) for _ in range(20)]
    assert all(family.names[2] in text for text in named)
    described = [caption(picture, rng, False, ["noise", "words"]) for _ in range(20)]
    assert all(text == text.lower() and text for text in described)
    if family.attributes:
        assert not any(f" {family.names[2]} " in f" {text} " for text in described)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_use_both_colours(pattern):
    mean = (
        np.mean([np.asarray(pattern_mask(pattern, k)).mean() for k in range(3)]) / 255
    )
    assert mean == 0 if pattern == "plain" else 0.02 < mean < 0.98


def test_the_eleven_tasks():
    assert list(data.MINI_TASKS) == [
        "mini",
        "objects",
        "pets",
        "cars",
        "flowers",
        "food",
        "planes",
        "scenes",
        "textures",
        "sat",
        "actions",
    ]
    for name in data.MINI_TASKS:
        task = data.load_dataset(name)
        assert (
            len(set(task.classnames)) == len(task.classnames) and "{}" in task.template
        )
        assert set(task.descriptions) == set(task.classnames) and all(
            task.descriptions.values()
        )
        assert len(task.train) == 32 * len(task.classnames) and len(
            task.test
        ) == 25 * len(task.classnames)
        keys = {task.train.key, task.val.key, task.test.key}
        assert len(keys) == 3
    assert len(all_texts()) > 500


def test_the_main_set_shares_no_species_with_the_fine_grained_tasks():
    main = {
        c for c in TASKS["mini"].classes if c[0] in ("pet", "flower", "dish", "car")
    }
    for name in ("pets", "flowers", "food", "cars"):
        assert not main & set(TASKS[name].classes)


def test_both_halves_of_the_main_set_hold_every_family():
    classes = TASKS["mini"].classes
    assert (
        {f for f, _ in classes[:20]}
        == {f for f, _ in classes[20:]}
        == {"pet", "flower", "dish", "car", "thing"}
    )


def test_images_come_from_the_cache_the_second_time(monkeypatch):
    datasets._mini.cache_clear()  # another test may have had them, of another folder
    split = data.load_dataset("sat").val
    first = split.images()
    assert first.shape == (80, 3, SIZE, SIZE) and first.dtype == torch.uint8
    datasets._mini.cache_clear()
    monkeypatch.setattr(datasets.world, "draw", None)
    assert torch.equal(
        data.load_dataset("sat").val.images(torch.tensor([5, 7])), first[[5, 7]]
    )


def test_words_are_never_the_images_own():
    words = data.load_dataset("objects-words").test
    stamped = data.stamped_labels(words)
    assert (
        (stamped != words.labels).all() and stamped.min() == 0 and stamped.max() == 35
    )


def test_shifts_have_the_classes_of_the_main_set_and_no_training_images():
    for name in data.SHIFTS:
        shift = data.load_dataset(name)
        assert (
            shift.classnames == data.load_dataset("mini").classnames
            and len(shift.train) == 0
        )
    with pytest.raises(InputError, match="no training images"):
        data.few_shot(data.load_dataset("mini-a"), 1, 1)


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(InputError, match="'flowers'"):
        data.load_dataset("flower")


def test_few_shot_is_the_draw_of_the_benchmark():
    task = data.load_dataset("pets")
    drawn = data.few_shot(task, 4, seed=2)
    generator, rows = random.Random(2), []
    for label in range(20):
        rows += generator.sample(range(32 * label, 32 * label + 32), 4)
    assert drawn.train.rows.tolist() == rows
    assert drawn.train.labels.tolist() == [
        label for label in range(20) for _ in range(4)
    ]
    validation = [
        generator.sample(range(8 * label, 8 * label + 8), 4) for label in range(20)
    ]
    assert drawn.val.rows.tolist() == [row for some in validation for row in some]
    assert data.few_shot(task, 1, 2).val.labels.bincount().tolist() == [1] * 20


def test_base_classes_keep_the_few_shot_draw():
    drawn = data.few_shot(data.load_dataset("pets"), 2, seed=1)
    base, new = data.base_new(drawn)
    assert (
        base.classnames + new.classnames == drawn.classnames
        and len(base.classnames) == 10
    )
    assert torch.equal(torch.cat([base.train.rows, new.train.rows]), drawn.train.rows)
    assert new.test.labels.unique().tolist() == list(range(10))
    assert new.train.take([0]).images().equal(drawn.train.images(torch.tensor([20])))


def test_an_odd_class_goes_to_the_base():
    three = data.subset(data.load_dataset("sat"), [7, 2, 5])
    base, new = data.base_new(three)
    assert (base.classnames, new.classnames) == (
        ["pasture", "river"][:1] + ["highway"],
        ["crops"],
    )
    with pytest.raises(InputError, match="at least 2 classes"):
        data.base_new(new)


@pytest.mark.parametrize("shots", [0, -1, 2.5, True, "4"])
def test_shots_must_be_a_whole_positive_number(shots):
    with pytest.raises(InputError, match="whole number of at least 1"):
        data.few_shot(data.load_dataset("sat"), shots, 1)


def test_more_shots_than_images_take_all_with_a_warning_that_names_the_class():
    task = data.load_dataset("sat")
    with pytest.warns(UserWarning, match="33 shots .* 'forest' has 32"):
        assert len(data.few_shot(task, 33, 1).train) == len(task.train)


def test_transform_is_clips_own(tiny_clip):
    images = torch.randint(
        0,
        256,
        (2, 3, 64, 96),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    x = data.transform(tiny_clip, images)
    assert x.shape == (2, 3, tiny_clip.image_size, tiny_clip.image_size)
    white = data.transform(
        tiny_clip, torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)
    )
    expected = [(1 - m) / s for m, s in zip(tiny_clip.mean, tiny_clip.std, strict=True)]
    assert white[0, :, 5, 5].tolist() == pytest.approx(expected, rel=1e-5)


def test_augmentation_follows_its_generator(tiny_clip):
    images = data.load_dataset("sat").val.images(torch.arange(3))
    crops = [
        data.transform(tiny_clip, images, True, torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])


def test_features_are_computed_once(tiny_clip, monkeypatch):
    split = data.load_dataset("sat").val
    expected = tiny_clip.encode_image(data.transform(tiny_clip, split.images()))
    assert torch.allclose(data.frozen_features(tiny_clip, split), expected, atol=1e-5)
    part = split.take([3, 1])
    module = sys.modules["promptkit.data.features"]
    monkeypatch.setattr(
        module, "transform", None
    )  # from here on only the cache folder can answer
    assert torch.allclose(
        data.frozen_features(tiny_clip, part), expected[[3, 1]], atol=1e-5
    )


def test_a_blank_word_is_a_blank_plate():
    """The same picture as with a word, but for the ink."""
    from promptkit.data.world import draw, random_generator

    blank, worded = (
        draw("thing", 0, random_generator(1, 2), word=word)[0] for word in (" ", "box")
    )
    assert (blank[:32] == worded[:32]).all() and (blank[32:] != worded[32:]).any()
    assert blank[36:44, 4:44].std() < worded[36:44, 4:44].std() / 4
