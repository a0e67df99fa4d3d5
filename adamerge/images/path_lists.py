"""Image files named in a list: csv, tsv and jsonl files, and text columns of a data set."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import InMemoryTable

from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import parse_json
from adamerge.images.decoding import is_image
from adamerge.images.source import DatasetSource

LISTS = (".csv", ".tsv", ".jsonl")
_LARGEST = 1 << 28  # bytes of a list, which is read whole
_LINE = 1 << 20  # characters
_SAMPLE = 50  # rows that tell whether a column holds paths, and of what folder

Columns = dict[str, list[Any]]


def read_list(file: Path) -> Columns:
    """The columns of a csv, tsv, jsonl or parquet file, whatever they hold.

    A table without a header, which is one whose first line names an image, has the columns `image`
    and, if there are two, `label`. Integers are read as such.
    """
    if file.stat().st_size > _LARGEST:
        raise AdamergeError(
            f"path: {file} has {file.stat().st_size / 1e6:.0f} MB: expected a list of at most "
            f"{_LARGEST / 1e6:.0f} MB; split it"
        )
    if file.suffix.lower() == ".parquet":
        return dict(pq.read_table(file).to_pydict())
    read = _records if file.suffix.lower() == ".jsonl" else _table
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return read(file, opened)
    except (ValueError, csv.Error) as error:
        raise AdamergeError(
            f"path: {file} cannot be read as {file.suffix.lower()[1:]} in UTF-8 "
            f"({one_line(error)}): expected one image file per line; mend that line or save the "
            "list again"
        ) from error


def _lines(opened: IO[str]) -> Iterator[str]:
    while line := opened.readline(_LINE):
        if len(line) == _LINE:
            raise ValueError(f"a line of more than {_LINE} characters")
        if line.strip():
            yield line


def _table(file: Path, opened: IO[str]) -> Columns:
    first = opened.readline(_LINE)
    opened.seek(0)
    tabs = file.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else max(",;\t", key=first.count)
    rows = list(csv.reader(_lines(opened), delimiter=delimiter))
    if not rows:
        raise ValueError("it has no lines")
    header = [name.strip() for name in rows[0]]
    if any(map(is_image, header)):
        named = ["label" if len(header) == 2 else f"column {i}" for i in range(len(header))]
        header = ["image" if is_image(cell) else named[i] for i, cell in enumerate(header)]
    else:
        del rows[0]
    wrong = next((row for row in rows if len(row) != len(header)), None)
    if wrong is not None or len({*header}) < len(header):
        raise ValueError(f"columns {header} and a line {wrong}")
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return {name: _typed(values) for name, values in zip(header, columns, strict=True)}


def _typed(values: Sequence[str]) -> list[Any]:
    cells = [value.strip() or None for value in values]
    given = [cell for cell in cells if cell is not None]
    if all(cell.removeprefix("-").isdecimal() and len(cell) < 19 for cell in given):
        return [None if cell is None else int(cell) for cell in cells]
    return list(cells)


def _records(file: Path, opened: IO[str]) -> Columns:
    """One JSON object per line; what is nested in it is left out."""
    rows = [parse_json(line) for line in _lines(opened)]
    wrong = next((row for row in rows if not isinstance(row, dict)), None)
    if wrong is not None or not rows:
        raise ValueError(f"{str(wrong)[:80]!r} in place of an object")
    return {
        name: [None if isinstance(row.get(name), list | dict) else row.get(name) for row in rows]
        for name in dict.fromkeys(name for row in rows for name in row)
    }


def as_dataset(columns: Mapping[str, Sequence[Any]], images: str | None = None) -> datasets.Dataset:
    """Columns as an unread data set, one of them perhaps paths of image files."""
    arrays = {
        name: _array([str(path) for path in values] if name == images else values)
        for name, values in columns.items()
    }
    data = datasets.Dataset(InMemoryTable(pa.table(arrays)))  # `from_dict` would look at every file
    return data if images is None else data.cast_column(images, datasets.Image())


def _array(values: Sequence[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # of several types
        return pa.array([None if value is None else str(value) for value in values])


def with_images(
    data: datasets.Dataset, column: str, places: Sequence[Path], where: str
) -> datasets.Dataset:
    """The data set; where its images are a text column of paths, with these as image files.

    Args:
        column: of the images; `image`, where no column has that name, is any.
        places: the folders that paths may start from; the first with such files is taken.
        where: what holds the paths, for messages.
    """
    name = _column_of_paths(data, column)
    if name is None:
        return data
    paths = [path or "" for path in data[name][:]]
    some = [path for path in paths if path][:_SAMPLE]
    place = next((p for p in places if any((p / path).is_file() for path in some)), None)
    if place is None:
        shown = repr(next(iter(some), ""))[:100]
        raise AdamergeError(
            f"image: column {name!r} of {where} holds texts such as {shown}, to which no image "
            f"file leads from {' or '.join(map(str, dict.fromkeys(places)))}: expected paths "
            "relative to the list, image files, or uint8 arrays"
        )
    images = as_dataset({name: [place / path for path in paths]}, images=name)
    others = [other for other in data.column_names if other != name]
    parts = [images, data.select_columns(others)] if others else [images]
    return datasets.concatenate_datasets(parts, axis=1)


def _column_of_paths(data: datasets.Dataset, column: str) -> str | None:
    texts = [
        name
        for name, feature in data.features.items()
        if isinstance(feature, datasets.Value) and "string" in feature.dtype
    ]
    if column in data.features:
        return column if column in texts else None
    if column != "image" or DatasetSource(data).usual("image"):
        return None
    fitting = []
    for name in texts:
        given = [value for value in data.select_columns([name])[:_SAMPLE][name] if value]
        fitting += [name] if given and all(map(is_image, given)) else []
    return fitting[0] if len(fitting) == 1 else None


def described(files: Sequence[Path]) -> Columns:
    """What metadata files with a column `file_name` tell of the images beside them."""
    tables = []
    for file in files:
        columns = read_list(file)
        images = [file.parent / str(name) for name in columns.pop("file_name", [])]
        tables += [{**columns, "image": images}] if images else []
    joined: Columns = {name: [] for table in tables for name in table}
    for table in tables:
        for name, values in joined.items():
            values += table.get(name, [None] * len(table["image"]))
    return joined
