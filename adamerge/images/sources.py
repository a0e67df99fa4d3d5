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
from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import read_json
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
            f"{one_line(error, 300)} ({at.filename}, line {at.lineno}): mend the function or its "
            "arguments"
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
    keys = ("image", "label") if "_target_" in data else _KEYS
    if "_target_" in data:
        try:
            found = problems(_function(where, data), _arguments(data), where, ())
        except AdamergeError as error:
            found = [str(error)]
    else:
        unknown = [key for key in data if key not in _KEYS]
        found = [f"{where}.{key} is unknown{nearest(str(key), _KEYS)}" for key in unknown]
        found += [] if "path" in data else [f"{where}.path is missing"]
    for key in (key for key in keys if key in data):
        value, null = data[key], " or null" * (key in _NULLABLE)
        if value == "" or not (isinstance(value, str) or (value is None and null)):
            wanted = "a path or a hub name" if key == "path" else f"a text{null}"
            found.append(f"{where}.{key} is {value!r}: expected {wanted}")
    return found


def _function(where: str, data: Mapping[str, Any]) -> Callable[..., Any]:
    expected = "a function annotated to return a datasets.Dataset"
    return find(str(data["_target_"]), where, function_to(datasets.Dataset), expected)


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in ("_target_", "image", "label")}


def _read(where: str, data: Mapping[str, Any]) -> datasets.Dataset | ImageSource:
    path, split = os.path.expanduser(data["path"]), data.get("split")
    local = Path(path)
    here = local.exists() or glob.has_magic(path)
    try:
        if local.is_file() and local.suffix.lower() in _ARRAYS:
            require_sound(local)
            return ArraySource(where, local, split or "test")
        if not here:
            return _from_hub(path, split, data)
        places = [local, local.parent, Path()] if local.is_dir() else [local.parent, Path()]
        places = [place.absolute() for place in places]
        return with_images(_local(path, split, data), data.get("image", "image"), places, path)
    except AdamergeError as error:
        if str(error).startswith(where):
            raise
        raise AdamergeError(f"{where}.{error}") from error
    except Exception as error:  # `datasets` raises a dozen types for one thing: not readable
        root: BaseException = error
        while root.__cause__ or root.__context__:
            root = root.__cause__ or root.__context__ or root
        if isinstance(root, OSError) and root.errno in _FULL:
            raise root from error
        reason = " ".join(f"{error} {root if root is not error else ''}".split())[:300]
        place, absent = "from the hub ", ", and no file or folder of that name is here"
        raise AdamergeError(
            f"{where}.path: cannot read {path!r} {'' if here else place}"
            f"({type(error).__name__}: {reason}){'' if here else absent}: expected {_EXPECTED}"
        ) from error


def _local(path: str, split: str | None, data: Mapping[str, Any]) -> datasets.Dataset:
    """Whatever is at the path or fits the pattern; errors of ours name the key within `data`."""
    local = Path(path)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return _saved(path, split)
    if not local.exists():
        return _globbed(path)
    if local.suffix.lower() in LISTS and local.is_file():
        require_sound(local)
        return as_dataset(read_list(local))
    kind = shard_kind(local)
    if local.is_file() and kind is not None:
        return read_shards(kind, [local])
    if not local.is_dir():
        what = "is of no kind that is read" if local.is_file() else "is neither a file nor a folder"
        raise AdamergeError(f"path: {path} {what}: expected {_EXPECTED}")
    if data.get("name"):  # `datasets` would follow what its README.md names
        raise AdamergeError(
            f"name: {path} is a folder here, and name chooses a part of a data set on the hub: "
            "leave it out, and give the path of that part"
        )
    inner = subfolder(local, split)
    shards = shards_in(inner, split if inner == local else None)
    if shards is not None:
        return read_shards(*shards)
    return image_folder(inner, data.get("label", "label") == "label")


def _from_hub(path: str, split: str | None, data: Mapping[str, Any]) -> datasets.Dataset:
    local = Path(path)
    if _means_a_file(path):
        beside = os.listdir(local.parent) if local.parent.is_dir() else []
        raise AdamergeError(
            f"path: no such file or folder {path!r}{nearest(local.name, beside)}: mend the path, "
            "which starts at the suite's file or the working folder; a data set of the hub is "
            "named `name` or `owner/name`"
        )
    name, revision = data.get("name"), data.get("revision")
    return datasets.load_dataset(path, name, split=split or "test", revision=revision)


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
        try:
            read_json(file, "what `datasets` saves", "save the data set again")
        except AdamergeError as error:
            raise AdamergeError(f"path: {error}") from error
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
