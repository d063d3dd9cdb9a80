"""Checks of Tip-Adapter's fixtures: cache, search, and the fine-tuning of F."""

import torch
import torch.nn.functional as F
from own import close
from seeded import seeded

from promptkit.method import Batch
from promptkit.methods.tip_adapter import TipAdapter
from promptkit.recipe import Recipe, learning_rate
from promptkit.registry import from_official


def check_tip_adapter(clip, fixture, arrays):
    """Every array that is stored is compared, or the check fails."""
    options, names, name = (
        fixture[key] for key in ("hyperparameters", "classnames", "name")
    )
    labels = {part: torch.tensor(y) for part, y in fixture["labels"].items()}
    described, passes = fixture["images"], options["augment_epoch"]
    drawn = described["prototypes"]
    prototypes = seeded(drawn["name"], drawn["shape"], drawn["std"])

    def encode(part):
        y = labels[part.partition("/")[0]]
        shape = (len(y), *drawn["shape"][1:])
        noise = seeded(f"{name}/{part}", shape, described["noise_std"])
        return clip.encode_image(prototypes[y] + noise)

    train = [encode(f"train/{i}") for i in range(passes)]
    val, test = encode("val"), encode("test")

    def make(spec):
        method = from_official(spec, clip, names, options)
        assert method.passes == passes
        method.remember(torch.stack(train).mean(0), labels["train"])
        return method.eval()

    method, compared = make("tip_adapter"), set()

    def compare(ours, array, **tolerance):
        if close(ours.detach(), arrays, array, **tolerance):
            compared.add(array)

    compare(method.text_features().T, "clip_weights", atol=1e-5)
    compare(method.keys.T[:64], "cache_keys", atol=1e-5)
    compare(method.keys.norm(dim=1), "cache_keys_norm")
    compare(method.values, "cache_values", rtol=0, atol=0)
    compare(F.normalize(val, dim=-1)[:, :64], "val_features", atol=1e-5)
    compare(method.affinity(test), "affinity_test", atol=1e-5)
    compare(method.cache_logits(test), "cache_logits_test")
    plain = super(TipAdapter, method).score(test, method.text_features())
    compare(plain, "clip_logits_test")
    compare(method.logits(Batch(features=test)), "logits")
    found, *_ = method.accuracies(val, labels["val"])
    compare(found, "search_grid_accuracy")
    method.choose(val, labels["val"])
    compare(torch.stack([method.beta, method.alpha]), "best_beta_alpha", atol=1e-5)
    compare(method.logits(Batch(features=test)), "logits_searched")
    compared |= fine_tune(make("tip_adapter_f"), fixture, arrays, train, test, labels)
    assert compared == set(arrays), f"not compared: {set(arrays) - compared}"


def fine_tune(method, fixture, arrays, train, test, labels):
    """The recorded epochs of Tip-Adapter-F; which arrays were compared."""
    described, compared = fixture["hyperparameters"]["F"], set()
    epochs, size = described["train_epoch"], described["batch"]
    order = torch.tensor(fixture["finetune_order"])
    batches = order.split(size)
    plan = Recipe(
        epochs=epochs, lr=described["lr"], schedule="cosine-steps", warmup_epochs=0
    )
    options = {k: described[k] for k in ("eps", "weight_decay") if k in described}
    options |= {"betas": tuple(described["betas"])} if "betas" in described else {}
    kind = getattr(torch.optim, described["optimizer"].rpartition(".")[2])
    optimizer = kind(method.param_groups(plan), lr=plan.lr, **options)
    losses, saved = [], []
    for epoch in range(epochs):
        method.train()
        for n, batch in enumerate(batches):
            share = len(losses) / (epochs * len(batches))
            optimizer.param_groups[0]["lr"] = learning_rate(plan, epoch, plan.lr, share)
            optimizer.zero_grad()
            given = Batch(
                features=train[epoch % len(train)][batch], labels=labels["train"][batch]
            )
            if epoch == n == 0:
                first = method(given).detach()
                compared |= {"F_first_batch_logits"} & set(arrays)
                close(first, arrays, "F_first_batch_logits")
            losses.append(method.backward(given))
            if epoch == n == 0:
                grad = method.keys.grad
                stored = arrays.get("grad/adapter.weight", grad.new_zeros(0))
                scale = stored.abs().max().item() if len(stored) else 1.0
                torch.testing.assert_close(
                    grad.flatten()[: len(stored)], stored, rtol=1e-3, atol=1e-3 * scale
                )
                close(losses[0], arrays, "loss", atol=1e-6)
                close(grad.norm(), arrays, "gradnorm/adapter.weight", atol=1e-6)
                grads = {"grad/adapter.weight", "gradnorm/adapter.weight"}
                compared |= (grads | {"loss"}) & set(arrays)
            optimizer.step()
        method.eval()
        if method.keep_best(test, labels["test"]):  # as published: on test images
            saved.append(method.keys.detach().clone())
    found = {
        "F_losses": torch.stack(losses),
        "F_saved_weight_norms": torch.stack([keys.norm() for keys in saved]),
        "F_last_saved_weight": saved[-1].flatten()[:256],
    }
    tolerance = {"F_losses": 1e-3, "F_last_saved_weight": 1e-4}
    for array, ours in found.items():
        if close(ours, arrays, array, atol=tolerance.get(array, 1e-3)):
            compared.add(array)
    return compared


OWN = {("tip_adapter", None): check_tip_adapter}
