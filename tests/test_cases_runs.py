"""Whole runs of what was once measured, stored or loaded wrongly."""

import copy
import inspect
import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import test_cases_data as made
import torch
from test_cases_doors import LOAD_DATASET, RUN, ask, listing, refused, room  # noqa: F401
from test_cli import world  # noqa: F401
from test_protocols import NAMES, tiny, toy

from promptkit import clip as clip_module
from promptkit import data, identity, registry, runs
from promptkit.chapter import Chapter
from promptkit.clip import FrozenCLIP
from promptkit.method import Batch, Method
from promptkit.prompts import Prompt
from promptkit.registry import build, load_method
from promptkit.results import label as label_of
from promptkit.results import load_results
from promptkit.runs import Run, execute
from promptkit.weights import read_checkpoint

QUICK = ("--shots", "1", "--epochs", "1", "--set", "n_ctx=2", "--set", "init=")


def rows(*words, code=0):
    """The numbers of a command that measures, and what it said."""
    done = ask(*words)
    assert done.exit_code == code, done.output
    return done


def records(room):  # noqa: F811
    paths = sorted(room.rglob("*/few-shot/*.json"), key=lambda p: p.stat().st_mtime_ns)
    return [json.loads(path.read_text()) for path in paths]


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_case_01_equal_names_and_sizes_are_two_runs(room, force):  # noqa: F811
    """Of images that are the wrong way round, and of the right ones."""
    made.classes("first/scans", each=8)
    made.classes("fixed/scans", ("heron", "fox"), each=8)
    found = {}
    for place in ("first", "fixed", "first"):
        rows("run", "clip", "--data", f"{place}/scans", *force)
        record = records(room)[-1]
        dataset = data.load_dataset(f"{place}/scans")
        method = build("clip", tiny(), dataset.classnames)
        method.aim(dataset)
        batch = data.transform(tiny(), dataset.test.images())
        right = (method.logits(batch).argmax(-1) == dataset.test.labels).float()
        if place not in found:
            assert record["rows"][0]["value"] == pytest.approx(100 * right.mean())
        found.setdefault(place, record["hash"])
    assert found["first"] != found["fixed"] and len(records(room)) == 2


@pytest.mark.parametrize("method", ["clip", "coop"])
def test_case_02_corrected_labels_are_another_run(room, method):  # noqa: F811
    made.classes(".", each=6)
    lines = [f"{c}/{n}.bmp" for c in ("fox", "heron") for n in range(6)]
    other = {"fox": "heron", "heron": "fox"}
    right = [f"{line},{line.split('/')[0]}" for line in lines]
    wrong = [f"{line},{other[line.split('/')[0]]}" for line in lines]
    options = QUICK if method == "coop" else ()
    for text in (wrong, right):
        Path("labels.csv").write_text("\n".join(["path,label", *text]))
        rows("run", method, "--data", "labels.csv", *options)
    one, two = records(room)
    assert one["hash"] != two["hash"]
    if method == "clip":  # two classes the other way round, all images alike
        (a,), (b,) = one["rows"], two["rows"]
        assert a["value"] + b["value"] == pytest.approx(100)


def test_case_08_checkpoints_hold_data_alone(room):  # noqa: F811
    from test_cases_weights import dassl

    path = dassl(Path("."), {"ctx": torch.ones(4, 32)})
    assert read_checkpoint(path)["epoch"] == 50
    options = ("--method", "coop", "--set", "n_ctx=4", "--data", "pets", "--json")
    (row,) = json.loads(rows("evaluate", path, *options).stdout)
    method = build("coop", tiny(), NAMES, n_ctx=4)
    method.load_official({"ctx": torch.ones(4, 32)})
    (own,) = runs.measure(method, toy("pets"))
    assert row["value"] == pytest.approx(own["value"])


IDLE = [
    ((*RUN, "--set", "class_specific=true", "--protocol", "base-to-new"), "class"),
    ((*RUN, "--set", "n_ctx=16", "--set", "init=a photo of a"), "n_ctx"),
    (("run", "cocoop", "--data", "pets", "--set", "n_ctx=16"), "n_ctx"),
    (("run", "kgcoop", "--data", "pets", "--set", "n_ctx=16"), "n_ctx"),
]


