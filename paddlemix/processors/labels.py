"""Which tokens of a training sample are learned: pure functions from messages to text, spans and labels.

Labels come from the characters of the answers as the template renders them, never from a search in the rendered text.
The three names of the stages: ``text`` with one ``<image>`` for each picture, ``ids`` with one placeholder for each
picture, and the sample's ``input_ids`` with one placeholder for each feature of it.
"""

from bisect import bisect_left
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from paddlemix.errors import UserError
from paddlemix.models.llava.constants import (
    IGNORE_INDEX,
    IMAGE_END_TOKEN,
    IMAGE_START_TOKEN,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
)

__all__ = ["TokenLabels", "cut_at", "expand", "label", "render_for_training", "truncate_rounds", "wrap_images"]

Span = Tuple[int, int]


class TokenLabels(NamedTuple):
    """A tokenized conversation.

    Attributes:
        input_ids: T ids; each picture is a run of ``IMAGE_TOKEN_INDEX``.
        labels: T ids to learn, ``IGNORE_INDEX`` elsewhere.
        round_ends: for each answer, how many ids there are up to its end; the sample may be cut there.
    """

    input_ids: List[int]
    labels: List[int]
    round_ends: List[int]

    def prompt(self, turn: int) -> List[int]:
        """The ids before what is learned of answer ``turn``, the answers before it included."""
        begin = self.round_ends[turn - 1] if turn else 0
        end = self.round_ends[turn]
        learned = (place for place in range(begin, end) if self.labels[place] != IGNORE_INDEX)
        return self.input_ids[: next(learned, end)]


def wrap_images(text: str) -> str:
    """``<im_start><image><im_end>`` for every ``<image>`` (a checkpoint with ``mm_use_im_start_end``)."""
    wrapped = IMAGE_START_TOKEN + IMAGE_TOKEN + IMAGE_END_TOKEN
    return text.replace(wrapped, IMAGE_TOKEN).replace(IMAGE_TOKEN, wrapped)


def render_for_training(
    messages: Sequence[Mapping[str, str]], template: Any, use_im_start_end: bool = False
) -> Tuple[str, List[Span]]:
    """The text that a sample is trained on, and the characters ``[start, end)`` of each answer in it.

    As the original training does: a message with one ``<image>`` gets it at its front, on a line of its own; with more
    of them they stay where they are. A template for captions (``plain``) takes the pictures and the answer alone.

    Args:
        template: a :class:`Template`, or any object with ``render_spans``.
        use_im_start_end: the checkpoint's ``mm_use_im_start_end``.

    Raises:
        UserError: a template for captions, and something else than one round with a picture.
    """
    if getattr(template, "captions_only", False):
        turns = [message for message in messages if message["role"] != "system"]
        pictures = turns[0]["content"].count(IMAGE_TOKEN) if turns else 0
        if len(turns) != 2 or not pictures:
            raise UserError(
                f"Template {template.name!r} trains on a picture and its caption; this row has {len(turns)} messages "
                f"and {pictures} picture(s) in the first. Choose another template (version, --conv_mode), or leave the row out."
            )
        lead = IMAGE_TOKEN * pictures
        text = lead + turns[1]["content"] + template.stop_strings[0]
        return text, [(len(lead), len(text))]

    before, after = getattr(template, "image_marks", ("", ""))
    prepared: List[Dict[str, str]] = []
    for message in messages:
        content = message["content"]
        if content.count(IMAGE_TOKEN) == 1:
            content = (IMAGE_TOKEN + "\n" + content.replace(IMAGE_TOKEN, "").strip()).strip()
        content = content.replace(IMAGE_TOKEN, before + IMAGE_TOKEN + after)
        if use_im_start_end:
            content = wrap_images(content)
        prepared.append({"role": message["role"], "content": content})
    return template.render_spans(prepared)


def cut_at(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[Span], places: Sequence[int]
) -> Tuple[List[int], List[Span]]:
    """Tokens that none of ``places`` (characters of ``text``, rising) lies inside.

    A tokenizer may join the end of an answer with what follows it (LLaMA's has a token for ``><``), but the model has
    to write one and not the other. Such a token is replaced by tokens of its two sides.
    """
    new_ids: List[int] = []
    new_offsets: List[Span] = []
    for index, (start, end) in zip(ids, offsets):
        inside = places[bisect_left(places, start + 1) : bisect_left(places, end)]
        data = tokenizer.token_bytes(index) if inside and index >= 0 else b""
        for place in inside:
            right = text[place:end].encode("utf-8", "replace")
            if not data.endswith(right) or len(data) == len(right):
                continue  # the tokenizer changed these characters: no telling which bytes belong where
            left = tokenizer.split_bytes(data[: -len(right)])
            new_ids += left
            new_offsets += [(start, place)] * len(left)
            data, start, index = right, place, None
        parts = [index] if index is not None else tokenizer.split_bytes(data)
        new_ids += parts
        new_offsets += [(start, end)] * len(parts)
    return new_ids, new_offsets


def label(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> Tuple[List[int], List[int]]:
    """Labels, and for each span how many ids there are up to its end.

    A token is learned if its first character lies in a span; a picture never is.
    """
    labels: List[int] = []
    ends: List[int] = []
    current = 0
    for number, (index, (start, _)) in enumerate(zip(ids, offsets)):
        while current < len(spans) and start >= spans[current][1]:
            ends.append(number)
            current += 1
        learned = current < len(spans) and start >= spans[current][0] and index != IMAGE_TOKEN_INDEX
        labels.append(index if learned else IGNORE_INDEX)
    return labels, ends + [len(ids)] * (len(spans) - len(ends))


def expand(
    ids: Sequence[int], labels: Sequence[int], round_ends: Sequence[int], features: Sequence[int]
) -> TokenLabels:
    """Each picture's one placeholder becomes as many as the picture has features."""
    input_ids: List[int] = []
    new_labels: List[int] = []
    grown: List[int] = []  # how many ids there are before the i-th old one
    waiting = iter(features)
    for index, target in zip(ids, labels):
        grown.append(len(input_ids))
        count = next(waiting) if index == IMAGE_TOKEN_INDEX else 1
        input_ids += [index] * count
        new_labels += [target] * count
    grown.append(len(input_ids))
    return TokenLabels(input_ids, new_labels, [grown[end] for end in round_ends])


def truncate_rounds(sample: TokenLabels, max_length: Optional[int]) -> TokenLabels:
    """The sample's first whole rounds that fit into ``max_length`` ids; itself if it fits, or without a limit.

    A cut is only made after an answer, so never inside a picture. Where not even the first round fits, all three lists
    are empty: no label is left, and the sample is to be left out.
    """
    if max_length is None or len(sample.input_ids) <= max_length:
        return sample
    kept = [end for end in sample.round_ends if end <= max_length]
    end = kept[-1] if kept else 0
    return TokenLabels(sample.input_ids[:end], sample.labels[:end], kept)
