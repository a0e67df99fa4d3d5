"""The fused kernels on a CPU: `test_fused.py` runs this file where TRITON_INTERPRET is set."""

from __future__ import annotations

import gc
import itertools
import math
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adamerge.learn.step import Shared
from adamerge.weights import fused, merging
from adamerge.weights.merging import Merge
from adamerge.weights.storage import Layer, Storage, keep
from adamerge.weights.storage_kinds import DTYPES
from adamerge.weights.task_vectors import TaskVectors

assert os.environ["TRITON_INTERPRET"] == "1"

# Vectors and matrices, some of which are read 16 numbers at a time, and some of more blocks.
SHAPES = [
    (), (1,), (3,), (1023,), (1025,), (5000,),
    (32, 48), (7, 33), (4, 3, 5, 5), (16, 16, 3, 3), (0, 4), (1, 1), (2, 2064), (5, 1001),
]  # fmt: skip
each_storage = pytest.mark.parametrize("stored", DTYPES)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    torch.manual_seed(0)
    yield
    assert not fused._failed


def group(stored: str, tasks: int) -> tuple[list[Tensor], list[Layer], Tensor]:
    bases = [torch.randn(shape) for shape in SHAPES]
    layers = [keep(torch.randn(tasks, *shape) * 0.1, stored) for shape in SHAPES]
    return bases, layers, torch.randn(tasks, len(SHAPES))


def gradients() -> list[Tensor | None]:
    """Two in bfloat16, one not contiguous, one at an odd address, one expanded, one missing."""
    grads: list[Tensor | None] = [torch.randn(shape) for shape in SHAPES]
    grads[3] = None
    grads[6] = torch.randn(32, 48, dtype=torch.bfloat16)
    grads[7] = torch.randn(33, 7, dtype=torch.bfloat16).T
    grads[9] = torch.randn(16, 16, 3, 3).to(memory_format=torch.channels_last)
    grads[12] = torch.randn(4129)[1:].view(2, 2064)
    grads[13] = torch.randn(()).expand(5, 1001)
    return grads


def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEVICES", set())


def tau(layer: Layer) -> Tensor:
    """`[T, numbers]` in float64."""
    values = layer.values.double()
    if layer.scales is not None:
        values = values * layer.scales.double().view(*layer.scales.shape, *[1] * (values.ndim - 2))
    return values.reshape(len(values), -1)


