"""Steps of a layer whose gradients are written out: they keep less for the backward pass than what Paddle would record,
and take fewer and cheaper kernels.

On a CPU three things cost far more than their arithmetic: a broadcast along leading axes (ten to forty times an
operation on full shapes), a mean over the last axis (a product with ones takes a tenth of it), and F.swiglu (with oneDNN's
swish it takes a fifth). Elsewhere Paddle's fused kernels are used where they have a gradient.
"""

import ctypes
from typing import Optional, Tuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fused_rms_norm

from paddlemix.errors import UserError
from paddlemix.models.llava.onednn import Products, products

__all__ = [
    "Rotation",
    "host_view",
    "layer_norm",
    "on_cpu",
    "quick_gelu",
    "rms_norm",
    "rotate",
    "swiglu",
    "turn",
    "widened",
    "working_dtype",
]


def on_cpu() -> bool:
    return paddle.device.get_device() == "cpu"


def working_dtype(weight: paddle.Tensor):
    """What a layer of such weights computes in: float32 on a CPU, where bfloat16 is a way to hold weights only.

    Raises:
        UserError: float16 on a CPU.
    """
    if weight.dtype == paddle.float16 and on_cpu():
        raise UserError("a CPU can't compute in float16; open the model with dtype float32 or bfloat16.")
    return paddle.float32 if weight.dtype == paddle.bfloat16 and on_cpu() else weight.dtype


