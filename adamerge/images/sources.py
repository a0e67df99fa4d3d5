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
            dotted path of a function that is annotated to return a `datasets.Dataset`, or an
            `ImageSource` of its own, with its arguments.
        part: where the task stands in the suite, `tasks` or `unseen`; for messages.

    Raises:
        AdamergeError: nothing there, or nothing that can be read as images. No code that comes
            with a data set is ever run.
        OSError: no space for what `datasets` prepares.
    """
    where = f"suite.{part}.{task}.data"
    wrong = data_problems(where, data)
    if wrong:
        raise AdamergeError("; ".join(wrong))
    return _made(where, data) if "_target_" in data else _read(where, **data)


def _made(where: str, data: Mapping[str, Any]) -> datasets.Dataset | ImageSource:
    """What a function of the user's returns; what it raises is told as its own."""
    function = _function(where, data)
    try:
        made = call(function, _arguments(data), {})
    except AdamergeError as error:
        raise AdamergeError(f"{where}: {error}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = [one for one in frames if one.filename == function.__code__.co_filename]
        at = (inside or frames)[-1]
        raise AdamergeError(
            f"{where}: {data['_target_']} raised {type(error).__name__}: "
            f"{one_line(error, 300)} ({at.filename}, line {at.lineno}): mend the function or its "
            "arguments"
        ) from error
    if not isinstance(made, datasets.Dataset):
        if isinstance(made, ImageSource):
            return made
        raise AdamergeError(
            f"{where}: {data['_target_']} returned {type(made).__name__}: expected one "
            "datasets.Dataset or ImageSource, as it is annotated to return"
        )
    return with_images(made, data.get("image", "image"), [Path.cwd()], where)


def data_problems(where: str, data: Any) -> list[str]:
    """What is wrong with a task's `data:`, before anything is read."""
    if not isinstance(data, Mapping):
        return [f"{where} is {data!r}: expected path, or _target_, and other keys"]
    if "_target_" not in data:
        empty = [f"{where}.path is '': expected a path or a hub name"] * (data.get("path") == "")
        return problems(_read, data, where, ("where",)) + empty
    columns = {key: data[key] for key in ("image", "label") if key in data}
    wrong = problems(_read, {"path": "-", **columns}, where, ("where",))
    try:
        return wrong + problems(_function(where, data), _arguments(data), where, ())
    except AdamergeError as error:
        return [*wrong, str(error)]


def _function(where: str, data: Mapping[str, Any]) -> Callable[..., Any]:
    expected = "a function annotated to return a datasets.Dataset or an ImageSource"
    kind = function_to(datasets.Dataset, ImageSource)
    return find(str(data["_target_"]), where, kind, expected)


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in ("_target_", "image", "label")}


def _read(
    where: str,
    path: str,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image: str = "image",
    label: str | None = "label",
) -> datasets.Dataset | ImageSource:
    path = os.path.expanduser(path)
    local = Path(path)
    here = local.exists() or glob.has_magic(path)
    try:
        if local.is_file() and local.suffix.lower() in _ARRAYS:
            require_sound(local)
            return ArraySource(where, local, split or "test")
        if not here:
            _require_a_hub_name(path)
            return _from_hub(path, name, split, revision)
        places = [local, local.parent, Path()] if local.is_dir() else [local.parent, Path()]
        places = [place.absolute() for place in places]
        return with_images(_local(path, name, split, label == "label"), image, places, path)
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


def _from_hub(
    path: str, name: str | None, split: str | None, revision: str | None
) -> datasets.Dataset:
    """A split of a data set on the hub, by its name or another for the same (`val`, `dev`)."""
    told = ""
    for wanted in split_names(split):
        try:
            return datasets.load_dataset(path, name, split=wanted, revision=revision)
        except ValueError as error:
            if not (told := str(error)).startswith("Unknown split"):
                raise
    others = told.partition("one of ")[2].strip("[].") or "other splits"
    raise AdamergeError(f"split: no {split or 'test'!r} in {path}: it has {others}")


def _local(path: str, name: str | None, split: str | None, labelled: bool) -> datasets.Dataset:
    """Whatever is at the path or fits the pattern; errors of ours name the key within `data`."""
    local = Path(path)
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        return _saved(path, split)
    if not local.exists():
        return _globbed(path)
    if local.is_dir() and name:  # `datasets` would follow what its README.md names
        raise AdamergeError(
            f"name: {path} is a folder here, and name chooses a part of a data set on the hub: "
            "leave it out, and give the path of that part"
        )
    if local.is_dir():
        inner = subfolder(local, split)
        shards = shards_in(inner, split if inner == local else None)
        return image_folder(inner, labelled) if shards is None else read_shards(*shards)
    kind = shard_kind(local)
    if not local.is_file() or (kind is None and local.suffix.lower() not in LISTS):
        what = "of no kind that is read" if local.is_file() else "neither a file nor a folder"
        raise AdamergeError(f"path: {path} is {what}: expected {_EXPECTED}")
    if kind is not None:
        return read_shards(kind, [local])
    require_sound(local)
    return as_dataset(read_list(local))


def _require_a_hub_name(path: str) -> None:
    """Refuses a path that leads nowhere and cannot be meant for the hub."""
    local = Path(path)
    if (
        path.startswith((".", "~", "/"))
        or path.count("/") > 1
        or shard_kind(local)
        or is_image(local)
        or local.suffix.lower() in (*_ARRAYS, *LISTS, *_NO_READER)
        or ("/" in path and Path(local.parts[0]).is_dir())
    ):
        beside = os.listdir(local.parent) if local.parent.is_dir() else []
        raise AdamergeError(
            f"path: no such file or folder {path!r}{nearest(local.name, beside)}: mend the path, "
            "which starts at the suite's file or the working folder; a data set of the hub is "
            "named `name` or `owner/name`"
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
        name = next((name for name in split_names(split) if name in loaded), None)
        if name is None:
            raise AdamergeError(
                f"split: no {split or 'test'!r} in {path}: it has {', '.join(loaded)}"
            )
        loaded = loaded[name]
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
