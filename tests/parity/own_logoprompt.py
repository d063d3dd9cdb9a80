"""LoGoPrompt with given blocks in given places: all numbers of training and
selection.
"""

import re

import torch
from compare import close_gradient
from own import close, described_images
from seeded import seeded
from torch.nn.functional import normalize

from promptkit.method import Batch
from promptkit.recipe import Recipe
from promptkit.registry import from_official


def check_logoprompt(clip, fixture, arrays):
    names, options = fixture["classnames"], fixture["hyperparameters"]
    labels = torch.tensor(fixture["labels"])
    batch = Batch(images=described_images(fixture), labels=labels)
    places = torch.tensor(options["patch_top_left_per_image"])
    size = (3, options["patch_height"], options["patch_width"])
    noise = [seeded(f"{fixture['name']}/visual_prompt/{name}", size) for name in names]
    noise = torch.stack(noise)

    def make():
        method = from_official("logoprompt", clip, names, options)
        state = {
            name: p.get("mean", 0.0)
            + seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
            for name, p in fixture["parameters"].items()
            if "std" in p
        }
        if state:  # else its initial words, which it embeds itself
            method.load_official(state)
        method.keep = False
        method.blocks = lambda classes, generator=None: noise[classes]
        method.places = lambda images, generator=None: places
        return method.train()

    method, C = make(), len(names)
    image, text = method.features(batch)
    every = torch.arange(C).expand(len(labels), C)
    plain, own, _ = method.confident(batch, image, text, lambda plain: every)
    top, scores = method.candidates(plain), method.logits(batch)
    method.train()
    best = torch.maximum(plain, own)
    first = method.named(batch.images, every[:, :1])[:, 0]
    losses = method.losses(batch, image, text)
    compared = [
        close(plain.exp(), arrays, "p", atol=1e-6),
        close(own.exp(), arrays, "p_own", atol=1e-6),
        close(losses, arrays, "loss_per_image", atol=1e-5),
        close(normalize(text, dim=-1), arrays, "text_features", atol=1e-5),
        close(scores.gather(1, top).exp(), arrays, "topk_score", atol=1e-6),
        close(normalize(image, dim=-1), arrays, "image_features", atol=1e-5),
        close(
            normalize(first, dim=-1), arrays, "first_conditional_features", atol=1e-5
        ),
    ]
    exact = {
        "negatives": method.hard(plain, labels),
        "topk": top,
        "prediction": scores.argmax(1),
        "prediction_all_classes": best.argmax(1),
        "prediction_plain": plain.argmax(1),
    }
    for name, ours in exact.items():
        if name in arrays:
            assert torch.equal(ours, arrays[name].long()), name
            compared.append(True)
    loss = method.backward(batch)
    compared.append(close(loss, arrays, "loss", atol=1e-5))
    learnables = dict(method.named_parameters())
    for official, ours in method.official_names().items():
        compared.append(close_gradient(learnables[ours].grad, arrays, official))
    assert any(compared)
    if "trace" in arrays:
        told = dict(re.findall(r"(\w+)=([\d.e-]+\d)", fixture["optimizer"]))
        told = {name: float(number) for name, number in told.items()}
        method, trace = make(), []
        groups = method.param_groups(Recipe(lr=told["lr"]))
        optimizer = torch.optim.SGD(groups, **told)
        for _ in arrays["trace"]:
            optimizer.zero_grad()
            trace.append(method.backward(batch))
            optimizer.step()
        close(torch.stack(trace), arrays, "trace", atol=1e-5)


OWN = {("logoprompt", None): check_logoprompt}
