"""What ATPrompt's paper says of it: where everything stands, what its hosts do to it,
and the search for attributes.
"""

from dataclasses import replace

import pytest
import torch

from promptkit.attributes import AttributeSearch, pool_of, search_attributes
from promptkit.data import MINI_TASKS, base_new, load_dataset
from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.pages import equal_host
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES, batch_of, few_steps
from promptkit.towers import Edits, Replace

CLEAN = [name.replace("_", " ") for name in NAMES]
ODD = ["polka-dotted", "707-320", "sea_lion", "St. Bernard"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def batch(tiny_clip, dataset):
    return batch_of(dataset, tiny_clip)


def speak(method):
    """The prompt's learned tokens all become the word "X": it is a sentence."""
    word = method.clip.embed(method.clip.encode("X"))
    with torch.no_grad():
        for p in (method.context.vectors, *method.context.before):
            p.copy_(word.expand_as(p))


@pytest.mark.parametrize(
    ("position", "sentence"),
    [
        ("end", "X color X X polka-dot shade X X X {}."),
        ("middle", "X color X X X {} X X polka-dot shade ."),
        ("front", "X X X {} X color X X polka-dot shade ."),
    ],
)
def test_words_stand_where_the_paper_puts_them(tiny_clip, position, sentence):
    """Also words of several tokens, lengths that differ, and names with odd letters."""
    method = build(
        "atprompt(coop)",
        tiny_clip,
        ODD[:3],
        attributes=["color", "polka-dot shade"],
        n_att=[1, 2],
        host={"n_ctx": 3, "position": position},
    )
    speak(method)
    said = [sentence.replace("{}", name.replace("_", " ")) for name in ODD[:3]]
    torch.testing.assert_close(
        method.text_features(), tiny_clip.encode_text(said), rtol=1e-4, atol=1e-5
    )


def test_no_tokens_between_words_that_stand_together(tiny_clip):
    method = build("atprompt(coop)", tiny_clip, NAMES, n_att=0, host={"n_ctx": 2})
    speak(method)
    expected = tiny_clip.encode_text([f"color shape X X {name}." for name in CLEAN])
    torch.testing.assert_close(method.text_features(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("words", [["playfulness", "energy"], ["technique"], ["color"]])
def test_the_published_code_overwrites_what_it_counts(tiny_clip, words):
    """It replaces rows of the tokenised text at places where each word has one."""
    M, n = 2, [2] * len(words)
    method = build(
        "atprompt(coop)",
        tiny_clip,
        ODD,
        attributes=words,
        one_token=True,
        host={"n_ctx": M},
    )
    text = " ".join(f"X X {word}" for word in words) + " X X "
    rows = tiny_clip.tokenize([text + name.replace("_", " ") + "." for name in ODD])
    x = tiny_clip.embed(rows)
    at = 1
    for j, length in enumerate(n):
        x[:, at : at + length] = method.context.before[j].detach()
        at += length + 1
    x[:, at : at + M] = method.context.vectors.detach()
    ours = method.text_prompt().full()[0]
    for c, row in enumerate(rows):
        length = int(row.argmax()) + 1
        torch.testing.assert_close(ours[c, :length], x[c, :length])
        assert method.context.template.lengths[c] == length
    plain = build("atprompt(coop)", tiny_clip, ODD, attributes=words, host={"n_ctx": M})
    several = any(len(tiny_clip.encode(word)) > 1 for word in words)
    assert several != torch.equal(plain.text_features(), method.text_features())


def test_cocoop_shifts_the_class_tokens_alone(tiny_clip, batch):
    method = build("atprompt(cocoop)", tiny_clip, NAMES)
    image = batch.features[:2]
    prefix = method.text_prompt(image).prefix  # (2, P, D)
    start, M = method.context.start, method.context.length
    assert start == 1 + 2 * (M + 1) and prefix.shape[1] == start + M
    assert torch.equal(prefix[0, :start], prefix[1, :start])
    shift = method.host.shift(image)[:, None]
    torch.testing.assert_close(prefix[:, start:], method.context.vectors + shift)


def test_maple_replaces_the_class_tokens_alone(tiny_clip, batch):
    options = {"n_ctx": 2, "depth": 2}
    method = build("atprompt(maple)", tiny_clip, NAMES, n_att=[1, 3], host=options)
    start = 1 + 2 + 4
    assert method.context.start == start
    edit = method.text_edit()
    assert {block: at for block, (at, _) in edit.prompts.items()} == {1: start}
    wanted = tiny_clip.text(
        method.text_prompt(), Replace({1: (start, edit.prompts[1][1])})
    )
    torch.testing.assert_close(method.text_features(), wanted[0])
    coupled = method.host.couple(method.context.vectors)
    torch.testing.assert_close(method.image_prompt(), coupled)


@pytest.mark.parametrize("deep", ["partial", "full"])
def test_what_stands_before_may_be_dropped_inside_the_tower(tiny_clip, deep):
    options = {"n_ctx": 2, "depth": 2}
    words = {"attributes": ["color", "playfulness"], "host": options, "deep": deep}
    method = build("atprompt(maple)", tiny_clip, NAMES, **words)
    a, b = method.deep
    ids = [tiny_clip.encode(word) for word in words["attributes"]]
    at = 1 + 2 + len(ids[0])
    parts = [Replace({1: (1, a)}), Replace({1: (at, b)})]
    if deep == "full":
        parts += [Replace({1: (3, tiny_clip.embed(ids[0]))})]
        parts += [Replace({1: (at + 2, tiny_clip.embed(ids[1]))})]
    edit = Edits(method.host.text_edit(), *parts)
    wanted = tiny_clip.text(method.text_prompt(), edit)[0]
    torch.testing.assert_close(method.text_features(), wanted)
    method.train().text_features().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in method.deep)


@pytest.mark.parametrize(
    "spec",
    [
        "dept(atprompt(coop))",
        "dept(atprompt(maple))",
        "tcp(atprompt(coop))",
        "atprompt(promptsrc)",
        "atprompt(ivlp)",
    ],
)
def test_it_nests(tiny_clip, dataset, batch, spec, tmp_path):
    method, _ = few_steps(spec, tiny_clip, dataset, epochs=2)
    loaded = load_method(method.save(tmp_path / "m.safetensors"), tiny_clip)
    assert loaded.spec == spec
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    loaded.set_classes(["teapot", "sea lion"])
    assert loaded.logits(batch).shape == (len(batch), 2)


def test_inside_and_around_dept_it_is_the_same(tiny_clip, batch):
    inner = build("dept(atprompt(coop))", tiny_clip, NAMES)
    outer = build("atprompt(dept(coop))", tiny_clip, NAMES)
    state = {
        name.replace("host.host.", "host."): p for name, p in inner.state_dict().items()
    }
    theirs = {name.replace("host.", "", 1): name for name in outer.state_dict()}
    assert len(theirs) == len(state)
    with torch.no_grad():
        for short, name in theirs.items():
            outer.state_dict()[name].copy_(state[short])
    torch.testing.assert_close(outer.logits(batch), inner.logits(batch))
    torch.testing.assert_close(outer.loss(batch), inner.loss(batch))


def test_recipes_follow_host_and_dataset():
    def of(spec, dataset, protocol="base-to-new"):
        return recipe(spec, Setting(protocol, dataset, 16, "full"))

    ours = of("atprompt(coop)", "dtd")
    assert ours.epochs == 100 and ours.hparams["host"]["n_ctx"] == 4
    assert ours.hparams["attributes"] == ["pattern", "color", "design"]
    ours = of("atprompt(cocoop)", "eurosat")
    assert (ours.batch_size, ours.hparams["host"]["n_ctx"]) == (1, 6)
    assert of("atprompt(maple)", "ucf101").hparams["host"]["n_ctx"] == 2
    ours = of("atprompt(maple)", "imagenet", "cross-dataset")
    assert (ours.epochs, ours.lr, ours.hparams["host"]["depth"]) == (2, 0.0026, 3)
    ours = of("dept(atprompt(coop))", "ucf101")
    assert (ours.epochs, ours.lr, ours.hparams["lam"]) == (10, 0.0035, 0.5)
    assert ours.hparams["lr_factor"] == 1.0
    assert ours.hparams["host"]["host"]["n_ctx"] == 4
    assert ours.hparams["host"]["attributes"] == ["precision"]
    # the same model, the other way round
    inside = of("atprompt(dept(coop))", "ucf101")
    assert (inside.epochs, inside.lr) == (ours.epochs, ours.lr)
    assert inside.hparams["attributes"] == ["precision"]
    assert inside.hparams["host"] == {
        "lam": 0.5,
        "lr_factor": 1.0,
        "host": {"n_ctx": 4},
    }
    assert of("dept(atprompt(coop))", "imagenet").hparams["host"]["host"]["n_ctx"] == 2


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("atprompt(coop)", {"attributes": []}, "attributes"),
        ("atprompt(coop)", {"attributes": ["{}"]}, "attributes"),
        ("atprompt(coop)", {"n_att": [2]}, "n_att must be from 0, or 2 of them"),
        ("atprompt(coop)", {"n_att": -1}, "n_att"),
        ("atprompt(coop)", {"deep": "full"}, "deep must be 'retain'"),
        ("atprompt(coop)", {"init": "a photo of a"}, "n_ctx"),
        ("atprompt(clip)", {}, "cannot extend clip"),
        ("atprompt(atprompt(coop))", {}, "learned context"),
        ("atprompt(coop)", {"n_att": 40}, "takes .* tokens"),
    ],
)
def test_bad_options(tiny_clip, spec, options, message):
    with pytest.raises(InputError, match=message):
        build(spec, tiny_clip, NAMES, **options)


