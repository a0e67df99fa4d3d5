"""Statistics of unlabeled images: what layers are given, kept in files, and merges made of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adamerge import AdamergeError, TaskVectors, transforms
from adamerge.encoders import Experts
from adamerge.encoders.gradients import Gradients
from adamerge.encoders.statistics import LayerInputs, Moments, gather_inputs, in_files
from tests import golden_data as golden
from tests.test_golden_more_statistics import experts, gradients, images, inputs

F64 = torch.float64


def rows_of(task: str, images: list[Tensor]) -> dict[str, Tensor]:
    """What every linear layer of a task's expert is given, `[rows, in]`, by plain formulas."""
    tower = copy.deepcopy(golden.clip().backbone).double()
    weights = golden.state(f"expert_{task}", F64)
    seen: dict[str, list[Tensor]] = {}
    heads = tower.transformer.resblocks[0].attn.num_heads
    handles = []

    def note(name: str) -> Callable[..., None]:
        return lambda module, given, output: seen.setdefault(name, []).append(output)

    for index, block in enumerate(tower.transformer.resblocks):
        prefix = f"transformer.resblocks.{index}"
        for part, layer in (
            (block.ln_1, "attn.in_proj_weight"), (block.ln_2, "mlp.c_fc.weight"),
            (block.mlp.gelu, "mlp.c_proj.weight"),
        ):  # fmt: skip
            handles.append(part.register_forward_hook(note(f"{prefix}.{layer}")))
    for batch in images:
        torch.func.functional_call(tower, weights, (batch,))
    for handle in handles:
        handle.remove()
    for name in [name for name in seen if "in_proj" in name]:
        weight, place = weights[name], name.removesuffix("in_proj_weight")
        for tokens in seen[name]:
            packed = tokens @ weight.T + weights[f"{place}in_proj_bias"]
            query, key, value = (
                part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1)
            )
            scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
            joined = (scores @ value).transpose(1, 2).flatten(2)
            seen.setdefault(f"{place}out_proj.weight", []).append(joined)
    return {name: torch.cat(parts).flatten(0, 1).detach() for name, parts in seen.items()}


def test_moments_are_of_what_the_experts_layers_are_given() -> None:
    found = inputs(F64)
    for index, task in enumerate(golden.TASKS):
        rows = rows_of(task, images(F64)[task])
        assert set(rows) == set(found)
        for name, given in rows.items():
            assert found[name].count[index] == len(given)
            torch.testing.assert_close(found[name].mean[index], given.mean(0))
            torch.testing.assert_close(found[name].gram[index], given.T @ given / len(given))


