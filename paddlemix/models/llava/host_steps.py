"""Decoding on a CPU: one token of one row, by NumPy over the memory of Paddle's tensors.

A step reads every weight once, so memory should bound it. Paddle's step takes twice that time: some thirty kernels a layer,
each with its own overhead, and products of one row by MKL, which reads at half of the memory's pace. The BLAS of NumPy's wheels
(OpenBLAS) reads at full pace, and its calls cost a microsecond. See ``benchmarks/README.md`` for figures.
"""

import ctypes
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import paddle
from paddle import nn

from paddlemix.models.llava.decoder import KVCache
from paddlemix.models.llava.lean import on_cpu

__all__ = ["HostSteps"]


def _view(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a float32 tensor on the host, of which the caller must keep hold."""
    numbers = (ctypes.c_float * tensor.size).from_address(tensor.data_ptr())
    return np.frombuffer(numbers, np.float32).reshape(tensor.shape)


class _Layer:
    """The weights of a layer, each [in, out], in the memory in which Paddle has them."""

    def __init__(self, layer: nn.Layer):
        attention, mlp = layer.self_attn, layer.mlp
        self.query, self.key, self.value, self.out = (
            _view(each.weight) for each in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        )
        self.gate, self.up, self.down = (_view(each.weight) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self.before_attention = _view(layer.input_layernorm.weight)
        self.before_mlp = _view(layer.post_attention_layernorm.weight)


class HostSteps:
    """Steps of one model's decoder; the cache is the one that Paddle's passes read and write.

    Shapes: D width, H heads, G key/value heads, K head width, S tokens held.
    """

    def __init__(self, model: Any):
        decoder, config = model.llama, model.config
        self._tensors = _tensors(model)  # holds what the views look at
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._hooks = _hooks(model)
        self.layers = [_Layer(layer) for layer in decoder.layers]
        self.embeddings, self.norm = _view(decoder.embed_tokens.weight), _view(decoder.norm.weight)
        self.head = None if config.tie_word_embeddings else _view(model.lm_head.weight)
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.epsilon = config.rms_norm_eps

    @classmethod
    def of(cls, model: Any, cache: KVCache) -> Optional["HostSteps"]:
        """The model's, for the next step on ``cache``; None where Paddle has to take it.

        Whether NumPy can serve is found out at the first step after a pass of several tokens.
        """
        if cache.batch_size != 1 or model.training or not on_cpu():
            return None
        steps = getattr(model, "_host_steps", None)
        if steps is not None and cache.host_steps is steps and steps._in_place():
            return None if any(steps._hooks) else steps
        if not _serves(model, cache):
            return None
        if steps is None or not steps._holds(model):
            steps = model._host_steps = cls(model)
        cache.host_steps = steps
        return steps

    def __reduce__(self):
        """A copy of a model or of a cache begins without."""
        return type(None), ()

    def _in_place(self) -> bool:
        """Whether the tensors are where they were."""
        return [tensor.data_ptr() for tensor in self._tensors] == self._places

    def _holds(self, model: Any) -> bool:
        """Whether they are still the model's."""
        return self._in_place() and all(ours is its for ours, its in zip(self._tensors, _tensors(model)))

    def __call__(self, model: Any, token: int, cache: KVCache) -> np.ndarray:
        """Reads a token into the cache; logits [V] after it."""
        decoder = model.llama
        positions, longest, after = decoder.next_positions(1, 1, None, cache)
        cos, sin = (table.numpy().reshape(-1) for table in decoder.rotary(positions, longest, "float32"))
        half = self.width // 2
        sin = np.concatenate([-sin[:half], sin[half:]])
        stop = cache.open(1)
        # without padding nothing that is held is hidden
        bias = None if cache.positions is None else cache.bias.numpy()[0, :stop]
        heads, groups, width = self.heads, self.groups, self.width

        def turn(x):
            return x * cos + np.concatenate([x[:, half:], x[:, :half]], axis=1) * sin

        scale = np.float32(width**-0.5)
        hidden = self.embeddings[token].copy()
        for layer, (keys, values) in zip(self.layers, _views(cache)):
            x = self._norm(hidden, layer.before_attention)
            keys[:, cache.length] = turn((x @ layer.key).reshape(groups, width))
            values[:, cache.length] = (x @ layer.value).reshape(groups, width)
            query = turn((x @ layer.query).reshape(heads, width)) * scale
            scores = query.reshape(groups, -1, width) @ keys[:, :stop].transpose(0, 2, 1)  # [G, H / G, S]
            if bias is not None:
                scores += bias
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=-1, keepdims=True)
            hidden += (scores @ values[:, :stop]).reshape(-1) @ layer.out
            x = self._norm(hidden, layer.before_mlp)
            gate = x @ layer.gate
            # gate * sigmoid(gate), by a tanh, which doesn't overflow
            gate *= 0.5 * np.tanh(0.5 * gate) + 0.5
            gate *= x @ layer.up
            hidden += gate @ layer.down
        cache.length, cache.positions = stop, after
        x = self._norm(hidden, self.norm)
        return self.embeddings @ x if self.head is None else x @ self.head

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x * np.float32(1 / np.sqrt(x @ x / x.size + self.epsilon)) * weight


def _views(cache: KVCache) -> List[Tuple[np.ndarray, np.ndarray]]:
    """Keys and values [G, C, K] of each layer, for the one row; made anew when the cache has moved."""
    tensors = [*cache.keys, *cache.values]
    places = [tensor.data_ptr() for tensor in tensors]
    held, views = cache.host_views
    if held != places:
        arrays = [_view(tensor)[0] for tensor in tensors]
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
    """Whether the decoder is nothing but its own layers, in float32 on the host: no adapters, no other kinds of products, no
    hooks."""
    return (
        all(type(each) is nn.Linear and each.bias is None for each in _linears(model))
        and not any(_hooks(model))
        and all(each.dtype == paddle.float32 and each.place.is_cpu_place() for each in (*_tensors(model), cache.bias))
        and all(each.is_contiguous() for each in _tensors(model))
    )


def _hooks(model: Any) -> List[Dict]:
    """Where the hooks of all layers that a step goes through are registered."""
    decoder = model.llama
    parts = decoder.embed_tokens, decoder.norm, decoder.layers
    layers = [model, decoder, *(each for part in parts for each in part.sublayers(include_self=True))]
    layers += [] if model.config.tie_word_embeddings else [model.lm_head]
    return [register for each in layers for register in (each._forward_pre_hooks, each._forward_post_hooks)]
