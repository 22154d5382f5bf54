"""Files of tensors, and their headers: what is damaged is one sentence with the file's name."""

import json
import struct

import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.models.llava.tensor_files import find_weights, open_tensor_file, write_aside
from paddlemix.processors.llava import LlavaProcessor
from tests.checkpoints import write_hugging_face, write_json


def write_header(path, header, body=b"\0" * 100):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    return path


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "entry",
    [
        {**GOOD, "dtype": ["F32"]},
        {**GOOD, "dtype": None},
        {**GOOD, "shape": "12"},
        {**GOOD, "shape": [1e400]},
        {**GOOD, "shape": [2.0]},
        {**GOOD, "shape": [True, 2]},
        {**GOOD, "shape": [-2]},
        {**GOOD, "shape": 2},
        {**GOOD, "data_offsets": [0, 8, 3]},
        {**GOOD, "data_offsets": [-8, 0]},
        {**GOOD, "data_offsets": {"0": 8}},
        {"dtype": "F32", "shape": [2]},
        [],
        3,
    ],
    ids=str,
)
def test_a_header_of_other_values_is_one_sentence(tmp_path, entry):
    path = write_header(tmp_path / "model.safetensors", {"w": entry})
    with pytest.raises(UserError, match="not a whole safetensors file: its header can't be read") as refusal:
        open_tensor_file(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("header", [b"[" * 200_000, b'{"a":' * 100_000, b"[]", b"{ ", b'{"a\xff":1}', b"1" * 5000])
def test_a_header_that_is_no_object(tmp_path, header):
    with pytest.raises(UserError, match="its header can't be read"):
        open_tensor_file(write_header(tmp_path / "model.safetensors", header))


def test_tensors_on_the_same_bytes_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}
    assert list(open_tensor_file(write_header(path, {"a": GOOD, "e": empty, "b": {**GOOD, "data_offsets": [8, 16]}})))
    for offsets in ([0, 8], [4, 12]):
        with pytest.raises(UserError, match="(a and b|b and a) lie on the same bytes"):
            open_tensor_file(write_header(path, {"b": {**GOOD, "data_offsets": offsets}, "a": GOOD}))


def test_json_that_is_nested_too_deep(tmp_path):
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        folder = write_hugging_face(tmp_path / name)
        (folder / name).write_text("[" * 200_000)
        with pytest.raises(UserError, match=name):
            LlavaProcessor.from_pretrained(folder)


def test_an_index_that_was_left_beside_whole_weights(tmp_path):
    """transformers looks for model.safetensors first."""
    folder = write_hugging_face(tmp_path)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    names = {name for name, _ in LlavaLlamaForCausalLM.from_pretrained(folder).named_parameters()}
    assert "llama.norm.weight" in names
    (folder / "model.safetensors").rename(
        folder / "pytorch_model.bin"
    )  # of another kind: nobody knows whether it is older
    with pytest.raises(UserError, match="half a checkpoint"):
        find_weights(folder)


def test_a_full_disk_is_told_with_the_files_name(tmp_path):
    with pytest.raises(OSError) as failure, write_aside(tmp_path / "model.safetensors"):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    assert failure.value.filename == str(tmp_path / "model.safetensors")
