"""Chat with a LLaVA model about pictures, round after round.

    python paddlemix/examples/llava/run_predict_multiround.py --model-path MODEL --image-file PICTURE
    python paddlemix/examples/llava/run_predict_multiround.py --model-path MODEL --image-file PICTURE --question "What is this?"

An empty line, ``exit`` or the end of the input ends the chat; ``/help`` lists its commands.
"""

import argparse
import logging
import math
import os
import re
import shlex
import sys
import time
import traceback
import urllib.parse
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, Set

if __package__ in (None, ""):  # run by its path, from a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from paddlemix.errors import UserError
from paddlemix.examples.llava.terminal import for_terminal, one_interrupt, open_reader
from paddlemix.runtime import device_name, prepare_cpu, quiet_start
from paddlemix.tools.command_line import Parser, choose_dtype, refuse_float16_on_cpu

DTYPES = ("float32", "float16", "bfloat16")
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
FLAG = re.compile(r"--[\w-]+(=.*)?", re.DOTALL)

COMMANDS = {
    "/image": ("PATH|URL", "a further picture, from the next question on"),
    "/clear": ("", "start over; the newest picture stays until /image brings another"),
    "/undo": ("", "take the last question and its answer back"),
    "/retry": ("", "answer the last question again"),
    "/save": ("FILE", "write the conversation, pictures included, to a JSON file"),
    "/load": ("FILE", "continue a saved conversation in place of this one"),
    "/box": ("[FILE]", "draw the coordinates in the last answer on the picture, save a PNG"),
    "/help": ("", "this list"),
    "/exit": ("", "end (so do an empty line, exit, and Ctrl-D)"),
}


# ---- what was asked for on the command line ----


def number(expected: str, valid: Callable[[float], bool], kind: Callable[[str], Any] = float):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} was given, expected {expected}")
        return value

    return parse


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The flags, under the names of the toolkit and of the original release; ``_`` may stand for ``-`` in them."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(argv):
        if word == "--":
            break
        if FLAG.fullmatch(word):
            name, equals, value = word.partition("=")
            argv[i] = name.replace("_", "-") + equals + value
    for i in range(len(argv) - 1, 0, -1):  # a question may begin with a dash, which argparse would take for a flag
        if argv[i - 1] == "--question" and argv[i].startswith("-") and not FLAG.fullmatch(argv[i]):
            argv[i - 1 : i + 1] = [f"--question={argv[i]}"]
    parser = Parser(description="Chat with a LLaVA model about pictures, round after round.", allow_abbrev=False)
    add = parser.add_argument
    positive = number("a number above 0", lambda value: value > 0)
    share = number("a number above 0, at most 1", lambda value: 0 < value <= 1)
    at_least_0 = number("0 or more", lambda value: value >= 0)
    whole = number("a whole number, 0 or more", lambda value: value >= 0, int)
    counted = number("a whole number, 1 or more", lambda value: value >= 1, int)
    default = "(default: %(default)s)"
    add(
        "--model-path",
        "--model-name-or-path",
        metavar="MODEL",
        default=default_model(),
        help="folder or name " + default,
    )
    add("--lora-path", metavar="FOLDER", help="a LoRA adapter that is not merged into the model")
    add(
        "--image-file",
        metavar="PATH|URL",
        action="append",
        help="the picture to talk about; without one the chat is about text; several go with the first question, in order",
    )
    add("--conv-mode", metavar="NAME", help="conversation template (default: what the checkpoint says)")
    add("--temperature", metavar="T", type=at_least_0, default=0.2, help="0 is greedy " + default)
    add("--top-p", metavar="P", type=share, default=1.0, help="sample among the likeliest that reach P " + default)
    add("--top-k", metavar="K", type=whole, default=0, help="sample among the K likeliest, 0 for all " + default)
    add("--repetition-penalty", metavar="R", type=positive, default=1.0, help="above 1 repeats less " + default)
    add("--max-new-tokens", metavar="N", type=counted, default=512, help="length of an answer " + default)
    add("--seed", metavar="N", type=whole, help="the same seed gives the same answers")
    add("--dtype", choices=DTYPES, help="(default: the best that the device supports)")
    add("--fp16", action="store_true", help="short for --dtype float16")
    add("--device", metavar="NAME", help="gpu, gpu:1, cpu, … (default: gpu if Paddle has one)")
    add("--question", metavar="Q", action="append", help="answer this and exit; may be given several times")
    add("--debug", action="store_true", help="report the prompt, probability and times of each answer")
    return check_args(parser, parser.parse_args(argv))


