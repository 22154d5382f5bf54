"""Writes the recipe's data: drawn pictures and the JSON files of stages 2 to 5 and of the tests."""

import json
import random
from pathlib import Path
from typing import Any, Dict, List, Sequence

from paddlemix.examples.llava.demo_recipe import easy_vqa_data, questions
from paddlemix.examples.llava.demo_recipe.languages import CHINESE, ENGLISH, Language
from paddlemix.examples.llava.demo_recipe.scenes import TEST_SEEDS, draw_scene, make_scene

__all__ = ["KINDS", "WORKED_OUT", "write_data", "write_relations", "write_rows", "write_test_scenes"]

# the tower's pictures have seeds from 0
ALIGN_SEED, INSTRUCT_SEED, QUESTIONS_SEED, RELATIONS_SEED = 500_000_000, 600_000_000, 700_000_000, 800_000_000
ROUNDS = 12
CHINESE_TESTS = 100  # scenes that are asked about in Chinese, too
# How often a chat asks each kind; those that need more than reading off one object are asked more.
KINDS = {
    "exist": 3,
    "color": 1,
    "shape": 1,
    "size": 1.5,
    "count": 3,
    "position": 2,
    "relation": 4,
    "box": 1.5,
    "region": 1.5,
    "caption": 1.5,
    "list": 0.5,
}
# Stage 4 asks for what has to be worked out, and for the rest as often as keeps it.
WORKED_OUT = {
    "exist": 3,
    "color": 0.7,
    "shape": 0.8,
    "size": 0.7,
    "count": 4,
    "position": 2,
    "relation": 6,
    "box": 0.4,
    "region": 0.8,
    "caption": 0.3,
    "list": 0.3,
}
# Stage 5 asks where objects are of each other, above all on the axis that their order in the table doesn't tell.
RELATIONS = {
    questions.LEFT_OR_RIGHT: 12,
    "relation": 3,
    "position": 0.5,
    "count": 0.5,
    "exist": 0.3,
}
RELATIONS_SHARE = 0.75  # of stage 5's chats; the others are stage 4's
RELATIONS_ROUNDS = 6  # few pairs of a scene lie apart; more rounds would ask other things
TEXT_BEHIND = 0.1  # of stage 5's chats end in a question about something else
SENTENCES_KEPT = 0.4  # of those questions of stage 4 that want a sentence: most of its words are no news
OBJECTS = (1, 2, 3, 3, 3, 4, 4, 4, 4)  # of stage 4's scenes; the more there are, the more can be asked
OBJECTS_RELATED = (2, 3, 3, 4, 4, 4)  # of those of stage 5's that ask for relations
# A list of boxes takes three times the tokens of any other Chinese answer, and teaches nothing that English lists don't.
CHINESE_KINDS = {kind: weight for kind, weight in KINDS.items() if kind != "list"}


