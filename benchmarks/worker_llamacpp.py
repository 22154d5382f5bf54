"""llama.cpp's side of a benchmark (see protocol.py): text alone, the same decoder as a float32 GGUF file.

Its environment holds ``llama-cpp-python gguf safetensors numpy``.
"""

import json
import time
from pathlib import Path

import numpy as np
import protocol
from gguf import GGUFWriter, TokenType
from llama_cpp import Llama
from safetensors.numpy import load_file

model = None

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(folder: Path) -> Path:
    """The decoder of a Hugging Face ``llava`` folder as GGUF, float32, with a vocabulary of made-up tokens."""
    path = folder / "decoder-f32.gguf"
    if path.exists():
        return path
    text = json.loads((folder / "config.json").read_text())["text_config"]
    heads, groups, count = text["num_attention_heads"], text["num_key_value_heads"], text["vocab_size"]
    aside = path.with_suffix(".part")
    writer = GGUFWriter(aside, "llama")
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(text["rms_norm_eps"])
    writer.add_rope_freq_base(text["rope_theta"])
    writer.add_rope_dimension_count(text["hidden_size"] // heads)
    writer.add_vocab_size(count)
    writer.add_tokenizer_model("llama")
    special = [b"<unk>", b"<s>", b"</s>"]
    tokens = special + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    tokens += [f"t{number}".encode() for number in range(count - len(tokens))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * count)
    writer.add_token_types(types + [TokenType.NORMAL] * (count - len(types)))
    for name, values in load_file(folder / "model.safetensors").items():
        if not name.startswith("language_model."):
            continue
        name = name.replace("language_model.", "").replace("model.", "").removesuffix(".weight")
        if name.startswith("layers."):
            _, number, part = name.split(".", 2)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):  # GGUF holds the pairs of a rotation side by side
                rows = heads if part.endswith("q_proj") else groups
                values = values.reshape(rows, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            name = f"blk.{number}.{NAMES[part]}"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name]
        writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    aside.rename(path)
    return path


def load(folder):
    global model
    path = write_gguf(Path(folder))
    started = time.perf_counter()
    model = Llama(str(path), n_ctx=4096, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
    return {"seconds": time.perf_counter() - started}


def read(ids):
    """Logits [V] after the ids, which follow what was read before."""
    model.eval(ids)
    return np.ctypeslib.as_array(model._ctx.get_logits(), shape=(model.n_vocab(),))


def decode(context):
    model.reset()
    ids = np.random.default_rng(0).integers(5, model.n_vocab() - 2, context).tolist()
    started = time.perf_counter()
    token = int(read(ids).argmax())
    moments, tokens = [time.perf_counter()], [token]
    for _ in range(protocol.DECODE_TOKENS - 1):
        tokens.append(int(read(tokens[-1:]).argmax()))
        moments.append(time.perf_counter())
    return {
        "tokens_per_second": (len(moments) - 1) / (moments[-1] - moments[0]),
        "prefill_seconds": moments[0] - started,
        "tokens": tokens,
    }


if __name__ == "__main__":
    protocol.serve({"load": load, "decode": decode})
