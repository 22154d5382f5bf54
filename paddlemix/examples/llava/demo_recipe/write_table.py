"""Stage 1, second half: two more layers write what the tower sees as a table, one word a patch, which a decoder can read.

The patches, in raster order, become rows of sixteen words, one row for each object in reading order:

    top left  small red circle  . 1 3 ,. 2 2 ,. 3 5 ,. 4 4

The first word is the part of the picture (one patch, also for a part of two words), then come size, colour and shape, then
the box as an answer gives it. Over some words stands a note, which the decoder would have to work out otherwise: over the
third point the number of objects, over the shape where along x and y the centre is. Patches that are left over are empty.

The first of the two layers is asked for each object's place in the reading order and how many there are, the second for
words and notes; the heads that are asked are thrown away. The layers below are frozen at first, which is quick, and then
learn on with the two.
"""

import logging
import random
import time
from pathlib import Path
from typing import Dict, List, Optional

import numpy as np

from paddlemix.examples.llava.demo_recipe.easy_vqa_data import find_easy_vqa
from paddlemix.examples.llava.demo_recipe.pretrain_tower import (
    CELLS,
    COLOR_NAMES,
    GRID,
    TOWER_PREFIX,
    UNKNOWN,
    VALIDATION_SEEDS,
    EasyVQAPictures,
    Target,
    cell_patches,
    collate,
    digits,
    initialize_layers,
    scene_picture,
)
from paddlemix.examples.llava.demo_recipe.scenes import COLUMNS, MOST, ROWS, SHAPES, SIZES, ninth_of, part_name
from paddlemix.examples.llava.demo_recipe.training import Checkpoint, make_optimizer, quick_products

__all__ = ["EMPTY", "NEXT", "NOTES", "POINT", "WORDS", "table_of", "write_table"]

logger = logging.getLogger("paddlemix.demo_recipe")

POINT, NEXT, EMPTY = ".", ",.", "\n"
PARTS = tuple(part_name(row, column) for row in ROWS for column in COLUMNS)
WORDS = (*PARTS, *SIZES, *COLOR_NAMES, *SHAPES, *(str(digit) for digit in range(10)), POINT, NEXT, EMPTY)
STEPS = 8  # of a centre's x and y
NOTES = {"count": MOST, "x": STEPS, "y": STEPS}  # kinds, and how many values each has
# What the first layer is asked where an object is: its place in the reading order, and how many there are.
COUNTED = {"place": MOST, "objects": MOST}
_WORD = {word: index for index, word in enumerate(WORDS)}
FIELDS = 16  # of an object's row
THAWED = 0.3  # the learning rate of the layers below, as a share of the others'
_SHAPE_FIELD, _COUNT_FIELD = 3, 10


def table_of(objects: List[Target]) -> Dict[str, np.ndarray]:
    """Labels of one picture: ``word`` and the value of each kind of note, of each patch [P], and what is ``COUNTED``, of each
    cell [C].

    ``UNKNOWN`` stands where a word isn't known, where there is no note, and where a cell is empty.
    """
    labels = {kind: np.full(GRID * GRID, UNKNOWN) for kind in NOTES}
    labels["word"] = np.full(GRID * GRID, _WORD[EMPTY])
    labels.update({name: np.full(CELLS * CELLS, UNKNOWN) for name in COUNTED})
    cells = []
    for *_, (left, top, right, bottom) in objects:
        row, column = (min(CELLS - 1, int(middle * CELLS)) for middle in ((top + bottom) / 2, (left + right) / 2))
        cells.append(row * CELLS + column)
    for place, number in enumerate(np.argsort(cells)):
        size, color, shape, box = objects[number]
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        words = [part_name(*ninth_of(x, y)), size, color, shape]
        for side, pair in enumerate(digits(box)):
            words += [NEXT if side else POINT, *map(str, pair)]
        first = place * FIELDS
        labels["place"][cells[number]] = place
        labels["word"][first : first + FIELDS] = [UNKNOWN if word is None else _WORD[word] for word in words]
        labels["x"][first + _SHAPE_FIELD] = int(x * STEPS)
        labels["y"][first + _SHAPE_FIELD] = int(y * STEPS)
        labels["count"][first + _COUNT_FIELD] = labels["objects"][cells[number]] = len(objects) - 1
    return labels


