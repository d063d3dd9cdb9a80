"""What the fixtures of TCP hold beside the common arrays."""

import torch
from own import close

from promptkit.recipe import Recipe


def also_tcp(method, fixture, arrays, batch):
    """The tokens of the classes, what they are made from, the terms of the loss, and
    where Adam leads.
    """
    close(method.anchor, arrays, "text_features_frozen", atol=1e-5)
    close(method.class_tokens(), arrays, "class_prompt", atol=1e-5)
    image, text = method.features(batch)
    close(method.criterion(batch, image, text), arrays, "loss_ce", atol=1e-6)
    penalty = 1 - torch.cosine_similarity(text, method.anchor, dim=-1).mean()
    if method.kg_weight:
        penalty = method.regularizer(batch, image, text) / method.kg_weight
    close(penalty, arrays, "loss_kg", atol=1e-6)
    if "logits_after_adam" not in arrays:
        return
    described = fixture["optimizer"]["trace_adam"]
    options = {name: described[name] for name in ("lr", "betas", "eps", "weight_decay")}
    groups = method.param_groups(Recipe(lr=options["lr"]))
    optimizer = torch.optim.Adam(groups, **options)
    for _ in range(described["steps"]):
        optimizer.zero_grad()
        method.backward(batch)
        optimizer.step()
    close(method.logits(batch), arrays, "logits_after_adam")


ALSO = {"tcp": also_tcp}
