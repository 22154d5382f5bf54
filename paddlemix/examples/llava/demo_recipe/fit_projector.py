"""Between stage 1 and 2: a first projector, which writes what the tower sees in the decoder's own words.

A patch in an object's cell is mapped to the sum of the decoder's embeddings of the object's colour, shape and size, of a
mark for the patch's place in the cell, and of the two digits of the side of the box that the patch tells (the second digit
turned by a fixed rotation, so that it can be told from the first). The other patches are mapped to one word, "empty".
It is a regression on frozen features and takes a minute; stage 2 goes on from here with the decoder's own loss.
"""

import logging
from typing import Callable, Dict, List

import numpy as np

from paddlemix.examples.llava.demo_recipe.pretrain_tower import (
    COLOR_NAMES,
    GRID,
    NOTHING_COLOR,
    EasyVQAPictures,
    batch_of_step,
    cell_patches,
)
from paddlemix.examples.llava.demo_recipe.scenes import SHAPES, SIZES

__all__ = ["fit_projector", "word_targets"]

logger = logging.getLogger("paddlemix.demo_recipe")

CODE_LENGTH = 2.0  # of the marks and digits; an embedding of SmolLM2 is about 2.2 long


class Words:
    """The vectors that targets are made of.

    Args:
        embeddings: [V, D], the decoder's.
        encode: text -> ids without special tokens.
    """

    def __init__(self, embeddings: np.ndarray, encode: Callable[[str], List[int]]):
        width = embeddings.shape[1]
        random = np.random.RandomState(0)

        def embed(word: str) -> np.ndarray:
            return embeddings[encode(f" {word}")].sum(0)

        def unit(rows: np.ndarray) -> np.ndarray:
            return CODE_LENGTH * rows / np.linalg.norm(rows, axis=-1, keepdims=True)

        unknown = [np.zeros(width, dtype=np.float32)]  # the last row, which index -1 and "nothing" take
        self.colors = np.stack([embed(color) for color in COLOR_NAMES] + unknown)
        self.shapes = np.stack([embed(shape) for shape in SHAPES] + unknown)
        self.sizes = np.stack([embed(size) for size in SIZES] + unknown)
        self.empty = embed("empty")
        digits = embeddings[[encode(str(digit))[0] for digit in range(10)]]
        self.digits = unit(digits - digits.mean(0))
        rotation = np.linalg.qr(random.randn(width, width))[0].astype(np.float32)
        self.second_digits = self.digits @ rotation
        self.places = unit(random.randn(4, width).astype(np.float32))


def word_targets(labels: Dict[str, np.ndarray], words: Words) -> np.ndarray:
    """What every patch should be in the decoder's embedding space: labels of N pictures -> float32 [N, P, D]."""
    there = labels["color"] != NOTHING_COLOR  # [N, 4, C]
    cells = words.colors[labels["color"]] + words.shapes[labels["shape"]] + words.sizes[labels["size"]]
    cells = cells + words.places[:, None]
    cells = cells + words.digits[labels["digits"][..., 0]] + words.second_digits[labels["digits"][..., 1]]
    cells = np.where(there[..., None], cells, words.empty)  # [N, 4, C, D]
    targets = np.empty((len(cells), GRID * GRID, cells.shape[-1]), dtype=np.float32)
    targets[:, cell_patches().reshape(-1)] = cells.reshape(len(cells), GRID * GRID, -1)
    return targets


def fit_projector(
    tower, projector, words: Words, easy: EasyVQAPictures, steps: int = 400, batch_size: int = 32, seed: int = 2
) -> float:
    """Trains ``projector`` in place on features of the frozen ``tower``.

    Returns:
        The share of the targets' variance in objects' patches that is explained, on the last steps.
    """
    import paddle

    schedule = paddle.optimizer.lr.CosineAnnealingDecay(2e-3, T_max=steps)
    optimizer = paddle.optimizer.AdamW(schedule, weight_decay=0.0, parameters=projector.parameters())
    mean, explained = None, []
    for step in range(steps):
        pixel_values, labels = batch_of_step(step, batch_size, easy, seed)
        with paddle.no_grad():
            features = tower(paddle.to_tensor(pixel_values))
        targets = word_targets(labels, words)
        there = (np.abs(targets - words.empty).sum(-1) > 0).reshape(-1)
        # one empty patch for every two of objects: there are far more of them, and they are all alike
        empty = np.flatnonzero(~there)[:: max(1, int(2 * (~there).sum() / max(1, there.sum())))]
        chosen = np.concatenate([np.flatnonzero(there), empty])
        target = targets.reshape(-1, targets.shape[-1])[chosen]
        output = projector(features.flatten(0, 1).index_select(paddle.to_tensor(chosen)))
        loss = ((output - paddle.to_tensor(target)) ** 2).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step >= steps - 20:
            objects = target[: int(there.sum())]
            mean = objects.mean(0)
            rest = ((output.numpy()[: len(objects)] - objects) ** 2).sum()
            explained.append(1 - rest / ((objects - mean) ** 2).sum())
        if step % 100 == 0:
            logger.info("projector step %d/%d distance %.2f", step, steps, float(loss) ** 0.5)
    return float(np.mean(explained))
