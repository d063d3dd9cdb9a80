"""Where runs are stored, what they add up to, what the papers report, and whether a
claim holds.

A run is one JSON file below the results folder, named after what it measured and a hash
of its whole configuration:
``<results>/<protocol>/<method>-<dataset>-<shots>shot-seed<seed>-<hash>.json``. It is
written to a temporary file and moved into place, so that a killed run leaves whole
files or none. A run is looked up by that hash: any change of its configuration
(hyperparameters, recipe, data, weights, code of the method) makes it another run.
"""

import hashlib
import html
import json
import math
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtri

from promptkit.errors import InputError
from promptkit.files import write_atomically
from promptkit.intervals import MOST_SEEDS, interval, seeds_needed, spread
from promptkit.recipe import PROTOCOLS, TRANSFER

SPLITS = ("base", "new", "hm", "all")
# The baseline of the few-shot figures: no method, but measured and stored like one.
PROBE = "linear-probe"
# What a results folder holds, by which it is known again; what a project's root holds.
FOLDERS = ("few-shot", "base-to-new", *TRANSFER, "claims", "trained", "checkpoints")
ROOTS = (".git", "pyproject.toml", "_config.yml")
# What tells two numbers apart; of several runs that agree in all of it, the newest is
# the one that counts.
IDENTITY = [
    "method",
    "options",
    "protocol",
    "dataset",
    "target",
    "split",
    "metric",
    "shots",
    "seed",
    "profile",
    "model",
    "precision",
    "data",
]
COLUMNS = [
    *IDENTITY,
    "weights",
    "value",
    "hash",
    "device",
    "seconds",
    "parameters",
    "memory",
    "promptkit",
    "torch",
    "open_clip",
    "python",
    "created",
]


# --- one run, one file ----------------------------------------------------------------


def results_dir(path=None) -> Path:
    """The results folder, the same one wherever in a project the process stands.

    It is ``path``, else the environment variable PROMPTKIT_RESULTS, else ``results`` in
    the nearest folder, from this one upward, that holds stored runs there or is a
    project's root (``.git``, ``pyproject.toml`` or ``_config.yml``), else
    ``./results``.
    """
    if path or os.environ.get("PROMPTKIT_RESULTS"):
        return Path(path or os.environ["PROMPTKIT_RESULTS"])
    here = Path.cwd()
    for folder in (here, *here.parents):
        found = folder / "results"
        if any((found / name).is_dir() for name in FOLDERS[:4]) or any(
            (folder / name).exists() for name in ROOTS
        ):
            return Path("results") if folder == here else found
    return Path("results")


def config_hash(config: dict) -> str:
    """First 16 hex digits of the SHA-256 of a configuration, independent of the order
    of its keys.
    """
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path, text: str) -> Path:
    """Write a text file so that readers, and a killed process, see the whole of it or
    none.
    """
    return write_atomically(path, lambda file: file.write(text.encode()))


def run_path(config: dict, root=None) -> Path:
    """The file of a run with this configuration."""
    name = re.sub(r"[^\w.+-]+", "_", "{method}-{dataset}".format(**config)).lstrip("_")
    name = name.encode()[:180].decode(errors="ignore")  # a file's has at most 255 bytes
    name += "-{shots}shot-seed{seed}".format(**config)
    return results_dir(root) / config["protocol"] / f"{name}-{config_hash(config)}.json"


def save_run(record: dict, root=None) -> Path:
    """Store a run.

    Args:
        record: ``config`` (everything that its hash is made of), ``rows`` (a dict a
            measured number: target, split, metric, value), and what is worth knowing
            beside them: versions, device, seconds, losses, and as ``given`` the
            sentences about the classes that were given in place of the dataset's own.
        root: results folder, see :func:`results_dir`.
    """
    record = {"format": 1, "hash": config_hash(record["config"]), **record}
    record = json.loads(json.dumps(record, default=str))
    record["digest"] = _digest(record)
    return write_text(
        run_path(record["config"], root),
        json.dumps(record, indent=1, default=str) + "\n",
    )


