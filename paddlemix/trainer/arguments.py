"""The flat JSON of a fine-tuning run: read once, every key typed, unknown keys refused.

``read_settings`` turns a command line (a JSON file and ``--key value`` pairs) into a dict of typed values, and touches
neither device nor disk beyond that file; ``FinetuneArguments`` is PaddleNLP's TrainingArguments with the keys of model
and data beside them.
"""

import difflib
import json
import logging
import math
import os
import typing
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

from paddlenlp.trainer import IntervalStrategy, TrainingArguments
from paddlenlp.trainer.trainer_utils import OptimizerNames, SchedulerType, ShardingOption

from paddlemix.errors import UserError
from paddlemix.runtime import device_name
from paddlemix.trainer.run_folder import trains

__all__ = ["SECRETS", "FinetuneArguments", "check_device", "configuration_file", "default_device", "read_settings"]

# Keys of PaddleNLP's TrainingArguments that steer an engine this tool doesn't have; each with what serves instead.
# They may stand in a file at their default, which is what most files that hold them say.
NOT_BUILT = {
    "tensor_parallel_degree": 'use sharding instead: "sharding": "stage2" (on CPUs "stage1") splits what training keeps',
    "pipeline_parallel_degree": 'use sharding instead: "sharding": "stage2" (on CPUs "stage1") splits what training keeps',
    "sep_parallel_degree": "use sharding and recompute instead",
    "context_parallel_degree": "use sharding and recompute instead",
    "expert_parallel_degree": "LLaVA has no experts",
    "expert_tensor_parallel_degree": "LLaVA has no experts",
    "use_expert_parallel": "LLaVA has no experts",
    "expert_max_capacity": "LLaVA has no experts",
    "expert_min_capacity": "LLaVA has no experts",
    "sequence_parallel": "it needs tensor parallelism; use sharding and recompute instead",
    "fuse_sequence_parallel_allreduce": "it needs tensor parallelism; use sharding instead",
    "sequence_parallel_config": "it needs tensor parallelism; use sharding instead",
    "tensor_parallel_config": "it needs tensor parallelism; use sharding instead",
    "pipeline_parallel_config": "it needs pipeline parallelism; use sharding instead",
    "data_parallel_config": "it is for auto parallel only; remove the key",
    "split_inputs_sequence_dim": "it needs sep_parallel_degree; use sharding and recompute instead",
    "distributed_dataloader": "every device reads its own rows; remove the key",
    "enable_auto_parallel": "use sharding instead",
    "auto_parallel_resume_form_hybrid_parallel": "use sharding instead",
    "sharding_parallel_mesh_dimension": "it is for auto parallel only; remove the key",
    "to_static": "training is eager; remove the key",
    "refined_recompute": "use recompute",
    "do_export": "a trained folder is exported by its own tool; remove the key",
    "past_index": "LLaVA's decoder has no memory of earlier batches; remove the key",
    "label_names": "the labels are always in labels; remove the key",
    "remove_unused_columns": "rows have the fields of the data formats only; remove the key",
    "lazy_data_processing": "rows are always read when they are needed; remove the key",
    "ddp_find_unused_parameters": "gradients are summed for all trained parameters, used or not; remove the key",
    "flatten_param_grads": "it is for NPU only; remove the key",
    "unified_checkpoint": "checkpoints have one layout for every number of devices already; remove the key",
    "unified_checkpoint_config": "checkpoints have one layout for every number of devices already; remove the key",
    "ckpt_quant_stage": "checkpoints are whole; remove the key",
    "save_sharded_model": "checkpoints have one layout for every number of devices already; remove the key",
    "load_sharded_model": "checkpoints have one layout for every number of devices already; remove the key",
    "save_sharding_stage1_model_include_freeze_params": "checkpoints hold all weights already; remove the key",
    "force_reshard_pp": "it needs pipeline parallelism; remove the key",
    "use_async_save": "a checkpoint is written aside and renamed when whole; remove the key",
    "ordered_save_group_size": "a checkpoint is written aside and renamed when whole; remove the key",
    "output_signal_dir": "a checkpoint is written aside and renamed when whole; remove the key",
    "pdc_download_ckpt": "name the checkpoint's folder in resume_from_checkpoint",
    "pdc_download_timeout": "name the checkpoint's folder in resume_from_checkpoint",
    "local_rank": "paddle.distributed.launch sets it; remove the key",
}
DEGREES = frozenset(key for key in NOT_BUILT if key.endswith("_degree"))  # 1 means off, as -1 does

