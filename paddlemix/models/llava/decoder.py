"""The LLaMA decoder (Touvron et al., 2023): RMSNorm, rotary positions, grouped-query attention, SwiGLU, a cache.

One forward serves training, generation and export. Shapes: B batch, T tokens, D width, H heads, G key/value heads,
K head width, C capacity of the cache.
"""

from typing import Optional, Tuple

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava.attention import AttentionMask, attend, masked_score
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.lean import Rotation, host_view, on_cpu, rms_norm, rotate, turn
from paddlemix.models.llava.linear import project, project_swiglu

__all__ = ["KVCache", "LlamaDecoder", "RotaryEmbedding"]


class KVCache:
    """Keys and values of what the decoder has read: allocated once, written in place.

    Memory grows by blocks up to ``capacity``; positions past ``length`` are masked, so no step copies what is cached.

    Attributes:
        length (int): tokens held, padding included.
        capacity (int): tokens that fit.
    """

    BLOCK = 256

    def __init__(self, config: LlavaConfig, batch_size: int, capacity: int, dtype):
        self.config, self.batch_size, self.capacity, self.dtype = config, batch_size, capacity, dtype
        self.length = 0
        self.keys = [None] * config.num_hidden_layers
        self.values = [None] * config.num_hidden_layers
        self._allocated = 0
        self.bias = None  # [B, allocated] 0 where a key counts, masked_score at padding and past the length
        # what takes short passes on a CPU, once it is known that it can, and how it sees keys and values
        self.host_passes, self.host_views = None, ([], [])
        self.positions = None  # [B, 1] next position of each row; None: the same for all, self.length

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more."""
        needed = self.length + tokens
        if needed > self.capacity:
            raise UserError(
                f"{needed} tokens don't fit in a cache of {self.capacity}; ask new_cache for a larger capacity."
            )
        if needed <= self._allocated:
            return
        # half as much again, so that a long answer is moved a few times only
        size = min(self.capacity, -(-max(needed, self._allocated * 3 // 2) // self.BLOCK) * self.BLOCK)
        shape = [self.batch_size, self.config.num_key_value_heads, size, self.config.head_dim]
        self.host_views = [], []
        self._allocated = 0  # until every layer has moved: after an interruption the next call starts over
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                new = paddle.zeros(shape, self.dtype)
                if self.length:
                    new[:, :, : self.length] = old[:, :, : self.length]
                tensors[i] = new
        bias = paddle.full([self.batch_size, size], masked_score(self.dtype), self.dtype)
        if self.length:
            bias[:, : self.length] = self.bias[:, : self.length]
        self.bias, self._allocated = bias, size

    def open(self, tokens: int, hidden: Optional[paddle.Tensor] = None) -> int:
        """Makes room for ``tokens`` more and lets them be seen, but for what ``hidden`` [B, T] adds; the length then."""
        self.reserve(tokens)
        stop = self.length + tokens
        self.bias[:, self.length : stop] = 0.0 if hidden is None else hidden
        return stop

    def write(self, layer: int, key: paddle.Tensor, value: paddle.Tensor) -> None:
        """Puts key and value [B, G, T, K] of the newest T tokens after the ``length`` that are held."""
        stop = self.length + key.shape[2]
        for held, new in ((self.keys[layer], key), (self.values[layer], value)):
            pair = held, new
            plain = new.stop_gradient and all(x.dtype == paddle.float32 and x.is_contiguous() for x in pair)
            if plain and on_cpu():
                host_view(held)[:, :, self.length : stop] = host_view(new)  # half of the time of Paddle's assignment
            else:
                held[:, :, self.length : stop] = new

    def truncate(self, length: int) -> None:
        """Forgets what follows the first ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate a cache of {self.length} tokens to {length}")
        if self.bias is not None:
            # past the old length too: a forward that was interrupted has let positions in that it never finished
            self.bias[:, length:] = masked_score(self.dtype)
        if length < self.length:
            if self.positions is not None:
                self.positions = self.positions - (self.length - length)
            self.length = length

    def reorder(self, rows: paddle.Tensor) -> None:
        """Row i becomes what row ``rows[i]`` was; there may be more rows than before."""
        self.batch_size, self.host_views = rows.shape[0], ([], [])
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = paddle.index_select(tensor, rows, axis=0)
        self.bias = paddle.index_select(self.bias, rows, axis=0)
        if self.positions is not None:
            self.positions = paddle.index_select(self.positions, rows, axis=0)


