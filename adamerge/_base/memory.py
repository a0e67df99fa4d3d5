"""Memory that is left, of the machine or of a GPU."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch


def memory_available(device: torch.device) -> int | None:
    """Bytes this process could still take on a device; None where the system does not say.

    On a CPU what the kernel calls available, or what the limit of its control group leaves.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for later is free too
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(2**10 * int(next(x for x in lines if x.startswith("MemAvail")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / f"memory.{name}").read_text() for name in ("max", "current"))
        counts = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
        # Files read once count as used, and are given up when memory is asked for.
        used_for_good = int(used) - int(counts.get("inactive_file", 0))
        limits.append(max(int(limit) - used_for_good, 0))
    if not limits:
        with contextlib.suppress(OSError, ValueError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)
