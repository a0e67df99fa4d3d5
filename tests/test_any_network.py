"""Not only CLIP: networks of any inputs and outputs, merged, learned, and put back into a model."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import adamerge
from adamerge import AdamergeError, TaskVectors, adapt
from adamerge.encoders import rows
from adamerge.encoders.experts import Experts
from adamerge.encoders.tower import Tower
from adamerge.learn.objectives import Entropy, ExpertKL, Objective
from adamerge.methods import AdaMerging, MergeMethod
from adamerge.methods.base import Traced
from tests import reference

GENERATOR = torch.Generator().manual_seed(0)
WORDS, COUNTS = (torch.randn(6, 4, generator=GENERATOR) for _ in range(2))
IDS = torch.tensor([0, 0, 0, 1, 1, 1])


class Output(OrderedDict[str, Tensor]):
    """A model output as of transformers: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Network(nn.Module):
    """Two inputs, batch norm, a table that is no parameter and not saved, and a counter."""

    def __init__(self, output: str = "tensor", tied: bool = False) -> None:
        super().__init__()
        self.words, self.counts = nn.Linear(4, 5), nn.Linear(4, 5)
        self.norm, self.output = nn.BatchNorm1d(5), output
        self.register_buffer("table", torch.full((5,), 0.5), persistent=False)
        if tied:
            self.counts.weight = self.words.weight

    def forward(self, words: Tensor, counts: Tensor | None = None) -> Any:
        mixed = self.words(words) + self.counts(words if counts is None else counts)
        logits = self.norm(mixed) + self.table
        if self.output == "logits":
            return Output(hidden_states=mixed[:, None].expand(-1, 3, -1), logits=logits)
        if self.output == "pooled":
            return Output(last_hidden_state=mixed[:, None], pooler_output=logits)
        return (logits, mixed) if self.output == "pair" else logits


def world(**options: Any) -> tuple[nn.Module, dict[str, nn.Module], TaskVectors]:
    """A network and two experts with other weights and other statistics."""
    torch.manual_seed(0)
    network = Network(**options).eval()
    experts = {}
    for task in ("a", "b"):
        experts[task] = copy.deepcopy(network).train()
        for parameter in experts[task].parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        experts[task](2 * torch.randn(32, 4) + 1)
        experts[task].eval()
    return network, experts, TaskVectors(network, experts)


