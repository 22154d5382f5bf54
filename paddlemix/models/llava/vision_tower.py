"""The CLIP vision transformer: pictures to features, nothing else (Radford et al., 2021, section 2.4).

The sublayers nest and are named as in the toolkit's checkpoints
(``vision_tower.vision_model.transformer.layers.N.self_attn.q_proj``), so that those load and freeze by the same names.
Layers after the selected one never count, so they are not built.
"""

import paddle
import paddle.nn.functional as F
from paddle import nn

from paddlemix.models.llava.attention import attend
from paddlemix.models.llava.configuration import CLIPVisionConfig
from paddlemix.models.llava.lean import layer_norm, widened
from paddlemix.models.llava.linear import project, project_quick_gelu

__all__ = ["CLIPVisionTower", "num_tower_layers"]


def num_tower_layers(vision: CLIPVisionConfig, select_layer: int) -> int:
    """Layers to compute for hidden state ``select_layer``; 0 is the input of the first layer.

    >>> num_tower_layers(CLIPVisionConfig(num_hidden_layers=24), -2)
    23
    """
    return select_layer if select_layer >= 0 else vision.num_hidden_layers + 1 + select_layer


class CLIPVisionTower(nn.Layer):
    """Features of the selected layer.

    Args:
        vision: sizes of the tower.
        select_layer: which hidden state; negative counts from the last (LLaVA: -2).
        select_feature: ``patch`` drops the class token, ``cls_patch`` keeps it.
    """

    def __init__(self, vision: CLIPVisionConfig, select_layer: int = -2, select_feature: str = "patch"):
        super().__init__()
        self.select_feature = select_feature
        self.vision_tower = CLIPVisionModel(vision, num_tower_layers(vision, select_layer))

    def forward(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        """pixel_values [N, 3, H, W] -> image_features [N, P, D] (P + 1 with ``cls_patch``)."""
        hidden = self.vision_tower.vision_model(pixel_values)
        return hidden[:, 1:] if self.select_feature == "patch" else hidden


class CLIPVisionModel(nn.Layer):
    """Holds the transformer under the name that the checkpoints give it."""

    def __init__(self, vision: CLIPVisionConfig, num_layers: int):
        super().__init__()
        self.vision_model = CLIPVisionTransformer(vision, num_layers)


class CLIPVisionTransformer(nn.Layer):
    def __init__(self, vision: CLIPVisionConfig, num_layers: int):
        super().__init__()
        width = vision.hidden_size
        self.class_embedding = self.create_parameter(
            [width], default_initializer=nn.initializer.Normal(std=width**-0.5)
        )
        self.conv1 = nn.Conv2D(3, width, vision.patch_size, stride=vision.patch_size, bias_attr=False)
        self.positional_embedding = nn.Embedding(vision.num_patches + 1, width)
        self.ln_pre = nn.LayerNorm(width, epsilon=vision.layer_norm_eps)
        self.transformer = nn.Layer()
        self.transformer.layers = nn.LayerList([CLIPEncoderLayer(vision) for _ in range(num_layers)])
        self.enable_recompute = False  # PretrainedModel.recompute_enable() sets it

    def embed(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        """[N, 3, H, W] -> [N, P + 1, D], the input of the first layer."""
        patches = _patches(self.conv1, pixel_values).flatten(2).transpose([0, 2, 1])  # [N, P, D]
        class_token = self.class_embedding.expand([patches.shape[0], 1, -1]).astype(patches.dtype)
        positions = widened(self.positional_embedding.weight, patches)
        return _normalize(self.ln_pre, paddle.concat([class_token, patches], axis=1) + positions)

    def forward(self, pixel_values: paddle.Tensor) -> paddle.Tensor:
        """[N, 3, H, W] -> [N, P + 1, D]"""
        hidden = self.embed(pixel_values)
        for layer in self.transformer.layers:
            if self.enable_recompute and self.training and not hidden.stop_gradient:
                from paddle.distributed.fleet.utils import recompute

                hidden = recompute(layer, hidden)
            else:
                hidden = layer(hidden)
        return hidden


class CLIPEncoderLayer(nn.Layer):
    """Pre-norm transformer layer."""

    def __init__(self, vision: CLIPVisionConfig):
        super().__init__()
        width = vision.hidden_size
        self.norm1 = nn.LayerNorm(width, epsilon=vision.layer_norm_eps)
        self.self_attn = CLIPAttention(width, vision.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, epsilon=vision.layer_norm_eps)
        self.linear1 = nn.Linear(width, vision.intermediate_size)
        self.linear2 = nn.Linear(vision.intermediate_size, width)
        self.quick = vision.hidden_act == "quick_gelu"

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        hidden = hidden + self.self_attn(_normalize(self.norm1, hidden))
        x = _normalize(self.norm2, hidden)
        x = project_quick_gelu(self.linear1, x) if self.quick else F.gelu(project(self.linear1, x))
        return hidden + project(self.linear2, x)


class CLIPAttention(nn.Layer):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden: paddle.Tensor) -> paddle.Tensor:
        tiles, tokens, width = hidden.shape

        def heads(projection):
            return project(projection, hidden).reshape([tiles, tokens, self.num_heads, -1]).transpose([0, 2, 1, 3])

        context = attend(heads(self.q_proj), heads(self.k_proj), heads(self.v_proj))
        return project(self.out_proj, context.transpose([0, 2, 1, 3]).reshape([tiles, tokens, width]))


def _patches(layer: nn.Conv2D, x: paddle.Tensor) -> paddle.Tensor:
    """``layer(x)``, also where its weights are held in fewer bits than ``x``."""
    weight = widened(layer.weight, x)
    return layer(x) if weight is layer.weight else F.conv2d(x, weight, stride=layer._stride)


def _normalize(layer: nn.LayerNorm, x: paddle.Tensor) -> paddle.Tensor:
    """``layer(x)``, the same."""
    if layer._forward_pre_hooks or layer._forward_post_hooks:
        return layer(x)
    return layer_norm(x, layer.weight, layer.bias, layer._epsilon)
