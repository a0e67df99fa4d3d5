"""A task's images, preprocessed once into a memory-mapped uint8 file.

Written in parallel, in one process at a time; every byte is checked when it is opened.
"""

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import open_clip
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from adamerge._base.errors import AdamergeError
from adamerge._base.files import locked, read_json, sha256, stamp
from adamerge.images.decoding import Transform, convert, converted, cores
from adamerge.images.labels import class_numbers
from adamerge.images.source import DatasetSource, ImageSource, image_column, label_column

log = logging.getLogger("adamerge")

Meta = dict[str, Any]

_FORMAT = 4  # of a cache folder; another number makes new folders
_FLAT = 4  # brightest and darkest pixel of a task nearer than this: no pictures
_BLOCK = 1 << 24  # bytes of a checksum
_FORGOTTEN = 7 * 24 * 3600  # seconds, after which what a killed run has left is removed


@dataclass
class TaskImages:
    """One task's preprocessed images.

    Attributes:
        images: uint8 `[N, 3, H, W]`, memory-mapped.
        labels: int64 `[N]`, or None for unlabeled data.
        key: sha256 of the preprocessed images, wherever they came from.
        skipped: how many broken images were left out.
    """

    images: np.ndarray
    labels: np.ndarray | None
    key: str
    skipped: int


def uint8_transform(cfg: open_clip.transform.PreprocessCfg) -> Transform:
    """open_clip's own inference transform up to, not including, the conversion to floats.

    Dividing by 255 and normalising the batch on the device afterwards gives the same tensor.
    """
    steps = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
    resize = Compose([step for step in steps if not isinstance(step, (ToTensor, Normalize))])
    return lambda image: np.asarray(resize(image).convert("RGB")).transpose(2, 0, 1)


def cache_images(
    task: str,
    dataset: datasets.Dataset | ImageSource,
    classes: tuple[str, ...],
    preprocess: open_clip.transform.PreprocessCfg,
    cache_dir: Path,
    on_bad_image: str = "error",
    image: str = "image",
    label: str | None = "label",
    labelled: bool = False,
) -> TaskImages:
    """The task's images as the backbone wants them, made on first use and mapped afterwards.

    Args:
        task: for messages.
        dataset: with an image column, and a label column or none.
        classes: the head's class names, to hold the labels against.
        preprocess: the backbone's preprocessing.
        cache_dir: holds one folder per content, transform and library version; a folder appears
            under its name only when it is complete.
        on_bad_image: `error`, or `skip` to leave broken images out and count them.
        image, label: column names; the default names stand for the only image column, and for
            webdataset's `cls` or the only column of class labels, where no column is named so. No
            label column means unlabeled.
        labelled: the label column was asked for by name, so its absence is an error.

    Raises:
        AdamergeError: an empty data set, missing image column, broken image, or labels that do
            not fit the classes.
        OSError: no space; nothing is left behind.
    """
    if on_bad_image not in ("error", "skip"):
        raise AdamergeError(f"on_bad_image is {on_bad_image!r}: expected 'error' or 'skip'")
    source = DatasetSource(dataset) if isinstance(dataset, datasets.Dataset) else dataset
    image = image_column(task, source, image)
    if source.rows(image) == 0:
        raise AdamergeError(f"data of task {task!r} is empty: expected at least one image")
    label = None if label is None else label_column(task, source, label, labelled)
    labels = None
    if label is not None:
        rows, count = source.rows(image), source.rows(label)
        if count != rows:
            raise AdamergeError(
                f"data of task {task!r} has {rows} images in {image!r} but {count} labels in "
                f"{label!r}: expected one for each; mend data.label"
            )
        values, names = source.labels(label)
        labels = class_numbers(task, label, values, names, classes)
    transform = uint8_transform(preprocess)
    libraries = [version(name) for name in ("pillow", "torchvision", "open_clip_torch")]
    parts = json.dumps([_FORMAT, source.key(image), repr(preprocess), libraries])
    folder = cache_dir / "images" / hashlib.sha256(parts.encode()).hexdigest()[:32]
    meta = complete(folder)
    if meta and meta["bad"] and on_bad_image == "error":
        first = min(map(int, meta["bad"]))
        if not isinstance(convert(transform, source.images(image, first, first + 1)[0]), str):
            shutil.rmtree(folder)  # mended, though the file is as large and old as it was
            meta = None
    if meta is None:
        meta = write_folder(folder, task, source, image, transform)
    bad = {int(row): reason for row, reason in meta["bad"].items()}
    if bad and on_bad_image == "error":
        raise _refusal(task, source, image, bad)
    if bad:
        log.warning("task %s: %d broken images were skipped", task, len(bad))
    images = np.load(folder / "images.npy", mmap_mode="r")
    size = meta["bytes"] / 1e6
    log.info("task %s: %d images, %.0f MB in %s", task, len(images), size, folder)
    if meta["high"] - meta["low"] < _FLAT:
        log.warning(
            "task %s: the pixels of all %d images lie between %d and %d of 255: are they pictures, "
            "of 8 bits?",
            task, len(images), meta["low"], meta["high"],
        )  # fmt: skip
    kept = None if labels is None else np.delete(labels, sorted(bad))
    return TaskImages(images, kept, meta["sha256"], len(bad))


