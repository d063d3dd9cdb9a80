"""Checks of fixtures of kind "own": a function for a method and part, never for a file.

Parts without a function of their own go to the one of part ``None``.
"""

import re
from functools import partial

import numpy as np
import torch
from benchmark_protocol import check_benchmark
from PIL import Image
from seeded import seeded, seeded_images
from torch.nn.functional import avg_pool2d
from torchvision.transforms.v2.functional import pil_to_tensor

from promptkit.method import Batch
from promptkit.methods.clip import CLIP
from promptkit.methods.tpt import OPERATIONS, TPT, image_views
from promptkit.methods.waffleclip import WaffleCLIP
from promptkit.recipe import Recipe

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def check_clip(clip, fixture, arrays):
    """Zero-shot logits and features, of one template and of an ensemble."""
    options, names = fixture["hyperparameters"], fixture["classnames"]
    described = fixture["images"]
    images = seeded_images(
        described["name"], described["batch"], described.get("resolution", 64)
    )
    single = CLIP.from_official(clip, names, options)
    checked = {"": single}
    if "ensemble_templates" in options:
        checked["_ensemble"] = CLIP(clip, names, template=options["ensemble_templates"])
    for suffix, method in checked.items():
        torch.testing.assert_close(
            method.logits(images), arrays[f"logits{suffix}"], **CLOSE
        )
        text = arrays[f"text_features{suffix}"]
        torch.testing.assert_close(method.text_features(), text, rtol=1e-3, atol=1e-5)
    image = torch.nn.functional.normalize(single.image_features(images), dim=-1)
    torch.testing.assert_close(image, arrays["image_features"], rtol=1e-3, atol=1e-5)
    tokens = clip.tokenize(
        [options["template"].format(name.replace("_", " ")) for name in names]
    )
    assert torch.equal(tokens, arrays["tokens"])
    assert torch.equal(tokens.argmax(dim=-1), arrays["eot"])


