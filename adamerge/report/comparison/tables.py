"""A comparison of runs as a table, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from adamerge.report.comparison.runs import Recipe, Run, rank_correlation
from adamerge.report.evaluation import TITLES
from adamerge.report.keep import sentence
from adamerge.report.tables import markdown

# cost -> (title, divided by, decimals)
_COSTS = {
    "seconds": ("training, s", 1.0, 1),
    "peak_memory": ("peak memory, MB", 1e6, 0),
    "export_bytes": ("export, MB", 1e6, 1),
    "images": ("images seen", 1.0, 0),
}


def ranked(groups: Sequence[Recipe]) -> list[Recipe]:
    """Recipes by their average accuracy, best first; those without one last."""
    return sorted(groups, key=lambda group: -(group.value("average") or (-1.0, 0.0))[0])


def table(groups: Sequence[Recipe]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Column titles, and of every baseline and recipe its name and cells, in percent."""
    done = [run for group in groups for run in group.done]
    tasks = list(dict.fromkeys(task for run in done for task in run.row()["accuracy"]))
    signals = list(dict.fromkeys(name for run in done for name in run.signals()))
    costs = [name for name in _COSTS if any(name in run.costs() for run in done)]
    titles = [*tasks, "average", "normalized", *signals, *(_COSTS[c][0] for c in costs), "seeds"]
    lines = []
    for suite in dict.fromkeys(run.results.get("suite") for run in done):
        one = next(run for run in done if run.results.get("suite") == suite)
        for name in one.baselines():
            row = one.row(name)
            cells = [_percent((row["accuracy"].get(task), 0.0)) for task in tasks]
            cells += [_percent((row.get(key), 0.0)) for key in ("average", "normalized")]
            label = TITLES.get(name, name)
            if "coefficient" in row:
                label = label.replace("best λ", f"best λ = {row['coefficient']}")
            lines.append((label, cells + ["–"] * (len(titles) - len(cells))))
    for group in ranked(groups):
        cells = [_percent(group.accuracy(task)) for task in tasks]
        cells += [_percent(group.value(key)) for key in ("average", "normalized")]
        cells += [_number(group.signal(name), 1, 3) for name in signals]
        cells += [_number(group.cost(name), *_COSTS[name][1:]) for name in costs]
        lines.append((group.label, [*cells, f"{len(group.done)} of {len(group.runs)}"]))
    return titles, lines


def _percent(value: tuple[float | None, float] | None) -> str:
    if value is None or value[0] is None:
        return "–"
    return f"{100 * value[0]:.1f}" + (f" ± {100 * value[1]:.1f}" if value[1] else "")


def _number(value: tuple[float, float] | None, unit: float, decimals: int) -> str:
    if value is None:
        return "–"
    deviation = f" ± {value[1] / unit:.{decimals}f}" if value[1] else ""
    return f"{value[0] / unit:.{decimals}f}{deviation}"


def correlations(groups: Sequence[Recipe]) -> dict[str, tuple[float, int]]:
    """Spearman's rank correlation of every label-free signal with the average accuracy, over runs,
    and the number of runs; signals of fewer than three runs are left out."""
    done = [run for group in groups for run in group.done]
    found = {}
    for name in dict.fromkeys(name for run in done for name in run.signals()):
        pairs = [
            (run.signals()[name], run.row()["average"])
            for run in done
            if name in run.signals() and run.row().get("average") is not None
        ]
        value = rank_correlation([a for a, _ in pairs], [b for _, b in pairs])
        if value is not None:
            found[name] = value, len(pairs)
    return found


def as_csv(groups: Sequence[Recipe]) -> str:
    """One line per run: recipe, seed, folder, accuracies as fractions, signals, costs."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for run in group.runs:
            row = run.row()
            rows.append(
                {"recipe": group.label, "seed": run.seed, "folder": str(run.folder)}
                | {f"accuracy/{task}": value for task, value in row.get("accuracy", {}).items()}
                | {key: row.get(key) for key in ("average", "normalized")}
                | run.signals()
                | run.costs()
                | {"failed": run.failed}
            )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_markdown(groups: Sequence[Recipe], command: str, notes: Sequence[str] = ()) -> str:
    """The table, the failures and the correlations, as Markdown."""
    titles, lines = table(groups)
    text = [f"# {title(groups)}", *notes, "Accuracy in %, mean ± standard deviation over seeds."]
    text.append("\n".join(markdown(["", *titles], [[name, *cells] for name, cells in lines])))
    failed = [
        f"- {group.label}, seed {run.seed}: {run.failed}" for group, run in unfinished(groups)
    ]
    if failed:
        text += ["Not finished:", "\n".join(failed)]
    if said := kept(groups):
        text.append("\n".join(f"- {one}" for one in said))
    if found := correlations(groups):
        text.append("Rank correlation (Spearman) of label-free scores with the average accuracy:")
        text.append("\n".join(f"- {name}: {v:.2f} ({n} runs)" for name, (v, n) in found.items()))
    text.append(f"Made by `{command}`.")
    return "\n\n".join(text) + "\n"


def kept(groups: Sequence[Recipe]) -> list[str]:
    """Of every run whose course was measured, which state it kept and why."""
    there = [(group, run, run.results.get("kept")) for group in groups for run in group.done]
    return [f"{group.label}, seed {run.seed}: {sentence(k)}" for group, run, k in there if k]


def unfinished(groups: Sequence[Recipe]) -> list[tuple[Recipe, Run]]:
    """The runs without results."""
    return [(group, run) for group in groups for run in group.runs if run.failed]


def title(groups: Sequence[Recipe]) -> str:
    """What is compared, in a few words."""
    suites = dict.fromkeys(str(run.settings.get("suite.name")) for g in groups for run in g.runs)
    count = sum(len(group.runs) for group in groups)
    return f"{count} merges of {', '.join(suites)}, compared"