def read_run(path) -> dict:
    """Read one run's file.

    Raises:
        InputError: it is not a whole and untouched run; the text names the file and the
            remedy.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = record["rows"]
        if record["hash"] != config_hash(record["config"]):
            raise ValueError("its configuration does not match its hash")
        if record.get("digest", _digest(record)) != _digest(record):
            raise ValueError("its content does not match its digest")
        if not rows or not all(map(_usable, rows)):
            raise ValueError("it holds no usable numbers")
        _check_record(record)
        run_rows(record)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    ) as error:  # fmt: skip
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise InputError(
            f"damaged result file {path} ({reason}); delete it and run again"
        ) from None
    return record


def _digest(record):
    return config_hash({k: v for k, v in record.items() if k != "digest"})


def _usable(row):
    value = row["value"]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    texts = isinstance(row["target"], str) and isinstance(row["metric"], str)
    return number and texts and row["split"] in SPLITS and 0 <= value <= 100


def _check_record(record):
    """ValueError unless what stands beside the numbers is of its kind."""
    config, whole = record["config"], int
    kinds = {name: str for name in ("method", "dataset", "profile", "model")}
    kinds |= {"shots": whole, "seed": whole}
    parts = [(config, kinds), (record, {"created": str, "versions": dict})]
    parts += [({"given": "", **record}, {"given": str})]
    parts += [(record, {"seconds": int | float, "device": str})]
    for part, kinds in parts:
        for name, kind in kinds.items():
            if not isinstance(part[name], kind) or isinstance(part[name], bool):
                raise ValueError(f"its {name} is {part[name]!r:.60}")
    if config["protocol"] not in PROTOCOLS:
        raise ValueError(f"its protocol is {config['protocol']!r:.60}")


def find_run(config: dict, root=None) -> dict | None:
    """The stored run of a configuration, or None; a damaged file warns and counts as
    none: run it again.
    """
    path = run_path(config, root)
    if not path.exists():
        return None
    try:
        return read_run(path)
    except InputError as error:
        warnings.warn(f"{error}: running it again now", stacklevel=2)
        return None


def options_of(overrides: dict, given: str = "") -> str:
    """What a table calls the overrides of a run, and the sentences it was given:
    "epochs=10, lr=0.01", "descriptions=birds.json#1f3c5a".
    """
    as_stored = json.loads(json.dumps(overrides, sort_keys=True))
    options = [f"{key}={value}" for key, value in as_stored.items()]
    return ", ".join([*options, given] if given else options)


def run_rows(record: dict) -> pd.DataFrame:
    """A run as tidy rows, one a measured number, with the columns ``COLUMNS``;
    accuracies are in percent.
    """
    config = record["config"]
    digests = config.get("data", {})  # runs of earlier versions have none

    def data_of(target):
        pair = [digests.get(name, "") for name in (config["dataset"], target)]
        return config_hash({"data": pair})[:8] if any(pair) else ""

    shared = {
        key: config[key]
        for key in (
            "method",
            "protocol",
            "dataset",
            "shots",
            "seed",
            "profile",
            "model",
        )
    }
    shared |= {
        "options": options_of(config.get("overrides", {}), record.get("given", "")),
        "precision": config.get("clip", {}).get("precision", "fp32"),
        "weights": config.get("clip", {}).get("fingerprint", "")[:6],
        "parameters": record.get("parameters"),
        "memory": record.get("memory"),
        **{key: record[key] for key in ("hash", "device", "seconds", "created")},
    }
    rows = [
        shared | record["versions"] | row | {"data": data_of(row["target"])}
        for row in record["rows"]
    ]
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def load_results(root=None, **filters) -> pd.DataFrame:
    """All stored runs as one table of tidy rows.

    Where several runs measured the same thing under configurations that differ (another
    version of the code or of the recipe), the newest alone is kept.

    Args:
        root: results folder, see :func:`results_dir`.
        filters: column=value or column=[values] to keep, e.g. ``method=["clip",
            "coop"]``.

    Raises:
        InputError: a file is damaged; the text names it.
    """
    records = map(read_run, run_files(results_dir(root)))
    return newest(map(run_rows, records)).pipe(_filtered, filters)


def run_files(folder) -> list[Path]:
    """The files of the runs in a results folder, without hidden ones such as a file
    manager leaves beside them.
    """
    return sorted(Path(folder).glob("*/[!.]*shot-seed*.json"))


def newest(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Join tables of rows and keep the newest of each measurement."""
    tables = [table for table in tables if len(table)]
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    rows = pd.concat(tables, ignore_index=True).sort_values("created", kind="stable")
    return rows.drop_duplicates(IDENTITY, keep="last").sort_values(
        IDENTITY, kind="stable", ignore_index=True
    )


