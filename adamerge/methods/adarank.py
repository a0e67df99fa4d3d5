"""AdaRank: which singular components of every task vector are merged is learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adamerge.methods.base import MergeMethod
from adamerge.transforms.layers import check_number
from adamerge.transforms.matrices import Device, Layers, is_tall, matrices_of, smaller_side
from adamerge.weights.storage import Layer
from adamerge.weights.task_vectors import TaskVectors


class AdaRank(MergeMethod):
    """`W_l = θ0_l + Σ_t λ[t, l] U_t diag(b_t ∘ S_t) V_tᵀ` with learnable λ and b ∈ {0, 1}.

    AdaRank: Adaptive Rank Pruning for Enhanced Model Merging (arXiv 2503.22178). With
    `τ_t = U_t diag(S_t) V_tᵀ` of every matrix that takes part, component k is merged where its
    score x has `p = sigmoid(x / temperature) > 0.5`, that is x > 0; the gradient is that of p
    (straight through). Other layers are merged by λ alone. On `transforms.centre`, with `init`
    above 1 and `rank` 0.16, it is the paper's AdaRank on CART.

    Kept in place of τ is `τ_t V_t` (of a wide matrix `U_tᵀ τ_t`), in the type and place of τ, and
    beside it the smaller side's singular vectors, `[T, r, r]` in memory. A step costs two products
    of every τ with them. One decomposition per matrix and task, once.

    Args:
        backbone: the network (of a CLIP `model.visual`), for its architecture only; left unchanged.
        task_vectors: T task vectors of L layers; frozen, moved with the module, never saved in a
            state dict.
        init: initial value of every coefficient λ.
        rank: the share of components, largest first, that are merged at the start.
        score: the scores at the start: this for those, its negative for the others.
        temperature: divides scores; what Adam learns does not depend on it.
        layers: `blocks` (the matrices of the blocks alone) or `matrices` (all of two dimensions).
        device: on which components are computed; None: where the pretrained weights are.

    Attributes:
        coefficients: the learnable λ, `[T, L]`.
        scores: the learnable x, `[T, r]` for each of `matrices`.
        matrices: the names of the layers that take part.

    Raises:
        AdamergeError: a setting out of range, no such layer, or task vectors that do not fit the
            backbone.
    """

    streams = True

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        init: float = 0.3,
        rank: float = 1.0,
        score: float = 0.1,
        temperature: float = 10.0,
        layers: Layers = "blocks",
        device: Device = None,
    ) -> None:
        super().__init__(backbone, task_vectors)
        check_number("AdaRank", "init", init, -1e6, 1e6)
        check_number("AdaRank", "rank", rank, 0, 1)
        check_number("AdaRank", "score", score, 0, 1e6, open_low=True)
        check_number("AdaRank", "temperature", temperature, 0, 1e6, open_low=True)
        self.temperature, self.matrices = temperature, tuple(matrices_of(task_vectors, layers))
        self._bases: dict[str, Tensor] = {}
        rotated = _rotated(task_vectors, self.matrices, device, self._bases)
        self.task_vectors = task_vectors.with_deltas(rotated)
        first = task_vectors.pretrained[task_vectors.names[0]]
        shape = (len(task_vectors.tasks), len(task_vectors.names))
        self.coefficients = nn.Parameter(first.new_full(shape, float(init)))
        self.scores = nn.ParameterList()
        for name in self.matrices:
            start = first.new_full(self._bases[name].shape[:2], -score)
            start[:, : int(rank * start.shape[1])] = score
            self.scores.append(nn.Parameter(start))

    def weights(self) -> dict[str, Tensor]:
        """The merged weights, by layer; differentiable in `coefficients` and `scores`."""
        vectors, merged = self.task_vectors, {}
        scores = dict(zip(self.matrices, self.scores, strict=True))
        for column, name in zip(self.coefficients.unbind(1), vectors.names, strict=True):
            base, layer = vectors.pretrained[name], vectors.layers[name]
            if name in scores:
                factors = column[:, None] * self._gates(scores[name])
                merged[name] = _Components.apply(factors, base, layer, self._bases[name])
            else:
                merged[name] = base + torch.tensordot(column, layer.dense(base), 1)
        return merged

    def _gates(self, scores: Tensor) -> Tensor:
        """1 for components that are merged and 0 for others, with the gradient of p."""
        chances = torch.sigmoid(scores / self.temperature)
        return (chances > 0.5).to(chances) + (chances - chances.detach())

    def merged_components(self) -> Tensor:
        """How many components of every task are merged, `[T]`."""
        return torch.stack([(scores.detach() > 0).sum(1) for scores in self.scores]).sum(0)

    def readings(self) -> dict[str, Tensor]:
        """Those of the coefficients, and how many components of every task are merged."""
        return {**super().readings(), "merged_components": self.merged_components()}

    def coefficient_table(self) -> tuple[list[str], Tensor]:
        """Layer names and λ, `[T, L]`."""
        return list(self.task_vectors.names), self.coefficients.detach()


def _rotated(
    task_vectors: TaskVectors, matrices: tuple[str, ...], device: Device, bases: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every layer's τ, those of `matrices` in the coordinates of their singular vectors.

    Args:
        bases: gets these, `[T, r, r]` by name.
    """
    for name, tau in task_vectors.deltas.items():
        if name not in matrices:
            yield name, tau
            continue
        exact, place = tau.dtype == torch.float64, tau.to(device or tau.device)
        basis = torch.stack([smaller_side(matrix, exact)[1] for matrix in place])
        turned = place.double() @ basis if is_tall(place) else basis.mT @ place.double()
        bases[name] = basis.to(tau)
        yield name, turned.to(tau)


class _Components(torch.autograd.Function):
    """`θ0 + Σ_t A_t diag(f_t) B_tᵀ` (of a wide matrix `B_t diag(f_t) A_t`) of factors f `[T, r]`.

    Nothing the size of the matrix is kept for the backward; A is read again.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor, base: Tensor, layer: Layer, bases: Tensor) -> Tensor:
        ctx.given = base, layer, bases
        merged = base.clone()
        with torch.autocast(base.device.type, enabled=False):
            for row, (own, basis) in enumerate(zip(factors.to(base), bases, strict=True)):
                turned = layer.row(row, base)
                if is_tall(base):
                    merged.addmm_(turned * own, basis.T)
                else:
                    merged.addmm_(basis * own, turned)
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        base, layer, bases = ctx.given
        grad, found = grad.to(base.dtype), []
        with torch.autocast(base.device.type, enabled=False):
            for row, basis in enumerate(bases):
                turned = layer.row(row, base)
                if is_tall(base):
                    found.append((turned * (grad @ basis)).sum(0))
                else:
                    found.append((turned * (basis.T @ grad)).sum(1))
        return torch.stack(found), None, None, None
