"""The text of a suite that was inferred, with `FILL IN` where something could not be."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adamerge.cli.inference import Answer
from adamerge.cli.local_data import LocalData, agree, local_data
from adamerge.cli.task_names import normal, shipped_task, task_name
from adamerge.config.settings import config_root

_WIDTH = 96
_START = """\
# Written by `adamerge init`. Every key: docs/suites.md and configs/my_suite.yaml.
#   adamerge check suite={0}    # what is missing, and whether every expert solves its task
#   python train.py suite={0}
"""


@dataclass(frozen=True)
class Entry:
    """A task of the suite.

    Attributes:
        expert, head: paths as the suite names them.
        task: the shipped task it is, by its name.
        names: what the checkpoint is called, for images and heads named so.
        rows: of the head.
    """

    name: str
    expert: str
    task: str | None
    names: tuple[str, ...]
    head: str | None = None
    rows: int = 0

    def is_named(self, name: str) -> bool:
        """Whether a file or folder of that name is of this task."""
        words = {normal(own) for own in (self.name, *self.names)}
        shipped = None if self.task is None else shipped_task(name, (self.task,))
        return shipped is not None or bool(
            {normal(name), normal(task_name(name)), normal(name).removesuffix("val")} & words
        )

    def task_file(self) -> dict[str, Any]:
        """The keys of the shipped task, or none."""
        if self.task is None:
            return {}
        path = config_root() / "task" / f"{self.task}.yaml"
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Suite:
    """What all tasks share; `features` is what the towers are projected to, where known."""

    path: Path
    architecture: Answer
    pretrained: Answer
    root: str
    features: int | None


class _Lines:
    """Lines of YAML, and the keys that are left to fill in."""

    def __init__(self, start: str) -> None:
        self.lines = [start]
        self.missing: list[tuple[str, str]] = []

    def add(self, key: str, value: Any, comment: str = "", where: str | None = None) -> None:
        """A key and its value; None with `where` is a place to fill in, which the comment says."""
        indent = "" if where is None or where.count(".") == 1 else "    "
        if value is None and where is not None:
            self.missing.append((where, comment))
            comment = f"FILL IN: {comment}"
        line = f"{indent}{key}: {scalar(value)}"
        if isinstance(value, list) and len(line) > _WIDTH:
            self.lines.append(f"{indent}{key}:{f' # {comment}' if comment else ''}")
            self.lines += [f"{indent}  - {scalar(item)}" for item in value]
        elif comment and len(line) + len(comment) > _WIDTH:
            start = f"{indent}# "
            self.lines += textwrap.wrap(
                comment, _WIDTH, initial_indent=start, subsequent_indent=start
            )
            self.lines.append(line)
        else:
            self.lines.append(f"{line} # {comment}" if comment else line)


class _Quoting(yaml.SafeDumper):
    """Quotes what any reader of YAML could take for a number: omegaconf reads 1e3 as one."""


def _represent(dumper: _Quoting, value: str) -> yaml.ScalarNode:
    style = None if value[:1].isalpha() or value[:1] in "/_" else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Quoting.add_representer(str, _represent)


def scalar(value: Any) -> str:
    """A value on one line of YAML, quoted where it would be read as something else."""
    if isinstance(value, str):  # `${…}` would be taken for the value of another key
        value = value.replace("${", "\\${")
    written = yaml.dump(
        [value],
        Dumper=_Quoting,
        default_flow_style=True,
        allow_unicode=True,
        sort_keys=False,
        width=10**9,
    )
    return str(written).strip()[1:-1]


def text(
    suite: Suite, entries: Sequence[Entry], data: Path | None
) -> tuple[str, list[tuple[str, str]]]:
    """The suite as YAML, and `(key, what it is)` of everything left to fill in."""
    lines = _Lines(_START.format(suite.path.name))
    told = suite.architecture
    if told.value == "":
        lines.lines.append(f"# {told.why}; architecture: would go over it")
    else:
        lines.add("architecture", told.value, told.why, "suite.architecture")
    lines.add("pretrained", suite.pretrained.value, suite.pretrained.why, "suite.pretrained")
    if suite.root:
        lines.add("root", suite.root, "where pretrained and experts are looked for first")
    lines.lines += ["", "tasks:"]
    for entry in entries:
        found = local_data(data, entry.is_named) if data is not None else None
        _add_entry(lines, entry, found, suite.path.resolve().parent)
    return "\n".join(lines.lines) + "\n", lines.missing


def _add_entry(lines: _Lines, entry: Entry, found: LocalData | None, here: Path) -> None:
    where = f"suite.tasks.{entry.name}"
    lines.lines.append(f"  {scalar(entry.name)}:")
    if entry.task is not None:
        said = "by its name; it brings classes, templates and data"
        lines.add("task", entry.task, said, f"{where}.task")
    lines.add("expert", entry.expert, "", f"{where}.expert")
    if entry.head is not None:
        said = f"{entry.rows} rows, which must be in the order of the classes"
        lines.add("head", entry.head, said, f"{where}.head")
    if found is not None:
        value, said = _data(entry, found, here)
        lines.add("data", value, said, f"{where}.data")
    elif entry.task is None:
        lines.add("data", None, "{path: …}, its images; no labels needed", f"{where}.data")
    if entry.task is None:
        _add_prompts(lines, entry, found.classes if found else None, where)


def _add_prompts(lines: _Lines, entry: Entry, classes: list[str] | None, where: str) -> None:
    if classes is not None and entry.rows not in (0, len(classes)):
        classes = None
    count = f"{entry.rows} " if entry.rows else ""
    said = f"[…], its {count}class names in the order of the labels"
    lines.add("classes", classes, "as its data names them" if classes else said, f"{where}.classes")
    if entry.head is not None:
        lines.add("templates", ["{}"], "not used: the head is stored", f"{where}.templates")
        return
    said = '[…], what its head is made with, like ["a photo of a {}."]'
    lines.add("templates", None, said, f"{where}.templates")


def _data(entry: Entry, found: LocalData, here: Path) -> tuple[dict[str, Any], str]:
    path = found.path.absolute()
    place = str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
    value: dict[str, Any] = {"path": place.replace("${", "\\${"), **found.keys}
    below = entry.task_file()
    if below.get("data", {}).get("name") is not None:
        value["name"] = None  # of the hub's data set, not of this one
    if found.classes and below and not agree(found, below["classes"]):
        value["label"] = None
        return value, f"its {len(found.classes)} classes are not the task's: labels not used"
    if not below:  # nothing to go over
        usual = {("split", None), ("image", "image"), ("label", "label"), ("label", None)}
        value = {k: v for k, v in value.items() if (k, v) not in usual}
    return value, ""
