"""The reference inputs and results of `tests/golden` (see its README), or of ADAMERGE_GOLDEN."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import adamerge
from adamerge.encoders import Clip, build_clip

FOLDER = Path(os.environ.get("ADAMERGE_GOLDEN") or Path(__file__).parent / "golden")
TASKS = tuple(
    sorted(path.stem.removeprefix("expert_") for path in FOLDER.glob("expert_*.safetensors"))
)


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def clip() -> Clip:
    return build_clip(str(FOLDER / "model.json"))


def state(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tower's weights in the model's own order of layers."""
    order = [name for name, _ in clip().backbone.named_parameters()]
    return {key: tensors(name)[key].to(dtype) for key in order}


def task_vectors(dtype: torch.dtype = torch.float64) -> adamerge.TaskVectors:
    experts = {task: state(f"expert_{task}", dtype) for task in TASKS}
    return adamerge.TaskVectors(state("pretrained", dtype), experts)


def heads(dtype: torch.dtype = torch.float64) -> adamerge.heads.Heads:
    weights = {task: tensors("heads")[task].to(dtype) for task in TASKS}
    classes = {task: [f"class {i}" for i in range(len(weights[task]))] for task in TASKS}
    return adamerge.heads.Heads(weights, classes)


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """One step's images of all tasks and their task ids."""
    images = [tensors("images")[task][step].to(dtype) for task in TASKS]
    ids = torch.repeat_interleave(torch.arange(len(TASKS)), images[0].shape[0])
    return torch.cat(images), ids
