"""Where the chat's lines come from: a terminal with editing, history and completion, or any other standard input."""

import os
import signal
import sys
from contextlib import contextmanager
from typing import Iterator, Mapping

from paddlemix.models.llava.hub import cache_home

__all__ = ["LineReader", "TerminalReader", "for_terminal", "one_interrupt", "open_reader"]

# what must not reach a terminal from a model: escape sequences and other control characters, but not tab and newline
CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\t\n"}


def for_terminal(text: str) -> str:
    """Text of the model as a terminal may show it."""
    return text.translate(CONTROL)


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Inside, the first Ctrl-C raises KeyboardInterrupt; more of them, while it is being dealt with, do nothing."""
    previous = signal.getsignal(signal.SIGINT)
    if previous is not signal.default_int_handler:  # ignored (nohup), or somebody else's
        yield
        return
    pending = True

    def interrupt(signum, frame):
        nonlocal pending
        if pending:
            pending = False
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


class LineReader:
    """Lines of standard input: a pipe, a file, or a terminal that can't move its cursor or whose output goes elsewhere."""

    @property
    def interactive(self) -> bool:
        """Whether somebody types."""
        return sys.stdin is not None and sys.stdin.isatty()

    def read(self, prompt: str) -> str:
        """The next line without its end; bytes that are no UTF-8 become U+FFFD.

        Raises:
            EOFError: no more lines.
        """
        sys.stdout.write(prompt)
        sys.stdout.flush()
        if sys.stdin is None:
            raise EOFError
        # bytes where there are any: the locale may be another than UTF-8
        line = getattr(sys.stdin, "buffer", sys.stdin).readline()
        if isinstance(line, bytes):
            line = line.decode("utf-8", "replace")
        if not line:
            raise EOFError
        return line.lstrip("\ufeff").rstrip("\r\n")

    def clean(self, text: str) -> str:
        """Text of the model as it may be shown here."""
        return for_terminal(text) if sys.stdout.isatty() else text


class TerminalReader:
    """A terminal: line editing, a history that outlives the program, completion of commands and paths with Tab.

    Args:
        commands: each command (``/image``) and whether a path follows it.
    """

    interactive = True

    def __init__(self, commands: Mapping[str, bool]):
        from prompt_toolkit import PromptSession
        from prompt_toolkit.shortcuts import CompleteStyle

        # without menus nobody has to ask the terminal where its cursor is, which not every one answers
        os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
        self.session = PromptSession(
            history=_history(),
            completer=_completer(commands),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
            enable_suspend=True,
        )

    def read(self, prompt: str) -> str:
        # with a colour, if only the default one, the space after the colon is written and not just skipped
        return self.session.prompt([("fg:default", prompt)])

    def clean(self, text: str) -> str:
        return for_terminal(text)


def open_reader(commands: Mapping[str, bool]):
    """A :class:`TerminalReader` if both ends are a terminal that lines can be edited at, else a :class:`LineReader`."""
    if not all(end is not None and end.isatty() for end in (sys.stdin, sys.stdout)):
        return LineReader()
    from prompt_toolkit.utils import is_dumb_terminal

    return LineReader() if is_dumb_terminal() else TerminalReader(commands)


def _history():
    """What was typed in earlier chats, readable by the user alone; in memory where no file can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = cache_home() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    except (OSError, RuntimeError):
        return InMemoryHistory()
    return FileHistory(str(path))


def _completer(commands: Mapping[str, bool]):
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class ChatCompleter(Completer):
        paths = PathCompleter(expanduser=True)

        def get_completions(self, document, complete_event):
            line = document.text_before_cursor
            command, space, rest = line.partition(" ")
            if not space and line.startswith("/"):
                for name, takes_path in commands.items():
                    if name.startswith(line):
                        yield Completion(name + (" " if takes_path else ""), start_position=-len(line), display=name)
            elif space and commands.get(command):
                rest = rest.lstrip()
                yield from self.paths.get_completions(Document(rest, len(rest)), complete_event)

    return ChatCompleter()
