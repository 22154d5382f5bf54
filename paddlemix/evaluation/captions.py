"""What a description names of what is known to be in the picture."""

import re
from typing import Sequence

from paddlemix.evaluation.vqa import normalize_answer, with_articles

__all__ = ["fact_recall"]

# scripts without spaces between words, or with endings at them: Thai, Lao, Burmese, Khmer, Hangul, kana, Chinese characters
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1100-\u11ff\u3040-\u30ff\uac00-\ud7af\uff66-\uff9f\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]"
)


def fact_recall(prediction: str, facts: Sequence[str]) -> float:
    """Share of ``facts`` (phrases such as "red circle") that stand in the prediction, word for word after normalisation; a
    fact in a script without spaces between words, or with endings at them, as Korean, may stand anywhere.

    >>> fact_recall("A small red circle and a star.", ["red circle", "blue star"])
    0.5
    """
    if not facts:
        raise ValueError("facts is empty: there is nothing that the description could name")
    # VQA's normalisation leaves a colon at its word, as in "red circle: 0.10, …"
    prediction = prediction.replace(":", " ")

    def named(fact: str) -> bool:
        normalize = normalize_answer if normalize_answer(fact) else with_articles  # "the" and "!" are facts too
        fact, said = normalize(fact), f" {normalize(prediction)} "
        return bool(fact) and (fact if UNSPACED.search(fact) else f" {fact} ") in said

    return sum(map(named, facts)) / len(facts)
