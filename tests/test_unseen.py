"""Unseen tasks: scored beside the merged ones, and out of reach of everything that learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from adamerge.cli import main
from adamerge.cli.job import load_job
from adamerge.config import build
from adamerge.config import settings as config
from adamerge.report.evaluation import Row, Scorer
from adamerge.report.result_files import as_json, as_markdown
from tests import tiny

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def halves(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny suite with `stripes` alone, and the same with `dots` as an unseen task."""
    whole = yaml.safe_load(suite.read_text())
    alone = {**whole, "tasks": {"stripes": whole["tasks"]["stripes"]}}
    dots = {key: value for key, value in whole["tasks"]["dots"].items() if key != "expert"}
    paths = suite.parent / "alone.yaml", suite.parent / "unseen.yaml"
    for path, content in zip(paths, (alone, {**alone, "unseen": {"dots": dots}}), strict=True):
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    return paths


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [
        f"cache_dir={cache}", "wandb=off", "batch_size=4", "log_every=2", "trainer.max_steps=4",
        "trainer.accelerator=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(
    halves: tuple[Path, Path], words: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A run without the unseen task, and one with it."""
    folder = tmp_path_factory.mktemp("runs")
    for path in halves:
        run = f"run_dir={folder / path.stem}"
        assert main(["train", f"suite={path}", *words, "evaluate.oracle=true", run]) == 0
    return folder / "alone", folder / "unseen"


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def test_an_unseen_task_changes_nothing_that_is_learned(runs: tuple[Path, Path]) -> None:
    alone, unseen = runs
    for name in ("coefficients.csv", "merged/heads.safetensors", "merged/coefficients.csv"):
        assert (unseen / name).read_bytes() == (alone / name).read_bytes(), name
    saved = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["adamerge"]["fingerprint"]
        for run in runs
    ]
    saved[1]["suite.name"] = saved[0]["suite.name"]
    assert saved[0] == saved[1]
    first, second = results(alone)["rows"], results(unseen)["rows"]
    for one, other in zip(first, second, strict=True):
        rest = {k: v for k, v in other.items() if k not in ("unseen", "average_unseen")}
        assert rest == {**one, "name": other["name"]} and "unseen" not in one


def test_what_learns_is_never_given_an_unseen_task(
    halves: tuple[Path, Path], words: list[str]
) -> None:
    settings = config.load([f"suite={halves[1]}", *words])
    build.check(settings)
    job = load_job(settings)
    assert job.unseen is not None and job.unseen[0].tasks == ("dots",)
    assert job.suite.heads.tasks == job.module.heads.tasks == ("stripes",)
    assert job.suite.task_vectors.tasks == ("stripes",)
    assert set(next(iter(job.data.batches()))) == set(job.data.tasks) == {"stripes"}
    held = [module for module in job.module.modules() if isinstance(module, type(job.unseen[0]))]
    assert all(heads.tasks == ("stripes",) for heads in held) and held


def test_unseen_tasks_have_rows_of_their_own(
    runs: tuple[Path, Path], suite: Path, words: list[str], tmp_path: Path
) -> None:
    """Their accuracies are those of a suite where `dots` counts as any other task."""
    rows = {row["name"]: row for row in results(runs[1])["rows"]}
    assert list(rows) == [
        "pretrained", "expert", "weight_average", "task_arithmetic", "task_arithmetic_best",
        "layer_wise",
    ]  # fmt: skip
    assert rows["expert"]["unseen"] == {} and rows["expert"]["average_unseen"] is None
    for name in set(rows) - {"expert"}:
        assert rows[name]["average_unseen"] == rows[name]["unseen"]["dots"]
    merged = runs[1] / "merged"
    assert main(["evaluate", str(merged), f"suite={suite}", *words, "--to", str(tmp_path)]) == 0
    other = {row["name"]: row for row in results(tmp_path)["rows"]}
    for name, same in (("pretrained", "pretrained"), ("layer_wise", "merged")):
        assert rows[name]["unseen"]["dots"] == other[same]["accuracy"]["dots"]
    tables = (runs[1] / "results.md").read_text().split("\n\n")
    assert tables[2].startswith("Unseen tasks: neither merged nor adapted on")
    assert [cell.strip() for cell in tables[3].splitlines()[0].split("|")[2:-1]] == [
        "dots", "average"
    ]  # fmt: skip
    (expert,) = [line for line in tables[3].splitlines() if "each on its own" in line]
    assert [cell.strip() for cell in expert.split("|")[2:-1]] == ["–", "–"]
    record = json.loads((merged / "merge.json").read_text())
    assert record["unseen_images"]["dots"]["count"] == 40 and "dots" not in record["images"]


def test_evaluate_scores_unseen_tasks(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(["evaluate", str(runs[1]), "--to", str(tmp_path)]) == 0
    assert results(tmp_path)["rows"][-1]["unseen"] == results(runs[1])["rows"][-1]["unseen"]
    assert "Unseen tasks" in (tmp_path / "results.md").read_text()


def test_all_images_of_an_unseen_task_are_scored_under_heldout(
    halves: tuple[Path, Path], words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ["protocol=heldout", "evaluate.baselines=false", f"run_dir={run}"]
    assert main(["train", f"suite={halves[1]}", *words, *more]) == 0
    (row,) = results(run)["rows"]
    assert row["unseen"]["dots"] * 40 == pytest.approx(round(row["unseen"]["dots"] * 40))
    assert set(row["accuracy_adapted"]) == {"stripes"}
    record = json.loads((run / "merged" / "merge.json").read_text())
    assert record["unseen_images"]["dots"]["count"] == 40


def test_a_broken_unseen_task_is_named_before_training(
    halves: tuple[Path, Path], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    more = [f"suite.unseen.dots.data.path={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", f"suite={halves[1]}", *words, *more]) == 2
    assert "suite.unseen.dots.data.path: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_scorer_says_of_an_unseen_image_that_its_task_is_none(
    halves: tuple[Path, Path], words: list[str]
) -> None:
    class Recorder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def forward(self, images: Tensor, task_ids: Tensor) -> Tensor:
            self.seen += task_ids.unique().tolist()
            return torch.ones(len(images), tiny.MODEL["embed_dim"])  # type: ignore[call-overload]

    settings = config.load([f"suite={halves[1]}", *words])
    scorer = load_job(settings).scorer(torch.device("cpu"))
    encoder = Recorder()
    row = scorer.row("x", encoder)
    assert encoder.seen == [0, -1]
    assert set(row.accuracy) == {"stripes"} and set(row.unseen or {}) == {"dots"}
    assert isinstance(scorer.unseen, Scorer) and scorer.measures


def test_tables_where_only_one_kind_of_task_has_labels() -> None:
    def table(accuracy: dict[str, float], unseen: dict[str, float]) -> str:
        row = Row("mine", accuracy, unseen=unseen)
        return as_markdown(as_json([row], "s", "m", "paper", 0))

    assert "| **mine** | 50.0 |" in table({}, {"a": 0.5}) and "normalized" not in table(
        {}, {"a": 0.5}
    )
    assert "Unseen" not in table({"a": 0.5}, {}) and "no task has labels" in table({}, {})
