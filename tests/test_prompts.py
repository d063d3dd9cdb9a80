"""Prompts hold the right tokens in the right places, for any class names."""

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from promptkit.errors import InputError
from promptkit.methods.apex import APEX
from promptkit.prompts import Context, Template, assemble, overwriting_context
from promptkit.towers import plain_text

NAMES = ["golden retriever", "pug", "St.", "Jack-O-Lantern"]
SOS, EOT = 49406, 49407


def rows(prompt, group=0):
    """The sequences of a prompt without padding: a list of (n, D)."""
    full, P = prompt.full()[group], prompt.prefix.shape[1]
    return [full[c, : P + eot + 1] for c, eot in enumerate(prompt.eot.tolist())]


def embedded(clip, *parts):
    """SOS, parts (text or vectors), EOT: (n, D)."""
    parts = [
        clip.embed(clip.encode(part)) if isinstance(part, str) else part
        for part in parts
    ]
    return torch.cat([clip.embed([SOS]), *parts, clip.embed([EOT])])


def published(clip, vectors, name, position, words=""):
    """The sequence as CoOp's code builds it: the sentence is tokenised as a whole, the
    vectors replace its first tokens, and the name is as long as the name alone.
    """
    M = len(vectors)
    tail = clip.encode(f"{words or ' '.join('X' * M)} {name}.")[M:]
    n, half = len(clip.encode(name)), M // 2
    name, rest = clip.embed(tail[:n]), clip.embed(tail[n:])
    parts = {
        "end": [vectors, name, rest],
        "middle": [vectors[:half], name, vectors[half:], rest],
        "front": [name, vectors, rest],
    }[position]
    return embedded(clip, *parts)


def test_end_middle_front(tiny_clip):
    """The layouts of CoOp; with an odd length the longer half follows the name."""
    for position in ("end", "middle", "front"):
        context = Context(tiny_clip, NAMES, 5, position=position)
        v = context.vectors
        assert v.shape == (5, 32)
        for name, row in zip(NAMES, rows(context.prompt()), strict=True):
            expected = published(tiny_clip, v, name, position)
            assert_close(row, expected, rtol=0, atol=0)
    assert Context(tiny_clip, NAMES, 5).prompt().prefix.shape == (1, 6, 32)
    assert Context(tiny_clip, NAMES, 5, position="middle").prompt().prefix.shape == (
        1,
        3,
        32,
    )


