"""NEFTune: how much, where, and when."""

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.callbacks import read_log
from paddlemix.trainer.freezing import select_trained
from paddlemix.trainer.noise import EmbeddingNoise
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, samples, tiny_model

WIDTH, ALPHA = 16, 5.0


@pytest.fixture
def embedding():
    layer = nn.Embedding(10, WIDTH)
    layer.train()
    return layer


def difference(embedding, noise, mask, segments=None):
    ids = paddle.ones(mask.shape, "int64")
    with noise.on(mask, segments):
        noisy = embedding(ids)
    return np.abs((noisy - embedding(ids)).numpy())


def test_noise_is_bounded_by_each_rows_real_length(embedding):
    paddle.seed(0)
    noise = EmbeddingNoise(embedding, ALPHA)
    mask = paddle.to_tensor([[1] * 64, [1] * 16 + [0] * 48])
    change = difference(embedding, noise, mask)
    for row, length in ((0, 64), (1, 16)):
        bound = ALPHA / np.sqrt(length * WIDTH)
        values = change[row, :length]
        assert values.max() <= bound and values.max() > 0.95 * bound  # uniform: the bound is nearly reached
        np.testing.assert_allclose(values.mean(), bound / 2, rtol=0.1)
    assert change[1, 16:].max() == 0


def test_packed_samples_have_their_own_lengths(embedding):
    noise = EmbeddingNoise(embedding, ALPHA)
    segments = paddle.to_tensor([[1] * 4 + [2] * 36 + [0] * 8])
    change = difference(embedding, noise, paddle.ones([1, 48], "int64"), segments)
    assert change[0, :4].max() > ALPHA / np.sqrt(36 * WIDTH)
    assert change[0, 4:40].max() <= ALPHA / np.sqrt(36 * WIDTH)
    assert change[0, 40:].max() == 0


def test_no_noise_in_evaluation_outside_a_step_or_after_removal(embedding):
    noise, mask = EmbeddingNoise(embedding, ALPHA), paddle.ones([1, 8], "int64")
    embedding.eval()
    assert difference(embedding, noise, mask).max() == 0
    embedding.train()
    assert difference(embedding, noise, mask).max() > 0
    assert (embedding(mask) - embedding(mask)).abs().max() == 0
    noise.remove()
    assert difference(embedding, noise, mask).max() == 0


def test_training_with_noise_goes_another_way(tmp_path):
    def losses(name, **changes):
        model = tiny_model()
        select_trained(model)
        args = FinetuneArguments(
            output_dir=str(tmp_path / name), device="cpu", max_steps=3, logging_steps=1, save_strategy="no",
            report_to="none", disable_tqdm=True, **changes,
        )  # fmt: skip
        LlavaTrainer(model, args, Samples(samples(8))).train()
        return [entry["loss"] for entry in read_log(tmp_path / name / "train_log.jsonl")]

    plain, noisy = losses("plain"), losses("noisy", neftune=True)
    assert plain != noisy and losses("again", neftune=True) == noisy
    assert losses("silent", neftune=True, neftune_noise_alpha=0.0) == plain
