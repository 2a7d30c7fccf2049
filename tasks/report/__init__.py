"""report: what was compared, which method is best and what it looks like: one HTML page, CSV and Markdown.

It computes nothing but averages and ranks: every figure comes out of a run record, every picture out of stored outputs.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.registry import METHODS
from storage.records import RunRecord, read_records
from storage.store import Store
from tasks.report import pictures, tables
from tasks.report.pictures import Evaluation, Gallery, sample_picture
from tasks.report.tables import Column, Ranking, Variant, result_table_markdown

__all__ = ["render", "report", "result_table_markdown", "sample_picture"]

_OPEN_UP_TO = 6
"""With more cells than this they are folded, so that the page stays a page."""

_COUNTS = ("train", "calibration", "test_good", "test_anomalous", "test_unknown", "set_aside", "without_mask")


@dataclass(frozen=True)
class CellView:
    """A cell as the page shows it."""

    record: RunRecord
    variant: Variant
    evaluation: Evaluation
    gallery: Gallery

    @property
    def threshold(self) -> float | None:
        """The calibrated image score."""
        return pictures.image_threshold(self.record)


@dataclass(frozen=True)
class CategoryView:
    """A category's images: how many, and what was set aside."""

    name: str
    counts: dict[str, int]
    verdict: dict[str, list[Any]] | None
    """None: no verdict was stored."""
    data_differs: bool
    """Whether its cells were run on different images, which makes their figures not comparable."""


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
def report(store_url: str, out: str, cells: list[str] | None = None) -> str:
    """Write index.html, results.csv and results.md to the local folder `out`; the path of index.html.

    `cells` names the cells to show; None shows all of the store. Raises Damaged for a record that is none.
    """
    store = Store(store_url)
    records = [record for record in read_records(store) if cells is None or record.cell in cells]
    pages = {
        "results.csv": tables.results_csv(records),
        "results.md": tables.results_markdown(records),
        "index.html": render(store, records),
    }
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        _replace(folder / name, text)
    return str(folder / "index.html")


def render(store: Store, records: Sequence[RunRecord]) -> str:
    """The page: HTML that asks nothing of any other place."""
    found = tables.ranking(records)
    environment = Environment(
        loader=PackageLoader("tasks", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=tables.percent, label=_label, when=_when)
    answer, support = tables.headline(found)
    return environment.get_template("template.html.j2").render(
        answer=answer,
        support=support,
        records=records,
        failed=[record for record in records if record.status == "failed"],
        ranking=found,
        column_names={column: tables.column_name(column, found.columns) for column in found.columns},
        by_category={name: tables.per_category(records, name) for name in ("pixel_auroc", "pro", "image_auroc")},
        cells=_cells(store, records, found),
        open_cells=len(records) <= _OPEN_UP_TO,
        categories=[_category(store, records, column, found.columns) for column in found.columns],
        by_reason=tables.by_reason,
        steps=tables.steps_of(records),
        longest=max((sum(record.seconds.values()) for record in records), default=0.0),
        speed={r.variant.method: s for r in found.rows if (s := tables.published_speed().get(r.variant.method))},
        registry=METHODS,
        versions=sorted({f"{name} {version}" for record in records for name, version in record.versions.items()}),
        hardware=sorted({record.hardware for record in records if record.hardware}),
        finished=sorted(record.finished for record in records if record.finished),
        heat_colours=[f"rgb{colour}" for colour in pictures.HEAT],
        outline=f"rgb{pictures.OUTLINE}",
        inspected=pictures.inspected,
    )


def _label(metric: str) -> str:
    return tables.METRICS.get(metric, metric)


def _when(iso: str) -> str:
    """`2026-11-22T14:01:11Z` as people read it; anything else as it is."""
    return f"{iso[:10]} {iso[11:16]} UTC" if len(iso) > 16 and iso[10] == "T" else iso


def _cells(store: Store, records: Sequence[RunRecord], found: Ranking) -> list[CellView]:
    """Finished cells by category, the best method first."""
    side = _side(len(records))
    views = []
    for column in found.columns:
        for row in found.rows:
            for record in row.variant.cells(column):
                if record.status == "done":
                    evaluation = pictures.read_evaluation(store, record)
                    gallery = pictures.read_gallery(store, record, evaluation.rows, side)
                    views.append(CellView(record, row.variant, evaluation, gallery))
    return views


def _side(cells: int) -> int:
    """Pixels of a picture: about 200 kB a cell up to 30 cells, less where there are more."""
    return 256 if cells <= 30 else 160 if cells <= 100 else 96


def _category(store: Store, records: Sequence[RunRecord], column: Column, columns: Sequence[Column]) -> CategoryView:
    own = [record for record in records if tables.column_of(record) == column]
    verdicts = [found.meta for record in own if (found := pictures.artifact(store, record, "verdict")) is not None]
    data = {record.fingerprints["data"] for record in own if record.status == "done" and "data" in record.fingerprints}
    return CategoryView(
        name=tables.column_name(column, columns),
        counts=_in_order(next((record.counts for record in own if record.counts), {})),
        verdict=tables.merge_verdicts(verdicts) if verdicts else None,
        data_differs=len(data) > 1,
    )


def _in_order(counts: dict[str, int]) -> dict[str, int]:
    known = [name for name in _COUNTS if name in counts]
    return {name: counts[name] for name in known + sorted(counts.keys() - set(_COUNTS))}


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a page."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        aside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
