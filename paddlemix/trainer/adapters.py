"""LoRA on PaddleNLP's LoRAModel: which layers are adapted, and what an adapter folder holds.

An adapter folder has ``lora_config.json`` (PaddleNLP's, with the base model recorded), ``lora_model_state.safetensors``
(``llama.layers.N.….lora_A`` and ``lora_B``) and, where other parameters were trained beside them (the projector),
``non_lora_state.safetensors``.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from paddle import nn
from paddlenlp.peft import LoRAConfig, LoRAModel

from paddlemix.errors import UserError
from paddlemix.models.llava.adapter_files import config_of
from paddlemix.models.llava.lean import on_cpu

__all__ = ["DEFAULT_TARGETS", "add_lora", "resolve_targets"]

logger = logging.getLogger(__name__)

# The decoder's seven projections; "llama.layers" is the decoder alone, the tower's layers have another name.
DEFAULT_TARGETS = [
    r"llama\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r"llama\.layers\.\d+\.mlp\.(gate|up|down)_proj",
]

# What an adapter's own config fixes, by the names of the run's key, the config's and add_lora's; lora_dropout may change from
# run to run.
FIXED_BY_ADAPTER = (
    ("lora_rank", "r", "rank"),
    ("lora_alpha", "lora_alpha", "alpha"),
    ("rslora", "rslora", "rslora"),
    ("lora_target_modules", "target_modules", "targets"),
)


def resolve_targets(model: nn.Layer, patterns: Sequence[str]) -> List[str]:
    """Names of the layers that the patterns name, in the model's order.

    Args:
        patterns: regular expressions that match whole layer names.

    Raises:
        UserError: a pattern that is no regular expression, that matches nothing, or that matches what isn't linear.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"lora_target_modules has {pattern!r}, which is no regular expression: {error}.") from None
    layers = dict(model.named_sublayers())
    chosen = []
    for pattern in compiled:
        hits = [name for name in layers if pattern.fullmatch(name)]
        linear = [name for name in hits if isinstance(layers[name], nn.Linear)]
        if not hits:
            raise UserError(
                f"lora_target_modules has {pattern.pattern!r}, which matches no layer of the model; expected a regular "
                "expression on whole names such as llama.layers.0.self_attn.q_proj."
            )
        if len(linear) < len(hits):
            other = next(name for name in hits if name not in linear)
            raise UserError(
                f"lora_target_modules has {pattern.pattern!r}, which matches {other}, a {type(layers[other]).__name__}; "
                "only linear layers can be adapted."
            )
        chosen.extend(linear)
    return [name for name in layers if name in set(chosen)]


def add_lora(
    model: nn.Layer,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    targets: Optional[Sequence[str]] = None,
    rslora: bool = False,
    dtype: str = "float32",
    base: Optional[str] = None,
) -> LoRAModel:
    """Puts adapters into the model.

    Args:
        targets: regular expressions on layer names; default the decoder's seven projections.
        dtype: of the adapters' weights.
        base: name or folder of the model under the adapter, recorded in its config.
    """
    patterns = DEFAULT_TARGETS if targets is None else list(targets)
    names = resolve_targets(model, patterns)
    if not names:
        raise UserError("lora_target_modules names no layer; give at least one regular expression, or leave it out.")
    config = LoRAConfig(
        # exact names: LoRAModel would wrap a layer twice that two patterns match
        target_modules=[re.escape(name) for name in names],
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        rslora=rslora,
        dtype=dtype,
        # where linear.py doesn't take the layer: by one matrix, to which half precision, under AMP too, would add with rounding
        use_quick_lora=dropout == 0.0 and dtype == "float32" and on_cpu(),
        base_model_name_or_path=base,
    )
    wrapped = LoRAModel(model, config)
    if sum(len([name for name in names if re.fullmatch(pattern, name)]) for pattern in patterns) == len(names):
        config.target_modules = patterns  # no layer is matched twice, so the user's own words can be recorded
    return wrapped


def read_lora_config(folder: Path) -> Dict[str, Any]:
    """``lora_config.json`` of an adapter folder."""
    file = Path(folder) / "lora_config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if config_of(Path(folder)) is not None:
            raise UserError(
                f"{folder} holds an adapter of PEFT's, which can be opened and merged but not trained on; merge it first "
                "(merge_lora_params.py) and name the result as model_name_or_path."
            ) from None
        raise UserError(f"{folder} has no lora_config.json, so it isn't the folder of an adapter.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read: {error}.") from None


def _made_with(config: Dict[str, Any], name: str) -> Any:
    made = config.get(name, False if name == "rslora" else None)
    return [made] if name == "target_modules" and isinstance(made, str) else made


def check_against_checkpoint(model: nn.Layer, made_now: Dict[str, Any], folder: Path) -> None:
    """Refuses to go on from a checkpoint with an adapter of other settings: it would be another model.

    Args:
        made_now: ``add_lora``'s options for this run.
        folder: the checkpoint.
    """
    config = read_lora_config(folder)
    for key, name, option in FIXED_BY_ADAPTER:
        now, made = made_now[option], _made_with(config, name)
        if key == "lora_target_modules":
            now = DEFAULT_TARGETS if now is None else list(now)
            same = resolve_targets(model, now) == resolve_targets(model, made)
        else:
            same = now == made
        if not same:
            raise UserError(
                f"{key} is {now!r}, but the run was begun with {made!r} ({folder}); set {key} to that to go on, or begin "
                "afresh in another output_dir."
            )


def check_against_adapter(settings: Dict[str, Any], config: Dict[str, Any], folder: Path) -> None:
    """Refuses keys of the run that differ from what the adapter of ``lora_path`` was made with."""
    for key, name, _ in FIXED_BY_ADAPTER:
        made = _made_with(config, name)
        if key in settings and settings[key] != made:
            raise UserError(
                f"{key} is {settings[key]!r}, but the adapter in {folder} was made with {made!r}; "
                f"remove {key} or lora_path."
            )
