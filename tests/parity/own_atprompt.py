"""Checks of ATPrompt's fixtures of the search."""

import torch
from own import close, described_images
from seeded import seeded, seeded_images

from promptkit.attributes import AttributeSearch
from promptkit.method import Batch


def check_search(clip, fixture, arrays):
    """The combinations and their logits, the gradients, and some steps in turns."""
    options, names = fixture["hyperparameters"], fixture["classnames"]
    search = AttributeSearch(
        clip,
        names,
        bases=options["attribute_bases"],
        n_ctx=options["n_ctx"],
        n_att=options["n_att"],
        only=fixture["combinations"],
        one_token=True,
    )
    ours = {"prompt_learner.att_weight": search.alpha}
    for k, context in enumerate(search.contexts):
        ours[f"prompt_learner.ctx_list.{k}"] = context.vectors
        for j, tokens in enumerate(context.before):
            ours[f"prompt_learner.att_ctx_list.{k}.{j}"] = tokens
    assert set(ours) == set(fixture["parameters"])
    with torch.no_grad():
        for name, p in fixture["parameters"].items():
            value = seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
            ours[name].copy_(p.get("mean", 0.0) + value)

    val = fixture["val_images"]
    batch = Batch(
        images=described_images(fixture), labels=torch.tensor(fixture["labels"])
    )
    validation = Batch(
        images=seeded_images(val["name"], val["batch"], val.get("resolution", 64)),
        labels=torch.tensor(fixture["val_labels"]),
    )
    with torch.no_grad():
        image, text = search.features(batch)
        each = search.each(image, text)
    features = torch.nn.functional.normalize(text, dim=-1)
    stored = arrays["text_features_head"]
    lengths = [[n - 1 for n in c.template.lengths] for c in search.contexts]
    compared = [
        close(search.logits(batch), arrays, "logits"),
        close(each, arrays, "logits_per_combination"),
        close(features[..., : stored.shape[-1]], arrays, "text_features_head"),
        close(search.weights, arrays, "softmax_alpha", atol=1e-6),
        close(torch.tensor(lengths), arrays, "eot"),
    ]
    loss = search.loss(batch)
    compared.append(close(loss, arrays, "loss", atol=1e-6))
    loss.backward()
    for name, p in ours.items():
        norm = p.grad.double().norm()
        assert close(norm, arrays, f"gradnorm/{name}", rtol=1e-3, atol=1e-6), name
        flat, key = p.grad.flatten(), f"grad/{name}"
        scale = arrays[key].abs().max().item()
        close(flat[: len(arrays[key])], arrays, key, atol=1e-3 * scale)

    described = fixture["optimizer"]
    kinds = {}
    for part, parameters in (
        ("theta", list(search.contexts.parameters())),
        ("alpha", [search.alpha]),
    ):
        cls = getattr(torch.optim, described[part]["type"].rpartition(".")[2])
        known = ("lr", "momentum", "weight_decay", "betas", "eps")
        given = {k: v for k, v in described[part].items() if k in known}
        kinds[part] = cls(parameters, **given)
    losses, alphas = [], []
    for _ in arrays["trace_theta"]:
        losses.append(search.step(batch, validation, **kinds))
        alphas.append(search.alpha.detach().clone())
    theta, alpha = torch.tensor(losses).T
    compared += [
        close(theta, arrays, "trace_theta", atol=1e-5),
        close(alpha, arrays, "trace_alpha", atol=1e-5),
        close(torch.stack(alphas), arrays, "alpha"),
        close(search.weights, arrays, "softmax_alpha_after", atol=1e-5),
        close(search.logits(batch), arrays, "logits_after"),
    ]
    assert all(compared), "the fixture lacks an array that a search is checked by"


OWN = {("atprompt", "differentiable attribute search"): check_search}
