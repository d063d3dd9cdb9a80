"""What CasPL promises: boosting prompts that are learned once a task and shared, and
stand frozen beside a host's own.
"""

from dataclasses import replace

import open_clip
import pytest
import torch
from torch.nn.functional import kl_div, normalize

from promptkit.clip import FrozenCLIP
from promptkit.data import base_new, few_shot
from promptkit.errors import InputError
from promptkit.export import Deployed
from promptkit.method import Batch
from promptkit.methods.caspl import CasPL
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, from_official, load_method, recipe
from promptkit.runs import Run, execute
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import fit

QUICK = Recipe(epochs=2, batch_size=8, lr=0.05, augment=False)
BOTH = replace(QUICK, stages=(replace(QUICK, epochs=3, lr=0.02),))
SMALL = {"n_text": 3, "n_vision": 2, "init": ""}
HOSTS = {
    "coop": {"n_ctx": 2},
    "cocoop": {"n_ctx": 2, "init": ""},
    "maple": {"n_ctx": 2},
    "promptsrc": {"n_ctx": 2, "n_ctx_vision": 3, "templates": ["a {}."]},
}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PROMPTKIT_RESULTS", str(tmp_path / "results"))


@pytest.fixture(scope="module")
def teacher():
    return larger_clip(32)


def larger_clip(size):
    torch.manual_seed(3)
    vision = dict(layers=2, width=32, head_width=16, patch_size=8, image_size=size)
    text = dict(width=32, heads=2, layers=2)
    model = open_clip.CLIP(embed_dim=40, vision_cfg=vision, text_cfg=text)
    return FrozenCLIP(model, name="teacher")


@pytest.fixture
def dataset(tiny_clip):
    return few_shot(toy_dataset(tiny_clip, shots=8), 4, 1)


def caspl(clip, over=None, teacher=None, names=NAMES, seed=0, **options):
    inner = {"host": HOSTS[over]} if over else {}
    spec = f"caspl({over})" if over else "caspl"
    given = SMALL | inner | options
    return build(spec, clip, names, seed=seed, teacher=teacher, **given)


def boosted(method):
    return [p.detach().clone() for p in method.boosting.parameters()]


def same(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


# --- where they stand -----------------------------------------------------------------


@pytest.mark.parametrize("adapting, boosting", [(1, 2), (2, 1), (2, 2)])
def test_each_set_is_replaced_in_its_own_blocks(tiny_clip, adapting, boosting):
    """Against plain passes over whole sequences."""
    host = {"n_ctx": 2, "depth": adapting}
    method = caspl(tiny_clip, "maple", depth=boosting, host=host)
    model, own, boost = tiny_clip.model, method.host, method.boosting
    a = [own.context.vectors, *own.deep]
    stay = tiny_clip.embed(tiny_clip.encode("of a"))  # of the host's words
    ends = [tiny_clip.encode(f"{name.replace('_', ' ')}.") for name in NAMES]
    for c, end in enumerate(ends):
        ids = (
            [tiny_clip.tokenizer.sot_token_id],
            [*end, tiny_clip.tokenizer.eot_token_id],
        )
        sos, rest = (tiny_clip.embed(part) for part in ids)
        x = torch.cat([sos, a[0], stay, boost.text[0], rest])
        x = x + model.positional_embedding[: len(x)]
        mask = model.attn_mask[: len(x), : len(x)]
        for i, block in enumerate(model.transformer.resblocks):
            if 0 < i < adapting:
                x = torch.cat([x[:1], a[i], x[3:]])
            if 0 < i < boosting:
                x = torch.cat([x[:5], boost.text[i], x[8:]])
            x = block(x[None], attn_mask=mask)[0]
        expected = model.ln_final(x)[-1] @ model.text_projection
        torch.testing.assert_close(
            method.text_features()[c], expected, rtol=1e-3, atol=1e-4
        )
    images, v = torch.randn(2, 3, 32, 32), model.visual
    x = v.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.expand(2, 1, -1), x], 1) + v.positional_embedding
    A = [own.couple, *own.couple_deep]
    n = x.shape[1]
    x = torch.cat([x, *(p.expand(2, -1, -1) for p in (boost.vision[0], A[0](a[0])))], 1)
    x = v.ln_pre(x)
    for i, block in enumerate(v.transformer.resblocks):  # boosting first, as published
        b, c = x[:, n : n + 2], x[:, n + 2 :]
        b = boost.vision[i].expand(2, -1, -1) if 0 < i < boosting else b
        c = A[i](a[i]).expand(2, -1, -1) if 0 < i < adapting else c
        x = block(torch.cat([x[:, :n], b, c], 1))
    expected = v.ln_post(x[:, 0]) @ v.proj
    torch.testing.assert_close(
        method.image_features(images), expected, rtol=1e-3, atol=1e-4
    )


