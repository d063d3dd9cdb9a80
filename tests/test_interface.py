"""What the interface carries, each hook proved by a method of a few lines."""

import copy
import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from promptkit.clip import FrozenCLIP
from promptkit.data import base_new, few_shot
from promptkit.errors import InputError
from promptkit.method import REGISTRY, Batch, Method, register
from promptkit.plugin import Plugin
from promptkit.prompts import Context
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, load_method, recipe, specs, supervision
from promptkit.runs import Run, execute, plan
from promptkit.testing import (
    NAMES,
    PROMISES,
    described,
    saves_and_loads,
    tiny_clip,
)
from promptkit.towers import Edits, Replace
from promptkit.train import accuracy, fit, visible

QUICK = Recipe(epochs=3, batch_size=8, lr=0.05, augment=False)


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """Caches of its own, and a registry that forgets the methods of a test."""
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))
    build("clip", tiny_clip(), NAMES)  # all others are registered by now
    kept = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(kept)


# --- a trained head over frozen features (CLIP-Adapter, CoPrompt) ---------------------


class Adapter(Method):
    name, kind = "adapter", "adapter"

    def __init__(self, clip, classnames, *, share: float = 0.5):
        super().__init__(clip, classnames)
        self.share = share
        self.up = nn.Linear(clip.embed_dim, clip.embed_dim)

    def adapt(self, features):
        return self.share * self.up(features) + (1 - self.share) * features

    @classmethod
    def recipe(cls, setting):
        return replace(QUICK, hparams={"share": 0.5})


def test_a_head_over_frozen_features_reads_cached_and_fresh_ones(tiny_clip, dataset):
    register(Adapter)
    method = build("adapter", tiny_clip, NAMES)
    history = fit(method, dataset, QUICK, progress=False)
    assert history.losses[-1] < history.losses[0]
    images = tiny_clip.normalize(dataset.test.images().float() / 255)
    fresh = Batch(images=images)
    cached = Batch(features=tiny_clip.encode_image(images))
    torch.testing.assert_close(method.logits(fresh), method.logits(cached))
    plain = build("clip", tiny_clip, NAMES, template="a photo of a {}.")
    assert not torch.allclose(method.logits(fresh), plain.logits(fresh))


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_a_new_method_keeps_the_promises(promise, tiny_clip, tmp_path):
    register(Adapter)
    promise("adapter", tiny_clip, tmp_path)


# --- an unlabelled pool (UPL, PromptKD) -----------------------------------------------


class Pool(Method):
    """CoOp on pseudo-labels: those of its own first predictions."""

    name, supervision = "pool", "pool"

    def __init__(self, clip, classnames):
        super().__init__(clip, classnames)
        self.context = Context(clip, self.classnames, length=2)

    def prepare(self, dataset, recipe, generator, stage):
        self.seen = dataset
        pool = dataset.unlabelled
        images = self.clip.normalize(pool.images().float() / 255)
        labels = self.logits(Batch(images=images)).argmax(dim=-1).cpu()
        return replace(dataset, train=pool.take(range(len(pool)), labels))

    @classmethod
    def recipe(cls, setting):
        return QUICK


def test_a_pool_learner_never_sees_a_label(tiny_clip, dataset):
    register(Pool)
    assert supervision("pool") == {"pool"}
    method = build("pool", tiny_clip, NAMES)
    fit(method, dataset, QUICK, progress=False)
    for split in (method.seen.train, method.seen.unlabelled):
        assert set(split.labels.tolist()) == {-1} and len(split) == len(dataset.train)
    assert len(method.seen.test) == len(method.seen.val) == 0


def test_a_pool_learner_trains_on_all_images_and_all_classes(tiny_clip, dataset):
    register(Pool)
    planned = plan(Run("base-to-new", "pool", dataset, shots=1, clip=tiny_clip))
    training = planned.training_set()
    assert training.classnames == NAMES and len(training.train) == len(dataset.train)
    assert planned.config["shots"] == 0
    rows = execute(planned, progress=False)
    assert set(rows["split"]) == {"base", "new", "hm"} and set(rows["shots"]) == {0}


