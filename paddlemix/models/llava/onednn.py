"""Products on a CPU by oneDNN, the library that Paddle's wheel carries, over the memory of Paddle's tensors.

Paddle's own products go through MKL, which for two to a hundred rows takes up to twice as long, and has none in bfloat16.
oneDNN adds the bias, the activation or a second operand while the results are in the registers. Its C API is called by
ctypes (https://uxlfoundation.github.io/oneDNN, version 3); where it is missing or does not compute what it should,
:func:`products` is None and Paddle takes over. It runs on the threads of Paddle's OpenMP, so that the two never compete.
"""

import ctypes
import logging
import os
import threading
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Dict, Optional, Tuple

import numpy as np
import paddle

__all__ = ["Products", "have_bfloat16", "keep_to_one_thread", "multiplies_in_bfloat16", "products", "widen"]

logger = logging.getLogger("paddlemix.onednn")

# of dnnl_types.h
_CPU, _IN_ORDER = 1, 1
_TYPES = {"bfloat16": 2, "float32": 3}
_SWISH, _MULTIPLY, _SOFTMAX, _TRAINING, _INFERENCE = 0x2C, 0x1FFF1, 0x30000, 64, 96
_SOURCE, _SOURCE_1, _RESULT, _WEIGHTS, _BIAS, _FIRST_POST_OP = 1, 2, 17, 33, 41, 32768
_SOURCE_GRADIENT, _RESULT_GRADIENT = 129, 145
_BFLOAT16_UNITS = (
    0x80  # of dnnl_cpu_isa_t: AVX512_BF16; without it oneDNN imitates bfloat16 and takes longer than in float32
)

KEPT = 256  # primitives; each is a kernel for one shape


class _Version(ctypes.Structure):
    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int), ("hash", c_char_p)]


class _Argument(ctypes.Structure):
    _fields_ = [("argument", c_int), ("memory", c_void_p)]


_ELTWISE = [c_void_p, c_void_p, c_float, c_float]  # two layouts, alpha and beta
_SIGNATURES = {
    "dnnl_get_effective_cpu_isa": [],
    "dnnl_engine_create": [POINTER(c_void_p), c_int, c_size_t],
    "dnnl_stream_create": [POINTER(c_void_p), c_void_p, c_int],
    "dnnl_engine_destroy": [c_void_p],
    "dnnl_set_primitive_cache_capacity": [c_int],
    "dnnl_stream_destroy": [c_void_p],
    "dnnl_memory_desc_create_with_strides": [
        POINTER(c_void_p),
        c_int,
        POINTER(c_int64),
        c_int,
        POINTER(c_int64),
    ],
    "dnnl_memory_desc_destroy": [c_void_p],
    "dnnl_memory_create": [POINTER(c_void_p), c_void_p, c_void_p, c_void_p],
    "dnnl_memory_set_data_handle": [c_void_p, c_void_p],
    "dnnl_memory_destroy": [c_void_p],
    "dnnl_post_ops_create": [POINTER(c_void_p)],
    "dnnl_post_ops_destroy": [c_void_p],
    "dnnl_post_ops_append_sum": [c_void_p, c_float, c_int, c_int],
    "dnnl_post_ops_append_eltwise": [c_void_p, c_int, c_float, c_float],
    "dnnl_post_ops_append_binary": [c_void_p, c_int, c_void_p],
    "dnnl_primitive_attr_create": [POINTER(c_void_p)],
    "dnnl_primitive_attr_set_post_ops": [c_void_p, c_void_p],
    "dnnl_primitive_attr_destroy": [c_void_p],
    "dnnl_matmul_primitive_desc_create": [POINTER(c_void_p), *[c_void_p] * 6],
    "dnnl_softmax_forward_primitive_desc_create": [
        POINTER(c_void_p),
        c_void_p,
        c_int,
        c_int,
        c_void_p,
        c_void_p,
        c_int,
        c_void_p,
    ],
    "dnnl_eltwise_forward_primitive_desc_create": [POINTER(c_void_p), c_void_p, c_int, c_int, *_ELTWISE, c_void_p],
    "dnnl_eltwise_backward_primitive_desc_create": [
        POINTER(c_void_p),
        c_void_p,
        c_int,
        c_void_p,
        *_ELTWISE,
        *[c_void_p] * 2,
    ],
    "dnnl_reorder_primitive_desc_create": [POINTER(c_void_p), *[c_void_p] * 5],
    "dnnl_primitive_create": [POINTER(c_void_p), c_void_p],
    "dnnl_primitive_desc_destroy": [c_void_p],
    "dnnl_primitive_destroy": [c_void_p],
    "dnnl_primitive_execute": [c_void_p, c_void_p, c_int, c_void_p],
}


