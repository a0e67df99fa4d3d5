"""The measurements of `peers.py`: times in turns, differences of results, peaks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from hardware import now
from meters import peak_above
from peers_ours import Ours, layer_wise, wemoe
from peers_theirs import TheirLayerWise, TheirMixtures
from peers_world import INIT, RATE, World
from torch import Tensor

LEARNED = 5  # steps after which λ are compared
THEIRS = {"fusion-bench": False, "fusion-bench, bf16": True}
OURS = {  # on their tower, in bf16, with `recompute`
    "adamerge": (False, False, False),
    "adamerge, bf16": (False, True, False),
    "adamerge, recompute": (False, False, True),
    "adamerge, recompute, bf16": (False, True, True),
    "adamerge, their tower": (True, False, False),
    "adamerge, their tower, bf16": (True, True, False),
}
MERGING = ("adamerge", "adamerge, bf16")
MODES = {"gates per image": False, "gates per batch": True}
MIXTURES = [f"{side}, {mode}" for mode in MODES for side in ("fusion-bench", "adamerge")]
Scheme = Callable[[], float]  # runs once, and gives its seconds


def without_bf16() -> None:
    """Leaves the schemes in bfloat16 out, for a core that has no units for it."""
    for schemes in (THEIRS, OURS):
        for name in [name for name in schemes if name.endswith("bf16")]:
            del schemes[name]


def timed(device: torch.device, work: Callable[[], object]) -> Scheme:
    def run() -> float:
        start = now(device)
        work()
        return now(device) - start

    return run


def medians(schemes: Mapping[str, Scheme], rounds: int) -> dict[str, float]:
    """Median seconds of each scheme; they take turns, and the first turn is a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in schemes}
    for _ in range(rounds + 1):
        for name, scheme in schemes.items():
            found[name].append(scheme())
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def compare_steps(
    world: World,
    rounds: int,
    names: Collection[str] | None = None,
    micro_batch: int | None = None,
) -> tuple[dict[str, float], dict[str, float], str]:
    """Seconds of a step and of the merging work by scheme, and a line on λ.

    Args:
        names: of ours, which are timed; None: all.
        micro_batch: images that ours encodes at a time; theirs always encodes one task's.
    """
    theirs = TheirLayerWise(world)
    methods = {same: layer_wise(world, same) for same in (False, True)}
    ours = {
        name: Ours(world, methods[same], *rest, micro_batch) for name, (same, *rest) in OURS.items()
    }
    line = _learned(theirs, ours["adamerge, their tower"])
    steps: dict[str, Scheme] = {name: _their_step(theirs, bf16) for name, bf16 in THEIRS.items()}
    steps |= {name: timed(world.device, ours[name].step) for name in names or ours}
    works = {"fusion-bench": _merging(theirs, world)}
    works |= {name: _merging(ours[name], world) for name in MERGING if name in ours}
    return medians(steps, rounds), medians(works, rounds), line


def compare_merging(world: World, rounds: int) -> dict[str, float]:
    """Seconds of the merging work alone by scheme."""
    works = {"fusion-bench": _merging(TheirLayerWise(world), world)}
    method = layer_wise(world, False)
    works["adamerge"] = _merging(Ours(world, method), world)
    if "adamerge, bf16" in OURS:
        works["adamerge, bf16"] = _merging(Ours(world, method, True), world)
    return medians(works, rounds)


def _their_step(theirs: TheirLayerWise, bf16: bool) -> Scheme:
    return lambda: theirs.learn(1, bf16)


def _merging(side: Any, world: World) -> Scheme:
    grads = {n: torch.randn(shape, device=world.device) for n, shape in side.layers().items()}
    return timed(world.device, lambda: side.merging(grads))


def _learned(theirs: TheirLayerWise, ours: Ours) -> str:
    theirs.learn(LEARNED, False)
    ours.learn(LEARNED)
    one, other = theirs.table(), ours.table()
    assert one.keys() == other.keys()
    moved = max(float((value - INIT).abs().max()) for value in one.values())
    off = torch.cat([(one[name] - other[name]).abs() for name in one])
    theirs.restart()
    return (
        f"λ [{len(next(iter(one.values())))}, {len(one)}] of their tower, float32, after {LEARNED} "
        f"steps of Adam (learning rate {RATE}, the longest way {moved:.1e}): largest difference "
        f"{float(off.max()):.1e}, median {float(off.median()):.1e}."
    )


def compare_mixtures(world: World, rounds: int) -> tuple[dict[str, float], str]:
    """Seconds of forward and backward by scheme, and a line on the routers' gradients."""
    schemes: dict[str, Scheme] = {}
    lines = []
    for mode, reduce in MODES.items():
        theirs, method = TheirMixtures(world, reduce), wemoe(world, reduce)
        mine = dict(method.named_parameters())
        with torch.no_grad():
            for name, tensor in theirs.routers().items():
                mine[name].copy_(tensor)
        ours = Ours(world, method)
        ours.gradients()
        lines.append(f"{_apart(theirs.gradients(), mine):.1e} ({mode})")
        schemes[f"fusion-bench, {mode}"] = theirs.learn
        schemes[f"adamerge, {mode}"] = timed(world.device, ours.fresh_gradients)
    found = medians(schemes, rounds)
    return found, (
        "Routers' gradients, largest difference relative to the largest gradient: "
        f"{', '.join(lines)}."
    )


def _apart(wanted: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> float:
    assert wanted.keys() == mine.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    pairs = [(mine[name].grad, grad) for name, grad in wanted.items()]
    return max(float((own - grad).abs().max()) for own, grad in pairs if own is not None) / scale


def peak_of(name: str, world: World) -> int:
    """Peak bytes above the inputs of two steps (layer-wise) or one (WEMoE) of a scheme."""
    if name in THEIRS:
        theirs = TheirLayerWise(world)
        return peak_above(world.device, lambda: theirs.learn(2, THEIRS[name]))
    if name in OURS:
        same, *rest = OURS[name]
        ours = Ours(world, layer_wise(world, same), *rest)
        return peak_above(world.device, lambda: ours.learn(2))
    side, mode = name.split(", ")
    if side == "fusion-bench":
        return peak_above(world.device, TheirMixtures(world, MODES[mode]).learn)
    mixed = Ours(world, wemoe(world, MODES[mode]))
    return peak_above(world.device, mixed.fresh_gradients)
