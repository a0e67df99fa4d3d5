"""Label-free signals: what unlabeled images tell of a merge, alone and beside its experts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adamerge.encoders.clip import Normalizer
from adamerge.encoders.heads import Heads
from adamerge.learn.losses import expert_kl, sample_entropy
from adamerge.report.preflight import predictions

ByTask = dict[str, dict[str, float]]  # signal -> task -> value


@torch.no_grad()
def signals(
    logits: Tensor, expert_logits: Tensor | None = None, views: Sequence[Tensor] = ()
) -> dict[str, float]:
    """Signals of one task's images by name, of this process alone; entropies in nats.

    - `agreement`: share of images on which merge and expert name the same class;
    - `divergence`: mean KL divergence from the expert's predictions to the merge's;
    - `entropy`: mean entropy of the predictions;
    - `marginal_entropy`: entropy of the mean prediction, at most log C;
    - `mutual_information`: marginal entropy minus entropy, what a prediction tells of its image;
    - `consistency`: share of images and views of them that are given the same class;
    - `top_share`: share of images that are given the most frequent class.

    >>> merge, expert = torch.eye(2)[[0, 1, 1, 1]], torch.eye(2)[[0, 1, 1, 0]]
    >>> found = signals(9 * merge, 9 * expert)
    >>> found["agreement"], found["top_share"]
    (0.75, 0.75)

    Args:
        logits: of the merge, `[n, C]`.
        expert_logits: of the task's expert, `[n, C]`; without them the first two are left out.
        views: logits of the merge for augmented copies of the same images, `[n, C]` each; without
            them `consistency` is left out.
    """
    logits = logits.double()
    chosen, probabilities = logits.argmax(1), logits.softmax(1)
    entropy = float(sample_entropy(logits).mean())
    marginal = float(torch.special.entr(probabilities.mean(0)).sum())
    found = {}
    if expert_logits is not None:
        found["agreement"] = float((chosen == expert_logits.argmax(1)).double().mean())
        found["divergence"] = float(expert_kl(logits, expert_logits.double()))
    found |= {"entropy": entropy, "marginal_entropy": marginal}
    found["mutual_information"] = marginal - entropy
    if views:
        same = torch.stack([chosen == view.argmax(1) for view in views])
        found["consistency"] = float(same.double().mean())
    found["top_share"] = float(chosen.bincount().max()) / len(chosen)
    return found


def by_task(
    logits: Mapping[str, Tensor],
    expert_logits: Mapping[str, Tensor] | None = None,
    views: Sequence[Mapping[str, Tensor]] = (),
) -> ByTask:
    """`signals` of every task's logits, as signal -> task -> value."""
    found: ByTask = {}
    for task, own in logits.items():
        expert = None if expert_logits is None else expert_logits[task]
        for name, value in signals(own, expert, [view[task] for view in views]).items():
            found.setdefault(name, {})[task] = value
    return found


def mean(values: Mapping[str, float]) -> float:
    """Over tasks."""
    return sum(values.values()) / len(values)


@dataclass
class Watched:
    """Images of every task that signals are measured on, and what the experts say of them.

    Attributes:
        pixels: task -> uint8 `[n, 3, H, W]`.
        expert_logits: task -> `[n, C]` of the task's expert, once.
        device: where encoders run.
    """

    pixels: Mapping[str, Tensor]
    expert_logits: Mapping[str, Tensor]
    normalizer: Normalizer
    device: torch.device

    @functools.cached_property
    def _zoomed(self) -> dict[str, Tensor]:
        return {task: zoom(pixels) for task, pixels in self.pixels.items()}

    def of(self, encoder: nn.Module, heads: Heads) -> ByTask:
        """Signals of a merge; its view of the images is the middle of each, enlarged."""
        own, view = (
            dict(predictions(encoder, heads, self.normalizer, pixels, self.device))
            for pixels in (self.pixels, self._zoomed)
        )
        return by_task(own, self.expert_logits, [view])

    def of_experts(self) -> ByTask:
        """Those of the experts, each on its own task."""
        return by_task(self.expert_logits)


def zoom(pixels: Tensor) -> Tensor:
    """Images without a sixteenth of their size at each edge, enlarged to that size again; uint8."""
    height, width = pixels.shape[-2:]
    up, left = max(height // 16, 1), max(width // 16, 1)
    middle = pixels[..., up : height - up, left : width - left].float()
    larger = nn.functional.interpolate(middle, (height, width), mode="bilinear")
    return larger.round().to(torch.uint8)
