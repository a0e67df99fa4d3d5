"""A task's `data:` as a data set: the hub, local files of any usual kind, or a function."""

from __future__ import annotations

import errno
import glob
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from adamerge._base.binding import call, find, function_to, nearest, problems
from adamerge._base.errors import AdamergeError
from adamerge.images.arrays import ArraySource
from adamerge.images.decoding import is_image
from adamerge.images.local_files import (
    image_folder,
    read_shards,
    require_sound,
    shard_kind,
    shards_in,
    split_names,
    subfolder,
)
from adamerge.images.path_lists import LISTS, as_dataset, read_list, with_images
from adamerge.images.source import ImageSource

_FULL = (errno.ENOSPC, errno.EDQUOT)  # told as what it is, not as unreadable data
_KEYS = ("path", "name", "split", "revision", "image", "label")
_NULLABLE = ("name", "split", "revision", "label")
_ARRAYS = (".npy", ".npz")
_LARGEST_JSON = 1 << 26  # bytes of what `datasets` says of a data set
_NO_READER = (".json", ".txt", ".zip", ".gz", ".tgz", ".7z", ".h5", ".pt")
_EXPECTED = (
    "a hub name, a folder saved by `datasets`, parquet, arrow or webdataset (.tar) files, a folder "
    "of images, a .csv, .tsv or .jsonl list of image files, or a .npy or .npz file"
)


def open_dataset(
    task: str, data: Mapping[str, Any], part: str = "tasks"
) -> datasets.Dataset | ImageSource:
    """The images (and labels, if any) of one task, undecoded.

    Args:
        task: for messages.
        data: `path` is a hub name (with `name`, `split`, `revision`); a folder saved by
            `datasets`; a parquet, arrow or webdataset file, a folder of them or a glob; a folder
            of images with or without class subfolders, or a glob; a csv, tsv or jsonl list of
            image files; or a `.npy` or `.npz` file; `~` is the home folder. Or `_target_` is the
            dotted path of a function that returns a `datasets.Dataset`, with its arguments.
        part: where the task stands in the suite, `tasks` or `unseen`; for messages.

    Raises:
        AdamergeError: nothing there, or nothing that can be read as images. No code that comes
            with a data set is ever run.
        OSError: no space for what `datasets` prepares.
    """
    where = f"suite.{part}.{task}.data"
    found = data_problems(where, data)
    if found:
        raise AdamergeError("; ".join(found))
    return _made(where, data) if "_target_" in data else _read(where, data)


def _made(where: str, data: Mapping[str, Any]) -> datasets.Dataset:
    """What a function of the user's returns; what it raises is told as its own."""
    function = _function(where, data)
    try:
        made = call(function, _arguments(data), {})
    except AdamergeError as error:
        raise AdamergeError(f"{where}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [one for one in frames if one.filename == function.__code__.co_filename]
        at = (own or frames)[-1]
        raise AdamergeError(
            f"{where}: {data['_target_']} raised {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]} ({at.filename}, line {at.lineno}): mend the "
            "function or its arguments"
        ) from error
    if not isinstance(made, datasets.Dataset):
        raise AdamergeError(
            f"{where}: {data['_target_']} returned {type(made).__name__}: expected one "
            "datasets.Dataset, as it is annotated to return"
        )
    return with_images(made, data.get("image", "image"), [Path.cwd()], where)


def data_problems(where: str, data: Any) -> list[str]:
    """What is wrong with a task's `data:`, before anything is read."""
    if not isinstance(data, Mapping):
        return [f"{where} is {data!r}: expected {', '.join(_KEYS)}, or _target_"]
    if "_target_" in data:
        columns = {key: data[key] for key in ("image", "label") if key in data}
        try:
            found = problems(_function(where, data), _arguments(data), where, ())
        except AdamergeError as error:
            found = [str(error)]
        return found + _mistyped(where, columns)
    unknown = [key for key in data if key not in _KEYS]
    found = [f"{where}.{key} is unknown{nearest(str(key), _KEYS)}" for key in unknown]
    return found + _mistyped(where, data) + ([] if "path" in data else [f"{where}.path is missing"])


def _mistyped(where: str, data: Mapping[str, Any]) -> list[str]:
    found = []
    for key in (key for key in _KEYS if key in data):
        value, null = data[key], " or null" * (key in _NULLABLE)
        if value == "" or not (isinstance(value, str) or (value is None and null)):
            wanted = "a path or a hub name" if key == "path" else f"a text{null}"
            found.append(f"{where}.{key} is {value!r}: expected {wanted}")
    return found


def _function(where: str, data: Mapping[str, Any]) -> Callable[..., Any]:
    expected = "a function annotated to return a datasets.Dataset"
    found: Callable[..., Any] = find(
        str(data["_target_"]), where, function_to(datasets.Dataset), expected
    )
    return found


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in ("_target_", "image", "label")}


