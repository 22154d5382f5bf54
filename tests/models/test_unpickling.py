"""Pickles: genuine files of torch.save and paddle.save are read, malicious and damaged ones are refused and run nothing."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.tensor_files import convert, open_tensor_file
from paddlemix.models.llava.unpickling import read_pickle, read_pickled_tensors
from tests.checkpoints import torch_save
from tests.support import FIXTURES

# ---- genuine files ----


@pytest.mark.parametrize("file", ["torch_zip.bin", "torch_legacy.bin"])
def test_files_of_torch_save(file):
    expected = np.load(FIXTURES / "torch_files.npz")
    tensors = read_pickled_tensors(FIXTURES / file)
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(convert(tensor.read(), tensor.dtype, "float32"), expected[name])
    assert {tensors[name].dtype for name in ("float16", "bfloat16", "integers")} == {"float16", "bfloat16", "int64"}


def test_a_modules_state_dict_with_its_metadata():
    tensors = read_pickled_tensors(FIXTURES / "torch_module_state.bin")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"weight": (2, 3), "bias": (2,)}


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_files_of_paddle_save(tmp_path, protocol):
    layer = paddle.nn.Linear(40, 30)
    state = {**layer.state_dict(), "half": layer.weight.astype("bfloat16")}
    path = tmp_path / "model_state.pdparams"
    paddle.save(state, str(path), protocol=protocol)
    tensors = read_pickled_tensors(path)
    assert sorted(tensors) == ["bias", "half", "weight"]
    for name in ("weight", "bias"):
        np.testing.assert_array_equal(tensors[name].read(), state[name].numpy())
    assert tensors["half"].dtype == "bfloat16"
    half = convert(tensors["half"].read(), "bfloat16", "float32")
    np.testing.assert_array_equal(half, state["half"].astype("float32").numpy())


def test_paddles_pairs_of_name_and_array(tmp_path):
    weight = paddle.randn([5, 4])
    paddle.save({"w": weight, "config": {"nested": weight}}, str(tmp_path / "nested.pdparams"))
    value = read_pickle(tmp_path / "nested.pdparams")
    np.testing.assert_array_equal(value["config"]["nested"][1].read(), weight.numpy())
    with open(tmp_path / "pairs.pdparams", "wb") as file:
        pickle.dump({"w": ("linear_0.w_0", weight.numpy())}, file, protocol=4)
    np.testing.assert_array_equal(read_pickled_tensors(tmp_path / "pairs.pdparams")["w"].read(), weight.numpy())


def test_paddles_pieces_of_large_tensors(tmp_path):
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    flat = whole.reshape(-1)
    pieces = {"OriginShape": (4, 6), "slices": ["w@@.0", "w@@.1"]}
    state = {
        "b": np.ones(2, np.float32),
        "w@@.0": flat[:10],
        "w@@.1": flat[10:],
        "UnpackBigParamInfor@@": {"w": pieces},
    }
    with open(tmp_path / "large.pdparams", "wb") as file:
        pickle.dump(state, file, protocol=2)
    tensors = read_pickled_tensors(tmp_path / "large.pdparams")
    assert sorted(tensors) == ["b", "w"]
    np.testing.assert_array_equal(tensors["w"].read(), whole)
    del state["w@@.1"]
    with open(tmp_path / "lost.pdparams", "wb") as file:
        pickle.dump(state, file, protocol=2)
    with pytest.raises(UserError, match="lacks pieces of w"):
        read_pickled_tensors(tmp_path / "lost.pdparams")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_of_every_order(tmp_path, protocol):
    arrays = {
        "c": np.arange(6000, dtype=np.float32).reshape(60, 100),
        "fortran": np.asfortranarray(np.arange(6000, dtype=np.float16).reshape(60, 100)),
        "wide": np.random.RandomState(0).rand(3, 4, 5),
        "one": np.float32([1]),
    }
    path = tmp_path / "arrays.pdparams"
    path.write_bytes(pickle.dumps(arrays, protocol=protocol))
    for name, tensor in read_pickled_tensors(path).items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


def test_large_tensors_stay_in_the_file(tmp_path):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(pickle.dumps({"w": np.arange(100_000, dtype=np.float32)}, protocol=4))
    tensor = read_pickled_tensors(path)["w"]
    part = np.empty(3, np.float32)
    tensor.read_into(part, 70_000)
    assert part.tolist() == [70_000, 70_001, 70_002] and tensor.path == path


# ---- attacks ----


class Reduces:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class WithState:
    """BUILD with a state: pickle would call __setstate__ or set attributes."""

    def __reduce__(self):
        return (OrderedDict, (), {"__class__": "x"})


class SetsState:
    def __reduce__(self):
        return (np.dtype, ("f4",), ("anything",))


def _marker(tmp_path):
    return tmp_path / "ran"


def _malicious(tmp_path):
    """(what it tries, the name that the refusal must give, the pickle's bytes)"""
    ran = str(_marker(tmp_path))
    command = f"touch {ran}"
    code = f"open({ran!r}, 'w').close()"
    dump = pickle.dumps
    yield "os.system", "posix.system", dump(Reduces(os.system, command))
    yield "nested in a list", "posix.system", dump({"a": [1, (2, {"b": Reduces(os.system, command)})]})
    yield "in place of a tensor", "posix.system", dump({"w": np.ones(3), "x": Reduces(os.system, command)})
    yield "as a dictionary's key", "posix.system", dump({Reduces(os.system, command): 1})
    yield "eval", "builtins.eval", dump(Reduces(eval, code))
    yield "exec, protocol 0", "__builtin__.exec", dump(Reduces(exec, code), protocol=0)
    yield "exec, protocol 4", "builtins.exec", dump(Reduces(exec, code), protocol=4)
    yield "getattr", "builtins.getattr", dump(Reduces(getattr, "a", "upper"))
    yield "open", "io.open", dump(Reduces(open, ran, "w"))
    yield "Path.touch", "pathlib.", dump(Reduces(Path.touch, Path(ran)))
    yield "numpy.load of another pickle", "numpy.load", dump(Reduces(np.load, ran))
    yield (
        "numpy's runstring",
        "numpy.testing",
        b"cnumpy.testing._private.utils\nrunstring\n(V" + code.encode() + b"\n}tR.",
    )
    yield (
        "numpy.core's other functions",
        "numpy.core.multiarray.fromfile",
        b"cnumpy.core.multiarray\nfromfile\n(V/etc/passwd\ntR.",
    )
    yield (
        "an attribute inside a permitted module",
        "collections.OrderedDict.__class__",
        b"\x80\x04\x8c\x0bcollections\x8c\x15OrderedDict.__class__\x93.",
    )
    yield "a dotted name, STACK_GLOBAL", "os.system", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    yield (
        "STACK_GLOBAL of memoised names",
        "os.system",
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x9400h\x00h\x01\x93\x8c\x04true\x85R.",
    )
    yield "INST", "os.system", b"(S'" + command.encode() + b"'\nios\nsystem\n."
    yield "OBJ", "os.system", b"(cos\nsystem\nS'" + command.encode() + b"'\no."
    yield "NEWOBJ of a permitted class", "NEWOBJ", b"\x80\x02ccollections\nOrderedDict\n)\x81."
    yield "NEWOBJ_EX", "NEWOBJ_EX", b"\x80\x04ccollections\nOrderedDict\n)}\x92."
    yield "BUILD of a function", "numpy.ndarray", b"cnumpy\nndarray\n}S'__call__'\nS'x'\nsb."
    yield (
        "BUILD of an imported call",
        "_rebuild_tensor_v2",
        b"ctorch._utils\n_rebuild_tensor_v2\n}S'__globals__'\nS'x'\nsb.",
    )
    yield "EXT1", "EXT1", b"\x80\x02\x82\x01."
    yield "a call of what was returned", "a call of", b"ccollections\nOrderedDict\n)R)R."
    yield "a call of a string", "a call of str", b"Vos.system\nVtrue\n\x85R."
    yield "a persistent id", "persistent", b"Vos.system\nQ."
    yield "object dtype", "numpy.dtype", dump(np.array([Reduces(os.system, command)], dtype=object))
    yield "structured dtype", "numpy.dtype", dump(np.zeros(2, dtype=[("a", "f4")]))
    yield "a memory map", "numpy.", dump(Reduces(np.memmap, ran))
    yield "torch's own loader", "torch.load", b"ctorch\nload\n(V" + ran.encode() + b"\ntR."
    yield "a module's class", "torch.nn.modules.linear.Linear", b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81}b."
    yield "codecs to another encoding", "_codecs.encode", b"c_codecs\nencode\n(Vaa\nVhex\ntR."
    yield "paddle's eval of a LoDTensor", "builtins.eval", dump(Reduces(eval, "data", {"data": 1}))


