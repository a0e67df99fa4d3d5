"""A method or an objective that forgets a part of the contract gets one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamerge import AdamergeError, TaskVectors
from adamerge.encoders.tower import Tower
from adamerge.learn.classifiers import Logits
from adamerge.learn.objectives import Entropy, Objective
from adamerge.learn.step import step_loss
from adamerge.methods import MergeMethod
from adamerge.methods.contract import numbers_of

INPUTS, IDS = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])


def world() -> tuple[nn.Module, TaskVectors]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    experts = {
        task: {n: t + torch.randn_like(t) for n, t in network.state_dict().items()} for task in "ab"
    }
    return network, TaskVectors(network.state_dict(), experts)


class Scaled(MergeMethod):
    """One learned factor per task: all that a method of one network has to give is `weights`."""

    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.factors = nn.Parameter(torch.full((2,), 0.3))

    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(self.factors)


class NoWeights(Scaled):
    weights = MergeMethod.weights


class Doubled(Scaled):
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.double() for name, tensor in super().weights().items()}


class Transposed(Scaled):
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.movedim(0, -1) for name, tensor in super().weights().items()}


class Detached(Scaled):
    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in super().weights().items()}


class Listed(Scaled):
    def weights(self) -> Any:
        return list(super().weights().values())


class Elsewhere(Scaled):
    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.factors = nn.Parameter(torch.full((2,), 0.3, device="meta"))


class BufferElsewhere(Scaled):
    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.mask = torch.ones(2, device="meta")

    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(self.factors * self.mask)


class Unregistered(Scaled):
    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.shift = torch.zeros(2, requires_grad=True)

    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(self.factors + self.shift)


class InAList(Scaled):
    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.shifts = [nn.Parameter(torch.zeros(2))]

    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(self.factors + self.shifts[0])


HIDDEN = torch.zeros(2, requires_grad=True)


class Global(Scaled):
    def weights(self) -> dict[str, Tensor]:
        return self.task_vectors.combine(self.factors + HIDDEN)


class Frozen(Scaled):
    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.factors.requires_grad_(False)


class Holding(Scaled):
    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__(backbone, task_vectors)
        self.network = backbone


class Alone(MergeMethod):
    """Without a network of the base class's."""

    def __init__(self, backbone: nn.Module, task_vectors: TaskVectors) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))


class NoFold(Alone):
    def encode(self, weights: Any, inputs: Tensor, task_ids: Tensor) -> Tensor:
        return inputs[:, :2] + weights["shift"]


class NoFoldOfItsOwn(Scaled):
    def encode(self, weights: Any, inputs: Tensor, task_ids: Tensor) -> Tensor:
        return self.tower(weights, inputs) * 2


class Foldable(Scaled):
    def fold(self) -> nn.Module:
        return nn.Identity()


class Past(Foldable):
    def encode(self, weights: Any, inputs: Tensor, task_ids: Tensor) -> Tensor:
        return self.tower(weights, inputs) * self.factors.sum()


class Blind(Foldable):
    def encode(self, weights: Any, inputs: Tensor, task_ids: Tensor) -> Tensor:
        return self.tower(weights, inputs).detach()


class Tokens(Foldable):
    def encode(self, weights: Any, inputs: Tensor, task_ids: Tensor) -> Tensor:
        return self.tower(weights, inputs)[:, None]


class Partial(Scaled):
    def weights(self) -> dict[str, Tensor]:
        return {n: t for n, t in super().weights().items() if n.startswith("0.")}