def test_a_draw_and_a_half_keep_the_whole_pool(dataset):
    base, _ = base_new(few_shot(dataset, 1, 1))
    assert len(base.train) == 3 and len(base.pool) == len(dataset.train)
    assert base.pool_classnames == NAMES and set(base.pool.labels.tolist()) == {-1}


def test_methods_see_no_test_images_and_no_validation_images_that_are(dataset):
    register(Adapter)
    method = build("adapter", tiny_clip(), NAMES)
    assert len(visible(method, dataset).test) == 0
    assert len(visible(method, dataset).val) == len(dataset.val)
    leaking = replace(dataset, val=dataset.test)
    assert len(visible(method, leaking).val) == 0


# --- stages (CasPL, LoGoPrompt) -------------------------------------------------------


class Stages(Method):
    """A shared vector first, then one for each class, which starts from it."""

    name = "stages"

    def __init__(self, clip, classnames):
        super().__init__(clip, classnames)
        self.shared = nn.Parameter(torch.zeros(clip.embed_dim))
        self.own = nn.Parameter(torch.zeros(len(self.classnames), clip.embed_dim))

    def text_features(self, image_features=None):
        return super().text_features() + self.shared + self.own

    def prepare(self, dataset, recipe, generator, stage):
        self.shared.requires_grad_(stage == 0)
        self.own.requires_grad_(stage == 1)
        return dataset

    def finish(self, dataset, recipe, generator):
        self.chosen_on = len(dataset.val)

    @classmethod
    def recipe(cls, setting):
        return replace(QUICK, stages=(replace(QUICK, epochs=2, lr=0.01),))


def test_stages_follow_each_other(tiny_clip, dataset):
    register(Stages)
    method = build("stages", tiny_clip, NAMES)
    ours = recipe("stages", Setting(profile="full"))
    history = fit(method, dataset, ours, progress=False)
    per_epoch = QUICK.steps(len(dataset.train))
    assert history.steps == 5 * per_epoch and len(history.lrs) == 5
    assert history.lrs[1] == 0.05 and history.lrs[4] == 0.01
    assert method.shared.abs().sum() > 0 and method.own.abs().sum() > 0
    assert method.chosen_on == len(dataset.val)
    assert recipe("stages", Setting(profile="mini")).stages[0].epochs == 10


@pytest.mark.parametrize("epochs", [1, 3, 4])
def test_a_killed_stage_resumes_to_the_same_bits(tiny_clip, dataset, tmp_path, epochs):
    register(Stages)
    ours = recipe("stages", Setting(profile="full"))
    whole = build("stages", tiny_clip, NAMES)
    expected = fit(whole, dataset, ours, progress=False)

    killed, seen = build("stages", tiny_clip, NAMES), []

    def end_epoch(epoch, recipe, outer=None):
        seen.append(epoch)
        if len(seen) > epochs:
            raise KeyboardInterrupt

    killed.end_epoch = end_epoch
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(killed, dataset, ours, progress=False, checkpoint=path)
    again = build("stages", tiny_clip, NAMES)
    history = fit(again, dataset, ours, progress=False, checkpoint=path)
    assert history.losses == expected.losses and history.lrs == expected.lrs
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


# --- text alone (ProText) -------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Sentences and the classes that they describe."""

    sentences: list[str]
    labels: torch.Tensor

    def __len__(self):
        return len(self.sentences)

    def texts(self, indices):
        return [self.sentences[i] for i in indices.tolist()]


