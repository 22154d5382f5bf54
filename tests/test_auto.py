"""Auto*MIX go by model_type, whatever the folder's name or layout."""

import json

import numpy as np
import pytest

from paddlemix import LlavaConfig, LlavaLlamaForCausalLM, LlavaProcessor
from paddlemix.auto import AutoConfigMIX, AutoModelMIX, AutoProcessorMIX, AutoTokenizerMIX
from paddlemix.errors import UserError
from tests.fixtures import tiny_models
from tests.support import byte_level_tokenizer_folder, llama2_tokenizer_folder

SIZES = dict(
    vocab_size=32000,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    image_aspect_ratio="pad",
    vision_config=dict(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("some name")
    LlavaLlamaForCausalLM(LlavaConfig(**SIZES)).save_pretrained(folder)
    llama2_tokenizer_folder(folder)
    return folder


def test_toolkits_way_to_open_everything(folder):
    config = AutoConfigMIX.from_pretrained(folder)
    tokenizer = AutoTokenizerMIX.from_pretrained(folder)
    model = AutoModelMIX.from_pretrained(folder, dtype="float32")
    processor, also_tokenizer = AutoProcessorMIX.from_pretrained(
        folder, eval="eval", max_length=512, image_aspect_ratio=config.image_aspect_ratio
    )
    assert (type(config), type(model), type(processor)) == (LlavaConfig, LlavaLlamaForCausalLM, LlavaProcessor)
    assert tokenizer.encode("Hello world!") == also_tokenizer.encode("Hello world!") == [1, 15043, 3186, 29991]
    assert also_tokenizer.model_max_length == 512

    picture = np.zeros((6, 8, 3), np.uint8)
    batch = processor(text="USER: <image>\nWhat is this? ASSISTANT:", images=picture)
    assert model(**batch).logits.shape == [*batch["input_ids"].shape, 32000]


def test_words_of_the_models_and_the_tokenizers_own(folder):
    assert AutoModelMIX.from_pretrained(folder, tensor_parallel_degree=1).config.vocab_size == 32000
    with pytest.raises(UserError, match="can't honour tensor_parallel_degree=2"):
        AutoModelMIX.from_pretrained(folder, tensor_parallel_degree=2)
    assert AutoTokenizerMIX.from_pretrained(folder, model_max_length=512).model_max_length == 512
    with pytest.raises(UserError, match="can't honour padding_side; it takes model_max_length"):
        AutoTokenizerMIX.from_pretrained(folder, padding_side="left")


def test_processor_need_not_be_unpacked(folder):
    processor = AutoProcessorMIX.from_pretrained(folder)
    assert isinstance(processor, LlavaProcessor) and processor.image_processor.image_aspect_ratio == "pad"


def test_an_adapters_tokenizer_is_its_bases(folder, tmp_path):
    lora = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": str(folder)}
    (tmp_path / "lora_config.json").write_text(json.dumps(lora))
    (tmp_path / "lora_model_state.safetensors").write_bytes(b"")
    assert AutoTokenizerMIX.from_pretrained(tmp_path).encode("Hello") == [1, 15043]


def test_words_that_paddlenlps_callers_pass(folder):
    processor = AutoProcessorMIX.from_pretrained(folder)
    assert processor("Hello", return_tensors="pd", padding=True)["input_ids"].shape == [1, 2]
    for given in ({"return_tensors": "np"}, {"padding": False}):
        with pytest.raises(UserError, match=f"{next(iter(given))} is"):
            processor("Hello", **given)


def test_settings_overrule_the_checkpoint(folder, tmp_path):
    assert AutoConfigMIX.from_pretrained(folder, image_aspect_ratio="square").image_aspect_ratio == "square"
    assert AutoProcessorMIX.from_pretrained(folder, image_aspect_ratio="square").config.image_aspect_ratio == "square"
    assert AutoModelMIX.from_pretrained(folder, config=LlavaConfig(**SIZES, rope_theta=5.0)).config.rope_theta == 5.0
    processor = AutoProcessorMIX.from_pretrained(folder, byte_level_tokenizer_folder(tmp_path))
    assert processor.tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_flat_layouts(folder, tmp_path, model_type):
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": model_type}))
    assert AutoConfigMIX.from_pretrained(tmp_path).hidden_size == 16


def test_hugging_face_layout(tmp_path):
    values = {"model_type": "llava_next", "text_config": tiny_models.TEXT, "vision_config": tiny_models.VISION}
    values["image_grid_pinpoints"] = [[28, 56], [56, 28]]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfigMIX.from_pretrained(tmp_path)
    assert type(config) is LlavaConfig and config.image_aspect_ratio == "anyres"
    assert config.hidden_size == tiny_models.TEXT["hidden_size"]
    assert LlavaConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("auto", [AutoConfigMIX, AutoModelMIX, AutoProcessorMIX])
def test_unknown_model_type_is_named(auto, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mpt"}')
    with pytest.raises(UserError, match=r"config.json has model_type 'mpt'; expected one of .*llava"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [AutoConfigMIX, AutoModelMIX, AutoProcessorMIX, AutoTokenizerMIX])
def test_bad_folders(auto, tmp_path):
    with pytest.raises(UserError):
        auto.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(UserError):
        auto.from_pretrained(tmp_path)


def test_bad_settings(folder):
    with pytest.raises(UserError, match="'hidden_sise'"):
        AutoConfigMIX.from_pretrained(folder, hidden_sise=8)
    with pytest.raises(UserError, match="image_aspect_ratio is 'round'"):
        AutoConfigMIX.from_pretrained(folder, image_aspect_ratio="round")
    with pytest.raises(UserError, match="train is 'train' and eval is 'eval'"):
        AutoProcessorMIX.from_pretrained(folder, train="train", eval="eval")
    with pytest.raises(TypeError, match="from_pretrained"):
        AutoModelMIX()


def test_settings_that_a_processor_does_not_take(folder):
    with pytest.raises(
        UserError, match="AutoProcessorMIX can't honour bar, foo; it takes .*config, image_aspect_ratio"
    ):
        AutoProcessorMIX.from_pretrained(folder, foo=1, bar=2)
    with pytest.raises(UserError, match="can't honour asked"):
        AutoProcessorMIX.from_pretrained(folder, asked=1)
    assert AutoProcessorMIX.from_pretrained(folder, use_fast=False) is not None
    for length in (-5, 0, 2.5, "512", True):
        with pytest.raises(UserError, match=f"^max_length is {length!r}; expected a whole number of at least 1"):
            AutoProcessorMIX.from_pretrained(folder, max_length=length)
        with pytest.raises(UserError, match=f"^model_max_length is {length!r}; expected a whole number of at least 1"):
            AutoTokenizerMIX.from_pretrained(folder, model_max_length=length)
