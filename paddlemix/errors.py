"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """Bad input, told in one sentence: what was got, what was expected, which setting mends it.

    The command-line tools print the sentence and exit with status 1; no traceback is shown.
    """
