"""Statistics of units after interpolation, set back to what they were in the endpoints.

REPAIR: REnormalizing Permuted Activations for Interpolation Repair (arXiv 2211.08403).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adamerge._base.errors import AdamergeError
from adamerge.align.symmetry import Spec
from adamerge.align.units import call, evaluating, makers

_Norms = nn.modules.batchnorm._BatchNorm
Moments = dict[str, tuple[Tensor, Tensor]]  # layer -> mean and variance of every unit


@torch.no_grad()
def repair(
    spec: Spec,
    module: nn.Module,
    endpoints: Sequence[nn.Module],
    batches: Iterable[Any],
    shares: Sequence[float] | None = None,
) -> nn.Module:
    """An interpolated network whose units have the interpolated statistics of its endpoints:
    `E[x] = Σ_i s_i E[x_i]`, `std(x) = Σ_i s_i std(x_i)` for each unit x on unlabeled inputs.

    REPAIR (arXiv 2211.08403). After interpolating, units vary less than in either endpoint, more
    so with every layer. In the order in which the network computes them, the weights and bias of
    every linear and convolutional layer that makes units are rescaled; each layer is measured after
    all before it have been mended. Batch norms do the same with their statistics, which are
    computed anew of all inputs: what such a norm follows is left to it where it has no bias. A
    layer without a bias or a norm behind it has its deviation mended, not its mean.

    Every layer is one pass over the batches.

    Args:
        spec: of the network: layers whose outputs are its units are mended, the last is not.
        module: the interpolated network; left unchanged.
        endpoints: the networks that were interpolated, aligned.
        batches: unlabeled inputs: tensors, tuples of arguments, or mappings of named ones.
        shares: s, `[endpoints]`; equal ones if None.

    Returns:
        The mended network, in evaluation mode.

    Raises:
        AdamergeError: no batches, no endpoints, or another number of shares.

    >>> from adamerge import align
    >>> one, two = (nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2))
    >>> middle = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> _ = middle.load_state_dict(align.uniform([one.state_dict(), two.state_dict()]))
    >>> x = torch.randn(50, 3)
    >>> mended = align.repair(align.spec(middle), middle, [one, two], [x])
    >>> wanted = (one[0](x).std(0) + two[0](x).std(0)) / 2
    >>> bool((mended[0](x).std(0) - wanted).abs().max() < 1e-4)
    True
    """
    inputs = list(batches)
    shares = [1 / max(len(endpoints), 1)] * len(endpoints) if shares is None else list(shares)
    if not inputs or not endpoints or len(shares) != len(endpoints):
        raise AdamergeError(
            f"repair: {len(inputs)} batches, {len(endpoints)} endpoints and {len(shares)} shares "
            "were given: expected at least one batch, and one share for each endpoint"
        )
    mended = copy.deepcopy(module).eval()
    layers = _linear_layers(spec, mended)
    layers |= {name: layer for name, layer in mended.named_modules() if _has_statistics(layer)}
    with evaluating(*endpoints):
        wanted = [moments(endpoint, layers, inputs) for endpoint in endpoints]
    for name in moments(mended, layers, inputs[:1]):  # in the order of computation
        now = moments(mended, [name], inputs)[name]
        if _has_statistics(layers[name]):
            layers[name].running_mean.copy_(now[0])
            layers[name].running_var.copy_(now[1])
        else:
            parts = [
                torch.stack([s * found[name][0], s * found[name][1].sqrt()])
                for s, found in zip(shares, wanted, strict=True)
            ]
            mean, deviation = torch.stack(parts).sum(0)
            _rescale(layers[name], now, mean, deviation)
    return mended


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _Norms) and layer.running_mean is not None


def _linear_layers(spec: Spec, module: nn.Module) -> dict[str, Any]:
    """The layers that make units and can be rescaled."""
    found: dict[str, Any] = {}
    for group in spec.groups.values():
        made = cast(Any, makers(module, group))
        normed = any(_has_statistics(layer) for _, layer, _ in made)
        for name, layer, place in made:
            linear = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            if not linear or (normed and layer.bias is None):
                continue
            if place.outer == 1 and group.units == len(layer.weight):  # not heads
                found[name] = layer
    return found


def _rescale(layer: Any, now: tuple[Tensor, Tensor], mean: Tensor, deviation: Tensor) -> None:
    """Gives a layer's outputs another mean and deviation; units that never change keep theirs."""
    spread = now[1].sqrt()
    scale = torch.where(spread > 1e-6 * (now[0].abs() + spread), deviation / spread, 1.0)
    weight = layer.weight
    weight.mul_(scale.to(weight).reshape(-1, *[1] * (weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.copy_((layer.bias - now[0]) * scale + mean)


def moments(module: nn.Module, layers: Iterable[str], inputs: Iterable[Any]) -> Moments:
    """Mean and variance (of all samples, undivided by n − 1) of every unit that layers put out, in
    float64; of batch norms, of what they take in. In the order in which layers are run.
    """
    sums: dict[str, list[Tensor]] = {}
    handles = []
    for name in layers:
        layer = module.get_submodule(name)
        handles.append(layer.register_forward_hook(_adder(sums, name)))
    try:
        for batch in inputs:
            call(module, batch)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (count, total, squares) in sums.items():
        mean = total / count
        found[name] = mean, (squares / count - mean.square()).clamp_min(0)
    return found


def _adder(sums: dict[str, list[Tensor]], name: str) -> Callable[..., None]:
    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        values = args[0] if isinstance(layer, _Norms) else output
        axis = -1 if isinstance(layer, nn.Linear) else 1
        rows = values.movedim(axis, 0).reshape(values.shape[axis], -1).double()
        new = [torch.tensor(float(rows.shape[1])), rows.sum(1), rows.square().sum(1)]
        before = sums.get(name)
        sums[name] = [a + b for a, b in zip(before, new, strict=True)] if before else new

    return add
