"""Map and score the test images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import zarr

from storage.store import Artifact, Draft, Store
from storage.tables import read_table, write_table
from tasks.core.compute import detector_of, runtime_of
from tasks.core.handles import Cell, Validated
from tasks.core.limits import in_memory
from tasks.core.parts import Part, joined
from tasks.core.steps import run_step, step, step_key
from tasks.core.stored import accepted_samples
from tasks.fit import load_model, method_code, source_for

CHUNK = 8


@step("predict", "predict {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}", gpu=True)
def predict(cell: Cell, validated: Validated, features: str | None, model: str, parts: Sequence[str] = ()) -> str:
    """Key of the maps: a Zarr array `maps` float16 (n, h, w) and `scores.parquet` (id, score), a row a test image.
    `parts`: keys of what `predict_part` has computed of it."""
    store, key = Store(validated.category.store), _key(cell, validated, model)
    work = partial(_join, store, parts) if parts else partial(_predict, store, cell, validated, features, model, None)
    run_step(store, key, work)
    return key


@step("predict part", "predict {cell.method} {cell.dataset}/{cell.category} seed {cell.seed} images {part}", gpu=True)
def predict_part(cell: Cell, validated: Validated, features: str | None, model: str, part: Part) -> str:
    """Key of the maps and scores of this part's images; none are computed where those of all are there already."""
    store = Store(validated.category.store)
    if store.find(_key(cell, validated, model)) is not None:
        return ""
    key = _key(cell, validated, model, part=asdict(part))
    run_step(store, key, partial(_predict, store, cell, validated, features, model, part))
    return key


def _key(cell: Cell, validated: Validated, model: str, **of_part: dict[str, int]) -> str:
    code = method_code(__name__, detector_of(cell))
    # A model of an earlier night is also asked about this night's images.
    data = validated.fingerprint
    return step_key("maps", cell.dataset, cell.category, model=model, data=data, code=code, **of_part)


def _join(store: Store, parts: Sequence[str], draft: Draft) -> dict[str, Any]:
    tables = [read_scores(store, store.get(part)) for part in parts]
    write_table(store, f"{draft.folder}/scores.parquet", pd.concat(tables, ignore_index=True))
    return joined(store, parts)


def _predict(
    store: Store,
    cell: Cell,
    validated: Validated,
    features: str | None,
    model: str,
    part: Part | None,
    draft: Draft,
) -> dict[str, Any]:
    detector = load_model(store, model, cell)
    ids = [sample.id for sample in accepted_samples(validated) if sample.split == "test"]
    ids = ids if part is None else list(part.of(ids))
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
    write_table(store, f"{draft.folder}/scores.parquet", pd.DataFrame({"id": ids, "score": scores}))
    return {"ids": ids}


def read_scores(store: Store, predicted: Artifact) -> pd.DataFrame:
    """A table of `id` and `score`, a row a test image."""
    return read_table(store, f"{predicted.folder}/scores.parquet")
