"""Chat figures of this project beside transformers, in turn, on the same random weights.

    python benchmarks/chat.py --peer-python PEER/bin/python [--shapes smollm2 tinyllama multihead] [--repeats 5]

The peer's environment holds ``torch==2.13.0 "transformers<5"``, llama.cpp's ``llama-cpp-python gguf safetensors``. All sides
use two threads and float32, and with ``--bfloat16`` the first two come in that too. Prints a Markdown table per shape, and writes all figures to ``--output`` (JSON).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OWN_LAYOUT = "paddle, own layout"


class Worker:
    """One side, alive in a process of its own, idle unless asked."""

    def __init__(self, python: str, script: str, threads: int):
        variables = dict(os.environ, OMP_NUM_THREADS=str(threads), FLAGS_paddle_num_threads=str(threads))
        self.process = subprocess.Popen(
            [python, str(HERE / script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )
        self.process.stdout.readline()

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line[len("ANSWER ") :])
        raise SystemExit(f"a worker ended with status {self.process.wait()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def measure(shape, arguments):
    """All figures of one shape: {side: {figure: number}}, and what the sides' greedy tokens say."""
    from protocol import memory_bandwidth
    from shapes import SHAPES, make_folder

    folder = str(make_folder(shape, arguments.folder, arguments.stored))
    sides = {
        "paddle": (sys.executable, "worker_paddle.py", {}),
        "transformers": (arguments.peer_python, "worker_torch.py", {"keep_cache": True}),
    }
    if arguments.bfloat16:
        sides.update(
            {f"{side}, bfloat16": (*sides[side][:2], {**sides[side][2], "dtype": "bfloat16"}) for side in list(sides)}
        )
    text_sides = dict(sides)
    if arguments.llama_python:
        text_sides["llama.cpp"] = (arguments.llama_python, "worker_llamacpp.py", {})
    figures = {side: {} for side in text_sides}
    workers = {}
    opened = {
        side: (python, script, {"folder": folder, "device": arguments.device, "dtype": extra.pop("dtype", "float32")})
        for side, (python, script, extra) in sides.items()
    }
    opened[OWN_LAYOUT] = (
        sys.executable,
        "worker_paddle.py",
        {"folder": saved_again(folder, arguments), "device": arguments.device},
    )
    loads = {side: [] for side in opened}
    for repeat in range(arguments.load_repeats):
        for side, (python, script, request) in opened.items():
            worker = Worker(python, script, arguments.threads)
            loads[side].append(worker.ask(do="load", **request))
            if side in sides and repeat + 1 == arguments.load_repeats:
                workers[side] = worker
            else:
                worker.close()
    for side, results in loads.items():
        for name in ("seconds", "peak_mb", "weights_mb"):
            figures.setdefault(side, {})["load " + name] = statistics.median(result[name] for result in results)
    if "llama.cpp" in text_sides:
        python, script, _ = text_sides["llama.cpp"]
        workers["llama.cpp"] = Worker(python, script, arguments.threads)
        workers["llama.cpp"].ask(do="load", folder=folder)

    def rounds(repeats, among=sides, **request):
        """One warm-up, then the median over repeats, the sides taking turns."""
        collected = {side: [] for side in among}
        for repeat in range(repeats + 1):
            for side, (_, _, extra) in among.items():
                answer = workers[side].ask(**request, **(extra if request["do"] == "chat" else {}))
                print(f"{request} {side}: {answer}"[:300], file=sys.stderr, flush=True)
                if repeat:
                    collected[side].append(answer)
        return collected

    same, turns = {}, arguments.turns
    if turns:
        collected = rounds(arguments.repeats, do="chat", turns=turns)
        same["chat"] = collected["paddle"][0]["answers"] == collected["transformers"][0]["answers"]
        for side, answers in collected.items():
            figures[side].update(first_tokens(answers, turns))
        stock = [
            workers["transformers"].ask(do="chat", turns=turns, keep_cache=False)
            for _ in range(arguments.stock_repeats)
        ]
        if stock:
            figures["transformers, stock"] = first_tokens(stock, turns)
    text = SHAPES[shape]
    for context in arguments.contexts:
        read = bytes_of_a_step(text, context)
        tokens = {}
        for side, answers in rounds(arguments.repeats, text_sides, do="decode", context=context).items():
            pace = statistics.median(a["tokens_per_second"] for a in answers)
            figures[side][f"decode at {context} (tokens/s)"] = pace
            figures[side][f"decode at {context} (GB/s)"] = pace * read / 1e9
            figures[side][f"prefill of {context} (s)"] = statistics.median(a["prefill_seconds"] for a in answers)
            tokens[side] = answers[0]["tokens"]
        exact = [side for side in tokens if side != "paddle" and not side.endswith("bfloat16")]
        same.update({f"{side}, {context}": tokens[side] == tokens["paddle"] for side in exact})
    if arguments.batch:
        for size in (1, arguments.batch):
            for side, answers in rounds(arguments.repeats, do="batch", size=size).items():
                figures[side][f"batch of {size} (tokens/s)"] = statistics.median(
                    a["tokens_per_second"] for a in answers
                )
    for worker in workers.values():
        worker.close()
    figures["machine"] = {"memory (GB/s)": memory_bandwidth()}
    return figures, same


