"""The runs that ship with the package, and whether they still speak for its code.

The evidence is one tidy CSV a protocol, a row a measured number. A row is found by what
was asked for (method, options, recipe, protocol, data by content, shots, seed, profile,
weights by content), not by the code that measured it: for that, ``stamps.json`` says by
method which code its rows were measured with, or were found to agree with. Rows of a
method whose code bears no such stamp are left aside, so that old numbers never pass for
new code. See :mod:`promptkit.audit` for who gives stamps.
"""

import json
import os
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pandas as pd

from promptkit import identity
from promptkit.errors import InputError
from promptkit.files import write_atomically
from promptkit.results import COLUMNS, config_hash, harmonic_mean, options_of, run_rows

ASSETS = Path(__file__).parent / "assets" / "evidence"
KEYS = ["method", "overrides", "dataset", "shots", "seed", "asked", "target", "split"]
FIELDS = [
    *KEYS, "value", "profile", "model", "precision", "data", "parameters", "device",
    "seconds", "memory", "promptkit",
]  # fmt: skip
MORE = ["asked", "overrides"]  # than a run's rows have
KINDS = {"value": float, "seed": int, "shots": int, "asked": str, "data": str}
BLANK = {"memory": [""], "parameters": [""]}
LARGEST = 6_000_000  # bytes of all files


def folder() -> Path | None:
    """Where the evidence lies: $PROMPTKIT_EVIDENCE, else in the package; None if that
    is set to "none".
    """
    given = os.environ.get("PROMPTKIT_EVIDENCE", "")
    if given == "none":
        return None
    return Path(given) if given else ASSETS


def asked(config: dict) -> str:
    """16 hex digits of what a run's configuration asks for: all of it but the code."""
    return config_hash(_without_code(config))


def _without_code(config):
    if isinstance(config, dict):
        return {k: _without_code(v) for k, v in config.items() if k != "code"}
    return config


def specs(config: dict) -> list[str]:
    """The methods whose code a run's numbers come from: its own and its teachers'."""
    found = [config["method"]]
    for thing in config.get("objects", {}).values():
        found += specs(thing) if isinstance(thing, dict) else []
    return found


def load(**filters) -> pd.DataFrame:
    """All rows that ship, stamped or not, with the columns ``results.COLUMNS``,
    ``asked`` and ``overrides`` (as JSON); harmonic means are added to base and new.

    Args:
        filters: column=value to keep.

    Raises:
        InputError: a file is damaged; the text names it.
    """
    where = folder()
    rows = _load(str(where), _times(where))
    for column, value in filters.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def find(config: dict) -> pd.DataFrame | None:
    """The shipped rows of a run's configuration, or None: nobody asked for it yet, or
    the code is another one than the rows speak for.
    """
    where = folder()
    if where is None:
        return None
    spots = _index(str(where), _times(where)).get(asked(config))
    if spots is None:
        return None
    if loose := [spec for spec in specs(config) if not stamped(spec)]:
        _leave_aside(loose[0])
        return None
    return _load(str(where), _times(where)).iloc[spots][COLUMNS].copy()


def stamps() -> dict[str, str]:
    """Method -> digest of the code that its rows speak for."""
    where = folder()
    if where is None or not (where / "stamps.json").exists():
        return {}
    return _stamps(str(where), _times(where))


def stamped(spec: str) -> bool:
    """Whether the shipped rows of a method speak for its code as it is now."""
    return stamps().get(spec) == identity.of_code(spec)


def stamp(found: Iterable[str]) -> None:
    """Say that the shipped rows of methods speak for their code as it is now."""
    now = stamps() | {spec: identity.of_code(spec) for spec in found}
    text = json.dumps(dict(sorted(now.items())), indent=1) + "\n"
    write_atomically(_there() / "stamps.json", lambda file: file.write(text.encode()))


