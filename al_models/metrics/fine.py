"""Exact pixel metrics of float32 maps that are not rounded to float16, in two passes over the images.

Normal pixels matter only by where they lie among the anomalous ones: recall and overlap change at anomalous values
alone, and so do the maxima of F1 and IoU. The first pass therefore collects the distinct values of the anomalous
pixels, the second counts pixels at each of them and, normal ones, between them. Memory: 36 bytes for each distinct
anomalous value and one image, however many normal pixels there are; at most MOST_VALUES values, 0.6 GiB.

Merging is exact in both passes: a union of values, then sums of counts over the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from al_models.errors import InvalidInput
from al_models.metrics.curves import PRO_LIMITS, PixelTable, rates_at_threshold
from al_models.metrics.keys import just_below32, keys32_of
from al_models.metrics.per_image import checked_map, checked_mask, checked_valid
from al_models.metrics.regions import RegionPairs, box_of, label_regions
from al_models.metrics.resize import resize_map

MOST_VALUES = 2**24

Images = Iterable[tuple[str, np.ndarray, np.ndarray]]
"""Image id, map float [h, w], mask bool [H, W]; an empty mask for a good image."""


@dataclass(eq=False)
class FineCounts:
    """Pixels of float32 maps at and between chosen values; make it with the values of `anomalous_values`."""

    values: np.ndarray
    """uint32 [v]: distinct keys, rising: each value that anomalous pixels have, and any threshold to be asked about."""
    normal: np.ndarray = field(init=False)
    """int64 [2 v + 1]: normal pixels below the first value, equal to it, between it and the second, ..."""
    anomalous: np.ndarray = field(init=False)
    """int64 [v]."""
    overlap: np.ndarray = field(init=False)
    """int64 [v], in units of 1 / REGION_UNITS region."""
    n_regions: int = 0
    images: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        if len(self.values) > MOST_VALUES:
            raise InvalidInput(
                f"the anomalous pixels have {len(self.values)} distinct values, more than {MOST_VALUES} fit in memory; "
                "count with PixelCounts, which rounds maps to float16"
            )
        self.normal = np.zeros(2 * len(self.values) + 1, np.int64)
        self.anomalous = np.zeros(len(self.values), np.int64)
        self.overlap = np.zeros(len(self.values), np.int64)

    def add(
        self,
        image_id: str,
        map: np.ndarray,
        mask: np.ndarray | None,
        shape: tuple[int, int] | None = None,
        valid: np.ndarray | None = None,
    ) -> None:
        """Count one image, in the second pass; arguments as in `count_image`.

        Raises InvalidInput, and counts nothing, for a map that is not finite, an image counted before, or one that the
        first pass did not see.
        """
        if image_id in self.images:
            raise InvalidInput(f"image {image_id} is counted already; add each image once")
        normal, inside, regions = _split(image_id, map, mask, shape, valid)
        place = np.searchsorted(self.values, inside)
        if len(inside) and not np.array_equal(self.values[np.minimum(place, len(self.values) - 1)], inside):
            raise InvalidInput(f"image {image_id} has anomalous values that are not among these; collect them first")
        slots, counts = _slots(self.values, normal)
        self.normal[slots] += counts  # each slot once, so indexing adds
        if len(inside):
            pairs = RegionPairs.of(regions, place, len(self.values))
            np.add.at(self.anomalous, pairs.key, pairs.count)
            np.add.at(self.overlap, pairs.key, pairs.overlap())
            self.n_regions += len(pairs.area)
        self.images.add(image_id)

    def merge(self, other: FineCounts) -> FineCounts:
        """The counts of both, as new counts. Raises InvalidInput for an image in both, or other values."""
        if not np.array_equal(self.values, other.values):
            raise InvalidInput("two parts were counted at different values; give both the union of all")
        both = self.images & other.images
        if both:
            raise InvalidInput(f"image {min(both)} is counted in both parts; merge parts that share no image")
        merged = FineCounts(self.values, self.n_regions + other.n_regions, self.images | other.images)
        for name in ("normal", "anomalous", "overlap"):
            setattr(merged, name, getattr(self, name) + getattr(other, name))
        return merged

    def metrics(self, pro_limits: Sequence[float] = PRO_LIMITS) -> dict[str, float]:
        """As `PixelCounts.metrics`, without sPRO."""
        return self._table().metrics(pro_limits)

    def best_thresholds(self) -> dict[str, float]:
        """As `PixelCounts.best_thresholds`."""
        return self._table().best_thresholds()

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """As `PixelCounts.curves`."""
        return self._table().curves()

    def at_threshold(self, threshold: float) -> dict[str, float]:
        """As `PixelCounts.at_threshold`, for a threshold that is among the values. Raises InvalidInput for another."""
        key = threshold_key32(threshold)
        place = int(np.searchsorted(self.values, key))
        if place == len(self.values) or self.values[place] != key:
            raise InvalidInput(f"the threshold {threshold} was not counted at; name it before the second pass")
        false, true = int(self.normal[2 * place + 2 :].sum()), int(self.anomalous[place + 1 :].sum())
        return rates_at_threshold(false, true, int(self.normal.sum()), int(self.anomalous.sum()))

    def _table(self) -> PixelTable:
        """The counts at each value, highest first, and between values where there are normal pixels."""
        slots = len(self.normal)
        anomalous, overlap = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        anomalous[1::2], overlap[1::2] = self.anomalous, self.overlap
        below = np.full(slots, -np.inf)  # between values: never the best threshold, which flags no normal pixel in vain
        below[1::2] = just_below32(self.values)
        kept = np.flatnonzero(self.normal + anomalous)[::-1]
        return PixelTable(below[kept], self.normal[kept], anomalous[kept], overlap[kept], self.n_regions)


def fine_counts(read: Callable[[], Images], thresholds: Sequence[float] = ()) -> FineCounts:
    """Exact counts of float32 maps, from two passes over the images; `thresholds` are those to be asked about later."""
    values = np.unique(np.array([threshold_key32(threshold) for threshold in thresholds], np.uint32))
    for image_id, map, mask in read():
        values = np.union1d(values, anomalous_values(image_id, map, mask))
    counts = FineCounts(values)
    for image_id, map, mask in read():
        counts.add(image_id, map, mask)
    return counts


def anomalous_values(
    image_id: str, map: np.ndarray, mask: np.ndarray | None, valid: np.ndarray | None = None
) -> np.ndarray:
    """The distinct keys of an image's anomalous pixels, uint32, rising: the first pass; unite them over the images."""
    if mask is None:
        return np.zeros(0, np.uint32)
    _, inside, _ = _split(image_id, map, mask, None, valid)
    return np.unique(inside)


