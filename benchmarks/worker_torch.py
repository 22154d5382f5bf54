"""transformers' side of a benchmark (see protocol.py); runs in an environment of its own."""

import time

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import protocol  # noqa: E402
import torch  # noqa: E402
from transformers import DynamicCache, LlavaForConditionalGeneration  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

torch.set_num_threads(2)
model = None


class Clock(BaseStreamer):
    """Notes the moment at which each token was there; the first call is the prompt."""

    def __init__(self):
        self.moments = []

    def put(self, value):
        self.moments.append(time.perf_counter())

    def end(self):
        pass


def generate(ids, count, pixel_values=None, cache=None):
    """ids [B, T] (with the whole history) -> new ids [B, count] and their moments; a cache skips what it holds."""
    clock = Clock()
    ids = ids.to(model.device)
    inputs = {} if pixel_values is None else {"pixel_values": pixel_values.to(model.device, model.dtype)}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=clock if ids.shape[0] == 1 else None,
        **inputs,
    )
    return out[:, ids.shape[1] :], clock.moments[1:]


def load(folder, dtype="float32", device="cpu"):
    global model
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.to(device.replace("gpu", "cuda"))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([protocol.question(0, model.config.text_config.vocab_size)])
    generate(ids, 1)
    seconds = time.perf_counter() - STARTED
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return {"seconds": seconds, "peak_mb": protocol.peak_mb(), "weights_mb": weights}


def places():
    vision = model.config.vision_config
    return [model.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2


def chat(turns, keep_cache=True):
    """Stock: every turn is a fresh generate over the whole history. Kept: one DynamicCache over all turns."""
    vocabulary = model.config.text_config.vocab_size
    cache = DynamicCache() if keep_cache else None
    history, first, answers = list(places()), [], []
    image = torch.from_numpy(protocol.pixels(model.config.vision_config.image_size))
    for turn in range(turns):
        started = time.perf_counter()
        history += protocol.question(turn, vocabulary)
        pixel_values = image if turn == 0 or not keep_cache else None
        new, moments = generate(torch.tensor([history]), protocol.ANSWER_TOKENS, pixel_values, cache)
        first.append(moments[0] - started)
        answers.append(new[0].tolist())
        history += answers[-1]
    return {"first": first, "answers": answers}


def decode(context):
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, model.config.text_config.vocab_size - 2, (1, context)))
    started = time.perf_counter()
    new, moments = generate(ids, protocol.DECODE_TOKENS)
    return {
        "tokens_per_second": (len(moments) - 1) / (moments[-1] - moments[0]),
        "prefill_seconds": moments[0] - started,
        "tokens": new[0].tolist(),
    }


def batch(size):
    config = model.config
    ids = torch.tensor([places() + protocol.question(0, config.text_config.vocab_size, row) for row in range(size)])
    pixel_values = torch.cat(
        [torch.from_numpy(protocol.pixels(config.vision_config.image_size, r)) for r in range(size)]
    )
    seconds = []
    for count in (1, protocol.DECODE_TOKENS):
        started = time.perf_counter()
        generate(ids, count, pixel_values)
        seconds.append(time.perf_counter() - started)
    return {"tokens_per_second": size * (protocol.DECODE_TOKENS - 1) / (seconds[1] - seconds[0])}


if __name__ == "__main__":
    protocol.serve({"load": load, "chat": chat, "decode": decode, "batch": batch})
