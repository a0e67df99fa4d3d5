"""What is wrong with a suite, seen from its configuration alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from adamerge._base.binding import nearest

_SUITE = ("pretrained", "tasks")
_OPTIONAL = ("name", "architecture", "root", "vars", "unseen", "missing", "logit_scale")
_UNSEEN = ("data", "classes", "templates")
_TASK = ("expert", *_UNSEEN)


def suite_problems(suite: Mapping[str, Any], shipped: Collection[str] = ()) -> Iterable[str]:
    """Unknown and missing keys, and what no suite can mean; files are not looked at.

    Args:
        shipped: the names of the task files there are, to be told of.
    """
    yield from _keys(suite, (*_OPTIONAL, *_SUITE), _SUITE, "suite")
    if "architecture" in suite and suite["architecture"] is None:
        yield "suite.architecture is missing"
    for key in ("architecture", "pretrained", "root"):
        if suite.get(key) is not None and not isinstance(suite[key], str):
            yield f"suite.{key} is {suite[key]!r}: expected a name or a path"
    yield from _missing("suite", suite)
    scale = suite.get("logit_scale")
    if scale is not None and not (type(scale) in (int, float) and 0 < scale < 1e6):
        yield f"suite.logit_scale is {scale!r}: expected what similarities are multiplied with"
    yield from _variables(suite.get("vars"))
    tasks = suite.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        yield "suite.tasks is empty: expected at least one task with its expert"
        return
    for name, task in tasks.items():
        yield from _name_problems("suite.tasks", name)
        yield from _task_problems(f"suite.tasks.{name}", task, _TASK, name in shipped)
        yield from _missing(f"suite.tasks.{name}", task)
    unseen = suite.get("unseen")
    if unseen is not None and not isinstance(unseen, Mapping):
        yield f"suite.unseen is {unseen!r}: expected tasks by name, without experts"
        return
    for name, task in (unseen or {}).items():
        where = f"suite.unseen.{name}"
        yield from _name_problems("suite.unseen", name)
        if name in tasks:
            yield f"{where} is in suite.tasks too: a task is merged or unseen; leave one out"
        if isinstance(task, Mapping) and "expert" in task:
            yield f"{where}.expert: an unseen task is only scored; move it to suite.tasks to merge"
            task = {key: value for key, value in task.items() if key != "expert"}
        yield from _task_problems(where, task, _UNSEEN, name in shipped)


def _name_problems(where: str, name: Any) -> Iterable[str]:
    """Tasks name files and, between dots, settings."""
    if not isinstance(name, str):
        yield f"{where}: the task name {name!r} is no text to YAML: quote it"
    elif not name or name != name.strip() or any(c in "/\\." or not c.isprintable() for c in name):
        yield (
            f"{where}: {name!r} cannot name a task, as files and settings are named by it: "
            "expected a name without /, \\, dots, control characters and spaces around it"
        )


def _missing(where: str, given: Any) -> Iterable[str]:
    value = given.get("missing") if isinstance(given, Mapping) else None
    if value not in (None, "pretrained"):
        yield (
            f"{where}.missing is {value!r}: expected pretrained, which takes the pretrained "
            "tensors for those that an expert's file lacks"
        )


def _variables(given: Any) -> Iterable[str]:
    if given is None:
        return
    if not isinstance(given, Mapping):
        yield f"suite.vars is {given!r}: expected names and values"
        return
    for key, value in given.items():
        if isinstance(value, Mapping | list):
            yield f"suite.vars.{key} is {value!r}: expected a single value"


def _task_problems(where: str, task: Any, keys: Sequence[str], shipped: bool) -> Iterable[str]:
    if not isinstance(task, Mapping):
        yield f"{where} is {task!r}: expected {', '.join(keys)}"
        return
    name = where.rpartition(".")[2]
    more = ("head", "task", *(("missing",) if "expert" in keys else ()))
    for problem in _keys(task, (*keys, *more), keys, where):
        lacks = shipped and problem.endswith(" is missing") and "expert" not in problem
        yield f"{problem} (add task: {name})" if lacks else problem
    if not isinstance(task.get("head"), str | None):
        yield f"{where}.head is {task['head']!r}: expected the path of a stored head"
    for key in ("classes", "templates"):
        value = task.get(key)
        if value is not None and not (isinstance(value, list) and value):
            yield f"{where}.{key} is {value!r}: expected a list of texts"
    templates = task.get("templates")
    for template in templates if isinstance(templates, list) else []:
        if not isinstance(template, str):
            yield f"{where}.templates: {template!r} is no text to YAML: quote it"
        elif not _takes_a_name(template):
            yield f"{where}.templates: {template!r} has no single {{}} for the class name"
    if isinstance(task.get("classes"), list):
        yield from _class_problems(f"{where}.classes", task["classes"])


def _class_problems(where: str, classes: list[Any]) -> Iterable[str]:
    listed = [str(name) for name in classes]
    for one in dict.fromkeys(listed):
        if listed.count(one) > 1:
            yield f"{where}: {one!r} is listed twice"
    for name in classes:
        if isinstance(name, bool) or not isinstance(name, str | int | float):
            yield f"{where}: {name!r} is no text to YAML (as no, off and null are not): quote it"
        elif not str(name).strip():
            yield f"{where}: {name!r} is empty: name that class"
    if len(classes) == 1:
        yield f"{where} has {listed[0]!r} alone: expected at least two classes"


def _takes_a_name(template: str) -> bool:
    try:
        return template.format("a name") == template.replace("{}", "a name") != template
    except (IndexError, KeyError, ValueError):
        return False


def _keys(
    given: Mapping[str, Any], known: Sequence[str], needed: Sequence[str], where: str
) -> Iterable[str]:
    for key in given:
        if key not in known:
            yield f"{where}.{key} is unknown{nearest(key, known)}"
    for key in needed:
        if given.get(key) is None:
            yield f"{where}.{key} is missing"
