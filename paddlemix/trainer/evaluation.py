"""Evaluation while training: the loss per supervised token, and answers that the model writes by itself."""

import json
import logging
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import paddle
import paddle.distributed as dist

from paddlemix.errors import UserError
from paddlemix.evaluation.grounding import find_box, iou, is_box
from paddlemix.evaluation.vqa import exact_match
from paddlemix.models.llava.constants import IMAGE_TOKEN

__all__ = ["Question", "evaluate_answers", "evaluate_loss", "questions_of", "score_answers"]

logger = logging.getLogger(__name__)


class Question(NamedTuple):
    """One answer to write: the conversation before it, its pictures, and what the data say.

    Attributes:
        row, turn: where it is in the dataset; turn counts the answers of a row from 0.
    """

    row: int
    turn: int
    messages: List[Dict[str, str]]
    images: List[Any]
    reference: str


def evaluate_loss(
    model: Any,
    batches: Iterable[Dict[str, paddle.Tensor]],
    *,
    sum_over_ranks: Callable[[List[float]], List[float]],
    read_every: Optional[int] = None,
    max_batches: int = -1,
    loss_only: bool = False,
) -> Dict[str, float]:
    """``loss`` and ``token_accuracy`` over all supervised tokens of all ranks' batches.

    Args:
        read_every: batches between two reads of the sums from the device; None reads at the end.
        max_batches: stop after so many; below 1 for all.
        loss_only: leave the accuracy out.
    """
    totals, waiting = [0.0, 0.0, 0.0], []

    def read() -> None:
        for loss, count, correct in waiting:
            totals[0] += float(loss)
            totals[1] += count
            totals[2] += float(correct)
        waiting.clear()

    for number, batch in enumerate(batches, start=1):
        output = model(**batch, loss_reduction="sum")
        if output.label_ids is not None:
            correct = 0 if loss_only else (output.label_logits.argmax(-1) == output.label_ids).sum()
            waiting.append((output.loss, output.label_ids.shape[0], correct))
        if read_every and number % read_every == 0:
            read()
        if number == max_batches:
            break
    read()
    loss, count, correct = sum_over_ranks(totals)
    if not count:
        raise UserError("the evaluation data have no supervised token; look at them with check_dataset.py.")
    metrics = {"loss": loss / count}
    if not loss_only:
        metrics["token_accuracy"] = correct / count
    return metrics


def questions_of(dataset: Any) -> List[Question]:
    """Every answer of every row of the dataset as a question, with the row's own answers as the history.

    Args:
        dataset: has a length and ``conversation(index)``, the row's messages and pictures.
    """
    questions = []
    for row in range(len(dataset)):
        messages, images = dataset.conversation(row)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, place in enumerate(answers):
            history = messages[:place]
            shown = sum(message["content"].count(IMAGE_TOKEN) for message in history)
            questions.append(Question(row, turn, history, images[:shown], messages[place]["content"]))
    return questions


def evaluate_answers(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    file: Path,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    max_new_tokens: Optional[int] = None,
    max_questions: Optional[int] = None,
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Dict[str, float]:
    """Greedy answers to the dataset's questions, written into ``file`` (JSON lines), and their scores.

    Prompts are built and padded on the left by the processor, as in the chat.

    Args:
        max_new_tokens: default enough for the longest reference.
        max_questions: the first so many of this rank only.
        watch: passes the batches on; may raise to stop.
    """
    template = getattr(dataset, "template", None) or processor.template
    questions = questions_of(dataset)
    if not questions:
        raise UserError("the evaluation data have no answers to compare with; look at them with check_dataset.py.")
    if max_new_tokens is None:
        tokenizer = processor.tokenizer
        longest = max((question.reference for question in questions), key=len)
        max_new_tokens = len(tokenizer.encode_with_offsets(longest)[0]) + 8
    share = questions[rank::ranks]
    most = -(-len(questions) // ranks) if max_questions is None else max_questions
    results: List[Dict[str, Any]] = []
    # every rank makes the same number of batches, since they ask together whether to stop
    for start in watch(range(0, min(most, -(-len(questions) // ranks)), batch_size)):
        chosen = share[start : min(start + batch_size, most)]
        if not chosen:
            continue
        prompts = [template.render(question.messages, add_generation_prompt=True) for question in chosen]
        pictures = [list(question.images) for question in chosen]
        batch = processor(text=prompts, images=pictures if any(pictures) else None)
        ids, _ = model.generate(**batch, max_new_tokens=max_new_tokens, decode_strategy="greedy_search")
        for question, row in zip(chosen, ids.tolist()):
            answer = _cut(processor.decode(row), template.stop_strings)
            results.append(
                {
                    "row": question.row,
                    "turn": question.turn,
                    "question": question.messages[-1]["content"],
                    "answer": answer,
                    "reference": question.reference,
                    **_score(answer, question.reference),
                }
            )
    if ranks > 1:
        gathered: List[Any] = []
        dist.all_gather_object(gathered, results)
        results = sorted(
            (entry for part in gathered for entry in part), key=lambda entry: (entry["row"], entry["turn"])
        )
    if rank == 0:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in results)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(lines, encoding="utf-8")
        partial.replace(file)
    return score_answers([(entry["answer"], entry["reference"]) for entry in results])


def score_answers(pairs: Sequence[Tuple[str, str]]) -> Dict[str, float]:
    """``exact_match`` over all (answer, reference), and ``box_iou`` over the references that are a box.

    An answer without a box overlaps by 0; of several boxes in it the first counts.
    """
    scored = [_score(*pair) for pair in pairs]
    scores = {"exact_match": sum(entry["exact_match"] for entry in scored) / max(len(scored), 1)}
    overlaps = [entry["box_iou"] for entry in scored if "box_iou" in entry]
    if overlaps:
        scores["box_iou"] = sum(overlaps) / len(overlaps)
    return scores


def _score(answer: str, reference: str) -> Dict[str, Any]:
    score: Dict[str, Any] = {"exact_match": exact_match(answer, reference)}
    if is_box(reference):
        score["box_iou"] = iou(find_box(answer), find_box(reference))
    return score


def _cut(answer: str, stops: Sequence[str]) -> str:
    """The answer up to the template's first end mark."""
    places = [answer.find(stop) for stop in stops if stop and stop in answer]
    return answer[: min(places)].strip() if places else answer.strip()
