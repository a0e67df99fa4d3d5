"""How time and memory grow with the number of experts T and the parameters P of one.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=10000000000 MALLOC_TRIM_THRESHOLD_=10000000000 \
        python benchmarks/scale.py --out benchmarks/results/scale_cpu.md
    python benchmarks/scale.py --disk 64 --out benchmarks/results/scale_disk_cpu.md

Towers of growing size (random weights) with T random experts, one image per task, two images
encoded at a time, each setting in a process of its own. Linear models are fitted by least squares:
seconds of merging (merge + gradient of λ) = a·P + b·T·P, and bytes above the inputs = c·P + d. What
is off by more than 15 % is where a model breaks: with T = 2 the two images are encoded together,
and weights go as their gradients are handed back; with more, the gradients of all weights add up
over micro-batches. Settings that would not fit into `--memory` are left out and named.

`--disk T` instead writes T expert files of ViT-B/32 and learns with task vectors on disk, in one
process whose peak of resident memory is measured from its start to its end. An eighth of every
file's tensors hold numbers, the others are holes that read as zeros, so that 22 GB of experts take
3 GB; the task vectors made of them are dense.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import hardware
import numpy as np
import open_clip
import torch
from meters import in_subprocess, peak_above, resident
from step import RandomExpert
from torch import Tensor

from adamerge import TaskVectors
from adamerge.encoders.clip import build_backbone
from adamerge.encoders.heads import Heads
from adamerge.learn.objectives import Entropy
from adamerge.learn.step import step_loss
from adamerge.methods import AdaMerging
from adamerge.weights.formats.files import open_weights
from adamerge.weights.storage import Storage

TOWERS = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14")
TASKS = (2, 4, 8, 16, 32)
MICRO_BATCH = 2
ROUNDS = 3
LIMIT = 0.15
# P of each tower, to know beforehand what fits.
MILLIONS = {"ViT-B-32": 88, "ViT-B-16": 86, "ViT-L-14": 304, "ViT-H-14": 632}


def tower(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = {"model_cfg": open_clip.get_model_config(architecture), "preprocess_cfg": {}}
    return build_backbone(config, architecture)


class Bench:
    """A method on given task vectors, and one image per task."""

    def __init__(self, backbone: Any, vectors: TaskVectors, device: torch.device) -> None:
        self.device, self.vectors = device, vectors
        self.method = AdaMerging(backbone, vectors, init=0.3).to(device)
        size, tasks = backbone.image_size[0], vectors.tasks
        self.images = torch.randn(len(tasks), 3, size, size, device=device)
        self.ids = torch.arange(len(tasks))
        dim = backbone.output_dim
        weights = {t: torch.nn.functional.normalize(torch.randn(100, dim), dim=1) for t in tasks}
        classes = {task: [str(i) for i in range(100)] for task in tasks}
        self.objective = Entropy(Heads(weights, classes).to(device))
        self.optimizer = torch.optim.Adam(self.method.parameters(), lr=1e-3)

    def step(self, micro_batch: int | None = MICRO_BATCH) -> None:
        loss, *_ = step_loss(self.method, self.objective, self.images, self.ids, micro_batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def merging(self, grads: list[Tensor]) -> None:
        vectors = self.method.task_vectors
        merged = vectors.combine(self.method.layer_coefficients())
        torch.autograd.backward(list(merged.values()), grads)
        self.optimizer.zero_grad()


def seconds(device: torch.device, work: Callable[[], None]) -> float:
    start = hardware.now(device)
    work()
    return hardware.now(device) - start


def median(device: torch.device, work: Callable[[], None]) -> float:
    """Of `ROUNDS` after one that warms up."""
    return statistics.median([seconds(device, work) for _ in range(ROUNDS + 1)][1:])


def one(
    architecture: str, tasks: int, dtype: str, place: str, device: torch.device, peak: bool
) -> dict[str, Any]:
    """What is measured of one setting: its peak, or the rest."""
    backbone = tower(architecture)
    state = backbone.state_dict()
    experts = {f"t{i}": RandomExpert(state, i) for i in range(tasks)}
    with tempfile.TemporaryDirectory() as folder:
        kept = Storage(dtype, place, Path(folder) / "tau.safetensors")
        vectors = TaskVectors(state, experts, share=True, storage=kept)
        bench = Bench(backbone, vectors, device)
        if peak:
            return {"peak": peak_above(device, bench.step)}
        grads = [torch.full_like(t, 1e-3) for t in bench.method.task_vectors.pretrained.values()]
        merging = median(device, partial(bench.merging, grads))
        grads.clear()
        step = seconds(device, bench.step)  # one: a large tower's is long, and tells of itself
        flops = hardware.forward_flops(backbone.to(device), bench.images[:1]) * tasks
    size = bench.vectors.numel()
    held = bench.vectors.nbytes() + 4 * size
    return {
        **{"tower": architecture, "tasks": tasks, "P": size, "merging": merging, "step": step},
        **{"inputs": held, "flops": flops},
    }


def fitted(rows: list[dict], columns: Callable[[dict], list[float]], key: str) -> np.ndarray:
    """Least-squares factors of `columns` for `key`; every row counts alike, whatever its size."""
    values = np.array([row[key] for row in rows], dtype=float)
    left = np.array([columns(row) for row in rows], dtype=float) / values[:, None]
    return np.linalg.lstsq(left, np.ones(len(rows)), rcond=None)[0]


def of_merging(row: dict) -> list[float]:
    return [row["P"], row["tasks"] * row["P"]]


def of_peak(row: dict) -> list[float]:
    return [row["P"], 1.0]


def report(rows: list[dict], left_out: list[str], rates: hardware.Rates, s_tau: int) -> str:
    time_factors, memory_factors = (
        fitted(rows, of_merging, "merging"),
        fitted(rows, of_peak, "peak"),
    )
    lines = [
        "| tower | T | P | step | floor (compute, bytes) | step ÷ floor | merging | model | off | "
        "inputs | above the inputs | model | off |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    breaks = []
    for row in rows:
        least = hardware.floor(
            hardware.Step(row["tasks"], row["P"], row["flops"], vector_bytes=s_tau), rates
        )
        expected = float(np.dot(of_merging(row), time_factors))
        peak = float(np.dot(of_peak(row), memory_factors))
        off, off_peak = row["merging"] / expected - 1, row["peak"] / peak - 1
        for what, share in (("merging", off), ("memory", off_peak)):
            if abs(share) > LIMIT:
                breaks.append(f"{row['tower']}, T = {row['tasks']}: {what} {share:+.0%}")
        lines.append(
            f"| {row['tower']} | {row['tasks']} | {row['P'] / 1e6:.0f} M | {row['step']:.2f} s | "
            f"{least.seconds:.2f} s ({least.compute:.2f}, {least.traffic:.2f}) | "
            f"{row['step'] / least.seconds:.2f} × | {row['merging']:.3f} s | {expected:.3f} s | "
            f"{off:+.0%} | {row['inputs'] / 1e9:.2f} GB | {row['peak'] / 1e9:.2f} GB | "
            f"{peak / 1e9:.2f} GB | {off_peak:+.0%} |"
        )
    a, b = (1e9 * float(x) for x in time_factors)
    c, d = float(memory_factors[0]) / 4, float(memory_factors[1]) / 1e9
    lines += [
        "",
        f"Merging: {a:.2f} s · P/10⁹ + {b:.2f} s · T·P/10⁹. Above the inputs: {c:.2f} models + "
        f"{d:.2f} GB, whatever T. Where a model is off by more than {LIMIT:.0%}: "
        f"{'; '.join(breaks) or 'nowhere'}.",
        "",
        f"Left out, for want of memory: {', '.join(left_out) or 'nothing'}.",
    ]
    return "\n".join(lines)


def sweep(arguments: argparse.Namespace) -> str:
    device = torch.device(arguments.device)
    rates = hardware.Rates.measured(device)
    rows, left_out = [], []
    bytes_each = {"float32": 4, "bfloat16": 2, "int8": 1}[arguments.dtype]
    for architecture in arguments.towers:
        for tasks in arguments.tasks:
            needed = MILLIONS[architecture] * 1e6 * (bytes_each * tasks + 4 * 4)
            if needed > arguments.memory * 1e9:
                left_out.append(f"{architecture} T = {tasks} ({needed / 1e9:.0f} GB)")
                continue
            command = [sys.executable, __file__, "--one", architecture, str(tasks)]
            command += ["--dtype", arguments.dtype, "--place", arguments.place]
            command += ["--device", arguments.device]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(answer.stdout.splitlines()[-1]))
            rows[-1]["peak"] = in_subprocess([*command[2:], "--peak"])
            print(rows[-1], flush=True)
    title = f"## τ in {arguments.dtype}, {arguments.place}, {arguments.device}\n\n"
    return f"{title}The machine: {rates}.\n\n" + report(rows, left_out, rates, bytes_each)


def write_sparse(path: Path, pretrained: dict[str, Tensor], seed: int) -> None:
    """An expert's .safetensors file; of every eighth tensor the numbers, of the others holes."""
    entries, end = {}, 0
    for name, tensor in pretrained.items():
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [end]}
        end += tensor.nbytes
        entries[name]["data_offsets"].append(end)
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        file.truncate(start + end)
        for index, (name, tensor) in enumerate(pretrained.items()):
            if index % 8 == seed % 8:
                file.seek(start + entries[name]["data_offsets"][0])
                made = tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
                file.write(made.contiguous().flatten().view(torch.uint8).numpy().data)


