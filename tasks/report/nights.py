"""The morning page: what last night decided about each model and why, and how the nights before went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from storage.nights import Decision, read_decisions
from storage.store import Store
from tasks.report.page import environment, write_whole
from tasks.report.tables import METRICS
from tasks.report.trends import Trend, trends_of

PAGE = "nights.html"
_SHOWN = ("pro", "pixel_auroc", "image_auroc")
_NIGHTS = 60
"""Latest nights of a model that the page shows."""


@dataclass(frozen=True)
class Model:
    """A model's nights, the latest first."""

    name: str
    nights: list[Decision]

    @property
    def last(self) -> Decision:
        """Last night."""
        return self.nights[0]

    @property
    def metrics(self) -> list[tuple[str, str]]:
        """(metric, its name for people) that any of the nights has."""
        return [(m, METRICS.get(m, m)) for m in _SHOWN if any(m in night.metrics for night in self.nights)]

    @property
    def trends(self) -> list[Trend]:
        """Charts of its nights."""
        return trends_of(self.nights[::-1], self.metrics)


def nights_report(store_url: str, folder: str, names: Sequence[str]) -> str:
    """Write the page about these models, `data set/category`, as far as there are decisions; its path."""
    store = Store(store_url)
    models = [Model(name, list(read_decisions(store, name))[::-1][:_NIGHTS]) for name in names]
    page = Path(folder).resolve() / PAGE
    template = environment().get_template("nights.html.j2")
    write_whole(page, template.render(models=[model for model in models if model.nights]))
    return str(page)
