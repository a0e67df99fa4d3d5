"""Encoders that differ by task: the experts themselves, and a static encoder per task."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders import rows
from adamerge.encoders.rows import Inputs
from adamerge.encoders.tower import Tower, block_widths, resblocks, traced
from adamerge.weights.task_vectors import TaskVectors


class Experts(nn.Module):
    """The experts themselves as one encoder: every image is encoded by its own task's expert.

    The teacher of `objectives.ExpertKL` and `ExpertL1`. An expert is made of the task vectors when
    an image asks for it, one at a time, and dropped again: no second copy of any model is kept,
    and the task vectors stay on their device. Without gradients.

    Args:
        backbone: the image tower, for its architecture only; left unchanged.
        task_vectors: untransformed task vectors of T tasks, the order of `task_ids`.

    Attributes:
        tasks: the T tasks.
        tower: the architecture.

    Raises:
        AdamergeError: task vectors that do not fit the backbone; on `trace`, a backbone without
            `transformer.resblocks`.
    """

    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__()
        self.tower = Tower(backbone)
        self.tower.check(task_vectors)
        self.task_vectors, self.tasks = task_vectors, task_vectors.tasks

    def forward(self, inputs: Inputs, task_ids: Tensor) -> Tensor:
        """Features of each input's own expert, `[B, D]`."""
        return self._by_expert(self.tower, inputs, task_ids)

    def trace(self, images: Tensor, task_ids: Tensor) -> Tensor:
        """The token means `[B, W]` after each block, then the features: `[B, blocks · W + D]`."""
        blocks = resblocks(self.tower.skeleton)

        def run(weights: Mapping[str, Tensor], part: Tensor) -> Tensor:
            return traced(blocks, lambda: self.tower(weights, part))

        return self._by_expert(run, images, task_ids)

    @property
    def widths(self) -> list[int]:
        """W of every block, the split of a trace."""
        return block_widths(resblocks(self.tower.skeleton))

    def weights(
        self,
        task: str,
        device: torch.device | None = None,
        names: Collection[str] | None = None,
    ) -> dict[str, Tensor]:
        """One expert's full state dict, or those of its tensors that are named."""
        vectors = self.task_vectors
        if names is None:
            whole = {**vectors.constants, **vectors.expert(task)}
            return {name: tensor.to(device) for name, tensor in whole.items()}
        return {name: self._tensor(vectors.index(task), name).to(device) for name in names}

    def _tensor(self, row: int, name: str) -> Tensor:
        vectors = self.task_vectors
        if name in vectors.buffers:
            return vectors.buffers[name][1 + row]
        if name not in vectors.pretrained:
            return vectors.constants[name]
        base = vectors.pretrained[name]
        return base + vectors.layers[name].row(row, base)

    @torch.no_grad()
    def _by_expert(
        self,
        run: Callable[[dict[str, Tensor], Any], Tensor],
        inputs: Inputs,
        task_ids: Tensor,
    ) -> Tensor:
        device = rows.tensors(inputs)[0].device
        self.tower.apply_buffers(lambda buffer: buffer.to(device))

        def encode(task: int, part: Inputs) -> Tensor:
            return run(self.weights(self.tasks[task], device), part)

        return by_task(encode, inputs, task_ids, len(self.tasks))


class PerTaskEncoder(nn.Module):
    """A static encoder per task; every image is encoded by that of its task.

    Args:
        encoders: one per task, in the order of `task_ids`; they may share tensors.
    """

    def __init__(self, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = tuple(encoders)
        self.encoders = nn.ModuleList(encoders.values())

    def forward(self, inputs: Inputs, task_ids: Tensor) -> Tensor:
        """Features or logits `[B, D]`."""

        def encode(task: int, part: Inputs) -> Tensor:
            ids = torch.full((rows.count(part),), task)
            return cast(Tensor, self.encoders[task](part, ids))

        return by_task(encode, inputs, task_ids, len(self.tasks))


def by_task(
    encode: Callable[[int, Inputs], Tensor], inputs: Inputs, task_ids: Tensor, tasks: int
) -> Tensor:
    """`encode(task, its inputs)` for every task of a batch, rows put back in order.

    Raises:
        AdamergeError: a task id outside `[0, tasks)`.
    """
    ids = task_ids.cpu()
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tasks:
        raise AdamergeError(
            f"task_ids has the values {ids.unique().tolist()}: expected 0 to {tasks - 1}, one per "
            "task"
        )
    found = rows.by_task(inputs, ids)
    parts = [encode(task, found[task]) for task in sorted(found)]
    order = ids.argsort(stable=True)
    return torch.cat(parts)[order.argsort().to(parts[0].device)]
