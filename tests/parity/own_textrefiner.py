"""What TextRefiner's common fixtures hold beside the common arrays."""

import torch
from own import close
from own_promptkd import also_promptkd
from torch.nn.functional import normalize

from promptkit.recipe import Recipe


def also_textrefiner(method, fixture, arrays, batch):
    """Its refined classes, local tokens, their slots, the terms of the loss, and the
    cache that the recorded steps leave behind.
    """
    method.eval()
    with torch.no_grad():
        text = normalize(method.text_features(), dim=-1)
        close(method.refine(text), arrays, "refined_text", atol=1e-5)
        seen = normalize(method.encode(batch), dim=-1)
        close(seen, arrays, "image_features", atol=1e-4)
    if hasattr(method.host, "teacher"):
        names = {"teacher_logits", "teacher_text"} & set(arrays)
        student = {name: arrays[name] for name in names}
        also_promptkd(method.host, fixture, student, batch)
    first, state = method.cache.clone(), method.state_dict()
    state = {name: value.clone() for name, value in state.items()}
    method.train()
    with torch.no_grad():
        image, text = method.features(batch)
        t = normalize(text, dim=-1)
        top = method.attended(batch.attention)
        close(top, arrays, "top_patches", rtol=0, atol=0)
        aligned = method.aligned(batch)
        tokens = aligned.flatten(0, 1)
        close(tokens.norm(dim=1), arrays, "tokens_norm")
        slots = (normalize(tokens, dim=-1) @ method.cache.T).argmax(dim=1)
        close(slots, arrays, "assign", rtol=0, atol=0)
        local = method.local(aligned, batch.attention).flatten(0, 1)
        close(method.compare(local, t), arrays, "top_local_logits", atol=1e-2)
        assert torch.equal(method.cache, first)
        terms = method.terms(batch, image, text)
    weight = getattr(method.host, "weight", 1.0)
    close(terms["host"] / weight, arrays, "loss_ce", atol=1e-5)
    close(terms["host"] / weight, arrays, "loss_kd", atol=1e-6)
    close(terms["semantic"] / weight, arrays, "loss_local", atol=1e-5)
    close(terms["drift"], arrays, "loss_reg", atol=1e-7)
    assert not torch.equal(method.cache, first)
    close(method.cache, arrays, "cache_after_1", atol=1e-5)
    if not any(name.startswith("cache_after_") for name in arrays):
        return
    method.load_state_dict(state)
    named = ("lr", "momentum", "weight_decay")
    options = {name: fixture["optimizer"][name] for name in named}
    groups = method.param_groups(Recipe(lr=options["lr"]))
    optimizer = torch.optim.SGD(groups, **options)
    for step in range(len(arrays["trace"])):
        optimizer.zero_grad()
        method.backward(batch)
        optimizer.step()
        close(method.cache, arrays, f"cache_after_{step + 1}", atol=1e-4)


ALSO = {"textrefiner": also_textrefiner}
