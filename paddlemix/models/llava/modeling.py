"""LlavaLlamaForCausalLM: a CLIP tower and a projector feed a LLaMA decoder (Liu et al., 2023a, 2023b).

    pixel_values [N, 3, H, W] -> image_features [N, P, D] -> inputs_embeds [B, T, D] -> hidden [B, T, D] -> logits [B, T, V]

Shapes: B batch, T tokens, N tiles, M pictures, P patches, D width, V vocabulary, H/W pixels.
"""

import contextlib
import logging
from pathlib import Path
from typing import Any, Iterable, List, Optional, Tuple, Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.errors import UserError, folder_to_write, refuse_unbuilt
from paddlemix.lazy_paddlenlp import PretrainedModel
from paddlemix.models.llava.anyres import num_tiles, pack_image_features
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.decoder import KVCache, LlamaDecoder
from paddlemix.models.llava.generation import (
    GenerationSettings,
    Sampler,
    beam_search,
    decode_steps,
    default_generation_config,
    merged_settings,
    read_generation_config,
)
from paddlemix.models.llava.host_passes import HostPasses
from paddlemix.models.llava.lean import on_cpu, working_dtype
from paddlemix.models.llava.linear import project, project_back
from paddlemix.models.llava.merge import merge_image_features
from paddlemix.models.llava.projector import build_projector
from paddlemix.models.llava.vision_tower import CLIPVisionTower

__all__ = ["LlavaLlamaForCausalLM", "LlavaModel", "LlavaOutput"]

logger = logging.getLogger(__name__)


# Arguments that PaddleNLP's from_pretrained has, with the values that leave nothing to do here.
_ASKS_FOR_NOTHING = {
    "tensor_parallel_degree": (1, -1, None),
    "tensor_parallel_rank": (0, None),
    "tensor_parallel_output": (True, False, None),
    "low_cpu_mem_usage": (True, False),
    "convert_from_torch": (True, False, None),
    "ignore_mismatched_sizes": (False,),
    "from_aistudio": (False, None),
    "from_hf_hub": (False, None),
}
# and that the forwards of PaddleNLP and Hugging Face have
_FORWARD_ASKS_FOR_NOTHING = {
    "return_dict": (True,),
    "use_cache": (False,),
    "output_hidden_states": (False,),
    "output_attentions": (False,),
}


class LlavaOutput(tuple):
    """What a forward gives: (loss, logits) where labels were given, else (logits,), as PaddleNLP's models do.

    Attributes:
        loss: scalar, where labels were given.
        logits: [B, T, V], computed when first read: training needs them at the labelled positions only.
        hidden_states: [B, T, D] after the last norm.
        label_logits, label_ids: [K, V] and [K] at the K positions that were trained, where labels were given.

    Args:
        parts: loss and logits, or logits. For the logits a function that computes them will do.
    """

    def __new__(cls, parts: Iterable[Any], **named):
        return super().__new__(cls, parts)

    def __init__(self, parts, *, hidden_states=None, label_logits=None, label_ids=None):
        self._logits = None
        self.hidden_states, self.label_logits, self.label_ids = hidden_states, label_logits, label_ids

    @property
    def loss(self) -> Optional[paddle.Tensor]:
        return None if len(self) == 1 else super().__getitem__(0)

    @property
    def logits(self) -> paddle.Tensor:
        if self._logits is None:
            last = super().__getitem__(-1)
            self._logits = last if isinstance(last, paddle.Tensor) else last()
        return self._logits

    def _read(self, part):
        return part if isinstance(part, paddle.Tensor) else self.logits

    def __iter__(self):
        return map(self._read, super().__iter__())

    def __getitem__(self, index):
        """By place, or by name: ``output["loss"]``."""
        if isinstance(index, str):
            if index not in ("loss", "logits") or getattr(self, index) is None:
                raise KeyError(index)
            return getattr(self, index)
        found = super().__getitem__(index)
        return tuple(map(self._read, found)) if isinstance(index, slice) else self._read(found)


