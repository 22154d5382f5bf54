"""The optimizer's state on disk: one safetensors file, under the parameters' names in the model.

Paddle names a parameter by a counter of the process (``linear_7.w_0``), and its optimizer keys state by that. In a file
the model's own name stands instead, so that a state fits whatever else the process has built.
"""

from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import numpy as np
import paddle
from paddle import nn
from paddle.distributed.fleet.utils.mix_precision_utils import MixPrecisionOptimizer

from paddlemix.errors import UserError
from paddlemix.models.llava.tensor_files import StoredTensor, TensorSpec, open_tensor_file, write_safetensors
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
    write_tensors(path, _held(optimizer, model))


def _held(optimizer: Any, model: nn.Layer) -> Dict[str, paddle.Tensor]:
    """The optimizer's state under the model's names."""
    names = _names(model)
    held = {}
    for key, value in optimizer.state_dict().items():
        if key == MASTER:
            held.update({f"{names[name]}/{MASTER}": tensor for name, tensor in value.items()})
        elif isinstance(value, paddle.Tensor):
            held[_structured(key, names)] = value
    return held


def write_tensors(path: Path, tensors: Dict[str, paddle.Tensor]) -> None:
    """A safetensors file, written tensor by tensor: one of them at a time is copied."""
    names = sorted(tensors)
    specs = {name: TensorSpec(str(tensors[name].dtype).split(".")[-1], tuple(tensors[name].shape)) for name in names}
    write_safetensors(path, specs, ((name, to_numpy(tensors[name])[1]) for name in names))


def load_optimizer(optimizer: Any, model: nn.Layer, path: Path) -> None:
    """Puts back what :func:`save_optimizer` wrote. A parameter that had no gradient until then has no state yet.

    Raises:
        UserError: the state is of parameters that this run doesn't train, or of another kind of optimizer.
    """
    stored = open_tensor_file(path)
    paddle_names = {structured: name for name, structured in _names(model).items()}
    paddle_names[""] = ""
    for structured in [key.partition("/")[0] for key in stored]:
        if structured not in paddle_names:
            raise UserError(
                f"{path} holds the optimizer's state of {structured}, which this run doesn't have; "
                "go on with the settings that the checkpoint was made with."
            )
    inner = optimizer._inner_opt if isinstance(optimizer, MixPrecisionOptimizer) else optimizer
    if isinstance(inner, paddle.optimizer.AdamW) and not any(key.startswith("/") for key in stored):
        for key, tensor in _create_state(inner, model, stored, path).items():
            tensor.set_value(to_tensor(stored[key].dtype, stored[key].read()))
        return
    _check_shards(model, path)
    state: Dict[str, Any] = {}
    masters = {}
    for key, entry in stored.items():
        structured, _, suffix = key.partition("/")
        tensor = to_tensor(entry.dtype, entry.read())
        if not structured:
            state[suffix] = tensor
        elif suffix == MASTER:
            tensor.name = paddle_names[structured]  # by which stage 2 of sharding finds the moments
            masters[tensor.name] = tensor
        else:
            state[f"{paddle_names[structured]}_{suffix}"] = tensor
    if masters:
        state[MASTER] = masters
    optimizer.set_state_dict(state)


def _create_state(
    optimizer: Any, model: nn.Layer, stored: Dict[str, StoredTensor], path: Path
) -> Dict[str, paddle.Tensor]:
    """Gives the parameters that the file knows a new state, as their first step would; it must be of the file's form.

    ``set_state_dict`` won't do: it demands a state of parameters that had no gradient yet, and finds none by the names of
    master weights that were read.
    """
    known = {key.partition("/")[0] for key in stored}
    parameters = [parameter for name, parameter in named_model_parameters(model) if name in known]
    optimizer._create_accumulators(paddle.static.default_main_program().global_block(), parameters)
    made = _held(optimizer, model)
    expected = {key: (str(value.dtype).split(".")[-1], tuple(value.shape)) for key, value in made.items()}
    found = {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()}
    for key in sorted(set(expected) | set(found)):
        if expected.get(key) != found.get(key):
            raise UserError(
                f"{path} holds {_described(found.get(key))} as {key}, but the optimizer of this run "
                f"has {_described(expected.get(key))}; go on with the optim and the precision that the checkpoint was made "
                "with, or set ignore_load_lr_and_optim to true."
            )
    return made


def _described(form: Optional[Tuple[str, Tuple[int, ...]]]) -> str:
    return f"{form[0]} {list(form[1])}" if form else "nothing"


def _check_shards(model: nn.Layer, path: Path) -> None:
    """Where the state is spread over the ranks' files, every parameter that is trained must be in one of them."""
    files = sorted(path.parent.glob("optimizer*.safetensors"))
    known = {key.partition("/")[0] for file in files for key in open_tensor_file(file)}
    missing = sorted(set(_names(model).values()) - known)
    if missing and "" not in known:
        raise UserError(
            f"{path.parent} holds no optimizer's state of {missing[0]}, which this run trains; go on with the settings "
            "that the checkpoint was made with, or set ignore_load_lr_and_optim to true."
        )


def _names(model: nn.Layer) -> Dict[str, str]:
    """Paddle's name -> name in the model, of the trained parameters."""
    return {parameter.name: name for name, parameter in named_model_parameters(model) if not parameter.stop_gradient}


def _structured(key: str, names: Dict[str, str]) -> str:
    """``linear_7.w_0_moment1_0`` -> ``llama.….weight/moment1_0``; ``/key`` where a sharded optimizer has names of its own."""
    for end in range(len(key) - 1, 0, -1):
        if key[end] == "_" and key[:end] in names:
            return f"{names[key[:end]]}/{key[end + 1 :]}"
    return f"/{key}"
