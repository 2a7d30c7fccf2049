"""Map and score the test images."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import zarr
from prefect import task
from prefect.cache_policies import NO_CACHE

from storage.store import Draft, Store
from tasks.compute import detector_of, runtime_of
from tasks.fit import load_model, method_code, source_for
from tasks.handles import Cell, Validated
from tasks.limits import in_memory
from tasks.steps import GPU, retry_passing, run_step, step_key
from tasks.stored import accepted_samples

CHUNK = 8


@task(
    name="predict",
    task_run_name="predict {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}",
    tags=[GPU],
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=1,
    retry_condition_fn=retry_passing,
)
def predict(cell: Cell, validated: Validated, features: str | None, model: str) -> str:
    """Key of the maps: a Zarr array `maps` float16 (n, h, w) and `scores.parquet` (id, score), a row a test image."""
    store = Store(validated.category.store)
    code = method_code("tasks.predict", detector_of(cell))
    key = step_key("maps", cell.dataset, cell.category, model=model, code=code)
    run_step(store, key, partial(_predict, store, cell, validated, features, model))
    return key


def _predict(
    store: Store, cell: Cell, validated: Validated, features: str | None, model: str, draft: Draft
) -> dict[str, Any]:
    detector = load_model(store, model, cell)
    ids = [sample.id for sample in accepted_samples(validated) if sample.split == "test"]
    arrays: list[zarr.Array[Any]] = []

    def write_maps(batch_size: int) -> list[float]:
        """The scores."""
        scores: list[float] = []
        source = source_for(detector, validated, features, ids, batch_size)
        for part in detector.predict_batches(source, runtime_of(cell)):
            if not arrays:
                shape = (len(ids), *part.maps.shape[1:])
                arrays.append(store.create_array(f"{draft.folder}/maps", shape, "float16", chunk=CHUNK))
            arrays[0][len(scores) : len(scores) + len(part.ids)] = part.maps.astype(np.float16)
            scores += part.scores.tolist()
        return scores

    scores = in_memory(write_maps, 16)
    buffer = io.BytesIO()
    pd.DataFrame({"id": ids, "score": scores}).to_parquet(buffer, index=False)
    store.write_bytes(f"{draft.folder}/scores.parquet", buffer.getvalue())
    return {"ids": ids}
