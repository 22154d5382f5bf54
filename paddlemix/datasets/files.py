"""Data files: where every row is, and the ``dataset`` key of the configuration that names them.

A file is a JSON array or JSON lines. It is read once to find where each row begins and ends; a row is parsed when it
is asked for, so a file of a million rows costs 24 bytes per row in memory, in this process and in each worker.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from paddlemix.errors import UserError

__all__ = ["DatasetEntry", "Problem", "RowFile", "nearest", "parse_dataset_key"]

DATASET_NAMES = ("chatml_dataset",)
SPLITS = ("train", "eval")
ENTRY_KEYS = ("name", "data_files", "chat_template", "image_folder")

_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_SPACE = re.compile(r"[ \t\n\r]*")


class Problem(NamedTuple):
    """What is wrong, and where: ``file:line``, with the row's number in a JSON array; "" if the message says it."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class RowFile:
    """The rows of one data file, parsed one by one on demand.

    Args:
        path: a JSON array of rows or one row per line, UTF-8 with or without a byte order mark; blank lines are skipped.
        key: the setting that names it, for errors.

    Attributes:
        path (Path): as given.
        lines (np.ndarray [N]): the line on which each row begins, from 1.
        is_array (bool): a JSON array, so that several rows may share a line and ``where`` adds the row's number.
        problems (list of Problem): what stops the reading of a JSON array halfway; the rows before it are there.

    Raises:
        UserError: the file is missing, isn't text in UTF-8, or is neither form.
    """

    def __init__(self, path: Union[str, Path], key: str = "data_files"):
        self.path, self.key = Path(path), key
        self.problems: List[Problem] = []
        data = self._read_bytes()
        begin = len(_UTF8_BOM) if data.startswith(_UTF8_BOM) else 0
        # One character per byte: JSON's own marks are ASCII, so rows begin and end at the same offsets as in the bytes.
        text = data.decode("latin-1")
        first = _SPACE.match(text, begin).end()
        if first == len(text):
            raise UserError(f"{self.path} is empty; expected a JSON array of rows or one JSON row per line.")
        self.is_array = text[first] == "["
        if self.is_array:
            spans = self._array_spans(text, first)
        else:
            spans = self._line_spans(data, begin)
            self._refuse_single_object(text, first, spans)
        table = np.array(spans, dtype=np.int64).reshape(-1, 3)
        self._starts, self._ends, self.lines = (np.ascontiguousarray(column) for column in table.T)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        """Row ``index`` as JSON gives it.

        Raises:
            UserError: it isn't JSON, named with file and line.
        """
        try:
            return self.read(index)
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from None

    def read(self, index: int) -> Any:
        """Row ``index``; the error of a bad one doesn't name file and line."""
        with open(self.path, "rb") as file:
            file.seek(self._starts[index])
            data = file.read(self._ends[index] - self._starts[index])
        try:
            return json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"the row isn't UTF-8 ({error.reason}); save the file as UTF-8.") from None
        except json.JSONDecodeError as error:
            if error.doc[error.pos :].strip() == ",":
                raise UserError(
                    f"a comma after the row, at column {error.pos + 1}; one row per line has none: remove it, or make the "
                    "file an array in [ ]."
                ) from None
            raise UserError(f"not valid JSON: {_lower(error.msg)} at column {error.pos + 1}.") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"not valid JSON: {_unread(error)}.") from None

    def where(self, index: int) -> str:
        """``file:line`` of a row; in a JSON array also its number, from 1, since several rows may share a line."""
        return f"{self.path}:{self.lines[index]}" + (f" (row {index + 1})" if self.is_array else "")

    def _read_bytes(self) -> bytes:
        if self.path.is_dir():
            raise UserError(f"{self.key} names {self.path}, which is a folder; expected a .json or .jsonl file.")
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{self.key} names {self.path.absolute()}, which doesn't exist.") from None
        except OSError as error:
            raise UserError(f"{self.key} names {self.path}, which can't be read: {error.strerror}.") from None
        if data.startswith(_UTF16_BOMS):
            raise UserError(f"{self.path} is UTF-16 text; save it as UTF-8.")
        if b"\0" in data[:4096]:
            raise UserError(f"{self.path} is a binary file; expected JSON text: an array of rows, or one row per line.")
        return data

    def _array_spans(self, text: str, first: int) -> List[Tuple[int, int, int]]:
        """(start, end, line) of each element of the array that opens at ``first``; stops at the first bad mark."""
        spans = []
        decode = json.JSONDecoder().raw_decode
        line, counted = 1, 0
        position = _SPACE.match(text, first + 1).end()
        if text[position : position + 1] == "]":
            raise UserError(f"{self.path} is an empty JSON array; expected at least one row.")
        while True:
            line, counted = line + text.count("\n", counted, position), position
            try:
                _, end = decode(text, position)
            except json.JSONDecodeError as error:
                self._stop(text, error.pos, len(spans), _lower(error.msg))
                return spans
            except (ValueError, RecursionError) as error:
                self._stop(text, position, len(spans), _unread(error))
                return spans
            spans.append((position, end, line))
            position = _SPACE.match(text, end).end()
            mark = text[position : position + 1]
            if mark == "]":
                break
            if mark != ",":
                found = f"found {mark!r}" if mark else "the file ends"
                self._stop(text, position, len(spans), f"expected ',' or ']' after a row, {found}")
                return spans
            position = _SPACE.match(text, position + 1).end()
            if text[position : position + 1] == "]":
                self._stop(text, position, len(spans), "a comma with no row after it")
                return spans
        rest = _SPACE.match(text, position + 1).end()
        if rest != len(text):
            self._stop(text, rest, len(spans), "text after the end of the array")
        return spans

    def _stop(self, text: str, position: int, done: int, message: str) -> None:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        self.problems.append(
            Problem(
                f"{self.path}:{line} (row {done + 1})",
                f"not valid JSON: {message}, at column {column}; nothing after this can be read.",
            )
        )

    @staticmethod
    def _line_spans(data: bytes, begin: int) -> List[Tuple[int, int, int]]:
        newlines = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n"))
        starts = np.concatenate([[begin], newlines + 1]).tolist()
        ends = np.concatenate([newlines, [len(data)]]).tolist()
        return [
            (start, end, number)
            for number, (start, end) in enumerate(zip(starts, ends), 1)
            if data[start:end].strip(b" \t\r")
        ]

    def _refuse_single_object(self, text: str, first: int, spans: Sequence[Tuple[int, int, int]]) -> None:
        """One object over several lines is neither form; says where in it the rows seem to be."""
        start, end, _ = spans[0]
        try:
            json.loads(text[start:end])
            return  # the first line is a whole row
        except (ValueError, RecursionError):
            pass
        try:
            value, value_end = json.JSONDecoder().raw_decode(text, first)
        except (ValueError, RecursionError):
            return  # JSON lines whose first line is bad: reported with the other rows
        if value_end <= end:
            return  # so is something behind a row
        lists = [key for key, held in value.items() if isinstance(held, list)] if isinstance(value, dict) else []
        hint = f"; move the list under {lists[0]!r} to the top level" if lists else ""
        raise UserError(
            f"{self.path} holds a JSON value that spans several lines; expected a JSON array of rows or one row per "
            f"line{hint}."
        )


