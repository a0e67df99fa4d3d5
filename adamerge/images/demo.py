"""Images of the demo suite: five small domains, drawn here except scikit-learn's real digits.

Every picture is 32x32 RGB and a function of (domain, split, index, seed) alone. `CLASSES` and
`TEMPLATES` are the single source of the names behind the zero-shot heads; the suite file
`configs/suite/demo.yaml` repeats them.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adamerge._base.errors import AdamergeError

SIZE = 32
_CANVAS = 2 * SIZE  # drawn twice as large, then reduced: smooth edges

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

Rng = np.random.Generator
Colour = tuple[int, int, int]


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral"),
    *("STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10"),
)


def _colours(rng: Rng, dark_ground: bool | None = None) -> tuple[Colour, Colour]:
    """Background and foreground, far apart in brightness."""
    dark, light = rng.integers(0, 90, 3), rng.integers(170, 256, 3)
    if dark_ground is None:
        dark_ground = bool(rng.random() < 0.5)
    a, b = (tuple(colour.tolist()) for colour in ((dark, light) if dark_ground else (light, dark)))
    return a, b


def _blank(colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (_CANVAS, _CANVAS), colour)
    return image, ImageDraw.Draw(image)


def _glyph(text: str, rng: Rng, ground: Colour, ink: Colour) -> Image.Image:
    image, draw = _blank(ground)
    font = _font(_FONTS[rng.integers(len(_FONTS))], int(rng.integers(44, 58)))
    x, y = (_CANVAS / 2 + float(v) for v in rng.uniform(-5, 5, 2))
    draw.text((x, y), text, fill=ink, font=font, anchor="mm")
    return image.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR, fillcolor=ground)


def _number(label: int, rng: Rng) -> Image.Image:
    """A printed number on a sign: coloured ground, light ink, a frame."""
    ground, ink = _colours(rng, dark_ground=True)
    image = _glyph(str(label), rng, ground, ink)
    ImageDraw.Draw(image).rectangle((2, 2, _CANVAS - 3, _CANVAS - 3), outline=ink, width=3)
    return image


def _ring(corners: int, turn: float, *radii: float) -> list[tuple[float, float]]:
    """Corners of a regular polygon at these distances in turn: two of them make a star."""
    polar = [(radii[k % len(radii)], turn + 2 * math.pi * k / corners) for k in range(corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in polar]


def _heart() -> list[tuple[float, float]]:
    a = np.linspace(0, 2 * math.pi, 40)
    y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return [*zip((np.sin(a) ** 3).tolist(), (-y / 16).tolist(), strict=True)]


_A = 0.33  # half the width of the cross's bars
_OUTLINES: dict[int, list[tuple[float, float]]] = {
    1: _ring(4, math.pi / 4, 1.0),
    2: _ring(3, 0.0, 1.0),
    3: _ring(10, 0.0, 1.0, 0.4),
    4: [(0.0, -1.0), (0.6, 0.0), (0.0, 1.0), (-0.6, 0.0)],
    5: [
        *((-_A, -_A), (-_A, -1.0), (_A, -1.0), (_A, -_A), (1.0, -_A), (1.0, _A)),
        *((_A, _A), (_A, 1.0), (-_A, 1.0), (-_A, _A), (-1.0, _A), (-1.0, -_A)),
    ],
    8: [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    9: _heart(),
}


def _shape(label: int, rng: Rng) -> Image.Image:
    ground, ink = _colours(rng)
    image, draw = _blank(ground)
    radius, turn = float(rng.uniform(17, 25)), float(rng.uniform(-0.2, 0.2))
    cx, cy = (_CANVAS / 2 + float(v) for v in rng.uniform(-5, 5, 2))
    if label in _OUTLINES:
        cos, sin = radius * math.cos(turn), radius * math.sin(turn)
        corners = [(cx + cos * x - sin * y, cy + sin * x + cos * y) for x, y in _OUTLINES[label]]
        draw.polygon(corners, fill=ink)
        return image
    draw.circle((cx, cy), radius, fill=ink)
    if label == 6:  # a ring
        draw.circle((cx, cy), 0.6 * radius, fill=ground)
    elif label == 7:  # a crescent
        draw.circle((cx + 0.5 * radius, cy - 0.1 * radius), 0.8 * radius, fill=ground)
    return image


def _pattern(label: int, rng: Rng) -> np.ndarray:
    """A field `[S, S]` of numbers whose sign says which of two colours a point takes."""
    y, x = np.mgrid[0:_CANVAS, 0:_CANVAS].astype(float)
    wave = 2 * math.pi / float(rng.uniform(11, 18))
    a, b = rng.uniform(0, 2 * math.pi, 2)
    cx, cy = rng.uniform(22, 42, 2)
    row = np.floor(wave * y / math.pi)
    fields: list[Callable[[], np.ndarray]] = [
        lambda: np.sin(wave * y + a),  # horizontal stripes
        lambda: np.sin(wave * x + a),  # vertical stripes
        lambda: np.sin(0.7 * wave * (x + y) + a),  # diagonal stripes
        lambda: np.sin(wave * x + a) * np.sin(wave * y + b),  # checkerboard
        lambda: np.sin(wave * x + a) + np.sin(wave * y + b) - 0.9,  # dots
        lambda: np.kron(rng.normal(size=(16, 16)), np.ones((4, 4))),  # noise
        lambda: np.sin(wave * y + a + 2.5 * np.sin(0.6 * wave * x + b)),  # waves
        lambda: np.sin(wave * np.hypot(x - cx, y - cy) + a),  # rings
        lambda: np.minimum(  # bricks
            np.abs(np.sin(0.5 * wave * y)) - 0.3,
            np.abs(np.sin(0.25 * wave * x + math.pi / 2 * (row // 2 % 2))) - 0.17,
        ),
        lambda: 0.75 - np.maximum(np.sin(wave * x + a), np.sin(wave * y + b)),  # grid
    ]
    return fields[label]()


def _texture(label: int, rng: Rng) -> Image.Image:
    field = _pattern(label, rng)
    ground, ink = (np.array(colour) for colour in _colours(rng))
    return Image.fromarray(np.where(field[..., None] > 0, ink, ground).astype(np.uint8))


def _scene(label: int, rng: Rng) -> Image.Image:
    """A landscape, known to pretraining only: one of 6 skies over one of 4 grounds."""
    skies = ((90, 160, 240), (240, 150, 70), (20, 20, 60), (170, 170, 170), (250, 210, 230))
    lands = ((40, 130, 50), (220, 190, 120), (30, 60, 140), (120, 70, 40))
    image, draw = _blank(skies[min(label % 6, 4)])
    horizon, tilt, size = float(rng.uniform(30, 46)), float(rng.uniform(-8, 8)), _CANVAS
    ground = [(0, horizon - tilt), (size, horizon + tilt), (size, size), (0, size)]
    draw.polygon(ground, fill=lands[label // 6])
    if label % 6 in (1, 5):
        draw.circle((float(rng.uniform(12, 52)), 14), 8, fill=(255, 240, 150))
    return image


@functools.cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return (pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels


def _digit(index: int, split: str, rng: Rng) -> tuple[Image.Image, int]:
    pixels, labels = _handwriting()
    order = np.random.default_rng(0).permutation(len(labels))  # both splits see every writer
    row = order[index % _DIGITS_TRAIN if split == "train" else _DIGITS_TRAIN + index]
    image = Image.new("RGB", (_CANVAS, _CANVAS))
    side = int(rng.integers(50, 60))
    digit = Image.fromarray(pixels[row]).resize((side, side), Image.Resampling.BICUBIC)
    x, y = (int((_CANVAS - side) / 2 + v) for v in rng.integers(-4, 5, 2))
    image.paste(digit.convert("RGB"), (x, y))
    return image, int(labels[row])


_PAINTERS: dict[str, Callable[[int, Rng], Image.Image]] = {
    "letters": lambda label, rng: _glyph("ABCDEFGHIJKL"[label], rng, *_colours(rng, False)),
    "numbers": _number,
    "shapes": _shape,
    "textures": _texture,
    "scenes": _scene,
}


def _example(domain: str, split: str, index: int, seed: int) -> tuple[np.ndarray, int]:
    rng = np.random.default_rng([seed, _DOMAINS.index(domain), SPLITS.index(split), index])
    if domain == "digits":
        image, label = _digit(index, split, rng)
    else:
        label = int(rng.integers(SCENES if domain == "scenes" else len(CLASSES[domain])))
        image = _PAINTERS[domain](label, rng)
    clean = np.asarray(image.reduce(2))
    return (clean + rng.normal(0, 6, clean.shape)).clip(0, 255).astype(np.uint8), label


def arrays(domain: str, split: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images `[size, 32, 32, 3]` (uint8) and labels `[size]` (int64) of a domain.

    `domain` is a task or "scenes". The splits share no random stream, and no handwritten digit.
    """
    examples = [_example(domain, split, index, seed) for index in range(size)]
    return np.stack([e[0] for e in examples]), np.array([e[1] for e in examples], dtype=np.int64)


def dataset(task: str, split: str = "test", size: int | None = None) -> datasets.Dataset:
    """A split of a demo task, with columns `image` and `label`.

    Args:
        task: one of `TASKS`.
        split: "train" or "test".
        size: number of images; 400 by default, and at most that for the test split of digits.

    Raises:
        AdamergeError: unknown task or split, or more handwritten test digits than there are.
    """
    if task not in TASKS:
        raise AdamergeError(f"unknown demo task {task!r}; valid: {', '.join(TASKS)}")
    if split not in SPLITS:
        raise AdamergeError(f"unknown split {split!r} of {task}; valid: {', '.join(SPLITS)}")
    count = TEST_SIZE if size is None else size
    if task == "digits" and split == "test" and count > TEST_SIZE:
        raise AdamergeError(f"demo task digits has {TEST_SIZE} test images, not {count}")
    images, labels = arrays(task, split, count)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES[task])
    )
    rows = {"image": [Image.fromarray(image) for image in images], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)
