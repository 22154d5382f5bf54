"""Worker processes that read rows: all of a dataset at once (``map_rows``), or batch by batch (``BatchLoader``)."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, Optional, Sized

from paddlemix.errors import UserError

__all__ = ["BatchLoader", "default_workers", "map_rows"]

CHUNK = 64  # rows that a worker of map_rows takes at a time
AHEAD = 2  # batches that each worker of a BatchLoader may be ahead

_function: Optional[Callable[[Any], Any]] = None  # of this worker process


def default_workers() -> int:
    """The cores that this process may use, shared among the ranks on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, int(os.environ.get("PADDLE_LOCAL_SIZE", "1"))))


def map_rows(function: Callable[[int], Any], count: int, num_workers: Optional[int] = None) -> Iterator[Any]:
    """``function(0)``, ``function(1)``, … in order.

    Reading a row is mostly Python (JSON, templates), so processes pay and threads don't.

    Args:
        num_workers: processes; 0 works in this one; None is one for each core.

    Raises:
        UserError: a worker died.
    """
    workers = default_workers() if num_workers is None else num_workers
    workers = min(workers, -(-count // CHUNK))
    if workers <= 1:
        yield from map(function, range(count))
        return
    pool = _start_pool(function, workers)
    try:
        yield from pool.map(_call, range(count), chunksize=CHUNK)
    except BrokenProcessPool:
        raise _died(workers) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class BatchLoader:
    """Batches of a dataset, read ahead of the training.

    It is what ``paddle.io.DataLoader`` is for, and used in its place since that one (Paddle 3.3.1) waits for ever when
    a sample raises an error, and may do so when its workers are forked after a loader without workers has run.

    Args:
        dataset: map style.
        batch_sampler: gives lists of indices, and has a length.
        collate_fn: a list of samples -> a dict of arrays.
        num_workers: processes that read; 0 reads in a thread beside the training.

    Iterating gives dicts of tensors on the current device. An error that a sample raises is raised here.
    """

    def __init__(self, dataset: Any, *, batch_sampler: Any, collate_fn: Callable, num_workers: int = 0):
        self.dataset, self.batch_sampler, self.collate_fn = dataset, batch_sampler, collate_fn
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        import paddle

        for arrays in read_ahead(self._read, self.batch_sampler, self.num_workers):
            yield {key: paddle.to_tensor(array) for key, array in arrays.items()}

    def _read(self, indices: List[int]) -> Dict[str, Any]:
        return self.collate_fn([self.dataset[index] for index in indices])


def read_ahead(function: Callable[[Any], Any], items: Iterable[Any], num_workers: int) -> Iterator[Any]:
    """``function`` of each item, in order, computed ahead by processes, or by one thread if ``num_workers`` is 0."""
    workers = min(num_workers, len(items)) if isinstance(items, Sized) else num_workers
    pool: Executor = _start_pool(function, workers) if workers else ThreadPoolExecutor(1, "paddlemix-read")
    call = _call if workers else function
    waiting: Deque[Any] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) > AHEAD * max(workers, 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise _died(workers) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_pool(function: Callable[[Any], Any], workers: int) -> ProcessPoolExecutor:
    """Processes that call ``function``.

    They are forked where that is safe (Linux): the function and all that it holds are there at once, and nothing is
    imported again. They call no Paddle operator.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(function, os.getpid()))


def _start_worker(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and not with the parent's handler, which would save a checkpoint
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    """Ends this worker once its parent is gone: one that was killed can't tell its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)


def _died(workers: int) -> UserError:
    return UserError(
        f"A worker process that read the data died, perhaps for lack of memory; {workers} worked at once, so try fewer, or "
        "none to see the row (check_dataset.py --num_workers 0, dataloader_num_workers 0)."
    )
