"""The main job: data sets x categories x methods x seeds in, a ranked and pictured report out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed, State
from prefect.task_runners import TaskRunner

from flows.runfile import DataSource, RunFile
from flows.runners import runner_for
from flows.watch import Watch
from storage.records import RunRecord
from storage.store import Store
from tasks.calibrate import calibrate
from tasks.compute import detector_of
from tasks.demo_data import make_demo_data
from tasks.evaluate import evaluate
from tasks.extract import extract
from tasks.failure import record_failure
from tasks.fit import fit
from tasks.handles import Category, Cell
from tasks.ingest import Ingested, ingest
from tasks.predict import predict
from tasks.prepare import prepare
from tasks.report import report
from tasks.validate import validate

Steps = dict[str, PrefectFuture[Any]]
"""Step -> its future, in the order in which one waits for the other."""


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
    runner = runner_for(run.runner, run.workers)
    if runner != _own_runner():  # a deployment starts every run on threads
        return _ended_as(benchmark.with_options(task_runner=runner)(run, return_state=True))
    store = Store(run.store)
    store.check_format()
    records: list[RunRecord] = []
    running: list[tuple[Cell, Steps]] = []
    for source in run.data:
        found = _listed(store, source)
        for name, reason in found.problems.items():
            for cell in _cells(run, source.dataset, name):
                records.append(record_failure(store.url, cell, "ingest", ValueError(reason)))
        for category in found.categories:
            shared = _Shared(category, run.device)
            running += [(cell, _submit(cell, shared)) for cell in _cells(run, category.dataset, category.category)]

    with Watch(store, [steps for _, steps in running]) as watch:
        for cell, steps in running:
            records.append(_finished(store, cell, steps, watch))
            watch.show(records)
        path = report(store.url, run.report, [record.cell for record in records])
        watch.report(path)
    failed = sum(record.status == "failed" for record in records)
    if failed:
        return Failed(data=Outcome(path, records), message=f"{failed} of {len(records)} cells failed; see {path}")
    return Completed(data=Outcome(path, records), message=f"{len(records)} cells; see {path}")


def _ended_as(inner: State[Outcome]) -> State[Outcome]:
    """The inner run's end as our own; Prefect would sum up a state that has a run as `All states completed`."""
    outcome = inner.result(raise_on_failure=False)
    if isinstance(outcome, BaseException):
        raise outcome
    return (Failed if inner.is_failed() else Completed)(data=outcome, message=inner.message)


def _own_runner() -> TaskRunner[Any]:
    context = FlowRunContext.get()
    assert context is not None  # `benchmark` is a flow
    return context.task_runner


@dataclass
class _Shared:
    """Steps of a category that several cells wait for; each is submitted once."""

    category: Category
    device: str
    submitted: dict[Any, Steps] = field(default_factory=dict)

    def inputs(self, cell: Cell) -> Steps:
        """The cell's prepared, validated and, for a method on features, extracted images."""
        detector = detector_of(cell)
        spec = detector.feature_spec()
        size = spec.image_size if spec else detector.image_size
        if size not in self.submitted:
            prepared = prepare.submit(self.category, size)
            self.submitted[size] = {"prepare": prepared, "validate": validate.submit(prepared)}
        steps = self.submitted[size]
        if spec is None:
            return dict(steps)
        if spec not in self.submitted:
            self.submitted[spec] = {"extract": extract.submit(steps["validate"], spec, self.device)}
        return steps | self.submitted[spec]


def _listed(store: Store, source: DataSource) -> Ingested:
    if source.dataset == "demo":
        make_demo_data(Path(source.root))
    return ingest(store.url, source.dataset, source.root, source.categories, source.inspect)


def _cells(run: RunFile, dataset: str, category: str) -> list[Cell]:
    return [
        Cell(dataset, category, method.name, method.params, seed, run.device, run.false_reject_rate)
        for method in run.asked_methods()
        for seed in run.seeds
    ]


def _submit(cell: Cell, shared: _Shared) -> Steps:
    steps = shared.inputs(cell)
    validated, features = steps["validate"], steps.get("extract")
    model = fit.submit(cell, validated, features)
    calibration = calibrate.submit(cell, validated, features, model)
    maps = predict.submit(cell, validated, features, model)
    record = evaluate.submit(cell, validated, features, model, calibration, maps)
    return {**steps, "fit": model, "calibrate": calibration, "predict": maps, "evaluate": record}


def _finished(store: Store, cell: Cell, steps: Steps, watch: Watch) -> RunRecord:
    """The cell's record: that of its last step, or a failed one that names the first step to fail."""
    for step, future in steps.items():
        try:
            result = future.result()
        # A worker that died is Dask's own error and by-passes Prefect's states: it fails this cell, not the run.
        except Exception as error:
            return record_failure(store.url, cell, step, error)
        watch.done(future)
    assert isinstance(result, RunRecord)
    return result
