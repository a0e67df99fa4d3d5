"""Undecoded images and labels by column, whatever they are kept in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa

from adamerge._base.compat import fingerprint

_ARRAYS = (datasets.Array2D, datasets.Array3D, datasets.List, datasets.LargeList)


class ImageSource(Protocol):
    """Rows of images, and perhaps labels, that are read piece by piece."""

    @property
    def columns(self) -> list[str]:
        """What can be asked for, by name."""

    def rows(self, column: str) -> int:
        """How many images the column has."""

    def images(self, column: str, start: int, stop: int) -> Sequence[Any]:
        """Undecoded images: arrays, bytes, or `{"bytes": …, "path": …}`."""

    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]:
        """All labels, and the data set's own class names if it has any."""

    def key(self, column: str) -> str:
        """A hash that changes when the images may have changed; cheap for what lies on a disk."""

    def usual(self, kind: str) -> list[str]:
        """The columns that `image` or `label` can stand for where no column has that name."""

    def holds_images(self, column: str) -> bool:
        """Whether the column can be read as images at all."""


def as_source(data: datasets.Dataset | ImageSource) -> ImageSource:
    """A data set of `datasets`, or what is a source already, as a source."""
    return DatasetSource(data) if isinstance(data, datasets.Dataset) else data


class DatasetSource:
    """A `datasets.Dataset`; a field of a structured column is named `column.field`."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self.dataset = dataset.with_format(None)
        self._undecoded: datasets.Dataset | None = None

    @property
    def columns(self) -> list[str]:
        """Columns, and after them the fields of structured ones, such as webdataset's JSON."""
        fields = [
            f"{name}.{field}"
            for name, feature in self.dataset.features.items()
            if isinstance(feature, dict) and "bytes" not in feature
            for field in feature
        ]
        return [*self.dataset.column_names, *fields]

    def rows(self, column: str) -> int:
        return len(self.dataset)

    def images(self, column: str, start: int, stop: int) -> Sequence[Any]:
        if self._undecoded is None or self._undecoded.column_names != [column]:
            self._undecoded = self._only(column)
        found: Sequence[Any] = self._undecoded[start:stop][column]
        return found

    def _only(self, column: str) -> datasets.Dataset:
        images = self.dataset.select_columns([column])
        feature = images.features[column]
        if isinstance(feature, datasets.Image):
            images = images.cast_column(column, datasets.Image(decode=False))
        elif isinstance(feature, _ARRAYS):
            images = images.with_format("numpy")
        return images

    def labels(self, column: str) -> tuple[Sequence[Any], list[str] | None]:
        name, field = column, ""
        if column not in self.dataset.column_names:
            name, _, field = column.partition(".")
        feature = self.dataset.features[name]
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
        if isinstance(feature, datasets.List | datasets.LargeList):  # of rows of pixels
            return isinstance(feature.feature, datasets.List | datasets.LargeList)
        return isinstance(feature, (datasets.Image, *_ARRAYS))

    def key(self, column: str) -> str:
        """On disk: its fingerprint, and its files' sizes and times; in memory: all of it, hashed.

        A path in place of an image counts with the size and time of the file it leads to.
        """
        images = self.dataset.select_columns([column])
        digest = hashlib.sha256(repr(images.features).encode())
        on_disk = [Path(entry["filename"]) for entry in self.dataset.cache_files]
        if on_disk:
            digest.update(repr((fingerprint(self.dataset), column, file_stats(on_disk))).encode())
            paths = _paths(self.dataset.data.column(column))
            digest.update(repr(file_stats(paths)).encode())
            return digest.hexdigest()
        for batch in images.with_format("arrow").iter(batch_size=1024):
            values = batch.column(column)
            _hash_values(digest, values)
            digest.update(repr(file_stats(_paths(values))).encode())
        return digest.hexdigest()


def file_stats(files: Sequence[str | Path]) -> list[tuple[str, int, int]]:
    """Path, size and time (ns) of each file; a file that is not there counts as empty."""
    found = []
    for file in files:
        try:
            stat = os.stat(file)
            found.append((str(file), stat.st_size, stat.st_mtime_ns))
        except OSError:
            found.append((str(file), 0, 0))
    return found


def _hash_values(digest: Any, values: pa.ChunkedArray) -> None:
    if pa.types.is_struct(values.type) or pa.types.is_binary(values.type):
        for value in values.to_pylist():
            for part in value.values() if isinstance(value, dict) else (value,):
                whole = part if isinstance(part, bytes) else repr(part).encode()
                digest.update(f"{type(part).__name__} {len(whole)} ".encode())
                digest.update(whole)
        return
    table = pa.table({"image": values}).combine_chunks()
    for record in table.to_batches():
        digest.update(record.serialize())


def _paths(values: pa.ChunkedArray) -> list[str]:
    """The paths of the images that are kept as paths alone; no pixels are read."""
    if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
        return []
    found: list[str] = []
    for chunk in values.chunks:
        paths = chunk.field("path")
        if chunk.type.get_field_index("bytes") >= 0:
            paths = paths.filter(chunk.field("bytes").is_null())
        found += [path for path in paths.to_pylist() if path]
    return found
