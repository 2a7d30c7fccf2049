"""What a chart of the data page draws: histograms, sizes and marks in the units of their axes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_BINS = 30
_BUBBLES = 150
"""More sizes than this are drawn as a grid of counts."""
_GRID = 18
_COMMON = 6

Tick = tuple[float, str]
"""A place on the axis, and the text that stands there."""


@dataclass(frozen=True)
class Mark:
    """A single image pointed out in a histogram."""

    at: float
    title: str
    text: str = ""
    """Short enough to stand beside it, such as a number."""


@dataclass(frozen=True)
class Distribution:
    """A histogram; on a logarithmic axis, positions are powers of ten."""

    title: str
    axis: str
    edges: list[float]
    counts: list[int]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    line: Tick | None
    words: str
    """The chart in words, for those who cannot see it."""


@dataclass(frozen=True)
class Bubble:
    """Images of one size, or of nearly the same."""

    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True)
class Sizes:
    """Widths and heights of images, in pixels."""

    distinct: int
    common: list[tuple[str, int]]
    """The most frequent sizes and their numbers of images."""
    bubbles: list[Bubble]
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    words: str


def distribution(
    title: str,
    axis: str,
    values: Sequence[float] | np.ndarray,
    *,
    marks: Sequence[Mark] = (),
    line: Tick | None = None,
    log: bool = False,
) -> Distribution | None:
    """The histogram of some values, or None where there are none; a logarithmic axis takes values above 0 only."""
    given = np.asarray(values, dtype=np.float64)
    given = given[np.isfinite(given) & (given > 0 if log else True)]
    if not len(given):
        return None
    words = f"{len(given)} images from {given.min():.4g} to {given.max():.4g}, median {np.median(given):.4g}"
    marks = [mark for mark in marks if math.isfinite(mark.at) and (mark.at > 0 or not log)]
    if log:
        given = np.log10(given)
        marks = [Mark(math.log10(mark.at), mark.title, mark.text) for mark in marks]
        line = None if line is None else (math.log10(line[0]), line[1])
    points = [*given, *(mark.at for mark in marks), *([line[0]] if line else [])]
    low, high = _ends(min(points), max(points), log)
    counts, edges = np.histogram(given, np.linspace(low, high, _BINS + 1))
    return Distribution(
        title=title,
        axis=axis,
        edges=edges.tolist(),
        counts=counts.tolist(),
        x_ticks=_powers(low, high) if log else ticks(low, high),
        y_ticks=[tick for tick in ticks(0, max(1, int(counts.max())), 3) if tick[0] == int(tick[0])],
        marks=sorted(marks, key=lambda mark: mark.at),
        line=line,
        words=words + (f"; {len(marks)} marked" if marks else "") + (f"; line at {line[1]}" if line else ""),
    )


def _ends(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        low, high = math.floor(low), math.ceil(high)
        return (low, high) if high > low else (low, low + 1)
    if high > low:
        return low, high
    return low - 0.5, high + 0.5  # a single value stands in the middle


def _powers(low: float, high: float) -> list[Tick]:
    powers = range(int(low), int(high) + 1)
    return [(float(power), f"{10.0**power:g}") for power in powers[:: 1 + len(powers) // 6]]


def ticks(low: float, high: float, about: int = 4) -> list[Tick]:
    """Round numbers within an interval: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(n * step, f"{n * step:.10g}") for n in range(first, last + 1)]


def sizes(widths: Sequence[int] | np.ndarray, heights: Sequence[int] | np.ndarray) -> Sizes | None:
    """The sizes and how often each occurs, or None without images."""
    counts = Counter(zip(map(int, widths), map(int, heights), strict=True))
    if not counts:
        return None
    wide, high = [width for width, _ in counts], [height for _, height in counts]
    points = counts if len(counts) <= _BUBBLES else _binned(np.asarray(widths), np.asarray(heights))
    most = max(points.values())
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_COMMON]
    x_ends, y_ends = _padded(wide), _padded(high)
    words = f"{len(counts)} sizes, widths {min(wide)} to {max(wide)}, heights {min(high)} to {max(high)} px"
    return Sizes(
        distinct=len(counts),
        common=[(f"{width} x {height}", count) for (width, height), count in common],
        bubbles=[
            Bubble(
                x, y, 2 + 6 * math.sqrt(count / most), f"{'' if points is counts else 'about '}{x:g} x {y:g}: {count}"
            )
            for (x, y), count in sorted(points.items(), key=lambda item: -item[1])
        ],
        x_ends=x_ends,
        y_ends=y_ends,
        x_ticks=ticks(*x_ends),
        y_ticks=ticks(*y_ends),
        words=words,
    )


def _padded(values: Sequence[int]) -> tuple[float, float]:
    """The ends of an axis, so that no bubble is cut."""
    room = 0.08 * (max(values) - min(values)) or 0.08 * max(values)
    return max(0.0, min(values) - room), max(values) + room


def _binned(widths: np.ndarray, heights: np.ndarray) -> dict[tuple[float, float], int]:
    counts, xs, ys = np.histogram2d(widths, heights, bins=_GRID)
    return {
        (round((xs[i] + xs[i + 1]) / 2), round((ys[j] + ys[j + 1]) / 2)): int(counts[i, j])
        for i, j in np.argwhere(counts > 0).tolist()
    }
