"""One run: as it is asked for, planned with everything at hand that it needs, and made.

Zero-shot CLIP goes through the same functions as every method; it has neither shots nor
a seed, and its rows say 0 for both. The test images are read once, after training:
nothing is chosen by them.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path

import pandas as pd
import torch

from promptkit import costs, data, hyperparameters, identity, probe, registry, train
from promptkit.clip import FrozenCLIP, load_clip
from promptkit.errors import InputError, unknown
from promptkit.method import Method
from promptkit.recipe import TRANSFER, Recipe, Setting
from promptkit.registry import build, by_target, load_method, nesting, supervision
from promptkit.results import (
    PROBE,
    config_hash,
    find_run,
    harmonic_mean,
    options_of,
    results_dir,
    run_rows,
    save_run,
    write_text,
)
from promptkit.train import History, accuracy, fit

RECIPE_FIELDS = {f.name for f in dataclasses.fields(Recipe)}
RECIPE_FIELDS -= {"hparams", "objects", "stages"}


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
        pretrained, like, quickgelu, device, precision: as ``load_clip`` takes them.
        classnames, descriptions: files of names for the classes of one's own data, and
            of sentences about them, see :func:`~promptkit.data.datasets.load_dataset`.
        labels: what to call data at a path, where its own name is taken: name by path.
        profile: "smoke", "mini" or "full", see :func:`promptkit.recipe.for_profile`.
        overrides: fields of the recipe (lr, epochs, ...), hyperparameters of the method
            and its objects (``teacher="promptsrc@mini-teacher"``), by name.
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
    like: str | None = None
    quickgelu: bool | None = None
    device: str | None = None
    precision: str = "fp32"
    classnames: str | None = None
    descriptions: str | None = None
    labels: dict = field(default_factory=dict)
    profile: str = "mini"
    overrides: dict = field(default_factory=dict)
    max_steps: int | None = None
    root: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "overrides", hyperparameters.plain(self.overrides))

    @property
    def portable(self) -> bool:
        """Whether another process can take it over: it holds names, not a model or
        data.
        """
        parts = (self.clip, self.dataset, *self.targets)
        return all(isinstance(part, str) for part in parts)


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
    objects: dict  # name -> a FrozenCLIP, or the Plan of a method to be trained before
    config: dict
    given: str = ""  # which sentences it learns from in place of the datasets' own

    @property
    def options(self) -> str:
        """What a table calls its overrides and given sentences."""
        return options_of(self.config["overrides"], self.given)

    @property
    def training(self) -> str:
        """Hash of all that its training follows from: not of targets, nor of what is
        set at test time alone; nor of the protocol, where it is one of transfer.
        """
        config, recipe = self.config, self.config["recipe"]
        if self.run.method == PROBE:
            return config_hash(config)
        free = registry.at_test(self.run.method)

        def without(given, *names):
            return {key: value for key, value in given.items() if key not in names}

        same = without(config, "targets", "data", "texts")
        told = self.recipe.hparams | dict.fromkeys(free, "")  # these never count
        texts = identity.of_texts(self.run.method, told, self.source)
        same |= {"data": self.source.identity, "texts": texts}
        if self.run.protocol in TRANSFER:
            del same["protocol"]
        if free:
            same["overrides"] = without(config["overrides"], *free)
            same["recipe"] = recipe | {"hparams": without(recipe["hparams"], *free)}
        return config_hash(same)

    def training_set(self):
        """What it is trained on: the drawn few shots, of the base classes in
        base-to-new; all images where a method needs no labels.
        """
        kinds = {"shots"} if self.run.method == PROBE else supervision(self.run.method)
        drawn = self.source
        if "shots" in kinds:
            drawn = data.few_shot(self.source, self.run.shots, self.run.seed)
        transductive = kinds == {"pool"}  # it sees images of all classes
        if self.run.protocol == "base-to-new" and not transductive:
            return data.base_new(drawn)[0]
        return drawn

    @cached_property
    def students(self) -> list["Plan"]:
        """A transfer's runs, one a target, where the method learns on each target's own
        images without labels; empty elsewhere. The shifted versions have test images
        alone, which are learned on, too.
        """
        if self.run.protocol not in TRANSFER or not by_target(self.run.method):
            return []
        texts = self.config["texts"][1:]
        return [
            replace(
                self,
                source=t if len(t.train) else replace(t, train=t.test),
                targets=[],
                config=self.config | {"dataset": t.name, "texts": [said]},
            )
            for t, said in zip(self.targets, texts, strict=True)
        ]

    def build(self, dataset, **objects) -> Method:
        """The method with its initial values, aimed at a dataset.

        Args:
            objects: trained teachers by name; by default with their initial values.
        """
        for name, thing in self.objects.items():
            if name not in objects:
                plan = isinstance(thing, Plan)
                objects[name] = thing.build(thing.training_set()) if plan else thing
        method = build(
            self.run.method,
            self.clip,
            dataset.classnames,
            seed=self.config["seed"],
            **self.recipe.hparams,
            **objects,
        )
        method.aim(dataset)
        return method

    def images(self, dataset) -> list[int]:
        """How many images each training has: one on a dataset, or one a target."""
        return [len(p.source.train) for p in self.students] or [len(dataset.train)]

    def steps(self, *images: int) -> int:
        """How many steps trainings on so many images each take together."""
        parts, most = [*self.recipe.parts()], self.run.max_steps
        each = (sum(part.steps(n) * part.epochs for part in parts) for n in images)
        return sum(min(steps, most or steps) for steps in each)

    def describe(self) -> dict[str, str]:
        """What is about to happen, for people."""
        dataset, run = self.training_set(), self.run
        learned = 0 if run.method == PROBE else self.build(dataset).n_parameters
        targets = ", ".join(target.name for target in self.targets)
        out = {
            "method": f"{run.method} {self.recipe.hparams or ''}".strip(),
            "protocol": f"{run.protocol}, profile {run.profile}",
            "model": (
                f"{self.config['model']} on {self.clip.device},"
                f" {self.config['clip']['precision']}"
            ),
            "data": f"{self.source.name}, {len(dataset.classnames)} classes"
            + (f"; tested on {targets}" if targets else "")
            + ("; a student learns on each target's images" * bool(self.students)),
        }
        if self.recipe.trains and learned:
            each, batch = self.images(dataset), self.recipe.batch_size
            kinds, images = supervision(run.method), sum(each)
            steps = f"{self.steps(*each)} steps of {min(batch, *each)}"
            if "shots" in kinds:
                out["shots"] = f"{run.shots} a class, {images} images; seed {run.seed}"
            elif "pool" in kinds:  # which of them it takes, it decides itself
                out["pool"] = f"{images} images without labels; seed {run.seed}"
                steps = f"at most {steps}"
            else:
                out["texts"] = f"sentences about the classes; seed {run.seed}"
                steps = f"batches of {batch}"
            out["training"] = (
                f"{self.recipe.epochs} epochs, {steps}, {self.recipe.optimizer},"
                f" learning rate {self.recipe.lr:g}"
            )
        if run.method == PROBE:
            learned = len(dataset.classnames) * (self.clip.embed_dim + 1)
        return out | {"parameters": f"{learned:,}"}


def estimate(plan: Plan, plans: Iterable[Plan] = ()) -> dict[str, str]:
    """Time and memory of a run's training, for people: two steps are made to measure
    them, and nothing is kept.

    Testing, and features that are computed once before, come on top of the time.

    Args:
        plans: several that it is one of: their time, tests included, follows from the
            same step in the proportions of the table of costs, see
            :mod:`promptkit.costs`.
    """
    dataset, run = plan.training_set(), plan.run
    method = None if run.method == PROBE else plan.build(dataset)
    if method is None or not (plan.recipe.trains and method.n_parameters):
        return {}
    device = torch.device(plan.clip.device)
    generator = torch.Generator().manual_seed(0)
    part = next(plan.recipe.parts())
    given = method.prepare(train.visible(method, dataset), part, generator, 0)
    batch = min(part.batch_size, len(given.train))
    steps = plan.steps(*plan.images(given))
    few = given.train.take(range(batch))  # features of these alone, not of the set
    read = train.reader(method.train(), few, generator, part)
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        method.backward(read(torch.arange(batch)).to(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    memory = _peak_memory(device)
    spent = costs.duration(steps * seconds)
    more = f", {memory / 2**30:.1f} GiB" if memory else ""
    out = {"estimate": f"about {spent} of training{more}"}
    if len(plans := list(plans)) > 1 and (
        together := costs.scaled(plans, plan, batch, seconds)
    ):
        out["together"] = together
    return out


def _forget_peak(device):
    """Let peak memory count from now on, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux alone has it
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device) -> int | None:
    """Bytes that were held at most, on the GPU or else by this process, where the
    system tells.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


# --- planning -------------------------------------------------------------------------


def plan(run: Run) -> Plan:
    """Load what a run needs, check it, and write down its whole configuration.

    The configuration holds the method with its hyperparameters, recipe, code and
    texts, the images by content, the draw, the weights and the profile; not the machine
    and the versions of libraries, which a result notes beside it.

    Raises:
        InputError: unknown names, or shots, seed or hyperparameters that do not fit.
    """
    for key, least in (("shots", 1), ("seed", 0), ("max_steps", 1)):
        value = getattr(run, key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < least):
            raise InputError(
                f"{key} must be a whole number from {least}, got {value!r}"
            )
    source = _dataset(run.dataset, run)
    targets = _targets(run, source)
    run, recipe = _resolve(run, source)
    if run.protocol == "base-to-new":
        _check_sides(source)
    clip = run.clip
    if not isinstance(clip, FrozenCLIP):
        clip = _clip(
            clip, run.pretrained, run.device, run.precision, run.like, run.quickgelu
        )
    is_probe = run.method == PROBE
    parts = [] if is_probe else nesting(run.method)
    kinds = {"shots"} if is_probe else supervision(run.method)
    seeded = is_probe or any(cls.seeded for cls in parts)
    model = clip.name
    if clip.pretrained not in (None, "", clip.name):
        model += f"/{clip.pretrained}"
    tested = (source, *targets)
    objects = {} if is_probe else _objects(run, recipe, clip)
    config = {
        "method": run.method.replace(" ", ""),
        "overrides": run.overrides,
        "recipe": asdict(replace(recipe, objects={})),
        "code": identity.of_code(run.method),
        "protocol": run.protocol,
        "dataset": source.name,
        "data": {dataset.name: dataset.identity for dataset in tested},
        "targets": [target.name for target in targets],
        "shots": run.shots if "shots" in kinds else 0,
        "seed": run.seed if seeded else 0,
        "profile": run.profile,
        "max_steps": run.max_steps,
        "model": model,
        "clip": {"fingerprint": clip.fingerprint, "precision": clip.precision},
    }
    if not is_probe:
        texts = [
            identity.of_texts(run.method, recipe.hparams, dataset) for dataset in tested
        ]
        config |= {"texts": texts}
    if objects:
        config["objects"] = {name: _told(thing) for name, thing in objects.items()}
    if run.max_steps is not None:
        config["overrides"] = run.overrides | {"max_steps": run.max_steps}
    if run.profile == "full":
        _say_what_was_published(run, parts, clip)
    config = json.loads(json.dumps(config, default=str))
    found = Plan(run, clip, source, targets, recipe, objects, config)
    told = dict.fromkeys(d.described for d in tested if d.described)
    if told and reads_descriptions(found):
        found.given = ", ".join(f"descriptions={name}" for name in told)
    return found


def reads_descriptions(plan: Plan) -> bool:
    """Whether what is said of the classes matters to a run, or to its teachers."""
    teachers = [thing for thing in plan.objects.values() if isinstance(thing, Plan)]
    if plan.run.method == PROBE:
        return False
    reads = identity.reads_descriptions(
        plan.run.method, plan.recipe.hparams, plan.source
    )
    return reads or any(map(reads_descriptions, teachers))


def _check_sides(dataset):
    """InputError unless base and new classes are several each, with test images."""
    tested = dataset.test.labels.unique()
    half = math.ceil(len(dataset.classnames) / 2)
    if min((tested < half).sum(), (tested >= half).sum()) < 2:
        raise InputError(
            "base-to-new needs test images of at least 2 classes on each side, the base"
            f" and the new ones, and {dataset.name!r} has {len(tested)} such classes in"
            " all"
        )


def _targets(run, source):
    """The datasets that a run is tested on beside its source."""
    if run.protocol == "domain-generalization":
        targets = _shifts(source, run)
        if not targets:
            raise InputError(
                f"{source.name} has no shifted versions to measure"
                " domain-generalization on"
            )
        return targets
    if bool(run.targets) != (run.protocol == "cross-dataset"):
        raise InputError(
            "a cross-dataset run needs targets to be tested on, and no other run takes"
            " any"
        )
    targets = [_dataset(target, run) for target in run.targets]
    if source.identity in [target.identity for target in targets]:
        raise InputError(f"{source.name} is the source, so it cannot be a target too")
    return targets


def _resolve(run, source):
    """The run without what does not concern its method, and the recipe."""
    if run.method == PROBE:
        Setting(run.protocol, source.name, run.shots, run.profile)
        if run.protocol != "few-shot":
            raise InputError(
                "a linear probe knows no new classes: measure it by few-shot, not"
                f" {run.protocol}"
            )
        if run.overrides:
            named = ", ".join(run.overrides)
            raise InputError(f"the linear probe has nothing to set, so not {named}")
        return run, Recipe(epochs=0)
    cls = nesting(run.method)[0]
    named = registry.objects(run.method)
    fields = {k: v for k, v in run.overrides.items() if k in RECIPE_FIELDS}
    objects = {k: v for k, v in run.overrides.items() if k in named}
    hparams = {
        k: v
        for k, v in run.overrides.items()
        if k not in RECIPE_FIELDS and k not in named
    }
    setting = Setting(run.protocol, source.name, run.shots, run.profile, hparams)
    recipe = registry.recipe(run.method, setting)
    if not supervision(run.method):  # nothing about training tells two runs apart
        run = replace(run, overrides=hparams | objects, max_steps=None)
        fields = {}
    hparams = _merge(recipe.hparams, hparams)
    objects = recipe.objects | objects
    recipe = replace(recipe, **fields, hparams=hparams, objects=objects)
    if not cls.plugin:  # a plug-in needs its host for that, so build() checks it
        known = {k: v for k, v in hparams.items() if k not in named}
        for name in known:
            if name not in cls.hyperparameters():
                raise unknown(
                    f"hyperparameter of {cls.name}", name, cls.hyperparameters()
                )
        if not named:
            cls.check(known)
    return run, recipe


def _objects(run, recipe, clip):
    """The plans of a method's teachers, and its further backbones, by name.

    Each is written "METHOD@MODEL" or "@MODEL", MODEL with "/WEIGHTS" where it needs
    them; several backbones in a list, or with commas between them.
    """
    known = registry.objects(run.method)
    out = {}
    for name, text in recipe.objects.items():
        if name not in known:
            raise unknown(f"object of {run.method}", name, known)
        if hyperparameters.fits([], known[name].objects()[name][0]):
            several = text.split(",") if isinstance(text, str) else text
            out[name] = [_another(run, name, each) for each in several]
            continue
        options = {}
        if isinstance(text, dict):
            options = {key: text[key] for key in text if key != "method"}
            text = text["method"]
        if not isinstance(text, str):
            out[name] = text
            continue
        spec, model, weights = _written(text)
        if not model:
            raise InputError(
                f"{name} of {run.method} is written METHOD@MODEL, such as"
                f" 'promptsrc@mini-teacher', not {text!r}"
            )
        if spec and any(cls.by_target for cls in nesting(spec)):
            raise InputError(
                f"{name} of {run.method} cannot be {spec}, which is a student itself:"
                f" give {name}='METHOD@MODEL', such as 'promptsrc@mini-teacher'"
            )
        other = _clip(model, weights, run.device, run.precision)
        if not spec:
            out[name] = other
            continue
        # One teacher serves all seeds, shots being those of the run.
        asked = Run(
            run.protocol, spec, run.dataset, run.targets, run.shots, 1, other,
            profile=run.profile, max_steps=run.max_steps, root=run.root,
            overrides=options, classnames=run.classnames,
            descriptions=run.descriptions, labels=run.labels,
        )  # fmt: skip
        out[name] = plan(asked)
    missing = {name for name in known if name in known[name].needs()} - set(out)
    if missing:
        name = min(missing)
        raise InputError(
            f"{run.method} needs a {name}: give {name}='METHOD@MODEL', such as"
            " 'promptsrc@mini-teacher'"
        )
    return out


def _another(run, name, text):
    """One of several further backbones."""
    if not isinstance(text, str):
        return text
    spec, model, weights = _written(text.strip())
    if spec or not model:
        raise InputError(
            f"{name} of {run.method} are written @MODEL,@MODEL/WEIGHTS, such as"
            f" '@mini-teacher', not {text!r}"
        )
    return _clip(model, weights, run.device, run.precision)


def _written(text):
    """ "METHOD@MODEL/WEIGHTS" in its parts; MODEL is empty where there is no "@"."""
    spec, at, rest = text.rpartition("@")
    model, _, weights = rest.partition("/")
    return spec, model if at else "", weights or None


def _told(thing):
    """What a configuration says of an object, or of several."""
    if isinstance(thing, list):
        return [_told(part) for part in thing]
    return thing.config if isinstance(thing, Plan) else thing.fingerprint


def backbone(
    profile: str, model: str | None = None, pretrained: str | None = None
) -> tuple[str, str | None]:
    """The model and its weights that were asked for, or else those of a profile, as
    ``load_clip`` takes them.
    """
    if model is None and profile == "full":
        return "ViT-B-16", pretrained or "openai"
    return model or "mini", pretrained


@lru_cache(maxsize=3)
def _clip(name, pretrained, device, precision, like=None, quickgelu=None):
    more = {"like": like, "quickgelu": quickgelu}
    more = {key: value for key, value in more.items() if value is not None}
    return load_clip(name, pretrained, device=device, precision=precision, **more)


def _dataset(dataset, run=None):
    """A Dataset; by its name or path as a run asks for it."""
    if not isinstance(dataset, str):
        return dataset
    given = {}
    if run is not None:
        given = {"classnames": run.classnames, "descriptions": run.descriptions}
        given |= {"root": run.root}
    given = {key: value for key, value in given.items() if value is not None}
    loaded = data.load_dataset(dataset, **given)
    label = run.labels.get(dataset) if run is not None else None
    return loaded if label is None else replace(loaded, name=label)


def _shifts(dataset, run):
    """The shifted versions of a dataset."""
    return [_dataset(name, run) for name in dataset.shifts]


@cache
def _warn_once(text):
    warnings.warn(text, stacklevel=5)


def _say_what_was_published(run, parts, clip):
    """Where a full run is not the one that its paper ran."""
    published = getattr(parts[0], "published", {}).get(run.protocol) if parts else None
    beside = published.beside(clip.name, run.shots) if published else ""
    if beside:
        _warn_once(f"{run.method}, {run.protocol}: {beside}")


def _merge(recipe, given):
    """Hyperparameters of a recipe updated by given ones; those of a plug-in's host are
    nested one deeper.
    """
    merged = dict(recipe)
    for key, value in given.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if nested and key == "host" else value
    return merged


# --- making it ------------------------------------------------------------------------


def execute(
    run: Run | Plan, results=None, force=False, progress=True, save=None
) -> pd.DataFrame:
    """Run once, store the result and return its rows; a run that is stored already is
    read and not run again.

    Args:
        results: results folder, see :func:`promptkit.results.results_dir`; False
            neither reads nor stores anything.
        force: run even if it is stored, and make its image features anew.
        progress: show a bar while training.
        save: file for the trained method, see ``Method.save``; the run is then made in
            any case.

    Raises:
        InputError: the run is not possible.
        OSError: what it measured or trained cannot be written; the text has the
            numbers, or says that they are stored.
    """
    planned = run if isinstance(run, Plan) else plan(run)
    stored = None
    if not (force or save or results is False):
        stored = find_run(planned.config, results)
    if stored is not None:
        return run_rows(stored)
    device = torch.device(planned.clip.device)
    _forget_peak(device)
    began = time.perf_counter()
    spent, peak = 0.0, 0  # by trainings of other runs that serve this one, too
    source = planned.source
    if force:
        _forget_features(planned)
    if planned.run.method == PROBE:
        if save:
            raise InputError("a linear probe cannot be saved as a method")
        value = probe.linear_probe(planned.clip, planned.training_set())
        rows, history, learned = [_number(source.name, "all", value)], History(), None
    else:
        if save and planned.students:
            raise InputError(
                f"{planned.run.method} learns a student for each target, and {save}"
                " takes one: run it on the target by the protocol few-shot"
            )
        every = 5 if planned.run.profile == "smoke" else 1
        options = {"seed": planned.config["seed"], "every": every}
        rows, history = [], History()
        for part in planned.students or [planned]:
            method, targets, own, before = _trained(part, results, progress, force)
            protocol = part.run.protocol
            rows += measure(method, part.source, targets, protocol, **options)
            spent, peak = spent + before["seconds"], max(peak, before["memory"])
            history.losses += own.losses
            history.seconds += own.seconds
        learned = method.n_parameters
    record = _record(
        planned.config,
        rows,
        planned.clip,
        round(time.perf_counter() - began + spent, 3),
        learned,
        memory=_mebibytes(max(_peak_memory(device) or 0, peak) or None),
        training={"seconds": round(history.seconds, 3), "losses": history.losses},
        **({"given": planned.given} if planned.given else {}),
    )
    if results is not False:
        with _writing(f"the run could not be stored, and measured {_measured(rows)}"):
            save_run(record, results)
    if save:
        stored = "the run is stored, but " * (results is not False)
        with _writing(f"{stored}{save} could not be written"):
            method.save(save)
    return run_rows(record)


@contextlib.contextmanager
def _writing(otherwise):
    """Say what is lost where something cannot be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{otherwise}: {error}") from error


