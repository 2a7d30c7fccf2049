"""Prove a night's model against the one in use, on the same images, and put it into use if it passes the gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.held import read_held
from storage.models import Registry
from storage.models.versions import ModelVersion
from storage.nights import Check, Decision, Looks, write_decision
from storage.records import RunRecord
from storage.samples import fingerprint
from storage.store import Artifact, Store
from tasks.core.compute import detector_of
from tasks.core.earlier import latest, remember
from tasks.core.handles import Cell, Validated
from tasks.core.pace import paces
from tasks.core.policy import Policy
from tasks.core.steps import step_key
from tasks.core.stored import StoredSource, accepted_samples
from tasks.evaluate import judge, judging_code
from tasks.evaluate.uncertainty import read_replicates
from tasks.fit import method_code, series_read
from tasks.ingest import ingest
from tasks.night.decide import Intake, Judgement, Promise, decide, new_images
from tasks.night.gate import METRICS, Gate
from tasks.night.screen import RULE, cell_of, intake_of, seen_by
from tasks.predict import predict
from tasks.prepare import prepare
from tasks.search.hold_out import RULES, put, split_of_held_out
from tasks.serve.judge import Judge
from tasks.serve.register import load_version, register
from tasks.validate import findings, validate

_MEASURED = 8
"""Images whose prediction by champion and challenger is timed."""


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


@task(name="challenge", task_run_name="challenge {cell.dataset}/{cell.category}", cache_policy=NO_CACHE)
def challenge(night: Night, cell: Cell, validated: Validated, record: RunRecord) -> Decision:
    """Register the cell's model, prove it against the champion, and promote it or not; the decision is kept.

    `validated`: the images as they were screened. Not retried: what it has decided once stands. Raises Conflict when
    another process switches the aliases meanwhile.
    """
    store = Store(validated.category.store)
    registry = Registry(store)
    challenger = _version_of(registry, night, record)
    aliases = registry.aliases(validated.name)
    number = aliases.points.get("champion")
    champion = None if number is None else registry.get(validated.name, number)
    seen = None if validated.screened is None else store.get(validated.screened).meta
    decision = _told(night, validated, record, champion, challenger, seen)
    intake = Intake() if seen is None else intake_of(seen)
    if number != challenger.number:
        was_champion = any(switch.points.get("champion") == challenger.number for switch in aliases.history)
        decision = _proven(night, cell, validated, record, decision, champion, challenger, was_champion, intake)
        if decision.outcome == "promoted":
            registry.promote(challenger, who="nightly", why=decision.why, revision=aliases.revision)
    elif not (check := new_images(night.gate, intake)).passed:
        decision = replace(decision, outcome="kept", why=_kept(check.said, decision), checks=[check])
    registry.collect(validated.name, night.keep)
    elapsed = datetime.now(UTC) - datetime.fromisoformat(night.began)
    decision = replace(decision, seconds=round(elapsed.total_seconds(), 3))
    write_decision(store, decision)
    return decision


def _another_range(champion: ModelVersion | None, challenger: ModelVersion) -> str:
    if champion is None or champion.white == challenger.white:
        return ""
    before, now = (f"0 to {one.white:g}" if one.white else "none (8 bits)" for one in (champion, challenger))
    return f"tonight's good images have the range of values {now}, and version {champion.number} has {before}"


def _version_of(registry: Registry, night: Night, record: RunRecord) -> ModelVersion:
    """The version of the night's model: one that is kept already where nothing else was learned or held out."""
    outputs = {step: record.keys[step] for step in ("model", "calibration")}
    for version in reversed(registry.versions(f"{record.dataset}/{record.category}")):
        if outputs.items() <= version.lineage.outputs.items():
            return version
    label = register.fn(registry.store.url, record.key(), "nightly", f"the night of {night.began}")
    return registry.resolve(label)


