"""How sure a mean is: by hand, by simulation, and on the runs that ship."""

import math
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_results import base_new, table

from promptkit import evidence
from promptkit.errors import InputError
from promptkit.intervals import Spread, interval, seeds_needed, spread
from promptkit.results import differences, harmonic_mean, label, linear_harmonic_mean


def test_interval_by_hand():
    # mean 2, sample sd 1, n = 3, t(0.975; 2) = 4.302653: half-width 4.302653 / sqrt(3)
    # = 2.484138
    assert interval([1, 2, 3]) == pytest.approx(
        (2, 2 - 2.484138, 2 + 2.484138), abs=1e-6
    )
    # mean 5, sd sqrt(8) = 2.828427, n = 2, t(0.95; 1) = 6.313752: half-width 6.313752 *
    # 2 = 12.627503
    assert interval([3, 7], level=0.9) == pytest.approx(
        (5, 5 - 12.627503, 5 + 12.627503), abs=1e-5
    )
    assert interval([4, 4, 4]) == (4, 4, 4)
    values = np.random.default_rng(0).normal(size=20)
    expected = stats.t.interval(0.99, 19, values.mean(), stats.sem(values))
    assert interval(values, 0.99)[1:] == pytest.approx(expected)


def test_interval_of_too_few():
    assert interval([5.0])[0] == 5 and all(map(math.isnan, interval([5.0])[1:]))
    assert all(map(math.isnan, interval([])))
    with pytest.raises(InputError, match="between 0 and 1, not 95"):
        interval([1, 2], level=95)


def test_seeds_on_several_tasks_by_hand():
    # Variances 1 and 4: a seed's average has sd sqrt(5) / 2, known with 2 * 5^2 / (1 +
    # 16) degrees of freedom.
    values = np.array([[1.0, 2.0, 3.0], [10.0, 12.0, 14.0]])
    found = spread(values)
    assert (found.mean, found.n, found.tasks) == (7, 3, 2)
    assert found.deviation == pytest.approx(math.sqrt(5) / 2)
    half = stats.t.ppf(0.975, 2 * 25 / 17) * math.sqrt(5) / 2 / math.sqrt(3)
    assert interval(values)[1:] == pytest.approx((7 - half, 7 + half))
    # Welch's two-sample test asks the same of a difference of two means.
    a, b = values
    known = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    mine = interval(np.array([a, -b]))  # its average: half the difference
    assert (2 * mine[1], 2 * mine[2]) == pytest.approx((known.low, known.high))


def test_tasks_without_any_spread():
    assert interval(np.array([[1.0, 1.0], [3.0, 3.0]])) == (2, 2, 2)
    # One that does not move says nothing of how sure the spread of the other is.
    found = spread(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
    assert found.alike == 1 and found.deviation == pytest.approx(0.5)


def test_the_true_mean_is_inside_as_often_as_promised():
    rng = np.random.default_rng(0)
    for tasks, seeds in ((4, 3), (11, 3), (11, 5)):
        scale = rng.gamma(1.0, 2.0, size=tasks)  # some tasks spread much more
        draws = rng.normal(size=(4000, tasks, seeds)) * scale[:, None]
        ends = np.array([interval(draw)[1:] for draw in draws])
        inside = ((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean()
        assert 0.94 < inside < 0.975
        narrow = np.diff(ends).mean()
        wide = np.mean([np.diff(interval(draw.mean(axis=0))[1:]) for draw in draws])
        assert narrow < 0.9 * wide  # than that of the seeds' averages


def test_an_index_tells_tasks_and_seeds():
    runs = table(
        *(
            base_new(80 + s * (i + 1), 60, dataset=d, seed=s)
            for i, d in enumerate(("pets", "cars"))
            for s in (1, 2, 3)
        ),
        *(base_new(70, 65, method="clip", dataset=d, seed=0) for d in ("pets", "cars")),
    )
    apart = differences(runs, "coop", "clip", "base", average=True)
    assert len(apart) == 6
    assert interval(apart) == interval(np.array([[11.0, 12, 13], [12.0, 14, 16]]))
    assert interval(apart[apart.index.get_level_values("dataset") == "cars"]) == (
        pytest.approx(interval([12, 14, 16]))
    )
    # A seed that one task lacks is left out; several values of a seed are averaged.
    assert spread(apart.iloc[:-1]).n == 2
    assert spread(pd.concat([apart, apart + 2])) == spread(apart + 1)
    # One value a task: the tasks are what is independent.
    one = apart[apart.index.get_level_values("seed") == 1]
    assert interval(one) == pytest.approx(interval([11, 12]))


def test_linear_harmonic_mean():
    rng = np.random.default_rng(0)
    base, new = 80 + rng.normal(size=(11, 3)), 60 + rng.normal(size=(11, 3))
    values = linear_harmonic_mean(base, new)
    whole = harmonic_mean(base.mean(), new.mean())
    assert values.mean() == pytest.approx(whole)
    seeds = harmonic_mean(base.mean(axis=0), new.mean(axis=0))
    assert values.mean(axis=0) == pytest.approx(seeds, abs=0.02)


def test_seeds_that_are_needed():
    found = Spread(mean=1.0, deviation=2.0, n=3, tasks=11, alike=8.0)
    needed = seeds_needed(found, 1.0)
    assert found.half(needed) < 1 <= found.half(needed - 1)
    assert needed < seeds_needed(Spread(1.0, 2.0, 3), 1.0)


def test_draws_of_different_tasks_are_independent():
    """What the intervals stand on: over the shipped runs of two variants, a seed's
    averages over the tasks vary as much as independent tasks make them.
    """
    rows = evidence.load(protocol="base-to-new", profile="mini")
    rows = rows[rows["split"].isin(["base", "new"]) & (rows["seed"] > 0)]
    rows = rows.assign(label=label(rows) + rows["model"])
    for _, part in rows.groupby("split"):
        tables = []
        for _, variant in part.groupby("label"):
            found = variant.pivot_table(index="dataset", columns="seed", values="value")
            tables.append(found.reindex(columns=[1, 2, 3]).dropna())
        few = ["cars", "flowers", "sat", "scenes"]  # the tasks of most ablations
        tables = [t.loc[few].to_numpy() for t in tables if {*few} <= {*t.index}]
        apart = np.stack([a - b for a, b in combinations(tables, 2)])  # (pairs, T, S)
        averages = apart.mean(axis=1).var(axis=1, ddof=1).sum()
        expected = apart.var(axis=2, ddof=1).sum() / len(few) ** 2
        assert len(apart) > 1000 and 0.85 < averages / expected < 1.15
