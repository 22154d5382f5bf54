"""What the two halves of stage 1 share: the optimizer with its schedule, the precision, and a checkpoint that a killed run
goes on from."""

import contextlib
import logging
import math
import os
from pathlib import Path
from typing import Any, ContextManager, Dict, List, Tuple

__all__ = ["Checkpoint", "learning_rate_at", "make_optimizer", "quick_products"]

logger = logging.getLogger("paddlemix.demo_recipe")


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, 200 at most, and half a cosine down to 0."""
    warmup = min(200, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(parameters: List[Any], steps: int, learning_rate: float) -> Tuple[Any, Any]:
    """The schedule of the learning rate, which the caller steps, and AdamW."""
    import paddle

    schedule = paddle.optimizer.lr.LambdaDecay(1.0, lambda step: learning_rate_at(step, steps, learning_rate))
    clip = paddle.nn.ClipGradByGlobalNorm(1.0)
    optimizer = paddle.optimizer.AdamW(schedule, beta2=0.98, weight_decay=0.02, parameters=parameters, grad_clip=clip)
    return schedule, optimizer


def quick_products() -> ContextManager[None]:
    """For forward and backward passes: products in bfloat16, where this CPU multiplies in it."""
    from paddlemix.models.llava.linear import bfloat16_products
    from paddlemix.models.llava.onednn import multiplies_in_bfloat16

    return bfloat16_products() if multiplies_in_bfloat16() else contextlib.nullcontext()


class Checkpoint:
    """State of a training's parts in one file.

    Args:
        path: the file.
        parts: layers and the optimizer by name; whatever has ``state_dict`` and ``set_state_dict``.
    """

    def __init__(self, path: Path, parts: Dict[str, Any]):
        self.path, self.parts = path, parts

    def restore(self) -> int:
        """The step to go on from, the parts being as they were then; 0 where there is no file."""
        import paddle

        if not self.path.is_file():
            return 0
        state = paddle.load(str(self.path))
        for name, part in self.parts.items():
            part.set_state_dict(state[name])
        step = int(state["step"])
        logger.info("going on from step %d", step)
        return step

    def save(self, step: int) -> None:
        """Written beside and renamed: a run that is killed here leaves the checkpoint before."""
        import paddle

        scratch = self.path.with_suffix(".tmp")
        state = {name: part.state_dict() for name, part in self.parts.items()}
        paddle.save({**state, "step": step}, str(scratch))
        os.replace(scratch, self.path)
