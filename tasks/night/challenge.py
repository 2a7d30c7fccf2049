"""Put a night's model into use if it passes the gate, and keep what was decided."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.errors import Conflict
from storage.models import Registry
from storage.models.versions import ModelVersion
from storage.nights import Decision, write_decision
from storage.records import RunRecord
from storage.store import Store
from tasks.core.earlier import remember
from tasks.core.handles import Cell, Validated
from tasks.night.decide import Intake, Judgement, Promise
from tasks.night.gate import Gate
from tasks.night.prove import Judged, decided_by, judgements
from tasks.night.screen import intake_of
from tasks.night.told import told
from tasks.night.verdict import Rivals, verdict


@dataclass(frozen=True)
class Night:
    """What the parts of a night share."""

    began: str
    """UTC time, ISO 8601."""
    gate: Gate
    folder: str
    """Where data sets with synthetic defects are put."""
    keep: int
    """Newest versions to keep."""


def rivals_of(registry: Registry, record: RunRecord, challenger: int | None = None) -> Rivals:
    """The champion, and the version of a night's record: one that is kept already where nothing else was learned or
    held out; or the one that is known to be its `challenger`."""
    name = f"{record.dataset}/{record.category}"
    outputs = {step: record.keys[step] for step in ("model", "calibration")}
    if challenger is None:
        same = [one for one in registry.versions(name) if outputs.items() <= one.lineage.outputs.items()]
        challenger = same[-1].number if same else None
    aliases = registry.aliases(name)
    champion = aliases.points.get("champion")
    before = challenger is not None and any(one.points.get("champion") == challenger for one in aliases.history)
    return Rivals(name, champion, challenger, before and champion != challenger)


@task(name="challenge", task_run_name="challenge {cell.dataset}/{cell.category}", cache_policy=NO_CACHE)
def challenge(
    night: Night,
    cell: Cell,
    validated: Validated,
    record: RunRecord,
    rivals: Rivals,
    label: str,
    theirs: Judged | None = None,
    ours: Judged | None = None,
    seconds: tuple[float, float] = (0.0, 0.0),
) -> Decision:
    """Promote the challenger or not; the decision is kept. `label`: of the challenger; `validated`: the images as they
    were screened; `theirs`, `ours`, `seconds`: of champion and challenger, where they are compared.

    Not retried: what it has decided once stands. Raises Conflict when another process switches the champion meanwhile.
    """
    store = Store(validated.category.store)
    registry = Registry(store)
    challenger = registry.resolve(label)
    aliases, now = registry.aliases(rivals.name), rivals_of(registry, record, challenger.number)
    if now.champion != rivals.champion:
        raise Conflict(f"the champion of {now.name} was switched while the night proved {label} against another")
    champion = None if now.champion is None else registry.get(now.name, now.champion)
    seen = None if validated.screened is None else store.get(validated.screened).meta
    if now.challenger != now.champion:  # for the night that challenges it
        remember(store, judgements(cell, validated, record.keys["model"]), record.keys["evaluation"])
    found = verdict(
        night.gate,
        now,
        champion and theirs and _judgement(store, night, record, _promise_of(champion), theirs, seconds[0]),
        _judgement(store, night, record, _promise(record), ours, seconds[1]),
        Intake() if seen is None else intake_of(seen),
    )
    decision = replace(told(night.began, validated, record, champion, challenger, seen), **vars(found))
    if found.outcome == "promoted":
        registry.promote(challenger, who="nightly", why=found.why, revision=aliases.revision)
        decision = replace(decision, champion=challenger.number)
    elif now.challenger != now.champion:
        decision = replace(decision, metrics={} if champion is None else champion.metrics)
    registry.collect(now.name, night.keep)
    elapsed = datetime.now(UTC) - datetime.fromisoformat(night.began)
    decision = replace(decision, seconds=round(elapsed.total_seconds(), 3))
    write_decision(store, decision)
    return decision


def _judgement(
    store: Store, night: Night, record: RunRecord, promise: Promise, judged: Judged | None, seconds: float
) -> Judgement:
    where = decided_by(night.gate, record) or "synthetic defects in held-out images"
    return Judgement(promise) if judged is None else judged.judgement(store, promise, where, seconds)


def _promise(record: RunRecord) -> Promise:
    """What the threshold of the night's model promises, and what it did to good test images."""
    asked, did = record.calibration["image"], record.calibration.get("realised", {})
    good = record.counts.get("test_good", 0)
    known = good and "false_reject_rate" in did
    rejected = round(did["false_reject_rate"] * good) if known else None
    return Promise(asked["rate"], asked["n"], asked["value"], asked.get("note"), good, rejected)


def _promise_of(version: ModelVersion) -> Promise:
    set_on = version.calibration
    return Promise(set_on.rate, set_on.images, set_on.image, set_on.note)
