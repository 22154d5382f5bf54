"""The loss of a step is that of its global batch, however it is split."""

import numpy as np
import paddle
import pytest

from paddlemix.datasets.collator import LlavaCollator
from paddlemix.datasets.packing import PackedDataset
from paddlemix.errors import UserError
from paddlemix.models.llava.onednn import multiplies_in_bfloat16
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.arguments import FinetuneArguments
from paddlemix.trainer.callbacks import read_log
from paddlemix.trainer.freezing import named_model_parameters, select_trained
from paddlemix.trainer.trainer import LlavaTrainer
from tests.trainer.tiny import Samples, samples, tiny_model


def train(folder, dataset, model=None, lora=False, **changes):
    """Losses and weights of a short run."""
    model = model if model is not None else tiny_model()
    if lora:
        paddle.seed(1)
        model = add_lora(model, dropout=changes.pop("lora_dropout", 0.0))
    select_trained(model, lora=lora)
    options = dict(
        output_dir=str(folder), device="cpu", max_steps=6, learning_rate=3e-3, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, lora=lora,
    )  # fmt: skip
    trainer = LlavaTrainer(model, FinetuneArguments(**{**options, **changes}), dataset)
    trainer.train()
    losses = [entry["loss"] for entry in read_log(folder / "train_log.jsonl") if "loss" in entry]
    weights = {name: value.numpy() for name, value in named_model_parameters(model) if not value.stop_gradient}
    return losses, weights


@pytest.mark.parametrize("lora", [False, True])
def test_one_step_is_the_same_however_the_batch_is_split(tmp_path, lora):
    data = Samples(samples(20))  # the last global batch of an epoch has four rows
    found = {}
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        found[batch] = train(
            tmp_path / str(batch),
            data,
            lora=lora,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
    for batch in (2, 1):
        np.testing.assert_allclose(found[batch][0], found[8][0], atol=1e-5)
        for name, value in found[8][1].items():
            np.testing.assert_allclose(found[batch][1][name], value, atol=2e-5, err_msg=name)


def test_the_logged_loss_is_the_sum_over_supervised_tokens_by_their_number(tmp_path):
    rows = samples(6)
    losses, _ = train(
        tmp_path, Samples(rows), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=1
    )
    model, total, count = tiny_model(), 0.0, 0
    model.eval()
    for row in rows:  # each alone, without padding
        batch = {key: paddle.to_tensor(value) for key, value in LlavaCollator()([row]).items()}
        total += float(model(**batch, loss_reduction="sum").loss)
        count += sum(label != -100 for label in row["labels"])
    np.testing.assert_allclose(losses, [total / count], rtol=1e-5)


def test_the_mean_of_the_steps_is_logged(tmp_path):
    data = Samples(samples(16))
    every, _ = train(tmp_path / "every", data, per_device_train_batch_size=4)
    third, _ = train(tmp_path / "third", data, per_device_train_batch_size=4, logging_steps=3)
    np.testing.assert_allclose(third, [np.mean(every[:3]), np.mean(every[3:])], rtol=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_recompute_changes_nothing(tmp_path, lora):
    data = Samples(samples(12))
    plain = train(tmp_path / "plain", data, lora=lora, lora_dropout=0.1, per_device_train_batch_size=4)
    again = train(tmp_path / "again", data, lora=lora, lora_dropout=0.1, per_device_train_batch_size=4, recompute=True)
    np.testing.assert_allclose(again[0], plain[0], rtol=1e-6)
    for name, value in plain[1].items():
        np.testing.assert_allclose(again[1][name], value, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("lora, dropout", [(False, 0.0), (True, 0.0), (True, 0.1)])
def test_products_in_bfloat16(tmp_path, lora, dropout):
    """``bf16`` on a CPU: nearly the losses of float32, weights in float32; nothing of it at level O0."""
    if not multiplies_in_bfloat16():
        with pytest.raises(UserError, match="bf16 is true, but this CPU"):
            FinetuneArguments(output_dir=str(tmp_path), device="cpu", bf16=True)
        return
    options = dict(lora=lora, lora_dropout=dropout, per_device_train_batch_size=4)
    data = Samples(samples(12))
    exact = train(tmp_path / "float32", data, **options)
    rounded = train(tmp_path / "bfloat16", data, bf16=True, **options)
    again = train(tmp_path / "again", data, bf16=True, recompute=True, **options)
    off = train(tmp_path / "off", data, bf16=True, fp16_opt_level="O0", **options)
    assert off[0] == exact[0] and rounded[0] != exact[0]
    np.testing.assert_allclose(rounded[0], exact[0], rtol=5e-3)
    np.testing.assert_allclose(again[0], rounded[0], rtol=1e-6)
    paddle.seed(1)
    begun = tiny_model()
    begun = dict(named_model_parameters(add_lora(begun, dropout=dropout) if lora else begun))
    for name, value in rounded[1].items():
        assert value.dtype == np.float32
        one, other = (weights[1][name] - begun[name].numpy() for weights in (rounded, exact))
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.9, name


def test_packing_gives_the_loss_of_the_samples_alone(tmp_path):
    rows = samples(10)
    packed = PackedDataset(Samples(rows), 64)
    assert len(packed) < 10
    size = len(packed)
    together, _ = train(tmp_path / "packed", packed, per_device_train_batch_size=size, max_steps=3)
    alone, _ = train(tmp_path / "alone", Samples(rows), per_device_train_batch_size=10, max_steps=3)
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_grouping_changes_the_batches_but_uses_every_row_once(tmp_path):
    rows = samples(16, text_only=0.5)
    seen = []

    class Watched(Samples):
        def __getitem__(self, index):
            seen.append(int(index))
            return super().__getitem__(index)

    train(tmp_path, Watched(rows), per_device_train_batch_size=2, max_steps=8, group_by_modality_length=True)
    pictured = [rows[i]["pixel_values"] is not None for i in seen]
    whole = [pictured[i] == pictured[i + 1] for i in range(0, 16, 2)]
    assert sorted(seen) == list(range(16)) and sum(whole) >= 7


def test_a_loss_that_is_no_number_is_told(tmp_path):
    model = tiny_model()
    model.lm_head.weight.set_value(paddle.full_like(model.lm_head.weight, float("nan")))
    with pytest.raises(UserError, match="the loss became nan at step 1"):
        train(tmp_path, Samples(samples(4)), model=model)


def test_gradients_are_clipped_over_all_parameters_together(tmp_path):
    """A projector with a learning rate of its own is still under the one norm."""
    data = Samples(samples(8))
    options = dict(per_device_train_batch_size=8, max_steps=1, lr_scheduler_type="constant", adam_epsilon=1.0)
    before = {name: value.numpy().copy() for name, value in named_model_parameters(tiny_model())}

    def moved(folder, **changes):
        _, after = train(folder, data, **options, **changes)
        return {name: np.abs(after[name] - before[name]).max() for name in after}

    # with an epsilon of 1 AdamW's first update is about the clipped gradient times the learning rate
    free, clipped = moved(tmp_path / "free", max_grad_norm=0.0), moved(tmp_path / "clipped", max_grad_norm=1e-3)
    own = moved(tmp_path / "own", max_grad_norm=1e-3, mm_projector_lr=3e-3)
    projector, decoder = "llama.mm_projector.0.weight", "lm_head.weight"
    np.testing.assert_allclose(clipped[projector] / free[projector], clipped[decoder] / free[decoder], rtol=0.2)
    np.testing.assert_allclose(own[projector], clipped[projector], rtol=1e-3)
