"""One adaptation step: the loss, and its gradient in the learnables."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adamerge._base.errors import AdamergeError
from adamerge.learn.objectives import Objective
from adamerge.methods.base import MergeMethod

Encode = Callable[[Tensor, Tensor], Tensor]


def step_loss(
    method: MergeMethod,
    objective: Objective,
    images: Tensor,
    task_ids: Tensor,
    micro_batch: int | None = None,
    targets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one step; its `backward()` fills the gradients of the learnables.

    With `micro_batch` the images are encoded that many at a time, with the activations of one
    micro-batch in memory and the weights merged once; the gradient is the same up to rounding. An
    objective that is not additive (infomax) then costs one more forward pass, to know its
    gradient in the features first.

    Args:
        method: the method to learn.
        objective: `(features, task_ids) -> [T]`.
        images: `[B, 3, H, W]`, normalised, of any mix of tasks (or what else the method encodes).
        task_ids: `[B]`, indices into the objective's tasks, best kept on the CPU.
        micro_batch: images at a time; None for all together.
        targets: `objective.targets` of the images, a row each, if known; else it is asked here.

    Returns:
        The weighted loss `[]`, the objective's value per task `[T]` and the features `[B, D]`;
        the last two detached.

    Raises:
        AdamergeError: micro-batches with a method that looks at the batch as a whole.
    """
    encode = method.trace if objective.traces else method.encode
    whole = micro_batch is None or micro_batch >= len(images)
    size = len(images) if whole or micro_batch is None else micro_batch
    chunks = list(zip(images.split(size), task_ids.split(size), strict=True))
    if targets is None:
        asked = [objective.targets(*chunk) for chunk in chunks]
        targets = torch.cat([t for t in asked if t is not None]) if asked[0] is not None else None
    if not whole and method.mixes_images:
        raise refused_micro_batch()
    # Micro-batches add their gradients up, which half precision would round every time.
    with contextlib.nullcontext() if whole else _full_precision(images):
        weights = method.weights()
    if whole and not any(w.requires_grad and w.grad_fn is not None for w in weights.values()):
        features = encode(weights, images, task_ids)  # nothing is merged: one graph will do
        values = objective(features, task_ids, targets=targets)
        return objective.weigh(values), values.detach(), objective.final(features.detach())
    shared = Shared(weights, list(method.parameters()))
    del weights
    backward = _additive_backward if objective.additive else _two_pass_backward
    backward = _whole_backward if whole else backward
    run = functools.partial(encode, shared.leaves)
    values, features = backward(run, shared, objective, chunks, task_ids, targets)
    shared.finish()
    learned = [
        (p, g) for p, g in zip(shared.learnables, shared.grads, strict=True) if g is not None
    ]
    loss = deliver(
        objective.weigh(values), [grad for _, grad in learned], [tensor for tensor, _ in learned]
    )
    return loss, values, objective.final(features)


def _full_precision(like: Tensor) -> torch.autocast:
    return torch.autocast(like.device.type, enabled=False)


def refused_micro_batch() -> AdamergeError:
    """What is said of micro-batches with a method that looks at the batch as a whole."""
    return AdamergeError(
        "method.batch_gate averages over the batch, which micro_batch would cut: set micro_batch "
        "to null, or method.batch_gate to false"
    )


