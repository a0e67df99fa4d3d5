"""The pictures of a run, drawn: elsewhere in the tests they are blank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from adamerge.report import pictures

TASKS = ["stripes", "dots"]


@pytest.fixture
def drawn(
    blank_pictures: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Figure], np.ndarray]:
    """The pixels of a figure as it is saved."""
    monkeypatch.setattr(Figure, "savefig", blank_pictures)
    numbers = itertools.count()

    def pixels(figure: Figure) -> np.ndarray:
        path = tmp_path / f"{next(numbers)}.png"
        pictures.save(figure, path)
        with Image.open(path) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    return pixels


def test_coefficients_are_seen(drawn: Callable[[Figure], np.ndarray], tmp_path: Path) -> None:
    layers = [f"transformer.resblocks.{i}.attn.in_proj_weight" for i in range(60)]
    low, high = torch.full((2, 60), 0.1), torch.full((2, 60), 0.9)
    one, other = (drawn(pictures.coefficients_figure(TASKS, layers, v)) for v in (low, high))
    assert one.shape == other.shape and one.shape[1] > 1000
    middle = (one.shape[0] // 3, one.shape[1] // 2)  # within the map
    assert one[middle][2] > one[middle][0], "blue below"
    assert other[middle][0] > other[middle][2], "red above"
    words = ["step", *(f"coefficient_{r}/{t}" for t in TASKS for r in ("mean", "min", "max"))]
    rows = [words, *([str(step), *["0.3"] * 6] for step in (1, 3))]
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("\n".join(map(",".join, rows)))
    course = drawn(pictures.coefficients_figure(TASKS, layers, low, metrics))
    assert course.shape[0] > one.shape[0], "their course is below"


def test_accuracies_are_seen(drawn: Callable[[Figure], np.ndarray]) -> None:
    rows = [
        {"name": name, "accuracy": {"stripes": height}, "average": height}
        for name, height in (("pretrained", 0.2), ("expert", 0.9), ("layer_wise", 0.7))
    ]
    found = drawn(pictures.accuracy_figure({"rows": rows}))
    red = (np.abs(found.astype(int) - [0xC8, 0x44, 0x2F]).sum(-1) < 10).sum()
    grey = (np.abs(found.astype(int) - 0xD9).sum(-1) < 10).sum()
    assert red > 2.5 * grey > 0, "a bar is as high as its accuracy"
