"""Processor time and peak memory of a training step through the text tower, against
open_clip's plain full-length pass.

    python benchmarks/text_towers.py              # every case, minutes on one core
    python benchmarks/text_towers.py coop mini    # some of them

Times are those that the process had a processor for, summed over its threads, so that
other work on the machine counts little. A case runs in a process of its own for each
side, so that peak memory (of the whole process, model included) is that side's alone.
Both sides compute the same loss from the same weights, and the table shows how far
their gradients are apart. Weights are random: speed and memory do not depend on them.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from promptkit.clip import FrozenCLIP
from promptkit.methods.coop import CoOp
from promptkit.methods.tpt import TPT, marginal_entropy
from promptkit.prompts import Context
from promptkit.towers import plain_text

MINI = dict(
    embed_dim=128,
    vision_cfg=dict(layers=4, width=128, head_width=32, patch_size=8, image_size=32),
    text_cfg=dict(width=128, heads=4, layers=4),
    quick_gelu=True,
)


@dataclass
class Case:
    title: str
    model: str  # an open_clip configuration, or "mini"
    classes: int
    length: int  # context tokens, before the class name
    groups: int = 1  # images with a context of their own, as in CoCoOp
    repeats: int = 3
    plain: bool = True
    views: int = (
        0  # of a test image, for TPT's step: adapt the context, then classify with it
    )


CASES = {
    "coop": Case(
        "CoOp, ViT-B/16, 100 classes, 16 tokens", "ViT-B-16-quickgelu", 100, 16
    ),
    "cocoop": Case(
        "CoCoOp, ViT-B/16, 8 images x 50 classes, 4 tokens",
        "ViT-B-16-quickgelu",
        50,
        4,
        8,
        1,
    ),
    "mini": Case("CoOp, mini CLIP, 20 classes, 16 tokens", "mini", 20, 16, repeats=30),
    "tpt": Case(
        "TPT, ViT-B/16, 64 views, 100 classes",
        "ViT-B-16-quickgelu",
        100,
        4,
        repeats=1,
        views=64,
    ),
    "many": Case(
        "CoOp, ViT-B/16, 20,000 classes, 16 tokens",
        "ViT-B-16-quickgelu",
        20_000,
        16,
        1,
        1,
        False,
    ),
}
KINDS = (
    "small large old young red blue wooden wild striped spotted plastic toy painted"
    " broken wet dark".split()
)

MORE = "bright round metal paper golden".split()


def class_names(n: int) -> list[str]:
    """ImageNet's names, then each with an adjective."""
    names = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))
    return [*names, *(f"{kind} {name}" for kind in [*KINDS, *MORE] for name in names)][
        :n
    ]


def setup(case: Case):
    torch.manual_seed(0)
    config = MINI if case.model == "mini" else open_clip.get_model_config(case.model)
    clip = FrozenCLIP(open_clip.CLIP(**config))
    context = Context(clip, class_names(case.classes), case.length)
    shift = 0.02 * torch.randn(
        case.groups, 1, 1, clip.width
    )  # CoCoOp's per-image token
    features = F.normalize(torch.randn(case.views or 32, clip.embed_dim), dim=-1)
    labels = torch.randint(case.classes, (32,))
    return clip, context, shift, features, labels


def loss_of(text, features, labels):
    """Cross entropy of the cosines; text is (G, C, E), and with G > 1 each group
    classifies one image.
    """
    text = F.normalize(text, dim=-1)
    if len(text) == 1:
        return F.cross_entropy(100 * features @ text[0].T, labels)
    logits = 100 * torch.einsum("ge,gce->gc", features[: len(text)], text)  # (G, C)
    return F.cross_entropy(logits, labels[: len(text)])


def ours(clip, context, shift, features, labels):
    vectors = context.vectors + shift if len(shift) > 1 else None
    loss_of(clip.text(context.prompt(vectors)), features, labels).backward()


