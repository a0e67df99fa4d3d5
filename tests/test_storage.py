"""Task vectors in smaller types and other places: what it costs, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import adamerge
from adamerge import AdamergeError, TaskVectors
from adamerge.learn.step import step_loss
from adamerge.methods import AdaMerging
from adamerge.transforms.sparse import ties
from adamerge.weights import merging, storage
from adamerge.weights.disk import MappedLayers
from adamerge.weights.formats import files
from adamerge.weights.formats.files import open_weights
from adamerge.weights.storage import Layer, Storage, contract, keep, merge
from tests import golden_data as golden

SHAPES = [(), (7,), (5, 3), (4, 3, 2, 2), (1, 9), (6, 1)]


def deltas(shape: tuple[int, ...], tasks: int = 3) -> Tensor:
    """Heavy-tailed numbers, one row of them zero."""
    made = torch.randn(tasks, *shape, generator=torch.Generator().manual_seed(len(shape))) ** 3
    if len(shape) > 1:
        made[1, 0] = 0
    return 1e-3 * made


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_off_by_half_a_step_of_its_row_at_most(shape: tuple[int, ...]) -> None:
    tau = deltas(shape)
    kept = keep(tau, "int8")
    dense = kept.dense(torch.zeros(shape))
    if len(shape) < 2:
        assert kept.scales is None and torch.equal(dense, tau), "vectors stay as they are"
        return
    assert kept.values.dtype == torch.int8
    for task in range(len(tau)):
        for row in range(shape[0]):
            most = tau[task, row].abs().max()
            bound = most / 127 / 2 * (1 + 1e-5)
            assert (dense[task, row] - tau[task, row]).abs().max() <= bound
            assert (dense[task, row].abs().max() - most).abs() <= 1e-6 * most, "the largest is kept"
    assert kept.nbytes == tau.numel() + 4 * tau.shape[0] * tau.shape[1]


def test_bfloat16_keeps_eight_bits_of_every_number() -> None:
    tau = deltas((50, 40))
    dense = keep(tau, "bfloat16").dense(tau[0])
    assert (dense - tau).abs().max() > 0
    assert ((dense - tau).abs() <= tau.abs() * 2**-8).all()
    assert keep(deltas((9,)), "bfloat16").values.dtype == torch.float32


@pytest.mark.parametrize("at_once", [1, 10, 10**6])
@pytest.mark.parametrize("dtype", storage.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_and_contraction_are_those_of_what_is_kept(
    shape: tuple[int, ...], dtype: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_AT_ONCE", at_once)
    base, column, grad = torch.randn(shape), torch.randn(3), torch.randn(shape)
    kept = keep(deltas(shape), dtype)
    dense = kept.dense(base).double()
    expected = base.double() + sum(c * tau for c, tau in zip(column.double(), dense, strict=True))
    torch.testing.assert_close(merge(base, kept, column).double(), expected, rtol=1e-5, atol=1e-6)
    products = torch.stack([(grad.double() * tau).sum() for tau in dense])
    found = contract(grad, kept, base)
    torch.testing.assert_close(found.double(), products, rtol=1e-5, atol=1e-7)


def experts() -> dict[str, dict[str, Tensor]]:
    return {t: golden.state(f"expert_{t}", torch.float32) for t in golden.TASKS}


def stored(kept: Storage) -> TaskVectors:
    return TaskVectors(golden.state("pretrained", torch.float32), experts(), storage=kept)


def learned(vectors: TaskVectors, steps: int = 5, micro_batch: int | None = None) -> Tensor:
    """λ after a few steps of layer-wise AdaMerging."""
    method = AdaMerging(golden.clip().backbone, vectors)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    objective = adamerge.objectives.Entropy(golden.heads(torch.float32))
    for step in range(steps):
        images, ids = golden.batch(step % 2, torch.float32)
        optimizer.zero_grad()
        step_loss(method, objective, images, ids, micro_batch)[0].backward()
        optimizer.step()
    return method.coefficients.detach()


@pytest.mark.parametrize("together", [1, 2**20])
def test_places_and_groups_learn_bit_identical_coefficients(
    together: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = learned(stored(Storage()))
    monkeypatch.setattr(merging, "_TOGETHER", together)
    for place in ("auto", "host", "disk"):
        vectors = stored(Storage("float32", place, tmp_path / "tau.safetensors"))
        assert len(vectors.groups) > 3 if together == 1 else len(vectors.groups) == 1
        assert torch.equal(learned(vectors), expected), place


@pytest.mark.parametrize("place", ["auto", "disk"])
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-3), ("int8", 3e-3)])
def test_smaller_types_learn_nearly_the_same(
    dtype: str, bound: float, place: str, tmp_path: Path
) -> None:
    exact = learned(stored(Storage()))
    found = learned(stored(Storage(dtype, place, tmp_path / "tau.safetensors")))
    moved = (exact - 0.3).abs().max()
    assert 0 < (found - exact).abs().max() < bound < moved / 5


def test_a_file_of_task_vectors_is_plain_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "tau.safetensors"
    vectors = stored(Storage("float32", "disk", path))
    plain = load_file(path)
    assert list(vectors.layers) and set(plain) == set(vectors.names)
    pretrained = golden.state("pretrained", torch.float32)
    for name, tau in plain.items():
        for row, task in enumerate(golden.TASKS):
            assert torch.equal(tau[row], experts()[task][name] - pretrained[name])
    again = TaskVectors.mapped(pretrained, vectors.storage)
    assert (again.tasks, again.names) == (vectors.tasks, vectors.names)
    assert torch.equal(again.norms(), vectors.norms())
    assert set(again.constants) == set(vectors.constants)
    assert torch.equal(learned(again), learned(vectors))


def test_memory_given_back_is_read_again(tmp_path: Path) -> None:
    vectors = stored(Storage("float32", "disk", tmp_path / "tau.safetensors"))
    layers = vectors.layers
    assert isinstance(layers, MappedLayers)
    name = max(vectors.names, key=lambda n: vectors.pretrained[n].numel())
    held = layers[name].values
    before = held.clone()
    layers.expect([name])
    layers.release()
    assert torch.equal(held, before)


def test_nothing_is_left_of_experts_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tau.safetensors"
    twins = {**experts(), "twin": experts()["task_a"]}
    with pytest.raises(AdamergeError, match="'twin' is identical to expert of task 'task_a'"):
        TaskVectors(
            golden.state("pretrained", torch.float32), twins, storage=Storage("int8", "disk", path)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_and_one_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tau.safetensors"
    made = stored(Storage("int8", "disk", path))
    kept, wanted = made.storage, {name: made.deltas[name].clone() for name in made.names}
    pretrained = golden.state("pretrained", torch.float32)
    other = {name: tensor[..., None] for name, tensor in pretrained.items()}
    with pytest.raises(AdamergeError, match="holds task vectors of another model"):
        TaskVectors.mapped(other, kept)
    whole = path.read_bytes()
    for damaged in (whole[:-64], whole[:100], b"", b"\xff" * 200, whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(AdamergeError, match=r"not a whole file of stored task vectors.*delete"):
            TaskVectors.mapped(pretrained, kept)
    chance, content, refused = random.Random(0), bytearray(whole), 0
    for _ in range(60):
        place, bit = chance.randrange(len(whole)), 1 << chance.randrange(8)
        content[place] ^= bit
        path.write_bytes(content)
        content[place] ^= bit
        try:
            found = TaskVectors.mapped(pretrained, kept)
        except AdamergeError:
            refused += 1
        else:  # in the room that is left for the header
            assert all(torch.equal(found.deltas[name], wanted[name]) for name in found.names)
    assert refused > 30


@pytest.mark.parametrize(("dtype", "place"), [("float32", "disk"), ("int8", "auto")])
def test_transforms_keep_the_storage(dtype: str, place: str, tmp_path: Path) -> None:
    plain = ties(stored(Storage()))
    made = ties(stored(Storage("float32", place, tmp_path / "tau.safetensors")))
    made = made.stored(Storage(dtype, place, tmp_path / "tau.safetensors"))
    for name, tau in plain.deltas.items():
        expected = keep(tau, dtype)
        assert torch.equal(made.layers[name].values, expected.values)
    assert [p.name for p in tmp_path.iterdir()] in ([], ["tau.safetensors"]), "no file is left over"
    torch.testing.assert_close(made.norms(), plain.norms())


def test_deltas_of_other_layers_are_refused() -> None:
    vectors = stored(Storage())
    fewer = dict(list(vectors.deltas.items())[1:])
    with pytest.raises(AdamergeError, match=f"not of the same layers.*{vectors.names[0]}"):
        vectors.with_deltas(fewer)


def test_moves_take_along_what_has_no_place_of_its_own(tmp_path: Path) -> None:
    meta = torch.device("meta")
    kept = stored(Storage("int8"))
    moved = kept.apply(lambda tensor: tensor.to(meta))
    assert moved.device == meta and moved.layers[moved.names[-1]].values.device == meta
    back = moved.apply(lambda tensor: torch.empty_like(tensor, device="cpu"))
    assert back is kept, "what comes back is what is still there, not a second copy"
    disk = stored(Storage("float32", "disk", tmp_path / "tau.safetensors"))
    assert disk.apply(lambda tensor: tensor.to(meta)).layers is disk.layers
    double = stored(Storage("bfloat16")).apply(lambda t: t.double() if t.is_floating_point() else t)
    matrix = next(n for n in double.names if double.pretrained[n].ndim > 1)
    assert double.layers[matrix].values.dtype == torch.bfloat16
    assert double.deltas[matrix].dtype == torch.float64


def test_copies_and_other_processes_map_the_same_file(tmp_path: Path) -> None:
    vectors = stored(Storage("int8", "disk", tmp_path / "tau.safetensors"))
    method = AdaMerging(golden.clip().backbone, vectors)
    twin = copy.deepcopy(method)
    assert twin.task_vectors.layers is vectors.layers
    again = pickle.loads(pickle.dumps(vectors))
    name = vectors.names[0]
    assert torch.equal(again.layers[name].values, vectors.layers[name].values)
    meta = torch.device("meta")
    moved = stored(Storage()).apply(lambda tensor: tensor.to(meta))
    assert pickle.loads(pickle.dumps(moved)).device == meta


def test_a_move_that_changes_nothing_does_not_forget_where_home_is() -> None:
    kept, meta = stored(Storage()), torch.device("meta")
    moved = kept.apply(lambda tensor: tensor.to(meta)).apply(lambda tensor: tensor.to(meta))
    assert moved.apply(lambda tensor: torch.empty_like(tensor, device="cpu")) is kept


def test_a_learnable_that_passes_by_the_weights_is_refused() -> None:
    class Scaled(AdaMerging):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode(self, weights: Any, images: Tensor, task_ids: Tensor) -> Tensor:
            return self.scale * super().encode(weights, images, task_ids)

    method = Scaled(golden.clip().backbone, stored(Storage()))
    images, ids = golden.batch(0, torch.float32)
    objective = adamerge.objectives.Entropy(golden.heads(torch.float32))
    with pytest.raises(AdamergeError, match=r"encode uses a learnable itself.*return it from"):
        step_loss(method, objective, images, ids)
    assert all(parameter.grad is None for parameter in method.parameters())


def test_gradients_add_up_over_steps_without_zero_grad() -> None:
    method = AdaMerging(golden.clip().backbone, stored(Storage()))
    objective = adamerge.objectives.Entropy(golden.heads(torch.float32))
    images, ids = golden.batch(0, torch.float32)
    found = []
    for _ in range(2):
        step_loss(method, objective, images, ids)[0].backward()
        assert method.coefficients.grad is not None
        found.append(method.coefficients.grad.clone())
    torch.testing.assert_close(found[1], 2 * found[0])


def test_gradients_go_back_while_the_backward_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layers' gradient is contracted before the first layers' is known, then dropped."""
    monkeypatch.setattr(merging, "_TOGETHER", 1)
    vectors = stored(Storage())
    seen: list[int] = []
    bring = TaskVectors.bring

    def watched(own: TaskVectors, group: int, then: int) -> list[Layer]:
        seen.append(group)
        return bring(own, group, then)

    monkeypatch.setattr(TaskVectors, "bring", watched)
    alive: list[int] = []
    plain = merging.contract

    def counted(grad: Tensor, layer: Layer, like: Tensor) -> Tensor:
        alive.append(grad.numel())
        return plain(grad, layer, like)

    monkeypatch.setattr(merging, "contract", counted)
    method = AdaMerging(golden.clip().backbone, vectors)
    images, ids = golden.batch(0, torch.float32)
    encoded: list[int] = []
    method.tower.skeleton.register_forward_hook(lambda *_: encoded.append(len(seen)))
    step_loss(method, adamerge.objectives.Entropy(golden.heads(torch.float32)), images, ids)
    count = len(vectors.groups)
    assert encoded == [count], "all is merged before the images are encoded"
    order = seen[count:]
    assert sorted(order) == list(range(count)) and sum(alive) == vectors.numel()
    last, first = order.index(count - 1), order.index(0)
    assert last < count / 2 < first, "the output's weights come first, the patches' late"


