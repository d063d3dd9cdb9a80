"""The evidence: what ships is found by what was asked for and stamped by code; it is
filled, audited, and never mixed with what other code measured.
"""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from promptkit import audit, evidence, grids, identity, pages
from promptkit.chapter import Chapter
from promptkit.errors import InputError
from promptkit.results import COLUMNS, IDENTITY, find_run, load_results
from promptkit.runs import Run, plan

QUICK = {"epochs": 2, "batch_size": 32, "n_ctx": 2, "init": ""}
SHIPPED = evidence.ASSETS


def asked(seeds=(1, 2)):
    """A small grid of the mini world that trains in no time."""
    entries = ["clip", ("coop", QUICK)]
    return grids.grid("base-to-new", entries, ["sat"], list(seeds))


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Folders of our own for evidence and results, and a book that asks for little."""
    monkeypatch.setenv("PROMPTKIT_EVIDENCE", str(tmp_path / "evidence"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(pages, "asked", asked)
    evidence._leave_aside.cache_clear()
    return tmp_path


@pytest.fixture
def filled(apart):
    assert audit.fill("leaderboard", progress=False) == (3, 0)
    return apart / "evidence"


@pytest.fixture
def edited(monkeypatch):
    """Somebody edits coop.py; identity sees other code from now on."""
    of_code = identity.of_code

    def changed(spec):
        return "0" * 12 if spec == "coop" else of_code(spec)

    def edit():
        monkeypatch.setattr(identity, "of_code", changed)

    return edit


def test_what_is_asked_for_does_not_depend_on_code(edited):
    (config,) = (p.config for p in asked([1]) if p.config["method"] == "coop")
    edited()
    (other,) = (p.config for p in asked([1]) if p.config["method"] == "coop")
    assert config["code"] != other["code"]
    assert evidence.asked(config) == evidence.asked(other)
    for change in ({"seed": 2}, {"shots": 8}, {"method": "kgcoop"}, {"dataset": "x"}):
        assert evidence.asked(config | change) != evidence.asked(config)
    nested = config | {"objects": {"teacher": config}}
    assert evidence.asked(nested) == evidence.asked(
        other | {"objects": {"teacher": other}}
    )
    assert evidence.specs(nested) == ["coop", "coop"]


def test_filled_once_and_read_from_then_on(filled):
    text = (filled / "base-to-new.csv").read_text()
    assert text.splitlines()[0].split(",") == evidence.FIELDS
    assert len(text.splitlines()) == 1 + 3 * 2  # base and new; hm follows from them
    rows = grids.sweep("base-to-new", ["clip", ("coop", QUICK)], ["sat"], [1, 2])
    assert grids.origin(rows) == "3 runs: 0 yours, 3 shipped, 0 made now"
    assert list(rows.columns) == COLUMNS and set(rows["split"]) == {"base", "new", "hm"}
    assert not list(Path(os.environ["PROMPTKIT_RESULTS"]).glob("base-to-new/*"))
    fresh = grids.execute_all(asked(), shipped=False, progress=False)
    both = rows.merge(fresh, on=IDENTITY, suffixes=("", "_fresh"))
    assert len(both) == len(rows) == len(fresh)
    assert (both["value"] - both["value_fresh"]).abs().max() < 1e-3
    assert both["memory"].notna().all() and (both["parameters"] >= 0).all()
    again = grids.sweep("base-to-new", ["clip", ("coop", QUICK)], ["sat"], [1, 2, 3])
    assert grids.origin(again) == "4 runs: 3 yours, 0 shipped, 1 made now"
    assert audit.fill("leaderboard", progress=False) == (0, 0)
    assert (filled / "base-to-new.csv").read_text() == text


def test_status(apart):
    (before,) = audit.status("leaderboard")
    assert (before.asked, before.there, before.missing) == (3, 0, 3)
    assert before.minutes > 0
    audit.fill("leaderboard", progress=False)
    (after,) = audit.status("leaderboard")
    assert (after.there, after.missing, after.loose) == (3, 0, 0)


def test_old_numbers_never_pass_for_new_code(filled, edited):
    edited()
    (state,) = audit.status("leaderboard")
    assert (state.there, state.loose, state.missing) == (1, 2, 0)
    with pytest.warns(UserWarning, match="the 2 shipped runs of coop were measured"):
        evidence._leave_aside.cache_clear()
        rows = grids.sweep("base-to-new", ["clip", ("coop", QUICK)], ["sat"], [1, 2])
    assert grids.origin(rows) == "3 runs: 0 yours, 1 shipped, 2 made now"
    with pytest.raises(InputError, match="--stale coop"):
        audit.fill("leaderboard", progress=False)
    records = [find_run(p.config, Path(os.environ["PROMPTKIT_RESULTS"]))
               for p in asked() if p.config["method"] == "coop"]  # fmt: skip
    with pytest.raises(InputError, match="were measured with other code"):
        evidence.add(records[:1])
    # An audit that finds the same numbers gives the stamp.
    found = audit.audit(sample=5, progress=False)
    assert max(one.apart for one in found) < 1e-3 and len(found) == 3
    assert evidence.stamps()["coop"] == "0" * 12
    assert audit.status("leaderboard")[0].there == 3


def test_audit_names_what_differs(filled, edited):
    path = filled / "base-to-new.csv"
    rows = pd.read_csv(path, keep_default_na=False)
    wrong = (rows["method"] == "coop") & (rows["seed"] == 2)
    rows.loc[wrong & (rows["split"] == "new"), "value"] -= 5
    rows.to_csv(path, index=False)
    edited()
    found = audit.audit(sample=5, progress=False)
    table = audit.table(found).set_index("method")
    assert not table.loc["coop", "agrees"] and table.loc["clip", "agrees"]
    assert found[0].apart == pytest.approx(5, abs=1e-3) and "seed 2" in found[0].what
    assert evidence.stamps()["coop"] != "0" * 12  # no stamp for what differs
    # Made anew on purpose, the rows are the new code's and bear its stamp.
    assert audit.fill("leaderboard", stale=["coop"], progress=False) == (2, 0)
    assert evidence.stamps()["coop"] == "0" * 12
    assert audit.audit(sample=5, progress=False)[0].apart < 1e-3


def test_an_audit_without_time_for_all_stamps_what_it_repeated(filled, edited):
    rows = pd.read_csv(filled / "base-to-new.csv", dtype=str, keep_default_na=False)
    rows["seconds"] = rows["method"].map({"clip": "0.1", "coop": "9.0"})
    rows.to_csv(filled / "base-to-new.csv", index=False)
    edited()
    found = audit.audit(sample=5, minutes=0, progress=False)
    assert [one.method for one in found] == ["clip"]  # the quickest
    assert evidence.stamped("clip") and not evidence.stamped("coop")


def test_prune(filled, monkeypatch):
    monkeypatch.setattr(pages, "asked", lambda: asked([1]))
    monkeypatch.setattr(audit, "find_chapters", lambda folder: [])
    monkeypatch.setattr(audit, "select_chapters", lambda wanted, paths: [])
    audit.fill(prune=True, progress=False)
    assert set(evidence.load()["seed"]) == {0, 1}


def test_a_time_limit_leaves_the_rest(apart):
    made, missing = audit.fill("leaderboard", minutes=0, progress=False)
    assert made == 1 and missing == 2
    assert audit.fill("leaderboard", progress=False) == (2, 0)


def test_none_and_damaged_evidence(filled, monkeypatch):
    with pytest.raises(InputError, match="unknown method of the evidence 'cop'"):
        audit.fill("leaderboard", stale=["cop"])
    (filled / "stamps.json").write_text("[]")
    with pytest.raises(InputError, match="damaged stamps"):
        evidence.find(asked()[0].config)
    (filled / "base-to-new.csv").write_text("nothing,of,this\n1,2,3\n")
    with pytest.raises(InputError, match="damaged evidence .*base-to-new.csv"):
        evidence.load()
    monkeypatch.setenv("PROMPTKIT_EVIDENCE", "none")
    assert evidence.find(asked()[0].config) is None and not len(evidence.load())
    with pytest.raises(InputError, match="leaves no place"):
        evidence.stamp(["coop"])
    with pytest.raises(InputError, match="nothing to audit"):
        audit.audit()


def test_a_chapter_is_asked_by_a_recorder(apart, monkeypatch):
    note = apart / "note.jsonl"
    monkeypatch.setenv(grids.RECORDER, str(note))
    chapter = Chapter("99_test", datasets=["sat", "pets"], seeds=[1, 2])
    rows = chapter.sweep("base-to-new", ["clip", "coop"])
    assert (
        set(rows["dataset"]) == {"sat", "pets"} and rows["value"].between(0, 100).all()
    )
    chapter.sweep("cross-dataset", {"named": "coop"}, ["sat"], targets=["pets"])
    runs = [audit._run(json.loads(line)) for line in note.read_text().splitlines()]
    assert len(runs) == 2 + 2 * 2 + 2 and len(audit._distinct(runs)) == 8
    assert runs[-1].targets == ("pets",)
    done = chapter.train("coop", "sat")  # nobody looks at it
    assert done.history.steps == 2
    assert not load_results().size


def test_a_chapter_trains_live_and_compares(apart, capsys):
    chapter = Chapter("99_test", datasets=["sat"], seeds=[1], workers=1)
    chapter.live("coop", **QUICK)
    text = capsys.readouterr().out
    assert "coop on sat, seed 1: 4 steps; base" in text and "ships" not in text
    records = []
    for planned in asked([1]):
        grids.execute_all([planned], shipped=False, progress=False)
        records.append(find_run(planned.config))
    evidence.add(records)
    chapter.live("coop", **QUICK)
    assert "The row that ships with the package is the same." in capsys.readouterr().out


# --- what ships -----------------------------------------------------------------------


@pytest.fixture
def shipped(monkeypatch):
    monkeypatch.setenv("PROMPTKIT_EVIDENCE", str(SHIPPED))
    return evidence.load()


def test_a_change_of_what_a_method_imports_takes_its_stamp_off(monkeypatch):
    caches = identity._module, identity._imported
    tree, other = identity._tree, ast.parse("x = 1")
    before = {spec: identity.of_code(spec) for spec in ("qnet", "maple", "tpt")}
    for helper, changed in (("quaternion", {"qnet"}), ("picture", set())):
        name = f"promptkit.{helper}"
        monkeypatch.setattr(
            identity, "_tree", lambda n, name=name: other if n == name else tree(n)
        )
        for cached in caches:
            cached.cache_clear()
        now = {spec: identity.of_code(spec) for spec in before}
        assert {spec for spec in before if now[spec] != before[spec]} == changed
    for cached in caches:
        cached.cache_clear()


def test_every_shipped_method_is_stamped(shipped):
    """A change of code takes the stamps off: audit it, which is what gives them."""
    loose = sorted(s for s in set(shipped["method"]) if not evidence.stamped(s))
    assert not loose, (
        f"the shipped runs of {', '.join(loose)} were measured with other code:"
        " promptkit evidence audit --workers 2"
    )
    size = sum(path.stat().st_size for path in SHIPPED.glob("*.csv"))
    assert size < evidence.LARGEST


@pytest.mark.timeout(1800)  # it trains every method there is
def test_shipped_runs_still_come_out(shipped):
    """One base-to-new run of every method, of a plug-in over one host, live: what a
    change of code changes turns red here, whatever the stamps say.
    """
    plans = audit.choose(shipped[shipped["protocol"] == "base-to-new"], 0)
    once = {planned.run.method.partition("(")[0]: planned for planned in plans[::-1]}
    found = audit.repeat([*once.values()], give=False, progress=False, workers=2)
    wrong = [one for one in found if one.apart > audit.TOLERANCE]
    assert found and not wrong, wrong


def test_a_killed_fill_loses_nothing(apart):
    """Killed after its first run and started again, it ends with the same numbers."""
    code = (
        "from promptkit import audit, grids, pages; "
        "pages.asked = lambda: grids.grid('base-to-new', [('coop', {'epochs': 2, "
        "'n_ctx': 2, 'init': ''})], ['sat'], list(range(1, 9))); "
        "print(audit.fill('leaderboard', progress=False))"
    )
    stored = apart / "results" / "fill" / "base-to-new"

    def start(name):
        environment = os.environ | {"PROMPTKIT_EVIDENCE": str(apart / name)}
        return subprocess.Popen([sys.executable, "-c", code], env=environment)

    first = start("killed")
    while first.poll() is None and not list(stored.glob("*.json")):
        time.sleep(0.02)
    first.kill()
    first.wait()
    done = {path: path.read_bytes() for path in stored.glob("*.json")}
    assert done and start("killed").wait() == 0
    assert all(path.read_bytes() == content for path, content in done.items())
    (apart / "results" / "fill").rename(apart / "results" / "first")
    assert start("whole").wait() == 0
    tables = [
        pd.read_csv(apart / name / "base-to-new.csv").drop(
            columns=["seconds", "memory"]
        )
        for name in ("killed", "whole")
    ]
    pd.testing.assert_frame_equal(*tables)


def test_runs_that_spread_with_the_seed_are_not_repeated(shipped):
    rows = shipped[
        (shipped["protocol"] == "base-to-new") & (shipped["method"] == "protext")
    ]
    (first,) = audit.choose(rows, 0)
    same = {"dataset": first.config["dataset"], "overrides": first.config["overrides"]}
    seeds = rows[
        (rows["dataset"] == same["dataset"])
        & (rows["overrides"].map(json.loads) == same["overrides"])
        & (rows["split"] != "hm")
    ]
    assert seeds["seed"].nunique() > 2
    assert seeds.groupby("split")["value"].std().max() <= audit.TOLERANCE
    wild = rows.assign(value=rows["value"] + 50 * rows["seed"])
    assert len(audit.choose(wild, 5)) == 1  # a method is not left out


def test_a_run_is_planned_again_from_its_row(filled):
    for planned in audit.choose(evidence.load(), 5):
        assert evidence.find(planned.config) is not None
    rows = evidence.load().assign(asked="0" * 16)
    with pytest.raises(InputError, match="can be asked for no more"):
        audit.choose(rows, 0)


def test_memory_is_measured():
    planned = plan(Run("base-to-new", "clip", "sat"))
    rows = grids.execute_all([planned], shipped=False, progress=False)
    assert rows["memory"].between(50, 20_000).all()  # MiB
