"""The one attention function of tower and decoder.

Shapes: B batch, H heads, G key/value heads, R query heads per key/value head, T queries, S keys, K head width.
"""

from typing import List, Optional, Tuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from paddlemix.models.llava.lean import host_view, on_cpu
from paddlemix.models.llava.onednn import products

__all__ = ["AttentionMask", "attend", "causal_bias", "masked_score"]


Block = Tuple[int, int, int, int]  # queries start to stop see some of the keys low to seen

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
    and what ``bias`` and ``segment_ids`` leave. Serves all layers of a pass, and is computed once.

    Args:
        bias: additive, broadcastable to [B, 1, T, S]; what padding forbids.
        segment_ids: [B, T] of packed rows, S being T: a token sees its own segment only. Keys of other segments are left
            out of the products where the rows allow it, which for one row is always.
    """

    def __init__(
        self,
        causal: bool = False,
        bias: Optional[paddle.Tensor] = None,
        segment_ids: Optional[paddle.Tensor] = None,
    ):
        self.causal, self.bias, self.segment_ids = causal, bias, segment_ids
        self._firsts = None if segment_ids is None else _segment_starts(segment_ids.numpy())
        self._blocks, self._biases, self._fused, self._kept = {}, {}, {}, 0
        self._corners = {}  # what a causal pass alone forbids, in the full shape of the largest block's scores

    def blocks(self, queries: int, keys: int) -> List[Block]:
        """What the queries are cut into."""
        if (queries, keys) not in self._blocks:
            self._blocks[queries, keys] = self._cut(queries, keys)
        return self._blocks[queries, keys]

    def _cut(self, queries: int, keys: int) -> List[Block]:
        if not self.causal:
            return [(0, queries, 0, keys)]
        edges = [0, queries]
        if self._firsts is not None and len(self._firsts) == 1:  # no block reaches over the end of a segment
            edges = sorted({*self._firsts[0].tolist(), queries})
        blocks = []
        for first, last in zip(edges, edges[1:]):
            count = -(-(last - first) // BLOCK)
            inner = [first + (last - first) * i // count for i in range(count + 1)]
            for start, stop in zip(inner, inner[1:]):
                low = 0 if self._firsts is None else int(self._firsts[:, start:stop].min())
                blocks.append((start, stop, low, keys - queries + stop))
        return blocks

    def of_block(self, block: Block, queries: int, keys: int, batch: int, heads: int, dtype) -> Optional[paddle.Tensor]:
        """Additive bias of a block, broadcastable to [B, H, T', S']; None where everything is seen."""
        key = (*block, batch, heads)
        if key in self._biases:
            return self._biases[key]
        size = batch * heads * (block[1] - block[0]) * (block[3] - block[2])
        if on_cpu() and self._kept + size > KEPT and self._only_future(*block) and queries > 1:
            return self._future(block, queries, keys, batch, heads, dtype)
        bias = self._compute(*block, queries, dtype)
        if bias is not None and on_cpu() and self._kept + size <= KEPT:
            # adding in full shape is ten to fifty times faster there
            bias = bias.tile([batch // bias.shape[0], heads // bias.shape[1], 1, 1])
            self._kept += size
        self._biases[key] = bias
        return bias

    def _only_future(self, start, stop, low, seen) -> bool:
        """Whether nothing is hidden in a block but what comes later."""
        return self.causal and self.bias is None and not self._mixes(start, stop, low)

    def _future(self, block, queries, keys, batch, heads, dtype):
        """Its bias in full shape: the lower right corner of the largest block's, as the last query sees the last key in each."""
        start, stop, low, seen = block
        key = (queries, keys, batch, heads)
        if key not in self._corners:
            blocks = self.blocks(queries, keys)
            rows, columns = max(b[1] - b[0] for b in blocks), max(b[3] - b[2] for b in blocks)
            self._corners[key] = causal_bias(rows, columns, dtype).unsqueeze([0, 1]).tile([batch, heads, 1, 1])
        rows, columns = self._corners[key].shape[2:]
        return self._corners[key][:, :, rows - (stop - start) :, columns - (seen - low) :]

    def fused(self, batch: int, queries: int, keys: int, dtype) -> Tuple[Optional[paddle.Tensor], bool]:
        """All of it as a fused kernel takes it: a bias [B or 1, 1, T, S], or None, and whether it is causal besides."""
        key = (batch, queries, keys, dtype)
        if key not in self._fused:
            parts = [] if self.bias is None else [_bias_in(self.bias, dtype)]
            if self.segment_ids is not None:
                parts.append(self._apart(0, keys, 0, keys, dtype))
            causal = self.causal and queries > 1
            # of fewer queries than keys, Paddle's is_causal puts the first one at the first key
            if causal and (parts or queries != keys):
                parts.append(causal_bias(queries, keys, dtype).expand([batch, 1, queries, keys]))
                causal = False
            self._fused[key] = sum(parts[1:], parts[0]) if parts else None, causal
        return self._fused[key]

    def _apart(self, start, stop, low, seen, dtype):
        ids = self.segment_ids
        same = ids[:, start:stop].unsqueeze(2) == ids[:, low:seen].unsqueeze(1)
        return ((1 - same.astype(dtype)) * masked_score(dtype)).unsqueeze(1)

    def _mixes(self, start, stop, low) -> bool:
        """Whether some keys of a block belong to other segments than some of its queries."""
        return self._firsts is not None and (len(self._firsts) > 1 or bool(low < self._firsts[:, start:stop].max()))

    def _compute(self, start, stop, low, seen, queries, dtype):
        parts = []
        if self.bias is not None:
            rows = self.bias if self.bias.shape[-2] == 1 else self.bias[..., start:stop, :]
            parts.append(_bias_in(rows[..., low:seen], dtype))
        if self._mixes(start, stop, low):
            parts.append(self._apart(start, stop, low, seen, dtype))
        if self.causal and queries > 1:
            parts.append(causal_bias(stop - start, seen - low, dtype).unsqueeze([0, 1]))
        if not parts:
            return None
        bias = sum(parts[1:], parts[0])
        return bias.expand([-1, -1, stop - start, -1]) if bias.shape[-2] == 1 < stop - start else bias


