"""The main job: configuration in, run folder with a merged checkpoint out."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import seed_everything
from lightning.pytorch.loggers import WandbLogger

from adamerge._base.errors import AdamergeError
from adamerge._base.files import LOCK, alone_in, clear_left
from adamerge._base.memory import memory_available
from adamerge.cli import check, results
from adamerge.cli.job import Job, load_job
from adamerge.cli.processes import LostProcess, outlived, together
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.config.settings import Config
from adamerge.config.trainer import build_trainer, check_place, one_sentence, ranks
from adamerge.images.batches import refuse_too_large
from adamerge.learn import precomputed
from adamerge.learn.blocks import compiled, recomputing, uncompiled
from adamerge.learn.callbacks import Progress, Sharding, StopOnSignal, Watch
from adamerge.learn.features import online_steps
from adamerge.learn.resume import CHECKPOINT, CheckpointFiles, Checkpoints
from adamerge.report import advice, tables, tracking
from adamerge.report.estimate import untouched
from adamerge.report.keep import Keep, interval, restore
from adamerge.report.signals import ByTask
from adamerge.report.tracking import is_main_process

log = logging.getLogger("adamerge")

_RUN_DIR = "ADAMERGE_RUN_DIR"  # tells the processes that DDP starts where the first one writes


def train(words: Sequence[str]) -> int:
    """Learns a merge and leaves a run folder; returns the exit status.

    0 when it is done; 128 + the signal's number when Ctrl-C or SIGTERM stopped it, with the run
    folder ready to be resumed.
    """
    settings, run_dir, resumed = _open_run(words)
    build.check(settings)
    check_place(settings)
    seed_everything(settings["seed"], verbose=False)
    if is_main_process():
        with alone_in(run_dir):
            return _train(settings, run_dir, resumed)
    parent = os.getppid()
    try:
        return _train(settings, run_dir, resumed)
    except LostProcess:
        if _RUN_DIR in os.environ and not outlived(parent):
            return 2  # the main process, which started this one, says it
        raise


def _train(settings: Config, run_dir: Path, resumed: bool) -> int:
    if is_main_process():
        _clear(run_dir, resumed)
    job = load_job(settings)
    step, record = job.resume(run_dir) if resumed else (0, {})
    if is_main_process():
        _make_folder(run_dir, settings)
        _announce(job, run_dir)
        if not resumed:
            check.before_training(job, run_dir)
    _prepare(job)
    wandb = tracking.wandb_logger(settings["wandb"], run_dir, settings)
    stopped_by, record = _fit(job, run_dir, step, wandb, record)
    if not is_main_process():
        return 0
    if stopped_by is None:
        _finish(job, run_dir, wandb, record)
    else:
        log.info("stopped; go on with: python train.py resume=%s", run_dir)
    if wandb is not None:
        wandb.experiment.finish()
    return 0 if stopped_by is None else 128 + stopped_by


def _finish(job: Job, run_dir: Path, wandb: WandbLogger | None, record: Mapping[str, Any]) -> None:
    """Scores and exports what is kept; whatever stops that, it is in the checkpoint."""
    if job.settings["keep"] == "best":
        restore(job.module, record)
    try:
        results.finish(job, run_dir, wandb, record)
    except BaseException:
        log.warning(
            "what was learned is kept in %s: score and export it with python train.py resume=%s, "
            "or only export it with adamerge export %s",
            *(run_dir / CHECKPOINT, run_dir, run_dir),
        )
        raise


def _prepare(job: Job) -> None:
    """Stores what frozen encoders say of the images, says where these are kept, and counts the
    steps of an online run."""
    settings, trainer, device = job.settings, job.settings["trainer"], job.device
    if settings["online"]:
        trainer["max_steps"] = online_steps(job.data.batches().streams)
    if trainer["max_steps"] == 0:
        return
    folder = inputs.cache_root(settings) / "features"
    shape = json.dumps(job.suite.clip.config["model_cfg"], sort_keys=True)
    given = (job.suite.files, shape, folder, device, trainer["max_steps"], ranks(trainer))
    store = precomputed.Store(job.module, job.data, *given)
    precomputed.prepare(store, settings["store"], settings["online"])
    drawn = not (settings["store"] and precomputed.learns_on_features(job.module))
    if settings["images_on_device"] and drawn:
        refuse_too_large(job.data.held(device), device, memory_available(device))
        job.data.on_device = True


def _open_run(words: Sequence[str]) -> tuple[Config, Path, bool]:
    """The configuration, the run folder, and whether it is resumed."""
    resume = [word.removeprefix("resume=") for word in words if word.startswith("resume=")]
    if resume and resume[-1] not in ("", "null"):
        run_dir = Path(os.path.expanduser(resume[-1]))
        rest = [word for word in words if not word.startswith("resume=")]
        if any(word.startswith("run_dir=") for word in rest):
            raise AdamergeError("resume= goes on in the run's own folder: leave run_dir= out")
        return config.load_run(run_dir, rest), run_dir, True
    settings = config.load(words)
    parts = [settings["suite"]["name"], settings["method"]["name"], time.strftime("%Y%m%d-%H%M%S")]
    if "WANDB_SWEEP_ID" in os.environ:  # whose agents may start runs in the same second
        parts.append(os.environ.get("WANDB_RUN_ID", str(os.getpid())))
    given = None if is_main_process() else os.environ.get(_RUN_DIR)
    return (
        settings,
        Path(given or settings["run_dir"] or Path("runs") / "-".join(map(str, parts))),
        False,
    )


def _clear(run_dir: Path, resumed: bool) -> None:
    """Removes what a killed process left in the folder, and before a new run what a run that
    ended before its first checkpoint did.

    Raises:
        AdamergeError: a new run, and the folder holds anything else.
    """
    if not resumed:
        files = [path for path in run_dir.rglob("*") if not path.is_dir()]
        began = (run_dir / "config.yaml").is_file()
        if not all(_is_worthless(path.relative_to(run_dir), began) for path in files):
            raise AdamergeError(
                f"run_dir {run_dir} already holds files: choose another, or go on with that run by "
                f"resume={run_dir}"
            )
        for path in files:
            if path.name in _BEFORE_LEARNING:
                path.unlink()
    for folder in (run_dir, (run_dir / CHECKPOINT).parent):
        clear_left(folder)


# What a run writes before its first checkpoint.
_BEFORE_LEARNING = (
    *("config.yaml", "metrics.csv", "coefficients.png", "readings.png"),
    *(tracking.ID_FILE, *tables.FILES),
)


def _is_worthless(path: Path, began: bool) -> bool:
    """Whether a file of a run's folder is lost without a loss; `began`: a run did begin there."""
    if path.name == LOCK or path.suffix == ".tmp":
        return True
    return began and (str(path) in _BEFORE_LEARNING or path.parts[0] == "wandb")


