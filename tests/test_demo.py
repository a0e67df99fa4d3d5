"""The demo suite is what it says: honest images, good experts, a gap that merging can close."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest

from adamerge.cli import main
from adamerge.config.settings import load
from adamerge.images import demo
from adamerge.images.cache import TaskImages, cache_images

PIXELS = {  # CRC-32 of 40 training and 40 test images with their labels
    "digits": 0x89DEA1B1,
    "letters": 0x015F2904,
    "numbers": 0x599883CB,
    "shapes": 0xF4F6A3A8,
    "textures": 0x2ABE05FD,
    "scenes": 0xBF7EFD18,
}


@pytest.mark.parametrize("domain", PIXELS)
def test_the_pixels_are_those_that_the_shipped_experts_were_trained_on(domain: str) -> None:
    """The same with the oldest and the newest supported Pillow, NumPy and matplotlib."""
    found = [array for split in demo.SPLITS for array in demo.arrays(domain, split, 40)]
    assert zlib.crc32(b"".join(array.tobytes() for array in found)) == PIXELS[domain]


def test_images_are_a_function_of_task_split_and_index() -> None:
    for task in demo.TASKS:
        short, _ = demo.arrays(task, "test", 8)
        longer, labels = demo.arrays(task, "test", 12)
        np.testing.assert_array_equal(short, longer[:8])
        assert longer.shape == (12, 32, 32, 3) and longer.dtype == np.uint8
        assert labels.max() < len(demo.CLASSES[task])


def test_no_test_image_is_a_training_image() -> None:
    for task in demo.TASKS:
        test = {image.tobytes() for image in demo.arrays(task, "test", 400)[0]}
        train = {image.tobytes() for image in demo.arrays(task, "train", 1500)[0]}
        assert not test & train


def test_the_suite_repeats_the_classes_of_the_training() -> None:
    suite = load(["suite=demo"])["suite"]
    assert tuple(suite["tasks"]) == tuple(demo.TASKS)
    for task, entry in suite["tasks"].items():
        assert tuple(entry["classes"]) == tuple(demo.CLASSES[task])
        assert tuple(entry["templates"]) == tuple(demo.TEMPLATES[task])
    with pytest.raises(ValueError, match="digits"):
        demo.dataset("digit")
    with pytest.raises(ValueError, match="test"):
        demo.dataset("digits", "tset")


def test_the_cache_draws_pictures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They and their labels are those of the whole data set; another split has another key."""
    cfg = open_clip.transform.PreprocessCfg(size=32)

    def cached() -> TaskImages:
        images = demo.source("letters", size=30)
        return cache_images("letters", images, tuple(demo.CLASSES["letters"]), cfg, tmp_path)

    first = cached()
    monkeypatch.setattr(demo, "_picture", lambda *_, **__: pytest.fail("drawn again"))
    second = cached()
    monkeypatch.undo()
    pixels, labels = demo.arrays("letters", "test", 30)
    np.testing.assert_array_equal(second.images, first.images)
    np.testing.assert_array_equal(first.images, pixels.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(second.labels, labels)
    eager = demo.dataset("letters", size=30)
    assert eager["label"][:] == labels.tolist()
    np.testing.assert_array_equal(np.asarray(eager[29]["image"]), pixels[29])
    keys = {
        demo.source("letters", split, size).key("image") for split in demo.SPLITS for size in (4, 5)
    }
    assert len(keys) == 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Accuracies by task after a short adaptation, of all models."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["suite=demo", f"cache_dir={folder / 'cache'}", "wandb=off", "evaluate.oracle=false"]
    words += ["preflight=off", *(f"suite.tasks.{task}.data.size=200" for task in demo.TASKS)]
    words += ["trainer.max_steps=30", "objective=infomax", f"run_dir={folder / 'run'}"]
    assert main(["train", *words]) == 0
    results = json.loads((folder / "run" / "results.json").read_text())
    return {row["name"]: row["accuracy"] for row in results["rows"]}


def test_experts_are_right_and_the_pretrained_model_is_not(
    rows: dict[str, dict[str, float]],
) -> None:
    assert min(rows["expert"].values()) >= 0.95
    assert np.mean(list(rows["pretrained"].values())) <= 0.65
    assert min(rows["task_arithmetic"].values()) >= 0.6
    assert len(rows["expert"]) >= 5


def test_a_short_adaptation_beats_task_arithmetic(rows: dict[str, dict[str, float]]) -> None:
    averages = {name: np.mean(list(accuracy.values())) for name, accuracy in rows.items()}
    assert averages["layer_wise"] > averages["task_arithmetic"] + 0.01
    assert averages["task_arithmetic"] > averages["pretrained"] + 0.05
