"""The one exception type for mistakes a user can mend."""

from __future__ import annotations


class AdamergeError(ValueError):
    """A user's mistake: its message says what is wrong, where, what was expected, and the mend.

    The command line prints the message alone; from Python it is an ordinary `ValueError`.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most]