ATTACKS = [attack[0] for attack in _malicious(Path("."))]


@pytest.mark.parametrize("number", range(len(ATTACKS)), ids=ATTACKS)
@pytest.mark.parametrize("file", ["model_state.pdparams", "pytorch_model.bin"])
def test_attacks_run_nothing_and_are_refused_by_name(tmp_path, number, file):
    _, named, data = list(_malicious(tmp_path))[number]
    path = tmp_path / file
    if file.endswith(".bin"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    else:
        path.write_bytes(data)
    with pytest.raises(UserError) as refusal:
        open_tensor_file(path)
    message = str(refusal.value)
    assert not _marker(tmp_path).exists()
    if not (file.endswith(".bin") and named == "persistent"):  # PyTorch's have such ids; this one is no storage
        assert named in message and str(path) in message and "nothing" in message, message
    assert "\n" not in message


def test_the_attacks_would_run_in_pickle_itself(tmp_path):
    data = {what: data for what, _, data in _malicious(tmp_path)}
    pickle.loads(data["os.system"])
    assert _marker(tmp_path).exists()


def test_states_are_never_set(tmp_path):
    path = tmp_path / "a.pdparams"
    path.write_bytes(pickle.dumps({"w": np.ones(2), "x": WithState()}))
    value = read_pickle(path)
    assert type(value["x"]) is dict and value["x"] == {}
    path.write_bytes(pickle.dumps({"x": SetsState()}))
    with pytest.raises(UserError):
        read_pickle(path)


def test_a_kilobyte_that_stands_for_an_endless_list_is_refused_at_once(tmp_path):
    laughs = []
    for _ in range(60):
        laughs = [laughs, laughs]
    path = tmp_path / "laughs.pdparams"
    path.write_bytes(pickle.dumps({"w": laughs}))
    with pytest.raises(UserError, match="nested more than"):
        read_pickled_tensors(path)
    for _ in range(15):
        laughs = laughs[0]
    path.write_bytes(pickle.dumps({"w": laughs}))
    with pytest.raises(UserError, match="holds a list under 'w'"):
        read_pickled_tensors(path)


# ---- damage ----


def test_a_torch_file_that_is_cut_short(tmp_path):
    whole = tmp_path / "whole.bin"
    torch_save({"w": np.ones((50, 50), np.float32)}, whole)
    data = whole.read_bytes()
    path = tmp_path / "pytorch_model.bin"
    for length in (20, 200, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole checkpoint"):
            open_tensor_file(path)
    legacy = (FIXTURES / "torch_legacy.bin").read_bytes()
    for length in (40, 700, len(legacy) - 100):
        path.write_bytes(legacy[:length])
        with pytest.raises(UserError, match="not a whole checkpoint"):
            open_tensor_file(path)


def flip(data, place, value):
    return data[:place] + value + data[place + len(value) :]


@pytest.mark.parametrize("change", ["encrypted", "method", "version", "offset", "stream"])
def test_a_torch_file_with_other_bytes(tmp_path, change):
    path = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps({"w": list(range(1000))}, protocol=2))
    data = path.read_bytes()
    entry = data.index(b"PK\x01\x02")  # the central directory's
    damaged = {
        "encrypted": flip(data, entry + 8, b"\x01\x00"),
        "method": flip(data, entry + 10, b"\x61\x00"),
        "version": flip(data, entry + 6, b"\x75\x00"),
        "offset": flip(data, entry + 42, b"\xff\xff\xff\x7f"),
        "stream": flip(data, 60, b"\xff" * 40),
    }[change]
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="pytorch_model.bin is not a whole checkpoint"):
        open_tensor_file(path)


