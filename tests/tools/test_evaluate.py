"""The evaluation tool on a tiny model: what it asks, what it counts, what it writes."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from paddlemix.tools import evaluate
from tests.support import llama2_tokenizer_folder

SIDE = 28


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny LLaVA with LLaMA-2's tokenizer and weights large enough to tell pictures apart."""
    import paddle

    from paddlemix import LlavaConfig, LlavaLlamaForCausalLM
    from paddlemix.processors.image_processing import LlavaImageProcessor

    folder = llama2_tokenizer_folder(tmp_path_factory.mktemp("tiny"))
    vision = dict(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=14
    )
    config = LlavaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vision_config=vision,
        mm_vision_select_layer=-1,
        mm_projector_type="linear",
        conversation_template="vicuna_v1",
        initializer_range=0.2,
    )
    paddle.seed(3)
    LlavaLlamaForCausalLM(config).save_pretrained(folder)
    LlavaImageProcessor.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (40, 30), color).save(tmp_path / f"{name}.png")
    noise = np.random.RandomState(0).randint(0, 255, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return tmp_path


def write(path, rows):
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def run(checkpoint, data_file, *more):
    output = f"{data_file}.out.jsonl"
    command = ["--model_name_or_path", str(checkpoint), "--data_file", data_file, "--output_file", output]
    status = evaluate.main([*command, "--max_new_tokens", "5", *more])
    records = [json.loads(line) for line in open(output, encoding="utf-8")] if status == 0 else []
    return status, records


def rows_with(answers):
    """Three rows of one, two and one turns, in three formats."""
    return [
        {"image": "red.png", "question_type": "color", "conversations": [["<image>\nWhat color is it?", answers[0]]]},
        {
            "image": "blue.png",
            "question_type": ["color", "count"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat color is it in this picture?"},
                {"from": "gpt", "value": answers[1]},
                {"from": "human", "value": "How many?"},
                {"from": "gpt", "value": answers[2]},
            ],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "noise.png"}, {"type": "text", "text": "What?"}],
                },
                {"role": "assistant", "content": answers[3]},
            ]
        },
    ]


def test_answers_are_those_of_the_model_one_by_one(checkpoint, data):
    from paddlemix import LlavaLlamaForCausalLM, LlavaProcessor

    file = write(data / "test.json", rows_with(["red", "blue", "1", "noise"]))
    status, records = run(checkpoint, file, "--batch_size", "3")
    assert status == 0 and len(records) == 4

    model, processor = LlavaLlamaForCausalLM.from_pretrained(checkpoint), LlavaProcessor.from_pretrained(checkpoint)
    system = processor.template.render([{"role": "user", "content": "x"}], True).split("USER:")[0]
    prompts = [
        (f"{system}USER: <image>\nWhat color is it? ASSISTANT:", "red.png"),
        (f"{system}USER: <image>\nWhat color is it in this picture? ASSISTANT:", "blue.png"),
        (
            f"{system}USER: <image>\nWhat color is it in this picture? ASSISTANT: blue</s>USER: How many? ASSISTANT:",
            "blue.png",
        ),
        (f"{system}USER: <image>\nWhat? ASSISTANT:", "noise.png"),
    ]
    for record, (prompt, image) in zip(records, prompts):
        ids, _ = model.generate(**processor(text=prompt, images=str(data / image)), max_new_tokens=5)
        assert record["prediction"] == processor.decode(ids[0].tolist()).strip()


def test_a_checkpoint_is_asked_with_the_chat_template_beside_it(checkpoint, data, tmp_path):
    from paddlemix import LlavaLlamaForCausalLM, LlavaProcessor

    own = shutil.copytree(checkpoint, tmp_path / "own")
    template = {"conversation": ["Q: {{user}}\n", "A: {{bot}}</s>\n"], "query": "Q: {{query}}\nA:"}
    (own / "chat_template.json").write_text(json.dumps(template))
    row = {"image": "red.png", "conversations": [["<image>\nWhat color is it?", "red"]]}
    status, (record,) = run(own, write(data / "test.json", [row]))
    model, processor = LlavaLlamaForCausalLM.from_pretrained(own), LlavaProcessor.from_pretrained(own)
    prompt = processor(text="Q: <image>\nWhat color is it?\nA:", images=str(data / "red.png"))
    ids, _ = model.generate(**prompt, max_new_tokens=5)
    assert status == 0 and record["prediction"] == processor.decode(ids[0].tolist()).strip()


