"""Linear layers: ``layer(x)``, by oneDNN where nothing learns and the layer is nothing but its weights.

On a CPU weights in bfloat16 are served by oneDNN alone: what they meet is rounded to bfloat16, and what comes out is float32.
"""

from typing import Optional

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava.lean import on_cpu, swiglu
from paddlemix.models.llava.onednn import products

__all__ = ["project", "project_back", "project_quick_gelu", "project_swiglu", "quick_gelu"]


def project(layer: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """``layer(x)``: x [..., in] to [..., out]."""
    if not _is_bare(layer):
        return layer(x)
    if _computed_here(x, layer.weight, layer.bias):
        return _multiply(x, layer.weight, layer.bias)
    if layer.bias is None and not layer.training:
        return paddle.matmul(x, layer.weight)  # for one token it takes half the time of a Linear
    return layer(x)


def project_back(embedding: nn.Embedding, x: paddle.Tensor) -> paddle.Tensor:
    """x [..., D] times the turned table of token embeddings [V, D]: logits [..., V]."""
    if _computed_here(x, embedding.weight):
        return _multiply(x, embedding.weight, turned=True)
    return paddle.matmul(x, embedding.weight, transpose_y=True)


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


def _computed_here(x: paddle.Tensor, weight: paddle.Tensor, bias: Optional[paddle.Tensor] = None) -> bool:
    """Whether oneDNN can take the product: on the host, of float32 and weights of float32 or bfloat16, where nothing learns
    and no graph is recorded.

    Raises:
        UserError: nobody else can take it.
    """
    if not on_cpu() or not paddle.in_dynamic_mode():
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    learns = paddle.is_grad_enabled() and not all(each.stop_gradient for each in tensors)
    kernels = None if learns or x.dtype != paddle.float32 or x.size == 0 else products()
    if weight.dtype == paddle.bfloat16:
        if kernels is None or not kernels.have_bfloat16:
            raise UserError(
                "on a CPU, weights in bfloat16 answer under paddle.no_grad() and where the processor can multiply them; "
                "use float32."
            )
    elif weight.dtype != paddle.float32 or kernels is None:
        return False
    return all(each.place.is_cpu_place() and each.is_contiguous() for each in tensors)


def _multiply(
    x: paddle.Tensor,
    weight: paddle.Tensor,
    bias: Optional[paddle.Tensor] = None,
    *,
    turned: bool = False,
    swish: Optional[float] = None,
    factor: Optional[paddle.Tensor] = None,
) -> paddle.Tensor:
    kernels = products()
    inner, outer = weight.shape[::-1] if turned else weight.shape
    result = paddle.empty([*x.shape[:-1], outer], "float32")
    if weight.dtype == paddle.bfloat16:
        narrow = paddle.empty(x.shape, "bfloat16")
        kernels.narrow(x.data_ptr(), narrow.data_ptr(), x.size)
        x, dtype = narrow, "bfloat16"
    else:
        dtype = "float32"
    kernels(
        x.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        x.size // inner,
        inner,
        outer,
        dtype,
        turned=turned,
        bias=None if bias is None else bias.data_ptr(),
        swish=swish,
        factor=None if factor is None else factor.data_ptr(),
    )
    return result
