"""Weights in bfloat16 on a CPU: half of the memory, and answers as near as their rounding allows."""

import numpy as np
import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.models.llava.onednn import have_bfloat16

pytestmark = pytest.mark.skipif(not have_bfloat16(), reason="this processor has no bfloat16, which is said to its user")

IMAGE = -200
PROMPT = [1, *[IMAGE] * 4, 7, 8, 9]
SIZES = dict(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
    vision_config=dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
    ),
)


def pair(tmp_path, **changes):
    """A model in bfloat16, and one in float32 of the same rounded weights."""
    paddle.seed(1)
    built = LlavaLlamaForCausalLM(LlavaConfig(**{**SIZES, **changes}))
    built.save_pretrained(tmp_path)
    narrow = LlavaLlamaForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    narrow.save_pretrained(tmp_path / "narrow")
    return narrow, LlavaLlamaForCausalLM.from_pretrained(tmp_path / "narrow", dtype="float32")


def picture():
    return paddle.to_tensor(np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype("float32"))


def apart(one, other):
    """Largest difference over the spread of the numbers."""
    return float((one - other).abs().max() / other.std())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"mm_projector_type": "linear"}])
@paddle.no_grad()
def test_a_pass_is_near_that_in_float32(tmp_path, changes):
    narrow, wide = pair(tmp_path, **changes)
    (features,), (expected,) = narrow.encode_images(picture()), wide.encode_images(picture())
    assert features.dtype == paddle.float32
    assert apart(features, expected) < 0.05
    ids = paddle.to_tensor([PROMPT])
    logits, expected = (model(ids, pixel_values=picture()).logits for model in (narrow, wide))
    assert logits.dtype == paddle.float32 and 0 < apart(logits, expected) < 0.05


@pytest.mark.parametrize("rows", [1, 3])
@paddle.no_grad()
def test_passes_with_a_cache_equal_a_whole_one(tmp_path, rows):
    model, _ = pair(tmp_path)
    ids = np.random.RandomState(0).randint(3, 50, (rows, 90))
    whole = model(paddle.to_tensor(ids)).logits
    cache = model.new_cache(rows, 90)
    at = 0
    for tokens in (70, 1, 1, 9, 1, 8):  # long, and short ones
        new = paddle.to_tensor(ids[:, at : at + tokens])
        logits = model.step(new, cache) if tokens == 1 else model.prefill(model.embed(new), cache)
        at += tokens
        assert apart(logits, whole[:, at - 1]) < 0.05


def test_generation_and_what_learns(tmp_path):
    model, _ = pair(tmp_path)
    ids = paddle.to_tensor([PROMPT])
    answers, scores = model.generate(ids, pixel_values=picture(), max_new_tokens=6)
    assert answers.shape[1] <= 6 and np.isfinite(scores.numpy()).all()
    out = model(ids, pixel_values=picture())  # outside no_grad: nothing could learn from it
    assert int(out.logits[0, -1].argmax()) == answers[0, 0] and out.logits.stop_gradient
    with pytest.raises(UserError, match="bfloat16.*no_grad.*float32"):
        model(ids, pixel_values=picture(), labels=ids)
    model.llama.layers[0].mlp.up_proj.register_forward_post_hook(lambda layer, given, result: result)
    with pytest.raises(UserError, match="hook.*bfloat16"):
        model.generate(ids, pixel_values=picture(), max_new_tokens=6)


def test_embeddings_as_the_table_holds_them(tmp_path):
    _, narrow = pair(tmp_path)
    ids = paddle.to_tensor([[5, 6, 7]])
    with paddle.no_grad():
        given = narrow(inputs_embeds=narrow.get_input_embeddings()(ids)).logits.numpy()
        np.testing.assert_array_equal(given, narrow(input_ids=ids).logits.numpy())


@paddle.no_grad()
def test_changed_norms_count(tmp_path):
    model, _ = pair(tmp_path)
    ids = paddle.to_tensor([PROMPT[5:] * 3])
    for _ in range(2):
        logits = model.prefill(model.embed(ids), model.new_cache(1, 20))
        assert apart(logits, model(ids).logits[:, -1]) < 0.05
        model.llama.norm.weight.set_value(model.llama.norm.weight * 3)


@paddle.no_grad()
def test_with_views_of_any_stride(tmp_path):
    """Paddle's own setting, which is left where there may be a GPU."""
    model, _ = pair(tmp_path)
    ids = paddle.to_tensor([PROMPT, PROMPT[1:] + [9]])
    expected = model(ids, pixel_values=paddle.concat([picture()] * 2)).logits
    before = paddle.get_flags("FLAGS_use_stride_kernel")
    paddle.set_flags({"FLAGS_use_stride_kernel": True})
    try:
        logits = model(ids, pixel_values=paddle.concat([picture()] * 2)).logits
        model.generate(ids, pixel_values=paddle.concat([picture()] * 2), max_new_tokens=3)
        long = paddle.to_tensor([PROMPT[5:] * 30])
        cached = model.prefill(model.embed(long), model.new_cache(1, 100))
    finally:
        paddle.set_flags(before)
    assert apart(logits, expected) < 0.05
    assert apart(cached, model(long).logits[:, -1]) < 0.05
