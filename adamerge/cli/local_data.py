"""What a folder of data sets has for a task: its path, and class names where they are told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json
from adamerge.cli.task_names import normal
from adamerge.images.decoding import is_image
from adamerge.images.local_files import split_names, subfolder

_FILES = (".parquet", ".arrow", ".tar", ".npz", ".npy")


@dataclass
class LocalData:
    """One data set on this disk: a file, or a folder."""

    path: Path
    keys: dict[str, Any] = field(default_factory=dict)  # split, image, label: all that are known
    classes: list[str] | None = None  # in the order of the labels, where they are told
    ordered: bool = True  # that order is the data set's own, and not that of folders' names


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


def agree(data: LocalData, classes: Collection[str]) -> bool:
    """Whether a data set's classes can be a suite's: the same names; in an order of its own, or as
    numbers, also as many."""
    names = data.classes or []
    numbered = data.ordered or all(name.isdigit() for name in names)
    same = {*map(normal, names)} <= {*map(normal, classes)}
    return same or (numbered and len(names) == len(classes))


def _folder(path: Path) -> LocalData:
    if (path / "dataset_dict.json").is_file():
        given = _json(path / "dataset_dict.json").get("splits")
        splits = [str(name) for name in given] if isinstance(given, list) else []
        usual = [*split_names("test"), *split_names("validation"), *splits]
        saved = next((name for name in usual if name in splits), "test")
        return _saved(path, path / saved, saved)
    if (path / "state.json").is_file():
        return _saved(path, path, None)
    split, inner = None, path
    for name in ("validation", None):  # that of `test` is found unnamed
        with contextlib.suppress(AdamergeError):  # folders of other splits
            if (place := subfolder(path, name)) != path:
                split, inner = name, place
    entries = sorted(entry for entry in inner.iterdir() if entry.name[0] != ".")
    keys = {"split": split, "image": "image", "label": None}
    if any(map(is_image, entries)):
        return LocalData(path, keys)
    folders = [entry for entry in entries if entry.is_dir()]
    classes = [entry.name for entry in folders if any(map(is_image, entry.iterdir()))]
    if len(classes) > 1:
        return LocalData(path, {**keys, "label": "label"}, classes, ordered=False)
    # Else shards, perhaps of several splits, or nothing that is known here.
    return LocalData(path, keys if classes else {})


def _saved(path: Path, inner: Path, split: str | None) -> LocalData:
    """A folder of `datasets`: its columns and class names, from the JSON beside the tables."""
    features = _json(inner / "dataset_info.json").get("features")
    named = features.items() if isinstance(features, dict) else ()
    kinds = {name: kind for name, kind in named if isinstance(kind, dict)}
    image = [name for name, kind in kinds.items() if kind.get("_type") == "Image"]
    label = [name for name, kind in kinds.items() if kind.get("_type") == "ClassLabel"]
    keys: dict[str, Any] = {"split": split}
    if len(image) == 1:
        keys["image"] = image[0]
    if "label" in kinds or len(label) == 1:
        keys["label"] = "label" if "label" in kinds else label[0]
    names = kinds.get(keys.get("label", ""), {}).get("names")
    told = [str(name) for name in names] if isinstance(names, list) else None
    return LocalData(path, keys, told or None)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except AdamergeError:  # reading the data says more than could be said here
        return {}
