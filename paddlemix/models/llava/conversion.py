"""Weights and config of a checkpoint from one published layout to another, tensor by tensor."""

import logging
import math
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional

import numpy as np
import paddle

from paddlemix.errors import UserError
from paddlemix.models.llava import checkpoint, layouts, published_configs
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.tensor_files import (
    MemoryTensor,
    Source,
    StoredTensor,
    TensorSpec,
    convert,
    fill,
    numpy_dtype,
    write_json,
    write_weights,
)
from paddlemix.models.llava.vision_tower import num_tower_layers

__all__ = ["ImageToken", "Plan", "open_plan"]

logger = logging.getLogger(__name__)

_EMBEDDINGS = "llama.embed_tokens.weight"
_VOCABULARY_MULTIPLE = 64  # to which transformers' converter of LLaVA rounds the vocabulary up


class ImageToken(NamedTuple):
    """Ids that transformers' processor needs in the vocabulary."""

    image: int
    pad: int


class _ParameterTensor(StoredTensor):
    """A parameter of an open model as a stored tensor."""

    def __init__(self, parameter: paddle.Tensor):
        self.parameter = parameter
        self.dtype = str(parameter.dtype).replace("paddle.", "")
        self.shape = tuple(parameter.shape)

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[...] = self.parameter.numpy().reshape(-1)[start : start + out.size]


class _Output(NamedTuple):
    """One tensor to write: our name, where it comes from, its dtype and shape, and whether its axes are not ours."""

    ours: str
    source: Source
    spec: TensorSpec
    transposed: bool


