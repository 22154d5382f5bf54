"""Boxes in an answer: found in its text, drawn on the picture.

A box is x1, y1, x2, y2 with x to the right and y downwards; in text normalised to 0..1 of what the model sees, as
LLaVA is trained to write it. ``LlavaImageProcessor.undo_box`` takes those to pixels of the picture.
"""

import re
from typing import List, Sequence, Tuple

from PIL import Image, ImageDraw

__all__ = ["draw_boxes", "parse_boxes"]

Box = Tuple[float, float, float, float]

_NUMBER = r"-?(?:\d+\.\d*|\.\d+|\d+)"
_GAP = r"(?:\s*[,;，；、]\s*|\s+)"
# a list of numbers in brackets, also a pair of corners: [a, b, c, d], (a, b), (c, d)
_RUN = re.compile(rf"(?<![\w.%]){_NUMBER}(?:[\])]?{_GAP}[\[(]?{_NUMBER})*(?!\.?\w|%|°)")
_BARE_GAP = re.compile(r"(?<![\s,;，；、])\s+(?![\s,;，；、])")
_LIST_NUMBER = re.compile(r"^[ \t]*\d{1,3}[.)](?=[ \t])", re.MULTILINE)  # the 2. before the second entry of a list
_BRACKETED = re.compile(rf"[\[(]\s*({_NUMBER}(?:{_GAP}{_NUMBER}){{3}})\s*[,;]?\s*[\])]")

# distinct on photographs, also for most colour-blind eyes (Okabe and Ito)
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#F0E442", "#CC79A7", "#56B4E9", "#E69F00")


def parse_boxes(text: str) -> List[Box]:
    """The boxes in a text, in order.

    Four numbers in brackets are a box, and so is a bare run of four, eight, … numbers of which one at least has a
    decimal point. Numbers outside 0..1 (pixels, say) and corners in the wrong order are no box; the number before an entry
    of a list isn't part of one, nor is one that a mere space parts from numbers with commas (``2 0.1, 0.2, 0.5, 0.6``).

    >>> parse_boxes("The cat is at [0.23, 0.33, 0.79, 0.78].")
    [(0.23, 0.33, 0.79, 0.78)]
    """
    found: List[Tuple[int, Box]] = []

    def add(start: int, numbers: Sequence[str]) -> None:
        for index in range(0, len(numbers), 4):
            x1, y1, x2, y2 = (float(number) for number in numbers[index : index + 4])
            if 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1:
                found.append((start + index, (x1, y1, x2, y2)))

    def take_bracketed(match: "re.Match[str]") -> str:
        add(match.start(), re.findall(_NUMBER, match[1]))
        return "|" * len(match[0])  # keeps the places of the rest, and parts what stood around it

    rest = _LIST_NUMBER.sub(lambda match: "|" * len(match[0]), text)
    rest = _BRACKETED.sub(take_bracketed, rest)
    for match in _RUN.finditer(rest):
        whole = len(re.findall(_NUMBER, match[0])) % 4 == 0
        place = match.start()
        for part in [match[0]] if whole else _BARE_GAP.split(match[0]):
            numbers = re.findall(_NUMBER, part)
            if len(numbers) % 4 == 0 and any("." in number for number in numbers):
                add(place, numbers)
            place += len(part) + 1
    return [box for _, box in sorted(found, key=lambda item: item[0])]


def draw_boxes(image: Image.Image, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """A copy of the picture with an outline, each in its own colour, around each box (pixels: x1, y1, x2, y2)."""
    image = image.convert("RGB") if image.mode != "RGB" else image.copy()
    draw = ImageDraw.Draw(image)
    width = max(2, round(min(image.size) / 150))
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        left, right = sorted((x1, x2))
        top, bottom = sorted((y1, y2))
        # a box that ends at the picture's edge ends on its last pixel
        corners = (left, top, min(right, image.width - 1), min(bottom, image.height - 1))
        draw.rectangle(
            (min(corners[0], corners[2]), min(corners[1], corners[3]), corners[2], corners[3]),
            outline=_COLOURS[index % len(_COLOURS)],
            width=width,
        )
    return image
