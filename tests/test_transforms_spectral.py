"""Spectral and optimised transforms against plain loops, and where matrices are unlike others."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from adamerge import AdamergeError, TaskVectors, transforms
from adamerge.transforms import matrices, projections, spectral
from tests import golden_data as golden

BLOCK = "blocks.0.weight"


def task_vectors(taus: Tensor, dtype: torch.dtype = torch.float64) -> TaskVectors:
    """Task vectors `[T, rows, columns]` of a matrix in a block, and small ones of a bias."""
    names = [f"t{row}" for row in range(len(taus))]
    base = {"blocks.0.bias": torch.zeros(2), BLOCK: torch.zeros(taus.shape[1:])}
    experts = {
        name: {"blocks.0.bias": torch.full((2,), 1.0 + row), BLOCK: taus[row]}
        for row, name in enumerate(names)
    }
    convert = {n: {k: t.to(dtype) for k, t in state.items()} for n, state in experts.items()}
    return TaskVectors({k: t.to(dtype) for k, t in base.items()}, convert)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_ace(taus: list[Tensor], epsilon: float, spread: float, rank: float) -> Tensor:
    """ACE in one matrix, by plain sums and an inverse."""
    sizes = torch.stack([t.square().sum() for t in taus])
    logs = torch.log(sizes + 1e-12)
    differ = bool(logs.var() / (logs.mean() ** 2 + 1e-12) > spread)
    grams, ridged, centred = [], [], []
    for tau in taus:
        own = tau - tau.mean(0, keepdim=True)
        gram, ridge = own.T @ own, epsilon
        if differ:
            gram, ridge = gram / gram.trace(), epsilon / gram.trace()
        grams.append(gram)
        ridged.append(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
        centred.append(own)
    prior = sum(grams).mean(0, keepdim=True) / (sizes.mean() if differ else 1)
    weighted = sum(own @ gram for own, gram in zip(centred, ridged, strict=True))
    merged = weighted @ torch.linalg.inv(sum(ridged) + prior)
    if differ:
        mean = sum(ridged) / len(taus)
        left, values, right = torch.linalg.svd(
            merged + sum(tau @ (gram - mean) for tau, gram in zip(taus, grams, strict=True)),
            full_matrices=False,
        )
        kept = int(rank * len(values))
        merged = merged + values[:kept].mean() * left[:, :kept] @ right[:kept]
    return merged


@pytest.mark.parametrize("scale", [1.0, 30.0])  # of one task: the same size, or very unlike
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (8, 8)])
def test_ace(shape: tuple[int, int], scale: float) -> None:
    taus = 0.3 * drawn(3, *shape)
    taus[0] *= scale
    found = transforms.ace(task_vectors(taus), epsilon=0.05, rank=0.5)
    expected = naive_ace(list(taus), 0.05, 0.3, 0.5)
    assert bool((naive_ace(list(taus), 0.05, 1e9, 0.5) - expected).any()) == (scale > 1)
    torch.testing.assert_close(found.deltas[BLOCK].sum(0), expected)


def naive_doge(taus: Tensor, steps: int, density: float) -> Tensor:
    """DOGE TA in one matrix, its gradient by autograd and its steps by torch's own Adam."""
    factors = 0.07 / taus.flatten(1).norm(dim=1)
    rank, tasks = min(taus.shape[1:]), len(taus)
    stack = torch.zeros(taus.shape[1], rank, dtype=taus.dtype)
    for row, tau in enumerate(taus):
        count = rank // tasks
        left = torch.linalg.svd(tau, full_matrices=False)[0]
        stack[:, row * count : (row + 1) * count] = left[:, :count]
    basis = torch.linalg.svd(stack, full_matrices=False)[0][:, : rank // 2]
    change = torch.zeros_like(taus[0], requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=1e-2)
    for _ in range(steps):
        merged = sum(f * (tau + change) for f, tau in zip(factors, taus, strict=True))
        loss = sum((tau * (tau - merged)).sum(1).square().sum() for tau in taus)
        (slope,) = torch.autograd.grad(loss, change)
        change.grad = slope - basis @ basis.T @ slope
        optimizer.step()
    kept = torch.zeros_like(taus)
    for row, tau in enumerate(taus):
        ranked = tau.abs().flatten().sort().values
        kept[row] = tau.abs() >= ranked[len(ranked) - int(density * len(ranked)) - 1]
    return factors[:, None, None] * (taus + change.detach()) * kept


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_doge(shape: tuple[int, int]) -> None:
    taus = drawn(3, *shape)
    vectors = task_vectors(taus)
    found = transforms.doge(vectors, subspace=2, density=0.4, steps=5, lr=1e-2)
    torch.testing.assert_close(found.deltas[BLOCK], naive_doge(taus, 5, 0.4))
    assert not found.deltas["blocks.0.bias"].any(), "other layers stay as pretrained"
    still = transforms.doge(vectors, steps=0, density=1.0).deltas[BLOCK]
    factors = 0.07 / taus.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(still, factors * taus)


WHOLE = {  # merges of one matrix of one task, which there is nothing to merge with
    "tsv_m": transforms.tsv_m,
    "truncate": lambda v: transforms.truncate(v, 1.0),
    "opcm": transforms.opcm,
    "wudi": lambda v: transforms.wudi(v, steps=5),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WHOLE)
def test_one_task_alone_is_left_as_it_is(name: str, dtype: torch.dtype) -> None:
    taus = drawn(1, 6, 4)
    found = WHOLE[name](task_vectors(taus, dtype)).deltas
    torch.testing.assert_close(found[BLOCK], taus.to(dtype))
    torch.testing.assert_close(found["blocks.0.bias"], torch.ones(1, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_orthogonal_tasks_do_not_disturb_each_other(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Two tasks of rank 2 in different directions, of which nothing is left out."""
    left, right = (torch.linalg.qr(drawn(size, 4, seed=size))[0] for size in shape)
    strengths = torch.tensor([3.0, 2.0, 2.5, 1.0], dtype=torch.float64)
    parts = [left[:, s] @ torch.diag(strengths[s]) @ right[:, s].T for s in (slice(2), slice(2, 4))]
    vectors = task_vectors(torch.stack(parts), dtype)
    wanted = vectors.deltas[BLOCK]
    for transform in (transforms.tsv_m, transforms.opcm):
        ratio = transform(vectors).deltas[BLOCK] / wanted
        torch.testing.assert_close(ratio, ratio[0, 0, 0].expand_as(ratio), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transforms.tsv_m(vectors).deltas[BLOCK], wanted)
    flat = transforms.iso_c(vectors).deltas[BLOCK].sum(0).double()
    torch.testing.assert_close(flat, strengths.sum() / 6 * left @ right.T, rtol=1e-4, atol=1e-5)
    calibrated = transforms.svc(vectors, alpha=1.0, scale=1.0).deltas[BLOCK]
    torch.testing.assert_close(calibrated, wanted)  # nothing is counted twice


@pytest.mark.parametrize("transform", [transforms.tsv_m, transforms.iso_c, transforms.iso_cts])
def test_a_task_that_left_a_matrix_alone_is_no_division_by_zero(
    transform: Callable[[TaskVectors], TaskVectors],
) -> None:
    taus = drawn(3, 6, 5)
    taus[1] = 0
    for dtype in (torch.float64, torch.float32):
        found = transform(task_vectors(taus, dtype)).deltas[BLOCK]
        assert bool(found.isfinite().all()) and bool(found.any())
    for other in (transforms.ace, transforms.doge, transforms.svc, transforms.cart):
        assert bool(other(task_vectors(taus)).deltas[BLOCK].isfinite().all())
    assert bool(transforms.wudi(task_vectors(taus), 5).deltas[BLOCK].isfinite().all())


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "svc", "cart", "opcm"])
def test_the_faster_way_to_singular_vectors_is_as_good(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 by the Gram matrix, held against the float64 merge by decomposition: nearer than a
    decomposition in float32 is."""
    taus = drawn(4, 40, 30) * torch.logspace(0, -3, 30, dtype=torch.float64)
    exact = getattr(transforms, name)(task_vectors(taus.float().double())).deltas[BLOCK].sum(0)

    def error() -> float:
        found = getattr(transforms, name)(task_vectors(taus, torch.float32)).deltas[BLOCK].sum(0)
        return float((found.double() - exact).norm() / exact.norm())

    fast = error()

    def plain(matrix: Tensor, exact: bool, size: float = 0.0) -> tuple[Tensor, Tensor]:
        tall = matrix.float() if matrices.is_tall(matrix) else matrix.float().T
        _, values, transposed = torch.linalg.svd(tall, full_matrices=False)
        return values.double(), transposed.T.double()

    monkeypatch.setattr(matrices, "smaller_side", plain)
    monkeypatch.setattr("adamerge.transforms.spectral.smaller_side", plain)
    assert fast < 1e-6 and fast < 1.5 * error()


def test_which_layers_take_part() -> None:
    vectors = golden.task_vectors()
    both = [matrices.matrices_of(vectors, layers) for layers in ("matrices", "blocks")]
    assert set(both[0]) - set(both[1]) == {"positional_embedding", "proj"}
    assert len(both[1]) == 8 and not any("ln" in name or "bias" in name for name in both[1])
    found = transforms.tsv_m(vectors, layers="blocks")
    mean = vectors.deltas["proj"] / 3
    torch.testing.assert_close(found.deltas["proj"], mean)
    wudi = transforms.wudi(vectors, steps=1, layers="blocks", others="pretrained")
    assert not wudi.deltas["proj"].any() and wudi.deltas[both[1][0]].any()


def test_coefficients_that_are_equal_give_the_mean_of_centred_experts() -> None:
    vectors = golden.task_vectors()
    centred = transforms.centre(vectors)
    for name, base in centred.pretrained.items():
        mean = vectors.pretrained[name] + vectors.deltas[name].mean(0)
        torch.testing.assert_close(base, mean)
        torch.testing.assert_close(centred.deltas[name].sum(0), torch.zeros_like(mean))
    expert = centred.expert(golden.TASKS[0])
    torch.testing.assert_close(expert["proj"], vectors.expert(golden.TASKS[0])["proj"])


def test_the_order_of_tasks_matters_to_opcm_alone_as_told() -> None:
    vectors = golden.task_vectors()
    order = list(reversed(golden.TASKS))
    one, other = transforms.opcm(vectors), transforms.opcm(vectors, order=order)
    name = matrices.matrices_of(vectors, "blocks")[0]
    first = [v.deltas[name][row] / vectors.deltas[name][row] for v, row in ((one, 0), (other, 2))]
    assert all(float(ratio.std()) < 1e-9 for ratio in first), "the first task stays as it was"
    assert not torch.equal(one.deltas[name], other.deltas[name])


@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-2])
def test_ace_where_a_task_hardly_changes_a_matrix(size: float) -> None:
    """As where an expert was fine-tuned with frozen layers: what the others make of it."""
    taus = drawn(3, 8, 8)
    taus[1] *= size
    found = transforms.ace(task_vectors(taus)).deltas[BLOCK]
    alone = transforms.ace(task_vectors(taus[[0, 2]])).deltas[BLOCK]
    assert torch.equal(found[[0, 2]], alone) and not found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iso_cts_of_low_rank_experts_stays_within_their_directions(dtype: torch.dtype) -> None:
    lefts, rights = drawn(2, 4, 2, 64).to(dtype)
    taus = lefts.mT @ rights
    merged = transforms.iso_cts(task_vectors(taus, dtype)).deltas[BLOCK].sum(0)
    values = torch.linalg.svdvals(merged.double())
    assert int((values > 1e-4 * values[0]).sum()) == 8
    other = transforms.iso_cts(task_vectors(taus.flip(0), dtype)).deltas[BLOCK].sum(0)
    torch.testing.assert_close(other, merged, rtol=1e-4, atol=1e-4 * float(values[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: transforms.svc(v, scale=float("nan")), "svc: scale is nan, expected a number"),
        (lambda v: transforms.ace(v, float("inf")), "ace: epsilon is inf, expected a number"),
        (lambda v: transforms.ace(v, spread=-1), "ace: spread is -1, expected a number"),
        (lambda v: transforms.doge(v, float("nan")), "doge: scale is nan, expected a number"),
        (lambda v: transforms.wudi(v, lr="x"), "wudi: lr is 'x', expected a number"),
        (lambda v: transforms.tsv_m(v, layers="all"), "layers is 'all': expected 'matrices' or"),
        (lambda v: transforms.iso_cts(v, 1.5), r"common is 1.5, expected a number in \[0, 1\]"),
        (lambda v: transforms.svc(v, 0.0), "svc: alpha is 0.0, expected a number in "),
        (lambda v: transforms.cart(v, 0.0), r"cart: rank is 0.0, expected a number in \(0, 1\]"),
        (lambda v: transforms.truncate(v, 2.0), "truncate: rank is 2.0, expected a number in"),
        (lambda v: transforms.wudi(v, -1), "wudi: steps is -1, expected a whole number"),
        (lambda v: transforms.wudi(v, others="sum"), "wudi: others is 'sum', expected 'mean' or"),
        (lambda v: transforms.ace(v, 0.0), "ace: epsilon is 0.0, expected a number in "),
        (lambda v: transforms.ace(v, rank=0.0), "ace: rank is 0.0, expected a number"),
        (lambda v: transforms.doge(v, subspace=0), "doge: subspace is 0, expected a whole number"),
        (lambda v: transforms.doge(v, density=0.0), "doge: density is 0.0, expected a number"),
        (lambda v: transforms.opcm(v, -1.0), "opcm: alpha is -1.0, expected a number"),
        (
            lambda v: transforms.opcm(v, order=["t0"]),
            r"opcm: order is \['t0'\], expected every task",
        ),
    ],
)
def test_wrong_arguments(call: Callable[[TaskVectors], TaskVectors], message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        call(task_vectors(drawn(2, 4, 3)))


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(AdamergeError, match=r"'blocks.0.weight' of shape \[4, 3\] has fewer direc"):
        transforms.tsv_m(task_vectors(drawn(4, 4, 3)))
    with pytest.raises(AdamergeError, match="t0 is the only task, and nothing tells it from the"):
        transforms.cart(task_vectors(drawn(1, 4, 3)))
    three, two = task_vectors(drawn(3, 4, 3)), task_vectors(drawn(2, 4, 3))
    with pytest.raises(AdamergeError, match="svc: the experts are of the tasks t0, t1, t2, expec"):
        transforms.svc(two, experts=three)
    flat = TaskVectors({"a": torch.zeros(3)}, {"t": {"a": torch.ones(3)}})
    with pytest.raises(AdamergeError, match="the task vectors have no matrix: use a transform"):
        transforms.iso_c(flat)
    loose = TaskVectors({"a": torch.zeros(3, 2)}, {"t": {"a": torch.ones(3, 2)}})
    with pytest.raises(AdamergeError, match="have no matrix of a numbered block"):
        transforms.truncate(loose)


@pytest.mark.parametrize("module", [spectral, projections])
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted >= 3 and not found.failed


def test_twin_is_a_shared_merge_and_a_low_rank_rest_of_every_task() -> None:
    vectors = golden.task_vectors()
    found = transforms.twin(vectors, scale=0.4, rank=0.25)
    assert found.per_task
    for name, tau in vectors.deltas.items():
        shared = 0.4 * tau.sum(0)
        for row, own in enumerate(tau):
            wanted = own
            if tau.ndim == 3 and "resblocks" in name:
                left, sizes, right = torch.linalg.svd(own - shared, full_matrices=False)
                k = len(sizes) // 4
                wanted = shared + left[:, :k] * sizes[:k] @ right[:k]
            torch.testing.assert_close(found.deltas[name][row], wanted)