INPUTS: dict[str, Any] = {
    "tensor": WORDS,
    "mapping": {"counts": COUNTS, "words": WORDS},
    "tuple": (WORDS, COUNTS),
    "list": [WORDS],
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("output", ["tensor", "logits", "pooled", "pair"])
def test_inputs_and_outputs_of_any_kind(kind: str, output: str) -> None:
    network, experts, vectors = world(output=output)
    inputs = INPUTS[kind]
    given, named = rows.arguments(inputs)
    plain = {task: rows.pooled(expert(*given, **named)) for task, expert in experts.items()}
    wanted = torch.cat([plain["a"][:3], plain["b"][3:]])
    torch.testing.assert_close(Experts(network, vectors)(inputs, IDS), wanted)
    mixed = torch.tensor([1, 0, 0, 1, 0, 1])
    rowwise = torch.stack([plain["ab"[task]][row] for row, task in enumerate(mixed.tolist())])
    torch.testing.assert_close(Experts(network, vectors)(inputs, mixed), rowwise)
    method = AdaMerging(network, vectors)
    features = method(inputs, IDS)
    assert features.shape == (6, 5)
    torch.testing.assert_close(method.fold()(inputs), features)
    merged = copy.deepcopy(network)
    merged.load_state_dict(method.merged_state_dict())
    torch.testing.assert_close(rows.pooled(merged(*given, **named)), features)
    micro, whole = (gradient(method, inputs, size) for size in (2, None))
    torch.testing.assert_close(micro, whole)


def gradient(method: AdaMerging, inputs: Any, micro_batch: int | None) -> Tensor:
    objective = Entropy(adamerge.learn.classifiers.Logits("ab"))
    method.zero_grad()
    adamerge.step_loss(method, objective, inputs, IDS, micro_batch)[0].backward()
    assert method.coefficients.grad is not None and bool(method.coefficients.grad.any())
    return method.coefficients.grad.clone()


def test_modules_tell_what_is_a_parameter() -> None:
    network, experts, vectors = world()
    assert set(vectors.names) == {name for name, _ in network.named_parameters()}
    assert int(vectors.constants["norm.num_batches_tracked"]) == 0
    mean = torch.stack([e.state_dict()["norm.running_mean"] for e in experts.values()]).mean(0)
    torch.testing.assert_close(vectors.constants["norm.running_mean"], mean)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    same = TaskVectors(network.state_dict(), states)
    assert same.names == vectors.names and set(same.constants) == set(vectors.constants)
    with pytest.raises(
        AdamergeError, match=r"expert of task 'a' is a str: expected a torch module"
    ):
        TaskVectors(network, {"a": "a.pt"})  # type: ignore[dict-item]
    with pytest.raises(AdamergeError, match=r"pretrained is a list: expected a torch module or"):
        TaskVectors([network], experts)  # type: ignore[arg-type]


def test_a_tensor_under_two_names_is_one_layer() -> None:
    network, experts, vectors = world(tied=True)
    assert "counts.weight" not in vectors.names and "words.weight" in vectors.names
    method = AdaMerging(network, vectors)
    with torch.no_grad():
        method.coefficients.uniform_()
    features = method((WORDS, COUNTS), IDS)
    torch.testing.assert_close(method.fold()((WORDS, COUNTS)), features)
    network.load_state_dict(method.merged_state_dict())
    torch.testing.assert_close(network(WORDS, COUNTS), features)
    states = {task: expert.state_dict() for task, expert in experts.items()}
    assert TaskVectors(network, states).names == vectors.names
    bare = TaskVectors(Network(tied=True).state_dict(), states)  # what nobody told is no mistake
    assert AdaMerging(network, bare)((WORDS, COUNTS), IDS).shape == (6, 5)


class Twice(nn.Module):
    """One module under two names, and its weight in another module."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again, self.last.weight = self.one, self.one.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.again(self.one(inputs).tanh()).tanh())


def test_a_module_that_is_used_twice() -> None:
    torch.manual_seed(0)
    base, one, two = Twice(), Twice(), Twice()
    before = copy.deepcopy(base.state_dict())
    method = AdaMerging(base, TaskVectors(base, {"a": one, "b": two}))
    merged = copy.deepcopy(base)
    states = [dict(network.named_parameters()) for network in (one, two)]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter += sum(0.3 * (state[name] - parameter) for state in states)
    inputs, ids = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    for _ in range(2):
        torch.testing.assert_close(method(inputs, ids), merged(inputs))
    method(inputs, ids).sum().backward()
    torch.testing.assert_close(method.fold()(inputs, ids), merged(inputs))
    base.load_state_dict(method.merged_state_dict())
    torch.testing.assert_close(base(inputs), merged(inputs))
    assert before.keys() == method.merged_state_dict().keys()


def test_an_expert_that_is_not_tied_as_the_pretrained_is() -> None:
    base, expert = Twice(), Twice()
    expert.last.weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(AdamergeError, match=r"'a' has two tensors where .* 'last.weight'"):
        TaskVectors(base, {"a": expert})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"objective": None}, "objective is a NoneType"),
    ],
)
def test_arguments_of_adapt(settings: dict[str, Any], message: str) -> None:
    network, _, vectors = world()
    batches = {task: [WORDS] for task in vectors.tasks}
    with pytest.raises(AdamergeError, match=message):
        adapt(AdaMerging(network, vectors), batches, **settings)


class Column(nn.Module):
    """Logits with a dimension too many."""

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :, None]


def test_heads_that_give_no_logits() -> None:
    network, _, vectors = world()
    batches = {task: [WORDS] for task in vectors.tasks}
    with pytest.raises(
        AdamergeError, match=r"the head of task '\w+' gives \[\d+, 5, 1\]: expected"
    ):
        adapt(AdaMerging(network, vectors), batches, heads=Column(), steps=1)


@pytest.mark.parametrize("init", ["x", [0.3], float("nan"), None])
def test_init_is_a_number(init: Any) -> None:
    network, _, vectors = world()
    with pytest.raises(AdamergeError, match=r"AdaMerging: init is .* expected a number"):
        AdaMerging(network, vectors, init=init)


@pytest.mark.parametrize("parts", [-1, 0, 2.5, "x", True, 257])
def test_parts_are_a_whole_number(parts: Any) -> None:
    network, _, vectors = world()
    with pytest.raises(AdamergeError, match=r"AdaMerging: parts is .* expected a whole number in"):
        AdaMerging(network, vectors, granularity="partition", parts=parts)


def test_complex_weights_are_refused() -> None:
    state = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(AdamergeError, match=r"'b' of type torch.complex64: expected real"):
        TaskVectors(state, {"t": {name: tensor + 1 for name, tensor in state.items()}})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (WORDS, COUNTS, WORDS),
            r"the Network cannot be called with this batch of inputs \(too many",
        ),
        ({"images": WORDS}, r"the Network cannot be called .*'words'.* leave labels out"),
        (WORDS.double(), r"inputs are torch\.float64, and the weights torch\.float32"),
        (WORDS.to("meta"), r"inputs are on meta, and the weights on cpu"),
        ({"words": [1, 2]}, r"a batch of inputs is a dict of list: .*return_tensors='pt'"),
        ((WORDS, COUNTS[:2]), r"one batch of inputs have 6 and 2 rows: expected one row per"),
        ("words", r"a batch of inputs is a str: expected a tensor, or a mapping"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs: Any, message: str) -> None:
    network, _, vectors = world()
    with pytest.raises(AdamergeError, match=message):
        AdaMerging(network, vectors)(inputs, IDS)


def test_outputs_and_weights_that_do_not_fit_are_named() -> None:
    network, _, vectors = world()
    weights = AdaMerging(network, vectors).shared_weights()
    wrong = [
        (
            weights | {"words.weight": torch.ones(5, 3)},
            r"'words\.weight' of shape \[5, 3\].*\[5, 4\]",
        ),
        ({"words.bias": weights["words.bias"]}, r"lack tensor 'counts\.bias' and 7 more"),
    ]
    for given, message in wrong:
        with pytest.raises(AdamergeError, match=message):
            Tower(network)(given, WORDS)
    tokens = nn.Unflatten(1, (2, 2))
    with pytest.raises(AdamergeError, match=r"the Unflatten gives a Tensor of shape \[6, 2, 2\]"):
        Tower(tokens)({}, WORDS)


def batches(task: str) -> Tensor:
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(ord(task)))


def course(network: nn.Module, vectors: TaskVectors, given: Any, **options: Any) -> Any:
    method = AdaMerging(network, vectors)
    return adapt(method, given, steps=6, lr=1e-2, **options), method.coefficients.detach()


def test_adapt_is_a_plain_loop() -> None:
    network, _, vectors = world()
    method = AdaMerging(network, vectors)
    given = {task: batches(task).split(8) for task in ("b", "a")}  # of any order
    losses, learned = course(network, vectors, given)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    for step in range(6):
        parts = [given[task][step % 4] for task in ("a", "b")]
        values = [
            reference.entropy(method(part, torch.full((8,), t))) for t, part in enumerate(parts)
        ]
        optimizer.zero_grad()
        sum(values).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(losses[step], torch.stack(values).detach())
        optimizer.step()
    torch.testing.assert_close(learned, method.coefficients.detach())


def test_adapt_is_the_same_for_the_same_seed() -> None:
    network, _, vectors = world()
    loaders = {t: DataLoader(TensorDataset(batches(t)), 8, shuffle=True) for t in ("a", "b")}
    before = torch.get_rng_state()
    one, two = (course(network, vectors, loaders, seed=3) for _ in range(2))
    other, _ = course(network, vectors, loaders, seed=4)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapt_on_batches_of_mixed_tasks_and_in_micro_batches() -> None:
    network, _, vectors = world()
    mixed = [
        (torch.cat([batches("a")[:8], batches("b")[:8]]), torch.arange(2).repeat_interleave(8))
    ]
    expected, learned = course(network, vectors, {t: [batches(t)[:8]] for t in ("a", "b")})
    for options in ({}, {"micro_batch": 3}):
        found, same = course(network, vectors, mixed, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(same, learned, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_adapt_on_cuda_learns_the_same() -> None:
    network, _, vectors = world()
    given = {task: batches(task).split(8) for task in ("a", "b")}
    losses, learned = course(network, vectors, given)
    method = AdaMerging(network, vectors).to("cuda")
    again = adapt(method, given, steps=6, lr=1e-2)
    torch.testing.assert_close(again, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.coefficients.detach().cpu(), learned, rtol=1e-3, atol=1e-4)


def test_heads_of_every_kind() -> None:
    network, _, vectors = world()
    given = {task: [batches(task)] for task in ("a", "b")}
    torch.manual_seed(0)
    a, b = nn.Linear(5, 3), nn.Sequential(nn.Dropout(), nn.Linear(5, 2))
    before = copy.deepcopy((a.state_dict(), b.state_dict()))
    by_task, _ = course(network, vectors, given, heads={"a": a, "b": b})
    assert torch.equal(
        by_task, course(network, vectors, given, heads=nn.ModuleDict({"b": b, "a": a}))[0]
    )
    assert torch.equal(by_task, course(network, vectors, given, heads=Own(a, b.eval()))[0])
    assert b.training is False and all(p.requires_grad for p in a.parameters())
    for head, kept in zip((a, b), before, strict=True):
        assert all(torch.equal(t, kept[name]) for name, t in head.state_dict().items())
    one, _ = course(network, vectors, given, heads=a)
    none, _ = course(network, vectors, given, heads=None)
    assert not torch.equal(one, by_task) and not torch.equal(none, by_task)


class Own:
    """Heads of the user's own making."""

    tasks = ("a", "b")

    def __init__(self, *heads: nn.Module) -> None:
        self.heads = [copy.deepcopy(head).requires_grad_(False) for head in heads]

    def logits(self, features: Tensor, task: str) -> Tensor:
        return self.heads[self.tasks.index(task)](features)


def test_objectives_of_every_kind() -> None:
    network, _, vectors = world()
    given = {task: [batches(task)] for task in ("a", "b")}
    entropy, _ = course(network, vectors, given)
    own, _ = course(network, vectors, given, objective=reference.entropy)
    torch.testing.assert_close(own, entropy)
    heads = adamerge.learn.classifiers.Logits("ab")
    taught = ExpertKL(heads, Experts(network, vectors))
    losses, _ = course(network, vectors, given, objective=taught)
    assert losses[-1].sum() < losses[0].sum()
    infomax, _ = course(network, vectors, given, objective="infomax")
    assert not torch.equal(infomax, entropy)


def nothing() -> Iterator[Tensor]:
    yield batches("a")
    yield batches("a")


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"a": [WORDS]}, {}, r"batches are given for a, and AdaMerging merges a, b: give batches"),
        ({"a": nothing(), "b": [WORDS]}, {}, r"batches of task 'a' end after 2 of 6 steps"),
        ({"a": [WORDS], "b": [WORDS[:, :2]]}, {}, r"an example of one is \[4\], of another \[2\]"),
        ({"a": [(WORDS, IDS, IDS)], "b": [(WORDS, IDS, IDS)]}, {}, "leave labels out"),
        ([WORDS], {}, r"batches give a Tensor: expected pairs of inputs and task ids"),
        ([(WORDS, IDS + 1)], {}, r"6 inputs has task ids \[1, 1, 1, 2, 2, 2\]: .* 0 to 1"),
        ([(WORDS, IDS)], {"objective": "expert_kl"}, r"objective is 'expert_kl': .*ExpertKL"),
        ([(WORDS, IDS)], {"heads": {"a": nn.Identity()}}, r"no head for task 'b' among a"),
        ([(WORDS, IDS)], {"heads": 3}, r"heads is a int: expected a mapping from tasks"),
        (
            {"a": [WORDS], "b": [WORDS]},
            {"objective": Entropy({"b": nn.Identity(), "a": nn.Identity()})},
            r"heads are for b, a, and AdaMerging merges a, b: .* in the same order",
        ),
        ([(WORDS, IDS)], {"objective": Entropy(Own()), "heads": Own()}, "heads are given twice"),
        ([(WORDS, IDS)], {"objective": lambda x: x.sum() / 0}, r"task a, b became NaN .*step 0"),
    ],
)
def test_what_does_not_fit_is_named(given: Any, options: Any, message: str) -> None:
    network, _, vectors = world()
    with pytest.raises(AdamergeError, match=message):
        course(network, vectors, given, **options)


