"""Writes a task's images into a cache folder: decoded in parallel, all of them or none."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from adamerge.errors import AdamergeError


def write_folder(
    folder: Path,
    task: str,
    dataset: datasets.Dataset,
    column: str,
    labels: np.ndarray | None,
    transform: Callable[[Image.Image], np.ndarray],
    on_bad_image: str,
) -> None:
    """Makes `images.npy`, `labels.npy` (if there are labels) and `meta.json` in a new folder.

    Raises:
        AdamergeError: a broken image (unless `on_bad_image` is `skip`), or none that can be read.
        OSError: no space; nothing is left behind.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        good = _write_images(temporary / "images.npy", dataset, column, transform)
        bad = np.flatnonzero(~good)
        if len(bad) and on_bad_image == "error":
            raise AdamergeError(
                f"image {bad[0]} of task {task!r} cannot be decoded"
                f"{_origin(dataset, column, int(bad[0]))} ({len(bad)} such in all): mend the data "
                "or set on_bad_image=skip"
            )
        if not good.any():
            raise AdamergeError(f"no image of task {task!r} can be decoded: expected image files")
        if len(bad):
            _drop(temporary / "images.npy", good)
        if labels is not None:
            np.save(temporary / "labels.npy", labels[good])
        with (temporary / "images.npy").open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        meta = {"labelled": labels is not None, "skipped": len(bad), "sha256": content}
        (temporary / "meta.json").write_text(json.dumps(meta))
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process finished it first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_images(
    path: Path,
    dataset: datasets.Dataset,
    column: str,
    transform: Callable[[Image.Image], np.ndarray],
) -> np.ndarray:
    """Fills an .npy file in parallel; returns which images could be decoded, `[N]` bool."""

    def convert(value: Any) -> np.ndarray | None:
        try:
            return transform(_decode(value))
        except MemoryError:
            raise
        except Exception:  # decoders raise anything on a broken file; it is named by the caller
            return None

    good = np.zeros(len(dataset), dtype=bool)
    target: np.memmap | None = None
    with ThreadPoolExecutor() as pool:
        for start, values in _raw(dataset, column):
            for row, array in enumerate(pool.map(convert, values), start):
                if array is None:
                    continue
                if target is None:
                    shape = (len(dataset), *array.shape)
                    target = _allocate(path, shape)
                target[row], good[row] = array, True
    if target is not None:
        target.flush()
    return good


def _allocate(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A mapped file with its space reserved: a full disk is an error now, not a crash later."""
    target = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
    return target


def _raw(dataset: datasets.Dataset, column: str) -> Iterator[tuple[int, list[Any]]]:
    """Undecoded values, some hundreds at a time, so that one broken image breaks nothing else."""
    images = dataset.select_columns([column])
    if isinstance(images.features[column], datasets.Image):
        images = images.cast_column(column, datasets.Image(decode=False))
    for start in range(0, len(images), 256):
        yield start, images[start : start + 256][column]


def _decode(value: Any) -> Image.Image:
    if isinstance(value, dict):
        source = io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"]
        image = Image.open(source)
        image.load()
        return image
    return Image.fromarray(np.asarray(value, dtype=np.uint8))


def _origin(dataset: datasets.Dataset, column: str, row: int) -> str:
    _, values = next(_raw(dataset.select([row]), column))
    path = values[0].get("path") if isinstance(values[0], dict) else None
    return f" ({path})" if path else ""


def _drop(path: Path, good: np.ndarray) -> None:
    images = np.load(path, mmap_mode="r")
    shape = (int(good.sum()), *images.shape[1:])
    kept = _allocate(path.with_suffix(".kept"), shape)
    for new, old in enumerate(np.flatnonzero(good)):
        kept[new] = images[old]
    kept.flush()
    path.with_suffix(".kept").replace(path)
