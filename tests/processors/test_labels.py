"""Ids and labels of training samples: against the original training code, and against the rendered text."""

import json

import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.models.llava.anyres import num_image_features
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.conversation import Template, Turn, conv_templates
from paddlemix.processors.image_processing import LlavaImageProcessor
from paddlemix.processors.labels import TokenLabels, cut_at, label, truncate_rounds
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.rows import ImageCountError, parse_row, row_format
from paddlemix.processors.tokenizer import load_tokenizer
from tests.support import FIXTURES, byte_level_tokenizer_folder, llama2_tokenizer_folder

GOLDEN = json.loads((FIXTURES / "labels_golden.json").read_text(encoding="utf-8"))
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ONE_PATCH = {**TOWER, "image_size": 14}  # one feature for each picture, as the original's placeholder
SIZE = (40, 30)
DIALOGUES = [
    ["<image>\nWhat is this?", "A cat."],
    ["What?\n<image>", "A cat.", "And now?", "  Two  spaces\n\n", "Ok", "第三。😀"],
    ["Hi", "\n\nLines first", "USER: ASSISTANT: ### </s> [/INST] <|im_end|>\n<|im_start|>assistant\n", "Fine: 3.14"],
    ["Code?", "def f(x):\n    return x**2\n", "Q", "###", "R", "<|im_end|", "S", "</s"],
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "model": load_tokenizer(llama2_tokenizer_folder(root / "model")),
        "json": load_tokenizer(llama2_tokenizer_folder(root / "json", model=False, json_file=True)),
        "byte_level": load_tokenizer(byte_level_tokenizer_folder(root / "byte_level")),
    }


def make(tokenizer, tower=TOWER, **settings):
    config = LlavaConfig(vision_config=tower, **settings)
    return LlavaProcessor(tokenizer, LlavaImageProcessor.from_config(config), config)


def turns(*contents):
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def learned(sample):
    return [target for target in sample.labels if target != IGNORE_INDEX]


# ---- against the original training code ----


@pytest.mark.parametrize("kind", ["model", "json"])
@pytest.mark.parametrize("name", ["v1", "llava_v1", "v1_mmtag", "llama_2", "llava_llama_2", "plain"])
def test_ids_and_labels_equal_the_originals(tokenizers, kind, name):
    cases = [case for case in GOLDEN if case["template"] == name]
    processors = {wrap: make(tokenizers[kind], ONE_PATCH, mm_use_im_start_end=wrap) for wrap in (False, True)}
    masked = 0
    for case in cases:
        row = {"conversations": case["conversations"], "image": "a.jpg" if case["has_image"] else None}
        messages, images = parse_row(row)
        sample = processors[case["mm_use_im_start_end"]].encode_messages(messages, [SIZE] * len(images), name)
        assert sample.input_ids == case["input_ids"], case["conversations"]
        if all(target == IGNORE_INDEX for target in case["labels"]):
            masked += 1  # the original gave up on these; ours learns the answers
            decoded = tokenizers[kind].decode(learned(sample))
            answers = [turn["value"] for turn in case["conversations"] if turn["from"] == "gpt"]
            gap = " " if "llama" in name else ""
            assert decoded == "".join(answer + gap + "</s>" for answer in answers)
        else:
            assert sample.labels == case["labels"], case["conversations"]
    assert masked == (0 if name == "plain" else 2) and len(cases) > 8


def test_v1_and_vicuna_v1_are_one_template(tokenizers):
    processor = make(tokenizers["model"])
    messages = turns(*DIALOGUES[2])
    assert processor.encode_messages(messages, [], "v1") == processor.encode_messages(messages, [], "vicuna_v1")
    assert processor.encode_messages(messages) == processor.encode_messages(messages, [], "vicuna_v1")


# ---- against the rendered text ----


