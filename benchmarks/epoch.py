"""An epoch over JPEG files of true size, with and without reading ahead.

    python benchmarks/epoch.py coop maple
    python benchmarks/epoch.py maple --device cuda --precision bf16 --json epoch.json

The dataset is made on the spot: photographs of 500 x 375 noise, a folder a class. Times
are of the clock, since the point is what happens at the same time.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from promptkit import train
from promptkit.clip import FrozenCLIP
from promptkit.data import load_dataset
from promptkit.recipe import Setting
from promptkit.registry import build, recipe


def photographs(folder: Path, classes: int, each: int) -> None:
    """JPEG files in folders train, val and test, a folder a class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", each), ("val", 1), ("test", 1)):
        for name in open_clip.IMAGENET_CLASSNAMES[:classes]:
            place = folder / split / name.replace("/", " ")
            place.mkdir(parents=True)
            for i in range(count):
                coarse = rng.integers(0, 256, (25, 34, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((500, 375), Image.BICUBIC)
                image.save(place / f"{i}.jpg", quality=92)


def seconds(spec, clip, dataset, ahead: bool) -> float:
    ours = recipe(spec, Setting("few-shot", dataset.name, 16, "full"))
    one = replace(ours, epochs=1, epoch_steps=None)
    kept = train.ahead
    train.ahead = kept if ahead else map
    try:
        method = build(spec, clip, dataset.classnames, **one.hparams)
        method.aim(dataset)
        train.fit(method, dataset, replace(one, epoch_steps=1), progress=False)
        began = time.perf_counter()
        train.fit(method, dataset, one, progress=False)
        if clip.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
    finally:
        train.ahead = kept


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--each", type=int, default=16, help="images a class")
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--json", help="file for the numbers")
    asked = parser.parse_args()
    torch.manual_seed(0)
    network = open_clip.CLIP(**open_clip.get_model_config(asked.model))
    clip = FrozenCLIP(
        network.to(asked.device), name=asked.model, precision=asked.precision
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), asked.classes, asked.each)
        dataset = load_dataset(folder)
        for spec in asked.methods:
            row = {"method": spec, "images": len(dataset.train)}
            for name, ahead in (("in turn", False), ("ahead", True)):
                row[name] = seconds(spec, clip, dataset, ahead)
            rows.append(row)
    if asked.json:
        Path(asked.json).write_text(json.dumps(rows, indent=1) + "\n")
    table = Table("method", "images", "in turn (s)", "ahead (s)", title="an epoch")
    for row in rows:
        times = (f"{row[name]:.1f}" for name in ("in turn", "ahead"))
        table.add_row(row["method"], str(row["images"]), *times)
    Console().print(table)


if __name__ == "__main__":
    main()
