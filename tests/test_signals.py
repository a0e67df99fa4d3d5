"""Label-free signals of logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adamerge.report.signals import by_task, mean, signals


def naive(logits: Tensor, expert: Tensor, view: Tensor) -> dict[str, float]:
    """The definitions as plain loops."""
    own, taught = logits.softmax(1).tolist(), expert.softmax(1).tolist()
    count, classes = len(own), len(own[0])
    names = [row.index(max(row)) for row in own]
    middle = [sum(row[c] for row in own) / count for c in range(classes)]
    entropy = -sum(p * math.log(p) for row in own for p in row) / count
    marginal = -sum(p * math.log(p) for p in middle)
    pairs = [pair for rows in zip(taught, own, strict=True) for pair in zip(*rows, strict=True)]
    return {
        "agreement": sum(n == t.index(max(t)) for n, t in zip(names, taught, strict=True)) / count,
        "divergence": sum(p * math.log(p / q) for p, q in pairs) / count,
        "entropy": entropy,
        "marginal_entropy": marginal,
        "mutual_information": marginal - entropy,
        "consistency": sum(int(a) == b for a, b in zip(view.argmax(1), names, strict=True)) / count,
        "top_share": max(map(names.count, names)) / count,
    }


def test_signals_are_what_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, expert, view = (2 * torch.randn(3, 20, 5, generator=generator).double()).unbind()
    assert signals(logits, expert, [view]) == pytest.approx(naive(logits, expert, view))
    assert set(naive(logits, expert, view)) - set(signals(logits)) == {
        *("agreement", "divergence", "consistency")
    }
    halves = signals(logits, None, [view, logits])["consistency"]
    assert halves == pytest.approx((1 + naive(logits, expert, view)["consistency"]) / 2)


def test_signals_of_certain_predictions_are_finite() -> None:
    sure = 200 * torch.eye(3)[[0, 0, 0, 1]]
    found = signals(sure, sure.half())
    assert found["agreement"] == 1 and found["top_share"] == 0.75
    assert [found["divergence"], found["entropy"]] == pytest.approx([0, 0], abs=1e-12)
    assert found["mutual_information"] == pytest.approx(-math.log(0.75**0.75 * 0.25**0.25))


def test_signals_by_task() -> None:
    logits = {"a": torch.eye(3), "b": torch.eye(2)}
    found = by_task(logits, {"a": torch.eye(3), "b": torch.eye(2).flip(0)}, [logits])
    assert found["agreement"] == {"a": 1, "b": 0} and mean(found["agreement"]) == 0.5
    assert found["consistency"] == {"a": 1, "b": 1}
