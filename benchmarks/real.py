"""What merges do on the real suite: accuracies, and whether what is said without labels is true.

    python benchmarks/make_real.py data DIR
    python benchmarks/real.py DIR --seeds 0 1 2 --out benchmarks/results/real.md

Runs `real_grid.yaml` by `adamerge compare`, which a second call goes on with (`--folder`), then
exchanges every two experts and asks the pre-flight, with several choices of images.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

from adamerge.cli import main as adamerge
from adamerge.cli.check import report_of
from adamerge.cli.job import load_job
from adamerge.config import settings as config
from adamerge.report.comparison.runs import Recipe, Run, read_run, recipes
from adamerge.report.comparison.tables import correlations, ranked, table

GRID = Path(__file__).with_name("real_grid.yaml")
PROTOCOLS = ("heldout", "paper")
PAPER = "Accuracy in % on all test images.\n"
HIDDEN = ("normalized", "images seen", "peak memory, MB", "export, MB", "training, s")
LEARNED = ("layer_wise", "task_wise")  # they start at task arithmetic
LOW = ("entropy", "divergence", "top_share")  # signals of which less is taken to be better


def problems(words: Sequence[str]) -> set[str]:
    """The tasks of which the pre-flight says that their expert is wrong."""
    report = report_of(load_job(config.load(["suite=real", "wandb=off", *words])))
    found = [entry for entry in report["findings"] if entry["severity"] == "problem"]
    return {task for entry in found for task in entry["tasks"]}


def preflight(words: Sequence[str], seeds: Sequence[int]) -> Iterator[str]:
    """Sentences: false alarms on the suite as it is, and exchanges of two experts not noticed."""
    suite = config.load(["suite=real", *words])["suite"]["tasks"]
    alarms = [problems([*words, f"seed={seed}"]) for seed in seeds]
    named = [task for task in suite for found in alarms if task in found]
    told = ", ".join(
        f"{task} ({named.count(task)} of {len(seeds)})" for task in dict.fromkeys(named)
    )
    yield f"- The suite as it is, {len(seeds)} seeds: problems named of {told or 'no task'}."
    always = set.intersection(*alarms)
    missed, half = [], []
    for one, two in itertools.combinations(suite, 2):
        swap = [f"suite.tasks.{a}.expert={suite[b]['expert']}" for a, b in ((one, two), (two, one))]
        named = problems([*words, *swap, f"seed={seeds[0]}"]) & {one, two}
        missed += [f"{one}–{two}"] if not named - always else []
        half += [f"{one}–{two}"] if len(named) == 1 and named - always else []
    pairs = len(suite) * (len(suite) - 1) // 2
    yield (
        f"- {pairs} exchanges of two experts, seed {seeds[0]}: missed {len(missed)} "
        f"({', '.join(missed) or 'none'}); of {len(half)} one expert alone is named "
        f"({', '.join(half) or 'none'}). A task of which every seed gives a false alarm counts as "
        "not named."
    )


def changes(runs: Sequence[Run]) -> list[tuple[str, str, float, float, bool]]:
    """Of every run that starts at task arithmetic and every task: objective, task, the changes of
    accuracy (adapted half) and of agreement with the expert, and whether advice warned before."""
    start = next(run.row("task_arithmetic") for run in runs if run.row("task_arithmetic"))
    found = []
    for run in runs:
        if run.settings["method.name"] in LEARNED:
            before, after = (
                run.results["signals"][when]["agreement"] for when in ("before", "after")
            )
            key = "accuracy_adapted" if "accuracy_adapted" in start else "accuracy"
            for task, accuracy in run.row()[key].items():
                change = accuracy - start[key][task]
                warned = before[task] < 0.5
                objective = run.settings["objective.name"]
                objective += ", last step" if run.settings["keep"] == "last" else ""
                found.append((objective, task, change, after[task] - before[task], warned))
    return found


def signs(runs: Sequence[Run]) -> Iterator[str]:
    """Sentences on where objectives hurt, and whether advice and agreement told so."""
    rows = changes(runs)
    for objective in dict.fromkeys(row[0] for row in rows):
        mine = [row for row in rows if row[0] == objective]
        by_task = {t: [r[2] for r in mine if r[1] == t] for t in dict.fromkeys(r[1] for r in mine)}
        told = ", ".join(f"{t} {100 * statistics.fmean(v):+.1f}" for t, v in by_task.items())
        yield f"- {objective}, change of accuracy against task arithmetic, in points: {told}."
        for warned in (True, False):
            part = [row[2] for row in mine if row[4] == warned]
            worse = sum(change < 0 for change in part)
            where = "below" if warned else "at or above"
            if part:
                yield (
                    f"  Agreement before {where} one half: {worse} of {len(part)} task-runs end "
                    f"below their start, mean {100 * statistics.fmean(part):+.1f}."
                )
    moved = [row for row in rows if abs(row[2]) > 0.03]
    right = sum(row[2] * row[3] > 0 for row in moved)
    yield (
        f"- The change of agreement has the sign of the change of accuracy in {right} of "
        f"{len(moved)} task-runs that moved by more than 3 points."
    )


def short(group: Recipe) -> str:
    """Method and objective of a recipe; what learns nothing has no objective."""
    settings = group.runs[0].settings
    named = [settings["method.name"]]
    named += [settings["objective.name"]] if settings["trainer.max_steps"] else []
    named += ["last step"] if settings["keep"] == "last" else []
    return " · ".join(named)


def accuracies(runs: Sequence[Run]) -> Iterator[str]:
    """A table of every recipe's accuracy per task, in percent."""
    if not runs:
        return
    groups, _ = recipes(runs)
    titles, lines = table(groups)
    names = {group.label: short(group) for group in groups}
    shown = [i for i, title in enumerate(titles) if title not in HIDDEN]
    yield f"| | {' | '.join(titles[i] for i in shown)} |\n|---|{'--:|' * len(shown)}"
    for name, cells in lines:
        yield f"| {names.get(name, name)} | {' | '.join(cells[i] for i in shown)} |"
    yield ""


