"""Rows of data files -> training samples, with pictures opened when a sample is asked for.

``RowTable`` joins the files and examines a row without the model; ``SupervisedDataset`` examines all rows once, leaves
out those that keep no label, and knows the length of each sample before any picture is decoded.
"""

import logging
import os
import re
import stat
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from paddle.io import Dataset
from PIL import Image
from tqdm import tqdm

from paddlemix.datasets.files import DatasetEntry, Problem, RowFile
from paddlemix.datasets.parallel import map_rows
from paddlemix.datasets.samplers import Unlabelled
from paddlemix.errors import UserError
from paddlemix.models.llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from paddlemix.models.llava.conversation import get_template
from paddlemix.processors.chat_template import load_chat_template
from paddlemix.processors.images import load_image, shorten
from paddlemix.processors.labels import truncate_rounds
from paddlemix.processors.rows import ImageCountError, parse_row, row_format

__all__ = ["RowReport", "RowTable", "SupervisedDataset", "image_size"]

logger = logging.getLogger("paddlemix.datasets.supervised")

PROBLEM_KINDS = ("row", "image_count", "picture")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|(data|file):", re.IGNORECASE)  # what load_image takes for one
_ORIENTATION = 0x0112  # EXIF's tag
_TURNED = (5, 6, 7, 8)  # its values that swap width and height


class RowReport(NamedTuple):
    """What one row is to the training.

    Attributes:
        format: one of ``rows.FORMATS``; "" if it has none.
        text_tokens, image_tokens: of the whole row.
        length: tokens of the sample, after the cut at ``max_length``; 0 if nothing is left.
        supervised: tokens of it that a loss is taken at; with none the row is left out.
        pictures: in the sample.
        answers, answers_cut: in the sample, and in the rounds that were cut off.
        cut: rounds were cut off.
        problems: (kind, sentence) of everything that keeps it from being a sample; kinds are ``PROBLEM_KINDS``.
    """

    format: str = ""
    text_tokens: int = 0
    image_tokens: int = 0
    length: int = 0
    supervised: int = 0
    pictures: int = 0
    answers: int = 0
    answers_cut: int = 0
    cut: bool = False
    problems: Tuple[Tuple[str, str], ...] = ()


