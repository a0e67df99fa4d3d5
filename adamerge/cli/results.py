"""The results of a trained method: scores, pictures, an exported folder."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
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
from adamerge.config.device import run_device
from adamerge.config.inputs import Inputs
from adamerge.encoders.experts import Experts
from adamerge.encoders.heads import Heads
from adamerge.encoders.tower import Tower
from adamerge.export import load, read, write
from adamerge.learn.data import TaskData
from adamerge.learn.objectives import Taught
from adamerge.learn.resume import CHECKPOINT, check_fingerprint, read_checkpoint
from adamerge.methods.base import folds_of
from adamerge.report import advice, evaluation, folds, pictures, preflight, tracking
from adamerge.report.evaluation import Row
from adamerge.report.result_files import as_json, read_results, write_results

log = logging.getLogger("adamerge")


SIGNS = "signs.json"  # in a run's folder


def look(job: Job, encoder: torch.nn.Module) -> advice.Signs:
    """Label-free signs of an encoder, on the images that the pre-flight looks at."""
    settings, suite, device = job.settings, job.suite, run_device(job.settings["trainer"])
    chosen = preflight.choose(job.data, settings["preflight"]["images"], settings["seed"])
    normalizer, heads = inputs.normalizer(suite.clip).to(device), suite.heads.to(device)
    images = {task: normalizer(pixels.to(device)) for task, pixels in chosen.pixels.items()}
    teacher = Experts(suite.clip.backbone, suite.task_vectors)
    found = advice.signs(encoder.to(device), teacher, heads, images)
    heads.to("cpu")
    encoder.to("cpu")
    return found


def look_before(job: Job, run_dir: Path) -> None:
    """Signs before anything is learned, kept in the run's folder; with the pre-flight only."""
    if job.settings["preflight"]["enabled"]:
        found = dataclasses.asdict(look(job, job.module.method.fold()))
        with replacing(run_dir / SIGNS) as temporary:
            temporary.write_text(json.dumps(found, indent=2))


def _signs(job: Job, encoder: torch.nn.Module, run_dir: Path) -> dict[str, Any]:
    """Signs before and after, and what they speak for, for the results."""
    before = _signs_before(run_dir / SIGNS)
    if before is None:
        return {}
    after = look(job, encoder)
    taught = isinstance(job.module.objective, Taught)  # by the experts: nothing to advise
    taught = taught or job.settings["trainer"]["max_steps"] == 0  # nor of no objective at all
    said = [] if taught else advice.advice(job.settings["objective"]["name"], before, after)
    for sentence in said:
        log.warning("advice: %s", sentence)
    signs = {"before": dataclasses.asdict(before), "after": dataclasses.asdict(after)}
    return {"signs": signs, "advice": said}


