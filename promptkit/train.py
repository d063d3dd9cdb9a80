"""Training: what a paper's recipe is, its schedule, and one readable loop over the
hooks of a method.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from promptkit import data
from promptkit.errors import InputError, unknown
from promptkit.files import write_atomically
from promptkit.method import Batch, Method, expect, methods, parse

PROTOCOLS = ("few-shot", "base-to-new", "cross-dataset", "domain-generalization")
PROFILES = ("smoke", "mini", "full")
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adadelta": torch.optim.Adadelta,
}

# The mini world, see for_profile().
MINI_LR = {
    "sgd": 12.0
}  # times the paper's; optimizers that are not named rescale the gradient themselves: 1
MINI_EPOCHS = 5  # the paper's divided by this,
MINI_LEAST_EPOCHS = 10  # but no fewer than these, or than the paper's if it has fewer
MINI_BATCHES = (8, 32)  # the smallest and the largest batch
SMOKE_EPOCHS = 2  # of one step each


class DivergedError(InputError):
    """The training loss is not a finite number any more."""


@dataclass(frozen=True)
class Setting:
    """What a recipe depends on.

    Args:
        protocol: "few-shot", "base-to-new", "cross-dataset" or "domain-generalization".
        dataset: name of the dataset trained on.
        shots: images a class.
        profile: "full" is the paper's recipe; "mini" and "smoke" are derived from it by
            :func:`for_profile`.
    """

    protocol: str = "few-shot"
    dataset: str = "mini"
    shots: int = 16
    profile: str = "mini"

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise unknown("protocol", self.protocol, list(PROTOCOLS))
        if self.profile not in PROFILES:
            raise unknown("profile", self.profile, list(PROFILES))


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: its hyperparameters in a setting, and the optimisation.

    Args:
        hparams: hyperparameters of the method; those left out keep their defaults.
        epochs: 0 for methods that learn nothing.
        epoch_steps: an epoch ends after so many steps; None: when it has seen all
            images.
        optimizer: "sgd", "adam", "adamw" or "adadelta".
        options: further arguments of the optimizer, such as ``{"eps": 1e-3}``.
        schedule: "cosine" or "constant", stepped once an epoch after the warm-up, see
            :func:`learning_rate`.
        augment: random resized crop and flip of the training images. Without it, image
            features of a method that reads features are computed once and cached, as in
            the mini and smoke profiles.
    """

    hparams: dict[str, Any] = field(default_factory=dict)
    epochs: int = 50
    epoch_steps: int | None = None
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 5e-4
    options: dict[str, Any] = field(default_factory=dict)
    schedule: str = "cosine"
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    augment: bool = True

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, list(OPTIMIZERS))
        if self.schedule not in ("cosine", "constant"):
            raise unknown("schedule", self.schedule, ["cosine", "constant"])
        for name, least in (
            ("epochs", 0),
            ("epoch_steps", 1),
            ("batch_size", 1),
            ("warmup_epochs", 0),
        ):
            value = getattr(self, name)
            fits = (
                isinstance(value, int)
                and value >= least
                or (name == "epoch_steps" and value is None)
            )
            expect(fits, name, value, f"a whole number from {least}")
        for name in ("lr", "momentum", "weight_decay", "warmup_lr"):
            value = getattr(self, name)
            expect(
                math.isfinite(value) and value >= 0,
                name,
                value,
                "a number that is not negative",
            )

    def steps(self, images: int) -> int:
        """How many steps an epoch over so many images takes."""
        return min(max(images // self.batch_size, 1), self.epoch_steps or images)


@dataclass
class History:
    """What a training run went through."""

    losses: list[float] = field(default_factory=list)  # one a step, before the step
    lrs: list[float] = field(default_factory=list)  # one an epoch
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)


def recipe(spec: str, setting: Setting) -> Recipe:
    """The recipe of a method, or of plug-ins around one, in a setting and in its
    profile.

    Raises:
        InputError: unknown method.
    """
    name, host = parse(spec)
    return for_profile(methods()[name].recipe(setting, host), setting.profile)


def for_profile(recipe: Recipe, profile: str) -> Recipe:
    """A paper's recipe, changed for the mini world by one rule that is the same for
    every method.

    The mini CLIP's logit scale is about 14 where OpenAI's is 100, so gradients are
    small and SGD takes steps that are too small by far: "mini" multiplies its learning
    rate by 12 (0.002 becomes 0.024). The tasks are small: it divides the epochs by 5,
    but keeps 10 of them, and batches hold 8 to 32 images. It leaves out augmentation,
    so that image features can be cached. "smoke" is "mini" with 2 epochs of one step,
    tested on every fifth image. "full" changes nothing.
    """
    if profile == "full" or recipe.epochs == 0:
        return recipe
    epochs = max(recipe.epochs // MINI_EPOCHS, min(recipe.epochs, MINI_LEAST_EPOCHS))
    smallest, largest = MINI_BATCHES
    return replace(
        recipe,
        epochs=min(epochs, SMOKE_EPOCHS) if profile == "smoke" else epochs,
        epoch_steps=1 if profile == "smoke" else recipe.epoch_steps,
        batch_size=min(max(recipe.batch_size, smallest), largest),
        lr=recipe.lr * MINI_LR.get(recipe.optimizer, 1.0),
        augment=False,
    )


def learning_rate(recipe: Recipe, epoch: int, lr: float | None = None) -> float:
    """Learning rate of an epoch e = 0, 1, ..., as the benchmark's toolbox computes it.

    For W warm-up epochs and E epochs: ``warmup_lr`` if e < W, else ``lr / 2 * (1 +
    cos(pi * (e - W) / E))``. The cosine starts after the warm-up and has the period E,
    so it never reaches 0.

    Args:
        lr: peak learning rate of a parameter group, ``recipe.lr`` if None.
    """
    lr = recipe.lr if lr is None else lr
    if epoch < recipe.warmup_epochs:
        return recipe.warmup_lr
    if recipe.schedule == "constant":
        return lr
    return (
        0.5
        * lr
        * (1 + math.cos(math.pi * (epoch - recipe.warmup_epochs) / recipe.epochs))
    )


def make_optimizer(method: Method, recipe: Recipe) -> torch.optim.Optimizer | None:
    """The recipe's optimizer over the method's parameter groups, or None where nothing
    learns.
    """
    groups = [group for group in method.param_groups(recipe) if group["params"]]
    if not groups:
        return None
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, **recipe.options}
    if recipe.optimizer == "sgd":
        options["momentum"] = recipe.momentum
    optimizer = OPTIMIZERS[recipe.optimizer](groups, **options)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def fit(
    method: Method,
    dataset,
    recipe: Recipe,
    seed: int = 1,
    *,
    progress: bool = True,
    checkpoint: str | Path | None = None,
    max_steps: int | None = None,
) -> History:
    """Train a method on ``dataset.train``; the last epoch's parameters are its result.

    Everything random comes from one generator seeded with ``seed``: the same seed gives
    the same bits on one machine.

    Args:
        dataset: holds as many classes as the method aims at.
        recipe: from :func:`recipe`, or one's own. Its ``hparams`` were for building the
            method and play no part here.
        progress: show a progress bar.
        checkpoint: a file, written after each epoch. If it exists, training goes on
            from it and ends with the same bits as if it had never stopped.
        max_steps: stop after so many steps.

    Returns:
        Losses, learning rates and time. Empty for a method that learns nothing.

    Raises:
        DivergedError: the loss became infinite or NaN; the method keeps the parameters
            before that step.
        InputError: dataset and method differ in their classes, or the checkpoint is
            damaged or of another run.
    """
    if len(dataset.classnames) != len(method.classnames):
        raise InputError(
            f"{method.spec} aims at {len(method.classnames)} classes, {dataset.name}"
            f" has {len(dataset.classnames)}: call method.aim(dataset) first"
        )
    generator, device, history = (
        torch.Generator().manual_seed(seed),
        method.clip.device,
        History(),
    )
    run = _identity(method, dataset, recipe, seed) if checkpoint else None
    dataset = method.prepare(dataset, recipe, generator)
    optimizer = make_optimizer(method, recipe)
    if optimizer is None or recipe.epochs == 0:
        return history
    if len(dataset.train) == 0:
        raise InputError(f"{dataset.name} has no training images")
    start = (
        _resume(checkpoint, run, method, optimizer, generator, history)
        if checkpoint
        else 0
    )

    split = dataset.train
    method.train()
    read = reader(method, split, recipe.augment, generator)
    per_epoch = recipe.steps(len(split))
    total = min(recipe.epochs * per_epoch, max_steps or math.inf)
    began = time.perf_counter() - history.seconds
    with tqdm(
        total=total,
        initial=history.steps,
        desc=method.spec,
        unit="step",
        disable=not progress,
    ) as bar:
        for epoch in range(start, recipe.epochs):
            if history.steps >= total:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, epoch, group["peak_lr"])
            history.lrs.append(learning_rate(recipe, epoch))
            for indices in islice(
                shuffled(len(split), recipe.batch_size, generator), per_epoch
            ):
                if history.steps >= total:
                    break
                batch = read(indices).to(device)
                optimizer.zero_grad(set_to_none=True)
                loss = method.backward(batch).item()
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the loss of {method.spec} became {loss} at step"
                        f" {history.steps + 1} (epoch {epoch + 1} of {recipe.epochs},"
                        f" learning rate {history.lrs[-1]:g}): lower lr, raise"
                        " warmup_epochs, or use precision='fp32'"
                    )
                optimizer.step()
                history.losses.append(loss)
                bar.update()
            else:  # the epoch is whole
                method.end_epoch(epoch, recipe)
                history.seconds = time.perf_counter() - began
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                if checkpoint:
                    _save_checkpoint(
                        checkpoint,
                        run,
                        method,
                        optimizer,
                        generator,
                        history,
                        epoch + 1,
                    )
    history.seconds = time.perf_counter() - began
    method.eval()
    return history


