"""The optimizer's state on disk: one safetensors file, under the parameters' names in the model.

Paddle names a parameter by a counter of the process (``linear_7.w_0``), and its optimizer keys state by that. In a file
the model's own name stands instead, so that a state fits whatever else the process has built.
"""

from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np
import paddle
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava.tensor_files import TensorSpec, open_tensor_file, write_safetensors
from paddlemix.trainer.freezing import named_model_parameters

__all__ = ["load_optimizer", "save_optimizer", "to_numpy", "to_tensor", "write_tensors"]

MASTER = "master_weights"


def to_numpy(tensor: paddle.Tensor) -> Tuple[str, np.ndarray]:
    """dtype's name and numbers of a tensor; bfloat16 as its bits in uint16."""
    return str(tensor.dtype).split(".")[-1], tensor.numpy()


def to_tensor(dtype: str, array: np.ndarray) -> paddle.Tensor:
    """The inverse of :func:`to_numpy`."""
    if dtype == "bfloat16":
        wide = (array.astype(np.uint32) << 16).view(np.float32)
        return paddle.to_tensor(wide).astype("bfloat16")
    return paddle.to_tensor(array)


def save_optimizer(optimizer: Any, model: nn.Layer, path: Path) -> None:
    """Writes moments, their powers and float32 master weights; not the learning rate, which the scheduler holds."""
    names = _names(model)
    held = {}
    for key, value in optimizer.state_dict().items():
        if key == MASTER:
            held.update({f"{names[name]}/{MASTER}": tensor for name, tensor in value.items()})
        elif isinstance(value, paddle.Tensor):
            held[_structured(key, names)] = value
    write_tensors(path, held)


def write_tensors(path: Path, tensors: Dict[str, paddle.Tensor]) -> None:
    """A safetensors file, written tensor by tensor: one of them at a time is copied."""
    names = sorted(tensors)
    specs = {name: TensorSpec(str(tensors[name].dtype).split(".")[-1], tuple(tensors[name].shape)) for name in names}
    write_safetensors(path, specs, ((name, to_numpy(tensors[name])[1]) for name in names))


def load_optimizer(optimizer: Any, model: nn.Layer, path: Path) -> None:
    """Puts back what :func:`save_optimizer` wrote.

    Raises:
        UserError: the state is of parameters that this run doesn't train.
    """
    paddle_names = {structured: name for name, structured in _names(model).items()}
    paddle_names[""] = ""
    state: Dict[str, Any] = {}
    masters = {}
    for key, stored in open_tensor_file(path).items():
        structured, _, suffix = key.partition("/")
        if structured not in paddle_names:
            raise UserError(
                f"{path} holds the optimizer's state of {structured}, which this run doesn't have; "
                "go on with the settings that the checkpoint was made with."
            )
        tensor = to_tensor(stored.dtype, stored.read())
        if not structured:
            state[suffix] = tensor
        elif suffix == MASTER:
            masters[paddle_names[structured]] = tensor
        else:
            state[f"{paddle_names[structured]}_{suffix}"] = tensor
    if masters:
        state[MASTER] = masters
    optimizer.set_state_dict(state)


def _names(model: nn.Layer) -> Dict[str, str]:
    """Paddle's name -> name in the model, of the trained parameters."""
    return {parameter.name: name for name, parameter in named_model_parameters(model) if not parameter.stop_gradient}


def _structured(key: str, names: Dict[str, str]) -> str:
    """``linear_7.w_0_moment1_0`` -> ``llama.….weight/moment1_0``; ``/key`` where a sharded optimizer has names of its own."""
    for end in range(len(key) - 1, 0, -1):
        if key[end] == "_" and key[:end] in names:
            return f"{names[key[:end]]}/{key[end + 1 :]}"
    return f"/{key}"
