"""The results of a trained method: scores, pictures, an exported folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger

from adamerge._base.errors import AdamergeError
from adamerge.cli.job import Job, load_job
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.config.arguments import INIT
from adamerge.config.inputs import Inputs
from adamerge.encoders.experts import Experts
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower
from adamerge.export import folds, load, read, write
from adamerge.learn.data import TaskData
from adamerge.learn.objectives import Taught
from adamerge.methods.base import folds_of
from adamerge.report import advice, evaluation, keep, pictures, preflight, tracking
from adamerge.report.evaluation import Row
from adamerge.report.result_files import as_json, read_results, write_results
from adamerge.report.signals import ByTask, Watched

log = logging.getLogger("adamerge")


def watched(job: Job) -> Watched:
    """The images that signals are measured on; what the experts say of them is kept."""
    suite, device = job.suite, job.device
    images = preflight.choose(job.data, keep.IMAGES)

    def encode() -> dict[str, Any]:
        teacher = Experts(suite.clip.backbone, suite.task_vectors)
        given = (suite.heads, job.normalizer, images.pixels, device)
        return {task: logits.tolist() for task, logits in preflight.predictions(teacher, *given)}

    kept = job.kept("signals", preflight.key(images, suite.heads, job.normalizer, device))
    logits = {task: torch.tensor(rows) for task, rows in kept("experts", encode).items()}
    return Watched(images.pixels, logits, job.normalizer, device)


def advise(job: Job, sentences: Callable[..., list[str]], found: Any) -> list[str]:
    """What signals speak for, by one of the functions of `advice`, said and returned."""
    taught = isinstance(job.module.objective, Taught)
    said = sentences(job.settings["objective"]["name"], taught, found)
    said = said if job.settings["preflight"]["enabled"] else []
    for sentence in said:
        log.warning("advice: %s", sentence)
    return said


def _signals(job: Job, encoder: torch.nn.Module, record: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured without labels, what was kept and why, and advice, for the results."""
    seen: dict[int, ByTask] = record.get("signals", {})
    kept, images = keep.outcome(record, job.settings["keep"] == "best"), watched(job)
    exported = seen[kept["step"]] if kept else images.of(encoder, job.heads())
    first = next(iter(seen.values()), exported)
    signals = {"before": first, "after": exported, "experts": images.of_experts()}
    if not kept:  # nothing was learned: nothing to advise on
        return {"signals": signals, "advice": []}
    signals["last"] = seen[kept["last_step"]]
    course = [{"step": step, **found} for step, found in seen.items()]
    said = [*advise(job, advice.before, first), *advise(job, advice.after, signals)]
    return {"signals": signals, "course": course, "kept": kept, "advice": said}


def finish(job: Job, run_dir: Path, wandb: WandbLogger | None, record: Mapping[str, Any]) -> None:
    """Folds, scores, draws and exports a trained job, and prints the table.

    Args:
        record: of `keep.Keep`; empty where nothing was learned.
    """
    method, name = job.module.method.eval(), job.settings["method"]["name"]
    write.write_coefficients(run_dir / "coefficients.csv", method, job.suite.heads.tasks)
    folded, scorer = method.fold(), job.scorer()
    rows, statistics = score(job, folded, name, job.heads()), None
    if scorer.measures:
        statistics = _statistics(job)
        rows += evaluation.fold_rows(method, name, statistics, job.own_scorer())
    labels = build.learns_from_labels(job.settings)
    results = _results(job, rows, name, labels) | _exported(job)
    results |= _signals(job, folded, record)
    table = write_results(results, run_dir)
    drawn = draw_coefficients(job, run_dir)
    if results["rows"][0]["accuracy"]:
        drawn["accuracy"] = run_dir / "accuracy.png"
        pictures.save(pictures.accuracy_figure(results), drawn["accuracy"])
    done = export_merged(job, run_dir / "merged", results, table, statistics)
    artifact = run_dir / "merged" if job.settings["wandb"]["artifact"] else None
    tracking.log_results(wandb, results, drawn, artifact)
    print(f"\n{table}")
    _say_exported(run_dir / "merged", done)
    if said := keep.never_better(results.get("kept", {})):
        print(said)


def _statistics(job: Job) -> Any:
    """What the folds of the job's method must know of the images that were adapted on."""
    size = job.settings["evaluate"]["batch_size"]
    return folds.statistics(job.module.method, job.data, job.normalizer, job.device, size)


def draw_coefficients(job: Job, run_dir: Path) -> dict[str, Path]:
    """Writes `coefficients.png`, for methods that have merging coefficients, and `readings.png`,
    for those that report other numbers."""
    method, drawn = job.module.method, {}
    tasks, metrics = job.suite.heads.tasks, run_dir / "metrics.csv"
    table = method.coefficient_table()
    if table is not None:
        init = job.settings["method"].get("init", INIT)
        start = float(init) if isinstance(init, int | float) else INIT
        drawn["coefficients"] = pictures.coefficients_figure(tasks, *table, metrics, start)
    own = [name for name in method.readings() if not name.startswith("coefficient_")]
    if own:
        drawn["readings"] = pictures.readings_figure(metrics, own, tasks)
    for name, figure in drawn.items():
        pictures.save(figure, run_dir / f"{name}.png")
    return {name: run_dir / f"{name}.png" for name in drawn}


