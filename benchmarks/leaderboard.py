"""Every method on the demo suite, ranked, and the best of them confirmed on other seeds.

    OMP_NUM_THREADS=1 python benchmarks/leaderboard.py compare/leaderboard --jobs 2 \\
        --out benchmarks/results/leaderboard.md

Runs `adamerge compare` with each method's own settings and the suite's: seeds 0, 1 and 2 of all
methods; then seeds 3, 4 and 5 of the ten with the highest average, whose settings were thus chosen
on other seeds than they are reported on. What neither draws nor sees images has one seed.
`concrete_bilevel` takes 2000 steps of several passes and is left out. Accuracies are of the images
that are adapted on (protocol paper). The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import torch
import yaml

from adamerge.cli import main as adamerge
from adamerge.report.comparison.runs import read_run, spread
from adamerge.report.tables import markdown

FIRST, SECOND = (0, 1, 2), (3, 4, 5)
SAME = (  # for every seed
    *("task_arithmetic", "ties", "magnitude", "breadcrumbs", "pcb", "magmax", "consensus", "tall"),
    *("emr", "twin", "model_stock", "metagpt", "lines", "tsv_m", "iso_c", "iso_cts", "svc"),
    *("svc_tsv_m", "cart", "wudi", "ace", "doge", "opcm", "multislerp", "karcher"),
)
IMAGES = ("regmean", "esm", "fisher", "fisher_batch_sum", "regmean_pp", "featcal", "esm_featcal")
SEEDED = ("dare", "della", "prodistill", *IMAGES)
LEARNED = (
    *("task_wise", "task_wise_pp", "layer_wise", "layer_wise_pp", "block_wise", "atlas", "pareto"),
    *("element_wise", "adarank", "adarank_cart", "wemoe", "e_wemoe"),
    *("concrete", "concrete_task_arithmetic"),
)
OWN = ("fast", "symerge", "surgery", "surgery_v2")  # methods that name their objective
OBJECTIVES = ("entropy", "expert_kl")
FOLDS = {"tall": "per task", "emr": "per task", "twin": "per task"}
FOLDS |= dict.fromkeys(("wemoe", "e_wemoe"), "routers") | dict.fromkeys(OWN[2:], "adapters")
FOLDS |= {"symerge": "one, with heads"}


def recipes() -> dict[str, dict[str, object]]:
    """Settings by recipe: a method, and its objective where that can be chosen."""
    found: dict[str, dict[str, object]] = {
        name: {"method": name} for name in (*SAME, *SEEDED, *OWN)
    }
    for method in LEARNED:
        for objective in OBJECTIVES:
            found[f"{method}, {objective}"] = {"method": method, "objective": objective}
    found["layer_wise, infomax"] = {"method": "layer_wise", "objective": "infomax"}
    return found


def needs(name: str) -> str:
    """What a recipe uses beside weights."""
    if name in SAME or name in ("dare", "della"):
        return "nothing"
    return "images" if name in IMAGES else "images, gradients"


def compared(folder: Path, names: Iterable[str], seeds: Sequence[int], jobs: int) -> None:
    """One grid of `adamerge compare`."""
    folder.mkdir(parents=True, exist_ok=True)
    grid = {
        name: {**own, "seed": [seeds[0]] if name in SAME else list(seeds)}
        for name, own in recipes().items()
        if name in names
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({"suite": "demo", "wandb": "off", "recipes": grid}))
    status = adamerge(["compare", str(path), f"to={folder / 'runs'}", f"jobs={jobs}"])
    if status > 1:  # stopped, or refused; 1: a run failed, which the table says
        raise SystemExit(status)


def scores(folder: Path, names: Iterable[str]) -> dict[str, list[dict[str, float]]]:
    """Accuracies in % by recipe, a mapping of tasks and their average for every seed."""
    asked = {tuple(own.values()): name for name, own in recipes().items() if name in names}
    found: dict[str, list[dict[str, float]]] = {}
    for path in sorted((folder / "runs").glob("*/results.json")):
        run = read_run(path.parent)
        row = run.row()
        settings = (run.settings["method.name"], run.settings["objective.name"])
        name = asked.get(settings) or asked.get(settings[:1])
        if name and row:
            cells = {**row["accuracy"], "average": row["average"]}
            found.setdefault(name, []).append({key: 100 * cell for key, cell in cells.items()})
    return found


def mean(rows: Sequence[dict[str, float]], key: str = "average") -> float:
    return statistics.mean(row[key] for row in rows)


def averages(rows: Sequence[dict[str, float]]) -> str:
    """Mean over seeds, with their standard deviation where there are several."""
    middle, deviation = spread(row["average"] for row in rows) or (0.0, 0.0)
    return f"{middle:.1f}" + (f" ± {deviation:.1f}" if len(rows) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[*recipes()], metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", default=FIRST, help="of the first table")
    parser.add_argument("--best", type=int, default=10, help="so many are confirmed")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    compared(given.folder / "first", given.only, given.seeds, given.jobs)
    first = scores(given.folder / "first", given.only)
    ranked = sorted(first, key=lambda name: -mean(first[name]))
    best = ranked[: given.best]
    if best:
        compared(given.folder / "second", best, SECOND, given.jobs)
    second = scores(given.folder / "second", best)
    tasks = [key for key in first[ranked[0]][0] if key != "average"]
    rows = []
    for rank, name in enumerate(ranked, 1):
        own = first[name]
        cells = [f"{mean(own, task):.1f}" for task in tasks]
        least = f"{min(row[task] for row in own for task in tasks):.1f}"
        again = averages(second[name]) if name in second else "–"
        folds = FOLDS.get(name.partition(",")[0], "one")
        rows.append([name, str(rank), needs(name), folds, *cells, averages(own), least, again])
    heads = ["method", "rank", "needs", "folds", *tasks, "average", "least", "seeds 3–5"]
    text = (
        f"# Every method on the demo suite\n\n{date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}.\n\n    python benchmarks/leaderboard.py "
        f"{shlex.join(sys.argv[1:])}\n\n"
        "Accuracy in %, mean over seeds 0, 1 and 2 ± their standard deviation, ranked by the "
        "average; `least` is the lowest of any task and seed. What is chosen by that rank is "
        "confirmed on seeds 3, 4 and 5. Protocol paper: the images that are scored are those "
        "adapted on.\n\n" + "\n".join(markdown(heads, rows)) + "\n"
    )
    missing = [name for name in given.only if name not in first]
    if missing:
        text += f"\nWithout result: {', '.join(missing)}.\n"
    print(text)
    if given.out:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
