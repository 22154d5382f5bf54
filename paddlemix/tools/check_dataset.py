"""Dry run of a dataset, before any training:

    python paddlemix/tools/check_dataset.py CONFIG.json [--show N] [--num_workers N] [--max_listed N] [--key value …]

CONFIG.json is the configuration of ``supervised_finetune.py``, and ``--key value`` overrides a key as it does there.
Every row is read and every picture decoded, on all cores. The report counts rows by format, pictures, tokens, and what
is cut or left out at ``max_length``, with the lengths' distribution; each row that can't be used is named by file and
line. Of the model only config and tokenizer are opened.

The exit status is 0 if training on the data would be sound: all rows can be used, and some have tokens to learn.
"""

import argparse
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, TextIO, Tuple

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddlemix.errors import UserError
from paddlemix.tools.command_line import Parser, exit_status

logger = logging.getLogger("paddlemix.check_dataset")

BINS = 10  # rows of a histogram
BAR = 40  # characters of its longest bar
HEADINGS = {
    "row": "rows that can't be read",
    "image_count": "rows whose <image> and pictures differ in number",
    "picture": "pictures that are missing or corrupt",
}
GREEN, RESET = "\x1b[32m", "\x1b[0m"


class SplitReport(NamedTuple):
    """What was found in one split; ``rows`` (of the samples), ``cut``, ``dropped`` and ``unanswered`` are row numbers."""

    name: str
    table: Any
    formats: Counter
    text_tokens: List[int]
    image_tokens: List[int]
    lengths: List[int]
    rows: List[int]
    supervised: int
    pictures: int
    cut: List[int]
    dropped: List[int]
    unanswered: List[int]
    problems: Dict[str, List[str]]

    @property
    def samples(self) -> int:
        return len(self.lengths)


def examine_split(name: str, table: Any, num_workers: Optional[int]) -> SplitReport:
    """Examines all rows of a split, pictures included, with a progress bar on standard error."""
    from tqdm import tqdm

    from paddlemix.datasets.parallel import map_rows
    from paddlemix.datasets.supervised import PROBLEM_KINDS

    found = SplitReport(
        name, table, Counter(), [], [], [], [], 0, 0, [], [], [], {kind: [] for kind in ("file", *PROBLEM_KINDS)}
    )
    found.problems["file"] += map(str, table.problems)
    supervised = pictures = 0
    reports = map_rows(_OpenPictures(table), len(table), num_workers)
    for index, report in enumerate(tqdm(reports, name, len(table), unit="row")):
        found.formats[report.format or "none"] += 1
        for kind, message in report.problems:
            found.problems[kind].append(f"{table.where(index)}: {message}")
        if report.problems:
            continue
        found.text_tokens.append(report.text_tokens)
        found.image_tokens.append(report.image_tokens)
        if report.supervised:
            found.lengths.append(report.length if report.pictures else -report.length)
            found.rows.append(index)
            supervised += report.supervised
            pictures += report.pictures
            found.cut.extend([index] if report.cut else [])
        else:
            (found.dropped if report.cut else found.unanswered).append(index)
    return found._replace(supervised=supervised, pictures=pictures)


class _OpenPictures:
    """``table.examine`` with every picture decoded; a class, for a worker that isn't forked gets it pickled."""

    def __init__(self, table: Any):
        self.table = table

    def __call__(self, index: int) -> Any:
        return self.table.examine(index, open_pictures=True)


