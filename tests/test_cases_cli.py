"""What people type, and what must come of it: inputs that were once misunderstood."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import torch
from PIL import Image
from test_cli import process, promptkit, world  # noqa: F401
from test_protocols import tiny, toy
from test_reproduce import PATIENT, chapter
from test_workers import heeding_signals

from promptkit import clip as clip_module
from promptkit import registry, results
from promptkit.chapter import Chapter
from promptkit.cli import values
from promptkit.errors import InputError
from promptkit.parameters import names, whole_numbers
from promptkit.registry import methods
from promptkit.reproduce import declared_parameters

ROOT = Path(__file__).parents[1]
QUICK = ("--shots", "2", "--epochs", "1", "--set", "n_ctx=2", "--set", "init=")


@pytest.fixture
def photos(world, monkeypatch):  # noqa: F811
    """A folder of three good images and others; zero-shot CLIP is the tiny one."""
    for module in (clip_module, registry):
        monkeypatch.setattr(module, "load_clip", lambda *args, **kwargs: tiny())
    folder = world / "photos"
    (folder / "more" / ".thumbs").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    for n, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        Image.new("RGB", (40 + n, 30), (80 * n, 90, 20)).save(folder / name)
    hidden = ("._a.png", ".hidden.png", "more/.thumbs/c.png", "__MACOSX/a.png")
    for name in (*hidden, "cut.png", "empty.jpg", "text.png"):
        (folder / name).write_bytes(b"" if "empty" in name else b"no image")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    (folder / "read_me.txt").write_text("no image, and none by its name")
    return folder


# --- 07: predict ----------------------------------------------------------------------


def test_case_07_good_images_are_classified_and_bad_ones_named(photos):
    out, said = promptkit("predict", photos, "--classes", "heron,fox", "--json", code=1)
    rows = json.loads(out)
    good = [str(photos / name) for name in ("a.png", "b.jpg", "more/c.png")]
    assert [row["image"] for row in rows] == good
    assert all(set(row["classes"]) == {"heron", "fox"} for row in rows)
    for name in ("cut.png", "empty.jpg", "text.png"):
        (line,) = [line for line in said.splitlines() if name in line]
        assert line.startswith("Error: ") and len(line) > len(str(photos / name)) + 20
    assert "3 of 6 files could not be classified" in said
    out, said = promptkit("predict", photos, "--classes", "heron,fox", code=1)
    assert out.count("%") == 6 and "cut.png" in said and "cut.png" not in out


def test_case_07_files_of_a_folder_that_are_not_tried_are_named(photos):
    (photos / "a.png").rename(photos / "a.heic")
    words = ("predict", "--classes", "cat,dog", "--json")
    out, err = promptkit(*words, photos, code=1)
    assert "1 files (.heic) are no images that can be read: name them" in err
    assert "a.heic" not in out
    (photos / "only").mkdir()
    (photos / "a.heic").rename(photos / "only" / "a.heic")
    _, err = promptkit(*words, photos / "only", code=2)
    assert "holds no images; 1 files (.heic) are no images" in err


def test_case_07_other_mixtures(photos):
    good, bad = photos / "a.png", photos / "text.png"
    words = ("--classes", "heron,fox", "--json")
    assert len(json.loads(promptkit("predict", good, *words)[0])) == 1
    out, said = promptkit("predict", bad, *words, code=1)
    assert json.loads(out) == [] and "text.png" in said
    out, said = promptkit("predict", photos / "nothing.png", good, *words, code=1)
    assert len(json.loads(out)) == 1 and "nothing.png" in said
    out, _ = promptkit("predict", good, photos, good, *words, code=1)
    assert len(json.loads(out)) == 3  # an image that is named twice counts once
    (photos.parent / "none" / ".git").mkdir(parents=True)
    _, said = promptkit("predict", photos.parent / "none", *words, code=2)
    assert "holds no images" in said


def test_case_06_photos_are_turned_as_their_camera_says(photos, monkeypatch):
    """The upper half of the upright photo is red; the file holds it on its side."""
    seen = []
    load = methods()["clip"].logits

    def logits(self, images):
        seen.append(images)
        return load(self, images)

    monkeypatch.setattr(methods()["clip"], "logits", logits)
    upright = Image.new("RGB", (32, 32), "blue")
    upright.paste("red", (0, 0, 32, 16))
    upright.save(photos / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it
    upright.rotate(90).save(photos / "phone.png", exif=exif)
    files = (photos / "upright.png", photos / "phone.png")
    promptkit("predict", *files, "--classes", "a,b")
    assert torch.equal(seen[0], seen[1])


# --- 04, 14: names --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("heron\nred fox\n".encode("utf-8-sig"), ["heron", "red fox"]),
        (b"heron\r\n\r\n  red fox  \r\n", ["heron", "red fox"]),
        ("Übergröße\nfox".encode(), ["Übergröße", "fox"]),
    ],
)
def test_case_04_files_of_class_names(photos, content, found):
    file = photos.parent / "names.txt"
    file.write_bytes(content)
    words = ("--classes-file", file, "--json")
    out, _ = promptkit("predict", photos / "a.png", *words)
    assert set(json.loads(out)[0]["classes"]) == set(found)


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
def test_case_04_other_encodings_are_named(photos, encoding):
    file = photos.parent / "names.txt"
    file.write_bytes("Übergröße\nfox\n".encode(encoding))
    words = ("--classes-file", file)
    _, said = promptkit("predict", photos / "a.png", *words, code=2)
    assert "UTF-8" in said and re.search("UTF-16|WINDOWS-1252", said)


def test_case_04_files_of_names_reach_the_dataset(world, monkeypatch):  # noqa: F811
    from promptkit import data

    load, asked = data.load_dataset, []

    def record(name, root=None, **naming):
        asked.append((name, naming))
        return load(name)

    monkeypatch.setattr(data, "load_dataset", record)
    (world / "names.txt").write_text("a\nb\n")
    (world / "said.json").write_text("{}")
    files = ("--classnames", "names.txt", "--descriptions", "said.json")
    promptkit("run", "waffleclip", "--data", "pets", "--profile", "smoke", *files)
    naming = {"classnames": "names.txt", "descriptions": "said.json"}
    assert ("pets", naming) in asked


# --- 10, 14: settings -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "text", "overrides"),
    [
        ("clip", "template={}", {"template": "{}"}),
        ("clip", "template={} = {}", {"template": "{} = {}"}),
        ("clip", "template=[1] a {}", {"template": "[1] a {}"}),
        ("clip", "template=None", {"template": None}),
        ("clip", "template=['a {}', 'b {}']", {"template": ["a {}", "b {}"]}),
        ("clip", 'template=["a {}"]', {"template": ["a {}"]}),
        ("clip", "template='a {}.'", {"template": "a {}."}),
        ("clip", "template=don't {}", {"template": "don't {}"}),
        ("coop", "init=", {"init": ""}),
        ("coop", "init=''", {"init": ""}),
        ("coop", "init=None", {"init": "None"}),
        ("coop", "init=4", {"init": "4"}),
        ("coop", "init=true", {"init": "true"}),
        ("coop", "init=a photo, of a", {"init": "a photo, of a"}),
        ("coop", "init=a=b", {"init": "a=b"}),
        ("coop", "n_ctx=4", {"n_ctx": 4}),
        ("coop", "n_ctx= 4 ", {"n_ctx": 4}),
        ("coop", "position=front", {"position": "front"}),
        ("coop", "class_specific=True", {"class_specific": True}),
        ("coop", "class_specific=false", {"class_specific": False}),
        ("coop", "lr=1e-3", {"lr": 0.001}),
        ("coop", "lr=2", {"lr": 2.0}),
        ("coop", "epochs=3", {"epochs": 3}),
        ("coop", "epoch_steps=none", {"epoch_steps": None}),
        ("coop", "augment=false", {"augment": False}),
        ("coop", "optimizer=adam", {"optimizer": "adam"}),
        ("coop", "options={'eps': 1e-3}", {"options": {"eps": 0.001}}),
        ("coop", 'options={"nesterov": true}', {"options": {"nesterov": True}}),
        ("maple", "depth=3", {"depth": 3}),
        ("maple", "depth=None", {"depth": None}),
        ("dept(coop)", "host.n_ctx=4", {"host": {"n_ctx": 4}}),
        ("dept(coop)", "host.init=4", {"host": {"init": "4"}}),
        ("dept(coop)", "lam=0.5", {"lam": 0.5}),
        ("tpt", "host.init=a", {"host": {"init": "a"}}),
        ("waffleclip", "descriptors={'a': ['b']}", {"descriptors": {"a": ["b"]}}),
        ("waffleclip", "mode=clip", {"mode": "clip"}),
    ],
)
def test_case_14_a_setting_is_read_as_what_it_is_for(method, text, overrides):
    found = values.settings(method, [text])
    assert found == overrides
    assert repr(found) == repr(overrides)  # 2 is not 2.0


def test_case_14_settings_join():
    texts = ["lam=0.5", "host.n_ctx=4", "host.init=", "epochs=2"]
    assert values.settings("dept(coop)", texts, lr=0.1, batch_size=None) == {
        "lam": 0.5,
        "host": {"n_ctx": 4, "init": ""},
        "epochs": 2,
        "lr": 0.1,
    }


def test_case_14_a_text_setting_reaches_the_run(world):  # noqa: F811
    promptkit("run", "clip", "--data", "pets", "--set", "template={}")
    (path,) = world.glob("results/few-shot/*.json")
    config = json.loads(path.read_text())["config"]
    assert config["overrides"] == {"template": "{}"}


# --- everything that is refused -------------------------------------------------------

RUN = ("run", "coop", "--data", "pets")
REFUSED = [
    ((*RUN, "--set", "lr=0,001"), "lr must be a number, got '0,001'; write a decimal"),
    ((*RUN, "--set", "lr=fast"), "lr must be a number, got 'fast'"),
    ((*RUN, "--set", "lr=nan"), "lr must be a number, got 'nan'"),
    ((*RUN, "--set", "lr=inf"), "lr must be a number, got 'inf'"),
    ((*RUN, "--set", "lr=1_0"), "lr must be a number, got '1_0'"),
    ((*RUN, "--set", "lr="), "lr must be a number, got ''"),
    ((*RUN, "--set", "lr=-1"), "lr must be a number that is not negative, got -1.0"),
    ((*RUN, "--set", "n_ctx=4.0"), "n_ctx must be a whole number or None, got '4.0'"),
    ((*RUN, "--set", "n_ctx=four"), "n_ctx must be a whole number or None, got 'four'"),
    ((*RUN, "--set", "n_ctx=true"), "n_ctx must be a whole number or None, got 'true'"),
    ((*RUN, "--set", "n_ctx=[4]"), "n_ctx must be a whole number or None, got '[4]'"),
    ((*RUN, "--set", "n_ctx=0"), "n_ctx must be at least 1"),
    ((*RUN, "--set", "n_ctx=" + "9" * 30), "n_ctx must be a whole number"),
    ((*RUN, "--set", "class_specific=2"), "class_specific must be True or False"),
    ((*RUN, "--set", "position=left"), "position must be one of 'end', 'middle'"),
    ((*RUN, "--set", "n_ctxt=4"), "did you mean 'n_ctx'"),
    ((*RUN, "--set", "lrr=4"), "did you mean 'lr'"),
    ((*RUN, "--set", "n_ctx"), "--set takes KEY=VALUE"),
    ((*RUN, "--set", "=4"), "--set takes KEY=VALUE"),
    ((*RUN, "--set", "n ctx=4"), "--set takes KEY=VALUE"),
    ((*RUN, "--set", "teacher.n_ctx=4"), "--set takes KEY=VALUE"),
    ((*RUN, "--set", "host.n_ctx=4"), "coop has no host whose n_ctx could be set"),
    ((*RUN, "--set", "host=coop"), "unknown hyperparameter of coop 'host'"),
    ((*RUN, "--set", "hparams={}"), "unknown hyperparameter of coop 'hparams'"),
    ((*RUN, "--set", "options=5"), "options must be"),
    ((*RUN, "--set", "n_ctx=2", "--set", "n_ctx=4"), "--set n_ctx is given twice"),
    ((*RUN, "--lr", "1", "--set", "lr=2"), "give lr once"),
    (("run", "dept(coop)", "--set", "host.n_ctxt=4"), "did you mean 'n_ctx'"),
    (("run", "dept(coop)", "--set", "host.host.n_ctx=4"), "has no host whose n_ctx"),
    (("run", "clip", "--set", "template=['a {}', 5]"), "template must be"),
    (("run", "waffleclip", "--set", "descriptors=[1]"), "descriptors must be"),
    (("run", "linear-probe", "--set", "n_ctx=2"), "nothing to set"),
    (("run", "clip", "--data", "pets", "--lr", "0.1"), "so lr has no effect"),
    (("run", "clip", "--data", "pets", "--set", "epochs=3"), "so epochs has no effect"),
    (("run", "clip", "--data", "pets", "--max-steps", "3"), "max_steps has no effect"),
    ((*RUN, "--lr", "fast"), "'fast' is no number"),
    ((*RUN, "--lr", "0,1"), "'0,1' is no number; write a decimal point"),
    ((*RUN, "--lr", "nan"), "'nan' is no number"),
    ((*RUN, "--lr", "-0.1"), "lr must be a number that is not negative, got -0.1"),
    ((*RUN, "--epochs", "0"), "--epochs must be a whole number from 1, not 0"),
    ((*RUN, "--epochs", "1.5"), "'1.5' is no whole number"),
    ((*RUN, "--batch-size", "-8"), "--batch-size must be a whole number from 1"),
    ((*RUN, "--max-steps", "0"), "--max-steps must be a whole number from 1, not 0"),
    ((*RUN, "--workers", "0"), "--workers must be a whole number from 1 to 512, not 0"),
    ((*RUN, "--workers", "100000"), "--workers must be a whole number from 1 to 512"),
    ((*RUN, "--workers", "two"), "'two' is no whole number"),
    ((*RUN, "--shots", "0"), "--shots takes whole numbers from 1, not 0"),
    ((*RUN, "--shots", "-4"), "--shots takes whole numbers from 1, not -4"),
    ((*RUN, "--shots", ""), "--shots takes whole numbers"),
    ((*RUN, "--shots", "1,,4"), "--shots takes whole numbers"),
    ((*RUN, "--shots", "[]"), "--shots names nothing: '[]'"),
    ((*RUN, "--shots", "1.5"), "--shots takes whole numbers"),
    ((*RUN, "--shots", "4,4"), "--shots names 4 twice: '4,4'"),
    ((*RUN, "--seeds", "1,1"), "--seeds names 1 twice: '1,1'"),
    ((*RUN, "--seeds", "1-3,2"), "--seeds names 2 twice: '1-3,2'"),
    ((*RUN, "--seeds", "3-1"), "--seeds takes whole numbers"),
    ((*RUN, "--seeds", "-1"), "--seeds takes whole numbers from 0, not -1"),
    ((*RUN, "--seeds", "1-99999999"), "--seeds takes at most 10,000 numbers"),
    ((*RUN, "--seeds", "nan"), "--seeds takes whole numbers"),
    ((*RUN, "--seeds", "one"), "--seeds takes whole numbers"),
    (("run", "coop", "--data", ""), "--data names nothing: ''"),
    (("run", "coop", "--data", "pets,pets"), "--data names 'pets' twice"),
    (("run", "coop", "--data", "pets,pest"), "did you mean 'pets'"),
    ((*RUN, "--targets", "cars"), "--targets is of --protocol cross-dataset"),
    ((*RUN, "--save", "a.bin"), "--save takes the name of a .safetensors file"),
    ((*RUN, "--save", "a.safetensors", "--workers", "2"), "--save makes one run here"),
    ((*RUN, "--classnames", "no.txt"), "--classnames: there is no file no.txt"),
    ((*RUN, "--descriptions", "no.json"), "--descriptions: there is no file no.json"),
    ((*RUN, "--scheduler", "nonsense://x"), "no Dask scheduler answers at nonsense://x"),
    ((*RUN, "--nonsense"), "o such option"),
    (("run",), "Missing argument"),
    (("runn",), "No such command"),
    (("predict", "no.png", "--classes", "a,b"), "there is no image no.png"),
    (("predict", ".", "--classes", "a,a"), "--classes names 'a' twice"),
    (("predict", ".", "--classes", ","), "--classes names nothing"),
    (("predict", ".", "--classes", "a,b", "--top", "0"), "--top must be a whole"),
    (("predict", ".", "--classes", "a", "--classes-file", "b"), "class names once"),
    (("predict", ".", "--classes-file", "no.txt"), "no.txt"),
    (("predict", ".", "--checkpoint", "no.st", "--model", "mini"), "leave out"),
    (("evaluate", "no.safetensors", "--set", "n_ctx=4"), "no.safetensors"),
    (("evaluate", "no.safetensors", "--model", "mini"), "name the --method"),
    (("leaderboard", "--level", "95"), "no runs are stored"),
    (("leaderboard", "--level", "wide"), "'wide' is no number"),
    (("reproduce", "--methods", "coop"), "--methods has no effect on the chapters"),
    (("reproduce", "--benchmark", "--output", "x"), "--output has no effect on"),
    (("reproduce", "--benchmark", "--seeds", "1,1"), "--seeds names 1 twice"),
    (("reproduce", "--shots", "0"), "--shots takes whole numbers from 1"),
    (("reproduce", "--workers", "-1"), "--workers must be a whole number from 1"),
    (("pretrain", "--samples", "0"), "--samples must be a whole number from 1, not 0"),
    (("data", "download", "pest"), "unknown real dataset"),
]  # fmt: skip


def short(value):
    return " ".join(value)[:50] if isinstance(value, tuple) else ""


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=short)
def test_bad_options_are_one_sentence(world, words, message):  # noqa: F811
    before = sorted(world.rglob("*"))
    _, said = promptkit(*words, code=2)
    (line,) = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert message in line
    made = set(world.rglob("*")) - set(before)
    assert not [path for path in made if "cache" not in path.relative_to(world).parts]


# --- 13: papermill --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, [1]),
        ([1, 2], [1, 2]),
        ((4,), [4]),
        (range(3), [0, 1, 2]),
        ("1", [1]),
        ("1,4", [1, 4]),
        ("1, 4", [1, 4]),
        ("[1, 2]", [1, 2]),
        ("(1, 2)", [1, 2]),
        ("[1,2", None),
        ("1-3", [1, 2, 3]),
        ("[1-3]", [1, 2, 3]),
        ("1-2,5", [1, 2, 5]),
        (["1", "4"], [1, 4]),
        ("['1', '4']", [1, 4]),
        (torch.tensor([1, 2]).numpy(), [1, 2]),
        (torch.tensor(3).numpy(), [3]),
        (1.0, None),
        (True, None),
        (None, None),
        ([], None),
        ("", None),
        ({"a": 1}, None),
        ([[1]], None),
    ],
)
def test_case_13_numbers(value, found):
    if found is None:
        with pytest.raises(InputError, match="^seeds (takes|names nothing)"):
            whole_numbers("seeds", value)
    else:
        numbers = whole_numbers("seeds", value)
        assert numbers == found and all(type(n) is int for n in numbers)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("pets", ["pets"]),
        (["pets", "cars"], ["pets", "cars"]),
        ("pets,cars", ["pets", "cars"]),
        ("pets, cars", ["pets", "cars"]),
        ("pets cars", ["pets", "cars"]),
        ("['pets']", ["pets"]),
        ('["pets", "cars"]', ["pets", "cars"]),
        ("[pets, cars]", ["pets", "cars"]),
        ("('pets',)", ["pets"]),
        ("all", ["all"]),
        ("my photos", ["my photos"]),  # a folder
        ("my photos,pets", ["my photos", "pets"]),
        ("a, b/c", ["a, b/c"]),  # another
        ("their photos", ["their photos"]),  # missing: named as it was written
    ],
)
def test_case_13_names(tmp_path, monkeypatch, value, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    (tmp_path / "a, b" / "c").mkdir(parents=True)
    assert names("datasets", value, ["pets", "cars", "all"]) == found


@pytest.mark.parametrize("value", [[], "", "[]", [1], 5, "pets,pets", None])
def test_case_13_names_that_are_none(value):
    with pytest.raises(InputError, match="^datasets (names|takes)"):
        names("datasets", value)


@pytest.mark.parametrize(
    ("given", "tasks", "seeds", "shots"),
    [
        ({"seeds": 1}, ["sat"], [1], [16]),
        ({"seeds": "[1, 2]"}, ["sat"], [1, 2], [16]),
        ({"seeds": "1-3", "shots": "1,4"}, ["sat"], [1, 2, 3], [1, 4]),
        ({"datasets": "['pets']", "shots": 4}, ["pets"], [1, 2, 3], [4]),
        ({"datasets": '["pets"]', "seeds": "7"}, ["pets"], [7], [16]),
        ({"datasets": "pets,cars", "shots": [1]}, ["pets", "cars"], [1, 2, 3], [1]),
    ],
)
def test_case_13_a_chapter_takes_all_forms(tmp_path, given, tasks, seeds, shots):
    where = {"mini": ["sat"], "output": str(tmp_path), "workers": "2"}
    chapter = Chapter("03_coop", **{"datasets": None} | given | where)
    assert (chapter.tasks, chapter.seeds, chapter.shots) == (tasks, seeds, shots)
    assert chapter.workers == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": "one"}, "seeds takes whole numbers"),
        ({"shots": 0}, "shots takes whole numbers from 1"),
        ({"shots": "[]"}, "shots names nothing"),
        ({"datasets": "pest"}, "unknown dataset 'pest'; did you mean 'pets'"),
        ({"datasets": "['eurosatt']"}, "did you mean 'eurosat'"),
        ({"workers": 0}, "workers takes whole numbers from 1"),
    ],
)
def test_case_13_a_bad_parameter_is_named(tmp_path, given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Chapter("03_coop", output=str(tmp_path), **given)


CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("texts", [False, True])
def test_case_13_every_chapter_begins_with_texts(path, texts, tmp_path, monkeypatch):
    """The cells down to the one that sets up, with parameters as papermill's -p gives
    them; what they define is what the other cells read.
    """
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path))
    space = {"get_ipython": lambda: None}
    given = {"profile": "smoke", "seeds": 2, "shots": "[4]", "datasets": "mini"}
    if texts:
        given |= {"seeds": "[2]", "shots": "4", "datasets": "['mini']"}
    declared = declared_parameters(path)
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or "%pip" in cell.source:
            continue
        exec(cell.source, space)
        if "parameters" in cell.metadata.get("tags", []):
            space |= {k: v for k, v in given.items() if k in declared}
        elif "import" in cell.source:
            break
    rest = [c.source for c in nbformat.read(path, 4).cells[4:] if c.cell_type == "code"]
    nodes = ast.walk(ast.parse("\n".join(rest)))
    read = {node.id for node in nodes if isinstance(node, ast.Name)}
    for name, found in {"seeds": ([2],), "shots": ([4], 4)}.items():
        if "waffle" in path.stem:
            continue  # they are arguments there
        if name in declared and name in read:
            assert space[name] in found


def test_case_13_papermill_itself(tmp_path):
    body = "print(chapter.tasks, chapter.seeds, chapter.shots)"
    setting = (
        "from promptkit.chapter import Chapter\n"
        "chapter = Chapter('x', profile, datasets, seeds, shots, output)"
    )
    defaults = "profile = 'mini'\ndatasets = None\nseeds = [1]\nshots = 16\noutput = ''"
    path = chapter(tmp_path, "01_x.ipynb", setting, body, parameters=defaults)
    start = f"{PATIENT}\nfrom papermill.cli import papermill\npapermill()"
    command = [sys.executable, "-c", start, "-k", "python3", "-l", "python"]
    command += ["01_x.ipynb", "out.ipynb"]
    for text in ("seeds 1", "seeds [2,3]", "shots 1,4", "datasets ['pets']"):
        command += ["-p", *text.split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    text = nbformat.read(path.with_name("out.ipynb"), 4).cells[-1].outputs[0]["text"]
    assert text.strip() == "['pets'] [2, 3] [1, 4]"


# --- 15: one results folder -----------------------------------------------------------


def test_case_15_one_place_wherever_the_process_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("PROMPTKIT_RESULTS", raising=False)
    notebooks = tmp_path / "book" / "notebooks"
    notebooks.mkdir(parents=True)
    monkeypatch.chdir(notebooks)
    assert results.results_dir() == Path("results")  # there is no project
    (tmp_path / "book" / "pyproject.toml").write_text("")
    expected = tmp_path / "book" / "results"
    assert results.results_dir().resolve() == expected
    Chapter("03_coop", mini=["sat"], datasets=None)
    assert capsys.readouterr().out == "Runs are stored in ../results\n"
    monkeypatch.chdir(tmp_path / "book")
    assert results.results_dir().resolve() == expected
    (notebooks / "results" / "few-shot").mkdir(parents=True)  # of an earlier version
    monkeypatch.chdir(notebooks)
    assert results.results_dir().resolve() == notebooks / "results"
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "set"))
    assert results.results_dir() == tmp_path / "set"
    assert results.results_dir("given") == Path("given")


def test_case_15_nobody_elses_results(tmp_path, monkeypatch):
    monkeypatch.delenv("PROMPTKIT_RESULTS", raising=False)
    (tmp_path / "results" / "checkpoints").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert results.results_dir().resolve() == tmp_path / "here" / "results"


# --- 16, 17: signals ------------------------------------------------------------------

SLOW = "import time\nprint('at work', flush=True)\ntime.sleep(300)"


def begin(*words, folder, **environment):
    """Start a command, in a folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "promptkit", *map(str, words)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heeding_signals,
    )