def test_cocoop_shifts_the_adapting_context_alone(tiny_clip):
    method = caspl(tiny_clip, "cocoop", depth=1)
    features = torch.randn(3, tiny_clip.embed_dim)
    prompt = method.text_prompt(features)
    assert prompt.prefix.shape[:2] == (3, 1 + 2 + 3)  # SOS, adapting, boosting
    moved = method.host.context.vectors + method.host.shift(features)[:, None]
    torch.testing.assert_close(prompt.prefix[:, 1:3], moved)
    for own in prompt.prefix[:, 3:]:
        assert torch.equal(own, method.boosting.text[0])


def test_the_first_stage_is_a_divergence_from_the_teacher(tiny_clip, teacher, dataset):
    """At the student's logit scale, the same alone and before a host."""
    options = {"temperature": 2.0, "weight": 3.0, "template": "one {}."}
    method = caspl(tiny_clip, None, teacher, **options)
    images = tiny_clip.normalize(dataset.train.images()[:4].float() / 255)
    names = [name.replace("_", " ") for name in NAMES]
    w = normalize(teacher.encode_text([f"one {name}." for name in names]), dim=-1)
    f = normalize(teacher.encode_image(images), dim=-1)
    theirs = (tiny_clip.logit_scale * f @ w.T / 2).softmax(-1)
    ours = (method.logits(images) / 2).log_softmax(-1)
    expected = 3 * 4 * kl_div(ours, theirs, reduction="sum") / 4
    torch.testing.assert_close(method.loss(Batch(images=images)), expected)
    over = caspl(tiny_clip, "maple", teacher, **options)
    over.boosting.load_state_dict(method.boosting.state_dict())
    over.first, over.pool_names = True, names
    torch.testing.assert_close(over.loss(Batch(images=images)), expected)


