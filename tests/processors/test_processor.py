"""LlavaProcessor: batches that the model takes, and folders that open again."""

import json

import numpy as np
import pytest
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.models.llava.anyres import num_image_features, num_tiles
from paddlemix.models.llava.configuration import LlavaConfig
from paddlemix.models.llava.constants import IMAGE_TOKEN_INDEX
from paddlemix.processors.image_processing import LlavaImageProcessor
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.rows import ImageCountError
from paddlemix.processors.tokenizer import load_tokenizer
from tests.support import add_tokens, byte_level_tokenizer_folder, llama2_tokenizer_folder

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DECODER = {
    "vocab_size": 32004,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
ANYRES = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
}
PROMPT = "USER: <image>\nWhat is this? ASSISTANT:"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(llama2_tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


def make(tokenizer, **settings):
    config = LlavaConfig(**{**DECODER, "vision_config": TOWER, **settings})
    return LlavaProcessor(tokenizer, LlavaImageProcessor.from_config(config), config)


def picture(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ids_of(batch):
    """The rows without their padding."""
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist())
    return [[index for index, real in zip(*row) if real] for row in rows]


# ---- prompts ----


def test_one_prompt_with_one_picture(tokenizer):
    batch = make(tokenizer)(text=PROMPT, images=picture())
    tail = tokenizer.encode("\nWhat is this? ASSISTANT:", add_special_tokens=False)
    assert batch["input_ids"].tolist() == [[1, 3148, 1001, 29901, 29871, *[IMAGE_TOKEN_INDEX] * 4, *tail]]
    assert {name: str(value.dtype).split(".")[-1] for name, value in batch.items()} == {
        "input_ids": "int64",
        "attention_mask": "int64",
        "pixel_values": "float32",
        "image_sizes": "int64",
    }
    assert batch["pixel_values"].shape == [1, 3, 28, 28]
    assert batch["image_sizes"].tolist() == [[40, 30]]
    assert batch["attention_mask"].numpy().all()


def test_text_alone_has_no_pictures_in_its_batch(tokenizer):
    batch = make(tokenizer)(text="USER: Hi ASSISTANT:")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [tokenizer("USER: Hi ASSISTANT:").input_ids]


def test_rows_are_padded_on_the_left(tokenizer):
    processor = make(tokenizer)
    prompts = [PROMPT, "Hi", "Two: <image> <image>"]
    pictures = [picture(seed=seed) for seed in range(3)]
    batch = processor(text=prompts, images=pictures)
    alone = [processor(prompts[0], pictures[0]), processor(prompts[1]), processor(prompts[2], pictures[1:])]
    assert ids_of(batch) == [one["input_ids"].tolist()[0] for one in alone]
    for row, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist()):
        assert mask == sorted(mask) and set(row[: mask.count(0)]) <= {processor.pad_token_id}
    expected = np.concatenate([alone[0]["pixel_values"].numpy(), alone[2]["pixel_values"].numpy()])
    assert np.array_equal(batch["pixel_values"].numpy(), expected)


def test_every_form_of_a_list_of_pictures(tokenizer, tmp_path):
    processor = make(tokenizer)
    one, two = picture(seed=1), picture(seed=2)
    one.save(tmp_path / "one.png")
    prompts = ["a <image>", "b", "c <image>"]
    batches = [
        processor(prompts, [one, two]),
        processor(prompts, [[one], [], [two]]),
        processor(prompts, [one, None, [two]]),
        processor(prompts, (str(tmp_path / "one.png"), np.asarray(two))),
    ]
    for batch in batches:
        assert batch["input_ids"].tolist() == batches[0]["input_ids"].tolist()
        assert np.array_equal(batch["pixel_values"].numpy(), batches[0]["pixel_values"].numpy())


