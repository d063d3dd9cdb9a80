"""Checks of fixtures of kind "own": a function for a method and part, never for a file.

Parts without a function of their own go to the one of part ``None``.
"""

import re
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_protocol import check_benchmark
from compare import close, close_features, close_gradient, close_ids
from PIL import Image
from seeded import seeded, seeded_images
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2.functional import pil_to_tensor

from promptkit.method import Batch
from promptkit.methods.clip import CLIP
from promptkit.methods.tpt import TPT
from promptkit.recipe import Recipe
from promptkit.registry import from_official
from promptkit.views import OPERATIONS, image_views


def check_clip(clip, fixture, arrays):
    """Zero-shot logits and features, of one template and of an ensemble."""
    options, names = fixture["hyperparameters"], fixture["classnames"]
    images = described_images(fixture)
    single = from_official("clip", clip, names, options)
    checked = {"": single}
    if options.get("ensemble_templates"):
        checked["_ensemble"] = CLIP(clip, names, template=options["ensemble_templates"])
    done = [
        close(method.logits(images), arrays, f"logits{suffix}")
        + close(method.text_features(), arrays, f"text_features{suffix}", atol=1e-5)
        for suffix, method in checked.items()
    ]
    image = torch.nn.functional.normalize(single.image_features(images), dim=-1)
    done.append(close(image, arrays, "image_features", atol=1e-5))
    assert any(done), "the fixture has none of the arrays that clip is checked by"
    spoken = [name.replace("_", " ") for name in names]
    tokens = clip.tokenize([single.templates[0].replace("{}", n) for n in spoken])
    close_ids(tokens.tolist(), arrays, "tokens")
    close(tokens.argmax(dim=-1), arrays, "eot", rtol=0, atol=0)


def described_images(fixture):
    """The image batch of a fixture that names it as a dict or as the call that makes
    it.
    """
    described = fixture["images"]
    if isinstance(described, str):
        name = re.search(r"seeded_images\(\W?[\"']([^\"']+)", described)[1]
        described = {"name": name, "batch": fixture["batch"]}
    size = described.get("resolution", fixture.get("resolution", 64))
    return seeded_images(described["name"], described["batch"], size)


def check_tpt(clip, fixture, arrays, host=""):
    """Every intermediate of the adaptation of each test image, alone and in a batch
    with the others.
    """
    names, options = fixture["classnames"], fixture["hyperparameters"]
    described = fixture.get("optimizer") or {}
    host = fixture.get("host", host)

    def make(**changes):
        method = TPT.from_official(clip, names, options | changes, host=host)
        method.step_size = described.get("lr", method.step_size)
        method.decay = described.get("weight_decay", method.decay)
        state = {}
        for name, p in fixture["parameters"].items():
            ours = method.official_names()[
                name.replace("prompt_generator.", "prompt_learner.")
            ]
            drawn = (
                seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
                if "std" in p
                else None
            )
            state[name] = (
                method.state_dict()[ours].clone()
                if drawn is None
                else p.get("mean", 0.0) + drawn
            )
        method.load_official(state)
        return method.eval()

    method = make()
    initial = method.host.context.vectors.detach().flatten()
    if "ctx_init" in arrays:
        n = arrays["ctx_init"].numel()
        close(initial[:n].view_as(arrays["ctx_init"]), arrays, "ctx_init", atol=1e-6)
    n = fixture.get("n_views") or options.get("n_views") or method.n_views
    size = fixture.get("resolution", 64)
    views = torch.stack(
        [
            seeded_images(f"{fixture['name']}/image{b}", n, size)
            for b in range(fixture["batch"])
        ]
    )
    features = torch.stack([clip.encode_image(v) for v in views])  # (B, V, E)
    done = method.tune(features)
    shift = (done.vectors - done.start).flatten(1)
    compared = [
        close(method.logits(Batch(views=views)), arrays, "logits"),
        close(done.logits, arrays, "logits"),
        close(done.view_logits, arrays, "view_logits"),
        close(done.view_logits[:, 0], arrays, "zero_shot_logits"),
        close(done.entropy, arrays, "entropy"),
        close(features[:, 0], arrays, "feat0"),
        close(done.start.flatten(1)[:, :256], arrays, "gen_ctx"),
        close(shift.norm(dim=1), arrays, "ctx_delta_norm"),
    ]
    if len(done.losses):
        compared.append(close(done.losses.T, arrays, "losses", atol=1e-6))
        compared.append(close(done.losses[0], arrays, "loss", atol=1e-6))
    assert any(compared), "the fixture has none of the arrays that tpt is checked by"
    if "selected" in arrays:
        assert torch.equal(done.selected, arrays["selected"].long())
    norms = done.gradient.flatten(1).norm(dim=1)
    for key in (key for key in arrays if key.startswith("gradnorm/")):
        close(norms, arrays, key, atol=1e-6)
    stored = next((arrays[key] for key in arrays if key.startswith("grad/")), None)
    if stored is not None:
        scale = stored.abs().amax().item()
        torch.testing.assert_close(
            done.gradient.flatten(1)[:, : stored.shape[1]],
            stored,
            rtol=1e-3,
            atol=1e-3 * scale,
        )
    if stored is not None and "ctx_after" in arrays:
        certain = stored.abs() > 1e-5  # AdamW's first step has the gradient's sign
        after = done.vectors.flatten(1)[:, : stored.shape[1]]
        torch.testing.assert_close(
            after[certain], arrays["ctx_after"][certain], rtol=1e-3, atol=1e-4
        )
    if "tokenized_prompts" in arrays:
        template = method.host.context.template
        length = method.host.context.length
        words = (options.get("ctx_init") or options.get("prompt_prefix") or "").replace(
            "_", " "
        )
        words = words.replace("[CLS] ", "") or " ".join(["X"] * length)
        tokens = clip.tokenize([f"{words} {name}." for name in template.classnames])
        close_ids(tokens.tolist(), arrays, "tokenized_prompts")
    if "trace" in arrays:
        longer = make(tta_steps=arrays["trace"].shape[1])
        close(longer.tune(features).losses.T, arrays, "trace", atol=1e-4)


