"""The benchmark of what cannot be avoided: its count is one that can be checked."""

import importlib.util
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from promptkit import costs
from promptkit.registry import build
from promptkit.testing import NAMES, batch_of, toy_dataset

PATH = Path(__file__).parents[1] / "benchmarks" / "limit.py"


@pytest.fixture(scope="module")
def limit():
    spec = importlib.util.spec_from_file_location("limit", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("spec", ["coop", "cocoop", "kgcoop", "ivlp", "maple", "tcp"])
def test_the_limit_is_below_what_is_computed(limit, spec, make_clip):
    """And not far below: torch counts the products of a step."""
    clip = make_clip()
    method = build(spec, clip, NAMES)
    dataset = toy_dataset(clip)
    method.aim(dataset)
    batch, calls = batch_of(dataset, clip, 4, method), []
    method.backward(batch)
    clip.text_tower = limit.Watch(clip.text_tower, calls)
    clip.image_tower = limit.Watch(clip.image_tower, calls)
    with FlopCounterMode(display=False) as counter:
        method.backward(batch)
    width = {"text": clip.width, "image": clip.vision_width}
    least = sum(
        sum(limit.work(call, width[call.tower], blocks_of(clip, call)).values())
        for call in calls
    )
    assert 0.6 < least / counter.get_total_flops() <= 1


def test_a_frozen_pass_needs_no_gradient(limit):
    shapes = ("image", 4, 1, 0, 4 * 17, 0, (0, 0))
    frozen, whole, upper = (
        sum(limit.work(limit.Call(*shapes, learned), 32, 2).values())
        for learned in (None, 0, 1)
    )
    assert frozen < upper < whole < 2.5 * frozen


def test_the_text_towers_part_is_in_proportion_to_the_classes(limit, make_clip):
    """And nothing else is: by operations and by what is kept for the gradient."""
    clip = make_clip()
    found = []
    for names in (NAMES, [*NAMES, *(f"{name} too" for name in NAMES)]):
        method, dataset = build("maple", clip, names), toy_dataset(clip, names)
        method.aim(dataset)
        towers, calls = (clip.text_tower, clip.image_tower), []
        clip.text_tower, clip.image_tower = (limit.Watch(t, calls) for t in towers)
        method.backward(batch_of(dataset, clip, 4, method))
        clip.text_tower, clip.image_tower = towers
        found += [
            limit.by_tower(calls, clip, count) for count in (limit.computed, limit.kept)
        ]
    (work, kept), (more, kept_more) = found[:2], found[2:]
    for one, other in ((work, more), (kept, kept_more)):
        assert 1.8 < other["text"] / one["text"] < 2.5  # " too" is a token more
        assert other["image"] == one["image"] > 0
    assert kept["image"] == 2 * 4 * (17 + 2) * 32 * 40 / 2**20  # blocks, images, tokens


def test_a_measured_row_goes_into_the_table(limit, tmp_path, monkeypatch, capsys):
    """From a step on a tiny CLIP to a file, and what failed stays out."""
    tower = {"layers": 2, "width": 32}
    tiny = {
        "embed_dim": 16,
        "vision_cfg": tower | {"image_size": 32, "patch_size": 8, "head_width": 16},
        "text_cfg": tower | {"heads": 2},
    }
    monkeypatch.setattr(limit.open_clip, "get_model_config", lambda name: tiny)
    rows = {
        spec: limit.measure(spec, 5, "tiny", "cpu", "fp32", 2)
        for spec in ("maple", "upl", "tip_adapter_f", "clip")
    }
    assert set(rows["maple"]) >= {"step", "step_memory", "test", "test_text"}
    assert rows["maple"]["kept_image"] > 0 == rows["upl"]["kept_image"]
    assert rows["tip_adapter_f"]["parameters"] == 5 * 16 * 16  # a key a training image
    assert "step" not in rows["clip"]
    path = tmp_path / "costs.csv"
    failed = {"error": "out of memory"}
    monkeypatch.setattr(
        limit, "apart", lambda spec, options: rows.get(spec, failed | {"method": spec})
    )
    monkeypatch.setattr(
        limit.sys, "argv", ["limit.py", *rows, "coop", "--costs", str(path)]
    )
    limit.main()
    assert f"{path} has 4 rows now" in capsys.readouterr().out
    (found,) = costs.every(path)
    assert found.methods == sorted(rows) and found.model == "ViT-B-16-quickgelu"
    assert found.step("maple", 5, 4) == pytest.approx(rows["maple"]["step"], rel=1e-3)


def blocks_of(clip, call):
    return len(getattr(clip, f"{call.tower}_tower").blocks)
