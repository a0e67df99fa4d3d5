"""Forked processes that run the main job: none has to import everything again."""

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
import torch.multiprocessing as mp
from lightning.pytorch.utilities import rank_zero_only

from adamerge.cli import main


def train_on_ranks(words: Sequence[str], ranks: int, folder: Path) -> None:
    """`adamerge train *words` in `ranks` processes of one DDP job, with `folder` as their own.

    They are started as a cluster would start them: Lightning finds their ranks in the environment.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    everyone = [*words, f"trainer.devices={ranks}", "trainer.strategy=ddp"]
    mp.start_processes(_rank, (ranks, port, folder, everyone), ranks, start_method="fork")


def _rank(rank: int, ranks: int, port: int, folder: Path, words: list[str]) -> None:
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks}
    settings |= {"NODE_RANK": 0, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in settings.items()})
    rank_zero_only.rank = rank  # Lightning reads it when it is first imported
    torch.set_num_threads(1)  # more than one do not survive a fork
    os.chdir(folder)
    assert main(["train", *words]) == 0


def forked(work: Callable[[], object], errors: Path) -> BaseProcess:
    """A process, and the first of its group, that does `work`; what it complains is in `errors`."""
    process = multiprocessing.get_context("fork").Process(target=_alone, args=(work, errors))
    process.start()
    return process


def _alone(work: Callable[[], object], errors: Path) -> None:
    os.setsid()
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 - until the process ends
    logging.getLogger().handlers.clear()  # pytest's
    torch.set_num_threads(1)
    sys.exit(work())  # type: ignore[arg-type]
