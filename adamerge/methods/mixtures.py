"""Weight-ensembling mixtures: towers whose MLPs every image merges anew (arXiv 2402.00433)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.encoders.rows import pooled
from adamerge.encoders.tower import Tower, resblocks
from adamerge.methods.gated import Deltas, DenseDeltas, SparseDeltas, gated_linear, largest
from adamerge.weights.task_vectors import TaskVectors


class GatedLinear(nn.Module):
    """A linear layer that every image merges for itself.

    Args:
        tensors: `weight [out, in]`, `bias [out]` and `bias_deltas [T, out]` if there is a bias, and
            `weight_deltas [T, out, in]`, or `weight_values`, `weight_places` and `weight_starts`
            (see `SparseDeltas`). A weight or bias without deltas is one that no expert changed.
    """

    weight: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, _empty(tensor))

    def forward(self, hidden: Tensor, gates: Tensor) -> Tensor:
        """`[B, N, in], [G, T] -> [B, N, out]`; each gate serves B / G neighbours."""
        own = cast(Any, self)
        deltas = self._deltas(gates.shape[1])
        grouped = hidden.reshape(len(gates), -1, hidden.shape[-1])
        if deltas is None:
            output = nn.functional.linear(grouped, self.weight)
        else:
            output = gated_linear(grouped, gates, self.weight, deltas)
        if "bias_deltas" in self._parameters:
            with torch.autocast(hidden.device.type, enabled=False):
                bias = torch.addmm(own.bias, gates, own.bias_deltas)
            output = output + bias[:, None].to(output.dtype)
        elif "bias" in self._parameters:
            output = output + own.bias.to(output.dtype)
        return output.view(*hidden.shape[:-1], -1)

    def _deltas(self, tasks: int) -> Deltas | None:
        own = cast(Any, self)
        if "weight_deltas" in self._parameters:
            return DenseDeltas(own.weight_deltas)
        if "weight_values" not in self._parameters:
            return None
        shape = (tasks, *self.weight.shape)
        return SparseDeltas(own.weight_values, own.weight_places, own.weight_starts, shape)


class Router(nn.Module):
    """Hidden states to gates: the mean over the tokens of a small network's outputs.

    Args:
        width: of the hidden states, and of the network's hidden layer.
        tasks: T.
        layers: 0 learns T gates, the same for all images; 1 is linear; 2 has one ReLU layer.
        init: last bias, or the gates themselves. Weights are drawn from N(0, 0.01²).
    """

    def __init__(self, width: int, tasks: int, layers: int, init: float) -> None:
        super().__init__()
        if layers == 0:
            self.gates = nn.Parameter(torch.full((tasks,), float(init)))
            return
        self.fc1 = nn.Linear(width, width) if layers == 2 else None
        self.fc2 = nn.Linear(width, tasks)
        for layer in (self.fc1, self.fc2):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.fc2.bias, init)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, N, W] -> [B, T]` (`[1, T]` without layers), in the router's own precision."""
        if "gates" in self._parameters:
            return self.gates[None]
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.fc2.weight.dtype)
            if self.fc1 is not None:
                hidden = self.fc1(hidden).relu()
            return cast(Tensor, self.fc2(hidden.mean(1)))  # linear, so the mean may come first


