"""Score the held-out good images: all that thresholds are ever set from."""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.store import Draft, Store
from tasks.compute import detector_of, runtime_of
from tasks.fit import load_model, method_code, source_for
from tasks.handles import Cell, Validated
from tasks.steps import retry_passing, run_step, step_key


@task(
    name="calibrate",
    task_run_name="calibrate {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}",
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def calibrate(cell: Cell, validated: Validated, features: str | None, model: str) -> str:
    """Key of the calibration: in its manifest, the scores and the largest map values of the held-out good images."""
    store = Store(validated.category.store)
    code = method_code("tasks.calibrate", detector_of(cell))
    key = step_key("calibrations", cell.dataset, cell.category, model=model, code=code)
    run_step(store, key, partial(_calibrate, store, cell, validated, features, model))
    return key


def _calibrate(
    store: Store, cell: Cell, validated: Validated, features: str | None, model: str, draft: Draft
) -> dict[str, Any]:
    detector = load_model(store, model, cell)
    ids = store.get(model).meta["held_out"]
    scores: list[float] = []
    maxima: list[float] = []
    for part in detector.predict_batches(source_for(detector, validated, features, ids), runtime_of(cell)):
        scores += part.scores.tolist()
        maxima += part.maps.max(axis=(1, 2)).tolist()
    return {"ids": ids, "scores": scores, "map_maxima": maxima}
