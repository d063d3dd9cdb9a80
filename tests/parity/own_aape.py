"""Checks of AAPE's fixtures, which are given as features: a tiny CLIP of their width
stands below the method.
"""

import re

import open_clip
import torch
import torch.nn.functional as F
from own import close
from seeded import seeded

from promptkit.clip import FrozenCLIP
from promptkit.registry import from_official


def stand_in(d, scale):
    """A CLIP of feature width d and this logit scale, whose towers are not asked."""
    torch.manual_seed(0)
    vision = dict(layers=1, width=16, head_width=16, patch_size=16, image_size=16)
    text = dict(width=16, heads=1, layers=1)
    model = open_clip.CLIP(embed_dim=d, vision_cfg=vision, text_cfg=text)
    with torch.no_grad():
        model.logit_scale.fill_(torch.tensor(float(scale)).log())
    return FrozenCLIP(model)


def given(fixture, name):
    """Normalised features that the notes describe by name and shape."""
    call = rf'{name} = norm\(seeded\("([^"]+)", \(([\d, ]+)\)\)\)'
    called, shape = re.search(call, fixture["notes"]).groups()
    called = called.replace("...", fixture["name"])
    return F.normalize(seeded(called, [int(n) for n in shape.split(",")]), dim=-1)


def make(fixture, classes):
    options = fixture["hyperparameters"]
    clip = stand_in(options["d"], options.get("logit_scale", 100.0))
    names = [f"class {c}" for c in range(classes)]
    method = from_official("aape", clip, names, options)
    state = {
        name: p.get("mean", 0.0)
        + seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
        for name, p in fixture["parameters"].items()
    }
    method.load_official(state)
    return method.train()


def steps(method, fixture, arrays, loss_of):
    """The gradient of the loss, and the losses of the steps that are described."""
    done, trace, optimizer = 0, [], None
    described = fixture["optimizer"]
    if isinstance(described, str):
        found = re.findall(r"(lr|momentum|weight_decay)=([\d.e-]+\d)", described)
        described = {name: float(number) for name, number in found}
    kept = ("lr", "momentum", "weight_decay")
    described = {name: described[name] for name in kept if name in described}
    optimizer = torch.optim.SGD(method.parameters(), **described)
    ours = dict(method.named_parameters())
    for step in range(len(arrays["trace"])):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        trace.append(loss.detach())
        for official, name in method.official_names().items() if step == 0 else ():
            grad = ours[name].grad
            done += close(grad.norm(), arrays, f"gradnorm/{official}", atol=1e-6)
            stored = arrays.get(f"grad/{official}")
            if stored is not None:
                typical = (grad.norm() / grad.numel() ** 0.5).item()
                atol = 1e-3 * max(stored.abs().max().item(), typical)
                part = grad.flatten()[: len(stored)]
                done += close(part, arrays, f"grad/{official}", atol=atol)
        optimizer.step()
    return done + close(torch.stack(trace), arrays, "trace", atol=1e-5)


def check_classification(clip, fixture, arrays):
    image, template = (
        given(fixture, "image_features"),
        given(fixture, "template_features"),
    )
    prompts, labels = given(fixture, "prompt_features"), torch.tensor(fixture["labels"])
    counts = torch.tensor(fixture["hyperparameters"]["prompts_per_class"])
    counts = counts.expand(len(prompts))  # one number, or one for each class
    there = torch.arange(prompts.shape[1]) < counts[:, None]
    method = make(fixture, len(template))
    mine = prompts[labels], there[labels]

    def parts():
        logits = method.score(image, method.project(template))
        distill, reward = method.terms(image, *mine)
        ce = F.cross_entropy(logits, labels)
        loss = ce + method.distill * distill + method.reward * reward
        return {"logits": logits, "ce": ce, "distill": distill, "reward": reward,
                "loss": loss}  # fmt: skip

    with torch.no_grad():
        summary, attention = method.aggregator(image, *mine)
        found = {"summary": summary, "aape": method.generator(image)} | parts()
        found["attention"] = attention
        done = sum(
            close(x, arrays, name, atol=1e-3 if name == "logits" else 1e-5)
            for name, x in found.items()
        )
    method.__dict__["references"] = prompts, there
    batch = type("Batch", (), {"labels": labels, "generator": None})
    added = method.regularizer(batch, image, None)
    assert torch.allclose(added + found["ce"], arrays["loss"], rtol=1e-3)
    done += steps(method, fixture, arrays, lambda: parts()["loss"])
    assert done == len(arrays), sorted(arrays)


def check_retrieval(clip, fixture, arrays):
    image, captions = (
        given(fixture, "image_features"),
        given(fixture, "caption_features"),
    )
    method = make(fixture, 2)
    positive = torch.arange(len(image)) % captions.shape[1]
    there = torch.ones(captions.shape[:2], dtype=torch.bool)

    def loss():
        return method.retrieval_loss(image, captions, positive)

    with torch.no_grad():
        chosen = captions[torch.arange(len(image)), positive]
        fused = method.fused(image)
        found = {
            "summary": method.aggregator(image, captions, there)[0],
            "aape": method.generator(image),
            "fused_image": fused,
            "similarity": method.clip.logit_scale * fused @ chosen.T,
        } | loss()
        done = sum(
            close(x, arrays, name, atol=1e-3 if name == "similarity" else 1e-5)
            for name, x in found.items()
        )
    done += steps(method, fixture, arrays, lambda: loss()["loss"])
    assert done == len(arrays), sorted(arrays)


def check_aape(clip, fixture, arrays):
    retrieval = "captions_per_image" in fixture["hyperparameters"]
    (check_retrieval if retrieval else check_classification)(clip, fixture, arrays)


OWN = {("aape", None): check_aape}