class FromText(Method):
    """Class features that come to lie at their sentences' features."""

    name, supervision, reads, reads_at_test = "fromtext", "texts", "texts", "features"
    from_dataset = {"said": lambda dataset: dataset.descriptions if dataset else {}}

    def __init__(self, clip, classnames, *, said: dict | None = None):
        super().__init__(clip, classnames)
        self.context = Context(clip, self.classnames, words="a photo of a")

    def prepare(self, dataset, recipe, generator, stage):
        said = self.option("said")
        lacking = [name for name in dataset.classnames if name not in said]
        if lacking:
            raise InputError(f"nothing is said of {lacking[0]!r}")
        pairs = [(t, c) for c, n in enumerate(dataset.classnames) for t in said[n]]
        texts, labels = zip(*pairs, strict=True)
        return replace(dataset, train=Texts(list(texts), torch.tensor(labels)))

    def loss(self, batch):
        goal = F.normalize(self.clip.encode_text(batch.texts), dim=-1)
        ours = F.normalize(self.text_features(), dim=-1)[batch.labels]
        return (1 - (goal * ours).sum(-1)).mean()

    @classmethod
    def recipe(cls, setting):
        return QUICK


def test_a_text_learner_reads_no_image(tiny_clip, dataset, monkeypatch):
    register(FromText)
    said = {n: [f"a {n} on the table", f"{n}, red"] for n in dataset.classnames}
    described = replace(dataset, descriptions=said)
    method = build("fromtext", tiny_clip, NAMES)
    method.aim(described)
    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_clip), "image", lambda *a, **k: pytest.fail("an image"))
        history = fit(method, described, QUICK, progress=False)
    assert history.steps == 3 and history.losses[-1] < history.losses[0]
    assert 0 <= accuracy(method, dataset.test) <= 100
    with pytest.raises(InputError, match="nothing is said"):
        method.aim(dataset)
        fit(method, dataset, QUICK, progress=False)
    given = build("fromtext", tiny_clip, NAMES, said=said)
    given.aim(dataset)  # what was asked for stays
    assert given.option("said") == said


# --- a second backbone (PromptKD, CasPL) ----------------------------------------------


class Student(Method):
    """Learns the teacher's predictions, and keeps its class features."""

    name, supervision = "student", "pool"

    def __init__(self, clip, classnames, *, teacher: Method, weight: float = 1.0):
        super().__init__(clip, classnames)
        self.teacher, self.weight = teacher, weight
        self.project = nn.Linear(clip.embed_dim, teacher.clip.embed_dim)

    def adapt(self, features):
        return self.project(features)

    def text_features(self, image_features=None):
        return self.teacher.class_features().detach()

    def criterion(self, batch, image, text, score=None):
        goal = torch.arange(len(image)) % len(self.classnames)
        return self.weight * F.cross_entropy(self.score(image, text), goal)

    @classmethod
    def recipe(cls, setting):
        return QUICK


def test_a_teacher_travels_with_its_student(tiny_clip, dataset, tmp_path, monkeypatch):
    register(Student)
    other = tiny_clip_of_other_width()
    teacher = build("coop", other, NAMES, n_ctx=2, init="")
    with torch.no_grad():
        teacher.context.vectors.add_(0.1)
    method = build("student", tiny_clip, NAMES, teacher=teacher, weight=2.0)
    assert (
        method.hparams == {"weight": 2.0} and not teacher.context.vectors.requires_grad
    )
    history = fit(method, dataset, replace(QUICK, lr=1e-4), progress=False)
    assert history.losses[-1] < history.losses[0] and not teacher.training
    path = method.save(tmp_path / "student.safetensors")
    monkeypatch.setattr(
        "promptkit.registry.load_clip", lambda name, *a, **k: other
    )  # by name, as recorded
    loaded = load_method(path, tiny_clip)
    batch = Batch(images=tiny_clip.normalize(dataset.test.images().float() / 255))
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    about = json.loads(json.dumps(loaded.describe()))
    assert about["objects"]["teacher"]["clip"]["fingerprint"] == other.fingerprint
    loaded.set_classes(["cat", "dog"])
    assert loaded.teacher.classnames == ["cat", "dog"]
    assert loaded.logits(batch).shape[1] == 2
    with pytest.raises(InputError, match="student needs teacher="):
        build("student", tiny_clip, NAMES)
    with pytest.raises(InputError, match="teacher must be a Method"):
        build("student", tiny_clip, NAMES, teacher="coop")


