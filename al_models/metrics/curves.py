"""Curves and areas (ROC, precision-recall, PRO) from the numbers of negatives and positives above every threshold.

Everything works along the last axis, so that many weighted copies of the counts (a bootstrap) are one call.
PRO: Bergmann et al., MVTec AD, IJCV 2021, section 5.1 (per-region overlap).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from al_models.errors import InvalidInput

REGION_UNITS = 2**40
"""A whole region in fixed point: its overlap is kept within 5e-13, and int64 holds the sum of 8 million regions."""
PRO_LIMITS = (0.3, 0.05, 0.01)
"""False positive rates up to which PRO is averaged."""


@dataclass(frozen=True)
class Sweep:
    """Negatives and positives flagged as the threshold falls over all distinct scores; equal scores move together.

    Arrays [..., t], int64, or float where images are weighted; the highest score comes first.
    """

    negatives: np.ndarray
    """Negatives at each score, [..., t]."""
    positives: np.ndarray
    false_positives: np.ndarray
    """Negatives at or above each score, [..., t]; the last entry is all negatives."""
    true_positives: np.ndarray

    @staticmethod
    def of_counts(negatives: np.ndarray, positives: np.ndarray) -> Sweep:
        """The sweep over counts [..., t] of each distinct score, highest score first."""
        return Sweep(negatives, positives, np.cumsum(negatives, axis=-1), np.cumsum(positives, axis=-1))

    @property
    def defined(self) -> np.ndarray:
        """Whether there are both negatives and positives, bool [...]; without, no metric below has a meaning."""
        if self.negatives.shape[-1] == 0:
            return np.zeros(self.negatives.shape[:-1], bool)
        return (self.false_positives[..., -1] > 0) & (self.true_positives[..., -1] > 0)

    def false_positive_rate(self) -> np.ndarray:
        """Share of the negatives flagged, [..., t]."""
        return self.false_positives / self.false_positives[..., -1:]

    def recall(self) -> np.ndarray:
        """Share of the positives flagged (true positive rate), [..., t]."""
        return self.true_positives / self.true_positives[..., -1:]

    def precision(self) -> np.ndarray:
        """Share of the flagged that are positives, [..., t]; 0 while nothing is flagged."""
        flagged = self.false_positives + self.true_positives
        return np.divide(self.true_positives, flagged, out=np.zeros(flagged.shape), where=flagged > 0)

    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, [..., t]: 2 TP / (flagged + positives)."""
        return 2 * self.true_positives / (self.false_positives + self.true_positives + self.true_positives[..., -1:])

    def iou(self) -> np.ndarray:
        """Intersection over union of flagged and positives, [..., t]: TP / (FP + positives)."""
        return self.true_positives / (self.false_positives + self.true_positives[..., -1:])

    def auroc(self) -> np.ndarray:
        """Share of (negative, positive) pairs in order, [...]; a tie counts one half."""
        in_order = np.sum(self.negatives * (self.true_positives - self.positives / 2), axis=-1)
        return in_order / (self.false_positives[..., -1] * self.true_positives[..., -1].astype(np.float64))

    def average_precision(self) -> np.ndarray:
        """Sum of precision times gain of recall, [...], without interpolation (scikit-learn's definition)."""
        return np.sum(self.positives * self.precision(), axis=-1) / self.true_positives[..., -1]


def pixel_metrics(
    normal: np.ndarray,
    anomalous: np.ndarray,
    overlap: np.ndarray,
    n_regions: np.ndarray | int,
    pro_limits: Sequence[float] = PRO_LIMITS,
) -> dict[str, np.ndarray]:
    """`pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `iou_max`, `pro` and `pro_at_...` of counts, float64 [...] each.

    `normal` and `anomalous` [..., k] count pixels by map value, `overlap` [..., k] sums the regions' shares in units of
    1 / REGION_UNITS region; the HIGHEST value comes first along the last axis. `n_regions` is [...]. Counts may be
    weighted sums (int64 or float64) over images; a value that does not occur may stand among them. NaN where there
    are no normal or no anomalous pixels. `pro` is the limit 0.3, `pro_at_0.05` the limit 0.05.
    """
    check_limits(pro_limits)
    sweep = Sweep.of_counts(np.asarray(normal), np.asarray(anomalous))
    if sweep.negatives.shape[-1] == 0:
        nothing = np.full(sweep.negatives.shape[:-1], np.nan)
        names = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "iou_max", *map(pro_name, pro_limits))
        return {name: nothing.copy() for name in names}
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 where a kind of pixel is missing
        found = {
            "pixel_auroc": sweep.auroc(),
            "pixel_ap": sweep.average_precision(),
            "pixel_f1_max": sweep.f1().max(axis=-1),
            "iou_max": sweep.iou().max(axis=-1),
        }
        areas = pro_areas(sweep.false_positive_rate(), mean_overlap(overlap, n_regions), pro_limits)
        found |= {pro_name(limit): area for limit, area in zip(pro_limits, areas, strict=True)}
    return {name: np.where(sweep.defined, values, np.nan) for name, values in found.items()}


def pro_name(limit: float) -> str:
    """`pro` for the customary limit 0.3, else `pro_at_0.05` and the like."""
    return "pro" if limit == 0.3 else f"pro_at_{limit:g}"


