"""LlavaChat: what it answers, what a turn costs, and what is left of a turn that goes wrong.

The reference is the same model on the whole prompt from scratch: ``generate`` has no cache from earlier turns.
"""

import base64
import copy
import json
import os
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.models.llava.chat import LlavaChat
from paddlemix.models.llava.conversation import conv_templates
from paddlemix.models.llava.features import PictureFeatures
from paddlemix.processors.chat_template import ChatTemplate
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.tokenizer import load_tokenizer
from tests.models import chat_models
from tests.models.chat_models import CAT
from tests.support import llama2_tokenizer_folder

WORDS = ["What is this?", "And that?", "你好吗?", "Why?", "Count to ten.", "Is it a cat?", "No.", "Yes!", "More", "End"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return chat_models.build(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def watch(parts):
    """Counts what goes through the tower and the decoder, independently of the chat's own figures."""
    model, _ = parts
    seen = SimpleNamespace(tower=0, tokens=0, reads=[])

    def tower(layer, inputs):
        seen.tower += inputs[0].shape[0]

    def decoder(layer, inputs):
        seen.tokens += inputs[0].shape[1]
        seen.reads.append(inputs[0].shape[1])

    hooks = [
        model.llama.vision_tower.register_forward_pre_hook(tower),
        model.llama.register_forward_pre_hook(decoder),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def chat_of(parts, **settings):
    """A chat with a model that has seen no picture yet."""
    PictureFeatures.of(parts[0]).clear()
    return LlavaChat(*parts, **{"temperature": 0, "max_new_tokens": 8, **settings})


def say(chat, question, image=None):
    return "".join(chat.ask(question, image=image))


def from_scratch(chat, images=()):
    """What the model answers to the last prompt when it reads all of it anew."""
    batch = {"input_ids": paddle.to_tensor([chat.stats.last.prompt_ids])}
    if images:
        opened = [chat.processor.load_image(image) for image in images]
        pixel_values = [chat.processor.image_processor.preprocess(image) for image in opened]
        batch["pixel_values"] = paddle.to_tensor(np.concatenate(pixel_values))
        batch["image_sizes"] = paddle.to_tensor([list(image.size) for image in opened])
    ids, _ = chat.model.generate(**batch, max_new_tokens=chat.settings.max_new_tokens)
    return chat.processor.decode(ids[0]).strip()


# ---- what a turn costs ----


def test_a_new_chat_about_a_picture_seen_before_needs_no_tower(parts, watch):
    first = chat_of(parts)
    answer = say(first, "What?", CAT)
    second = LlavaChat(*parts, temperature=0, max_new_tokens=8)
    assert say(second, "What?", Image.open(CAT)) == answer  # told by its content
    assert watch.tower == 1 and second.stats.tower_calls == 0

    say(LlavaChat(*parts, temperature=0, max_new_tokens=1), "What?", Image.open(CAT).rotate(180))
    assert watch.tower == 2


def test_features_are_those_of_the_weights_and_of_the_preparation(parts, watch):
    model, processor = parts
    say(chat_of(parts), "What?", CAT)
    weight = dict(model.named_parameters())["llama.mm_projector.0.weight"]
    kept = weight.clone()
    weight.set_value(kept * 1.01)
    try:
        say(LlavaChat(model, processor, temperature=0, max_new_tokens=1), "What?", CAT)
        assert watch.tower == 2
    finally:
        weight.set_value(kept)
    other = copy.deepcopy(processor.image_processor)
    other.image_mean = [0.5, 0.5, 0.5]
    say(LlavaChat(model, processor, temperature=0, max_new_tokens=1), "What?", CAT)
    assert watch.tower == 3
    processor = copy.copy(processor)
    processor.image_processor = other
    say(LlavaChat(model, processor, temperature=0, max_new_tokens=1), "What?", CAT)
    assert watch.tower == 4


def test_ten_turns_read_only_what_is_new_and_answer_as_a_full_read_does(parts, watch, tmp_path):
    chat = chat_of(parts)
    held = 0  # tokens that the cache holds after a turn: all but the last one of the answer
    for number, question in enumerate(WORDS):
        watch.reads.clear()
        answer = say(chat, question, CAT if number == 0 else None)
        turn = chat.stats.last
        assert turn.new_tokens == 8 and answer
        assert watch.reads == [len(turn.prompt_ids) - held] + [1] * 7
        assert turn.prefilled_tokens == len(turn.prompt_ids) - held < (80 if number == 0 else 30)
        held = len(turn.prompt_ids) + 7
    assert watch.tower == chat.stats.tower_calls == 1
    assert chat.stats.prefilled_tokens == watch.tokens - 10 * 7 < 200 < len(chat.stats.last.prompt_ids)

    # the same conversation again, each turn from scratch
    file = tmp_path / "chat.json"
    for number, turn in enumerate(chat.rounds):
        fresh = chat_of(parts)
        if number:
            fresh.load(file)
        assert say(fresh, turn.question, CAT if number == 0 else None) == turn.answer
        assert fresh.stats.last.prefilled_tokens == len(fresh.stats.last.prompt_ids)
        assert from_scratch(fresh, [CAT]) == turn.answer
        fresh.save(file)


def test_the_prompt_is_the_templates_text(parts):
    chat = chat_of(parts)
    answers = [say(chat, "What is this?", CAT), say(chat, "Why?")]
    system = conv_templates["vicuna_v1"].system
    expected = f"{system} USER: <image>\nWhat is this? ASSISTANT: {answers[0]}</s>USER: Why? ASSISTANT:"
    assert chat.stats.last.prompt == expected
    assert chat.messages[1:4:2] == [{"role": "assistant", "content": answer} for answer in answers]
    text_only = [token for token in chat.stats.last.prompt_ids if token >= 0]
    decoded = chat.processor.decode(text_only, skip_special_tokens=False)
    # LLaMA's tokenizer writes a space of its own before every piece of text
    assert decoded.replace(" ", "") == "<s>" + expected.replace("<image>", "").replace(" ", "")
    assert chat.stats.last.prompt_ids.count(-200) == 4  # 28 pixels in patches of 14


def test_undo_retry_and_image_keep_what_is_valid_of_the_cache(parts, watch, tmp_path):
    chat = chat_of(parts)
    first = say(chat, "What is this?", CAT)
    second = say(chat, "And that?")
    asked = len(chat.stats.last.prompt_ids)

    again = "".join(chat.retry())
    assert again == second and chat.stats.last.prefilled_tokens == 1  # greedy; only the last token is read again
    assert [turn.answer for turn in chat.rounds] == [first, second]

    assert chat.undo() == "And that?"
    assert say(chat, "And that, what?") == from_scratch(chat, [CAT])
    assert chat.stats.last.prefilled_tokens < 12

    dog = Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50)
    chat.add_image(dog)
    assert say(chat, "Compare them.") == from_scratch(chat, [CAT, dog])
    assert len(chat.stats.last.prompt_ids) > asked and chat.stats.last.prefilled_tokens < 30
    assert chat.stats.last.prompt_ids.count(-200) == 8

    # the question with the new picture goes, the picture waits for the next question
    chat.undo()
    assert say(chat, "Compare them, please.") == from_scratch(chat, [CAT, dog])
    assert chat.rounds[-1].pictures[0].size == (60, 40)
    assert chat.stats.last.prefilled_tokens < 12
    assert watch.tower - 5 == chat.stats.tower_calls == 2  # five pictures went through from_scratch

    for _ in chat.rounds:
        chat.undo()
    assert not chat.rounds and chat.picture is not None
    with pytest.raises(UserError, match="nothing to undo"):
        chat.undo()
    with pytest.raises(UserError, match="ask something first"):
        chat.retry()


def test_equal_pictures_are_encoded_once_whatever_file_they_come_from(parts, tmp_path):
    chat = chat_of(parts)
    copy = tmp_path / "copy.bmp"
    Image.open(CAT).convert("RGB").save(copy)
    say(chat, "What is this?", CAT)
    say(chat, "And this?", copy)
    chat.clear()
    say(chat, "What is this?", Image.open(CAT))
    assert chat.stats.tower_calls == 1
    say(chat, "And this?", Image.open(CAT).rotate(180))
    assert chat.stats.tower_calls == 2


def test_clear_starts_over_with_the_newest_picture(parts):
    chat = chat_of(parts)
    other = Image.new("RGB", (30, 50), "teal")
    first = say(chat, "What is this?", CAT)
    chat.clear()
    assert chat.messages == [] and chat.last_answer is None
    assert say(chat, "What is this?") == first
    chat.clear()
    assert say(chat, "What is this?", other) == from_scratch(chat, [other])  # in place of the cat
    assert len(chat.rounds[0].pictures) == 1


@pytest.mark.parametrize("again", ["clear", "retry", "load"])
def test_what_was_read_with_other_weights_is_forgotten(parts, tmp_path, again):
    model, _ = parts
    chat = chat_of(parts)
    say(chat, "What is this?", CAT)
    saved = chat.save(tmp_path / "chat.json")
    changed = [model.llama.layers[0].self_attn.v_proj.weight, model.llama.mm_projector[0].weight]
    kept = [weight.clone() for weight in changed]
    for weight in changed:
        weight.set_value(weight.flip(0) * 3)
    try:
        if again == "retry":
            answer = "".join(chat.retry())
        elif again == "load":
            chat.load(saved)
            chat.undo()
            answer = say(chat, "What is this?")
        else:
            chat.clear()
            answer = say(chat, "What is this?")
        assert chat.stats.last.prefilled_tokens == len(chat.stats.last.prompt_ids) and chat.stats.tower_calls == 2
        assert answer == from_scratch(chat, [CAT])
    finally:
        for weight, values in zip(changed, kept):
            weight.set_value(values)


def test_anyres_pictures_of_different_shapes(tmp_path):
    grid = [[28, 56], [56, 28], [56, 56]]
    parts = chat_models.build(
        tmp_path, image_aspect_ratio="anyres", image_grid_pinpoints=grid, mm_patch_merge_type="spatial_unpad"
    )
    chat = chat_of(parts)
    wide, tall = Image.open(CAT), Image.open(CAT).rotate(90, expand=True).resize((40, 90))
    assert say(chat, "What is this?", wide) == from_scratch(chat, [wide])
    assert say(chat, "And this?", tall) == from_scratch(chat, [wide, tall])
    assert say(chat, "Which is larger?") == from_scratch(chat, [wide, tall])
    assert chat.stats.tower_calls == 2 and chat.stats.last.prefilled_tokens < 16


def test_text_only_model_and_chat(parts, tmp_path):
    assert say(chat := chat_of(parts), "Hello") == from_scratch(chat)
    blind = chat_of(chat_models.build(tmp_path, vision_config=None))
    assert say(blind, "Hello") == from_scratch(blind)
    with pytest.raises(UserError, match="text only"):
        blind.ask("What is this?", image=CAT)
    with pytest.raises(UserError, match="text only"):
        blind.add_image(CAT)


# ---- tokens ----


@pytest.mark.parametrize("name", sorted(conv_templates))
@pytest.mark.parametrize("kind", ["model", "legacy", "json"])
def test_kept_answers_lie_in_the_prompt_as_the_whole_text_is_tokenized(parts, tmp_path, name, kind):
    """Where an answer's tokens are the usual ones of its text, the prompt has the ids of the rendered text."""
    model, processor = parts
    folder = llama2_tokenizer_folder(
        tmp_path, model=kind != "json", json_file=kind == "json", legacy=kind in ("legacy", "json")
    )
    processor = LlavaProcessor(load_tokenizer(folder), processor.image_processor, processor.config)
    template = conv_templates[name]
    answers = ["A ginger cat", "It sleeps, 猫"]
    questions = ["What is this?", "What does it do?", "Why?"]
    messages, rounds = [], []
    for question, answer in zip(questions, answers):
        messages.append({"role": "user", "content": question})
        before = template.render(messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": answer})
        text = template.render(messages)
        end = text.index(answer, len(before)) + len(answer)
        prompt, both = processor.tokenize_prompt(before, []), processor.tokenize_prompt(text[:end], [])
        assert both[: len(prompt)] == prompt
        rounds.append({"question": question, "answer": answer, "answer_ids": both[len(prompt) :], "pictures": []})
    saved = {"format": "paddlemix-llava-chat", "version": 1, "rounds": rounds}
    saved.update(waiting=[], spare=[], pictures={})
    (tmp_path / "chat.json").write_text(json.dumps(saved))
    chat = LlavaChat(model, processor, template=name, temperature=0, max_new_tokens=1)
    chat.load(tmp_path / "chat.json")
    assert all(turn.answer_ids for turn in chat.rounds)
    list(chat.ask(questions[2]))
    messages.append({"role": "user", "content": questions[2]})
    whole = template.render(messages, add_generation_prompt=True)
    assert chat.stats.last.prompt == whole
    assert chat.stats.last.prompt_ids == processor.tokenize_prompt(whole, [])


def test_a_template_that_writes_the_last_round_in_another_way(parts):
    model, processor = parts
    source = ["{% if is_last %}Question {{length}}: {% else %}Q: {% endif %}{{user}}\n", "A: {{bot}}</s>\n"]
    template = ChatTemplate({"system": "S. ", "conversation": source})
    processor = LlavaProcessor(processor.tokenizer, processor.image_processor, processor.config)
    processor.chat_template = template
    chat = chat_of((model, processor))
    for question in ("one", "two", "three"):
        say(chat, question)
    turn, answers = chat.stats.last, [one.answer for one in chat.rounds]
    assert turn.prompt == f"S. Q: one\nA: {answers[0]}</s>\nQ: two\nA: {answers[1]}</s>\nQuestion 3: three\nA:"
    ids = list(turn.prompt_ids)
    for one in chat.rounds[:-1]:  # the answers lie there as they were made, with the text of the template around them
        start = next(i for i in range(len(ids)) if ids[i : i + len(one.answer_ids)] == list(one.answer_ids))
        ids[start : start + len(one.answer_ids)] = []
    assert processor.tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == (
        "<s>S.Q:one\nA:</s>\nQ:two\nA:</s>\nQuestion3:three\nA:"
    )


def test_an_end_token_ends_the_answer_and_comes_once(tmp_path):
    model, processor = chat_models.build(tmp_path, tie_word_embeddings=False)
    colon = processor.tokenize_prompt("ASSISTANT:", [])[-1]
    words = processor.tokenizer.encode("A cat", add_special_tokens=False)
    chat_models.recite(model, [colon, *words, 2])
    chat = LlavaChat(model, processor, temperature=0)
    assert say(chat, "What?") == "A cat" == chat.last_answer
    assert chat.stats.last.finish_reason == "stop" and chat.stats.last.new_tokens == 3
    assert chat.stats.last.mean_token_probability > 0.99
    assert say(chat, "What?") == "A cat"
    assert chat.stats.last.prompt.count("</s>") == 1
    assert chat.stats.last.prompt_ids.count(2) == 1


def test_characters_of_several_tokens_come_whole(tmp_path):
    model, processor = chat_models.build(tmp_path, tie_word_embeddings=False)
    colon = processor.tokenize_prompt("ASSISTANT:", [])[-1]
    cat = [3 + byte for byte in "🐱".encode()]  # LLaMA's byte tokens begin at 3
    face = processor.tokenizer.encode("猫是", add_special_tokens=False)[1:]
    chat_models.recite(model, [colon, *cat, *face, 2])
    pieces = list(LlavaChat(model, processor, temperature=0).ask("What?"))
    assert "".join(pieces) == "🐱猫是" and len(pieces) == 3
    # cut inside the character: nothing of it shows
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=3)
    assert list(chat.ask("What?")) == [] and chat.last_answer == ""
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=6)
    assert "".join(chat.ask("What?")) == "🐱猫是"[: len(chat.last_answer)] and "\ufffd" not in chat.last_answer


@pytest.mark.parametrize(
    "stop, said", [("three four", "one two"), ("ree", "one two th"), ("xyz", "one two three four five")]
)
def test_stop_strings_over_several_pieces_never_show(tmp_path, stop, said):
    model, processor = chat_models.build(tmp_path, tie_word_embeddings=False)
    colon = processor.tokenize_prompt("ASSISTANT:", [])[-1]
    words = processor.tokenizer.encode("one two three four five", add_special_tokens=False)
    chat_models.recite(model, [colon, *words, 2])
    chat = LlavaChat(model, processor, temperature=0, stop=[stop])
    pieces = list(chat.ask("Count"))
    assert "".join(pieces) == said == chat.last_answer
    assert len(pieces) > 1 and chat.stats.last.finish_reason == "stop"
    list(chat.ask("Count"))
    assert f"ASSISTANT: {said}</s>USER: Count" in chat.stats.last.prompt


def test_the_templates_stop_string_in_plain_tokens(tmp_path):
    """Vicuna v0 ends a turn with ###, which is text and no special token."""
    model, processor = chat_models.build(tmp_path, tie_word_embeddings=False)
    colon = processor.tokenize_prompt("Assistant:", [])[-1]
    words = processor.tokenizer.encode("A cat###Human", add_special_tokens=False)
    chat_models.recite(model, [colon, *words, 2])
    chat = LlavaChat(model, processor, temperature=0, template="llava_v0")
    assert say(chat, "What?") == "A cat"
    assert say(chat, "What?") == "A cat"
    assert "Assistant: A cat###Human: What?###Assistant:" in chat.stats.last.prompt


def test_an_answer_that_would_grow_together_with_the_next_mark_is_kept(tmp_path):
    """LLaMA's tokenizer has a token ".<", but what the model said ended in ".", and that is cached."""
    model, processor = chat_models.build(tmp_path, tie_word_embeddings=False)
    newline = processor.tokenize_prompt("assistant\n", [])[-1]
    words = processor.tokenizer.encode("A cat.", add_special_tokens=False)
    chat_models.recite(model, [newline, *words, 2])
    chat = LlavaChat(model, processor, temperature=0, template="chatml_direct")
    assert say(chat, "What?") == say(chat, "What?") == "A cat."
    asked, new = "<|im_end|><|im_start|>user\nWhat?<|im_end|><|im_start|>assistant\n", chat.stats.last.prefilled_tokens
    assert new == len(processor.tokenizer.encode("a" + asked, add_special_tokens=False)) - 1
    assert chat.processor.decode(chat.stats.last.prompt_ids[-new:], skip_special_tokens=False) == asked


# ---- sampling ----


def test_settings_of_sampling_have_their_effect(parts):
    def answers(**settings):
        chat = chat_of(parts, **settings)
        return [say(chat, question) for question in WORDS[:3]]

    greedy, hot = answers(), answers(temperature=2.0, seed=1)
    assert answers(temperature=2.0, seed=1) == hot != greedy
    assert answers(temperature=2.0, seed=2) != hot
    assert answers(temperature=2.0, seed=1, top_k=1) == greedy
    assert answers(temperature=2.0, seed=1, top_p=1e-6) == greedy
    assert answers(temperature=1e-6, seed=1) == greedy


def test_repetition_penalty_counts_prompt_and_answer(tmp_path):
    model, processor = chat_models.build(tmp_path, tie_word_embeddings=False)
    colon = processor.tokenize_prompt("ASSISTANT:", [])[-1]
    cat = processor.tokenizer.encode("cat", add_special_tokens=False)[0]
    chat_models.recite(model, [colon, cat])
    with paddle.no_grad():  # "cat" is followed by "cat" or, less likely, by the end
        model.llama.embed_tokens.weight[cat, 0] = 1.0
        model.lm_head.weight[0, 2] = 9.0
    assert say(chat_of((model, processor)), "What?") == " ".join(["cat"] * 8)
    assert say(chat_of((model, processor), repetition_penalty=1.5), "What?") == "cat"


def test_retry_draws_anew_and_clear_begins_the_seed_again(parts):
    chat = chat_of(parts, temperature=2.0, seed=5)
    first = say(chat, "What is this?", CAT)
    assert "".join(chat.retry()) != first
    chat.clear()
    assert say(chat, "What is this?") == first


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"template": "vicuna_v9"}, "vicuna_v1"),
        ({"stop": "###"}, "stop"),
    ],
)
def test_wrong_settings_are_named(parts, settings, word):
    with pytest.raises(UserError, match=word):
        chat_of(parts, **settings)


