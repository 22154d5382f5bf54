"""Evaluation while training: the same figures however the data are split, and prompts that are those of training."""

import json

import numpy as np
import paddle
import pytest

from paddlemix.datasets.files import parse_dataset_key
from paddlemix.datasets.supervised import SupervisedDataset
from paddlemix.errors import UserError
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.evaluation import evaluate_answers, prompt_of, questions_of, score_answers
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, colour_data, samples, tiny_checkpoint, tiny_model


def trainer(folder, dataset, **changes):
    model = tiny_model()
    select_trained(model)
    options = dict(output_dir=str(folder), device="cpu", report_to="none", disable_tqdm=True, do_eval=True)
    return LlavaTrainer(model, FinetuneArguments(**{**options, **changes}), eval_dataset=dataset)


def test_loss_and_accuracy_are_over_tokens(tmp_path):
    rows = samples(7)
    total = count = right = 0
    model = tiny_model()
    model.eval()
    for row in rows:
        ids, labels = paddle.to_tensor([row["input_ids"]]), paddle.to_tensor([row["labels"]])
        pixels = None if row["pixel_values"] is None else paddle.to_tensor(row["pixel_values"])
        out = model(ids, pixel_values=pixels, labels=labels, loss_reduction="sum")
        total, count = total + float(out.loss), count + out.label_ids.shape[0]
        right += int((out.label_logits.argmax(-1) == out.label_ids).sum())
    for size, changes in ((1, {}), (3, {"eval_accumulation_steps": 1}), (8, {})):
        metrics = trainer(tmp_path, Samples(rows), per_device_eval_batch_size=size, **changes).evaluate()
        np.testing.assert_allclose(metrics["eval_loss"], total / count, rtol=1e-5)
        np.testing.assert_allclose(metrics["eval_token_accuracy"], right / count)
    part = trainer(tmp_path, Samples(rows), per_device_eval_batch_size=2, max_evaluate_steps=1).evaluate()
    first = trainer(tmp_path, Samples(rows[:2]), per_device_eval_batch_size=2, prediction_loss_only=True).evaluate()
    np.testing.assert_allclose(part["eval_loss"], first["eval_loss"], rtol=1e-6)
    assert "eval_token_accuracy" not in first


def test_nothing_to_evaluate_on(tmp_path):
    with pytest.raises(UserError, match="nothing to evaluate on"):
        trainer(tmp_path, None).evaluate()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_checkpoint(folder / "base")
    colour_data(folder / "data", 6)
    return folder


@pytest.fixture(scope="module")
def dataset(checkpoint):
    processor = LlavaProcessor.from_pretrained(checkpoint / "base")
    entries = parse_dataset_key({"eval": [{"data_files": str(checkpoint / "data" / "train.json")}]})["eval"]
    return SupervisedDataset(entries, processor, 512, num_workers=0)


def test_a_prompt_is_what_training_shows_before_the_answer(dataset):
    processor = dataset.table.processor
    assert [tuple(question) for question in questions_of(dataset)][:3] == [(0, 0), (0, 1), (1, 0)]
    for question in questions_of(dataset):
        sample = dataset[question.row]
        prompt = prompt_of(question, dataset, processor)
        length = len(prompt.input_ids)
        assert prompt.input_ids == sample["input_ids"][:length]
        assert sample["labels"][length] == sample["input_ids"][length] and sample["labels"][length - 1] == -100
        assert processor.decode(prompt.input_ids[-11:]) in ("ASSISTANT:", " ASSISTANT:", "? ASSISTANT:")
        assert processor.decode(sample["input_ids"][length:]).strip().startswith(prompt.reference)
        assert len(prompt.images) == ("<image>" in str(dataset.conversation(question.row)))


@pytest.mark.parametrize("own_first", [False, True])
def test_every_row_is_asked_with_its_own_entrys_template(checkpoint, tmp_path, own_first):
    rows = {"named": [["Q1", "red"]], "own": [["Q2", "blue"]]}
    for name, rounds in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": rounds}]))
    own = {"conversation": ["Q: {{user}}\n", "A: {{bot}}|\n"], "query": "Q: {{query}}\nA:"}
    (tmp_path / "template.json").write_text(json.dumps(own))
    entries = [
        {"data_files": str(tmp_path / "named.json")},
        {"data_files": str(tmp_path / "own.json"), "chat_template": str(tmp_path / "template.json")},
    ]
    processor = LlavaProcessor.from_pretrained(checkpoint / "base")
    entries = parse_dataset_key({"eval": entries[::-1] if own_first else entries})["eval"]
    dataset = SupervisedDataset(entries, processor, 512, num_workers=0)
    prompts = [prompt_of(question, dataset, processor) for question in questions_of(dataset)]
    named, own = prompts[::-1] if own_first else prompts
    assert processor.decode(named.input_ids).endswith("USER: Q1 ASSISTANT:") and named.stop_strings == ("</s>",)
    assert processor.decode(own.input_ids).strip() == "Q: Q2\nA:" and own.stop_strings == ("|",)


