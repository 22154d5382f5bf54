"""Projectors: tower features to the decoder's width (``multimodal_projector/builder.py`` of the original release)."""

import re

from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.linear import project

__all__ = ["build_projector"]


def build_projector(config: LlavaConfig) -> nn.Layer:
    """A layer that maps [N, P, mm_hidden_size] to [N, P, hidden_size].

    ``linear`` is LLaVA's first, ``mlp2x_gelu`` that of 1.5 and 1.6 (Liu et al., 2023b), ``identity`` passes through.
    """
    kind, wide, width = config.mm_projector_type, config.mm_hidden_size, config.hidden_size
    if kind == "linear":
        return nn.Linear(wide, width)
    if kind == "identity":
        if wide != width:
            raise UserError(
                f"mm_projector_type is 'identity', but the tower gives {wide} and the decoder takes {width}."
            )
        return nn.Identity()
    depth = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if depth is None:
        raise UserError(f"mm_projector_type is {kind!r}; expected linear, identity or mlpNx_gelu, such as mlp2x_gelu.")
    layers = [nn.Linear(wide, width)]
    for _ in range(1, int(depth.group(1))):
        layers += [nn.GELU(), nn.Linear(width, width)]
    return _Perceptron(*layers)


class _Perceptron(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = project(layer, x)
        return x
