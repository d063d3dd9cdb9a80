"""TextRefiner: its cache, its tokens and its loss, by the rules of its paper."""

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import transform
from promptkit.errors import InputError
from promptkit.export import Deployed, export_program
from promptkit.method import Batch
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, recipe
from promptkit.testing import NAMES, PROMISES, tiny_clip
from promptkit.train import fit

QUICK = Recipe(epochs=2, batch_size=8, lr=0.002, augment=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


def made(clip, host="coop", **options):
    if host == "promptkd":
        teacher = build("promptsrc", tiny_clip(seed=5), NAMES, templates=["a {}."])
        options = {"teacher": teacher, "host": {"weight": 30.0}} | options
    return build(f"textrefiner({host})", clip, NAMES, **options)


def batch_of(clip, dataset, n=None):
    images = transform(clip, dataset.train.images())[:n]
    return Batch(images=images, labels=dataset.train.labels[:n])


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promises_over_a_host_with_a_teacher(promise, tiny_clip, tmp_path):
    promise("textrefiner(promptkd)", tiny_clip, tmp_path)


def test_a_step_of_the_cache_slot_by_slot(tiny_clip):
    """Against a loop over the slots; those that are nobody's nearest stay."""
    method = made(tiny_clip, memory=40, momentum=0.7)
    aligned = torch.randn(3, 17, 24, generator=torch.Generator().manual_seed(1))
    before = method.cache.clone()
    method.write(aligned)
    v = aligned.reshape(-1, 24)
    v = v / v.norm(dim=1, keepdim=True)
    cosine = v @ before.T
    slots, kept = cosine.argmax(1).tolist(), 0
    for j, old in enumerate(before):
        mine = [i for i, slot in enumerate(slots) if slot == j]
        share = cosine[:, j].softmax(0)
        new = old if not mine else 0.7 * old
        for i in mine:
            new = new + 0.3 * share[i] / share.max() * v[i]
        torch.testing.assert_close(method.cache[j], new / new.norm())
        kept += not mine
    assert 0 < kept < 40


def test_without_alpha_it_is_its_host_but_for_the_length_of_the_classes(
    tiny_clip, dataset
):
    method, batch = made(tiny_clip, alpha=0.0), batch_of(tiny_clip, dataset)
    host = build("coop", tiny_clip, NAMES)
    torch.testing.assert_close(method.logits(batch), host.logits(batch))
    refined = made(tiny_clip, alpha=0.5)
    t = F.normalize(refined.text_features(), dim=-1)
    scale = refined.refine(t).norm(dim=-1)
    assert (scale - 1).abs().max() > 1e-3
    image = F.normalize(tiny_clip.encode_image(batch.images), dim=-1)
    expected = 100 * image @ refined.refine(t).T
    torch.testing.assert_close(refined.logits(batch), expected.detach())


def test_the_loss_of_labelled_images(tiny_clip, dataset):
    """Its three terms by hand, for the seven tokens of each image together."""
    batch = batch_of(tiny_clip, dataset)
    weights = {"semantic": 0.3, "regularization": 2.0}
    method = made(tiny_clip, **weights).train()
    cache = method.cache.clone()
    loss = method.loss(batch)
    moved, method.cache = method.cache, cache
    image, patches, attention = tiny_clip.image(
        batch.images, tokens=True, attention=True
    )
    t = F.normalize(method.host.text_features(), dim=-1)
    refined = method.refine(t)
    every = torch.cat([image[:, None], patches], 1)
    aligned = method.align(every.reshape(-1, 24)).view(len(image), -1, 24)
    best = attention.argsort(dim=1, descending=True)[:, :5]
    local = [
        torch.stack([z[0], *(z[1 + i] for i in rows), z.mean(0)])
        for z, rows in zip(aligned, best, strict=True)
    ]
    near = 100 * torch.cat(local) @ t.T
    expected = (
        F.cross_entropy(100 * F.normalize(image, dim=-1) @ refined.T, batch.labels)
        + 0.3 * F.cross_entropy(near, batch.labels.repeat_interleave(7))
        + 2.0 * (F.normalize(refined, dim=-1) - t).abs().mean()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(moved, cache)


def test_the_loss_of_a_student_has_no_labels(tiny_clip, dataset):
    """The teacher's prediction of an image is that of each of its tokens."""
    method = made(tiny_clip, "promptkd").train()
    assert method.weights == [0.01, 0.6]
    batch = batch_of(tiny_clip, dataset)
    batch.labels = None
    cache = method.cache.clone()
    loss, terms = method.loss(batch), {}
    method.cache = cache
    image, text = method.features(batch)
    local = method.local(method.aligned(batch), batch.attention)
    t = F.normalize(text, dim=-1)
    p = method.host.teacher.logits(batch).softmax(-1)
    for name, x, w, repeat in (
        ("kd", F.normalize(image, dim=-1), method.refine(t), 1),
        ("local", local.flatten(0, 1), t, 7),
    ):
        q = (100 * x @ w.T).log_softmax(-1)
        r = p.repeat_interleave(repeat, 0)
        terms[name] = 30 * (r * (r.log() - q)).sum() / q.numel()
    drift = (F.normalize(method.refine(t), dim=-1) - t).abs().mean()
    expected = terms["kd"] + terms["local"] / 100 + 0.6 * drift
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("host", ["coop", "maple", "cocoop", "promptkd"])
def test_kept_and_fresh_tokens_agree(tiny_clip, dataset, host):
    """Without augmentation a frozen tower runs once; a prompted one gives all in one
    pass. What is written is there at the next step, and with it the file.
    """
    method = made(tiny_clip, host)
    before = method.cache.clone()
    passes, image = [], tiny_clip.image_tower._images
    tiny_clip.image_tower._images = lambda *a: passes.append(a[-2]) or image(*a)
    try:
        fit(method, dataset, QUICK, progress=False)
    finally:
        del tiny_clip.image_tower._images
    frozen = host in ("coop", "cocoop")
    steps = 2 * QUICK.steps(len(dataset.train))
    assert passes.count(True) == (1 if frozen else steps)
    assert not torch.equal(before, method.cache)
    torch.testing.assert_close(method.cache.norm(dim=1), torch.ones(25))
    if frozen:
        batch = batch_of(tiny_clip, dataset, 4)
        method.train()
        method.encode(batch)
        kept = Batch(
            features=tiny_clip.encode_image(batch.images),
            tokens=batch.tokens[:, 1:],
            attention=batch.attention,
        )
        torch.testing.assert_close(method.aligned(kept), method.aligned(batch))


def test_testing_reads_and_writes_no_tokens(tiny_clip, dataset):
    method = made(tiny_clip, "maple")
    batch, cache = batch_of(tiny_clip, dataset), method.cache.clone()
    method.logits(batch)
    assert batch.tokens is None and torch.equal(method.cache, cache)
    method.eval().loss(batch)
    assert torch.equal(method.cache, cache)


@pytest.mark.parametrize("host", ["coop", "maple", "promptkd"])
def test_it_is_exported_refined(tiny_clip, dataset, host):
    method, batch = made(tiny_clip, host), batch_of(tiny_clip, dataset)
    expected = method.logits(batch)
    program = export_program(method).module()
    for network in (Deployed(method), program):
        torch.testing.assert_close(
            network(batch.images), expected, rtol=1e-4, atol=1e-3
        )


def test_inside_other_plugins(tiny_clip, dataset):
    """The cache is written by whichever loss is outermost; the surer of two classifiers
    may be the refined one.
    """
    batch = batch_of(tiny_clip, dataset)
    for spec in ("dept(textrefiner(coop))", "weak_detectors(textrefiner(maple))"):
        method = build(spec, tiny_clip, NAMES)
        before = method.host.cache.clone()
        fit(method, dataset, QUICK, progress=False)
        assert not torch.equal(before, method.host.cache)
        assert method.logits(batch).isfinite().all()
    alone = build("weak_detectors(textrefiner(coop))", tiny_clip, NAMES,
                  detector="constant", sharpness=1.0)  # fmt: skip
    torch.testing.assert_close(alone.logits(batch), alone.host.logits(batch))


def test_its_own_names(tiny_clip):
    method, other = made(tiny_clip), made(tiny_clip, memory=25)
    state = {
        key: method.state_dict()[ours] for key, ours in method.official_names().items()
    }
    item = state.pop("text_fine_cache")
    state["mid_image_trans.conv1.0.weight"] = method.align[0].weight[..., None, None]
    with pytest.raises(InputError, match="missing: text_fine_cache"):
        other.load_official({"state_dict": dict(state)})
    other.load_official({"state_dict": dict(state), "memory_item": item + 0.5})
    assert torch.equal(other.cache, item + 0.5)
    assert torch.equal(other.align[0].weight, method.align[0].weight)


def test_what_does_not_fit(tiny_clip):
    for name, value in (
        ("memory", 0), ("alpha", -0.1), ("momentum", 1.1), ("top", 0),
        ("semantic", -1.0), ("regularization", -1.0),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            made(tiny_clip, **{name: value})
    with pytest.raises(InputError, match=r"cannot extend dept\(coop\).*score"):
        build("textrefiner(dept(coop))", tiny_clip, NAMES)


def test_recipes():
    setting = Setting("base-to-new", profile="full")
    over = recipe("textrefiner(coop)", setting)
    assert over.hparams == {"host": {"init": "a photo of a"}}
    assert (over.epochs, over.batch_size, over.lr) == (10, 32, 0.002)
    student = recipe("textrefiner(promptkd)", setting)
    assert (student.epochs, student.batch_size, student.lr) == (20, 8, 0.005)
    assert student.objects["teacher"]["method"].startswith("promptsrc@")
    assert recipe("textrefiner(maple)", setting).lr == 0.0035