def score(
    job: Inputs, encoder: torch.nn.Module, name: str, heads: Heads | None = None
) -> list[Row]:
    """The encoder's row of that name, after the baselines' if they are wanted.

    Args:
        heads: the encoder's own; None: the suite's, which the baselines always have.

    Baselines depend on a run's inputs alone: their scores are kept in `cache_dir`.
    """
    scorer, asked = job.scorer(), job.settings["evaluate"]
    rows = []
    if asked["baselines"] and scorer.measures:
        kept, tower = job.kept("scores", scorer.key()), Tower(job.suite.clip.backbone)
        given = (scorer, tower, job.suite.task_vectors, asked["oracle"])
        rows = evaluation.baseline_rows(*given, kept)
        log.info("baselines are kept in %s", kept.path)
    log.info("scoring: %s", name)
    own = scorer if heads is None else dataclasses.replace(scorer, heads=heads)
    return [*rows, own.row(name, encoder)]


def _results(job: Inputs, rows: Sequence[Row], method: str, labels: bool) -> dict[str, Any]:
    settings = job.settings
    suite, protocol, seed = settings["suite"]["name"], settings["protocol"], settings["seed"]
    return as_json(rows, suite, method, protocol, seed, labels)


def _exported(job: Job) -> dict[str, str]:
    """The row of the results that is exported, where a fold is asked for."""
    fold, name = job.settings["fold"], job.settings["method"]["name"]
    return {} if fold is None else {"exported": folds.title(job.module.method, name, fold)}


def export_merged(
    job: Job, folder: Path, results: dict[str, Any], table: str, statistics: Any = None
) -> dict[str, Any]:
    """Writes the merged folder with its provenance; features are compared on real images.

    Args:
        statistics: `_statistics`; made here if they are needed.
    """
    suite, settings = job.suite, job.settings
    method, fold = job.module.method.eval().float(), settings["fold"]
    if statistics is None and fold is not None and not folds_of(method)[fold]:
        statistics = _statistics(job)
    encoder, exact = folds.encoder(method, fold, statistics)
    images = [job.normalizer(job.data.sample(task, 8)) for task in suite.heads.tasks]
    ids = [torch.full((len(part),), index) for index, part in enumerate(images)]
    provenance = {
        "suite": settings["suite"]["name"],
        "method": settings["method"]["name"],
        "fold": fold,
        "fold_is_exact": exact,
        "protocol": settings["protocol"],
        "labels": build.learns_from_labels(settings),
        "config": settings,
        "inputs": suite.files,
        "images": _images(job.data),
        "unseen_images": _images(job.unseen[1]) if job.unseen is not None else {},
        "metrics": results,
        **write.environment(),
    }
    samples, wanted = (torch.cat(images), torch.cat(ids)), method if exact else encoder
    return write.export(
        folder, encoder, wanted, suite.clip, job.heads(), samples, provenance, table, method
    )


def _images(data: TaskData) -> dict[str, dict[str, Any]]:
    return {
        task: {"key": found.key, "count": len(found.images), "skipped": found.skipped}
        for task, found in data.tasks.items()
    }


def _say_exported(folder: Path, record: Mapping[str, Any]) -> None:
    size, difference = sum(record["bytes"].values()), record["largest_relative_difference"]
    print(f"merged model: {folder} ({record['kind']}, {size:,} bytes of weights)")
    print(f"largest relative difference after reloading: {difference:.1e}")


def export_run(run_dir: Path, folder: Path | None, words: Sequence[str] = ()) -> int:
    """Exports a run's last checkpoint again, or in another fold (`adamerge export`)."""
    settings = config.load_run(run_dir, words)
    build.check(settings)
    job = load_job(settings)
    _, record = job.resume(run_dir)
    if settings["keep"] == "best":
        keep.restore(job.module, record)
    path, row = run_dir / "results.json", _exported(job)
    results, table = read_results(path, row) if path.is_file() else ({}, "")
    folder = folder or run_dir / "merged"
    _say_exported(folder, export_merged(job, folder, results, table))
    return 0


def evaluate(target: Path, words: Sequence[str], to: Path | None = None) -> int:
    """Scores an exported folder, or a run's, on a suite; writes results (`adamerge evaluate`)."""
    is_run, folder = (target / "config.yaml").is_file(), read.find_export(target)
    layout = read.read_layout(folder)
    other_suite = any(word.startswith("suite=") for word in words)
    is_run = is_run and not other_suite
    settings = config.load_run(target, words) if is_run else config.load(words)
    name, given = layout.record.get("suite"), settings["suite"]["name"]
    if not is_run and not other_suite and name is not None and name != given:
        raise AdamergeError(
            f"{folder} was merged from suite {name}, and no suite is given to score it on: give "
            f"one, as suite={name}"
        )
    build.check(settings)
    # What the merge was adapted on must not be scored as if it were unseen.
    settings["protocol"] = str(layout.record.get("protocol", settings["protocol"]))
    known = inputs.load(settings)
    encoder, stated = read.read_encoder(folder, layout)
    if stated["model_cfg"] != known.suite.clip.config["model_cfg"]:
        raise AdamergeError(
            f"{folder} is of another architecture than suite {settings['suite']['name']}: evaluate "
            "it on a suite it was merged from, or of the same model"
        )
    encoder = load.for_tasks(encoder, layout, known.suite.heads.tasks)
    name, place = target.resolve().name, to or target / "evaluation"
    heads = read.read_heads(folder, layout)
    learned = heads.tasks == known.suite.heads.tasks and heads.bias(heads.tasks[0]) is not None
    rows = score(known, encoder, name, heads if learned else None)
    results = _results(known, rows, name, bool(layout.record.get("labels")))
    place.mkdir(parents=True, exist_ok=True)
    print(f"\n{write_results(results, place)}")
    return 0
