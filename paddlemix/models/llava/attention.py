"""The one attention function of tower and decoder.

Shapes: B batch, H heads, G key/value heads, R query heads per key/value head, T queries, S keys, K head width.
"""

from typing import List, Optional, Tuple

import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from paddlemix.models.llava.lean import on_cpu

__all__ = ["AttentionMask", "attend", "causal_bias", "masked_score"]


# Queries of one block of a causal pass: bounds the score matrix and skips the keys after the block.
BLOCK = 128
# Numbers that a mask keeps in the scores' full shape for the next layer; beyond it a broadcast is paid for in each.
KEPT = 1 << 24


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


class AttentionMask:
    """What queries may see: with ``causal`` the keys up to their own position, the last query standing at the last key;
    and what ``bias`` leaves. Serves all layers of a pass, and is computed once.

    Args:
        bias: additive, broadcastable to [B, 1, T, S]; what padding and packing forbid.
    """

    def __init__(self, causal: bool = False, bias: Optional[paddle.Tensor] = None):
        self.causal, self.bias = causal, bias
        self._biases, self._kept = {}, 0

    def blocks(self, queries: int, keys: int) -> List[Tuple[int, int, int]]:
        """(start, stop, seen): queries start to stop see some of the first ``seen`` keys."""
        if not self.causal or queries <= BLOCK:
            return [(0, queries, keys)]
        count = -(-queries // BLOCK)
        edges = [queries * i // count for i in range(count + 1)]
        return [(start, stop, keys - queries + stop) for start, stop in zip(edges, edges[1:])]

    def of_block(self, block, queries: int, keys: int, batch: int, heads: int, dtype) -> Optional[paddle.Tensor]:
        """Additive bias of a block, broadcastable to [B, H, T', S']; None where everything is seen."""
        key = (*block, batch, heads)
        if key not in self._biases:
            bias = self._compute(*block, queries, keys, dtype)
            if bias is not None and on_cpu() and self._kept + batch * heads * bias[0, 0].size <= KEPT:
                # adding in full shape is ten to fifty times faster there
                bias = bias.tile([batch // bias.shape[0], heads // bias.shape[1], 1, 1])
                self._kept += bias.size
            self._biases[key] = bias
        return self._biases[key]

    def _compute(self, start, stop, seen, queries, keys, dtype):
        bias = self.bias
        if bias is not None:
            bias = (bias if bias.shape[-2] == 1 else bias[..., start:stop, :])[..., :seen]
        if self.causal and queries > 1:
            triangle = causal_bias(stop - start, seen, dtype).unsqueeze([0, 1])
            bias = triangle if bias is None else bias + triangle
        if bias is not None and bias.shape[-2] == 1 < stop - start:
            bias = bias.expand([-1, -1, stop - start, -1])
        return bias


def attend(
    query: paddle.Tensor,
    key: paddle.Tensor,
    value: paddle.Tensor,
    *,
    mask: Optional[AttentionMask] = None,
    flash: bool = False,
) -> paddle.Tensor:
    """Softmax attention with grouped key/value heads.

    Args:
        query: [B, H, T, K].
        key, value: [B, G, S, K], G dividing H.
        mask: what the queries may see; None for everything.
        flash: use Paddle's fused kernel (GPU only; the caller has checked that it exists).

    Returns:
        [B, H, T, K]
    """
    mask = mask or AttentionMask()
    if flash:
        return _attend_flash(query, key, value, mask.causal and query.shape[2] > 1, mask.bias)
    if paddle.is_grad_enabled() and not (query.stop_gradient and key.stop_gradient and value.stop_gradient):
        return _LeanAttention.apply(query, key, value, mask)
    return _attend_math(query, key, value, mask)


def _attend_math(query, key, value, mask):
    parts = [
        paddle.matmul(probabilities, value[:, :, :seen]).reshape([0, query.shape[1], stop - start, -1])
        for (start, stop, seen), _, probabilities in _scored_blocks(query, key, mask)
    ]
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=2)


def _scored_blocks(query, key, mask):
    """Per block: its (start, stop, seen), its scaled queries [B, G, R * T', K], and probabilities [B, G, R * T', S'].

    The queries that share a key head become rows of one product: no copy of the keys.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    for block in mask.blocks(queries, keys):
        start, stop, seen = block
        part = (query if stop - start == queries else query[:, :, start:stop]) * width**-0.5
        part = part.reshape([batch, groups, -1, width])
        scores = paddle.matmul(part, key if seen == keys else key[:, :, :seen], transpose_y=True)
        bias = mask.of_block(block, queries, keys, batch, heads, scores.dtype)
        if bias is not None:
            shape = scores.shape
            scores = (scores.reshape([batch, heads, stop - start, seen]) + bias).reshape(shape)
        yield block, part, F.softmax(scores, axis=-1)


class _LeanAttention(PyLayer):
    """Attention that keeps nothing of the size of its scores for the backward pass, but computes them again there
    (the gradients of FlashAttention-2: Dao, 2023, section 2.3)."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        context = _attend_math(query, key, value, mask)
        ctx.save_for_backward(query, key, value, context)
        ctx.mask = mask
        ctx.fixed = [tensor.stop_gradient for tensor in (query, key, value)]
        return context

    @staticmethod
    def backward(ctx, grad):
        query, key, value, context = ctx.saved_tensor()
        batch, heads, queries, width = query.shape
        groups, keys = key.shape[1], key.shape[2]
        mean = _row_sums(grad * context)  # [B, H, T, 1]
        grad_queries, grad_key, grad_value = [], None, None
        for (start, stop, seen), part, probabilities in _scored_blocks(query, key, ctx.mask):

            def rows(tensor, start=start, stop=stop):
                tensor = tensor if stop - start == queries else tensor[:, :, start:stop]
                return tensor.reshape([batch, groups, -1, tensor.shape[-1]])

            grad_part = rows(grad)
            seen_values = value if seen == keys else value[:, :, :seen]
            # the mean goes in by one more column of a product, since a broadcast costs more than the product
            wide_grad = paddle.concat([grad_part, rows(mean)], axis=-1)
            wide_values = paddle.concat(
                [seen_values, paddle.full([batch, groups, seen, 1], -1.0, value.dtype)], axis=-1
            )
            grad_scores = probabilities * paddle.matmul(wide_grad, wide_values, transpose_y=True)
            seen_keys = key if seen == keys else key[:, :, :seen]
            grad_queries.append(paddle.matmul(grad_scores, seen_keys).reshape([batch, heads, stop - start, width]))
            grad_key = _add_rows(grad_key, paddle.matmul(grad_scores, part, transpose_x=True))
            grad_value = _add_rows(grad_value, paddle.matmul(probabilities, grad_part, transpose_x=True))
        grad_query = grad_queries[0] if len(grad_queries) == 1 else paddle.concat(grad_queries, axis=2)
        grads = (grad_query * width**-0.5, grad_key, grad_value)
        # a PyLayer must give None where no gradient is asked for, as with adapters on some projections only
        return tuple(None if fixed else g for fixed, g in zip(ctx.fixed, grads))


def _row_sums(x):
    """Sums over the last axis, which stays with length 1, as a product with ones: a tenth of the time of ``sum`` on a CPU."""
    return paddle.matmul(x, paddle.ones([x.shape[-1], 1], x.dtype))


def _add_rows(total, more):
    """total [B, G, S, K], or None, plus ``more`` [B, G, S', K] with S' >= S: later blocks see more keys."""
    if total is None:
        return more
    missing = more.shape[2] - total.shape[2]
    return more + (F.pad(total, [0, 0, 0, missing], data_format="NCHW") if missing else total)


def _attend_flash(query, key, value, causal, bias):
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (paddle.repeat_interleave(x, groups, axis=1) for x in (key, value))
    if bias is not None and causal:
        bias, causal = bias + causal_bias(query.shape[2], key.shape[2], query.dtype), False
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)
    return context.transpose([0, 2, 1, 3])