@dataclass(frozen=True)
class DatasetEntry:
    """One entry of the ``dataset`` key: files that share a chat template and a folder of pictures."""

    data_files: Tuple[Path, ...]
    name: str = DATASET_NAMES[0]
    chat_template: Optional[Path] = None
    image_folder: Optional[Path] = None


def parse_dataset_key(
    value: Any, config_folder: Union[str, Path, None] = None, problems: Optional[List[Problem]] = None
) -> Dict[str, List[DatasetEntry]]:
    """The ``dataset`` key of the configuration, checked: ``{"train": [entries], "eval": [entries]}``.

    Args:
        value: ``{"train": [{"name": "chatml_dataset", "data_files": "train.json", …}, …], "eval": […]}``;
            ``data_files`` may be a list, and a split may be one entry instead of a list.
        config_folder: paths are looked for in the working directory, then in this folder.
        problems: what is wrong is put here, and the entry left out, instead of an error.

    Raises:
        UserError: a key, name or type that isn't known (the nearest valid one is named), or a path that isn't there.
    """
    if not isinstance(value, dict):
        raise UserError(f'dataset is {value!r}; expected {{"train": [{{"data_files": "train.json"}}], "eval": [...]}}.')
    for split in value:
        if split not in SPLITS:
            raise UserError(f"dataset has the key {split!r}; expected {nearest(split, SPLITS)}.")
    folders = [Path()] + ([Path(config_folder)] if config_folder else [])
    entries: Dict[str, List[DatasetEntry]] = {}
    for split in SPLITS:
        listed = value.get(split) or []
        listed = [listed] if isinstance(listed, dict) else listed
        if not isinstance(listed, list):
            raise UserError(f"dataset.{split} is {listed!r}; expected a list of entries with data_files.")
        entries[split] = []
        for number, entry in enumerate(listed):
            try:
                entries[split].append(_parse_entry(f"dataset.{split}[{number}]", entry, folders))
            except UserError as error:
                if problems is None:
                    raise
                problems.append(Problem("", str(error)))
    return entries