def test_a_run_trains_its_teacher_once_and_names_it(tiny_clip, dataset, monkeypatch):
    register(Student)
    other, trained = tiny_clip_of_other_width(), []
    monkeypatch.setattr("promptkit.runs._clip", lambda *a: other)
    import promptkit.runs as runs

    def counted(method, *a, fit=runs.fit, **k):
        trained.append(method.spec)
        return fit(method, *a, **k)

    monkeypatch.setattr(runs, "fit", counted)
    asked = {"teacher": "coop@another"}
    options = dict(shots=2, clip=tiny_clip, overrides=asked)
    for seed in (1, 2):
        run = Run("few-shot", "student", dataset, seed=seed, **options)
        execute(run, progress=False)
    assert trained == ["coop", "student", "student"]
    config = plan(run).config
    assert config["objects"]["teacher"]["clip"]["fingerprint"] == other.fingerprint
    with pytest.raises(InputError, match="needs a teacher"):
        plan(replace(run, overrides={}))
    with pytest.raises(InputError, match="METHOD@MODEL"):
        plan(replace(run, overrides={"teacher": "coop"}))


class Over(Plugin):
    """Nothing of its own, over a host that has a teacher."""

    name, hosts = "over", ("student",)

    def score(self, image, text):
        return 2 * super().score(image, text)


def test_a_teacher_of_a_host_is_given_to_the_whole(
    tiny_clip, dataset, tmp_path, monkeypatch
):
    register(Student)
    register(Over)
    other = tiny_clip_of_other_width()
    for model, teacher in (("same", tiny_clip), ("another", other)):
        teacher = build("coop", teacher, NAMES, n_ctx=2, init="")
        asked = {"teacher": teacher, "host": {"weight": 2.0}}
        method = build("over(student)", tiny_clip, NAMES, **asked)
        assert method.host.teacher is teacher and method.host.weight == 2.0
        path = method.save(tmp_path / f"{model}.safetensors")
        monkeypatch.setattr("promptkit.registry.load_clip", lambda name, *a, **k: other)
        loaded = load_method(path, tiny_clip)
        images = tiny_clip.normalize(dataset.test.images().float() / 255)
        assert torch.equal(loaded.logits(images), method.logits(images))
        assert loaded.host.teacher.clip is teacher.clip
    assert not {"student", "over(student)"} & set(specs())
    with pytest.raises(InputError, match="student needs teacher="):
        build("over(student)", tiny_clip, NAMES)


def test_a_run_gives_a_host_its_teacher_with_a_recipe_of_its_own(
    tiny_clip, dataset, monkeypatch
):
    register(Student)
    register(Over)
    monkeypatch.setattr("promptkit.runs._clip", lambda *a: tiny_clip_of_other_width())
    asked = {"teacher": {"method": "coop@another", "lr": 0.07, "n_ctx": 3}}
    run = Run(
        "few-shot", "over(student)", dataset, shots=2, clip=tiny_clip, overrides=asked
    )
    planned = plan(run)
    teacher = planned.objects["teacher"]
    assert teacher.recipe.lr == 0.07 and teacher.config["overrides"]["n_ctx"] == 3
    method = planned.build(planned.training_set())
    assert method.host.teacher.context.vectors.shape[0] == 3
    for key in ("teacher", "weight"):  # a hyperparameter of the host is not the whole's
        with pytest.raises(InputError, match="unknown|METHOD@MODEL"):
            plan(replace(run, overrides=asked | {key: "coop"})).build(dataset)


def tiny_clip_of_other_width():
    import open_clip

    torch.manual_seed(3)
    vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=32)
    text = dict(width=32, heads=2, layers=2)
    model = open_clip.CLIP(embed_dim=40, vision_cfg=vision, text_cfg=text)
    return FrozenCLIP(model, name="another")


class Council(Method):
    """Class features beside how many further backbones it was given, if any."""

    name, supervision = "council", "none"

    def __init__(self, clip, classnames, *, others: list[FrozenCLIP] | None = None):
        super().__init__(clip, classnames)
        self.others = list(others or [])

    @classmethod
    def recipe(cls, setting):
        return replace(QUICK, epochs=0)


