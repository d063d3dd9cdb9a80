"""The linear probe: logistic regression on frozen image features, the baseline of the
few-shot figures.

Zhou et al. 2022 (CoOp), section 4.1, after Radford et al. 2021: L-BFGS, L2 penalty, its
strength chosen on min(shots, 4) validation images a class by a coarse grid and a binary
search in log space.

Beside the official code, which starts a search of 8 steps from 0.1 and 10 times the
best strength of the grid 1e6, 1e4, ..., 1e-6, fits with up to 1000 iterations and takes
features as they are, this one searches 2 steps between the neighbours of the best on
that grid, fits with up to 150 and divides the features by their standard deviation,
which shifts the grid. The official code draws ImageNet's validation images from its
test images; here that is refused.
"""

import warnings

import numpy as np

from promptkit.data import frozen_features
from promptkit.errors import InputError


def linear_probe(clip, dataset, steps: int = 2) -> float:
    """Test accuracy in percent of a probe trained on `dataset.train`, its strength
    chosen on `dataset.val`.

    Args:
        clip (FrozenCLIP): gives the features, not normalised, as in the paper.
        dataset (Dataset): usually a `few_shot` one.
        steps: bisection steps after the grid 1e6, 1e4, ..., 1e-6. The paper takes 8,
            and up to 1000 iterations a fit where this takes 150, to save time.

    Raises:
        InputError: the dataset has no validation images of its own, such as ImageNet.
    """
    # slow to import, and needed here alone
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not len(dataset.val) or dataset.val_is_test:
        raise InputError(
            f"{dataset.name} has no validation images of its own to choose the linear"
            " probe's strength on"
            + (": its val is its test" if len(dataset.val) else "")
        )
    parts = {}
    for name in ("train", "val", "test"):
        split = getattr(dataset, name)
        parts[name] = frozen_features(clip, split).cpu().numpy(), split.labels.numpy()
    # keeps L-BFGS well conditioned; the grid of C absorbs it
    scale = parts["train"][0].std()

    def fit(strength):
        with warnings.catch_warnings():
            # far ends of the grid stop at the iteration limit
            warnings.simplefilter("ignore", ConvergenceWarning)
            # with one shot
            warnings.filterwarnings(
                "ignore", "The number of unique classes is greater", UserWarning
            )
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
