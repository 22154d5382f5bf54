"""Merging an adapter into its base."""

import errno
import json
import shutil

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from paddlemix.models.llava import checkpoint as checkpoints
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.tools.merge_lora_params import main
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.freezing import named_model_parameters, select_trained
from paddlemix.trainer.weights import save_trained_weights
from tests.trainer.tiny import tiny_checkpoint

IDS = [1, -200, -200, -200, -200, 5, 6, 7]


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def room(request, tmp_path_factory):
    """A base, an adapter whose B isn't zero with a projector of its own, and the logits of the two together."""
    folder = tmp_path_factory.mktemp("merge")
    tiny_checkpoint(folder / "base")
    model = LlavaLlamaForCausalLM.from_pretrained(folder / "base")
    model = add_lora(model, rank=4, alpha=6, rslora=request.param, base=str(folder / "base"))
    random = np.random.default_rng(0)
    for name, parameter in named_model_parameters(model):
        if name.endswith("lora_B") or "mm_projector" in name:
            parameter.set_value(random.normal(0, 0.05, parameter.shape).astype("float32"))
    select_trained(model, lora=True)
    model.model.config.conversation_template = "llava_v1"
    save_trained_weights(model, make(folder / "adapter"))
    model.eval()
    return folder, logits(model)


def make(folder):
    folder.mkdir()
    return folder


def logits(model):
    picture = paddle.to_tensor(np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype("float32"))
    with paddle.no_grad():
        return model(paddle.to_tensor([IDS]), pixel_values=picture).logits.numpy()


def run(folder, output, *more):
    command = ["--model_name_or_path", str(folder / "base"), "--lora_path", str(folder / "adapter")]
    return main([*command, "--merge_model_path", str(output), *more])


def test_the_merged_folder_stands_alone(room, tmp_path):
    folder, expected = room
    assert run(folder, tmp_path / "merged") == 0
    found = logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "merged"))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    unmerged = logits(LlavaLlamaForCausalLM.from_pretrained(folder / "adapter"))
    np.testing.assert_allclose(unmerged, expected, atol=1e-4)
    assert not (tmp_path / "merged" / "lora_config.json").exists()
    processor = LlavaProcessor.from_pretrained(tmp_path / "merged")
    assert processor.template.name == "llava_v1" and processor.image_processor is not None


def test_older_weights_in_the_folder_are_not_read_instead(room, tmp_path):
    """In shards, whose index goes before a single file."""
    folder, expected = room
    LlavaLlamaForCausalLM.from_pretrained(folder / "base").save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert run(folder, tmp_path) == 0
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    np.testing.assert_allclose(logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-4)


def test_the_base_is_recorded_and_the_adapters_folder_the_default_place(room, tmp_path):
    folder, expected = room
    shutil.copytree(folder / "adapter", tmp_path / "7")
    assert main(["--lora_path", str(tmp_path / "7")]) == 0
    shutil.move(folder / "base", folder / "elsewhere")  # merged, it needs its base no more
    try:
        np.testing.assert_allclose(logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "7")), expected, atol=1e-4)
    finally:
        shutil.move(folder / "elsewhere", folder / "base")


def test_a_base_that_is_recorded_beside_the_adapter(room, tmp_path, monkeypatch):
    """As the chat opens it, wherever the command is run."""
    folder, expected = room
    for name in ("base", "adapter"):
        shutil.copytree(folder / name, tmp_path / name)
    config = json.loads((tmp_path / "adapter" / "lora_config.json").read_text())
    config["base_model_name_or_path"] = "../base"
    (tmp_path / "adapter" / "lora_config.json").write_text(json.dumps(config))
    monkeypatch.chdir(make(tmp_path / "elsewhere"))
    assert main(["--lora_path", str(tmp_path / "adapter"), "--merge_model_path", str(tmp_path / "merged")]) == 0
    np.testing.assert_allclose(logits(LlavaLlamaForCausalLM.from_pretrained(tmp_path / "merged")), expected, atol=1e-4)


