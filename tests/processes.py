"""Processes that run the main job: forked, where they can be, so that none imports all again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch.multiprocessing.spawn import start_processes

from adamerge.cli import main

# Where there is a GPU, autograd starts threads, and what is forked after that has no autograd.
METHOD = "spawn" if torch.cuda.is_available() else "fork"


def train_on_ranks(words: Sequence[str], ranks: int, folder: Path) -> None:
    """`adamerge train *words` in `ranks` processes of one DDP job, with `folder` as their own.

    They are started as a cluster would start them: Lightning finds their ranks in the environment.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    everyone = [*words, f"trainer.devices={ranks}", "trainer.strategy=ddp"]
    start_processes(_rank, (ranks, port, folder, everyone), ranks, start_method=METHOD)


def _rank(rank: int, ranks: int, port: int, folder: Path, words: list[str]) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks}
    settings |= {"NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in settings.items()})
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # Lightning reads it when it is first imported
    torch.set_num_threads(1)  # more than one do not survive a fork
    os.chdir(folder)
    assert main(["train", *words]) == 0


def started(work: Callable[[], int], errors: Path) -> BaseProcess:
    """A process, the first of its group, whose status is that of `work`, and stderr `errors`.

    Args:
        work: a function of a module, or a `functools.partial` of one.
    """
    context = multiprocessing.get_context(METHOD)
    process = context.Process(target=_alone, args=(work, errors))  # type: ignore[attr-defined]
    process.start()
    return process


def _alone(work: Callable[[], int], errors: Path) -> None:
    os.setsid()
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the process ends
    logging.getLogger().handlers.clear()  # pytest's
    torch.set_num_threads(1)
    sys.exit(work())


def forgetting(packages: Sequence[str], code: str) -> int:
    """Runs code in this process as if nothing had imported these packages yet."""
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]
    exec(code, {"__name__": "fresh"})
    return 0
