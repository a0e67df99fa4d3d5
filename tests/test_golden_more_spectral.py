"""Merges by singular values, and learned masks, give the second set's reference numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import adamerge
from adamerge import TaskVectors, transforms
from adamerge.learn.step import step_loss
from adamerge.learn.updates import Bilevel, Part, Step, Update
from adamerge.methods import AdaMerging, AdaRank, Concrete, MergeMethod
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
    method = AdaMerging(golden.clip().backbone, vectors, init=1.0)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    losses = [descend(method, optimizer, step) for step in range(4)]
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
    norms = vectors.norms()
    last = norms[0] / found.norms()[0]  # of the first task nothing is taken away
    coefficients = []
    for count in range(1, len(vectors.tasks) + 1):
        squares = [d[:count].double().sum(0).square().sum() for d in found.deltas.values()]
        coefficients.append(last * torch.stack(squares).sum().sqrt() / norms[:count].mean())
    more.agrees(torch.stack(coefficients).to(dtype), "opcm/coefficients")


def adarank_ta(dtype: torch.dtype) -> None:
    check_adarank("adarank_ta", golden.task_vectors(dtype))


def adarank_cart(dtype: torch.dtype) -> None:
    vectors = transforms.centre(golden.task_vectors(dtype))
    check_adarank("adarank_cart", vectors, init=1.5, rank=0.16)


def check_adarank(label: str, vectors: TaskVectors, **settings: float) -> None:
    method = AdaRank(golden.clip().backbone, vectors, **settings)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.017)
    losses, kept, coefficients = [], [], [method.coefficients.detach().clone()]
    for step in range(8):
        losses.append(descend(method, optimizer, step))
        kept.append(int(method.merged_components().sum()))
        coefficients.append(method.coefficients.detach().clone())
    more.agrees(torch.stack(losses), f"{label}/loss")
    more.agrees(torch.stack(coefficients), f"{label}/coefficients")
    assert torch.equal(torch.tensor(kept), more.expected(f"{label}/kept"))
    for name, scores in zip(method.matrices, method.scores, strict=True):
        more.agrees(scores.detach(), f"{label}/score/{name}")
    check_encoder(label, method)


def concrete_adam(dtype: torch.dtype) -> None:
    check_concrete("concrete_adam", dtype, by_adam)


def concrete_sgd(dtype: torch.dtype) -> None:
    check_concrete("concrete_sgd", dtype, lambda _: Bilevel(inner_lr=0.1))


def by_adam(method: Concrete) -> Update:
    """The bilevel update with an optimizer below that remembers earlier steps."""
    below = torch.optim.Adam([method.coefficients], lr=1.0)

    def update(step: Step) -> None:
        restart(method)
        method.learns = ("coefficients",)
        step.compute(Part(half=0))
        below.step()
        method.learns = ("logits",)
        step.move(lambda: step.compute(Part(half=1)))

    return update


def check_concrete(label: str, dtype: torch.dtype, update_of: Callable[[Concrete], Update]) -> None:
    """The paper's two levels, each on a batch of its own, then the second phase."""
    with patch("adamerge.methods.concrete.uniform", given_sample):
        method = Concrete(golden.clip().backbone, golden.task_vectors(dtype))
        learned = list(method.parameters())
        update, above = update_of(method), torch.optim.Adam(learned, lr=1e-3)
        losses: dict[str, list[Tensor]] = {"inner": [], "outer": [], "last": []}
        coefficients = []

        def compute(part: Part) -> Tensor:
            half = part.half or 0
            if half == 1:
                coefficients.append(method.coefficients.detach().clone())
            loss = backward(method, 2 * step + half)
            losses["outer" if half else "inner"].append(loss.detach())
            return loss

        for step in range(3):
            method.begin_step(step)
            update(Step(compute, above.step, learned, 3, step, method))
            if step in (0, 2):
                check_fields(f"{label}/logits_{step + 1}", method, method.logits)
        method.begin_step(method.mask_steps)
        restart(method)
        masks = [method.mask(name).detach() for name in method.task_vectors.names]
        check_fields(f"{label}/mask", method, masks)
        last = torch.optim.Adam([method.coefficients], lr=1e-3)
        losses["last"] = [descend(method, last, step) for step in (6, 7, 8)]
        for key, values in losses.items():
            more.agrees(torch.stack(values), f"{label}/{key}_loss")
        more.agrees(torch.stack(coefficients), f"{label}/inner_coefficients")
        more.agrees(method.coefficients.detach(), f"{label}/coefficients")
        check_features(label, method)


def given_sample(seed: int, sample: str, layer: str, shape: torch.Size) -> Tensor:
    """The set's own numbers: of samples 0, 1, 2, and 3 for the last."""
    number = sample.removeprefix("sample ")
    return more.uniform(3 if number == "last" else int(number), layer, shape)


def restart(method: Concrete) -> None:
    with torch.no_grad():
        method.coefficients.fill_(0.3)


def descend(method: MergeMethod, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    """One step on the entropy of a batch; the loss before it."""
    loss = backward(method, step)
    optimizer.step()
    return loss.detach()


def backward(method: MergeMethod, step: int) -> Tensor:
    """The entropy of a batch, with its gradient alone."""
    dtype = next(method.parameters()).dtype
    images, ids = golden.batch(step, dtype)
    method.zero_grad()
    loss, _, _ = step_loss(method, adamerge.objectives.Entropy(golden.heads(dtype)), images, ids)
    loss.backward()
    return loss


def check_fields(key: str, method: Concrete, tensors: Iterable[Tensor]) -> None:
    """A tensor for every layer, held against `key/fingerprint` and `key/full/…`."""
    values = [tensor.detach() for tensor in tensors]
    more.check_layers(key, dict(zip(method.task_vectors.names, values, strict=True)))


def check_encoder(label: str, method: MergeMethod) -> None:
    """What a method folds into, less the pretrained weights."""
    state = cast(nn.Module, method.fold().backbone).state_dict()
    dtype = next(method.parameters()).dtype
    start = golden.state("pretrained", dtype)
    more.check_layers(label, {name: state[name] - base for name, base in start.items()})
    check_features(label, method)


def check_features(label: str, method: MergeMethod) -> None:
    encoder, dtype = method.fold(), next(method.parameters()).dtype
    for task in golden.TASKS:
        images = golden.tensors("images")[task][0].to(dtype)
        more.agrees(encoder(images), f"{label}/features/{task}")


CHECKS: dict[str, more.Check] = {
    check.__name__: check
    for check in (
        *(tsv_m, iso_c, iso_cts, wudi, cart, svc_task_arithmetic, svc_tsv_m, opcm),
        *(adarank_ta, adarank_cart, concrete_adam, concrete_sgd),
    )
}


@pytest.mark.parametrize("dtype", more.DTYPES, ids=str)
@pytest.mark.parametrize("label", CHECKS)
def test_agrees(label: str, dtype: torch.dtype) -> None:
    more.run(CHECKS[label], label, dtype)
