"""What a run ended with, as the terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Column, Table

from flows.cli.terminal import console, errors, percent

if TYPE_CHECKING:
    from flows.benchmark import BenchmarkOutcome
    from flows.search import SearchOutcome

_SHOWN = ("image_auroc", "pixel_auroc", "pro", "iou_max")
"""Metrics of the table in the terminal; the report has all."""


def show(outcome: BenchmarkOutcome) -> None:
    """The ranking, what is doubtful of the data, and the cells that failed."""
    from tasks.compare.tables import METRICS, ranking

    found = ranking(outcome.records)
    names = [name for name in _SHOWN if name in found.metrics]
    figures = [Column(head, no_wrap=True) for head in (*(METRICS[name] for name in names), "seconds", "peak MB")]
    table = Table("rank", Column("method", overflow="fold"), *figures, box=None)
    for row in found.rows:
        values = [percent(row.values[name].mean if name in row.values else None) for name in names]
        cost = ["–" if value is None else f"{value:.0f}" for value in (row.seconds, row.peak_memory_mb)]
        table.add_row("–" if row.rank is None else f"{row.rank:.3g}", row.variant.name, *values, *cost)
    console.print(table)
    tell(outcome.told)
    names_of = {record.cell: row.variant.name for row in found.rows for record in row.variant.records}
    several = len({record.seed for record in outcome.records}) > 1
    for record in outcome.records:
        if record.status == "failed":
            seed = f" seed {record.seed}" if several else ""
            cell = f"{names_of[record.cell]} {record.dataset}/{record.category}{seed}: {record.reason}"
            errors.print("[red]failed:[/red]", escape(cell), highlight=False, soft_wrap=True)
    console.print(f"report: {outcome.report}", soft_wrap=True, highlight=False)


def tell(lines: list[str]) -> None:
    """What is doubtful or left out of the data."""
    for line in lines:
        errors.print("[yellow]data:[/yellow]", escape(line), highlight=False, soft_wrap=True)


def show_search(outcome: SearchOutcome) -> None:
    """The trials of each search, what was chosen, and how that fared on the test set."""
    for searched in outcome.searched:
        rows = list(searched.rows())
        shown = [name for name in rows[0] if name != "failed"]
        table = Table(*(Column(name, overflow="fold") for name in shown), box=None)
        for row in rows:
            table.add_row(*(str(row[name]) for name in shown))
            if row["failed"]:
                errors.print(
                    "[red]failed:[/red]",
                    escape(f"{row['parameters']}: {row['failed']}"),
                    highlight=False,
                    soft_wrap=True,
                )
        console.print(table)
    for name, reason in outcome.unusable.items():
        errors.print("[red]not searched on:[/red]", escape(f"{name}: {reason}"), highlight=False, soft_wrap=True)
    console.print(f"trials: {outcome.table}", soft_wrap=True, highlight=False)
    if outcome.run_file is None:
        errors.print("[red]nothing chosen:[/red] no trial came through", highlight=False)
    else:
        console.print(f"chosen: {outcome.run_file}", soft_wrap=True, highlight=False)
    if outcome.compared is not None:
        show(outcome.compared)
    elif outcome.run_file is not None:
        console.print(f"on the test set: al benchmark {outcome.run_file}", soft_wrap=True, highlight=False)
