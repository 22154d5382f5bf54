"""Tiny models to chat with: a random one whose answers depend on all it reads, and one that says what a test wants."""

from pathlib import Path
from typing import Dict, Sequence, Tuple

import paddle

from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.image_processing import LlavaImageProcessor
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.tokenizer import load_tokenizer
from tests.support import FIXTURES, llama2_tokenizer_folder

CAT = FIXTURES / "chelsea_small.png"

SIZES = dict(
    vocab_size=32000,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    initializer_range=0.4,
    tie_word_embeddings=True,
)
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)


def build(folder: Path, **changes) -> Tuple[LlavaLlamaForCausalLM, LlavaProcessor]:
    """A model with random weights and a processor with LLaMA-2's tokenizer, whose files go to ``folder``."""
    values: Dict = {**SIZES, "vision_config": VISION, "image_aspect_ratio": "pad", **changes}
    config = LlavaConfig(**values)
    paddle.seed(0)
    model = LlavaLlamaForCausalLM(config)
    model.eval()
    images = None
    if config.vision is not None:
        side = config.vision.image_size
        images = LlavaImageProcessor(
            size=side,
            crop_size=side,
            image_aspect_ratio=config.image_aspect_ratio,
            image_grid_pinpoints=config.image_grid_pinpoints,
        )
    tokenizer = load_tokenizer(llama2_tokenizer_folder(folder))
    return model, LlavaProcessor(tokenizer, images, config)


def save(folder: Path, **changes) -> Path:
    """The folder of a checkpoint as ``--model-path`` takes it."""
    model, processor = build(folder, **changes)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def recite(model: LlavaLlamaForCausalLM, tokens: Sequence[int]) -> None:
    """Makes the model say ``tokens`` one after another: each of them (all are distinct) is followed by the next.

    The first one stands for the last token of the prompt. Attention and MLP add nothing; the embedding of a token is an
    axis of its own, and the head leads from there to the next token.
    """
    width = model.config.hidden_size
    assert not model.config.tie_word_embeddings and len(set(tokens)) == len(tokens) <= width
    embeddings = paddle.zeros([model.config.vocab_size, width])
    head = paddle.zeros([width, model.config.vocab_size])
    for axis, (token, following) in enumerate(zip(tokens, tokens[1:])):
        embeddings[token, axis] = 1.0
        head[axis, following] = 10.0
    with paddle.no_grad():
        model.llama.embed_tokens.weight.set_value(embeddings)
        model.lm_head.weight.set_value(head)
        for layer in model.llama.layers:
            layer.self_attn.o_proj.weight.set_value(paddle.zeros_like(layer.self_attn.o_proj.weight))
            layer.mlp.down_proj.weight.set_value(paddle.zeros_like(layer.mlp.down_proj.weight))
