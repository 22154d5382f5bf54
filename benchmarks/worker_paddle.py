"""This project's side of a benchmark (see protocol.py)."""

import sys
import time
from pathlib import Path

STARTED = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddlemix.runtime import prepare_cpu  # noqa: E402

prepare_cpu()

import numpy as np  # noqa: E402
import paddle  # noqa: E402
import protocol  # noqa: E402

from paddlemix.models.llava.generation import GenerationSettings, Sampler, decode_steps  # noqa: E402
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM  # noqa: E402

SETTINGS = GenerationSettings(eos_token_ids=[])
model = None


def answer(cache, logits, count=protocol.ANSWER_TOKENS):
    """Greedy ids and the moment each one was there."""
    ids, moments = [], []
    for token, _ in decode_steps(model, cache, logits, Sampler(SETTINGS), [[]] * logits.shape[0], count):
        ids.append(token.tolist())
        moments.append(time.perf_counter())
    return ids, moments


def load(folder, dtype="float32", device="cpu"):
    global model
    paddle.set_device(device)
    model = LlavaLlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    ids = paddle.to_tensor([protocol.question(0, model.config.vocab_size)])
    model.generate(ids, max_new_tokens=1)
    seconds = time.perf_counter() - STARTED
    weights = sum(p.numel().item() * p.element_size() for p in model.parameters()) / 2**20
    return {"seconds": seconds, "peak_mb": protocol.peak_mb(), "weights_mb": weights}


def save(folder):
    model.save_pretrained(folder)
    return {}


@paddle.no_grad()
def chat(turns):
    """As LlavaChat works: the picture is encoded once, a turn reads what is new."""
    vocabulary = model.config.vocab_size
    cache = model.new_cache(1, 4096)
    first, answers, previous = [], [], []
    for turn in range(turns):
        started = time.perf_counter()
        ids = previous + protocol.question(turn, vocabulary)
        if turn == 0:
            features = model.encode_images(paddle.to_tensor(protocol.pixels(model.config.vision.image_size)))
            embeds = model.embed(paddle.to_tensor([[-200] * features[0].shape[0] + ids]), features)
        else:
            embeds = model.embed(paddle.to_tensor([ids]))
        tokens, moments = answer(cache, model.prefill(embeds, cache))
        first.append(moments[0] - started)
        answers.append([row[0] for row in tokens])
        previous = [answers[-1][-1]]  # the last token of an answer is not in the cache yet
    return {"first": first, "answers": answers}


def decode(context):
    random = np.random.default_rng(0)
    ids = random.integers(5, model.config.vocab_size - 2, (1, context))
    cache = model.new_cache(1, context + protocol.DECODE_TOKENS + 1)
    started = time.perf_counter()
    with paddle.no_grad():
        logits = model.prefill(model.embed(paddle.to_tensor(ids)), cache)
    tokens, moments = answer(cache, logits, protocol.DECODE_TOKENS)
    return {
        "tokens_per_second": (len(moments) - 1) / (moments[-1] - moments[0]),
        "prefill_seconds": moments[0] - started,
        "tokens": [row[0] for row in tokens],
    }


def batch(size):
    vocabulary, side = model.config.vocab_size, model.config.vision.image_size
    with paddle.no_grad():
        pixel_values = np.concatenate([protocol.pixels(side, row) for row in range(size)])
        features = model.encode_images(paddle.to_tensor(pixel_values))
        places = [-200] * features[0].shape[0]
        ids = paddle.to_tensor([places + protocol.question(0, vocabulary, row) for row in range(size)])
        cache = model.new_cache(size, ids.shape[1] + protocol.DECODE_TOKENS + 1)
        logits = model.prefill(model.embed(ids, features), cache)
    _, moments = answer(cache, logits, protocol.DECODE_TOKENS)
    return {"tokens_per_second": size * (len(moments) - 1) / (moments[-1] - moments[0])}


if __name__ == "__main__":
    protocol.serve({"load": load, "save": save, "chat": chat, "decode": decode, "batch": batch})
