"""The command line: what it prints, its exit codes, its errors; on a tiny CLIP and toy
images.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from rich.console import Console
from test_protocols import NAMES, tiny, toy
from test_reproduce import chapter
from typer.testing import CliRunner

from promptkit import clip as clip_module
from promptkit import data, grids, registry, runs
from promptkit.cli import app
from promptkit.data.images import read_image
from promptkit.recipe import PROTOCOLS
from promptkit.registry import load_method, methods
from promptkit.results import save_run

COMMANDS = [
    "list",
    "run",
    "evaluate",
    "predict",
    "export",
    "reproduce",
    "leaderboard",
    "pages",
    "evidence",
    "data",
    "pretrain",
]


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """The model "mini" is a tiny one, the datasets "pets" and "cars" are toys, "mini"
    has a shift.
    """
    toys = {name: toy(name) for name in (*data.MINI_TASKS, *data.SHIFTS)}
    load_clip = runs.load_clip
    toys["mini"] = replace(toys["mini"], shifts=tuple(data.SHIFTS))
    monkeypatch.setattr(data, "load_dataset", lambda name, root=None, **_: toys[name])

    def load(name, pretrained, device=None, precision="fp32"):
        return (
            tiny()
            if (name, precision) == ("mini", "fp32")
            else load_clip(name, pretrained, device, precision)
        )

    monkeypatch.setattr(runs, "load_clip", load)
    runs._clip.cache_clear()
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    # A console reads COLUMNS once, when it is made, and the workers of pytest set it:
    # give it its width here.
    monkeypatch.setattr("promptkit.cli.console.out", Console(width=200))
    monkeypatch.setattr("promptkit.cli.console.err", Console(width=200, stderr=True))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    runs._clip.cache_clear()


def promptkit(*words, code=0):
    """Run a command in this process; returns (stdout, stderr)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(app, list(map(str, words)), env={"TERM": "dumb"})
    assert done.exit_code == code, (done.exit_code, done.output, done.exception)
    assert "Traceback" not in done.output
    return done.stdout, done.stderr