def ranking(runs: Sequence[Run]) -> Iterator[str]:
    """Both halves beside each other, and how well each label-free signal ranks the runs."""
    groups, _ = recipes(runs)
    yield "| | adapted half | held-out half | of it: least task |\n|---|--:|--:|--:|"
    for group in ranked(groups):
        rows = [run.row() for run in group.done]
        halves = [
            statistics.fmean(row[key] for row in rows) for key in ("average_adapted", "average")
        ]
        least = min(min(row["accuracy"].values()) for row in rows)
        yield (
            f"| {short(group)} | " + " | ".join(f"{100 * v:.1f}" for v in (*halves, least)) + " |"
        )
    told = [f"{name} {value:.2f} ({n} runs)" for name, (value, n) in correlations(groups).items()]
    yield f"\nSpearman's rank correlation with the held-out average: {', '.join(told)}.\n"
    yield from picks([(short(group), run) for group in groups for run in group.done])


def picks(runs: Sequence[tuple[str, Run]]) -> Iterator[str]:
    """What each label-free signal would have chosen of all runs, and how far that is from best."""
    best = max(run.row()["average"] for _, run in runs)
    told = []
    for name in dict.fromkeys(name for _, run in runs for name in run.signals()):
        sign = -1 if name in LOW else 1
        having = [(label, run) for label, run in runs if name in run.signals()]
        label, run = max(having, key=lambda pair: sign * pair[1].signals()[name])
        which = "lowest" if sign < 0 else "highest"
        told.append(f"{which} {name}: {label}, {100 * run.row()['average']:.1f}")
    yield f"Of all runs, the one with the … ({100 * best:.1f} at best): {'; '.join(told)}.\n"


def runs_of(folder: Path) -> list[Run]:
    """The runs in a folder that have results."""
    found = [read_run(path.parent) for path in sorted(folder.glob("*/results.json"))]
    return [run for run in found if run.row()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("compare/real"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--cache", default=None)
    parser.add_argument("--report", action="store_true", help="of the runs that are there alone")
    given = parser.parse_args()
    words = [f"suite.vars.data={given.data}"]
    words += [f"cache_dir={given.cache}"] if given.cache else []
    seeds = ",".join(map(str, given.seeds))
    for protocol in () if given.report else PROTOCOLS:
        own = [f"protocol={protocol}", f"seed={seeds}", f"to={given.folder / protocol}"]
        status = adamerge(["compare", str(GRID), *words, *own])
        if status > 1:  # stopped, or refused; 1: a run failed, which the tables say
            raise SystemExit(status)
    exchanges = given.folder / "preflight.md"
    if not exchanges.exists():
        exchanges.write_text("\n".join(preflight(words, range(5))))
    runs, others = (runs_of(given.folder / protocol) for protocol in PROTOCOLS)
    text = "\n".join(
        [
            f"# The real suite\n\n{date.today()}, one thread, {len(runs)} runs of each protocol.\n",
            f"    python benchmarks/real.py DIR --seeds {seeds.replace(',', ' ')}\n",
            "Accuracy in % on the held-out half, mean ± standard deviation over seeds.\n",
            *accuracies(runs),
            *ranking(runs),
            *(
                ["## Protocol paper: all test images adapted on and scored\n", PAPER]
                if others
                else []
            ),
            *accuracies(others),
            "## What objectives do to each task, and what told so\n",
            *signs(runs),
            "\n## Pre-flight\n",
            exchanges.read_text(),
            "",
        ]
    )
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
