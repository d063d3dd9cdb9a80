"""What APEX's fixtures hold beside the common arrays."""

from dataclasses import replace

import torch
from own import close
from seeded import seeded
from torch.nn.functional import normalize

from promptkit.prompts import assemble
from promptkit.towers import Replace


def also_apex(method, fixture, arrays, batch):
    """The distances and alpha of the classes, and the scores of new ones as the
    official code has them, whose second, frozen CLIP carries random prompts that
    nothing trains: in the image tower, and with deep words in the text tower too.
    """
    tower = "clip_model_temp."
    stale = {
        name.removeprefix(tower): seeded(
            f"{fixture['name']}/{name}", p["shape"], p["std"]
        )
        for name, p in fixture.get("frozen_parameters", {}).items()
        if name.startswith(tower)
    }
    behind, first = method.clip.image_tower.length, stale.pop("visual.VPT", None)
    words = {block(n): (1, p) for n, p in stale.items() if n.startswith("transformer")}
    deep = {block(n): (behind, p) for n, p in stale.items() if n.startswith("visual")}

    def aim(names):
        method.set_classes(names)
        if words:
            vars(method)["distances"] = stale_distances(method, words)

    method.eval()
    aim(fixture["classnames"])
    close(method.mixing[0][:, None], arrays, "alpha_base", atol=1e-5)
    aim(fixture["new_classnames"])
    average, nearest = method.distances
    compared = [
        close(average[:, None], arrays, "diff_avg", atol=1e-5),
        close(nearest[:, None], arrays, "diff_nn", atol=1e-5),
        close(method.mixing[0][:, None], arrays, "alpha_new", atol=1e-5),
    ]
    assert any(compared)
    if (deep or words or first is not None) and "logits_new" in arrays:
        with torch.no_grad():
            features = method.clip.image(batch.images, first, Replace(deep))
        logits = method.logits(replace(batch, features=features))
        close(logits, arrays, "logits_new")


def block(name):
    """The block that a prompt's official name is about."""
    return int(name.partition("resblocks.")[2].partition(".")[0])


@torch.no_grad()
def stale_distances(method, words):
    """Both distances of the classes, (C,), from texts with these words in blocks."""

    def features(names):
        texts = [method.template.replace("{}", name) for name in names]
        prompt = assemble(method.clip, names, [texts])
        return normalize(method.clip.text(prompt, Replace(words))[0], dim=-1)

    similarity = features(method.trained_on) @ features(method.classnames).T
    return 1 - similarity.mean(0), (1 - similarity.amax(0)).clamp(min=0)


ALSO = {"apex": also_apex}
