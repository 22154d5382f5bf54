"""Steps of a layer whose gradients are written out: they keep less for the backward pass than what Paddle would record,
and take fewer and cheaper kernels.

On a CPU three things cost far more than their arithmetic: a broadcast along leading axes (ten to forty times an
operation on full shapes), a mean over the last axis (a product with ones takes a tenth of it), and a sigmoid (half of
which a tanh saves). Elsewhere Paddle's fused kernels are used where they have a gradient.
"""

import ctypes
from typing import Tuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer
from paddle.incubate.nn.functional import fused_rms_norm

__all__ = ["Rotation", "host_view", "on_cpu", "rms_norm", "rotate", "swiglu", "turn", "widened", "working_dtype"]


def on_cpu() -> bool:
    return paddle.device.get_device() == "cpu"


def working_dtype(weight: paddle.Tensor):
    """What a layer of such weights computes in: float32 on a CPU, where bfloat16 is a way to hold weights only."""
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
            scaled = grad * weight.astype("float32")
            share = paddle.matmul(scaled * x, ones) * inverse**3 / width
            grad_x = (scaled * inverse - x * share).reshape(saved.shape).astype(saved.dtype)
        return grad_x, grad_weight


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
    half = x.shape[-1] // 2
    return x * cos + paddle.concat([x[..., half:], x[..., :half]], axis=-1) * sin


class _Rotate(PyLayer):
    """A rotation is undone by the opposite angle, so the backward pass needs nothing of what was rotated."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.tables = cos, sin
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.tables
        half = grad.shape[-1] // 2
        turned = paddle.concat([grad[..., half:], grad[..., :half]], axis=-1)
        return grad * cos - turned * sin, None, None


# SwiGLU


def swiglu(gate: paddle.Tensor, up: paddle.Tensor) -> paddle.Tensor:
    """silu(gate) * up (Shazeer, 2020)."""
    if gate.shape[-2] == 1 or not on_cpu():
        return F.swiglu(gate, up)  # for one token the number of kernels counts
    return _SwiGLU.apply(gate, up) if _needs_gradient(gate, up) else _silu(gate)[0] * up


def _silu(x: paddle.Tensor) -> Tuple[paddle.Tensor, paddle.Tensor]:
    """x * sigmoid(x) and tanh(x / 2), of which sigmoid is half plus half."""
    half = x * 0.5
    turned = paddle.tanh(half)
    return half * turned + half, turned


class _SwiGLU(PyLayer):
    """Keeps its inputs only."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        ctx.fixed = gate.stop_gradient, up.stop_gradient
        return _silu(gate)[0] * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensor()
        silu, turned = _silu(gate)
        sigmoid = turned * 0.5 + 0.5
        grad_gate = None if ctx.fixed[0] else grad * up * (sigmoid + silu * (1.0 - sigmoid))
        return grad_gate, None if ctx.fixed[1] else grad * silu
