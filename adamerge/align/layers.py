"""What layers and operations do to the channels of `tracing`: followed, joined, or fixed."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx, nn

from adamerge.align.streams import FIXED, Streams, Weight, Wire, wires_in

_BY_CHANNEL = {f"torch.nn.modules.{name}" for name in ("activation", "dropout", "pooling")}
_ELEMENTWISE = {
    *("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "truediv", "div"),
    *("neg", "relu", "relu_", "relu6", "gelu", "silu", "mish", "elu", "leaky_relu", "selu", "celu"),
    *("softplus", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "dropout", "abs"),
    *("exp", "sqrt", "square", "clamp", "contiguous", "clone", "detach", "float", "double", "half"),
    *("to", "type_as"),
}
_MEANS = {"mean", "sum", "amax", "amin"}
_FACTS = {"shape", "dtype", "device", "ndim", "training"}
_BATCH, _SHAPE = "the size of the batch", "the shape"  # values of the graph that are no tensors


def called(
    streams: Streams, name: str, layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """The output of a layer of torch.nn."""
    wires = wires_in((args, kwargs))
    if len(wires) != 1 or len(args) != 1:
        return streams.fix(*wires)
    wire = wires[0]
    if isinstance(layer, nn.Linear):
        return _linear(streams, name, layer, wire)
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _convolution(streams, name, layer, wire)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm):
        rank = int(type(layer).__name__[-2]) if type(layer).__name__[-1] == "d" else 0
        flat = rank == 1 and wire.axis == -1 and wire.ndim in (None, 2)
        plain = wire.flat is None and streams.count(wire) not in (None, layer.num_features)
        return _affine(streams, layer, wire, (wire.axis == -rank - 1 or flat) and not plain)
    if isinstance(layer, nn.GroupNorm):
        channels = layer.num_groups in (1, layer.num_channels)
        fits = wire.flat is None and (wire.axis, wire.ndim) in ((-1, 2), (-2, 3), (-3, 4), (-4, 5))
        return _affine(streams, layer, wire, channels and fits)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        axis = len(layer.normalized_shape) + wire.axis
        if axis >= 0:
            streams.place(wire, layer.weight, axis)
            streams.place(wire, getattr(layer, "bias", None), axis)
        return wire
    if isinstance(layer, nn.PReLU):
        if layer.num_parameters == 1:
            return wire
        return _affine(streams, layer, wire, wire.ndim is not None and wire.ndim + wire.axis == 1)
    if isinstance(layer, nn.Embedding):
        out = Wire(streams.new(name, layer.embedding_dim))
        streams.place(out, layer.weight, 1)
        return out
    if isinstance(layer, nn.Flatten):
        return _flattened(streams, wire, layer.start_dim, layer.end_dim)
    if isinstance(layer, nn.Identity):
        return wire
    home, kind = type(layer).__module__, type(layer).__name__
    if home not in _BY_CHANNEL or isinstance(layer, nn.MultiheadAttention | nn.GLU):
        return streams.fix(wire)
    return _pooled(streams, kind, wire) if home.endswith("pooling") else wire


def _linear(streams: Streams, name: str, layer: nn.Linear, wire: Wire) -> Wire:
    if wire.axis != -1:
        streams.fix(wire)
    streams.place(wire, layer.weight, 1, reads=True)
    out = Wire(streams.new(name, layer.out_features), -1, wire.ndim)
    streams.place(out, layer.weight, 0)
    streams.place(out, layer.bias, 0)
    return out


def _convolution(
    streams: Streams, name: str, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, wire: Wire
) -> Wire:
    rank = layer.weight.ndim - 2
    if wire.axis != -rank - 1 or wire.flat:
        streams.fix(wire)
    if layer.groups == layer.in_channels == layer.out_channels:  # channel by channel
        out = Wire(wire.stream, -rank - 1, rank + 2)
    elif layer.groups == 1:
        streams.place(wire, layer.weight, 1, reads=True)
        out = Wire(streams.new(name, layer.out_channels), -rank - 1, rank + 2)
    else:
        out = streams.fix(wire)
    streams.place(out, layer.weight, 0)
    streams.place(out, layer.bias, 0)
    return out


def _affine(streams: Streams, layer: nn.Module, wire: Wire, fits: bool) -> Wire:
    """A layer that has numbers for each channel, in vectors."""
    if not fits:
        return streams.fix(wire)
    for name in ("weight", "bias", "running_mean", "running_var"):
        streams.place(wire, getattr(layer, name, None), 0)
    return wire


def _batch_norm(streams: Streams, wire: Wire, rest: list[Any]) -> Wire:
    """The function behind the layer: all its tensors have a number for each channel."""
    if wire.flat or wire.ndim is None or wire.ndim + wire.axis != 1:
        return streams.fix(wire)
    for value in rest:
        if isinstance(value, Weight):
            streams.place(wire, value.tensor, 0)
    return wire


def _pooled(streams: Streams, kind: str, wire: Wire) -> Wire:
    """Pooling over the last one, two or three axes (`kind` ends in 1d, 2d or 3d)."""
    rank = int(kind[-2]) if kind[-1] == "d" and kind[-2].isdigit() else 0
    return wire if rank and wire.axis < -rank and not wire.flat else streams.fix(wire)


def _flattened(streams: Streams, wire: Wire, start: int, end: int) -> Wire:
    if (start, end) != (1, -1) or wire.flat:
        return streams.fix(wire)
    if wire.axis == -1:  # everything else that is no batch comes before
        return replace(wire, ndim=2, flat=None if wire.ndim == 2 else "outer")
    if wire.ndim is None or wire.ndim + wire.axis != 1:
        return streams.fix(wire)
    return replace(wire, axis=-1, ndim=2, flat="inner")


def computed(streams: Streams, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The output of a function, or of a method of a tensor."""
    wires = wires_in((args, kwargs))
    name = str(node.target) if node.op == "call_method" else _title(node.target)
    if name == "getattr" and args[1] in _FACTS:
        return _SHAPE if args[1] == "shape" else None
    if name == "size":
        return _BATCH if args[1:] == (0,) else _SHAPE if len(args) == 1 else None
    if node.target is operator.getitem and args[0] == _SHAPE:
        return _BATCH if args[1] == 0 else None
    if not wires:  # of weights alone, or no tensor at all
        return (
            Wire(FIXED) if any(isinstance(v, Weight) for v in (*args, *kwargs.values())) else None
        )
    if name in _ELEMENTWISE:
        weights = [value for value in args if isinstance(value, Weight)]
        return _joined(streams, wires, weights)
    one = len(wires) == 1 and bool(args) and isinstance(args[0], Wire)
    if name == "batch_norm" and one:
        return _batch_norm(streams, wires[0], [*args[1:], *kwargs.values()])
    if name in ("cat", "concat") and not one:
        return _concatenated(streams, wires, args, kwargs)
    if not one:
        return streams.fix(*wires)
    wire, rest = wires[0], args[1:]
    if name == "flatten":
        start = rest[0] if rest else kwargs.get("start_dim", 0)
        end = rest[1] if len(rest) > 1 else kwargs.get("end_dim", -1)
        return _flattened(streams, wire, start, end)
    if name in ("view", "reshape") and rest == (_BATCH, -1):
        return _flattened(streams, wire, 1, -1)
    if node.target is operator.getitem and isinstance(args[1], tuple):
        return _indexed(streams, wire, list(args[1]))
    if name in _MEANS:
        dims = rest[0] if rest else kwargs.get("dim")
        keep = rest[1] if len(rest) > 1 else kwargs.get("keepdim", False)
        return _reduced(streams, wire, dims, bool(keep))
    if name == "permute":
        order = rest[0] if rest and isinstance(rest[0], tuple | list) else rest
        return _permuted(streams, wire, list(order))
    if "pool" in name and node.op == "call_function":
        return _pooled(streams, name, wire)
    if name == "matmul" and isinstance(rest[0], Weight) and rest[0].tensor.ndim == 2:
        return _product(streams, str(node), wire, rest[0])
    return streams.fix(wire)


