"""What a machine can do, and the least time a layer-wise step can take on it.

    floor = max(compute, traffic)
    compute = 3 · F / rate               F: FLOPs of the forward pass over all images of the step;
                                         a backward pass costs two forward passes
    traffic = (2 · T · P · s_τ + 4 · P · s_W) / bandwidth
                                         τ is read by the merge and by the contraction; the merged
                                         weights W and their gradient are each written and read once

T tasks, P parameters, s_τ and s_W bytes per number of task vectors and of merged weights. The rate
is of matrix products (FLOP/s), the bandwidth of copies (bytes/s, read and written). The seconds are
CPU seconds on a CPU, synchronised wall seconds on a GPU.

    OMP_NUM_THREADS=1 python benchmarks/hardware.py --device cpu
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SIZES = (1024, 2048, 4096)
COPY = 2**30  # bytes, beyond the caches
DTYPES = (torch.float32, torch.bfloat16)


def now(device: torch.device) -> float:
    """Process seconds on a CPU, synchronised wall seconds on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def _seconds(device: torch.device, work: Callable[[], object], repeats: int) -> list[float]:
    work()
    found = []
    for _ in range(repeats):
        start = now(device)
        work()
        found.append(now(device) - start)
    return found


def matrix_rate(
    device: torch.device, dtype: torch.dtype, repeats: int = 3, sizes: Sequence[int] = ()
) -> float:
    """FLOP/s of square matrix products of `dtype`: the best size, and its best repeat.

    The best, not the median: it stands for what the machine can do, in a floor.
    """
    rates = []
    for size in sizes or SIZES:
        left = torch.randn(size, size, device=device).to(dtype)
        right = torch.randn(size, size, device=device).to(dtype)
        out = torch.empty(size, size, device=device, dtype=dtype)
        product = functools.partial(torch.mm, left, right, out=out)
        found = _seconds(device, product, repeats)
        rates.append(2 * size**3 / min(found))
    return max(rates)


def copy_bandwidth(device: torch.device, size: int = COPY, repeats: int = 5) -> float:
    """Bytes/s of a copy of `size` bytes, each counted as read and as written; the median."""
    source = torch.zeros(size // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(_seconds(device, lambda: target.copy_(source), repeats))


@dataclass(frozen=True)
class Rates:
    """A device's measured rates: FLOP/s by dtype, and bytes/s."""

    flops: dict[torch.dtype, float]
    bandwidth: float

    @classmethod
    def measured(
        cls,
        device: torch.device,
        sizes: Sequence[int] = (),
        copied: int = COPY,
        dtypes: Sequence[torch.dtype] = DTYPES,
    ) -> Rates:
        """Of this device, now; some seconds on a CPU, minutes for a type it has no units for."""
        flops = {dtype: matrix_rate(device, dtype, sizes=sizes) for dtype in dtypes}
        return cls(flops, copy_bandwidth(device, copied))

    def __str__(self) -> str:
        parts = [f"{rate / 1e9:.0f} GFLOP/s {str(d)[6:]}" for d, rate in self.flops.items()]
        return f"{', '.join(parts)}, copies {self.bandwidth / 1e9:.1f} GB/s"


@dataclass(frozen=True)
class Step:
    """What a floor depends on; see the module's formula."""

    tasks: int
    parameters: int
    forward_flops: float  # of all images together
    dtype: torch.dtype = torch.float32  # of the products
    vector_bytes: float = 4  # s_τ
    weight_bytes: int = 4  # s_W


@dataclass(frozen=True)
class Floor:
    """The two terms, in seconds."""

    compute: float
    traffic: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.traffic)


def floor(step: Step, rates: Rates) -> Floor:
    """The least time of a step: no scheme that reads τ twice and computes all images is faster."""
    vectors = 2 * step.tasks * step.parameters * step.vector_bytes
    weights = 4 * step.parameters * step.weight_bytes
    return Floor(
        compute=3 * step.forward_flops / rates.flops[step.dtype],
        traffic=(vectors + weights) / rates.bandwidth,
    )


def forward_flops(tower: nn.Module, images: Tensor) -> int:
    """FLOPs of `tower(images)`, a product and a sum counted as two.

    The counter knows products, but not every fused kernel of every release of torch: attention is
    computed by products meanwhile, and the images require a gradient, without which a module may
    choose a fused path of its own.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        tower(images.detach().requires_grad_())
    return counter.get_total_flops()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(Rates.measured(torch.device(parser.parse_args().device)))
