"""Checks of ArGue's fixtures: the sampling of attributes, and what the others hold
beside the common arrays.
"""

import torch
from own import close, described_images
from seeded import seeded

from promptkit.sampling import kmeans, sampled


def before_argue(method, fixture, batch, part):
    """The losses of its fixtures are without noise, but for "loss_noise"."""
    method.noise = 0.0


def also_argue(method, fixture, arrays, batch):
    """The terms of the loss, and the loss under the described noise."""
    before_argue(method, fixture, batch, "terms")
    image, text = method.features(batch)
    cross_entropy = method.criterion(batch, image, text)
    close(cross_entropy, arrays, "cross_entropy", atol=1e-6)
    close(method.text_to_text(), arrays, "text_to_text", atol=1e-6)
    close(method.text_to_bias(image), arrays, "text_to_bias", atol=1e-6)
    templates = method.option("templates")
    filled = [t.replace("{}", name) for t in templates for name in method.names]
    norms = method.clip.encode_text(filled).norm(dim=-1).view(len(templates), -1)
    close(norms, arrays, "class_text_features_norm")
    noise = seeded(f"{fixture['name']}/noise", method.references.shape)
    scale = fixture["hyperparameters"].get("noise", 0.05)
    total = cross_entropy + method.reg_weight * method.text_to_text(scale * noise)
    total = total + method.neg_weight * method.text_to_bias(image)
    close(total, arrays, "loss_noise", atol=1e-6)


def check_sampling(clip, fixture, arrays):
    """The clusters of the attributes of a class, and which of each stays."""
    options = fixture["hyperparameters"]
    lists = fixture["attributes"]
    lists = list(lists.values()) if isinstance(lists, dict) else lists
    assert len(lists) == 1, f"the sampling is checked of one class, not {len(lists)}"
    mode, first = options.get("mode", "cosine"), options.get("init", "first k rows")
    assert mode == "cosine", f"clusters are by cosine here, not {mode!r}"
    assert first == "first k rows", f"clusters start from the first k, not {first!r}"
    (texts,) = lists
    images = clip.encode_image(described_images(fixture))
    sample = sampled(clip, texts, options["n_clusters"], images)
    stops = {"iterations": options["max_iter"], "tolerance": options["tol"]}
    labels, centroids = kmeans(sample.features, options["n_clusters"], **stops)
    assert torch.equal(labels, sample.labels)
    compared = [
        close(sample.features, arrays, "attribute_features", atol=1e-5),
        close(labels, arrays, "cluster", rtol=0, atol=0),
        close(centroids, arrays, "centroids", atol=1e-5),
        close(sample.scores, arrays, "score"),
        close(sample.chosen, arrays, "chosen", rtol=0, atol=0),
    ]
    assert all(compared), "the fixture lacks an array that the sampling is checked by"


BEFORE = {"argue": before_argue}
ALSO = {"argue": also_argue}
OWN = {("argue", None): check_sampling}
