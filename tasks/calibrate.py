"""Score the held-out good images: all that thresholds are ever set from."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from al_models.calibration import HeldOutPixels
from al_models.parts.frame import peaks_at_rim
from storage.store import Draft, Store
from storage.tables import read_table, write_table
from tasks.core.compute import detector_of, runtime_of
from tasks.core.handles import Cell, Validated
from tasks.core.limits import in_memory
from tasks.core.steps import run_step, step, step_key
from tasks.fit import load_model, method_code, source_for


@step("calibrate", "calibrate {cell.method} {cell.dataset}/{cell.category} seed {cell.seed}", gpu=True)
def calibrate(cell: Cell, validated: Validated, features: str | None, model: str) -> str:
    """Key of the calibration: in its manifest, the scores and the largest map values of the held-out good images, and
    which of these lie at the rim; beside it, all map values, from which other maps get p-values (`held_out_pixels`).
    """
    store = Store(validated.category.store)
    code = method_code(__name__, detector_of(cell))
    key = step_key("calibrations", cell.dataset, cell.category, model=model, code=code)
    run_step(store, key, partial(_calibrate, store, cell, validated, features, model))
    return key


def _calibrate(
    store: Store, cell: Cell, validated: Validated, features: str | None, model: str, draft: Draft
) -> dict[str, Any]:
    detector = load_model(store, model, cell)
    ids = store.get(model).meta["held_out"]

    def look(batch_size: int) -> tuple[dict[str, list[Any]], HeldOutPixels]:
        pixels = HeldOutPixels()
        seen: dict[str, list[Any]] = {"scores": [], "map_maxima": [], "at_rim": []}
        source = source_for(detector, validated, features, ids, batch_size)
        for part in detector.predict_batches(source, runtime_of(cell)):
            maps = part.maps.astype(np.float16)  # as test maps are stored: a threshold in between would favour a side
            seen["scores"] += part.scores.tolist()
            seen["map_maxima"] += maps.max(axis=(1, 2)).tolist()
            seen["at_rim"] += peaks_at_rim(maps).tolist()
            for image_id, one in zip(part.ids, maps, strict=True):
                if image_id not in pixels.ids:  # equal content, equal map
                    pixels.add(image_id, one)
        return seen, pixels

    seen, pixels = in_memory(look, 16)
    _write_pixels(store, draft, pixels)
    return {"ids": ids, **seen}


def _write_pixels(store: Store, draft: Draft, pixels: HeldOutPixels) -> None:
    keys = np.flatnonzero(pixels.shares + pixels.maxima)
    table = pd.DataFrame({"key": keys, "share": pixels.shares[keys], "maxima": pixels.maxima[keys]})
    write_table(store, f"{draft.folder}/pixels.parquet", table)


def held_out_pixels(store: Store, key: str) -> HeldOutPixels:
    """The map values of the held-out images of a calibration. Raises NotInStore when it is not there."""
    calibration = store.get(key)
    table = read_table(store, f"{calibration.folder}/pixels.parquet")
    pixels = HeldOutPixels(ids=set(calibration.meta["ids"]))
    pixels.shares[table["key"]] = table["share"]
    pixels.maxima[table["key"]] = table["maxima"]
    return pixels
