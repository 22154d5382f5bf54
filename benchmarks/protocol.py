"""What a worker does, the same for either side: one JSON request a line on stdin, one JSON answer a line on stdout.

    {"do": "load", "folder": …, "dtype": float32 or bfloat16, "device": cpu, gpu, …}
                                    -> {"seconds": to the first token of a text prompt, "peak_mb": …, "weights_mb": …}
    {"do": "save", "folder": …}     -> {}, of the side that has a layout of its own
    {"do": "chat", "turns": n}      -> {"first": [seconds to the first token of each turn], "answers": [[ids] of each turn]}
    {"do": "decode", "context": n}  -> {"tokens_per_second": …, "prefill_seconds": to the first token, "tokens": [ids]}
    {"do": "batch", "size": n}      -> {"tokens_per_second": of all rows together}

A chat's first turn is a picture and 64 tokens, each further one 32 tokens; every answer is 32 greedy tokens.
Ids and pixels are random and seeded; text and pictures are not tokenized or decoded here, so only the models differ.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np

FIRST_TOKENS, NEXT_TOKENS, ANSWER_TOKENS, DECODE_TOKENS = 64, 32, 32, 64


def question(turn: int, vocabulary: int, row: int = 0) -> List[int]:
    """The text ids of one turn; never the last id, which stands for a picture on one side."""
    random = np.random.default_rng(1000 * row + turn)
    return random.integers(5, vocabulary - 2, FIRST_TOKENS if turn == 0 else NEXT_TOKENS).tolist()


def pixels(size: int, row: int = 0) -> np.ndarray:
    """[1, 3, size, size] float32"""
    return np.random.default_rng(row).standard_normal((1, 3, size, size), dtype=np.float32)


def peak_mb() -> float:
    """Of this program alone: ``ru_maxrss`` begins with what the process that started it held."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def memory_bandwidth(seconds: float = 2.0) -> float:
    """GB/s that two threads read from memory: dot products of half a gigabyte each."""
    arrays = [np.ones(1 << 27, np.float32) for _ in range(2)]
    done = [0, 0]
    start = time.perf_counter()

    def read(which: int) -> None:
        while time.perf_counter() - start < seconds:
            np.dot(arrays[which], arrays[which])
            done[which] += 1

    threads = [threading.Thread(target=read, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) * arrays[0].nbytes / (time.perf_counter() - start) / 1e9


def serve(handlers: Dict[str, Callable[..., Dict]]) -> None:
    """Answers requests until stdin ends."""
    print(json.dumps({"ready": time.time()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = handlers[request.pop("do")](**request)
        print("ANSWER " + json.dumps(answer), flush=True)
