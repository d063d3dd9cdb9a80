"""Tip-Adapter's own statements, and those of its fine-tuned form."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import transform
from promptkit.errors import InputError
from promptkit.export import export_program
from promptkit.method import Batch
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES
from promptkit.train import fit

BOTH = ("tip_adapter", "tip_adapter_f")
QUICK = Recipe(
    epochs=3, batch_size=8, optimizer="adamw", lr=1e-3, warmup_epochs=0, augment=False
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def features(clip, split):
    return clip.encode_image(transform(clip, split.images()))


def trained(spec, clip, dataset, plan=QUICK, **options):
    method = build(spec, clip, dataset.classnames, **options)
    method.aim(dataset)
    fit(method, dataset, plan, progress=False)
    return method


@pytest.mark.parametrize("size", [None, 3])
def test_the_cache_sums_over_the_images_of_each_class(tiny_clip, dataset, size):
    method = trained(
        "tip_adapter", tiny_clip, dataset, search=False, alpha=2.0, beta=3.0,
        cache_size=size,
    )  # fmt: skip
    raw = features(tiny_clip, dataset.train).view(len(NAMES), 4, -1)
    if size:  # four images in three groups
        raw = torch.stack([raw[:, :2].mean(1), raw[:, 2], raw[:, 3]], dim=1)
    keys = F.normalize(raw, dim=-1)  # (C, K, E)
    image = features(tiny_clip, dataset.test)
    f = F.normalize(image, dim=-1)
    affinity = torch.einsum("be,cke->bck", f, keys)
    expected = 2 * (-3 * (1 - affinity)).exp().sum(-1)
    plain = build("clip", tiny_clip, NAMES, template=dataset.template)
    batch = Batch(features=image)
    torch.testing.assert_close(method.logits(batch), plain.logits(batch) + expected)


def test_without_weight_and_for_new_classes_it_is_zero_shot(tiny_clip, dataset):
    free = trained("tip_adapter", tiny_clip, dataset, alpha=0.0, search=False)
    method = trained("tip_adapter", tiny_clip, dataset, alpha=3.0, search=False)
    plain = build("clip", tiny_clip, NAMES, template=dataset.template)
    batch = Batch(features=features(tiny_clip, dataset.test))
    assert torch.equal(free.logits(batch), plain.logits(batch))
    before = method.logits(batch)
    assert not torch.allclose(before, plain.logits(batch))
    for names in (["teapot", "sea lion"], ["pug", "teapot"]):  # one of them is known
        method.set_classes(names)
        plain.set_classes(names)
        assert torch.equal(method.logits(batch), plain.logits(batch))
    method.set_classes(["pug", "red square"])
    torch.testing.assert_close(method.logits(batch), before[:, [4, 0]])


def test_passes_are_averaged_before_they_are_normalised(tiny_clip, dataset):
    plan = Recipe(epochs=0, crop=(0.5, 1.0))
    generator = torch.Generator().manual_seed(3)
    method = build("tip_adapter", tiny_clip, NAMES, passes=3)
    method.prepare(dataset, plan, generator, 0)
    generator.manual_seed(3)
    images = dataset.train.images()
    passes = [
        tiny_clip.encode_image(
            transform(tiny_clip, images, True, generator, crop=(0.5, 1.0))
        )
        for _ in range(3)
    ]
    mean = F.normalize(torch.stack(passes).mean(0), dim=-1)
    torch.testing.assert_close(method.keys, mean)
    assert not torch.allclose(passes[0], passes[1])


def test_the_search_takes_the_first_best_pair_on_validation_images(tiny_clip, dataset):
    options = {"search_scale": [9.1, 4.1], "search_step": [5, 4]}
    method = trained("tip_adapter", tiny_clip, dataset, **options)
    image, labels = features(tiny_clip, dataset.val), dataset.val.labels
    plain = build("clip", tiny_clip, NAMES, template=dataset.template)
    logits = plain.logits(Batch(features=image))
    best = (0.0, None)
    for beta in (0.1, 1.9, 3.7, 5.5, 7.3):
        for alpha in (0.1, 1.1, 2.1, 3.1):
            cache = (-beta * (1 - method.affinity(image))).exp() @ method.values
            hits = ((logits + alpha * cache).argmax(-1) == labels).double().mean()
            if hits > best[0]:
                best = (hits, (beta, alpha))
    chosen = (method.beta.item(), method.alpha.item())
    assert chosen == pytest.approx(best[1])
    found, *_ = method.accuracies(image, labels)
    assert found.shape == (5, 4) and found.max().item() == pytest.approx(100 * best[0])


@pytest.mark.parametrize("spec", BOTH)
def test_nothing_is_chosen_on_test_images(spec, tiny_clip, dataset):
    """Where the validation images are the test images, the first pair stays."""
    leaking = replace(dataset, val=dataset.test)
    method = trained(spec, tiny_clip, leaking)
    assert (method.alpha.item(), method.beta.item()) == pytest.approx((1.17, 1.0))
    wrong = dataset.val.labels * 0 - 1  # no pair is ever right
    method.choose(features(tiny_clip, dataset.val), wrong)
    assert (method.alpha.item(), method.beta.item()) == pytest.approx((1.17, 1.0))


def test_options_follow_the_dataset(tiny_clip, dataset):
    method = build("tip_adapter", tiny_clip, NAMES)
    for name, alpha, scale in (("dtd", 2, [13, 13]), ("imagenetv2", 1.17, [7, 3])):
        method.aim(replace(dataset, name=name))
        assert method.option("alpha") == alpha
        assert method.option("search_scale") == scale
        several = isinstance(method.option("template"), list)
        assert several == (name != "dtd")
    given = build("tip_adapter", tiny_clip, NAMES, alpha=0.5)
    given.aim(replace(dataset, name="dtd"))
    assert given.option("alpha") == 0.5


@pytest.mark.parametrize("learn", ["keys", "values", "both"])
def test_fine_tuning_changes_what_learns(tiny_clip, dataset, learn):
    fixed = trained("tip_adapter", tiny_clip, dataset, search=False)
    method = trained("tip_adapter_f", tiny_clip, dataset, search=False, learn=learn)
    names = {name for name, _ in method.named_parameters()}
    assert names == ({"keys", "values"} if learn == "both" else {learn})
    for name in ("keys", "values"):
        same = torch.equal(getattr(method, name), getattr(fixed, name))
        assert same == (name not in names)
    still = replace(QUICK, lr=0.0, weight_decay=0.0)
    same = trained("tip_adapter_f", tiny_clip, dataset, still)
    batch = Batch(features=features(tiny_clip, dataset.test))
    searched = trained("tip_adapter", tiny_clip, dataset)
    assert torch.equal(same.logits(batch), searched.logits(batch))


def test_fine_tuning_keeps_the_epoch_that_validates_best(tiny_clip, dataset):
    method = build("tip_adapter_f", tiny_clip, NAMES)
    method.aim(dataset)
    seen, end_epoch = [], method.end_epoch

    def counted(epoch, plan):
        method.eval()
        hits = method.logits(Batch(features=method.seen[0])).argmax(-1)
        seen.append((int((hits == method.seen[1]).sum()), method.keys.detach().clone()))
        end_epoch(epoch, plan)
        method.train()

    method.end_epoch = counted
    plan = replace(QUICK, epochs=8, lr=0.05)
    fit(method, dataset, plan, progress=False)
    best = max(range(8), key=lambda epoch: seen[epoch][0])  # the first of equal ones
    assert torch.equal(method.keys, seen[best][1])
    assert best < 7 and not torch.equal(method.keys, seen[-1][1])


def test_an_interrupted_fine_tuning_goes_on(tiny_clip, dataset, tmp_path):
    plan = replace(QUICK, epochs=4, lr=0.05)
    whole = trained("tip_adapter_f", tiny_clip, dataset, plan)
    killed = build("tip_adapter_f", tiny_clip, NAMES)
    killed.aim(dataset)
    end_epoch = killed.end_epoch

    def stop(epoch, plan):
        if epoch == 2:
            raise KeyboardInterrupt
        end_epoch(epoch, plan)

    killed.end_epoch, path = stop, tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(killed, dataset, plan, progress=False, checkpoint=path)
    again = build("tip_adapter_f", tiny_clip, NAMES)
    again.aim(dataset)
    fit(again, dataset, plan, progress=False, checkpoint=path)
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("spec", BOTH)
def test_a_cache_of_any_size_is_saved_loaded_and_exported(
    spec, tiny_clip, dataset, tmp_path
):
    method = trained(spec, tiny_clip, dataset)
    assert method.keys.shape == (len(NAMES) * 4, tiny_clip.embed_dim)
    loaded = load_method(method.save(tmp_path / "m.safetensors"), tiny_clip)
    images = transform(tiny_clip, dataset.test.images())
    assert torch.equal(loaded.logits(images), method.logits(images))
    assert loaded.alpha == method.alpha != 1.17
    program = export_program(loaded).module()
    torch.testing.assert_close(
        program(images), method.logits(images), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"passes": 0}, "passes must be at least 1"),
        ({"cache_size": 0}, "cache_size must be at least 1"),
        ({"search_scale": [7.0]}, "search_scale must be two numbers"),
        ({"search_step": [0, 3]}, "search_step must be two numbers"),
        ({"template": []}, "template must be one sentence or more"),
    ],
)
def test_bad_options(tiny_clip, options, message):
    for spec in BOTH:
        with pytest.raises(InputError, match=message):
            build(spec, tiny_clip, NAMES, **options)


def test_recipes():
    free = recipe("tip_adapter", Setting("few-shot", "eurosat", 16, "full"))
    assert free.epochs == 0 and free.augment and free.crop == (0.5, 1.0)
    tuned = recipe("tip_adapter_f", Setting("few-shot", "eurosat", 16, "full"))
    assert (tuned.epochs, tuned.batch_size, tuned.lr) == (100, 256, 1e-3)
    tuned = recipe("tip_adapter_f", Setting("few-shot", "dtd", 16, "full"))
    assert tuned.epochs == 20 and tuned.options == {"eps": 1e-4}
