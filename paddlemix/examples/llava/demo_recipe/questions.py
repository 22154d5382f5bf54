"""Questions about drawn scenes, with their answers, as rows of the toolkit's data format.

Short answers are the default ("red", "yes", "2", "top left"); a question that ends in ``IN_A_SENTENCE`` is answered in
one. A box is four numbers with two decimals: left, top, right, bottom in 0..1 of the picture's sides.
"""

import random
import re
from functools import partial
from typing import Any, Callable, Dict, Hashable, List, NamedTuple, Optional, Sequence

from paddlemix.examples.llava.demo_recipe.languages import ENGLISH, Language
from paddlemix.examples.llava.demo_recipe.scenes import COLORS, SHAPES, Box, Scene, SceneObject, ninth_of, part_name

__all__ = [
    "ABOVE",
    "ABOVE_OR_BELOW",
    "BELOW",
    "IN_A_SENTENCE",
    "LEFT",
    "LEFT_OR_RIGHT",
    "QUESTION_TYPES",
    "RIGHT",
    "Round",
    "ask",
    "box_text",
    "caption",
    "conversation",
    "dense_caption",
    "test_rows",
    "to_row",
]

IN_A_SENTENCE = ENGLISH.in_a_sentence
_BOX = re.compile(r"0\.\d\d(, 0\.\d\d){3}")
_WHOLE = ("caption", "list")
_NAMES_NOTHING = {"count": 0, "exist": 1}  # kinds whose questions name objects that may not be there, in their order
LEFT, RIGHT, ABOVE, BELOW = "to the left of", "to the right of", "above", "below"
_AXES = (
    (LEFT, RIGHT),
    (ABOVE, BELOW),
)  # the relations along x and along y, the one that holds for smaller numbers first
APART = 0.12  # centres closer than this along an axis are neither left nor right (above nor below) of each other
SENTENCES = 0.25  # share of the questions that want a sentence
NAMES_LATER = 0.7  # share of the chats that don't name an object before they have counted


class Round(NamedTuple):
    """A question, its answer, its kind, and the fact that is asked: two rounds of one fact answer each other."""

    question: str
    answer: str
    kind: str
    fact: Hashable


class _Related(NamedTuple):
    a: SceneObject
    b: SceneObject
    relation: str
    holds: bool
    fact: Hashable


def box_text(box: Box) -> str:
    """``0.23, 0.33, 0.79, 0.78``; the far edge of the picture is 0.99, so that all numbers are equally long."""
    return ", ".join(f"{min(0.99, max(0.0, side)):.2f}" for side in box)


def caption(scene: Scene, say: Language = ENGLISH) -> str:
    """``The picture shows a small red circle and a large blue star.``, in reading order."""
    objects = [say.one(say.full_name(o)) for o in scene.objects]
    return say.sentences["caption"].format(say.enumeration(objects))


def dense_caption(scene: Scene, say: Language = ENGLISH) -> str:
    """Every object with its box; what the projector is aligned on."""
    return "; ".join(f"{say.full_name(o)}: {box_text(o.box)}" for o in scene.objects)


def region_of(obj: SceneObject) -> str:
    """The ninth of the picture that holds the object's centre: ``top left``, ``top``, … ``center``."""
    return part_name(*ninth_of(*obj.center))


def _unique(scene: Scene, attribute: str) -> List[SceneObject]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [o for o, value in zip(scene.objects, values) if values.count(value) == 1]


def _round(
    rng: random.Random,
    say: Language,
    kind: str,
    asked: Sequence[str],
    short: str,
    sentence: str,
    fact: Optional[Hashable] = None,
) -> Round:
    """One of the forms of ``kind`` with what is asked about, and the short answer or the sentence.

    Args:
        fact: what is asked, if other questions than those about ``asked`` ask it too.
    """
    fact = (kind, *asked) if fact is None else fact
    question = rng.choice(say.questions[kind]).format(*asked)
    if rng.random() < SENTENCES:
        return Round(f"{question}{say.joint}{say.in_a_sentence}", sentence, kind, fact)
    return Round(question, short, kind, fact)