class _Kernel:
    """A primitive with its arguments, whose addresses are put in before each execution."""

    def __init__(self, library, engine, stream):
        self._library, self._engine, self._stream = library, engine, stream
        self._primitive, self._memories, self._descriptors = None, [], []
        self._arguments = None

    def descriptor(
        self, rows: int, columns: int, dtype: str, turned: bool = False, stride: Optional[int] = None
    ) -> c_void_p:
        made, sizes = c_void_p(), (c_int64 * 2)(rows, columns)
        strides = (c_int64 * 2)(*((1, stride or rows) if turned else (stride or columns, 1)))
        _check(self._library.dnnl_memory_desc_create_with_strides(byref(made), 2, sizes, _TYPES[dtype], strides))
        self._descriptors.append(made)
        return made

    def finish(self, descriptor: c_void_p, roles: Dict[int, c_void_p]) -> "_Kernel":
        """Makes the primitive; ``roles`` says what lies behind each argument."""
        library, self._primitive = self._library, c_void_p()
        try:
            _check(library.dnnl_primitive_create(byref(self._primitive), descriptor))
        finally:
            library.dnnl_primitive_desc_destroy(descriptor)
        for layout in roles.values():
            memory = c_void_p()
            _check(library.dnnl_memory_create(byref(memory), layout, self._engine, None))
            self._memories.append(memory)
        self._arguments = (_Argument * len(roles))(*zip(roles, self._memories))
        return self

    def __call__(self, *addresses: int) -> None:
        library = self._library
        for memory, address in zip(self._memories, addresses):
            library.dnnl_memory_set_data_handle(memory, address)
        _check(library.dnnl_primitive_execute(self._primitive, self._stream, len(self._memories), self._arguments))

    def __del__(self):
        for memory in self._memories:
            self._library.dnnl_memory_destroy(memory)
        for descriptor in self._descriptors:
            self._library.dnnl_memory_desc_destroy(descriptor)
        if self._primitive:
            self._library.dnnl_primitive_destroy(self._primitive)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"oneDNN refuses, with status {status}")


