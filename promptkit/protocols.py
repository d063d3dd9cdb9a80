"""The four protocols of the benchmark, each one call from a method's name to tidy rows
of results.
"""

import dataclasses
from collections.abc import Iterable

import pandas as pd

from promptkit.runs import Run, execute


def few_shot(
    method: str, dataset, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on ``shots`` images of every class and test on all test images.

    Args:
        method: a registered name, plug-ins around one such as "dept(maple)", or
            "linear-probe".
        dataset: name of a dataset, or a Dataset.
        shots, seed: training images a class; seed of the draw, of the initial values
            and of the training order.
        clip: name of a model, or a FrozenCLIP.
        options: other fields of :class:`~promptkit.runs.Run` (profile, max_steps, ...);
            ``results`` (folder, False for none), ``force`` (run again what is stored),
            ``progress`` and ``save`` (a file for the trained method) of
            :func:`~promptkit.runs.execute`; and by their own names fields of the recipe
            (epochs, lr, ...) and hyperparameters of the method (n_ctx, ...).

    Returns:
        Tidy rows with the columns ``promptkit.results.COLUMNS``; here one, split "all".
        Accuracies are in percent.

    Raises:
        InputError: a name, an option or the data cannot be used.
    """
    return _single("few-shot", method, dataset, shots, seed, clip, options)


def base_to_new(
    method: str, dataset, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on the base classes, test on base and on new classes, each among its own
    names.

    The images are drawn over all classes before the base classes are selected, as in
    the few-shot protocol. The arguments are those of :func:`few_shot`; the rows are
    "base", "new" and "hm", their harmonic mean.
    """
    return _single("base-to-new", method, dataset, shots, seed, clip, options)


def cross_dataset(
    method: str, source, targets: Iterable, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on all classes of a source and test on it and on other datasets, re-aimed
    at their classes.

    The other arguments are those of :func:`few_shot`; there is a row for the source and
    one for each target.
    """
    options = options | {"targets": tuple(targets)}
    return _single("cross-dataset", method, source, shots, seed, clip, options)


def domain_generalization(
    method: str, dataset, shots=16, seed=1, clip="mini", **options
) -> pd.DataFrame:
    """Train on all classes of a source and test on it and on its shifted versions (its
    ``shifts``).

    The arguments are those of :func:`few_shot`; there is a row for the source and one
    for each shift.
    """
    return _single("domain-generalization", method, dataset, shots, seed, clip, options)


def _single(protocol, method, dataset, shots, seed, clip, options):
    names = ("results", "force", "progress", "save")
    execution = {key: options.pop(key) for key in names if key in options}
    run = request(protocol, method, dataset, shots, seed, clip, options)
    return execute(run, **execution)


def request(protocol, method, dataset, shots, seed, clip, options) -> Run:
    """A run from options in one dict: what is no field of a run overrides the recipe or
    the hyperparameters.
    """
    known = {f.name for f in dataclasses.fields(Run)} - {"overrides"}
    named = {k: v for k, v in options.items() if k not in known | {"overrides"}}
    overrides = options.get("overrides", {}) | named
    fields = {k: v for k, v in options.items() if k in known}
    return Run(
        protocol, method, dataset, shots=shots, seed=seed, clip=clip,
        overrides=overrides, **fields,
    )  # fmt: skip
