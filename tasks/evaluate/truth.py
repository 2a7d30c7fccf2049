"""What is known of the pixels of the test images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from al_models.metrics import Defect
from storage.errors import MaskError
from storage.masks import read_mask, read_regions
from storage.points import measured_pixels
from storage.samples import Sample
from storage.store import Store
from storage.tables import read_table
from tasks.core.handles import Validated


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of one image's pixels, at the size of its file."""

    shape: tuple[int, int]
    mask: np.ndarray | None = None
    """bool (h, w): the anomalous pixels; None on a good image."""
    defects: list[Defect] | None = None
    """Annotated defects with their saturation, whose union is the mask; None where the data set has none."""
    valid: np.ndarray | None = None
    """bool (h, w): pixels that count; None: all."""

    def counted(self) -> dict[str, Any]:
        """The truth as `PixelCounts.add` takes it: where there are defects, their union is the mask."""
        return {
            "mask": None if self.defects else self.mask,
            "shape": self.shape if self.mask is None else None,
            "valid": self.valid,
            "defects": self.defects,
        }


class Truths:
    """Reads the truth about an image when it is asked for; no mask is kept."""

    def __init__(self, store: Store, validated: Validated) -> None:
        """The truth of a category's images."""
        catalogue = store.get(validated.category.catalogue).meta
        self._root, self._folders = Path(validated.category.root), catalogue["folders"]
        self._kinds = _saturation(catalogue.get("notes"))
        self._shapes = _native_shapes(store, validated)

    def of(self, sample: Sample) -> Truth | None:
        """The truth about a sample; None when nobody knows where the defect is. Raises MaskError or DatasetError for
        unusable files."""
        if sample.mask_state == "unknown":
            return None
        valid = None if sample.xyz is None else measured_pixels(self._root, sample, self._folders)
        if sample.mask is None:
            return Truth(self._shapes[sample.id], valid=valid)
        if not self._kinds:
            mask = read_mask(self._root, sample, self._folders)
            return Truth(mask.shape, mask, valid=valid)
        defects = self._defects(sample)
        mask = np.logical_or.reduce([defect.mask for defect in defects])
        return Truth(mask.shape, mask, defects, valid)

    def _defects(self, sample: Sample) -> list[Defect]:
        regions = read_regions(self._root, sample, self._folders)
        if not regions:
            raise MaskError(f"no file in {sample.mask} marks a pixel, so the defect of {sample.path} is unknown")
        strange = sorted({value for value, _ in regions} - self._kinds.keys())
        if strange:
            raise MaskError(
                f"{sample.mask} marks with the values {strange}, of which defects_config.json says nothing; it knows "
                f"{sorted(self._kinds)}: copy it from the archive again"
            )
        return [Defect(mask, *self._kinds[value]) for value, mask in regions]


def _saturation(notes: Any) -> Mapping[int, tuple[float, bool]]:
    """Value in the masks -> (saturation threshold, whether it is relative), where they are published (LOCO AD)."""
    entries: Sequence[Any] = notes if isinstance(notes, list) else []
    return {
        entry["pixel_value"]: (entry["saturation_threshold"], entry["relative_saturation"])
        for entry in entries
        if isinstance(entry, dict) and "saturation_threshold" in entry
    }


def _native_shapes(store: Store, validated: Validated) -> dict[str, tuple[int, int]]:
    """Image id -> (height, width) of the file."""
    folder = store.get(validated.prepared.images).folder
    facts = read_table(store, f"{folder}/facts.parquet", ["id", "height", "width", "readable"])
    facts = facts[facts["readable"]]
    return {row.id: (int(row.height), int(row.width)) for row in facts.itertuples()}
