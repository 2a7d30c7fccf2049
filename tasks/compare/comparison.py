"""Which differences between methods are certain: the best method against each other one, paired on the same images.

Every cell left replicates of its metrics (`al_models.metrics.replicates`); those of two methods on the same images are
pairs. Nothing is counted again here. The best method is chosen by the images it is then compared on, which no p-value
accounts for, and which flatters it a little.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from al_models.metrics import Comparison, Replicates, compare
from al_models.metrics.ranks import holm
from storage.errors import StorageError
from storage.records import RunRecord
from storage.store import Store
from tasks.compare.tables import DECIDING, METRICS, Ranking
from tasks.compare.variants import Column, Variant

SURE = 0.05
"""A difference is called one when its p-value, corrected for the number of comparisons, is below."""
BETTER, WORSE, EQUAL, UNKNOWN = "better", "worse", "cannot be told apart", "not comparable"

Kept = Mapping[str, Mapping[str, Replicates] | str]
"""Cell -> the replicates of its metrics, or why it has none."""


@dataclass(frozen=True)
class Difference:
    """The best method against another one, best minus other."""

    name: str
    """The other method."""
    value: float | None
    """Its figure, in 0..1."""
    words: str
    """One of BETTER (the best is), WORSE, EQUAL and UNKNOWN."""
    points: float | None = None
    """In fractions of 1, like the interval; None when nothing was compared."""
    low: float | None = None
    high: float | None = None
    """95 % interval of this difference alone."""
    p_value: float | None = None
    """Two-sided, after Holm's correction over the comparisons of the contest."""
    note: str | None = None
    """Why it is not comparable, or why there is no interval."""


@dataclass(frozen=True)
class Contest:
    """All methods in one metric, in one category or over all."""

    metric: str
    best: str | None
    """The method that the others are compared with; None when no two can be compared."""
    value: float | None
    against: list[Difference]
    """Highest figure first; those without one last."""

    def named(self, words: str) -> list[str]:
        """The names of the methods with these words."""
        return [one.name for one in self.against if one.words == words]


# --- what the cells left ---


def read_kept(store: Store, records: Sequence[RunRecord]) -> Kept:
    """The replicates of what is compared, of all finished cells. What is lost or damaged becomes a sentence."""
    return {record.cell: _read(store, record) for record in records if record.status == "done"}


def _read(store: Store, record: RunRecord) -> dict[str, Replicates] | str:
    from tasks.evaluate.uncertainty import read_replicates  # loads torch, which the data page can do without

    try:
        replicates = read_replicates(store, record.keys.get("evaluation"))
    except (StorageError, OSError) as error:
        return f"its replicates could not be read ({error})"
    if not replicates:
        return "it left no replicates, as cells of earlier versions; run it again"
    return {metric: replicates[metric] for metric in DECIDING if metric in replicates}


def replicates_in(variant: Variant, column: Column, metric: str, kept: Kept) -> Replicates | str:
    """Replicates of a method in a category, averaged over its seeds; or why there are none."""
    seeds = variant.seeds(column, metric)
    if not seeds:
        return "it failed" if variant.failed_in(column) else "it has no such figure"
    of_seeds = []
    for record in seeds:
        own = kept.get(record.cell, {})
        if isinstance(own, str):
            return own
        if metric not in own:
            return "it left no replicates of this metric; run it again"
        of_seeds.append(own[metric])
    if len({one.images for one in of_seeds}) > 1:
        return "its seeds were judged on different images"
    return _mean(of_seeds, of_seeds[0].images)


def _mean(replicates: Sequence[Replicates], images: str) -> Replicates:
    """The mean of several metrics, replicate by replicate."""
    if len(replicates) == 1:
        return replicates[0]
    return Replicates(
        estimate=statistics.fmean(one.estimate for one in replicates),
        values=np.mean([one.values for one in replicates], axis=0),
        images=images,
    )


# --- contests ---


def contest(variants: Sequence[Variant], column: Column, metric: str, kept: Kept) -> Contest | None:
    """The best method in a category against each other one that was tried in it; None where nobody has the metric.

    The methods that most others share their images with are compared, the others named.
    """
    tried = [variant for variant in variants if variant.cells(column)]
    values = {v.name: value.mean for v in tried if (value := v.value(column, metric)) is not None}
    if not values:
        return None
    of_methods = {variant.name: replicates_in(variant, column, metric, kept) for variant in tried}
    best = _best_of_most({name: one for name, one in of_methods.items() if isinstance(one, Replicates)})
    return _against(metric, best, of_methods, values)