def widened(weight: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
    """A small weight, such as a norm's, in float32 where it is held in bfloat16 and meets ``x`` in float32."""
    return weight.astype("float32") if weight.dtype == paddle.bfloat16 and x.dtype == paddle.float32 else weight


def host_view(tensor: paddle.Tensor) -> np.ndarray:
    """The memory of a tensor on the host, of which the caller must keep hold: float32, or bfloat16 as uint16."""
    kind, dtype = (ctypes.c_uint16, np.uint16) if tensor.dtype == paddle.bfloat16 else (ctypes.c_float, np.float32)
    numbers = (kind * tensor.size).from_address(tensor.data_ptr())
    return np.frombuffer(numbers, dtype).reshape(tensor.shape)


def _needs_gradient(*tensors: paddle.Tensor) -> bool:
    return paddle.is_grad_enabled() and any(not tensor.stop_gradient for tensor in tensors)


# root mean square norm


def rms_norm(x: paddle.Tensor, weight: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """x [..., D] over the root of its mean square, times weight [D]; computed in float32 (Zhang & Sennrich, 2019)."""
    weight = widened(weight, x)
    if _needs_gradient(x, weight):
        return _RMSNorm.apply(x, weight, epsilon)
    return _rms_norm(x, weight, epsilon)


def _rms_norm(x, weight, epsilon):
    return fused_rms_norm(x, weight, None, epsilon, begin_norm_axis=x.ndim - 1)[0]


class _RMSNorm(PyLayer):
    """One kernel forward. The fused kernel has no gradient on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        ctx.fixed = x.stop_gradient, weight.stop_gradient
        return _rms_norm(x, weight, epsilon)

    @staticmethod
    def backward(ctx, grad):
        saved, weight = ctx.saved_tensor()
        width = saved.shape[-1]
        ones = paddle.ones([width, 1], "float32")
        x, grad = (tensor.astype("float32").reshape([-1, width]) for tensor in (saved, grad))
        inverse = paddle.rsqrt(paddle.matmul(x * x, ones) / width + ctx.epsilon)  # [N, 1]
        grad_x = grad_weight = None
        if not ctx.fixed[1]:
            grad_weight = paddle.matmul(inverse, grad * x, transpose_x=True)  # [1, D]: the sum over rows
            grad_weight = grad_weight.reshape([width]).astype(weight.dtype)
        if not ctx.fixed[0]:
            scaled = grad * _filled(weight.astype("float32"), x)
            share = paddle.matmul(scaled * x, ones) * inverse**3 / width
            grad_x = scaled * _filled(inverse, x) - x * _filled(share, x)
            grad_x = grad_x.reshape(saved.shape).astype(saved.dtype)
        return grad_x, grad_weight


def _filled(part: paddle.Tensor, whole: paddle.Tensor) -> paddle.Tensor:
    """A row [D] or a column [N, 1] that meets ``whole`` [N, D]; on a CPU in that full shape."""
    return part.expand(whole.shape) if on_cpu() and paddle.in_dynamic_mode() else part


# layer norm


def layer_norm(x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor, epsilon: float) -> paddle.Tensor:
    """x [..., D] less its mean over its spread, times weight [D], plus bias [D] (Ba et al., 2016)."""
    weight, bias = widened(weight, x), widened(bias, x)
    if on_cpu() and _needs_gradient(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, epsilon)
    return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)


class _LayerNorm(PyLayer):
    """Sums as products with ones, which take less than Paddle's gradient does."""

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        ctx.fixed = x.stop_gradient, weight.stop_gradient, bias.stop_gradient
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    def backward(ctx, grad):
        saved, weight = ctx.saved_tensor()
        width = saved.shape[-1]
        means = paddle.full([width, 1], 1 / width, saved.dtype)
        x, grad = (tensor.reshape([-1, width]) for tensor in (saved, grad))
        along = paddle.ones([1, x.shape[0]], saved.dtype)
        x = x - _filled(paddle.matmul(x, means), x)
        inverse = _filled(paddle.rsqrt(paddle.matmul(x * x, means) + ctx.epsilon), x)
        x = x * inverse
        grad_x = grad_weight = grad_bias = None
        if not ctx.fixed[2]:
            grad_bias = paddle.matmul(along, grad).reshape([width])
        if not ctx.fixed[1]:
            grad_weight = paddle.matmul(along, grad * x).reshape([width])
        if not ctx.fixed[0]:
            scaled = grad * _filled(weight, x)
            centred = scaled - _filled(paddle.matmul(scaled, means), x)
            centred = centred - x * _filled(paddle.matmul(scaled * x, means), x)
            grad_x = (centred * inverse).reshape(saved.shape)
        return grad_x, grad_weight, grad_bias


# rotary positions


class Rotation:
    """Cosines and sines of T positions, ready for the heads that are turned by them.

    Args:
        cos, sin: [B, 1, T, K].
    """

    def __init__(self, cos: paddle.Tensor, sin: paddle.Tensor):
        half = sin.shape[-1] // 2
        self._cos = cos
        self._sin = paddle.concat([-sin[..., :half], sin[..., half:]], axis=-1)  # signs of the turned halves
        self._full = {}

    def tables(self, batch: int, heads: int) -> Tuple[paddle.Tensor, paddle.Tensor]:
        """cos and signed sin for [B, H, T, K]; in that full shape on a CPU, once for all layers."""
        if not on_cpu():
            return self._cos, self._sin
        if heads not in self._full:
            times = [batch // self._cos.shape[0], heads, 1, 1]
            self._full[heads] = self._cos.tile(times), self._sin.tile(times)
        return self._full[heads]

    def of_one_token(self, batch: int, heads: int, groups: int) -> Tuple[paddle.Tensor, paddle.Tensor]:
        """cos and signed sin [B, H + G, 1, K] of the last token's queries and keys together; the queries' part is scaled
        by 1/sqrt(K)."""
        scale = self._cos.shape[-1] ** -0.5
        times = batch // self._cos.shape[0]
        tables = []
        for table in (self._cos[:, :, -1:], self._sin[:, :, -1:]):
            parts = [table.tile([times, heads, 1, 1]) * scale]
            parts += [table.tile([times, groups, 1, 1])] if groups else []
            tables.append(paddle.concat(parts, axis=1))
        return tuple(tables)


def rotate(x: paddle.Tensor, rotation: Rotation) -> paddle.Tensor:
    """Turns pairs (i, i + K/2) of [B, H, T, K] by their positions' angles (Su et al., 2021)."""
    cos, sin = rotation.tables(x.shape[0], x.shape[1])
    return _Rotate.apply(x, cos, sin) if _needs_gradient(x) else turn(x, cos, sin)


def turn(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """``x`` times ``cos``, plus its swapped halves times the signed ``sin``."""
    return x * cos + _swap_halves(x) * sin


def _swap_halves(x: paddle.Tensor) -> paddle.Tensor:
    half = x.shape[-1] // 2
    plain = on_cpu() and paddle.in_dynamic_mode() and x.dtype == paddle.float32 and x.is_contiguous()
    if not plain or x.shape[-2] == 1 or _needs_gradient(x):
        return paddle.concat([x[..., half:], x[..., :half]], axis=-1)
    result = paddle.empty(x.shape, x.dtype)
    given, swapped = host_view(x), host_view(result)
    # Paddle joins rows of a few numbers slowly
    swapped[..., :half], swapped[..., half:] = given[..., half:], given[..., :half]
    return result


class _Rotate(PyLayer):
    """A rotation is undone by the opposite angle, so the backward pass needs nothing of what was rotated."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.tables = cos, sin
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.tables
        return grad * cos - _swap_halves(grad) * sin, None, None


# swish: x * sigmoid(alpha * x), which is SiLU for 1 and CLIP's GELU for 1.702


def quick_gelu(x: paddle.Tensor) -> paddle.Tensor:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    if not on_cpu():
        return x * F.sigmoid(1.702 * x)
    return _QuickGELU.apply(x) if _needs_gradient(x) else _swish(x, 1.702)


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    if gate.shape[-2] == 1 or not on_cpu():
        return F.swiglu(gate, up)  # for one token the number of kernels counts
    return _SwiGLU.apply(gate, up) if _needs_gradient(gate, up) else _swish(gate) * up


def _kernels(*tensors: paddle.Tensor) -> Optional[Products]:
    """oneDNN's, where they can read these."""
    if not on_cpu() or not paddle.in_dynamic_mode():
        return None
    plain = all(x.dtype == paddle.float32 and x.is_contiguous() and 0 not in x.shape for x in tensors)
    return products() if plain else None


def _swish(x: paddle.Tensor, alpha: float = 1.0) -> paddle.Tensor:
    kernels = _kernels(x)
    if kernels is None:
        half = x * (0.5 * alpha)
        return x * (paddle.tanh(half) * 0.5 + 0.5)  # half of the time of a sigmoid
    result = paddle.empty_like(x)
    kernels.swish(x.data_ptr(), result.data_ptr(), x.size, alpha)
    return result


def _swish_back(x: paddle.Tensor, grad: paddle.Tensor, alpha: float = 1.0) -> paddle.Tensor:
    """``grad`` times the slope at ``x``."""
    kernels = _kernels(x, grad)
    if kernels is None:
        sigmoid = paddle.tanh(x * (0.5 * alpha)) * 0.5 + 0.5
        return grad * sigmoid * (1.0 + alpha * x * (1.0 - sigmoid))
    result = paddle.empty_like(x)
    kernels.swish_back(x.data_ptr(), grad.data_ptr(), result.data_ptr(), x.size, alpha)
    return result


class _QuickGELU(PyLayer):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _swish(x, 1.702)

    @staticmethod
    def backward(ctx, grad):
        return _swish_back(*ctx.saved_tensor(), grad, 1.702)


class _SwiGLU(PyLayer):
    """Keeps its inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.fixed = gate.stop_gradient, up.stop_gradient
        return _swish(gate).multiply_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensor()
        grad_gate = None if ctx.fixed[0] else _swish_back(gate, grad * up)
        return grad_gate, None if ctx.fixed[1] else _swish(gate).multiply_(grad)
