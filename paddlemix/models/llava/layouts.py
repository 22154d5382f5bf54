"""Names of the tensors in every published layout, and how they become ours.

Ours are the toolkit's: Linear weights [in, out]. PyTorch's layouts hold them [out, in]. In the tables ``{}`` is a
layer's number, and None a tensor that LLaVA never uses.
"""

import re
from typing import Dict, Iterable, Mapping, NamedTuple, Optional, Tuple

__all__ = [
    "LAYOUTS",
    "PROJECTOR",
    "Place",
    "TOWER",
    "is_linear",
    "name_beside",
    "place_in",
    "published_name",
    "read_name",
]

LAYOUTS = ("toolkit", "original", "huggingface")
DECODER = "llama."
TOWER = "llama.vision_tower.vision_tower.vision_model."
PROJECTOR = "llama.mm_projector."
NEWLINE = "llama.image_newline"
HEAD = "lm_head.weight"

# The decoder's own names are the same everywhere.
_DECODER_TABLE: Dict[str, Optional[str]] = {
    "embed_tokens.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    **{
        f"layers.{{}}.{name}.weight": f"layers.{{}}.{name}.weight"
        for name in (
            *("input_layernorm", "post_attention_layernorm"),
            *(f"self_attn.{projection}_proj" for projection in "qkvo"),
            *(f"mlp.{projection}_proj" for projection in ("gate", "up", "down")),
        )
    },
    "layers.{}.self_attn.rotary_emb.inv_freq": None,  # computed from rope_theta
    "rotary_emb.inv_freq": None,
}

# CLIP's vision transformer under Hugging Face's inner names, and under PaddleNLP's, which are ours.
_CLIP_LAYER = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
    **{f"self_attn.{name}_proj": f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")},
}
_CLIP_TABLE: Dict[str, Optional[str]] = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding.weight",
    "embeddings.position_ids": None,
    **{
        f"{theirs}.{kind}": f"{ours}.{kind}"
        for theirs, ours in (
            ("pre_layrnorm", "ln_pre"),
            ("post_layernorm", "ln_post"),
            *((f"encoder.layers.{{}}.{a}", f"transformer.layers.{{}}.{b}") for a, b in _CLIP_LAYER.items()),
        )
        for kind in ("weight", "bias")
    },
}
_TOWER_TABLE = {**{ours: ours for ours in _CLIP_TABLE.values() if ours is not None}, **_CLIP_TABLE}

# Parts of a full CLIP checkpoint that see no picture.
_CLIP_UNUSED = re.compile(
    r"(?:clip\.)?(?:text_model\.|text_projection|visual_projection|vision_projection|logit_scale|position_ids)"
)

_HF_PROJECTOR = {"linear_1": "0", "linear_2": "2"}

# Where each part begins, longest first: (pattern, part)
_PREFIXES = (
    (r"(?:(?:llama|model)\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", "tower"),
    (r"(?:llama|model)\.mm_projector\.", "projector"),
    (r"(?:model\.)?multi_modal_projector\.", "hf_projector"),
    (r"(?:(?:llama|model)\.)?image_newline$", "newline"),
    (r"(?:language_model\.)?lm_head\.weight$", "head"),
    (r"language_model\.model\.|model\.language_model\.|llama\.|model\.", "decoder"),
)

_LINEAR = re.compile(
    r"(?:lm_head|self_attn\.(?:q|k|v|o|out)_proj|mlp\.(?:gate|up|down)_proj|linear[12]|mm_projector(?:\.\d+)?)\.weight$"
)


class Place(NamedTuple):
    """Where a published tensor goes: our name (None: it is never used), and whether its two axes are swapped."""

    name: Optional[str]
    transpose: bool


def is_linear(name: str) -> bool:
    """Whether our tensor ``name`` is the weight of a Linear, whose axes PyTorch swaps."""
    return _LINEAR.search(name) is not None


def _look_up(table: Dict[str, Optional[str]], inner: str) -> Tuple[bool, Optional[str]]:
    pattern = re.sub(r"(^|\.)layers\.\d+\.", r"\1layers.{}.", inner, count=1)
    if pattern not in table:
        return False, None
    number = re.search(r"(?:^|\.)layers\.(\d+)\.", inner)
    target = table[pattern]
    return True, target.format(number.group(1)) if target is not None and number else target


