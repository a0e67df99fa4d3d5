"""The one exception type for mistakes a user can mend."""

from __future__ import annotations


class AdamergeError(ValueError):
    """A user's mistake: its message says what is wrong, where, what was expected, and the mend.

    The command line prints the message alone; from Python it is an ordinary `ValueError`.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """What an error says, on one line of at most so many characters."""
    return " ".join(str(error).split())[:most]


def printable(text: str) -> str:
    """A text in which all that a terminal would obey is written out: escapes, line breaks, changes
    of direction.

    >>> print(printable("a layer \x1b[31mred\n"))
    a layer \x1b[31mred\n
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
