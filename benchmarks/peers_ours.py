"""Our side of `peers.py`: through the public interface, as a run does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peers_world import INIT, RATE, Shape, World, open_clip_tower, transformers_tower
from torch import Tensor, nn

from adamerge import TaskVectors
from adamerge.learn.blocks import recomputing
from adamerge.learn.step import step_loss
from adamerge.methods.adamerging import AdaMerging
from adamerge.methods.base import MergeMethod
from adamerge.methods.wemoe import WEMoE


class Pooled(nn.Module):
    """A transformers tower with its projection, as an encoder of images `[B, D]`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.vision = transformers_tower(shape)
        self.projection = nn.Linear(shape.width, shape.dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.vision(images)[1])


def own_names(converted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of `Pooled`, of those of the transformers tower."""
    return {
        "projection.weight" if name.startswith("visual_projection") else f"vision.{name}": tensor
        for name, tensor in converted.items()
    }


def layer_wise(world: World, same_tower: bool) -> AdaMerging:
    """Layer-wise AdaMerging on the open_clip tower, or on theirs (`same_tower`)."""
    if same_tower:
        backbone: nn.Module = Pooled(world.shape)
        pretrained = own_names(world.converted(world.pretrained))
        experts = {t: own_names(world.converted(world.expert(t))) for t in world.tasks}
    else:
        backbone, pretrained = open_clip_tower(world.shape), world.pretrained
        experts = {task: world.expert(task) for task in world.tasks}
    return AdaMerging(backbone, TaskVectors(pretrained, experts), init=INIT).to(world.device)


def wemoe(world: World, batch_gate: bool) -> WEMoE:
    """WEMoE on the open_clip tower, in training as theirs."""
    experts = {task: world.expert(task) for task in world.tasks}
    vectors = TaskVectors(world.pretrained, experts)
    method = WEMoE(open_clip_tower(world.shape), vectors, init=INIT, batch_gate=batch_gate)
    return method.to(world.device).train()


class Ours:
    """A method, its optimizer and one batch of every task.

    With `recompute` activations are computed again in the backward pass.
    """

    def __init__(
        self,
        world: World,
        method: MergeMethod,
        bf16: bool = False,
        recompute: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        self.world, self.bf16, self.recompute = world, bf16, recompute
        self.micro_batch = micro_batch
        self.method: Any = method
        self.objective, self.ids = world.objective(), world.task_ids()
        self.images = world.images.flatten(0, 1)
        self.optimizer = torch.optim.Adam(self.method.parameters(), lr=RATE)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.bf16)

    def gradients(self) -> None:
        with recomputing(self.method, self.recompute), self.autocast():
            loss, _, _ = step_loss(
                self.method, self.objective, self.images, self.ids, self.micro_batch
            )
        loss.backward()

    def fresh_gradients(self) -> None:
        self.optimizer.zero_grad()
        self.gradients()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def learn(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def merging(self, grads: Mapping[str, Tensor]) -> None:
        """Merge and gradient of λ, given dL/dW."""
        with self.autocast():
            merged = self.method.weights()
        live = [name for name, tensor in merged.items() if tensor.requires_grad]
        torch.autograd.backward(
            [merged[name] for name in live], [grads[name].to(merged[name].dtype) for name in live]
        )
        self.optimizer.zero_grad()

    def layers(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every layer."""
        vectors = self.method.task_vectors
        return {name: tuple(vectors.pretrained[name].shape) for name in vectors.names}

    def table(self) -> dict[str, Tensor]:
        """λ `[T]` by layer, names as in a transformers tower where it is one."""
        names, values = self.method.coefficient_table()
        return {n.removeprefix("vision."): v for n, v in zip(names, values.T, strict=True)}
