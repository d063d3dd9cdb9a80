"""Checks of POMP's fixtures: local logits with and without correction, the loss, its
gradient and a few steps on stored draws.
"""

import re

import torch
import torch.nn.functional as F
from compare import close_gradient
from own import close
from seeded import seeded, seeded_images

from promptkit.registry import from_official


def images_of(fixture):
    """Training and test images."""
    call = r'(training|test)[^:;]*: seeded_images\(f?"([^"]+)", (\d+)\)'
    size = fixture.get("resolution", 64)
    return {
        what: seeded_images(name, int(number), size)
        for what, name, number in re.findall(call, fixture["images"])
    }


def check_pomp(clip, fixture, arrays):
    names, given = fixture["classnames"], fixture["hyperparameters"]
    options = {key: value for key, value in given.items() if value is not None}
    images, labels = images_of(fixture), torch.tensor(fixture["labels"])
    (name, described), done = *fixture["parameters"].items(), 0
    vectors = None
    if "std" in described:  # else its initial words, which the method embeds itself
        drawn = seeded(
            f"{fixture['name']}/{name}", described["shape"], described["std"]
        )
        vectors = described.get("mean", 0.0) + drawn

    def make(**changes):
        method = from_official("pomp", clip, names, options | changes)
        if vectors is not None:
            method.load_official({name: vectors})
        return method.train()

    image = clip.encode_image(images["training"])
    copies = len(image) // len(labels)
    labels = labels.repeat_interleave(copies)
    drawn = arrays["negatives"].long()
    zero = torch.zeros_like(labels)

    method = make()
    for changes, suffix in (
        ({}, ""),
        ({"local_correction": not options.get("local_correction", True)}, "_toggled"),
    ):
        with torch.no_grad():
            logits = make(**changes).local_logits(image, labels, drawn[0])
        done += close(logits, arrays, f"train_logits{suffix}")
        loss = F.cross_entropy(logits, zero)
        done += close(loss, arrays, f"loss{suffix}", atol=1e-6)
    if "logits" in arrays:
        method.set_classes(fixture["test_classnames"])
        done += close(method.logits(images["test"]), arrays, "logits")
        method.set_classes(names)

    described, trace = fixture["optimizer"], []
    kept = ("lr", "momentum", "weight_decay")
    about = {key: described[key] for key in kept if key in described}
    optimizer = torch.optim.SGD(method.parameters(), **about)
    for step in range(described["steps"]):
        optimizer.zero_grad()
        loss = F.cross_entropy(method.local_logits(image, labels, drawn[step]), zero)
        loss.backward()
        trace.append(loss.detach())
        if step == 0:
            done += close_gradient(method.context.vectors.grad, arrays, name)
        optimizer.step()
    done += close(torch.stack(trace), arrays, "trace", atol=1e-5)
    assert done == len(arrays) - 1, sorted(arrays)  # all but the draws


OWN = {("pomp", None): check_pomp}
