"""Heads that belong to the classes that were trained: which of their rows answer."""

from collections import Counter
from functools import cached_property

import torch


class TrainedRows:
    """Mixed into a method with a head, a cache, say, that has a row for each trained
    class and nothing for others (DePT, Tip-Adapter).
    """

    def set_classes(self, classnames):
        super().set_classes(classnames)
        self.source_rows = None

    def aim(self, dataset):
        """Take over the dataset's classes; a shifted version of the trained dataset
        knows which of the trained classes its own are.
        """
        super().aim(dataset)
        rows = dataset.source_rows
        names = dict(enumerate(self.trained_on))
        if rows is not None and [names.get(row) for row in rows] == self.classnames:
            self.source_rows = rows

    @cached_property
    def rows(self):
        """For each class its row in the head, (C,), or None if one of them was not
        trained. Where two trained classes have one name and the dataset does not say
        which is meant, the first row is the first one's.
        """
        rows = self.source_rows
        if rows is None:
            known = {}
            for row, name in enumerate(self.trained_on):
                known.setdefault(name, []).append(row)
            seen, rows = Counter(), []
            for name in self.classnames:
                mine = known.get(name, [])
                rows += mine[min(seen[name], len(mine) - 1) :][:1]
                seen[name] += 1
        if len(rows) < len(self.classnames):
            return None
        return torch.tensor(rows, device=self.clip.device)
