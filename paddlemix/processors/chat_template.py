"""Chat templates in files of the toolkit's form, rendered through the interface of ``conversation.Template``.

``{"system": "…", "conversation": ["…{{user}}…", "…{{bot}}…"], "query": "…{{query}}…"}``: Jinja texts; a conversation
is the system text, then the two texts of ``conversation`` for each round, then ``query`` for the question that is to
be answered. In them ``index``, ``length``, ``is_first``, ``is_last`` and ``is_training`` are known beside the message
(documented for PaddleNLP's chat models under ``docs/llm/docs/chat_template``).
"""

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

from paddlemix.errors import UserError
from paddlemix.models.llava.conversation import Template, check_messages, conv_templates

__all__ = ["FILE_NAME", "ChatTemplate", "hugging_face_jinja", "load_chat_template", "name_of", "read_saved"]

logger = logging.getLogger("paddlemix.processors.chat_template")

FILE_NAME = "chat_template.json"
KEYS = ("system", "conversation", "query")
_MARK = "\ue000"  # a private-use character, to see where a message lands


class ChatTemplate:
    """One template of the toolkit's form; the same messages always give the same text.

    Args:
        values: the file's JSON.
        name: for errors; the file's path.

    Attributes:
        system (str): the system text as it is rendered without a system message.
        stop_strings (tuple of str): what ends an answer, if the template writes anything after it.
        values (dict): the file's JSON, for saving beside a checkpoint.

    Raises:
        UserError: another form, an unknown key, or Jinja that doesn't compile.
    """

    def __init__(self, values: Any, name: str = "chat_template"):
        self.name = name
        if not isinstance(values, dict) or "conversation" not in values:
            hint = " (this is Hugging Face's form)" if isinstance(values, dict) and "chat_template" in values else ""
            raise UserError(
                f'{name} is no chat template of the toolkit{hint}; expected {{"system": "…", '
                '"conversation": ["…{{user}}…", "…{{bot}}…"], "query": "…{{query}}…"}.'
            )
        unknown = [key for key in values if key not in KEYS]
        if unknown:
            raise UserError(f"{name} has the key {unknown[0]!r}; expected {', '.join(KEYS)}.")
        parts = values["conversation"]
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise UserError(f"{name}: conversation is {parts!r}; expected two texts, the user's and the assistant's.")
        for key in ("system", "query"):
            if not isinstance(values.get(key), (str, type(None))):
                raise UserError(f"{name}: {key} is {values[key]!r}; expected a text.")
        self.values: Dict[str, Any] = dict(values)
        self._user, self._bot = parts
        self._query: Optional[str] = values.get("query")
        self._system: str = values.get("system") or ""
        self.system = self._render_system(None)

        first = {"index": 0, "length": 1, "is_first": True, "is_last": True, "is_training": True}
        if _MARK not in self._fill(self._user, user=_MARK, **first):
            raise UserError(f"{name}: conversation[0] doesn't show {{{{user}}}}, so the question would be lost.")
        shown = self._fill(self._bot, user="", bot=_MARK, **first)
        if _MARK not in shown:
            raise UserError(f"{name}: conversation[1] doesn't show {{{{bot}}}}, so the answer would be lost.")
        if self._query is not None and _MARK not in self._fill(self._query, query=_MARK, **first):
            raise UserError(f"{name}: query doesn't show {{{{query}}}}, so the question would be lost.")
        end = shown[shown.rindex(_MARK) + 1 :]
        if not end:
            logger.warning("%s writes nothing after {{bot}}, so a model trained with it doesn't learn to stop.", name)
        self.stop_strings: Tuple[str, ...] = (end.strip() or end,) if end else ()

    def __repr__(self) -> str:
        return f"ChatTemplate({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChatTemplate) and self.values == other.values

    def __hash__(self) -> int:
        return hash(json.dumps(self.values, sort_keys=True))

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """The conversation as one text; arguments and errors as in ``conversation.Template.render``."""
        return self.render_spans(messages, add_generation_prompt)[0]

    def render_spans(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> Tuple[str, List[Tuple[int, int]]]:
        """The text, and for each answer its characters ``[start, end)``: what the model itself has to write.

        A span starts where the text of ``query`` for the same question ends, and holds what ends the answer, but not
        the white space after that.
        """
        messages = check_messages(messages)
        system = None
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        text = self._render_system(system)
        spans = []
        length = (len(messages) + 1) // 2
        for index in range(length):
            question = messages[2 * index]["content"]
            context = {
                "index": index,
                "length": length,
                "is_first": index == 0,
                "is_last": index == length - 1,
                "is_training": not add_generation_prompt,
            }
            begin = len(text)
            if 2 * index + 1 == len(messages):  # the last question has no answer yet
                text += self._prompt(question, context) if add_generation_prompt else self._ask(question, context)
                return text, spans
            answer = messages[2 * index + 1]["content"]
            text += self._ask(question, context)
            start = len(text)
            text += self._fill(self._bot, user=question, bot=answer, **context)
            prompt = self._prompt(question, context)
            if text.startswith(prompt, begin):
                start = max(start, begin + len(prompt))
            else:
                start += len(self._lead(question, context))
            spans.append((start, start + self._length_of_answer(text[start:])))
        if add_generation_prompt:
            raise UserError(f"{self.name} can't ask for an answer: the last message isn't the user's.")
        return text, spans

    def _render_system(self, system: Optional[str]) -> str:
        if system is None:
            return self._fill(self._system)
        text = self._fill(self._system, system=system)
        if system and system not in text:
            raise UserError(
                f"{self.name} has a fixed system text, but a conversation brings its own; write "
                "{{system | default('…')}} in the template's system."
            )
        return text

    def _ask(self, question: str, context: Dict[str, Any]) -> str:
        return self._fill(self._user, user=question, bot="", **context)

    def _prompt(self, question: str, context: Dict[str, Any]) -> str:
        """What stands before the model's answer to ``question``."""
        if self._query is not None:
            return self._fill(self._query, query=question, user=question, **context)
        return self._ask(question, context) + self._lead(question, context)

    def _lead(self, question: str, context: Dict[str, Any]) -> str:
        """The fixed words before the answer in its part, for example ``ASSISTANT:``."""
        shown = self._fill(self._bot, user=question, bot=_MARK, **context)
        return shown[: shown.index(_MARK)].rstrip() if _MARK in shown else ""

    def _length_of_answer(self, written: str) -> int:
        """Without the white space after the mark that ends the answer; white space alone is such a mark too."""
        stop = self.stop_strings[0] if self.stop_strings else ""
        return len(written.rstrip()) if stop.strip() else len(written)

    def _fill(self, source: str, **values: Any) -> str:
        from jinja2 import TemplateError

        try:
            return _compile(source).render(**values)
        except TemplateError as error:
            raise UserError(f"{self.name} has a text that Jinja refuses ({error}): {source!r}.") from None


@lru_cache(maxsize=256)
def _compile(source: str):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # the settings under which PaddleNLP renders these files
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
        source
    )


