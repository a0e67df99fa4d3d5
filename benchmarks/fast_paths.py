"""Attention and patches of a ViT on a CPU: torch's choice against `encoders.fast_paths`.

    OMP_NUM_THREADS=1 python benchmarks/fast_paths.py --out benchmarks/results/fast_paths_cpu.md

Forward and backward, CPU seconds, medians over rounds in which the two take turns.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from adamerge.encoders.fast_paths import PatchProduct

ROUNDS = 7
DTYPES = (torch.float32, torch.bfloat16)


def both(one: Callable[[], None], other: Callable[[], None]) -> tuple[float, float]:
    """Median milliseconds of each."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(ROUNDS + 1):
        for times, work in zip(found, (one, other), strict=True):
            start = time.process_time()
            work()
            if turn:
                times.append(1e3 * (time.process_time() - start))
    return statistics.median(found[0]), statistics.median(found[1])


def attention(tokens: int, images: int, dtype: torch.dtype) -> tuple[float, float]:
    shape = (images, 12, tokens, 64)
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, dtype=dtype)

    def own() -> None:
        scaled_dot_product_attention(query, key, value).backward(grad)

    def products() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            own()

    return both(own, products)


def patches(size: int, images: int, dtype: torch.dtype) -> tuple[float, float]:
    pictures = torch.randn(images, 3, 224, 224, dtype=dtype)
    grad = torch.randn(images, 768, 224 // size, 224 // size, dtype=dtype)
    kinds = (torch.nn.Conv2d, PatchProduct)
    made = [kind(3, 768, size, stride=size, bias=False, dtype=dtype) for kind in kinds]
    one, other = (lambda layer=layer: layer(pictures).backward(grad) for layer in made)
    return both(one, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--out", type=Path, default=None, help="also write the report here")
    arguments = parser.parse_args()
    lines = [
        f"# Attention and patches on a CPU\n\n{date.today()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} thread(s), {arguments.images} "
        f"images.\n\n    python benchmarks/fast_paths.py {' '.join(sys.argv[1:])}\n",
        "| forward and backward of | torch's choice | as plain products | ratio |",
        "|---|--:|--:|--:|",
    ]
    for dtype in DTYPES:
        for tokens in (50, 197, 257):
            own, ours = attention(tokens, arguments.images, dtype)
            title = f"attention, {tokens} tokens, 12 heads, {str(dtype)[6:]}"
            lines.append(f"| {title} | {own:.1f} ms | {ours:.1f} ms | {own / ours:.2f} × |")
        for size in (32, 16):
            own, ours = patches(size, arguments.images, dtype)
            title = f"patches of {size}, width 768, {str(dtype)[6:]}"
            lines.append(f"| {title} | {own:.1f} ms | {ours:.1f} ms | {own / ours:.2f} × |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
