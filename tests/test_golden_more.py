"""Merges without data give the second set's reference numbers; every label of it is accounted for.

The other families stand in `test_golden_more_*.py`, each with its own `CHECKS`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import adamerge
from adamerge import transforms
from adamerge.transforms.sparse import keep_probability
from tests import golden_data as golden
from tests import golden_more_data as more


def tsv_m(vectors: adamerge.TaskVectors) -> adamerge.TaskVectors:
    """TSV-M in one vector per task, by the loops of the set's README."""
    count = len(vectors.tasks)

    def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left @ right

    def shares(name: str, tau: torch.Tensor) -> torch.Tensor:
        if name not in more.lists("matrices"):
            return tau / count
        k = min(tau.shape[1:]) // count
        parts = [torch.linalg.svd(task, full_matrices=False) for task in tau]
        left = orthogonal(torch.cat([u[:, :k] for u, _, _ in parts], 1))
        right = orthogonal(torch.cat([v[:k] for _, _, v in parts], 0))
        sizes = torch.cat([s[:k] for _, s, _ in parts])
        columns = [slice(t * k, (t + 1) * k) for t in range(count)]
        return torch.stack([left[:, c] * sizes[c] @ right[c] for c in columns])

    return vectors.with_deltas((n, shares(n, tau)) for n, tau in vectors.deltas.items())


