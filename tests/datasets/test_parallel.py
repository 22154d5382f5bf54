"""Workers: everything in order, errors as they were raised, nobody left behind or waited for in vain."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.datasets.collator import LlavaCollator
from paddlemix.datasets.parallel import BatchLoader, map_rows
from paddlemix.datasets.samplers import GlobalBatchSampler, Unlabelled
from paddlemix.errors import UserError

ROOT = Path(__file__).parents[2]


class Numbers:
    """Samples of one token; some may be bad."""

    def __init__(self, size, bad=None, deadly=None):
        self.size, self.bad, self.deadly = size, bad, deadly

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index == self.bad:
            raise UserError(f"data.json:{index}: the picture is gone.")
        if index == self.deadly:
            os._exit(9)
        pixels = np.full([1, 3, 2, 2], index, "float32") if index % 2 else None
        labels = [-100] if isinstance(index, Unlabelled) else [int(index)]
        return {"input_ids": [int(index)], "labels": labels, "pixel_values": pixels, "image_sizes": [(2, 2)]}


def load(dataset, workers, batch=2, **kwargs):
    sampler = GlobalBatchSampler(dataset, batch, shuffle=False, **kwargs)
    return BatchLoader(dataset, batch_sampler=sampler, collate_fn=LlavaCollator(), num_workers=workers)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_as_tensors(workers):
    for _ in range(2):  # an epoch after the other
        loader = load(Numbers(25), workers)
        batches = list(loader)
        assert len(batches) == len(loader) == 13
        assert [row for batch in batches for row in batch["labels"].flatten().tolist()] == list(range(25))
        assert all(isinstance(tensor, paddle.Tensor) for batch in batches for tensor in batch.values())
        assert [float(batch["pixel_values"].mean()) for batch in batches[:12]] == list(range(1, 25, 2))
        assert "pixel_values" not in batches[12]


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_keep_their_kind(workers):
    loader = load(Numbers(1), workers, batch=1, accumulation_steps=3)
    assert sorted(batch["labels"].item() for batch in loader) == [-100, -100, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_sample_is_raised_as_it_is(workers):
    """Paddle's own loader waits for ever here."""
    seen = []
    with pytest.raises(UserError) as raised:
        for batch in load(Numbers(40, bad=21), workers):
            seen += batch["labels"].flatten().tolist()
    assert str(raised.value) == "data.json:21: the picture is gone."
    assert seen == list(range(20)), "what was read before the bad row is used"


def test_a_loader_can_be_left_early():
    for workers in (0, 2):
        for batch in load(Numbers(1000), workers):
            assert batch["labels"].shape == [2, 1]
            break


def test_a_worker_that_dies_is_one_sentence():
    with pytest.raises(UserError, match="worker process that read the data died"):
        list(load(Numbers(40, deadly=7), 2))
    with pytest.raises(UserError, match="worker process that read the data died"):
        list(map_rows(Numbers(200, deadly=150).__getitem__, 200, 2))


def test_map_rows():
    assert list(map_rows(str, 500, 3)) == list(map(str, range(500)))
    assert list(map_rows(str, 3, 0)) == ["0", "1", "2"]
    assert list(map_rows(str, 0, 2)) == []
    with pytest.raises(UserError, match="data.json:70: "):
        list(map_rows(Numbers(200, bad=70).__getitem__, 200, 2))


def test_workers_leave_when_their_parent_is_killed(tmp_path):
    """SIGKILL gives a run no time to end its workers."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from paddlemix.datasets.parallel import read_ahead\n"
        "def work(item):\n"
        f"    open(os.path.join({str(tmp_path)!r}, f'worker-{{os.getpid()}}'), 'w').close()\n"
        "    return item\n"
        "for item in read_ahead(work, list(range(1000)), 2):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    workers = [int(path.name.split("-")[1]) for path in tmp_path.glob("worker-*")]
    assert workers and all(_runs(worker) for worker in workers)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker is left behind"
        time.sleep(0.2)


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # one that has ended and waits to be collected
