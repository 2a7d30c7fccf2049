"""How the new images of a model looked, night by night: lines, bands and limits in the units of their axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storage.nights import Decision, Looks
from tasks.report.distributions import Tick, ticks

Point = tuple[int, float]
"""Night, counted from the first shown; value."""
_STATISTICS = ("score", "features", "brightness", "contrast", "sharpness")
_TITLES = {
    "score": "Scores of the new images",
    "features": "How unusual their features are",
    "brightness": "Their brightness",
    "contrast": "Their contrast",
    "sharpness": "Their sharpness",
}
_COLOURS = {"pro": "pro", "pixel_auroc": "pixel", "image_auroc": "image"}
_HIGHEST = 20.0
"""-log10 p from which on more says nothing more."""


@dataclass(frozen=True)
class Line:
    """One course."""

    name: str
    points: list[Point]
    css: str
    dots: bool = False
    """Whether nights are marked: those in between had no new images."""


@dataclass(frozen=True)
class Trend:
    """One chart."""

    title: str
    axis: str
    last: int
    """The last night; the first is 0."""
    low: float
    high: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    band: list[tuple[int, float, float]]
    """Night, lower and upper quartile of the new images."""
    words: str
    """The chart in words, for those who cannot see it."""


def trends_of(nights: Sequence[Decision], metrics: Sequence[tuple[str, str]]) -> list[Trend]:
    """The charts of a model's nights, the oldest first; none of what no night has. `metrics`: with their names for
    people."""
    last = max(1, len(nights) - 1)
    lines = [Line(label, _courses(nights, name), _COLOURS.get(name, "pro")) for name, label in metrics]
    trends = [_trend("The model in use", "%", lines, [], last, low=0.0)] if lines else []
    return trends + _of_new_images(nights, last)


def _courses(nights: Sequence[Decision], metric: str) -> list[Point]:
    return [(at, 100 * night.metrics[metric]) for at, night in enumerate(nights) if metric in night.metrics]


def _of_new_images(nights: Sequence[Decision], last: int) -> list[Trend]:
    seen = [(at, night.looks) for at, night in enumerate(nights) if night.looks is not None]
    if not seen:
        return []
    drift = [
        (at, min(_HIGHEST, max(-math.log10(max(one["adjusted"], 1e-300)) for one in night.drift)))
        for at, night in enumerate(nights)
        if night.drift
    ]
    trends = [_quartiles(name, seen, last) for name in _STATISTICS if any(name in looks.now for _, looks in seen)]
    trends.insert(1, _rejected(seen, last))
    if drift:
        alarm = Line("alarm", _each(seen, lambda looks: -math.log10(looks.alpha)), "threshold")
        trends.insert(
            0, _trend("Drift", "−log10 of the smallest p", [Line("drift", drift, "pixel", True), alarm], [], last, 0.0)
        )
    return trends


def _quartiles(name: str, seen: Sequence[tuple[int, Looks]], last: int) -> Trend:
    """Median and quartiles of a statistic beside the median of the images held out for the champion."""
    having = [(at, looks) for at, looks in seen if name in looks.now]
    lines = [
        Line("new images", _each(having, lambda looks: looks.now[name][1]), "pixel", True),
        Line("held-out images", _each(having, lambda looks: looks.before[name][1]), "pro"),
    ]
    limits = [(at, looks.threshold) for at, looks in having if looks.threshold is not None]
    if name == "score" and limits:
        lines.append(Line("threshold", limits, "threshold"))
    band = [(at, looks.now[name][0], looks.now[name][2]) for at, looks in having]
    return _trend(_TITLES[name], "", lines, band, last)  # the title says it, and four digits need the room


def _rejected(seen: Sequence[tuple[int, Looks]], last: int) -> Trend:
    """New good images above the threshold, against what it promises."""
    rejected = images = 0
    since: list[Point] = []
    for at, looks in seen:
        rejected, images = rejected + looks.rejected, images + looks.n
        since.append((at, 100 * rejected / images))
    lines = [
        Line("that night", _each(seen, lambda looks: 100 * looks.rejected / looks.n), "pixel", True),
        Line("all nights up to it", since, "pro"),
        Line("promised", _each(seen, lambda looks: 100 * looks.promised), "threshold"),
    ]
    return _trend("New good images rejected", "%", lines, [], last, low=0.0)


def _each(seen: Sequence[tuple[int, Looks]], of: Callable[[Looks], float]) -> list[Point]:
    return [(at, of(looks)) for at, looks in seen]


def _trend(
    title: str,
    axis: str,
    lines: list[Line],
    band: list[tuple[int, float, float]],
    last: int,
    low: float | None = None,
) -> Trend:
    values = [value for line in lines for _, value in line.points] + [end for _, *ends in band for end in ends]
    least, most = min(values) if low is None else low, max(values)
    room = 0.06 * (most - least) or 0.06 * abs(most) or 1.0
    least, most = least - room if low is None else low, most + room
    return Trend(
        title=title,
        axis=axis,
        last=last,
        low=least,
        high=most,
        x_ticks=[tick for tick in ticks(0, last) if tick[0] == int(tick[0])],
        y_ticks=ticks(least, most),
        lines=lines,
        band=band,
        words="; ".join(f"{line.name} {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines),
    )
