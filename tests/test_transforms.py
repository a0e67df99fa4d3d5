"""What every transform promises, whatever the storage; and TIES against entry-by-entry loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adamerge import AdamergeError, TaskVectors, transforms
from adamerge.transforms.sparse import keep_probability, ties
from adamerge.weights.storage import Storage
from tests import golden_data as golden
from tests import reference
from tests.test_golden_more_statistics import gradients, inputs

# Every transform, as a function of task vectors alone: a new one adds a row.
TRANSFORMS: dict[str, Callable[[TaskVectors], TaskVectors]] = {
    "ace": transforms.ace,
    "ace: uneven": lambda tv: transforms.ace(tv, spread=0.0),
    "breadcrumbs": transforms.breadcrumbs,
    "breadcrumbs: rows": lambda tv: transforms.breadcrumbs(tv, rows=True),
    "cart": transforms.cart,
    "centre": transforms.centre,
    "consensus": transforms.consensus,
    "dare": transforms.dare,
    "della": transforms.della,
    "doge": lambda tv: transforms.doge(tv, steps=3),
    "elect": transforms.elect,
    "emr": transforms.emr,
    "emr: by layers": lambda tv: transforms.emr(tv, by_layers=True),
    "iso_c": transforms.iso_c,
    "iso_cts": transforms.iso_cts,
    "esm": lambda tv: transforms.esm(tv, inputs(torch.float32)),
    "fisher": lambda tv: transforms.fisher(tv, gradients(torch.float32), "predicted"),
    "fisher_batch_sum": lambda tv: transforms.fisher_batch_sum(tv, gradients(torch.float32)),
    "karcher": transforms.karcher,
    "lines": transforms.lines,
    "magmax": transforms.magmax,
    "magnitude": transforms.magnitude,
    "metagpt": transforms.metagpt,
    "model_stock": transforms.model_stock,
    "multislerp": transforms.multislerp,
    "opcm": transforms.opcm,
    "pcb": transforms.pcb,
    "pcb: readme": lambda tv: transforms.pcb(tv, "readme"),
    "regmean": lambda tv: transforms.regmean(tv, inputs(torch.float32)),
    "slerp": transforms.slerp,
    "svc": transforms.svc,
    "tall": transforms.tall,
    "ties": transforms.ties,
    "truncate": transforms.truncate,
    "tsv_m": transforms.tsv_m,
    "twin": transforms.twin,
    "wudi": lambda tv: transforms.wudi(tv, steps=3),
}
TASKS = {"slerp": 2}  # where not all
# Of the largest entry of a layer: what a type of storage may be off by.
PRECISION = {"float32": 1e-5, "bfloat16": 2.0**-7, "int8": 1 / 127}


def stored(name: str, storage: Storage) -> TaskVectors:
    tasks = golden.TASKS[: TASKS.get(name)]
    experts = {task: golden.state(f"expert_{task}", torch.float32) for task in tasks}
    return TaskVectors(golden.state("pretrained", torch.float32), experts, storage=storage)


@functools.lru_cache(2)
def in_memory(name: str, dtype: str) -> tuple[dict[str, torch.Tensor], TaskVectors]:
    """Task vectors of a type of storage, in float32, and what the transform makes of them."""
    vectors = stored(name, Storage(dtype))
    before = {key: tau.clone() for key, tau in vectors.deltas.items()}
    return before, TRANSFORMS[name](vectors.with_deltas(before, Storage()))


@pytest.mark.parametrize("device", ["auto", "host", "disk"])
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_storage_gives_what_memory_gives(
    name: str, dtype: str, device: str, tmp_path: Path
) -> None:
    storage = Storage(dtype, device, tmp_path / "t.safetensors" if device == "disk" else None)
    vectors, (before, plain) = stored(name, storage), in_memory(name, dtype)
    found = TRANSFORMS[name](vectors)
    assert found.storage == storage and found.names == plain.names == vectors.names
    assert found.tasks == vectors.tasks and found.per_task == plain.per_task
    for key, wanted in plain.deltas.items():
        assert torch.equal(vectors.deltas[key], before[key])
        off = (found.deltas[key] - wanted).abs()
        assert off.max() <= PRECISION[dtype] * wanted.abs().max()


def test_every_public_transform_is_in_the_table() -> None:
    assert set(transforms.__all__) == {name.split(":")[0] for name in TRANSFORMS}


def random_vectors(seed: int, round_to: int | None = None) -> TaskVectors:
    generator = torch.Generator().manual_seed(seed)

    def state() -> dict[str, torch.Tensor]:
        sizes = {"b": (5, 3), "a": (7,)}
        made = {n: torch.randn(s, generator=generator).double() for n, s in sizes.items()}
        return made if round_to is None else {n: (t * round_to).round() for n, t in made.items()}

    zero = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    return TaskVectors(zero, {f"t{i}": state() for i in range(4)})


@pytest.mark.parametrize("round_to", [None, 2])  # rounding makes ties and zero sums
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_equals_plain_loops(seed: int, density: float, round_to: int | None) -> None:
    vectors = random_vectors(seed, round_to)
    flat = [
        torch.cat([delta[row].flatten() for delta in vectors.deltas.values()]) for row in range(4)
    ]
    expected = reference.ties(flat, density)
    found = ties(vectors, density)
    for row in range(4):
        ours = torch.cat([delta[row].flatten() for delta in found.deltas.values()])
        torch.testing.assert_close(ours, expected[row], rtol=0, atol=0)


def test_leaves_its_input_alone_and_shares_pretrained() -> None:
    vectors = random_vectors(0)
    before = {name: delta.clone() for name, delta in vectors.deltas.items()}
    found = ties(vectors)
    assert all(torch.equal(vectors.deltas[name], before[name]) for name in before)
    assert found.pretrained is vectors.pretrained and found.tasks == vectors.tasks


@pytest.mark.parametrize("density", [0, -1, 1.5])
def test_density_out_of_range(density: float) -> None:
    with pytest.raises(AdamergeError, match=r"density is .* expected a number in \(0, 1\]"):
        ties(random_vectors(0), density)


def test_density_by_architecture() -> None:
    vectors = random_vectors(0)
    density = {"ViT-B-32": 0.5, "default": 0.2}
    for names, wanted in ((["ViT-B-32", "ViT-B-32-quickgelu"], 0.5), (["RN50"], 0.2), ([], 0.2)):
        found, plain = ties(vectors, density, names), ties(vectors, wanted)
        assert all(torch.equal(found.deltas[name], plain.deltas[name]) for name in plain.deltas)
    with pytest.raises(AdamergeError, match="expected a number for RN50 or for default"):
        ties(vectors, {"ViT-B-32": 0.5}, ["RN50"])
    with pytest.raises(AdamergeError, match=r"density is 2\.0, expected a number"):
        ties(vectors, {"RN50": 2.0}, ["RN50"])


def state(**layers: list[float] | list[list[float]]) -> dict[str, torch.Tensor]:
    return {
        name.replace("_", "."): torch.tensor(values).double() for name, values in layers.items()
    }


def vectors_of(*tasks: dict[str, torch.Tensor], start: float = 0) -> TaskVectors:
    """Task vectors with exactly these τ."""
    pretrained = {name: torch.full_like(tau, start) for name, tau in tasks[0].items()}
    moved = [{name: start + tau for name, tau in task.items()} for task in tasks]
    return TaskVectors(pretrained, {f"t{i}": task for i, task in enumerate(moved)})


@pytest.mark.parametrize("name", ["dare", "della"])
def test_drawn_numbers_depend_on_the_seed_and_the_names_alone(name: str) -> None:
    """Not on the order of tasks, on other tasks, or on other layers."""
    transform = getattr(transforms, name)
    generator = torch.Generator().manual_seed(0)
    one, other = ({n: torch.randn(40, 50, generator=generator) for n in "ab"} for _ in range(2))
    zero = {n: torch.zeros(40, 50) for n in "ab"}
    both = transform(TaskVectors(zero, {"one": one, "other": other}), 0.6)
    turned = transform(TaskVectors(zero, {"other": other, "one": one}), 0.6)
    alone = transform(TaskVectors({"b": zero["b"]}, {"one": {"b": one["b"]}}), 0.6)
    assert torch.equal(both.deltas["b"], turned.deltas["b"].flip(0))
    assert torch.equal(both.deltas["b"][0], alone.deltas["b"][0])
    again = transform(TaskVectors(zero, {"one": one, "other": other}), 0.6, seed=1)
    kept = both.deltas["b"] != 0
    assert not torch.equal(kept, again.deltas["b"] != 0) and not torch.equal(*kept)
    assert kept.double().mean().sub(0.6).abs() < 0.03


def test_dare_keeps_the_mean() -> None:
    vectors = vectors_of({"a": torch.ones(1000, 100).double()})
    assert transforms.dare(vectors, 0.25).deltas["a"].unique().tolist() == [0, 4]
    assert transforms.dare(vectors, 0.25).deltas["a"].mean() == pytest.approx(1, abs=0.03)
    assert torch.equal(transforms.dare(vectors, 1.0).deltas["a"], vectors.deltas["a"])


def test_della_keeps_large_entries_more_often_and_the_mean() -> None:
    row = torch.linspace(0.1, 1, 10).double()
    vectors = vectors_of({"a": row.expand(20000, 10).clone(), "b": torch.ones(1).double()})
    found = transforms.della(vectors, density=0.5, epsilon=0.4).deltas["a"][0]
    chance = (found != 0).double().mean(0)
    wanted = 0.1 + 0.8 * torch.arange(10) / 9
    torch.testing.assert_close(chance, wanted.double(), rtol=0, atol=0.02)
    torch.testing.assert_close(found.mean(0), row, rtol=0.1, atol=0)
    assert keep_probability(torch.ones(1), 0.5, 0.4).tolist() == [0.5]  # a row of one entry
    assert keep_probability(torch.zeros(3), 0.5, 0.4).tolist() == pytest.approx([0.1, 0.5, 0.9])


def test_magnitude_and_breadcrumbs_count_entries() -> None:
    tau = state(a=[[5, -4, 3, 3], [1, 2, -8, 0.5]], b=[7])
    vectors = vectors_of(tau)
    found = transforms.magnitude(vectors, 0.5).deltas
    assert found["a"][0].tolist() == [[5, -4, 3, 0], [0, 0, -8, 0]]  # of equal ones the earlier
    assert found["b"].tolist() == [[7]]  # at least one
    found = transforms.breadcrumbs(vectors, density=0.4, largest=0.2).deltas
    assert found["a"][0].tolist() == [[5, -4, 3, 0], [0, 0, 0, 0]]
    assert found["b"].tolist() == [[0]]
    found = transforms.breadcrumbs(vectors, density=0.5, largest=0.25, rows=True).deltas
    assert found["a"][0].tolist() == [[0, -4, 3, 0], [1, 2, 0, 0]]


def test_elect_is_the_mean_of_those_that_agree() -> None:
    vectors = vectors_of(
        state(a=[1, 2, -3, 0, 1]), state(a=[2, -5, -1, 4, -1]), state(a=[3, 1, 3, 2, 0])
    )
    found = transforms.elect(vectors).deltas["a"]
    assert found.sum(0).tolist() == pytest.approx([2, -5, -2, 3, 0])
    assert found[:, 1].tolist() == [0, -5, 0]


def test_magmax_takes_the_later_of_equal_magnitudes() -> None:
    vectors = vectors_of(state(a=[1, 2, -3]), state(a=[-1, 1, 2]), state(a=[1, 2, 3]))
    assert transforms.magmax(vectors).deltas["a"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 2, 3]]


def test_consensus_and_tall_compare_with_the_other_tasks_sum() -> None:
    vectors = vectors_of(state(a=[2, 1, 0]), state(a=[2, -4, 0]), state(a=[2, 1, 9]))
    masks = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    total = torch.tensor([6, -2, 9]).double()
    found = transforms.tall(vectors, threshold=0.4)
    assert found.per_task and not vectors.per_task
    assert torch.equal(found.deltas["a"], masks * total)
    for at_least, wanted in ((1, [6, -2, 9]), (2, [6, 0, 0])):
        merged = transforms.consensus(vectors, 0.4, at_least).deltas["a"].sum(0)
        assert merged.tolist() == wanted


def test_lines_scales_by_depth_after_other_transforms_too() -> None:
    """By the paper's alpha: the size of the experts' own sum and of the given vectors'."""
    layers = {
        "embed": [4.0, -2],
        "blocks_0_w": [1.0, 1],
        "blocks_1_w": [1.0, 1],
        "blocks_2_w": [1.0, 1],
    }
    vectors = vectors_of(
        state(**layers), state(**{name: [3 * v for v in row] for name, row in layers.items()})
    )
    plain = transforms.lines(vectors, beta=0.6).deltas
    for name, factor in (
        ("embed", 0.5),
        ("blocks.0.w", 0.5),
        ("blocks.1.w", 0.8),
        ("blocks.2.w", 1.1),
    ):
        torch.testing.assert_close(plain[name], factor * vectors.deltas[name])
    halved = vectors.with_deltas({name: tau / 2 for name, tau in vectors.deltas.items()})
    after = transforms.lines(halved, beta=0.0, experts=vectors).deltas
    torch.testing.assert_close(after["embed"], halved.deltas["embed"])  # (24 / 12) / 2 tasks = 1