def check_args(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """What can be known to be wrong before anything large is loaded."""
    if args.fp16:
        if args.dtype not in (None, "float16"):
            parser.error(f"--fp16 and --dtype {args.dtype} contradict each other; give one of them")
        args.dtype = "float16"
    if args.device is not None:
        args.device = device_name(args.device, "--device")
        if args.device == "cpu":
            refuse_float16_on_cpu(args.dtype)
    if args.question is not None and not all(question.strip() for question in args.question):
        parser.error("--question is empty, expected some text")
    if not args.model_path.strip():
        parser.error("--model-path is empty, expected a folder or a name")
    return args


def default_model() -> str:
    from paddlemix.models.llava.hub import DEFAULT_MODEL

    return DEFAULT_MODEL


# ---- loading ----


def prepare(debugging: bool) -> None:
    """Settings that Paddle reads when it is imported, and silence from the libraries between the lines of the chat."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    logging.getLogger("paddlemix").setLevel(logging.DEBUG if debugging else logging.WARNING)
    settings = prepare_cpu()
    if debugging:
        debug(f"environment: {', '.join(settings) or 'nothing set'}")
    else:
        quiet_start()
        warnings.filterwarnings("ignore")


def choose_device(name: Optional[str]) -> str:
    """Makes Paddle use the device; its name.

    Raises:
        UserError: there is no such device.
    """
    import paddle

    gpus = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    if name is None:
        name = "gpu" if gpus else "cpu"
    kind, _, index = name.partition(":")
    if kind == "gpu" and not gpus:
        cause = (
            "Paddle found none"
            if paddle.device.is_compiled_with_cuda()
            else "this PaddlePaddle is built for CPU; paddlepaddle-gpu is the one for GPUs"
        )
        raise UserError(f"--device is {name}, but {cause}; use --device cpu.")
    if kind == "gpu" and index and int(index) >= gpus:
        raise UserError(f"--device is {name}, but the last GPU here is gpu:{gpus - 1}.")
    try:
        return paddle.device.set_device(name) and name
    except Exception as error:
        raise UserError(f"--device is {name}, which this PaddlePaddle doesn't have; use cpu or gpu.") from error


def load_chat(args: argparse.Namespace, on_notice: Callable[[str], None]):
    """Model and processor in a :class:`LlavaChat`; what is quick to refuse is looked at first."""
    prepare(args.debug)
    if args.conv_mode is not None:
        from paddlemix.models.llava.conversation import conv_templates

        if args.conv_mode not in conv_templates:
            raise UserError(f"--conv-mode is {args.conv_mode!r}; expected one of {', '.join(conv_templates)}.")
    from paddlemix.models.llava.adapter_files import config_of

    adapter = Path(os.path.expanduser(args.lora_path)) if args.lora_path is not None else None
    if adapter is not None and config_of(adapter) is None:
        lack = "has no lora_config.json (or adapter_config.json)" if adapter.is_dir() else "is no folder"
        raise UserError(f"--lora-path is {args.lora_path!r}, which {lack}; expected the folder of a LoRA adapter.")
    from paddlemix.models.llava.hub import resolve

    images = []
    if args.image_file is not None:
        from paddlemix.processors.images import load_image

        images = [(load_image(source), source) for source in args.image_file]

    if args.device is None and args.dtype is None:  # else these are looked at before anything is downloaded
        resolve(args.model_path)

    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    folder = resolve(args.model_path)

    from paddlemix.models.llava.chat import LlavaChat
    from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
    from paddlemix.processors.llava import LlavaProcessor

    started = time.perf_counter()
    processor = LlavaProcessor.from_pretrained(folder, adapter=adapter)
    for image, source in images if processor.image_processor is not None else ():
        processor.image_processor.check(image.size, source)
    model = LlavaLlamaForCausalLM.from_pretrained(folder, config=processor.config, dtype=dtype, lora_path=adapter)
    if args.debug:
        debug(f"model: {args.model_path} on {device} in {dtype}, {time.perf_counter() - started:.1f} s")
    chat = LlavaChat(
        model,
        processor,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_new_tokens=args.max_new_tokens,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        template=args.conv_mode,
        on_notice=on_notice,
    )
    for image, source in images:
        chat.add_image(image, source=source)
    return chat


# ---- the chat ----


def debug(text: str) -> None:
    print(f"debug: {text}", file=sys.stderr, flush=True)


def report(chat) -> None:
    """What the last answer cost, for --debug."""
    turn = chat.stats.last
    debug(f"prompt: {turn.prompt!r}")
    rate = (turn.new_tokens - 1) / max(turn.seconds - turn.seconds_to_first_token, 1e-9)
    debug(
        f"{len(turn.prompt_ids)} prompt tokens, {turn.prefilled_tokens} of them read; first token after "
        f"{turn.seconds_to_first_token:.2f} s; {turn.new_tokens} tokens in {turn.seconds:.2f} s "
        f"({rate:.1f} tokens/s); end: {turn.finish_reason}; "
        f"mean token probability {turn.mean_token_probability:.3f}"
    )


class Shell:
    """Reads lines and runs them: a question or a command."""

    def __init__(self, chat, reader, debug: bool = False):
        self.chat, self.reader, self.debug = chat, reader, debug
        self.drawn: Set[Path] = set()  # what /box has written

    def say(self, text: str) -> None:
        print(text, flush=True)

    def run(self) -> int:
        """Until the input ends; the exit status."""
        while True:
            try:
                with one_interrupt():
                    line = self.reader.read("USER: ").strip()
                    if line in ("", "exit") or line.lower() == "/exit":
                        break
                    self.turn(line)
            except EOFError:
                break
            except KeyboardInterrupt:  # the line that was being typed is gone, nothing else
                if not self.reader.interactive:
                    raise
        self.say("exit...")
        return 0

    def turn(self, line: str) -> None:
        try:
            if re.match(r"/[^\s/]+(\s|$)", line):
                self.command(line)
            else:
                self.answer(self.chat.ask(line))
        except KeyboardInterrupt:
            self.say("(stopped)")
        except BrokenPipeError:
            raise
        except UserError as error:
            self.say(f"error: {error}")
        except Exception as error:
            if self.debug:
                traceback.print_exc()
            self.say(f"error: {unexpected(error)}")

    def answer(self, pieces: Iterator[str]) -> None:
        """Shows an answer as it is made."""
        print("ASSISTANT: ", end="", flush=True)
        show(pieces, self.reader.clean)
        if self.debug:
            report(self.chat)

    def command(self, line: str) -> None:
        name, argument = [*line.split(None, 1), ""][:2]  # at any white space, the full-width one too
        name, argument = name.lower(), argument.strip()
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; /help lists them.")
        takes = COMMANDS[name][0]
        if argument and not takes:
            raise UserError(f"{name} takes nothing after it, but {argument!r} was given.")
        if not argument and takes and not takes.startswith("["):
            raise UserError(f"{name} needs a {takes} after it.")
        getattr(self, "do_" + name[1:])(unquote(argument))

    def do_help(self, _: str) -> None:
        for name, (takes, what) in COMMANDS.items():
            self.say(f"{name + ' ' + takes:<16} {what}")
        self.say("Ctrl-C stops an answer (what was said so far stays) or empties the line; Tab completes.")

    def do_image(self, source: str) -> None:
        picture = self.chat.add_image(source)
        self.say(f"The picture ({picture.size[0]} x {picture.size[1]}) goes with the next question.")

    def do_clear(self, _: str) -> None:
        self.chat.clear()
        self.say("Cleared" + (", the newest picture stays." if self.chat.picture else "."))

    def do_undo(self, _: str) -> None:
        self.say(f"Took back: {self.chat.undo()}")

    def do_retry(self, _: str) -> None:
        self.answer(self.chat.retry())

    def do_save(self, file: str) -> None:
        path = self.chat.save(named_file(file, "/save"))
        self.say(f"Saved {count(len(self.chat.rounds), 'round')} to {path}")

    def do_load(self, file: str) -> None:
        self.say(f"Loaded {count(self.chat.load(file), 'round')} from {file}")

    def do_box(self, file: str) -> None:
        from paddlemix.processors.boxes import draw_boxes, parse_boxes

        if self.chat.last_answer is None:
            raise UserError("There is no answer yet; ask something first.")
        boxes, picture = parse_boxes(self.chat.last_answer), self.chat.answered_picture
        if picture is None:
            raise UserError("There is no picture to draw on; /image brings one.")
        if not boxes:
            raise UserError("The last answer has no coordinates such as [0.10, 0.20, 0.50, 0.80].")
        path = box_file(named_file(file, "/box"), picture.source, [other.source for other in self.chat.pictures])
        image_processor = self.chat.processor.image_processor
        boxes = [image_processor.undo_box(box, picture.size) for box in boxes]
        if path.exists() and path.resolve() not in self.drawn:
            raise UserError(f"{path} exists, and /box didn't draw it in this chat; give another name.")
        self.drawn.add(path.resolve())
        try:
            draw_boxes(picture.image, boxes).save(path, format="PNG")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror or error}.") from error
        self.say(f"Drew {count(len(boxes), 'box', 'boxes')} on the picture: {path}")


def show(pieces: Iterator[str], clean: Callable[[str], str]) -> None:
    """Prints the pieces and a newline; the answer is wound up however it is left."""
    try:
        for piece in pieces:
            sys.stdout.write(clean(piece))
            sys.stdout.flush()
    finally:
        pieces.close()
        print(flush=True)


def unquote(argument: str) -> str:
    """A path as shells and file managers write it: in quotes, or with backslashes before what a shell would take apart."""
    quoted = argument[:1] in ("'", '"')
    if os.path.exists(os.path.expanduser(argument)) or not (quoted or "\\" in argument):
        return argument
    if os.name == "posix":  # elsewhere a backslash parts the folders
        try:
            words = shlex.split(argument)
        except ValueError:  # a quote that isn't closed
            words = []
        if len(words) == 1:
            return words[0]
    return argument[1:-1] if quoted and len(argument) > 1 and argument[0] == argument[-1] else argument


def named_file(file: str, command: str) -> str:
    if file.endswith(("/", os.sep)):
        raise UserError(f"{file} names a folder; {command} needs the name of a file.")
    return file


def box_file(file: str, source: Optional[str], others: Sequence[Optional[str]] = ()) -> Path:
    """Where /box saves: the given name, or a new one beside nobody's file in the current folder.

    Args:
        source: where the picture came from.
        others: where the chat's other pictures came from; the given name may be none of them.
    """
    if file:
        path = Path(os.path.expanduser(file))
        if path.is_dir():
            raise UserError(f"{file} names a folder; /box needs the name of a file.")
        if not path.suffix:
            path = path.with_suffix(".png")
        if path.suffix.lower() != ".png":
            raise UserError(
                f"/box saves a PNG, but {path.name!r} ends in {path.suffix}; give a name that ends in .png."
            )
        for held in (os.path.expanduser(name) for name in (source, *others) if name):
            if path.exists() and os.path.exists(held) and path.samefile(held):
                raise UserError(f"{path} is the picture itself; give another name.")
        return path
    stem = Path(urllib.parse.urlsplit(source).path if source and "://" in source else source or "").stem
    stem = re.sub(r"[^\w.-]+", "_", stem) or "picture"
    path, number = Path(f"{stem}-boxes.png"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-boxes-{number}.png")
    return path


def count(number: int, one: str, many: Optional[str] = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def unexpected(error: Exception) -> str:
    """A sentence about an error that nobody foresaw."""
    if isinstance(error, MemoryError):
        return "the memory is not enough."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'} (--debug shows where)."


# ---- the program ----


def answer_questions(chat, questions: List[str], debugging: bool) -> int:
    """The answers alone, one after the other; for scripts."""
    for question in questions:
        show(chat.ask(question), for_terminal if sys.stdout.isatty() else str)
        if debugging:
            report(chat)
    return 0


def start(args: argparse.Namespace) -> int:
    scripted = args.question is not None
    notes = sys.stderr if scripted else sys.stdout

    def note(text: str) -> None:
        print(f"({text})", file=notes, flush=True)

    with loading(args.model_path):
        chat = load_chat(args, note)
    demo_note = getattr(chat.config, "demo_note", None)
    if demo_note:
        note(demo_note)
    if scripted:
        return answer_questions(chat, args.question, args.debug)
    reader = open_reader({name: takes in ("FILE", "[FILE]", "PATH|URL") for name, (takes, _) in COMMANDS.items()})
    if reader.interactive and sys.stdout.isatty():
        note("/help lists the commands, an empty line ends the chat")
    return Shell(chat, reader, args.debug).run()


class loading:
    """Says at a terminal that the model is being loaded; the line is gone when it is."""

    def __init__(self, name: str):
        self.text = f"Loading {name} …" if sys.stderr.isatty() else ""

    def __enter__(self):
        if self.text:
            print(self.text, end="", file=sys.stderr, flush=True)

    def __exit__(self, *_):
        if self.text:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The exit status: 0, 1 after an error, 2 for a wrong flag, 130 after Ctrl-C outside of an answer."""
    debugging = False
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    try:
        args = parse_args(argv)
        debugging = args.debug
        return start(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answers has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debugging:
            traceback.print_exc()
        print(f"error: {unexpected(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
