"""Cells grouped into what a table has rows and columns for: methods with their hyperparameters, and categories."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storage.records import RunRecord

Column = tuple[str, str]
"""(data set, category)."""


@dataclass(frozen=True)
class Value:
    """A mean, and how much it moves between seeds."""

    mean: float
    spread: float | None = None
    """Standard deviation over seeds (n - 1), averaged over categories; None with a single seed."""


@dataclass(frozen=True)
class Variant:
    """A method with one set of hyperparameters: a row of the tables."""

    name: str
    """The method, with the hyperparameters that differ where the method was run with several sets of them."""
    method: str
    params: dict[str, Any]
    records: tuple[RunRecord, ...]

    def cells(self, column: Column) -> list[RunRecord]:
        """Its cells of one category, one a seed."""
        return [record for record in self.records if column_of(record) == column]

    def value(self, column: Column, metric: str) -> Value | None:
        """Mean over the finished seeds of a category, or None."""
        values = [record.metrics[metric] for record in self.seeds(column, metric)]
        if not values:
            return None
        return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def seeds(self, column: Column, metric: str) -> list[RunRecord]:
        """Its finished cells of a category that have the metric, one a seed: those that `value` averages."""
        of_seed = {r.seed: r for r in self.cells(column) if r.status == "done" and metric in r.metrics}
        return list(of_seed.values())

    def interval(self, column: Column, metric: str) -> dict[str, Any] | None:
        """`low`, `high` and `note` of a category's only seed; None with several, or where none was recorded."""
        records = self.seeds(column, metric)
        return records[0].intervals.get(metric) if len(records) == 1 else None

    def failed_in(self, column: Column) -> bool:
        """Whether it was tried in a category and no seed of it finished."""
        cells = self.cells(column)
        return bool(cells) and all(record.status == "failed" for record in cells)


def column_of(record: RunRecord) -> Column:
    """The category of a record."""
    return (record.dataset, record.category)


def columns_of(records: Iterable[RunRecord]) -> list[Column]:
    """All categories, sorted."""
    return sorted({column_of(record) for record in records})


def column_name(column: Column, columns: Sequence[Column]) -> str:
    """The category; with its data set where there are several."""
    return column[1] if len({dataset for dataset, _ in columns}) == 1 else "/".join(column)


def variants_of(records: Sequence[RunRecord]) -> list[Variant]:
    """Cells grouped by method and hyperparameters, sorted by name."""
    groups: dict[tuple[str, str], list[RunRecord]] = {}
    for record in sorted(records, key=lambda r: (r.status != "done", r.method, r.seed)):
        groups.setdefault((record.method, _home(record, groups)), []).append(record)
    sets: dict[str, list[dict[str, Any]]] = {}
    for method, params in groups:
        sets.setdefault(method, []).append(json.loads(params))
    variants = []
    for (method, params), members in groups.items():
        chosen = json.loads(params)
        variants.append(Variant(_variant_name(method, chosen, sets[method]), method, chosen, tuple(members)))
    return sorted(variants, key=lambda variant: variant.name)


def _home(record: RunRecord, groups: Mapping[tuple[str, str], list[RunRecord]]) -> str:
    """The group a record belongs to. A cell that failed early may know only the parameters that were given."""
    own = json.dumps(record.params, sort_keys=True)
    if record.status == "done" or (record.method, own) in groups:
        return own
    fitting = []
    for method, params in groups:
        if method == record.method and record.params.items() <= json.loads(params).items():
            fitting.append(params)
    return fitting[0] if len(fitting) == 1 else own


def _variant_name(method: str, params: Mapping[str, Any], sets: Sequence[Mapping[str, Any]]) -> str:
    if len(sets) == 1:
        return method
    names = sorted({name for other in sets for name in other})
    differing = [name for name in names if any(other.get(name) != sets[0].get(name) for other in sets)]
    words = ", ".join(f"{name}={_plain(params[name])}" for name in differing if name in params)
    return f"{method} ({words or 'no parameters recorded'})"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