# --- the search -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["coop", "cocoop", "kgcoop", "prograd", "maple", "promptsrc", "ivlp", "qnet"]
    + ["dept(coop)", "dept(kgcoop)", "dept(prograd)", "dept(maple)"]
    + ["textrefiner(kgcoop)", "tcp(coop)"],
)
def test_the_host_alone_starts_as_it_does_with_attributes(tiny_clip, host):
    """What a comparison at equal settings needs: the same lengths, and random vectors
    in both or words in both.
    """
    plan = recipe(f"atprompt({host})", Setting("base-to-new", "sat"))
    alone, options = equal_host(f"atprompt({host})")
    made = [
        [build(spec, tiny_clip, CLEAN, seed=n, **own).context.vectors for n in (1, 2)]
        for spec, own in ((f"atprompt({host})", plan.hparams), (alone, options))
    ]
    assert made[0][0].shape == made[1][0].shape
    for first, second in made:
        assert not torch.equal(first, second)


def test_a_search_scores_each_combination_as_coop_would(tiny_clip, batch):
    torch.manual_seed(0)
    search = AttributeSearch(tiny_clip, NAMES, bases=["color", "playfulness"], n_ctx=2)
    assert search.combinations == [["color"], ["playfulness"], ["color", "playfulness"]]
    image, text = search.features(batch)
    logits = 0
    for k, words in enumerate(search.combinations):
        alone = build(
            "atprompt(coop)", tiny_clip, NAMES, attributes=words, host={"n_ctx": 2}
        )
        alone.context.load_state_dict(search.contexts[k].state_dict())
        torch.testing.assert_close(alone.text_features(), text[k], rtol=1e-4, atol=1e-5)
        logits = logits + search.weights[k] * alone.logits(batch)
    torch.testing.assert_close(search.logits(batch), logits, rtol=1e-4, atol=1e-3)


