"""What follows from counting, at every threshold, how many negatives and positives lie above it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sweep:
    """Negatives and positives flagged as the threshold falls over all distinct scores; equal scores move together."""

    false_positives: np.ndarray
    """int64 [t], cumulative; the last entry is all negatives."""
    true_positives: np.ndarray
    """int64 [t], cumulative; the last entry is all positives."""

    @staticmethod
    def of_counts(negatives: np.ndarray, positives: np.ndarray) -> Sweep:
        """From the counts int64 [t] of each distinct score, highest score first."""
        return Sweep(np.cumsum(negatives), np.cumsum(positives))

    @property
    def defined(self) -> bool:
        """Whether there are both negatives and positives; without, no metric below has a meaning."""
        return len(self.true_positives) > 0 and self.false_positives[-1] > 0 and self.true_positives[-1] > 0

    def false_positive_rate(self) -> np.ndarray:
        """Share of the negatives flagged, [t]."""
        return self.false_positives / self.false_positives[-1]

    def recall(self) -> np.ndarray:
        """Share of the positives flagged (true positive rate), [t]."""
        return self.true_positives / self.true_positives[-1]

    def precision(self) -> np.ndarray:
        """Share of the flagged that are positives, [t]."""
        return self.true_positives / (self.false_positives + self.true_positives)

    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, [t]: 2 TP / (flagged + positives)."""
        return 2 * self.true_positives / (self.false_positives + self.true_positives + self.true_positives[-1])

    def iou(self) -> np.ndarray:
        """Intersection over union of flagged and positives, [t]: TP / (FP + positives)."""
        return self.true_positives / (self.false_positives + self.true_positives[-1])

    def auroc(self) -> float:
        """Area under the ROC curve by trapezoids, so that a tie counts one half."""
        return float(np.trapezoid(from_zero(self.recall()), from_zero(self.false_positive_rate())))

    def average_precision(self) -> float:
        """Sum of precision times gain of recall, without interpolation (scikit-learn's definition)."""
        return float(np.dot(np.diff(self.recall(), prepend=0.0), self.precision()))


def from_zero(values: np.ndarray) -> np.ndarray:
    """The values after a 0: where a curve stands before anything is flagged."""
    return np.concatenate([[0.0], values])


def area_to_limit(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """Area under the curve from 0 to `limit`, divided by `limit`; at the limit the curve is interpolated linearly."""
    inside = x <= limit
    x_inside = np.append(x[inside], limit)
    y_inside = np.append(y[inside], np.interp(limit, x, y))
    return float(np.trapezoid(y_inside, x_inside) / limit)


def thin(x: np.ndarray, y: np.ndarray, most: int = 200) -> tuple[list[float], list[float]]:
    """At most `most` points of a curve for plotting, evenly spaced along its length; both ends stay."""
    if len(x) > most:
        travelled = from_zero(np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
        keep = np.unique(np.searchsorted(travelled, np.linspace(0, travelled[-1], most)))
        x, y = x[keep], y[keep]
    return x.tolist(), y.tolist()
