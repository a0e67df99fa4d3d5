"""Parts of transformer blocks: the hidden units of every MLP, and the heads of every attention.

They are known by the names of their layers, as open_clip, transformers, timm and torch write them.
In an attention only whole heads move.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from adamerge.align.symmetry import Group, Place

# Layers that read the stream and the one that writes to it, of an attention and of an MLP.
_ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), "out_proj"),
    (("q_proj", "k_proj", "v_proj"), "o_proj"),
    (("q_lin", "k_lin", "v_lin"), "out_lin"),
    (("self.query", "self.key", "self.value"), "output.dense"),
    (("attention.query", "attention.key", "attention.value"), "output.dense"),
    (("qkv",), "proj"),
)
_MLPS = (
    (("c_fc",), "c_proj"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("intermediate.dense",), "output.dense"),
)
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_POSITIONS = r"relative_position|relative_attention|rel_pos|bias_table|attention_bias"


@dataclass(frozen=True)
class Part:
    """An attention or an MLP of a block.

    Attributes:
        name: of its group.
        group: its units.
        block: the name of the block.
        readers: its tensors that read the residual stream, along axis 1.
        writers: those that write to it, along axis 0.
        width: of the stream.
        tensors: all of it that are known.
    """

    name: str
    group: Group
    block: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    width: int

    @property
    def tensors(self) -> set[str]:
        return {place.tensor for place in self.group.places} | {*self.readers, *self.writers}


def parts_of(module: nn.Module) -> list[Part]:
    """All attentions and MLPs of blocks that are known, in the order of the state dict.

    Heads stay where a bias of positions, or a tensor that is not known, may belong to them.
    """
    state = module.state_dict()
    seen = list(_attentions(module))
    blocks = {block for block, _ in seen}
    parts = [*(part for _, part in seen if part is not None), *_mlps(module, blocks)]
    width = parts[0].width if parts else 0
    known = {name for part in parts for name in part.tensors} | dict(norms(module, width)).keys()
    unknown = {name for name in state if name not in known and tuple(state[name].shape) != (width,)}
    biased = any(re.search(_POSITIONS, name) for name in state)
    order = {name: index for index, name in enumerate(state)}
    found = []
    for part in sorted(parts, key=lambda part: order[part.group.places[0].tensor]):
        beside = any(name.startswith(f"{part.block}.") for name in unknown)
        if not (part.name.endswith("heads") and (biased or beside)):
            found.append(part)
    return found


def _attentions(module: nn.Module) -> Iterator[tuple[str, Part | None]]:
    """The block of every attention, and its heads where whole heads can move."""
    for name, attention in module.named_modules():
        block, dot = name.rpartition(".")[0], name and name + "."
        if isinstance(attention, nn.MultiheadAttention):
            yield block, _multihead(dot, block, attention)
        elif _pair(attention, _ATTENTIONS) is not None:
            yield block, _projections(dot, block, attention)


def _multihead(dot: str, block: str, attention: nn.MultiheadAttention) -> Part | None:
    if attention.in_proj_weight is None or attention.bias_k is not None:
        return None
    places = [Place(f"{dot}in_proj_weight", 0, outer=3)]
    writers = [f"{dot}out_proj.weight"]
    if attention.in_proj_bias is not None:
        places.append(Place(f"{dot}in_proj_bias", 0, outer=3))
        writers.append(f"{dot}out_proj.bias")
    places.append(Place(f"{dot}out_proj.weight", 1, reads=True))
    group = Group(attention.num_heads, tuple(places))
    readers = (f"{dot}in_proj_weight",)
    return Part(f"{dot}heads", group, block, readers, tuple(writers), attention.embed_dim)


def _projections(dot: str, block: str, attention: nn.Module) -> Part | None:
    found = _pair(attention, _ATTENTIONS)
    heads = _heads(attention)
    if found is None or heads is None:
        return None
    names, first, _, last = found
    outer = 3 if len(names) == 1 else 1
    if any(layer.out_features != outer * last.in_features for layer in first):
        return None  # fewer heads of keys than of queries
    if last.in_features % heads:
        return None
    part = _part(f"{dot}heads", block, dot, found, heads, outer)
    own = {f"{dot}{name}" for name in attention.state_dict()}
    beside = {f"{dot}{name}" for name, _ in norms(attention, part.width)}
    return part if own <= part.tensors | beside else None


def _heads(attention: nn.Module) -> int | None:
    """The number of heads, as an attention, a part of it or its settings say it."""
    for holder in (attention, *attention.children(), getattr(attention, "config", None)):
        for name in _HEADS:
            if isinstance(getattr(holder, name, None), int):
                return int(getattr(holder, name))
    return None


def _mlps(module: nn.Module, blocks: Collection[str]) -> Iterator[Part]:
    for name, mlp in module.named_modules():
        found = _pair(mlp, _MLPS)
        block = name if name in blocks else name.rpartition(".")[0]
        if found is None or block not in blocks:
            continue
        _, first, _, last = found
        hidden = last.in_features
        if any(layer.out_features != hidden for layer in first):
            continue
        dot = name and name + "."
        part = _part(f"{dot}hidden", block, dot, found, hidden, 1)
        if block != name:  # all of the MLP is seen
            places = tuple(Place(f"{dot}{tensor}", 0) for tensor, _ in norms(mlp, hidden))
            part = replace(part, group=Group(hidden, part.group.places + places))
            if not {f"{dot}{key}" for key in mlp.state_dict()} <= part.tensors:
                continue
        yield part


def _pair(
    module: nn.Module, table: Sequence[tuple[tuple[str, ...], str]]
) -> tuple[tuple[str, ...], list[nn.Linear], str, nn.Linear] | None:
    """The linear layers of a module that have the names of a row of the table."""
    for names, last in table:
        layers = [_linear(module, name) for name in (*names, last)]
        found = [layer for layer in layers if layer is not None]
        if len(found) == len(layers):
            return names, found[:-1], last, found[-1]
    return None


def _linear(module: nn.Module, path: str) -> nn.Linear | None:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, nn.Linear) else None


def _part(
    name: str,
    block: str,
    dot: str,
    found: tuple[tuple[str, ...], list[nn.Linear], str, nn.Linear],
    units: int,
    outer: int,
) -> Part:
    names, first, last_name, last = found
    places = []
    for layer_name, layer in zip(names, first, strict=True):
        places.append(Place(f"{dot}{layer_name}.weight", 0, outer))
        if layer.bias is not None:
            places.append(Place(f"{dot}{layer_name}.bias", 0, outer))
    places.append(Place(f"{dot}{last_name}.weight", 1, reads=True))
    readers = tuple(f"{dot}{layer_name}.weight" for layer_name in names)
    writers = [f"{dot}{last_name}.weight"]
    if last.bias is not None:
        writers.append(f"{dot}{last_name}.bias")
    group = Group(units, tuple(places))
    return Part(name, group, block, readers, tuple(writers), last.out_features)


def norms(module: nn.Module, width: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of norms along all of a stream."""
    for name, norm in module.named_modules():
        along = isinstance(norm, nn.LayerNorm | nn.RMSNorm) and norm.normalized_shape == (width,)
        for key, tensor in norm.named_parameters(recurse=False) if along else ():
            yield f"{name}.{key}" if name else key, tensor
