"""Writes a task's images into a cache folder: in parallel, in one process at a time, checked."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from adamerge._base.errors import AdamergeError
from adamerge._base.files import locked, read_json, stamp
from adamerge.images.decoding import decode
from adamerge.images.source import ImageSource

log = logging.getLogger("adamerge")

Transform = Callable[[Image.Image], np.ndarray]
Meta = dict[str, Any]

_CHUNK = 256  # images that are read at a time,
_BYTES = 1 << 26  # or fewer, if those are larger than this
_BLOCK = 1 << 24  # bytes of a checksum


def write_folder(
    folder: Path, task: str, source: ImageSource, column: str, transform: Transform
) -> Meta:
    """Makes `images.npy` and `meta.json` in a new folder and returns the latter's content.

    Images that cannot be decoded are left out, and named in `meta.json`. Everything is written to
    `<folder>.part`, which gets the folder's name when it is complete; what a killed run left there
    is written again. Only one process writes; others wait for it.

    Raises:
        AdamergeError: no image that can be decoded, or rows that cannot be read.
        OSError: no space; nothing is left behind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.part")

    def waiting() -> None:
        log.info("task %s: waiting for another process that prepares its images", task)

    with locked(folder.with_name(f"{folder.name}.lock"), waiting):
        meta = complete(folder)
        if meta is not None:  # another process has just made it
            return meta
        if folder.exists():
            log.warning("task %s: cache folder %s is damaged and made again", task, folder)
            shutil.rmtree(folder)
        _sweep(folder.parent)
        shutil.rmtree(part, ignore_errors=True)  # of a killed process: the lock is ours
        part.mkdir()
        try:
            meta = _write(part, task, source, column, transform)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return meta


