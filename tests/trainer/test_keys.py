"""Keys of PaddleNLP's TrainingArguments that no other test looks at: each does what it says."""

import json

import numpy as np
import pytest

from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.callbacks import read_log
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, samples, tiny_model


def train(folder, **changes):
    model = tiny_model()
    select_trained(model)
    options = dict(
        output_dir=str(folder), device="cpu", max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    args = FinetuneArguments(**{**options, **changes})
    trainer = LlavaTrainer(model, args, Samples(samples(12)), Samples(samples(4, seed=3)))
    output = trainer.train()
    return trainer, output, read_log(folder / "train_log.jsonl")


def losses(log):
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return losses(train(tmp_path_factory.mktemp("plain"))[2])


def test_logging(tmp_path, plain):
    _, _, log = train(tmp_path / "a", logging_steps=4, logging_first_step=True)
    assert [entry["step"] for entry in log] == [1, 4]
    np.testing.assert_allclose(losses(log), [plain[0], np.mean(plain[1:4])], rtol=1e-6)
    _, output, log = train(tmp_path / "b", logging_strategy="epoch")
    assert [entry["step"] for entry in log] == [3, 6]
    np.testing.assert_allclose(output.training_loss, np.mean(plain), rtol=1e-5)


def test_saving_by_epoch(tmp_path):
    train(tmp_path, save_strategy="epoch", evaluation_strategy="epoch")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert [entry["step"] for entry in read_log(tmp_path / "train_log.jsonl") if "eval_loss" in entry] == [3, 6]


def test_epochs_and_steps(tmp_path):
    assert train(tmp_path / "a", max_steps=-1, num_train_epochs=1.5)[1].global_step == 4
    assert train(tmp_path / "b", max_steps=-1, num_train_epochs=1, dataloader_drop_last=True, per_device_train_batch_size=5)[1].global_step == 2  # fmt: skip


@pytest.mark.parametrize(
    "kind, rates",
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("constant_with_warmup", [0.5, 1, 1, 1, 1, 1]),
        ("cosine", [0.93301, 0.75, 0.5, 0.25, 0.06699, 0]),
        ("polynomial", [0.83335, 0.6667, 0.50005, 0.3334, 0.16675, 1e-4]),
    ],
)
def test_schedules(tmp_path, kind, rates):
    warmup = {"warmup_steps": 2} if kind == "constant_with_warmup" else {}
    log = train(tmp_path, lr_scheduler_type=kind, **warmup)[2]
    np.testing.assert_allclose([entry["learning_rate"] for entry in log], np.array(rates) * 1e-3, rtol=1e-3, atol=1e-9)


def test_optimizers(tmp_path, plain):
    ends = {"adamw": plain[-1]}
    for optimizer in ("adamw_mini", "adamw_custom", "adamw_16bit_moment"):
        ends[optimizer] = losses(train(tmp_path / optimizer, optim=optimizer)[2])[-1]
    assert all(np.isfinite(end) for end in ends.values())
    assert ends["adamw_mini"] != ends["adamw"]
    other = losses(train(tmp_path / "beta", adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)[2])
    assert other[0] == plain[0] and other[-1] != plain[-1]


def test_seed_is_the_order_of_the_data(tmp_path, plain):
    assert losses(train(tmp_path / "same", seed=42)[2]) == plain
    assert losses(train(tmp_path / "other", seed=7)[2]) != plain


def test_workers_read_the_same(tmp_path, plain):
    assert losses(train(tmp_path, dataloader_num_workers=2)[2]) == plain


@pytest.mark.parametrize("key", ["release_grads", "offload_optim"])
def test_savers_of_memory_change_nothing(tmp_path, plain, key):
    assert losses(train(tmp_path, **{key: True})[2]) == plain


def test_steps_can_be_left_out(tmp_path, plain):
    found = losses(train(tmp_path, skip_data_intervals=[[2, 3]])[2])
    assert found[0] == plain[0] and found[1:3] == [0.0, 0.0] and found[3] != plain[3]


def test_memory_and_metrics_are_reported(tmp_path):
    _, output, log = train(tmp_path, skip_memory_metrics=False, metrics_output_path=str(tmp_path / "metrics"))
    assert "train_mem_cpu_alloc_delta" in output.metrics and "cpu_mem_used" in log[-1]
    lines = (tmp_path / "metrics" / "metrics_rank0.json").read_text().splitlines()
    assert any("loss" in line for line in lines)


def test_tokens_are_counted(tmp_path, caplog):
    with caplog.at_level("INFO", logger="paddlemix"):
        train(tmp_path, count_trained_tokens=True, save_strategy="steps", save_steps=3, pad_token_id=0)
    assert "trained on" in caplog.text and "with padding" in caplog.text


def test_timers(tmp_path):
    trainer, *_ = train(tmp_path, skip_profile_timer=False)
    assert trainer.timers is not None


def test_visualdl_gets_the_losses(tmp_path):
    train(tmp_path, report_to=["visualdl"], logging_dir=str(tmp_path / "vdl"))
    (file,) = (tmp_path / "vdl").glob("vdlrecords.*")
    assert b"train/loss" in file.read_bytes()


def test_minimum_eval_times(tmp_path):
    log = train(tmp_path, max_steps=24, evaluation_strategy="steps", eval_steps=24, minimum_eval_times=2)[2]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [10, 20]


def test_ignoring_the_data_to_skip(tmp_path):
    train(tmp_path / "a", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"

    def go_on(name, **changes):
        model = tiny_model()
        select_trained(model)
        args = FinetuneArguments(
            output_dir=str(tmp_path / name), device="cpu", max_steps=3, per_device_train_batch_size=4,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, **changes,
        )  # fmt: skip
        LlavaTrainer(model, args, Samples(samples(12))).train(checkpoint)
        return read_log(tmp_path / name / "train_log.jsonl")[-1]["supervised_tokens"]

    log = {entry["step"]: entry["supervised_tokens"] for entry in read_log(tmp_path / "a" / "train_log.jsonl")}
    assert go_on("b") == log[3] and go_on("c", ignore_data_skip=True) == log[1] != log[3]


def test_an_accounts_key_is_never_written(tmp_path):
    train(tmp_path, report_to=["visualdl"], wandb_api_key="do-not-write-this", max_steps=1, save_strategy="steps", save_steps=1)  # fmt: skip
    assert not any(b"do-not-write-this" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_trainer_state_is_json(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=6)
    assert json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())["global_step"] == 6