def _filtered(rows, filters):
    for column, wanted in filters.items():
        if column not in rows:
            raise InputError(
                f"no column {column!r} to filter by; there are"
                f" {', '.join(rows.columns)}"
            )
        rows = rows[
            rows[column].isin([wanted] if np.isscalar(wanted) else list(wanted))
        ]
    return rows.reset_index(drop=True)


# --- means and intervals --------------------------------------------------------------


def harmonic_mean(base, new):
    """2 b n / (b + n), of numbers or of arrays; 0 where both are 0."""
    base, new = np.asarray(base, float), np.asarray(new, float)
    total = base + new
    return np.divide(2 * base * new, total, out=np.zeros_like(total), where=total != 0)[
        ()
    ]


def linear_harmonic_mean(base, new):
    """Values, one a value of base and new, whose mean is the harmonic mean of the two
    means, and whose spread is its spread to first order: H is homogeneous, so
    ``H(b, n) = dH/db b + dH/dn n``.
    """
    b, n = np.mean(np.asarray(base)), np.mean(np.asarray(new))
    return base * (2 * (n / (b + n)) ** 2) + new * (2 * (b / (b + n)) ** 2)


def summarise(runs: pd.DataFrame, level=0.95, average=True) -> pd.DataFrame:
    """Means over seeds with intervals, one row for each method, dataset, target, split
    and number of shots.

    The conventions of the benchmark: the harmonic mean of a dataset is that of its
    seed-averaged base and new accuracies; in the row ``dataset="average"`` base and new
    are averaged over the datasets first and "hm" is the harmonic mean of the two
    averages (``hm_of_tasks`` is the mean of the datasets' harmonic means, which a few
    papers report in its place). Averages of cross-dataset and domain-generalization
    leave the source out, and of data whose content changed all averages take the newest
    alone. Intervals are over seeds, for an average over datasets as
    :mod:`promptkit.intervals` says.

    Returns:
        Columns method, options, protocol, profile, model, precision, shots, dataset,
        target, split, mean, low, high, seeds, datasets. In an average row only seeds
        that cover every dataset enter the interval.
    """
    runs = _told_apart(runs)
    keys = ["method", "options", "protocol", "profile", "model", "precision", "shots"]
    columns = [
        *keys,
        "dataset",
        "target",
        "split",
        "mean",
        "low",
        "high",
        "seeds",
        "datasets",
    ]
    out = []
    for group, rows in runs.groupby(keys, sort=False, dropna=False):
        head = dict(zip(keys, group, strict=True))
        cells = _by_seed(rows)
        for dataset, target in dict.fromkeys((d, t) for d, t, _ in cells.columns):
            cell = cells[dataset][target]
            out += [
                head | {"dataset": dataset, "target": target, "datasets": 1} | row
                for row in _cells(cell, level)
            ]
        if average and rows["latest"].any():
            cells = _by_seed(rows[rows["latest"]])
            for dataset, row in _average(cells, head["protocol"], level):
                out.append(head | {"dataset": dataset, "target": "average"} | row)
    return pd.DataFrame(out, columns=columns)


def _by_seed(rows):
    """Values with a row a seed and a column a (dataset, target, split)."""
    return rows.pivot_table(
        index="seed", columns=["dataset", "target", "split"], values="value"
    )