@pytest.mark.parametrize("kind", ["model", "json", "byte_level"])
@pytest.mark.parametrize("name", [name for name in conv_templates if "plain" not in name])
def test_labelled_tokens_are_the_answers_and_their_ends(tokenizers, kind, name):
    processor, template, tokenizer = make(tokenizers[kind]), conv_templates[name], tokenizers[kind]
    for contents in DIALOGUES:
        messages = turns(*contents)
        sizes = [SIZE] * sum(content.count("<image>") for content in contents)
        sample = processor.encode_messages(messages, sizes, template)
        text, spans = template.render_spans(messages)
        assert len(spans) == len(sample.round_ends) == len(contents) // 2
        start = 0
        for (first, last), end in zip(spans, sample.round_ends):
            told = [target for target in sample.labels[start:end] if target != IGNORE_INDEX]
            said = b"".join(map(tokenizer.token_bytes, told)).decode()
            if kind != "byte_level" and "</s>" in text:  # LLaMA's tokenizer writes a space after its special tokens
                said, expected = said.replace(" ", ""), text[first:last].replace(" ", "")
            else:
                expected = text[first:last]
            assert said == expected
            assert sample.labels[end - 1] == sample.input_ids[end - 1]  # the sample may be cut here
            start = end
        for index, target in zip(sample.input_ids, sample.labels):
            assert target in (IGNORE_INDEX, index) and target != IMAGE_TOKEN_INDEX


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_token_across_the_end_of_an_answer_is_cut(tokenizers, kind):
    tokenizer = tokenizers[kind]
    assert "><" in tokenizer.tokenize("<|im_end|><|im_start|>")
    sample = make(tokenizer).encode_messages(turns("Q", "A", "R", "B"), [], "mpt")
    ends = [sample.input_ids[end - 1] for end in sample.round_ends]
    assert tokenizer.convert_ids_to_tokens(ends) == [">", ">"]
    assert tokenizer.decode(learned(sample)) == "A<|im_end|>B<|im_end|>"


def test_a_token_across_the_start_of_an_answer_is_cut(tokenizers):
    tokenizer = tokenizers["byte_level"]
    assert "ĊĊ" in tokenizer.tokenize("assistant\n\n\nLines")
    sample = make(tokenizer).encode_messages(turns("Q", "\n\nLines"), [], "smollm2")
    assert tokenizer.decode(learned(sample)) == "\n\nLines<|im_end|>"
    prompt = conv_templates["smollm2"].render(turns("Q"), add_generation_prompt=True)
    before = sample.labels.index(learned(sample)[0])
    assert sample.input_ids[:before] == tokenizer(prompt).input_ids  # what the model sees when it is asked


def test_cut_at_several_places_of_one_token(tokenizers):
    tokenizer = tokenizers["model"]
    ids, offsets = tokenizer.encode_with_offsets("Hello")
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁Hello"]
    parts, spans = cut_at(tokenizer, "Hello", ids, offsets, [1, 3])
    assert tokenizer.convert_ids_to_tokens(parts) == ["▁H", "el", "lo"] and spans == [(0, 1), (1, 3), (3, 5)]
    assert cut_at(tokenizer, "Hello", ids, offsets, [0, 5]) == (ids, offsets)


def test_label_by_characters():
    ids, offsets = [1, 5, -200, 6, 7, 8], [(-1, -1), (0, 2), (2, 9), (9, 10), (10, 12), (12, 13)]
    assert label(ids, offsets, [(2, 10), (10, 12)]) == ([-100, -100, -100, 6, 7, -100], [4, 5])
    assert label(ids, offsets, [(2, 2), (12, 13)]) == ([-100] * 5 + [8], [2, 6])
    assert label([], [], [(0, 3)]) == ([], [0])


def test_plain_is_pictures_and_caption(tokenizers):
    processor = make(tokenizers["model"])
    sample = processor.encode_messages(turns("Describe: <image>", "A cat."), [SIZE], "plain")
    assert sample.input_ids[:5] == [1, *[IMAGE_TOKEN_INDEX] * 4]
    assert tokenizers["model"].decode(learned(sample)) == "A cat.\n" and sample.labels[5] != IGNORE_INDEX
    two = processor.encode_messages(turns("<image> and <image>", "Cats."), [SIZE, SIZE], "plain")
    assert two.input_ids[:9] == [1, *[IMAGE_TOKEN_INDEX] * 8]
    for contents, sizes in ((["Q", "A"], []), (["<image>", "A", "Q", "B"], [SIZE])):
        with pytest.raises(UserError, match="Template 'plain' trains on a picture and its caption"):
            processor.encode_messages(turns(*contents), sizes, "plain")


