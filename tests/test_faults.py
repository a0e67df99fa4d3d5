"""What a run survives: signals, kills, full disks, damaged files of its own."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adamerge import AdamergeError
from adamerge._base import files
from adamerge.cli import main, results, train
from adamerge.encoders import heads
from adamerge.learn import features, resume
from adamerge.learn.callbacks import Progress
from adamerge.learn.data import TaskData
from adamerge.learn.features import stored_features
from adamerge.learn.resume import CHECKPOINT, CheckpointFiles, read_checkpoint
from adamerge.report.keep import Keep
from adamerge.report.result_files import read_results
from adamerge.report.tracking import CsvMetrics, _known_id, read_metrics
from tests.tiny import learned

ROOT = Path(__file__).parent.parent
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="session")
def words(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What every run here shares: the shortest there is."""
    cache = tmp_path_factory.mktemp("cache")
    return [
        "train", f"suite={suite}", f"cache_dir={cache}", "wandb=off", "batch_size=4",
        "trainer.max_steps=2", "trainer.accelerator=cpu", "evaluate.baselines=false",
        "preflight=off", "checkpoint_every=1",
    ]  # fmt: skip


def terminate(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)


def test_sigterm_ends_a_command(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(results, "export_run", terminate)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["export", "run"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("at", ["load_job", "finish"])
def test_sigterm_before_and_after_training(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    caplog: pytest.LogCaptureFixture,
    at: str,
) -> None:
    """Lightning has a handler of its own while it trains, which must not stay."""
    run = tmp_path / "a::b" / "run"  # no URL
    with monkeypatch.context() as patch:
        patch.setattr(train if at == "load_job" else results, at, terminate)
        assert main([*words, f"run_dir={run}"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("terminated\n")
    assert run.exists() == (at == "finish")
    if at == "finish":
        assert f"what was learned is kept in {run / CHECKPOINT}" in caplog.text
        assert main(["export", str(run)]) == 0
        assert main(["train", f"resume={run}"]) == 0
        assert (run / "merged" / "merge.json").is_file() and (run / "results.json").is_file()


@pytest.mark.parametrize("at", ["Keep.on_train_start", "TaskData.train_dataloader"])
def test_sigterm_as_training_begins(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Lightning, which listens from somewhat before the first step, would raise an error of its
    own, and nothing would be saved."""
    owner: Any = Keep if at.startswith("Keep") else TaskData
    name, run = at.partition(".")[2], tmp_path / "run"
    begin = getattr(owner, name)

    def signalled(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return begin(*given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        assert main([*words, f"run_dir={run}"]) == 128 + signal.SIGTERM
    assert read_checkpoint(run / CHECKPOINT)["global_step"] == 1
    assert main(["train", f"resume={run}"]) == 0


def test_slurm_with_a_folder_named_like_a_url(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint in what Lightning would take for the folder; then SLURM's signal."""
    named = {"JOB_NAME": "merge", "JOB_ID": 7, "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in named.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "hpc_ckpt_3.ckpt").write_text("another run's")
    run, end = tmp_path / "a::b" / "run", Progress.on_train_batch_end

    def signalled(self: Progress, *args: Any) -> None:
        end(self, *args)
        os.kill(os.getpid(), signal.SIGUSR1)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_train_batch_end", signalled)
        assert main([*words, f"run_dir={run}"]) == 128 + signal.SIGUSR1
    assert read_checkpoint(run / CHECKPOINT)["global_step"] == 1
    assert main(["train", f"resume={run}"]) == 0
    assert read_checkpoint(run / CHECKPOINT)["global_step"] == 2
    assert [path.name for path in tmp_path.rglob("*hpc*")] == ["hpc_ckpt_3.ckpt"]


def test_a_run_that_ended_before_its_first_checkpoint_starts_again(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run = tmp_path / "run"
    words = [*words, f"run_dir={run}"]
    left = ["config.yaml", "metrics.csv", "wandb_id.txt", files.LOCK]
    left += ["config.yaml.01234567.tmp", "wandb/offline-run/run.wandb"]
    for name in left:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("x")
    assert main(words) == 0
    assert not list(run.glob("*.tmp"))
    assert main(words) == 2
    assert f"resume={run}" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    for name in ("metrics.csv", "config.yaml", "notes.txt"):
        (tmp_path / "mine" / name).write_text("a user's")
        if name != "config.yaml":
            assert main([*words, f"run_dir={tmp_path / 'mine'}"]) == 2
            assert "already holds files" in capsys.readouterr().err
            assert (tmp_path / "mine" / name).read_text() == "a user's"


def test_a_run_folder_in_use_is_refused(words: list[str], tmp_path: Path, capsys: Capture) -> None:
    code = f"""
import time; from pathlib import Path; from adamerge._base.files import alone_in
with alone_in(Path({str(tmp_path / "run")!r})): print("in", flush=True); time.sleep(60)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "in\n"
        assert main([*words, f"run_dir={tmp_path / 'run'}"]) == 2
        assert f"in use by process {other.pid} on" in capsys.readouterr().err
        other.kill()


@pytest.fixture(scope="session")
def checkpoint(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert main([*words, f"run_dir={run}"]) == 0
    return run / CHECKPOINT


def test_a_flipped_bit_in_a_checkpoint_changes_nothing_or_is_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    content, wanted = bytearray(checkpoint.read_bytes()), learned(checkpoint.parents[1])
    chance, refused = random.Random(0), 0
    for _ in range(150):
        place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
        content[place] ^= bit
        (tmp_path / "last.ckpt").write_bytes(content)
        content[place] ^= bit
        try:
            found = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
        except AdamergeError as error:
            assert "is not a readable checkpoint" in str(error)
            refused += 1
        else:
            assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert refused > 50


@pytest.mark.parametrize("saved", [[1], {"state_dict": {}}, {"adamerge": {}, "state_dict": {}}])
def test_another_file_is_no_checkpoint(tmp_path: Path, saved: Any) -> None:
    torch.save(saved, tmp_path / "last.ckpt")
    with pytest.raises(AdamergeError, match="not a checkpoint of adamerge"):
        read_checkpoint(tmp_path / "last.ckpt")


def test_checkpoints_need_no_other_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/dev/full")
    path = tmp_path / "memory::a" / "last.ckpt"
    path.parent.mkdir()
    written = {"adamerge": {}, "state_dict": {"a": torch.ones(3)}, "global_step": 1}
    CheckpointFiles().save_checkpoint(written, str(path))
    found = CheckpointFiles().load_checkpoint(str(path), weights_only=False)
    assert torch.equal(found["state_dict"]["a"], torch.ones(3))
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*last\.ckpt"):
        CheckpointFiles().save_checkpoint(written | {"global_step": 2}, path)
    assert read_checkpoint(path)["global_step"] == 1


def logged(path: Path) -> list[tuple[int, float]]:
    return [(int(row["step"]), float(row["loss"])) for row in read_metrics(path)]


def test_metrics_are_added_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = CsvMetrics(path)
    inodes = set()
    for step in range(1, 20, 2):
        metrics.log_metrics({"loss": 1 / step, "epoch": 0}, step)
        inodes.add(path.stat().st_ino)
    assert len(inodes) == 1 and logged(path) == [(step, 1 / step) for step in range(1, 20, 2)]
    metrics.log_metrics({"accuracy": 0.5}, 19)
    metrics.log_metrics({"loss": 2.0}, 20)
    assert read_metrics(path)[-2:] == [
        {"step": "19", "loss": repr(1 / 19), "accuracy": "0.5"},
        {"step": "20", "loss": "2.0"},
    ]
    with path.open("a") as file:
        file.write("21,0.1")  # torn: perhaps 0.123
    again = CsvMetrics(path, 22)
    again.log_metrics({"loss": 3.0}, 22)
    again.log_metrics({"loss": 4.0}, 24)
    assert [step for step, _ in logged(path)] == [*range(1, 20, 2), 20, 22, 24]
    assert logged(path)[-1] == (24, 4.0)


@pytest.mark.parametrize(
    "content", [b"\x00\xff\n", b"a,b\n1,2\n", b"step,loss\nx,1\n", b"step\n1,2,3\n", b'step\n"1\n']
)
def test_damaged_metrics_are_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    with pytest.raises(AdamergeError, match=r"metrics\.csv is damaged \(.*move the file away"):
        CsvMetrics(tmp_path / "metrics.csv", 5)
    CsvMetrics(tmp_path / "metrics.csv")  # of a run that starts


RESULTS = [
    "[]",
    "{",
    "{}",
    '{"rows": 5}',
    '{"rows": [1]}',
    "[" * 99_999,
    '{"rows": [{"name": []}]}',
]


@pytest.mark.parametrize("content", RESULTS)
def test_results_of_another_shape_are_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(AdamergeError, match=r"results\.json is not results of a run \(.*delete it"):
        read_results(tmp_path / "results.json", {})


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a b", b"x" * 100])
def test_a_damaged_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "id").write_bytes(content)
    assert _known_id(tmp_path / "id") is None


def encoded(asked: list[int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def encode(batch: torch.Tensor) -> torch.Tensor:
        asked.append(len(batch))
        return batch.flatten(1)[:, :5].float() / 7

    return encode


def test_stored_features_that_are_damaged_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 4, 4), dtype=np.uint8)
    order, asked = np.random.default_rng(1).permutation(30)[:20], list[int]()
    wanted = np.array(stored_features(encoded([]), images, tmp_path, "key", order=order))
    path, chance = tmp_path / "key.npy", random.Random(0)
    for _ in range(60):
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        found = stored_features(encoded(asked), images, tmp_path, "key", order=order)
        np.testing.assert_array_equal(found[order], wanted[order])
    assert set(asked) == {20} and "damaged and computed again" in caplog.text


def test_what_is_stored_and_whole_is_read_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.zeros((4, 3, 2, 2), np.uint8)
    stored_features(encoded([]), images, tmp_path, "key")

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    for name in ("locked", "replacing", "_write"):
        monkeypatch.setattr(features, name, refused)
    monkeypatch.setattr(Path, "mkdir", refused)
    assert len(stored_features(encoded([]), images, tmp_path, "key")) == 4


def test_a_full_disk_while_features_are_stored_is_an_error(tmp_path: Path) -> None:
    """Not a signal; and what is there afterwards is gone on with."""
    images = np.ones((9000, 3, 2, 2), np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*key\.npy"):
            stored_features(encoded([]), images, tmp_path, "key")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert len(stored_features(encoded([]), images, tmp_path, "key")) == 9000


def test_a_damaged_head_in_the_cache_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, weight = tmp_path / "head.safetensors", torch.randn(4, 3)
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return weight

    heads._cached(path, make)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        assert torch.equal(heads._cached(path, make), weight)
    assert len(made) > 30 and "is damaged and made again" in caplog.text
