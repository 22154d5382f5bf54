"""LlavaConfig: every size and choice of the model, typed and checked once.

The keys are those of the original release's ``config.json`` (``mm_*``, ``image_*`` and LLaMA's own), which the
toolkit uses too; ``vision_config`` holds the sizes of the CLIP tower, and ``conversation_template`` the name of
the template that the weights were trained with. Hugging Face's nested layout is translated by ``published_configs.py``.
"""

import ast
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Dict, Iterable, List, Optional

from paddlemix.errors import UserError, folder_to_write
from paddlemix.lazy_paddlenlp import PretrainedConfig

__all__ = ["CLIPVisionConfig", "LlavaConfig", "TOKEN_IDS", "are_token_ids"]

SELECT_FEATURES = ("patch", "cls_patch")
PATCH_MERGE_TYPES = ("flat", "spatial", "spatial_unpad")
ASPECT_RATIOS = ("square", "pad", "anyres")
VISION_ACTIVATIONS = ("quick_gelu", "gelu")
ROPE_TYPES = ("linear", "dynamic")
TOKEN_IDS = "the number of a token, a list of such, or null"
DECODER_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)


def _check_sizes(config: Any, names: Iterable[str], prefix: str = "") -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{prefix}{name} is {value!r}; expected a whole number of at least 1.")


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or value < 0 or (positive and value == 0):
        raise UserError(f"{name} is {value!r}; expected a number {'above 0' if positive else 'of at least 0'}.")


def check_tower_name(value: Any) -> None:
    """Refuses what ``mm_vision_tower`` can't be."""
    if not isinstance(value, (str, type(None))):
        raise UserError(f"mm_vision_tower is {value!r}; expected a name or a folder.")


