"""Symmetries of chains and residual networks, read off the graph of their forward pass.

`torch.fx` records which layer reads what. The channels that a layer makes are followed through the
graph: layers that work channel by channel belong to them, sums join two of them into one residual
stream, and what the rules of `layers` do not know fixes the channels in place. A symmetry that is
missed costs alignment; one that does not exist would change the function, so nothing is guessed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from adamerge._base.errors import AdamergeError, one_line
from adamerge.align.layers import called, computed
from adamerge.align.streams import FIXED, Streams, Weight, Wire, wires_in
from adamerge.align.symmetry import Spec


class _Tracer(fx.Tracer):
    """Records the layers of torch.nn whole, and everything else operation by operation."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):
            return False
        return type(m).__module__.startswith("torch.nn.")


def traced(module: nn.Module) -> Spec:
    """The spec of a chain or residual network, of its forward pass.

    Raises:
        AdamergeError: the forward pass depends on values, so that it cannot be recorded.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever a forward pass raises of what is no tensor
        reason = one_line(error, 150)
        raise AdamergeError(
            f"the forward pass of {type(module).__name__} cannot be recorded by torch.fx "
            f"({reason}): give the groups as a table, align.spec(module, table)"
        ) from error
    streams = Streams(module)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args = fx.map_arg(node.args, values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, values.__getitem__)
        if node.op == "placeholder":
            values[node] = Wire(FIXED)
        elif node.op == "get_attr":
            values[node] = _attribute(module, node.target)
        elif node.op == "output":
            streams.fix(*wires_in((args, kwargs)))
        elif node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            values[node] = called(streams, str(node.target), layer, args, kwargs)
        else:
            values[node] = computed(streams, node, args, kwargs)
    return streams.spec()


def _attribute(module: nn.Module, path: object) -> Any:
    prefix, _, name = str(path).rpartition(".")
    value = getattr(module.get_submodule(prefix), name)
    return Weight(value) if isinstance(value, Tensor) else value