_PROBE = (
    {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "Grey."},
)


def name_of(template: ChatTemplate) -> Optional[str]:
    """The name in ``conv_templates`` that renders as this template does, for training and for a prompt; None if none.

    ``vicuna_v1`` for the file that the toolkit has for LLaVA-1.5.
    """

    def rendered(one: Any) -> Tuple[Any, str]:
        return one.render_spans(_PROBE), one.render(_PROBE[:3], add_generation_prompt=True)

    try:
        wanted = rendered(template)
    except UserError:
        return None
    # the checkpoints of LLaVA-1.5 say vicuna_v1, which is v1 by another name
    names = sorted(conv_templates, key=lambda name: name != "vicuna_v1")
    return next((name for name in names if rendered(conv_templates[name]) == wanted), None)


def read_saved(folder: Union[str, Path]) -> Optional[ChatTemplate]:
    """The ``chat_template.json`` beside a checkpoint, if it is of the toolkit's form and not Hugging Face's."""
    path = Path(folder) / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return ChatTemplate(values, str(path)) if isinstance(values, dict) and "conversation" in values else None


def load_chat_template(path: Union[str, Path]) -> ChatTemplate:
    """Reads a chat template file.

    Raises:
        UserError: it is missing, isn't JSON, or isn't of the toolkit's form.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"chat_template names {path}, which can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} isn't UTF-8 text; expected a chat template in JSON.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from None
    return ChatTemplate(values, str(path))


# a message's text; Hugging Face's is a list of parts, of which each picture is written before the words
_WORDS = (
    "{%- macro words(message) %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endmacro -%}"
)


def hugging_face_jinja(template: Template) -> str:
    """The template in the form that transformers' processors keep in ``chat_template.jinja``; empty for one that is not for
    conversations (``plain``), or that marks pictures.

    A system message may stand first, and has the place of the template's own.
    """
    if template.captions_only or template.image_marks != ("", ""):
        return ""

    def text(value: str) -> str:
        return "{{ " + json.dumps(value, ensure_ascii=False) + " }}" if value else ""

    def turn(role: Any) -> str:
        written = f"{text(role.before)}{{{{ words(message) }}}}{text(role.after)}"
        if not template.empty_is_open:
            return written
        return f"{{% if words(message) %}}{written}{{% else %}}{text(role.opening)}{{% endif %}}"

    system = f"{text(template.system_before)}{{{{ ns.system }}}}{text(template.system_after)}"
    if template.system_in_user:
        first = f"{text(template.first_before)}{{% if ns.system %}}{system}{{% endif %}}"
        asked = f"{first}{{{{ words(message) }}}}{text(template.user.after)}"
        beginning, user = "", f"{{% if loop.first %}}{asked}{{% else %}}{turn(template.user)}{{% endif %}}"
    else:
        own = template.system_before + template.system + template.system_after
        beginning, user = system + text(template.render([])[len(own) :]), turn(template.user)  # and its examples
    return (
        f"{_WORDS}{{% set ns = namespace(system={json.dumps(template.system, ensure_ascii=False)}, said=messages) %}}"
        "{% if messages and messages[0]['role'] == 'system' %}"
        "{% set ns.system = words(messages[0]) %}{% set ns.said = messages[1:] %}{% endif %}"
        f"{beginning}{{% for message in ns.said %}}{{% if message['role'] == 'user' %}}{user}"
        f"{{% else %}}{turn(template.assistant)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{text(template.assistant.opening)}{{% endif %}}"
    )
