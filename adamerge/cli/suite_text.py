"""The text of a suite that was inferred, with `FILL IN` where something could not be."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from adamerge.cli.task_hints import agree, local_data, normal, shipped_task, task_name
from adamerge.config.settings import config_root

_WIDTH = 96
_START = """\
# Written by `adamerge init`. Every key: docs/suites.md and configs/my_suite.yaml.
#   adamerge check suite={0}    # what is missing, and whether every expert solves its task
#   python train.py suite={0}

"""
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null|nan|inf)$)[a-z/][\w./-]*", re.I)


class Line(NamedTuple):
    """A key of the suite, dotted, its value (None is to be filled in), and a comment."""

    key: str
    value: Any
    comment: str = ""


@dataclass
class Task:
    """A task of the suite; paths are as the suite names them."""

    name: str
    expert: str
    shipped: str | None  # the shipped task it is, by its name
    names: tuple[str, ...]  # what the checkpoint is called, for images and heads named so
    head: str | None = None  # a stored one
    rows: int = 0  # of the head

    def is_named(self, name: str) -> bool:
        """Whether a file or folder of that name is of this task."""
        words = {normal(one) for one in (self.name, *self.names)}
        forms = {normal(name), normal(task_name(name)), normal(name).removesuffix("val")}
        return bool(forms & words or (self.shipped and shipped_task(name, [self.shipped])))

    def file(self) -> dict[str, Any]:
        """The keys of the shipped task, or none."""
        if self.shipped is None:
            return {}
        path = config_root() / "task" / f"{self.shipped}.yaml"
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))

    def lines(self, data: Path | None, here: Path) -> list[Line]:
        """Its part of the suite.

        Args:
            data: a folder with images per task.
            here: the folder of the suite.
        """
        lines, shipped = [Line("expert", self.expert)], self.file()
        if shipped:
            said = "by its name; it brings classes, templates and data"
            lines.insert(0, Line("task", self.shipped, said))
        if self.head is not None:
            said = f"{self.rows} rows, which must be in the order of the classes"
            lines.append(Line("head", self.head, said))
        classes = None
        if data is not None and (images := local_data(data, self.is_named)) is not None:
            classes = images.classes
            value, said = {"path": path_from(here, images.path), **images.keys}, ""
            if shipped.get("data", {}).get("name") is not None:
                value["name"] = None  # of the hub's data set, not of this one
            if classes and shipped and not agree(images, shipped["classes"]):
                value["label"] = None
                said = f"its {len(classes)} classes are not the task's: labels not used"
            elif not shipped:  # nothing to go over
                usual = {("split", None), ("image", "image"), ("label", "label"), ("label", None)}
                value = {k: v for k, v in value.items() if (k, v) not in usual}
            lines.append(Line("data", value, said))
        elif not shipped:
            lines.append(Line("data", None, "{path: …}, its images; no labels needed"))
        lines += [] if shipped else self._prompts(classes)
        return [line._replace(key=f"tasks.{self.name}.{line.key}") for line in lines]

    def _prompts(self, classes: list[str] | None) -> list[Line]:
        said = f"[…], its {f'{self.rows} ' * bool(self.rows)}class names in the order of the labels"
        lines = [Line("classes", None, said)]
        if classes and self.rows in (0, len(classes)):
            lines = [Line("classes", classes, "as its data names them")]
        if self.head is not None:
            return [*lines, Line("templates", ["{}"], "not used: the head is stored")]
        said = '[…], what its head is made with, like ["a photo of a {}."]'
        return [*lines, Line("templates", None, said)]


def path_from(base: Path, path: Path) -> str:
    """A path as the suite names it: relative to what it lies in, else absolute."""
    path, base = path.absolute(), base.absolute()
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def text(name: str, lines: Iterable[Line]) -> str:
    """The suite as YAML, tasks under their names; comments stand behind a key, long ones before.

    Args:
        name: of the file.
    """
    written, task = "", ""
    for line in lines:
        outer, _, key = line.key.rpartition(".")
        if outer != task:
            written += "" if task else "\ntasks:\n"
            written += f"  {_scalar(outer.removeprefix('tasks.'))}:\n"
            task = outer
        indent = "    " if outer else ""
        comment = f"FILL IN: {line.comment}" if line.value is None else line.comment
        if line.value == "":
            written += f"# {comment}; {key}: would go over it\n"
        elif not comment:
            written += f"{indent}{key}: {_scalar(line.value)}\n"
        elif len(comment) + len(shown := f"{indent}{key}: {_scalar(line.value)}") > _WIDTH:
            written += f"{indent}# {comment}\n{shown}\n"
        else:
            written += f"{shown} # {comment}\n"
    return _START.format(name) + written


def _scalar(value: Any) -> str:
    """A value as YAML on one line: JSON, but for texts that are read as texts without quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_scalar(k)}: {_scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_scalar, value)) + "]"
    plain = isinstance(value, str) and _PLAIN.fullmatch(value)
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
