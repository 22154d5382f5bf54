"""A row of a dataset, in any of its three forms, as messages and pictures.

```
{"image": "a.jpg", "conversations": [["<image>\\nQ", "A"], ["Q2", "A2"]]}                              toolkit
{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", …}]}   original LLaVA
{"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Q"}]}, …]}
```

Pure: no file is opened, and the row isn't changed.
"""

from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

from paddlemix.errors import UserError
from paddlemix.models.llava.constants import IMAGE_TOKEN
from paddlemix.models.llava.conversation import check_messages

__all__ = ["FORMATS", "ImageCountError", "parse_row", "row_format"]

FORMATS = ("toolkit", "llava", "messages")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

Messages = List[Dict[str, str]]


class ImageCountError(UserError):
    """The messages have another number of ``<image>`` than the row has pictures."""


def row_format(row: Any) -> str:
    """Which of ``FORMATS`` a row has, told by its shape.

    Raises:
        UserError: none of them; the sentence says what was found.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"The row is a {_kind(row)}; expected an object with 'conversations' or 'messages'.")
    keys = [key for key in ("conversations", "messages") if key in row]
    if len(keys) != 1:
        found = "both" if keys else f"neither (its keys are {', '.join(map(repr, row)) or 'none'})"
        raise UserError(f"A row has either 'conversations' or 'messages'; this one has {found}.")
    turns = row[keys[0]]
    if not isinstance(turns, (list, tuple)):
        raise UserError(f"{keys[0]!r} is a {_kind(turns)}; expected a list.")
    if not turns:
        raise UserError(f"{keys[0]!r} is empty; expected at least a question and its answer.")
    if keys[0] == "messages":
        return "messages"
    return "llava" if isinstance(turns[0], Mapping) else "toolkit"


def parse_row(row: Any) -> Tuple[Messages, List[Any]]:
    """Messages and pictures of a row.

    Returns:
        messages: ``{"role": "user" | "assistant", "content": text}`` in turns, the user's first, perhaps after one
            system message; each picture is an ``<image>`` in the text. An assistant's turn before the first question
            is dropped, as the original training does.
        images: the row's pictures as it names them (path, URL, or a PIL image), one for each ``<image>``, in order.

    Raises:
        ImageCountError: another number of ``<image>`` than of pictures; both numbers are named.
        UserError: anything else that is wrong, in one sentence without file and line.
    """
    kind = row_format(row)
    images = _row_images(row)
    if kind == "messages":
        messages, images = _from_messages(row["messages"], images)
    elif kind == "llava":
        messages = _from_llava(row["conversations"])
    else:
        messages = _from_toolkit(row["conversations"])
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) > first and messages[first]["role"] == "assistant":
        del messages[first]
    if len(messages) == first:
        raise UserError("The row has no question; expected at least a question and its answer.")
    check_messages(messages)
    count = sum(message["content"].count(IMAGE_TOKEN) for message in messages)
    if count != len(images):
        raise ImageCountError(f"The text has {count} {IMAGE_TOKEN} but the row has {len(images)} picture(s).")
    return messages, images


def _row_images(row: Mapping[str, Any]) -> List[Any]:
    """What stands under ``image`` (or ``images``), as a list."""
    keys = [key for key in ("image", "images") if not _is_nothing(row.get(key))]
    if len(keys) > 1:
        raise UserError("The row has both 'image' and 'images'; expected one of them.")
    if not keys:
        return []
    value = row[keys[0]]
    images = list(value) if isinstance(value, (list, tuple)) else [value]
    for image in images:
        _check_image(image, repr(keys[0]))
    return images


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value)


def _check_image(image: Any, where: str) -> None:
    """A path, a URL or a picture in memory; no number, no object, no empty text."""
    if _is_nothing(image) or isinstance(image, (bool, int, float, Mapping, list, tuple)):
        raise UserError(f"{where} has {image!r:.60}; expected the path or URL of a picture.")


def _from_toolkit(pairs: Sequence[Any]) -> Messages:
    messages = []
    for number, pair in enumerate(pairs, start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise UserError(f"Round {number} of 'conversations' is {pair!r:.60}; expected [question, answer].")
        for role, content in zip(("user", "assistant"), pair):
            messages.append({"role": role, "content": _text(content, f"Round {number} of 'conversations'")})
    return messages


def _from_llava(turns: Sequence[Any]) -> Messages:
    messages = []
    for number, turn in enumerate(turns, start=1):
        where = f"Turn {number} of 'conversations'"
        if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
            raise UserError(f'{where} is {turn!r:.60}; expected {{"from": "human" or "gpt", "value": text}}.')
        messages.append({"role": _role(turn["from"], where), "content": _text(turn["value"], where)})
    return messages


def _from_messages(turns: Sequence[Any], row_images: List[Any]) -> Tuple[Messages, List[Any]]:
    """The messages, and the pictures in the order of their places in the text.

    A part that names its picture has it; an ``<image>`` in a text, and a part without a name, take the next of the
    row's own list.
    """
    waiting = iter(row_images)
    messages, images = [], []
    for number, turn in enumerate(turns, start=1):
        where = f"Message {number}"
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise UserError(f'{where} is {turn!r:.60}; expected {{"role": "user" or "assistant", "content": …}}.')
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            raise UserError(f"{where} has a {_kind(content)} as content; expected text or a list of parts.")
        texts = [_part(part, where, waiting, images) for part in parts]
        messages.append({"role": _role(turn["role"], where), "content": "\n".join(texts)})
    return messages, images + list(waiting)


def _part(part: Any, where: str, waiting: Iterator[Any], images: List[Any]) -> str:
    """The text of one part of a content list; its pictures are put at the end of ``images``."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        text = _text(part.get("text"), where)
        images += [image for _, image in zip(range(text.count(IMAGE_TOKEN)), waiting)]
        return text
    if kind in ("image", "image_url"):
        names = [part[key] for key in ("image", "image_url", "url", "path") if part.get(key) is not None]
        image = names[0] if names else next(waiting, None)
        if isinstance(image, Mapping):  # OpenAI writes {"image_url": {"url": …}}
            image = image.get("url")
        _check_image(image, where)
        images.append(image)
        return IMAGE_TOKEN
    raise UserError(f"{where} has the part {part!r:.60}; expected a type of 'text', 'image' or 'image_url'.")


def _role(name: Any, where: str) -> str:
    role = SPEAKERS.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where} is from {name!r:.40}; expected 'human', 'gpt', 'user', 'assistant' or 'system'.")
    return role


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where} has a {_kind(value)} where text was expected.")
    return value


def _kind(value: Any) -> str:
    """JSON's word for a value's type, as the user sees it in the file."""
    if value is None:
        return "null"
    for types, word in ((bool, "boolean"), ((int, float), "number"), (str, "text"), ((list, tuple), "list")):
        if isinstance(value, types):
            return word
    return "object" if isinstance(value, Mapping) else type(value).__name__