def _title(target: Any) -> str:
    """The name of a function of torch or of Python's operators; of others nothing is known."""
    home = str(getattr(target, "__module__", None) or "torch")
    known = home.partition(".")[0] in ("torch", "_operator", "builtins")
    return str(getattr(target, "__name__", "")) if known else ""


def _joined(streams: Streams, wires: list[Wire], weights: list[Weight]) -> Wire:
    """Sums, products, and functions of one value, entry by entry."""
    free = [wire for wire in wires if streams.count(wire) is not None]
    wide = [wire for wire in free if streams.count(wire) != 1] or free
    if not free:
        return replace(wires[0], stream=FIXED)
    first = wide[0]
    alike = all((w.axis, w.flat) == (first.axis, first.flat) for w in wide)
    fixed = len(free) < len(wires)
    if not alike or fixed:
        return streams.fix(*wires)
    for other in wide[1:]:
        streams.join(first.stream, other.stream)
    for weight in weights:
        shape = weight.tensor.shape
        if len(shape) >= -first.axis and shape[first.axis] != 1:
            streams.place(first, weight.tensor, len(shape) + first.axis)
    ndims = [wire.ndim for wire in wide if wire.ndim is not None]
    return replace(first, ndim=max(ndims, default=None) if len(ndims) == len(wide) else None)


