"""What a run needs in memory, estimated before it starts, against what the device has."""

from typing import Dict, Optional

import paddle
from paddle import nn

from paddlemix.models.llava.attention import BLOCK
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.lean import on_cpu
from paddlemix.trainer.freezing import named_model_parameters

__all__ = ["available_memory", "estimate_memory", "format_bytes"]

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def estimate_memory(
    model: nn.Layer,
    config: LlavaConfig,
    *,
    rows: int,
    tokens: int,
    labelled: int,
    tiles: int = 0,
    recompute: bool = False,
    tower_trained: bool = False,
    master_weights: bool = False,
    float32_gradients: bool = False,
    compute_dtype: Optional[str] = None,
    lora_dropout: bool = False,
    shards: int = 1,
    sharding: str = "",
) -> Dict[str, int]:
    """Bytes on one device for weights, gradients, optimizer and activations.

    The first three are counted from the parameters. Activations are what the backward pass keeps of one micro-batch:
    per token and decoder layer 4 D + (3 H + 2 G) K + 3 F numbers, with LoRA's dropout 5/4 (6 D + F) more, on a CPU less
    2 D + H K + F; or with ``recompute`` the layers' inputs and one layer; the scores of one block of one layer, three times,
    unless attention is fused; and three times the labelled tokens' logits. test_memory.py holds this against the tensors
    that Paddle saves.

    Args:
        rows, tokens: of the longest micro-batch, [rows, tokens].
        labelled: supervised tokens in it.
        tiles: pictures' tiles in it.
        master_weights: the optimizer keeps float32 copies (level O2).
        float32_gradients: ``amp_master_grad``.
        compute_dtype: of activations; default that of the weights.
        lora_dropout: adapters with dropout are in the model.
        shards: devices that the run is split over, and ``sharding`` how: stage1, stage2 or empty.
    """
    weights = gradients = optimizer = 0
    dtype = "float32"
    for _, parameter in named_model_parameters(model):
        size = 1
        for side in parameter.shape:
            size *= side
        dtype = str(parameter.dtype).split(".")[-1]
        weights += size * _BYTES.get(dtype, 4)
        if not parameter.stop_gradient:
            gradients += size * (4 if float32_gradients else _BYTES.get(dtype, 4))
            optimizer += size * (12 if master_weights and dtype != "float32" else 8)
    if sharding:
        optimizer //= shards
        gradients //= 1 if sharding == "stage1" else shards

    unit = _BYTES.get(compute_dtype or dtype, 4)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = 4 * config.hidden_size + (3 * heads + 2 * groups) * width + 3 * config.intermediate_size
    if lora_dropout:
        layer += 5 * (6 * config.hidden_size + config.intermediate_size) // 4
        # there a product with fixed weights needs its input for the adapter alone, which has its own
        layer -= 2 * config.hidden_size + heads * width + config.intermediate_size if on_cpu() else 0
    layers = config.num_hidden_layers
    kept = (layers * config.hidden_size + layer) if recompute else layers * layer
    activations = rows * tokens * kept * unit + 3 * labelled * config.vocab_size * 4
    activations += 0 if config.use_flash_attention else 3 * rows * heads * min(tokens, BLOCK) * tokens * unit
    if tiles and config.vision is not None:
        vision = config.vision
        seen = vision.num_patches + 1
        layer = 10 * vision.hidden_size + 3 * vision.intermediate_size + vision.num_attention_heads * seen
        # a frozen tower keeps nothing but the layer that it is at
        depth = vision.num_hidden_layers if tower_trained and not recompute else 1
        activations += tiles * seen * (layer * depth + 4 * config.hidden_size) * unit
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations}


def available_memory(device: str) -> Optional[int]:
    """Bytes that a run may take: all of a GPU's, or what this machine has free; None where it can't be told."""
    if device.startswith("gpu"):
        number = int(device.split(":")[1]) if ":" in device else 0
        return int(paddle.device.cuda.get_device_properties(number).total_memory)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def format_bytes(count: int) -> str:
    """
    >>> format_bytes(3 * 2**30 // 2)
    '1.5 GB'
    """
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GB"
