"""Writes the recipe's data: drawn pictures and the JSON files of stages 2 to 7 and of the tests."""

import json
import random
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from paddlemix.examples.llava.demo_recipe import easy_vqa_data, questions
from paddlemix.examples.llava.demo_recipe.languages import CHINESE, ENGLISH, Language
from paddlemix.examples.llava.demo_recipe.scenes import TEST_SEEDS, draw_scene, make_scene

__all__ = ["KINDS", "PLANS", "Plan", "write_chats", "write_data", "write_rows", "write_test_scenes"]

# the tower's pictures have seeds from 0
ALIGN_SEED, INSTRUCT_SEED = 500_000_000, 600_000_000
ROUNDS = 12
CHINESE_TESTS = 100  # scenes that are asked about in Chinese, too
# How often a chat of stage 3 asks each kind; those that need more than reading off one object are asked more. Which side one
# object is of another has the form of two sides to choose from: yes and no to the same, asked beside it, keep both from
# being learned.
KINDS = {
    "exist": 3,
    "color": 1,
    "shape": 1,
    "size": 1.5,
    "count": 3,
    "position": 2,
    "side": 4,
    "box": 1.5,
    "region": 1.5,
    "caption": 1.5,
    "list": 0.5,
}
# A list of boxes takes three times the tokens of any other Chinese answer, and teaches nothing that English lists don't.
CHINESE_KINDS = {kind: weight for kind, weight in KINDS.items() if kind != "list"}
# The later stages ask for what has to be worked out, and for the rest as often as keeps it.
WORKED_OUT = {
    "exist": 5,
    "count": 5,
    "position": 2,
    "size": 0.7,
    "region": 0.6,
    "color": 0.5,
    "shape": 0.5,
    "box": 0.25,
    "caption": 0.2,
    "list": 0.2,
}


class Plan(NamedTuple):
    """What the chats of a later stage are about.

    Attributes:
        share: of the chats, 0 to 1, that ask about nothing but where two objects are of each other.
        related: how often each kind is asked in those.
        other: the same in the other chats.
        seed: of the first scene.
    """

    share: float
    related: Dict[str, float]
    other: Dict[str, float]
    seed: int


# Yes and no to a relation turn with the question's own word, which is hard to begin to learn while both words are asked
# alike: neither word nor side alone says anything about the answer. So the sides come first, then yes and no with one word of
# an axis three times as often as the other, and then both alike. Left and right are asked more, as the order of the table
# tells above from below. A decoder that is asked so much of one thing loses some of the others, which the last stage brings back.
WORDS_ALIKE = {questions.LEFT: 4, questions.RIGHT: 4, questions.ABOVE: 1, questions.BELOW: 1}
PLANS = {
    "sides": Plan(
        0.65,
        {questions.LEFT_OR_RIGHT: 8, questions.ABOVE_OR_BELOW: 3},
        {**WORKED_OUT, "side": 3},
        700_000_000,
    ),
    "relations": Plan(
        0.65,
        {
            questions.LEFT: 6,
            questions.RIGHT: 2,
            questions.ABOVE: 1.8,
            questions.BELOW: 0.6,
            questions.LEFT_OR_RIGHT: 1.5,
        },
        {**WORKED_OUT, questions.LEFT: 1.2, questions.RIGHT: 0.4, questions.ABOVE: 0.6, questions.BELOW: 0.2},
        750_000_000,
    ),
    "balance": Plan(0.65, WORDS_ALIKE, {**WORKED_OUT, "relation": 2}, 800_000_000),
    "rest": Plan(
        0.2,
        {**WORDS_ALIKE, questions.LEFT_OR_RIGHT: 1.5, questions.ABOVE_OR_BELOW: 0.5},
        {**WORKED_OUT, "region": 1.5, "relation": 2, "side": 1},
        850_000_000,
    ),
}
RELATED_ROUNDS, OTHER_ROUNDS = 8, 16
TEXT_BEHIND = 0.1  # of a later stage's chats end in a question about something else
SENTENCES_KEPT = 0.4  # of their questions that want a sentence: most of its words are no news
RELATED_OBJECTS = (2, 3, 4, 4, 4, 4)  # of the scenes of chats about relations: more objects, more pairs
OTHER_OBJECTS = (1, 2, 3, 3, 3, 4, 4, 4, 4)  # of the others; the more there are, the more can be asked


def write_data(
    folder: Path,
    easy_vqa: Path,
    align_rows: int,
    instruct_scenes: int,
    instruct_easy: int,
    chinese: float,
    seed: int,
) -> None:
    """Writes the JSON files of stages 2 (``align``) and 3 (``instruct``) and of the tests, and ``images/``.

    Args:
        easy_vqa: easy-VQA's data folder; rows name its pictures by absolute path.
        align_rows: scenes with a dense caption, for stage 2.
        instruct_scenes: chats about scenes, for stage 3.
        instruct_easy: chats about easy-VQA's train pictures, for stage 3.
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

    test = easy_vqa_data.test_rows(easy_vqa_data.read_questions(easy_vqa, "test"))
    random.Random("easy-vqa-test").shuffle(test)  # so that the first N rows are a fair sample
    write_rows(folder / "easy_vqa_test.json", [_absolute(row, easy_vqa) for row in test])
    write_test_scenes(folder, "scenes_test.json", ENGLISH, TEST_SEEDS)
    write_test_scenes(folder, "scenes_test_zh.json", CHINESE, TEST_SEEDS[:CHINESE_TESTS])


def write_chats(
    folder: Path, stage: str, scenes: int, easy_vqa: Path, easy: int, text: List[Dict[str, Any]], seed: int
) -> None:
    """Writes the JSON file of a later stage, and its pictures.

    Args:
        stage: one of ``PLANS``; names the file, too.
        scenes: chats about scenes.
        easy: chats about easy-VQA's train pictures.
        text: the decoder's own answers to questions without a picture; a chat in ten ends in one of them.
    """
    plan, rng = PLANS[stage], random.Random(f"{stage}-{seed}")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(plan.seed, plan.seed + scenes):
        related = rng.random() < plan.share
        scene = make_scene(number, rng.choice(RELATED_OBJECTS if related else OTHER_OBJECTS))
        draw_scene(scene).save(images / f"{number}.png")
        kinds, most = (plan.related, RELATED_ROUNDS) if related else (plan.other, OTHER_ROUNDS)
        rounds = questions.conversation(scene, most, rng, kinds, sentences=SENTENCES_KEPT)
        rounds = rounds or [questions.ask("exist", rng, scene)]  # no two objects lie apart
        row = questions.to_row(f"images/{number}.png", rounds)
        if rng.random() < TEXT_BEHIND:
            row["conversations"] += rng.choice(text)["conversations"]
        rows.append(row)
    easy_rows = easy_vqa_data.train_rows(easy_vqa_data.read_questions(easy_vqa, "train"), ROUNDS, rng)
    rows += [_absolute(row, easy_vqa) for row in rng.sample(easy_rows, min(easy, len(easy_rows)))]
    rng.shuffle(rows)
    write_rows(folder / f"{stage}.json", rows)


def write_test_scenes(folder: Path, name: str, say: Language, seeds: Sequence[int]) -> None:
    """A test file and its pictures: a question of each kind about each scene."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        scene = make_scene(seed)
        draw_scene(scene).save(folder / "images" / f"{seed}.png")
        made = questions.test_rows(f"images/{seed}.png", scene, say)
        rows += [row for row in made if say is ENGLISH or row["question_type"] in CHINESE_KINDS]
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