# ---- the context's limit ----


def test_the_oldest_rounds_go_and_the_picture_stays(tmp_path):
    told = []
    model, processor = chat_models.build(tmp_path, max_position_embeddings=160)
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=8, on_notice=told.append)
    say(chat, "What is this?", CAT)
    for number in range(12):
        answer = say(chat, f"Question {number}, please?")
        turn = chat.stats.last
        assert len(turn.prompt_ids) + 8 <= 160 and turn.new_tokens == 8
        assert turn.prompt.count("<image>") == 1 and turn.prompt_ids.count(-200) == 4
        assert answer == from_scratch(chat, [CAT])
    assert told and "oldest round was dropped" in told[0] and "picture stays" in told[0]
    assert 2 < len(chat.rounds) < 9
    # the picture is with the oldest round that stayed
    assert [len(turn.pictures) for turn in chat.rounds] == [1] + [0] * (len(chat.rounds) - 1)
    assert "What is this?" not in turn.prompt and "Question 11" in turn.prompt
    assert chat.stats.tower_calls == 1


def test_scaled_positions_have_room_for_more(tmp_path):
    model, processor = chat_models.build(
        tmp_path, max_position_embeddings=96, rope_scaling={"type": "linear", "factor": 4.0}
    )
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=8)
    assert chat.context_limit == 384
    for number in range(3):
        assert say(chat, f"Question {number}, please?", CAT if number == 0 else None) == from_scratch(chat, [CAT])
    assert len(chat.rounds) == 3 and len(chat.stats.last.prompt_ids) > 96