AT_LEAST = {  # smallest value of a number
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_steps": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "warmup_ratio": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "mm_projector_lr": 0,
    "mm_vision_tower_lr": 0,
    "lora_rank": 1,
    "lora_alpha": 1,
    "lora_dropout": 0,
    "lora_plus_scale": 0,
    "power": 0,
    "lr_end": 0,
    "neftune_noise_alpha": 0,
    "max_length": 2,
    "max_new_tokens": 1,
    "seed": 0,
}
BELOW = {"adam_beta1": 1, "adam_beta2": 1, "lora_dropout": 1, "seed": 2**32}  # upper bound, not reached
ONE_OF = {
    "lr_scheduler_type": [kind.value for kind in SchedulerType],
    "optim": [kind.value for kind in OptimizerNames if kind is not OptimizerNames.ADAFACTOR],
    "fp16_opt_level": ["O0", "O1", "O2"],
    "hybrid_parallel_topo_order": ["pp_first", "sharding_first"],
    "device": None,  # checked against what Paddle has
}

logger = logging.getLogger(__name__)

MOST_EPOCHS = 1_000_000
PATHS = ("model_name_or_path", "text_model_name_or_path", "lora_path", "pretrain_mm_mlp_adapter", "output_dir")

# What an evaluation gives: always, unless prediction_loss_only is set, and with eval_with_do_generation
METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second")
ACCURACY_METRICS, ANSWER_METRICS = ("token_accuracy",), ("exact_match", "box_iou")

SECRETS = frozenset(["wandb_api_key"])  # never written to a file

_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")

# What report_to may name, and the module that each needs.
REPORTERS = {"visualdl": "visualdl", "wandb": "wandb", "tensorboard": "tensorboardX"}


