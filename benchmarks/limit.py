"""How near each method's training step and test image are to what cannot be avoided.

    python benchmarks/limit.py                       # every method, about an hour
    python benchmarks/limit.py coop maple tpt        # some of them
    python benchmarks/limit.py --device cuda --precision bf16 --json limit.json
    python benchmarks/limit.py coop --costs promptkit/assets/costs.csv

A method is run as :func:`promptkit.train.fit` and ``predict`` run it, at the true size
of its backbone, with the paper's batch and images that are augmented anew each step.
Meanwhile every call of the towers is noted by its shapes: how many images or classes,
tokens, what is learned from which block on. From these follow

- *limit*: the floating-point operations that such calls cannot do without (`work`:
  no padding, common beginnings once, a frozen pass without gradients, a
  gradient from the first learned block on), at the speed that this machine multiplies
  matrices of those sizes with;
- *plain*: the same calls as the towers of open_clip answer them: every class at all 77
  positions, every image by itself, each measured once and multiplied.

*Share* is limit / measured. What a method asks of the towers is taken as given: a call
that is not needed would not show. Weights are random; speed does not depend on them. On
a CPU times are those that the process had a processor for, summed over its threads, so
that other work on the machine counts little. Each method has a process of its own, so
that peak memory above rest is its own.

The same counts tell how much of the operations is the text tower's, and what either
tower keeps for the gradient: with them `promptkit.costs` tells what a step takes with
another number of classes. ``--costs`` puts the rows into its table.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

from promptkit import costs
from promptkit.clip import FrozenCLIP
from promptkit.data import transform
from promptkit.recipe import Setting
from promptkit.registry import build, nesting, objects, recipe, specs
from promptkit.runs import _forget_peak, _peak_memory
from promptkit.testing import described, toy_dataset
from promptkit.towers import Edit, _Block, _trim, plain_text
from promptkit.train import fit

# --- what cannot be avoided -----------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a tower, by its shapes."""

    tower: str  # "text" or "image"
    rows: int  # classes, or images
    groups: int  # prefixes that differ: images with a context of their own
    prefix: int  # tokens that the classes of a group share up to some block
    own: int  # tokens of all classes behind the prefix, or of all images
    stem: int  # operations in front of the blocks: the patches' embedding
    moved: tuple  # a block: how many of the prefix's tokens each class has to itself
    learned: int | None  # the first block a gradient must reach; None: frozen


def matmuls(tokens, keys, D, last=None):
    """(linear, attention) operations of a block for tokens that attend to ``keys``
    positions in all: q, k, v, out and the MLP are 12 D^2 multiplications a token. Where
    only ``last`` rows are read of it, the others need keys and values alone.
    """
    read = tokens if last is None else last
    share = read / tokens
    return 2 * D * D * (2 * tokens + 10 * read), share * 2 * 2 * keys * D


def tokens_of(call: Call, block) -> float:
    """Tokens that a block cannot do without."""
    if call.tower == "image":
        return call.own
    moved = call.moved[block]
    each = call.own / call.rows + moved
    return call.groups * (call.prefix - moved + call.rows * each)


def work(call: Call, D, blocks) -> Counter:
    """Operations by the number of tokens that are multiplied at once."""
    found = Counter({call.own: call.stem})
    for block in range(blocks):
        tokens = tokens_of(call, block)
        if call.tower == "text":
            moved = call.moved[block]
            shared, length = call.prefix - moved, call.own / call.rows + moved
            seen = shared * shared / 2 + call.rows * length * (shared + length / 2)
            keys, last = call.groups * seen, call.groups * call.rows
        else:
            last = call.rows
            keys = call.own * call.own / call.rows
        linear, attention = matmuls(
            tokens, keys, D, last if block == blocks - 1 else None
        )
        passes = 1
        if call.learned is not None and block >= call.learned:
            passes = 2  # the weights are frozen: one product a forward product
            attention *= 1.5  # the gradient of a product has two
        found[round(tokens)] += passes * (linear + attention)
    return found


def computed(call: Call, D, blocks) -> float:
    """Operations in all."""
    return work(call, D, blocks).total()


def kept(call: Call, D, blocks) -> float:
    """MiB that are kept for the gradient, by the towers' own reckoning: ten floats a
    channel and token of every block, where one learns.
    """
    if call.learned is None:
        return 0.0
    return sum(tokens_of(call, i) for i in range(blocks)) * D * 40 / 2**20


def by_tower(calls, clip, count) -> Counter:
    """What ``count`` counts in calls, by tower."""
    found = Counter(text=0, image=0)
    for call in calls:
        blocks = len(getattr(clip, f"{call.tower}_tower").blocks)
        found[call.tower] += count(call, width(clip, call.tower), blocks)
    return found


def width(clip, tower) -> int:
    return clip.width if tower == "text" else clip.vision_width


