"""How the pictures of the demo suite's domains are drawn: each from a label and a generator."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 32
_CANVAS = 2 * SIZE  # drawn twice as large, then reduced: smooth edges

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


def digit(pixels: np.ndarray, rng: Rng) -> Image.Image:
    image = Image.new("RGB", (_CANVAS, _CANVAS))
    side = int(rng.integers(50, 60))
    digit = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    x, y = (int((_CANVAS - side) / 2 + v) for v in rng.integers(-4, 5, 2))
    image.paste(digit.convert("RGB"), (x, y))
    return image


PAINTERS: dict[str, Callable[[int, Rng], Image.Image]] = {
    "letters": lambda label, rng: _glyph("ABCDEFGHIJKL"[label], rng, *_colours(rng, False)),
    "numbers": _number,
    "shapes": _shape,
    "textures": _texture,
    "scenes": _scene,
}


def finished(drawing: Image.Image, rng: Rng) -> np.ndarray:
    """The drawing `[SIZE, SIZE, 3]` (uint8), reduced and with noise."""
    clean = np.asarray(drawing.reduce(2))
    return (clean + rng.normal(0, 6, clean.shape)).clip(0, 255).astype(np.uint8)
