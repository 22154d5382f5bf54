"""Linear layers that learn: forward and gradients are those of Paddle's own, and near to them in bfloat16."""

import contextlib

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava import linear, onednn
from paddlemix.models.llava.linear import bfloat16_products, project, project_quick_gelu, project_swiglu

SEED = np.random.default_rng(3)


def numbers(*shape):
    return paddle.to_tensor(SEED.standard_normal(shape).astype("float32"))


def dense(inner, outer, bias):
    layer = nn.Linear(inner, outer, bias_attr=None if bias else False)
    for parameter in layer.parameters():
        parameter.set_value(numbers(*parameter.shape))
    return layer


def adapted(inner, outer, bias, dropout=0.0, quick=True):
    from paddlenlp.peft.lora.lora_layers import LoRALinear

    options = dict(r=3, lora_alpha=6, lora_dropout=dropout, use_quick_lora=quick)
    layer = LoRALinear(inner, outer, bias_attr=None if bias else False, **options)
    for parameter in layer.parameters():
        parameter.set_value(numbers(*parameter.shape))
    if bias:
        layer.bias.stop_gradient = True  # as LoRAModel leaves it
    return layer


def gradients(layer, compute, x, weights):
    """The result, and the gradients of a weighted sum of it: of x and of what learns, by name."""
    layer.clear_gradients()
    x = x.clone().detach()
    x.stop_gradient = False
    paddle.seed(5)
    result = compute(x)
    (result * weights).sum().backward()
    learnt = {name: value.grad.clone() for name, value in layer.named_parameters() if not value.stop_gradient}
    return {"result": result, "x": x.grad, **learnt}


def check(layer, x, context, tolerance, compute=project, whole=None):
    """Each part within ``tolerance`` of the largest number of it."""
    right = gradients(layer, whole or layer, x, weights := numbers(*(whole or layer)(x).shape))
    with context():
        found = gradients(layer, lambda x: compute(layer, x), x, weights)
    assert found.keys() == right.keys()
    for name, value in right.items():
        value, difference = value.numpy(), (found[name] - value).abs().max()
        assert found[name].dtype == paddle.float32
        assert float(difference) <= tolerance * np.abs(value).max(), name
        if context is bfloat16_products and name != "bias":  # whose gradient is a sum
            assert float(difference) > 1e-4 * np.abs(value).max(), f"{name} isn't rounded"
    return found


# bfloat16 has eight bits, so a product of two rounded numbers is within 2^-8 of theirs
PRECISIONS = [(contextlib.nullcontext, 1e-5), (bfloat16_products, 2**-6)]


@pytest.fixture(params=PRECISIONS, ids=["float32", "bfloat16"])
def precision(request):
    context, tolerance = request.param
    if context is bfloat16_products and not onednn.have_bfloat16():
        with pytest.raises(UserError, match="can't multiply in bfloat16"), bfloat16_products():
            pass
        context, tolerance = PRECISIONS[0]
    return context, tolerance


@pytest.fixture
def taken(monkeypatch):
    """How often a product was taken here, and not by Paddle."""
    counted, multiply = [], linear._multiply

    def count(*arguments, **options):
        counted.append(arguments)
        return multiply(*arguments, **options)

    monkeypatch.setattr(linear, "_multiply", count)
    return counted