class Mixture(nn.Module):
    """An MLP with `GatedLinear` layers and a router in front."""

    def __init__(self, mlp: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, layer in mlp.named_children():
            part = within(tensors, f"{name}.")
            self.add_module(name, GatedLinear(part) if isinstance(layer, nn.Linear) else layer)
        self.layers = tuple(name for name, _ in mlp.named_children())
        router = within(tensors, "router.")
        depth = sum(name.endswith("weight") for name in router)
        tasks, width = router["fc2.weight"].shape if depth else (len(router["gates"]), 0)
        with torch.device("meta"):
            self.router = Router(width, tasks, depth, 0.0).requires_grad_(False)

    def forward(self, hidden: Tensor) -> Tensor:
        gates = self.router(hidden)
        for name in self.layers:
            layer = getattr(self, name)
            hidden = layer(hidden, gates) if isinstance(layer, GatedLinear) else layer(hidden)
        return hidden


class DynamicEncoder(nn.Module):
    """A tower of mixtures with frozen routers and task vectors: merges anew for every image.

    Args:
        tower: the architecture, with its plain MLPs.
        weights: what `state` gave, of a tower of mixtures; held, not copied.
    """

    def __init__(self, tower: Tower, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        mixed = mixture_tower(tower, weights)
        self.backbone = mixed.filled(spread_router(tower, weights))

    def forward(self, images: Tensor, task_ids: Tensor | None = None) -> Tensor:
        """`[B, 3, H, W] -> [B, D]`; `task_ids` is accepted and ignored."""
        return pooled(self.backbone(images))

    def state(self) -> dict[str, Tensor]:
        """What makes this encoder again; a router shared by all blocks is there once."""
        seen: set[int] = set()
        state = {}
        for name, tensor in self.backbone.state_dict().items():
            if ".mlp.router." in name and tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            state[name] = tensor
        return state


def mlp_names(tower: Tower) -> list[str]:
    """`transformer.resblocks.<i>.mlp` of every block.

    Raises:
        AdamergeError: no such blocks, or an MLP of other layers than linear ones.
    """
    names = []
    for index, block in enumerate(resblocks(tower.skeleton)):
        name, mlp = f"transformer.resblocks.{index}.mlp", getattr(block, "mlp", None)
        if not isinstance(mlp, nn.Sequential) or not list(mlp.parameters()):
            raise AdamergeError(
                f"the backbone has no {name} with linear layers: expected the VisionTransformer "
                "of an open_clip model such as ViT-B-32"
            )
        for part, layer in mlp.named_children():
            if not isinstance(layer, nn.Linear) and list(layer.parameters()):
                raise AdamergeError(
                    f"{name}.{part} of the backbone is a {type(layer).__name__}: WEMoE takes MLPs "
                    "of linear layers and activations; use AdaMerging for this architecture"
                )
        names.append(name)
    return names


def mixture_tower(tower: Tower, weights: Mapping[str, Tensor]) -> Tower:
    """The same tower with its MLPs as mixtures of the shapes of `weights`."""
    names, spread = mlp_names(tower), spread_router(tower, weights)

    def mix(skeleton: nn.Module) -> None:
        for name, block in zip(names, resblocks(skeleton), strict=True):
            cast(Any, block).mlp = Mixture(cast(nn.Module, block.mlp), within(spread, f"{name}."))

    return tower.changed(mix)


def routers_of(tower: Tower) -> list[nn.Module]:
    """The routers of a tower of mixtures, in the order of its blocks."""
    return [cast(Any, block).mlp.router for block in resblocks(tower.skeleton)]


def spread_router(tower: Tower, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with the first block's router for every block that has none of its own."""
    first, *others = mlp_names(tower)
    shared = within(weights, f"{first}.router.")
    spread = dict(weights)
    for name in others:
        for key, tensor in shared.items():
            spread.setdefault(f"{name}.router.{key}", tensor)
    return spread


def expert_mlps(vectors: TaskVectors, blocks: tuple[str, ...], density: float) -> dict[str, Tensor]:
    """The MLPs' θ0 and τ, under the names of `GatedLinear`; below density 1 matrices sparse.

    Raises:
        AdamergeError: no expert has an MLP of its own.
    """
    found = {n: t for n, t in vectors.constants.items() if n.startswith(blocks)}
    if not any(name.startswith(blocks) for name in vectors.names):
        raise AdamergeError(
            "no expert changed an MLP of the tower, so WEMoE has nothing to mix: use AdaMerging "
            "(method=layer_wise), or experts with fine-tuned MLPs"
        )
    for name in vectors.names:
        if not name.startswith(blocks):
            continue
        found[name] = vectors.pretrained[name]
        deltas = largest(vectors.deltas[name], density)
        if density < 1 and deltas.ndim == 3:
            sparse = SparseDeltas.of(deltas)
            found[f"{name}_values"], found[f"{name}_places"] = sparse.values, sparse.places
            found[f"{name}_starts"] = torch.tensor(sparse.starts)
        else:
            found[f"{name}_deltas"] = deltas
    return found


def merged_mlp(parts: Mapping[str, Tensor], gates: Tensor) -> dict[str, Tensor]:
    """One MLP's plain tensors, of the tensors of a `Mixture` and gates `[T]`."""
    merged = {}
    for name, tensor in parts.items():
        if not name.endswith(("weight", "bias")):
            continue
        row = gates.to(tensor)
        if f"{name}_deltas" in parts:
            rows = parts[f"{name}_deltas"].flatten(1)
        elif f"{name}_values" not in parts:  # no expert changed it
            merged[name] = tensor
            continue
        else:
            keys = (f"{name}_values", f"{name}_places", f"{name}_starts")
            values, places, starts = (parts[key] for key in keys)
            shape = (len(gates), tensor.shape[0], tensor.shape[1])
            rows = SparseDeltas(values, places, starts, shape).rows(0, len(tensor))
        merged[name] = torch.addmv(tensor.flatten(), rows.T, row).view(tensor.shape)
    return merged


def within(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names begin so, without that beginning."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def _empty(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False)
