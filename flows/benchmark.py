"""The main job: data sets x categories x methods x seeds in, a ranked and pictured report out."""

from __future__ import annotations

from dataclasses import dataclass, field

from prefect import flow
from prefect.states import Completed, Failed, State

from flows.category import CategorySteps, first_failure, judged_of
from flows.runs.runfile import RunFile
from flows.sweep import Sweep
from flows.where.runners import ThreadsRunner, on_asked_runner
from flows.where.watch import Watch
from storage.records import RunRecord
from storage.store import Store
from tasks.report.benchmark.report import report
from tasks.report.data.report import Judged
from tasks.report.data.told import told


@dataclass(frozen=True)
class BenchmarkOutcome:
    """What a run ended with."""

    report: str
    """Path of index.html."""
    records: list[RunRecord]
    told: list[str] = field(default_factory=list)
    """What is doubtful or left out of the data."""

    @property
    def failed(self) -> int:
        """Cells that failed."""
        return sum(record.status == "failed" for record in self.records)


@flow(name="benchmark", flow_run_name="benchmark {run.title}", task_runner=ThreadsRunner())
def benchmark(run: RunFile) -> State[BenchmarkOutcome]:
    """Run every cell; a failed cell becomes a record with its reason and stops no other."""
    run.check_no_search()
    run.check()
    ended = on_asked_runner(benchmark, run)  # a deployment starts every run on threads
    if ended is not None:
        return ended
    store = Store(run.store)
    store.check_format()
    outcome = compare(run, store)
    cells = f"{len(outcome.records)} cells"
    if outcome.failed:
        return Failed(data=outcome, message=f"{outcome.failed} of {cells} failed; see {outcome.report}")
    return Completed(data=outcome, message=f"{cells}; see {outcome.report}")


def compare(run: RunFile, store: Store) -> BenchmarkOutcome:
    """Every cell's record, and the report of them; within a flow."""
    with Watch(store, "benchmark") as watch:
        sweep = Sweep(run, store, watch)
        watch.expect(len(sweep))
        records = []
        for record in sweep.records():
            records.append(record)
            watch.show(records)
        records.sort(key=lambda record: sweep.places[record.cell])
        judged = [found for shared in sweep.categories for found in _judged(shared)]
        path = report(store.url, run.report, [record.cell for record in records], judged)
        watch.report(path, records)
    return BenchmarkOutcome(path, records, told(store, list(dict.fromkeys(judged))))


def _judged(shared: CategorySteps) -> list[Judged]:
    """What the data page shows of a category, also of one that was stopped."""
    shared.forget_lost()
    found = [judged_of(shared, steps, first_failure(steps)) for steps in shared.to_show()]
    return [judged for judged in found if judged is not None]
