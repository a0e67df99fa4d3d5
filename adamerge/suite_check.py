"""What is wrong with a suite, seen from its configuration alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adamerge.binding import nearest

_SUITE = ("architecture", "pretrained", "tasks")
_TASK = ("expert", "data", "classes", "templates")


def suite_problems(suite: Mapping[str, Any]) -> Iterable[str]:
    """Unknown and missing keys, and what no suite can mean; files are not looked at."""
    yield from _keys(suite, ("name", *_SUITE), _SUITE, "suite")
    for key in ("architecture", "pretrained"):
        if suite.get(key) is not None and not isinstance(suite[key], str):
            yield f"suite.{key} is {suite[key]!r}: expected a name or a path"
    tasks = suite.get("tasks")
    if not isinstance(tasks, Mapping) or not tasks:
        yield "suite.tasks is empty: expected at least one task with its expert"
        return
    for name, task in tasks.items():
        where = f"suite.tasks.{name}"
        if not isinstance(task, Mapping):
            yield f"{where} is {task!r}: expected {', '.join(_TASK)}"
            continue
        yield from _keys(task, _TASK, _TASK, where)
        for key in ("classes", "templates"):
            value = task.get(key)
            if key in task and not (isinstance(value, list) and value):
                yield f"{where}.{key} is {value!r}: expected a list of texts"
        templates = task.get("templates")
        for template in templates if isinstance(templates, list) else []:
            if not _takes_a_name(str(template)):
                yield f"{where}.templates: {template!r} has no single {{}} for the class name"
        classes = task.get("classes")
        listed = [str(name) for name in classes] if isinstance(classes, list) else []
        for name in dict.fromkeys(listed):
            if listed.count(name) > 1:
                yield f"{where}.classes: {name!r} is listed twice"


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
