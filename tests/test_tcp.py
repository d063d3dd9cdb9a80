"""What TCP's paper says of it, against computations of its own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.errors import InputError
from promptkit.methods.tcp import TCP
from promptkit.recipe import Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES, batch_of, few_steps, toy_dataset

CLEAN = [name.replace("_", " ") for name in NAMES]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def batch(tiny_clip):
    return batch_of(toy_dataset(tiny_clip), tiny_clip)


def by_hand(method, layers, weights):
    """Class features by open_clip's own blocks over all positions at once."""
    model, n = method.clip.model, method.meta_net.n
    prompt = method.text_prompt()
    x = prompt.full()[0]  # (C, n, D)
    x = x + model.positional_embedding[: x.shape[1]]
    for layer, block in enumerate(model.transformer.resblocks):
        for at, weight in zip(layers, weights, strict=True):
            if at == layer:
                mixed = weight * method.class_tokens() + (1 - weight) * x[:, 1 : 1 + n]
                x = torch.cat([x[:, :1], mixed, x[:, 1 + n :]], dim=1)
        length = x.shape[1]
        x = block(x, attn_mask=model.attn_mask[:length, :length])
    rows = torch.arange(len(x))
    x = model.ln_final(x)[rows, prompt.prefix.shape[1] + prompt.eot]
    return x @ model.text_projection


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": 0, "insert_weight": 0.3},
        {"layer": [0, 2], "insert_weight": [1.0, 0.5], "n_tokens": 2},
        {"n_tokens": 5, "ending": "that is seen as {}, a toy"},
    ],
)
def test_tokens_take_the_contexts_place_inside_the_tower(tiny_clip, options):
    method = build("tcp", tiny_clip, NAMES, **options)
    layers, weights = zip(*method.inserted, strict=True)
    with torch.no_grad():
        expected = by_hand(method, layers, weights)
    torch.testing.assert_close(method.text_features(), expected, rtol=1e-4, atol=1e-5)


def test_it_reduces_to_its_host(tiny_clip, batch):
    """Without weight nothing goes in; the penalty is KgCoOp's."""
    context = {"n_ctx": 4, "init": "a photo of a"}
    plain = build("coop", tiny_clip, NAMES, **context)
    idle = build(
        "tcp", tiny_clip, NAMES, host=context, insert_weight=0.0, kg_weight=0.0
    )
    torch.testing.assert_close(idle.loss(batch), plain.loss(batch))
    torch.testing.assert_close(idle.logits(batch), plain.logits(batch))
    held = build("kgcoop", tiny_clip, NAMES)
    both = build("tcp", tiny_clip, NAMES, host=context, insert_weight=0.0)
    torch.testing.assert_close(both.loss(batch), held.loss(batch))


def test_a_class_has_tokens_made_from_its_own_name(tiny_clip):
    method = build("tcp", tiny_clip, NAMES)
    tokens = method.class_tokens()
    g = F.normalize(
        tiny_clip.encode_text([f"a photo of a {n}." for n in CLEAN]), dim=-1
    )
    net = method.meta_net
    h = g @ net.linear1.weight.T + net.linear1.bias
    h = (h * torch.sigmoid(1.702 * h)) @ net.linear2.weight.T + net.linear2.bias
    expected = h.view(len(NAMES), 4, tiny_clip.width)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)
    method.set_classes([NAMES[2], "teapot"])
    torch.testing.assert_close(
        method.class_tokens()[0], tokens[2], rtol=1e-4, atol=1e-5
    )


def test_its_own_context_learns_and_a_file_keeps_it(tiny_clip, batch, tmp_path):
    dataset = toy_dataset(tiny_clip)
    start = build("tcp", tiny_clip, NAMES)
    method, _ = few_steps("tcp", tiny_clip, dataset, epochs=2)
    for name, p in method.named_parameters():
        assert not torch.equal(p, dict(start.named_parameters())[name]), name
    assert not any(p.requires_grad for p in build("tpt", tiny_clip, NAMES).parameters())
    loaded = load_method(method.save(tmp_path / "tcp.safetensors"), tiny_clip)
    assert loaded.spec == "tcp" and loaded.n_parameters == method.n_parameters
    assert torch.equal(loaded.logits(batch), method.logits(batch))


def test_sentences_follow_the_dataset(tiny_clip):
    dataset = replace(toy_dataset(tiny_clip), name="ucf101")
    method = build("tcp", tiny_clip, NAMES)
    method.aim(dataset)
    lengths = [4 + len(tiny_clip.encode(f"person doing {name}.")) + 2 for name in CLEAN]
    assert method.context.template.lengths == lengths
    expected = tiny_clip.encode_text([f"a photo of a person doing {n}." for n in CLEAN])
    torch.testing.assert_close(method.anchor, F.normalize(expected, dim=-1))


def test_recipes_differ_by_dataset_and_host():
    epochs = {
        dataset: recipe("tcp", Setting("base-to-new", dataset, 16, "full")).epochs
        for dataset in ("sun397", "imagenet", "dtd")
    }
    assert epochs == {"sun397": 25, "imagenet": 25, "dtd": 50}
    setting = Setting("base-to-new", "dtd", 16, "full")
    over = recipe("tcp(kgcoop)", setting)
    assert over.batch_size == 128 and over.hparams["kg_weight"] == 0


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("tcp", {"layer": 3}, "layer must be blocks from 0 to 2"),
        ("tcp", {"layer": [1, 1]}, "layer"),
        ("tcp", {"layer": [0, 1], "insert_weight": [1.0]}, "insert_weight"),
        ("tcp", {"insert_weight": 1.5}, "insert_weight"),
        ("tcp", {"n_tokens": 5}, "n_tokens must be at most the 4 tokens"),
        ("tcp", {"ending": "a toy"}, "ending"),
        ("tcp", {"host": {"position": "front"}}, "before the class name"),
        ("tcp(coop)", {"ending": "{}, a toy."}, "leave ending out"),
        ("tcp(clip)", {}, "before the class name"),
    ],
)
def test_bad_options(tiny_clip, spec, options, message):
    with pytest.raises(InputError, match=message):
        build(spec, tiny_clip, NAMES, **options)


def test_official_templates_and_datasets(tiny_clip):
    def of(**options):
        method = TCP.from_official(tiny_clip, NAMES, options)
        return method.option("template"), method.context.ending, method.context.length

    pets = {"DATASET": "OxfordPets"}
    assert of(**pets) == (
        "a photo of a {}, a type of pet.",
        "{}, a type of pet.",
        4,
    )
    given = {"TEMPLATE": "X X X X {}.", "FROZEN_TEMPLATE": "a {}.", "N_CTX": 2}
    assert of(**pets, **given) == ("a {}.", "X X {}.", 2)
    person = {"TEMPLATE": "a photo of a person doing {}.", "CTX_INIT": True}
    assert of(**person)[1:] == ("person doing {}.", 4)
    for bad, message in (
        ({"TEMPLATE": "X {}."}, "N_CTX must be at most the 1 words"),
        ({"CSC": True}, "CSC"),
        ({"KG_WEIGTH": 1.0}, "KG_WEIGHT"),
    ):
        with pytest.raises(InputError, match=message):
            of(**bad)
