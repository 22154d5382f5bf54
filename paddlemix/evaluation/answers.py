"""Greedy answers to a batch of prompts. What prompts have in common, a picture and all before it, is read once."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import paddle

from paddlemix.models.llava.constants import IMAGE_TOKEN_INDEX

__all__ = ["answer_prompts"]

Prompt = Tuple[List[int], List[Any]]  # T ids with a run of IMAGE_TOKEN_INDEX for each picture, and the pictures


def answer_prompts(
    model: Any,
    processor: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    stop_strings: Sequence[Sequence[str]],
) -> List[str]:
    """The model's answer to each prompt, up to its end token or the first of the prompt's ``stop_strings``.

    Several questions about one picture cost one pass over the picture: the prompts are cut behind their last picture,
    the different beginnings go through the model once, and each question goes on from its own.
    """
    beginnings: Dict[Tuple, int] = {}
    rows, rest = [], []
    for ids, images in prompts:
        cut = len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX) if IMAGE_TOKEN_INDEX in ids else 0
        key = (tuple(ids[:cut]), tuple(processor.image_digest(image) for image in images))
        rows.append(beginnings.setdefault(key, len(beginnings)))
        rest.append(ids[cut:])
    if len(beginnings) == len(prompts) or not all(rest) or not all(ids for ids, _ in beginnings):
        batch = _batch(processor, [ids for ids, _ in prompts], [images for _, images in prompts])
        new_ids = _greedy(model, batch, max_new_tokens)
    else:
        first = [rows.index(number) for number in range(len(beginnings))]
        batch = _batch(processor, [list(ids) for ids, _ in beginnings], [prompts[i][1] for i in first])
        longest = batch["input_ids"].shape[1] + max(map(len, rest))
        with paddle.no_grad():
            features = model.encode_images(batch["pixel_values"], batch["image_sizes"])
            cache = model.new_cache(len(first), longest + max_new_tokens)
            model.prefill(model.embed(batch["input_ids"], features), cache, batch["attention_mask"])
            cache.reorder(paddle.to_tensor(rows))
        new_ids = _greedy(model, {**_batch(processor, rest, [[] for _ in rest]), "cache": cache}, max_new_tokens)
    return [_text(processor, ids, stops) for ids, stops in zip(new_ids, stop_strings)]


def _greedy(model: Any, batch: Dict[str, Any], max_new_tokens: int) -> List[List[int]]:
    # as a chat does, whatever the checkpoint's generation_config.json says
    plain = {"decode_strategy": "greedy_search", "repetition_penalty": 1.0, "min_new_tokens": 0}
    ids, _ = model.generate(**batch, max_new_tokens=max_new_tokens, **plain)
    return ids.tolist()


def _batch(processor: Any, rows: Sequence[Sequence[int]], pictures: Sequence[Sequence[Any]]) -> Dict[str, Any]:
    """Rows padded on the left, for ``generate``."""
    longest = max(map(len, rows))
    input_ids = np.full((len(rows), longest), processor.pad_token_id, dtype=np.int64)
    attention_mask = np.zeros_like(input_ids)
    for number, row in enumerate(rows):
        input_ids[number, longest - len(row) :] = row
        attention_mask[number, longest - len(row) :] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    images = [image for row in pictures for image in row]
    if images:
        batch["pixel_values"] = np.concatenate([processor.image_processor.preprocess(image) for image in images])
        batch["image_sizes"] = np.array([image.size for image in images], dtype=np.int64)
    return {key: paddle.to_tensor(value) for key, value in batch.items()}


def _text(processor: Any, ids: List[int], stop_strings: Sequence[str]) -> str:
    ends = set(processor.config.eos_token_ids)
    length = next((place for place, index in enumerate(ids) if index in ends), len(ids))
    text = processor.decode(ids[:length])
    for stop in stop_strings:
        text = text.split(stop)[0] if stop else text
    return text.strip()
