"""Stored runs, means and intervals, the papers' numbers, claims."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from promptkit import data, results
from promptkit.errors import InputError
from promptkit.files import write_atomically
from promptkit.results import (
    Claim,
    check_claim,
    check_correlation,
    claims_table,
    compare,
    config_hash,
    differences,
    harmonic_mean,
    interval,
    load_claims,
    load_results,
    newest,
    options_of,
    over_shots,
    paper_numbers,
    per_target,
    read_run,
    run_path,
    run_rows,
    save_claims,
    save_run,
    summarise,
)


def record(
    method="coop",
    dataset="pets",
    seed=1,
    protocol="base-to-new",
    created="2026-01-01",
    shots=16,
    **values,
):
    """A run's record; values are its numbers by split or by target."""
    config = {
        "method": method,
        "dataset": dataset,
        "seed": seed,
        "protocol": protocol,
        "shots": shots,
        "profile": "mini",
    }
    config |= {
        "model": "mini",
        "overrides": values.pop("overrides", {}),
        "code": values.pop("code", "c0de"),
    }
    rows = []
    for name, value in values.items():
        split = name if name in ("base", "new", "hm", "all") else "all"
        target = dataset if split == name else name
        rows.append(
            {
                "target": target,
                "split": split,
                "metric": "accuracy",
                "value": float(value),
            }
        )
    versions = {"promptkit": "0", "torch": "0", "open_clip": "0", "python": "3"}
    return {
        "config": config,
        "rows": rows,
        "versions": versions,
        "device": "cpu",
        "seconds": 1.0,
        "created": created,
    }


def base_new(base, new, **more):
    return record(base=base, new=new, hm=harmonic_mean(base, new), **more)


def table(*records):
    return newest([run_rows({"hash": config_hash(r["config"])} | r) for r in records])


# --- files ----------------------------------------------------------------------------


def test_a_run_is_one_file_named_after_it(tmp_path):
    path = save_run(base_new(80, 60, method="dept(coop)"), tmp_path)
    assert path == run_path(base_new(80, 60, method="dept(coop)")["config"], tmp_path)
    assert path.parent.name == "base-to-new" and path.name.startswith(
        "dept_coop_-pets-16shot-seed1-"
    )
    assert [p.name for p in path.parent.iterdir()] == [
        path.name
    ]  # no temporary file is left
    assert read_run(path)["rows"][0]["value"] == 80
    rows = load_results(tmp_path)
    assert (
        rows.split.tolist() == ["base", "hm", "new"]
        and list(rows.columns) == results.COLUMNS
    )


def test_results_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("PROMPTKIT_RESULTS", raising=False)
    assert str(results.results_dir()) == "results"
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path))
    assert (
        results.results_dir() == tmp_path
        and str(results.results_dir("there")) == "there"
    )
    assert load_results().empty and list(load_results().columns) == results.COLUMNS


def test_hash_ignores_the_order_of_keys_only():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 1.5}) != config_hash({"b": 1.5})


