"""Pre-training of the mini CLIPs on captioned images of the mini world: `promptkit
pretrain`.

The symmetric contrastive loss (Radford et al. 2021, figure 3) over an open_clip model,
on a CPU or a GPU. Three things are not as in CLIP's own pre-training:

- The logit scale follows a schedule that ends at 100, where CLIP's own ended. Learned,
  it stays near 20 in a world as small as this, and with such a scale prompt learning
  is another problem.
- How often class names are read is part of the recipe. Each image has captions that
  name its class and captions that do not; which kind is read is drawn in training.
- Three times in a run the zero-shot accuracy of the base and of the new classes of each
  task is measured, and the halves that are known better are named less from then on.

Images and captions are made once and kept in the cache folder. The token table is
trained for the rows that captions use, and only those are shipped (see `mini_clip.py`).
"""

import hashlib
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from promptkit import mini_clip
from promptkit.clip import FrozenCLIP, zero_shot_features
from promptkit.data import (
    MINI_TASKS,
    SHIFTS,
    Dataset,
    base_new,
    few_shot,
    load_dataset,
    transform,
)
from promptkit.data.pairs import NAMING, OTHER, WORLD_SEED, corpus, vocabulary
from promptkit.data.tasks import TASKS
from promptkit.data.world import FAMILIES, exposure
from promptkit.errors import InputError, unknown
from promptkit.files import cache_folder, write_atomically
from promptkit.probe import linear_probe

CHECKPOINT_EVERY = 250  # steps
LEVEL_AT = (0.3, 0.5, 0.7)  # of the run

# How many captions name a class in a run of exposure 1, by family: per class (geometric
# mean) and million pairs of a run of NAMED_PAIRS.
NAMED = dict(
    thing=310, pet=60, car=190, flower=38, dish=50, plane=190, scene=50, texture=170,
    satellite=62, action=125,
)  # fmt: skip
NAMED_PAIRS = 0.48  # million


@dataclass(frozen=True)
class Pretraining:
    """The recipe of one mini CLIP.

    `samples` counts image-caption pairs seen. `exposure` is the knob that sets how well
    names, and so zero-shot, are known: over the whole run, however long, captions name
    a class `exposure` times as often as `named` says.
    """

    model: dict
    exposure: float
    samples: int = 1_920_000
    images: int = 150_000
    batch: int = 768
    lr: float = 2e-3
    warmup: int = 200  # steps
    decay: float = 0.45  # last part of the run, cosine to zero
    patch_dropout: float = 0.5
    full_patches: float = 0.4  # last part of the run, without patch dropout
    weight_decay: float = 0.1
    named: dict = field(default_factory=NAMED.copy)
    seed: int = 0


