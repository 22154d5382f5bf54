"""Batches of mixed samples: right padding, pictures in the order of the placeholders."""

import numpy as np

from paddlemix.datasets.collator import LlavaCollator
from paddlemix.datasets.packing import join_samples


def sample(ids, tiles=(), label=None):
    """``tiles``: how many each picture has; pixels hold the first id, sizes (picture's number, tiles)."""
    pixels = np.concatenate([np.full([n, 3, 2, 2], ids[0], "float32") for n in tiles]) if tiles else None
    return {
        "input_ids": list(ids),
        "labels": [-100] + list(ids[1:]),
        "pixel_values": pixels,
        "image_sizes": [(number + 1, n) for number, n in enumerate(tiles)],
    }


MIXED = [sample([5, 6, 7]), sample([8, 9, 9, 9, 9], [1]), sample([3, 3], [5, 3]), sample([4])]


def test_mixed_samples():
    batch = LlavaCollator(pad_token_id=1)(MIXED)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 1], [8, 9, 9, 9, 9], [3, 3, 1, 1, 1], [4, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [
        [-100, 6, 7, -100, -100],
        [-100, 9, 9, 9, 9],
        [-100, 3, -100, -100, -100],
        [-100] * 5,
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 2, 1]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 0, 0, 0], [0] * 5]
    assert batch["pixel_values"].shape == (9, 3, 2, 2)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [8] + [3] * 8
    assert batch["image_sizes"].tolist() == [[1, 1], [1, 5], [2, 3]]
    assert "segment_ids" not in batch
    assert all(batch[key].dtype == np.int64 for key in batch if key != "pixel_values")
    assert batch["pixel_values"].dtype == np.float32


def test_a_batch_without_pictures_has_no_picture_keys():
    batch = LlavaCollator(pad_token_id=None)([sample([5, 6]), sample([7])])
    assert set(batch) == {"input_ids", "labels", "attention_mask", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]


def test_packed_and_single_samples_in_one_batch():
    batch = LlavaCollator()([join_samples([sample([5, 6, 7]), sample([8, 9], [1])]), sample([4, 4])])
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]


def test_padding_to_a_multiple():
    assert LlavaCollator(pad_to_multiple_of=8)(MIXED)["input_ids"].shape == (4, 8)
    assert LlavaCollator(pad_to_multiple_of=5)(MIXED)["input_ids"].shape == (4, 5)