def test_matrices_are_merged_in_the_type_of_autocast_and_coefficients_stay_float32() -> None:
    method = AdaMerging(golden.clip().backbone, stored(Storage()))
    objective = adamerge.objectives.Entropy(golden.heads(torch.float32))
    images, ids = golden.batch(0, torch.float32)
    grads = []
    for micro_batch, low in ((None, False), (None, True), (4, True)):
        method.coefficients.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            kinds = {w.dtype for w in method.weights().values() if w.ndim > 1}
            loss = step_loss(method, objective, images, ids, micro_batch)[0]
        assert kinds == {torch.bfloat16 if low else torch.float32}
        loss.backward()
        assert method.coefficients.grad is not None
        assert method.coefficients.grad.dtype == torch.float32
        grads.append(method.coefficients.grad.flatten())
    for grad in grads[1:]:
        assert torch.nn.functional.cosine_similarity(grad, grads[0], dim=0) > 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int4"}, "task_vectors.dtype is 'int4': expected one of float32, bfloat16"),
        ({"device": "tape"}, "task_vectors.device is 'tape': expected one of auto, cuda"),
        ({"device": "disk"}, "no file is named"),
    ],
)
def test_storage_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(AdamergeError, match=message):
        Storage(**settings)


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_AT_HAND", 0)
    path, other = tmp_path / "expert.safetensors", tmp_path / "other.safetensors"
    state = {"a": torch.ones(4), "b": torch.ones(4)}
    save_file(state, path)
    opened = open_weights(path)
    assert torch.equal(opened["a"], state["a"]) and torch.equal(opened["b"], state["b"])
    save_file({name: tensor + 1 for name, tensor in state.items()}, other)
    other.replace(path)
    with pytest.raises(AdamergeError, match="another file has taken its place"):
        opened["a"]