def test_further_backbones_may_be_several_or_none(tiny_clip, dataset, monkeypatch):
    register(Council)
    assert "council" in specs() and Council.needs() == []
    asked, other = [], tiny_clip_of_other_width()

    def load(name, pretrained=None, *a, **k):
        asked.append((name, pretrained))
        return other

    monkeypatch.setattr("promptkit.runs._clip", load)
    options = dict(shots=2, clip=tiny_clip)
    alone = plan(Run("few-shot", "council", dataset, **options))
    assert "objects" not in alone.config and alone.build(dataset).others == []
    both = replace(alone.run, overrides={"others": "@one, @two/laion"})
    assert plan(both).build(dataset).others == [other, other]
    assert asked == [("one", None), ("two", "laion")]
    assert plan(both).config["objects"] == {"others": 2 * [other.fingerprint]}
    assert len(execute(both, progress=False)) == 1
    with pytest.raises(InputError, match="others of council are written @MODEL"):
        plan(replace(both, overrides={"others": "@one,coop@two"}))


# --- plug-ins -------------------------------------------------------------------------


class Halved(Method):
    """A host with a hook of its own everywhere in training."""

    name = "halved"

    def __init__(self, clip, classnames):
        super().__init__(clip, classnames)
        self.context = Context(clip, self.classnames, length=2)

    def backward(self, batch, outer=None):
        loss = (outer or self).loss(batch)
        (loss / 2).backward()
        return loss.detach()

    def criterion(self, batch, image, text, score=None):
        return 3 * super().criterion(batch, image, text, score)

    def param_groups(self, recipe):
        return [{"params": [self.context.vectors], "lr": 7.0}]

    @classmethod
    def recipe(cls, setting):
        return QUICK


class Scaled(Plugin):
    name, hosts = "scaled", ("halved", "prograd")

    def __init__(self, clip, classnames, *, host):
        super().__init__(clip, classnames, host=host)
        self.scale = nn.Parameter(torch.ones(()))

    def score(self, image, text):
        return self.scale * super().score(image, text)


def batch_of(clip, dataset):
    images = clip.normalize(dataset.train.images().float() / 255)
    return Batch(
        images=images,
        features=clip.encode_image(images),
        labels=dataset.train.labels,
        generator=torch.Generator().manual_seed(0),
    )


def test_a_host_keeps_its_hooks_inside_a_plugin(tiny_clip, dataset):
    register(Halved)
    register(Scaled)
    host = build("halved", tiny_clip, NAMES)
    method = build("scaled(halved)", tiny_clip, NAMES)
    assert torch.equal(method.host.context.vectors, host.context.vectors)
    batch = batch_of(tiny_clip, dataset)
    assert torch.equal(method.backward(batch), host.backward(batch))
    assert torch.equal(method.host.context.vectors.grad, host.context.vectors.grad)
    assert method.scale.grad is not None  # halved too
    groups = method.param_groups(QUICK)
    assert groups[0]["lr"] == 7.0 and groups[1]["params"] == [method.scale]


def test_dept_over_prograd_trains_with_the_projection(tiny_clip, dataset):
    """The host's projection applies to the gradient of the whole loss."""
    method = build("dept(prograd)", tiny_clip, NAMES, host={"n_ctx": 4, "lam": 1.0})
    free = build("dept(prograd)", tiny_clip, NAMES, host={"n_ctx": 4, "lam": 0.0})
    batch = batch_of(tiny_clip, dataset)
    for part in (method, free):
        part.train().backward(batch)
    vectors = "host.context.vectors"
    with_it = dict(method.named_parameters())[vectors].grad
    without = dict(free.named_parameters())[vectors].grad
    loss, domain, general = free.host.gradients(batch, free)
    index = [name for name, _ in free.named_parameters()].index(vectors)
    g_d, g_g = domain[index].flatten(), general[index].flatten()
    direction = g_g / g_g.norm()
    against = min(0.0, float(g_d @ direction))
    torch.testing.assert_close(without.flatten(), g_d)
    torch.testing.assert_close(
        with_it.flatten(), g_d - against * direction, rtol=1e-4, atol=1e-6
    )
    head = dict(method.named_parameters())["classifier.weight"].grad
    assert torch.equal(head, dict(free.named_parameters())["classifier.weight"].grad)


