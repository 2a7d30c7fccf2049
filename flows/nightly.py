"""Every night: take in what is new, refit, prove the result against the model in use, promote it or not, tell."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed, State

from flows.alerts import FLOW, MODELS_FAILED, alert, one_at_a_time
from flows.category import first_failure
from flows.runs.runfile import NightlyRun
from flows.sweep import Sweep
from flows.where.runners import ThreadsRunner, on_asked_runner
from flows.where.watch import Watch
from storage.held import read_held
from storage.models import Registry
from storage.nights import Decision, write_decision
from storage.records import RunRecord
from storage.store import Store
from tasks.night.challenge import Night, challenge
from tasks.report.nights.report import nights_report
from tasks.search.hold_out import FOLDER


@dataclass(frozen=True)
class Outcome:
    """What a night ended with."""

    report: str
    """Path of nights.html."""
    decisions: list[Decision]
    """The decision about each model, in the order of the run."""
    left: str | None = None
    """Why nothing was done: another night is at work."""


@flow(name=FLOW, flow_run_name="nightly {run.title}", task_runner=ThreadsRunner())
def nightly(run: NightlyRun) -> State[Outcome]:
    """One night. A model that fails its night keeps its champion, and stops no other."""
    run.check()
    ended = on_asked_runner(nightly, run)  # a deployment starts every run on threads
    if ended is not None:
        return _ended(ended.is_failed(), ended.data, ended.message)
    store = Store(run.store)
    store.check_format()
    with ExitStack() as alone:
        night = _night(run, store, alone)
    if night is None:
        left = "another night is at work on one of these models"
        return Completed(data=Outcome("", [], left), message=f"{left}; it will see what is new, or the next will")
    decisions, page = night
    told = {decision.name: decision.alarms + decision.asks for decision in decisions}
    told = {name: what for name, what in told.items() if what}
    for name, what in told.items():
        alert(name, what, page)
    promoted = sum(decision.outcome == "promoted" for decision in decisions)
    message = f"{promoted} of {len(decisions)} models promoted, {len(told)} to be looked at; see {page}"
    failed = any(decision.outcome == "failed" for decision in decisions)
    return _ended(failed, Outcome(page, decisions), message)


def _ended(failed: bool, outcome: Any, message: str | None) -> State[Outcome]:
    """How a night ends that came through."""
    if failed:
        return Failed(name=MODELS_FAILED, data=outcome, message=message)
    return Completed(data=outcome, message=message)


def _night(run: NightlyRun, store: Store, alone: ExitStack) -> tuple[list[Decision], str] | None:
    """The decisions, and the page about them; None where another night is at work."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    night = Night(began, run.gate, str(Path(run.report).resolve() / FOLDER), run.keep)
    with Watch(store, "nightly") as watch:
        sweep = Sweep(run.as_benchmark(), store, watch)
        if not one_at_a_time(alone, store, [each.category.name for each in sweep.categories]):
            return None
        watch.expect(len(sweep))
        started, records = [], []
        for record in sweep.records():
            records.append(record)
            watch.show(records)
            started.append((record, _start(night, sweep, record) if record.status == "done" else None))
        started.sort(key=lambda one: sweep.places[one[0].cell])
        decisions = [_decision(store, began, record, future) for record, future in started]
        watch.decided(decisions)
        page = nights_report(store.url, run.report)
        watch.report(page)
    return decisions, page


def _start(night: Night, sweep: Sweep, record: RunRecord) -> PrefectFuture[Decision]:
    """The proof of a cell that came through."""
    shared = next(one for one in sweep.categories if one.category.name == f"{record.dataset}/{record.category}")
    (cell,) = sweep.run.cells(record.dataset, record.category)
    return challenge.submit(night, cell, sweep.inputs(cell, shared), record)


def _decision(store: Store, began: str, record: RunRecord, future: PrefectFuture[Decision] | None) -> Decision:
    """What was decided; that nothing could be, where a step failed."""
    failure = None if future is None else first_failure({"challenge": future})
    if future is not None and failure is None:
        return future.result()
    why = record.reason if failure is None else f"{failure[0]}: {failure[1]}"
    champion = Registry(store).aliases(f"{record.dataset}/{record.category}").points.get("champion")
    stopped = (why or "").split(":")[0] in ("ingest", "validate", "suspect", "screen")
    outcome = "stopped" if stopped else "failed"
    decision = Decision(record.dataset, record.category, began, outcome, why or "no reason is known", champion)
    held = {one.id: one.path for one in read_held(store, decision.name) if one.state == "held"}
    decision = replace(decision, held=held)
    write_decision(store, decision)
    return decision
