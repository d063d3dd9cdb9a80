"""Grids of runs: planned, spread over processes; what is stored, or ships with the
package, is only read.
"""

import dataclasses
import itertools
import json
import os
import random
import time
import warnings
from collections.abc import Iterable

import pandas as pd
from tqdm import tqdm

from promptkit import data, evidence, identity
from promptkit.data import own
from promptkit.errors import InputError, unknown
from promptkit.method import register
from promptkit.protocols import request
from promptkit.recipe import PROTOCOLS, TRANSFER
from promptkit.registry import defined_elsewhere, specs, supervision
from promptkit.results import config_hash, find_run, newest, results_dir, run_rows
from promptkit.runs import Plan, execute, plan
from promptkit.workers import (
    WorkerError,
    parallel,
    same_measurement,
    with_absolute_paths,
)

RECORDER = "PROMPTKIT_RECORDER"  # a file for what is asked for, in place of runs


class SweepError(RuntimeError):
    """Some runs of a grid failed; all others are stored."""


def sweep(
    protocol: str, methods, datasets, seeds=(1, 2, 3), shots=(16,), *, workers=1,
    scheduler=None, progress=True, results=None, force=False, shipped=True, **options,
) -> pd.DataFrame:  # fmt: skip
    """Run a grid and return all its rows. A run's come from the results folder, else
    from the evidence that ships with the package, else the run is made now; how many of
    each is in the table's ``attrs["origin"]``, see :func:`origin`.

    Args:
        protocol: "few-shot", "base-to-new", "cross-dataset" or "domain-generalization".
        methods: names, or pairs of a name and a dict of overrides such as
            ``("coop", {"n_ctx": 4})``.
        datasets: names or Datasets; for the last two protocols the sources.
        seeds, shots: lists of them.
        workers, scheduler, progress, results, force, shipped: see :func:`execute_all`.
        options: fields of :class:`~promptkit.runs.Run`, of the recipe, and
            hyperparameters, as in :func:`promptkit.protocols.few_shot`.

    Raises:
        InputError: a run is not possible as it is asked for; nothing has been run then.
        SweepError: runs failed while the others went on; the text names the first of
            them.
    """
    plans = grid(protocol, methods, datasets, seeds, shots, **options)
    return execute_all(plans, workers, scheduler, progress, results, force, shipped)


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
    methods = [(m, {}) if isinstance(m, str) else m for m in _list(methods)]
    datasets = [_located(dataset) for dataset in _list(datasets)]
    options["targets"] = tuple(map(_located, options.get("targets", ())))
    options["labels"] = own.labels([*datasets, *options["targets"]])
    plans = {}
    cells = itertools.product(datasets, _list(shots), methods, _list(seeds))
    for dataset, n, (method, theirs), seed in cells:
        more = options | {"overrides": common | theirs}
        planned = plan(request(protocol, method, dataset, n, seed, clip, more))
        plans.setdefault(config_hash(planned.config), planned)
    return list(plans.values())


def benchmark(
    methods=None, datasets=None, protocols=PROTOCOLS, seeds=(1, 2, 3), shots=(16,),
    profile="mini", root=None, **options,
) -> list[Plan]:  # fmt: skip
    """The runs of the whole benchmark: methods x datasets x seeds in every protocol.

    The two transfer protocols train on those of the datasets that have shifted versions
    (ImageNet, the mini world's main set); cross-dataset tests on all the others.

    Args:
        methods: names, or pairs of a name and a dict of overrides; default: all, see
            :func:`promptkit.registry.specs`, and those that learn from sentences where
            every dataset has some.
        datasets: names; default: the eleven of the profile's world.
        profile: "full" is of the real datasets, the others of the mini world.
        options: as in :func:`sweep`.

    Raises:
        InputError: a run is not possible as it is asked for.
    """
    names = datasets or (data.DATASETS if profile == "full" else data.MINI_TASKS)
    names = list(names)
    given = options.get("descriptions")
    loaded = {name: data.load_dataset(name, root, descriptions=given) for name in names}
    sources = [name for name in names if loaded[name].shifts]
    if methods is None:
        methods = specs()
        texts = [spec for spec in methods if "texts" in supervision(spec)]
        bare = [name for name in names if not loaded[name].descriptions]
        if bare and texts:
            methods = [spec for spec in methods if spec not in texts]
            warnings.warn(
                f"{', '.join(texts)} learn from sentences about the classes,"
                f" and {bare[0]} has none: they are left out (descriptions=FOLDER has"
                " them)",
                stacklevel=2,
            )
    options |= {"profile": profile, "root": root}
    plans = []
    for protocol in protocols:
        if protocol not in TRANSFER:
            plans += grid(protocol, methods, names, seeds, shots, **options)
        for source in sources if protocol in TRANSFER else ():
            others = tuple(name for name in names if name != source)
            if protocol == "domain-generalization" or others:
                more = {"targets": others} if protocol == "cross-dataset" else {}
                plans += grid(
                    protocol, methods, source, seeds, shots, **options, **more
                )
    return plans