def test_tiles_of_anyres_pictures(tokenizer):
    processor = make(tokenizer, **ANYRES)
    sizes = [(90, 40), (30, 100), (28, 28)]
    batch = processor(["<image> and <image>", "<image>"], [picture(*size) for size in sizes])
    assert batch["image_sizes"].tolist() == [list(size) for size in sizes]
    assert batch["pixel_values"].shape[0] == sum(num_tiles(size, processor.config) for size in sizes)
    features = [num_image_features(size, processor.config) for size in sizes]
    counts = [row.count(IMAGE_TOKEN_INDEX) for row in ids_of(batch)]
    assert counts == [features[0] + features[1], features[2]]
    assert processor.tokenize_prompt("<image> and <image>", sizes[:2]) == ids_of(batch)[0]


@pytest.mark.parametrize(
    "text, images, complaint",
    [
        (PROMPT, None, "text has 1 <image> but 0 picture"),
        ("Hi", 1, "text has 0 <image> but 1 picture"),
        (["<image>", "<image><image>"], 2, "text has 3 <image> but 2 picture"),
        (["<image>", "Hi"], [0, 1], "Prompt 1 has 1 <image> but 0 picture"),
        (["<image>", "Hi"], [1], "2 prompt.s. but 1 lists"),
    ],
)
def test_both_numbers_are_named_where_pictures_are_too_few_or_many(tokenizer, text, images, complaint):
    if isinstance(images, int):
        images = [picture()] * images
    elif images:
        images = [[picture()] * count for count in images]
    with pytest.raises(ImageCountError, match=complaint):
        make(tokenizer)(text, images)


def test_no_prompt_and_no_picture_file(tokenizer, tmp_path):
    for nothing in ([], None, [3]):
        with pytest.raises(UserError, match="no prompt"):
            make(tokenizer)(nothing)
    with pytest.raises(UserError, match="nowhere.png"):
        make(tokenizer)(PROMPT, str(tmp_path / "nowhere.png"))


def test_a_picture_that_is_too_thin_is_named(tokenizer, tmp_path):
    processor = make(tokenizer, image_aspect_ratio="pad")
    thin = Image.new("RGB", (1, 40000))
    with pytest.raises(UserError, match=r"^Picture 2 \(1 x 40000 pixels\) is too thin"):
        processor(["<image>", "<image>"], [picture(), thin])
    thin.save(tmp_path / "thin.png")
    with pytest.raises(UserError, match=r"^.*thin\.png \(1 x 40000 pixels\) is too thin"):
        processor(PROMPT, tmp_path / "thin.png")


def test_a_prompt_without_tokens_is_named(tmp_path):
    processor = make(load_tokenizer(byte_level_tokenizer_folder(tmp_path)))  # which puts no bos before a text
    for prompts, number in (("", 1), (["Hi", ""], 2)):
        with pytest.raises(UserError, match=f"^Prompt {number} is empty; expected some text"):
            processor(prompts)


def test_what_callers_of_hugging_face_write(tokenizer, tmp_path):
    processor = make(tokenizer)
    images = np.stack([np.asarray(picture(seed=seed)) for seed in range(2)])
    expected = processor([PROMPT, PROMPT], [picture(seed=seed) for seed in range(2)])
    batch = processor([PROMPT, PROMPT], images, truncation=False, add_special_tokens=True, max_length=None)
    assert np.array_equal(batch["pixel_values"].numpy(), expected["pixel_values"].numpy())
    for asked in ({"truncation": True}, {"max_length": 5}, {"add_special_tokens": False}, {"colour": "red"}):
        with pytest.raises(UserError, match=f"can't honour {next(iter(asked))}="):
            processor("Hi", **asked)
    ids = expected["input_ids"]
    plain = dict(clean_up_tokenization_spaces=False)
    assert processor.decode(ids[0], **plain) == processor.decode(ids[0])
    assert processor.batch_decode(ids, **plain) == processor.batch_decode(ids)
    with pytest.raises(UserError, match="clean_up_tokenization_spaces"):
        processor.decode(ids[0], clean_up_tokenization_spaces=True)
    for several in (ids, ids.numpy(), ids.tolist()):
        with pytest.raises(UserError, match="expected one row, batch_decode takes several"):
            processor.decode(several)
    processor.save_pretrained(tmp_path)
    again = LlavaProcessor.from_pretrained(tmp_path, use_fast=False)
    assert again("Hi")["input_ids"].tolist() == processor("Hi")["input_ids"].tolist()
    with pytest.raises(UserError, match="can't honour trust_remote_code=True"):
        LlavaProcessor.from_pretrained(tmp_path, trust_remote_code=True)


