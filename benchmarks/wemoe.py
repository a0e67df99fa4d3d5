"""MLPs merged anew for every image (WEMoE) against a loop over the images, in one run.

    OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 \
        python benchmarks/wemoe.py

- ours: `adamerge.methods.gated.gated_linear`, dense or with sparse task vectors (density 0.1);
- loop: per image `θ0 + Σ_t g_t τ_t`, a product and a sum per task, then the MLP, by autograd;
- loop, matrix-vector: the same with the sum as one product of the gates and the task vectors;
- identity: `h θ0ᵀ + Σ_t g_t (h τ_tᵀ)`, T + 1 products without merging, by autograd.

One MLP of the tower (width → 4 · width → width, GELU), gates and hidden states with gradients; the
gradients are compared. Times are CPU seconds (process time; device-synchronised wall seconds on a
GPU), the median over rounds in which the schemes take turns. Memory is measured by further
processes that give every tensor back when it is freed (see `meters.LIVE`): the peak of forward and
backward through a stack of MLPs beyond that of the same stack with static weights. A loop's memory
grows with the images: with 64 it is timed 16 images at a time, backward included.
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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from meters import LIVE
from torch import Tensor
from torch.nn.functional import gelu, linear

from adamerge.methods.gated import Deltas, DenseDeltas, SparseDeltas, gated_linear, largest

SHAPES = {"ViT-B/32": (768, 50), "ViT-L/14": (1024, 257)}
AT_ONCE = 16  # images of a loop before its backward: 64 of one MLP would keep 18 GB
Layer = tuple[Tensor, Tensor]  # θ0 [out, in] and τ [T, out, in]


@dataclass
class Setting:
    """The two layers of one MLP, their task vectors in both forms, hidden states and gates."""

    layers: list[Layer]
    dense: list[Deltas]
    sparse: list[Deltas]
    hidden: Tensor
    gates: Tensor

    @classmethod
    def make(cls, shape: str, tasks: int, batch: int, device: str, sparse: bool = True) -> Setting:
        width, tokens = SHAPES[shape]
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        layers = []
        for out, columns in ((4 * width, width), (width, 4 * width)):
            layers.append((draw(out, columns) / columns**0.5, 1e-3 * draw(tasks, out, columns)))
        few: list[Deltas] = [SparseDeltas.of(largest(d, 0.1)) for _, d in layers if sparse]
        hidden, gates = draw(batch, tokens, width), 0.3 + 0.1 * draw(batch, tasks)
        return cls(layers, [DenseDeltas(d) for _, d in layers], few, hidden, gates)


def ours(setting: Setting, hidden: Tensor, gates: Tensor, deltas: list[Deltas]) -> Tensor:
    (first, _), (second, _) = setting.layers
    inner = gelu(gated_linear(hidden, gates, first, deltas[0]))
    return gated_linear(inner, gates, second, deltas[1])


def loop(setting: Setting, hidden: Tensor, gates: Tensor) -> Tensor:
    outputs = []
    for tokens, gate in zip(hidden, gates, strict=True):
        weights = []
        for base, deltas in setting.layers:
            merged = base
            for number, delta in zip(gate, deltas, strict=True):
                merged = merged + number * delta
            weights.append(merged)
        outputs.append(linear(gelu(linear(tokens, weights[0])), weights[1]))
    return torch.stack(outputs)


def loop_matvec(setting: Setting, hidden: Tensor, gates: Tensor) -> Tensor:
    outputs = []
    for tokens, gate in zip(hidden, gates, strict=True):
        weights = [b + (gate @ d.flatten(1)).view(b.shape) for b, d in setting.layers]
        outputs.append(linear(gelu(linear(tokens, weights[0])), weights[1]))
    return torch.stack(outputs)


def identity(setting: Setting, hidden: Tensor, gates: Tensor) -> Tensor:
    for place, (base, deltas) in enumerate(setting.layers):
        total = linear(hidden, base)
        for task, delta in enumerate(deltas):
            total = total + gates[:, task, None, None] * linear(hidden, delta)
        hidden = total if place else gelu(total)
    return hidden


def static(setting: Setting, hidden: Tensor, gates: Tensor) -> Tensor:
    (first, _), (second, _) = setting.layers
    return linear(gelu(linear(hidden, first)), second)


Scheme = Callable[[Setting, Tensor, Tensor], Tensor]
SCHEMES: dict[str, Scheme] = {
    "ours": lambda s, h, g: ours(s, h, g, s.dense),
    "ours, density 0.1": lambda s, h, g: ours(s, h, g, s.sparse),
    "loop": loop,
    "loop, matrix-vector": loop_matvec,
    "identity": identity,
}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(setting: Setting, scheme: Scheme) -> tuple[float, float, Tensor]:
    """Seconds of a forward without gradients, of forward and backward, and the gates' gradient."""
    device = setting.hidden.device.type
    start = now(device)
    with torch.no_grad():
        scheme(setting, setting.hidden, setting.gates)
    forward = now(device) - start
    hidden = setting.hidden.clone().requires_grad_()
    gates = setting.gates.clone().requires_grad_()
    start = now(device)
    size = AT_ONCE if scheme in (loop, loop_matvec) else len(gates)
    for h, g in zip(hidden.split(size), gates.split(size), strict=True):
        (scheme(setting, h, g).square().sum() / hidden.numel()).backward()
    both = now(device) - start
    assert gates.grad is not None
    return forward, both, gates.grad


