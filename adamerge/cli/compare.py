"""`adamerge compare`: a grid of settings, a run for every cell of it, one report of them all.

Every cell is an ordinary run folder. Cells that have ended are kept, cells that were stopped go on,
so the same command finishes what was begun. Processes are forked from one that has imported
everything, and share one cache: images, heads, features of experts and scores of baselines are made
once.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from adamerge._base.errors import AdamergeError
from adamerge._base.files import alone_in
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.config.grid import Recipe, folder_names, left_static, read_grid
from adamerge.config.settings import Config
from adamerge.learn.resume import CHECKPOINT
from adamerge.report.comparison.page import write_report
from adamerge.report.comparison.runs import Run, differing, essential, flat, read_run

log = logging.getLogger("adamerge")

Command = Callable[[Sequence[str]], int]


@dataclass
class Cell:
    """One run of a grid.

    Attributes:
        words: its settings, as `train.py` takes them, without `run_dir`.
        folder: of its run.
        settings: what the words resolve to, without `run_dir`.
        base: the cell whose merge it goes on from; None where there is none.
        failed: why it has no result; empty while it may have one.
    """

    words: list[str]
    folder: Path
    settings: Config = field(default_factory=dict)
    base: Cell | None = None
    failed: str = ""

    @property
    def done(self) -> bool:
        return all((self.folder / name).is_file() for name in ("results.json", "merged/merge.json"))

    def record(self) -> Run:
        """What the report says of it."""
        if self.done:
            return read_run(self.folder)
        failed = self.failed or "stopped before it ended; the same command goes on with it"
        return Run(self.folder, flat(self.settings), failed=failed)


def compare(words: Sequence[str], command: Command) -> int:
    """Runs a grid and writes `report.html`, `report.md` and `report.csv`; returns the status.

    Args:
        words: settings, of which values with commas make the grid; or the path of a grid's YAML
            first; and `jobs=`, processes at a time, and `to=`, the folder of it all.
        command: runs `["train", …]` in a process of its own and returns its status.

    Raises:
        AdamergeError: the grid cannot be read, or the folder holds runs of other settings.
    """
    options, rest = options_of(words, {"jobs": "1", "to": ""})
    jobs = positive("jobs", options["jobs"])
    grid, said = left_static(read_grid(rest))
    if said:
        log.warning("%s", said)
    folder = Path(os.path.expanduser(options["to"] or f"compare/{time.strftime('%Y%m%d-%H%M%S')}"))
    again = "adamerge compare " + " ".join(shlex.quote(w) for w in [*rest, f"to={folder}"])
    with alone_in(folder):
        cells = cells_of(grid, folder)
        try:
            run_all(cells, jobs, command)
        finally:
            notes = [f"{said}."] if said else []
            page = write_report([cell.record() for cell in cells], folder, again, notes)
            log.info("report: %s", page)
    failed = [cell for cell in cells if not cell.done]
    for cell in failed:
        log.warning("%s: %s", cell.folder.name, cell.record().failed)
    return 1 if len(failed) == len(cells) else 0


def report(folders: Sequence[Path], to: Path) -> Path:
    """A report of runs that exist; returns the page's path.

    Args:
        folders: of runs, or folders that hold run folders.
        to: the folder that the report is written to.
    """
    runs = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob("*/config.yaml"))
        known = [] if (folder / "config.yaml").is_file() else inside
        runs += [read_run(path) for path in known or [folder]]
    command = "adamerge report " + " ".join(shlex.quote(str(folder)) for folder in folders)
    return write_report(runs, to, command)


def cells_of(grid: Sequence[Recipe], folder: Path) -> list[Cell]:
    """Cells in an order in which none comes before its base, their settings checked."""
    cells = [Cell(one.words, folder, config.load(one.words)) for one in grid]
    if not cells:
        raise AdamergeError(
            "there is nothing to compare: give settings like method=task_wise,wemoe"
        )
    for cell, name in zip(cells, folder_names(grid), strict=True):
        cell.folder = folder / name
    for cell, recipe in zip(cells, grid, strict=True):
        if recipe.base:
            cell.base = _base_of(recipe.base, cell, cells, grid)
            cell.words = [*recipe.words, f"method.base={cell.base.folder}"]
            cell.settings = config.load(cell.words)
        _refuse_other(cell)
        try:
            build.check(cell.settings)
        except AdamergeError as error:
            cell.failed = f"left out: {error}"
    return cells


def _base_of(base: str, cell: Cell, cells: Sequence[Cell], grid: Sequence[Recipe]) -> Cell:
    """The cell of that recipe with the same seed; its only one, where it has no seeds."""
    named = [other for other, one in zip(cells, grid, strict=True) if one.name == base]
    same = [other for other in named if other.settings["seed"] == cell.settings["seed"]]
    if len(same) != 1 and len(named) != 1:
        raise AdamergeError(
            f"a recipe has base: {base}, of which {len(same)} runs have its seed "
            f"{cell.settings['seed']}: expected one; give both the same seeds, and {base} no grid "
            "of other settings"
        )
    return (same or named)[0]


def _refuse_other(cell: Cell) -> None:
    """Refuses a folder that holds a run of other settings."""
    if not (cell.folder / "config.yaml").is_file():
        return
    there, wanted = (essential(s) for s in (read_run(cell.folder).settings, flat(cell.settings)))
    other = [key for key in differing([there, wanted]) if key in there and key in wanted]
    if other:
        raise AdamergeError(
            f"{cell.folder} holds a run of other settings ({other[0]} is {there[other[0]]!r}, not "
            f"{wanted[other[0]]!r}): choose another to="
        )


def run_all(cells: Sequence[Cell], jobs: int, command: Command) -> None:
    """Runs what is not done, a few at a time; stopped, it stops them all and lets them save."""
    begun, waiting = time.monotonic(), [c for c in cells if not c.done and not c.failed]
    total, ended = len(waiting), 0
    if len(waiting) < len(cells):
        log.info("%d of %d runs are done or left out", len(cells) - len(waiting), len(cells))
    running: dict[BaseProcess, tuple[Cell, int]] = {}  # and which GPU, where there are several
    try:
        while waiting or running:
            for cell in [c for c in waiting if c.base is not None and c.base.failed]:
                cell.failed = f"its base {cell.base.folder.name if cell.base else ''} failed"
                waiting.remove(cell)
                ended += 1
            ready = [c for c in waiting if c.base is None or c.base.done]
            while ready and len(running) < jobs:
                cell = ready.pop(0)
                waiting.remove(cell)
                place = min(set(range(jobs)) - {taken for _, taken in running.values()})
                running[_start(cell, place, jobs, command)] = cell, place
            for process in [p for p in running if not p.is_alive()]:
                cell, _ = running.pop(process)
                ended += 1
                if not cell.done:
                    cell.failed = _why(cell, process.exitcode)
                left = (time.monotonic() - begun) / ended * (total - ended) / 60
                said = f"failed: {cell.failed}" if cell.failed else _scored(cell)
                facts = (ended, total, cell.folder.name, said, left)
                log.info("[%d/%d] %s: %s; about %.0f min left", *facts)
            multiprocessing.connection.wait([p.sentinel for p in running], timeout=1.0)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()


def _start(cell: Cell, place: int, jobs: int, command: Command) -> BaseProcess:
    # Forked from a server that has only imported: a fork of this process, whose threads may be at
    # work, could wait for them for ever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adamerge.cli.train"])
    arguments = (command, cell.words, str(cell.folder), place, jobs)
    process: BaseProcess = context.Process(target=_run_cell, args=arguments)
    process.start()
    return process


def _run_cell(command: Command, words: Sequence[str], folder: str, place: int, jobs: int) -> None:
    """In a process of its own: the run, its output in `log.txt` beside its folder."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us as the parent's SIGTERM
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()
    with open(f"{folder}.log", "a", buffering=1) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    lines = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True)
    sys.stdout = sys.stderr = lines
    if jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
        devices = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = range(torch.cuda.device_count())
        known = devices.split(",") if devices else [str(number) for number in count]
        if known:
            os.environ["CUDA_VISIBLE_DEVICES"] = known[place % len(known)]
    resumed = (Path(folder) / CHECKPOINT).is_file()
    group = f"wandb.group={Path(folder).parent.name}"  # unless the words say another
    run = [f"resume={folder}"] if resumed else [group, *words, f"run_dir={folder}"]
    status = command(["train", *run])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_after(parent: int) -> None:
    """Stops this run, which saves, when the process that started it has ended: killed, it cannot
    stop its runs, and they would be in the way of the same command."""
    multiprocessing.connection.wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)


def _why(cell: Cell, status: int | None) -> str:
    """The sentence that a run ended with."""
    path = Path(f"{cell.folder}.log")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else f"ended with status {status}; see {path}"


def _scored(cell: Cell) -> str:
    average = read_run(cell.folder).row().get("average")
    return "no labels" if average is None else f"{100 * average:.1f} %"


def options_of(
    words: Sequence[str], options: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """Options with what words say of them, and the other words."""
    pairs = [word.partition("=") for word in words]
    given = {key: value for key, equals, value in pairs if equals and key in options}
    rest = [key + equals + value for key, equals, value in pairs if key not in given]
    return {**options, **given}, rest


def positive(name: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise AdamergeError(f"{name}={value}: expected a whole number from 1 on")
    return int(value)