class Boost(Plugin):
    """Frozen tokens behind the host's image prompts, and at a text block (CasPL)."""

    name, hosts = "boost", ("maple",)

    def __init__(self, clip, classnames, *, host):
        super().__init__(clip, classnames, host=host)
        self.register_buffer("token", torch.full((1, clip.vision_width), 0.5))
        self.register_buffer("word", torch.full((1, clip.width), 0.5))

    def image_prompt(self):
        return torch.cat([super().image_prompt(), self.token])

    def text_edit(self):
        return Edits(super().text_edit(), Replace({1: (self.context.start, self.word)}))


def test_a_plugin_extends_what_enters_and_happens_in_the_towers(tiny_clip, dataset):
    register(Boost)
    host = build("maple", tiny_clip, NAMES, depth=2)
    method = build("boost(maple)", tiny_clip, NAMES, host={"depth": 2})
    images = tiny_clip.normalize(dataset.test.images()[:3].float() / 255)
    expected = tiny_clip.image(
        images, torch.cat([host.image_prompt(), method.token]), host.image_edit()
    )
    torch.testing.assert_close(method.image_features(images), expected)
    edit = Edits(host.text_edit(), Replace({1: (host.context.start, method.word)}))
    wanted = tiny_clip.text(host.context.prompt(), edit)[0]
    torch.testing.assert_close(method.text_features(), wanted)
    assert not torch.allclose(method.text_features(), host.text_features())
    with pytest.raises(InputError, match="boost cannot extend clip.*text_features"):
        build("boost(clip)", tiny_clip, NAMES)


class Local(Plugin):
    """Reads the local tokens of the image tower (TextRefiner)."""

    name, hosts = "local", ("coop", "maple")

    def __init__(self, clip, classnames, *, host):
        super().__init__(clip, classnames, host=host)
        self.reads, self.reads_at_test = f"{host.reads}+tokens", host.reads

    def criterion(self, batch, image, text, score=None):
        self.seen = batch.tokens, batch.attention
        return super().criterion(batch, image, text, score)


@pytest.mark.parametrize("host", ["coop", "maple"])
def test_local_tokens_come_from_the_same_pass(tiny_clip, dataset, host, monkeypatch):
    register(Local)
    method = build(f"local({host})", tiny_clip, NAMES)
    passes, image = [], type(tiny_clip).image
    monkeypatch.setattr(
        type(tiny_clip), "image", lambda *a, **k: passes.append(k) or image(*a, **k)
    )
    fit(method, dataset, replace(QUICK, epochs=1), progress=False)
    tokens, attention = method.seen
    patches = tiny_clip.image_tower.length - 1
    assert tokens.shape[1:] == (patches, tiny_clip.embed_dim)
    assert attention.shape == tokens.shape[:2]
    if host == "maple":  # its own tower: one pass a step gives both
        steps = QUICK.steps(len(dataset.train))
        assert len(passes) == steps and all(k["tokens"] for k in passes)


class Deaf(Plugin):
    """Scores by itself and leaves out its host's criterion."""

    name, hosts, replaces = "deaf", ("coop",), ("criterion",)

    def criterion(self, batch, image, text, score=None):
        return F.cross_entropy(self.score(image, text), batch.labels)


def test_a_plugin_that_replaces_a_hook_refuses_a_host_that_has_it(tiny_clip):
    register(Deaf)
    register(Halved)
    build("deaf(coop)", tiny_clip, NAMES)
    with pytest.raises(InputError, match=r"deaf cannot extend halved.*criterion\(\)"):
        build("deaf(halved)", tiny_clip, NAMES)
    with pytest.raises(InputError, match=r"cannot extend dept\(coop\).*score"):
        build("tpt(dept(coop))", tiny_clip, NAMES)


