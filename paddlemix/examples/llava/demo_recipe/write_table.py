"""Stage 1, second half: two more layers write what the tower sees as a table, one word a patch, which a decoder can read.

The patches, in raster order, become rows of twelve words, one row for each object in reading order:

    small red circle 2 3 3 3 7 9 7 8 ;      its size, colour and shape, the decimals of left, top, right, bottom, an end

The layers below are frozen. The first of the two layers is asked for each object's place in the reading order, the second
for the words; the heads that are asked are thrown away.
"""

import logging
import os
import random
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

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
    digits,
    initialize_layers,
    learning_rate_at,
    normalize,
    scene_picture,
)
from paddlemix.examples.llava.demo_recipe.scenes import SHAPES, SIZES

__all__ = ["END", "EMPTY", "WORDS", "table_of", "write_table"]

logger = logging.getLogger("paddlemix.demo_recipe")

END, EMPTY = ";", "\n"
WORDS = (*SIZES, *COLOR_NAMES, *SHAPES, *(str(digit) for digit in range(10)), END, EMPTY)
_INDEX = {word: index for index, word in enumerate(WORDS)}
OBJECTS, FIELDS = 5, 12


def table_of(objects: List[Target]) -> Tuple[np.ndarray, np.ndarray]:
    """Labels of one picture: the word of each patch [P], and the place in the reading order of each cell [C]; ``UNKNOWN``
    where a word isn't known or a cell is empty."""
    words = np.full(GRID * GRID, _INDEX[EMPTY])
    places = np.full(CELLS * CELLS, UNKNOWN)
    cells = []
    for obj in objects:
        left, top, right, bottom = obj[3]
        row, column = (min(CELLS - 1, int(middle * CELLS)) for middle in ((top + bottom) / 2, (left + right) / 2))
        cells.append(row * CELLS + column)
    for place, number in enumerate(np.argsort(cells)):
        size, color, shape, box = objects[number]
        places[cells[number]] = place
        row = [size, color, shape, *(str(digit) for pair in digits(box) for digit in pair), END]
        words[place * FIELDS : (place + 1) * FIELDS] = [UNKNOWN if word is None else _INDEX[word] for word in row]
    return words, places


def batch_of_step(step: int, size: int, easy: EasyVQAPictures, seed: int):
    """pixel_values [N, 3, H, W], words [N, P], places [N, C]; a quarter of easy-VQA, the same for the same step."""
    rng = random.Random(f"table-{seed}-{step}")
    from_easy = size // 4
    samples = [easy.take(rng) for _ in range(from_easy)]
    # the seeds go on after those of the layers below
    samples += [scene_picture(200_000_000 + step * size + i) for i in range(size - from_easy)]
    return collate(samples)


def collate(samples):
    tables = [table_of(objects) for _, objects in samples]
    words, places = (np.stack(each) for each in zip(*tables))
    return normalize([picture for picture, _ in samples]), words, places