def test_several_pictures_stay_where_they_are(tokenizers):
    processor = make(tokenizers["model"])
    messages = turns("First <image> then <image>.", "A")
    sample = processor.encode_messages(messages, [SIZE, SIZE], "v1")
    text = conv_templates["v1"].render(messages)
    assert [index for index in sample.input_ids if index >= 0] == [
        1,
        *[index for part in text.split("<image>") for index in tokenizers["model"].encode(part, False)],
    ]


def test_a_template_of_ones_own(tokenizers):
    template = Template("mine", "", Turn("Q: ", "\n", "Q:"), Turn("A: ", "</s>\n", "A:"), ("</s>",))
    sample = make(tokenizers["model"]).encode_messages(turns("x", "y", "z", "w"), [], template)
    assert tokenizers["model"].convert_ids_to_tokens(learned(sample)) == ["▁y", "</s>", "▁w", "</s>"]


# ---- length ----


def test_truncation_at_whole_rounds(tokenizers):
    processor = make(tokenizers["model"])
    image = Image.new("RGB", SIZE)
    row = {"image": [image, image], "conversations": [["<image>\nQ1", "A1"], ["Q2 <image>", "A2"], ["Q3", "A3"]]}
    whole = processor.encode_conversation(row)
    messages, _ = parse_row(row)
    ends = processor.encode_messages(messages, [SIZE, SIZE]).round_ends
    assert ends[-1] == len(whole["input_ids"])
    for limit in range(1, ends[-1] + 3):
        sample = processor.encode_conversation(row, max_length=limit)
        kept = max([end for end in ends if end <= limit], default=0)
        assert sample["input_ids"] == whole["input_ids"][:kept] and sample["labels"] == whole["labels"][:kept]
        pictures = sample["input_ids"].count(IMAGE_TOKEN_INDEX) // 4
        assert len(sample["image_sizes"]) == pictures
        assert (sample["pixel_values"] is None) == (pictures == 0)
        if pictures:
            assert sample["pixel_values"].shape == (pictures, 3, 28, 28)


def test_truncation_keeps_a_sample_that_fits():
    sample = TokenLabels([1, 2, 3], [-100, 2, -100], [2])
    assert truncate_rounds(sample, None) is sample and truncate_rounds(sample, 3) is sample
    assert truncate_rounds(sample, 2) == TokenLabels([1, 2], [-100, 2], [2])
    assert truncate_rounds(sample, 1) == TokenLabels([], [], [])


def test_no_label_is_left_where_there_is_no_answer(tokenizers):
    processor = make(tokenizers["model"])
    for conversation in ([["Q", ""]], [{"from": "human", "value": "Q"}]):
        sample = processor.encode_conversation({"conversations": conversation})
        assert sample["input_ids"] and set(sample["labels"]) == {IGNORE_INDEX}


# ---- samples with pictures ----


def test_sample_with_anyres_pictures(tokenizers):
    processor = make(
        tokenizers["model"],
        image_aspect_ratio="anyres",
        mm_patch_merge_type="spatial_unpad",
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    wide, tall = Image.new("RGB", (90, 40)), Image.new("RGB", (30, 100), "red")
    row = {"image": [wide, tall], "conversations": [["<image>\n<image>\nCompare.", "One is wide."]]}
    sample = processor.encode_conversation(row, template="v1")
    features = [num_image_features(image.size, processor.config) for image in (wide, tall)]
    assert sample["input_ids"].count(IMAGE_TOKEN_INDEX) == sum(features) and features[0] != 4
    assert sample["image_sizes"] == [(90, 40), (30, 100)] and len(sample["pixel_values"]) == 6
    assert len(sample["labels"]) == len(sample["input_ids"])


def test_sample_without_a_picture(tokenizers):
    sample = make(tokenizers["model"]).encode_conversation({"conversations": [["Hi", "Hello"]]}, template="llama_2")
    assert sample["pixel_values"] is None and sample["image_sizes"] == []
    assert tokenizers["model"].decode([x for x in sample["labels"] if x != -100]) == "Hello </s>"


def test_the_checkpoints_template_is_the_default(tokenizers):
    row = {"conversations": [["Hi", "Hello"]]}
    processor = make(tokenizers["model"], conversation_template="llava_llama_2")
    assert processor.encode_conversation(row) == processor.encode_conversation(row, template="llava_llama_2")
    assert processor.encode_conversation(row) != processor.encode_conversation(row, template="v1")
    with pytest.raises(UserError, match="No conversation template 'v2'"):
        processor.encode_conversation(row, template="v2")


# ---- rows ----

CAT = {"image": "cat.jpg"}
SAME = [
    {**CAT, "conversations": [["<image>\nQ", "A"], ["Q2", "A2"]]},
    {
        **CAT,
        "id": 7,
        "conversations": [
            {"from": "gpt", "value": "stray"},
            {"from": "human", "value": "<image>\nQ"},
            {"from": "gpt", "value": "A"},
            {"from": "human", "value": "Q2"},
            {"from": "gpt", "value": "A2"},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "Q2"},
            {"role": "assistant", "content": [{"type": "text", "text": "A2"}]},
        ]
    },
    {**CAT, "messages": turns("<image>\nQ", "A", "Q2", "A2")},
    {
        "images": ["cat.jpg"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]},
            *turns("Q", "A", "Q2", "A2")[1:],
        ],
    },
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "cat.jpg"}},
                    {"type": "text", "text": "Q"},
                ],
            },
            *turns("Q", "A", "Q2", "A2")[1:],
        ],
    },
]


