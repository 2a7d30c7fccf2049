"""Parameters to try, who goes on to the next rung, and who stands where: all that a search decides. Pure functions.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): every trial starts with a small share of the
resource, and the best 1/eta of them go on with eta times as much. Unlike in the paper the last rung, which has the
whole resource, is reached as soon as eta trials or fewer are left, so that the choice is made between some of them.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.records import RunRecord

_DIGITS = 3
"""Digits of a drawn number, so that people can read and repeat it."""
_TRIES = 100
"""Draws for each trial wanted, before a small space counts as used up."""


@dataclass(frozen=True)
class Interval:
    """Numbers to draw from, both ends included; whole ones where both ends are."""

    low: float
    high: float
    log: bool = False
    """Whether each order of magnitude is as likely as any other."""

    def draw(self, rng: random.Random) -> float:
        """A number of the interval; all but whole numbers have three digits."""
        # Random.random is the one method whose numbers Python promises to keep.
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        if isinstance(self.low, int) and isinstance(self.high, int):
            if not self.log:
                return self.low + int(rng.random() * (self.high - self.low + 1))
            value = float(round(math.exp(low + rng.random() * (high - low))))
            return int(min(self.high, max(self.low, value)))
        value = low + rng.random() * (high - low)
        value = float(f"{math.exp(value) if self.log else value:.{_DIGITS}g}")
        return min(float(self.high), max(float(self.low), value))


Space = Mapping[str, Sequence[Any] | Interval]
"""Parameter -> the values to try."""


def grid(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination, the last parameter changing fastest."""
    values = [list(each) for each in space.values() if not isinstance(each, Interval)]
    for chosen in itertools.product(*values):
        yield dict(zip(space, chosen, strict=True))


def draws(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """Combinations at random, without end: each parameter is drawn evenly, apart from the others."""
    rng = random.Random(seed)
    while True:
        yield {
            name: each.draw(rng) if isinstance(each, Interval) else each[int(rng.random() * len(each))]
            for name, each in space.items()
        }


def distinct(
    candidates: Iterator[dict[str, Any]], name: Callable[[dict[str, Any]], str], count: int | None = None
) -> list[dict[str, Any]]:
    """The first `count` (None: all) that differ by their name; fewer where a hundred draws for each bring no more."""
    kept: dict[str, dict[str, Any]] = {}
    for params in candidates if count is None else itertools.islice(candidates, count * _TRIES):
        kept.setdefault(name(params), params)
        if len(kept) == count:
            break
    return list(kept.values())


@dataclass(frozen=True)
class Rung:
    """A step of the ladder."""

    number: int
    trials: int
    """How many are tried here, at most."""
    share: float
    """Share of the whole resource; 1 in the last rung."""


def ladder(trials: int, eta: int) -> list[Rung]:
    """The rungs for so many trials: each has 1/eta of those before, rounded up; the last has eta or fewer."""
    sizes = [trials]
    while sizes[-1] > eta:
        sizes.append(-(-sizes[-1] // eta))
    last = len(sizes) - 1
    return [Rung(number, size, float(eta) ** (number - last)) for number, size in enumerate(sizes)]


@dataclass(frozen=True)
class Trial:
    """Parameters of a method that are tried."""

    number: int
    """Its place in the order of the search."""
    method: str
    params: dict[str, Any]
    """All that differ from the method's defaults, with the whole resource."""


@dataclass(frozen=True)
class Score:
    """How a trial did in a rung."""

    trial: Trial
    rung: Rung
    mean: float | None
    """Mean of the metric: over the seeds of a category, then over categories, each weighing the same."""
    spread: float | None
    """Standard deviation over seeds (n - 1), averaged over categories; None with a single seed."""
    failed: tuple[str, ...] = ()
    """The cells without a figure, and why."""

    @property
    def order(self) -> tuple[int, float, int]:
        """Smaller is better: whole before failed, then by the mean; of equals, the one that was named first."""
        return len(self.failed), math.inf if self.mean is None else -self.mean, self.trial.number


def score(trial: Trial, rung: Rung, records: Sequence[RunRecord], metric: str) -> Score:
    """A trial's score from the records of its cells in this rung."""
    values: dict[tuple[str, str], list[float]] = {}
    failed = []
    for record in records:
        if record.status == "done" and metric in record.metrics:
            values.setdefault((record.dataset, record.category), []).append(record.metrics[metric])
        else:
            failed.append(f"{record.category} seed {record.seed}: {record.reason or f'has no {metric}'}")
    spreads = [statistics.stdev(each) for each in values.values() if len(each) > 1]
    return Score(
        trial,
        rung,
        mean=statistics.fmean(statistics.fmean(each) for each in values.values()) if values else None,
        spread=statistics.fmean(spreads) if spreads else None,
        failed=tuple(failed),
    )


def survivors(scores: Sequence[Score], count: int) -> list[Trial]:
    """The best trials of a rung, in their own order; one with a failed cell does not go on."""
    whole = sorted((each for each in scores if not each.failed), key=lambda each: each.order)
    return sorted((each.trial for each in whole[:count]), key=lambda trial: trial.number)


def standings(scores: Sequence[Score]) -> list[Score]:
    """The last score of each trial, best first: whoever came further stands before those who did not."""
    last: dict[int, Score] = {}
    for each in scores:
        if each.trial.number not in last or each.rung.number > last[each.trial.number].rung.number:
            last[each.trial.number] = each
    return sorted(last.values(), key=lambda each: (-each.rung.number, each.order))


def winner(scores: Sequence[Score]) -> Score | None:
    """The best of the last rung, which has the whole resource; None where nobody came through."""
    first = next(iter(standings(scores)), None)
    return first if first is not None and first.rung.share == 1 and not first.failed else None


def trials_csv(tables: Sequence[tuple[str, str, Sequence[Score]]]) -> str:
    """A row a trial and rung, of each (resource, metric, scores) of a run: metrics are fractions, parameters JSON."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    head = ("method", "trial", "rung", "resource", "share", "metric", "mean", "spread", "chosen", "failed", "params")
    writer.writerow(head)
    for resource, metric, scores in tables:
        best = winner(scores)
        for each in scores:
            row = [each.trial.method, each.trial.number, each.rung.number, resource, f"{each.rung.share:.4g}", metric]
            row += [each.mean, each.spread, "yes" if each is best else "", "; ".join(each.failed)]
            writer.writerow([*row, json.dumps(each.trial.params, sort_keys=True)])
    return buffer.getvalue()
