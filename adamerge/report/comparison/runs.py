"""Run folders as records, and records that differ in their seed alone as one recipe."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from adamerge._base.errors import AdamergeError, one_line
from adamerge._base.files import read_json
from adamerge.report.tracking import read_metrics

BASELINES = ("pretrained", "expert", "weight_average", "task_arithmetic", "task_arithmetic_best")
# Settings that say where a run is and how it is shown, not what it computes.
_PLACE = ("seed", "run_dir", "resume", "cache_dir", "wandb", "log_every", "checkpoint_every")


@dataclass(frozen=True)
class Run:
    """What the files of one run folder tell.

    Attributes:
        folder: where it lies.
        settings: its `config.yaml`, flat: `{"optim.lr": 0.001, …}`.
        results: its `results.json`; empty where the run has none.
        course: the lines of its `metrics.csv`, as numbers.
        coefficients: `{task: [λ of each layer]}` of its `coefficients.csv`; may be empty.
        record: its export's `merge.json`; empty where nothing was exported.
        failed: why there are no results; empty where there are.
    """

    folder: Path
    settings: dict[str, Any]
    results: dict[str, Any] = field(default_factory=dict)
    course: list[dict[str, float]] = field(default_factory=list)
    coefficients: dict[str, list[float]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")

    def row(self, name: str | None = None) -> dict[str, Any]:
        """The scored row of a baseline, or of the merge itself; empty where there is none."""
        rows = self._rows()
        wanted = [row for row in rows if row["name"] == name] if name else rows[-1:]
        return dict(wanted[0]) if wanted else {}

    def baselines(self) -> list[str]:
        """The baselines that were scored, in the order of the table."""
        return [row["name"] for row in self._rows()[:-1] if row["name"] in BASELINES]

    def _rows(self) -> list[dict[str, Any]]:
        """Of baselines, and last of the merge itself, which may be called as one of them."""
        rows = self.results.get("rows", [])
        return [row for row in rows if row["name"] and "fold" not in row]

    def signals(self) -> dict[str, float]:
        """Label-free scores after adapting, each the mean over tasks; those that there are."""
        kept = self.results.get("signals") or self.results.get("signs") or {}  # of older runs
        after = kept.get("after") or {}
        found = {
            name: statistics.fmean(values.values())
            for name, values in after.items()
            if isinstance(values, Mapping) and values and not name.startswith("expert")
        }
        for name in ("entropy", "marginal_entropy"):
            last = [value for _, value in self.curve(name)[-5:]]
            if last:
                found.setdefault(name, statistics.fmean(last))
        return found

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Steps and a logged number: the mean over tasks where it is logged per task."""
        found = []
        for line in self.course:
            values = [v for k, v in line.items() if k == name or k.startswith(f"{name}/")]
            if values:
                found.append((line["step"], statistics.fmean(values)))
        return found

    def costs(self) -> dict[str, float]:
        """What the run took: seconds of training, images, bytes; those that are known."""
        found: dict[str, float] = {}
        step, each = -1.0, self._images_per_step()
        for line in self.course:
            if line.get("images_per_second"):
                spent = (line["step"] - step) * each / line["images_per_second"]
                found["seconds"], step = found.get("seconds", 0.0) + spent, line["step"]
        if self.course:
            found["images"] = (self.course[-1]["step"] + 1) * each
        peaks = [line["peak_memory_mib"] for line in self.course if "peak_memory_mib" in line]
        if peaks:
            found["peak_memory"] = max(peaks) * 2**20
        sizes = self.record.get("bytes")
        if isinstance(sizes, Mapping) and sizes:
            found["export_bytes"] = float(sum(sizes.values()))
        return found

    def _images_per_step(self) -> float:
        """Images of one step of all processes, as far as its settings tell."""
        parts = [key.split(".") for key in self.settings if key.startswith("suite.tasks.")]
        tasks = len({part[2] for part in parts})
        counts = [self.settings.get(f"trainer.{key}", 1) for key in ("devices", "num_nodes")]
        ranks = math.prod(max(c, 1) if isinstance(c, int) else 1 for c in counts)
        size = self.settings.get("batch_size")
        return float(tasks * ranks * size) if isinstance(size, int) else 0.0


