"""LoRA: which layers, how scaled, how fast."""

import math

import numpy as np
import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.trainer.adapters import add_lora, resolve_targets
from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.freezing import named_model_parameters, select_trained
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, samples, tiny_model

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def adapted_layers(model):
    return {name[: -len(".lora_A")] for name, _ in named_model_parameters(model) if name.endswith(".lora_A")}


def test_default_targets_are_the_decoders_seven_projections_only():
    layers = adapted_layers(add_lora(tiny_model()))
    assert len(layers) == 2 * 7
    assert {name.rsplit(".", 1)[1] for name in layers} == SEVEN
    assert all(name.startswith("llama.layers.") for name in layers)


def test_the_toolkits_patterns_match():
    patterns = [f"llama.layer.*{name}.*" for name in sorted(SEVEN)]
    model = add_lora(tiny_model(), targets=patterns)
    assert len(adapted_layers(model)) == 14
    assert model.lora_config.target_modules == patterns


def test_a_layer_that_two_patterns_match_is_adapted_once():
    model = add_lora(tiny_model(), targets=["llama.layer.*q_proj.*", "llama.layers.0.*_proj"], dropout=0.1)
    names = adapted_layers(model)
    assert "llama.layers.0.self_attn.q_proj" in names and len(names) == 8
    assert len([name for name, _ in named_model_parameters(model) if name.endswith("lora_A")]) == 8
    again = add_lora(tiny_model(), targets=model.lora_config.target_modules)
    assert adapted_layers(again) == names


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("llama.layers.*qproj", ["qproj", "matches no layer"]),
        ("llama.layers.0", ["llama.layers.0", "only linear"]),
        ("q_proj", ["matches no layer"]),
        ("(", ["no regular expression"]),
    ],
)
def test_a_pattern_that_names_nothing_to_adapt(pattern, words):
    with pytest.raises(UserError) as caught:
        resolve_targets(tiny_model(), [pattern])
    assert all(word in str(caught.value) for word in words), caught.value


def test_no_pattern_at_all():
    with pytest.raises(UserError, match="lora_target_modules names no layer"):
        add_lora(tiny_model(), targets=[])


def test_a_new_adapter_changes_nothing():
    model, ids = tiny_model(), paddle.to_tensor([[1, 5, 6, 7]])
    model.eval()
    before = model(ids).logits
    wrapped = add_lora(model)
    wrapped.eval()
    np.testing.assert_array_equal(wrapped(ids).logits.numpy(), before.numpy())


@pytest.mark.parametrize("rslora", [False, True])
def test_scale_is_alpha_over_rank_or_its_root(rslora):
    model = add_lora(tiny_model(), rank=4, alpha=6, dropout=0.0, rslora=rslora)
    layer = model.model.llama.layers[0].self_attn.q_proj
    layer.lora_B.set_value(paddle.ones_like(layer.lora_B))
    x = paddle.ones([1, 32])
    added = (layer(x) - x @ layer.weight).numpy()
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    np.testing.assert_allclose(added, (x @ layer.lora_A @ layer.lora_B * scale).numpy(), rtol=1e-4, atol=1e-5)


def one_step(tmp_path, model, **changes):
    """Parameters' movement in the first step, whose AdamW update is the learning rate itself."""
    before = {name: parameter.numpy().copy() for name, parameter in named_model_parameters(model)}
    args = FinetuneArguments(
        output_dir=str(tmp_path),
        device="cpu",
        max_steps=1,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    LlavaTrainer(model, args, Samples(samples(8))).train()
    return {name: np.abs(value.numpy() - before[name]).max() for name, value in named_model_parameters(model)}


def test_learning_rates_by_part(tmp_path):
    model = tiny_model()
    select_trained(model, unfreeze_tower=True)
    moved = one_step(tmp_path, model, mm_projector_lr=2e-4, mm_vision_tower_lr=5e-5, unfreeze_mm_vision_tower=True)
    np.testing.assert_allclose(moved["llama.layers.0.self_attn.q_proj.weight"], 1e-3, rtol=0.02)
    np.testing.assert_allclose(moved["llama.mm_projector.0.weight"], 2e-4, rtol=0.02)
    tower = "llama.vision_tower.vision_tower.vision_model.transformer.layers.0.linear1.weight"
    np.testing.assert_allclose(moved[tower], 5e-5, rtol=0.02)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"])
def test_one_projection_alone_learns_from_text_alone(tmp_path, name):
    """With the embeddings fixed, some inputs of the first layer's attention need no gradient."""
    model = add_lora(tiny_model(), targets=[f"llama.layers.0.*{name}"], dropout=0.0)
    select_trained(model, lora=True)
    args = FinetuneArguments(
        output_dir=str(tmp_path), device="cpu", max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True
    )
    LlavaTrainer(model, args, Samples(samples(4, text_only=1.0))).train()
    (moved,) = (value for key, value in named_model_parameters(model) if key.endswith("lora_B"))
    assert float(moved.abs().max()) > 0


def test_lora_plus_speeds_up_b(tmp_path):
    model = add_lora(tiny_model(), dropout=0.0)
    for name, parameter in named_model_parameters(model):
        if name.endswith("lora_B"):  # so that A has a gradient in the first step too
            parameter.set_value(paddle.full(parameter.shape, 0.1))
    select_trained(model, lora=True)
    moved = one_step(tmp_path, model, lora=True, lora_plus_scale=8.0)
    layer = "llama.layers.0.self_attn.v_proj."
    np.testing.assert_allclose(moved[layer + "lora_A"], 1e-3, rtol=0.02)
    np.testing.assert_allclose(moved[layer + "lora_B"], 8e-3, rtol=0.02)
    assert moved[layer + "weight"] == 0 and moved["llama.mm_projector.0.weight"] > 0


def test_weight_decay_spares_norms_and_biases(tmp_path):
    model = tiny_model()
    before = {name: parameter.numpy().copy() for name, parameter in named_model_parameters(model)}
    select_trained(model)
    rows = samples(8, text_only=1.0)  # the projector and unused ids get no gradient: only decay could move them
    args = FinetuneArguments(
        output_dir=str(tmp_path), device="cpu", max_steps=1, lr_scheduler_type="constant", learning_rate=1e-3,
        weight_decay=0.5, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    LlavaTrainer(model, args, Samples(rows)).train()
    after = {name: parameter.numpy() for name, parameter in named_model_parameters(model)}
    unused = 63  # no row has this id
    np.testing.assert_allclose(
        after["llama.embed_tokens.weight"][unused], before["llama.embed_tokens.weight"][unused] * (1 - 5e-4), rtol=1e-5
    )
    moved = np.abs(after["llama.norm.weight"] - before["llama.norm.weight"])
    np.testing.assert_allclose(moved, 1e-3, rtol=0.02)  # with decay it would be 0.5e-3 more on one side