def test_the_dtype_is_the_bases_or_what_is_asked(room, tmp_path):
    folder, _ = room
    half = tmp_path / "half"
    shutil.copytree(folder / "base", half)
    weights = load_file(half / "model.safetensors")
    save_file({name: value.astype("float16") for name, value in weights.items()}, half / "model.safetensors")
    command = ["--model_name_or_path", str(half), "--lora_path", str(folder / "adapter"), "--merge_model_path"]
    assert main([*command, str(tmp_path / "kept")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "kept" / "model.safetensors").values()} == {
        np.dtype("float16")
    }
    assert main([*command, str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert {value.dtype for value in load_file(tmp_path / "wide" / "model.safetensors").values()} == {
        np.dtype("float32")
    }


def test_a_device_by_another_spelling(room, tmp_path, capsys):
    folder, _ = room
    assert run(folder, tmp_path / "merged", "--device", "cpu:0") == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert run(folder, tmp_path / "other", "--device", "cpu:x") == 1
    assert "error: device is 'cpu:x'; expected a name such as cpu" in capsys.readouterr().err


def test_mistakes_are_one_sentence_and_write_nothing(room, tmp_path, capsys):
    folder, _ = room
    other = tmp_path / "other"
    tiny_checkpoint(other, hidden_size=48, num_attention_heads=4)
    (tmp_path / "file").write_text("")
    torn = tmp_path / "torn"
    shutil.copytree(folder / "adapter", torn)
    (torn / "lora_model_state.safetensors").unlink()
    nameless = tmp_path / "nameless"
    shutil.copytree(folder / "adapter", nameless)
    spoilt, bare = tmp_path / "spoilt", tmp_path / "bare"
    state = load_file(folder / "adapter" / "lora_model_state.safetensors")
    first = next(iter(state))
    for path, tensors in ((spoilt, {**state, first: np.full_like(state[first], np.nan)}), (bare, {})):
        shutil.copytree(folder / "adapter", path)
        save_file(tensors, path / "lora_model_state.safetensors")
    config = json.loads((nameless / "lora_config.json").read_text())
    (nameless / "lora_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    base, adapter, output = str(folder / "base"), str(folder / "adapter"), str(tmp_path / "out")
    for arguments, words in (
        (["--lora_path", base], ["lora_config.json"]),
        (["--lora_path", str(torn), "--model_name_or_path", base], ["no adapter"]),
        (["--lora_path", str(nameless)], ["--model_name_or_path"]),
        (["--lora_path", str(spoilt)], [first, "NaN or infinities"]),
        (["--lora_path", str(bare)], ["lora_model_state.safetensors holds no lora_A and lora_B"]),
        (["--lora_path", adapter, "--model_name_or_path", str(other)], ["does not fit"]),
        (["--lora_path", adapter, "--model_name_or_path", "no/where"], ["no/where"]),
        (["--lora_path", adapter, "--model_name_or_path", adapter], ["applied twice"]),
    ):
        assert main([*arguments, "--merge_model_path", output]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and all(word in error for word in words), error
        assert not (tmp_path / "out").exists()
    assert (
        main(["--lora_path", adapter, "--model_name_or_path", base, "--merge_model_path", str(tmp_path / "file")]) == 1
    )
    assert main(["--lora_path", adapter, "--model_name_or_path", base, "--merge_model_path", base]) == 1
    before = sorted((folder / "adapter").iterdir())
    assert main(["--lora_path", adapter, "--merge_model_path", ""]) == 1
    assert "--merge_model_path is empty" in capsys.readouterr().err
    assert sorted((folder / "adapter").iterdir()) == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], ["--lora_path"]),
        (["--lora_path", "x", "--low_gpu_mem", "true"], ["--low_gpu_mem"]),
        (["--lora_path", "x", "--dtype", "int8"], ["--dtype", "int8", "float32"]),
    ],
)
def test_wrong_flags_are_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith("error: ") and all(word in line for word in words)


def test_an_error_while_writing_leaves_the_folder_as_it_was(room, tmp_path, monkeypatch, capsys):
    folder, _ = room
    output = make(tmp_path / "out")
    (output / "model.safetensors").write_text("old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_model", full)
    assert run(folder, output) == 1
    error = capsys.readouterr().err
    assert str(output) in error and "No space left on device" in error and "Traceback" not in error
    assert [path.name for path in output.iterdir()] == ["model.safetensors"]
    assert (output / "model.safetensors").read_text() == "old"
    assert run(folder, tmp_path / "new") == 1 and not (tmp_path / "new").exists()
