"""check_dataset.py as a user runs it: a sound dataset, and one with everything that can be wrong."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from paddlemix.tools.check_dataset import histogram, main, wants_colour
from tests.datasets.tiny import ANYRES, mixed_rows, picture, tiny_folder, write_rows

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "paddlemix" / "tools" / "check_dataset.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that cuts pictures into tiles, and rows of all formats."""
    folder = tmp_path_factory.mktemp("check")
    tiny_folder(folder / "model", **ANYRES)
    write_rows(folder / "train.json", mixed_rows(folder))
    write_rows(folder / "eval.jsonl", [{"conversations": [["Q", "A"], ["Second question", "Second answer"]]}] * 3)
    return folder


def config(folder, name="config.json", **keys):
    settings = {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "out"),
        "dataset": {"train": [{"name": "chatml_dataset", "data_files": "train.json"}], "eval": []},
        "do_train": True,
        "disable_tqdm": True,
    }
    path = folder / name
    path.write_text(json.dumps({**settings, **keys}))
    return path


def run(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def run_here(capsys):
    """The same in this process, which has imported everything already."""

    def run(*arguments):
        try:
            status = main(list(map(str, arguments)))
        except SystemExit as stopped:  # argparse
            status = stopped.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


def test_a_sound_dataset(folder):
    dataset = {"train": [{"data_files": "train.json"}], "eval": [{"data_files": "eval.jsonl"}]}
    done = run(config(folder, dataset=dataset, mixtoken=True), "--show", 2)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert f"train: 6 rows in {folder}/train.json" in out and f"eval: 3 rows in {folder}/eval.jsonl" in out
    assert "formats       llava 1, messages 2, toolkit 3" in out
    assert "pictures      6 in the samples; 4 rows with, 2 without" in out
    assert "samples       6, of which 0 cut at max_length 2048; 0 rows left out" in out
    for title in ("text tokens of a row", "picture tokens of a row", "all tokens of a row"):
        assert title in out
    assert re.search(r"mixtoken +1 sequences, \d+\.\d% full", out)
    assert out.rstrip().endswith("sound: training can start")
    assert "100%" in done.stderr, "the progress bar"
    # two samples of each split, what is learned in brackets, no colours in a pipe
    assert out.count(" to learn, ") == 4 and "\x1b" not in out
    assert "ASSISTANT:⟦ Red.</s>⟧ USER: Another? ASSISTANT:⟦ Blue, I would say.</s>⟧" in out
    assert re.search(r"USER: <image>×\d+ \nWhat is this\? ASSISTANT:⟦ Noise\.</s>⟧", out)
    assert not (folder / "out").exists(), "a dry run writes nothing"


def test_colours_on_a_terminal(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    shown = _through_a_terminal([sys.executable, str(TOOL), str(config(folder)), "--show", "1"], environment)
    assert "\x1b[32m Red.</s>\x1b[0m" in shown and "⟦" not in shown


@pytest.mark.parametrize(
    "variables, expected", [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)]
)
def test_no_colours_where_they_are_not_wanted(monkeypatch, variables, expected):
    for name, value in {"TERM": "xterm", "NO_COLOR": "", **variables}.items():
        monkeypatch.setenv(name, value)
    leader, follower = pty.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as terminal:
        assert wants_colour(terminal) == expected


def _through_a_terminal(command, environment):
    leader, follower = pty.openpty()
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait() == 0
    return shown.decode("utf-8")


def test_everything_that_is_wrong_is_listed_with_file_and_line(folder, tmp_path):
    picture(tmp_path / "good.png")
    whole = picture(tmp_path / "whole.jpg", (200, 150)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    ask = [["<image>\nWhat?", "This."]]
    good = {"image": "good.png", "conversations": ask}
    lines = [
        json.dumps(good),
        json.dumps({"image": "gone.png", "conversations": ask}),
        json.dumps({"image": ["cut.jpg", "text.png"], "conversations": [["<image><image>", "Two."]]}),
        json.dumps({"conversations": ask}),
        json.dumps({"image": "good.png", "conversations": [["No place for it", "A"]]}),
        '{"image": "good.png", "conversations": [["<image>", "A"]]',
        json.dumps({"text": "another format"}),
        "",
        json.dumps({"messages": [{"role": "robot", "content": "?"}]}),
        json.dumps(good),
    ]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines))
    broken = tmp_path / "broken.json"
    broken.write_text(f"[\n{json.dumps(good)}\n{json.dumps(good)}]")
    (tmp_path / "empty.json").write_text("")
    files = [str(bad), str(broken), str(tmp_path / "empty.json")]
    path = config(folder, "bad.json", dataset={"train": [{"data_files": files}, {"data_files": "none.json"}]})
    done = run(path, "--num_workers", 2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    out = done.stdout
    for expected in (
        "problem: dataset.train[1].data_files names what doesn't exist: looked for ",
        f"{bad}:2: {tmp_path}/gone.png doesn't exist",
        f"{bad}:3: {tmp_path}/cut.jpg is a broken or cut-off picture",
        f"{bad}:3: {tmp_path}/text.png is not a picture",
        f"{bad}:4: The text has 1 <image> but the row has 0 picture(s).",
        f"{bad}:5: The text has 0 <image> but the row has 1 picture(s).",
        f"{bad}:6: not valid JSON: expecting ',' delimiter at column",
        f"{bad}:7: A row has either 'conversations' or 'messages'",
        f"{bad}:9: Message 1 is from 'robot'",
        f"{broken}:3 (row 2): not valid JSON: expected ',' or ']' after a row",
        f"{tmp_path}/empty.json is empty",
        "pictures that are missing or corrupt: 3",
        "rows whose <image> and pictures differ in number: 2",
        "rows that can't be read: 3",
        "files that can't be read: 2",
        "samples       3, ",
        "formats       messages 1, none 2, toolkit 7",
    ):
        assert expected in out, f"{expected}\n---\n{out}"
    assert out.rstrip().endswith("not sound: mend the problems above before training")
    shown = run(path, "--show", 5)  # passes over the row of the broken picture
    assert shown.returncode == 1 and "error:" not in shown.stderr and "Traceback" not in shown.stderr
    assert shown.stdout.count("to learn, 1 picture(s)") == 3
    assert shown.stdout.rstrip().endswith("not sound: mend the problems above before training")


def test_cuts_and_drops_are_named(run_here, folder, tmp_path):
    rows = [
        {"conversations": [["Hi", "Hello"], ["word " * 100, "A"]]},
        {"conversations": [["word " * 100, "A"]]},
        {"messages": [{"role": "user", "content": "No answer"}]},
        {"conversations": [["Hi", "Hello"]]},
    ]
    file = write_rows(tmp_path / "x.json", rows)
    path = config(folder, "cut.json", dataset={"train": {"data_files": str(file)}})
    done = run_here(path, "--max_length", 100, "--max_listed", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "samples       2, of which 1 cut at max_length 100; 2 rows left out, of which 1 too long and 1 without an answer"
        in done.stdout
    )
    assert f"cut after a whole round: 1\n    {file}:2 (row 1)" in done.stdout
    assert f"left out: the first round is too long: 1\n    {file}:3 (row 2)" in done.stdout
    assert f"left out: no answer to learn: 1\n    {file}:4 (row 3)" in done.stdout

    done = run_here(path, "--max_length", 10)
    assert done.returncode == 1
    assert "problem: no row of train keeps a token to learn with max_length 10." in done.stdout

    many = write_rows(tmp_path / "y.json", [{}] * 5)
    path = config(folder, "many.json", dataset={"train": {"data_files": str(many)}})
    done = run_here(path, "--max_listed", 2)
    assert done.returncode == 1
    assert "rows that can't be read: 5\n" in done.stdout and "… and 3 more (--max_listed 5 lists all)" in done.stdout


@pytest.mark.parametrize(
    "keys, arguments, message",
    [
        ({"datset": {}}, [], "datset"),
        ({"model_name_or_path": "./nowhere"}, [], "nowhere"),
        ({"version": "vicuna"}, [], "No conversation template 'vicuna'"),
        ({"dataset": {"trian": []}}, [], "dataset has the key 'trian'; expected 'train'"),
        ({"max_length": "long"}, [], "max_length"),
        ({}, ["--show", "-1"], "--show: '-1' was given, expected a whole number, 0 or more"),
        ({}, ["--num_workers", "two"], "--num_workers: 'two' was given"),
        ({}, ["--show"], "--show"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(run_here, folder, keys, arguments, message):
    done = run_here(config(folder, "wrong.json", **keys), *arguments)
    assert done.returncode != 0 and message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and len(done.stderr.splitlines()) == 1


def test_data_that_are_not_there_are_named_before_a_model_is_fetched(run_here, folder, monkeypatch):
    monkeypatch.setattr("paddlemix.models.llava.hub.resolve", lambda *_, **__: pytest.fail("asked for the model"))
    dataset = {"train": {"data_files": "none.json"}}
    done = run_here(config(folder, "none.json.config", model_name_or_path="llava-hf/tiny", dataset=dataset))
    assert done.returncode == 1 and "none.json" in done.stdout and "not sound" in done.stdout


def test_what_training_refuses_is_not_sound(run_here, folder, tmp_path):
    for keys, message in (
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 500}, "don't fill one global batch of 500"),
        ({"num_train_epochs": 0.001}, "num_train_epochs is 0.001"),
    ):
        done = run_here(config(folder, "less.json", **keys))
        assert done.returncode == 1 and f"problem: {next(iter(keys))} is" in done.stdout and message in done.stdout
        assert "sound: training can start" not in done.stdout.replace("not sound", "")
    blank = write_rows(
        tmp_path / "blank.json", [{"conversations": [["Q", "A"], ["Q", "  "]]}, {"conversations": [["Q", " "]]}]
    )
    asked = {"do_eval": True, "eval_with_do_generation": True, "evaluation_strategy": "steps"}
    text = {"train": {"data_files": str(folder / "eval.jsonl")}}
    for name, keys, message in (
        (
            "packed",
            {"mixtoken": True, "dataloader_drop_last": True, "per_device_train_batch_size": 3},
            "the 1 samples don't",
        ),
        ("text", {"tune_mm_mlp_adapter": True, "dataset": text}, "no sample of the training data has a picture"),
        ("unasked", {"dataset": {**text, "eval": {"data_files": str(blank)}}, **asked}, ""),
    ):
        done = run_here(config(folder, f"{name}.json", **keys))
        assert (done.returncode == 1) == bool(message) and message in done.stdout, done.stdout
    write_rows(blank, [{"conversations": [["Q", " "]]}])
    done = run_here(config(folder, "unasked.json", dataset={**text, "eval": {"data_files": str(blank)}}, **asked))
    assert done.returncode == 1 and "eval has no answer with words" in done.stdout, done.stdout
    tiny_folder(tmp_path / "model", vocab_size=40)
    keys = {"model_name_or_path": str(tmp_path / "model"), "text_model_name_or_path": str(folder / "model")}
    done = run_here(config(folder, "words.json", **keys))
    assert done.returncode == 1 and "but the model has 40; name one of the model's own family" in done.stderr


def test_without_a_configuration_it_shows_how_it_is_used(run_here, tmp_path):
    done = run_here()
    assert done.returncode == 2 and "usage: check_dataset.py CONFIG.json" in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    done = run_here(tmp_path / "none.json")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "none.json doesn't exist" in done.stderr


def test_a_sample_longer_than_the_models_positions(run_here, folder, tmp_path):
    tiny_folder(tmp_path / "model", max_position_embeddings=100)
    file = write_rows(
        tmp_path / "x.json", [{"conversations": [["Hi", "Hello"]]}, {"conversations": [["a " * 90, "A"]]}]
    )
    keys = {"model_name_or_path": str(tmp_path / "model"), "dataset": {"train": {"data_files": str(file)}}}
    done = run_here(config(folder, "long.json", **keys))
    assert done.returncode == 1
    assert re.search(r"x\.json:3 \(row 2\): the sample has \d+ tokens, but the model reads 100 at most", done.stdout)
    assert run_here(config(folder, "long.json", **keys, max_length=100)).returncode == 0


def test_a_picture_that_no_pass_could_take_is_not_sound(run_here, folder, tmp_path):
    tiny_folder(tmp_path / "model", image_aspect_ratio="pad")
    tall = tmp_path / "tall.png"
    Image.new("1", (100, 33000)).save(tall)
    file = write_rows(tmp_path / "x.json", [{"image": str(tall), "conversations": [["<image>", "A"]]}])
    keys = {"model_name_or_path": str(tmp_path / "model"), "dataset": {"train": {"data_files": str(file)}}}
    done = run_here(config(folder, "tall.json", **keys))
    assert done.returncode == 1 and f"x.json:2 (row 1): {tall} (100 x 33000 pixels) is too thin" in done.stdout, (
        done.stdout
    )


def test_rows_are_rendered_by_the_runs_template(run_here, folder, tmp_path):
    file = write_rows(tmp_path / "x.json", [{"conversations": [["Ask", "Answer"]]}])
    template = tmp_path / "chat_template.json"
    template.write_text('{"conversation": ["Q={{user}};", "A={{bot}}</s>"], "query": "Q={{query}};A="}')
    dataset = {"train": {"data_files": str(file), "chat_template": str(template)}, "eval": {"data_files": str(file)}}
    done = run_here(config(folder, "template.json", dataset=dataset), "--show", 1)
    assert done.stdout.count("Q=Ask;A=⟦Answer</s>⟧") == 2, done.stdout
    done = run_here(
        config(folder, "template.json", dataset={"train": {"data_files": str(file)}}, version="llava_v0"), "--show", 1
    )
    assert "###Human: Ask###Assistant:⟦ Answer###⟧" in done.stdout, done.stdout


def test_splits_that_the_run_needs(run_here, folder):
    done = run_here(config(folder, "eval.json", do_eval=True))
    assert done.returncode == 1 and "problem: do_eval is on, but dataset.eval names no file." in done.stdout
    done = run_here(config(folder, "eval.json", do_eval=False, evaluation_strategy="steps"))
    assert done.returncode == 0


def test_histograms_have_round_bins_that_hold_everything():
    for values in ([5], [0, 0, 0], list(range(7)), [1, 1000], [576] * 3 + [2880], list(range(0, 99_999, 7))):
        lines = list(histogram("numbers", values))
        assert 2 <= len(lines) <= 12
        assert sum(int(line.split()[-1]) for line in lines[1:]) == len(values)
    assert lines[0] == "  numbers: least 0, median 50001, most 99995"
    assert lines[1].split()[0] == "0–9999"
    assert list(histogram("numbers", [])) == []


def test_a_bad_chat_template_is_reported_with_the_rest(run_here, folder, tmp_path):
    template = tmp_path / "chat_template.json"
    template.write_text('{"conversation": ["{{user}}"]}')
    dataset = {"train": [{"data_files": "train.json", "chat_template": str(template)}]}
    done = run_here(config(folder, "template.json", dataset=dataset))
    assert done.returncode == 1
    assert f"files that can't be read: 1\n    {template}: conversation is" in done.stdout
