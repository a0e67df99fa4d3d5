"""The objective of true labels: its value, where it is refused, and what is said of its use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from adamerge import AdamergeError, objectives
from adamerge.cli import main
from tests.tiny import learned, make_suite

HEADS = {"a": nn.Identity(), "b": nn.Identity()}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    return [
        f"suite={make_suite(tmp_path / 'suite')}", f"cache_dir={tmp_path / 'cache'}", "wandb=off",
        "trainer.max_steps=2", "trainer.accelerator=cpu", "batch_size=4", "optim.lr=0.05",
        "evaluate.baselines=false", "preflight=off", f"run_dir={tmp_path / 'run'}",
        "objective=labels",
    ]  # fmt: skip


def test_its_value_is_the_mean_cross_entropy_of_every_task() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids, labels = torch.tensor([0, 1, 0, 0, 1]), torch.tensor([3, 0, 1, 1, 2])
    objective = objectives.Labels(HEADS)
    each = -logits.softmax(1)[torch.arange(5), labels].log()
    wanted = torch.stack([each[ids == task].mean() for task in (0, 1)])
    torch.testing.assert_close(objective(logits, ids, targets=labels), wanted)
    with pytest.raises(AdamergeError, match=r"give them as targets \[B\] to step_loss"):
        objective.targets(logits, ids)
    with pytest.raises(AdamergeError, match=r"objective\.first is a Labels"):
        objectives.Mixed(HEADS, None, first=objective)


def test_labels_of_scored_images_are_refused_unless_asked_for(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *words]) == 2
    assert "protocol=paper scores the same images by them: set" in capsys.readouterr().err
    assert main(["train", *words, "objective.scored_images=true"]) == 0
    run = tmp_path / "run"
    said = "adapted, with their labels, on the test images that are scored"
    assert json.loads((run / "results.json").read_text())["labels"] is True
    assert said in (run / "results.md").read_text()
    assert "learned from labels" in (run / "merged" / "README.md").read_text()
    assert main(["evaluate", str(run / "merged"), words[0], *words[1:3]]) == 0
    assert said in capsys.readouterr().out


def test_on_held_out_images_steps_see_the_labels(words: list[str], tmp_path: Path) -> None:
    found = []
    for name, own in (("one", []), ("other", ["objective=entropy"])):
        run = f"run_dir={tmp_path / name}"
        assert main(["train", *words, "protocol=heldout", *own, run]) == 0
        found.append(learned(tmp_path / name)["method.coefficients"])
        assert ("labels" in (tmp_path / name / "results.json").read_text()) == (name == "one")
    assert not torch.equal(*found)


def test_a_task_without_labels_is_named(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(words[0].removeprefix("suite="))
    suite = yaml.safe_load(path.read_text())
    suite["tasks"]["dots"]["data"]["label"] = None
    path.write_text(yaml.safe_dump(suite))
    assert main(["train", *words, "protocol=heldout"]) == 2
    assert "task 'dots' has no labels, which the objective learns from" in capsys.readouterr().err