def batch_of_step(step: int, size: int, easy: EasyVQAPictures, seed: int):
    """pixel_values [N, 3, H, W] and labels of :func:`table_of`, [N, …]; a quarter of easy-VQA; the same for the same step."""
    rng = random.Random(f"table-{seed}-{step}")
    from_easy = size // 4
    samples = [easy.take(rng) for _ in range(from_easy)]
    # the seeds go on after those of the layers below
    samples += [scene_picture(200_000_000 + step * size + i, MOST) for i in range(size - from_easy)]
    return collate(samples, table_of)


def write_table(output_dir: str, vision: Dict, tower: Path, **options) -> Dict[str, float]:
    """Trains two layers on top of ``tower``, then all, and saves them as ``tower.safetensors`` in ``output_dir``.

    Args:
        vision: sizes of the whole tower.
        tower: safetensors of the layers below.
        options: steps, thaw (from which step on all layers learn; default 1025 of 2600), batch_size, learning_rate, seed,
            easy_vqa (data folder) and save_minutes of :func:`_write_table`.

    Returns:
        the share of right words on drawn validation scenes, by kind.
    """
    import paddle

    # The optimizer's state goes by generated names, which must not depend on what this process built before.
    with paddle.utils.unique_name.guard():
        return _write_table(output_dir, vision, tower, **options)


