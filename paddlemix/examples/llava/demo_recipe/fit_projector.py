"""Between stage 1 and 2: a first projector, which writes the tower's table in the decoder's own embeddings.

Each patch tells one word (:mod:`write_table`); it is mapped to the decoder's embedding of that word, so that a picture
reads like a line of text. It is a regression on frozen features and takes a minute; stage 2 goes on from here with the
decoder's own loss.
"""

import logging
from typing import Callable, List

import numpy as np

from paddlemix.examples.llava.demo_recipe.pretrain_tower import UNKNOWN, EasyVQAPictures
from paddlemix.examples.llava.demo_recipe.write_table import EMPTY, END, WORDS, batch_of_step

__all__ = ["fit_projector", "word_embeddings"]

logger = logging.getLogger("paddlemix.demo_recipe")


def word_embeddings(embeddings: np.ndarray, encode: Callable[[str], List[int]]) -> np.ndarray:
    """[W, D]: what each word of the table is in the decoder; a word of several tokens is their sum.

    Args:
        embeddings: [V, D], the decoder's.
        encode: text -> ids without special tokens.
    """
    texts = [word if word in (END, EMPTY) or word.isdigit() else f" {word}" for word in WORDS]
    return np.stack([embeddings[encode(text)].sum(0) for text in texts])


def fit_projector(
    tower, projector, words: np.ndarray, easy: EasyVQAPictures, steps: int = 400, batch_size: int = 32, seed: int = 2
) -> float:
    """Trains ``projector`` in place on features of the frozen ``tower``.

    Args:
        words: [W, D] of :func:`word_embeddings`.

    Returns:
        The share of the patches that lie nearer to their own word than to any other, on the last steps.
    """
    import paddle

    schedule = paddle.optimizer.lr.CosineAnnealingDecay(2e-3, T_max=steps)
    optimizer = paddle.optimizer.AdamW(schedule, weight_decay=0.0, parameters=projector.parameters())
    nearest = []
    for step in range(steps):
        pixel_values, labels, _ = batch_of_step(step, batch_size, easy, seed)
        with paddle.no_grad():
            features = tower(paddle.to_tensor(pixel_values))
        labels = labels.reshape(-1)
        filled = np.flatnonzero((labels != UNKNOWN) & (labels != WORDS.index(EMPTY)))
        # one empty patch for every two of objects: there are far more of them, and they are all alike
        empty = np.flatnonzero(labels == WORDS.index(EMPTY))
        chosen = np.concatenate([filled, empty[:: max(1, 2 * len(empty) // max(1, len(filled)))]])
        output = projector(features.flatten(0, 1).index_select(paddle.to_tensor(chosen)))
        loss = ((output - paddle.to_tensor(words[labels[chosen]])) ** 2).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        schedule.step()
        if step >= steps - 20:
            distances = ((output.numpy()[:, None] - words) ** 2).sum(-1)
            nearest.append((distances.argmin(1) == labels[chosen]).mean())
        if step % 100 == 0:
            logger.info("projector step %d/%d distance %.2f", step, steps, float(loss) ** 0.5)
    return float(np.mean(nearest))