class Plan:
    """What will be written; nothing is until :meth:`write`.

    Args:
        config: the checkpoint's.
        sources: our name -> where it is.
        layout: ``toolkit``, ``original`` or ``huggingface``; for a decoder alone the last two are plain LLaMA's.
        dtype: of all weights.
        image_token: for ``huggingface``: ids past the vocabulary make it grow.

    Raises:
        UserError: a choice of the model that the layout can't say.
    """

    def __init__(
        self,
        config: LlavaConfig,
        sources: Mapping[str, Source],
        layout: str,
        dtype: str,
        image_token: Optional[ImageToken] = None,
    ):
        self.config, self.layout, self.dtype = config, layout, dtype
        sources = dict(sources)
        if config.vision is not None:
            _fit_tower_to_weights(config, sources)
        rows = config.vocab_size
        if image_token is not None and max(image_token) >= rows:
            rows = math.ceil((max(image_token) + 1) / _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        config.vocab_size, config.dtype = rows, dtype
        self.config_values = self._config_values(image_token)  # says what can't be said
        names = "original" if config.vision is None and layout == "huggingface" else layout

        self.outputs: Dict[str, _Output] = {}
        for ours, source in sources.items():
            if ours == layouts.HEAD and config.tie_word_embeddings:
                continue
            shape = list(source.shape)
            if ours in (_EMBEDDINGS, layouts.HEAD):
                shape[_vocabulary_axis(ours)] = rows
            place = layouts.published_name(ours, names)
            spec = TensorSpec(dtype, tuple(shape[::-1] if place.transpose else shape))
            self.outputs[str(place.name)] = _Output(ours, source, spec, place.transpose)
        ends = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if image_token is not None:
            ends["pad_token_id"] = image_token.pad
        self.generation_values = {key: value for key, value in ends.items() if value is not None}

    def _config_values(self, image_token: Optional[ImageToken]) -> Optional[Dict[str, Any]]:
        """config.json; None where it is our own config that is saved."""
        config = self.config
        if self.layout == "original":
            return published_configs.write_flat(config, self.dtype)
        if self.layout == "huggingface":
            return published_configs.write_nested(config, self.dtype, *(image_token or ImageToken(0, 0)))
        config.architectures = ["LlavaLlamaForCausalLM"]
        if config.vision is not None:
            config.mm_vision_tower = published_configs.tower_name(config)
        return None

    @property
    def nbytes(self) -> int:
        return sum(output.spec.nbytes for output in self.outputs.values())

    def write(
        self,
        folder: Path,
        max_shard_bytes: int = 5 * 10**9,
        advance: Callable[[int], Any] = lambda nbytes: None,
    ) -> None:
        """Writes weights (safetensors), generation_config.json and config.json into an existing folder.

        Args:
            advance: told the bytes of every tensor, for a progress bar.
        """

        def read(name: str) -> np.ndarray:
            output = self.outputs[name]
            advance(output.spec.nbytes)
            if output.spec.size != output.source.tensor.size:
                return _grown(output)
            values = np.empty(output.spec.shape, numpy_dtype(output.spec.dtype))
            fill(values, output.spec.dtype, output.source.tensor, output.source.transpose != output.transposed)
            return values

        specs = {name: output.spec for name, output in self.outputs.items()}
        write_weights(folder, specs, read, max_shard_bytes, framework="np" if self.layout == "toolkit" else "pt")
        write_json(folder / "generation_config.json", self.generation_values)
        if self.config_values is None:
            self.config.save_pretrained(str(folder))
        else:
            write_json(folder / "config.json", self.config_values)


def _vocabulary_axis(ours: str) -> int:
    return 0 if ours == _EMBEDDINGS else 1  # embeddings [V, D], head [D, V]


def _fit_tower_to_weights(config: LlavaConfig, sources: Dict[str, Source]) -> None:
    """A tower that was saved here lacks the layers after the selected one, and the last norm, as LLaVA never uses them.

    The config then says that there are no more layers, and the norm becomes one that changes nothing, for readers that
    build a whole CLIP.
    """
    prefix = layouts.TOWER + "transformer.layers."
    numbers = [int(name[len(prefix) :].split(".")[0]) for name in sources if name.startswith(prefix)]
    kept = 1 + max(numbers, default=-1)
    selected = num_tower_layers(config.vision, config.mm_vision_select_layer)
    config.vision_config = {**(config.vision_config or {}), "num_hidden_layers": kept}
    config.mm_vision_select_layer = selected - kept - 1
    for kind, value in (("weight", 1.0), ("bias", 0.0)):
        name = f"{layouts.TOWER}ln_post.{kind}"
        if name not in sources:
            tensor = MemoryTensor(np.full((config.vision_config["hidden_size"],), value, np.float32))
            sources[name] = Source(tensor, name, False)


def _grown(output: _Output) -> np.ndarray:
    """Embeddings or head with rows for more tokens: the mean of the others, whose logit is never the highest."""
    source, axis = output.source, _vocabulary_axis(output.ours)
    values = convert(source.tensor.read(), source.tensor.dtype, "float32")
    values = values.T if source.transpose else values
    rows = output.spec.shape[::-1][axis] if output.transposed else output.spec.shape[axis]
    mean = values.mean(axis=axis, keepdims=True, dtype=np.float64).astype(np.float32)
    values = np.concatenate([values, np.repeat(mean, rows - values.shape[axis], axis=axis)], axis=axis)
    return convert(np.ascontiguousarray(values.T if output.transposed else values), "float32", output.spec.dtype)


def open_plan(
    folder: Path,
    layout: str,
    dtype: Optional[str] = None,
    image_token: Optional[ImageToken] = None,
) -> Plan:
    """Opens a checkpoint of any layout, holds it against its config, and plans how to write it.

    Args:
        dtype: of the weights; None keeps the one that most of them have, with a warning where that rounds others.

    An adapter is merged into its base, in memory.

    Raises:
        UserError: half a checkpoint, one that doesn't fit its config, or one that the layout can't hold.
    """
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

    if layout not in layouts.LAYOUTS:
        raise UserError(f"layout is {layout!r}; expected one of {', '.join(layouts.LAYOUTS)}.")
    config = checkpoint.read_config(folder)
    with checkpoint.no_init():
        model = LlavaLlamaForCausalLM(config)
    parameters = dict(model.named_parameters())
    base = checkpoint.lora_base(folder)
    if base is not None:
        checkpoint.load_weights(model, folder)
        sources = {name: Source(_ParameterTensor(p), name, False) for name, p in parameters.items()}
    else:
        held = checkpoint.collect(folder, config)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        held.check(shapes, config, folder)
        sources = held.everything
        if layouts.NEWLINE not in parameters:
            sources.pop(layouts.NEWLINE, None)
    if dtype is None:
        dtype = checkpoint.stored_dtype(folder)
        exact = {dtype, "float16", "bfloat16"} if dtype == "float32" else {dtype}
        rounded = sorted({source.tensor.dtype for source in sources.values()} - exact)
        if rounded and base is None:
            logger.warning(
                "Most of %s is %s and some of it %s, which is rounded to %s; --dtype names another.",
                *(folder, dtype, " and ".join(rounded), dtype),
            )
    return Plan(config, sources, layout, dtype, image_token)