def read_name(name: str) -> Tuple[bool, Optional[str]]:
    """A tensor's name in any layout -> (known, our name or None if it is never used).

    >>> read_name("language_model.model.layers.3.mlp.up_proj.weight")
    (True, 'llama.layers.3.mlp.up_proj.weight')
    >>> read_name("model.layers.0.self_attn.rotary_emb.inv_freq")
    (True, None)
    """
    for prefix, part in _PREFIXES:
        match = re.match(prefix, name)
        if match is None:
            continue
        inner = name[match.end() :]
        if part == "newline":
            return True, NEWLINE
        if part == "head":
            return True, HEAD
        if part == "projector":
            known = re.fullmatch(r"(?:\d+\.)?(?:weight|bias)", inner) is not None
            return known, PROJECTOR + inner if known else None
        if part == "hf_projector":
            linear, _, kind = inner.partition(".")
            known = linear in _HF_PROJECTOR and kind in ("weight", "bias")
            return known, f"{PROJECTOR}{_HF_PROJECTOR[linear]}.{kind}" if known else None
        known, target = _look_up(_TOWER_TABLE if part == "tower" else _DECODER_TABLE, inner)
        start = TOWER if part == "tower" else DECODER
        return known, start + target if target is not None else None
    return False, None


def read_tower_name(name: str) -> Tuple[bool, Optional[str]]:
    """The same for a checkpoint of CLIP alone, PaddleNLP's or Hugging Face's, with or without its text tower."""
    if _CLIP_UNUSED.match(name):
        return True, None
    known, target = _look_up(_TOWER_TABLE, re.sub(r"^(?:clip\.)?(?:vision_model\.)?", "", name))
    return known, TOWER + target if target is not None else None


def is_toolkit(names: Iterable[str]) -> bool:
    """Whether tensors of these names are the toolkit's, with Linear weights [in, out].

    PyTorch's names never begin with ``llama.``; a text-free PaddleNLP tower is told by ``is_paddle_tower``.
    """
    return any(name.startswith("llama.") for name in names)


def is_paddle_tower(names: Iterable[str]) -> bool:
    """Whether a checkpoint of CLIP alone has PaddleNLP's inner names (and so Linear weights [in, out])."""
    return any(re.search(r"(?:^|\.)(?:conv1|positional_embedding|ln_pre)\b", name) for name in names)


def place_in(name: str, toolkit: bool) -> Tuple[bool, Place]:
    """A published name -> (known, where it goes); ``toolkit``: the checkpoint's Linear weights are [in, out]."""
    known, target = read_name(name)
    return known, Place(target, target is not None and is_linear(target) and not toolkit)


# ---------------------------------------------------------------------------------------------------------------------
# the way back, for writing

_TO_CLIP = {ours: theirs for theirs, ours in _CLIP_TABLE.items() if ours is not None}


def _clip_name(inner: str) -> Optional[str]:
    return _look_up(_TO_CLIP, inner)[1]


def _hugging_face_projector(inner: str) -> Optional[str]:
    number, _, kind = inner.partition(".")
    linear = {ours: theirs for theirs, ours in _HF_PROJECTOR.items()}.get(number)
    return linear and f"{linear}.{kind}"


def name_beside(name: str, published: Mapping[str, str]) -> str:
    """What our tensor ``name`` would be called by whoever named ``published`` (our names -> theirs), as far as these tell.

    >>> name_beside("llama.norm.weight", {"llama.embed_tokens.weight": "model.embed_tokens.weight"})
    'model.norm.weight'
    """
    if name == NEWLINE:  # lies beside the projector in every layout
        stems = (re.match(r"(.*?)(?:mm|multi_modal)_projector\.", theirs) for theirs in published.values())
        return next((f"{stem[1]}image_newline" for stem in stems if stem), name)
    parts = (TOWER, PROJECTOR, DECODER)
    part = next((part for part in parts if name.startswith(part)), None)
    for ours, theirs in published.items() if part else ():
        if part != next((each for each in parts if ours.startswith(each)), None):
            continue
        for rename in (_clip_name, _hugging_face_projector, str):
            inner, wanted = rename(ours[len(part) :]), rename(name[len(part) :])
            if inner and wanted and theirs.endswith(inner):
                return theirs[: -len(inner)] + wanted
    return name


def published_name(name: str, layout: str) -> Place:
    """Our name -> the layout's, and whether the two axes are swapped on the way.

    >>> published_name("llama.mm_projector.2.weight", "huggingface")
    Place(name='multi_modal_projector.linear_2.weight', transpose=True)
    """
    if layout == "toolkit":
        return Place(name, False)
    hugging_face = layout == "huggingface"
    transpose = is_linear(name)
    if name.startswith(TOWER):
        prefix = "vision_tower.vision_model." if hugging_face else "model.vision_tower.vision_tower.vision_model."
        return Place(prefix + str(_clip_name(name[len(TOWER) :])), transpose)
    if name.startswith(PROJECTOR):
        inner = name[len(PROJECTOR) :]
        if not hugging_face:
            return Place("model.mm_projector." + inner, transpose)
        return Place(f"multi_modal_projector.{_hugging_face_projector(inner)}", transpose)
    if name == NEWLINE:
        return Place("image_newline" if hugging_face else "model.image_newline", False)
    if name == HEAD:
        return Place("language_model.lm_head.weight" if hugging_face else HEAD, transpose)
    inner = name[len(DECODER) :]
    return Place(("language_model.model." if hugging_face else "model.") + inner, transpose)
