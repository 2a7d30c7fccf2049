"""Methods over all categories: average ranks, whether they differ at all, and the critical-difference diagram."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from al_models.metrics.ranks import FEWEST_METHODS, FEWEST_ROWS, Ranking, rank_methods
from tasks.compare.variants import Column, Variant

# All in units of the picture, in which a letter is 11 high.
_LETTER = 6.6
"""Width of a letter, on the safe side."""
_LONGEST = 40
"""A longer name is cut; it stays whole in its title."""
_ROW = 15.0
_BAR = 6.0
_AXIS_WIDTH = 420.0
_AXIS_Y = 52.0
_MOST_TICKS = 13


@dataclass(frozen=True)
class Name:
    """A method in the diagram: its place on the axis, and where its name stands."""

    text: str
    """Name and average rank, as it is drawn."""
    title: str
    """The whole name."""
    at: float
    """x of its rank."""
    x: float
    """Where its line ends; the name goes on outwards from there."""
    y: float
    left: bool
    """Whether it stands on the left, where the better half does."""


@dataclass(frozen=True)
class Diagram:
    """A critical-difference diagram, laid out."""

    width: float
    height: float
    start: float
    end: float
    """x of rank 1 and of the last rank."""
    y: float
    """y of the axis."""
    ticks: list[tuple[float, str]]
    names: list[Name]
    bars: list[tuple[float, float, float]]
    """From x, to x, at y: over methods that cannot be told apart."""
    ruler: tuple[float, float, str]
    """From x, to x, what stands over it: the critical difference."""


@dataclass(frozen=True)
class Across:
    """One metric over the categories."""

    metric: str
    ranking: Ranking
    diagram: Diagram | None
    """None when there is no test; `ranking.reason` says why."""
    left_out: list[str]
    """Methods that are not ranked, for they miss a value in some category (or in each)."""


def over_categories(variants: Sequence[Variant], columns: Sequence[Column], metric: str) -> Across | None:
    """The methods ranked over the categories in which anybody has the metric; None with fewer than two of those.

    Seeds are averaged. A category counts when all ranked methods have a value in it; where methods that failed leave
    too few such categories, the methods that have a value in each are ranked, and the others named.
    """
    values = np.array([[_value(variant, column, metric) for variant in variants] for column in columns])
    values = values[~np.isnan(values).all(axis=1)] if values.size else values.reshape(0, 0)  # (categories, methods)
    if len(values) < FEWEST_ROWS:
        return None
    chosen = ~np.isnan(values).all(axis=0)
    if (~np.isnan(values[:, chosen]).any(axis=1)).sum() < FEWEST_ROWS:
        everywhere = ~np.isnan(values).any(axis=0)
        chosen = everywhere if everywhere.sum() >= FEWEST_METHODS else chosen
    names = [variant.name for variant in variants]
    ranked = rank_methods(values[:, chosen], [name for name, one in zip(names, chosen, strict=True) if one])
    left_out = [name for name, one in zip(names, chosen, strict=True) if not one]
    return Across(metric, ranked, None if ranked.groups is None else layout(ranked), left_out)


def _value(variant: Variant, column: Column, metric: str) -> float:
    value = variant.value(column, metric)
    return math.nan if value is None else value.mean


def layout(ranking: Ranking) -> Diagram:
    """Where everything stands: the axis above, then the bars, then the names in two columns, each on a line of its own.

    The better half hangs on the left, best above, the others on the right, worst above: so no two lines cross. The
    ranking must be tested. The picture grows with the number of methods and the longest name.
    """
    count = len(ranking.methods)
    texts = [_text(name, rank) for name, rank in zip(ranking.methods, ranking.average_ranks, strict=True)]
    # At least a quarter of the axis: the ruler starts at rank 1 and may be longer than the axis.
    margin = max(0.3 * _AXIS_WIDTH, max(map(len, texts)) * _LETTER + 14)
    start, end = margin, margin + _AXIS_WIDTH

    def x(rank: float) -> float:
        return start + (rank - 1) / (count - 1) * _AXIS_WIDTH

    at = {name: x(rank) for name, rank in zip(ranking.methods, ranking.average_ranks, strict=True)}
    bars, lanes = _bars([(at[group[0]], at[group[-1]]) for group in ranking.groups or ()])
    top, half = _AXIS_Y + 14 + lanes * _BAR + 10, (count + 1) // 2
    names = []
    for place, (name, text) in enumerate(zip(ranking.methods, texts, strict=True)):
        left = place < half
        y = top + _ROW * (place if left else count - 1 - place)
        names.append(Name(text, name, at[name], start - 8 if left else end + 8, y, left))
    apart = ranking.critical_difference or 0.0
    return Diagram(
        width=2 * margin + _AXIS_WIDTH,
        height=top + _ROW * half,
        start=start,
        end=end,
        y=_AXIS_Y,
        ticks=[(x(rank), str(rank)) for rank in _ticks(count)],
        names=names,
        bars=bars,
        ruler=(start, x(1 + apart), f"critical difference {apart:.2f}"),
    )


def _text(name: str, rank: float) -> str:
    return f"{name if len(name) <= _LONGEST else name[: _LONGEST - 1] + '…'} {rank:.2f}"


def _ticks(count: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, count) if (count - 1) / step < _MOST_TICKS)
    inner = [rank for rank in range(step, count, step) if rank > 1 and count - rank > step / 2]
    return [1, *inner, count]


def _bars(spans: Sequence[tuple[float, float]]) -> tuple[list[tuple[float, float, float]], int]:
    """Bars a little longer than their spans, in as few lanes as none touches another in."""
    ends: list[float] = []
    bars = []
    for start, end in sorted(spans):
        lane = next((lane for lane, taken in enumerate(ends) if taken < start - 8), len(ends))
        ends[lane : lane + 1] = [end]
        bars.append((start - 3, end + 3, _AXIS_Y + 14 + lane * _BAR))
    return bars, len(ends)
