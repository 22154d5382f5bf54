"""Writes the published easy-VQA set (Victor Zhou, MIT; PyPI ``easy-vqa``) in the toolkit's row form.

    pip install easy-vqa==1.0
    python paddlemix/examples/llava/easy_vqa.py --output_dir data/easy_vqa

gives ``train.json`` (38 575 questions about 4 000 pictures), ``test.json`` (9 673 about 1 000) and ``images/``.
A row holds questions about one picture, as LLaVA-1.5 builds its VQA data: the first question follows ``<image>`` and
is followed by the prompt that asks for a short answer, the others stand alone. Questions and answers are left as they
were published, so an exact match with the 13 answers can be counted.
"""

import argparse
import json
import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Dict, List, Optional, Sequence

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from paddlemix.errors import UserError
from paddlemix.tools.command_line import exit_status

PROMPT = "Answer the question using a single word or phrase."  # LLaVA-1.5's prompt for short answers


def package_data() -> Path:
    """The folder with ``train`` and ``test`` inside the installed package.

    It is asked of the installed distribution: this script has the package's name, and would find itself on sys.path.
    """
    try:
        folder = Path(str(distribution("easy-vqa").locate_file("easy_vqa/data")))
    except PackageNotFoundError:
        raise UserError("The package easy-vqa isn't installed; run: pip install easy-vqa==1.0") from None
    if not (folder / "train" / "questions.json").is_file():
        raise UserError(f"{folder} lacks the questions; run: pip install --force-reinstall easy-vqa==1.0")
    return folder


def make_rows(questions: Sequence[Sequence], split: str, rounds: int) -> List[dict]:
    """Rows of the toolkit's form, ordered by picture and, within one, as the questions were published.

    Args:
        questions: (question, answer, number of the picture).
        split: names the folder of pictures, ``images/<split>/<number>.png``.
        rounds: questions in one row at most; 0 for all of a picture.

    >>> make_rows([("is it red?", "no", 7)], "test", 1)[0]["conversations"]
    [['<image>\\nis it red?\\nAnswer the question using a single word or phrase.', 'no']]
    """
    by_picture: Dict[int, list] = {}
    for question, answer, picture in questions:
        by_picture.setdefault(picture, []).append([question, answer])
    rows = []
    for picture, asked in sorted(by_picture.items()):
        size = rounds or len(asked)
        for start in range(0, len(asked), size):
            (question, answer), *others = asked[start : start + size]
            conversations = [[f"<image>\n{question}\n{PROMPT}", answer], *others]
            rows.append({"image": f"images/{split}/{picture}.png", "conversations": conversations})
    return rows


def convert(source: Path, output_dir: Path, split: str, rounds: int, limit: Optional[int]) -> str:
    """Writes one split with the pictures that its rows name; returns a line that says what was written."""
    questions = json.loads((source / split / "questions.json").read_text(encoding="utf-8"))
    rows = make_rows(questions, split, rounds)[:limit]
    images = output_dir / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    pictures = sorted({row["image"] for row in rows})
    for picture in pictures:
        shutil.copyfile(source / split / "images" / Path(picture).name, output_dir / picture)
    path = output_dir / f"{split}.json"
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)  # one row per line, as errors name lines
    path.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    asked = sum(len(row["conversations"]) for row in rows)
    return f"{path}: {len(rows)} rows, {asked} questions about {len(pictures)} pictures"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to; made if it isn't there")
    parser.add_argument(
        "--rounds", type=int, default=0, help="questions in a row of train.json at most [0: all of a picture]"
    )
    parser.add_argument("--test_rounds", type=int, default=1, help="the same for test.json [1: each question alone]")
    parser.add_argument("--limit", type=_positive, default=None, help="rows of each file at most [all]")
    options = parser.parse_args(arguments)

    def work() -> int:
        if min(options.rounds, options.test_rounds) < 0:
            raise UserError("--rounds and --test_rounds are 0 (all questions of a picture) or more.")
        source, output_dir = package_data(), Path(os.path.expanduser(options.output_dir))
        for split, rounds in (("train", options.rounds), ("test", options.test_rounds)):
            print(convert(source, output_dir, split, rounds, options.limit))
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