@each_storage
@pytest.mark.parametrize(("tasks", "dtype"), [(1, torch.bfloat16), (3, None), (20, torch.bfloat16)])
def test_merge_is_the_sum(
    stored: str, tasks: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases, layers, columns = group(stored, tasks)
    assert fused.usable(bases, layers)
    merged = merging.merge_all(bases, layers, columns, dtype)
    plainly(monkeypatch)
    plain = merging.merge_all(bases, layers, columns, dtype)
    for index, (ours, base, layer) in enumerate(zip(merged, bases, layers, strict=True)):
        exact = base.double().flatten()
        for task, row in enumerate(tau(layer)):
            exact = exact + columns[task, index].double() * row
        assert ours.dtype == plain[index].dtype and ours.stride() == plain[index].stride()
        # The last of 8 bits: the interpreter cuts the others off, where a GPU rounds.
        rounding = 2**-7 if ours.dtype == torch.bfloat16 else 0
        error = (ours.double().flatten() - exact).abs()
        assert bool((error <= exact.abs() * rounding + 4e-6).all())
        torch.testing.assert_close(ours, plain[index], rtol=rounding, atol=4e-6)


@each_storage
def test_contraction_is_the_inner_product(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = 3
    bases, layers, _ = group(stored, tasks)
    grads = gradients()
    ours = merging.contract_all(grads, bases, layers)
    plainly(monkeypatch)
    plain = merging.contract_all(grads, bases, layers)
    assert ours.shape == (tasks, len(SHAPES)) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)
    for index, (grad, layer) in enumerate(zip(grads, layers, strict=True)):
        exact = torch.zeros(tasks, dtype=torch.float64)
        if grad is not None:
            exact = (grad.double().reshape(1, -1) * tau(layer)).sum(1)
        torch.testing.assert_close(ours[:, index].double(), exact, rtol=1e-5, atol=2e-5)


def test_same_numbers_same_bits_wherever_they_lie() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        bases, layers, columns = group("int8", 3)
        merged = merging.merge_all(bases, layers, columns, torch.bfloat16)
        runs.append([*merged, merging.contract_all(gradients(), bases, layers)])
        held = torch.empty(12345)  # the second time everything lies elsewhere
    assert len(held)
    assert all(map(torch.equal, *runs))


def test_float16_and_a_mixture_of_types() -> None:
    bases, layers, columns = group("int8", 3)
    merged = merging.merge_all(bases, layers, columns, torch.float16)
    assert {m.dtype for m in merged if m.ndim > 1} == {torch.float16}
    grads: list[Tensor | None] = [torch.randn(shape) for shape in SHAPES]
    grads[6], grads[7] = torch.randn(32, 48).half(), torch.randn(7, 33).bfloat16()
    grads[5] = torch.randn(5000).double()
    found = merging.contract_all(grads, bases, layers)
    for index in (5, 6, 7):
        grad = grads[index]
        assert grad is not None
        exact = (grad.double().reshape(1, -1) * tau(layers[index])).sum(1)
        torch.testing.assert_close(found[:, index].double(), exact, rtol=1e-5, atol=2e-5)


def test_columns_of_any_type_and_strides() -> None:
    bases, layers, _ = group("float32", 3)
    expanded = torch.randn(3, 1, dtype=torch.float64).expand(3, len(SHAPES))
    transposed = torch.randn(len(SHAPES), 3).T
    for columns in (expanded, transposed):
        merged = merging.merge_all(bases, layers, columns, None)
        for index, ours in enumerate(merged):
            exact = bases[index].double().flatten() + columns[:, index].double() @ tau(
                layers[index]
            )
            torch.testing.assert_close(ours.double().flatten(), exact, rtol=1e-6, atol=4e-6)


def test_no_gradient_at_all_and_none_with_numbers_that_are_not_finite() -> None:
    bases, layers, _ = group("float32", 3)
    layers[2].values.fill_(math.inf)
    nothing: list[Tensor | None] = [None] * len(SHAPES)
    assert torch.equal(merging.contract_all(nothing, bases, layers), torch.zeros(3, len(SHAPES)))
    grads = [*nothing]
    grads[5] = torch.full((5000,), math.nan)
    found = merging.contract_all(grads, bases, layers)
    assert bool(found[:, 5].isnan().all()) and int(found.isnan().sum()) == 3


def test_other_tensors_at_the_same_addresses() -> None:
    """Tables are kept by address, type and shape alone, and keep no tensor."""
    bases, layers, columns = group("float32", 3)
    first = merging.merge_all(bases, layers, columns, None)
    for base, layer in zip(bases, layers, strict=True):
        base.mul_(2)
        layer.values.mul_(2)
    for ours, before in zip(merging.merge_all(bases, layers, columns, None), first, strict=True):
        assert torch.equal(ours, 2 * before)
    reshaped = [base.view(-1) for base in bases]
    flat = [Layer(layer.values.view(3, -1)) for layer in layers]
    for ours, before in zip(merging.merge_all(reshaped, flat, columns, None), first, strict=True):
        assert torch.equal(ours, 2 * before.view(-1))


def test_outputs_are_tensors_of_their_own_for_autograd() -> None:
    bases, layers, columns = group("float32", 3)
    columns.requires_grad_()

    class Fixed:
        def bases(self, group: int) -> list[Tensor]:
            return bases

        def bring(self, group: int, then: int) -> list[Layer]:
            return layers

    weights = Merge.apply(columns, Fixed(), 0, None)
    assert all(w.requires_grad and not w._is_view() and w.is_contiguous() for w in weights)
    ends = sorted((w.data_ptr(), w.data_ptr() + w.nbytes) for w in weights if w.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert all(w.data_ptr() % 128 == weights[0].data_ptr() % 128 for w in weights if w.ndim < 2)
    loss = (weights[6].square().sum() + weights[5].sin().sum()) / 2
    before = weights[5]._version
    with torch.no_grad():
        weights[4].detach().zero_()  # what others do to theirs does not matter to these
    assert weights[5]._version == before
    loss.backward()
    wanted = torch.zeros(3, len(SHAPES))
    wanted[:, 6] = layers[6].values.flatten(1) @ weights[6].detach().flatten()
    wanted[:, 5] = layers[5].values @ weights[5].detach().cos() / 2
    torch.testing.assert_close(columns.grad, wanted, rtol=1e-5, atol=1e-4)


@each_storage
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_task_vectors_and_leaves_that_share_a_step(
    stored: str, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = {f"l{i}": torch.randn(s) for i, s in enumerate([(8, 16), (16,), (5, 8), (5,)])}
    experts = {
        t: {n: p + 0.1 * torch.randn_like(p) for n, p in pretrained.items()} for t in ("a", "b")
    }
    vectors = TaskVectors(pretrained, experts, storage=Storage(dtype=stored))
    monkeypatch.setattr(vectors, "_groups", [vectors.names])
    images = torch.randn(6, 16)

    def step() -> tuple[Tensor, Tensor]:
        columns = torch.full((2, 4), 0.3, requires_grad=True)
        shared = Shared(vectors.combine(columns, dtype), [columns])
        leaves = shared.leaves
        shared.expect_last()
        hidden = torch.tanh(images @ leaves["l0"].T.float() + leaves["l1"][:8])
        loss = (hidden @ leaves["l2"].T.float()).square().sum()  # `l3` has no part in it
        loss.backward()
        shared.finish()
        (grad,) = shared.grads
        assert grad is not None
        return loss.detach(), grad

    ours = step()
    with monkeypatch.context() as other:
        plainly(other)
        plain = step()
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype is None else {"rtol": 0.02, "atol": 0.3}
    torch.testing.assert_close(ours, plain, **tolerance)


def test_tables_keep_no_memory() -> None:
    bases, layers, columns = group("float32", 3)
    merging.merge_all(bases, layers, columns, None)
    pointer = bases[5].untyped_storage()._weak_ref()
    del bases, layers
    gc.collect()
    assert torch.UntypedStorage._expired(pointer)
    torch.UntypedStorage._free_weak_ref(pointer)
