"""A function over all rows of a data set, on all cores."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Iterator, Optional

from paddlemix.errors import UserError

__all__ = ["default_workers", "map_rows"]

CHUNK = 64  # rows that a worker takes at a time

_function: Optional[Callable[[int], Any]] = None  # of this worker process


def default_workers() -> int:
    """The cores that this process may use, shared among the ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))))


def map_rows(function: Callable[[int], Any], count: int, num_workers: Optional[int] = None) -> Iterator[Any]:
    """``function(0)``, ``function(1)``, … in order.

    Reading a row is mostly Python (JSON, templates), so processes pay and threads don't. They are forked where that is
    safe (Linux): the function and all that it holds are there at once, and nothing is imported again. They call no
    Paddle operator.

    Args:
        num_workers: processes; 0 works in this one; None is one for each core.
    """
    workers = default_workers() if num_workers is None else num_workers
    workers = min(workers, -(-count // CHUNK))
    if workers <= 1:
        yield from map(function, range(count))
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(function,))
    try:
        yield from pool.map(_call, range(count), chunksize=CHUNK)
    except BrokenProcessPool:
        raise UserError(
            f"A worker process that read the data died, perhaps for lack of memory; {workers} worked at once, so try "
            "fewer, or none to see the row (num_workers 0)."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(function: Callable[[int], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _call(index: int) -> Any:
    return _function(index)