def test_a_message_that_cannot_fit_is_refused_and_nothing_changes(tmp_path):
    model, processor = chat_models.build(tmp_path, max_position_embeddings=160)
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=8, on_notice=lambda text: None)
    say(chat, "What is this?", CAT)
    before = chat.messages
    with pytest.raises(UserError, match="at most 152 fit.*shorter"):
        chat.ask("why " * 200)
    assert chat.messages == before
    assert say(chat, "Why?") == from_scratch(chat, [CAT])


@pytest.fixture
def crowded(tmp_path):
    """A chat with little room, what it tells, and more pictures than it can read."""
    told = []
    model, processor = chat_models.build(tmp_path, max_position_embeddings=160)
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=8, on_notice=told.append)
    return chat, told, [Image.new("RGB", (20, 20), (10 * number, 0, 0)) for number in range(25)]


def test_of_too_many_pictures_the_newest_stays(crowded):
    chat, told, pictures = crowded
    for picture in pictures:
        say(chat, "And this one?", picture)
    assert "picture" in told[-1]
    assert chat.answered_picture.image.getpixel((0, 0)) == (240, 0, 0)
    kept = [picture.image for turn in chat.rounds for picture in turn.pictures]
    assert "".join(chat.retry()) == from_scratch(chat, kept)


