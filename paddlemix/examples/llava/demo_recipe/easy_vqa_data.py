"""Reads easy-VQA (PyPI ``easy-vqa``, MIT): 64 x 64 pictures of one shape, and questions with one-word answers."""

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.examples.llava.easy_vqa import package_data

__all__ = ["find_easy_vqa", "object_box", "object_labels", "question_type", "read_questions", "test_rows", "train_rows"]

COLORS = ("black", "gray", "red", "green", "blue", "yellow", "teal", "brown")
SHAPES = ("circle", "rectangle", "triangle")

Question = Tuple[str, str, int]  # question, answer, number of the picture


def find_easy_vqa(folder: Optional[str] = None) -> Path:
    """The folder that holds ``train/`` and ``test/``: the given one, or the installed package's."""
    if folder is None:
        return package_data()
    path = Path(folder)
    if not (path / "train" / "questions.json").is_file():
        raise UserError(f"{path} has no train/questions.json; easy_vqa names the data folder of the package easy-vqa.")
    return path


def read_questions(data: Path, split: str) -> List[Question]:
    """``split`` is train or test."""
    with open(data / split / "questions.json", encoding="utf-8") as file:
        return [tuple(item) for item in json.load(file)]


def question_type(question: str) -> str:
    """color, shape or exist, told from the question's first words."""
    words = question.lower().rstrip("?").split()
    if words[0] != "what":
        return "exist"
    return "color" if "color" in words else "shape"


def object_labels(questions: List[Question]) -> Dict[int, Dict[str, str]]:
    """What the questions and answers say about each picture: ``{7: {"color": "red", "shape": "circle"}}``.

    A question that names the shape says its colour in the answer, or the other way round; a negated question says what
    is there when it is answered "no".
    """
    labels: Dict[int, Dict[str, str]] = defaultdict(dict)
    for question, answer, picture in questions:
        words = question.lower().rstrip("?").split()
        facts = [answer]
        if words[0] == "what":
            facts += words
        elif (answer == "yes") != ("no" in words or "not" in words):
            facts += words
        for fact in facts:
            if fact in COLORS:
                labels[picture]["color"] = fact
            elif fact in SHAPES:
                labels[picture]["shape"] = fact
    return dict(labels)


def object_box(image: Image.Image) -> Tuple[float, float, float, float]:
    """Where the one shape is, as (left, top, right, bottom) in 0..1: what differs clearly from the background."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.int32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.median(border, axis=0)
    rows, columns = np.where(np.abs(pixels - background).sum(-1) > 60)
    height, width = pixels.shape[:2]
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


def test_rows(questions: List[Question]) -> List[Dict[str, Any]]:
    """One row per question of the test split; ``image`` is relative to easy-VQA's data folder."""
    return [
        {
            "image": f"test/images/{picture}.png",
            "question_type": question_type(question),
            "conversations": [[f"<image>\n{question}", answer]],
        }
        for question, answer, picture in questions
    ]


def train_rows(questions: List[Question], rounds: int, rng: random.Random) -> List[Dict[str, Any]]:
    """One row per picture of the train split, with at most ``rounds`` of its questions in random order."""
    asked: Dict[int, List[Question]] = defaultdict(list)
    for item in questions:
        asked[item[2]].append(item)
    rows = []
    for picture, items in sorted(asked.items()):
        turns = [[question, answer] for question, answer, _ in rng.sample(items, min(rounds, len(items)))]
        turns[0][0] = f"<image>\n{turns[0][0]}"
        rows.append({"image": f"train/images/{picture}.png", "conversations": turns})
    return rows
