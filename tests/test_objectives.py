"""Objectives against plain loops; additivity; weights; the marginal across processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from adamerge import AdamergeError
from adamerge.learn import objectives
from tests import golden_data as golden
from tests import reference
from tests.processes import METHOD


def logits(rows: int = 6, classes: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", ["entropy", "infomax"])
def test_values_and_gradients(name: str) -> None:
    ours, plain = logits().requires_grad_(), logits().requires_grad_()
    found = getattr(objectives, name)(ours)
    expected = getattr(reference, name)(plain)
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_extreme_logits_stay_finite() -> None:
    certain = torch.tensor([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]], requires_grad=True)
    loss = objectives.infomax(certain)
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(certain.grad).all()


def test_classes_that_are_ruled_out_count_nothing() -> None:
    some, others = torch.randn(2, 5, 3).unbind()
    ruled = torch.cat([some, torch.full((5, 2), -torch.inf)], 1).requires_grad_()
    taught = torch.cat([others, torch.full((5, 2), -torch.inf)], 1)
    for loss, given in (
        (objectives.entropy, ()),
        (objectives.infomax, ()),
        (objectives.expert_kl, (taught,)),
    ):
        own = [others] if given else []
        torch.testing.assert_close(loss(ruled, *given), loss(some, *own))
        (gradient,) = torch.autograd.grad(loss(ruled, *given), ruled)
        assert torch.isfinite(gradient).all() and not gradient[:, 3:].any()


def test_infomax_rewards_diversity_that_entropy_cannot_see() -> None:
    collapsed = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [9.0, 0, 0]])
    diverse = torch.tensor([[9.0, 0, 0], [0, 9.0, 0], [0, 0, 9.0]])
    torch.testing.assert_close(objectives.entropy(collapsed), objectives.entropy(diverse))
    assert objectives.infomax(diverse) < objectives.infomax(collapsed) - 1


def test_half_precision_logits_are_promoted() -> None:
    half = logits().bfloat16()
    assert objectives.entropy(half).dtype == torch.float32
    torch.testing.assert_close(objectives.entropy(half), objectives.entropy(half.float()))


def test_logits_and_loss_keep_their_precision_under_autocast() -> None:
    heads = golden.heads(torch.float32)
    rows, ids = (tensor.float() if tensor.is_floating_point() else tensor for tensor in features())
    plain = heads.logits(rows, "task_a")
    assert plain.dtype == torch.float32
    objective = objectives.Entropy(heads, {"task_b": 1.001})
    loss = objective.weigh(objective(rows, ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heads.logits(rows, "task_a"), plain)
        assert torch.equal(objective.weigh(objective(rows, ids)), loss)


def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([0, 2, 1, 0, 2, 2, 1, 0])  # any mix and order
    return torch.randn(len(ids), 16, generator=generator, dtype=torch.float64), ids


@pytest.mark.parametrize("kind", [objectives.Entropy, objectives.InfoMax])
def test_one_term_per_task_whatever_the_order(kind: type[objectives.Objective]) -> None:
    heads = golden.heads()
    rows, ids = features()
    values = kind(heads)(rows, ids)
    term = reference.entropy if kind is objectives.Entropy else reference.infomax
    for index, task in enumerate(golden.TASKS):
        torch.testing.assert_close(values[index], term(heads.logits(rows[ids == index], task)))


def test_additive_values_add_up_over_micro_batches() -> None:
    objective = objectives.Entropy(golden.heads())
    rows, ids = features()
    counts = dict(enumerate(torch.bincount(ids).tolist()))
    parts = [objective(r, i, counts) for r, i in zip(rows.split(3), ids.split(3), strict=True)]
    torch.testing.assert_close(sum(parts), objective(rows, ids))


def test_weights() -> None:
    heads = golden.heads()
    values = torch.tensor([1.0, 10.0, 100.0])
    assert objectives.Entropy(heads).weigh(values) == 111
    assert objectives.Entropy(heads, {"task_b": 0, "task_c": 0.5}).weigh(values) == 51
    with pytest.raises(AdamergeError, match=r"unknown task 'task_d'.*task_a, task_b, task_c"):
        objectives.Entropy(heads, {"task_d": 1})
    with pytest.raises(AdamergeError, match=r"weights\.task_a is -1: expected a finite number"):
        objectives.Entropy(heads, {"task_a": -1})
    with pytest.raises(AdamergeError, match=r"weights are 0 for every task, so that nothing is"):
        objectives.Entropy(heads, dict.fromkeys(golden.TASKS, 0))


def _share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    mine = logits(8)[rank * 4 : rank * 4 + 4].requires_grad_()
    loss = objectives.infomax(mine)
    loss.backward()
    torch.save({"loss": loss.detach(), "grad": mine.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_marginal_spans_processes(tmp_path: Path) -> None:
    mp.start_processes(_share, (str(tmp_path),), 2, start_method=METHOD)
    shares = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = logits(8).requires_grad_()
    expected = reference.infomax(whole)
    expected.backward()
    torch.testing.assert_close((shares[0]["loss"] + shares[1]["loss"]) / 2, expected.detach())
    # DDP averages gradients over the processes, hence the 2.
    averaged = torch.cat([share["grad"] for share in shares]) / 2
    torch.testing.assert_close(averaged, whole.grad)
