"""One adaptation step: the loss, and its gradient in the learnables."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.encoders.rows import Inputs
from adamerge.learn.objectives import Objective
from adamerge.methods.base import MergeMethod, tracing


def step_loss(
    method: MergeMethod,
    objective: Objective,
    inputs: Inputs,
    task_ids: Tensor,
    micro_batch: int | None = None,
    targets: Tensor | None = None,
    image_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one step; its `backward()` fills the gradients of the learnables.

    With `micro_batch` the inputs are encoded that many at a time, with the activations of one
    micro-batch in memory and the weights merged once; the gradient is the same up to rounding. An
    objective that is not additive (infomax) then costs one more forward pass, to know its
    gradient in the features first.

    >>> network, a, b = (nn.Linear(4, 3) for _ in range(3))
    >>> vectors = adamerge.TaskVectors(network, {"a": a, "b": b})
    >>> method = adamerge.methods.AdaMerging(network, vectors)
    >>> objective = adamerge.objectives.Entropy({"a": nn.Linear(3, 2), "b": nn.Linear(3, 5)})
    >>> loss, *_ = step_loss(method, objective, torch.randn(8, 4), torch.tensor([0, 1] * 4))
    >>> loss.backward(); method.coefficients.grad.shape
    torch.Size([2, 2])

    Args:
        method: the method to learn.
        objective: `(features, task_ids) -> [T]`; what it learns itself gets its gradient as well.
        inputs: of any mix of tasks: images `[B, 3, H, W]`, normalised, or what else the method
            encodes, see `encoders.rows`.
        task_ids: `[B]`, indices into the objective's tasks, best kept on the CPU.
        micro_batch: inputs at a time; None for all together.
        targets: `objective.targets` of the inputs, a row each, if known; else it is asked here.
        image_ids: `[B]`, which image of its task each is, for objectives that ask for it.

    Returns:
        The weighted loss `[]`, the objective's value per task `[T]` and the features `[B, D]`;
        the last two detached.

    Raises:
        AdamergeError: micro-batches with a method that looks at the batch as a whole; what the
            method or the objective forgot.
    """
    encode = tracing(method).trace if objective.traces else method.encode
    count, device = rows.count(inputs), rows.tensors(inputs)[0].device
    whole = micro_batch is None or micro_batch >= count
    size = count if whole or micro_batch is None else micro_batch
    chunks = list(zip(rows.split(inputs, size), task_ids.split(size), strict=True))
    if targets is None:
        asked = [objective.targets(*chunk) for chunk in chunks]
        targets = torch.cat([t for t in asked if t is not None]) if asked[0] is not None else None
    if not whole and method.mixes_images:
        raise refused_micro_batch()
    given = {"targets": targets, "image_ids": image_ids}
    known = {name: tensor for name, tensor in given.items() if tensor is not None}
    # Micro-batches add their gradients up, which half precision would round every time.
    with contextlib.nullcontext() if whole else _full_precision(device):
        weights = method.shared_weights()
    if whole and not any(w.requires_grad and w.grad_fn is not None for w in weights.values()):
        features = rows.features(encode(weights, inputs, task_ids), count)
        values = objective(features, task_ids, **known)  # nothing is merged: one graph will do
        return objective.loss(values), values.detach(), objective.final(features.detach())
    shared = Shared(weights, learnables(method), learnables(objective))
    del weights
    backward = _additive_backward if objective.additive else _two_pass_backward
    backward = _whole_backward if whole else backward
    run = functools.partial(encode, shared.leaves)
    values, features = backward(_Step(run, shared, objective, chunks, task_ids, known))
    shared.finish()
    learned = [
        (p, g) for p, g in zip(shared.learnables, shared.grads, strict=True) if g is not None
    ]
    loss = deliver(
        objective.weigh(values), [grad for _, grad in learned], [tensor for tensor, _ in learned]
    )
    return loss, values, objective.final(features)


def learnables(*modules: nn.Module) -> list[Tensor]:
    """What a method, or an objective, learns: the parameters that require a gradient, each once."""
    found = [parameter for module in modules for parameter in module.parameters()]
    return [p for p in dict.fromkeys(found) if p.requires_grad]


def _full_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, enabled=False)


def refused_micro_batch() -> AdamergeError:
    """What is said of micro-batches with a method that looks at the batch as a whole."""
    return AdamergeError(
        "method.batch_gate averages over the batch, which micro_batch would cut: set micro_batch "
        "to null, or method.batch_gate to false"
    )


