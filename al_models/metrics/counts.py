"""Exact pixel metrics of any number of images, from counts that simply add up.

A map's values are rounded to float16, which has fewer than 65,536 values; everything after that rounding is exact. So
one count for each value, of normal and of anomalous pixels, holds all that ROC, precision-recall and PRO curves need:
the memory does not grow with the number of images, and counts made by different workers merge in any order.

PRO: Bergmann et al., MVTec AD, IJCV 2021, section 5.1 (per-region overlap); a region is 8-connected.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from al_models.detector import FLOAT16_MAX
from al_models.errors import InvalidInput
from al_models.metrics.curves import Sweep, area_to_limit, from_zero, thin
from al_models.metrics.resize import resize_map

N_KEYS = 65_536
BELOW_ALL = -65520.0
"""Rounds to -inf in float16: a threshold that every pixel exceeds."""
REGION_UNITS = 2**40
"""A whole region in fixed point: its overlap is kept within 5e-13, and int64 holds the sum of 8 million regions."""
_EIGHT_CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True)
class ImageRow:
    """One image's own figures, for choosing which images to show."""

    image_id: str
    n_normal: int
    """Pixels outside the mask, at the mask's size."""
    n_anomalous: int
    """Pixels inside the mask."""
    n_regions: int
    """8-connected regions of the mask."""
    auroc: float | None = None
    """None, like the two below, unless the image has both normal and anomalous pixels."""
    average_precision: float | None = None
    iou_max: float | None = None


def _zeros() -> np.ndarray:
    return np.zeros(N_KEYS, np.int64)


