"""Pre-training of the mini CLIPs on captioned images of the mini world: `promptkit
pretrain`.

The ordinary symmetric contrastive loss (Radford et al. 2021, figure 3) over an
open_clip model, on a CPU or a GPU. Images are rendered once and kept in the cache
folder; every image has several captions, one is picked per visit. The token table is
trained for the rows that captions use, and only those are shipped (see `mini_clip.py`).
"""

import hashlib
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from promptkit.data.world import (
    FAMILIES,
    Picture,
    caption,
    draw,
    exposure,
    random_generator,
)
from promptkit.errors import InputError, unknown
from promptkit.files import cache_folder, write_atomically

WORLD_SEED = 20210303
STYLED = (
    "thing",
    "pet",
    "car",
    "flower",
    "dish",
    "plane",
)  # families that also appear as sketches and renditions
CAPTIONS = 8  # captions drawn for each image
LONGEST = 48  # tokens of a caption that are kept
CHECKPOINT_EVERY = 500  # steps


@dataclass(frozen=True)
class Pretraining:
    """The recipe of one mini CLIP.

    `samples` counts image-caption pairs seen. `named` says by family how many captions
    name a class, per class (geometric mean) and million of samples: the knob that sets
    how well names, and so zero-shot, are known.
    """

    model: dict
    samples: int
    named: dict
    images: int = 110_000
    batch: int = 192
    lr: float = 1.5e-3
    warmup: int = 100  # steps
    decay: float = 0.45  # last part of the run, cosine to zero
    patch_dropout: float = 0.5
    full_patches: float = 0.5  # last part of the run, without patch dropout
    weight_decay: float = 0.1
    seed: int = 0


RECIPES = {
    "mini": Pretraining(
        dict(
            embed_dim=128,
            vision_cfg=dict(
                image_size=48, patch_size=8, width=128, layers=6, head_width=32
            ),
            text_cfg=dict(
                context_length=77, vocab_size=49408, width=128, heads=4, layers=4
            ),
        ),
        samples=480_000,
        named={
            "thing": 310,
            "pet": 60,
            "car": 190,
            "flower": 38,
            "dish": 50,
            "plane": 190,
            "scene": 50,
            "texture": 170,
            "satellite": 62,
            "action": 125,
        },
    ),
    "mini-teacher": Pretraining(
        dict(
            embed_dim=160,
            vision_cfg=dict(
                image_size=48, patch_size=8, width=160, layers=7, head_width=32
            ),
            text_cfg=dict(
                context_length=77, vocab_size=49408, width=160, heads=5, layers=4
            ),
        ),
        samples=480_000,
        named={
            "thing": 720,
            "pet": 165,
            "car": 1200,
            "flower": 165,
            "dish": 165,
            "plane": 1200,
            "scene": 180,
            "texture": 720,
            "satellite": 390,
            "action": 900,
        },
    ),
}


# --- the corpus -----------------------------------------------------------------------


def _draw_one(index: int) -> tuple[np.ndarray, Picture]:
    """Image number `index` of the pre-training world, a pure function of its number."""
    rng = random_generator(WORLD_SEED, index)
    families = list(FAMILIES.values())
    family = families[
        rng.choice(
            len(families),
            p=np.array([f.share for f in families]) / sum(f.share for f in families),
        )
    ]
    unnamed = family.attributes and rng.random() < 0.35
    label = -1 if unnamed else int(rng.integers(len(family.names)))
    style = (
        ("sketch", "rendition", "")[min(2, int(rng.random() / 0.055))]
        if family.name in STYLED
        else ""
    )
    return draw(
        family.name,
        label,
        rng,
        deviation=0.12,
        scale=(0.6, 1.0),
        clutter_range=(0, 3),
        style=style,
    )


def _draw_many(indices) -> tuple[np.ndarray, list[Picture]]:
    drawn = [_draw_one(i) for i in indices]
    return np.stack([image for image, _ in drawn]), [picture for _, picture in drawn]


