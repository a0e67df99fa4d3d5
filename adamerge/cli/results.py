"""The results of a trained method: scores, pictures, an exported folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import WandbLogger

from adamerge._base.errors import AdamergeError
from adamerge._base.files import read_json, replacing
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
from adamerge.report import advice, evaluation, pictures, preflight, tracking
from adamerge.report.evaluation import Row
from adamerge.report.result_files import as_json, read_results, write_results

log = logging.getLogger("adamerge")


SIGNS = "signs.json"  # in a run's folder


def signs_of(job: Job, encoder: torch.nn.Module) -> advice.Signs:
    """Label-free signs of an encoder, on the images that the pre-flight takes."""
    settings, suite, device = job.settings, job.suite, job.device
    chosen = preflight.choose(job.data, settings["preflight"]["images"])
    normalizer, heads = job.normalizer.to(device), suite.heads.to(device)
    images = {task: normalizer(pixels.to(device)) for task, pixels in chosen.pixels.items()}
    teacher = Experts(suite.clip.backbone, suite.task_vectors)
    signs = advice.signs(encoder.to(device), teacher, heads, images)
    heads.to("cpu")
    encoder.to("cpu")
    return signs


def keep_signs(job: Job, run_dir: Path) -> None:
    """Writes the signs before anything is learned to the run's folder; with the pre-flight only."""
    if job.settings["preflight"]["enabled"]:
        signs = dataclasses.asdict(signs_of(job, job.module.method.fold()))
        with replacing(run_dir / SIGNS) as temporary:
            temporary.write_text(json.dumps(signs, indent=2))


def _kept_signs(path: Path) -> advice.Signs | None:
    """What `keep_signs` wrote; None where it did not, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        kept = vars(advice.Signs(**read_json(path))).values()
        return advice.Signs(*({task: float(v) for task, v in part.items()} for part in kept))
    except (AdamergeError, AttributeError, TypeError, ValueError) as error:
        log.warning("%s cannot be read (%s): the results say nothing of before", path, error)
        return None


def _signs(job: Job, encoder: torch.nn.Module, run_dir: Path) -> dict[str, Any]:
    """Signs before and after, and what they speak for, for the results."""
    before = _kept_signs(run_dir / SIGNS)
    if before is None:
        return {}
    after = signs_of(job, encoder)
    taught = isinstance(job.module.objective, Taught)  # by the experts: nothing to advise
    taught = taught or job.settings["trainer"]["max_steps"] == 0  # nor of no objective at all
    said = [] if taught else advice.advice(job.settings["objective"]["name"], before, after)
    for sentence in said:
        log.warning("advice: %s", sentence)
    signs = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
    return {"signs": signs, "advice": said}


def finish(job: Job, run_dir: Path, wandb: WandbLogger | None) -> None:
    """Folds, scores, draws and exports a trained job, and prints the table."""
    method, name = job.module.method.eval(), job.settings["method"]["name"]
    write.write_coefficients(run_dir / "coefficients.csv", method, job.suite.heads.tasks)
    folded, scorer = method.fold(), job.scorer()
    rows, statistics = score(job, folded, name, job.heads()), None
    if scorer.measures:
        statistics = _statistics(job)
        rows += evaluation.fold_rows(method, name, statistics, job.own_scorer())
    labels = build.learns_from_labels(job.settings)
    results = _results(job, rows, name, labels) | _exported(job)
    results |= _signs(job, folded, run_dir)
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
    job.resume(run_dir)
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
