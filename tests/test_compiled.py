"""compile=true: the same merge, the same files. The backend here needs no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from adamerge._base.errors import AdamergeError
from adamerge.cli import main
from adamerge.learn import blocks
from adamerge.learn.objectives import Entropy
from tests import golden_data as golden
from tests.test_contract import make
from tests.tiny import learned, make_suite

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile warns of torch's own parts


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(blocks, "BACKEND", "aot_eager")


def adapted(name: str, compile: bool) -> Tensor:
    """The learnables after three steps, and the features they give."""
    method = make(name, torch.float32)
    objective = Entropy(golden.heads(torch.float32))
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
    with blocks.compiled(method, compile):
        for step in range(3):
            images, ids = golden.batch(step, torch.float32)
            optimizer.zero_grad()
            objective.weigh(objective(method(images, ids), ids)).backward()
            optimizer.step()
    assert all(m._compiled_call_impl is None for m in method.fold().modules())
    return torch.cat([parameter.detach().flatten() for parameter in method.parameters()])


@pytest.mark.parametrize("name", ["layer_wise", "surgery"])
def test_what_is_learned_is_the_same(name: str) -> None:
    torch._dynamo.utils.counters.clear()
    found = adapted(name, True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "something was compiled"
    torch.testing.assert_close(found, adapted(name, False), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compiled")
    return [
        f"suite={make_suite(folder / 'suite')}",
        f"cache_dir={folder / 'cache'}",
        *("trainer.max_steps=4", "trainer.accelerator=cpu", "batch_size=4", "wandb=off"),
        *("evaluate.baselines=false", "preflight=off", "log_every=1"),
    ]


def keys(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_a_run_is_the_same_run(base: list[str], tmp_path: Path) -> None:
    """λ, checkpoint and export; and resumed with the other setting it goes on."""
    plain, whole, cut = (tmp_path / name for name in ("plain", "whole", "cut"))
    assert main(["train", *base, f"run_dir={plain}"]) == 0
    assert main(["train", *base, "compile=true", f"run_dir={whole}"]) == 0
    words = ["compile=true", "trainer.max_steps=2", f"run_dir={cut}"]
    assert main(["train", *base, *words]) == 0
    assert main(["train", f"resume={cut}", "trainer.max_steps=4"]) == 0
    expected = learned(plain)
    for run in (whole, cut):
        assert list(learned(run)) == list(expected)
        for name, tensor in learned(run).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(learned(cut), learned(whole), rtol=0, atol=1e-6)
    assert {p.name for p in (whole / "merged").iterdir()} == {
        p.name for p in (plain / "merged").iterdir()
    }
    for name in ("open_clip_model.safetensors", "heads.safetensors"):
        assert keys(whole / "merged" / name) == keys(plain / "merged" / name)


@pytest.mark.parametrize(
    "words", [["method=surgery_v2"], ["method=wemoe", "method.batch_gate=true"]]
)
def test_methods_that_look_inside_are_refused(
    words: list[str], base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *base, *words, "compile=true", f"run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert "error: compile=true changes how the tower's blocks run" in error
    assert not (tmp_path / "run").exists()


def test_a_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(blocks, "BACKEND", broken)
    with pytest.raises(AdamergeError, match=r"could not be compiled .*no working.*compile=false"):
        adapted("layer_wise", True)
