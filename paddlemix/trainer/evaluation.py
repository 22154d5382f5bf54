"""Evaluation while training: the loss per supervised token, and answers that the model writes by itself."""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import paddle
import paddle.distributed as dist

from paddlemix.errors import UserError
from paddlemix.evaluation.answers import answer_prompts
from paddlemix.evaluation.grounding import find_box, iou, is_box
from paddlemix.evaluation.vqa import exact_match

__all__ = ["Question", "evaluate_answers", "evaluate_loss", "questions_of", "score_answers"]


class Question(NamedTuple):
    """One answer to write: its row in the dataset, and which of the row's answers it is, from 0."""

    row: int
    turn: int


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
    """Every answer of the dataset's samples that an answer of the model can be held against.

    Rounds that were cut off at ``max_length`` aren't asked for, and neither is an answer without any text.

    Args:
        dataset: a SupervisedDataset.

    Raises:
        UserError: there is none.
    """
    questions = []
    for row in range(len(dataset)):
        answers = _answers(dataset, row)[: dataset.answers[row]]
        questions += [Question(row, turn) for turn, answer in enumerate(answers) if answer.strip()]
    if not questions:
        raise UserError(
            "the evaluation data have no answers to compare with; expected turns of the assistant with words."
        )
    return questions


def _answers(dataset: Any, row: int) -> List[str]:
    return [message["content"] for message in dataset.conversation(row)[0] if message["role"] == "assistant"]


class Prompt(NamedTuple):
    """What the model reads before it writes an answer.

    Attributes:
        input_ids: T ids, the very ones that training shows before this answer.
        images: pictures in it.
        stop_strings: what ends the answer, beside the end token.
        question, reference: texts, for the file of predictions.
    """

    input_ids: List[int]
    images: List[Any]
    stop_strings: Sequence[str]
    question: str
    reference: str


def prompt_of(question: Question, dataset: Any, processor: Any) -> Prompt:
    """The prompt of a question; the row's own earlier answers are the history."""
    messages, sources = dataset.conversation(question.row)
    images = [processor.load_image(source) for source in sources]
    sizes = [image.size for image in images]
    template = dataset.template(question.row)
    ids = processor.encode_messages(messages, sizes, template).prompt(question.turn)
    place = [i for i, message in enumerate(messages) if message["role"] == "assistant"][question.turn]
    return Prompt(
        input_ids=ids,
        images=images[: processor.count_images(ids, sizes)],
        stop_strings=template.stop_strings,
        question=messages[place - 1]["content"],
        reference=messages[place]["content"],
    )


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

    ``row`` in the file is the row of the data file, from 0; where the dataset has several, ``file`` names it.

    Args:
        dataset: a SupervisedDataset.
        max_new_tokens: default enough for the longest reference.
        max_questions: the first so many of each rank only.
        watch: passes the batches on; may raise to stop.
    """
    questions = questions_of(dataset)
    if max_new_tokens is None:
        max_new_tokens = _longest_reference(questions, dataset, processor) + 8
    share = -(-len(questions) // ranks)
    mine = questions[rank::ranks][:max_questions]
    several = len({dataset.source(row)[0] for row in range(len(dataset))}) > 1
    results: List[Tuple[Question, Dict[str, Any]]] = []
    # every rank makes the same number of batches, since they ask together whether to stop
    for start in watch(range(0, share if max_questions is None else min(share, max_questions), batch_size)):
        chosen = mine[start : start + batch_size]
        if not chosen:
            continue
        prompts = [prompt_of(question, dataset, processor) for question in chosen]
        answers = answer_prompts(
            model,
            processor,
            [(prompt.input_ids, prompt.images) for prompt in prompts],
            max_new_tokens,
            [prompt.stop_strings for prompt in prompts],
        )
        for question, prompt, answer in zip(chosen, prompts, answers):
            data_file, row = dataset.source(question.row)
            entry = {
                **({"file": str(data_file)} if several else {}),
                "row": row,
                "turn": question.turn,
                "question": prompt.question,
                "answer": answer,
                "reference": prompt.reference,
                **_score(answer, prompt.reference),
            }
            results.append((question, entry))
    if ranks > 1:
        gathered: List[Any] = []
        dist.all_gather_object(gathered, results)
        results = sorted((result for part in gathered for result in part), key=lambda result: result[0])
    if rank == 0:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for _, entry in results)
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(lines, encoding="utf-8")
        partial.replace(file)
    return score_answers([(entry["answer"], entry["reference"]) for _, entry in results])


def _longest_reference(questions: Sequence[Question], dataset: Any, processor: Any) -> int:
    """Tokens of the longest answer that is asked for."""
    texts = {_answers(dataset, question.row)[question.turn] for question in questions}
    return max(len(processor.tokenizer.encode_with_offsets(text)[0]) for text in texts)


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