def test_im_start_and_im_end_stand_around_the_picture(tmp_path):
    tokenizer = load_tokenizer(add_tokens(llama2_tokenizer_folder(tmp_path)))
    processor = make(tokenizer, mm_use_im_start_end=True)
    expected = [1, 263, 29871, 32002, *[IMAGE_TOKEN_INDEX] * 4, 32003, 29871, 13, 29895]
    for text in ("a <image>\nk", "a <im_start><image><im_end>\nk"):
        assert processor.tokenize_prompt(text, [(40, 30)]) == expected
    row = {"image": picture(), "conversations": [["<image>\nQ", "A"]]}
    ids = processor.encode_conversation(row)["input_ids"]
    at = ids.index(IMAGE_TOKEN_INDEX)
    assert ids[at - 1] == 32002 and ids[at + 4] == 32003


@pytest.mark.parametrize("settings", [{"legacy": True}, {"model": False, "json_file": True}])
def test_a_tokenizer_that_knows_image_gives_the_same_ids(tmp_path, tokenizer, settings):
    knows = load_tokenizer(add_tokens(llama2_tokenizer_folder(tmp_path, **settings)))
    assert knows.added_token_id("<image>") == 32000
    for text in (PROMPT, "<image>", "a <image>\n<image> b</s>", "<image> 你"):
        sizes = [(40, 30)] * text.count("<image>")
        assert make(knows).tokenize_prompt(text, sizes) == make(tokenizer).tokenize_prompt(text, sizes)


def test_bos_is_the_tokenizers_own_affair(tmp_path):
    smol = load_tokenizer(byte_level_tokenizer_folder(tmp_path))
    processor = make(smol)
    text = "<|im_start|>user\n<image>\n<|im_start|>"  # starts with what is named its bos
    ids = processor.tokenize_prompt(text, [(40, 30)])
    assert [index for index in ids if index >= 0] == [
        index for part in text.split("<image>") for index in smol(part).input_ids
    ]


def test_decode(tokenizer):
    processor = make(tokenizer)
    ids = processor(PROMPT, picture())["input_ids"]
    assert processor.decode(ids[0]) == "USER:  \nWhat is this? ASSISTANT:"
    assert processor.batch_decode(ids) == [processor.decode(ids[0])]
    assert processor.decode([15043, 2]) == "Hello"
    assert processor.decode([15043, 2], skip_special_tokens=False) == "Hello</s>"
    decoder = processor.stream_decoder()
    assert decoder.put(15043) + decoder.put(2) + decoder.end() == "Hello"


def test_pad_is_the_tokenizers_then_the_configs(tmp_path, tokenizer):
    assert make(tokenizer).pad_token_id == 0
    assert make(load_tokenizer(add_tokens(llama2_tokenizer_folder(tmp_path)))).pad_token_id == 32001
    bare = llama2_tokenizer_folder(tmp_path / "bare")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (bare / name).unlink()
    assert make(load_tokenizer(bare), pad_token_id=5).pad_token_id == 5
    assert make(load_tokenizer(bare), pad_token_id=None).pad_token_id == 0


def test_a_model_without_a_tower_takes_text_only(tokenizer):
    processor = LlavaProcessor(tokenizer, None, LlavaConfig(**DECODER))
    assert ids_of(processor("Hi")) == [tokenizer("Hi").input_ids]
    with pytest.raises(UserError, match="takes text only"):
        processor(PROMPT, picture())


# ---- with the model ----


