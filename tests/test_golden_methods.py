"""WEMoE, E-WEMoE, Surgery and SurgeryV2 give the reference numbers: values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import adamerge
from adamerge.encoders.experts import Experts
from adamerge.encoders.tower import FoldedEncoder, Tower
from adamerge.learn.objectives import Entropy, ExpertL1
from adamerge.learn.step import step_loss
from adamerge.methods import Surgery, WEMoE
from tests import golden_data as golden

DTYPES = [torch.float64, torch.float32]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
MIXTURES: dict[str, dict[str, Any]] = {
    "wemoe": {},
    "ewemoe": {"shared_router": True, "density": 0.1},
}


def agrees(found: Tensor, key: str, kind: str = "features") -> None:
    """In float64 to 1e-9; in float32 within the bounds of the reference's README."""
    expected = golden.tensors("expected")[key]
    if found.dtype == torch.float64:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    elif kind == "features":
        assert (found.double() - expected).norm() <= 1e-4 * expected.norm()
    else:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def mixture(name: str, dtype: torch.dtype) -> WEMoE:
    method = WEMoE(golden.clip().backbone, golden.task_vectors(dtype), **MIXTURES[name])
    if name == "wemoe":
        given = golden.tensors("wemoe_routers")
        state = {key.replace("/", "."): tensor for key, tensor in given.items()}
    else:
        state = {f"0.{key}": tensor for key, tensor in golden.tensors("ewemoe_router").items()}
    method.routers.load_state_dict(state)
    return method


@every_dtype
@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name: str, dtype: torch.dtype, micro_batch: int | None) -> None:
    method = mixture(name, dtype)
    images, ids = golden.batch(0, dtype)
    objective = Entropy(golden.heads(dtype))
    loss, _, features = step_loss(method, objective, images, ids, micro_batch)
    loss.backward()
    agrees(loss.detach(), f"{name}/loss", "loss")
    gates = method.gates(images, ids)
    for index, task in enumerate(golden.TASKS):
        agrees(features[ids == index], f"{name}/features/{task}")
        agrees(gates[ids == index].transpose(0, 1), f"{name}/gates/{task}", "gates")
    for index, router in enumerate(method.routers):
        for key, parameter in router.named_parameters():
            assert parameter.grad is not None
            place = f"{index}/{key}" if name == "wemoe" else key
            agrees(parameter.grad, f"{name}/grad/{place}", "gradient")


def merged(dtype: torch.dtype) -> FoldedEncoder:
    """The static encoder that Surgery starts from."""
    return FoldedEncoder(Tower(golden.clip().backbone), golden.state("surgery_merged", dtype))


def experts(dtype: torch.dtype) -> Experts:
    return Experts(golden.clip().backbone, golden.task_vectors(dtype))


@every_dtype
@pytest.mark.parametrize("together", [True, False])
def test_surgery_steps_taken_together_are_steps_task_by_task(
    dtype: torch.dtype, together: bool
) -> None:
    method = Surgery(merged(dtype), golden.TASKS, dim=16, rank=4)
    for task in golden.TASKS:
        with torch.no_grad():
            method.adapters[task][0].down.copy_(golden.tensors("surgery_down")[task])
    objective = ExpertL1(golden.heads(dtype), experts(dtype))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    losses = torch.zeros(20, 3, dtype=dtype)
    for step in range(20):
        images, ids = golden.batch(step, dtype)
        for turn in [(0, 1, 2)] if together else [(0,), (1,), (2,)]:
            here = torch.isin(ids, torch.tensor(turn))
            optimizer.zero_grad()
            loss, values, _ = step_loss(method, objective, images[here], ids[here])
            loss.backward()
            optimizer.step()
            losses[step] += values
    agrees(losses, "surgery/loss", "loss")
    for task in golden.TASKS:
        agrees(method.adapters[task][0].down.detach(), f"surgery/down/{task}")
        agrees(method.adapters[task][0].up.detach(), f"surgery/up/{task}")


@every_dtype
@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("shuffled", [False, True])
def test_surgery_after_every_block(
    dtype: torch.dtype, micro_batch: int | None, shuffled: bool
) -> None:
    method = Surgery(merged(dtype), golden.TASKS, dim=16, rank=4, positions="blocks")
    for key, tensor in golden.tensors("surgery_v2_adapters").items():
        task, position, name = key.split("/")
        with torch.no_grad():
            getattr(method.adapters[task][int(position)], name).copy_(tensor)
    images, ids = golden.batch(0, dtype)
    order = torch.arange(len(ids))
    if shuffled:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    objective = ExpertL1(golden.heads(dtype), experts(dtype), blocks=True)
    loss, values, features = step_loss(method, objective, images[order], ids[order], micro_batch)
    loss.backward()
    features = features[order.argsort()]
    torch.testing.assert_close(method(images, ids).detach(), features)
    for index, task in enumerate(golden.TASKS):
        agrees(features[ids == index], f"surgery_v2/features/{task}")
        agrees(values[index], f"surgery_v2/loss/{task}", "loss")
        for position, adapter in enumerate(method.adapters[task]):
            for name, parameter in adapter.named_parameters():
                assert parameter.grad is not None
                agrees(parameter.grad, f"surgery_v2/grad/{task}/{position}/{name}", "gradient")


@every_dtype
def test_experts_are_the_expert_files(dtype: torch.dtype) -> None:
    images, ids = golden.batch(0, dtype)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    found = experts(dtype)(images[order], ids[order])[order.argsort()]
    for index, task in enumerate(golden.TASKS):
        tower = Tower(golden.clip().backbone)
        alone = FoldedEncoder(tower, golden.state(f"expert_{task}", dtype))(images[ids == index])
        torch.testing.assert_close(found[ids == index], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(adamerge.AdamergeError, match=r"task_ids has the values .*expected 0 to 2"):
        experts(dtype)(images, ids + 1)
