"""The one exception that a user's mistake raises, and the errors of the system that are one."""

import errno

# what the disk or its rights are to blame for, or a path that was given
UNWRITABLE = frozenset(
    [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM]
    + [errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG]
)


class UserError(ValueError):
    """Bad input, told in one sentence: what was got, what was expected, which setting mends it.

    The command-line tools print the sentence and exit with status 1; no traceback is shown.
    """