def _told_apart(runs):
    """Data of one name whose contents differ, such as a folder before and after its
    labels were corrected, get a part of their digest behind the name, and so do models
    of one name whose weights differ, as after a file was replaced; the column
    ``latest`` says of each row whether its data are those that were measured last.
    """
    runs = runs.reset_index(drop=True)
    runs = runs.assign(
        precision=runs.get("precision", "fp32"), data=runs.get("data", "")
    )
    in_time = runs.sort_values("created", kind="stable") if "created" in runs else runs
    last = in_time.groupby(["protocol", "dataset", "target"])["data"].transform("last")
    runs = runs.assign(latest=runs["data"].eq(last))
    for column in ("dataset", "target"):
        contents = runs.groupby(["protocol", "dataset", "target"])["data"]
        several = contents.transform("nunique") > 1
        if column == "target":
            several = several & (runs["target"] != runs["dataset"])
        names = runs[column].where(~several, runs[column] + "#" + runs["data"].str[:6])
        runs = runs.assign(**{column: names})
    if "weights" in runs:  # shipped runs are of the weights that ship, and name none
        weights = runs["weights"].replace("", None)
        models = [runs["model"], runs["precision"]]
        several = weights.groupby(models).transform("nunique") > 1
        plain = weights.isna() | ~several
        named = runs["model"].where(plain, runs["model"] + "#" + weights)
        runs = runs.assign(model=named)
    return runs


def _cells(cell, level):
    """Rows for one dataset; ``cell`` has a row a seed and a column a split."""
    for split in (split for split in SPLITS if split in cell):
        values = cell[split].dropna()
        mean, low, high = interval(values, level)
        if split == "hm" and {"base", "new"} <= set(cell):
            mean = float(harmonic_mean(cell["base"].mean(), cell["new"].mean()))
        yield {
            "split": split,
            "mean": mean,
            "low": low,
            "high": high,
            "seeds": len(values),
        }


def _average(cells, protocol, level):
    """Rows of the average over datasets or, for a protocol with targets, over the
    targets of each source.
    """
    names = cells.columns.to_frame(index=False)
    if protocol in TRANSFER:
        groups = [
            (source, names[(names.dataset == source) & (names.target != source)])
            for source in names.dataset.unique()
        ]
    else:
        groups = [("average", names)]
    for dataset, members in groups:
        count = members["target"].nunique()
        if not count:
            continue
        members = cells[list(members.itertuples(index=False, name=None))]
        by_split = {
            split: part.droplevel("split").dropna(axis=1)  # complete seeds alone
            for split, part in members.T.groupby(level="split", sort=False)
        }
        # The means are the papers': of every number there is.
        means = members.mean().groupby(level="split", sort=False).mean().to_dict()
        if {"base", "new"} <= set(means):
            by_split["hm_of_tasks"], means["hm_of_tasks"] = by_split["hm"], means["hm"]
            base, new = by_split["base"], by_split["new"]
            by_split["hm"] = linear_harmonic_mean(base, new).dropna(axis=1)
            means["hm"] = float(harmonic_mean(means["base"], means["new"]))
        for split in (*SPLITS, "hm_of_tasks"):
            if split in means:
                table = by_split[split]
                if protocol in TRANSFER:  # one training for all targets
                    table = table.mean().to_frame().T
                half = spread(table).half(level=level)
                yield dataset, {
                    "split": split, "mean": float(means[split]),
                    "low": means[split] - half, "high": means[split] + half,
                    "seeds": table.shape[1], "datasets": count,
                }  # fmt: skip


# --- the papers' own numbers ----------------------------------------------------------


