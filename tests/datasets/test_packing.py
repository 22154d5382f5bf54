"""Packing: nothing lost, nothing over-long, little wasted, and no sample sees its neighbour."""

import json

import numpy as np
import pytest

from paddlemix.datasets.packing import PackedDataset, join_samples, pack_lengths
from paddlemix.errors import UserError
from paddlemix.examples.llava.easy_vqa import package_data


def waste(lengths, packs, max_length):
    return 1 - sum(lengths) / (len(packs) * max_length)


@pytest.mark.parametrize("spread", [(1, 2048), (600, 700), (30, 40), (1000, 1025)])
def test_every_sample_is_in_one_sequence_that_is_not_too_long(spread):
    lengths = np.random.default_rng(1).integers(*spread, 3000).tolist()
    packs = pack_lengths(lengths, 2048, seed=7)
    assert sorted(index for pack in packs for index in pack) == list(range(3000))
    assert max(sum(lengths[index] for index in pack) for pack in packs) <= 2048
    assert packs == pack_lengths(lengths, 2048, seed=7)
    assert packs != pack_lengths(lengths, 2048, seed=8)
    assert len(packs) <= -(-3000 // (2048 // max(lengths))), "no worse than filling each with the longest ones"


def test_small_cases():
    assert pack_lengths([], 8) == []
    assert pack_lengths([8], 8) == [[0]]
    lengths = [5, 4, 3, 4]
    assert sorted(sorted(lengths[index] for index in pack) for pack in pack_lengths(lengths, 8)) == [[3, 5], [4, 4]]
    with pytest.raises(UserError, match="9 tokens, more than a sequence of max_length 8"):
        pack_lengths([3, 9], 8)


@pytest.mark.parametrize("rounds", [1, 4, 0])
def test_little_is_wasted_on_easy_vqa(rounds):
    """Words stand for tokens here, around them a prompt of 40 and a picture of 16."""
    questions = json.loads((package_data() / "train" / "questions.json").read_text())
    by_picture = {}
    for question, answer, picture in questions:
        by_picture.setdefault(picture, []).append(len(question.split()) + len(answer.split()) + 8)
    lengths = []
    for words in by_picture.values():
        size = rounds or len(words)
        lengths += [56 + sum(words[start : start + size]) for start in range(0, len(words), size)]
    for max_length in (1024, 2048):
        assert waste(lengths, pack_lengths(lengths, max_length), max_length) <= 0.03


def sample(ids, pictures=0):
    tiles = np.full([pictures, 3, 2, 2], ids[0], dtype="float32") if pictures else None
    return {
        "input_ids": list(ids),
        "labels": list(ids),
        "pixel_values": tiles,
        "image_sizes": [(ids[0], 9)] * pictures,
    }


def test_a_packed_sample_keeps_its_samples_apart():
    joined = join_samples([sample([10, 11, 12], 1), sample([20, 21]), sample([30, 31, 32], 2)])
    assert joined["input_ids"] == [10, 11, 12, 20, 21, 30, 31, 32]
    assert joined["segment_ids"] == [1, 1, 1, 2, 2, 3, 3, 3]
    assert joined["position_ids"] == [0, 1, 2, 0, 1, 0, 1, 2]
    # the first token of a sample is never the target of the sample before it
    assert joined["labels"] == [-100, 11, 12, -100, 21, -100, 31, 32]
    assert joined["pixel_values"][:, 0, 0, 0].tolist() == [10, 30, 30]
    assert joined["image_sizes"] == [(10, 9), (30, 9), (30, 9)]
    assert join_samples([sample([1, 2])])["pixel_values"] is None


class Samples(list):
    lengths = [3, -2, 4, -6]


def test_a_packed_dataset_holds_the_samples_of_its_dataset():
    dataset = Samples([sample([1] * 3, 1), sample([2] * 2), sample([3] * 4, 1), sample([4] * 6)])
    packed = PackedDataset(dataset, 8, seed=0)
    assert len(packed) == 2
    seen = []
    for index in range(len(packed)):
        got = packed[index]
        assert len(got["input_ids"]) == abs(packed.lengths[index]) <= 8
        assert (packed.lengths[index] > 0) == (got["pixel_values"] is not None)
        seen += got["input_ids"]
    assert sorted(seen) == [1] * 3 + [2] * 2 + [3] * 4 + [4] * 6
    assert packed.fill == 15 / 16