def _told(
    night: Night,
    validated: Validated,
    record: RunRecord,
    champion: ModelVersion | None,
    challenger: ModelVersion,
    seen: dict[str, Any] | None,
) -> Decision:
    """What there is to tell before anything is proven. `seen`: of the new images when they were screened."""
    store = Store(validated.category.store)
    verdict = store.get(validated.verdict).meta
    waits = set(verdict.get("held", []))
    held = {one.id: one.path for one in read_held(store, validated.name) if one.id in waits and one.state == "held"}
    new = _new_images(champion, challenger)
    counts = {"new": len(new), "newly_set_aside": _newly_set_aside(champion, record), "held": len(held)}
    if seen is not None:
        counts["new"] = len(new | {*seen["scores"], *seen["suspected"]})
    return Decision(
        validated.category.dataset,
        validated.category.category,
        night.began,
        "unchanged",
        f"nothing has changed since version {challenger.number} was made",
        champion=champion and champion.number,
        challenger=challenger.number,
        metrics=record.metrics,
        counts=record.counts | counts,
        aside=_aside(store, record),
        drift=seen["drift"] if seen else [],
        looks=Looks(**seen["looks"]) if seen and seen["looks"] else None,
        held=held,
        range=_another_range(champion, challenger),
    )


def _new_images(champion: ModelVersion | None, challenger: ModelVersion) -> set[str]:
    """Good images that the champion had nothing to do with."""
    now = {*challenger.lineage.fitted_on, *challenger.lineage.held_out}
    return now if champion is None else now - {*champion.lineage.fitted_on, *champion.lineage.held_out}


def _newly_set_aside(champion: ModelVersion | None, record: RunRecord) -> int:
    before = 0 if champion is None else champion.counts.get("set_aside", 0)
    return max(0, record.counts["set_aside"] - before)


def _aside(store: Store, record: RunRecord) -> dict[str, int]:
    """Images set aside by rule, the most first; those that the listing left out already count as `listing`."""
    found = findings(store, record.keys["verdict"])
    found = found[(found["severity"] == "reject") & (found["rule"] != RULE)]  # those are told one by one
    rules = found.drop_duplicates("key")["rule"].value_counts()
    listed = record.counts["set_aside"] - int(rules.sum())
    return {str(rule): int(n) for rule, n in rules.items()} | ({"listing": listed} if listed else {})


def _proven(
    night: Night,
    cell: Cell,
    validated: Validated,
    record: RunRecord,
    decision: Decision,
    champion: ModelVersion | None,
    challenger: ModelVersion,
    was_champion: bool,
    intake: Intake,
) -> Decision:
    """The decision once all checks are made."""
    series = _judgement(cell, validated, record.keys["model"])
    remember(Store(validated.category.store), series, record.keys["evaluation"])  # for the night that challenges it
    if was_champion:
        said = f"version {challenger.number} was in use before and is no more; only a person promotes it again"
        checks = [Check("not in use before", False, said)]
    elif champion is None:
        checks = decide(night.gate, None, Judgement(_promise(record)), intake)
    else:
        checks = decide(night.gate, *_judgements(night, cell, validated, record, champion, challenger), intake)
    failed = [check.said for check in checks if not check.passed]
    if failed:
        in_use = {} if champion is None else champion.metrics
        why = _kept("; ".join(failed), decision)
        return replace(decision, outcome="kept", why=why, checks=checks, metrics=in_use)
    why = "there was no champion" if champion is None else checks[0].said
    return replace(decision, outcome="promoted", why=why, checks=checks, champion=challenger.number)


def _kept(why: str, decision: Decision) -> str:
    """Why the champion is kept, and what is not learned for that reason."""
    if any(one["changed"] for one in decision.drift) and decision.challenger != decision.champion:
        label = f"{decision.name}@{decision.challenger}"
        why += f"; if they look as they should from now on, `al models promote {label} --why ...` puts it into use"
    return why


def _promise(record: RunRecord) -> Promise:
    """What the threshold of the night's model promises, and what it did to good test images."""
    asked, did = record.calibration["image"], record.calibration.get("realised", {})
    good = record.counts.get("test_good", 0)
    known = good and "false_reject_rate" in did
    rejected = round(did["false_reject_rate"] * good) if known else None
    return Promise(asked["rate"], asked["n"], asked["value"], asked.get("note"), good, rejected)


