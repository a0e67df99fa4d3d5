"""The demo suite is what it says: honest images, good experts, a gap that merging can close."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from adamerge import deliver, demo_images
from adamerge.cli import main
from adamerge.config import load
from adamerge.encoders import Tower
from adamerge.evaluation import baseline_rows


def test_images_are_a_function_of_task_split_and_index() -> None:
    for task in demo_images.TASKS:
        short, _ = demo_images.arrays(task, "test", 8)
        longer, labels = demo_images.arrays(task, "test", 12)
        np.testing.assert_array_equal(short, longer[:8])
        assert longer.shape == (12, 32, 32, 3) and longer.dtype == np.uint8
        assert labels.max() < len(demo_images.CLASSES[task])


def test_no_test_image_is_a_training_image() -> None:
    for task in demo_images.TASKS:
        test = {image.tobytes() for image in demo_images.arrays(task, "test", 400)[0]}
        train = {image.tobytes() for image in demo_images.arrays(task, "train", 1500)[0]}
        assert not test & train


def test_the_suite_repeats_the_classes_of_the_training() -> None:
    suite = load(["suite=demo"])["suite"]
    assert tuple(suite["tasks"]) == tuple(demo_images.TASKS)
    for task, entry in suite["tasks"].items():
        assert tuple(entry["classes"]) == tuple(demo_images.CLASSES[task])
        assert tuple(entry["templates"]) == tuple(demo_images.TEMPLATES[task])
    with pytest.raises(ValueError, match="digits"):
        demo_images.dataset("digit")
    with pytest.raises(ValueError, match="test"):
        demo_images.dataset("digits", "tset")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"cache_dir={tmp_path_factory.mktemp('cache')}"


def test_experts_are_right_and_the_pretrained_model_is_not(cache: str) -> None:
    job = deliver.load_job(load(["suite=demo", cache]))
    rows = {
        row.name: row.accuracy
        for row in baseline_rows(
            job.scorer(torch.device("cpu")),
            Tower(job.suite.clip.backbone),
            job.suite.task_vectors,
            oracle=False,
        )
    }
    assert min(rows["expert"].values()) >= 0.95
    assert np.mean(list(rows["pretrained"].values())) <= 0.65
    assert min(rows["task_arithmetic"].values()) >= 0.6
    assert len(rows["expert"]) >= 5


def test_a_short_adaptation_beats_task_arithmetic(cache: str, tmp_path: Path) -> None:
    words = ["suite=demo", cache, "wandb=off", "trainer.max_steps=60", "evaluate.oracle=false"]
    assert main(["train", *words, "objective=infomax", f"run_dir={tmp_path / 'run'}"]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    averages = {row["name"]: row["average"] for row in results["rows"]}
    assert averages["layer_wise"] > averages["task_arithmetic"] + 0.01
    assert averages["task_arithmetic"] > averages["pretrained"] + 0.05
