"""Samples -> one batch for training: right padding, and all pictures' tiles behind each other."""

from typing import Any, Dict, Optional, Sequence

import numpy as np

from paddlemix.models.llava.constants import IGNORE_INDEX

__all__ = ["LlavaCollator"]


class LlavaCollator:
    """Makes batches of text-only, one-picture, many-picture, anyres and packed samples, mixed as they come.

    Args:
        pad_token_id: fills ``input_ids`` on the right; any id of the vocabulary, since padding is masked (None: 0).
        pad_to_multiple_of: pad to a multiple of this many tokens, for GPUs that like round shapes.
    """

    def __init__(self, pad_token_id: Optional[int] = 0, pad_to_multiple_of: int = 1):
        self.pad_token_id = pad_token_id if pad_token_id is not None else 0
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, samples: Sequence[Dict[str, Any]]) -> Dict[str, np.ndarray]:
        """One batch, as arrays: ``paddle.io.DataLoader`` makes tensors of them, also from its worker processes.

        Args:
            samples: ``input_ids`` and ``labels`` (T_i ints); ``pixel_values`` ([n_i, 3, H, W] or None) and
                ``image_sizes`` ((width, height) of each picture); packed ones also ``segment_ids``, ``position_ids``.

        Returns:
            input_ids, labels, attention_mask, position_ids [B, T] int64; segment_ids [B, T] int64 if a sample is
            packed (0 is padding); pixel_values [N, 3, H, W] float32 of all tiles and image_sizes [M, 2] int64 of all
            pictures, in the order of the rows and of the placeholders in them, unless no row has a picture.
        """
        longest = max(len(sample["input_ids"]) for sample in samples)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(samples), width)
        packed = any("segment_ids" in sample for sample in samples)
        batch = {
            "input_ids": np.full(shape, self.pad_token_id, dtype=np.int64),
            "labels": np.full(shape, IGNORE_INDEX, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "position_ids": np.zeros(shape, dtype=np.int64),
        }
        if packed:
            batch["segment_ids"] = np.zeros(shape, dtype=np.int64)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["input_ids"][row, :length] = sample["input_ids"]
            batch["labels"][row, :length] = sample["labels"]
            batch["attention_mask"][row, :length] = 1
            batch["position_ids"][row, :length] = sample.get("position_ids", np.arange(length))
            if packed:
                batch["segment_ids"][row, :length] = sample.get("segment_ids", 1)
        pictured = [sample for sample in samples if sample.get("pixel_values") is not None]
        if pictured:
            batch["pixel_values"] = np.concatenate(
                [np.asarray(sample["pixel_values"], dtype=np.float32) for sample in pictured]
            )
            batch["image_sizes"] = np.array([size for sample in pictured for size in sample["image_sizes"]], np.int64)
        return batch
