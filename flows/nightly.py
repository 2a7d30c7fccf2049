"""Every night: take in what is new, refit, prove the result against the model in use, promote it or not, tell."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, Failed, State

from flows import order
from flows.alerts import FLOW, MODELS_FAILED, alert, one_at_a_time
from flows.category import CategorySteps, Steps, Submitting, first_failure
from flows.runs.runfile import NightlyRun, RunFile
from flows.sweep import Sweep
from flows.where.runners import ThreadsRunner, on_asked_runner
from flows.where.watch import Watch
from storage.errors import StorageError
from storage.held import read_held
from storage.models import Registry
from storage.nights import Decision, write_decision
from storage.records import RunRecord
from storage.store import Store
from tasks.core.compute import inputs_of
from tasks.core.handles import Cell
from tasks.core.policy import Policy
from tasks.night.challenge import Night, challenge, rivals_of
from tasks.night.prove import Judged, decided_by, draw_defects, judge_version, pace
from tasks.report.nights.report import nights_report
from tasks.search.hold_out import FOLDER, RULES
from tasks.serve.register import register


@dataclass(frozen=True)
class NightOutcome:
    """What a night ended with."""

    report: str
    """Path of nights.html."""
    decisions: list[Decision]
    """The decision about each model, in the order of the run."""
    left: str | None = None
    """Why nothing was done: another night is at work."""


@flow(name=FLOW, flow_run_name="nightly {run.title}", task_runner=ThreadsRunner())
def nightly(run: NightlyRun) -> State[NightOutcome]:
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
        return Completed(data=NightOutcome("", [], left), message=f"{left}; it will see what is new, or the next will")
    decisions, page = night
    told = {decision.name: decision.alarms + decision.asks for decision in decisions}
    told = {name: what for name, what in told.items() if what}
    for name, what in told.items():
        alert(name, what, page)
    promoted = sum(decision.outcome == "promoted" for decision in decisions)
    message = f"{promoted} of {len(decisions)} models promoted, {len(told)} to be looked at; see {page}"
    failed = any(decision.outcome == "failed" for decision in decisions)
    return _ended(failed, NightOutcome(page, decisions), message)


def _ended(failed: bool, outcome: Any, message: str | None) -> State[NightOutcome]:
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
            started.append((record, _started(night, sweep, record)))
        started.sort(key=lambda one: sweep.places[one[0].cell])
        decisions = [_decision(store, began, record, proof) for record, proof in started]
        watch.decided(decisions)
        page = nights_report(store.url, run.report)
        watch.report(page)
    return decisions, page


def _started(night: Night, sweep: Sweep, record: RunRecord) -> Steps | Exception | None:
    """The steps that decide about a cell that came through; what kept them from being sent; None for any other cell."""
    if record.status != "done":
        return None
    shared = next(one for one in sweep.categories if one.category.name == f"{record.dataset}/{record.category}")
    (cell,) = sweep.run.cells(record.dataset, record.category)
    try:
        return _decided(night, sweep, shared, cell, record)
    except (StorageError, OSError) as error:  # of one model: it stops no other
        return error


def _decided(night: Night, sweep: Sweep, shared: CategorySteps, cell: Cell, record: RunRecord) -> Steps:
    """Register the night's model, judge it and the champion on the same images, and promote it or not."""
    store, images = sweep.store, sweep.inputs(cell, shared)
    rivals, steps, proof = rivals_of(Registry(store), record), Steps(), list[Any]()
    challenger: Any = rivals.label(rivals.challenger)
    if challenger is None:
        why = f"the night of {night.began}"
        challenger = steps["register"] = register.submit(store.url, record.key(), "nightly", why)
    if rivals.are_compared:
        champion: Any = rivals.label(rivals.champion)
        ours: Any = Judged(record.keys["evaluation"], record.keys["maps"])
        of_night: Any = (cell, images, record.keys, True)
        if not decided_by(night.gate, record):
            drawn = _with_defects(night, sweep.run, images, challenger, cell, steps)
            of_night = cell, drawn, record.keys, False
            ours = steps["judge challenger"] = judge_version.submit(challenger, *of_night)
        # One after the other: memory and seconds are measured.
        theirs = steps["judge champion"] = judge_version.submit(champion, *of_night, wait_for=[ours])
        steps["pace"] = pace.submit(night.gate, cell, images, champion, challenger, wait_for=[theirs])
        proof = [theirs, ours, steps["pace"]]
    steps["challenge"] = challenge.submit(night, cell, images, record, rivals, challenger, *proof)
    return steps


def _with_defects(night: Night, run: RunFile, images: Any, challenger: Any, cell: Cell, steps: Steps) -> Any:
    """Images that neither model has learned from, judged like any others."""
    drawn = steps["draw defects"] = draw_defects.submit(images, challenger, night.folder, cell.seed)
    run = run.model_copy(update={"validation": Policy(rules=dict(RULES))})
    return order.judged(Submitting(CategorySteps(drawn, run), steps), run, drawn, inputs_of(cell)[0])


def _decision(store: Store, began: str, record: RunRecord, steps: Steps | Exception | None) -> Decision:
    """What was decided; that nothing could be, where a step failed."""
    failure = ("", steps) if isinstance(steps, Exception) else steps and first_failure(steps)
    if failure is None and steps is not None:
        return steps["challenge"].result()
    why = record.reason or "no reason is known" if failure is None else f"challenge: {failure[1]}"
    champion = Registry(store).aliases(f"{record.dataset}/{record.category}").points.get("champion")
    stopped = why.split(":")[0] in ("ingest", "validate", "suspect", "screen")
    outcome = "stopped" if stopped else "failed"
    decision = Decision(record.dataset, record.category, began, outcome, why, champion)
    held = {one.id: one.path for one in read_held(store, decision.name) if one.state == "held"}
    decision = replace(decision, held=held)
    write_decision(store, decision)
    return decision