def plain(clip, context, shift, features, labels):
    """All classes through 77 positions, one image after another, as official
    implementations do.
    """
    for i in range(len(shift)):
        vectors = context.vectors + shift[i : i + 1] if len(shift) > 1 else None
        prompt = context.prompt(vectors)
        text = plain_text(
            clip.model, prompt.full()[0], prompt.eot + prompt.prefix.shape[1]
        )
        if len(shift) > 1:
            loss_of(
                text[None].expand(2, -1, -1)[:1], features[i : i + 1], labels[i : i + 1]
            ).div(len(shift)).backward()
        else:
            loss_of(text[None], features, labels).backward()


def ours_tpt(clip, context, shift, features, labels):
    """TPT on the features of one image's views; the gradient of its step is left at the
    context.
    """
    method = TPT(
        clip,
        context.template.classnames,
        host=CoOp(clip, context.template.classnames, n_ctx=context.length),
    )
    method.host.context.vectors = context.vectors
    context.vectors.grad = method.adapt(features[None]).gradient[0, 0]


def plain_tpt(clip, context, shift, features, labels):
    """The same by full-length passes: forward, backward, a step of AdamW, forward."""

    def logits():
        prompt = context.prompt(vectors)
        text = plain_text(
            clip.model, prompt.full()[0], prompt.eot + prompt.prefix.shape[1]
        )
        return clip.logit_scale * features @ F.normalize(text, dim=-1).T  # (V, C)

    vectors = context.vectors.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([vectors], lr=5e-3)
    every = logits()
    entropy = torch.special.entr(every.softmax(dim=-1)).sum(dim=-1)
    kept = every[entropy.argsort()[: len(features) // 10]]
    marginal_entropy(kept[None]).sum().backward()
    context.vectors.grad = vectors.grad.clone()
    optimizer.step()
    with torch.no_grad():
        logits()


def measure(case: Case, side: str, path: str) -> None:
    """Run one side of a case and write its gradient and figures to a file."""
    clip, context, *rest = setup(case)
    sides = (
        {"ours": ours_tpt, "plain": plain_tpt}
        if case.views
        else {"ours": ours, "plain": plain}
    )
    step, seconds = sides[side], []
    for _ in range(case.repeats + (case.repeats > 1)):  # the first warms up
        context.vectors.grad = None
        start = time.process_time()
        step(clip, context, *rest)
        seconds.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    torch.save(dict(seconds=min(seconds), peak=peak, grad=context.vectors.grad), path)


def run(name: str, side: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.pt"
        root = Path(__file__).resolve().parents[1]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        }
        command = [sys.executable, __file__, name, "--side", side, "--out", str(path)]
        subprocess.run(
            [*command, "--threads", str(torch.get_num_threads())], check=True, env=env
        )
        return torch.load(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"of {', '.join(CASES)}; all by default",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(
            f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(CASES)}"
        )
    torch.set_num_threads(args.threads)
    if args.side:
        return measure(CASES[args.cases[0]], args.side, args.out)

    title = (
        f"One step, forward and backward; {args.threads} thread(s), torch"
        f" {torch.__version__}"
    )
    table = Table(
        "case",
        "ours",
        "plain",
        "faster",
        "peak, ours",
        "peak, plain",
        "gradients apart",
        title=title,
    )
    figures = {}
    for name in args.cases or CASES:
        case, a = CASES[name], run(name, "ours")
        row = [
            case.title,
            f"{a['seconds'] * 1e3:,.1f} ms",
            "",
            "",
            f"{a['peak'] / 2**20:,.0f} MiB",
            "",
            "",
        ]
        figures[name] = dict(ours_seconds=a["seconds"], ours_peak_bytes=a["peak"])
        if case.plain:
            b = run(name, "plain")
            difference, scale = (
                (a["grad"] - b["grad"]).abs().max().item(),
                b["grad"].abs().max().item(),
            )
            row[2], row[3] = (
                f"{b['seconds'] * 1e3:,.1f} ms",
                f"{b['seconds'] / a['seconds']:.1f} x",
            )
            row[5], row[6] = (
                f"{b['peak'] / 2**20:,.0f} MiB",
                f"{difference:.1e} of {scale:.1e}",
            )
            figures[name] |= dict(
                plain_seconds=b["seconds"],
                plain_peak_bytes=b["peak"],
                max_difference=difference,
                max_gradient=scale,
            )
        table.add_row(*row)
    Console(width=140).print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
