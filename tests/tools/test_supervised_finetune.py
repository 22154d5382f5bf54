"""Fine-tuning as a user runs it: a JSON file, a folder that comes out, and what happens when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from paddlemix.errors import UserError
from paddlemix.models.llava.chat import LlavaChat
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.tools.check_dataset import main as check_dataset
from paddlemix.tools.merge_lora_params import main as merge_main
from paddlemix.tools.supervised_finetune import main, run
from paddlemix.trainer.arguments import read_settings
from paddlemix.trainer.callbacks import read_log
from tests.checkpoints import write_original
from tests.trainer.test_arguments import TOOLKIT
from tests.trainer.tiny import colour_data, tiny_checkpoint

TOOL = Path(__file__).parents[2] / "paddlemix" / "tools" / "supervised_finetune.py"
STAGE2_ON_CPU = Path(__file__).with_name("stage2_on_cpu.py")
TWO_RANKS = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo"]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A tiny checkpoint and data for it."""
    folder = tmp_path_factory.mktemp("finetune")
    tiny_checkpoint(folder / "base")
    colour_data(folder / "data", 12)
    colour_data(folder / "data", 4, "eval.json")
    return folder


def configure(room, output, **changes):
    config = {
        "model_name_or_path": str(room / "base"),
        "dataset": {"train": [{"name": "chatml_dataset", "data_files": str(room / "data" / "train.json")}]},
        "output_dir": str(output),
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
        "report_to": "none",
        "do_train": True,
    }
    config.update(changes)
    config = {key: value for key, value in config.items() if value is not None}
    file = Path(output).with_name(Path(output).name + ".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(config))
    return str(file)


def with_eval(room):
    return {
        "train": [{"data_files": str(room / "data" / "train.json")}],
        "eval": [{"data_files": str(room / "data" / "eval.json")}],
    }


def answer(folder, room):
    """The folder opened in the chat, and what it says of a picture; and its logits."""
    model, processor = LlavaLlamaForCausalLM.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=6)
    text = "".join(chat.ask("Which colour?", image=str(room / "data" / "red.png")))
    batch = processor(text="USER: <image>\nWhich colour? ASSISTANT:", images=str(room / "data" / "red.png"))
    with paddle.no_grad():
        return text, model(**batch).logits.numpy()


@pytest.fixture(scope="module")
def lora_run(room):
    output = room / "runs" / "adapter"
    config = configure(
        room, output, lora=True, lora_rank=4, lora_dropout=0.0, mm_projector_lr=1e-3, image_aspect_ratio="pad",
        dataset=with_eval(room), evaluation_strategy="steps", eval_steps=2, eval_with_do_generation=True,
    )  # fmt: skip
    assert run([config]) == 0
    return output


