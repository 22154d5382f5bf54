"""Between stage 1 and 2: a first projector, which writes the tower's table in the decoder's own embeddings.

Each patch tells a word and perhaps a note (:mod:`write_table`); it is mapped to the decoder's embedding of that word, with the
note's added, so that a picture reads like lines of text. It is a regression on frozen features and takes a minute; stage 2
goes on from here with the decoder's own loss.
"""

import logging
from typing import Callable, Dict, List

import numpy as np

from paddlemix.examples.llava.demo_recipe.pretrain_tower import UNKNOWN, EasyVQAPictures
from paddlemix.examples.llava.demo_recipe.write_table import EMPTY, NEXT, NOTES, POINT, WORDS, batch_of_step

__all__ = ["fit_projector", "note_embeddings", "word_embeddings"]

logger = logging.getLogger("paddlemix.demo_recipe")

Encode = Callable[[str], List[int]]  # text -> ids without special tokens


def word_embeddings(embeddings: np.ndarray, encode: Encode) -> np.ndarray:
    """[W, D]: what each word of the table is in the decoder; a word of several tokens is their sum.

    Args:
        embeddings: [V, D], the decoder's.
    """
    rows = []
    for word in WORDS:
        if word == NEXT:  # a comma and a point in one place; the point is what leads to the digits
            rows.append(0.5 * embeddings[encode(",")].sum(0) + embeddings[encode(POINT)].sum(0))
        else:
            text = word if word in (POINT, EMPTY) or word.isdigit() else f" {word}"
            rows.append(embeddings[encode(text)].sum(0))
    return np.stack(rows)


def note_embeddings(embeddings: np.ndarray, encode: Encode) -> Dict[str, np.ndarray]:
    """[values + 1, D] of each kind of note: what it adds to its word. The last row, for no note, is 0.

    A count adds its digit; x and y add from -1 to 1 times half of the way from left to right or from top to bottom.
    """

    def of(text: str) -> np.ndarray:
        return embeddings[encode(text)].sum(0)

    ways = {"x": of(" right") - of(" left"), "y": of(" bottom") - of(" top")}
    result = {}
    for kind, values in NOTES.items():
        if kind == "count":
            rows = [of(str(value + 1)) for value in range(values)]
        else:
            rows = [ways[kind] / 2 * (2 * value / (values - 1) - 1) for value in range(values)]
        result[kind] = np.stack([*rows, np.zeros_like(rows[0])])
    return result


def fit_projector(
    tower,
    projector,
    words: np.ndarray,
    notes: Dict[str, np.ndarray],
    easy: EasyVQAPictures,
    steps: int = 400,
    batch_size: int = 32,
    seed: int = 2,
) -> float:
    """Trains ``projector`` in place on features of the frozen ``tower``.

    Args:
        words, notes: :func:`word_embeddings` and :func:`note_embeddings` of the decoder.

    Returns:
        The share of the patches that lie nearer to their own word than to any other, on the last steps.
    """
    import paddle

    schedule = paddle.optimizer.lr.CosineAnnealingDecay(2e-3, T_max=steps)
    optimizer = paddle.optimizer.AdamW(schedule, weight_decay=0.0, parameters=projector.parameters())
    nearest = []
    for step in range(steps):
        pixel_values, table = batch_of_step(step, batch_size, easy, seed)
        with paddle.no_grad():
            features = tower(paddle.to_tensor(pixel_values))
        labels = table["word"].reshape(-1)
        chosen = np.flatnonzero(labels != UNKNOWN)
        output = projector(features.flatten(0, 1).index_select(paddle.to_tensor(chosen)))
        over = sum(notes[kind][table[kind].reshape(-1)[chosen]] for kind in NOTES)  # no note is -1, the last row
        loss = ((output - paddle.to_tensor(words[labels[chosen]] + over)) ** 2).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step >= steps - 20:
            distances = (((output.numpy() - over)[:, None] - words) ** 2).sum(-1)
            nearest.append((distances.argmin(1) == labels[chosen]).mean())
        if step % 100 == 0:
            logger.info("projector step %d/%d distance %.2f", step, steps, float(loss) ** 0.5)
    return float(np.mean(nearest))
