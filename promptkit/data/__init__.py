"""Datasets: the mini world's tasks, the real benchmark and one's own images; samples
and splits of any of them.
"""

from promptkit.data.benchmark import DATASETS, data_root
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
from promptkit.data.features import frozen_features, transform
from promptkit.data.tasks import MINI_TASKS, SHIFTS, WORDS

__all__ = [
    "DATASETS",
    "MINI_TASKS",
    "SHIFTS",
    "WORDS",
    "Dataset",
    "Split",
    "base_new",
    "data_root",
    "few_shot",
    "frozen_features",
    "list_datasets",
    "load_dataset",
    "stamped_labels",
    "subset",
    "transform",
]
