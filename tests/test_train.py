"""The training loop: schedule, profiles, determinism, resuming, errors, and the hooks
of odd methods.
"""

import math
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from promptkit.data import transform
from promptkit.data.content import ahead
from promptkit.errors import InputError
from promptkit.method import REGISTRY, Batch, Method, register
from promptkit.plugin import Plugin
from promptkit.recipe import Recipe, Setting, for_profile, learning_rate
from promptkit.registry import build, from_official, load_method, recipe
from promptkit.testing import NAMES
from promptkit.train import DivergedError, History, accuracy, fit, shuffled


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


QUICK = Recipe(epochs=4, batch_size=8, lr=0.05, augment=False)


def coop(clip, names=NAMES, seed=0, **hparams):
    return build("coop", clip, names, seed=seed, n_ctx=4, **hparams)


def train(clip, dataset, recipe=QUICK, seed=1, **kwargs):
    method = coop(clip)
    return method, fit(method, dataset, recipe, seed, progress=False, **kwargs)


# --- schedule and recipes -------------------------------------------------------------


# fmt: off
# peak, epochs, {epoch: learning rate}, as the benchmark's own toolbox sets them
TOOLBOX = [
    (0.002, 10, dict(enumerate([
        1e-05, 0.002, 0.0019510565162951536, 0.0018090169943749473,
        0.0015877852522924731, 0.0013090169943749475, 0.001, 0.0006909830056250527,
        0.000412214747707527, 0.00019098300562505268,
    ]))),
    (0.002, 50, {0: 1e-05, 1: 0.002, 2: 0.0019980267284282717, 25: 0.001062790519529313,
                 26: 0.0009999999999999996, 48: 1.7712749271311268e-05,
                 49: 7.88529868552223e-06}),
    (0.0035, 5, dict(enumerate([
        1e-05, 0.0035, 0.0031657797401561582, 0.002290779740156158,
        0.001209220259843842,
    ]))),
]
# fmt: on


@pytest.mark.parametrize("peak, epochs, rates", TOOLBOX)
def test_learning_rates_are_the_toolbox_s(peak, epochs, rates):
    for epoch, rate in rates.items():
        assert learning_rate(Recipe(lr=peak, epochs=epochs), epoch) == pytest.approx(
            rate, rel=1e-12
        )


def test_other_schedules():
    longer = Recipe(lr=1.0, epochs=10, warmup_epochs=3, warmup_lr=0.1)
    assert [learning_rate(longer, e) for e in range(4)] == [0.1, 0.1, 0.1, 1.0]
    assert learning_rate(longer, 8) == pytest.approx(0.5)
    assert (
        learning_rate(Recipe(epochs=1), 0) == 1e-5
    )  # a single epoch is all warm-up, as in the toolbox
    assert learning_rate(Recipe(schedule="constant"), 30) == 0.002
    assert learning_rate(Recipe(), 1, lr=0.013) == 0.013


def test_profiles_change_every_recipe_by_one_rule():
    paper = Recipe(epochs=200)
    assert for_profile(paper, "full") is paper
    assert for_profile(paper, "mini") == replace(paper, augment=False)  # 1,000 steps

    def epochs(epochs, batch_size):
        recipe = Recipe(epochs=epochs, batch_size=batch_size, lr=0.0035)
        mini = for_profile(recipe, "mini")
        assert mini == replace(recipe, epochs=mini.epochs, augment=False)
        return mini.epochs

    assert epochs(100, 128) == 500  # KgCoOp: one step an epoch
    assert epochs(5, 4) == 25  # MaPLe: 200 steps become 1,000
    assert epochs(20, 4) == 25  # PromptSRC: 800 steps do
    assert epochs(10, 1) == 10  # CoCoOp has 1,600
    smoke = for_profile(paper, "smoke")
    assert (smoke.epochs, smoke.epoch_steps) == (2, 1)
    staged = replace(paper, stages=(Recipe(epochs=5, batch_size=4),))
    assert for_profile(staged, "mini").stages[0].epochs == 25


