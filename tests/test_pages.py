"""The pages that are made from stored runs, and what chapters share."""

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pandas as pd
import pytest
from test_protocols import tiny
from test_results import base_new

from promptkit import chapter as chapters
from promptkit import data, pages
from promptkit import runs as running
from promptkit.errors import InputError
from promptkit.pages import equal_host, title
from promptkit.recipe import Setting
from promptkit.registry import methods, recipe
from promptkit.results import (
    check_claim,
    load_claims,
    run_rows,
    save_claims,
)

ROOT = Path(__file__).parents[1]


def rows(method, base, new, overrides=None):
    """Runs on two tasks and three seeds, as the leaderboard reads them."""
    tables = []
    for n, task in enumerate(("pets", "cars")):
        for seed in (1, 2, 3) if method != "clip" else (0,):
            record = base_new(
                base + seed + n,
                new - seed,
                dataset=task,
                method=method,
                seed=seed,
                shots=16 * (seed > 0),
            )
            record["config"] |= {"profile": "mini", "overrides": overrides or {}}
            tables.append(run_rows({"hash": "", **record}))
    return pd.concat(tables, ignore_index=True)


def test_leaderboard(tmp_path, monkeypatch):
    host, overrides = equal_host("dept(coop)")
    runs = pd.concat(
        [
            rows("clip", 60, 65),
            rows("coop", 80, 50),
            rows("kgcoop", 75, 66),
            rows("dept(coop)", 85, 55),
            rows(host, 82, 51, overrides),
            rows("upl", 70, 64, {"members": 4}),  # as it is ranked
            rows("upl", 10, 10),
            rows("prograd", 70, 60).query("seed < 3"),
        ]
    )
    page = pages.leaderboard(tmp_path / "book", runs).read_text()
    found = re.findall(
        r"^\| ([^|]+?) \| ([\d.]+)[^|]*\| ([\d.]+)[^|]*\| ([\d.]+)", page, re.MULTILINE
    )
    order = [name for name, *_ in found]
    assert order[0] == "KgCoOp" and set(order) == {
        "Zero-shot CLIP",
        "CoOp",
        "CoOp* (DePT)",
        "KgCoOp",
        "DePT + CoOp",
        "UPL",
    }
    assert float(dict((name, base) for name, base, *_ in found)["UPL"]) > 70
    values = [float(row[3]) for row in found]
    assert values == sorted(values, reverse=True)
    assert re.search(
        r"KgCoOp is above CoOp on new classes\. \| more than 0 \| \+16\.0 points .*"
        r"\| \*\*holds\*\*",
        page,
    )
    assert re.search(
        r"DePT raises CoOp on new classes, at equal settings\. \| more than 0 \| \+4",
        page,
    )
    assert "promptkit evidence fill --chapters leaderboard" in page
    missing = re.search(r"with\s+3\s+seeds\s+yet:\s+([^.]+)\.", page)[1]
    missing = set(missing.replace("\n", " ").split(", "))
    assert {"MaPLe", "ProGrad"} <= missing and not missing & {
        "CoOp",
        "KgCoOp",
        "DePT + CoOp",
    }
    image = tmp_path / "book" / "_static" / "leaderboard.svg"
    first = image.read_bytes()
    assert len(first) > 5000
    pages.leaderboard(tmp_path / "book", runs)
    assert image.read_bytes() == first  # made anew, it is the same
    assert [c.text for c in pages.compared(runs, "kgcoop")] == [
        "KgCoOp is above CoOp on new classes.",
        "KgCoOp is above CoOp in harmonic mean.",
    ]
    assert [c.estimate for c in pages.compared(runs, "dept")] == pytest.approx(
        [3.0, 4.0, 3.98], abs=0.01
    )
    below = pages.compared(runs, "coop")[1]
    assert (
        below.text == "CoOp is below Zero-shot CLIP on new classes."
        and below.estimate == pytest.approx(15 + 2)
    )
    monkeypatch.setattr(pages, "known", lambda plans: runs.iloc[:0])
    monkeypatch.setattr(pages, "asked", list)
    with pytest.raises(InputError, match="fill --chapters leaderboard"):
        pages.leaderboard(tmp_path / "book")


def test_reported_numbers_are_the_papers_own(tmp_path):
    names = "clip coop kgcoop dept(coop) clip_adapter prograd qnet logoprompt".split()
    runs = pd.concat([rows(name, 80 - n, 60) for n, name in enumerate(names)])
    page = pages.leaderboard(tmp_path / "book", runs).read_text()
    found = dict(re.findall(r"^\| ([^|]+?) \|.* \| ([\d.]*) \|$", page, re.MULTILINE))
    assert found == {
        "Zero-shot CLIP": "71.70",  # with CoOp's, of CoCoOp's paper
        "CoOp": "71.66",
        "KgCoOp": "77.00",
        "DePT + CoOp": "77.29",
        "CLIP-Adapter": "",  # others reran these two
        "ProGrad": "",
        "QNet-style, reconstructed": "",
        "LoGoPrompt": "",
    }


