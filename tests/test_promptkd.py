"""PromptKD: what its paper's rules say of the student, its teacher and their loss."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit import runs
from promptkit.chapter import Chapter
from promptkit.data import base_new, transform
from promptkit.errors import InputError
from promptkit.export import Deployed, export_program
from promptkit.method import Batch
from promptkit.methods.promptkd import as_seen_by, divergence
from promptkit.recipe import PROTOCOLS, Recipe, Setting
from promptkit.registry import build, from_official, load_official, recipe
from promptkit.runs import Run, plan
from promptkit.testing import NAMES, PROMISES, tiny_clip, toy_dataset
from promptkit.train import accuracy, fit, visible

QUICK = Recipe(epochs=3, batch_size=8, lr=0.002, augment=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def made(clip, names=NAMES, **options):
    """A student of a PromptSRC on another CLIP."""
    teacher = build("promptsrc", tiny_clip(seed=5), names, templates=["a {}."])
    return build("promptkd", clip, names, **{"teacher": teacher} | options)


def batch_of(clip, dataset):
    return Batch(images=transform(clip, dataset.train.images()))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promises(promise, tiny_clip, tmp_path):
    promise("promptkd", tiny_clip, tmp_path)


def test_the_loss_is_the_divergence_over_all_of_batch_and_classes(tiny_clip, dataset):
    """T^2 KL, summed by hand, / (B C); equal predictions cost nothing."""
    method = made(tiny_clip, weight=7.0, temperature=2.0).train()
    batch = batch_of(tiny_clip, dataset)
    loss = method.loss(batch).item()
    image, text = method.features(batch)
    p = (method.teacher.logits(batch) / 2).softmax(-1)
    q = (method.score(image, text) / 2).softmax(-1)
    total = sum(
        p[b, c] * (p[b, c].log() - q[b, c].log())
        for b in range(len(p))
        for c in range(len(NAMES))
    )
    assert loss == pytest.approx(7 * 4 * total.item() / p.numel(), rel=1e-4)
    assert divergence(p.log(), p.log() + 3).item() == pytest.approx(0, abs=1e-6)


def test_the_classifier_is_the_teachers(tiny_clip, dataset):
    """Of base or new classes too: its rows, and no image seen by the teacher."""
    method = made(tiny_clip).eval()
    batch = batch_of(tiny_clip, dataset)
    logits = method.logits(batch)
    method.teacher.image_features = lambda *a: pytest.fail("the teacher saw an image")
    image = F.normalize(method.encode(batch), dim=-1)
    w = F.normalize(method.teacher.text_features(), dim=-1)
    torch.testing.assert_close(logits, (100 * image @ w.T).detach())
    for part, rows in zip(base_new(dataset), (slice(0, 3), slice(3, 5)), strict=True):
        method.aim(part)
        torch.testing.assert_close(
            method.logits(batch), logits[:, rows], rtol=0, atol=1e-3
        )


def test_the_teacher_is_asked_once_and_learns_nothing(tiny_clip, dataset):
    """Without augmentation, of each image; with it, of each batch."""
    kept = made(tiny_clip, weight=1.0)
    before = {name: p.clone() for name, p in kept.teacher.state_dict().items()}
    asked, ask = [], kept._ask
    kept._ask = lambda images: asked.append(len(images)) or ask(images)
    history = fit(kept, dataset, QUICK, progress=False)
    assert sum(asked) == len(dataset.train) and history.losses[-1] < history.losses[0]
    after = kept.teacher.state_dict()
    assert all(torch.equal(before[name], p) for name, p in after.items())
    assert kept._known is None
    batch = batch_of(tiny_clip, dataset)
    expected = kept.teacher.logits(batch)
    asked.clear()
    torch.testing.assert_close(kept.target(batch), expected)
    kept.target(batch)
    assert asked == [len(batch)]
    kept.set_classes(NAMES[:2])
    assert kept.target(batch).shape == (len(batch), 2)


def test_no_label_is_read(tiny_clip, dataset):
    """Wrong labels change no bit of a run."""
    wrong = replace(
        dataset, train=dataset.train.take(range(20), torch.zeros(20).long())
    )
    losses = []
    for data in (dataset, wrong):
        losses.append(fit(made(tiny_clip), data, QUICK, progress=False).losses)
    assert losses[0] == losses[1]


def test_ablations(tiny_clip, dataset):
    batch = batch_of(tiny_clip, dataset)
    head = made(tiny_clip, depth_vision=0, layers=1)
    names = [name for name, p in head.named_parameters() if p.requires_grad]
    assert names == ["project.0.weight", "project.0.bias"]
    frozen = tiny_clip.encode_image(batch.images)
    torch.testing.assert_close(head.image_features(batch.images), frozen)
    options = {"prompt_depth_vision": 0, "n_ctx_vision": 4}  # of no prompts
    published = from_official(
        "promptkd", tiny_clip, NAMES, options, teacher=head.teacher
    )
    assert not published.vision
    assert len(made(tiny_clip, layers=3).project) == 7
    for distil, power in (("l1", 1), ("mse", 2)):
        method = made(tiny_clip, distil=distil, weight=3.0).eval()
        u = F.normalize(method.encode(batch), dim=-1)
        v = F.normalize(method.teacher.image_features(batch.images), dim=-1)
        expected = 3 * ((u - v).abs() ** power).mean()
        torch.testing.assert_close(method.loss(batch), expected)


def test_what_does_not_fit(tiny_clip, dataset):
    for option, value in (
        ("weight", -1.0), ("temperature", 0.0), ("layers", 0), ("n_ctx_vision", 0),
        ("depth_vision", 99),
    ):  # fmt: skip
        with pytest.raises(InputError, match=option.removesuffix("_vision")):
            made(tiny_clip, **{option: value})
    with pytest.raises(InputError, match="of cocoop depend on the image"):
        made(tiny_clip, teacher=build("cocoop", tiny_clip, NAMES))
    one = Batch(images=batch_of(tiny_clip, dataset).images[:1])
    with pytest.raises(InputError, match="cannot train on one image"):
        made(tiny_clip).train().loss(one)


def test_images_of_another_size(tiny_clip):
    """A larger image is cut where the teacher's patches end, as a convolution would."""
    images = torch.randn(2, 3, 36, 36)
    assert torch.equal(as_seen_by(tiny_clip, images, tiny_clip), images[..., :32, :32])
    assert as_seen_by(tiny_clip, torch.randn(2, 3, 48, 48), tiny_clip).shape[-1] == 32
    bright = torch.full((1, 3, 32, 32), 0.25)
    other = tiny_clip.__class__(tiny_clip.model, mean=(0, 0, 0), std=(1, 1, 1))
    seen = as_seen_by(tiny_clip, bright, other)
    torch.testing.assert_close(seen, tiny_clip.normalize(bright))


