"""The weights that all images of a step share, and the way of their gradients to the learnables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adamerge.errors import AdamergeError


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