def _concatenated(
    streams: Streams, wires: list[Wire], args: Sequence[Any], kwargs: dict[str, Any]
) -> Wire:
    """Along another axis than that of the channels; else they are fixed."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = wires[0]
    parts = args[0] if isinstance(args[0], tuple | list) else ()
    alike = len(parts) == len(wires) and all(
        (w.axis, w.ndim, w.flat) == (first.axis, first.ndim, None) for w in wires
    )
    if not alike or (axis >= 0 and first.ndim is None):
        return streams.fix(*wires)
    if (axis if axis < 0 else axis - (first.ndim or 0)) == first.axis:
        return streams.fix(*wires)
    for other in wires[1:]:
        streams.join(first.stream, other.stream)
    return first


def _reduced(streams: Streams, wire: Wire, dims: Any, keep: bool) -> Wire:
    """Means and sums over other axes than that of the channels."""
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    if not listed or wire.flat or (wire.ndim is None and max(listed) >= 0):
        return streams.fix(wire)
    back = [d if d < 0 else d - (wire.ndim or 0) for d in listed]
    if wire.axis in back:
        return streams.fix(wire)
    if keep:
        return wire
    behind = sum(d > wire.axis for d in back)
    return replace(wire, axis=wire.axis + behind, ndim=wire.ndim and wire.ndim - len(back))


def _permuted(streams: Streams, wire: Wire, order: list[int]) -> Wire:
    if wire.flat or not all(isinstance(d, int) for d in order):
        return streams.fix(wire)
    count = len(order)
    places = [d % count for d in order]
    return replace(wire, axis=places.index(count + wire.axis) - count, ndim=count)


def _indexed(streams: Streams, wire: Wire, index: list[Any]) -> Wire:
    """Whole axes with new ones between or behind: `x[:, :, None, None]`."""
    kept = [place for place, entry in enumerate(index) if entry == slice(None)]
    whole = all(entry is None or entry == slice(None) for entry in index)
    if wire.flat or not whole or wire.ndim != len(kept):
        return streams.fix(wire)
    return replace(wire, axis=kept[wire.axis] - len(index), ndim=len(index))


def _product(streams: Streams, name: str, wire: Wire, weight: Weight) -> Wire:
    """Rows times a matrix `[in, out]`."""
    if wire.axis != -1:
        streams.fix(wire)
    streams.place(wire, weight.tensor, 0, reads=True)
    out = Wire(streams.new(name, weight.tensor.shape[1]), -1, wire.ndim)
    streams.place(out, weight.tensor, 1)
    return out
