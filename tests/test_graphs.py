"""Steps recorded as a CUDA graph and replayed: what is learned is the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adamerge.learn import graphs
from adamerge.learn.graphs import ReplayedSteps
from adamerge.learn.objectives import Entropy, InfoMax, Objective
from adamerge.learn.step import deliver, step_loss
from tests import golden_data as golden
from tests.test_contract import every_method, make

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = [18] * 5 + [17] + [18] * 2  # images of a step; the fourth is recorded
NOT_RECORDED = {"e_wemoe"}  # sparse task vectors wait for the device


def learned(name: str, kind: type[Objective], replay: bool) -> Tensor:
    """What is learned by a step of each of `SIZES`."""
    device = torch.device("cuda")
    method = make(name, torch.float32).to(device).train()
    objective = kind(golden.heads(torch.float32).to(device))

    def compute(
        images: Tensor, ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return step_loss(method, objective, images, ids, None, targets)

    learnables = list(method.parameters())
    step = ReplayedSteps(compute, learnables)
    optimizer = torch.optim.Adam(learnables, lr=1e-2)
    for number, size in enumerate(SIZES):
        images, ids = golden.batch(number, torch.float32)
        given = images[:size].to(device), ids[:size], None
        loss, values, features = step(*given) if replay else compute(*given)
        assert torch.isfinite(values).all() and len(features) == size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not replay or (step._recorded is None) == (name in NOT_RECORDED)
    return torch.cat([tensor.detach().flatten() for tensor in learnables])


@on_cuda
@every_method
@pytest.mark.parametrize("kind", [Entropy, InfoMax])
def test_cuda_replays_learn_the_same(name: str, kind: type[Objective]) -> None:
    again = learned(name, kind, True)
    torch.testing.assert_close(again, learned(name, kind, False), rtol=1e-4, atol=1e-5)


def test_nothing_is_recorded_on_a_cpu() -> None:
    calls = []

    def compute(
        images: Tensor, ids: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(len(images))
        return images.sum(), images, images

    step = ReplayedSteps(compute, [torch.zeros(1, requires_grad=True)])
    for _ in range(graphs._WARM_UP + 2):
        step(torch.ones(2), torch.zeros(2), None)
    assert len(calls) == graphs._WARM_UP + 2 and step._recorded is None


def test_a_delivered_loss_hands_over_what_it_was_given() -> None:
    learnable = torch.zeros(2, requires_grad=True)
    loss = deliver(torch.tensor(3.0), [torch.tensor([1.0, 2.0])], [learnable])
    (2 * loss).backward()
    assert loss.item() == 3.0
    torch.testing.assert_close(learnable.grad, torch.tensor([2.0, 4.0]))
