"""report: what was compared, which method is best and what it looks like: HTML pages, CSV and Markdown.

It judges nothing anew: every figure comes out of a run record, every interval and comparison out of the replicates that
evaluation left, every picture out of stored outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.registry import METHODS
from storage.records import RunRecord, read_records
from storage.store import Store
from storage.whole import write_whole
from tasks.compare import costs, tables
from tasks.compare.methods import Compared, compare_methods
from tasks.compare.tables import Ranking
from tasks.compare.variants import Variant, column_name
from tasks.core import heat
from tasks.core.handles import Category
from tasks.report.benchmark import evaluation, export, thresholds
from tasks.report.benchmark.by_category import per_category
from tasks.report.benchmark.evaluation import Evaluation
from tasks.report.benchmark.pictures import Gallery, evidence_scale, read_gallery
from tasks.report.benchmark.thresholds import Promise
from tasks.report.benchmark.training import Losses, losses_of
from tasks.report.benchmark.verdicts import by_reason, category_view
from tasks.report.data.report import PAGE, Judged, write_data_page
from tasks.report.page import environment
from tasks.report.survey.published import published_speed

_OPEN_UP_TO = 6
"""With more cells than this they are folded, so that the page stays a page."""


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
        return evaluation.image_threshold(self.record)

    @property
    def deciding(self) -> Promise | None:
        """The image threshold that decides, and what it did."""
        return thresholds.deciding(self.record)

    @property
    def losses(self) -> Losses | None:
        """How its training went; None where nothing was trained."""
        return losses_of(self.record)

    @property
    def promises(self) -> list[Promise]:
        """All asked rates, at both levels."""
        return thresholds.promises(self.record)

    @property
    def interval_notes(self) -> dict[str, list[str]]:
        """What is said of intervals -> of which metrics."""
        notes: dict[str, list[str]] = {}
        for metric in tables.known_first(self.record.intervals):
            if note := self.record.intervals[metric].get("note"):
                notes.setdefault(note, []).append(metric)
        return notes

    @property
    def evidence_limit(self) -> float:
        """Where -log10 p saturates in this cell."""
        return math.log10(self.gallery.n_held_out + 1)

    @property
    def evaluation_share(self) -> float | None:
        """Share of its seconds that evaluation took."""
        return costs.evaluation_share([self.record])


@task(name="report", task_run_name="report", cache_policy=NO_CACHE)
def report(store_url: str, out: str, cells: list[str] | None = None, judged: list[Judged] | None = None) -> str:
    """Write index.html, data.html, results.csv, results.md and findings.csv to the local folder `out`; the path of
    index.html.

    `cells` names the cells to show; None shows all of the store. The data page shows `judged` and the categories of
    the other cells. Raises Damaged for a record that is none.
    """
    store = Store(store_url)
    records = [record for record in read_records(store) if cells is None or record.cell in cells]
    compared = compare_methods(store, records)
    pages = {
        "results.csv": export.results_csv(records),
        "results.md": export.results_markdown(records, compared.answer, compared.support, compared.contests),
        "index.html": render(store, records, compared),
    }
    folder = Path(out).absolute()
    write_data_page(store, folder, judged_of(store, records, judged or []))
    for name, text in pages.items():
        write_whole(folder / name, text)
    return str(folder / "index.html")


def judged_of(store: Store, records: Sequence[RunRecord], given: Sequence[Judged]) -> list[Judged]:
    """The judgements that are given, and the last verdict on the images of each other cell; by category."""
    by_images = {(one.category.name, one.images): one for one in given}
    for record in sorted(records, key=lambda record: record.finished, reverse=True):
        keys = record.keys
        if "images" in keys and "verdict" in keys:
            category = Category(store.url, record.dataset, record.category, "", keys.get("catalogue", ""), "")
            own = Judged(category, keys["images"], keys["verdict"], keys.get("suspects"))
            by_images.setdefault((category.name, own.images), own)
    return [by_images[place] for place in sorted(by_images)]


def render(store: Store, records: Sequence[RunRecord], compared: Compared | None = None) -> str:
    """The page: HTML that asks nothing of any other place."""
    ranking = tables.ranking(records)
    templates = environment()
    templates.filters.update(label=_label, when=_when)
    scale = evidence_scale(records)
    return templates.get_template("benchmark/template.html.j2").render(
        compared=compared or compare_methods(store, records),
        records=records,
        failed=[record for record in records if record.status == "failed"],
        ranking=ranking,
        column_names={column: column_name(column, ranking.columns) for column in ranking.columns},
        by_category={name: per_category(records, name) for name in tables.BY_CATEGORY},
        metric_groups=tables.grouped(ranking.metrics),
        cells=_cells(store, records, ranking, scale),
        evidence=scale,
        open_cells=len(records) <= _OPEN_UP_TO,
        categories=[category_view(store, records, column, ranking.columns) for column in ranking.columns],
        by_reason=by_reason,
        data_page=PAGE,
        steps=costs.steps_of(records),
        evaluation_share=costs.evaluation_share(records),
        longest=max((sum(record.seconds.values()) for record in records), default=0.0),
        speed={r.variant.method: s for r in ranking.rows if (s := published_speed().get(r.variant.method))},
        registry=METHODS,
        versions=sorted({f"{name} {version}" for record in records for name, version in record.versions.items()}),
        hardware=sorted({record.hardware for record in records if record.hardware}),
        finished=sorted(record.finished for record in records if record.finished),
        heat_colours=[f"rgb{colour}" for colour in heat.HEAT],
        outline=f"rgb{heat.OUTLINE}",
        inspected=evaluation.inspected,
    )


def _label(metric: str) -> str:
    return tables.METRICS.get(metric, metric)


def _when(iso: str) -> str:
    """`2026-11-22T14:01:11Z` as people read it; anything else as it is."""
    return f"{iso[:10]} {iso[11:16]} UTC" if len(iso) > 16 and iso[10] == "T" else iso


def _cells(store: Store, records: Sequence[RunRecord], ranking: Ranking, evidence: heat.Scale | None) -> list[CellView]:
    """Finished cells by category, the best method first."""
    side = _side(len(records))
    views = []
    for column in ranking.columns:
        for row in ranking.rows:
            for record in row.variant.cells(column):
                if record.status == "done":
                    left = evaluation.read_evaluation(store, record)
                    gallery = read_gallery(store, record, left.rows, side, evidence)
                    views.append(CellView(record, row.variant, left, gallery))
    return views


def _side(cells: int) -> int:
    """Pixels of a picture: about 300 kB a cell up to 30 cells, less where there are more."""
    return 256 if cells <= 30 else 160 if cells <= 100 else 96