@dataclass(eq=False)
class PixelCounts:
    """Counts of pixels by map value; add (map, mask) pairs one by one, merge parts, then ask for metrics.

    All metrics see the maps rounded to float16 and are exact from there on: no binning, no clamping.
    """

    normal: np.ndarray = field(default_factory=_zeros)
    """int64 [65536]: normal pixels by the key of their value; keys rise with values."""
    anomalous: np.ndarray = field(default_factory=_zeros)
    """int64 [65536]: anomalous pixels likewise."""
    overlap: np.ndarray = field(default_factory=_zeros)
    """int64 [65536]: sum over regions of the share of the region that has this value, in units of 2^-40 region."""
    n_regions: int = 0
    images: dict[str, ImageRow] = field(default_factory=dict)
    """Image id -> its row."""

    def add(
        self, image_id: str, map: np.ndarray, mask: np.ndarray | None, shape: tuple[int, int] | None = None
    ) -> None:
        """Count one image.

        The map, float [h, w] of any size, is brought to the size of the mask, bool [H, W]. A good image has no mask:
        give None and the `shape` (H, W) to judge it at. Leave out images whose mask is unknown. Raises InvalidInput,
        and counts nothing, for a map that is not finite or beyond float16, for a mask that is not bool, and for an
        image that was counted before.
        """
        if image_id in self.images:
            raise InvalidInput(f"image {image_id} is counted already; add each image once")
        mask, shape = _checked_mask(image_id, mask, shape)
        keys = keys_of(resize_map(_checked_map(image_id, map), shape))
        normal = np.bincount(keys.ravel(), minlength=N_KEYS)
        anomalous, overlap, n_regions = _zeros(), _zeros(), 0
        if mask is not None and mask.any():
            box = _box(mask)  # labelling the defect's surroundings would cost more than all the rest
            mask, keys = mask[box], keys[box]
            regions, n_regions = ndimage.label(mask, _EIGHT_CONNECTED)
            inside = keys[mask]  # (m,)
            anomalous = np.bincount(inside, minlength=N_KEYS)
            normal = normal - anomalous
            overlap = _overlap(regions[mask], inside)
        self.normal += normal
        self.anomalous += anomalous
        self.overlap += overlap
        self.n_regions += n_regions
        self.images[image_id] = _row(image_id, normal, anomalous, n_regions)

    def merge(self, other: PixelCounts) -> PixelCounts:
        """The counts of both, as new counts; exact, whatever the order. Raises InvalidInput for an image in both."""
        both = self.images.keys() & other.images.keys()
        if both:
            raise InvalidInput(f"image {min(both)} is counted in both parts; merge parts that share no image")
        return PixelCounts(
            normal=self.normal + other.normal,
            anomalous=self.anomalous + other.anomalous,
            overlap=self.overlap + other.overlap,
            n_regions=self.n_regions + other.n_regions,
            images={**self.images, **other.images},
        )

    def rows(self) -> list[ImageRow]:
        """Each image's own figures, by image id."""
        return [self.images[image_id] for image_id in sorted(self.images)]

    def metrics(self, pro_limit: float = 0.3) -> dict[str, float]:
        """`pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `iou_max`, `pro`, fractions in 0..1; none without both kinds.

        `pro` is the area under mean overlap of the regions against the false positive rate of all normal pixels, up
        to `pro_limit` (in 0..1, 0 excluded) and divided by it.
        """
        if not 0 < pro_limit <= 1:
            raise InvalidInput(f"pro_limit is {pro_limit}; give a false positive rate above 0 and at most 1")
        keys, sweep = _sweep(self.normal, self.anomalous)
        if not sweep.defined:
            return {}
        return {
            "pixel_auroc": sweep.auroc(),
            "pixel_ap": sweep.average_precision(),
            "pixel_f1_max": float(sweep.f1().max()),
            "iou_max": float(sweep.iou().max()),
            "pro": area_to_limit(*self._pro_curve(keys, sweep), pro_limit),
        }

    def best_thresholds(self) -> dict[str, float]:
        """The threshold that reaches `pixel_f1_max` and the one that reaches `iou_max`: flag where map > threshold.

        The highest of equals. They are fitted to these very masks: to describe, never to decide.
        """
        keys, sweep = _sweep(self.normal, self.anomalous)
        if not sweep.defined:
            return {}
        return {
            "pixel_f1_max": _just_below(keys[np.argmax(sweep.f1())]),
            "iou_max": _just_below(keys[np.argmax(sweep.iou())]),
        }

    def at_threshold(self, threshold: float) -> dict[str, float]:
        """`iou_at_threshold`, `precision_...`, `recall_...`, `fpr_at_threshold` when pixels > threshold are flagged.

        The threshold is rounded to float16 like the maps, so a pixel that does not exceed it is never flagged. Only
        `fpr` has a meaning without anomalous pixels; `precision` has none when nothing is flagged. Raises InvalidInput
        for NaN.
        """
        if np.isnan(threshold):
            raise InvalidInput("the threshold is NaN; give a number")
        with np.errstate(over="ignore"):  # beyond float16: flags all or nothing
            first = int(keys_of(np.array([threshold]))[0]) + 1
        false, true = int(self.normal[first:].sum()), int(self.anomalous[first:].sum())
        negatives, positives = int(self.normal.sum()), int(self.anomalous.sum())
        found = {}
        if negatives:
            found["fpr_at_threshold"] = false / negatives
        if positives:
            found["iou_at_threshold"] = true / (false + positives)
            found["recall_at_threshold"] = true / positives
        if positives and false + true:
            found["precision_at_threshold"] = true / (false + true)
        return found

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """`roc` (FPR, recall), `pr` (recall, precision), `pro` (FPR, mean overlap) for plotting, x then y.

        At most 200 points a curve, its two ends among them; empty without both kinds of pixel.
        """
        keys, sweep = _sweep(self.normal, self.anomalous)
        if not sweep.defined:
            return {}
        return {
            "roc": thin(from_zero(sweep.false_positive_rate()), from_zero(sweep.recall())),
            "pr": thin(sweep.recall(), sweep.precision()),
            "pro": thin(*self._pro_curve(keys, sweep)),
        }

    def _pro_curve(self, keys: np.ndarray, sweep: Sweep) -> tuple[np.ndarray, np.ndarray]:
        mean_overlap = np.cumsum(self.overlap[keys]) / (REGION_UNITS * self.n_regions)
        return from_zero(sweep.false_positive_rate()), from_zero(mean_overlap)


def keys_of(values: np.ndarray) -> np.ndarray:
    """uint16 keys that order as the values do once rounded to float16; -0 and +0 share a key."""
    bits = values.astype(np.float16).view(np.int16)
    # A float is sign and magnitude, an integer two's complement: negate the magnitude where the sign bit is set.
    negative = bits >> 15  # -1 or 0
    signed = (bits ^ (negative & 0x7FFF)) - negative
    return signed.view(np.uint16) ^ np.uint16(0x8000)


