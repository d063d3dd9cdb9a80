"""What decides a claim, what an undecided one lacks, and how the book shows it."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t
from test_results import base_new, table

from promptkit import pages
from promptkit.intervals import MOST_SEEDS, Spread, seeds_needed
from promptkit.results import (
    Claim,
    check_claim,
    claims_table,
    differences,
    load_claims,
    save_claims,
)


def half(values, n):
    """Half-width of the interval of n values with this spread."""
    return t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)


@pytest.mark.parametrize(
    ("values", "options", "distance"),
    [
        ([7, 9, 11], {"at_least": 8}, 1.0),
        ([-1, 1, 0.2], {}, 0.2 / 3),
        ([-3, 1, 0.2], {}, 0.6),
        ([0, 2, 1.1], {"within": 2}, 2 - 3.1 / 3),
        ([0, 2, 1.6], {"within": 1}, 0.2),
        ([0, -2, -1.6], {"within": 1}, 0.2),
    ],
)
def test_an_undecided_claim_says_what_would_decide_it(values, options, distance):
    claim = check_claim("A beats B", values, of="seeds", **options)
    assert claim.verdict == "undecided" and claim.needed > claim.n
    assert half(values, claim.needed) < distance <= half(values, claim.needed - 1)
    said = f"about {claim.needed:,} seeds would decide it"
    assert claim.would_decide() == said
    assert said in str(claim) and said in claim._repr_html_()
    assert claims_table([claim]).iloc[0].tolist()[-1] == said


def test_a_decided_claim_needs_nothing():
    claim = check_claim("A beats B", [1, 1.1, 1.2], of="seeds")
    assert claim.verdict == "holds" and claim.needed is None
    assert claim.would_decide() == "" and "would" not in claim._repr_html_()


def test_claims_that_no_number_of_seeds_decides():
    found = Spread(mean=0.0, deviation=1.0, n=3)
    assert seeds_needed(found, 0.0) is None and seeds_needed(found, 1e-3) is None
    assert seeds_needed(Spread(0.0, float("nan"), 1), 1) is None
    assert seeds_needed(Spread(0.0, 0.0, 3), 1e-9) == 2
    assert seeds_needed(found, 0.0621) == 999 and seeds_needed(found, 0.062) is None
    alone = check_claim("x", [1.0], of="seeds")
    assert alone.needed is None and alone.would_decide() == "1 seed cannot decide it"
    level = check_claim("x", [-1.0, 1.0], of="seeds")
    assert level.would_decide() == f"{MOST_SEEDS:,} seeds would not decide it"
    by_task = check_claim("x", [-1.0, 2.0], of="seeds on each of 11 tasks")
    assert by_task.would_decide() == f"about {by_task.needed} seeds would decide it"


def test_values_are_called_what_they_are():
    runs = table(
        *(base_new(80 + s, 60, dataset=d, seed=s) for d in "ab" for s in (1, 2, 3)),
        *(base_new(70, 65, method="clip", dataset=d, seed=0, shots=0) for d in "ab"),
    )
    over_seeds = differences(runs, "coop", "clip", "base", average=True)
    claim = check_claim("x", over_seeds)
    assert (claim.of, claim.n) == ("seeds on each of 2 tasks", 3)
    assert claim.measured().endswith("interval, 3 seeds on each of 2 tasks")
    assert check_claim("x", -over_seeds + 1).of == claim.of
    assert check_claim("x", over_seeds.groupby("seed").mean()).of == "seeds"
    assert check_claim("x", over_seeds.groupby("dataset").mean()).of == "tasks"
    assert check_claim("x", over_seeds.iloc[:3]).of == "seeds"
    assert check_claim("x", over_seeds.tolist()).of == "values"
    by_task = pd.Series([1.0, 2.0], pd.Index(["pets", "cars"], name="task"))
    assert check_claim("x", by_task).measured().endswith(", 2 tasks")
    assert check_claim("x", [1.0, 2.0]).of == "values"
    assert check_claim("x", [1.0, 2.0], of="images").of == "images"


def test_units():
    claim = check_claim("x", [0.5, 0.6], at_least=0.1, unit="")
    assert claim.criterion == "at least +0.1"
    assert claim.measured().startswith("+0.55 [")
    claim = check_claim("x", [20.0, 30.0], within=90, unit="degrees")
    assert claim.criterion == "within 90 degrees"
    assert claim.measured().startswith("+25.0 degrees [")


def test_claims_of_earlier_versions_are_read(tmp_path):
    claim = check_claim("one", [7, 9, 11], at_least=8, of="seeds")
    save_claims("05_kgcoop", [claim], tmp_path)
    assert load_claims(tmp_path)["05_kgcoop"] == [claim]
    path = tmp_path / "claims" / "05_kgcoop.json"
    (row,) = json.loads(path.read_text())
    for name in ("unit", "of", "needed"):
        del row[name]
    path.write_text(json.dumps([row]))
    (loaded,) = load_claims(tmp_path)["05_kgcoop"]
    assert isinstance(loaded, Claim) and loaded.estimate == claim.estimate


def test_the_page_of_claims(tmp_path):
    open_ = check_claim("A|B beats C.", [7, 9, 11], at_least=8, of="seeds")
    closed = check_claim("D is below E.", [1, 1.1, 1.2], of="seeds")
    save_claims("05_kgcoop", [open_, closed], tmp_path)
    page = pages.claims(tmp_path / "book", tmp_path).read_text()
    assert "| claim | asked | measured | verdict | chapter |" in page
    link = "{doc}`05 </notebooks/05_kgcoop>`"
    assert (
        "| A\\|B beats C. | at least +8 points | +9.0 points [+4.0, +14.0], 3 seeds"
        f" | **undecided**: about {open_.needed} seeds would decide it | {link}" in page
    )
    short = closed.measured(named=False)
    assert f"| D is below E. | more than 0 | {short} | **holds** |" in page
    assert page.count(link) == 2
