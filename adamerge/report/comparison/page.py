"""A comparison of runs as one page that needs no server, and as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from adamerge._base.files import replacing
from adamerge.report.comparison import charts
from adamerge.report.comparison.runs import Recipe, Run, recipes
from adamerge.report.comparison.style import SCRIPT, STYLE
from adamerge.report.comparison.tables import (
    as_csv,
    as_markdown,
    correlations,
    kept,
    ranked,
    table,
    title,
    unfinished,
)

Spread = tuple[float, float]
_COURSES = (
    *("accuracy", "signals/agreement", "signals/mutual_information", "signals/consistency"),
    *("entropy", "marginal_entropy", "loss"),
)


def write_report(
    runs: Sequence[Run], folder: Path, command: str, notes: Sequence[str] = ()
) -> Path:
    """Writes `report.html`, `report.md` and `report.csv` to a folder; returns the first.

    Args:
        runs: of one suite or several, finished or not.
        command: what makes the report again, for the reader.
        notes: sentences to print above everything, such as what was left out.
    """
    groups, differing = recipes(runs)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "report.html": as_html(groups, differing, command, notes),
        "report.md": as_markdown(groups, command, notes),
        "report.csv": as_csv(groups),
    }
    for name, text in files.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / "report.html"


def as_html(
    groups: Sequence[Recipe], differing: Sequence[str], command: str, notes: Sequence[str] = ()
) -> str:
    """The whole page, its style, its script and its pictures within it."""
    best = ranked(groups)
    scored = [(group, value) for group in best if (value := group.value("average"))]
    sections = [
        ("Accuracy", _bars(scored)),
        ("Cost against accuracy", _scatter(scored)),
        ("Table", _html_table(*table(groups))),
        (
            "Not finished",
            _list(f"{g.label}, seed {r.seed}: {r.failed}" for g, r in unfinished(groups)),
        ),
        ("What was kept", _list(kept(best))),
        ("Courses", _courses(best)),
        ("Merging coefficients", _maps(best)),
        ("Label-free scores and accuracy", _correlations(groups)),
        ("Settings that differ", _settings(best, differing)),
        ("What was run", _inputs(groups, command)),
    ]
    heading = title(groups)
    body = "".join(
        f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(heading)}</h1>{_list(notes)}{body}</main><script>{SCRIPT}</script></body></html>"
    )


def _list(sentences: Any) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _bars(scored: Sequence[tuple[Recipe, Spread]]) -> str:
    if not scored:
        return "<p>No run has accuracies: none of its tasks has labels.</p>"
    labels, values = [group.label for group, _ in scored], [value for _, value in scored]
    said = ", ".join(f"{a} {100 * v[0]:.1f} %" for a, v in zip(labels, values, strict=True))
    return charts.bars(labels, values, f"Average accuracy: {said}")


def _scatter(scored: Sequence[tuple[Recipe, Spread]]) -> str:
    costs = [(group, value, group.cost("seconds")) for group, value in scored]
    there = [(group, cost[0], value[0]) for group, value, cost in costs if cost]
    if len(there) < 2:
        return ""
    labels = [group.label for group, _, _ in there]
    drawn = charts.points(
        labels,
        [(cost, value) for _, cost, value in there],
        "training, s",
        "average accuracy, %",
        "Training time against average accuracy; the line joins what nothing cheaper reaches",
    )
    return drawn + _legend(labels, numbered=True)


def _legend(labels: Sequence[str], numbered: bool = False) -> str:
    items = "".join(
        f'<li><span class="dot" style="background:{charts.colour(index)}"></span>'
        f"{f'{index + 1}: ' if numbered else ''}{escape(label)}</li>"
        for index, label in enumerate(labels)
    )
    return f'<ul class="legend">{items}</ul>'


def _html_table(titles: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>'
        for name in ("recipe", *titles)
    )
    first = _baselines(lines)  # the first line of a recipe
    best = {
        column: max((_leading(cells[column]) for _, cells in lines[first:]), default=-1.0)
        for column in range(titles.index("normalized") + 1)
    }
    rows = []
    for row, (name, cells) in enumerate(lines):
        marked = "".join(
            _cell(cell, row >= first and _leading(cell) == best.get(c))
            for c, cell in enumerate(cells)
        )
        kind = ' class="baseline"' if row < first else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(name)}</th>{marked}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table of results">'
        '<table class="sortable">'
        "<caption>Accuracy in %, mean ± standard deviation over seeds; a title sorts</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _baselines(lines: Sequence[tuple[str, Sequence[str]]]) -> int:
    """How many of the first lines are baselines."""
    return sum(cells[-1] == "–" for _, cells in lines)


def _cell(text: str, best: bool) -> str:
    return f'<td class="best">{escape(text)}</td>' if best else f"<td>{escape(text)}</td>"


def _leading(cell: str) -> float:
    try:
        return float(cell.split()[0])
    except ValueError:
        return -1.0


def _courses(groups: Sequence[Recipe]) -> str:
    """One chart per number that was logged over steps, of each recipe's first seed."""
    drawn = []
    for key in _COURSES:
        curves = {group.label: group.runs[0].curve(key) for group in groups}
        curves = {label: curve for label, curve in curves.items() if len(curve) > 1}
        if curves:
            chart = charts.lines(curves, f"{key} over steps, mean over tasks")
            drawn.append(f"<h3>{escape(key)}</h3>{chart}{_legend(list(curves))}")
    return "".join(drawn)


