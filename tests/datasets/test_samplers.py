"""Global batches: the same samples for every way to split them, each sample once per epoch."""

import numpy as np
import pytest

from paddlemix.datasets.samplers import GlobalBatchSampler, ModalityLengthSampler, Unlabelled

SPLITS = [(1, 8, 1), (1, 4, 2), (1, 1, 8), (2, 4, 1), (2, 2, 2), (4, 1, 2)]  # ranks, batch, accumulation


def epoch_of(size, split, kind=GlobalBatchSampler, epoch=0, **kwargs):
    """Global batches of one epoch: the indices of all ranks and micro-batches together."""
    ranks, batch, accumulation = split
    samplers = [
        kind(range(size), batch, num_replicas=ranks, rank=rank, accumulation_steps=accumulation, **kwargs)
        for rank in range(ranks)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    micro = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in micro} == {len(samplers[0])}, "ranks would wait for each other for ever"
    assert all(0 < len(indices) <= batch for batches in micro for indices in batches)
    steps = []
    for start in range(0, len(samplers[0]), accumulation):
        steps.append(
            [index for batches in micro for indices in batches[start : start + accumulation] for index in indices]
        )
    return steps


def labelled(step):
    return [index for index in step if not isinstance(index, Unlabelled)]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 37])
@pytest.mark.parametrize("split", SPLITS)
def test_every_sample_once_per_epoch_whatever_the_split(size, split):
    steps = epoch_of(size, split, seed=5)
    assert sorted(index for step in steps for index in labelled(step)) == list(range(size))
    assert [sorted(labelled(step)) for step in steps] == [sorted(step) for step in epoch_of(size, (1, 8, 1), seed=5)]


@pytest.mark.parametrize("split", SPLITS)
def test_a_small_rest_is_dropped_only_if_asked(split):
    assert len(epoch_of(37, split)) == 5
    dropped = epoch_of(37, split, drop_last=True)
    assert len(dropped) == 4 and all(len(labelled(step)) == 8 for step in dropped)


def test_each_epoch_has_its_own_order_and_a_seed_repeats_it():
    first, second = epoch_of(40, (1, 8, 1), epoch=0, seed=1), epoch_of(40, (1, 8, 1), epoch=1, seed=1)
    assert first != second
    assert second == epoch_of(40, (1, 8, 1), epoch=1, seed=1)
    assert first != epoch_of(40, (1, 8, 1), epoch=0, seed=2)
    assert sum(epoch_of(40, (1, 8, 1), shuffle=False), []) == list(range(40))


def mixed_lengths(size=1003, seed=0):
    random = np.random.default_rng(seed)
    return (random.integers(10, 2000, size) * random.choice([1, 1, -1], size)).tolist()


@pytest.mark.parametrize("split", SPLITS)
def test_grouping_by_modality_and_length(split):
    lengths = mixed_lengths()
    steps = epoch_of(1003, split, ModalityLengthSampler, lengths=lengths, seed=4)
    assert sorted(index for step in steps for index in labelled(step)) == list(range(1003))
    one_modality = [len({lengths[index] > 0 for index in step}) == 1 for step in steps]
    assert sum(one_modality) >= len(steps) - 1
    spread = [max(sizes) - min(sizes) for sizes in ([abs(lengths[index]) for index in step] for step in steps)]
    assert np.median(spread) < 100, "a random batch of eight spreads over about 1500 tokens"


def test_grouped_batches_come_in_random_order_and_change_with_the_epoch():
    lengths = mixed_lengths()
    first = epoch_of(1003, (1, 8, 1), ModalityLengthSampler, lengths=lengths, epoch=0)
    second = epoch_of(1003, (1, 8, 1), ModalityLengthSampler, lengths=lengths, epoch=1)
    assert {tuple(sorted(step)) for step in first}.isdisjoint({tuple(sorted(step)) for step in second[:20]})
    means = [np.mean([abs(lengths[index]) for index in step]) for step in first]
    assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


@pytest.mark.parametrize("lengths", [[5] * 20, [-5] * 20, [5, -5] * 10, [7]])
def test_one_modality_or_few_samples(lengths):
    steps = epoch_of(len(lengths), (1, 4, 1), ModalityLengthSampler, lengths=lengths)
    assert sorted(sum(steps, [])) == list(range(len(lengths)))
