"""Rows -> samples: all formats joined, pictures found, cuts and drops counted, bad rows named, nothing read twice."""

import base64
import pickle
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from paddlemix.datasets.collator import LlavaCollator
from paddlemix.datasets.files import DatasetEntry, parse_dataset_key
from paddlemix.datasets.packing import PackedDataset
from paddlemix.datasets.parallel import BatchLoader
from paddlemix.datasets.samplers import GlobalBatchSampler, Unlabelled
from paddlemix.datasets.supervised import SupervisedDataset, image_size
from paddlemix.errors import UserError
from paddlemix.processors.images import load_image
from tests.datasets.tiny import (
    ANYRES,
    mixed_rows,
    picture,
    png_with_exif_behind_its_pixels,
    tiny_processor,
    turned_exif,
    write_rows,
)


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    return tiny_processor(tmp_path_factory.mktemp("square"))


@pytest.fixture(scope="module")
def anyres(tmp_path_factory):
    return tiny_processor(tmp_path_factory.mktemp("anyres"), **ANYRES)


def entry(*files, **kwargs):
    return DatasetEntry(data_files=tuple(files), **kwargs)


def dataset_of(processor, rows, folder, max_length=2048, **kwargs):
    return SupervisedDataset([entry(write_rows(folder / "data.json", rows))], processor, max_length, **kwargs)


@pytest.mark.parametrize("kind", ["square", "anyres"])
def test_samples_equal_the_processors_and_lengths_are_known_before(request, kind, tmp_path, monkeypatch):
    processor = request.getfixturevalue(kind)
    rows = mixed_rows(tmp_path)
    dataset = dataset_of(processor, rows, tmp_path)
    assert len(dataset) == len(rows) == dataset.counts["rows"] == dataset.counts["samples"]
    monkeypatch.chdir(tmp_path)  # where the rows' pictures are
    for index, row in enumerate(rows):
        expected = processor.encode_conversation(row)
        got = dataset[index]
        assert (got["input_ids"], got["labels"]) == (expected["input_ids"], expected["labels"])
        assert got["image_sizes"] == expected["image_sizes"]
        if expected["pixel_values"] is None:
            assert got["pixel_values"] is None
        else:
            np.testing.assert_array_equal(got["pixel_values"], expected["pixel_values"])
        pictured = bool(expected["image_sizes"])
        assert dataset.lengths[index] == len(expected["input_ids"]) * (1 if pictured else -1)
    labels = [label for index in range(len(dataset)) for label in dataset[index]["labels"][1:]]
    assert dataset.counts["supervised"] == sum(label != -100 for label in labels)


def test_entries_and_files_are_joined_in_order(square, tmp_path):
    rows = [{"conversations": [[f"Question {n}", f"Answer {n}"]]} for n in range(6)]
    write_rows(tmp_path / "a.json", rows[:2])
    write_rows(tmp_path / "b.jsonl", rows[2:3])
    write_rows(tmp_path / "c.json", rows[3:])
    key = {"train": [{"data_files": ["a.json", "b.jsonl"]}, {"data_files": "c.json"}]}
    dataset = SupervisedDataset(parse_dataset_key(key, config_folder=tmp_path)["train"], square, 512)
    answers = [dataset.conversation(n)[0][-1]["content"] for n in range(len(dataset))]
    assert answers == [f"Answer {n}" for n in range(6)]
    assert [dataset.where(n).split("/")[-1] for n in (1, 2, 3)] == ["a.json:3 (row 2)", "b.jsonl:1", "c.json:2 (row 1)"]


