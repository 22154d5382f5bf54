"""What the programs have in common: how they read their flags, and how they end."""

import argparse
import os
import sys
from typing import Callable

from paddlemix.errors import UNWRITABLE, UserError

__all__ = ["Parser", "exit_status"]


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
        print(f"error: {error}", file=sys.stderr)
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