def overview(contests: Mapping[Column, Sequence[Contest]]) -> list[str]:
    """A sentence a metric: which methods are better than which in the only category, or how often one is the best."""
    every = [one for own in contests.values() for one in own]
    of_metric = {metric: [one for one in every if one.metric == metric] for metric in DECIDING}
    return [
        f"{METRICS[metric]}: {_told(own[0]) if len(own) == 1 else _counted(own)}."
        for metric, own in of_metric.items()
        if own
    ]


def _told(one: Contest) -> str:
    counts = {words: len(one.named(words)) for words in (BETTER, EQUAL, UNKNOWN)}
    parts = [f"{one.best} is better than {counts[BETTER]} of {len(one.against)}"] if one.best is not None else []
    parts += [f"{counts[EQUAL]} cannot be told apart from it"] if counts[EQUAL] else []
    return "; ".join(parts + ([f"{counts[UNKNOWN]} not comparable"] if counts[UNKNOWN] else []))


def _counted(contests: Sequence[Contest]) -> str:
    clear = sum(len(one.named(BETTER)) == len(one.against) for one in contests)
    equal = [len(one.named(EQUAL)) for one in contests if one.named(EQUAL)]
    unknown = sum(len(one.named(UNKNOWN)) for one in contests)
    parts = [f"in {clear} of {len(contests)} categories the best method is better than each other one"]
    if equal:
        many = f"{min(equal)}" if min(equal) == max(equal) else f"{min(equal)} to {max(equal)}"
        parts.append(f"in {len(equal)} of them {many} cannot be told apart from the best")
    return "; ".join(parts + ([f"{unknown} comparisons could not be made, as named below"] if unknown else []))


def overall(ranking: Ranking, kept: Kept) -> Contest | None:
    """The method with the best rank against the other ones that were tried everywhere, in the mean over all categories
    of what decides each; None without two such methods."""
    rows, metrics = ranking.complete, dict.fromkeys(ranking.ranked_by.values())
    if len(rows) < 2 or not ranking.ranked_by:
        return None
    means = {row.variant.name: _over_categories(row.variant, ranking.ranked_by, kept) for row in rows}
    values = {name: one.estimate for name, one in means.items() if isinstance(one, Replicates)}
    others = {name: one for name, one in means.items() if name not in [r.variant.name for r in ranking.winners[1:]]}
    return _against(" or ".join(metrics), rows[0].variant.name, others, values)


def _over_categories(variant: Variant, deciding: Mapping[Column, str], kept: Kept) -> Replicates | str:
    parts = []
    for column, metric in deciding.items():
        one = replicates_in(variant, column, metric, kept)
        if isinstance(one, str):
            return one if len(deciding) == 1 else f"in {column[1]}, {one}"
        parts.append(one)
    if len({one.values.shape for one in parts}) > 1:
        return "the categories have different numbers of replicates; run them again with one version"
    return _mean(parts, " ".join(one.images for one in parts))


def _best_of_most(of_methods: Mapping[str, Replicates]) -> str | None:
    groups: dict[str, list[str]] = {}
    for name, one in of_methods.items():
        groups.setdefault(one.images, []).append(name)
    leaders = [max(names, key=lambda name: of_methods[name].estimate) for names in groups.values()]
    return max(leaders, key=lambda n: (len(groups[of_methods[n].images]), of_methods[n].estimate), default=None)


def _against(
    metric: str, best: str | None, each: Mapping[str, Replicates | str], values: Mapping[str, float]
) -> Contest:
    first = each[best] if best is not None else "no two methods can be compared"
    compared: dict[str, Comparison | str] = {name: _paired(first, one) for name, one in each.items() if name != best}
    p_values = {n: c.p_value for n, c in compared.items() if isinstance(c, Comparison) and c.p_value is not None}
    corrected = dict(zip(p_values, holm(list(p_values.values())), strict=True))
    against = [_difference(name, values.get(name), one, corrected.get(name)) for name, one in compared.items()]
    against.sort(key=lambda one: (one.value is None, -(one.value or 0.0), one.name))
    return Contest(metric, best, None if best is None else values.get(best), against)


def _paired(first: Replicates | str, other: Replicates | str) -> Comparison | str:
    if isinstance(other, str):
        return other
    if isinstance(first, str):
        return f"of the best method: {first}"
    return "it was judged on different images" if first.images != other.images else compare(first, other)


def _difference(name: str, value: float | None, result: Comparison | str, p_value: float | None) -> Difference:
    if isinstance(result, str):
        return Difference(name, value, UNKNOWN, note=result)
    sure = p_value is not None and p_value < SURE
    words = EQUAL if not sure else BETTER if result.difference > 0 else WORSE
    return Difference(name, value, words, result.difference, result.low, result.high, p_value, result.note)
