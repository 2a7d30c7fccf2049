"""How well the outline of what is flagged follows the outline of the defect.

Boundary F: Martin, Fowlkes, Malik, PAMI 2004; Perazzi et al., DAVIS, CVPR 2016, which match by dilation, as is done
here with exact distances. The boundary of a set are its pixels with one of their four neighbours outside the set; the
image's edge is no boundary, since nobody drew it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from al_models.errors import InvalidInput
from al_models.metrics.counts import threshold_key
from al_models.metrics.per_image import checked_mask, checked_valid, keys_at
from al_models.metrics.regions import box_of


@dataclass(frozen=True)
class BoundaryCounts:
    """Boundary pixels and how many of them lie near the other boundary; counts of images add up."""

    flagged: int = 0
    """Boundary pixels of what is flagged."""
    flagged_matched: int = 0
    """Those within the tolerance of the mask's boundary."""
    true: int = 0
    """Boundary pixels of the mask."""
    true_matched: int = 0
    """Those within the tolerance of the flagged boundary."""

    def __add__(self, other: BoundaryCounts) -> BoundaryCounts:
        return BoundaryCounts(
            self.flagged + other.flagged,
            self.flagged_matched + other.flagged_matched,
            self.true + other.true,
            self.true_matched + other.true_matched,
        )

    def metrics(self) -> dict[str, float]:
        """`boundary_precision`, `boundary_recall` and `boundary_f`, their harmonic mean.

        Precision is absent when nothing flagged has a boundary, recall when no mask has; F only when both are.
        """
        found = {}
        if self.flagged:
            found["boundary_precision"] = self.flagged_matched / self.flagged
        if self.true:
            found["boundary_recall"] = self.true_matched / self.true
        if found:
            precision, recall = found.get("boundary_precision", 0.0), found.get("boundary_recall", 0.0)
            found["boundary_f"] = 2 * precision * recall / (precision + recall) if precision and recall else 0.0
        return found


def boundary_f(
    image_id: str,
    map: np.ndarray,
    mask: np.ndarray | None,
    thresholds: Sequence[float],
    tolerance: float = 2.0,
    shape: tuple[int, int] | None = None,
    valid: np.ndarray | None = None,
) -> list[BoundaryCounts]:
    """One image's boundary counts when pixels > threshold are flagged, for each threshold; add up those of images and
    ask for `metrics()`.

    The map [h, w] is brought to the mask's size, it and the threshold are rounded to float16, as everywhere here. The
    tolerance is a distance between pixel centres. Without a mask (`shape` (H, W) given) all that is flagged is
    unmatched: leave good images out to judge outlines alone. Boundary pixels outside `valid` are left out. Raises
    InvalidInput for what `count_image` refuses, a NaN threshold or a negative tolerance.
    """
    if not tolerance >= 0:
        raise InvalidInput(f"the tolerance is {tolerance} pixels; give 0 or more")
    mask, shape = checked_mask(image_id, mask, shape)
    valid = checked_valid(image_id, valid, shape)
    keys = keys_at(image_id, map, shape)
    all_flagged = [_boundary(keys > threshold_key(threshold), valid) for threshold in thresholds]
    true = np.zeros(shape, bool) if mask is None else _boundary(mask, valid)
    if not true.any():
        return [BoundaryCounts(flagged=int(np.count_nonzero(flagged))) for flagged in all_flagged]
    box = _grown(box_of(true), int(np.floor(tolerance)))  # what matches lies within
    true = true[box]
    near_true = _near(true, tolerance)
    return [
        BoundaryCounts(
            flagged=int(np.count_nonzero(flagged)),
            flagged_matched=int(np.count_nonzero(flagged[box] & near_true)),
            true=int(np.count_nonzero(true)),
            true_matched=int(np.count_nonzero(true & _near(flagged[box], tolerance))),
        )
        for flagged in all_flagged
    ]


def _boundary(inside: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    core = inside.copy()
    core[1:] &= inside[:-1]
    core[:-1] &= inside[1:]
    core[:, 1:] &= inside[:, :-1]
    core[:, :-1] &= inside[:, 1:]
    boundary = inside & ~core
    return boundary if valid is None else boundary & valid


def _grown(box: tuple[slice, slice], by: int) -> tuple[slice, slice]:
    rows, columns = box
    return slice(max(rows.start - by, 0), rows.stop + by), slice(max(columns.start - by, 0), columns.stop + by)


def _near(marked: np.ndarray, distance: float) -> np.ndarray:
    """Pixels at most this far from a marked one."""
    if not marked.any():
        return marked
    return ndimage.distance_transform_edt(~marked) <= distance
