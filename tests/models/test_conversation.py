"""Templates against the text that the original release renders."""

import json
import subprocess
import sys

import pytest

from paddlemix.errors import UserError
from paddlemix.models.llava.conversation import conv_templates, get_template
from tests.support import FIXTURES

GOLDEN = json.loads((FIXTURES / "conversation_golden.json").read_text(encoding="utf-8"))
ORIGINAL_NAMES = (
    "default v0 v1 vicuna_v1 llama_2 mistral_instruct chatml_direct mistral_direct plain v0_plain llava_v0 v0_mmtag "
    "llava_v1 v1_mmtag llava_llama_2 mpt"
).split()


def turns(*contents):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def test_all_names_of_the_original_release_and_smollm2():
    assert list(conv_templates) == ORIGINAL_NAMES + ["smollm2"]
    assert all(template.name == name for name, template in conv_templates.items())


@pytest.mark.parametrize("name", ORIGINAL_NAMES)
def test_text_equals_the_originals(name):
    cases = [case for case in GOLDEN if case["template"] == name]
    assert len(cases) == 19
    compared = 0
    for case in cases:
        messages = turns(*case["contents"])
        if case["text"] is not None:
            assert conv_templates[name].render(messages, case["ask"]) == case["text"]
            compared += 1
    assert compared >= 5


def test_llama_2_needs_a_question_as_the_original_does():
    refused = [case for case in GOLDEN if case["text"] is None and "plain" not in case["template"]]
    assert {case["template"] for case in refused} == {"llama_2", "llava_llama_2", "mistral_instruct"}
    for case in refused:
        with pytest.raises(UserError, match="before the user has said anything"):
            conv_templates[case["template"]].render(turns(*case["contents"]), case["ask"])
    with pytest.raises(UserError, match="first message is empty"):
        conv_templates["llama_2"].render(turns("", "A"))


def test_plain_ends_an_answer_with_a_new_line():
    assert conv_templates["plain"].render(turns("<image>", "A cat.")) == "<image>\nA cat.\n"


def test_smollm2_is_the_chatml_of_its_own_model_file():
    head = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
    )
    template = conv_templates["smollm2"]
    assert template.render(turns("Hi"), add_generation_prompt=True) == head + "<|im_start|>assistant\n"
    text, spans = template.render_spans(turns("Hi", "Hello!", "Bye", ""))
    assert text.startswith(head + "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n")
    assert [text[start:end] for start, end in spans] == ["Hello!<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize("name", list(conv_templates))
def test_a_span_is_what_follows_the_generation_prompt(name):
    template = conv_templates[name]
    messages = turns("Q one", "Answer one", "Q two ASSISTANT: ### </s>", "  第二。\n")
    text, spans = template.render_spans(messages)
    assert text == template.render(messages)
    for number, (start, end) in enumerate(spans):
        asked = template.render(messages[: 2 * number + 1], add_generation_prompt=True)
        assert text[:start] == asked
        content = messages[2 * number + 1]["content"]
        said = text[start:end]
        assert said.strip(" ").startswith(content.strip(" ")) and said.endswith(template.stop_strings[0])
        assert len(said) - len(content) - len(template.stop_strings[0]) in (0, 1, 2)
    assert len(spans) == 2


def test_vicunas_span_starts_at_the_space():
    text, spans = conv_templates["vicuna_v1"].render_spans(turns("Q", "A"))
    assert [text[start:end] for start, end in spans] == [" A</s>"]
    text, spans = conv_templates["llama_2"].render_spans(turns("Q", "A"))
    assert [text[start:end] for start, end in spans] == [" A </s>"]


@pytest.mark.parametrize("name", ORIGINAL_NAMES)
def test_nothing_is_learned_from_an_answer_without_text(name):
    text, spans = conv_templates[name].render_spans(turns("Q", "", "R", "A"))
    assert [end - start for start, end in spans][0] == 0
    assert text[slice(*spans[1])].strip().startswith("A")


def test_a_system_message_replaces_the_templates_own():
    messages = [{"role": "system", "content": "Be brief."}, *turns("Q", "A")]
    assert conv_templates["vicuna_v1"].render(messages) == "Be brief. USER: Q ASSISTANT: A</s>"
    assert conv_templates["llava_llama_2"].render(messages) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST] A </s>"
    assert (
        conv_templates["mpt"].render(messages).startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\n")
    )
    assert "Be brief." not in conv_templates["vicuna_v1"].render(turns("Q"))  # and only for that conversation


def test_rendering_changes_nothing():
    messages = turns("Q", "A")
    before = json.dumps(messages)
    template = conv_templates["v0"]
    assert template.render(messages) == template.render(messages)
    assert json.dumps(messages) == before
    with pytest.raises(AttributeError):
        template.system = "other"


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ("hi", "messages is a str"),
        ([{"role": "user"}], "Message 1 is"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        ([{"role": "human", "content": "Q"}], "role 'human'"),
        ([{"role": "assistant", "content": "A"}], "Message 1 is from 'assistant'; expected 'user'"),
        (turns("Q") + turns("Q"), "Message 2 is from 'user'; expected 'assistant'"),
        (turns("Q", "A") + [{"role": "system", "content": "S"}], "role 'system'"),
    ],
)
def test_wrong_messages_are_named(messages, complaint):
    for template in conv_templates.values():
        with pytest.raises(UserError, match=complaint):
            template.render(messages)


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(UserError, match="No conversation template 'vicuna'.*vicuna_v1.*smollm2"):
        get_template("vicuna")
    assert get_template("v1") is get_template(get_template("v1"))


def test_templates_load_neither_paddle_nor_paddlenlp():
    code = (
        "import sys, paddlemix.models.llava.conversation, paddlemix.processors.rows, paddlemix.processors.tokenizer\n"
        "sys.exit(any(name in sys.modules for name in ('paddle', 'paddlenlp', 'torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
