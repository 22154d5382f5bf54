"""Values and gradients of the written-out steps against their formulas in Paddle's own operations."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from paddlemix.models.llava import attention, lean


def tensor(*shape, seed=0, trained=True):
    values = np.random.default_rng([seed, *shape]).normal(size=shape).astype("float32")
    return paddle.to_tensor(values, stop_gradient=not trained)


def check(ours, formula, *inputs, atol=1e-5):
    """Both functions of ``inputs`` have one value and, for a random weighting of it, one gradient."""
    results = []
    for function in (ours, formula):
        value = function(*inputs)
        (value * tensor(*value.shape, seed=9, trained=False)).sum().backward()
        results.append([value.numpy()] + [None if x.grad is None else x.grad.numpy().copy() for x in inputs])
        for x in inputs:
            x.clear_grad()
    with paddle.no_grad():
        np.testing.assert_allclose(ours(*inputs).numpy(), results[1][0], atol=atol)
    for one, other in zip(*results):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_rms_norm(trained):
    def formula(x, weight):
        return x * paddle.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    x, weight = tensor(2, 5, 16, trained=trained[0]), tensor(16, seed=1, trained=trained[1])
    check(lambda x, w: lean.rms_norm(x, w, 1e-5), formula, x, weight)


@pytest.mark.parametrize(
    "trained", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_layer_norm(trained):
    x, weight, bias = (tensor(*shape, seed=1, trained=t) for shape, t in zip(((2, 5, 24), (24,), (24,)), trained))
    x.set_value(3 * x.detach() + 2)

    def formula(x, weight, bias):
        centred = x - x.mean(-1, keepdim=True)
        return centred * paddle.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight + bias

    check(lambda x, weight, bias: lean.layer_norm(x, weight, bias, 1e-5), formula, x, weight, bias)


def test_quick_gelu():
    check(lean.quick_gelu, lambda x: x * F.sigmoid(1.702 * x), tensor(2, 5, 24))


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_swiglu(trained):
    gate, up = (tensor(2, 5, 12, seed=i, trained=trained[i]) for i in (0, 1))
    check(lean.swiglu, lambda gate, up: gate * F.sigmoid(gate) * up, gate, up)


@pytest.mark.parametrize("served", [True, False])
def test_swish_of_large_numbers(monkeypatch, served):
    """With oneDNN and without."""
    if not served:
        monkeypatch.setattr(lean, "products", lambda: None)
    gate = paddle.to_tensor([[[-200.0, -30.0, 0.0, 30.0, 200.0]] * 2])
    gate.stop_gradient = False
    result = lean.swiglu(gate, paddle.ones_like(gate))
    result.sum().backward()
    np.testing.assert_allclose(result.numpy()[0, 0], [0, 0, 0, 30, 200], atol=1e-5)
    np.testing.assert_allclose(gate.grad.numpy()[0, 0], [0, 0, 0.5, 1, 1], atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
def test_rotation(rows):
    """Rows at positions of their own, and one row of positions for all."""
    angle = tensor(rows, 1, 6, 4, trained=False)
    angle = paddle.concat([angle, angle], axis=-1)
    cos, sin = angle.cos(), angle.sin()
    x = tensor(3, 2, 6, 8)

    def formula(x):
        return x * cos + paddle.concat([-x[..., 4:], x[..., :4]], axis=-1) * sin

    check(lambda x: lean.rotate(x, lean.Rotation(cos, sin)), formula, x)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("block", [4, 5, 64])
@pytest.mark.parametrize("kept", [0, 1 << 24])
@pytest.mark.parametrize("padded", [True, False])
def test_attention_in_blocks(monkeypatch, groups, block, kept, padded):
    """Blocks of queries, and masks in full shape or not, change nothing; earlier keys and padding count."""
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "KEPT", kept)
    query, key, value = tensor(2, 4, 11, 8), tensor(2, groups, 14, 8, seed=1), tensor(2, groups, 14, 8, seed=2)
    padding = np.zeros((2, 1, 1, 14), "float32")
    padding[1, ..., :3] = -1e9 if padded else 0
    bias = paddle.to_tensor(padding)

    def formula(query, key, value):
        keys, values = (paddle.repeat_interleave(x, 4 // groups, axis=1) for x in (key, value))
        scores = paddle.matmul(query, keys, transpose_y=True) / 8**0.5 + attention.causal_bias(11, 14) + bias
        return paddle.matmul(F.softmax(scores, axis=-1), values)

    def ours(query, key, value):
        mask = attention.AttentionMask(causal=True, bias=bias if padded else None)
        return attention.attend(query, key, value, mask=mask)

    check(ours, formula, query, key, value)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("block", [4, 64])
def test_attention_of_packed_rows(monkeypatch, rows, block):
    monkeypatch.setattr(attention, "BLOCK", block)
    ids = np.array([[1, 1, 1, 1, 1, 1, 2, 2, 3, 3, 3, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]])[:rows]
    query, key, value = tensor(rows, 4, 12, 8), tensor(rows, 2, 12, 8, seed=1), tensor(rows, 2, 12, 8, seed=2)
    apart = paddle.to_tensor(np.where(ids[:, None, :, None] == ids[:, None, None, :], 0, -1e9).astype("float32"))

    def formula(query, key, value):
        keys, values = (paddle.repeat_interleave(x, 2, axis=1) for x in (key, value))
        scores = paddle.matmul(query, keys, transpose_y=True) / 8**0.5 + attention.causal_bias(12, 12) + apart
        return paddle.matmul(F.softmax(scores, axis=-1), values)

    mask = attention.AttentionMask(causal=True, segment_ids=paddle.to_tensor(ids))
    check(lambda query, key, value: attention.attend(query, key, value, mask=mask), formula, query, key, value)
    if rows == 1:  # no product with what another segment holds
        assert all(low == ids[0].tolist().index(ids[0, start]) for start, _, low, _ in mask.blocks(12, 12))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("queries", [14, 5, 1])
@pytest.mark.parametrize("padded", [True, False])
def test_paddles_fused_attention_sees_the_same(groups, queries, padded):
    """Also behind a cache, where the queries are the last of the keys (GPU runs only take it; its math is here)."""
    query, key, value = tensor(2, 4, queries, 8), tensor(2, groups, 14, 8, seed=1), tensor(2, groups, 14, 8, seed=2)
    padding = np.zeros((2, 1, 1, 14), "float32")
    padding[1, ..., :3] = -1e9
    bias = paddle.to_tensor(padding) if padded else None

    def attend(flash):
        def attended(query, key, value):
            mask = attention.AttentionMask(causal=True, bias=bias)
            # rows at padding hold no meaning
            return attention.attend(query, key, value, mask=mask, flash=flash)[:, :, -min(queries, 11) :]

        return attended

    check(attend(True), attend(False), query, key, value)


def test_paddles_fused_attention_of_packed_rows():
    ids = paddle.to_tensor([[1, 1, 1, 2, 2, 3, 3, 0], [1, 1, 2, 2, 2, 2, 2, 2]])
    query, key, value = tensor(2, 4, 8, 8), tensor(2, 2, 8, 8, seed=1), tensor(2, 2, 8, 8, seed=2)

    def attend(flash):
        mask = attention.AttentionMask(causal=True, segment_ids=ids)
        return lambda query, key, value: attention.attend(query, key, value, mask=mask, flash=flash)

    check(attend(True), attend(False), query, key, value)


@pytest.mark.parametrize("flash", [True, False])
def test_attention_of_two_types(flash):
    """As level O1 of mixed precision gives them: queries, keys and bias in another type than the values."""
    query, key, value = tensor(2, 4, 6, 8), tensor(2, 2, 6, 8, seed=1), tensor(2, 2, 6, 8, seed=2)
    bias = paddle.to_tensor([[[[-1e9, 0, 0, 0, 0, 0]]], [[[0.0] * 6]]])

    def ours(query, key, value):
        wide, mask = value.astype("float64"), attention.AttentionMask(causal=True, bias=bias)
        context = attention.attend(query, key, wide, mask=mask, flash=flash)
        assert context.dtype == paddle.float64
        return context.astype("float32")[:, :, 1:]

    def formula(query, key, value):
        mask = attention.AttentionMask(causal=True, bias=bias)
        return attention.attend(query, key, value, mask=mask)[:, :, 1:]

    check(ours, formula, query, key, value)


def test_a_bias_in_float16_stays_finite():
    narrow = attention._bias_in(paddle.to_tensor([0.0, -1e9]), paddle.float16)
    assert np.isfinite(narrow.numpy()).all() and narrow.numpy()[1] < -1e4
