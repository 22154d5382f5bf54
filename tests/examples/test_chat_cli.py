"""The chat program as its user meets it: at a terminal (a pseudo-terminal), through pipes, and when it refuses to start."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pexpect
import pytest
from PIL import Image

from paddlemix.examples.llava import run_predict_multiround as program
from paddlemix.examples.llava.terminal import LineReader
from paddlemix.models.llava.chat import LlavaChat
from paddlemix.models.llava.conversation import conv_templates
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM
from paddlemix.processors.chat_template import ChatTemplate
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.trainer.adapters import add_lora
from paddlemix.trainer.weights import save_trained_weights
from tests.models import chat_models
from tests.models.chat_models import CAT

SCRIPT = Path(program.__file__)
BOX = "The cat is at [0.25, 0.25, 0.75, 0.75]."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_models.save(
        tmp_path_factory.mktemp("model"), max_position_embeddings=2048, demo_note="It can't see yet."
    )


@pytest.fixture
def environment(tmp_path):
    changes = {"PPMIX_HOME": str(tmp_path / "cache"), "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    return {**os.environ, **changes}


def run(*flags, stdin=b"", cwd, environment):
    """The program in a process of its own, started in another folder than the clone."""
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    done = subprocess.run(command, input=stdin, capture_output=True, cwd=cwd, env=environment, timeout=300)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


# ---- pipes ----


def test_a_conversation_through_pipes(folder, tmp_path, environment):
    saved = {"question": "Where is it?", "answer": BOX, "answer_ids": None, "pictures": []}
    saved = {
        "format": "paddlemix-llava-chat",
        "version": 1,
        "rounds": [saved],
        "waiting": [],
        "spare": [],
        "pictures": {},
    }
    (tmp_path / "box.json").write_text(json.dumps(saved))
    lines = [
        "你好吗? 🐱".encode(),
        b"bro\xffken \r",
        b"/nonsense",
        b"/usr/bin holds what?",
        "/image\u3000nowhere.png".encode(),  # the space of Chinese keyboards
        b"/undo",
        b"/retry",
        b"/save chat.json",
        b"/save",
        b"/save folder/",
        b"/clear",
        b"/clear now",
        b"/box",
        b"/load\tbox.json",
        b"/box",
        b"/load 'chat.json'",
        b"/HELP",
        b"  exit  ",
        b"never asked",
    ]
    flags = ["--model-path", folder, "--image-file", CAT, "--max-new-tokens", 6, "--seed", 3]
    status, out, err = run(*flags, stdin=b"\n".join(lines), cwd=tmp_path, environment=environment)
    assert status == 0 and err == ""
    note, *turns = out.split("USER: ")
    assert note == "(It can't see yet.)\n" and turns.pop() == "exit...\n"
    assert len(turns) == len(lines) - 2
    for number in (0, 1, 3, 6):
        assert turns[number].startswith("ASSISTANT: ") and turns[number].endswith("\n") and len(turns[number]) > 14
    others = [turn for number, turn in enumerate(turns) if number not in (0, 1, 3, 6)]
    assert others[:-1] == [
        "error: /nonsense is no command; /help lists them.\n",
        "error: nowhere.png doesn't exist; expected a picture file or a URL.\n",
        "Took back: /usr/bin holds what?\n",
        "Saved 2 rounds to chat.json\n",
        "error: /save needs a FILE after it.\n",
        "error: folder/ names a folder; /save needs the name of a file.\n",
        "Cleared, the newest picture stays.\n",
        "error: /clear takes nothing after it, but 'now' was given.\n",
        "error: There is no answer yet; ask something first.\n",
        "Loaded 1 round from box.json\n",
        "error: There is no picture to draw on; /image brings one.\n",
        "Loaded 2 rounds from chat.json\n",
    ]
    for command in ("/image", "/clear", "/undo", "/retry", "/save", "/load", "/box", "/help", "/exit"):
        assert f"\n{command} " in "\n" + others[-1]
    rounds = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["rounds"]
    assert [turn["question"] for turn in rounds] == ["你好吗? 🐱", "bro\ufffdken"]
    assert [len(turn["pictures"]) for turn in rounds] == [1, 0]


def test_questions_of_a_script_are_answered_and_nothing_else(folder, capsys):
    flags = ["--model_name_or_path", str(folder), "--image_file", str(CAT), "--max_new_tokens=5", "--temperature", "0"]
    status = program.main([*flags, "--debug", "--question", "What is this?", "--question", "And that?"])
    out, err = capsys.readouterr()
    assert status == 0 and len(out.splitlines()) == 2 and all(out.splitlines()) and "USER" not in out
    assert "(It can't see yet.)" in err and "<image>\\nWhat is this?" in err
    assert err.count("mean token probability 0.") == 2 and err.count("first token after") == 2
    assert "environment: " in err


def test_bfloat16_on_a_cpu(folder, capsys):
    flags = ["--model-path", str(folder), "--image-file", str(CAT), "--device", "cpu", "--dtype", "bfloat16"]
    status = program.main(
        [*flags, "--temperature", "0", "--max-new-tokens", "5", "--debug", "--question", "What is it?"]
    )
    out, err = capsys.readouterr()
    assert status == 0 and len(out.splitlines()) == 1 and "on cpu in bfloat16" in err


def test_several_pictures_go_with_the_first_question(folder, tmp_path, capsys):
    Image.new("RGB", (30, 20), "navy").save(tmp_path / "navy.png")
    flags = ["--model-path", str(folder), "--image-file", str(CAT), "--image-file", str(tmp_path / "navy.png")]
    args = program.parse_args([*flags, "--max-new-tokens", "3"])
    chat = program.load_chat(args, print)
    assert [picture.source for picture in chat.pictures] == [str(CAT), str(tmp_path / "navy.png")]
    "".join(chat.ask("Which is blue?"))
    assert [picture.size for picture in chat.rounds[0].pictures] == [(225, 150), (30, 20)]


# ---- a terminal ----


def ends_well(child):
    """Ctrl-D at the prompt."""
    child.sendeof()
    child.expect_exact("exit...")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_terminal(tmp_path, environment):
    # deep enough that an answer is still being written when it is stopped
    folder = chat_models.save(
        tmp_path / "model", max_position_embeddings=2048, num_hidden_layers=24, demo_note="It can't see yet."
    )
    flags = ["--model-path", str(folder), "--image-file", str(CAT), "--max-new-tokens", "1900", "--temperature", "0"]
    (tmp_path / "cat picture.png").write_bytes(CAT.read_bytes())
    child = pexpect.spawn(
        sys.executable,
        [str(SCRIPT), *flags],
        cwd=tmp_path,
        env=environment,
        encoding="utf-8",
        timeout=120,
        dimensions=(30, 120),
        # a suite that runs in the background may have inherited that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        child.expect_exact("USER: ")
        # what is left on the screen is the notes and the prompt
        start = child.before.rpartition("\x1b[K")[2]
        assert "(It can't see yet.)" in start and "/help" in start and "arning" not in child.before

        child.send("What is this?\r")
        child.expect_exact("ASSISTANT: ")
        child.expect(r"\S+ \S+ ")  # it streams
        child.sendintr()
        child.expect_exact("(stopped)")
        child.expect_exact("USER: ")

        child.send("half a line")
        child.expect_exact("half a line")
        child.sendintr()  # empties the line
        child.expect_exact("USER: ")

        child.send("/he\t")
        child.expect_exact("/help")
        child.send("\r")
        child.expect_exact("a further picture")
        child.expect_exact("USER: ")

        child.send("/image cat\t")  # completes to a path with a space in it
        child.expect_exact("cat picture.png")
        child.send("\r")
        child.expect_exact("goes with the next question.")
        child.expect_exact("USER: ")

        child.send("\x1b[A\x1b[A\x1b[A")  # up, three times
        child.expect_exact("What is this?")
        child.send("\x15Why?\r")  # and the line is typed anew
        child.expect_exact("ASSISTANT: ")
        child.expect(r"\S+ \S+ ")
        for _ in range(3):  # more than once: still only the answer stops
            child.sendintr()
            time.sleep(0.01)
        child.expect_exact("(stopped)")
        child.expect_exact("USER: ")

        child.send("/save chat.json\r")
        child.expect_exact("Saved 2 rounds")
        child.expect_exact("USER: ")
        ends_well(child)
    finally:
        child.close(force=True)
    rounds = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))["rounds"]
    assert [turn["question"] for turn in rounds] == ["What is this?", "Why?"]
    assert all(turn["answer"] for turn in rounds) and [len(turn["pictures"]) for turn in rounds] == [1, 1]
    history = tmp_path / "cache" / "chat_history"
    assert "+What is this?" in history.read_text(encoding="utf-8") and history.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("kind", ["dumb", "unknown"])
def test_a_terminal_that_cannot_move_its_cursor(folder, tmp_path, environment, kind):
    child = pexpect.spawn(
        sys.executable,
        [str(SCRIPT), "--model-path", str(folder), "--max-new-tokens", "4"],
        env={**environment, "TERM": kind},
        encoding="utf-8",
        timeout=60,
    )
    try:
        child.expect_exact("USER: ")
        if kind == "unknown":
            child.send("Why?\n")
            child.expect_exact("ASSISTANT: ")
            child.expect_exact("USER: ")
        ends_well(child)  # right at the prompt
    finally:
        child.close(force=True)


def test_a_terminal_gets_no_control_characters_from_the_model(monkeypatch, capsys):
    class Saying:
        def ask(self, question):
            yield "a\x1b[2Jb\tc\n\x07"

    program.answer_questions(Saying(), ["What?"], False)
    assert capsys.readouterr().out == "a\x1b[2Jb\tc\n\x07\n"  # a script gets what the model said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    program.answer_questions(Saying(), ["What?"], False)
    assert capsys.readouterr().out == "a[2Jb\tc\n\n"
    assert LineReader().clean("a\x1b[2Jb") == "a[2Jb"  # a dumb one neither


# ---- what is refused before anything is loaded ----


def test_a_refusal_is_quick_and_needs_no_installation(tmp_path, environment):
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    started = time.perf_counter()
    flags = ["--model-path", tmp_path / "nowhere", "--image-file", tmp_path / "nowhere.png"]
    status, out, err = run(*flags, cwd=tmp_path, environment=environment)
    assert status == 1 and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and "nowhere.png doesn't exist" in err
    assert time.perf_counter() - started < 5  # Paddle is not even imported


def test_another_package_of_that_name_is_not_run(tmp_path, environment):
    """Users of PaddleMIX have one installed."""
    (tmp_path / "paddlemix").mkdir()
    (tmp_path / "paddlemix" / "__init__.py").write_text("")
    environment = {**environment, "PYTHONPATH": str(tmp_path)}
    status, out, err = run("--help", cwd=tmp_path, environment=environment)
    assert status == 0 and "--image-file" in out, err


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature", "-1"], ["--temperature", "'-1'", "0 or more"]),
        (["--temperature", "nan"], ["--temperature", "0 or more"]),
        (["--top-p", "1.5"], ["--top-p", "at most 1"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "1 or more"]),
        (["--max-new-tokens", "2.5"], ["--max-new-tokens", "whole number"]),
        (["--repetition-penalty", "0"], ["--repetition-penalty", "above 0"]),
        (["--seed", "x"], ["--seed", "whole number"]),
        (["--dtype", "int8"], ["--dtype", "float32", "bfloat16"]),
        (["--fp16", "--dtype", "bfloat16"], ["--fp16", "--dtype bfloat16", "contradict"]),
        (["--device", "cpu", "--fp16"], ["float16 on CPU", "--fp16"]),
        (["--device", "the big one"], ["--device", "cpu, gpu or gpu:1"]),
        (["--question", " "], ["--question", "empty"]),
        (["--question", "--debug"], ["--question", "expected one argument"]),
        (["--model-path", ""], ["--model-path", "empty"]),
        (["--colour", "red"], ["--colour"]),
        (["--conv-mode", "vicuna_v9"], ["vicuna_v9", *conv_templates]),
        (["--lora-path", "nowhere"], ["--lora-path", "nowhere", "no folder"]),
        (["--lora-path", "."], ["--lora-path", "has no lora_config.json"]),
        (["--image-file", "nowhere.png"], ["nowhere.png", "doesn't exist"]),
        (["--image-file", "ftp://host/cat.png"], ["ftp", "http"]),
        (["--image-file", __file__], ["test_chat_cli.py", "not a picture"]),
        (["--model-path", "./nowhere"], ["./nowhere"]),
    ],
)
def test_wrong_flags_are_one_sentence(folder, capsys, flags, words):
    try:
        status = program.main(["--model-path", str(folder), *flags])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    "flags, words", [(["--fp16"], ["float16", "CPU"]), (["--device", "gpu:3"], ["gpu:3", "--device cpu"])]
)
def test_what_this_machine_lacks_is_one_sentence(folder, capsys, flags, words):
    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count():
        flags, words = ["--device", "gpu:999"], ["gpu:999", "GPUs"]
    assert program.main(["--model-path", str(folder), *flags]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    assert all(word in lines[0] for word in words)


def test_a_picture_that_the_model_cannot_take(folder, tmp_path, capsys, monkeypatch):
    thin = tmp_path / "thin.png"
    Image.new("RGB", (1, 40000)).save(thin)

    def never(*_, **__):
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(LlavaLlamaForCausalLM, "from_pretrained", never)
    assert program.main(["--model-path", str(folder), "--image-file", str(CAT), "--image-file", str(thin)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {thin} (1 x 40000 pixels) is too thin") and len(err.splitlines()) == 1


def test_half_a_checkpoint_and_a_picture_for_a_text_model(folder, tmp_path, capsys):
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert program.main(["--model-path", str(tmp_path)]) == 1
    assert "no weights" in capsys.readouterr().err
    blind = chat_models.save(tmp_path / "blind", vision_config=None)
    assert program.main(["--model-path", str(blind), "--image-file", str(CAT)]) == 1
    assert "error: The model takes text only" in capsys.readouterr().err


def test_an_adapter_that_is_not_merged(folder, tmp_path, capsys):
    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    tuned = add_lora(model, rank=4, base=str(folder))
    with paddle.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.set_value(paddle.normal(0.0, 1.0, parameter.shape))
    tuned.save_pretrained(str(tmp_path), merge_tensor_parallel=False)

    def answer(*flags):
        flags = [*map(str, flags), "--temperature", "0", "--max-new-tokens", "8", "--question", "Why?"]
        assert program.main(flags) == 0
        return capsys.readouterr().out.strip()

    plain, adapted = answer("--model-path", folder), answer("--model-path", folder, "--lora-path", tmp_path)
    chat = LlavaChat(tuned.model, LlavaProcessor.from_pretrained(folder), temperature=0, max_new_tokens=8)
    tuned.eval()
    assert adapted == "".join(chat.ask("Why?")) != plain
    assert answer("--model-path", tmp_path) == adapted  # the folder of the adapter records its base


OWN = {"conversation": ["Q: {{user}}\n", "A: {{bot}}</s>\n"], "query": "Q: {{query}}\nA:"}


@pytest.mark.parametrize(
    "name, own, prompt",
    [("llava_v0", None, "###Human: <image>\\nWhy?###Assistant:"), ("vicuna_v1", OWN, "Q: <image>\\nWhy?\\nA:")],
    ids=["named", "own"],
)
def test_an_adapter_is_asked_as_it_was_trained(folder, tmp_path, capsys, monkeypatch, name, own, prompt):
    tuned = add_lora(LlavaLlamaForCausalLM.from_pretrained(folder), rank=4, base=str(folder))
    tuned.model.config.conversation_template, tuned.model.config.image_aspect_ratio = name, "square"
    save_trained_weights(tuned, tmp_path)
    processor = LlavaProcessor.from_pretrained(folder, config=tuned.model.config, image_aspect_ratio="square")
    processor.chat_template = ChatTemplate(own) if own else None
    processor.save_pretrained(tmp_path)
    told = []
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for flags in (["--model-path", folder, "--lora-path", f"~/{tmp_path.name}"], ["--model-path", tmp_path]):
        flags = [*map(str, flags), "--image-file", str(CAT), "--temperature", "0", "--max-new-tokens", "4", "--debug"]
        assert program.main([*flags, "--question", "Why?"]) == 0
        out, err = capsys.readouterr()
        (asked,) = [line for line in err.splitlines() if line.startswith("debug: prompt: ")]
        assert asked.rstrip("'\"").endswith(prompt), asked
        told.append((asked, out))
    assert told[0] == told[1]


def test_an_adapter_is_not_applied_twice(folder, tmp_path, capsys):
    save_trained_weights(add_lora(LlavaLlamaForCausalLM.from_pretrained(folder), rank=4, base=str(folder)), tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    flags = ["--model-path", str(tmp_path), "--lora-path", str(tmp_path / "link"), "--question", "Why?"]
    assert program.main(flags) == 1
    assert "applied twice" in capsys.readouterr().err


# ---- parts that need no process of their own ----


class Lines:
    """What somebody types, one after another."""

    interactive = True

    def __init__(self, *lines):
        self.lines = list(lines)

    def read(self, prompt):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    def clean(self, text):
        return text


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """A chat whose last answer has a box, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    model, processor = chat_models.build(tmp_path / "tokenizer")
    chat = LlavaChat(model, processor, temperature=0, max_new_tokens=4)
    saved = {"question": "Where is it?", "answer": BOX, "answer_ids": None, "pictures": []}
    chat.add_image(str(CAT))
    file = chat.save(tmp_path / "chat.json")
    values = json.loads(file.read_text())
    saved["pictures"], values["waiting"] = values["waiting"], []
    file.write_text(json.dumps({**values, "rounds": [saved]}))
    chat.load(file)
    return chat