def test_esm_is_the_papers_by_plain_formulas() -> None:
    """Principal directions of what the outputs shift by, from all tokens; SVDs of stacks."""
    vectors = golden.task_vectors()
    rows = {task: rows_of(task, images(F64)[task]) for task in golden.TASKS}
    count, merged = len(golden.TASKS), {}
    for name in rows[golden.TASKS[0]]:
        lefts, rights, norms = [], [], []
        for task, tau in zip(golden.TASKS, vectors.deltas[name], strict=True):
            kept = min(len(tau) // count, tau.shape[1])
            _, scales, directions = torch.linalg.svd(rows[task][name] @ tau.T)
            own = (scales.square()[:kept] / scales.square()[:kept].mean()) ** 0.15
            own = own / own.mean()
            lefts.append(directions[:kept].T * own)
            rights.append(own[:, None] * (directions[:kept] @ tau) * tau.norm() ** 2)
            norms.append(tau.norm())
        right = torch.cat(rights) / torch.stack(norms).mean() ** 2
        columns = right.norm(dim=0)
        parts = torch.cat(lefts, 1), right * (columns / columns.mean()) ** 2
        polar = []
        for part in parts:
            first, values, last = torch.linalg.svd(part, full_matrices=False)
            polar.append(first @ last * values.mean())
        merged[name] = 2 * polar[0] @ polar[1]
    found = transforms.esm(vectors, inputs(F64))
    for name, wanted in merged.items():
        alike = [t.norm() for n, t in merged.items() if n.split(".")[3:] == name.split(".")[3:]]
        scale = (wanted.norm() / torch.stack(alike).mean()) ** 2
        torch.testing.assert_close(found.deltas[name].sum(0), scale * wanted)
    for name in set(vectors.names) - set(merged):
        torch.testing.assert_close(found.deltas[name], vectors.deltas[name] / count)


class Countdown(dict[str, list[Tensor]]):
    """Images that count how often a task's are asked for."""

    asked = 0

    def __getitem__(self, task: str) -> list[Tensor]:
        self.asked += 1
        return super().__getitem__(task)


def test_what_is_gathered_is_kept_by_task_and_made_again_where_it_is_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = Countdown(images(torch.float32, 1))
    keys = {task: f"key-{task}" for task in golden.TASKS}
    keep = in_files(tmp_path / "statistics", keys)
    first = gather_inputs(experts(torch.float32), own, keep)
    after, plain = own.asked, gather_inputs(experts(torch.float32), images(torch.float32, 1))
    again = gather_inputs(experts(torch.float32), own, keep)
    assert own.asked == after
    for name, wanted in plain.items():
        for found in (first[name], again[name]):
            assert torch.equal(found.gram, wanted.gram) and torch.equal(found.mean, wanted.mean)
    file = tmp_path / "statistics" / f"{keys[golden.TASKS[0]]}.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    other = gather_inputs(experts(torch.float32), own, keep)
    assert "a checksum of it is wrong" in caplog.text and own.asked > after
    assert all(torch.equal(other[name].gram, plain[name].gram) for name in plain)
    squares = Gradients(experts(torch.float32), golden.heads(torch.float32), own,
                        {"predicted": in_files(tmp_path / "squares", keys)})  # fmt: skip
    kept, asked = squares.squared("predicted"), own.asked
    assert torch.equal(squares.squared("predicted")["proj"], kept["proj"]) and own.asked == asked


def test_any_network_is_merged_by_the_inputs_that_are_seen() -> None:
    """Of a network without blocks, called whole: the least squares of its linear layers."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    start = {name: t.detach() for name, t in network.named_parameters()}
    made = {task: {n: t + torch.randn_like(t) for n, t in start.items()} for task in "ab"}
    vectors = TaskVectors(start, made)
    own = {task: [torch.randn(30, 3, 2, 2).double() for _ in range(2)] for task in "ab"}
    found = gather_inputs(Experts(network, vectors), own)
    assert set(found) == {"1.weight", "3.weight"}
    merged = transforms.regmean(vectors, found, off_diagonal=1.0)
    rows = [torch.cat(batches).flatten(1) for batches in own.values()]
    outputs = [x @ made[task]["1.weight"].T for x, task in zip(rows, "ab", strict=True)]
    wanted = torch.linalg.lstsq(torch.cat(rows), torch.cat(outputs)).solution.T
    torch.testing.assert_close(start["1.weight"] + merged.deltas["1.weight"].sum(0), wanted)
    torch.testing.assert_close(merged.deltas["1.bias"], vectors.deltas["1.bias"] / 2)


def test_images_that_span_little_get_a_ridge_and_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    few = gather_inputs(experts(F64), {t: [b[0][:1]] for t, b in images(F64).items()})
    found = transforms.regmean(golden.task_vectors(), few, off_diagonal=1.0)
    assert "do not span all its columns, so that a ridge of" in caplog.text
    assert all(tau.isfinite().all() for tau in found.deltas.values())


def test_a_layer_that_is_given_nothing_but_0_stays_as_pretrained() -> None:
    shares = transforms.regmean(small(), fake(4, 5), off_diagonal=0.5)
    assert not shares.deltas["b"].any()
    tall = TaskVectors({"b": torch.zeros(5, 3)}, {"t": {"b": torch.ones(5, 3)}})
    assert not transforms.regmean(tall, fake(1, 3)).deltas["b"].any()


def test_a_layer_of_no_task_vector_is_left_as_it_is() -> None:
    """As transforms that drop entries can leave it."""
    vectors = small(2)
    nothing = vectors.with_deltas({"b": torch.zeros(2, 3, 5)})
    assert not transforms.esm(nothing, fake(2, 5)).deltas["b"].any()


def test_a_dead_direction_gets_no_direction_by_chance() -> None:
    """Task vectors of low rank: what nothing spans stays 0."""
    tau = torch.zeros(2, 8, 6).double()
    tau[0, 0, 0] = tau[1, 1, 1] = 1.0
    vectors = TaskVectors(
        {"w": torch.zeros(8, 6).double()}, {"a": {"w": tau[0]}, "b": {"w": tau[1]}}
    )
    grams = torch.eye(6).double().expand(2, 6, 6)
    given = {"w": LayerInputs(grams, torch.zeros(2, 6).double(), torch.ones(2).double())}
    found = transforms.esm(vectors, given).deltas["w"].sum(0)
    assert found.isfinite().all() and (found.abs() > 1e-12).nonzero().tolist() == [[0, 0], [1, 1]]


def test_moments_do_not_depend_on_batches() -> None:
    rows = torch.randn(70, 3, generator=torch.Generator().manual_seed(0)).double()
    whole, parts = Moments(), Moments()
    whole.add(rows)
    for part in rows.split(9):
        parts.add(part.view(-1, 1, 3))
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(whole.gram, rows.T @ rows / 70)
    assert parts.count == 70


def fake(tasks: int, width: int) -> dict[str, LayerInputs]:
    shape = (tasks, width, width)
    return {"b": LayerInputs(torch.zeros(shape), torch.zeros(tasks, width), torch.ones(tasks))}


def small(tasks: int = 4) -> TaskVectors:
    generator = torch.Generator().manual_seed(0)
    made = {f"t{i}": {"b": torch.randn(3, 5, generator=generator)} for i in range(tasks)}
    return TaskVectors({"b": torch.zeros(3, 5)}, made)


def once(task: str) -> dict[str, Any]:
    return {**images(F64, 2), task: iter(images(F64, 2)[task])}


def spoilt(task: str, number: float) -> dict[str, list[Tensor]]:
    found = images(F64, 2)
    found[task][1][0, 0, 0, 0] = number
    return found


REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: transforms.regmean(small(), fake(4, 5), off_diagonal=2),
        r"regmean: off_diagonal is 2, expected a number in \[0, 1\]",
    ),
    (
        lambda: transforms.regmean(small(), fake(3, 5)),
        r"layer 'b' have Gram matrices of shape \[3, 5, 5\]: expected \[4, 5, 5\].*gather them",
    ),
    (lambda: transforms.esm(small(), fake(4, 5)), r"'b' has 3 outputs for 4 tasks.*fewer tasks"),
    (lambda: transforms.esm(small(3), fake(3, 5), power=-1), r"esm: power is -1, expected"),
    (
        lambda: transforms.fisher(small(), gradients(F64), classes="some"),  # type: ignore[arg-type]
        r"fisher: classes is 'some', expected 'all' or 'predicted'",
    ),
    (lambda: transforms.fisher(small(), gradients(F64), floor=0), r"fisher: floor is 0, expected"),
    (
        lambda: transforms.fisher_batch_sum(small(), gradients(F64), floor=-1),
        r"fisher_batch_sum: floor is -1, expected a number in \(0, 1\]",
    ),
    (lambda: gradients(F64).squared("none"), r"kind 'none' are not known: expected one of all"),  # type: ignore[arg-type]
    (
        lambda: gather_inputs(experts(F64), {}),
        r"no images of task 'task_a' to gather statistics from: give batches",
    ),
    (
        lambda: Gradients(experts(F64), golden.heads(), {}).squared("all"),
        r"no images of task 'task_a'",
    ),
    (
        lambda: gather_inputs(experts(F64), once("task_b")),
        r"images of task 'task_b' are an iterator, which ends: give a list or a DataLoader",
    ),
    (
        lambda: Gradients(experts(F64), golden.heads(), once("task_a")).squared("predicted"),
        r"images of task 'task_a' are an iterator",
    ),
    (
        lambda: gather_inputs(experts(F64), spoilt("task_c", torch.nan)),
        r"images of task 'task_c' give NaN or infinite numbers to layer 'transformer\.resblocks\.0",
    ),
    (
        lambda: Gradients(experts(F64), golden.heads(), spoilt("task_a", torch.inf)).squared("all"),
        r"images of task 'task_a' give NaN or infinite numbers to the head",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED, ids=[sentence for _, sentence in REFUSED])
def test_wrong_arguments_get_a_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(AdamergeError, match=sentence):
        call()


@pytest.mark.parametrize("width", [5, 512, 1100])  # one stripe, exactly one, several
def test_a_gram_matrix_is_whole_whatever_its_width(width: int) -> None:
    rows, moments = torch.randn(30, width, dtype=torch.float64), Moments()
    for part in rows.split(10):
        moments.add(part)
    torch.testing.assert_close(moments.gram, rows.T @ rows / 30, rtol=1e-12, atol=1e-12)
    assert torch.equal(moments.gram, moments.gram.T)