def _bias_in(bias: paddle.Tensor, dtype) -> paddle.Tensor:
    """A bias in the type of the scores; float16 has no -1e9."""
    return bias if bias.dtype == dtype else paddle.clip(bias, min=masked_score(dtype)).astype(dtype)


def _segment_starts(segment_ids: np.ndarray) -> np.ndarray:
    """Where the segment of each token begins: [[7, 7, 8, 0]] -> [[0, 0, 2, 3]]."""
    places = np.arange(segment_ids.shape[1])
    begins = np.ones_like(segment_ids, dtype=bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return np.maximum.accumulate(np.where(begins, places, 0), axis=1)


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
    if query.dtype != value.dtype:
        # under amp's level O1 the rotation, in float32, hands on float32; neither a matmul outside of amp nor a fused kernel
        # takes two types
        query, key = query.astype(value.dtype), key.astype(value.dtype)
    if flash:
        return _attend_flash(query, key, value, mask)
    if paddle.is_grad_enabled() and not (query.stop_gradient and key.stop_gradient and value.stop_gradient):
        return _LeanAttention.apply(query, key, value, mask)
    return _attend_math(query, key, value, mask)


def _attend_math(query, key, value, mask):
    parts = [
        paddle.matmul(probabilities, _between(value, low, seen)).reshape([0, query.shape[1], stop - start, -1])
        for (start, stop, low, seen), _, probabilities in _scored_blocks(query, key, mask)
    ]
    return parts[0] if len(parts) == 1 else paddle.concat(parts, axis=2)


def _scored_blocks(query, key, mask):
    """Per block: its places, its scaled queries [B, G, R * T', K], and probabilities [B, G, R * T', S'].

    The queries that share a key head become rows of one product: no copy of the keys.
    """
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    for block in mask.blocks(queries, keys):
        start, stop, low, seen = block
        part = (_between(query, start, stop) * width**-0.5).reshape([batch, groups, -1, width])
        scores = paddle.matmul(part, _between(key, low, seen), transpose_y=True)
        bias = mask.of_block(block, queries, keys, batch, heads, scores.dtype)
        if bias is not None:
            scores = _add(scores.reshape([batch, heads, stop - start, seen - low]), bias).reshape(scores.shape)
        yield block, part, _softmax(scores)


def _in_place() -> bool:
    """Whether scores are overwritten: fresh memory of their size costs a third of the operation on a CPU."""
    return on_cpu() and paddle.in_dynamic_mode()


def _add(scores, bias):
    return scores.add_(bias) if _in_place() else scores + bias


def _softmax(scores):
    if not _in_place():
        return F.softmax(scores, axis=-1)
    kernels = products() if scores.dtype == paddle.float32 and scores.size else None
    if kernels is None:
        return F.softmax_(scores, axis=-1)
    # a fifth of the time that Paddle's takes
    kernels.softmax(scores.data_ptr(), scores.size // scores.shape[-1], scores.shape[-1])
    return scores


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
        groups = key.shape[1]
        mean = _row_sums(grad * context)  # [B, H, T, 1]
        grad_queries, grad_key, grad_value = [], None, None
        for (start, stop, low, seen), part, probabilities in _scored_blocks(query, key, ctx.mask):
            grad_part = _between(grad, start, stop).reshape([batch, groups, -1, width])
            mean_part = _between(mean, start, stop).reshape([batch, groups, -1, 1])
            # the mean goes in by one more column of a product, since a broadcast costs more than the product
            minus = paddle.full([batch, groups, seen - low, 1], -1.0, value.dtype)
            wide_values = paddle.concat([_between(value, low, seen), minus], axis=-1)
            wide_grad = paddle.concat([grad_part, mean_part], axis=-1)
            grad_scores = probabilities * paddle.matmul(wide_grad, wide_values, transpose_y=True)
            grad_query = paddle.matmul(grad_scores, _between(key, low, seen))
            grad_queries.append(grad_query.reshape([batch, heads, stop - start, width]))
            grad_key = _add_at(grad_key, paddle.matmul(grad_scores, part, transpose_x=True), low, seen, key)
            grad_value = _add_at(grad_value, paddle.matmul(probabilities, grad_part, transpose_x=True), low, seen, key)
        grad_query = grad_queries[0] if len(grad_queries) == 1 else paddle.concat(grad_queries, axis=2)
        grads = (grad_query * width**-0.5, grad_key, grad_value)
        # a PyLayer must give None where no gradient is asked for, as with adapters on some projections only
        return tuple(None if fixed else g for fixed, g in zip(ctx.fixed, grads))


def _between(x, start, stop):
    """x[:, :, start:stop]; ``x`` itself where that is all of it, since a slice is a copy."""
    return x if stop - start == x.shape[2] else x[:, :, start:stop]


def _row_sums(x):
    """Sums over the last axis, which stays with length 1, as a product with ones: a tenth of the time of ``sum`` on a CPU."""
    return paddle.matmul(x, paddle.ones([x.shape[-1], 1], x.dtype))


def _add_at(total, more, low, seen, whole):
    """``total``, of the shape of ``whole`` [B, G, S, K] or None, with ``more`` added to keys low to seen."""
    if total is None:
        if seen - low == whole.shape[2]:
            return more
        total = paddle.zeros(whole.shape, more.dtype)
    if _in_place() and total.dtype == paddle.float32 and more.is_contiguous():
        host_view(total)[:, :, low:seen] += host_view(more)  # Paddle's assignment costs more than the products
    else:
        total[:, :, low:seen] = total[:, :, low:seen] + more
    return total


def _attend_flash(query, key, value, mask):
    batch, heads, queries, _ = query.shape
    groups, keys = key.shape[1:3]
    bias, causal = mask.fused(batch, queries, keys, query.dtype)
    if heads != groups:  # repeat_interleave has no float16 on a GPU
        key, value = (x.unsqueeze(2).expand([-1, -1, heads // groups, -1, -1]).flatten(1, 2) for x in (key, value))
    query, key, value = (x.transpose([0, 2, 1, 3]) for x in (query, key, value))
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)
    return context.transpose([0, 2, 1, 3])
