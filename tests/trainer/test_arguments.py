"""The flat JSON and its overrides: every key typed, mistakes told in one sentence."""

import json
from pathlib import Path

import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava import onednn
from paddlemix.trainer import arguments
from paddlemix.trainer.arguments import FinetuneArguments, check_device, read_settings

SHIPPED = Path(__file__).parents[2] / "paddlemix" / "config" / "llava"

MINIMAL = {"model_name_or_path": "m", "output_dir": "out", "dataset": {"train": [{"data_files": "train.json"}]}}

# What the toolkit's files for LLaVA hold, joined: every key and kind of value (0/1 for booleans too).
TOOLKIT = {
    "model_name_or_path": "liuhaotian/llava-v1.5-7b",
    "freeze_include": ["*llama*", "*lm_head*"],
    "freeze_exclude": ["*llama.mm_projector*"],
    "dataset": {
        "train": [{"name": "chatml_dataset", "data_files": "train.json", "chat_template": "chat_template.json"}],
        "eval": [{"name": "chatml_dataset", "data_files": "val.json", "chat_template": "chat_template.json"}],
    },
    "mixtoken": False,
    "output_dir": "./checkpoints/llava_sft_ckpts",
    "overwrite_output_dir": True,
    "recompute": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 1,
    "sharding": "stage2",
    "tensor_parallel_degree": 1,
    "pipeline_parallel_degree": 1,
    "sharding_parallel_degree": 8,
    "eval_accumulation_steps": 16,
    "group_by_modality_length": False,
    "num_train_epochs": 1,
    "learning_rate": 2e-04,
    "mm_projector_lr": 2e-5,
    "weight_decay": 0.0,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "save_steps": 100,
    "eval_steps": 120,
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "max_length": 2048,
    "bf16": False,
    "fp16": False,
    "fp16_opt_level": "O1",
    "amp_master_grad": 1,
    "do_train": True,
    "do_eval": False,
    "disable_tqdm": True,
    "load_best_model_at_end": False,
    "eval_with_do_generation": False,
    "skip_memory_metrics": False,
    "benchmark": False,
    "save_total_limit": 1,
    "version": "plain",
    "lora": True,
    "lora_rank": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.0,
    "lora_target_modules": ["llama.layer.*q_proj.*", "llama.layer.*down_proj.*"],
}


def write(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**MINIMAL, **changes}))
    return str(file)


def settings(folder, *overrides, **changes):
    return read_settings([write(folder, **changes), *overrides])


def test_the_toolkits_keys_are_taken_as_they_are(tmp_path):
    file = tmp_path / "toolkit.json"
    file.write_text(json.dumps(TOOLKIT))
    args = FinetuneArguments(**read_settings([str(file)]))
    assert args.lora_rank == 128 and args.learning_rate == 2e-4 and args.num_train_epochs == 1.0
    assert not args.do_eval  # the explicit false wins over "evaluation_strategy": "epoch"


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.stem)
def test_shipped_files_are_valid(file):
    read_settings([str(file)])


def test_shipped_files_are_all_there():
    assert {file.stem for file in SHIPPED.glob("*.json")} >= {"lora_sft_argument", "sft_argument", "pretrain"}


def test_a_command_line_overrides_key_by_key(tmp_path):
    found = settings(
        tmp_path,
        "--learning_rate", "1e-3", "--max_steps=-1", "--lora", "--bf16", "false", "--lora_target_modules", '["a", "b"]',
        "--report_to", "none", "--num-train-epochs", "2", "--output_dir", "elsewhere", "--eval_steps", "null",
        "--dataset", '{"train": [{"data_files": "x.json"}]}',
        learning_rate=5e-5, eval_steps=7,
    )  # fmt: skip
    assert found["learning_rate"] == 1e-3 and found["max_steps"] == -1 and found["lora"] is True
    assert found["bf16"] is False and found["lora_target_modules"] == ["a", "b"] and found["report_to"] == ["none"]
    assert found["num_train_epochs"] == 2.0 and found["output_dir"] == "elsewhere" and "eval_steps" not in found
    assert found["dataset"]["train"][0]["data_files"] == "x.json"


@pytest.mark.parametrize("word, expected", [("True", True), ("FALSE", False), ("true", True), ("a/true", "a/true")])
def test_going_on_takes_a_boolean_in_any_spelling(tmp_path, word, expected):
    assert settings(tmp_path, "--resume_from_checkpoint", word)["resume_from_checkpoint"] == expected
    assert settings(tmp_path, resume_from_checkpoint=word)["resume_from_checkpoint"] == expected


