"""ProDistill: coefficients of every weight, learned block by block from the experts' blocks."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import Images
from adamerge.methods.calibration.base import Calibration, Streams, Weights
from adamerge.transforms.layers import check_number

log = logging.getLogger("adamerge")


class ProDistill(Calibration):
    """Element-wise coefficients of each block, by its distance to the experts' blocks.

    Scalable Model Merging with Progressive Layer-wise Distillation (arXiv 2502.12706). Tokens x_t
    of task t's images run through the blocks merged so far, tokens y_t through expert t. Of one
    block after the other, with θ its weights in the merge,

        min over α of Σ_t Σ ‖block(x_t; θ + Σ_k α_k ∘ τ_k) − block(y_t; θ0 + τ_t)‖²

    is descended by Adam from α = 0, the sums over images, tokens and channels. On task arithmetic
    of 0.3 that is the paper's start, coefficients of 0.3; any other static merge will do as well.
    What lies outside the blocks stays as it was merged.

    It uses gradients within one block, and no labels: of T tasks and P weights a block, memory is
    that of about 5 T P numbers, and of the tokens of all images twice. An epoch costs what a pass
    of all images forward and backward through the tower does.

    Args:
        encoder: the merge, a static encoder; left unchanged.
        teacher: the T experts, untransformed.
        images: unlabeled, of every task, on the device that computes. A step takes the next batch
            of every task.
        epochs: how often all images are gone through, block by block.
        lr: Adam's learning rate.

    Raises:
        AdamergeError: a setting out of range, or an encoder that is not static or has no blocks.
    """

    follows_experts = True

    def __init__(
        self,
        encoder: nn.Module,
        teacher: Experts,
        images: Images,
        epochs: int = 100,
        lr: float = 0.01,
    ) -> None:
        super().__init__(encoder, teacher, images)
        check_number("prodistill", "epochs", epochs, 0, 1e6, whole=True)
        check_number("prodistill", "lr", lr, 0, 1e6)
        self.epochs, self.lr = epochs, lr

    def block(self, index: int, merged: Weights, ours: Streams, theirs: Streams) -> Weights:
        names = self.blocks.names(index)
        for task, parts in theirs.items():
            expert = self.experts.weights(task, parts[0].device, names)
            parts[:] = [self.blocks.run(index, expert, part) for part in parts]
        vectors = self.experts.task_vectors
        deltas = {n: vectors.deltas[n].to(t) for n, t in merged.items() if n in vectors.pretrained}
        with torch.enable_grad():
            learned, losses = self._learn(index, merged, deltas, ours, theirs)
        if losses:
            log.info("its distance to the experts' went from %.4g to %.4g", losses[0], losses[-1])
        return _moved(merged, learned, deltas)

    def _learn(
        self, index: int, merged: Weights, deltas: Weights, ours: Streams, theirs: Streams
    ) -> tuple[dict[str, Tensor], list[float]]:
        """α of each layer, `[T, *shape]`, and the loss at every step."""
        learned = {name: torch.zeros_like(tau) for name, tau in deltas.items()}
        optimizer = torch.optim.Adam(learned.values(), lr=self.lr)
        losses = []
        for step in range(self.epochs * max(map(len, ours.values()))):
            weights = {**merged, **_moved(merged, learned, deltas)}
            for name in deltas:
                weights[name].requires_grad_()
            total = torch.zeros(())
            for task, parts in ours.items():
                place = step % len(parts)
                found = self.blocks.run(index, weights, parts[place])
                loss = (found - theirs[task][place]).square().sum()
                loss.backward()
                total = total + loss.detach()
            for name, tau in deltas.items():
                grad = weights[name].grad
                learned[name].grad = None if grad is None else grad * tau
            optimizer.step()
            losses.append(float(total))
        return learned, losses


@torch.no_grad()
def _moved(merged: Weights, learned: Weights, deltas: Weights) -> dict[str, Tensor]:
    """`θ + Σ_t α_t ∘ τ_t` of every layer that an expert changed."""
    return {name: merged[name] + (learned[name] * tau).sum(0) for name, tau in deltas.items()}
