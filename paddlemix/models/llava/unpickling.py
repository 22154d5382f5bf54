"""Pickles of PyTorch (``.bin``, ``.pt``) and Paddle (``.pdparams``), read without running them.

A pickle is a small program: its opcodes push values, and some of them import a name and call it. Here an interpreter of
our own walks the opcodes. It has no way to import, to call, or to set an attribute: a name that the file asks for becomes
a mere :class:`_Name`, and a "call" of one is a look-up in a table of the few that tensors and plain containers are made
of, done by functions of this module. Any other name is refused on sight. The tensors' bytes stay in the file and are
read later, on demand.
"""

import errno
import io
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from paddlemix.errors import UserError
from paddlemix.models.llava.tensor_files import (
    FileTensor,
    JoinedTensor,
    MemoryTensor,
    StoredTensor,
    StridedTensor,
    check_strides,
    numpy_dtype,
)

__all__ = ["read_pickle", "read_pickled_tensors"]

_LAZY_BYTES = 4096  # byte strings from this length on stay in the file
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of PyTorch's format before 1.6 (torch/serialization.py)
_LEGACY_PROTOCOL = 1001

_TORCH_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_NUMPY_KINDS = {
    "f8": "float64",
    "f4": "float32",
    "f2": "float16",
    "u2": "bfloat16",  # Paddle hands bfloat16 to numpy as its bits; a checkpoint holds no other uint16
    "i8": "int64",
    "i4": "int32",
    "i2": "int16",
    "i1": "int8",
    "u1": "uint8",
    "b1": "bool",
}


class _Damaged(Exception):
    """The file is no whole pickle."""


class _Refused(Exception):
    """The file asks for something that is neither a tensor nor a plain container."""


class _Unresolved(Exception):
    """A tensor whose stored numbers PyTorch would change as it reads them: its neg or conj bit is set."""