def shuffled(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of an epoch in random order, in batches; a last incomplete one is
    dropped unless alone.
    """
    batches = torch.randperm(n, generator=generator).split(batch_size)
    return iter(
        batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches
    )


def reader(method: Method, split, augment: bool, generator: torch.Generator):
    """A function from positions (B,) in a split to a :class:`Batch` with what the
    method reads.

    Without augmentation, what the frozen image tower makes of the split comes from the
    feature cache.
    """
    clip, reads, frozen = method.clip, method.reads.split("+"), None
    if "features" in reads and not augment:
        frozen = data.frozen_features(clip, split).to(clip.device)  # (N, E)

    def read(indices):
        batch = Batch(
            labels=split.labels[indices], indices=indices, generator=generator
        )
        if frozen is not None:
            batch.features = frozen[indices.to(clip.device)]
        if "views" in reads:
            batch.views = method.views(split.images(indices), generator)
        elif "images" in reads or frozen is None:
            batch.images = data.transform(
                clip, split.images(indices), augment=augment, generator=generator
            )
        return batch

    return read


def predictions(method: Method, split, batch_size: int = 100, seed: int = 0) -> Tensor:
    """Predicted labels (N,) of a split, on the CPU.

    Text features are computed once, frozen image features come from the cache, and
    methods that adapt to each image (``reads = "views"``) draw from a generator seeded
    with ``seed``.
    """
    method.eval()
    read = reader(method, split, False, torch.Generator().manual_seed(seed))
    batches = torch.arange(len(split)).split(
        8 if method.reads == "views" else batch_size
    )
    return torch.cat(
        [method.logits(read(indices)).argmax(dim=-1).cpu() for indices in batches]
    )


def accuracy(method: Method, split, batch_size: int = 100, seed: int = 0) -> float:
    """Top-1 accuracy in percent over all images of a split, see :func:`predictions`."""
    if len(split) == 0:
        raise InputError("there are no images to measure an accuracy on")
    hits = predictions(method, split, batch_size, seed) == split.labels.cpu()
    return 100.0 * hits.double().mean().item()


# --- checkpoints ----------------------------------------------------------------------


def _identity(method, dataset, recipe, seed) -> str:
    """What must agree for one run to go on from another's checkpoint."""
    run = {
        "method": method.spec,
        "hparams": method.hparams,
        "classnames": method.classnames,
        "clip": method.clip.fingerprint,
        "train": [
            dataset.train.key,
            dataset.train.rows.tolist(),
            dataset.train.labels.tolist(),
        ],
        "recipe": asdict(recipe),
        "seed": seed,
    }
    return hashlib.sha256(
        json.dumps(run, sort_keys=True, default=str).encode()
    ).hexdigest()


def _parts(method):
    """A method and the hosts inside it, by their names in the module tree."""
    return [
        (name, part)
        for name, part in method.named_modules()
        if isinstance(part, Method)
    ]


def _save_checkpoint(path, run, method, optimizer, generator, history, epochs):
    state = {
        "run": run,
        "epochs": epochs,
        "method": method.state_dict(),
        "training_state": {name: part.training_state for name, part in _parts(method)},
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        "history": asdict(history),
    }
    write_atomically(path, lambda file: torch.save(state, file))


def _resume(path, run, method, optimizer, generator, history) -> int:
    """Restore everything from a checkpoint, if there is one; returns how many epochs
    are done.
    """
    if not Path(path).exists():
        return 0
    try:
        state = torch.load(path, map_location=method.clip.device, weights_only=True)
        mine = state["run"] == run
    except Exception as error:
        raise InputError(
            f"damaged checkpoint {path} ({type(error).__name__}): delete it to start"
            " over"
        ) from None
    if not mine:
        raise InputError(
            f"checkpoint {path} belongs to another run: delete it, or name another file"
        )
    method.load_state_dict(state["method"])
    for name, part in _parts(method):
        part.training_state = state["training_state"][name]
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"].cpu())
    for name, value in state["history"].items():
        setattr(history, name, value)
    return state["epochs"]
