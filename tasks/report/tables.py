"""Figures of a report: ranks, means and published figures. Averages and ranks, nothing else."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from storage.records import RunRecord

METRICS: dict[str, str] = {
    "pro": "PRO",
    "pro_at_0.05": "PRO to 5 %",
    "pro_at_0.01": "PRO to 1 %",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel AP",
    "pixel_f1_max": "Pixel F1-max",
    "iou_max": "IoU max",
    "iou_at_threshold": "IoU at threshold",
    "image_auroc": "Image AUROC",
    "image_ap": "Image AP",
    "image_f1_max": "Image F1-max",
}
"""Names of the metrics in a record and their headings, localization first."""
RANKED_BY = ("pro", "pixel_auroc", "image_auroc")
"""A category is ranked by the first of these that every finished method of it has."""
STEPS = ("ingest", "prepare", "validate", "extract", "fit", "calibrate", "predict", "evaluate")
PUBLISHED_DATASET = "mvtec_ad"
ABSENT = "–"

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
        found = {r.seed: r.metrics[metric] for r in self.cells(column) if r.status == "done" and metric in r.metrics}
        if not found:
            return None
        values = list(found.values())
        return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    def failed_in(self, column: Column) -> bool:
        """Whether it was tried in a category and no seed of it finished."""
        cells = self.cells(column)
        return bool(cells) and all(record.status == "failed" for record in cells)


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
    """Metrics in which it has the best mean of the methods that finished every category."""
    seconds: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True)
class Ranking:
    """Methods, best first."""

    rows: list[RankedRow]
    columns: list[Column]
    metrics: list[str]
    ranked_by: dict[Column, str]
    """The metric that decides a category; a category where none can is not in it."""


@dataclass(frozen=True)
class CategoryRow:
    """A method's figures of one metric, in fractions; the published ones in per cent, as printed in the survey."""

    variant: Variant
    values: list[Value | None]
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


@dataclass(frozen=True)
class Verdict:
    """What validation said of a category."""

    stop: list[str]
    """Why nothing can be learned in it."""
    findings: dict[str, list[Mapping[str, str]]]
    """Severity (`reject`, `warn`, `stop`) -> findings."""
    expectations: list[dict[str, Any]]


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
    found = []
    for (method, params), members in groups.items():
        chosen = json.loads(params)
        found.append(Variant(_variant_name(method, chosen, sets[method]), method, chosen, tuple(members)))
    return sorted(found, key=lambda variant: variant.name)


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
    best = {metric: _best(variants, columns, metric, means) for metric in metrics}
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
    for metric in RANKED_BY:
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
    """Who has the highest mean. A mean over fewer categories is not comparable, so it cannot win."""
    measured = [column for column in columns if any(v.value(column, metric) for v in variants)]
    whole = [v.name for v in variants if all(v.value(column, metric) for column in measured)]
    if not measured or not whole or len(variants) == 1:
        return frozenset()
    highest = max(means[name][metric].mean for name in whole)
    return frozenset(name for name in whole if means[name][metric].mean == highest)


def known_first(names: Iterable[str]) -> list[str]:
    """Names of metrics in their order, those without a heading last."""
    found = set(names)
    return [name for name in METRICS if name in found] + sorted(found - METRICS.keys())


def headline(found: Ranking) -> tuple[str, list[str]]:
    """The answer in one sentence, and the sentences that bear it out."""
    complete = [row for row in found.rows if row.rank is not None and len(row.places) == len(found.ranked_by)]
    if not found.rows:
        return "No cell has been run yet.", []
    if not found.ranked_by:
        if not any(row.finished for row in found.rows):
            return "Nothing finished: every cell failed, for the reasons below.", []
        return "These methods cannot be ranked: no image is known to be anomalous, so there is nothing to judge by.", []
    if not complete:
        return "No method was run in every category, so no best one can be named.", []
    winners = [row for row in complete if row.rank == complete[0].rank]
    if not any(row.finished for row in winners):
        return "Nothing finished: every cell failed, for the reasons below.", []
    if len(found.rows) == 1:
        return f"Only one method was run: {winners[0].variant.name}.", _support(found, winners, complete)
    names = " and ".join(row.variant.name for row in winners)
    return f"Best on this data: {names}{' (equal)' if len(winners) > 1 else ''}.", _support(found, winners, complete)


def _support(found: Ranking, winners: Sequence[RankedRow], complete: Sequence[RankedRow]) -> list[str]:
    first, judged = winners[0], list(dict.fromkeys(found.ranked_by.values()))
    count = len(found.ranked_by)
    by = " or ".join(METRICS[metric] for metric in judged)
    lines = [
        f"Average rank {first.rank:.2f} over {count} {'category' if count == 1 else 'categories'}, judged by {by}."
    ]
    means = [f"{METRICS[m]} {percent(v.mean)} %" for m, v in first.values.items() if m in RANKED_BY]
    lines.append(f"Its means: {', '.join(means)}.")
    if len(complete) > len(winners) == 1 and (lead := _lead(first, complete[1], judged[0])):
        lines.append(lead)
    lines += _at_threshold(first.variant)
    if first.failed_cells:
        lines.append(f"{first.failed_cells} of its {len(first.variant.records)} cells failed.")
    return lines


