"""What depends on inputs alone is made once and kept by content; see `adamerge._base.kept`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adamerge._base import kept
from adamerge._base.kept import Kept, remembered
from adamerge.cli import check, main
from adamerge.cli.job import load_job
from adamerge.config import inputs
from adamerge.config import settings as config
from adamerge.encoders.tower import Tower
from adamerge.report import evaluation, pictures, preflight
from adamerge.report.evaluation import Row, Scorer, baseline_rows

CPU = torch.device("cpu")
VALUES = {"a": [1, 0.1, None, "é"], "b": {"c": float("inf")}}


def refuse() -> Any:
    raise AssertionError("it is kept, and must not be made again")


@pytest.fixture
def base(suite: Path, tmp_path: Path) -> list[str]:
    return [f"suite={suite}", f"cache_dir={tmp_path / 'cache'}", "wandb=off", "trainer.max_steps=2"]


def test_values_are_made_once(tmp_path: Path) -> None:
    path = tmp_path / "more" / "kept.json"
    assert Kept(path)("a", lambda: (1, 0.1)) == [1, 0.1]
    again = Kept(path)
    assert again("a", refuse) == [1, 0.1] and again.get("b") is None
    assert os.listdir(path.parent) == ["kept.json"]


def test_values_of_two_writers_stay(tmp_path: Path) -> None:
    one, two = Kept(tmp_path / "kept.json"), Kept(tmp_path / "kept.json")
    one.put("one", 1)
    two.put("two", 2)
    both = Kept(tmp_path / "kept.json")
    assert (both.get("one"), both.get("two")) == (1, 2)


def flipped(content: bytes) -> list[bytes]:
    """The content with a bit of every tenth byte flipped."""
    return [
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        for place in range(0, len(content), 10)
    ]


def test_a_damaged_file_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "kept.json"
    Kept(path)("values", lambda: VALUES)
    whole = path.read_bytes()
    shapes = [b"", b"{}", b"[]", b"3", b"[" * 100_000, b'{"sha256": 1, "values": 2}', whole[:-9]]
    for damaged in [*shapes, *flipped(whole)]:
        path.write_bytes(damaged)
        caplog.clear()
        found = Kept(path)
        if found.get("values") == VALUES:  # the flip changed nothing that is read
            continue
        assert f"{path} is damaged" in caplog.text
        assert found("values", lambda: VALUES) == VALUES
        assert Kept(path)("values", refuse) == VALUES and path.read_bytes() == whole


def test_a_place_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    found = Kept(tmp_path / "file" / "kept.json")
    assert found("a", lambda: 1) == 1 and found("a", refuse) == 1


def hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed, from here on."""
    read: list[Path] = []
    whole = kept.sha256
    monkeypatch.setattr(kept, "sha256", lambda path: read.append(path) or whole(path))
    return read


def settled(path: Path, content: bytes) -> None:
    """Writes a file that is long unchanged, as far as `kept` can tell."""
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, file = hashes(monkeypatch), tmp_path / "weights"
    monkeypatch.setattr(kept, "_SETTLED", -1.0)
    settled(file, b"one")
    (tmp_path / "link").symlink_to(file)
    one = remembered(tmp_path)(file)
    assert remembered(tmp_path)(file) == remembered(tmp_path)(tmp_path / "link") == one
    assert read == [file]


def test_a_changed_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_SETTLED", -1.0)
    file, known = tmp_path / "weights", set()
    settled(file, b"one")
    known.add(remembered(tmp_path)(file))
    time.sleep(0.02)  # the resolution of the time stamps
    settled(file, b"two")  # of the same size, with the same time of change
    known.add(remembered(tmp_path)(file))
    other = tmp_path / "other"
    settled(other, b"six")
    other.replace(file)
    known.add(remembered(tmp_path)(file))
    assert len(known) == 3


def test_a_file_just_written_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, file = hashes(monkeypatch), tmp_path / "weights"
    file.write_bytes(b"one")
    for _ in range(2):  # it could change again within the same time stamp
        remembered(tmp_path)(file)
    assert len(read) == 2