def check_tpt(clip, fixture, arrays, host=""):
    """Every intermediate of the adaptation of each test image, alone and in a batch
    with the others.
    """
    names, options = fixture["classnames"], fixture["hyperparameters"]
    described = fixture["optimizer"]

    def make(**changes):
        method = TPT.from_official(clip, names, options | changes, host=host)
        method.step_size, method.decay = described["lr"], described["weight_decay"]
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

    method, n = make(), fixture["n_views"]
    views = torch.stack(
        [
            seeded_images(f"{fixture['name']}/image{b}", n)
            for b in range(fixture["batch"])
        ]
    )
    torch.testing.assert_close(
        method.logits(Batch(views=views)), arrays["logits"], **CLOSE
    )
    features = torch.stack([clip.encode_image(v) for v in views])  # (B, V, E)
    done = method.tune(features)
    torch.testing.assert_close(done.logits, arrays["logits"], **CLOSE)
    torch.testing.assert_close(done.view_logits, arrays["view_logits"], **CLOSE)
    assert torch.equal(done.selected, arrays["selected"].long())
    torch.testing.assert_close(done.losses.T, arrays["losses"], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(done.losses[0], arrays["loss"], rtol=1e-3, atol=1e-6)
    gradient = next(key for key in arrays if key.startswith("grad/"))
    norms = done.gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(
        norms, arrays[gradient.replace("grad/", "gradnorm/")], rtol=1e-3, atol=1e-6
    )
    stored = arrays[gradient]
    scale = stored.abs().amax().item()
    torch.testing.assert_close(
        done.gradient.flatten(1)[:, : stored.shape[1]],
        stored,
        rtol=1e-3,
        atol=1e-3 * scale,
    )
    certain = stored.abs() > 1e-5  # AdamW's first step has the sign of the gradient
    after = done.vectors.flatten(1)[:, : stored.shape[1]]
    torch.testing.assert_close(
        after[certain], arrays["ctx_after"][certain], rtol=1e-3, atol=1e-4
    )
    for name, value in {
        "entropy": done.entropy,
        "zero_shot_logits": done.view_logits[:, 0],
        "feat0": features[:, 0],
        "gen_ctx": done.start.flatten(1)[:, :256],
        "ctx_delta_norm": (done.vectors - done.start).flatten(1).norm(dim=1),
    }.items():
        if name in arrays:
            torch.testing.assert_close(value, arrays[name], **CLOSE)
    if "tokenized_prompts" in arrays:
        tokens = clip.tokenize(
            [f"{options['ctx_init']} {name}.".replace("_", " ") for name in names]
        )
        assert torch.equal(
            tokens, arrays["tokenized_prompts"][:, : tokens.shape[1]].long()
        )
    if "trace" in arrays:
        longer = make(tta_steps=arrays["trace"].shape[1])
        torch.testing.assert_close(
            longer.tune(features).losses.T, arrays["trace"], rtol=1e-3, atol=1e-4
        )


def check_tpt_views(clip, fixture, arrays):
    """Views and single operations; they also pin what the image libraries do."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.mean, clip.std))
    size, severity = (
        fixture["hyperparameters"]["size"],
        fixture["hyperparameters"]["severity"],
    )

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

    whole, square = image("pixels", (26, 30), 10), image("square", (16, 16), 14)
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
                fixture["hyperparameters"]["n_views"] + 1,
                size,
                what == "augmix",
                rng,
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
    """The random sentences word by word, their scores, averaged and merged."""
    names, options = fixture["classnames"], fixture["hyperparameters"]
    images = seeded_images(
        fixture["images"].split('"')[1], fixture["batch"], fixture["resolution"]
    )
    features = {
        "descriptors": fixture["descriptors"],
        "word_list": fixture["word_list"],
    }
    concept = re.search(r" a (.*):", options["concept_label_before_text"])[1]
    for key, prompts in fixture["prompts"].items():
        variant, repetition = key.split("/")
        mode, _, broad = variant.partition("+")
        chosen = {
            "mode": mode,
            "concept": concept if broad else "",
            "reps": int(repetition),
        }

        make = partial(WaffleCLIP.from_official, clip, names)
        method = make(options | features | chosen)
        merged = make(options | features | chosen | {"aggregate": "merge"})
        stored = [prompts[name] for name in names]
        assert method.sentences() == [
            [texts] if isinstance(texts, str) else texts for texts in stored
        ], key
        scores = {f"scores/{key}": method, f"merged_scores/{key}": merged}
        for name, scorer in scores.items():
            torch.testing.assert_close(
                scorer.logits(images), 100 * arrays[name], **CLOSE
            )
        first = clip.encode_text([texts[0] for texts in method.sentences()])
        first, stored = (
            torch.nn.functional.normalize(first, dim=-1),
            arrays[f"text_features_first/{key}"],
        )
        torch.testing.assert_close(
            first[:, : stored.shape[1]], stored, rtol=1e-3, atol=1e-5
        )
    first = next(iter(fixture["prompts"]))
    torch.testing.assert_close(
        100 * arrays[f"scores/{first}"], arrays["logits"], **CLOSE
    )


# --- what common fixtures hold beside the common arrays -------------------------------


def also_kgcoop(method, fixture, arrays, batch):
    image, text = method.features(batch)
    torch.testing.assert_close(
        method.anchor, arrays["text_features_handcrafted"], rtol=1e-3, atol=1e-5
    )
    score = method.regularizer(batch, image, text) / method.lam
    torch.testing.assert_close(score, arrays["score"], rtol=1e-3, atol=1e-6)
    assert torch.equal(
        method.context.vectors.flatten()[: arrays["ctx_init"].numel()],
        arrays["ctx_init"].flatten(),
    )


def also_prograd(method, fixture, arrays, batch):
    image, text = method.features(batch)
    torch.testing.assert_close(
        method.score(image, method.teacher), arrays["logits_zeroshot"], **CLOSE
    )
    kl = method.divergence(image, text)
    torch.testing.assert_close(kl, arrays["kl_loss"], rtol=1e-3, atol=1e-6)
    _, (domain,), (general,) = method.gradients(batch)
    cosine = torch.cosine_similarity(domain.flatten(), general.flatten(), dim=0)
    torch.testing.assert_close(
        cosine.double(), arrays["cosine"].double().flatten()[0], rtol=1e-3, atol=1e-4
    )


def also_dept(method, fixture, arrays, batch):
    image, text = method.features(batch)
    torch.testing.assert_close(
        method.host.score(image, text), arrays["logits_itm"], **CLOSE
    )
    torch.testing.assert_close(method.cat(image, text), arrays["logits_cat"], **CLOSE)


def also_promptsrc(method, fixture, arrays, batch):
    if "terms" not in arrays:
        return
    image, text = method.features(batch)
    terms = torch.stack(method.terms(batch, image, text)).double()
    torch.testing.assert_close(
        terms, arrays["terms"][1:].double(), rtol=1e-3, atol=1e-6
    )
    raw = torch.nn.functional.normalize(arrays["fixed_text_features_raw"], dim=-1)
    torch.testing.assert_close(method.anchor, raw, rtol=1e-3, atol=1e-5)
    frozen = method.clip.encode_image(batch.images)
    torch.testing.assert_close(
        method.score(frozen, method.anchor), arrays["zero_shot_logits"], **CLOSE
    )
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
        stored = arrays[f"gpa/{official}"]
        torch.testing.assert_close(
            ours[name].flatten()[: len(stored)], stored, rtol=1e-3, atol=1e-5
        )
    torch.testing.assert_close(method.logits(batch), arrays["gpa_logits"], **CLOSE)


def also_cocoop(method, fixture, arrays, batch):
    image = method.image_features(batch.images)
    torch.testing.assert_close(method.shift(image), arrays["pi"], rtol=1e-3, atol=1e-5)


ALSO = {
    "cocoop": also_cocoop,
    "kgcoop": also_kgcoop,
    "prograd": also_prograd,
    "dept": also_dept,
    "promptsrc": also_promptsrc,
}
OWN = {
    ("benchmark", None): check_benchmark,
    ("clip", None): check_clip,
    ("tpt", None): check_tpt,
    ("tpt", "CoCoOp initialisation"): partial(check_tpt, host="cocoop"),
    ("tpt", "views"): check_tpt_views,
    ("waffleclip", None): check_waffleclip,
}
