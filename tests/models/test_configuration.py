"""Values of config.json that no model can honour, of the wrong kind above all."""

import pytest

from paddlemix import LlavaConfig, LlavaLlamaForCausalLM, LlavaProcessor
from paddlemix.errors import UserError
from tests.checkpoints import flat_config, write_json
from tests.fixtures import tiny_models as tiny


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("rope_theta", "x", "a number above 0"),
        ("rope_theta", 0, "a number above 0"),
        ("rope_theta", -1.0, "a number above 0"),
        ("rope_theta", True, "a number above 0"),
        ("rms_norm_eps", "x", "a number of at least 0"),
        ("rms_norm_eps", -1e-5, "a number of at least 0"),
        ("rms_norm_eps", float("nan"), "a number of at least 0"),
        ("eos_token_id", "x", "the number of a token, a list of such, or null"),
        ("eos_token_id", [2, "x"], "the number of a token, a list of such, or null"),
        ("bos_token_id", "x", "the number of a token, or null"),
        ("pad_token_id", 1.5, "the number of a token, or null"),
    ],
)
def test_values_of_the_wrong_kind_are_named_with_what_was_expected(tmp_path, key, value, expected, nested):
    values = {**tiny.CONFIGS["llava"], "text_config": {**tiny.TEXT, key: value}}
    write_json(tmp_path / "config.json", values if nested else flat_config("llava", **{key: value}))
    with pytest.raises(UserError) as refusal:
        LlavaConfig.from_pretrained(tmp_path)
    assert str(refusal.value) == f"{tmp_path / 'config.json'}: {key} is {value!r}; expected {expected}."


def test_sizes_and_towers_of_the_wrong_kind(tmp_path):
    for key in ("hidden_size", "num_attention_heads"):
        with pytest.raises(UserError, match=f"{key} is 'a'; expected a whole number"):
            LlavaConfig(**{key: "a"})
    write_json(tmp_path / "config.json", flat_config("llava", mm_vision_tower=["x"]))
    for opens in (LlavaConfig, LlavaLlamaForCausalLM, LlavaProcessor):
        with pytest.raises(UserError, match=r"mm_vision_tower is \['x'\]; expected a name or a folder"):
            opens.from_pretrained(tmp_path)


def test_the_layer_of_the_tower_and_its_epsilon(tmp_path):
    write_json(tmp_path / "config.json", flat_config("llava", mm_vision_select_layer="x"))
    with pytest.raises(UserError, match="mm_vision_select_layer is 'x'; expected the number of a layer"):
        LlavaConfig.from_pretrained(tmp_path)
    write_json(tmp_path / "config.json", flat_config("llava", vision_config={**tiny.VISION, "layer_norm_eps": "x"}))
    with pytest.raises(UserError, match="vision_config.layer_norm_eps is 'x'; expected a number of at least 0"):
        LlavaConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_flash_attention_is_read_from_every_layout(tmp_path, nested):
    asked = {"use_flash_attention": True}
    write_json(
        tmp_path / "config.json", {**tiny.CONFIGS["llava"], **asked} if nested else flat_config("llava", **asked)
    )
    assert LlavaConfig.from_pretrained(tmp_path).use_flash_attention


def test_end_tokens_of_generation_config(tmp_path):
    write_json(tmp_path / "config.json", flat_config("llava"))
    path = tmp_path / "generation_config.json"
    for value in ("x", [2, "x"], True):
        write_json(path, {"eos_token_id": value})
        with pytest.raises(UserError, match=f"{path} has eos_token_id .*; expected the number of a token"):
            LlavaConfig.from_pretrained(tmp_path)
    write_json(path, {"eos_token_id": [2, 7]})
    assert LlavaConfig.from_pretrained(tmp_path).eos_token_ids == [2, 7]


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; expected a folder to save in"):
        LlavaConfig().save_pretrained(tmp_path / "file")
    LlavaConfig(rope_theta=5.0).save_pretrained(tmp_path / "new")
    assert LlavaConfig.from_pretrained(tmp_path / "new").rope_theta == 5.0
