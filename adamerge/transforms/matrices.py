"""Matrices of task vectors: which take part in a transform, and their singular vectors.

Everything here is computed in float64. Of numbers that are float64 themselves, singular vectors
come from the decomposition of the matrix; of float32 ones, from the eigenvectors of the Gram matrix
of its smaller side, which is three times as fast, and in float64 (an error of 1e-16 (s_1 / s)²) no
less accurate than a decomposition in float32. A direction whose singular value is 0 up to rounding
is left out: which vectors would stand there is up to chance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.transforms.layers import each_layer
from adamerge.weights.task_vectors import TaskVectors

Change = Callable[[str, Tensor], Tensor]
Layers = Literal["matrices", "blocks"]
Device = torch.device | str | None


def each_matrix(
    task_vectors: TaskVectors,
    change: Change,
    layers: Layers,
    device: Device = None,
    others: float | None = None,
) -> TaskVectors:
    """`change(name, τ)` of every matrix that takes part, kept as the given task vectors are.

    One matrix is in memory at a time. The arguments are those of `on_matrices`.
    """
    return each_layer(task_vectors, on_matrices(task_vectors, change, layers, device, others))


def on_matrices(
    task_vectors: TaskVectors,
    change: Change,
    layers: Layers,
    device: Device = None,
    others: float | None = None,
) -> Change:
    """A change of matrices as one of all layers.

    Args:
        task_vectors: whose layers they are.
        change: of a layer's name and τ `[T, rows, columns]` on the device that computes; gives the
            new τ of the same shape, in any floating-point type.
        layers: which matrices take part, see `matrices_of`.
        device: that computes; None: where τ is.
        others: the factor of all other layers' τ; None: 1 / T, the mean of the experts.

    Raises:
        AdamergeError: no matrix takes part.
    """
    factor = 1 / len(task_vectors.tasks) if others is None else others
    chosen = set(matrices_of(task_vectors, layers))

    def changed(name: str, tau: Tensor) -> Tensor:
        if name not in chosen:
            return tau * factor
        return change(name, tau.to(device or tau.device)).to(tau)

    return changed


def matrices_of(task_vectors: TaskVectors, layers: Layers) -> list[str]:
    """Names of the layers of two dimensions: all (`matrices`), or those of numbered blocks alone
    (`blocks`: of an open_clip transformer the attention's and the MLP's four, not the positional
    embedding and the projection).

    open_clip keeps q, k and v of an attention in one matrix, `in_proj_weight`; numbers published on
    checkpoints that keep them apart, as transformers' do, are of other singular vectors.

    Raises:
        AdamergeError: another word than these, or there is no such layer.
    """
    if layers not in ("matrices", "blocks"):
        raise AdamergeError(f"layers is {layers!r}: expected 'matrices' or 'blocks'")
    found = [name for name, base in task_vectors.pretrained.items() if base.ndim == 2]
    if layers == "blocks":
        found = [name for name in found if any(part.isdigit() for part in name.split("."))]
    if not found:
        raise AdamergeError(
            f"layers is {layers!r}, but the task vectors have no "
            f"{'matrix' if layers == 'matrices' else 'matrix of a numbered block (like x.0.y)'}: "
            "use a transform that works entry by entry, like ties"
        )
    return found


def decomposed(
    matrix: Tensor, exact: bool, count: int | None = None, size: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`U [rows, r]`, `s [r]` (falling) and `V [columns, r]` of `matrix = U diag(s) Vᵀ`, float64.

    The vectors of a direction that is left out are 0.

    Args:
        matrix: `[rows, columns]`.
        exact: by the decomposition of the matrix itself.
        count: r, the triplets that are wanted; None: all, as many as the smaller side.
        size: the norm of what the matrix was computed from, whose rounding errors are left out.
    """
    values, basis = smaller_side(matrix, exact, size)
    values, basis = values[:count], basis[:, :count]
    matrix = matrix.double()
    basis = basis * (values > 0)
    across = (matrix if is_tall(matrix) else matrix.T) @ (basis * reciprocal(values))
    return (across, values, basis) if is_tall(matrix) else (basis, values, across)


def smaller_side(matrix: Tensor, exact: bool, size: float = 0.0) -> tuple[Tensor, Tensor]:
    """Singular values `[r]` (falling) and the singular vectors of the smaller side, `[r, r]`:
    V of a tall or square matrix, U of a wide one; float64."""
    tall = matrix.double() if is_tall(matrix) else matrix.double().T
    if exact:
        _, values, transposed = torch.linalg.svd(tall, full_matrices=False)
        return _cleaned(values, size), transposed.T
    squares, vectors = eigen(tall.T @ tall, size**2)
    return squares.sqrt(), vectors


def eigen(gram: Tensor, size: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Gram matrix, falling, those that are rounding errors 0; eigenvectors."""
    values, vectors = torch.linalg.eigh(gram)
    return _cleaned(values.flip(0), size), vectors.flip(1)


def scaled(matrices: Tensor, basis: Tensor, factors: Tensor) -> Tensor:
    """`M B diag(factors) Bᵀ` of tall and square matrices `[…, rows, columns]`, `B diag(factors) Bᵀ
    M` of wide ones, with B the basis of `smaller_side`: on its own matrix, every singular value
    times its factor; float64."""
    square = (basis * factors) @ basis.T
    return matrices.double() @ square if is_tall(matrices) else square @ matrices.double()


def polar(matrix: Tensor, exact: bool) -> Tensor:
    """`P Qᵀ` of a tall matrix `P D Qᵀ`: the nearest one with orthonormal columns, float64."""
    values, basis = smaller_side(matrix, exact)
    return scaled(matrix, basis, reciprocal(values))


def reciprocal(values: Tensor) -> Tensor:
    """`1 / values`, and 0 for 0."""
    return torch.where(values > 0, 1 / torch.where(values > 0, values, 1), 0)


def is_tall(matrix: Tensor) -> bool:
    """Whether there are at least as many rows as columns."""
    return matrix.shape[-2] >= matrix.shape[-1]


def _cleaned(falling: Tensor, size: float) -> Tensor:
    """Values with 0 in place of those that are rounding errors of the largest, or of `size`."""
    least = falling[:1].clamp_min(size) * len(falling) * torch.finfo(falling.dtype).eps
    return torch.where(falling > least, falling, 0)
