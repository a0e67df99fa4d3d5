"""Data sets in local files: parquet, arrow and webdataset shards, and folders of images."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from adamerge._base.downloads import failed_download
from adamerge._base.errors import AdamergeError
from adamerge.images.decoding import is_image
from adamerge.images.path_lists import LISTS, as_dataset, described
from adamerge.images.source import file_stats

datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it tells a server what kind is read
_SHARDS = {".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow", ".tar": "webdataset"}
_MAGIC = (b"PAR1", b"ARROW1", b"\x93NUMPY", b"PK")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def shard_kind(file: Path) -> str | None:
    """The reader of `datasets` for a file, by its ending: parquet, arrow, webdataset, or None."""
    return _SHARDS.get(file.suffix.lower())


def require_sound(file: Path) -> None:
    """Raises AdamergeError for a pipe, a device, and what a failed download left of a file."""
    if not file.is_file():
        raise AdamergeError(f"path: {file} is not a regular file: expected one that can be read")
    with file.open("rb") as opened:
        head = opened.read(512)
    is_data = head.startswith(_MAGIC) or file.suffix.lower() in LISTS
    what = failed_download(head, "data", text=not is_data)
    if what is not None:
        raise AdamergeError(f"path: {file} is {what}")


def read_shards(kind: str, files: Sequence[Path]) -> datasets.Dataset:
    """All rows of the files, in the files' order, by a reader that comes with `datasets`.

    It keeps an Arrow copy in its own cache, under a name made of the files' sizes and times.
    """
    for file in files:
        require_sound(file)
    paths = [str(file.resolve()) for file in files]
    name = hashlib.sha256(repr(file_stats(paths)).encode()).hexdigest()[:32]
    patterns = [glob.escape(path) for path in paths]  # it takes every path for a pattern
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it raises is told anyway
    try:
        return datasets.load_dataset(kind, name=name, data_files=patterns, split="train")
    finally:
        datasets.logging.set_verbosity(before)


def split_names(split: str | None) -> list[str]:
    """What a split is looked for by: its name, then others for the same (`validation`, `val`)."""
    wanted = split or "test"
    same = next((names for names in _SPLITS.values() if wanted.casefold() in names), ())
    return list(dict.fromkeys([wanted, *same]))


def subfolder(folder: Path, split: str | None) -> Path:
    """The folder's subfolder for a split; itself, unless its subfolders are other splits."""
    entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    names = [name for name in entries if not name.startswith(".")]
    for wanted in split_names(split):
        same = [name for name in names if name.casefold() == wanted.casefold()]
        if same:
            return folder / (wanted if wanted in same else same[0])
    known = {word for words in _SPLITS.values() for word in words}
    if names and all(name.casefold() in known for name in names):
        raise AdamergeError(
            f"split: no folder {folder / (split or 'test')} for split {split or 'test'!r}: {folder}"
            f" has {', '.join(names)}"
        )
    return folder


def shards_in(folder: Path, split: str | None) -> tuple[str, list[Path]] | None:
    """The shards below a folder and their kind, those of one split if names tell; None if none."""
    files = [file for file in _files(folder) if shard_kind(file) and file.name not in _METADATA]
    if not files:
        return None
    kinds = sorted({str(shard_kind(file)) for file in files})
    if len(kinds) > 1:
        raise AdamergeError(
            f"path: {folder} holds {' and '.join(kinds)} files: expected one kind; give a glob"
        )
    wanted = split or "test"
    splits = [_split_of(file.relative_to(folder), wanted) for file in files]
    if wanted in splits:
        files = [file for file, name in zip(files, splits, strict=True) if name == wanted]
    elif split or any(splits):
        others = ", ".join(sorted({*splits} - {""}))
        raise AdamergeError(
            f"split: no files of {wanted!r} in {folder}: "
            f"{f'it has {others}' if others else 'their names tell no splits'}; mend data.split or "
            "give a glob"
        )
    return kinds[0], files


def _split_of(file: Path, wanted: str) -> str:
    """The split that a shard's name (`test-00000-of-00002.parquet`) or folder speaks of, or ``."""
    words = re.split(r"[^0-9a-z]+", str(file.with_suffix("")).casefold())
    if {*split_names(wanted.casefold())} & {*words}:
        return wanted
    return next((split for split, names in _SPLITS.items() if set(names) & set(words)), "")


def image_folder(folder: Path, labelled: bool = True) -> datasets.Dataset:
    """The images of a folder, in the order of their paths, as an unread data set.

    Class subfolders' names become labels if images lie in more than one folder, all equally deep,
    unless none are asked for (`labelled`). A metadata file (`file_name` and other columns) tells
    which images count, and their labels if it has any.
    """
    files = _files(folder)
    metadata = [file for file in files if file.name in _METADATA]
    for file in metadata:
        require_sound(file)
    columns: dict[str, list[Any]] = described(metadata) or {"image": [*filter(is_image, files)]}
    if not columns["image"]:
        raise AdamergeError(
            f"path: {folder} holds no images: expected files such as .jpg or .png, or parquet, "
            "arrow or .tar files"
        )
    if labelled and "label" not in columns:
        depths = Counter(len(file.parts) for file in columns["image"])
        usual = depths.most_common(1)[0][0]
        others = [file for file in columns["image"] if len(file.parts) != usual]
        if others:
            raise AdamergeError(
                f"path: {folder} has {depths[usual]} images {usual - len(folder.parts) - 1} "
                f"folders deep and {len(others)} at another depth, such as "
                f"{others[0].relative_to(folder)}, so which folders are classes cannot be told: "
                "move or remove those, or set label: null to use no labels"
            )
        names = [file.parent.name for file in columns["image"]]
        if len({*names}) > 1:
            columns["label"] = names
    return as_dataset(columns, images="image")


def _files(folder: Path) -> list[Path]:
    """All files below a folder, but hidden ones, each once: links may lead in circles.

    What lies in the folder itself comes before what links lead to.
    """
    files: list[Path] = []
    seen, waiting = {*folder.resolve().parents}, [folder]
    for start in waiting:  # which grows by the links
        for root, folders, names in os.walk(start):
            place = Path(root).resolve()
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            waiting += [Path(root, name) for name in folders if Path(root, name).is_symlink()]
            files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(files)