def given_numbers(seed: int, task: str, layer: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The set's own, in place of those that a transform draws."""
    return more.uniform(golden.TASKS.index(task), layer, shape)


def dare(dtype: torch.dtype) -> None:
    with patch("adamerge.transforms.sparse.uniform", given_numbers):
        more.check_merge("dare", transforms.dare(golden.task_vectors(dtype), density=0.3), 0.3)


def della(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    chance = {
        name: torch.stack([keep_probability(row, 0.6, 0.15) for row in tau])
        for name, tau in vectors.deltas.items()
    }
    more.check_layers_per_task("della/probability", chance)
    with patch("adamerge.transforms.sparse.uniform", given_numbers):
        more.check_merge("della", transforms.della(vectors, density=0.6, epsilon=0.15))


def breadcrumbs(dtype: torch.dtype) -> None:
    found = transforms.breadcrumbs(golden.task_vectors(dtype), density=0.3, largest=0.05)
    more.check_merge("breadcrumbs", found, 0.3)


def breadcrumbs_rows(dtype: torch.dtype) -> None:
    largest, density = more.expected("breadcrumbs_rows/fractions").tolist()
    found = transforms.breadcrumbs(golden.task_vectors(dtype), density, largest, rows=True)
    more.check_merge("breadcrumbs_rows", found)


def emr(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    found = transforms.emr(vectors)
    by_layers = transforms.emr(vectors, by_layers=True)
    assert found.per_task and by_layers.per_task
    scales = more.expected("emr/scale")
    wide = {
        n: tau / scales.view(-1, *[1] * (tau.ndim - 1)).to(tau) for n, tau in found.deltas.items()
    }
    more.check_layers_per_task("emr/mask", {n: (tau != 0).to(tau) for n, tau in wide.items()})
    unified = {n: torch.where(t.amax(0) > 0, t.amax(0), t.amin(0)) for n, t in wide.items()}
    more.check_layers("emr/unified", unified)
    whole = more.lists("full")[0]
    size = (more.expected(f"emr/unified/full/{whole}") * (wide[whole] != 0)).abs().flatten(1).sum(1)
    for label, vectors in (("scale", found), ("scale_by_layers", by_layers)):
        own = vectors.deltas[whole].double().abs().flatten(1).sum(1)
        more.agrees((own / size).to(dtype), f"emr/{label}")
    more.check_features("emr", found, 1.0)


def magmax(dtype: torch.dtype) -> None:
    more.check_merge("magmax", transforms.magmax(golden.task_vectors(dtype)), 0.5)


def tall(dtype: torch.dtype) -> None:
    found = transforms.tall(golden.task_vectors(dtype))
    assert found.per_task
    more.check_merge("tall/vector", found)
    masks = {name: (tau != 0).to(tau) for name, tau in found.deltas.items()}
    more.check_layers_per_task("tall/mask", masks)
    kept = torch.cat([mask.flatten(1) for mask in masks.values()], 1).mean(1)
    more.agrees(kept, "tall/kept")


def consensus(dtype: torch.dtype) -> None:
    more.check_merge("consensus", transforms.consensus(golden.task_vectors(dtype)), 0.5)


def pcb(dtype: torch.dtype) -> None:
    found = transforms.pcb(golden.task_vectors(dtype))
    more.check_merge("pcb", found, 1.2)
    kept = torch.cat([tau.flatten(1) != 0 for tau in found.deltas.values()], 1)
    more.agrees(kept.to(dtype).mean(1), "pcb/kept")


def pcb_readme(dtype: torch.dtype) -> None:
    found = transforms.pcb(golden.task_vectors(dtype), formula="readme")
    more.check_merge("pcb_readme", found)
    kept = torch.cat([tau.flatten(1) != 0 for tau in found.deltas.values()], 1)
    more.agrees(kept.to(dtype).mean(1), "pcb_readme/kept")


def model_stock(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    found = transforms.model_stock(vectors)
    ratio = [
        found.deltas[n].flatten() @ vectors.deltas[n].flatten() / vectors.deltas[n].square().sum()
        for n in more.lists("layers")
    ]
    more.agrees(torch.stack(ratio) * len(golden.TASKS), "model_stock/ratio")
    more.check_merge("model_stock", found)


def metagpt(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    found = transforms.metagpt(vectors)
    name = more.lists("layers")[0]
    shares = (found.deltas[name] / vectors.deltas[name]).flatten(1)[:, 0]
    more.agrees(shares, "metagpt/coefficients")
    more.check_merge("metagpt", found)


def lines(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    more.check_merge("lines", transforms.lines(vectors, alpha=0.2, beta=0.5))
    outside = more.lists("layers")[0]  # what is in no block is scaled by alpha alone
    for label, changed in (("ties", transforms.ties(vectors)), ("tsv_m", tsv_m(vectors))):
        found = transforms.lines(changed, experts=vectors)
        ratio = found.deltas[outside].norm() / changed.deltas[outside].norm()
        more.agrees(ratio, f"lines/alpha_of_{label}")


def slerp(dtype: torch.dtype) -> None:
    experts = {task: golden.state(f"expert_{task}", dtype) for task in golden.TASKS[:2]}
    two = adamerge.TaskVectors(golden.state("pretrained", dtype), experts)
    more.check_merge("slerp", transforms.slerp(two, position=0.3))


def multislerp(dtype: torch.dtype) -> None:
    more.check_merge("multislerp", transforms.multislerp(golden.task_vectors(dtype)))


def karcher(dtype: torch.dtype) -> None:
    more.check_merge("karcher", transforms.karcher(golden.task_vectors(dtype)))


CHECKS: dict[str, more.Check] = {
    "dare": dare,
    "della": della,
    "breadcrumbs": breadcrumbs,
    "breadcrumbs_rows": breadcrumbs_rows,
    "emr": emr,
    "magmax": magmax,
    "tall": tall,
    "consensus": consensus,
    "pcb": pcb,
    "pcb_readme": pcb_readme,
    "model_stock": model_stock,
    "metagpt": metagpt,
    "lines": lines,
    "slerp": slerp,
    "multislerp": multislerp,
    "karcher": karcher,
}

# Labels without a check, and why.
NOT_CHECKED: dict[str, str] = {
    "fixmatch": "batches hold one view of every image, and no objective needs two",
}


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype) -> None:
    more.run(CHECKS[label], label, dtype)


def test_every_label_is_checked_or_has_a_reason() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_golden_more*.py"))
    families = [importlib.import_module(f"tests.{name}") for name in names]
    accounted = [label for family in families for label in family.CHECKS]
    assert sorted([*accounted, *NOT_CHECKED]) == list(more.labels())


def test_the_folders_fit_together() -> None:
    assert more.lists("tasks") == golden.TASKS
    assert more.lists("layers") == golden.task_vectors().names