def test_a_checkpoint_of_its_own_repository(tiny_clip, dataset, tmp_path):
    """Convolutions, statistics and all; the teacher stays what it is."""
    method, other = made(tiny_clip), build("promptkd", tiny_clip, NAMES, seed=7,
        teacher=build("coop", tiny_clip, NAMES))  # fmt: skip
    fit(method, dataset, QUICK, progress=False)
    state = {
        key: method.state_dict()[ours]
        for key, ours in method.official_names().items()
        if not key.startswith("teacher.")
    }
    for key in ("conv1.0.weight", "conv1.3.weight"):
        state[f"VPT_image_trans.{key}"] = state[f"VPT_image_trans.{key}"][
            ..., None, None
        ]
    state["VPT_image_trans.conv1.1.num_batches_tracked"] = torch.tensor(9)
    torch.save({"state_dict": state, "epoch": 20}, tmp_path / "model.pth.tar-20")
    teacher = method.teacher
    loaded = load_official(
        tmp_path / "model.pth.tar-20", "promptkd", tiny_clip, NAMES, teacher=teacher
    )
    batch = batch_of(tiny_clip, dataset)
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    assert not torch.equal(other.logits(batch), method.logits(batch))


@pytest.mark.parametrize("spec", ["clip", "coop", "maple", "dept(coop)"])
def test_any_method_with_one_feature_a_class_can_teach(tiny_clip, dataset, spec):
    method = made(tiny_clip, teacher=build(spec, tiny_clip, NAMES), weight=1.0)
    history = fit(method, dataset, QUICK, progress=False)
    assert history.losses[-1] < history.losses[0]
    batch = batch_of(tiny_clip, dataset)
    torch.testing.assert_close(method.target(batch), method.teacher.logits(batch))
    expected = method.logits(batch)
    for network in (Deployed(method), export_program(method).module()):
        torch.testing.assert_close(
            network(batch.images), expected, rtol=1e-4, atol=1e-3
        )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_recipes(protocol):
    full = recipe("promptkd", Setting(protocol, "dtd", profile="full"))
    mini = recipe("promptkd", Setting(protocol, "textures"))
    assert (full.epochs, full.batch_size, full.lr) == (20, 8, 0.005)
    teacher = full.objects["teacher"]
    assert teacher["method"] == "promptsrc@ViT-L-14/openai"
    assert mini.objects["teacher"]["method"] == "promptsrc@mini-teacher"
    across = protocol not in ("base-to-new", "few-shot")
    expected = {"depth_vision": 3} if across else {"weight": 200.0}
    assert full.hparams == expected and ("depth" in teacher) == across