class Watch:
    """A tower that notes what it is asked."""

    def __init__(self, tower, calls):
        self.tower, self.calls = tower, calls

    def __getattr__(self, name):
        return getattr(self.tower, name)

    def __call__(self, given, *how):
        blocks = {id(block): i for i, block in enumerate(self.tower.blocks)}
        learned, whole = [], _Block.qkv

        def qkv(block, x, edit):
            if x.requires_grad and id(block) in blocks:
                learned.append(blocks[id(block)])
            return whole(block, x, edit)

        _Block.qkv = qkv
        try:
            out = self.tower(given, *how)
        finally:
            _Block.qkv = whole
        self.calls.append(
            self._call(given, *how[:1], learned=min(learned, default=None))
        )
        return out

    def _call(self, given, more=None, learned=None):
        """``more`` is an image's prompt, a text's edit."""
        blocks = len(self.tower.blocks)
        if isinstance(given, torch.Tensor):
            n = 0 if more is None else more.shape[-2]
            own = len(given) * (self.tower.length + n)
            patches = len(given) * (self.tower.length - 1)
            stem = 2 * patches * self.tower.visual.conv1.weight.numel()
            return Call("image", len(given), 1, 0, own, stem, (0,) * blocks, learned)
        G, P, _ = given.prefix.shape
        own = int((given.eot + 1).sum())
        least, moved = P, []
        for layer in range(blocks):
            least = min(least, (more or Edit()).shared(layer, P))
            moved.append(P - least)
        return Call("text", len(given.eot), G, P, own, 0, tuple(moved), learned)


# --- this machine ---------------------------------------------------------------------


def clock(device):
    """Seconds of a processor, or of a GPU's stream."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def best(function, device, times=3):
    spent = []
    for _ in range(times):
        began = clock(device)
        function()
        spent.append(clock(device) - began)
    return min(spent)


@cache
def speed(tokens, D, dtype, device):
    """Operations a second of the products of a block: (tokens, D) by (D, 3D), (D, D),
    (D, 4D) and back.
    """
    shapes = [(3 * D, D), (D, D), (4 * D, D), (D, 4 * D)]
    weights = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    xs = [torch.randn(tokens, w.shape[1], dtype=dtype, device=device) for w in weights]

    def products():
        for x, w in zip(xs, weights, strict=True):
            F.linear(x, w)

    products()
    return 2 * tokens * 12 * D * D / best(products, device, 5)


def limit(calls, clip) -> float:
    """Seconds that calls cannot do without."""
    seconds = 0.0
    for call, times in Counter(calls).items():
        tower = getattr(clip, f"{call.tower}_tower")
        D = width(clip, call.tower)
        for tokens, operations in work(call, D, len(tower.blocks)).items():
            near = tokens if tokens < 64 else 64 * round(tokens / 64)
            rate = speed(min(max(near, 1), 4096), D, clip.dtype, clip.device)
            seconds += times * operations / rate
    return seconds


@cache
def plain_seconds(clip, tower, learns) -> float:
    """A class at 77 positions, or an image, through open_clip's own pass."""
    many = 8

    def one():
        if tower == "text":
            x = torch.randn(many, clip.context_length, clip.width, device=clip.device)
            eot = torch.full((many,), clip.context_length - 1, device=clip.device)
            out = plain_text(clip.model, x.requires_grad_(learns), eot)
        else:
            size = clip.image_size
            x = torch.randn(many, 3, size, size, device=clip.device)
            out = clip.model.encode_image(x.requires_grad_(learns))
        if learns:
            out.sum().backward()

    with (
        torch.set_grad_enabled(learns),
        torch.autocast(
            clip.device.type, clip.dtype, enabled=clip.dtype != torch.float32
        ),
    ):
        return best(one, clip.device, 2) / many


def plain(calls, clip) -> float:
    return sum(
        times
        * call.groups
        * call.rows
        * plain_seconds(clip, call.tower, call.learned is not None)
        for call, times in Counter(calls).items()
    )


# --- one method -----------------------------------------------------------------------


def peak(device) -> float:
    """MiB, the most that were held since ``rest``."""
    return (_peak_memory(torch.device(device)) or 0) / 2**20


def rest(device) -> float:
    """MiB that are held now; peaks count from here on, where the system can."""
    _trim()
    _forget_peak(torch.device(device))
    return peak(device)


