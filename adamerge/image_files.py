"""Writes a task's images into a cache folder: in parallel, in one process at a time, resumably."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from adamerge.decoding import decode
from adamerge.errors import AdamergeError
from adamerge.files import locked
from adamerge.image_source import ImageSource
from adamerge.staging import Staging, allocate

log = logging.getLogger("adamerge")

Transform = Callable[[Image.Image], np.ndarray]
Meta = dict[str, Any]

_CHUNK = 256  # images between two entries of the record: what a kill can cost


def write_folder(
    folder: Path,
    task: str,
    source: ImageSource,
    column: str,
    transform: Transform,
    on_bad_image: str,
) -> Meta:
    """Makes `images.npy` and `meta.json` in a new folder and returns the latter's content.

    Images go to `<folder>.part` first, with a record of how many are safely on the disk; a killed
    run leaves it there and the next one goes on from it. The folder gets its name when it is
    complete. Only one process writes; others wait for it.

    Raises:
        AdamergeError: a broken image (unless `on_bad_image` is `skip`), or none that can be read.
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
        try:
            shape = transform(Image.new("RGB", (8, 8))).shape
            staging = Staging.open(part, (source.rows(column), *shape))
            _fill(staging, task, source, column, transform)
            if staging.bad and on_bad_image == "error":
                refuse(task, source, column, staging.bad)
            if len(staging.bad) == source.rows(column):
                shutil.rmtree(part)
                refuse(task, source, column, staging.bad)
            meta = _finish(staging)
            part.rename(folder)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return meta


def complete(folder: Path) -> Meta | None:
    """The meta.json of a finished cache folder, or None if it is missing or damaged."""
    try:
        meta: Meta = json.loads((folder / "meta.json").read_text())
        size = (folder / "images.npy").stat().st_size
        return meta if size == meta["bytes"] and "sha256" in meta and "bad" in meta else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


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
    """Removes what killed runs left behind and no run has gone on with for a week."""
    for part in folder.glob("*.part"):  # every record touches the folder
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > 7 * 24 * 3600:
                shutil.rmtree(part)


def _fill(
    staging: Staging, task: str, source: ImageSource, column: str, transform: Transform
) -> None:
    """Decodes what the record does not have yet, and tries the broken ones again."""
    total, first = source.rows(column), staging.done
    if first:
        log.info("task %s: going on from image %d of %d", task, first, total)
    convert = functools.partial(_convert, transform)
    began = said = time.monotonic()
    with ThreadPoolExecutor(_cores()) as pool:
        for row in list(staging.bad):
            staging.mend(row, convert(source.images(column, row, row + 1)[0]))
        waiting: deque[Iterator[np.ndarray | str]] = deque()
        for start in range(first, total + _CHUNK, _CHUNK):  # read one chunk ahead of the writing
            if start < total:
                waiting.append(pool.map(convert, source.images(column, start, start + _CHUNK)))
            if len(waiting) > 1 or start >= total > staging.done:
                staging.add(list(waiting.popleft()))
            now = time.monotonic()
            if now - said >= 10:
                said, rate = now, (staging.done - first) / (now - began)
                log.info(
                    "task %s: %d of %d images prepared, %.0f/s, %.0f s left",
                    task, staging.done, total, rate, (total - staging.done) / max(rate, 1e-9),
                )  # fmt: skip


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _convert(transform: Transform, value: Any) -> np.ndarray | str:
    """The preprocessed image, or why there is none."""
    try:
        return transform(decode(value))
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not in an image format that is read"
    except Exception as error:  # decoders raise anything on a broken file
        return f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"


def _finish(staging: Staging) -> Meta:
    path = staging.folder / "images.npy"
    if staging.bad:
        _drop(path, np.array(sorted(staging.bad)))
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    meta = {"bytes": path.stat().st_size, "bad": staging.bad, "sha256": content}
    with (staging.folder / "meta.json").open("w") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())
    return complete(staging.folder) or meta


def _drop(path: Path, bad: np.ndarray) -> None:
    images = np.load(path, mmap_mode="r")
    good = np.delete(np.arange(len(images)), bad)
    kept = allocate(path.with_suffix(".kept"), (len(good), *images.shape[1:]))
    for new, old in enumerate(good):
        kept[new] = images[old]
    kept.flush()
    path.with_suffix(".kept").replace(path)
