"""The composed model: loss, outputs, projectors, what it refuses."""

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
)
SIZES = dict(
    vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
)
IMAGE = -200


def build(**changes):
    paddle.seed(0)
    model = LlavaLlamaForCausalLM(LlavaConfig(**{**SIZES, "vision_config": VISION, **changes}))
    model.eval()
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def picture(seed=0, count=1):
    return paddle.to_tensor(np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype("float32"))


PROMPT = [1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9]


def test_loss_is_the_mean_or_sum_over_labelled_tokens(model):
    ids = paddle.to_tensor([PROMPT])
    labels = paddle.to_tensor([[-100] * 6 + [8, 9]])
    out = model(ids, pixel_values=picture(), labels=labels)
    log_probs = F.log_softmax(model(ids, pixel_values=picture()).logits[0], axis=-1)
    expected = -(log_probs[5, 8] + log_probs[6, 9])
    np.testing.assert_allclose(float(out.loss), float(expected) / 2, rtol=1e-5)
    total = model(ids, pixel_values=picture(), labels=labels, loss_reduction="sum").loss
    np.testing.assert_allclose(float(total), float(expected), rtol=1e-5)
    np.testing.assert_allclose(out.logits.numpy()[0, 5:7], out.label_logits.numpy(), atol=1e-5)
    assert out.label_ids.tolist() == [8, 9] and out.logits.shape == [1, 8, 50]


def test_a_token_that_the_model_is_sure_of_still_counts(model):
    # a loss of zero is a loss: the mean is over labels, not over what is above zero
    ids = paddle.to_tensor([[3, 4, 5]])
    sure = build()
    with paddle.no_grad():
        sure.lm_head.weight.set_value(paddle.zeros_like(sure.lm_head.weight))
        sure.lm_head.weight[:, 4] = 1e4 * F.normalize(sure(ids).hidden_states[0, 0], axis=0)
    out = sure(ids, labels=paddle.to_tensor([[-100, 4, 6]]))
    log_probs = F.log_softmax(sure(ids).logits[0], axis=-1)
    assert float(log_probs[0, 4]) == 0.0
    np.testing.assert_allclose(float(out.loss), -float(log_probs[1, 6]) / 2, rtol=1e-5)


def test_no_label_is_no_loss_but_still_a_graph():
    model = build()
    loss = model(paddle.to_tensor([[3, 4]]), labels=paddle.to_tensor([[-100, -100]])).loss
    loss.backward()
    assert float(loss) == 0.0
    assert float(model.llama.embed_tokens.weight.grad.abs().sum()) == 0.0


@pytest.mark.parametrize("kind, width", [("linear", 16), ("mlp1x_gelu", 16), ("mlp3x_gelu", 16), ("identity", 24)])
def test_projectors_reach_the_decoders_width(kind, width):
    model = build(mm_projector_type=kind, vision_config={**VISION, "hidden_size": width})
    (features,) = model.encode_images(picture())
    assert features.shape == [4, 24]


def test_the_class_token_is_kept_on_request():
    (features,) = build(mm_vision_select_feature="cls_patch").encode_images(picture())
    assert features.shape == [5, 24]


@pytest.mark.parametrize("layer, built", [(-1, 3), (-2, 2), (1, 1), (0, 0)])
def test_layers_after_the_selected_one_are_not_built(layer, built):
    tower = build(mm_vision_select_layer=layer).llama.vision_tower.vision_tower.vision_model
    assert len(tower.transformer.layers) == built


def test_tied_embeddings_have_no_head():
    model = build(tie_word_embeddings=True)
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    out = model(paddle.to_tensor([[3, 4]]))
    expected = out.hidden_states @ model.llama.embed_tokens.weight.T
    np.testing.assert_allclose(out.logits.numpy(), expected.numpy(), atol=1e-5)