def write_data(
    folder: Path,
    easy_vqa: Path,
    align_rows: int,
    instruct_scenes: int,
    instruct_easy: int,
    question_scenes: int,
    question_easy: int,
    chinese: float,
    seed: int,
) -> None:
    """Writes the JSON files of stages 2 (``align``), 3 (``instruct``) and 4 (``questions``) and of the tests, and ``images/``.

    Args:
        easy_vqa: easy-VQA's data folder; rows name its pictures by absolute path.
        align_rows: scenes with a dense caption, for stage 2.
        instruct_scenes: chats about scenes, for stage 3.
        instruct_easy: chats about easy-VQA's train pictures, for stage 3.
        question_scenes, question_easy: the same for stage 4.
        chinese: share of stage 3's chats about scenes that are in Chinese.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    align = []
    for number in range(align_rows):
        scene = make_scene(ALIGN_SEED + number)
        draw_scene(scene).save(images / f"{scene.seed}.png")
        align.append(
            {"image": f"images/{scene.seed}.png", "conversations": [["<image>", questions.dense_caption(scene)]]}
        )
    write_rows(folder / "align.json", align)

    rng = random.Random(f"instruct-{seed}")
    instruct = []
    for number in range(instruct_scenes):
        scene = make_scene(INSTRUCT_SEED + number)
        draw_scene(scene).save(images / f"{scene.seed}.png")
        say, kinds = (CHINESE, CHINESE_KINDS) if rng.random() < chinese else (ENGLISH, KINDS)
        rounds = questions.conversation(scene, ROUNDS, rng, kinds, say)
        instruct.append(questions.to_row(f"images/{scene.seed}.png", rounds))
    easy = easy_vqa_data.train_rows(easy_vqa_data.read_questions(easy_vqa, "train"), ROUNDS, rng)
    instruct += [_absolute(row, easy_vqa) for row in rng.sample(easy, min(instruct_easy, len(easy)))]
    rng.shuffle(instruct)
    write_rows(folder / "instruct.json", instruct)

    rng = random.Random(f"questions-{seed}")
    asked = [_asked_much(images, QUESTIONS_SEED + number, rng, WORKED_OUT, ROUNDS) for number in range(question_scenes)]
    asked += [_absolute(row, easy_vqa) for row in rng.sample(easy, min(question_easy, len(easy)))]
    rng.shuffle(asked)
    write_rows(folder / "questions.json", asked)

    test = easy_vqa_data.test_rows(easy_vqa_data.read_questions(easy_vqa, "test"))
    random.Random("easy-vqa-test").shuffle(test)  # so that the first N rows are a fair sample
    write_rows(folder / "easy_vqa_test.json", [_absolute(row, easy_vqa) for row in test])
    write_test_scenes(folder, "scenes_test.json", ENGLISH, TEST_SEEDS)
    write_test_scenes(folder, "scenes_test_zh.json", CHINESE, TEST_SEEDS[:CHINESE_TESTS])


def write_relations(
    folder: Path, scenes: int, easy_vqa: Path, easy: int, text: List[Dict[str, Any]], seed: int
) -> None:
    """Writes the JSON file of stage 5, ``relations``, and its pictures.

    Args:
        scenes: chats about scenes.
        easy: chats about easy-VQA's train pictures.
        text: the decoder's own answers to questions without a picture; a chat in ten ends in one of them.
    """
    rng = random.Random(f"relations-{seed}")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(scenes):
        much = (RELATIONS, RELATIONS_ROUNDS) if rng.random() < RELATIONS_SHARE else (WORKED_OUT, ROUNDS)
        row = _asked_much(images, RELATIONS_SEED + number, rng, *much)
        if rng.random() < TEXT_BEHIND:
            row["conversations"] += rng.choice(text)["conversations"]
        rows.append(row)
    easy_rows = easy_vqa_data.train_rows(easy_vqa_data.read_questions(easy_vqa, "train"), ROUNDS, rng)
    rows += [_absolute(row, easy_vqa) for row in rng.sample(easy_rows, min(easy, len(easy_rows)))]
    rng.shuffle(rows)
    write_rows(folder / "relations.json", rows)


def _asked_much(images: Path, seed: int, rng: random.Random, kinds: Dict[str, float], most: int) -> Dict[str, Any]:
    """A chat of stage 4 or 5 about a scene, which is drawn into ``images``."""
    scene = make_scene(seed, rng.choice(OBJECTS if kinds is WORKED_OUT else OBJECTS_RELATED))
    draw_scene(scene).save(images / f"{seed}.png")
    rounds = questions.conversation(scene, most, rng, kinds, sentences=SENTENCES_KEPT)
    rounds = rounds or [questions.ask("exist", rng, scene)]  # no two objects lie apart
    return questions.to_row(f"images/{seed}.png", rounds)


def write_test_scenes(folder: Path, name: str, say: Language, seeds: Sequence[int]) -> None:
    """A test file and its pictures: a question of each kind about each scene."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    kinds = KINDS if say is ENGLISH else CHINESE_KINDS
    for seed in seeds:
        scene = make_scene(seed)
        draw_scene(scene).save(folder / "images" / f"{seed}.png")
        rows += [row for row in questions.test_rows(f"images/{seed}.png", scene, say) if row["question_type"] in kinds]
    write_rows(folder / name, rows)


def _absolute(row: Dict[str, Any], folder: Path) -> Dict[str, Any]:
    return {**row, "image": str(folder.absolute() / row["image"])}


def write_rows(path: Path, rows: List[Dict[str, Any]]) -> None:
    """One row per line inside a JSON array, as errors name lines; a file that is there is whole, and left alone if it holds
    the same, since a training that goes on asks whether its data changed."""
    text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    aside = path.with_suffix(".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
