"""Undecoded images and labels by column, whatever they are kept in."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import datasets
import pyarrow as pa

from adamerge._base.compat import fingerprint
from adamerge._base.errors import AdamergeError

log = logging.getLogger("adamerge")

_LISTS = (datasets.List, datasets.LargeList)
_ARRAYS = (datasets.Array2D, datasets.Array3D)


@runtime_checkable
class ImageSource(Protocol):
    """Rows of images, and perhaps labels, that are read piece by piece.

    `columns` can be asked for by name. `images` gives undecoded ones: arrays, bytes, or
    `{"bytes": …, "path": …}`. `labels` gives all of them, and the data set's own class names if it
    has any. `key` is a hash that changes when the images may have changed, cheap for what lies on
    a disk. `usual` names the columns that `image` or `label` can stand for where no column has that
    name.
    """

    @property
    def columns(self) -> list[str]: ...
    def rows(self, column: str) -> int: ...
    def images(self, column: str, start: int, stop: int) -> Sequence[Any]: ...
    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]: ...
    def key(self, column: str) -> str: ...
    def usual(self, kind: str) -> list[str]: ...
    def holds_images(self, column: str) -> bool: ...


class DatasetSource:
    """A `datasets.Dataset`; a field of a structured column is named `column.field`."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        dataset = dataset.with_format(None)
        refused = [
            name
            for name, feature in dataset.features.items()
            if _decodes(feature) and not isinstance(feature, datasets.Image)
        ]
        if refused:
            log.info("columns %s are left out: media other than images", ", ".join(refused))
            dataset = dataset.remove_columns(refused)
        self.dataset = dataset
        self._undecoded: dict[str, datasets.Dataset] = {}

    @property
    def columns(self) -> list[str]:
        """Columns, those of webdataset's JSON by their fields."""
        names: list[str] = []
        for name, feature in self.dataset.features.items():
            structured = isinstance(feature, dict) and "bytes" not in feature
            names += [f"{name}.{field}" for field in feature] if structured else [name]
        return names

    def rows(self, column: str) -> int:
        return len(self.dataset)

    def images(self, column: str, start: int, stop: int) -> Sequence[Any]:
        if column not in self._undecoded:
            images = self.dataset.select_columns([column])
            feature = images.features[column]
            if isinstance(feature, datasets.Image):
                images = images.cast_column(column, datasets.Image(decode=False))
            elif isinstance(feature, (*_ARRAYS, *_LISTS)):
                images = images.with_format("numpy")
            self._undecoded[column] = images
        return self._undecoded[column][start:stop][column]

    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]:
        name, field = column, ""
        if column not in self.dataset.column_names:
            name, _, field = column.partition(".")
        feature = self.dataset.features[name]
        if _decodes(feature):
            raise AdamergeError(
                f"column {column!r} holds images: expected class numbers or names as labels; mend "
                "data.label, or set it to null to use none"
            )
        values = self.dataset[name][:]
        if field:
            feature, values = feature[field], [None if v is None else v[field] for v in values]
        return values, getattr(feature, "names", None)

    def usual(self, kind: str) -> list[str]:
        features = self.dataset.features
        if kind == "label":  # `cls` is what webdataset calls it
            named = [name for name in features if isinstance(features[name], datasets.ClassLabel)]
            return ["cls"] if "cls" in features else named
        typed = [name for name in features if isinstance(features[name], datasets.Image)]
        return typed or [name for name in features if self.holds_images(name)]

    def holds_images(self, column: str) -> bool:
        feature = self.dataset.features.get(column)
        if isinstance(feature, datasets.Value):
            return feature.dtype in ("binary", "large_binary")
        if isinstance(feature, dict):
            return "bytes" in feature
        if isinstance(feature, _LISTS):  # of rows of pixels
            return isinstance(feature.feature, _LISTS)
        return isinstance(feature, (datasets.Image, *_ARRAYS))

    def key(self, column: str) -> str:
        """On disk: its fingerprint, and its files' sizes and times; in memory: all of it, hashed.

        A path in place of an image counts with the size and time of the file it leads to.
        """
        images = self.dataset.select_columns([column])
        on_disk = [entry["filename"] for entry in self.dataset.cache_files]
        files = file_stats([*on_disk, *_paths(self.dataset.data.column(column))])
        digest = hashlib.sha256(repr((images.features, files)).encode())
        if on_disk:
            digest.update(fingerprint(self.dataset).encode())
            return digest.hexdigest()
        for batch in images.with_format("arrow").iter(batch_size=1024):
            for record in batch.combine_chunks().to_batches():
                digest.update(record.serialize())
        return digest.hexdigest()


def _decodes(feature: Any) -> bool:
    """Whether `datasets` would open or fetch what a value of a column names, when it is read."""
    if isinstance(feature, dict):
        return any(map(_decodes, feature.values()))
    if isinstance(feature, (*_LISTS, list, tuple)):
        inner = feature if isinstance(feature, list | tuple) else [feature.feature]
        return any(map(_decodes, inner))
    return hasattr(feature, "decode_example") and type(feature).__name__ != "Json"  # parsed alone


def file_stats(files: Iterable[str | Path]) -> list[tuple[str, int, int]]:
    """Path, size and time (ns) of each file that is there."""
    stats = []
    for file in files:
        with contextlib.suppress(OSError):
            stat = os.stat(file)
            stats.append((str(file), stat.st_size, stat.st_mtime_ns))
    return stats


def _paths(values: pa.ChunkedArray) -> list[str]:
    """The paths of the images that are kept as paths alone; no pixels are read."""
    if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
        return []
    kept: list[str] = []
    for chunk in values.chunks:
        paths = chunk.field("path")
        if chunk.type.get_field_index("bytes") >= 0:
            paths = paths.filter(chunk.field("bytes").is_null())
        kept += [path for path in paths.to_pylist() if path]
    return kept


def image_column(task: str, source: ImageSource, column: str) -> str:
    """The column of a task's images: the named one, or for `image` the only one that has images."""
    column = _named_or_usual(task, source, "image", column, column != "image") or column
    if column not in source.columns:
        raise _no_column(task, source, "image", column, "set data.image")
    if not source.holds_images(column):
        first = next(iter(source.images(column, 0, 1)), None)
        texts = f" but texts such as {first[:60]!r}" if isinstance(first, str) else ""
        raise AdamergeError(
            f"column {column!r} of task {task!r} holds no images{texts}: expected image files or "
            f"uint8 arrays; its columns are {', '.join(source.columns)}; mend data.image"
        )
    return column


def label_column(task: str, source: ImageSource, column: str, asked: bool) -> str | None:
    """The column of a task's labels: the named one, or the usual one if that is not `asked` for."""
    chosen = _named_or_usual(task, source, "label", column, asked)
    if chosen is None and asked:
        raise _no_column(task, source, "label", column, "mend data.label, or leave it out")
    if chosen is None:
        columns = ", ".join(source.columns)
        log.info("task %s: no labels (columns: %s); data.label names a column", task, columns)
    return chosen


def _named_or_usual(
    task: str, source: ImageSource, kind: str, column: str, asked: bool
) -> str | None:
    if column in source.columns:
        return column
    usual = [] if asked else source.usual(kind)
    if len(usual) != 1:
        return None
    log.info("task %s: %ss from column %r", task, kind, usual[0])
    return usual[0]


def _no_column(task: str, source: ImageSource, kind: str, column: str, mend: str) -> AdamergeError:
    return AdamergeError(
        f"data of task {task!r} has no {kind} column {column!r}: its columns are "
        f"{', '.join(source.columns)}; {mend}"
    )
