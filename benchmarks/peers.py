"""A step of adamerge against the same step of the public package `fusion-bench`, in one run.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000 \
        python benchmarks/peers.py --out benchmarks/results/peers_cpu.md

Both sides get the image tower of ViT-B/32 with the same random weights, task vectors, images and
classifiers. Theirs is its own algorithm class with its own loop (`test_time_adaptation`) on a
transformers tower, in the precisions of its Fabric; ours is `AdaMerging` or `WEMoE` with
`step_loss`, on the open_clip tower as a user has it, and on their tower, where λ can be compared.

- step: all tasks' losses, gradients, the optimizer's step and one merge;
- merging work: merge and gradient of λ, given dL/dW; theirs goes back through it once per task;
- WEMoE: forward and backward of a tower of two blocks;
- peaks: above the inputs (θ0, τ, images), of two layer-wise steps or of one forward and backward
  of WEMoE, each in a process of its own, with tensors given back to the system when freed (alive)
  and with the allocator's defaults.

Times are CPU seconds (synchronised wall seconds on a GPU), medians over rounds in which the schemes
take turns. The two thresholds keep freed memory in the process, or one measures page faults. Beside
every time is the floor of `hardware.py`, of rates measured in the same run: float32 or bfloat16
products as the scheme's, W in that type.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import peers_compare as compare
import torch
from hardware import DTYPES, Floor, Rates
from meters import in_subprocess
from peers_ours import Ours, layer_wise, wemoe
from peers_tables import floor_of, profiled, table
from peers_theirs import TheirLayerWise, TheirMixtures
from peers_world import SHAPES, Shape, World

SHAPE = SHAPES["ViT-B-32"]
MIXED = {"shape": replace(SHAPE, blocks=2), "tasks": 8, "batch": 2}  # of WEMoE
PACKAGES = ("fusion-bench", "torch", "transformers", "open_clip_torch", "lightning")


def head(rates: Rates, rounds: int) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"# One step, beside fusion-bench\n\n{date.today()}, {versions}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} thread(s), medians of {rounds} "
        f"rounds.\n\n    python benchmarks/peers.py {' '.join(sys.argv[1:])}\n\n"
        f"What is measured: see the top of `benchmarks/peers.py`. The machine: {rates}."
    )


def layer_wise_part(arguments: argparse.Namespace, tasks: int, rates: Rates) -> str:
    """Step, merging work and memory for one number of tasks."""
    names = [*compare.THEIRS, *(name for name in compare.OURS if "their" not in name)]
    memory = _peaks(arguments, names, SHAPE, tasks, arguments.batch)
    world = World.make(SHAPE, tasks, arguments.batch, torch.device(arguments.device))
    steps, works, line = compare.compare_steps(world, arguments.rounds)
    bf16s = (False,) if arguments.no_bf16 else (False, True)
    bounds = {bf16: floor_of(world, rates, bf16) for bf16 in bf16s}

    def least(name: str) -> Floor:
        return bounds[name.endswith("bf16")]

    return "\n\n".join(
        [
            f"## Layer-wise, T = {tasks}, {arguments.batch} images per task, {arguments.device}",
            "Step:",
            table(steps, list(compare.THEIRS), least, memory=memory),
            line,
            "Merging work (its floor is the traffic):",
            table(works, ["fusion-bench"], least, merging=True),
        ]
    )


def merging_part(arguments: argparse.Namespace, tasks: int, rates: Rates) -> str:
    """The merging work alone."""
    world = World.make(SHAPE, tasks, 1, torch.device(arguments.device))
    works = compare.compare_merging(world, arguments.rounds)
    bf16s = (False,) if arguments.no_bf16 else (False, True)
    bounds = {bf16: floor_of(world, rates, bf16) for bf16 in bf16s}
    text = table(works, ["fusion-bench"], lambda n: bounds[n.endswith("bf16")], merging=True)
    return f"## Merging work, T = {tasks}, {arguments.device} (its floor is the traffic)\n\n{text}"


def mixtures_part(arguments: argparse.Namespace, rates: Rates) -> str:
    """WEMoE on a tower of two blocks."""
    memory = _peaks(arguments, compare.MIXTURES, *MIXED.values())
    world = World.make(**MIXED, device=torch.device(arguments.device))
    found, line = compare.compare_mixtures(world, arguments.rounds)
    bound = floor_of(world, rates, False, mlps=True)
    parts = [f"## WEMoE, two blocks, T = 8, 2 images per task, {arguments.device}"]
    for mode in compare.MODES:
        rows = {name: seconds for name, seconds in found.items() if name.endswith(mode)}
        parts.append(table(rows, [f"fusion-bench, {mode}"], lambda _: bound, memory=memory))
    return "\n\n".join([*parts, line])


def profile_part(arguments: argparse.Namespace) -> str:
    """Where the time goes: a layer-wise step with T = 4, and WEMoE."""
    device = torch.device(arguments.device)
    world = World.make(SHAPE, 4, arguments.batch, device)
    theirs = TheirLayerWise(world)
    works = {f"{n}, step": partial(theirs.learn, 1, b) for n, b in compare.THEIRS.items()}
    method = layer_wise(world, False)
    works |= {"adamerge, step": Ours(world, method).step}
    if "adamerge, bf16" in compare.OURS:
        works |= {"adamerge, bf16, step": Ours(world, method, True).step}
    mixed = World.make(**MIXED, device=device)
    for mode, reduce in compare.MODES.items():
        works[f"fusion-bench, {mode}"] = TheirMixtures(mixed, reduce).learn
        works[f"adamerge, {mode}"] = Ours(mixed, wemoe(mixed, reduce)).fresh_gradients
    parts = [
        "## Where the time goes, T = 4 (WEMoE: 8)",
        "Wall time of one step under the profiler.",
    ]
    for name, work in works.items():
        work()
        parts += [f"{name}:", profiled(work, device)]
    return "\n\n".join(parts)


def _peaks(
    arguments: argparse.Namespace, names: Iterable[str], shape: Shape, tasks: int, batch: int
) -> dict[str, list[int]]:
    """Peaks by scheme: alive, and for the plain ones also with the default allocator."""
    found: dict[str, list[int]] = {}
    for name in () if arguments.no_peaks else names:
        words = ["--device", arguments.device, "--peak", name]
        words += [str(number) for number in (shape.blocks, tasks, batch)]
        plain = name in ("fusion-bench", "adamerge") or name in compare.MIXTURES
        ways = (True, False) if plain and arguments.device == "cpu" else (True,)
        found[name] = [in_subprocess(words, live) for live in ways]
    return found


def parts_of(arguments: argparse.Namespace) -> Iterator[str]:
    dtypes = DTYPES[:1] if arguments.no_bf16 else DTYPES
    rates = Rates.measured(torch.device(arguments.device), dtypes=dtypes)
    yield head(rates, arguments.rounds)
    for tasks in arguments.tasks:
        yield layer_wise_part(arguments, tasks, rates)
        gc.collect()
    for tasks in arguments.merging:
        yield merging_part(arguments, tasks, rates)
        gc.collect()
    yield mixtures_part(arguments, rates)
    if arguments.profile:
        yield profile_part(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--merging", type=int, nargs="*", default=[], help="merging work alone")
    parser.add_argument("--batch", type=int, default=4, help="images per task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--no-peaks", action="store_true", help="times alone")
    parser.add_argument("--no-bf16", action="store_true", help="for a core without units for it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        name, *numbers = arguments.peak
        blocks, tasks, batch = map(int, numbers)
        device = torch.device(arguments.device)
        world = World.make(replace(SHAPE, blocks=blocks), tasks, batch, device)
        print(compare.peak_of(name, world))
        return
    if arguments.no_bf16:
        compare.without_bf16()
    parts = []
    for part in parts_of(arguments):
        parts.append(part)
        print(part, flush=True)
        if arguments.out:
            arguments.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
