"""Exact pixel metrics of any number of images, from counts that simply add up.

One count for each of float16's values, of normal and of anomalous pixels, holds all that ROC, precision-recall and PRO
curves need: counts made by different workers merge in any order, to the bit. Memory does not grow with the number of
pixels: 0.5 MiB, and 1 MiB for all regions, for each of four sizes, for each defect type and for annotated defects; an
image adds its row of some hundred bytes.

PRO: Bergmann et al., MVTec AD, IJCV 2021, section 5.1. sPRO: Bergmann et al., IJCV 2022, section 5 (LOCO AD).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from al_models.errors import InvalidInput
from al_models.metrics.curves import (
    PRO_LIMITS,
    PixelTable,
    check_limits,
    mean_overlap,
    pro_areas,
    rates_at_threshold,
)
from al_models.metrics.keys import N_KEYS, just_below, keys_of
from al_models.metrics.per_image import ImageCounts, ImageRow, count_image
from al_models.metrics.regions import SIZES, Defect, RegionSums


def _zeros() -> np.ndarray:
    return np.zeros(N_KEYS, np.int64)


@dataclass(eq=False)
class PixelCounts:
    """Counts of pixels by map value; add images one by one, merge parts, then ask for metrics.

    All metrics see the maps rounded to float16 and are exact from there on: no binning, no clamping.
    """

    normal: np.ndarray = field(default_factory=_zeros)
    """int64 [65536]: normal pixels by the key of their value; keys rise with values."""
    regions: RegionSums = field(default_factory=RegionSums)
    """Anomalous pixels and overlap of all regions."""
    sizes: dict[str, RegionSums] = field(default_factory=dict)
    """Size of region -> anomalous pixels and overlap of the regions of that size."""
    types: dict[str, RegionSums] = field(default_factory=dict)
    """Defect type of the image -> anomalous pixels and overlap of its regions."""
    defects: RegionSums | None = None
    """Annotated defects with saturated overlap; None until an image has some."""
    images: dict[str, ImageRow] = field(default_factory=dict)
    """Image id -> its row."""
    excluded: set[str] = field(default_factory=set)
    """Images left out because their mask is unknown."""

    @staticmethod
    def of(images: Iterable[ImageCounts]) -> PixelCounts:
        """The counts of these images."""
        counts = PixelCounts()
        for image in images:
            counts.add_counts(image)
        return counts

    @property
    def anomalous(self) -> np.ndarray:
        """int64 [65536]: anomalous pixels by key."""
        return self.regions.anomalous

    @property
    def overlap(self) -> np.ndarray:
        """int64 [65536]: sum over regions of the share of the region with this key, in units of 2^-40 region."""
        return self.regions.overlap

    @property
    def n_regions(self) -> int:
        """8-connected regions of all masks."""
        return self.regions.n_regions

    def add(
        self,
        image_id: str,
        map: np.ndarray,
        mask: np.ndarray | None,
        shape: tuple[int, int] | None = None,
        valid: np.ndarray | None = None,
        defects: Sequence[Defect] | None = None,
        defect_type: str | None = None,
    ) -> ImageCounts:
        """Count one image, as `count_image` does, and return its counts; `exclude` an image whose mask is unknown.

        Raises InvalidInput, and counts nothing, for what `count_image` refuses and for an image known already.
        """
        self._check_new(image_id)
        image = count_image(image_id, map, mask, shape=shape, valid=valid, defects=defects, defect_type=defect_type)
        self.add_counts(image)
        return image

    def add_counts(self, image: ImageCounts) -> None:
        """Add an image that is counted already. Raises InvalidInput for an image known already."""
        self._check_new(image.image_id)
        self.normal[image.normal_keys] += image.normal_counts  # each key once, so indexing adds
        self.regions.add(image.regions)
        for size, regions in image.by_size.items():
            self.sizes.setdefault(size, RegionSums()).add(regions)
        if image.defect_type is not None and image.regions.n_regions:
            self.types.setdefault(image.defect_type, RegionSums()).add(image.regions)
        if image.defects is not None:
            self.defects = self.defects or RegionSums()
            self.defects.add(image.defects)
        self.images[image.image_id] = image.row()

    def exclude(self, image_id: str) -> None:
        """Leave an image out whose mask is unknown: it enters no metric but is listed in `excluded`."""
        self._check_new(image_id)
        self.excluded.add(image_id)

    def _check_new(self, image_id: str) -> None:
        if image_id in self.images or image_id in self.excluded:
            raise InvalidInput(f"image {image_id} is counted already; add each image once")

    def merge(self, other: PixelCounts) -> PixelCounts:
        """The counts of both, as new counts; exact, whatever the order. Raises InvalidInput for an image in both."""
        both = (self.images.keys() | self.excluded) & (other.images.keys() | other.excluded)
        if both:
            raise InvalidInput(f"image {min(both)} is counted in both parts; merge parts that share no image")
        of_defects = [part.defects for part in (self, other) if part.defects is not None]
        return PixelCounts(
            normal=self.normal + other.normal,
            regions=self.regions.merge(other.regions),
            sizes=_merged(self.sizes, other.sizes),
            types=_merged(self.types, other.types),
            defects=_sum(of_defects) if of_defects else None,
            images={**self.images, **other.images},
            excluded=self.excluded | other.excluded,
        )

    def rows(self) -> list[ImageRow]:
        """Each image's own figures, by image id."""
        return [self.images[image_id] for image_id in sorted(self.images)]

    def metrics(self, pro_limits: Sequence[float] = PRO_LIMITS) -> dict[str, float]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `iou_max`, `pro...`, fractions in 0..1; none without both kinds.

        `pro` is the area under mean overlap of the regions against the false positive rate of all normal pixels, up
        to 0.3 and divided by it; `pro_at_0.05`, `pro_at_0.01` likewise up to 0.05 and 0.01. Where images had annotated
        defects, `spro_at_0.3` and so on are the same with saturated overlap of the defects (LOCO AD: 0.05). Limits
        lie in 0..1, 0 excluded.
        """
        found = self._table(self.regions).metrics(pro_limits)
        return found | self._spro(pro_limits)

    def metrics_by_size(self) -> dict[str, dict[str, float]]:
        """Size of region -> metrics of those regions against ALL normal pixels, with their `n_regions`, `n_pixels`.

        Sizes, by the share of the image's area: tiny below 0.01 %, small below 0.1 %, medium below 1 %, large from
        there on; only sizes that occur. Regions of other sizes are left out. AP and F1 depend on how many anomalous
        pixels there are, so compare them between methods, not between sizes; AUROC and PRO do not.
        """
        return {size: self._of_group(self.sizes[size]) for size in SIZES if size in self.sizes}

    def metrics_by_type(self) -> dict[str, dict[str, float]]:
        """Defect type -> metrics of its regions against ALL normal pixels, as `metrics_by_size`; by name."""
        return {name: self._of_group(self.types[name]) for name in sorted(self.types)}

    def best_thresholds(self) -> dict[str, float]:
        """The threshold that reaches `pixel_f1_max` and the one that reaches `iou_max`: flag where map > threshold.

        The highest of equals. They are fitted to these very masks: to describe, never to decide.
        """
        return self._table(self.regions).best_thresholds()

    def at_threshold(self, threshold: float) -> dict[str, float]:
        """`iou_at_threshold`, `precision_...`, `recall_...`, `fpr_at_threshold` when pixels > threshold are flagged.

        The threshold is rounded to float16 like the maps, so a pixel that does not exceed it is never flagged. Only
        `fpr` has a meaning without anomalous pixels; `precision` has none when nothing is flagged. Raises InvalidInput
        for NaN.
        """
        first = threshold_key(threshold) + 1
        return rates_at_threshold(
            int(self.normal[first:].sum()),
            int(self.anomalous[first:].sum()),
            int(self.normal.sum()),
            int(self.anomalous.sum()),
        )

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """`roc` (FPR, recall), `pr` (recall, precision), `pro` (FPR, mean overlap) for plotting, x then y.

        At most 200 points a curve, its two ends among them; empty without both kinds of pixel.
        """
        return self._table(self.regions).curves()

    def _table(self, sums: RegionSums) -> PixelTable:
        keys = np.flatnonzero(self.normal + sums.anomalous)[::-1]
        return PixelTable(just_below(keys), self.normal[keys], sums.anomalous[keys], sums.overlap[keys], sums.n_regions)

    def _of_group(self, sums: RegionSums) -> dict[str, float]:
        counted = {"n_regions": sums.n_regions, "n_pixels": int(sums.anomalous.sum())}
        return counted | self._table(sums).metrics()

    def _spro(self, limits: Sequence[float]) -> dict[str, float]:
        check_limits(limits)
        if self.defects is None or not self.defects.n_regions or not self.normal.any():
            return {}
        keys = np.flatnonzero(self.normal + self.defects.overlap)[::-1]
        false = np.cumsum(self.normal[keys])
        curve = mean_overlap(self.defects.overlap[keys], self.defects.n_regions)
        areas = pro_areas(false / false[-1], curve, limits)
        return {f"spro_at_{limit:g}": float(area) for limit, area in zip(limits, areas, strict=True)}


def threshold_key(threshold: float) -> int:
    """The float16 key of a threshold: pixels with a higher key are flagged. Raises InvalidInput for NaN."""
    if np.isnan(threshold):
        raise InvalidInput("the threshold is NaN; give a number")
    with np.errstate(over="ignore"):  # beyond float16: flags all or nothing
        return int(keys_of(np.array([threshold]))[0])


def _merged(one: Mapping[str, RegionSums], other: Mapping[str, RegionSums]) -> dict[str, RegionSums]:
    names = sorted(one.keys() | other.keys())
    return {name: _sum([part[name] for part in (one, other) if name in part]) for name in names}


def _sum(parts: Sequence[RegionSums]) -> RegionSums:
    total = RegionSums()
    for part in parts:
        total = total.merge(part)
    return total
