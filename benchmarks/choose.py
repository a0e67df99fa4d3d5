"""How well label-free signals choose among merges: rank correlation with accuracy, and regret.

    for seed in 11 12 13; do
        adamerge auto suite=demo seed=$seed steps=300 wandb=off to=auto/seed$seed
    done
    python benchmarks/choose.py auto/seed* --out benchmarks/results/choose.md

Folders are of `adamerge auto` or `adamerge compare`; the runs of one seed in one folder are what is
chosen among. Accuracies are of the scored images, mean over tasks, and are read here alone.

- correlation: Spearman's of signal and accuracy over the runs of a choice, the sign such that 1 is
  a signal that ranks as accuracy does; mean over choices;
- regret: accuracy of the best run minus that of the run with the best signal, in points.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

import torch

from adamerge.report.comparison.runs import Run, rank_correlation, read_run
from adamerge.report.tables import markdown

LOW = ("divergence", "entropy", "top_share")  # which should be small
SIGNALS = ("agreement", "mutual_information", "consistency", "marginal_entropy", *LOW)
AUTO = "agreement, as auto measures it"
Choice = list[tuple[Run, float, dict[str, float]]]  # runs, their accuracy and signals


def choices(folder: Path) -> list[Choice]:
    """The runs of a folder that have an accuracy, by seed."""
    kept = folder / "auto.json"
    told = json.loads(kept.read_text())["agreement"] if kept.is_file() else {}
    by_seed: dict[object, Choice] = {}
    for path in sorted(folder.glob("*/results.json")):
        run = read_run(path.parent)
        accuracy = run.row().get("average")
        if accuracy is None:
            continue
        found = {name: value for name, value in run.signals().items() if name in SIGNALS}
        if path.parent.name in told:
            found[AUTO] = statistics.fmean(told[path.parent.name].values())
        signed = {name: -value if name in LOW else value for name, value in found.items()}
        by_seed.setdefault(run.seed, []).append((run, 100 * accuracy, signed))
    return list(by_seed.values())


def row(name: str, found: list[Choice]) -> list[str]:
    """Correlation and regret of one signal, where all runs of a choice have it."""
    correlations, regrets = [], []
    for runs in found:
        if not all(name in signals for _, _, signals in runs):
            continue
        accuracies, values = [a for _, a, _ in runs], [signals[name] for _, _, signals in runs]
        correlations.append(rank_correlation(values, accuracies) or 0.0)
        regrets.append(max(accuracies) - accuracies[values.index(max(values))])
    if not regrets:
        return [name, "–", "–", "–"]
    numbers = (statistics.fmean(correlations), statistics.fmean(regrets), max(regrets))
    return [name, f"{numbers[0]:.2f}", f"{numbers[1]:.2f}", f"{numbers[2]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    given = parser.parse_args()
    found = [choice for folder in given.folders for choice in choices(folder) if len(choice) > 2]
    if not found:
        parser.error("no folder has three runs of one seed with accuracies")
    count = sum(map(len, found))
    by_recipe: dict[str, list[tuple[float, float]]] = {}
    for runs in found:
        for run, accuracy, signals in runs:
            agreement = signals.get(AUTO, signals.get("agreement", float("nan")))
            by_recipe.setdefault(run.folder.name, []).append((accuracy, 100 * agreement))
    recipes = [
        [name, *(f"{statistics.fmean(column):.1f}" for column in zip(*pairs, strict=True))]
        for name, pairs in by_recipe.items()
    ]
    recipes.sort(key=lambda cells: -float(cells[1]))
    chosen = []
    for folder in given.folders:
        if (folder / "auto.json").is_file() and (runs := choices(folder)):
            name = json.loads((folder / "auto.json").read_text())["chosen"]
            accuracy = {run.folder.name: value for run, value, _ in runs[0]}
            best = max(accuracy, key=lambda n: accuracy[n])
            numbers = [accuracy[name], accuracy[best], accuracy[best] - accuracy[name]]
            chosen.append([folder.name, name, best, *(f"{value:.2f}" for value in numbers)])
    about = f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}"
    lines = ["# Choosing among merges without labels", "", f"{about}.", ""]
    lines += [f"    python benchmarks/choose.py {' '.join(sys.argv[1:])}", ""]
    lines += [f"{count} runs, {len(found)} choices among the runs of one seed.", ""]
    lines += markdown(
        ["signal", "rank correlation", "mean regret, points", "largest"],
        [row(name, found) for name in (AUTO, *SIGNALS)],
    )
    if chosen:
        head = ["choice", "chosen", "best by labels", "accuracy, %", "best, %", "regret, points"]
        lines += ["", "## What auto chose", "", *markdown(head, chosen)]
    head = ["recipe", "accuracy, %", "agreement, %"]
    lines += ["", "## Recipes, means over seeds", "", *markdown(head, recipes), ""]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
