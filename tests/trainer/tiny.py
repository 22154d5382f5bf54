"""A tiny model and samples for it, made from seeds; quick enough for dozens of training steps in a test."""

from typing import Any, Dict, List

import numpy as np
import paddle

from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    eos_token_id=2,
    vision_config=dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    ),
)


def tiny_model(seed: int = 0, **changes) -> LlavaLlamaForCausalLM:
    paddle.seed(seed)
    return LlavaLlamaForCausalLM(LlavaConfig(**{**SIZES, **changes}))


def samples(count: int, seed: int = 0, text_only: float = 0.25) -> List[Dict[str, Any]]:
    """Samples of different lengths and numbers of labels, some without a picture."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        pictured = random.random() >= text_only
        words = random.integers(3, 60, random.integers(4, 20)).tolist()
        ids = [1] + ([IMAGE_TOKEN_INDEX] * 4 if pictured else []) + words
        learned = int(random.integers(1, len(words)))
        made.append(
            {
                "input_ids": ids,
                "labels": [IGNORE_INDEX] * (len(ids) - learned) + ids[-learned:],
                "pixel_values": random.normal(size=(1, 3, 8, 8)).astype("float32") if pictured else None,
                "image_sizes": [(8, 8)] if pictured else [],
            }
        )
    return made


class Samples(paddle.io.Dataset):
    """A dataset of samples that are in memory."""

    def __init__(self, rows: List[Dict[str, Any]]):
        super().__init__()
        self.rows = rows
        self.lengths = [len(row["input_ids"]) * (1 if row["pixel_values"] is not None else -1) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        return self.rows[index]
