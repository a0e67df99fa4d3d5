"""Mixtures and adapters as whole runs: resuming, seeds and processes change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adamerge.cli import main
from adamerge.export.read import read_heads, read_layout
from tests.processes import train_on_ranks
from tests.tiny import learned, make_suite

METHODS = {
    "regmean": ["method=regmean", "optim.lr=1e-2", "statistics.images=8"],
    "wemoe": ["method=wemoe", "optim.lr=1e-2"],
    "wemoe, batch gates": ["method=wemoe", "optim.lr=1e-2", "method.batch_gate=true"],
    "e_wemoe": ["method=e_wemoe", "optim.lr=1e-2", "objective=infomax"],
    "wemoe, taught": ["method=wemoe", "optim.lr=1e-2", "objective=expert_kl"],
    "emr": ["method=emr", "optim.lr=1e-2"],
    "adarank": ["method=adarank", "optim.lr=1e-2"],
    "adarank_cart": ["method=adarank_cart", "optim.lr=1e-2"],
    "concrete": ["method=concrete", "optim.lr=1e-2", "method.mask_steps=2"],
    "per_task": ["update=per_task", "update.order=shuffled", "optim.lr=1e-2"],
    "sam": ["update=sam", "update.adaptive=true", "objective=expert_labels"],
    "mixed": ["objective=mixed", "objective.steps=3", "optim.lr=1e-2"],
    "symerge": ["method=symerge", "trainer.max_steps=4", "batch_size=4"],
    "pareto": ["method=pareto", "optim.lr=1e-2"],
    "atlas": ["method=atlas"],
    "surgery": ["method=surgery", "optim.lr=1e-2"],
    "surgery, computed": ["method=surgery", "optim.lr=1e-2", "store=false"],
    "surgery_v2": ["method=surgery_v2", "optim.lr=1e-2"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("methods")
    return [
        f"suite={make_suite(folder / 'suite')}",
        f"cache_dir={folder / 'cache'}",
        *("trainer.max_steps=4", "trainer.accelerator=cpu", "batch_size=4", "wandb=off"),
        *("evaluate.baselines=false", "preflight=off", "log_every=1", "eval_every=2"),
    ]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", METHODS)
def test_resuming_changes_nothing(name: str, base: list[str], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *base, *METHODS[name], f"run_dir={whole}"]) == 0
    short = [*METHODS[name], "trainer.max_steps=2"]
    assert main(["train", *base, *short, f"run_dir={cut}"]) == 0
    half = learned(cut)
    assert main(["train", f"resume={cut}", "trainer.max_steps=4"]) == 0
    assert equal(learned(cut), learned(whole)) and not equal(half, learned(whole))
    for rows in ("metrics.csv", "results.json"):
        one, other = ((run / rows).read_text().splitlines() for run in (whole, cut))
        assert len(one) == len(other)


def test_another_seed_draws_other_routers_and_images(base: list[str], tmp_path: Path) -> None:
    states = []
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = [*base, *METHODS["wemoe"], f"seed={seed}", f"run_dir={tmp_path / run}"]
        assert main(["train", *words]) == 0
        states.append(learned(tmp_path / run))
    assert equal(states[0], states[1]) and not equal(states[0], states[2])


@pytest.mark.parametrize("name", ["wemoe", "surgery", "adarank", "concrete", "per_task", "sam"])
def test_two_processes_equal_one_fed_the_same_images(
    name: str, base: list[str], tmp_path: Path
) -> None:
    words = [*base, *METHODS[name]]
    assert main(["train", *words, f"run_dir={tmp_path / 'one'}"]) == 0
    train_on_ranks([*words, "batch_size=2", f"run_dir={tmp_path / 'two'}"], 2, tmp_path)
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-5)


def test_learned_heads_are_exported_and_scored(
    base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *base, *METHODS["symerge"], f"run_dir={run}"]) == 0
    merged = run / "merged"
    own, saved = read_heads(merged, read_layout(merged)), learned(run)
    for row, task in enumerate(own.tasks):
        assert torch.equal(own.weight(task), saved[f"heads.weights.{row}"])
        bias = own.bias(task)
        assert bias is not None and bias.abs().max() > 0
        assert torch.equal(bias, saved[f"heads.biases.{row}"])
    features = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    unit = features / features.norm(dim=1, keepdim=True)
    wanted = unit @ own.weight("dots").T + own.bias("dots")
    torch.testing.assert_close(own.logits(features, "dots"), wanted)
    again = tmp_path / "again"
    assert main(["evaluate", str(run), "--to", str(again)]) == 0
    rows = [json.loads((f / "results.json").read_text())["rows"][-1] for f in (run, again)]
    assert rows[0]["accuracy"] == rows[1]["accuracy"]
    assert main(["train", *base, *METHODS["symerge"], "trainer.devices=2"]) == 2
    assert "heads=learned wants one process: set trainer.devices=1" in capsys.readouterr().err
