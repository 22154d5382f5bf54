"""Gradients of several ranks: each has the same ones, whatever its batch holds, and they are averaged."""

import contextlib
from typing import Any, Dict, Iterator, List

import paddle
import paddle.distributed as dist
from paddle import nn
from paddlenlp.peft import LoRAModel

from paddlemix.models.llava.anyres import num_tiles
from paddlemix.trainer.freezing import named_model_parameters, part_of

__all__ = ["average_gradients", "complete_gradients", "whole_graph"]

_BUCKET = 1 << 25  # numbers that are summed over the ranks at once


@contextlib.contextmanager
def whole_graph(model: nn.Layer, batch: Dict[str, Any]) -> Iterator[None]:
    """One forward of ``batch`` whose graph holds every trained parameter.

    Where ranks sum gradients together, each needs the same ones, and sharding's stage 2, which sums each as soon as the
    backward pass has it, needs them in the same order. So what a batch without pictures doesn't use is computed from a
    blank one and, times 0, added to the embeddings, where pictures come in as well.

    Args:
        model: a LlavaLlamaForCausalLM, or a LoRAModel around one.
        batch: what the model is called with.
    """
    inner = model.model if isinstance(model, LoRAModel) else model
    if not {part_of(name) for name, _ in _trained(model)} & {"projector", "vision tower"}:
        yield
        return

    def add_blank(layer, inputs, embeddings):
        return _touching(embeddings, *_blank_features(inner))

    def add_newline(layer, inputs, features):
        return _touching(features, newline)

    hooks = []
    if batch.get("pixel_values") is None:
        hooks.append(inner.llama.embed_tokens.register_forward_post_hook(add_blank))
    newline = getattr(inner.llama, "image_newline", None)
    if newline is not None and not newline.stop_gradient:
        # pictures of some shapes go without it; added before the projector, its gradient is complete after the projector's
        hooks.append(inner.llama.vision_tower.register_forward_post_hook(add_newline))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def complete_gradients(model: nn.Layer, main_grad: bool) -> None:
    """Gives every trained parameter a gradient, 0 where the global batch didn't use it, as pictures' parts where it has none.

    The optimizer passes over a parameter without one, but moves one whose gradient is 0. Which of the two a parameter
    has would depend on whether an earlier step of this process used it, so on where a run was stopped. Stage 1 of sharding
    averages in the optimizer, and needs the gradients complete; stage 2 has none where another rank keeps them, and must
    not be given any.

    Args:
        main_grad: gradients are summed in float32 beside the parameters (``amp_master_grad``).
    """
    for _, parameter in _trained(model):
        if main_grad:
            if getattr(parameter, "main_grad", None) is None:
                parameter.main_grad = paddle.zeros(parameter.shape, "float32")
        elif parameter.grad is None:
            parameter.grad = paddle.zeros_like(parameter)


def average_gradients(model: nn.Layer, ranks: int) -> None:
    """Averages the gradients over data-parallel ranks.

    In place of paddle.DataParallel, which loses sums of earlier micro-batches of parameters that the last one doesn't use.
    """
    with paddle.no_grad():
        bucket: List[paddle.Tensor] = []
        for grad in [parameter.grad for _, parameter in _trained(model)] + [None]:
            if bucket and (
                grad is None or grad.dtype != bucket[0].dtype or sum(g.size for g in bucket) + grad.size > _BUCKET
            ):
                flat = paddle.concat([held.flatten() for held in bucket])
                dist.all_reduce(flat)
                flat /= ranks
                pieces = paddle.split(flat, [held.size for held in bucket])
                for held, piece in zip(bucket, pieces):
                    held.set_value(piece.reshape(held.shape))
                bucket = []
            if grad is not None:
                bucket.append(grad)


def _trained(model: nn.Layer):
    return [(name, parameter) for name, parameter in named_model_parameters(model) if not parameter.stop_gradient]


def _blank_features(inner: nn.Layer) -> List[paddle.Tensor]:
    side = inner.config.vision.image_size
    blank = paddle.zeros([num_tiles((side, side), inner.config), 3, side, side])
    return list(inner.encode_images(blank, paddle.to_tensor([[side, side]])))


def _touching(x: paddle.Tensor, *others: paddle.Tensor) -> paddle.Tensor:
    """``x``, in whose graph the others are, each with a gradient of 0. Times 0 in full shape, as float16 can't hold the sum
    of scaled gradients."""
    mean = sum(other.astype("float32").mean() for other in others).astype(x.dtype)
    return x + mean.expand(x.shape) * 0.0
