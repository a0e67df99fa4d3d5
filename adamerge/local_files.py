"""Data sets in local files: parquet, arrow and webdataset shards, and folders of images."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

from adamerge.errors import AdamergeError
from adamerge.image_source import file_stats

_SHARDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".tar": "webdataset",
}
_IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif", ".tga", ".pcx", ".sgi", ".ico"),
)
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def shard_kind(file: Path) -> str | None:
    """The reader of `datasets` for a file, by its ending: parquet, arrow, webdataset, or None."""
    return _SHARDS.get(file.suffix.lower())


def read_shards(kind: str, files: Sequence[Path]) -> datasets.Dataset:
    """All rows of the files, in the files' order, by a reader that comes with `datasets`.

    It keeps an Arrow copy in its own cache, under a name made of the files' sizes and times.
    """
    paths = [str(file.resolve()) for file in files]
    stamp = hashlib.sha256(repr(file_stats(paths)).encode()).hexdigest()[:32]
    loaded: datasets.Dataset = datasets.load_dataset(
        kind, name=stamp, data_files=[_escaped(path) for path in paths], split="train"
    )
    return loaded


def _escaped(path: str) -> str:
    """`datasets` takes every path for a pattern."""
    return re.sub(r"([*?\[\]])", r"[\1]", path)


def subfolder(folder: Path, split: str | None) -> Path:
    """The folder's subfolder for a split, if it has one.

    Raises:
        AdamergeError: subfolders that are splits, none of which is the one asked for.
    """
    inner = folder / (split or "test")
    if inner.is_dir():
        return inner
    known = {word for words in _SPLITS.values() for word in words}
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    names = [name for name in names if not name.startswith(".")]
    if names and all(name.casefold() in known for name in names):
        raise AdamergeError(
            f"split: no folder {inner} for split {split or 'test'!r}: {folder} has "
            f"{', '.join(names)}"
        )
    return folder


def shards_in(folder: Path, split: str | None) -> tuple[str, list[Path]] | None:
    """The shards below a folder and their kind, those of one split if names tell; None if none.

    Raises:
        AdamergeError: shards of several kinds, or only of other splits.
    """
    files = [file for file in _files(folder) if shard_kind(file) and file.name not in _METADATA]
    if not files:
        return None
    kinds = sorted({str(shard_kind(file)) for file in files})
    if len(kinds) > 1:
        raise AdamergeError(
            f"path: {folder} holds {' and '.join(kinds)} files: expected one kind; give a glob"
        )
    wanted = split or "test"
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder), wanted), []).append(file)
    if wanted in by_split:
        return kinds[0], by_split[wanted]
    others = sorted(name for name in by_split if name)
    if others or split:
        raise AdamergeError(
            f"split: no files of {wanted!r} in {folder}: "
            f"{'it has ' + ', '.join(others) if others else 'their names tell no splits'}; mend "
            "data.split or give a glob"
        )
    return kinds[0], files


def _split_of(file: Path, wanted: str) -> str:
    """The split that a shard's name (`test-00000-of-00002.parquet`) or folder speaks of, or ``."""
    words = re.split(r"[^0-9a-z]+", str(file.with_suffix("")).casefold())
    if wanted.casefold() in words:
        return wanted
    return next((split for split, names in _SPLITS.items() if set(names) & set(words)), "")


def image_folder(folder: Path) -> datasets.Dataset:
    """The images of a folder, in the order of their paths, as an unread data set.

    Class subfolders become labels, in alphabetic order, if all images lie equally deep and in
    more than one folder. A metadata file (`file_name` and other columns) is read by `datasets`.

    Raises:
        AdamergeError: no image below the folder, or images split and unsplit by class.
    """
    files = _files(folder)
    if any(file.name in _METADATA for file in files):
        stamp = hashlib.sha256(repr(file_stats(files)).encode()).hexdigest()[:32]
        loaded: datasets.Dataset = datasets.load_dataset(
            "imagefolder", name=stamp, data_dir=str(folder), split="train"
        )
        return loaded
    files = [file for file in files if file.suffix.lower() in _IMAGES]
    if not files:
        raise AdamergeError(
            f"path: {folder} holds no images: expected files such as .jpg or .png, or parquet, "
            "arrow or .tar files"
        )
    paths = pa.array([str(file) for file in files])
    columns = {
        "image": pa.StructArray.from_arrays(
            [pa.nulls(len(files), pa.binary()), paths], ["bytes", "path"]
        )
    }
    features = datasets.Features(image=datasets.Image())
    depths = {len(file.parts) for file in files}
    names = sorted({file.parent.name for file in files})
    if len(depths) == 1 and len(names) > 1:
        places = {name: place for place, name in enumerate(names)}
        columns["label"] = pa.array([places[file.parent.name] for file in files], pa.int64())
        features["label"] = datasets.ClassLabel(names=names)
    # Straight from Arrow: `from_dict` would look at every file.
    return datasets.Dataset(InMemoryTable(pa.table(columns, schema=features.arrow_schema)))


def _files(folder: Path) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        found += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(found)
