"""Options of the published code: each acts as the papers' rules say, or is refused in a
sentence. What they lead to is derived here a second time, from those rules.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.methods.coop import CoOp
from promptkit.methods.ivlp import IVLP
from promptkit.methods.kgcoop import KgCoOp
from promptkit.methods.prograd import ProGrad
from promptkit.methods.promptsrc import PromptSRC
from promptkit.methods.tpt import TPT
from promptkit.methods.waffleclip import READ_BY, WaffleCLIP
from promptkit.published import PROTOCOLS
from promptkit.recipe import Recipe, Setting
from promptkit.registry import build, from_official, load_method, methods, recipe
from promptkit.testing import NAMES, toy_dataset
from promptkit.views import OPERATIONS, image_views


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


# --- WaffleCLIP: the published sentences, word by word --------------------------------

# Underscores, hyphens, digits, a name inside others, repeated and empty descriptors.
DESCRIBED = {
    "sea_lion": ["four flippers", "often barks.", "a wet, grey coat", "used to cold"],
    "737-800": ["two engines", "can carry 189"],
    "cat": ["whiskers", "whiskers", "may purr", "typically has fur", "claws"],
    "Jack-O-Lantern": [],
    "hot_air balloon": ["bright colours", "a basket."],
}
OWN = {name: texts or [""] for name, texts in DESCRIBED.items()}
POOL = sum(OWN.values(), [])
MODES = WaffleCLIP.hyperparameters()["mode"][0].__args__
WORDS = ["", "10", "amber", "antler", "a-frame", "category", "may", "used", "zinc"]


def clause(text):
    if text[:1] == "a" or text[:4] == "used":
        return "which is " + text
    begins = any(
        text.startswith(w) for w in ("has", "often", "typically", "may", "can")
    )
    return ("which " if begins else "which has ") + text


def said(name, text, concept=""):
    topic = f"{concept}: a " if concept else ""
    return f"A photo of a {topic}{name.replace('_', ' ')}, {clause(text)}."


def published(mode, repetition, count, concept):
    """The sentences by the rules of the paper's code: numpy's global generator, seeded
    by the repetition, one permutation of the list for each word and each character.
    """
    np.random.seed(repetition)
    keys = list(OWN)
    if mode == "clip":
        topic = f"{concept}: a " if concept else ""
        return {k: [f"A photo of a {topic}{k.replace('_', ' ')}."] for k in keys}
    if mode == "gpt_descriptions":
        return {k: [said(k, text, concept) for text in OWN[k]] for k in keys}

    def one(items):
        return np.random.choice(items, 1, replace=False)[0]

    # Names of 2, 1, 1, 1, 3 words, of 3.5, 7, 3, 14, 13/3 letters: 2 words of 6.
    cut = [word[:6] for word in WORDS]
    letters = sorted(set("".join(POOL)) - {" ", ",", "."})
    # Blanks 0, 0, 0, 0, 1 and longest parts of 8, 7, 3, 14, 7: one group of 8 + 1.
    n = int(2 / 3 * count) if mode == "waffle_and_gpt" else count
    lists = {}
    for k in keys:
        lists[k] = []
        for _ in range(n):
            lists[k].append(said(k, f"{one(cut)} {one(cut)}", concept))
            noise = "".join(one(letters) for _ in range(9))
            lists[k].append(said(k, noise, concept))
    chosen = np.random.choice(keys)
    old, texts = chosen.replace("_", " "), lists[chosen]
    for k in keys:
        lists[k] = [text.replace(old, k.replace("_", " ")) for text in texts]
    if mode == "waffle_and_gpt":
        for k in keys:
            drawn = [np.random.choice(OWN[k], 1)[0] for _ in range(2 * n)]
            lists[k] += [said(k, text, concept) for text in drawn]
        for k in keys:
            lists[k] = list(np.random.choice(lists[k], 3 * n, replace=False))
    return lists


def waffle(clip, mode, names=None, **more):
    """With options that the mode reads; classes in another order than described."""
    names = names or sorted(DESCRIBED)
    options = {"pairs": 4, "budget": 2, "words": WORDS} | more
    options = {k: v for k, v in options.items() if mode in READ_BY.get(k, (mode,))}
    return WaffleCLIP(clip, names, mode=mode, descriptors=DESCRIBED, **options)


def sentences(clip, mode, **more):
    """``{name: sentences}``"""
    names = sorted(DESCRIBED)
    return dict(zip(names, waffle(clip, mode, **more).sentences(), strict=True))


@pytest.mark.parametrize(
    "mode", ["waffle", "waffle_and_gpt", "gpt_descriptions", "clip"]
)
@pytest.mark.parametrize("concept", ["", "cat"])
def test_waffleclip_says_what_the_published_code_says(tiny_clip, mode, concept):
    for repetition in range(7):
        ours = sentences(tiny_clip, mode, concept=concept, repetition=repetition)
        assert ours == published(mode, repetition, 4, concept)


@pytest.mark.parametrize("mode", MODES)
def test_waffleclip_draws_by_its_repetition(tiny_clip, mode):
    first, same, other = (
        sentences(tiny_clip, mode, repetition=n, concept="thing") for n in (3, 3, 4)
    )
    assert first == same
    assert (first != other) == (mode not in ("clip", "gpt_descriptions"))


def test_waffleclip_without_sharing_or_words(tiny_clip):
    """Each class has draws of its own; strings alone are of the same letters."""
    lists = sentences(tiny_clip, "adaptive_waffle", repetition=0)
    letters = set("".join(POOL)) - set(" ,.")
    for name, texts in lists.items():
        start = said(name, "#")[: -len("which has #.")]
        assert len(texts) == 8 and all(text.startswith(start) for text in texts)
    ends = {name: [text[-10:] for text in texts] for name, texts in lists.items()}
    assert len({tuple(texts[1::2]) for texts in ends.values()}) == len(lists)
    for mode in ("waffle_characters", "adaptive_waffle_characters"):
        lists = sentences(tiny_clip, mode, repetition=0)
        ends = {k: [text[-10:-1] for text in texts] for k, texts in lists.items()}
        for name, texts in lists.items():
            assert len(texts) == 4 and set("".join(ends[name])) <= letters
            assert texts == [said(name, end) for end in ends[name]]
        distinct = {tuple(texts) for texts in ends.values()}
        assert len(distinct) == (1 if mode == "waffle_characters" else len(lists))


def test_waffleclip_tears_descriptors_from_their_classes(tiny_clip):
    def drawn(mode, **more):
        """What the sentences of each class were made of."""
        lists = sentences(tiny_clip, mode, repetition=1, **more)
        told = {k: {said(k, text): text for text in POOL} for k in lists}
        return {k: [told[k][text] for text in texts] for k, texts in lists.items()}

    n = 3  # 14 descriptors of 5 classes, rounded up
    for budget in (1, 2):
        own = drawn("random_descriptions", budget=budget)
        one = drawn("shared_random_descriptions", budget=budget)
        for texts in [*own.values(), *one.values()]:
            assert len(texts) == n * budget and not Counter(texts) - Counter(POOL)
        assert len({tuple(texts) for texts in own.values()}) == len(own)
        assert len({tuple(texts) for texts in one.values()}) == 1
    for mode in ("random_descriptions", "shared_random_descriptions"):  # all there are
        assert sorted(drawn(mode, budget=9)["cat"]) == sorted(POOL)
    swapped = drawn("swapped_descriptions")
    assert swapped != OWN
    assert sorted(swapped.values()) == sorted(OWN.values())
    scrambled = sentences(tiny_clip, "scrambled_descriptions", repetition=1)
    assert scrambled != {k: [said(k, text) for text in OWN[k]] for k in OWN}
    for name, texts in scrambled.items():
        words = " ".join(OWN[name]).replace(".", "").split()
        for text, original in zip(texts, OWN[name], strict=True):
            n = len(original.split())
            end = text.removesuffix(".").split(" ")[-n:] if n else []
            assert text == said(name, " ".join(end)) and set(end) <= set(words)


@pytest.mark.parametrize("concept", ["", "thing"])
def test_waffleclip_draws_templates(tiny_clip, concept):
    """Twice as many as pairs, with repetition, in their order, the same for all."""
    openai = [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    options = {"concept": concept, "repetition": 0}
    lists, drawn = sentences(tiny_clip, "prompt_ensemble", pairs=60, **options), {}
    for name, texts in lists.items():
        topic = f"{concept}: a " if concept else ""
        all80 = [t.replace("{}", topic + name.replace("_", " ")) for t in openai]
        drawn[name] = tuple(all80.index(text) for text in texts)
    assert len(set(drawn.values())) == 1
    order = drawn["cat"]
    assert list(order) == sorted(order) and len(order) == 120 and len(set(order)) < 80
    alone = sentences(tiny_clip, "waffle", **options)
    both = sentences(tiny_clip, "waffle_and_prompt_ensemble", **options)
    facts = sentences(tiny_clip, "gpt_descriptions_and_prompt_ensemble", **options)
    texts = {t.replace("{}", topic + "cat") for t in openai}
    for lists, part in [
        (both, alone),
        (facts, published("gpt_descriptions", 0, 4, concept)),
    ]:
        more = Counter(lists["cat"]) - Counter(part["cat"])
        assert more.total() == 8 and set(more) <= texts
        assert len(lists["cat"]) == len(part["cat"]) + 8


def test_waffleclip_counts_names_as_they_are_spelt(tiny_clip):
    """Food101's and OxfordPets' official names have blanks, Places365's some
    underscores, which are letters of one long word.
    """

    def groups(names):
        method = WaffleCLIP.from_official(
            tiny_clip, names, {"mode": "waffle", "rep": 0}
        )
        text = method.sentences()[0][1]
        parts = text.removesuffix(".").split(", which ")[1].split(" ", 1)[1].split(", ")
        return [len(part) for part in parts]

    assert groups(["apple pie", "baby ribs"]) == [3, 3]  # longest 5, 4: 5 + 1
    assert groups(["apple_pie", "baby_ribs"]) == [10]  # longest 9: 9 + 1
    assert groups(["apple_pie", "baby ribs"]) == [8]  # half a blank; 6.5: 7 + 1
    assert groups(["pug"]) == [4]


def test_waffleclip_draws_from_the_list_with_its_repetitions(tiny_clip):
    facts = {"a": ["same"] * 9 + ["rare"], "b": ["same"] * 10}
    for mode in ("random_descriptions", "shared_random_descriptions"):
        method = WaffleCLIP(tiny_clip, ["a", "b"], mode=mode, descriptors=facts)
        for drawn in method.sentences():
            assert len(drawn) == 10 and sum("same" in text for text in drawn) >= 9


def test_waffleclip_keeps_the_sentences_of_classes_it_aims_at(tiny_clip):
    """Draws run over all that is described; a half of the classes keeps its own."""
    whole = waffle(tiny_clip, "random_descriptions", repetition=1)
    half = waffle(tiny_clip, "random_descriptions", names=["cat"], repetition=1)
    at = sorted(DESCRIBED).index("cat")
    assert half.sentences()[0] == whole.sentences()[at]


def test_waffleclip_repetitions_follow_the_seed(tiny_clip):
    for seed in range(1, 8):
        method = build("waffleclip", tiny_clip, NAMES, seed=seed, pairs=2)
        same = WaffleCLIP(tiny_clip, NAMES, pairs=2, repetition=seed - 1)
        assert method.sentences() == same.sentences()


def test_waffleclip_texts_around_name_and_descriptor(tiny_clip):
    options = {
        "mode": "gpt_descriptions",
        "descriptors": {"a_b": ["round"]},
        "label_before_text": "A sketch of ",
        "descriptor_separator": "; ",
        "label_after_text": "!",
    }
    one = WaffleCLIP.from_official(tiny_clip, ["a_b"], options)
    assert one.sentences() == [["A sketch of a b; which has round!"]]
    merged = {"merge_predictions": True, "aggregate": "max"}
    assert WaffleCLIP.from_official(tiny_clip, ["a_b"], merged).aggregate == "merge"


def test_waffleclip_takes_the_papers_concepts(tiny_clip):
    for dataset, said in {
        "eurosat": "A photo of a land use: a ",
        "food101": "A photo of a food: a ",
        "oxford_pets": "A photo of a breed: a ",
        "dtd": "A photo of a ",
    }.items():
        toy = replace(toy_dataset(tiny_clip), name=dataset)
        method = build("waffleclip", tiny_clip, NAMES, concept=None)
        method.aim(toy)
        assert method.sentences()[0][0].startswith(f"{said}{method.classnames[0]}, ")
        plain = build("waffleclip", tiny_clip, NAMES)  # without a concept
        plain.aim(toy)
        assert plain.sentences()[0][0].startswith(f"A photo of a {NAMES[0]}, ")


# --- options that act or are refused --------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (
            "coop",
            {"init": "a photo of a", "n_ctx": 16},
            "n_ctx must be the number of w",
        ),
        (
            "coop",
            {"init": "a photo", "class_specific": True},
            "class_specific must",
        ),
        ("coop", {"init": "a [CLS] photo", "position": "front"}, "two places"),
        ("cocoop", {"n_ctx": 16}, "n_ctx must be the number of words.*, 4;"),
        ("kgcoop", {"n_ctx": 16}, "n_ctx must be the number of words"),
        ("kgcoop", {"class_specific": True}, "class_specific must be False"),
        ("prograd", {"class_specific": True}, "class_specific must be False"),
        ("maple", {"n_ctx": 5, "init": "a b c d e"}, "at most 4 where init"),
        ("maple", {"init": "a [CLS] photo"}, "leave .CLS. out"),
        ("kgcoop", {"template": []}, "template must be one sentence or more"),
        ("kgcoop", {"template": ["a {}.", "b"]}, "template must be one sentence or"),
        ("ivlp", {"n_ctx": 5, "init": "a b c d e"}, "at most 4 where init"),
        ("ivlp", {"depth": 0, "n_ctx": 2}, "n_ctx must be left out"),
        ("ivlp", {"depth": 0, "init": "a photo"}, "init must be left out"),
        ("ivlp", {"depth_vision": 0, "n_ctx_vision": 2}, "n_ctx_vision must be left"),
        ("tpt", {"augmix": False, "severity": 3.0}, "severity must be left out"),
        ("tpt", {"severity": 0.0}, "severity must be from 0.1 to 10"),
        ("tpt", {"host": {"n_ctx": 8}}, "n_ctx must be the number of words"),
        ("waffleclip", {"mode": "clip", "pairs": 3}, "does not read pairs"),
        ("waffleclip", {"budget": 2}, "mode 'waffle' does not read budget"),
        ("waffleclip", {"mode": "waffle_and_gpt", "pairs": 1}, "pairs must be at lea"),
        ("waffleclip", {"mode": "waffle_characters", "words": ["x"]}, "not read words"),
    ],
)
def test_an_override_acts_or_is_refused(tiny_clip, spec, options, message):
    with pytest.raises(InputError, match=message):
        build(spec, tiny_clip, NAMES, **options)


def test_lengths_follow_from_the_words_or_are_given(tiny_clip):
    for spec, options, length in [
        ("coop", {}, 16),
        ("coop", {"init": "a photo of a"}, 4),
        ("coop", {"init": "a photo of a", "n_ctx": 4}, 4),
        ("cocoop", {}, 4),
        ("cocoop", {"init": ""}, 4),
        ("cocoop", {"init": "", "n_ctx": 7}, 7),
        ("kgcoop", {"init": ""}, 4),
        ("prograd", {}, 16),
        ("maple", {"n_ctx": 5}, 5),
    ]:
        method = build(spec, tiny_clip, NAMES, **options)
        assert method.context.vectors.shape[-2] == length, spec
    own = build("kgcoop", tiny_clip, NAMES, init="", class_specific=True)
    assert own.context.vectors.shape[:2] == (len(NAMES), 4)


def test_official_options_load_as_the_official_code_does(tiny_clip):
    """Words win over the configured length and over class-specific contexts."""
    options = {"N_CTX": 16, "CTX_INIT": "a photo of a", "CSC": True}
    coop = CoOp.from_official(tiny_clip, NAMES, options | {"PREC": "fp16"})
    assert coop.context.vectors.shape == (4, tiny_clip.width)
    free = CoOp.from_official(tiny_clip, NAMES, options | {"CTX_INIT": None})
    assert free.context.vectors.shape == (len(NAMES), 16, tiny_clip.width)
    kgcoop = KgCoOp.from_official(
        tiny_clip, NAMES, options | {"CTX_INIT": True, "DATASET": "EuroSAT"}
    )
    assert kgcoop.option("template") == "a centered satellite photo of {}."
    texture = {"dataset": "DescribableTextures", "CTX_INIT": True, "CSC": True}
    prograd = ProGrad.from_official(tiny_clip, NAMES, texture)
    assert prograd.option("template") == "a texture of {}."
    with pytest.raises(
        InputError, match="unknown official dataset 'EuroSATT'.*EuroSAT"
    ):
        KgCoOp.from_official(tiny_clip, NAMES, {"DATASET": "EuroSATT"})
    for name, cls in methods().items():
        if not cls.plugin:
            with pytest.raises(InputError, match=f"hyperparameter of {name} 'N_CTZ'"):
                cls.from_official(tiny_clip, NAMES, {"N_CTZ": 1})
    with pytest.raises(InputError, match="hyperparameter of tpt 'tta_step'.*tta_steps"):
        TPT.from_official(tiny_clip, NAMES, {"tta_step": 1})


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("coop", "N_CTX CSC CLASS_TOKEN_POSITION PREC"),
        ("textrefiner(coop)", "BALANCE ALPHA MEMORY_SIZE MOMENTUM TOPK DISTILL"),
        ("promptsrc", "n_ctx_text gpa_mean gpa_std max_epoch text_loss_weight loss"),
        ("mma", "text_template text_ctx adapter_dim adapter_scale adapter_end"),
        ("pomp", "class_token_position K EPT local_correction"),
        ("caspl(coop)", "kd_weight temperature n_boost_text n_boost_vision"),
        ("argue", "reg_weight neg_weight noise correction_w finetune_visual_ln"),
        ("kapt", "n_ctx bottleneck heads head"),
        ("awt", "n_views sinkhorn_eps learnable_scale visual image_temperature"),
        ("logoprompt", "K bounded place class_specific_context"),
        ("waffleclip", "mode aggregate waffle_count label_after_text"),
        ("atprompt(coop)", "one_token attributes n_att"),
    ],
)
def test_an_official_option_that_is_none_is_not_given(spec, options, tiny_clip):
    empty = from_official(spec, tiny_clip, NAMES, dict.fromkeys(options.split()))
    assert empty.hparams == from_official(spec, tiny_clip, NAMES, {}).hparams


def test_initial_words_that_are_none_are_none(tiny_clip):
    words = {"CTX_INIT": None}
    assert from_official("kgcoop", tiny_clip, NAMES, words).hparams["init"] == ""
    assert from_official("prograd", tiny_clip, NAMES, words).hparams["words"] is False
    with pytest.raises(InputError, match="has no '#'"):
        from_official("apex", tiny_clip, NAMES, {"ctx_init": None})


def test_official_names_in_other_capitals(tiny_clip):
    make = partial(from_official, clip=tiny_clip, classnames=NAMES)
    prompts = {"N_CTX_TEXT": 3, "N_CTX_VISION": 2, "PROMPT_DEPTH_TEXT": 2}
    for spec in ("ivlp", "promptsrc"):
        method = make(spec, hyperparameters=prompts | {"CTX_INIT": "a photo of a"})
        assert method.hparams["n_ctx"] == 3 and method.hparams["n_ctx_vision"] == 2
        assert method.hparams["depth"] == 2 and method.hparams["init"] == "a photo of a"
    assert make("mma", hyperparameters={"ADAPTER_START": 2}).hparams["start"] == 2
    with pytest.raises(InputError, match="unknown official hyperparameter.*'N_CTZ'"):
        make("coop", hyperparameters={"N_CTZ": None})


def test_official_options_that_say_nothing_are_ignored(tiny_clip):
    for spec in ("kgcoop", "prograd", "promptsrc", "ivlp", "clip", "dept(cocoop)"):
        from_official(spec, tiny_clip, NAMES, {"PREC": "fp16"})
    plain = {"CSC": False, "CLASS_TOKEN_POSITION": "end", "N_CTX": 2}
    for spec in ("cocoop", "dept(cocoop)"):
        from_official(spec, tiny_clip, NAMES, plain)
        for other in ({"CSC": True}, {"CLASS_TOKEN_POSITION": "front"}):
            with pytest.raises(InputError, match=f"{[*other][0]} must be .*{spec[:4]}"):
                from_official(spec, tiny_clip, NAMES, plain | other)


def test_an_official_dataset_stands_for_clip_s_template(tiny_clip):
    named = {"dataset": "OxfordPets"}
    method = from_official("clip", tiny_clip, NAMES, named | {"template": None})
    assert method.templates == ["a photo of a {}, a type of pet."]
    own = from_official("clip", tiny_clip, NAMES, named | {"template": "{}."})
    assert own.templates == ["{}."]


def test_ivlp_in_one_tower(tiny_clip):
    """Deep language prompting, and deep vision prompting, whose classes are frozen."""
    language = {
        "n_ctx_vision": 4,
        "n_ctx_text": 4,
        "ctx_init": "a photo of a",
        "prompt_depth_vision": 0,
        "prompt_depth_text": 2,
    }
    text = IVLP.from_official(tiny_clip, NAMES, language)
    assert len(text.vision) == 0 and len(text.deep) == 1 and text.reads == "features"
    vision = IVLP(tiny_clip, NAMES, n_ctx_vision=8, depth=0, depth_vision=2)
    assert vision.context is None and [len(p) for p in vision.vision] == [8, 8]
    zero_shot = build("clip", tiny_clip, NAMES)
    torch.testing.assert_close(vision.text_features(), zero_shot.text_features())
    long = IVLP.from_official(tiny_clip, NAMES, {"n_ctx_text": 6, "ctx_init": "a b"})
    assert long.context.vectors.shape[0] == 6  # the words are dropped


def test_promptsrc_tells_a_plain_loss_from_its_own(tiny_clip):
    plain = PromptSRC.from_official(tiny_clip, NAMES, {"loss": "cross-entropy"})
    assert not any(plain.weights) and plain.averaging == "last"
    own = {"loss": "its own", "text_loss_weight": 25, "gpa_mean": 6, "gpa_std": 10}
    whole = PromptSRC.from_official(tiny_clip, NAMES, own)
    assert whole.weights == (25, 10.0, 1.0) and whole.averaging == "gaussian"
    assert (whole.gpa_mean, whole.gpa_std) == (6 / 20, 10 / 20)
    short = PromptSRC.from_official(tiny_clip, NAMES, own | {"max_epoch": 40})
    assert (short.gpa_mean, short.gpa_std) == (6 / 40, 10 / 40)


def test_promptsrc_averages_a_plugin_s_parameters_too(tiny_clip):
    """What a plug-in adds is averaged with the prompts that it was trained with."""
    host = {"templates": ["a {}."], "gpa_mean": 0.5, "gpa_std": 0.4}
    method = build("dept(promptsrc)", tiny_clip, NAMES, host=host)
    plan, seen = Recipe(epochs=4), []
    for epoch in range(4):
        with torch.no_grad():
            for p in method.parameters():
                p += epoch + 1
        seen.append([p.detach().clone() for p in method.parameters()])
        method.end_epoch(epoch, plan)
    weights = method.host.epoch_weights(4).float()
    for n, p in enumerate(method.parameters()):
        mean = sum(w * epoch[n] for w, epoch in zip(weights, seen, strict=True))
        torch.testing.assert_close(p.detach(), mean)
        assert not torch.allclose(p.detach(), seen[-1][n])


# --- TPT ------------------------------------------------------------------------------


def test_tpt_places_the_class_name_as_the_published_code_does(tiny_clip):
    cases = [
        ({"ctx_init": "a_photo_of_a"}, "end", 4, None),
        ({"ctx_init": "a photo of [CLS] outside"}, "middle", 4, 3),
        (
            {
                "ctx_init": "a photo of outside",
                "split_idx": 1,
                "class_token_position": "middle",
            },
            "middle",
            4,
            1,
        ),
        ({"ctx_init": None, "n_ctx": 6}, "end", 6, None),
        ({"n_ctx": 5, "class_token_position": "middle"}, "middle", 5, 2),
        ({}, "end", 4, None),
    ]
    for options, position, length, half in cases:
        context = TPT.from_official(tiny_clip, NAMES, options).host.context
        assert (context.position, context.length) == (position, length)
        assert half is None or context._half == half
    split = {"ctx_init": "a photo of a", "split_idx": 1}  # the name ends the prompt
    assert TPT.from_official(tiny_clip, NAMES, split).host.context.position == "end"
    with pytest.raises(InputError, match="split_idx must be left out"):
        bare = {"split_idx": 1, "class_token_position": "middle"}
        TPT.from_official(tiny_clip, NAMES, bare)
    with pytest.raises(InputError, match="learned_cls"):
        TPT.from_official(tiny_clip, NAMES, {"learned_cls": True})
    with pytest.raises(InputError, match="unknown host"):
        TPT.from_official(tiny_clip, NAMES, {}, host="kgcoop")


def test_tpt_over_coop_has_four_vectors():
    plan = recipe("tpt(coop)", Setting("few-shot", "dtd", 16, "full"))
    assert plan.hparams == {"host": {"n_ctx": 4}}
    plan = recipe("tpt(coop)", Setting("cross-dataset", "imagenet", 16, "full"))
    assert plan.hparams == {"host": {"init": "a photo of a"}}


@pytest.mark.parametrize("severity", [1, 3, 10])
def test_augmix_distorts_by_its_severity(severity):
    """Levels are uniform from 0.1 to the severity, and whole numbers are cut off."""
    image = Image.fromarray(
        np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)
    )
    for seed in range(5):
        level = np.random.RandomState(seed).uniform(0.1, severity)
        bits = 4 - int(level * 4 / 10)
        posterized = OPERATIONS["posterize"](
            image, severity, np.random.RandomState(seed)
        )
        mask = (0xFF << (8 - bits)) & 0xFF
        assert np.array_equal(np.asarray(posterized), np.asarray(image) & mask)
        limit = 256 - int(level * 256 / 10)
        solarized = OPERATIONS["solarize"](image, severity, np.random.RandomState(seed))
        pixels = np.asarray(image)
        expected = np.where(pixels < limit, pixels, 255 - pixels)
        assert np.array_equal(np.asarray(solarized), expected)


def test_tpt_views_have_its_severity(tiny_clip):
    pixels = torch.arange(3 * 40 * 40).reshape(3, 40, 40).remainder(251).byte()
    made = {}
    for severity in (1.0, 10.0):
        method = build("tpt", tiny_clip, NAMES, views=6, augmix=True, severity=severity)
        views = method.views([pixels], torch.Generator().manual_seed(3))
        seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(3)))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            rng = np.random.RandomState(seed)
            expected = image_views(image, 6, 32, True, rng, severity)
        torch.testing.assert_close(tiny_clip.denormalize(views)[0], expected)
        made[severity] = views
    assert not torch.allclose(made[1.0][0, 1:], made[10.0][0, 1:])
    torch.testing.assert_close(made[1.0][0, 0], made[10.0][0, 0])  # the image itself


# --- DePT on shifted versions ---------------------------------------------------------


@pytest.mark.filterwarnings("ignore:class name")
def test_dept_takes_the_source_rows_of_equal_names(tiny_clip, tmp_path):
    """ImageNet has two classes "missile"; a shift that holds the second says so."""
    names = ["missile", "cat", "missile", "dog"]
    method = build("dept(coop)", tiny_clip, names)
    image = torch.randn(5, tiny_clip.embed_dim)
    whole = method.classifier(method.film_image(image))
    base = toy_dataset(tiny_clip)
    for rows, told in [([2, 3], True), ([0, 3], True), ([0, 3], False)]:
        shifted = replace(
            base,
            classnames=[names[row] for row in rows],
            source_rows=rows if told else None,
        )
        method.aim(shifted)
        torch.testing.assert_close(method.cat(image, None), whole[:, rows])
    method.set_classes(names)  # all of them, each by its own row
    torch.testing.assert_close(method.cat(image, None), whole)
    other = replace(base, classnames=["cat", "teapot"], source_rows=[1, 7])
    method.aim(other)  # rows of another source, and a class that is unknown here
    assert method.rows is None
    path = method.save(tmp_path / "dept.safetensors")
    assert load_method(path, tiny_clip).rows is None


# --- deep prompts go where the context stands -----------------------------------------


@pytest.mark.parametrize("spec", ["maple", "ivlp"])
def test_deep_prompts_replace_the_context_where_it_starts(tiny_clip, spec):
    """Two other tokens before the context move what the deep prompts replace."""
    method = build(spec, tiny_clip, NAMES, n_ctx=2, depth=2)
    context = method.context
    before = tiny_clip.embed(tiny_clip.encode("colour shape"))
    n, plain = len(before), context.pattern
    context.pattern = lambda names: [n, *plain(names)]
    context.slot = 1
    context.set_classes(context.template.classnames)
    assert context.start == 1 + n
    context.prompt = lambda vectors=None: context.template(before, context.vectors)

    prompt = context.prompt()
    x = (
        prompt.full()[0]
        + tiny_clip.model.positional_embedding[: prompt.full().shape[2]]
    )
    mask = tiny_clip.model.attn_mask[: x.shape[1], : x.shape[1]]
    for i, block in enumerate(tiny_clip.model.transformer.resblocks):
        if i == 1:
            x = torch.cat(
                [
                    x[:, : 1 + n],
                    method.deep[0].expand(len(x), -1, -1),
                    x[:, 3 + n :],
                ],
                dim=1,
            )
        x = block(x, attn_mask=mask)
    x = tiny_clip.model.ln_final(x)
    eot = prompt.eot + prompt.prefix.shape[1]
    expected = x[torch.arange(len(x)), eot] @ tiny_clip.model.text_projection
    torch.testing.assert_close(method.text_features(), expected, rtol=1e-3, atol=1e-4)


# --- what was published ---------------------------------------------------------------


def test_every_recipe_names_the_run_that_it_follows():
    told = {name: getattr(cls, "published", {}) for name, cls in methods().items()}
    told = {name: runs for name, runs in told.items() if runs}
    assert len(told) >= 11
    for name, published in told.items():
        assert set(published) == set(PROTOCOLS), name
        for run in published.values():
            assert run.source and run.notes
    runs = methods()["prograd"].published
    assert runs["base-to-new"].beside("RN50", 4) == ""
    apart = runs["base-to-new"].beside("ViT-B-16", 16)
    assert "RN50 and 4 shots" in apart and "ViT-B-16 and 16 shots" in apart
    quick = methods()["maple"].published["base-to-new"]
    assert quick.beside("ViT-B-16-quickgelu", 16) == ""
    assert "no such run" in methods()["maple"].published["few-shot"].beside("x", 1)


def test_logits_follow_new_options(tiny_clip):
    """Options reach the logits: an ensemble of another size, other descriptors."""
    images = torch.randn(2, 3, 32, 32)
    batch = Batch(images=images)
    plain = WaffleCLIP(tiny_clip, NAMES, mode="prompt_ensemble", pairs=2, repetition=0)
    other = WaffleCLIP(tiny_clip, NAMES, mode="prompt_ensemble", pairs=3, repetition=0)
    assert not torch.allclose(plain.logits(batch), other.logits(batch))
    texts = [text for texts in plain.sentences() for text in texts]
    features = F.normalize(tiny_clip.encode_text(texts), dim=-1)
    mean = features.view(len(NAMES), 4, -1).mean(1)
    image = F.normalize(tiny_clip.encode_image(images), dim=-1)
    expected = tiny_clip.logit_scale * image @ mean.T
    torch.testing.assert_close(plain.logits(batch), expected, rtol=1e-4, atol=1e-4)