class RowTable:
    """The rows of several entries, joined in their order.

    Args:
        entries: see :func:`files.parse_dataset_key`.
        processor: a LlavaProcessor; its tokenizer and config are used, no weights.
        max_length: samples are cut after the last whole round that fits.
        template: name of a conversation template for entries that have no ``chat_template``; default the checkpoint's.

    Attributes:
        problems (list of Problem): files and chat templates that can't be read, or not to their end. What can be
            read is in the table.
    """

    def __init__(
        self, entries: Sequence[DatasetEntry], processor: Any, max_length: int, template: Optional[str] = None
    ):
        self.processor = processor
        self.max_length = max_length
        self.entries = list(entries)
        self.templates: List[Any] = []
        self.files: List[RowFile] = []
        self.problems: List[Problem] = []
        self._entry_of_file: List[int] = []
        for number, entry in enumerate(self.entries):
            self.templates.append(self._attempt(load_chat_template, entry.chat_template) or template)
            for path in entry.data_files:
                file = self._attempt(RowFile, path)
                if file is not None:
                    self.files.append(file)
                    self.problems += file.problems
                    self._entry_of_file.append(number)
        self._ends = np.cumsum([len(file) for file in self.files], dtype=np.int64)

    def _attempt(self, read: Callable[[Path], Any], path: Optional[Path]) -> Any:
        """``read(path)``; None if there is no path, or if it fails, which is noted."""
        try:
            return read(path) if path is not None else None
        except UserError as error:
            self.problems.append(Problem("", str(error)))
            return None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> Tuple[int, int]:
        """(number of the file, number of the row in it)"""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, int(index - (self._ends[file - 1] if file else 0))

    def source(self, index: int) -> Tuple[Path, int]:
        """The file of a row, and its number in it, from 0."""
        file, row = self._place(index)
        return self.files[file].path, row

    def where(self, index: int) -> str:
        """``file:line`` of a row."""
        file, row = self._place(index)
        return self.files[file].where(row)

    def template(self, index: int) -> Any:
        """The conversation template of a row: an object that renders, a name, or None for the checkpoint's."""
        return self.templates[self._entry_of_file[self._place(index)[0]]]

    def conversation(self, index: int) -> Tuple[List[Dict[str, str]], List[Any]]:
        """Messages of a row, and its pictures as paths that exist as given, or URLs.

        Raises:
            UserError: the row is malformed, named with file and line.
        """
        try:
            return self._conversation(index)[1:]
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from None

    def _conversation(self, index: int) -> Tuple[str, List[Dict[str, str]], List[Any]]:
        number, row = self._place(index)
        file, entry = self.files[number], self.entries[self._entry_of_file[number]]
        value = file.read(row)
        messages, images = parse_row(value)
        folders = [folder for folder in (entry.image_folder, file.path.parent, Path()) if folder is not None]
        return row_format(value), messages, [resolve_image(image, folders) for image in images]

    def sample(self, index: int) -> Dict[str, Any]:
        """The training sample of a row, its pictures opened and preprocessed.

        Returns:
            input_ids, labels (lists of T ints), pixel_values (float32 [n, 3, H, W] or None), image_sizes.

        Raises:
            UserError: the row or a picture of it can't be used, named with file and line.
        """
        try:
            _, messages, images = self._conversation(index)
            row = {"messages": messages, "images": images}
            return self.processor.encode_conversation(row, template=self.template(index), max_length=self.max_length)
        except UserError as error:
            raise UserError(f"{self.where(index)}: {error}") from None

    def examine(self, index: int, open_pictures: bool = False) -> RowReport:
        """What a row is to the training; raises nothing.

        Args:
            open_pictures: decode every picture, so that a corrupt one is found. Otherwise a file only has to be there,
                and its header is read where the number of tokens depends on the size.
        """
        kind = ""
        try:
            number, row = self._place(index)
            kind = row_format(self.files[number].read(row))
            _, messages, images = self._conversation(index)
        except ImageCountError as error:
            return RowReport(kind, problems=(("image_count", str(error)),))
        except UserError as error:
            return RowReport(kind, problems=(("row", str(error)),))
        sizes, problems = [], []
        for image in images:
            try:
                sizes.append(self._size(image, open_pictures))
            except UserError as error:
                problems.append(("picture", str(error)))
        if problems:
            return RowReport(kind, problems=tuple(problems))
        try:
            whole = self.processor.encode_messages(messages, sizes, self.template(index))
        except UserError as error:
            return RowReport(kind, problems=(("row", str(error)),))
        kept = truncate_rounds(whole, self.max_length)
        image_tokens = sum(token == IMAGE_TOKEN_INDEX for token in whole.input_ids)
        cut = len(kept.input_ids) < len(whole.input_ids)
        return RowReport(
            kind,
            text_tokens=len(whole.input_ids) - image_tokens,
            image_tokens=image_tokens,
            length=len(kept.input_ids),
            supervised=sum(label != IGNORE_INDEX for label in kept.labels[1:]),
            pictures=self.processor.count_images(kept.input_ids, sizes) if cut else len(sizes),
            answers=len(kept.round_ends),
            answers_cut=len(whole.round_ends) - len(kept.round_ends),
            cut=cut,
        )

    def _size(self, image: Any, open_pictures: bool) -> Tuple[int, int]:
        config = self.processor.config
        if config.vision is None:
            raise UserError("The model takes text only (its config has no vision_config), but the row has a picture.")
        if open_pictures:
            size = load_image(image).size
            self.processor.image_processor.check(size, shorten(str(image)))
            return size
        if config.image_aspect_ratio == "anyres":
            return image_size(image)
        if not _may_be_a_picture(image):
            load_image(image)  # says what is wrong with it
        return config.vision.image_size, config.vision.image_size  # whatever its size, as many tokens


