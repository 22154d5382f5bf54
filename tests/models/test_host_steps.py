"""Single tokens on a CPU: by NumPy they come out as by Paddle, and a change of the model is noticed."""

import numpy as np
import paddle
import pytest

from paddlemix.models.llava import host_steps
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.host_steps import HostSteps
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

TOKENS = 40


def build(**more):
    paddle.seed(0)
    sizes = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
    )
    model = LlavaLlamaForCausalLM(LlavaConfig(**{**sizes, **more}))
    model.eval()
    return model


IDS = np.random.RandomState(3).randint(0, 97, TOKENS)


def read(model, by_paddle, attention_mask=None, first=9):
    """Logits [T, V] after each token that follows the first ones; one by one."""
    cache = model.new_cache(1, TOKENS)
    prompt = model.embed(paddle.to_tensor(IDS[None, :first]))
    logits = [model.prefill(prompt, cache, attention_mask)]
    for token in IDS[first:]:
        ids = paddle.to_tensor([[int(token)]])
        logits.append(model.prefill(model.embed(ids), cache) if by_paddle else model.step(ids, cache))
    assert (cache.host_steps is None) == by_paddle and cache.length == TOKENS
    return paddle.concat(logits).numpy()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"intermediate_size": 1024},  # wide enough to be read as it lies
    ],
)
def test_tokens_one_by_one_equal_paddles_and_a_whole_pass(sizes):
    model = build(**sizes)
    logits = read(model, by_paddle=False)
    np.testing.assert_allclose(logits, read(model, by_paddle=True), atol=1e-5)
    if "rope_scaling" not in sizes:  # whose angles depend on the length read so far
        whole = model(paddle.to_tensor(IDS[None])).logits[0, 8:].numpy()
        np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_padding_stays_hidden():
    model = build()
    mask = paddle.to_tensor([[0] * 4 + [1] * 5])
    np.testing.assert_allclose(read(model, False, mask), read(model, True, mask), atol=1e-5)


def test_a_change_of_the_weights_is_noticed():
    model = build()
    read(model, by_paddle=False)
    narrow = model.llama.layers[1].mlp.down_proj.weight
    changed = narrow.numpy()
    changed[5, 7] += 3.0  # one number, in place
    narrow.set_value(changed)
    np.testing.assert_allclose(read(model, False), read(model, True), atol=1e-5)
    model.llama.layers[0].self_attn.q_proj = paddle.nn.Linear(64, 64, bias_attr=False)
    np.testing.assert_allclose(read(model, False), read(model, True), atol=1e-5)


def test_generation_gives_the_same_tokens_with_and_without():
    model = build()
    prompt = paddle.to_tensor(IDS[None, :9])
    ids, scores = model.generate(prompt, max_new_tokens=20)
    read_by_paddle = []
    hook = model.llama.register_forward_pre_hook(lambda layer, given: read_by_paddle.append(given[0].shape[1]))
    expected_ids, expected_scores = model.generate(prompt, max_new_tokens=20)
    hook.remove()
    assert read_by_paddle == [9] + [1] * 19  # who watches the decoder sees every token
    np.testing.assert_array_equal(ids.numpy(), expected_ids.numpy())
    np.testing.assert_allclose(scores.numpy(), expected_scores.numpy(), atol=1e-5)


@pytest.mark.parametrize("change", ["training", "hook", "bias"])
def test_what_numpy_does_not_know_is_left_to_paddle(change):
    model = build()
    if change == "training":
        model.train()
    elif change == "hook":
        model.llama.layers[2].mlp.register_forward_post_hook(lambda layer, given, result: result * 2)
    else:
        model.llama.layers[0].mlp.gate_proj = paddle.nn.Linear(64, 160)
    cache = model.new_cache(1, TOKENS)
    model.prefill(model.embed(paddle.to_tensor(IDS[None, :9])), cache)
    logits = model.step(paddle.to_tensor([[5]]), cache)
    assert HostSteps.of(model, cache) is None
    whole = model(paddle.to_tensor(np.append(IDS[:9], 5)[None])).logits[:, -1]
    np.testing.assert_allclose(logits.numpy(), whole.numpy(), atol=1e-5)


def test_several_rows_and_other_models_go_their_own_way():
    first, second = build(), build(hidden_size=32)
    for model in (first, second, first):
        np.testing.assert_allclose(read(model, False), read(model, True), atol=1e-5)
    cache = first.new_cache(2, TOKENS)
    first.prefill(first.embed(paddle.to_tensor(IDS[:18].reshape(2, 9))), cache)
    assert first.step(paddle.to_tensor([[1], [2]]), cache).shape == [2, 97]
    assert cache.host_steps is None


def test_a_model_that_is_gone_leaves_nothing():
    import gc

    before = len(host_steps._kept)
    model = build()
    read(model, by_paddle=False)
    assert len(host_steps._kept) == before + 1
    del model
    gc.collect()
    assert len(host_steps._kept) == before
