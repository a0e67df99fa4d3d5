"""Adapters against plain loops, linear folds, absent tasks, and training from stored features."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adamerge
from adamerge.encoders.clip import Normalizer
from adamerge.encoders.experts import Experts, PerTaskEncoder
from adamerge.encoders.tower import Tower, merged_encoder
from adamerge.images.batches import Stream, UnlabeledBatches
from adamerge.learn import objectives
from adamerge.learn.adaptation import Adaptation
from adamerge.learn.features import StoredBatches, content_key, online_steps, stored_features
from adamerge.learn.objectives import ExpertKL, ExpertL1
from adamerge.learn.step import step_loss
from adamerge.methods import Surgery, WEMoE
from tests import golden_data as golden
from tests import reference


def static(dtype: torch.dtype = torch.float64) -> nn.Module:
    return merged_encoder(Tower(golden.clip().backbone), golden.task_vectors(dtype), 0.3)


def experts(dtype: torch.dtype = torch.float64) -> Experts:
    return Experts(golden.clip().backbone, golden.task_vectors(dtype))


def make(dtype: torch.dtype = torch.float64, **settings: Any) -> Surgery:
    """With adapters that do something already."""
    encoder = static(dtype)  # first: what it draws when it is first made is not drawn again
    torch.manual_seed(0)
    method = Surgery(encoder, golden.TASKS, 16, rank=4, **settings)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


@pytest.mark.parametrize("order", ["runs", "mixed", "unequal"])
def test_a_mixed_batch_is_a_loop_over_its_images(order: str) -> None:
    method = make()
    images, ids = golden.batch(0)
    chosen = torch.arange(len(ids))
    if order != "runs":
        chosen = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    images, ids = (t[chosen[: None if order == "mixed" else 11]] for t in (images, ids))
    down, up = (
        [getattr(method.adapters[task][0], name) for task in golden.TASKS]
        for name in ("down", "up")
    )
    expected = reference.adapted(static()(images, ids), down, up, ids.tolist())
    torch.testing.assert_close(method(images, ids), expected)


@pytest.mark.parametrize("positions", ["final", "blocks"])
def test_it_starts_as_the_encoder_itself(positions: Any) -> None:
    images, ids = golden.batch(0)
    method = Surgery(static(), golden.TASKS, 16, positions=positions)
    torch.testing.assert_close(method(images, ids), static()(images, ids))
    shapes = [tuple(a.down.shape) for a in method.adapters["task_a"]]
    assert shapes == [(16, 32), (16, 32), (16, 16)][-len(shapes) :]
    assert len(shapes) == (1 if positions == "final" else 3)


@pytest.mark.parametrize("positions", ["final", "blocks"])
def test_absent_tasks_get_no_gradient_and_adam_leaves_them(positions: Any) -> None:
    method = make(positions=positions)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    images, ids = golden.batch(0)
    for here in (ids < 3, ids == 1):  # momentum for all tasks first
        optimizer.zero_grad()
        before = [p.detach().clone() for p in method.by_task[0].parameters()]
        method(images[here], ids[here]).square().sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in method.by_task[0].parameters())
    assert all(p.grad is not None for p in method.by_task[1].parameters())
    for parameter, kept in zip(method.by_task[0].parameters(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_linear_adapters_fold_into_the_projection() -> None:
    images, ids = golden.batch(0)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    method = make(activation="identity")
    folded = method.fold_linear()
    assert isinstance(folded, PerTaskEncoder)
    torch.testing.assert_close(folded(images[order], ids[order]), method(images[order], ids[order]))
    first, second = (encoder.backbone for encoder in folded.encoders[:2])
    assert first.conv1.weight.data_ptr() == second.conv1.weight.data_ptr()
    on_mixture = WEMoE(golden.clip().backbone, golden.task_vectors()).fold()
    dynamic = Surgery(on_mixture, golden.TASKS, 16, activation="identity")
    nn.init.normal_(dynamic.adapters["task_b"][0].up)
    torch.testing.assert_close(dynamic.fold_linear()(images, ids), dynamic(images, ids))


def test_mistakes_are_named() -> None:
    images, ids = golden.batch(0)
    error = adamerge.AdamergeError
    with pytest.raises(error, match="positions is 'all': expected 'final' or 'blocks'"):
        make(positions="all")
    with pytest.raises(error, match="activation is 'gelu': expected 'relu' or 'identity'"):
        make(activation="gelu")
    for rank in (0, 1.5, True):
        with pytest.raises(error, match=f"Surgery: rank is {rank}, expected a whole number in"):
            Surgery(static(), golden.TASKS, 16, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(error, match=r"only linear adapters of final features"):
        make().fold_linear()
    with pytest.raises(error, match=r"task_ids has the values \[1, 2, 3\]: expected 0 to 2"):
        make()(images, ids + 1)
    with pytest.raises(error, match="features of size 16: expected dim 12"):
        Surgery(static(), golden.TASKS, 12)(images, ids)
    with pytest.raises(error, match=r"no blocks transformer\.resblocks"):
        Surgery(nn.Linear(2, 2), golden.TASKS, 16, positions="blocks")
    with pytest.raises(error, match=r"no projection backbone\.proj"):
        Surgery(nn.Linear(2, 2), golden.TASKS, 16, activation="identity").fold_linear()
    taught = ExpertL1(golden.heads(), experts(), blocks=True)
    with pytest.raises(error, match="after each block, which Surgery with these settings"):
        step_loss(make(), taught, images, ids)
    with pytest.raises(error, match=r"objective\.temperature is 0: expected a finite number > 0"):
        ExpertKL(golden.heads(), experts(), temperature=0)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("micro_batch", [None, 4])
def test_expert_kl(temperature: float, micro_batch: int | None) -> None:
    torch.manual_seed(0)
    method = WEMoE(golden.clip().backbone, golden.task_vectors(), router_layers=0)
    images, ids = golden.batch(0)
    heads = golden.heads()
    objective = ExpertKL(heads, experts(), temperature)
    loss, values, features = step_loss(method, objective, images, ids, micro_batch)
    loss.backward()
    plain = [p.grad.clone() for p in method.parameters() if p.grad is not None]
    method.zero_grad()
    wanted, found = experts()(images, ids), method(images, ids)
    expected = torch.stack(
        [
            reference.expert_kl(
                heads.logits(found[ids == i], t), heads.logits(wanted[ids == i], t), temperature
            )
            for i, t in enumerate(golden.TASKS)
        ]
    )
    expected.sum().backward()
    torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(features, found.detach())
    for parameter, grad in zip(method.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    logits = heads.logits(wanted, "task_a")
    torch.testing.assert_close(
        objectives.expert_kl(logits, logits), torch.zeros((), dtype=torch.float64)
    )


def test_experts_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []
    make_weights = Experts.weights

    def watched(self: Experts, *arguments: Any) -> dict[str, Tensor]:
        assert all(reference() is None for reference in made)
        weights = make_weights(self, *arguments)
        made.append(weakref.ref(weights["proj"]))
        return weights

    monkeypatch.setattr(Experts, "weights", watched)
    images, ids = golden.batch(0)
    teacher = experts()
    assert not list(teacher.parameters()) and not teacher.state_dict()
    assert not teacher(images.requires_grad_(), ids).requires_grad
    assert len(made) == 3


NORMALIZER = Normalizer([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])


@pytest.fixture
def pictures() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        task: generator.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8)
        for task, count in zip(golden.TASKS, (7, 12, 10), strict=True)
    }


def streams(pictures: Mapping[str, np.ndarray], size: int, seed: int = 0) -> UnlabeledBatches:
    own = [Stream(task, np.arange(len(array)), seed, size) for task, array in pictures.items()]
    return UnlabeledBatches(pictures, own, 0)


def store(pictures: Mapping[str, np.ndarray], folder: Path, encoder: Any) -> dict[str, np.ndarray]:
    """Each task's stored outputs of an encoder."""
    found = {}
    for index, (task, images) in enumerate(pictures.items()):

        def encode(batch: Tensor, index: int = index) -> Tensor:
            return encoder(NORMALIZER(batch), torch.full((len(batch),), index))

        found[task] = stored_features(encode, images, folder, task, batch_size=4)
    return found


