"""Tokenizers against transformers' ids, and text that comes out token by token."""

import json
import pickle
import random
import shutil

import pytest

from paddlemix.errors import UserError
from paddlemix.processors.tokenizer import (
    StreamDecoder,
    align,
    encode_text,
    encode_with_offsets,
    load_tokenizer,
)
from tests.support import (
    ADDED_TOKENS,
    FIXTURES,
    add_tokens,
    byte_level_tokenizer_folder,
    llama2_tokenizer_folder,
)

GOLDEN = json.loads((FIXTURES / "tokenizer_golden.json").read_text(encoding="utf-8"))
TEXTS = GOLDEN["texts"]
KINDS = {
    "legacy": {"legacy": True},
    "new": {"legacy": False},
    "fast": {"model": False, "json_file": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: llama2_tokenizer_folder(root / name, **settings) for name, settings in KINDS.items()}
    made.update(
        (f"{name}_added", add_tokens(llama2_tokenizer_folder(root / f"{name}_added", **settings)))
        for name, settings in KINDS.items()
    )
    made["both"] = llama2_tokenizer_folder(root / "both", json_file=True)
    made["byte_level"] = byte_level_tokenizer_folder(root / "byte_level")
    return made


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


def test_a_folder_that_paddlenlp_has_written(folders, tmp_path):
    """Its name of the same file is another one; the toolkit's checkpoints have that."""
    from paddlenlp.transformers import LlamaTokenizer

    LlamaTokenizer(str(folders["legacy"] / "tokenizer.model")).save_pretrained(str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs" / "tokenizer.model").exists()
    opened = load_tokenizer(tmp_path / "theirs")
    assert [opened(text).input_ids for text in TEXTS] == GOLDEN["legacy"]
    opened.save_pretrained(tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours")(TEXTS[1]).input_ids == GOLDEN["legacy"][1]


def test_no_space_before_a_text_where_the_file_says_so(folders, tmp_path):
    """Ids of transformers 4.57's LlamaTokenizer."""
    folder = llama2_tokenizer_folder(tmp_path / "t", legacy=False)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "add_prefix_space": False}))
    tokenizer = pickle.loads(pickle.dumps(load_tokenizer(folder)))
    expected = {
        "USER: hi": [1, 11889, 29901, 7251],
        "[INST] Q": [1, 29961, 25580, 29962, 660],
        " two": [1, 1023],
    }
    for text, ids in expected.items():
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        spans = encode_with_offsets(tokenizer, text)[1]
        assert spans[0][0] == 0 and spans[-1][1] == len(text)


ALL = [*KINDS, *(f"{name}_added" for name in KINDS), "both", "byte_level"]


@pytest.mark.parametrize("name", ALL)
def test_ids_equal_those_of_transformers(tokenizers, name):
    expected = GOLDEN["fast" if name == "both" else name]
    for text, ids in zip(TEXTS, expected):
        assert tokenizers[name](text).input_ids == ids, text


def test_known_ids(tokenizers):
    for name in ("legacy", "new", "fast", "both"):
        assert tokenizers[name]("Hello world!")["input_ids"] == [1, 15043, 3186, 29991]
        assert encode_text(tokenizers[name], "Hello world!") == [15043, 3186, 29991]
    assert tokenizers["legacy"]("</s>USER").input_ids == [1, 2, 3148, 1001]
    assert tokenizers["new"]("</s>USER").input_ids == [1, 2, 11889]


@pytest.mark.parametrize("name", ["fast", "fast_added"])
def test_text_of_ids_equals_transformers(tokenizers, name):
    for ids, skipped, decoded in zip(GOLDEN[name], GOLDEN[f"{name}_skipped"], GOLDEN[f"{name}_decoded"]):
        assert tokenizers[name].decode(ids, skip_special_tokens=True) == skipped
        assert tokenizers[name].decode(ids) == decoded


def test_text_of_byte_level_ids_equals_transformers(tokenizers):
    for ids, text in zip(GOLDEN["byte_level"], GOLDEN["byte_level_skipped"]):
        assert tokenizers["byte_level"].decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ALL)
def test_a_text_without_special_tokens_comes_back(tokenizers, name):
    for text in TEXTS:
        if "<" not in text:
            ids = encode_text(tokenizers[name], text)
            assert tokenizers[name].decode(ids) == text.replace("\u2581", "\u2581" if name == "byte_level" else " ")