def read_run(folder: Path) -> Run:
    """What is in a run folder; a run that failed or goes on is read as far as it came.

    Raises:
        AdamergeError: the folder has no `config.yaml`, or a file in it is damaged.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise AdamergeError(
            f"{folder} is no run folder (it has no config.yaml): give folders as `train.py` leaves "
            "them, like runs/demo-layer_wise-20260101-120000"
        )
    mend = "delete it, and score the run again by resume="
    try:
        settings = flat(yaml.safe_load(config.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        reason = one_line(error, 120)
        raise AdamergeError(f"{config} is damaged ({reason}): it cannot be compared") from error
    results, record = folder / "results.json", folder / "merged" / "merge.json"
    run = Run(
        folder,
        settings,
        read_json(results, "results of a run", mend) if results.is_file() else {},
        [{k: float(v) for k, v in line.items()} for line in read_metrics(folder / "metrics.csv")],
        _coefficients(folder / "coefficients.csv"),
        read_json(record, "record of an export", mend) if record.is_file() else {},
        "" if results.is_file() else "no results yet",
    )
    try:
        run.row(), run.signals(), run.costs()
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdamergeError(f"{results} is not results of a run ({error!r}): {mend}") from error
    return run


def _coefficients(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    tasks: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        try:
            for row in csv.DictReader(file):
                tasks.setdefault(row["task"], []).append(float(row["coefficient"]))
        except (KeyError, TypeError, ValueError) as error:
            raise AdamergeError(
                f"{path} is damaged ({error!r}): move it away to compare the run without it"
            ) from error
    return tasks


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings by dotted names; lists stay values.

    >>> flat({"optim": {"lr": 0.1}, "seed": 0})
    {'optim.lr': 0.1, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


@dataclass(frozen=True)
class Recipe:
    """Runs whose settings are equal but for the seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.row()]

    def accuracy(self, task: str) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds, as fractions; None where it was not measured."""
        return spread(run.row()["accuracy"].get(task) for run in self.done)

    def value(self, key: str) -> tuple[float, float] | None:
        """That of a number of the merge's row, such as `average` or `normalized`."""
        return spread(run.row().get(key) for run in self.done)

    def signal(self, name: str) -> tuple[float, float] | None:
        return spread(run.signals().get(name) for run in self.done)

    def cost(self, name: str) -> tuple[float, float] | None:
        return spread(run.costs().get(name) for run in self.done)


def recipes(runs: Sequence[Run]) -> tuple[list[Recipe], list[str]]:
    """Runs by recipe, in the order of the runs, and the names of the settings that differ.

    A recipe is called by its method and its objective, if it learns, and as `key=value` by what
    else differs among those called alike.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(
            json.dumps(essential(run.settings), sort_keys=True, default=str), []
        ).append(run)
    firsts = [group[0] for group in groups.values()]
    keys = differing([essential(run.settings) for run in firsts])
    titles = [_title(run, "suite.name" in keys) for run in firsts]
    named = []
    for name, group in zip(titles, groups.values(), strict=True):
        alike = [essential(r.settings) for r, t in zip(firsts, titles, strict=True) if t == name]
        more = [f"{key}={group[0].settings.get(key)}" for key in differing(alike)]
        named.append(Recipe(" · ".join([name, *more[:3]]), tuple(group)))
    labels = [recipe.label for recipe in named]
    return [
        recipe
        if labels.count(recipe.label) == 1
        else Recipe(f"{recipe.label} ({recipe.runs[0].folder.name})", recipe.runs)
        for recipe in named
    ], keys


def essential(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of flat settings those that decide what a run computes, but for its seed."""
    aside = _PLACE if _learns(settings) else (*_PLACE, "objective")
    kept = {k: v for k, v in settings.items() if k.partition(".")[0] not in aside}
    if kept.get("method.base"):  # a run of the same seed
        kept["method.base"] = re.sub(r"-?seed\d+$", "", Path(str(kept["method.base"])).name)
    return kept


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all."""
    keys = dict.fromkeys(key for one in settings for key in one)
    return [
        key for key in keys if len({json.dumps(one.get(key), default=str) for one in settings}) > 1
    ]


def _learns(settings: Mapping[str, Any]) -> bool:
    return settings.get("trainer.max_steps") != 0


def _title(run: Run, of_several: bool) -> str:
    """Method and objective of a run, where they differ also its suite; what learns nothing has no
    objective."""
    slots = ["suite"] * of_several + ["method"] + ["objective"] * _learns(run.settings)
    names = [run.settings.get(f"{slot}.name") for slot in slots]
    return " · ".join(str(name) for name in names if name)


def spread(values: Iterable[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (of a sample; 0 of one value) of the values that there are.

    >>> spread([1.0, 3.0, None])
    (2.0, 1.4142135623730951)
    """
    there = [value for value in values if value is not None and math.isfinite(value)]
    if not there:
        return None
    return statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else 0.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, ties sharing their mean rank; None below three pairs, or where one is constant.

    >>> rank_correlation([1, 2, 3], [10, 20, 30])
    1.0
    """
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return statistics.correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
