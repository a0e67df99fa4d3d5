"""WEMoE: the MLPs of the tower merge themselves anew for every image; E-WEMoE: with less."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.experts import PerTaskEncoder
from adamerge.encoders.tower import (
    FoldedEncoder,
    Tower,
    block_widths,
    equal_runs,
    resblocks,
    tapped,
)
from adamerge.methods.base import MergeMethod
from adamerge.methods.mixtures import (
    DynamicEncoder,
    Router,
    expert_mlps,
    merged_mlp,
    mixture_tower,
    mlp_names,
    routers_of,
    within,
)
from adamerge.transforms.layers import check_number
from adamerge.weights.task_vectors import TaskVectors


class WEMoE(MergeMethod):
    """MLPs `θ0 + Σ_t g_t τ_t` with gates g from a learned router per block; the rest is static.

    Merging Multi-Task Models via Weight-Ensembling Mixture of Experts (arXiv 2402.00433). With
    `shared_router` and `density` 0.1 it is Efficient and Effective Weight-Ensembling Mixture of
    Experts for Multi-Task Model Merging (E-WEMoE, arXiv 2410.21804). In block i, hidden states
    `h [B, N, W]` enter the MLP; every image has gates `g = mean over tokens of router_i(h) [B, T]`
    and its own MLP weights.

    Args:
        backbone: an open_clip VisionTransformer (`model.visual`), for its architecture only.
        task_vectors: T task vectors; frozen. Of their MLP layers a dense model keeps views.
        base: where everything but the MLPs comes from: a folded encoder (or a tower) of the same
            architecture. None merges it by task arithmetic with `init`.
        init: the routers' last bias, and the coefficient of the static part.
        router_layers: 2 (one hidden ReLU layer of the tower's width), 1 (linear), or 0: T gates
            per block that do not look at the image.
        shared_router: one router for all blocks.
        density: of every MLP tensor of every task vector, keep the entries whose magnitude exceeds
            that tensor's (1 − density) quantile; below 1 they are stored sparse.
        batch_gate: while training, average the gates over each task's images of the batch.

    Attributes:
        routers: a `Router` per block, or one; with `fc1`, `fc2` (`gates` without layers).
        blocks: the names of the MLPs, in order.

    Raises:
        AdamergeError: a setting out of range, or a backbone, task vectors and base that do not fit.
    """

    def __init__(
        self,
        backbone: nn.Module,
        task_vectors: TaskVectors,
        base: nn.Module | None = None,
        init: float = 0.3,
        router_layers: Literal[0, 1, 2] = 2,
        shared_router: bool = False,
        density: float = 1.0,
        batch_gate: bool = False,
    ) -> None:
        super().__init__()
        _check(router_layers, density, init)
        self.tower = Tower(backbone)
        self.tower.check(task_vectors)
        self.tasks, self.blocks = task_vectors.tasks, tuple(mlp_names(self.tower))
        self.batch_gate, self.shared_router = batch_gate, shared_router
        widths = block_widths(resblocks(self.tower.skeleton))
        first = task_vectors.pretrained[task_vectors.names[0]]
        self.routers = nn.ModuleList(
            Router(width, len(self.tasks), router_layers, init).to(first)
            for width in (widths[:1] if shared_router else widths)
        )
        self._frozen = {
            **_static(task_vectors, base, init, self.blocks),
            **expert_mlps(task_vectors, self.blocks, density),
        }
        routers = {name: t.detach() for name, t in self.named_parameters()}
        self._mixed = mixture_tower(self.tower, self._all(routers))

    @property
    def mixes_images(self) -> bool:
        """Whether images of one call change each other's features, so that none may be cut off."""
        return self.batch_gate and self.training

    def encode(self, weights: Mapping[str, Tensor], images: Tensor, task_ids: Tensor) -> Tensor:
        if not self.mixes_images:
            return self._mixed(self._all(weights), images)
        with tapped(routers_of(self._mixed), lambda block, gates: _average(gates, task_ids)):
            return self._mixed(self._all(weights), images)

    @torch.no_grad()
    def gates(self, images: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """The gates of every image and block, `[B, 3, H, W] -> [B, blocks, T]`."""
        seen: list[Tensor] = []
        with tapped(routers_of(self._mixed), lambda block, gates: seen.append(gates)):
            self._mixed(self._all(self.weights()), images)
        return torch.stack([gates.expand(len(images), -1) for gates in seen], 1)

    def mean_gates(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The mean gates of every task, `[tasks, blocks, T]`, and of all images, `[blocks, T]`.

        Args:
            batches: images `[B, 3, H, W]` and task ids `[B]`; no labels. Both means are over
                images; a task without any is nan.
        """
        tasks = len(self.tasks)
        sums = torch.zeros(tasks, len(self.blocks), tasks, dtype=torch.float64)
        counts = torch.zeros(tasks, dtype=torch.float64)
        for images, ids in batches:
            sums.index_add_(0, ids.cpu(), self.gates(images).double().cpu())
            counts += torch.bincount(ids.cpu(), minlength=tasks)
        return sums / counts[:, None, None], sums.sum(0) / counts.sum()

    def fold(self) -> FoldedEncoder | DynamicEncoder:
        """Exact: a static encoder if no router looks at the image, a `DynamicEncoder` otherwise."""
        table = self._static_gates()
        if table is not None:
            return self.fold_static(table)
        weights = {name: tensor.detach().clone() for name, tensor in self.weights().items()}
        return DynamicEncoder(self.tower, self._all(weights))

    @torch.no_grad()
    def fold_static(self, gates: Tensor) -> FoldedEncoder:
        """The static encoder of fixed gates `[blocks, T]`, as one of the means of `mean_gates`.

        Raises:
            AdamergeError: gates of another shape, or not finite.
        """
        shape = [len(self.blocks), len(self.tasks)]
        if list(gates.shape) != shape or not bool(torch.isfinite(gates).all()):
            raise AdamergeError(
                f"gates to fold have shape {list(gates.shape)} or values that are not finite: "
                f"expected {shape} ([blocks, tasks]), from at least one image of every task"
            )
        static = {k: t for k, t in self._frozen.items() if not k.startswith(self.blocks)}
        for block, row in zip(self.blocks, gates, strict=True):
            parts = within(self._frozen, f"{block}.")
            static |= {f"{block}.{k}": t for k, t in merged_mlp(parts, row).items()}
        return FoldedEncoder(self.tower, static)

    def fold_per_task(self, gates: Tensor) -> PerTaskEncoder:
        """A static encoder per task of its mean gates, `[tasks, blocks, T]`."""
        rows = zip(self.tasks, gates, strict=True)
        return PerTaskEncoder({task: self.fold_static(row) for task, row in rows})

    @property
    def folds(self) -> dict[str, bool]:
        exact_static = self._static_gates() is not None
        return {} if exact_static else {"dynamic": True, "per_task": False, "single": False}

    @property
    def own_fold(self) -> str | None:
        return "dynamic" if self._static_gates() is None else None

    def statistics(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The mean gates, see `mean_gates`."""
        return self.mean_gates(batches)

    def fold_as(self, name: str, statistics: tuple[Tensor, Tensor]) -> nn.Module:
        if name == "dynamic":
            return self.fold()
        per_task, overall = statistics
        return self.fold_per_task(per_task) if name == "per_task" else self.fold_static(overall)

    def coefficient_table(self) -> tuple[list[str], Tensor] | None:
        """Blocks and their gates `[T, blocks]`, where these do not depend on the image."""
        table = self._static_gates()
        return None if table is None else (list(self.blocks), table.T)

    def _static_gates(self) -> Tensor | None:
        """`[blocks, T]` of routers without layers."""
        own = [cast(Any, router) for router in self.routers]
        if "gates" not in own[0]._parameters:
            return None
        own = own * len(self.blocks) if self.shared_router else own
        return torch.stack([router.gates.detach() for router in own])

    def _all(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of the tower of mixtures, of learnables named as in `self`."""
        full = dict(self._frozen)
        for index, block in enumerate(self.blocks):
            own = within(weights, f"routers.{0 if self.shared_router else index}.")
            full |= {f"{block}.router.{name}": tensor for name, tensor in own.items()}
        return full


def _average(gates: Tensor, task_ids: Tensor) -> Tensor:
    """`[B, T]` averaged over each task's images: `[tasks in the batch, T]`, or `[B, T]` again where
    the batch is no run of equally many images per task."""
    if len(gates) != len(task_ids):  # gates that no image has a part in
        return gates
    runs = equal_runs(task_ids)
    if runs is not None:
        return gates.view(len(runs), -1, gates.shape[1]).mean(1)
    member = nn.functional.one_hot(task_ids.to(gates.device)).to(gates)
    share = member / member.sum(0).clamp_min(1)
    return member @ (share.T @ gates)


def _check(router_layers: int, density: float, init: float) -> None:
    check_number("WEMoE", "init", init, -1e6, 1e6)
    check_number("WEMoE", "density", density, 0, 1, open_low=True)
    if router_layers not in (0, 1, 2):
        raise AdamergeError(
            f"router_layers is {router_layers!r}: expected 0, 1 or 2 (method.router_layers)"
        )


def _static(
    vectors: TaskVectors,
    base: nn.Module | None,
    init: float,
    blocks: tuple[str, ...],
) -> dict[str, Tensor]:
    """Everything but the MLPs: of `base`, or task arithmetic."""
    names = [name for name in vectors.names if not name.startswith(blocks)]
    constants = {n: t for n, t in vectors.constants.items() if not n.startswith(blocks)}
    if base is None:
        merged = {n: vectors.pretrained[n] + init * vectors.deltas[n].sum(0) for n in names}
        return {**merged, **constants}
    given = cast(nn.Module, getattr(base, "backbone", base)).state_dict()
    wanted = {**{n: vectors.pretrained[n] for n in names}, **constants}
    for name, tensor in wanted.items():
        if name not in given or given[name].shape != tensor.shape:
            found = list(given[name].shape) if name in given else "nothing"
            raise AdamergeError(
                f"base does not fit the backbone: tensor {name!r} is {found}, expected "
                f"{list(tensor.shape)}; give a static encoder of the same architecture"
            )
    return {name: given[name].detach().to(tensor) for name, tensor in wanted.items()}