def _whole_backward(
    encode: Encode,
    shared: Shared,
    objective: Objective,
    chunks: list[tuple[Tensor, Tensor]],
    task_ids: Tensor,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All images together."""
    shared.expect_last()
    features = encode(*chunks[0])
    values = objective(features, task_ids, targets=targets)
    with _full_precision(features):
        torch.autograd.backward(objective.weigh(values))
    return values.detach(), features.detach()


def _additive_backward(
    encode: Encode,
    shared: Shared,
    objective: Objective,
    chunks: list[tuple[Tensor, Tensor]],
    task_ids: Tensor,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Every micro-batch forward and backward in turn; gradients add up in the leaves."""
    counts = dict(enumerate(torch.bincount(task_ids.cpu()).tolist()))
    parts, total, start = [], None, 0
    for number, (images, ids) in enumerate(chunks, 1):
        if number == len(chunks):
            shared.expect_last()
        features = encode(images, ids)
        wanted = None if targets is None else targets[start : start + len(ids)]
        values = objective(features, ids, counts, wanted)
        start += len(ids)
        with _full_precision(images):
            torch.autograd.backward(objective.weigh(values))
        parts.append(features.detach())
        total = values.detach() if total is None else total + values.detach()
    assert total is not None  # split never returns an empty tuple
    return total, torch.cat(parts)


def _two_pass_backward(
    encode: Encode,
    shared: Shared,
    objective: Objective,
    chunks: list[tuple[Tensor, Tensor]],
    task_ids: Tensor,
    targets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Features without a graph, the objective's gradient in them, then each micro-batch again."""
    with torch.no_grad():
        features = torch.cat([encode(images, ids) for images, ids in chunks])
    features.requires_grad_()
    values = objective(features, task_ids, targets=targets)
    with _full_precision(features):
        (gradient,) = torch.autograd.grad(objective.weigh(values), features)
    parts = gradient.split([len(images) for images, _ in chunks])
    for number, ((images, ids), part) in enumerate(zip(chunks, parts, strict=True), 1):
        if number == len(chunks):
            shared.expect_last()
        encoded = encode(images, ids)
        with _full_precision(images):
            torch.autograd.backward(encoded, part)
    return values.detach(), features.detach()


def deliver(loss: Tensor, grads: Sequence[Tensor], learnables: Sequence[Tensor]) -> Tensor:
    """A loss whose gradients in the learnables are known: its `backward()` hands them over.

    Args:
        grads: one for each learnable; changed in place when handed over.
    """
    delivered: Tensor = _Delivered.apply(loss, list(grads), *learnables)
    return delivered


class _Delivered(torch.autograd.Function):
    """A loss whose gradients are already known: hands them to the learnables on backward.

    So a step looks to the optimizer, to gradient hooks and to DDP like any other
    loss: one backward pass, one gradient per learnable.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *shared: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[grad.mul_(outer.to(grad.dtype)) for grad in ctx.grads]


class Shared:
    """Merged weights cut off from the learnables, with their gradients handed back as they come.

    `leaves` stand in for the weights while images are encoded. Weights that were merged together
    hand their gradients back together, in the backward pass of the last images, as soon as the
    last of them is there; then these weights and gradients are dropped. So all weights and all of
    their gradients are never in memory together.

    Args:
        weights: functions of the learnables, and constants.
        learnables: what is learned.

    Raises:
        AdamergeError: on `finish`, a learnable that had a part in the loss past the weights.

    Attributes:
        leaves: name -> a leaf of the same value, until its gradient is handed back.
        grads: the gradient of each learnable so far, in order.
    """

    def __init__(self, weights: Mapping[str, Tensor], learnables: Sequence[Tensor]) -> None:
        self.leaves = {n: w.detach().requires_grad_(w.requires_grad) for n, w in weights.items()}
        self.learnables = [tensor for tensor in learnables if tensor.requires_grad]
        self.grads: list[Tensor | None] = [None] * len(self.learnables)
        self._weights = {name: w for name, w in weights.items() if w.requires_grad}
        # Gradients of an earlier step, which may have to be added to: out of the way meanwhile.
        self._before = [tensor.grad for tensor in self.learnables]
        for tensor in self.learnables:
            tensor.grad = None
        self._together: dict[object, list[str]] = {}
        for name, weight in self._weights.items():
            node = weight.grad_fn if weight.grad_fn is not None else weight
            self._together.setdefault(node, []).append(name)

    def expect_last(self) -> None:
        """The backward pass that comes is that of the last images."""
        for names in self._together.values():
            missing = set(names)
            for name in names:
                self._when_there(name, names, missing)

    def _when_there(self, name: str, names: list[str], missing: set[str]) -> None:
        def arrived(leaf: Tensor) -> None:
            missing.discard(name)
            if not missing:
                self._hand_back(names)

        self.leaves[name].register_post_accumulate_grad_hook(arrived)

    def finish(self) -> None:
        """Hands back what is left: of groups with a weight that had no part in the loss."""
        for names in self._together.values():
            self._hand_back([name for name in names if name in self._weights])
        self._weights.clear()
        self.leaves.clear()  # whose hooks know this object: a circle that would outlive the step
        past = any(tensor.grad is not None for tensor in self.learnables)
        for tensor, grad in zip(self.learnables, self._before, strict=True):
            tensor.grad = grad
        if past:
            raise AdamergeError(
                "the method's encode uses a learnable itself, whose gradient would be lost: return "
                "it from weights() too, and use what encode is given"
            )

    def _hand_back(self, names: list[str]) -> None:
        there = [name for name in names if self.leaves[name].grad is not None]
        if not there:
            return
        found = torch.autograd.grad(
            [self._weights[name] for name in there],
            self.learnables,
            [self.leaves[name].grad for name in there],
            retain_graph=True,  # other weights share the way from here on
            allow_unused=True,
        )
        for name in names:
            # Autograd knows the leaf until the whole backward pass is over; its memory goes now.
            leaf = self.leaves.pop(name)
            leaf.grad, leaf.data = None, leaf.data.new_empty(0)
            del self._weights[name]
        for index, grad in enumerate(found):
            known = self.grads[index]
            if grad is not None:
                self.grads[index] = grad if known is None else known + grad
