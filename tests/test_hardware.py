"""The floors of `benchmarks/hardware.py`, against sums by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

FILE = Path(__file__).parents[1] / "benchmarks" / "hardware.py"


@pytest.fixture(scope="module")
def hardware() -> Any:
    spec = importlib.util.spec_from_file_location("bench_hardware", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_floor_is_the_larger_of_compute_and_traffic(hardware: Any) -> None:
    # 8 tasks, 10 parameters: τ is 80 numbers of 4 bytes, read twice: 640 bytes; W and its
    # gradient are 20 numbers, written and read once: 160 bytes in float32, 80 in bfloat16.
    rates = hardware.Rates({torch.float32: 50.0, torch.bfloat16: 5000.0}, bandwidth=100.0)
    full = hardware.floor(hardware.Step(8, 10, 1000.0), rates)
    assert (full.compute, full.traffic) == pytest.approx((60.0, 8.0))
    assert full.seconds == pytest.approx(60.0)
    step = hardware.Step(8, 10, 1000.0, torch.bfloat16, weight_bytes=2)
    half = hardware.floor(step, rates)
    assert (half.compute, half.traffic) == pytest.approx((0.6, 7.2))
    assert half.seconds == pytest.approx(7.2)


def test_forward_flops_counts_attention_and_linear_layers(hardware: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.linear = nn.Linear(8, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
            return self.linear(mixed)

    images, tokens, width = 2, 5, 8
    projections = 4 * 2 * images * tokens * width * width  # q, k, v and out
    attention = 2 * 2 * images * tokens * tokens * width  # scores, and the sum of values
    linear = 2 * images * tokens * width * 3
    block = Block().eval().requires_grad_(False)
    found = hardware.forward_flops(block, torch.randn(images, tokens, width))
    assert found == projections + attention + linear


def test_rates_are_positive_and_of_every_type(hardware: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(hardware, "SIZES", (64,))
    device = torch.device("cpu")
    clock = iter(range(100))
    monkeypatch.setattr(hardware, "now", lambda device: float(next(clock)))  # a second a look
    assert hardware.matrix_rate(device, torch.float32) == pytest.approx(2 * 64**3)
    assert hardware.copy_bandwidth(device, size=4096) == pytest.approx(8192)