def _signs_before(path: Path) -> advice.Signs | None:
    """What `look_before` kept; None where no look was taken, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        found = advice.Signs(**read_json(path))
        kept = [{task: float(v) for task, v in p.items()} for p in vars(found).values()]
        return advice.Signs(*kept)
    except (AdamergeError, AttributeError, TypeError, ValueError) as error:
        log.warning("%s cannot be read (%s): the results say nothing of before", path, error)
        return None


def finish(job: Job, run_dir: Path, wandb: WandbLogger | None) -> None:
    """Folds, scores, draws and exports a trained job, and prints the table."""
    method, tasks = job.module.method.eval(), job.suite.heads.tasks
    write.write_coefficients(run_dir / "coefficients.csv", method, tasks)
    name, size = job.settings["method"]["name"], job.settings["evaluate"]["batch_size"]
    normalizer, found = inputs.normalizer(job.suite.clip), None
    device = run_device(job.settings["trainer"])
    folded = method.fold()
    rows = score(job, folded, name, job.heads())
    if job.scorer(device).measures:
        found = folds.statistics(method, job.data, normalizer, device, size)
        rows += folds.rows(method, name, found, job.own_scorer(device))
    results = _results(job, rows, name) | _exported(job)
    results |= _signs(job, folded, run_dir)
    table = write_results(results, run_dir)
    drawn = draw_coefficients(job, run_dir)
    if results["rows"][0]["accuracy"]:
        drawn["accuracy"] = run_dir / "accuracy.png"
        pictures.save(pictures.accuracy_figure(results), drawn["accuracy"])
    done = export_merged(job, run_dir / "merged", results, table, found)
    artifact = done.folder if job.settings["wandb"]["artifact"] else None
    tracking.log_results(wandb, results, drawn, artifact)
    print(f"\n{table}")
    _say_exported(done)


def draw_coefficients(job: Job, run_dir: Path) -> dict[str, Path]:
    """Writes `coefficients.png`, for methods that have merging coefficients."""
    table = job.module.method.coefficient_table()
    if table is None:
        return {}
    path = run_dir / "coefficients.png"
    init = job.settings["method"].get("init", INIT)
    start = float(init) if isinstance(init, int | float) else INIT
    tasks, metrics = job.suite.heads.tasks, run_dir / "metrics.csv"
    figure = pictures.coefficients_figure(tasks, *table, metrics, start)
    pictures.save(figure, path)
    return {"coefficients": path}


def score(
    job: Inputs, encoder: torch.nn.Module, name: str, heads: Heads | None = None
) -> list[Row]:
    """The encoder's row of that name, after the baselines' if they are wanted.

    Args:
        heads: the encoder's own; None: the suite's, which the baselines always have.

    Baselines depend on a run's inputs alone: their scores are kept in `cache_dir`.
    """
    scorer = job.scorer(run_device(job.settings["trainer"]))
    rows = []
    if job.settings["evaluate"]["baselines"] and scorer.measures:
        kept = job.kept("scores", scorer.key())
        rows = evaluation.baseline_rows(
            scorer,
            Tower(job.suite.clip.backbone),
            job.suite.task_vectors,
            job.settings["evaluate"]["oracle"],
            lambda what: log.info("scoring: %s", what),
            kept,
        )
        log.info("baselines are kept in %s", kept.path)
    log.info("scoring: %s", name)
    own = scorer if heads is None else dataclasses.replace(scorer, heads=heads)
    return [*rows, own.row(name, encoder)]


def _results(job: Inputs, rows: Sequence[Row], method: str) -> dict[str, Any]:
    settings = job.settings
    suite, protocol = settings["suite"]["name"], settings["protocol"]
    return as_json(rows, suite, method, protocol, settings["seed"])


def _exported(job: Job) -> dict[str, str]:
    """The row of the results that is exported, where a fold is asked for."""
    fold, name = job.settings["fold"], job.settings["method"]["name"]
    return {} if fold is None else {"exported": folds.title(job.module.method, name, fold)}


def export_merged(
    job: Job, folder: Path, results: dict[str, Any], table: str, found: Any = None
) -> write.Exported:
    """Writes the merged folder with its provenance; features are compared on real images.

    Args:
        found: what `folds.statistics` gave; made here if it is needed.
    """
    suite, settings, normalizer = job.suite, job.settings, inputs.normalizer(job.suite.clip)
    method, fold = job.module.method.eval().float(), settings["fold"]
    if found is None and fold is not None and not folds_of(method)[fold]:
        size = settings["evaluate"]["batch_size"]
        device = run_device(settings["trainer"])
        found = folds.statistics(method, job.data, normalizer, device, size)
    encoder, exact = folds.encoder(method, fold, found)
    images = [normalizer(job.data.sample(task, 8)) for task in suite.heads.tasks]
    ids = [torch.full((len(part),), index) for index, part in enumerate(images)]
    provenance = {
        "suite": settings["suite"]["name"],
        "method": settings["method"]["name"],
        "fold": fold,
        "fold_is_exact": exact,
        "protocol": settings["protocol"],
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


def _say_exported(done: write.Exported) -> None:
    print(f"merged model: {done.folder} ({done.kind}, {done.bytes:,} bytes of weights)")
    print(f"largest relative difference after reloading: {done.difference:.1e}")


def export_run(run_dir: Path, folder: Path | None, words: Sequence[str] = ()) -> int:
    """Exports a run's last checkpoint again, or in another fold (`adamerge export`)."""
    settings = config.load_run(run_dir, words)
    build.check(settings)
    job = load_job(settings)
    saved = read_checkpoint(run_dir / CHECKPOINT)
    check_fingerprint(saved, job.fingerprint(), run_dir)
    job.module.load_state_dict(saved["state_dict"])
    found, which = run_dir / "results.json", _exported(job)
    results, table = read_results(found, which) if found.is_file() else ({}, "")
    _say_exported(export_merged(job, folder or run_dir / "merged", results, table))
    return 0


def evaluate(target: Path, words: Sequence[str], to: Path | None = None) -> int:
    """Scores an exported folder, or a run's, on a suite; writes results (`adamerge evaluate`)."""
    is_run, folder = (target / "config.yaml").is_file(), read.find_export(target)
    layout = read.read_layout(folder)
    own_suite = any(word.startswith("suite=") for word in words)
    settings = config.load_run(target, words) if is_run and not own_suite else config.load(words)
    build.check(settings)
    settings["protocol"] = _protocol(folder, settings["protocol"])
    known = inputs.load(settings)
    encoder, stated = read.read_encoder(folder, layout)
    if stated["model_cfg"] != known.suite.clip.config["model_cfg"]:
        raise AdamergeError(
            f"{folder} is of another architecture than suite {settings['suite']['name']}: evaluate "
            "it on a suite it was merged from, or of the same model"
        )
    encoder = load.for_tasks(encoder, layout, known.suite.heads.tasks)
    name = target.resolve().name
    heads = read.read_heads(folder)
    learned = heads.tasks == known.suite.heads.tasks and heads.bias(heads.tasks[0]) is not None
    rows = score(known, encoder, name, heads if learned else None)
    results = _results(known, rows, name)
    (to or target / "evaluation").mkdir(parents=True, exist_ok=True)
    print(f"\n{write_results(results, to or target / 'evaluation')}")
    return 0


def _protocol(folder: Path, otherwise: str) -> str:
    """What the merge in a folder was adapted on: its images must not be scored as if unseen."""
    record = folder / "merge.json"
    try:
        return str(read_json(record)["protocol"]) if record.is_file() else otherwise
    except (AdamergeError, KeyError):
        return otherwise
