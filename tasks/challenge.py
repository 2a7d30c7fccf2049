"""Prove a night's model against the one in use, on the same images, and put it into use if it passes the gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from al_models.calibration import rejected_p_value
from al_models.drift import FEWEST, Change, changes
from al_models.metrics import Replicates, compare
from al_models.parts.images import WHOLE
from storage.models import Registry
from storage.models.versions import ModelVersion
from storage.nights import Check, Decision, Looks, write_decision
from storage.records import RunRecord
from storage.samples import fingerprint
from storage.store import Artifact, Store
from tasks.compute import detector_of, inputs_of, runtime_of
from tasks.earlier import latest, remember
from tasks.evaluate import judge, judging_code
from tasks.evaluate.uncertainty import read_replicates
from tasks.extract import extract
from tasks.fit import load_model, method_code, series_read, source_for
from tasks.gate import METRICS, Gate
from tasks.handles import Cell, Validated
from tasks.hold_out import RULES, put, split_of_held_out
from tasks.ingest import ingest
from tasks.policy import Policy
from tasks.predict import predict
from tasks.prepare import prepare, white_of
from tasks.reference import statistics_of
from tasks.register import LoadedVersion, load_version, register
from tasks.report.tables import METRICS as NAMES
from tasks.steps import step_key
from tasks.stored import accepted_samples
from tasks.validate import findings, validate

_A_SECOND = 1.0
_MIB = 256.0
"""Differences that are the machine's, not the model's."""


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

    Not retried: what it has decided once stands. Raises Conflict when another process switches the aliases meanwhile.
    """
    store = Store(validated.category.store)
    registry = Registry(store)
    why = _another_product(registry, validated, record)
    if why is not None:
        stands = registry.aliases(validated.name).points.get("champion")
        refused = Decision(cell.dataset, cell.category, night.began, "stopped", why, stands)
        write_decision(store, refused)
        return refused
    label = register.fn(store.url, record.key(), "nightly", f"the night of {night.began}")
    challenger, aliases = registry.resolve(label), registry.aliases(validated.name)
    number = aliases.points.get("champion")
    in_use = None if number is None else load_version(store, f"{validated.name}@{number}")
    champion = None if in_use is None else in_use.version
    new = sorted(_new_images(champion, challenger))
    looks, drift = (None, []) if in_use is None else _looked_at(night, cell, validated, record, in_use, new)
    decision = Decision(
        cell.dataset,
        cell.category,
        night.began,
        "unchanged",
        f"nothing has changed since version {challenger.number} was made",
        champion=number,
        challenger=challenger.number,
        metrics=record.metrics,
        counts=record.counts | {"new": len(new), "newly_set_aside": _newly_set_aside(champion, record)},
        aside=_aside(store, record),
        drift=[asdict(one) for one in drift],
        looks=looks,
        range=_another_range(champion, challenger),
    )
    if number != challenger.number:
        was_champion = any(switch.points.get("champion") == challenger.number for switch in aliases.history)
        decision = _proven(night, cell, validated, record, decision, champion, challenger, was_champion)
        if decision.outcome == "promoted":
            registry.promote(challenger, who="nightly", why=decision.why, revision=aliases.revision)
    registry.collect(validated.name, night.keep)
    elapsed = datetime.now(UTC) - datetime.fromisoformat(night.began)
    decision = replace(decision, seconds=round(elapsed.total_seconds(), 3))
    write_decision(store, decision)
    return decision


def _another_product(registry: Registry, validated: Validated, record: RunRecord) -> str | None:
    """Why tonight's images are not those of the model in use: they lie elsewhere, and none of them is one of its. A
    folder that was moved has images in common."""
    number = registry.aliases(validated.name).points.get("champion")
    if number is None:
        return None
    line = registry.resolve(f"{validated.name}@{number}").lineage
    tonight = registry.store.get(record.keys["model"]).meta
    common = {*line.fitted_on, *line.held_out} & {*tonight["fitted_on"], *tonight["held_out"]}
    if not line.root or line.root == validated.category.root or common:
        return None
    return (
        f"version {number} of {validated.name} was made of images in {line.root}, and those in "
        f"{validated.category.root} have none in common with it; give another product a name of its own "
        f'(options = {{category = "NAME"}}), or register the cell of this night by hand where the folder has moved'
    )


