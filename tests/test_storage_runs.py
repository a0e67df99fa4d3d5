"""`task_vectors` as settings of a run: where τ is kept changes nothing, and it is kept once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from adamerge.cli import main
from tests import tiny


@pytest.fixture(scope="module")
def base(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"suite={suite}", f"cache_dir={tmp_path_factory.mktemp('cache')}", "wandb=off",
        "batch_size=4", "log_every=2", "trainer.max_steps=4", "trainer.accelerator=cpu",
        "evaluate.oracle=false", "preflight.images=2",
    ]  # fmt: skip


def train(*words: str) -> int:
    return main(["train", *words])


@pytest.fixture(scope="module")
def plain(base: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    assert train(*base, f"run_dir={run}") == 0
    return run


def test_disk_learns_and_scores_the_same_and_is_read_again(
    base: list[str], plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [*base, "task_vectors.device=disk", f"cache_dir={tmp_path / 'cache'}"]
    with caplog.at_level(logging.INFO, "adamerge"):
        assert train(*words, "trainer.max_steps=2", f"run_dir={tmp_path / 'run'}") == 0
        assert "task vectors are written to" in caplog.text
        caplog.clear()
        (file,) = (tmp_path / "cache" / "task_vectors").iterdir()
        written = file.stat().st_mtime_ns
        resume = [f"resume={tmp_path / 'run'}", "trainer.max_steps=4"]
        assert train(*resume) == 0
    assert "written to" not in caplog.text and file.stat().st_mtime_ns == written
    expected, found = tiny.learned(plain), tiny.learned(tmp_path / "run")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    results = [(run / "results.md").read_text() for run in (plain, tmp_path / "run")]
    assert results[0] == results[1]


def test_a_run_resumes_on_another_place_but_not_on_another_type(
    base: list[str], plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [*base, "task_vectors.dtype=int8", "preflight=off", "evaluate.baselines=false"]
    assert train(*words, "trainer.max_steps=2", f"run_dir={run}") == 0
    assert train(f"resume={run}", "task_vectors.dtype=float32") == 2
    assert "task_vectors.dtype was int8, is absent" in capsys.readouterr().err
    assert train(f"resume={run}", "task_vectors.device=disk", "trainer.max_steps=4") == 0
    whole = tmp_path / "whole"
    assert train(*words, f"run_dir={whole}") == 0
    expected, found = tiny.learned(whole), tiny.learned(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    near = tiny.learned(plain)
    assert any(not torch.equal(near[name], tensor) for name, tensor in expected.items())


def test_transformed_task_vectors_are_stored_after_the_transform(
    base: list[str], tmp_path: Path
) -> None:
    words = [*base, "method=layer_wise_pp", "preflight=off", "evaluate.baselines=false"]
    runs = []
    for place in ("auto", "disk"):
        runs.append(tmp_path / place)
        settings = ["task_vectors.dtype=int8", f"task_vectors.device={place}"]
        assert train(*words, *settings, f"run_dir={runs[-1]}") == 0
    one, two = map(tiny.learned, runs)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_write_leaves_nothing_for_good(base: list[str], tmp_path: Path) -> None:
    words = [*base, "task_vectors.device=disk", f"cache_dir={tmp_path / 'cache'}", "preflight=off"]
    words += ["evaluate.baselines=false", "trainer.max_steps=1"]
    assert train(*words, f"run_dir={tmp_path / 'a'}") == 0
    (file,) = (tmp_path / "cache" / "task_vectors").iterdir()
    file.rename(file.with_name(f"{file.name}.12345678.tmp"))  # as if killed before the end
    assert train(*words, f"run_dir={tmp_path / 'b'}") == 0
    assert list(file.parent.iterdir()) == [file]


def test_a_teacher_of_another_type_is_asked_anew(base: list[str], tmp_path: Path) -> None:
    words = [*base, "objective=expert_kl", "preflight=off", "evaluate.baselines=false"]
    shared, fresh = f"cache_dir={tmp_path / 'shared'}", f"cache_dir={tmp_path / 'fresh'}"
    small = ["task_vectors.dtype=int8", shared]
    assert train(*words, *small, f"run_dir={tmp_path / 'int8'}") == 0
    assert train(*words, shared, f"run_dir={tmp_path / 'after'}") == 0
    assert train(*words, fresh, f"run_dir={tmp_path / 'alone'}") == 0
    after, alone = tiny.learned(tmp_path / "after"), tiny.learned(tmp_path / "alone")
    assert all(torch.equal(after[name], alone[name]) for name in alone)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task_vectors.dtype=int4"], "task_vectors.dtype is 'int4': expected float32 or bfloat16"),
        (["task_vectors.device=cpu"], "task_vectors.device is 'cpu': expected auto or cuda or"),
        (["task_vectors.dtypes=int8"], "task_vectors.dtypes is unknown"),
        (["task_vectors.shard=3"], "task_vectors.shard is 3: expected bool"),
        (["task_vectors.device=cuda"], "task_vectors.device is cuda, but this run computes on the"),
        (["method=wemoe", "task_vectors.dtype=int8"], "WEMoE holds task vectors of its own making"),
        (["method=surgery", "task_vectors.shard=true"], "Surgery does not learn merging coeff"),
    ],
)
def test_what_does_not_go_is_said_before_anything_is_loaded(
    base: list[str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*base, *words) == 2
    assert message in capsys.readouterr().err


def test_surgery_takes_a_base_merged_from_any_storage(base: list[str], tmp_path: Path) -> None:
    words = [*base, "method=surgery", "preflight=off", "evaluate.baselines=false"]
    for place in ("auto", "disk"):
        assert train(*words, f"task_vectors.device={place}", f"run_dir={tmp_path / place}") == 0
    one, two = (tiny.learned(tmp_path / place) for place in ("auto", "disk"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("method", ["adarank", "concrete"])
def test_methods_that_stream_learn_the_same_from_any_place(
    method: str, base: list[str], tmp_path: Path
) -> None:
    words = [*base, f"method={method}", "preflight=off", "evaluate.baselines=false"]
    words += ["trainer.max_steps=2", "task_vectors.dtype=int8"]
    for place in ("auto", "disk"):
        assert train(*words, f"task_vectors.device={place}", f"run_dir={tmp_path / place}") == 0
    one, two = (tiny.learned(tmp_path / place) for place in ("auto", "disk"))
    assert all(torch.equal(one[name], two[name]) for name in one)
