"""The embedded mini CLIPs: open_clip models of a few megabytes, read from the package's
own assets.

A CLIP vocabulary has 49408 rows, pre-training on the mini world touches some three
thousand. The file holds those rows and their numbers; every other row is drawn from a
fixed generator, the same on every machine.
"""

import json
from pathlib import Path

import numpy as np
import torch

from promptkit.errors import InputError, unknown
from promptkit.files import write_atomically

ASSETS = Path(__file__).parent / "assets"
NAMES = ("mini", "mini-teacher")
# Of the images that they were pre-trained on, and so of all that they read.
IMAGE_MEAN, IMAGE_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
VOCABULARY = 49408


def untouched_rows(width: int) -> torch.Tensor:
    """What pre-training never saw: (VOCABULARY, width) float32, N(0, 0.02) from numpy's
    Philox generator.
    """
    rng = np.random.Generator(np.random.Philox(key=20210301))
    return torch.from_numpy(
        rng.standard_normal((VOCABULARY, width), dtype=np.float32) * np.float32(0.02)
    )


def export(model, rows: np.ndarray, record: dict, path) -> Path:
    """Write a model trained on the compact vocabulary `rows` (float16) and, as JSON
    beside it, how it was made.
    """
    from safetensors.torch import save

    state = {
        name: p.detach().cpu().half().contiguous()
        for name, p in model.state_dict().items()
        if name != "attn_mask"
    }
    state["token_embedding.rows"] = torch.from_numpy(rows.astype(np.int32))
    path = Path(path)
    write_atomically(path, lambda f: f.write(save(state)))
    write_atomically(
        path.with_suffix(".json"),
        lambda f: f.write(json.dumps(record, indent=1).encode()),
    )
    return path


def read_record(name: str) -> dict:
    """How the weights were made: recipe, loss every 50 steps, seconds, device; and what
    they can do, see `pretrain.measure`.
    """
    return json.loads((ASSETS / f"{name}.json").read_text())


def build(name: str, path=None):
    """The open_clip model `name` with its weights, in float32, which knows the mean and
    std of the images that it reads.

    Raises:
        InputError: no mini CLIP of that name, or its file is missing or damaged.
    """
    from open_clip import CLIP
    from open_clip.model import set_model_preprocess_cfg
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if name not in NAMES:
        raise unknown("mini CLIP", name, NAMES)
    path = Path(path or ASSETS / f"{name}.safetensors")
    remedy = "reinstall promptkit, or make the weights anew with `promptkit pretrain`"
    if not path.is_file():
        raise InputError(f"the weights {path} are missing: {remedy}")
    try:
        state = {
            key: value.float() if value.is_floating_point() else value
            for key, value in load_file(path).items()
        }
        rows = state.pop("token_embedding.rows").long()
        record = json.loads(path.with_suffix(".json").read_text())
        config = record["recipe"]["model"]
        table = untouched_rows(config["text_cfg"]["width"])
        table[rows] = state["token_embedding.weight"]
        model = CLIP(**config)
        model.load_state_dict(state | {"token_embedding.weight": table})
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(
            f"the weights {path} are damaged ({str(error).splitlines()[0]}): {remedy}"
        ) from error
    set_model_preprocess_cfg(model, dict(mean=IMAGE_MEAN, std=IMAGE_STD))
    return model