def paper_numbers(variants=False, **filters) -> pd.DataFrame:
    """What the papers report, with paper (arXiv id, or the proceedings where there is
    none) and table.

    ``metric`` is "base", "new", "hm" or "accuracy", values in percent and as printed,
    misprints included. In cross-dataset and domain-generalization rows ``dataset`` is
    the target; the source is ImageNet. ``dataset="average"`` rows are the averages that
    the paper prints over the datasets of the protocol. Those over datasets of its own
    choice are "average_3", "average_4", "average_5", "average_8" and "average_10", by
    their number: "average_4" of TPT's rows is that of the four shifts, and LoGoPrompt's
    "average_5" includes the source. A method that needs no labels has 0 shots.

    ``variant`` is empty for a method as its paper runs it, and tells ablations,
    teachers and other authors' reruns apart ("rerun", "without selection", "64 images a
    class"). Those rows are left out unless they are asked for.

    Args:
        variants: rows with a variant too.
        filters: column=value or column=[values] to keep; one by ``variant`` looks at
            all rows.

    Returns:
        Columns paper, table, method, protocol, dataset, metric, shots, backbone, value,
        variant.
    """
    with (
        resources.files("promptkit")
        .joinpath("assets/papers.csv")
        .open(encoding="utf-8") as file
    ):
        rows = pd.read_csv(file, dtype={"paper": str}, keep_default_na=False)
    if not variants and "variant" not in filters:
        rows = rows[rows["variant"] == ""]
    return _filtered(rows, filters)


def compare(
    runs: pd.DataFrame, papers: pd.DataFrame | None = None, level=0.95, how="left"
) -> pd.DataFrame:
    """Our means beside the papers' numbers, joined by method, protocol, dataset (or
    target), split and shots.

    Args:
        runs: tidy rows of runs (averages are made here, so that average rows meet
            average rows).
        papers: rows of :func:`paper_numbers`; by default all without a variant.
        how: "left" keeps every number of ours, "inner" those that a paper reports too.

    Returns:
        Columns of :func:`summarise` and ``reported``, ``difference`` (ours - reported),
        ``paper``, ``table``, ``backbone``, ``variant``.
    """
    ours = summarise(runs, level)
    papers = paper_numbers() if papers is None else papers
    papers = papers.assign(
        split=papers["metric"].replace("accuracy", "all"), target=papers["dataset"]
    )
    papers = papers.rename(columns={"value": "reported"}).drop(
        columns=["metric", "dataset"]
    )
    joined = ours.merge(
        papers, on=["method", "protocol", "target", "split", "shots"], how=how
    )
    return joined.assign(difference=joined["mean"] - joined["reported"])


# --- claims ---------------------------------------------------------------------------


def differences(
    runs: pd.DataFrame, a: str, b: str, split: str | None = None, average=False
) -> pd.Series:
    """Paired differences ``a - b`` of two methods on the same task, target, split,
    shots and seed.

    A method that has neither shots nor a seed (zero-shot CLIP) is paired with every run
    of the other.

    Args:
        runs: tidy rows; ``a`` and ``b`` are names in its column ``method``, or
            ``"method | options"``.
        split: keep one of "base", "new", "hm", "all".
        average: for claims about the average over exactly these tasks: seeds that some
            task lacks and the sources of a transfer are left out, its targets are
            averaged, and "hm" are values whose mean is the difference of the harmonic
            means of the averages.

    Raises:
        InputError: a method has no rows, has several for one measurement, or nothing of
            the two is paired.
    """
    runs = newest_weights(runs)
    left, right = _side(runs, a), _side(runs, b)
    for key in ("shots", "seed"):  # 0 where a method has none
        if (left[key] == 0).all() != (right[key] == 0).all():
            left, right = (
                side.drop(columns=key) if (side[key] == 0).all() else side
                for side in (left, right)
            )
    keys = [key for key in left if key in right and key != "value"]
    pairs = left.merge(right, on=keys, suffixes=("_a", "_b"))
    if average:
        pairs = _of_averages(pairs)
    if split is not None:
        pairs = pairs[pairs["split"] == split]
    if not len(pairs):
        raise InputError(
            f"nothing was measured for both {a!r} and {b!r} on the same task"
            + (f" ({split})" if split else "")
        )
    pairs = pairs.set_index(
        ["protocol", "dataset", "target", "split", "shots", "seed"]
    ).sort_index()
    return (pairs["value_a"] - pairs["value_b"]).rename(f"{a} - {b}")


