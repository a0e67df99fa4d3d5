"""open_clip towers that pool their first token compute no other after the last attention."""

from __future__ import annotations

from typing import Any

from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn


class PooledBlock(ResidualAttentionBlock):  # type: ignore[misc]
    """A block that may be asked for some tokens alone: `block(some [B, n, W], all, all)`."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, n, W] -> [B, n, W]`."""
        if k_x is None:
            return super().forward(q_x, attn_mask=attn_mask)
        seen = self.ln_1(k_x)
        x = q_x + self.ls_1(self.attn(self.ln_1(q_x), seen, seen, need_weights=False)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))


class PooledTransformer(Transformer):  # type: ignore[misc]
    """Blocks of which the last computes the first token alone, unless it is watched or changed."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, W] -> [B, 1, W]`, or `[B, N, W]` where a hook may look at all."""
        *before, last = self.resblocks
        changed = type(last.mlp) is not nn.Sequential
        if changed or attn_mask is not None or any(map(_watched, last.modules())):
            return super().forward(x, attn_mask)
        for block in before:
            x = block(x)
        return last(x[:, :1], x, x)


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def use_pooled_blocks(module: nn.Module) -> None:
    """Has the vision transformers within a module that pool their first token compute so."""
    part: Any
    for part in module.modules():
        if type(part) is VisionTransformer and _pools_first(part):
            part.transformer.__class__ = PooledTransformer
            part.transformer.resblocks[-1].__class__ = PooledBlock


def _pools_first(tower: Any) -> bool:
    inner = tower.transformer
    plain = type(inner) is Transformer and inner.batch_first and len(inner.resblocks) > 0
    if not plain or type(inner.resblocks[-1]) is not ResidualAttentionBlock:
        return False
    return tower.pool_type == "tok" and tower.attn_pool is None and not tower.output_tokens
