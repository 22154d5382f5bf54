"""What a run shows while it goes, and the plot at its end."""

import json

from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.callbacks import plot_loss, read_log
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, samples, tiny_model


def train(folder, **changes):
    model = tiny_model()
    select_trained(model)
    options = dict(
        output_dir=str(folder), device="cpu", max_steps=4, logging_steps=2, save_strategy="no", report_to="none",
        evaluation_strategy="steps", eval_steps=4,
    )  # fmt: skip
    LlavaTrainer(model, FinetuneArguments(**{**options, **changes}), Samples(samples(8)), Samples(samples(2))).train()


def test_a_bar_with_loss_and_time_left(tmp_path, capsys):
    train(tmp_path)
    shown = capsys.readouterr().err
    assert "training: 100%" in shown and "loss=4." in shown and "<00:00" in shown and "eval_loss" in shown


def test_lines_with_the_same_where_bars_are_disabled(tmp_path, caplog, capsys):
    with caplog.at_level("INFO", logger="paddlemix"):
        train(tmp_path, disable_tqdm=True)
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert lines[0].startswith("step 2/4: loss 4.") and lines[0].endswith(" s left") and "eval_loss" in lines[-1]
    assert "training:" not in capsys.readouterr().err


def test_the_plot(tmp_path):
    assert plot_loss(tmp_path) is None
    entries = [{"step": step, "loss": 5 / step} for step in range(1, 101)] + [{"step": 100, "eval_loss": 0.1}]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png" and 5_000 < path.stat().st_size < 200_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "train_log.jsonl"]


def test_half_a_line_at_the_end_of_a_log_is_passed_over(tmp_path):
    file = tmp_path / "train_log.jsonl"
    file.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(file) == [{"step": 1, "loss": 2.0}]
