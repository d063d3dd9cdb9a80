"""Datasets: the mini world's tasks, and the samples and splits that the benchmark draws from any dataset."""

from promptkit.data.datasets import (
    Dataset,
    Split,
    base_new,
    few_shot,
    list_datasets,
    load_dataset,
    stamped_labels,
    subset,
)
from promptkit.data.features import features, transform
from promptkit.data.tasks import MINI_TASKS, SHIFTS, WORDS

__all__ = ["MINI_TASKS", "SHIFTS", "WORDS", "Dataset", "Split", "base_new", "features", "few_shot", "list_datasets",
           "load_dataset", "stamped_labels", "subset", "transform"]  # fmt: skip
