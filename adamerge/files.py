"""Writing files whole or not at all; reading JSON within bounds; locks and hashes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from adamerge.errors import AdamergeError

_MOST_BYTES, _MOST_LEVELS = 64 * 2**20, 64  # of JSON; files that people have stay far below
_UMASK = os.umask(0o022)
os.umask(_UMASK)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well.

    If it does not, the temporary file is removed and what stood at `path` stays. The result has
    the usual permissions, whatever the writer gave it.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Puts a finished folder in the place of another, which stays until then."""
    old = folder.with_name(f"{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """An advisory lock, held by one process at a time; the system frees that of a killed process.

    Args:
        path: of the lock file, which is gone afterwards.
        waiting: called if another process holds it.
    """
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it before has removed the file: what we hold then is no one else's lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def read_json(
    path: Path, what: str = "valid JSON", mend: str = "download or save it again"
) -> dict[str, Any]:
    """The object that a JSON file holds; every file of ours and of others is read by this.

    Args:
        what: the file should be, and `mend` what to do where it is not; for messages.

    Raises:
        AdamergeError: missing, not JSON, no object, or larger or more deeply nested than any file
            that is meant to be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MB")
        found = parse_json(text)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__} where an object is expected")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise AdamergeError(f"{path} is not {what} ({reason}): {mend}") from error
    return found


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: not JSON, or nested so deeply that no program could go through it.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {_MOST_LEVELS} levels deep") from None
    level: list[Any] = [[found]]
    for _ in range(_MOST_LEVELS):
        values = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [value for value in values if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joined(digests: Iterable[str]) -> str:
    """One SHA-256 for the digests of several files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
