"""POMP: a softmax over drawn classes, its correction, and what it costs with many."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.methods.pomp import OPERATIONS, POMP, distorted
from promptkit.recipe import Setting
from promptkit.registry import build, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import reader

MANY = [f"thing {i} of {i * i}" for i in range(40)]


def batch_of(clip, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(labels), clip.embed_dim, generator=generator)
    return Batch(features=features, labels=torch.tensor(labels), generator=generator)


def test_with_all_classes_drawn_it_is_coop(tiny_clip):
    """Its own class is among them and drops out, and the margin is log 1."""
    batch = batch_of(tiny_clip, [0, 3, 3, 4])
    coop = build("coop", tiny_clip, NAMES, n_ctx=4)
    loss, grads = coop.train().backward(batch), []
    for options in ({"sampled": 1000}, {"sampled": None}, {"sampled": len(NAMES) + 1}):
        method = build("pomp", tiny_clip, NAMES, **options)
        torch.testing.assert_close(method.train().backward(batch), loss)
        grads.append(method.context.vectors.grad)
        torch.testing.assert_close(grads[-1], coop.context.vectors.grad)
        torch.testing.assert_close(method.logits(batch), coop.logits(batch))


@pytest.mark.parametrize("base", [10.0, math.e])
def test_the_local_loss_by_hand(tiny_clip, base):
    """Of each image in turn, from the logits of all classes."""
    labels, drawn = [1, 7, 7, 20], [5, 7, 0, 30, 22, 8]
    batch = batch_of(tiny_clip, labels)
    method = build("pomp", tiny_clip, MANY, sampled=7, log_base=base)
    plain = build("coop", tiny_clip, MANY, n_ctx=4).logits(batch)
    losses = []
    for b, y in enumerate(labels):
        others = [j for j in drawn if j != y]
        margin = math.log((len(MANY) - 1) / len(others), base)
        z = torch.cat([plain[b, y][None], plain[b, others] + margin])
        losses.append(F.cross_entropy(z[None], torch.tensor([0])))
    method.draw = lambda generator: torch.tensor(drawn)
    torch.testing.assert_close(method.loss(batch), torch.stack(losses).mean())
    off = build("pomp", tiny_clip, MANY, sampled=7, correction=False)
    fixed = build("pomp", tiny_clip, MANY, sampled=7, margin=0.0)
    logits = [m.local_logits(batch.features, batch.labels, torch.tensor(drawn))
              for m in (off, fixed)]  # fmt: skip
    assert torch.equal(*logits)


def test_draws_are_of_distinct_classes_and_follow_the_run(tiny_clip):
    method = build("pomp", tiny_clip, MANY, sampled=9)
    first, again, other = (
        method.draw(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == len(first) == 8 and first.max() < len(MANY)
    batch, losses = batch_of(tiny_clip, [1, 2]), []
    for seed in (1, 1, 2):
        batch.generator = torch.Generator().manual_seed(seed)
        losses.append(method.loss(batch).item())
    assert losses[0] == losses[1] != losses[2]


class Largest(TorchDispatchMode):
    """Remembers the most numbers that a floating-point result had."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.most = max(self.most, x.numel())
        return out


def test_twenty_thousand_classes_cost_no_more_than_drawn_ones(tiny_clip):
    """Neither a step nor a pass over all classes holds the prompts of all."""
    most = {}
    for classes in (3_000, 21_000):
        names = [f"thing number {i % 1000} {i // 1000}" for i in range(classes)]
        method = build("pomp", tiny_clip, names, sampled=200)
        batch = batch_of(tiny_clip, [classes - 1, 17, 17, 2999])
        with Largest() as step:
            assert torch.isfinite(method.train().backward(batch))
        with Largest() as test, torch.no_grad():
            features = method.eval().text_features()
        assert features.shape == (classes, tiny_clip.embed_dim)
        most[classes] = step.most, test.most - features.numel()
    assert most[21_000][0] <= 1.2 * most[3_000][0]
    whole = 21_000 * tiny_clip.width  # of one token a class
    assert most[21_000][0] < whole and most[21_000][1] < whole
    few = torch.tensor([20_999, 5])
    alone = build("coop", tiny_clip, [names[i] for i in few], n_ctx=4)
    alone.load_official({"ctx": method.context.vectors.detach()})
    torch.testing.assert_close(
        features[few], alone.text_features(), rtol=1e-4, atol=1e-5
    )


def test_copies_of_an_image_are_rows_of_their_own(tiny_clip):
    dataset = toy_dataset(tiny_clip)
    plan = recipe("pomp", Setting("cross-dataset", "toy", profile="full"))
    assert plan.hparams["copies"] == 4
    method = build("pomp", tiny_clip, NAMES, copies=3)
    read = reader(method.train(), dataset.train, torch.Generator().manual_seed(0), plan)
    batch = read(torch.arange(4))
    assert batch.views.shape == (4, 3, 3, 32, 32)
    assert len({view.sum().item() for view in batch.views.flatten(0, 1)}) == 12
    drawn = torch.arange(5)
    method.draw = lambda generator: drawn
    rows = tiny_clip.encode_image(batch.views.flatten(0, 1))
    labels = batch.labels.repeat_interleave(3)
    logits = method.local_logits(rows, labels, drawn)
    expected = F.cross_entropy(logits, torch.zeros_like(labels))
    torch.testing.assert_close(method.loss(batch), expected)
    method.eval()
    assert method.logits(Batch(features=rows)).shape == (12, 5)


def test_its_randaugment():
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert len(OPERATIONS) == 15
    for operation, low, high in OPERATIONS:
        for strength in (low, (low + high) / 2, high):
            assert operation(image, strength).size == image.size
    unchanged = sum(
        np.array_equal(np.asarray(distorted(image, random.Random(n))), pixels)
        for n in range(400)
    )
    # neither of two done, or the identity: (0.4 + 0.6 / 15) squared, 0.19, and little
    # more where an operation at a low strength does nothing
    assert 50 < unchanged < 130
    shifted = OPERATIONS[13][0](image, 0.2)
    assert np.array_equal(np.asarray(shifted)[:, :24], pixels[:, 6:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampled": 1}, "sampled must be at least 2, got 1"),
        ({"log_base": 1.0}, "log_base must be above 1"),
        ({"copies": 0}, "copies must be at least 1"),
        ({"margin": 1.0, "correction": False}, "margin must be left out where"),
    ],
)
def test_what_does_not_fit(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("pomp", tiny_clip, NAMES, **options)


def test_official_options(tiny_clip):
    make = POMP.from_official
    assert make(tiny_clip, NAMES, {"UPDATE_CLASS_NUM": 8, "EPT": False}).sampled is None
    assert make(tiny_clip, NAMES, {"K": 8, "K_TRANSFORMS": 4}).copies == 4
    words = {"CTX_INIT": "a photo of a", "N_CTX": 16, "CSC": True}
    assert make(tiny_clip, NAMES, words).context.vectors.shape == (4, 32)
    for options, message in (
        ({"negative_sampling": "hard"}, "negative_sampling must be 'random', got"),
        ({"class_token_position": "middle"}, "class_token_position must be 'end'"),
    ):
        with pytest.raises(InputError, match=message):
            make(tiny_clip, NAMES, options)