class RotaryEmbedding:
    """Cosines and sines of rotary positions (Su et al., 2021), with linear and dynamic (NTK) scaling.

    No layer and no parameter: the tables are computed once per length that is seen, in float32.
    """

    def __init__(self, config: LlavaConfig):
        self.width, self.theta = config.head_dim, float(config.rope_theta)
        self.trained_length = config.max_position_embeddings
        scaling = config.rope_scaling or {}
        self.kind = scaling.get("type", scaling.get("rope_type"))
        self.factor = float(scaling.get("factor", 1.0))
        # length and tables; replaced at once, as an interruption or another thread may come at any moment
        self._held: Tuple[int, Optional[Tuple[paddle.Tensor, paddle.Tensor]]] = (0, None)

    def __call__(self, positions: paddle.Tensor, longest: int, dtype) -> Tuple[paddle.Tensor, paddle.Tensor]:
        """positions [B, T] -> cos, sin [B, 1, T, K]; ``longest`` is the highest position plus one."""
        dynamic = self.kind == "dynamic" and longest > self.trained_length
        if dynamic:
            tables = self._compute(longest, longest)
        else:
            length, tables = self._held
            if longest > length:
                # a length below the trained one is filled at once; above it, with some room
                length = self.trained_length if longest <= self.trained_length else longest + 512
                tables = self._compute(length, self.trained_length)
                self._held = length, tables
        flat = positions.flatten()
        shape = [positions.shape[0], 1, positions.shape[1], self.width]
        return tuple(paddle.gather(table, flat).reshape(shape).astype(dtype) for table in tables)

    def _compute(self, length: int, context: int) -> Tuple[paddle.Tensor, paddle.Tensor]:
        theta = self.theta
        if self.kind == "dynamic" and context > self.trained_length:
            stretch = self.factor * context / self.trained_length - (self.factor - 1)
            theta = theta * stretch ** (self.width / (self.width - 2))
        frequency = 1.0 / theta ** (paddle.arange(0, self.width, 2, dtype="float32") / self.width)
        position = paddle.arange(length, dtype="float32")
        if self.kind == "linear":
            position = position / self.factor
        angle = paddle.outer(position, frequency)
        angle = paddle.concat([angle, angle], axis=-1)
        return angle.cos(), angle.sin()