def _judgements(
    night: Night,
    cell: Cell,
    validated: Validated,
    record: RunRecord,
    champion: ModelVersion,
    challenger: ModelVersion,
) -> tuple[Judgement, Judgement]:
    """Judgements of the champion and of the challenger, on the same images."""
    asked = METRICS if night.gate.metric is None else (night.gate.metric,)
    store, features = Store(validated.category.store), record.keys.get("features")
    pace = _paces(store, cell, validated, champion, challenger)
    if any(name in record.metrics for name in asked):
        where = "the labelled test set"
        new = read_replicates(store, record.keys["evaluation"]), store.get(record.keys["maps"])
        known = latest(store, _judgement(cell_of(champion, cell), validated, champion.lineage.outputs["model"]))
    else:
        where = "synthetic defects in held-out images"
        validated, features = _synthetic(night, cell, validated, challenger), None
        cell = replace(cell, dataset=validated.category.dataset, category=validated.category.category)
        new, known = _judged(challenger, cell, validated, features, record, None), None
    old = _judged(champion, cell, validated, features, record, known)
    theirs, ours = (
        Judgement(promise, where, found, len(maps.meta["ids"]), seconds, maps.meta["peak_memory_mb"])
        for promise, (found, maps), seconds in (
            (_of_version(champion), old, pace[0]),
            (_promise(record), new, pace[1]),
        )
    )
    return theirs, ours


def _of_version(version: ModelVersion) -> Promise:
    set_on = version.calibration
    return Promise(set_on.rate, set_on.images, set_on.image, set_on.note)


def _paces(
    store: Store, cell: Cell, validated: Validated, champion: ModelVersion, challenger: ModelVersion
) -> tuple[float, float]:
    """Seconds of champion and challenger for a few of the same images, features included, as in use."""
    ids = [sample.id for sample in accepted_samples(validated) if sample.split != "test"][:_MEASURED]

    def call(version: ModelVersion) -> Callable[[], object]:
        at_work = Judge(load_version(store, version.label), cell.device, len(ids))
        seen = validated
        if at_work.size != validated.prepared.image_size:
            seen = replace(validated, prepared=prepare.fn(validated.category, at_work.size))
        images = StoredSource(seen, ids, spec=None, features=None, images=True).read(range(len(ids))).images
        assert images is not None
        return partial(at_work.predict, tuple(ids), np.ascontiguousarray(images.numpy()))

    return paces(call(champion), call(challenger))


def _synthetic(night: Night, cell: Cell, validated: Validated, challenger: ModelVersion) -> Validated:
    """Images that the challenger has not learned from, half of them with a defect drawn into them."""
    line = challenger.lineage
    split = split_of_held_out(accepted_samples(validated), line.fitted_on, line.held_out, cell.seed)
    root = put(validated, night.folder, split, cell.seed)
    (category,) = ingest.fn(validated.category.store, "folder", root).categories
    return validate.fn(prepare.fn(category, validated.prepared.image_size), Policy(rules=dict(RULES)))


def _judgement(cell: Cell, validated: Validated, model: str) -> str:
    """The series of what a model's maps of these labelled test images are worth: nights that bring no others share
    it. `model`: key of the fit."""
    store, test = Store(validated.category.store), [s for s in accepted_samples(validated) if s.split == "test"]
    listed = store.get(validated.category.catalogue).meta
    return step_key(
        "judgements",
        cell.dataset,
        cell.category,
        model=model,
        test=fingerprint(test),
        listed={name: listed.get(name) for name in ("folders", "notes", "options")},
        reads=series_read(cell, validated),
        rate=cell.false_reject_rate,
        code=[judging_code(), method_code("tasks.predict", detector_of(cell))],
    )


def _judged(
    version: ModelVersion,
    cell: Cell,
    validated: Validated,
    features: str | None,
    record: RunRecord,
    known: Artifact | None,
) -> tuple[Any, Artifact]:
    """Replicates and maps. The version's folder holds its state as a fit's does, so the steps take its key for a
    model's. It predicts anew even where its judgement is `known`: memory of another night says nothing of this."""
    store = Store(validated.category.store)
    cell, validated, features = seen_by(version, cell, validated, features)
    maps = predict.fn(cell, validated, features, version.key)
    found = known or judge(cell, validated, record.keys["calibration"], maps)
    return read_replicates(store, found.key), store.get(maps)