@dataclass
class FinetuneArguments(TrainingArguments):
    """Every key of the configuration file; PaddleNLP's TrainingArguments, then those of model, data and this tool."""

    # model
    model_name_or_path: Optional[str] = field(default=None, metadata={"help": "Folder or name of the model to train."})
    text_model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Folder or name whose tokenizer is used in place of the model's."}
    )
    use_flash_attention: bool = field(default=False, metadata={"help": "On GPU, attend through flash attention."})
    freeze_include: Optional[List[str]] = field(
        default=None,
        metadata={
            "help": "fnmatch patterns; parameters that match are not trained; adapters only if the pattern has lora in it."
        },
    )
    freeze_exclude: Optional[List[str]] = field(
        default=None, metadata={"help": "fnmatch patterns; parameters that match are trained; adapters only as above."}
    )
    lora: bool = field(default=False, metadata={"help": "Train low-rank adapters in place of the decoder's weights."})
    lora_path: Optional[str] = field(default=None, metadata={"help": "Folder of an adapter to go on from."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapters' output is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters' input."})
    lora_target_modules: Optional[List[str]] = field(
        default=None, metadata={"help": "Regular expressions on layer names; default the decoder's seven projections."}
    )
    rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank) (Kalajdzievski, 2023)."})
    lora_plus_scale: float = field(
        default=1.0, metadata={"help": "Learning rate of lora_B over that of lora_A (LoRA+, Hayou et al., 2024)."}
    )
    neftune: bool = field(default=False, metadata={"help": "Noise on embeddings in training (Jain et al., 2023)."})
    neftune_noise_alpha: float = field(default=5.0, metadata={"help": "The noise is alpha / sqrt(L * D) at most."})
    mm_projector_lr: Optional[float] = field(default=None, metadata={"help": "Learning rate of the projector."})
    mm_vision_tower_lr: Optional[float] = field(default=None, metadata={"help": "Learning rate of the tower."})
    unfreeze_mm_vision_tower: bool = field(default=False, metadata={"help": "Train the vision tower too."})
    tune_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Train the projector alone."})
    freeze_mm_mlp_adapter: bool = field(default=False, metadata={"help": "Don't train the projector."})
    pretrain_mm_mlp_adapter: Optional[str] = field(
        default=None, metadata={"help": "File with a projector's weights, put into the model before training."}
    )
    image_aspect_ratio: Optional[str] = field(
        default=None, metadata={"help": "square, pad or anyres; default what the checkpoint says."}
    )
    version: Optional[str] = field(
        default=None, metadata={"help": "Conversation template; default what the checkpoint says."}
    )

    # data
    dataset: Optional[Dict[str, Any]] = field(default=None, metadata={"help": '{"train": [...], "eval": [...]}'})
    max_length: int = field(default=2048, metadata={"help": "Longest sample in tokens, picture features included."})
    mixtoken: bool = field(default=False, metadata={"help": "Pack several samples into one row of max_length."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality and of similar lengths."}
    )
    eval_with_do_generation: bool = field(
        default=False, metadata={"help": "In evaluation also write answers, and compare them with the references."}
    )
    max_new_tokens: Optional[int] = field(
        default=None,
        metadata={"help": "Longest answer in evaluation with generation; default that of the longest reference."},
    )

    # training
    benchmark: bool = field(
        default=False, metadata={"help": "Report samples/s, tokens/s and peak memory; save no model and no checkpoint."}
    )
    device: Optional[str] = field(default=None, metadata={"help": "gpu, cpu, …; default gpu if Paddle has one."})
    do_train: Optional[bool] = field(
        default=None, metadata={"help": "Train; default true unless do_eval or do_predict is all that is asked."}
    )
    do_eval: Optional[bool] = field(
        default=None, metadata={"help": "Evaluate; default true if evaluation_strategy is steps or epoch."}
    )
    evaluation_strategy: Optional[IntervalStrategy] = field(
        default=None,
        metadata={
            "help": "Evaluate every so many steps, each epoch, or (no) at the end alone; default steps if do_eval is true."
        },
    )
    output_dir: Optional[str] = field(default=None, metadata={"help": "Where checkpoints and the result are written."})
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": "Train in a folder that holds other files, another run or a finished one; an unfinished run with the "
            "same settings is still gone on with. Evaluation puts its results beside a trained model."
        },
    )
    resume_from_checkpoint: Optional[str] = field(
        default=None,
        metadata={
            "help": "Folder of a checkpoint; true for the last whole one in output_dir, false to begin afresh. By default "
            "an unfinished run in output_dir is gone on with."
        },
    )

    def __post_init__(self):
        self.device = check_device(vars(self))
        if self.world_size > 1:
            self.device, _, number = self.device.partition(":")
            if number:
                logger.warning(
                    "device names number %s, but the launcher gives each process its own; use its --gpus.", number
                )
        # Paddle's autocast has no bfloat16 on a CPU; the products compute in it by themselves, at O1 and O2 alike
        self.bfloat16_products = self.bf16 and self.device.startswith("cpu") and self.fp16_opt_level != "O0"
        if self.device.startswith("cpu"):
            self.bf16 = self.amp_master_grad = False  # gradients are float32 anyway
        if self.run_name is not None and self.logging_dir is None and self.output_dir is not None:
            self.logging_dir = os.path.join(self.output_dir, "runs", self.run_name)
        if self.do_train is None:
            self.do_train = not (self.do_eval or self.do_predict)
        given = self.evaluation_strategy is not None
        self.evaluation_strategy = IntervalStrategy(self.evaluation_strategy or IntervalStrategy.NO)
        evaluates = self.evaluation_strategy != IntervalStrategy.NO
        at_the_end = bool(self.do_eval) and given and not evaluates
        if self.do_eval is None:
            self.do_eval = evaluates and self.do_train
        elif not self.do_eval and evaluates:
            # an explicit "do_eval": false wins over the strategy, which PaddleNLP would let turn evaluation on
            if self.load_best_model_at_end:
                raise UserError(
                    "load_best_model_at_end is true, but do_eval is false, so that there is no best model; set do_eval to true."
                )
            logger.warning(
                "do_eval is false, so nothing is evaluated, whatever evaluation_strategy says; set it to true for that."
            )
            self.evaluation_strategy = IntervalStrategy.NO
        if at_the_end:
            self.do_eval = False  # or PaddleNLP makes the strategy steps
        evaluates = evaluates or bool(self.do_eval)
        if self.load_best_model_at_end and self.do_train and not (evaluates and self._saves_when_evaluated()):
            raise UserError(
                "load_best_model_at_end is true, but the best is looked for among checkpoints that are evaluated: set "
                'evaluation_strategy and save_strategy both to "steps" or both to "epoch".'
            )
        self._check_shards()
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        elif self.report_to is None:  # PaddleNLP would fail where VisualDL isn't installed
            self.report_to = ["visualdl"] if find_spec("visualdl") is not None else []
        try:
            super().__post_init__()
        except (ValueError, AssertionError) as error:
            raise UserError(" ".join(str(error).split()).replace("--", "")) from error
        if self.fp16 and self.amp_master_grad and not self.use_hybrid_parallel:
            # Paddle's loss scaling looks for infinities in the gradients that amp_master_grad leaves empty
            logger.warning(
                "amp_master_grad is off, since Paddle can't scale its gradients with fp16; use bf16, or set it to false."
            )
            self.amp_master_grad = False
        self.do_eval = self.do_eval or at_the_end
        self.unified_checkpoint = False
        if self.eval_with_do_generation and not (self.do_eval or self.do_predict):
            logger.warning("eval_with_do_generation is true, but nothing is evaluated; set do_eval to true for that.")

    def _saves_when_evaluated(self) -> bool:
        strategy = (
            self.evaluation_strategy if self.evaluation_strategy != IntervalStrategy.NO else IntervalStrategy.STEPS
        )
        return getattr(self.save_strategy, "value", self.save_strategy) == strategy.value

    def _check_shards(self) -> None:
        """PaddleNLP takes a degree without ``sharding`` for a sharded run, and then averages no gradients."""
        degree, ranks = max(self.sharding_parallel_degree, self.sharding_degree), self.world_size
        if not self.sharding:
            if degree > 1:
                logger.warning(
                    "sharding_parallel_degree is %d, but sharding isn't set, so nothing is sharded; set sharding to stage1 "
                    "for that.",
                    degree,
                )
            self.sharding_parallel_degree = self.sharding_degree = -1
        elif ranks > 1 and degree > 1 and ranks % degree:
            raise UserError(
                f"sharding_parallel_degree is {degree}, but the run has {ranks} processes; expected a divisor of their "
                "number, or leave the key out to shard over all of them."
            )
        elif ranks > 1 and ("stage3" in self.sharding or "offload" in self.sharding):
            raise UserError(
                f"sharding is {self.sharding!r}, which this tool doesn't have; use stage2, on CPUs stage1, and recompute."
            )
        elif "stage2" in self.sharding and self.amp_master_grad and (self.bf16 or self.fp16) and 1 < degree < ranks:
            raise UserError(
                f"sharding_parallel_degree is {degree} of {ranks} processes, but Paddle's stage2 with amp_master_grad shards "
                "over all of them; leave the key out, or use stage1."
            )

    @property
    def compute_dtype(self) -> str:
        """dtype of the weights: half precision only at level O2, where the optimizer keeps float32 copies."""
        if self.fp16_opt_level != "O2" or not (self.fp16 or self.bf16):
            return "float32"
        return "float16" if self.fp16 else "bfloat16"

    def to_dict(self) -> Dict[str, Any]:
        """Settings as they may be shown: the key of an account isn't among them."""
        shown = {key: value for key, value in super().to_dict().items() if key not in SECRETS}
        return {**shown, "bf16": self.bf16 or self.bfloat16_products}

    def to_sanitized_dict(self) -> Dict[str, Any]:
        """Settings for the reporting integrations; VisualDL's writer takes no booleans."""
        return {
            key: str(value) if isinstance(value, bool) else value for key, value in super().to_sanitized_dict().items()
        }


