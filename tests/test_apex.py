"""APEX's own statements."""

import pytest
import torch
import torch.nn.functional as F

from promptkit.errors import InputError
from promptkit.export import export_program
from promptkit.method import Batch
from promptkit.methods.apex import APEX, transfer_difficulty
from promptkit.recipe import Setting
from promptkit.registry import build, load_method, recipe
from promptkit.testing import NAMES, toy_dataset

NEW = ["teapot", "pug", "a violin"]  # pug is a trained one


@pytest.fixture
def batch():
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(images=images, labels=torch.tensor([0, 3, 1, 4]))


def moved(clip, **options):
    """A method whose parameters are far from where they started."""
    options = {
        "beta": 9.0,
        "threshold": 1e-4,
    } | options  # texts of a tiny CLIP are near
    method = build("apex", clip, NAMES, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return method.eval()


def parts(method, batch):
    """w~, w~ A + b, z, z', and alpha by the paper's words."""
    clip = method.clip
    with torch.no_grad():
        before = clip.text(method.context.prompt(), method.text_edit())[0]
        z = clip.image(batch.images, method.image_prompt(), method.image_edit())
    sentences = [
        [method.template.replace("{}", name) for name in names]
        for names in (method.trained_on, method.classnames)
    ]
    seen, now = (F.normalize(clip.encode_text(texts), dim=-1) for texts in sentences)
    alpha = []
    for w in now:
        cosines = seen @ w
        far = 1 - cosines.max() > method.threshold
        alpha.append(torch.exp(-method.beta * (1 - cosines.mean())) if far else 1.0)
    after = before @ method.matrix.detach() + method.bias.detach()
    return before, after, z, clip.encode_image(batch.images), torch.tensor(alpha)


@pytest.mark.parametrize("ensemble", ["both", "text", "image", "none"])
def test_new_classes_are_mixed_by_their_distance(tiny_clip, batch, ensemble):
    method = moved(tiny_clip, ensemble=ensemble)
    method.set_classes(NEW)
    before, after, z, frozen, alpha = parts(method, batch)
    assert alpha[1] == 1 and (alpha[[0, 2]] < 1).all()
    torch.testing.assert_close(method.mixing[0], alpha)
    a = alpha[:, None] if ensemble in ("both", "text") else 1.0
    share = alpha.mean() if ensemble in ("both", "image") else 1.0
    text = F.normalize(a * after + (1 - a) * before, dim=-1)
    image = F.normalize(share * z + (1 - share) * frozen, dim=-1)
    expected = tiny_clip.logit_scale * image @ text.T
    torch.testing.assert_close(method.logits(batch), expected, rtol=1e-4, atol=1e-3)


def test_trained_classes_are_those_of_the_trained_model(tiny_clip, batch):
    method, plain = moved(tiny_clip), moved(tiny_clip, ensemble="none")
    assert (method.mixing[0] == 1).all() and method.mixing[1] == 1
    assert torch.equal(method.logits(batch), plain.logits(batch))
    with torch.no_grad():
        assert torch.equal(method.train()(batch), method.eval()(batch))
    method.set_classes(NEW)
    trained = method.train()(batch)
    assert not torch.allclose(trained, method.logits(batch))  # no ensemble in training


def test_at_first_and_without_prompts_it_is_zero_shot(tiny_clip, batch):
    method = build("apex", tiny_clip, NAMES, depth_vision=0)
    plain = build("clip", tiny_clip, NAMES)
    torch.testing.assert_close(method.logits(batch), plain.logits(batch))
    assert method.reads == method.reads_at_test == "features"
    assert {name for name, _ in method.named_parameters()} == {
        "context.vectors",
        "matrix",
        "bias",
    }


def test_a_fixed_alpha_is_that_of_every_class(tiny_clip, batch):
    frozen = moved(tiny_clip, alpha=0.0, depth_vision=2)
    before, _, _, image, _ = parts(frozen, batch)
    expected = F.normalize(image, dim=-1) @ F.normalize(before, dim=-1).T
    torch.testing.assert_close(
        frozen.logits(batch), 100 * expected, rtol=1e-4, atol=1e-3
    )
    half = moved(tiny_clip, alpha=0.5)
    half.set_classes(NEW)
    assert half.mixing[0].tolist() == [0.5] * 3


def test_cached_features_save_a_pass(tiny_clip, batch, monkeypatch):
    method = moved(tiny_clip)
    method.set_classes(NEW)
    expected = method.logits(batch)
    features = tiny_clip.encode_image(batch.images)
    monkeypatch.setattr(type(tiny_clip), "encode_image", None)
    cached = method.logits(Batch(images=batch.images, features=features))
    torch.testing.assert_close(cached, expected)


def test_it_remembers_the_trained_classes_and_exports(tiny_clip, batch, tmp_path):
    method = moved(tiny_clip)
    method.set_classes(NEW)
    loaded = load_method(method.save(tmp_path / "m.safetensors"), tiny_clip)
    assert torch.equal(loaded.logits(batch), method.logits(batch))
    program = export_program(loaded).module()
    torch.testing.assert_close(
        program(batch.images), method.logits(batch), rtol=0, atol=1e-3
    )
    method.begin(NEW)  # trained on these from now on
    assert method.mixing[1] == 1


def test_the_first_words_of_the_template_learn(tiny_clip):
    template = "a big photo of the {}, a type of pet."
    method = build("apex", tiny_clip, NAMES, n_ctx=3, depth=2, template=template)
    words = tiny_clip.embed(tiny_clip.encode("a big photo"))
    assert torch.equal(method.context.vectors, words)
    with torch.no_grad():
        method.deep[0].copy_(0.5 + method.deep[0])
    again = build("apex", tiny_clip, NAMES, n_ctx=3, depth=1, template=template)
    texts = [template.replace("{}", name) for name in method.classnames]
    oracle = tiny_clip.encode_text(texts)
    torch.testing.assert_close(again.text_features(), oracle, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(method.text_features(), oracle, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_ctx": 5}, "n_ctx must be at most the 4 tokens"),
        ({"n_ctx": 0}, "n_ctx must be at least 1"),
        ({"template": "{} here"}, "n_ctx must be at most the 0 tokens"),
        ({"template": "a photo"}, "template must be one sentence"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"depth_vision": 3}, "depth must be from 0 to the 2 blocks"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"threshold": -0.1}, "threshold must be at least 0"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1"),
    ],
)
def test_bad_options(tiny_clip, options, message):
    with pytest.raises(InputError, match=message):
        build("apex", tiny_clip, NAMES, **options)