def test_of_too_many_pictures_before_the_first_question_the_newest_stay(crowded):
    chat, told, pictures = crowded
    for picture in pictures:
        chat.add_image(picture)
    with pytest.raises(UserError, match="of them are of pictures.*or bring fewer pictures"):
        say(chat, "<image> and " * 25)  # each has its place there
    answer = say(chat, "What are these?")
    (first,) = chat.rounds
    kept = [picture.image for picture in first.pictures]
    assert 2 < len(kept) < 25 and kept[-1].getpixel((0, 0)) == (240, 0, 0)
    assert told == [
        f"The pictures are more than the model can read at once: the oldest {25 - len(kept)} were left out."
    ]
    assert answer == from_scratch(chat, kept)


def test_an_answer_ends_where_the_context_is_full(tmp_path):
    model, processor = chat_models.build(tmp_path, max_position_embeddings=96)
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=500)
    assert say(chat, "Tell me more.")
    turn = chat.stats.last
    assert len(turn.prompt_ids) + turn.new_tokens == 96 and turn.finish_reason == "length"


# ---- interruptions ----


def test_an_answer_that_is_left_early_stays_as_far_as_it_was_said(parts):
    chat = chat_of(parts, max_new_tokens=30)
    pieces = []
    for piece in chat.ask("What is this?", image=CAT):
        pieces.append(piece)
        if len(pieces) == 3:
            break
    answer = say(chat, "Go on.")  # any further use ends it, whether its iterator was closed or not
    assert chat.rounds[0].answer == "".join(pieces)
    assert answer == from_scratch(chat, [CAT])
    assert f"ASSISTANT: {''.join(pieces)}</s>USER: Go on." in chat.stats.last.prompt