def _maps(groups: Sequence[Recipe]) -> str:
    """λ of each recipe's first seed, all on one scale."""
    there = [(group, group.runs[0]) for group in groups if group.runs[0].coefficients]
    values = [v for _, run in there for row in run.coefficients.values() for v in row]
    if not values:
        return ""
    middle = 0.3
    reach = max(0.05, *(abs(value - middle) for value in values))
    drawn = [
        f"<p>Tasks by layers, first seed; white is {middle:g}, blue {middle - reach:.2f}, "
        f"red {middle + reach:.2f}.</p>"
    ]
    for group, run in there:
        tasks = list(run.coefficients)
        said = f"Merging coefficients of {group.label}: tasks {', '.join(tasks)} by layers"
        address = charts.coefficient_map(list(run.coefficients.values()), middle, reach)
        drawn.append(
            f'<figure><figcaption>{escape(group.label)}</figcaption><img class="map" '
            f'style="height:{14 * len(tasks)}px" alt="{escape(said)}" src="{address}"></figure>'
        )
    return "".join(drawn)


def _correlations(groups: Sequence[Recipe]) -> str:
    found = correlations(groups)
    if not found:
        return ""
    rows = [(name, [f"{value:.2f}", str(count)]) for name, (value, count) in found.items()]
    return _plain(
        "Spearman's rank correlation with the average accuracy",
        ["score", "rank correlation", "runs"],
        rows,
    )


def _plain(caption: str, titles: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table; the first of the titles is that of the rows' names."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in titles)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        "</table></div>"
    )


def _settings(groups: Sequence[Recipe], differing: Sequence[str]) -> str:
    if not differing or not groups:
        return ""
    rows = [
        (group.label, [str(group.runs[0].settings.get(key, "–")) for key in differing])
        for group in groups
    ]
    return _plain(
        "Settings that differ between recipes; all others are equal", ["recipe", *differing], rows
    )


def _inputs(groups: Sequence[Recipe], command: str) -> str:
    runs = [run for group in groups for run in group.runs]
    record: Mapping[str, Any] = next((run.record for run in runs if run.record), {})
    facts = [f"Made by: {command}"]
    versions = record.get("versions")
    if isinstance(versions, Mapping):
        facts.append("Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    inputs = record.get("inputs")
    if isinstance(inputs, Mapping):
        facts += [
            f"{name}: {value.get('path')}, sha256 {value.get('sha256')}"
            for name, value in inputs.items()
            if isinstance(value, Mapping)
        ]
    folders = _list(
        f"{group.label}, seed {run.seed}: {run.folder}" for group in groups for run in group.runs
    )
    return f"{_list(facts)}<details><summary>Run folders</summary>{folders}</details>"
