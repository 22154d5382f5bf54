"""Which parameters are trained: by part of the model, then by the user's patterns, which have the last word."""

import logging
from fnmatch import fnmatchcase
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from paddle import nn
from paddlenlp.peft import LoRAModel

from paddlemix.errors import UserError

__all__ = ["PARTS", "PartCount", "count_parts", "named_model_parameters", "part_of", "select_trained"]

logger = logging.getLogger(__name__)

PARTS = ("vision tower", "projector", "decoder", "LoRA adapters")


class PartCount(NamedTuple):
    """Numbers of a part's parameters."""

    trained: int
    total: int


def named_model_parameters(model: nn.Layer) -> Iterator[Tuple[str, "object"]]:
    """Parameters under the model's own names, whether a LoRAModel is around it or not."""
    return (model.model if isinstance(model, LoRAModel) else model).named_parameters()


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    >>> part_of("llama.layers.0.self_attn.q_proj.weight")
    'decoder'
    """
    if name.rsplit(".", 1)[-1].startswith("lora_"):
        return "LoRA adapters"
    if name.startswith("llama.vision_tower."):
        return "vision tower"
    if name.startswith("llama.mm_projector.") or name == "llama.image_newline":
        return "projector"
    return "decoder"


def select_trained(
    model: nn.Layer,
    *,
    lora: bool = False,
    tune_projector_only: bool = False,
    freeze_projector: bool = False,
    unfreeze_tower: bool = False,
    include: Optional[Sequence[str]] = None,
    exclude: Optional[Sequence[str]] = None,
) -> None:
    """Sets ``stop_gradient`` of every parameter.

    Args:
        lora: the decoder's own weights stay, its adapters are trained.
        tune_projector_only: nothing but the projector (and the newline feature of 1.6) is trained.
        freeze_projector: the projector stays.
        unfreeze_tower: the vision tower is trained too.
        include: fnmatch patterns; what matches is frozen, unless ``exclude`` matches too.
        exclude: fnmatch patterns; what matches is trained.

    A pattern means adapters only if it has "lora" in it: the toolkit freezes by patterns before it adds adapters, so that its
    users' ``*llama*`` leaves these as they are.

    Raises:
        UserError: nothing is left to train.
    """
    trained_parts = {
        "vision tower": unfreeze_tower and not tune_projector_only,
        "projector": not freeze_projector,
        "decoder": not lora and not tune_projector_only,
        "LoRA adapters": not tune_projector_only,
    }
    matched, meant, spared = set(), set(), set()  # patterns by what they do

    def matches(name: str, patterns: Optional[Sequence[str]], by_part: bool, to: bool) -> bool:
        hits = [pattern for pattern in patterns or () if fnmatchcase(name, pattern)]
        matched.update(hits)
        if part_of(name) == "LoRA adapters":
            spared.update(pattern for pattern in hits if "lora" not in pattern)
            hits = [pattern for pattern in hits if "lora" in pattern]
        meant.update(hits if by_part != to else [])
        return bool(hits)

    anything = False
    for name, parameter in named_model_parameters(model):
        trained = trained_parts[part_of(name)]
        frozen, kept = matches(name, include, trained, False), matches(name, exclude, trained, True)
        if frozen or kept:
            trained = kept
        parameter.stop_gradient = not trained
        anything |= trained
    for key, patterns in (("freeze_include", include), ("freeze_exclude", exclude)):
        for pattern in patterns or ():
            if pattern not in matched:
                logger.warning("%s has %r, which matches no parameter of this model.", key, pattern)
            elif pattern in spared - meant:
                logger.warning(
                    '%s has %r, which changes nothing; to mean adapters, a pattern needs "lora" in it, as in %r.',
                    key,
                    pattern,
                    pattern.rstrip("*") + "*lora_*",
                )
    if not anything:
        raise UserError(
            "nothing is left to train; look at freeze_include, freeze_mm_mlp_adapter and tune_mm_mlp_adapter."
        )


def count_parts(model: nn.Layer) -> Dict[str, PartCount]:
    """Trained and all parameters of each part that the model has."""
    counts: Dict[str, List[int]] = {}
    for name, parameter in named_model_parameters(model):
        size = 1
        for side in parameter.shape:
            size *= side
        part = counts.setdefault(part_of(name), [0, 0])
        part[1] += size
        if not parameter.stop_gradient:
            part[0] += size
    return {part: PartCount(*counts[part]) for part in PARTS if part in counts}