def read_settings(argv: Sequence[str]) -> Dict[str, Any]:
    """A command line to typed settings.

    Args:
        argv: ``CONFIG.json --key value …``; the file may be left out. ``--key`` alone means true.

    Returns:
        The keys that were given and aren't null, in the types that FinetuneArguments declares.

    Raises:
        UserError: no such file, not a JSON object, an unknown key (the nearest valid one is named), a value of the
            wrong type or out of range, or one that this tool doesn't have.
    """
    file, overrides = _split(list(argv))
    settings = _read_json(file) if file is not None else {}
    hints = _hints()
    typed = {}
    for source, given in ((str(file), settings), ("the command line", overrides)):
        for key, value in given.items():
            if key not in hints:
                nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0)[0]
                raise UserError(f"{key} in {source} is no key of the configuration; the nearest is {nearest}.")
            from_text = given is overrides
            if value is None or (from_text and _unsets(key, value, hints[key])):
                typed.pop(key, None)
                continue
            typed[key] = _typed(key, value, hints[key], from_text)
    _check(typed)
    return typed


def default_device() -> str:
    """``gpu`` if Paddle has one, else ``cpu``."""
    import paddle

    return "gpu" if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() else "cpu"


def check_device(settings: Dict[str, Any]) -> str:
    """The device of a run; refuses one that Paddle lacks, and half precision where it can't be computed."""
    import paddle

    from paddlemix.models.llava.onednn import multiplies_in_bfloat16

    device = settings.get("device")
    if settings.get("no_cuda"):
        device = "cpu"
    device = default_device() if device is None else device_name(device, "device")
    kind = device.split(":")[0]
    have = ["cpu"] + list(paddle.device.get_all_custom_device_type() or [])
    if paddle.device.is_compiled_with_xpu():
        have.append("xpu")
    if default_device() == "gpu":
        have.append("gpu")
    if kind not in have:
        raise UserError(f"device is {device!r}, which this Paddle doesn't have; expected one of {', '.join(have)}.")
    index = device.partition(":")[2]
    if kind == "gpu" and index and int(index) >= paddle.device.cuda.device_count():
        last = paddle.device.cuda.device_count() - 1
        raise UserError(f"device is {device}, but the last GPU here is gpu:{last}.")
    if settings.get("fp16") and kind == "cpu":
        raise UserError("fp16 is true, but Paddle has no float16 on a CPU; use bf16 or a GPU instead.")
    for half in ("bf16_full_eval", "fp16_full_eval"):
        if settings.get(half) and kind == "cpu":
            raise UserError(f"{half} is true, but on a CPU evaluation computes in float32; set {half} to false.")
    rounds = settings.get("bf16") and settings.get("fp16_opt_level") != "O0"
    if rounds and kind == "cpu" and not multiplies_in_bfloat16():
        raise UserError(
            "bf16 is true, but this CPU, or the oneDNN of this Paddle, can't multiply in bfloat16; set bf16 to false."
        )
    if settings.get("bf16") and kind == "gpu" and not paddle.amp.is_bfloat16_supported():
        raise UserError("bf16 is true, but this GPU has no bfloat16; use fp16 instead.")
    if settings.get("use_flash_attention") and kind == "cpu":
        raise UserError("use_flash_attention is true, but there is no flash attention on a CPU; set it to false.")
    return device