@pytest.mark.parametrize("length", [2**40, 2**60, 2**63 - 1])
def test_a_text_longer_than_any_memory(tmp_path, length):
    path = tmp_path / "model_state.pdparams"
    path.write_bytes(b"\x80\x04\x8d" + struct.pack("<Q", length) + b"x.")
    with pytest.raises(UserError, match="model_state.pdparams is not a whole checkpoint"):
        open_tensor_file(path)


def test_a_paddle_file_that_is_cut_short_or_is_something_else(tmp_path):
    data = pickle.dumps({"w": np.ones(20_000, np.float32)}, protocol=4)
    path = tmp_path / "model_state.pdparams"
    for damaged in (data[:30], data[:5000], data[:-1], b"\x00" * 100, b"hello", b"\x80\x04}."[:-1], b"\x80\x04(."):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not a whole checkpoint"):
            open_tensor_file(path)
    for other in ([1, 2], 5, {"w": 3}, {3: np.ones(2)}):
        path.write_bytes(pickle.dumps(other))
        with pytest.raises(UserError, match="expected"):
            open_tensor_file(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        open_tensor_file(path)


def test_tensors_that_reach_past_their_storage_are_refused(tmp_path):
    storage = b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"

    def tensor(offset, shape, strides):
        sizes = "".join(f"I{n}\n" for n in shape)
        steps = "".join(f"I{n}\n" for n in strides)
        return b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + f"I{offset}\n({sizes}t({steps}tI00\n)tR.".encode()

    def write(data, numbers=4):
        with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
            archive.writestr("archive/data.pkl", b"}Vw\n" + data[:-1] + b"s.")
            archive.writestr("archive/data/0", struct.pack(f"<{numbers}f", *range(numbers)))
        return tmp_path / "w.bin"

    np.testing.assert_array_equal(read_pickled_tensors(write(tensor(1, (3,), (1,))))["w"].read(), [1, 2, 3])
    for offset, shape, strides in (
        (2, (3,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (2,), (-1,)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
    ):
        with pytest.raises(UserError, match="can't hold"):
            read_pickled_tensors(write(tensor(offset, shape, strides)))
    with pytest.raises(UserError, match="storage 0 is cut short"):
        read_pickled_tensors(write(tensor(0, (4,), (1,)), numbers=3))


@pytest.mark.parametrize("bit", ["neg", "conj"])
def test_a_tensor_whose_numbers_are_to_be_changed_is_refused(tmp_path, bit):
    """torch.save writes a lazily negated view as its base's numbers and a mark beside the tensor."""
    storage = b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI2\ntQ"

    def write(set_):
        marks = f"}}V{bit}\nI0{set_}\ns".encode()
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + b"I0\n(I2\nt(I1\ntI00\n}" + marks + b"tR"
        with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
            archive.writestr("archive/data.pkl", b"}Vw\n" + tensor + b"s.")
            archive.writestr("archive/data/0", struct.pack("<2f", 1, 2))
        return tmp_path / "w.bin"

    np.testing.assert_array_equal(read_pickled_tensors(write(0))["w"].read(), [1, 2])
    with pytest.raises(UserError, match=rf"PyTorch's {bit} bit.*; save what its resolve_{bit}\(\) gives"):
        read_pickled_tensors(write(1))