def on_disk(tasks: int, steps: int, dtype: str, folder: Path) -> dict[str, Any]:
    """Learns with experts and task vectors on disk; this process's memory from start to end."""
    device = torch.device("cpu")
    backbone = tower("ViT-B-32")
    state = {name: tensor for name, tensor in backbone.state_dict().items()}
    experts = folder / "experts"
    experts.mkdir()
    for index in range(tasks):
        write_sparse(experts / f"{index}.safetensors", state, index)
    files = sum(file.stat().st_size for file in experts.iterdir())
    before, start = resident("VmRSS"), time.perf_counter()
    pairs = ((f"t{i}", open_weights(experts / f"{i}.safetensors")) for i in range(tasks))
    kept = Storage(dtype, "disk", folder / "tau.safetensors")
    vectors = TaskVectors(state, pairs, share=True, storage=kept)
    built, after_build = time.perf_counter() - start, resident("VmHWM")
    bench = Bench(backbone, vectors, device)
    first = bench.method.coefficients.detach().clone()
    wall, cpu = [], []
    for _ in range(steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        bench.step(16)
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    moved = float((bench.method.coefficients.detach() - first).abs().max())
    return {
        **{"tasks": tasks, "experts": files, "tau": (folder / "tau.safetensors").stat().st_size},
        **{"before": before, "build": built, "build_peak": after_build, "moved": moved},
        **{"peak": resident("VmHWM"), "wall": wall, "cpu": cpu, "P": vectors.numel()},
    }


def disk_report(found: dict[str, Any], dtype: str, steps: int) -> str:
    def gigabytes(key: str) -> str:
        return f"{found[key] / 1e9:.2f} GB"

    return (
        f"## {found['tasks']} experts of ViT-B/32 on disk, τ in {dtype}\n\n"
        "| what | measured |\n|---|--:|\n"
        f"| expert files | {gigabytes('experts')} |\n"
        f"| file of task vectors | {gigabytes('tau')} |\n"
        f"| resident before (torch and one model) | {gigabytes('before')} |\n"
        f"| peak while the task vectors were written | {gigabytes('build_peak')} |\n"
        f"| **peak of the whole process** | **{gigabytes('peak')}** |\n"
        f"| writing the task vectors | {found['build']:.0f} s |\n"
        f"| a step, {found['tasks']} images, 16 at a time: wall, CPU (median of {steps}) | "
        f"{statistics.median(found['wall']):.1f} s, {statistics.median(found['cpu']):.1f} s |\n"
        f"| largest change of a coefficient | {found['moved']:.4f} |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--towers", nargs="+", default=list(TOWERS))
    parser.add_argument("--tasks", type=int, nargs="+", default=list(TASKS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--place", default="auto")
    parser.add_argument("--memory", type=float, default=12.0, help="GB that a setting may take")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--disk", type=int, default=None, metavar="T")
    parser.add_argument("--steps", type=int, default=3, help="with --disk")
    parser.add_argument("--folder", type=Path, default=None, help="with --disk: for its files")
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    parser.add_argument("--one", nargs=2, metavar=("TOWER", "T"), help=argparse.SUPPRESS)
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, tasks = arguments.one
        device = torch.device(arguments.device)
        found = one(name, int(tasks), arguments.dtype, arguments.place, device, arguments.peak)
        print(json.dumps(found["peak"] if arguments.peak else found))
        return
    if arguments.disk:
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            found = on_disk(arguments.disk, arguments.steps, arguments.dtype, folder)
        finally:
            shutil.rmtree(folder)
        text = disk_report(found, arguments.dtype, arguments.steps)
    else:
        text = sweep(arguments)
    head = (
        f"# Growth with T and P\n\n{date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} thread(s).\n\n"
        f"    python benchmarks/scale.py {' '.join(sys.argv[1:])}\n\n"
        "What is measured: see the top of `benchmarks/scale.py`.\n\n"
    )
    print(head + text)
    if arguments.out:
        arguments.out.write_text(head + text + "\n")


if __name__ == "__main__":
    main()
