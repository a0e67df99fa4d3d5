"""Time from a cold start until the accuracy that AdaMerging reaches after its published 1000 steps.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000 \
        python benchmarks/time_to_accuracy.py --out benchmarks/results/time_to_accuracy.md

The target is where the package `fusion-bench` ends: its own layer-wise AdaMerging, class, loop and
settings (1000 steps of Adam at 1e-3, 16 images per task). Ours is `train`, as a user starts it:
`method=fast`, the suite's defaults, and the settings of those 1000 steps. Every side is a process
of its own with an empty cache, one after the other, and gets the same tower, experts, images and
heads. Each is looked at every few steps with the clock stopped, up to the
first look at or above the target.

Counted: Python's start, all imports, checkpoints, heads, images and task vectors; ours also its
pre-flight, its transform, the experts' predictions, logs and checkpoints. Theirs reads its inputs
by our code and is spared its own reading, image processor and saving. Not counted: baselines,
final scores and the export.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

THEIRS = "fusion-bench, 1000 steps"
SIDES = {
    THEIRS: [],
    "adamerge, method=fast": ["method=fast"],
    "adamerge, the suite's defaults": [],
    "adamerge, the same settings": [
        *("optim.lr=1e-3", "trainer.max_steps=1000", "scheduler=null"),
    ],
}
PACKAGES = ("fusion-bench", "torch", "lightning", "open_clip_torch", "transformers")


class Reached(Exception):
    """The target is: nothing more is to be done."""


class Clock:
    """Seconds since the process was started, `[wall, CPU]`, without those of looks.

    Args:
        started: the wall time of the start.
        every: steps between looks.
        target: the average accuracy at which to stop.
    """

    def __init__(self, started: float, every: int, target: float) -> None:
        self.started, self.every, self.target = started, every, target
        self.aside = [0.0, 0.0]

    def now(self) -> list[float]:
        found = [time.time() - self.started, time.process_time()]
        return [value - aside for value, aside in zip(found, self.aside, strict=True)]

    def look(self, step: int, accuracies: Callable[[], dict[str, float]]) -> None:
        """Prints a row after every so many steps; raises Reached at the target."""
        if step % self.every:
            return
        now = self.now()
        accuracy = accuracies()
        average = sum(accuracy.values()) / len(accuracy)
        print("ROW", json.dumps([step, *now, average, accuracy]), flush=True)
        for kind, value in enumerate(self.now()):
            self.aside[kind] += value - now[kind]
        if average >= self.target:
            raise Reached


def ours(words: list[str], clock: Clock) -> None:
    """A run of `train`, looked at where it would log accuracies."""
    from lightning.pytorch import Callback

    from adamerge.cli import train

    load_job = train.load_job

    def load_and_look(settings: Any) -> Any:
        job = load_job(settings)

        class Looks(Callback):
            def __init__(self, *_: object) -> None:
                pass

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                def accuracies() -> dict[str, float]:
                    return job.own_scorer(job.module.device).accuracy(job.module.method.fold())

                clock.look(trainer.global_step, accuracies)

        setattr(train, "Watch", Looks)  # noqa: B010
        return job

    setattr(train, "load_job", load_and_look)  # noqa: B010
    setattr(train, "_finish", lambda *_: None)  # noqa: B010
    train.train(words)


def theirs(words: list[str], clock: Clock) -> None:
    """Their class and loop on our tower, with the suite's experts, images and heads."""
    import torch
    from omegaconf import DictConfig
    from peers_theirs import ADAMERGING, LayerWise, Marks, quietly
    from torch import nn

    from adamerge.config import build, inputs, settings
    from adamerge.encoders.tower import Tower, static_encoder

    config = settings.load(words)
    build.check(config)
    known = inputs.load(config)
    vectors, heads, device = known.suite.task_vectors, known.suite.heads, torch.device("cpu")
    tower, scorer = Tower(known.suite.clip.backbone), known.scorer(device)

    class Vision(nn.Module):
        """Called as a tower of transformers is."""

        def __init__(self, task: str | None) -> None:
            super().__init__()
            self.backbone = static_encoder(tower, vectors, task).backbone.requires_grad_(True)

        def forward(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
            return None, self.backbone(images)

    class Pool:
        model_names = vectors.tasks

        def load_model(self, name: str) -> nn.Module:
            return Vision(None if name == "_pretrained_" else name)

    class Looking(Marks):
        def log_dict(self, metrics: Any, step: int | None = None) -> None:
            assert step is not None

            def accuracies() -> dict[str, float]:
                with torch.no_grad():
                    return scorer.accuracy(Merged())

            clock.look(step + 1, accuracies)

    class Merged(nn.Module):
        def forward(self, images: torch.Tensor, task_ids: torch.Tensor) -> torch.Tensor:
            features = module(images)[1]
            assert isinstance(features, torch.Tensor)
            return features

    class Run(LayerWise):
        def get_shuffled_test_loader_iter(self, task: str) -> Iterator[tuple[Any, None]]:
            return streams[task]

    def batches(stream: Any) -> Iterator[tuple[Any, None]]:
        images = known.data.tasks[stream.task].images
        for step in itertools.count():
            yield known.normalizer(torch.from_numpy(images[stream.batch(step)])), None

    streams = {stream.task: batches(stream) for stream in known.data.batches().streams}
    algorithm: Any = Run(DictConfig({**ADAMERGING, "max_steps": 1000}))
    algorithm.modelpool = Pool()
    algorithm._fabric_instance = algorithm._fabric = Looking(device, False)
    algorithm.visual_projection, algorithm.logit_scale_exp = nn.Identity(), torch.ones(())
    algorithm.zeroshot_weights = {task: heads.weight(task) for task in vectors.tasks}
    module = quietly(lambda: algorithm.construct_layer_wise_merged_model(algorithm.modelpool))
    out = sys.stdout
    setattr(clock, "look", _heard(clock.look, out))  # noqa: B010
    quietly(lambda: algorithm.test_time_adaptation(module))


def _heard(look: Callable[..., None], out: Any) -> Callable[..., None]:
    """A look that prints although what is around it is silenced."""

    def heard(*given: Any) -> None:
        with contextlib.redirect_stdout(out):
            look(*given)

    return heard


def measure(side: str, every: int, target: float, words: list[str]) -> list[list[Any]]:
    """The rows of a side, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "wandb=off", f"cache_dir={folder}/cache", f"run_dir={folder}/run"]
        options = ["--measure", side, str(time.time()), str(every), str(target), *words]
        root = str(Path(__file__).resolve().parent.parent)
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, __file__, *options],
            **{"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": paths}},
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(options)}\n{done.stderr[-3000:]}")
    return [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]


def table(suite: str, every: int, steps: int, settings: list[str]) -> str:
    """All sides on one suite."""
    found: dict[str, list[list[Any]]] = {}
    target = 2.0
    lines = ["| | steps | wall s | CPU s | fusion-bench ÷ it (CPU) | accuracy there | by task |"]
    lines += ["|---|--:|--:|--:|--:|--:|---|"]
    for side, words in SIDES.items():
        look = every if side == THEIRS or "same" in side else max(every // 10, 1)
        rows = measure(side, look, target, [f"suite={suite}", *words, *settings])
        if side == THEIRS:
            target = rows[-1][3]
            rows = rows[: next(i for i, row in enumerate(rows) if row[3] >= target) + 1]
        found[side] = rows
        step, wall, cpu, average, accuracy = rows[-1]
        ratio = f"{found[THEIRS][-1][2] / cpu:.1f} ×"
        tasks = ", ".join(f"{task} {100 * value:.1f}" for task, value in accuracy.items())
        reached = "" if average >= target else " (never: its last)"
        lines.append(
            f"| {side} | {step}{reached} | {wall:.1f} | {cpu:.1f} | {ratio} | {100 * average:.2f} "
            f"| {tasks} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    goal = f"Suite {Path(suite).stem}: to {100 * target:.2f} %, where fusion-bench ends."
    return "\n".join([goal, "", *lines])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        warnings.filterwarnings("ignore")
        side, started, every, target, *words = sys.argv[2:]
        clock = Clock(float(started), int(every), float(target))
        with contextlib.suppress(Reached):
            (theirs if side == THEIRS else ours)(words, clock)
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suites", nargs="+", default=["demo"])
    parser.add_argument("--every", type=int, default=50, help="steps between looks; fast: a tenth")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    parts = [
        f"# Time to accuracy\n\n{date.today()}, {versions}, Python {platform.python_version()}, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} thread(s).\n\n    python "
        f"benchmarks/time_to_accuracy.py {' '.join(sys.argv[1:])}\n\nWhat is measured: see the top "
        "of `benchmarks/time_to_accuracy.py`."
    ]
    for suite in arguments.suites:
        parts.append(table(suite, arguments.every, 1000, arguments.settings))
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