def _write_table(
    output_dir: str,
    vision: Dict,
    tower: Path,
    steps: int = 2600,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
    thaw: Optional[int] = None,
    seed: int = 1,
    easy_vqa: Optional[str] = None,
    save_minutes: float = 2.0,
) -> Dict[str, float]:
    import paddle
    import paddle.nn.functional as F
    from paddle import nn
    from safetensors.numpy import load_file, save_file

    from paddlemix.models.llava.configuration import CLIPVisionConfig
    from paddlemix.models.llava.vision_tower import CLIPVisionTower

    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    thaw = steps * 41 // 104 if thaw is None else thaw
    easy = EasyVQAPictures(find_easy_vqa(easy_vqa))
    paddle.seed(seed)
    whole = CLIPVisionTower(CLIPVisionConfig(**vision), select_layer=-1, select_feature="cls_patch")
    layers = whole.vision_tower.vision_model.transformer.layers
    below, counting, writing = layers[:-2], layers[-2], layers[-1]
    top = nn.LayerList([counting, writing])
    initialize_layers(top, vision)
    cell_head = nn.Linear(vision["hidden_size"], sum(COUNTED.values()))
    parts = {"word": len(WORDS), **NOTES}
    word_head = nn.Linear(vision["hidden_size"], sum(parts.values()))
    given = {name[len(TOWER_PREFIX) :]: value for name, value in load_file(str(tower)).items()}
    whole.set_state_dict({**whole.state_dict(), **given})
    new = [*top.parameters(), *cell_head.parameters(), *word_head.parameters()]
    known = {id(parameter) for parameter in top.parameters()}
    old = [parameter for parameter in whole.parameters() if id(parameter) not in known]
    groups = [{"params": new}, {"params": old, "learning_rate": THAWED}]
    schedule, optimizer = make_optimizer(groups, steps, learning_rate)
    held = {"tower": whole, "cell_head": cell_head, "word_head": word_head, "optimizer": optimizer}
    checkpoint = Checkpoint(out / "checkpoint.pdparams", held)
    start = checkpoint.restore()

    places_of_cells = paddle.to_tensor(cell_patches().reshape(-1) + 1)  # after the class token

    def forward(pixel_values, thawed):
        """Logits of each label: what is counted [N, 4 C, …], word [N, P, W], the kinds of notes [N, P, …]."""
        model = whole.vision_tower.vision_model
        with paddle.set_grad_enabled(thawed):
            hidden = model.embed(paddle.to_tensor(pixel_values))
            for layer in below:
                hidden = layer(hidden)
        hidden = counting(hidden)
        at_cells = cell_head(hidden.index_select(places_of_cells, axis=1)).split(list(COUNTED.values()), axis=-1)
        written = word_head(writing(hidden)[:, 1:]).split(list(parts.values()), axis=-1)
        return {**dict(zip(COUNTED, at_cells)), **dict(zip(parts, written))}

    def cross_entropy(logits, labels):
        labels = paddle.to_tensor(labels).astype("int64").flatten()
        known = (labels != UNKNOWN).astype("float32").sum().clip(min=1)
        # Paddle's mean divides by all positions, not by those that count
        return F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=UNKNOWN, reduction="sum") / known

    began = saved = time.time()
    for step in range(start, steps):
        pixel_values, labels = batch_of_step(step, batch_size, easy, seed)
        empty = labels["word"] == _WORD[EMPTY]
        with quick_products():
            logits = forward(pixel_values, thawed=step >= thaw)
            # all four patches of a cell are asked
            loss = sum(cross_entropy(logits[name], np.tile(labels[name], (1, 4))) for name in COUNTED)
            loss = loss + 2 * cross_entropy(logits["word"], np.where(empty, UNKNOWN, labels["word"]))
            loss = loss + 0.3 * cross_entropy(logits["word"], np.where(empty, labels["word"], UNKNOWN))
            loss = loss + sum(cross_entropy(logits[kind], labels[kind]) for kind in NOTES) / len(NOTES)
            loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step % 50 == 0:
            figures = _accuracy(logits, labels)
            text = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            pace = (step + 1 - start) * batch_size / (time.time() - began)
            logger.info("table step %d/%d loss %.3f %.0f pictures/s %s", step, steps, float(loss), pace, text)
        if time.time() - saved > 60 * save_minutes:
            checkpoint.save(step + 1)
            saved = time.time()
    checkpoint.save(steps)
    with paddle.no_grad():
        pixel_values, labels = collate([scene_picture(seed, MOST) for seed in VALIDATION_SEEDS], table_of)
        batches = [forward(pixel_values[i : i + 64], thawed=False) for i in range(0, len(pixel_values), 64)]
    figures = _accuracy({name: paddle.concat([each[name] for each in batches]) for name in batches[0]}, labels)
    logger.info("validation %s", figures)
    save_file(
        {TOWER_PREFIX + name: value.numpy() for name, value in whole.state_dict().items()},
        str(out / "tower.safetensors"),
    )
    return figures


def _accuracy(logits, labels) -> Dict[str, float]:
    """Share of right answers: places, words of each field of objects' rows and of empty ones, notes by kind."""
    labels = {name: np.tile(label, (1, 4)) if name in COUNTED else label for name, label in labels.items()}
    right = {name: logits[name].numpy().argmax(-1) == value for name, value in labels.items()}
    empty = labels["word"] == _WORD[EMPTY]
    field = np.arange(GRID * GRID) % FIELDS
    result = {}
    for name, fields in (
        ("part", [0]),
        ("size", [1]),
        ("color", [2]),
        ("shape", [3]),
        ("first", [5, 8, 11, 14]),
        ("second", [6, 9, 12, 15]),
    ):
        result[name] = float(right["word"][~empty & (labels["word"] != UNKNOWN) & np.isin(field, fields)].mean())
    result["empty"] = float(right["word"][empty].mean())
    for name in (*COUNTED, *NOTES):
        result[name] = float(right[name][labels[name] != UNKNOWN].mean())
    return result