def test_box_draws_on_the_picture_and_spares_every_file(chat, tmp_path, capsys):
    (tmp_path / "chelsea_small.png").write_bytes(CAT.read_bytes())
    lines = [
        "/box",
        "/box",
        "/box out",
        "/box my\\ boxes.png",
        "/box out.jpg",
        "/box no/such/folder.png",
        "/box a.png/",
    ]
    assert program.Shell(chat, Lines(*lines)).run() == 0
    said = capsys.readouterr().out.splitlines()
    names = ["chelsea_small-boxes.png", "chelsea_small-boxes-2.png", "out.png", "my boxes.png"]
    assert said[:4] == [f"Drew 1 box on the picture: {name}" for name in names]
    assert said[4].startswith("error: /box saves a PNG") and said[5].startswith("error: no/such/folder.png can't be")
    assert said[6] == "error: a.png/ names a folder; /box needs the name of a file."
    drawn, cat = Image.open("out.png"), Image.open(CAT).convert("RGB")
    assert drawn.format == "PNG" and drawn.size == cat.size == (225, 150)
    changed = np.argwhere((np.asarray(drawn.convert("RGB")) != np.asarray(cat)).any(axis=2))
    # the model sees the picture padded to 225 x 225, with 37 rows above it
    top, left = changed.min(axis=0)
    bottom, right = changed.max(axis=0)
    assert np.abs(np.array([left, top, right, bottom]) - [56, 19, 169, 131]).max() <= 2


