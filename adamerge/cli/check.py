"""The pre-flight of a run: before training, and as `adamerge check`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from adamerge._base.kept import Kept
from adamerge.cli.job import Job, load_job
from adamerge.config import build, inputs
from adamerge.config import settings as config
from adamerge.config.device import place, ranks, run_device
from adamerge.encoders.architectures import is_known
from adamerge.encoders.clip import with_other_activation
from adamerge.encoders.tower import Tower
from adamerge.learn.blocks import recomputing
from adamerge.report import accuracy_matrix, preflight, tables
from adamerge.report.accuracy_matrix import Solving
from adamerge.report.estimate import Estimate, estimate, of_memory
from adamerge.report.findings import Finding, of_activation, of_bases, of_directions, of_lengths
from adamerge.report.preflight import Images
from adamerge.report.tables import Report

log = logging.getLogger("adamerge")

_FOR_ACTIVATION = 16  # images per task for which the other activation is tried


def check(words: Sequence[str], to: Path | None = None) -> int:
    """Looks at everything that settings name and prints what it found (`adamerge check`).

    Args:
        to: a folder for `preflight.json` and `preflight.md`.

    Returns:
        The exit status: 1 with a problem, 0 otherwise, warnings or not.
    """
    settings = config.load(words)
    build.check(settings)
    place(settings)
    seed_everything(settings["seed"], verbose=False)
    report = look(load_job(settings), log.info)
    if to is not None:
        tables.write(report, to)
    print(tables.as_markdown(report), end="")
    return 1 if report.problems else 0


def before_training(job: Job, run_dir: Path) -> None:
    """Pre-flight of a run, unless `preflight.enabled` is off; problems are logged, never raised.

    Random state, parameters and modes of the job are as before.
    """
    if not job.settings["preflight"]["enabled"]:
        return
    report = look(job, log.info)
    tables.write(report, run_dir)
    log.info("%s (%s)", report.summary(), run_dir / tables.FILES[1])
    for finding in report.findings:
        log.warning("%s: %s", finding.severity, finding.text)
    if report.estimate is not None:
        log.info("%s", report.estimate.text())


def look(job: Job, say: Callable[[str], None] = lambda _: None) -> Report:
    """All measurements and verdicts of a job, on a few unlabeled images per task."""
    settings, suite = job.settings, job.suite
    device = run_device(settings["trainer"])
    images = preflight.choose(job.data, settings["preflight"]["images"], settings["seed"])
    vectors, files = suite.task_vectors, preflight.sources(suite.files)
    products = torch.tensor(
        job.kept("preflight")("products", lambda: preflight.gram(vectors).tolist()),
        dtype=torch.float64,
    )
    cosines, norms = preflight.cosines(products), products.diagonal().sqrt()
    normalizer = inputs.normalizer(suite.clip)
    kept = job.kept("preflight", preflight.key(images, suite.heads, normalizer, device))

    def measure() -> dict[str, Any]:
        tower = Tower(suite.clip.backbone)
        given = (suite.heads, normalizer, images, device, say)
        return preflight.measure(tower, vectors, *given).as_lists()

    with isolate_rng():
        solved = Solving.from_lists(kept("solving", measure))
        doubts = list(_of_activation(job, images, solved, device, kept))
        cost = _estimate(job, images, device) if job.module.method.learns else None
    squares = [float(tensor.double().square().sum()) for tensor in vectors.pretrained.values()]
    length = sum(squares) ** 0.5
    findings = [
        *of_bases(vectors.tasks, norms / length, preflight.likeness(vectors)),
        *of_directions(vectors.tasks, cosines),
        *accuracy_matrix.findings(solved, files),
        *doubts,
        *of_lengths(vectors.tasks, norms),
        *(of_memory(cost) if job.module.method.learns else ()),
    ]
    return Report(
        suite=settings["suite"]["name"],
        images={task: len(pixels) for task, pixels in images.pixels.items()},
        model={
            "layers": len(vectors.names),
            "parameters": vectors.numel(),
            "dtype": str(vectors.pretrained[vectors.names[0]].dtype).removeprefix("torch."),
            "promoted": vectors.promoted,
        },
        files=suite.files,
        norms=norms,
        pretrained_norm=length,
        cosines=cosines,
        solving=solved,
        findings=sorted(findings, key=lambda finding: finding.severity != "problem"),
        estimate=cost,
    )


def _of_activation(
    job: Job, images: Images, own: Solving, device: torch.device, kept: Kept
) -> Iterator[Finding]:
    suite = job.suite
    other = with_other_activation(suite.clip.backbone)
    if other is None:
        return
    few, normalizer = images.first(_FOR_ACTIVATION), inputs.normalizer(suite.clip)
    given = (other, suite.task_vectors, suite.heads, normalizer, few, own, device)
    change = kept("activation", lambda: preflight.activation_change(*given).tolist())
    yield from of_activation(torch.tensor(change, dtype=torch.float64), _mend(job))


def _mend(job: Job) -> str:
    """What to set for the other activation: an open_clip name, or the flag of the config."""
    model: dict[str, Any] = job.suite.clip.config["model_cfg"]
    suite = job.settings["suite"]
    name = str(suite.get("architecture") or suite["pretrained"])
    if not is_known(name):
        other = "false" if model.get("quick_gelu") else "true"
        return f"set model_cfg.quick_gelu to {other} in the model config at {name}"
    other = name.removesuffix("-quickgelu") + ("" if model.get("quick_gelu") else "-quickgelu")
    return f"set suite.architecture to {other}"


def _estimate(job: Job, images: Images, device: torch.device) -> Estimate | None:
    trainer = job.settings["trainer"]
    steps = trainer.get("max_steps")
    with recomputing(job.module.method, job.settings["recompute"]):
        cost = estimate(
            job.module,
            images.pixels,
            job.settings["batch_size"],
            steps if isinstance(steps, int) and steps > 0 else None,
            str(trainer.get("precision")),
            device,
            job.settings["store"],
        )
    if cost is None or not job.settings["task_vectors"]["shard"]:
        return cost
    layers = job.suite.task_vectors.layers.values()  # as yet whole, in a file
    own = sum(layer.nbytes for layer in layers) // (ranks(trainer) or 1)
    return dataclasses.replace(cost, memory=cost.memory + own)
