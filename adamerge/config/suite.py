"""A suite's file: what it takes from elsewhere (task files, the folder of its checkpoints), and
what is wrong with it, seen from its keys alone."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adamerge._base.binding import nearest
from adamerge._base.errors import AdamergeError

HUB = "hf://"  # a checkpoint on the Hugging Face hub: never a path
TO_GIVE = "???"  # begins a variable that has no value of its own; what it should be follows
TASK_FILE = ("data", "classes", "templates")
_SUITE = ("pretrained", "tasks")
_OPTIONAL = ("name", "architecture", "root", "vars", "unseen", "missing", "logit_scale", "align")

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
        above = {key: value for key, value in entry.items() if value is not None}
        entry |= {**below, **above}
        if "data" in below and "data" in above:
            entry["data"] = _over(above["data"], below["data"])


def _over(above: Any, below: Any) -> Any:
    """An entry's `data:` over its task file's, key by key.

    A function, or another place, has its own splits and columns: where an entry names one, its own
    keys are all that counts.
    """
    above, below = ({"path": data} if isinstance(data, str) else data for data in (above, below))
    if not isinstance(above, dict) or not isinstance(below, dict):
        return above
    if any(key in above and above[key] != below.get(key) for key in ("_target_", "path")):
        return above
    return {**below, **above}


def locate(suite: Entry, folder: Path) -> None:
    """Makes a suite's paths absolute: relative to its own file, else to the working folder.

    Experts and pretrained are looked for in `root` before. An expert that is nowhere is one that
    `root` lacks.
    """
    here = [folder, Path.cwd()]
    for key in {"root", "architecture"} & set(suite):  # may be left out, but not left empty
        suite[key] = _path(suite[key], here)
    root = suite.get("root")
    places = [Path(root), *here] if isinstance(root, str) and os.path.isdir(root) else here
    suite["pretrained"] = _path(suite.get("pretrained"), places)
    for _, task in entries(suite):
        locate_data(task, *here)
        if task.get("head") is not None:
            task["head"] = _path(task["head"], places)
        if isinstance(task.get("expert"), str):
            expert = _path(task["expert"], places)
            lost = places is not here and _is_lost(expert)
            task["expert"] = str(places[0] / expert) if lost else expert


def locate_data(task: Entry, *places: Path) -> None:
    """Makes the path of an entry's `data:` absolute; a bare text is a path.

    So is one that leads nowhere yet begins with a folder that is there: it is no hub name.
    """
    if isinstance(task.get("data"), str):
        task["data"] = {"path": task["data"]}
    data = task.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        return
    value = os.path.expanduser(data["path"])
    data["path"] = _path(value, places)
    first, slash, _ = value.partition("/")
    if data["path"] == value and slash and first and not Path(value).exists():
        base = next((place for place in places if (place / first).is_dir()), None)
        data["path"] = value if base is None else str(base / value)


def _path(value: Any, places: Sequence[Path]) -> Any:
    """The absolute path of what lies at `value` in the first place that has it, or `value`."""
    if not isinstance(value, str) or value.startswith(HUB):
        return value
    value = os.path.expanduser(value)
    for place in places:
        if (place / value).exists():
            return str((place / value).resolve())
        pattern = os.path.join(glob.escape(str(place)), value)
        if glob.has_magic(value) and any(glob.iglob(pattern, recursive=True)):
            return pattern
    return value


def _is_lost(expert: Any) -> bool:
    return isinstance(expert, str) and not expert.startswith(HUB) and not Path(expert).exists()


def require_root(suite: Mapping[str, Any]) -> None:
    """Checks that a suite which looks for its checkpoints in `root` has that folder.

    Raises:
        AdamergeError: no such folder, and an expert that was found nowhere else.
    """
    root = suite.get("root")
    lost = [entry["expert"] for entry in suite["tasks"].values() if _is_lost(entry["expert"])]
    if "root" in suite and lost and not (root and Path(root).is_dir()):
        said = f"is {root!r}, which is no folder" if root else "is not set"
        raise AdamergeError(
            f"suite.root {said}: {lost[0]} and the other checkpoints of suite {suite['name']} are "
            "looked for in it; set suite.root=/path/to/their/folder"
        )


def suite_problems(suite: Mapping[str, Any], shipped: Collection[str] = ()) -> Iterator[str]:
    """Unknown and missing keys, and what no suite can mean; files are not looked at.

    Args:
        shipped: the names of the task files there are, to be told of.
    """
    needed = _SUITE if suite.get("align") is None else ("tasks",)
    yield from _key_problems(suite, (*_OPTIONAL, *_SUITE), needed, "suite")
    if suite.get("architecture", "") is None:
        yield "suite.architecture is missing"
    for key in ("architecture", "pretrained", "root"):
        if not isinstance(suite.get(key), str | None):
            yield f"suite.{key} is {suite[key]!r}: expected a name or a path"
    scale = suite.get("logit_scale")
    if scale is not None and not (type(scale) in (int, float) and 0 < scale < 1e6):
        yield f"suite.logit_scale is {scale!r}: expected what similarities are multiplied with"
    given = suite.get("vars")
    if not isinstance(given, Mapping | None):
        yield f"suite.vars is {given!r}: expected names and values"
    for key, value in given.items() if isinstance(given, Mapping) else ():
        if isinstance(value, Mapping | list):
            yield f"suite.vars.{key} is {value!r}: expected a single value"
        elif isinstance(value, str) and value.startswith(TO_GIVE):
            said = value.removeprefix(TO_GIVE).strip() or "a value"
            yield f"suite.vars.{key} is not set: expected {said}; give it as suite.vars.{key}=…"
    tasks, unseen = suite.get("tasks"), suite.get("unseen")
    if not isinstance(tasks, Mapping) or not tasks:
        yield "suite.tasks is empty: expected at least one task with its expert"
        tasks = {}
    if not isinstance(unseen, Mapping | None):
        yield f"suite.unseen is {unseen!r}: expected tasks by name, without experts"
        unseen = {}
    for name, task in tasks.items():
        yield from _task_problems("suite.tasks", name, task, ("expert", *TASK_FILE), shipped)
    for name, task in (unseen or {}).items():
        where = f"suite.unseen.{name}"
        if name in tasks:
            yield f"{where} is in suite.tasks too: a task is merged or unseen; leave one out"
        if isinstance(task, Mapping) and "expert" in task:
            yield f"{where}.expert: an unseen task is only scored; move it to suite.tasks to merge"
            task = {key: value for key, value in task.items() if key != "expert"}
        yield from _task_problems("suite.unseen", name, task, TASK_FILE, shipped)


def _task_problems(
    part: str, name: Any, task: Any, keys: Sequence[str], shipped: Collection[str]
) -> Iterator[str]:
    where = f"{part}.{name}"
    if not isinstance(name, str):
        yield f"{part}: the task name {name!r} is no text to YAML: quote it"
    elif not name or name != name.strip() or any(c in "/\\." or not c.isprintable() for c in name):
        yield (
            f"{part}: {name!r} cannot name a task, as files and settings are named by it: "
            "expected a name without /, \\, dots, control characters and spaces around it"
        )
    if not isinstance(task, Mapping):
        yield f"{where} is {task!r}: expected {', '.join(keys)}"
        return
    more = ("head", "task", *(("missing",) if "expert" in keys else ()))
    for problem in _key_problems(task, (*keys, *more), keys, where):
        lacks = name in shipped and problem.endswith(" is missing") and "expert" not in problem
        yield f"{problem} (add task: {name})" if lacks else problem
    if not isinstance(task.get("head"), str | None):
        yield f"{where}.head is {task['head']!r}: expected the path of a stored head"
    for key, check in (("templates", _template_problems), ("classes", _class_problems)):
        value = task.get(key)
        if isinstance(value, list) and value:
            yield from check(f"{where}.{key}", value)
        elif value is not None:
            yield f"{where}.{key} is {value!r}: expected a list of texts"


def _template_problems(where: str, templates: list[Any]) -> Iterator[str]:
    for template in templates:
        if not isinstance(template, str):
            yield f"{where}: {template!r} is no text to YAML: quote it"
        elif template.count("{}") != 1 or {"{", "}"} & set(template.replace("{}", "")):
            yield f"{where}: {template!r} has no single {{}} for the class name"


def _class_problems(where: str, classes: list[Any]) -> Iterator[str]:
    for name, count in Counter(map(str, classes)).items():
        if count > 1:
            yield f"{where}: {name!r} is listed twice"
    for name in classes:
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            yield f"{where}: {name!r} is no text to YAML (as no, off and null are not): quote it"
        elif not str(name).strip():
            yield f"{where}: {name!r} is empty: name that class"
    if len(classes) == 1:
        yield f"{where} has {str(classes[0])!r} alone: expected at least two classes"


def _key_problems(
    given: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str
) -> Iterator[str]:
    for key in given:
        if key not in known:
            yield f"{where}.{key} is unknown{nearest(key, known)}"
    for key in needed:
        if given.get(key) is None:
            yield f"{where}.{key} is missing"
    if given.get("missing") not in (None, "pretrained"):
        yield (
            f"{where}.missing is {given['missing']!r}: expected pretrained, which takes the "
            "pretrained tensors for those that an expert's file lacks"
        )