def noise_words(tokenizer) -> list[str]:
    """1500 common words of CLIP's vocabulary that mean nothing in this world: the
    irrelevant words of web captions.
    """
    meant = {
        word
        for family in FAMILIES.values()
        for name in family.names
        for word in name.split()
    }
    for family in FAMILIES.values():
        for bundle in family.bundles:
            meant.update(word for fact in family.facts(bundle) for word in fact.split())
    words = []
    for i in range(700, 49406):
        token = tokenizer.decoder[i]
        word = token.removesuffix("</w>")
        if (
            token.endswith("</w>")
            and len(word) >= 4
            and word.isascii()
            and word.isalpha()
            and word not in meant
        ):
            words.append(word)
            if len(words) == 1500:
                return words
    return words


def corpus(
    recipe: Pretraining, tokenizer, progress=True
) -> tuple[np.ndarray, np.ndarray]:
    """The pre-training world, cached on disk.

    Returns: images (N, 48, 48, 3) uint8, and token ids (N, CAPTIONS, LONGEST) uint16
    padded with 0.
    """
    folder = cache_folder("pretraining")
    stem = f"{WORLD_SEED}-{recipe.images}"
    image_file, caption_file = (
        folder / f"{stem}-images.npy",
        folder / f"{stem}-{hash_of(recipe.named)}-captions.npy",
    )
    picture_file = folder / f"{stem}-pictures.json"
    if not (image_file.exists() and picture_file.exists()):
        jobs = np.array_split(np.arange(recipe.images), max(1, recipe.images // 200))
        images, pictures = [], []
        with ProcessPoolExecutor() as pool:
            for some, what in tqdm(
                pool.map(_draw_many, jobs), "drawing", len(jobs), disable=not progress
            ):
                images.append(some)
                pictures += what
        write_atomically(
            picture_file,
            lambda f: f.write(json.dumps([asdict(p) for p in pictures]).encode()),
        )
        write_atomically(image_file, lambda f: np.save(f, np.concatenate(images)))
    if not caption_file.exists():
        pictures = [
            Picture(**p | {"bundle": tuple(p["bundle"])})
            for p in json.loads(picture_file.read_text())
        ]
        write_atomically(
            caption_file,
            lambda f: np.save(
                f, _captions(pictures, recipe.named, tokenizer, progress)
            ),
        )
    return np.load(image_file, mmap_mode="r"), np.load(caption_file, mmap_mode="r")


def _captions(pictures, named, tokenizer, progress) -> np.ndarray:
    words, probability = noise_words(tokenizer), {}
    total = sum(family.share for family in FAMILIES.values())
    for name, mean in named.items():
        family = FAMILIES[name]
        shown = (
            1e6
            * family.share
            / total
            * (0.65 if family.attributes else 1)
            / len(family.names)
        )  # of each class
        probability[name] = np.minimum(1, mean * exposure(family) / shown)
    ids = np.zeros((len(pictures), CAPTIONS, LONGEST), np.uint16)
    for n, picture in enumerate(tqdm(pictures, "captions", disable=not progress)):
        rng = random_generator(WORLD_SEED + 1, n)
        for k in range(CAPTIONS):
            of = (
                pictures[rng.integers(len(pictures))]
                if rng.random() < 0.04
                else picture
            )  # 4 % belong elsewhere
            name_it = (
                of.family in probability
                and of.label >= 0
                and rng.random() < probability[of.family][of.label]
            )
            tokens = tokenizer.encode(caption(of, rng, name_it, words))[: LONGEST - 2]
            ids[n, k, : len(tokens) + 2] = [
                tokenizer.sot_token_id,
                *tokens,
                tokenizer.eot_token_id,
            ]
    return ids


def hash_of(configuration) -> str:
    return hashlib.sha256(
        json.dumps(configuration, sort_keys=True).encode()
    ).hexdigest()[:10]


# --- the model in training ------------------------------------------------------------


def _attention(attn, x, mask):  # x: (N, n, D)
    q, k, v = (
        F.linear(x, attn.in_proj_weight, attn.in_proj_bias)
        .unflatten(-1, (3, attn.num_heads, -1))
        .permute(2, 0, 3, 1, 4)
    )
    if (
        x.device.type == "cpu"
    ):  # the fused kernel's backward is ten times slower in bf16 there
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


def image_features(
    model, images, keep: int
):  # images (N, 3, S, S) normalised -> (N, E)
    v = model.visual
    x = v.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, D)
    x = x + v.positional_embedding[1:].to(x.dtype)
    if keep < x.shape[1]:
        chosen = torch.rand(x.shape[:2], device=x.device).topk(keep, 1).indices
        x = x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
    start = (v.class_embedding + v.positional_embedding[0]).to(x.dtype)
    x = v.ln_pre(torch.cat([start.expand(len(x), 1, -1), x], 1))
    return v.ln_post(_blocks(v.transformer, x)[:, 0]) @ v.proj


def text_features(
    model, ids, groups=3
):  # ids (N, LONGEST), compact, 0 after EOT -> (N, E); in groups of like length
    length = (ids > 0).sum(1)
    order = length.argsort()
    out = []
    for part in order.chunk(groups):
        n = int(length[part].max())
        x = model.token_embedding(ids[part, :n]) + model.positional_embedding[:n]
        mask = torch.full((n, n), float("-inf"), device=ids.device, dtype=x.dtype).triu(
            1
        )
        x = _blocks(model.transformer, x, mask)
        x = model.ln_final(
            x[torch.arange(len(part), device=ids.device), length[part] - 1]
        )
        out.append(x @ model.text_projection)
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


def learning_rate(recipe: Pretraining, step: int, steps: int) -> float:
    """Warm-up, constant, cosine to zero over the last `decay` of the run."""
    start = steps * (1 - recipe.decay)
    if step < start:
        return recipe.lr * min(1, (step + 1) / recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (step - start) / (steps - start)))