class SupervisedDataset(Dataset):
    """Training samples of the rows of several entries; map style.

    All rows are examined once, in parallel. Rows that keep no label after the cut at ``max_length``, or have no answer,
    are left out and counted.

    Args:
        entries, processor, max_length, template: see :class:`RowTable`.
        num_workers: processes that examine rows; None is one per core.
        progress: show a bar meanwhile.

    Attributes:
        lengths (list of int): tokens of each sample, pictures included; positive where it has a picture, negative
            where it is text only, as ``group_by_modality_length`` wants it.
        answers (list of int): answers of each sample, those in rounds that were cut off not counted.
        counts (Counter): rows, samples, cut, answers_cut, dropped, and tokens: text, image, supervised.

    Raises:
        UserError: a row that is no sample (missing picture, malformed, …), or no sample at all.
    """

    def __init__(
        self,
        entries: Sequence[DatasetEntry],
        processor: Any,
        max_length: int,
        template: Optional[str] = None,
        num_workers: Optional[int] = None,
        progress: bool = False,
    ):
        super().__init__()
        self.table = RowTable(entries, processor, max_length, template)
        if self.table.problems:
            raise UserError(str(self.table.problems[0]))
        kept, lengths, answers, bad = [], [], [], []
        self.counts: Counter = Counter(rows=len(self.table))
        reports = map_rows(self.table.examine, len(self.table), num_workers)
        for index, report in enumerate(
            tqdm(reports, "reading rows", len(self.table), disable=not progress, unit="row")
        ):
            if report.problems:
                bad.append((index, report.problems[0][1]))
            elif not report.supervised:
                self.counts["dropped"] += 1
            else:
                kept.append(index)
                lengths.append(report.length if report.pictures else -report.length)
                answers.append(report.answers)
                self.counts["cut"] += report.cut
                self.counts["answers_cut"] += report.answers_cut
                self.counts["supervised"] += report.supervised
                self.counts["text"] += report.text_tokens
                self.counts["image"] += report.image_tokens
        if bad:
            index, message = bad[0]
            more = f" ({len(bad) - 1} more rows can't be used; check_dataset.py lists all)" if len(bad) > 1 else ""
            raise UserError(f"{self.table.where(index)}: {message}{more}")
        self.counts["samples"] = len(kept)
        if not kept:
            files = ", ".join(str(file.path) for file in self.table.files) or "no file"
            raise UserError(
                f"No row of {files} keeps a token to learn with max_length {max_length}; raise max_length, or look at "
                "the rows with check_dataset.py."
            )
        if self.counts["dropped"]:
            logger.warning(
                "%d of %d rows are left out: no answer in them, or none within max_length %d.",
                self.counts["dropped"],
                len(self.table),
                max_length,
            )
        self._rows = np.array(kept, dtype=np.int64)
        self.lengths: List[int] = lengths
        self.answers: List[int] = answers

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """A sample; one asked for with an :class:`Unlabelled` index has no labels.

        Returns:
            input_ids, labels (lists of T ints), pixel_values (float32 [n, 3, H, W] or None), image_sizes (list of
            (width, height)).
        """
        sample = self.table.sample(self._rows[index])
        if isinstance(index, Unlabelled):
            sample["labels"] = [IGNORE_INDEX] * len(sample["labels"])
        return sample

    def where(self, index: int) -> str:
        """``file:line`` of a sample's row."""
        return self.table.where(self._rows[index])

    def source(self, index: int) -> Tuple[Path, int]:
        """The data file of a sample, and the number of its row in it, from 0."""
        return self.table.source(self._rows[index])

    def template(self, index: int) -> Any:
        """What a sample's conversation is rendered with; an object that renders."""
        given = self.table.template(self._rows[index])
        return self.table.processor.template if given is None else get_template(given)

    def conversation(self, index: int) -> Tuple[List[Dict[str, str]], List[Any]]:
        """The messages and pictures (paths, URLs) of a sample's row, before any cut."""
        return self.table.conversation(self._rows[index])


def resolve_image(image: Any, folders: Sequence[Path]) -> Any:
    """A row's picture as it can be opened: URLs stay, a path is looked for in the folders in turn.

    If it is in none of them, the path in the first is returned, so that the error names where it should be; one that begins with
    a home directory (``~/``) in that.
    """
    if not isinstance(image, (str, os.PathLike)) or (isinstance(image, str) and _URL.match(image)):
        return image
    places = [folder / image for folder in folders]
    home = [Path(os.path.expanduser(image))] if str(image).startswith("~") else []
    found = next((place for place in places if os.path.exists(place)), None)
    return found or (home[0] if home and home[0].is_absolute() else places[0])


def _may_be_a_picture(image: Any) -> bool:
    """Whether nothing that costs no reading speaks against it: a file with something in it, an address of the web, or data."""
    if isinstance(image, Path):
        try:
            found = os.stat(image)
        except (OSError, ValueError):  # a name with a NUL, or that can't be encoded
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size > 0
    return isinstance(image, str) and re.match("https?://|data:", image, re.IGNORECASE) is not None


def image_size(image: Union[str, Path]) -> Tuple[int, int]:
    """(width, height) of a picture as it is seen, turned by its EXIF; from the file's header where that says it.

    Raises:
        UserError: there is no such picture or it isn't one.
    """
    if isinstance(image, Path):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(image) as opened:
                    if opened.format in ("GIF", "BMP") or (
                        opened.format == "PNG" and not _png_has_notes(opened, image)
                    ):
                        return opened.size
                    if opened.format in ("JPEG", "WEBP"):
                        return opened.size[::-1] if opened.getexif().get(_ORIENTATION) in _TURNED else opened.size
        except Exception:  # whatever a decoder raises at bad bytes; load_image says it in one sentence
            logger.debug("header of %s", image, exc_info=True)
    return load_image(image).size


def _png_has_notes(image: Image.Image, path: Path) -> bool:
    """Whether something in a PNG may turn it: EXIF or XMP, which may also stand behind the pixels."""
    if not {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}.isdisjoint(image.info):
        return True
    behind_pixels = False
    with open(path, "rb") as file:
        file.seek(8)  # the signature
        while True:
            head = file.read(8)
            if len(head) < 8:
                return False
            behind_pixels = behind_pixels or head[4:] == b"IDAT"
            if behind_pixels and head[4:] in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # the chunk and its checksum