@pytest.mark.parametrize("name", ALL)
def test_offsets_are_the_characters_behind_each_token(tokenizers, name):
    tokenizer = tokenizers[name]
    for text in TEXTS:
        ids, offsets = encode_with_offsets(tokenizer, text)
        assert ids == encode_text(tokenizer, text)
        covered = 0
        for index, (start, end) in zip(ids, offsets):
            assert 0 <= start <= end <= len(text) and start <= covered
            covered = max(covered, end)
            try:
                said = tokenizer.token_bytes(index).decode()
            except UnicodeDecodeError:  # a part of a character
                assert end - start == 1 or "\ufffd" in tokenizer.token_bytes(index).decode(errors="replace")
                continue
            there = text[start:end] if name == "byte_level" else text[start:end].replace("\u2581", " ")
            # the space that encoding puts before a text has no character, and may be joined with the first word
            assert said in (there, " " + there) or said == " "
        assert covered == len(text)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("skip", [True, False])
def test_a_stream_is_the_whole_text_and_never_a_broken_character(tokenizers, name, skip):
    tokenizer = tokenizers[name]
    for text in TEXTS:
        decoder = StreamDecoder(tokenizer, skip_special_tokens=skip)
        ids = tokenizer(text).input_ids
        pieces = [decoder.put(index) for index in ids]
        assert "\ufffd" not in "".join(pieces)
        assert decoder.end() == ""
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["legacy", "fast_added", "byte_level"])
def test_a_stream_of_any_ids_equals_decode(tokenizers, name):
    tokenizer, chance = tokenizers[name], random.Random(0)
    for _ in range(200):
        ids = [chance.choice([chance.randrange(300), chance.randrange(len(tokenizer) + 5)]) for _ in range(12)]
        decoder = StreamDecoder(tokenizer)
        streamed = "".join(map(decoder.put, ids)) + decoder.end()
        assert streamed == tokenizer.decode(ids, skip_special_tokens=True)


def test_characters_of_several_tokens_come_out_when_they_are_whole(tokenizers):
    decoder = StreamDecoder(tokenizers["legacy"])
    ids = encode_text(tokenizers["legacy"], "好😀")
    assert [decoder.put(index) for index in ids] == ["", "好", "", "", "", "😀"]
    decoder.put(ids[2])
    assert decoder.end() == "\ufffd"


def test_the_first_space_is_dropped_once(tokenizers):
    tokenizer = tokenizers["legacy"]
    assert tokenizer.decode([15043, 3186]) == "Hello world"
    assert tokenizer.decode([1, 15043, 3186], skip_special_tokens=True) == "Hello world"
    assert tokenizer.decode([29871, 15043]) == " Hello"
    assert tokenizers["byte_level"].decode(encode_text(tokenizers["byte_level"], " a")) == " a"


def test_placeholders_and_ids_beyond_the_vocabulary(tokenizers):
    for name in ("legacy", "fast", "byte_level"):
        ids = [-200, *encode_text(tokenizers[name], "x"), 10**6, -7]
        assert tokenizers[name].decode(ids, skip_special_tokens=True) == "x"
        assert tokenizers[name].decode(ids).startswith("<image>")


def test_special_tokens(tokenizers):
    for name in KINDS:
        plain, added = tokenizers[name], tokenizers[f"{name}_added"]
        assert (plain.unk_token_id, plain.bos_token_id, plain.eos_token_id, plain.pad_token_id) == (0, 1, 2, 0)
        assert (len(plain), plain.vocab_size, plain.model_max_length) == (32000, 32000, 2048)
        assert (len(added), added.vocab_size, added.pad_token, added.pad_token_id) == (32004, 32000, "<pad>", 32001)
        assert added.convert_tokens_to_ids(list(ADDED_TOKENS)) == list(ADDED_TOKENS.values())
        assert added.convert_ids_to_tokens([1, 32000, 15043]) == ["<s>", "<image>", "\u2581Hello"]
        assert added.added_token_id("<image>") == 32000 and plain.added_token_id("<image>") is None
        assert added.is_special(32000) and not added.is_special(32002)
        assert plain.convert_tokens_to_ids("no such token") == 0
        assert plain.tokenize("Hello world") == ["\u2581Hello", "\u2581world"]
        assert plain(["a", "b c"])["attention_mask"] == [[1, 1], [1, 1, 1]]
    smol = tokenizers["byte_level"]
    assert (smol.bos_token_id, smol.eos_token_id, smol.pad_token_id, smol.prefix_ids) == (1, 2, 2, [])


def test_named_tokens_without_any_config(tmp_path):
    for name, settings in KINDS.items():
        folder = llama2_tokenizer_folder(tmp_path / name, **settings)
        (folder / "tokenizer_config.json").unlink()
        (folder / "special_tokens_map.json").unlink()
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
        assert tokenizer.pad_token_id is None
        assert tokenizer("a</s>b").input_ids == [1, 263, 2, 289]


