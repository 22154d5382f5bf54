"""Data files: both forms, where each row is, and what is said of broken ones."""

import json

import pytest

from paddlemix.datasets.files import RowFile, parse_dataset_key
from paddlemix.errors import UserError

ROWS = [{"id": n, "text": 'héllo 世界 😀 \u2028 [ " ] }'} for n in range(5)]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def every_form():
    compact = json.dumps(ROWS, ensure_ascii=False)
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    return {
        "array": compact,
        "indented array": json.dumps(ROWS, ensure_ascii=False, indent=2),
        "escaped array": json.dumps(ROWS),
        "array after blank lines": "\n\r\n  " + compact + "\n\n",
        "byte order mark": "\ufeff" + compact,
        "lines": "\n".join(lines),
        "lines with an end": "\n".join(lines) + "\n",
        "blank lines": "\n\n" + "\n \t\n".join(lines) + "\n\n",
        "windows lines": "\r\n".join(lines) + "\r\n",
        "lines after a byte order mark": "\ufeff" + "\n".join(lines),
    }


@pytest.mark.parametrize("form", every_form())
def test_every_form_gives_the_same_rows(tmp_path, form):
    file = RowFile(write(tmp_path / "data.json", every_form()[form]))
    assert [file[n] for n in range(len(file))] == ROWS
    assert file.problems == []


def test_rows_know_their_lines(tmp_path):
    array = RowFile(write(tmp_path / "a.json", '\n[\n  {"a": 1},\n  {"a":\n    2}, {"a": 3}\n]'))
    assert array.lines.tolist() == [3, 4, 5]
    assert array.where(2) == f"{tmp_path / 'a.json'}:5 (row 3)"
    lines = RowFile(write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n'))
    assert lines.lines.tolist() == [2, 4]
    assert lines.where(1) == f"{tmp_path / 'a.jsonl'}:4"


def test_a_bad_line_leaves_the_others_readable(tmp_path):
    file = RowFile(write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}\n'))
    assert (file[0], file[2]) == ({"a": 1}, {"a": 3})
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON: expecting ',' delimiter at column 8\."):
        file[1]


def test_a_bad_first_line_is_a_bad_line(tmp_path):
    file = RowFile(write(tmp_path / "a.jsonl", '{"a" 1}\n{"a": 2}\n'))
    assert file[1] == {"a": 2}
    with pytest.raises(UserError, match=r"a\.jsonl:1: "):
        file[0]


def test_lines_that_end_in_a_comma_are_named(tmp_path):
    file = RowFile(write(tmp_path / "a.jsonl", '{"a": [1]},\n{"a": [2]}, \n{"a": [3]}'))
    for line in (1, 2):
        with pytest.raises(UserError, match=rf"a\.jsonl:{line}: a comma after the row, at column 11; .* remove it"):
            file[line - 1]
    assert file[2] == {"a": [3]}


@pytest.mark.parametrize("first", [0, 1])
def test_a_number_of_too_many_digits_is_a_bad_line(tmp_path, first):
    rows = ['{"a": ' + "1" * 5000 + "}", '{"a": 2}']
    file = RowFile(write(tmp_path / "a.jsonl", "\n".join(rows if first else rows[::-1])))
    assert file[first] == {"a": 2}
    with pytest.raises(UserError, match=rf"a\.jsonl:{2 - first}: not valid JSON: a number of too many digits"):
        file[1 - first]


def test_a_row_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "ok"}\n' + '{"a": "é"}\n'.encode("latin-1"))
    file = RowFile(path)
    assert file[0] == {"a": "ok"}
    with pytest.raises(UserError, match=r"a\.jsonl:2: the row isn't UTF-8"):
        file[1]