def _measured(rows):
    return ", ".join(f"{r['target']} ({r['split']}) {r['value']:.2f} %" for r in rows)


def _forget_features(plan):
    """Make the image features of a run anew, those that it reads from the cache."""
    training = plan.training_set()
    splits = [training.train, training.val, plan.source.test]
    splits += [target.test for target in plan.targets]
    method = None if plan.run.method == PROBE else plan.build(training)
    reads = "features" if method is None else f"{method.reads}+{method.reads_at_test}"
    if "features" in reads.split("+") and not plan.recipe.augment:
        for split in splits:
            data.frozen_features(plan.clip, split, force=True)


def _trained(plan, results, progress, force):
    """The trained method, the targets that it can serve, its history, and the seconds
    and bytes that another run's training took where it is that one. The two transfer
    protocols, and runs that differ in what is set at test time alone, share what they
    train through a file.
    """
    dataset, run = plan.training_set(), plan.run
    targets = plan.targets
    if plan.recipe.trains:  # what it cannot serve must be said before it trains
        others = data.base_new(plan.source)[1:] if run.protocol == "base-to-new" else ()
        targets = _served(plan, dataset, others)
    shared = checkpoint = None
    if results is not False and plan.recipe.trains:
        if run.protocol in TRANSFER or registry.at_test(run.method):
            shared = _shared_file(plan, results)
        if run.profile == "full":
            name = f"{config_hash(plan.config)}.pt"
            checkpoint = results_dir(results) / "checkpoints" / name
            checkpoint.parent.mkdir(parents=True, exist_ok=True)

    def read():
        method = load_method(shared, plan.clip, hparams=_at_test(plan))
        method.aim(plan.source)
        known = json.loads(shared.with_suffix(".json").read_text())
        before = {"seconds": known["seconds"], "memory": known.pop("memory", 0)}
        return method, targets, History(**known), before

    if (found := _if_stored(shared, read, force)) is not None:
        return found
    method = plan.build(dataset, **_trained_objects(plan, results, progress, force))
    options = {"checkpoint": checkpoint, "max_steps": run.max_steps}
    history = fit(method, dataset, plan.recipe, run.seed, progress=progress, **options)
    if shared and method.n_parameters:
        memory = _peak_memory(torch.device(plan.clip.device)) or 0
        about = asdict(history) | {"memory": memory}
        write_text(shared.with_suffix(".json"), json.dumps(about))
        method.save(shared)
    if checkpoint:
        checkpoint.unlink(missing_ok=True)
    return method, targets, history, {"seconds": 0.0, "memory": 0}


