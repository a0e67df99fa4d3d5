"""recompute=true: the same numbers, with the activations of one block in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamerge.cli import main
from adamerge.encoders.tower import Tower, resblocks
from adamerge.learn.blocks import recomputing
from adamerge.learn.objectives import Entropy
from adamerge.learn.step import step_loss
from tests import golden_data as golden
from tests.test_contract import make
from tests.tiny import learned


def gradients(name: str, wanted: bool, low: bool, micro: int | None) -> tuple[list[Tensor], int]:
    """The gradients of a step, and how many numbers autograd kept for it."""
    method = make(name, torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    images, ids = golden.batch(0, torch.float32)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    objective = Entropy(golden.heads(torch.float32))
    with recomputing(method, wanted), torch.autocast("cpu", torch.bfloat16, enabled=low), hooks:
        loss = step_loss(method, objective, images, ids, micro)[0]
        loss.backward()
    return [p.grad for p in method.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("name", ["layer_wise", "task_wise", "wemoe", "surgery"])
@pytest.mark.parametrize(("low", "micro"), [(False, None), (True, None), (False, 4)])
def test_gradients_are_the_same_to_the_bit(name: str, low: bool, micro: int | None) -> None:
    plain, _ = gradients(name, False, low, micro)
    again, _ = gradients(name, True, low, micro)
    assert len(plain) == len(again) > 0
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_less_is_kept_and_the_blocks_are_plain_afterwards() -> None:
    _, everything = gradients("layer_wise", False, False, None)
    _, inputs = gradients("layer_wise", True, False, None)
    assert inputs < everything / 2
    method = make("layer_wise", torch.float32)
    (tower,) = (value for value in vars(method).values() if isinstance(value, Tower))
    blocks = resblocks(tower.skeleton)
    with recomputing(method):
        with tower.around():
            assert all("forward" in vars(block) for block in blocks)
        folded = method.fold()
    with tower.around():
        assert all("forward" not in vars(block) for block in blocks)
    assert all("forward" not in vars(module) for module in folded.modules())


@pytest.fixture(scope="module")
def base(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "trainer.max_steps=4", "trainer.accelerator=cpu", "preflight.images=2",
        "evaluate.baselines=false", "eval_every=2",
    ]  # fmt: skip


def test_a_run_learns_the_same_to_the_bit(base: list[str], tmp_path: Path) -> None:
    runs = [tmp_path / "plain", tmp_path / "again"]
    for run, words in zip(runs, ([], ["recompute=true"]), strict=True):
        assert main(["train", *base, *words, f"run_dir={run}"]) == 0
    one, two = map(learned, runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method=surgery_v2"], "recompute=true changes how the tower's blocks run, and Surg"),
        (["method=wemoe", "method.batch_gate=true"], "recompute=true changes how the tower's"),
        (["compile=true"], "compile and recompute do not go together"),
    ],
)
def test_what_does_not_go_is_refused(
    words: list[str], message: str, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *base, *words, "recompute=true"]) == 2
    assert message in capsys.readouterr().err
