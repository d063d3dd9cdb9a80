"""The four protocols of the benchmark, from a method's name to tidy rows of results,
and grids of such runs.

Zero-shot CLIP goes through the same functions; it has neither shots nor a seed, its
rows say 0 for both. The test images are read once, after training: nothing is chosen by
them. :func:`tune` searches on validation images alone.
"""

import ast
import dataclasses
import hashlib
import inspect
import itertools
import json
import platform
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import metadata

import pandas as pd
import torch
from tqdm import tqdm

from promptkit import data, probe, train
from promptkit.clip import FrozenCLIP, load_clip
from promptkit.errors import InputError, unknown
from promptkit.method import (
    Method,
    Plugin,
    build,
    load_method,
    methods,
    nesting,
    parse,
    specs,
)
from promptkit.results import (
    TRANSFER,
    config_hash,
    find_run,
    harmonic_mean,
    newest,
    results_dir,
    run_rows,
    save_run,
    write_text,
)  # fmt: skip
from promptkit.train import PROTOCOLS, History, Recipe, Setting, accuracy, fit
from promptkit.workers import parallel, with_absolute_paths

PROBE = (  # the baseline of the few-shot figures: no method, but measured and stored like one
    "linear-probe"
)
RECIPE_FIELDS = {f.name for f in dataclasses.fields(Recipe)} - {"hparams"}


class SweepError(RuntimeError):
    """Some runs of a grid failed; all others are stored."""


@dataclass(frozen=True)
class Run:
    """One run, as it is asked for.

    Args:
        protocol: "few-shot", "base-to-new", "cross-dataset" or "domain-generalization".
        method: a registered name, or plug-ins around one such as "dept(maple)".
        dataset: name of a dataset or a Dataset: the one that is trained on.
        targets: names or Datasets that a cross-dataset run is tested on.
        shots, seed: training images a class; seed of the draw, of the initial values
            and of the training order.
        clip: name of a model for :func:`promptkit.clip.load_clip`, or a FrozenCLIP.
        profile: "smoke", "mini" or "full", see :func:`promptkit.train.for_profile`.
        overrides: fields of the recipe (lr, epochs, ...) and hyperparameters of the
            method, by name.
        max_steps: stop training after so many steps.
        root: folder of the real datasets.
    """

    protocol: str
    method: str
    dataset: object
    targets: tuple = ()
    shots: int = 16
    seed: int = 1
    clip: object = "mini"
    pretrained: str | None = None
    device: str | None = None
    precision: str = "fp32"
    profile: str = "mini"
    overrides: dict = field(default_factory=dict)
    max_steps: int | None = None
    root: str | None = None

    @property
    def portable(self) -> bool:
        """Whether another process can take it over: it holds names, not a model or
        data.
        """
        return all(
            isinstance(part, str) for part in (self.clip, self.dataset, *self.targets)
        )


@dataclass
class Plan:
    """A run with everything at hand that it needs, and the configuration that its hash
    is made of.
    """

    run: Run
    clip: FrozenCLIP
    source: object  # the Dataset trained on, all of it
    targets: list  # Datasets tested on beside it
    recipe: Recipe
    config: dict

    def training_set(self):
        """The drawn few shots, for base-to-new those of the base classes."""
        shots = self.config["shots"]
        drawn = (
            data.few_shot(self.source, shots, self.run.seed) if shots else self.source
        )
        return data.base_new(drawn)[0] if self.run.protocol == "base-to-new" else drawn

    def build(self, dataset) -> Method:
        """The method with its initial values, aimed at a dataset."""
        seed = self.config["seed"]
        method = build(
            self.run.method,
            self.clip,
            dataset.classnames,
            seed=seed,
            **self.recipe.hparams,
        )
        method.aim(dataset)
        return method

    def steps(self, images: int) -> int:
        """How many steps the training on so many images takes."""
        steps = self.recipe.steps(images) * self.recipe.epochs
        return min(steps, self.run.max_steps or steps)

    def describe(self) -> dict[str, str]:
        """What is about to happen, for people."""
        dataset = self.training_set()
        learned = 0 if self.run.method == PROBE else self.build(dataset).n_parameters
        out = {
            "method": f"{self.run.method} {self.recipe.hparams or ''}".strip(),
            "protocol": f"{self.run.protocol}, profile {self.run.profile}",
            "model": (
                f"{self.config['model']} on {self.clip.device},"
                f" {self.config['clip']['precision']}"
            ),
            "data": (
                f"{self.source.name}, {len(dataset.classnames)} classes"
                + (
                    f"; tested on {', '.join(t.name for t in self.targets)}"
                    if self.targets
                    else ""
                )
            ),
        }
        if self.recipe.epochs and learned:
            images, batch = len(dataset.train), self.recipe.batch_size
            steps = self.steps(images)
            out["shots"] = (
                f"{self.run.shots} a class, {images} images; seed {self.run.seed}"
            )
            out["training"] = (
                f"{self.recipe.epochs} epochs, {steps} steps of {min(batch, images)}, "
            )
            out["training"] += (
                f"{self.recipe.optimizer}, learning rate {self.recipe.lr:g}"
            )
        if self.run.method == PROBE:
            learned = len(dataset.classnames) * (self.clip.embed_dim + 1)
        return out | {"parameters": f"{learned:,}"}