def _if_stored(path, read, force):
    """What is read from a file of a trained method, or None: there is none that can be
    used, or it is not to be.
    """
    if path is None or force or not path.exists():
        return None
    try:
        return read()
    except (InputError, OSError, ValueError, TypeError) as error:
        warnings.warn(f"cannot use {path} ({error}): training again", stacklevel=4)
        return None


def _served(plan, dataset, others):
    """The targets that the method can be aimed at; the others are named in a warning.

    Raises:
        InputError: it can serve none of them, or not the new classes.
    """
    method = plan.build(dataset)
    for other in others:
        method.aim(other)
    served, refused = [], {}
    for target in plan.targets:
        try:
            method.aim(target)
            served.append(target)
        except InputError as error:
            refused[target.name] = error
    if plan.targets and not served:
        raise next(iter(refused.values()))
    for name, error in refused.items():
        warnings.warn(f"{name} is left out: {error}", stacklevel=4)
    return served


def _at_test(plan):
    """What a run sets, or leaves as it is, of the hyperparameters that matter to its
    answers alone.
    """
    defaults = nesting(plan.run.method)[0].hyperparameters()
    return {
        name: plan.recipe.hparams.get(name, defaults[name][1])
        for name in registry.at_test(plan.run.method)
    }


def _shared_file(plan, results):
    """Where runs keep what they train for others."""
    return results_dir(results) / "trained" / f"{plan.training}.safetensors"