@dataclass(frozen=True)
class _Name:
    """What an import opcode leaves on the stack; it can't do anything."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _FileBytes:
    """A long byte string that stays in the file."""

    path: Path
    offset: int
    length: int


class _DType:
    """numpy.dtype while its pickle is read: made by a call, its byte order set by a BUILD."""

    def __init__(self, kind: str):
        self.kind = kind
        self.order = "|" if kind in ("i1", "u1", "b1") else "<"


class _Array:
    """numpy.ndarray while its pickle is read: made empty by a call, filled by a BUILD."""

    tensor: Optional[StoredTensor] = None


@dataclass(frozen=True)
class _Storage:
    """A flat PyTorch storage; ``tensor`` is known at once (zip) or when the whole pickle was read (legacy)."""

    dtype: str
    key: str
    size: int


@dataclass(frozen=True)
class _TorchTensor:
    storage: _Storage
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]


class _Mark:
    pass


_MARK = _Mark()


# ---------------------------------------------------------------------------------------------------------------------
# the calls that a tensor's pickle may make, each done here


def _dict(*args: Any) -> Dict[Any, Any]:
    result: Dict[Any, Any] = {}
    if args:
        _set_items(result, [value for pair in args[0] for value in pair] if isinstance(args[0], list) else None)
    return result


def _container(kind: type) -> Callable[..., Any]:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, (list, tuple)):
            raise _Refused(f"a {kind.__name__} of a {type(items).__name__}")
        return kind(items)

    return build


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in protocol 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode to {encoding!r}")
    return text.encode("latin-1")


def _numpy_dtype(kind: Any, *_flags: Any) -> _DType:
    text = kind.decode("latin-1") if isinstance(kind, bytes) else kind
    if not isinstance(text, str) or text.lstrip("<|=") not in _NUMPY_KINDS:
        raise _Refused(f"numpy.dtype({text!r})")
    return _DType(text.lstrip("<|="))


def _numpy_array(subtype: Any, *_rest: Any) -> _Array:
    if subtype != _Name("numpy", "ndarray"):
        raise _Refused(f"an array of class {subtype}")
    return _Array()


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    """How numpy writes an array in protocol 5."""
    array = _Array()
    _fill_array(array, (1, shape, dtype, order == "F", data))
    return array


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes):
        raise _Refused("a numpy scalar that is no number")
    values = np.frombuffer(data, numpy_dtype(_NUMPY_KINDS[dtype.kind]))
    if values.size != 1:
        raise _Damaged("a numpy scalar of another size")
    return values[0].item()


def _torch_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _TorchTensor:
    if not isinstance(storage, _Storage):
        raise _Refused("a tensor without a storage")
    marks = rest[2] if len(rest) > 2 and isinstance(rest[2], dict) else {}  # beside requires_grad and hooks
    for bit in ("neg", "conj"):
        if marks.get(bit):
            raise _Unresolved(bit)
    shape, strides = _integers(shape), _integers(strides)
    if not isinstance(offset, int) or not check_strides(shape, strides, offset, storage.size):
        raise _Damaged(f"a tensor of shape {list(shape)} that its storage of {storage.size} numbers can't hold")
    return _TorchTensor(storage, offset, shape, strides)


def _torch_parameter(data: Any, *_rest: Any) -> _TorchTensor:
    if not isinstance(data, _TorchTensor):
        raise _Refused("a parameter that is no tensor")
    return data


def _torch_size(values: Any) -> Tuple[int, ...]:
    return _integers(values)


def _integers(values: Any) -> Tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or not all(type(v) is int for v in values):
        raise _Damaged("sizes that are no integers")
    return tuple(values)


_NUMPY_CALLS = {
    "multiarray._reconstruct": _numpy_array,
    "multiarray.scalar": _numpy_scalar,
    "numeric._frombuffer": _numpy_frombuffer,
}
_CALLS: Dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "builtins.dict": _dict,
    "builtins.tuple": _container(tuple),
    "builtins.list": _container(list),
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "torch.Size": _torch_size,
    "torch._utils._rebuild_tensor": _torch_tensor,
    "torch._utils._rebuild_tensor_v2": _torch_tensor,
    "torch._utils._rebuild_parameter": _torch_parameter,
    **{f"numpy.{core}.{name}": call for core in ("core", "_core") for name, call in _NUMPY_CALLS.items()},
}
_CALLS.update({f"__builtin__.{name}": _CALLS[f"builtins.{name}"] for name in ("dict", "tuple", "list")})  # Python 2
# names that are handed about but never called
_INERT = {"numpy.ndarray", *(f"torch.{name}" for name in _TORCH_STORAGES)}


def _fill_array(array: _Array, state: Any) -> None:
    """BUILD of an array: (version, shape, dtype, is_fortran, bytes)."""
    if not isinstance(state, tuple) or len(state) not in (4, 5):
        raise _Damaged("an array without its state")
    shape, dtype, fortran, data = state[-4:]
    shape = _integers(shape)
    if not isinstance(dtype, _DType):
        raise _Refused(f"an array of {type(dtype).__name__}")
    if dtype.order == ">":
        raise _Refused("an array in big-endian order")
    name = _NUMPY_KINDS[dtype.kind]
    size = int(np.prod(shape, dtype=object)) if shape else 1
    nbytes = size * numpy_dtype(name).itemsize
    if isinstance(data, str):  # a pickle of Python 2
        data = data.encode("latin-1")
    length = data.length if isinstance(data, _FileBytes) else len(data) if isinstance(data, bytes) else -1
    if min(shape, default=0) < 0 or length != nbytes:
        raise _Damaged(f"an array of shape {list(shape)} with {length} bytes")
    flat: StoredTensor
    if isinstance(data, _FileBytes):
        flat = FileTensor(data.path, data.offset, name, (size,))
    else:
        flat = MemoryTensor(np.frombuffer(data, numpy_dtype(name)), name)
    if fortran and len(shape) > 1:
        strides = np.cumprod((1, *shape[:-1])).tolist()
        array.tensor = StridedTensor(flat, 0, shape, tuple(strides))
    elif isinstance(flat, FileTensor):
        array.tensor = FileTensor(flat.path, flat.offset, name, shape)
    else:
        array.tensor = MemoryTensor(flat.array.reshape(shape), name)


def _set_items(target: Any, items: Optional[List[Any]]) -> None:
    if not isinstance(target, dict) or items is None or len(items) % 2:
        raise _Damaged("items for something that is no dictionary")
    for key, value in zip(items[::2], items[1::2]):
        if not isinstance(key, (str, bytes, int, float, type(None))):
            raise _Refused(f"a dictionary key of type {type(key).__name__}")
        target[key] = value


# ---------------------------------------------------------------------------------------------------------------------
# the interpreter

_BYTES_LENGTH = {"SHORT_BINBYTES": "<B", "BINBYTES": "<I", "BINBYTES8": "<Q", "BYTEARRAY8": "<Q"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Interpreter:
    """Runs the opcodes of one pickle from ``file`` and gives the value at its end.

    Args:
        file: positioned at the pickle's first byte; afterwards after its last.
        path: the file on disk that ``file`` is, if long byte strings may stay in it; None: they are read.
        persistent: makes a storage of a persistent id (PyTorch); None: such ids are refused.
    """

    def __init__(self, file: BinaryIO, path: Optional[Path] = None, persistent: Optional[Callable[[Any], Any]] = None):
        self.file, self.path, self.persistent = file, path, persistent
        self.stack: List[Any] = []
        self.memo: Dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            code = self.file.read(1)
            opcode = pickletools.code2op.get(code.decode("latin-1")) if code else None
            if opcode is None:
                raise _Damaged("its end is missing" if not code else f"an unknown opcode {code!r}")
            if opcode.name == "STOP":
                return self._pop()
            if opcode.name in _BYTES_LENGTH:
                self.stack.append(self._bytes(_BYTES_LENGTH[opcode.name]))
                continue
            argument = opcode.arg.reader(self.file) if opcode.arg is not None else None
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in _VALUES:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _TUPLES:
            push(tuple(self._pop_several(_TUPLES[name])))
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            push(_MARK)
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self._pop_to_mark()
        elif name == "DUP":
            push(self._top())
        elif name == "EMPTY_TUPLE":
            push(())
        elif name == "EMPTY_LIST":
            push([])
        elif name == "EMPTY_DICT":
            push({})
        elif name == "TUPLE":
            push(tuple(self._pop_to_mark()))
        elif name == "LIST":
            push(self._pop_to_mark())
        elif name == "DICT":
            items, target = self._pop_to_mark(), {}
            _set_items(target, items)
            push(target)
        elif name in ("APPEND", "APPENDS"):
            items = [self._pop()] if name == "APPEND" else self._pop_to_mark()
            if type(self._top()) is not list:
                raise _Damaged("items for something that is no list")
            self._top().extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._pop_several(2) if name == "SETITEM" else self._pop_to_mark()
            _set_items(self._top(), items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self._top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self._top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif name == "GLOBAL":
            push(self._named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            push(self._named(*self._pop_several(2)))
        elif name == "REDUCE":
            function, arguments = self._pop_several(2)
            push(self._call(function, arguments))
        elif name == "BUILD":
            state = self._pop()
            self._build(self._top(), state)
        elif name == "BINPERSID":
            if self.persistent is None:
                raise _Refused("a persistent id")
            push(self.persistent(self._pop()))
        else:  # INST, OBJ, NEWOBJ, EXT*, sets, buffers: no tensor's pickle has them
            detail = f" of {argument.replace(' ', '.')}" if name == "INST" else ""
            if name in ("NEWOBJ", "NEWOBJ_EX") and len(self.stack) > 1:
                detail = f" of {self.stack[-2]}"
            raise _Refused(f"the opcode {name}{detail}")

    def _bytes(self, length_format: str) -> Any:
        raw = self.file.read(struct.calcsize(length_format))
        (length,) = struct.unpack(length_format, raw)
        if self.path is not None and length >= _LAZY_BYTES:
            offset = self.file.tell()
            if offset + length > self.path.stat().st_size:
                raise _Damaged("it is cut short")
            self.file.seek(length, io.SEEK_CUR)
            return _FileBytes(self.path, offset, length)
        data = self.file.read(length) if length <= 1 << 31 else b""
        if len(data) != length:
            raise _Damaged("it is cut short")
        return data

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Damaged("a value is missing")
        return self.stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self.stack.pop()
        return value

    def _pop_several(self, count: int) -> List[Any]:
        values = [self._pop() for _ in range(count)]
        return values[::-1]

    def _pop_to_mark(self) -> List[Any]:
        values = []
        while self.stack:
            value = self.stack.pop()
            if value is _MARK:
                return values[::-1]
            values.append(value)
        raise _Damaged("a mark is missing")

    def _named(self, module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Damaged("an import without a name")
        full = f"{module}.{name}"
        if full not in _CALLS and full not in _INERT:
            raise _Refused(full)
        return _Name(module, name)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or str(function) not in _CALLS:
            raise _Refused(f"a call of {function if isinstance(function, _Name) else type(function).__name__}")
        if not isinstance(arguments, tuple):
            raise _Damaged("a call without arguments")
        return _CALLS[str(function)](*arguments)

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Array):
            _fill_array(target, state)
        elif isinstance(target, _DType):
            if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
                raise _Refused("a structured numpy.dtype")
            order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
            target.order = "<" if order == "=" else order
        elif isinstance(target, dict):
            pass  # PyTorch hangs `_metadata` (layer versions) on its OrderedDict; nothing here reads it
        else:
            raise _Refused(f"the state of a {target if isinstance(target, _Name) else type(target).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# the three kinds of file


def _torch_storage(saved_id: Any) -> _Storage:
    """A persistent id of PyTorch: ("storage", type, key, location, size[, view])."""
    if not isinstance(saved_id, tuple) or len(saved_id) < 5 or saved_id[0] != "storage":
        raise _Refused("a persistent id that is no storage")
    kind, key, size = saved_id[1], saved_id[2], saved_id[4]
    if not isinstance(kind, _Name) or kind.name not in _TORCH_STORAGES or not isinstance(key, str):
        raise _Refused(f"a storage of {kind}")
    if type(size) is not int or size < 0 or (len(saved_id) > 5 and saved_id[5] is not None):
        raise _Refused("a view of a storage")
    return _Storage(_TORCH_STORAGES[kind.name], key, size)


def _read_torch_zip(path: Path) -> Any:
    """PyTorch's format since 1.6: a zip of ``data.pkl`` and, uncompressed, one entry per storage."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in entries):
            raise _Refused("a zip archive that torch.save didn't write (TorchScript, or another program's)")
        root = pickles[0][: -len("data.pkl")]
        if root + "byteorder" in entries and archive.read(root + "byteorder").strip() != b"little":
            raise _Refused("numbers in big-endian order")
        value = _Interpreter(io.BytesIO(archive.read(pickles[0])), persistent=_torch_storage).run()

    def place(storage: _Storage) -> FileTensor:
        info = entries.get(f"{root}data/{storage.key}")
        if info is None:
            raise _Damaged(f"its storage {storage.key} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            raise _Refused("a compressed storage")
        return _storage_at(path, _zip_data_offset(path, info), info.file_size, storage)

    return _with_tensors(value, place)


def _zip_data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: after its local header, whose name and extra field have lengths of their own."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise _Damaged("a zip entry without its header")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name_length + extra_length


def _read_torch_legacy(path: Path) -> Any:
    """PyTorch's format before 1.6: pickles one after another, then the storages, each behind its length."""
    with open(path, "rb") as file:
        magic = _Interpreter(file).run()
        protocol = _Interpreter(file).run()
        if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
            raise _Damaged("it does not begin as torch.save writes it")
        system = _Interpreter(file).run()
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise _Refused("numbers in big-endian order")
        storages: Dict[str, _Storage] = {}

        def remember(saved_id: Any) -> _Storage:
            storage = _torch_storage(saved_id)
            return storages.setdefault(storage.key, storage)

        value = _Interpreter(file, persistent=remember).run()
        keys = _Interpreter(file).run()
        if not isinstance(keys, list) or set(keys) != set(storages):
            raise _Damaged("its list of storages does not fit")
        offsets = {}
        for key in keys:
            raw = file.read(8)
            if len(raw) != 8 or struct.unpack("<q", raw)[0] != storages[key].size:
                raise _Damaged(f"its storage {key} has another size")
            offsets[key] = file.tell()
            file.seek(storages[key].size * numpy_dtype(storages[key].dtype).itemsize, io.SEEK_CUR)
    size = path.stat().st_size
    return _with_tensors(
        value, lambda storage: _storage_at(path, offsets[storage.key], size - offsets[storage.key], storage)
    )


def _storage_at(path: Path, offset: int, available: int, storage: _Storage) -> FileTensor:
    tensor = FileTensor(path, offset, storage.dtype, (storage.size,))
    if tensor.spec.nbytes > available or offset + tensor.spec.nbytes > path.stat().st_size:
        raise _Damaged(f"its storage {storage.key} is cut short")
    return tensor


def _with_tensors(value: Any, place: Optional[Callable[[_Storage], FileTensor]] = None) -> Any:
    """The value with what stands for tensors replaced by the tensors.

    A container is replaced once, however often it is referred to: a file of a kilobyte can refer to one 2^50 times.
    """
    done: Dict[int, Any] = {}

    def replace(item: Any, depth: int) -> Any:
        if isinstance(item, (dict, list, tuple)):
            if depth > 50:
                raise _Refused("containers nested more than 50 deep")
            if id(item) not in done:
                if isinstance(item, dict):
                    done[id(item)] = {key: replace(part, depth + 1) for key, part in item.items()}
                else:
                    done[id(item)] = type(item)([replace(part, depth + 1) for part in item])
            return done[id(item)]
        if isinstance(item, _TorchTensor) and place is not None:
            flat = place(item.storage)
            if item.strides == _contiguous(item.shape):
                offset = flat.offset + item.offset * numpy_dtype(flat.dtype).itemsize
                return FileTensor(flat.path, offset, flat.dtype, item.shape)
            return StridedTensor(flat, item.offset, item.shape, item.strides)
        if isinstance(item, _Array):
            if item.tensor is None:
                raise _Damaged("an array without numbers")
            return item.tensor
        if isinstance(item, (_Name, _FileBytes, _DType, _Storage, _TorchTensor, _Mark)):
            named = item if isinstance(item, _Name) else type(item).__name__.strip("_")
            raise _Refused(f"{named} in place of a tensor")
        return item

    return replace(value, 0)


def _contiguous(shape: Sequence[int]) -> Tuple[int, ...]:
    strides: List[int] = []
    step = 1
    for length in reversed(shape):
        strides.insert(0, step)
        step *= max(length, 1)
    return tuple(strides)


# What reading a file raises where bytes of it are others than those that were written: lengths beyond all memory, a zip's flags
# and methods, offsets before its beginning.
_DAMAGE = (
    *(
        _Damaged,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        EOFError,
        OverflowError,
        MemoryError,
        RuntimeError,
        OSError,
    ),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


def read_pickle(path: Path) -> Any:
    """What a pickle of PyTorch or Paddle holds: plain containers and numbers, tensors as :class:`StoredTensor`.

    Raises:
        UserError: the file is damaged, or asks for anything else, which is named; nothing of it was run.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
        if head.startswith(b"PK"):
            return _read_torch_zip(path)
        if head.startswith(b"\x80\x02\x8a\x0a") and struct.pack("<Q", _LEGACY_MAGIC & (1 << 64) - 1) in head:
            return _read_torch_legacy(path)
        with open(path, "rb") as file:
            return _with_tensors(_Interpreter(file, path).run())
    except _Unresolved as error:
        raise UserError(
            f"{path} holds a tensor with PyTorch's {error} bit, which is no plain copy of its numbers; save what its "
            f"resolve_{error}() gives."
        ) from error
    except _Refused as refused:
        raise UserError(
            f"{path} asks for {refused}, which is neither a tensor nor a plain container; it was refused and nothing "
            "of the file was run. Get the weights as safetensors, or from a source that you trust."
        ) from refused
    except RecursionError as error:
        raise UserError(f"{path} nests its containers too deep to be a checkpoint; it was refused.") from error
    except _DAMAGE as error:
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        raise UserError(f"{path} is not a whole checkpoint file ({error}); fetch it again.") from error


def read_pickled_tensors(path: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of a pickled state dict.

    Takes Paddle's variants too: (parameter name, array) in place of an array, its table of parameter names, and
    tensors of more than 1 GiB cut into pieces.
    """
    value = read_pickle(path)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected a dictionary of named tensors.")
    value = dict(value)
    value.pop("StructuredToParameterName@@", None)
    pieces = value.pop("UnpackBigParamInfor@@", None)
    if isinstance(pieces, dict):
        for name, info in pieces.items():
            try:
                parts = tuple(value.pop(piece) for piece in info["slices"])
                shape = tuple(int(n) for n in info["OriginShape"])
            except (KeyError, TypeError) as error:
                raise UserError(f"{path} is not whole: it lacks pieces of {name}; fetch it again.") from error
            joined = JoinedTensor(parts, shape)
            if not all(isinstance(part, StoredTensor) for part in parts) or sum(p.size for p in parts) != joined.size:
                raise UserError(f"{path} is not whole: the pieces of {name} don't make {list(shape)}; fetch it again.")
            value[name] = joined
    tensors: Dict[str, StoredTensor] = {}
    for name, item in value.items():
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], StoredTensor):
            item = item[1]
        if isinstance(name, str) and isinstance(item, StoredTensor):
            tensors[name] = item
        else:
            raise UserError(f"{path} holds a {type(item).__name__} under {name!r}; expected named tensors only.")
    return tensors