def _read(where: str, data: Mapping[str, Any]) -> datasets.Dataset | ImageSource:
    path, split = os.path.expanduser(data["path"]), data.get("split")
    local = Path(path)
    try:
        if local.is_file() and local.suffix.lower() in _ARRAYS:
            require_sound(local)
            return ArraySource(where, local, split or "test")
        loaded = _load(path, split, data)
        if not (local.exists() or glob.has_magic(path)):
            return loaded  # of the hub
        folders = [local, local.parent, Path()] if local.is_dir() else [local.parent, Path()]
        folders = [folder.absolute() for folder in folders]
        return with_images(loaded, data.get("image", "image"), folders, path)
    except AdamergeError as error:
        if str(error).startswith(where):
            raise
        raise AdamergeError(f"{where}.{error}") from error
    except Exception as error:  # `datasets` raises a dozen types for one thing: not readable
        root = _root(error)
        if isinstance(root, OSError) and root.errno in _FULL:
            raise root from error
        reason = " ".join(f"{error} {root if root is not error else ''}".split())[:300]
        here = local.exists() or glob.has_magic(path)
        raise AdamergeError(
            f"{where}.path: cannot read {path!r} {'' if here else 'from the hub '}"
            f"({type(error).__name__}: {reason}){'' if here else _NOT_HERE}: expected {_EXPECTED}"
        ) from error


_NOT_HERE = ", and no file or folder of that name is here"


def _load(path: str, split: str | None, data: Mapping[str, Any]) -> datasets.Dataset:
    """Whatever is at the path; errors of ours name the key within `data`."""
    local = Path(path)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return _saved(path, split)
    if local.is_file():
        kind = shard_kind(local)
        if local.suffix.lower() in LISTS:
            require_sound(local)
            return as_dataset(read_list(local))
        if kind is None:
            raise AdamergeError(f"path: {path} is of no kind that is read: expected {_EXPECTED}")
        return read_shards(kind, [local])
    if local.exists() and not local.is_dir():
        raise AdamergeError(f"path: {path} is neither a file nor a folder: expected {_EXPECTED}")
    if local.is_dir() and data.get("name"):  # `datasets` would follow what its README.md names
        raise AdamergeError(
            f"name: {path} is a folder here, and name chooses a part of a data set on the hub: "
            "leave it out, and give the path of that part"
        )
    if local.is_dir():
        inner = subfolder(local, split)
        shards = shards_in(inner, split if inner == local else None)
        if shards is not None:
            return read_shards(*shards)
        return image_folder(inner, data.get("label", "label") == "label")
    if not local.exists() and glob.has_magic(path):
        return _globbed(path)
    if not local.exists() and _means_a_file(path):
        beside = os.listdir(local.parent) if local.parent.is_dir() else []
        raise AdamergeError(
            f"path: no such file or folder {path!r}{nearest(local.name, beside)}: mend the path, "
            "which starts at the suite's file or the working folder; a data set of the hub is "
            "named `name` or `owner/name`"
        )
    found: datasets.Dataset = datasets.load_dataset(
        path, data.get("name"), split=split or "test", revision=data.get("revision")
    )
    return found


def _means_a_file(path: str) -> bool:
    """Whether a path that leads nowhere cannot be meant for the hub."""
    local = Path(path)
    known = shard_kind(local) or is_image(local)
    return bool(
        path.startswith((".", "~", "/"))
        or path.count("/") > 1
        or known
        or local.suffix.lower() in (*_ARRAYS, *LISTS, *_NO_READER)
        or ("/" in path and Path(local.parts[0]).is_dir())
    )


def _saved(path: str, split: str | None) -> datasets.Dataset:
    for file in sorted(Path(path).rglob("*.arrow")):
        require_sound(file)
    for file in sorted(Path(path).rglob("*.json")):
        if not file.is_file() or file.stat().st_size > _LARGEST_JSON:
            raise AdamergeError(
                f"path: {file} is no regular file of at most {_LARGEST_JSON / 1e6:.0f} MB: expected"
                " what `datasets` saves; save the data set again"
            )
    loaded = datasets.load_from_disk(path)
    if isinstance(loaded, datasets.DatasetDict):
        found = next((name for name in split_names(split) if name in loaded), None)
        if found is None:
            raise AdamergeError(
                f"split: no {split or 'test'!r} in {path}: it has {', '.join(loaded)}"
            )
        loaded = loaded[found]
    return loaded


def _globbed(pattern: str) -> datasets.Dataset:
    files = sorted(Path(found) for found in glob.glob(pattern, recursive=True))
    files = [file for file in files if file.is_file()]
    if files and all(is_image(file) for file in files):
        return as_dataset({"image": files}, images="image")
    kinds = {shard_kind(file) for file in files}
    if not files or len(kinds) > 1 or None in kinds:
        raise AdamergeError(
            f"path: {pattern} matches {len(files)} files"
            f"{' of several kinds' if len(kinds) > 1 else ''}: expected files of one kind: "
            "parquet, arrow, webdataset (.tar) or images"
        )
    return read_shards(str(kinds.pop()), files)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error
