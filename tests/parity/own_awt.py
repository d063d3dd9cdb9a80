"""Fixtures of AWT: weights, transport and scores, and a few steps of its adapters."""

import re

import torch
from compare import close_gradient
from own import close
from seeded import seeded, seeded_images
from torch.nn.functional import normalize

from promptkit.method import Batch
from promptkit.recipe import Recipe
from promptkit.registry import from_official
from promptkit.sets import entropy, entropy_with
from promptkit.transport import sinkhorn

TEXTS = ("descriptions", "template")


def compare_scores(method, z, arrays):
    """Everything between scaled cosines z (B, V, D, C) and the logits; how many arrays
    were compared.
    """
    z = z.permute(0, 3, 1, 2)  # (B, C, V, D)
    scale = method.clip.logit_scale
    log_a, log_b = method.log_weights(z)
    plan, steps, changes = sinkhorn(1 - z / scale, log_a, log_b, **method.solver)
    together = method.solver | {"together": True}
    batched, *_ = sinkhorn(1 - z / scale, log_a, log_b, **together)
    found = {
        "image_entropy": entropy(z.mean(3), 1),
        "text_entropy": entropy_with(z[:, :, 0].mean(2), z[:, :, 0]),
        "image_weights": log_a.exp(),
        "text_weights": log_b.exp(),
        "transport": plan,
        "sinkhorn_iterations": steps,
        "logits": (plan * z).sum((2, 3)),
        "batched_logits": (batched * z).sum((2, 3)),
        "mean_logits": z.mean((2, 3)),
    }
    if "sinkhorn_first_errors" in arrays:
        n = arrays["sinkhorn_first_errors"].shape[1]
        first = torch.nn.functional.pad(changes, (0, n))[:, :n]
        found["sinkhorn_first_errors"] = first
    exact = {"transport": 1e-6, "image_weights": 1e-5, "text_weights": 1e-5}
    return sum(
        close(value, arrays, name, atol=exact.get(name, 1e-3))
        for name, value in found.items()
    )


def check_zero_shot(clip, fixture, arrays):
    names = fixture["classnames"]
    options = fixture["hyperparameters"] | {key: fixture[key] for key in TEXTS}
    method = from_official("awt", clip, names, options).eval()
    size, n = fixture.get("resolution", 64), fixture["n_views"]
    views = torch.stack(
        [
            seeded_images(f"{fixture['name']}/image{b}", n, size)
            for b in range(fixture["batch"])
        ]
    )
    with torch.no_grad():
        image, text = method.features(Batch(views=views))
        z = clip.logit_scale * torch.einsum(
            "bve,cde->bvdc", normalize(image, dim=-1), normalize(text, dim=-1)
        )
    done = close(z, arrays, "view_logits")
    done += compare_scores(method, z, arrays)
    logits = torch.cat([method.logits(Batch(views=v[None])) for v in views])
    done += close(logits, {"logits": arrays["logits"]}, "logits") - 1
    assert done == len(arrays), f"{len(arrays) - done} arrays were not compared"


def check_transport(clip, fixture, arrays):
    described = re.search(
        r"seeded\([\"']([^\"']+)[\"'], \(([^)]+)\), ([\d.]+)\)", fixture["logits"]
    )
    shape = tuple(map(int, described[2].split(",")))
    z = seeded(described[1], shape, float(described[3]))
    names = [f"class {c}" for c in range(shape[-1])]
    method = from_official("awt", clip, names, fixture["hyperparameters"]).eval()
    done = compare_scores(method, z, arrays)
    assert done == len(arrays), f"{len(arrays) - done} arrays were not compared"


def numbered(method, names):
    """A fixture's own name of each official parameter: adapters of some blocks may be
    numbered by these, or one after another.
    """
    return method.official_state({name: name for name in names})


def check_few_shot(clip, fixture, arrays):
    """The score at test time, the loss of a training step with its gradients, and the
    losses of a few steps, with the sentences that each draws.
    """
    names = fixture["classnames"]
    options = fixture["hyperparameters"] | {key: fixture[key] for key in TEXTS}
    call = re.search(
        r"seeded\([\"']([^\"']+)[\"'], \(([^)]+)\), ([\d.]+)\)", fixture["images"]
    )
    shape = tuple(map(int, call[2].split(",")))
    views = seeded(call[1], shape, float(call[3]))
    labels = torch.tensor(fixture["labels"])

    def make():
        method = from_official("awt", clip, names, options)
        method.load_official(
            {
                name: p.get("mean", 0.0)
                + seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
                for name, p in fixture["parameters"].items()
            }
        )
        batch = Batch(views=views, labels=labels)
        batch.generator = torch.Generator().manual_seed(0)
        return method, batch

    method, batch = make()
    done = close(method.logits(batch), arrays, "logits")
    text = normalize(method.eval().text_features()[:, 0], dim=-1).detach()
    done += close(text, arrays, "text_features", atol=1e-5)

    method.train()
    image, text = method.features(batch)
    done += close(method.score(image, text), arrays, "train_logits")
    done += close(method.criterion(batch, image, text), arrays, "loss_ce", atol=1e-5)
    distances = method.distances(batch, image, text)
    of_images, of_texts = (
        weight * each for weight, each in zip(method.weights, distances, strict=True)
    )
    done += close(of_images, arrays, "loss_distil_img", atol=1e-6)
    done += close(of_texts, arrays, "loss_distil_text", atol=1e-6)

    method, batch = make()
    loss = method.train().backward(batch)
    done += close(loss, arrays, "loss", atol=1e-6)
    learnables, squares = dict(method.named_parameters()), 0.0
    theirs = numbered(method, fixture["parameters"])
    for official, ours in method.official_names().items():
        grad, name = learnables[ours].grad, theirs[official]
        squares += grad.double().square().sum()
        done += close_gradient(grad, arrays, name, rtol=2e-3)
    done += close(squares.sqrt(), arrays, "gradnorm_all", atol=1e-6)

    method, batch = make()
    described, losses, drawn = fixture["optimizer"], [], []
    named = ("lr", "momentum", "weight_decay")
    options = {name: described[name] for name in named}
    groups = method.train().param_groups(Recipe(lr=options["lr"]))
    optimizer = torch.optim.SGD(groups, **options)
    for _ in range(described["steps"]):
        optimizer.zero_grad()
        losses.append(method.backward(batch))
        drawn.append([d - 1 for d in method._drawn[1:]])
        optimizer.step()
    done += close(torch.tensor(drawn), arrays, "sample_idx", rtol=0, atol=0)
    done += close(torch.stack(losses), arrays, "trace", atol=1e-4)
    assert done == len(arrays), f"{len(arrays) - done} arrays were not compared"


OWN = {
    ("awt", "zero-shot"): check_zero_shot,
    ("awt", "few-shot, multi-modal adapter"): check_few_shot,
    ("awt", "weights and transport only"): check_transport,
}