def write_table(output_dir: str, vision: Dict, tower: Path, **options) -> Dict[str, float]:
    """Trains the last two layers on top of ``tower``, and saves all of them as ``tower.safetensors`` in ``output_dir``.

    Args:
        vision: sizes of the whole tower.
        tower: safetensors of the layers below.
        options: steps, batch_size, learning_rate, seed, easy_vqa (data folder) and save_minutes of :func:`_write_table`.

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
    steps: int = 1600,
    batch_size: int = 64,
    learning_rate: float = 1.5e-3,
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
    easy = EasyVQAPictures(find_easy_vqa(easy_vqa))
    paddle.seed(seed)
    whole = CLIPVisionTower(CLIPVisionConfig(**vision), select_layer=-1, select_feature="cls_patch")
    layers = whole.vision_tower.vision_model.transformer.layers
    below, counting, writing = layers[:-2], layers[-2], layers[-1]
    top = nn.LayerList([counting, writing])
    initialize_layers(top, vision)
    place_head = nn.Linear(vision["hidden_size"], OBJECTS)
    word_head = nn.Linear(vision["hidden_size"], len(WORDS))
    given = {name[len(TOWER_PREFIX) :]: value for name, value in load_file(str(tower)).items()}
    whole.set_state_dict({**whole.state_dict(), **given})
    trained = [*top.parameters(), *place_head.parameters(), *word_head.parameters()]
    schedule = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: learning_rate_at(step, steps, learning_rate))
    optimizer = paddle.optimizer.AdamW(
        schedule, beta2=0.98, weight_decay=0.02, parameters=trained, grad_clip=nn.ClipGradByGlobalNorm(1.0)
    )
    held = {"top": top, "place_head": place_head, "word_head": word_head, "optimizer": optimizer}
    checkpoint, start = out / "checkpoint.pdparams", 0
    if checkpoint.is_file():
        state = paddle.load(str(checkpoint))
        for name, part in held.items():
            part.set_state_dict(state[name])
        start = int(state["step"])
        logger.info("going on from step %d", start)

    def save(step: int) -> None:
        scratch = out / "checkpoint.tmp"
        paddle.save({**{name: part.state_dict() for name, part in held.items()}, "step": step}, str(scratch))
        os.replace(scratch, checkpoint)

    places_of_cells = paddle.to_tensor(cell_patches().reshape(-1) + 1)  # after the class token

    def forward(pixel_values):
        """Logits of places [N, 4 C, 5] and words [N, P, W]."""
        model = whole.vision_tower.vision_model
        with paddle.no_grad():
            hidden = model.embed(paddle.to_tensor(pixel_values))
            for layer in below:
                hidden = layer(hidden)
        hidden = counting(hidden)
        at_cells = place_head(hidden.index_select(places_of_cells, axis=1))
        return at_cells, word_head(writing(hidden)[:, 1:])

    def cross_entropy(logits, labels):
        labels = paddle.to_tensor(labels).astype("int64").flatten()
        known = (labels != UNKNOWN).astype("float32").sum().clip(min=1)
        # Paddle's mean divides by all positions, not by those that count
        return F.cross_entropy(logits.flatten(0, -2), labels, ignore_index=UNKNOWN, reduction="sum") / known

    began = saved = time.time()
    for step in range(start, steps):
        pixel_values, words, places = batch_of_step(step, batch_size, easy, seed)
        place_logits, word_logits = forward(pixel_values)
        filled = np.where(words == _INDEX[EMPTY], UNKNOWN, words)
        empty = np.where(words == _INDEX[EMPTY], words, UNKNOWN)
        loss = cross_entropy(place_logits, np.tile(places, (1, 4)))
        loss = loss + 2 * cross_entropy(word_logits, filled) + 0.3 * cross_entropy(word_logits, empty)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step % 50 == 0:
            figures = _accuracy(place_logits.numpy(), word_logits.numpy(), words, places)
            text = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
            pace = (step + 1 - start) * batch_size / (time.time() - began)
            logger.info("table step %d/%d loss %.3f %.0f pictures/s %s", step, steps, float(loss), pace, text)
        if time.time() - saved > 60 * save_minutes:
            save(step + 1)
            saved = time.time()
    save(steps)
    with paddle.no_grad():
        pixel_values, words, places = collate([scene_picture(seed) for seed in VALIDATION_SEEDS])
        parts = [forward(pixel_values[i : i + 64]) for i in range(0, len(words), 64)]
    logits = [paddle.concat(each).numpy() for each in zip(*parts)]
    figures = _accuracy(*logits, words, places)
    logger.info("validation %s", figures)
    save_file(
        {TOWER_PREFIX + name: value.numpy() for name, value in whole.state_dict().items()},
        str(out / "tower.safetensors"),
    )
    return figures


def _accuracy(place_logits, word_logits, words, places) -> Dict[str, float]:
    """Share of right answers: places, and words of each field of objects' rows and of empty ones."""
    places, guess = np.tile(places, (1, 4)), word_logits.argmax(-1)
    result = {"place": float((place_logits.argmax(-1) == places)[places != UNKNOWN].mean())}
    field = np.arange(GRID * GRID) % FIELDS
    filled = (words != _INDEX[EMPTY]) & (words != UNKNOWN)
    for name, chosen in (
        ("size", [0]),
        ("color", [1]),
        ("shape", [2]),
        ("first", [3, 5, 7, 9]),
        ("second", [4, 6, 8, 10]),
    ):
        where = filled & np.isin(field, chosen)
        result[name] = float((guess == words)[where].mean())
    result["empty"] = float((guess == words)[words == _INDEX[EMPTY]].mean())
    return result