def test_words_of_which_fewer_learn_stay_in_the_first_stage(tiny_clip):
    method = caspl(tiny_clip, n_text=2, init="a photo of a", depth=1)
    oracle = tiny_clip.encode_text(
        [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    )
    torch.testing.assert_close(method.text_features(), oracle, rtol=1e-4, atol=1e-5)
    beside = caspl(tiny_clip, "coop", n_text=2, init="a photo of a", depth=1)
    prompt = beside.text_prompt().full()[0, 0]
    words = tiny_clip.embed(tiny_clip.encode("a photo red square."))
    torch.testing.assert_close(prompt[3 : 3 + len(words)], words)


# --- two stages -----------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS)
def test_the_first_stage_is_made_once_for_all_hosts_and_seeds(
    tiny_clip, teacher, dataset, host
):
    alone = caspl(tiny_clip, None, teacher)
    start = boosted(alone)
    first = fit(alone, dataset, QUICK, seed=5, progress=False)
    assert first.steps == 2 * (40 // 8)  # the pool, not the 20 drawn images
    assert not same(start, boosted(alone))
    method = caspl(tiny_clip, host, teacher, seed=7)
    own = [p.detach().clone() for p in method.host.parameters()]
    history = fit(method, dataset, BOTH, seed=2, progress=False)
    assert same(boosted(method), boosted(alone))  # bit by bit, also when averaged
    assert history.steps == 3 * (20 // 8)  # of the second stage alone
    assert not same(own, method.host.parameters())


def test_what_is_found_changes_nothing(tiny_clip, teacher, dataset):
    made, found = (caspl(tiny_clip, "coop", teacher) for _ in range(2))
    whole = fit(made, dataset, BOTH, seed=3, progress=False)
    rest = fit(found, dataset, BOTH, seed=3, progress=False)
    assert whole.steps == 10 + 6 and rest.losses == whole.losses[10:]
    assert same(made.parameters(), found.parameters())
    for change in (
        {"n_vision": 4}, {"template": "a {}"}, {"temperature": 2.0}, {"depth": 1},
    ):  # fmt: skip
        other = caspl(tiny_clip, "coop", teacher, **change)
        assert fit(other, dataset, BOTH, seed=3, progress=False).steps == 16, change
    plan = replace(BOTH, lr=0.04)
    assert fit(found, dataset, plan, seed=3, progress=False).steps == 16


def test_a_first_stage_that_was_cut_is_not_kept(tiny_clip, teacher, dataset):
    for _ in range(2):
        method = caspl(tiny_clip, "coop", teacher)
        assert fit(method, dataset, BOTH, progress=False, max_steps=7).steps == 7
    assert fit(method, dataset, BOTH, progress=False).steps == 16


def test_damaged_boosting_prompts_are_learned_again(
    tiny_clip, teacher, dataset, tmp_path
):
    alone = caspl(tiny_clip, None, teacher)
    fit(alone, dataset, QUICK, progress=False)
    (path,) = (tmp_path / "cache" / "boosting").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    again = caspl(tiny_clip, None, teacher)
    with pytest.warns(UserWarning, match="damaged boosting prompts"):
        fit(again, dataset, QUICK, progress=False)
    assert same(boosted(alone), boosted(again)) and path.read_bytes() == whole


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_killed_run_ends_with_the_same_bits(
    tiny_clip, teacher, dataset, tmp_path, epochs
):
    expected = caspl(tiny_clip, "coop", teacher)
    fit(expected, dataset, BOTH, progress=False)
    for file in (tmp_path / "cache" / "boosting").iterdir():
        file.unlink()
    killed, seen, end_epoch = caspl(tiny_clip, "coop", teacher), [], CasPL.end_epoch

    def stop(*args):
        seen.append(args)
        if len(seen) > epochs:
            raise KeyboardInterrupt
        end_epoch(killed, *args)

    killed.end_epoch = stop
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fit(killed, dataset, BOTH, progress=False, checkpoint=path)
    again = caspl(tiny_clip, "coop", teacher)
    fit(again, dataset, BOTH, progress=False, checkpoint=path)
    assert same(expected.parameters(), again.parameters())


def test_the_first_stage_sees_all_classes_and_no_label(tiny_clip, teacher, dataset):
    base, _ = base_new(dataset)
    method, seen = caspl(tiny_clip, "coop", teacher, names=base.classnames), []
    divergence = method.divergence

    def spy(batch):
        seen.append((batch.labels.tolist(), method.pool_names))
        return divergence(batch)

    method.divergence = spy
    fit(method, base, BOTH, progress=False)
    assert {label for labels, _ in seen for label in labels} == {-1}
    assert all(names == [n.replace("_", " ") for n in NAMES] for _, names in seen)
    assert method.taught == {"pool", "shots"}
    assert caspl(tiny_clip).taught == {"pool"}


def test_the_second_stage_may_go_on_learning_them(tiny_clip, teacher, dataset):
    alone = caspl(tiny_clip, None, teacher)
    fit(alone, dataset, QUICK, progress=False)
    method = caspl(tiny_clip, "maple", teacher, freeze=False)
    fit(method, dataset, BOTH, progress=False)
    assert not same(boosted(alone), boosted(method))


def test_no_epochs_leave_them_as_they_are(tiny_clip, dataset):
    method = caspl(tiny_clip, "coop")
    start = boosted(method)
    fit(method, dataset, replace(BOTH, epochs=0), progress=False)
    assert same(start, boosted(method))
    with pytest.raises(InputError, match=r"caspl\(coop\) learns its .* from a teacher"):
        fit(method, dataset, BOTH, progress=False)
    small = caspl(tiny_clip, "coop", larger_clip(24))
    with pytest.raises(InputError, match="images of 24 pixels and 'tiny' of 32"):
        fit(small, dataset, BOTH, progress=False)


# --- afterwards -----------------------------------------------------------------------


@pytest.mark.parametrize("host", [None, *HOSTS])
def test_it_is_saved_without_its_teacher(tiny_clip, teacher, dataset, host, tmp_path):
    method = caspl(tiny_clip, host, teacher)
    fit(method, dataset, BOTH if host else QUICK, progress=False)
    images = torch.randn(3, 3, 32, 32)
    loaded = load_method(method.save(tmp_path / "m.safetensors"), tiny_clip)
    assert loaded.teacher is None and loaded.spec == method.spec
    assert torch.equal(loaded.logits(images), method.logits(images))
    loaded.set_classes(["teapot", "sea_lion"])
    assert loaded.logits(images).shape == (3, 2)
    loaded.set_classes(NAMES)
    assert torch.equal(loaded.logits(images), method.logits(images))
    if host != "cocoop":
        network = Deployed(method)
        torch.testing.assert_close(network(images), method.logits(images))


def test_a_run_shares_its_first_stage(tiny_clip, teacher, dataset, monkeypatch):
    monkeypatch.setattr("promptkit.runs._clip", lambda *a: teacher)
    whole = toy_dataset(tiny_clip, shots=8)
    options = dict(shots=2, clip=tiny_clip, profile="smoke")
    asked = dict(overrides=SMALL)
    rows = [
        execute(Run("base-to-new", spec, whole, seed=seed, **options, **asked))
        for spec, seed in [("caspl", 1), ("caspl(coop)", 1), ("caspl(coop)", 2)]
    ]
    assert all(set(row["split"]) == {"base", "new", "hm"} for row in rows)
    assert set(rows[0]["seed"]) == {0} and set(rows[2]["seed"]) == {2}
    assert set(rows[0]["shots"]) == {0} and set(rows[1]["shots"]) == {2}


def test_bad_input(tiny_clip):
    for options, message in [
        ({"n_text": 0}, "n_text must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"template": "a"}, "template must be a sentence with {}"),
        ({"depth": 3}, "depth must be from 1 to the 2 blocks"),
        ({"init": "a photo"}, "init must be at least the 3 tokens"),
        ({"host": {"position": "front"}}, "position must be 'end', got 'front'"),
    ]:
        with pytest.raises(InputError, match=message):
            caspl(tiny_clip, "coop", **options)
    with pytest.raises(InputError, match="cannot extend waffleclip.*text_features"):
        build("caspl(waffleclip)", tiny_clip, NAMES)


def test_published_options_and_settings(tiny_clip):
    options = {"n_adapt": 2, "n_boost_text": 5, "n_boost_vision": 1, "depth": 2}
    maple = from_official("caspl(maple)", tiny_clip, NAMES, options)
    assert maple.context.length == 2 and maple.host.depth == 2
    assert len(maple.boosting.text[0]) == 5 and len(maple.boosting.vision) == 2
    options = {"n_adapt_text": 5, "n_adapt_vision": 3, "depth": 1, "kd_weight": 2.0}
    src = from_official("caspl(promptsrc)", tiny_clip, NAMES, options)
    assert src.context.length == 5 and src.host.vision[0].shape[0] == 3
    assert len(src.host.deep) == 0 and src.weight == 2.0
    options = {"n_adapt_text": 8, "ctx_init": "a photo of a", "n_boost_text": 4}
    coop = from_official("caspl(coop)", tiny_clip, NAMES, options)
    assert coop.context.length == 4  # words set the length
    words = tiny_clip.embed(tiny_clip.encode("a photo of a"))
    assert torch.equal(coop.boosting.text[0].data, words)
    options = {"n_adapt_text": 3, "ctx_init": "this is a", "n_boost_text": 4}
    coop = from_official("caspl(coop)", tiny_clip, NAMES, options)  # the host's words
    assert coop.context.length == 3 and len(coop.boosting.text[0]) == 4

    full = Setting("base-to-new", "dtd", profile="full")
    plan = recipe("caspl(promptsrc)", full)
    (second,) = plan.stages
    assert plan.objects == {"teacher": "@ViT-L-14/openai"} and plan.epochs == 20
    assert plan.hparams["host"]["depth"] == plan.hparams["host"]["n_ctx"] + 4 == 12
    assert (second.epochs, second.batch_size, second.lr) == (20, 4, 0.0025)
    assert recipe("caspl", full).stages == ()
    shifts = recipe("caspl(maple)", Setting("domain-generalization", "imagenet"))
    assert shifts.hparams["depth"] == 1 and shifts.hparams["n_text"] == 4
