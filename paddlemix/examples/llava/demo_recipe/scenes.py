"""Drawn pictures whose content is known: a few flat shapes of different size and colour on a pale ground.

A scene is made from a seed alone, so a data set is a list of seeds. Seeds below ``TEST_SEEDS.start`` are for training;
the pictures of the test set are drawn from ``TEST_SEEDS`` and never occur in training.
"""

import math
import random
from dataclasses import dataclass
from typing import List, Optional, Tuple

from PIL import Image, ImageDraw

__all__ = [
    "COLORS",
    "COLUMNS",
    "MOST",
    "ROWS",
    "SHAPES",
    "SIZES",
    "TEST_SEEDS",
    "Scene",
    "SceneObject",
    "draw_scene",
    "make_scene",
    "ninth_of",
    "part_name",
]

Box = Tuple[float, float, float, float]

# The first eight are easy-VQA's own colours, so that both kinds of pictures agree on what "green" is.
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
    "orange": (255, 150, 0),
    "purple": (160, 32, 240),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "diamond", "cross")
SIZES = ("small", "large")
ROWS = ("top", "center", "bottom")
COLUMNS = ("left", "center", "right")

# Seeds of the test pictures; training uses smaller ones.
TEST_SEEDS = range(1_000_000_000, 1_000_000_500)

CANVAS = 64  # the unit of every length below: the default model sees 64 x 64 pixels
CELL = 16  # two centres never share a cell of this side, which keeps small neighbours apart
MOST = 4  # objects of a scene, as many as the tower's table has room for
SMALL = (11.0, 16.0)
LARGE = (20.0, 28.0)
GAP = 1.5


@dataclass(frozen=True)
class SceneObject:
    """One shape; ``box`` is (left, top, right, bottom) in 0..1 of the picture's sides."""

    size: str
    color: str
    shape: str
    box: Box

    @property
    def center(self) -> Tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def full_name(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Objects in reading order (rows of cells from the top, then left to right) on a plain background."""

    seed: int
    background: Tuple[int, int, int]
    objects: Tuple[SceneObject, ...]


def ninth_of(x: float, y: float) -> Tuple[str, str]:
    """The thirds of the picture, from the top and from the left, in which a point lies."""
    return ROWS[min(2, int(3 * y))], COLUMNS[min(2, int(3 * x))]


def part_name(row: str, column: str) -> str:
    """``top left``, ``top``, … ``center``"""
    return " ".join(name for name in (row, column) if name != "center") or "center"


def cell_of(obj: SceneObject) -> Tuple[int, int]:
    """(row, column) of the 16-unit cell that holds the object's centre."""
    last = CANVAS // CELL - 1
    x, y = obj.center
    return min(int(y * CANVAS / CELL), last), min(int(x * CANVAS / CELL), last)


def make_scene(seed: int, count: Optional[int] = None, most: int = MOST) -> Scene:
    """Chooses objects that don't overlap; no two have both colour and shape in common.

    Args:
        seed: everything follows from it.
        count: how many objects, instead of a random number of them. A crowded scene may end up with fewer.
        most: limit of the random number, up to 5.
    """
    rng = random.Random(f"scene-{seed}")
    wanted = count or min(most, rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5)))
    objects: List[SceneObject] = []
    # a scene often repeats a shape or a colour; without that, counting would hardly be asked
    shapes = rng.sample(SHAPES, rng.choice((2, 3, 4, 6)))
    colors = rng.sample(sorted(COLORS), rng.choice((2, 3, 5, 10)))
    for _ in range(200):
        if len(objects) == wanted:
            break
        candidate = _random_object(rng, rng.choice(colors), rng.choice(shapes))
        if all(_apart(candidate, other) for other in objects):
            objects.append(candidate)
    background = tuple(rng.randint(230, 255) for _ in range(3))
    return Scene(seed, background, tuple(sorted(objects, key=cell_of)))


def _random_object(rng: random.Random, color: str, shape: str) -> SceneObject:
    size = rng.choice(SIZES)
    low, high = SMALL if size == "small" else LARGE
    width = rng.uniform(low, high)
    height = rng.uniform(low, high) if shape == "rectangle" else width
    left = rng.uniform(0, CANVAS - width)
    top = rng.uniform(0, CANVAS - height)
    return SceneObject(
        size, color, shape, (left / CANVAS, top / CANVAS, (left + width) / CANVAS, (top + height) / CANVAS)
    )


def _apart(one: SceneObject, other: SceneObject) -> bool:
    if one.name == other.name or cell_of(one) == cell_of(other):
        return False
    gap = GAP / CANVAS
    a, b = one.box, other.box
    return a[2] + gap < b[0] or b[2] + gap < a[0] or a[3] + gap < b[1] or b[3] + gap < a[1]


def draw_scene(scene: Scene, pixels: int = CANVAS) -> Image.Image:
    """Paints the scene on a square of ``pixels``; edges are smooth (painted at four times the size)."""
    side = pixels * 4
    image = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(image)
    for obj in scene.objects:
        fill = COLORS[obj.color]
        # ImageDraw fills the last pixel too, hence the -1
        left, top, right, bottom = obj.box[0] * side, obj.box[1] * side, obj.box[2] * side - 1, obj.box[3] * side - 1
        if obj.shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=fill)
        elif obj.shape == "rectangle":
            pen.rectangle((left, top, right, bottom), fill=fill)
        elif obj.shape == "cross":
            third = (right - left) / 3
            pen.rectangle((left + third, top, right - third, bottom), fill=fill)
            pen.rectangle((left, top + third, right, bottom - third), fill=fill)
        else:
            outline = [(left + x * (right - left), top + y * (bottom - top)) for x, y in _OUTLINES[obj.shape]]
            pen.polygon(outline, fill=fill)
    return image.resize((pixels, pixels), Image.BOX)


def _star_outline() -> List[Tuple[float, float]]:
    """Ten corners of a five-pointed star that fills the unit square."""
    points = []
    for corner in range(10):
        radius = 1.0 if corner % 2 == 0 else 0.42
        angle = math.pi * corner / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    return [((x - min(xs)) / (max(xs) - min(xs)), (y - min(ys)) / (max(ys) - min(ys))) for x, y in points]


_OUTLINES = {
    "triangle": [(0.5, 0.0), (1.0, 1.0), (0.0, 1.0)],
    "diamond": [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)],
    "star": _star_outline(),
}
