"""The one attention function of tower and decoder.

Shapes: B batch, H heads, G key/value heads, T queries, S keys, K head width.
"""

from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

__all__ = ["attend", "causal_bias", "masked_score"]


# Queries of one block when no gradient is needed: bounds the score matrix and skips the keys after the block.
BLOCK = 256


def masked_score(dtype) -> float:
    """What is added to a score that must not count.

    Finite, also where two of them meet, so that a row in which nothing is allowed (padding) gives numbers and not NaN.
    """
    return -2e4 if "float16" in str(dtype) and "bfloat16" not in str(dtype) else -1e9


def causal_bias(queries: int, keys: int, dtype="float32") -> paddle.Tensor:
    """[T, S] additive bias: query t, the last of them being key S-1, sees the keys up to its own position."""
    rows = paddle.arange(keys - queries, keys).unsqueeze(1)
    allowed = paddle.arange(keys).unsqueeze(0) <= rows
    return paddle.where(allowed, paddle.zeros([], dtype), paddle.full([], masked_score(dtype), dtype))


def attend(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    *,
    causal: bool,
    bias: Optional[paddle.Tensor] = None,
    flash: bool = False,
) -> paddle.Tensor:
    """Softmax attention with grouped key/value heads.

    Args:
        query: [B, H, T, K].
        key, value: [B, G, S, K], G dividing H; with ``causal`` the last query stands at the last key.
        causal: a query sees the keys up to its own position.
        bias: additive, broadcastable to [B, 1, T, S]; what padding and packing forbid.
        flash: use Paddle's fused kernel (GPU only; the caller has checked that it exists).

    Returns:
        [B, H, T, K]
    """
    queries, keys = query.shape[2], key.shape[2]
    if flash:
        return _attend_flash(query, key, value, causal, bias)
    causal = causal and queries > 1
    if not causal or queries <= BLOCK or paddle.is_grad_enabled():
        if causal:
            triangle = causal_bias(queries, keys, query.dtype)
            bias = triangle if bias is None else bias + triangle
        return _attend_math(query, key, value, bias)
    blocks = []
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        seen = keys - queries + stop
        block_bias = causal_bias(stop - start, seen, query.dtype)
        if bias is not None:
            rows = bias if bias.shape[-2] == 1 else bias[..., start:stop, :]
            block_bias = block_bias + rows[..., :seen]
        blocks.append(_attend_math(query[:, :, start:stop], key[:, :, :seen], value[:, :, :seen], block_bias))
    return paddle.concat(blocks, axis=2)


def _attend_math(query, key, value, bias):
    batch, heads, queries, width = query.shape
    groups = key.shape[1]
    rows = heads // groups
    if rows > 1:
        # the queries that share a key head become rows of one product: no copy of the keys
        query = query.reshape([batch, groups, rows * queries, width])
        bias = bias.unsqueeze(2) if bias is not None and bias.ndim == 4 else bias
    if paddle.is_grad_enabled() and not (query.stop_gradient and key.stop_gradient and value.stop_gradient):
        context = _LeanAttention.apply(query, key, value, bias, rows)
    else:
        context = paddle.matmul(_probabilities(query, key, bias, rows), value)
    return context.reshape([batch, heads, queries, width]) if rows > 1 else context


def _probabilities(query, key, bias, rows):
    """query [B, G, R * T, K], key [B, G, S, K], bias to [B, G, T, S] or, for R > 1, [B, G, R, T, S] -> [B, G, R * T, S]"""
    scores = paddle.matmul(query * query.shape[-1] ** -0.5, key, transpose_y=True)
    if bias is not None:
        shape = scores.shape
        if rows > 1:
            scores = scores.reshape([shape[0], shape[1], rows, -1, shape[3]])
        scores = (scores + bias).reshape(shape)
    return F.softmax(scores, axis=-1)


class _LeanAttention(PyLayer):
    """Attention that keeps nothing of the size of its scores for the backward pass, but computes them again there
    (the gradients of FlashAttention-2: Dao, 2023, section 2.3)."""

    @staticmethod
    def forward(ctx, query, key, value, bias, rows):
        context = paddle.matmul(_probabilities(query, key, bias, rows), value)
        ctx.save_for_backward(query, key, value, context)
        ctx.bias, ctx.rows = bias, rows
        ctx.fixed = [tensor.stop_gradient for tensor in (query, key, value)]
        return context

    @staticmethod
    def backward(ctx, grad):
        query, key, value, context = ctx.saved_tensor()
        probabilities = _probabilities(query, key, ctx.bias, ctx.rows)
        grad_value = paddle.matmul(probabilities, grad, transpose_x=True)
        mean = (grad * context).sum(-1, keepdim=True)
        grad_scores = probabilities * (paddle.matmul(grad, value, transpose_y=True) - mean)
        scale = query.shape[-1] ** -0.5
        grad_query = paddle.matmul(grad_scores, key) * scale
        grad_key = paddle.matmul(grad_scores, query, transpose_x=True) * scale
        # a PyLayer must give None where no gradient is asked for, as with adapters on some projections only
        grads = tuple(None if fixed else g for fixed, g in zip(ctx.fixed, (grad_query, grad_key, grad_value)))
        return grads if ctx.bias is None else (*grads, None)


def _attend_flash(query, key, value, causal, bias):
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (paddle.repeat_interleave(x, groups, axis=1) for x in (key, value))
    if bias is not None and causal:
        bias, causal = bias + causal_bias(query.shape[2], key.shape[2], query.dtype), False
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)
    return context.transpose([0, 2, 1, 3])
