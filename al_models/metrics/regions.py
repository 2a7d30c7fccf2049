"""Regions of a mask counted by map value: overlap (PRO), saturated overlap (sPRO), and groups of regions by size.

A region is 8-connected (Bergmann et al., MVTec AD, IJCV 2021, section 5.1). Saturation: Bergmann et al., Beyond Dents
and Scratches, IJCV 2022, section 5: a defect counts as wholly found once as many of its pixels are flagged as its
saturation area. A relative saturation is rounded down to whole pixels, an absolute one cut at the defect's area, as
MVTec's own evaluation of LOCO AD does; theirs has no lower bound, here it is one pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from al_models.errors import InvalidInput
from al_models.metrics.curves import REGION_UNITS
from al_models.metrics.keys import N_KEYS

EIGHT_CONNECTED = np.ones((3, 3), bool)
SIZES = ("tiny", "small", "medium", "large")
SIZE_BOUNDS = (1e-4, 1e-3, 1e-2)
"""Shares of the image's area where small, medium and large begin: 10, 32 and 102 px squared in 1024 x 1024.

Fixed, not quartiles of a data set: shards agree on them without a look at each other, and data sets can be compared.
"""


@dataclass(frozen=True)
class Defect:
    """One annotated defect with the area that suffices: MVTec LOCO AD's mask file and line of defects_config.json."""

    mask: np.ndarray
    """bool [H, W]; it need not be connected, and defects of an image may share pixels."""
    saturation_threshold: float
    """Pixels, or a share of the defect's area where relative."""
    relative_saturation: bool = False

    def saturation_area(self, area: np.ndarray | int) -> float:
        """The pixels that suffice, for a defect of this area."""
        if self.relative_saturation:
            return max(1, int(self.saturation_threshold * int(area)))
        return min(self.saturation_threshold, int(area))


@dataclass(frozen=True, eq=False)
class RegionCounts:
    """Some regions of one image by map value; only the values that occur in them."""

    keys: np.ndarray
    """uint16 [a], rising."""
    anomalous: np.ndarray
    """int32 [a]: pixels of the regions; a pixel of two overlapping defects counts twice."""
    overlap: np.ndarray
    """int64 [a]: sum over the regions of the (saturated) share with this value, in units of 1 / REGION_UNITS."""
    n_regions: int


NO_REGIONS = RegionCounts(np.zeros(0, np.uint16), np.zeros(0, np.int32), np.zeros(0, np.int64), 0)


def _zeros() -> np.ndarray:
    return np.zeros(N_KEYS, np.int64)


@dataclass(eq=False)
class RegionSums:
    """RegionCounts of any number of images, added up: 1 MiB."""

    anomalous: np.ndarray = field(default_factory=_zeros)
    """int64 [65536] by key."""
    overlap: np.ndarray = field(default_factory=_zeros)
    """int64 [65536] likewise, in units of 1 / REGION_UNITS region."""
    n_regions: int = 0

    def add(self, counts: RegionCounts) -> None:
        """Add the counts of one image."""
        self.anomalous[counts.keys] += counts.anomalous  # each key once, so indexing adds
        self.overlap[counts.keys] += counts.overlap
        self.n_regions += counts.n_regions

    def merge(self, other: RegionSums) -> RegionSums:
        """The sums of both, as new sums."""
        return RegionSums(
            self.anomalous + other.anomalous, self.overlap + other.overlap, self.n_regions + other.n_regions
        )


