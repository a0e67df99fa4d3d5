"""Images, whatever they are kept in, as 8-bit pixels; within bounds, and nothing executed."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.pictures import eight_bits
from adamerge.images.source import ImageSource

log = logging.getLogger("adamerge")

Transform = Callable[[Image.Image], np.ndarray]

# What is opened, out of all that Pillow knows: its EPS reader starts Ghostscript.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("TGA", "PCX", "SGI", "ICO"),
)
_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx"),
    *(".j2c", ".avif", ".avifs", ".tga", ".pcx", ".sgi", ".ico"),
)
_LONGEST = 200  # times the short side: resizing by the short side multiplies what is too narrow
_LARGE = 1 << 24  # pixels; larger images are decoded one at a time, so that memory is bounded
_CHUNK = 256  # images that are read at a time,
_BYTES = 1 << 26  # or fewer, if those are larger than this
_one_large = threading.Lock()


def is_image(file: str | Path) -> bool:
    """Whether a file is named as an image of a kind that is read."""
    return Path(file).suffix.lower() in _ENDINGS


def decode(value: Any, then: Callable[[Image.Image], Any] = lambda image: image) -> Any:
    """An image of 8 bits per channel, upright if the file says how the camera was held.

    16 bits become 8 by their high byte, as Pillow itself reads 16-bit colours.

    Args:
        value: a file's path or content, `{"bytes": …, "path": …}`, or an array, see `pixels`.
        then: what is made of the image, while no other large one is in memory.

    Raises:
        ValueError, OSError: no image that can be read so; decoders raise other types too.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise ValueError("the row has no image")
    if not isinstance(value, bytes | str):
        array = pixels(value)
        _require_bounded(array.shape[1], array.shape[0])
        return then(Image.fromarray(array))
    if isinstance(value, str) and not stat.S_ISREG(Path(value).stat().st_mode):
        raise ValueError("not a regular file")
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    with Image.open(
        io.BytesIO(value) if isinstance(value, bytes) else value, "r", formats
    ) as image:
        _require_bounded(*image.size)
        large = image.width * image.height > _LARGE
        with _one_large if large else contextlib.nullcontext():
            image.load()
            shallow = eight_bits(image)
            ImageOps.exif_transpose(shallow, in_place=True)
            return then(shallow)


def _require_bounded(width: int, height: int) -> None:
    if max(width, height) > _LONGEST * min(width, height):
        raise ValueError(
            f"{width} × {height} pixels, expected no side over {_LONGEST} times the other"
        )


def pixels(value: Any) -> np.ndarray:
    """A uint8 array for PIL, `[H, W]`, `[H, W, 3]` or `[H, W, 4]`, of an image given as an array.

    Raises:
        ValueError: another shape, or values that are no whole numbers from 0 to 255.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iu" or array.min(initial=0) < 0 or array.max(initial=0) > 255:
        raise ValueError(f"an array of {array.dtype}, expected whole numbers from 0 to 255")
    array = array.astype(np.uint8, copy=False)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[-1] in (3, 4)):
        raise ValueError(f"an array of shape {list(array.shape)}, expected [H, W] or [H, W, 3]")
    return np.ascontiguousarray(array)


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def converted(
    task: str, source: ImageSource, column: str, transform: Transform
) -> Iterator[list[np.ndarray | str]]:
    """The images in their order, some at a time; a text says why one could not be decoded."""
    total, made = source.rows(column), functools.partial(convert, transform)
    first = _read(task, source, column, 0, 1)[0]
    first = first.get("bytes") if isinstance(first, dict) else first
    size = first.nbytes if isinstance(first, np.ndarray) else len(first or b"")  # 0 of a path
    step = max(1, min(_CHUNK, _BYTES // max(size, 1)))
    began = said = time.monotonic()
    upcoming: Iterable[np.ndarray | str] = ()
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, total + step, step):  # the next are read while these are written
            ready, upcoming = upcoming, ()
            if start < total:
                upcoming = pool.map(made, _read(task, source, column, start, start + step))
            yield list(ready)
            done, now = min(start, total), time.monotonic()
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
            f"({type(error).__name__}: {one_line(error)}): the data is damaged; get it again"
        ) from error


def convert(transform: Transform, value: Any) -> np.ndarray | str:
    """The preprocessed image, or why there is none."""
    try:
        return decode(value, transform)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        return "not in an image format that is read"
    except Exception as error:  # decoders raise anything on a broken file
        return f"{type(error).__name__}: {one_line(error, 150)}"
