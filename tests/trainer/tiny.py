"""A tiny model and samples for it, made from seeds; quick enough for dozens of training steps in a test."""

import json
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import paddle
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.image_processing import LlavaImageProcessor

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
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


def tiny_checkpoint(folder: Path, seed: int = 0, **changes) -> Path:
    """A whole checkpoint on disk: weights, config, a byte-level tokenizer, image processor."""
    model = tiny_model(seed, **{"vocab_size": 264, "conversation_template": "vicuna_v1", **changes})
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    LlavaImageProcessor.from_config(model.config).save_pretrained(folder)
    return folder


def byte_tokenizer(folder: Path) -> None:
    """tokenizer.json with <unk>, <s>, </s> and one token per byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: number for number, token in enumerate(specials + letters)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 40, 220), "white": (250, 250, 250)}


def colour_data(folder: Path, count: int = 16, name: str = "train.json") -> Path:
    """Rows in the toolkit's form that ask for a picture's colour; some are text only, some have two rounds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        picture = folder / f"{colour}.png"
        if not picture.exists():
            Image.new("RGB", (12, 8), COLOURS[colour]).save(picture)
        if number % 5 == 4:
            rows.append({"conversations": [[f"Say {colour}.", colour]]})
        else:
            rounds = [["<image>\nWhich colour?", colour]] + ([["Sure?", "yes"]] if number % 3 == 0 else [])
            rows.append({"image": picture.name, "conversations": rounds})
    file = folder / name
    file.write_text(json.dumps(rows))
    return file
