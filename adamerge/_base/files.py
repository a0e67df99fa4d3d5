"""Writing files whole or not at all, by one process at a time; reading small ones back."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from adamerge._base.errors import AdamergeError, one_line

_UMASK = os.umask(0o022)
os.umask(_UMASK)
LOCK = "run.lock"  # in a run's folder while a process works there
_MOST_BYTES, _MOST_LEVELS = 64 * 2**20, 64  # of JSON; files that people have stay far below


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block ends well.

    If it does not, the temporary file is removed and what stood at `path` stays; what a killed
    process left is removed by the next one. The result has the usual permissions, whatever the
    writer gave it.
    """
    clear_left(path.parent, path.name)
    while True:
        temporary = _unique(path, "tmp")
        file = temporary.open("xb")  # locked as long as it is open: the mark of one in use
        if _taken(file) and _is_at(temporary, file):  # not cleared before it was locked
            break
        file.close()
    try:
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of writing does not know it
        raise
    finally:
        temporary.unlink(missing_ok=True)
        file.close()


def clear_left(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files that killed processes left in a folder, of one name or all."""
    for left in _left(folder, "*" if name is None else glob.escape(name), "tmp"):
        with contextlib.suppress(OSError), left.open("rb") as file:
            if _taken(file):  # who writes it holds it
                left.unlink()


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its place if the block ends well.

    At every moment one of the two is there under the name. One process at a time; what a killed
    one left is removed, or put back, by the next.

    Raises:
        AdamergeError: a file has that name.
    """
    if folder.exists() and not folder.is_dir():
        raise AdamergeError(f"{folder} is a file, which stays as it is: name a new or empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    name = glob.escape(folder.name)
    with locked(folder.with_name(f"{folder.name}.lock")):
        for old in _left(folder.parent, name, "old"):
            if not folder.exists():  # killed between two renames
                old.rename(folder)
        for left in (*_left(folder.parent, name, "tmp"), *_left(folder.parent, name, "old")):
            shutil.rmtree(left, ignore_errors=True)
        temporary = _unique(folder, "tmp")
        temporary.mkdir()
        try:
            yield temporary
            if not folder.exists():
                temporary.rename(folder)
            elif not _swapped(temporary, folder):
                old = _unique(folder, "old")
                folder.rename(old)
                temporary.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _swapped(one: Path, other: Path) -> bool:
    """Exchanges two names in one step, where the system can."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*names, 2) == 0)  # RENAME_SWAP
    if not hasattr(library, "renameat2"):
        return False
    here = -100  # AT_FDCWD
    return bool(library.renameat2(here, names[0], here, names[1], 2) == 0)  # RENAME_EXCHANGE


def _unique(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _left(folder: Path, name: str, kind: str) -> list[Path]:
    """The files or folders of `_unique` names, of a pattern of names."""
    return [*folder.glob(f"{name}.????????.{kind}")]


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """An advisory lock, held by one process at a time; the system frees that of a killed process.

    Args:
        path: of the lock file, which is gone afterwards.
        waiting: called if another process holds it.
    """
    while True:
        file = path.open("a")
        if not _taken(file):
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        # Whoever held it before has removed the file: what we hold then is no one else's lock.
        if _is_at(path, file):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _taken(file: IO[Any], lock: Callable[[IO[Any], int], None] | None = None) -> bool:
    """Locks an open file if no one else has; a file system without locks is no obstacle."""
    try:
        (lock or fcntl.flock)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A run's folder, made if needed, for this process alone until the block or the process ends.

    Folders made here that are still empty afterwards are removed. The lock is the process's own:
    processes that it starts do not hold it, and the system frees that of a killed one.

    Raises:
        AdamergeError: another process works there.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        with _held(path, folder):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    finally:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()


@contextlib.contextmanager
def _held(path: Path, folder: Path) -> Iterator[None]:
    while True:
        with path.open("a+") as file:
            if not _taken(file, fcntl.lockf):
                file.seek(0)
                holder = " ".join(file.read(200).split()) or "another process"
                raise AdamergeError(
                    f"{folder} is in use by {holder}: wait until that has ended, stop it, or "
                    "choose another run_dir"
                )
            if _is_at(path, file):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}")
                file.flush()
                yield
                return


def _is_at(path: Path, file: IO[Any]) -> bool:
    """Whether an open file is the one that stands at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


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
        told = path.stat()
        if not stat.S_ISREG(told.st_mode):
            raise ValueError("no regular file")
        with path.open("rb") as file:
            text = file.read(min(told.st_size, _MOST_BYTES) + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES >> 20} MB")
        content = parse_json(text)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where an object is expected")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error, 120)
        raise AdamergeError(f"{path} is not {what} ({reason}): {mend}") from error
    return content


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: not JSON, or nested so deeply that no program could go through it.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested more than {_MOST_LEVELS} levels deep") from None
    level: list[Any] = [[content]]
    for _ in range(_MOST_LEVELS):
        values = [v for item in level for v in (item.values() if isinstance(item, dict) else item)]
        level = [value for value in values if isinstance(value, dict | list)]
    if level:
        raise ValueError(f"nested more than {_MOST_LEVELS} levels deep")
    return content


def stamp(path: Path) -> tuple[int, ...]:
    """What differs as soon as a file does; `st_ctime` cannot be set back, `st_mtime` can."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def checksum(data: bytes | memoryview) -> str:
    """A CRC-32, hexadecimal: finds what a disk or a copy has damaged, at 1 to 3 GB a second."""
    return f"{zlib.crc32(data):08x}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joined(digests: Iterable[str]) -> str:
    """One SHA-256 for the digests of several files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