def test_a_search_may_be_narrowed(tiny_clip):
    bases = ["color", "shape", "size"]
    search = AttributeSearch(tiny_clip, NAMES, bases=bases)
    assert len(search.combinations) == 7 and search.combinations[3] == bases[:2]
    assert len(AttributeSearch(tiny_clip, NAMES, bases=bases, most=1).contexts) == 3
    only = [["shape"], ["color", "size"]]
    assert (
        AttributeSearch(tiny_clip, NAMES, bases=bases, only=only)
        .text_features()
        .shape[0]
        == 2
    )
    for bad in ({"most": 4}, {"only": [["size", "color"]]}, {"only": []}):
        with pytest.raises(InputError, match=next(iter(bad))):
            AttributeSearch(tiny_clip, NAMES, bases=bases, **bad)
    with pytest.raises(InputError, match="different words"):
        AttributeSearch(tiny_clip, NAMES, bases=["color", "color"])


def test_a_step_moves_tokens_and_weights_in_turns(tiny_clip, batch):
    torch.manual_seed(0)
    search = AttributeSearch(tiny_clip, NAMES, bases=["color", "shape"], n_ctx=2)
    tokens = [p.detach().clone() for p in search.contexts.parameters()]
    alpha = search.alpha.detach().clone()
    still = torch.optim.SGD([search.alpha], lr=0.0)
    theta = torch.optim.SGD(search.contexts.parameters(), lr=0.1)
    trained, _ = search.step(batch, batch, theta, still)
    assert torch.equal(search.alpha, alpha)
    assert not any(
        torch.equal(p, q)
        for p, q in zip(search.contexts.parameters(), tokens, strict=True)
    )
    _, validated = search.step(
        batch, batch, torch.optim.SGD(search.contexts.parameters(), lr=0.0), still
    )
    assert validated == pytest.approx(search.loss(batch).item(), rel=1e-5)