def test_the_model_takes_every_batch(tokenizer):
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

    processor = make(tokenizer)
    model = LlavaLlamaForCausalLM(processor.config)
    model.eval()
    for text, images in (("Hi there", None), (PROMPT, picture()), ([PROMPT, "Hi"], [[picture()], []])):
        batch = processor(text, images)
        logits = model(**batch).logits
        assert logits.shape == [*batch["input_ids"].shape, 32004]
        ids, _ = model.generate(**batch, max_new_tokens=2)
        assert ids.shape[0] == batch["input_ids"].shape[0] and len(processor.batch_decode(ids)) == ids.shape[0]


# ---- folders ----


@pytest.mark.parametrize("settings", [{}, {"image_aspect_ratio": "pad"}, ANYRES])
def test_a_saved_folder_opens_again(tokenizer, tmp_path, settings):
    processor = make(tokenizer, conversation_template="llava_llama_2", **settings)
    processor.save_pretrained(tmp_path)
    again = LlavaProcessor.from_pretrained(tmp_path)
    assert again.config.conversation_template == again.template.name == "llava_llama_2"
    image = picture(90, 40)
    expected, got = processor(PROMPT, image), again(PROMPT, image)
    for name, value in expected.items():
        assert np.array_equal(value.numpy(), got[name].numpy()), name
    row = {"image": image, "conversations": [["<image>\nQ", "A"]]}
    assert processor.encode_conversation(row)["labels"] == again.encode_conversation(row)["labels"]


def test_a_folder_that_cannot_be_written_to(tokenizer, tmp_path):
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM

    processor = make(tokenizer)
    model = LlavaLlamaForCausalLM(processor.config)
    (tmp_path / "afile").write_text("mine")
    for part in (processor, processor.tokenizer, processor.image_processor, model):
        with pytest.raises(UserError, match="afile is a file; expected a folder"):
            part.save_pretrained(tmp_path / "afile")
        with pytest.raises(UserError, match="can't be made a folder"):
            part.save_pretrained(str(tmp_path / "afile" / "x"))
        with pytest.raises(UserError, match="is None; expected its name"):
            part.save_pretrained(None)
    assert (tmp_path / "afile").read_text() == "mine"


def test_saving_leaves_a_models_config_alone(tokenizer, tmp_path):
    processor = make(tokenizer)
    (tmp_path / "config.json").write_text('{"mine": 1}')
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"mine": 1}


def test_aspect_ratio_in_place_of_the_checkpoints(tokenizer, tmp_path):
    make(tokenizer).save_pretrained(tmp_path)
    image = picture(80, 20)
    square, pad = (LlavaProcessor.from_pretrained(tmp_path, image_aspect_ratio=name) for name in ("square", "pad"))
    assert pad.config.image_aspect_ratio == "pad" and square.config.image_aspect_ratio == "square"
    expected = make(tokenizer, image_aspect_ratio="pad")(PROMPT, image)["pixel_values"].numpy()
    assert np.array_equal(pad(PROMPT, image)["pixel_values"].numpy(), expected)
    assert not np.array_equal(square(PROMPT, image)["pixel_values"].numpy(), expected)
    with pytest.raises(UserError, match="image_aspect_ratio is 'round'"):
        LlavaProcessor.from_pretrained(tmp_path, image_aspect_ratio="round")


def test_a_folder_without_a_tokenizer(tokenizer, tmp_path):
    make(tokenizer).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="No tokenizer in"):
        LlavaProcessor.from_pretrained(tmp_path)


def test_an_adapter_alone_goes_by_its_base(tokenizer, tmp_path):
    make(tokenizer, image_aspect_ratio="pad").save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    recorded = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "lora_config.json").write_text(json.dumps(recorded))
    processor = LlavaProcessor.from_pretrained(tmp_path / "adapter")
    assert processor.config.image_aspect_ratio == processor.image_processor.image_aspect_ratio == "pad"
    assert processor("Hi")["input_ids"].tolist() == [tokenizer("Hi").input_ids]
