"""The model as PaddleNLP's own tools use it: Trainer, GenerationConfig, streamers, another vocabulary."""

import json

import numpy as np
import paddle
import pytest
from paddlenlp.generation import GenerationConfig, TextStreamer
from paddlenlp.trainer import Trainer, TrainingArguments

from paddlemix.errors import UserError
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

from .test_decoder import golden, model  # noqa: F401  fixtures
from .test_modeling import IMAGE, PROMPT, build, picture

SHORT = paddle.to_tensor([[5, 6, 7]])


class Rows(paddle.io.Dataset):
    def __init__(self, labelled=True):
        self.labelled = labelled

    def __len__(self):
        return 6

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        ids = np.array([1] + [IMAGE] * 4 + random.integers(3, 40, 6).tolist())
        row = {"input_ids": ids, "pixel_values": random.normal(size=(1, 3, 8, 8)).astype("float32")}
        return {**row, "labels": np.where(np.arange(11) < 6, -100, ids)} if self.labelled else row


def collate(rows):
    joined = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    joined["pixel_values"] = joined["pixel_values"][:, 0]
    return {key: paddle.to_tensor(values) for key, values in joined.items()}


def test_paddlenlps_trainer_trains_evaluates_predicts_and_saves(tmp_path):
    ours = build()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        learning_rate=1e-2,
        device="cpu",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=ours,
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=collate,
        compute_metrics=lambda given: {"shape": given.predictions.shape},
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predicted = trainer.predict(Rows())
    assert predicted.predictions.shape == predicted.metrics["test_shape"] == (6, 11, 50)
    assert trainer.predict(Rows(labelled=False)).predictions.shape == (6, 11, 50)
    trainer.save_model(str(tmp_path / "final"))
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path / "final")
    for one, other in zip(ours.parameters(), again.parameters()):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_an_output_is_paddlenlps_tuple(model):  # noqa: F811
    output = model(SHORT)
    (logits,) = output
    assert isinstance(output, tuple) and len(output) == 1 and output.loss is None
    assert logits is output[0] is output.logits is output["logits"]
    output = model(SHORT, labels=SHORT)
    loss, logits = output
    assert loss is output[0] is output["loss"] and logits is output[1] and output[1:] == (logits,)
    with pytest.raises(KeyError):
        model(SHORT)["loss"]


# ---- GenerationConfig ----


def config_and_keywords(model, config, **keywords):  # noqa: F811
    """What both ways of asking give."""
    prompt = paddle.to_tensor(np.arange(3, 9)[None] % 60)
    return [
        generated[0].tolist()
        for generated in (
            model.generate(prompt, generation_config=config),
            model.generate(prompt, config),  # as PaddleNLP's callers may
            model.generate(prompt, **keywords),
        )
    ]


@pytest.mark.parametrize(
    "asked, keywords",
    [
        ({"decode_strategy": "beam_search", "num_beams": 2}, None),
        ({"num_beams": 6, "num_return_sequences": 6, "length_penalty": 0.5}, {"decode_strategy": "beam_search"}),
        ({"num_beams": 3, "early_stopping": True}, {"decode_strategy": "beam_search"}),
        ({"max_length": 6}, {"max_new_tokens": 6}),
        ({"max_length": 6, "max_new_tokens": 9}, None),
        ({"min_length": 8, "eos_token_id": list(range(40))}, None),
        ({"repetition_penalty": 3.0}, None),
    ],
)
def test_a_generation_config_says_what_keywords_say(model, asked, keywords):  # noqa: F811
    keywords = {**asked, **(keywords or {})}
    if "max_new_tokens" in keywords:
        keywords.pop("max_length", None)
    one, two, three = config_and_keywords(model, GenerationConfig(**asked), **keywords)
    assert one == two == three
    if "min_length" in asked:
        assert len(one[0]) >= 9


def test_keywords_win_over_the_config(model):  # noqa: F811
    config = GenerationConfig(max_new_tokens=9, eos_token_id=[])
    assert model.generate(SHORT, config, max_new_tokens=4)[0].shape == [1, 4]
    assert model.generate(SHORT, config, max_length=4)[0].shape == [1, 4]
    assert model.generate(SHORT, config, min_length=0, synced_gpus=False, stopping_criteria=None)[0].shape == [1, 9]