def test_recompute_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        model = build()
        model.train()
        if enabled:
            model.recompute_enable()
        ids = paddle.to_tensor([PROMPT])
        model(ids, pixel_values=picture(), labels=paddle.to_tensor([[-100] * 6 + [8, 9]])).loss.backward()
        gradients.append({name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 40
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, atol=1e-6, err_msg=name)


def test_pictures_without_a_tower_are_refused():
    with pytest.raises(UserError, match="no vision tower"):
        build(vision_config=None)(paddle.to_tensor([PROMPT]), pixel_values=picture())


def test_the_number_of_tiles_must_fit_the_pictures(model):
    with pytest.raises(UserError, match=r"holds 2 tiles, but the 1 picture\(s\) of image_sizes need 1"):
        model.encode_images(picture(count=2), paddle.to_tensor([[8, 8]]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "qformer"}, "mm_projector_type is 'qformer'; expected linear"),
        ({"mm_patch_merge_type": "stack"}, "mm_patch_merge_type is 'stack'; expected one of flat"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints names no canvas; set it in"),
        ({"image_grid_pinpoints": "abc"}, "image_grid_pinpoints is 'abc'; expected a list"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a whole number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "expected a type of linear or dynamic"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"conversation_template": "vicuna"}, "conversation_template is 'vicuna'; expected one of"),
        ({"mm_vision_select_layer": 9}, "expected a number from -4 to 3"),
        ({"text_config": {"hidden_size": 24}}, "LlavaConfig.from_pretrained"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers is 2.0; expected a whole number"),
        ({"vision_config": {**VISION, "patch_size": 0}}, "vision_config.patch_size is 0; expected a whole number"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(**change)


def test_placeholders_among_labels_are_not_trained(model):
    ids = paddle.to_tensor([PROMPT])
    labels = paddle.to_tensor([[-100] + PROMPT[1:]])
    expected = paddle.to_tensor([[-100] * 5 + PROMPT[5:]])
    loss = model(ids, pixel_values=picture(), labels=labels).loss
    assert float(loss) == float(model(ids, pixel_values=picture(), labels=expected).loss)


def test_a_sliding_window_is_not_passed_in_silence(tmp_path):
    model = build(sliding_window=12)
    assert model(paddle.ones([1, 12], "int64")).logits.shape == [1, 12, 50]
    with pytest.raises(UserError, match="13 tokens, but this model attends to a sliding window of 12"):
        model(paddle.ones([1, 13], "int64"))
    assert model.generate(paddle.ones([1, 4], "int64"), max_new_tokens=8, eos_token_id=[])[0].shape == [1, 8]
    with pytest.raises(UserError, match="4 tokens and up to 9 new ones .max_new_tokens., but .* window of 12"):
        model.generate(paddle.ones([1, 4], "int64"), max_new_tokens=9)
    model.save_pretrained(tmp_path)
    assert LlavaConfig.from_pretrained(tmp_path).sliding_window == 12


@pytest.mark.parametrize("ask", [lambda model, **given: model(**given), lambda model, **given: model.generate(**given)])
def test_shapes_that_do_not_fit_are_named(model, ask):
    ids = paddle.to_tensor([PROMPT])
    with pytest.raises(UserError, match=r"pixel_values has the shape \[1, 3, 12, 12\]; expected \[N, 3, 8, 8\]"):
        ask(model, input_ids=ids, pixel_values=paddle.zeros([1, 3, 12, 12]))
    with pytest.raises(UserError, match=r"attention_mask has the shape \[1, 3\], but input_ids \[1, 8\]"):
        ask(model, input_ids=ids, attention_mask=paddle.ones([1, 3], "int64"), pixel_values=picture())
    with pytest.raises(UserError, match=r"input_ids has the shape \[1, 0\]"):
        ask(model, input_ids=paddle.zeros([1, 0], "int64"))


@pytest.mark.parametrize("wrong", [50, -1, -100])
def test_ids_outside_the_vocabulary_are_named(model, wrong):
    ids = paddle.to_tensor([[1, 5, wrong]])
    for ask in (model, model.generate):
        with pytest.raises(UserError, match=f"input_ids has the id {wrong}, but the model's vocabulary has 50"):
            ask(ids)
    if wrong != -100:
        with pytest.raises(UserError, match=f"labels has the id {wrong}"):
            model(paddle.ones([1, 3], "int64"), labels=ids)


@pytest.mark.parametrize(
    "how", [{}, {"decode_strategy": "sampling"}, {"decode_strategy": "beam_search", "num_beams": 2}]
)
def test_weights_that_give_no_numbers_are_told(how):
    broken = build()
    weight = broken.llama.layers[1].self_attn.q_proj.weight
    weight.set_value(paddle.full_like(weight, float("nan")))
    for prompt in ([1, 5, 6], list(range(1, 49)) * 2):  # a short pass and a long one
        with pytest.raises(UserError, match="logits are not finite.*float32"):
            broken.generate(paddle.to_tensor([prompt]), max_new_tokens=2, **how)


@pytest.mark.parametrize("name", ["labels", "position_ids", "segment_ids"])
def test_what_goes_with_the_tokens_has_their_shape(model, name):
    ids = paddle.to_tensor([PROMPT])
    for wrong in (ids[:, :3], ids.tile([2, 1])):
        with pytest.raises(UserError, match=rf"{name} has the shape \[.*\]; expected \[1, 8\]"):
            model(input_ids=ids, pixel_values=picture(), **{name: wrong.abs()})


def test_embeddings_in_place_of_ids(model):
    ids = paddle.to_tensor([PROMPT])
    embeds = model.embed(ids, model.encode_images(picture()))
    expected = model(input_ids=ids, pixel_values=picture()).logits.numpy()
    np.testing.assert_array_equal(model(inputs_embeds=embeds).logits.numpy(), expected)
    with pytest.raises(UserError, match=r"attention_mask has the shape \[1, 3\]; expected \[1, 8\]"):
        model(inputs_embeds=embeds, attention_mask=paddle.ones([1, 3], "int64"))
    for beside in ({"input_ids": ids}, {"pixel_values": picture()}):
        with pytest.raises(UserError, match="inputs_embeds stands in place of"):
            model(inputs_embeds=embeds, **beside)


def test_what_paddlenlps_callers_pass_and_what_cannot_be_honoured(tmp_path):
    build().save_pretrained(tmp_path)
    LlavaLlamaForCausalLM.from_pretrained(tmp_path, tensor_parallel_degree=1, low_cpu_mem_usage=True)
    for given in ({"tensor_parallel_degree": 2}, {"num_hidden_layers": 2}):
        with pytest.raises(UserError, match="can't honour"):
            LlavaLlamaForCausalLM.from_pretrained(tmp_path, **given)


@pytest.mark.skipif(paddle.device.get_device() != "cpu", reason="a GPU computes in float16")
def test_float16_is_refused_by_a_cpu(tmp_path):
    build().save_pretrained(tmp_path)
    narrow = LlavaLlamaForCausalLM.from_pretrained(tmp_path, dtype="float16")
    for ask in (narrow, narrow.generate):
        with pytest.raises(UserError, match="CPU can't compute in float16.*float32 or bfloat16"):
            ask(input_ids=paddle.to_tensor([PROMPT]), pixel_values=picture())


def test_what_callers_of_other_models_pass_to_a_forward(model):
    ids = paddle.to_tensor([PROMPT])
    expected = model(ids, pixel_values=picture()).logits.numpy()
    asked = dict(return_dict=True, use_cache=False, output_hidden_states=False, output_attentions=None)
    for batch in ((ids, picture()), (ids.numpy(), picture().numpy()), (ids.tolist(), picture().numpy())):
        out = model(batch[0], pixel_values=batch[1], past_key_values=None, **asked)
        np.testing.assert_array_equal(out.logits.numpy(), expected)
    for name in ("output_hidden_states", "output_attentions", "use_cache", "colour"):
        with pytest.raises(UserError, match=f"can't honour {name}=True"):
            model(ids, **{name: True})
    with pytest.raises(UserError, match="can't honour return_dict=False"):
        model(ids, return_dict=False)
