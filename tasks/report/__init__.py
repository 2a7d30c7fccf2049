"""report: what was compared, which method is best and what it looks like: HTML pages, CSV and Markdown.

It computes nothing but averages and ranks: every figure comes out of a run record, every picture out of stored outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.registry import METHODS
from storage.errors import StorageError
from storage.records import RunRecord, read_records
from storage.store import Store
from tasks.handles import Category
from tasks.report import export, pictures, tables
from tasks.report.data import PAGE, Judged, data_report, write_data_page
from tasks.report.export import result_table_markdown
from tasks.report.page import environment, write_whole
from tasks.report.pictures import Evaluation, Gallery, sample_picture
from tasks.report.tables import Column, Ranking, Variant, Verdict
from tasks.validate import findings

__all__ = ["Judged", "data_report", "render", "report", "result_table_markdown", "sample_picture", "write_data_page"]

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
    verdict: Verdict | None
    """None: no verdict was stored."""
    data_differs: bool
    """Whether its cells were run on different images, which makes their figures not comparable."""


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
def report(store_url: str, out: str, cells: list[str] | None = None, judged: list[Judged] | None = None) -> str:
    """Write index.html, data.html, results.csv, results.md and findings.csv to the local folder `out`; the path of
    index.html.

    `cells` names the cells to show; None shows all of the store. The data page shows `judged` and the categories of
    the other cells. Raises Damaged for a record that is none.
    """
    store = Store(store_url)
    records = [record for record in read_records(store) if cells is None or record.cell in cells]
    pages = {
        "results.csv": export.results_csv(records),
        "results.md": export.results_markdown(records),
        "index.html": render(store, records),
    }
    folder = Path(out).absolute()
    write_data_page(store, folder, judged_of(store, records, judged or []))
    for name, text in pages.items():
        write_whole(folder / name, text)
    return str(folder / "index.html")


def judged_of(store: Store, records: Sequence[RunRecord], given: Sequence[Judged]) -> list[Judged]:
    """What is given, and the last verdict on the images of each other cell; by category."""
    found = {(one.category.name, one.images): one for one in given}
    for record in sorted(records, key=lambda record: record.finished, reverse=True):
        keys = record.keys
        if "images" in keys and "verdict" in keys:
            category = Category(store.url, record.dataset, record.category, "", keys.get("catalogue", ""), "")
            own = Judged(category, keys["images"], keys["verdict"], keys.get("suspects"))
            found.setdefault((category.name, own.images), own)
    return [found[place] for place in sorted(found)]


def render(store: Store, records: Sequence[RunRecord]) -> str:
    """The page: HTML that asks nothing of any other place."""
    found = tables.ranking(records)
    templates = environment()
    templates.filters.update(label=_label, when=_when)
    answer, support = tables.headline(found)
    return templates.get_template("template.html.j2").render(
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
        data_page=PAGE,
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
    keys = dict.fromkeys(record.keys["verdict"] for record in own if "verdict" in record.keys)
    verdicts = [found for key in keys if (found := _read_verdict(store, key)) is not None]
    data = {record.fingerprints["data"] for record in own if record.status == "done" and "data" in record.fingerprints}
    return CategoryView(
        name=tables.column_name(column, columns),
        counts=_in_order(next((record.counts for record in own if record.counts), {})),
        verdict=tables.merge_verdicts(verdicts) if verdicts else None,
        data_differs=len(data) > 1,
    )


def _read_verdict(store: Store, key: str) -> tuple[dict[str, Any], list[dict[str, str]]] | None:
    """Manifest and findings, or None when either is gone."""
    try:
        return store.get(key).meta, findings(store, key).to_dict("records")
    except (StorageError, OSError, KeyError, ValueError):  # Arrow's own errors are ValueErrors
        return None


def _in_order(counts: dict[str, int]) -> dict[str, int]:
    known = [name for name in _COUNTS if name in counts]
    return {name: counts[name] for name in known + sorted(counts.keys() - set(_COUNTS))}