def estimate(plan: Plan) -> dict[str, str]:
    """Time and memory of a run's training, for people: two steps are made to measure
    them, and nothing is kept.

    Testing, and features that are computed once before, come on top of the time.
    """
    dataset, run = plan.training_set(), plan.run
    method = None if run.method == PROBE else plan.build(dataset)
    if method is None or not (plan.recipe.epochs and method.n_parameters):
        return {}
    device, generator = torch.device(plan.clip.device), torch.Generator().manual_seed(0)
    dataset = method.prepare(dataset, plan.recipe, generator)
    batch = min(plan.recipe.batch_size, len(dataset.train))
    steps = plan.steps(len(dataset.train))
    few = replace(
        dataset, train=dataset.train.take(range(batch))
    )  # features of these alone, not of the whole set
    read = train.reader(method.train(), few.train, plan.recipe.augment, generator)
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        method.backward(read(torch.arange(batch)).to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    memory = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else _peak_memory()
    )
    minutes = steps * seconds / 60
    spent = f"{60 * minutes:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes"
    spent = spent if minutes < 90 else f"{minutes / 60:.1f} hours"
    return {
        "estimate": (
            f"about {spent} of training"
            + (f", {memory / 2**30:.1f} GiB" if memory else "")
        )
    }


def _peak_memory() -> int | None:
    """Bytes of main memory that this process has held at most, where the system
    tells.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def few_shot(
    method: str, dataset, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on ``shots`` images of every class and test on all test images.

    Args:
        method: a registered name, plug-ins around one such as "dept(maple)", or
            "linear-probe".
        dataset: name of a dataset, or a Dataset.
        shots, seed: training images a class; seed of the draw, of the initial values
            and of the training order.
        clip: name of a model, or a FrozenCLIP.
        options: other fields of :class:`Run` (profile, max_steps, ...); ``results``
            (folder, False for none), ``force`` (run again what is stored), ``progress``
            and ``save`` (a file for the trained method) of
            :func:`execute`; and by their own names fields of the recipe (epochs, lr,
            ...) and hyperparameters of the method (n_ctx, ...).

    Returns:
        Tidy rows with the columns ``promptkit.results.COLUMNS``; here one, split "all".
        Accuracies are in percent.

    Raises:
        InputError: a name, an option or the data cannot be used.
    """
    return _single("few-shot", method, dataset, shots, seed, clip, options)


