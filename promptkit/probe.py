"""The linear probe: logistic regression on frozen image features, the baseline of the
few-shot figures.

Zhou et al. 2022 (CoOp), section 4.1, after Radford et al. 2021: L-BFGS, L2 penalty, its
strength chosen on min(shots, 4) validation images a class by a coarse grid and a binary
search in log space.
"""

import warnings

import numpy as np

from promptkit.data import frozen_features


def linear_probe(clip, dataset, steps: int = 2) -> float:
    """Test accuracy in percent of a probe trained on `dataset.train`, its strength
    chosen on `dataset.val`.

    Args:
        clip (FrozenCLIP): gives the features, not normalised, as in the paper.
        dataset (Dataset): usually a `few_shot` one.
        steps: bisection steps after the grid 1e6, 1e4, ..., 1e-6. The paper takes 8,
            and up to 1000 iterations a fit where this takes 150, to save time.
    """
    from sklearn.exceptions import (
        ConvergenceWarning,
    )  # slow to import, and needed here alone
    from sklearn.linear_model import LogisticRegression

    parts = {}
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        parts[name] = frozen_features(clip, split).cpu().numpy(), split.labels.numpy()
    scale = parts["train"][
        0
    ].std()  # keeps L-BFGS well conditioned; the grid of C absorbs it

    def fit(strength):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # far ends of the grid stop at the iteration limit
            warnings.filterwarnings(
                "ignore", "The number of unique classes is greater", UserWarning
            )  # one shot
            return LogisticRegression(C=strength, max_iter=150).fit(
                parts["train"][0] / scale, parts["train"][1]
            )

    def accuracy(strength, part="val"):
        x, y = parts[part]
        return 100 * np.mean(fit(strength).predict(x / scale) == y)

    grid = [float(10.0**e) for e in range(-6, 7, 2)]
    scores = {c: accuracy(c) for c in grid}
    peak = int(np.argmax([scores[c] for c in grid]))
    low, high = grid[max(peak - 1, 0)], grid[min(peak + 1, len(grid) - 1)]
    for _ in range(steps):
        scores.update({c: accuracy(c) for c in (low, high) if c not in scores})
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if scores[low] >= scores[high] else (middle, high)
    best = max(scores, key=scores.get)
    return float(accuracy(best, "test"))
