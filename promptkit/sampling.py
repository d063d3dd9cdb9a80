"""A few of many attributes of a class: clusters of their features, and of each cluster
the one that fits best.

ArGue: Attribute-Guided Prompt Tuning for Vision-Language Models; Tian et al., CVPR
2024; arXiv 2311.16494.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Sample:
    """Which of J attributes stay, and why."""

    features: Tensor  # (J, E), normalised, of the bare texts
    labels: Tensor  # (J,), the cluster of each
    centroids: Tensor  # (n, E), means of normalised features, not normalised themselves
    scores: Tensor  # (J,), how well each fits

    @property
    def chosen(self) -> Tensor:
        """Of each cluster the position of the best, clusters in order of their first
        member.
        """
        best = []
        for cluster in dict.fromkeys(self.labels.tolist()):
            members = (self.labels == cluster).nonzero()[:, 0]
            best.append(members[self.scores[members].argmax()])
        return torch.stack(best)


@torch.no_grad()
def sampled(clip, texts: list[str], n: int, images=None) -> Sample:
    """The attributes of a class that stay, at most n, one a cluster: the one that the
    class's images agree with most, or without images the one nearest to its centroid.

    Args:
        texts: J attributes.
        images: (K, E), frozen features of images of the class.
    """
    features = F.normalize(clip.encode_text(texts), dim=-1)
    labels, centroids = kmeans(features, n)
    if images is None or len(images) == 0:
        centres = F.normalize(centroids, dim=-1)[labels]  # (J, E)
        scores = clip.logit_scale * (features * centres).sum(-1)
    else:
        images = F.normalize(images.float(), dim=-1)
        scores = (clip.logit_scale * features @ images.T).mean(dim=1)
    return Sample(features, labels, centroids, scores)


def kmeans(x, n: int, iterations: int = 100, tolerance: float = 1e-4):
    """Clusters of unit vectors x (J, E) by cosine, from the first n of them on; a
    cluster that loses all its members has a centroid of zeros.

    Returns:
        Labels (J,) and centroids (n, E).
    """
    centroids = x[:n].clone()
    for _ in range(iterations):
        labels = (x @ F.normalize(centroids, dim=-1, eps=1e-8).T).argmax(dim=1)
        one_hot = F.one_hot(labels, len(centroids)).to(x.dtype)  # (J, n)
        before, counts = centroids, one_hot.sum(dim=0)[:, None]
        centroids = one_hot.T @ x / counts.clamp(min=1)
        if (centroids - before).square().sum() <= tolerance:
            break
    return labels, centroids
