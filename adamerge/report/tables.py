"""Tables in Markdown; what was found before training, as one and as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge._base.files import replacing
from adamerge.report.estimate import Estimate
from adamerge.report.findings import Finding
from adamerge.report.preflight import Matrix

FILES = ("preflight.json", "preflight.md")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose columns, but for the first, are numbers."""
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


@dataclass(frozen=True)
class Report:
    """The outcome of a pre-flight.

    Attributes:
        suite: its name.
        images: how many were tried per task.
        model: `layers`, `parameters`, `dtype`, and `promoted` (stored type -> inputs).
        files: `pretrained` or a task -> path and sha256.
        norms: of the task vectors, `[T]`.
        pretrained_norm: of the pretrained weights.
        cosines: between task vectors, `[T, T]`.
        matrix: who solves which task.
        findings: what to look at, problems first.
        estimate: memory and time of the chosen method; None where it could not be tried.
    """

    suite: str
    images: Mapping[str, int]
    model: Mapping[str, Any]
    files: Mapping[str, Mapping[str, str]]
    norms: Tensor
    pretrained_norm: float
    cosines: Tensor
    matrix: Matrix
    findings: Sequence[Finding]
    estimate: Estimate | None

    @property
    def problems(self) -> list[Finding]:
        """The findings that are probably mistakes."""
        return [finding for finding in self.findings if finding.severity == "problem"]

    def summary(self) -> str:
        """One line: how many problems and warnings."""
        warnings = len(self.findings) - len(self.problems)
        counts = ((len(self.problems), "problem"), (warnings, "warning"))
        words = [f"{n} {word}{'' if n == 1 else 's'}" for n, word in counts]
        return f"pre-flight of suite {self.suite}: {', '.join(words)}"


def as_json(report: Report) -> dict[str, Any]:
    """The content of `preflight.json`; unmeasured accuracies are null."""
    tasks, rows = report.matrix.tasks, ["pretrained", *report.matrix.tasks]

    def table(values: Tensor, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
        return {
            name: {task: None if math.isnan(v) else v for task, v in zip(tasks, row, strict=True)}
            for name, row in zip(names, values.tolist(), strict=True)
        }

    return {
        "suite": report.suite,
        "findings": [vars(finding) for finding in report.findings],
        "images": dict(report.images),
        "model": dict(report.model),
        "files": {name: dict(file) for name, file in report.files.items()},
        "pretrained_norm": report.pretrained_norm,
        "task_vector_norms": dict(zip(tasks, report.norms.tolist(), strict=True)),
        "task_vector_cosines": table(report.cosines, tasks),
        "entropy": table(report.matrix.entropy(), rows),
        "marginal_entropy": table(report.matrix.marginal, rows),
        "accuracy": table(report.matrix.accuracy(), rows),
        "estimate": vars(report.estimate) if report.estimate else None,
    }


def as_markdown(report: Report) -> str:
    """The same for reading: findings first, then tables."""
    tasks, model = report.matrix.tasks, report.model
    stored = "".join(f"; {kind}: {', '.join(who)}" for kind, who in model["promoted"].items())
    lines = [f"{report.summary()}.", ""]
    lines += [f"- **{finding.severity}**: {finding.text}" for finding in report.findings]
    lines += [""] if report.findings else []
    lines += [
        f"{model['layers']} layers, {model['parameters'] / 1e6:.2f} M parameters, "
        f"{model['dtype']}{stored}.",
        "",
        *(f"- {name}: {file['path']} (sha256 {file['sha256'][:12]})"
          for name, file in report.files.items()),
        "",
        "Task vectors: length, relative to the pretrained weights, and cosines.",
        "",
    ]  # fmt: skip
    vectors = [
        [task, f"{norm:.4g}", number(norm / report.pretrained_norm, 3), *_numbers(row, 3)]
        for task, norm, row in zip(
            tasks, report.norms.tolist(), report.cosines.tolist(), strict=True
        )
    ]
    lines += markdown(["", "length", "relative", *tasks], vectors)
    lines += ["", f"{report.estimate.text()}."] if report.estimate else []
    counts = sorted(set(report.images.values()))
    many = "–".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])
    matrices = [("Mean entropy, of log C", report.matrix.entropy(), 3)]
    if any(right is not None for right in report.matrix.right):
        matrices.append(("Accuracy in %", 100 * report.matrix.accuracy(), 0))
    for title, values, digits in matrices:
        rows = zip(["pretrained", *tasks], values.tolist(), strict=True)
        lines += ["", f"{title}; rows: models, columns: {many} images of each task.", ""]
        lines += markdown(["", *tasks], [[name, *_numbers(row, digits)] for name, row in rows])
    return "\n".join(lines) + "\n"


def _numbers(values: Sequence[float], digits: int) -> list[str]:
    return [number(value, digits) for value in values]


def write(report: Report, folder: Path) -> None:
    """Writes `preflight.json` and `preflight.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_both(folder / "preflight", as_json(report), as_markdown(report))