@pytest.mark.parametrize(("words", "message"), IDLE, ids=["class", "coop", "co", "kg"])
def test_case_10_an_override_acts_or_is_refused(room, words, message):  # noqa: F811
    done = ask(*words, "--shots", "1", "--epochs", "1")
    if done.exit_code == 0:  # it acts: so many vectors are learned
        (record,) = records(room)
        assert record["parameters"] >= 16 * 32
        return
    refused(room, (*words, "--shots", "1", "--epochs", "1"), message)


def halved(name="mini", *args, precision="fp32", **kwargs):
    model = copy.deepcopy(tiny().model)
    how = {"name": "mini", "precision": precision}
    return FrozenCLIP(model, precision=precision, name="mini", source=how)


def test_case_11_precision_travels_with_the_method(room, monkeypatch):  # noqa: F811
    def load(name="mini", pretrained=None, device=None, precision="fp32", **how):
        return halved(precision=precision)

    for module in (runs, registry, clip_module):
        monkeypatch.setattr(module, "load_clip", load)
    runs._clip.cache_clear()
    made.image("photo.png", 120, (20, 30))
    rows(*RUN, *QUICK, "--precision", "bf16", "--save", "f.safetensors")
    words = ("predict", "photo.png", "--checkpoint", "f.safetensors", "--json")
    (found,) = json.loads(rows(*words, "--top", "6").stdout)
    method = load_method("f.safetensors", halved(precision="bf16"))
    assert method.clip.precision == "bf16"
    image = data.transform(method.clip, [data.images.read_image("photo.png")])
    expected = method.logits(image).softmax(-1)[0].tolist()
    for name, p in zip(method.classnames, expected, strict=True):
        assert found["classes"][name] == pytest.approx(p, abs=1e-4)


@pytest.mark.parametrize("mixes", [True, False])
def test_case_11_augmix_travels_with_tpt(mixes, tmp_path):
    method = build("tpt", tiny(), NAMES, views=4)
    method.aim(replace(toy("pets"), name="imagenet" if not mixes else "pets"))
    taken = [part.taken for part in method.nest()]
    loaded = load_method(method.save(tmp_path / "t.safetensors"), tiny())
    assert [part.taken for part in loaded.nest()] == taken
    assert loaded.option("augmix") == method.option("augmix")


def test_case_12_methods_take_images_and_name_what_they_cannot_do():
    method = build("cocoop", tiny(), NAMES)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method(images), method(Batch(images=images)))
    assert method(images).shape == (2, len(NAMES))
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    with pytest.raises(ValueError, match="float16.*precision"):
        method.half()
    for name, p in method.named_parameters():
        assert torch.equal(p, before[name]) and p.dtype == torch.float32


def test_case_14_two_folders_of_one_name(room):  # noqa: F811
    made.classes("a/data", each=8)
    made.classes("b/data", each=8, start=100)
    rows("run", "clip", "--data", "a/data,b/data")
    assert {r["config"]["dataset"] for r in records(room)} == {"a_data", "b_data"}
    transfer = ("--protocol", "cross-dataset", "--targets", "b/data")
    done = rows("run", "clip", "--data", "a/data", *transfer)
    assert "a_data" in done.stdout and "b_data" in done.stdout


def test_case_18_relative_paths_are_the_clients(room):  # noqa: F811
    from promptkit.grids import grid
    from promptkit.workers import same_measurement, with_absolute_paths

    made.classes("photos", each=8)
    (plan,) = grid("few-shot", "clip", ["./photos"])
    sent = with_absolute_paths(plan.run)
    assert sent.dataset == str(Path("photos").resolve())
    assert same_measurement(plan.config, runs.plan(sent).config) in (None, "")
    made.image("photos/fox/0.bmp", 250)
    found = same_measurement(plan.config, runs.plan(sent).config)
    assert "data" in found


def test_case_20_edited_prompts_make_another_run(room, monkeypatch):  # noqa: F811
    rows("run", "clip", "--data", "pets")
    source, real = identity._module, inspect.getsource
    edited = real(__import__("promptkit.prompts").prompts) + "\nEDITED = True\n"

    def module(name):
        return identity._hash(edited) if name.endswith(".prompts") else source(name)

    monkeypatch.setattr(identity, "_module", module)
    rows("run", "clip", "--data", "pets")
    rows("run", "clip", "--data", "pets")
    one, two = records(room)
    assert one["hash"] != two["hash"] and one["rows"] == two["rows"]
    assert one["config"]["code"] != two["config"]["code"]
    assert inspect.isclass(Prompt)