def measure(spec, classes, model, device, precision, steps) -> dict:
    """Training step and test image of a method."""
    torch.manual_seed(0)
    network = open_clip.CLIP(**open_clip.get_model_config(model))
    clip = FrozenCLIP(network.to(device), name=model, precision=precision)
    names = open_clip.IMAGENET_CLASSNAMES[:classes]
    ours = recipe(spec, Setting("base-to-new", "toy", 16, "full"))
    shots = math.ceil(ours.batch_size * (steps + 1) / classes)
    dataset = described(toy_dataset(clip, names, shots))
    stands = {
        name: build("coop", clip, names)  # a teacher of the same size
        for name, cls in objects(spec).items()
        if name in cls.needs()
    }
    # What hangs on the toy's images: UPL takes all of them, as random weights give few
    # labels, and Tip-Adapter keeps 16 a class.
    fixed = {"top_k": -1, "cache_size": 16}
    known = nesting(spec)[0].hyperparameters()
    stands |= {name: value for name, value in fixed.items() if name in known}
    method = build(spec, clip, names, **ours.hparams | stands)
    method.aim(dataset)
    learned = method.n_parameters
    calls, began, marks = [], [], []
    clip.text_tower = Watch(clip.text_tower, calls)
    clip.image_tower = Watch(clip.image_tower, calls)
    backward = method.backward

    def watched(batch):
        began.append(clock(device))
        marks.append(len(calls))
        return backward(batch)

    method.backward = watched
    brief = {"epochs": 1, "epoch_steps": steps + 1}
    stages = [replace(stage, **brief) for stage in ours.stages]
    before = rest(device)
    fit(method, dataset, replace(ours, **brief, stages=stages), progress=False)
    del method.backward
    memory = peak(device) - before
    out = {"method": spec, "classes": classes, "batch": ours.batch_size}
    out["parameters"] = max(learned, method.n_parameters)
    out["room"] = clip.text_tower.budget / 2**20
    if len(began) > 2:
        # From a step's forward to the next one's: with what reads and augments.
        out["step"] = min(b - a for a, b in pairwise(began[-steps:]))
        during = calls[marks[-2] : marks[-1]]
        out |= _told("step", during, out["step"], clip)
        out["step_memory"] = memory
        for tower, size in by_tower(during, clip, kept).items():
            out[f"kept_{tower}"] = size
    method.eval()
    images = transform(clip, dataset.test.images()[:steps]).to(device)
    method.predict(images[:1])  # what is made once from the names
    calls.clear()
    method.predict(images[:1])
    during = list(calls)
    out["test"] = best(lambda: method.predict(images[:1]), device)
    return out | _told("test", during, out["test"], clip)


def _told(what, calls, seconds, clip):
    least = limit(calls, clip)
    told = {f"{what}_limit": least, f"{what}_share": least / seconds}
    found = by_tower(calls, clip, computed)
    told[f"{what}_text"] = found["text"] / (found.total() or 1)
    return told | {f"{what}_plain": plain(calls, clip)}


# --- all of them ----------------------------------------------------------------------


def apart(spec, options) -> dict:
    """``measure`` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, __file__, spec, *options, "--here", str(found)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"method": spec, "error": done.stderr.strip().splitlines()[-1]}
        return json.loads(found.read_text())


def shown(rows) -> Table:
    table = Table(title="against the limit; seconds, MiB above rest")
    for name in ("method", "classes", "batch"):
        table.add_column(name)
    for what in ("step", "test"):
        for name in (what, "limit", "share", "plain", *(["memory"] * (what == "step"))):
            table.add_column(name, justify="right")
    for row in sorted(rows, key=lambda row: row.get("step_share", 2)):
        if "error" in row:
            table.add_row(row["method"], row["error"][:60])
            continue
        cells = [row["method"], str(row["classes"]), str(row["batch"])]
        for what in ("step", "test"):
            keys = [what, f"{what}_limit", f"{what}_share", f"{what}_plain"]
            texts = ["{:.3g}", "{:.3g}", "{:.0%}", "{:.3g}"]
            keys += [f"{what}_memory"] * (what == "step")
            for key, text in zip(keys, [*texts, "{:.0f}"], strict=False):
                cells.append(text.format(row[key]) if key in row else "")
        table.add_row(*cells)
    return table


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="*", help="default: every one")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3, help="the fastest counts")
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--costs", help="table of costs to put the rows into")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        torch.set_num_threads(asked.threads)
        names = ("classes", "model", "device", "precision", "steps")
        found = measure(asked.methods[0], **{n: getattr(asked, n) for n in names})
        Path(asked.here).write_text(json.dumps(found))
        return
    passed = ("classes", "model", "device", "precision", "threads", "steps")
    options = [f"--{name}={getattr(asked, name)}" for name in passed]
    rows = []
    for spec in track(asked.methods or specs(), "measuring"):
        rows.append(apart(spec, options))
        if asked.json:
            Path(asked.json).write_text(json.dumps(rows, indent=1) + "\n")
    Console(width=140).print(shown(rows))
    if asked.costs:
        where = costs.machine(asked.device), asked.precision, asked.model
        n = costs.merge(rows, *where, asked.costs)
        print(f"{asked.costs} has {n} rows now, with these of {', '.join(where)}")


if __name__ == "__main__":
    main()
