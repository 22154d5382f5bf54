"""A run that goes on from a checkpoint repeats the one that was never stopped, to the last bit."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddlenlp.trainer import TrainerCallback

from paddlemix.errors import UserError
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.callbacks import read_log
from paddlemix.trainer.freezing import named_model_parameters, select_trained
from paddlemix.trainer.run_folder import is_whole
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, samples, tiny_model

STEPS = 8  # of 4 rows; 10 rows make three steps an epoch, the last of two rows


def make_trainer(folder, lora=True, seed=0, callbacks=(), eval_rows=None, rows=None, unfreeze_tower=False, **changes):
    model = tiny_model(0 if lora else seed)
    if lora:
        paddle.seed(seed)
        model = add_lora(model, rank=2, dropout=0.2)
    select_trained(model, lora=lora, unfreeze_tower=unfreeze_tower)
    options = dict(
        output_dir=str(folder), device="cpu", max_steps=STEPS, learning_rate=3e-3, warmup_steps=2, weight_decay=0.01,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2, save_steps=100, neftune=True,
        report_to="none", disable_tqdm=True, lr_scheduler_type="cosine",
    )  # fmt: skip
    args = FinetuneArguments(**{**options, **changes})
    eval_dataset = Samples(eval_rows) if eval_rows else None
    return LlavaTrainer(model, args, Samples(rows or samples(10)), eval_dataset, callbacks=callbacks)


def weights(trainer):
    return {name: value.numpy() for name, value in named_model_parameters(trainer.model)}


def log_of(folder):
    kept = ("step", "epoch", "loss", "learning_rate", "eval_loss", "supervised_tokens")
    return [{key: entry[key] for key in kept if key in entry} for entry in read_log(Path(folder) / "train_log.jsonl")]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "full"])
def whole_run(request, tmp_path_factory):
    """A run with a checkpoint at every step."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, request.param, save_steps=1)
    trainer.train()
    return request.param, folder, weights(trainer), log_of(folder)


@pytest.mark.parametrize(
    "step", [1, 3, 4, 8], ids=["between logs", "at an epoch's end", "within an epoch", "at the end"]
)
def test_going_on_repeats_the_whole_run(whole_run, tmp_path, step):
    lora, folder, expected, log = whole_run
    # what a killed run leaves: its log, perhaps with lines after the checkpoint
    (tmp_path / "train_log.jsonl").write_text((folder / "train_log.jsonl").read_text() + '{"step": 9')
    trainer = make_trainer(tmp_path, lora, seed=5)  # other weights than those that it will load
    paddle.seed(1234)
    output = trainer.train(folder / f"checkpoint-{step}")
    assert trainer.state.global_step == STEPS and output.global_step == STEPS
    assert_same(weights(trainer), expected)
    assert log_of(tmp_path) == log


def test_a_checkpoint_holds_no_pickle(whole_run):
    names = {path.name for path in (whole_run[1] / "checkpoint-4").iterdir()}
    assert not any(name.endswith((".bin", ".pdparams", ".pdopt", ".pth", ".pkl")) for name in names)
    assert {"optimizer.safetensors", "trainer_state.json", "progress.json"} <= names


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    make_trainer(tmp_path, save_steps=2, save_total_limit=2).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