def test_options_have_one_name_in_whatever_order_they_are_given():
    given = {"texts": {"cat": ["a tail"], "ant": ["six legs"]}, "epochs": 3}
    stored = json.loads(json.dumps(given, sort_keys=True))
    assert list(given["texts"]) != list(stored["texts"])
    assert options_of(given) == options_of(stored)
    assert options_of({"epochs": 3, "lr": 0.1}) == "epochs=3, lr=0.1"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"seed": 1', '"seed": 2'),
        lambda text: text.replace("80.0", "NaN"),
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace('"split": "base"', '"split": "bass"'),
    ],
    ids=["cut", "empty", "other", "altered", "nan", "lacking", "split"],
)
def test_damaged_file(tmp_path, damage):
    written = base_new(80.0, 60)
    path = save_run(written, tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(
        InputError, match=f"damaged result file .*{path.name}.*delete it and run again"
    ):
        load_results(tmp_path)
    with pytest.warns(UserWarning, match="running it again"):
        assert results.find_run(written["config"], tmp_path) is None
    assert results.find_run(base_new(1, 1, seed=5)["config"], tmp_path) is None


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_run(base_new(80, 60), tmp_path)
    before = path.read_text()
    monkeypatch.setattr(
        os,
        "replace",
        lambda *a: (_ for _ in ()).throw(OSError("no space left on device")),
    )
    with pytest.raises(OSError, match="no space"):
        save_run(base_new(10, 10), tmp_path)
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 1


def test_newest_of_the_same_measurement_counts(tmp_path):
    save_run(base_new(80, 60, created="2026-01-02", code="new"), tmp_path)
    save_run(base_new(70, 50, created="2026-01-01", code="old"), tmp_path)
    save_run(
        base_new(90, 90, overrides={"n_ctx": 4}), tmp_path
    )  # another variant, not another version
    rows = load_results(tmp_path, split="base")
    assert rows[rows.options == ""].value.tolist() == [80] and rows[
        rows.options == "n_ctx=4"
    ].value.tolist() == [90]


def test_runs_on_other_sentences_are_other_measurements(tmp_path):
    said = {1: "birds.json#1f3c5a", 2: "birds.json#aa00aa"}
    for code, name in said.items():
        run = base_new(80 + code, 60, code=code, overrides={"n_ctx": 4})
        save_run(run | {"given": f"descriptions={name}"}, tmp_path)
    save_run(base_new(80, 60, seed=2, code=3), tmp_path)
    found = load_results(tmp_path, split="base").set_index("options")["value"]
    assert found.to_dict() == {
        "": 80,
        "n_ctx=4, descriptions=birds.json#1f3c5a": 81,
        "n_ctx=4, descriptions=birds.json#aa00aa": 82,
    }


def test_names_of_any_length_are_names_of_files(tmp_path):
    for dataset in ("n" * 250, "鳥" * 80):
        path = save_run(base_new(80, 60, dataset=dataset), tmp_path)
        assert read_run(path)["config"]["dataset"] == dataset
    assert len(load_results(tmp_path)["dataset"].unique()) == 2
    longest = tmp_path / ("s" * 243 + ".safetensors")
    assert write_atomically(longest, lambda file: file.write(b"1")).exists()
    with pytest.raises(OSError, match="File name too long: '.*safetensorss'"):
        write_atomically(f"{longest}s", lambda file: file.write(b"1"))


def test_hidden_files_are_no_runs(tmp_path):
    path = save_run(base_new(80, 60), tmp_path)
    path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (save_claims("01_clip", [], tmp_path).parent / "._01_clip.json").write_text("\0")
    assert len(load_results(tmp_path)) == 3 and load_claims(tmp_path) == {"01_clip": []}


def test_filters(tmp_path):
    save_run(base_new(80, 60), tmp_path)
    save_run(base_new(70, 65, method="clip"), tmp_path)
    assert set(load_results(tmp_path, method="clip").method) == {"clip"}
    assert len(load_results(tmp_path, method=["clip", "coop"], split="new")) == 2
    with pytest.raises(InputError, match="no column 'methods'"):
        load_results(tmp_path, methods="clip")


def test_reading_results_needs_no_torch():
    code = (
        "import sys, promptkit.results, promptkit.plots, promptkit.cli;"
        " sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- means ----------------------------------------------------------------------------


def test_harmonic_mean_conventions():
    assert harmonic_mean(69.34, 74.22) == pytest.approx(
        71.70, abs=0.005
    )  # CLIP's average row
    assert harmonic_mean(0, 0) == 0
    assert harmonic_mean([50, 100], [50, 0]).tolist() == [50, 0]


@pytest.mark.parametrize(
    ("method", "hm", "of_tasks"),
    [
        ("clip", 71.70, 71.59),
        ("coop", 71.66, 70.83),
        ("cocoop", 75.83, 75.44),
        ("kgcoop", 77.00, 76.71),
    ],
)
def test_average_row_is_the_harmonic_mean_of_the_averages(method, hm, of_tasks):
    papers = paper_numbers(
        method=method, protocol="base-to-new", paper=["2203.05557", "2303.13283"]
    )
    cells = papers[papers.dataset != "average"]
    wide = cells.pivot(index="dataset", columns="metric", values="value")
    assert len(wide) == 11
    runs = table(
        *(
            base_new(row.base, row.new, method=method, dataset=name)
            for name, row in wide.iterrows()
        )
    )
    average = summarise(runs).query("dataset == 'average'").set_index("split")
    assert average["mean"]["hm"] == pytest.approx(hm, abs=0.011)
    assert average["mean"]["hm_of_tasks"] == pytest.approx(of_tasks, abs=0.011)
    assert (average.datasets == 11).all()


def test_means_over_seeds():
    runs = table(
        *(base_new(b, n, seed=s) for s, b, n in ((1, 80, 50), (2, 90, 70), (3, 85, 60)))
    )
    cells = summarise(runs, average=False).set_index("split")
    assert cells["mean"]["base"] == 85 and cells["mean"]["new"] == 60
    assert cells["mean"]["hm"] == pytest.approx(
        harmonic_mean(85, 60)
    )  # of the averaged accuracies
    assert (cells.low["base"], cells.high["base"]) == pytest.approx(
        interval([80, 90, 85])[1:]
    )
    assert (cells.seeds == 3).all()


def test_averages_take_the_newest_content_of_data_alone():
    runs = table(
        *(
            record(all=value, seed=seed, created=created, **{"protocol": "few-shot"})
            for value, seed, created in ((20, 1, "2026-01"), (80, 2, "2026-02"))
        )
    ).assign(data=["old", "new"])
    found = summarise(runs).set_index(["dataset", "target"])["mean"].to_dict()
    assert found.pop(("average", "average")) == 80
    assert found == {("pets#old", "pets"): 20, ("pets#new", "pets"): 80}
    assert summarise(runs[::-1])["mean"].max() == 80  # in whatever order
    old = runs.assign(method=["clip", "coop"])
    average = summarise(old).query("dataset == 'average'")
    assert average["method"].tolist() == ["coop"] and average["datasets"].tolist() == [
        1
    ]


def test_weights_that_were_replaced_are_another_model():
    """Seeds that were measured with the old file never stand in an average with those
    of the new one; shipped rows, which name no weights, stay as they are.
    """
    measured = [(50, 1, "aaa"), (60, 2, "aaa"), (80, 3, "bbb"), (70, 4, "")]
    runs = table(
        *(
            record(all=value, seed=seed, protocol="few-shot")
            for value, seed, _ in measured
        )
    ).assign(weights=[weights for *_, weights in measured])
    found = summarise(runs, average=False).set_index("model")["mean"].to_dict()
    assert found == {"mini#aaa": 55, "mini#bbb": 80, "mini": 70}
    one = summarise(runs[runs["weights"] != "aaa"], average=False)
    assert one["model"].tolist() == ["mini"] and one["mean"].item() == 75
    half = runs.assign(precision=["fp32", "fp32", "bf16", "fp32"])  # the same file
    assert set(summarise(half, average=False)["model"]) == {"mini"}
    # A comparison takes the newest weights, and never joins the two.
    other = runs.assign(method="kgcoop", value=10.0)
    found = differences(pd.concat([runs, other]), runs["method"][0], "kgcoop")
    assert sorted(found) == [60, 70]
    old = other.assign(weights="aaa").iloc[
        :2
    ]  # nor one method's old with another's new
    with pytest.raises(InputError, match="no runs of 'kgcoop'"):
        differences(pd.concat([old, runs.iloc[2:3]]), runs["method"][0], "kgcoop")


def test_average_interval_is_over_seeds_within_tasks():
    runs = table(
        *(
            base_new(b + s, 50, seed=s, dataset=d)
            for s in (1, 2)
            for d, b in (("pets", 60), ("cars", 80))
        )
    )
    base = summarise(runs).query("dataset == 'average' and split == 'base'").iloc[0]
    within = interval(np.array([[61.0, 62.0], [81.0, 82.0]]))
    assert (base["mean"], base.low, base.high) == pytest.approx(within)
    assert (base.seeds, base.datasets) == (2, 2)
    incomplete = pd.concat(
        [runs, table(base_new(99, 99, seed=3))]
    )  # of one dataset only
    base = (
        summarise(incomplete).query("dataset == 'average' and split == 'base'").iloc[0]
    )
    half = (within[2] - within[1]) / 2
    assert base.seeds == 2 and (base.high - base.low) / 2 == pytest.approx(half)
    assert (base.low + base.high) / 2 == base["mean"] != within[0]  # of every number


def test_averages_of_transfer_leave_the_source_out():
    runs = table(
        record(protocol="cross-dataset", dataset="mini", mini=90, pets=60, cars=40)
    )
    average = summarise(runs).query("target == 'average'").iloc[0]
    assert average["mean"] == 50 and average.dataset == "mini" and average.datasets == 2


def test_variants_and_shots_are_kept_apart():
    runs = table(
        record(protocol="few-shot", shots=1, all=10),
        record(protocol="few-shot", shots=4, all=20),
        record(protocol="few-shot", shots=4, all=30, overrides={"n_ctx": 4}),
    )  # fmt: skip
    cells = summarise(runs, average=False)
    assert sorted(cells["mean"]) == [10, 20, 30] and set(results.label(cells)) == {
        "coop",
        "coop | n_ctx=4",
    }


# --- papers ---------------------------------------------------------------------------


METHODS = set(
    "aape apex argue atprompt awt caspl clip clip_adapter cocoop coop coprompt dept"
    " ivlp kapt kgcoop logoprompt maple mma pomp prograd promptkd promptsrc protext"
    " qnet tcp textrefiner tip_adapter tip_adapter_f tpt upl waffleclip"
    " weak_detectors".split()
)
BASELINES = set(  # what the papers compare with; none is a registered method
    "ape-t cupl dclip deep_language deep_vision dpt lasp linear-probe plot++ proda"
    " provp-ref visual_prompting vpt vpt+deep_language".split()
)
DATASETS = set(
    "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft"
    " sun397 dtd eurosat ucf101 imagenetv2 imagenet_sketch imagenet_a imagenet_r"
    " imagenet21k cub places365 average average_3 average_4 average_5 average_8"
    " average_10".split()
)
# (paper, method, dataset, shots, hm as printed) that are not the harmonic means of
# their base and new
OTHER_HM = {
    # printed so, of three numbers that do not belong together
    ("2309.07439", "maple", "fgvc_aircraft", 16, 38.31),
    ("2309.07439", "dept(promptsrc)", "ucf101", 16, 82.46),
    (
        "2311.15569",
        "apex",
        "average",
        16,
        77.87,
    ),  # on CoCa: above the harmonic mean, so no mean of harmonic means
    ("2311.16494", "lasp", "eurosat", 16, 88.86),
    ("2403.02781", "promptkd", "stanford_cars", 16, 83.13),
    ("2403.02781", "promptkd", "ucf101", 16, 86.10),
    ("2403.02781", "promptkd", "imagenet", 16, 71.57),  # at temperature 4
    ("2412.09442", "atprompt(promptkd)", "food101", 16, 93.22),
    (
        "cvpr2024:23826",
        "mma",
        "ucf101",
        16,
        82.20,
    ),  # 78.53 on new classes would fit it and the average
    ("2309.01155", "dpt", "average", 16, 44.54),
    # averages below the harmonic mean of their base and new, as the means of the
    # datasets' harmonic means are
    ("2307.06948", "proda", "average", 16, 76.65),
    ("2309.01155", "vpt", "average", 16, 74.68),
    ("2309.07439", "coop", "average", 4, 73.70),
    ("2309.07439", "coop", "average", 8, 73.93),
    ("2309.07439", "dept(coop)", "average", 4, 74.85),
    ("2309.07439", "dept(coop)", "average", 8, 75.19),
}
# (paper, method, protocol, metric, average as printed) that are not the means of the
# datasets' rows
OTHER_AVERAGES = {
    ("2309.07439", "cocoop", "base-to-new", "base", 81.18),  # 80.70
    ("2309.07439", "cocoop", "base-to-new", "new", 72.18),  # 72.05
    ("2309.07439", "coop", "base-to-new", "base", 81.50),  # 81.59
    ("2309.07439", "coop", "base-to-new", "new", 69.77),  # 69.99
    ("2311.16494", "lasp", "base-to-new", "base", 83.18),  # 83.10
    ("2412.09442", "atprompt(cocoop)", "cross-dataset", "accuracy", 66.59),  # 66.12
    ("2412.09442", "atprompt(maple)", "cross-dataset", "accuracy", 66.75),  # 66.39
    ("cvpr2024:23826", "mma", "base-to-new", "new", 76.80),  # 76.94, by a misprint
}
MEAN_OF_HMS = (  # this paper's averages are the means of the datasets' harmonic means
    "2311.15569"
)


def test_paper_numbers_are_consistent():
    papers = paper_numbers(variants=True)
    assert (
        list(papers.columns)
        == "paper table method protocol dataset metric shots backbone value"
        " variant".split()
    )
    assert (
        not papers.isna().any().any()
        and papers.value.between(0, 100).all()
        and (papers.shots >= 0).all()
    )
    assert not papers.duplicated(
        [column for column in papers if column != "value"]
    ).any()
    assert not papers[["paper", "table", "method", "backbone"]].eq("").any().any()
    names = {
        name for method in papers.method for name in method.replace(")", "").split("(")
    }
    assert {"clip", "coop", "cocoop", "kgcoop"} <= names <= METHODS | BASELINES
    assert set(papers.dataset) <= DATASETS
    split = papers.protocol == "base-to-new"
    assert set(papers.protocol) == {
        "few-shot",
        "base-to-new",
        "cross-dataset",
        "domain-generalization",
    }
    assert set(papers.metric[split]) == {"base", "new", "hm"} and set(
        papers.metric[~split]
    ) == {"accuracy"}


def test_harmonic_means_of_the_papers():
    papers = paper_numbers(variants=True, protocol="base-to-new")
    keys = ["paper", "table", "method", "dataset", "shots", "backbone", "variant"]
    wide = (
        papers.pivot(index=keys, columns="metric", values="value")
        .dropna()
        .reset_index()
    )
    off = wide[(harmonic_mean(wide.base, wide.new) - wide.hm).abs() > 0.02]
    means = (
        (off.paper == MEAN_OF_HMS)
        & (off.dataset == "average")
        & (off.hm < harmonic_mean(off.base, off.new))
    )
    printed = off[~means][["paper", "method", "dataset", "shots", "hm"]]
    assert set(printed.itertuples(index=False, name=None)) == OTHER_HM


def test_averages_of_the_papers():
    papers = paper_numbers(variants=True, metric=["base", "new", "accuracy"])
    keys = "paper method protocol metric shots backbone variant".split()
    eleven = papers.dataset.isin(data.DATASETS)
    source = (papers.protocol == "cross-dataset") & (papers.dataset == "imagenet")
    cells = papers[eleven & ~source].groupby(keys).value
    tenths = cells.agg(lambda found: (found * 10).round(6).mod(1).eq(0).all())
    rows = pd.DataFrame({"mean": cells.mean(), "n": cells.count(), "tenths": tenths})
    rows = papers[papers.dataset == "average"].merge(rows.reset_index(), on=keys)
    wanted = {"base-to-new": 11, "few-shot": 11, "cross-dataset": 10}
    rows = rows[rows.n == rows.protocol.map(wanted)]
    assert len(rows) > 100
    limit = rows.tenths.map({True: 0.1, False: 0.02})  # of one decimal, and of two
    off = rows[(rows.value - rows["mean"]).abs() > limit]
    off = off[["paper", "method", "protocol", "metric", "value"]]
    assert set(off.itertuples(index=False, name=None)) == OTHER_AVERAGES


def test_paper_numbers_without_variants():
    papers = paper_numbers()
    assert (papers.variant == "").all()
    split = papers[papers.protocol == "base-to-new"]
    assert set(split.backbone) == {"ViT-B/16"}
    averages = split[split.dataset == "average"]
    assert not averages.duplicated(
        ["paper", "method", "metric", "shots"]
    ).any()  # pivots by them average nothing
    assert not split[split.method == "clip"].duplicated(["dataset", "metric"]).any()
    assert paper_numbers(
        method="clip", metric="hm", dataset="average"
    ).value.tolist() == [71.70]
    coop = paper_numbers(
        method="coop", protocol="base-to-new", dataset="average", metric="new"
    )
    assert dict(zip(coop.paper, coop.value, strict=True)) == {"2203.05557": 63.22}


def test_paper_numbers_with_variants():
    rows = paper_numbers(
        method="tpt", variant="without selection", dataset="imagenet_a"
    )
    assert rows.value.tolist() == [23.65] and rows.backbone.tolist() == ["RN50"]
    both = paper_numbers(
        variants=True,
        method="tpt",
        dataset="imagenet_a",
        backbone="RN50",
        protocol="few-shot",
    )
    assert dict(zip(both.variant, both.value, strict=True)) == {
        "": 26.67,
        "without selection": 23.65,
    }
    assert paper_numbers(variant="").equals(paper_numbers())


def test_compare_with_papers():
    runs = table(
        *(
            base_new(75, 70, dataset=d, seed=s)
            for d in ("eurosat", "dtd")
            for s in (1, 2)
        )
    )
    joined = compare(runs, how="inner")
    eurosat = joined.query("dataset == 'eurosat' and split == 'base'").iloc[0]
    assert eurosat.reported == 92.19 and eurosat.difference == pytest.approx(75 - 92.19)
    assert (eurosat.paper, eurosat.table, eurosat.backbone) == (
        "2203.05557",
        "Table 1",
        "ViT-B/16",
    )
    averages = joined.query("dataset == 'average' and split == 'new'")
    assert set(averages.reported) == {63.22}  # CoCoOp's paper, and no rerun
    assert (
        compare(table(base_new(75, 70)))
        .query("dataset == 'pets'")
        .reported.isna()
        .all()
    )  # no paper has it


def test_compare_leaves_variants_out_unless_they_are_given():
    runs = table(base_new(75, 70, dataset="eurosat"))
    plain, asked = (
        compare(runs),
        compare(runs, paper_numbers(variants=True, method="coop")),
    )
    assert (plain.variant.dropna() == "").all()
    base = asked.query("dataset == 'eurosat' and split == 'base'")
    assert dict(zip(base.paper, base.reported, strict=True)) == {
        "2203.05557": 92.19, "2303.13283": 91.54, "2309.07439": 89.35,
    }  # fmt: skip
    assert set(base.variant) == {"", "rerun"}


# --- claims ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "verdict"),
    [
        ([9, 9.5, 10], {"at_least": 8}, "holds"),
        ([1, 1.5, 2], {"at_least": 8}, "does not hold"),
        ([7, 9, 11], {"at_least": 8}, "undecided"),
        ([1, 1.2, 1.1], {}, "holds"),
        ([-1, -1.2, -1.1], {}, "does not hold"),
        ([-1, 1, 0.2], {}, "undecided"),
        ([9.0], {"at_least": 8}, "undecided"),
        ([0, 0, 0], {}, "undecided"),
        ([0.1, 0.2, 0.15], {"within": 1}, "holds"),
        ([5, 5.1, 5.2], {"within": 1}, "does not hold"),
        ([-5, -5.1, -5.2], {"within": 1}, "does not hold"),
        ([0, 2, 1], {"within": 1}, "undecided"),
    ],
)
def test_verdicts(values, options, verdict):
    claim = check_claim("CoOp gains on base classes", values, **options)
    assert claim.verdict == verdict and claim.n == len(values)
    assert claim.estimate == pytest.approx(np.mean(values))
    assert (
        str(claim).startswith(verdict.upper())
        and f"<strong>{verdict}</strong>" in claim._repr_html_()
    )


def test_a_wider_level_decides_less():
    values = [8.5, 9.5, 10.5]
    assert check_claim("x", values, at_least=8, level=0.8).verdict == "holds"
    assert check_claim("x", values, at_least=8, level=0.99).verdict == "undecided"


@pytest.mark.parametrize("values", [[], [1, float("nan")], [float("inf")]])
def test_claims_need_numbers(values):
    with pytest.raises(InputError, match="needs finite differences"):
        check_claim("A beats B", values)


def test_correlation():
    x = np.arange(11.0)
    y = x + np.tile([0.0, 6.0], 6)[:11]
    known = stats.pearsonr(x, y)
    claim = check_correlation("They go together.", x, y)
    assert claim.estimate == pytest.approx(known.statistic)
    assert (claim.low, claim.high) == pytest.approx(tuple(known.confidence_interval()))
    assert (claim.verdict, claim.n) == ("holds", 11)
    assert check_correlation("x", x, -y).verdict == "does not hold"
    assert check_correlation("x", x, x).low == check_correlation("x", x, x).high == 1
    for few in ([1, 2, 3], [1, 1, 1, 1]):
        claim = check_correlation("x", few, range(len(few)))
        assert claim.verdict == "undecided" and math.isnan(claim.estimate)
    weak = check_correlation("x", [1, 2, 3, 4, 5, 6], [1, 3, 2, 3, 1, 4], of="tasks")
    assert weak.verdict == "undecided" and weak.measured().startswith("+0.44 [")
    low = [
        math.atanh(weak.estimate) - 1.96 / math.sqrt(n - 3)
        for n in (weak.needed - 1, weak.needed)
    ]
    assert low[0] < 0 < low[1] and f"{weak.needed} tasks" in weak.would_decide()
    with pytest.raises(InputError, match="pairs of finite numbers"):
        check_correlation("x", [1, 2, 3, 4], [1, 2, 3])
    with pytest.raises(InputError, match="pairs of finite numbers"):
        check_correlation("x", [1, 2, 3, math.nan], [1, 2, 3, 4])


def test_claims_table_and_text():
    claims = [check_claim("A < B & <b>", [1, 1.2, 1.1]), check_claim("C", [1.0])]
    shown = claims_table(claims)
    assert (
        shown.verdict.tolist() == ["holds", "undecided"]
        and shown.measured[1] == "+1.0 points, no interval, 1 value"
    )
    assert (
        shown.measured[0] == "+1.1 points [+0.9, +1.3], 95 % interval, 3 values"
        and shown.asked[0] == "more than 0"
    )
    assert "A &lt; B &amp; &lt;b&gt;" in claims[0]._repr_html_()
    assert claims_table([]).empty


def test_claims_are_kept(tmp_path):
    claims = [check_claim("one", [1, 1.2, 1.1]), check_claim("two", [1.0], within=3)]
    save_claims("03_coop", claims, tmp_path)
    ((chapter, loaded),) = load_claims(tmp_path).items()
    assert chapter == "03_coop" and [str(c) for c in loaded] == [str(c) for c in claims]
    assert (
        isinstance(loaded[0], Claim) and load_results(tmp_path).empty
    )  # claims are no runs
    (tmp_path / "claims" / "03_coop.json").write_text("[{")
    with pytest.raises(InputError, match="03_coop.json"):
        load_claims(tmp_path)


def two_methods():
    runs = [
        base_new(80 + s + 2 * i, 60, dataset=d, seed=s)
        for i, d in enumerate(("pets", "cars"))
        for s in (1, 2, 3)
    ]
    return table(
        *runs,
        *(
            base_new(70, 65, method="clip", dataset=d, seed=0, shots=0)
            for d in ("pets", "cars")
        ),
    )


def test_paired_differences():
    base = differences(two_methods(), "coop", "clip", "base")
    assert len(base) == 6 and sorted(base) == [11, 12, 13, 13, 14, 15]
    assert base.index.names == [
        "protocol",
        "dataset",
        "target",
        "split",
        "shots",
        "seed",
    ]
    assert sorted(differences(two_methods(), "clip", "coop", "base")) == [
        -15,
        -14,
        -13,
        -13,
        -12,
        -11,
    ]
    average = differences(two_methods(), "coop", "clip", "base", average=True)
    assert average.groupby("seed").mean().tolist() == [12, 13, 14]
    assert average.groupby("dataset").mean().tolist() == [14, 12]
    hm = differences(two_methods(), "coop", "clip", "hm", average=True)
    assert len(hm) == 6
    assert hm.mean() == pytest.approx(harmonic_mean(83, 60) - harmonic_mean(70, 65))
    one = two_methods().query("seed < 2")  # no spread within a task
    (alone,) = differences(one, "coop", "clip", "base", average=True)
    assert alone == 12


def test_the_targets_of_a_transfer_as_tasks():
    runs = table(record(protocol="cross-dataset", dataset="mini", mini=90, pets=61))
    found = per_target(runs)
    assert found[["dataset", "target", "value"]].to_numpy().tolist() == [
        ["pets", "pets", 61]
    ]
    assert set(found["protocol"]) == {"few-shot"}
    assert (runs["dataset"] == "mini").all()


def test_a_seed_that_lacks_a_target_is_left_out():
    runs = table(
        *(
            record(
                method=method, protocol="cross-dataset", dataset="mini", seed=seed,
                mini=90, pets=base + seed, **({"cars": 40} if seed < 3 else {}),
            )
            for method, base in (("coop", 60), ("kgcoop", 62))
            for seed in (1, 2, 3)
        )
    )  # fmt: skip
    found = differences(runs, "kgcoop", "coop", "all", average=True)
    assert found.index.get_level_values("seed").tolist() == [1, 2]
    assert found.tolist() == [1, 1]  # of two targets, the source left out


def test_differences_over_numbers_of_shots():
    runs = table(
        *(
            record(all=50 + shots + seed, dataset=task, shots=shots, seed=seed)
            for task in "ab"
            for shots in (1, 4, 16)
            for seed in (1, 2)
        ),
        *(record(all=50, method="clip", dataset=d, seed=0, shots=0) for d in "ab"),
    )
    found = over_shots(runs, "coop", "clip", [1, 4])
    assert found.index.names == ["dataset", "seed"]
    assert found.tolist() == [3.5, 4.5] * 2
    rise = over_shots(runs, "coop", "clip", [16]) - found
    assert rise.tolist() == [13.5] * 4


def test_differences_of_variants_and_their_errors():
    runs = pd.concat([two_methods(), table(base_new(90, 60, overrides={"n_ctx": 4}))])
    with pytest.raises(InputError, match="'lasp'.*clip, coop"):
        differences(runs, "lasp", "clip")
    assert differences(runs, "coop | n_ctx=4", "coop", "base").tolist() == [9]
    with pytest.raises(InputError, match="nothing was measured for both"):
        differences(runs, "coop", "clip", "all")
    twice = pd.concat([two_methods(), table(base_new(90, 60)).assign(profile="full")])
    with pytest.raises(InputError, match="several runs of 'coop'"):
        differences(twice, "coop", "clip")


def test_record_is_plain_json(tmp_path):
    path = save_run(base_new(80, 60), tmp_path)
    stored = json.loads(path.read_text())
    assert stored["format"] == 1 and stored["hash"] == config_hash(stored["config"])
