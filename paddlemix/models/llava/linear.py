"""Linear layers: ``layer(x)``, by oneDNN where nothing learns and the layer is nothing but its weights.

On a CPU weights in bfloat16 are served by oneDNN alone: what they meet is rounded to bfloat16, and what comes out is float32.
"""

import math
from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava.lean import on_cpu, swiglu
from paddlemix.models.llava.onednn import have_bfloat16, products

__all__ = ["project", "project_back", "project_quick_gelu", "project_swiglu", "quick_gelu"]


def project(layer: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """``layer(x)``: x [..., in] to [..., out]."""
    if not _is_bare(layer):
        _refuse_bfloat16(layer)
        return layer(x)
    weight, bias = layer.weight, layer.bias
    if _computed_here(x, weight, bias):
        return _multiply(x, weight, bias)
    if bias is None and not layer.training:
        return paddle.matmul(x, weight)  # for one token it takes half the time of a Linear
    return layer(x)


def project_back(embedding: nn.Embedding, x: paddle.Tensor) -> paddle.Tensor:
    """x [..., D] times the turned table of token embeddings [V, D]: logits [..., V]."""
    table = embedding.weight
    if _computed_here(x, table, turned=True):
        return _multiply(x, table, turned=True)
    return paddle.matmul(x, table, transpose_y=True)


def project_swiglu(gate: nn.Layer, up: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """silu(gate(x)) * up(x) (Shazeer, 2020)."""
    if all(_is_bare(layer) and _computed_here(x, layer.weight, layer.bias) for layer in (gate, up)):
        return _multiply(x, up.weight, up.bias, factor=_multiply(x, gate.weight, gate.bias, swish=1.0))
    return swiglu(project(gate, x), project(up, x))


def project_quick_gelu(layer: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """``quick_gelu(layer(x))``"""
    if _is_bare(layer) and _computed_here(x, layer.weight, layer.bias):
        return _multiply(x, layer.weight, layer.bias, swish=1.702)
    return quick_gelu(project(layer, x))


def quick_gelu(x: paddle.Tensor) -> paddle.Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * F.sigmoid(1.702 * x)


def _is_bare(layer: nn.Layer) -> bool:
    """Whether it is a Linear that nobody watches: not an adapter, no hooks."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_post_hooks)


def _refuse_bfloat16(layer: nn.Layer) -> None:
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.dtype == paddle.bfloat16 and on_cpu():
        raise UserError(
            "on a CPU, layers with an adapter or a hook can't compute in bfloat16; merge the adapter, or use float32."
        )


def _computed_here(
    x: paddle.Tensor, weight: paddle.Tensor, bias: Optional[paddle.Tensor] = None, turned: bool = False
) -> bool:
    """Whether oneDNN takes the product: on the host, of float32 and weights of float32 or bfloat16, where nothing learns and
    no graph is recorded. One row in float32 is left to Paddle, whose kernel has less to prepare.

    Raises:
        UserError: weights are in bfloat16, and oneDNN can't take the product; Paddle can't either.
    """
    if not on_cpu() or not paddle.in_dynamic_mode():
        return False
    weights = (weight,) if bias is None else (weight, bias)
    shape, dtype = x.shape, weight.dtype
    learns = paddle.is_grad_enabled() and not all(each.stop_gradient for each in (x, *weights))
    fits = (
        x.dtype == paddle.float32
        and shape[-1] == weight.shape[1 if turned else 0]
        and all(each.dtype == dtype and each.place.is_cpu_place() and each.is_contiguous() for each in weights)
    )
    if dtype == paddle.float32:
        return fits and not learns and math.prod(shape[:-1]) > 1 and products() is not None
    if dtype != paddle.bfloat16:
        return False
    if learns:
        raise UserError(
            "on a CPU, weights in bfloat16 can't learn; answer under paddle.no_grad(), or use float32 to train."
        )
    if not have_bfloat16():
        raise UserError("this CPU, or the oneDNN of this Paddle, can't multiply in bfloat16; use float32.")
    if not fits:
        raise ValueError(f"a product of {shape} in {x.dtype} with weights {weight.shape} in bfloat16 can't be computed")
    return True


def _multiply(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: Optional[paddle.Tensor] = None,
    *,
    turned: bool = False,
    swish: Optional[float] = None,
    factor: Optional[paddle.Tensor] = None,
) -> paddle.Tensor:
    kernels, dtype = products(), "float32"
    inner, outer = weight.shape[::-1] if turned else weight.shape
    rows = math.prod(x.shape[:-1])
    result = paddle.empty([*x.shape[:-1], outer], "float32")
    if rows == 0:
        return result
    x = x.contiguous()
    if weight.dtype == paddle.bfloat16:
        narrow, dtype = paddle.empty(x.shape, "bfloat16"), "bfloat16"
        kernels.narrow(x.data_ptr(), narrow.data_ptr(), rows * inner)
        x = narrow
    kernels(
        x.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        rows,
        inner,
        outer,
        dtype,
        turned=turned,
        bias=None if bias is None else bias.data_ptr(),
        swish=swish,
        factor=None if factor is None else factor.data_ptr(),
    )
    return result
