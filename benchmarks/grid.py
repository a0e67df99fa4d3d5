"""A grid of runs by `adamerge compare`, killed twice, against the same runs one by one.

    python benchmarks/grid.py --out benchmarks/results/grid.md

The grid is four methods, two objectives and three seeds on the demo suite, two runs at a time; what
does not fit is left out by `compare` itself. Its processes are killed (SIGKILL, all at once) after
a third and after two thirds of the runs, and the same command goes on. One by one is `train.py` for
every run of it, as whoever does not know `compare` would: on all cores, with one cache for all.
Both begin with an empty cache. Merging coefficients, exported weights and results of every run must
be equal to the bit; with another number of threads a sum may be another, so that one by one is
timed on all cores and compared with one thread a run, as the grid's runs have.

CPU seconds are of all processes, the killed ones included. Settings after the options replace or
join those of the grid: `seed=0 trainer.max_steps=2` makes it short.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from adamerge.cli.compare import Cell, cells_of
from adamerge.config.grid import left_static, read_grid
from adamerge.report.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
GRID = {
    "suite": "demo",
    "method": "layer_wise,wemoe,surgery,tsv_m",
    "objective": "entropy,expert_kl",
    "seed": "0,1,2",
}
Seconds = tuple[float, float]  # of the wall clock, and of the CPU
PACKAGES = ("torch", "lightning", "open_clip_torch", "wandb")


def adamerge(
    words: Sequence[str], threads: int | None, log: Path, enough: Callable[[], bool] = lambda: False
) -> Seconds:
    """`adamerge` with these words; it and all of its processes are killed as soon as it is enough.

    Args:
        threads: of a process; None: one per core.
    """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    begun, spent = time.monotonic(), cpu_seconds()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "adamerge.cli", *words],
            **{"env": environment, "stdout": file, "stderr": file, "start_new_session": True},
        )
    killed = False
    try:
        while process.poll() is None and not (killed := enough()):
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with contextlib.suppress(ChildProcessError):
            while True:  # processes that it started and left
                os.waitpid(-1, 0)
    if process.returncode and not killed:
        raise SystemExit(log.read_text()[-3000:])
    found = time.monotonic() - begun, cpu_seconds() - spent
    print(f"{found[0]:.1f} s, {found[1]:.1f} CPU s: {' '.join(words)[:99]}", file=sys.stderr)
    return found


def cpu_seconds() -> float:
    """Of all processes that this one has waited for, and of those that these have waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def one_by_one(cells: Sequence[Cell], folder: Path, threads: int | None) -> list[Seconds]:
    """What every run takes."""
    folder.mkdir()
    found = []
    for cell in cells:
        own = [f"run_dir={folder / cell.folder.name}", f"cache_dir={folder}/cache"]
        found.append(adamerge(["train", *cell.words, *own], threads, folder / "log.txt"))
    return found


def killed_and_resumed(words: Sequence[str], folder: Path, kills: Sequence[int]) -> list[Seconds]:
    """What every call takes: those that are killed after so many runs, and the last one."""
    folder.mkdir()
    command = ["compare", *words, f"to={folder / 'grid'}", f"cache_dir={folder}/cache"]

    def ended() -> int:
        return len([*folder.glob("grid/*/results.json")])

    calls = [
        adamerge(command, None, folder / "log.txt", lambda after=after: ended() >= after)
        for after in kills
    ]
    return [*calls, adamerge(command, None, folder / "log.txt")]


def unequal(one: Path, other: Path) -> list[str]:
    """What differs between two run folders: merging coefficients, exported weights, results."""
    names = [path.relative_to(one) for path in one.glob("merged/**/*.safetensors")]
    names += [Path(name) for name in ("coefficients.csv", "results.json") if (one / name).exists()]
    assert len(names) > 2
    return [str(name) for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--skip-all-cores", action="store_true", help="time one thread a run alone")
    parser.add_argument("--note", default="", help="a sentence on what else the machine did")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    given = parser.parse_args()
    asked = GRID | {key: value for key, _, value in (w.partition("=") for w in given.settings)}
    shared = [f"{key}={value}" for key, value in asked.items()]
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cells = cells_of(left_static(read_grid(shared))[0], folder / "grid" / "grid")
        fit = [cell for cell in cells if not cell.failed]
        kills = [len(fit) // 3, 2 * len(fit) // 3]
        adamerge(["train", "--help"], None, folder / "log.txt")  # files are read once before
        calls = killed_and_resumed([*shared, f"jobs={given.jobs}"], folder / "grid", kills)
        times = {} if given.skip_all_cores else {cores: one_by_one(fit, folder / "all", None)}
        times[1] = one_by_one(fit, folder / "one", 1)
        pairs = [(cell, unequal(folder / "one" / cell.folder.name, cell.folder)) for cell in fit]
    total = [sum(column) for column in zip(*calls, strict=True)]
    rows = []
    for threads, seconds in times.items():
        wall, cpu = (sum(column) for column in zip(*seconds, strict=True))
        label = f"one by one, threads of a run: {threads}"
        rows.append([label, f"{wall:.0f}", f"{total[0] / wall:.2f}", f"{cpu:.0f}"])
    label = f"`compare`, jobs={given.jobs}, in {len(calls)} calls"
    rows.append([label, f"{total[0]:.0f}", "1", f"{total[1]:.0f}"])
    means: dict[str, list[list[float]]] = defaultdict(list)
    for index, cell in enumerate(fit):
        recipe = cell.folder.name.partition("-seed")[0]
        means[recipe].append([value for seconds in times.values() for value in seconds[index]])
    per_run = [
        [recipe, *(f"{sum(column) / len(column):.1f}" for column in zip(*found, strict=True))]
        for recipe, found in means.items()
    ]
    titles = [f"{kind}, threads: {n}" for n in times for kind in ("wall s", "CPU s")]
    differing = {cell.folder.name: found for cell, found in pairs if found}
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    lines = [
        "# A grid of runs, against the same runs one by one",
        "",
        f"{date.today()}, Python {platform.python_version()}, {versions}; {cores} cores, load "
        f"{load:.1f} at the start. {given.note}".rstrip(),
        "",
        f"    python benchmarks/grid.py {shlex.join(sys.argv[1:])}",
        "",
        f"{len(fit)} runs of `adamerge compare {' '.join(shared)} jobs={given.jobs}`, killed after "
        f"{kills[0]} and after {kills[1]} of them; {len(cells) - len(fit)} pairs do not fit.",
        "",
        *markdown(["", "wall s", "the grid ÷ it", "CPU s"], rows),
        "",
        f"Equal to the bit (coefficients, exported weights, results): {len(fit) - len(differing)} "
        f"of {len(fit)} runs." + (f" Not equal: {json.dumps(differing)}" if differing else ""),
        "",
        "A run, one by one, mean over seeds:",
        "",
        *markdown(["", *titles], per_run),
        "",
    ]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join(lines))
    raise SystemExit(1 if differing else 0)


if __name__ == "__main__":
    # Processes that a killed one leaves become ours, and with them what they have used.
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER of Linux
    main()