def saved_again(folder, arguments):
    """The folder of the same weights as this project saves them, which it maps into memory as they are."""
    own = Path(f"{folder}_own_layout")
    if not (own / "model.safetensors").exists():
        worker = Worker(sys.executable, "worker_paddle.py", arguments.threads)
        worker.ask(do="load", folder=folder)
        worker.ask(do="save", folder=str(own))
        worker.close()
    return str(own)


def first_tokens(answers, turns):
    """Medians over several chats."""
    return {
        f"first token, turn {turn + 1} (s)": statistics.median(a["first"][turn] for a in answers)
        for turn in range(turns)
    }


def bytes_of_a_step(text, context):
    """What one step at ``context`` reads from memory: the decoder's float32 weights once, keys and values once."""
    width, layers = text["hidden_size"], text["num_hidden_layers"]
    keys = width // text["num_attention_heads"] * text["num_key_value_heads"]
    layer = 2 * width * width + 2 * width * keys + 3 * width * text["intermediate_size"]
    return 4 * (layers * layer + text["vocab_size"] * width + 2 * layers * keys * context)


def table(shape, figures, same):
    machine = figures["machine"]["memory (GB/s)"]
    sides = [side for side in figures if side != "machine"]
    lines = [f"\n### {shape}\n", "| figure | " + " | ".join(sides) + " | ratio |", "|---" * (len(sides) + 2) + "|"]
    for name in figures["paddle"]:
        values = [figures[side].get(name) for side in sides]
        ratio = values[0] / values[1] if values[1] else None
        cells = ["" if v is None else f"{v:.3g}" if v < 1000 else f"{v:.0f}" for v in values + [ratio]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(f"\nTwo threads read {machine:.1f} GB/s from this machine's memory. ratio: paddle to transformers.")
    different = [name for name, equal in same.items() if not equal]
    lines.append(f"Greedy tokens equal paddle's{': all' if not different else ', but for ' + '; '.join(different)}.")
    return "\n".join(lines)


def plot(shape, figures, folder):
    """``SHAPE_first_token.png`` over the turns and ``SHAPE_decode.png`` over the context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for file, start, label, unit in (
        ("first_token", "first token, turn ", "turn", "seconds to the first token"),
        ("decode", "decode at ", "tokens in the context", "tokens/s"),
    ):
        figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
        for side, values in figures.items():
            points = [
                (int(name[len(start) :].split()[0]), value)
                for name, value in values.items()
                if name.startswith(start) and not name.endswith("(GB/s)")
            ]
            if points:
                axes.plot(*zip(*points), marker="o", label=side)
        axes.set(xlabel=label, ylabel=unit, title=shape)
        axes.set_yscale("log" if file == "first_token" else "linear")
        if file == "decode":
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{shape}_{file}.png", dpi=100)
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, help="python of the environment with torch and transformers")
    parser.add_argument(
        "--llama-python", help="python of the environment with llama-cpp-python; leaves it out if not given"
    )
    parser.add_argument("--shapes", nargs="+", default=["smollm2"], help="smollm2, tinyllama, multihead, default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load-repeats", type=int, default=5)
    parser.add_argument("--stock-repeats", type=int, default=2, help="chats of transformers without a kept cache")
    parser.add_argument("--turns", type=int, default=8, help="of a chat; 0 leaves the chats out")
    parser.add_argument("--contexts", type=int, nargs="*", default=[64, 640, 2048])
    parser.add_argument("--batch", type=int, default=8, help="rows of the batch figure; 0 leaves it out")
    parser.add_argument("--bfloat16", action="store_true", help="measure both sides in bfloat16 too")
    parser.add_argument(
        "--stored", choices=["float32", "float16"], default="float32", help="what the weights' files hold"
    )
    parser.add_argument("--device", default="cpu", help="what Paddle and torch compute on: cpu, gpu, gpu:1, …")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"), help="where the weights are kept")
    parser.add_argument("--output", type=Path, help="JSON with all figures")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    arguments = parser.parse_args()
    if min(arguments.repeats, arguments.load_repeats) < 1:
        parser.error("--repeats and --load-repeats are 1 or more: every side has to be opened, and figures are medians")
    everything = {}
    for shape in arguments.shapes:
        figures, same = measure(shape, arguments)
        everything[shape] = figures
        print(table(shape, figures, same), flush=True)
        if arguments.plots:
            plot(shape, figures, arguments.plots)
    if arguments.output:
        arguments.output.write_text(json.dumps(everything, indent=2) + "\n")


if __name__ == "__main__":
    main()
