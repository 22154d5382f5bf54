"""The optimizer's state on disk."""

import json

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava.tensor_files import open_tensor_file
from paddlemix.trainer import trainer
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.optimizer_state import load_optimizer, save_optimizer, to_numpy, to_tensor
from tests.trainer.tiny import tiny_model


def stepped(model):
    parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
    optimizer = paddle.optimizer.AdamW(parameters=parameters)
    ids = paddle.to_tensor([[1, 5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer


def built():
    model = tiny_model()
    select_trained(model, tune_projector_only=False)
    return model


def test_it_comes_back_under_the_models_names(tmp_path):
    model = built()
    optimizer = stepped(model)
    save_optimizer(optimizer, model, tmp_path / "optimizer.safetensors")
    names = set(open_tensor_file(tmp_path / "optimizer.safetensors"))
    assert "llama.layers.0.self_attn.q_proj.weight/moment1_0" in names
    assert all(name.startswith(("llama.", "lm_head.")) for name in names)

    nn.Linear(3, 3)  # moves Paddle's counters, so that the parameters below have other names
    other = built()
    assert other.lm_head.weight.name != model.lm_head.weight.name
    again = stepped(other)
    for value in again.state_dict().values():
        if isinstance(value, paddle.Tensor):
            value.set_value(paddle.zeros_like(value))
    load_optimizer(again, other, tmp_path / "optimizer.safetensors")
    save_optimizer(again, other, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "optimizer.safetensors").read_bytes()


def test_a_state_of_other_parameters_is_refused(tmp_path):
    model = built()
    save_optimizer(stepped(model), model, tmp_path / "optimizer.safetensors")
    adapted = add_lora(tiny_model())
    select_trained(adapted, lora=True)
    with pytest.raises(UserError, match="which this run doesn't have"):
        load_optimizer(stepped(adapted), adapted, tmp_path / "optimizer.safetensors")


def test_master_weights_of_half_precision_come_back(tmp_path):
    def halved():
        model = built()
        model.to(dtype="bfloat16")
        parameters = [parameter for parameter in model.parameters() if not parameter.stop_gradient]
        for parameter in parameters:
            parameter.grad = paddle.ones_like(parameter)
        return model, paddle.optimizer.AdamW(parameters=parameters, multi_precision=True)

    def step(optimizer):
        with pytest.raises(RuntimeError, match="kernel `adamw` is not registered"):  # Paddle has it on GPUs only
            optimizer.step()

    model, optimizer = halved()
    step(optimizer)
    save_optimizer(optimizer, model, tmp_path / "optimizer.safetensors")
    assert any(name.endswith("/master_weights") for name in open_tensor_file(tmp_path / "optimizer.safetensors"))
    other, again = halved()
    other.set_state_dict({name: paddle.zeros_like(value) for name, value in other.state_dict().items()})
    load_optimizer(again, other, tmp_path / "optimizer.safetensors")
    step(again)
    save_optimizer(again, other, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "optimizer.safetensors").read_bytes()


def test_half_precision_keeps_its_bits():
    for dtype in ("bfloat16", "float16", "float32"):
        values = paddle.randn([64]).astype(dtype)
        name, array = to_numpy(values)
        assert name == dtype
        back = to_tensor(name, array)
        assert back.dtype == values.dtype
        np.testing.assert_array_equal(back.astype("float32").numpy(), values.astype("float32").numpy())


def test_the_loss_scale_of_float16_comes_back():
    """As AmpScaler's state goes into progress.json: its scale is an array."""
    state = {
        "scale": np.array([32768.0], "float32"),
        "incr_ratio": 2.0,
        "incr_count": 7,
        "use_dynamic_loss_scaling": True,
    }
    again = trainer._arrays(json.loads(json.dumps(trainer._plain(state))))
    assert again == state and again["scale"].dtype == "float32" and again["scale"][0] == 32768.0
