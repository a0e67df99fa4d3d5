"""Which objective the label-free signs speak for."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adamerge.cli import main
from adamerge.cli.job import load_job
from adamerge.cli.results import signs_of
from adamerge.config import settings as config
from adamerge.encoders.heads import Heads
from adamerge.report.advice import Signs, advice, signs
from tests.tiny import make_suite

HEADS = Heads({"a": torch.eye(4) * 9, "b": torch.eye(4)[:2] * 9}, {"a": "wxyz", "b": "yn"})


class Says(nn.Module):
    """Encoder whose features are stored in the images' first pixels."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.channel = channel

    def forward(self, images: Tensor, task_ids: Tensor) -> Tensor:
        return torch.eye(4)[images[:, self.channel, 0, 0].long()]


def images(mine: list[int], expert: list[int]) -> Tensor:
    made = torch.zeros(len(mine), 3, 2, 2)
    made[:, 0, 0, 0], made[:, 1, 0, 0] = torch.tensor(mine), torch.tensor(expert)
    return made


def test_signs_are_shares_and_entropies() -> None:
    given = {"a": images([0, 1, 2, 3], [0, 1, 3, 3]), "b": images([0, 0, 0, 0], [0, 1, 0, 1])}
    found = signs(Says(0), Says(1), HEADS, given)
    assert found.agreement == {"a": 0.75, "b": 0.5}
    assert found.spread["a"] == pytest.approx(1.0, abs=1e-3) and found.spread["b"] < 0.01
    assert found.expert_spread["b"] == pytest.approx(1.0, abs=1e-3)
    three = -(0.25 * math.log(0.25) * 2 + 0.5 * math.log(0.5)) / math.log(4)
    assert found.expert_spread["a"] == pytest.approx(three, abs=5e-3)


FINE = Signs({"a": 0.8, "b": 0.5}, {"a": 0.9, "b": 0.7}, {"a": 0.95, "b": 0.95})
LOW = Signs({"a": 0.3, "b": 0.9}, {"a": 0.9, "b": 0.9}, {"a": 1.0, "b": 1.0})
NARROW = Signs({"a": 0.9, "b": 0.9}, {"a": 0.22, "b": 0.95}, {"a": 0.95, "b": 0.95})


def test_nothing_is_said_where_all_is_well() -> None:
    assert advice("entropy", FINE, FINE) == advice("entropy", None, None) == []
    unbalanced = Signs({"a": 1.0}, {"a": 0.3}, {"a": 0.3})  # as the images are
    assert advice("entropy", unbalanced, unbalanced) == []


def test_low_agreement_and_collapse_are_named() -> None:
    (said,) = advice("entropy", LOW, FINE)
    assert "30 % (a)" in said and "objective=expert_kl is the better choice" in said
    (said,) = advice("entropy", FINE, NARROW)
    assert "a 0.22" in said and "b " not in said.split("prediction")[2].split(";")[0]
    assert said.endswith("try objective=infomax or objective=expert_kl")
    assert advice("infomax", FINE, NARROW)[0].endswith("try objective=expert_kl")
    assert len(advice("entropy", LOW, NARROW)) == 2


def test_a_run_reports_its_signs(tmp_path: Path) -> None:
    """The tiny suite's towers are random: merges and experts disagree, and the report says so."""
    suite = make_suite(tmp_path / "suite")
    words = [
        f"suite={suite}",
        f"cache_dir={tmp_path / 'cache'}",
        "trainer.max_steps=2",
        "wandb=off",
    ]
    words += ["trainer.accelerator=cpu", "batch_size=4", "evaluate.oracle=false"]
    taught = [*words, "objective=expert_kl", f"run_dir={tmp_path / 'taught'}"]
    assert main(["train", *taught]) == 0  # by the experts: their word is not doubted
    assert json.loads((tmp_path / "taught" / "results.json").read_text())["advice"] == []
    run = tmp_path / "run"
    assert main(["train", *words, f"run_dir={run}"]) == 0
    results = json.loads((run / "results.json").read_text())
    for part in ("before", "after"):
        found = results["signs"][part]
        assert set(found) == {"agreement", "spread", "expert_spread"}
        assert all(0 <= v <= 1.001 for values in found.values() for v in values.values())
    before = Signs(**results["signs"]["before"])
    assert results["advice"] == advice("entropy", before, Signs(**results["signs"]["after"]))
    text = (run / "results.md").read_text()
    assert all(f"Advice: {sentence}." in text for sentence in results["advice"])
    settings = config.load_run(run)
    job = load_job(settings)
    again = signs_of(job, job.module.method.fold())
    assert dataclasses.asdict(again) == results["signs"]["before"]
    assert main(["train", *words, "preflight=off", f"run_dir={tmp_path / 'off'}"]) == 0
    assert "signs" not in json.loads((tmp_path / "off" / "results.json").read_text())
    csv = [(path / "coefficients.csv").read_bytes() for path in (run, tmp_path / "off")]
    assert csv[0] == csv[1]
