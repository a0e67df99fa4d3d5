"""Random numbers of transforms: the same on every device, in every storage and order of tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(seed: int, task: str, layer: str, shape: Sequence[int]) -> Tensor:
    """Numbers in [0, 1) of one layer of one task, `[*shape]`, float32 on the CPU.

    They depend on the seed, the task's name, the layer's name and the shape alone.
    """
    digest = hashlib.sha256(f"{seed}\n{task}\n{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float32)