class SignalAt(TrainerCallback):
    """Sends this process a signal when a step begins."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_rest_follows(tmp_path, number):
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    first = make_trainer(tmp_path / "cut", callbacks=[SignalAt(number, 3)])
    first.train()
    assert first.interrupted and first.state.global_step == 3
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    assert is_whole(tmp_path / "cut" / "checkpoint-3")
    second = make_trainer(tmp_path / "cut")
    second.train(tmp_path / "cut" / "checkpoint-3")
    assert_same(weights(second), weights(whole))
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the handlers are gone again


def test_a_signal_at_the_last_step_lets_it_finish(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[SignalAt(signal.SIGTERM, STEPS)])
    trainer.train()
    assert not trainer.interrupted and trainer.state.global_step == STEPS


class SignalInEvaluation(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)  # the log comes right before the evaluation


def test_a_signal_during_evaluation_puts_it_off(tmp_path):
    options = dict(evaluation_strategy="steps", eval_steps=4, eval_rows=samples(3, seed=9))
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    first = make_trainer(tmp_path / "cut", callbacks=[SignalInEvaluation()], **options)
    first.train()
    assert first.interrupted and not any("eval_loss" in entry for entry in log_of(tmp_path / "cut"))
    second = make_trainer(tmp_path / "cut", **options)
    second.train(tmp_path / "cut" / "checkpoint-4")
    assert log_of(tmp_path / "cut") == log_of(tmp_path / "whole")
    assert_same(weights(second), weights(whole))


def test_the_best_checkpoint_is_loaded_at_the_end_and_kept(tmp_path):
    # a learning rate that spoils the model after its first steps
    trainer = make_trainer(
        tmp_path, lora=False, evaluation_strategy="steps", eval_steps=2, save_steps=2, save_total_limit=1,
        load_best_model_at_end=True, learning_rate=0.3, warmup_steps=7, max_grad_norm=0.0, eval_rows=samples(10),
        lr_scheduler_type="constant_with_warmup", neftune=False,
    )  # fmt: skip
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in log_of(tmp_path) if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best != STEPS, losses
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert (tmp_path / f"checkpoint-{best}").is_dir() and (tmp_path / f"checkpoint-{STEPS}").is_dir()
    np.testing.assert_allclose(trainer.evaluate()["eval_loss"], losses[best], rtol=1e-5)


BEST = dict(
    lora=False, evaluation_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, learning_rate=0.3,
    warmup_steps=7, max_grad_norm=0.0, lr_scheduler_type="constant_with_warmup", neftune=False,
)  # fmt: skip


def test_the_best_is_taken_where_a_run_goes_on_from_its_last_step_and_has_moved(tmp_path):
    options = {**BEST, "eval_rows": samples(10)}
    whole = make_trainer(tmp_path / "out", **options)
    whole.train()
    (tmp_path / "out").rename(tmp_path / "moved")
    for step in (STEPS, STEPS - 2):
        again = make_trainer(tmp_path / "moved", seed=5, save_total_limit=1, **options)
        again.train(tmp_path / "moved" / f"checkpoint-{step}")
        assert_same(weights(again), weights(whole))
        assert Path(again.state.best_model_checkpoint).parent == tmp_path / "moved"


def test_a_best_checkpoint_that_is_gone_is_told(tmp_path, caplog):
    options = {**BEST, "eval_rows": samples(10)}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    lost = whole.state.best_model_checkpoint
    shutil.rmtree(lost)
    again = make_trainer(tmp_path, **options)
    again.train(tmp_path / f"checkpoint-{STEPS}")
    assert f"{lost}, the best checkpoint so far, isn't there any more" in caplog.text
    assert again.state.best_model_checkpoint is None


class SignalAtEvaluation(TrainerCallback):
    """Sends SIGTERM after the last step, before its evaluation."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalAtBegin(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stopped_at", [4, STEPS])
def test_an_evaluation_may_be_put_off_twice(tmp_path, stopped_at):
    options = {**BEST, "eval_steps": 4, "save_steps": 4, "eval_rows": samples(10)}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    cut, first = tmp_path / "cut", SignalInEvaluation() if stopped_at == 4 else SignalAtEvaluation()
    assert make_trainer(cut, callbacks=[first], **options).train() and is_whole(cut / f"checkpoint-{stopped_at}")
    second = make_trainer(cut, callbacks=[SignalAtBegin()], **options)
    second.train(cut / f"checkpoint-{stopped_at}")
    assert second.interrupted and second.state.global_step == stopped_at
    third = make_trainer(cut, **options)
    third.train(cut / f"checkpoint-{stopped_at}")
    assert not third.interrupted
    assert_same(weights(third), weights(whole))
    assert third.state.best_metric == whole.state.best_metric


def test_a_signal_in_the_last_step_of_an_epoch_puts_its_evaluation_off(tmp_path):
    options = dict(evaluation_strategy="epoch", save_strategy="epoch", eval_rows=samples(3, seed=9))
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    first = make_trainer(tmp_path / "cut", callbacks=[SignalAt(signal.SIGTERM, 3)], **options)
    first.train()
    second = make_trainer(tmp_path / "cut", **options)
    second.train(tmp_path / "cut" / "checkpoint-3")
    evaluated = [entry for entry in log_of(tmp_path / "cut") if "eval_loss" in entry]
    assert evaluated == [entry for entry in log_of(tmp_path / "whole") if "eval_loss" in entry]


