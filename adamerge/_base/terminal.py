"""What the commands write, safe for the terminal that shows it."""

from __future__ import annotations

import io
import logging
import sys


def printable(text: str) -> str:
    r"""A text in which all that a terminal would obey is written out: escapes, line breaks, changes
    of direction.

    >>> print(printable("a layer \x1b[31mred\n"))
    a layer \x1b[31mred\n
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class _OneLine(logging.Formatter):
    """Messages as they are, but ours printable: names in a checkpoint or a data set may be
    anything."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        message = super().formatMessage(record)
        return printable(message) if record.name.partition(".")[0] == "adamerge" else message


def set_up_logging() -> None:
    """Our log lines from INFO on, others' from WARNING on, on the standard error stream; letters
    that a stream cannot write, λ say, are written out on both."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)  # where nothing is set up yet
    logging.getLogger("adamerge").setLevel(logging.INFO)
