"""What the reconstruction of KAPT says of itself."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from promptkit.errors import InputError
from promptkit.method import Batch
from promptkit.registry import build, load_method
from promptkit.testing import NAMES, batch_of, few_steps, toy_dataset

CLEAN = [name.replace("_", " ") for name in NAMES]
SAID = {
    "red square": ["A square with four equal sides."],
    "green_circle": ["It is round, without any corner;", "the whole rim is green."],
    "blue star": ["Five-pointed and very blue."],
    "an old, grey teapot": ["A pot for tea with a handle and a spout."],
    "pug": "A small dog with a wrinkled face.",
}
SHORT = ["sides equal", "round rim", "", "handle spout", "wrinkled dog"]
GIVEN = {"descriptions": SAID, "summaries": dict(zip(NAMES, SHORT, strict=True))}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPTKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def dataset(tiny_clip):
    return replace(toy_dataset(tiny_clip), descriptions=SAID)


@pytest.fixture
def batch(tiny_clip, dataset):
    return batch_of(dataset, tiny_clip)


def stirred(method):
    """Away from the start, where half of it is zero."""
    with torch.no_grad():
        for p in method.parameters():
            p.normal_(0, 0.3, generator=torch.Generator().manual_seed(p.numel()))
    return method


def test_at_first_it_is_clip_with_a_summary(tiny_clip, batch):
    method = build("kapt", tiny_clip, NAMES, **GIVEN)
    with torch.no_grad():
        word = tiny_clip.embed(tiny_clip.encode("X"))
        method.context.vectors.copy_(word.expand(4, -1))
    pairs = zip(SHORT, CLEAN, strict=True)
    text = tiny_clip.encode_text([f"{short} X X X X {name}." for short, name in pairs])
    torch.testing.assert_close(method.text_features(), text, rtol=1e-4, atol=1e-5)
    cosine = F.normalize(batch.features, dim=-1) @ F.normalize(text, dim=-1).T
    expected = tiny_clip.logit_scale * cosine
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("head", ["pooled", "per_class"])
def test_cues_are_attention_over_all_visual_tokens(tiny_clip, batch, head):
    """Against torch's own attention."""
    method = stirred(build("kapt", tiny_clip, NAMES, heads=4, head=head, **GIVEN))
    with torch.no_grad():
        Z, text = method.eval().features(batch)
        g = F.normalize(text, dim=-1)
        cls, local, _ = tiny_clip.image(batch.images, tokens=True, attention=True)
        torch.testing.assert_close(Z, torch.cat([cls[:, None], local], 1))
        own = method.head
        width, keys = Z.shape[-1], Z.transpose(0, 1)
        cue, _ = F.multi_head_attention_forward(
            g[:, None].expand(-1, len(Z), -1), keys, keys, width, 4, None,
            torch.zeros(3 * width), None, None, False, 0.0, own.out, None,
            use_separate_proj_weight=True, q_proj_weight=own.q, k_proj_weight=own.k,
            v_proj_weight=own.v,
        )  # fmt: skip
        cue = cue.transpose(0, 1)  # (B, C, E)
        z = cls[:, None] + (cue.mean(1, keepdim=True) if head == "pooled" else cue)
        expected = tiny_clip.logit_scale * (F.normalize(z, dim=-1) * g).sum(-1)
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-4, atol=1e-3)


def test_the_score_of_a_class_depends_on_the_others_where_cues_are_pooled(
    tiny_clip, batch
):
    for head, depends in (("pooled", True), ("per_class", False), ("none", False)):
        method = stirred(build("kapt", tiny_clip, NAMES, head=head, **GIVEN))
        before = method.logits(batch)[:, :2]
        method.set_classes(NAMES[:2])
        same = torch.allclose(method.logits(batch), before, rtol=1e-3, atol=1e-3)
        assert same != depends, head


def test_a_class_is_described_by_its_own_texts(tiny_clip, batch):
    """Swapped texts swap the tokens made from them; without texts there are none."""
    method = stirred(build("kapt", tiny_clip, NAMES, descriptions=SAID, discrete=False))
    texts = list(SAID.values())
    swapped = dict(zip(SAID, texts[::-1], strict=True))
    other = build("kapt", tiny_clip, NAMES, descriptions=swapped, discrete=False)
    other.load_state_dict(method.state_dict())
    torch.testing.assert_close(other.vectors(), method.vectors().flip(0))
    assert not torch.allclose(other.logits(batch), method.logits(batch), atol=0.1)
    plain = build("kapt", tiny_clip, NAMES, head="none")
    assert plain.summary == [""] * len(NAMES) and plain.knowledge == CLEAN


def test_summaries_are_short_and_leave_the_name_out(tiny_clip):
    method = build("kapt", tiny_clip, NAMES, descriptions=SAID)
    assert method.summary[0] == "equal sides"  # of "A square with four equal sides."
    assert method.summary[1] == "round corner rim"
    long = {"pug": [" ".join(f"word{i}" for i in range(60))] * 3}
    with pytest.warns(UserWarning, match="nothing is said of 'red square' and 3"):
        method = build("kapt", tiny_clip, NAMES, descriptions=long)
    assert 0 < len(tiny_clip.encode(method.summary[-1])) <= 20
    assert torch.isfinite(
        method.described
    ).all()  # its text is longer than the tower reads
    given = {"pug": " ".join(["tail"] * 100)}
    method = build("kapt", tiny_clip, ["pug"], descriptions=SAID, summaries=given)
    assert method.context.template.lengths == [tiny_clip.context_length]


def test_texts_follow_the_dataset_and_a_file(tiny_clip, dataset, batch, tmp_path):
    method, _ = few_steps("kapt", tiny_clip, dataset, epochs=1)
    blind = method.logits(batch)
    method.aim(dataset)
    assert not torch.allclose(method.logits(batch), blind, atol=1e-3)
    loaded = load_method(method.save(tmp_path / "kapt.safetensors"), tiny_clip)
    assert loaded.summary == method.summary
    assert torch.equal(loaded.logits(batch), method.logits(batch))


def test_cached_tokens_serve_as_well_as_images(tiny_clip, batch):
    method = stirred(build("kapt", tiny_clip, NAMES, **GIVEN))
    image, local, _ = tiny_clip.image(batch.images, tokens=True, attention=True)
    cached = Batch(features=image, tokens=local)
    torch.testing.assert_close(method.logits(cached), method.logits(batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "heads must be a divisor of the 24"),
        ({"n_ctx": 0}, "n_ctx"),
        ({"bottleneck": 0}, "bottleneck"),
        ({"scale": 0.0}, "scale"),
        ({"descriptions": {"pug": [3]}}, "descriptions"),
        ({"n_ctx": 76}, "takes .* tokens"),
    ],
)
def test_bad_options(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("kapt", tiny_clip, NAMES, **options)
