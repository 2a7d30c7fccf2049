"""Write the pages again from what a store holds: what was compared, and the nights of its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefect import flow
from prefect.states import Completed, State

from flows.runs.runfile import ReportRun
from flows.where.runners import ThreadsRunner
from flows.where.store import opened
from flows.where.watch import Watch
from storage.nights import decision_keys
from storage.store import Store
from tasks.report.benchmark.report import report as write
from tasks.report.nights.report import nights_report


@dataclass(frozen=True)
class PagesWritten:
    """The pages that were written."""

    report: str
    """Path of index.html."""
    nights: str | None = None
    """Path of nights.html; None where no night has been."""


@flow(name="report", flow_run_name="report {run.title}", task_runner=ThreadsRunner())
def report(run: ReportRun) -> State[PagesWritten]:
    """Compute nothing: read the records, and write the pages."""
    store = opened(run.store)
    with Watch(store, "report") as watch:
        outcome = pages(store, run.report)
        for path in filter(None, (outcome.report, outcome.nights)):
            watch.report(path)
    return Completed(data=outcome, message=f"see {outcome.report}")


def pages(store: Store, folder: str, write: Callable[[str, str], str] = write) -> PagesWritten:
    """Write them; `write`: the step, or its bare function where no Prefect runs."""
    index = write(store.url, folder)
    return PagesWritten(index, nights_report(store.url, folder) if decision_keys(store) else None)
