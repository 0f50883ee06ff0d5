"""The one exception for input that a user can mend."""


class InputError(ValueError):
    """Input that cannot be used as it is: an argument, a file, a data set, a checkpoint.

    The message names what was wanted, what came and the way out. The command line prints it without a
    traceback and ends with status 2; inside Python it is an ordinary `ValueError`.
    """


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)
