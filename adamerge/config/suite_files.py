"""What a suite takes from elsewhere: task files, and the folder of its checkpoints."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge._base.binding import nearest
from adamerge._base.errors import AdamergeError

HUB = "hf://"  # a checkpoint on the Hugging Face hub: never a path
TASK_FILE = ("data", "classes", "templates")

Entry = dict[str, Any]


def entries(suite: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    """`(where, entry)` of every task, merged or unseen; what is no mapping is left to the check."""
    for part in ("tasks", "unseen"):
        tasks = suite.get(part)
        for name, entry in tasks.items() if isinstance(tasks, dict) else ():
            if isinstance(entry, dict):
                yield f"suite.{part}.{name}", entry


def name_by_text(suite: Entry) -> None:
    """Makes texts of the task names that YAML reads as numbers (`101:`), in place.

    Raises:
        AdamergeError: a name is there as a number and as text.
    """
    for part in ("tasks", "unseen"):
        tasks = suite.get(part)
        if isinstance(tasks, dict):
            named = [str(name) if type(name) in (int, float) else name for name in tasks]
            twice = {name for name in named if named.count(name) > 1}
            if twice:
                raise AdamergeError(
                    f"suite.{part} has {min(twice)!r} twice, as a number and as text: rename "
                    "one of the two"
                )
            suite[part] = dict(zip(named, tasks.values(), strict=True))


def take_task_files(suite: Mapping[str, Any], read: Callable[[str, str], Entry]) -> None:
    """Replaces every entry's `task:` by what that file says, under the entry's own keys.

    Args:
        suite: changed in place.
        read: `(where, value of task:)` -> the keys of that task file.

    Raises:
        AdamergeError: a task file with a key that is not one of `TASK_FILE`.
    """
    for where, entry in entries(suite):
        if "task" not in entry:
            continue
        source = str(entry.pop("task"))
        below = read(f"{where}.task", source)
        for key in below:
            if key not in TASK_FILE:
                raise AdamergeError(
                    f"task file {source} has the unknown key {key!r}{nearest(key, TASK_FILE)}: "
                    f"expected {', '.join(TASK_FILE)}; an expert belongs in the suite"
                )
        own = {key: value for key, value in entry.items() if value is not None}
        entry |= {**below, **own}
        if "data" in below and "data" in own:
            entry["data"] = _over(own["data"], below["data"])


def _over(own: Any, below: Any) -> Any:
    """An entry's `data:` over its task file's, key by key.

    A function, or another place, has its own splits and columns: where an entry names one, its own
    keys are all that counts.
    """
    own, below = ({"path": data} if isinstance(data, str) else data for data in (own, below))
    if not isinstance(own, dict) or not isinstance(below, dict):
        return own
    if any(key in own and own[key] != below.get(key) for key in ("_target_", "path")):
        return own
    return {**below, **own}


def locate(suite: Entry, folder: Path) -> None:
    """Makes a suite's paths absolute: relative to its own file, else to the working folder.

    Experts and pretrained are looked for in `root` before. An expert that is nowhere is one that
    `root` lacks.
    """
    here = (folder, Path.cwd())
    if isinstance(suite.get("root"), str):
        suite["root"] = _found(suite["root"], *here)
    root = Path(suite["root"]) if isinstance(suite.get("root"), str) else None
    first = [root] if root is not None and root.is_dir() else []
    if "architecture" in suite:  # which may be left out, but not left empty
        suite["architecture"] = _found(suite["architecture"], *here)
    suite["pretrained"] = _found(suite.get("pretrained"), *first, *here)
    for _, task in entries(suite):
        locate_data(task, *here)
        if task.get("head") is not None:
            task["head"] = _found(task["head"], *first, *here)
        expert = _found(task.get("expert"), *first, *here)
        if isinstance(expert, str):
            lost = first and not expert.startswith(HUB) and not Path(expert).exists()
            task["expert"] = str(first[0] / expert) if lost else expert


def locate_data(task: Entry, *bases: Path) -> None:
    """Makes the path of an entry's `data:` absolute; a bare text is a path.

    So is one that leads nowhere yet begins with a folder that is there: it is no hub name.
    """
    if isinstance(task.get("data"), str):
        task["data"] = {"path": task["data"]}
    data = task.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        return
    value = os.path.expanduser(data["path"])
    found = _found(value, *bases)
    first, slash, _ = value.partition("/")
    if found == value and slash and first and not Path(value).exists():
        base = next((base for base in bases if (base / first).is_dir()), None)
        found = value if base is None else str(base / value)
    data["path"] = found


def _found(value: Any, *bases: Path) -> Any:
    """The absolute path of what lies at `value` in the first base that has it, or `value`."""
    if not isinstance(value, str) or value.startswith(HUB):
        return value
    value = os.path.expanduser(value)
    for base in bases:
        if (base / value).exists():
            return str((base / value).resolve())
        pattern = os.path.join(glob.escape(str(base)), value)
        if glob.has_magic(value) and any(glob.iglob(pattern, recursive=True)):
            return pattern
    return value


def require_root(suite: Mapping[str, Any]) -> None:
    """Checks that a suite which looks for its checkpoints in `root` has that folder.

    Raises:
        AdamergeError: no such folder, and an expert that was found nowhere else.
    """
    if "root" not in suite:
        return
    root = suite["root"]
    experts = [str(entry["expert"]) for entry in suite["tasks"].values()]
    lost = [path for path in experts if not path.startswith(HUB) and not Path(path).exists()]
    if lost and not (root and Path(root).is_dir()):
        said = f"is {root!r}, which is no folder" if root else "is not set"
        raise AdamergeError(
            f"suite.root {said}: {lost[0]} and the other checkpoints of suite {suite['name']} are "
            "looked for in it; set suite.root=/path/to/their/folder"
        )
