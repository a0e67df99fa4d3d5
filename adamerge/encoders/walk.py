"""A tower's blocks, run one at a time, and what each weight in them is multiplied with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from adamerge._base.errors import AdamergeError
from adamerge.encoders.tower import Tower, resblocks

See = Callable[[str, Tensor], None]  # (name of a weight, what it multiplies [..., in])


class Blocks:
    """The blocks of a transformer tower, one after the other, with weights that are given.

    Args:
        tower: of an open_clip image tower.

    Raises:
        AdamergeError: a tower without blocks.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.modules = resblocks(tower.skeleton)
        self._names = list(tower.skeleton.state_dict())

    def __len__(self) -> int:
        return len(self.modules)

    def prefix(self, index: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"transformer.resblocks.{index}."

    def names(self, index: int) -> list[str]:
        """The tensors of a block."""
        return [name for name in self._names if name.startswith(self.prefix(index))]

    def outside(self) -> list[str]:
        """The tensors of no block."""
        inside = {name for index in range(len(self)) for name in self.names(index)}
        return [name for name in self._names if name not in inside]

    @torch.no_grad()
    def embed(self, weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Tokens `[B, N, W]` of images `[B, 3, H, W]`, as the first block is given them.

        Args:
            weights: at least those of `outside`.
        """
        reached: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached.append(inputs[0])
            raise _Reached

        handle = self.modules[0].register_forward_pre_hook(stop)
        try:
            outside = {name: weights[name] for name in self.outside()}
            functional_call(self.tower.skeleton, outside, (images,), strict=False)
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]

    def run(
        self, index: int, weights: Mapping[str, Tensor], tokens: Tensor, see: See | None = None
    ) -> Tensor:
        """Tokens after a block.

        Args:
            weights: at least those of the block, by their full names.
            tokens: before it, as `embed` or the block before gave them.
            see: called as by `seeing`, with full names.
        """
        block, prefix = self.modules[index], self.prefix(index)
        own = {name.removeprefix(prefix): weights[name] for name in self.names(index)}
        with seeing(block, see, prefix) if see is not None else contextlib.nullcontext():
            return cast(Tensor, functional_call(block, own, (tokens,)))


def has_blocks(tower: Tower) -> bool:
    """Whether a tower is a transformer whose blocks can be run one at a time."""
    try:
        return bool(resblocks(tower.skeleton))
    except AdamergeError:
        return False


class _Reached(Exception):
    """The first block was reached; nothing after it is computed."""


@contextlib.contextmanager
def seeing(module: nn.Module, see: See, prefix: str = "") -> Iterator[None]:
    """While open, `see` is called with what every weight within a module multiplies.

    Of a linear layer that is its input; of a packed projection of self-attention (`in_proj_weight`)
    and, in a tower, of the output projection behind it theirs; of a normalisation its input,
    normalised. Layers that are not called as modules are not seen.

    Args:
        see: gets the name of a weight and a tensor `[..., in]`.
        prefix: put before the names.
    """
    handles = []
    for name, part in module.named_modules():
        place = f"{prefix}{name}." if name else prefix
        hook = _hook(part, place, see)
        if hook is not None:
            handles.append(part.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(part: nn.Module, place: str, see: See) -> Callable[..., None] | None:
    if isinstance(part, nn.Linear):
        return lambda _, inputs, named: see(f"{place}weight", (*inputs, *named.values())[0])
    if isinstance(part, nn.LayerNorm) and part.elementwise_affine:
        shape, eps = part.normalized_shape, part.eps

        def normalised(_: nn.Module, inputs: tuple[Tensor, ...], named: Any) -> None:
            given = (*inputs, *named.values())[0]
            see(f"{place}weight", nn.functional.layer_norm(given, shape, eps=eps))

        return normalised
    if isinstance(getattr(part, "in_proj_weight", None), Tensor):

        def packed(_: nn.Module, inputs: tuple[Tensor, ...], named: Any) -> None:
            if _attends_to_itself(inputs, named):
                see(f"{place}in_proj_weight", inputs[0])

        return packed
    return None


def _attends_to_itself(inputs: tuple[Tensor, ...], named: Mapping[str, Any]) -> bool:
    """Whether query, key and value are one tensor."""
    others = [*inputs[1:3], named.get("key"), named.get("value")]
    return bool(inputs) and all(other is inputs[0] for other in others if other is not None)
