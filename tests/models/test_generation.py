"""Greedy, sampling and beam search against transformers and against the distribution they should draw from."""

from dataclasses import replace

import numpy as np
import paddle
import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.generation import GenerationSettings, Sampler, penalise_repetition

from .test_decoder import golden, model  # noqa: F401  fixtures

SAMPLING = GenerationSettings(decode_strategy="sampling", temperature=0.7, top_k=12, top_p=0.8, repetition_penalty=1.4)


@pytest.mark.parametrize(
    "name, given",
    [
        ("3_1.0", {"num_beams": 3}),
        ("4_2.0", {"num_beams": 4, "length_penalty": 2.0}),
        ("2_0.0", {"num_beams": 2, "length_penalty": 0.0}),
        ("no_repetition", {"num_beams": 3, "repetition_penalty": 1.5}),
        ("many_ends", {"num_beams": 2, "eos_token_id": "likely"}),
    ],
)
def test_beam_search_equals_transformers(golden, model, name, given):  # noqa: F811
    if given.get("eos_token_id") == "likely":  # the four best first tokens: more ends than beams
        given = {**given, "eos_token_id": golden["likely"].tolist()}
    settings = dict(max_new_tokens=10, decode_strategy="beam_search", eos_token_id=2, pad_token_id=1)
    ids, scores = model.generate(paddle.to_tensor(golden["short"]), **{**settings, **given})
    assert ids.numpy().tolist() == golden[f"beam_{name}"].tolist()
    np.testing.assert_allclose(scores.numpy()[:, 0], golden[f"beam_scores_{name}"], rtol=1e-5)


def test_beams_of_a_vocabulary_of_ends():
    from .test_host_passes import build

    ids = paddle.to_tensor([[1, 2, 3]])
    found, _ = build(vocab_size=4).generate(ids, decode_strategy="beam_search", num_beams=3, eos_token_id=[0, 1, 2, 3])
    assert found.shape == [1, 1]


@pytest.mark.parametrize("early_stopping", [True, False])
def test_a_prompt_whose_beams_are_done_waits_for_its_neighbours(early_stopping):
    from .test_host_passes import build

    small = build(vocab_size=40, initializer_range=0.5)
    prompts = np.random.RandomState(0).randint(8, 40, (24, 5))
    given = dict(decode_strategy="beam_search", num_beams=3, max_new_tokens=12, pad_token_id=0)
    given.update(early_stopping=early_stopping, eos_token_id=[2, 5, 7])
    together, scores = small.generate(paddle.to_tensor(prompts), **given)
    for row, prompt in enumerate(prompts):
        alone, score = small.generate(paddle.to_tensor(prompt[None]), **given)
        alone = alone[0].tolist()
        assert together[row].tolist() == alone + [0] * (together.shape[1] - len(alone))
        assert float(scores[row]) == pytest.approx(float(score), rel=1e-4)


def test_draws_follow_the_distribution_of_transformers_warpers(golden):  # noqa: F811
    expected = golden["warped"][0]
    sampler = Sampler(replace(SAMPLING, seed=0))
    logits = paddle.to_tensor(golden["scores"])
    draws = [int(sampler(logits, golden["short"][:1].tolist(), 0)[0][0]) for _ in range(4000)]
    counts = np.bincount(draws, minlength=64) / len(draws)
    assert set(np.nonzero(counts)[0]) <= set(np.nonzero(expected)[0])
    np.testing.assert_allclose(counts, expected, atol=0.03)


def test_a_seed_gives_one_answer(golden, model):  # noqa: F811
    def answer(seed):
        prompt = paddle.to_tensor(golden["short"][:1])
        return model.generate(prompt, decode_strategy="sampling", max_new_tokens=20, seed=seed)[0].tolist()

    assert answer(7) == answer(7)
    assert answer(7) != answer(8)


def test_greedy_equals_the_argmax_of_full_forwards(golden, model):  # noqa: F811
    ids, scores = model.generate(paddle.to_tensor(golden["short"]), max_new_tokens=12, eos_token_id=[])
    sequence, total = golden["short"], 0.0
    for _ in range(12):
        logits = model(paddle.to_tensor(sequence)).logits[:, -1]
        best = logits.argmax(-1, keepdim=True)
        total += paddle.take_along_axis(paddle.nn.functional.log_softmax(logits), best, 1).numpy()
        sequence = np.concatenate([sequence, best.numpy()], axis=1)
    assert ids.tolist() == sequence[:, golden["short"].shape[1] :].tolist()
    np.testing.assert_allclose(scores.numpy(), total / 12, atol=1e-4)


def test_rows_end_at_their_own_end_token(golden, model):  # noqa: F811
    free = model.generate(paddle.to_tensor(golden["short"]), max_new_tokens=8, eos_token_id=[])[0].numpy()
    end = int(free[0, 2])
    ids = model.generate(paddle.to_tensor(golden["short"]), max_new_tokens=8, eos_token_id=end, pad_token_id=0)[0]
    first = free[0].tolist().index(end)
    assert ids[0].tolist()[: first + 1] == free[0].tolist()[: first + 1]
    assert set(ids[0].tolist()[first + 1 :]) <= {0}


