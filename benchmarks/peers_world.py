"""What both sides of `peers.py` get: one tower in two layouts, experts, images and heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModel

from adamerge.heads import Heads
from adamerge.layouts import tower_to_transformers
from adamerge.objectives import Entropy

State = dict[str, Tensor]
INIT, RATE, SCALE, CLASSES = 0.3, 1e-3, 100.0, 100  # λ, learning rate, logit scale, classes


def open_clip_tower(blocks: int) -> nn.Module:
    """The image tower of ViT-B-32-quickgelu with that many blocks, random weights."""
    return VisionTransformer(
        224, 32, 768, blocks, 12, 4.0, output_dim=512, act_layer=QuickGELU
    ).eval()


def transformers_tower(blocks: int) -> CLIPVisionModel:
    """The same in transformers, without the projection."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            num_hidden_layers=blocks, patch_size=32, hidden_act="quick_gelu", projection_dim=512
        )
    ).eval()


@dataclass
class World:
    """Weights under open_clip's names, the same for both sides."""

    blocks: int
    tasks: tuple[str, ...]
    pretrained: State
    images: Tensor  # [T, B, 3, 224, 224]
    classifiers: Tensor  # [T, C, D], unit rows
    device: torch.device

    @classmethod
    def make(cls, blocks: int, tasks: int, batch: int, device: torch.device) -> World:
        torch.manual_seed(0)
        pretrained = dict(open_clip_tower(blocks).state_dict())
        images = torch.randn(tasks, batch, 3, 224, 224)
        rows = normalize(torch.randn(tasks, CLASSES, 512), dim=-1)
        return cls(
            blocks,
            tuple(f"t{task}" for task in range(tasks)),
            {name: tensor.to(device) for name, tensor in pretrained.items()},
            images.to(device),
            rows.to(device),
            device,
        )

    def expert(self, task: str) -> State:
        """The pretrained weights and seeded noise; the projection stays, as in its experts."""
        generator = torch.Generator(self.device).manual_seed(1 + self.tasks.index(task))
        return {
            name: base
            if name == "proj"
            else base + 1e-3 * torch.randn(base.shape, generator=generator, device=self.device)
            for name, base in self.pretrained.items()
        }

    def converted(self, state: State) -> State:
        """Under the names of `transformers_tower`, and `visual_projection.weight`."""
        return {
            name: tensor.contiguous() for name, tensor in tower_to_transformers(state, "").items()
        }

    @property
    def projection(self) -> Tensor:
        """`visual_projection.weight`, `[D, W]`."""
        return self.pretrained["proj"].T.contiguous()

    def task_ids(self) -> Tensor:
        """`[T · B]`, on the CPU."""
        return torch.arange(len(self.tasks)).repeat_interleave(self.images.shape[1])

    def objective(self) -> Entropy:
        """Ours, over the same classifiers."""
        rows = dict(zip(self.tasks, SCALE * self.classifiers, strict=True))
        names = [str(number) for number in range(CLASSES)]
        return Entropy(Heads(rows, {task: names for task in self.tasks}).to(self.device))