def test_model_stock_of_two_is_the_papers_ratio(caplog: pytest.LogCaptureFixture) -> None:
    vectors = vectors_of(state(a=[1, 0], b=[1, 0], c=[1]), state(a=[1, 1], b=[-1, 1], c=[-2]))
    found = transforms.model_stock(vectors).deltas
    cosine = 0.5**0.5
    wanted = 2 * cosine / (1 + cosine) * vectors.deltas["a"].mean(0)
    torch.testing.assert_close(found["a"].sum(0), wanted)
    assert "mean cosine is negative in 2 of 3 layers (-1.000 in c)" in caplog.text
    assert found["c"].tolist() == [[0], [0]]  # where they cancel, any multiple would be noise


def test_metagpt_of_equal_norms_is_the_mean() -> None:
    vectors = vectors_of(state(a=[3, 4]), state(a=[5, 0]))
    torch.testing.assert_close(
        transforms.metagpt(vectors).deltas["a"].sum(0), vectors.deltas["a"].mean(0)
    )


def merged(vectors: TaskVectors) -> torch.Tensor:
    return vectors.combine(torch.ones(len(vectors.tasks)).double())["a"]


def test_spherical_merges_of_orthogonal_weights() -> None:
    """The middle of two is their bisector; norms are interpolated or averaged."""
    pretrained = state(a=[0.25, 0.25])
    experts = {"x": state(a=[1, 0]), "y": state(a=[0, 1])}
    vectors = TaskVectors(pretrained, experts)
    half = torch.full((2,), 0.5**0.5).double()
    torch.testing.assert_close(merged(transforms.slerp(vectors)), half)
    torch.testing.assert_close(merged(transforms.karcher(vectors)), half)
    for position, task in ((0, "x"), (1, "y")):
        torch.testing.assert_close(merged(transforms.slerp(vectors, position)), experts[task]["a"])
    third = [math.cos(math.pi / 6), math.sin(math.pi / 6)]
    assert merged(transforms.slerp(vectors, 1 / 3)).tolist() == pytest.approx(third)
    longer = TaskVectors(pretrained, {"x": state(a=[1, 0]), "y": state(a=[0, 3])})
    torch.testing.assert_close(merged(transforms.karcher(longer)), 2 * half)


