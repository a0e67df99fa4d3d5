"""The main job: configuration in, run folder with a merged checkpoint out."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import WandbLogger

from adamerge._base.errors import AdamergeError
from adamerge._base.files import LOCK, alone_in, clear_left
from adamerge._base.memory import memory_available
from adamerge.cli import check, results
from adamerge.cli.job import Job, load_job
from adamerge.cli.processes import LostProcess, outlived, together
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.config.device import place, ranks, run_device
from adamerge.config.settings import Config
from adamerge.images.batches import refuse_too_large
from adamerge.learn import precomputed
from adamerge.learn.blocks import compiled, recomputing
from adamerge.learn.callbacks import Checkpoints, Progress, Sharding, StopOnSignal, Watch
from adamerge.learn.resume import CHECKPOINT, CheckpointFiles, check_fingerprint, read_checkpoint
from adamerge.report import tables, tracking
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
    place(settings)
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
    checkpoint = run_dir / CHECKPOINT
    step = 0
    if resumed:
        saved = read_checkpoint(checkpoint)
        check_fingerprint(saved, job.fingerprint(), run_dir)
        step = int(saved["global_step"])
        job.module.load_state_dict(saved["state_dict"])
    if is_main_process():
        _make_folder(run_dir, settings)
        _announce(job, run_dir)
        if not resumed:
            check.before_training(job, run_dir)
            results.look_before(job, run_dir)
    _prepare(job)
    wandb = tracking.wandb_logger(settings["wandb"], run_dir, settings)
    stopped_by = _fit(job, run_dir, checkpoint, step, wandb)
    if not is_main_process():
        return 0
    if stopped_by is None:
        _finish(job, run_dir, wandb)
    else:
        log.info("stopped; go on with: python train.py resume=%s", run_dir)
    tracking.finish(wandb)
    return 0 if stopped_by is None else 128 + stopped_by


def _finish(job: Job, run_dir: Path, wandb: WandbLogger | None) -> None:
    """Scores and exports; whatever stops that, what was learned is in the checkpoint."""
    try:
        results.finish(job, run_dir, wandb)
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
    settings, trainer = job.settings, job.settings["trainer"]
    device = run_device(trainer)
    if settings["online"]:
        trainer["max_steps"] = precomputed.steps_online(job.data)
    steps = trainer["max_steps"] if isinstance(trainer["max_steps"], int) else -1
    if steps == 0:
        return
    folder = inputs.cache_root(settings) / "features"
    shape = json.dumps(job.suite.clip.config["model_cfg"], sort_keys=True)
    made = precomputed.Stores(
        job.module, job.data, job.suite.files, shape, folder, device, steps, ranks(trainer)
    )
    precomputed.prepare(made, settings["store"], settings["online"])
    drawn = not (settings["store"] and precomputed.stores_features(job.module))
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
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{settings['suite']['name']}-{settings['method']['name']}-{stamp}".replace("/", "-")
    given = None if is_main_process() else os.environ.get(_RUN_DIR)
    return settings, Path(str(given or settings["run_dir"] or Path("runs") / name)), False


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
    *("config.yaml", "metrics.csv", "coefficients.png", tracking.ID_FILE, results.SIGNS),
    *tables.FILES,
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
        settings["suite"]["name"],
        len(vectors.tasks),
        len(vectors.names),
        vectors.numel() / 1e6,
        settings["method"]["name"],
        settings["protocol"],
    )
    for task, norm in zip(vectors.tasks, vectors.norms().tolist(), strict=True):
        log.info(
            "  %s: %d images, %d classes, task vector %.3f of the pretrained norm",
            task,
            len(job.data.tasks[task].images),
            len(job.suite.heads.classes[task]),
            norm / base,
        )
    for task, found in job.unseen[1].tasks.items() if job.unseen is not None else ():
        log.info("  %s: %d images, unseen: only scored", task, len(found.images))
    log.info("run folder: %s", run_dir)


def _fit(
    job: Job, run_dir: Path, checkpoint: Path, step: int, wandb: WandbLogger | None
) -> int | None:
    """Trains from `step` on; returns the signal that stopped it, if one did."""
    settings, every = job.settings, job.settings["log_every"]
    stop = StopOnSignal(every)

    def look(_: int) -> dict[str, float]:
        tracking.log_pictures(wandb, results.draw_coefficients(job, run_dir))
        found = job.own_scorer(job.module.device).accuracy(job.module.method.fold())
        return {f"accuracy/{task}": value for task, value in found.items()}

    checkpoints = Checkpoints(checkpoint, settings["checkpoint_every"], job.fingerprint())
    trainer = _trainer(
        settings,
        logger=[tracking.CsvMetrics(run_dir / "metrics.csv", step), *([wandb] if wandb else [])],
        callbacks=[
            Progress(every),
            Watch(settings["eval_every"], look),
            stop,
            checkpoints,
            *([Sharding()] if settings["task_vectors"]["shard"] else []),
        ],
        plugins=[CheckpointFiles()],
        log_every_n_steps=every,
        default_root_dir=run_dir,
    )
    if step and 0 <= trainer.max_steps <= step:
        log.info("step %d of %d is reached already", step, trainer.max_steps)
        return None
    resume = checkpoint if step else None
    method = job.module.method
    with (
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
    return stop.received


def _trainer(settings: Config, **ours: Any) -> Trainer:
    """Lightning's Trainer; what it refuses is a mistake in `trainer:`."""
    try:
        return Trainer(
            **settings["trainer"],
            **ours,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise AdamergeError(f"trainer: {reason}") from error