def test_a_loss_that_is_not_finite_puts_back_what_was_learned() -> None:
    network, _, vectors = world()
    method, calls = AdaMerging(network, vectors), []

    def broken(logits: Tensor) -> Tensor:
        calls.append(1)
        return reference.entropy(logits) * (float("nan") if len(calls) > 24 else 1)

    with pytest.raises(
        AdamergeError, match=r"the loss of task a, b became NaN .*at step 12; .*step 10"
    ):
        adapt(method, [(WORDS, IDS)], broken, steps=20, lr=1e-2)
    assert bool(method.coefficients.isfinite().all())
    whole = AdaMerging(network, vectors)
    adapt(whole, [(WORDS, IDS)], steps=9, lr=1e-2)
    torch.testing.assert_close(method.coefficients, whole.coefficients)


class Temperature(Objective):
    """Entropy with a temperature that is learned, and a memory of every image."""

    sees_image_ids = True
    additive = True

    def __init__(self, heads: Any) -> None:
        super().__init__(heads)
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("seen", torch.zeros(2, 10))

    def value(  # type: ignore[override]
        self, features: Tensor, task: str, targets: Tensor | None, image_ids: Tensor
    ) -> Tensor:
        self.seen[self.heads.tasks.index(task), image_ids] += 1
        return reference.entropy(self.heads.logits(features, task) / self.temperature)


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("additive", [True, False])
def test_an_objective_learns_and_remembers(
    micro_batch: int | None, additive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Temperature, "additive", additive)
    network, _, vectors = world()
    method, objective = AdaMerging(network, vectors), Temperature(Own(nn.Identity(), nn.Identity()))
    numbers = torch.tensor([3, 1, 4, 1, 5, 9])
    loss, *_ = adamerge.step_loss(method, objective, WORDS, IDS, micro_batch, None, numbers)
    assert objective.temperature.grad is None, "the gradient comes with the backward pass"
    loss.backward()
    assert objective.seen.nonzero().tolist() == [[0, 1], [0, 3], [0, 4], [1, 1], [1, 5], [1, 9]]
    expected = Temperature(Own(nn.Identity(), nn.Identity()))
    plain = AdaMerging(network, vectors)
    expected.weigh(expected(plain(WORDS, IDS), IDS, image_ids=numbers)).backward()
    torch.testing.assert_close(objective.temperature.grad, expected.temperature.grad)
    torch.testing.assert_close(method.coefficients.grad, plain.coefficients.grad)
    assert set(objective.state_dict()) == {"temperature", "seen"}
    assert objective.double().seen.dtype == torch.float64
    with pytest.raises(
        AdamergeError, match="Temperature keeps something of every image, and is not"
    ):
        adamerge.step_loss(method, objective, WORDS, IDS)


def test_a_fold_that_is_more_than_one_network_has_no_state_dict() -> None:
    from tests.test_contract import make

    with pytest.raises(AdamergeError, match="Surgery folds into a AdaptedEncoder, which is more"):
        make("surgery").merged_state_dict()
    constant = make("wemoe_constant")
    assert set(constant.merged_state_dict()) == {
        n for n, _ in constant.tower.skeleton.named_parameters()
    }


def test_hooks_of_one_family_are_no_part_of_the_base() -> None:
    names = ("trace", "frozen_features", "frozen_state", "folds", "statistics", "fold_as")
    assert not [name for name in names if hasattr(MergeMethod, name)]
    network, _, vectors = world()
    assert not isinstance(AdaMerging(network, vectors), Traced)