class LlavaModel(LlamaDecoder):
    """The decoder with the tower and the projector beside it, under the toolkit's names."""

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        if config.vision is not None:
            self.vision_tower = CLIPVisionTower(
                config.vision, config.mm_vision_select_layer, config.mm_vision_select_feature
            )
            self.mm_projector = build_projector(config)
            if "unpad" in config.mm_patch_merge_type:
                scale = nn.initializer.Normal(std=config.hidden_size**-0.5)
                self.image_newline = self.create_parameter([config.hidden_size], default_initializer=scale)


class LlavaLlamaForCausalLM(PretrainedModel):
    """The language model that sees.

    Example:

        model = LlavaLlamaForCausalLM.from_pretrained("paddlemix/llava/llava-v1.5-7b")
        processor = LlavaProcessor.from_pretrained("paddlemix/llava/llava-v1.5-7b")
        batch = processor(text="USER: <image>\\nWhat is this? ASSISTANT:", images=picture)
        ids, scores = model.generate(**batch, max_new_tokens=64)
    """

    config_class = LlavaConfig
    base_model_prefix = "llama"

    def __init__(self, config: LlavaConfig):
        super().__init__(config)
        self.generation_config = default_generation_config(config)
        self.llama = LlavaModel(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias_attr=False)

    def _init_weights(self, layer: nn.Layer) -> None:
        """PretrainedModel's hook: normal weights of ``initializer_range``, zero biases."""
        if isinstance(layer, (nn.Linear, nn.Embedding, nn.Conv2D)):
            layer.weight.set_value(paddle.normal(0.0, self.config.initializer_range, layer.weight.shape))
            if getattr(layer, "bias", None) is not None:
                layer.bias.set_value(paddle.zeros_like(layer.bias))

    def can_generate(self) -> bool:
        """PretrainedModel's hook: there is a ``generation_config``."""
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        return self.llama.embed_tokens

    def get_output_embeddings(self) -> Optional[nn.Layer]:
        return None if self.config.tie_word_embeddings else self.lm_head

    def resize_token_embeddings(self, new_num_tokens: Optional[int] = None) -> nn.Embedding:
        """Gives the vocabulary another size V; new rows and columns are drawn as in a new model, the old ones stay.

        Returns:
            the token embeddings [V, D].
        """
        old = self.config.vocab_size
        if new_num_tokens is None or new_num_tokens == old:
            return self.llama.embed_tokens
        if new_num_tokens < 1:
            raise UserError(f"new_num_tokens is {new_num_tokens}; expected at least 1.")
        tables = [(self.llama.embed_tokens, 0)]
        if not self.config.tie_word_embeddings:
            tables.append((self.lm_head, 1))
        for layer, axis in tables:
            values, shape = layer.weight.detach().astype("float32"), list(layer.weight.shape)
            if new_num_tokens > old:
                shape[axis] = new_num_tokens - old
                fresh = paddle.normal(0.0, self.config.initializer_range, shape)
                values = paddle.concat([values, fresh], axis=axis)
            else:
                values = paddle.slice(values, [axis], [0], [new_num_tokens])
            weight = layer.create_parameter(values.shape, dtype=layer.weight.dtype)
            weight.set_value(values.astype(weight.dtype))
            weight.stop_gradient = layer.weight.stop_gradient
            layer.weight = weight
        self.config.vocab_size = new_num_tokens
        return self.llama.embed_tokens

    # reading and writing

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Union[str, Path],
        *,
        config: Optional[LlavaConfig] = None,
        dtype=None,
        lora_path: Union[str, Path, None] = None,
        **kwargs,
    ) -> "LlavaLlamaForCausalLM":
        """Opens any layout of interface section 4: a folder, or a name that is downloaded.

        Args:
            config: replaces the checkpoint's; its sizes must fit the weights.
            dtype: float32, float16 or bfloat16; default: the checkpoint's on a GPU, float32 on a CPU. There bfloat16 takes
                half of the memory, and less time on processors that multiply in it (AVX512_BF16); it can't
                learn. float16 can be opened and saved.
            lora_path: a LoRA adapter, this project's, PaddleNLP's or PEFT's, that is merged into the weights.
            kwargs: what PaddleNLP's callers pass though it asks for nothing here, such as ``tensor_parallel_degree=1``.

        Raises:
            UserError: unknown name, half a checkpoint, a tensor that is missing, unexpected or wrongly shaped.
        """
        from paddlemix.models.llava import checkpoint

        for name, value in kwargs.items():
            if name not in _ASKS_FOR_NOTHING or value not in _ASKS_FOR_NOTHING[name]:
                raise UserError(
                    f"from_pretrained() can't honour {name}={value!r}; it takes config, dtype and lora_path. Other choices stand in the "
                    "checkpoint's config.json."
                )
        folder = checkpoint.resolve(pretrained_model_name_or_path)
        adapter = None if lora_path is None else checkpoint.resolve(lora_path)
        config = config or checkpoint.read_config(folder, adapter)
        if dtype is None:
            dtype = config.dtype if paddle.device.get_device().startswith("gpu") else "float32"
        dtype = str(dtype).replace("paddle.", "")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"dtype is {dtype!r}; expected float32, float16 or bfloat16.")
        config.dtype = dtype
        with checkpoint.no_init(dtype):
            model = cls(config)
        model.generation_config = read_generation_config(folder, config)
        checkpoint.load_weights(model, folder, dtype, adapter=adapter)
        model.eval()
        return model

    def save_pretrained(self, save_dir: Union[str, Path], *, state_dict=None, max_shard_size="5GB", **kwargs) -> None:
        """Writes config.json, generation_config.json and safetensors (sharded above ``max_shard_size``).

        Raises:
            UserError: ``save_dir`` is a file or can't be made, or PaddleNLP's LoRAModel has left its adapters in the model.
        """
        from paddlemix.models.llava import checkpoint

        self.config.validate()
        checkpoint.save_model(self, folder_to_write(save_dir), state_dict=state_dict, max_shard_size=max_shard_size)

    # the flow

    def encode_images(
        self, pixel_values: paddle.Tensor, image_sizes: Optional[paddle.Tensor] = None
    ) -> List[paddle.Tensor]:
        """Pictures to features that stand in the prompt.

        Args:
            pixel_values: [N, 3, H, W], all tiles of all pictures, in order.
            image_sizes: [M, 2], width and height in pixels; needed where pictures are cut into tiles or unpadded,
                else every tile is a picture.

        Returns:
            M tensors [K_i, D].
        """
        config = self.config
        side = None if config.vision is None else config.vision.image_size
        if config.vision is None:
            raise UserError("this checkpoint has no vision tower, so it can't take pictures; leave images out.")
        if list(pixel_values.shape[1:]) != [3, side, side]:
            raise UserError(
                f"pixel_values has the shape {list(pixel_values.shape)}; expected [N, 3, {side}, {side}], as this "
                "checkpoint's LlavaProcessor gives."
            )
        if image_sizes is None:
            if config.image_aspect_ratio == "anyres":
                raise UserError(
                    "image_sizes is missing; an anyres model needs [M, 2] (width, height) beside pixel_values."
                )
            sizes = [(side, side)] * pixel_values.shape[0]
        else:
            rows = image_sizes.tolist() if hasattr(image_sizes, "tolist") else image_sizes
            sizes = [(int(width), int(height)) for width, height in rows]
        tiles = [num_tiles(size, config) for size in sizes]
        if sum(tiles) != pixel_values.shape[0]:
            raise UserError(
                f"pixel_values holds {pixel_values.shape[0]} tiles, but the {len(sizes)} picture(s) of image_sizes "
                f"need {sum(tiles)}."
            )
        working = working_dtype(self.llama.embed_tokens.weight)
        features = self.llama.vision_tower(pixel_values.astype(working))
        features = project(self.llama.mm_projector, features)  # [N, P, D]
        newline = getattr(self.llama, "image_newline", None)
        newline = None if newline is None else newline.astype(working)
        packed, start = [], 0
        for size, count in zip(sizes, tiles):
            packed.append(pack_image_features(features[start : start + count], size, config, newline))
            start += count
        return packed

    def embed(self, input_ids: paddle.Tensor, image_features: Optional[List[paddle.Tensor]] = None) -> paddle.Tensor:
        """[B, T] ids and the features of their placeholders -> inputs_embeds [B, T, D]."""
        text_ids = paddle.where(input_ids == IMAGE_TOKEN_INDEX, paddle.zeros_like(input_ids), input_ids)
        return merge_image_features(self._embed_text(text_ids), input_ids, image_features)

    def _embed_text(self, ids: paddle.Tensor) -> paddle.Tensor:
        return self._in_working_dtype(self.llama.embed_tokens(ids))

    def _in_working_dtype(self, embeddings: paddle.Tensor) -> paddle.Tensor:
        working = working_dtype(self.llama.embed_tokens.weight)
        return embeddings if embeddings.dtype == working else embeddings.astype(working)

    def lm_logits(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """hidden [..., D] -> logits [..., V]"""
        if self.config.tie_word_embeddings:
            return project_back(self.llama.embed_tokens, hidden)
        return project(self.lm_head, hidden)

    def forward(
        self,
        input_ids: Optional[paddle.Tensor] = None,
        attention_mask: Optional[paddle.Tensor] = None,
        pixel_values: Optional[paddle.Tensor] = None,
        image_sizes: Optional[paddle.Tensor] = None,
        labels: Optional[paddle.Tensor] = None,
        position_ids: Optional[paddle.Tensor] = None,
        segment_ids: Optional[paddle.Tensor] = None,
        inputs_embeds: Optional[paddle.Tensor] = None,
        loss_reduction: str = "mean",
        **asked,
    ) -> LlavaOutput:
        """One pass over whole sequences.

        Args:
            input_ids: [B, T]; IMAGE_TOKEN_INDEX wherever an image feature stands.
            attention_mask: [B, T], 0 at padding on either side.
            pixel_values: [N, 3, H, W], all tiles of all pictures of all rows, in order; None for text only.
            image_sizes: [M, 2], width and height.
            labels: [B, T], IGNORE_INDEX where nothing is trained, nor at placeholders; position t is predicted from t - 1.
            position_ids, segment_ids: [B, T] of packed rows; a token sees its own segment only.
            inputs_embeds: [B, T, D] in place of input_ids and pixel_values.
            loss_reduction: ``mean`` over the labelled tokens of this call, or their ``sum``.
            asked: what callers of other models pass though it asks for nothing here, such as ``return_dict=True``.

        Raises:
            UserError: shapes that don't fit together, or something else that is asked for.
        """
        given = "a forward gives loss, logits and the last hidden_states, and takes whole sequences."
        refuse_unbuilt("A forward", asked, _FORWARD_ASKS_FOR_NOTHING, given)
        input_ids, attention_mask = _tensor("input_ids", input_ids), _tensor("attention_mask", attention_mask)
        pixel_values, labels = _tensor("pixel_values", pixel_values), _tensor("labels", labels)
        position_ids, segment_ids = _tensor("position_ids", position_ids), _tensor("segment_ids", segment_ids)
        inputs_embeds = _tensor("inputs_embeds", inputs_embeds)
        beside = {"labels": labels, "position_ids": position_ids, "segment_ids": segment_ids}
        if inputs_embeds is None:
            self._check_prompts(input_ids, attention_mask)
        elif input_ids is not None or pixel_values is not None:
            raise UserError("inputs_embeds stands in place of input_ids and pixel_values; leave it or them out.")
        else:
            beside["attention_mask"] = attention_mask
        shape = list((input_ids if inputs_embeds is None else inputs_embeds).shape[:2])
        for name, given in beside.items():
            if given is not None and list(given.shape) != shape:
                raise UserError(f"{name} has the shape {list(given.shape)}; expected {shape}, as the prompts have.")
        # on a CPU weights in bfloat16 can't learn, so a pass without labels isn't for learning either
        fixed = labels is None and self.llama.embed_tokens.weight.dtype == paddle.bfloat16 and on_cpu()
        with paddle.no_grad() if fixed else contextlib.nullcontext():
            if inputs_embeds is None:
                features = self.encode_images(pixel_values, image_sizes) if pixel_values is not None else None
                inputs_embeds = self.embed(input_ids, features)
            inputs_embeds = self._in_working_dtype(inputs_embeds)
            hidden = self.llama(inputs_embeds, attention_mask, position_ids, segment_ids)

        def logits() -> paddle.Tensor:
            with paddle.no_grad() if fixed else contextlib.nullcontext():
                return self.lm_logits(hidden)

        if labels is None:
            return LlavaOutput([logits], hidden_states=hidden)
        targets = labels[:, 1:].flatten()
        places = paddle.nonzero((targets != IGNORE_INDEX) & (targets != IMAGE_TOKEN_INDEX)).flatten()
        if places.shape[0] == 0:
            # 0 of a graph that holds the same parameters as any other batch's, which sharded training needs
            nothing = self.lm_logits(hidden[:, :1]).astype("float32").sum() * 0.0
            return LlavaOutput([nothing, logits], hidden_states=hidden)
        chosen = paddle.gather(hidden[:, :-1].flatten(0, 1), places)
        label_ids = paddle.gather(targets, places)
        self._check_ids("labels", label_ids)
        label_logits = self.lm_logits(chosen)
        loss = F.cross_entropy(label_logits.astype("float32"), label_ids, reduction=loss_reduction)
        return LlavaOutput([loss, logits], hidden_states=hidden, label_logits=label_logits, label_ids=label_ids)

    def _check_prompts(
        self, input_ids: paddle.Tensor, attention_mask: Optional[paddle.Tensor], new_tokens: int = 0
    ) -> None:
        if not hasattr(input_ids, "shape"):
            raise UserError(f"input_ids is {input_ids!r:.100}; expected a tensor [B, T] of token ids.")
        if len(input_ids.shape) != 2 or input_ids.size == 0:
            raise UserError(
                f"input_ids has the shape {list(input_ids.shape)}; expected [B, T], with at least one token."
            )
        if attention_mask is not None and list(attention_mask.shape) != list(input_ids.shape):
            raise UserError(
                f"attention_mask has the shape {list(attention_mask.shape)}, but input_ids {list(input_ids.shape)}; "
                "expected the same."
            )
        self._check_ids("input_ids", input_ids, placeholder=IMAGE_TOKEN_INDEX)
        tokens, window = input_ids.shape[1], self.config.sliding_window
        if window is not None and tokens + new_tokens > window:
            answer = f" and up to {new_tokens} new ones (max_new_tokens)" if new_tokens else ""
            raise UserError(
                f"the prompt has {tokens} tokens{answer}, but this model attends to a sliding window of {window}, beyond "
                "which it can't be computed here; ask for less."
            )

    def _check_ids(self, name: str, ids: paddle.Tensor, placeholder: int = 0) -> None:
        """Refuses ids outside the vocabulary, on a CPU; on a GPU asking would hold up every step, and its kernels say so."""
        if not on_cpu():
            return
        values, size = ids.numpy(), self.config.vocab_size
        wrong = values[((values < 0) | (values >= size)) & (values != placeholder)]
        if wrong.size:
            raise UserError(
                f"{name} has the id {wrong[0]}, but the model's vocabulary has {size}; expected 0 to {size - 1}."
            )

    # generation

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` tokens of ``batch_size`` rows."""
        return KVCache(self.config, batch_size, capacity, working_dtype(self.llama.embed_tokens.weight))

    @paddle.no_grad()
    def prefill(
        self, inputs_embeds: paddle.Tensor, cache: KVCache, attention_mask: Optional[paddle.Tensor] = None
    ) -> paddle.Tensor:
        """Reads [B, T, D] into the cache; logits [B, V] after the last token."""
        inputs_embeds = self._in_working_dtype(inputs_embeds)
        cache.host_passes = None  # the model may have changed since the last pass
        batch, tokens, width = inputs_embeds.shape
        simple = attention_mask is None and inputs_embeds.dtype == paddle.float32
        if simple and (batch, width) == (cache.batch_size, self.config.hidden_size):
            on_host = HostPasses.of(self, cache, tokens)
            if on_host is not None:
                return paddle.to_tensor(on_host.read(inputs_embeds.numpy(), cache))
        return self._prefill(inputs_embeds, cache, attention_mask)

    def _prefill(self, inputs_embeds, cache, attention_mask=None):
        return self.lm_logits(self.llama(inputs_embeds, attention_mask, cache=cache, last_only=True)[:, -1])

    @paddle.no_grad()
    def step(self, ids: paddle.Tensor, cache: KVCache) -> paddle.Tensor:
        """Reads one token [B, 1] into the cache; logits [B, V] after it."""
        on_host = HostPasses.of(self, cache, 1)
        if on_host is not None:
            return paddle.to_tensor(on_host.step(ids.numpy()[:, 0], cache))
        return self._prefill(self._embed_text(ids), cache)

    @paddle.no_grad()
    def generate(
        self,
        input_ids: paddle.Tensor,
        attention_mask: Optional[paddle.Tensor] = None,
        pixel_values: Optional[paddle.Tensor] = None,
        image_sizes: Optional[paddle.Tensor] = None,
        generation_config=None,
        streamer=None,
        cache: Optional[KVCache] = None,
        **kwargs,
    ) -> Tuple[paddle.Tensor, paddle.Tensor]:
        """Continues prompts; PaddleNLP's convention.

        Args:
            input_ids, attention_mask, pixel_values, image_sizes: a batch from the processor; padding on the left. Without a
                mask, pad ids at the beginning of a row are padding, unless they begin or end a text.
            generation_config: PaddleNLP's or a dict, also in the second place; default the model's own, from the checkpoint's
                generation_config.json or with PaddleNLP's defaults (greedy, 20 tokens; sampling among the 50 likeliest).
            streamer: PaddleNLP's TextStreamer, for a batch of one; not with beam search.
            cache: what the prompts follow, one row each; with room for them and what is new. It is used up.
            kwargs: fields of :class:`GenerationSettings`, and ``eos_token_id`` (one or a list).

        Returns:
            ids [B * num_return_sequences, L], the new ones only, the end token included and then padded; and scores
            [B * num_return_sequences, 1]: the mean log-probability of a row's tokens (beam search: the beam's score).
        """
        input_ids, attention_mask = _tensor("input_ids", input_ids), _tensor("attention_mask", attention_mask)
        pixel_values = _tensor("pixel_values", pixel_values)
        if attention_mask is not None and not isinstance(attention_mask, paddle.Tensor):
            generation_config, attention_mask = attention_mask, None
        if isinstance(generation_config, dict):
            generation_config, kwargs = None, merged_settings(generation_config, kwargs)
        settings = GenerationSettings.build(self.config, generation_config or self.generation_config, kwargs)
        if streamer is not None and settings.decode_strategy == "beam_search":
            raise UserError("a streamer can't follow beam_search, which changes its mind; leave one of them out.")
        self._check_prompts(input_ids, attention_mask, settings.max_new_tokens)
        if attention_mask is None and cache is None:
            attention_mask = self._mask_of_padding(input_ids, settings)
        if attention_mask is not None and not bool((attention_mask[:, -1] != 0).all()):
            empty = np.flatnonzero((attention_mask.numpy() == 0).all(axis=1))
            if empty.size:
                raise UserError(
                    f"prompt {empty[0] + 1} is empty: its attention_mask is 0 everywhere; leave the row out."
                )
            raise UserError("the prompts are padded on the right; pad on the left to generate (LlavaProcessor does).")
        training = self.training
        self.eval()
        try:
            # padding is no part of a prompt, so no token of it is penalised as a repetition
            rows = input_ids.numpy()
            counted = np.ones_like(rows) if attention_mask is None else attention_mask.numpy()
            prompts = [ids[(ids >= 0) & (counts != 0)].tolist() for ids, counts in zip(rows, counted)]
            draws = settings.num_return_sequences if settings.decode_strategy == "sampling" else 1
            features = self.encode_images(pixel_values, image_sizes) if pixel_values is not None else None
            inputs_embeds = self.embed(input_ids, features)
            if cache is None:
                cache = self.new_cache(len(prompts), inputs_embeds.shape[1] + settings.max_new_tokens)
            elif cache.batch_size != len(prompts):
                raise UserError(f"the cache holds {cache.batch_size} row(s), but there are {len(prompts)} prompt(s).")
            logits = self.prefill(inputs_embeds, cache, attention_mask)
            if settings.decode_strategy == "beam_search":
                rows, scores = beam_search(self, cache, logits, settings, prompts)
            else:
                if draws > 1:
                    order = paddle.arange(len(prompts)).repeat_interleave(draws)
                    cache.reorder(order)
                    logits = paddle.index_select(logits, order, axis=0)
                    prompts = [ids for ids in prompts for _ in range(draws)]
                rows, scores = self._collect(cache, logits, settings, prompts, streamer)
        finally:
            if training:
                self.train()
        longest = max(len(row) for row in rows)
        padded = [row + [settings.pad_token_id] * (longest - len(row)) for row in rows]
        return paddle.to_tensor(padded, dtype="int64"), paddle.to_tensor(scores, dtype="float32").unsqueeze(1)

    def _mask_of_padding(self, input_ids, settings) -> Optional[paddle.Tensor]:
        """[B, T] of rows that begin with pad ids, as PaddleNLP's generate makes it; None where none does."""
        pad = settings.pad_token_id
        if pad == self.config.bos_token_id or pad in settings.eos_token_ids:
            return None
        leading = np.logical_and.accumulate(input_ids.numpy() == pad, axis=1)
        leading[leading.all(axis=1)] = False  # no prompt is nothing but padding
        return paddle.to_tensor(1 - leading.astype(np.int64)) if leading.any() else None

    def _collect(self, cache, logits, settings, prompts, streamer):
        """Runs decode_steps to its end: the ids of each row up to its end token, and their mean log-probability."""
        rows, totals = [[] for _ in prompts], [0.0] * len(prompts)
        ended = [False] * len(prompts)
        sampler = Sampler(settings)
        for ids, log_probs in decode_steps(self, cache, logits, sampler, prompts, settings.max_new_tokens):
            for row, (token, log_prob) in enumerate(zip(ids, log_probs)):
                if not ended[row]:
                    rows[row].append(int(token))
                    totals[row] += float(log_prob)
                    ended[row] = int(token) in settings.eos_token_ids
            if streamer is not None:
                streamer.put(paddle.to_tensor(ids).reshape([-1, 1]))  # one column, as PaddleNLP's generate puts them
        if streamer is not None:
            streamer.end()
        return rows, [total / len(row) for total, row in zip(totals, rows)]


def _tensor(name: str, values: Any) -> Any:
    """Lists and NumPy's arrays as tensors; anything else as it is."""
    if not isinstance(values, (list, tuple, np.ndarray)):
        return values
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "iufb":
        raise UserError(f"{name} holds no numbers, or rows of different lengths; expected a tensor.")
    floats = array.dtype.kind == "f"
    return paddle.to_tensor(array.astype("float32" if floats else "int64"))
