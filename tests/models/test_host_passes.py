"""Short passes on a CPU: by oneDNN and NumPy they come out as by Paddle, and a change of the model is noticed."""

import contextlib
import copy
import gc
import weakref

import numpy as np
import paddle
import pytest

from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.decoder import KVCache
from paddlemix.models.llava.host_passes import HostPasses
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


def test_a_step_on_a_held_cache_notices_adapters_and_another_vocabulary():
    from paddlenlp.peft import LoRAConfig, LoRAModel

    def adapters(model):
        adapted = LoRAModel(model, LoRAConfig(target_modules=[".*q_proj.*"], r=4, lora_alpha=8))
        adapted.eval()
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.set_value(paddle.full(parameter.shape, 0.1))

    for change in (adapters, lambda model: model.resize_token_embeddings(70)):
        model = build()
        cache = model.new_cache(1, TOKENS)
        model.prefill(model.embed(paddle.to_tensor([IDS[:9].tolist()])), cache)
        token = paddle.to_tensor([[5]])
        before = model.step(token, cache).numpy()
        change(model)
        cache.truncate(9)
        after = model.step(token, cache).numpy()
        cache.truncate(9)
        with by_paddle_alone(model):
            expected = model.step(token, cache).numpy()
        np.testing.assert_allclose(after, expected, atol=1e-5)
        assert before.shape != after.shape or np.abs(before - after).max() > 1e-3


@contextlib.contextmanager
def by_paddle_alone(model):
    """Who watches a layer sees every pass, so Paddle takes them."""
    hook = model.llama.layers[0].register_forward_pre_hook(lambda layer, given: None)
    yield
    hook.remove()