@pytest.mark.parametrize("plugin", ["dept", "tcp", "weak_detectors"])
def test_a_host_with_features_of_its_own_is_refused(tiny_clip, plugin):
    own = {"name": "both", "features": lambda self, batch: pytest.fail("never asked")}
    register(type("Both", (REGISTRY["coop"],), own))
    with pytest.raises(InputError, match=rf"{plugin} cannot extend both.*features"):
        build(f"{plugin}(both)", tiny_clip, NAMES)


@pytest.mark.parametrize("plugin", ["dept", "weak_detectors"])
def test_image_features_that_only_their_own_score_reads_are_refused(tiny_clip, plugin):
    """KAPT's tokens, AWT's views: a plug-in's score would read them as features."""
    for host in ("kapt", "awt"):
        with pytest.raises(InputError, match=rf"{plugin} cannot extend {host}"):
            build(f"{plugin}({host})", tiny_clip, NAMES)


@pytest.mark.parametrize("plugin", ["dept", "weak_detectors"])
@pytest.mark.parametrize("host", ["apex", "coprompt"])
def test_other_image_features_of_a_host_are_passed_on(
    plugin, host, tiny_clip, dataset, tmp_path
):
    method = build(f"{plugin}({host})", tiny_clip, NAMES)
    method.aim(described(dataset))
    batch = batch_of(tiny_clip, dataset)
    theirs = method.host.eval().encode(batch)
    assert torch.equal(method.eval().encode(batch)[:, : theirs.shape[1]], theirs)
    saves_and_loads(f"{plugin}({host})", tiny_clip, tmp_path)


def test_tcp_refuses_a_context_that_words_of_each_class_precede(tiny_clip, dataset):
    method = build("tcp(kapt)", tiny_clip, NAMES)
    with pytest.raises(InputError, match="at the same place for each"):
        method.aim(described(dataset))
        method.text_edit()


def test_a_plugin_over_a_plugin_over_a_context_can_be_tuned(tiny_clip):
    """TPT asks for a context, not for a class (ATPrompt over CoOp)."""

    @register
    class Around(Plugin):
        name = "around"

    method = build("tpt(around(coop))", tiny_clip, NAMES, views=3, host={"host": {}})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert method.logits(images).shape == (2, len(NAMES))


def test_a_plugin_s_recipe_knows_the_innermost_host(tiny_clip):
    @register
    class Around(Plugin):
        name = "around"

    over = recipe("dept(around(maple))", Setting("base-to-new", profile="full"))
    assert (over.lr, over.epochs, over.batch_size) == (0.0035, 10, 4)


def test_plugin_and_host_draw_from_one_stream(tiny_clip):
    """The host starts as it does alone, and the plug-in's values are others."""
    coop = build("coop", tiny_clip, NAMES, seed=5)
    dept = build("dept(coop)", tiny_clip, NAMES, seed=5)
    assert torch.equal(dept.host.context.vectors, coop.context.vectors)
    head = dept.classifier.weight.flatten()[:64]
    same = coop.context.vectors.flatten()[:64]
    ratio = head / same
    assert ratio.std() > 1e-3  # not the same numbers at another scale


# --- faults of the first interface ----------------------------------------------------


def test_training_on_other_classes_makes_the_head_theirs(tiny_clip, dataset):
    base, new = base_new(dataset)
    method = build("dept(coop)", tiny_clip, base.classnames[:2])
    method.aim(new)
    fit(method, new, QUICK, progress=False)
    assert method.trained_on == method.host.trained_on == new.classnames
    assert method.rows.tolist() == [0, 1]  # its head answers for them
    method.aim(base)
    assert method.rows is None
    other = build("dept(coop)", tiny_clip, NAMES)
    other.aim(new)
    with pytest.raises(InputError, match="head .* was made for 5 classes"):
        fit(other, new, QUICK, progress=False)


