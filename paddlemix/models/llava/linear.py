"""Linear layers: ``layer(x)``, on a CPU by oneDNN where the layer is nothing but its weights, or these and an adapter.

There weights in bfloat16 are served by oneDNN alone: what they meet is rounded to bfloat16, and what comes out is float32.
They can't learn; but products of float32 weights, which do, can be computed in bfloat16 (:func:`bfloat16_products`).
"""

import contextlib
import math
import sys
import threading
from typing import Iterator, Optional, Tuple

import paddle
from paddle import nn
from paddle.autograd import PyLayer

from paddlemix.errors import UserError
from paddlemix.models.llava.lean import on_cpu, quick_gelu, swiglu
from paddlemix.models.llava.onednn import have_bfloat16, products

__all__ = ["bfloat16_products", "project", "project_back", "project_quick_gelu", "project_swiglu"]


class _Precision(threading.local):
    bfloat16 = False  # of products of float32 weights


_precision = _Precision()


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Within it, on a CPU, plain linear layers round both sides of their products to bfloat16, forward and backward, and
    add up in float32. Weights, gradients, what adapters add, layers with hooks, attention, logits of tied embeddings and all
    between products stay float32. Where layers are recomputed, the backward pass belongs into it too.

    Raises:
        UserError: this CPU can't multiply in bfloat16.
    """
    check_bfloat16()
    before, _precision.bfloat16 = _precision.bfloat16, True
    try:
        yield
    finally:
        _precision.bfloat16 = before


def check_bfloat16() -> None:
    """Refuses a CPU, or a Paddle, that can't multiply in bfloat16."""
    if not have_bfloat16():
        raise UserError("this CPU, or the oneDNN of this Paddle, can't multiply in bfloat16; use float32.")


