"""The benchmark of what cannot be avoided: its count is one that can be checked."""

import importlib.util
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

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


def blocks_of(clip, call):
    return len(getattr(clip, f"{call.tower}_tower").blocks)
