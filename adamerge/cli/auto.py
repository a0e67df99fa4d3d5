"""`adamerge auto`: of a short list of recipes the one whose merge its experts agree with most.

No label is read. Every candidate is a run of its own in one folder, as of `adamerge compare`: first
what learns nothing, then what learns (from task arithmetic, and from the best of the others) with a
quarter of its steps, the better half of these with all of them, and a closed-form calibration of
the best. The score is the share of unlabeled images on which a merge names the class that the
task's expert names, the mean over tasks.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge._base.files import alone_in, replacing, replacing_folder
from adamerge.cli.compare import Cell, Command, cells_of, options_of, positive, run_all
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.config.grid import Recipe
from adamerge.config.inputs import Inputs
from adamerge.encoders.experts import Experts
from adamerge.encoders.heads import Heads
from adamerge.export import load, read
from adamerge.report import preflight, signals
from adamerge.report.advice import AGREEING
from adamerge.report.comparison.page import write_report
from adamerge.report.keep import SIGNAL
from adamerge.report.tables import markdown

log = logging.getLogger("adamerge")

STARTS = ("task_arithmetic", "tsv_m", "iso_c", "esm")  # which can be learned from
STATIC = (*STARTS, "esm_featcal")
OBJECTIVES = ("expert_kl", "entropy", "infomax")  # of layer_wise
IMAGES = 256  # of each task, that the score is measured on
DOUBTFUL = 3  # the exit status where a merge is not called good
_PROBE = 4  # all steps divided by this are tried first
_OURS = ("method", "objective", "transform", "method.base")

Scores = dict[str, float]  # task -> share of images


def auto(words: Sequence[str], command: Command) -> int:
    """Tries recipes, exports the best to `<to>/merged`, and says why in `auto.md` and `.json`.

    Args:
        words: settings of all runs; `to=`, the folder of it all; `jobs=`, runs at a time; `steps=`
            or `minutes=`, for how long all that learn may train, together; `also=`, further
            methods that learn, by commas.
        command: runs `["train", …]` in a process of its own and returns its status.

    Returns:
        0; `DOUBTFUL` where the experts agree with the best merge on less than half of a task.

    Raises:
        AdamergeError: settings that are wrong, or no recipe came to an end.
    """
    asked = {"jobs": "1", "to": "", "steps": "", "minutes": "", "also": ""}
    options, rest = options_of(words, asked)
    for word in rest:
        if word.partition("=")[0] in _OURS:
            raise AdamergeError(f"{word}: auto chooses that itself; leave it out, or use compare")
    jobs = positive("jobs", options["jobs"])
    learned = {f"layer_wise-{name}": ("layer_wise", name) for name in OBJECTIVES}
    also = [name.strip() for name in options["also"].split(",") if name.strip()]
    for name in also:  # said before anything is tried
        build.check(config.load([*rest, f"method={name}", "objective=expert_kl"]))
    learned |= {name: (name, "expert_kl") for name in also}
    settings = config.load(rest)
    build.check(settings)
    limit = _limits(options, len(learned) + 1, settings["trainer"]["max_steps"])
    still = [word for word in rest if not word.startswith("trainer.max_steps=")]
    folder = Path(os.path.expanduser(options["to"] or f"auto/{time.strftime('%Y%m%d-%H%M%S')}"))
    cells: list[Cell] = []
    scores: dict[str, Scores] = {}
    with alone_in(folder):
        judge = _judge(inputs.load(settings))

        def tried(recipes: Sequence[Recipe]) -> list[str]:
            """Runs recipes, and gives the names of those with a merge, the best first."""
            new = cells_of(recipes, folder)
            run_all(new, jobs, command)
            cells.extend(new)
            done = [cell.folder.name for cell in new if cell.done]
            for name in done:
                scores[name] = judge(folder / name / "merged")
                log.info("%s: agreement %.1f %%", name, 100 * signals.mean(scores[name]))
            return _ranked(scores, done)

        def learning(names: Collection[str], part: int, end: str = "") -> list[Recipe]:
            ways = {name: [f"method={m}", f"objective={o}"] for name, (m, o) in learned.items()}
            return [Recipe(n + end, [*still, *ways[n], *limit(part)], "") for n in names]

        static = tried([Recipe(name, [*still, f"method={name}"], "") for name in STATIC])
        start = next((name for name in static if name in STARTS), STARTS[0])
        if start != STARTS[0]:  # from which layer_wise starts
            learned[f"{start}-expert_kl"] = start, "expert_kl"
        ahead = tried(learning(learned, _PROBE, "-probe"))[: math.ceil(len(learned) / 2)]
        tried(learning([name.removesuffix("-probe") for name in ahead], 1))
        if not scores:
            raise AdamergeError(f"no recipe came to an end ({cells[0].failed}): see {folder}/*.log")
        base = f"method.base={folder / _ranked(scores, scores)[0]}"
        tried([Recipe("calibrated", [*still, "method=featcal", base], "")])
        again = f"adamerge auto {shlex.join([*rest, *_said(options), f'to={folder}'])}"
        page = write_report([cell.record() for cell in cells], folder, again)
        weak, said = _written(folder, scores)
    print(f"\n{said}\nmerged model: {folder / 'merged'}\nreport: {page}")
    return DOUBTFUL if weak else 0


def _said(options: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items() if value and key != "to"]


def _limits(options: Mapping[str, str], ways: int, steps: int) -> Callable[[int], list[str]]:
    """Settings that end a run, of which all of its steps are divided by a number."""
    share = ways / _PROBE + math.ceil(ways / 2)  # of the whole budget, what one run of all has
    if options["steps"]:
        steps = round(positive("steps", options["steps"]) / share)
    seconds = positive("minutes", options["minutes"]) * 60 / share if options["minutes"] else 0.0

    def limit(part: int) -> list[str]:
        most = [f"trainer.max_steps={max(1, steps // part)}"]
        timed = f"trainer.max_time={{seconds: {max(1, round(seconds / part))}}}"
        return [*most, timed] if seconds else most

    return limit


def _judge(known: Inputs) -> Callable[[Path], Scores]:
    """What scores an export: by how many unlabeled images get the class that the expert gives."""
    device, normalizer, suite = known.device, known.normalizer, known.suite
    pixels = {
        task: torch.from_numpy(data.images[known.data.picked("auto", task, IMAGES)])
        for task, data in known.data.tasks.items()
    }

    def logits(encoder: nn.Module, heads: Heads) -> dict[str, Tensor]:
        return dict(preflight.predictions(encoder, heads, normalizer, pixels, device))

    experts = logits(Experts(suite.clip.backbone, suite.task_vectors), suite.heads)

    def score(folder: Path) -> Scores:
        layout = read.read_layout(folder)
        encoder = load.for_tasks(read.read_encoder(folder, layout)[0], layout, tuple(experts))
        own = logits(encoder, read.read_heads(folder, layout))
        return signals.by_task(own, experts)[SIGNAL]

    return score


def _ranked(scores: Mapping[str, Scores], names: Collection[str]) -> list[str]:
    """Names by score, the best first; of equal ones the one that was tried first."""
    return sorted(names, key=lambda name: -signals.mean(scores[name]))


def _written(folder: Path, scores: Mapping[str, Scores]) -> tuple[list[str], str]:
    """Exports the best, writes why; returns the tasks it is not good for, and the sentences."""
    order = _ranked(scores, scores)
    best, start = order[0], _ranked(scores, [name for name in scores if name in STATIC])[:1]
    with replacing_folder(folder / "merged") as place:
        shutil.copytree(folder / best / "merged", place, dirs_exist_ok=True)
    percent = {name: 100 * signals.mean(scores[name]) for name in order}
    than = (
        f" ({start[0]}, the best that learns nothing: {percent[start[0]]:.1f} %)" if start else ""
    )
    said = (
        f"chosen: {best}: the experts agree with it on {percent[best]:.1f} % of up to {IMAGES} "
        f"unlabeled images a task, and with none of {len(order) - 1} others on more{than}; no "
        "label was read"
    )
    weak = [task for task, share in scores[best].items() if share < AGREEING]
    if weak:
        low = ", ".join(f"{task} ({100 * scores[best][task]:.0f} %)" for task in weak)
        said += (
            f"\nnot good: the experts agree with it on less than half of the images of {low}; do "
            "not use it there before you have looked at it"
        )
    tasks = list(scores[best])
    body = [[n, f"{percent[n]:.1f}", *(f"{100 * scores[n][t]:.1f}" for t in tasks)] for n in order]
    table = markdown(["agreement with the experts, %", "mean", *tasks], body)
    with replacing(folder / "auto.md") as path:
        path.write_text("\n".join([said, "", *table, ""]), encoding="utf-8")
    content = {"chosen": best, "agreement": {n: scores[n] for n in order}, "not_good_for": weak}
    with replacing(folder / "auto.json") as path:
        path.write_text(json.dumps(content, indent=2))
    return weak, said
