"""One optimizer step of layer-wise AdaMerging against the two naive schemes, in one run.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 \
        python benchmarks/step.py --tasks 4 8

- ours: one merge, one forward over all tasks' images, one backward, one contraction;
- per task: the merge inside autograd, then a backward pass per task with the graph retained;
- re-merge: the merge inside autograd again, forward and backward, for every task.

Same tower (random weights), task vectors, heads, images and coefficients; the gradients of λ are
compared. Times are CPU seconds (process time; device-synchronised wall seconds on a GPU), each
the median over rounds in which the schemes take turns. The two thresholds above keep freed memory
in the process: with the default allocator one measures page faults. Memory is measured by further
processes in which every tensor is given back when freed (see `meters.LIVE`): the default allocator
finds freed blocks again only in part, and its peaks are many times what is alive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import open_clip
import torch
from hardware import Rates, Step, floor, forward_flops
from meters import LIVE
from torch import Tensor
from torch.nn.functional import normalize

from adamerge import TaskVectors
from adamerge.encoders.tower import Tower
from adamerge.learn.losses import entropy

SCHEMES = ("ours", "per_task", "re_merge")
State = dict[str, Tensor]


class RandomExpert(Mapping[str, Tensor]):
    """An expert made tensor by tensor: the pretrained weights and seeded noise."""

    def __init__(self, pretrained: State, seed: int) -> None:
        self.pretrained, self.seed = pretrained, seed

    def __getitem__(self, name: str) -> Tensor:
        base = self.pretrained[name]
        seed = 1000 * self.seed + list(self.pretrained).index(name)
        generator = torch.Generator(base.device).manual_seed(seed)
        noise = torch.randn(base.shape, generator=generator, device=base.device)
        return base + 1e-3 * noise

    def __iter__(self) -> Iterator[str]:
        return iter(self.pretrained)

    def __len__(self) -> int:
        return len(self.pretrained)


@dataclass
class Setting:
    """What all schemes share."""

    tower: Tower
    vectors: TaskVectors
    images: Tensor  # [T, B, 3, H, W]
    heads: Tensor  # [T, C, D]
    device: torch.device
    forward_flops: int  # of the network as its authors wrote it, over all images

    @property
    def tasks(self) -> int:
        return len(self.vectors.tasks)

    def coefficients(self) -> Tensor:
        shape = (self.tasks, len(self.vectors.names))
        generator = torch.Generator().manual_seed(0)
        made = 0.3 + 0.05 * torch.randn(shape, generator=generator)
        return made.to(self.device).requires_grad_()

    def loss(self, features: Tensor, task: int) -> Tensor:
        return entropy(normalize(features, dim=-1) @ self.heads[task].T)


def make(architecture: str, tasks: int, batch: int, device: torch.device) -> Setting:
    """A random tower of an open_clip architecture, T random experts, images and heads."""
    torch.manual_seed(0)
    model = open_clip.create_model(architecture).visual.eval().requires_grad_(False).to(device)
    pretrained = dict(model.state_dict())
    vectors = TaskVectors(pretrained, {f"t{i}": RandomExpert(pretrained, i) for i in range(tasks)})
    size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    images = torch.randn(tasks, batch, 3, *size, device=device)
    heads = 100 * normalize(torch.randn(tasks, 100, model.output_dim, device=device), dim=-1)
    flops = forward_flops(model, images.flatten(0, 1))
    return Setting(Tower(model), vectors, images, heads, device, flops)


def naive_merge(vectors: TaskVectors, coefficients: Tensor) -> State:
    """`θ0 + Σ_t λ τ_t` by autograd, a product and a sum per task and layer."""
    merged = {}
    for layer, name in enumerate(vectors.names):
        total = vectors.pretrained[name]
        for row in range(len(vectors.tasks)):
            total = total + coefficients[row, layer] * vectors.deltas[name][row]
        merged[name] = total
    return merged


class Clock:
    """Seconds per phase: process time on a CPU, synchronised wall time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, dict[str, float]()
        self._start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def lap(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._start
        self._start = now


def ours(setting: Setting, coefficients: Tensor, clock: Clock) -> None:
    merged = setting.vectors.combine(coefficients)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in merged.items()}
    clock.lap("merge")
    batch = setting.images.shape[1]
    features = setting.tower(leaves, setting.images.flatten(0, 1)).split(batch)
    loss = torch.stack([setting.loss(f, task) for task, f in enumerate(features)]).sum()
    clock.lap("forward")
    loss.backward()
    clock.lap("backward")
    torch.autograd.backward(list(merged.values()), [leaf.grad for leaf in leaves.values()])
    clock.lap("contraction")


