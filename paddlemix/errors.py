"""The one exception that a user's mistake raises, and the errors of the system that are one."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, Mapping, Union

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
        if error.filename is None and error.errno is not None:  # without a number its text is all that it says
            error.filename = os.fspath(path)
        raise


def folder_to_write(path: Union[str, os.PathLike]) -> Path:
    """The folder, made if it isn't there.

    Raises:
        UserError: it is a file, or can't be made.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"The folder to save in is {path!r}; expected its name.")
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"{folder} is a file; expected a folder to save in.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} can't be made a folder to save in: {error.strerror}.") from error
    return folder


def refuse_unbuilt(who: str, asked: Mapping[str, Any], harmless: Mapping[str, Any], instead: str) -> None:
    """Arguments that callers of other libraries write: None, and the values in ``harmless``, ask for nothing here.

    Raises:
        UserError: anything else; it ends with ``instead``.
    """
    for name, value in asked.items():
        if value is not None and (name not in harmless or value not in harmless[name]):
            raise UserError(f"{who} can't honour {name}={value!r}; {instead}")
