"""The tables of `peers.py`, in Markdown: times beside floors, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from gpu_world import by_kernel
from hardware import Floor, Rates, Step, floor, forward_flops
from peers_world import World, open_clip_tower


def floor_of(world: World, rates: Rates, bf16: bool, mlps: bool = False) -> Floor:
    """Of a step with these images; with `mlps`, of the task vectors of the MLPs alone."""
    count = sum(t.numel() for n, t in world.pretrained.items() if ".mlp." in n or not mlps)
    images = torch.empty(world.images.flatten(0, 1).shape, device="meta")
    flops = forward_flops(open_clip_tower(world.shape).to("meta"), images)
    dtype = torch.bfloat16 if bf16 else torch.float32
    step = Step(len(world.tasks), count, flops, dtype, weight_bytes=dtype.itemsize)
    return floor(step, rates)


def table(
    found: Mapping[str, float],
    against: Sequence[str],
    least: Callable[[str], Floor],
    merging: bool = False,
    memory: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """A row per scheme: its seconds, ratios, the floor and its terms, and its peaks.

    Args:
        found: seconds by scheme.
        against: the schemes whose seconds are divided by every other's.
        least: floors by scheme.
        merging: without the tower, so that the floor is its traffic alone.
        memory: peaks in bytes by scheme: alive, and with the default allocator.
    """
    head = ["scheme", "time", *(f"{name} ÷ it" for name in against)]
    head += ["floor", "its compute", "its traffic", "time ÷ floor"]
    head += ["peak, alive", "peak, default allocator"] if memory else []
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for name, seconds in found.items():
        bound = least(name)
        lowest = bound.traffic if merging else bound.seconds
        cells = [name, f"{seconds:.3f} s", *(f"{found[a] / seconds:.2f} ×" for a in against)]
        cells += [f"{lowest:.3f} s", "–" if merging else f"{bound.compute:.3f} s"]
        cells += [f"{bound.traffic:.3f} s", f"{seconds / lowest:.2f}"]
        if memory:
            peaks = [f"{peak / 1e9:.3f} GB" for peak in memory.get(name, ())]
            cells += [*peaks, "–", "–"][:2]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def profiled(work: Callable[[], object], device: torch.device, rows: int = 12) -> str:
    """Where the time of `work` goes: the `rows` operations with the most time of their own."""
    found = by_kernel(work, device)
    total = sum(spent for _, spent, _ in found)
    lines = ["| operation | own time | share | calls |", "|---|--:|--:|--:|"]
    for name, spent, calls in found[:rows]:
        lines.append(f"| `{name[:60]}` | {spent / 1e3:.3f} s | {spent / total:.0%} | {calls} |")
    return "\n".join(lines)
