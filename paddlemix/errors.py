"""The one exception that a user's mistake raises, and the errors of the system that are one."""

import errno
import os
from contextlib import contextmanager
from typing import Iterator, Union

# what the disk or its rights are to blame for, or a path that was given
UNWRITABLE = frozenset(
    [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM]
    + [errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG]
)


class UserError(ValueError):
    """Bad input, told in one sentence: what was got, what was expected, which setting mends it.

    The command-line tools print the sentence and exit with status 1; no traceback is shown.
    """


@contextmanager
def naming(path: Union[str, os.PathLike]) -> Iterator[None]:
    """The system's errors inside have a file's name; one of a write, as on a full disk, has none of its own."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = os.fspath(path)
        raise
