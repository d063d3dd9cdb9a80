"""How sure a mean is: Student's interval over seeds, for tasks that are what they are.

What is claimed of the average over some tasks is claimed of just these; random is what
a seed draws: images, initial values, order. So the seeds' spread is taken within each
task. As the draws of different tasks are independent (a test looks whether the runs
that ship agree), the average over T tasks and S seeds has the variance
``sum_t s_t^2 / T^2 / S`` with the degrees of freedom of Welch (1947, "The
generalization of Student's problem when several different population variances are
involved") and Satterthwaite (1946, "An approximate distribution of estimates of
variance components"): up to T (S - 1), where the S averages alone would have S - 1.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from promptkit.errors import InputError

MOST_SEEDS = 1000  # beyond which a claim counts as out of reach


@dataclass(frozen=True)
class Spread:
    """The mean of some values and how it would move with other seeds."""

    mean: float
    deviation: float  # standard deviation of one seed's value, or average over tasks
    n: int  # seeds, or independent values
    tasks: int = 1
    alike: float = 1.0  # effective number of tasks that the deviation is known from

    def half(self, n=None, level=0.95):
        """Half the width of the interval, with n seeds (or an array of such); NaN with
        fewer than two.

        Raises:
            InputError: the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise InputError(
                f"the level of an interval lies between 0 and 1, not {level}"
            )
        n = np.asarray(self.n if n is None else n, float)
        with np.errstate(invalid="ignore", divide="ignore"):
            t = stdtrit((n - 1) * self.alike, (1 + level) / 2)
            return np.where(n > 1, t * self.deviation / np.sqrt(n), math.nan)

    def interval(self, level=0.95) -> tuple[float, float, float]:
        """``(mean, low, high)``."""
        half = float(self.half(level=level))
        return self.mean, self.mean - half, self.mean + half


def spread(values) -> Spread:
    """Mean and spread of independent values, (n,); of the values of S seeds on each of
    T tasks, (T, S); or of a series of :func:`promptkit.results.differences`, whose
    index tells tasks ("dataset") and seeds: what a seed has several of on a task
    (targets, shots) is averaged first, and seeds that some task lacks are left out.

    Of several tasks with one value each the tasks are the independent values.
    """
    if isinstance(values, pd.Series) and {"dataset", "seed"} <= {*values.index.names}:
        table = values.groupby(level=["dataset", "seed"]).mean().unstack("seed")
        table = table.dropna(axis=1)
        values = table if table.shape[1] > 1 else values
    values = np.asarray(values if hasattr(values, "__array__") else list(values), float)
    by_task = np.atleast_2d(values)
    if by_task.size == 0:
        return Spread(math.nan, math.nan, 0)
    tasks, n = by_task.shape
    mean = float(by_task.mean())
    if n < 2:
        return Spread(mean, math.nan, n, tasks)
    squares = by_task.var(axis=1, ddof=1)
    total = float(squares.sum())
    alike = total**2 / float(np.square(squares).sum()) if total > 0 else float(tasks)
    return Spread(mean, math.sqrt(total) / tasks, n, tasks, alike)


def interval(values, level=0.95) -> tuple[float, float, float]:
    """Mean and two-sided Student t interval: ``(mean, low, high)``.

    Args:
        values: see :func:`spread`; fewer than two have no interval: low and high are
            NaN.

    Raises:
        InputError: the level is not between 0 and 1.
    """
    return spread(values).interval(level)


def seeds_needed(found: Spread, distance: float, level=0.95) -> int | None:
    """How many seeds decide a claim if mean and spread stay what was measured: the
    smallest number whose interval has a half-width below the distance.

    Such a number is an order of magnitude: more seeds move the mean, too.

    Args:
        found: of what was measured.
        distance: of its mean from the threshold, in the same units.

    Returns:
        None where ``MOST_SEEDS`` are not enough, or where there is no deviation: of
        fewer than two values.
    """
    if not (math.isfinite(found.deviation) and distance > 0):
        return None
    n = np.arange(2, MOST_SEEDS + 1)
    enough = found.half(n, level) < distance
    return int(n[enough][0]) if enough.any() else None