class Products:
    """oneDNN's kernels for one thread of Python, which must be the one that calls."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        self._engine, self._stream = c_void_p(), c_void_p()
        _check(library.dnnl_engine_create(byref(self._engine), _CPU, 0))
        _check(library.dnnl_stream_create(byref(self._stream), self._engine, _IN_ORDER))
        self.have_bfloat16 = library.have_bfloat16
        self._kernels: Dict[Tuple, _Kernel] = {}

    def __del__(self):
        self._kernels = {}
        self._library.dnnl_stream_destroy(self._stream)
        self._library.dnnl_engine_destroy(self._engine)

    def __call__(
        self,
        x: int,
        weight: int,
        result: int,
        rows: int,
        inner: int,
        outer: int,
        dtype: str = "float32",
        *,
        turned: bool = False,
        x_turned: bool = False,
        bias: Optional[int] = None,
        bias_dtype: Optional[str] = None,
        swish: Optional[float] = None,
        factor: Optional[int] = None,
        add: bool = False,
    ) -> None:
        """x [rows, inner] times weight [inner, outer] into result [rows, outer], which is float32; all given by address.

        Args:
            dtype: of x and weight.
            turned: weight lies in memory as [outer, inner].
            x_turned: x lies in memory as [inner, rows].
            bias: [outer] of ``bias_dtype``, by default ``dtype``, which is added.
            swish: a number a: each result r becomes r * sigmoid(a * r).
            factor: [rows, outer] in float32, by which the results are multiplied.
            add: the results are added to what is in ``result``.
        """
        if rows > 64 and rows % 16 == 1 and not x_turned:
            # A row more than full blocks costs a third of the time where oneDNN finds no even share, as with the 577 tokens
            # of a picture of 336 pixels.
            whole, options = rows - 1, {"turned": turned, "bias": bias, "swish": swish, "add": add}
            options["bias_dtype"] = bias_dtype
            self(x, weight, result, whole, inner, outer, dtype, factor=factor, **options)
            x, result = x + whole * inner * (2 if dtype == "bfloat16" else 4), result + 4 * whole * outer
            factor = None if factor is None else factor + 4 * whole * outer
            self(x, weight, result, 1, inner, outer, dtype, factor=factor, **options)
            return
        kind = None if bias is None else bias_dtype or dtype
        shape = rows, inner, outer, dtype, turned, x_turned, kind, swish, factor is not None, add
        kernel = self._kernel("_matmul", *shape)
        kernel(*(each for each in (x, weight, result, bias, factor) if each is not None))

    def softmax(self, x: int, rows: int, columns: int) -> None:
        """x [rows, columns] of float32, in place, along its columns."""
        self._kernel("_softmax", rows, columns)(x, x)

    def swish(self, x: int, result: int, size: int, alpha: float) -> None:
        """x [size] of float32 times sigmoid(alpha * x), into ``result``, which may be x."""
        self._kernel("_swish", size, alpha)(x, result)

    def swish_back(self, x: int, grad: int, result: int, size: int, alpha: float) -> None:
        """``grad`` [size] times the slope of :meth:`swish` at ``x``, into ``result``, which may be ``grad``."""
        self._kernel("_swish_back", size, alpha)(x, grad, result)

    def narrow(self, x: int, result: int, size: int) -> None:
        """x [size] of float32 to the nearest numbers of bfloat16, in ``result``."""
        self._kernel("_reorder", size)(x, result)

    def turn(self, x: int, result: int, rows: int, columns: int, stride: int, dtype: str = "float32") -> None:
        """x [rows, columns] into ``result`` [columns, rows], whose rows are ``stride`` numbers apart."""
        self._kernel("_turn", rows, columns, stride, dtype)(x, result)

    def _kernel(self, *key) -> _Kernel:
        """What the method that is named first makes of the rest; made once, while there are no more than KEPT."""
        kernel = self._kernels.get(key)
        if kernel is None:
            if len(self._kernels) >= KEPT:
                self._kernels.clear()
            kernel = self._kernels[key] = getattr(self, key[0])(*key[1:])
        return kernel

    def _matmul(self, rows, inner, outer, dtype, turned, x_turned, bias, swish, factor, add) -> _Kernel:
        library = self._library
        kernel = _Kernel(library, self._engine, self._stream)
        x, result = kernel.descriptor(rows, inner, dtype, x_turned), kernel.descriptor(rows, outer, "float32")
        roles = {_SOURCE: x, _WEIGHTS: kernel.descriptor(inner, outer, dtype, turned), _RESULT: result}
        if bias:
            roles[_BIAS] = kernel.descriptor(1, outer, bias)
        operations, attributes, made = c_void_p(), c_void_p(), c_void_p()
        _check(library.dnnl_post_ops_create(byref(operations)))
        _check(library.dnnl_primitive_attr_create(byref(attributes)))
        try:
            if add:
                _check(library.dnnl_post_ops_append_sum(operations, 1.0, 0, 0))
            if swish is not None:
                _check(library.dnnl_post_ops_append_eltwise(operations, _SWISH, swish, 0.0))
            if factor:
                roles[(1 + add + (swish is not None)) * _FIRST_POST_OP | _SOURCE_1] = result
                _check(library.dnnl_post_ops_append_binary(operations, _MULTIPLY, result))
            _check(library.dnnl_primitive_attr_set_post_ops(attributes, operations))
            layouts = x, roles[_WEIGHTS], roles.get(_BIAS), result
            _check(library.dnnl_matmul_primitive_desc_create(byref(made), self._engine, *layouts, attributes))
        finally:
            library.dnnl_post_ops_destroy(operations)
            library.dnnl_primitive_attr_destroy(attributes)
        return kernel.finish(made, roles)

    def _softmax(self, rows: int, columns: int) -> _Kernel:
        kernel, made = _Kernel(self._library, self._engine, self._stream), c_void_p()
        layout = kernel.descriptor(rows, columns, "float32")
        create = self._library.dnnl_softmax_forward_primitive_desc_create
        _check(create(byref(made), self._engine, _INFERENCE, _SOFTMAX, layout, layout, 1, None))
        return kernel.finish(made, {_SOURCE: layout, _RESULT: layout})

    def _swish(self, size: int, alpha: float) -> _Kernel:
        kernel = _Kernel(self._library, self._engine, self._stream)
        layout = kernel.descriptor(1, size, "float32")
        return kernel.finish(self._eltwise(layout, alpha, _INFERENCE), {_SOURCE: layout, _RESULT: layout})

    def _swish_back(self, size: int, alpha: float) -> _Kernel:
        library = self._library
        kernel, made = _Kernel(library, self._engine, self._stream), c_void_p()
        layout = kernel.descriptor(1, size, "float32")
        forward = self._eltwise(layout, alpha, _TRAINING)
        create = library.dnnl_eltwise_backward_primitive_desc_create
        try:
            _check(create(byref(made), self._engine, _SWISH, *[layout] * 3, alpha, 0.0, forward, None))
        finally:
            library.dnnl_primitive_desc_destroy(forward)
        return kernel.finish(made, {_SOURCE: layout, _RESULT_GRADIENT: layout, _SOURCE_GRADIENT: layout})

    def _eltwise(self, layout: c_void_p, alpha: float, purpose: int) -> c_void_p:
        made = c_void_p()
        create = self._library.dnnl_eltwise_forward_primitive_desc_create
        _check(create(byref(made), self._engine, purpose, _SWISH, layout, layout, alpha, 0.0, None))
        return made

    def _reorder(self, size: int) -> _Kernel:
        kernel = _Kernel(self._library, self._engine, self._stream)
        return self._move(kernel, kernel.descriptor(1, size, "float32"), kernel.descriptor(1, size, "bfloat16"))

    def _turn(self, rows: int, columns: int, stride: int, dtype: str) -> _Kernel:
        kernel = _Kernel(self._library, self._engine, self._stream)
        given = kernel.descriptor(columns, rows, dtype, turned=True)
        return self._move(kernel, given, kernel.descriptor(columns, rows, dtype, stride=stride))

    def _move(self, kernel: _Kernel, given: c_void_p, wanted: c_void_p) -> _Kernel:
        engine, made = self._engine, c_void_p()
        _check(self._library.dnnl_reorder_primitive_desc_create(byref(made), given, engine, wanted, engine, None))
        return kernel.finish(made, {_SOURCE: given, _RESULT: wanted})


# finding it

_threads = threading.local()
_library: Optional[ctypes.CDLL] = None
_looked = False
_lock = threading.Lock()


def products() -> Optional[Products]:
    """The calling thread's; None where oneDNN can't be had."""
    try:
        return _threads.products
    except AttributeError:
        library = _find()
        if library is not None:
            _use_paddles_threads()
        _threads.products = None if library is None else Products(library)
        return _threads.products


def have_bfloat16() -> bool:
    """Whether weights in bfloat16 can be multiplied on this CPU."""
    kernels = products()
    return kernels is not None and kernels.have_bfloat16


def multiplies_in_bfloat16() -> bool:
    """Whether this CPU has instructions for such products, so that they take less time than those in float32."""
    return have_bfloat16() and bool(_library.dnnl_get_effective_cpu_isa() & _BFLOAT16_UNITS)


def _find() -> Optional[ctypes.CDLL]:
    """The library, loaded once, if it computes what it should."""
    global _library, _looked
    with _lock:
        if not _looked:
            try:
                library = _load()
                compute = Products(library)
                _try_out(compute)
                library.have_bfloat16 = _has_bfloat16(compute)
                _library = library
            except (OSError, AttributeError, RuntimeError) as error:
                logger.info("Products go through Paddle: oneDNN can't be used here (%s).", error)
            _looked = True
    return _library


def _folder() -> Path:
    return Path(paddle.__file__).parent / "libs"


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_folder() / "libdnnl.so.3"))
    library.dnnl_version.restype = POINTER(_Version)
    version = library.dnnl_version().contents
    if version.major != 3:
        raise OSError(f"version {version.major}.{version.minor}, not 3")
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.have_bfloat16 = False
    library.dnnl_set_primitive_cache_capacity(KEPT)  # its own 1024 would hold what ours has let go
    return library


def keep_to_one_thread() -> None:
    """For a thread of Python that works beside others, before it first asks for :func:`products`."""
    _threads.alone = True


def _use_paddles_threads() -> None:
    """As many as Paddle uses. Paddle's OpenMP counts for oneDNN too, and Paddle sets it to one at its import."""
    names = "FLAGS_paddle_num_threads", "MKL_NUM_THREADS", "OMP_NUM_THREADS"
    threads = next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), "1")
    threads = "1" if getattr(_threads, "alone", False) else threads
    try:
        ctypes.CDLL(str(_folder() / "libiomp5.so")).omp_set_num_threads(int(threads))
    except (OSError, AttributeError) as error:
        logger.info("oneDNN's number of threads stays as it is (%s).", error)