def _exist(rng: random.Random, scene: Scene, say: Language) -> Round:
    by_name = rng.random() < 0.6
    names = {(o.color, o.shape) if by_name else (o.shape,) for o in scene.objects}
    if rng.random() < 0.5:
        name = rng.choice(sorted(names))
    elif not by_name:
        absent = sorted({(shape,) for shape in SHAPES} - names)
        name = rng.choice(absent) if absent else rng.choice(sorted(names))
    else:
        # half of the absent ones are hard: a colour and a shape that are there, but not together
        near = {(a.color, b.shape) for a in scene.objects for b in scene.objects} - names
        anything = {(color, shape) for color in COLORS for shape in SHAPES} - names
        name = rng.choice(sorted(near if near and rng.random() < 0.5 else anything))
    there = name in names
    text = say.name(*name) if by_name else say.word(*name)
    sentence = say.sentences["exist yes"].format(say.one(text)) if there else say.sentences["exist no"].format(text)
    asked = say.one(text) if say.code == "en" else text
    return _round(rng, say, "exist", [asked], say.there[not there], sentence)


def _color(rng: random.Random, scene: Scene, say: Language) -> Optional[Round]:
    candidates = _unique(scene, "shape")
    if not candidates:
        return None
    obj = rng.choice(candidates)
    shape, color = say.word(obj.shape), say.word(obj.color)
    return _round(rng, say, "color", [shape], color, say.sentences["color"].format(shape, color))


def _shape(rng: random.Random, scene: Scene, say: Language) -> Optional[Round]:
    candidates = _unique(scene, "color")
    if not candidates:
        return None
    obj = rng.choice(candidates)
    shape, color = say.word(obj.shape), say.word(obj.color)
    return _round(rng, say, "shape", [color], shape, say.sentences["shape"].format(color, say.one(shape)))


def _size(rng: random.Random, scene: Scene, say: Language) -> Round:
    obj = rng.choice(scene.objects)
    name, size = say.object_name(obj), say.word(obj.size)
    return _round(rng, say, "size", [name], size, say.sentences["size"].format(name, size))


def _count(rng: random.Random, scene: Scene, say: Language) -> Round:
    kind = rng.random()
    if kind < 0.3:
        what, number = say.word("object"), len(scene.objects)
    elif kind < 0.7:
        present = rng.random() < 0.8
        shape = rng.choice([o.shape for o in scene.objects] if present else SHAPES)
        what, number = say.word(shape), sum(o.shape == shape for o in scene.objects)
    else:
        color = rng.choice([o.color for o in scene.objects])
        what, number = say.name(color, "object"), sum(o.color == color for o in scene.objects)
    plural = say.counted(what)
    sentences = say.sentences
    sentence = sentences["count one"].format(what) if number == 1 else sentences["count"].format(number, plural)
    return _round(rng, say, "count", [plural], str(number), sentence)


def _position(rng: random.Random, scene: Scene, say: Language) -> Round:
    obj = rng.choice(scene.objects)
    name, region = say.object_name(obj), say.word(region_of(obj))
    return _round(rng, say, "position", [name], region, say.sentences["position"].format(name, region))


def _related(scene: Scene, relations: Sequence[str]) -> List[_Related]:
    """Pairs of objects that lie apart, with each of the relations and whether it holds; "is A above B" and "is B below A"
    have one fact."""
    found = []
    for a in scene.objects:
        for b in scene.objects:
            for axis, (before, behind) in enumerate(_AXES):
                away = a.center[axis] - b.center[axis]
                if a is not b and abs(away) > APART:
                    fact = frozenset((a.name, b.name)), axis
                    found += [_Related(a, b, before, away < 0, fact), _Related(a, b, behind, away > 0, fact)]
    return [one for one in found if one.relation in relations]


def _relation(
    rng: random.Random, scene: Scene, say: Language, relations: Sequence[str] = (LEFT, RIGHT, ABOVE, BELOW)
) -> Optional[Round]:
    """Does this relation hold? Answered with yes or no."""
    pairs = _related(scene, relations)
    if not pairs:
        return None
    a, b, relation, holds, fact = rng.choice(pairs)
    asked = [say.object_name(a), say.word(relation), say.object_name(b)]
    sentence = say.sentences["relation yes" if holds else "relation no"].format(*asked)
    return _round(rng, say, "relation", asked, say.yes_no[not holds], sentence, fact)


def _side(
    rng: random.Random, scene: Scene, say: Language, relations: Sequence[str] = (LEFT, RIGHT, ABOVE, BELOW)
) -> Optional[Round]:
    """Which of the two relations of an axis holds? Answered with its name."""
    pairs = [one for one in _related(scene, relations) if one.holds]
    if not pairs:
        return None
    a, b, relation, _, fact = rng.choice(pairs)
    both = [say.word(one) for axis in _AXES if relation in axis for one in axis]
    first, second = say.object_name(a), say.object_name(b)
    sentence = say.sentences["side"].format(first, say.word(relation), second)
    return _round(rng, say, "side", [first, *both, second], say.sides[relation], sentence, fact)


