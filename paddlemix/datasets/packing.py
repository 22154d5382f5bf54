"""Sequence packing (``mixtoken``): several samples in one sequence, none of which sees another.

A packed sequence carries ``segment_ids`` (1 for the first sample's tokens, 2 for the second's, …; the collator pads
with 0) and ``position_ids`` that start again at 0 with each sample; the decoder attends within one segment only.
"""

from bisect import bisect_right
from typing import Any, Dict, List, Sequence

import numpy as np
from paddle.io import Dataset

from paddlemix.datasets.samplers import Unlabelled
from paddlemix.errors import UserError
from paddlemix.models.llava.constants import IGNORE_INDEX

__all__ = ["PackedDataset", "join_samples", "pack_lengths"]

FULLEST_LIMIT = 200_000  # samples; the closer fit takes seconds below this, and a minute on half a million


def pack_lengths(lengths: Sequence[int], max_length: int, seed: int = 0) -> List[List[int]]:
    """Deals samples to as few sequences as the better of two heuristics of bin packing finds.

    Args:
        lengths: tokens of each sample, at least 1 and at most ``max_length``.
        seed: samples of equal length are dealt in an order that depends on it, and so are the sequences.

    Returns:
        The samples' numbers in each sequence; every sample is in exactly one. The same arguments give the same lists.

    Raises:
        UserError: a sample that no sequence can hold.

    >>> sorted(map(sorted, pack_lengths([6, 3, 4, 7], 10)))
    [[0, 2], [1, 3]]
    """
    if len(lengths) and max(lengths) > max_length:
        raise UserError(f"A sample has {max(lengths)} tokens, more than a sequence of max_length {max_length} holds.")
    random = np.random.default_rng(seed)
    samples: Dict[int, List[int]] = {}  # length -> the samples that have it
    for index in random.permutation(len(lengths)).tolist():
        samples.setdefault(int(lengths[index]), []).append(index)
    counts = {length: len(samples[length]) for length in sorted(samples, reverse=True)}
    packs = _best_fit(counts, max_length)
    if len(lengths) <= FULLEST_LIMIT:
        packs = min(packs, _fullest(counts, max_length), key=len)
    packs = [packs[number] for number in random.permutation(len(packs))]
    return [[samples[length].pop() for length in pack] for pack in packs]


def _best_fit(counts: Dict[int, int], max_length: int) -> List[List[int]]:
    """Best fit decreasing: each sample, the longest first, into the fullest sequence that still has room for it.

    Args:
        counts: how many samples have each length, the longest first.

    Returns:
        The lengths in each sequence.
    """
    packs: List[List[int]] = []
    by_room: Dict[int, List[int]] = {}  # tokens still free -> numbers of the sequences with that much room
    rooms = 0  # bit r is set where by_room[r] isn't empty, so the best fit is the lowest set bit from the length up
    for length, count in counts.items():
        for _ in range(count):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                number = by_room[room].pop()
                if not by_room[room]:
                    rooms &= ~(1 << room)
                packs[number].append(length)
            else:
                room, number = max_length, len(packs)
                packs.append([length])
            by_room.setdefault(room - length, []).append(number)
            rooms |= 1 << (room - length)
    return packs


def _fullest(counts: Dict[int, int], max_length: int) -> List[List[int]]:
    """One sequence after the other: the longest sample that is left, and those that fill the rest best.

    Which sums the samples can reach is kept as the bits of one number, so a sequence costs a few operations per length.
    Better than best fit where many samples of similar lengths meet (VQA), worse where few fit together.
    """
    counts = dict(counts)
    lengths = list(counts)
    shortest_first = lengths[::-1]
    packs: List[List[int]] = []
    for longest in lengths:
        while counts[longest]:
            counts[longest] -= 1
            pack, room = [longest], max_length - longest
            packs.append(pack)
            reached, steps = 1, []  # bit s of reached: some of the samples seen so far have s tokens together
            for length in lengths[len(lengths) - bisect_right(shortest_first, min(room, longest)) :]:
                count = min(counts[length], room // length)
                if not count:
                    continue
                steps.append((length, reached))
                some = 1
                while count:  # by twos, so that any number of them up to count is tried
                    some = min(some, count)
                    reached |= reached << (some * length)
                    count -= some
                    some *= 2
                reached &= (2 << room) - 1
                if reached >> room:
                    break  # nothing fills it better
            total = reached.bit_length() - 1
            for length, before in reversed(steps):
                while not before >> total & 1:
                    total -= length
                    counts[length] -= 1
                    pack.append(length)
    return packs


def join_samples(samples: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """One packed sample: the samples' tokens one after the other, their pictures in the same order.

    Args:
        samples: ``input_ids`` and ``labels`` (T_i ints), ``pixel_values`` ([n_i, 3, H, W] or None), ``image_sizes``
            (list of (width, height)).

    Returns:
        The same keys, with ``segment_ids`` and ``position_ids`` (sum of T_i ints).
    """
    joined: Dict[str, Any] = {"input_ids": [], "labels": [], "segment_ids": [], "position_ids": [], "image_sizes": []}
    pixel_values = []
    for segment, sample in enumerate(samples, 1):
        length = len(sample["input_ids"])
        joined["input_ids"].extend(sample["input_ids"])
        # nothing before it in its own sample can predict the first token; the sample in front of it must not
        joined["labels"].extend([IGNORE_INDEX, *sample["labels"][1:]])
        joined["segment_ids"].extend([segment] * length)
        joined["position_ids"].extend(range(length))
        if sample.get("pixel_values") is not None:
            pixel_values.append(np.asarray(sample["pixel_values"]))
            joined["image_sizes"].extend(sample["image_sizes"])
    joined["pixel_values"] = np.concatenate(pixel_values) if pixel_values else None
    return joined


class PackedDataset(Dataset):
    """Sequences of at most ``max_length`` tokens, packed from the samples of a dataset.

    Args:
        dataset: samples, and ``lengths`` (tokens of each; the sign, which tells pictures from text, is ignored).
        seed: see :func:`pack_lengths`.

    Attributes:
        packs (list of lists): the samples' numbers in each sequence.
        lengths (list of int): tokens in each sequence, positive where a sample with a picture is in it, else negative.
    """

    def __init__(self, dataset: Any, max_length: int, seed: int = 0):
        super().__init__()
        self.dataset = dataset
        self.max_length = max_length
        sizes = [abs(length) for length in dataset.lengths]
        self.packs = pack_lengths(sizes, max_length, seed)
        self.lengths = [
            sum(sizes[i] for i in pack) * (1 if any(dataset.lengths[i] > 0 for i in pack) else -1)
            for pack in self.packs
        ]

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        kind = type(index) if isinstance(index, Unlabelled) else int
        return join_samples([self.dataset[kind(i)] for i in self.packs[index]])

    @property
    def fill(self) -> float:
        """Which part of the sequences is tokens, from 0 to 1; the rest is padding."""
        return sum(map(abs, self.lengths)) / max(len(self) * self.max_length, 1)
