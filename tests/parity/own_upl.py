"""Checks of UPL's fixtures: the zero-shot pass, the selection, each member of the
ensemble and their mean.
"""

import copy
import re

import torch
import torch.nn.functional as F
from compare import close_gradient
from own import close
from seeded import load_seeded, seeded, seeded_images

from promptkit.clip import FrozenCLIP, zero_shot_features
from promptkit.method import Batch
from promptkit.methods.upl import select
from promptkit.registry import from_official


def chosen(found, arrays, prefix, infix):
    """Compare positions and labels exactly, confidences closely; returns how many."""
    count = 0
    for part, ours in zip(("index", "label", "conf"), found, strict=True):
        name = f"{prefix}{infix}{part}"
        if part == "conf":
            count += close(ours, arrays, name, atol=1e-5)
        elif name in arrays:
            assert torch.equal(ours, arrays[name].long()), name
            count += 1
    return count


def pool_of(fixture):
    """Its unlabelled images and its test images."""
    made = dict(
        re.findall(
            r'(unlabelled|test)[^:;]*: seeded_images\(f?"([^"]+", \d+)\)',
            fixture["images"],
        )
    )
    size = fixture.get("resolution", 64)
    images = {}
    for what, call in made.items():
        name, number = call.split('", ')
        images[what] = seeded_images(name, int(number), size)
    return images["unlabelled"], images["test"]


def check_upl(clip, fixture, arrays):
    names, given = fixture["classnames"], fixture["hyperparameters"]
    options = {"prompt_ensemble": 1}  # unless it says more
    options |= {name: value for name, value in given.items() if value is not None}
    n_models = options.get("pseudo_label_models", 1)
    more = [
        FrozenCLIP(load_seeded(copy.deepcopy(clip.model), salt=s))
        for s in range(1, n_models)
    ]
    pool, test = pool_of(fixture)
    method = from_official("upl", clip, names, options, backbones=more)
    done = 0
    features = [model.encode_image(pool) for model in (clip, *more)]
    for s, (model, image) in enumerate(zip((clip, *more), features, strict=True)):
        text = zero_shot_features(model, names, method.templates)
        logits = model.logit_scale * F.normalize(image, dim=-1) @ text.T
        done += close(logits, arrays, f"zs_logits/{s}")
        done += close(logits.softmax(-1), arrays, f"zs_probs/{s}", atol=1e-5)
    p = method.probabilities(features)
    done += close(p, arrays, "mean_probs", atol=1e-5)
    rule = method.rule, method.top_k, method.threshold
    done += chosen(select(p, *rule), arrays, "selected_", "")
    alone = from_official("upl", clip, names, options)
    found = select(alone.probabilities(features[:1]), *rule)
    done += chosen(found, arrays, "single_selected_", "")

    state = {
        name: p.get("mean", 0.0)
        + seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
        for name, p in fixture["parameters"].items()
    }
    method.load_official(state)
    index = arrays["train_index"].long()
    images, labels = pool[index], arrays["train_label"].long()
    batch = Batch(images=images, labels=labels)
    members = range(options["prompt_ensemble"])

    def each(ours, name, **tolerance):
        """A value of each member, the first one's also without its number."""
        count = close(ours[0], arrays, name, **tolerance)
        for e in members:
            count += close(ours[e], arrays, f"{name}/{e}", **tolerance)
        return count

    def losses(logits):
        return torch.stack([F.cross_entropy(z, labels) for z in logits])

    with torch.no_grad():
        train, tested = clip.encode_image(images), clip.encode_image(test)
        done += close(method.member_logits(train)[0], arrays, "train_logits")
        done += each(method.member_logits(tested), "logits")
        done += each(losses(method.member_logits(train)), "loss", atol=1e-6)

    described, trace = fixture["optimizer"], []
    kept = ("lr", "momentum", "weight_decay")
    options = {name: described[name] for name in kept if name in described}
    optimizer = torch.optim.SGD(method.parameters(), **options)
    for step in range(described["steps"]):
        trace.append(losses(method.member_logits(train)).detach())
        optimizer.zero_grad()
        total = method.train().backward(batch)
        torch.testing.assert_close(total, trace[-1].sum())
        grad = method.context.vectors.grad
        if step == 0:
            done += close_gradient(grad[0], arrays, "prompt_learner.ctx")
            for e in members:
                done += close_gradient(grad[e], arrays, f"prompt_learner.ctx/{e}")
        optimizer.step()
    done += each(torch.stack(trace).T, "trace", atol=1e-5)
    with torch.no_grad():
        done += each(method.member_logits(tested), "logits_trained")
    done += close(method.logits(test), arrays, "ensemble_logits")
    beside = {"train_index", "train_label"}
    assert done == len(set(arrays) - beside), sorted(arrays)


def check_rules(clip, fixture, arrays):
    """The published rule and its alternatives on drawn logits."""
    options = fixture["hyperparameters"]
    call = r'seeded\("([^"]+)", \((\d+), (\d+)\), ([\d.]+)\)'
    name, n, classes, std = re.match(call, fixture["logits"]).groups()
    n, classes = int(n), int(classes)
    logits = seeded(name, (n, classes), float(std))
    slope = re.search(r"\+ ([\d.]+) \* arange\(\d+\)", fixture["logits"])
    logits = logits + (float(slope[1]) if slope else 0) * torch.arange(classes)
    p = logits.softmax(dim=-1)
    if "predicted_counts" in fixture:
        counts = torch.bincount(p.argmax(-1), minlength=classes)
        assert counts.tolist() == fixture["predicted_counts"]
    k, threshold = options.get("K", 16), options.get("threshold", 0.9)
    assert options.get("global_budget", k * classes) == k * classes
    found = {
        "per_class": select(p, "per_class", k),
        "global_top": select(p, "global", k),
        "threshold": select(p, "threshold", k, threshold),
    }
    done = sum(chosen(x, arrays, rule, "/") for rule, x in found.items())
    assert done == len(arrays), sorted(arrays)


OWN = {("upl", None): check_upl, ("upl", "selection rules"): check_rules}