def describe(found: SplitReport, max_length: int, mixtoken: bool, max_listed: int) -> Iterator[str]:
    """The lines of the report on a split."""
    files = ", ".join(str(file.path) for file in found.table.files) or "no file"
    yield f"{found.name}: {len(found.table)} rows in {files}"
    formats = ", ".join(f"{kind} {count}" for kind, count in sorted(found.formats.items()))
    yield f"  formats       {formats or 'none'}"
    rows = sum(tokens > 0 for tokens in found.image_tokens)
    yield f"  pictures      {found.pictures} in the samples; {rows} rows with, {len(found.image_tokens) - rows} without"
    left_out = len(found.dropped) + len(found.unanswered)
    yield (
        f"  samples       {found.samples}, of which {len(found.cut)} cut at max_length {max_length}; {left_out} rows left "
        f"out, of which {len(found.dropped)} too long and {len(found.unanswered)} without an answer"
    )
    total = sum(map(abs, found.lengths))
    share = f" ({100 * found.supervised / total:.1f}% of the samples' {total})" if total else ""
    yield f"  tokens        text {sum(found.text_tokens)}, pictures {sum(found.image_tokens)}, to learn {found.supervised}{share}"
    if mixtoken and found.lengths:
        from paddlemix.datasets.packing import pack_lengths

        packs = pack_lengths([abs(length) for length in found.lengths], max_length)
        yield f"  mixtoken      {len(packs)} sequences, {100 * total / (len(packs) * max_length):.1f}% full"
    for title, values in (("text tokens", found.text_tokens), ("picture tokens", found.image_tokens)):
        yield from histogram(f"{title} of a row", values)
    both = [text + image for text, image in zip(found.text_tokens, found.image_tokens)]
    yield from histogram(f"all tokens of a row, before the cut at {max_length}", both)
    for title, rows in (
        ("cut after a whole round", found.cut),
        ("left out: the first round is too long", found.dropped),
        ("left out: no answer to learn", found.unanswered),
    ):
        yield from listing(title, map(found.table.where, rows[:max_listed]), len(rows))
    for kind, problems in found.problems.items():
        yield from listing(HEADINGS.get(kind, "files that can't be read"), problems[:max_listed], len(problems))


def listing(title: str, lines: Any, count: int) -> Iterator[str]:
    """A heading with the number of lines, and the lines; says how many were kept back."""
    if not count:
        return
    yield f"  {title}: {count}"
    shown = 0
    for line in lines:
        shown += 1
        yield f"    {line}"
    if shown < count:
        yield f"    … and {count - shown} more (--max_listed {count} lists all)"