@pytest.mark.parametrize("template", ["vicuna_v1", "llama_2", "v1_mmtag", "plain"])
def test_the_model_reads_what_training_shows_it(checkpoint, data, template):
    """A picture in the middle or at the end of a question goes to its beginning, marks of the template around it."""
    import paddle

    from paddlemix import LlavaLlamaForCausalLM, LlavaProcessor

    model, processor = LlavaLlamaForCausalLM.from_pretrained(checkpoint), LlavaProcessor.from_pretrained(checkpoint)
    questions = ["<image>\nWhat is this?", "What is this?\n<image>", "<image>What is this?"]
    rows = [{"image": str(data / "noise.png"), "conversations": [[question, "A cat."]]} for question in questions]
    status, records = run(checkpoint, write(data / "test.json", rows), "--conv_mode", template)
    assert status == 0
    for row, record in zip(rows, records):
        sample = processor.encode_conversation(row, template)
        ids = sample["input_ids"][: next(i for i, label in enumerate(sample["labels"]) if label != -100)]
        given = {"pixel_values": paddle.to_tensor(sample["pixel_values"]), "max_new_tokens": 5}
        answer = processor.decode(model.generate(paddle.to_tensor([ids]), **given)[0][0].tolist())
        assert record["prediction"] and answer.strip().startswith(record["prediction"])


def test_a_picture_with_several_questions_is_seen_once(checkpoint, data, monkeypatch):
    from paddlemix import LlavaLlamaForCausalLM

    seen, original = [], LlavaLlamaForCausalLM.encode_images

    def counting(self, pixel_values, image_sizes=None):
        seen.append(len(pixel_values))
        return original(self, pixel_values, image_sizes)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "encode_images", counting)
    asked = ["What?", "What color is it?", "How many circles do you see?", "Why?"]
    rows = [{"image": f"{n}.png", "conversations": [[f"<image>\n{q}", "x"]]} for q in asked for n in ("red", "noise")]
    file = write(data / "test.json", rows)
    _, together = run(checkpoint, file, "--batch_size", "8")
    assert seen == [2]
    _, alone = run(checkpoint, file, "--batch_size", "1")
    assert [r["prediction"] for r in together] == [r["prediction"] for r in alone]


def test_right_answers_count_by_type(checkpoint, data, capsys):
    _, first = run(checkpoint, write(data / "a.json", rows_with(["?", "?", "?", "?"])))
    said = [record["prediction"] for record in first]
    # the second turn's history has the reference, so a first right answer may change it; ask for that one again
    _, again = run(checkpoint, write(data / "b.json", rows_with([said[0], said[1], "?", said[3]])))
    file = write(data / "c.json", rows_with([said[0], said[1], again[2]["prediction"], "something else entirely"]))
    capsys.readouterr()
    status, records = run(checkpoint, file)
    assert status == 0 and [record["score"] for record in records] == [1, 1, 1, 0]
    table = capsys.readouterr().out
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["all", "exact", "match", "1", "0.00%"],
        ["color", "exact", "match", "2", "100.00%"],
        ["count", "exact", "match", "1", "100.00%"],
        ["all", "types", "exact", "match", "4", "75.00%"],
    ]


def test_a_reference_without_words_is_not_asked_for(checkpoint, data):
    rows = [{"image": "red.png", "conversations": [["<image>\nWhat?", ""], ["And?", "x"]]}]
    _, records = run(checkpoint, write(data / "empty.json", rows))
    assert [(record["turn"], record["reference"]) for record in records] == [(1, "x")]


def test_metric_follows_from_the_reference():
    def turn(reference, facts=None):
        return evaluate.Turn(0, 0, [], [], reference, "all", facts)

    assert evaluate.score(turn("0.10, 0.10, 0.50, 0.50"), "It is at [0.1, 0.1, 0.5, 0.45].") == ("box", 1.0)
    assert evaluate.score(turn("0.10, 0.10, 0.50, 0.50"), "0.60, 0.60, 0.90, 0.90") == ("box", 0.0)
    assert evaluate.score(turn("A red circle.", ["red circle", "blue star"]), "a red circle") == ("facts", 0.5)
    assert evaluate.score(turn("Two"), "2") == ("exact", 1.0)


def test_blank_pictures_change_what_is_seen(checkpoint, data):
    rows = [{"image": f"{name}.png", "conversations": [["<image>\nWhat?", "x"]]} for name in ("noise", "red")]
    file = write(data / "test.json", rows)
    _, seeing = run(checkpoint, file)
    _, blank = run(checkpoint, file, "--blank_image")
    assert blank[0]["prediction"] == blank[1]["prediction"]
    assert [r["prediction"] for r in seeing] != [r["prediction"] for r in blank]