@pytest.mark.parametrize("where", ["prefill", "step", "tower"])
def test_ctrl_c_inside_the_model_leaves_a_chat_that_answers_right(parts, where):
    model, _ = parts
    chat = chat_of(parts, max_new_tokens=20)
    if where != "tower":
        say(chat, "What is this?", CAT)
    before = chat.messages
    calls = []

    def interrupt(layer, inputs, outputs=None):
        calls.append(inputs[0].shape[1])
        if where != "step" or len(calls) == 5:
            raise KeyboardInterrupt

    layer = model.llama.vision_tower if where == "tower" else model.llama.layers[1]
    hook = layer.register_forward_pre_hook(interrupt)
    pieces = []
    try:
        with pytest.raises(KeyboardInterrupt):
            for piece in chat.ask(
                "Tell me a long story about it, with a very long beginning.", CAT if where == "tower" else None
            ):
                pieces.append(piece)
    finally:
        hook.remove()
    if where == "step":
        assert chat.last_answer == "".join(pieces) and chat.stats.last.finish_reason == "interrupted"
        assert chat.stats.last.new_tokens == 5 - 1
    else:
        assert chat.messages == before and not pieces
    # a shorter question than the interrupted one: nothing of that may be left in the cache
    images = [CAT]
    answer = say(chat, "Why?", CAT if where == "tower" else None)
    assert answer == from_scratch(chat, images)
    assert say(chat, "Why not?") == from_scratch(chat, images)


