"""What a description names of what is known to be in the picture."""

from typing import Sequence

from paddlemix.evaluation.vqa import normalize_answer

__all__ = ["fact_recall"]


def fact_recall(prediction: str, facts: Sequence[str]) -> float:
    """Share of ``facts`` (phrases such as "red circle") that stand in the prediction, word for word after normalisation; a
    fact in a script without spaces between words may stand anywhere.

    >>> fact_recall("A small red circle and a star.", ["red circle", "blue star"])
    0.5
    """
    if not facts:
        raise ValueError("facts is empty: there is nothing that the description could name")
    # VQA's normalisation leaves a colon at its word, as in "red circle: 0.10, …"
    said = f" {normalize_answer(prediction.replace(':', ' '))} "
    return sum((f" {normalize_answer(fact)} " if fact.isascii() else fact) in said for fact in facts) / len(facts)
