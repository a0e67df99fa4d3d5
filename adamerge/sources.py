"""A task's `data:` as a data set: the hub, a saved folder, a folder of images, or a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from adamerge.binding import call, find, function_to, problems
from adamerge.errors import AdamergeError

_KEYS = ("path", "name", "split", "revision", "image", "label")


def open_dataset(task: str, data: Mapping[str, Any]) -> datasets.Dataset:
    """The images (and labels, if any) of one task, undecoded.

    Args:
        task: for messages.
        data: `path` is a hub name (with `name`, `split`, `revision`), a folder saved by
            `datasets`, or a folder of images with or without class subfolders; or `_target_` is
            the dotted path of a function that returns a `datasets.Dataset`, with its arguments.

    Raises:
        AdamergeError: nothing there, or nothing that can be read as images. No code that comes
            with a data set is ever run.
    """
    where = f"suite.tasks.{task}.data"
    if "_target_" in data:
        arguments = {
            key: value for key, value in data.items() if key not in ("_target_", "image", "label")
        }
        expected = "a function annotated to return a datasets.Dataset"
        target = find(str(data["_target_"]), where, function_to(datasets.Dataset), expected)
        found = problems(target, arguments, where, ())
        if found:
            raise AdamergeError("; ".join(found))
        made: datasets.Dataset = call(target, arguments, {})
        return made
    unknown = sorted(set(data) - set(_KEYS))
    if unknown or "path" not in data:
        what = f"{where}.{unknown[0]} is unknown" if unknown else f"{where}.path is missing"
        raise AdamergeError(f"{what}: expected {', '.join(_KEYS)}, or _target_ with its arguments")
    return _read(where, data)


def _read(where: str, data: Mapping[str, Any]) -> datasets.Dataset:
    path, split = str(data["path"]), str(data.get("split") or "test")
    folder = Path(path)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
        elif folder.is_dir():
            loaded = datasets.load_dataset("imagefolder", data_dir=path, split="train")
        else:
            loaded = datasets.load_dataset(
                path, data.get("name"), split=split, revision=data.get("revision")
            )
    except Exception as error:  # `datasets` raises a dozen types for one thing: not readable
        reason = " ".join(str(error).split())[:200]
        raise AdamergeError(
            f"{where}.path: cannot read {path!r} ({type(error).__name__}: {reason}): expected a "
            "hub name, a folder saved by `datasets`, or a folder of images"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise AdamergeError(
                f"{where}.split: no {split!r} in {path}: it has {', '.join(loaded)}"
            )
        loaded = loaded[split]
    return loaded