def over_shots(runs: pd.DataFrame, a: str, b: str, shots: Iterable[int]) -> pd.Series:
    """Paired differences ``a - b`` of few-shot runs, averaged over these numbers of
    shots: one a task and seed. See :func:`differences`.
    """
    wanted = runs[runs["shots"].isin([0, *shots])]  # 0: a method that needs none
    found = differences(wanted, a, b, "all", average=True)
    return found.groupby(["dataset", "seed"]).mean().rename(f"{a} - {b}")


def per_target(runs: pd.DataFrame) -> pd.DataFrame:
    """The targets of a transfer as so many tasks; its source is left out."""
    runs = runs[runs["target"] != runs["dataset"]]
    return runs.assign(dataset=runs["target"], protocol="few-shot", data="")


def label(runs: pd.DataFrame) -> pd.Series:
    """What tables and figures call a row's method: its name, and the options that were
    given to it if any.
    """
    options = runs["options"].fillna("").astype(str)
    return runs["method"].where(options == "", runs["method"] + " | " + options)


def _side(runs, name):
    names = label(runs)
    rows = runs[names == name]
    rows = rows if len(rows) else runs[runs["method"] == name]
    if not len(rows):
        raise InputError(
            f"no runs of {name!r} to compare; there are"
            f" {', '.join(sorted(set(names))) or 'none at all'}"
        )
    keys = ["protocol", "dataset", "target", "split", "shots", "seed"]
    if rows.duplicated(keys).any():
        raise InputError(
            f"several runs of {name!r} measure the same; name one as 'method |"
            " options', or filter the rows"
        )
    return rows[[*keys, "value"]]


def newest_weights(runs):
    """The rows of those weights of each model that were measured last, and rows that
    name none; a comparison never joins seeds of replaced weights.
    """
    if "weights" not in runs:
        return runs
    runs = runs.reset_index(drop=True)
    runs = runs.assign(weights=runs["weights"].replace("", None))
    in_time = runs.sort_values("created", kind="stable") if "created" in runs else runs
    models = [in_time["model"], in_time.get("precision", in_time["model"])]
    last = in_time["weights"].groupby(models).transform("last").reindex(runs.index)
    return runs[runs["weights"].isna() | runs["weights"].eq(last)]