def threshold_key32(threshold: float) -> np.uint32:
    """The float32 key of a threshold. Raises InvalidInput for NaN."""
    if np.isnan(threshold):
        raise InvalidInput("the threshold is NaN; give a number")
    with np.errstate(over="ignore"):  # beyond float32: flags all or nothing
        return keys32_of(np.array([threshold]))[0]


def _split(
    image_id: str,
    map: np.ndarray,
    mask: np.ndarray | None,
    shape: tuple[int, int] | None,
    valid: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys of the normal pixels, keys of the anomalous ones [m], and their regions [m]."""
    mask, shape = checked_mask(image_id, mask, shape)
    valid = checked_valid(image_id, valid, shape)
    with np.errstate(over="ignore"):
        map = checked_map(image_id, map).astype(np.float32, copy=False)
    if not np.isfinite(map).all():
        raise InvalidInput(
            f"the map of image {image_id} holds NaN, inf or what float32 cannot; check the model that made it"
        )
    keys = keys32_of(resize_map(map, shape))
    seen = np.ones(shape, bool) if valid is None else valid
    if mask is None or not mask.any():
        return keys[seen], keys[:0, 0], np.zeros(0, np.int64)
    box = box_of(mask)
    inside, within = mask[box], seen[box][mask[box]]
    return keys[seen & ~mask], keys[box][inside][within], label_regions(inside)[within]


def _slots(values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where keys [m] lie among the values [v], 2 i + 1 at value i and 2 i below it: the places and their counts."""
    keys = np.sort(keys)  # sorted queries walk through the values in order
    place = np.searchsorted(values, keys)
    equal = np.zeros(len(keys), bool)
    within = place < len(values)
    equal[within] = values[place[within]] == keys[within]
    slots = 2 * place + equal
    starts = np.flatnonzero(np.diff(slots, prepend=-1))
    return slots[starts], np.diff(starts, append=len(slots))
