"""Charts as SVG and PNG text for a page that loads nothing: bars, points, lines, maps of λ.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; text, axes and grids take
the page's own colours (`currentColor`), so that a chart is readable in light and dark.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib import colormaps
from PIL import Image

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8c8c8c", "#B8A800")
_WIDTH, _LEFT, _RIGHT = 760, 56, 16


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def bars(labels: Sequence[str], values: Sequence[tuple[float, float]], what: str) -> str:
    """Horizontal bars with the standard deviation as a whisker, from 0 to 100 %."""
    left, line = 300, 24
    height = line * len(labels) + 30
    scale = (_WIDTH - left - 70) / 100
    drawn = [_axis_x(left, scale, height - 26, 0)]
    for row, (label, (mean, deviation)) in enumerate(zip(labels, values, strict=True)):
        y, width = row * line + 4, 100 * mean * scale
        drawn.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{escape(_short(label, 44))}'
            f"<title>{escape(label)}</title></text>"
            f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{line - 8}" '
            f'fill="{colour(row)}"/>'
            f'<text x="{left + width + 8 + 100 * deviation * scale:.1f}" y="{y + 12}">'
            f"{100 * mean:.1f}</text>"
        )
        if deviation:
            low, high = (left + 100 * (mean + s * deviation) * scale for s in (-1, 1))
            middle = y + (line - 8) / 2
            drawn.append(
                f'<path class="axis" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8'
                f'M{high:.1f} {middle - 4}v8"/>'
            )
    return _svg(height, what, drawn)


def points(
    labels: Sequence[str], places: Sequence[tuple[float, float]], x: str, y: str, what: str
) -> str:
    """Points of cost and accuracy in %, a number each; the Pareto front (cheapest for what it
    reaches) is a line. The x axis is logarithmic."""
    height = 300
    logs = [math.log10(max(cost, 1e-9)) for cost, _ in places]
    low, high = min(logs) - 0.1, max(logs) + 0.1
    bottom, top = _round_range([100 * value for _, value in places])
    across = (_WIDTH - _LEFT - _RIGHT) / (high - low)
    up = (height - 60) / (top - bottom)
    where = [
        (_LEFT + (a - low) * across, height - 40 - (100 * value - bottom) * up)
        for a, (_, value) in zip(logs, places, strict=True)
    ]
    drawn = [_axis_y(height - 40, up, bottom, top), _text(_LEFT, 12, y)]
    for tick in range(math.ceil(low), math.floor(high) + 1):
        drawn.append(_text(_LEFT + (tick - low) * across, height - 24, f"{10.0**tick:g}", "middle"))
    drawn.append(_text(_WIDTH - _RIGHT, height - 6, f"{x} (logarithmic)", "end"))
    front = [where[i] for i in pareto(places)]
    if len(front) > 1:
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py in front)
        drawn.append(f'<path class="axis front" d="M{path}"/>')
    for index, (label, (px, py)) in enumerate(zip(labels, where, strict=True)):
        drawn.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{colour(index)}">'
            f"<title>{escape(label)}</title></circle>" + _text(px + 9, py + 4, str(index + 1))
        )
    return _svg(height, what, drawn)


def pareto(places: Sequence[tuple[float, float]]) -> list[int]:
    """The places than which none is both cheaper and better, cheapest first.

    >>> pareto([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
    [0, 2]
    """
    front: list[int] = []
    for index in sorted(range(len(places)), key=lambda i: (places[i][0], -places[i][1])):
        if not front or places[index][1] > places[front[-1]][1]:
            front.append(index)
    return front


def lines(curves: Mapping[str, Sequence[tuple[float, float]]], what: str) -> str:
    """Curves over steps, one colour each, in the order of the mapping."""
    height = 220
    everything = [place for curve in curves.values() for place in curve]
    end = max(max(step for step, _ in everything), 1)
    bottom, top = _round_range([value for _, value in everything])
    across, up = (_WIDTH - _LEFT - _RIGHT) / end, (height - 50) / (top - bottom)
    drawn = [_axis_y(height - 30, up, bottom, top)]
    drawn += [
        _text(_LEFT + f * end * across, height - 12, f"{f * end:g}", "middle") for f in (0, 0.5, 1)
    ]
    for index, (label, curve) in enumerate(curves.items()):
        path = "L".join(
            f"{_LEFT + step * across:.1f} {height - 30 - (value - bottom) * up:.1f}"
            for step, value in curve
        )
        drawn.append(
            f'<path d="M{path}" fill="none" stroke="{colour(index)}" stroke-width="1.8">'
            f"<title>{escape(label)}</title></path>"
        )
    return _svg(height, what, drawn)


def coefficient_map(values: Sequence[Sequence[float]], middle: float, reach: float) -> str:
    """λ `[tasks, layers]` as a data address of a PNG, one pixel each; white is `middle`."""
    table = np.asarray(values, dtype=float)
    shades = colormaps["RdBu_r"](0.5 + (table - middle) / (2 * reach), bytes=True)[..., :3]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shades)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _svg(height: float, what: str, drawn: Sequence[str]) -> str:
    return (
        f'<div class="wide" tabindex="0"><svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(what)}">{"".join(drawn)}</svg></div>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axis_x(left: float, scale: float, bottom: float, top: float) -> str:
    return "".join(
        f'<path class="grid" d="M{left + tick * scale:.1f} {top}V{bottom}"/>'
        + _text(left + tick * scale, bottom + 16, str(tick), "middle")
        for tick in range(0, 101, 20)
    )


def _axis_y(zero: float, scale: float, bottom: float, top: float) -> str:
    step = _step(top - bottom)
    ticks = [bottom + step * part for part in range(round((top - bottom) / step) + 1)]
    return "".join(
        f'<path class="grid" d="M{_LEFT} {zero - (tick - bottom) * scale:.1f}H{_WIDTH - _RIGHT}"/>'
        + _text(_LEFT - 6, zero - (tick - bottom) * scale + 4, f"{tick:.6g}", "end")
        for tick in ticks
    )


def _round_range(values: Sequence[float]) -> tuple[float, float]:
    """Ends around the values at multiples of the distance of ticks, never equal."""
    low, high = min(values), max(values)
    step = _step(max(high - low, abs(high) * 0.01, 1e-6))
    bottom = math.floor(low / step) * step
    return bottom, bottom + step * max(1, math.ceil((high - bottom) / step))


def _step(reach: float) -> float:
    """1, 2 or 5 times a power of ten, so that about four make the reach."""
    power = 10 ** math.floor(math.log10(reach / 4))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor * 4.5 >= reach)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