def test_a_lora_run_leaves_what_was_asked_for(room, lora_run):
    names = {path.name for path in lora_run.iterdir()}
    assert names >= {
        "checkpoint-2", "checkpoint-4", "config.json", "lora_config.json", "lora_model_state.safetensors",
        "non_lora_state.safetensors", "tokenizer.json", "preprocessor_config.json", "train_log.jsonl", "loss.png",
        "eval_predictions-2.jsonl", "eval_predictions-4.jsonl", "train_results.json",
    }  # fmt: skip
    assert (lora_run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    adapter = load_file(lora_run / "lora_model_state.safetensors")
    assert len(adapter) == 28 and not any("vision_tower" in name for name in adapter)
    beside = load_file(lora_run / "non_lora_state.safetensors")
    base = load_file(room / "base" / "model.safetensors")
    assert set(beside) == {f"llama.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}
    assert all(np.abs(value - base[name]).max() > 0 for name, value in beside.items())
    recorded = json.loads((lora_run / "lora_config.json").read_text())
    assert recorded["base_model_name_or_path"] == str(room / "base") and recorded["r"] == 4
    assert json.loads((lora_run / "config.json").read_text())["image_aspect_ratio"] == "pad"


def test_paddlenlps_loramodel_opens_the_adapter(room, lora_run):
    """All of it but the projector that was trained beside, which is this project's own."""
    from paddlenlp.peft import LoRAModel

    base = LlavaLlamaForCausalLM.from_pretrained(room / "base")
    opened = dict(LoRAModel.from_pretrained(base, str(lora_run)).named_parameters())
    for name, values in load_file(lora_run / "lora_model_state.safetensors").items():
        np.testing.assert_array_equal(opened[f"model.{name}"].numpy(), values)


def test_every_metric_that_evaluation_gives_may_choose_the_best(room, lora_run, tmp_path):
    entry = next(entry for entry in read_log(lora_run / "train_log.jsonl") if "eval_loss" in entry)
    given = [name for name in entry if name.startswith("eval_") and "mem_" not in name]
    for name in given:
        config = configure(room, tmp_path / name, eval_with_do_generation=True, metric_for_best_model=name)
        assert read_settings([config])["metric_for_best_model"] == name
    assert {"eval_loss", "eval_token_accuracy", "eval_exact_match"} <= set(given)


def test_the_log_and_the_predictions(lora_run):
    log = read_log(lora_run / "train_log.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    evaluated = [entry for entry in log if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    assert all({"eval_token_accuracy", "eval_exact_match"} <= set(entry) for entry in evaluated)
    rows = [json.loads(line) for line in (lora_run / "eval_predictions-4.jsonl").read_text().splitlines()]
    assert {"row", "turn", "question", "answer", "reference", "exact_match"} <= set(rows[0])
    assert [(row["row"], row["turn"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (3, 1)]


def test_an_adapter_opens_unmerged_or_merged_whatever_its_name(room, lora_run, tmp_path, capsys):
    merged = tmp_path / "x"
    arguments = [
        "--model_name_or_path",
        str(room / "base"),
        "--lora_path",
        str(lora_run),
        "--merge_model_path",
        str(merged),
    ]
    assert merge_main(arguments) == 0
    shutil.copytree(lora_run, tmp_path / "7")
    shutil.copytree(lora_run / "checkpoint-4", tmp_path / "stage")
    expected, logits = answer(lora_run, room)
    for folder in (merged, tmp_path / "7", tmp_path / "stage"):
        text, found = answer(folder, room)
        assert text == expected
        np.testing.assert_allclose(found, logits, atol=1e-4)
    assert np.abs(answer(room / "base", room)[1] - logits).max() > 1e-2


def test_a_run_goes_on_from_an_adapter(room, lora_run, tmp_path):
    config = configure(room, tmp_path / "more", lora=True, lora_path=str(lora_run), max_steps=1, learning_rate=0.0)
    assert run([config]) == 0
    before = load_file(lora_run / "lora_model_state.safetensors")
    after = load_file(tmp_path / "more" / "lora_model_state.safetensors")
    assert all((after[name] == before[name]).all() for name in before)
    other = configure(room, tmp_path / "other", lora=True, lora_path=str(lora_run), lora_rank=16)
    with pytest.raises(UserError, match="lora_rank is 16, but the adapter"):
        run([other])


def test_a_run_that_goes_on_from_an_adapter_keeps_its_template_and_aspect_ratio(room, tmp_path, capsys):
    own = chat_template(tmp_path, "own.json", conversation=["Q: {{user}}\n", "A: {{bot}}</s>\n"])
    entry = {"data_files": str(room / "data" / "train.json")}
    named = dict(version="llava_v0", image_aspect_ratio="pad")
    filed = dict(dataset={"train": [{**entry, "chat_template": own}]}, image_aspect_ratio="pad")
    for name, options in (("named", named), ("filed", filed)):
        first, more = tmp_path / name, tmp_path / f"{name}-more"
        options = dict(lora=True, max_steps=1, save_strategy="no", **options)
        assert run([configure(room, first, **options)]) == 0
        assert run([configure(room, more, lora=True, lora_path=str(first), max_steps=1, save_strategy="no")]) == 0
        before, after = LlavaProcessor.from_pretrained(first), LlavaProcessor.from_pretrained(more)
        assert after.template == before.template != LlavaProcessor.from_pretrained(room / "base").template
        assert after.image_processor.image_aspect_ratio == after.config.image_aspect_ratio == "pad"
        assert check_dataset([configure(room, more, lora=True, lora_path=str(first)), "--show", "1"]) == 0
        shown = capsys.readouterr().out
        assert ("###Human:" if name == "named" else "Q: <image>") in shown
    twice = configure(room, tmp_path / "twice", lora=True, lora_path=str(first), model_name_or_path=str(first))
    with pytest.raises(UserError, match="applied twice"):
        run([twice])


def test_a_run_goes_on_from_an_adapter_of_paddlenlp(room, lora_run, tmp_path):
    """``lora_model_state.pdparams``, as LoRAModel.save_pretrained writes it."""
    shutil.copytree(lora_run, tmp_path / "old")
    state = load_file(tmp_path / "old" / "lora_model_state.safetensors")
    paddle.save({name: paddle.to_tensor(value) for name, value in state.items()}, str(tmp_path / "old" / "lora_model_state.pdparams"))  # fmt: skip
    (tmp_path / "old" / "lora_model_state.safetensors").unlink()
    config = configure(
        room, tmp_path / "more", lora=True, lora_path=str(tmp_path / "old"), max_steps=1, learning_rate=0.0
    )
    assert run([config]) == 0
    after = load_file(tmp_path / "more" / "lora_model_state.safetensors")
    assert after.keys() == state.keys() and all((after[name] == state[name]).all() for name in state)


def test_a_full_run_opens_and_has_learned(room, tmp_path):
    config = configure(
        room, tmp_path / "out", max_steps=30, save_steps=15, mixtoken=True, per_device_train_batch_size=2
    )
    assert run([config]) == 0
    log = read_log(tmp_path / "out" / "train_log.jsonl")
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    weights = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(room / "base" / "model.safetensors")
    moved = {name for name in base if np.abs(weights[name] - base[name]).max() > 0}
    assert moved == {name for name in base if "vision_tower" not in name}
    text, logits = answer(tmp_path / "out", room)
    again = answer(tmp_path / "out" / "checkpoint-30", room)
    assert again[0] == text and (again[1] == logits).all()


def test_the_projector_alone_with_the_plain_template_and_its_use(room, tmp_path):
    rows = [{"image": f"{name}.png", "conversations": [["<image>", f"a {name} wall"]]} for name in ("red", "blue")]
    captions = room / "data" / "captions.json"
    captions.write_text(json.dumps(rows))
    plain = configure(
        room, tmp_path / "plain", tune_mm_mlp_adapter=True, version="plain", per_device_train_batch_size=2,
        dataset={"train": [{"data_files": str(captions)}]},
    )  # fmt: skip
    assert run([plain]) == 0
    aligned, base = load_file(tmp_path / "plain" / "model.safetensors"), load_file(room / "base" / "model.safetensors")
    moved = {name for name in base if np.abs(aligned[name] - base[name]).max() > 0}
    assert moved == {name for name in base if "mm_projector" in name}
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["conversation_template"] == "plain"

    config = configure(
        room,
        tmp_path / "tuned",
        pretrain_mm_mlp_adapter=str(tmp_path / "plain"),
        freeze_mm_mlp_adapter=True,
        max_steps=1,
    )
    assert run([config]) == 0
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    assert all((tuned[name] == aligned[name]).all() for name in moved)
    assert np.abs(tuned["lm_head.weight"] - base["lm_head.weight"]).max() > 0


def test_evaluation_alone_and_predictions(room, tmp_path):
    config = configure(
        room, tmp_path / "eval", dataset=with_eval(room), do_train=False, do_eval=True, do_predict=True,
        eval_accumulation_steps=1, per_device_eval_batch_size=2,
    )  # fmt: skip
    assert run([config]) == 0
    results = json.loads((tmp_path / "eval" / "eval_results.json").read_text())
    assert results["eval_loss"] > 0 and 0 <= results["eval_token_accuracy"] <= 1
    assert len((tmp_path / "eval" / "predictions-0.jsonl").read_text().splitlines()) == 6
    assert not (tmp_path / "eval" / "model.safetensors").exists()
    whole = configure(
        room, tmp_path / "whole", dataset=with_eval(room), do_train=False, do_eval=True, per_device_eval_batch_size=4
    )
    assert run([whole]) == 0
    same = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    np.testing.assert_allclose(same["eval_loss"], results["eval_loss"], rtol=1e-5)


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({"evaluation_strategy": "no"}, [4]),
        ({}, [1, 2, 3, 4]),
        ({"eval_steps": 2}, [2, 4]),
        ({"evaluation_strategy": "steps", "eval_steps": 3}, [3, 4]),
    ],
    ids=["no", "not said", "eval_steps", "steps"],
)
def test_when_the_eval_data_are_looked_at_and_what_is_left_of_it(room, tmp_path, changes, steps):
    config = configure(room, tmp_path / "out", dataset=with_eval(room), do_eval=True, save_strategy="no", **changes)
    assert run([config]) == 0
    evaluated = [entry for entry in read_log(tmp_path / "out" / "train_log.jsonl") if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == steps
    results = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert results["eval_loss"] == evaluated[-1]["eval_loss"]


def test_answers_behind_the_cut_are_told_and_not_asked_for(room, tmp_path, caplog):
    rounds = [[f"Question number {n}?", f"answer {n}"] for n in range(20)]
    (tmp_path / "long.json").write_text(json.dumps([{"conversations": rounds}]))
    dataset = {"train": with_eval(room)["train"], "eval": [{"data_files": str(tmp_path / "long.json")}]}
    options = dict(dataset=dataset, max_length=400, do_train=False, do_predict=True, max_new_tokens=1)
    with caplog.at_level("INFO", logger="paddlemix"):
        assert run([configure(room, tmp_path / "out", **options)]) == 0
    asked = len((tmp_path / "out" / "predictions-0.jsonl").read_text().splitlines())
    assert asked < 20 and caplog.text.count(f"{20 - asked} answers of the eval data lie behind the cut") == 1
    (tmp_path / "long.json").write_text(json.dumps([{"conversations": [["Question?", " "]]}]))
    with pytest.raises(UserError, match="no answers to compare with"):
        run([configure(room, tmp_path / "none", **options)])
    assert not (tmp_path / "none").exists()


def test_the_projectors_rate_goes_with_what_is_trained_of_it(room, tmp_path):
    config = configure(
        room, tmp_path / "out", freeze_mm_mlp_adapter=True, freeze_exclude=["llama.mm_projector.2.*"],
        mm_projector_lr=1e-3, learning_rate=1e-9, max_steps=1, save_strategy="no",
    )  # fmt: skip
    assert run([config]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (room / "base", tmp_path / "out"))
    moved = {name for name in before if np.abs(after[name] - before[name]).max() > 1e-4}
    assert moved == {"llama.mm_projector.2.weight", "llama.mm_projector.2.bias"}


def test_benchmark_reports_and_saves_nothing(room, tmp_path, caplog):
    config = configure(room, tmp_path / "out", benchmark=True, save_strategy="no", max_steps=2)
    with caplog.at_level("INFO", logger="paddlemix"):
        assert run([config]) == 0
    assert "Supervised tokens per second" in caplog.text and "Peak memory" in caplog.text
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_benchmark_counts_the_samples(room, tmp_path, monkeypatch, packed):
    """12 rows in batches of 5, the last of which is short; or in packs of several."""
    from paddlemix.tools import supervised_finetune

    counted = []
    benchmark = supervised_finetune.benchmark
    monkeypatch.setattr(
        supervised_finetune,
        "benchmark",
        lambda trainer, metrics: (counted.append(trainer.trained_samples), benchmark(trainer, metrics)),
    )
    config = configure(
        room, tmp_path / "out", benchmark=True, save_strategy="no", max_steps=-1, num_train_epochs=1,
        per_device_train_batch_size=1 if packed else 5, mixtoken=packed,
    )  # fmt: skip
    assert run([config]) == 0
    assert counted == [12]


def test_an_adapter_that_was_merged_in_place_and_trained_on_is_what_opens(room, tmp_path):
    out = tmp_path / "out"
    assert run([configure(room, out, lora=True, max_steps=1, save_steps=1)]) == 0
    assert merge_main(["--lora_path", str(out)]) == 0 and (out / "model.safetensors").exists()
    merged = answer(out, room)[1]
    config = configure(room, out, lora=True, max_steps=3, save_steps=1, resume_from_checkpoint=True)
    assert run([config]) == 0
    assert not (out / "model.safetensors").exists()
    assert np.abs(answer(out, room)[1] - merged).max() > 1e-4


def test_a_merge_into_no_folder_is_one_sentence(room, tmp_path, capsys, lora_run):
    (tmp_path / "file").write_text("")
    assert merge_main(["--lora_path", str(lora_run), "--merge_model_path", str(tmp_path / "file" / "sub")]) == 1
    assert f"nothing can be written to {tmp_path / 'file'}" in capsys.readouterr().err


def test_a_merge_into_what_training_still_needs_is_refused(room, tmp_path, capsys, lora_run, trained):
    before = contents(lora_run), contents(trained / "full")
    assert merge_main(["--lora_path", str(lora_run / "checkpoint-2")]) == 1
    assert "training goes on from" in capsys.readouterr().err
    assert merge_main(["--lora_path", str(lora_run), "--merge_model_path", str(trained / "full")]) == 1
    assert "holds a training run" in capsys.readouterr().err
    assert (contents(lora_run), contents(trained / "full")) == before
    assert merge_main(["--lora_path", str(lora_run / "checkpoint-2"), "--merge_model_path", str(tmp_path / "m")]) == 0


def test_no_best_model_without_evaluation(room, tmp_path):
    with pytest.raises(UserError, match="load_best_model_at_end is true, but do_eval is false"):
        run([configure(
            room, tmp_path / "out", dataset=with_eval(room), load_best_model_at_end=True, do_eval=False,
            evaluation_strategy="epoch", save_strategy="epoch",
        )])  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"save_strategy": "no"},
        {},
        {"do_eval": True, "evaluation_strategy": "no", "save_strategy": "no"},
        {"evaluation_strategy": "epoch", "save_strategy": "steps"},
    ],
)
def test_the_best_is_looked_for_among_checkpoints_that_are_evaluated(room, tmp_path, changes):
    config = configure(room, tmp_path / "out", dataset=with_eval(room), load_best_model_at_end=True, **changes)
    with pytest.raises(UserError, match="set evaluation_strategy and save_strategy both"):
        run([config])
    assert not (tmp_path / "out").exists()


def test_patterns_of_the_toolkit_leave_adapters_to_be_trained(room, tmp_path):
    frozen = {key: TOOLKIT[key] for key in ("freeze_include", "freeze_exclude")}
    assert run([configure(room, tmp_path / "out", lora=True, max_steps=2, **frozen)]) == 0
    adapter = load_file(tmp_path / "out" / "lora_model_state.safetensors")
    assert all(np.abs(values).max() > 0 for name, values in adapter.items())


def test_the_projector_of_an_adapters_folder_begins_another_run(room, lora_run, tmp_path):
    config = configure(
        room, tmp_path / "out", pretrain_mm_mlp_adapter=str(lora_run), max_steps=1, learning_rate=0.0, weight_decay=0.0
    )
    assert run([config]) == 0
    made = load_file(tmp_path / "out" / "model.safetensors")
    beside = load_file(lora_run / "non_lora_state.safetensors")
    assert all((made[name] == values).all() for name, values in beside.items())


def test_learning_rates_of_nothing(room, tmp_path):
    assert run([configure(room, tmp_path / "out", learning_rate=0.0, mm_projector_lr=0.0, max_steps=1)]) == 0


def test_it_says_what_it_will_do(room, tmp_path, caplog):
    with caplog.at_level("INFO", logger="paddlemix"):
        run([configure(room, tmp_path / "out", max_steps=1, lora=True)])
    text = caplog.text
    assert "vision tower" in text and "LoRA adapters" in text and "supervised tokens" in text
    assert "weights" in text and "gradients" in text and "optimizer" in text and "activations" in text


def test_a_finished_run_is_not_trained_again(room, tmp_path, caplog):
    config = configure(room, tmp_path / "out", max_steps=1)
    assert run([config]) == 0
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level("INFO", logger="paddlemix"):
        assert run([config]) == 0
    assert "is complete" in caplog.text and (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert run([config, "--overwrite_output_dir"]) == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns > before


def test_a_resumption_that_fails_leaves_the_run_to_its_own_command(room, tmp_path, capsys):
    config = configure(room, tmp_path / "out", max_steps=2, save_steps=2, overwrite_output_dir=True)
    assert run([config]) == 0
    before = contents(tmp_path / "out")
    assert main([config, "--max_steps", "4", "--resume_from_checkpoint", "true", "--optim", "adamw_mini"]) == 1
    assert "optim" in capsys.readouterr().err
    after = contents(tmp_path / "out")
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert run([config, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert [entry["step"] for entry in read_log(tmp_path / "out" / "train_log.jsonl") if "loss" in entry] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lora_rank": 8}, "lora_rank is 8, but the run was begun with 4"),
        ({"lora_alpha": 256}, "lora_alpha is 256, but the run was begun with 16"),
        ({"rslora": True}, "rslora is True, but the run was begun with False"),
        ({"lora_target_modules": ["llama.layers.*q_proj"]}, "lora_target_modules is"),
        ({"optim": "adamw_mini"}, "optim"),
        ({"lora": None, "lora_rank": None}, "checkpoint-1"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_can_not_be_gone_on_with_costs_nothing(room, tmp_path, capsys, changes, words, elsewhere):
    """Neither the later checkpoints nor, with overwrite_output_dir, the other run in the folder."""
    options = dict(lora=True, lora_rank=4, max_steps=3, save_steps=1)
    assert run([configure(room, tmp_path / "out", **options)]) == 0
    output = tmp_path / "other" if elsewhere else tmp_path / "out"
    if elsewhere:
        assert run([configure(room, output, **{**options, "max_steps": 1, "seed": 5})]) == 0
    before = contents(output)
    changes = {**options, **changes, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    assert main([configure(room, output, overwrite_output_dir=elsewhere, **changes)]) == 1
    assert words in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.parametrize("changes", [{"lora_alpha": 256}, {"rslora": True}])
def test_an_unfinished_run_with_an_adapter_of_another_scale_is_another(room, tmp_path, capsys, changes):
    options = dict(lora=True, max_steps=2, save_steps=1)
    assert run([configure(room, tmp_path / "out", **options)]) == 0
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({**recorded, "status": "running"}))
    assert main([configure(room, tmp_path / "out", **options, **changes)]) == 1
    assert f"{next(iter(changes))} is" in capsys.readouterr().err


def test_a_finished_run_whose_model_is_gone_is_not_called_complete(room, tmp_path):
    config = configure(room, tmp_path / "out", max_steps=2, save_steps=2)
    assert run([config]) == 0
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / "model.safetensors").unlink()
    assert run([config]) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_the_best_model_keeps_its_own_figures_and_answers(room, tmp_path):
    options = dict(
        dataset=with_eval(room), evaluation_strategy="steps", eval_steps=1, save_steps=1, max_steps=3, do_eval=True,
        eval_with_do_generation=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    kept = {}
    for name in ("last", "best"):
        assert run([configure(room, tmp_path / name, load_best_model_at_end=name == "best", **options)]) == 0
        log = [(e["step"], e["eval_loss"]) for e in read_log(tmp_path / name / "train_log.jsonl") if "eval_loss" in e]
        answers = {file.name: file.read_bytes() for file in (tmp_path / name).glob("eval_predictions-*.jsonl")}
        kept[name] = log, answers, json.loads((tmp_path / name / "eval_results.json").read_text())["eval_loss"]
    assert kept["last"][:2] == kept["best"][:2] and len(kept["best"][0]) == 3
    losses = [loss for _, loss in kept["best"][0]]
    assert kept["best"][2] == max(losses) != losses[-1] == kept["last"][2]


def contents(folder):
    """Every file of a folder, with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_what_trains_nothing_leaves_the_trained_model_as_it_is(room, tmp_path, lora, capsys):
    """The toolkit's files have ``overwrite_output_dir: true``, and are run again with do_train switched off."""
    output = tmp_path / "out"
    config = configure(
        room, output, lora=lora, dataset=with_eval(room), max_steps=2, save_steps=1, overwrite_output_dir=True
    )
    assert run([config]) == 0
    before = contents(output)
    assert main([config, "--do_train", "false", "--do_eval", "true", "--overwrite_output_dir", "false"]) == 1
    assert "holds a training run" in capsys.readouterr().err
    assert main([config, "--benchmark"]) == 1
    assert "benchmark" in capsys.readouterr().err
    assert contents(output) == before
    evaluate = ["--do_train", "false", "--do_eval", "true", "--do_predict", "true", "--lora", "false"]
    assert main([config, *evaluate]) == 0
    assert main([config, *evaluate, "--model_name_or_path", str(output)]) == 0
    after = contents(output)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"eval_results.json", "predict_results.json", "predictions-0.jsonl"}


def test_a_killed_run_goes_on_after_an_evaluation_in_its_folder(room, tmp_path, capsys, caplog):
    output = tmp_path / "out"
    config = configure(room, output, dataset=with_eval(room), max_steps=4, save_steps=2)
    assert run([config, "--max_steps", "2"]) == 0
    record = json.loads((output / "run.json").read_text())
    record["settings"]["max_steps"] = 4
    (output / "run.json").write_text(json.dumps({**record, "status": "running"}))
    assert main([config, "--do_train", "false", "--do_eval", "true"]) == 1
    assert "holds a training run" in capsys.readouterr().err
    assert main([config, "--do_train", "false", "--do_eval", "true", "--overwrite_output_dir"]) == 0
    with caplog.at_level("INFO", logger="paddlemix"):
        assert main([config]) == 0
    assert "Going on from" in caplog.text
    assert [entry["step"] for entry in read_log(output / "train_log.jsonl")] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def trained(room):
    """A full run and an adapter on its result, with a checkpoint each; copied before use."""
    folder = room / "runs" / "trained"
    assert run([configure(room, folder / "full", max_steps=2, save_steps=1)]) == 0
    base = str(folder / "full" / "checkpoint-1")
    adapter = configure(room, folder / "adapter", model_name_or_path=base, lora=True, max_steps=1, save_steps=1)
    assert run([adapter]) == 0
    return folder


@pytest.mark.parametrize(
    "output, changes",
    [
        ("full", {"model_name_or_path": "full"}),
        ("full", {"model_name_or_path": "full", "resume_from_checkpoint": False}),
        ("full", {"model_name_or_path": "full", "lora": True}),
        ("full", {"model_name_or_path": "full", "lora": True, "resume_from_checkpoint": "adapter/checkpoint-1"}),
        ("full", {"model_name_or_path": "full/checkpoint-1"}),
        ("full", {"model_name_or_path": "full/checkpoint-1", "lora": True}),
        ("full", {"model_name_or_path": "adapter"}),
        ("full", {"pretrain_mm_mlp_adapter": "full"}),
        ("full", {"pretrain_mm_mlp_adapter": "full/model.safetensors"}),
        ("adapter", {"model_name_or_path": "full", "lora": True, "lora_path": "adapter"}),
        ("adapter", {"model_name_or_path": "full", "lora": True, "lora_path": "adapter/checkpoint-1"}),
    ],
)
def test_training_removes_nothing_that_it_is_made_from(room, trained, tmp_path, capsys, output, changes):
    copy = tmp_path / "trained"
    shutil.copytree(trained, copy)
    recorded = copy / "adapter" / "lora_config.json"
    recorded.write_text(recorded.read_text().replace(str(trained), str(copy)))
    paths = {key: str(copy / value) if isinstance(value, str) else value for key, value in changes.items()}
    before = contents(copy)
    config = configure(room, tmp_path / "config", **paths, overwrite_output_dir=True, max_steps=1)
    assert main([config, "--output_dir", str(copy / output)]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "would remove or replace" in message and any(key in message for key in changes), message
    assert contents(copy) == before


def test_a_tower_that_is_read_is_neither_trained_nor_merged_over(room, tmp_path, capsys):
    tower, base = tmp_path / "clip", tmp_path / "base"
    write_original(base, tower=tower)
    before = contents(tower)
    config = configure(room, tmp_path / "config", model_name_or_path=str(base), max_steps=1)
    assert main([config, "--output_dir", str(tower), "--overwrite_output_dir", "true"]) == 1
    assert f"would remove or replace {tower}" in capsys.readouterr().err
    assert run([configure(room, tmp_path / "adapter", model_name_or_path=str(base), lora=True, max_steps=1)]) == 0
    assert merge_main(["--lora_path", str(tmp_path / "adapter"), "--merge_model_path", str(tower)]) == 1
    assert f"{tower}, which the base is read from" in capsys.readouterr().err
    assert contents(tower) == before


def test_going_on_in_the_folder_that_the_weights_are_named_from(room, trained, tmp_path):
    full, adapter = tmp_path / "full", tmp_path / "adapter"
    shutil.copytree(trained / "full", full)
    shutil.copytree(trained / "adapter", adapter)
    again = {"resume_from_checkpoint": True, "save_steps": 1}
    for model in (full, full / "checkpoint-1"):
        steps = 3 if model == full else 4
        config = configure(room, tmp_path / "a", model_name_or_path=str(model), max_steps=steps, **again)
        assert run([config, "--output_dir", str(full)]) == 0
        assert (full / f"checkpoint-{steps}").is_dir()
    base = str(trained / "full" / "checkpoint-1")
    config = configure(
        room, tmp_path / "b", model_name_or_path=base, lora=True, lora_path=str(adapter), max_steps=2, **again
    )
    assert run([config, "--output_dir", str(adapter)]) == 0
    assert (adapter / "checkpoint-2").is_dir() and answer(adapter, room)[1].shape[-1] == 264


def test_a_benchmark_that_is_repeated_leaves_the_model_in_its_folder(room, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(room / "base", output)
    config = configure(
        room,
        output,
        model_name_or_path=str(output),
        benchmark=True,
        max_steps=2,
        save_steps=1,
        overwrite_output_dir=True,
    )
    before = contents(output)
    assert run([config]) == 0 and run([config]) == 0
    after = contents(output)
    assert {name: after[name] for name in before} == before and not list(output.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"learning_rates": 1.0}, ["learning_rates", "learning_rate"]),
        ({"lora_rank": "four"}, ["lora_rank", "whole number"]),
        ({"model_name_or_path": "no/such/folder"}, ["no/such/folder"]),
        ({"dataset": {"train": [{"data_files": "gone.json"}]}}, ["gone.json", "doesn't exist"]),
        ({"dataset": {"eval": []}}, ["dataset has no train entry"]),
        ({"dataset": {"trian": []}}, ["trian", "train"]),
        ({"do_eval": True}, ["dataset has no eval entry"]),
        ({"lora": True, "lora_target_modules": ["llama.layers.*wq"]}, ["llama.layers.*wq", "matches no layer"]),
        ({"max_length": 40}, ["max_length 40"]),
        ({"version": "vicuna_v9"}, ["version", "vicuna_v9", "vicuna_v1"]),
        ({"image_aspect_ratio": "wide"}, ["image_aspect_ratio", "wide"]),
        ({"freeze_include": ["*"]}, ["nothing is left to train"]),
        ({"freeze_mm_mlp_adapter": True, "mm_projector_lr": 1e-4}, ["mm_projector_lr", "freeze_mm_mlp_adapter"]),
        (
            {"freeze_include": ["*tower*"], "unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-4},
            ["mm_vision_tower_lr", "freeze_include"],
        ),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, ["dataloader_drop_last", "64"]),
        ({"max_steps": -1, "num_train_epochs": 0.001}, ["num_train_epochs", "0.001", "max_steps"]),
        ({"tensor_parallel_degree": 2}, ["tensor_parallel_degree", "sharding"]),
        ({"fp16": True, "device": "cpu"}, ["fp16", "bf16"]),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end"]),
        ({"load_best_model_at_end": True, "do_eval": True, "evaluation_strategy": "no"}, ["load_best_model_at_end"]),
        ({"pretrain_mm_mlp_adapter": "gone.bin"}, ["gone.bin"]),
        ({"resume_from_checkpoint": True}, ["no whole checkpoint"]),
        ({"resume_from_checkpoint": ""}, ["resume_from_checkpoint", "empty text"]),
        (
            {"eval_with_do_generation": True, "prediction_loss_only": True},
            ["eval_with_do_generation", "prediction_loss_only"],
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(room, tmp_path, capsys, changes, words):
    config = configure(room, tmp_path / "out", **changes)
    assert main([config]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[]", '[{"conversations": []}]', "not json"])
def test_data_without_rows(room, tmp_path, capsys, content):
    data = tmp_path / "train.json"
    data.write_text(content)
    assert main([configure(room, tmp_path / "out", dataset={"train": [{"data_files": str(data)}]})]) == 1
    assert "train.json" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes", [{"tune_mm_mlp_adapter": True}, {"freeze_include": ["*layers*", "*embed*", "*head*", "llama.norm*"]}]
)
def test_training_what_only_pictures_reach_without_pictures_is_refused(room, tmp_path, capsys, changes):
    data = tmp_path / "text.json"
    data.write_text(json.dumps([{"conversations": [["Hi", "Hello"]]}] * 4))
    config = configure(room, tmp_path / "out", dataset={"train": [{"data_files": str(data)}]}, **changes)
    assert main([config]) == 1
    assert "no sample of the training data has a picture" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("image", ["s3://bucket/a.png", "file:///a.png", "empty.png", "a\0.png", "a\ud83d.png"])
def test_a_picture_that_can_not_be_one_is_told_before_training(room, tmp_path, capsys, image):
    data = tmp_path / "train.json"
    (tmp_path / "empty.png").touch()
    rows = [{"conversations": [["Hi", "Hello"]]}] * 8 + [{"image": image, "conversations": [["<image>\nWhat?", "A"]]}]
    data.write_text(json.dumps(rows))
    assert main([configure(room, tmp_path / "out", dataset={"train": [{"data_files": str(data)}]})]) == 1
    error = capsys.readouterr().err
    assert "train.json:1 (row 9)" in error and not (tmp_path / "out").exists()


def test_going_on_tells_other_data_only_where_they_are(room, tmp_path, caplog):
    shutil.copytree(room / "data", tmp_path / "data")
    data = {"train": [{"data_files": str(tmp_path / "data" / "train.json")}]}
    config = configure(room, tmp_path / "out", max_steps=1, save_steps=1, dataset=data)
    assert run([config]) == 0
    assert run([config, "--max_steps", "2", "--resume_from_checkpoint", "true"]) == 0
    assert "other settings" in caplog.text and "other data" not in caplog.text
    rows = json.loads((tmp_path / "data" / "train.json").read_text())
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows[::-1]))
    assert run([config, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert "Going on with other data" in caplog.text


def test_what_changes_nothing_is_told(room, tmp_path, caplog):
    own = {"conversation": ["Q: {{user}}\n", "A: {{bot}}</s>\n"]}
    entry = {
        "data_files": str(room / "data" / "train.json"),
        "chat_template": chat_template(tmp_path / "templates", "own.json", **own),
    }
    options = dict(max_steps=1, version="llava_v0")
    assert run([configure(room, tmp_path / "out", dataset={"train": [entry]}, **options)]) == 0
    assert "version changes nothing" in caplog.text
    caplog.clear()
    other = {
        **entry,
        "chat_template": chat_template(tmp_path / "templates", "b.json", **{**own, "system": "Be brief. "}),
    }
    run([configure(room, tmp_path / "two", dataset={"train": [entry, other]}, max_steps=1, version="llava_v0")])
    assert "the chat will use llava_v0" in caplog.text and "version changes nothing" not in caplog.text
    caplog.clear()
    run([configure(room, tmp_path / "answers", max_steps=1, eval_with_do_generation=True)])
    assert "eval_with_do_generation is true, but nothing is evaluated" in caplog.text


def test_a_missing_picture_is_told_before_training(room, tmp_path, capsys):
    data = tmp_path / "train.json"
    data.write_text(json.dumps([{"image": "gone.png", "conversations": [["<image>\nWhat?", "Nothing."]]}]))
    assert main([configure(room, tmp_path / "out", dataset={"train": [{"data_files": str(data)}]})]) == 1
    error = capsys.readouterr().err
    assert "train.json:1" in error and "gone.png" in error and not (tmp_path / "out").exists()


def cut_short(picture):
    """The file's beginning, which tells the picture's size but doesn't hold all of it."""
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) - 40])
    return whole


def bad_row(room, folder, rows, number):
    """Data of which one row has a picture of its own, and that picture."""
    shutil.copytree(room / "data", folder)
    listed = json.loads((folder / "train.json").read_text())[:rows]
    listed[number] = {"image": "own.png", "conversations": [["<image>\nWhich colour?", "red"]]}
    (folder / "train.json").write_text(json.dumps(listed))
    shutil.copyfile(folder / "red.png", folder / "own.png")
    return folder / "own.png"


def test_a_picture_that_turns_out_broken_loses_no_step(room, tmp_path, capsys):
    picture = bad_row(room, tmp_path / "data", 8, 1)
    options = dict(per_device_train_batch_size=1, max_steps=8, save_strategy="no", lora=True)
    options["dataset"] = {"train": [{"data_files": str(tmp_path / "data" / "train.json")}]}
    assert run([configure(room, tmp_path / "whole", **options)]) == 0
    config = configure(room, tmp_path / "cut", **options)
    whole = cut_short(picture)
    assert main([config]) == 1
    assert "own.png" in capsys.readouterr().err.splitlines()[-1]
    done = [entry["step"] for entry in read_log(tmp_path / "cut" / "train_log.jsonl")]
    assert 1 <= done[-1] < 8 and (tmp_path / "cut" / f"checkpoint-{done[-1]}" / "checkpoint_complete.json").exists()
    picture.write_bytes(whole)
    assert main([config]) == 0
    log, weights = outcome(tmp_path / "cut")
    expected_log, expected = outcome(tmp_path / "whole")
    assert log == expected_log
    for file, tensors in expected.items():
        assert all((weights[file][name] == value).all() for name, value in tensors.items())


@pytest.mark.parametrize("every", [2, 100], ids=["while training", "after it"])
def test_a_broken_picture_of_the_evaluation_loses_no_step(room, tmp_path, capsys, every):
    picture = bad_row(room, tmp_path / "data", 4, 1)
    data = with_eval(room)
    data["eval"] = [{"data_files": str(tmp_path / "data" / "train.json")}]
    config = configure(
        room,
        tmp_path / "out",
        dataset=data,
        save_strategy="no",
        do_eval=True,
        evaluation_strategy="steps",
        eval_steps=every,
    )
    whole = cut_short(picture)
    assert main([config]) == 1
    assert "own.png" in capsys.readouterr().err.splitlines()[-1]
    if every > 4:
        assert answer(tmp_path / "out", room)[1].shape[-1] == 264
        return
    assert (tmp_path / "out" / "checkpoint-2" / "checkpoint_complete.json").exists()
    picture.write_bytes(whole)
    assert main([config]) == 0
    log = read_log(tmp_path / "out" / "train_log.jsonl")
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]


# as processes


def environment():
    return {**os.environ, "FLAGS_paddle_num_threads": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def start(config, launcher=(), tool=TOOL, **options):
    command = [sys.executable, *launcher, str(tool), config]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=subprocess.STDOUT, text=True, **options)


def train_on_two_ranks(config, logs, tool):
    process = start(config, launcher=[*TWO_RANKS, "--log_dir", str(logs)], tool=tool)
    text, _ = process.communicate(timeout=240)
    text += "".join(path.read_text(errors="replace") for path in logs.glob("workerlog.*"))
    assert process.returncode == 0, text


def wait_until(process, happened, seconds=120):
    """Polls as fast as it can; True if it happened while the process ran."""
    end = time.time() + seconds
    while process.poll() is None and time.time() < end:
        if happened():
            return True
    return False


def outcome(folder, losses=("step", "loss", "supervised_tokens")):
    log = [{key: entry[key] for key in losses} for entry in read_log(folder / "train_log.jsonl")]
    return log, {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def test_killed_while_saving_and_between_it_ends_like_a_run_that_was_not(room, tmp_path):
    options = dict(
        lora=True, lora_dropout=0.1, neftune=True, max_steps=12, save_steps=2, gradient_accumulation_steps=2,
        per_device_train_batch_size=2, overwrite_output_dir=True, save_total_limit=2,
    )  # fmt: skip
    assert run([configure(room, tmp_path / "whole", **options)]) == 0
    output, config = tmp_path / "cut", configure(room, tmp_path / "cut", **options)

    process = start(config)
    # while it is written, which takes milliseconds, or a moment later
    assert wait_until(process, lambda: any(output.glob("*checkpoint-4"))), process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = list(output.glob("checkpoint-*"))
    assert whole and all((folder / "checkpoint_complete.json").exists() for folder in whole)

    process = start(config)
    reached = lambda: any(entry["step"] >= 7 for entry in read_log(output / "train_log.jsonl"))  # noqa: E731
    assert wait_until(process, reached), process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "lora_model_state.safetensors").exists()

    process = start(config)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "Going on from" in text, text
    log, weights = outcome(output)
    expected_log, expected = outcome(tmp_path / "whole")
    assert log == expected_log and weights.keys() == expected.keys()
    for file, tensors in expected.items():
        for name, value in tensors.items():
            np.testing.assert_array_equal(weights[file][name], value, err_msg=name)


def test_sigterm_saves_first(room, tmp_path):
    """To the whole process group, as batch systems send it: the processes that read the data get it too."""
    config = configure(room, tmp_path / "out", max_steps=500, save_steps=400, dataloader_num_workers=2)
    process = start(config, start_new_session=True)
    log = tmp_path / "out" / "train_log.jsonl"
    assert wait_until(process, lambda: len(read_log(log)) > 2), process.stdout.read()
    os.killpg(process.pid, signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in text, text
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "checkpoint_complete.json").exists()
    assert answer(checkpoint, room)[1].shape[-1] == 264


def test_ranks_whose_launcher_is_gone_save_and_stop(room, tmp_path):
    config = configure(room, tmp_path / "out", max_steps=20_000, save_steps=20_000, per_device_train_batch_size=2)
    process = start(config, launcher=[*TWO_RANKS, "--log_dir", str(tmp_path / "log")])
    log = tmp_path / "out" / "train_log.jsonl"
    assert wait_until(process, lambda: len(read_log(log)) > 2), process.stdout.read()
    process.terminate()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("checkpoint-*/checkpoint_complete.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "checkpoint_complete.json").exists()
    done = len(read_log(log))
    time.sleep(1)
    assert len(read_log(log)) == done


@pytest.fixture(scope="module")
def one_rank(room):
    """12 rows: global batches of 8 and 4, text-only rows among them, so that a rank may have no picture in a step."""
    options = dict(max_steps=4, lora=True, lora_dropout=0.0, save_steps=2, dataset=with_eval(room), do_eval=True)
    options.update(evaluation_strategy="steps", eval_steps=4, eval_with_do_generation=True)
    output = room / "runs" / "one"
    assert run([configure(room, output, per_device_train_batch_size=8, **options)]) == 0
    return output, options


@pytest.mark.parametrize("sharding", ["", "stage1", "stage2"])
def test_two_ranks_train_to_the_losses_of_one(room, one_rank, tmp_path, sharding):
    """Stage 2 is on CPUs here (see stage2_on_cpu.py), which a user's run refuses."""
    one, options = one_rank
    two = tmp_path / "two"
    config = configure(
        room, two, per_device_train_batch_size=2, gradient_accumulation_steps=2, sharding=sharding, **options
    )
    train_on_two_ranks(config, tmp_path / "log", TOOL if sharding != "stage2" else STAGE2_ON_CPU)
    keys = ("step", "loss", "supervised_tokens", "eval_loss", "eval_token_accuracy", "eval_exact_match")
    logs = [read_log(folder / "train_log.jsonl") for folder in (one, two)]
    assert len(logs[0]) == len(logs[1]) == 5
    for first, second in zip(*logs):
        for key in keys:
            assert (key in first) == (key in second)
            if key in first:
                assert abs(first[key] - second[key]) < 1e-5, (key, first, second)
    predicted = [(folder / "eval_predictions-4.jsonl").read_text() for folder in (one, two)]
    assert predicted[0] == predicted[1]
    first, second = (outcome(folder, ("step",))[1] for folder in (one, two))
    for file in first:
        for name, value in first[file].items():
            np.testing.assert_allclose(second[file][name], value, atol=1e-5, err_msg=name)
    optimizers = {path.name for path in (two / "checkpoint-4").glob("optimizer*")}
    assert len(optimizers) == (2 if sharding else 1)


def test_stage2_sums_in_one_order_whatever_a_batch_holds(room, tmp_path):
    """Pictures on one rank and none on the other; and a newline feature that pictures padded to squares don't use."""
    tiny_checkpoint(
        room / "unpad",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[8, 16], [16, 8]],
        mm_patch_merge_type="spatial_unpad",
    )
    options = dict(
        model_name_or_path=str(room / "unpad"), image_aspect_ratio="pad", tune_mm_mlp_adapter=True, max_steps=3
    )
    assert run([configure(room, tmp_path / "one", per_device_train_batch_size=4, **options)]) == 0
    config = configure(
        room,
        tmp_path / "two",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        sharding="stage2",
        **options,
    )
    train_on_two_ranks(config, tmp_path / "log", STAGE2_ON_CPU)
    (log, files), (log_of_two, files_of_two) = (outcome(tmp_path / name) for name in ("one", "two"))
    assert len(log) == len(log_of_two) == 3
    for first, second in zip(log, log_of_two):
        assert first["supervised_tokens"] == second["supervised_tokens"]
        assert abs(first["loss"] - second["loss"]) < 1e-5
    for file in files:
        for name, value in files[file].items():
            np.testing.assert_allclose(files_of_two[file][name], value, atol=1e-5, err_msg=name)


def chat_template(folder, name, **values):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(json.dumps(values))
    return str(file)


def test_the_template_of_the_data_is_the_one_that_the_result_is_asked_with(room, tmp_path):
    own = {"conversation": ["Q: {{user}}\n", "A: {{bot}}</s>\n"], "query": "Q: {{query}}\nA:"}
    entry = {
        "data_files": str(room / "data" / "train.json"),
        "chat_template": chat_template(tmp_path / "templates", "own.json", **own),
    }
    config = configure(room, tmp_path / "own", max_steps=1, dataset={"train": [entry]})
    assert run([config]) == 0
    for folder in (tmp_path / "own", tmp_path / "own" / "checkpoint-1"):
        if folder.exists():
            processor = LlavaProcessor.from_pretrained(folder)
            messages = [{"role": "user", "content": "Hi"}]
            assert processor.template.render(messages, add_generation_prompt=True) == "Q: Hi\nA:"
    chat = LlavaChat(
        LlavaLlamaForCausalLM.from_pretrained(tmp_path / "own"), processor, temperature=0, max_new_tokens=2
    )
    assert chat.template == processor.template and "".join(chat.ask("Hi")) is not None

    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    )
    vicuna = {"system": system, "conversation": ["USER: {{user}} ", "ASSISTANT: {{bot}}</s>"], "query": "USER: {{query}} ASSISTANT:"}  # fmt: skip
    entry["chat_template"] = chat_template(tmp_path / "templates", "vicuna.json", **vicuna)
    for name, more in (("known", {}), ("known-lora", {"lora": True}), ("known-pad", {"image_aspect_ratio": "pad"})):
        config = configure(
            room, tmp_path / name, max_steps=1, dataset={"train": [entry]}, version="llava_v1", **more
        )  # fmt: skip
        assert run([config]) == 0
        assert json.loads((tmp_path / name / "config.json").read_text())["conversation_template"] == "vicuna_v1"
        assert not (tmp_path / name / "chat_template.json").exists()
    # a later run in the folder of an earlier one leaves nothing of its template
    again = configure(room, tmp_path / "own", max_steps=1, version="llava_v1", overwrite_output_dir=True)
    assert run([again]) == 0
    assert LlavaProcessor.from_pretrained(tmp_path / "own").template.name == "llava_v1"


def test_another_content_of_the_template_is_another_run(room, tmp_path, capsys):
    texts = {"conversation": ["Q: {{user}}\n", "A: {{bot}}</s>\n"]}
    entry = {
        "data_files": str(room / "data" / "eval.json"),
        "chat_template": chat_template(tmp_path, "t.json", **texts),
    }
    config = configure(room, tmp_path / "out", dataset={"eval": [entry]}, do_train=False, do_eval=True)
    assert main([config]) == 0
    before = json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"]
    assert main([config]) == 0
    chat_template(tmp_path, "t.json", system="Be brief. ", **texts)
    assert main([config]) == 1 and "data or weights" in capsys.readouterr().err
    assert main([config, "--overwrite_output_dir"]) == 0
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] != before


