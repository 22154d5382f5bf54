"""Conversation templates: how messages become one text, and where in it the answers lie.

The sixteen names of the original LLaVA release are here with its texts, and ``smollm2``, the ChatML template of
SmolLM2-135M-Instruct (the default model's decoder). A template is frozen and rendering is pure: the same messages
always give the same text, and nothing is kept between calls.
"""

from dataclasses import dataclass, replace
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple, Union

from paddlemix.errors import UserError

__all__ = ["Template", "Turn", "conv_templates", "get_template"]

ROLES = ("user", "assistant")


class Turn(NamedTuple):
    """The text around one message: ``before + content + after``.

    ``opening`` is how far the turn is written before its speaker has said anything. For the assistant it is the
    generation prompt, so whatever follows it up to the end of the turn is the answer.
    """

    before: str
    after: str
    opening: str


@dataclass(frozen=True)
class Template:
    """One conversation format.

    Attributes:
        name: the key in ``conv_templates``.
        system: the system text, without the marks around it.
        user, assistant: the text around a message of each role.
        stop_strings: an answer ends where the model writes one of these; the first is the one that ends a turn
            in the rendered text (it is part of ``assistant.after``).
        system_before, system_after: the marks around the system text.
        system_in_user: the system text is written inside the first user message (LLaMA-2).
        first_before: what stands before the first user message instead of ``user.before``.
        empty_is_open: a message without text is written as ``opening`` alone, as the original release does.
        examples: messages that are rendered before the conversation's own.
        image_marks: what training writes around each ``<image>``.
        captions_only: training takes one round and drops the question's text: picture, answer, end.
    """

    name: str
    system: str
    user: Turn
    assistant: Turn
    stop_strings: Tuple[str, ...]
    system_before: str = ""
    system_after: str = ""
    system_in_user: bool = False
    first_before: str = ""
    empty_is_open: bool = True
    examples: Tuple[Tuple[str, str], ...] = ()
    image_marks: Tuple[str, str] = ("", "")
    captions_only: bool = False

    def with_system(self, system: str) -> "Template":
        """The same template with another system text."""
        return replace(self, system=system)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """The conversation as one text.

        Args:
            messages: ``{"role": "user" | "assistant", "content": str}``, in turns, the user's first. One
                ``{"role": "system", …}`` may stand before them; it replaces the template's system text.
            add_generation_prompt: end with the words after which the assistant speaks.

        Raises:
            UserError: a wrong role, order or content.
        """
        return self.render_spans(messages, add_generation_prompt)[0]

    def render_spans(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False
    ) -> Tuple[str, List[Tuple[int, int]]]:
        """The text of :meth:`render` and, for each assistant message, its characters ``[start, end)``.

        A span is what the model itself has to write: it starts where the generation prompt ends and holds the string
        that ends the turn. An answer without text has an empty span, for there is nothing to write.
        The template's own examples have none.
        """
        messages = check_messages(messages)
        if messages and messages[0]["role"] == "system":
            return self.with_system(messages[0]["content"]).render_spans(messages[1:], add_generation_prompt)
        if self.system_in_user and not messages and add_generation_prompt:
            raise UserError(f"Template {self.name!r} can't ask for an answer before the user has said anything.")

        text = "" if self.system_in_user else self.system_before + self.system + self.system_after
        spans = []
        turns = [*self.examples, *((message["role"], message["content"]) for message in messages)]
        for index, (role, content) in enumerate(turns):
            turn = self.user if role == "user" else self.assistant
            before = turn.before
            if index == 0 and self.system_in_user:
                if not content:
                    raise UserError(f"The first message is empty; template {self.name!r} needs text in it.")
                before = self.first_before
                if self.system:
                    content = self.system_before + self.system + self.system_after + content
            if not content and self.empty_is_open:
                text += turn.opening
                span = (len(text), len(text))
            else:
                start = len(text) + len(turn.opening)
                text += before + content
                end = len(text) + self._length_of_end()
                text += turn.after
                span = (start, end)
            if role == "assistant" and index >= len(self.examples):
                spans.append(span)
        if add_generation_prompt:
            text += self.assistant.opening
        return text, spans

    def _length_of_end(self) -> int:
        """How many characters of ``assistant.after`` the model writes: all up to the end of the stop string."""
        stop = self.stop_strings[0]
        return self.assistant.after.index(stop) + len(stop)