def _try_out(compute: Products) -> None:
    """Holds each kind of kernel against NumPy; numbers of its types may change between versions."""
    rng = np.random.default_rng(0)
    x, weight, other = (rng.standard_normal(shape, np.float32) for shape in ((3, 32), (32, 16), (3, 16)))
    bias, places = other[0].copy(), [each.ctypes.data for each in (x, weight, other)]
    right = x @ weight

    def differs(expected, **options) -> bool:
        result = other.copy()
        compute(*places[:2], result.ctypes.data, 3, 32, 16, **options)
        return not np.allclose(result, expected, atol=1e-4)

    swish, turned = right / (1 + np.exp(-1.5 * right)), np.ascontiguousarray(x.T)
    shares, powers = other.copy(), np.exp(other)
    compute.softmax(shares.ctypes.data, *shares.shape)
    swished, slope, sigmoid = np.empty_like(other), other.copy(), 1 / (1 + np.exp(-1.5 * other))
    compute.swish(places[2], swished.ctypes.data, other.size, 1.5)
    compute.swish_back(places[2], slope.ctypes.data, slope.ctypes.data, other.size, 1.5)
    from_turned, laid = np.empty_like(right), np.zeros((16, 5), np.float32)
    compute.turn(places[2], laid.ctypes.data, 3, 16, 5)
    compute(turned.ctypes.data, places[1], from_turned.ctypes.data, 3, 32, 16, x_turned=True)
    wrong = (
        not np.allclose(shares, powers / powers.sum(1, keepdims=True), atol=1e-5),
        not np.allclose(swished, other * sigmoid, atol=1e-5),
        not np.allclose(slope, other * sigmoid * (1 + 1.5 * other * (1 - sigmoid)), atol=1e-5),
        not np.allclose(from_turned, right, atol=1e-4),
        not np.array_equal(laid[:, :3], other.T) or laid[:, 3:].any(),
        differs(right),
        differs(right + bias, bias=bias.ctypes.data),
        differs(right + other, add=True),
        differs(swish, swish=1.5),
        differs(right * other, factor=places[2]),
        differs(swish * other, swish=1.5, factor=places[2]),
    )
    if any(wrong):
        raise RuntimeError(f"kinds {np.flatnonzero(wrong).tolist()} of kernels come out wrong")