@pytest.mark.parametrize("shape", [(2, 5, 48), (81, 48), (1, 1, 48), (48,)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(precision, taken, shape, bias):
    check(dense(48, 40, bias), numbers(*shape), *precision)
    assert len(taken) == 2  # forward, and the gradient of x


@pytest.mark.parametrize("kept", ["weight", "bias", "x"])
def test_what_does_not_learn_gets_no_gradient(precision, kept):
    layer, x = dense(16, 8, True), numbers(3, 16)
    x.stop_gradient = kept == "x"
    if kept != "x":
        getattr(layer, kept).stop_gradient = True
    with precision[0]():
        project(layer, x).sum().backward()
    for name, value in (("x", x), *layer.named_parameters()):
        assert (value.grad is None) == (name == kept), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout, quick", [(0.0, True), (0.0, False), (0.3, False)])
def test_a_layer_with_an_adapter(precision, taken, bias, dropout, quick):
    layer, x, weights = adapted(48, 40, bias, dropout, quick), numbers(2, 5, 48), numbers(2, 5, 40)
    context, tolerance = precision
    right = gradients(layer, layer, x, weights)
    with context():
        found = gradients(layer, lambda x: project(layer, x), x, weights)
    assert found.keys() == right.keys() == {"result", "x", "lora_A", "lora_B"} and len(taken) == 6
    for name, value in right.items():
        # what an adapter adds, and learns from, is exact in either
        bound = tolerance if name in ("result", "x") else 1e-5
        np.testing.assert_allclose(
            found[name].numpy(), value.numpy(), atol=bound * float(value.abs().max()), err_msg=name
        )


@pytest.mark.parametrize("shape", [(81, 48), (48,)])
@pytest.mark.parametrize("fixed", ["x", "lora_A", "lora_B"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_part_of_an_adapter_that_does_not_learn(precision, shape, fixed, dropout):
    layer, x, weights = adapted(48, 40, True, dropout, False), numbers(*shape), numbers(*shape[:-1], 40)
    x.stop_gradient = False
    (x if fixed == "x" else getattr(layer, fixed)).stop_gradient = True
    found = []
    for context, compute in ((contextlib.nullcontext, layer), (precision[0], lambda x: project(layer, x))):
        layer.clear_gradients()
        x.clear_gradient()
        paddle.seed(5)
        with context():
            (compute(x) * weights).sum().backward()
        parts = {"x": x, "lora_A": layer.lora_A, "lora_B": layer.lora_B}
        found.append({name: None if part.grad is None else part.grad.numpy().copy() for name, part in parts.items()})
    right, found = found
    for name, value in found.items():
        assert (value is None) == (name == fixed), name
        if value is not None:
            np.testing.assert_allclose(value, right[name], atol=precision[1] * np.abs(right[name]).max(), err_msg=name)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_adapter_of_another_type_is_not_read_as_float32(dtype, taken):
    layer, x = adapted(16, 8, False), numbers(3, 16)
    layer.lora_A, layer.lora_B = (
        layer.create_parameter(part.shape, dtype=dtype, default_initializer=nn.initializer.Constant(0.5))
        for part in (layer.lora_A, layer.lora_B)
    )
    with pytest.raises((TypeError, ValueError, RuntimeError)):  # Paddle's own
        project(layer, x)
    assert not taken


def test_a_small_adapter_is_not_lost_to_rounding(precision):
    """What it adds is far below a bit of the weights."""
    layer, x = adapted(48, 40, False), numbers(6, 48)
    layer.lora_B.set_value(layer.lora_B * 1e-4)
    expected = (x @ layer.lora_A @ layer.lora_B * layer.scaling).numpy()
    with precision[0]():
        added = project(layer, x)
        layer.lora_B.set_value(layer.lora_B * 0.0)
        added = (added - project(layer, x)).numpy()
    np.testing.assert_allclose(added, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_an_adapted_layer_that_learns_itself(precision, part):
    layer, x, weights = adapted(48, 40, True), numbers(2, 5, 48), numbers(2, 5, 40)
    getattr(layer, part).stop_gradient = False
    layer._use_quick_lora = False  # Paddle's quick product refuses it
    right = gradients(layer, layer, x, weights)[part]
    with precision[0]():
        found = gradients(layer, lambda x: project(layer, x), x, weights)[part]
    np.testing.assert_allclose(found.numpy(), right.numpy(), atol=precision[1] * float(right.abs().max()))


def test_no_rows_at_all(precision):
    layer = dense(16, 8, True)
    with precision[0]():
        project(layer, paddle.zeros([0, 16])).sum().backward()
        assert float(layer.weight.grad.abs().max()) == 0 and float(layer.bias.grad.abs().max()) == 0
        layer = adapted(16, 8, True)
        project(layer, paddle.zeros([0, 16])).sum().backward()
        assert float(layer.lora_A.grad.abs().max()) == 0 and float(layer.lora_B.grad.abs().max()) == 0


def test_an_adapter_that_is_switched_off_or_watched_is_left_to_paddle(monkeypatch):
    def fail(*_):
        raise AssertionError("computed here")

    monkeypatch.setattr(linear, "_project_adapted", fail)
    layer, x = adapted(16, 8, False), numbers(3, 16)
    layer.disable_lora = True
    np.testing.assert_allclose(project(layer, x).numpy(), (x @ layer.weight).numpy(), atol=1e-4)
    layer.disable_lora = False
    layer.register_forward_post_hook(lambda layer, given, result: result * 0)
    assert float(project(layer, x).abs().max()) == 0


def test_activations(precision):
    class Both(nn.Layer):
        def __init__(self):
            super().__init__()
            self.gate, self.up = dense(48, 40, False), dense(48, 40, False)

    def whole(x):
        return nn.functional.silu(both.gate(x)) * both.up(x)

    both = Both()
    # products on either side: their errors add up
    context, tolerance = precision
    check(both, numbers(2, 5, 48), context, 3 * tolerance, lambda b, x: project_swiglu(b.gate, b.up, x), whole)
    single = dense(48, 40, True)

    def gelu(x):
        y = single(x)
        return y * nn.functional.sigmoid(1.702 * y)

    check(single, numbers(2, 5, 48), context, 3 * tolerance, project_quick_gelu, gelu)


def test_the_precision_ends_with_its_block(precision):
    layer, x = dense(48, 40, True), numbers(4, 48)
    with pytest.raises(KeyError), precision[0]():
        raise KeyError
    np.testing.assert_allclose(project(layer, x).numpy(), layer(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 6])
def test_what_is_not_recorded_is_rounded_alike(precision, rows):
    """So that a layer that is computed again for its backward pass gives what it gave."""
    layer, x = dense(48, 40, True), numbers(rows, 48)
    with precision[0]():
        recorded = project(layer, x)
        with paddle.no_grad():
            again = project(layer, x)
    np.testing.assert_allclose(again.numpy(), recorded.numpy(), atol=1e-5)