def histogram(title: str, values: Sequence[int]) -> Iterator[str]:
    """Counts in bins of equal, round width, with a bar each.

    >>> [line.split() for line in histogram("tokens", [1, 2, 2, 4])][:2]
    [['tokens:', 'least', '1,', 'median', '2,', 'most', '4'], ['1', '████████████████████', '1']]
    """
    if not values:
        return
    ordered = sorted(values)
    yield f"  {title}: least {ordered[0]}, median {ordered[len(ordered) // 2]}, most {ordered[-1]}"
    span = ordered[-1] - ordered[0] + 1
    width = next(w for w in _round_numbers() if -(-span // w) <= BINS)
    first = ordered[0] - ordered[0] % width
    counts = Counter((value - first) // width for value in ordered)
    for bin_number in range((ordered[-1] - first) // width + 1):
        low = first + bin_number * width
        label = f"{low}" if width == 1 else f"{low}–{low + width - 1}"
        count = counts[bin_number]
        bar = "█" * -(-count * BAR // max(counts.values()))
        yield f"    {label:>10}  {bar} {count}"


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, …"""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def show(found: SplitReport, count: int, tokenizer: Any, colour: bool) -> Iterator[str]:
    """The first ``count`` samples as the model reads them; what is learned is green, or in ⟦ ⟧ without colours."""
    opening, closing = (GREEN, RESET) if colour else ("⟦", "⟧")
    shown = 0
    for index in range(len(found.table)):
        if shown == count:
            return
        report = found.table.examine(index, open_pictures=True)  # one that is corrupt is shown by the report instead
        if report.problems or not report.supervised:
            continue
        shown += 1
        sample = found.table.sample(index)
        yield (
            f"{found.name}, {found.table.where(index)}: {report.length} tokens, {report.supervised} to learn, "
            f"{report.pictures} picture(s)"
        )
        text = ""
        for learned, run in _runs(sample["input_ids"], sample["labels"]):
            words = _words(run, tokenizer)
            text += opening + words + closing if learned else words
        yield text
        yield ""


def _runs(input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[Tuple[bool, List[int]]]:
    """Stretches of tokens that are learned or not."""
    from paddlemix.models.llava.constants import IGNORE_INDEX

    run: List[int] = []
    learned = False
    for token, label in zip(input_ids, labels):
        if run and (label != IGNORE_INDEX) != learned:
            yield learned, run
            run = []
        learned = label != IGNORE_INDEX
        run.append(token)
    if run:
        yield learned, run


def _words(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ids; a picture is ``<image>`` with the number of its tokens."""
    from paddlemix.models.llava.constants import IMAGE_TOKEN_INDEX

    text, data, places = "", b"", 0
    for token in [*ids, None]:
        if places and token != IMAGE_TOKEN_INDEX:
            text, places = text + f"<image>×{places}", 0
        if token == IMAGE_TOKEN_INDEX:
            text, data, places = text + data.decode("utf-8", "replace"), b"", places + 1
        elif token is not None:
            data += tokenizer.token_bytes(token)
    return text + data.decode("utf-8", "replace")


def wants_colour(stream: TextIO) -> bool:
    """On a terminal, unless NO_COLOR is set (no-color.org) or the terminal is a dumb one."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def parse(argv: Optional[Sequence[str]]) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """This tool's own flags, and the settings of the training."""

    def number(text: str) -> int:
        if not text.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} was given, expected a whole number, 0 or more")
        return int(text)

    parser = Parser(
        prog="check_dataset.py",
        usage="%(prog)s CONFIG.json [--show N] [--num_workers N] [--max_listed N] [--key value ...]",
        description="Reads all rows and pictures of a fine-tuning configuration and says whether training is sound.",
        allow_abbrev=False,
    )
    parser.add_argument("--show", type=number, default=0, help="print the first N samples, what is learned in colour")
    parser.add_argument("--num_workers", type=number, default=None, help="processes that read rows [one per core]")
    parser.add_argument("--max_listed", type=number, default=1000, help="lines of each list at most [1000]")
    flags, rest = parser.parse_known_args(argv)
    if not rest or rest[0].startswith("--"):
        parser.error(f"the configuration file comes first, {parser.format_usage().strip()}")

    from paddlemix.trainer.arguments import read_settings

    flags.config = Path(rest[0])
    return flags, read_settings(rest)


def beyond_positions(found: SplitReport, config: Any) -> Optional[str]:
    """Says so if a sample has more tokens than the model has positions; training refuses it."""
    longest = max(map(abs, found.lengths), default=0)
    if longest <= config.max_position_embeddings or config.rope_scaling is not None:
        return None
    row = found.rows[[abs(length) for length in found.lengths].index(longest)]
    return (
        f"{found.table.where(row)}: the sample has {longest} tokens, but the model reads {config.max_position_embeddings} "
        "at most; set max_length to that."
    )


def less_than_a_step(samples: int, settings: Dict[str, Any]) -> Optional[str]:
    """Says so if so many samples give one process nothing to do; training refuses it."""
    from paddlemix.tools.supervised_finetune import check_batch

    default = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 1.0}
    default.update(dataloader_drop_last=False, max_steps=-1)
    plan = argparse.Namespace(**{key: settings.get(key, value) for key, value in default.items()})
    try:
        check_batch(plan, samples, ranks=1)
    except UserError as error:
        return str(error)
    return None


def untrained(found: SplitReport, settings: Dict[str, Any], max_length: int) -> Optional[str]:
    """Says so if the samples give the run no step, or nothing that it trains could learn from them; training refuses both."""
    from paddlemix.datasets.packing import pack_lengths
    from paddlemix.tools.supervised_finetune import ONLY_PICTURES_REACH

    if settings.get("tune_mm_mlp_adapter") and not found.pictures:
        return ONLY_PICTURES_REACH
    lengths = [abs(length) for length in found.lengths]
    samples = len(pack_lengths(lengths, max_length)) if settings.get("mixtoken") else found.samples
    return less_than_a_step(samples, settings)


def unanswerable(found: SplitReport, settings: Dict[str, Any]) -> Optional[str]:
    """Says so if the model is to be asked, and no sample has an answer with words; training refuses that."""
    evaluates = settings.get("do_eval", True) and settings.get("eval_with_do_generation")
    if not (evaluates or settings.get("do_predict")):
        return None
    for row in found.rows:
        messages, _ = found.table.conversation(row)
        if any(message["role"] == "assistant" and message["content"].strip() for message in messages):
            return None
    return "eval has no answer with words, which the model's own could be compared with (eval_with_do_generation, do_predict)."


def needed_splits(settings: Dict[str, Any]) -> List[str]:
    """The splits that the run reads, by the training arguments' own defaults."""
    from paddlemix.trainer.run_folder import trains

    training, predicts = trains(settings), settings.get("do_predict", False)
    evaluates = settings.get("do_eval", training and settings.get("evaluation_strategy", "no") != "no")
    return (["train"] if training else []) + (["eval"] if evaluates or predicts else [])


def check(flags: argparse.Namespace, settings: Dict[str, Any]) -> bool:
    """Prints the report; whether training would be sound."""
    from paddlemix.datasets.files import Problem, parse_dataset_key
    from paddlemix.datasets.supervised import RowTable
    from paddlemix.models.llava.conversation import get_template
    from paddlemix.models.llava.hub import resolve, resolve_small
    from paddlemix.processors.llava import LlavaProcessor
    from paddlemix.processors.tokenizer import load_tokenizer
    from paddlemix.tools.supervised_finetune import check_vocabulary, record_template

    wrong: List[Problem] = []
    entries = parse_dataset_key(settings["dataset"], flags.config.parent, wrong)
    for problem in wrong:
        print(f"problem: {problem}")
    if wrong and not any(entries.values()):
        return False  # before a model is fetched
    folder = resolve_small(settings["model_name_or_path"])
    adapter = resolve(settings["lora_path"], weights=False) if settings.get("lora_path") else None
    ratio = settings.get("image_aspect_ratio")
    processor = LlavaProcessor.from_pretrained(folder, image_aspect_ratio=ratio, adapter=adapter)
    if settings.get("text_model_name_or_path"):
        processor.tokenizer = load_tokenizer(resolve(settings["text_model_name_or_path"], weights=False))
        check_vocabulary(processor.tokenizer, processor.config)
    if settings.get("version"):
        get_template(settings["version"])
        processor.config.conversation_template = settings["version"]
        processor.chat_template = None
    max_length = settings.get("max_length", 2048)
    needed = needed_splits(settings)
    if "train" in needed:
        try:
            record_template(processor, entries["train"])  # rows without a template of their own then have the run's
        except UserError:
            logger.debug("a chat template can't be read; the split's report says so", exc_info=True)

    sound = not wrong
    for name in ("train", "eval"):
        if not entries[name]:
            if name in needed and not wrong:
                print(f"problem: do_{name} is on, but dataset.{name} names no file.")
                sound = False
            continue
        table = RowTable(entries[name], processor, max_length)
        found = examine_split(name, table, flags.num_workers)
        for line in describe(found, max_length, settings.get("mixtoken", False), flags.max_listed):
            print(line)
        if any(found.problems.values()):
            sound = False
        elif not found.samples:
            print(f"problem: no row of {name} keeps a token to learn with max_length {max_length}.")
            sound = False
        unfit = [beyond_positions(found, processor.config)]
        if name in needed and found.samples:
            unfit.append(untrained(found, settings, max_length) if name == "train" else unanswerable(found, settings))
        for problem in filter(None, unfit):
            print(f"problem: {problem}")
            sound = False
        for line in show(found, flags.show, processor.tokenizer, wants_colour(sys.stdout)):
            print(line)
    return sound


def main(argv: Optional[Sequence[str]] = None) -> int:
    from paddlemix.runtime import quiet_start

    quiet_start()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still gets the report

    def work() -> int:
        sound = check(*parse(argv))
        print("sound: training can start" if sound else "not sound: mend the problems above before training")
        return 0 if sound else 1

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
