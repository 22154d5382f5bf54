"""Questions about drawn scenes, with their answers, as rows of the toolkit's data format.

Short answers are the default ("red", "yes", "2", "top left"); a question that ends in ``IN_A_SENTENCE`` is answered in
one. A box is four numbers with two decimals: left, top, right, bottom in 0..1 of the picture's sides.
"""

import random
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from paddlemix.examples.llava.demo_recipe.scenes import COLORS, SHAPES, Box, Scene, SceneObject

__all__ = [
    "IN_A_SENTENCE",
    "QUESTION_TYPES",
    "Round",
    "ask",
    "box_text",
    "caption",
    "conversation",
    "dense_caption",
    "test_rows",
    "to_row",
]

IN_A_SENTENCE = "Answer in a sentence."
_BOX = re.compile(r"0\.\d\d(, 0\.\d\d){3}")
DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?")
_WHOLE = ("caption", "list")
APART = 0.12  # centres closer than this along an axis are neither left nor right (above nor below) of each other


class Round(NamedTuple):
    """A question, its answer, and what it asks about."""

    question: str
    answer: str
    kind: str


def box_text(box: Box) -> str:
    """``0.23, 0.33, 0.79, 0.78``; the far edge of the picture is 0.99, so that all numbers are equally long."""
    return ", ".join(f"{min(0.99, max(0.0, side)):.2f}" for side in box)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def enumeration(parts: Sequence[str]) -> str:
    """a, b and c"""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def caption(scene: Scene) -> str:
    """``The picture shows a small red circle and a large blue star.``, in reading order."""
    return f"The picture shows {enumeration([with_article(o.full_name) for o in scene.objects])}."


def dense_caption(scene: Scene) -> str:
    """Every object with its box; what the projector is aligned on."""
    return "; ".join(f"{o.full_name}: {box_text(o.box)}" for o in scene.objects)


def region_of(obj: SceneObject) -> str:
    """The ninth of the picture that holds the object's centre: ``top left``, ``top``, … ``center``."""
    x, y = obj.center
    row = ("top", "", "bottom")[min(2, int(3 * y))]
    column = ("left", "", "right")[min(2, int(3 * x))]
    return f"{row} {column}".strip() or "center"


def _unique(scene: Scene, attribute: str) -> List[SceneObject]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [o for o, value in zip(scene.objects, values) if values.count(value) == 1]


def _exist(rng: random.Random, scene: Scene) -> Round:
    by_name = rng.random() < 0.6
    names = {o.name if by_name else o.shape for o in scene.objects}
    if rng.random() < 0.5:
        name = rng.choice(sorted(names))
    elif not by_name:
        absent = sorted(set(SHAPES) - names)
        name = rng.choice(absent) if absent else rng.choice(sorted(names))
    else:
        # half of the absent ones are hard: a colour and a shape that are there, but not together
        near = {f"{a.color} {b.shape}" for a in scene.objects for b in scene.objects} - names
        anything = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - names
        name = rng.choice(sorted(near if near and rng.random() < 0.5 else anything))
    there = name in names
    question = rng.choice(("Is there {}?", "Is there {} in the picture?", "Do you see {}?")).format(with_article(name))
    if rng.random() < 0.25:
        sentence = f"Yes, there is {with_article(name)}." if there else f"No, there is no {name}."
        return Round(f"{question} {IN_A_SENTENCE}", sentence, "exist")
    return Round(question, "yes" if there else "no", "exist")


def _color(rng: random.Random, scene: Scene) -> Optional[Round]:
    candidates = _unique(scene, "shape")
    if not candidates:
        return None
    obj = rng.choice(candidates)
    question = rng.choice(("What color is the {}?", "What is the color of the {}?")).format(obj.shape)
    if rng.random() < 0.25:
        return Round(f"{question} {IN_A_SENTENCE}", f"The {obj.shape} is {obj.color}.", "color")
    return Round(question, obj.color, "color")


def _shape(rng: random.Random, scene: Scene) -> Optional[Round]:
    candidates = _unique(scene, "color")
    if not candidates:
        return None
    obj = rng.choice(candidates)
    question = rng.choice(("What shape is the {} object?", "What is the {} shape?")).format(obj.color)
    if rng.random() < 0.25:
        return Round(f"{question} {IN_A_SENTENCE}", f"The {obj.color} object is {with_article(obj.shape)}.", "shape")
    return Round(question, obj.shape, "shape")


def _size(rng: random.Random, scene: Scene) -> Round:
    obj = rng.choice(scene.objects)
    question = rng.choice(("Is the {} small or large?", "How large is the {}, small or large?")).format(obj.name)
    if rng.random() < 0.25:
        return Round(f"{question} {IN_A_SENTENCE}", f"The {obj.name} is {obj.size}.", "size")
    return Round(question, obj.size, "size")


def _count(rng: random.Random, scene: Scene) -> Round:
    kind = rng.random()
    if kind < 0.3:
        what, number = "object", len(scene.objects)
    elif kind < 0.7:
        present = rng.random() < 0.8
        shape = rng.choice([o.shape for o in scene.objects] if present else SHAPES)
        what, number = shape, sum(o.shape == shape for o in scene.objects)
    else:
        color = rng.choice([o.color for o in scene.objects])
        what, number = f"{color} object", sum(o.color == color for o in scene.objects)
    plural = f"{what}{'es' if what.endswith('s') else 's'}"
    question = rng.choice(("How many {} are there?", "How many {} do you see?")).format(plural)
    if rng.random() < 0.25:
        sentence = f"There is 1 {what}." if number == 1 else f"There are {number} {plural}."
        return Round(f"{question} {IN_A_SENTENCE}", sentence, "count")
    return Round(question, str(number), "count")