def per_task(setting: Setting, coefficients: Tensor, clock: Clock) -> None:
    merged = naive_merge(setting.vectors, coefficients)
    clock.lap("merge")
    for task, images in enumerate(setting.images):
        loss = setting.loss(setting.tower(merged, images), task)
        clock.lap("forward")
        loss.backward(retain_graph=True)
        clock.lap("backward")


def re_merge(setting: Setting, coefficients: Tensor, clock: Clock) -> None:
    for task, images in enumerate(setting.images):
        merged = naive_merge(setting.vectors, coefficients)
        clock.lap("merge")
        loss = setting.loss(setting.tower(merged, images), task)
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")


STEP: dict[str, Callable[[Setting, Tensor, Clock], None]] = {
    "ours": ours,
    "per_task": per_task,
    "re_merge": re_merge,
}


def merging_work(setting: Setting, scheme: str, grads: list[Tensor]) -> float:
    """Seconds of merge + gradient of λ alone, given dL/dW: what the tower has no part in."""
    coefficients, clock = setting.coefficients(), Clock(setting.device)
    once = scheme != "per_task"
    merge = setting.vectors.combine if scheme == "ours" else None
    for _ in range(setting.tasks if scheme == "re_merge" else 1):
        merged = merge(coefficients) if merge else naive_merge(setting.vectors, coefficients)
        for _ in range(1 if once else setting.tasks):
            torch.autograd.backward(list(merged.values()), grads, retain_graph=not once)
    clock.lap("all")
    return clock.seconds["all"]


def compare(setting: Setting, rounds: int) -> dict[str, Any]:
    """Medians per scheme and phase, with the largest difference in the gradient of λ."""
    phases: dict[str, list[dict[str, float]]] = {scheme: [] for scheme in SCHEMES}
    work: dict[str, list[float]] = {scheme: [] for scheme in SCHEMES}
    gradients = {}
    grads = [torch.randn_like(tensor) for tensor in setting.vectors.pretrained.values()]
    for turn in range(rounds + 1):  # the first is a warm-up
        for scheme in SCHEMES:
            coefficients, clock = setting.coefficients(), Clock(setting.device)
            STEP[scheme](setting, coefficients, clock)
            gradients[scheme] = coefficients.grad
            seconds = merging_work(setting, scheme, grads)
            if turn:
                phases[scheme].append({**clock.seconds, "step": sum(clock.seconds.values())})
                work[scheme].append(seconds)
    scale = gradients["per_task"].abs().max()
    return {
        "gradient_difference": {
            s: float((gradients[s] - gradients["per_task"]).abs().max() / scale) for s in SCHEMES
        },
        "phases": {
            s: {k: statistics.median(r[k] for r in runs) for k in runs[0]}
            for s, runs in phases.items()
        },
        "merging_work": {s: statistics.median(v) for s, v in work.items()},
    }


def resident(peak: bool) -> int:
    """This process's resident memory, or its peak since the last reset, in bytes (Linux)."""
    key = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure_memory(setting: Setting, scheme: str, whole_step: bool) -> dict[str, float]:
    """Peak bytes above the inputs, in multiples of the model's own size."""
    grads = [torch.zeros_like(t).fill_(1e-3) for t in setting.vectors.pretrained.values()]
    size = sum(grad.numel() * grad.element_size() for grad in grads)
    coefficients = setting.coefficients()
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident(peak=False)
    if whole_step:
        STEP[scheme](setting, coefficients, Clock(setting.device))
    else:
        merging_work(setting, scheme, grads)
    on_gpu = setting.device.type == "cuda"
    after = torch.cuda.max_memory_allocated() if on_gpu else resident(peak=True)
    # In the merging work the gradient of W is among the inputs; W is counted off here, so that
    # what is left is neither τ, nor W, nor its gradient.
    rest = 0 if whole_step else size
    return {"multiples_of_P": (after - before - rest) / size}


