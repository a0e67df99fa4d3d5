"""What was found before training, as tables and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge._base.files import replacing
from adamerge.report.accuracy_matrix import Solving
from adamerge.report.estimate import Estimate
from adamerge.report.findings import Finding

FILES = ("preflight.json", "preflight.md")


@dataclass(frozen=True)
class Report:
    """The outcome of a pre-flight.

    Attributes:
        suite: its name.
        images: how many were looked at per task.
        model: `layers`, `parameters`, `dtype`, and `promoted` (stored type -> inputs).
        files: `pretrained` or a task -> path and sha256.
        norms: of the task vectors, `[T]`.
        pretrained_norm: of the pretrained weights.
        cosines: between task vectors, `[T, T]`.
        solving: who solves which task.
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
    solving: Solving
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
    tasks, rows = report.solving.tasks, ["pretrained", *report.solving.tasks]

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
        "entropy": table(report.solving.entropy(), rows),
        "marginal_entropy": table(report.solving.marginal, rows),
        "accuracy": table(report.solving.accuracy(), rows),
        "estimate": vars(report.estimate) if report.estimate else None,
    }


def as_markdown(report: Report) -> str:
    """The same for reading: findings first, then tables."""
    tasks, model = report.solving.tasks, report.model
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
        *_table(["", "length", "relative", *tasks], _vectors(report)),
        *(["", f"{report.estimate.text()}."] if report.estimate else []),
    ]  # fmt: skip
    counts = sorted(set(report.images.values()))
    many = "–".join(str(count) for count in (counts[0], counts[-1])[: len(counts)])
    matrices = [("Mean entropy, of log C", report.solving.entropy(), 1, 3)]
    if any(right is not None for right in report.solving.right):
        matrices.append(("Accuracy in %", report.solving.accuracy(), 100, 0))
    for title, values, factor, digits in matrices:
        body = [
            [name, *(_number(value * factor, digits) for value in row)]
            for name, row in zip(["pretrained", *tasks], values.tolist(), strict=True)
        ]
        lines += ["", f"{title}; rows: models, columns: {many} images of each task.", ""]
        lines += _table(["", *tasks], body)
    return "\n".join(lines) + "\n"


def write(report: Report, folder: Path) -> None:
    """Writes `preflight.json` and `preflight.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = (json.dumps(as_json(report), indent=2), as_markdown(report))
    for name, content in zip(FILES, contents, strict=True):
        with replacing(folder / name) as temporary:
            temporary.write_text(content)


def _vectors(report: Report) -> list[list[str]]:
    return [
        [task, f"{norm:.4g}", f"{norm / report.pretrained_norm:.3f}", *(f"{c:.3f}" for c in row)]
        for task, norm, row in zip(
            report.solving.tasks, report.norms.tolist(), report.cosines.tolist(), strict=True
        )
    ]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (max(width, 2) - 1) + ":" for width in widths[1:])]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in [head, rule, *body]
    ]