def write_folder(
    folder: Path, task: str, source: ImageSource, column: str, transform: Transform
) -> Meta:
    """Makes `images.npy` and `meta.json` in a new folder and returns the latter's content.

    Images that cannot be decoded are left out, and named in `meta.json`. Everything is written to
    `<folder>.part`, which gets the folder's name when it is complete; what a killed run left there
    is written again. Only one process writes; others wait for it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.part")
    waiting = "task %s: waiting for another process that prepares its images"
    with locked(folder.with_name(f"{folder.name}.lock"), lambda: log.info(waiting, task)):
        meta = complete(folder)
        if meta is not None:  # another process has just made it
            return meta
        if folder.exists():
            log.warning("task %s: cache folder %s is damaged and made again", task, folder)
            shutil.rmtree(folder)
        for left in folder.parent.glob("*.part"):  # of killed processes: the lock is ours
            with contextlib.suppress(OSError):
                if left == part or time.time() - left.stat().st_mtime > _FORGOTTEN:
                    shutil.rmtree(left)
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
        told, images = meta.pop("crc32"), folder / "images.npy"
        if told != _crc32(meta) or images.stat().st_size != meta["bytes"]:
            return None
        return meta if meta["blocks"] == _blocks(images, stamp(images)) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _crc32(meta: Meta) -> int:
    return zlib.crc32(json.dumps(meta).encode())


@functools.cache
def _blocks(path: Path, stamped: tuple[int, ...]) -> list[int]:
    """The CRC-32 of every block of a file, computed again where the stamp is another."""
    with path.open("rb") as file, ThreadPoolExecutor(cores()) as pool:
        starts = range(0, stamped[0], _BLOCK)
        return [*pool.map(lambda at: zlib.crc32(os.pread(file.fileno(), _BLOCK, at)), starts)]


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
            for images in converted(task, source, column, transform):
                bad |= {row + i: one for i, one in enumerate(images) if isinstance(one, str)}
                row += len(images)
                good = [one for one in images if not isinstance(one, str)]
                if good:
                    stacked = np.ascontiguousarray(np.stack(good))
                    file.write(stacked.data)
                    low, high = min(low, int(stacked.min())), max(high, int(stacked.max()))
            file.truncate()
            file.seek(0)
            file.write(_header(total - len(bad), shape))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)
        raise
    if len(bad) == total:
        raise _refusal(task, source, column, bad)
    meta = {
        **{"bytes": path.stat().st_size, "bad": {str(row): why for row, why in bad.items()}},
        **{"sha256": sha256(path), "low": low, "high": high, "blocks": _blocks(path, stamp(path))},
    }
    (folder / "meta.json").write_text(json.dumps({**meta, "crc32": _crc32(meta)}))
    return meta


def _header(count: int, shape: tuple[int, ...]) -> bytes:
    """Of a .npy file; as long for any number of images."""
    header = io.BytesIO()
    kind = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(header, kind)
    return header.getvalue()


def _refusal(task: str, source: ImageSource, column: str, bad: dict[int, str]) -> AdamergeError:
    """Names the first broken image."""
    row = min(bad)
    if len(bad) == source.rows(column):
        return AdamergeError(
            f"no image of task {task!r} can be decoded ({bad[row]}): expected image files"
        )
    value = source.images(column, row, row + 1)[0]
    path = value.get("path") if isinstance(value, dict) else None
    return AdamergeError(
        f"image {row} of task {task!r} cannot be decoded ({f'{path}: ' if path else ''}{bad[row]}; "
        f"{len(bad)} such in all): mend the data or set on_bad_image=skip"
    )