def test_parallel_weights_are_interpolated_linearly() -> None:
    vectors = TaskVectors(state(a=[1, 1]), {"x": state(a=[2, 2]), "y": state(a=[4, 4])})
    assert merged(transforms.slerp(vectors, 0.25)).tolist() == pytest.approx([2.5, 2.5])
    assert merged(transforms.karcher(vectors)).tolist() == pytest.approx([3, 3])
    assert merged(transforms.multislerp(vectors)).tolist() == pytest.approx([3, 3])


def test_multislerp_of_vectors_that_cancel_is_their_mean() -> None:
    vectors = vectors_of(state(a=[1, 0]), state(a=[-1, 0]), start=1)
    assert merged(transforms.multislerp(vectors)).tolist() == pytest.approx([1, 1])


ONE = {"a": torch.ones(2).double()}
REFUSED = [
    (
        lambda: transforms.magnitude(random_vectors(0), 0),
        r"magnitude: density is 0, expected a number in \(0, 1\]",
    ),
    (lambda: transforms.dare(random_vectors(0), 1.5), r"dare: density is 1\.5, expected"),
    (lambda: transforms.dare(random_vectors(0), "half"), r"dare: density is 'half', expected"),
    (
        lambda: transforms.della(random_vectors(0), 0.9, 0.2),
        r"density ± epsilon is 0\.7 to 1\.1, expected",
    ),
    (lambda: transforms.breadcrumbs(random_vectors(0), 0.6, 0.5), r"more than all entries"),
    (
        lambda: transforms.consensus(random_vectors(0), 0.4, 5),
        r"at_least is 5, expected a whole number in \[1, 4\]",
    ),
    (lambda: transforms.tall(random_vectors(0), -1), r"tall: threshold is -1, expected"),
    (
        lambda: transforms.emr(vectors_of(state(a=[1, -1]), state(a=[-3, 3]))),
        r"no entry of task 't0' has the sign",
    ),
    (
        lambda: transforms.pcb(random_vectors(0), "paper"),
        r"pcb: formula is 'paper', expected one of vision, readme",
    ),
    (
        lambda: transforms.pcb(vectors_of(state(a=[1.0] * 50), state(a=[2.0] * 50))),
        r"task 't0'.* same magnitude \(1\)",
    ),
    (
        lambda: transforms.model_stock(vectors_of(ONE)),
        r"model_stock: there is one task vector, expected two",
    ),
    (
        lambda: transforms.lines(random_vectors(0)),
        r"lines: no layer's name has the number of a block",
    ),
    (
        lambda: transforms.lines(vectors_of(state(a_0=[1, 2]), state(a_0=[-1, -2]))),
        r"lines: the sum .* is 0",
    ),
    (lambda: transforms.lines(random_vectors(0), beta=-1), r"lines: beta is -1, expected"),
    (lambda: transforms.slerp(random_vectors(0)), r"slerp: there are 4 tasks, expected 2"),
    (
        lambda: transforms.slerp(vectors_of(ONE, {"a": -ONE["a"]}), 2),
        r"slerp: position is 2, expected",
    ),
    (
        lambda: transforms.karcher(random_vectors(0), 0),
        r"karcher: iterations is 0, expected a whole number",
    ),
]


