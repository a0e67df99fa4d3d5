"""Task vectors: the merge and its gradient against plain loops; every mismatch is named."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from adamerge import AdamergeError, TaskVectors
from tests import reference


def states(tasks: int = 3, dtype: torch.dtype = torch.float64) -> tuple[dict, dict]:
    generator = torch.Generator().manual_seed(0)

    def state() -> dict[str, Tensor]:
        shapes = {"a.weight": (4, 3), "a.bias": (4,), "scale": ()}
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for name, shape in shapes.items()
        }

    return state(), {f"t{i}": state() for i in range(tasks)}


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_combine_and_its_gradient_equal_plain_autograd(shape: tuple[int, ...]) -> None:
    pretrained, experts = states()
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    layerwise = plain if plain.ndim == 2 else plain[:, None].expand(3, 3)
    merged = TaskVectors(pretrained, experts).combine(ours)
    expected = reference.merge(pretrained, experts, layerwise)
    for name in expected:
        torch.testing.assert_close(merged[name], expected[name])
    sum((w**3).sum() for w in merged.values()).backward()
    sum((w**3).sum() for w in expected.values()).backward()
    torch.testing.assert_close(ours.grad, plain.grad)


def test_gradcheck() -> None:
    vectors = TaskVectors(*states(2))
    coefficients = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: tuple(vectors.combine(c).values()), coefficients)


def test_a_layer_without_part_in_the_loss_has_zero_gradient() -> None:
    vectors = TaskVectors(*states())
    coefficients = torch.full((3, 3), 0.3, dtype=torch.float64, requires_grad=True)
    vectors.combine(coefficients)["a.bias"].sum().backward()
    assert coefficients.grad is not None
    assert (coefficients.grad[:, [0, 2]] == 0).all() and (coefficients.grad[:, 1] != 0).all()


def test_special_coefficients() -> None:
    pretrained, experts = states()
    vectors = TaskVectors(pretrained, experts)
    zero = vectors.combine(torch.zeros(3, dtype=torch.float64))
    average = vectors.combine(torch.full((3,), 1 / 3, dtype=torch.float64))
    for name, base in pretrained.items():
        assert torch.equal(zero[name], base)
        mean = torch.stack([expert[name] for expert in experts.values()]).mean(0)
        torch.testing.assert_close(average[name], mean)
        torch.testing.assert_close(vectors.expert("t1")[name], experts["t1"][name])


def test_autocast_does_not_lower_the_precision_of_the_merge() -> None:
    vectors = TaskVectors(*states(dtype=torch.float32))
    coefficients = torch.full((3,), 0.37)
    plain = vectors.combine(coefficients)
    with torch.autocast("cpu", torch.bfloat16):
        under = vectors.combine(coefficients)
    assert all(torch.equal(plain[name], under[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_experts_are_promoted_and_it_is_said(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    pretrained, experts = states(dtype=torch.float32)
    experts["t1"] = {name: tensor.to(dtype) for name, tensor in experts["t1"].items()}
    with caplog.at_level(logging.INFO, "adamerge"):
        vectors = TaskVectors(pretrained, experts, sources={"t1": "one.pt"})
    assert vectors.deltas["scale"].dtype == torch.float32
    expected = experts["t1"]["a.bias"].float() - pretrained["a.bias"]
    assert torch.equal(vectors.deltas["a.bias"][1], expected)
    stored = str(dtype).removeprefix("torch.")
    assert f"stored in {stored}, promoted to float32: t1\n" in caplog.text


def test_integer_entries_are_no_layers() -> None:
    pretrained, experts = states()
    for state in (pretrained, *experts.values()):
        state["steps"] = torch.tensor(7)
    vectors = TaskVectors(pretrained, experts)
    assert "steps" not in vectors.names and vectors.constants["steps"] == 7


def _break(experts: dict, what: str) -> None:
    expert = experts["t1"]
    if what == "missing":
        del expert["a.bias"]
    elif what == "extra":
        expert["b.bias"] = torch.zeros(1)
    elif what == "shape":
        expert["a.bias"] = torch.zeros(5)
    elif what == "nan":
        expert["a.bias"] = torch.full((4,), torch.nan)
    elif what == "twin":
        experts["t1"] = experts["t0"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"expert of task 't1' \(one.pt\) lacks tensor 'a.bias'"),
        ("extra", r"'t1' \(one.pt\) has the unknown tensor 'b.bias'"),
        ("shape", r"'t1' \(one.pt\) has tensor 'a.bias' of shape \[5\].*\[4\]"),
        ("nan", r"'t1' \(one.pt\) has NaN or infinite values in tensor 'a.bias'"),
        ("twin", r"'t1' \(one.pt\) is identical to expert of task 't0'"),
    ],
)
def test_mismatches_name_task_file_and_tensor(what: str, message: str) -> None:
    pretrained, experts = states()
    _break(experts, what)
    with pytest.raises(AdamergeError, match=message):
        TaskVectors(pretrained, experts, sources={"t1": "one.pt"})


def test_expert_equal_to_pretrained_and_duplicate_and_no_tasks() -> None:
    pretrained, experts = states()
    with pytest.raises(AdamergeError, match="'same' is identical to the pretrained weights"):
        TaskVectors(pretrained, {**experts, "same": pretrained})
    with pytest.raises(AdamergeError, match="task 't0' is listed twice"):
        TaskVectors(pretrained, [*experts.items(), ("t0", experts["t1"])])
    with pytest.raises(AdamergeError, match="no experts were given"):
        TaskVectors(pretrained, {})
    with pytest.raises(AdamergeError, match=r"shape \[2\]: expected \[3\] or \[3, 3\]"):
        TaskVectors(pretrained, experts).combine(torch.ones(2))


def test_integer_weights_are_refused() -> None:
    experts = {"x": {"a": torch.ones(2, dtype=torch.int8)}}
    with pytest.raises(AdamergeError, match=r"'a' of type torch\.int8: expected floating"):
        TaskVectors({"a": torch.ones(2)}, experts)