def check_tpt_views(clip, fixture, arrays):
    """Views and single operations; they also pin what the image libraries do."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.mean, clip.std))
    options = fixture["hyperparameters"]
    size, severity = options.get("size", 224), options.get("severity", 1)

    def image(name, cells, cell):
        pixels = (
            (128 + 60 * seeded(f"{fixture['name']}/{name}", (*cells, 3)))
            .round()
            .clamp(0, 255)
            .byte()
        )
        return Image.fromarray(
            pixels.repeat_interleave(cell, 0).repeat_interleave(cell, 1).numpy()
        )

    whole, square = image("pixels", (26, 30), 10), image("square", (16, 16), size // 16)
    for name, stored in arrays.items():
        kind, what, seed = name.split("/")
        rng = np.random.RandomState(int(seed))
        if kind == "op":
            out = pil_to_tensor(OPERATIONS[what](square, severity, rng)).float() / 255
            torch.testing.assert_close(avg_pool2d(out, 16), stored, rtol=0, atol=0.01)
            continue
        torch.manual_seed(int(seed))
        views = (
            image_views(
                whole,
                options["n_views"] + 1,
                size,
                what == "augmix",
                rng,
                severity,
            )
            - mean
        ) / std
        if kind == "view_std":
            torch.testing.assert_close(views.std(dim=(2, 3)), stored, rtol=0, atol=0.02)
        else:
            torch.testing.assert_close(avg_pool2d(views, 16), stored, rtol=0, atol=0.02)
            torch.testing.assert_close(
                avg_pool2d(views[:1], 16), stored[:1], rtol=0, atol=0.01
            )


def check_waffleclip(clip, fixture, arrays):
    """The random sentences word by word, their scores, averaged and merged.

    A key of its prompts is "mode/repetition", or "mode+concept/repetition".
    """
    names, options = fixture["classnames"], fixture["hyperparameters"]
    images = described_images(fixture)
    beside = {
        key: fixture[key] for key in ("descriptors", "word_list") if fixture.get(key)
    }
    close_features(arrays, "image_features", clip.encode_image(images))
    compared = 0
    for key, prompts in fixture["prompts"].items():
        variant, _, repetition = key.partition("/")
        mode, _, broad = variant.partition("+")
        chosen = {"mode": mode, "rep": int(repetition or 0)}
        if broad:
            chosen["label_before_text"] = options["concept_label_before_text"]
        make = partial(from_official, "waffleclip", clip, names)
        method = make(options | beside | chosen)
        merged = make(options | beside | chosen | {"merge_predictions": True})
        stored = [prompts[name] for name in names]
        assert method.sentences() == [
            [texts] if isinstance(texts, str) else texts for texts in stored
        ], key
        compared += 1
        scores = {f"scores/{key}": method, f"merged_scores/{key}": merged}
        for name, scorer in scores.items():
            scaled = {name: 100 * arrays[name]} if name in arrays else {}
            close(scorer.logits(images), scaled, name)
        first = clip.encode_text([texts[0] for texts in method.sentences()])
        name = f"text_features_first/{key}"
        if name in arrays:
            first = torch.nn.functional.normalize(first, dim=-1)
            close(first[:, : arrays[name].shape[1]], arrays, name, atol=1e-5)
        if compared == 1:
            close(method.logits(images), arrays, "logits")
    assert compared, "the fixture has no prompts"


# --- what common fixtures hold beside the common arrays -------------------------------


def also_kgcoop(method, fixture, arrays, batch):
    image, text = method.features(batch)
    close(method.anchor, arrays, "text_features_handcrafted", atol=1e-5)
    close(method.criterion(batch, image, text), arrays, "loss_ce", atol=1e-6)
    close(along_kgcoop(method, batch)["trace_score"], arrays, "score", atol=1e-6)


def along_kgcoop(method, batch):
    """The penalty without its weight, which may be 0."""
    weight, method.lam = method.lam, 1.0
    score = method.regularizer(batch, *method.features(batch)).detach()
    method.lam = weight
    return {"trace_score": score}


def also_prograd(method, fixture, arrays, batch):
    image, text = method.features(batch)
    close(method.score(image, method.teacher), arrays, "logits_zeroshot")
    kl = method.divergence(image, text)
    close(kl, arrays, "kl_loss", atol=1e-6)
    _, (domain,), (general,) = method.gradients(batch)
    (name,) = method.official_names()
    close_gradient(domain, arrays, name, "_xe")
    close_gradient(general, arrays, name, "_kl")
    if "cosine" in arrays:
        cosine = along_prograd(method, batch)["trace_cosine"]
        close(cosine.view_as(arrays["cosine"]), arrays, "cosine", atol=1e-4)


def along_prograd(method, batch):
    """The divergence, and the cosine of its gradient with that of the loss."""
    kl = method.divergence(*method.features(batch)).detach()
    _, (domain,), (general,) = method.gradients(batch)
    cosine = torch.cosine_similarity(domain.flatten(), general.flatten(), dim=0)
    return {"trace_kl": kl, "trace_cosine": cosine}


def also_dept(method, fixture, arrays, batch):
    image, text = method.features(batch)
    close(method.host.score(image, text), arrays, "logits_itm")
    close(method.cat(image, text), arrays, "logits_cat")
    if method.classifier is None:
        train = method.cat(image, text)
    else:
        rows = torch.arange(len(image))
        mine = text[batch.labels if text.dim() == 2 else (rows, batch.labels)]
        both = torch.cat([method.film_text(mine), method.film_image(image)])
        train = method.classifier(both)  # (2B, C)
    close(train, arrays, "logits_cat_train")
    itm = method.host.criterion(batch, image, text)
    cat = F.cross_entropy(train, batch.labels.repeat(len(train) // len(image)))
    close(itm, arrays, "loss_itm", atol=1e-6)
    close(cat, arrays, "loss_cat", atol=1e-6)
    total = (1 - method.lam) * itm + method.lam * cat
    torch.testing.assert_close(method.criterion(batch, image, text), total)


def also_promptsrc(method, fixture, arrays, batch):
    image, text = method.features(batch)
    if "terms" in arrays:
        terms = [method.criterion(batch, image, text)]
        terms += method.terms(batch, image, text)
        close(torch.stack(terms), arrays, "terms", atol=1e-6)
    if "fixed_text_features_raw" in arrays:
        raw = torch.nn.functional.normalize(arrays["fixed_text_features_raw"], dim=-1)
        close(method.anchor, {"anchor": raw}, "anchor", atol=1e-5)
    frozen = method.clip.encode_image(batch.images)
    close_features(arrays, "zero_shot_image_features", frozen)
    close(method.score(frozen, method.anchor), arrays, "zero_shot_logits")
    if "gauss" not in arrays:
        return
    # One batch is an epoch: train them all, averaging after each.
    epochs, described = len(arrays["gauss"]), fixture["optimizer"]
    torch.testing.assert_close(
        method.epoch_weights(epochs), arrays["gauss"].double(), rtol=1e-4, atol=1e-6
    )
    options = {name: described[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(method.parameters(), **options)
    for epoch in range(epochs):
        optimizer.zero_grad()
        method.backward(batch)
        optimizer.step()
        method.end_epoch(epoch, Recipe(epochs=epochs))
    ours = method.state_dict()
    for official, name in method.official_names().items():
        stored = arrays.get(f"gpa/{official}", torch.zeros(0))
        torch.testing.assert_close(
            ours[name].flatten()[: len(stored)], stored, rtol=1e-3, atol=1e-5
        )
    close(method.logits(batch), arrays, "gpa_logits")


def also_cocoop(method, fixture, arrays, batch):
    image = method.image_features(batch.images)
    close(method.shift(image), arrays, "pi", atol=1e-5)


ALSO = {
    "cocoop": also_cocoop,
    "kgcoop": also_kgcoop,
    "prograd": also_prograd,
    "dept": also_dept,
    "promptsrc": also_promptsrc,
}
# What is recorded along a trace, before each of its steps: a function of the method and
# the batch, to the names of the arrays and the values.
ALONG = {"kgcoop": along_kgcoop, "prograd": along_prograd}
# What a method draws in training, from the fixture: a function of the method, the
# fixture, the batch, which it may add to, and "loss" or the name of the trace.
BEFORE = {}
OWN = {
    ("benchmark", None): check_benchmark,
    ("clip", None): check_clip,
    ("tpt", None): check_tpt,
    ("tpt", "CoCoOp initialisation"): partial(check_tpt, host="cocoop"),
    ("tpt", "views"): check_tpt_views,
    ("waffleclip", None): check_waffleclip,
}