def add(records: Iterable[dict], dropped: Iterable[str] = ()) -> int:
    """Put runs into the evidence, in place of rows that answer the same question, and
    stamp their methods. Returns how many rows there are then.

    Args:
        records: runs as :func:`promptkit.results.read_run` reads them.
        dropped: what was asked for by rows that go.

    Raises:
        InputError: a method has shipped rows of other code, which would be mixed with
            these; or the whole would be too large to ship.
    """
    records = list(records)
    tables, new = [], [asked(record["config"]) for record in records]
    for record, key in zip(records, new, strict=True):
        given = json.dumps(record["config"]["overrides"], sort_keys=True)
        rows = run_rows(record).assign(asked=key, overrides=given)
        tables.append(rows[rows["split"] != "hm"])
    kept = load()
    kept = kept[~kept["asked"].isin({*new, *dropped}) & (kept["split"] != "hm")]
    made = {record["config"]["method"] for record in records}
    mixed = {s for s in made if s in set(kept["method"]) and not stamped(s)}
    if mixed:
        raise InputError(
            f"the shipped runs of {', '.join(sorted(mixed))} were measured with other"
            " code: audit them first (promptkit evidence audit), or make all of them"
            " anew (promptkit evidence fill --stale METHOD)"
        )
    rows = pd.concat([kept, *tables], ignore_index=True) if tables else kept
    files = {}
    for protocol, part in rows.groupby("protocol"):
        part = part.assign(value=part["value"].round(4)).sort_values(KEYS)
        part = part.astype({"parameters": "Int64", "memory": "Int64"})
        files[protocol] = part[FIELDS].to_csv(index=False, lineterminator="\n").encode()
    if sum(map(len, files.values())) > LARGEST:
        raise InputError(f"the evidence would be larger than {LARGEST / 1e6:g} MB")
    for protocol, content in files.items():
        write_atomically(
            _there() / f"{protocol}.csv", lambda file, text=content: file.write(text)
        )
    stamp(made)
    return len(rows)


def _there() -> Path:
    where = folder()
    if where is None:
        raise InputError("PROMPTKIT_EVIDENCE=none leaves no place for evidence")
    where.mkdir(parents=True, exist_ok=True)
    return where


def _times(where) -> tuple:
    """What changes when a file of the evidence does."""
    if where is None or not where.is_dir():
        return ()
    return tuple((p.name, p.stat().st_mtime_ns) for p in sorted(where.iterdir()))


@cache
def _load(where: str, times: tuple) -> pd.DataFrame:
    tables = []
    for path in sorted(Path(where).glob("*.csv")) if times else ():
        try:
            rows = pd.read_csv(
                path, keep_default_na=False, na_values=BLANK, dtype=KINDS
            )
            options = {t: options_of(json.loads(t)) for t in set(rows["overrides"])}
            rows = rows[FIELDS].assign(
                protocol=path.stem, options=rows["overrides"].map(options)
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"damaged evidence {path} ({error}): install promptkit anew, or get the"
                " file again from its repository"
            ) from None
        tables.append(rows)
    if not tables:
        return pd.DataFrame(columns=[*COLUMNS, *MORE])
    rows = pd.concat(tables, ignore_index=True)
    rows = pd.concat([rows, _harmonic(rows)], ignore_index=True)
    rows = rows.assign(metric="accuracy", created="", hash="")
    return rows.reindex(columns=[*COLUMNS, *MORE])


def _harmonic(rows):
    """The rows "hm" of base and new."""
    both = rows[rows["split"].isin(["base", "new"])]
    keys = ["asked", "target"]
    wide = both.pivot(index=keys, columns="split", values="value").reset_index()
    if not len(wide):
        return both
    wide["value"] = harmonic_mean(wide["base"], wide["new"])
    shared = both[both["split"] == "base"].drop(columns=["value", "split"])
    return shared.merge(wide[[*keys, "value"]], on=keys).assign(split="hm")


@cache
def _index(where: str, times: tuple) -> dict:
    return _load(where, times).groupby("asked", sort=False).indices


@cache
def _stamps(where: str, times: tuple) -> dict:
    try:
        found = json.loads((Path(where) / "stamps.json").read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no names")
    except (OSError, ValueError) as error:
        raise InputError(
            f"damaged stamps {where}/stamps.json ({error}): get the file again"
        ) from None
    return found


@cache
def _leave_aside(spec):
    runs = load(method=spec)["asked"].nunique()
    warnings.warn(
        f"the {runs} shipped runs of {spec} were measured with other code than this:"
        " they are left aside, and what is asked for is run now ('promptkit evidence"
        " audit' finds out whether the numbers are still the same)",
        stacklevel=4,
    )
