"""The survey's tables: methods by categories, with the figures that the survey prints beside ours."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.records import RunRecord
from tasks.compare.tables import RankedRow, ranking
from tasks.compare.variants import Column, Value, Variant
from tasks.report.survey.published import PUBLISHED_DATASET, published


@dataclass(frozen=True)
class CategoryRow:
    """A method's figures of one metric, in fractions; the published ones in per cent, as printed in the survey."""

    variant: Variant
    values: list[Value | None]
    intervals: list[dict[str, Any] | None]
    """95 % intervals over images, as in the record; where there is a single seed."""
    failed: list[bool]
    best: list[bool]
    mean: Value | None
    published: list[float | None]
    published_mean: float | None
    """Mean over the categories shown, when all have one."""
    published_all: float | None
    """Mean over the 15 categories of MVTec AD, as printed."""

    @property
    def has_published(self) -> bool:
        """Whether the survey prints anything for it that bears on the data shown."""
        return self.published_all is not None or any(value is not None for value in self.published)


def per_category(records: Sequence[RunRecord], metric: str) -> list[CategoryRow]:
    """The survey's table of one metric: a row a method, a column a category; empty when no record has the metric."""
    ranked = ranking(records)
    if metric not in ranked.metrics:
        return []
    highest = {
        c: max((v.mean for row in ranked.rows if (v := row.variant.value(c, metric))), default=None)
        for c in ranked.columns
    }
    return [_category_row(row, metric, ranked.columns, highest if len(ranked.rows) > 1 else {}) for row in ranked.rows]


def _category_row(
    row: RankedRow, metric: str, columns: Sequence[Column], highest: Mapping[Column, float | None]
) -> CategoryRow:
    variant = row.variant
    values = [variant.value(column, metric) for column in columns]
    printed = _published_row(metric, variant.method, columns)
    whole = all(value is not None for value in printed)
    return CategoryRow(
        variant=variant,
        values=values,
        intervals=[variant.interval(column, metric) for column in columns],
        failed=[variant.failed_in(column) for column in columns],
        best=[v is not None and v.mean == highest.get(c) for v, c in zip(values, columns, strict=True)],
        mean=row.values.get(metric),
        published=printed,
        published_mean=statistics.fmean(v for v in printed if v is not None) if whole else None,
        published_all=_published_all(metric, variant.method, columns),
    )


def _published_row(metric: str, method: str, columns: Sequence[Column]) -> list[float | None]:
    figures = published(metric).get(method, {})
    return [figures.get(category) if dataset == PUBLISHED_DATASET else None for dataset, category in columns]


def _published_all(metric: str, method: str, columns: Sequence[Column]) -> float | None:
    known = {category for figures in published(metric).values() for category in figures}
    bears_on = any(dataset == PUBLISHED_DATASET and category in known for dataset, category in columns)
    return published(metric).get(method, {}).get("mean") if bears_on else None