@pytest.mark.parametrize(
    "rows, more, sentence",
    [
        ([{"image": "red.png"}], [], "neither"),
        ([{"image": "gone.png", "conversations": [["<image>\nQ", "A"]]}], [], "gone.png"),
        ([{"conversations": [["Q", "A"]], "question_type": ["a", "b"]}], [], "question_type"),
        ([{"conversations": [["Q", "A"]]}], ["--batch_size", "0"], "--batch_size is 0"),
        ([{"conversations": [["Q", "A"]]}], ["--conv_mode", "nonsense"], "nonsense"),
        ([{"conversations": [["Q", "A"]], "facts": [["red", 3]]}], [], "facts"),
        ([{"conversations": [["Q", "A"]]}], ["--output_file", "."], "which is a folder"),
        ([{"conversations": [["Q", "A"]]}], ["--data_file", "gone.json"], "--data_file names"),
        ([{"conversations": [["Q", "A"]]}], ["--conv_mode", "plain"], "bad.json:1 (row 1): Template 'plain' trains on"),
    ],
)
def test_mistakes_are_one_sentence(checkpoint, data, capsys, rows, more, sentence):
    status, _ = run(checkpoint, write(data / "bad.json", rows), *more)
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 1 and len(message) == 1 and sentence in message[0]


def test_pictures_are_found_where_fine_tuning_finds_them(checkpoint, data, tmp_path, monkeypatch, capsys):
    (data / "sub").mkdir()
    (data / "elsewhere").mkdir()
    (data / "blue.png").rename(data / "sub" / "blue.png")
    rows = [{"image": name, "conversations": [["<image>\nQ", "A"]]} for name in ("red.png", "blue.png")]
    file = write(data / "sub" / "test.json", rows)
    monkeypatch.chdir(data)
    assert run(checkpoint, file, "--image_folder", str(data / "elsewhere"))[0] == 0
    (data / "red.png").unlink()
    assert run(checkpoint, file)[0] == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: {file}") and "row 1" in message and "red.png doesn't exist" in message


@pytest.mark.parametrize("linked", [None, "symlink_to", "hardlink_to"])
def test_predictions_never_replace_the_data(checkpoint, data, capsys, linked):
    file = write(data / "test.json", [{"conversations": [["Q", "A"]]}])
    before, output = open(file).read(), data / "test.json"
    if linked:
        output = data / "other.json"
        getattr(output, linked)(file)
    assert run(checkpoint, file, "--output_file", str(output))[0] == 1
    assert "which is the data file; name another file" in capsys.readouterr().err
    assert open(file).read() == before


def test_a_corrupt_picture_has_its_place_in_the_file(checkpoint, data, capsys):
    (data / "bad.png").write_bytes(b"no picture")
    rows = [{"image": name, "conversations": [["<image>\nQ", "A"]]} for name in ("red.png", "bad.png")]
    file = write(data / "test.json", rows)
    assert run(checkpoint, file)[0] == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"error: {file}" in message and "(row 2)" in message and "bad.png" in message


def test_a_folder_of_pictures_that_is_not_there(checkpoint, data, capsys):
    file = write(data / "test.json", [{"image": "red.png", "conversations": [["<image>\nQ", "A"]]}])
    assert run(checkpoint, file, "--image_folder", str(data / "nowhere"))[0] == 1
    assert f"--image_folder is {data / 'nowhere'}, and there is no such folder" in capsys.readouterr().err


def test_scores_are_told_though_the_disk_is_full(checkpoint, data, capsys):
    file = write(data / "test.json", [{"conversations": [["Q", "A"]]}])
    status = evaluate.main(
        ["--model_name_or_path", str(checkpoint), "--data_file", file, "--max_new_tokens", "2"]
        + ["--output_file", "/dev/full"]
    )
    told = capsys.readouterr()
    assert status == 1 and "exact match" in told.out
    assert told.err.strip().splitlines()[-1] == "error: /dev/full can't be written: No space left on device."


def test_an_evaluation_that_is_stopped_keeps_its_answers(checkpoint, data, monkeypatch, capsys):
    """Ctrl-C while the second batch is answered."""
    from paddlemix.evaluation import answers

    asked, original = [], answers.answer_prompts

    def interrupted(*given):
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(answers, "answer_prompts", interrupted)
    file = write(data / "test.json", rows_with(["a", "b", "c", "d"]))
    status, _ = run(checkpoint, file, "--batch_size", "1")
    assert status == 130 and capsys.readouterr().err.rstrip().endswith("stopped")
    assert len(open(f"{file}.out.jsonl", encoding="utf-8").readlines()) == 1


def test_prompts_beyond_the_models_positions_are_told(checkpoint, data, caplog):
    file = write(data / "test.json", [{"conversations": [["a " * 4200, "b"]]}, {"conversations": [["a", "b"]]}])
    status, _ = run(checkpoint, file)
    assert status == 0 and "1 of 2 prompts and answers may be longer than the 4096 positions" in caplog.text


def test_a_limit_takes_the_first_rows(checkpoint, data):
    file = write(data / "test.json", rows_with(["a", "b", "c", "d"]))
    _, records = run(checkpoint, file, "--limit", "2")
    assert [(r["row"], r["turn"]) for r in records] == [(0, 0), (1, 0), (1, 1)]
