"""A task's `data:` as a data set: the hub, a saved folder, a folder of images, or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from adamerge.binding import call, find, function_to, nearest, problems
from adamerge.errors import AdamergeError

_KEYS = ("path", "name", "split", "revision", "image", "label")


def open_dataset(task: str, data: Mapping[str, Any], part: str = "tasks") -> datasets.Dataset:
    """The images (and labels, if any) of one task, undecoded.

    Args:
        task: for messages.
        data: `path` is a hub name (with `name`, `split`, `revision`), a folder saved by
            `datasets`, or a folder of images with or without class subfolders; or `_target_` is
            the dotted path of a function that returns a `datasets.Dataset`, with its arguments.
        part: where the task stands in the suite, `tasks` or `unseen`; for messages.

    Raises:
        AdamergeError: nothing there, or nothing that can be read as images. No code that comes
            with a data set is ever run.
    """
    where = f"suite.{part}.{task}.data"
    found = data_problems(where, data)
    if found:
        raise AdamergeError("; ".join(found))
    if "_target_" not in data:
        return _read(where, data)
    try:
        made: datasets.Dataset = call(_function(where, data), _arguments(data), {})
    except ValueError as error:
        raise AdamergeError(f"{where}: {error}") from error
    return made


def data_problems(where: str, data: Any) -> list[str]:
    """What is wrong with a task's `data:`, before anything is read."""
    if not isinstance(data, Mapping):
        return [f"{where} is {data!r}: expected {', '.join(_KEYS)}, or _target_"]
    if "_target_" in data:
        try:
            return problems(_function(where, data), _arguments(data), where, ())
        except AdamergeError as error:
            return [str(error)]
    found = [f"{where}.{key} is unknown{nearest(key, _KEYS)}" for key in data if key not in _KEYS]
    return found + ([] if "path" in data else [f"{where}.path is missing"])


def _function(where: str, data: Mapping[str, Any]) -> Callable[..., Any]:
    expected = "a function annotated to return a datasets.Dataset"
    found: Callable[..., Any] = find(
        str(data["_target_"]), where, function_to(datasets.Dataset), expected
    )
    return found


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in ("_target_", "image", "label")}


def _read(where: str, data: Mapping[str, Any]) -> datasets.Dataset:
    path, split = str(data["path"]), str(data.get("split") or "test")
    folder = Path(path)
    try:
        if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(path)
        elif folder.is_dir():
            inner = folder / split
            if not inner.is_dir() and data.get("split"):
                raise FileNotFoundError(f"no folder {inner} for split {split!r}")
            source = str(inner) if inner.is_dir() else path
            loaded = datasets.load_dataset("imagefolder", data_dir=source, split="train")
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
