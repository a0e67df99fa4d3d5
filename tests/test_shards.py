"""Task vectors shared out among processes: the parts, their merge, their gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import adamerge
from adamerge import TaskVectors
from adamerge.learn.step import step_loss
from adamerge.methods import AdaMerging
from adamerge.weights.shards import ShardedTaskVectors, cut
from adamerge.weights.storage import Storage
from tests import golden_data as golden
from tests.processes import METHOD

SHAPES = {
    "a": torch.Size([5, 3]),
    "scalar": torch.Size([]),
    "b": torch.Size([100]),
    "wide": torch.Size([2, 40]),
    "none": torch.Size([0, 4]),
    "c": torch.Size([7, 2, 2]),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 50])
def test_every_row_has_one_process_and_shares_are_even_but_for_a_row(ranks: int) -> None:
    parts = cut(SHAPES, ranks)
    assert len(parts) == ranks
    owners: dict[tuple[str, int], int] = {}
    for rank, own in enumerate(parts):
        assert len({part.name for part in own}) == len(own)
        for part in own:
            for row in range(part.start, part.stop):
                assert owners.setdefault((part.name, row), rank) == rank
    rows = {(n, r) for n, s in SHAPES.items() for r in range(s[0] if s else 1)}
    assert set(owners) == rows
    share = sum(shape.numel() for shape in SHAPES.values()) / ranks
    assert all(sum(part.numel for part in own) <= share + 40 + 1 for own in parts)


def vectors(dtype: str = "float32", file: Path | None = None) -> TaskVectors:
    experts = {t: golden.state(f"expert_{t}", torch.float32) for t in golden.TASKS}
    storage = Storage(dtype, "auto" if file is None else "disk", file)
    return TaskVectors(golden.state("pretrained", torch.float32), experts, storage=storage)


def gradient(own: TaskVectors, images: Tensor, ids: Tensor, low: bool, micro: int | None) -> Tensor:
    """dL/dλ of one step, at coefficients that differ from layer to layer."""
    method = AdaMerging(golden.clip().backbone, own)
    with torch.no_grad():
        method.coefficients += torch.linspace(-0.2, 0.2, method.coefficients.numel()).view(
            method.coefficients.shape
        )
    objective = adamerge.objectives.Entropy(golden.heads(torch.float32))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        step_loss(method, objective, images, ids, micro)[0].backward()
    assert method.coefficients.grad is not None
    return method.coefficients.grad


def work(rank: int, ranks: int, folder: Path, dtype: str, low: bool, micro: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=ranks)
    whole = vectors(dtype, folder / f"tau-{rank}.safetensors")
    sharded = ShardedTaskVectors(whole, rank, ranks)
    assert sharded.whole is whole
    images, ids = (tensor[rank::ranks] for tensor in golden.batch(0, torch.float32))
    grad = gradient(sharded, images, ids, low, micro)
    dist.all_reduce(grad)  # as DDP does
    merged = sharded.combine(torch.full((3,), 0.3))
    if rank == 0:
        sizes = [sharded.nbytes(), sum(layer.nbytes for layer in whole.layers.values())]
        torch.save({"grad": grad / ranks, "merged": merged, "bytes": sizes}, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("ranks", "dtype", "low", "micro"),
    [(3, "float32", False, 2), (2, "int8", True, None)],
)
def test_processes_together_find_the_gradient_of_one(
    ranks: int, dtype: str, low: bool, micro: int | None, tmp_path: Path
) -> None:
    mp.start_processes(work, (ranks, tmp_path, dtype, low, micro), ranks, start_method=METHOD)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    one = vectors(dtype)
    for name, weight in one.combine(torch.full((3,), 0.3)).items():
        assert torch.equal(found["merged"][name], weight), name
    batch = golden.batch(0, torch.float32)
    parts = [
        gradient(one, *(tensor[rank::ranks] for tensor in batch), low, micro)
        for rank in range(ranks)
    ]
    expected = torch.stack(parts).mean(0)
    if low:  # bfloat16 rounds otherwise with other threads than the processes have
        assert torch.nn.functional.cosine_similarity(
            found["grad"].flatten(), expected.flatten(), dim=0
        ) == pytest.approx(1, abs=1e-3)
    else:
        torch.testing.assert_close(found["grad"], expected, rtol=1e-4, atol=1e-6)
    held, everything = found["bytes"]
    assert held < everything / ranks * 1.2 + 4096
