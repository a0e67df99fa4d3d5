"""A task's images, preprocessed once into a memory-mapped uint8 file."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
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
from adamerge.images.cache_files import complete, refuse, still_broken, write_folder
from adamerge.images.labels import class_numbers
from adamerge.images.source import ImageSource, as_source

log = logging.getLogger("adamerge")

_FORMAT = 3  # of a cache folder; another number makes new folders
_FLAT = 4  # brightest and darkest pixel of a task nearer than this: no pictures


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


def uint8_transform(cfg: open_clip.transform.PreprocessCfg) -> Callable[[Image.Image], np.ndarray]:
    """open_clip's own inference transform up to, not including, the conversion to floats.

    Dividing by 255 and normalising the batch on the device afterwards gives the same tensor.
    """
    steps = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
    kept = [step for step in steps if not isinstance(step, (ToTensor, Normalize))]
    resize = Compose(kept)

    def apply(image: Image.Image) -> np.ndarray:
        return np.asarray(resize(image).convert("RGB")).transpose(2, 0, 1)

    return apply


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
    """
    if on_bad_image not in ("error", "skip"):
        raise AdamergeError(f"on_bad_image is {on_bad_image!r}: expected 'error' or 'skip'")
    source = as_source(dataset)
    image = _image_column(task, source, image)
    if source.rows(image) == 0:
        raise AdamergeError(f"data of task {task!r} is empty: expected at least one image")
    labels = _labels(task, source, image, _label_column(task, source, label, labelled), classes)
    folder = cache_dir / "images" / _key(source, image, preprocess)
    transform = uint8_transform(preprocess)
    meta = complete(folder)
    if meta and meta["bad"] and on_bad_image == "error":
        first = min(map(int, meta["bad"]))
        if not still_broken(source, image, first, transform):  # mended, and as large and old
            shutil.rmtree(folder)
            meta = None
    if meta is None:
        meta = write_folder(folder, task, source, image, transform)
    bad = {int(row): reason for row, reason in meta["bad"].items()}
    if bad and on_bad_image == "error":
        refuse(task, source, image, bad)
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


def _image_column(task: str, source: ImageSource, column: str) -> str:
    if column not in source.columns and column == "image":
        usual = source.usual("image")
        if len(usual) == 1:
            log.info("task %s: images from column %r", task, usual[0])
            column = usual[0]
    if column not in source.columns:
        raise AdamergeError(
            f"data of task {task!r} has no image column {column!r}: its columns are "
            f"{', '.join(source.columns)}; set data.image"
        )
    if not source.holds_images(column):
        first = next(iter(source.images(column, 0, 1)), None)
        texts = f" but texts such as {first[:60]!r}" if isinstance(first, str) else ""
        raise AdamergeError(
            f"column {column!r} of task {task!r} holds no images{texts}: expected image files or "
            f"uint8 arrays; its columns are {', '.join(source.columns)}; mend data.image"
        )
    return column


def _label_column(task: str, source: ImageSource, column: str | None, asked: bool) -> str | None:
    if column is None:
        return None
    if column not in source.columns and not asked:
        usual = source.usual("label")
        if len(usual) == 1:
            log.info("task %s: labels from column %r", task, usual[0])
            return usual[0]
        columns = ", ".join(source.columns)
        log.info("task %s: no labels (columns: %s); data.label names a column", task, columns)
        return None
    if column not in source.columns:
        raise AdamergeError(
            f"data of task {task!r} has no label column {column!r}: its columns are "
            f"{', '.join(source.columns)}; mend data.label, or leave it out"
        )
    fields = [name for name in source.columns if name.startswith(f"{column}.")]
    if fields:
        raise AdamergeError(
            f"label column {column!r} of task {task!r} has several fields: set data.label to one "
            f"of {', '.join(fields)}"
        )
    return column


def _labels(
    task: str, source: ImageSource, image: str, column: str | None, classes: tuple[str, ...]
) -> np.ndarray | None:
    if column is None:
        return None
    images, count = source.rows(image), source.rows(column)
    if count != images:
        raise AdamergeError(
            f"data of task {task!r} has {images} images in {image!r} but {count} labels in "
            f"{column!r}: expected one for each; mend data.label"
        )
    values, names = source.labels(column)
    return class_numbers(task, column, values, names, classes)


def _key(source: ImageSource, column: str, preprocess: Any) -> str:
    libraries = [version(name) for name in ("pillow", "torchvision", "open_clip_torch")]
    parts = [_FORMAT, source.key(column), repr(preprocess), libraries]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