def test_case_21_names_reach_the_sentences_as_they_are_spelt():
    described = {"polka-dotted": ["small dots"], "707_320": ["four engines"]}
    method = build(
        "waffleclip", tiny(), list(described), mode="gpt_descriptions",
        descriptors=described,
    )  # fmt: skip
    assert method.sentences() == [
        ["A photo of a polka-dotted, which has small dots."],
        ["A photo of a 707 320, which has four engines."],
    ]


@pytest.mark.parametrize("model", [None, "ViT-B-16"])
def test_case_25_real_data_by_the_papers_recipe(room, monkeypatch, model):  # noqa: F811
    load = data.load_dataset
    own = toy("eurosat")
    monkeypatch.setattr(
        data,
        "load_dataset",
        lambda name, root=None: own if name == "eurosat" else load(name),
    )
    monkeypatch.setattr(runs, "load_clip", lambda *a, **k: tiny())
    options = () if model is None else ("--model", model, "--pretrained", "openai")
    done = rows("run", "clip", "--data", "eurosat", *options)
    (record,) = records(room)
    assert record["config"]["profile"] == ("mini" if model is None else "full")
    assert ("profile full: eurosat and ViT-B-16 are real" in done.stderr) == bool(model)


def test_case_28_targets_that_fit_give_their_rows(room, monkeypatch):  # noqa: F811
    """Contexts of single classes, under shifts of which some have other classes."""
    source = replace(toy("mini"), shifts=("mini-v2", "mini-a"))
    same, other = toy("mini-v2"), toy("mini-a")
    other = replace(other, classnames=NAMES[:-1] + ["owl"])
    known = {"mini": source, "mini-v2": same, "mini-a": other}
    monkeypatch.setattr(data, "load_dataset", lambda name, root=None: known[name])
    run = Run(
        "domain-generalization", "coop", "mini", shots=1, clip=tiny(),
        overrides={"class_specific": True, "epochs": 1, "n_ctx": 2, "init": ""},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="mini-a is left out"):
        found = execute(run, progress=False)
    assert found["target"].tolist() == ["mini", "mini-v2"]
    monkeypatch.setattr(runs, "fit", lambda *a, **k: pytest.fail("trained first"))
    known["mini"] = replace(source, shifts=("mini-a",))
    with pytest.raises(ValueError, match="class"):
        execute(replace(run, seed=2), progress=False)
    assert not [path for path in listing(room) if "tmp" in path.split("/")[-1]]


FOUR = ("fox", "heron", "otter", "wolf")


def sentences(path, *texts):
    said = {name: [f"{text} {name}" for text in texts] for name in FOUR}
    Path(path).write_text(json.dumps(said))


def test_runs_on_other_sentences_are_told_apart(room):  # noqa: F811
    made.classes("photos", FOUR, each=8)
    words = ("run", "protext", "--data", "./photos", "--profile", "smoke")
    words += ("--max-steps", "1", "--descriptions", "a.json")
    for text in ("a red", "a grey"):
        sentences("a.json", text)
        rows(*words)
    rows(*words, "--seed", "2")
    found = load_results(room / "results")
    one, two = sorted(set(found["options"]))
    assert one.startswith("max_steps=1, descriptions=a.json#") and one[:-6] == two[:-6]
    assert sorted(found["options"].value_counts()) == [1, 2]
    assert {label.partition(" | ")[2] for label in label_of(found)} == {one, two}


def test_a_chapter_finds_runs_on_other_sentences(room):  # noqa: F811
    chapter = Chapter("01_x", "smoke", ["sat"], output=str(room / "results"))
    entries = {"A": "kapt", "B": ("coop", {"n_ctx": 2})}
    other = {name: ["a thing"] for name in LOAD_DATASET("sat").classnames}
    for name in ("a.json", "b.json"):  # the second finds the same runs
        Path(name).write_text(json.dumps(other))
        found = chapter.sweep("few-shot", entries, descriptions=name, max_steps=1)
        assert list(found["method"]) == ["A", "B"]


