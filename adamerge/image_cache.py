"""A task's images, preprocessed once into a memory-mapped uint8 file."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
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

from adamerge.errors import AdamergeError

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
        _write(folder, task, dataset, image, labels, transform, on_bad_image)
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


def _write(
    folder: Path,
    task: str,
    dataset: datasets.Dataset,
    column: str,
    labels: np.ndarray | None,
    transform: Callable[[Image.Image], np.ndarray],
    on_bad_image: str,
) -> None:
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        good = _write_images(temporary / "images.npy", task, dataset, column, transform)
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
    task: str,
    dataset: datasets.Dataset,
    column: str,
    transform: Callable[[Image.Image], np.ndarray],
) -> np.ndarray:
    """Fills an .npy file in parallel; returns which images could be decoded, `[N]` bool."""

    def convert(value: Any) -> np.ndarray | None:
        try:
            return transform(_decode(value))
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
