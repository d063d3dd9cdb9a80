"""Choosing hyperparameters, on validation images alone."""

import itertools
from collections.abc import Iterable

import pandas as pd
from tqdm import tqdm

from promptkit.errors import InputError
from promptkit.protocols import request
from promptkit.runs import plan
from promptkit.train import accuracy, fit


def tune(
    method: str, dataset, grid: dict[str, list], shots=16, seeds: Iterable[int] = (1,),
    clip="mini", *, protocol="few-shot", split="val", progress=True, **options,
) -> pd.DataFrame:  # fmt: skip
    """Search a grid of overrides: train on the few shots, measure on the drawn
    validation images.

    In "base-to-new" both are of the base classes. Nothing is stored.

    Args:
        grid: name of a recipe field or hyperparameter -> values to try; all
            combinations are.
        split: "val". There is no other choice; the argument is there for the error that
            says so.

    Returns:
        A row a combination, best first, with its mean accuracy over the seeds in
        percent.

    Raises:
        InputError: a search on test data is asked for, or the dataset has no validation
            images of its own.
    """
    if split != "val":
        raise InputError(
            f"hyperparameters are tuned on validation images only, not on {split!r}"
        )
    if protocol not in ("few-shot", "base-to-new"):
        raise InputError(f"tune by 'few-shot' or 'base-to-new', not by {protocol!r}")
    combinations = [
        dict(zip(grid, values, strict=True))
        for values in itertools.product(*grid.values())
    ]
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    out = []
    for overrides in tqdm(combinations, desc=f"tuning {method}", disable=not progress):
        scores = []
        for seed in seeds:
            fixed = options.get("overrides", {}) | overrides
            more = options | {"overrides": fixed}
            planned = plan(request(protocol, method, dataset, shots, seed, clip, more))
            source = planned.source
            validation = source.val
            if not len(validation) or validation.key == source.test.key:
                raise InputError(
                    f"{source.name} has no validation images of its own to tune on"
                )
            drawn = planned.training_set()
            tuned = planned.build(drawn)
            steps = planned.run.max_steps
            fit(tuned, drawn, planned.recipe, seed, progress=False, max_steps=steps)
            scores.append(accuracy(tuned, drawn.val, seed=seed))
        out.append(
            overrides | {"accuracy": sum(scores) / len(scores), "seeds": len(scores)}
        )
    table = pd.DataFrame(out)
    return table.sort_values(
        "accuracy", ascending=False, kind="stable", ignore_index=True
    )