def test_the_datasets_own_sentences_are_no_option():
    mini = LOAD_DATASET("pets")
    assert mini.described == "" and replace(mini, described="x").identity
    same = LOAD_DATASET("pets", descriptions=dict(mini.descriptions))
    assert same.described == ""
    other = {name: ["a thing"] for name in mini.classnames}
    told = LOAD_DATASET("pets", descriptions=other)
    plan = runs.plan(Run("few-shot", "kapt", told, clip=tiny(), profile="smoke"))
    assert plan.given == f"descriptions={told.described}"
    assert "given#" in plan.given and "given" not in plan.config
    assert not runs.plan(Run("few-shot", "coop", told, clip=tiny())).given


def test_sentences_that_nothing_reads_are_refused(room):  # noqa: F811
    made.classes("photos", FOUR, each=8)
    sentences("a.json", "a red")
    words = ("run", "coop", "--data", "./photos", "--descriptions", "a.json")
    refused(room, words, "coop takes no sentences .* --descriptions has no effect")


@pytest.mark.parametrize("names", [FOUR[:2], FOUR[:3]])
def test_both_sides_of_base_to_new_have_classes(room, names):  # noqa: F811
    made.classes("photos", names, each=8)
    message = f"2 classes on each side.* 'photos' has {len(names)} such classes"
    words = ("run", "clip", "--data", "./photos", "--protocol", "base-to-new")
    refused(room, words, message)
    build("clip", tiny(), names).save("clip.safetensors")
    words = ("evaluate", "clip.safetensors", "--data", "./photos", *words[-2:])
    refused(room, words, message)


def test_a_side_that_is_not_tested_is_refused(room):  # noqa: F811
    for part, names in (("train", FOUR), ("val", FOUR), ("test", FOUR[:3])):
        made.classes(f"photos/{part}", names, start=len(part))
    words = ("run", "clip", "--data", "./photos", "--protocol", "base-to-new")
    refused(room, words, "'photos' has 3 such classes")


def test_what_was_measured_outlives_a_method_that_cannot_be_written(
    room,  # noqa: F811
    monkeypatch,
):
    def full(*_):
        raise OSError(28, "No space left on device", "x.json")

    monkeypatch.setattr(Method, "save", full)
    words = ("run", "coop", "--data", "pets", *QUICK, "--profile", "smoke")
    done = rows(*words, "--save", "a.safetensors", code=1)
    assert "the run is stored, but a.safetensors could not be written" in done.stderr
    assert "No space left" in done.stderr and len(records(room)) == 1
    monkeypatch.setattr(runs, "save_run", full)
    run = Run("few-shot", "clip", toy("pets"), clip=tiny(), profile="smoke")
    with pytest.raises(OSError, match=r"measured pets \(all\) \d+.*No space left"):
        execute(run, room / "results")


@pytest.mark.parametrize("name", ["few-shot", "trained", "checkpoints"])
def test_folders_of_results_are_looked_at_before_training(room, name):  # noqa: F811
    Path("out").mkdir()
    Path("out", name).write_text("mine")
    words = ("run", "coop", "--data", "pets", "--results", "out")
    refused(room, words, f"--results: out/{name} cannot be written")


def test_a_damaged_teacher_is_trained_again(room):  # noqa: F811
    overrides = {"teacher": "coop@mini"}
    run = Run("few-shot", "promptkd", toy("pets"), clip=tiny(), profile="smoke",
              max_steps=1, shots=1, overrides=overrides)  # fmt: skip
    first = execute(run, room / "results", progress=False)
    (path,) = room.glob("results/trained/*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot use .*: training again"):
        again = execute(replace(run, seed=2), room / "results", progress=False)
    assert len(first) == len(again) == 1 and path.read_bytes() == whole
    path.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        execute(run, room / "results", force=True, progress=False)
    assert path.read_bytes() == whole


def test_a_student_teaches_nobody(room):  # noqa: F811
    words = ("run", "promptkd", "--data", "pets", "--set", "teacher=promptkd@mini")
    refused(room, words, "teacher of promptkd cannot be promptkd, which is a student")


def test_an_evaluation_tells_two_folders_of_one_name_apart(room):  # noqa: F811
    for n, place in enumerate("ab"):
        made.classes(f"{place}/photos", each=8, start=90 * n)
    build("clip", tiny(), ["fox", "heron"]).save("clip.safetensors")
    words = ("evaluate", "clip.safetensors", "--data", "a/photos,b/photos", "--json")
    found = json.loads(rows(*words).stdout)
    assert [row["dataset"] for row in found] == ["a_photos", "b_photos"]
