"""Pictures of a run: merging coefficients by task and layer, their course, accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from adamerge._base.files import replacing
from adamerge.report.evaluation import TITLES
from adamerge.report.tracking import read_metrics


def coefficients_figure(
    tasks: Sequence[str],
    layers: Sequence[str],
    values: Tensor,
    metrics: Path | None = None,
    init: float = 0.3,
) -> Figure:
    """A heat map of λ `[tasks, layers]` over the course of its mean per task.

    Args:
        metrics: a run's `metrics.csv`, for the course; left out where there is none.
        init: where λ started, in the middle of the colours.
    """
    course = _course(metrics, tasks)
    figure = Figure(figsize=(11, 6.5 if course else 3.4), layout="constrained")
    axes = figure.subplots(2 if course else 1, 1, squeeze=False)[:, 0]
    table = values.double().cpu().numpy()
    reach = max(0.05, float(np.abs(table - init).max()))
    limits = {"vmin": init - reach, "vmax": init + reach}
    image = axes[0].imshow(table, aspect="auto", cmap="RdBu_r", interpolation="none", **limits)
    figure.colorbar(image, ax=axes[0], label="merging coefficient λ", pad=0.01)
    axes[0].set_yticks(range(len(tasks)), tasks)
    step = max(1, len(layers) // 40)
    names = [layer.removeprefix("transformer.resblocks.") for layer in layers[::step]]
    axes[0].set_xticks(range(0, len(layers), step), names, rotation=90, fontsize=6)
    axes[0].set_title(f"learned merging coefficients (white: {init:g}, where they started)")
    for task in tasks if course else ():
        (line,) = axes[1].plot(course["step"], course[f"coefficient_mean/{task}"], label=task)
        low, high = course[f"coefficient_min/{task}"], course[f"coefficient_max/{task}"]
        axes[1].fill_between(course["step"], low, high, alpha=0.1, color=line.get_color())
    if course:
        axes[1].set_xlabel("step")
        axes[1].set_ylabel("λ: mean, min to max")
        axes[1].legend(fontsize=7, ncols=4)
    return figure


def _course(path: Path | None, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    wanted = ["step"] + [f"coefficient_{r}/{t}" for t in tasks for r in ("mean", "min", "max")]
    logged = [] if path is None else read_metrics(path)
    rows = [row for row in logged if all(key in row for key in wanted)]
    return {key: np.array([float(row[key]) for row in rows]) for key in wanted} if rows else {}


def readings_figure(metrics: Path, names: Sequence[str], tasks: Sequence[str]) -> Figure:
    """The course of a method's readings, one under the other; a line per task where there is one.

    Args:
        metrics: a run's `metrics.csv`.
    """
    found = read_metrics(metrics)
    figure = Figure(figsize=(11, 2.2 * len(names)), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        for key in (name, *(f"{name}/{task}" for task in tasks)):
            rows = [(int(row["step"]), float(row[key])) for row in found if key in row]
            if rows:
                axis.plot(*zip(*rows, strict=True), label=key.removeprefix(f"{name}/"))
        axis.set_ylabel(name)
        if axis.lines:
            axis.legend(fontsize=7, ncols=4)
    axis.set_xlabel("step")
    return figure


_COLOURS = {
    "pretrained": "#d9d9d9",
    "weight_average": "#b9c7d6",
    "task_arithmetic": "#8fa9c4",
    "task_arithmetic_best": "#5f83ab",
    "expert": "#f2d29b",
}
_FOLDED = ("#e08a74", "#eebfb0")  # neighbours differ


def accuracy_figure(results: Mapping[str, Any]) -> Figure:
    """Bars of accuracy per task and on average, one colour per row of `results.json`."""
    rows = sorted(results["rows"], key=lambda row: row["name"] == "expert")  # experts last
    tasks = list(rows[0]["accuracy"])
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axis = figure.subplots()
    places = np.arange(len(tasks) + 1)
    width = 0.85 / len(rows)
    for index, row in enumerate(rows):
        heights = [*(row["accuracy"].get(task, np.nan) for task in tasks), row["average"]]
        label = TITLES.get(row["name"], row["name"]).split(" (")[0]
        offset = (index - (len(rows) - 1) / 2) * width
        other = _FOLDED[index % 2] if "fold" in row else "#c8442f"
        colour = _COLOURS.get(row["name"], other)
        axis.bar(places + offset, 100 * np.array(heights), width, label=label, color=colour)
    axis.set_xticks(places, [*tasks, "average"])
    axis.set_ylabel("accuracy, %")
    axis.set_ylim(0, 100)
    figure.legend(fontsize=7, ncols=3, loc="outside upper center")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all."""
    layout = figure.get_layout_engine()
    if layout is not None:  # once; `savefig` would do it twice, and draw once for it alone
        layout.execute(figure)
        figure.set_layout_engine("none")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