def _just_below(key: int) -> float:
    """The largest float16 value below this key's: flags the key and all above it."""
    signed = int(key) - 1 - 0x8000
    bits = signed if signed >= 0 else 0x8000 - signed
    return max(float(np.uint16(bits).view(np.float16)), BELOW_ALL)


def _sweep(normal: np.ndarray, anomalous: np.ndarray) -> tuple[np.ndarray, Sweep]:
    """The keys that occur, highest first [t], and what is flagged from each on."""
    keys = np.flatnonzero(normal + anomalous)[::-1]
    return keys, Sweep.of_counts(normal[keys], anomalous[keys])


def _overlap(regions: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Share of each region by key, summed over regions: int64 [65536] in units of 1 / REGION_UNITS.

    `regions` [m] counts from 1, `keys` [m]. It is the running share of a region that is rounded, not each pixel's
    weight: errors do not pile up, and each region sums to REGION_UNITS exactly.
    """
    area = np.bincount(regions)[1:]  # (r,)
    pairs, counts = _count_distinct((regions.astype(np.int64) - 1) * N_KEYS + keys, len(area) * N_KEYS)
    region = pairs // N_KEYS  # (pairs stand by region, then by key)
    seen = np.cumsum(counts) - (np.cumsum(area) - area)[region]  # pixels of the region up to this key
    running = region * REGION_UNITS + np.rint(seen / area[region] * REGION_UNITS).astype(np.int64)
    overlap = _zeros()
    np.add.at(overlap, pairs % N_KEYS, np.diff(running, prepend=0))
    return overlap


def _count_distinct(values: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, rising, and how often each occurs; `values` lie in 0..limit-1."""
    if limit > 4 * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values, minlength=limit)  # many values of few kinds: a table is ten times faster than sorting
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest rectangle that holds all of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _row(image_id: str, normal: np.ndarray, anomalous: np.ndarray, n_regions: int) -> ImageRow:
    n_normal, n_anomalous = int(normal.sum()), int(anomalous.sum())
    if not (n_normal and n_anomalous):
        return ImageRow(image_id, n_normal, n_anomalous, n_regions)
    _, sweep = _sweep(normal, anomalous)
    return ImageRow(
        image_id, n_normal, n_anomalous, n_regions, sweep.auroc(), sweep.average_precision(), float(sweep.iou().max())
    )


def _checked_map(image_id: str, map: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is refused below
        map = np.asarray(map).astype(np.float32, copy=False)
    if map.ndim != 2 or map.size == 0:
        raise InvalidInput(f"the map of image {image_id} has shape {map.shape}; give one map [h, w] at a time")
    if not np.abs(map).max() <= FLOAT16_MAX:  # a NaN fails any comparison
        raise InvalidInput(
            f"the map of image {image_id} holds NaN, inf or a value beyond ±{FLOAT16_MAX:.0f}, which float16 cannot "
            "hold; check the model that made it, or scale its maps down"
        )
    return map


def _checked_mask(
    image_id: str, mask: np.ndarray | None, shape: tuple[int, int] | None
) -> tuple[np.ndarray | None, tuple[int, int]]:
    if mask is None and shape is None:
        raise InvalidInput(f"image {image_id} has neither mask nor shape; give the shape (H, W) of a good image")
    mask = None if mask is None else np.asarray(mask)
    if mask is not None and (mask.dtype != bool or mask.ndim != 2):
        raise InvalidInput(f"the mask of image {image_id} is {mask.dtype} {mask.shape}; give bool [H, W]")
    if mask is not None and shape is not None and mask.shape != tuple(shape):
        raise InvalidInput(f"image {image_id} has a mask of shape {mask.shape} but shape {tuple(shape)}; give one")
    shape = tuple(shape) if mask is None else mask.shape
    if len(shape) != 2 or min(shape) < 1:
        raise InvalidInput(f"image {image_id} is to be judged at shape {shape}; give (H, W), both at least 1")
    return mask, shape
