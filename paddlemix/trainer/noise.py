"""NEFTune: uniform noise on the embeddings while training (Jain et al., 2023)."""

from contextlib import contextmanager
from typing import Optional

import paddle
from paddle import nn

__all__ = ["EmbeddingNoise"]


class EmbeddingNoise:
    """Adds noise of at most ``alpha / sqrt(L * D)`` to what an embedding layer gives, L being a sequence's real length.

    Args:
        embedding: the layer, of width D; it is touched in training mode and inside :meth:`on` only.
        alpha: the paper's noise scale; 5 is its first choice.
    """

    def __init__(self, embedding: nn.Layer, alpha: float = 5.0):
        self.alpha = alpha
        self._bound: Optional[paddle.Tensor] = None
        self._hook = embedding.register_forward_post_hook(self._add)

    @contextmanager
    def on(self, attention_mask: paddle.Tensor, segment_ids: Optional[paddle.Tensor] = None):
        """Noise for one forward.

        Args:
            attention_mask: [B, T], 0 at padding, which gets no noise.
            segment_ids: [B, T], the samples of packed rows, each with a length of its own; 0 at padding.
        """
        segments = attention_mask if segment_ids is None else segment_ids
        same = (segments.unsqueeze(2) == segments.unsqueeze(1)).astype("float32")  # [B, T, T]
        lengths = same.sum(-1)  # [B, T]: tokens of the segment that a token is in
        real = (segments != 0).astype("float32")
        self._bound = (real * self.alpha / lengths.sqrt()).unsqueeze(-1)
        try:
            yield
        finally:
            self._bound = None

    def remove(self) -> None:
        self._hook.remove()

    def _add(self, layer: nn.Layer, inputs, output: paddle.Tensor) -> paddle.Tensor:
        if self._bound is None or not layer.training:
            return output
        noise = paddle.uniform(output.shape, dtype="float32", min=-1.0, max=1.0)
        return output + (noise * self._bound / output.shape[-1] ** 0.5).astype(output.dtype)
