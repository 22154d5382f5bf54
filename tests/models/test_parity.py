"""Tiny models in the published layouts against transformers (make_parity_golden.py): ids, pixels, logits, greedy tokens."""

import json
from types import SimpleNamespace

import numpy as np
import paddle
import PIL
import pytest

from paddlemix.models.llava import checkpoint, layouts
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.constants import IMAGE_TOKEN_INDEX
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.models.llava.tensor_files import Source
from paddlemix.processors.llava import LlavaProcessor
from tests.checkpoints import write_hugging_face, write_original, write_toolkit
from tests.fixtures import tiny_models as tiny
from tests.support import FIXTURES

KINDS = ("llava", "llava_next")
GOLDEN = dict(np.load(FIXTURES / "parity_golden.npz"))
if int(PIL.__version__.split(".")[0]) < 13:  # which rounds differently where it shrinks a tall picture
    GOLDEN.update(np.load(FIXTURES / "parity_golden_before_pillow13.npz"))
EVERY_CASE = [(kind, case) for kind in KINDS for case in tiny.CASES[kind]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """kind -> model and processor from Hugging Face's layout with the older names."""
    pairs = {}
    for kind in KINDS:
        folder = write_hugging_face(tmp_path_factory.mktemp(kind), kind)
        pairs[kind] = (LlavaLlamaForCausalLM.from_pretrained(folder), LlavaProcessor.from_pretrained(folder))
    return pairs


def prepare(processor, kind, case):
    text, pictures = tiny.CASES[kind][case]
    return processor(text=text, images=[tiny.picture(name) for name in pictures] or None)


@pytest.mark.parametrize("kind, case", EVERY_CASE)
def test_inputs_equal_those_of_transformers(opened, kind, case):
    batch = prepare(opened[kind][1], kind, case)
    ids = batch["input_ids"].numpy()
    ids = np.where(ids == IMAGE_TOKEN_INDEX, tiny.IMAGE_TOKEN, ids)
    np.testing.assert_array_equal(ids, GOLDEN[f"{kind}.{case}.input_ids"])
    if tiny.CASES[kind][case][1]:
        np.testing.assert_allclose(batch["pixel_values"].numpy(), GOLDEN[f"{kind}.{case}.pixel_values"], atol=1e-5)
    else:
        assert "pixel_values" not in batch


@pytest.mark.parametrize("kind, case", EVERY_CASE)
def test_logits_and_greedy_tokens_equal_those_of_transformers(opened, kind, case):
    model, processor = opened[kind]
    batch = prepare(processor, kind, case)
    with paddle.no_grad():
        logits = model(**batch).logits[0].numpy()
    golden = {name: GOLDEN[f"{kind}.{case}.{name}"] for name in ("logits", "mean", "lse", "signed", "greedy")}
    wide = logits.astype(np.float64)
    signs = np.random.RandomState(7).choice([-1.0, 1.0], (logits.shape[1], 4)).astype(np.float32)
    np.testing.assert_allclose(logits[:, GOLDEN["chosen"]], golden["logits"], atol=1e-4)
    np.testing.assert_allclose(wide.mean(-1), golden["mean"], atol=1e-5)
    np.testing.assert_allclose(np.log(np.exp(wide).sum(-1)), golden["lse"], atol=1e-5)
    # errors of 1e-4 in all of 32064 entries would add up to about 0.02
    np.testing.assert_allclose(wide @ signs, golden["signed"], atol=0.02)
    ids, _ = model.generate(**batch, max_new_tokens=32)
    assert ids[0].tolist() == golden["greedy"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_left_padded_batch_equals_its_single_run(opened, kind):
    model, processor = opened[kind]
    cases = ["one", "none", "two", "tall"]
    texts = [tiny.CASES[kind][case][0] for case in cases]
    pictures = [[tiny.picture(name) for name in tiny.CASES[kind][case][1]] for case in cases]
    batch = processor(text=texts, images=pictures)
    assert not batch["attention_mask"][1, 0]
    with paddle.no_grad():
        logits = model(**batch).logits.numpy()
    ids, _ = model.generate(**batch, max_new_tokens=32)
    for row, case in enumerate(cases):
        golden = GOLDEN[f"{kind}.{case}.logits"]
        np.testing.assert_allclose(logits[row, -len(golden) :][:, GOLDEN["chosen"]], golden, atol=1e-4)
        assert ids[row].tolist() == GOLDEN[f"{kind}.{case}.greedy"].tolist()


def _write_newer(folder, kind):
    return write_hugging_face(folder, kind, newer=True, shards=3)


def _write_separate_tower(folder, kind):
    return write_original(folder / "weights", kind, tower=folder / "clip")


def _write_tower_beside(folder, kind):
    name = "openai/clip-vit-large-patch14-336"
    return write_original(folder / "weights", kind, tower=folder / "clip-vit-large-patch14-336", mm_vision_tower=name)


def _write_original(folder, kind):
    return write_original(folder, kind)


def _write_pdparams(folder, kind):
    return write_toolkit(folder, kind)


def _write_pdparams_shards(folder, kind):
    return write_toolkit(folder, kind, shards=2)


def _write_paddle_safetensors(folder, kind):
    return write_toolkit(folder, kind, suffix="safetensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "write",
    [
        _write_newer,
        _write_original,
        _write_separate_tower,
        _write_tower_beside,
        _write_pdparams,
        _write_pdparams_shards,
        _write_paddle_safetensors,
    ],
)
def test_the_same_weights_in_another_layout_give_the_same_logits(opened, tmp_path, write, kind):
    model, processor = opened[kind]
    folder = write(tmp_path / "a folder with any name", kind)
    other = LlavaLlamaForCausalLM.from_pretrained(folder)
    batch = prepare(processor, kind, "wide")
    with paddle.no_grad():
        np.testing.assert_array_equal(other(**batch).logits.numpy(), model(**batch).logits.numpy())
    theirs = prepare(LlavaProcessor.from_pretrained(folder), kind, "wide")
    for name in batch:
        np.testing.assert_array_equal(theirs[name].numpy(), batch[name].numpy())


# ---- full size ----

TABLES = json.loads((FIXTURES / "full_size_names.json").read_text())
VICUNA = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}
SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
FULL_SIZE = {
    "llava-hf/llava-1.5-7b-hf": {"model_type": "llava", "text_config": VICUNA},
    "llava-hf/llava-1.5-13b-hf": {"model_type": "llava", "text_config": {**VICUNA, **SIZES_13B}},
    "llava-hf/llava-v1.6-vicuna-7b-hf": {"model_type": "llava_next", "text_config": VICUNA},
    "llava-hf/llava-v1.6-mistral-7b-hf": {
        "model_type": "llava_next",
        "text_config": {"model_type": "mistral", "vocab_size": 32064, "sliding_window": None, "rope_theta": 1e6},
    },
    "liuhaotian/llava-v1.5-7b": {"model_type": "llava", "hidden_size": 4096, "mm_projector_type": "mlp2x_gelu"},
    "liuhaotian/llava-v1.5-13b": {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", **SIZES_13B},
    "liuhaotian/llava-v1.6-vicuna-7b": {
        "model_type": "llava_llama",
        "hidden_size": 4096,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]",
    },
}


def expand(table):
    """Pattern -> [count, shape] back into name -> shape."""
    names = {}
    for pattern, (count, shape) in table.items():
        names.update({pattern.replace("{}", str(i)): shape for i in range(count)})
    return names


@pytest.mark.parametrize("name", FULL_SIZE)
def test_published_checkpoints_fit_by_names_and_shapes(name, tmp_path):
    config = dict(FULL_SIZE[name])
    if name.startswith("liuhaotian"):
        config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = checkpoint.read_config(tmp_path)
    with checkpoint.no_init():
        model = LlavaLlamaForCausalLM(config)
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}

    sources, unknown = {}, []
    published = {key: (shape, layouts.place_in(key, False)) for key, shape in expand(TABLES[name]).items()}
    if not any("vision_tower" in key for key in published):
        tower = expand(TABLES["openai/clip-vit-large-patch14-336"])
        for key, shape in tower.items():
            known, target = layouts.read_tower_name(key)
            transpose = target is not None and layouts.is_linear(target)
            published[key] = (shape, (known, layouts.Place(target, transpose)))
    for key, (shape, (known, place)) in published.items():
        if not known:
            unknown.append(key)
        elif place.name is not None:
            tensor = SimpleNamespace(shape=tuple(shape), dtype="float16")
            sources[place.name] = Source(tensor, key, place.transpose)
    checkpoint.check(shapes, sources, unknown, config, tmp_path)
    assert not parameters_with_memory(model)


def parameters_with_memory(model):
    return [name for name, parameter in model.named_parameters() if parameter._is_initialized()]


def test_the_toolkits_names_are_paddlenlps():
    """Its classes are PaddleNLP's Llama and CLIP, with the tower and the projector inside the Llama model."""
    from paddlenlp.transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    text = {key: value for key, value in tiny.TEXT.items() if key != "model_type"}
    vision = {key: value for key, value in tiny.VISION.items() if key != "model_type"}
    llama = LlamaForCausalLM(LlamaConfig(**text)).state_dict()
    clip = CLIPVisionModel(CLIPVisionConfig(**vision)).state_dict()
    theirs = {name: tuple(tensor.shape) for name, tensor in llama.items()}
    theirs.update({f"llama.vision_tower.vision_tower.{name}": tuple(tensor.shape) for name, tensor in clip.items()})
    config = LlavaConfig(**text, vision_config=vision, mm_vision_select_layer=3)
    ours = {name: tuple(p.shape) for name, p in LlavaLlamaForCausalLM(config).named_parameters()}
    unused = {name for name in theirs if ".ln_post." in name}
    assert {name: shape for name, shape in ours.items() if "mm_projector" not in name} == {
        name: shape for name, shape in theirs.items() if name not in unused
    }
