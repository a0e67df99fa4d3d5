"""What every transform promises, whatever the storage; and TIES against entry-by-entry loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adamerge import AdamergeError, TaskVectors, transforms
from adamerge.transforms.sparse import ties
from adamerge.weights.storage import Storage
from tests import golden_data as golden
from tests import reference

# Every transform, as a function of task vectors alone: a new one adds a row.
TRANSFORMS: dict[str, Callable[[TaskVectors], TaskVectors]] = {
    "ties": transforms.ties,
    "metagpt": transforms.metagpt,
    "tsv_m": transforms.tsv_m,
    "iso_c": transforms.iso_c,
    "iso_cts": transforms.iso_cts,
    "svc": transforms.svc,
    "svc:tsv_m": lambda v: transforms.svc(transforms.tsv_m(v), 1.0, experts=v),
    "centre": transforms.centre,
    "truncate": transforms.truncate,
    "cart": transforms.cart,
    "wudi": lambda v: transforms.wudi(v, steps=3),
    "ace": transforms.ace,
    "ace:uneven": lambda v: transforms.ace(v, spread=0.0),
    "doge": lambda v: transforms.doge(v, steps=3),
    "opcm": transforms.opcm,
}
# Of the largest entry of a layer: what a type of storage may be off by.
PRECISION = {"float32": 1e-5, "bfloat16": 2.0**-7, "int8": 1 / 127}


@pytest.mark.parametrize("device", ["auto", "host", "disk"])
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_storage_gives_what_memory_gives(
    name: str, dtype: str, device: str, tmp_path: Path
) -> None:
    experts = {task: golden.state(f"expert_{task}", torch.float32) for task in golden.TASKS}
    storage = Storage(dtype, device, tmp_path / "t.safetensors" if device == "disk" else None)
    vectors = TaskVectors(golden.state("pretrained", torch.float32), experts, storage=storage)
    before = {key: tau.clone() for key, tau in vectors.deltas.items()}
    plain = TRANSFORMS[name](vectors.with_deltas(before, Storage()))
    found = TRANSFORMS[name](vectors)
    assert found.storage == storage and found.names == plain.names == vectors.names
    assert found.tasks == vectors.tasks
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
    with pytest.raises(AdamergeError, match=r"density is .* expected a fraction in \(0, 1\]"):
        ties(random_vectors(0), density)


def test_density_by_architecture() -> None:
    vectors = random_vectors(0)
    density = {"ViT-B-32": 0.5, "default": 0.2}
    for names, wanted in ((["ViT-B-32", "ViT-B-32-quickgelu"], 0.5), (["RN50"], 0.2), ([], 0.2)):
        found, plain = ties(vectors, density, names), ties(vectors, wanted)
        assert all(torch.equal(found.deltas[name], plain.deltas[name]) for name in plain.deltas)
    with pytest.raises(AdamergeError, match="expected a number for RN50 or for default"):
        ties(vectors, {"ViT-B-32": 0.5}, ["RN50"])
    with pytest.raises(AdamergeError, match=r"density is 2\.0, expected a fraction"):
        ties(vectors, {"RN50": 2.0}, ["RN50"])