def configuration_file(argv: Sequence[str]) -> Optional[Path]:
    """The file that a command line names, before or after its overrides; None if it names none."""
    return _split(list(argv))[0]


def _split(argv: List[str]):
    """The file and the overrides of a command line, values still as text."""
    file, overrides = None, {}
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        if not word.startswith("--"):
            if file is not None:
                hint = ""
                if position > 2 and argv[position - 3].startswith("--"):
                    hint = f"; several values of {argv[position - 3]} are written as a JSON list in quotes"
                raise UserError(
                    f"{word} follows {argv[position - 2]}; expected one configuration file and then --key value pairs{hint}."
                )
            file = Path(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            if position < len(argv) and not argv[position].startswith("--"):
                value = argv[position]
                position += 1
            else:
                value = "true"
        overrides[key.replace("-", "_")] = value
    return file, overrides


def _read_json(file: Path) -> Dict[str, Any]:
    def refuse_twice(pairs):
        seen = {}
        for key, value in pairs:
            if key in seen:
                raise UserError(f"{key} stands twice in {file}; keep one.")
            seen[key] = value
        return seen

    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the configuration file {file} doesn't exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration file {file} can't be read: {error}.") from None
    try:
        settings = json.loads(text, object_pairs_hook=refuse_twice)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from None
    except UserError:
        raise
    except (ValueError, RecursionError):  # what Python refuses to convert, though it is JSON
        raise UserError(f"{file} has a number of thousands of digits, or lists and objects nested too deep.") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds a JSON {_kind(settings)}; expected an object of keys and values.")
    return settings


def _hints() -> Dict[str, Any]:
    return {item.name: typing.get_type_hints(FinetuneArguments)[item.name] for item in fields(FinetuneArguments)}


def _unsets(key: str, value: str, hint: Any) -> bool:
    """Whether a word on the command line stands for no value."""
    if value == "null":
        return True
    has_none = type(None) in typing.get_args(hint) and key != "report_to"  # whose "none" is a value
    return has_none and value.lower() in ("null", "none")


def _typed(key: str, value: Any, hint: Any, from_text: bool) -> Any:
    """``value`` in the type that ``key`` declares."""
    origin = typing.get_origin(hint)
    if origin is Union:  # Optional[...]
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        origin = typing.get_origin(hint)
    if key == "resume_from_checkpoint" and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if key == "sharding" and isinstance(value, bool):
        return "stage1" if value else ""
    if hint is bool:
        if isinstance(value, str) and from_text and value.lower() in _TRUE + _FALSE:
            return value.lower() in _TRUE
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise _wrong(key, value, "true or false")
    if hint in (int, float):
        if from_text:
            value = _number(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(key, value, "a whole number" if hint is int else "a number")
        if not _is_finite(value):
            raise _wrong(key, value, "a finite number")
        if hint is int and value != int(value):
            raise _wrong(key, value, "a whole number")
        return hint(value)
    if hint is str:
        if not isinstance(value, str):
            raise _wrong(key, value, "text")
        return value
    if isinstance(hint, type) and issubclass(hint, Enum):
        allowed = [kind.value for kind in hint]
        if value not in allowed:
            raise _wrong(key, value, "one of " + ", ".join(allowed))
        return value
    if origin is list:
        item = typing.get_args(hint)[0]
        if isinstance(value, str) and (not from_text or not value.lstrip().startswith("[")):
            value = [value]
        elif from_text:
            value = _json_value(key, value, "a JSON list")
        if not isinstance(value, list):
            raise _wrong(key, value, "a list")
        return [_typed(key, element, item, False) for element in value]
    if from_text:
        value = _json_value(key, value, "a JSON object")
    if not isinstance(value, dict):
        raise _wrong(key, value, "an object")
    return value


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number that no float holds
        return False


def _json_value(key: str, text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _wrong(key, text, expected) from None


def _wrong(key: str, value: Any, expected: str) -> UserError:
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    return UserError(f"{key} is {shown}, a JSON {_kind(value)}; expected {expected}.")


def _kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), "null")


def _check(settings: Dict[str, Any]) -> None:
    """Refuses values out of range, and what this tool doesn't have."""
    defaults = {item.name: item.default for item in fields(FinetuneArguments) if item.default is not MISSING}
    for key, value in settings.items():
        if key in NOT_BUILT and value != defaults[key] and not (key in DEGREES and value <= 1):
            raise UserError(f"{key} is {json.dumps(value)}, which this tool doesn't have: {NOT_BUILT[key]}.")
        if key in AT_LEAST and value < AT_LEAST[key]:
            raise UserError(f"{key} is {value}; expected at least {AT_LEAST[key]}.")
        if key in BELOW and not 0 <= value < BELOW[key]:
            raise UserError(f"{key} is {value}; expected from 0 to below {BELOW[key]}.")
        if ONE_OF.get(key) and value not in ONE_OF[key]:
            raise UserError(f"{key} is {value!r}; expected one of {', '.join(ONE_OF[key])}.")
    for key in (*PATHS, "resume_from_checkpoint"):
        if isinstance(settings.get(key), str) and not settings[key].strip():
            raise UserError(f"{key} is an empty text; expected a path or a name, or null for none.")
    if settings.get("lora") and settings.get("lora_target_modules") == []:
        raise UserError(
            "lora_target_modules is an empty list; give at least one regular expression, or leave it out for the decoder's "
            "seven projections."
        )
    if settings.get("warmup_ratio", 0) > 1:
        raise UserError(f"warmup_ratio is {settings['warmup_ratio']}; expected from 0 to 1.")
    steps, epochs = settings.get("max_steps", -1), settings.get("num_train_epochs", 1.0)
    if steps == 0 or steps < -1:
        raise UserError(f"max_steps is {steps}; expected a number of steps, or -1 to go by num_train_epochs.")
    if epochs <= 0 and steps < 1:
        raise UserError(f"num_train_epochs is {epochs}; expected more than 0.")
    if epochs > MOST_EPOCHS:
        raise UserError(f"num_train_epochs is {epochs:g}; expected at most {MOST_EPOCHS}.")
    rate, end = (settings.get(key, defaults[key]) for key in ("learning_rate", "lr_end"))
    if settings.get("lr_scheduler_type") == "polynomial" and end >= rate:
        raise UserError(
            f"lr_end is {end:g}, but learning_rate is {rate:g}; a polynomial schedule ends below where it begins."
        )
    for interval in settings.get("skip_data_intervals", []):
        if len(interval) != 2 or not 1 <= interval[0] <= interval[1]:
            raise UserError(
                f"skip_data_intervals has {interval}; expected [first, last], two steps counted from 1, the first not "
                "after the last."
            )
    reporters = settings.get("report_to", [])
    for name in reporters:
        if name in ("all", "none") and len(reporters) == 1:
            continue
        if name not in REPORTERS:
            raise UserError(f"report_to has {name!r}; expected all, none, or some of {', '.join(REPORTERS)}.")
        if find_spec(REPORTERS[name]) is None:
            raise UserError(f"report_to has {name}, which isn't installed; pip install {REPORTERS[name]}.")
    if settings.get("minimum_eval_times") and settings.get("evaluation_strategy") != "steps":
        raise UserError("minimum_eval_times sets eval_steps, so evaluation_strategy must be steps.")
    if settings.get("metric_for_best_model") is not None:
        _check_metric(settings["metric_for_best_model"], settings)
    shards = settings.get("sharding", "").split()
    if shards and (shards[0] not in [kind.value for kind in ShardingOption][:3] or shards[1:] not in ([], ["offload"])):
        raise UserError(f"sharding is {settings['sharding']!r}; expected stage1 or stage2.")
    for first, second in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if settings.get(first) and settings.get(second):
            raise UserError(f"{first} and {second} are both true; set one of them to false.")
    if settings.get("tune_mm_mlp_adapter") and settings.get("freeze_mm_mlp_adapter"):
        raise UserError("tune_mm_mlp_adapter and freeze_mm_mlp_adapter are both true; set one of them to false.")
    if settings.get("tune_mm_mlp_adapter") and settings.get("lora"):
        raise UserError("tune_mm_mlp_adapter trains the projector alone, so lora must be false.")
    if settings.get("tune_mm_mlp_adapter") and settings.get("unfreeze_mm_vision_tower"):
        raise UserError(
            "tune_mm_mlp_adapter trains the projector alone, so unfreeze_mm_vision_tower must be false; to train the tower "
            "too, leave tune_mm_mlp_adapter out and freeze the decoder by freeze_include."
        )
    for key in ("mm_projector_lr", "mm_vision_tower_lr"):
        if settings.get(key) and settings.get("learning_rate") == 0:
            raise UserError(f"{key} is set relative to learning_rate, which is 0; give learning_rate a value above 0.")
    trains_tower = settings.get("unfreeze_mm_vision_tower") or settings.get("freeze_exclude")  # which may name it
    if settings.get("mm_vision_tower_lr") is not None and not trains_tower:
        raise UserError("mm_vision_tower_lr is set, but the tower is frozen; set unfreeze_mm_vision_tower to true.")
    if settings.get("lora_path") and not settings.get("lora"):
        raise UserError("lora_path is set, but lora is false; set lora to true to go on from that adapter.")
    if settings.get("eval_with_do_generation") and settings.get("prediction_loss_only"):
        raise UserError(
            "eval_with_do_generation and prediction_loss_only are both true, but one asks for answers and the other for "
            "nothing but the loss; set one to false."
        )
    if settings.get("model_name_or_path") is None:
        raise UserError("model_name_or_path is missing; expected the folder or name of the model to train.")
    if settings.get("output_dir") is None:
        raise UserError("output_dir is missing; expected the folder that the result is written to.")
    if settings.get("dataset") is None:
        raise UserError('dataset is missing; expected {"train": [{"data_files": "train.json"}]}.')
    if settings.get("benchmark") and not trains(settings):
        raise UserError(
            "benchmark is true, but do_train isn't, and a benchmark measures training; set do_train to true."
        )
    if settings.get("do_train") is False and not settings.get("do_eval") and not settings.get("do_predict"):
        raise UserError("do_train, do_eval and do_predict are all false, so there is nothing to do; set one to true.")


def _check_metric(name: str, settings: Dict[str, Any]) -> None:
    """Refuses a ``metric_for_best_model`` that no evaluation of the run will give."""
    given = METRICS
    if not settings.get("prediction_loss_only"):
        given += ACCURACY_METRICS + (ANSWER_METRICS if settings.get("eval_with_do_generation") else ())
    bare = name[len("eval_") :] if name.startswith("eval_") else name
    if bare not in given:
        hint = "; set eval_with_do_generation to true for it" if bare in ANSWER_METRICS else ""
        raise UserError(f"metric_for_best_model is {name!r}; expected one of {', '.join(given)}{hint}.")
