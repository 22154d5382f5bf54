"""What has to be set before Paddle is first imported: threads, MKL's path, a quiet start.

The entry points call these functions; ``import paddlemix`` sets nothing. A script of one's own that runs on a CPU does
well to begin with ``from paddlemix.runtime import prepare_cpu; prepare_cpu()``.
"""

import ctypes
import logging
import math
import os
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import List, Optional

from paddlemix.errors import UserError

__all__ = ["device_name", "prepare_cpu", "quiet_start"]

logger = logging.getLogger("paddlemix.runtime")

CPU_INFO = Path("/proc/cpuinfo")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/cpu.max")
NVIDIA_DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # of Linux, and of any GPU for Linux under Windows


def prepare_cpu() -> List[str]:
    """Sets the environment variables that make Paddle's CPU kernels fast; what the user has set stays.

    - ``FLAGS_paddle_num_threads`` and ``MKL_NUM_THREADS``: the cores that this process may use. Without them Paddle,
      and the oneDNN in its wheel, compute with one thread. ``OPENBLAS_NUM_THREADS`` says the same for the steps that NumPy takes; it counts
      if NumPy isn't imported yet.
    - ``OPENBLAS_THREAD_TIMEOUT=20``: NumPy's threads wait for 2^20 cycles before they sleep, not 2^26, which would take a
      core from Paddle's for the first twenty milliseconds of each turn of a chat.
    - ``MKL_DEBUG_CPU_TYPE=5``, on AMD processors only: the MKL in Paddle's wheel otherwise takes a path of SSE
      instructions there.
    - ``FLAGS_use_stride_kernel=0``, where Paddle is no build for GPUs or finds no driver of one: with views of any stride, which Paddle makes by
      itself, each transpose is copied later by a kernel that takes thirty times as long.
    - glibc's allocator keeps freed blocks of up to 32 MB: as it comes it gives every tensor of some megabytes back to
      the system at once, and half of the time of an elementwise kernel goes into fresh pages.

    Returns:
        What was set, as ``NAME=value``, for ``--debug``. Empty, with a warning, if Paddle is already imported: it
        reads these variables once.
    """
    if "paddle" in sys.modules:
        logger.warning("prepare_cpu() changes nothing, since paddle is already imported; call it before.")
        return []
    threads = str(_threads())
    wanted = {} if _user_chose_threads() else {"FLAGS_paddle_num_threads": threads, "MKL_NUM_THREADS": threads}
    if "numpy" not in sys.modules:  # whose BLAS has read these by then
        wanted.update({"OPENBLAS_NUM_THREADS": threads} if wanted else {})
        wanted["OPENBLAS_THREAD_TIMEOUT"] = "20"
    if _cpu_vendor() == "AuthenticAMD":
        wanted["MKL_DEBUG_CPU_TYPE"] = "5"
    if not _may_have_gpu():
        wanted["FLAGS_use_stride_kernel"] = "0"
    changed = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(changed)
    return [f"{name}={value}" for name, value in changed.items()] + _keep_freed_memory()


def _may_have_gpu() -> bool:
    """Asked before Paddle is imported: its package has the build in its name."""
    return _is_installed("paddlepaddle-gpu") and (os.name != "posix" or any(path.exists() for path in NVIDIA_DRIVERS))


def _is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def device_name(given: str, flag: str) -> str:
    """A device as Paddle writes it, from what users write: ``cuda`` is ``gpu``, and all CPUs are one.

    Args:
        flag: the flag or key that gave it, for the error.

    >>> device_name("CUDA:1", "--device"), device_name("cpu:0", "--device")
    ('gpu:1', 'cpu')
    """
    name = given.lower().replace("cuda", "gpu")  # the original release's word
    if not re.fullmatch(r"[a-z_]+(:\d+)?", name):
        raise UserError(f"{flag} is {given!r}; expected a name such as cpu, gpu or gpu:1.")
    return "cpu" if name.partition(":")[0] == "cpu" else name


def quiet_start() -> None:
    """Keeps the notes that Paddle and PaddleNLP write while they load out of a chat; errors still show.

    Works whether they are imported already or not. ``GLOG_minloglevel`` stays as the user has set it.
    """
    os.environ.setdefault("GLOG_minloglevel", "2")
    warnings.filterwarnings("ignore", message="No ccache found")
    warnings.filterwarnings("ignore", message="Setuptools is replacing distutils")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # PaddleNLP sets its logger's level when it is imported; a filter stays.
    paddlenlp_logger = logging.getLogger("PaddleNLP")
    if not any(isinstance(each, _ErrorsOnly) for each in paddlenlp_logger.filters):
        paddlenlp_logger.addFilter(_ErrorsOnly())


class _ErrorsOnly(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


def _keep_freed_memory() -> List[str]:
    """mallopt(M_MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD), where there is glibc and the user has set neither."""
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return []
    wanted = {"M_MMAP_THRESHOLD": (-3, 32 << 20), "M_TRIM_THRESHOLD": (-1, 512 << 20)}
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not Linux, or another C library
        return []
    return [f"{name}={size}" for name, (number, size) in wanted.items() if mallopt(number, size)]


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS, which MKL follows too, is the user's: the parent of a launched rank writes 1 there."""
    chosen = os.environ.get("OMP_NUM_THREADS")
    return chosen is not None and not (chosen == "1" and "PADDLE_LOCAL_SIZE" in os.environ)


def _threads() -> int:
    """Physical cores that this process may use: affinity and container limit count, and ranks of one machine share."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return max(1, os.cpu_count() or 1)
    cores = _physical_cores(allowed) or len(allowed)
    quota = _container_quota()
    if quota is not None:
        cores = min(cores, max(1, math.ceil(quota)))
    ranks = os.environ.get("PADDLE_LOCAL_SIZE", "1")  # set by paddle.distributed.launch
    return max(1, cores // max(1, int(ranks) if ranks.isdigit() else 1))


def _physical_cores(allowed) -> int:
    """How many cores the logical processors ``allowed`` lie on; 0 where Linux doesn't say.

    Two hyper-threads share one multiplier, so a thread for each gains nothing in a product of matrices.
    """
    cores = set()
    for number in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
        try:
            cores.add(tuple((topology / name).read_text().strip() for name in ("physical_package_id", "core_id")))
        except OSError:
            return 0
    return len(cores)


def _container_quota() -> Optional[float]:
    """Processors that a container (cgroup v2) may use at once; None without a limit."""
    try:
        quota, period = CONTAINER_LIMIT.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _cpu_vendor() -> str:
    try:
        for line in CPU_INFO.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return ""
