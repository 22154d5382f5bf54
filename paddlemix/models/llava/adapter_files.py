"""What the folder of a LoRA adapter holds: this project's and PaddleNLP's form, and that of PEFT.

The first is ``lora_config.json`` with ``lora_model_state.safetensors`` (``…q_proj.lora_A`` [in, r], ``…lora_B`` [r, out]) and
``non_lora_state.safetensors``. PEFT writes ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``) with
``base_model.model.….lora_A.weight`` [r, in], and the original release's training (llava/train/train.py) puts what else was
trained, such as the projector, beside it as ``non_lora_trainables.bin``.
"""

import re
import sys
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

from paddlemix.errors import UserError
from paddlemix.models.llava import layouts
from paddlemix.models.llava.tensor_files import FLOAT_DTYPES, Source, open_tensor_file, read_json

__all__ = ["ADAPTER_FILES", "Adapter", "LORA_CONFIG", "LORA_WEIGHTS", "Pair", "config_of", "read_adapter"]

LORA_CONFIG = "lora_config.json"
LORA_WEIGHTS = ("lora_model_state.safetensors", "lora_model_state.pdparams")
NON_LORA_WEIGHTS = "non_lora_state.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_BESIDE = "non_lora_trainables.bin"
# what an adapter may consist of beside its config
ADAPTER_FILES = (
    *LORA_WEIGHTS,
    NON_LORA_WEIGHTS,
    "peft_model.safetensors.index.json",
    *PEFT_WEIGHTS,
    PEFT_BESIDE,
)

# keys of the two configs that make another thing of an adapter, if they are set
_VARIANTS = {
    LORA_CONFIG: ("use_mora", "lora_use_mixer", "pissa", "loraga", "do_qat"),
    PEFT_CONFIG: (
        *("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "megatron_config"),
        *("use_qalora", "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias"),
        *("alora_invocation_tokens", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    ),
}
# PEFT's init_lora_weights, beside true and false, that leave the base's own weights as they are
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")


class Pair(NamedTuple):
    """The two halves for one weight: what is added to it is scaling times A B, with A [in, r] and B [r, out]."""

    A: Source
    B: Source


class Adapter(NamedTuple):
    """An adapter, under our names."""

    rank: int
    scaling: float  # lora_alpha / r, or lora_alpha / sqrt(r) with rslora
    pairs: Dict[str, Pair]
    whole: Dict[str, Source]  # what was trained beside it


def config_of(folder: Path) -> Optional[Path]:
    """The file that makes a folder an adapter's; None if it is none."""
    return next((folder / name for name in (LORA_CONFIG, PEFT_CONFIG) if (folder / name).is_file()), None)


def read_adapter(folder: Path) -> Adapter:
    """Opens an adapter; its numbers are read later.

    Raises:
        UserError: half an adapter, or a variant of LoRA that can't be merged.
    """
    path = config_of(folder)
    if path is None:
        raise UserError(f"{folder} has no {LORA_CONFIG} (or {PEFT_CONFIG}), so it isn't the folder of an adapter.")
    config, peft = read_json(path), path.name == PEFT_CONFIG
    for variant in _VARIANTS[path.name]:
        if config.get(variant):
            raise UserError(f"{path} has {variant} {_shown(config[variant])}; expected plain LoRA or rslora.")
    if peft and config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path} has peft_type {config['peft_type']!r}; expected LORA.")
    start = config.get("init_lora_weights")
    if peft and isinstance(start, str) and start.lower() not in _PLAIN_STARTS:
        raise UserError(
            f"{path} has init_lora_weights {start!r}, with which PEFT changes the base's own weights too; expected plain "
            "LoRA: save the adapter by PEFT's save_pretrained with path_initial_model_for_weight_conversion, or the whole "
            "model after merge_and_unload."
        )
    names = PEFT_WEIGHTS if peft else LORA_WEIGHTS
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has {path.name} but no adapter; expected {' or '.join(names)}.")
    tensors = open_tensor_file(found[0])
    beside = folder / (PEFT_BESIDE if peft else NON_LORA_WEIGHTS)
    if beside.is_file():
        tensors = {**tensors, **open_tensor_file(beside)}
    rank, alpha = config.get("r"), config.get("lora_alpha")
    finite = isinstance(alpha, (int, float)) and abs(alpha) <= sys.float_info.max
    if not isinstance(rank, int) or rank < 1 or not finite:
        raise UserError(f"{path} has r {rank!r} and lora_alpha {alpha!r}; expected two positive numbers, both finite.")
    scaling = alpha / (rank**0.5 if config.get("use_rslora" if peft else "rslora") else rank)

    halves: Dict[str, Dict[str, Source]] = {}
    whole: Dict[str, Source] = {}
    for published, tensor in tensors.items():
        name, half, transpose = (_peft_place if peft else _own_place)(published, folder)
        if half is not None:
            if tensor.dtype not in FLOAT_DTYPES:
                raise UserError(f"{folder} holds {published} in {tensor.dtype}; expected floating-point numbers.")
            halves.setdefault(name, {})[half] = Source(tensor, published, transpose)
        elif name in whole:
            raise UserError(f"{folder} holds {published} and {whole[name].published}, which are the same tensor.")
        else:
            whole[name] = Source(tensor, published, transpose)
    if not halves:
        raise UserError(f"{found[0]} holds no lora_A and lora_B; the adapter is not whole.")
    for name, both in halves.items():
        if set(both) != {"A", "B"}:
            raise UserError(f"{folder} has only lora_{next(iter(both))} for {name}; the adapter is not whole.")
    return Adapter(rank, scaling, {name: Pair(**both) for name, both in halves.items()}, whole)


def _shown(value: Any) -> str:
    return "true" if value is True else repr(value)


def _own_place(published: str, folder: Path) -> Tuple[str, Optional[str], bool]:
    """Our name, which half it is (None: a whole tensor), and whether its axes are swapped."""
    name = re.sub(r"^model\.(?=llama\.|lm_head\.)", "", published)  # LoRAModel's own prefix
    adapted = re.fullmatch(r"(.*)\.lora_([AB])", name)
    return (adapted.group(1) + ".weight", adapted.group(2), False) if adapted else (name, None, False)


def _peft_place(published: str, folder: Path) -> Tuple[str, Optional[str], bool]:
    name = re.sub(
        r"^base_model\.(?:model\.)?(?=model\.|language_model\.|vision_tower|multi_modal|lm_head)", "", published
    )
    name = re.sub(r"^model\.(?=model\.)", "", name)
    name = name.replace(".base_layer.", ".")  # the adapted layer itself: its bias, or the matrix of the vocabulary
    adapted = re.fullmatch(r"(.*)\.lora_(?:embedding_)?([AB])(?:\.default)?(?:\.weight)?", name)
    known, ours = layouts.read_name(adapted.group(1) + ".weight" if adapted else name)
    if not known or ours is None:
        raise UserError(f"{folder} adapts {published}, which no LLaVA model has.")
    return ours, adapted.group(2) if adapted else None, adapted is not None or layouts.is_linear(ours)