def test_a_run_of_base_to_new_teaches_on_base_and_learns_on_all(
    tiny_clip, dataset, monkeypatch
):
    monkeypatch.setattr("promptkit.runs._clip", lambda *a: tiny_clip)
    planned = plan(Run("base-to-new", "promptkd", dataset, shots=2, clip=tiny_clip))
    assert len(planned.training_set().classnames) == len(NAMES)
    teacher = planned.objects["teacher"]
    assert len(teacher.training_set().classnames) == 3
    assert len(teacher.training_set().train) == 6 and planned.config["shots"] == 0


def test_a_chapter_has_the_teacher_trained_before_the_student(tmp_path):
    """What is trained before a reader's eyes learns from the teacher that a run has."""
    chapter = Chapter("99_test", "smoke", ["sat"], output=str(tmp_path), workers=1)
    done = chapter.train("promptkd", "sat", epochs=1)
    planned = plan(Run("base-to-new", "promptkd", "sat", profile="smoke"))
    fresh = planned.objects["teacher"].build(done.training).state_dict()
    taught = done.method.teacher.state_dict()
    learned = [key for key, p in done.method.teacher.named_parameters()]
    assert any(not torch.equal(fresh[key], taught[key]) for key in learned)


def test_a_transfer_has_a_student_for_each_target(tiny_clip, monkeypatch, tmp_path):
    """The teacher learns on the source, each student on its target's own images."""
    monkeypatch.setattr("promptkit.runs._clip", lambda *a: tiny_clip)
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    source, one, two = (
        replace(toy_dataset(tiny_clip, shots=n), name=f"toy{n}") for n in (2, 3, 4)
    )
    bare = replace(two, name="bare", train=two.train.take([]), val=two.val.take([]))
    monkeypatch.setattr(runs, "_shifts", lambda *a: [bare])
    trainings, fitted = [], runs.fit

    def fit_(method, dataset, *args, **more):
        seen = visible(method, dataset).train
        trainings.append((method, dataset.name, len(seen), int(seen.labels.min())))
        return fitted(method, dataset, *args, **more)

    monkeypatch.setattr(runs, "fit", fit_)
    options = {"shots": 2, "clip": tiny_clip, "max_steps": 2}
    options["overrides"] = {"depth_vision": 1}
    across = Run("cross-dataset", "promptkd", source, (one, two), **options)
    rows = runs.execute(across)
    assert rows["target"].tolist() == ["toy3", "toy4"]
    assert set(rows["dataset"]) == {"toy2"}
    taught = [(name, images, label) for _, name, images, label in trainings]
    n = len(NAMES)
    assert taught == [("toy2", 2 * n, 0), ("toy3", 3 * n, -1), ("toy4", 4 * n, -1)]
    teacher, first, second = (method for method, *_ in trainings)
    assert first.teacher.trained_on == teacher.trained_on and first is not second
    student = build("promptkd", tiny_clip, NAMES, teacher=first.teacher, depth_vision=1)
    fitted(student, one, plan(across).recipe, seed=0, max_steps=2, progress=False)
    assert rows["value"][0] == pytest.approx(accuracy(student, one.test))

    shifted = runs.execute(
        replace(across, protocol="domain-generalization", targets=())
    )
    assert shifted["target"].tolist() == ["bare"]
    assert len(trainings) == 4  # the teacher is the same one
    assert trainings[-1][1:] == ("bare", len(bare.test), -1)
    with pytest.raises(InputError, match="a student for each target"):
        runs.execute(across, save=tmp_path / "student.safetensors")
    assert "a student learns on each target's images" in plan(across).describe()["data"]
    images = f"{7 * n} images without labels"
    assert images in plan(across).describe()["pool"]
    few = plan(replace(across, protocol="few-shot", targets=()))
    assert few.students == [] and plan(across).students[0].source is one