def test_a_row_whose_neighbours_have_ended_goes_on_as_if_alone(golden, model):  # noqa: F811
    """Rows of a batch end one after another, and with them their part of the cache; padding and penalty stay right."""
    prompts = [golden["short"][0][cut:].tolist() for cut in (0, 1, 2, 3)]
    common = dict(max_new_tokens=40, repetition_penalty=1.1, pad_token_id=1)

    def alone(prompt, ends):
        return model.generate(paddle.to_tensor([prompt]), eos_token_id=ends, **common)

    free = [alone(prompt, [])[0].tolist()[0] for prompt in prompts]
    # end tokens at which the rows stop at different lengths, the longest late
    ends = [free[0][1], free[1][4], free[2][9]]
    expected = [alone(prompt, ends) for prompt in prompts]
    lengths = [ids.shape[1] for ids, _ in expected]
    assert sorted(lengths)[1] < 12 and max(lengths) > sorted(lengths)[2], lengths
    longest = max(map(len, prompts))
    padded = paddle.to_tensor([[1] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = paddle.to_tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids, scores = model.generate(padded, mask, eos_token_id=ends, **common)
    for row, (wanted, score) in enumerate(expected):
        wanted = wanted.tolist()[0]
        assert ids[row].tolist() == wanted + [1] * (max(lengths) - len(wanted))
        np.testing.assert_allclose(scores[row].item(), score.item(), atol=1e-4)


def test_repetition_penalty_leaves_placeholders_out():
    scores = penalise_repetition(np.array([[2.0, -2.0, 4.0]]), [[0, 1, -200]], 2.0)
    assert scores.tolist() == [[1.0, -4.0, 4.0]]


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-30])
@pytest.mark.parametrize("penalty", [1e-310, 1e-300, 1.0, 1e300, 1.7e308])
@pytest.mark.filterwarnings("error")
def test_extreme_settings_have_their_limit_as_effect(temperature, penalty):
    logits = np.array([[3.0, -2.0, 4.0, 1.0]], np.float32)
    settings = GenerationSettings(repetition_penalty=penalty)
    sampled = replace(settings, decode_strategy="sampling", temperature=temperature, seed=0)
    expected = 2 if penalty == 1 else 0 if penalty < 1 else 2
    for each in (settings, sampled):
        token, log_prob = Sampler(each)(paddle.to_tensor(logits), [[0, 1]], 0)
        assert token.tolist() == [expected] and np.isfinite(log_prob).all()


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_an_extreme_penalty_in_beam_search(golden, model, penalty):  # noqa: F811
    ids = paddle.to_tensor(golden["short"])
    _, scores = model.generate(ids, decode_strategy="beam_search", num_beams=3, repetition_penalty=penalty)
    assert np.isfinite(scores.numpy()).all()


def test_several_draws_per_prompt(golden, model):  # noqa: F811
    ids, _ = model.generate(
        paddle.to_tensor(golden["short"]), decode_strategy="sampling", num_return_sequences=3, max_new_tokens=4, seed=1
    )
    assert ids.shape[0] == 6 and len({tuple(row) for row in ids.tolist()}) > 2


