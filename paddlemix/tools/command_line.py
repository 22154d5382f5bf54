"""What the programs have in common: how they read their flags, what they compute in, and how they end."""

import argparse
import os
import sys
from typing import Callable, Optional

from paddlemix.errors import UNWRITABLE, UserError

__all__ = ["Parser", "choose_dtype", "exit_status", "refuse_float16_on_cpu"]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, and exits with status 2."""

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags).\n")


def exit_status(work: Callable[[], int], interrupted: str = "stopped") -> int:
    """What ``work`` returns; 1 after a mistake or a full disk, with one sentence on standard error, and 130 after Ctrl-C.

    Args:
        interrupted: what is said after Ctrl-C.
    """
    try:
        return work()
    except UserError as error:
        text = f"error: {error}".encode("utf-8", "backslashreplace").decode("utf-8")  # half a surrogate pair in a name
        print(text, file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {error.filename or 'a file'} can't be written: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def refuse_float16_on_cpu(dtype: Optional[str]) -> None:
    if dtype == "float16":
        raise UserError(
            "Paddle has no float16 on CPU; leave --dtype and --fp16 out, or use --dtype bfloat16 or --device gpu."
        )


def choose_dtype(name: Optional[str], device: str) -> str:
    """The asked dtype, or the best of the device: bfloat16, float16 or float32; on a CPU float32, which is exact."""
    import paddle

    if device == "cpu":
        refuse_float16_on_cpu(name)
        if name == "bfloat16":
            from paddlemix.models.llava.onednn import have_bfloat16

            if not have_bfloat16():
                raise UserError("--dtype is bfloat16, which this CPU can't multiply; leave it out for float32.")
        return name or "float32"
    supported = {"bfloat16": paddle.amp.is_bfloat16_supported, "float16": paddle.amp.is_float16_supported}
    if name is None:
        return next((dtype for dtype, check in supported.items() if check()), "float32")
    if name in supported and not supported[name]():
        raise UserError(f"--dtype is {name}, which the device {device} doesn't support; use --dtype float32.")
    return name
