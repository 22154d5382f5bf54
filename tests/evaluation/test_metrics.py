"""The scores of generated answers, on cases worked by hand."""

import pytest

from paddlemix.evaluation import exact_match, fact_recall, find_box, iou, normalize_answer


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("Yes.", "yes"),
        ("A red Circle", "red circle"),
        ("the  two\ndogs", "2 dogs"),
        ("None", "0"),
        ("dont know!", "don't know"),
        ("1,000", "1000"),
        ("0.5", "0.5"),
        ("black/white", "black white"),
        ("it's 3.", "it's 3"),
        ("", ""),
    ],
)
def test_answers_are_normalized_as_the_vqa_challenge_does(answer, normal):
    assert normalize_answer(answer) == normal


def test_exact_match_is_about_the_whole_answer():
    assert exact_match("The Circle.", "circle")
    assert not exact_match("circle and star", "circle")


@pytest.mark.parametrize(
    "answer, box",
    [
        ("0.23, 0.33, 0.79, 0.78", (0.23, 0.33, 0.79, 0.78)),
        ("It is at [0.1,0.2,0.5,1.0].", (0.1, 0.2, 0.5, 1.0)),
        ("3, 4, 5, 6 and 0.1, 0.2, 0.3, 0.4", (0.1, 0.2, 0.3, 0.4)),
        ("0.1, 0.2, 0.3", None),
        ("0.1, 0.2, 0.3, 0.4, 0.5", None),
        ("no", None),
    ],
)
def test_a_box_is_found_in_an_answer(answer, box):
    assert find_box(answer) == box


def test_overlap_of_boxes():
    box = (0.0, 0.0, 0.5, 0.5)
    assert iou(box, box) == 1.0
    assert iou(box, (0.25, 0.0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert iou(box, (0.5, 0.5, 1.0, 1.0)) == 0.0
    assert iou(box, None) == 0.0
    assert iou((0.5, 0.5, 0.0, 0.0), box) == 0.0, "a box turned inside out overlaps nothing"


def test_a_caption_is_scored_by_the_facts_it_names():
    said = "The picture shows a small red circle, and a large blue star."
    assert fact_recall(said, ["red circle", "blue star"]) == 1.0
    assert fact_recall(said, ["red circle", "red star"]) == 0.5
    assert fact_recall("hundred circles", ["red circle"]) == 0.0


def test_facts_in_other_languages_with_spaces_are_words_too():
    assert fact_recall("A Café and a red circle.", ["Café", "red circle"]) == 1.0
    assert fact_recall("Ein Grüner Kreis.", ["grüner Kreis"]) == 1.0
    assert fact_recall("das sind die grünen", ["grün"]) == 0.0
    assert fact_recall("これは赤い丸です", ["赤い丸"]) == fact_recall("빨간 원이 있습니다", ["빨간 원"]) == 1.0


def test_facts_in_lists_and_in_chinese():
    listed = "small red circle: 0.10, 0.10, 0.30, 0.30; large blue star: 0.50, 0.50, 0.90, 0.90"
    assert fact_recall(listed, ["red circle", "blue star", "red star"]) == 2 / 3
    assert fact_recall("图中有一个小红色圆形和一个大蓝色星形。", ["红色圆形", "红色星形"]) == 0.5


@pytest.mark.parametrize(
    "prediction, reference, same",
    [
        ("", "A", False),
        ("the", "A", False),
        ("A.", "a", True),
        ("A dog", "A", False),
        ("!", "?", False),
        ("?", " ? ", True),
    ],
)
def test_answers_of_which_normalisation_leaves_nothing_are_compared_as_they_are(prediction, reference, same):
    assert exact_match(prediction, reference) is same


def test_facts_of_which_normalisation_leaves_nothing():
    assert fact_recall("", ["the"]) == fact_recall("cat", ["the"]) == fact_recall("cat", ["!"]) == 0.0
    assert fact_recall("The cat.", ["the"]) == fact_recall("the letter A", ["a"]) == 1.0
    assert fact_recall("", [""]) == 0.0
