"""Peak memory of a piece of work, for benchmarks: resident on Linux, allocated on a GPU."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# Every tensor a mapping of its own, given back when freed. glibc before 2.38 does not find freed
# aligned blocks again: with its defaults a chain of sums holds every intermediate, and the peak is
# the allocator's, up to 14 times what is alive.
LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def resident(key: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak_above(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that `work` needs at its peak beyond what is held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def in_subprocess(arguments: Sequence[str], live: bool = True) -> int:
    """What this script prints as its last line when called with `arguments`: a number.

    Args:
        live: with tensors given back when freed (see `LIVE`); else with the default allocator.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    answer = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        env=environment | (LIVE if live else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(json.loads(answer.stdout.splitlines()[-1]))
