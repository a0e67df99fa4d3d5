"""`align.weight_matching` beside the code of the authors of Git Re-Basin, on the same networks.

    git clone https://github.com/samuela/git-re-basin
    OMP_NUM_THREADS=1 python benchmarks/align_authors.py git-re-basin

Pairs of an MLP and of a ResNet, as in `align.py`, are trained apart on handwritten digits. Both
codes match each pair, in float64 and with the same order of groups, drawn from the same seed. The
authors' `src/weight_matching.py` is run as it is, in this process; numpy stands in for `jax.numpy`,
and a generator of torch for `jax.random`. Printed are the objective, `Σ_W <W_one, P(W_two)>`,
before and after either, and for how many groups the permutations are the same.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from align import Digits, trained

from adamerge import align


class Keys:
    """Orders of groups, drawn as `align.weight_matching` draws them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def permutation(self, count: int) -> list[int]:
        return torch.randperm(count, generator=self.generator).tolist()


def authors_code(folder: Path) -> types.ModuleType:
    """The authors' module, with numpy in place of jax."""
    random = types.ModuleType("jax.random")
    random.permutation = lambda key, count: key.permutation(count)  # type: ignore[attr-defined]
    jax = types.ModuleType("jax")
    jax.numpy, jax.random = np, random  # type: ignore[attr-defined]
    utils = types.ModuleType("utils")
    utils.rngmix = lambda key, iteration: key  # type: ignore[attr-defined]
    stand_ins = {"jax": jax, "jax.numpy": np, "jax.random": random, "utils": utils}
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    module = types.ModuleType("weight_matching")
    path = folder / "src" / "weight_matching.py"
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
    for name in stand_ins:
        del sys.modules[name]
    return module


def authors_matching(
    code: Any, spec: align.Spec, states: Sequence[align.symmetry.State], seed: int
) -> align.symmetry.Permutations:
    """What the authors' `weight_matching` finds for the second of two state dicts."""
    axes: dict[str, dict[int, str]] = defaultdict(dict)
    for name, group in spec.groups.items():
        for place in group.places:
            if place.outer != 1 or states[0][place.tensor].shape[place.axis] != group.units:
                raise SystemExit(f"{place}: their code knows whole axes only")
            axes[place.tensor][place.axis] = name
    # Running statistics of batch norm have no say, in their networks there are none.
    counted = {n: a for n, a in axes.items() if "running" not in n}
    full = {
        name: tuple(named.get(axis) for axis in range(states[0][name].ndim))
        for name, named in counted.items()
    }
    theirs = code.permutation_spec_from_axes_to_perm(full)
    ordered = {name: theirs.perm_to_axes[name] for name in spec.groups}
    theirs = code.PermutationSpec(perm_to_axes=ordered, axes_to_perm=full)
    one, two = ({name: state[name].numpy() for name in full} for state in states)
    found = code.weight_matching(Keys(seed), theirs, one, two, silent=True)
    return {name: torch.from_numpy(order.copy()) for name, order in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row for each pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="a clone of samuela/git-re-basin")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args(arguments)
    code, digits = authors_code(given.folder), Digits.read()
    print("| network | seed | before | adamerge | the authors' code | same permutations |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in ("MLP", "ResNet"):
        modules = [trained(name, seed, digits) for seed in (100, 101)]
        spec = align.spec(modules[0])
        states = [module.double().state_dict() for module in modules]
        for seed in given.seeds:
            ours = align.weight_matching(spec, *states, seed=seed)
            theirs = authors_matching(code, spec, states, seed)
            same = sum(torch.equal(ours[group], theirs[group]) for group in spec.groups)
            before, after, beside = (
                align.agreement(spec, states[0], align.apply(spec, orders, states[1]))
                for orders in (align.symmetry.identities(spec), ours, theirs)
            )
            print(
                f"| {name} | {seed} | {before:.6f} | {after:.6f} | {beside:.6f} | "
                f"{same} of {len(spec.groups)} |"
            )


if __name__ == "__main__":
    main()
