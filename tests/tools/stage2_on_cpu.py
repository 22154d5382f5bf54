"""The fine-tuning tool, with sharding's stage 2 on CPUs.

Paddle has stage 2 on GPUs and the like only, not by what it does but by what it asks: here these questions are answered as a
GPU would. Each gradient is summed as soon as it is there, as those of a real model are; Paddle would put all of a tiny one's into
one buffer. Run by paddle.distributed.launch in place of the tool.
"""

import contextlib
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddlemix.tools import supervised_finetune


class Instead:
    """A module, some of whose names are others."""

    def __init__(self, module, **names):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)


def take_cpus_for_gpus() -> None:
    import paddle
    from paddle.distributed import sharding
    from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_optimizer_stage2 as optimizer
    from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_stage2 as stage2
    from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_storage as storage
    from paddle.distributed.fleet.meta_parallel.sharding import group_sharded_utils as utils
    from paddle.distributed.sharding import group_sharded

    for module in (group_sharded, optimizer, storage, utils):
        module.paddle = Instead(paddle, get_device=lambda: "gpu:0")
    optimizer.core = Instead(optimizer.core, is_compiled_with_cuda=lambda: True)
    for module in (optimizer, stage2, storage, utils):
        module.device_guard = lambda *place, **named_place: contextlib.nullcontext()
    for module in (storage, utils):
        module.cvt_to_device = lambda x, dev_id, blocking=True: x._copy_to(paddle.CPUPlace(), blocking)
    # what .cpu() gives is the tensor itself there, which would then be emptied
    add = storage.ParamStorage._add_param_as_view
    storage.ParamStorage._add_param_as_view = lambda self, param, align, convert_gpu=True: add(
        self, param, align, False
    )
    sharding.group_sharded_parallel = functools.partial(sharding.group_sharded_parallel, buffer_max_size=1)
    supervised_finetune.refuse_sharding_on_cpu = lambda args: None


if __name__ == "__main__":
    take_cpus_for_gpus()
    sys.exit(supervised_finetune.main())