def test_a_search_finds_the_words_that_help(tiny_clip, dataset):
    """The same seed finds the same; the curve starts before the first epoch."""
    plan = Recipe(epochs=3, batch_size=8, augment=False)
    bases = ["color", "shape", "size"]
    found, again = (
        search_attributes(tiny_clip, dataset, bases, recipe=plan, n_ctx=2, most=2)
        for _ in range(2)
    )
    assert found.weights.shape == (4, 6) and len(found.combinations) == 6
    assert torch.equal(found.weights, again.weights) and found.losses == again.losses
    torch.testing.assert_close(found.weights.sum(1), torch.ones(4))
    assert not torch.equal(found.weights[0], found.weights[-1])
    assert found.best == found.combinations[int(found.weights[-1].argmax())]
    build("atprompt(coop)", tiny_clip, NAMES, attributes=found.best)


def test_without_validation_images_the_training_images_are_halved(
    tiny_clip, dataset, monkeypatch
):
    seen = []
    monkeypatch.setattr(
        AttributeSearch,
        "step",
        lambda self, a, b, *_: seen.append((a.labels, b.labels)) or (0.0, 0.0),
    )
    plan = Recipe(epochs=1, batch_size=10, augment=False)
    alone = replace(dataset, val=dataset.val.take([]))
    search_attributes(tiny_clip, alone, ["color"], recipe=plan)
    ((train, val),) = seen
    assert (
        sorted(train.tolist()) == sorted(val.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    )


def test_a_pool_is_what_all_classes_have(dataset):
    said = {
        name: ["five pointed petals", f"a {colour} center"]
        for name, colour in zip(dataset.classnames, ["pink", "brown"] * 3, strict=False)
    }
    described = replace(dataset, descriptions=said)
    assert pool_of(described, 4) == ["pointed", "petals", "center", "pink"]
    with pytest.raises(InputError, match="has no descriptions"):
        pool_of(dataset)


@pytest.mark.parametrize("name", MINI_TASKS)
def test_the_words_of_the_mini_world_are_of_base_classes(name):
    """They are what a search among the words of their descriptions found; new classes
    and test images have no part in it.
    """
    words = recipe("atprompt(coop)", Setting("base-to-new", name)).hparams["attributes"]
    pool = pool_of(base_new(load_dataset(name))[0])
    assert 1 <= len(words) <= 3 and words == [w for w in pool if w in words]


def test_a_batch_of_a_search_needs_no_images(tiny_clip, batch):
    search = AttributeSearch(tiny_clip, NAMES, bases=["color"])
    cached = Batch(features=batch.features, labels=batch.labels)
    torch.testing.assert_close(search.logits(cached), search.logits(batch))
