"""What both sides of `peers.py` get: one tower in two layouts, experts, images and heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModel

from adamerge.encoders.heads import Heads
from adamerge.learn.objectives import Entropy
from adamerge.weights.formats.layouts import tower_to_transformers

State = dict[str, Tensor]
INIT, RATE, SCALE, CLASSES = 0.3, 1e-3, 100.0, 100  # λ, learning rate, logit scale, classes


@dataclass(frozen=True)
class Shape:
    """The sizes of an image tower of OpenAI's CLIPs."""

    size: int  # of images
    patch: int
    width: int
    blocks: int
    heads: int
    dim: int  # of features


SHAPES = {
    "ViT-B-32": Shape(224, 32, 768, 12, 12, 512),
    "ViT-L-14": Shape(224, 14, 1024, 24, 16, 768),
    "tiny": Shape(32, 16, 64, 2, 2, 16),
}


def open_clip_tower(shape: Shape) -> nn.Module:
    """open_clip's tower of that shape with QuickGELU and random weights."""
    return VisionTransformer(
        *(shape.size, shape.patch, shape.width, shape.blocks, shape.heads, 4.0),
        output_dim=shape.dim,
        act_layer=QuickGELU,
    ).eval()


def transformers_tower(shape: Shape) -> CLIPVisionModel:
    """The same in transformers, without the projection."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            image_size=shape.size,
            patch_size=shape.patch,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.heads,
            hidden_act="quick_gelu",
            projection_dim=shape.dim,
        )
    ).eval()


@dataclass
class World:
    """Weights under open_clip's names, the same for both sides."""

    shape: Shape
    tasks: tuple[str, ...]
    pretrained: State
    images: Tensor  # [T, B, 3, 224, 224]
    classifiers: Tensor  # [T, C, D], unit rows
    device: torch.device

    @classmethod
    def make(cls, shape: Shape, tasks: int, batch: int, device: torch.device) -> World:
        torch.manual_seed(0)
        pretrained = dict(open_clip_tower(shape).state_dict())
        images = torch.randn(tasks, batch, 3, shape.size, shape.size)
        rows = normalize(torch.randn(tasks, CLASSES, shape.dim), dim=-1)
        return cls(
            shape,
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
