"""Where the time of a decoding step, and of a fine-tuning step, goes on this CPU.

    python benchmarks/where_time_goes.py step --shape multihead --contexts 64 2048
    python benchmarks/where_time_goes.py train [--bfloat16]

``step`` opens the random weights of ``chat.py`` as this project saves them, ``train`` is the LoRA run of ``finetune.py``.
Operations on a CPU come back when they are done, so each is timed by the clock around it; what it calls itself and is timed
too doesn't count twice. Prints a Markdown table of milliseconds: the median step, or the mean of the steps from the third on.
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from paddlemix.runtime import prepare_cpu  # noqa: E402

prepare_cpu()

import finetune  # noqa: E402
import numpy as np  # noqa: E402
import paddle  # noqa: E402
from shapes import make_folder  # noqa: E402

from paddlemix.models.llava import attention, host_passes, lean, linear  # noqa: E402
from paddlemix.models.llava.modeling import LlavaLlamaForCausalLM  # noqa: E402
from paddlemix.tools import supervised_finetune  # noqa: E402
from paddlemix.trainer.trainer import LlavaTrainer  # noqa: E402

STEPS = 30
LOW_RANK = 32  # a matrix with a side up to it is an adapter's


class Clock:
    """Seconds by name of what was called, less what it called that is timed too."""

    def __init__(self):
        self.seconds: Dict[str, float] = defaultdict(float)
        self._inner: List[float] = []

    def watch(self, owner: Any, function: str, name: Callable[..., str]) -> None:
        """Times ``owner.function`` from now on, under what ``name`` says of its arguments."""
        called = getattr(owner, function)

        def timed(*given, **named):
            started = time.perf_counter()
            self._inner.append(0.0)
            try:
                return called(*given, **named)
            finally:
                took = time.perf_counter() - started
                self.seconds[name(*given)] += took - self._inner.pop()
                if self._inner:
                    self._inner[-1] += took

        setattr(owner, function, staticmethod(timed) if isinstance(owner, type) else timed)


def print_table(title: str, parts: Dict[str, float], whole: float) -> None:
    print(f"\n| {title} | ms |\n|---|---|")
    for name, value in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"| {name} | {value:.1f} |")
    print(f"| all else | {whole - sum(parts.values()):.1f} |\n| together | {whole:.1f} |", flush=True)


def step(arguments) -> None:
    """A token of one row after so many, in float32."""
    folder = make_folder(arguments.shape, arguments.folder)
    own = Path(f"{folder}_own_layout")
    model = LlavaLlamaForCausalLM.from_pretrained(own if own.is_dir() else folder)
    clock = Clock()
    clock.watch(host_passes, "_by_numpy", lambda *_: "products with weights")
    clock.watch(host_passes, "scores_of_few", lambda *_: "scores")
    for context in arguments.contexts:
        ids = np.random.default_rng(0).integers(5, model.config.vocab_size - 2, (1, context))
        cache = model.new_cache(1, context + STEPS + 1)
        with paddle.no_grad():
            model.prefill(model.embed(paddle.to_tensor(ids)), cache)
        held: Dict[str, List[float]] = defaultdict(list)
        for _ in range(STEPS):
            clock.seconds.clear()
            started = time.perf_counter()
            model.step(paddle.to_tensor([[7]]), cache)
            held["together"].append(1000 * (time.perf_counter() - started))
            for name, seconds in clock.seconds.items():
                held[name].append(1000 * seconds)
        medians = {name: statistics.median(values) for name, values in held.items()}
        print_table(f"{arguments.shape}, a step at {context}", medians, medians.pop("together"))


def train(arguments) -> None:
    """The tool's own run."""
    folder = arguments.folder / "finetune"
    folder.mkdir(parents=True, exist_ok=True)
    finetune.prepare(folder, rows=400)
    plan = argparse.Namespace(steps=arguments.steps, batch=4, max_length=1024)
    settings = finetune.settings(folder, plan, **finetune.LORA, bf16=arguments.bfloat16)
    (folder / "where.json").write_text(json.dumps(settings))
    clock, begun = Clock(), []

    def size(x, weight, *_):
        return "products with adapters" if min(weight.shape) <= LOW_RANK else "products with fixed weights"

    clock.watch(linear, "_multiply", size)
    clock.watch(linear, "_weight_gradient", lambda *_: "gradients of adapters and projector")
    clock.watch(linear, "_narrow", lambda *_: "rounding to bfloat16")
    for layer, name in (
        (attention._LeanAttention, "attention"),
        (lean._RMSNorm, "norms"),
        (lean._Rotate, "rotation"),
        (lean._SwiGLU, "SwiGLU"),
    ):
        for direction in ("forward", "backward"):
            clock.watch(layer, direction, lambda *_, name=name: name)
    trained = LlavaTrainer.training_step

    def training_step(trainer, *given, **named):
        if len(begun) == finetune.WARM_UP:
            clock.seconds.clear()
        begun.append(trainer)
        return trained(trainer, *given, **named)

    LlavaTrainer.training_step = training_step
    if supervised_finetune.main([str(folder / "where.json")]):
        raise SystemExit("the run failed; its message is above")
    steps = [line["interval_runtime"] for line in finetune.counted_steps(settings)]
    parts = {name: 1000 * seconds / len(steps) for name, seconds in clock.seconds.items()}
    print_table("a LoRA step" + (", bfloat16" if arguments.bfloat16 else ""), parts, 1000 * statistics.mean(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    of_step = kinds.add_parser("step", help="a decoding step")
    of_step.add_argument("--shape", default="multihead", help="smollm2, tinyllama, multihead, default")
    of_step.add_argument("--contexts", type=int, nargs="+", default=[64, 2048])
    of_train = kinds.add_parser("train", help="a fine-tuning step")
    of_train.add_argument("--steps", type=int, default=10)
    of_train.add_argument("--bfloat16", action="store_true")
    for kind, run in ((of_step, step), (of_train, train)):
        kind.add_argument(
            "--folder", type=Path, default=Path(".cache/benchmarks"), help="where weights and data are kept"
        )
        kind.set_defaults(run=run)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