FORGETFUL: dict[type[MergeMethod], str] = {
    NoWeights: r"the weights lack tensor '0\.bias' and 3 more of the network: .*weights\(\) has to",
    Doubled: r"Doubled gives '0\.weight' in torch\.float64, but its task vectors are torch",
    Transposed: r"Transposed gives '0\.weight' with shape \[3, 4\] on cpu: expected \[4, 3\]",
    Detached: r"Detached gives weights that depend on none of its parameters \(factors\)",
    Listed: r"Listed\.weights\(\) gives a list: expected a dictionary of tensors by name",
    Elsewhere: r"Elsewhere has factors on meta, and its task vectors are on cpu: make it on their",
    BufferElsewhere: r"BufferElsewhere has mask on meta, and its task vectors are on cpu",
    Unregistered: r"Unregistered keeps shift, which requires a gradient, as a plain tensor",
    InAList: r"InAList keeps shifts, which requires a gradient, as a plain tensor",
    Global: r"Global gives weights that depend on a tensor of shape \[2\] which requires",
    Frozen: r"Frozen has nothing to learn: make what is learned an nn\.Parameter",
    Holding: r"Holding holds a whole network as its module network, .*keep it as a Tower",
    Alone: r"Alone has no fold\(\): give one that returns an encoder of plain tensors, or pass",
    NoFold: r"NoFold has no fold\(\): give one that returns an encoder",
    NoFoldOfItsOwn: r"NoFoldOfItsOwn has no fold\(\): give one",
    Past: r"the method's encode uses a learnable itself, whose gradient would be lost: return it",
    Blind: r"the loss of Entropy depends on nothing that is learned: neither the method's encode",
    Tokens: r"the method encodes 4 inputs as \[4, 1, 2\]: expected features or logits \[4, D\]",
    Partial: r"the weights lack tensor '2\.bias' and 1 more of the network",
}


@pytest.mark.parametrize("kind", FORGETFUL, ids=lambda kind: kind.__name__)
def test_a_forgetful_method_is_told(kind: type[MergeMethod]) -> None:
    with pytest.raises(AdamergeError, match=FORGETFUL[kind]) as caught:
        step_loss(kind(*world()), Entropy(Logits("ab")), INPUTS, IDS)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_method_without_encode_is_told() -> None:
    method = Alone(*world())
    with pytest.raises(AdamergeError, match=r"Alone has no encode\(\): give one that returns"):
        method.encode({}, INPUTS, IDS)


def test_a_method_that_forgets_nothing_needs_weights_alone() -> None:
    network, vectors = world()
    method = Scaled(network, vectors)
    objective = Entropy(Logits("ab"))
    for size in (None, 2):
        step_loss(method, objective, INPUTS, IDS, size)[0].backward()
    assert method.factors.grad is not None and bool(method.factors.grad.all())
    torch.testing.assert_close(method.fold()(INPUTS), method(INPUTS, IDS))
    moved = method.double()
    assert moved(INPUTS.double(), IDS).dtype == torch.float64
    assert set(method.state_dict()) == {"factors"} and method.readings() == {}


def test_what_a_method_keeps_moves_with_it() -> None:
    class Keeping(Scaled):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.mask, self.kept = torch.ones(2), {"a": torch.ones(1)}
            self.other = Tower(nn.BatchNorm1d(2))
            self.register_buffer("counted", torch.ones(1))

    method = Keeping(*world()).to("meta")
    assert {t.device.type for t in (method.mask, method.kept["a"], method.counted)} == {"meta"}
    assert method.task_vectors.device.type == "meta"
    assert set(method.state_dict()) == {"factors", "counted"}


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.ones(3), r"Told\.readings\(\) gives 'sure' of shape \[3\]: expected one number \[\]"),
     (torch.ones(2, 2), r"'sure' of shape \[2, 2\]: .* or one per task \[2\]")],
)  # fmt: skip
def test_readings_are_numbers(value: Tensor, message: str) -> None:
    class Told(Scaled):
        def readings(self) -> dict[str, Tensor]:
            return {"sure": value}

    with pytest.raises(AdamergeError, match=message):
        numbers_of(Told(*world()), ["a", "b"])


class NoTerm(Objective):
    pass


class PerImage(Objective):
    def term(self, logits: Tensor) -> Tensor:
        return logits.sum(1)


class Labels(Objective):
    def term(self, logits: Tensor) -> Tensor:
        return logits.argmax(1).float().mean()


OBJECTIVES: dict[Callable[..., Objective], str] = {
    NoTerm: r"NoTerm has no term\(\): give one that turns the logits \[B, C\]",
    PerImage: r"PerImage gives \[2\] for the images of task 'a': expected one number \[\]",
    Labels: r"the loss of Labels depends on nothing that is learned",
    lambda _: Entropy(nn.Linear(2, 2)): r"heads is a Linear: expected a mapping from tasks",  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_forgetful_objective_is_told(kind: Callable[..., Objective]) -> None:
    with pytest.raises(AdamergeError, match=OBJECTIVES[kind]):
        step_loss(Scaled(*world()), kind(Logits("ab")), INPUTS, IDS)
