"""A LLaMA decoder in a GGUF file (llama.cpp's format) becomes a folder that ``from_pretrained`` opens.

The folder holds the weights in float32 under the toolkit's names, ``config.json``, and ``tokenizer.json`` with
``tokenizer_config.json`` made from the vocabulary and the merges inside the file. The model takes text only.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Union

import numpy as np

from paddlemix.errors import UserError
from paddlemix.models.llava.published_configs import chatml_template
from paddlemix.models.llava.tensor_files import TensorSpec, write_aside, write_json, write_safetensors

__all__ = ["convert_gguf"]

# Names of llama.cpp (gguf-py, constants.py) and of the toolkit; {} is the layer's number, True: a Linear weight.
_TENSORS = {
    "token_embd.weight": ("llama.embed_tokens.weight", False),
    "output_norm.weight": ("llama.norm.weight", False),
    "output.weight": ("lm_head.weight", True),
    "blk.{}.attn_norm.weight": ("llama.layers.{}.input_layernorm.weight", False),
    "blk.{}.attn_q.weight": ("llama.layers.{}.self_attn.q_proj.weight", True),
    "blk.{}.attn_k.weight": ("llama.layers.{}.self_attn.k_proj.weight", True),
    "blk.{}.attn_v.weight": ("llama.layers.{}.self_attn.v_proj.weight", True),
    "blk.{}.attn_output.weight": ("llama.layers.{}.self_attn.o_proj.weight", True),
    "blk.{}.ffn_norm.weight": ("llama.layers.{}.post_attention_layernorm.weight", False),
    "blk.{}.ffn_gate.weight": ("llama.layers.{}.mlp.gate_proj.weight", True),
    "blk.{}.ffn_up.weight": ("llama.layers.{}.mlp.up_proj.weight", True),
    "blk.{}.ffn_down.weight": ("llama.layers.{}.mlp.down_proj.weight", True),
}

# How the text is cut before the merges, by the name that GGUF gives it. SmolLM's splits digits one by one, then as GPT-2.
_PRE_TOKENIZERS = ("smollm", "gpt-2")

_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # token types of GGUF


def convert_gguf(gguf_path: Union[str, Path], output_folder: Union[str, Path]) -> None:
    """Writes the decoder and the tokenizer of a GGUF file to a folder (made if it isn't there).

    Quantised tensors are expanded to float32. llama.cpp permutes the rows of q and k for its rotary kernel; that is
    undone. ``config.json`` is written last, so a folder that has it is whole.

    Raises:
        UserError: no GGUF file, an architecture other than llama, or a tokenizer other than byte-level BPE.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("Reading GGUF needs the package gguf; `pip install gguf` brings it.") from error

    path, folder = Path(gguf_path), Path(output_folder)
    if not path.is_file():
        raise UserError(f"There is no GGUF file at {path}.")
    try:
        reader = GGUFReader(str(path))
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}); fetch it again.") from error
    config = _config(values, path)
    tokenizer = _tokenizer(values, path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config["tie_word_embeddings"] = "output.weight" not in tensors

    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(tensors, config, folder / "model.safetensors", path)
    with write_aside(folder / "tokenizer.json") as aside:
        aside.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _tokenizer_config(values))
    write_json(folder / "config.json", config)