def test_class_specific(tiny_clip):
    for position in ("end", "middle", "front"):
        context = Context(tiny_clip, NAMES, 4, position=position, class_specific=True)
        assert context.vectors.shape == (4, 4, 32)
        for name, v, row in zip(
            NAMES, context.vectors, rows(context.prompt()), strict=True
        ):
            expected = published(tiny_clip, v, name, position)
            assert_close(row, expected, rtol=0, atol=0)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_vectors_of_groups(tiny_clip, position):
    """Contexts of an image, and of an image and class, stand where the learned ones
    would.
    """
    context = Context(tiny_clip, NAMES, 4, position=position)
    for shape in ((3, 1, 4, 32), (3, 4, 4, 32)):
        vectors = torch.randn(shape)
        prompt = context.prompt(vectors)
        assert len(prompt.prefix) == 3
        for g in range(3):
            for c, row in enumerate(rows(prompt, g)):
                alone = context.prompt(vectors[g, c if shape[1] > 1 else 0])
                assert_close(row, rows(alone)[c], rtol=0, atol=0)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("shape", [(), (1, 1), (2, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("names", [NAMES, ["pug", "cat", "dog", "owl"]])
def test_some_classes_alone(tiny_clip, position, shape, names):
    """As in the whole, in the order that is asked for, also twice."""
    context = Context(tiny_clip, names, 5, position=position)
    vectors = torch.randn(*shape, 5, 32)
    chosen = torch.tensor([3, 0, 3])
    whole, some = context.prompt(vectors), context.prompt(vectors, chosen)
    for group in range(len(whole.prefix)):
        expected = [rows(whole, group)[c] for c in chosen.tolist()]
        for row, wanted in zip(rows(some, group), expected, strict=True):
            assert_close(row, wanted, rtol=0, atol=0)
    own = Context(tiny_clip, names, 5, position=position, class_specific=True)
    expected = tiny_clip.text(own.prompt())[0, chosen]
    assert_close(tiny_clip.text(own.prompt(classes=chosen))[0], expected)


def test_words(tiny_clip):
    context = Context(tiny_clip, NAMES, words="a photo of a")
    assert context.vectors.shape == (4, 32) and not context.class_specific
    with pytest.raises(InputError, match="shared by all classes"):
        Context(tiny_clip, NAMES, words="a photo of a", class_specific=True)
    oracle = tiny_clip.encode_text([f"a photo of a {name}." for name in NAMES])
    assert_close(tiny_clip.text(context.prompt())[0], oracle)
    assert_close(
        Context(tiny_clip, NAMES, words="a_photo_of_a").vectors, context.vectors
    )
    assert Context(tiny_clip, NAMES, 3, words="").vectors.shape == (3, 32)


def test_words_of_several_tokens(tiny_clip):
    """As many words as vectors; further tokens stay fixed behind the context, so the
    sentence is whole.
    """
    words = "an itap-style photograph"
    ids = tiny_clip.encode(words)
    assert len(ids) > 3
    context = Context(tiny_clip, NAMES, words=words)
    assert context.vectors.shape == (3, 32)
    for name, row in zip(NAMES, rows(context.prompt()), strict=True):
        assert_close(row, embedded(tiny_clip, f"{words} {name}."), rtol=0, atol=0)
    for position in ("front", "middle"):  # the name takes the tokens left over
        context = Context(tiny_clip, NAMES, words=words, position=position)
        for name, row in zip(NAMES, rows(context.prompt()), strict=True):
            expected = published(tiny_clip, context.vectors, name, position, words)
            assert_close(row, expected, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_overwritten_words_are_counted_in_tokens(tiny_clip, n):
    """Of three words and more tokens the first n tokens learn, as MaPLe's and APEX's
    published code slices them, and the sentence is whole.
    """
    words = "an itap-style photograph"
    ids = tiny_clip.encode(words)
    assert len(words.split()) < 4 < len(ids)
    contexts = [
        overwriting_context(tiny_clip, NAMES, n, words),
        APEX(tiny_clip, NAMES, n_ctx=n, template=words + " {}.").context,
    ]
    for context in contexts:
        assert_close(context.vectors, tiny_clip.embed(ids[:n]), rtol=0, atol=0)
        for name, row in zip(NAMES, rows(context.prompt()), strict=True):
            assert_close(row, embedded(tiny_clip, f"{words} {name}."), rtol=0, atol=0)


def test_more_learned_tokens_than_words_run_into_the_name(tiny_clip):
    """As MaPLe's published code slices the tokenised words and the tokenised prompt."""
    words, n = "a photo", 4
    padded = tiny_clip.tokenizer(words)[0]
    context = overwriting_context(tiny_clip, NAMES, n, words)
    start = tiny_clip.embed(padded[1 : 1 + n].tolist())
    assert_close(context.vectors, start, rtol=0, atol=0)
    for names in (NAMES, ["a harbour at dusk", "sea"]):
        context.set_classes(names)
        for name, row in zip(names, rows(context.prompt()), strict=True):
            expected = embedded(tiny_clip, f"{words} {name}.").clone()
            expected[1 : 1 + n] = context.vectors.detach()
            assert_close(row, expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="4 learned tokens, of which the initial"):
        overwriting_context(tiny_clip, ["sea"], n, "a")


def test_random_initialisation(tiny_clip):
    first, second = (
        Context(
            tiny_clip, NAMES, 16, std=0.02, generator=torch.Generator().manual_seed(3)
        ).vectors
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert abs(first.std().item() - 0.02) < 0.003 and abs(first.mean().item()) < 0.003
    assert not torch.equal(first, Context(tiny_clip, NAMES, 16).vectors)


def test_state_holds_the_vectors_alone(tiny_clip):
    context = Context(tiny_clip, NAMES)
    assert list(context.state_dict()) == ["vectors"]
    assert [name for name, _ in context.named_parameters()] == ["vectors"]


def test_set_classes(tiny_clip):
    context = Context(tiny_clip, NAMES, 4)
    before = rows(context.prompt())
    context.set_classes(["red_panda", *NAMES])
    after = rows(context.prompt())
    assert len(after) == 5
    for a, b in zip(before, after[1:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(after[0], embedded(tiny_clip, context.vectors, "red panda."))
    specific = Context(tiny_clip, NAMES, 4, class_specific=True)
    specific.set_classes(NAMES)
    for others in (NAMES[:2], NAMES[::-1]):
        with pytest.raises(InputError, match="class-specific context of 4 classes"):
            specific.set_classes(others)


def test_segments_of_every_kind(tiny_clip):
    """Attributes between learned tokens, texts of each class, token ids: as one
    sentence.
    """
    a, b, c = torch.randn(2, 32), torch.randn(4, 1, 32), torch.randn(3, 32)
    ids = torch.tensor(tiny_clip.encode("shape"))
    texts = ["a dog", "a dog", "a street", "a lamp made of a pumpkin"]
    prompt = assemble(
        tiny_clip, NAMES, [a, "color", b, ids, "{}, which is", texts, c, "."]
    )
    # The comma joins the class name's own punctuation: "St.," is tokenised as a whole.
    for i, (name, row) in enumerate(zip(NAMES, rows(prompt), strict=True)):
        expected = embedded(
            tiny_clip, a, "color", b[i], "shape", f"{name}, which is", texts[i], c, "."
        )
        assert_close(row, expected, rtol=0, atol=0)
    assert prompt.prefix.shape == (1, 4, 32)  # SOS, a, "color": b differs by class


def test_prompt_without_names(tiny_clip):
    prompt = assemble(tiny_clip, ["one", "two"], ["a photo"])
    assert prompt.prefix.shape == (1, 3, 32) and prompt.suffix.shape == (2, 1, 32)
    assert_close(tiny_clip.text(prompt)[0], tiny_clip.encode_text(["a photo"] * 2))


def test_template_is_reused(tiny_clip):
    """A step only concatenates: the suffix of a shared context at the end is one
    constant tensor.
    """
    template = Template(tiny_clip, NAMES, [3, "{}."])
    first, second = template(torch.zeros(3, 32)), template(torch.ones(3, 32))
    assert first.suffix is second.suffix and first.eot is second.eot


def test_gradients_reach_every_slot(tiny_clip):
    a, b = (
        torch.randn(2, 32, requires_grad=True),
        torch.randn(4, 3, 32, requires_grad=True),
    )
    prompt = assemble(tiny_clip, NAMES, [a, "{}", b, a, "."])
    oracle = plain_text(
        tiny_clip.model, prompt.full()[0], prompt.eot + prompt.prefix.shape[1]
    )
    weights = torch.randn_like(oracle)
    ours = torch.autograd.grad(
        tiny_clip.text(prompt)[0], (a, b), weights, retain_graph=True
    )
    plain = torch.autograd.grad(oracle, (a, b), weights)
    for x, y in zip(ours, plain, strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())


names = st.text(min_size=1, max_size=30).filter(
    lambda s: s.replace("_", " ").strip()
) | st.sampled_from(
    [
        "737-800",
        "Jack-O-Lantern",
        "d'Artagnan's",
        "café crème",
        "東京タワー",
        "🙂🙂",
        "a_b",
        "&amp;",
        "...",
        "x" * 30,
    ]
)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(names, min_size=1, max_size=5),
    st.sampled_from(["end", "middle", "front"]),
    st.integers(1, 5),
)
def test_any_names(tiny_clip, classnames, position, length):
    """Any names at any position: the features of the plain pass over the tokens of
    their sentences.
    """
    try:
        context = Context(tiny_clip, classnames, length, position=position)
    except InputError as error:
        assert "tokens" in str(error)
        return
    prompt = context.prompt()
    ours = tiny_clip.text(prompt)[0]
    texts = [name.replace("_", " ") for name in classnames]
    for text, row, feature in zip(texts, rows(prompt), ours, strict=True):
        expected = published(tiny_clip, context.vectors, text, position)
        assert_close(row, expected, rtol=0, atol=0)
        oracle = plain_text(
            tiny_clip.model, expected[None], torch.tensor([len(expected) - 1])
        )[0]
        assert_close(feature, oracle, rtol=1e-4, atol=1e-4)


ODD = ["St.", "kite (bird)", "C++", "what?", "737-800", "a.b.", "x)", "No. 9", "!"]


@pytest.mark.parametrize("position", ["end", "middle", "front"])
@pytest.mark.parametrize("words", ["", "a photo of a"])
def test_names_that_end_in_punctuation(tiny_clip, position, words):
    """The name's last mark and the full stop are one token, which stays with the
    name.
    """
    context = Context(tiny_clip, ODD, 4, words=words, position=position)
    for name, row in zip(ODD, rows(context.prompt()), strict=True):
        expected = published(tiny_clip, context.vectors, name, position, words)
        assert_close(row, expected, rtol=0, atol=0)
    joint = tiny_clip.encode("St..")
    assert len(joint) == 2 == len(tiny_clip.encode("St."))
    if position != "end":
        first = 1 if position == "front" else 3
        row = rows(context.prompt())[0]
        assert_close(row[first : first + 2], tiny_clip.embed(joint), rtol=0, atol=0)
        assert len(row) == 1 + 4 + 2 + 1  # SOS, context, name with its marks, EOT


@pytest.mark.parametrize("ending", ["{}, a type of pet.", "{} texture.", "{}"])
def test_other_endings(tiny_clip, ending):
    context = Context(tiny_clip, NAMES, words="a photo of a", ending=ending)
    texts = [f"a photo of a {ending.replace('{}', name)}" for name in NAMES]
    oracle = tiny_clip.encode_text(texts)
    assert_close(tiny_clip.text(context.prompt())[0], oracle, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="ending must hold"):
        Context(tiny_clip, NAMES, ending="a name.")
    with pytest.raises(InputError, match="must begin with .* 'front'"):
        Context(tiny_clip, NAMES, position="front", ending="the {}.")


def test_where_learned_tokens_start(tiny_clip):
    template = Template(tiny_clip, NAMES, [2, "color", 3, "{}", 1, "."])
    color = len(tiny_clip.encode("color"))
    assert template.starts == [1, 3 + color, None]  # names differ in length
    same = Template(tiny_clip, ["cat", "dog"], ["{}", 2, "."])
    assert same.starts == [2]
    for position, start in (("end", 1), ("middle", 1), ("front", None)):
        assert Context(tiny_clip, NAMES, 4, position=position).start == start
    assert Context(tiny_clip, ["cat", "dog"], 4, position="front").start == 2
    alone = Context(tiny_clip, ["cat", "dog"], 1, position="middle")
    assert alone.start == 2  # the half before the name is empty

    class Attributed(Context):
        """ATPrompt's: other learned tokens and an attribute before the context."""

        slot = 1

        def pattern(self, names):
            return [2, "color", *super().pattern(names)]

    assert Attributed(tiny_clip, NAMES, 4).start == 3 + color


def test_truncation_on_request(tiny_clip):
    long = "a very " * 60 + "long name"
    pattern = [4, "{}."]
    with pytest.raises(InputError, match="takes .* tokens"):
        Template(tiny_clip, ["dog", long], pattern)
    template = Template(tiny_clip, ["dog", long], pattern, truncate=True)
    v = torch.randn(4, 32)
    dog, cut = rows(template(v))
    assert_close(dog, embedded(tiny_clip, v, "dog."), rtol=0, atol=0)
    kept = tiny_clip.embed(tiny_clip.encode(long)[: 77 - 2 - 4])
    assert_close(cut, embedded(tiny_clip, v, kept), rtol=0, atol=0)
    with pytest.raises(InputError, match="takes"):  # learned tokens are never cut
        Template(tiny_clip, [long], ["{}", 4, "."], truncate=True)


@settings(max_examples=20, deadline=None)
@given(st.lists(names, min_size=1, max_size=5))
def test_any_sentence(tiny_clip, classnames):
    """A template around any name, tokenised jointly, is open_clip's own encoding of the
    sentence.
    """
    texts = [
        "a photo of a {}, a type of pet.".replace("{}", name.replace("_", " "))
        for name in classnames
    ]
    try:
        prompt = assemble(tiny_clip, classnames, ["a photo of a {}, a type of pet."])
    except InputError as error:
        assert "tokens" in str(error)
        return
    oracle = tiny_clip.model.encode_text(open_clip.tokenize(texts))
    assert_close(tiny_clip.text(prompt)[0], oracle, rtol=1e-4, atol=1e-4)
    assert_close(tiny_clip.encode_text(texts), oracle, rtol=1e-4, atol=1e-4)


def test_name_too_long(tiny_clip):
    long = "a very " * 30 + "long name"
    with pytest.raises(
        InputError, match=r"'a very a very .*\.\.\.' takes 81 tokens.* at most 77"
    ):
        Context(tiny_clip, ["dog", long], 16)
    fits = "very " * 70
    Context(tiny_clip, ["dog", fits], 4)  # SOS, 4, 70, ".", EOT
    with pytest.raises(InputError, match="takes 78 tokens"):
        Context(tiny_clip, ["dog", fits], 5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(position="back"), "unknown position 'back'; .*end, middle, front"),
        (dict(length=0), "at least one token, not length=0"),
    ],
)
def test_bad_contexts(tiny_clip, arguments, message):
    with pytest.raises(InputError, match=message):
        Context(tiny_clip, NAMES, **arguments)


def test_bad_names(tiny_clip):
    for bad, message in (
        ([], "empty"),
        (["dog", " "], "class name 1 is empty"),
        ("dog", "not the string"),
        ([1], "not 1"),
    ):
        with pytest.raises(InputError, match=message):
            Context(tiny_clip, bad)
    with pytest.raises(InputError, match="contains a marker"):
        assemble(tiny_clip, NAMES, ["a <end_of_text> b", "{}"])


def test_bad_segments(tiny_clip):
    v = torch.randn(3, 32)
    for segments, message in (
        ([v[:, :8], "{}."], "must be .3, 32., .4, 3, 32."),
        ([v.expand(2, -1, -1), "{}."], "not .2, 3, 32."),
        ([v, ["one", "two"]], "2 texts for 4 classes"),
        ([None, "{}."], "not None"),
    ):
        with pytest.raises(InputError, match=message):
            assemble(tiny_clip, NAMES, segments)
    with pytest.raises(InputError, match="1 learned segments, but 0"):
        Template(tiny_clip, NAMES, [3, "{}."])()
