"""What a dataset is: labelled images in splits, the classes' names and texts."""

import hashlib
import json
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from promptkit.data.benchmark import ENSEMBLE


@dataclass(frozen=True)
class Split:
    """Labelled images.

    Attributes:
        labels: (N,) int64; -1 where a label is not given.
        source: `source()` gives all images of the underlying data: (M, 3, H, W) uint8,
            or Files that are read when they are indexed.
        rows: (N,) int64, which of them are in this split.
        name: of the underlying data, if it is in memory; files are known by their
            content.
    """

    labels: torch.Tensor
    source: object
    rows: torch.Tensor
    name: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def key(self) -> str:
        """Names the underlying data, by the content of images in files."""
        return self.source().key if self.name is None else self.name

    @cached_property
    def identity(self) -> str:
        """32 hex digits that the images of the split and their labels give, in order.

        Of images in files it is the content that counts, not what they are called or
        where they lie. Only files of the split itself are read, once.

        Raises:
            InputError: a file is missing, empty or cannot be read.
        """
        digest = hashlib.sha256(json.dumps(self.labels.tolist()).encode())
        if self.name is None:
            digest.update(b"\n".join([b"", *self.source().digests(self.rows)]))
        else:
            digest.update(json.dumps([self.name, self.rows.tolist()]).encode())
        return digest.hexdigest()[:32]

    def same_images(self, other: "Split") -> bool:
        """Whether the underlying data of both are the same files, or bear one name."""
        if self.name is not None or other.name is not None:
            return self.name == other.name
        return self.source().same_as(other.source())

    def images(self, indices=None) -> torch.Tensor | list[torch.Tensor]:
        """Images as (n, 3, H, W) uint8: those at `indices` of the split, or all.

        Images of real datasets differ in size, so they are a list of n tensors (3, H,
        W). They are read anew each time.
        """
        return self.source()[self.rows if indices is None else self.rows[indices]]

    def take(self, indices, labels=None) -> "Split":
        """The split of the items at `indices`, with other `labels` if given."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        return replace(
            self,
            labels=self.labels[indices] if labels is None else labels,
            rows=self.rows[indices],
        )

    def without_labels(self) -> "Split":
        """The same images, all labels -1."""
        return replace(self, labels=torch.full_like(self.labels, -1))


@dataclass(frozen=True)
class Dataset:
    """A classification task.

    Attributes:
        template: the hand-written prompt, "{}" for the class name; templates: an
            ensemble of prompts.
        train, val, test: splits; the shifted sets have a test split alone (train and
            val are empty). ImageNet has no validation images of its own: its val is its
            test.
        descriptions: sentences or phrases by class name; empty if there are none.
        described: what they were read from in place of the dataset's own, such as
            "birds.json#1f3c5a"; "" elsewhere.
        shifts: names of its shifted versions.
        source_rows: in a shifted version, which of the source's classes its own are;
            None elsewhere.
        world: "mini" for the tasks of the mini world, "real" for all others.
        path: the absolute path of one's own data; "" elsewhere.
        pool: in a few-shot draw, all images for training that it was drawn from,
            without labels; of all classes, also once classes are selected.
        pool_classnames: the names of all classes of the pool.
    """

    name: str
    title: str
    classnames: list[str]
    template: str
    train: Split
    val: Split
    test: Split
    templates: tuple = ENSEMBLE
    descriptions: dict[str, list[str]] = field(default_factory=dict)
    described: str = ""
    shifts: tuple[str, ...] = ()
    source_rows: list[int] | None = None
    world: str = "real"
    path: str = ""
    pool: Split | None = None
    pool_classnames: list[str] = field(default_factory=list)

    @property
    def unlabelled(self) -> Split:
        """Images without labels (they are -1): the pool, or the images for training
        where nothing was drawn.
        """
        return self.train.without_labels() if self.pool is None else self.pool

    @property
    def val_is_test(self) -> bool:
        """Whether the images for validation are those for testing, as ImageNet's."""
        return len(self.val) > 0 and self.val.same_images(self.test)

    @cached_property
    def identity(self) -> str:
        """32 hex digits that the images of the three splits give by their content,
        their labels and order, and the class names: what is measured on a dataset
        belongs to these.

        Raises:
            InputError: a file is missing, empty or cannot be read.
        """
        splits = [s.identity for s in (self.train, self.val, self.test)]
        text = json.dumps([*splits, self.classnames])
        found = hashlib.sha256(text.encode()).hexdigest()[:32]
        if self.path and found not in _looked_through:
            _looked_through.add(found)
            _say_repeated(self)
        return found

    def for_training(self) -> "Dataset":
        """The dataset without images for testing, to be given to what learns; without
        those for validation too where they are the same.
        """
        val = self.val.take([]) if self.val_is_test else self.val
        return replace(self, test=self.test.take([]), val=val)


_looked_through = set()  # identities of one's own data that were looked at for copies


def _say_repeated(dataset):
    """Warn of pictures that are there twice: for training and for testing, or in two
    classes.
    """
    first, again, double = {}, [], []
    for part in (dataset.train, dataset.test, dataset.val):
        files, rows = part.source(), part.rows
        each = zip(
            rows.tolist(), part.labels.tolist(), files.digests(rows), strict=True
        )
        for row, label, digest in each:
            where, known = first.setdefault(digest, (part, label))
            if where is dataset.train and part is dataset.test:
                again.append(files.paths[row])
            if known != label:
                double.append(files.paths[row])
    for paths, what in (
        (again, "test images are training images too"),
        (double, "images stand in a second class too"),
    ):
        if paths:
            warnings.warn(
                f"{dataset.path}: {len(paths)} {what}, such as {paths[0]}", stacklevel=4
            )