@pytest.mark.parametrize("objective", [ExpertL1, ExpertKL])
def test_training_from_stored_features_is_training_from_images(
    objective: Any, pictures: dict[str, np.ndarray], tmp_path: Path
) -> None:
    results = []
    for stored in (False, True):
        method = make(torch.float32)
        heads = golden.heads(torch.float32)
        loss = objective(heads, experts(torch.float32))
        adapt = Adaptation(method, loss, heads, NORMALIZER, torch.optim.Adam, log_every=10**6)
        batches: Any = streams(pictures, 5)
        if stored:
            targets = store(pictures, tmp_path / "targets", loss.teacher)
            features = store(pictures, tmp_path / "features", method.frozen_features)
            batches = StoredBatches(batches, targets, features)
        results.append(run(adapt, iter(batches), 6))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def run(adapt: Adaptation, batches: Iterator[Any], steps: int) -> list[Tensor]:
    """Adam's course of the parameters, with the LightningModule's own step."""
    optimizer = torch.optim.Adam(adapt.method.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        adapt.training_step(next(batches), step).backward()
        optimizer.step()
    return [parameter.detach() for parameter in adapt.method.parameters()]


def test_stored_targets_with_images_serve_any_method(
    pictures: dict[str, np.ndarray], tmp_path: Path
) -> None:
    heads, teacher = golden.heads(torch.float32), experts(torch.float32)
    results = []
    for stored in (False, True):
        torch.manual_seed(0)
        method = WEMoE(golden.clip().backbone, golden.task_vectors(torch.float32))
        adapt = Adaptation(
            method, ExpertKL(heads, teacher), heads, NORMALIZER, torch.optim.Adam, log_every=10**6
        )
        batches: Any = streams(pictures, 3)
        if stored:
            batches = StoredBatches(batches, store(pictures, tmp_path, teacher))
        results.append(run(adapt, iter(batches), 3))
    # Steps of Adam are 1e-3 long, and where a gradient is nearly 0 rounding decides their sign.
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_a_store_goes_on_where_it_was_stopped(
    pictures: dict[str, np.ndarray], tmp_path: Path
) -> None:
    images = pictures["task_b"]
    asked: list[int] = []

    def encode(batch: Tensor) -> Tensor:
        asked.append(len(batch))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return batch.flatten(1)[:, :8].float()

    with pytest.raises(KeyboardInterrupt):
        stored_features(encode, images, tmp_path, "key", batch_size=4)
    found = stored_features(encode, images, tmp_path, "key", batch_size=4)
    assert asked == [4, 4, 4, 4]  # the third once more, none of the first two
    np.testing.assert_array_equal(found, images.reshape(12, -1)[:, :8].astype(np.float32))
    again = stored_features(encode, images, tmp_path, "key", batch_size=4)
    assert len(asked) == 4 and isinstance(again, np.memmap) and again.dtype == np.float32


def test_a_store_holds_the_rows_that_are_needed(
    pictures: dict[str, np.ndarray], tmp_path: Path
) -> None:
    images, asked = pictures["task_b"], list[int]()

    def encode(batch: Tensor) -> Tensor:
        asked.append(len(batch))
        return batch.flatten(1)[:, :8].float()

    order = np.random.default_rng(0).permutation(12)
    wanted = images.reshape(12, -1)[:, :8].astype(np.float32)
    for count, new in ((5, [5]), (5, []), (9, [4]), (12, [3])):  # more steps need more images
        asked.clear()
        found = stored_features(encode, images, tmp_path, "key", order=order[:count])
        assert asked == new
        np.testing.assert_array_equal(found[order[:count]], wanted[order[:count]])
    (tmp_path / "key.npy").write_bytes(b"damaged")
    asked.clear()
    np.testing.assert_array_equal(stored_features(encode, images, tmp_path, "key"), wanted)
    assert asked == [12]


def test_a_key_follows_the_weights_and_what_else_decides() -> None:
    weights = {"a": torch.zeros(3), "b": torch.ones(2)}
    key = content_key(weights, "images", 0.5)
    assert key == content_key(dict(reversed(weights.items())), "images", 0.5)
    others = [
        content_key({**weights, "a": torch.tensor([0.0, 0, 1e-30])}, "images", 0.5),
        content_key({**weights, "a": torch.zeros(3, 1)}, "images", 0.5),
        content_key(weights, "other", 0.5),
    ]
    assert len({key, *others}) == 4


def test_bad_features_are_refused(pictures: dict[str, np.ndarray], tmp_path: Path) -> None:
    images, error = pictures["task_a"], adamerge.AdamergeError
    with pytest.raises(error, match=r"NaN or infinite features for image 4 \(3 of a batch\)"):
        stored_features(
            lambda batch: torch.full((len(batch), 2), float("nan" if len(batch) == 3 else 0)),
            *(images, tmp_path, "a", 4),
        )
    with pytest.raises(error, match=r"shape \[4, 3, 16, 16\] for 4 images: expected \[images"):
        stored_features(lambda batch: batch, images, tmp_path, "b", 4)
    with pytest.raises(error, match="no images to compute features of"):
        stored_features(lambda batch: batch, images[:0], tmp_path, "c")
    with pytest.raises(error, match=r"targets of task 'task_a' are stored for 5 images.* are 7"):
        StoredBatches(streams(pictures, 2), {"task_a": np.zeros((5, 2))})


@pytest.mark.parametrize("size", [1, 3])
def test_online_every_image_comes_once(pictures: dict[str, np.ndarray], size: int) -> None:
    rows = {t: np.arange(len(a), dtype=np.float32)[:, None] for t, a in pictures.items()}
    batches = StoredBatches(streams(pictures, size), {}, rows, online=True)
    steps = list(batches)
    for task, array in pictures.items():
        seen = torch.cat([s[task]["features"] for s in steps if task in s]).flatten()
        assert sorted(seen.tolist()) == list(range(len(array)))
        assert seen.tolist() != list(range(len(array)))
    assert len(steps) == online_steps(batches.streams) == -(-12 // size)
    method = Surgery(static(torch.float32), golden.TASKS, 16)
    heads = golden.heads(torch.float32)
    adapt = Adaptation(
        method, objectives.Entropy(heads), heads, NORMALIZER, torch.optim.Adam, log_every=10**6
    )
    last = {t: {"features": part["features"].expand(-1, 16)} for t, part in steps[-1].items()}
    assert set(last) < set(golden.TASKS)  # tasks with fewer images have ended
    adapt.training_step(last, 0).backward()
    ended = golden.TASKS.index("task_a")
    assert all(p.grad is None for p in method.by_task[ended].parameters())