def base_to_new(
    method: str, dataset, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on the base classes, test on base and on new classes, each among its own
    names.

    The images are drawn over all classes before the base classes are selected, as in
    the few-shot protocol. The arguments are those of :func:`few_shot`; the rows are
    "base", "new" and "hm", their harmonic mean.
    """
    return _single("base-to-new", method, dataset, shots, seed, clip, options)


def cross_dataset(
    method: str, source, targets: Iterable, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on all classes of a source and test on it and on other datasets, re-aimed
    at their classes.

    The other arguments are those of :func:`few_shot`; there is a row for the source and
    one for each target.
    """
    return _single(
        "cross-dataset",
        method,
        source,
        shots,
        seed,
        clip,
        options | {"targets": tuple(targets)},
    )


def domain_generalization(
    method: str, dataset, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on all classes of a source and test on it and on its shifted versions (its
    ``shifts``).

    The arguments are those of :func:`few_shot`; there is a row for the source and one
    for each shift.
    """
    return _single("domain-generalization", method, dataset, shots, seed, clip, options)


def _single(protocol, method, dataset, shots, seed, clip, options):
    execution = {
        key: options.pop(key)
        for key in ("results", "force", "progress", "save")
        if key in options
    }
    return execute(
        _run(protocol, method, dataset, shots, seed, clip, options), **execution
    )


def _run(protocol, method, dataset, shots, seed, clip, options):
    known = {f.name for f in dataclasses.fields(Run)} - {"overrides"}
    named = {
        key: value for key, value in options.items() if key not in known | {"overrides"}
    }
    overrides = options.get("overrides", {}) | named
    fields = {key: value for key, value in options.items() if key in known}
    return Run(
        protocol,
        method,
        dataset,
        shots=shots,
        seed=seed,
        clip=clip,
        overrides=overrides,
        **fields,
    )


# --- one run --------------------------------------------------------------------------


def prepare(run: Run) -> Plan:
    """Load what a run needs, check it, and write down its whole configuration.

    The configuration holds the method with its hyperparameters, recipe and code, the
    images, the draw, the weights and the profile; not the machine and the versions of
    libraries, which a result notes beside it.

    Raises:
        InputError: unknown names, or shots, seed or hyperparameters that do not fit.
    """
    for key, least in (("shots", 1), ("seed", 0), ("max_steps", 1)):
        value = getattr(run, key)
        if value is not None and (not isinstance(value, int) or value < least):
            raise InputError(
                f"{key} must be a whole number from {least}, got {value!r}"
            )
    source = _dataset(run.dataset, run.root)
    targets = _targets(run, source)
    run, recipe, untrained = _resolve(run, source)
    zero_shot = (
        untrained and methods()[parse(run.method)[0]].kind == "zero-shot"
    )  # nothing in it is random either
    clip = run.clip
    if not isinstance(clip, FrozenCLIP):
        clip = _clip(clip, run.pretrained, run.device, run.precision)
    config = {
        "method": run.method.replace(" ", ""),
        "overrides": run.overrides,
        "recipe": asdict(recipe),
        "code": _code(run.method),
        "protocol": run.protocol,
        "dataset": source.name,
        "images": {dataset.name: _images(dataset) for dataset in (source, *targets)},
        "targets": [target.name for target in targets],
        "shots": 0 if untrained else run.shots,
        "seed": 0 if zero_shot else run.seed,
        "profile": run.profile,
        "max_steps": run.max_steps,
        "model": (
            clip.name
            if clip.pretrained in (None, "", clip.name)
            else f"{clip.name}/{clip.pretrained}"
        ),
        "clip": {"fingerprint": clip.fingerprint, "precision": clip.precision},
    }
    if run.max_steps is not None:
        config["overrides"] = run.overrides | {"max_steps": run.max_steps}
    return Plan(
        run, clip, source, targets, recipe, json.loads(json.dumps(config, default=str))
    )


def _targets(run, source):
    """The datasets that a run is tested on beside its source."""
    if run.protocol == "domain-generalization":
        targets = _shifts(source, run.root)
        if not targets:
            raise InputError(
                f"{source.name} has no shifted versions to measure"
                " domain-generalization on"
            )
        return targets
    if bool(run.targets) != (run.protocol == "cross-dataset"):
        raise InputError(
            "a cross-dataset run needs targets to be tested on, and no other run"
            " takes any"
        )
    targets = [_dataset(target, run.root) for target in run.targets]
    if source.name in [target.name for target in targets]:
        raise InputError(f"{source.name} is the source, so it cannot be a target too")
    return targets


def _resolve(run, source):
    """The run without what does not concern its method, the recipe, and whether it
    needs no training images.
    """
    setting = Setting(run.protocol, source.name, run.shots, run.profile)
    if run.method == PROBE:
        if run.protocol != "few-shot":
            raise InputError(
                "a linear probe knows no new classes: measure it by few-shot, not"
                f" {run.protocol}"
            )
        if run.overrides:
            raise InputError(
                "the linear probe has nothing to set, so not"
                f" {', '.join(run.overrides)}"
            )
        return run, Recipe(epochs=0), False
    method = methods()[parse(run.method)[0]]
    fields = {
        key: value for key, value in run.overrides.items() if key in RECIPE_FIELDS
    }
    hparams = {
        key: value for key, value in run.overrides.items() if key not in RECIPE_FIELDS
    }
    recipe = train.recipe(run.method, setting)
    prepared = any(
        cls.prepare not in (Method.prepare, Plugin.prepare)
        for cls in nesting(run.method)
    )
    untrained = recipe.epochs == 0 and not prepared
    if untrained:  # nothing about training tells two runs apart
        run, fields = replace(run, overrides=hparams, max_steps=None), {}
    recipe = replace(recipe, **fields, hparams=_merge(recipe.hparams, hparams))
    if not method.plugin:  # a plug-in needs its host for that, so build() checks it
        method.check(recipe.hparams)
    return run, recipe, untrained


def execute(
    run: Run | Plan, results=None, force=False, progress=True, save=None
) -> pd.DataFrame:
    """Run once, store the result and return its rows; a run that is stored already is
    read and not run again.

    Args:
        results: results folder, see :func:`promptkit.results.results_dir`; False
            neither reads nor stores anything.
        force: run even if it is stored.
        progress: show a bar while training.
        save: file for the trained method, see ``Method.save``; the run is then made in
            any case.
    """
    plan = run if isinstance(run, Plan) else prepare(run)
    stored = (
        None if force or save or results is False else find_run(plan.config, results)
    )
    if stored is not None:
        return run_rows(stored)
    began = time.perf_counter()
    if plan.run.method == PROBE:
        if save:
            raise InputError("a linear probe cannot be saved as a method")
        rows = [
            _number(
                plan.source.name,
                "all",
                probe.linear_probe(plan.clip, plan.training_set()),
            )
        ]
        history = History()
    else:
        method, history = _trained(plan, results, progress, force)
        if save:
            method.save(save)
        rows = _measure(plan, method)
    record = {
        "config": plan.config,
        "rows": rows,
        "hash": config_hash(plan.config),
        "versions": versions(),
        "device": _device(plan.clip.device),
        "seconds": round(time.perf_counter() - began, 3),
        "training": {"seconds": round(history.seconds, 3), "losses": history.losses},
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    if results is not False:
        save_run(record, results)
    return run_rows(record)


def _trained(plan, results, progress, force):
    """The trained method and its history; the two transfer protocols share what they
    train through a file.
    """
    dataset, run = plan.training_set(), plan.run
    shared = checkpoint = None
    if results is not False and plan.recipe.epochs:
        if run.protocol in TRANSFER:
            same = {
                k: v
                for k, v in plan.config.items()
                if k not in ("protocol", "targets", "images")
            }
            key = config_hash(same | {"images": _images(plan.source)})
            shared = results_dir(results) / "trained" / f"{key}.safetensors"
        if run.profile == "full":
            checkpoint = (
                results_dir(results) / "checkpoints" / f"{config_hash(plan.config)}.pt"
            )
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if shared and shared.exists() and not force:
        try:
            method = load_method(shared, plan.clip)
            method.aim(plan.source)
            return method, History(
                **json.loads(shared.with_suffix(".json").read_text())
            )
        except (InputError, OSError, ValueError, TypeError) as error:
            warnings.warn(
                f"cannot use {shared} ({error}): training again", stacklevel=3
            )
    if (
        plan.recipe.epochs
    ):  # one that cannot serve other classes must say so before it trains, not after
        others = (
            data.base_new(plan.source)[1:]
            if run.protocol == "base-to-new"
            else plan.targets[:1]
        )
        for other in others:
            plan.build(dataset).aim(other)
    method = plan.build(dataset)
    options = {
        "progress": progress,
        "checkpoint": checkpoint,
        "max_steps": run.max_steps,
    }
    history = fit(method, dataset, plan.recipe, run.seed, **options)
    if shared and method.n_parameters:
        write_text(shared.with_suffix(".json"), json.dumps(asdict(history)))
        method.save(shared)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return method, history


def _measure(plan, method):
    """The numbers of a protocol, as dicts with target, split, metric and value."""
    source, seed = plan.source, plan.config["seed"]

    def measured(dataset):
        test = dataset.test  # "smoke" looks at every fifth image
        test = (
            test.take(range(0, len(test), 5)) if plan.run.profile == "smoke" else test
        )
        return accuracy(method, test, seed=seed)

    if plan.run.protocol == "base-to-new":
        value = {}
        for split, part in zip(("base", "new"), data.base_new(source), strict=True):
            method.aim(part)
            value[split] = measured(part)
        value["hm"] = float(harmonic_mean(value["base"], value["new"]))
        return [
            _number(source.name, split, value[split]) for split in ("base", "new", "hm")
        ]
    rows = []
    for dataset in (source, *plan.targets):
        if plan.targets:
            method.aim(dataset)
        rows.append(_number(dataset.name, "all", measured(dataset)))
    return rows


def _number(target, split, value):
    return {"target": target, "split": split, "metric": "accuracy", "value": value}


def backbone(
    profile: str, model: str | None = None, pretrained: str | None = None
) -> tuple[str, str | None]:
    """The model and its weights that were asked for, or else those of a profile, as
    ``load_clip`` takes them.
    """
    if model is None and profile == "full":
        return "ViT-B-16", pretrained or "openai"
    return model or "mini", pretrained


@lru_cache(maxsize=2)
def _clip(name, pretrained, device, precision):
    return load_clip(name, pretrained, device=device, precision=precision)


def _dataset(dataset, root):
    if not isinstance(dataset, str):
        return dataset
    return (
        data.load_dataset(dataset) if root is None else data.load_dataset(dataset, root)
    )


def _shifts(dataset, root):
    """The shifted versions of a dataset."""
    return [_dataset(name, root) for name in dataset.shifts]


def _images(dataset):
    """What identifies a dataset in a configuration: its images and the names of its
    classes.
    """
    keys = [
        f"{split.key}, {len(split)} images" for split in (dataset.train, dataset.test)
    ]
    names = hashlib.sha256(
        "\n".join([*dataset.classnames, dataset.template]).encode()
    ).hexdigest()[:12]
    return [*keys, names]


def _merge(recipe, given):
    """Hyperparameters of a recipe updated by given ones; those of a plug-in's host are
    nested one deeper.
    """
    merged = dict(recipe)
    for key, value in given.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


@cache
def _code(spec):
    """Hash of the code of a spec's methods and of the training loop: syntax trees
    without docstrings.

    So a run is made again when a method changes, and not when somebody rewords a
    comment.
    """
    digest, host, modules = hashlib.sha256(), None, [probe.__name__]
    if spec != PROBE:
        name, host = parse(spec)
        modules = {base.__module__ for base in methods()[name].__mro__}
        modules = sorted(m for m in modules if m.startswith("promptkit.methods.")) + [
            train.__name__
        ]
    for module in modules:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
        for node in ast.walk(tree):
            if isinstance(
                node, ast.Module | ast.ClassDef | ast.FunctionDef
            ) and ast.get_docstring(node):
                node.body = node.body[1:]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12] + ("" if host is None else f"({_code(host)})")


@cache
def versions() -> dict[str, str]:
    """Versions that a result notes: promptkit, torch, open_clip, python."""
    found = {"python": platform.python_version()}
    for key, package in (
        ("promptkit", "promptkit"),
        ("torch", "torch"),
        ("open_clip", "open_clip_torch"),
    ):
        try:
            found[key] = metadata.version(package)
        except (
            metadata.PackageNotFoundError
        ):  # run from a checkout that is not installed
            found[key] = "checkout"
    return found


def _device(device):
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


# --- grids ----------------------------------------------------------------------------


def sweep(
    protocol: str, methods, datasets, seeds=(1, 2, 3), shots=(16,), *, workers=1, scheduler=None,
    progress=True, results=None, force=False, **options,
) -> pd.DataFrame:  # fmt: skip
    """Run a grid and return all its rows; what is stored already is read and not run
    again.

    Args:
        protocol: "few-shot", "base-to-new", "cross-dataset" or "domain-generalization".
        methods: names, or pairs of a name and a dict of overrides such as ``("coop",
            {"n_ctx": 4})``.
        datasets: names or Datasets; for the last two protocols the sources.
        seeds, shots: lists of them.
        workers, scheduler, progress, results, force: see :func:`execute_all`.
        options: fields of :class:`Run`, of the recipe, and hyperparameters, as in
            :func:`few_shot`.

    Raises:
        InputError: a run is not possible as it is asked for; nothing has been run then.
        SweepError: runs failed while the others went on; the text names the first of
            them.
    """
    plans = grid(protocol, methods, datasets, seeds, shots, **options)
    return execute_all(plans, workers, scheduler, progress, results, force)


def grid(
    protocol: str, methods, datasets, seeds=(1, 2, 3), shots=(16,), **options
) -> list[Plan]:
    """The runs of a grid, see :func:`sweep`; a zero-shot method is one run for all
    shots and seeds.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    options = dict(options)
    common, clip = options.pop("overrides", {}), options.pop("clip", "mini")
    methods = [
        (entry, {}) if isinstance(entry, str) else entry for entry in _list(methods)
    ]
    plans = {}
    cells = itertools.product(_list(datasets), _list(shots), methods, _list(seeds))
    for dataset, n, (method, own), seed in cells:
        plan = prepare(
            _run(
                protocol,
                method,
                dataset,
                n,
                seed,
                clip,
                options | {"overrides": common | own},
            )
        )
        plans.setdefault(config_hash(plan.config), plan)
    return list(plans.values())


def benchmark(
    methods=None,
    datasets=None,
    protocols=PROTOCOLS,
    seeds=(1, 2, 3),
    shots=(16,),
    profile="mini",
    root=None,
    **options,
) -> list[Plan]:
    """The runs of the whole benchmark: methods x datasets x seeds in every protocol.

    The two transfer protocols train on those of the datasets that have shifted versions
    (ImageNet, the mini world's main set); cross-dataset tests on all the others.

    Args:
        methods: names, or pairs of a name and a dict of overrides; default: all, see
            :func:`promptkit.method.specs`.
        datasets: names; default: the eleven of the profile's world.
        profile: "full" is of the real datasets, the others of the mini world.
        options: as in :func:`sweep`.

    Raises:
        InputError: a run is not possible as it is asked for.
    """
    methods = specs() if methods is None else methods
    datasets = list(
        datasets or (data.DATASETS if profile == "full" else data.MINI_TASKS)
    )
    sources = [name for name in datasets if _dataset(name, root).shifts]
    options |= {"profile": profile, "root": root}
    plans = []
    for protocol in protocols:
        if protocol not in TRANSFER:
            plans += grid(protocol, methods, datasets, seeds, shots, **options)
        for source in sources if protocol in TRANSFER else ():
            others = tuple(name for name in datasets if name != source)
            if protocol == "domain-generalization" or others:
                targets = {"targets": others} if protocol == "cross-dataset" else {}
                plans += grid(
                    protocol, methods, source, seeds, shots, **options, **targets
                )
    return plans


def execute_all(
    plans: Iterable[Plan],
    workers=1,
    scheduler=None,
    progress=True,
    results=None,
    force=False,
) -> pd.DataFrame:
    """Execute runs, those that are not stored yet, and return the rows of all.

    A run that fails (its loss diverges, its memory is not enough) does not stop the
    others.

    Args:
        workers: processes at the same time, each with one thread.
        scheduler: address of a Dask scheduler; replaces ``workers``. Its workers must
            share the results folder.
        progress: show a bar over the runs, or the training's own if there is but one.
        results, force: see :func:`execute`.
    """
    plans = list(plans)
    alone = workers <= 1 and not scheduler
    if not alone and not all(plan.run.portable for plan in plans):
        raise InputError(
            "parallel workers load model and data themselves: give both by their names"
        )
    rows, todo, failures = [], [], []
    for plan in plans:
        stored = None if force or results is False else find_run(plan.config, results)
        rows += [] if stored is None else [run_rows(stored)]
        todo += [plan] if stored is None else []
    # Other processes get the request and load data and weights themselves; this one has
    # them at hand.
    items = todo if alone else [with_absolute_paths(plan.run) for plan in todo]
    where = results if results is False else str(results_dir(results).resolve())
    single = len(todo) == 1 and alone
    arguments = {"results": where, "force": force, "progress": progress and single}
    arguments["failed"] = lambda run, reason: (None, reason)
    done = parallel(_attempt, items, workers, scheduler, **arguments)
    title = f"{len(todo)} of {len(plans)} runs to do"
    with tqdm(
        total=len(todo),
        desc=title,
        unit="run",
        disable=not progress or single or not todo,
    ) as bar:
        for item, (table, error) in done:
            bar.update()
            if error is None:
                rows.append(table)
            else:
                run = item.run if isinstance(item, Plan) else item
                name = getattr(run.dataset, "name", run.dataset)
                failures.append(
                    f"{run.method} on {name}, {run.shots} shots, seed {run.seed}:"
                    f" {error}"
                )
    if failures:
        raise SweepError(
            f"{len(failures)} of {len(plans)} runs failed, the others are stored;"
            f" {failures[0]}"
        )
    return newest(rows)


def _attempt(run, results, force, progress):
    """(rows, None), or (None, what went wrong)."""
    try:
        return execute(run, results, force, progress), None
    except Exception as error:
        return None, (
            str(error)
            if isinstance(error, InputError)
            else f"{type(error).__name__}: {error}"
        )


def _list(value):
    """A list of what may be one thing (a name, a number, a Dataset) or several."""
    return list(value) if isinstance(value, list | tuple | range | set) else [value]


# --- choosing hyperparameters ---------------------------------------------------------


def tune(
    method: str, dataset, grid: dict[str, list], shots=16, seeds: Iterable[int] = (1,), clip="mini", *,
    protocol="few-shot", split="val", progress=True, **options,
) -> pd.DataFrame:  # fmt: skip
    """Search a grid of overrides: train on the few shots, measure on the drawn
    validation images.

    In "base-to-new" both are of the base classes. Nothing is stored.

    Args:
        grid: name of a recipe field or hyperparameter -> values to try; all
            combinations are.
        split: "val". There is no other choice; the argument is there for the error that
            says so.

    Returns:
        A row a combination, best first, with its mean accuracy over the seeds in
        percent.

    Raises:
        InputError: a search on test data is asked for, or the dataset has no validation
            images of its own.
    """
    if split != "val":
        raise InputError(
            f"hyperparameters are tuned on validation images only, not on {split!r}"
        )
    if protocol not in ("few-shot", "base-to-new"):
        raise InputError(f"tune by 'few-shot' or 'base-to-new', not by {protocol!r}")
    combinations = [
        dict(zip(grid, values, strict=True))
        for values in itertools.product(*grid.values())
    ]
    out = []
    for overrides in tqdm(combinations, desc=f"tuning {method}", disable=not progress):
        scores = []
        for seed in _list(seeds):
            fixed = options.get("overrides", {}) | overrides
            plan = prepare(
                _run(
                    protocol,
                    method,
                    dataset,
                    shots,
                    seed,
                    clip,
                    options | {"overrides": fixed},
                )
            )
            validation = plan.source.val
            if (
                validation is None
                or not len(validation)
                or validation.key == plan.source.test.key
            ):
                raise InputError(
                    f"{plan.source.name} has no validation images of its own to tune on"
                )
            drawn = plan.training_set()
            tuned = plan.build(drawn)
            fit(
                tuned,
                drawn,
                plan.recipe,
                seed,
                progress=False,
                max_steps=plan.run.max_steps,
            )
            scores.append(accuracy(tuned, drawn.val, seed=seed))
        out.append(
            overrides | {"accuracy": sum(scores) / len(scores), "seeds": len(scores)}
        )
    return pd.DataFrame(out).sort_values(
        "accuracy", ascending=False, kind="stable", ignore_index=True
    )
