"""What a folder of data sets has for a task: its path, and class names where they are told."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamerge.errors import AdamergeError
from adamerge.files import read_json
from adamerge.task_names import normal

_FILES = (".parquet", ".arrow", ".tar", ".npz", ".npy")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass
class LocalData:
    """One data set on this disk.

    Attributes:
        path: the file or folder.
        keys: what it needs beside its path (`split`, `image`, `label`), all of them where known.
        classes: its class names in the order of its labels, where it tells them.
        ordered: whether that order is the data set's own, and not that of folders' names.
    """

    path: Path
    keys: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    ordered: bool = True


def local_data(folder: Path, same: Callable[[str], bool]) -> LocalData | None:
    """The first entry of a folder whose name is the task's, looked at but not read.

    Args:
        same: whether a name is the task's.

    Raises:
        AdamergeError: no such folder.
    """
    if not folder.is_dir():
        raise AdamergeError(f"{folder} is not a folder: name the one that holds the tasks' images")
    for path in sorted(folder.iterdir()):
        if path.is_dir() and same(path.name):
            return _folder(path)
        if path.is_file() and path.suffix.lower() in _FILES and same(path.stem):
            return LocalData(path, {"split": None})
    return None


def agree(found: LocalData, classes: Collection[str]) -> bool:
    """Whether a data set's classes can be a suite's: the same names; in an order of its own, or as
    numbers, also as many."""
    names = found.classes or []
    numbered = found.ordered or all(name.isdigit() for name in names)
    same = {*map(normal, names)} <= {*map(normal, classes)}
    return same or (numbered and len(names) == len(classes))


def _folder(path: Path) -> LocalData:
    if (path / "dataset_dict.json").is_file():
        splits = _json(path / "dataset_dict.json").get("splits") or []
        split = next((name for name in ("test", "validation", *splits) if name in splits), "test")
        return _saved(path, path / split, split)
    if (path / "state.json").is_file():
        return _saved(path, path, None)
    inner = path / "test" if (path / "test").is_dir() else path
    entries = sorted(entry for entry in inner.iterdir() if entry.name[0] != ".")
    if not any(entry.suffix.lower() in _PICTURES for entry in entries):
        classes = [entry.name for entry in entries if entry.is_dir() and _has_pictures(entry)]
        if len(classes) > 1:
            keys = {"split": None, "image": "image", "label": "label"}
            return LocalData(path, keys, classes, ordered=False)
        if not classes:  # shards, perhaps of several splits, or nothing that is known here
            return LocalData(path)
    return LocalData(path, {"split": None, "image": "image", "label": None})


def _has_pictures(folder: Path) -> bool:
    return any(entry.suffix.lower() in _PICTURES for entry in folder.iterdir())


def _saved(path: Path, inner: Path, split: str | None) -> LocalData:
    """A folder of `datasets`: its columns and class names, from the JSON beside the tables."""
    features = _json(inner / "dataset_info.json").get("features") or {}
    kinds = {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    image = [name for name, kind in kinds.items() if kind.get("_type") == "Image"]
    label = [name for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"]
    keys: dict[str, Any] = {"split": split}
    if len(image) == 1:
        keys["image"] = image[0]
    if "label" in kinds or label:
        keys["label"] = "label" if "label" in kinds else label[0]
    named = kinds.get(keys.get("label", ""), {}).get("names")
    return LocalData(path, keys, [str(name) for name in named] if named else None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except AdamergeError:  # reading the data says more than could be said here
        return {}
