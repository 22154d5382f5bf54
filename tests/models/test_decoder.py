"""The decoder against transformers, and its cache against a decoder without one."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava import attention
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

GOLDEN = Path(__file__).parent.parent / "fixtures" / "decoder_golden.npz"


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def build(golden, rope_scaling=None):
    config = LlavaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_theta=5000.0,
        rope_scaling=rope_scaling,
    )
    model = LlavaLlamaForCausalLM(config)
    state = model.state_dict()
    for name, weight in golden.items():
        if name.startswith("weight:"):
            name = name[len("weight:") :].replace("model.", "llama.")
            weight = weight.astype("float32")
            state[name].set_value(weight.T if weight.ndim == 2 and "embed" not in name else weight)
    model.eval()
    return model


@pytest.fixture(scope="module")
def model(golden):
    return build(golden)


@pytest.mark.parametrize("kind, factor", [("none", None), ("linear", 2.5), ("dynamic", 2.0)])
def test_logits_equal_transformers_beyond_the_trained_length(golden, kind, factor):
    scaling = None if kind == "none" else {"type": kind, "factor": factor}
    logits = build(golden, scaling)(paddle.to_tensor(golden["long"])).logits
    np.testing.assert_allclose(logits.numpy(), golden[f"logits_{kind}"], atol=1e-4, rtol=0)


def test_padding_does_not_stretch_positions(golden):
    ids, mask = paddle.to_tensor(golden["long"][:, :70]), np.ones((1, 70), np.int64)
    mask[:, :10] = 0  # 60 tokens are within the trained length
    model = build(golden, {"type": "dynamic", "factor": 2.0})
    logits = model(ids, attention_mask=paddle.to_tensor(mask)).logits.numpy()[:, 10:]
    np.testing.assert_allclose(logits, golden["logits_dynamic_padded"], atol=1e-4, rtol=0)


def test_rotary_tables_outlive_an_interruption_and_serve_threads(golden, monkeypatch):
    model, ids = build(golden), paddle.to_tensor(golden["short"])
    compute = model.llama.rotary._compute

    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.llama.rotary, "_compute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    meeting = threading.Barrier(2)

    def slow(*given):
        meeting.wait(10)  # both threads find no table
        return compute(*given)

    monkeypatch.setattr(model.llama.rotary, "_compute", slow)
    with ThreadPoolExecutor(2) as pool:
        both = [each.result() for each in [pool.submit(lambda: model(ids).logits.numpy()) for _ in range(2)]]
    monkeypatch.undo()
    for logits in (*both, model(ids).logits.numpy()):
        np.testing.assert_allclose(logits, build(golden)(ids).logits.numpy(), atol=1e-6)


def test_reading_in_pieces_equals_reading_at_once(golden, model):
    ids = paddle.to_tensor(np.tile(golden["long"], (1, 6)))  # 600 tokens: several blocks of cache and attention
    whole = model(ids).logits
    embeds = model.embed(ids)
    cache = model.new_cache(1, 600)
    for start, stop in ((0, 300), (300, 301), (301, 310), (310, 599)):
        logits = model.prefill(embeds[:, start:stop], cache)
        np.testing.assert_allclose(logits.numpy(), whole[:, stop - 1].numpy(), atol=1e-4)
    assert cache.length == 599
    cache.truncate(305)
    np.testing.assert_allclose(
        model.prefill(embeds[:, 305:400], cache).numpy(), whole[:, 399].numpy(), atol=1e-4, err_msg="after truncate"
    )


def test_attention_by_blocks_equals_attention_at_once(golden, model, monkeypatch):
    ids = paddle.to_tensor(np.tile(golden["long"], (1, 3)))
    whole = model(ids).logits.numpy()
    monkeypatch.setattr(attention, "BLOCK", 32)
    with paddle.no_grad():
        np.testing.assert_allclose(model(ids).logits.numpy(), whole, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(golden, model, side):
    row = golden["short"][:1, :7]
    padding = np.zeros((1, 5), "int64")
    order = (padding, row) if side == "left" else (row, padding)
    batch = np.concatenate([np.concatenate(order, 1), golden["short"][1:, :12]])
    mask = (batch != 0).astype("int64")
    logits = model(paddle.to_tensor(batch), attention_mask=paddle.to_tensor(mask)).logits.numpy()
    alone = model(paddle.to_tensor(row)).logits.numpy()
    np.testing.assert_allclose(logits[0][mask[0] == 1], alone[0], atol=1e-5)
    np.testing.assert_allclose(logits[1], model(paddle.to_tensor(batch[1:])).logits.numpy()[0], atol=1e-5)


def test_packed_segments_do_not_see_each_other(golden, model):
    a, b = golden["short"][0, :9], golden["short"][1, :6]
    packed = np.concatenate([a, b, [0, 0]])[None]
    segments = np.array([[1] * 9 + [2] * 6 + [0] * 2])
    positions = np.array([[*range(9), *range(6), 0, 0]])
    logits = model(
        paddle.to_tensor(packed), segment_ids=paddle.to_tensor(segments), position_ids=paddle.to_tensor(positions)
    ).logits.numpy()[0]
    np.testing.assert_allclose(logits[:9], model(paddle.to_tensor(a[None])).logits.numpy()[0], atol=1e-5)
    np.testing.assert_allclose(logits[9:15], model(paddle.to_tensor(b[None])).logits.numpy()[0], atol=1e-5)


def test_padding_inside_a_segment_is_not_seen(golden, model):
    ids = np.concatenate([np.zeros((1, 4), "int64"), golden["short"][:1, :9]], axis=1)
    mask, one_segment = paddle.to_tensor((ids != 0).astype("int64")), paddle.ones(ids.shape, "int64")
    logits = model(paddle.to_tensor(ids), attention_mask=mask, segment_ids=one_segment).logits.numpy()[0, 4:]
    alone = model(paddle.to_tensor(golden["short"][:1, :9])).logits.numpy()[0]
    np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_a_cache_that_is_too_small_says_so(model):
    cache = model.new_cache(1, 4)
    with pytest.raises(UserError, match="5 tokens don't fit in a cache of 4"):
        model.prefill(model.embed(paddle.ones([1, 5], "int64")), cache)


def test_two_masks_that_meet_stay_finite_in_every_dtype():
    for dtype, smallest in (("float16", np.finfo(np.float16).min), ("float32", np.finfo(np.float32).min)):
        assert 2 * attention.masked_score(dtype) > smallest
        assert np.exp(np.float64(attention.masked_score(dtype))) == 0


@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_attention_equal_those_of_its_formula(heads, groups, masked):
    random = np.random.default_rng(0)

    def tensor(*shape):
        return paddle.to_tensor(random.normal(size=shape).astype("float32"), stop_gradient=False)

    query, key, value = tensor(2, heads, 7, 8), tensor(2, groups, 7, 8), tensor(2, groups, 7, 8)
    bias = paddle.to_tensor(np.where(random.random((2, 1, 7, 7)) < 0.3, -1e9, 0).astype("float32")) if masked else None
    weights = tensor(2, heads, 7, 8).detach()
    gradients = []
    for formula in (False, True):
        if formula:
            keys, values = (paddle.repeat_interleave(x, heads // groups, axis=1) for x in (key, value))
            scores = paddle.matmul(query, keys, transpose_y=True) / 8**0.5 + attention.causal_bias(7, 7)
            probabilities = paddle.nn.functional.softmax(scores if bias is None else scores + bias, axis=-1)
            context = paddle.matmul(probabilities, values)
        else:
            context = attention.attend(query, key, value, mask=attention.AttentionMask(causal=True, bias=bias))
        (context * weights).sum().backward()
        gradients.append([x.grad.numpy().copy() for x in (query, key, value)])
        for x in (query, key, value):
            x.clear_grad()
    for ours, expected in zip(*gradients):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