@pytest.mark.parametrize(
    "setting, hparams, epochs",
    [
        (dict(shots=1), {"n_ctx": 16}, 50),
        (dict(shots=2), {"n_ctx": 16}, 100),
        (dict(shots=8), {"n_ctx": 16}, 200),
        (dict(shots=16, dataset="imagenet"), {"n_ctx": 16}, 50),
        (dict(protocol="base-to-new"), {"init": "a photo of a"}, 200),
        (
            dict(protocol="base-to-new", dataset="imagenet"),
            {"init": "a photo of a"},
            50,
        ),
        (
            dict(protocol="cross-dataset", dataset="imagenet"),
            {"init": "a photo of a"},
            50,
        ),
    ],
)
def test_coop_follows_the_paper(setting, hparams, epochs):
    ours = recipe("coop", Setting(**{"dataset": "pets", "profile": "full", **setting}))
    assert (ours.hparams, ours.epochs, ours.batch_size, ours.lr) == (
        hparams,
        epochs,
        32,
        0.002,
    )


def test_recipes_and_settings_refuse_bad_values():
    for bad, named in (
        ({"optimizer": "sgdd"}, "sgd"),
        ({"epochs": -1}, "epochs"),
        ({"lr": math.nan}, "lr"),
    ):
        with pytest.raises(InputError, match=named):
            Recipe(**bad)
    with pytest.raises(InputError, match="few-shot"):
        Setting(protocol="few-shots")
    with pytest.raises(InputError, match="mini"):
        Setting(profile="minni")


def test_incomplete_batches_are_dropped_unless_alone():
    generator = torch.Generator().manual_seed(0)
    batches = list(shuffled(10, 4, generator))
    assert [len(b) for b in batches] == [4, 4]
    assert len(torch.cat(batches).unique()) == 8
    assert [len(b) for b in shuffled(3, 4, generator)] == [3]
    assert [len(b) for b in shuffled(8, 4, generator)] == [4, 4]


# --- fit ------------------------------------------------------------------------------


def test_fit_learns_and_reports(tiny_clip, dataset):
    method, history = train(
        tiny_clip, dataset, Recipe(epochs=30, batch_size=20, lr=0.05, augment=False)
    )
    assert history.steps == 30 and history.losses[-1] < history.losses[0]
    assert history.lrs[:2] == [1e-5, 0.05] and history.seconds > 0
    assert not method.training


def test_same_seed_same_bits(tiny_clip, dataset):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    runs = [train(tiny_clip, dataset, seed=seed) for seed in (1, 1, 2)]
    (a, first), (b, again), (c, other) = runs
    assert first.losses == again.losses != other.losses
    assert torch.equal(a.context.vectors, b.context.vectors)
    assert not torch.equal(a.context.vectors, c.context.vectors)
    assert torch.equal(
        torch.random.get_rng_state(), before
    )  # the global generator plays no part