@pytest.mark.parametrize(
    "given, message",
    [
        ({"temprature": 1}, "doesn't know temprature"),
        ({"top_p": 0}, "top_p is 0; expected"),
        ({"decode_strategy": "greedy"}, "decode_strategy is 'greedy'; expected one of"),
        ({"decode_strategy": "beam_search", "num_beams": 1}, "num_beams is 1"),
        ({"decode_strategy": "beam_search", "early_stopping": "never"}, "early_stopping is 'never'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; expected a whole number"),
        ({"temperature": "0.2"}, "temperature is '0.2'; expected a number"),
        ({"seed": -1}, "seed is -1; expected"),
        ({"eos_token_id": [[10], [20, 20]]}, "eos_token_ids is .*; expected a list of token ids"),
        ({"eos_token_ids": 3}, "eos_token_ids is 3; expected a list"),
        ({"generation_config": {"temprature": 1}}, "doesn't know temprature"),
        ({"generation_config": "x"}, "generation_config is 'x'; expected PaddleNLP's, or a dict"),
        ({"pad_token_id": "x"}, "pad_token_id is 'x'; expected a token id"),
        ({"images": "cat.png"}, "doesn't know images.*pixel_values"),
    ],
)
def test_a_wrong_setting_is_named(model, given, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        model.generate(paddle.ones([1, 2], "int64"), **given)


def test_settings_that_ask_for_nothing_here(golden, model):  # noqa: F811
    """What only beams have; end tokens that the vocabulary lacks; a penalty on a prompt of nothing but a picture."""
    ids = paddle.to_tensor(golden["short"])
    plain, _ = model.generate(ids, max_new_tokens=4, eos_token_id=[])
    for strategy in ("greedy_search", "beam_search"):
        more = {"early_stopping": "never"} if strategy == "greedy_search" else {"num_beams": 2}
        given = dict(max_new_tokens=4, min_new_tokens=2, eos_token_id=10**6, decode_strategy=strategy, **more)
        found, _ = model.generate(ids, **given)
        assert strategy == "beam_search" or found.tolist() == plain.tolist()
    scores = np.ones([1, 5], np.float32)
    assert (penalise_repetition(scores, [[-200, -200]], 1.5) == scores).all()
    assert (penalise_repetition(scores, [[]], 1.5) == scores).all()


def test_a_pad_id_that_is_no_token(golden, model, monkeypatch):  # noqa: F811
    """Early LLaMA files say -1; what the caller gives fills the rows, but isn't read."""
    ids = paddle.to_tensor(golden["short"])
    plain, _ = model.generate(ids, max_new_tokens=6, eos_token_id=[])
    ends = [int(plain[0, 1]), 2]  # the first row ends before the second
    for pad in (-1, 64):
        monkeypatch.setattr(model.config, "pad_token_id", pad)
        monkeypatch.setattr(model.generation_config, "pad_token_id", pad)
        for given, filled in (({}, ends[0]), ({"pad_token_id": pad}, pad)):
            found, _ = model.generate(ids, max_new_tokens=6, eos_token_id=ends, **given)
            assert found.tolist() == [plain[0, :2].tolist() + [filled] * 4, plain[1].tolist()]


def test_pad_ids_at_the_beginning_are_padding_without_a_mask_too(golden, model):  # noqa: F811
    ids = golden["short"].copy()
    ids[0, :5] = 0
    mask = np.ones_like(ids)
    mask[0, :5] = 0
    given = dict(max_new_tokens=6, pad_token_id=0)

    def answer(**more):
        return model.generate(paddle.to_tensor(ids), **{**given, **more})[0].tolist()

    ended = dict(eos_token_id=[0])  # no padding: a token that ends texts
    assert answer(eos_token_id=2) == answer(eos_token_id=2, attention_mask=paddle.to_tensor(mask))
    assert answer(**ended) == answer(**ended, attention_mask=paddle.ones_like(paddle.to_tensor(ids)))
    assert answer(**ended) != answer(eos_token_id=2)


def test_a_dict_of_settings(golden, model):  # noqa: F811
    ids = paddle.to_tensor(golden["short"])
    assert model.generate(ids, {"max_new_tokens": 3})[0].shape == [2, 3]
    shorter = {"max_new_tokens": 3, "eos_token_id": []}
    for given in ({"max_new_tokens": 4}, {"max_length": 4}, {"max_length": 4, "max_new_tokens": None}):
        assert model.generate(ids, generation_config=shorter, **given)[0].shape == [2, 4]
    assert model.generate(ids, generation_config=shorter, max_new_tokens=None)[0].shape == [2, 3]


def test_lists_and_arrays_in_place_of_tensors(golden, model):  # noqa: F811
    ids = golden["short"]
    expected = model.generate(paddle.to_tensor(ids), max_new_tokens=3)[0].tolist()
    mask = np.ones_like(ids)
    for given in ([ids], [ids.tolist()], [ids.astype(np.int32), mask], [ids.tolist(), mask.tolist()]):
        assert model.generate(*given, max_new_tokens=3)[0].tolist() == expected
    for wrong in ([[1, 2], [3]], "Hello", None, [["a"]]):
        with pytest.raises(UserError, match="input_ids .*expected a tensor"):
            model.generate(wrong)


def test_a_row_that_is_masked_altogether_is_named(model):  # noqa: F811
    with pytest.raises(UserError, match="prompt 2 is empty: its attention_mask is 0"):
        model.generate(paddle.ones([2, 3], "int64"), attention_mask=paddle.to_tensor([[0, 1, 1], [0, 0, 0]]))


def test_right_padding_is_refused(model):  # noqa: F811
    with pytest.raises(UserError, match="pad on the left"):
        model.generate(paddle.ones([1, 3], "int64"), attention_mask=paddle.to_tensor([[1, 1, 0]]))


def test_beams_grow_past_the_first_block_of_the_cache(golden, model, monkeypatch):  # noqa: F811
    monkeypatch.setattr("paddlemix.models.llava.decoder.KVCache.BLOCK", 8)
    ids, _ = model.generate(
        paddle.to_tensor(golden["short"]),
        max_new_tokens=10,
        decode_strategy="beam_search",
        num_beams=3,
        eos_token_id=2,
        pad_token_id=1,
    )
    assert ids.numpy().tolist() == golden["beam_3_1.0"].tolist()