def marked(mark):
    """Processes whose environment holds a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGKILL", -9)])
def test_case_17_chapters_stop_at_once(tmp_path, number, code):
    """The kernel too, of which nothing but its environment is known."""
    lines = f"from pathlib import Path\nPath({str(tmp_path / 'on')!r}).touch()\n{SLOW}"
    for name in ("01_slow.ipynb", "02_next.ipynb"):
        chapter(tmp_path / "notebooks", name, lines)
    mark = f"PROMPTKIT_MARK={tmp_path}"
    process = begin(
        "reproduce", "--profile", "smoke", "--output", "out",
        folder=tmp_path, PROMPTKIT_MARK=str(tmp_path),
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (tmp_path / "on").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert (tmp_path / "on").exists() and len(marked(mark)) >= 3
    began = time.monotonic()
    process.send_signal(getattr(signal, number))
    process.wait(30)
    assert time.monotonic() - began < 5
    assert process.returncode == code
    while marked(mark) and time.monotonic() - began < 10:
        time.sleep(0.2)
    assert not marked(mark)
    if code == 130:
        said = process.stderr.read()
        assert said.count("Interrupted") == 1 and "Traceback" not in said
    assert not list(tmp_path.glob("out/**/*.ipynb*"))


def test_case_17_a_full_temporary_folder(tmp_path, monkeypatch):
    """Workers need none; a chapter says what is wrong."""
    from promptkit.reproduce import Job, execute_chapter
    from promptkit.workers import parallel

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    monkeypatch.setattr("tempfile.mkstemp", full)
    assert dict(parallel(abs, [-1, -2], 2)) == {-1: 1, -2: 2}
    path = chapter(tmp_path, "01_x.ipynb", "1")
    report = execute_chapter(Job(path, path, {}, {}))
    assert "No space left on device" in report.error


def test_case_17_a_run_that_is_killed_is_reported(world):  # noqa: F811
    """Its worker dies, as by the system when memory runs out; the others go on."""
    code = (
        "import os, signal\n"
        "from promptkit import runs\n"
        "measure = runs.measure\n"
        "def deadly(*a, **k):\n"
        "    if k.get('seed') == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return measure(*a, **k)\n"
        "runs.measure = deadly\n"
    )
    (world / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'promptkit.grids' and 'pickle' in sys.orig_argv[2][:30]:\n"
        "            sys.meta_path.remove(self)\n"
        f"            exec({code!r}, {{}})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    process = begin(
        "run", "coop", "--data", "sat", "--shots", "1", "--epochs", "1", "--profile",
        "smoke", "--seeds", "1-3", "--workers", "2", folder=world,
        PYTHONPATH=os.pathsep.join([str(world), str(ROOT)]),
    )  # fmt: skip
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1 and "Traceback" not in said
    assert "1 of 3 runs failed, the others are stored; coop on sat" in said
    assert "seed 2: its process was ended by SIGKILL" in said
    assert len(list(world.glob("results/few-shot/*.json"))) == 2


# --- 18: other machines ---------------------------------------------------------------


def test_case_18_a_worker_measures_what_the_client_sees(world):  # noqa: F811
    from promptkit.grids import _attempt, grid

    (plan,) = grid("few-shot", ["clip"], ["pets"])
    told = {"results": False, "force": False, "progress": False}
    rows, error = _attempt((plan.run, plan.config), **told)
    assert error is None and len(rows) == 1
    other = plan.config | {"data": {"pets": "other pixels"}}
    rows, error = _attempt((plan.run, other), **told)
    assert rows is None and "the worker would measure something else" in error
    assert "data.pets" in error and "'other pixels'" in error


# --- 22: a reader that leaves ---------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [("list",), ("list", "--json"), ("--help",), ("run", "--help"), ("run", "cop")],
    ids=" ".join,
)
@pytest.mark.parametrize("both", [False, True])
def test_case_22_a_pipe_that_closes_is_no_error(tmp_path, words, both):
    reader, writer = os.pipe()
    os.close(reader)  # whoever would have read has left
    done = subprocess.run(
        [sys.executable, "-m", "promptkit", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=writer,
        stderr=writer if both else subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    expected = 2 if words == ("run", "cop") and not both else 141
    assert done.returncode == expected
    if not both and expected == 141:
        assert done.stderr == ""


# --- 25: real data with real weights --------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "data", "model", "chosen", "said"),
    [
        (None, "eurosat", "ViT-B-16", "full", "profile full: eurosat and ViT-B-16"),
        (None, "pets,dtd", "ViT-B-32", "full", "profile full: dtd and ViT-B-32"),
        (None, "./photos", "ViT-B-16", "full", "profile full: ./photos"),
        (None, "imagenet_a", "ViT-B-16", "full", "profile full: imagenet_a"),
        (None, "pets", "ViT-B-16", "mini", ""),
        (None, "objects-words,mini-v2", "ViT-B-16", "mini", ""),
        (None, "eurosat", None, "mini", ""),
        (None, "eurosat", "mini-teacher", "mini", ""),
        (None, None, "ViT-B-16", "mini", ""),
        ("mini", "eurosat", "ViT-B-16", "mini", "Warning: the profile mini shortens"),
        ("mini", "pets", "ViT-B-16", "mini", ""),
        ("smoke", "eurosat", "ViT-B-16", "smoke", ""),
        ("full", "eurosat", "ViT-B-16", "full", ""),
    ],
)
def test_case_25_the_papers_recipe_where_all_is_real(
    capsys, profile, data, model, chosen, said
):
    assert values.choose_profile(profile, data, model) == chosen
    shown = capsys.readouterr().err
    assert said in shown and bool(said) == bool(shown)


def test_case_25_the_run_says_so(world, monkeypatch):  # noqa: F811
    from promptkit import data

    monkeypatch.setattr(data, "load_dataset", lambda name, root=None: toy(name))
    weights = ("--model", "ViT-B-16", "--pretrained", "no_such_tag")
    _, said = promptkit("run", "coop", "--data", "eurosat", *weights, code=2)
    assert "profile full: eurosat and ViT-B-16 are real" in said


# --- new commands ---------------------------------------------------------------------


def test_weights_options_are_passed_on_where_they_are_given(photos, monkeypatch):
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return tiny()

    monkeypatch.setattr(clip_module, "load_clip", load)
    words = ("predict", photos / "a.png", "--classes", "a,b", "--model", "ViT-B-32")
    promptkit(*words, "--pretrained", "epoch_1.pt", "--like", "openai", "--quickgelu")
    promptkit(*words, "--pretrained", "openai")
    promptkit(*words, "--pretrained", "epoch_1.pt", "--no-quickgelu")
    assert asked == [
        (("ViT-B-32", "epoch_1.pt", None), {"like": "openai", "quickgelu": True}),
        (("ViT-B-32", "openai", None), {}),
        (("ViT-B-32", "epoch_1.pt", None), {"quickgelu": False}),
    ]


def test_a_real_process_stays_silent_where_all_is_well(tmp_path):
    done = process("list", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert {row["name"] for row in json.loads(done.stdout)} == set(methods())


def test_evaluate_with_what_is_set_at_test_time(photos, world):  # noqa: F811
    """Of a saved method what training does not depend on may be set anew; the rows say
    so, and anything else is refused.
    """
    spec, quick = "weak_detectors(coop)", (*QUICK[:2], "--set", "epochs=1")
    promptkit("run", spec, "--data", "pets", *quick, "--save", "w.safetensors")
    test = ("evaluate", "w.safetensors", "--data", "pets", "--json")
    given = ("--set", "detector=constant", "--set", "sharpness=0.0")
    rows = [json.loads(promptkit(*test, *more)[0])[0] for more in ((), given)]
    assert "sharpness" not in rows[0]["options"]
    assert rows[1]["options"] == (
        "checkpoint=w.safetensors, detector=constant, sharpness=0.0"
    )
    _, said = promptkit(*test, "--set", "epochs=2", code=2)
    assert "epochs of weak_detectors(coop) cannot be changed after training" in said


def test_evaluate_and_export(photos, world):  # noqa: F811
    """A file that run --save wrote: tested again to the same number, and exported."""
    pytest.importorskip("onnxruntime")
    import onnxruntime

    out, _ = promptkit(
        "run", "coop", "--data", "pets", *QUICK, "--save", "a.safetensors"
    )
    (record,) = [json.loads(p.read_text()) for p in world.glob("results/*/*.json")]
    out, _ = promptkit("evaluate", "a.safetensors", "--data", "pets", "--json")
    (row,) = json.loads(out)
    assert row["value"] == pytest.approx(record["rows"][0]["value"], abs=1e-9)
    out, _ = promptkit(
        "evaluate", "a.safetensors", "--data", "pets,cars", "--protocol", "base-to-new"
    )
    assert out.count("base") == out.count("new") == out.count("hm") == 2
    promptkit("export", "a.safetensors", "a.onnx")
    session = onnxruntime.InferenceSession("a.onnx")
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    (logits,) = session.run(None, {"images": image.numpy()})
    method = registry.load_method("a.safetensors", tiny())
    torch.testing.assert_close(
        torch.tensor(logits), method.logits(image), atol=1e-4, rtol=1e-4
    )
    _, said = promptkit("export", "a.safetensors", "a.bin", code=2)
    assert ".onnx or .pt2" in said and not Path("a.bin").exists()
    _, said = promptkit("evaluate", "none.safetensors", "--data", "pets", code=2)
    assert "none.safetensors" in said


@pytest.mark.parametrize("profile, main", [("mini", "mini"), ("full", "imagenet")])
def test_the_source_of_transfers_and_its_targets(profile, main, tmp_path):
    where = {"output": str(tmp_path)}
    chapter = Chapter("03_coop", profile, **where)
    assert chapter.main == main
    assert chapter.others == chapter.tasks[1:] and len(chapter.others) == 10
    some = Chapter("03_coop", profile, chapter.tasks[2:4], **where)
    assert some.others == some.tasks