def test_a_retry_that_is_stopped_at_once_keeps_the_old_answer(parts):
    chat = chat_of(parts)
    answer = say(chat, "What is this?", CAT)
    chat.retry().close()
    assert chat.last_answer == answer
    attempt = chat.retry()
    next(attempt)
    attempt.close()
    assert answer.startswith(chat.last_answer) and chat.last_answer != answer


def test_a_question_that_is_never_read_was_never_asked(parts):
    chat = chat_of(parts)
    chat.ask("What is this?", image=CAT)
    assert chat.messages == []
    assert say(chat, "Hello") == from_scratch(chat)


# ---- what is refused ----


def test_bad_questions_and_pictures(parts, tmp_path):
    chat = chat_of(parts)
    for question in ("", " \n", None):
        with pytest.raises(UserError, match="expected some text"):
            chat.ask(question)
    with pytest.raises(UserError, match="leave <image> out"):
        chat.ask("What is <image>?")
    with pytest.raises(UserError, match="nowhere.png"):
        chat.ask("What is this?", image=tmp_path / "nowhere.png")
    assert chat.messages == []
    say(chat, "Between <image> and this", CAT)
    assert "USER: Between <image> and this" in chat.stats.last.prompt


def test_a_picture_that_the_model_cannot_take_is_refused_at_once(parts, tmp_path):
    chat = chat_of(parts)
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 40000)).save(thin)
    for bring in (chat.add_image, lambda image: chat.ask("What is this?", image=image)):
        with pytest.raises(UserError, match=rf"^{thin} \(1 x 40000 pixels\) is too thin"):
            bring(thin)
        with pytest.raises(UserError, match="^The picture .* is too thin"):
            bring(Image.open(thin))
    assert chat.picture is None
    assert say(chat, "Why?") == from_scratch(chat)