def test_pictures_are_found(square, tmp_path, monkeypatch):
    """In image_folder, beside the data file, in the working directory, by absolute path, and by URL."""
    picture(tmp_path / "folder" / "a.png", (31, 10), seed=1)
    picture(tmp_path / "data" / "a.png", (32, 10), seed=2)
    picture(tmp_path / "data" / "b.jpg", (33, 10), seed=3)
    picture(tmp_path / "run" / "sub" / "c.png", (34, 10), seed=4)
    absolute = picture(tmp_path / "else where" / "d #1?.png", (35, 10), seed=5)
    inline = base64.b64encode(picture(tmp_path / "e.png", (36, 10)).read_bytes()).decode()
    picture(tmp_path / "data" / "~g.png", (38, 10))
    picture(tmp_path / "home" / "h.png", (39, 10))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    picture(tmp_path / "www" / "f.png", (37, 10))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    handler.log_message = lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = ["a.png", "b.jpg", "sub/c.png", str(absolute), f"data:image/png;base64,{inline}"]
    names += [f"http://127.0.0.1:{server.server_port}/f.png", "~g.png", "~/h.png"]
    file = write_rows(tmp_path / "data" / "x.json", [{"image": n, "conversations": [["<image>", "A"]]} for n in names])
    monkeypatch.chdir(tmp_path / "run")
    try:
        dataset = SupervisedDataset([entry(file, image_folder=tmp_path / "folder")], square, 512)
        widths = [dataset[n]["image_sizes"][0][0] for n in range(len(names))]
        beside = SupervisedDataset([entry(file)], square, 512)[0]["image_sizes"][0][0]
    finally:
        server.shutdown()
    assert widths == [31, 33, 34, 35, 36, 37, 38, 39]
    assert beside == 32


