"""Tables in Markdown; what was found before training, as one and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge._base.files import replacing
from adamerge.report.estimate import Estimate
from adamerge.report.findings import Finding
from adamerge.report.preflight import Matrix, cosines

FILES = ("preflight.json", "preflight.md")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns, but for the first, are numbers.

    >>> markdown(["task", "%"], [["a|b", "1"]])[2]
    '| a\\\\|b | 1  |'
    """
    head, *body = [[cell.replace("|", "\\|") for cell in line] for line in (head, *body)]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    widths[1:] = [max(width, 2) for width in widths[1:]]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [head, rule, *body]
    ]


def number(value: float | None, digits: int) -> str:
    """A number in a table; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def write_both(path: Path, content: Mapping[str, Any], text: str) -> None:
    """Writes `<path>.json` and `<path>.md`."""
    for ending, written in ((".json", json.dumps(content, indent=2)), (".md", text)):
        with replacing(path.with_name(path.name + ending)) as temporary:
            temporary.write_text(written)


def as_json(
    suite: str,
    images: Mapping[str, int],
    model: Mapping[str, Any],
    files: Mapping[str, Mapping[str, str]],
    products: Tensor,
    matrix: Matrix,
    findings: Sequence[Finding],
    estimate: Estimate | None,
) -> dict[str, Any]:
    """The content of `preflight.json`, the outcome of a pre-flight; problems first, unmeasured
    accuracies null.

    Args:
        suite: its name.
        images: how many were tried per task.
        model: `layers`, `parameters`, `dtype`, and `promoted` (stored type -> inputs).
        files: `pretrained` or a task -> path and sha256.
        products: of pretrained weights and task vectors, see `preflight.gram`.
        matrix: who solves which task.
        estimate: memory and time of the chosen method; None where it could not be tried.
    """
    tasks, rows = matrix.tasks, ["pretrained", *matrix.tasks]
    norms = dict(zip(rows, products[0].diagonal().sqrt().tolist(), strict=True))

    def table(values: Tensor, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
        return {
            name: {task: None if math.isnan(v) else v for task, v in zip(tasks, row, strict=True)}
            for name, row in zip(names, values.tolist(), strict=True)
        }

    return {
        "suite": suite,
        "findings": [vars(one) for one in sorted(findings, key=lambda one: one.severity)],
        "images": dict(images),
        "model": dict(model),
        "files": {name: dict(file) for name, file in files.items()},
        "pretrained_norm": norms.pop("pretrained"),
        "task_vector_norms": norms,
        "task_vector_cosines": table(cosines(products[0, 1:, 1:]), tasks),
        "entropy": table(matrix.entropy(), rows),
        "marginal_entropy": table(matrix.marginal, rows),
        "accuracy": table(matrix.accuracy(), rows),
        "estimate": vars(estimate) if estimate else None,
    }


def problems(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The findings that are probably mistakes."""
    return [finding for finding in report["findings"] if finding["severity"] == "problem"]


def summary(report: Mapping[str, Any]) -> str:
    """One line: how many problems and warnings."""
    wrong = len(problems(report))
    counts = ((wrong, "problem"), (len(report["findings"]) - wrong, "warning"))
    words = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts]
    return f"pre-flight of suite {report['suite']}: {', '.join(words)}"


def as_markdown(report: Mapping[str, Any]) -> str:
    """The same for reading: findings first, then tables."""
    model, norms, cost = report["model"], report["task_vector_norms"], report["estimate"]
    stored = "".join(f"; {kind}: {', '.join(who)}" for kind, who in model["promoted"].items())
    lines = [f"{summary(report)}.", ""]
    lines += [f"- **{finding['severity']}**: {finding['text']}" for finding in report["findings"]]
    lines += [""] if report["findings"] else []
    lines += [
        f"{model['layers']} layers, {model['parameters'] / 1e6:.2f} M parameters, "
        f"{model['dtype']}{stored}.",
        "",
        *(f"- {name}: {file['path']} (sha256 {file['sha256'][:12]})"
          for name, file in report["files"].items()),
        "",
        "Task vectors: length, relative to the pretrained weights, and cosines.",
        "",
    ]  # fmt: skip
    vectors = [
        [task, f"{norms[task]:.4g}", number(norms[task] / report["pretrained_norm"], 3)]
        + [number(cosine, 3) for cosine in row.values()]
        for task, row in report["task_vector_cosines"].items()
    ]
    lines += markdown(["", "length", "relative", *norms], vectors)
    lines += ["", f"{Estimate(**cost).text()}."] if cost else []
    counts = sorted(set(report["images"].values()))
    many = "–".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])
    matrices = [("Mean entropy, of log C", report["entropy"], 1, 3)]
    if any(value is not None for value in report["accuracy"]["pretrained"].values()):
        matrices.append(("Accuracy in %", report["accuracy"], 100, 0))
    for title, rows, factor, digits in matrices:
        lines += ["", f"{title}; rows: models, columns: {many} images of each task.", ""]
        body = [
            [name, *(number(v if v is None else factor * v, digits) for v in row.values())]
            for name, row in rows.items()
        ]
        lines += markdown(["", *norms], body)
    return "\n".join(lines) + "\n"


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Writes `preflight.json` and `preflight.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_both(folder / "preflight", report, as_markdown(report))
