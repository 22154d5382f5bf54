"""Boxes in answers, (left, top, right, bottom) in 0..1 of the picture's sides, and their overlap."""

import re
from typing import Optional, Tuple

from paddlemix.processors.boxes import parse_boxes

__all__ = ["find_box", "iou", "is_box"]

Box = Tuple[float, float, float, float]


def find_box(answer: str) -> Optional[Box]:
    """The first box of the answer, or None.

    >>> find_box("It is at [0.10, 0.20, 0.50, 0.60].")
    (0.1, 0.2, 0.5, 0.6)
    """
    boxes = parse_boxes(answer)
    return boxes[0] if boxes else None


def is_box(answer: str) -> bool:
    """Whether the answer is one box and nothing else but brackets."""
    return len(parse_boxes(answer)) == 1 and re.fullmatch(r"[\d\s.,()\[\]]+", answer) is not None


def iou(one: Optional[Box], other: Optional[Box]) -> float:
    """Area of the intersection over that of the union; 0 where a box is missing, empty or turned inside out."""
    if one is None or other is None:
        return 0.0

    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    shared = area((max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])))
    union = area(one) + area(other) - shared
    return shared / union if area(one) > 0 and area(other) > 0 else 0.0