@pytest.mark.parametrize(
    "text, line, message",
    [
        ('[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', 4, "expected ',' or ']' after a row, found '{'"),
        ('[\n{"a": 1},\n{"a": 2},\n]', 4, "a comma with no row after it"),
        ('[\n{"a": 1},\n{"a": 2}', 3, "expected ',' or ']' after a row, the file ends"),
        ('[\n{"a": 1},\n{"a": 2}, {"a": }\n]', 3, "expecting value"),
        ('[\n{"a": 1},\n{"a": 2}\n]\n[]', 5, "text after the end of the array"),
        ("[\n1,\n2,\n" + "[" * 100_000, 4, "nested too deep"),
        ('[\n1,\n2,\n{"id": ' + "1" * 5000 + "}]", 4, "a number of too many digits"),
    ],
)
def test_a_broken_array_says_where_and_keeps_the_rows_before(tmp_path, text, line, message):
    file = RowFile(write(tmp_path / "a.json", text))
    assert len(file) == 2
    (problem,) = file.problems
    assert problem.where.startswith(f"{tmp_path / 'a.json'}:{line} ")
    assert message in problem.message


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[ ]", "is an empty JSON array"),
        (b'{\n "data": [\n {"a": 1}]\n}', "move the list under 'data' to the top level"),
        ('[{"a": 1}]'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"\x89PNG\r\n\x1a\n\0\0", "is a binary file"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        RowFile(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"data_files names .*none\.json, which doesn't exist"):
        RowFile(tmp_path / "none.json")
    with pytest.raises(UserError, match="which is a folder"):
        RowFile(tmp_path)


def test_many_rows_are_found_at_once_and_read_one_by_one(tmp_path):
    rows = [{"n": n, "text": "x" * (n % 50)} for n in range(20_000)]
    for name, text in (
        ("a.json", json.dumps(rows, indent=0)),
        ("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
    ):
        file = RowFile(write(tmp_path / name, text))
        assert len(file) == len(rows)
        assert [file[n] for n in (0, 9_999, 19_999)] == [rows[n] for n in (0, 9_999, 19_999)]


# the dataset key


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("train.json", "more.json", "val.json", "chat_template.json", "config/own.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "[]")
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_toolkits_dataset_key(folder):
    entries = parse_dataset_key(
        {
            "train": [
                {"name": "chatml_dataset", "data_files": "train.json", "chat_template": "chat_template.json"},
                {"data_files": ["train.json", "more.json"], "image_folder": "images"},
            ],
            "eval": {"name": "chatml_dataset", "data_files": "val.json"},
        }
    )
    first, second = entries["train"]
    assert [str(path) for path in first.data_files] == ["train.json"]
    assert str(first.chat_template) == "chat_template.json" and first.image_folder is None
    assert [str(path) for path in second.data_files] == ["train.json", "more.json"]
    assert str(second.image_folder) == "images" and second.chat_template is None
    assert len(entries["eval"]) == 1


def test_paths_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    paths = {"data_files": "~/train.json", "image_folder": "~/images", "chat_template": "~/chat_template.json"}
    (entry,) = parse_dataset_key({"train": [paths]}, config_folder=folder / "config")["train"]
    assert entry.data_files == (folder / "train.json",)
    assert entry.image_folder == folder / "images" and entry.chat_template == folder / "chat_template.json"
    with pytest.raises(UserError, match=rf"looked for {folder}/no\.json\.$"):
        parse_dataset_key({"train": [{"data_files": "~/no.json"}]}, config_folder=folder / "config")


def test_paths_are_also_looked_for_beside_the_configuration(folder):
    entries = parse_dataset_key({"train": [{"data_files": "own.json"}]}, config_folder=folder / "config")
    assert entries["train"][0].data_files == (folder / "config" / "own.json",)
    assert entries["eval"] == []


@pytest.mark.parametrize(
    "key, message",
    [
        (["train.json"], 'dataset is .*; expected {"train"'),
        ({"trian": []}, "dataset has the key 'trian'; expected 'train' \\(the nearest\\)"),
        ({"train": "train.json"}, "dataset.train is 'train.json'; expected a list"),
        ({"train": ["train.json"]}, r"dataset.train\[0\] is 'train.json'; expected an object"),
        (
            {"train": [{"data_file": "train.json"}]},
            r"\[0\] has the key 'data_file'; expected 'data_files' \(the nearest\)",
        ),
        ({"train": [{"name": "chatml", "data_files": "train.json"}]}, "name is 'chatml'; expected 'chatml_dataset'"),
        ({"train": [{"name": "coco_caption", "data_files": "train.json"}]}, "expected 'chatml_dataset'"),
        ({"train": [{"name": "chatml_dataset"}]}, "data_files is None; expected the path"),
        ({"train": [{"data_files": []}]}, r"data_files is \[\]; expected the path"),
        ({"train": [{"data_files": "nope.json"}]}, r"data_files names what doesn't exist: looked for .*nope\.json\."),
        ({"train": [{"data_files": ["a.json", "train.json", "b.json"]}]}, r"don't exist: .*a\.json; for .*b\.json\.$"),
        ({"train": [{"data_files": "train.json", "image_folder": "nope"}]}, "image_folder names what doesn't"),
        ({"train": [{"data_files": "train.json", "image_folder": "val.json"}]}, "which isn't a folder"),
        ({"train": [{"data_files": "train.json", "chat_template": "no.json"}]}, "chat_template names what doesn't"),
    ],
)
def test_a_wrong_dataset_key_is_one_sentence(folder, key, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_dataset_key(key)
    assert "\n" not in str(raised.value)


def test_every_wrong_entry_can_be_collected(folder):
    problems = []
    key = {"train": [{"data_files": "no.json"}, {"data_files": "train.json"}], "eval": [{"name": "x"}]}
    entries = parse_dataset_key(key, problems=problems)
    assert len(entries["train"]) == 1 and entries["eval"] == []
    assert ["dataset.train[0].data_files" in str(problems[0]), "dataset.eval[0].name" in str(problems[1])] == [True] * 2