def test_an_unknown_metric_is_told(tmp_path):
    trainer = make_trainer(
        tmp_path, evaluation_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="bleu", eval_rows=samples(2),
    )  # fmt: skip
    with pytest.raises(UserError, match="bleu.*eval_loss"):
        trainer.train()


def test_a_checkpoint_without_optimizer(tmp_path):
    make_trainer(tmp_path / "a", save_steps=4, ignore_save_lr_and_optim=True).train()
    checkpoint = tmp_path / "a" / "checkpoint-4"
    with pytest.raises(UserError, match="ignore_load_lr_and_optim"):
        make_trainer(tmp_path / "b").train(checkpoint)
    trainer = make_trainer(tmp_path / "c", ignore_load_lr_and_optim=True, max_steps=2)
    trainer.train(checkpoint)
    assert trainer.state.global_step == 2  # from its weights, but from the first step


def test_a_checkpoint_of_another_adapter_is_refused(whole_run, tmp_path):
    lora, folder, *_ = whole_run
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path, lora=not lora).train(folder / "checkpoint-4")
    assert "\n" not in str(caught.value)


def test_parts_that_learn_later_begin_with_a_state_of_their_own(whole_run, tmp_path):
    lora, folder, *_ = whole_run
    trainer = make_trainer(tmp_path, lora, unfreeze_tower=True)
    before = weights(trainer)
    trainer.train(folder / "checkpoint-4")
    moved = [name for name, value in weights(trainer).items() if (value != before[name]).any()]
    assert trainer.state.global_step == STEPS and any("vision_tower" in name for name in moved)


def test_a_part_without_a_gradient_until_the_checkpoint_learns_after_it(tmp_path):
    make_trainer(tmp_path / "text", lora=False, rows=samples(10, text_only=1.0), save_steps=2, max_steps=2).train()
    trainer = make_trainer(tmp_path / "pictures", lora=False, rows=samples(10, text_only=0.0))
    before = weights(trainer)
    trainer.train(tmp_path / "text" / "checkpoint-2")
    moved = [name for name, value in weights(trainer).items() if (value != before[name]).any()]
    assert trainer.state.global_step == STEPS and any("mm_projector" in name for name in moved)


@pytest.mark.parametrize("release_grads", [False, True])
def test_a_part_that_few_batches_use_moves_alike_wherever_the_run_was_stopped(tmp_path, release_grads):
    rows = samples(9, text_only=1.0) + samples(1, text_only=0.0)
    options = dict(lora=False, rows=rows, per_device_train_batch_size=1, weight_decay=0.1)
    whole = make_trainer(tmp_path / "whole", save_steps=1, **options)
    whole.train()
    for step in range(1, STEPS):
        trainer = make_trainer(tmp_path / f"from {step}", release_grads=release_grads, **options)
        trainer.train(tmp_path / "whole" / f"checkpoint-{step}")
        assert_same(weights(trainer), weights(whole))


def test_a_checkpoint_beyond_the_steps_asked_for_is_told(whole_run, tmp_path, caplog):
    lora, folder, *_ = whole_run
    trainer = make_trainer(tmp_path, lora, max_steps=2)
    trainer.train(folder / "checkpoint-4")
    assert "Step 4, which the run goes on from, lies beyond the 2 steps" in caplog.text
    assert trainer.state.global_step == 4


def test_a_checkpoint_of_another_optimizer_is_refused(whole_run, tmp_path):
    lora, folder, *_ = whole_run
    with pytest.raises(UserError, match="moment2_0, but the optimizer of this run has.*ignore_load_lr_and_optim"):
        make_trainer(tmp_path, lora, optim="adamw_mini").train(folder / "checkpoint-4")


def test_progress_is_plain_json(whole_run):
    progress = json.loads((whole_run[1] / "checkpoint-3" / "progress.json").read_text())
    assert progress["last_logged_step"] == 2 and progress["loss_since_log"] > 0
