"""Parts of an image tower in a form that computes the same faster."""

from __future__ import annotations

import contextlib
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Below so many tokens attention by plain matrix products is several times faster on a CPU in
# bfloat16; above it, and in float32, it gains little or loses (benchmarks/fast_paths.py).
_FEW_TOKENS = 128


class PatchProduct(nn.Conv2d):
    """A convolution whose patches do not overlap, as one matrix product.

    Much faster on a CPU in bfloat16, where the gradient of such a convolution's weight is not made
    for the matrix unit; nowhere slower.
    """

    def forward(self, input: Tensor) -> Tensor:
        """`[B, C, H, W] -> [B, D, H / size, W / size]`; what is left at the edges is unused."""
        batch, channels = input.shape[:2]
        high, wide = self.kernel_size
        rows, columns = input.shape[2] // high, input.shape[3] // wide
        inside = input[:, :, : rows * high, : columns * wide]
        cut = inside.reshape(batch, channels, rows, high, columns, wide)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(batch * rows * columns, -1)
        weight = self.weight.reshape(len(self.weight), -1)
        flat = nn.functional.linear(patches, weight, self.bias)
        return flat.view(batch, rows, columns, -1).permute(0, 3, 1, 2)


def use_patch_products(module: nn.Module) -> None:
    """Has the convolutions of a module whose patches do not overlap compute as `PatchProduct`."""
    for part in module.modules():
        if type(part) is nn.Conv2d and _cuts(part):
            part.__class__ = PatchProduct


def _cuts(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding in ((0, 0), "valid")
    return plain and conv.kernel_size == conv.stride and conv.kernel_size != (1, 1)


def attention_for(
    tower: nn.Module, device: torch.device
) -> contextlib.AbstractContextManager[None]:
    """The faster attention for a tower's number of tokens on a CPU under autocast; elsewhere
    torch's own choice."""
    positions = getattr(tower, "positional_embedding", None)
    low = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not low or not isinstance(positions, Tensor) or len(positions) >= _FEW_TOKENS:
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[None]", sdpa_kernel(SDPBackend.MATH))
