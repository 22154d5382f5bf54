"""Products by oneDNN: equal to NumPy's, from several threads, and refused where they could not be right."""

import threading

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.models.llava import onednn
from paddlemix.models.llava.linear import project, project_quick_gelu, project_swiglu

RNG = np.random.default_rng(5)


def linear(inner, outer, bias=True):
    layer = nn.Linear(inner, outer, bias_attr=None if bias else False)
    layer.weight.set_value(RNG.standard_normal((inner, outer)).astype("float32"))
    if bias:
        layer.bias.set_value(RNG.standard_normal(outer).astype("float32"))
    layer.eval()
    return layer


def by_numpy(layer, x):
    bias = 0.0 if layer.bias is None else layer.bias.numpy().astype("float64")
    return x.numpy().astype("float64") @ layer.weight.numpy().astype("float64") + bias


def numbers(*shape):
    return paddle.to_tensor(RNG.standard_normal(shape).astype("float32"))


def test_it_serves_here():
    """Paddle's wheel carries it; without it a CPU would be slow unnoticed."""
    assert onednn.products() is not None


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 3, 48), (1, 130, 48), (577, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(shape, bias):
    layer, x = linear(48, 40, bias), numbers(*shape)
    with paddle.no_grad():
        result = project(layer, x)
    assert result.shape == [*shape[:-1], 40]
    np.testing.assert_allclose(result.numpy(), by_numpy(layer, x), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 7, 48), (577, 48), (1, 65, 48)])
def test_activations_are_those_of_paddle(shape):
    x, gate, up, wide = numbers(*shape), linear(48, 40, bias=False), linear(48, 40, bias=False), linear(48, 96)
    with_gradient = project_swiglu(gate, up, x), project_quick_gelu(wide, x)
    with paddle.no_grad():
        without = project_swiglu(gate, up, x), project_quick_gelu(wide, x)
    for one, other in zip(with_gradient, without):
        assert not one.stop_gradient and other.stop_gradient
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-4, rtol=1e-5)


def test_gradients_and_hooks_are_not_lost():
    layer, x = linear(8, 4), numbers(3, 8)
    project(layer, x).sum().backward()
    assert layer.weight.grad is not None
    layer.register_forward_post_hook(lambda layer, given, result: result * 0)
    with paddle.no_grad():
        assert float(project(layer, x).abs().max()) == 0


def test_a_width_that_does_not_fit_is_paddles_error():
    for shape in ((20, 64), (2, 3)):
        with paddle.no_grad(), pytest.raises(ValueError):
            project(linear(32, 16), numbers(*shape))


def test_a_bias_of_another_type_is_not_misread():
    layer, x = linear(8, 4), numbers(3, 8)
    layer.bias = paddle.create_parameter([4], "float64", default_initializer=nn.initializer.Constant(2.0))
    with paddle.no_grad():
        np.testing.assert_allclose(project(layer, x).numpy(), by_numpy(layer, x), atol=1e-4)


def test_other_types_and_no_rows_at_all():
    with paddle.no_grad():
        double = linear(8, 4).to(dtype="float64")
        assert project(double, numbers(3, 8).astype("float64")).dtype == paddle.float64
        assert project(linear(8, 4), numbers(0, 8)).shape == [0, 4]


def test_a_view_that_is_not_contiguous():
    layer, x = linear(48, 40), numbers(48, 6).t()
    with paddle.no_grad():
        np.testing.assert_allclose(project(layer, x).numpy(), by_numpy(layer, x), atol=1e-4)


def test_threads_have_kernels_of_their_own():
    layer, xs = linear(64, 32), [numbers(rows, 64) for rows in (2, 3, 5, 9)]
    expected, wrong = [by_numpy(layer, x) for x in xs], []

    def work(x, right):
        with paddle.no_grad():
            for _ in range(50):
                if not np.allclose(project(layer, x).numpy(), right, atol=1e-4):
                    wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_kernels_that_are_forgotten_are_made_again(monkeypatch):
    monkeypatch.setattr(onednn, "KEPT", 3)
    layer = linear(16, 8)
    with paddle.no_grad():
        for rows in (1, 2, 3, 4, 5, 1, 2, 6, 1):
            x = numbers(rows, 16)
            np.testing.assert_allclose(project(layer, x).numpy(), by_numpy(layer, x), atol=1e-4)


def test_softmax():
    x = RNG.standard_normal((5, 33)).astype("float32")
    x[2, 5:] = -1e9
    powers = np.exp(x - x.max(1, keepdims=True))
    onednn.products().softmax(x.ctypes.data, 5, 33)
    np.testing.assert_allclose(x, powers / powers.sum(1, keepdims=True), atol=1e-6)


def test_an_interrupted_look_is_taken_again(monkeypatch):
    def interrupt(compute):
        raise KeyboardInterrupt

    monkeypatch.setattr(onednn, "_looked", False)
    monkeypatch.setattr(onednn, "_library", None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(onednn, "_try_out", interrupt)
        onednn._find()
    assert onednn._find() is not None


def test_a_library_that_computes_something_else_is_left_alone(monkeypatch):
    monkeypatch.setattr(onednn, "_SWISH", 0x20)  # a ReLU
    monkeypatch.setattr(onednn, "_looked", False)
    monkeypatch.setattr(onednn, "_library", None)
    assert onednn._find() is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows, columns", [(1, 7), (16, 48), (80, 33), (5, 1)])
def test_what_is_turned_keeps_its_bits(dtype, rows, columns):
    """Among them those of numbers that are none; what lies beside is left alone."""
    if dtype == "bfloat16" and not onednn.have_bfloat16():
        return
    bits = np.uint32 if dtype == "float32" else np.uint16
    x = RNG.integers(0, np.iinfo(bits).max, (rows, columns), bits, endpoint=True)
    result = np.full((columns, rows + 3), 5, bits)
    onednn.products().turn(x.ctypes.data, result[:, 2:].ctypes.data, rows, columns, rows + 3, dtype)
    np.testing.assert_array_equal(result[:, 2 : rows + 2], x.T)
    assert (result[:, :2] == 5).all() and (result[:, rows + 2 :] == 5).all()
