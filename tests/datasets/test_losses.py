"""Each row's loss equals its loss alone: in a mixed batch, packed with others, and both."""

import numpy as np
import paddle
import pytest

from paddlemix.datasets.collator import LlavaCollator
from paddlemix.datasets.files import DatasetEntry
from paddlemix.datasets.packing import PackedDataset, join_samples
from paddlemix.datasets.supervised import SupervisedDataset
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from tests.datasets.tiny import ANYRES, mixed_rows, picture, tiny_processor, write_rows

COLLATE = LlavaCollator(pad_token_id=0)


@pytest.fixture(scope="module", params=["square", "anyres"])
def made(request, tmp_path_factory):
    """A model with random weights, and a dataset of all kinds of rows for it."""
    folder = tmp_path_factory.mktemp(request.param)
    processor = tiny_processor(folder / "model", **(ANYRES if request.param == "anyres" else {}))
    paddle.seed(0)
    config = processor.config
    config.initializer_range = 0.3  # far from uniform, so that a token that sees what it must not is seen
    model = LlavaLlamaForCausalLM(config)
    model.eval()
    rows = mixed_rows(folder)
    picture(folder / "5.png", (500, 40), seed=5)
    rows.append({"image": "5.png", "conversations": [["<image>\nA ribbon?", "A ribbon, yes, and a long one."]]})
    return model, SupervisedDataset([DatasetEntry((write_rows(folder / "x.json", rows),))], processor, 1024)


def token_losses(model, samples):
    """Losses [B, T - 1] of a batch, 0 where nothing is learned; computed here from the logits."""
    batch = {key: paddle.to_tensor(value) for key, value in COLLATE(samples).items()}
    labels = batch.pop("labels")
    with paddle.no_grad():
        logits = model(**batch).logits[:, :-1]
        total = float(model(**batch, labels=labels, loss_reduction="sum").loss)
    losses = paddle.nn.functional.cross_entropy(
        logits, labels[:, 1:].unsqueeze(-1), ignore_index=-100, reduction="none"
    ).squeeze(-1)
    losses = losses.numpy().astype("float64")
    assert total == pytest.approx(losses.sum(), rel=1e-5)
    return losses


def alone(model, dataset):
    return [token_losses(model, [dataset[index]])[0] for index in range(len(dataset))]


def test_in_a_mixed_batch(made):
    model, dataset = made
    expected = alone(model, dataset)
    together = token_losses(model, [dataset[index] for index in range(len(dataset))])
    assert together.shape[0] == len(dataset) == 7
    for one, row in zip(expected, together):
        np.testing.assert_allclose(row[: len(one)], one, rtol=1e-5, atol=1e-5)
        assert not row[len(one) :].any()


def test_packed_into_one_row(made):
    model, dataset = made
    expected = alone(model, dataset)
    order = [3, 0, 6, 2, 5, 1, 4]
    packed = token_losses(model, [join_samples([dataset[index] for index in order])])[0]
    start = 0
    for index in order:
        one = expected[index]
        np.testing.assert_allclose(packed[start : start + len(one)], one, rtol=1e-5, atol=1e-5)
        start += len(one) + 1
        if start <= len(packed):
            assert packed[start - 1] == 0, "the last token of a sample learned the first of the next"


def test_a_batch_of_packed_and_single_rows(made):
    model, dataset = made
    sums = [losses.sum() for losses in alone(model, dataset)]
    rows = [[1, 2], [0], [3, 5, 4], [6]]
    batch = [join_samples([dataset[index] for index in row]) if len(row) > 1 else dataset[row[0]] for row in rows]
    got = token_losses(model, batch).sum(axis=1)
    np.testing.assert_allclose(got, [sum(sums[index] for index in row) for row in rows], rtol=1e-5)


def test_a_packed_dataset_has_the_loss_of_its_rows(made):
    model, dataset = made
    packed = PackedDataset(dataset, 256)
    assert len(packed) < len(dataset)
    total = sum(token_losses(model, [packed[index]]).sum() for index in range(len(packed)))
    assert total == pytest.approx(sum(losses.sum() for losses in alone(model, dataset)), rel=1e-5)


def test_what_a_neighbour_says_changes_nothing_in_a_pack(made):
    """Isolation seen from the other side: another text and another picture in front, the same losses behind."""
    model, dataset = made
    last = dataset[6]
    behind = []
    for first in (1, 5):
        losses = token_losses(model, [join_samples([dataset[first], last])])[0]
        behind.append(losses[len(dataset[first]["input_ids"]) :])
    np.testing.assert_allclose(behind[0], behind[1], rtol=1e-5, atol=1e-5)
    assert behind[0].any()
