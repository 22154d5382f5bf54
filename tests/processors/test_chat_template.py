"""chat_template.json of the toolkit's form: the text equals PaddleNLP's, and the spans are what the model writes."""

import json

import pytest
from paddlenlp.transformers.tokenizer_utils import ChatTemplate as PaddleNLPTemplate

from paddlemix.errors import UserError
from paddlemix.models.llava.conversation import conv_templates
from paddlemix.processors.chat_template import ChatTemplate, hugging_face_jinja, load_chat_template

CHATML = {
    "system": "You are a helpful assistant.",
    "conversation": ["\n<|im_start|>user\n{{user}}<|im_end|>\n<|im_start|>assistant\n", "{{bot}}<|im_end|>"],
    "query": "\n<|im_start|>user\n{{query}}<|im_end|>\n<|im_start|>assistant\n",
}
VICUNA = {
    "system": "A chat between a user and an assistant. ",
    "conversation": ["USER: {{user}} ", "ASSISTANT: {{bot}}</s>"],
    "query": "USER: {{query}} ASSISTANT:",
}
LLAMA = {
    "system": "<s>[INST] <<SYS>>\n{{system | default('Be brief.')}}\n<</SYS>>\n\n",
    "conversation": ["{% if index > 0 %}<s>[INST]{% endif %} {{user}} [/INST]", "{{bot}} </s>"],
    "query": "{% if index > 0 %}<s>[INST]{% endif %} {{query}} [/INST]",
}
LINES = {"conversation": ["Q: {{user}}\nA:", " {{bot}}\n"], "query": "Q: {{query}}\nA:"}
TEMPLATES = {"chatml": CHATML, "vicuna": VICUNA, "llama": LLAMA, "lines": LINES}


def talk(*turns):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


