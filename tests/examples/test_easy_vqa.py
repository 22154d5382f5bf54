"""The converter on the published set, as a user runs it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from paddlemix.examples.llava.easy_vqa import package_data

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "paddlemix" / "examples" / "llava" / "easy_vqa.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("easy_vqa")
    done = run("--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def rows_of(folder, split):
    return json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))


def test_all_questions_of_both_splits_are_there(whole):
    folder, said = whole
    assert "4000 rows, 38575 questions about 4000 pictures" in said
    assert "9673 rows, 9673 questions about 1000 pictures" in said
    answers = set((package_data() / "answers.txt").read_text().split())
    for split, count in (("train", 38_575), ("test", 9_673)):
        published = json.loads((package_data() / split / "questions.json").read_text())
        written = Counter()
        for row in rows_of(folder, split):
            for number, (question, answer) in enumerate(row["conversations"]):
                if number == 0:
                    assert question.startswith("<image>\n")
                    question = question[len("<image>\n") :]
                    question, prompt = question.split("\n")
                    assert prompt == "Answer the question using a single word or phrase."
                assert answer in answers
                written[question, answer, int(row["image"].split("/")[-1].split(".")[0])] += 1
        assert written == Counter(map(tuple, published)) and sum(written.values()) == count


def test_pictures_are_copied(whole):
    folder, _ = whole
    for split, count in (("train", 4000), ("test", 1000)):
        named = {row["image"] for row in rows_of(folder, split)}
        assert len(named) == len(list((folder / "images" / split).iterdir())) == count
        first = sorted(named)[0]
        assert Image.open(folder / first).size == (64, 64)
        original = package_data() / split / "images" / first.split("/")[-1]
        assert (folder / first).read_bytes() == original.read_bytes()


def test_rounds_and_limit(tmp_path):
    done = run("--output_dir", tmp_path, "--rounds", 3, "--test_rounds", 2, "--limit", 10)
    assert done.returncode == 0, done.stderr
    train, test = rows_of(tmp_path, "train"), rows_of(tmp_path, "test")
    assert len(train) == len(test) == 10
    assert max(len(row["conversations"]) for row in train) == 3
    assert max(len(row["conversations"]) for row in test) == 2
    assert len(list((tmp_path / "images" / "train").iterdir())) == len({row["image"] for row in train}) < 10


@pytest.mark.parametrize(
    "arguments, message", [(["--rounds", "-1"], "--rounds and --test_rounds"), (["--limit", "0"], "--limit")]
)
def test_wrong_arguments(tmp_path, arguments, message):
    done = run("--output_dir", tmp_path, *arguments)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    done = run("--output_dir", tmp_path / "file")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path}") and "can't be written" in done.stderr


def test_without_the_package_it_says_how_to_get_it(tmp_path):
    """An interpreter that sees this project and nothing that is installed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from paddlemix.examples.llava.easy_vqa import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, "--output_dir", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "error: The package easy-vqa isn't installed; run: pip install easy-vqa==1.0\n"
