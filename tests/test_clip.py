"""Loading, refusing, tokenising and encoding."""

import copy
import json
import pickle

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import promptkit
from promptkit.clip import FrozenCLIP, check_classnames, load_clip, zero_shot_features
from promptkit.errors import InputError, unknown

TEXTS = [
    "a photo of a dog.",
    "a photo of a cat, a type of pet",
    "dog",
    "a photo of a dog.",
    "",
    "Été ☀ 2024!",
]


def test_encode_text_is_exact(tiny_clip):
    oracle = tiny_clip.model.encode_text(open_clip.tokenize(TEXTS))
    features = tiny_clip.encode_text(TEXTS)
    assert_close(features, oracle, rtol=1e-5, atol=2e-5)
    assert torch.equal(features[0], features[3]) and not features.requires_grad
    assert_close(tiny_clip.encode_text("dog"), features[2:3])
    assert tiny_clip.encode_text([]).shape == (0, 24)


def test_encode_text_shares_beginnings(tiny_clip, monkeypatch):
    """Each sentence once; each template's beginning once; the rows are a fraction of 77
    a text.
    """
    import promptkit.towers as towers

    names = [f"{word} {i}" for word in ("red", "blue", "striped") for i in range(10)]
    texts = [
        t.format(n)
        for t in ("a photo of a large {}.", "itap of the very best {}.")
        for n in names
    ] * 2
    oracle = tiny_clip.model.encode_text(open_clip.tokenize(texts))
    rows, plain = [], towers.mlp
    monkeypatch.setattr(
        towers,
        "mlp",
        lambda x, *args: rows.append(x[..., 0].numel()) or plain(x, *args),
    )
    assert_close(tiny_clip.encode_text(texts), oracle, rtol=1e-5, atol=2e-5)
    assert (
        max(rows) < 60 * 6 and sum(rows) < 60 * 3 * 6
    )  # 60 sentences of 8 to 10 tokens, 3 layers


def test_tokenize(tiny_clip):
    ids = tiny_clip.tokenize(TEXTS)
    longest = max(len(tiny_clip.encode(text)) for text in TEXTS) + 2
    assert ids.shape == (6, longest)
    assert torch.equal(ids, open_clip.tokenize(TEXTS)[:, :longest])
    assert tiny_clip.tokenize("dog").tolist() == [
        [49406, *tiny_clip.encode("dog"), 49407]
    ]
    assert tiny_clip.embed(ids).shape == (6, longest, 32)
    with pytest.raises(
        InputError,
        match="'very very .*' takes 82 tokens, but the model reads at most 77",
    ):
        tiny_clip.tokenize(["dog", "very " * 80])
    with pytest.raises(InputError, match="takes 82 tokens"):
        tiny_clip.encode_text(["very " * 80])
    with pytest.raises(InputError, match="must be a string, not 3"):
        tiny_clip.encode_text([3])


def test_zero_shot(tiny_clip):
    names, templates = (
        ["golden_retriever", "pug", "dog", "pug"],
        ["a photo of a {}.", "itap of the {}.", "{}"],
    )
    features = zero_shot_features(tiny_clip, names, templates)
    each = []
    for template in templates:
        texts = [template.format(name.replace("_", " ")) for name in names]
        each.append(
            F.normalize(tiny_clip.model.encode_text(open_clip.tokenize(texts)), dim=-1)
        )
    assert_close(
        features, F.normalize(torch.stack(each).mean(0), dim=-1), rtol=1e-5, atol=1e-5
    )
    assert_close(
        zero_shot_features(tiny_clip, names, templates[0]),
        each[0],
        rtol=1e-5,
        atol=1e-5,
    )
    assert promptkit.zero_shot_features is zero_shot_features
    for bad in ("a photo", [], ["{}", 3]):
        with pytest.raises(InputError, match="template"):
            zero_shot_features(tiny_clip, names, bad)


def test_classnames():
    assert check_classnames(("a_b", "c")) == ["a b", "c"]
    assert check_classnames(["a", "a"], allow_duplicates=True) == ["a", "a"]
    for bad, message in (
        ([], "the list of class names is empty"),
        (["dog", ""], "class name 1 is empty"),
        (["_"], "class name 0 is empty"),
        (["a b", "c", "a_b"], "'a b' appears twice, at positions 0 and 2"),
        (["dog", None], "class name 1 must be a string, not None"),
        ("dog", "must be a list of strings, not the string 'dog'"),
    ):
        with pytest.raises(InputError, match=message):
            check_classnames(bad)


