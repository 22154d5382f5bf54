"""Writes the recipe's data: drawn pictures and the JSON files of stages 2 to 4 and of the tests."""

import json
import random
from pathlib import Path
from typing import Any, Dict, List, Sequence

from paddlemix.examples.llava.demo_recipe import easy_vqa_data, questions
from paddlemix.examples.llava.demo_recipe.languages import CHINESE, ENGLISH, Language
from paddlemix.examples.llava.demo_recipe.scenes import TEST_SEEDS, draw_scene, make_scene

__all__ = ["KINDS", "WORKED_OUT", "write_data", "write_rows", "write_test_scenes"]

# the tower's pictures have seeds from 0
ALIGN_SEED, INSTRUCT_SEED, QUESTIONS_SEED = 500_000_000, 600_000_000, 700_000_000
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
SENTENCES_KEPT = 0.4  # of those questions of stage 4 that want a sentence: most of its words are no news
OBJECTS = (1, 2, 3, 3, 3, 4, 4, 4, 4)  # of stage 4's scenes; the more there are, the more can be asked
# A list of boxes takes three times the tokens of any other Chinese answer, and teaches nothing that English lists don't.
CHINESE_KINDS = {kind: weight for kind, weight in KINDS.items() if kind != "list"}
CHINESE_SHARE = 0.12  # of the chats about scenes


def write_data(
    folder: Path,
    easy_vqa: Path,
    align_rows: int,
    instruct_scenes: int,
    instruct_easy: int,
    question_scenes: int,
    question_easy: int,
    seed: int,
) -> None:
    """Writes the JSON files of stages 2 (``align``), 3 (``instruct``) and 4 (``questions``) and of the tests, and ``images/``.

    Args:
        easy_vqa: easy-VQA's data folder; rows name its pictures by absolute path.
        align_rows: scenes with a dense caption, for stage 2.
        instruct_scenes: chats about scenes, for stage 3.
        instruct_easy: chats about easy-VQA's train pictures, for stage 3.
        question_scenes, question_easy: the same for stage 4.
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
        say, kinds = (CHINESE, CHINESE_KINDS) if rng.random() < CHINESE_SHARE else (ENGLISH, KINDS)
        rounds = questions.conversation(scene, ROUNDS, rng, kinds, say)
        instruct.append(questions.to_row(f"images/{scene.seed}.png", rounds))
    easy = easy_vqa_data.train_rows(easy_vqa_data.read_questions(easy_vqa, "train"), ROUNDS, rng)
    instruct += [_absolute(row, easy_vqa) for row in rng.sample(easy, min(instruct_easy, len(easy)))]
    rng.shuffle(instruct)
    write_rows(folder / "instruct.json", instruct)

    rng = random.Random(f"questions-{seed}")
    asked = [_asked_much(images, QUESTIONS_SEED + number, rng) for number in range(question_scenes)]
    asked += [_absolute(row, easy_vqa) for row in rng.sample(easy, min(question_easy, len(easy)))]
    rng.shuffle(asked)
    write_rows(folder / "questions.json", asked)

    test = easy_vqa_data.test_rows(easy_vqa_data.read_questions(easy_vqa, "test"))
    random.Random("easy-vqa-test").shuffle(test)  # so that the first N rows are a fair sample
    write_rows(folder / "easy_vqa_test.json", [_absolute(row, easy_vqa) for row in test])
    write_test_scenes(folder, "scenes_test.json", ENGLISH, TEST_SEEDS)
    write_test_scenes(folder, "scenes_test_zh.json", CHINESE, TEST_SEEDS[:CHINESE_TESTS])


def _asked_much(images: Path, seed: int, rng: random.Random) -> Dict[str, Any]:
    """A chat of stage 4 about a scene, which is drawn into ``images``."""
    scene = make_scene(seed, rng.choice(OBJECTS))
    draw_scene(scene).save(images / f"{seed}.png")
    rounds = questions.conversation(scene, ROUNDS, rng, WORKED_OUT, sentences=SENTENCES_KEPT)
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
    """One row per line inside a JSON array, as errors name lines; a file that is there is whole."""
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    aside = path.with_suffix(".partial")
    aside.write_text(f"[\n{body}\n]\n", encoding="utf-8")
    aside.replace(path)
