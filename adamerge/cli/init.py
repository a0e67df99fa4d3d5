"""`adamerge init`: a suite written by looking at a folder of checkpoints."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing
from adamerge.cli.inference import (
    Answer,
    architecture_answer,
    file_name,
    is_pretrained,
    one_shape,
    pretrained_answer,
    pretrained_of,
)
from adamerge.cli.suite_text import Entry, Suite, text
from adamerge.cli.survey import Found, look, survey
from adamerge.cli.task_names import (
    key,
    normal,
    says_nothing,
    shipped_task,
    task_name,
    without_common_start,
)
from adamerge.config.settings import names as shipped_names
from adamerge.encoders.architectures import shape_named
from adamerge.weights.formats import hub


def init(
    folder: Path,
    to: Path,
    pretrained: str | None = None,
    architecture: str | None = None,
    data: Path | None = None,
) -> list[str]:
    """Writes a suite of the checkpoints in a folder and one level below.

    Args:
        folder: weight files, or folders of open_clip, transformers or PEFT.
        to: the file to write; it must not exist.
        pretrained, architecture: as in a suite, where they are not to be inferred.
        data: a folder with a data set per task, named like the tasks.

    Returns:
        What was found, what was left out, and every key that is left to fill in, a line each.

    Raises:
        AdamergeError: no expert there, several architectures, or a file that would be lost.
    """
    if to.exists():
        raise AdamergeError(f"{to} exists already: name another file with --to")
    if not to.absolute().parent.is_dir():
        raise AdamergeError(f"{to} lies in no folder that exists: name another with --to")
    found, skipped = survey(folder)
    models = [one for one in found if one.kind != "head"]
    chosen = _chosen(pretrained, models, folder)
    experts = []
    for one in models:
        if chosen is not None and one.path == chosen.path:
            continue
        if is_pretrained(one.path):
            skipped.append(f"{_at(one.path, folder)} is named as a pretrained model, left out")
        else:
            experts.append(one)
    experts, others = _of_architecture(experts, architecture)
    skipped += [f"{_at(one.path, folder)} is not of {architecture}, left out" for one in others]
    if not experts:
        raise AdamergeError(_no_experts(folder, chosen, skipped))
    suite = _suite(folder, to, pretrained, architecture, chosen, experts)
    entries, more = _entries(folder, experts)
    more += _heads(entries, [one for one in found if one.kind == "head"], suite, folder)
    written, missing = text(suite, entries, data)
    with replacing(to) as temporary:
        temporary.write_text(written, encoding="utf-8")
    lines = [f"{to}: {len(entries)} task{'s' if len(entries) > 1 else ''}"]
    for name, answer in (("architecture", suite.architecture), ("pretrained", suite.pretrained)):
        if answer.value is not None:
            why = f" ({answer.why})" if answer.why else ""
            lines.append(f"  {name}: {answer.value or 'left out'}{why}")
    lines += [f"  tasks.{entry.name}: {entry.expert}" for entry in entries]
    lines += [f"skipped: {' '.join(line.split())}" for line in (*skipped, *more)]
    lines += [f"fill in {where}: {why}" for where, why in missing]
    return lines


def _chosen(given: str | None, models: Sequence[Found], folder: Path) -> Found | None:
    """The pretrained checkpoint on this disk, if it is on it."""
    if given is None:
        return pretrained_of(models, folder)
    path = next((p for p in (folder / given, Path(given)) if p.exists()), None)
    if path is None or hub.is_hub(given):
        return None
    same = (one for one in models if one.path.resolve() == path.resolve())
    found = next(same, None) or look(path)
    if found is None or found.kind != "clip":
        raise AdamergeError(
            f"--pretrained {given} is not a whole CLIP: expected one, because the heads are made "
            "by its text tower; name its open_clip tag (like openai), folder or file"
        )
    return found


def _of_architecture(
    experts: Sequence[Found], architecture: str | None
) -> tuple[list[Found], list[Found]]:
    """Experts of the architecture that was named, and the others."""
    wanted = shape_named(architecture)
    fits = [one for one in experts if None in (wanted, one.tower) or one.tower == wanted]
    return fits, [one for one in experts if one not in fits]


def _no_experts(folder: Path, chosen: Found | None, skipped: Sequence[str]) -> str:
    alone = f", but the pretrained model {_at(chosen.path, folder)}" if chosen else ""
    damaged = f" (skipped: {' | '.join(skipped[:3])})" if skipped else ""
    return (
        f"{folder} holds no experts{alone}{damaged}: expected weight files "
        f"({', '.join(hub.SUFFIXES)}) or folders of open_clip, transformers or PEFT, in it or one "
        "level below"
    )


def _suite(
    folder: Path,
    to: Path,
    pretrained: str | None,
    architecture: str | None,
    chosen: Found | None,
    experts: Sequence[Found],
) -> Suite:
    shape = one_shape([*experts, chosen] if chosen else experts, folder)
    here = to.resolve().parent
    at = "" if chosen is None else _pretrained_path(chosen.path, folder, here)
    given = at if chosen is not None and pretrained is not None else pretrained
    answer = pretrained_answer(given, chosen, experts, shape, at)
    named = Answer(architecture, "") if architecture else None
    if architecture and Path(architecture).exists():
        named = Answer(_at(Path(architecture).resolve(), here), "")
    used = chosen if chosen is not None and chosen.kind == "clip" else None
    told = architecture_answer(answer.value, used, experts, shape)
    features = next((one.features for one in (*experts, chosen) if one and one.features), None)
    root = _at(folder.resolve(), here)
    return Suite(to, named or told, answer, "" if root == "." else root, features)


def _pretrained_path(path: Path, folder: Path, here: Path) -> str:
    if path == folder:  # whose weights lie beside the experts
        path = next(folder / name for name in hub.WEIGHTS if (folder / name).is_file())
    inside = path.resolve().is_relative_to(folder.resolve())
    return _at(path.resolve(), folder.resolve() if inside else here)


def _at(path: Path, base: Path) -> str:
    """A path as the suite names it: relative to what it lies in, else absolute."""
    path, base = path.absolute(), base.absolute()
    return os.path.relpath(path, base) if path.is_relative_to(base) else str(path)


def _entries(folder: Path, experts: Sequence[Found]) -> tuple[list[Entry], list[str]]:
    """A task for every expert, and a line for each further expert of a task."""
    stems = Counter(one.path.stem for one in experts if one.path.parent != folder)
    raw = []
    for one in experts:
        name, outer = file_name(one.path), one.path.parent
        vague = says_nothing(name) or (one.path.is_file() and stems[one.path.stem] > 1)
        raw.append(outer.name if vague and outer != folder else name)
    names = [task_name(name) for name in raw]
    cut = without_common_start(names)
    entries: dict[str, Entry] = {}
    more = []
    order = sorted(range(len(experts)), key=lambda i: normal(experts[i].path.stem) != "finetuned")
    for i in order:
        shipped = shipped_names("task")
        task = shipped_task(names[i], shipped) or shipped_task(cut[i], shipped, cut=True)
        name, at = task or key(cut[i]), _at(experts[i].path, folder)
        if name in entries:
            more.append(f"{at} is of {name} too: set suite.tasks.{name}.expert to merge it instead")
            continue
        entries[name] = Entry(name, at, task, (names[i], cut[i]))
    return [entries[name] for name in sorted(entries)], more


def _heads(entries: list[Entry], heads: Sequence[Found], suite: Suite, folder: Path) -> list[str]:
    """Gives every head to its task, and a line for each that is of none or does not fit."""
    lines = []
    for one in heads:
        name, at = file_name(one.path), _at(one.path, folder)
        name = one.path.parent.name if says_nothing(name) else task_name(name)
        place = next((i for i, entry in enumerate(entries) if entry.is_named(name)), None)
        assert one.head is not None  # it is of that kind
        rows, features = one.head
        if place is None:
            lines.append(f"{at} is a head, of no task here")
            continue
        entry = entries[place]
        wanted = len(entry.task_file().get("classes", ())) or rows
        if rows != wanted or features != (suite.features or features):
            lines.append(
                f"{at} is a head of {rows} classes and {features} features, where {entry.name} has "
                f"{wanted} classes and its expert {suite.features} features"
            )
        else:
            entries[place] = dataclasses.replace(entry, head=at, rows=rows)
    return lines
