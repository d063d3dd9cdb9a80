"""Training: one readable loop over the hooks of a method, and what it measures."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from promptkit import data
from promptkit.data.content import ahead
from promptkit.errors import InputError
from promptkit.files import write_atomically
from promptkit.method import Batch, Method
from promptkit.recipe import Recipe, learning_rate

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adadelta": torch.optim.Adadelta,
}
TOKEN_ROOM = 1 << 30  # bytes of local tokens that are kept rather than made anew


class DivergedError(InputError):
    """The training loss is not a finite number any more."""


@dataclass
class History:
    """What a training run went through."""

    losses: list[float] = field(default_factory=list)  # one a step, before the step
    lrs: list[float] = field(default_factory=list)  # one an epoch
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)


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
    """Train a method on what it may learn from; the last epoch's parameters are its
    result.

    Everything random comes from ``seed``: the same seed gives the same bits on one
    machine. A recipe with stages is followed stage by stage. Images that are augmented
    are read ahead of the step by threads.

    Args:
        dataset: holds as many classes as the method aims at. The method sees no more of
            it than :func:`visible` says.
        recipe: from :func:`promptkit.registry.recipe`, or one's own. Its ``hparams``
            were for building the method and play no part here.
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
    method.begin(method.classnames)
    run = _identity(method, dataset, recipe, seed) if checkpoint else None
    saved = _read_checkpoint(checkpoint, run, method) if checkpoint else None
    dataset = visible(method, dataset)
    generator, history = torch.Generator().manual_seed(seed), History()
    if saved:
        history = History(**saved["history"])
    began = time.perf_counter() - history.seconds
    for stage, part in enumerate(recipe.parts()):
        if saved and stage < saved["stage"]:
            continue
        if saved:
            _load_state(method, saved["before"])
            generator.set_state(saved["before"]["generator"].cpu())
        before = _state(method) | {"generator": generator.get_state()}
        given = method.prepare(dataset, part, generator, stage)
        optimizer = make_optimizer(method, part)
        if optimizer is None or part.epochs == 0:
            continue
        if len(given.train) == 0:
            raise InputError(f"{dataset.name} has no training images")
        first = 0
        if saved:
            first = saved["epochs"]
            _load_state(method, saved["now"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["now"]["generator"].cpu())
            saved = None

        def keep(epochs, before=before, optimizer=optimizer, stage=stage):
            history.seconds = time.perf_counter() - began
            if checkpoint:
                now = _state(method) | {"generator": generator.get_state()}
                content = {"run": run, "stage": stage, "epochs": epochs}
                content |= {"before": before, "now": now, "history": asdict(history)}
                content |= {"optimizer": optimizer.state_dict()}
                write_atomically(checkpoint, lambda file: torch.save(content, file))

        name = method.spec + (f", stage {stage + 1}" if recipe.stages else "")
        left = math.inf if max_steps is None else max_steps
        _train(
            method, given.train, part, optimizer, generator, (seed, stage), history,
            first, left, keep, name, progress,
        )  # fmt: skip
    for name, p in method.named_parameters():
        if p.requires_grad and not p.isfinite().all():
            raise DivergedError(
                f"{name} of {method.spec} is not finite after training: lower lr, raise"
                " warmup_epochs, or use precision='fp32'"
            )
    if history.losses:
        history.seconds = time.perf_counter() - began
    method.eval()
    method.finish(dataset, recipe, generator)
    return history


def visible(method: Method, dataset):
    """What a method may learn from: no test images, no validation images where they are
    the test images, and labels only if its ``supervision`` names shots.
    """
    dataset = dataset.for_training()
    if "shots" in method.taught:
        return dataset
    return replace(dataset, train=dataset.unlabelled, val=dataset.val.take([]))


def _train(
    method, split, recipe, optimizer, generator, key, history, first, most, keep, name,
    progress,
):  # fmt: skip
    """One stage: its epochs from ``first`` on, up to ``most`` steps in all.

    What is drawn to read a batch (crops, flips, views) does not come from the generator
    that steps draw from, so that a batch can be read ahead: each epoch's comes from the
    run's seed, the stage and the epoch, which are ``key`` and its number.
    """
    method.train()
    drawing = torch.Generator()
    read = reader(method, split, generator, recipe, drawing)
    each = ahead if recipe.augment else map  # what is in memory is there at once
    per_epoch = recipe.steps(len(split))
    steps = recipe.epochs * per_epoch
    done = history.steps - first * per_epoch  # before this stage
    total = min(steps, most - done)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    with tqdm(
        total=total,
        initial=history.steps - done,
        desc=name,
        unit="step",
        disable=not progress,
    ) as bar:
        for epoch in range(first, recipe.epochs):
            if history.steps - done >= total:
                break
            history.lrs.append(
                learning_rate(recipe, epoch, share=epoch / recipe.epochs)
            )
            drawing.manual_seed(_number(*key, epoch))
            batches = shuffled(len(split), recipe.batch_size, generator)
            for batch in each(read, islice(batches, per_epoch)):
                if history.steps - done >= total:
                    break
                share = (history.steps - done) / steps
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, epoch, group["peak_lr"], share)
                batch = batch.to(method.clip.device)
                optimizer.zero_grad(set_to_none=True)
                loss = method.backward(batch).item()
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the loss of {method.spec} became {loss} at step"
                        f" {history.steps + 1} (epoch {epoch + 1} of {recipe.epochs},"
                        f" learning rate {history.lrs[-1]:g}): lower lr, raise"
                        " warmup_epochs, or use precision='fp32'"
                    )
                if recipe.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(learned, recipe.clip_norm)
                optimizer.step()
                history.losses.append(loss)
                bar.update()
            else:  # the epoch is whole
                method.end_epoch(epoch, recipe)
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                keep(epoch + 1)


