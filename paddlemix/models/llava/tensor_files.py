"""Tensors on disk, read piece by piece: safetensors files, PyTorch's ``.bin`` and Paddle's ``.pdparams``, sharded or not.

A :class:`StoredTensor` knows its dtype and shape at once and its numbers only when asked, so that a checkpoint of any
size passes through a few megabytes of memory. Pickles are opened by ``unpickling.py``, which runs nothing.
"""

import json
import math
import mmap
import os
import struct
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from paddlemix.errors import UserError, naming

__all__ = [
    "StoredTensor",
    "FileTensor",
    "JoinedTensor",
    "MemoryTensor",
    "Source",
    "StridedTensor",
    "TensorSpec",
    "convert",
    "empty",
    "fill",
    "find_weights",
    "numpy_dtype",
    "open_tensor_file",
    "open_weights",
    "read_json",
    "write_aside",
    "write_json",
    "write_safetensors",
    "write_weights",
]

# numpy has no bfloat16: its bits travel as uint16, and the dtype's name beside them
_NUMPY_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_SAFETENSORS_NAMES = {name: code for code, name in _SAFETENSORS_DTYPES.items()}
FLOAT_DTYPES = ("float64", "float32", "float16", "bfloat16")

_CHUNK_BYTES = 2 << 20  # one piece of a tensor while it is converted
# bytes; memory begins at one, as vector instructions and Paddle's own allocator have it, and so much of each row is written
# at once where a tensor is transposed
_CACHE_LINE = 64
_MAP_BYTES = (
    1 << 20
)  # tensors from this size on, in files from the next on, are mapped where they can be used as they lie
_MAP_FILE_BYTES = 64 << 20
_MAX_HEADER_BYTES = 100 << 20  # the safetensors format's own bound
_LFS_POINTER = b"version https://git-lfs"

# Weights in the order in which they are looked for: an index of shards goes before a single file, safetensors before pickles.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "model_state.pdparams.index.json",
    "model_state.pdparams",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def numpy_dtype(dtype: str) -> np.dtype:
    """The numpy dtype whose bits hold ``dtype`` (uint16 for bfloat16)."""
    return np.dtype(_NUMPY_DTYPES[dtype])


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor is without its numbers."""

    dtype: str
    shape: Tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * numpy_dtype(self.dtype).itemsize


class StoredTensor:
    """A tensor whose numbers are read on demand; ``dtype`` is a name such as ``bfloat16``, ``shape`` a tuple."""

    dtype: str
    shape: Tuple[int, ...]

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fills the 1-D ``out`` (``numpy_dtype(self.dtype)``) with the elements from ``start`` on, in C order."""
        raise NotImplementedError

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.dtype, self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """The whole tensor, in its stored dtype (bfloat16 as uint16 bits)."""
        out = np.empty(self.size, numpy_dtype(self.dtype))
        self.read_into(out, 0)
        return out.reshape(self.shape)


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from: the stored tensor, its published name, and whether its axes are swapped."""

    tensor: StoredTensor
    published: str
    transpose: bool

    @property
    def shape(self) -> Tuple[int, ...]:
        return self.tensor.shape[::-1] if self.transpose else self.tensor.shape


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor that lies in one piece, in C order and little-endian, at ``offset`` bytes of a file."""

    path: Path
    offset: int
    dtype: str
    shape: Tuple[int, ...]

    def read_into(self, out: np.ndarray, start: int) -> None:
        view = memoryview(out).cast("B") if out.size else memoryview(b"")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start * out.itemsize)
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise UserError(
                        f"{self.path} ends in the middle of a tensor; the file is cut short, fetch it again."
                    )
                done += count

    def map(self, maps: Dict[Path, mmap.mmap]) -> Optional[np.ndarray]:
        """The tensor as a private, writable map of the file: no bytes are read before they are used.

        Writing to it copies the page and leaves the file alone. The file must not be overwritten in place meanwhile; all
        that this package writes is renamed into place.

        Args:
            maps: path -> map, kept by the caller so that tensors of one file share it.

        Returns:
            None where a copy does as well or better: small tensors or files, unaligned ones, systems without such maps.
        """
        kind = numpy_dtype(self.dtype)
        if os.name != "posix" or self.spec.nbytes < _MAP_BYTES or self.offset % kind.itemsize:
            return None
        if self.path not in maps:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < _MAP_FILE_BYTES:
                    return None
                maps[self.path] = mmap.mmap(
                    file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
                )
            if hasattr(mmap, "MADV_WILLNEED"):
                maps[self.path].madvise(mmap.MADV_WILLNEED)
        if self.offset + self.spec.nbytes > len(maps[self.path]):
            raise UserError(f"{self.path} ends in the middle of a tensor; the file is cut short, fetch it again.")
        return np.frombuffer(maps[self.path], kind, self.size, self.offset).reshape(self.shape)