def _position(rng: random.Random, scene: Scene) -> Round:
    obj = rng.choice(scene.objects)
    question = rng.choice(("In which part of the picture is the {}?", "Which part of the picture is the {} in?"))
    question = question.format(obj.name)
    if rng.random() < 0.25:
        return Round(f"{question} {IN_A_SENTENCE}", f"The {obj.name} is at the {region_of(obj)}.", "position")
    return Round(question, region_of(obj), "position")


def _relation(rng: random.Random, scene: Scene) -> Optional[Round]:
    pairs = []
    for a in scene.objects:
        for b in scene.objects:
            dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
            if a is not b and abs(dx) > APART:
                pairs.append((a, b, "to the left of", dx < 0))
                pairs.append((a, b, "to the right of", dx > 0))
            if a is not b and abs(dy) > APART:
                pairs.append((a, b, "above", dy < 0))
                pairs.append((a, b, "below", dy > 0))
    if not pairs:
        return None
    a, b, relation, holds = rng.choice(pairs)
    question = f"Is the {a.name} {relation} the {b.name}?"
    if rng.random() < 0.25:
        sentence = f"{'Yes' if holds else 'No'}, the {a.name} is {'' if holds else 'not '}{relation} the {b.name}."
        return Round(f"{question} {IN_A_SENTENCE}", sentence, "relation")
    return Round(question, "yes" if holds else "no", "relation")


def _box(rng: random.Random, scene: Scene) -> Round:
    obj = rng.choice(scene.objects)
    question = rng.choice(("Give the box of the {}.", "Where is the {}? Give its box."))
    return Round(question.format(obj.name), box_text(obj.box), "box")


def _region(rng: random.Random, scene: Scene) -> Round:
    obj = rng.choice(scene.objects)
    question = rng.choice(("What is in the box {}?", "Describe the box {}.")).format(box_text(obj.box))
    return Round(question, with_article(obj.full_name), "region")


def _caption(rng: random.Random, scene: Scene) -> Round:
    return Round(rng.choice(DESCRIBE), caption(scene), "caption")


def _list(rng: random.Random, scene: Scene) -> Round:
    return Round("List the objects with their boxes.", dense_caption(scene), "list")


_MAKERS: Dict[str, Callable[[random.Random, Scene], Optional[Round]]] = {
    "exist": _exist,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "position": _position,
    "relation": _relation,
    "box": _box,
    "region": _region,
    "caption": _caption,
    "list": _list,
}
QUESTION_TYPES = tuple(_MAKERS)


def ask(kind: str, rng: random.Random, scene: Scene) -> Optional[Round]:
    """A question of that kind, or None when the scene has nothing that could be asked without ambiguity."""
    return _MAKERS[kind](rng, scene)


def conversation(
    scene: Scene, rounds: int, rng: random.Random, weights: Optional[Dict[str, float]] = None
) -> List[Round]:
    """A chat of at most ``rounds`` rounds that mixes the kinds and asks nothing twice.

    What an earlier round gave away teaches no seeing, so a box is named once, and of description and list there is at
    most one, which comes last, or sometimes first.

    Args:
        weights: how often each kind is asked; default: all alike.
    """
    kinds = list(weights or _MAKERS)
    chosen: List[Round] = []
    for _ in range(4 * rounds):
        if len(chosen) == rounds:
            break
        kind = rng.choices(kinds, [weights[k] for k in kinds] if weights else None)[0]
        made = ask(kind, rng, scene)
        if made is not None and not any(_gives_away(other, made) for other in chosen):
            chosen.append(made)
    # a description or a list names everything; it ends the chat, but for some chats that it opens
    chosen.sort(key=lambda one: one.kind in _WHOLE)
    if len(chosen) > 1 and chosen[-1].kind in _WHOLE and rng.random() < 0.3:
        chosen.insert(0, chosen.pop())
    return chosen


def _gives_away(earlier: Round, later: Round) -> bool:
    if earlier.question == later.question or (earlier.kind in _WHOLE and later.kind in _WHOLE):
        return True
    box = _BOX.search(f"{later.question} {later.answer}")
    return later.kind != "list" and bool(box and box.group() in f"{earlier.question} {earlier.answer}")


def to_row(image: str, rounds: Sequence[Round]) -> Dict[str, Any]:
    """A row of the toolkit's format; the picture comes before the first question."""
    turns = [[one.question, one.answer] for one in rounds]
    turns[0][0] = f"<image>\n{turns[0][0]}"
    return {"image": image, "conversations": turns}


def test_rows(image: str, scene: Scene) -> List[Dict[str, Any]]:
    """A question of each kind about a scene, each in a row of its own, so that none gives another away."""
    rng = random.Random(f"test-{scene.seed}")
    rows = []
    for kind in QUESTION_TYPES:
        made = ask(kind, rng, scene)
        if made is not None:
            row = {**to_row(image, [made]), "question_type": kind}
            if kind in _WHOLE:
                row["facts"] = [[obj.name for obj in scene.objects]]
            rows.append(row)
    return rows