def complete(folder: Path) -> Meta | None:
    """The meta.json of a finished cache folder, or None if it is missing or anything is damaged.

    All of the images are read for it, once per process: a core checks 1.7 GB/s, all cores work at
    it, and the images are in memory for the scoring, which needs them all.
    """
    try:
        meta: Meta = read_json(folder / "meta.json")
        told = meta.pop("crc32")
        images = folder / "images.npy"
        if told != _of_meta(meta) or images.stat().st_size != meta["bytes"]:
            return None
        return meta if meta["blocks"] == _blocks(images, stamp(images)) else None
    except (AdamergeError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _of_meta(meta: Meta) -> int:
    return zlib.crc32(json.dumps(meta).encode())


@functools.cache
def _blocks(path: Path, stamped: tuple[int, ...]) -> list[int]:
    """The CRC-32 of every block of a file, computed again where the stamp is another."""
    with path.open("rb") as file, ThreadPoolExecutor(_cores()) as pool:
        starts = range(0, stamped[0], _BLOCK)
        return [*pool.map(lambda at: zlib.crc32(os.pread(file.fileno(), _BLOCK, at)), starts)]


def still_broken(source: ImageSource, column: str, row: int, transform: Transform) -> bool:
    """Whether an image that could not be decoded cannot be still."""
    return isinstance(_convert(transform, source.images(column, row, row + 1)[0]), str)


def refuse(task: str, source: ImageSource, column: str, bad: dict[int, str]) -> None:
    """Raises the error that names the first broken image.

    Raises:
        AdamergeError: always.
    """
    row = min(bad)
    value = source.images(column, row, row + 1)[0]
    path = value.get("path") if isinstance(value, dict) else None
    if len(bad) == source.rows(column):
        raise AdamergeError(
            f"no image of task {task!r} can be decoded ({bad[row]}): expected image files"
        )
    raise AdamergeError(
        f"image {row} of task {task!r} cannot be decoded ({f'{path}: ' if path else ''}{bad[row]}; "
        f"{len(bad)} such in all): mend the data or set on_bad_image=skip"
    )


def _sweep(folder: Path) -> None:
    """Removes what killed runs left behind a week ago or earlier."""
    for part in folder.glob("*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 7 * 24 * 3600:
                shutil.rmtree(part)


def _write(folder: Path, task: str, source: ImageSource, column: str, transform: Transform) -> Meta:
    path, total = folder / "images.npy", source.rows(column)
    shape = transform(Image.new("RGB", (8, 8))).shape
    bad: dict[int, str] = {}
    row, low, high = 0, 255, 0
    try:
        with path.open("wb") as file:
            head = _header(total, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not later
                os.posix_fallocate(file.fileno(), 0, len(head) + total * int(np.prod(shape)))
            file.write(head)
            for images in _converted(task, source, column, transform):
                bad |= {row + i: one for i, one in enumerate(images) if isinstance(one, str)}
                row += len(images)
                good = [one for one in images if not isinstance(one, str)]
                if good:
                    file.write(np.ascontiguousarray(np.stack(good)).data)
                    low = min(low, *(int(one.min()) for one in good))
                    high = max(high, *(int(one.max()) for one in good))
            file.truncate()
            file.seek(0)
            file.write(_header(total - len(bad), shape))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if len(bad) == total:
        refuse(task, source, column, bad)
    with path.open("rb") as written:
        os.fsync(written.fileno())
        content = hashlib.file_digest(written, "sha256").hexdigest()
    meta = {
        **{"bytes": path.stat().st_size, "bad": {str(row): why for row, why in bad.items()}},
        **{"sha256": content, "low": low, "high": high, "blocks": _blocks(path, stamp(path))},
    }
    with (folder / "meta.json").open("w") as told:
        json.dump({**meta, "crc32": _of_meta(meta)}, told)
        told.flush()
        os.fsync(told.fileno())
    return meta


def _header(count: int, shape: tuple[int, ...]) -> bytes:
    """Of a .npy file; as long for any number of images."""
    header = io.BytesIO()
    kind = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(header, kind)
    return header.getvalue()


def _converted(
    task: str, source: ImageSource, column: str, transform: Transform
) -> Iterator[list[np.ndarray | str]]:
    """The images in their order, some at a time; a text says why one could not be decoded."""
    total, done = source.rows(column), 0
    convert = functools.partial(_convert, transform)
    largest = _size(_read(task, source, column, 0, 1)[0])
    step = max(1, min(_CHUNK, _BYTES // max(largest, 1)))
    began = said = time.monotonic()
    with ThreadPoolExecutor(_cores()) as pool:
        waiting: deque[Iterator[np.ndarray | str]] = deque()
        for start in range(0, total + step, step):  # read ahead of the writing
            if start < total:
                waiting.append(pool.map(convert, _read(task, source, column, start, start + step)))
            if len(waiting) > 1 or start >= total > done:
                images = list(waiting.popleft())
                done += len(images)
                yield images
            now = time.monotonic()
            if now - said >= 10:
                said, rate = now, done / (now - began)
                log.info(
                    "task %s: %d of %d images prepared, %.0f/s, %.0f s left",
                    task, done, total, rate, (total - done) / max(rate, 1e-9),
                )  # fmt: skip


def _read(task: str, source: ImageSource, column: str, start: int, stop: int) -> Sequence[Any]:
    try:
        return source.images(column, start, stop)
    except (AdamergeError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, of any library
        raise AdamergeError(
            f"rows {start} to {stop} of column {column!r} of task {task!r} cannot be read "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): the data is damaged; "
            "get it again"
        ) from error


def _size(value: Any) -> int:
    """Bytes of an undecoded image; 0 of a path."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value.nbytes if isinstance(value, np.ndarray) else len(value or b"")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _convert(transform: Transform, value: Any) -> np.ndarray | str:
    """The preprocessed image, or why there is none."""
    try:
        found: np.ndarray = decode(value, transform)
        return found
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not in an image format that is read"
    except Exception as error:  # decoders raise anything on a broken file
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
