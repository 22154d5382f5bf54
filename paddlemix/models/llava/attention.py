"""The one attention function of tower and decoder.

Shapes: B batch, H heads, G key/value heads, T queries, S keys, K head width.
"""

from typing import Optional

import paddle
import paddle.nn.functional as F

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
    groups, keys = key.shape[1], key.shape[2]
    if heads != groups:
        # the queries that share a key head become rows of one product: no copy of the keys
        query = query.reshape([batch, groups, (heads // groups) * queries, width])
    scores = paddle.matmul(query * width**-0.5, key, transpose_y=True)
    if bias is not None:
        if heads != groups:
            scores = scores.reshape([batch, groups, heads // groups, queries, keys])
            bias = bias.unsqueeze(2) if bias.ndim == 4 else bias
            scores = (scores + bias).reshape([batch, groups, -1, keys])
        else:
            scores = scores + bias
    context = paddle.matmul(F.softmax(scores, axis=-1), value)
    return context.reshape([batch, heads, queries, width]) if heads != groups else context


def _attend_flash(query, key, value, causal, bias):
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (paddle.repeat_interleave(x, groups, axis=1) for x in (key, value))
    if bias is not None and causal:
        bias, causal = bias + causal_bias(query.shape[2], key.shape[2], query.dtype), False
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)
    return context.transpose([0, 2, 1, 3])
