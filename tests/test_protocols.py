"""The four protocols, grids of runs, stored results and tuning, on a tiny random CLIP
and toy images.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

from promptkit import grids, identity, protocols, runs, tuning, workers
from promptkit.clip import FrozenCLIP
from promptkit.data import Dataset, Split
from promptkit.errors import InputError
from promptkit.grids import SweepError, sweep
from promptkit.protocols import base_to_new, cross_dataset, few_shot
from promptkit.registry import build, load_method
from promptkit.results import COLUMNS, harmonic_mean, load_results, read_run
from promptkit.runs import Run, estimate, execute, plan
from promptkit.tuning import tune

NAMES = ["red square", "green_circle", "blue star", "teapot", "pug", "van"]
QUICK = {"epochs": 2, "batch_size": 8, "n_ctx": 2, "init": "", "progress": False}


@cache
def tiny(layers=2):
    """A CLIP of two blocks a tower, or more, with random weights."""
    torch.manual_seed(0)
    vision = {
        "image_size": 16,
        "patch_size": 8,
        "width": 32,
        "layers": layers,
        "head_width": 16,
    }
    text = {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": layers,
    }
    return FrozenCLIP(
        open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text), name="tiny"
    )


@cache
def toy(name="toy", each=6):
    """Noise around one colour a class; its three splits hold different images."""
    generator = torch.Generator().manual_seed(len(name))
    colours = torch.randint(0, 256, (len(NAMES), 3, 2, 2), generator=generator).float()

    def split(part):
        labels = torch.arange(len(NAMES)).repeat_interleave(each)
        noise = 30 * torch.randn(len(labels), 3, 16, 16, generator=generator)
        pixels = (
            (F.interpolate(colours, (16, 16))[labels] + noise)
            .clamp(0, 255)
            .to(torch.uint8)
        )
        return Split(
            labels, lambda: pixels, torch.arange(len(labels)), f"{name}-{part}-{each}"
        )

    return Dataset(
        name,
        name,
        NAMES,
        "a photo of a {}.",
        split("train"),
        split("val"),
        split("test"),
    )


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_few_shot_rows_hold_everything(folder):
    rows = few_shot("coop", toy(), 4, seed=3, clip=tiny(), **QUICK)
    assert list(rows.columns) == COLUMNS and len(rows) == 1
    row = rows.iloc[0]
    assert (row.method, row.protocol, row.dataset, row.target, row.split) == (
        "coop",
        "few-shot",
        "toy",
        "toy",
        "all",
    )
    assert (row.shots, row.seed, row.metric, row.profile, row.model) == (
        4,
        3,
        "accuracy",
        "mini",
        "tiny",
    )
    assert 0 <= row.value <= 100 and row.seconds > 0 and row.device == "cpu"
    assert (
        row.torch.startswith(torch.__version__.split("+")[0])
        and row.open_clip
        and row.python
        and row.promptkit
    )
    assert row.options == "batch_size=8, epochs=2, init=, n_ctx=2"
    (path,) = files(folder)
    assert row.hash in path.name and len(read_run(path)["training"]["losses"]) == 2 * (
        24 // 8
    )
    assert load_results().equals(rows)


def test_same_seed_same_bits_and_another_draw_by_another():
    runs = [
        few_shot("coop", toy(), 2, s, clip=tiny(), results=False, **QUICK).value[0]
        for s in (1, 1)
    ]
    assert runs[0] == runs[1]
    drawn = [
        plan(
            Run("few-shot", "coop", toy(), seed=s, shots=2, clip=tiny())
        ).training_set()
        for s in (1, 2)
    ]
    assert drawn[0].train.rows.tolist() != drawn[1].train.rows.tolist()


def test_base_to_new_splits_and_harmonic_mean(folder):
    rows = base_to_new("coop", toy(), 4, clip=tiny(), **QUICK).set_index("split").value
    assert rows["hm"] == pytest.approx(harmonic_mean(rows["base"], rows["new"]))
    planned = plan(Run("base-to-new", "coop", toy(), shots=4, clip=tiny()))
    base, everything = (
        planned.training_set(),
        plan(Run("few-shot", "coop", toy(), shots=4, clip=tiny())).training_set(),
    )
    assert base.classnames == NAMES[:3] and len(base.train) == 12
    drawn_for_base = everything.train.rows[everything.train.labels < 3]
    assert (
        base.train.rows.tolist() == drawn_for_base.tolist()
    )  # drawn before the classes are selected


def test_zero_shot_has_neither_shots_nor_seed(folder):
    rows = sweep(
        "base-to-new",
        ["clip"],
        [toy()],
        seeds=[1, 2, 3],
        shots=[1, 4],
        clip=tiny(),
        progress=False,
    )
    assert len(files(folder)) == 1 and set(rows.shots) == {0} and set(rows.seed) == {0}
    again = base_to_new(
        "clip", toy(), 16, 9, clip=tiny(), epochs=7, max_steps=3
    )  # nothing of which concerns it
    assert again.hash[0] == rows.hash[0] and len(files(folder)) == 1


@pytest.mark.parametrize("method", ["waffleclip", "tpt"])
def test_what_trains_nothing_has_no_shots(folder, method):
    options = {"views": 2} if method == "tpt" else {}
    rows = sweep(
        "few-shot",
        [(method, options)],
        [toy()],
        seeds=[1],
        shots=[1, 4],
        clip=tiny(),
        progress=False,
    )
    assert len(files(folder)) == 1 and set(rows.shots) == {0} and set(rows.seed) == {1}


def test_a_template_that_is_asked_for_is_kept():
    values = [
        few_shot("clip", toy(), clip=tiny(), **more)
        for more in ({}, {"template": "{}"}, {"template": "blue {}"})
    ]
    assert len({rows.hash[0] for rows in values}) == 3
    planned = plan(
        Run("few-shot", "clip", toy(), clip=tiny(), overrides={"template": "blue {}"})
    )
    assert planned.build(toy()).templates == ["blue {}"]
    assert plan(Run("few-shot", "clip", toy(), clip=tiny())).build(toy()).templates == [
        toy().template
    ]


def test_linear_probe_is_measured_and_stored_like_a_method(folder):
    rows = sweep(
        "few-shot",
        ["linear-probe", "clip"],
        toy(),
        [1, 2],
        [2, 4],
        clip=tiny(),
        progress=False,
    )
    assert (
        rows.method.tolist() == ["clip"] + 4 * ["linear-probe"]
        and len(files(folder)) == 5
    )
    assert (
        rows[rows.method == "linear-probe"].value.min() > rows.value[0]
    )  # colours are easy to tell apart
    with pytest.raises(InputError, match="measure it by few-shot, not base-to-new"):
        base_to_new("linear-probe", toy(), 2, clip=tiny())
    with pytest.raises(InputError, match="nothing to set, so not n_ctx"):
        few_shot("linear-probe", toy(), 2, clip=tiny(), n_ctx=4)


@pytest.fixture
def trainings(monkeypatch):
    """One item for each training that was made."""
    made = []
    monkeypatch.setattr(
        runs, "fit", lambda *a, fit=runs.fit, **k: made.append(1) or fit(*a, **k)
    )
    return made


def test_transfer_protocols_share_their_training(folder, trainings, monkeypatch):
    shifts = [toy("toy-v2"), toy("toy-sketch")]
    monkeypatch.setattr(runs, "_shifts", lambda dataset, root: shifts)
    rows = cross_dataset(
        "coop", toy(), [toy("other"), toy("third")], 2, clip=tiny(), **QUICK
    )
    assert rows.target.tolist() == ["toy", "other", "third"] and set(rows.dataset) == {
        "toy"
    }
    moved = protocols.domain_generalization("coop", toy(), 2, clip=tiny(), **QUICK)
    assert moved.target.tolist() == ["toy", "toy-v2", "toy-sketch"]
    assert len(trainings) == 1 and moved.value[0] == rows.value[0]
    (shared,) = folder.glob("trained/*.safetensors")
    shared.write_bytes(shared.read_bytes()[:100])
    with pytest.warns(UserWarning, match="training again"):
        cross_dataset("coop", toy(), [toy("other")], 2, clip=tiny(), **QUICK)
    assert len(trainings) == 2


def test_what_is_set_at_test_time_alone_shares_the_training(folder, trainings):
    quick = {"clip": tiny(), "epochs": 1, "results": folder}
    every = [{}, {"alpha": 0.0}, {"beta": 9.0, "threshold": 0.0}, {"ensemble": "none"}]
    for protocol in (base_to_new, few_shot):
        shared = [protocol("apex", toy(), 2, **quick, **more) for more in every]
    assert len(trainings) == 2
    records = [read_run(path) for path in folder.glob("*/apex-*.json")]
    assert len(records) == 8  # each has what the training took, wherever it was made
    assert all(r["seconds"] >= r["training"]["seconds"] > 0 for r in records)
    alone = few_shot("apex", toy(), 2, clip=tiny(), epochs=1, results=False, **every[2])
    assert len(trainings) == 3
    assert shared[2].value.tolist() == alone.value.tolist()
    few_shot("apex", toy(), 2, **quick, lr=0.3)  # which training depends on
    assert len(trainings) == 4
    few_shot("weak_detectors(coop)", toy(), 2, **quick, sharpness=1.0)
    few_shot("weak_detectors(coop)", toy(), 2, **quick, detector="constant")
    few_shot("weak_detectors(coop)", toy(), 2, **quick, template="a {}.")
    few_shot("weak_detectors(coop)", toy(), 2, **quick, host={"n_ctx": 3, "init": ""})
    assert len(trainings) == 6
    saved = [load_method(file, tiny()) for file in folder.glob("trained/*.safetensors")]
    assert {method.name for method in saved} == {"apex", "weak_detectors"}
    file = folder / "apex.safetensors"
    next(method for method in saved if method.name == "apex").save(file)
    assert load_method(file, tiny(), hparams={"beta": 7.0}).beta == 7
    with pytest.raises(InputError, match="n_ctx of apex cannot be changed .* beta"):
        load_method(file, tiny(), hparams={"n_ctx": 4})


def test_what_is_stored_is_not_run_again(folder, trainings):
    arguments = (
        "few-shot",
        ["clip", "coop", ("coop", {"n_ctx": 3})],
        [toy()],
        [1, 2],
        [2],
    )
    quick = {"clip": tiny(), "progress": False, "overrides": {}}
    methods = [("coop", {"n_ctx": n, "init": "", "epochs": 1}) for n in (2, 3)]
    first = sweep(*arguments[:1], ["clip", *methods], *arguments[2:], **quick)
    assert (
        len(trainings) == 5 and len(first) == 5
    )  # clip once, two variants of CoOp by two seeds
    stamps = {path: path.stat().st_mtime_ns for path in files(folder)}
    second = sweep(*arguments[:1], ["clip", *methods], *arguments[2:], **quick)
    assert second.equals(first) and len(trainings) == 5
    assert stamps == {path: path.stat().st_mtime_ns for path in files(folder)}
    sweep(*arguments[:1], [methods[0]], *arguments[2:], force=True, **quick)
    assert len(trainings) == 7 and len(files(folder)) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"shots": 3},
        {"lr": 0.1},
        {"n_ctx": 3},
        {"epochs": 1},
        {"profile": "smoke"},
        {"max_steps": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_configuration_is_another_run(change):
    def configuration(**more):
        options = {"shots": 2, "seed": 1, "clip": tiny()} | QUICK | more
        options.pop("progress")
        return runs.config_hash(
            grids.grid("few-shot", "coop", toy(), options.pop("seed"), **options)[
                0
            ].config
        )

    assert configuration() == configuration() != configuration(**change)


def test_code_and_weights_and_images_belong_to_the_configuration(monkeypatch):
    planned = plan(Run("few-shot", "coop", toy(), clip=tiny()))
    assert planned.config["clip"]["fingerprint"] == tiny().fingerprint
    assert (
        planned.config["data"]["toy"]
        != plan(Run("few-shot", "coop", toy(each=7), clip=tiny())).config["data"]["toy"]
    )
    source = identity.inspect.getsource
    identity._module.cache_clear()
    monkeypatch.setattr(
        identity.inspect,
        "getsource",
        lambda m: source(m).replace('"""CoOp:', '"""Other words:'),
    )
    assert (
        identity.of_code("coop") == planned.config["code"]
    )  # a docstring changes no number
    identity._module.cache_clear()
    monkeypatch.setattr(
        identity.inspect,
        "getsource",
        lambda m: source(m).replace(
            "n_ctx: int | None = None", "n_ctx: int | None = 8"
        ),
    )
    assert identity.of_code("coop") != planned.config["code"]
    identity._module.cache_clear()


def test_damaged_file_is_reported_and_run_again(folder):
    first = few_shot("coop", toy(), 2, clip=tiny(), **QUICK)
    (path,) = files(folder)
    path.write_text(path.read_text()[:200])
    with pytest.raises(InputError, match=path.name):
        load_results()
    with pytest.warns(UserWarning, match=f"damaged result file .*{path.name}.*again"):
        second = few_shot("coop", toy(), 2, clip=tiny(), **QUICK)
    assert (
        second.value[0] == first.value[0] and load_results().value[0] == first.value[0]
    )


def test_failed_run_does_not_stop_the_others(folder, monkeypatch):
    def fit(method, dataset, recipe, seed, fit=runs.fit, **options):
        if seed == 1:
            raise MemoryError("not enough")
        return fit(method, dataset, recipe, seed, **options)

    monkeypatch.setattr(runs, "fit", fit)
    with pytest.raises(
        SweepError,
        match=(
            "1 of 2 runs failed.*coop on toy, 2 shots, seed 1: MemoryError: not enough"
        ),
    ):
        sweep("few-shot", "coop", toy(), [1, 2], [2], clip=tiny(), **QUICK)
    assert load_results().seed.tolist() == [2]


def test_save_keeps_the_trained_method(tmp_path):
    rows = few_shot(
        "coop", toy(), 2, clip=tiny(), save=tmp_path / "coop.safetensors", **QUICK
    )
    method = load_method(tmp_path / "coop.safetensors", tiny())
    assert runs.accuracy(method, toy().test) == rows.value[0]


def test_checkpoint_of_a_full_run_is_removed_when_done(folder):
    few_shot("coop", toy(), 2, clip=tiny(), profile="full", max_steps=2, **QUICK)
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "cop"}, "unknown method 'cop'.*'coop'"),
        ({"dataset": "pest"}, "unknown dataset 'pest'.*'pets'"),
        ({"clip": "minni"}, "unknown model 'minni'.*'mini'"),
        ({"profile": "mimi"}, "unknown profile 'mimi'.*'mini'"),
        ({"shots": 0}, "shots must be a whole number from 1, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0, got -1"),
        ({"n_ctxx": 4}, "unknown hyperparameter of coop 'n_ctxx'.*'n_ctx'"),
        ({"n_ctx": "four"}, "n_ctx must be a whole number or None, got 'four'"),
        ({"lr": -1.0}, "lr must be a number that is not negative"),
        ({"targets": ("pets",)}, "no other run takes any"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input(arguments, message):
    options = {
        "method": "coop",
        "dataset": toy(),
        "shots": 2,
        "clip": tiny(),
        "progress": False,
    } | arguments
    with pytest.raises(InputError, match=message):
        few_shot(**options)


def test_numbers_of_numpy_are_numbers():
    """As np.linspace and np.arange give them."""
    own = {"n_ctx": 2, "lr": 0.25}
    theirs = {"n_ctx": np.int64(2), "lr": np.float32(0.25)}
    first, second = (
        plan(Run("few-shot", "coop", toy(), clip=tiny(), shots=2, overrides=overrides))
        for overrides in (own, theirs)
    )
    assert json.dumps(first.config) == json.dumps(second.config)
    method = build(
        "kgcoop", tiny(), ["cat", "dog"], lam=np.float64(2), n_ctx=np.int8(4)
    )
    assert json.dumps(method.hparams) == json.dumps(method.hparams | {"lam": 2.0})
    assert type(method.hparams["n_ctx"]) is int
    nan = np.float64("nan")
    with pytest.raises(InputError, match="lam must be a number, got nan"):
        build("kgcoop", tiny(), ["cat", "dog"], lam=nan)


def test_other_bad_requests(folder):
    with pytest.raises(InputError, match="unknown protocol 'fewshot'.*'few-shot'"):
        sweep("fewshot", "coop", toy(), clip=tiny())
    with pytest.raises(InputError, match="toy has no shifted versions"):
        protocols.domain_generalization("coop", toy(), clip=tiny())
    with pytest.raises(InputError, match="needs targets"):
        cross_dataset("coop", toy(), [], clip=tiny())
    with pytest.raises(InputError, match="toy is the source"):
        cross_dataset("coop", toy(), [toy()], clip=tiny())
    with pytest.raises(InputError, match="by their names"):
        sweep("few-shot", "coop", toy(), shots=[2], clip=tiny(), workers=2)
    with pytest.raises(InputError, match="no Dask scheduler"):
        list(workers.parallel(len, [[]], scheduler="nonsense://nowhere"))
    assert files(folder) == []


def test_class_specific_context_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(
        runs,
        "fit",
        lambda *a, **k: pytest.fail("trained although new classes are impossible"),
    )
    with pytest.raises(InputError, match="class"):
        base_to_new("coop", toy(), 2, clip=tiny(), class_specific=True, **QUICK)


def test_tuning_reads_validation_images_only(monkeypatch):
    read = []
    monkeypatch.setattr(
        tuning,
        "accuracy",
        lambda m, split, accuracy=runs.accuracy, **k: (
            read.append(split.key) or accuracy(m, split, **k)
        ),
    )
    table = tune(
        "coop",
        toy(),
        {"lr": [0.01, 0.1], "n_ctx": [1, 2]},
        2,
        clip=tiny(),
        progress=False,
        epochs=1,
    )
    assert (
        len(table) == 4
        and table.accuracy.is_monotonic_decreasing
        and set(read) == {toy().val.key}
    )
    base = tune(
        "coop",
        toy(),
        {"lr": [0.1]},
        2,
        clip=tiny(),
        protocol="base-to-new",
        progress=False,
        epochs=1,
    )
    assert len(base) == 1


def test_tuning_on_test_images_is_refused():
    with pytest.raises(InputError, match="validation images only, not on 'test'"):
        tune("coop", toy(), {"lr": [0.1]}, clip=tiny(), split="test")
    leaking = dataclasses.replace(toy(), val=toy().test)
    with pytest.raises(InputError, match="no validation images of its own"):
        tune("coop", leaking, {"lr": [0.1]}, clip=tiny(), progress=False)


def test_parallel_runs_in_processes():
    done = dict(
        (item, result)
        for item, result in workers.parallel(abs, [-1, -2, -3], workers=2)
    )
    assert done == {-1: 1, -2: 2, -3: 3}


def test_parallel_runs_on_a_dask_cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert dict(workers.parallel(abs, [-1, -2], scheduler=address)) == {
            -1: 1,
            -2: 2,
        }


SWEEP = """
import sys
from test_protocols import toy, tiny
from promptkit.grids import sweep
quick = {"n_ctx": 2, "epochs": 4, "batch_size": 8}
sweep("few-shot", [("coop", quick)], toy(), range(1, 101), [4],
      clip=tiny(), results=sys.argv[1], progress=False)
