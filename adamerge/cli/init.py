"""`adamerge init`: a suite written by looking at a folder of checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from adamerge._base.errors import AdamergeError
from adamerge._base.files import replacing
from adamerge.cli.suite_text import Line, Task, path_from, text
from adamerge.cli.survey import (
    Candidate,
    architecture_answer,
    inspect,
    is_pretrained,
    one_shape,
    pretrained_among,
    pretrained_answer,
    survey,
)
from adamerge.cli.task_hints import (
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
    here = to.resolve().parent
    if not here.is_dir():
        raise AdamergeError(f"{to} lies in no folder that exists: name another with --to")
    candidates, skipped = survey(folder)
    chosen = _chosen(pretrained, candidates, folder)
    experts, wanted = [], shape_named(architecture)
    for one in candidates:
        if one.kind == "head" or (chosen is not None and one.path == chosen.path):
            continue
        if is_pretrained(one):
            skipped.append(
                f"{path_from(folder, one.path)} is named as a pretrained model, left out"
            )
        elif wanted is not None and one.tower not in (None, wanted):
            skipped.append(f"{path_from(folder, one.path)} is not of {architecture}, left out")
        else:
            experts.append(one)
    if not experts:
        alone = f", but the pretrained model {path_from(folder, chosen.path)}" if chosen else ""
        damaged = f" (skipped: {' | '.join(skipped[:3])})" if skipped else ""
        raise AdamergeError(
            f"{folder} holds no experts{alone}{damaged}: expected weight files "
            f"({', '.join(hub.SUFFIXES)}) or folders of open_clip, transformers or PEFT, in it or "
            "one level below"
        )
    shared = _shared(folder, here, pretrained, architecture, chosen, experts)
    tasks, more = _tasks(folder, experts)
    features = next((one.features for one in (*experts, chosen) if one and one.features), None)
    for head in (one for one in candidates if one.kind == "head"):
        more += _take_head(tasks, head, features, path_from(folder, head.path))
    lines = [*shared, *(line for task in tasks for line in task.lines(data, here))]
    with replacing(to) as temporary:
        temporary.write_text(text(to.name, lines), encoding="utf-8")
    return [
        f"{to}: {len(tasks)} task{'s' if len(tasks) > 1 else ''}",
        *(
            f"  {key}: {value or 'left out'}{f' ({why})' if why else ''}"
            for key, value, why in shared[:2]
            if value is not None
        ),
        *(f"  tasks.{task.name}: {task.expert}" for task in tasks),
        *(f"skipped: {' '.join(line.split())}" for line in (*skipped, *more)),
        *(f"fill in suite.{line.key}: {line.comment}" for line in lines if line.value is None),
    ]


def _chosen(given: str | None, models: Sequence[Candidate], folder: Path) -> Candidate | None:
    """The pretrained checkpoint on this disk, if it is on it."""
    if given is None:
        return pretrained_among(models, folder)
    path = next((p for p in (folder / given, Path(given)) if p.exists()), None)
    if path is None or hub.is_hub(given):
        return None
    same = (one for one in models if one.path.resolve() == path.resolve())
    chosen = next(same, None) or inspect(path)
    if chosen is None or chosen.kind != "clip":
        raise AdamergeError(
            f"--pretrained {given} is not a whole CLIP: expected one, because the heads are made "
            "by its text tower; name its open_clip tag (like openai), folder or file"
        )
    return chosen


def _shared(
    folder: Path,
    here: Path,
    pretrained: str | None,
    architecture: str | None,
    chosen: Candidate | None,
    experts: Sequence[Candidate],
) -> list[Line]:
    """What all tasks share: architecture, pretrained, and root, where it is another folder."""
    shape = one_shape([*experts, chosen] if chosen else experts, folder)
    at = ""
    if chosen is not None:
        path, root = chosen.path, folder.resolve()
        if path == folder:  # whose weights lie beside the experts
            path = next(folder / name for name in hub.WEIGHTS if (folder / name).is_file())
        at = path_from(root if path.resolve().is_relative_to(root) else here, path.resolve())
    source, why = pretrained_answer(chosen, experts, shape, at)
    if pretrained is not None:
        source, why = (pretrained if chosen is None else at), ""
    whole = chosen if chosen is not None and chosen.kind == "clip" else None
    name, said = architecture_answer(source, whole, experts, shape)
    if architecture is not None:
        place = Path(architecture)
        name, said = (path_from(here, place.resolve()) if place.exists() else architecture), ""
    lines = [Line("architecture", name, said), Line("pretrained", source, why)]
    if folder.resolve() != here:
        said = "where pretrained and experts are looked for first"
        lines.append(Line("root", path_from(here, folder.resolve()), said))
    return lines


def _tasks(folder: Path, experts: Sequence[Candidate]) -> tuple[list[Task], list[str]]:
    """A task for every expert, and a line for each further expert of a task."""
    stems = Counter(one.path.stem for one in experts if one.path.parent != folder)
    names = []
    for one in experts:
        vague = says_nothing(one.name) or (one.path.is_file() and stems[one.path.stem] > 1)
        outer = one.path.parent
        names.append(task_name(outer.name if vague and outer != folder else one.name))
    named = zip(experts, names, without_common_start(names), strict=True)
    tasks: dict[str, Task] = {}
    more, known = [], shipped_names("task")
    for one, whole, cut in sorted(named, key=lambda n: normal(n[0].path.stem) != "finetuned"):
        shipped = shipped_task(whole, known) or shipped_task(cut, known, cut=True)
        name, at = shipped or key(cut), path_from(folder, one.path)
        if name in tasks:
            more.append(f"{at} is of {name} too: set suite.tasks.{name}.expert to merge it instead")
        else:
            tasks[name] = Task(name, at, shipped, (whole, cut))
    return [tasks[name] for name in sorted(tasks)], more


def _take_head(tasks: Sequence[Task], head: Candidate, features: int | None, at: str) -> list[str]:
    """Gives a head to its task; a line where it is of none or does not fit."""
    name = head.path.parent.name if says_nothing(head.name) else task_name(head.name)
    task = next((task for task in tasks if task.is_named(name)), None)
    if task is None:
        return [f"{at} is a head, of no task here"]
    wanted = len(task.file().get("classes", ())) or head.classes
    if (head.classes, head.features) != (wanted, features or head.features):
        return [
            f"{at} is a head of {head.classes} classes and {head.features} features, where "
            f"{task.name} has {wanted} classes and its expert {features} features"
        ]
    task.head, task.rows = at, head.classes
    return []
