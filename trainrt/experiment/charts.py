"""A line chart as one SVG element: readable in a notebook, a report or a file of its own, in light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#805ad5")
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 44


class Line(NamedTuple):
    """A curve.

    Attributes:
      name: For the legend.
      x, y: [T] points; what is not finite is a gap.
      faint: Drawn thin and pale, as what another curve smooths.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    faint: bool = False


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    marks: Mapping[str, float] | None = None,
    size: tuple[int, int] = (640, 320),
) -> str:
    """Curves over one axis, as an SVG element.

    Args:
      lines: The curves.
      x_label, y_label: Of the axes.
      logarithmic: The horizontal axis is.
      marks: Name -> place on the horizontal axis of an upright line.
      size: Width and height.
    """
    width, height = size
    place = np.log10 if logarithmic else np.asarray
    xs = np.concatenate([place(np.asarray(line.x, float)) for line in lines])
    ys = np.concatenate([np.asarray(line.y, float) for line in lines])
    x0, x1 = _span(xs)
    y0, y1 = _span(ys)

    def at(x, y) -> tuple[float, float]:
        across = LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT)
        down = height - BOTTOM - (y - y0) / (y1 - y0) * (height - TOP - BOTTOM)
        return across, down

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{html.escape(y_label)} over {html.escape(x_label)}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
    ]
    for tick in _ticks(y0, y1):
        _, down = at(x0, tick)
        parts.append(f'<path d="M{LEFT} {down:.1f}H{width - RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{tick:.3g}</text>')
    for tick in range(math.ceil(x0), math.floor(x1) + 1) if logarithmic else _ticks(x0, x1):
        across, _ = at(tick, y0)
        words = f"1e{tick}" if logarithmic else f"{tick:.3g}"
        parts.append(f'<text x="{across:.1f}" y="{height - BOTTOM + 16}" text-anchor="middle">{words}</text>')
    for name, value in (marks or {}).items():
        across, _ = at(float(place(value)), y0)
        parts.append(f'<path d="M{across:.1f} {TOP}V{height - BOTTOM}" stroke="currentColor" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{across + 4:.1f}" y="{TOP + 10}">{html.escape(name)} {value:.2g}</text>')
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        style = 'opacity=".4" stroke-width="1"' if line.faint else 'stroke-width="2"'
        path = _path([at(x, y) for x, y in zip(place(np.asarray(line.x, float)), line.y, strict=True)])
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" {style}/>')
        parts.append(f'<text x="{LEFT + 150 * index}" y="16" fill="{colour}">{html.escape(line.name)}</text>')
    parts.append(f'<text x="{(LEFT + width) / 2}" y="{height - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP - 8}" text-anchor="end">{html.escape(y_label)}</text></svg>')
    return "".join(parts)


def _span(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers in a range."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step) + 1)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    words, pen = [], "M"
    for x, y in points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        words.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L"
    return "".join(words)
