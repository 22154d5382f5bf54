"""What the entry points set before Paddle is imported."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paddlemix import runtime

ROOT = Path(__file__).parents[1]
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
SHORT_WAIT = "OPENBLAS_THREAD_TIMEOUT=20"  # numpy's threads leave the cores to Paddle's
NAMES = (
    "FLAGS_paddle_num_threads",
    "FLAGS_use_stride_kernel",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "OPENBLAS_THREAD_TIMEOUT",
    "MKL_DEBUG_CPU_TYPE",
    "OMP_NUM_THREADS",
    "PADDLE_LOCAL_SIZE",
)


def run(code, **environment):
    """Runs code in a fresh interpreter whose environment has none of NAMES but those given."""
    kept = {name: value for name, value in os.environ.items() if name not in (*NAMES, "GLOG_minloglevel")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}
    )


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Before Paddle's import, on a machine of eight cores; returns a function that describes it further."""
    for name in ("paddle", "numpy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    # takes note of each name, so that what prepare_cpu() sets is undone
    for name in (*NAMES, *ALLOCATOR[:2]):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(ALLOCATOR[2], "")  # the user's word on the allocator, so that this process keeps its own
    monkeypatch.setattr(runtime.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(runtime, "_physical_cores", lambda allowed: len(allowed))

    def describe(vendor="GenuineIntel", limit=None, nvidia=True, build="paddlepaddle-gpu"):
        monkeypatch.setattr(runtime, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(runtime, "CONTAINER_LIMIT", tmp_path / "cpu.max")
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 25\n")
        driver = tmp_path / "nvidiactl"
        monkeypatch.setattr(runtime, "NVIDIA_DRIVERS", (driver,))
        monkeypatch.setattr(runtime, "_is_installed", lambda name: build == name)
        driver.touch() if nvidia else driver.unlink(missing_ok=True)
        if limit is not None:
            (tmp_path / "cpu.max").write_text(limit + "\n")

    describe()
    return describe


def test_threads_are_set(machine):
    threads = ["FLAGS_paddle_num_threads=8", "MKL_NUM_THREADS=8", "OPENBLAS_NUM_THREADS=8"]
    assert runtime.prepare_cpu() == [*threads, SHORT_WAIT]
    assert os.environ["FLAGS_paddle_num_threads"] == os.environ["MKL_NUM_THREADS"] == "8"


def test_numpys_threads_count_only_before_its_import(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", object())
    assert runtime.prepare_cpu() == ["FLAGS_paddle_num_threads=8", "MKL_NUM_THREADS=8"]


def test_the_allocator_keeps_what_is_freed():
    fresh = "from paddlemix.runtime import prepare_cpu; print(prepare_cpu()[-2:])"
    assert run(fresh).stdout == "['M_MMAP_THRESHOLD=33554432', 'M_TRIM_THRESHOLD=536870912']\n"
    assert "M_TRIM_THRESHOLD" not in run(fresh, MALLOC_TRIM_THRESHOLD_="1000000").stdout


def test_views_are_copied_at_once_where_there_is_no_gpu(machine):
    assert "FLAGS_use_stride_kernel=0" not in runtime.prepare_cpu()
    machine(nvidia=False)
    assert "FLAGS_use_stride_kernel=0" in runtime.prepare_cpu()


def test_a_build_for_cpus_computes_there_whatever_the_machine_has(machine):
    machine(build="paddlepaddle")
    assert "FLAGS_use_stride_kernel=0" in runtime.prepare_cpu()


def test_mkl_path_is_for_amd_only(machine):
    assert not any("MKL_DEBUG" in line for line in runtime.prepare_cpu())
    machine(vendor="AuthenticAMD")
    assert "MKL_DEBUG_CPU_TYPE=5" in runtime.prepare_cpu()


def test_what_the_user_has_set_stays(machine, monkeypatch):
    machine(vendor="AuthenticAMD")
    monkeypatch.setenv("FLAGS_paddle_num_threads", "3")
    monkeypatch.setenv("MKL_DEBUG_CPU_TYPE", "4")
    assert runtime.prepare_cpu() == ["MKL_NUM_THREADS=8", "OPENBLAS_NUM_THREADS=8", SHORT_WAIT]
    assert (os.environ["FLAGS_paddle_num_threads"], os.environ["MKL_DEBUG_CPU_TYPE"]) == ("3", "4")


def test_omp_threads_of_the_user_rule(machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert runtime.prepare_cpu() == [SHORT_WAIT]


def test_ranks_of_one_machine_share_its_cores(machine, monkeypatch):
    monkeypatch.setenv("PADDLE_LOCAL_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the launcher has imported paddle, which wrote that
    threads = ["FLAGS_paddle_num_threads=2", "MKL_NUM_THREADS=2", "OPENBLAS_NUM_THREADS=2"]
    assert runtime.prepare_cpu() == [*threads, SHORT_WAIT]


@pytest.mark.parametrize(("limit", "threads"), [("max 100000", 8), ("250000 100000", 3), ("50000 100000", 1)])
def test_limit_of_a_container_counts(machine, limit, threads):
    machine(limit=limit)
    assert runtime.prepare_cpu()[0] == f"FLAGS_paddle_num_threads={threads}"


def test_too_late_is_said(machine, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "paddle", object())
    with caplog.at_level(logging.WARNING):
        assert runtime.prepare_cpu() == []
    assert "already imported" in caplog.text and "FLAGS_paddle_num_threads" not in os.environ


def test_paddle_takes_the_threads():
    done = run(
        "import os\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from paddlemix.runtime import prepare_cpu, quiet_start\n"
        "one = prepare_cpu(); quiet_start()\n"
        "import paddle\n"
        "print(one[0], paddle.get_flags('FLAGS_paddle_num_threads'))"
    )
    assert done.stdout == "FLAGS_paddle_num_threads=1 {'FLAGS_paddle_num_threads': 1}\n", done.stderr


def test_start_is_quiet_and_errors_still_show():
    done = run(
        "from paddlemix.runtime import prepare_cpu, quiet_start\n"
        "prepare_cpu(); quiet_start()\n"
        "from paddlenlp.transformers import PretrainedModel\n"
        "from paddlenlp.utils.log import logger\n"
        "logger.info('chatter'); logger.warning('murmur'); logger.error('disaster')"
    )
    assert done.returncode == 0 and done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.strip()] == [
        line for line in done.stderr.splitlines() if "disaster" in line
    ]
    assert "disaster" in done.stderr