"""


def test_killed_sweep_leaves_whole_files_and_goes_on(tmp_path):
    folder = tmp_path / "killed"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, sys.path)]
        )
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(folder)], env=environment
    )
    try:
        limit = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < limit:
            if len(list(folder.glob("few-shot/*.json"))) >= 3:
                break
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    finished = {
        path: path.stat().st_mtime_ns for path in folder.glob("few-shot/*.json")
    }
    assert 3 <= len(finished) < 100
    assert all(json.loads(path.read_text())["rows"] for path in finished)
    methods = [("coop", {"n_ctx": 2, "epochs": 4, "batch_size": 8})]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no file is damaged
        rows = sweep(
            "few-shot",
            methods,
            toy(),
            range(1, 101),
            [4],
            clip=tiny(),
            results=folder,
            progress=False,
        )
    assert len(rows) == 100 and rows.seed.tolist() == list(range(1, 101))
    assert finished == {
        path: path.stat().st_mtime_ns for path in finished
    }  # the finished ones were not run again


def planned(method="coop", **options):
    return plan(Run("few-shot", method, toy(), clip=tiny(), **options))


def test_describe_says_what_is_about_to_happen():
    facts = planned(shots=4, overrides={"n_ctx": 2, "epochs": 3}).describe()
    assert facts["parameters"] == "64" and "24 images" in facts["shots"]
    assert facts["training"].startswith(
        "3 epochs, 3 steps of 24, sgd, learning rate 0.002"
    )
    assert "training" not in planned("clip").describe()


def test_estimate_measures_a_step_and_keeps_nothing():
    coop = planned(shots=4, profile="full", overrides={"n_ctx": 2})
    facts = estimate(coop)
    assert re.fullmatch(
        r"about \d+ (seconds|minutes) of training, \d+\.\d GiB", facts["estimate"]
    )
    before, after = (coop.build(coop.training_set()).context.vectors for _ in range(2))
    assert torch.equal(before, after)
    assert estimate(planned("clip")) == {}


def test_execute_takes_a_run():
    run = Run("few-shot", "clip", toy(), clip=tiny())
    assert execute(run).equals(execute(run))
