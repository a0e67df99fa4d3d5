"""A run from a cold start to the exported folder, by phase.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000 \
        python benchmarks/end_to_end.py --steps 100

Every repeat starts two processes of `train`, one after the other, with one new cache folder: the
first finds it empty (cold), the second full (warm). Clocks stand around the product's own
functions, and a phase within another counts only once, so the phases add up to the whole. Words
`key=value` are settings of the runs. Python's byte code and the files themselves have been read
before by the system; what starts cold is the process and adamerge's cache.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

PHASES = {
    "import": "Python, torch, lightning, open_clip, datasets",
    "read": "pretrained, experts, task vectors, heads",
    "images": "data sets opened; cache made, or found",
    "build": "method and objective",
    "before": "pre-flight",
    "train": "trainer started, all steps, checkpoints, logs",
    "fold": "every fold, of the signs too",
    "evaluate": "the method's accuracies and the baselines'",
    "signs": "label-free signs, before and after",
    "export": "folder written, read back and compared",
    "rest": "settings, folders, pictures, tables",
}


class Clocks:
    """Seconds per phase, `[wall, CPU]`; the innermost phase under way gets them."""

    def __init__(self) -> None:
        self.seconds = {phase: [0.0, 0.0] for phase in PHASES}
        self.steps: list[tuple[float, float]] = []
        self._open, self._last = ["rest"], self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Wall seconds, and CPU seconds of this process since it was started."""
        return time.time(), time.process_time()

    def turn(self) -> None:
        """Gives what passed since the last turn to the innermost phase."""
        now = self.now()
        for kind in (0, 1):
            self.seconds[self._open[-1]][kind] += now[kind] - self._last[kind]
        self._last = now

    def around(self, owner: Any, name: str, phase: str) -> None:
        """Puts a clock around a function of a module or class."""
        inner: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(inner)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            self.turn()
            self._open.append(phase)
            try:
                return inner(*args, **kwargs)
            finally:
                self.turn()
                self._open.pop()

        setattr(owner, name, clocked)

    def note_steps(self, module: Any) -> None:
        """Notes when each training step begins."""
        inner = module.training_step

        @functools.wraps(inner)
        def noted(*args: Any) -> Any:
            self.steps.append(self.now())
            return inner(*args)

        module.training_step = noted


def measure(words: list[str], started: float) -> dict[str, Any]:
    """One run within this process; seconds per phase, and per step after the first."""
    from adamerge.cli import check, results, train
    from adamerge.config import build, inputs
    from adamerge.learn.adaptation import Adaptation

    clocks = Clocks()
    wall, cpu = clocks.now()
    clocks.seconds["import"] = [wall - started, cpu]
    for owner, name, phase in (
        (inputs, "load_suite", "read"),
        (inputs, "load_data", "images"),
        (build, "build_method", "build"),
        (build, "build_adaptation", "build"),
        (check, "before_training", "before"),
        (results, "_signals", "signs"),
        (train, "_fit", "train"),
        (results, "score", "evaluate"),
        (results, "export_merged", "export"),
    ):
        clocks.around(owner, name, phase)
    load_job = train.load_job

    def load_and_clock(settings: Any) -> Any:
        job = load_job(settings)
        clocks.around(type(job.module.method), "fold", "fold")
        return job

    train.load_job = load_and_clock
    clocks.note_steps(Adaptation)
    status = train.train(words)
    clocks.turn()
    assert status == 0
    first, last, count = clocks.steps[0], clocks.steps[-1], max(len(clocks.steps) - 1, 1)
    step = [(last[kind] - first[kind]) / count for kind in (0, 1)]
    first_step = [first[0] - started, first[1]]
    return {"phases": clocks.seconds, "step": step, "before the first step": first_step}


def repeat(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """A cold and a warm run, each in a process of its own, with a cache of their own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("cold", "warm"):
            words = [
                *(f"suite={arguments.suite}", f"trainer.max_steps={arguments.steps}"),
                *("wandb=off", *arguments.settings),
                *(f"cache_dir={folder}/cache", f"run_dir={folder}/{kind}"),
            ]
            command = [sys.executable, __file__, "--measure", str(time.time()), *words]
            answer = subprocess.run(command, capture_output=True, text=True, env=environment())
            if answer.returncode:
                raise SystemExit(f"{' '.join(command)}\n{answer.stderr[-3000:]}")
            found[kind] = json.loads(answer.stdout.splitlines()[-1])
    return found


def environment() -> dict[str, str]:
    """This process's, with the package found where it is found here."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def median(runs: list[dict[str, dict[str, Any]]], kind: str, *keys: str) -> list[float]:
    """Wall and CPU seconds of a phase, medians over the repeats."""
    values = [functools.reduce(lambda d, key: d[key], keys, run[kind]) for run in runs]
    return [statistics.median(value[i] for value in values) for i in (0, 1)]


def report(arguments: argparse.Namespace, runs: list[dict[str, dict[str, Any]]]) -> str:
    """The table, in Markdown."""
    import torch

    lines = [
        "# From a cold start to an exported folder",
        "",
        f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} thread(s), suite {arguments.suite}, {arguments.steps} steps; "
        f"medians of {len(runs)} repeats, in seconds: wall / CPU.",
        "",
        f"    python benchmarks/end_to_end.py {' '.join(sys.argv[1:])}".rstrip(),
        "",
        "| phase | cold cache | warm cache | |",
        "|---|--:|--:|---|",
    ]
    rows = [(phase, ("phases", phase), said) for phase, said in PHASES.items()]
    rows += [("a step", ("step",), "from one step's beginning to the next, mean over the run")]
    rows += [("until the first step", ("before the first step",), "from the launch on")]
    for name, keys, said in rows:
        digits = 4 if name == "a step" else 2
        found = [median(runs, kind, *keys) for kind in ("cold", "warm")]
        cells = [f"{wall:.{digits}f} / {cpu:.{digits}f}" for wall, cpu in found]
        lines.append(f"| {name} | {' | '.join(cells)} | {said} |")
    totals = []
    for kind in ("cold", "warm"):
        sums = [
            [sum(seconds[i] for seconds in run[kind]["phases"].values()) for i in (0, 1)]
            for run in runs
        ]
        totals.append(" / ".join(f"{statistics.median(s[i] for s in sums):.2f}" for i in (0, 1)))
    lines.append(f"| **in all** | {' | '.join(totals)} | median of the sums |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        import warnings

        warnings.filterwarnings("ignore")
        print(json.dumps(measure(sys.argv[3:], float(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", default="demo")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    runs = [repeat(arguments) for _ in range(arguments.repeats)]
    text = report(arguments, runs)
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
