"""Each equation once more as plain loops: slow, obvious, independent of the package."""

from __future__ import annotations

import torch
from torch import Tensor

State = dict[str, Tensor]


def merge(pretrained: State, experts: dict[str, State], coefficients: Tensor) -> State:
    """θ0_l + Σ_t λ[t, l] (θ_t,l − θ0_l), tensor by tensor, task by task; plain autograd."""
    merged = {}
    for layer, (name, base) in enumerate(pretrained.items()):
        total = base
        for row, expert in enumerate(experts.values()):
            total = total + coefficients[row, layer] * (expert[name] - base)
        merged[name] = total
    return merged


def entropy(logits: Tensor) -> Tensor:
    """−Σ p log p of every row, averaged over rows."""
    rows = []
    for row in logits:
        probabilities = torch.exp(row) / torch.exp(row).sum()
        rows.append(-sum(p * torch.log(p) for p in probabilities))
    return torch.stack(rows).mean()


def infomax(logits: Tensor) -> Tensor:
    """Mean entropy minus the entropy of the mean prediction."""
    mean = torch.stack([torch.exp(row) / torch.exp(row).sum() for row in logits]).mean(0)
    return entropy(logits) + sum(p * torch.log(p) for p in mean)


def ties(deltas: list[Tensor], density: float) -> list[Tensor]:
    """Trim, elect signs, keep agreeing entries; on flat vectors, entry by entry."""
    trimmed = []
    for delta in deltas:
        ranked = sorted(abs(float(x)) for x in delta)
        threshold = ranked[max(1, len(ranked) - int(density * len(ranked))) - 1]
        trimmed.append([float(x) if abs(float(x)) >= threshold else 0.0 for x in delta])
    sums = [sum(column) for column in zip(*trimmed, strict=True)]
    signs = [(s > 0) - (s < 0) for s in sums]
    balance = (sum(signs) > 0) - (sum(signs) < 0)
    elected = [sign if sign != 0 else balance for sign in signs]
    kept = []
    for vector in trimmed:
        pairs = zip(vector, elected, strict=True)
        kept.append([x if (x > 0) - (x < 0) == sign else 0.0 for x, sign in pairs])
    return [torch.tensor(vector, dtype=torch.float64) for vector in kept]


def expert_kl(logits: Tensor, expert_logits: Tensor, temperature: float) -> Tensor:
    """T² Σ p log(p / q) of every row, averaged over rows."""
    rows = []
    for row, wanted in zip(logits / temperature, expert_logits / temperature, strict=True):
        q, p = torch.exp(row) / torch.exp(row).sum(), torch.exp(wanted) / torch.exp(wanted).sum()
        rows.append(sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True)))
    return temperature**2 * torch.stack(rows).mean()


def gated_linear(hidden: Tensor, gates: Tensor, weight: Tensor, deltas: Tensor) -> Tensor:
    """One group after the other, one task after the other; plain autograd."""
    outputs = []
    for tokens, gate in zip(hidden, gates, strict=True):
        merged = weight
        for number, delta in zip(gate, deltas, strict=True):
            merged = merged + number * delta
        outputs.append(torch.stack([merged @ token for token in tokens]))
    return torch.stack(outputs)


def largest(delta: Tensor, density: float) -> Tensor:
    """Entries above the interpolated quantile of the magnitudes, found by sorting."""
    ranked = sorted(abs(float(x)) for x in delta.flatten())
    place = (1 - density) * (len(ranked) - 1)
    low, high = ranked[int(place)], ranked[min(int(place) + 1, len(ranked) - 1)]
    threshold = low + (place - int(place)) * (high - low)
    return torch.where(delta.abs() > threshold, delta, 0)


def adapted(features: Tensor, down: list[Tensor], up: list[Tensor], ids: list[int]) -> Tensor:
    """z − up relu(down z), image by image."""
    rows = [z - up[t] @ torch.relu(down[t] @ z) for z, t in zip(features, ids, strict=True)]
    return torch.stack(rows)