TALKS = [
    ["What is this?"],
    ["<image>\nWhat is this?", "A cat.", "Sure?", "Yes {{bot}} </s>", "Why ASSISTANT: so?"],
    ["你好 😀", "  two  spaces\n\ncode {% x %}", "{{user}}"],
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", TALKS)
def test_prompts_equal_paddlenlps(name, turns):
    pairs = [list(turns[start : start + 2]) for start in range(0, len(turns), 2)]
    expected = PaddleNLPTemplate.from_dict(TEMPLATES[name])(pairs, context_data={"is_training": False})
    assert ChatTemplate(TEMPLATES[name]).render(talk(*turns), add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", TALKS[1:])
def test_training_text_is_the_rounds_one_after_the_other(name, turns):
    turns = turns[:-1]
    theirs = PaddleNLPTemplate.from_dict(TEMPLATES[name])
    rounds = [
        "".join(theirs.render_conversation(list(turns[start : start + 2]), index=start // 2))
        for start in range(0, len(turns), 2)
    ]
    assert ChatTemplate(TEMPLATES[name]).render(talk(*turns)) == theirs.render_system() + "".join(rounds)


@pytest.mark.parametrize(
    "name, ends", [("chatml", "{}<|im_end|>"), ("vicuna", " {}</s>"), ("llama", "{} </s>"), ("lines", " {}\n")]
)
def test_spans_hold_the_answer_and_what_ends_it(name, ends):
    template = ChatTemplate(TEMPLATES[name])
    turns = TALKS[1][:-1]
    text, spans = template.render_spans(talk(*turns))
    assert [text[start:end] for start, end in spans] == [ends.format("A cat."), ends.format(turns[3])]
    # what stands before a span is the prompt that asks for it
    for number, (start, _) in enumerate(spans):
        asked = template.render(talk(*turns[: 2 * number + 1]), add_generation_prompt=True)
        assert text[:start] == asked
    assert ends.format("").strip(" ") in template.stop_strings or template.stop_strings == (ends.format("").strip(),)


def test_without_query_the_fixed_words_before_the_answer_are_the_prompt():
    template = ChatTemplate({"conversation": ["USER: {{user}} ", "ASSISTANT: {{bot}}</s>\n"]})
    text, spans = template.render_spans(talk("q", "a", "q2", "a2"))
    assert [text[start:end] for start, end in spans] == [" a</s>", " a2</s>"]
    assert template.render(talk("q"), add_generation_prompt=True) == "USER: q ASSISTANT:"


def test_a_system_message_fills_the_variable_or_is_refused():
    messages = [{"role": "system", "content": "Speak French."}, *talk("q", "a")]
    assert "<<SYS>>\nSpeak French.\n<</SYS>>" in ChatTemplate(LLAMA).render(messages)
    assert "<<SYS>>\nBe brief.\n<</SYS>>" in ChatTemplate(LLAMA).render(messages[1:])
    with pytest.raises(UserError, match="has a fixed system text"):
        ChatTemplate(CHATML).render(messages)


def test_the_toolkits_variables_are_known():
    source = "{{index}}/{{length}}{% if is_first %} first{% endif %}{% if is_last %} last{% endif %}: {{user}} "
    template = ChatTemplate({"conversation": [source, "{% if is_training %}{{bot}}{% else %}{{bot}}{% endif %};"]})
    assert template.render(talk("a", "b", "c", "d")) == "0/2 first: a b;1/2 last: c d;"


def test_a_template_that_never_ends_an_answer_is_warned_about(caplog):
    template = ChatTemplate({"conversation": ["{{user}} ", "{{bot}}"]}, "endless.json")
    assert template.stop_strings == ()
    assert "endless.json writes nothing after {{bot}}" in caplog.text


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"conversation": ["{{user}}", "{{bot}}",]}', r":1: not valid JSON"),
        ('{"chat_template": "{% for m in messages %}…"}', "this is Hugging Face's form"),
        ("[]", "is no chat template of the toolkit"),
        ('{"conversation": ["{{user}}", "{{bot}}"], "sytem": ""}', "has the key 'sytem'"),
        ('{"conversation": ["{{user}}{{bot}}"]}', "expected two texts"),
        ('{"conversation": ["{{usr}}", "{{bot}}"]}', "doesn't show {{user}}"),
        ('{"conversation": ["{{user}}", "ok"]}', "doesn't show {{bot}}"),
        ('{"conversation": ["{{user}}", "{{bot}}"], "query": "{{user}}"}', "doesn't show {{query}}"),
        ('{"conversation": ["{{user}", "{{bot}}"]}', "Jinja refuses"),
        ('{"conversation": ["{{user.__class__.__mro__}}{{user}}", "{{bot}}"]}', "Jinja refuses"),
        ('{"conversation": ["{{user}}", "{{bot}}"], "system": 3}', "system is 3; expected a text"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "chat_template.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as raised:
        load_chat_template(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_file_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "chat_template.json"
    path.write_text("\ufeff" + json.dumps(CHATML), encoding="utf-8")
    assert load_chat_template(path) == ChatTemplate(CHATML)
    with pytest.raises(UserError, match="can't be read"):
        load_chat_template(tmp_path / "none.json")


@pytest.mark.parametrize("system", [None, 'Be "brief".\n', ""])
@pytest.mark.parametrize("name", [name for name, template in conv_templates.items() if hugging_face_jinja(template)])
def test_hugging_faces_form_renders_as_the_named_template(name, system):
    """In the environment of transformers' render_jinja_template; messages as texts, and as parts with a picture."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    written = hugging_face_jinja(conv_templates[name])
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(written)
    said = [("user", "<image>\nWhat 'is' it? "), ("assistant", "A {{ cat }}.\n"), ("user", "Why?"), ("assistant", "")]
    for count in range(1, 5):
        texts = [] if system is None else [{"role": "system", "content": system}]
        texts += [{"role": role, "content": content} for role, content in said[:count]]
        parts = [{**message, "content": parts_of(message["content"])} for message in texts]
        for asks in (False, True):
            expected = conv_templates[name].render(texts, asks)
            assert jinja.render(messages=texts, add_generation_prompt=asks) == expected
            assert jinja.render(messages=parts, add_generation_prompt=asks) == expected


def parts_of(content):
    words = content.removeprefix("<image>\n")
    return [{"type": "text", "text": words}, *([{"type": "image"}] if words != content else [])]
