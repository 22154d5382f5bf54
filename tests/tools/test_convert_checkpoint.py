"""convert_checkpoint.py: every layout into every other, and what it refuses.

What it writes was opened by transformers 4.57 and by the original release (llava-torch 1.2.2.post1) with the logits of
make_parity_golden.py; here it is held against the names, shapes and settings that those have.
"""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import paddlemix
from paddlemix.errors import UserError
from paddlemix.models.llava import checkpoint
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.tools.convert_checkpoint import main
from tests.checkpoints import flat_config, write_hugging_face, write_json, write_original, write_toolkit
from tests.fixtures import tiny_models as tiny

KINDS = ("llava", "llava_next")
LAYOUTS = ("toolkit", "original", "huggingface")
WRITERS = {"toolkit": write_toolkit, "original": write_original, "huggingface": write_hugging_face}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    return {(layout, kind): WRITERS[layout](root / f"{layout}-{kind}", kind) for layout in LAYOUTS for kind in KINDS}


def run(source, output, layout, *more):
    arguments = ["--model_name_or_path", str(source), "--output_dir", str(output), "--layout", layout]
    return main([*arguments, *map(str, more)])


def refused(capsys, source, output, layout, *more):
    """The sentence on standard error of a run that fails."""
    assert run(source, output, layout, *more) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def numbers(folder):
    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def same_weights(folder, other):
    expected = numbers(other)
    found = numbers(folder)
    assert set(found) == set(expected)
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_every_layout_into_every_other(sources, tmp_path, source, target, kind):
    assert run(sources[source, kind], tmp_path / "out", target) == 0
    same_weights(tmp_path / "out", sources[source, kind])
    text, pictures = tiny.CASES[kind]["wide"]
    picture = [tiny.picture(name) for name in pictures]
    theirs = LlavaProcessor.from_pretrained(sources[source, kind])(text=text, images=picture)
    ours = LlavaProcessor.from_pretrained(tmp_path / "out")(text=text, images=picture)
    for name in theirs:
        np.testing.assert_array_equal(ours[name].numpy(), theirs[name].numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing is left beside it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_hugging_faces_files_are_those_of_transformers(sources, tmp_path, source, kind):
    assert run(sources[source, kind], tmp_path / "out", "huggingface") == 0
    tensors = load_file(tmp_path / "out/model.safetensors")
    expected = tiny.weights(kind)
    assert set(tensors) == set(expected)
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, expected[name])
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers opens no other
    config = json.loads((tmp_path / "out/config.json").read_text())
    for key, value in tiny.CONFIGS[kind].items():
        if isinstance(value, dict):
            assert {inner: config[key][inner] for inner in value if inner != "projection_dim"} == {
                inner: v for inner, v in value.items() if inner != "projection_dim"
            }
        else:
            assert config[key] == value, key
    image = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    for key in (
        "image_processor_type",
        "do_center_crop",
        "image_mean",
        "image_std",
        "resample",
        "image_grid_pinpoints",
    ):
        assert image.get(key) == tiny.PREPROCESSORS[kind].get(key)
    processor = json.loads((tmp_path / "out/processor_config.json").read_text())
    assert processor["patch_size"] == tiny.PATCH and processor["num_additional_image_tokens"] == 1
    tokens = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    added = {token["content"]: int(index) for index, token in tokens["added_tokens_decoder"].items()}
    assert added["<image>"] == tiny.IMAGE_TOKEN and added["<pad>"] == tiny.PAD_TOKEN


def test_the_original_names_and_the_toolkits(sources, tmp_path):
    assert run(sources["huggingface", "llava_next"], tmp_path / "original", "original") == 0
    tensors = load_file(tmp_path / "original/model.safetensors")
    expected = tiny.original_names(tiny.weights("llava_next"))
    assert {name: values.shape for name, values in tensors.items()} == {n: v.shape for n, v in expected.items()}
    config = json.loads((tmp_path / "original/config.json").read_text())
    for key, value in flat_config("llava_next").items():
        if key not in ("model_type", "mm_vision_tower", "pad_token_id"):
            assert config[key] == value, key
    assert run(sources["original", "llava_next"], tmp_path / "toolkit", "toolkit") == 0
    tensors = load_file(tmp_path / "toolkit/model.safetensors")
    expected = tiny.toolkit_names(tiny.weights("llava_next"))
    assert set(tensors) == set(expected)
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, expected[name])