def test_baselines_are_scored_once(base: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "adamerge")
    job = inputs.load(config.load(base))
    scorer, tower = job.scorer(CPU), Tower(job.suite.clip.backbone)

    def rows(*kept: Kept) -> tuple[list[Row], list[str]]:
        caplog.clear()
        made = baseline_rows(scorer, tower, job.suite.task_vectors, True, *kept)
        return made, [line for line in caplog.messages if line.startswith("scoring: ")]

    first, scored = rows(job.kept("scores", scorer.key()))
    assert len(scored) == 5 + 8
    assert rows(job.kept("scores", scorer.key())) == (first, [])
    assert rows()[0] == first


def scores(words: list[str]) -> Path:
    """Where the scores of baselines are kept."""
    job = inputs.load(config.load(words))
    return job.kept("scores", job.scorer(CPU).key()).path


def exchanged(words: list[str]) -> list[str]:
    """The same suite with its first two experts exchanged."""
    tasks = config.load(words)["suite"]["tasks"]
    one, two = list(tasks)[:2]
    return [
        f"suite.tasks.{one}.expert={tasks[two]['expert']}",
        f"suite.tasks.{two}.expert={tasks[one]['expert']}",
    ]


def test_other_inputs_are_kept_elsewhere(base: list[str]) -> None:
    task = next(iter(config.load(base)["suite"]["tasks"]))
    others = [
        exchanged(base),
        ["protocol=heldout"],
        ["evaluate.batch_size=3"],
        [f"suite.tasks.{task}.templates=['not a {{}}']"],
        ["task_vectors.dtype=int8"],
    ]
    places = {scores([*base, *other]) for other in [[], *others]}
    assert len(places) == 1 + len(others)
    assert scores([*base, "seed=3", "objective=infomax", "method=task_wise"]) in places


def test_labels_and_device_are_part_of_the_key(
    base: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = inputs.load(config.load(base))

    def key() -> str:
        return Scorer.key(job.scorer(CPU))

    keys = {key()}
    monkeypatch.setattr(evaluation, "machine", lambda device: ("another", "one", "highest"))
    keys.add(key())
    images = next(iter(job.data.tasks.values()))
    assert images.labels is not None
    images.labels = images.labels[::-1].copy() + 0
    keys.add(key())
    images.labels = None
    keys.add(key())
    assert len(keys) == 4


def test_a_second_look_measures_nothing(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*base, "preflight.images=4"]
    first = check.report_of(load_job(config.load(words)))
    for name in ("measure", "gram"):
        monkeypatch.setattr(preflight, name, lambda *_: refuse())
    second = check.report_of(load_job(config.load(words)))
    assert {**second, "estimate": 0} == {**first, "estimate": 0}
    with pytest.raises(AssertionError, match="must not be made again"):
        check.report_of(load_job(config.load([*words, "seed=7"])))


def test_a_second_run_scores_only_itself(
    base: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found, said = [], []
    for name in ("one", "two"):
        caplog.clear()
        with caplog.at_level("INFO", "adamerge"):
            assert main(["train", *base, f"run_dir={tmp_path / name}"]) == 0
        found.append(json.loads((tmp_path / name / "results.json").read_text()))
        said.append([m for m in caplog.messages if m.startswith("scoring: ")])
    assert found[0] == found[1]
    assert len(said[0]) > 10 and said[1] == ["scoring: layer_wise"]
    caplog.clear()
    with caplog.at_level("INFO", "adamerge"):
        assert main(["evaluate", str(tmp_path / "one")]) == 0
    assert [m for m in caplog.messages if m.startswith("scoring: ")] == ["scoring: one"]
    evaluated = json.loads((tmp_path / "one" / "evaluation" / "results.json").read_text())
    assert evaluated["rows"][:-1] == found[0]["rows"][:-1]


def test_the_picture_is_centred_where_coefficients_started() -> None:
    values = torch.tensor([[0.9, 1.0], [1.0, 1.3]])
    figure = pictures.coefficients_figure(["a", "b"], ["x", "y"], values, init=1.0)
    low, high = figure.axes[0].images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(1.0) and high == pytest.approx(1.3)
