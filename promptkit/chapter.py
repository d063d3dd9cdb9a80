"""What every chapter of the book begins and ends with: its model, its tasks, its runs,
its verdicts.
"""

import inspect
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import matplotlib
import pandas as pd
from IPython.display import Code, display

from promptkit import data, evidence, results
from promptkit.clip import FrozenCLIP, load_clip
from promptkit.data.own import is_path
from promptkit.errors import InputError, unknown
from promptkit.grids import RECORDER, execute_all, grid, origin
from promptkit.parameters import names, whole_numbers
from promptkit.recipe import PROFILES
from promptkit.runs import Run, _trained_objects, backbone, measure, plan
from promptkit.train import History, fit
from promptkit.workers import sweep_results

SMOKE_TASK = "sat"  # the smallest


@dataclass
class Chapter:
    """The settings of a chapter, and runs under these settings.

    Args:
        name: of the notebook, such as "04_cocoop".
        profile: "smoke", "mini" or "full". Smoke keeps one small task and one seed.
        datasets: "all", the eleven of the profile's world, or names: one, several, or a
            text of several, as papermill's ``-p`` sends them. None: the chapter's
            choice.
        seeds: of the runs: one, several, or a text such as "1-3"; a list afterwards.
        shots: training images a class; likewise.
        output: folder of the stored runs, which are not run again; empty: see
            :func:`promptkit.results.results_dir`.
        model, pretrained: backbone; None: the mini CLIP, or ViT-B-16 with OpenAI's
            weights in the full profile.
        workers: processes at the same time.
        root: folder of the real datasets; None: $PROMPTKIT_DATA or ./data.
        mini, full: the chapter's choice in the mini and in the real world; none: "all".

    Raises:
        InputError: unknown profile, or a parameter that cannot be understood.
    """

    name: str
    profile: str = "mini"
    datasets: str | Sequence[str] | None = "all"
    seeds: str | int | Sequence[int] = (1, 2, 3)
    shots: str | int | Sequence[int] = 16
    output: str = ""
    model: str | None = None
    pretrained: str | None = None
    workers: int = 2
    root: str | None = None
    mini: Sequence[str] = ()
    full: Sequence[str] = ()

    def __post_init__(self):
        if self.profile not in PROFILES:
            raise unknown("profile", self.profile, list(PROFILES))
        self.model, self.pretrained = backbone(
            self.profile, self.model, self.pretrained
        )
        everything, chosen = (
            (data.DATASETS, self.full)
            if self.profile == "full"
            else (data.MINI_TASKS, self.mini)
        )
        self.seeds = whole_numbers("seeds", self.seeds)
        self.shots = whole_numbers("shots", self.shots, 1)
        workers = whole_numbers("workers", self.workers, 1)
        if len(workers) > 1 or workers[0] > 512:
            raise InputError(f"workers takes one number to 512, not {self.workers!r}")
        (self.workers,) = workers
        known = data.list_datasets()
        tasks = chosen or "all" if self.datasets is None else self.datasets
        tasks = names("datasets", tasks, known)
        self.tasks = list(everything) if tasks == ["all"] else tasks
        for task in self.tasks:
            if task not in known and not is_path(task):
                raise unknown("dataset", task, known)
        if self.profile == "smoke":
            self.tasks = [SMOKE_TASK] if SMOKE_TASK in self.tasks else self.tasks[:1]
            self.seeds, self.workers = self.seeds[:1], 1
        folder = results.results_dir(self.output or None)
        sweep_results(folder)
        # From here, so that an executed chapter does not depend on the machine.
        print(f"Runs are stored in {os.path.relpath(folder)}")
        pd.options.display.float_format = "{:.1f}".format
        matplotlib.rcParams["figure.dpi"] = 100

    @cached_property
    def clip(self) -> FrozenCLIP:
        """The frozen backbone."""
        return load_clip(self.model, self.pretrained)

    @property
    def main(self) -> str:
        """The set whose shifted versions there are, the source of transfers."""
        return "imagenet" if self.profile == "full" else "mini"

    @property
    def others(self) -> list[str]:
        """The chapter's tasks but for the main set: the targets of its transfers."""
        return [task for task in self.tasks if task != self.main]

    def load(self, name: str):
        """A dataset by name, from the chapter's folder."""
        return (
            data.load_dataset(name)
            if self.root is None
            else data.load_dataset(name, self.root)
        )

    def sentences(self, folder: str = "") -> dict[str, str]:
        """The option ``descriptions`` of this chapter's runs, for ``**``.

        Args:
            folder: of files with sentences about the classes, one a dataset, see
                :func:`promptkit.data.datasets.load_dataset`. Empty: the tasks have
                their own, but for the real datasets, which come without: in the full
                profile each class gets its dataset's first eight templates, filled.
        """
        if not folder and self.profile == "full":
            folder = tempfile.mkdtemp()
            for dataset in map(self.load, {*self.tasks, self.main}):
                filled = {
                    name: [t.replace("{}", name) for t in dataset.templates[:8]]
                    for name in dataset.classnames
                }
                Path(folder, f"{dataset.name}.json").write_text(json.dumps(filled))
        return {"descriptions": folder} if folder else {}

    def few(self, *wanted: str, n: int = 4) -> list[str]:
        """For ablations: those of the wanted tasks that the chapter has, else its first
        n; all if it is full.
        """
        return (
            self.tasks
            if self.profile == "full"
            else [t for t in wanted if t in self.tasks] or self.tasks[:n]
        )

    def sweep(
        self, protocol: str, methods, tasks=None, seeds=None, shots=None, **options
    ) -> pd.DataFrame:
        """The rows of a grid of runs, see :func:`promptkit.grids.sweep`; stored
        runs are read.

        Args:
            methods: names, or pairs of a name and its overrides; or a dict of such,
                whose keys then stand in the column "method".
            tasks, seeds, shots: the chapter's own by default.
            options: overrides for all of them.
        """
        where = {
            "clip": self.model,
            "pretrained": self.pretrained,
            "profile": self.profile,
            "root": self.root,
        }
        tasks, seeds, shots = (
            tasks or self.tasks,
            seeds or self.seeds,
            shots or self.shots,
        )
        named = isinstance(methods, dict)
        entries = methods if named else {"": methods}
        plans = {
            name: grid(
                protocol, [entry] if named else entry, tasks, seeds, shots, **where,
                **options,
            )
            for name, entry in entries.items()
        }  # fmt: skip
        every = [planned for part in plans.values() for planned in part]
        table = execute_all(
            every, self.workers, progress=False, results=self.output or None,
            shipped=self.profile != "smoke",
        )  # fmt: skip
        print(origin(table))
        if not named:
            return table
        parts = []
        keys = pd.Series(list(zip(table["method"], table["options"], strict=True)))
        for name, part in plans.items():
            wanted = {(p.config["method"], p.options) for p in part}
            rows = table[keys.isin(wanted).to_numpy()]
            parts.append(rows.assign(method=name, options=""))
        return pd.concat(parts)

    def train(
        self, method: str, task: str, protocol="base-to-new", seed=None, shots=None,
        **overrides,
    ) -> "Trained":  # fmt: skip
        """Train a method here and now, to look into it; nothing is stored but its
        teacher, where it has one that is trained too.
        """
        return self._train(self._plan(method, task, protocol, seed, overrides, shots))

    def live(
        self, method: str, protocol="base-to-new", task=None, **overrides
    ) -> "Trained":
        """Train a method on a task, by default the first, with the first seed before
        the reader's eyes, test it, and say whether the row that ships with the package
        is the same.
        """
        task = task or self.tasks[0]
        planned = self._plan(method, task, protocol, None, overrides)
        done = self._train(planned, progress=True)
        every = 5 if self.profile == "smoke" else 1
        rows = measure(
            done.method, planned.source, planned.targets, protocol,
            planned.config["seed"], every,
        )  # fmt: skip
        splits = {row["split"]: row["value"] for row in rows}
        print(
            f"{method} on {planned.source.name}, seed {planned.run.seed}:"
            f" {done.history.steps} steps;"
            f" {', '.join(f'{k} {v:.1f} %' for k, v in splits.items())}"
        )
        shipped = evidence.find(planned.config)
        if shipped is not None:
            known = shipped.set_index("split")["value"]
            apart = max(abs(known[split] - value) for split, value in splits.items())
            print(
                "The row that ships with the package is the same."
                if apart < 1e-3
                else f"The row that ships is up to {apart:.1f} points away, as another"
                " processor's rounding makes it."
            )
        return done

    def _plan(self, method, task, protocol, seed, overrides, shots=None):
        asked = Run(
            protocol,
            method,
            task,
            seed=self.seeds[0] if seed is None else seed,
            shots=shots or max(self.shots),
            clip=self.clip,
            profile=self.profile,
            root=self.root,
            overrides=overrides,
        )
        return plan(asked)

    def _train(self, planned, progress=False):
        dataset, recorded = planned.training_set(), RECORDER in os.environ
        few = 2 if recorded else None  # nobody looks at what comes of it
        teachers = {}
        if not recorded:
            teachers = _trained_objects(planned, self.output or None, False)
        trained = planned.build(dataset, **teachers)
        history = fit(
            trained, dataset, planned.recipe, planned.run.seed, progress=progress,
            max_steps=few,
        )  # fmt: skip
        return Trained(trained, dataset, planned.source, history)

    def verdicts(self, *claims: results.Claim) -> None:
        """Store the claims that were checked and show each with its verdict."""
        results.save_claims(self.name, list(claims), self.output or None)
        for claim in claims:
            display(claim)


@dataclass
class Trained:
    """A trained method, what it was trained on, the whole dataset, and how it went."""

    method: object
    training: object
    dataset: object
    history: History


def source(*objects) -> Code:
    """The source of classes or functions of the package, as it is, for display."""
    return Code(
        "\n\n".join(inspect.getsource(thing) for thing in objects), language="python"
    )
