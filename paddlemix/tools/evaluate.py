"""Scores a checkpoint's answers on a data file: VQA accuracy, boxes, captions, for each type of question.

    python paddlemix/tools/evaluate.py --model_name_or_path M --data_file test.json --output_file predictions.jsonl

The file is any that fine-tuning takes. Each assistant turn of a row is a question to the model, with the row's own answers
as the history; the answer is generated greedily. Two keys of a row are read besides (one entry per assistant turn; one
text as ``question_type`` is that of all):

    "question_type": "color"                       the line of the table in which the turn counts
    "facts": [["red circle", "blue star"], null]   phrases that a description should name; null: another score

How a turn is scored follows from its reference: by its facts where it has some (the share that is named), by overlap where
the reference is a box (right from an intersection over union of 0.5), else by exact match after the normalisation of the
VQA challenge.
"""

import argparse
import json
import logging
import os
import sys
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddlemix.errors import UserError, naming
from paddlemix.tools.command_line import Parser, choose_dtype, exit_status

logger = logging.getLogger("paddlemix.evaluate")

IOU_THRESHOLD = 0.5
UNTYPED = "all"  # the question type of a row that names none
METRICS = {"exact": "exact match", "box": f"IoU >= {IOU_THRESHOLD}", "facts": "facts named"}


class Turn(NamedTuple):
    """One question to the model: the messages up to it, the pictures in them as they can be opened, what is right, and
    where in the data file it stands."""

    row: int
    turn: int
    messages: List[Dict[str, str]]
    images: List[Any]
    reference: str
    question_type: str
    facts: Optional[List[str]]
    where: str = ""


def read_turns(data_file: str, limit: Optional[int] = None, image_folder: Optional[str] = None) -> List[Turn]:
    """Every assistant turn of the first ``limit`` rows; pictures are looked for where fine-tuning looks for them: in
    ``image_folder``, beside the file, in the working directory.

    Raises:
        UserError: a row that can't be read, or a picture that isn't there; with the row's place in the file.
    """
    from paddlemix.datasets.files import RowFile
    from paddlemix.datasets.supervised import resolve_image
    from paddlemix.models.llava.constants import IMAGE_TOKEN
    from paddlemix.processors.rows import parse_row

    data_file = os.path.expanduser(data_file)
    rows = RowFile(data_file, key="--data_file")
    folders = [Path(os.path.expanduser(image_folder))] if image_folder else []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--image_folder is {image_folder}, and there is no such folder.")
    folders += [Path(data_file).parent, Path()]
    turns: List[Turn] = []
    for number in range(len(rows) if limit is None else min(limit, len(rows))):
        row = rows[number]
        try:
            messages, images = parse_row(row)
            images = [resolve_image(image, folders) for image in images]
            for image in images:
                if isinstance(image, Path) and not image.is_file():
                    raise UserError(f"{image} doesn't exist; expected a picture.")
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            types = _per_turn(row, "question_type", len(answers), str, UNTYPED)
            facts = _per_turn(row, "facts", len(answers), list, None)
        except UserError as error:
            raise UserError(f"{rows.where(number)}: {error}") from None
        where = rows.where(number)
        for order, position in enumerate(answers):
            if not messages[position]["content"].strip() and not facts[order]:
                continue  # nothing that an answer could be held against; fine-tuning's evaluation leaves it out too
            history = messages[:position]
            seen = sum(message["content"].count(IMAGE_TOKEN) for message in history)
            turns.append(
                Turn(
                    *(number, order, history, images[:seen]),
                    *(messages[position]["content"], types[order], facts[order], where),
                )
            )
    for problem in rows.problems:
        raise UserError(str(problem))
    if not turns:
        raise UserError(f"{data_file} has no assistant turn with words, so there is nothing to evaluate.")
    return turns


def _per_turn(row: Dict[str, Any], key: str, count: int, kind: type, default: Any) -> List[Any]:
    """The row's value of ``key`` for each of ``count`` turns."""
    value = row.get(key, default)
    if value is None or isinstance(value, str):
        value = [value] * count
    fits = isinstance(value, list) and len(value) == count and all(v is None or isinstance(v, kind) for v in value)
    if fits and kind is list:
        fits = all(isinstance(fact, str) for facts in value if facts for fact in facts)
    if not fits:
        raise UserError(f"{key!r} is {value!r:.60}; expected one entry for each of the {count} assistant turn(s).")
    return [default if entry is None else entry for entry in value]


