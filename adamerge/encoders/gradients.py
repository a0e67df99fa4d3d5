"""Squared gradients of the predictions of each task's expert: the diagonal of its Fisher matrix."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import Experts
from adamerge.encoders.statistics import (
    Images,
    Keep,
    Named,
    in_memory,
    refuse_no_images,
    refuse_not_finite,
)

if TYPE_CHECKING:  # it knows open_clip, which methods do without
    from adamerge.encoders.heads import Heads

log = logging.getLogger("adamerge")

_AT_ONCE = 2**24  # numbers of gradients computed together
Kind = Literal["all", "predicted", "batch_sum"]


class Squares(Mapping[str, Tensor]):
    """Layer name -> squared gradients `[T, *shape]`; one layer is in memory at a time."""

    def __init__(self, by_task: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        self._by_task, self._names = by_task, names

    def __getitem__(self, name: str) -> Tensor:
        return torch.stack([own[name] for own in self._by_task])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Gradients:
    """Squared gradients of T experts' predictions on unlabeled images, gathered when asked for.

    Args:
        experts: the T experts.
        heads: their zero-shot heads.
        images: unlabeled, of every task, on the device that computes and in the experts' type.
        keep: where each task's go, by kind, as `statistics.in_files`; None: in memory.
    """

    def __init__(
        self,
        experts: Experts,
        heads: Heads,
        images: Images,
        keep: Mapping[str, Keep] | None = None,
    ) -> None:
        self._experts, self._heads, self._images = experts, heads, images
        self._keep = keep or dict.fromkeys(get_args(Kind), in_memory)

    def squared(self, kind: Kind) -> Squares:
        """Means over images of squared gradients, `[T, *shape]` by layer.

        With p the expert's probabilities of an image's classes: `all` is `Σ_c p_c (∂ log p_c)²`,
        the diagonal of the Fisher matrix. It takes as many backward passes per image as directions
        of the features matter to its predictions (at most C − 1 or D, fewer the surer they are).
        `predicted` is `(∂ log p_c)²` of the likeliest class alone, one pass per image. `batch_sum`
        is `(∂ Σ_images Σ_c √p_c log p_c)²` of a whole batch with √p held fixed, one pass per batch:
        no Fisher matrix, and another with other batches.

        Raises:
            AdamergeError: an unknown kind, a task without images, or with images that can be gone
                through once alone or give NaN.
        """
        if kind not in get_args(Kind):
            raise AdamergeError(
                f"squared gradients of kind {kind!r} are not known: expected one of "
                f"{', '.join(get_args(Kind))}"
            )
        names = self._experts.task_vectors.names
        by_task = []
        for task in self._experts.tasks:

            def made(task: str = task) -> Named:
                refuse_no_images(self._images, task)
                log.info("task %s: its expert's squared gradients (%s) are gathered", task, kind)
                yield from self._gather(task, kind).items()

            by_task.append(self._keep[kind](task, names, made))
        return Squares(by_task, names)

    def _gather(self, task: str, kind: Kind) -> dict[str, Tensor]:
        """One task's; in memory are the expert, its squares, and one gradient or a few."""
        expert: _Expert | None = None
        count = 0
        for batch in self._images[task]:
            expert = expert or _Expert(self._experts, task, batch.device)
            with torch.no_grad():
                features = expert.encode(batch)
            refuse_not_finite(features, task, "the head")
            directions = _directions(features, self._heads.weight(task).to(features), kind)
            if kind == "batch_sum":
                expert.add(batch, directions.transpose(0, 1))
            else:
                for image, own in zip(batch, directions, strict=True):
                    used = own[own.count_nonzero(1) > 0]
                    expert.add(image[None], used[:, None])
            count += len(batch)
        assert expert is not None  # there are images
        return {name: squares / count for name, squares in expert.squares.items()}


class _Expert:
    """An expert, and the sums of its layers' squared gradients."""

    def __init__(self, experts: Experts, task: str, device: torch.device) -> None:
        self._tower, self._weights = experts.tower, experts.weights(task, device)
        names = experts.task_vectors.names
        self._leaves = {n: self._weights[n].detach().clone().requires_grad_() for n in names}
        self.squares = {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        size = sum(leaf.numel() for leaf in self._leaves.values())
        self._together = max(_AT_ONCE // size, 1)

    def encode(self, images: Tensor) -> Tensor:
        return self._tower({**self._weights, **self._leaves}, images)

    def add(self, images: Tensor, cotangents: Tensor) -> None:
        """Adds the squared gradient of `⟨features, cotangent⟩` for each cotangent `[B, D]`."""
        if len(cotangents) == 0:
            return
        leaves = list(self._leaves.values())
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # which several at once can use
            features = self.encode(images)
            for part in cotangents.split(self._together):
                several = len(part) > 1
                given = part if several else part[0]
                found = torch.autograd.grad(
                    features, leaves, given, True, is_grads_batched=several, materialize_grads=True
                )
                for squares, gradient in zip(self.squares.values(), found, strict=True):
                    total = gradient.square_()
                    squares += total.sum(0) if several else total


def _directions(features: Tensor, head: Tensor, kind: Kind) -> Tensor:
    """Directions `[B, K, D]` v of each image's features; `(∂⟨v, features⟩)²` add up to a kind.

    With J the derivative of an image's logits `[C, D]` in its features, that of `log p_c` is
    `(e_c − p) J`. Since `Σ_c p_c (e_c − p)(e_c − p)ᵀ = diag(p) − p pᵀ`, the sum over all classes
    is one over the eigenvectors of `Jᵀ (diag(p) − p pᵀ) J`, each times the root of its eigenvalue.
    Those whose eigenvalues together do not reach the rounding of a batch's are 0.
    """
    dtype, features, head = features.dtype, features.double(), head.double()
    norms = features.norm(dim=-1, keepdim=True)
    unit = features / norms
    probabilities = (unit @ head.T).softmax(-1)
    if kind == "all":
        spread = torch.diag_embed(probabilities)
        spread -= probabilities[:, :, None] * probabilities[:, None]
        values, vectors = torch.linalg.eigh(_through_norm(head.T @ spread @ head, unit, norms))
        values = _without_rounding(values.clamp_min(0), torch.finfo(dtype).eps)
        return (vectors * values.sqrt()[:, None]).transpose(1, 2).to(dtype)
    if kind == "predicted":
        chosen = nn.functional.one_hot(probabilities.argmax(-1), len(head)) - probabilities
    else:
        roots = probabilities.sqrt()
        chosen = roots - probabilities * roots.sum(-1, keepdim=True)
    given = chosen @ head
    return ((given - unit * (given * unit).sum(-1, keepdim=True)) / norms)[:, None].to(dtype)


def _through_norm(matrix: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """`N M N` of each image's `[D, D]` with `N = (1 − u uᵀ) / ‖z‖`, the derivative of `z / ‖z‖`."""
    identity = torch.eye(unit.shape[1], dtype=unit.dtype, device=unit.device)
    derivative = (identity - unit[:, :, None] * unit[:, None]) / norms[:, :, None]
    return derivative @ matrix @ derivative


def _without_rounding(values: Tensor, share: float) -> Tensor:
    """Eigenvalues `[B, D]`, the smallest of a batch 0 as long as they are a share of their sum."""
    order = values.flatten().argsort()
    summed = values.flatten()[order].cumsum(0)
    small = summed <= summed[-1] * share
    kept = values.flatten().clone()
    kept[order[small]] = 0
    return kept.view_as(values)
