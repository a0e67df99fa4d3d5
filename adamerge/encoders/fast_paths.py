"""Parts of an image tower in a form that computes the same faster."""

from __future__ import annotations

import contextlib
import sys
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


class OpenAttention(nn.MultiheadAttention):
    """torch's self-attention, with queries, keys and values as views of their one product.

    torch copies them apart, and fills and adds three gradients of that size. The output projection
    is called as a module, so that hooks see its input. What this does not compute is left to torch.
    """

    @staticmethod
    def computes(part: nn.MultiheadAttention) -> bool:
        """Whether an attention has nothing but the two projections."""
        plain = part.bias_k is None and part.bias_v is None and not part.add_zero_attn
        return plain and part._qkv_same_embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attended tokens, and the attention's weights if they are asked for."""
        plain = query is key is value and query.ndim == 3 and key_padding_mask is None
        simple = attn_mask is None or (attn_mask.is_floating_point() and attn_mask.ndim == 2)
        if not (plain and simple) or self.training:
            rest = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return super().forward(query, key, value, *rest)
        packed = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        parts = packed if self.batch_first else packed.transpose(0, 1)
        batch, tokens = parts.shape[:2]
        heads = parts.view(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind()
        weights = None
        if need_weights:
            scores = queries @ keys.mT / self.head_dim**0.5
            weights = (scores if attn_mask is None else scores + attn_mask).softmax(-1)
            mixed = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask)
        joined = mixed.transpose(1, 2).reshape(batch, tokens, self.embed_dim)
        return self.out_proj(joined if self.batch_first else joined.transpose(0, 1)), weights


def use_fast_paths(module: nn.Module) -> None:
    """Gives the parts of a module that have a faster form here that form, in place."""
    for part in module.modules():
        if type(part) is nn.Conv2d and _cuts(part):
            part.__class__ = PatchProduct
        if type(part) is nn.MultiheadAttention and OpenAttention.computes(part):
            part.__class__ = OpenAttention
    if "open_clip" in sys.modules:  # without it no part is one of its transformers
        from adamerge.encoders.last_block import use_pooled_blocks

        use_pooled_blocks(module)


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