def _model(width: int, layers: int) -> dict:
    """open_clip's configuration of both towers, of one width, the text tower's layers
    being 4.
    """
    text = dict(context_length=77, vocab_size=49408, heads=width // 32, layers=4)
    image = dict(image_size=48, patch_size=8, layers=layers, head_width=32)
    return dict(
        embed_dim=width,
        vision_cfg=image | dict(width=width),
        text_cfg=text | dict(width=width),
    )


RECIPES = {
    "mini": Pretraining(_model(128, layers=6), exposure=0.4),
    "mini-teacher": Pretraining(_model(160, layers=7), exposure=1.5),
}


# --- how often names are read ---------------------------------------------------------


def naming_chances(recipe: Pretraining, pictures, balance) -> torch.Tensor:
    """Chance (N,) that the caption read with an image is one that names its class: so
    large that over a run every class is named as often as the recipe says.

    Args:
        pictures: what the N images show.
        balance: by family a factor (classes,) on how often a class is named.
    """
    total, chance = sum(family.share for family in FAMILIES.values()), {}
    for name, mean in recipe.named.items():
        family = FAMILIES[name]
        count = mean * NAMED_PAIRS * recipe.exposure * exposure(family) * balance[name]
        known = 0.65 if family.attributes else 1  # of the images: of a class
        shown = recipe.samples * family.share / total * known / len(family.names)
        chance[name] = np.minimum(1, count / shown)

    def of(picture):
        has_name = picture.label >= 0 and picture.family in chance
        return chance[picture.family][picture.label] if has_name else 0.0

    return torch.tensor([of(picture) for picture in pictures], dtype=torch.float32)


def level(halves: dict[str, list[float]], balance: dict[str, np.ndarray]):
    """Name less, from now on, what is known better than the mean of all halves of
    tasks, and more what is known worse.

    Args:
        halves: by task the zero-shot accuracies in percent of base and new classes.
        balance: by family a factor (classes,) on how often a class is named; changed.
    """

    def log_odds(accuracy):
        p = np.clip(accuracy / 100, 0.06, 0.97)
        return math.log(p / (1 - p))

    known = {name: [*map(log_odds, v)] for name, v in halves.items() if name != "mini"}
    aim, most = np.mean(list(known.values())), math.log(3)
    for name, pair in known.items():
        classes = TASKS[name].classes
        middle = math.ceil(len(classes) / 2)
        for n, (family, label) in enumerate(classes):
            change = 0.8 * (aim - pair[n >= middle])
            balance[family][label] *= math.exp(np.clip(change, -most, most))
    # Classes of the main set that no other task has go with the rest of their family.
    others = {of for name in known for of in TASKS[name].classes}
    own = [of for of in TASKS["mini"].classes if of not in others]
    for family in {family for family, _ in own}:
        mine = [label for of, label in own if of == family]
        rest = np.delete(balance[family], mine)
        balance[family][mine] = np.exp(np.log(rest).mean())


# --- the model in training ------------------------------------------------------------


def _attention(attn, x, mask):  # x: (N, n, D)
    q, k, v = (
        F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        .unflatten(-1, (3, attn.num_heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    if x.device.type == "cpu":  # the fused kernel is no faster there
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        out = (scores if mask is None else scores + mask).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attn.out_proj(out.transpose(1, 2).flatten(2))


def _blocks(transformer, x, mask=None):
    for block in transformer.resblocks:
        x = x + _attention(block.attn, block.ln_1(x), mask)
        x = x + block.mlp(block.ln_2(x))
    return x


def image_features(model, images, keep: int):
    """Features (N, E) of normalised images (N, 3, S, S), read by `keep` of their
    patches, drawn for each.
    """
    v = model.visual
    x = v.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, D)
    x = x + v.positional_embedding[1:].to(x.dtype)
    if keep < x.shape[1]:
        chosen = torch.rand(x.shape[:2], device=x.device).topk(keep, 1).indices
        x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
    start = (v.class_embedding + v.positional_embedding[0]).to(x.dtype)
    x = v.ln_pre(torch.cat([start.expand(len(x), 1, -1), x], 1))
    return v.ln_post(_blocks(v.transformer, x)[:, 0]) @ v.proj


def text_features(model, ids, groups=6):
    """Features (N, E) of texts: ids (N, LONGEST) of the compact vocabulary, 0 after
    EOT; in groups of like length.
    """
    length = (ids > 0).sum(1)
    order = length.argsort()
    out = []
    for part in order.chunk(groups):
        n = int(length[part].max())
        x = model.token_embedding(ids[part, :n]) + model.positional_embedding[:n]
        mask = x.new_full((n, n), float("-inf")).triu(1)
        x = _blocks(model.transformer, x, mask)
        x = x[torch.arange(len(part), device=ids.device), length[part] - 1]
        out.append(model.ln_final(x) @ model.text_projection)
    return torch.cat(out)[order.argsort()]


def random_crops(images, generator):
    """Half of the images cropped to 60-100 % of the side, the others to 94-100 %. (N,
    3, S, S) float.
    """
    n = len(images)
    side = torch.rand(n, generator=generator)
    side = torch.where(
        torch.rand(n, generator=generator) < 0.5, 0.6 + 0.4 * side, 0.94 + 0.06 * side
    )
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - side)[:, None]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def logit_scale(t: float) -> float:
    """The factor of the cosines when a share t of the run is done: from 14.3, where
    CLIP's begins, to 20 about as fast as it is learned, on to 100, then held.
    """
    if t < 0.45:
        return 14.3 * (20 / 14.3) ** (t / 0.45)
    return 20 * 5 ** min(1, (t - 0.45) / 0.35)


def learning_rate(recipe: Pretraining, step: int, steps: int) -> float:
    """Warm-up, constant, cosine to zero over the last `decay` of the run."""
    t, start = step / steps, 1 - recipe.decay
    decay = 0.5 * (1 + math.cos(math.pi * max(0, t - start) / (1 - start)))
    return recipe.lr * min(1, (step + 1) / recipe.warmup) * decay


def _optimizer(learned, recipe: Pretraining) -> torch.optim.Optimizer:
    """AdamW; weights decay in matrices alone, not in embeddings, norms and biases."""
    decayed = {n: p for n, p in learned.items() if p.ndim > 1 and "embedding" not in n}
    others = [p for n, p in learned.items() if n not in decayed]
    groups = [
        dict(params=list(decayed.values()), weight_decay=recipe.weight_decay),
        dict(params=others, weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def contrastive_loss(image, text, scale):
    """Cross-entropy of N images among N texts and of texts among images, mean of both.

    Args:
        image, text: features (N, E), pairs in rows, not normalised.
        scale: factor of the cosines.
    """
    image, text = (F.normalize(x.float(), dim=-1) for x in (image, text))
    logits = scale * image @ text.T  # (N, N)
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(
    name="mini",
    output=None,
    samples=None,
    device=None,
    resume=True,
    progress=True,
    images=None,
) -> Path:
    """Pre-train one mini CLIP and write its weights and, beside them, its record.

    Args:
        name: "mini" or "mini-teacher".
        output: folder for NAME.safetensors and NAME.json; the package's own `assets` by
            default.
        samples, images: other lengths than the recipe's.
        device: "cuda" if there is one, else "cpu".
        resume: go on from the checkpoint that an interrupted run of the same recipe
            left in the cache folder, to the same weights.

    Returns: the path of the weights.

    Raises:
        InputError: unknown name, or numbers that are too small.
    """
    from open_clip import CLIP

    if name not in RECIPES:
        raise unknown("mini CLIP", name, RECIPES)
    recipe = RECIPES[name]
    for what, value in dict(samples=samples, images=images).items():
        if value is not None and value < 1000:
            raise InputError(f"{what} must be at least 1000, not {value}")
        recipe = replace(recipe, **{what: value or getattr(recipe, what)})
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pixels, captions, pictures = corpus(recipe.images, progress)
    rows = vocabulary(captions)
    compact = np.zeros(49408, np.int64)
    compact[rows] = np.arange(len(rows))
    torch.manual_seed(recipe.seed)
    text = recipe.model["text_cfg"] | dict(vocab_size=len(rows))
    model = CLIP(**recipe.model | dict(text_cfg=text)).to(device)
    model.logit_scale.requires_grad_(False)  # it follows its schedule
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = _optimizer(learned, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    patch_generator = torch.default_generator  # torch's own draws what is dropped
    if device.type == "cuda":
        patch_generator = torch.cuda.default_generators[device.index or 0]
    steps = recipe.samples // recipe.batch
    level_at = [int(steps * share) for share in LEVEL_AT]
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1)
        for v in (mini_clip.IMAGE_MEAN, mini_clip.IMAGE_STD)
    )
    patches = len(model.visual.positional_embedding) - 1
    few = int(patches * (1 - recipe.patch_dropout))
    balance = {family: np.ones(len(FAMILIES[family].names)) for family in recipe.named}
    first, losses, levels, seconds = 0, [], [], 0.0
    identity = json.dumps([asdict(recipe), WORLD_SEED], sort_keys=True).encode()
    digest = hashlib.sha256(identity).hexdigest()[:10]
    checkpoint = cache_folder("pretraining") / f"{name}-{digest}.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        patch_generator.set_state(state["patch_generator"].cpu())
        balance = {family: np.array(v) for family, v in state["balance"].items()}
        first, losses, levels, seconds = (
            state[key] for key in ("step", "losses", "levels", "seconds")
        )
    chance = naming_chances(recipe, pictures, balance)

    started = time.perf_counter() - seconds
    bar = tqdm(
        range(first, steps),
        f"pre-training {name}",
        initial=first,
        total=steps,
        disable=not progress,
        mininterval=5,
    )
    for step in bar:
        t = step / steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        model.logit_scale.fill_(math.log(logit_scale(t)))
        chosen = torch.randint(len(pictures), (recipe.batch,), generator=generator)
        u = torch.rand(3, recipe.batch, generator=generator)
        which = torch.where(
            u[0] < chance[chosen],
            (u[1] * NAMING).long(),
            NAMING + (u[2] * OTHER).long(),
        )
        ids = torch.from_numpy(compact[captions[chosen, which]]).to(device)
        x = torch.from_numpy(pixels[chosen]).to(device).permute(0, 3, 1, 2)
        x = (random_crops(x.float() / 255, generator) - mean) / std
        keep = few if t < 1 - recipe.full_patches else patches
        # A step in bf16 took longer than in float32 on a CPU, with instructions for it
        # (avx512_bf16) and, emulated, several times as long without.
        with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
            image, text = image_features(model, x, keep), text_features(model, ids)
        loss = contrastive_loss(image, text, model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            losses.append(round(loss.item(), 4))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", scale=f"{logit_scale(t):.1f}")
        if step + 1 in level_at:
            level(zero_shot_halves(_shipped(name, model, rows, recipe)), balance)
            chance = naming_chances(recipe, pictures, balance)
            factors = {k: v.round(3).tolist() for k, v in balance.items()}
            levels.append([round((step + 1) / steps, 3), factors])
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1 or step == steps - 1:
            state = dict(
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                generator=generator.get_state(),
                patch_generator=patch_generator.get_state(),
                balance={family: v.tolist() for family, v in balance.items()},
                step=step + 1,
                losses=losses,
                levels=levels,
                seconds=time.perf_counter() - started,
            )
            write_atomically(checkpoint, partial(torch.save, state))
    record = dict(
        recipe=asdict(recipe),
        exposure=recipe.exposure,
        levels=levels,
        world_seed=WORLD_SEED,
        seconds=round(time.perf_counter() - started),
        device=device.type,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        torch=torch.__version__.split("+")[0],
        loss_every_50_steps=losses,
    )
    record |= measure(_shipped(name, model, rows, recipe))
    path = Path(output or mini_clip.ASSETS) / f"{name}.safetensors"
    mini_clip.export(model, rows, record, path)
    os.remove(checkpoint)
    return path


# --- what was reached -----------------------------------------------------------------


def _shipped(name, model, rows, recipe) -> FrozenCLIP:
    """The model as its file will give it: in float16, with every row of the table.

    Building it draws from torch's generator, so a run that measures in between goes on
    with other numbers than one that does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.safetensors"
        mini_clip.export(model, rows, dict(recipe=asdict(recipe)), path)
        built = mini_clip.build(name, path)
    return FrozenCLIP(built.to(model.logit_scale.device), name=name)


@torch.no_grad()
def zero_shot(clip: FrozenCLIP, dataset: Dataset) -> float:
    """Zero-shot test accuracy in percent, with the dataset's own template. Nothing is
    kept in the cache folder, where features of weights in training would pile up.
    """
    batches = (transform(clip, x) for x in dataset.test.images().split(500))
    image = torch.cat([clip.encode_image(x) for x in batches])  # (N, E)
    weights = zero_shot_features(clip, dataset.classnames, dataset.template)  # (C, E)
    right = (image @ weights.T).argmax(-1).cpu() == dataset.test.labels
    return 100 * right.double().mean().item()


def zero_shot_halves(clip: FrozenCLIP) -> dict[str, list[float]]:
    """By task the zero-shot accuracies of base and of new classes, each among their own
    names.
    """
    return {
        task: [zero_shot(clip, half) for half in base_new(load_dataset(task))]
        for task in MINI_TASKS
    }


def measure(clip: FrozenCLIP) -> dict:
    """What a mini CLIP can do, as its record keeps it; test accuracies in percent.

    Returns: "zero_shot" by task, with its own template; "halves", [base, new] by task;
    "probe" by task, of a linear probe on 16 shots of seed 1; "shifts", zero-shot on
    those of the main set; "scale", of the logits.
    """
    tasks = {name: load_dataset(name) for name in MINI_TASKS}
    shots = {name: few_shot(task, 16, seed=1) for name, task in tasks.items()}
    found = dict(
        zero_shot={name: zero_shot(clip, task) for name, task in tasks.items()},
        halves=zero_shot_halves(clip),
        probe={name: linear_probe(clip, task) for name, task in shots.items()},
        shifts={name: zero_shot(clip, load_dataset(name)) for name in SHIFTS},
    )
    found = {
        what: {name: np.round(value, 2).tolist() for name, value in values.items()}
        for what, values in found.items()
    }
    return found | dict(scale=round(clip.logit_scale.item(), 1))


def targets(student="mini", teacher="mini-teacher") -> pd.DataFrame:
    """What the recipes aim at, and what was reached by the records of two mini CLIPs.

    Args:
        student, teacher: names of shipped mini CLIPs, or records as dicts.

    Returns: a row each target: "target", "wanted", "measured", "reached" (bool) and
    "missed by", 0 where it is reached. All but the scale are accuracies in percent or
    differences of such; zero-shot is with a task's own template.

    Raises:
        InputError: a record lacks a measurement.
    """
    student, teacher = (
        mini_clip.read_record(record) if isinstance(record, str) else record
        for record in (student, teacher)
    )
    try:
        own, probe = (list(student[key].values()) for key in ("zero_shot", "probe"))
        base, new = np.mean(list(student["halves"].values()), 0)
        taught, scale = list(teacher["zero_shot"].values()), student["scale"]
    except KeyError as error:
        raise InputError(
            f"the record of the mini CLIP has no {error}: what `measure` finds belongs"
            " there; `promptkit pretrain` makes both anew"
        ) from None
    mean, low, high, probe = np.mean(own), min(own), max(own), np.mean(probe)
    apart, above = abs(base - new), np.mean(taught) - mean
    table = [
        ("zero-shot, mean of the tasks", "62 to 72", mean, max(62 - mean, mean - 72)),
        ("zero-shot, lowest task", "35 or more", low, 35 - low),
        ("zero-shot, highest task", "92 or less", high, high - 92),
        ("means of base and new classes apart", "5 or less", apart, apart - 5),
        ("linear probe, 16 shots, mean", "88 or more", probe, 88 - probe),
        ("teacher's zero-shot above", "10 or more", above, 10 - above),
        ("logit scale", "100", scale, abs(scale - 100)),
    ]
    frame = pd.DataFrame(table, columns=["target", "wanted", "measured", "missed by"])
    missed = frame.pop("missed by").clip(lower=0)
    return frame.assign(reached=missed == 0, **{"missed by": missed})