def test_attributes(tiny_clip):
    assert (tiny_clip.width, tiny_clip.vision_width, tiny_clip.embed_dim) == (
        32,
        32,
        24,
    )
    assert (tiny_clip.context_length, tiny_clip.image_size, tiny_clip.name) == (
        77,
        32,
        "tiny",
    )
    assert (
        tiny_clip.logit_scale.shape == ()
        and abs(tiny_clip.logit_scale.item() - 100) < 1e-3
    )
    assert (
        tiny_clip.mean == open_clip.OPENAI_DATASET_MEAN
        and tiny_clip.dtype == torch.float32
    )
    assert not any(p.requires_grad for p in tiny_clip.parameters())
    tiny_clip.train()
    assert not any(module.training for module in tiny_clip.modules())


def test_fingerprint(tiny_clip, make_clip):
    assert (
        len(tiny_clip.fingerprint) == 64
        and make_clip().fingerprint == tiny_clip.fingerprint
    )
    others = [
        make_clip(1),
        make_clip(quick_gelu=False),
        make_clip(mean=(0, 0, 0)),
        make_clip(precision="bf16"),
    ]
    assert len({clip.fingerprint for clip in [tiny_clip, *others]}) == 5


def test_fingerprint_of_other_resizing(tiny_clip, make_clip):
    """It belongs to the features, and CLIP's own leaves the fingerprint as it was."""
    plain = make_clip(interpolation="bicubic", resize_mode="shortest")
    squash = make_clip(resize_mode="squash")
    bilinear = make_clip(interpolation="bilinear")
    assert plain.fingerprint == tiny_clip.fingerprint
    assert len({c.fingerprint for c in (plain, squash, bilinear)}) == 3
    with pytest.raises(InputError, match="unknown resize mode 'longest'; .*squash"):
        make_clip(resize_mode="longest")
    with pytest.raises(InputError, match="unknown interpolation 'nearest'"):
        make_clip(interpolation="nearest")


def test_copies_are_the_same_clip(tiny_clip):
    assert copy.deepcopy(tiny_clip) is copy.copy(tiny_clip) is tiny_clip
    held = copy.deepcopy({"clip": tiny_clip, "other": [1]})
    assert held["clip"] is tiny_clip
    with pytest.raises(InputError, match="cannot be sent to another process"):
        pickle.dumps(tiny_clip)
    mini = load_clip("mini", device="cpu")
    sent = pickle.dumps(mini)
    assert len(sent) < 1000  # where it is to be had, not its weights
    assert pickle.loads(sent).fingerprint == mini.fingerprint
    with pytest.raises(InputError, match="the weights of 'mini' are .* here"):
        pickle.loads(sent.replace(mini.fingerprint.encode(), b"0" * 64))
    again = load_clip(**mini.source, device="cpu")
    assert again.fingerprint == mini.fingerprint
    assert json.loads(json.dumps(mini.source)) == mini.source


def test_moving_and_converting(make_clip, monkeypatch):
    """A device changes the default budget; a conversion of the dtype is refused."""
    clip, own = make_clip(), make_clip(budget=123456)
    before = clip.encode_text(TEXTS)
    monkeypatch.setattr("promptkit.clip._memory", lambda device: 7 << 20)
    for each, budget in ((clip, 7 << 20), (own, 123456)):
        assert each.to("cpu") is each
        assert each.text_tower.budget == each.image_tower.budget == budget
    assert torch.equal(clip.encode_text(TEXTS), before)
    assert clip.float() is clip and clip.fingerprint == make_clip().fingerprint
    half = make_clip(precision="fp16")
    for convert in (clip.half, clip.double, half.float, clip.bfloat16, half.half):
        with pytest.raises(InputError, match="precision of a CLIP is chosen when it"):
            convert()
    assert clip.dtype == torch.float32 and half.dtype == torch.float16


def test_bad_images(tiny_clip):
    for images in (
        torch.zeros(2, 3, 16, 16),
        torch.zeros(3, 32, 32),
        torch.zeros(2, 1, 32, 32),
    ):
        with pytest.raises(InputError, match=r"images must be \(B, 3, 32, 32\)"):
            tiny_clip.image(images)
    with pytest.raises(InputError, match="normalised"):
        tiny_clip.encode_image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


# Loading

VISION = dict(layers=1, width=32, head_width=16, patch_size=8, image_size=32)
TEXT = dict(width=32, heads=2, layers=1)