# ---- files ----


def test_a_saved_chat_goes_on_as_if_it_had_not_ended(parts, tmp_path):
    chat = chat_of(parts)
    say(chat, "What is this?", CAT)
    say(chat, "你好吗? 🐱")
    chat.add_image(Image.new("RGB", (20, 30), "navy"))
    file = chat.save(tmp_path / "chat.json")
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["rounds"][1]["question"] == "你好吗? 🐱" and "你好吗" in file.read_text(encoding="utf-8")

    other = chat_of(parts)
    assert other.load(file) == 2
    assert other.rounds[0].pictures[0].source == str(CAT)
    expected = say(chat, "And this?")
    assert say(other, "And this?") == expected
    assert other.stats.last.prompt_ids == chat.stats.last.prompt_ids
    other.save(file)  # a saved chat may be replaced


def test_answers_of_another_tokenizer_are_tokenized_from_their_text(parts, tmp_path):
    chat = chat_of(parts)
    say(chat, "What?")
    file = chat.save(tmp_path / "chat.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    saved["rounds"][0].update(answer="A cat. <image>", answer_ids=[99999, 5])
    file.write_text(json.dumps(saved))
    chat.load(file)
    assert chat.rounds[0].answer_ids is None
    assert say(chat, "Why?") == from_scratch(chat)
    assert "ASSISTANT: A cat." in chat.stats.last.prompt


def test_files_that_cannot_be_saved_or_loaded(parts, tmp_path):
    chat = chat_of(parts)
    say(chat, "What is this?", CAT)
    before = chat.messages
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match="isn't a saved chat; give another name"):
        chat.save(notes)
    with pytest.raises(UserError, match="can't be written"):
        chat.save(tmp_path / "no" / "such" / "folder.json")
    with pytest.raises(UserError, match="can't be written: embedded null"):
        chat.save(tmp_path / "a\0b.json")
    assert notes.read_text() == "mine"
    good = json.loads(chat.save(tmp_path / "chat.json").read_text(encoding="utf-8"))

    def damaged(**changes):
        (tmp_path / "bad.json").write_text(json.dumps({**good, **changes}))
        return tmp_path / "bad.json"

    lacking = {"question": "<image>", "answer": "", "answer_ids": None, "pictures": []}
    cases = [
        (lambda: tmp_path / "nowhere.json", "No such file"),
        (lambda: notes, "can't be read as a saved chat"),
        (lambda: damaged(format="other"), "isn't a saved chat"),
        (lambda: damaged(version=2), "version 2"),
        (lambda: damaged(rounds=[{"question": "Q"}]), "damaged"),
        (lambda: damaged(rounds=None), "damaged"),
        (lambda: damaged(pictures={}), "damaged"),
        (lambda: damaged(rounds=[lacking]), "lacks its picture"),
    ]
    for make, reason in cases:
        with pytest.raises(UserError, match=reason):
            chat.load(make())
    assert chat.messages == before