def _trained_objects(plan, results, progress, force=False):
    """A method's teachers, trained once a task and stored by their configuration."""
    out = {}
    for name, thing in plan.objects.items():
        if not isinstance(thing, Plan):
            out[name] = thing
            continue
        path = None
        if results is not False:
            file = f"{config_hash(thing.config)}.safetensors"
            path = results_dir(results) / "trained" / file
        made = _if_stored(path, partial(load_method, path, thing.clip), force)
        if made is None:
            made, *_ = _trained(thing, results, progress, force)
            if path:
                made.save(path)
        out[name] = made
    return out


def measure(
    method: Method, source, targets=(), protocol="few-shot", seed=0, every=1
) -> list[dict]:
    """The numbers of a protocol, accuracies in percent, as dicts with target, split,
    metric and value.

    Args:
        source: the Dataset that the method was trained on.
        targets: Datasets that it is tested on beside it.
        every: look at every so many-th test image.
    """

    def accuracy_on(dataset):
        test = dataset.test
        test = test if every == 1 else test.take(range(0, len(test), every))
        return accuracy(method, test, seed=seed)

    if protocol == "base-to-new":
        value = {}
        for split, part in zip(("base", "new"), data.base_new(source), strict=True):
            method.aim(part)
            value[split] = accuracy_on(part)
        value["hm"] = float(harmonic_mean(value["base"], value["new"]))
        return [_number(source.name, s, value[s]) for s in ("base", "new", "hm")]
    rows = []
    for dataset in (source, *targets):
        method.aim(dataset)
        rows.append(_number(dataset.name, "all", accuracy_on(dataset)))
    return rows


