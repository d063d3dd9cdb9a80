"""Fixtures of the weak detectors: both classifiers, every detector, every mixture."""

import torch
from own import close, described_images
from seeded import seeded
from torch.nn.functional import normalize

from promptkit.method import Batch
from promptkit.methods.weak_detectors import WeakDetectors

DETECTED = {"msp": "msp", "negenergy": "energy_twice", "entropy": "entropy"}


def check_weak_detectors(clip, fixture, arrays):
    """Class features before they are normalised, the detectors of both logits, and for
    each mode the weights and the mixed logits.
    """
    names, options = fixture["classnames"], fixture["hyperparameters"]
    batch = Batch(images=described_images(fixture))

    modes = options.get("modes") or [options["mode"]]

    def make(mode):
        method = WeakDetectors.from_official(clip, names, options | {"mode": mode})
        official = {
            name: p.get("mean", 0.0)
            + seeded(f"{fixture['name']}/{name}", p["shape"], p["std"])
            for name, p in fixture["parameters"].items()
        }
        method.load_official(official)
        return method.eval()

    method = make(modes[0])
    with torch.no_grad():
        image, text = method.features(batch)
        done = method.compete(image, text)
    compared = [
        close(normalize(image, dim=-1), arrays, "image_features", atol=1e-5),
        close(text, arrays, "text_fs_unnormalised"),
        close(method.zero_shot, arrays, "text_zs_unnormalised"),
        close(done.zero_logits, arrays, "logits_zs"),
        close(done.tuned_logits, arrays, "logits_fs"),
    ]
    for official, detector in DETECTED.items():
        sign = -1 if official == "entropy" else 1  # theirs is the entropy itself
        for end, logits in (("zs", done.zero_logits), ("fs", done.tuned_logits)):
            sure = sign * method.detect(logits, detector)
            compared.append(close(sure, arrays, f"{official}_{end}", atol=1e-6))
    gain = method.detect(done.tuned_logits, "entropy")
    gain = gain - method.detect(done.zero_logits, "entropy")
    compared.append(close(gain, arrays, "infogain", atol=1e-6))
    for mode in modes:
        method = make(mode)
        with torch.no_grad():
            weight = method.compete(*method.features(batch)).weight
        compared.append(close(weight, arrays, f"weight/{mode}", atol=1e-5))
        compared.append(close(method.logits(batch), arrays, f"logits/{mode}"))
    known = sum(compared)
    assert known == len(arrays), f"{len(arrays) - known} arrays were not compared"


OWN = {("weak_detectors", None): check_weak_detectors}