@pytest.mark.parametrize(
    "vision, text, message",
    [
        (dict(pool_type="avg"), {}, "does not read the class token"),
        (dict(attentional_pool=True), {}, "does not read the class token"),
        (dict(qk_norm=True), {}, "blocks are CustomResidualAttentionBlock"),
        ({}, dict(no_causal_mask=True), "text tower is not causal"),
        ({}, dict(pool_type="last"), "reads 'last' rather than EOT"),
        ({}, dict(vocab_size=1000), "tokenizer has more entries than the 1000"),
    ],
)
def test_unsupported_architectures(vision, text, message):
    model = open_clip.CLIP(24, VISION | vision, TEXT | text)
    with pytest.raises(InputError, match=message):
        FrozenCLIP(model)


def test_other_text_towers_are_refused():
    model = open_clip.model.CustomTextCLIP(24, VISION, TEXT)
    with pytest.raises(
        InputError,
        match="CustomTextCLIP has a text tower of another kind; use .* ViT-B-16",
    ):
        FrozenCLIP(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("ViT-B-15", "openai"), "unknown model 'ViT-B-15'; did you mean 'ViT-B-16'"),
        (("ViTB16", "openai"), "did you mean .*'ViT-B-16'"),
        (("minni",), "did you mean 'mini'"),
        (("ViT-B-16", "opnai"), "'opnai'; did you mean 'openai'"),
        (("ViT-B-16",), "needs weights: pass a checkpoint file or one of openai, "),
        (
            ("ViT-B-16", "no/such/file.pt"),
            "weights file 'no/such/file.pt' does not exist",
        ),
        (
            ("ViT-B-16", "gone.safetensors"),
            "weights file 'gone.safetensors' does not exist",
        ),
        (
            ("convnext_base", "laion400m_s13b_b51k"),
            "'convnext_base' cannot serve: its image tower is timm's",
        ),
        (
            ("roberta-ViT-B-32", "laion2b_s12b_b32k"),
            "cannot serve: .*; use a CLIP with a ViT",
        ),
        (("ViT-B-16-SigLIP", "webli"), "cannot serve"),
        (("mini", "openai"), "comes with its weights"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(InputError, match=message):
        load_clip(*arguments)
    with pytest.raises(InputError, match="unknown precision 'fp8'; .*fp32, bf16, fp16"):
        load_clip("ViT-B-16", "openai", precision="fp8")


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("ViT-B-16", "openai"), {"like": "laion400m_e32"}, "leave out like="),
        (("ViT-B-16", "openai"), {"quickgelu": False}, "leave out quickgelu=False"),
        (("ViT-B-16", "w.pt"), {"like": "opnai"}, "did you mean 'openai'"),
        (("mini",), {"like": "openai"}, "leave out like='openai'"),
        (("mini",), {"quickgelu": True}, "leave out quickgelu=True"),
    ],
)
def test_options_of_files_are_for_files(arguments, options, message):
    with pytest.raises(InputError, match=message):
        load_clip(*arguments, **options)


def test_openai_weights_want_quick_gelu(monkeypatch, make_clip):
    """The tag, not the name, decides about the activation."""
    asked = {}

    def create_model(name, pretrained, **kwargs):
        asked.update(kwargs)
        return make_clip().model

    monkeypatch.setattr(open_clip, "create_model", create_model)
    clip = load_clip("ViT-B-16", "openai", device="cpu")
    assert asked["force_quick_gelu"]
    assert clip.source == {
        "name": "ViT-B-16",
        "pretrained": "openai",
        "precision": "fp32",
        "like": None,
        "quickgelu": None,
    }
    load_clip("ViT-B/16", "laion2b_s34b_b88k", device="cpu")
    assert not asked["force_quick_gelu"]
    other = load_clip("ViT-L-14", "laion2b_s32b_b82k", device="cpu")
    assert other.mean == other.std == (0.5, 0.5, 0.5)
    assert (other.interpolation, other.resize_mode) == ("bicubic", "shortest")
    assert load_clip("ViT-H-14", "dfn5b", device="cpu").resize_mode == "squash"

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(open_clip, "create_model", fail)
    with pytest.raises(
        InputError,
        match="weights 'openai' of model 'ViT-B-16' could not be loaded: no network",
    ):
        load_clip("ViT-B-16", "openai")


def test_unknown():
    assert (
        str(unknown("method", "cop", ["coop", "maple"]))
        == "unknown method 'cop'; did you mean 'coop'? Choose from: coop, maple"
    )
    assert (
        str(unknown("method", "zzz", ["coop", "maple"]))
        == "unknown method 'zzz'; choose from: coop, maple"
    )
    many = [f"model-{i}" for i in range(100)]
    assert "(100 in all)" in str(unknown("model", "zzz", many))
    assert "did you mean 'model-77'" in str(unknown("model", "Model-77", many))
    assert issubclass(InputError, ValueError)