def test_box_never_replaces_the_picture_itself(chat, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "copy.png"
    copy.write_bytes(CAT.read_bytes())
    chat.clear()
    chat.add_image(str(copy))
    assert program.Shell(chat, Lines("/box copy.png", "What?", "/box copy.png")).run() == 0
    out = capsys.readouterr().out
    assert "error: There is no answer yet" in out and "error: The last answer has no coordinates" in out
    with pytest.raises(program.UserError, match="the picture itself"):
        program.box_file("copy.png", str(copy))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(program.UserError, match="the picture itself"):
        program.box_file("~/copy.png", "~/copy.png")
    assert copy.read_bytes() == CAT.read_bytes()


def test_box_replaces_no_file_that_it_did_not_draw(chat, tmp_path, capsys):
    mine = tmp_path / "mine.png"
    Image.new("RGB", (20, 10)).save(mine)
    before = mine.read_bytes()
    (tmp_path / "d").mkdir()
    (tmp_path / "e.png").mkdir()
    lines = ["/box mine", "/box new.png", "/box ./new", "/box d", "/box e.png", "/box e"]
    program.Shell(chat, Lines(*lines)).run()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "error: mine.png exists, and /box didn't draw it in this chat; give another name."
    assert said[1:3] == ["Drew 1 box on the picture: new.png"] * 2
    assert said[3] == "error: d names a folder; /box needs the name of a file."
    assert said[4] == "error: e.png names a folder; /box needs the name of a file."
    assert said[5].startswith("error: e.png exists") and mine.read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["e.png", "mine.png", "new.png"]
    program.Shell(chat, Lines("/box new.png")).run()  # another chat
    assert capsys.readouterr().out.startswith("error: new.png exists")


def test_a_refused_picture_leaves_the_chat_as_it_was(chat, tmp_path, capsys):
    Image.new("RGB", (1, 40000)).save(tmp_path / "thin.png")
    program.Shell(chat, Lines("/image thin.png", "Why?")).run()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("error: thin.png (1 x 40000 pixels) is too thin")
    assert said[1].startswith("ASSISTANT: ") and len(chat.rounds) == 2


def test_box_replaces_no_other_picture_of_the_chat(chat, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (20, 10)).save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    assert program.Shell(chat, Lines("/image ~/mine.png", "/box mine.png", "/box other.png")).run() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("error: mine.png is the picture itself") and said[2].endswith("other.png")
    assert (tmp_path / "mine.png").read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a backslash parts the folders")
@pytest.mark.parametrize(
    "typed",
    [
        r"my\ pics/sc\ \(1\)\'s.png",
        '"my pics/sc (1)\'s.png"',
        r"'my pics/sc (1)'\''s.png'",
        "my pics/sc (1)'s.png",
        r"~/my\ pics/sc\ \(1\)\'s.png",
    ],
)
def test_a_path_as_a_file_manager_writes_it(chat, tmp_path, capsys, monkeypatch, typed):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my pics").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "my pics" / "sc (1)'s.png")
    assert program.Shell(chat, Lines(f"/image {typed}")).run() == 0
    assert capsys.readouterr().out.startswith("The picture (20 x 10) goes with the next question.")


@pytest.mark.parametrize("word", ["/EXIT", "/Exit", "/exit", "exit", ""])
def test_words_that_end_the_chat(chat, capsys, word):
    assert program.Shell(chat, Lines(word, "/undo")).run() == 0
    assert capsys.readouterr().out == "exit...\n"


@pytest.mark.parametrize(
    "source, name",
    [
        (None, "picture-boxes.png"),
        ("https://host/some%20where/a cat.jpeg?size=2", "a_cat-boxes.png"),
        ("/somewhere/猫.webp", "猫-boxes.png"),
        ("https://host/", "picture-boxes.png"),
    ],
)
def test_the_name_of_a_boxed_picture(tmp_path, monkeypatch, source, name):
    monkeypatch.chdir(tmp_path)
    assert program.box_file("", source) == Path(name)


def test_an_unforeseen_error_ends_the_turn_and_not_the_chat(chat, capsys):
    layer = chat.model.llama.layers[0]

    def fail(layer, inputs):
        raise RuntimeError("no room\n  [Hint: out of memory]")

    hook = layer.register_forward_pre_hook(fail)
    program.Shell(chat, Lines("Why?")).run()
    hook.remove()
    program.Shell(chat, Lines(KeyboardInterrupt(), "Why?")).run()
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == ["ASSISTANT: ", "error: RuntimeError: [Hint: out of memory] (--debug shows where).", "exit..."]
    assert said[3].startswith("ASSISTANT: ") and said[4:] == ["exit..."]
    assert len(chat.rounds) == 2


def test_help_lists_every_flag_of_the_contract(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    flags = "model-path image-file conv-mode temperature top-p max-new-tokens repetition-penalty seed dtype fp16 device"
    for flag in [*flags.split(), "lora-path", "question", "debug", "model-name-or-path"]:
        assert f"--{flag}" in text
    args = program.parse_args([])
    assert (args.temperature, args.top_p, args.max_new_tokens, args.repetition_penalty) == (0.2, 1.0, 512, 1.0)
    assert args.image_file is args.conv_mode is args.seed is args.dtype is args.device is args.lora_path is None
    assert program.parse_args(["--fp16"]).dtype == "float16"
    assert program.parse_args(["--device", "cuda:1"]).device == "gpu:1"


def test_a_question_may_begin_with_a_dash():
    flags = ["--question", "-5?", "--max_new_tokens", "7", "--question", "--what_is it?", "--question", "- and_this"]
    args = program.parse_args([*flags, "--question=-x_y"])
    assert args.question == ["-5?", "--what_is it?", "- and_this", "-x_y"] and args.max_new_tokens == 7