def test_all_forms_of_a_row_are_one():
    for row in SAME:
        before = json.dumps(row)
        assert parse_row(row) == (turns("<image>\nQ", "A", "Q2", "A2"), ["cat.jpg"])
        assert json.dumps(row) == before
    assert [row_format(row) for row in SAME[:3]] == ["toolkit", "llava", "messages"]


def test_pictures_keep_their_order():
    content = [
        {"type": "text", "text": "A <image>"},
        {"type": "image", "path": "mine"},
        {"type": "image"},
        {"type": "text", "text": "B"},
    ]
    row = {"image": ["one", "two"], "messages": [{"role": "user", "content": content}, *turns("", "C")[1:]]}
    messages, images = parse_row(row)
    assert messages[0]["content"] == "A <image>\n<image>\n<image>\nB" and images == ["one", "mine", "two"]


def test_rows_without_pictures_and_with_a_system_text():
    for nothing in ({}, {"image": None}, {"image": ""}, {"image": []}):
        assert parse_row({**nothing, "conversations": [["Q", "A"]]}) == (turns("Q", "A"), [])
    system = {"role": "system", "content": "S"}
    assert parse_row({"messages": [system, *turns("Q", "A")]}) == ([system, *turns("Q", "A")], [])


@pytest.mark.parametrize(
    "row, complaint",
    [
        (["Q", "A"], "The row is a list"),
        ({"text": "Q"}, "neither .its keys are 'text'"),
        ({"conversations": [], "messages": []}, "has both"),
        ({"conversations": {}}, "'conversations' is a object; expected a list"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"conversations": [["Q"]]}, "Round 1 of 'conversations' is .*expected .question, answer."),
        ({"conversations": [["Q", "A"], ["Q", None]]}, "Round 2 of 'conversations' has a null"),
        ({"conversations": [{"from": "human"}]}, "Turn 1 of 'conversations' is"),
        ({"conversations": [{"from": "bing", "value": "Q"}]}, "is from 'bing'; expected 'human', 'gpt'"),
        ({"conversations": [{"from": "human", "value": "Q"}] * 2}, "Message 2 is from 'user'"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "no question"),
        ({"messages": [{"role": "user"}]}, "Message 1 is"),
        ({"messages": [{"role": "user", "content": 3}]}, "Message 1 has a number as content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "has the part .'type': 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "Message 1 has None"),
        ({"image": 3, "conversations": [["<image>", "A"]]}, "'image' has 3; expected the path or URL"),
        ({"image": "a", "images": "b", "conversations": [["<image>", "A"]]}, "both 'image' and 'images'"),
    ],
)
def test_malformed_rows_are_named(row, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_row(row)


@pytest.mark.parametrize(
    "row, text, pictures",
    [
        ({**CAT, "conversations": [["Q", "A"]]}, 0, 1),
        ({"conversations": [["<image>", "A"]]}, 1, 0),
        ({"image": ["a", "b"], "conversations": [["<image>", "A"], ["<image><image>", "A"]]}, 3, 2),
        ({"image": ["a", "b"], "messages": turns("<image>", "A")}, 1, 2),
    ],
)
def test_both_numbers_of_pictures_are_named(row, text, pictures):
    with pytest.raises(ImageCountError, match=f"has {text} <image> but the row has {pictures} picture"):
        parse_row(row)
