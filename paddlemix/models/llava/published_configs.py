"""config.json of every published layout, read as a :class:`LlavaConfig`, and written back.

The toolkit's and the original release's are flat (``mm_*`` beside LLaMA's keys), Hugging Face's is nested. A key that a
file leaves out has the default of the library that wrote it: transformers writes only what differs from its own.
"""

import logging
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

from paddlemix.errors import UserError
from paddlemix.models.llava.configuration import TOKEN_IDS, LlavaConfig, are_token_ids, check_tower_name
from paddlemix.models.llava.layouts import TOWER
from paddlemix.models.llava.tensor_files import read_json

__all__ = [
    "KNOWN_TOWERS",
    "chatml_template",
    "clip_sizes",
    "conversation_template",
    "infer_clip_sizes",
    "kind_of",
    "processor_template",
    "read_flat",
    "read_nested",
    "tokenizer_template",
    "write_flat",
    "write_nested",
]

logger = logging.getLogger(__name__)

# Defaults of transformers' LlamaConfig, MistralConfig and CLIPVisionConfig, and of LlavaConfig without a vision_config.
_DECODER_DEFAULTS: Dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MISTRAL_DEFAULTS = {
    **_DECODER_DEFAULTS,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
_CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
_CLIP_L_336 = {
    **_CLIP_DEFAULTS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# Towers whose sizes need no look-up (OpenAI's CLIP; the names are those of mm_vision_tower).
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": _CLIP_L_336,
    "openai/clip-vit-large-patch14": {**_CLIP_L_336, "image_size": 224},
    "openai/clip-vit-base-patch16": {**_CLIP_DEFAULTS, "patch_size": 16},
    "openai/clip-vit-base-patch32": _CLIP_DEFAULTS,
}
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # [height, width]

# PaddleNLP's CLIP configs of 2022 have names of their own.
_OLD_PADDLE_CLIP = {
    "image_resolution": "image_size",
    "vision_layers": "num_hidden_layers",
    "vision_heads": "num_attention_heads",
    "vision_embed_dim": "hidden_size",
    "vision_patch_size": "patch_size",
    "vision_hidden_act": "hidden_act",
}

_FLAT_TYPES = ("llava", "llava_llama", "llava_mistral")
_TEXT_TYPES = ("llama", "mistral")
_NESTED_TYPES = ("llava", "llava_next")


def kind_of(raw: Mapping[str, Any], path: Path) -> str:
    """``flat`` (toolkit, original), ``nested`` (Hugging Face) or ``text`` (a decoder alone), by what the file holds.

    Raises:
        UserError: another architecture, or quantised weights.
    """
    model_type = raw.get("model_type")
    text = raw.get("text_config") or {}
    for part, name in ((raw, "quantization_config"), (text, "text_config.quantization_config")):
        if part.get("quantization_config"):
            raise UserError(
                f"{path} says {name}; expected weights that are not quantised (float32, float16 or bfloat16)."
            )
    if raw.get("mm_resampler_type"):
        raise UserError(
            f"{path} has mm_resampler_type {raw['mm_resampler_type']!r}; expected none, as in LLaVA-1.5 and 1.6."
        )
    if model_type in _NESTED_TYPES and ("text_config" in raw or "vision_config" in raw) and "hidden_size" not in raw:
        return "nested"
    if model_type == "llava_next":
        return "nested"
    if model_type in _FLAT_TYPES or (model_type in _TEXT_TYPES and raw.get("mm_vision_tower")):
        return "flat"
    if model_type in _TEXT_TYPES:
        return "text"
    raise UserError(
        f"{path} has model_type {model_type!r}; expected one of "
        f"{', '.join(sorted({*_FLAT_TYPES, *_NESTED_TYPES, *_TEXT_TYPES}))}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# the decoder's keys, the same in all layouts


def _decoder(raw: Mapping[str, Any], path: Path, mistral: bool, defaults: Mapping[str, Any]) -> Dict[str, Any]:
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise UserError(f"{path} has {key} true; expected a LLaMA decoder without biases.")
    for key in ("alibi", "use_long_sequence_strategies"):  # PaddleNLP's
        if raw.get(key):
            raise UserError(f"{path} has {key} true; expected a decoder with rotary positions.")
    values = {key: raw.get(key, default) for key, default in defaults.items()}
    _read_paddle_scaling(raw, path, values)
    parameters = raw.get("rope_parameters")  # transformers 5
    if isinstance(parameters, dict):
        values["rope_theta"] = parameters.get("rope_theta", values["rope_theta"])
        if parameters.get("rope_type", "default") != "default":
            values["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    scaling = values["rope_scaling"]
    if isinstance(scaling, dict):
        kind = scaling.get("type", scaling.get("rope_type"))
        values["rope_scaling"] = None if kind in (None, "default") else {"type": kind, "factor": scaling.get("factor")}
    ours = "conversation_template" in raw
    window = values.pop("sliding_window", None) if mistral else raw.get("sliding_window") if ours else None
    if window and window <= values["max_position_embeddings"]:
        # within the window, windowed and full attention are the same
        if not ours:
            logger.info("%s: the context is limited to the sliding window of %d tokens.", path, window)
        values["max_position_embeddings"] = values["sliding_window"] = window
    for key in ("pad_token_id", "use_flash_attention"):
        if key in raw:
            values[key] = raw[key]
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if isinstance(dtype, str):
        values["dtype"] = dtype.replace("torch.", "").replace("paddle.", "")
    return values


def _read_paddle_scaling(raw: Mapping[str, Any], path: Path, values: Dict[str, Any]) -> None:
    """PaddleNLP's words for positions past the trained length, if there are any, as ours in ``values``."""
    kind, factor = raw.get("rope_scaling_type"), raw.get("rope_scaling_factor", 1.0)
    if kind is None:
        return
    if kind not in ("linear", "ntk", "dynamic_ntk"):
        raise UserError(f"{path} has rope_scaling_type {kind!r}; expected linear, ntk or dynamic_ntk.")
    if kind != "ntk":
        values["rope_scaling"] = {"type": "linear" if kind == "linear" else "dynamic", "factor": factor}
        return
    # the base grows once and for all (LlamaNTKScalingRotaryEmbedding)
    width = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
    values["rope_theta"] *= factor ** (width / (width - 2))
    values["max_position_embeddings"] = int(values["max_position_embeddings"] * factor)


def _is_mistral(raw: Mapping[str, Any]) -> bool:
    names = [str(raw.get("model_type", "")), *map(str, raw.get("architectures") or [])]
    return any("mistral" in name.lower() for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# one reader per layout


def read_flat(
    raw: Mapping[str, Any], path: Path, find_tower: Callable[[str], Optional[Dict[str, Any]]], text_only: bool
) -> Dict[str, Any]:
    """Arguments of LlavaConfig from a flat config.json.

    Args:
        find_tower: sizes of the CLIP tower that ``mm_vision_tower`` names.
        text_only: a decoder alone.
    """
    mistral = _is_mistral(raw)
    ours = "conversation_template" in raw  # every config that we write has it, and leaves out our own defaults
    defaults = _our_defaults() if ours else _MISTRAL_DEFAULTS if mistral else _DECODER_DEFAULTS
    values = _decoder(raw, path, mistral, defaults)
    if text_only:
        return values
    own = _our_mm_defaults()
    for key, default in own.items():
        if key in raw:
            values[key] = raw[key]
        elif ours:
            values[key] = default
    if not ours:
        # what the original release's code takes where a key is absent
        values.setdefault("mm_projector_type", "linear")
        if raw.get("image_aspect_ratio") == "anyres" and not raw.get("mm_patch_merge_type"):
            values["mm_patch_merge_type"] = "spatial_unpad"  # the toolkit's class has it where the file has not
    if raw.get("vision_config"):
        values["vision_config"] = clip_sizes(raw["vision_config"], path) if not ours else raw["vision_config"]
    elif raw.get("mm_vision_tower"):
        check_tower_name(raw["mm_vision_tower"])
        values["vision_config"] = find_tower(raw["mm_vision_tower"])
    if "demo_note" in raw:  # what the chat says of the built-in model
        values["demo_note"] = raw["demo_note"]
    return values


def _our_defaults() -> Dict[str, Any]:
    config = LlavaConfig()
    return {key: getattr(config, key) for key in (*_DECODER_DEFAULTS, "pad_token_id")}


def _our_mm_defaults() -> Dict[str, Any]:
    config = LlavaConfig()
    keys = (
        *("mm_vision_tower", "mm_hidden_size", "mm_vision_select_layer", "mm_vision_select_feature"),
        *("mm_projector_type", "mm_patch_merge_type", "mm_use_im_start_end"),
        *("image_aspect_ratio", "image_grid_pinpoints", "conversation_template", "demo_note"),
    )
    return {key: getattr(config, key) for key in keys}


def read_nested(raw: Mapping[str, Any], path: Path, pads: bool, has_head: Callable[[], bool]) -> Dict[str, Any]:
    """Arguments of LlavaConfig from Hugging Face's ``llava`` or ``llava_next``.

    Args:
        pads: whether the image processor beside it pads pictures to squares.
        has_head: whether the weights have an lm_head; asked where the config doesn't settle it.
    """
    text = dict(raw.get("text_config") or {})
    for key in ("conversation_template", "use_flash_attention"):  # written by this project, or by its users
        if key in raw:
            text[key] = raw[key]
    text_type = text.get("model_type", "llama")
    if text_type not in _TEXT_TYPES:
        raise UserError(f"{path} has a decoder of model_type {text_type!r}; expected {' or '.join(_TEXT_TYPES)}.")
    mistral = text_type == "mistral"
    values = _decoder(text, path, mistral, _MISTRAL_DEFAULTS if mistral else _DECODER_DEFAULTS)
    if raw.get("pad_token_id") is not None and "pad_token_id" not in text:
        values["pad_token_id"] = raw["pad_token_id"]
    if raw.get("tie_word_embeddings") and "tie_word_embeddings" not in text:
        values["tie_word_embeddings"] = not has_head()  # transformers has read this key in more than one way
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if isinstance(dtype, str):
        values["dtype"] = dtype.replace("torch.", "")
    vision = raw.get("vision_config")
    values["vision_config"] = dict(_CLIP_L_336) if vision is None else clip_sizes(vision, path)
    layer = raw.get("vision_feature_layer", -2)
    if isinstance(layer, list) and len(layer) == 1:
        layer = layer[0]
    if not isinstance(layer, int):
        raise UserError(f"{path} has vision_feature_layer {layer!r}; expected the number of one layer.")
    strategy = raw.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise UserError(f"{path} has vision_feature_select_strategy {strategy!r}; expected 'default' or 'full'.")
    if raw.get("projector_hidden_act", "gelu") != "gelu":
        raise UserError(f"{path} has projector_hidden_act {raw['projector_hidden_act']!r}; expected 'gelu'.")
    if raw.get("multimodal_projector_bias", True) is not True:
        raise UserError(f"{path} has multimodal_projector_bias false; expected a projector with biases.")
    values.update(
        mm_vision_select_layer=layer,
        mm_vision_select_feature="patch" if strategy == "default" else "cls_patch",
        mm_projector_type="mlp2x_gelu",
    )
    if raw.get("model_type") == "llava_next":
        pinpoints = raw.get("image_grid_pinpoints") or _NEXT_PINPOINTS
        values.update(
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial_unpad",
            image_grid_pinpoints=[[width, height] for height, width in pinpoints],
        )
    else:
        values.update(image_aspect_ratio="pad" if pads else "square", mm_patch_merge_type="flat")
    return values


# ---------------------------------------------------------------------------------------------------------------------
# the tower


def clip_sizes(raw: Mapping[str, Any], path: Path) -> Dict[str, Any]:
    """Sizes of a CLIP vision tower from its own config, or from that of a full CLIP (PaddleNLP's, Hugging Face's).

    Raises:
        UserError: not a CLIP vision transformer.
    """
    model_type = raw.get("model_type", "clip_vision_model")
    if model_type not in ("clip", "clip_vision_model"):
        raise UserError(f"{path} has a vision tower of model_type {model_type!r}; expected CLIP ('clip_vision_model').")
    if any(key in raw for key in _OLD_PADDLE_CLIP):
        vision = {new: raw[old] for old, new in _OLD_PADDLE_CLIP.items() if old in raw}
        if "hidden_size" in vision:
            vision["intermediate_size"] = int(raw.get("vision_mlp_ratio", 4)) * vision["hidden_size"]
    elif model_type == "clip" or "vision_config" in raw:
        vision = {**(raw.get("vision_config") or {}), **(raw.get("vision_config_dict") or {})}
    else:
        vision = dict(raw)
    sizes = {key: vision.get(key, default) for key, default in _CLIP_DEFAULTS.items()}
    if not all(isinstance(sizes[key], int) for key in sizes if key not in ("layer_norm_eps", "hidden_act")):
        raise UserError(f"{path} has a vision tower that is no transformer ({sizes}); expected CLIP's ViT.")
    return sizes


def infer_clip_sizes(
    tower: Mapping[str, Tuple[int, ...]], name: str, path: Path, hint: Optional[Mapping[str, Any]] = None
) -> Dict[str, Any]:
    """Sizes of a tower from the shapes of its tensors, where no config of it is at hand.

    The number of heads leaves no trace in the shapes. It is that of ``hint`` (sizes of the tower of the same name) if its
    width fits, else width / 64 as in all of OpenAI's towers.

    Args:
        tower: our name -> shape.
    """
    try:
        width, _, patch, _ = tower[TOWER + "conv1.weight"]
        positions = tower[TOWER + "positional_embedding.weight"][0]
        inner = max(tower[TOWER + "transformer.layers.0.linear1.weight"])
        inner = inner if inner != width else min(tower[TOWER + "transformer.layers.0.linear1.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds half a vision tower: {error} is missing; fetch the checkpoint again.") from error
    layers = 1 + max(int(m.group(1)) for m in (re.search(r"transformer\.layers\.(\d+)\.", key) for key in tower) if m)
    sizes = {
        **_CLIP_DEFAULTS,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "patch_size": patch,
        "image_size": round((positions - 1) ** 0.5) * patch,
    }
    if hint is not None and hint["hidden_size"] == width:
        sizes.update(
            {key: hint[key] for key in ("num_attention_heads", "layer_norm_eps", "hidden_act", "num_hidden_layers")}
        )
        sizes["image_size"] = (
            hint["image_size"] if hint["image_size"] // patch == sizes["image_size"] // patch else sizes["image_size"]
        )
        return sizes
    if width % 64:
        raise UserError(
            f"{path} does not say how many heads its vision tower of width {width} has; put the tower's config.json into a "
            f"folder that mm_vision_tower (now {name!r}) names, or its sizes into config.json as vision_config."
        )
    sizes["num_attention_heads"] = width // 64
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# what other files of the folder say


def end_tokens(folder: Path) -> Any:
    """``eos_token_id`` of generation_config.json, which may list several; None if the folder has no such file."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    if not are_token_ids(ends):
        raise UserError(f"{path} has eos_token_id {ends!r}; expected {TOKEN_IDS}.")
    return ends


def pads_pictures(folder: Path) -> bool:
    """Whether Hugging Face's image processor in the folder pads pictures to squares (``do_pad``)."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = read_json(folder / name)
            values = values.get("image_processor", values) if name == "processor_config.json" else values
            if isinstance(values, dict) and "do_pad" in values:
                return bool(values["do_pad"])
    return False


def conversation_template(raw: Mapping[str, Any], folder: Path) -> str:
    """The template that a checkpoint was trained with, where its config doesn't say: from structural facts alone.

    Hugging Face's processors have a Jinja template, whose marks tell it. Else Mistral's architecture comes with Mistral's
    instruction format, a tokenizer that has <|im_start|> with ChatML, and all others were trained as Vicuna v1.
    """
    if raw.get("conversation_template"):
        return str(raw["conversation_template"])
    mistral = _is_mistral(raw) or _is_mistral(raw.get("text_config") or {})
    jinja = processor_template(folder) if "text_config" in raw else ""
    if jinja:
        # the published template of LLaVA-1.6 on Mistral writes system texts as LLaMA-2 does
        instructions = "llava_llama_2" if "<<SYS>>" in jinja and not mistral else "mistral_instruct"
        marks = {"<|im_start|>": chatml_template(jinja), "[INST]": instructions, "ASSISTANT:": "vicuna_v1"}
        for mark, name in marks.items():
            if mark in jinja:
                return name
        logger.warning(
            "The chat template of %s is none of those that are known here, so prompts are written in another one.",
            folder,
        )
    if mistral:
        return "mistral_instruct"
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json", "tokenizer.json"):
        path = folder / name
        if path.is_file() and '"<|im_start|>"' in path.read_text(encoding="utf-8", errors="replace"):
            return chatml_template(tokenizer_template(folder))
    return "vicuna_v1"


def chatml_template(chat_template: str) -> str:
    """Which of the two templates with <|im_start|>: SmolLM2's begins with a system message of its own."""
    return "smollm2" if "named SmolLM, trained by Hugging Face" in chat_template else "chatml_direct"


def tokenizer_template(folder: Path) -> str:
    """The Jinja template in tokenizer_config.json; empty where there is none."""
    path = folder / "tokenizer_config.json"
    value = read_json(path).get("chat_template") if path.is_file() else None
    return value if isinstance(value, str) else ""


def processor_template(folder: Path) -> str:
    """The Jinja template that Hugging Face's processor in the folder writes prompts by; empty where there is none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "processor_config.json"):
        value = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(value, str):
            return value
    return ""


def files_of(folder: Path) -> List[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_flat(config: LlavaConfig, dtype: str) -> Dict[str, Any]:
    """config.json of the original release; the sizes of the tower and the template stand in it beside the release's keys."""
    values = _written_decoder(config, dtype)
    if config.vision is None:
        return _plain_llama(config, values)
    return {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        **values,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "mm_hidden_size": config.mm_hidden_size,
        "mm_patch_merge_type": config.mm_patch_merge_type,
        "mm_projector_type": config.mm_projector_type,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": config.mm_use_im_start_end,
        "mm_vision_select_feature": config.mm_vision_select_feature,
        "mm_vision_select_layer": config.mm_vision_select_layer,
        "mm_vision_tower": tower_name(config),
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,  # the release then builds the tower before it reads the weights
        "use_mm_proj": True,
        "vision_config": config.vision_config,
        "conversation_template": config.conversation_template,
    }


def write_nested(config: LlavaConfig, dtype: str, image_token: int, pad_token: int) -> Dict[str, Any]:
    """config.json of transformers' ``llava`` (square, pad) or ``llava_next`` (anyres).

    Raises:
        UserError: a choice that transformers' classes don't have.
    """
    text = _written_decoder(config, dtype)
    if config.vision is None:
        return _plain_llama(config, text)
    for key, allowed in (
        ("mm_projector_type", ("mlp2x_gelu",)),
        ("mm_use_im_start_end", (False,)),
        ("mm_patch_merge_type", ("spatial_unpad",) if config.image_aspect_ratio == "anyres" else ("flat",)),
    ):
        if getattr(config, key) not in allowed:
            raise UserError(
                f"{key} is {getattr(config, key)!r} with image_aspect_ratio {config.image_aspect_ratio!r}, which the layout "
                f"huggingface can't say; expected {allowed[0]!r}, or use --layout toolkit or original."
            )
    anyres = config.image_aspect_ratio == "anyres"
    layer = config.mm_vision_select_layer
    values = {
        "model_type": "llava_next" if anyres else "llava",
        "architectures": ["LlavaNextForConditionalGeneration" if anyres else "LlavaForConditionalGeneration"],
        "text_config": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **text},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 768, **(config.vision_config or {})},
        "image_token_index": image_token,
        "pad_token_id": pad_token,
        "tie_word_embeddings": config.tie_word_embeddings,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default" if config.mm_vision_select_feature == "patch" else "full",
        "torch_dtype": dtype,
        "conversation_template": config.conversation_template,
    }
    if anyres:
        values["image_grid_pinpoints"] = [[height, width] for width, height in config.image_grid_pinpoints]
        values["use_image_newline_parameter"] = True
    else:
        values["image_seq_length"] = config.vision.num_patches + (config.mm_vision_select_feature == "cls_patch")
    return values


def _plain_llama(config: LlavaConfig, decoder: Dict[str, Any]) -> Dict[str, Any]:
    template = {
        "conversation_template": config.conversation_template
    }  # transformers passes over keys that it doesn't know
    return {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **decoder, **template}


def _written_decoder(config: LlavaConfig, dtype: str) -> Dict[str, Any]:
    values = {key: getattr(config, key) for key in _DECODER_DEFAULTS}
    scaling = config.rope_scaling
    if scaling is not None:  # both words for it, as older and newer transformers look for one of them
        kind = scaling.get("type", scaling.get("rope_type"))
        values["rope_scaling"] = {"type": kind, "rope_type": kind, "factor": float(scaling["factor"])}
    if config.sliding_window:
        values["sliding_window"] = config.sliding_window
    return {**values, "pad_token_id": config.pad_token_id, "torch_dtype": dtype}


def tower_name(config: LlavaConfig) -> str:
    """What mm_vision_tower says: the checkpoint's own word, else the known tower of those sizes."""
    if config.mm_vision_tower:
        return config.mm_vision_tower
    sizes = config.vision_config or {}
    return next((name for name, known in KNOWN_TOWERS.items() if known == sizes), "vision_tower")