def memory_in_subprocess(
    arguments: argparse.Namespace, tasks: int, scheme: str, what: str
) -> float:
    command = [sys.executable, __file__, "--memory", scheme, what, "--tasks", str(tasks)]
    command += ["--architecture", arguments.architecture, "--batch", str(arguments.batch)]
    command += ["--device", arguments.device]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | LIVE
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(answer.stdout.splitlines()[-1])["multiples_of_P"])


def report(arguments: argparse.Namespace, tasks: int, memory: Mapping[str, float]) -> str:
    """The table of one number of tasks, in Markdown; `memory` by scheme and what is measured."""
    device = torch.device(arguments.device)
    setting = make(arguments.architecture, tasks, arguments.batch, device)
    before = Rates.measured(device)
    found = compare(setting, arguments.rounds)
    work, phases = found["merging_work"], found["phases"]
    parameters = sum(tensor.numel() for tensor in setting.vectors.pretrained.values())
    floors = [
        floor(Step(tasks, parameters, setting.forward_flops), rates).seconds
        for rates in (before, Rates.measured(device))
    ]
    least = sum(floors) / 2
    lines = [
        f"## {arguments.architecture}, T = {tasks}, {arguments.batch} images per task, "
        f"{arguments.device}",
        "",
        "| scheme | merge | forward | backward | contraction | step | ÷ ours | merging work | "
        "÷ ours | memory of merging work | memory of step | λ-gradient difference |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for scheme in SCHEMES:
        row = phases[scheme]
        cells = [f"{row[k]:.3f} s" for k in ("merge", "forward", "backward")]
        inside = "in backward" if "contraction" not in row else f"{row['contraction']:.3f} s"
        cells += [
            inside,
            f"{row['step']:.3f} s",
            f"{row['step'] / phases['ours']['step']:.2f} ×",
            f"{work[scheme]:.3f} s",
            f"{work[scheme] / work['ours']:.1f} ×",
            f"{memory[scheme + ' work']:.3f} P",
            f"{memory[scheme + ' step']:.2f} P",
            f"{found['gradient_difference'][scheme]:.1e}",
        ]
        lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"The floor of `hardware.py`, by rates measured before and after, is {least:.3f} s; ours "
        f"takes {phases['ours']['step'] / least:.2f} × that. Rates before: {before}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--batch", type=int, default=4, help="images per task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    parser.add_argument("--memory", nargs=2, metavar=("SCHEME", "WHAT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        scheme, what = arguments.memory
        device = torch.device(arguments.device)
        setting = make(arguments.architecture, arguments.tasks[0], arguments.batch, device)
        print(json.dumps(measure_memory(setting, scheme, what == "step")))
        return
    head = (
        f"# One step, three schemes\n\n{date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} thread(s), median of "
        f"{arguments.rounds} rounds.\n\n    python benchmarks/step.py {' '.join(sys.argv[1:])}\n\n"
        "Memory is the peak above the inputs (θ0, τ, images), in multiples of the model's size P; "
        "for the merging work, W and its gradient are not counted.\n"
    )
    # Memory first, while this process holds no model beside the one being measured.
    memory = {
        tasks: {
            f"{scheme} {what}": memory_in_subprocess(arguments, tasks, scheme, what)
            for scheme in SCHEMES
            for what in ("work", "step")
        }
        for tasks in arguments.tasks
    }
    parts = [head]
    print(head, flush=True)
    for tasks in arguments.tasks:
        parts.append(report(arguments, tasks, memory[tasks]))
        print(parts[-1], flush=True)
        if arguments.out:
            arguments.out.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
