"""Scores of generated answers: exact match after VQA normalisation, boxes by overlap, captions by the facts they name."""

from paddlemix.evaluation.captions import fact_recall
from paddlemix.evaluation.grounding import find_box, iou
from paddlemix.evaluation.vqa import exact_match, normalize_answer

__all__ = ["exact_match", "fact_recall", "find_box", "iou", "normalize_answer"]