def _parse_entry(place: str, entry: Any, folders: Sequence[Path]) -> DatasetEntry:
    if not isinstance(entry, dict):
        raise UserError(f'{place} is {entry!r}; expected an object such as {{"data_files": "train.json"}}.')
    for key in entry:
        if key not in ENTRY_KEYS:
            raise UserError(f"{place} has the key {key!r}; expected {nearest(key, ENTRY_KEYS)}.")
    name = entry.get("name", DATASET_NAMES[0])
    if name not in DATASET_NAMES:
        raise UserError(f"{place}.name is {name!r}; expected {nearest(name, DATASET_NAMES)}.")
    files = entry.get("data_files")
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not files or not all(isinstance(file, str) and file for file in files):
        raise UserError(
            f"{place}.data_files is {entry.get('data_files')!r}; expected the path of a file, or a list of them."
        )

    def located(key: str, paths: List[Any]) -> List[Path]:
        found, missing = [], []
        for path in paths:
            if not isinstance(path, str) or not path:
                raise UserError(f"{place}.{key} is {path!r}; expected a path.")
            places = [folder / os.path.expanduser(path) for folder in folders]
            existing = [candidate for candidate in places if os.path.exists(candidate)]
            found += existing[:1]
            missing += [] if existing else [" and ".join(dict.fromkeys(str(p.absolute()) for p in places))]
        if missing:
            exist = "don't exist" if len(missing) > 1 else "doesn't exist"
            raise UserError(f"{place}.{key} names what {exist}: looked for {'; for '.join(missing)}.")
        return found

    folder = entry.get("image_folder")
    folder = located("image_folder", [folder])[0] if folder is not None else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"{place}.image_folder names {folder}, which isn't a folder.")
    template = entry.get("chat_template")
    return DatasetEntry(
        data_files=tuple(located("data_files", files)),
        name=name,
        chat_template=located("chat_template", [template])[0] if template is not None else None,
        image_folder=folder,
    )


def nearest(word: Any, known: Iterable[str]) -> str:
    """The known words for an error's "expected …", the nearest to ``word`` first.

    >>> nearest("data_file", ["name", "data_files"])
    "'data_files' (the nearest) or one of 'name'"
    """
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    others = ", ".join(repr(name) for name in known if name not in close)
    if not close:
        return f"one of {others}" if len(known) > 1 else others
    return f"{close[0]!r} (the nearest)" + (f" or one of {others}" if others else "")


def _unread(error: Exception) -> str:
    """What Python's reader refuses, though it is JSON."""
    return "lists or objects nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