def read(model, by_paddle, attention_mask=None, first=9, rows=1, at_once=1):
    """Logits [B, V] after each pass that follows the first one, which is padded by the mask, of ``at_once`` tokens each."""
    ids = np.stack([np.roll(IDS, row) for row in range(rows)])
    cache = model.new_cache(rows, TOKENS)
    with by_paddle_alone(model) if by_paddle else contextlib.nullcontext():
        logits = [model.prefill(model.embed(paddle.to_tensor(ids[:, :first])), cache, attention_mask)]
        for start in range(first, TOKENS, at_once):
            new = paddle.to_tensor(ids[:, start : start + at_once])
            logits.append(model.step(new, cache) if at_once == 1 else model.prefill(model.embed(new), cache))
    assert (cache.host_passes is None) == by_paddle and cache.length == TOKENS
    return paddle.concat(logits).numpy()


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ],
)
def test_tokens_one_by_one_equal_paddles_and_a_whole_pass(sizes):
    model = build(**sizes)
    logits = read(model, by_paddle=False)
    np.testing.assert_allclose(logits, read(model, by_paddle=True), atol=1e-5)
    if "rope_scaling" not in sizes:  # whose angles depend on the length read so far
        whole = model(paddle.to_tensor(IDS[None])).logits[0, 8:].numpy()
        np.testing.assert_allclose(logits, whole, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("at_once", [1, 7, 12])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_and_passes_of_any_size(rows, at_once, padded):
    model = build(tie_word_embeddings=rows == 2)
    mask = None
    if padded:
        mask = paddle.to_tensor([[0] * (row % 5) + [1] * (9 - row % 5) for row in range(1, rows + 1)])
    options = dict(attention_mask=mask, rows=rows, at_once=at_once)
    np.testing.assert_allclose(read(model, False, **options), read(model, True, **options), atol=1e-5)


def test_without_onednn_single_rows_stay_and_the_rest_is_paddles(monkeypatch):
    model = build()
    expected = read(model, by_paddle=True)
    monkeypatch.setattr("paddlemix.models.llava.host_passes.products", lambda: None)
    monkeypatch.setattr("paddlemix.models.llava.linear.products", lambda: None)
    monkeypatch.setattr("paddlemix.models.llava.attention.products", lambda: None)
    np.testing.assert_allclose(read(model, by_paddle=False), expected, atol=1e-5)
    cache = model.new_cache(2, TOKENS)
    model.prefill(model.embed(paddle.to_tensor(IDS[:18].reshape(2, 9))), cache)
    assert cache.host_passes is None


def test_a_change_of_the_weights_is_noticed():
    model = build()
    read(model, by_paddle=False)
    narrow = model.llama.layers[1].mlp.down_proj.weight
    changed = narrow.numpy()
    changed[5, 7] += 3.0  # one number, in place
    narrow.set_value(changed)
    for norm in (model.llama.norm, model.llama.layers[1].input_layernorm):
        norm.weight.set_value(norm.weight * 1.5)
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


@pytest.mark.parametrize("change", ["training", "hook", "hook of a product", "hook of the head", "bias"])
def test_what_numpy_does_not_know_is_left_to_paddle(change):
    model = build()
    plain = read(model, by_paddle=False)
    mlp = model.llama.layers[2].mlp
    if change == "training":
        model.train()
    elif change == "bias":
        biased = paddle.nn.Linear(64, 160, bias_attr=paddle.nn.initializer.Constant(1.0))
        biased.weight.set_value(mlp.gate_proj.weight)
        biased.eval()
        mlp.gate_proj = biased
    else:
        watched = {"hook": mlp, "hook of a product": mlp.up_proj, "hook of the head": model.lm_head}[change]
        watched.register_forward_post_hook(lambda layer, given, result: result * 2)
    cache = model.new_cache(1, TOKENS)
    model.prefill(model.embed(paddle.to_tensor(IDS[None, :9])), cache)
    logits = model.step(paddle.to_tensor([[int(IDS[9])]]), cache)
    assert HostPasses.of(model, cache, 1) is None
    whole = model(paddle.to_tensor(IDS[None, :10])).logits[:, -1]
    np.testing.assert_allclose(logits.numpy(), whole.numpy(), atol=1e-5)
    assert change == "training" or np.abs(logits.numpy() - plain[1]).max() > 1e-3


def test_a_cache_that_grows_shrinks_and_is_read_by_both(monkeypatch):
    """Long passes are Paddle's, short ones the host's, on buffers that move meanwhile."""
    monkeypatch.setattr(KVCache, "BLOCK", 8)
    monkeypatch.setattr("paddlemix.models.llava.host_passes.MOST_ROWS", 6)
    model = build()
    cache = model.new_cache(1, TOKENS)

    def both(start, stop):
        if stop - start == 1:
            return model.step(paddle.to_tensor([[int(IDS[start])]]), cache)
        return model.prefill(model.embed(paddle.to_tensor(IDS[None, start:stop])), cache)

    whole = model(paddle.to_tensor(IDS[None])).logits[0].numpy()
    single = [(n, n + 1) for n in range(TOKENS)]
    for start, stop in [(0, 6), *single[6:11], (11, 19), *single[19:26], (26, TOKENS)]:
        np.testing.assert_allclose(both(start, stop)[0].numpy(), whole[stop - 1], atol=1e-5)
    cache.truncate(13)
    for start, stop in [*single[13:17], (17, 20), *single[20:22]]:
        np.testing.assert_allclose(both(start, stop)[0].numpy(), whole[stop - 1], atol=1e-5)
    cache.reorder(paddle.to_tensor([0, 0]))
    model.step(paddle.to_tensor([[1], [2]]), cache)
    cache.truncate(22)
    cache.reorder(paddle.to_tensor([1]))
    np.testing.assert_allclose(both(22, 23)[0].numpy(), whole[22], atol=1e-5)
    other = copy.deepcopy(cache)
    np.testing.assert_allclose(both(23, 24)[0].numpy(), whole[23], atol=1e-5)
    logits = model.step(paddle.to_tensor([[int(IDS[23])]]), other)
    logits = model.prefill(model.embed(paddle.to_tensor(IDS[None, 24:30])), other)
    np.testing.assert_allclose(logits[0].numpy(), whole[29], atol=1e-5)


def test_weights_that_change_between_two_turns_count_in_the_next():
    model = build()
    cache = model.new_cache(1, TOKENS)
    model.prefill(model.embed(paddle.to_tensor(IDS[None, :9])), cache)
    model.step(paddle.to_tensor([[1]]), cache)
    weight = model.llama.layers[0].self_attn.o_proj.weight
    weight.set_value(weight * 1.5)
    cache.truncate(0)
    model.prefill(model.embed(paddle.to_tensor(IDS[None, :9])), cache)
    logits = model.step(paddle.to_tensor([[int(IDS[9])]]), cache)
    whole = model(paddle.to_tensor(IDS[None, :10])).logits[:, -1]
    np.testing.assert_allclose(logits.numpy(), whole.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype, apart", [("float64", 1e-5), ("float16", 0.01), ("bfloat16", 0.05)])
def test_embeddings_of_another_type_or_layout(dtype, apart):
    model = build()
    embeddings = model.embed(paddle.to_tensor(IDS[None, :9]))
    expected = model.prefill(embeddings, model.new_cache(1, TOKENS)).numpy()
    turned = paddle.to_tensor(np.ascontiguousarray(embeddings.numpy().transpose(0, 2, 1))).transpose([0, 2, 1])
    np.testing.assert_allclose(model.prefill(turned, model.new_cache(1, TOKENS)).numpy(), expected, atol=1e-5)
    logits = model.prefill(embeddings.astype(dtype), model.new_cache(1, TOKENS)).numpy()
    np.testing.assert_allclose(logits, expected, atol=apart)


def test_several_models_go_their_own_way():
    first, second = build(), build(hidden_size=32)
    for model in (first, second, first):
        np.testing.assert_allclose(read(model, False), read(model, True), atol=1e-5)


def test_a_model_that_is_gone_leaves_nothing():
    model = build()
    read(model, by_paddle=False)
    model.llama.layers[0].register_forward_pre_hook(lambda layer, given, held=model: None)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_an_interrupted_pass_leaves_the_positions_of_a_padded_cache():
    model = build()
    mask = paddle.to_tensor([[0] * 4 + [1] * 5])
    cache = model.new_cache(1, TOKENS)
    model.prefill(model.embed(paddle.to_tensor(IDS[None, :9])), cache, mask)
    expected = model.prefill(model.embed(paddle.to_tensor(IDS[None, 9:12])), cache).numpy()
    cache.truncate(9)

    def interrupt(layer, given):
        raise KeyboardInterrupt

    hook = model.llama.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.prefill(model.embed(paddle.to_tensor(IDS[None, 12:20])), cache)
    hook.remove()
    cache.truncate(9)
    again = model.prefill(model.embed(paddle.to_tensor(IDS[None, 9:12])), cache).numpy()
    np.testing.assert_allclose(again, expected, atol=1e-6)