def check_messages(messages: Sequence[Mapping[str, str]]) -> List[Mapping[str, str]]:
    """The messages as a list, if they are texts of user and assistant in turns (a system message may be first).

    Raises:
        UserError: naming the first message that is wrong and what was expected.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise UserError(
            f'messages is a {type(messages).__name__}; expected a list of {{"role": "user" or "assistant", "content": text}}.'
        )
    turn = 0
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UserError(f'Message {number} is {message!r:.80}; expected {{"role": …, "content": text}}.')
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            raise UserError(f"Message {number} has content of type {type(content).__name__}; expected text.")
        if number == 1 and role == "system":
            continue
        if role not in ROLES:
            raise UserError(f"Message {number} has the role {role!r}; expected 'user' or 'assistant'.")
        if role != ROLES[turn % 2]:
            raise UserError(
                f"Message {number} is from {role!r}; expected {ROLES[turn % 2]!r}, for user and assistant speak in turns, "
                "the user first."
            )
        turn += 1
    return list(messages)


def get_template(name: Union[str, Template]) -> Template:
    """The template of that name; an object that can render is returned as it is.

    Raises:
        UserError: no such template; the message lists the names.
    """
    if hasattr(name, "render_spans"):
        return name
    if not isinstance(name, str) or name not in conv_templates:
        raise UserError(f"No conversation template {name!r}; expected one of {', '.join(conv_templates)}.")
    return conv_templates[name]


CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# the original has no space between the last two sentences
MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MPT_SYSTEM = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
V0_EXAMPLES = (
    ("user", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
        "Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, oil, and natural gas. Here are some key differences between "
        "renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
        "energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
        "and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
        "have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
        "locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
        "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
        "non-renewable sources are not, and their depletion can lead to economic and social instability.\n",
    ),
)


TAGS = ("<Image>", "</Image>")


def _hashes(name: str, system: str, examples=(), image_marks=("", "")) -> Template:
    """Vicuna v0: every turn, and the system text, ends with ``###``."""
    return Template(
        name,
        system,
        user=Turn("Human: ", "###", "Human:"),
        assistant=Turn("Assistant: ", "###", "Assistant:"),
        stop_strings=("###",),
        system_after="###",
        examples=examples,
        image_marks=image_marks,
    )


def _vicuna(name: str, system: str, image_marks=("", "")) -> Template:
    """Vicuna v1: a space after the question, ``</s>`` after the answer."""
    return Template(
        name,
        system,
        user=Turn("USER: ", " ", "USER:"),
        assistant=Turn("ASSISTANT: ", "</s>", "ASSISTANT:"),
        stop_strings=("</s>",),
        system_after=" ",
        image_marks=image_marks,
    )


def _llama_2(name: str, system: str, begin: str) -> Template:
    """LLaMA-2 chat: ``begin`` stands before every question but the first, where the tokenizer writes it."""
    return Template(
        name,
        system,
        user=Turn(f"{begin}[INST] ", " [/INST]", ""),
        assistant=Turn(" ", " </s>", ""),
        stop_strings=("</s>",),
        system_before="<<SYS>>\n",
        system_after="\n<</SYS>>\n\n",
        system_in_user=True,
        first_before="[INST] ",
    )


def _chatml(name: str, system: str, newline: str = "", empty_is_open: bool = True) -> Template:
    """ChatML: ``newline`` follows the end of every turn."""
    start, end = "<|im_start|>", "<|im_end|>"
    user, assistant = f"{start}user\n", f"{start}assistant\n"
    return Template(
        name,
        system,
        user=Turn(user, end + newline, user),
        assistant=Turn(assistant, end + newline, assistant),
        stop_strings=(end,),
        system_before=f"{start}system\n",
        system_after=end + newline,
        empty_is_open=empty_is_open,
    )


def _plain(name: str) -> Template:
    """Picture and caption with nothing around them, for the alignment of the projector."""
    turn = Turn("", "\n", "")
    return Template(name, "", user=turn, assistant=turn, stop_strings=("\n",), captions_only=True)


conv_templates: Dict[str, Template] = {
    template.name: template
    for template in (
        _hashes("default", CURIOUS_HUMAN, V0_EXAMPLES),
        _hashes("v0", CURIOUS_HUMAN, V0_EXAMPLES),
        _vicuna("v1", CURIOUS_USER),
        _vicuna("vicuna_v1", CURIOUS_USER),
        _llama_2("llama_2", LLAMA_2_SYSTEM, "<s>"),
        _llama_2("mistral_instruct", "", ""),
        _chatml("chatml_direct", "Answer the questions."),
        _chatml("mistral_direct", "Answer the questions."),
        _plain("plain"),
        _plain("v0_plain"),
        _hashes("llava_v0", CURIOUS_HUMAN),
        _hashes("v0_mmtag", MMTAG, image_marks=TAGS),
        _vicuna("llava_v1", CURIOUS_HUMAN),
        _vicuna("v1_mmtag", MMTAG, image_marks=TAGS),
        _llama_2("llava_llama_2", LLAVA_LLAMA_2_SYSTEM, "<s>"),
        _chatml("mpt", MPT_SYSTEM),
        _chatml(
            "smollm2",
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
            newline="\n",
            empty_is_open=False,
        ),
    )
}