def _box(rng: random.Random, scene: Scene, say: Language) -> Round:
    obj = rng.choice(scene.objects)
    return Round(rng.choice(say.questions["box"]).format(say.object_name(obj)), box_text(obj.box), "box", obj.box)


def _region(rng: random.Random, scene: Scene, say: Language) -> Round:
    obj = rng.choice(scene.objects)
    question = rng.choice(say.questions["region"]).format(box_text(obj.box))
    return Round(question, say.one(say.full_name(obj)), "region", obj.box)


def _caption(rng: random.Random, scene: Scene, say: Language) -> Round:
    return Round(rng.choice(say.questions["caption"]), caption(scene, say), "caption", "whole")


def _list(rng: random.Random, scene: Scene, say: Language) -> Round:
    return Round(rng.choice(say.questions["list"]), dense_caption(scene, say), "list", "whole")


_MAKERS: Dict[str, Callable[[random.Random, Scene, Language], Optional[Round]]] = {
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
# Further kinds that ``conversation`` can be given: one relation, or the two sides of one axis.
_MAKERS.update({relation: partial(_relation, relations=(relation,)) for axis in _AXES for relation in axis})
LEFT_OR_RIGHT, ABOVE_OR_BELOW = "left or right", "above or below"
_MAKERS["side"] = _side
_MAKERS[LEFT_OR_RIGHT] = partial(_side, relations=(LEFT, RIGHT))
_MAKERS[ABOVE_OR_BELOW] = partial(_side, relations=(ABOVE, BELOW))


def ask(kind: str, rng: random.Random, scene: Scene, say: Language = ENGLISH) -> Optional[Round]:
    """A question of that kind, or None when the scene has nothing that could be asked without ambiguity."""
    return _MAKERS[kind](rng, scene, say)


def conversation(
    scene: Scene,
    rounds: int,
    rng: random.Random,
    weights: Optional[Dict[str, float]] = None,
    say: Language = ENGLISH,
    sentences: float = 1.0,
) -> List[Round]:
    """A chat of at most ``rounds`` rounds that mixes the kinds and asks nothing twice.

    What an earlier round gave away teaches no seeing. So a fact is asked once; of description and list there is at most
    one, which comes last, or sometimes first; and most chats count, and ask what is there, before they name objects.

    Args:
        weights: how often each kind is asked, of QUESTION_TYPES or of those that only train; default: the former alike.
        sentences: share that is kept of the questions that want a sentence.
    """
    kinds = list(weights or QUESTION_TYPES)
    chosen: List[Round] = []
    for _ in range(4 * rounds):
        if len(chosen) == rounds:
            break
        kind = rng.choices(kinds, [weights[k] for k in kinds] if weights else None)[0]
        made = ask(kind, rng, scene, say)
        if made is None or (made.question.endswith(say.in_a_sentence) and rng.random() > sentences):
            continue
        if not any(_gives_away(other, made) for other in chosen):
            chosen.append(made)
    if rng.random() < NAMES_LATER:
        chosen.sort(key=lambda one: _NAMES_NOTHING.get(one.kind, len(_NAMES_NOTHING)))
    # a description or a list names everything; it ends the chat, but for some chats that it opens
    chosen.sort(key=lambda one: one.kind in _WHOLE)
    if len(chosen) > 1 and chosen[-1].kind in _WHOLE and rng.random() < 0.3:
        chosen.insert(0, chosen.pop())
    return chosen


def _gives_away(earlier: Round, later: Round) -> bool:
    if earlier.fact == later.fact:
        return True
    # a list may name the boxes that were asked before
    box = _BOX.search(f"{later.question} {later.answer}")
    return later.kind != "list" and bool(box and box.group() in f"{earlier.question} {earlier.answer}")


def to_row(image: str, rounds: Sequence[Round]) -> Dict[str, Any]:
    """A row of the toolkit's format; the picture comes before the first question."""
    turns = [[one.question, one.answer] for one in rounds]
    turns[0][0] = f"<image>\n{turns[0][0]}"
    return {"image": image, "conversations": turns}


def test_rows(image: str, scene: Scene, say: Language = ENGLISH) -> List[Dict[str, Any]]:
    """A question of each kind about a scene, each in a row of its own, so that none gives another away."""
    rng = random.Random(f"test-{scene.seed}")
    rows = []
    for kind in QUESTION_TYPES:
        made = ask(kind, rng, scene, say)
        if made is not None:
            row = {**to_row(image, [made]), "question_type": kind}
            if kind in _WHOLE:
                row["facts"] = [[say.object_name(obj) for obj in scene.objects]]
            rows.append(row)
    return rows