class LlamaRMSNorm(nn.Layer):
    """Root mean square norm (Zhang & Sennrich, 2019), computed in float32."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class LlamaAttention(nn.Layer):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.width, bias_attr=False)
        self.k_proj = nn.Linear(width, self.groups * self.width, bias_attr=False)
        self.v_proj = nn.Linear(width, self.groups * self.width, bias_attr=False)
        self.o_proj = nn.Linear(self.heads * self.width, width, bias_attr=False)

    def forward(self, hidden, rotation, mask, flash, cache: Optional[KVCache] = None, index: int = 0, last=None):
        """hidden [B, T, D] -> [B, T, D]; with a cache the T tokens follow what it holds. ``last``: see :meth:`_read_last`."""
        batch, tokens, _ = hidden.shape
        if last is not None:
            return self._read_last(hidden, rotation, last, cache, index)
        if cache is not None and tokens == 1:
            return self._read_one(hidden, rotation, mask, cache, index)

        def split(x, heads):
            return x.reshape([batch, tokens, heads, self.width]).transpose([0, 2, 1, 3])

        query = rotate(split(project(self.q_proj, hidden), self.heads), rotation)
        key = rotate(split(project(self.k_proj, hidden), self.groups), rotation)
        value = split(project(self.v_proj, hidden), self.groups)
        if cache is not None:
            cache.write(index, key, value)
            if cache.length:
                stop = cache.length + tokens
                key, value = cache.keys[index][:, :, :stop], cache.values[index][:, :, :stop]
        context = attend(query, key, value, mask=mask, flash=flash)
        return project(self.o_proj, context.transpose([0, 2, 1, 3]).reshape([batch, tokens, self.heads * self.width]))

    def _read_one(self, hidden, tables, bias, cache, index):
        """One token of each row, in as few operations as there are: a step is bound by them and by memory.

        tables are :meth:`Rotation.of_one_token`; bias is [B, G, H/G, C]. The query sees the whole buffer of
        the cache, where the bias masks what doesn't count, so no key is sliced or copied.
        """
        batch, heads, groups, width = hidden.shape[0], self.heads, self.groups, self.width
        both = paddle.concat([project(self.q_proj, hidden), project(self.k_proj, hidden)], axis=-1)
        both = turn(both.reshape([batch, heads + groups, 1, width]), *tables)
        value = project(self.v_proj, hidden).reshape([batch, groups, 1, width])
        cache.write(index, both[:, heads:], value)
        return self._look_up(both[:, :heads], bias, cache, index)

    def _read_last(self, hidden, rotation, last, cache, index):
        """hidden [B, T, D] -> [B, 1, D]: T tokens go into the cache, and only the last one looks at what it holds.

        last: tables of the last token's queries, and bias [B, G, H/G, C].
        """
        batch, tokens, _ = hidden.shape
        key, value = (
            project(layer, hidden).reshape([batch, tokens, self.groups, self.width]).transpose([0, 2, 1, 3])
            for layer in (self.k_proj, self.v_proj)
        )
        cache.write(index, rotate(key, rotation), value)
        query = project(self.q_proj, hidden[:, -1:]).reshape([batch, self.heads, 1, self.width])
        cos, sin, bias = last
        return self._look_up(turn(query, cos, sin), bias, cache, index)

    def _look_up(self, query, bias, cache, index):
        """query [B, H, 1, K], turned and scaled, over the whole buffer of the cache -> [B, 1, D]."""
        batch = query.shape[0]
        query = query.reshape([batch, self.groups, self.heads // self.groups, self.width])
        scores = paddle.matmul(query, cache.keys[index], transpose_y=True) + bias
        context = paddle.matmul(F.softmax(scores, axis=-1), cache.values[index])
        return project(self.o_proj, context.reshape([batch, 1, self.heads * self.width]))


class LlamaMLP(nn.Layer):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias_attr=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias_attr=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias_attr=False)

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        return project(self.down_proj, project_swiglu(self.gate_proj, self.up_proj, hidden))


class LlamaDecoderLayer(nn.Layer):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden, rotation, mask, flash, cache: Optional[KVCache] = None, index: int = 0, last=None):
        """hidden [B, T, D] -> [B, T, D]; [B, 1, D], what is there for the last token, with ``last``."""
        context = self.self_attn(self.input_layernorm(hidden), rotation, mask, flash, cache, index, last)
        hidden = (hidden if last is None else hidden[:, -1:]) + context
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class LlamaDecoder(nn.Layer):
    """Token embeddings, the layers and the last norm; embeddings [B, T, D] to hidden states [B, T, D]."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.LayerList([LlamaDecoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config)
        self.enable_recompute = False  # PretrainedModel.recompute_enable() sets it

    def forward(
        self,
        inputs_embeds: paddle.Tensor,
        attention_mask: Optional[paddle.Tensor] = None,
        position_ids: Optional[paddle.Tensor] = None,
        segment_ids: Optional[paddle.Tensor] = None,
        cache: Optional[KVCache] = None,
        last_only: bool = False,
    ) -> paddle.Tensor:
        """Reads T tokens.

        Args:
            inputs_embeds: [B, T, D].
            attention_mask: [B, T], 0 at padding (either side); None when there is none.
            position_ids: [B, T]; by default the number of real tokens before each one in its row.
            segment_ids: [B, T], for packed rows: a token sees only its own segment. Not with a cache.
            cache: the T tokens follow what it holds, and are added to it.
            last_only: whether the last token's hidden state is enough; counts with a cache.

        Returns:
            hidden states [B, T, D] after the last norm; rows at padding hold no meaning. [B, 1, D] with ``last_only`` and a
            cache.
        """
        batch, tokens, _ = inputs_embeds.shape
        if attention_mask is not None and bool((attention_mask != 0).all()):
            attention_mask = None
        if attention_mask is not None and segment_ids is not None:  # padding is a segment of its own
            segment_ids = paddle.where(attention_mask != 0, segment_ids, paddle.full_like(segment_ids, -1))
        past = cache.length if cache is not None else 0
        if cache is not None and tokens > 1:
            cache.host_passes = None  # the model may have changed since the last pass
        after = cache.positions if cache is not None else None
        if position_ids is None:
            position_ids, longest, after = self.next_positions(batch, tokens, attention_mask, cache)
        else:
            longest = int(position_ids.max()) + 1
        rotation = Rotation(*self.rotary(position_ids, longest, inputs_embeds.dtype))
        bias = self._bias(attention_mask if segment_ids is None else None, cache, tokens, inputs_embeds.dtype)
        if cache is not None and tokens == 1:
            rotation, mask = self._for_one_token(rotation, batch, cache)
        else:
            mask = AttentionMask(causal=True, bias=bias, segment_ids=segment_ids)
        flash = bool(self.config.use_flash_attention) and paddle.device.get_device().startswith("gpu") and tokens > 1

        last = None
        if last_only and cache is not None and tokens > 1:
            tables = rotation.of_one_token(batch, self.config.num_attention_heads, 0)
            last = (*tables, self._open_bias(cache))
        hidden = inputs_embeds
        for index, layer in enumerate(self.layers):
            if self.enable_recompute and self.training and not hidden.stop_gradient:
                from paddle.distributed.fleet.utils import recompute

                hidden = recompute(layer, hidden, rotation, mask, flash)
            else:
                # of the last layer, most is needed for the last token only
                only = last if index == len(self.layers) - 1 else None
                hidden = layer(hidden, rotation, mask, flash, cache, index, only)
        if cache is not None:  # only now: a pass that is interrupted leaves what was held
            cache.length, cache.positions = past + tokens, after
        return self.norm(hidden)

    def _for_one_token(self, rotation: Rotation, batch: int, cache: KVCache):
        """Tables and bias in the full shape of what they meet in each layer, which broadcasting is slower than."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        return rotation.of_one_token(batch, heads, groups), self._open_bias(cache)

    def _open_bias(self, cache: KVCache) -> paddle.Tensor:
        """[B, G, H/G, C]: what one query for each head must not see of the cache's buffer."""
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        return cache.bias.unsqueeze([1, 2]).tile([1, groups, heads // groups, 1])

    def next_positions(self, batch, tokens, attention_mask, cache):
        """[B, T] positions that padding doesn't count in, the highest plus one, and the cache's ``positions`` after them."""
        past = cache.length if cache is not None else 0
        if attention_mask is None and (cache is None or cache.positions is None):
            return paddle.arange(past, past + tokens).unsqueeze(0).expand([batch, tokens]), past + tokens, None
        real = paddle.ones([batch, tokens], "int64") if attention_mask is None else attention_mask.astype("int64")
        start = past if cache is None or cache.positions is None else cache.positions
        ends = real.cumsum(axis=1) + start
        # as far as the tables reach; only scaling by length has to know it exactly, for which the host waits
        longest = max(int(ends.max()), 1) if self.rotary.kind == "dynamic" else past + tokens
        return (ends - 1).clip(min=0), longest, ends[:, -1:]

    def _bias(self, attention_mask, cache, tokens, dtype):
        """Additive [B, 1, 1, S] of what padding forbids, in the cache too, where there is room after this; None for nothing."""
        hidden = None if attention_mask is None else (1 - attention_mask.astype(dtype)) * masked_score(dtype)
        if cache is None:
            return None if hidden is None else hidden.unsqueeze([1, 2])
        stop = cache.open(tokens, hidden)
        # with neither padding now nor earlier there is nothing to forbid but the future
        if attention_mask is None and cache.positions is None:
            return None
        return cache.bias[:, :stop].unsqueeze([1, 2])