def report(
    shape: str, tasks: int, batch: int, device: str, rounds: int, without: tuple[str, ...] = ()
) -> str:
    """The table of one shape and batch, in Markdown."""
    schemes = {name: scheme for name, scheme in SCHEMES.items() if name not in without}
    setting = Setting.make(shape, tasks, batch, device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in schemes}
    gradients = {}
    for turn in range(rounds + 1):  # the first is a warm-up
        for name, scheme in schemes.items():
            forward, both, gradients[name] = measure(setting, scheme)
            if turn:
                seconds[name].append((forward, both))
    medians = {
        n: [statistics.median(part) for part in zip(*s, strict=True)] for n, s in seconds.items()
    }
    width, tokens = SHAPES[shape]
    lines = [
        f"## {shape}: width {width}, {tokens} tokens, T = {tasks}, B = {batch}, {device}",
        "",
        "| scheme | forward | ÷ ours | forward + backward | ÷ ours | gate-gradient difference |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (forward, both) in medians.items():
        other = gradients[name] - gradients["loop"]
        off = float(other.abs().max() / gradients["loop"].abs().max())
        lines.append(
            f"| {name} | {forward:.3f} s | {forward / medians['ours'][0]:.2f} × | {both:.3f} s | "
            f"{both / medians['ours'][1]:.2f} × | "
            + ("other τ |" if "density" in name else f"{off:.1e} |")
        )
    return "\n".join(lines)


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def peak(shape: str, tasks: int, batch: int, blocks: int, scheme: Scheme, device: str) -> int:
    """Peak bytes of forward and backward through `blocks` MLPs one after the other."""
    setting = Setting.make(shape, tasks, batch, device, sparse=False)
    hidden = setting.hidden.requires_grad_()
    gates = setting.gates.requires_grad_()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
    for _ in range(blocks):
        hidden = hidden + scheme(setting, hidden, gates)
    hidden.square().mean().backward()
    after = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")
    return after - before


def memory(shape: str, tasks: int, batch: int, blocks: int, device: str, loops: bool) -> str:
    """Peaks beyond static weights, each in a process of its own, in Markdown."""
    found = {}
    for name in ("static", "ours", *(["loop"] if loops else [])):
        command = [sys.executable, __file__, "--memory", name, shape, str(batch), str(blocks)]
        command += ["--tasks", str(tasks), "--device", device]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | LIVE
        answer = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        found[name] = json.loads(answer.stdout.splitlines()[-1])
    lines = [
        f"## Memory of {blocks} MLP(s) of {shape}, T = {tasks}, B = {batch}, {device}",
        "",
        "| scheme | peak beyond static weights |",
        "|---|--:|",
    ]
    for name in found:
        if name != "static":
            lines.append(f"| {name} | {(found[name] - found['static']) / 1e9:.3f} GB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tasks, device = arguments.tasks, arguments.device
    if arguments.memory:
        name, shape, batch, blocks = arguments.memory
        scheme = static if name == "static" else SCHEMES[name]
        print(json.dumps(peak(shape, tasks, int(batch), int(blocks), scheme, device)))
        return
    parts = [
        f"# MLPs merged anew for every image, five schemes\n\n{date.today()}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} "
        f"thread(s), median of {arguments.rounds} rounds, one MLP.\n\n"
        f"    python benchmarks/wemoe.py {' '.join(sys.argv[1:])}",
        memory("ViT-B/32", tasks, AT_ONCE, 1, device, True),
        memory("ViT-B/32", tasks, 64, 1, device, False),
        memory("ViT-B/32", tasks, 64, 12, device, False),
        report("ViT-B/32", tasks, 16, device, arguments.rounds),
        report("ViT-B/32", tasks, 64, device, 1, ("identity",)),
        report("ViT-L/14", tasks, 16, device, 1, ("identity",)),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
