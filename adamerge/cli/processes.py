"""The processes of a DDP run: one that is lost ends the run, with one sentence."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from adamerge._base.errors import AdamergeError
from adamerge._base.terminal import printable

_EVERY = 0.2  # seconds between two looks at the other processes
_PATIENCE = 5  # seconds that this process has to end by itself when another was lost
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|broken pipe|socket|process group", re.IGNORECASE
)


class LostProcess(AdamergeError):
    """Another process of the run has ended before its time, or cannot be reached."""


@contextlib.contextmanager
def together(trainer: pl.Trainer, run_dir: Path) -> Iterator[None]:
    """Trains within the block: what another process's end makes of it becomes one sentence.

    A collective may wait for a lost process for half an hour, or for ever: then this process ends
    too, with status 2. Afterwards the group of processes is no more: what comes after training is
    the main process's alone.

    Raises:
        LostProcess: another process was lost.
        AdamergeError: the port where processes meet is taken.
    """
    over, started, alone = threading.Event(), Started(trainer), not dist.is_initialized()
    watch = threading.Thread(target=_watch, args=(started, run_dir, over), daemon=True)
    watch.start()
    try:
        yield
        if alone and dist.is_initialized():
            dist.destroy_process_group()
    except BaseException as error:
        started.kill()
        broken = isinstance(error, dist.DistError) or _LOST.search(str(error))
        if trainer.world_size > 1 and isinstance(error, RuntimeError) and broken:
            raise _explained(error, run_dir) from None
        raise
    finally:
        over.set()
        watch.join()


def outlived(parent: int) -> bool:
    """Whether the process that started this one is gone; one that was killed is so in a moment."""
    deadline = time.monotonic() + 2
    while os.getppid() == parent and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.getppid() != parent


class Started:
    """The processes that Lightning's launcher has started on this machine."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._launcher: Any = trainer.strategy.launcher
        self._known: list[subprocess.Popen[bytes]] = []

    def lost(self) -> tuple[int, int] | None:
        """Rank and status of one that has failed.

        Lightning looks too, and would kill this process without a word: it is given an empty list.
        """
        theirs = getattr(self._launcher, "procs", None)
        if theirs and not self._known:
            self._known = list(theirs)
            self._launcher.procs = self._known
            theirs.clear()
        for rank, process in enumerate(self._known, start=1):
            if process.poll():
                return rank, process.returncode
        return None

    def kill(self) -> None:
        """Ends them: none can go on alone."""
        self.lost()  # which ones there are
        for process in self._known:
            process.kill()
            process.wait()


def _watch(started: Started, run_dir: Path, over: threading.Event) -> None:
    while not over.wait(_EVERY):
        lost = started.lost()
        if lost is not None and not over.wait(_PATIENCE):
            started.kill()
            error = _lost("rank {} ended with status {}".format(*lost), run_dir)
            print(f"\nerror: {printable(str(error))}", file=sys.stderr, flush=True)
            os._exit(2)


def _explained(error: RuntimeError, run_dir: Path) -> AdamergeError:
    reason = re.sub(r"^\[[^]]*\] ", "", " ".join(str(error).split()))  # where in the C++ code
    if "EADDRINUSE" in reason:
        return AdamergeError(
            f"port {os.environ.get('MASTER_PORT')}, where the processes of the run meet, is taken: "
            "set MASTER_PORT to a free one, or unset it"
        )
    return _lost(reason[:150], run_dir)


def _lost(reason: str, run_dir: Path) -> LostProcess:
    return LostProcess(
        f"a process of the run was lost ({reason}): go on from the last checkpoint with "
        f"resume={run_dir}, or start again where there is none yet"
    )
