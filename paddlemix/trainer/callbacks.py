"""What a run shows and writes while it goes: progress bar, train_log.jsonl, loss.png; and how it stops when asked to."""

import json
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from paddlenlp.trainer import TrainerCallback
from tqdm.auto import tqdm

from paddlemix.errors import naming

__all__ = [
    "BeginCallback",
    "LogFileCallback",
    "MetricsFileCallback",
    "ProgressCallback",
    "StopCallback",
    "read_log",
    "plot_loss",
]

logger = logging.getLogger(__name__)

LOG_FILE, PLOT_FILE = "train_log.jsonl", "loss.png"
_TIMING = ("interval_", "progress_or_epoch", "global_step")


class BeginCallback(TrainerCallback):
    """Calls ``begin`` when the checkpoint that a run goes on from has been loaded, and nothing has been written."""

    def __init__(self, begin: Callable[[], None]):
        self.begin = begin

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()


class ProgressCallback(TrainerCallback):
    """A bar with loss and time left on a terminal; lines with the same where bars are disabled.

    Args:
        disable_bar: ``disable_tqdm``.
    """

    def __init__(self, disable_bar: bool = False):
        self.disable_bar = disable_bar
        self.bar: Optional[tqdm] = None
        self.began = self.first_step = 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first_step = time.time(), state.global_step
        if args.should_log and not self.disable_bar:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not args.should_log:
            return
        if self.bar is not None:
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=True)
            elif "eval_loss" in logs:
                self.bar.write(self._line(state, logs), file=sys.stderr)
        elif "train_runtime" not in logs:
            logger.info("%s", self._line(state, logs))

    def _line(self, state, logs: Dict[str, Any]) -> str:
        shown = {k: v for k, v in logs.items() if not k.startswith(_TIMING) and not k.startswith("eval_runtime")}
        text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
        done = state.global_step - self.first_step
        left = ""
        if done and "loss" in logs:
            seconds = (time.time() - self.began) / done * (state.max_steps - state.global_step)
            left = f", {_duration(seconds)} left"
        return f"step {state.global_step}/{state.max_steps}: {text}{left}"

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class LogFileCallback(TrainerCallback):
    """Appends every log to ``train_log.jsonl``; a resumed run first drops what lies after its checkpoint."""

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir) / LOG_FILE
        kept = [entry for entry in read_log(file) if entry["step"] <= state.global_step] if state.global_step else []
        file.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6)}
        entry.update({k: v for k, v in logs.items() if k not in ("global_step", "progress_or_epoch")})
        log = Path(args.output_dir) / LOG_FILE
        with naming(log), open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class MetricsFileCallback(TrainerCallback):
    """``metrics_output_path``: every log as it is, one JSON line each, in ``metrics_rankR.json``.

    In place of PaddleNLP's writer, a process of its own that a killed run leaves behind.
    """

    def __init__(self, folder: str, rank: int):
        self.file = Path(folder) / f"metrics_rank{rank}.json"

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_local_process_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with naming(self.file), open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(logs, default=str) + "\n")


def _launcher() -> Optional[int]:
    """The process of Paddle's launcher that has started this one; None if another has, whose end means nothing."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return None
    return parent if re.search(rb"paddle.distributed.launch|fleetrun", command) else None


class StopCallback(TrainerCallback):
    """SIGTERM and Ctrl-C: the step that runs is finished, a checkpoint saved, and training stops.

    A second Ctrl-C stops at once, without saving. A launcher of several processes that is gone, as Paddle's is at the first
    signal, without a word to them, counts as SIGTERM.

    Attributes:
        signal_number: the signal that came, or None.
        stopped (bool): training ended because of it.
    """

    def __init__(self):
        self.signal_number: Optional[int] = None
        self.stopped = False
        self._previous: Dict[int, Any] = {}
        self._launcher = _launcher()
        self.any_rank = bool  # whether any rank was asked to stop; the trainer puts its own in

    def install(self) -> None:
        """Catches the signals from here on; does nothing outside the main thread, where Python can't."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def _note(self, number, frame):
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        logger.warning("%s: saving a checkpoint, then stopping.", signal.Signals(number).name)

    def asked(self) -> bool:
        """Whether to stop; all ranks must ask at the same place."""
        if self._launcher not in (None, os.getppid()) and self.signal_number is None:
            self.signal_number = signal.SIGTERM
            logger.warning("The launcher is gone: saving a checkpoint, then stopping.")
        return self.any_rank(self.signal_number is not None)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps and self.asked():
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_save = control.should_evaluate = control.should_log = False


def read_log(file: Path) -> List[Dict[str, Any]]:
    """The entries of a ``train_log.jsonl``; a last line that a kill cut short doesn't count."""
    entries = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            entries.append(entry)
    return entries


def plot_loss(folder: Path) -> Optional[Path]:
    """Draws ``loss.png`` from the folder's ``train_log.jsonl``; None if nothing was logged."""
    entries = read_log(folder / LOG_FILE)
    training = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    evaluation = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    if not training and not evaluation:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if training:
        steps, losses = zip(*training)
        axes.plot(steps, losses, linewidth=0.8, alpha=0.5 if len(training) > 50 else 1.0, label="training")
        if len(training) > 50:
            axes.plot(steps, _smooth(losses, len(losses) // 25), linewidth=1.6, color="C0")
    if evaluation:
        axes.plot(*zip(*evaluation), marker="o", color="C1", label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    partial = folder / f".{PLOT_FILE}.partial"
    figure.savefig(partial, format="png")
    partial.replace(folder / PLOT_FILE)
    return folder / PLOT_FILE


def _smooth(values, window: int) -> List[float]:
    """Mean of the last ``window`` values at each place."""
    total, out = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        out.append(total / min(i + 1, window))
    return out


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
