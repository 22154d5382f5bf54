"""The weights of a run on disk: a whole model, or an adapter with what was trained beside it."""

import json
import re
from pathlib import Path
from typing import Any

import paddle
from paddle import nn
from paddlenlp.peft import LoRAModel

from paddlemix.errors import UserError
from paddlemix.models.llava.adapter_files import LORA_WEIGHTS
from paddlemix.models.llava.tensor_files import (
    StoredTensor,
    open_tensor_file,
    open_weights,
    write_json,
)
from paddlemix.trainer.freezing import named_model_parameters, part_of
from paddlemix.trainer.optimizer_state import to_tensor, write_tensors

__all__ = ["load_trained_weights", "mark_differing", "save_trained_weights"]


LORA_FILE, BESIDE_FILE = "lora_model_state.safetensors", "non_lora_state.safetensors"
LORA_INDEX = "peft_model.safetensors.index.json"  # by which PaddleNLP's LoRAModel.from_pretrained finds the adapter


def mark_differing(model: nn.Layer, part: str) -> None:
    """Notes that a part isn't the base's any more, so that an adapter folder holds it even if it isn't trained."""
    for name, parameter in named_model_parameters(model):
        if part_of(name) == part:
            parameter.differs_from_base = True


def save_trained_weights(model: nn.Layer, folder: Path) -> None:
    """Writes weights and config: the whole model, or ``lora_config.json``, the adapter and what differs beside it."""
    if not isinstance(model, LoRAModel):
        model.save_pretrained(folder)
        return
    adapters, beside = {}, {}
    for name, parameter in named_model_parameters(model):
        if part_of(name) == "LoRA adapters":
            adapters[name] = parameter
        elif not parameter.stop_gradient or getattr(parameter, "differs_from_base", False):
            beside[name] = parameter
    write_tensors(folder / LORA_FILE, adapters)
    write_json(folder / LORA_INDEX, {"metadata": {}, "weight_map": {name: LORA_FILE for name in adapters}})
    if beside:
        write_tensors(folder / BESIDE_FILE, beside)
    config = model.lora_config.to_dict()
    config["scaling"] = model.lora_config.scaling
    (folder / "lora_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    model.model.config.save_pretrained(str(folder))


def load_trained_weights(model: nn.Layer, folder: Path) -> None:
    """Puts a checkpoint's weights into a model built like the one that was saved.

    Raises:
        UserError: a tensor that is missing, unexpected or wrongly shaped.
    """
    known = dict(named_model_parameters(model))
    if isinstance(model, LoRAModel):
        files = [folder / name for name in LORA_WEIGHTS if (folder / name).is_file()]
        if not files:
            raise UserError(f"{folder} holds no adapter; expected {' or '.join(LORA_WEIGHTS)}.")
        # LoRAModel's own prefix, which PaddleNLP's files may have
        stored = {re.sub(r"^model\.(?=llama\.|lm_head\.)", "", k): v for k, v in open_tensor_file(files[0]).items()}
        if (folder / BESIDE_FILE).exists():
            stored = {**stored, **open_tensor_file(folder / BESIDE_FILE)}
        expected = {name for name, parameter in known.items() if part_of(name) == "LoRA adapters"}
        # what is trained here but wasn't when the folder was written stays as it is
    else:
        stored = open_weights(folder)
        expected = set(known)
    missing = sorted(expected - set(stored))
    if missing:
        raise UserError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more tensors that this run trains.")
    for name, tensor in stored.items():
        if name not in known:
            raise UserError(f"{folder} holds {name}, which the model of this run doesn't have.")
        if isinstance(model, LoRAModel) and part_of(name) != "LoRA adapters":
            known[name].differs_from_base = True
        put(known[name], name, tensor, folder)


def put(parameter: Any, name: str, tensor: StoredTensor, source: Path) -> None:
    """Sets a parameter, converted to its dtype."""
    if tuple(parameter.shape) != tensor.shape:
        raise UserError(
            f"{source} holds {name} with shape {list(tensor.shape)}, but the model's has {list(parameter.shape)}."
        )
    with paddle.no_grad():
        parameter.set_value(to_tensor(tensor.dtype, tensor.read()).astype(parameter.dtype))
