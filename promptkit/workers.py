"""Processes that share the work of a grid."""

import os
from collections.abc import Callable, Iterable, Iterator

import torch

from promptkit.errors import InputError


def parallel(
    function: Callable, items: Iterable, workers=1, scheduler=None, **arguments
) -> Iterator[tuple]:
    """Yield ``(item, function(item, **arguments))`` for each item as it is done.

    Args:
        workers: 1 runs here and in order; more run in so many processes of one thread
            each.
        scheduler: address of a Dask scheduler (``tcp://host:8786``); replaces
            ``workers``.

    Raises:
        InputError: the scheduler cannot be reached.
    """
    items = list(items)
    if scheduler:
        from distributed import Client, as_completed

        try:
            client = Client(scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise InputError(
                f"no Dask scheduler answers at {scheduler} ({error})"
            ) from None
        with client:
            futures = {
                client.submit(function, item, pure=False, **arguments): item
                for item in items
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
    elif workers <= 1 or len(items) < 2:
        for item in items:
            yield item, function(item, **arguments)
    else:
        from joblib import Parallel, delayed

        pool = Parallel(
            n_jobs=min(workers, len(items)), return_as="generator_unordered"
        )
        calls = (
            delayed(_in_worker)(function, i, item, arguments)
            for i, item in enumerate(items)
        )
        for i, result in pool(calls):
            yield items[i], result


def _in_worker(function, i, item, arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    return i, function(item, **arguments)