@dataclass
class _Step:
    """What the ways to go backward share: see `step_loss`."""

    encode: Callable[[Any, Tensor], Tensor]
    shared: Shared
    objective: Objective
    chunks: list[tuple[Inputs, Tensor]]
    task_ids: Tensor
    known: Mapping[str, Tensor]

    def features(self, inputs: Inputs, ids: Tensor) -> Tensor:
        return rows.features(self.encode(inputs, ids), len(ids))

    def backward(self, values: Tensor) -> None:
        with _full_precision(values.device):
            torch.autograd.backward(self.objective.loss(values))


def _whole_backward(step: _Step) -> tuple[Tensor, Tensor]:
    """All inputs together."""
    step.shared.expect_last()
    features = step.features(*step.chunks[0])
    values = step.objective(features, step.task_ids, **step.known)
    step.backward(values)
    return values.detach(), features.detach()


def _additive_backward(step: _Step) -> tuple[Tensor, Tensor]:
    """Every micro-batch forward and backward in turn; gradients add up in the leaves."""
    counts = dict(enumerate(torch.bincount(step.task_ids.cpu()).tolist()))
    parts, total, start = [], None, 0
    for number, (inputs, ids) in enumerate(step.chunks, 1):
        if number == len(step.chunks):
            step.shared.expect_last()
        features = step.features(inputs, ids)
        own = {name: tensor[start : start + len(ids)] for name, tensor in step.known.items()}
        values = step.objective(features, ids, counts, **own)
        start += len(ids)
        step.backward(values)
        parts.append(features.detach())
        total = values.detach() if total is None else total + values.detach()
    assert total is not None  # split never returns an empty tuple
    return total, torch.cat(parts)


def _two_pass_backward(step: _Step) -> tuple[Tensor, Tensor]:
    """Features without a graph, the objective's gradient in them, then each micro-batch again."""
    with torch.no_grad():
        features = torch.cat([step.features(*chunk) for chunk in step.chunks])
    features.requires_grad_()
    values = step.objective(features, step.task_ids, **step.known)
    step.backward(values)
    assert features.grad is not None
    parts = features.grad.split([len(ids) for _, ids in step.chunks])
    for number, ((inputs, ids), part) in enumerate(zip(step.chunks, parts, strict=True), 1):
        if number == len(step.chunks):
            step.shared.expect_last()
        encoded = step.encode(inputs, ids)
        with _full_precision(features.device):
            torch.autograd.backward(encoded, part)
    return values.detach(), features.detach()


def deliver(loss: Tensor, grads: Sequence[Tensor], learnables: Sequence[Tensor]) -> Tensor:
    """A loss whose gradients, one for each learnable, are known: its `backward()` hands them over,
    changed in place."""
    delivered: Tensor = _Delivered.apply(loss, list(grads), *learnables)
    return delivered


class _Delivered(torch.autograd.Function):
    """Looks to the optimizer, to gradient hooks and to DDP like any other loss."""

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
        learnables: what is learned by way of the weights.
        direct: what is learned past them: gradients that reach it are its own.

    Raises:
        AdamergeError: on `finish`, a learnable that had a part in the loss past the weights.

    Attributes:
        leaves: name -> a leaf of the same value, until its gradient is handed back.
        learnables: all that is learned.
        grads: the gradient of each learnable so far, in order.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        learnables: Sequence[Tensor],
        direct: Sequence[Tensor] = (),
    ) -> None:
        self.leaves = {n: w.detach().requires_grad_(w.requires_grad) for n, w in weights.items()}
        self.learnables = [t for t in dict.fromkeys([*learnables, *direct]) if t.requires_grad]
        self.grads: list[Tensor | None] = [None] * len(self.learnables)
        self._direct = set(map(id, direct))
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
        past = False
        for index, (tensor, before) in enumerate(zip(self.learnables, self._before, strict=True)):
            if tensor.grad is not None and id(tensor) in self._direct:
                self._add(index, tensor.grad)
            past = past or (tensor.grad is not None and id(tensor) not in self._direct)
            tensor.grad = before
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
            if grad is not None:
                self._add(index, grad)

    def _add(self, index: int, grad: Tensor) -> None:
        known = self.grads[index]
        self.grads[index] = grad if known is None else known + grad