@pytest.mark.parametrize(
    "setting",
    [{"no_repeat_ngram_size": 2}, {"forced_eos_token_id": 3}, {"trunc_input": False}, {"diversity_rate": 0.5}],
)
def test_what_is_not_built_is_refused(model, setting):  # noqa: F811
    (name,) = setting
    with pytest.raises(UserError, match=f"generation_config sets {name} to"):
        model.generate(SHORT, GenerationConfig(**setting))
    with pytest.raises(UserError, match=f"generate.. was given {name} to"):
        model.generate(SHORT, **setting)


def test_the_models_own_generation_config(tmp_path):
    ours = build(eos_token_id=[2, 9])
    assert ours.can_generate() and ours.generation_config.eos_token_id == [2, 9]
    ours.generation_config.max_new_tokens = 3
    ours.generation_config.min_new_tokens = 3
    ids = ours.generate(SHORT)[0]
    assert ids.shape == [1, 3]
    ours.save_pretrained(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.eos_token_id == [2, 9]
    assert again.generate(SHORT)[0].tolist() == ids.tolist()


def test_a_published_generation_config(tmp_path):
    """As Vicuna's: the length counts the prompt there, and a temperature stands beside greedy search."""
    build().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    values = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6, "transformers_version": "4.31.0"}
    file.write_text(json.dumps({**values, "bos_token_id": 1, "eos_token_id": 49}))
    opened = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert opened.generation_config.temperature == 0.9 and opened.config.eos_token_id == 49
    assert opened.generate(SHORT, min_new_tokens=20)[0].shape == [1, 20]
    file.write_text(json.dumps({"num_return_sequences": 3}))
    with pytest.raises(UserError, match="generation_config.json.*num_return_sequences"):
        LlavaLlamaForCausalLM.from_pretrained(tmp_path)


def test_sampling_follows_paddles_seed(model):  # noqa: F811
    def draw(seed):
        paddle.seed(seed)
        return model.generate(SHORT, decode_strategy="sampling", max_new_tokens=12)[0].tolist()

    assert draw(5) == draw(5) != draw(6)


def test_a_temperature_of_zero_still_gives_as_many_answers(model):  # noqa: F811
    ids, _ = model.generate(SHORT, decode_strategy="sampling", temperature=0, num_return_sequences=3, max_new_tokens=5)
    greedy, _ = model.generate(SHORT, max_new_tokens=5)
    assert ids.tolist() == greedy.tolist() * 3


def test_a_streamer_does_not_go_with_beams(model):  # noqa: F811
    with pytest.raises(UserError, match="streamer.*beam_search"):
        model.generate(SHORT, decode_strategy="beam_search", streamer=TextStreamer(None))


def test_a_streamer_gets_one_row(model):  # noqa: F811
    with pytest.raises(ValueError, match="batch size 1"):  # PaddleNLP's own
        model.generate(paddle.to_tensor([[1, 5], [1, 6]]), max_new_tokens=2, streamer=TextStreamer(None))


def test_beams_of_one_are_refused_where_beams_are_asked_for(model):  # noqa: F811
    config = GenerationConfig(decode_strategy="beam_search", num_beams=1)
    with pytest.raises(UserError, match="num_beams"):
        model.generate(SHORT, generation_config=config)


# ---- another vocabulary ----


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_may_grow_and_shrink(tied, tmp_path):
    ours = build(tie_word_embeddings=tied)
    prompt = paddle.to_tensor([PROMPT])
    before = ours(prompt, pixel_values=picture()).logits.numpy()
    ours.generate(prompt, pixel_values=picture(), max_new_tokens=2)
    assert ours.resize_token_embeddings(60).weight.shape == [60, 24]
    grown = ours(prompt, pixel_values=picture()).logits.numpy()
    np.testing.assert_allclose(grown[..., :50], before, atol=1e-5)
    assert grown.shape[-1] == 60 and np.abs(grown[..., 50:]).max() > 0
    assert ours.generate(paddle.to_tensor([[55, 59]]), max_new_tokens=3, eos_token_id=[])[0].shape == [1, 3]
    ours.save_pretrained(tmp_path)
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    np.testing.assert_allclose(again(prompt, pixel_values=picture()).logits.numpy(), grown, atol=1e-5)
    ours.resize_token_embeddings(40)
    np.testing.assert_allclose(ours(prompt, pixel_values=picture()).logits.numpy(), before[..., :40], atol=1e-5)