def eval_set(checkpoint, folder, max_length=512, **files):
    """A dataset of files, each given as the rounds of its rows."""
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps([{"conversations": rounds} for rounds in rows]))
    entries = [{"data_files": [str(folder / f"{name}.json") for name in files]}]
    processor = LlavaProcessor.from_pretrained(checkpoint / "base")
    return SupervisedDataset(parse_dataset_key({"eval": entries})["eval"], processor, max_length, num_workers=0)


def test_only_answers_that_are_there_and_fit_are_asked_for(checkpoint, tmp_path):
    long = [[f"Question number {n}?", f"answer {n}"] for n in range(20)]
    dataset = eval_set(checkpoint, tmp_path, 400, rows=[long, [["Q", "red"], ["Q2", ""], ["Q3", "blue"]]])
    questions = [tuple(question) for question in questions_of(dataset)]
    kept = dataset.answers[0]
    assert 2 < kept < 20 and dataset.counts["answers_cut"] == 20 - kept
    assert questions == [(0, turn) for turn in range(kept)] + [(1, 0), (1, 2)]
    prompts = [prompt_of(question, dataset, dataset.table.processor) for question in questions_of(dataset)]
    assert max(len(prompt.input_ids) for prompt in prompts) < 400 and all(prompt.reference for prompt in prompts)
    with pytest.raises(UserError, match="no answers to compare with"):
        questions_of(eval_set(checkpoint, tmp_path, rows=[[["Q", " "]]]))


def test_predictions_name_the_row_of_the_data_file(checkpoint, tmp_path):
    rows = {"one": [[["Q" * 600, "too long"]], [["Q", "red"]]], "two": [[["Q", "blue"], ["Q", "pink"]]]}
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint / "base")

    def places(name, **files):
        dataset, file = eval_set(checkpoint, tmp_path, **files), tmp_path / f"{name}.jsonl"
        evaluate_answers(model, dataset.table.processor, dataset, file=file, batch_size=4, max_new_tokens=1)
        found = [json.loads(line) for line in file.read_text().splitlines()]
        return [(entry.get("file"), entry["row"], entry["turn"], entry["reference"]) for entry in found]

    assert places("alone", one=rows["one"]) == [(None, 1, 0, "red")]
    one, two = (str(tmp_path / f"{name}.json") for name in rows)
    assert places("both", **rows) == [(one, 1, 0, "red"), (two, 0, 0, "blue"), (two, 0, 1, "pink")]


def test_answers_do_not_depend_on_the_batch(checkpoint, dataset, tmp_path):
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint / "base")
    found = []
    for size in (1, 4):
        file = tmp_path / f"{size}.jsonl"
        scores = evaluate_answers(model, dataset.table.processor, dataset, file=file, batch_size=size, max_new_tokens=5)
        found.append([json.loads(line) for line in file.read_text().splitlines()])
        assert scores["exact_match"] == 0
    assert found[0] == found[1] and len(found[0]) == 8
    few = evaluate_answers(
        model, dataset.table.processor, dataset, file=tmp_path / "few.jsonl", batch_size=2, max_questions=3
    )
    assert len((tmp_path / "few.jsonl").read_text().splitlines()) == 3 and "exact_match" in few


def test_scores():
    assert score_answers([("a cat", "a cat"), ("a dog", "a cat")]) == {"exact_match": 0.5}
    boxes = score_answers([("at [0.25, 0.00, 0.75, 1.00]", "[0.00, 0.00, 0.50, 1.00]"), ("yes", "[0.1, 0.1, 0.2, 0.2]"), ("no", "no")])  # fmt: skip
    np.testing.assert_allclose(boxes["box_iou"], (1 / 3 + 0) / 2)
    np.testing.assert_allclose(boxes["exact_match"], 1 / 3)
