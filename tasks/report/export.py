"""A report's results for other programs and for reading without a browser: CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from storage.records import RunRecord
from tasks.report.tables import (
    ABSENT,
    METRICS,
    CategoryRow,
    Column,
    Value,
    column_name,
    column_of,
    columns_of,
    headline,
    known_first,
    per_category,
    percent,
    ranking,
    steps_of,
)


def results_csv(records: Sequence[RunRecord]) -> str:
    """One row a cell: what ran, how it ended, metrics (fractions), seconds by step, memory, parameters (JSON)."""
    metrics = known_first({name for record in records for name in record.metrics})
    steps = steps_of(records)
    counts = sorted({name for record in records for name in record.counts})
    head = ["dataset", "category", "method", "seed", "status", "reason", *metrics]
    head += [f"seconds_{step}" for step in steps] + ["peak_memory_mb", *(f"n_{name}" for name in counts)]
    head += ["threshold", "asked_false_reject_rate", "false_reject_rate", "miss_rate", "params", "cell", "finished"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for r in records:
        image, realised = r.calibration.get("image") or {}, r.calibration.get("realised") or {}
        row: list[Any] = [r.dataset, r.category, r.method, r.seed, r.status, r.reason]
        row += [r.metrics.get(name) for name in metrics] + [r.seconds.get(step) for step in steps]
        row += [r.peak_memory_mb, *(r.counts.get(name) for name in counts), image.get("value"), image.get("rate")]
        row += [realised.get("false_reject_rate"), realised.get("miss_rate")]
        writer.writerow([*row, json.dumps(r.params, sort_keys=True), r.cell, r.finished])
    return buffer.getvalue()


def results_markdown(records: Sequence[RunRecord]) -> str:
    """The answer, the ranking, the tables by category and the failures, for reading without a browser."""
    answer, support = headline(ranking(records))
    parts = ["# Anomaly localization: results", _escaped(" ".join([answer, *support])), "## Ranking"]
    parts.append(result_table_markdown(records))
    for metric in ("pixel_auroc", "pro", "image_auroc"):
        rows = per_category(records, metric)
        if rows:
            parts += [f"## {METRICS[metric]} by category, %", _category_markdown(rows, columns_of(records))]
    failed = [record for record in records if record.status == "failed"]
    if failed:
        rows_failed = [[r.method, "/".join(column_of(r)), str(r.seed), r.reason or ABSENT] for r in failed]
        parts += ["## Failed", _markdown(["method", "category", "seed", "reason"], rows_failed)]
    return "\n\n".join(parts) + "\n"


def result_table_markdown(records: Sequence[RunRecord]) -> str:
    """The ranking as a Markdown table; metrics in %, means over categories and seeds, the best in bold."""
    found = ranking(records)
    if not found.rows:
        return "No cell has been run yet."
    head = ["rank", "method", "categories finished", *(METRICS.get(m, m) for m in found.metrics)]
    head += ["seconds a cell", "peak memory, MB", "failed cells"]
    rows = []
    for row in found.rows:
        metrics = [_bold(_value(row.values.get(m)), m in row.best) for m in found.metrics]
        rank = ABSENT if row.rank is None else f"{row.rank:.2f}"
        cost = [_number(row.seconds, "{:.1f}"), _number(row.peak_memory_mb, "{:.0f}"), str(row.failed_cells)]
        rows.append([rank, row.variant.name, f"{row.finished} of {len(found.columns)}", *metrics, *cost])
    return _markdown(head, rows)


def _category_markdown(rows: Sequence[CategoryRow], columns: Sequence[Column]) -> str:
    lines = []
    for row in rows:
        figures = ["failed" if f else _value(v) for v, f in zip(row.values, row.failed, strict=True)]
        figures = [_bold(text, best) for text, best in zip(figures, row.best, strict=True)]
        lines.append([row.variant.name, *figures, _value(row.mean)])
        if row.has_published:
            printed = [_number(value, "{:.1f}") for value in [*row.published, row.published_mean]]
            lines.append([f"{row.variant.method}, published, full data, other backbones", *printed])
    return _markdown(["method", *(column_name(c, columns) for c in columns), "mean"], lines)


def _value(value: Value | None) -> str:
    if value is None or value.spread is None:
        return percent(None if value is None else value.mean)
    return f"{percent(value.mean)} ± {percent(value.spread)}"


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else form.format(value)


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_escaped, head)) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(map(_escaped, row)) + " |" for row in rows]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Names come from folders: they must neither break the table nor become HTML where Markdown is rendered."""
    for given, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(given, safe)
    return text