def _has_bfloat16(compute: Products) -> bool:
    """Whether numbers of 16 bits are rounded and multiplied as they should, in every way; not every processor can."""
    rng = np.random.default_rng(1)
    wide = [rng.standard_normal(shape, np.float32) for shape in ((3, 32), (32, 16), (1, 16))]
    narrow, factor = [np.empty(each.shape, np.uint16) for each in wide], rng.standard_normal((3, 16), np.float32)

    def product(weight, x=narrow[0], **options) -> np.ndarray:
        result = factor.copy()
        compute(x.ctypes.data, weight.ctypes.data, result.ctypes.data, 3, 32, 16, "bfloat16", **options)
        return result

    try:
        for one, other in zip(wide, narrow):
            compute.narrow(one.ctypes.data, other.ctypes.data, one.size)
        x, weight, bias = (widen(each) for each in narrow)
        right, turned = x @ weight, np.ascontiguousarray(narrow[1].T)
        swish = right / (1 + np.exp(-1.5 * right))
        pairs = (
            (product(turned, turned=True), right),
            (product(narrow[1], np.ascontiguousarray(narrow[0].T), x_turned=True), right),
            (product(narrow[1], bias=narrow[2].ctypes.data), right + bias),
            (product(narrow[1], bias=wide[2].ctypes.data, bias_dtype="float32"), right + wide[2]),
            (product(narrow[1], add=True), right + factor),
            (product(narrow[1], swish=1.5), swish),
            (product(narrow[1], factor=factor.ctypes.data), right * factor),
        )
    except RuntimeError:
        return False
    rounded = all(np.allclose(one, other, rtol=2**-8) for one, other in zip((x, weight, bias), wide))
    return rounded and all(np.allclose(one, other, atol=1e-3) for one, other in pairs)


def widen(halves: np.ndarray) -> np.ndarray:
    """Numbers of bfloat16, given as uint16, in float32, of which they are the upper halves."""
    return (halves.astype(np.uint32) << 16).view(np.float32)