def are_token_ids(value: Any) -> bool:
    """Whether it is what ``eos_token_id`` may be: ``TOKEN_IDS``."""
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return all(isinstance(index, int) and not isinstance(index, bool) for index in ids)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """Sizes of a CLIP vision transformer; the defaults are ViT-L/14 at 336 pixels (Radford et al., 2021)."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    def __post_init__(self):
        _check_sizes(self, [field.name for field in fields(self) if field.type in (int, "int")], "vision_config.")
        _check_number("vision_config.layer_norm_eps", self.layer_norm_eps)
        if self.hidden_act not in VISION_ACTIVATIONS:
            raise UserError(
                f"vision_config.hidden_act is {self.hidden_act!r}; expected one of {', '.join(VISION_ACTIVATIONS)}."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"vision_config.hidden_size is {self.hidden_size}, which {self.num_attention_heads} heads "
                "(vision_config.num_attention_heads) don't divide."
            )
        if self.image_size < self.patch_size:
            raise UserError(
                f"vision_config.image_size is {self.image_size}, smaller than patch_size {self.patch_size}."
            )

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> "CLIPVisionConfig":
        """Keeps the keys that size the tower, drops the rest of a CLIP config (text tower, generation, …)."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    @property
    def grid_size(self) -> int:
        """Patches along one side of the square picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid_size**2


class LlavaConfig(PretrainedConfig):
    """Configuration of :class:`LlavaLlamaForCausalLM`.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
        head_dim, rms_norm_eps, rope_theta, rope_scaling, max_position_embeddings, tie_word_embeddings:
            the LLaMA decoder. ``num_key_value_heads`` below ``num_attention_heads`` is grouped-query attention;
            ``rope_scaling`` is ``{"type": "linear" | "dynamic", "factor": f}`` or None.
        sliding_window (int): tokens that the decoder was made to attend to, as some of Mistral's; longer prompts are
            refused, since attention isn't cut to it.
        vision_config (dict): the sizes of :class:`CLIPVisionConfig`, or None for a model that takes text only.
        mm_vision_tower (str): name or folder of a separate tower checkpoint (original v1.5 layout).
        mm_vision_select_layer (int): which hidden state of the tower is used; negative counts from the last.
        mm_vision_select_feature (str): ``patch`` drops the class token, ``cls_patch`` keeps it.
        mm_projector_type (str): ``linear``, ``mlpNx_gelu`` or ``identity``.
        mm_patch_merge_type (str): ``flat`` (LLaVA-1.5), ``spatial`` or ``spatial_unpad`` (LLaVA-1.6).
        image_aspect_ratio (str): ``square``, ``pad`` or ``anyres``.
        image_grid_pinpoints (list of [width, height]): the canvases that anyres may choose from.
        conversation_template (str): a name in ``conversation.conv_templates``.
        use_flash_attention (bool): on GPU, attend through Paddle's flash attention.
        demo_note (str): what a chat with the built-in model says at its start about what it can't do.

    Raises:
        UserError: a value that the model doesn't know, named with what it expected.
    """

    model_type = "llava"

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: Optional[int] = None,
        head_dim: Optional[int] = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: Optional[Dict[str, Any]] = None,
        max_position_embeddings: int = 4096,
        sliding_window: Optional[int] = None,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        bos_token_id: Optional[int] = 1,
        eos_token_id: Any = 2,
        pad_token_id: Optional[int] = 0,
        vision_config: Optional[Dict[str, Any]] = None,
        mm_vision_tower: Optional[str] = None,
        mm_hidden_size: Optional[int] = None,
        mm_vision_select_layer: int = -2,
        mm_vision_select_feature: str = "patch",
        mm_projector_type: str = "mlp2x_gelu",
        mm_patch_merge_type: str = "flat",
        mm_use_im_start_end: bool = False,
        image_aspect_ratio: str = "square",
        image_grid_pinpoints: Optional[List[List[int]]] = None,
        conversation_template: str = "vicuna_v1",
        use_flash_attention: bool = False,
        demo_note: Optional[str] = None,
        **kwargs,
    ):
        if "text_config" in kwargs:
            raise UserError(
                "text_config is Hugging Face's way of a config.json; open its folder by LlavaConfig.from_pretrained."
            )
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        _check_sizes(self, ("hidden_size", "num_attention_heads"))
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.max_position_embeddings = max_position_embeddings
        self.sliding_window = sliding_window
        self.initializer_range = initializer_range
        self.vision_config = asdict(CLIPVisionConfig.from_dict(vision_config)) if vision_config is not None else None
        self.mm_vision_tower = mm_vision_tower
        self.mm_hidden_size = mm_hidden_size or (self.vision_config["hidden_size"] if self.vision_config else None)
        self.mm_vision_select_layer = mm_vision_select_layer
        self.mm_vision_select_feature = mm_vision_select_feature
        self.mm_projector_type = mm_projector_type
        self.mm_patch_merge_type = mm_patch_merge_type or "flat"
        self.mm_use_im_start_end = bool(mm_use_im_start_end)
        self.image_aspect_ratio = image_aspect_ratio or "square"
        # the first v1.6 releases wrote the list as a string
        if isinstance(image_grid_pinpoints, str):
            try:
                image_grid_pinpoints = ast.literal_eval(image_grid_pinpoints)
            except (ValueError, SyntaxError):
                raise UserError(
                    f"image_grid_pinpoints is {image_grid_pinpoints!r}; expected a list of [width, height]."
                ) from None
        self.image_grid_pinpoints = image_grid_pinpoints
        self.conversation_template = conversation_template
        self.use_flash_attention = use_flash_attention
        self.demo_note = demo_note
        self.validate()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **overrides) -> "LlavaConfig":
        """The configuration of whatever ``LlavaLlamaForCausalLM.from_pretrained`` opens, in any published layout.

        Args:
            overrides: keys with other values than the checkpoint's.
        """
        from paddlemix.models.llava import checkpoint
        from paddlemix.models.llava.hub import resolve_small

        config = checkpoint.read_config(resolve_small(pretrained_model_name_or_path))
        for key, value in overrides.items():
            if not hasattr(config, key):
                raise UserError(
                    f"LlavaConfig has no {key!r}; expected keys of config.json, such as image_aspect_ratio."
                )
            setattr(config, key, value)
        config.validate()
        return config

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Writes ``config.json`` into the folder, which is made.

        Raises:
            UserError: the folder is a file, or can't be made.
        """
        super().save_pretrained(folder_to_write(save_directory), **kwargs)

    def validate(self) -> None:
        """Refuses what the model can't honour; called by the constructor and before a model is saved."""

        def one_of(name: str, allowed) -> None:
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}.")

        from paddlemix.models.llava.conversation import conv_templates

        check_tower_name(self.mm_vision_tower)
        _check_sizes(self, DECODER_SIZES)
        _check_number("rope_theta", self.rope_theta, positive=True)
        _check_number("rms_norm_eps", self.rms_norm_eps)
        _check_number("initializer_range", self.initializer_range)
        if not are_token_ids(self.eos_token_id):
            raise UserError(f"eos_token_id is {self.eos_token_id!r}; expected {TOKEN_IDS}.")
        for name in ("bos_token_id", "pad_token_id"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) or not are_token_ids(value):
                raise UserError(f"{name} is {value!r}; expected the number of a token, or null.")
        if not isinstance(self.mm_vision_select_layer, int):
            raise UserError(
                f"mm_vision_select_layer is {self.mm_vision_select_layer!r}; expected the number of a layer."
            )
        one_of("mm_vision_select_feature", SELECT_FEATURES)
        one_of("mm_patch_merge_type", PATCH_MERGE_TYPES)
        one_of("image_aspect_ratio", ASPECT_RATIOS)
        one_of("conversation_template", tuple(conv_templates))
        one_of("hidden_act", ("silu",))
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads is {self.num_attention_heads}, not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
            if kind == "default":
                self.rope_scaling = None
            elif kind not in ROPE_TYPES or not float(self.rope_scaling.get("factor", 0)) >= 1:
                raise UserError(
                    f"rope_scaling is {self.rope_scaling!r}; expected a type of {' or '.join(ROPE_TYPES)} and a factor >= 1."
                )
        if self.image_aspect_ratio == "anyres":
            if not self.image_grid_pinpoints:
                raise UserError(
                    "image_aspect_ratio is 'anyres' but image_grid_pinpoints names no canvas; set it in the checkpoint's "
                    "config.json ([[width, height], …] in multiples of the tower's image_size), or choose pad or square."
                )
            size = self.vision_config["image_size"] if self.vision_config else None
            for pinpoint in self.image_grid_pinpoints:
                if size and (len(pinpoint) != 2 or pinpoint[0] % size or pinpoint[1] % size):
                    raise UserError(
                        f"image_grid_pinpoints has {list(pinpoint)}; expected [width, height] in multiples of the "
                        f"tower's {size} pixels."
                    )
        if self.vision_config is not None:
            depth = self.vision_config["num_hidden_layers"]
            if not -depth - 1 <= self.mm_vision_select_layer <= depth:
                raise UserError(
                    f"mm_vision_select_layer is {self.mm_vision_select_layer}; the tower has {depth} layers, so "
                    f"expected a number from {-depth - 1} to {depth}."
                )

    @property
    def vision(self) -> Optional[CLIPVisionConfig]:
        """The tower's sizes as a typed object; None for a model that takes text only."""
        return CLIPVisionConfig(**self.vision_config) if self.vision_config is not None else None

    @property
    def eos_token_ids(self) -> List[int]:
        """Every id that ends an answer (``eos_token_id`` may be one id, a list, or None)."""
        ids = self.eos_token_id
        return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