def _another_range(champion: ModelVersion | None, challenger: ModelVersion) -> str:
    if champion is None or champion.white == challenger.white:
        return ""
    before, now = (f"0 to {one.white:g}" if one.white else "none (8 bits)" for one in (champion, challenger))
    return f"tonight's good images have the range of values {now}, and version {champion.number} has {before}"


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
    rules = found[found["severity"] == "reject"].drop_duplicates("key")["rule"].value_counts()
    listed = record.counts["set_aside"] - int(rules.sum())
    return {str(rule): int(n) for rule, n in rules.items()} | ({"listing": listed} if listed else {})


def _looked_at(
    night: Night, cell: Cell, validated: Validated, record: RunRecord, champion: LoadedVersion, new: list[str]
) -> tuple[Looks | None, list[Change]]:
    """The new good images against those that were held out for the champion: quartiles, and what has changed."""
    version, rate, alpha = champion.version, champion.version.calibration.rate, night.gate.alpha
    if not new:
        return None, []
    cell, validated, features = _seen_by(version, cell, validated, record)
    store = Store(validated.category.store)
    detector = load_model(store, version.key, cell)  # which the proof predicts with, too
    source = source_for(detector, validated, features, new)
    parts = detector.predict_batches(source, runtime_of(cell))
    scores = np.concatenate([part.scores for part in parts]).astype(np.float64)
    batch = statistics_of(champion.reference, store, validated.prepared.images, features, new, scores)
    threshold, held_out = version.calibration.image, champion.reference.statistics
    rejected = None if threshold is None else int((scores > threshold).sum())
    looks = Looks(len(new), rejected or 0, rate, alpha, threshold, _quartiles(held_out), _quartiles(batch))
    few = len(new) < FEWEST
    return looks, [] if few else changes(held_out, batch, rejected=rejected, rate=rate, alpha=alpha)


def _quartiles(statistics: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: np.quantile(values, [0.25, 0.5, 0.75]).tolist() for name, values in statistics.items()}


def _seen_by(
    version: ModelVersion, cell: Cell, validated: Validated, record: RunRecord
) -> tuple[Cell, Validated, str | None]:
    """A version's cell on these images, and what it reads of them: images of its size, the key of its features."""
    tonight, cell = inputs_of(cell), _cell_of(version, cell)
    size, spec = inputs_of(cell)
    same = version.white == white_of(Store(validated.category.store), validated.prepared.images)
    same = same or validated.category.category != version.category  # synthetic images have 8 bits a channel
    if same and (size, spec) == tonight and validated.category.catalogue == record.keys["catalogue"]:
        return cell, validated, record.keys.get("features")
    if not same or size != validated.prepared.image_size:  # the verdict is about the files, whatever they become
        white = None if same else version.white or WHOLE
        validated = replace(validated, prepared=prepare.fn(validated.category, size, white))
    return cell, validated, None if spec is None else extract.fn(validated, spec, cell.device)


def _cell_of(version: ModelVersion, cell: Cell) -> Cell:
    return replace(cell, method=version.method, params=version.params, seed=version.seed)


def _proven(
    night: Night,
    cell: Cell,
    validated: Validated,
    record: RunRecord,
    decision: Decision,
    champion: ModelVersion | None,
    challenger: ModelVersion,
    was_champion: bool,
) -> Decision:
    """The decision once all checks are made."""
    series = _judgement(cell, validated, record.keys["model"])
    remember(Store(validated.category.store), series, record.keys["evaluation"])  # for the night that challenges it
    checks = [_rejects(record, night.gate)]
    if was_champion:
        said = f"version {challenger.number} was in use before and is no more; only a person promotes it again"
        checks = [Check("not in use before", False, said)]
    elif champion is not None:
        checks = [*_against(night, cell, validated, record, champion, challenger), *checks]
    failed = [check.said for check in checks if not check.passed]
    if failed:
        in_use = {} if champion is None else champion.metrics
        return replace(decision, outcome="kept", why="; ".join(failed), checks=checks, metrics=in_use)
    why = "there was no champion" if champion is None else checks[0].said
    return replace(decision, outcome="promoted", why=why, checks=checks, champion=challenger.number)