def process(*words):
    """Run a command in a process of its own."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))
    }
    command = [sys.executable, "-m", "promptkit", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


QUICK = ["--shots", "2", "--epochs", "1", "--set", "n_ctx=2", "--set", "init=''"]


# --- help -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command):
    text, _ = promptkit(command, "--help")
    assert "Examples" in text and f"$ promptkit {command}" in text


def test_help_lists_the_commands():
    text, _ = promptkit("--help")
    assert all(command in text for command in COMMANDS)


def test_help_answers_at_once():
    began = os.times().children_user
    done = process("--help")
    assert done.returncode == 0 and "promptkit run coop" in done.stdout
    assert (
        os.times().children_user - began < 1.0
    )  # processor time, so that a busy machine does not matter


def test_list():
    text, _ = promptkit("list")
    assert "coop" in text and "2109.01134" in text
    rows = json.loads(promptkit("list", "--json")[0])
    assert {row["name"] for row in rows} == set(methods())
    assert all(
        {"name", "title", "year", "kind", "tower", "paper", "parameters"} <= set(row)
        for row in rows
    )
    towers = {row["name"]: row["tower"] for row in rows}
    assert (towers["coop"], towers["dept"], towers["maple"]) == ("any", "any", "ViT")
    assert (
        next(row for row in rows if row["name"] == "coop")["parameters"]["n_ctx"]
        is None
    )


# --- run ------------------------------------------------------------------------------


def test_run_says_what_it_does_and_where_it_stored_it(world):
    text, said = promptkit("run", "coop", "--data", "pets", *QUICK)
    for fact in (
        "coop",
        "mini",
        "pets",
        "2 a class",
        "1 epochs",
        "learning rate",
        "parameters",
    ):
        assert fact in said
    assert "stored in" in said and str(world / "results") in said.replace("\n", "")
    assert "accuracy" in text and "pets" in text
    assert (
        len(list((world / "results" / "few-shot").glob("coop-pets-2shot-seed1-*.json")))
        == 1
    )


def test_run_a_grid_twice(world):
    words = (
        "run",
        "coop",
        "--data",
        "pets,cars",
        "--seeds",
        "1,2",
        "--protocol",
        "base-to-new",
        *QUICK,
    )
    first, said = promptkit(*words)
    assert "4, this is the first" in said.replace("  ", " ") and first.count("hm") == 4
    stamps = {p: p.stat().st_mtime_ns for p in world.glob("results/*/*.json")}
    assert len(stamps) == 4 and promptkit(*words)[0] == first
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    promptkit(*words, "--force")
    assert stamps != {p: p.stat().st_mtime_ns for p in stamps}


def test_run_saves_the_method(world):
    promptkit(
        "run",
        "coop",
        "--data",
        "pets",
        *QUICK,
        "--save",
        world / "coop.safetensors",
        "--results",
        world / "other",
    )
    assert load_method(world / "coop.safetensors", tiny()).classnames == [
        name.replace("_", " ") for name in NAMES
    ]
    assert list(world.glob("other/few-shot/*.json"))
    _, said = promptkit(
        "run", "coop", "--data", "pets,cars", *QUICK, "--save", "x.safetensors", code=2
    )
    assert "one dataset, one number of shots and one seed" in said


def test_transfer_protocols(world):
    text, _ = promptkit(
        "run",
        "clip",
        "--protocol",
        "cross-dataset",
        "--data",
        "mini",
        "--targets",
        "pets,cars",
    )
    assert "pets" in text and "cars" in text
    text, _ = promptkit(
        "run", "clip", "--protocol", "domain-generalization", "--data", "mini"
    )
    assert all(name in text for name in data.SHIFTS)


def test_settings_keep_their_types(world):
    promptkit(
        "run",
        "coop",
        "--data",
        "pets",
        *QUICK,
        "--set",
        "class_specific=true",
        "--set",
        "position=front",
        "--lr",
        "0.1",
    )
    (path,) = world.glob("results/few-shot/*.json")
    assert json.loads(path.read_text())["config"]["overrides"] == {
        "n_ctx": 2, "init": "", "class_specific": True, "position": "front",
        "lr": 0.1, "epochs": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "cop"], "unknown method 'cop'; did you mean 'coop'"),
        (
            ["run", "clip", "--data", "pest"],
            "unknown dataset 'pest'; did you mean 'pets'",
        ),
        (
            ["run", "clip", "--model", "minni"],
            "unknown model 'minni'; did you mean 'mini'",
        ),
        (
            ["run", "clip", "--model", "ViT-B-61", "--pretrained", "openai"],
            "unknown model 'ViT-B-61'; did you mean 'ViT-B-16'",
        ),
        (
            ["run", "clip", "--profile", "mimi"],
            "unknown profile 'mimi'; did you mean 'mini'",
        ),
        (
            ["run", "clip", "--protocol", "few"],
            "unknown protocol 'few'; did you mean 'few-shot'",
        ),
        (["run", "clip", "--precision", "fp8"], "unknown precision 'fp8'"),
        (
            ["run", "coop", "--set", "n_ctxt=4"],
            "unknown hyperparameter of coop 'n_ctxt'; did you mean 'n_ctx'",
        ),
        (["run", "coop", "--set", "n_ctx"], "--set takes KEY=VALUE"),
        (
            ["run", "coop", "--shots", "2", "--set", "n_ctx=0"],
            "n_ctx must be at least 1, got 0",
        ),
        (
            ["run", "coop", "--shots", "many"],
            "--shots takes whole numbers such as 1, 1,4 or 1-3, not 'many'",
        ),
        (["run", "clip", "--data", ","], "--data names nothing: ','"),
        (
            ["run", "clip", "--protocol", "domain-generalization", "--data", "pets"],
            "pets has no shifted versions",
        ),
        (["leaderboard"], "no runs are stored in"),
        (
            ["pretrain", "--model", "minni"],
            "unknown mini CLIP 'minni'; did you mean 'mini'",
        ),
        (["reproduce", "--notebooks", "nowhere"], "no chapters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_sentence(world, words, message):
    _, said = promptkit(*words, code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert not list(world.glob("results/*/*.json"))


def test_usage_errors_exit_with_2():
    promptkit("run", code=2)
    promptkit("run", "clip", "--nonsense", code=2)
    promptkit("walk", code=2)


def test_failing_run_exits_with_1(monkeypatch, world):
    def fail(*arguments, **options):
        raise MemoryError("not enough")

    monkeypatch.setattr(runs, "fit", fail)
    _, said = promptkit("run", "coop", "--data", "pets", *QUICK, code=1)
    assert "1 of 1 runs failed" in said and "MemoryError: not enough" in said


def test_interrupt_exits_with_130(monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "fit", interrupt)
    _, said = promptkit("run", "coop", "--data", "pets", *QUICK, code=130)
    assert "Interrupted" in said


def test_full_disk_exits_with_1(monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device", "results/x.json")

    monkeypatch.setattr(grids, "find_run", full)
    _, said = promptkit("run", "clip", "--data", "pets", code=1)
    assert "No space left on device" in said and "results/x.json" in said


def test_missing_package_exits_with_1(monkeypatch, world):
    monkeypatch.setitem(sys.modules, "nbformat", None)
    monkeypatch.delitem(sys.modules, "promptkit.reproduce", raising=False)
    monkeypatch.delattr("promptkit.reproduce", raising=False)
    _, said = promptkit("reproduce", code=1)
    assert "nbformat" in said and "pip install" in said


def test_real_process_errors_without_traceback():
    done = process("run", "cop", "--data", "pets")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().startswith(
        "Error: unknown method 'cop'; did you mean 'coop'"
    )
    assert len(done.stderr.strip().splitlines()) == 1


# --- leaderboard ----------------------------------------------------------------------


def stored_runs():
    from test_results import base_new, record

    for s in (1, 2, 3):
        for d, base in (("pets", 80), ("cars", 60)):
            save_run(base_new(base + s, 50, dataset=d, seed=s))
            save_run(
                record(protocol="few-shot", dataset=d, seed=s, shots=4, all=base + s)
            )
    save_run(base_new(70, 65, method="clip", dataset="pets", seed=0, shots=0))
    save_run(
        record(protocol="cross-dataset", dataset="mini", mini=90, pets=61, cars=41)
    )


def test_leaderboard(world):
    stored_runs()
    text, _ = promptkit("leaderboard")
    assert all(
        word in text
        for word in (
            "base-to-new",
            "few-shot",
            "cross-dataset",
            "HM",
            "4 shots",
            "average",
        )
    )
    assert "72.00 ± 1.13" in text  # of two tasks, each with a deviation of 1
    assert "51.00" in text  # the mean of the two targets, source left out
    text, _ = promptkit("leaderboard", "--protocol", "base-to-new", "--data", "pets")
    assert "82.00 ± 2.48" in text and "few-shot" not in text and "cars" not in text
    rows = json.loads(promptkit("leaderboard", "--json")[0])
    assert {row["dataset"] for row in rows} >= {"pets", "cars", "average"} and rows[0][
        "method"
    ]
    lines = promptkit("leaderboard", "--csv")[0].strip().splitlines()
    assert (
        lines[0].startswith("method,options,protocol") and len(lines) == len(rows) + 1
    )


def test_leaderboard_errors(world):
    stored_runs()
    assert (
        "did you mean 'pets'" in promptkit("leaderboard", "--data", "pest", code=2)[1]
    )
    assert (
        "among the stored runs"
        in promptkit("leaderboard", "--protocol", "fewshot", code=2)[1]
    )
    path = next(world.glob("results/few-shot/*.json"))
    path.write_text("{")
    assert f"damaged result file {path}" in promptkit("leaderboard", code=2)[1]


# --- predict --------------------------------------------------------------------------


def test_predict(world, monkeypatch):
    """With a checkpoint or zero-shot, by trained names or others, of files and
    folders.
    """
    from PIL import Image

    (world / "photos").mkdir()
    for n, colour in enumerate(("red", "green")):
        Image.new("RGB", (40 + n, 30), colour).save(world / "photos" / f"{colour}.png")
    promptkit(
        "run",
        "coop",
        "--data",
        "pets",
        "--shots",
        2,
        "--max-steps",
        1,
        "--save",
        "pets.safetensors",
    )
    words = ["predict", "photos", "--checkpoint", "pets.safetensors", "--json"]
    tiny_one = tiny()
    for module in (clip_module, registry):
        monkeypatch.setattr(module, "load_clip", lambda *args, **kwargs: tiny_one)
    rows = json.loads(promptkit(*words)[0])
    assert [row["image"] for row in rows] == ["photos/green.png", "photos/red.png"]
    method = load_method("pets.safetensors", tiny_one)
    image = data.transform(tiny_one, [read_image("photos/red.png")])
    best = method.classnames[method.predict(image)]
    assert next(iter(rows[1]["classes"])) == best and len(rows[1]["classes"]) == 3
    rows = json.loads(promptkit(*words, "--classes", "otter, red fox", "--top", 1)[0])
    assert all(
        set(row["classes"]) < {"otter", "red fox"} and len(row["classes"]) == 1
        for row in rows
    )
    (world / "names.txt").write_text("otter\nred fox\n")
    text, _ = promptkit("predict", "photos/red.png", "--classes-file", "names.txt")
    assert "otter" in text and "%" in text
    for bad, message in {
        ("photos/red.png",): "name the classes",
        ("nothing.png", "--classes", "a,b"): "there is no image nothing.png",
        (
            "photos/red.png",
            "--checkpoint",
            "photos/red.png",
        ): "no file of a saved method",
        (
            "photos/red.png",
            "--checkpoint",
            "pets.safetensors",
            "--model",
            "mini",
        ): "leave out --model",
    }.items():
        assert message in promptkit("predict", *bad, code=2)[1]


# --- reproduce ------------------------------------------------------------------------


def test_benchmark(world):
    """Every method, dataset and protocol: every cell of the table is there, and a
    second call finds all runs stored.
    """
    words = [
        "reproduce",
        "--benchmark",
        "--profile",
        "smoke",
        "--methods",
        "clip,coop,dept(coop)",
        "--data",
        "mini,pets",
    ]
    text, _ = promptkit(*words, "--max-steps", 1, "--seeds", "1,2")
    rows = grids.execute_all(
        grids.benchmark(
            ["clip", "coop", "dept(coop)"],
            ["mini", "pets"],
            seeds=(1, 2),
            profile="smoke",
            max_steps=1,
        ),
        progress=False,
    )
    assert set(rows["protocol"]) == set(PROTOCOLS) and rows["value"].notna().all()
    for protocol in PROTOCOLS:
        part = rows[rows["protocol"] == protocol]
        assert protocol in text and set(part["method"]) == {
            "clip",
            "coop",
            "dept(coop)",
        }
        cells = part.groupby(["dataset", "target", "split"])["method"].nunique()
        assert (cells == 3).all()
    assert rows.query("protocol == 'domain-generalization'")[
        "target"
    ].nunique() == 1 + len(data.SHIFTS)
    assert "done" not in promptkit(*words, "--max-steps", 1, "--seeds", "1,2")[1]
    assert (
        "unknown protocol 'few'"
        in promptkit("reproduce", "--benchmark", "--protocols", "few", code=2)[1]
    )


def test_reproduce(world):
    chapter(world / "notebooks", "01_good.ipynb", "print(profile)")
    chapter(world / "notebooks", "02_bad.ipynb", "raise ValueError('wrong [sum]')")
    text, said = promptkit("reproduce", "--profile", "smoke", "--output", "out", code=1)
    assert (
        "ValueError: wrong [sum]" in text and (world / "out" / "01_good.ipynb").exists()
    )
    assert not (world / "out" / "02_bad.ipynb").exists()
    promptkit(
        "reproduce", "--profile", "smoke", "--chapters", "good", "--output", "out"
    )
    assert (
        "did you mean 'good'" in promptkit("reproduce", "--chapters", "god", code=2)[1]
    )
    assert (
        "unknown profile 'big'" in promptkit("reproduce", "--profile", "big", code=2)[1]
    )
