"""A task's images, preprocessed once into a memory-mapped uint8 file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
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

from adamerge.errors import AdamergeError
from adamerge.image_files import write_folder

log = logging.getLogger("adamerge")

_FORMAT = 1  # of a cache folder; another number makes new folders


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
    dataset: datasets.Dataset,
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
        image, label: column names; a label column that is absent means unlabeled.
        labelled: the label column was asked for by name, so its absence is an error.

    Raises:
        AdamergeError: an empty data set, missing image column, broken image, or labels that do
            not fit the classes.
    """
    if image not in dataset.column_names:
        raise AdamergeError(
            f"data of task {task!r} has no image column {image!r}: its columns are "
            f"{', '.join(dataset.column_names)}; set data.image"
        )
    if labelled and label not in dataset.column_names:
        raise AdamergeError(
            f"data of task {task!r} has no label column {label!r}: its columns are "
            f"{', '.join(dataset.column_names)}; mend data.label, or leave it out"
        )
    if len(dataset) == 0:
        raise AdamergeError(f"data of task {task!r} is empty: expected at least one image")
    if on_bad_image not in ("error", "skip"):
        raise AdamergeError(f"on_bad_image is {on_bad_image!r}: expected 'error' or 'skip'")
    labels = _labels(task, dataset, label, classes)
    key = _key(dataset, preprocess, image, label, on_bad_image)
    folder = cache_dir / "images" / key
    if not folder.is_dir():
        transform = uint8_transform(preprocess)
        write_folder(folder, task, dataset, image, labels, transform, on_bad_image)
    meta = json.loads((folder / "meta.json").read_text())
    kept = np.load(folder / "labels.npy") if meta["labelled"] else None
    if meta["skipped"]:
        log.warning("task %s: %d broken images were skipped", task, meta["skipped"])
    return TaskImages(
        np.load(folder / "images.npy", mmap_mode="r"), kept, meta["sha256"], int(meta["skipped"])
    )


def _labels(
    task: str, dataset: datasets.Dataset, column: str | None, classes: tuple[str, ...]
) -> np.ndarray | None:
    if column is None or column not in dataset.column_names:
        return None
    feature = dataset.features[column]
    known = getattr(feature, "num_classes", None)
    if known is not None and known != len(classes):
        raise AdamergeError(
            f"head of task {task!r} has {len(classes)} classes, but its data set has {known}: "
            "give the suite the data set's own class names, in its order"
        )
    try:
        given = np.asarray(dataset[column][:])
        labels = given.astype(np.int64)
        if not np.array_equal(labels, given):
            raise ValueError("not whole numbers")
    except (TypeError, ValueError) as error:
        raise AdamergeError(
            f"labels of task {task!r} (column {column!r}) are not class numbers: expected "
            f"integers from 0 to {len(classes) - 1}"
        ) from error
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(classes):
        raise AdamergeError(
            f"labels of task {task!r} run from {labels.min()} to {labels.max()}, but its head has "
            f"{len(classes)} classes: expected labels from 0 to {len(classes) - 1}"
        )
    return labels


def _key(dataset: datasets.Dataset, preprocess: Any, *settings: object) -> str:
    libraries = [version(name) for name in ("pillow", "torchvision", "open_clip_torch")]
    parts = [_FORMAT, content_key(dataset), repr(preprocess), libraries, [*map(str, settings)]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def content_key(dataset: datasets.Dataset) -> str:
    """A hash of a data set's content.

    A data set on disk has the fingerprint `datasets` gives it and its files' sizes and times; one
    in memory is hashed whole.
    """
    if dataset.cache_files:
        files = [Path(entry["filename"]) for entry in dataset.cache_files]
        stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return hashlib.sha256(repr((dataset._fingerprint, stats)).encode()).hexdigest()
    digest = hashlib.sha256(repr(dataset.features).encode())
    for batch in dataset.with_format("arrow").iter(batch_size=1024):
        for row in batch.to_pylist():
            digest.update(repr(row).encode())
            for value in row.values():  # a path stands for a file that may change
                path = value.get("path") if isinstance(value, dict) else None
                if path and not value.get("bytes") and os.path.exists(path):
                    stat = os.stat(path)
                    digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()
