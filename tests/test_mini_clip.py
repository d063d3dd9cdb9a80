"""The shipped mini CLIPs and the script that makes them."""

import json

import pytest
import torch

from promptkit import load_clip, mini_clip, pretrain
from promptkit.errors import InputError

names = pytest.mark.parametrize("name", mini_clip.NAMES)


@names
def test_weights_are_small_and_give_the_recorded_accuracies(name):
    file = mini_clip.ASSETS / f"{name}.safetensors"
    assert file.stat().st_size < 15e6
    recorded = mini_clip.read_record(name)["zero_shot"]
    measured = pretrain.zero_shot_accuracies(name)
    assert measured == pytest.approx(recorded, abs=0.5)


@names
def test_rows_that_are_not_shipped_are_the_same_everywhere(name):
    clip = load_clip(name)
    table = mini_clip.untouched_rows(clip.width)
    assert table[12345, :3].tolist() == pytest.approx(UNTOUCHED[clip.width], abs=1e-7)
    shipped = (clip.model.token_embedding.weight.cpu() != table).any(1).sum().item()
    assert 1500 < shipped < 4000


UNTOUCHED = {
    128: [0.0320859, 0.0027939, 0.0153159],
    160: [0.0092473, -0.0064563, -0.0065649],
}


def test_recipe_is_recorded_beside_the_weights():
    record = mini_clip.read_record("mini")
    assert (
        record["recipe"]["samples"] > 100_000
        and record["seconds"] > 0
        and record["device"]
    )
    losses = record["loss_every_50_steps"]
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
    """A pre-training of six steps on a thousand images."""
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrain, "CHECKPOINT_EVERY", 2)
    model = dict(
        embed_dim=16,
        vision_cfg=dict(
            image_size=48, patch_size=16, width=32, layers=1, head_width=16
        ),
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
    )
    recipe = pretrain.Pretraining(model, samples=1152, named={"pet": 100}, images=1000)
    monkeypatch.setitem(pretrain.RECIPES, "mini", recipe)
    monkeypatch.setattr(pretrain, "zero_shot_accuracies", lambda name, path: {})
    return tmp_path


def test_an_interrupted_pretraining_goes_on_to_the_same_bits(tiny_recipe, monkeypatch):
    whole = pretrain.pretrain(
        "mini", tiny_recipe / "whole", device="cpu", progress=False
    )
    rate = pretrain.learning_rate

    def killed(recipe, step, steps):
        if step == 5:
            raise KeyboardInterrupt
        return rate(recipe, step, steps)

    monkeypatch.setattr(pretrain, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain("mini", tiny_recipe / "parts", device="cpu", progress=False)
    assert not (tiny_recipe / "parts").exists()
    monkeypatch.setattr(pretrain, "learning_rate", rate)
    parts = pretrain.pretrain(
        "mini", tiny_recipe / "parts", device="cpu", progress=False
    )
    assert parts.read_bytes() == whole.read_bytes()
    record = json.loads(parts.with_suffix(".json").read_text())
    assert record["recipe"]["samples"] == 1152 and record["device"] == "cpu"
    model = mini_clip.build("mini", parts)
    assert torch.isfinite(
        model.encode_text(torch.tensor([[49406, 320, 49407] + [0] * 74]))
    ).all()


def test_pretraining_refuses_nonsense():
    with pytest.raises(InputError, match="at least 1000"):
        pretrain.pretrain("mini", samples=10)
    with pytest.raises(InputError, match="mini-teacher"):
        pretrain.pretrain("minni")