def pretrain(
    name="mini",
    output=None,
    samples=None,
    device=None,
    resume=True,
    progress=True,
    images=None,
) -> Path:
    """Pre-train one mini CLIP and write its weights and recipe.

    Args:
        name: "mini" or "mini-teacher".
        output: folder for NAME.safetensors and NAME.json; the package's own `assets` by
            default.
        samples, images: other lengths than the recipe's.
        device: "cuda" if there is one, else "cpu".
        resume: go on from the checkpoint that an interrupted run of the same recipe
            left in the cache folder.

    Returns: the path of the weights.

    Raises:
        InputError: unknown name, or numbers that are not positive.
    """
    from open_clip import CLIP
    from open_clip.tokenizer import SimpleTokenizer

    from promptkit.mini_clip import ASSETS, IMAGE_MEAN, IMAGE_STD, export

    if name not in RECIPES:
        raise unknown("mini CLIP", name, RECIPES)
    for what, value in (("samples", samples), ("images", images)):
        if value is not None and value < 1000:
            raise InputError(f"{what} must be at least 1000, not {value}")
    recipe = RECIPES[name]
    recipe = Pretraining(
        **asdict(recipe)
        | {k: v for k, v in dict(samples=samples, images=images).items() if v}
    )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = SimpleTokenizer()
    pictures, captions = corpus(recipe, tokenizer, progress)

    rows = np.unique(
        np.concatenate([np.asarray(captions).ravel(), [0, *_task_tokens(tokenizer)]])
    ).astype(np.int64)
    compact = np.zeros(49408, np.int64)
    compact[rows] = np.arange(len(rows))  # 0 is "!", never used here: padding
    torch.manual_seed(recipe.seed)
    config = {
        k: v if not isinstance(v, dict) else dict(v) for k, v in recipe.model.items()
    }
    config["text_cfg"]["vocab_size"] = len(rows)
    model = CLIP(**config).to(device)
    matrices = [
        p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n
    ]
    others = [
        p
        for n, p in model.named_parameters()
        if (p.ndim <= 1 or "embedding" in n) and n != "logit_scale"
    ]
    groups = [
        (matrices, recipe.weight_decay, 1),
        (others, 0.0, 1),
        ([model.logit_scale], 0.0, 8),
    ]
    optimizer = torch.optim.AdamW(
        [dict(params=p, weight_decay=w, factor=f) for p, w, f in groups],
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=True,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    steps = recipe.samples // recipe.batch
    mean, std = (
        torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD)
    )
    patches = (48 // 8) ** 2
    checkpoint = (
        cache_folder("pretraining")
        / f"{name}-{hash_of([asdict(recipe), WORLD_SEED])}.pt"
    )
    first, losses, seconds = 0, [], 0.0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        first, losses, seconds = state["step"], state["losses"], state["seconds"]

    started = time.perf_counter()
    bar = tqdm(
        range(first, steps),
        f"pre-training {name}",
        initial=first,
        total=steps,
        disable=not progress,
        mininterval=5,
    )
    for step in bar:
        lr = learning_rate(recipe, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        chosen = torch.randint(
            len(pictures), (recipe.batch,), generator=generator
        ).numpy()
        which = torch.randint(CAPTIONS, (recipe.batch,), generator=generator).numpy()
        ids = torch.from_numpy(compact[captions[chosen, which]]).to(device)
        x = (
            torch.from_numpy(pictures[chosen]).to(device).permute(0, 3, 1, 2).float()
            / 255
        )
        x = (random_crops(x, generator) - mean) / std
        keep = (
            patches
            if step >= steps * (1 - recipe.full_patches)
            else int(patches * (1 - recipe.patch_dropout))
        )
        with torch.autocast(device.type, torch.bfloat16):
            f, t = image_features(model, x, keep), text_features(model, ids)
        f, t = F.normalize(f.float(), dim=-1), F.normalize(t.float(), dim=-1)
        logits = model.logit_scale.exp() * f @ t.T  # (N, N)
        target = torch.arange(len(f), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 49:
            losses.append(round(loss.item(), 4))
            bar.set_postfix(
                loss=f"{np.mean(losses[-10:]):.3f}",
                scale=f"{model.logit_scale.exp().item():.1f}",
            )
        if step % CHECKPOINT_EVERY == CHECKPOINT_EVERY - 1 or step == steps - 1:
            spent = seconds + time.perf_counter() - started
            state = dict(
                model=model.state_dict(), optimizer=optimizer.state_dict(),
                generator=generator.get_state(), step=step + 1, losses=losses,
                seconds=spent,
            )  # fmt: skip
            write_atomically(checkpoint, partial(torch.save, state))
    spent = seconds + time.perf_counter() - started
    threads = torch.get_num_threads() if device.type == "cpu" else None
    record = dict(
        recipe=asdict(recipe), world_seed=WORLD_SEED, seconds=round(spent),
        device=device.type, threads=threads, torch=torch.__version__.split("+")[0],
        loss_every_50_steps=losses,
    )  # fmt: skip
    path = export(model, rows, record, Path(output or ASSETS) / f"{name}.safetensors")
    record["zero_shot"] = zero_shot_accuracies(
        name, path
    )  # of the exported weights, for whoever checks them
    export(model, rows, record, path)
    os.remove(checkpoint)
    return path


def zero_shot_accuracies(name: str, path=None) -> dict[str, float]:
    """Zero-shot test accuracy in percent of each task, with the task's own template."""
    from promptkit.clip import FrozenCLIP, zero_shot_features
    from promptkit.data import MINI_TASKS, frozen_features, load_dataset
    from promptkit.mini_clip import IMAGE_MEAN, IMAGE_STD, build

    clip = FrozenCLIP(build(name, path), name=name, mean=IMAGE_MEAN, std=IMAGE_STD)
    found = {}
    for task in map(load_dataset, MINI_TASKS):
        weights = zero_shot_features(clip, task.classnames, task.template)  # (C, E)
        right = (frozen_features(clip, task.test) @ weights.T).argmax(
            -1
        ) == task.test.labels
        found[task.name] = round(100 * right.double().mean().item(), 2)
    return found


def _task_tokens(tokenizer) -> set[int]:
    """Token ids that the tasks' own texts use, beyond those of the drawn captions."""
    from promptkit.data.tasks import all_texts

    return {i for text in all_texts() for i in tokenizer.encode(text)}
