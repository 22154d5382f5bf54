"""The models that are measured: sizes, and a folder of random weights in Hugging Face's layout that both sides open."""

import json
import sys
from pathlib import Path
from typing import Dict, Iterator, Tuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddlemix.models.llava.demo import DEMO_VISION  # noqa: E402

VIT_L_336 = dict(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
SHAPES = {
    # SmolLM2-135M's decoder
    "smollm2": dict(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_theta=100000.0,
    ),
    # TinyLlama-1.1B's decoder
    "tinyllama": dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        rope_theta=10000.0,
    ),
}
# the same width without grouped queries, eight layers
SHAPES["multihead"] = dict(SHAPES["tinyllama"], num_key_value_heads=32, num_hidden_layers=8)
# the built-in default model: the same decoder behind a tower of its own
SHAPES["default"] = SHAPES["smollm2"]
VISIONS = {"default": dict(DEMO_VISION, projection_dim=64)}


def tensors(text: Dict, vision: Dict) -> Iterator[Tuple[str, Tuple[int, ...]]]:
    """Names and shapes of a Hugging Face ``llava`` checkpoint, torch's [out, in] order."""
    width, wide = text["hidden_size"], vision["hidden_size"]
    head = width // text["num_attention_heads"]
    yield "language_model.model.embed_tokens.weight", (text["vocab_size"], width)
    for n in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{n}."
        groups = head * text["num_key_value_heads"]
        yield layer + "self_attn.q_proj.weight", (width, width)
        yield layer + "self_attn.k_proj.weight", (groups, width)
        yield layer + "self_attn.v_proj.weight", (groups, width)
        yield layer + "self_attn.o_proj.weight", (width, width)
        yield layer + "mlp.gate_proj.weight", (text["intermediate_size"], width)
        yield layer + "mlp.up_proj.weight", (text["intermediate_size"], width)
        yield layer + "mlp.down_proj.weight", (width, text["intermediate_size"])
        yield layer + "input_layernorm.weight", (width,)
        yield layer + "post_attention_layernorm.weight", (width,)
    yield "language_model.model.norm.weight", (width,)
    if not text["tie_word_embeddings"]:
        yield "language_model.lm_head.weight", (text["vocab_size"], width)
    yield "multi_modal_projector.linear_1.weight", (width, wide)
    yield "multi_modal_projector.linear_1.bias", (width,)
    yield "multi_modal_projector.linear_2.weight", (width, width)
    yield "multi_modal_projector.linear_2.bias", (width,)
    tower = "vision_tower.vision_model."
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    yield tower + "embeddings.class_embedding", (wide,)
    yield tower + "embeddings.patch_embedding.weight", (wide, 3, vision["patch_size"], vision["patch_size"])
    yield tower + "embeddings.position_embedding.weight", (patches + 1, wide)
    for norm in ("pre_layrnorm", "post_layernorm"):
        yield f"{tower}{norm}.weight", (wide,)
        yield f"{tower}{norm}.bias", (wide,)
    for n in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{n}."
        for name, out, into in (
            ("self_attn.q_proj", wide, wide),
            ("self_attn.k_proj", wide, wide),
            ("self_attn.v_proj", wide, wide),
            ("self_attn.out_proj", wide, wide),
            ("mlp.fc1", vision["intermediate_size"], wide),
            ("mlp.fc2", wide, vision["intermediate_size"]),
        ):
            yield f"{layer}{name}.weight", (out, into)
            yield f"{layer}{name}.bias", (out,)
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{layer}{norm}.weight", (wide,)
            yield f"{layer}{norm}.bias", (wide,)


def make_folder(shape: str, root: Path, stored: str = "float32") -> Path:
    """Writes ``root/shape`` (config.json, model.safetensors, seeded) unless it is there; the folder.

    Args:
        stored: what the weights are written in: float32, or float16 as most published checkpoints.
    """
    from safetensors.numpy import save_file

    folder = root / (shape if stored == "float32" else f"{shape}_{stored}")
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    text, vision = SHAPES[shape], VISIONS.get(shape, VIT_L_336)
    random = np.random.default_rng(0)
    weights = {}
    for name, size in tensors(text, vision):
        values = random.standard_normal(size, dtype=np.float32) * 0.02
        if "norm" in name and name.endswith("weight"):
            values += np.float32(1)
        weights[name] = values.astype(stored, copy=False)
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": text["vocab_size"] - 1,
        "vision_feature_layer": -2 if vision is VIT_L_336 else -1,
        "vision_feature_select_strategy": "default",
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": text["tie_word_embeddings"],
        "torch_dtype": stored,
        "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, **text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors.part", metadata={"format": "pt"})
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")
    return folder