def test_official_options(tiny_clip):
    options = {"n_ctx_text": 1, "depth_text": 2, "ctx_init": "a sketch of #, drawn."}
    options |= {"depth_vision": 1, "n_ctx_vision": 5, "beta": 2, "threshold": 0.1}
    method = APEX.from_official(tiny_clip, NAMES, options)
    assert method.template == "a sketch of {}, drawn." and len(method.deep) == 1
    assert [tuple(p.shape) for p in method.vision] == [(5, 32)]
    assert (method.beta, method.threshold) == (2, 0.1)
    for text in ("a photo of a", "", None):
        with pytest.raises(InputError, match="has no '#' where"):
            APEX.from_official(tiny_clip, NAMES, {"ctx_init": text})


def test_recipes():
    base = recipe("apex", Setting("base-to-new", "dtd", 16, "full"))
    assert (base.optimizer, base.lr, base.epochs) == ("adadelta", 0.15, 15)
    assert (base.warmup_lr, base.weight_decay, base.batch_size) == (0.01, 1e-3, 16)
    assert recipe("apex", Setting("base-to-new", "imagenet", 16, "full")).epochs == 5
    far = recipe("apex", Setting("cross-dataset", "imagenet", 16, "full"))
    assert far.hparams == {"depth_vision": 3} and not far.augment


def test_transfer_difficulty():
    """Precisions of 2/3, 1 and, never predicted, 0."""
    labels, predicted = [0, 0, 1, 1, 2], [0, 0, 1, 0, 1]
    assert transfer_difficulty(labels, predicted, 3) == pytest.approx(
        1 / 3 / ((2 / 3 + 1 / 2 + 0) / 3)
    )
    perfect = torch.arange(4)
    assert transfer_difficulty(perfect, perfect, 4) == pytest.approx(1 / 4)
    assert transfer_difficulty([0, 1], [1, 0], 2) == float("inf")


def test_training_has_no_ensemble(tiny_clip, batch):
    dataset = toy_dataset(tiny_clip)
    method = build("apex", tiny_clip, dataset.classnames, alpha=0.3).train()
    image, text = method.features(batch)
    z = tiny_clip.image(batch.images, method.image_prompt(), method.image_edit())
    torch.testing.assert_close(image, z)
    torch.testing.assert_close(text, super(APEX, method).text_features())  # A is one