def _number(target, split, value):
    return {"target": target, "split": split, "metric": "accuracy", "value": value}


def evaluate(
    checkpoint, datasets, *, protocol="few-shot", method=None, hparams=None, model=None,
    pretrained=None, like=None, quickgelu=None, precision=None, root=None, device=None,
    seed=0, classnames=None, descriptions=None,
) -> pd.DataFrame:  # fmt: skip
    """Measure a trained method on datasets, re-aimed at their classes, with rows like a
    run's; nothing is stored.

    Args:
        checkpoint: a file that ``Method.save`` wrote, a Method, or with ``method`` a
            checkpoint of the method's own repository, which is then taken to be trained
            on the classes that it is measured on (in base-to-new: on the base ones).
        datasets: names or Datasets.
        protocol: "few-shot", all classes; or "base-to-new", base and new classes.
        method, hparams: of an official checkpoint, as ``build`` takes them. A saved
            method takes hyperparameters that training does not depend on.
        model, pretrained, like, quickgelu, precision, device: its backbone, as
            ``load_clip`` takes them.
        root, classnames, descriptions: of the datasets, as ``load_dataset`` takes them.

    Returns:
        Tidy rows with the columns ``promptkit.results.COLUMNS``.

    Raises:
        InputError: the checkpoint cannot be read, or belongs to other classes.
    """
    if protocol not in ("few-shot", "base-to-new"):
        raise unknown(
            "protocol of an evaluation", protocol, ("few-shot", "base-to-new")
        )
    how = {"like": like, "quickgelu": quickgelu}
    if method is not None:
        name, weights = backbone("mini", model, pretrained)
        clip = _clip(name, weights, device, precision or "fp32", like, quickgelu)
    elif not isinstance(checkpoint, Method):
        trained = load_method(
            checkpoint, pretrained=pretrained, device=device, hparams=hparams, **how
        )
        if precision not in (None, trained.clip.precision):
            raise InputError(
                f"{checkpoint} was trained at {trained.clip.precision}, and is measured"
                f" so: leave out precision={precision}"
            )
    else:
        if hparams:
            raise InputError(
                "a method that is at hand has its hyperparameters: set them on it, or"
                " give its file"
            )
        trained = checkpoint
    tables = []
    datasets = datasets if isinstance(datasets, list | tuple) else [datasets]
    labels = data.own.labels(datasets)
    for dataset in datasets:
        if isinstance(dataset, str):
            given = dict(root=root, classnames=classnames, descriptions=descriptions)
            given = {key: value for key, value in given.items() if value is not None}
            loaded = data.load_dataset(dataset, **given)
            dataset = replace(loaded, name=labels.get(dataset, loaded.name))
        if protocol == "base-to-new":
            _check_sides(dataset)
        if method is not None:
            first = data.base_new(dataset)[0] if protocol == "base-to-new" else dataset
            trained = registry.load_official(
                checkpoint, method, clip, first.classnames, **(hparams or {})
            )
        label = "" if isinstance(checkpoint, Method) else Path(checkpoint).name
        told = {"checkpoint": label} if label else {}
        told |= hparams if hparams and method is None else {}
        tables.append(_evaluated(trained, dataset, protocol, told, seed))
    return pd.concat(tables, ignore_index=True)


def _evaluated(method, dataset, protocol, told, seed):
    began = time.perf_counter()
    rows = measure(method, dataset, protocol=protocol, seed=seed)
    clip = method.clip
    config = {
        "method": method.spec,
        "overrides": told,
        "protocol": protocol,
        "dataset": dataset.name,
        "data": {dataset.name: dataset.identity},
        "shots": 0,
        "seed": seed,
        "profile": "evaluation",
        "model": clip.name,
        "clip": {"fingerprint": clip.fingerprint, "precision": clip.precision},
        "about": method.describe(),
    }
    seconds = round(time.perf_counter() - began, 3)
    return run_rows(_record(config, rows, clip, seconds, method.n_parameters))


def _mebibytes(n):
    return None if n is None else round(n / 2**20)


def _record(config, rows, clip, seconds, parameters, **more):
    """A run as it is stored, see :func:`promptkit.results.save_run`."""
    return {
        "config": config,
        "rows": rows,
        "hash": config_hash(config),
        "versions": identity.versions(),
        "device": identity.of_device(clip.device),
        "seconds": seconds,
        "parameters": parameters,
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        **more,
    }
