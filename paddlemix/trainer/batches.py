"""Micro-batches by whole optimizer steps, each with the number of supervised tokens of its global batch."""

from typing import Any, Callable, Dict, Iterator, Optional

import numpy as np
import paddle
from paddle.io import BatchSampler, Dataset

from paddlemix.datasets.parallel import BatchLoader
from paddlemix.datasets.samplers import Unlabelled
from paddlemix.errors import UserError
from paddlemix.models.llava.constants import IGNORE_INDEX

__all__ = ["GlobalBatchLoader", "UnreadableBatch", "WithoutLabels", "count_supervised"]

COUNT_KEY = "supervised_tokens"


def count_supervised(labels: Any) -> int:
    """Labels [B, T] that a loss is taken at; the first of a row is predicted from nothing."""
    return int((np.asarray(labels)[:, 1:] != IGNORE_INDEX).sum())


class UnreadableBatch(UserError):
    """The next batch can't be read; the model is as the last whole step left it."""


class GlobalBatchLoader:
    """Iterates an epoch's micro-batches of this rank, window by window of ``accumulation_steps``.

    The micro-batches of a window are read before the first of them is given out, so that all ranks' supervised tokens
    in the global batch are known when the first loss is computed.

    Args:
        dataset, collator: as ``BatchLoader`` takes them.
        sampler: gives lists of indices, a multiple of ``accumulation_steps`` in an epoch, and has ``set_epoch``.
        num_workers: processes that read rows; 0 reads in a thread of this one.
        all_ranks_sum: sums a number over the ranks; None on one rank.
        before_skipped: is called before each micro-batch that is passed over.

    Attributes:
        epoch (int): the epoch that the next iteration gives.
        skip (int): micro-batches that the next iteration passes over, given out as None and not read: those that a
            resumed run has trained on.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Any,
        collator: Callable,
        accumulation_steps: int = 1,
        num_workers: int = 0,
        all_ranks_sum: Optional[Callable[[int], int]] = None,
        before_skipped: Callable[[], Any] = lambda: None,
    ):
        self.dataset, self.sampler, self.collator = dataset, sampler, collator
        self.accumulation_steps, self.num_workers = accumulation_steps, num_workers
        self.all_ranks_sum = all_ranks_sum or (lambda number: number)
        self.before_skipped = before_skipped
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Optional[Dict[str, paddle.Tensor]]]:
        self.sampler.set_epoch(self.epoch)
        batches = list(self.sampler)
        skip, self.skip, self.epoch = self.skip, 0, self.epoch + 1
        for _ in range(skip):
            self.before_skipped()
            yield None
        loader = BatchLoader(
            WithoutLabels(self.dataset),
            batch_sampler=_ListedBatches(batches[skip:]),
            collate_fn=self.collator,
            num_workers=self.num_workers,
        )
        window = []
        try:
            for batch in loader:
                window.append(batch)
                if len(window) == self.accumulation_steps:
                    total = self.all_ranks_sum(sum(count_supervised(held["labels"]) for held in window))
                    for held in window:
                        yield {**held, COUNT_KEY: max(total, 1)}
                    window = []
        except UserError as error:
            raise UnreadableBatch(str(error)) from error


class WithoutLabels(Dataset):
    """A dataset that honours the samplers' ``Unlabelled`` indices: such a sample comes without its labels."""

    def __init__(self, dataset: Any):
        super().__init__()
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        sample = self.dataset[int(index)]
        if isinstance(index, Unlabelled):
            return {**sample, "labels": [IGNORE_INDEX] * len(sample["labels"])}
        return sample


class _ListedBatches(BatchSampler):
    """Batches of indices that were chosen already."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)