@pytest.mark.skipif(os.name != "posix", reason="no named pipes")
def test_pipes_and_devices_are_no_chats(parts, tmp_path):
    chat = chat_of(parts)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match="isn't a regular file"):
            chat.load(path)
        with pytest.raises(UserError, match="isn't a saved chat; give another name"):
            chat.save(path)
    for nothing in (None, 3):
        for use in (chat.save, chat.load):
            with pytest.raises(UserError, match=f"The file is {nothing}; expected its name"):
                use(nothing)


def test_a_chat_is_saved_behind_a_link(parts, tmp_path):
    chat = chat_of(parts)
    (tmp_path / "there").mkdir()
    link, target = tmp_path / "link.json", tmp_path / "there" / "chat.json"
    try:
        link.symlink_to(target)
    except OSError:
        pytest.skip("no symbolic links here")
    for rounds in (0, 1):  # also where nothing is behind it yet
        assert chat.save(link) == link and link.is_symlink()
        assert len(json.loads(target.read_text(encoding="utf-8"))["rounds"]) == rounds
        say(chat, "Why?")
    assert [path.name for path in target.parent.iterdir()] == ["chat.json"]


@pytest.mark.parametrize("broken", [b"no picture", b""])
def test_a_broken_picture_in_a_saved_chat_is_told_with_the_file(parts, tmp_path, broken):
    chat = chat_of(parts)
    chat.add_image(CAT)
    file = chat.save(tmp_path / "chat.json")
    saved = json.loads(file.read_text(encoding="utf-8"))
    for held in saved["pictures"].values():
        held["png"] = base64.b64encode(broken).decode()
    file.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{file} holds a picture that can't be used: the given bytes"):
        chat.load(file)