def test_what_the_leaderboard_asks_for():
    plans = pages.asked(["sat"], [1, 2])
    names = [(p.config["method"], p.config["seed"]) for p in plans]
    assert ("clip", 0) in names and ("dept(coop)", 2) in names
    assert names.count(("coop", 1)) == 6  # its own recipe, and its plug-ins'
    keys = [(p.run.overrides, *key) for p, key in zip(plans, names, strict=True)]
    assert all(keys.count(key) == 1 for key in keys)  # nothing is asked twice
    found = {name.partition("(")[0] for name, _ in names}
    assert found == set(methods()) - set(pages.LEFT_OUT)
    given = {p.config["method"]: p.run.overrides for p in plans}
    assert given["upl"] == {"members": 4} and given["promptkd"] == {"epochs": 20}


def test_claims(tmp_path):
    save_claims(
        "04_cocoop",
        [
            check_claim("A beats B.", [1.0, 1.1, 1.2]),
            check_claim("B beats A.", [-1.0, 1.0]),
        ],
        tmp_path,
    )
    page = pages.claims(tmp_path / "book", tmp_path).read_text()
    assert (
        "2 claims, 1 hold, 0 do not, 1 are undecided" in page
        and "{doc}`04 </notebooks/04_cocoop>`" in page
    )
    assert "| A beats B. | more than 0 | +1.1 points" in page and "**holds**" in page
    with pytest.raises(InputError, match="no claims"):
        pages.claims(tmp_path / "book", tmp_path / "nothing")


def test_equal_hosts_have_the_plugins_settings():
    for host in ("coop", "cocoop", "kgcoop", "maple", "promptsrc"):
        name, overrides = equal_host(f"dept({host})")
        wanted, own = (
            recipe(spec, Setting("base-to-new", "sat", 16, "mini"))
            for spec in (f"dept({host})", host)
        )
        assert name == host
        for field in ("epochs", "lr", "batch_size"):
            assert overrides.get(field, getattr(own, field)) == getattr(wanted, field)
    assert (
        equal_host("dept(coop)")[1]["init"] == ""
    )  # sixteen random vectors, as in the plug-in's code


def test_an_equal_host_follows_its_own_stage_where_the_plugin_has_one_before():
    name, overrides = equal_host("caspl(coop)")
    wanted = recipe("caspl(coop)", Setting("base-to-new", "sat", 16, "mini"))
    own = recipe("coop", Setting("base-to-new", "sat", 16, "mini"))
    (second,) = wanted.stages
    assert name == "coop" and overrides["n_ctx"] == 8
    for field in ("epochs", "lr", "batch_size"):
        assert overrides.get(field, getattr(own, field)) == getattr(second, field)


def test_titles():
    assert title("dept(tpt(coop))") == "DePT + TPT + CoOp"


def test_chapter(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "load_clip", lambda *args, **kwargs: tiny())
    monkeypatch.setattr(chapters, "load_clip", lambda *args, **kwargs: tiny())
    running._clip.cache_clear()
    chapter = chapters.Chapter(
        "99_test", "smoke", seeds=[1, 2, 3], shots=2, output=str(tmp_path)
    )
    assert (
        chapter.tasks == [chapters.SMOKE_TASK]
        and chapter.seeds == [1]
        and chapter.workers == 1
    )
    assert (
        chapter.few("sat", "pets") == ["sat"]
        and chapter.few("planes", n=1) == chapter.tasks[:1]
    )
    runs = chapter.sweep(
        "base-to-new", ["clip", ("coop", {"n_ctx": 2, "init": ""})], ["sat"]
    )
    assert set(runs["method"]) == {"clip", "coop"} and sorted(
        runs.query("method == 'coop'")["seed"].unique()
    ) == [1]
    done = chapter.train("coop", "sat")
    assert (
        done.history.steps
        and len(done.method.classnames) == len(done.training.classnames) == 5
    )
    chapter.verdicts(check_claim("A beats B.", [1.0, 1.1]))
    assert [c.text for c in load_claims(tmp_path)["99_test"]] == ["A beats B."]
    full = chapters.Chapter("99_test", "full")
    assert (full.model, full.pretrained) == (
        "ViT-B-16",
        "openai",
    ) and full.tasks == list(data.DATASETS)
    assert chapters.Chapter("99_test", "full", model="mini").pretrained is None
    own = {"datasets": None, "mini": ["pets", "sat"]}
    assert chapters.Chapter("99_test", **own).tasks == ["pets", "sat"]
    assert chapters.Chapter("99_test", "full", **own).tasks == list(data.DATASETS)
    assert chapters.Chapter("99_test", "full", **own, full=["imagenet"]).tasks == [
        "imagenet"
    ]
    assert chapters.Chapter("99_test", "full", "eurosat, dtd").tasks == [
        "eurosat",
        "dtd",
    ]
    with pytest.raises(InputError, match="unknown profile"):
        chapters.Chapter("99_test", "huge")
    assert "class Trained" in str(chapters.source(chapters.Trained))
    running._clip.cache_clear()
