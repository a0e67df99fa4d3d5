"""`adamerge auto`: recipes are tried in one folder, and the best is chosen without labels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from adamerge import AdamergeError, load
from adamerge.cli import auto as module
from adamerge.cli.auto import DOUBTFUL, auto
from adamerge.cli.command import main
from adamerge.cli.compare import Cell, Command
from tests.tiny import CLASSES

QUICK = [
    "trainer.max_steps=4", "batch_size=4", "wandb=off", "preflight=off", "evaluate.oracle=false",
    "trainer.accelerator=cpu", "statistics.images=8", "evaluate.baselines=false",
]  # fmt: skip


@pytest.fixture
def words(suite: Path, tmp_path: Path) -> list[str]:
    return [f"suite={suite}", f"cache_dir={tmp_path / 'cache'}", *QUICK]


def here(cells: Sequence[Cell], jobs: int, command: Command) -> None:
    """In this process, as importing takes longer than these runs."""
    for cell in cells:
        if not cell.done:
            assert command(["train", *cell.words, f"run_dir={cell.folder}"]) == 0


def test_the_best_is_exported_and_the_command_goes_on(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "run_all", here)
    monkeypatch.setattr(module, "STATIC", ("esm",))
    monkeypatch.setattr(module, "OBJECTIVES", ("infomax",))
    to = tmp_path / "auto"
    given = ["train", "method=auto", *words, "jobs=2", "steps=6", f"run_dir={to}"]
    status = main(given)
    found = json.loads((to / "auto.json").read_text())
    scores = {name: sum(tasks.values()) for name, tasks in found["agreement"].items()}
    chosen = found["chosen"]
    assert scores[chosen] == max(scores.values()) and set(found["agreement"][chosen]) == {*CLASSES}
    probes = {"esm-expert_kl-probe", "layer_wise-infomax-probe"}
    assert {"esm", "calibrated"} | probes < set(scores) and len(scores) == 5
    steps = [yaml.safe_load((to / name / "config.yaml").read_text()) for name in scores]
    assert sorted(s["trainer"]["max_steps"] for s in steps) == [0, 0, 1, 1, 4]
    weights = "open_clip_model.safetensors"
    assert (to / "merged" / weights).read_bytes() == (to / chosen / "merged" / weights).read_bytes()
    assert load(to / "merged").tasks == tuple(CLASSES)
    assert status == (DOUBTFUL if found["not_good_for"] else 0)
    said = capsys.readouterr().out
    assert f"chosen: {chosen}: the experts agree" in said and said.count("not good:") == status / 3
    before = {path: path.stat().st_mtime_ns for path in to.glob("*/results.json")}
    monkeypatch.setattr(module, "AGREEING", 1.01)
    assert main(given) == DOUBTFUL
    assert before == {path: path.stat().st_mtime_ns for path in to.glob("*/results.json")}
    assert "not good: the experts agree with it on less than half" in capsys.readouterr().out


def test_budgets() -> None:
    of_steps = module._limits({"steps": "550", "minutes": ""}, 3, 1000)
    assert of_steps(1) == ["trainer.max_steps=200"] and of_steps(4) == ["trainer.max_steps=50"]
    timed = module._limits({"steps": "", "minutes": "11"}, 3, 1000)
    assert timed(1) == ["trainer.max_steps=1000", "trainer.max_time={seconds: 240}"]
    assert timed(4)[1] == "trainer.max_time={seconds: 60}"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=wemoe", "method=wemoe: auto chooses that itself"),
        ("steps=0", "steps=0: expected a whole number"),
        ("batch_size=no", "batch_size is"),
        ("also=wemoe,nope", "method=nope"),
    ],
)
def test_mistakes_are_named(words: list[str], tmp_path: Path, word: str, said: str) -> None:
    with pytest.raises(AdamergeError, match=said):
        auto([*words, word, f"to={tmp_path / 'auto'}"], main)
