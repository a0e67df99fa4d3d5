"""AdaMerging: learned merging coefficients, per task, per layer or per block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import PerTaskEncoder, by_task
from adamerge.encoders.tower import FoldedEncoder, Tower, merged_encoder
from adamerge.methods.base import MergeMethod
from adamerge.weights.task_vectors import TaskVectors


class AdaMerging(MergeMethod):
    """`W_l = θ0_l + Σ_t λ[t, l] τ[t, l]` with learnable merging coefficients λ.

    AdaMerging: Adaptive Model Merging for Multi-Task Learning (arXiv 2310.02575). Task arithmetic
    is this with no step taken; AdaMerging++ is this on `sparse.ties(task_vectors)`.

    With task vectors of which each makes an encoder of its own (`task_vectors.per_task`, as the
    transforms `emr` and `tall` give), task t's images go through `θ0_l + λ[t, l] τ[t, l]` instead:
    T merged models are in memory while it learns, and the fold is an encoder per task.

    Args:
        backbone: the image tower (`model.visual`), for its architecture only; left unchanged.
        task_vectors: T task vectors of L layers; frozen, moved with the module, never saved in a
            state dict.
        granularity: `task` learns λ `[T]`; `layer` learns `[T, L]`, a coefficient per parameter
            tensor; `block` learns `[T, G]`, one per transformer block (or other named group).
        init: initial value of every coefficient.
        clamp: use λ clamped to [0, 1] in the forward pass (as the paper's script does); the
            stored values move freely.

    Attributes:
        coefficients: the learnable λ; float32, or float64 with float64 task vectors.
        groups: the names of the columns of λ.

    Raises:
        AdamergeError: unknown granularity, or task vectors that do not fit the backbone.
    """

    combines = True

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        granularity: Literal["task", "layer", "block"] = "layer",
        init: float = 0.3,
        clamp: bool = False,
    ) -> None:
        super().__init__()
        self.groups, self._column = _group(task_vectors.names, granularity)
        self.granularity, self.clamp = granularity, clamp
        self.task_vectors = task_vectors
        self._tower = Tower(backbone)
        self._tower.check(task_vectors, per_task=True)
        first = task_vectors.pretrained[task_vectors.names[0]]
        self._column = self._column.to(first.device)
        tasks = len(task_vectors.tasks)
        shape = (tasks,) if granularity == "task" else (tasks, len(self.groups))
        self.coefficients = nn.Parameter(
            torch.full(shape, float(init), dtype=first.dtype, device=first.device)
        )

    def layer_coefficients(self) -> Tensor:
        """λ as it is applied, `[T, L]`: clamped if asked, spread over the layers of a group."""
        used = self.coefficients.clamp(0, 1) if self.clamp else self.coefficients
        if used.ndim == 1:
            return used[:, None].expand(-1, len(self.task_vectors.names))
        return used[:, self._column] if self.granularity == "block" else used

    def weights(self) -> dict[str, Tensor]:
        """The merged weights, by layer (`0/layer`, `1/layer` … of each task, where every task has
        its own); differentiable in `coefficients`."""
        used, dtype = self.layer_coefficients(), self._compute_type()
        if not self.task_vectors.per_task:
            return {**self.task_vectors.combine(used, dtype), **self.task_vectors.constants}
        return {
            f"{row}/{name}": tensor
            for row, own in enumerate(_rows(used))
            for name, tensor in self.task_vectors.combine(own, dtype).items()
        }

    def _compute_type(self) -> torch.dtype | None:
        """That of autocast, where it is on: matrices are cast once, and so are their gradients."""
        device = self.coefficients.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def encode(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        if not self.task_vectors.per_task:
            return self._tower(weights, images)

        def own(row: int, part: Tensor) -> Tensor:
            merged = {name: weights[f"{row}/{name}"] for name in self.task_vectors.names}
            return self._tower({**merged, **self.task_vectors.constants}, part)

        return by_task(own, images, task_ids, len(self.task_vectors.tasks))

    def fold(self) -> FoldedEncoder | PerTaskEncoder:
        """The merged tower as a static encoder, or one for each task, on the device of the task
        vectors."""
        used = self.layer_coefficients()
        if not self.task_vectors.per_task:
            return merged_encoder(self._tower, self.task_vectors, used)
        rows = zip(self.task_vectors.tasks, _rows(used), strict=True)
        return PerTaskEncoder(
            {task: merged_encoder(self._tower, self.task_vectors, own) for task, own in rows}
        )

    @property
    def folds(self) -> dict[str, bool]:
        return {"per_task": True} if self.task_vectors.per_task else {}

    @property
    def own_fold(self) -> str | None:
        return "per_task" if self.task_vectors.per_task else None

    def fold_as(self, name: str, statistics: None) -> nn.Module:
        return self.fold()

    def coefficient_table(self) -> tuple[list[str], Tensor]:
        """Layer names and λ in effect, `[T, L]`, on the CPU."""
        return list(self.task_vectors.names), self.layer_coefficients().detach().cpu()

    def coefficients_in_effect(self) -> Tensor:
        return self.layer_coefficients().detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaMerging:
        """Takes the task vectors along when the module is moved; they are no buffers."""
        super()._apply(fn, recurse)
        self.task_vectors = self.task_vectors.apply(fn)
        self._tower.apply_buffers(fn)
        self._column = fn(self._column)
        return self


def _rows(coefficients: Tensor) -> list[Tensor]:
    """For each task the coefficients `[T, L]` with all rows but its own 0."""
    own = torch.eye(len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
    return list(coefficients * own[:, :, None])


def _group(names: tuple[str, ...], granularity: str) -> tuple[tuple[str, ...], Tensor]:
    """Column names of λ and the column of each layer, `[L]`."""
    if granularity == "task":
        labels = ["all"] * len(names)
    elif granularity == "layer":
        labels = list(names)
    elif granularity == "block":
        labels = [_block(name) for name in names]
    else:
        raise AdamergeError(
            f"granularity is {granularity!r}: expected 'task', 'layer' or 'block' "
            "(method.granularity)"
        )
    groups = tuple(dict.fromkeys(labels))
    return groups, torch.tensor([groups.index(label) for label in labels])


def _block(name: str) -> str:
    """`transformer.resblocks.3.mlp.c_fc.weight` -> `transformer.resblocks.3`; `ln_pre.bias` ->
    `ln_pre`: everything up to the first number, or the outermost name."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else parts[0]