def _make_folder(run_dir: Path, settings: Config) -> None:
    (run_dir / CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
    config.save(settings, run_dir / "config.yaml")
    os.environ[_RUN_DIR] = str(run_dir)


def _announce(job: Job, run_dir: Path) -> None:
    vectors, settings = job.suite.task_vectors, job.settings
    base = sum(float(t.double().square().sum()) for t in vectors.pretrained.values()) ** 0.5
    log.info(
        "suite %s: %d tasks, %d layers, %.2f M parameters; method %s, protocol %s",
        *(settings["suite"]["name"], len(vectors.tasks), len(vectors.names)),
        *(vectors.numel() / 1e6, settings["method"]["name"], settings["protocol"]),
    )
    for task, norm in zip(vectors.tasks, vectors.norms().tolist(), strict=True):
        count, classes = len(job.data.tasks[task].images), len(job.suite.heads.classes[task])
        said = "  %s: %d images, %d classes, task vector %.3f of the pretrained norm"
        log.info(said, task, count, classes, norm / base)
    for task, unseen in job.unseen[1].tasks.items() if job.unseen is not None else ():
        log.info("  %s: %d images, unseen: only scored", task, len(unseen.images))
    log.info("run folder: %s", run_dir)


def _fit(
    job: Job, run_dir: Path, step: int, wandb: WandbLogger | None, record: dict[str, Any]
) -> tuple[int | None, dict[str, Any]]:
    """Trains from `step` on; returns the signal that stopped it, if one did, and what was kept."""
    settings, every = job.settings, job.settings["log_every"]
    method, checkpoint, stop = job.module.method, run_dir / CHECKPOINT, StopOnSignal(every)

    def measure() -> dict[str, float]:
        tracking.log_pictures(wandb, results.draw_coefficients(job, run_dir))
        accuracy = job.own_scorer(job.module.device).accuracy(method.fold())
        return {f"accuracy/{task}": value for task, value in accuracy.items()}

    watched = functools.cache(lambda: results.watched(job))

    def signals() -> ByTask:
        with untouched(job.module), uncompiled(settings["compile"]):
            found = watched().of(method.fold(), job.heads())
        if not keep.record["signals"]:
            results.advise(job, advice.before, found)
        return found

    checkpoints = Checkpoints(checkpoint, settings["checkpoint_every"], job.fingerprint())
    if not method.has_learnables:
        if is_main_process():
            checkpoints.save_nothing()
        return None, {}
    keep = Keep(
        signals,
        settings["eval_every"] or _interval(job),
        settings["keep"] == "best",
        settings["patience"],
        lambda: stop.received is not None,
        record,
    )
    given = settings["trainer"]
    trainer = build_trainer(
        _in_parts(given) if method.staged else given,
        logger=[tracking.CsvMetrics(run_dir / "metrics.csv", step), *([wandb] if wandb else [])],
        callbacks=[
            keep,
            Progress(),
            Watch(settings["eval_every"], measure),
            stop,
            checkpoints,
            *([Sharding()] if settings["task_vectors"]["shard"] else []),
        ],
        plugins=[CheckpointFiles()],
        log_every_n_steps=every,
        default_root_dir=os.devnull,  # where it looks for SLURM's checkpoints, taking :: for a URL
    )
    if step and (0 <= trainer.max_steps <= step or keep.exhausted):
        log.info("step %d of %d is reached already", step, trainer.max_steps)
        return None, record
    resume = checkpoint if step else None
    with (
        one_sentence(),
        together(trainer, run_dir),
        stop.listening(),
        compiled(method, settings["compile"]),
        recomputing(method, settings["recompute"]),
    ):
        try:
            trainer.fit(job.module, datamodule=job.data, ckpt_path=resume, weights_only=True)
            checkpoints.save(trainer)  # of no steps at all: nothing did it yet
        except SystemExit as end:  # what Lightning makes of a Ctrl-C
            raise end.__context__ or end from None
    return stop.received, keep.record


def _interval(job: Job) -> int:
    """Steps between signals; where steps read stored features, which is far less than encoding
    images, signals are measured at the start and the end alone."""
    steps = job.settings["trainer"]["max_steps"]
    if job.settings["store"] and precomputed.learns_on_features(job.module):
        return max(steps, 1)
    return interval(steps, job.settings["batch_size"])


def _in_parts(trainer: Config) -> Config:
    """Arguments for a run some of whose steps learn a part alone, which DDP wants to be told."""
    if ranks(trainer) == 1 or trainer.get("strategy", "auto") not in ("auto", "ddp"):
        return trainer
    return {**trainer, "strategy": "ddp_find_unused_parameters_true"}