def project(layer: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """``layer(x)``: x [..., in] to [..., out]."""
    bare = _is_bare(layer)
    adapted = not bare and _is_adapted(layer)
    if not bare and not adapted:
        _refuse_bfloat16(layer)
        return layer(x)
    weight, bias = layer.weight, layer.bias
    if bare and _computed_here(x, weight, bias):
        return _multiply(x, weight, bias)
    low = (layer.lora_A, layer.lora_B) if adapted else ()
    if _fits(x, weight, bias, *low) and weight.dtype == paddle.float32 and products() is not None:
        if adapted:
            return _project_adapted(layer, x)
        if _learns(x, weight, bias):
            return _Product.apply(x, weight, bias, _precision.bfloat16)
    if not bare:
        _refuse_bfloat16(layer)
        return layer(x)
    if bias is None and not layer.training:
        return paddle.matmul(x, weight)  # for one token it takes half the time of a Linear
    return layer(x)


def project_back(embedding: nn.Embedding, x: paddle.Tensor) -> paddle.Tensor:
    """x [..., D] times the turned table of token embeddings [V, D]: logits [..., V]."""
    table = embedding.weight
    if _computed_here(x, table, turned=True):
        return _multiply(x, table, turned=True, bfloat16=False)
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


def _is_bare(layer: nn.Layer) -> bool:
    """Whether it is a Linear that nobody watches: not an adapter, no hooks."""
    return type(layer) is nn.Linear and not (layer._forward_pre_hooks or layer._forward_post_hooks)


def _is_adapted(layer: nn.Layer) -> bool:
    """Whether it is a Linear with a low-rank adapter of the usual kind (LoRA), in training, that nobody watches."""
    peft = sys.modules.get("paddlenlp.peft.lora.lora_layers")  # who has adapters has loaded it
    return (
        peft is not None
        and type(layer) is peft.LoRALinear
        and layer.training
        and not (layer.merged or layer.disable_lora or layer.pissa or layer.use_mora or layer.lora_use_mixer)
        and not (layer._forward_pre_hooks or layer._forward_post_hooks)
    )


def _refuse_bfloat16(layer: nn.Layer) -> None:
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.dtype == paddle.bfloat16 and on_cpu():
        raise UserError(
            "on a CPU, layers with an adapter or a hook can't compute in bfloat16; merge the adapter, or use float32."
        )


def _learns(*tensors: Optional[paddle.Tensor]) -> bool:
    """Whether a product of these is recorded for a backward pass."""
    return paddle.is_grad_enabled() and not all(each is None or each.stop_gradient for each in tensors)


def _fits(x: paddle.Tensor, weight: paddle.Tensor, *others: Optional[paddle.Tensor], turned: bool = False) -> bool:
    """Whether oneDNN can read these: on the host, float32, and weights of one type that lie there whole."""
    if not on_cpu() or not paddle.in_dynamic_mode():
        return False
    weights = [weight, *(each for each in others if each is not None)]
    return (
        x.dtype == paddle.float32
        and x.shape[-1] == weight.shape[1 if turned else 0]
        and all(each.dtype == weight.dtype and each.place.is_cpu_place() and each.is_contiguous() for each in weights)
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
    shape, dtype = x.shape, weight.dtype
    learns, fits = _learns(x, weight, bias), _fits(x, weight, bias, turned=turned)
    if dtype == paddle.float32:
        several = math.prod(shape[:-1]) > 1 or _precision.bfloat16
        return fits and not learns and several and products() is not None
    if dtype != paddle.bfloat16:
        return False
    if learns:
        raise UserError(
            "on a CPU, weights in bfloat16 can't learn; answer under paddle.no_grad(), or use float32 to train."
        )
    check_bfloat16()
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
    bfloat16: Optional[bool] = None,
    into: Optional[paddle.Tensor] = None,
) -> paddle.Tensor:
    """x [..., in] times weight [in, out], or [out, in] with ``turned``; with ``bfloat16`` both are rounded to it, by default
    within :func:`bfloat16_products`. It is added to what is in ``into``, where that is given."""
    bfloat16 = _precision.bfloat16 if bfloat16 is None else bfloat16
    inner, outer = weight.shape[::-1] if turned else weight.shape
    rows = math.prod(x.shape[:-1])
    result = paddle.empty([*x.shape[:-1], outer], "float32") if into is None else into
    if rows == 0:
        return result
    x, dtype = x.contiguous(), "float32"
    if bfloat16 or weight.dtype == paddle.bfloat16:
        x, weight, dtype = _narrow(x), _narrow(weight), "bfloat16"
    products()(
        x.data_ptr(),
        weight.data_ptr(),
        result.data_ptr(),
        rows,
        inner,
        outer,
        dtype,
        turned=turned,
        bias=None if bias is None else bias.data_ptr(),
        bias_dtype=None if bias is None else bias.dtype.name.lower(),
        swish=swish,
        factor=None if factor is None else factor.data_ptr(),
        add=into is not None,
    )
    return result


def _narrow(x: paddle.Tensor) -> paddle.Tensor:
    """Rounded to bfloat16, in which it may be already."""
    if x.dtype == paddle.bfloat16:
        return x
    narrow = paddle.empty(x.shape, "bfloat16")
    products().narrow(x.data_ptr(), narrow.data_ptr(), x.size)
    return narrow


# products that learn; unlike Paddle's own they don't notice a tensor that is overwritten before the backward pass


class _Product(PyLayer):
    """x times weight [in, out], and a bias [out]. Paddle's sum over rows, the gradient of a bias, takes ten times as long as
    the product with ones."""

    @staticmethod
    def forward(ctx, x, weight, bias, bfloat16):
        ctx.save_for_backward(x, weight)
        ctx.fixed = [each.stop_gradient for each in (x, weight, bias) if each is not None]
        ctx.bfloat16 = bfloat16
        return _multiply(x, weight, bias, bfloat16=bfloat16)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensor()
        kinds = (
            lambda: _multiply(grad, weight, turned=True, bfloat16=ctx.bfloat16),
            lambda: _weight_gradient(*_rows(x, grad), ctx.bfloat16),
            lambda: paddle.matmul(*_rows(paddle.ones([*grad.shape[:-1], 1]), grad), transpose_x=True).flatten(),
        )
        return tuple(None if fixed else gradient() for fixed, gradient in zip(ctx.fixed, kinds))


class _AdaptedProduct(PyLayer):
    """x times a fixed weight, plus scaling * x A B, of which A [in, r] and B [r, out] learn (LoRA: Hu et al., 2021). What is
    added goes into the product in place, in float32: the weight and a small adapter in one matrix of bfloat16 would lose it.
    ``dropped`` is what A meets; None: x itself."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scaling, bfloat16):
        given = x if dropped is None else dropped
        low = _multiply(given, a, bfloat16=False) * scaling  # [..., r]
        ctx.save_for_backward(weight, a, b, given, low)
        ctx.fixed = x.stop_gradient, given.stop_gradient, a.stop_gradient, b.stop_gradient
        ctx.one_input, ctx.without_bias, ctx.scaling, ctx.bfloat16 = dropped is None, bias is None, scaling, bfloat16
        result = _multiply(x, weight, bias, bfloat16=bfloat16)
        return _multiply(low, b, bfloat16=False, into=result)

    @staticmethod
    def backward(ctx, grad):
        weight, a, b, given, low = ctx.saved_tensor()
        x_fixed, given_fixed, a_fixed, b_fixed = ctx.fixed
        grad_low = _multiply(grad, b, turned=True, bfloat16=False) * ctx.scaling
        grad_x = grad_given = None
        if not x_fixed:
            grad_x = _multiply(grad, weight, turned=True, bfloat16=ctx.bfloat16)
        if not given_fixed:
            grad_given = _multiply(grad_low, a, turned=True, bfloat16=False, into=grad_x if ctx.one_input else None)
        grads = [grad_x] if ctx.one_input else [grad_x, grad_given]
        grads += [None] * (1 if ctx.without_bias else 2)
        grads.append(None if a_fixed else _weight_gradient(*_rows(given, grad_low)))
        grads.append(None if b_fixed else _weight_gradient(*_rows(low, grad)))
        return tuple(grads)


def _project_adapted(layer: nn.Layer, x: paddle.Tensor) -> paddle.Tensor:
    """``layer(x)`` of a Linear with an adapter."""
    weight, bias, a, b = layer.weight, layer.bias, layer.lora_A, layer.lora_B
    drops = isinstance(layer.lora_dropout, nn.Layer)  # else it is a function that does nothing
    dropped = layer.lora_dropout(x) if drops else None
    if weight.stop_gradient and (bias is None or bias.stop_gradient):
        return _AdaptedProduct.apply(x, dropped, weight, bias, a, b, layer.scaling, _precision.bfloat16)
    plain = _Product.apply(x, weight, bias, _precision.bfloat16)
    return plain + paddle.matmul(paddle.matmul(x if dropped is None else dropped, a), b) * layer.scaling


def _rows(*tensors: paddle.Tensor) -> Tuple[paddle.Tensor, ...]:
    """[..., D] each to [N, D]."""
    return tuple(each.reshape([-1, each.shape[-1]]) for each in tensors)


def _weight_gradient(x: paddle.Tensor, grad: paddle.Tensor, bfloat16: bool = False) -> paddle.Tensor:
    """x [N, in] turned, times grad [N, out]."""
    (count, inner), outer = x.shape, grad.shape[-1]
    if count == 0:
        return paddle.zeros([inner, outer], "float32")
    result = paddle.empty([inner, outer], "float32")
    x, grad = x.contiguous(), grad.contiguous()
    if bfloat16:
        x, grad = _narrow(x), _narrow(grad)
    dtype = "bfloat16" if bfloat16 else "float32"
    products()(x.data_ptr(), grad.data_ptr(), result.data_ptr(), inner, count, outer, dtype, x_turned=True)
    return result
