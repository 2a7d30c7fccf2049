"""Take data sets in and judge them, with nothing learned from them: what is wrong is known before a model is fitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prefect import flow
from prefect.states import Completed, Failed, State

from flows.category import CategorySteps, Steps, all_listed, first_failure, judged_of
from flows.runs.runfile import IngestRun
from flows.where.runners import ThreadsRunner, on_asked_runner
from flows.where.watch import Watch
from storage.store import Store
from tasks.download import download
from tasks.report.data.report import DOCS, Judged, data_report
from tasks.report.data.told import told
from tasks.validate import build_data_docs

IMAGE_SIZE = 256
"""What images are decoded to here, as for most methods, which then need not decode them again."""


@dataclass(frozen=True)
class IngestOutcome:
    """What an ingest ended with."""

    report: str
    """Path of data.html."""
    judged: list[Judged] = field(default_factory=list)
    """The categories that a verdict was passed on."""
    unusable: dict[str, str] = field(default_factory=dict)
    """data set/category -> why nothing can be learned from it."""
    remarks: dict[str, str] = field(default_factory=dict)
    """data set/category -> why it was not searched for suspects."""
    told: list[str] = field(default_factory=list)
    """How many images and files are doubtful or left out, and the reasons that matter most."""


@flow(name="ingest", flow_run_name="ingest {run.title}", task_runner=ThreadsRunner())
def ingest(run: IngestRun) -> State[IngestOutcome]:
    """List, decode and judge every category, and write the page about them; an unusable one stops no other."""
    run.check()
    ended = on_asked_runner(ingest, run)  # a deployment starts every run on threads
    if ended is not None:
        return ended
    store = Store(run.store)
    store.check_format()
    judged: list[Judged] = []
    unusable: dict[str, str] = {}
    remarks: dict[str, str] = {}
    asked = run.validation.severity("suspected_defect")
    with Watch(store, "ingest") as watch:
        started = _start(run, store, unusable)
        watch.expect(len(started))
        for done, (shared, steps) in enumerate(started, start=1):
            failure = first_failure(steps)
            watch.finished(done, shared.category.name)
            if failure is not None:
                essential = failure[0] in ("prepare", "validate") or asked == "reject"
                (unusable if essential else remarks)[shared.category.name] = f"{failure[0]}: {failure[1]}"
            found = judged_of(shared, steps, failure)
            if found is not None:
                judged.append(found)
                if run.data_docs:
                    folder = Path(run.report) / DOCS / shared.category.name
                    build_data_docs(steps["prepare"].result(), folder, run.validation)
        path = data_report(store.url, run.report, judged, run.data_docs)
        watch.report(path)
    outcome = IngestOutcome(path, judged, unusable, remarks, told(store, judged, all_categories=True))
    if unusable:
        return Failed(data=outcome, message=f"{len(unusable)} categories cannot be used; see {path}")
    return Completed(data=outcome, message=f"{len(judged)} categories; see {path}")


def _start(run: IngestRun, store: Store, unusable: dict[str, str]) -> list[tuple[CategorySteps, Steps]]:
    """Submit every step of every category; what cannot even be listed is unusable."""
    running: list[tuple[CategorySteps, Steps]] = []
    for source in run.data if run.download else ():
        download(source.dataset, source.root)
    for source, found in all_listed(store, run):
        unusable |= {f"{source.dataset}/{name}": reason for name, reason in found.problems.items()}
        for category in found.categories:
            shared = CategorySteps(category, run)
            wanted = run.validation.severity("suspected_defect") != "off"
            running.append((shared, shared.judged(IMAGE_SIZE, wanted)))
    return running