@dataclass(frozen=True, eq=False)
class RegionPairs:
    """The distinct (region, key) of some regions and how often each occurs, by region and then by key."""

    region: np.ndarray
    """int64 [p], from 0."""
    key: np.ndarray
    """int64 [p]."""
    count: np.ndarray
    """int64 [p]."""
    area: np.ndarray
    """int64 [r], pixels of each region, all above 0."""

    @staticmethod
    def of(regions: np.ndarray, keys: np.ndarray, n_keys: int = N_KEYS) -> RegionPairs:
        """The pairs of each pixel's region [m], numbered from 0 with gaps where one has no pixel, and its key [m]."""
        area = np.bincount(regions)
        if not area.all():
            regions = (np.cumsum(area > 0) - 1)[regions]
            area = area[area > 0]
        codes, count = _count_distinct(regions.astype(np.int64) * n_keys + keys, len(area) * n_keys)
        return RegionPairs(codes // n_keys, codes % n_keys, count, area)

    def overlap(self, suffices: np.ndarray | None = None) -> np.ndarray:
        """Each pair's gain of its region's overlap as the key's pixels join, from the HIGHEST key down, int64 [p].

        In units of 1 / REGION_UNITS; `suffices` [r] are the pixels that saturate a region, its area where None. It is
        the running share of a region that is rounded, not each gain: errors do not pile up, and the gains of a region
        sum to REGION_UNITS exactly.
        """
        suffices = self.area if suffices is None else suffices
        before = np.cumsum(self.area)[self.region] - np.cumsum(self.count)  # its pixels with higher keys
        return self._reached(before + self.count, suffices) - self._reached(before, suffices)

    def _reached(self, pixels: np.ndarray, suffices: np.ndarray) -> np.ndarray:
        return np.rint(np.minimum(pixels / suffices[self.region], 1) * REGION_UNITS).astype(np.int64)

    def by_key(self, overlap: np.ndarray, chosen: np.ndarray | None = None) -> RegionCounts:
        """The counts by key, summed over the regions `chosen`, bool [r], or over all."""
        n_regions, key, count = len(self.area), self.key, self.count
        if chosen is not None:
            pairs = chosen[self.region]
            n_regions, key, count, overlap = int(chosen.sum()), key[pairs], count[pairs], overlap[pairs]
        keys, place = np.unique(key, return_inverse=True)
        anomalous, overlaps = np.zeros(len(keys), np.int32), np.zeros(len(keys), np.int64)
        np.add.at(anomalous, place, count.astype(np.int32))
        np.add.at(overlaps, place, overlap)
        return RegionCounts(keys.astype(np.uint16), anomalous, overlaps, n_regions)

    def by_size(self, overlap: np.ndarray, whole: RegionCounts, pixels: int) -> dict[str, RegionCounts]:
        """Size -> counts of its regions, only sizes that occur; `whole` are all of them, `pixels` the image's area."""
        size = np.digitize(self.area / pixels, SIZE_BOUNDS)  # (r,)
        present = np.unique(size)
        if len(present) == 1:
            return {SIZES[present[0]]: whole}  # no copy
        return {SIZES[s]: self.by_key(overlap, size == s) for s in present}


def label_regions(mask: np.ndarray) -> np.ndarray:
    """Each marked pixel's region, int [m] from 0, in the order of `mask[mask]`."""
    regions, _ = ndimage.label(mask, EIGHT_CONNECTED)
    return regions[mask] - 1


def box_of(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest rectangle that holds all of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def saturated(defects: list[tuple[Defect, np.ndarray]]) -> RegionCounts:
    """Counts of defects, each with the keys [m] of its pixels, with saturated overlap; those without a pixel drop out.

    Raises InvalidInput for a saturation that is no number above 0, or a relative one above 1.
    """
    for defect, _ in defects:
        most = 1 if defect.relative_saturation else np.inf
        if not 0 < defect.saturation_threshold <= most:
            raise InvalidInput(
                f"the saturation threshold of a defect is {defect.saturation_threshold} "
                f"(relative: {defect.relative_saturation}); give a number above 0, at most 1 where relative"
            )
    defects = [(defect, keys) for defect, keys in defects if len(keys)]
    if not defects:
        return NO_REGIONS
    regions = np.repeat(np.arange(len(defects)), [len(keys) for _, keys in defects])
    pairs = RegionPairs.of(regions, np.concatenate([keys for _, keys in defects]))
    suffices = np.array([defect.saturation_area(len(keys)) for defect, keys in defects], np.float64)
    return pairs.by_key(pairs.overlap(suffices))


def _count_distinct(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, rising, and how often each occurs; `values` lie in 0..limit-1."""
    if limit > 4 * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values, minlength=limit)  # many values of few kinds: a table is ten times faster than sorting
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]