@pytest.mark.parametrize(
    ("spec", "option"),
    [
        ("clip", "template"),
        ("kgcoop", "template"),
        ("waffleclip", "descriptors"),
        ("promptsrc", "templates"),
        ("tpt", "augmix"),
    ],
)
def test_what_a_dataset_says_is_not_what_was_asked(
    spec, option, tiny_clip, dataset, tmp_path
):
    def named(word, **more):
        said = {name: [f"{word} thing"] for name in NAMES}
        return replace(
            dataset, name=word, template=f"a {word} {{}}.", descriptions=said,
            templates=(f"one {word} {{}}.",), world="mini", **more,
        )  # fmt: skip

    pets, flowers = named("pet"), named("flower", shifts=("v2",))
    method = build(spec, tiny_clip, NAMES)
    asked = copy.deepcopy(method.hparams)
    method.aim(pets)
    said = copy.deepcopy(method.option(option))
    assert method.hparams == asked
    path = method.save(tmp_path / "m.safetensors")
    loaded = load_method(path, tiny_clip)
    assert loaded.option(option) == said and loaded.hparams == asked
    loaded.aim(flowers)
    method.aim(flowers)
    assert loaded.option(option) == method.option(option) != said


def test_text_features_follow_writes_to_data(tiny_clip, dataset):
    method = build("coop", tiny_clip, NAMES, n_ctx=2, init="")
    batch = batch_of(tiny_clip, dataset)
    before = method.logits(batch)
    method.context.vectors.data[:] = 0.3
    after = method.logits(batch)
    assert not torch.allclose(before, after)
    method.context.vectors.data.fill_(0.3)
    assert torch.equal(method.logits(batch), after)


def test_a_method_moves_with_its_clip_and_stays_float32(dataset):
    clip = tiny_clip()
    method = build("cocoop", clip, NAMES)
    images = clip.normalize(dataset.test.images()[:2].float() / 255)
    expected = method.logits(images)
    assert torch.equal(method.to("cpu").logits(images), expected)
    assert torch.equal(method.float().logits(images), expected)
    assert torch.equal(method.eval()(images), expected)  # a Tensor will do
    for change in ("half", "double", "bfloat16"):
        with pytest.raises(InputError, match="precision='bf16'"):
            getattr(method, change)()
    moved = method.to("meta")
    assert moved.clip.device.type == "meta"
    assert copy.deepcopy(method).clip is method.clip


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (list, 3, "sizes must be a list, got 3"),
        (list[int], ["a"], "sizes must be a list, each item a whole number"),
        (dict | None, [1], "sizes must be a dictionary or None"),
    ],
)
def test_annotations_without_parts(hint, value, message, tiny_clip):
    class Listed(Method):
        name = "listed"

        def __init__(self, clip, classnames, *, sizes: hint = None):
            super().__init__(clip, classnames)

    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        Listed(tiny_clip, NAMES, sizes=value)


def test_registration_says_what_is_wrong():
    with pytest.raises(TypeError, match="'size' of Untyped has no annotation"):

        @register
        class Untyped(Method):
            name = "untyped"

            def __init__(self, clip, classnames, *, size=3):
                super().__init__(clip, classnames)

    for fields, message in (
        ({"name": ""}, "needs name = ..., one word"),
        ({"name": "two words"}, "needs name = ..., one word"),
        ({"name": "coop"}, r"'coop' is taken by promptkit.methods.coop.CoOp"),
        ({"name": "x", "reads": "feature"}, "unknown reads of x 'feature'.*'features'"),
        ({"name": "x", "supervision": "shot"}, "unknown supervision of x 'shot'"),
        ({"name": "x", "from_dataset": {"a": len}}, "from_dataset names 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            register(type("Odd", (Method,), fields))
    with pytest.raises(InputError, match="states no recipe"):
        register(type("Silent", (Method,), {"name": "silent"})).recipe(Setting())


def test_published_options_of_a_host_reach_it_through_a_plugin_between():
    register(Local)
    setting = Setting("base-to-new", "sat", profile="full")
    plan = recipe("dept(local(coop))", setting)
    assert plan.hparams == {"host": {"host": {"n_ctx": 16}}}
    assert (plan.lr, plan.batch_size) == (0.0035, 4)
