"""The real suite and the scripts that made it: images out of folders, and a run on such images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from adamerge.cli import main
from adamerge.config.settings import load

ROOT = Path(__file__).parent.parent


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`benchmarks/real_data.py`."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_data

    return real_data


def noise(folder: Path, count: int, size: int, seed: int) -> None:
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")


def rows(path: Path) -> tuple[list[bytes], list[int], Dataset]:
    found = Dataset.from_parquet(str(path), keep_in_memory=True)
    return [row["image"].tobytes() for row in found], list(found["label"]), found


def test_a_folder_of_images_becomes_two_splits(
    made: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equally many test images a class, none of them a train image, and none twice."""
    monkeypatch.setitem(made.SOURCES, "hands", replace(made.SOURCES["hands"], each=3))
    for digit in range(10):
        noise(tmp_path / "own" / "Dataset" / str(digit), 5, 40, digit)
    (tmp_path / "own" / "Dataset" / "3" / "bad.jpg").write_text("no image")
    twin = tmp_path / "own" / "Dataset" / "4" / "twin.png"
    twin.write_bytes((twin.parent / "0.png").read_bytes())
    made.make_data(tmp_path / "out", ["hands"], {"hands": str(tmp_path / "own")}, 0)
    test, test_labels, data = rows(tmp_path / "out" / "hands-test.parquet")
    train, train_labels, _ = rows(tmp_path / "out" / "hands-train.parquet")
    assert np.bincount(test_labels).tolist() == [3] * 10
    assert np.bincount(train_labels).tolist() == [2] * 10
    assert len({*test, *train}) == 50
    assert data[0]["image"].size == (32, 32)
    assert data.features["label"].names[7] == "hand showing seven"
    before = (tmp_path / "out" / "hands-test.parquet").read_bytes()
    made.make_data(tmp_path / "again", ["hands"], {"hands": str(tmp_path / "own")}, 0)
    assert (tmp_path / "again" / "hands-test.parquet").read_bytes() == before


def test_a_set_with_a_test_split_keeps_it(made: ModuleType, tmp_path: Path) -> None:
    for split, count, size in (("train", 5, 40), ("test", 3, 28)):
        noise(tmp_path / split / "forest", count, size, size)
    source = made.Source(str(tmp_path), ("forest",), each=2, most=4, crops=True)
    found = made.splits(source, 0)
    assert len(found["test"]) == 2 and len(found["train"]) == 4 * 5
    border = np.asarray(found["test"][0][0])  # 28 pixels within 32
    assert border.shape == (32, 32, 3) and not border[:2].any() and border[2, 2:30].any()


def test_images_of_the_hub_take_our_labels(
    made: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GTSRB's official numbers, of which the suite has twenty."""
    official = [38, 3, 1, 14]
    images = [Image.new("RGB", (32, 32), (number, 0, 0)) for number in official]
    column = {"image": images, "label": official}
    monkeypatch.setattr(made, "load_dataset", lambda path, split: Dataset.from_dict(column))
    found = dict(
        (picture.getpixel((0, 0))[0], label)
        for picture, label in made.hub_pairs(made.SOURCES["signs"], "test", 0)
    )
    assert found == {38: 19, 1: 0, 14: 10}


def test_the_suite_has_the_words_of_the_training(made: ModuleType) -> None:
    import real_words

    suite = load(["suite=real", "suite.vars.data=somewhere"])["suite"]
    assert {t: entry["classes"] for t, entry in suite["tasks"].items()} == real_words.OFFICIAL
    assert suite["unseen"]["flowers"]["classes"] == real_words.COMMON["flowers"]
    for domain, source in made.SOURCES.items():
        assert len(source.labels) == len(real_words.COMMON[domain])


def test_without_images_the_suite_says_how_to_make_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "suite=real"]) == 2
    said = capsys.readouterr().err
    assert "suite.vars.data is not set: expected the folder that" in said
    assert "make_real.py data DIR" in said and "Traceback" not in said


def test_the_suite_trains(made: ModuleType, tmp_path: Path) -> None:
    import real_words

    rng = np.random.default_rng(0)
    for domain, names in real_words.COMMON.items():
        pixels = rng.integers(0, 256, (20, 32, 32, 3), np.uint8)
        pairs = [(Image.fromarray(image), i % len(names)) for i, image in enumerate(pixels)]
        made.write(pairs, names, tmp_path / f"{domain}-test.parquet")
    words = ["trainer.max_steps=2", "preflight=off", "wandb=off", "evaluate.baselines=false"]
    words += ["batch_size=2", f"cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    assert main(["train", "suite=real", f"suite.vars.data={tmp_path}", *words]) == 0
    assert (tmp_path / "run" / "results.json").is_file()


def test_augmenting_moves_and_mirrors_within_the_image(made: ModuleType) -> None:
    import real_train

    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(64, 3, 8, 8)
    same = real_train.augmented(image, 0, False, np.random.default_rng(0))
    plain = real_train.normalised(image)
    scale = (same[:, :, 0, 1] - same[:, :, 0, 0]) / (plain[:, :, 0, 1] - plain[:, :, 0, 0])
    offset = same[:, :, :1, :1] - plain[:, :, :1, :1] * scale[..., None, None]
    torch.testing.assert_close(same, plain * scale[..., None, None] + offset, rtol=0, atol=1e-3)
    moved = real_train.augmented(image, 2, False, np.random.default_rng(0))
    assert (moved[..., 0, 0] <= moved[..., 7, 7]).all()  # never mirrored, rows in their order
    mirrored = real_train.augmented(image, 0, True, np.random.default_rng(0))
    flipped = (mirrored[:, 0, 0, 0] > mirrored[:, 0, 0, 7]).float().mean()
    assert 0.25 < flipped < 0.75


def test_muon_makes_moves_orthogonal(made: ModuleType) -> None:
    import real_train

    torch.manual_seed(0)
    for shape in ((3, 8, 4), (3, 4, 8)):
        singular = torch.linalg.svdvals(real_train.orthogonal(torch.randn(shape)))
        assert singular.min() > 0.4 and singular.max() < 1.4