@dataclass(frozen=True)
class MemoryTensor(StoredTensor):
    """A tensor that is already in memory (small ones inside pickles, or computed)."""

    array: np.ndarray
    dtype: str = ""

    def __post_init__(self):
        if not self.dtype:
            object.__setattr__(self, "dtype", str(self.array.dtype))

    @property
    def shape(self) -> Tuple[int, ...]:
        return tuple(self.array.shape)

    def read_into(self, out: np.ndarray, start: int) -> None:
        out[...] = self.array.reshape(-1)[start : start + out.size]


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """A view with strides (in elements) on a flat storage, as PyTorch writes for a transposed tensor."""

    storage: StoredTensor
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        last = (
            self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides)) if self.size else self.offset - 1
        )
        flat = np.empty(last + 1 - self.offset, out.dtype)
        self.storage.read_into(flat, self.offset)
        view = np.lib.stride_tricks.as_strided(
            flat, self.shape, [s * flat.itemsize for s in self.strides], writeable=False
        )
        out[...] = view.reshape(-1)[start : start + out.size]


@dataclass(frozen=True)
class JoinedTensor(StoredTensor):
    """Flat pieces that together make one tensor (Paddle's format for tensors of more than 1 GiB)."""

    parts: Tuple[StoredTensor, ...]
    shape: Tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def read_into(self, out: np.ndarray, start: int) -> None:
        stop, begin = start + out.size, 0
        for part in self.parts:
            low, high = max(start, begin), min(stop, begin + part.size)
            if low < high:
                part.read_into(out[low - start : high - start], low - begin)
            begin += part.size


# ---------------------------------------------------------------------------------------------------------------------
# numbers from one dtype and order to another


