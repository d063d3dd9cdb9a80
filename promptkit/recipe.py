"""What a paper's recipe is and what it depends on; its schedule; its form for the mini
world.

Below the methods, which state their papers' recipes, and the training loop, which
follows them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from promptkit.errors import InputError, expect, unknown

PROTOCOLS = ("few-shot", "base-to-new", "cross-dataset", "domain-generalization")
TRANSFER = PROTOCOLS[2:]  # train on one dataset, tested on others
PROFILES = ("smoke", "mini", "full")
OPTIMIZERS = ("sgd", "adam", "adamw", "adadelta")
SCHEDULES = ("cosine", "cosine-steps", "constant")
WARMUPS = ("constant", "linear")

# The mini world, see for_profile().
# Times the paper's; optimizers that are not named rescale the gradient themselves: 1
MINI_LR = {"sgd": 12.0}
MINI_EPOCHS = 5  # the paper's divided by this,
MINI_LEAST_EPOCHS = 10  # but no fewer than these, or than the paper's if it has fewer
MINI_BATCHES = (8, 32)  # the smallest and the largest batch
SMOKE_EPOCHS = 2  # of one step each


@dataclass(frozen=True)
class Recipe:
    """How a method is trained: its hyperparameters in a setting, and the optimisation.

    Args:
        hparams: hyperparameters of the method; those left out keep their defaults.
        epochs: 0 for methods that learn nothing.
        epoch_steps: an epoch ends after so many steps; None: when it has seen all.
        batch_size: images (or texts) a step.
        optimizer: "sgd", "adam", "adamw" or "adadelta".
        lr: peak learning rate.
        momentum: of SGD.
        options: further arguments of the optimizer, such as ``{"eps": 1e-3}``.
        schedule: "cosine" or "constant", stepped once an epoch after the warm-up, or
            "cosine-steps", a cosine to 0 over all steps; see :func:`learning_rate`.
        warmup_epochs, warmup_lr: the first epochs run at this rate.
        warmup: "constant", or "linear": only epoch 0 does, epoch e runs at lr e / W.
        clip_norm: the largest norm of the gradient of all parameters; None: any.
        augment: random resized crop and flip of the training images. Without it, image
            features of a method that reads features are computed once and cached, as
            in the mini and smoke profiles.
        crop: smallest and largest share of the area that such a crop takes.
        objects: what the method stands on beside its backbone, by name: a teacher as
            "METHOD@MODEL", such as "promptsrc@mini-teacher", a backbone as "@MODEL"; or
            ``{"method": "METHOD@MODEL", ...}`` with what its own recipe is changed by.
        stages: recipes of the stages that follow this one, in order (CasPL, LoGoPrompt,
            UPL's ensemble): each with its own data, optimizer and schedule. See
            ``Method.prepare``.
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
    warmup: str = "constant"
    clip_norm: float | None = None
    augment: bool = True
    crop: tuple[float, float] = (0.08, 1.0)
    objects: dict[str, Any] = field(default_factory=dict)
    stages: tuple["Recipe", ...] = ()

    def __post_init__(self):
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("warmup", WARMUPS),
        ):
            if getattr(self, name) not in choices:
                raise unknown(name, getattr(self, name), choices)
        for name, least in (
            ("epochs", 0),
            ("epoch_steps", 1),
            ("batch_size", 1),
            ("warmup_epochs", 0),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            fits = whole and value >= least or (name == "epoch_steps" and value is None)
            expect(fits, name, value, f"a whole number from {least}")
        for name in ("lr", "momentum", "weight_decay", "warmup_lr", "clip_norm"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            fits = number and math.isfinite(value) and value >= 0
            fits = fits or (name == "clip_norm" and value is None)
            expect(fits, name, value, "a number that is not negative")
        expect(isinstance(self.augment, bool), "augment", self.augment, "true or false")
        low, high = self.crop
        expect(0 < low <= high <= 1, "crop", self.crop, "two shares from above 0 to 1")

    def steps(self, examples: int) -> int:
        """How many steps an epoch over so many examples takes."""
        whole = max(examples // self.batch_size, 1)
        return min(whole, self.epoch_steps or whole)

    def parts(self) -> Iterator["Recipe"]:
        """This stage alone, then those that follow it."""
        yield replace(self, stages=())
        for stage in self.stages:
            yield from stage.parts()

    @property
    def trains(self) -> bool:
        """Whether any stage has an epoch."""
        return any(part.epochs for part in self.parts())


@dataclass(frozen=True)
class Host:
    """The host of a plug-in, as far as the plug-in's recipe may ask.

    Attributes:
        spec: such as "atprompt(maple)".
        names: its methods, outermost first: ("atprompt", "maple").
        recipe: its own recipe in the setting.
    """

    spec: str
    names: tuple[str, ...]
    recipe: Recipe


@dataclass(frozen=True)
class Setting:
    """What a recipe depends on.

    Args:
        protocol: "few-shot", "base-to-new", "cross-dataset" or "domain-generalization".
        dataset: name of the dataset trained on.
        shots: images a class.
        profile: "full" is the paper's recipe; "mini" and "smoke" are derived from it by
            :func:`for_profile`.
        hparams: those that were asked for, where a recipe depends on them
            (Tip-Adapter's fine-tuning, AWT's few-shot form).
        host: a plug-in's host, None elsewhere.
    """

    protocol: str = "few-shot"
    dataset: str = "mini"
    shots: int = 16
    profile: str = "mini"
    hparams: dict[str, Any] = field(default_factory=dict)
    host: Host | None = None

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise unknown("protocol", self.protocol, PROTOCOLS)
        if self.profile not in PROFILES:
            raise unknown("profile", self.profile, PROFILES)
        if not isinstance(self.shots, int) or self.shots < 0:
            raise InputError(f"shots must be a whole number, got {self.shots!r}")

    @property
    def transfer(self) -> bool:
        """Whether it is trained on one dataset and tested on others."""
        return self.protocol in TRANSFER


def for_profile(recipe: Recipe, profile: str) -> Recipe:
    """A paper's recipe, changed for the mini world by one rule that is the same for
    every method.

    The mini CLIP's logit scale is about 14 where OpenAI's is 100, so gradients are
    small and SGD takes steps that are too small by far: "mini" multiplies its learning
    rate by 12 (0.002 becomes 0.024). The tasks are small: it divides the epochs by 5,
    but keeps 10 of them, and batches hold 8 to 32 images. It leaves out augmentation,
    so that image features can be cached. "smoke" is "mini" with 2 epochs of one step,
    tested on every fifth image. "full" changes nothing. Stages follow the same rule.
    """
    if profile == "full":
        return recipe
    stages = tuple(for_profile(stage, profile) for stage in recipe.stages)
    if recipe.epochs == 0:
        return replace(recipe, stages=stages)
    epochs = max(recipe.epochs // MINI_EPOCHS, min(recipe.epochs, MINI_LEAST_EPOCHS))
    smallest, largest = MINI_BATCHES
    return replace(
        recipe,
        epochs=min(epochs, SMOKE_EPOCHS) if profile == "smoke" else epochs,
        epoch_steps=1 if profile == "smoke" else recipe.epoch_steps,
        batch_size=min(max(recipe.batch_size, smallest), largest),
        lr=recipe.lr * MINI_LR.get(recipe.optimizer, 1.0),
        augment=False,
        stages=stages,
    )


def learning_rate(
    recipe: Recipe, epoch: int, lr: float | None = None, share: float = 0.0
) -> float:
    r"""Learning rate of an epoch e = 0, 1, ..., as the benchmark's toolbox computes it.

    For W warm-up epochs and E epochs: ``warmup_lr`` if e < W (linear: if e = 0, then
    ``lr * e / W``), else ``lr / 2 * (1 + cos(pi * (e - W) / E))``. The cosine starts
    after the warm-up and has the period E, so it never reaches 0. "cosine-steps" is
    ``lr / 2 * (1 + cos(pi * share))`` at each step.

    Args:
        lr: peak learning rate of a parameter group, ``recipe.lr`` if None.
        share: of the stage's steps that are done, for "cosine-steps".
    """
    lr, W = recipe.lr if lr is None else lr, recipe.warmup_epochs
    if epoch < W:
        return (
            lr * epoch / W if recipe.warmup == "linear" and epoch else recipe.warmup_lr
        )
    if recipe.schedule == "constant":
        return lr
    if recipe.schedule == "cosine-steps":
        return 0.5 * lr * (1 + math.cos(math.pi * share))
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - W) / recipe.epochs))