def test_special_tokens_written_as_objects(tmp_path):
    folder = llama2_tokenizer_folder(tmp_path)
    token = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(eos_token=token, pad_token=None, model_max_length=int(1e30), add_eos_token=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<unk>"}}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 0, None)
    assert tokenizer("Hello").input_ids == [1, 15043, 2]


@pytest.mark.parametrize("name", ALL)
def test_saved_folder_opens_again(tokenizers, folders, tmp_path, name):
    tokenizer = tokenizers[name]
    tokenizer.save_pretrained(tmp_path / "one")
    again = load_tokenizer(tmp_path / "one")
    assert len(again) == len(tokenizer) and again.pad_token == tokenizer.pad_token
    for text in TEXTS[:40]:
        assert again(text).input_ids == tokenizer(text).input_ids
    for file in ("tokenizer.model", "tokenizer.json"):
        assert (tmp_path / "one" / file).exists() == (folders[name] / file).exists()


@pytest.mark.parametrize("name", ["new_added", "fast_added", "byte_level"])
def test_goes_to_worker_processes(tokenizers, name):
    again = pickle.loads(pickle.dumps(tokenizers[name]))
    for text in TEXTS[:40]:
        assert again(text).input_ids == tokenizers[name](text).input_ids


def test_half_of_a_surrogate_pair(tokenizers):
    for name in ("legacy", "fast", "byte_level"):
        assert tokenizers[name].decode(encode_text(tokenizers[name], "a\ud83db")) == "a\ufffdb"


def test_bytes_of_a_cut_token(tokenizers):
    for name in ("legacy", "fast", "byte_level"):
        tokenizer = tokenizers[name]
        for text in ("><", "\n\n", " the ", "你😀"):
            ids = tokenizer.split_bytes(text.encode())
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert tokenizers["legacy"].convert_ids_to_tokens(tokenizers["legacy"].split_bytes(b">")) == [">"]


def test_align_gives_a_normalized_or_unknown_token_what_lies_between():
    assert align([b"a", b"?", b"c"], "abbc") == [(0, 1), (1, 3), (3, 4)]
    assert align([], "") == []


@pytest.mark.parametrize(
    "break_it, complaint",
    [
        (lambda folder: (folder / "tokenizer.model").unlink(), "No tokenizer in .*expected tokenizer.json or"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b""), "tokenizer.model can't be opened"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"version https://git-lfs"), "no sentencepiece model"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json can't be opened"),
        (lambda folder: (folder / "tokenizer.json").write_text("[1, 2"), "tokenizer.json can't be opened"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "tokenizer.json can't be opened"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "tokenizer_config.json is no JSON"),
        (lambda folder: (folder / "special_tokens_map.json").write_text("[]"), "special_tokens_map.json holds a list"),
        (
            lambda folder: (folder / "added_tokens.json").write_text('{"<x>": "y"}'),
            "special tokens in .* can't be read",
        ),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"model_max_length": "x"}'),
            "model_max_length is 'x'; expected a number",
        ),
        (lambda folder: shutil.rmtree(folder), "No tokenizer in"),
    ],
)
def test_missing_and_corrupt_files_are_named(tmp_path, break_it, complaint):
    folder = llama2_tokenizer_folder(tmp_path / "broken")
    break_it(folder)
    with pytest.raises(UserError, match=complaint):
        load_tokenizer(folder)


def test_half_a_sentencepiece_file(tmp_path):
    folder = llama2_tokenizer_folder(tmp_path)
    whole = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="tokenizer.model can't be opened: it is no sentencepiece model"):
        load_tokenizer(folder)


def test_an_added_token_whose_id_is_taken(tmp_path):
    folder = llama2_tokenizer_folder(tmp_path, model=False, json_file=True)
    (folder / "added_tokens.json").write_text('{"<x>": 32005}')
    with pytest.raises(UserError, match="'<x>' should have the id 32005"):
        load_tokenizer(folder)


def test_what_callers_of_hugging_face_write(tmp_path):
    tokenizer = load_tokenizer(llama2_tokenizer_folder(tmp_path))
    ids = tokenizer("Hello").input_ids
    assert tokenizer("Hello", return_tensors="pd").input_ids.tolist() == [ids]
    arrays = tokenizer(["Hello", "Hello"], return_tensors="np", padding=False, truncation=None)
    assert arrays.input_ids.tolist() == [ids, ids] and arrays.attention_mask.tolist() == [[1] * len(ids)] * 2
    with pytest.raises(UserError, match="LlavaProcessor pads them"):
        tokenizer(["Hello", "Hello there"], return_tensors="pd")
    with pytest.raises(UserError, match="return_tensors is 'pt'"):
        tokenizer("Hello", return_tensors="pt")
    with pytest.raises(UserError, match="can't honour padding=True; LlavaProcessor makes padded batches"):
        tokenizer(["Hello"], padding=True)
    with pytest.raises(UserError, match="got None; expected a text"):
        tokenizer(None)
    with pytest.raises(TypeError):  # no pairs of texts
        tokenizer("Hello", "there")
