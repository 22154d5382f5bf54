"""Short passes of the decoder on a CPU: the steps of an answer, for one row or a batch, and the prompt of a further turn.

Paddle takes some thirty kernels a layer, each with its own overhead, and multiplies few rows at half of the memory's pace. Here
the products are oneDNN's (:mod:`onednn`), which also add, multiply and activate, and the little that is left is NumPy's, over the
memory of Paddle's tensors. See ``benchmarks/README.md`` for figures.
"""

from typing import Any, List, Optional, Tuple

import numpy as np
import paddle
from paddle import nn

from paddlemix.models.llava.attention import masked_score
from paddlemix.models.llava.decoder import KVCache
from paddlemix.models.llava.lean import host_view, on_cpu
from paddlemix.models.llava.onednn import have_bfloat16, products, widen

__all__ = ["HostPasses"]

FEW_QUERIES = 8  # of a key head
MOST_ROWS = 64  # beyond it NumPy's single thread takes longer than Paddle's kernels


class _Layer:
    """The weights of a layer, each [in, out], in the memory in which Paddle has them."""

    def __init__(self, layer: nn.Layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.query, self.key, self.value, self.out = (
            host_view(each.weight) for each in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.gate, self.up, self.down = (host_view(each.weight) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.read_norms()

    def read_norms(self) -> None:
        self.before_attention, self.before_mlp = (_numbers(each) for each in self._norms)


def _numbers(tensor: paddle.Tensor) -> np.ndarray:
    """A small weight in float32: its memory, or a copy where it is held in bfloat16."""
    view = host_view(tensor)
    return widen(view) if view.dtype == np.uint16 else view


class HostPasses:
    """Passes of one model's decoder; the cache is the one that Paddle's passes read and write.

    Shapes: B rows of T tokens, N = B * T; D width, H heads, G key/value heads, R = H / G, K head width, S tokens held.
    """

    def __init__(self, model: Any):
        decoder, config = model.llama, model.config
        self._tensors = _tensors(model)  # holds what the views look at
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        layers = _layers(model)
        self._hooks = [hooks for each in layers for hooks in (each._forward_pre_hooks, each._forward_post_hooks)]
        # where each of its parts and numbers hangs: adapters and new vocabularies put others in their place
        held = [mapping for each in layers for mapping in (each._sub_layers, each._parameters)]
        self._links = [(mapping, name, part) for mapping in held for name, part in mapping.items()]
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self.embeddings, self.norm = host_view(decoder.embed_tokens.weight), _numbers(decoder.norm.weight)
        self.head = None if config.tie_word_embeddings else host_view(model.lm_head.weight)
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.epsilon = config.rms_norm_eps
        self.dtype = str(decoder.norm.weight.dtype).replace("paddle.", "")
        self.rotary, self.next_positions = decoder.rotary, decoder.next_positions

    @classmethod
    def of(cls, model: Any, cache: KVCache, tokens: int) -> Optional["HostPasses"]:
        """The model's, for the next ``tokens`` of each row on ``cache``; None where Paddle has to take them.

        Whether the model can be served is found out at each pass of several tokens, and at the first step after one.
        """
        rows = cache.batch_size * tokens
        if rows > MOST_ROWS or model.training or not on_cpu() or (rows > 1 and products() is None):
            return None
        passes = getattr(model, "_host_passes", None)
        if tokens == 1 and passes is not None and cache.host_passes is passes and passes._in_place():
            return None if any(passes._hooks) else passes
        if not _serves(model, cache):
            return None
        if passes is None or not passes._in_place():
            passes = model._host_passes = cls(model)
        elif passes.dtype == "bfloat16":  # whose copies may be old
            passes._read_norms(model)
        cache.host_passes = passes
        return passes

    def __reduce__(self):
        """A copy of a model or of a cache begins without."""
        return type(None), ()

    def _in_place(self) -> bool:
        """Whether the tensors are still the model's, and where they were."""
        if any(mapping.get(name) is not part for mapping, name, part in self._links):
            return False
        return [tensor.data_ptr() for tensor in self._tensors] == self._places

    def _read_norms(self, model: Any) -> None:
        self.norm = _numbers(model.llama.norm.weight)
        for layer in self.layers:
            layer.read_norms()

    def step(self, ids: np.ndarray, cache: KVCache) -> np.ndarray:
        """Reads one token of each row, ids [B], into the cache; logits [B, V] after them."""
        embeddings = self.embeddings[ids][:, None]
        return self.read(widen(embeddings) if embeddings.dtype == np.uint16 else embeddings, cache)

    def read(self, embeddings: np.ndarray, cache: KVCache) -> np.ndarray:
        """Reads [B, T, D] in float32, without padding, into the cache; logits [B, V] after the last token of each row."""
        batch, tokens, _ = embeddings.shape
        positions, longest, after = self.next_positions(batch, tokens, None, cache)
        cos, sin = (
            table.numpy().reshape(-1, tokens, 1, self.width) for table in self.rotary(positions, longest, "float32")
        )
        half = self.width // 2
        sin = np.concatenate([-sin[..., :half], sin[..., half:]], axis=-1)
        stop = cache.open(tokens)
        bias = _bias(cache, tokens, stop)
        heads, groups, width = self.heads, self.groups, self.width
        compute = _Compute(batch * tokens, self.dtype)

        def turn(x):
            return x * cos + np.concatenate([x[..., half:], x[..., :half]], axis=-1) * sin

        scale = np.float32(width**-0.5)
        hidden = np.array(embeddings.reshape(batch * tokens, -1), order="C")
        last = len(self.layers) - 1
        for index, (layer, (keys, values)) in enumerate(zip(self.layers, _views(cache))):
            x = self._norm(hidden, layer.before_attention)
            key = turn(compute(x, layer.key).reshape(batch, tokens, groups, width))
            value = compute(x, layer.value).reshape(batch, tokens, groups, width)
            keys[:, :, cache.length : stop] = key.transpose(0, 2, 1, 3)
            values[:, :, cache.length : stop] = value.transpose(0, 2, 1, 3)
            query = turn(compute(x, layer.query).reshape(batch, tokens, heads, width)) * scale
            if index == last and tokens > 1:  # whose other tokens nothing looks at any more
                query, hidden = query[:, -1:], hidden.reshape(batch, tokens, -1)[:, -1].copy()
                bias, compute = bias if bias is None else bias[..., -1:, :], _Compute(batch, self.dtype)
            asked = query.shape[1]
            query = query.reshape(batch, asked, groups, -1, width).transpose(0, 2, 3, 1, 4)  # [B, G, R, T, K]
            queries, seen = query.reshape(batch, groups, -1, width), keys[:, :, :stop]
            if queries.shape[2] <= FEW_QUERIES:
                scores = scores_of_few(queries, seen)
            else:
                scores = queries @ seen.transpose(0, 1, 3, 2)
            if bias is not None:
                shaped = scores.reshape(batch, groups, -1, asked, stop)
                shaped += bias
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            context = (scores @ values[:, :, :stop]).reshape(batch, groups, -1, asked, width).transpose(0, 3, 1, 2, 4)
            compute(context.reshape(batch * asked, heads * width), layer.out, add=hidden)
            x = self._norm(hidden, layer.before_mlp)
            gate = compute(x, layer.gate, silu=True)
            compute(compute(x, layer.up, factor=gate), layer.down, add=hidden)
        cache.length, cache.positions = stop, after
        x = self._norm(hidden, self.norm)
        return compute(x, self.embeddings, turned=True) if self.head is None else compute(x, self.head)

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        if len(x) == 1:
            return x * np.float32(1 / np.sqrt(x[0] @ x[0] / x.size + self.epsilon)) * weight
        mean = np.einsum("nd,nd->n", x, x) / np.float32(x.shape[1]) + np.float32(self.epsilon)
        return x * (1 / np.sqrt(mean))[:, None] * weight


class _Compute:
    """Products of ``rows`` rows with weights of ``dtype``: by oneDNN, but for one row of float32 by NumPy, whose BLAS reads
    weights faster for it."""

    def __init__(self, rows: int, dtype: str):
        self.rows, self.dtype = rows, dtype
        self.products = products() if rows > 1 or dtype == "bfloat16" else None

    def __call__(
        self,
        x: np.ndarray,
        weight: np.ndarray,
        *,
        turned: bool = False,
        silu: bool = False,
        factor: Optional[np.ndarray] = None,
        add: Optional[np.ndarray] = None,
    ) -> np.ndarray:
        """x [N, in] times weight [in, out], or [out, in] if it is turned; see :class:`onednn.Products`."""
        if self.products is None:
            return _by_numpy(x, weight, turned, silu, factor, add)
        inner, outer = weight.shape[::-1] if turned else weight.shape
        result = np.empty((self.rows, outer), np.float32) if add is None else add
        if self.dtype == "bfloat16":
            x, wide = np.empty(x.shape, np.uint16), x
            self.products.narrow(_address(wide), _address(x), wide.size)
        self.products(
            _address(x),
            _address(weight),
            _address(result),
            self.rows,
            inner,
            outer,
            self.dtype,
            turned=turned,
            swish=1.0 if silu else None,
            factor=None if factor is None else _address(factor),
            add=add is not None,
        )
        return result


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]  # without the object that ``array.ctypes`` makes


def _by_numpy(x, weight, turned, silu, factor, add) -> np.ndarray:
    result = x @ (weight.T if turned else weight)
    if silu:
        result *= 0.5 * np.tanh(0.5 * result) + 0.5  # the sigmoid by a tanh, which doesn't overflow
    if factor is not None:
        result *= factor
    if add is not None:
        add += result
    return result


def scores_of_few(query: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """query [B, G, N, K] times keys [B, G, S, K], turned: [B, G, N, S]; half of the time where few queries share a key head."""
    turned = keys @ np.ascontiguousarray(query.transpose(0, 1, 3, 2))
    return np.ascontiguousarray(turned.transpose(0, 1, 3, 2))


def _bias(cache: KVCache, tokens: int, stop: int) -> Optional[np.ndarray]:
    """What padding and the future forbid, broadcastable to [B, G, R, T, S]; None where nothing is."""
    # without padding nothing that is held is hidden
    bias = None if cache.positions is None else cache.bias.numpy()[:, None, None, None, :stop]
    if tokens == 1:
        return bias
    future = np.triu(np.full((tokens, stop), masked_score("float32"), np.float32), 1 + stop - tokens)
    return future if bias is None else bias + future


def _views(cache: KVCache) -> List[Tuple[np.ndarray, np.ndarray]]:
    """Keys and values [B, G, C, K] of each layer; made anew when the cache has moved."""
    tensors = [*cache.keys, *cache.values]
    places = [tensor.data_ptr() for tensor in tensors]
    held, views = cache.host_views
    if held != places:
        arrays = [host_view(tensor) for tensor in tensors]
        views = list(zip(arrays[: len(cache.keys)], arrays[len(cache.keys) :]))
        cache.host_views = places, views
    return views


def _linears(model: Any) -> List[nn.Layer]:
    linears = [] if model.config.tie_word_embeddings else [model.lm_head]
    for layer in model.llama.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    return linears


def _tensors(model: Any) -> List[paddle.Tensor]:
    decoder = model.llama
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    return [each.weight for each in (decoder.embed_tokens, decoder.norm, *norms, *_linears(model))]


def _serves(model: Any, cache: KVCache) -> bool:
    """Whether the decoder is nothing but its own layers, in float32 or bfloat16 on the host: no adapters, no other kinds of
    products, no hooks."""
    dtype = model.llama.norm.weight.dtype
    if dtype == paddle.bfloat16 and not have_bfloat16():
        return False
    return (
        all(type(each) is nn.Linear and each.bias is None for each in _linears(model))
        and not any(each._forward_pre_hooks or each._forward_post_hooks for each in _layers(model))
        and dtype in (paddle.float32, paddle.bfloat16)
        and all(each.dtype == dtype and each.place.is_cpu_place() for each in _tensors(model))
        and cache.dtype == paddle.float32
        and all(each.is_contiguous() for each in _tensors(model))
    )


def _layers(model: Any) -> List[nn.Layer]:
    """All layers that a step goes through."""
    decoder = model.llama
    parts = decoder.embed_tokens, decoder.norm, decoder.layers
    layers = [model, decoder, *(each for part in parts for each in part.sublayers(include_self=True))]
    return layers if model.config.tie_word_embeddings else [*layers, model.lm_head]
