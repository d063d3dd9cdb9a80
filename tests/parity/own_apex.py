"""What APEX's fixtures hold beside the common arrays."""

from dataclasses import replace

import torch
from own import close
from seeded import seeded

from promptkit.towers import Replace


def also_apex(method, fixture, arrays, batch):
    method.eval()
    close(method.mixing[0][:, None], arrays, "alpha_base", atol=1e-5)
    method.set_classes(fixture["new_classnames"])
    average, nearest = method.distances
    compared = [
        close(average[:, None], arrays, "diff_avg", atol=1e-5),
        close(nearest[:, None], arrays, "diff_nn", atol=1e-5),
        close(method.mixing[0][:, None], arrays, "alpha_new", atol=1e-5),
    ]
    assert any(compared)
    stale = {
        name.removeprefix("clip_model_temp.visual."): seeded(
            f"{fixture['name']}/{name}", p["shape"], p["std"]
        )
        for name, p in fixture.get("frozen_parameters", {}).items()
    }
    if stale and "logits_new" in arrays:  # the frozen image tower's random prompts
        behind, first = method.clip.image_tower.length, stale.pop("VPT")
        deep = {int(name.split(".")[2]): (behind, p) for name, p in stale.items()}
        with torch.no_grad():
            features = method.clip.image(batch.images, first, Replace(deep))
        logits = method.logits(replace(batch, features=features))
        close(logits, arrays, "logits_new")


ALSO = {"apex": also_apex}