def check_limits(limits: Sequence[float]) -> None:
    """Raises InvalidInput unless each limit is a false positive rate above 0 and at most 1."""
    for limit in limits:
        if not 0 < limit <= 1:
            raise InvalidInput(f"one of pro_limits is {limit}; give false positive rates above 0 and at most 1")


def mean_overlap(overlap: np.ndarray, n_regions: np.ndarray | int) -> np.ndarray:
    """Mean over the regions of the share flagged, [..., t], as the threshold falls."""
    return np.cumsum(overlap, axis=-1) / (float(REGION_UNITS) * np.asarray(n_regions)[..., None])


def pro_areas(x: np.ndarray, y: np.ndarray, limits: Sequence[float]) -> list[np.ndarray]:
    """Areas [...] under the curve from (0, 0) through (x, y) [..., t] up to each limit, divided by that limit.

    Trapezoids; at the limit the curve is interpolated linearly.
    """
    x, y = from_zero(x), from_zero(y)
    area = from_zero(np.cumsum(np.diff(x) * (y[..., 1:] + y[..., :-1]) / 2, axis=-1))
    return [_area_to(x, y, area, limit) / limit for limit in limits]


def _area_to(x: np.ndarray, y: np.ndarray, area: np.ndarray, limit: float) -> np.ndarray:
    before = np.maximum(np.sum(x <= limit, axis=-1, keepdims=True) - 1, 0)  # the last point within the limit
    after = np.minimum(before + 1, x.shape[-1] - 1)
    x0, y0, done = (np.take_along_axis(values, before, axis=-1)[..., 0] for values in (x, y, area))
    x1, y1 = (np.take_along_axis(values, after, axis=-1)[..., 0] for values in (x, y))
    share = np.divide(limit - x0, x1 - x0, out=np.zeros(x0.shape), where=x1 > x0)
    return done + (limit - x0) * (y0 + share * (y1 - y0) / 2)


def from_zero(values: np.ndarray) -> np.ndarray:
    """The values after a 0, along the last axis: where a curve stands before anything is flagged."""
    return np.concatenate([np.zeros((*values.shape[:-1], 1)), values], axis=-1)


def thin(x: np.ndarray, y: np.ndarray, most: int = 200) -> tuple[list[float], list[float]]:
    """At most `most` points of a curve for plotting, evenly spaced along its length; both ends stay."""
    if len(x) > most:
        travelled = from_zero(np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        keep = np.unique(np.searchsorted(travelled, np.linspace(0, travelled[-1], most)))
        x, y = x[keep], y[keep]
    return x.tolist(), y.tolist()


@dataclass(frozen=True, eq=False)
class PixelTable:
    """Counts of pixels at each distinct value, highest first: all that the metrics of a data set follow from."""

    below: np.ndarray
    """float64 [t]: the threshold that flags this value and all above it; falling."""
    normal: np.ndarray
    """int64 [t], like the two below."""
    anomalous: np.ndarray
    overlap: np.ndarray
    """int64 [t]: sum over the regions of the share with each value, in units of 1 / REGION_UNITS region."""
    n_regions: int

    def metrics(self, pro_limits: Sequence[float] = PRO_LIMITS) -> dict[str, float]:
        """The metrics of `pixel_metrics` as plain floats; empty without both kinds of pixel."""
        found = pixel_metrics(self.normal, self.anomalous, self.overlap, self.n_regions, pro_limits)
        return {name: float(value) for name, value in found.items() if not np.isnan(value)}

    def best_thresholds(self) -> dict[str, float]:
        """The threshold that reaches `pixel_f1_max` and the one that reaches `iou_max`, the highest of equals."""
        sweep = Sweep.of_counts(self.normal, self.anomalous)
        if not sweep.defined:
            return {}
        return {
            "pixel_f1_max": float(self.below[np.argmax(sweep.f1())]),
            "iou_max": float(self.below[np.argmax(sweep.iou())]),
        }

    def curves(self) -> dict[str, tuple[list[float], list[float]]]:
        """`roc` (FPR, recall), `pr` (recall, precision), `pro` (FPR, mean overlap), thinned; x then y."""
        sweep = Sweep.of_counts(self.normal, self.anomalous)
        if not sweep.defined:
            return {}
        x = from_zero(sweep.false_positive_rate())
        return {
            "roc": thin(x, from_zero(sweep.recall())),
            "pr": thin(sweep.recall(), sweep.precision()),
            "pro": thin(x, from_zero(mean_overlap(self.overlap, self.n_regions))),
        }


def rates_at_threshold(false: int, true: int, negatives: int, positives: int) -> dict[str, float]:
    """`iou_at_threshold`, `precision_...`, `recall_...`, `fpr_at_threshold`; those without a meaning are absent.

    Pixels flagged, normal and anomalous, of all normal and all anomalous ones.
    """
    found = {}
    if negatives:
        found["fpr_at_threshold"] = false / negatives
    if positives:
        found["iou_at_threshold"] = true / (false + positives)
        found["recall_at_threshold"] = true / positives
    if positives and false + true:
        found["precision_at_threshold"] = true / (false + true)
    return found