def score(turn: Turn, prediction: str) -> Tuple[str, float]:
    """(metric, score in 0..1) of an answer; the metric is a key of ``METRICS``."""
    from paddlemix.evaluation.captions import fact_recall
    from paddlemix.evaluation.grounding import find_box, iou, is_box
    from paddlemix.evaluation.vqa import exact_match

    if turn.facts:
        return "facts", fact_recall(prediction, turn.facts)
    if is_box(turn.reference):
        return "box", float(iou(find_box(prediction), find_box(turn.reference)) >= IOU_THRESHOLD)
    return "exact", float(exact_match(prediction, turn.reference))


def predict(
    model,
    processor,
    turns: Sequence[Turn],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    conv_mode: Optional[str] = None,
    blank_image: bool = False,
    progress: bool = True,
) -> Iterator[Tuple[int, str]]:
    """Yields (index in ``turns``, the model's answer), a batch at a time. What the model reads is what training shows it
    before the answer.

    Args:
        conv_mode: template name; default the checkpoint's.
        blank_image: shows a gray picture of the same size in place of each, to see what is answered without seeing.
        progress: show a progress bar on standard error.

    Raises:
        UserError: a picture that can't be opened, or a row that the template has no form for; with its place in the file.
    """
    from PIL import Image
    from tqdm import tqdm

    from paddlemix.evaluation.answers import answer_prompts
    from paddlemix.models.llava.conversation import get_template
    from paddlemix.processors.images import load_image

    @lru_cache(maxsize=64)
    def picture(source: Any) -> Image.Image:
        image = load_image(source)
        return Image.new("RGB", image.size, (128, 128, 128)) if blank_image else image

    template = get_template(conv_mode) if conv_mode else processor.template
    lengths = [sum(len(message["content"]) for message in turn.messages) for turn in turns]
    # a picture's questions side by side, as they share a pass over it; else prompts of like length
    order = sorted(range(len(turns)), key=lambda i: (len(turns[i].images), str(turns[i].images[-1:]), lengths[i]))
    limit, beyond = model.config.max_position_embeddings, 0
    with tqdm(total=len(turns), unit="answer", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = []
            for i in chosen:
                turn = turns[i]
                try:
                    images = [picture(source) for source in turn.images]
                    messages = [*turn.messages, {"role": "assistant", "content": turn.reference}]
                    whole = processor.encode_messages(messages, [image.size for image in images], template)
                except UserError as error:
                    raise UserError(f"{turn.where}: {error}") from None
                ids = whole.prompt(turn.turn)
                beyond += len(ids) + max_new_tokens > limit and not model.config.rope_scaling
                batch.append((ids, images))
            stops = [template.stop_strings] * len(batch)
            yield from zip(chosen, answer_prompts(model, processor, batch, max_new_tokens, stops))
            bar.update(len(chosen))
    if beyond:
        logger.warning(
            "%d of %d prompts and answers may be longer than the %d positions of the model, beyond which it is of little use.",
            *(beyond, len(turns), limit),
        )


def evaluate(turns: Sequence[Turn], predictions: Dict[int, str]) -> Dict[str, Dict[str, Any]]:
    """Scores by type of question: ``{"color": {"metric": "exact", "count": 500, "score": 0.97}, …}``.

    A type that mixes metrics has one line for each, ``type (metric)``.
    """
    scores: Dict[Tuple[str, str], List[float]] = defaultdict(list)
    for index, prediction in predictions.items():
        metric, value = score(turns[index], prediction)
        scores[turns[index].question_type, metric].append(value)
    kinds = [kind for kind, _ in scores]
    return {
        kind if kinds.count(kind) == 1 else f"{kind} ({metric})": {
            "metric": metric,
            "count": len(values),
            "score": sum(values) / len(values),
        }
        for (kind, metric), values in sorted(scores.items())
    }


def table(figures: Dict[str, Dict[str, Any]]) -> str:
    """The figures as text, one line per type, and a line for each metric over all types."""
    total: Dict[str, List[float]] = defaultdict(lambda: [0, 0.0])
    lines = [f"{'question type':24} {'metric':12} {'turns':>7} {'score':>8}"]
    for kind, figure in figures.items():
        total[figure["metric"]][0] += figure["count"]
        total[figure["metric"]][1] += figure["count"] * figure["score"]
        lines.append(f"{kind:24} {METRICS[figure['metric']]:12} {figure['count']:7} {100 * figure['score']:7.2f}%")
    untyped = [kind for kind in figures if kind == UNTYPED or kind.startswith(f"{UNTYPED} (")]
    if len(figures) > max(1, len(untyped)):
        for metric, (count, points) in total.items():
            lines.append(
                f"{'all types' if untyped else 'all':24} {METRICS[metric]:12} {int(count):7} {100 * points / count:7.2f}%"
            )
    return "\n".join(lines)


def save_predictions(path: Path, turns: Sequence[Turn], predictions: Dict[int, str]) -> None:
    """JSON lines in the data file's order: row, turn, question, reference, prediction, question_type, metric, score."""
    with naming(path), open(path, "w", encoding="utf-8") as file:
        for index in sorted(predictions):
            turn, prediction = turns[index], predictions[index]
            metric, value = score(turn, prediction)
            record = {
                "row": turn.row,
                "turn": turn.turn,
                "question": turn.messages[-1]["content"],
                "reference": turn.reference,
                "prediction": prediction,
                "question_type": turn.question_type,
                "metric": metric,
                "score": value,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def parse(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="folder or name of the checkpoint")
    parser.add_argument("--data_file", required=True, help="JSON array or JSON lines, as fine-tuning takes it")
    parser.add_argument("--image_folder", help="where pictures are looked for first [the data file's folder]")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--limit", type=int, help="rows to evaluate, from the first [all]")
    parser.add_argument("--output_file", help="where to write the predictions, as JSON lines")
    parser.add_argument("--conv_mode", help="conversation template [the checkpoint's]")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 [the best of the device; on a CPU float32]")
    parser.add_argument("--blank_image", action="store_true", help="show a gray picture in place of each")
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "max_new_tokens", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; expected a number from 1.")
    return arguments


def run(arguments: argparse.Namespace) -> Dict[str, Dict[str, Any]]:
    """Reads, predicts, prints the table, saves; returns the figures of :func:`evaluate`."""
    turns = read_turns(arguments.data_file, arguments.limit, arguments.image_folder)
    if arguments.output_file:
        output = Path(os.path.expanduser(arguments.output_file)).absolute()
        if output.is_dir():
            raise UserError(f"--output_file is {arguments.output_file}, which is a folder; expected a file.")
        if not output.parent.is_dir():
            raise UserError(f"--output_file is {arguments.output_file}, in a folder that doesn't exist.")
        if not os.access(output if output.exists() else output.parent, os.W_OK):
            raise UserError(f"--output_file is {arguments.output_file}, which can't be written; name another file.")
        if output.exists() and output.samefile(os.path.expanduser(arguments.data_file)):
            raise UserError(f"--output_file is {arguments.output_file}, which is the data file; name another file.")
    import paddle

    from paddlemix import LlavaLlamaForCausalLM, LlavaProcessor
    from paddlemix.models.llava.lean import on_cpu

    if arguments.dtype == "float16" and on_cpu():
        raise UserError("--dtype is float16, which Paddle doesn't have on CPU; use float32 or bfloat16.")
    dtype = arguments.dtype if on_cpu() else choose_dtype(arguments.dtype, paddle.device.get_device())
    model = LlavaLlamaForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=dtype)
    processor = LlavaProcessor.from_pretrained(arguments.model_name_or_path)
    answers = predict(
        model,
        processor,
        turns,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
        conv_mode=arguments.conv_mode,
        blank_image=arguments.blank_image,
    )
    predictions: Dict[int, str] = {}
    try:
        for index, answer in answers:
            predictions[index] = answer
        figures = evaluate(turns, predictions)
        print(table(figures), flush=True)  # whatever the disk has to say afterwards
    finally:  # a run that is stopped keeps the answers that it has
        if arguments.output_file and predictions:
            save_predictions(output, turns, predictions)
    return figures


def main(argv: Optional[Sequence[str]] = None) -> int:
    def work() -> int:
        arguments = parse(argv)
        from paddlemix.runtime import prepare_cpu

        prepare_cpu()
        run(arguments)
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