def test_null_is_the_default(tmp_path):
    found = settings(tmp_path, lora_path=None, save_total_limit=None, lora_rank=None)
    assert FinetuneArguments(**found).lora_rank == 8


def test_types_are_lenient_where_nothing_is_lost(tmp_path):
    found = settings(tmp_path, max_steps=1e3, learning_rate=1, recompute=1, freeze_include="*tower*", sharding=True)
    assert found["max_steps"] == 1000 and isinstance(found["max_steps"], int)
    assert isinstance(found["learning_rate"], float) and found["recompute"] is True
    assert found["freeze_include"] == ["*tower*"] and found["sharding"] == "stage1"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"learning_rat": 1e-4}, ["learning_rat ", "learning_rate"]),
        ({"lora_r": 4}, ["lora_r", "lora"]),
        ({"per_device_train_batch_sise": 4}, ["per_device_train_batch_size"]),
        ({"lora_rank": "8"}, ["lora_rank", '"8"', "whole number"]),
        ({"max_steps": 1.5}, ["max_steps", "1.5"]),
        ({"lora": "yes"}, ["lora", "true or false"]),
        ({"learning_rate": "2e-5"}, ["learning_rate", "number"]),
        ({"output_dir": 3}, ["output_dir", "text"]),
        ({"freeze_include": [1]}, ["freeze_include", "text"]),
        ({"dataset": "train.json"}, ["dataset", "object"]),
        ({"evaluation_strategy": "sometimes"}, ["evaluation_strategy", "no, steps, epoch"]),
        ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "cosine"]),
        ({"optim": "sgd"}, ["optim", "adamw"]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size", "at least 1"]),
        ({"lora_dropout": 1.0}, ["lora_dropout", "below 1"]),
        ({"warmup_ratio": 2}, ["warmup_ratio", "0 to 1"]),
        ({"num_train_epochs": 0}, ["num_train_epochs"]),
        ({"num_train_epochs": 1e308}, ["num_train_epochs", "1e+308", "at most"]),
        ({"lr_scheduler_type": "polynomial", "lr_end": 0.01}, ["lr_end", "0.01", "learning_rate"]),
        ({"lr_scheduler_type": "polynomial", "power": -1}, ["power", "at least 0"]),
        ({"num_train_epochs": float("nan")}, ["num_train_epochs", "NaN", "finite"]),
        ({"max_steps": float("inf")}, ["max_steps", "Infinity", "finite"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "NaN", "finite"]),
        ({"max_grad_norm": float("-inf")}, ["max_grad_norm", "-Infinity", "finite"]),
        ({"learning_rate": 10**400}, ["learning_rate", "finite"]),
        ({"seed": 2**32}, ["seed", "4294967296"]),
        ({"skip_data_intervals": [[1, 2], [3, 1]]}, ["skip_data_intervals", "[3, 1]", "[first, last]"]),
        ({"skip_data_intervals": [[0, 1]]}, ["skip_data_intervals", "[0, 1]", "from 1"]),
        ({"skip_data_intervals": [[1]]}, ["skip_data_intervals", "[1]", "[first, last]"]),
        ({"max_steps": 0}, ["max_steps"]),
        ({"tensor_parallel_degree": 2}, ["tensor_parallel_degree", "sharding"]),
        ({"pipeline_parallel_degree": 4}, ["pipeline_parallel_degree", "sharding"]),
        ({"unified_checkpoint": True}, ["unified_checkpoint", "remove the key"]),
        ({"sharding": "stage4"}, ["sharding", "stage1"]),
        ({"fp16": True, "bf16": True}, ["fp16", "bf16"]),
        ({"tune_mm_mlp_adapter": True, "freeze_mm_mlp_adapter": True}, ["freeze_mm_mlp_adapter"]),
        ({"tune_mm_mlp_adapter": True, "lora": True}, ["lora"]),
        (
            {"tune_mm_mlp_adapter": True, "unfreeze_mm_vision_tower": True},
            ["unfreeze_mm_vision_tower", "freeze_include"],
        ),
        ({"mm_vision_tower_lr": 1e-5}, ["mm_vision_tower_lr", "unfreeze_mm_vision_tower"]),
        ({"lora_path": "x"}, ["lora_path", "lora"]),
        ({"lora_path": "", "lora": True}, ["lora_path", "empty", "null"]),
        ({"pretrain_mm_mlp_adapter": " "}, ["pretrain_mm_mlp_adapter", "empty", "null"]),
        ({"lora": True, "lora_target_modules": []}, ["lora_target_modules", "empty list"]),
        ({"report_to": "visuldl"}, ["report_to", "visualdl"]),
        ({"dataset": None}, ["dataset", "missing"]),
        ({"model_name_or_path": None}, ["model_name_or_path", "missing"]),
        ({"output_dir": None}, ["output_dir", "missing"]),
        ({"do_train": False}, ["do_train", "do_eval"]),
        ({"metric_for_best_model": "accuracy"}, ["metric_for_best_model", "'accuracy'", "loss", "token_accuracy"]),
        ({"metric_for_best_model": "eval_exact_match"}, ["metric_for_best_model", "eval_with_do_generation"]),
        (
            {"metric_for_best_model": "token_accuracy", "prediction_loss_only": True},
            ["metric_for_best_model", "expected one of loss"],
        ),
        ({"benchmark": True, "do_train": False, "do_eval": True}, ["benchmark", "do_train"]),
        ({"benchmark": True, "do_train": None, "do_predict": True}, ["benchmark", "do_train"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, changes, words):
    with pytest.raises(UserError) as caught:
        settings(tmp_path, **changes)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) < 300


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", ["not valid JSON", ":1:"]),
        ("[]", ["list", "object"]),
        ('{"lora": true, "lora": false}', ["lora", "twice"]),
        ('{"dataset": ' + "[" * 100_000, ["nested too deep"]),
        ('{"max_steps": ' + "1" * 5000 + "}", ["thousands of digits"]),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, words):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        read_settings([str(file)])
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("value", ["inf", "nan", "1e999", "1" * 5000])
def test_a_number_of_the_command_line_is_finite(tmp_path, value):
    with pytest.raises(UserError, match="max_steps .*; expected a finite number"):
        settings(tmp_path, "--max_steps", value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match="nowhere.json doesn't exist"):
        read_settings(["nowhere.json"])