def test_the_vocabulary_grows_for_transformers(tmp_path):
    """LLaMA-2's 32000 pieces have no <image>: two tokens more, rounded up to 32064 rows, none of which is ever likely."""
    folder = write_toolkit(tmp_path / "in", suffix="safetensors")
    tensors = load_file(folder / "model.safetensors")
    tensors["llama.embed_tokens.weight"] = np.ascontiguousarray(tensors["llama.embed_tokens.weight"][:32000])
    tensors["lm_head.weight"] = np.ascontiguousarray(tensors["lm_head.weight"][:, :32000])
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", flat_config("llava", vision_config=tiny.VISION, vocab_size=32000))
    assert run(folder, tmp_path / "out", "huggingface") == 0
    grown = load_file(tmp_path / "out/model.safetensors")
    for name, old in (
        ("language_model.model.embed_tokens.weight", tensors["llama.embed_tokens.weight"]),
        ("language_model.lm_head.weight", tensors["lm_head.weight"].T),
    ):
        assert grown[name].shape == (32064, 32)
        np.testing.assert_array_equal(grown[name][:32000], old)
        np.testing.assert_allclose(grown[name][32000:], np.tile(old.mean(0, dtype=np.float64), (64, 1)), atol=1e-6)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["image_token_index"], config["pad_token_id"], config["text_config"]["vocab_size"]) == (
        32000,
        32001,
        32064,
    )
    added = json.loads((tmp_path / "out/tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert added["32000"]["content"] == "<image>" and added["32001"]["content"] == "<pad>"
    ids = paddle.to_tensor([[1, 5, 6]])
    before = LlavaLlamaForCausalLM.from_pretrained(folder)(ids).logits.numpy()
    after = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "out")(ids).logits.numpy()
    np.testing.assert_allclose(after[..., :32000], before, atol=1e-6)
    assert (after[..., 32000:].max(-1) < before.max(-1)).all()


def test_a_model_that_was_trained_here_has_fewer_layers_in_its_tower(sources, tmp_path):
    """What is saved ends at the selected layer; Hugging Face's files say so, and so build no layer without weights."""
    model = LlavaLlamaForCausalLM.from_pretrained(sources["original", "llava"])
    model.save_pretrained(tmp_path / "trained")
    LlavaProcessor.from_pretrained(sources["original", "llava"]).save_pretrained(tmp_path / "trained")
    for layout in LAYOUTS:
        assert run(tmp_path / "trained", tmp_path / layout, layout) == 0
        same_weights(tmp_path / layout, tmp_path / "trained")
    config = json.loads((tmp_path / "huggingface/config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 2 and config["vision_feature_layer"] == -1
    names = set(load_file(tmp_path / "huggingface/model.safetensors"))
    lost = {name for name in tiny.weights("llava") if "encoder.layers.2." in name}
    assert names == set(tiny.weights("llava")) - lost


def test_dtype_and_shards(sources, tmp_path):
    assert (
        run(
            sources["original", "llava"],
            tmp_path / "out",
            "huggingface",
            "--dtype",
            "bfloat16",
            "--max_shard_size",
            "2MB",
        )
        == 0
    )
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert checkpoint.read_config(tmp_path / "out").dtype == "bfloat16"
    expected = numbers(sources["original", "llava"])
    for name, values in numbers(tmp_path / "out").items():
        rounded = paddle.to_tensor(expected[name]).astype("bfloat16").astype("float32").numpy()
        np.testing.assert_array_equal(values, rounded)
    assert run(tmp_path / "out", tmp_path / "back", "toolkit") == 0  # stays bfloat16
    assert checkpoint.read_config(tmp_path / "back").dtype == "bfloat16"


def test_an_adapter_is_merged(sources, tmp_path):
    base = sources["huggingface", "llava"]
    rng = np.random.RandomState(0)
    first, second = rng.rand(32, 2).astype(np.float32), rng.rand(2, 32).astype(np.float32)
    name = "llama.layers.0.self_attn.q_proj"
    (tmp_path / "lora").mkdir()
    save_file({f"{name}.lora_A": first, f"{name}.lora_B": second}, tmp_path / "lora/lora_model_state.safetensors")
    write_json(tmp_path / "lora/lora_config.json", {"r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)})
    assert run(tmp_path / "lora", tmp_path / "out", "huggingface") == 0
    before = tiny.weights("llava")["language_model.model.layers.0.self_attn.q_proj.weight"]
    after = load_file(tmp_path / "out/model.safetensors")["language_model.model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_allclose(after, before + 2 * (first @ second).T, atol=1e-5)
    assert not (tmp_path / "out/lora_config.json").exists()
    assert LlavaProcessor.from_pretrained(tmp_path / "out").tokenizer.added_token_id("<image>") == tiny.IMAGE_TOKEN


def test_a_decoder_alone(tmp_path, sources):
    folder = tmp_path / "in"
    folder.mkdir()
    prefix = "language_model."
    text = {name[len(prefix) :]: v for name, v in tiny.weights("llava").items() if name.startswith(prefix)}
    save_file(text, folder / "model.safetensors")
    write_json(folder / "config.json", tiny.TEXT)
    (folder / "tokenizer.json").write_bytes((sources["huggingface", "llava"] / "tokenizer.json").read_bytes())
    assert run(folder, tmp_path / "toolkit", "toolkit") == 0
    same_weights(tmp_path / "toolkit", folder)
    assert run(tmp_path / "toolkit", tmp_path / "out", "huggingface") == 0
    again = load_file(tmp_path / "out/model.safetensors")
    assert set(again) == set(text) and all(np.array_equal(again[name], text[name]) for name in text)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "llama"


def test_paddlenlp_reads_the_toolkits_files(tmp_path, sources):
    """Its own from_pretrained, on the decoder: the same names, the same order of axes."""
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    assert run(sources["huggingface", "llava"], tmp_path / "out", "toolkit") == 0
    text = {key: value for key, value in tiny.TEXT.items() if key != "model_type"}
    theirs = LlamaForCausalLM.from_pretrained(str(tmp_path / "out"), config=LlamaConfig(**text), dtype="float32")
    ours = numbers(tmp_path / "out")
    for name, parameter in theirs.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), ours[name])


# ---- what it refuses ----


def test_output_folders_in_the_way(sources, tmp_path, capsys):
    source, output = sources["original", "llava"], tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    assert "is not empty (notes.txt); name another" in refused(capsys, source, output, "toolkit")
    assert "something other than a checkpoint" in refused(capsys, source, output, "toolkit", "--overwrite")
    assert (output / "notes.txt").read_text() == "mine"
    (output / "notes.txt").unlink()
    assert run(source, output, "toolkit") == 0  # an empty folder is taken
    assert "is not empty" in refused(capsys, source, output, "huggingface")
    assert run(source, output, "huggingface", "--overwrite") == 0
    assert json.loads((output / "config.json").read_text())["text_config"]
    assert "is a file" in refused(capsys, source, output / "config.json", "toolkit")
    (output / "checkpoint-4").mkdir()  # of a training, say
    assert "holds checkpoint-4 beside a checkpoint" in refused(capsys, source, output, "toolkit", "--overwrite")
    assert "is or contains" in refused(capsys, source, source, "toolkit", "--overwrite")
    assert (source / "config.json").exists()


def test_what_a_checkpoint_needs_is_not_replaced(tmp_path, capsys):
    base = write_hugging_face(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    write_json(tmp_path / "lora/lora_config.json", {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "../base"})
    save_file({}, tmp_path / "lora/lora_model_state.safetensors")
    original = write_original(tmp_path / "original", tower=tmp_path / "clip")
    for source, needed in ((tmp_path / "lora", base), (original, tmp_path / "clip")):
        before = (needed / "config.json").read_bytes()
        message = refused(capsys, source, needed, "toolkit", "--overwrite")
        assert f"{needed}, which the checkpoint {source} is read from" in message
        assert (needed / "config.json").read_bytes() == before


def test_adapters_of_each_other(tmp_path, capsys):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        save_file({}, tmp_path / name / "lora_model_state.safetensors")
        values = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": f"../{other}"}
        write_json(tmp_path / name / "lora_config.json", values)
    assert "adapts itself by way of" in refused(capsys, tmp_path / "a", tmp_path / "out", "toolkit")
    for opens in (LlavaLlamaForCausalLM, LlavaProcessor):
        with pytest.raises(UserError, match="adapts itself by way of"):
            opens.from_pretrained(tmp_path / "a")


def test_a_link_is_written_through(sources, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert run(sources["huggingface", "llava"], tmp_path / "link", "toolkit") == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


def test_what_is_not_there_or_cannot_be_said(sources, tmp_path, capsys):
    output = tmp_path / "out"
    assert "There is no folder" in refused(capsys, tmp_path / "none", output, "toolkit")
    assert "max_shard_size" in refused(
        capsys, sources["original", "llava"], output, "toolkit", "--max_shard_size", "big"
    )
    half = write_toolkit(tmp_path / "half", suffix="safetensors")
    tensors = load_file(half / "model.safetensors")
    del tensors["llama.norm.weight"]
    save_file(tensors, half / "model.safetensors")
    assert "llama.norm.weight" in refused(capsys, half, output, "original")
    linear = write_toolkit(tmp_path / "linear", suffix="safetensors", mm_projector_type="linear")
    tensors = load_file(linear / "model.safetensors")
    for kind in ("weight", "bias"):
        tensors[f"llama.mm_projector.{kind}"] = tensors.pop(f"llama.mm_projector.0.{kind}")
        del tensors[f"llama.mm_projector.2.{kind}"]
    save_file(tensors, linear / "model.safetensors")
    assert "mm_projector_type is 'linear'" in refused(capsys, linear, output, "huggingface")
    assert not output.exists()
    assert run(linear, output, "original") == 0
    same_weights(output, linear)


def test_a_disk_that_is_full_leaves_nothing_behind(sources, tmp_path):
    """Files are limited to 1 MB, so the weights can't be written; run by its path, as from a clone."""
    output = tmp_path / "new" / "out"
    script = Path(paddlemix.__file__).parent / "tools/convert_checkpoint.py"
    arguments = [
        "--model_name_or_path",
        sources["original", "llava"],
        "--output_dir",
        output,
        "--layout",
        "toolkit",
    ]
    failed = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
    )
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1] == f"error: {output} can't be written: File too large."
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_anything_is_written(sources, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = refused(capsys, sources["toolkit", "llava"], tmp_path / "new" / "out", "original")
    assert re.search(r"has 3 MB free, but the weights take \d+ MB", message)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_conversion_has_left_goes(sources, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out, beside = tmp_path / "out", tmp_path / f".out.{gone.pid}.partial"
    others = [
        tmp_path / f".out.v2.{gone.pid}.partial",
        tmp_path / f".out.{os.getppid()}.partial",
    ]  # another's, a live one's
    for left in (out / f".out.{gone.pid}.partial", beside, *others):
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"x" * 100)
    assert run(sources["toolkit", "llava"], out, "original") == 0
    same_weights(out, sources["toolkit", "llava"])
    assert not list(out.glob(".*")) and not beside.exists()
    assert all(other.exists() for other in others)


def test_a_cache_that_cannot_be_written_is_not_the_output(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("PPMIX_HOME", str(tmp_path / "file"))
    message = refused(capsys, tmp_path / "model.gguf", tmp_path / "out", "toolkit")
    assert str(tmp_path / "out") not in message and "model.gguf" in message


def test_the_template_beside_a_checkpoint_goes_with_it(tmp_path, sources, caplog):
    source = tmp_path / "source"
    shutil.copytree(sources["toolkit", "llava"], source)
    write_json(source / "chat_template.json", {"conversation": ["Q: {{user}}\n", "A: {{bot}}</s>\n"]})
    expected = LlavaProcessor.from_pretrained(source).template
    for layout in ("toolkit", "original"):
        assert run(source, tmp_path / layout, layout) == 0
        assert LlavaProcessor.from_pretrained(tmp_path / layout).template == expected
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert run(source, tmp_path / "huggingface", "huggingface") == 0
    assert "has no place in the layout huggingface" in caplog.text
    assert not (tmp_path / "huggingface" / "chat_template.json").exists()


def test_hugging_faces_processor_gets_a_chat_template(tmp_path, sources):
    """The source's own where it has one, in whatever file; else the named template in Jinja."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    jinja, out = "{% for m in messages %}{{ m['role'] }}<image>{% endfor %}ASSISTANT:", tmp_path / "out"

    def written(source):
        assert run(source, out, "huggingface", "--overwrite") == 0
        return (out / "chat_template.jinja").read_text(encoding="utf-8")

    for name, wrapped in (
        ("chat_template.jinja", False),
        ("chat_template.json", True),
        ("processor_config.json", True),
        ("tokenizer_config.json", True),
    ):
        source = shutil.copytree(sources["huggingface", "llava"], tmp_path / name)
        if not wrapped:
            (source / name).write_text(jinja)
        else:
            old = json.loads((source / name).read_text()) if (source / name).exists() else {}
            write_json(source / name, {**old, "chat_template": jinja})
        assert written(source) == jinja
    # what a fine-tuned model is asked with is recorded in its config; its base's template is beside it still
    tuned = tmp_path / "tuned"
    assert run(sources["toolkit", "llava"], tuned, "toolkit") == 0
    write_json(
        tuned / "tokenizer_config.json",
        {**json.loads((tuned / "tokenizer_config.json").read_text()), "chat_template": jinja},
    )
    write_json(
        tuned / "config.json", {**json.loads((tuned / "config.json").read_text()), "conversation_template": "llava_v0"}
    )
    assert "Human" in written(tuned)
    template = ImmutableSandboxedEnvironment().from_string(written(sources["toolkit", "llava_next"]))
    processor = LlavaProcessor.from_pretrained(sources["toolkit", "llava_next"])
    messages = [{"role": "user", "content": "<image>\nWhat is it?"}]
    expected = processor.template.render(messages, add_generation_prompt=True)
    assert template.render(messages=messages, add_generation_prompt=True) == expected


def test_rounding_of_two_dtypes_is_told(tmp_path, sources, caplog):
    mixed = shutil.copytree(sources["huggingface", "llava"], tmp_path / "mixed")
    tensors = load_file(mixed / "model.safetensors")
    tensors = {name: v.astype(np.float16) if name.startswith("language") else v for name, v in tensors.items()}
    save_file(tensors, mixed / "model.safetensors")
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert run(sources["huggingface", "llava"], tmp_path / "one", "toolkit") == 0
        assert run(mixed, tmp_path / "asked", "toolkit", "--dtype", "float16") == 0
        assert "rounded" not in caplog.text
        assert run(mixed, tmp_path / "not_asked", "toolkit") == 0
    told = f"Most of {mixed} is float16 and some of it float32, which is rounded to float16; --dtype names another."
    assert [record.getMessage() for record in caplog.records if "rounded" in record.getMessage()] == [told]


def test_what_hugging_faces_layout_cannot_say_is_refused_and_a_window_is_kept(tmp_path, capsys):
    marked = write_toolkit(tmp_path / "marked", mm_use_im_start_end=True)
    assert "mm_use_im_start_end is True" in refused(capsys, marked, tmp_path / "out", "huggingface")
    windowed, model = tmp_path / "windowed", LlavaLlamaForCausalLM.from_pretrained(marked)
    model.config.sliding_window, model.config.mm_use_im_start_end = 12, False
    model.save_pretrained(windowed)
    LlavaProcessor.from_pretrained(marked, config=model.config).save_pretrained(windowed)
    for layout in LAYOUTS:
        assert run(windowed, tmp_path / layout, layout) == 0
        assert checkpoint.read_config(tmp_path / layout).sliding_window == 12


def test_an_empty_folder_is_written_into_and_not_replaced(sources, tmp_path):
    """It may be a mounted disk, or lie where the user can write nothing else."""
    out = tmp_path / "parent" / "out"
    out.mkdir(parents=True)
    before = out.stat().st_ino
    (tmp_path / "parent").chmod(0o555)
    try:
        assert run(sources["toolkit", "llava"], out, "original") == 0
    finally:
        (tmp_path / "parent").chmod(0o755)
    assert out.stat().st_ino == before and not [path for path in out.iterdir() if path.name.startswith(".")]
    same_weights(out, sources["toolkit", "llava"])
