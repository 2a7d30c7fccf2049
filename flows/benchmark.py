"""The main job: data sets x categories x methods x seeds in, a ranked and pictured report out."""

from __future__ import annotations

from dataclasses import dataclass

from prefect import flow
from prefect.states import Completed, Failed, State

from flows.category import CategorySteps, Steps, judged_of, listed
from flows.runfile import RunFile
from flows.runners import on_asked_runner, runner_for
from flows.watch import Watch
from storage.records import RunRecord
from storage.store import Store
from tasks.calibrate import calibrate
from tasks.compute import detector_of
from tasks.evaluate import evaluate
from tasks.failure import record_failure
from tasks.fit import fit
from tasks.handles import Cell
from tasks.predict import predict
from tasks.report import report
from tasks.report.data import Judged


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    report: str
    """Path of index.html."""
    records: list[RunRecord]


@flow(name="benchmark", flow_run_name="benchmark {run.title}", task_runner=runner_for("threads"))
def benchmark(run: RunFile) -> State[Outcome]:
    """Run every cell; a failed cell becomes a record with its reason and stops no other."""
    run.check()
    ended = on_asked_runner(benchmark, run)  # a deployment starts every run on threads
    if ended is not None:
        return ended
    store = Store(run.store)
    store.check_format()
    with Watch(store, "benchmark") as watch:
        records, running, categories = _start(run, store, watch)
        for cell, steps in running:
            records.append(_finished(store, cell, steps, watch))
            watch.show(records)
        judged = [found for shared in categories for found in _judged(shared, watch)]
        path = report(store.url, run.report, [record.cell for record in records], judged)
        watch.report(path)
    failed = sum(record.status == "failed" for record in records)
    if failed:
        return Failed(data=Outcome(path, records), message=f"{failed} of {len(records)} cells failed; see {path}")
    return Completed(data=Outcome(path, records), message=f"{len(records)} cells; see {path}")


def _start(
    run: RunFile, store: Store, watch: Watch
) -> tuple[list[RunRecord], list[tuple[Cell, Steps]], list[CategorySteps]]:
    """Submit every step: (cells that failed at once, the others with their steps, the steps that cells share)."""
    failed: list[RunRecord] = []
    running: list[tuple[Cell, Steps]] = []
    categories: list[CategorySteps] = []
    for source in run.data:
        found = listed(store, source)
        for name, reason in found.problems.items():
            for cell in _cells(run, source.dataset, name):
                failed.append(record_failure(store.url, cell, "ingest", ValueError(reason)))
        for category in found.categories:
            shared = CategorySteps(category, run.validation, run.device)
            running += [(cell, _submit(cell, shared)) for cell in _cells(run, category.dataset, category.category)]
            categories.append(shared)
    for steps in [*(steps for _, steps in running), *(s for shared in categories for s in shared.to_show())]:
        watch.follow(steps)
    return failed, running, categories


def _cells(run: RunFile, dataset: str, category: str) -> list[Cell]:
    return [
        Cell(dataset, category, method.name, method.params, seed, run.device, run.false_reject_rate)
        for method in run.asked_methods()
        for seed in run.seeds
    ]


def _submit(cell: Cell, shared: CategorySteps) -> Steps:
    detector = detector_of(cell)
    spec = detector.feature_spec()
    steps = shared.inputs(spec.image_size if spec else detector.image_size, spec)
    validated, features = steps["validate"], steps.get("extract")
    model = fit.submit(cell, validated, features)
    calibration = calibrate.submit(cell, validated, features, model)
    maps = predict.submit(cell, validated, features, model)
    record = evaluate.submit(cell, validated, features, model, calibration, maps)
    return {**steps, "fit": model, "calibrate": calibration, "predict": maps, "evaluate": record}


def _finished(store: Store, cell: Cell, steps: Steps, watch: Watch) -> RunRecord:
    """The cell's record: that of its last step, or a failed one that names the first step to fail."""
    failed = watch.first_failure(steps)
    if failed is not None:
        return record_failure(store.url, cell, *failed)
    record: RunRecord = steps["evaluate"].result()
    return record


def _judged(shared: CategorySteps, watch: Watch) -> list[Judged]:
    """What the data page shows of a category, also of one that was stopped."""
    found = [judged_of(shared, steps, watch.first_failure(steps)) for steps in shared.to_show()]
    return [judged for judged in found if judged is not None]
