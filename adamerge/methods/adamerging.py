"""AdaMerging: learned merging coefficients, per task, block or layer, or within layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import PerTaskEncoder, by_task
from adamerge.encoders.rows import Inputs
from adamerge.encoders.tower import FoldedEncoder, block_of, merged_encoder
from adamerge.methods.base import MergeMethod
from adamerge.transforms import draws
from adamerge.transforms.layers import check_number
from adamerge.weights import entrywise
from adamerge.weights.task_vectors import TaskVectors

_WITHIN = ("partition", "element")  # coefficients that differ within a layer


class AdaMerging(MergeMethod):
    """`W_l = θ0_l + Σ_t λ[t, l] τ[t, l]` with learnable merging coefficients λ.

    AdaMerging: Adaptive Model Merging for Multi-Task Learning (arXiv 2310.02575). Task arithmetic
    is this with no step taken; AdaMerging++ is this on `sparse.ties(task_vectors)`.

    With task vectors of which each makes an encoder of its own (`task_vectors.per_task`, as the
    transforms `emr`, `tall` and `twin` give), task t's images go through `θ0_l + λ[t, l] τ[t, l]`
    instead: T merged models are in memory while it learns, and the fold is an encoder per task.

    Args:
        backbone: the network (of a CLIP `model.visual`), for its architecture only; left unchanged.
        task_vectors: T task vectors of L layers; frozen, moved with the module, never saved in a
            state dict.
        granularity: `task` learns λ `[T]`; `layer` learns `[T, L]`, a coefficient per parameter
            tensor; `block` learns `[T, G]`, one per transformer block (or other named group).
            `partition` learns `[T, L, K]`: every layer's entries are drawn into K parts, the same
            for all tasks, with a coefficient each (aTLAS, arXiv 2407.02880). `element` learns one
            per weight, a tensor `[T, *shape]` per layer: T models more in memory.
        init: initial value of every coefficient.
        clamp: use λ clamped to [0, 1] in the forward pass (as the paper's script does); the
            stored values move freely.
        parts: K, of `partition`.
        seed: of the drawing.

    Attributes:
        coefficients: the learnable λ; float32, or float64 with float64 task vectors. Of `element`
            a list, a tensor per layer.
        groups: the names of the columns of λ.

    >>> network, expert = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> method = AdaMerging(network, TaskVectors(network, {"a": expert}), granularity="task")
    >>> network.load_state_dict(method.merged_state_dict())
    <All keys matched successfully>

    Raises:
        AdamergeError: unknown granularity, or task vectors that do not fit the backbone.
    """

    combines = takes_per_task = True

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        granularity: Literal["task", "layer", "block", "partition", "element"] = "layer",
        init: float = 0.3,
        clamp: bool = False,
        parts: int = 3,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, task_vectors)
        check_number("AdaMerging", "init", init, -1e6, 1e6)
        check_number("AdaMerging", "parts", parts, 1, 256, whole=True)
        self.groups, self._column = _group(task_vectors.names, granularity)
        self.granularity, self.clamp = granularity, clamp
        first = task_vectors.pretrained[task_vectors.names[0]]
        self._column = self._column.to(first.device)
        tasks, layers = len(task_vectors.tasks), len(task_vectors.names)
        self.coefficients: nn.Parameter | nn.ParameterList
        shapes = {"task": (tasks,), "partition": (tasks, layers, parts)}
        if granularity == "element":
            self.coefficients = nn.ParameterList(
                base.new_full((tasks, *base.shape), float(init))
                for base in task_vectors.pretrained.values()
            )
        else:
            shape = shapes.get(granularity, (tasks, len(self.groups)))
            self.coefficients = nn.Parameter(first.new_full(shape, float(init)))
        self._parts: dict[str, Tensor] = {}
        if granularity in _WITHIN:
            _check_within(task_vectors)
        if granularity == "partition":
            self._parts = _draw(task_vectors, parts, seed)

    @classmethod
    def problems(cls, settings: Mapping[str, Any], steps: int) -> list[str]:
        """Coefficients that begin where clamping gives them no gradient."""
        init = settings.get("init", 0.0)
        if not settings.get("clamp") or steps == 0 or 0 <= init <= 1:
            return []
        return [
            f"method.init is {init!r}, outside the [0, 1] that method.clamp=true clamps to, where "
            "nothing is learned: set it within, or method.clamp=false"
        ]

    def layer_coefficients(self) -> Tensor:
        """λ as it is applied, `[T, L]`: clamped if asked, spread over the layers of a group; of
        coefficients within layers, their mean over each."""
        if self.granularity in _WITHIN:
            means = [t.flatten(1)[:, self._of(n)].mean(1) for n, t in self._within().items()]
            return torch.stack(means, 1)
        used = self._clamped(self._table())
        if used.ndim == 1:
            return used[:, None].expand(-1, len(self.task_vectors.names))
        return used[:, self._column] if self.granularity == "block" else used

    def _table(self) -> Tensor:
        assert isinstance(self.coefficients, Tensor)
        return self.coefficients

    def _clamped(self, coefficients: Tensor) -> Tensor:
        return coefficients.clamp(0, 1) if self.clamp else coefficients

    def _within(self) -> dict[str, Tensor]:
        """λ of each layer: `[T, K]`, or `[T, *shape]`."""
        element = isinstance(self.coefficients, nn.ParameterList)
        tables = list(self.coefficients) if element else self._table().unbind(1)
        return dict(zip(self.task_vectors.names, map(self._clamped, tables), strict=True))

    def _of(self, name: str) -> Tensor | slice:
        """Of each of a layer's entries, the place of its coefficient."""
        return self._parts[name].flatten().int() if self._parts else slice(None)

    def weights(self) -> dict[str, Tensor]:
        """The merged weights, by layer (`0/layer`, `1/layer` … of each task, where every task has
        its own); differentiable in `coefficients`."""
        if self.granularity in _WITHIN:
            parts = list(self._parts.values()) or None
            return entrywise.combine(self.task_vectors, list(self._within().values()), parts)
        used, dtype = self.layer_coefficients(), self._compute_type()
        if not self.task_vectors.per_task:
            return self.task_vectors.combine(used, dtype)
        return {
            f"{row}/{name}": tensor
            for row, own in enumerate(_rows(used))
            for name, tensor in self.task_vectors.combine(own, dtype).items()
        }

    def _compute_type(self) -> torch.dtype | None:
        """That of autocast, where it is on: matrices are cast once, and so are their gradients."""
        device = self.task_vectors.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def encode(self, weights: Mapping[str, Tensor], inputs: Any, task_ids: Tensor) -> Tensor:
        if not self.task_vectors.per_task:
            return super().encode(weights, inputs, task_ids)

        def own(row: int, part: Inputs) -> Tensor:
            merged = {name: weights[f"{row}/{name}"] for name in self.task_vectors.names}
            return self.tower({**self.task_vectors.constants, **merged}, part)

        return by_task(own, inputs, task_ids, len(self.task_vectors.tasks))

    def fold(self) -> FoldedEncoder | PerTaskEncoder:
        """The merged network as a static encoder, or one for each task, on the device of the task
        vectors."""
        if self.granularity in _WITHIN:
            with torch.no_grad(), torch.autocast(self.task_vectors.device.type, enabled=False):
                return FoldedEncoder(self.tower, {**self.task_vectors.constants, **self.weights()})
        used = self.layer_coefficients()
        if not self.task_vectors.per_task:
            return merged_encoder(self.tower, self.task_vectors, used)
        rows = zip(self.task_vectors.tasks, _rows(used), strict=True)
        return PerTaskEncoder(
            {task: merged_encoder(self.tower, self.task_vectors, own) for task, own in rows}
        )

    @property
    def folds(self) -> dict[str, bool]:
        return {"per_task": True} if self.task_vectors.per_task else {}

    @property
    def own_fold(self) -> str | None:
        return "per_task" if self.task_vectors.per_task else None

    def statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Nothing: its folds are exact."""

    def fold_as(self, name: str, statistics: None) -> nn.Module:
        return self.fold()

    def coefficient_table(self) -> tuple[list[str], Tensor]:
        """Layer names and λ in effect, `[T, L]`."""
        return list(self.task_vectors.names), self.layer_coefficients().detach()


def _rows(coefficients: Tensor) -> list[Tensor]:
    """For each task the coefficients `[T, L]` with all rows but its own 0."""
    own = torch.eye(len(coefficients), dtype=coefficients.dtype, device=coefficients.device)
    return list(coefficients * own[:, :, None])


def _group(names: tuple[str, ...], granularity: str) -> tuple[tuple[str, ...], Tensor]:
    """Column names of λ and the column of each layer, `[L]`."""
    if granularity == "task":
        labels = ["all"] * len(names)
    elif granularity == "layer" or granularity in _WITHIN:
        labels = list(names)
    elif granularity == "block":
        labels = [block_of(name) for name in names]
    else:
        raise AdamergeError(
            f"granularity is {granularity!r}: expected 'task', 'layer', 'block', 'partition' or "
            "'element' (method.granularity)"
        )
    groups = tuple(dict.fromkeys(labels))
    return groups, torch.tensor([groups.index(label) for label in labels])


def _check_within(vectors: TaskVectors) -> None:
    if vectors.per_task:
        raise AdamergeError(
            "the transform (emr, tall, twin) makes an encoder of its own for every task, whose "
            "coefficients cannot differ within layers: set method.granularity to task or layer"
        )


def _draw(vectors: TaskVectors, parts: int, seed: int) -> dict[str, Tensor]:
    """The part of every entry of each layer, `[*shape]`; the same on every device."""
    return {
        name: (draws.uniform(seed, "", name, base.shape) * parts).to(base.device, torch.uint8)
        for name, base in vectors.pretrained.items()
    }