def shuffled(n: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions of an epoch in random order, in batches; a last incomplete one is
    dropped unless alone.
    """
    batches = torch.randperm(n, generator=generator).split(batch_size)
    return iter(
        batches[:-1] if len(batches) > 1 and len(batches[-1]) < batch_size else batches
    )


def _number(*parts: int) -> int:
    """A seed made of several numbers."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def reader(
    method: Method,
    split,
    generator: torch.Generator,
    recipe: Recipe | None = None,
    drawing: torch.Generator | None = None,
) -> Callable[[Tensor], Batch]:
    """A function from positions (B,) in a split to a :class:`Batch` with what the
    method reads, in training or, without a recipe, at test time. Crops and views are
    drawn from ``drawing``, by default the generator that the batch carries.

    Without augmentation, what the frozen image tower makes of the split comes from the
    feature cache; its local tokens are made once where they fit.
    """
    clip, augment = method.clip, recipe is not None and recipe.augment
    reads = method.reads if recipe else method.reads_at_test or method.reads
    reads = reads.split("+")
    crop = {"crop": recipe.crop} if augment else {}
    drawing, kept = drawing or generator, {}
    if "features" in reads and not augment:
        kept["features"] = data.frozen_features(clip, split).to(clip.device)  # (N, E)
        patches = clip.image_tower.length - 1
        size = 4 * len(split) * patches * clip.embed_dim
        if "tokens" in reads and "images" not in reads and size <= TOKEN_ROOM:
            kept |= _local_tokens(clip, split)

    def read(indices):
        batch = Batch(
            labels=split.labels[indices], indices=indices, generator=generator
        )
        for name, values in kept.items():
            setattr(batch, name, values[indices.to(values.device)])
        if "texts" in reads:
            batch.texts = split.texts(indices)
            return batch
        frozen = batch.features is not None
        if "views" in reads:
            batch.views = method.views(split.images(indices), drawing)
        if (
            "images" in reads
            or ("features" in reads and not frozen)
            or ("tokens" in reads and batch.tokens is None)
        ):
            batch.images = data.transform(
                clip, split.images(indices), augment=augment, generator=drawing,
                **crop,
            )  # fmt: skip
        return batch

    return read


@torch.no_grad()
def _local_tokens(clip, split) -> dict[str, Tensor]:
    """Local tokens (N, P, E) of a split's images, and the attention to them (N, P)."""
    tokens, attention = [], []
    for rows in torch.arange(len(split)).split(64):
        images = data.transform(clip, split.images(rows))
        _, local, weights = clip.image(images, tokens=True, attention=True)
        tokens.append(local)
        attention.append(weights)
    return {"tokens": torch.cat(tokens), "attention": torch.cat(attention)}


def predictions(method: Method, split, batch_size: int = 100, seed: int = 0) -> Tensor:
    """Predicted labels (N,) of a split, on the CPU.

    Text features are computed once, frozen image features come from the cache, and
    methods that read views of each image draw from a generator seeded with ``seed``.
    """
    method.eval()
    read = reader(method, split, torch.Generator().manual_seed(seed))
    views = "views" in (method.reads_at_test or method.reads).split("+")
    batches = torch.arange(len(split)).split(8 if views else batch_size)
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
        "method": method.describe(),
        "data": dataset.identity,
        "recipe": asdict(recipe),
        "seed": seed,
    }
    text = json.dumps(run, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(method):
    """A method and the methods inside it, by their names in the module tree."""
    parts = method.named_modules()
    return [(name, part) for name, part in parts if isinstance(part, Method)]


def _state(method) -> dict:
    """A copy of what a method learned and remembers."""
    state = {name: value.clone() for name, value in method.state_dict().items()}
    kept = {name: dict(part.training_state) for name, part in _parts(method)}
    return {"method": state, "training_state": kept}


def _load_state(method, state) -> None:
    method.load_state_dict(state["method"])
    for name, part in _parts(method):
        part.training_state = dict(state["training_state"][name])


def _read_checkpoint(path, run, method) -> dict | None:
    """The checkpoint of an interrupted run, None if there is none."""
    if not Path(path).exists():
        return None
    try:
        saved = torch.load(path, map_location=method.clip.device, weights_only=True)
        mine = saved["run"] == run
        saved["stage"], saved["epochs"], saved["before"], saved["now"]
    except Exception as error:
        raise InputError(
            f"damaged checkpoint {path} ({type(error).__name__}): delete it to start"
            " over"
        ) from None
    if not mine:
        raise InputError(
            f"checkpoint {path} belongs to another run: delete it, or name another file"
        )
    return saved