def test_a_model_without_a_projector_gets_a_new_one_to_align(room, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(room / "base", bare)
    weights = load_file(bare / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "mm_projector" not in name}, bare / "model.safetensors"
    )
    with pytest.raises(UserError, match="lacks 4 tensor.*makes a new one with tune_mm_mlp_adapter"):
        run([configure(room, tmp_path / "sft", model_name_or_path=str(bare), max_steps=1)])
    # the toolkit's files for this stage freeze all the rest by patterns
    frozen = {key: TOOLKIT[key] for key in ("freeze_include", "freeze_exclude")}
    config = configure(room, tmp_path / "patterns", model_name_or_path=str(bare), max_steps=2, **frozen)
    assert run([config]) == 0
    made = load_file(tmp_path / "patterns" / "model.safetensors")
    assert made.keys() == weights.keys()
    assert all((made[name] == weights[name]).all() for name in weights if "mm_projector" not in name)
    config = configure(room, tmp_path / "aligned", model_name_or_path=str(bare), tune_mm_mlp_adapter=True, max_steps=20)
    assert run([config]) == 0
    assert np.isfinite(answer(tmp_path / "aligned", room)[1]).all()
    config = configure(
        room, tmp_path / "tuned", model_name_or_path=str(bare), pretrain_mm_mlp_adapter=str(tmp_path / "aligned"),
        max_steps=1,
    )  # fmt: skip
    assert run([config]) == 0
    # an adapter's folder holds a projector that isn't its base's, trained or not
    config = configure(
        room, tmp_path / "adapter", lora=True, pretrain_mm_mlp_adapter=str(tmp_path / "aligned"),
        freeze_mm_mlp_adapter=True, max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    assert run([config]) == 0
    more = configure(
        room, tmp_path / "more", lora=True, lora_path=str(tmp_path / "adapter"), freeze_mm_mlp_adapter=True, max_steps=1
    )
    assert run([more]) == 0
    aligned = load_file(tmp_path / "aligned" / "model.safetensors")
    for name in ("adapter", "more"):
        beside = load_file(tmp_path / name / "non_lora_state.safetensors")
        assert len(beside) == 4 and all((value == aligned[key]).all() for key, value in beside.items())


def test_a_toolkit_file_runs_as_it_is(room, tmp_path, monkeypatch):
    """Paths as the toolkit's files have them, relative to the working directory; only the model's name is another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(room / "data", tmp_path, dirs_exist_ok=True)
    shutil.copyfile(room / "data" / "eval.json", "val.json")
    system = "A chat. "
    chat_template(
        tmp_path, "chat_template.json", system=system, conversation=["USER: {{user}} ", "ASSISTANT: {{bot}}</s>"]
    )
    (tmp_path / "lora.json").write_text(json.dumps({**TOOLKIT, "max_length": 512, "version": None}))
    overrides = ["--model_name_or_path", str(room / "base"), "--freeze_include", "null", "--freeze_exclude", "null"]
    assert main(["lora.json", *overrides]) == 0
    output = tmp_path / "checkpoints" / "llava_sft_ckpts"
    log = read_log(output / "train_log.jsonl")
    assert [entry["step"] for entry in log] == list(range(1, 13)) and "eval_loss" not in log[-1]
    assert (output / "checkpoint-12").is_dir() and answer(output, room)[1].shape[-1] == 264
    assert json.loads((output / "lora_config.json").read_text())["target_modules"] == TOOLKIT["lora_target_modules"]
    # "overwrite_output_dir": true trains the finished run again
    assert main(["lora.json", *overrides, "--max_steps", "1"]) == 0
    assert len(read_log(output / "train_log.jsonl")) == 1 and not (output / "checkpoint-12").exists()


def test_overrides_may_come_before_the_file(room, tmp_path, monkeypatch):
    """Data beside the configuration are found from any working directory."""
    shutil.copytree(room / "data", tmp_path / "data")
    config = configure(room, tmp_path / "out", dataset={"train": [{"data_files": "data/train.json"}]})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["--max_steps", "1", "--save_steps=9", config]) == 0
    assert len(read_log(tmp_path / "out" / "train_log.jsonl")) == 1


def test_help_lists_the_keys(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "CONFIG.json" in text and "lora_rank [8]" in text and "mm_projector_lr:" in text
