"""Which samples make a batch: whole global batches, dealt to ranks and micro-batches.

The order of an epoch is cut into global batches of ``batch_size x num_replicas x accumulation_steps`` samples, and
each of them is dealt out. So 1 x 8, 2 x 4 and 8 x 1 (batch x accumulation), on one rank or several, put the same
samples into the same optimizer step, and every sample is used exactly once per epoch.
"""

from typing import Any, Iterator, List, Optional, Sequence

import numpy as np
from paddle.io import DistributedBatchSampler

__all__ = ["GlobalBatchSampler", "ModalityLengthSampler", "Unlabelled", "group_by_modality_length"]

WINDOW = 32  # global batches whose samples are sorted together


class Unlabelled(int):
    """An index whose sample is used without its labels, so that it adds nothing to the loss.

    When the last global batch of an epoch has fewer samples than micro-batches, the ranks without one still have to
    run a step, for the others wait for them.
    """


class GlobalBatchSampler(DistributedBatchSampler):
    """Batches of indices for one rank; each epoch is a new order, the same on every rank.

    Args:
        dataset: anything with a length.
        batch_size: samples in one micro-batch of one rank.
        num_replicas, rank: how many ranks read the data, and which one this is.
        accumulation_steps: micro-batches of an optimizer step.
        shuffle: a new order each epoch, from ``seed`` and the epoch's number (:meth:`set_epoch`); else the data's.
        drop_last: leave out the samples that don't fill a global batch; else the last one is smaller.

    Its length, the micro-batches of this rank in an epoch, is a multiple of ``accumulation_steps``: no optimizer step
    reaches over the end of an epoch.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        accumulation_steps: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ):
        super().__init__(
            dataset, batch_size, num_replicas=num_replicas, rank=rank, shuffle=shuffle, drop_last=drop_last
        )
        self.seed = seed
        self.accumulation_steps = accumulation_steps

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.nranks * self.accumulation_steps

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.global_batch_size)
        return (whole + bool(rest and not self.drop_last)) * self.accumulation_steps

    def __iter__(self) -> Iterator[List[int]]:
        # a generator of its own per epoch: going on in the middle of training needs no state but the epoch's number
        order = self._order(np.random.default_rng([self.seed, self.epoch])).tolist()
        for start in range(0, len(order), self.global_batch_size):
            chosen = order[start : start + self.global_batch_size]
            if len(chosen) < self.global_batch_size and self.drop_last:
                return
            yield from self._deal(chosen)

    def _order(self, random: np.random.Generator) -> np.ndarray:
        return random.permutation(len(self.dataset)) if self.shuffle else np.arange(len(self.dataset))

    def _deal(self, chosen: Sequence[int]) -> Iterator[List[int]]:
        """This rank's micro-batches of one global batch, as equal in size as can be."""
        slots = self.nranks * self.accumulation_steps
        bounds = [len(chosen) * slot // slots for slot in range(slots + 1)]
        for step in range(self.accumulation_steps):
            slot = step * self.nranks + self.local_rank
            yield chosen[bounds[slot] : bounds[slot + 1]] or [Unlabelled(chosen[0])]


class ModalityLengthSampler(GlobalBatchSampler):
    """``group_by_modality_length``: global batches of one modality and of similar lengths, so that little is padding.

    Args:
        lengths: tokens of each sample, positive where it has a picture, negative where it is text only.
        Others as in :class:`GlobalBatchSampler`.
    """

    def __init__(self, dataset: Any, batch_size: int, lengths: Optional[Sequence[int]] = None, **kwargs):
        super().__init__(dataset, batch_size, **kwargs)
        self.lengths = np.asarray(dataset.lengths if lengths is None else lengths, dtype=np.int64)
        if len(self.lengths) != len(dataset):
            raise ValueError(f"{len(self.lengths)} lengths for {len(dataset)} samples.")

    def _order(self, random: np.random.Generator) -> np.ndarray:
        return group_by_modality_length(self.lengths, self.global_batch_size, random)


def group_by_modality_length(lengths: Sequence[int], global_batch_size: int, random: np.random.Generator) -> np.ndarray:
    """An order of all samples in which each global batch has one modality and neighbours have similar lengths.

    Samples of a modality are shuffled and sorted by length within windows of ``WINDOW`` global batches: short ones
    meet short ones, but which ones changes from epoch to epoch. The batches are then shuffled. What doesn't fill a
    batch of its modality makes up the last ones, where one batch may hold both.

    Args:
        lengths: tokens of each sample, positive where it has a picture, negative where it is text only.

    Returns:
        The samples' numbers, each once; global batch k is the k-th slice of ``global_batch_size``.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    batches, rest = [], []
    for group in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths <= 0)):
        group = random.permutation(group)
        whole = len(group) - len(group) % global_batch_size
        rest.append(group[whole:][np.argsort(-np.abs(lengths[group[whole:]]), kind="stable")])
        for start in range(0, whole, WINDOW * global_batch_size):
            window = group[start : min(start + WINDOW * global_batch_size, whole)]
            window = window[np.argsort(-np.abs(lengths[window]), kind="stable")]
            batches.extend(window.reshape(-1, global_batch_size))
    batches = [batches[number] for number in random.permutation(len(batches))]
    return np.concatenate(batches + rest)
