"""Runs are measured without labels, and the best state is kept, restored and exported."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adamerge.cli import main
from adamerge.cli.job import Job, load_job
from adamerge.cli.results import watched
from adamerge.config import settings as config
from adamerge.learn.resume import CHECKPOINT, read_checkpoint
from adamerge.report import signals
from adamerge.report.keep import best_step, interval, never_better, outcome, sentence
from adamerge.report.signals import mean
from tests.processes import train_on_ranks
from tests.tiny import CLASSES, learned

Train = Callable[..., Path]
# Learning from the experts at so high a rate that the best state is not the last.
HARMS = ["keep=best", "objective=expert_kl", "optim.lr=0.05", "eval_every=1"]


@pytest.fixture(scope="module")
def words(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "log_every=2", "trainer.max_steps=6", "trainer.accelerator=cpu",
        "evaluate.baselines=false", "preflight=off",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best state is neither its first nor its last."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *words, *HARMS, f"run_dir={run}"]) == 0
    return run


def read(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def exported(run: Path) -> list[str]:
    with (run / "coefficients.csv").open(newline="") as file:
        return [row["coefficient"] for row in csv.DictReader(file)]


def state_at(words: list[str], step: int, folder: Path) -> list[float]:
    """λ after so many steps, of a run that ends there."""
    assert (
        main(["train", *words, "keep=last", f"trainer.max_steps={step}", f"run_dir={folder}"]) == 0
    )
    return [value for row in learned(folder)["method.coefficients"].tolist() for value in row]


def test_the_best_state_is_exported_exactly(whole: Path, words: list[str], tmp_path: Path) -> None:
    run = whole
    results, record = read(run), read_checkpoint(run / CHECKPOINT)["kept"]
    values = [mean(found["agreement"]) for found in results["course"]]
    kept = results["kept"]
    assert [found["step"] for found in results["course"]] == list(range(7))
    assert kept["value"] == max(values) > values[-1] and values[kept["step"]] == max(values)
    assert kept["step"] == record["step"] < 6, "else the last is the best, and nothing is shown"
    assert max(values) > values[0], "else the start is the best"
    wanted = state_at([*words, *HARMS], kept["step"], tmp_path / "short")
    assert list(map(float, exported(run))) == wanted != state_of_last(run)
    assert f"Kept: {sentence(kept)}." in (run / "results.md").read_text()
    assert results["signals"]["after"] == {
        k: v for k, v in results["course"][kept["step"]].items() if k != "step"
    }
    job = load_job(config.load_run(run))
    job.resume(run)
    job.module.load_state_dict(record["state"])
    assert measured(job) == results["signals"]["after"], "of what is exported"
    one = (run / "merged" / "open_clip_model.safetensors").read_bytes()
    for keep, same in (("best", True), ("last", False)):
        assert main(["export", str(run), f"keep={keep}", "--to", str(tmp_path / keep)]) == 0
        again = (tmp_path / keep / "open_clip_model.safetensors").read_bytes()
        assert (again == one) is same


def state_of_last(run: Path) -> list[float]:
    return [value for row in learned(run)["method.coefficients"].tolist() for value in row]


def measured(job: Job) -> signals.ByTask:
    return watched(job).of(job.module.method.eval().fold(), job.heads())


def test_a_resumed_run_keeps_the_same(whole: Path, train: Train) -> None:
    cut = train("cut", *HARMS, "trainer.max_steps=4")
    assert main(["train", f"resume={cut}", "trainer.max_steps=6"]) == 0
    one, two = (read_checkpoint(run / CHECKPOINT)["kept"] for run in (whole, cut))
    assert one["step"] == two["step"] and one["signals"] == two["signals"]
    for name, tensor in one["state"].items():
        assert torch.equal(two["state"][name], tensor)
    assert exported(whole) == exported(cut)
    assert read(whole)["course"] == read(cut)["course"]
    before = exported(cut)
    assert main(["train", f"resume={cut}"]) == 0, "of a run that is finished"
    assert exported(cut) == before and read(whole)["kept"] == read(cut)["kept"]


def test_two_processes_keep_the_same(whole: Path, words: list[str], tmp_path: Path) -> None:
    one, two = whole, tmp_path / "two"
    train_on_ranks([*words, *HARMS, "batch_size=2", f"run_dir={two}"], 2, tmp_path)
    assert read(one)["kept"]["step"] == read(two)["kept"]["step"] < 6
    assert list(map(float, exported(two))) == pytest.approx(
        list(map(float, exported(one))), abs=1e-5
    )


def test_a_start_that_is_never_beaten_is_exported_and_said(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    def worse(own: Any, experts: Any = None, views: Any = (), calls: list[int] = []) -> Any:  # noqa: B006
        calls.append(1)
        return {
            "agreement": {t: 1 / len(calls) for t in CLASSES},
            "marginal_entropy": dict.fromkeys(CLASSES, 1),
        }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "by_task", worse)
        run = train("run", "keep=best", "optim.lr=0.1", "patience=2", "eval_every=1")
    assert set(map(float, exported(run))) == {float(torch.tensor(0.3))}
    assert read(run)["kept"]["step"] == 0 and read(run)["kept"]["last_step"] == 2, "patience"
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("the merge never beat its start") and last.endswith("step 0 is exported")
    assert read_checkpoint(run / CHECKPOINT)["global_step"] == 2
    assert main(["train", f"resume={run}"]) == 0, "its patience stays over"
    assert read_checkpoint(run / CHECKPOINT)["global_step"] == 2


def test_signals_are_measured_whatever_is_kept(train: Train) -> None:
    run = train("run", "eval_every=4")
    results = read(run)
    names = {"agreement", "divergence", "consistency", "top_share"}
    names |= {"entropy", "marginal_entropy", "mutual_information"}
    assert [found["step"] for found in results["course"]] == [0, 4, 6]
    assert all(set(found) == {"step", *names} for found in results["course"])
    assert all(set(by) == set(CLASSES) for by in results["signals"]["after"].values())
    assert results["kept"]["state"] == "last" and results["kept"]["step"] == 6
    with (run / "metrics.csv").open(newline="") as file:
        rows = {int(row["step"]): row["signals/agreement/dots"] for row in csv.DictReader(file)}
    course = [str(found["agreement"]["dots"]) for found in results["course"]]
    assert [rows[step] for step in (0, 3, 5)] == course
    assert "state" not in read_checkpoint(run / CHECKPOINT)["kept"]


def test_a_run_of_before_is_resumed_as_it_was(whole: Path, tmp_path: Path) -> None:
    run, lines = tmp_path, (whole / "config.yaml").read_text().splitlines()
    (run / "config.yaml").write_text(
        "\n".join(line for line in lines if not line.startswith(("keep:", "patience:")))
    )
    assert config.load_run(run)["keep"] == "last" and config.load_run(run)["patience"] is None


def seen(*values: float) -> dict[str, Any]:
    return {"signals": {10 * n: {"agreement": {"a": v}} for n, v in enumerate(values)}}


def test_of_equal_states_the_later_is_kept() -> None:
    assert best_step(seen(0.5, 0.7, 0.7, 0.6)["signals"]) == 20
    kept = outcome({**seen(0.5, 0.7, 0.6), "step": 10}, best=True)
    assert (kept["step"], kept["value"], kept["last"]) == (10, 0.7, 0.6) and not never_better(kept)
    assert "step 10 of 20" in sentence(kept) and "70.0 %" in sentence(kept)
    last = outcome(seen(0.5, 0.4), best=False)
    assert last["step"] == 10 and never_better(last).endswith("keep=best exports the best state")
    assert outcome({}, best=True) == {} == outcome(seen(0.5), best=True)


def test_measuring_costs_little() -> None:
    """A twentieth of the images encoded, at most, and ten times."""
    for steps, size in ((1000, 16), (300, 16), (50, 1), (10_000, 128)):
        times = steps // interval(steps, size)
        assert times <= 10 and times * 128 * 20 <= steps * 3 * size