def _rejects(record: RunRecord, gate: Gate) -> Check:
    """Whether the threshold rejects as many good test images as it promised, or fewer, within chance."""
    asked, did = record.calibration["image"], record.calibration.get("realised", {})
    good = record.counts.get("test_good", 0)
    if asked["value"] is None:
        return Check("false rejects", False, f"there is no threshold: {asked.get('note')}")
    if not good or "false_reject_rate" not in did:
        return Check("false rejects", True, "no good test image could show more rejects than were promised")
    rejected = round(did["false_reject_rate"] * good)
    p_value = rejected_p_value(rejected, good, asked["n"], asked["rate"])
    said = f"{rejected} of {good} good test images rejected, {asked['rate']:.1%} promised (p = {p_value:.2g})"
    return Check("false rejects", p_value > gate.alpha, said)


@dataclass(frozen=True)
class _Judged:
    """A model on the images that decide."""

    replicates: Mapping[str, Replicates]
    predicted: Artifact


def _against(
    night: Night,
    cell: Cell,
    validated: Validated,
    record: RunRecord,
    champion: ModelVersion,
    challenger: ModelVersion,
) -> list[Check]:
    """The challenger against the champion on the same images: quality, seconds, memory."""
    gate, asked = night.gate, METRICS if night.gate.metric is None else (night.gate.metric,)
    store = Store(validated.category.store)
    if any(name in record.metrics for name in asked):
        where = "the labelled test set"
        new = _Judged(read_replicates(store, record.keys["evaluation"]), store.get(record.keys["maps"]))
        known = latest(store, _judgement(_cell_of(champion, cell), validated, champion.lineage.outputs["model"]))
    else:
        where = "synthetic defects in held-out images"
        validated = _synthetic(night, cell, validated, challenger)
        cell = replace(cell, dataset=validated.category.dataset, category=validated.category.category)
        new, known = _judged(challenger, cell, validated, record), None
    old = _judged(champion, cell, validated, record, known)
    metric = next((name for name in asked if name in new.replicates and name in old.replicates), None)
    if metric is None:
        quality = Check("quality", False, f"none of {', '.join(asked)} can be had on {where}; name another metric")
    else:
        quality = _quality(metric, new.replicates[metric], old.replicates[metric], where)
    return [quality, *_costs(new.predicted, old.predicted, gate)]


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
    version: ModelVersion, cell: Cell, validated: Validated, record: RunRecord, known: Artifact | None = None
) -> _Judged:
    """The version's folder holds its state as a fit's does, so the steps take its key for a model's. It predicts anew
    even where its judgement is `known`: seconds of another night say nothing of this one's."""
    store, (cell, validated, features) = Store(validated.category.store), _seen_by(version, cell, validated, record)
    maps = predict.fn(cell, validated, features, version.key)
    found = known or judge(cell, validated, record.keys["calibration"], maps)
    return _Judged(read_replicates(store, found.key), store.get(maps))


def _quality(metric: str, new: Replicates, old: Replicates, where: str) -> Check:
    found = compare(new, old)
    said = f"{NAMES.get(metric, metric)} {100 * new.estimate:.2f} against {100 * old.estimate:.2f} % on {where}"
    if found.low is None or found.high is None:
        return Check("quality", found.difference >= 0, f"{said}, too few images for an interval")
    said += f", difference {100 * found.difference:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
    return Check("quality", found.high >= 0, said)


def _costs(new: Artifact, old: Artifact, gate: Gate) -> list[Check]:
    """Prediction of as many images on this machine."""
    checks = []
    for name, field, unit, most, slack in (
        ("seconds", "seconds", "s", gate.slower, _A_SECOND),
        ("memory", "peak_memory_mb", "MiB", gate.larger, _MIB),
    ):
        ours, theirs = new.meta[field], old.meta[field]
        said = f"{ours:.4g} {unit} for {len(new.meta['ids'])} images against {theirs:.4g} {unit}"
        checks.append(Check(name, ours <= most * theirs + slack, f"{said}, {most:g} times as much is allowed"))
    return checks