def _lead(first: RankedRow, second: RankedRow, metric: str) -> str | None:
    ours, theirs = first.values.get(metric), second.values.get(metric)
    if ours is None or theirs is None or first.finished != second.finished:
        return None
    points = 100 * (ours.mean - theirs.mean)
    spread = 100 * max(ours.spread or 0.0, theirs.spread or 0.0)
    name = second.variant.name
    if points < 0:
        return f"{name}, the next, has the higher mean {METRICS[metric]} (by {-points:.1f} points), but places lower."
    words = f"Its lead over the next, {name}, is {points:.1f} points of {METRICS[metric]}"
    return f"{words}: no more than the spread between seeds ({spread:.1f})." if points <= spread else f"{words}."


def _at_threshold(variant: Variant) -> list[str]:
    found = [record.calibration for record in variant.records if record.status == "done"]
    asked = [rate for c in found if (rate := (c.get("image") or {}).get("rate")) is not None]
    rejected = [rate for c in found if (rate := (c.get("realised") or {}).get("false_reject_rate")) is not None]
    missed = [rate for c in found if (rate := (c.get("realised") or {}).get("miss_rate")) is not None]
    if not asked or not rejected:
        return []
    words = f"Asked to reject {percent(statistics.fmean(asked))} % of good parts, it rejected "
    words += f"{percent(statistics.fmean(rejected))} % of the good test images"
    return [words + (f" and missed {percent(statistics.fmean(missed))} % of the anomalous ones." if missed else ".")]


def per_category(records: Sequence[RunRecord], metric: str) -> list[CategoryRow]:
    """The survey's table of one metric: a row a method, a column a category; empty when no record has the metric."""
    found = ranking(records)
    if metric not in found.metrics:
        return []
    highest = {
        c: max((v.mean for row in found.rows if (v := row.variant.value(c, metric))), default=None)
        for c in found.columns
    }
    rows = []
    for row in found.rows:
        values = [row.variant.value(column, metric) for column in found.columns]
        printed = _published_row(metric, row.variant.method, found.columns)
        whole = all(value is not None for value in printed)
        rows.append(
            CategoryRow(
                variant=row.variant,
                values=values,
                failed=[row.variant.failed_in(column) for column in found.columns],
                best=[
                    v is not None and v.mean == highest[c] and len(found.rows) > 1
                    for v, c in zip(values, found.columns, strict=True)
                ],
                mean=row.values.get(metric),
                published=printed,
                published_mean=statistics.fmean(v for v in printed if v is not None) if whole else None,
                published_all=_published_all(metric, row.variant.method, found.columns),
            )
        )
    return rows


def _published_row(metric: str, method: str, columns: Sequence[Column]) -> list[float | None]:
    figures = published(metric).get(method, {})
    return [figures.get(category) if dataset == PUBLISHED_DATASET else None for dataset, category in columns]


def _published_all(metric: str, method: str, columns: Sequence[Column]) -> float | None:
    known = set(_survey(f"{metric}.csv")[0]) if metric in ("pixel_auroc", "pro") else set()
    bears_on = any(dataset == PUBLISHED_DATASET and category in known for dataset, category in columns)
    return published(metric).get(method, {}).get("mean") if bears_on else None


@cache
def published(metric: str) -> dict[str, dict[str, float]]:
    """Method -> category (and `mean`) -> per cent, as the survey prints them; empty for metrics it does not print."""
    if metric not in ("pixel_auroc", "pro"):
        return {}
    found: dict[str, dict[str, float]] = {}
    for row in _survey(f"{metric}.csv"):
        skipped = ("method", "family", "title", "survey_ref")
        found[row["method"]] = {name: float(value) for name, value in row.items() if value and name not in skipped}
    return found


@cache
def published_speed() -> dict[str, str]:
    """Method -> images a second as the survey's Table 13 prints it, with the backbone where it names one."""
    return {r["method"]: r["fps"] + (f" with {r['backbone']}" if r["backbone"] else "") for r in _survey("speed.csv")}


@cache
def _survey(name: str) -> list[dict[str, str]]:
    text = files("tasks.report").joinpath("survey", name).read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def merge_verdicts(verdicts: Iterable[tuple[Mapping[str, Any], Iterable[Mapping[str, str]]]]) -> Verdict:
    """Several verdicts on one category (one an image size), each its manifest and its findings, without repeats."""
    stop: dict[str, None] = {}
    findings: dict[str, dict[tuple[str, str], Mapping[str, str]]] = {}
    expectations: list[dict[str, Any]] = []
    for manifest, found in verdicts:
        if manifest.get("stop"):
            stop[manifest["stop"]] = None
        for finding in found:
            findings.setdefault(finding["severity"], {})[finding["key"], finding["reason"]] = finding
        expectations += [asked for asked in manifest.get("expectations") or [] if asked not in expectations]
    return Verdict(list(stop), {severity: list(found.values()) for severity, found in findings.items()}, expectations)


def by_reason(items: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Reason -> paths, the most frequent reason first."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item["reason"], []).append(item["path"] or "the category as a whole")
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def steps_of(records: Iterable[RunRecord]) -> list[str]:
    """Steps that took time, in their order."""
    found = {step for record in records for step in record.seconds}
    return [step for step in STEPS if step in found] + sorted(found - set(STEPS))


def percent(fraction: float | None) -> str:
    """A fraction as per cent with one decimal, or a dash."""
    return ABSENT if fraction is None else f"{100 * fraction:.1f}"