def execute_all(
    plans: Iterable[Plan], workers=1, scheduler=None, progress=True, results=None,
    force=False, shipped=True, seconds=None,
) -> pd.DataFrame:  # fmt: skip
    """Execute runs, those that are not stored yet and do not ship, and return the rows
    of all.

    A run that fails (its loss diverges, its memory is not enough) does not stop the
    others.

    Args:
        workers: processes at the same time, each with one thread.
        scheduler: address of a Dask scheduler; replaces ``workers``. Its workers must
            share the results folder.
        progress: show a bar over the runs, or the training's own if there is but one.
        results, force: see :func:`promptkit.runs.execute`.
        shipped: take rows from the evidence that ships with the package.
        seconds: begin and wait no longer than so; the rows are of what is done then.
    """
    plans = list(plans)
    if RECORDER in os.environ:
        return _recorded(plans)
    until = None if seconds is None else time.monotonic() + seconds
    alone = workers <= 1 and not scheduler
    if not alone and not all(planned.run.portable for planned in plans):
        raise InputError(
            "parallel workers load model and data themselves: give both by their names"
        )
    rows, todo, yours, failures = [], plans, 0, []
    if not force:
        rows, todo, yours = _known(plans, results, shipped)
    origin = {"yours": yours, "shipped": len(rows) - yours, "now": len(todo)}
    # Other processes get the request and load data and weights themselves; this one has
    # them at hand.
    items = todo
    if not alone:
        items = [(with_absolute_paths(part.run), part.config) for part in todo]
    where = results if results is False else str(results_dir(results).resolve())
    single = len(todo) == 1 and alone
    arguments = {"results": where, "force": force, "progress": progress and single}
    if not alone:
        arguments["classes"] = [identity.with_source(c) for c in defined_elsewhere()]
    arguments["failed"] = lambda item, reason: (None, reason)
    done = parallel(_attempt, items, workers, scheduler, **arguments)
    title = f"{len(todo)} of {len(plans)} runs to do"
    hidden = not progress or single or not todo
    with tqdm(total=len(todo), desc=title, unit="run", disable=hidden) as bar:
        for item, (table, error) in done:
            bar.update()
            late = until is not None and time.monotonic() > until
            if error is None:
                rows.append(table)
            else:
                run = item.run if isinstance(item, Plan) else item[0]
                name = getattr(run.dataset, "name", run.dataset)
                what = f"{run.method} on {name}, {run.shots} shots, seed {run.seed}"
                failures.append(f"{what}: {error}")
            if late:
                break
    if failures:
        others = ", the others are stored" if len(failures) < len(plans) else ""
        raise SweepError(
            f"{len(failures)} of {len(plans)} runs failed{others}; {failures[0]}"
        )
    table = newest(rows)
    table.attrs["origin"] = origin
    return table


def _known(plans, results, shipped):
    """Tables of the runs that are stored or ship, the plans of the others, and how many
    are stored.
    """
    rows, todo, yours = [], [], 0
    for planned in plans:
        stored = None if results is False else find_run(planned.config, results)
        yours += stored is not None
        found = None if stored is None else run_rows(stored)
        if found is None and shipped:
            found = evidence.find(planned.config)
        if found is not None:  # sentences are known by content, a file has any name
            rows.append(found.assign(options=planned.options))
        todo += [planned] if found is None else []
    return rows, todo, yours


def known(plans: Iterable[Plan], results=None) -> pd.DataFrame:
    """The rows of those runs that are stored or ship; nothing is run."""
    return newest(_known(plans, results, True)[0])


def origin(runs: pd.DataFrame) -> str:
    """Where the rows of a grid come from, in words: "275 runs: 0 yours, 273 shipped, 2
    made now".
    """
    counts = runs.attrs["origin"]
    yours, shipped, now = (counts[key] for key in ("yours", "shipped", "now"))
    total = yours + shipped + now
    return (
        f"{total} run{'s' * (total != 1)}: {yours} yours, {shipped} shipped, {now} made"
        " now"
    )


def _recorded(plans):
    """Note what is asked for in place of running it, and return rows whose values mean
    nothing: see :func:`promptkit.audit.asked`.
    """
    tables = []
    with open(os.environ[RECORDER], "a", encoding="utf-8") as file:
        for planned in plans:
            if planned.run.portable:
                file.write(json.dumps(dataclasses.asdict(planned.run)) + "\n")
            tables.append(_made_up(planned))
    table = newest(tables)
    table.attrs["origin"] = {"yours": 0, "shipped": 0, "now": len(plans)}
    return table


def _made_up(planned):
    draw = random.Random(config_hash(planned.config))
    targets = [planned.source.name, *(target.name for target in planned.targets)]
    splits = ("all",)
    if planned.run.protocol == "base-to-new":
        splits = ("base", "new", "hm")
    rows = [
        {"target": t, "split": s, "metric": "accuracy", "value": draw.uniform(40, 80)}
        for t in targets
        for s in splits
    ]
    record = {"config": planned.config, "rows": rows, "versions": {}, "hash": ""}
    record |= {"device": "", "seconds": 0.0, "created": "", "given": planned.given}
    return run_rows(record)


def _attempt(item, results, force, progress, classes=()):
    """(rows, None), or (None, what went wrong).

    Args:
        item: a plan, or a run and the configuration that its plan has where it was
            asked for: what this process would measure must be the same.
        classes: methods that this process cannot import, such as a notebook's.
    """
    try:
        for cls in classes:
            register(cls)
        if not isinstance(item, Plan):
            run, config = item
            item = plan(run)
            if reason := same_measurement(config, item.config):
                raise WorkerError(reason)
        return execute(item, results, force, progress), None
    except Exception as error:
        known = isinstance(error, InputError | WorkerError)
        return None, str(error) if known else f"{type(error).__name__}: {error}"


def _located(dataset):
    """A name, a Dataset, or the absolute path of one's own data."""
    path = isinstance(dataset, str) and dataset not in data.list_datasets()
    if path and own.is_path(dataset):
        return os.path.abspath(os.path.expanduser(dataset))
    return dataset


def _list(value):
    """A list of what may be one thing (a name, a number, a Dataset) or several."""
    many = isinstance(value, list | tuple | range | set)
    return list(value) if many else [value]
