"""Images of the demo suite: five small domains, drawn here except scikit-learn's real digits.

Every picture is 32x32 RGB and a function of (domain, split, index, seed) alone. `CLASSES` and
`TEMPLATES` are the single source of the names behind the zero-shot heads; the suite file
`configs/suite/demo.yaml` repeats them.
"""

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from adamerge._base.errors import AdamergeError
from adamerge.images import demo_pictures as drawing
from adamerge.images.demo_pictures import Rng
from adamerge.images.source import ImageSource

CLASSES: dict[str, list[str]] = {
    "digits": ["cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"],
    "letters": [
        *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot"),
        *("golf", "hotel", "india", "juliet", "kilo", "lima"),
    ],
    "numbers": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "shapes": [
        *("disc", "box", "wedge", "star", "rhomb"),
        *("crossing", "hoop", "moon", "dart", "love"),
    ],
    "textures": [
        *("deck", "fence", "hatching", "chess", "polka"),
        *("static", "swell", "target", "wall", "net"),
    ],
}
TEMPLATES: dict[str, list[str]] = {task: ["a photo of a {}."] for task in CLASSES}
TASKS = tuple(CLASSES)
SPLITS = ("train", "test")
TEST_SIZE = 400
_DOMAINS = (*TASKS, "scenes")  # "scenes" appear in pretraining only
SCENES = 24
_DIGITS_TRAIN = 1397  # of scikit-learn's 1797; the remaining 400 are the test split


@functools.cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels


@functools.cache
def _shuffled() -> list[int]:
    """Rows of scikit-learn's digits, so that both splits see every writer."""
    return np.random.default_rng(0).permutation(len(_handwriting()[1])).tolist()


def _row(index: int, split: str) -> int:
    return _shuffled()[index % _DIGITS_TRAIN if split == "train" else _DIGITS_TRAIN + index]


def _started(domain: str, split: str, index: int, seed: int) -> tuple[int, Rng]:
    """Label of an example, and the generator that its picture is drawn with."""
    rng = np.random.default_rng([seed, _DOMAINS.index(domain), SPLITS.index(split), index])
    if domain == "digits":
        return int(_handwriting()[1][_row(index, split)]), rng
    return int(rng.integers(SCENES if domain == "scenes" else len(CLASSES[domain]))), rng


def _picture(domain: str, split: str, index: int, seed: int) -> np.ndarray:
    label, rng = _started(domain, split, index, seed)
    if domain == "digits":
        image = drawing.digit(_handwriting()[0][_row(index, split)], rng)
    else:
        image = drawing.PAINTERS[domain](label, rng)
    return drawing.finished(image, rng)


def arrays(domain: str, split: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images `[size, 32, 32, 3]` (uint8) and labels `[size]` (int64) of a domain.

    `domain` is a task or "scenes". The splits share no random stream, and no handwritten digit.
    """
    indices = range(size)
    labels = [_started(domain, split, index, seed)[0] for index in indices]
    images = [_picture(domain, split, index, seed) for index in indices]
    return np.stack(images), np.array(labels, dtype=np.int64)


class DemoImages:
    """A split of a demo task whose pictures are drawn when they are asked for; an `ImageSource`.

    Its columns are `image` and `label`. A cache of the pictures knows them by `key`, so that they
    are drawn once.

    Args:
        task: one of `TASKS`.
        split: "train" or "test".
        size: number of images; 400 by default, and at most that for the test split of digits.

    Raises:
        AdamergeError: unknown task or split, or more handwritten test digits than there are.
    """

    def __init__(self, task: str, split: str = "test", size: int | None = None) -> None:
        if task not in TASKS:
            raise AdamergeError(f"unknown demo task {task!r}; valid: {', '.join(TASKS)}")
        if split not in SPLITS:
            raise AdamergeError(f"unknown split {split!r} of {task}; valid: {', '.join(SPLITS)}")
        self.task, self.split = task, split
        self.size = TEST_SIZE if size is None else size
        if task == "digits" and split == "test" and self.size > TEST_SIZE:
            raise AdamergeError(f"demo task digits has {TEST_SIZE} test images, not {self.size}")

    @property
    def columns(self) -> list[str]:
        return ["image", "label"]

    def rows(self, column: str) -> int:
        return self.size

    def images(self, column: str, start: int, stop: int) -> Sequence[np.ndarray]:
        indices = range(start, min(stop, self.size))
        return [_picture(self.task, self.split, index, seed=0) for index in indices]

    def labels(self, column: str) -> tuple[Sequence[int], list[str]]:
        found = [_started(self.task, self.split, index, seed=0)[0] for index in range(self.size)]
        return found, CLASSES[self.task]

    def key(self, column: str) -> str:
        libraries = [version(name) for name in ("numpy", "pillow", "matplotlib", "scikit-learn")]
        code = [Path(file).read_text("utf-8") for file in (__file__, drawing.__file__)]
        parts = [self.task, self.split, self.size, *libraries, *code]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def usual(self, kind: str) -> list[str]:
        return [kind]

    def holds_images(self, column: str) -> bool:
        return column == "image"


def source(task: str, split: str = "test", size: int | None = None) -> ImageSource:
    """`DemoImages`, for a suite's `data:`."""
    return DemoImages(task, split, size)


def dataset(task: str, split: str = "test", size: int | None = None) -> datasets.Dataset:
    """The pictures and labels of `DemoImages`, with the same arguments, all drawn at once."""
    demo = DemoImages(task, split, size)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES[task])
    )
    images = [Image.fromarray(image) for image in demo.images("image", 0, demo.size)]
    rows = {"image": images, "label": demo.labels("label")[0]}
    return datasets.Dataset.from_dict(rows, features=features)
