"""What two versions of a model are worth on the same images, and how long their predictions take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.models import Registry
from storage.records import RunRecord
from storage.samples import fingerprint
from storage.store import Artifact, Store
from tasks.core.compute import detector_of
from tasks.core.earlier import latest
from tasks.core.handles import Category, Cell, Validated
from tasks.core.pace import paces
from tasks.core.steps import step_key
from tasks.core.stored import StoredSource, accepted_samples
from tasks.evaluate import judge, judging_code
from tasks.evaluate.uncertainty import read_replicates
from tasks.fit import method_code, series_read
from tasks.ingest import ingest
from tasks.night.decide import Judgement, Promise
from tasks.night.gate import METRICS, Gate
from tasks.night.screen import cell_of, seen_by
from tasks.predict import predict
from tasks.prepare import prepare
from tasks.search.hold_out import put, split_of_held_out
from tasks.serve.judge import Judge
from tasks.serve.register import load_version

_MEASURED = 8
"""Images whose prediction by champion and challenger is timed."""
_TRIES = 3
"""Measurements that all have to find a challenger too slow: a machine that does much else makes one of them so."""


@dataclass(frozen=True)
class Judged:
    """Keys of what is known of a version on the images that decide."""

    evaluation: str
    maps: str

    def judgement(self, store: Store, promise: Promise, where: str, seconds: float) -> Judgement:
        """What the gate is told. `where`: which images these are; `seconds`: of the prediction of a few."""
        maps = store.get(self.maps).meta
        found = read_replicates(store, self.evaluation)
        return Judgement(promise, where, found, len(maps["ids"]), seconds, maps["peak_memory_mb"])


def decided_by(gate: Gate, record: RunRecord) -> str | None:
    """Which images decide: those of the labelled test set; None where it has none of the metrics that are asked for, so
    that synthetic defects do."""
    asked = METRICS if gate.metric is None else (gate.metric,)
    return "the labelled test set" if any(name in record.metrics for name in asked) else None


@task(name="draw defects", task_run_name="draw defects {validated.name}", cache_policy=NO_CACHE)
def draw_defects(validated: Validated, version: str, folder: str, seed: int) -> Category:
    """Images that the version has not learned from, half of them with a defect drawn into them."""
    line = Registry(Store(validated.category.store)).resolve(version).lineage
    split = split_of_held_out(accepted_samples(validated), line.fitted_on, line.held_out, seed)
    root = put(validated, folder, split, seed)
    (category,) = ingest.fn(validated.category.store, "folder", root).categories
    return category


@task(name="judge", task_run_name="judge {version}", cache_policy=NO_CACHE)
def judge_version(version: str, cell: Cell, validated: Validated, keys: Mapping[str, str], labelled: bool) -> Judged:
    """What the version's maps of the test images are worth. `keys`: of the night's record.

    The version's folder holds its state as a fit's does, so the steps take its key for a model's. It predicts anew even
    where it is known what its maps of the `labelled` images are worth: memory of another night says nothing of this.
    """
    store = Store(validated.category.store)
    asked, known = Registry(store).resolve(version), None
    if labelled:
        known = latest(store, judgements(cell_of(asked, cell), validated, asked.lineage.outputs["model"]))
    cell = replace(cell, dataset=validated.category.dataset, category=validated.category.category)
    seen = seen_by(asked, cell, validated, keys.get("features") if labelled else None)
    maps = predict.fn(*seen, asked.key)
    found: Artifact = known or judge(*seen[:2], keys["calibration"], maps)
    return Judged(found.key, maps)


def judgements(cell: Cell, validated: Validated, model: str) -> str:
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


@task(name="pace", task_run_name="pace {challenger}", cache_policy=NO_CACHE)
def pace(gate: Gate, cell: Cell, validated: Validated, champion: str, challenger: str) -> tuple[float, float]:
    """Seconds of champion and challenger for a few of the same images, features included, as in use."""
    store = Store(validated.category.store)
    ids = [sample.id for sample in accepted_samples(validated) if sample.split != "test"][:_MEASURED]

    def call(version: str) -> Callable[[], object]:
        at_work = Judge(load_version(store, version), cell.device, len(ids))
        seen = validated
        if at_work.size != validated.prepared.image_size:
            seen = replace(validated, prepared=prepare.fn(validated.category, at_work.size))
        images = StoredSource(seen, ids, spec=None, features=None, images=True).read(range(len(ids))).images
        assert images is not None
        return partial(at_work.predict, tuple(ids), np.ascontiguousarray(images.numpy()))

    return unhurried(call(champion), call(challenger), gate.slower)


def unhurried(champion: Callable[[], object], challenger: Callable[[], object], slower: float) -> tuple[float, float]:
    """Seconds of both, measured again where the challenger seems to take more than `slower` times as long: those of the
    measurement that speaks most for it."""
    found: list[tuple[float, float]] = []
    while len(found) < _TRIES and not any(ours <= slower * theirs for theirs, ours in found):
        found.append(paces(champion, challenger))
    return min(found, key=lambda seconds: seconds[1] / max(seconds[0], 1e-9))
