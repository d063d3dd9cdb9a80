"""The shipped mini CLIPs and the script that makes them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from promptkit import load_clip, mini_clip, pretrain
from promptkit.data import MINI_TASKS, few_shot, load_dataset, pairs, transform
from promptkit.data.tasks import TASKS
from promptkit.data.world import FAMILIES, Picture, exposure
from promptkit.errors import InputError
from promptkit.probe import linear_probe

names = pytest.mark.parametrize("name", mini_clip.NAMES)


@names
def test_weights_are_small_and_give_the_recorded_accuracies(name):
    file = mini_clip.ASSETS / f"{name}.safetensors"
    assert file.stat().st_size < 15e6
    recorded, clip = mini_clip.read_record(name)["zero_shot"], load_clip(name)
    measured = {n: pretrain.zero_shot(clip, load_dataset(n)) for n in MINI_TASKS}
    assert measured == pytest.approx(recorded, abs=0.5)


@names
def test_images_are_read_as_in_pretraining(name):
    clip = load_clip(name)
    assert (clip.mean, clip.std) == (mini_clip.IMAGE_MEAN, mini_clip.IMAGE_STD)
    white = transform(clip, torch.full((1, 3, 48, 48), 255, dtype=torch.uint8))
    assert torch.equal(white, torch.full_like(white, (1 - 0.5) / 0.25))


@names
def test_rows_that_are_not_shipped_are_the_same_everywhere(name):
    clip = load_clip(name)
    table = mini_clip.untouched_rows(clip.width)
    assert table[12345, :3].tolist() == pytest.approx(UNTOUCHED[clip.width], abs=1e-7)
    shipped = (clip.model.token_embedding.weight.cpu() != table).any(1).sum().item()
    assert 1500 < shipped < 4000  # beside what the tasks' texts use, noise words


UNTOUCHED = {
    128: [0.0320859, 0.0027939, 0.0153159],
    160: [0.0092473, -0.0064563, -0.0065649],
}


@names
def test_recipe_is_recorded_beside_the_weights(name):
    record = mini_clip.read_record(name)
    recipe = record["recipe"]
    assert recipe["model"] == pretrain.RECIPES[name].model
    assert record["seconds"] > 0 and record["device"]
    losses = record["loss_every_50_steps"]
    assert len(losses) == recipe["samples"] // recipe["batch"] // 50
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


@pytest.mark.parametrize("damage", ["missing", "truncated", "other"])
def test_missing_or_damaged_weights_say_what_to_do(damage, tmp_path):
    file = tmp_path / "mini.safetensors"
    whole = (mini_clip.ASSETS / "mini.safetensors").read_bytes()
    if damage != "missing":
        file.write_bytes(
            whole[:100_000] if damage == "truncated" else b"not weights at all"
        )
    with pytest.raises(
        InputError,
        match=f"{'missing' if damage == 'missing' else 'damaged'}.*promptkit pretrain",
    ):
        mini_clip.build("mini", file)


def test_unknown_mini_clip():
    with pytest.raises(InputError, match="mini-teacher"):
        mini_clip.build("mini-techer")


@pytest.fixture
def tiny_recipe(tmp_path, monkeypatch):
    """A pre-training of six steps on a thousand images, levelled after the first, the
    third and the fourth; with half of the patches in the first three.
    """
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    model = dict(
        embed_dim=16,
        vision_cfg=dict(
            image_size=48, patch_size=16, width=32, layers=1, head_width=16
        ),
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
    )
    recipe = pretrain.Pretraining(
        model, exposure=1.0, samples=1152, images=1000, batch=192, full_patches=0.5
    )
    monkeypatch.setitem(pretrain.RECIPES, "mini", recipe)
    monkeypatch.setattr(pretrain, "MINI_TASKS", ("mini", "sat"))
    monkeypatch.setattr(pretrain, "measure", lambda clip: {"scale": 1})
    return tmp_path


@pytest.mark.parametrize("at", [1, 3, 5])  # with no checkpoint, in both phases
def test_an_interrupted_pretraining_goes_on_to_the_same_bits(
    tiny_recipe, monkeypatch, at
):
    def start(folder):
        output = tiny_recipe / folder
        return pretrain.pretrain("mini", output, device="cpu", progress=False)

    whole = start("whole")
    rate = pretrain.learning_rate

    def killed(recipe, step, steps):
        if step == at:
            raise KeyboardInterrupt
        return rate(recipe, step, steps)

    monkeypatch.setattr(pretrain, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        start("parts")
    assert not (tiny_recipe / "parts").exists()
    monkeypatch.setattr(pretrain, "learning_rate", rate)
    parts = start("parts")
    assert parts.read_bytes() == whole.read_bytes()
    records = [json.loads(p.with_suffix(".json").read_text()) for p in (parts, whole)]
    for record in records:
        del record["seconds"]
    assert records[0] == records[1]
    assert not list((tiny_recipe / "cache" / "pretraining").glob("*.pt"))


def test_what_a_pretraining_writes(tiny_recipe):
    path = pretrain.pretrain("mini", tiny_recipe, device="cpu", progress=False)
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["recipe"]["samples"] == 1152 and record["device"] == "cpu"
    assert record["exposure"] == record["recipe"]["exposure"] == 1
    assert record["scale"] == 1
    shares, levels = zip(*record["levels"], strict=True)
    assert shares == (0.167, 0.5, 0.667)
    assert all(len(v) == len(FAMILIES[k].names) for k, v in levels[0].items())
    # Of the satellite's halves, one is named more and one less, or neither.
    first, *_, last = levels[-1]["satellite"]
    assert first == 1 / last == 1 or (first - 1) * (last - 1) < 0
    model = mini_clip.build("mini", path)
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=0.002)
    assert torch.isfinite(
        model.encode_text(torch.tensor([[49406, 320, 49407] + [0] * 74]))
    ).all()


def test_captions_name_the_class_or_do_not(tiny_recipe):
    _, captions, pictures = pairs.corpus(1000, progress=False)
    assert captions.shape == (1000, pairs.NAMING + pairs.OTHER, pairs.LONGEST)
    pets = [n for n, p in enumerate(pictures) if p.family == "pet" and p.label >= 0]
    tokens = {i: pairs._tokenizer().encode(FAMILIES["pet"].names[pictures[i].label])
              for i in pets}  # fmt: skip
    named = np.array(
        [[set(tokens[i]) <= set(row.tolist()) for row in captions[i]] for i in pets]
    )
    assert named[:, : pairs.NAMING].mean() > 0.9  # 4 % belong to another image
    assert named[:, pairs.NAMING :].mean() < 0.05
    (file,) = (tiny_recipe / "cache" / "pretraining").glob("*-pictures.json")
    assert np.array_equal(pairs._captions(file, [7, 500]), captions[[7, 500]])


def ones():
    return {family: np.ones(len(FAMILIES[family].names)) for family in pretrain.NAMED}


def test_classes_are_named_as_often_as_the_recipe_says():
    recipe = replace(pretrain.RECIPES["mini"], samples=10_000_000)
    balance = ones()
    balance["pet"][3] = 2
    shown = [("scene", 1), ("pet", 3), ("pet", -1), ("sign", 0)]
    pictures = [Picture(family, label, (), {}) for family, label in shown]
    chance = pretrain.naming_chances(recipe, pictures, balance).tolist()
    share = sum(family.share for family in FAMILIES.values())
    for (name, label), p, known in zip(shown, chance[:2], (1, 0.65), strict=False):
        family = FAMILIES[name]
        visits = 10_000_000 * family.share / share * known / len(family.names)
        wanted = pretrain.NAMED[name] * 0.48 * 0.4 * exposure(family)[label]
        assert p * visits == pytest.approx(wanted * balance[name][label], rel=1e-5)
    assert chance[2:] == [0, 0]
    certain = pretrain.naming_chances(replace(recipe, exposure=1e9), pictures, balance)
    assert certain.tolist() == [1, 1, 0, 0]


def test_halves_that_are_known_better_are_named_less():
    halves, balance = {name: [50.0, 50.0] for name in MINI_TASKS}, ones()
    pretrain.level(halves, balance)
    for family, factors in balance.items():
        assert factors == pytest.approx(ones()[family])  # all are level
    pretrain.level(halves | {"pets": [65.0, 40.0], "mini": [99.0, 0.0]}, balance)
    better, worse, own = (balance["pet"][i] for i in (0, 19, 25))
    assert 1 / 3 < better < 1 < worse < 3
    assert balance["pet"][:10] == pytest.approx(better)
    # The main set's own pets go with the others, in the geometric mean.
    assert ("pet", 25) in TASKS["mini"].classes
    assert own == pytest.approx((better * worse) ** 0.5)
    pretrain.level(halves | {"pets": [100.0, 0.0]}, balance)
    assert balance["pet"][0] == pytest.approx(better / 3)  # by 3 at most


def test_schedules():
    scales = [pretrain.logit_scale(t) for t in (0, 0.45, 0.8, 0.9, 1)]
    assert scales == pytest.approx([14.3, 20, 100, 100, 100])
    recipe = pretrain.RECIPES["mini"]
    rates = [pretrain.learning_rate(recipe, n, 2500) for n in range(2500)]
    assert rates[0] == pytest.approx(1e-5) and rates[-1] < 1e-8
    assert set(rates[200:1375]) == {2e-3} and rates == [
        *sorted(rates[:200]), *sorted(rates[200:], reverse=True)
    ]  # fmt: skip


def test_what_a_mini_clip_can_do(monkeypatch):
    monkeypatch.setattr(pretrain, "MINI_TASKS", ("sat",))
    monkeypatch.setattr(pretrain, "SHIFTS", ("mini-v2",))
    clip, sat = load_clip("mini"), load_dataset("sat")
    found = pretrain.measure(clip)
    recorded = mini_clip.read_record("mini")["zero_shot"]["sat"]
    assert found["zero_shot"] == pytest.approx({"sat": recorded}, abs=0.5)
    base, new = found["halves"]["sat"]  # among half of the names
    assert (base + new) / 2 >= found["zero_shot"]["sat"]
    probe = linear_probe(clip, few_shot(sat, 16, 1))
    assert found["probe"] == {"sat": round(probe, 2)}
    assert 0 < found["shifts"]["mini-v2"] < 100
    assert found["scale"] == pytest.approx(clip.logit_scale.item(), abs=0.1)


def record_of(zero_shot, base, new, probe, scale):
    return dict(
        zero_shot=dict(enumerate(zero_shot)),
        halves={"a": [base - 1, new + 3], "b": [base + 1, new - 3]},
        probe=dict(a=probe - 2, b=probe + 2),
        scale=scale,
    )


def test_targets_that_are_reached():
    student = record_of([40, 90, 65], 74, 71, 90, 100.0)
    table = pretrain.targets(student, {"zero_shot": {"a": 76}})
    assert list(table) == ["target", "wanted", "measured", "reached", "missed by"]
    assert table["reached"].dtype == bool and table["reached"].all()
    assert (table["missed by"] == 0).all()
    assert table["measured"].tolist() == [65, 40, 90, 3, 90, 11, 100]


def test_targets_that_are_missed():
    student = record_of([30, 95, 40], 80, 72, 85, 18.8)
    table = pretrain.targets(student, {"zero_shot": {"a": 60}})
    assert not table["reached"].any()
    assert table["missed by"].tolist() == pytest.approx([7, 5, 3, 3, 3, 5, 81.2])
    above = record_of([90, 90, 90], 71, 80, 88, 100)
    table = pretrain.targets(above, {"zero_shot": {"a": 100}})
    assert table["missed by"].tolist() == pytest.approx([18, 0, 0, 4, 0, 0, 0])
    assert table["reached"].tolist() == [False, True, True, False, True, True, True]


def test_targets_need_measurements():
    record = record_of([60], 70, 70, 90, 100)
    del record["probe"]
    with pytest.raises(InputError, match="no 'probe'.*promptkit pretrain"):
        pretrain.targets(record, record)


def test_pretraining_refuses_nonsense():
    with pytest.raises(InputError, match="at least 1000"):
        pretrain.pretrain("mini", samples=10)
    with pytest.raises(InputError, match="mini-teacher"):
        pretrain.pretrain("minni")
