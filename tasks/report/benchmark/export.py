"""A report's results for other programs and for reading without a browser: CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from storage.records import RunRecord
from tasks.compare.answer import heading
from tasks.compare.comparison import BETTER, EQUAL, UNKNOWN, Contest
from tasks.compare.costs import steps_of
from tasks.compare.tables import ABSENT, BY_CATEGORY, METRICS, known_first, percent, ranking
from tasks.compare.variants import Column, Value, column_name, column_of, columns_of
from tasks.core.markdown import escaped, markdown_table
from tasks.report.benchmark.by_category import CategoryRow, per_category

_INTERVALS_UP_TO = 6
"""With more categories a Markdown table of intervals cannot be read."""


def results_csv(records: Sequence[RunRecord]) -> str:
    """One row a cell: what ran, how it ended, metrics (fractions) with the ends of their 95 % intervals, seconds by
    step, memory, parameters (JSON)."""
    metrics = known_first({name for record in records for name in record.metrics})
    certain = known_first({name for record in records for name in record.intervals})
    steps = steps_of(records)
    counts = sorted({name for record in records for name in record.counts})
    head = ["dataset", "category", "method", "seed", "status", "reason", *metrics]
    head += [f"{name}_{end}" for name in certain for end in ("low", "high")]
    head += [f"seconds_{step}" for step in steps] + ["peak_memory_mb", *(f"n_{name}" for name in counts)]
    head += ["threshold", "asked_false_reject_rate", "false_reject_rate", "miss_rate", "params", "cell", "finished"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for r in records:
        image, realised = r.calibration.get("image") or {}, r.calibration.get("realised") or {}
        row: list[Any] = [r.dataset, r.category, r.method, r.seed, r.status, r.reason]
        row += [r.metrics.get(name) for name in metrics]
        row += [(r.intervals.get(name) or {}).get(end) for name in certain for end in ("low", "high")]
        row += [r.seconds.get(step) for step in steps]
        row += [r.peak_memory_mb, *(r.counts.get(name) for name in counts), image.get("value"), image.get("rate")]
        row += [realised.get("false_reject_rate"), realised.get("miss_rate")]
        writer.writerow([*row, json.dumps(r.params, sort_keys=True), r.cell, r.finished])
    return buffer.getvalue()


def results_markdown(
    records: Sequence[RunRecord],
    answer: str,
    support: Sequence[str],
    contests: Mapping[Column, Sequence[Contest]],
) -> str:
    """The answer, the ranking, the tables by category, which differences are certain and the failures, for reading
    without a browser."""
    columns = columns_of(records)
    parts = ["# Anomaly localization: results", escaped(" ".join([answer, *support])), "## Ranking"]
    parts.append(result_table_markdown(records))
    for metric in BY_CATEGORY:
        rows = per_category(records, metric)
        if rows:
            parts += [f"## {METRICS[metric]} by category, %", _category_markdown(rows, columns)]
    if contests:
        parts += ["## Which differences are certain", _contests_markdown(contests, columns)]
    failed = [record for record in records if record.status == "failed"]
    if failed:
        rows_failed = [[r.method, "/".join(column_of(r)), str(r.seed), r.reason or ABSENT] for r in failed]
        parts += ["## Failed", markdown_table(["method", "category", "seed", "reason"], rows_failed)]
    return "\n\n".join(parts) + "\n"


def _contests_markdown(contests: Mapping[Column, Sequence[Contest]], columns: Sequence[Column]) -> str:
    head = ["category", "metric", "best", "better than", "cannot be told apart from", "not comparable"]
    rows = [
        [column_name(column, columns), heading(one.metric), one.best or ABSENT]
        + [", ".join(one.named(words)) or ABSENT for words in (BETTER, EQUAL, UNKNOWN)]
        for column, own in contests.items()
        for one in own
    ]
    return markdown_table(head, rows)


def result_table_markdown(records: Sequence[RunRecord]) -> str:
    """The ranking as a Markdown table; metrics in %, means over categories and seeds, the best in bold."""
    ranked = ranking(records)
    if not ranked.rows:
        return "No cell has been run yet."
    head = ["rank", "method", "categories finished", *(METRICS[m] for m in ranked.shown)]
    head += ["seconds a cell", "peak memory, MB", "failed cells"]
    rows = []
    for row in ranked.rows:
        metrics = [_bold(_value(row.values.get(m)), m in row.best) for m in ranked.shown]
        rank = ABSENT if row.rank is None else f"{row.rank:.2f}"
        cost = [_number(row.seconds, "{:.1f}"), _number(row.peak_memory_mb, "{:.0f}"), str(row.failed_cells)]
        rows.append([rank, row.variant.name, f"{row.finished} of {len(ranked.columns)}", *metrics, *cost])
    return markdown_table(head, rows)


def _category_markdown(rows: Sequence[CategoryRow], columns: Sequence[Column]) -> str:
    lines = []
    for row in rows:
        ends = row.intervals if len(columns) <= _INTERVALS_UP_TO else [None] * len(columns)
        figures = [_value(value) + _interval(one) for value, one in zip(row.values, ends, strict=True)]
        figures = ["failed" if failed else text for text, failed in zip(figures, row.failed, strict=True)]
        figures = [_bold(text, best) for text, best in zip(figures, row.best, strict=True)]
        lines.append([row.variant.name, *figures, _value(row.mean)])
        if row.has_published:
            printed = [_number(value, "{:.1f}") for value in [*row.published, row.published_mean]]
            lines.append([f"{row.variant.method}, published, full data, other backbones", *printed])
    return markdown_table(["method", *(column_name(c, columns) for c in columns), "mean"], lines)


def _value(value: Value | None) -> str:
    if value is None or value.spread is None:
        return percent(None if value is None else value.mean)
    return f"{percent(value.mean)} ± {percent(value.spread)}"


def _interval(ends: Mapping[str, Any] | None) -> str:
    if ends is None or ends.get("low") is None:
        return ""
    return f" ({percent(ends['low'])} to {percent(ends['high'])})"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text