def _config(values: Dict[str, Any], path: Path) -> Dict[str, Any]:
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path} holds a {architecture!r} model; expected 'llama', the decoder of LLaVA.")
    try:
        heads = int(values["llama.attention.head_count"])
        width = int(values["llama.embedding_length"])
        config = {
            "model_type": "llava",
            "architectures": ["LlavaLlamaForCausalLM"],
            "vocab_size": len(values["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "intermediate_size": int(values["llama.feed_forward_length"]),
            "num_hidden_layers": int(values["llama.block_count"]),
            "num_attention_heads": heads,
            "num_key_value_heads": int(values.get("llama.attention.head_count_kv", heads)),
            "head_dim": int(values.get("llama.attention.key_length", width // heads)),
            # float32 in the file: 9.999999747e-06 is meant as 1e-05
            "rms_norm_eps": float(
                np.format_float_positional(np.float32(values["llama.attention.layer_norm_rms_epsilon"]))
            ),
            "rope_theta": float(values.get("llama.rope.freq_base", 10000.0)),
            "max_position_embeddings": int(values["llama.context_length"]),
            "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": values.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": values.get("tokenizer.ggml.padding_token_id", values.get("tokenizer.ggml.eos_token_id")),
            "vision_config": None,
            "dtype": "float32",
        }
    except KeyError as error:
        raise UserError(f"{path} does not say {error.args[0]}, which a LLaMA decoder needs; fetch it again.") from error
    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": float(values["llama.rope.scaling.factor"])}
    elif scaling != "none":
        raise UserError(f"{path} scales its rotary positions by {scaling!r}; expected none or 'linear'.")
    if int(values.get("llama.rope.dimension_count", config["head_dim"])) != config["head_dim"]:
        raise UserError(f"{path} rotates a part of each head only; expected all {config['head_dim']} of its numbers.")
    if "<|im_start|>" in values["tokenizer.ggml.tokens"]:
        config["conversation_template"] = chatml_template(values.get("tokenizer.chat_template", ""))
    return config


def _write_weights(tensors: Dict[str, Any], config: Dict[str, Any], output: Path, path: Path) -> None:
    from gguf import quants

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    plan, specs = {}, {}
    for pattern, (target, linear) in _TENSORS.items():
        layers = range(config["num_hidden_layers"]) if "{}" in pattern else [None]
        for layer in layers:
            name = pattern.format(layer)
            if name == "output.weight" and config["tie_word_embeddings"]:
                continue
            if name not in tensors:
                raise UserError(f"{path} has no tensor {name}; expected {len(layers)} of them; fetch the file again.")
            shape = tuple(int(n) for n in tensors[name].shape)  # GGUF counts from the fastest axis: [in, out]
            plan[target.format(layer)] = (name, linear)
            specs[target.format(layer)] = TensorSpec("float32", shape if linear else shape[::-1])
    unused = sorted(set(tensors) - {name for name, _ in plan.values()} - {"rope_freqs.weight"})
    if unused or "rope_freqs.weight" in tensors:
        raise UserError(
            f"{path} has tensors that a LLaMA decoder doesn't know: {', '.join(unused[:5]) or 'rope_freqs.weight'}."
        )

    def read(target: str) -> np.ndarray:
        name, linear = plan[target]
        weight = quants.dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32, copy=False)
        for projection, count in heads.items():
            if target.endswith(f"{projection}.weight"):
                rows, width = weight.shape
                weight = weight.reshape(count, rows // count // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
        return np.ascontiguousarray(weight.T if linear else weight)

    try:
        write_safetensors(output, specs, ((target, read(target)) for target in plan))
    except NotImplementedError as error:
        raise UserError(f"{path} is quantised in a way that the package gguf can't expand ({error}).") from error


def _special(values: Dict[str, Any]) -> List[int]:
    types = values["tokenizer.ggml.token_type"]
    return [i for i, kind in enumerate(types) if kind in (_CONTROL_TOKEN, _USER_TOKEN)]


def _tokenizer(values: Dict[str, Any], path: Path) -> Dict[str, Any]:
    """``tokenizer.json`` of the tokenizers library: byte-level BPE."""
    model, pre = values.get("tokenizer.ggml.model"), values.get("tokenizer.ggml.pre")
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise UserError(
            f"{path} has a tokenizer of kind {model!r} cut as {pre!r}; expected 'gpt2' cut as {' or '.join(_PRE_TOKENIZERS)}."
        )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    cuts = [{"type": "Digits", "individual_digits": True}] if pre == "smollm" else []
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": types[i] == _CONTROL_TOKEN,
            }
            for i in _special(values)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts + [byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": values["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(values: Dict[str, Any]) -> Dict[str, Any]:
    tokens = values["tokenizer.ggml.tokens"]
    config: Dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(values["llama.context_length"]),
        "add_bos_token": bool(values.get("tokenizer.ggml.add_bos_token", False)),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    for key, name in names.items():
        index = values.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[name] = tokens[index]
    if "tokenizer.chat_template" in values:
        config["chat_template"] = values["tokenizer.chat_template"]
    return config
