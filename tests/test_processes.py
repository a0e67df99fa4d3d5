"""A process of a DDP run that is lost, or finds no place to meet the others: one sentence."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from adamerge import AdamergeError
from adamerge.cli import processes
from adamerge.cli.processes import LostProcess, together

RUN = Path("runs/a")


@pytest.fixture
def trainer() -> Iterator[Any]:
    """As a Trainer that has started one more process."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        launcher = SimpleNamespace(procs=[process])
        yield SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=launcher))
        process.kill()


GLOO = "[/pytorch/gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:44262"


@pytest.mark.parametrize(
    "error", [RuntimeError(GLOO), dist.DistBackendError("NCCL error"), dist.DistStoreError("x")]
)
def test_a_broken_connection_is_a_lost_process(trainer: Any, error: Exception) -> None:
    (other,) = trainer.strategy.launcher.procs
    message = rf"a process of the run was lost \([^/]*\): go on .* resume={RUN}"
    with pytest.raises(LostProcess, match=message), together(trainer, RUN):
        raise error
    assert other.poll() == -signal.SIGKILL, "none can go on alone"


def test_other_errors_stay_what_they_are(trainer: Any) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"), together(trainer, RUN):
        raise RuntimeError("size mismatch")
    trainer.world_size, trainer.strategy.launcher = 1, None
    with pytest.raises(RuntimeError, match="gloo"), together(trainer, RUN):
        raise RuntimeError(GLOO)


def test_a_port_that_is_taken_is_named(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    error = dist.DistNetworkError("failed to listen. port: 29500, name: EADDRINUSE")
    message = r"port 29500, where .* is taken: set MASTER_PORT"
    with pytest.raises(AdamergeError, match=message), together(trainer, RUN):
        raise error


def test_a_process_that_waits_for_a_lost_one_ends(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "_EVERY", 0.01)
    monkeypatch.setattr(processes, "_PATIENCE", 0.01)
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    seen = trainer.strategy.launcher.procs  # what Lightning's own observer looks at
    with together(trainer, RUN):
        seen[0].kill()
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ended and set(ended) == {2} and not seen
    assert "lost (rank 1 ended with status -9)" in capfd.readouterr().err.splitlines()[1]


def test_a_parent_that_was_killed_is_outlived() -> None:
    """The function as it stands, in a process that imports nothing more."""
    code = f"import os, time\n{inspect.getsource(processes.outlived)}\nparent = os.getppid()\n"
    code += "print('ready', flush=True); time.sleep(0.5); print(outlived(parent), flush=True)"
    shell = ["sh", "-c", f'{sys.executable} -c "$CODE"; true']
    environment = {**os.environ, "CODE": code}
    with subprocess.Popen(shell, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout and parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == "True\n"
    assert not processes.outlived(os.getppid())
