"""Surgery: small adapters per task that bring a merged model's features back to the expert's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import PerTaskEncoder
from adamerge.encoders.tower import FoldedEncoder, Tower, block_widths, resblocks, tapped, traced
from adamerge.methods.adapters import AdaptedEncoder, Adapter, Change, activation_of, changer
from adamerge.methods.base import MergeMethod
from adamerge.transforms.layers import check_number


class Surgery(MergeMethod):
    """`z − up_t(relu(down_t(z)))` for the features z of images of task t.

    Representation Surgery for Multi-Task Model Merging (arXiv 2402.02705) with `positions: final`;
    SurgeryV2: Bridging the Gap Between Model Merging and Multi-Task Learning with Deep
    Representation Surgery (arXiv 2410.14389) with `positions: blocks`. The encoder is frozen;
    taught by the experts' features (`objectives.ExpertL1`). `task_ids` chooses the adapters, so a
    batch of any mix of tasks is one forward pass; adapters of tasks that are not in it get no
    gradient (None, not zero: a step of Adam must leave them alone).

    Args:
        encoder: any folded encoder; left unchanged.
        tasks: the T tasks, the order of `task_ids`.
        dim: D of the encoder's features.
        rank: of the adapters.
        positions: `final` adapts the features; `blocks` also all tokens after every block.
        activation: `relu`, or `identity`: a linear adapter, see `fold_linear`.

    Attributes:
        adapters: task -> position -> `Adapter` with `down` `[rank, width]` and `up` `[width,
            rank]`; the positions are after each block, if any, and the final one last.

    Raises:
        AdamergeError: a setting out of range, or an encoder without blocks where they are needed.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tasks: Sequence[str],
        dim: int,
        rank: int = 16,
        positions: Literal["final", "blocks"] = "final",
        activation: Literal["relu", "identity"] = "relu",
    ) -> None:
        super().__init__()
        if positions not in ("final", "blocks"):
            raise AdamergeError(
                f"positions is {positions!r}: expected 'final' or 'blocks' (method.positions)"
            )
        if not tasks or len(set(tasks)) != len(tasks) or isinstance(tasks, str):
            raise AdamergeError(f"tasks is {tasks!r}: expected the names of tasks, each once")
        check_number("Surgery", "rank", rank, 1, 1e6, whole=True)
        activation_of(activation)
        self.tasks, self.activation = tuple(tasks), activation
        self._tower = Tower(encoder)
        self._frozen = {name: t.detach() for name, t in encoder.state_dict().items()}
        self._blocks = resblocks(self._tower.skeleton) if positions == "blocks" else []
        first = next(t for t in self._frozen.values() if t.is_floating_point())
        self.by_task = nn.ModuleList(
            nn.ModuleList(
                Adapter.start(rank, width).to(first) for width in [*block_widths(self._blocks), dim]
            )
            for _ in self.tasks
        )

    @property
    def adapters(self) -> dict[str, nn.ModuleList]:
        """Task -> its adapters by position."""
        return dict(zip(self.tasks, cast(Any, self.by_task), strict=True))

    def encode(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        """Adapted features `[B, D]`.

        Args:
            images: `[B, 3, H, W]`; or, where only final features are adapted, those `[B, D]` that
                `frozen_features` gave for them.
        """
        change = self._change(weights, task_ids)
        with tapped(self._blocks, change):
            return change(len(self._blocks), self._frozen_part(images, task_ids))

    def trace(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        change = self._change(weights, task_ids)
        return traced(
            self._blocks,
            lambda: change(len(self._blocks), self._frozen_part(images, task_ids)),
            change,
        )

    def frozen_features(self, images: Tensor, task_ids: Tensor) -> Tensor | None:
        """Features `[B, D]` before their adapter, which no learning changes; None with adapters
        inside the encoder."""
        if self._blocks:
            return None
        with torch.no_grad():
            return self._tower(self._frozen, images, task_ids)

    @property
    def traceable(self) -> bool:
        return bool(self._blocks)

    @property
    def looks_inside(self) -> bool:
        return self.traceable

    def statistics(self, batches: object) -> None:
        """Its folds need none."""

    def frozen_state(self) -> dict[str, Tensor]:
        return {} if self._blocks else dict(self._frozen)

    def _frozen_part(self, images: Tensor, task_ids: Tensor) -> Tensor:
        if self._blocks:
            return self._tower(self._frozen, images, task_ids)
        known = images if images.ndim == 2 else self.frozen_features(images, task_ids)
        return cast(Tensor, known)

    def _change(self, weights: Mapping[str, Tensor], task_ids: Tensor) -> Change:
        def adapter(task: int, position: int) -> tuple[Tensor, Tensor]:
            name = f"by_task.{task}.{position}"
            return weights[f"{name}.down"], weights[f"{name}.up"]

        return changer(adapter, len(self.tasks), task_ids, self.activation)

    def fold(self) -> AdaptedEncoder:
        """The frozen encoder with its frozen adapters; exact."""
        adapters = {
            task: [(a.down.detach().clone(), a.up.detach().clone()) for a in cast(Any, own)]
            for task, own in self.adapters.items()
        }
        return AdaptedEncoder(self._tower.filled(self._frozen), adapters, self.activation)

    @torch.no_grad()
    def fold_linear(self) -> PerTaskEncoder:
        """A static encoder per task with its linear adapter in the projection; exact.

        `z − up down z` of `z = pooled @ proj` is `pooled @ proj (1 − up down)ᵀ`. The encoders
        share everything but their projections.

        Raises:
            AdamergeError: adapters that are not linear, or not only on the final features of a
                tower with a projection.
        """
        if self.activation != "identity" or self._blocks:
            raise AdamergeError(
                "only linear adapters of final features fold into the projection: expected "
                "method.activation: identity and method.positions: final; use fold instead"
            )
        if "backbone.proj" not in self._frozen:
            raise AdamergeError(
                "the encoder has no projection backbone.proj to fold adapters into: expected the "
                "static encoder of an open_clip VisionTransformer; use fold instead"
            )
        weights = {name.removeprefix("backbone."): t for name, t in self._frozen.items()}
        tower = Tower(cast(nn.Module, self._tower.skeleton.backbone))
        folded = {}
        for task, own in self.adapters.items():
            down, up = cast(Any, own[0]).down, cast(Any, own[0]).up
            projection = weights["proj"] - (weights["proj"] @ down.T) @ up.T
            folded[task] = FoldedEncoder(tower, {**weights, "proj": projection})
        return PerTaskEncoder(folded)

    @property
    def folds(self) -> dict[str, bool]:
        linear = self.activation == "identity" and not self._blocks
        return {"per_task": True} if linear and "backbone.proj" in self._frozen else {}

    def fold_as(self, name: str, statistics: None) -> nn.Module:
        return self.fold_linear()