def test_augmented_training_repeats_too(tiny_clip, dataset):
    augmented = Recipe(epochs=2, batch_size=8, augment=True)
    runs = [train(tiny_clip, dataset, augmented)[1].losses for _ in range(2)]
    assert (
        runs[0]
        == runs[1]
        != train(tiny_clip, dataset, Recipe(epochs=2, batch_size=8, augment=False))[
            1
        ].losses
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_resumes_to_the_same_bits(
    tiny_clip, dataset, tmp_path, monkeypatch, optimizer
):
    ours = Recipe(epochs=4, batch_size=8, lr=0.01, optimizer=optimizer, augment=True)
    whole, history = train(tiny_clip, dataset, ours)
    killed, steps = coop(tiny_clip), []

    def dying(batch):
        steps.append(batch)
        if len(steps) == 6:  # in the third of four epochs of two steps
            raise KeyboardInterrupt
        return Method.backward(killed, batch)

    monkeypatch.setattr(killed, "backward", dying)
    path = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(killed, dataset, ours, 1, progress=False, checkpoint=path)
    assert [p.name for p in path.parent.iterdir()] == [
        "checkpoint.pt"
    ]  # nothing half-written is left behind
    resumed, after = train(tiny_clip, dataset, ours, checkpoint=path)
    assert after.losses == history.losses and after.lrs == history.lrs
    assert torch.equal(resumed.context.vectors, whole.context.vectors)
    finished, again = train(
        tiny_clip, dataset, ours, checkpoint=path
    )  # a finished run only loads
    assert again.losses == history.losses and torch.equal(
        finished.context.vectors, whole.context.vectors
    )


def test_bad_checkpoints_are_refused(tiny_clip, dataset, tmp_path):
    path = tmp_path / "checkpoint.pt"
    train(tiny_clip, dataset, checkpoint=path)
    with pytest.raises(InputError, match="another run"):
        train(tiny_clip, dataset, seed=2, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match="damaged"):
        train(tiny_clip, dataset, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run(tiny_clip, dataset):
    with pytest.raises(
        DivergedError,
        match=(
            r"coop became (nan|inf) at step \d+ \(epoch \d of 4, learning rate"
            r" .*lower lr"
        ),
    ):
        train(
            tiny_clip,
            dataset,
            Recipe(epochs=4, batch_size=8, lr=1e30, warmup_epochs=0, augment=False),
        )
    method = coop(tiny_clip)
    method.loss = lambda batch: method.context.vectors.sum() * math.nan
    before = method.context.vectors.clone()
    with pytest.raises(DivergedError, match="step 1 "):
        fit(method, dataset, QUICK, progress=False)
    assert torch.equal(method.context.vectors, before)


def test_max_steps(tiny_clip, dataset):
    _, history = train(tiny_clip, dataset, max_steps=3)
    assert history.steps == 3 and len(history.lrs) == 2


def test_other_classes_than_the_method_s_are_refused(tiny_clip, dataset):
    with pytest.raises(InputError, match="aims at 2 classes, toy has 5"):
        fit(coop(tiny_clip, NAMES[:2]), dataset, QUICK)
    with pytest.raises(InputError, match="toy has no training images"):
        fit(coop(tiny_clip), replace(dataset, train=dataset.train.take([])), QUICK)


def test_zero_shot_fits_at_once_and_takes_the_dataset_s_template(tiny_clip, dataset):
    method = build("clip", tiny_clip, NAMES[:2])
    method.aim(dataset)
    assert method.option("template") == dataset.template and len(method.classnames) == 5
    assert fit(method, dataset, recipe("clip", Setting()), progress=False) == History()


# --- evaluation -----------------------------------------------------------------------


def test_accuracy_encodes_the_classes_once(tiny_clip, dataset, monkeypatch):
    method, calls = coop(tiny_clip), []
    text = tiny_clip.text
    monkeypatch.setattr(
        tiny_clip, "text", lambda *a, **k: calls.append(1) or text(*a, **k)
    )
    measured = accuracy(method, dataset.test, batch_size=3)
    assert len(calls) == 1
    logits = torch.cat(
        [method(Batch(images=x)) for x in normalised(tiny_clip, dataset.test).split(7)]
    )
    assert measured == pytest.approx(
        100 * (logits.argmax(-1) == dataset.test.labels).double().mean().item()
    )
    calls.clear()
    accuracy(method, dataset.test)
    assert not calls  # nothing changed since
    with torch.no_grad():
        method.context.vectors.add_(1)
    accuracy(method, dataset.test)
    assert len(calls) == 1
    with pytest.raises(InputError, match="no images"):
        accuracy(method, dataset.test.take([]))


def normalised(clip, split):
    return transform(clip, split.images())


# --- methods of every kind fit the loop -----------------------------------------------


@pytest.fixture
def registry():
    """Toy methods registered by a test leave the registry when it ends."""
    known = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(known)


class Shift(Method):
    """A learned shift of the class features: the smallest method that learns."""

    name = "shift"
    official_hyperparameters = {"SCALE": "scale"}

    def __init__(self, clip, classnames, *, scale: float = 1.0):
        super().__init__(clip, classnames)
        self.vector = nn.Parameter(0.01 * torch.randn(clip.embed_dim))
        self.scale = scale

    def text_features(self, image_features=None):
        return super().text_features() + self.scale * self.vector

    def official_names(self):
        return {"prompt_learner.vector": "vector"}

    @classmethod
    def recipe(cls, setting, host=None):
        return Recipe(epochs=7)


def test_gradient_surgery(tiny_clip, dataset):
    class Signed(Shift):
        def backward(self, batch):
            loss = super().backward(batch)
            self.vector.grad.sign_()
            return loss

    method = Signed(tiny_clip, NAMES)
    before = method.vector.detach().clone()
    plain = Recipe(
        epochs=1,
        batch_size=20,
        lr=0.5,
        momentum=0.0,
        weight_decay=0.0,
        warmup_epochs=0,
        augment=False,
    )
    fit(method, dataset, plain, progress=False)
    torch.testing.assert_close(
        (method.vector - before).abs(), torch.full_like(before, 0.5)
    )


def test_averaging_over_epochs_survives_a_resume(tiny_clip, dataset, tmp_path):
    class Averaged(Shift):
        def end_epoch(self, epoch, recipe):
            total = self.training_state.get("sum", 0) + self.vector.detach().clone()
            self.training_state = {"sum": total}
            if epoch == recipe.epochs - 1:
                self.vector.data.copy_(total / recipe.epochs)

    def run(**kwargs):
        torch.manual_seed(0)
        method = Averaged(tiny_clip, NAMES)
        fit(method, dataset, QUICK, progress=False, **kwargs)
        return method.vector.detach()

    class Dying(Averaged):
        def end_epoch(self, epoch, recipe):
            if epoch == 2:
                raise KeyboardInterrupt
            super().end_epoch(epoch, recipe)

    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fit(
            Dying(tiny_clip, NAMES),
            dataset,
            QUICK,
            progress=False,
            checkpoint=tmp_path / "c.pt",
        )
    assert torch.equal(run(checkpoint=tmp_path / "c.pt"), run())


def test_reading_images_and_frozen_features(tiny_clip, dataset):
    class Both(Shift):
        reads = "images+features"

        def loss(self, batch):
            assert batch.images.shape[0] == batch.features.shape[0] == len(batch)
            torch.testing.assert_close(
                self.encode(batch), batch.features, rtol=1e-4, atol=1e-4
            )
            return super().loss(batch)

    fit(Both(tiny_clip, NAMES), dataset, QUICK, progress=False, max_steps=2)


def test_adapting_to_each_image(tiny_clip, dataset):
    class Adapting(Shift):
        reads = "views"

        def views(self, pixels, generator):
            plain = transform(self.clip, pixels)[:, None]
            return plain + 0.1 * torch.randn(
                plain.expand(-1, 4, -1, -1, -1).shape, generator=generator
            )

        def logits(self, batch):
            rows = []
            for views in batch.views:  # (V, 3, H, W)
                self.vector.data.zero_()
                with torch.enable_grad():
                    mean = self(Batch(images=views)).softmax(-1).mean(0)
                    (grad,) = torch.autograd.grad(
                        -(mean * mean.log()).sum(), self.vector
                    )
                self.vector.data.sub_(0.1 * grad)
                rows.append(super().logits(views[:1]))
            return torch.cat(rows)

    method = Adapting(tiny_clip, NAMES)
    assert accuracy(method, dataset.test, seed=3) == accuracy(
        method, dataset.test, seed=3
    )


def test_training_free_methods_only_prepare(tiny_clip, dataset, tmp_path, registry):
    @register
    class Remembering(Method):
        name = "remembering"

        def __init__(self, clip, classnames):
            super().__init__(clip, classnames)
            self.register_buffer("keys", None)

        def prepare(self, dataset, recipe, generator, stage):
            self.keys = self.image_features(
                normalised(self.clip, dataset.train)
            )  # (N, E)
            return dataset

    method = Remembering(tiny_clip, NAMES)
    assert fit(method, dataset, QUICK, progress=False).steps == 0
    assert method.keys.shape == (20, tiny_clip.embed_dim)
    loaded = load_method(method.save(tmp_path / "m.safetensors"), tiny_clip)
    assert torch.equal(loaded.keys, method.keys)


def test_plugins_nest_save_and_scale_their_rates(
    tiny_clip, dataset, tmp_path, registry
):
    @register
    class Head(Plugin):
        name = "head"
        official_hyperparameters = {"WEIGHT": "weight"}

        def __init__(self, clip, classnames, *, host, weight: float = 0.5):
            super().__init__(clip, classnames, host=host)
            self.linear = nn.Linear(clip.embed_dim, len(self.classnames))
            self.weight = weight

        def official_names(self):
            return super().official_names() | {
                f"head.{key}": f"linear.{key}" for key in ("weight", "bias")
            }

        def param_groups(self, recipe):
            own = {"params": list(self.linear.parameters()), "lr": 6.5 * recipe.lr}
            return [*self.host.param_groups(recipe), own]

        def forward(self, batch):
            if self.classnames != self.trained_on:
                return self.host(batch)
            return self.host(batch) + self.weight * self.linear(
                self.encode(batch).float()
            )

    register(Shift)
    method = build(
        "head(head(shift))",
        tiny_clip,
        NAMES,
        weight=0.1,
        host={"weight": 0.2, "host": {"scale": 2.0}},
    )
    assert method.spec == "head(head(shift))" and method.host.host.scale == 2.0
    assert recipe("head(shift)", Setting(profile="full")) == Recipe(
        hparams={"host": {}}, epochs=7
    )
    rates = []
    method.end_epoch = lambda epoch, recipe: rates.append(epoch)
    fit(method, dataset, QUICK, progress=False)
    assert rates == [0, 1, 2, 3]
    batch = Batch(images=normalised(tiny_clip, dataset.test))
    trained = method.logits(batch)
    method.set_classes(["pug", "cat"])
    re_aimed = method.logits(batch)
    loaded = load_method(method.save(tmp_path / "m.safetensors"), tiny_clip)
    assert loaded.host.host.classnames == ["pug", "cat"]
    assert torch.equal(loaded.logits(batch), re_aimed)
    loaded.set_classes(NAMES)
    assert torch.equal(loaded.logits(batch), trained)
    official = from_official(
        "head(shift)", tiny_clip, NAMES, {"WEIGHT": 0.3, "SCALE": 3.0}
    )
    assert (
        official.hparams == {"weight": 0.3, "host": {"scale": 3.0}}
        and official.weight == 0.3
    )
    state = {"vector": torch.ones(tiny_clip.embed_dim), "token_suffix": torch.ones(1)}
    state |= {
        "head.weight": torch.ones(5, tiny_clip.embed_dim),
        "head.bias": torch.zeros(5),
    }
    official.load_official(state)
    assert official.host.vector.sum() == tiny_clip.embed_dim
    with pytest.raises(InputError, match="did you mean 'SCALE'"):
        from_official("head(shift)", tiny_clip, NAMES, {"SCALES": 3.0})
    for bad in (
        "head",
        "shift(shift)",
        "head(shift",
        "head()",
        "head(shfit)",
        "hed(shift)",
    ):
        with pytest.raises(InputError):
            build(bad, tiny_clip, NAMES)
    with pytest.raises(InputError, match="weight"):
        build("head(shift)", tiny_clip, NAMES, weight="heavy")
    with pytest.raises(InputError, match="scale"):
        build("head(shift)", tiny_clip, NAMES, host={"scale": "big"})


def test_batches_are_read_while_the_step_runs():
    """In order, two ahead; what fails to be read fails in its turn."""
    third = threading.Event()

    def read(n):
        if n == 3:
            raise InputError("the third image is damaged")
        if n == 2:
            third.set()
        return n

    batches = ahead(read, range(5))
    assert next(batches) == 0
    assert third.wait(10)  # although nobody asked for it yet
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(InputError, match="third image"):
        next(batches)


def test_crops_do_not_depend_on_what_steps_draw(tiny_clip, dataset):
    """A batch is the same whether or not a method draws noise before it."""

    def watched(noise):
        method, images = build("coop", tiny_clip, NAMES), []
        backward = method.backward

        def step(batch):
            images.append(batch.images.clone())
            if noise:
                torch.rand(3, generator=batch.generator)
            return backward(batch)

        method.backward = step
        fit(method, dataset, replace(QUICK, augment=True, epochs=1), progress=False)
        return images

    seen = [watched(noise) for noise in (False, True)]
    assert len(seen[0]) > 1
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
