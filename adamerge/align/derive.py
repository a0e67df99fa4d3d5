"""The spec of a module: of transformers by their blocks, of other networks by their graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from adamerge.align.blocks import Part, norms, parts_of
from adamerge.align.symmetry import Group, Place, Spec, from_table
from adamerge.align.tracing import traced

_SCALES = ("gamma", "lambda1", "lambda_1", "lambda_2")  # of each channel, within a block
# Tensors outside the blocks: the axis of the residual stream, and whether they read it.
_OUTSIDE = (
    (r"class_embedding|cls_token|positional_embedding|pos_embed", -1, False),
    (r"(word|position|token_type|token)_embeddings?\.weight", 1, False),
    (r"(conv1|patch_embedding|patch_embed\.proj)\.(weight|bias)", 0, False),
    (r"proj|text_projection", 0, True),
    (r"(pooler\.dense|pre_classifier|head|classifier)\.weight", 1, True),
)
_AFTER = r"(pooler\.dense|pre_classifier|head|classifier)\.bias"  # of what has been read
_LAST = r"proj|text_projection|head\.weight|classifier\.weight"  # the last layer


def spec(module: nn.Module, table: Mapping[str, Group | Mapping[str, int]] | None = None) -> Spec:
    """Which axes of which tensors of a network move together.

    - Chains and residual networks of linear, convolutional and norm layers: one group for the
      outputs of every layer, or of all layers that add to one residual stream. The forward pass
      is recorded by torch.fx; channels that meet an unknown operation stay where they are, as
      inputs and outputs do.
    - Transformers (open_clip, transformers, timm, torch): the hidden units of every MLP, the heads
      of every attention, and the residual stream where its norms are LayerNorm or RMSNorm, all
      tensors along it are known and the network does not return it.

    Args:
        module: the network; only its structure matters.
        table: the groups, instead of deriving them: see `from_table`.

    Raises:
        AdamergeError: the forward pass cannot be recorded, or a table does not fit: naming tensor
            and axis.

    >>> found = spec(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [(place.tensor, place.axis) for place in found.groups["0"].places]
    [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    """
    if table is not None:
        return from_table(table, module.state_dict())
    parts = parts_of(module)
    if not parts:
        return traced(module)
    stream = _stream(module, parts)
    groups = {part.name: part.group for part in parts}
    return Spec(groups if stream is None else {"stream": stream, **groups})


def _stream(module: nn.Module, parts: Sequence[Part]) -> Group | None:
    """The residual stream, if all along it is known and the network does not return it."""
    width, state = parts[0].width, module.state_dict()
    blocks = {part.block for part in parts}
    one_list = len({block.rpartition(".")[0] for block in blocks}) == 1
    if not one_list or any(part.width != width for part in parts):
        return None
    readers = {tensor for part in parts for tensor in part.readers}
    writers = {tensor for part in parts for tensor in part.writers}
    inside = {tensor for part in parts for tensor in part.tensors}
    inside -= readers | writers
    along = {name for name, _ in norms(module, width)} - inside
    pooled = any(re.search(r"(pooler\.dense|pre_classifier)\.weight$", name) for name in state)
    places: list[Place] = []
    returned = True
    for name, tensor in state.items():
        in_block = any(name.startswith(f"{block}.") for block in blocks)
        if name in readers:
            places.append(Place(name, 1, reads=True))
        elif name in writers or name in along:
            places.append(Place(name, 0))
        elif name in inside or not tensor.is_floating_point():
            continue
        elif in_block:
            if name.rpartition(".")[2] not in _SCALES or tuple(tensor.shape) != (width,):
                return None
            places.append(Place(name, 0))
        elif (place := _outside(name, tensor, width, pooled)) is None:
            return None
        else:
            places += place
            returned = returned and not _is(_LAST, name)
    if returned or getattr(module, "output_tokens", False):
        return None
    return Group(width, tuple(places))


def _outside(name: str, tensor: Tensor, width: int, pooled: bool) -> list[Place] | None:
    """Where the stream stands in a tensor outside the blocks; None if that is not known."""
    if _is(_AFTER, name) or (pooled and _is(r"classifier\.weight", name)):
        return []
    for pattern, axis, reads in _OUTSIDE:
        if _is(pattern, name) and tensor.shape[axis] == width:
            return [Place(name, axis % tensor.ndim, reads=reads)]
    return None


def _is(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