def test_a_second_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="one configuration file"):
        read_settings([write(tmp_path), "other.json"])


@pytest.mark.skipif(paddle.device.is_compiled_with_cuda(), reason="says what a build without GPU says")
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"fp16": True}, ["fp16", "on a CPU", "bf16"]),
        ({"fp16_full_eval": True}, ["fp16_full_eval", "float32"]),
        ({"bf16_full_eval": True}, ["bf16_full_eval", "float32"]),
        ({"use_flash_attention": True}, ["use_flash_attention"]),
        ({"device": "gpu"}, ["device", "gpu", "cpu"]),
        ({"device": "cuda:0"}, ["device", "gpu:0", "cpu"]),
    ],
)
def test_a_device_that_cannot_do_it(changes, words):
    with pytest.raises(UserError) as caught:
        check_device(changes)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("given", ["cpu", "CPU", "cpu:0", "Cpu:1"])
def test_a_device_has_more_than_one_spelling(given):
    assert check_device({"device": given}) == "cpu"


@pytest.mark.parametrize("given", ["cpu:x", "", "cpu gpu"])
def test_what_is_no_device(given):
    with pytest.raises(UserError, match=f"device is '{given}'; expected a name such as cpu, gpu or gpu:1"):
        check_device({"device": given})


def test_bfloat16_needs_a_processor_that_multiplies_in_it(monkeypatch):
    monkeypatch.setattr(onednn, "multiplies_in_bfloat16", lambda: False)
    with pytest.raises(UserError, match="bf16 is true, but this CPU"):
        check_device({"bf16": True, "device": "cpu"})
    assert check_device({"bf16": False, "device": "cpu"}) == "cpu"
    assert check_device({"bf16": True, "fp16_opt_level": "O0", "device": "cpu"}) == "cpu"


def test_bfloat16_on_a_cpu_is_among_the_settings_that_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(onednn, "multiplies_in_bfloat16", lambda: True)
    for level, shown in (("O0", False), ("O1", True), ("O2", True)):
        args = FinetuneArguments(output_dir=str(tmp_path), device="cpu", bf16=True, fp16_opt_level=level)
        assert args.to_dict()["bf16"] is args.bfloat16_products is shown and args.compute_dtype == "float32"