def test_a_merge_with_nan_is_refused_by_its_layer() -> None:
    vectors = random_vectors(0)
    broken = {name: tau * (torch.nan if name == "b" else 1) for name, tau in vectors.deltas.items()}
    name = next(iter(broken))
    broken[name] = broken[name] / 0
    with pytest.raises(AdamergeError, match=f"NaN or infinite values in layer '{name}'"):
        vectors.with_deltas(broken)


@pytest.mark.parametrize("last", [-1.0, -0.01, 0.0])
def test_directions_that_cancel_or_are_none_leave_the_mean(last: float) -> None:
    """One-number layers, whose directions are 1 and -1; experts that are 0 in a layer."""
    rest = torch.ones(2)  # no expert is the pretrained model
    states = ({"a": torch.tensor([v]), "b": torch.tensor(v), "c": rest} for v in (1.0, last))
    vectors = vectors_of(*states)
    for name in ("a", "b") if last else ():
        mean = vectors.deltas[name].mean(0)
        found = transforms.karcher(vectors).deltas[name].sum(0)
        torch.testing.assert_close(found, mean)
        torch.testing.assert_close(transforms.multislerp(vectors).deltas[name].sum(0), mean)
    if not last:  # the mean norm, along the other
        assert [float(transforms.karcher(vectors).deltas[n].sum()) for n in ("a", "b")] == [
            0.5,
            0.5,
        ]


def test_karcher_where_one_is_opposite_to_the_mean_of_the_others() -> None:
    numbers = [1.0, 2.0, 3.0, 4.0, -1.0]
    vectors = vectors_of(*({"a": torch.tensor([v])} for v in numbers))
    assert float(transforms.karcher(vectors).deltas["a"].sum()) == pytest.approx(1.8)


def test_multislerp_is_of_any_scale() -> None:
    """The mean norm, not that of the mean, also where norms are far below 1e-8."""
    for scale in (1.0, 1e-15):
        one, other = scale * torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
        found = transforms.multislerp(vectors_of({"a": one}, {"a": other})).deltas["a"].sum(0)
        assert float(found.norm()) == pytest.approx(2 * scale, rel=1e-6)


def test_emr_of_numbers_without_dimension() -> None:
    vectors = vectors_of({"a": torch.tensor(2.0)}, {"a": torch.tensor(3.0)})
    assert transforms.emr(vectors).deltas["a"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_wrong_arguments_get_a_sentence(call: Callable[[], TaskVectors], sentence: str) -> None:
    with pytest.raises(AdamergeError, match=sentence):
        call()
