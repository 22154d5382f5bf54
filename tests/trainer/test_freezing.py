"""Which parameters are trained."""

import pytest

from paddlemix.errors import UserError
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.freezing import count_parts, named_model_parameters, part_of, select_trained
from tests.trainer.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def adapted():
    return add_lora(tiny_model())


def trained_parts(model):
    return {part for part, count in count_parts(model).items() if count.trained}


def trained_names(model):
    return {name for name, parameter in named_model_parameters(model) if not parameter.stop_gradient}


@pytest.mark.parametrize(
    "options, parts",
    [
        ({}, {"projector", "decoder"}),
        ({"unfreeze_tower": True}, {"vision tower", "projector", "decoder"}),
        ({"freeze_projector": True}, {"decoder"}),
        ({"tune_projector_only": True}, {"projector"}),
        ({"tune_projector_only": True, "unfreeze_tower": True}, {"projector"}),
    ],
)
def test_parts(model, options, parts):
    select_trained(model, **options)
    assert trained_parts(model) == parts
    assert all(count.trained in (0, count.total) for count in count_parts(model).values())


@pytest.mark.parametrize(
    "options, parts",
    [
        ({}, {"projector", "LoRA adapters"}),
        ({"freeze_projector": True}, {"LoRA adapters"}),
        ({"unfreeze_tower": True}, {"vision tower", "projector", "LoRA adapters"}),
    ],
)
def test_parts_with_lora(adapted, options, parts):
    select_trained(adapted, lora=True, **options)
    assert trained_parts(adapted) == parts


def test_patterns_have_the_last_word(model):
    select_trained(model, include=["*llama*", "*lm_head*"], exclude=["*llama.mm_projector*"])
    assert trained_parts(model) == {"projector"}
    select_trained(model, exclude=["llama.vision_tower.*.transformer.layers.1.*"])
    names = trained_names(model)
    assert any("vision_model.transformer.layers.1." in name for name in names)
    assert not any("vision_model.transformer.layers.0." in name for name in names)
    select_trained(model, freeze_projector=True, exclude=["llama.mm_projector.0.*"])
    assert {name for name in trained_names(model) if part_of(name) == "projector"} == {
        "llama.mm_projector.0.weight",
        "llama.mm_projector.0.bias",
    }
    select_trained(model, include=["*.layers.0.*"])
    assert not any(name.startswith("llama.layers.0.") for name in trained_names(model))
    assert any(name.startswith("llama.layers.1.") for name in trained_names(model))


def test_patterns_reach_inside_lora(adapted):
    select_trained(adapted, lora=True, include=["*.layers.0.*lora_*"], exclude=["lm_head.weight"])
    names = trained_names(adapted)
    assert "lm_head.weight" in names and "llama.layers.1.mlp.up_proj.lora_A" in names
    assert not any(name.startswith("llama.layers.0.") for name in names)


def test_patterns_without_lora_leave_adapters_as_they_are(adapted, caplog):
    select_trained(adapted, lora=True, include=["*llama*", "*lm_head*"], exclude=["*llama.mm_projector*"])
    assert trained_parts(adapted) == {"projector", "LoRA adapters"} and not caplog.text
    select_trained(adapted, lora=True, include=["llama.layers.0.*"])
    assert "llama.layers.0.mlp.up_proj.lora_A" in trained_names(adapted)
    assert "'llama.layers.0.*', which changes nothing" in caplog.text and "'llama.layers.0.*lora_*'" in caplog.text


def test_a_pattern_without_a_match_is_told(model, caplog):
    select_trained(model, include=["*resampler*"])
    assert "'*resampler*'" in caplog.text


def test_nothing_to_train_is_an_error(model):
    with pytest.raises(UserError, match="nothing is left to train"):
        select_trained(model, include=["*"])


def test_the_newline_of_anyres_belongs_to_the_projector():
    model = tiny_model(
        image_aspect_ratio="anyres", image_grid_pinpoints=[[16, 16]], mm_patch_merge_type="spatial_unpad"
    )
    select_trained(model, tune_projector_only=True)
    assert "llama.image_newline" in trained_names(model)