def _of_averages(pairs):
    """The same pairs, of complete seeds alone, a training's targets averaged, and with
    values of "hm" that average to the harmonic mean of the averages.
    """
    transfer = pairs["protocol"].isin(TRANSFER)
    pairs = pairs[~transfer | (pairs["dataset"] != pairs["target"])]
    keys = ["protocol", "dataset", "shots", "seed", "split"]
    groups = pairs.groupby(keys)[["value_a", "value_b"]]
    count = groups.size()  # of targets
    most = count.groupby(level=["protocol", "dataset", "shots", "split"])
    means = groups.mean()[count == most.transform("max")]
    found = means.unstack("split").reset_index("dataset")
    every = found["dataset"].groupby(level=["protocol", "shots", "seed"]).size()
    every = every[every == every.groupby(level=["protocol", "shots"]).transform("max")]
    found = found.loc[found.index.isin(every.index)]
    found = found.set_index("dataset", append=True)
    for side in ("value_a", "value_b"):
        if {"base", "new"} <= set(found[side]):
            for _, part in found.groupby(level=["protocol", "shots"]):
                hm = linear_harmonic_mean(part[side, "base"], part[side, "new"])
                found.loc[part.index, (side, "hm")] = hm
    if found.index.get_level_values("seed").nunique() == 1:  # no spread within tasks
        found = found.groupby(level=["protocol", "shots", "seed"]).mean()
        found = pd.concat({"average": found}, names=["dataset"])
    found = found.stack("split", future_stack=True).dropna().reset_index()
    return found.assign(target="average")


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper and what the runs say about it; made by
    :func:`check_claim`.
    """

    text: str
    verdict: str  # "holds", "does not hold" or "undecided"
    estimate: (
        float  # mean difference, in the units of the differences (percentage points)
    )
    low: float
    high: float
    n: int
    criterion: str
    level: float = 0.95
    unit: str = "points"  # of the differences
    of: str = "values"  # what the n independent values are: "seeds", "tasks", ...
    needed: int | None = None  # of them for a decision, where it is undecided

    def row(self) -> dict:
        """The claim as a row of a table."""
        return asdict(self)

    def measured(self, named=True) -> str:
        """Estimate and interval in words, e.g. ``+8.1 points [+6.9, +9.3], 95 %
        interval, 3 seeds``; ``named=False`` leaves out what kind of interval it is.
        """
        digits = 1 if self.unit else 2
        low, high = (f"{end:+.{digits}f}" for end in (self.low, self.high))
        interval = f" [{low}, {high}]"
        if named:
            interval += f", {100 * self.level:g} % interval"
        return (
            f"{self.estimate:+.{digits}f}{f' {self.unit}' * bool(self.unit)}"
            f"{', no interval' if math.isnan(self.low) else interval},"
            f" {_counted(self.n, self.of)}"
        )

    def would_decide(self) -> str:
        """What an undecided claim lacks, e.g. ``about 12 seeds would decide it``; empty
        where it is decided.
        """
        if self.verdict != "undecided":
            return ""
        if self.n < 2:
            return f"{_counted(self.n, self.of)} cannot decide it"
        if self.needed is None:
            return f"{MOST_SEEDS:,} {self.of} would not decide it"
        of = self.of.split(" on each")[0]  # "seeds on each of 11 tasks"
        return f"about {_counted(self.needed, of)} would decide it"

    def __str__(self):
        more = f"; {self.would_decide()}" if self.would_decide() else ""
        return (
            f"{self.verdict.upper()}: {self.text} (asked: {self.criterion}; measured:"
            f" {self.measured()}{more})"
        )

    def _repr_html_(self):
        line = {"holds": "solid", "does not hold": "double", "undecided": "dashed"}[
            self.verdict
        ]
        details = f"asked: {self.criterion}; measured: {self.measured()}"
        if self.would_decide():
            details += f"; at this mean and spread {self.would_decide()}"
        details = html.escape(details)
        return (
            f'<div style="border-left: 6px {line} #555; padding: .2em .8em; margin:'
            f' .4em 0"><strong>{self.verdict}</strong>:'
            f" {html.escape(self.text)}<br><small>{details}</small></div>"
        )


def _counted(n, of):
    """As in "3 seeds" and "1 seed"."""
    if n == 1:
        first, *more = of.split(" ", 1)
        of = " ".join([first.removesuffix("s"), *more])
    return f"{n:,} {of}"


def _kind_of(differences, found):
    """What the values of :func:`differences` are independent in: "seeds", "seeds on
    each of 11 tasks", "tasks", or "values" if it cannot be told.
    """
    if found.tasks > 1:
        return f"seeds on each of {found.tasks} tasks"
    index = getattr(differences, "index", None)
    for name, of in (("seed", "seeds"), ("task", "tasks"), ("dataset", "tasks")):
        if name in getattr(index, "names", ()):
            if index.get_level_values(name).nunique() == found.n:
                return of
    return "values"


def check_claim(
    text: str, differences, at_least=0.0, within: float | None = None, level=0.95,
    unit="points", of: str | None = None,
) -> Claim:  # fmt: skip
    """Decide a claim about a mean difference by its confidence interval.

    "A beats B by d or more" holds when the whole interval of A - B lies above d, does
    not hold when it lies below d, and is undecided in between or with fewer than two
    differences. With ``within`` the claim is "A is near B": it holds when the interval
    lies inside +-within and does not when it lies outside.

    Args:
        text: the claim, as a sentence.
        differences: paired differences as those of :func:`differences`, or independent
            of each other; see :func:`promptkit.intervals.spread`.
        at_least: d, in the units of the differences.
        within: half-width of "near"; replaces ``at_least``.
        unit: of the differences, "" for pure numbers.
        of: what the differences are independent in, in the plural; by default "seeds"
            (on each of several tasks) or "tasks" where their index tells, else
            "values".

    Raises:
        InputError: there are no differences, or one is not a finite number.
    """
    values = np.asarray(list(differences), float)
    if not len(values) or not np.isfinite(values).all():
        raise InputError(
            f"the claim {text!r} needs finite differences, not {values.tolist()[:5]}"
        )
    found = spread(differences)
    mean, low, high = found.interval(level)
    in_units = f" {unit}" * bool(unit)
    if within is not None:
        holds, fails = (
            (-within < low and high < within),
            (low > within or high < -within),
        )
        criterion = f"within {within:g}{in_units}"
        distance = abs(abs(mean) - within)
    else:
        holds, fails = low > at_least, high < at_least
        criterion = f"at least {at_least:+g}{in_units}" if at_least else "more than 0"
        distance = abs(mean - at_least)
    verdict = "holds" if holds else "does not hold" if fails else "undecided"
    needed = None
    if verdict == "undecided" and found.n > 1:
        needed = seeds_needed(found, distance, level)
    return Claim(
        text, verdict, mean, low, high, found.n, criterion, level, unit,
        of or _kind_of(differences, found), needed,
    )  # fmt: skip


def check_correlation(text: str, x, y, level=0.95, of="values") -> Claim:
    """Decide the claim that two quantities go together, by the interval of their
    Pearson correlation (Fisher's transformation).

    Fewer than four pairs, or a quantity that does not vary, leave it undecided.

    Args:
        text: the claim, as a sentence.
        x, y: n numbers each, whose pairs are independent of each other.
        of: what these are, in the plural.

    Raises:
        InputError: x and y differ in length, or a number is not finite.
    """
    x, y = (np.asarray(list(values), float) for values in (x, y))
    if x.shape != y.shape or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise InputError(
            f"the claim {text!r} needs pairs of finite numbers, not {len(x)} and"
            f" {len(y)} numbers {x.tolist()[:3]} and {y.tolist()[:3]}"
        )
    r, low, high, needed = math.nan, math.nan, math.nan, None
    z = float(ndtri((1 + level) / 2))
    if len(x) > 3 and np.ptp(x) > 0 and np.ptp(y) > 0:
        r = float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))
        half = z / math.sqrt(len(x) - 3)
        centre = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
        low, high = math.tanh(centre - half), math.tanh(centre + half)
    verdict = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
    if verdict == "undecided" and abs(r) > 0:  # at this r the interval ends at 0
        enough = 4 + math.floor((z / math.atanh(r)) ** 2)
        needed = enough if enough <= MOST_SEEDS else None
    criterion, unit = "a correlation above 0", ""
    return Claim(
        text, verdict, r, low, high, len(x), criterion, level, unit, of, needed
    )


def claims_table(claims: Iterable[Claim]) -> pd.DataFrame:
    """Claims as a table for a notebook: claim, asked, measured, verdict, and what would
    decide those that are undecided.
    """
    rows = [
        [c.text, c.criterion, c.measured(), c.verdict, c.would_decide()] for c in claims
    ]
    columns = ["claim", "asked", "measured", "verdict", "what would decide it"]
    return pd.DataFrame(rows, columns=columns)


def save_claims(chapter: str, claims: Iterable[Claim], root=None) -> Path:
    """Keep a chapter's claims in the results folder, for the page that collects those
    of all chapters.
    """
    rows = [claim.row() for claim in claims]
    return write_text(
        results_dir(root) / "claims" / f"{chapter}.json",
        json.dumps(rows, indent=1) + "\n",
    )


def load_claims(root=None) -> dict[str, list[Claim]]:
    """Chapter -> its claims, as stored by :func:`save_claims`.

    Raises:
        InputError: a file is damaged; the text names it.
    """
    claims = {}
    for path in sorted((results_dir(root) / "claims").glob("[!.]*.json")):
        try:
            claims[path.stem] = [
                Claim(**row) for row in json.loads(path.read_text(encoding="utf-8"))
            ]
        except (ValueError, TypeError) as error:
            raise InputError(
                f"damaged claims file {path} ({error}); delete it and run the chapter"
                " again"
            ) from None
    return claims
