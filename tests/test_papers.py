"""What single methods promise beyond what all of them do; each test names its paper's
rule.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.data import transform
from promptkit.descriptions import linked
from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.methods.tpt import marginal_entropy
from promptkit.prompts import Context, deep_prompts
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.train import fit
from promptkit.views import image_views

CLEAN = [name.replace("_", " ") for name in NAMES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def batch(tiny_clip):
    dataset = toy_dataset(tiny_clip)
    images = transform(tiny_clip, dataset.train.images())
    return Batch(
        images=images,
        labels=dataset.train.labels,
        features=tiny_clip.encode_image(images),
    )


def trained(spec, clip, epochs=3, **hparams):
    dataset = toy_dataset(clip)
    method = build(spec, clip, dataset.classnames, **hparams)
    plan = Recipe(epochs=epochs, batch_size=8, lr=0.1, warmup_epochs=0, augment=False)
    fit(method, dataset, plan, progress=False)
    return method


# --- contexts -------------------------------------------------------------------------


def test_a_context_may_learn_some_of_its_words_or_more_vectors_than_words(tiny_clip):
    words = tiny_clip.embed(tiny_clip.encode("a photo of a"))  # (4, D)
    oracle = tiny_clip.encode_text([f"a photo of a {name}." for name in CLEAN])
    two = Context(tiny_clip, NAMES, 2, words="a photo of a")
    torch.testing.assert_close(two.vectors, words[:2], rtol=0, atol=0)
    torch.testing.assert_close(
        tiny_clip.text(two.prompt())[0], oracle, rtol=1e-4, atol=1e-5
    )
    six = Context(tiny_clip, NAMES, 6, words="a photo of a")
    torch.testing.assert_close(
        six.vectors, torch.cat([torch.zeros(2, tiny_clip.width), words]), rtol=0, atol=0
    )


def test_the_class_name_may_be_marked_in_the_words(tiny_clip):
    marked = Context(tiny_clip, NAMES, words="a photo of [CLS] outdoors")
    assert marked.position == "middle" and marked.vectors.shape[0] == 4
    oracle = tiny_clip.encode_text([f"a photo of {name} outdoors ." for name in CLEAN])
    torch.testing.assert_close(
        tiny_clip.text(marked.prompt())[0], oracle, rtol=1e-4, atol=1e-5
    )


def test_depth_counts_blocks(tiny_clip):
    blocks = min(len(tiny_clip.text_tower.blocks), len(tiny_clip.image_tower.blocks))
    assert deep_prompts(tiny_clip, None) == max(
        len(tiny_clip.text_tower.blocks) * 3 // 4, 1
    )
    assert deep_prompts(tiny_clip, blocks) == blocks
    for bad in (-1, blocks + 1):
        with pytest.raises(
            InputError, match=f"depth must be from 0 to the {blocks} blocks.*got {bad}"
        ):
            deep_prompts(tiny_clip, bad)


# --- methods over features ------------------------------------------------------------


def test_cocoop_shifts_every_vector_alike(tiny_clip, batch):
    method = build("cocoop", tiny_clip, NAMES)
    text = method.text_features(batch.features[:2])  # (2, C, E)
    shifted = method.context.vectors + method.shift(batch.features[:1])
    alone = tiny_clip.text(method.context.prompt(shifted[None, None].squeeze(0)))
    torch.testing.assert_close(text[0], alone[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="depend on the image"):
        method.text_features()


def test_kgcoop_without_penalty_is_coop(tiny_clip, batch):
    options = {"n_ctx": 4, "init": "a photo of a"}
    coop, free = (
        build("coop", tiny_clip, NAMES, **options),
        build("kgcoop", tiny_clip, NAMES, lam=0.0, **options),
    )
    assert torch.equal(coop.loss(batch), free.loss(batch))
    held = build("kgcoop", tiny_clip, NAMES, template="a sketch of the {}.")
    assert held.loss(batch) > coop.loss(batch)
    torch.testing.assert_close(
        held.logits(batch), coop.logits(batch)
    )  # nothing differs at test time


def test_kgcoop_takes_its_template_from_the_dataset(tiny_clip):
    dataset = replace(
        toy_dataset(tiny_clip),
        template="a drawing of a {}.",
        name="dtd",
    )
    method = build("kgcoop", tiny_clip, dataset.classnames)
    method.aim(dataset)
    assert method.option("template") == "a photo of a {}, a type of texture."
    given = build("kgcoop", tiny_clip, dataset.classnames, template="my {}.")
    given.aim(dataset)
    assert given.option("template") == "my {}."


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_prograd_removes_what_conflicts(tiny_clip, batch, lam):
    method = build(
        "prograd", tiny_clip, NAMES, n_ctx=4, lam=lam, template="a sketch of a {}."
    )
    conflicts = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        batch.labels = torch.randint(
            len(NAMES), (len(batch.labels),), generator=generator
        )
        with torch.no_grad():
            method.context.vectors.normal_(0, 1.0, generator=generator)
        _, (domain,), (general,) = method.gradients(batch)
        method.zero_grad()
        loss = method.backward(batch)
        torch.testing.assert_close(
            loss, F.cross_entropy(method(batch), batch.labels), rtol=1e-5, atol=1e-6
        )
        unit = F.normalize(general.flatten(), dim=0)
        along = domain.flatten() @ unit
        expected = domain.flatten() - lam * along.clamp(max=0) * unit
        torch.testing.assert_close(
            method.context.vectors.grad.flatten(), expected, rtol=1e-4, atol=1e-6
        )
        conflicts += int(along < 0)
    assert 0 < conflicts < 12  # both cases were met


def test_prograd_starts_from_its_template(tiny_clip):
    method = build(
        "prograd", tiny_clip, NAMES, template="a type of pet, a photo of a {}."
    )
    assert method.context.vectors.shape == (16, tiny_clip.width)
    assert (
        not method.context.vectors[:8].any()
        and method.context.vectors[8:].any(dim=1).all()
    )
    with pytest.raises(InputError, match="n_ctx must be at least the 4 words"):
        build("prograd", tiny_clip, NAMES, n_ctx=3)
    assert (
        recipe("prograd", Setting("few-shot", "dtd", 16, "full")).hparams["lam"] == 0.8
    )
    assert (
        "lam"
        not in recipe("prograd", Setting("base-to-new", "dtd", 16, "full")).hparams
    )


# --- methods with prompts in the image tower ------------------------------------------


def test_maple_couples_its_towers(tiny_clip, batch):
    """A change of a text prompt changes the image features too, and both towers'
    gradients reach it.
    """
    method = build("maple", tiny_clip, NAMES)
    before = method.image_features(batch.images)
    grad = torch.autograd.grad(before.sum(), method.context.vectors)[0]
    assert grad.abs().sum() > 0
    with torch.no_grad():
        method.context.vectors.add_(1.0)
    assert not torch.allclose(method.image_features(batch.images), before)
    deep = build("maple", tiny_clip, NAMES, depth=2)
    weights = [layer.weight for layer in deep.couple_deep]
    assert all(torch.equal(weights[0], w) for w in weights)  # they start equal
    with pytest.raises(InputError, match="n_ctx"):
        build("maple", tiny_clip, NAMES, n_ctx=3, init="a photo")


def test_ivlp_in_one_tower_leaves_the_other_alone(tiny_clip, batch):
    text, vision = (
        build("ivlp", tiny_clip, NAMES, **{d: 0}) for d in ("depth_vision", "depth")
    )
    torch.testing.assert_close(
        text.image_features(batch.images), tiny_clip.encode_image(batch.images)
    )
    zero_shot = build("clip", tiny_clip, NAMES)
    torch.testing.assert_close(vision.text_features(), zero_shot.text_features())
    assert not set(dict(text.named_parameters())) & set(dict(vision.named_parameters()))
    with pytest.raises(InputError, match="something has to learn"):
        build("ivlp", tiny_clip, NAMES, depth=0, depth_vision=0)


@pytest.mark.parametrize("averaging", ["gaussian", "uniform", "last"])
def test_promptsrc_averages_epochs(tiny_clip, averaging):
    dataset, seen = toy_dataset(tiny_clip), []
    method = build(
        "promptsrc",
        tiny_clip,
        dataset.classnames,
        averaging=averaging,
        templates=["a {}."],
    )
    average = method.end_epoch

    def end_epoch(epoch, plan):
        seen.append(method.context.vectors.detach().clone())
        average(epoch, plan)

    method.end_epoch = end_epoch
    fit(
        method,
        dataset,
        Recipe(epochs=4, batch_size=8, lr=0.1, augment=False),
        progress=False,
    )
    weights = method.epoch_weights(4)
    assert weights.sum().item() == pytest.approx(1) and len(seen) == 4
    mean = sum(w * v for w, v in zip(weights.float(), seen, strict=True))
    torch.testing.assert_close(
        method.context.vectors.detach(), mean, rtol=1e-4, atol=1e-6
    )


def test_promptsrc_without_regularisers_is_ivlp(tiny_clip, batch):
    free = {
        "text_weight": 0.0,
        "image_weight": 0.0,
        "logit_weight": 0.0,
        "averaging": "last",
    }
    ivlp, promptsrc = (
        build("ivlp", tiny_clip, NAMES),
        build("promptsrc", tiny_clip, NAMES, **free),
    )
    assert torch.equal(ivlp.loss(batch), promptsrc.loss(batch))


# --- plug-ins -------------------------------------------------------------------------


def test_dept_uses_its_head_for_trained_classes_alone(tiny_clip, batch):
    method = trained("dept(coop)", tiny_clip, lam=0.7).eval()
    image, text = method.features(batch)
    itm, cat = method.host.score(image, text), method.cat(image, text)
    torch.testing.assert_close(method.logits(batch), (0.3 * itm + 0.7 * cat).detach())
    some = [
        method.trained_on[i] for i in (2, 0)
    ]  # a shifted version with fewer classes
    method.set_classes(some)
    torch.testing.assert_close(method.cat(image, None), cat[:, [2, 0]])
    method.set_classes(["teapot", "sea lion"])
    torch.testing.assert_close(method.logits(batch), method.host.logits(batch))


@pytest.mark.parametrize(
    "options", [{"film": False}, {"fusion": False}, {"head": "similarity"}]
)
def test_dept_ablations(tiny_clip, batch, options, tmp_path):
    method = trained("dept(coop)", tiny_clip, **options)
    loaded = load_method(method.save(tmp_path / "dept.safetensors"), tiny_clip)
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    assert ("film_image.scale" in method.state_dict()) == ("film" not in options)
    assert ("classifier.weight" in method.state_dict()) == (
        options.get("head") != "similarity"
    )


@pytest.mark.parametrize("host", ["cocoop", "kgcoop", "maple", "promptsrc"])
def test_dept_over_its_hosts(tiny_clip, batch, host, tmp_path):
    spec = f"dept({host})"
    method = trained(spec, tiny_clip, epochs=1)
    loaded = load_method(method.save(tmp_path / "dept.safetensors"), tiny_clip)
    assert loaded.spec == spec and torch.equal(
        loaded.logits(batch), method.logits(batch)
    )
    plan = recipe(spec, Setting("base-to-new", "mini", 16, "full"))
    groups = method.param_groups(plan)
    assert groups[-1]["lr"] == pytest.approx(6.5 * plan.lr) and "lr" not in groups[0]
    assert plan.epochs == (20 if host == "promptsrc" else 10)
    loaded.set_classes(["teapot", "sea lion"])
    assert loaded.logits(batch).shape == (len(batch), 2)


def test_dept_adds_its_hosts_regulariser(tiny_clip, batch):
    options = {"lam": 2.0, "template": "a sketch of the {}."}
    held = build("dept(kgcoop)", tiny_clip, NAMES, host=options)
    free = build("dept(kgcoop)", tiny_clip, NAMES, host=options | {"lam": 0.0})
    image, text = held.features(batch)
    expected = free.loss(batch) + held.host.regularizer(batch, image, text)
    torch.testing.assert_close(held.loss(batch), expected, rtol=1e-5, atol=1e-6)


# --- at test time ---------------------------------------------------------------------


def test_tpt_forgets_every_image(tiny_clip, batch):
    """Images are adapted alike alone and together, again and again; what the method
    holds never changes.
    """
    method = build("tpt", tiny_clip, NAMES, views=6, selection=0.5).eval()
    before = {name: p.clone() for name, p in method.state_dict().items()}
    together = method.logits(batch)
    alone = torch.cat(
        [method.logits(Batch(images=image[None])) for image in batch.images]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(before[name], p) for name, p in method.state_dict().items())
    assert (
        method.n_parameters == 0 and recipe("tpt", Setting(profile="full")).epochs == 0
    )


def test_tpt_lowers_the_entropy_of_its_confident_views(tiny_clip, batch):
    method = build(
        "tpt", tiny_clip, NAMES, views=8, selection=0.25, steps=4, step_size=1e-3
    ).eval()
    views = method.views(
        toy_dataset(tiny_clip).train.images()[:3], torch.Generator().manual_seed(0)
    )
    assert views.shape[:2] == (3, 8)
    done = method.tune(tiny_clip.encode_image(views.flatten(0, 1)).unflatten(0, (3, 8)))
    assert done.selected.shape == (3, 2) and (done.losses[-1] < done.losses[0]).all()
    chosen = done.entropy.gather(1, done.selected)
    assert (chosen.amax(1) <= done.entropy.kthvalue(2, dim=1).values + 1e-6).all()
    one = build("tpt", tiny_clip, NAMES, views=3, selection=0.1).eval()
    assert one.tune(tiny_clip.encode_image(views[0, :3])[None]).selected.shape == (
        1,
        1,
    )  # never none


def test_tpt_without_steps_is_its_host(tiny_clip, batch):
    for spec in ("tpt(coop)", "tpt(kgcoop)", "tpt(prograd)"):
        method = build(spec, tiny_clip, NAMES, views=2, steps=0).eval()
        torch.testing.assert_close(
            method.logits(batch), method.host.logits(batch), rtol=1e-3, atol=1e-3
        )
    with pytest.raises(InputError, match="cannot extend maple"):
        build("tpt(maple)", tiny_clip, NAMES)


def test_tpt_over_a_host_trains_the_host(tiny_clip):
    method = trained("tpt(coop)", tiny_clip, views=4)
    alone = trained("coop", tiny_clip)
    assert (
        torch.equal(method.host.context.vectors, alone.context.vectors)
        and method.spec == "tpt(coop)"
    )


def test_marginal_entropy():
    even = torch.zeros(1, 3, 4)
    assert marginal_entropy(even).item() == pytest.approx(
        torch.tensor(4.0).log().item()
    )
    split = torch.tensor(
        [[[50.0, 0.0], [0.0, 50.0]]]
    )  # two certain views that disagree
    assert marginal_entropy(split).item() == pytest.approx(
        torch.tensor(2.0).log().item(), abs=1e-4
    )


def test_views_begin_with_the_centre_crop(tiny_clip):
    from numpy.random import RandomState
    from PIL import Image

    image = Image.new("RGB", (40, 30), (10, 200, 30))
    for mixes in (False, True):
        views = image_views(image, 4, 16, mixes, RandomState(0))
        assert views.shape == (4, 3, 16, 16)
        torch.testing.assert_close(
            views[0], torch.tensor([10, 200, 30]).view(3, 1, 1).expand(3, 16, 16) / 255
        )


# --- training-free --------------------------------------------------------------------

FACTS = {name: [f"{name} fact {i}" for i in range(3)] for name in NAMES}


def test_waffleclip_shares_its_sentences(tiny_clip):
    method = build("waffleclip", tiny_clip, NAMES, pairs=3, repetition=0)
    lists = method.sentences()
    assert {len(texts) for texts in lists} == {6}
    ends = {
        tuple(text.replace(name, "") for text in texts)
        for name, texts in zip(method.classnames, lists, strict=True)
    }
    assert len(ends) == 1
    assert (
        lists
        == build("waffleclip", tiny_clip, NAMES, pairs=3, repetition=0).sentences()
    )
    assert (
        lists
        != build("waffleclip", tiny_clip, NAMES, pairs=3, repetition=1).sentences()
    )
    broad = build(
        "waffleclip", tiny_clip, NAMES, mode="clip", concept="thing"
    ).sentences()
    assert broad[0] == [f"A photo of a thing: a {NAMES[0]}."]


@pytest.mark.parametrize(
    "mode", ["random", "shared_random", "swapped", "scrambled", "gpt"]
)
def test_waffleclip_on_descriptors(tiny_clip, mode):
    mode = f"{mode}_descriptions"
    method = build(
        "waffleclip", tiny_clip, NAMES, mode=mode, descriptors=FACTS, repetition=3
    )
    lists = method.sentences()
    assert len(lists) == len(NAMES) and all(len(texts) == 3 for texts in lists)
    if mode == "gpt_descriptions":
        assert lists[0][0] == f"A photo of a {NAMES[0]}, {linked(FACTS[NAMES[0]][0])}."
    with pytest.raises(InputError, match="there are none of"):
        build("waffleclip", tiny_clip, NAMES, mode=mode).sentences()


def test_waffleclip_aggregates(tiny_clip, batch):
    methods = {
        how: build("waffleclip", tiny_clip, NAMES, pairs=2, repetition=0, aggregate=how)
        for how in ("mean", "max", "merge")
    }
    parts = F.normalize(
        tiny_clip.encode_text(
            [t for texts in methods["mean"].sentences() for t in texts]
        ),
        dim=-1,
    )
    cosine = (F.normalize(batch.features, dim=-1) @ parts.T).view(
        len(batch), len(NAMES), 4
    )
    scale = tiny_clip.logit_scale
    torch.testing.assert_close(
        methods["mean"].logits(batch), scale * cosine.mean(-1), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        methods["max"].logits(batch), scale * cosine.amax(-1), rtol=1e-4, atol=1e-4
    )
    merged = F.normalize(parts.view(len(NAMES), 4, -1).mean(1), dim=-1)
    expected = scale * F.normalize(batch.features, dim=-1) @ merged.T
    torch.testing.assert_close(
        methods["merge"].logits(batch), expected, rtol=1e-4, atol=1e-4
    )


def test_descriptors_become_clauses():
    clauses = {
        "a long tail": "which is a long tail",
        "used for digging": "which is used for digging",
        "has wings": "which has wings",
        "often striped": "which often striped",
        "round shape": "which has round shape",
        "": "which has ",
    }
    assert {descriptor: linked(descriptor) for descriptor in clauses} == clauses


def test_official_checkpoints_may_hold_clips_weights(tiny_clip):
    """MaPLe's and PromptSRC's code saves the whole model; what CLIP has anyway is
    dropped, all else is named.
    """
    for spec in ("maple", "promptsrc"):
        method, other = (
            build(spec, tiny_clip, NAMES),
            build(spec, tiny_clip, NAMES, seed=7),
        )
        state = {
            key: method.state_dict()[ours]
            for key, ours in method.official_names().items()
        }
        for key, value in tiny_clip.model.state_dict().items():
            vision = key.startswith("visual.")
            state[
                (
                    key.replace("visual.", "image_encoder.")
                    if vision
                    else f"text_encoder.{key}"
                )
            ] = value
        other.load_official({"state_dict": state | {"logit_scale": torch.zeros(())}})
        ours = other.state_dict()
        assert all(
            torch.equal(ours[name], value)
            for name, value in method.state_dict().items()
        )
        deeper = "text_encoder.transformer.resblocks.99.VPT_shallow"
        with pytest.raises(InputError, match=f"unknown: {deeper}"):
            other.load_official(state | {deeper: torch.zeros(1)})


@pytest.mark.parametrize(
    ("spec", "made"),
    [("kgcoop", "anchor"), ("prograd", "teacher"), ("promptsrc", "anchor")],
)
def test_what_is_made_from_names_follows_them(tiny_clip, spec, made):
    method = build(spec, tiny_clip, NAMES)
    first = getattr(method, made)
    assert first is getattr(method, made) and len(first) == len(NAMES)  # computed once
    method.set_classes(NAMES[:2])
    torch.testing.assert_close(getattr(method, made), first[:2])
