"""The pre-flight of a run: before training, and as `adamerge check`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.seed import isolate_rng

from adamerge._base.kept import Kept
from adamerge.cli.job import Job, load_job
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.config.trainer import check_place, ranks
from adamerge.encoders.architectures import is_known
from adamerge.encoders.clip import with_other_activation
from adamerge.encoders.tower import Tower
from adamerge.learn.blocks import recomputing
from adamerge.report import findings, preflight, tables
from adamerge.report.estimate import Estimate, estimate
from adamerge.report.findings import Finding
from adamerge.report.preflight import Images, Matrix

log = logging.getLogger("adamerge")


def check(words: Sequence[str], to: Path | None = None) -> int:
    """Looks at everything that settings name and prints what it found (`adamerge check`).

    Args:
        to: a folder for `preflight.json` and `preflight.md`.

    Returns:
        The exit status: 1 with a problem, 0 otherwise, warnings or not.
    """
    settings = config.load(words)
    build.check(settings)
    check_place(settings)
    seed_everything(settings["seed"], verbose=False)
    report = report_of(load_job(settings))
    if to is not None:
        tables.write(report, to)
    print(tables.as_markdown(report), end="")
    return 1 if tables.problems(report) else 0


def before_training(job: Job, run_dir: Path) -> None:
    """Pre-flight of a run, unless `preflight.enabled` is off; problems are logged, never raised.

    Random state, parameters and modes of the job are as before.
    """
    if not job.settings["preflight"]["enabled"]:
        log.info("preflight=off: nothing is looked for, and no advice is given")
        return
    report = report_of(job)
    tables.write(report, run_dir)
    log.info("%s (%s)", tables.summary(report), run_dir / tables.FILES[1])
    for finding in report["findings"]:
        log.warning("%s: %s", finding["severity"], finding["text"])
    if report["estimate"] is not None:
        log.info("%s", Estimate(**report["estimate"]).text())


def report_of(job: Job) -> dict[str, Any]:
    """All measurements of a job on a few unlabeled images per task, and what they say."""
    settings, suite = job.settings, job.suite
    device, normalizer = job.device, job.normalizer
    images = preflight.choose(job.data, settings["preflight"]["images"])
    vectors, files = suite.task_vectors, {n: file["path"] for n, file in suite.files.items()}
    kept = job.kept("preflight")("gram", lambda: preflight.gram(vectors).tolist())
    products = torch.tensor(kept, dtype=torch.float64)
    norms, cosines = products[0].diagonal().sqrt(), preflight.cosines(products[0, 1:, 1:])
    kept = job.kept("preflight", preflight.key(images, suite.heads, normalizer, device))
    models = (Tower(suite.clip.backbone), vectors, suite.heads, normalizer)
    with isolate_rng():
        matrix = Matrix(**kept("solving", lambda: preflight.measure(*models, images, device)))
        doubts = list(_of_activation(job, images, matrix, device, kept))
        learns = job.module.method.has_learnables
        cost = _estimate(job, images, device) if learns else None
    model = {
        "layers": len(vectors.names),
        "parameters": vectors.numel(),
        "dtype": str(vectors.pretrained[vectors.names[0]].dtype).removeprefix("torch."),
        "promoted": vectors.promoted,
    }
    of_one_start, start = settings["suite"].get("align") is None, "not-below-pretrained"
    moved = {task for task, norm in zip(vectors.tasks, norms[1:], strict=True) if norm > 0}
    experts = findings.of_experts(matrix, files)  # the reference of aligned ones is the start
    bases = (vectors.tasks, norms[1:] / norms[0], preflight.likeness(products))
    all_findings = [
        *(findings.of_bases(*bases) if of_one_start else ()),
        *findings.of_directions(vectors.tasks, cosines),
        *findings.of_heads(suite.heads),
        *(one for one in experts if one.kind != start or moved & {*one.tasks}),
        *doubts,
        *(findings.of_lengths(vectors.tasks, norms[1:]) if of_one_start else ()),
        *(findings.of_memory(cost) if learns else ()),
    ]
    counts = {task: len(pixels) for task, pixels in images.pixels.items()}
    name = settings["suite"]["name"]
    return tables.as_json(name, counts, model, suite.files, products, matrix, all_findings, cost)


def _of_activation(
    job: Job, images: Images, matrix: Matrix, device: torch.device, kept: Kept
) -> Iterator[Finding]:
    suite = job.suite
    other = with_other_activation(suite.clip.backbone)
    if other is None:
        return
    given = (other, suite.task_vectors, suite.heads, job.normalizer, images, matrix, device)
    change = kept("activation", lambda: preflight.activation_change(*given))
    yield from findings.of_activation(torch.tensor(change, dtype=torch.float64), _mend(job))


def _mend(job: Job) -> str:
    """What to set for the other activation: an open_clip name, or the flag of the config."""
    model: dict[str, Any] = job.suite.clip.config["model_cfg"]
    suite = job.settings["suite"]
    name = str(suite.get("architecture") or suite.get("pretrained"))
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
