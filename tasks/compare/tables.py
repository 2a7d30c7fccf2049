"""Ranks and means of methods over categories. Averages and ranks, nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from storage.records import RunRecord
from tasks.compare.variants import Column, Value, Variant, columns_of, variants_of

METRICS: dict[str, str] = {
    "pro": "PRO",
    "pro_at_0.05": "PRO to 5 %",
    "pro_at_0.01": "PRO to 1 %",
    "aupimo": "AUPIMO",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "iou_max": "IoU max",
    "boundary_f": "Boundary F",
    "spro_at_0.3": "sPRO to 30 %",
    "spro_at_0.05": "sPRO to 5 %",
    "spro_at_0.01": "sPRO to 1 %",
    "precision_at_threshold": "Precision at threshold",
    "recall_at_threshold": "Recall at threshold",
    "fpr_at_threshold": "FPR at threshold",
    "iou_at_threshold": "IoU at threshold",
    "boundary_f_at_threshold": "Boundary F at threshold",
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
}
"""Names of the metrics in a record and their headings, localization first."""
RANKING_SHOWS = (
    "pro",
    "pro_at_0.05",
    "aupimo",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1_max",
    "iou_max",
    "boundary_f",
    "spro_at_0.05",
    "image_auroc",
    "image_ap",
    "image_f1_max",
)
"""What the ranking has columns for, where it was measured; all of them are higher when better."""
BY_CATEGORY = ("pixel_auroc", "pro", "image_auroc")
"""What has a table with a column a category."""
DECIDING = ("pro", "pixel_auroc", "image_auroc")
"""The metrics that methods are compared in; a category is ranked by the first that every finished method of it has."""
STEPS = ("ingest", "prepare", "validate", "extract", "fit", "calibrate", "predict", "evaluate")
ABSENT = "–"


@dataclass(frozen=True)
class RankedRow:
    """A line of the ranking."""

    variant: Variant
    rank: float | None
    """Mean over categories of the place in the category; a failed category counts as the last place."""
    places: dict[Column, float]
    finished: int
    """Categories with at least one finished seed."""
    failed_cells: int
    values: dict[str, Value]
    best: frozenset[str]
    """Metrics of the table in which it has the best mean of the methods that finished every category."""
    seconds: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class Ranking:
    """Methods, best first."""

    rows: list[RankedRow]
    columns: list[Column]
    metrics: list[str]
    """All that were measured."""
    ranked_by: dict[Column, str]
    """The metric that decides a category; a category where none can is not in it."""

    @property
    def shown(self) -> list[str]:
        """The metrics that the table of the ranking shows."""
        return [metric for metric in RANKING_SHOWS if metric in self.metrics]

    @property
    def complete(self) -> list[RankedRow]:
        """Methods that have a place in every category."""
        return [row for row in self.rows if row.rank is not None and len(row.places) == len(self.ranked_by)]

    @property
    def winners(self) -> list[RankedRow]:
        """The complete ones with the best rank; several when it is equal, none when nobody has been everywhere."""
        return [row for row in self.complete if row.rank == self.complete[0].rank]


def ranks(values: Mapping[str, float | None]) -> dict[str, float]:
    """Place of each name, 1 = highest value; equal values share the mean of their places; None (failed) is last."""
    order = sorted(values, key=lambda name: (values[name] is None, -(values[name] or 0.0)))
    places: dict[str, float] = {}
    for name in order:
        tied = [position for position, other in enumerate(order, start=1) if values[other] == values[name]]
        places[name] = statistics.fmean(tied)
    return places


def ranking(records: Sequence[RunRecord]) -> Ranking:
    """Methods by their average place over the categories."""
    variants, columns = variants_of(records), columns_of(records)
    metrics = known_first({name for record in records for name in record.metrics})
    deciding = {column: metric for column in columns if (metric := _deciding(variants, column)) is not None}
    places: dict[str, dict[Column, float]] = {variant.name: {} for variant in variants}
    for column, metric in deciding.items():
        tried = {v.name: _mean_of(v.value(column, metric)) for v in variants if v.cells(column)}
        for name, place in ranks(tried).items():
            places[name][column] = place
    means = {v.name: {metric: mean for metric in metrics if (mean := _mean(v, columns, metric))} for v in variants}
    best = {metric: _best(variants, columns, metric, means) for metric in metrics if metric in RANKING_SHOWS}
    rows = [_ranked_row(v, columns, places[v.name], means[v.name], best) for v in variants]
    rows.sort(key=lambda row: (row.rank is None, row.rank or 0.0, row.variant.name))
    return Ranking(rows, columns, metrics, deciding)


def _ranked_row(
    variant: Variant,
    columns: Sequence[Column],
    places: dict[Column, float],
    values: dict[str, Value],
    best: Mapping[str, frozenset[str]],
) -> RankedRow:
    done = [record for record in variant.records if record.status == "done"]
    return RankedRow(
        variant=variant,
        rank=statistics.fmean(places.values()) if places else None,
        places=places,
        finished=sum(any(r.status == "done" for r in variant.cells(column)) for column in columns),
        failed_cells=len(variant.records) - len(done),
        values=values,
        best=frozenset(metric for metric, names in best.items() if variant.name in names),
        seconds=statistics.fmean(sum(r.seconds.values()) for r in done) if done else None,
        peak_memory_mb=max(r.peak_memory_mb for r in done) if done else None,
    )


def _deciding(variants: Sequence[Variant], column: Column) -> str | None:
    finished = [v for v in variants if v.cells(column) and not v.failed_in(column)]
    for metric in DECIDING:
        if finished and all(v.value(column, metric) is not None for v in finished):
            return metric
    return None


def _mean(variant: Variant, columns: Sequence[Column], metric: str) -> Value | None:
    values = [value for column in columns if (value := variant.value(column, metric)) is not None]
    if not values:
        return None
    spreads = [value.spread for value in values if value.spread is not None]
    return Value(statistics.fmean(v.mean for v in values), statistics.fmean(spreads) if spreads else None)


def _mean_of(value: Value | None) -> float | None:
    return None if value is None else value.mean


def _best(
    variants: Sequence[Variant], columns: Sequence[Column], metric: str, means: Mapping[str, Mapping[str, Value]]
) -> frozenset[str]:
    """The methods with the highest mean. A mean over fewer categories is not comparable, so it cannot win."""
    measured = [column for column in columns if any(v.value(column, metric) for v in variants)]
    whole = [v.name for v in variants if all(v.value(column, metric) for column in measured)]
    if not measured or not whole or len(variants) == 1:
        return frozenset()
    highest = max(means[name][metric].mean for name in whole)
    return frozenset(name for name in whole if means[name][metric].mean == highest)


def known_first(names: Iterable[str]) -> list[str]:
    """Names of metrics in their order, those without a heading last."""
    given = set(names)
    return [name for name in METRICS if name in given] + sorted(given - METRICS.keys())


def grouped(metrics: Iterable[str]) -> dict[str, list[str]]:
    """Metrics by what they judge, in their order: maps, maps at the calibrated threshold, and images."""
    groups: dict[str, list[str]] = {"Maps": [], "Maps at the pixel threshold": [], "Images": []}
    for metric in metrics:
        where = "Maps at the pixel threshold" if metric.endswith("_at_threshold") else "Maps"
        groups["Images" if metric.startswith("image_") else where].append(metric)
    return {name: own for name, own in groups.items() if own}


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction as per cent, or a dash."""
    return ABSENT if fraction is None else f"{100 * fraction:.{digits}f}"
