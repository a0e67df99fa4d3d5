"""Merges by singular values give the second set's reference numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import adamerge
from adamerge import TaskVectors, transforms
from adamerge.learn.step import step_loss
from adamerge.methods import AdaMerging
from adamerge.transforms.spectral import directions
from tests import golden_data as golden
from tests import golden_more_data as more


def tsv_m(dtype: torch.dtype) -> None:
    check_shares("tsv_m", transforms.tsv_m(golden.task_vectors(dtype)))


def iso_c(dtype: torch.dtype) -> None:
    check_shares("iso_c", transforms.iso_c(golden.task_vectors(dtype)))


def iso_cts(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    found = transforms.iso_cts(vectors)
    more.check_merge("iso_cts", found)
    ranks = [min(vectors.pretrained[name].shape) for name in more.lists("matrices")]
    sizes = [directions(rank, len(vectors.tasks), 0.8) for rank in ranks]
    assert torch.equal(torch.tensor(sizes), more.expected("iso_cts/sizes"))


def check_shares(label: str, found: TaskVectors) -> None:
    """A merge, its shares, and four steps of learning on top of them."""
    more.check_merge(label, found)
    more.check_layers_per_task(f"{label}/share", more.per_task(found))
    losses, coefficients = learned(found)
    more.agrees(losses, f"{label}/learned/loss")
    more.agrees(coefficients, f"{label}/learned/coefficients")


def learned(vectors: TaskVectors) -> tuple[Tensor, Tensor]:
    """Losses and λ of four steps of layer-wise AdaMerging from 1."""
    dtype = more.vectors_dtype(vectors)
    method = AdaMerging(golden.clip().backbone, vectors, init=1.0)
    objective = adamerge.objectives.Entropy(golden.heads(dtype))
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = []
    for step in range(4):
        images, ids = golden.batch(step, dtype)
        optimizer.zero_grad()
        loss, _, _ = step_loss(method, objective, images, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), method.coefficients.detach()


def wudi(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    more.check_merge("wudi", transforms.wudi(vectors))
    rows = []
    for steps in (0, 1, 99, 299):  # the loss before the step that follows
        merged = more.merged(transforms.wudi(vectors, steps))
        rows.append([interference(vectors, merged[n], n) for n in more.lists("matrices")])
    more.agrees(torch.tensor(rows, dtype=dtype).T, "wudi/loss")


def interference(vectors: TaskVectors, merged: Tensor, name: str) -> float:
    """`Σ_t ‖(merged − τ_t) τ_tᵀ‖² / ‖τ_t‖²`."""
    taus = vectors.deltas[name].double()
    parts = [((merged.double() - t) @ t.T).square().sum() / t.square().sum() for t in taus]
    return float(sum(parts))


def cart(dtype: torch.dtype) -> None:
    found = transforms.cart(golden.task_vectors(dtype), 0.16)
    more.check_merge("cart", found, scale=1.5, vector_scale=1.5)


def svc_task_arithmetic(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    check_calibrated("svc_task_arithmetic", transforms.svc(vectors, scale=0.3), vectors, 0.3)


def svc_tsv_m(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    before = transforms.tsv_m(vectors)
    found = transforms.svc(before, alpha=1.0, experts=vectors)
    check_calibrated("svc_tsv_m", found, before, 1.0)


def check_calibrated(label: str, found: TaskVectors, before: TaskVectors, scale: float) -> None:
    """The merge, and by how much every singular value of the merge before it has changed: one of 0
    has no factor, and 1 is expected."""
    more.check_merge(label, found)
    factors = []
    for name in more.lists("matrices"):
        left, values, right = torch.linalg.svd(
            scale * before.deltas[name].double().sum(0), full_matrices=False
        )
        after = torch.einsum("ir,ij,rj->r", left, found.deltas[name].double().sum(0), right)
        factors.append(torch.where(values > 1e-5 * values[0], after / values, 1))
    more.agrees(torch.cat(factors).to(more.vectors_dtype(found)), f"{label}/factors")


def opcm(dtype: torch.dtype) -> None:
    vectors = golden.task_vectors(dtype)
    found = transforms.opcm(vectors)
    more.check_merge("opcm", found)
    first = vectors.deltas["class_embedding"][0] / found.deltas["class_embedding"][0]
    norms = vectors.norms()
    coefficients = []
    for count in range(1, len(vectors.tasks) + 1):  # shares times the last coefficient are cleaned
        squares = [
            (d[:count].double().sum(0) * first.mean()).square().sum() for d in found.deltas.values()
        ]
        coefficients.append(torch.stack(squares).sum().sqrt() / norms[:count].mean())
    more.agrees(torch.stack(coefficients).to(dtype), "opcm/coefficients")


CHECKS: dict[str, more.Check] = {
    check.__name__: check
    for check in (tsv_m, iso_c, iso_cts, wudi, cart, svc_task_arithmetic, svc_tsv_m, opcm)
}

# Keys of those labels that are not compared, and why.
NOT_COMPARED: dict[str, str] = {}

# Labels without a check, and why.
NOT_CHECKED: dict[str, str] = {}


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype) -> None:
    more.run(CHECKS[label], label, dtype, NOT_COMPARED)
