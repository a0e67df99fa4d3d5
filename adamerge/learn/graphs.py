"""Steps on a GPU recorded once as a CUDA graph and replayed, so that launches cost nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adamerge.learn.step import deliver

log = logging.getLogger("adamerge")

Compute = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor]]

_WARM_UP = 3  # steps before the recording: kernels are compiled and workspaces made
_TRIES = 2  # the first recording of a process may meet what is only then set up


class ReplayedSteps:
    """`compute` of a step, recorded when steps of the same shape follow each other, then replayed.

    The recording holds the merge, the forward and the backward pass with the contraction. Its
    memory is what a step takes, and stays taken. A batch of other sizes is computed as ever, and so
    is everything where recording is not possible; a log line says so.

    Args:
        compute: images, task ids and targets -> the loss, whose `backward()` fills the gradients
            of `learnables`, the value per task and the features, as `step_loss`.
        learnables: the tensors that are learned, on a GPU by the time of the first step.
    """

    def __init__(self, compute: Compute, learnables: Sequence[Tensor]) -> None:
        self._compute, self._learnables = compute, list(learnables)
        self._key: Any = None
        self._seen, self._failures = 0, 0
        self._recorded: _Recording | None = None

    def __call__(
        self, images: Tensor, task_ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `compute`."""
        if images.device.type != "cuda" or self._failures == _TRIES:
            return self._compute(images, task_ids, targets)
        key = _key(images, task_ids, targets)
        if self._recorded is None:
            self._seen = self._seen + 1 if key == self._key else 1
            self._key = key
            if self._seen > _WARM_UP:
                self._record(images, task_ids, targets)
        if self._recorded is None or key != self._key:
            return self._compute(images, task_ids, targets)
        return self._recorded.replay(images, targets)

    def _record(self, images: Tensor, task_ids: Tensor, targets: Tensor | None) -> None:
        try:
            self._recorded = _Recording(self._compute, self._learnables, images, task_ids, targets)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what cannot be recorded is computed as ever
            self._failures += 1
            if self._failures == _TRIES:
                reason = " ".join(str(error).split())
                log.info("steps are not recorded as a CUDA graph: %s", reason)


class _Recording:
    """One recorded step, with the tensors it reads and writes."""

    def __init__(
        self,
        compute: Compute,
        learnables: Sequence[Tensor],
        images: Tensor,
        task_ids: Tensor,
        targets: Tensor | None,
    ) -> None:
        self._images = images.clone()
        self._targets = None if targets is None else targets.clone()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            loss, values, features = compute(self._images, task_ids, self._targets)
            grads = torch.autograd.grad(loss, learnables, allow_unused=True)
        self._loss, self._values, self._features = loss.detach(), values, features
        self._pairs = [(p, g) for p, g in zip(learnables, grads, strict=True) if g is not None]

    def replay(self, images: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        self._images.copy_(images)
        if self._targets is not None and targets is not None:
            self._targets.copy_(targets)
        self._graph.replay()
        # Copies: the next replay writes where these are.
        loss = deliver(self._loss, [g.clone() for _, g in self._pairs], [p for p, _ in self._pairs])
        return loss, self._values.clone(), self._features.clone()


def _key(images: Tensor, task_ids: Tensor, targets: Tensor | None) -> tuple[Any, ...]:
    wanted = None if targets is None else (targets.shape, targets.dtype)
    autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    return images.shape, images.dtype, images.device, tuple(task_ids.tolist()), wanted, autocast