def convert(values: np.ndarray, source: str, target: str, out: Optional[np.ndarray] = None) -> np.ndarray:
    """``values`` of dtype ``source`` as dtype ``target``; to bfloat16 it rounds to nearest, ties to even.

    Args:
        values: numbers in ``numpy_dtype(source)``.
        out: where to put them, of the same shape and ``numpy_dtype(target)``; a new array if None.
    """
    if out is None:
        out = np.empty(values.shape, numpy_dtype(target))
    if source == target:
        out[...] = values
    elif source == "bfloat16" and target == "float32":
        np.left_shift(values, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    elif source == "bfloat16":
        out[...] = convert(values, source, "float32")
    elif target == "bfloat16":
        bits = values.astype(np.float32, copy=False).view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        # rounding would carry the payload of some NaNs into an infinity: they keep a quiet bit instead
        out[...] = np.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
    else:
        out[...] = values
    return out


_scratch = threading.local()


def _buffer(dtype: np.dtype, size: int) -> np.ndarray:
    """A reused piece of memory of this thread: fresh pages for every chunk would cost more than the reading."""
    buffers = _scratch.__dict__.setdefault("buffers", {})
    if dtype not in buffers or buffers[dtype].size < size:
        buffers[dtype] = np.empty(max(size, _CHUNK_BYTES // dtype.itemsize), dtype)
    return buffers[dtype][:size]


def empty(shape: Tuple[int, ...], dtype: str) -> np.ndarray:
    """Fresh memory that begins at a cache line; products take up to twice as long where a matrix doesn't."""
    nbytes = TensorSpec(dtype, tuple(shape)).nbytes
    raw = np.empty(nbytes + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return raw[start : start + nbytes].view(numpy_dtype(dtype)).reshape(shape)


def fill(out: np.ndarray, dtype: str, tensor: StoredTensor, transpose: bool = False) -> None:
    """Writes a stored tensor into ``out``, converted to ``dtype``, a few megabytes at a time.

    Args:
        out: C-contiguous array of the target's shape in ``numpy_dtype(dtype)``.
        tensor: of the same shape, or [O, I] for ``out`` [I, O] if ``transpose``.
    """
    if isinstance(tensor, StridedTensor):  # whose every piece takes all of the storage
        tensor = MemoryTensor(tensor.read(), tensor.dtype)
    stored = numpy_dtype(tensor.dtype)
    if transpose:
        rows, columns = tensor.shape
        tile = _CACHE_LINE // out.itemsize
        step = max(tile, _CHUNK_BYTES // max(1, columns * stored.itemsize) // tile * tile)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            piece = _buffer(stored, count * columns)
            tensor.read_into(piece, start * columns)
            piece = piece.reshape(count, columns)
            if tensor.dtype != dtype:
                piece = convert(piece, tensor.dtype, dtype)
            _turn_into(out, start, piece, dtype)
        return
    flat = out.reshape(-1)
    if tensor.dtype == dtype:
        tensor.read_into(flat, 0)
        return
    step = _CHUNK_BYTES // stored.itemsize
    for start in range(0, flat.size, step):
        piece = _buffer(stored, min(step, flat.size - start))
        tensor.read_into(piece, start)
        convert(piece, tensor.dtype, dtype, out=flat[start : start + piece.size])


def _turn_into(out: np.ndarray, start: int, piece: np.ndarray, dtype: str) -> None:
    """Writes ``piece`` [N, I] turned to columns ``start`` to ``start`` + N of ``out`` [I, O]."""
    kernels = None  # who has not loaded Paddle, as when files are converted, does without
    if dtype in ("float32", "bfloat16") and "paddle" in sys.modules and piece.size:
        from paddlemix.models.llava.onednn import products

        kernels = products()
    if kernels is not None and (dtype == "float32" or kernels.have_bfloat16):
        place = out.ctypes.data + start * out.itemsize
        kernels.turn(piece.ctypes.data, place, *piece.shape, out.shape[1], dtype)
        return
    tile = _CACHE_LINE // out.itemsize
    for row in range(0, len(piece), tile):
        out[:, start + row : start + row + tile] = piece[row : row + tile].T


# ---------------------------------------------------------------------------------------------------------------------
# reading files


def read_json(path: Path) -> Dict[str, Any]:
    """A JSON object from a file; UserError if it is missing, broken, a Git LFS pointer, or not an object."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"Can't read {path}: {error.strerror or error}.") from error
    if raw.startswith(_LFS_POINTER):
        raise UserError(_lfs_message(path))
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of json, and of the bytes' encoding
        raise UserError(f"{path} is not valid JSON ({error}); fetch or write the file again.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}; expected an object.")
    return values


def _lfs_message(path: Path) -> str:
    return f"{path} is a Git LFS pointer, not the file itself; fetch the weights with `git lfs pull`."


def _check_present(path: Path) -> int:
    """Size of a weights file in bytes; UserError if it is missing, empty or a Git LFS pointer."""
    if not path.is_file():
        raise UserError(f"{path} is missing; the checkpoint is not whole, fetch that file too.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(_lfs_message(path))
    if size == 0:
        raise UserError(f"{path} is empty; fetch the file again.")
    return size


def read_safetensors(path: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file; only the header is read.

    The format: 8 bytes with the header's length, the header as JSON, then the tensors' bytes
    (https://github.com/huggingface/safetensors#format). The library's numpy reader has no bfloat16.
    """
    size = _check_present(path)
    damaged = f"{path} is not a whole safetensors file"
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
            raise UserError(f"{damaged}: its {size} bytes can't hold its header; fetch the file again.")
        raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"))
        header.pop("__metadata__", None)
        entries = [(name, *_header_entry(name, entry)) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{damaged}: its header can't be read ({error}); fetch the file again.") from error
    start, tensors = 8 + length, {}
    for name, code, shape, begin, end in entries:
        if code not in _SAFETENSORS_DTYPES:
            raise UserError(
                f"{path} holds {name} as {code}; expected plain numbers ({', '.join(_SAFETENSORS_NAMES)}), "
                "quantised weights are not supported."
            )
        tensor = FileTensor(path, start + begin, _SAFETENSORS_DTYPES[code], shape)
        if end - begin != tensor.spec.nbytes:
            raise UserError(f"{damaged}: {name} of shape {list(shape)} is given {end - begin} bytes; fetch it again.")
        if start + end > size:
            raise UserError(
                f"{damaged}: it has {size} bytes and {name} reaches to {start + end}; the file is cut short, fetch it again."
            )
        tensors[name] = tensor
    in_order = sorted((tensor for tensor in tensors.items() if tensor[1].size), key=lambda item: item[1].offset)
    for (name, tensor), (following, after) in zip(in_order, in_order[1:]):
        if tensor.offset + tensor.spec.nbytes > after.offset:
            raise UserError(f"{damaged}: {name} and {following} lie on the same bytes; fetch the file again.")
    return tensors


def _header_entry(name: str, entry: Any) -> Tuple[str, Tuple[int, ...], int, int]:
    """dtype, shape, and where the bytes begin and end, of a tensor in a safetensors header."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    counts = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not isinstance(dtype, str) or not counts or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        raise ValueError(f"{name} is {str(entry):.80}, expected a dtype, a list of sizes and two offsets")
    return dtype, tuple(shape), offsets[0], offsets[1]


def open_tensor_file(path: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of one file, told by its first bytes: safetensors, or a pickle of PyTorch or Paddle."""
    path = Path(path)
    _check_present(path)
    with open(path, "rb") as file:
        head = file.read(10)
    if head[8:9] == b"{" and path.suffix != ".pdparams":
        return read_safetensors(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    from paddlemix.models.llava.unpickling import read_pickled_tensors

    return read_pickled_tensors(path)


def find_weights(folder: Path) -> List[Path]:
    """The files that hold a folder's weights, every one checked to be there; empty if the folder has none.

    Raises:
        UserError: an index that names no shard, a shard that is missing or empty, or shards without an index.
    """
    folder = Path(folder)
    for name in WEIGHT_FILES:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(s, str) for s in shards.values()):
            raise UserError(f"{path} has no weight_map that names its shards; fetch the file again.")
        names = sorted(set(shards.values()))
        missing = [shard for shard in names if not (folder / os.path.basename(shard)).is_file()]
        whole = folder / name[: -len(".index.json")]
        if missing and whole.is_file():  # beside which an earlier save in shards has left its index
            return [whole]
        if missing:
            raise UserError(
                f"{folder} is half a checkpoint: {path.name} names {len(names)} shards and {len(missing)} of them "
                f"are missing ({', '.join(missing[:5])}); fetch them too."
            )
        return [folder / os.path.basename(shard) for shard in names]
    shards = sorted(
        p.name for pattern in ("*-of-*.safetensors", "*-of-*.bin", "*-of-*.pdparams") for p in folder.glob(pattern)
    )
    if shards:
        raise UserError(
            f"{folder} has shards of weights ({', '.join(shards[:3])}) but no index of them; fetch "
            f"{', '.join(name for name in WEIGHT_FILES if name.endswith('.index.json'))}, whichever it belongs to."
        )
    return []


def open_weights(folder: Path) -> Dict[str, StoredTensor]:
    """Name -> tensor of all the weights of a folder.

    Raises:
        UserError: no weights, half of them, damaged ones, or a name that two shards hold.
    """
    tensors: Dict[str, StoredTensor] = {}
    for path in find_weights(folder):
        for name, tensor in open_tensor_file(path).items():
            if name in tensors:
                raise UserError(
                    f"{path} holds {name}, which another shard of {folder} holds too; fetch the shards again."
                )
            tensors[name] = tensor
    if not tensors:
        raise UserError(f"{folder} holds no weights; expected one of {', '.join(WEIGHT_FILES)}.")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# writing files


def write_json(path: Path, values: Dict[str, Any]) -> None:
    with write_aside(Path(path)) as aside:
        aside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place when the block ends well, so that no half-written file stays."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            yield aside
            os.replace(aside, path)
    finally:
        if aside.exists():
            aside.unlink()


def write_safetensors(
    path: Path, specs: Dict[str, TensorSpec], tensors: Iterable[Tuple[str, np.ndarray]], framework: str = "np"
) -> None:
    """Writes a safetensors file tensor by tensor, so that only one of them need be in memory.

    Args:
        specs: name -> dtype and shape, in the order of the file.
        tensors: (name, numbers) in that same order; bfloat16 as uint16 bits.
        framework: whose order of axes the numbers have: ``np`` is what PaddleNLP expects, ``pt`` what transformers does.
    """
    header: Dict[str, Any] = {"__metadata__": {"format": framework}}
    end = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [end, end + spec.nbytes],
        }
        end += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % 64)  # the numbers then begin at a multiple of 64 bytes
    with write_aside(Path(path)) as aside, open(aside, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for (name, spec), (given, array) in zip(specs.items(), tensors):
            if given != name or tuple(array.shape) != spec.shape or array.dtype != numpy_dtype(spec.dtype):
                raise ValueError(f"expected {name} {spec}, got {given} {array.dtype}{list(array.shape)}")
            file.write(memoryview(np.ascontiguousarray(array).reshape(-1)).cast("B") if array.size else b"")
        if file.tell() != 8 + len(raw) + end:
            raise ValueError(f"wrote {file.tell()} bytes to {path}, expected {8 + len(raw) + end}")
        file.flush()
        os.fsync(file.fileno())


def write_weights(
    folder: Path,
    specs: Dict[str, TensorSpec],
    read,
    max_shard_bytes: int = 5 << 30,
    framework: str = "np",
) -> List[Path]:
    """Writes ``model.safetensors``, or shards of at most ``max_shard_bytes`` with their index; returns the files.

    Weights of an earlier save in the folder are removed once the new ones are whole.

    Args:
        specs: name -> dtype and shape.
        read: name -> numbers, called once for each name, in order.
        framework: see :func:`write_safetensors`.
    """
    shards: List[Dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards):
        write_safetensors(folder / name, shard, ((key, read(key)) for key in shard), framework)
    index = folder / "model.safetensors.index.json"
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(spec.nbytes for spec in specs.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    elif index.exists():
        index.unlink()
    for old in [folder / "model.safetensors", *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in names and old.exists():
            old.unlink()
    return [folder / name for name in names]


def check_strides(shape: Sequence[int], strides: Sequence[int], offset: int, available: int) -> bool:
    """Whether a view of ``shape`` and ``strides`` (elements) from ``offset`` stays inside ``available`` elements."""
    if len(shape) != len(strides) or min([0, offset, *shape, *strides]) < 0:
        return False
    if math.prod(shape) == 0:
        return offset <= available
    return offset + sum((n - 1) * s for n, s in zip(shape, strides)) < available


if sys.byteorder != "little":  # every format read here is little-endian, and is read without swapping
    raise ImportError("paddlemix reads checkpoints on little-endian machines only")