@pytest.mark.parametrize("size", [(40, 30), (30, 90), (200, 50)])
def test_sizes_from_headers_equal_those_of_decoded_pictures(tmp_path, size):
    paths = [picture(tmp_path / f"a.{kind}", size) for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm")]
    paths += [picture(tmp_path / f"turned.{kind}", size, exif=turned_exif()) for kind in ("png", "jpg", "webp", "tiff")]
    paths.append(png_with_exif_behind_its_pixels(tmp_path / "behind.png", size))
    for path in paths:
        assert image_size(path) == load_image(path).size, path.name
    assert image_size(tmp_path / "behind.png") == size[::-1], "the picture must be one that EXIF turns"


def test_the_header_of_a_picture_is_enough(anyres, tmp_path):
    """A cut-off JPEG: its length is known, and only the sample itself needs the pixels."""
    whole = picture(tmp_path / "0.jpg", (300, 200)).read_bytes()
    (tmp_path / "0.jpg").write_bytes(whole[: len(whole) // 2])
    dataset = dataset_of(anyres, [{"image": "0.jpg", "conversations": [["<image>", "A"]]}], tmp_path)
    assert dataset.lengths[0] > 0
    with pytest.raises(UserError, match=r"data\.json:2 \(row 1\): .*0\.jpg is a broken or cut-off picture"):
        dataset[0]


def test_cuts_and_drops_are_counted(square, tmp_path, caplog):
    rounds = [["How are you today?", "Fine, thank you very much."]] * 3
    picture(tmp_path / "0.png")
    rows = [
        {"conversations": rounds},
        {"image": "0.png", "conversations": [["<image>\nWhat is it?", "word " * 300]]},
        {"conversations": [["Hi", "Hello"]]},
        {"messages": [{"role": "user", "content": "No answer"}]},
        {"image": "0.png", "conversations": [["Hi", "Hello"], ["<image> and this?", "word " * 300]]},
    ]
    dataset = dataset_of(square, rows, tmp_path, max_length=90)
    assert len(dataset) == 3
    assert {key: dataset.counts[key] for key in ("rows", "samples", "cut", "dropped")} == {
        "rows": 5,
        "samples": 3,
        "cut": 2,
        "dropped": 2,
    }
    assert "2 of 5 rows are left out" in caplog.text
    whole = square.encode_conversation(rows[0])
    first = dataset[0]
    assert len(first["input_ids"]) < len(whole["input_ids"])
    assert first["input_ids"] == whole["input_ids"][: len(first["input_ids"])]
    assert first["input_ids"][-1] == first["labels"][-1] == square.tokenizer.eos_token_id, "cut at the end of a round"
    assert dataset.lengths == [
        -len(dataset[0]["input_ids"]),
        -len(dataset[1]["input_ids"]),
        -len(dataset[2]["input_ids"]),
    ]
    assert dataset[2]["pixel_values"] is None, "the picture was in the round that was cut off"


BAD = [
    ({"conversations": [["<image>\nQ", "A"]]}, "The text has 1 <image> but the row has 0 picture"),
    ({"image": "gone.png", "conversations": [["<image>\nQ", "A"]]}, "gone.png doesn't exist"),
    ({"image": "bad.png", "conversations": [["<image>\nQ", "A"]]}, "bad.png is not a picture"),
    ({"conversations": []}, "'conversations' is empty"),
    ([1, 2], "The row is a list"),
    ({"conversations": [["Q", 3]]}, "has a number where text was expected"),
]


@pytest.mark.parametrize("row, message", BAD)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_bad_row_stops_the_training_before_it_starts(anyres, tmp_path, row, message, suffix):
    (tmp_path / "bad.png").write_bytes(b"not a picture at all")
    good = {"conversations": [["Q", "A"]]}
    file = write_rows(tmp_path / f"x.{suffix}", [good, good, row, good, row])
    line = "x.json:4 (row 3)" if suffix == "json" else "x.jsonl:3"
    with pytest.raises(UserError) as raised:
        SupervisedDataset([entry(file)], anyres, 512)
    assert str(raised.value).startswith(f"{tmp_path}/{line}: ") and message in str(raised.value)
    assert "1 more rows can't be used; check_dataset.py" in str(raised.value) and "\n" not in str(raised.value)


def test_files_without_a_sample_are_refused(square, tmp_path):
    with pytest.raises(UserError, match="is an empty JSON array"):
        dataset_of(square, [], tmp_path)
    with pytest.raises(UserError, match="keeps a token to learn with max_length 20; raise max_length"):
        dataset_of(square, [{"conversations": [["word " * 50, "A"]]}], tmp_path, max_length=20)
    with pytest.raises(UserError, match="No row of no file"):
        SupervisedDataset([], square, 512)
    with pytest.raises(UserError, match=r"x\.json:3 \(row 3\): not valid JSON"):
        (tmp_path / "x.json").write_text('[{"conversations": [["Q", "A"]]},\n1,\n}]')
        SupervisedDataset([entry(tmp_path / "x.json")], square, 512)


def test_an_unlabelled_index_gives_the_sample_without_labels(square, tmp_path):
    dataset = dataset_of(square, mixed_rows(tmp_path), tmp_path)
    for made in (dataset, PackedDataset(dataset, 512)):
        labelled, silent = made[0], made[Unlabelled(0)]
        assert silent["input_ids"] == labelled["input_ids"]
        assert set(silent["labels"]) == {-100} != set(labelled["labels"])


def test_a_dataset_can_be_sent_to_another_process(square, tmp_path):
    """Where workers aren't forked."""
    template = tmp_path / "chat_template.json"
    template.write_text('{"conversation": ["Q={{user}};", "A={{bot}}</s>"]}')
    file = write_rows(tmp_path / "x.json", mixed_rows(tmp_path))
    dataset = SupervisedDataset([entry(file), entry(file, chat_template=template)], square, 512)
    copy = pickle.loads(pickle.dumps(dataset))
    for index in range(len(dataset)):
        assert copy[index]["input_ids"] == dataset[index]["input_ids"]


def test_templates_by_entry_and_by_name(square, tmp_path):
    rows = [{"conversations": [["Q one", "A one"]]}]
    file = write_rows(tmp_path / "x.json", rows)
    template = tmp_path / "chat_template.json"
    template.write_text(
        '{"system": "Sys. ", "conversation": ["Q={{user}};", "A={{bot}}</s>"], "query": "Q={{query}};A="}'
    )
    texts = []
    for entries, name in (
        ([entry(file)], None),
        ([entry(file)], "llava_v0"),
        ([entry(file, chat_template=template)], "llava_v0"),
    ):
        dataset = SupervisedDataset(entries, square, 512, template=name)
        sample = dataset[0]
        learned = [token for token, label in zip(sample["input_ids"], sample["labels"]) if label != -100]
        texts.append((square.decode(sample["input_ids"]), square.decode(learned, skip_special_tokens=False)))
    assert texts[0][0].startswith("A chat between a curious user") and texts[0][0].endswith(
        "USER: Q one ASSISTANT: A one"
    )
    assert "###Human: Q one###Assistant: A one###" in texts[1][0]
    assert texts[2][0] == "Sys. Q=Q one;A=A one" and texts[2][1].strip() == "A one</s>"


def test_thousands_of_rows_in_parallel_as_in_one_process(square, tmp_path):
    picture(tmp_path / "0.png")
    rows = [
        {"image": "0.png", "conversations": [["<image>\nHow many?", f"{n} and {n * n}."]]}
        if n % 3
        else {"conversations": [["How many?", f"{n} and {n * n}."]]}
        for n in range(3000)
    ]
    alone = dataset_of(square, rows, tmp_path, num_workers=0)
    together = dataset_of(square, rows, tmp_path, num_workers=3)
    assert alone.lengths == together.lengths and alone.counts == together.counts
    assert len(alone) == 3000


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_once_per_epoch_through_the_loader(square, tmp_path, workers):
    rows = [{"conversations": [["Q", f"Answer {n}"]]} for n in range(23)]
    dataset = dataset_of(square, rows, tmp_path)
    seen = []
    for rank in range(2):
        sampler = GlobalBatchSampler(dataset, 2, num_replicas=2, rank=rank, accumulation_steps=2, seed=3)
        collator = LlavaCollator(square.pad_token_id)
        for batch in BatchLoader(dataset, batch_sampler=sampler, collate_fn=collator, num_workers=workers):
            labels = batch["labels"].numpy()
            seen += [square.decode(row[row != -100]) for row in labels if (row != -100).any()]
    assert sorted(seen) == sorted(f"Answer {n}" for n in range(23))


def test_relative_data_files_keep_working(square, tmp_path, monkeypatch):
    picture(tmp_path / "images" / "0.png")
    write_rows(tmp_path / "x.json", [{"image": "images/0.png", "conversations": [["<image>\nQ", "A"]]}])
    monkeypatch.chdir(tmp_path)
    dataset = SupervisedDataset([entry(Path("x.json"))], square, 512)
    assert dataset[0]["image_sizes"] == [(40, 30)]
    assert dataset.conversation(0)[1] == [Path("images/0.png")]


def test_a_template_that_writes_bos_itself_has_one(square, tmp_path):
    """LLaMA-2's format in a file: the text has every mark, also the first, which the tokenizer would add."""
    template = tmp_path / "chat_template.json"
    template.write_text(
        '{"conversation": ["<s>[INST] {{user}} [/INST]", " {{bot}} </s>"], "query": "<s>[INST] {{query}} [/INST]"}'
    )
    file = write_rows(tmp_path / "x.json", [{"conversations": [["One", "Two"], ["Three", "Four"]]}])
    sample = SupervisedDataset([entry(file, chat_template=template)], square, 512)[0]
    bos = square.tokenizer.bos_token_id
    assert sample["input_ids"][0] == bos != sample["input_ids"][1]
    assert sample["input_ids"].count(bos) == 2
    learned = [token for token, label in zip(sample["input_ids"], sample["labels"]) if label != -100]
    assert square.decode(learned, skip_special_tokens=False).strip() == "Two </s> Four </s>"
