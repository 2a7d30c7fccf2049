"""Count the pixels of a part of the test images, as evaluation adds them up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from al_models.metrics import ImageCounts, RegionCounts
from al_models.registry import detector_class
from storage.store import Draft, Store
from storage.tables import read_table, write_table
from tasks.core.handles import Cell, Validated
from tasks.core.parts import Part
from tasks.core.steps import code_fingerprint, run_step, step, step_key
from tasks.core.stored import accepted_samples
from tasks.evaluate.pixels import CountedPixels, count_pixels
from tasks.evaluate.thresholds import PROMISED_ALARMS
from tasks.evaluate.truth import Truths

_OF_REGIONS = ("keys", "anomalous", "overlap", "n_regions")


@step("count part", "count {cell.method} {cell.dataset}/{cell.category} seed {cell.seed} images {part}")
def count_part(cell: Cell, validated: Validated, maps: str, part: Part) -> str:
    """Key of `counts.parquet`, a row a test image of this part, and the `masks`, at the maps' size, for the report."""
    store = Store(validated.category.store)
    key = step_key(
        "counts",
        cell.dataset,
        cell.category,
        catalogue=validated.category.catalogue,
        verdict=validated.verdict,
        maps=maps,
        code=code_fingerprint(__name__),
        part=asdict(part),
    )
    run_step(store, key, partial(_count, store, cell, validated, maps, part))
    return key


def promised_alarms(cell: Cell) -> Sequence[float]:
    """The false alarms an image that the cell's method promises, to be counted."""
    return PROMISED_ALARMS if detector_class(cell.method).traits.promises_false_alarms else ()


def _count(store: Store, cell: Cell, validated: Validated, maps: str, part: Part, draft: Draft) -> dict[str, Any]:
    test = [sample for sample in accepted_samples(validated) if sample.split == "test"]
    samples, truths = part.of(test), Truths(store, validated)
    counted = count_pixels(store, truths, store.get(maps), samples, promised_alarms(cell), draft, part.first)
    by_id = {image.image_id: image for image in counted.images}
    rows = [_row(by_id[sample.id]) if sample.id in by_id else {"id": sample.id} for sample in samples]
    write_table(store, f"{draft.folder}/counts.parquet", pd.DataFrame(rows).assign(maximum=counted.maxima), "zstd")
    alarms = [[rate, seen] for rate, seen in counted.alarms.items()]
    return {"ids": [sample.id for sample in samples], "alarms": alarms}


def _row(image: ImageCounts) -> dict[str, Any]:
    """An image's counts as a flat row."""
    row: dict[str, Any] = {"id": image.image_id, "defect_type": image.defect_type}
    row |= {"normal_keys": image.normal_keys, "normal_counts": image.normal_counts}
    groups = {"regions": image.regions, "defects": image.defects} | {f"size {k}": v for k, v in image.by_size.items()}
    for group, regions in groups.items():
        if regions is not None:
            row |= {f"{group} {name}": getattr(regions, name) for name in _OF_REGIONS}
    return row


def counted_parts(store: Store, parts: Sequence[str]) -> CountedPixels:
    """The counts of the parts, added up: as if one pass had counted all."""
    counted, maxima = CountedPixels.nothing(()), []
    for part in map(store.get, parts):
        if not part.meta["ids"]:
            continue
        table = read_table(store, f"{part.folder}/counts.parquet")
        maxima.append(table["maximum"].to_numpy(np.float64))
        for image_id, image in zip(table["id"], _images(table), strict=True):
            if image is None:
                counted.counts.exclude(image_id)
            else:
                counted.counts.add_counts(image)
                counted.images.append(image)
        for rate, seen in part.meta["alarms"]:
            counted.alarms.setdefault(rate, []).extend(seen)
    counted.maxima = np.concatenate(maxima) if maxima else counted.maxima
    return counted


def _images(table: pd.DataFrame) -> Iterator[ImageCounts | None]:
    """The counts of each row; None where the truth is unknown."""
    sizes = [name.split()[1] for name in table if name.startswith("size ") and name.endswith(" keys")]
    for row in table.to_dict("records"):
        if row.get("normal_keys") is None:
            yield None
            continue
        by_size = {size: regions for size in sizes if (regions := _regions(row, f"size {size}")) is not None}
        regions, defects = _regions(row, "regions"), _regions(row, "defects")
        assert regions is not None
        yield ImageCounts(
            row["id"], row["normal_keys"], row["normal_counts"], regions, by_size, defects, row["defect_type"]
        )


def _regions(row: dict[str, Any], group: str) -> RegionCounts | None:
    if row.get(f"{group} keys") is None:
        return None
    return RegionCounts(*(row[f"{group} {name}"] for name in _OF_REGIONS[:3]), int(row[f"{group} n_regions"]))
