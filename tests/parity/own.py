"""Checks of fixtures of kind "own": a function for a method and part, never for a file.

Parts without a function of their own go to the one of part ``None``.
"""

import torch
from seeded import seeded_images

from promptkit.methods.clip import CLIP

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def check_clip(clip, fixture, arrays):
    """Zero-shot logits and features, of one template and of an ensemble."""
    options, names = fixture["hyperparameters"], fixture["classnames"]
    described = fixture["images"]
    images = seeded_images(described["name"], described["batch"], described.get("resolution", 64))
    single = CLIP.from_official(clip, names, options)
    checked = {"": single}
    if "ensemble_templates" in options:
        checked["_ensemble"] = CLIP(clip, names, template=options["ensemble_templates"])
    for suffix, method in checked.items():
        torch.testing.assert_close(method.logits(images), arrays[f"logits{suffix}"], **CLOSE)
        text = arrays[f"text_features{suffix}"]
        torch.testing.assert_close(method.text_features(), text, rtol=1e-3, atol=1e-5)
    image = torch.nn.functional.normalize(single.image_features(images), dim=-1)
    torch.testing.assert_close(image, arrays["image_features"], rtol=1e-3, atol=1e-5)
    tokens = clip.tokenize([options["template"].format(name.replace("_", " ")) for name in names])
    assert torch.equal(tokens, arrays["tokens"])
    assert torch.equal(tokens.argmax(dim=-1), arrays["eot"])


OWN = {("clip", None): check_clip}
