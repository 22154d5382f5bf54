"""The estimate of memory against the bytes that are really there; and what recompute saves."""

import paddle
import pytest

from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.memory import available_memory, estimate_memory, format_bytes
from tests.trainer.tiny import tiny_model

ROWS, TOKENS, LEARNED = 2, 128, 16
SIZES = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4, vocab_size=512)


def build(lora=False):
    model = tiny_model(**SIZES)
    config = model.config
    if lora:
        model = add_lora(model, dropout=0.05)
    select_trained(model, lora=lora)
    model.train()
    return model, config


def saved_bytes(model):
    """Of the tensors that the forward keeps for the backward, parameters left out."""
    own = {parameter.data_ptr() for parameter in model.parameters()}
    held = {}

    def pack(tensor):
        held[tensor.data_ptr()] = (
            tensor,
            tensor.size * tensor.element_size(),
        )  # held, so that no address is used twice
        return tensor

    with paddle.autograd.saved_tensors_hooks(pack, lambda tensor: tensor):
        ids = paddle.randint(3, 60, [ROWS, TOKENS])
        labels = ids.clone()
        labels[:, : TOKENS - LEARNED] = -100
        model(ids, labels=labels)
    return sum(size for address, (_, size) in held.items() if address not in own)


def estimate(model, config, **changes):
    return estimate_memory(model, config, rows=ROWS, tokens=TOKENS, labelled=ROWS * LEARNED, **changes)


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_estimated_within_a_quarter(lora):
    model, config = build(lora)
    assert 0.8 < estimate(model, config, lora_dropout=lora)["activations"] / saved_bytes(model) < 1.25


def test_recompute_saves_most_activations_and_the_estimate_knows():
    model, config = build()
    kept = saved_bytes(model)
    model.llama.enable_recompute = True
    assert saved_bytes(model) < kept / 8
    # one layer at a time is computed again, so at the peak that is there too
    assert estimate(model, config, recompute=True)["activations"] < kept / 2


def test_weights_gradients_and_optimizer_are_counted():
    model, config = build()
    numbers = sum(parameter.size for parameter in model.parameters())
    trained = sum(parameter.size for parameter in model.parameters() if not parameter.stop_gradient)
    parts = estimate(model, config)
    assert parts["weights"] == 4 * numbers and parts["gradients"] == 4 * trained and parts["optimizer"] == 8 * trained
    spread = estimate(model, config, sharding="stage2", shards=4)
    assert spread == {**parts, "gradients": trained, "optimizer": 2 * trained}
    half = tiny_model(**SIZES)
    half.to(dtype="bfloat16")
    parts = estimate(half, config, master_weights=True, float32_gradients=True)
    assert parts["weights"] == 2 * numbers and parts["gradients"] == 4 * numbers and parts["optimizer"] == 12 * numbers


def test_what_the_machine_has():
    assert available_memory("cpu") > 2**20
    assert format_bytes(300) == "300 B" and format_bytes(5 * 2**29) == "2.5 GB"