def test_default_device_is_one_that_paddle_has():
    assert check_device({"no_cuda": True}) == "cpu"
    assert check_device({}) == ("gpu" if paddle.device.is_compiled_with_cuda() else "cpu")


def test_every_key_of_paddlenlp_is_known():
    from dataclasses import fields

    from paddlenlp.trainer import TrainingArguments

    assert {item.name for item in fields(TrainingArguments)} <= {item.name for item in fields(FinetuneArguments)}


def test_a_degree_without_sharding_shards_nothing(tmp_path, caplog):
    """PaddleNLP would take it for a sharded run, in which each rank trains alone."""
    for degree in ("sharding_parallel_degree", "sharding_degree"):
        caplog.clear()
        args = FinetuneArguments(**settings(tmp_path, **{degree: 2}))
        assert args.sharding_parallel_degree == -1 and not args.use_hybrid_parallel
        assert "sharding isn't set, so nothing is sharded" in caplog.text


def test_shards_divide_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UserError, match="sharding_parallel_degree is 8, but the run has 2 processes"):
        FinetuneArguments(**settings(tmp_path, sharding="stage1", sharding_parallel_degree=8))


@pytest.mark.parametrize("sharding", ["stage3", "stage2 offload"])
def test_stages_that_are_not_built(tmp_path, monkeypatch, sharding):
    """On one process nothing is sharded, whatever is asked."""
    assert not FinetuneArguments(**settings(tmp_path, sharding=sharding)).sharding
    monkeypatch.setattr(FinetuneArguments, "world_size", property(lambda self: 2))
    with pytest.raises(UserError, match=f"sharding is '{sharding}', which this tool doesn't have; use stage2"):
        FinetuneArguments(**settings(tmp_path, sharding=sharding))


def test_stage2_with_master_gradients_shards_over_all_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(arguments, "check_device", lambda settings: "gpu")
    monkeypatch.setattr(FinetuneArguments, "world_size", property(lambda self: 4))
    with pytest.raises(UserError, match="sharding_parallel_degree is 2 of 4 processes"):
        FinetuneArguments(
            **settings(tmp_path, sharding="stage2", sharding_parallel_degree=2, bf16=True, amp_master_grad=True)
        )


def test_what_gpu_runs_ask_for(tmp_path, monkeypatch, caplog):
    """As far as it can be told without one."""
    monkeypatch.setattr(arguments, "default_device", lambda: "gpu")
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="device is gpu:2, but the last GPU here is gpu:1"):
        check_device({"device": "cuda:2"})
    assert check_device({"device": "cuda:1", "fp16": True}) == "gpu:1"

    for sharding in ("", "stage2"):  # which one process has none of
        caplog.clear()
        args = FinetuneArguments(**settings(tmp_path, fp16=True, amp_master_grad=True, sharding=sharding))
        assert not args.amp_master_grad and "amp_master_grad is off" in caplog.text

    monkeypatch.setattr(FinetuneArguments, "_check_shards", lambda self: None)
    monkeypatch.setattr(arguments.TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(FinetuneArguments, "world_size", property(lambda self: 2))
    assert FinetuneArguments(**settings(tmp_path, device="gpu:0")).device == "gpu"  # or both would compute on the first


def test_training_is_the_default_unless_only_evaluation_is_asked(tmp_path):
    def made(**changes):
        args = FinetuneArguments(**settings(tmp_path, **changes))
        return args.do_train, args.do_eval

    assert made() == (True, False)
    assert made(evaluation_strategy="epoch") == (True, True)
    assert made(do_eval=True) == (False, True)
    assert made(do_eval=True, do_train=True) == (True, True)


def test_none_on_the_command_line_unsets_a_key(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**MINIMAL, "mm_projector_lr": 1e-4, "pretrain_mm_mlp_adapter": "p.bin"}))
    settings = read_settings([str(file), "--mm_projector_lr", "none", "--pretrain_mm_mlp_adapter=None"])
    assert not {"mm_projector_lr", "pretrain_mm_mlp_adapter"} & set(settings)
    assert read_settings([str(file), "--report_to", "none"])["report_to"] == ["none"]


def test_several_values_of_a_key_want_a_list(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(MINIMAL))
    with pytest.raises(
        UserError, match="B follows A; .* several values of --lora_target_modules are written as a JSON list"
    ):
        read_settings([str(file), "--lora_target_modules", "A", "B"])
