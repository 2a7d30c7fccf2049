"""Thresholds that reject at most a stated share of good images, from held-out good images alone.

Split conformal prediction: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005; Angelopoulos and
Bates, A Gentle Introduction to Conformal Prediction, arXiv:2107.07511, section 1. If the held-out good images and a
new good image are exchangeable (drawn alike, and none of them seen by the fit), the new one is equally likely to take
any rank among all n + 1, whatever the detector. The k-th smallest held-out score, k = ceil((n + 1)(1 - rate)), is
therefore exceeded with probability at most `rate`. The probability is over the held-out images too: one particular
threshold may do somewhat worse or better, the more so the fewer images it comes from.

The same holds for pixels when each image's score is the maximum of its map: at most `rate` of the good images show any
pixel above the threshold. Bilinear resizing keeps that true, since it never raises a maximum, and so does rounding maps
and threshold to float16, since it never changes an order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from scipy import special

from al_models.errors import InvalidInput

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Threshold:
    """A score above which an image is rejected, and what it promises."""

    rate: float
    """Share of good images that may be rejected, as asked."""
    value: float | None
    """Reject when score > value; None when there are too few held-out images for the rate."""
    n: int
    """Held-out good images it comes from."""
    smallest_rate: float
    """The smallest rate that n images support: 1 / (n + 1)."""

    @property
    def shortfall(self) -> str | None:
        """Why there is no value, and how many images would give one; None when there is a value."""
        if self.value is not None:
            return None
        return (
            f"a false-reject rate of {self.rate:g} needs at least {images_needed(self.rate)} held-out good images, "
            f"there are {self.n}; hold out more, or ask for a rate of at least {self.smallest_rate:.3g}"
        )


def images_needed(rate: float) -> int:
    """The fewest held-out good images that support a false-reject rate: the smallest n with 1 / (n + 1) <= rate."""
    return math.ceil(1 / _exact(rate)) - 1


def conformal_threshold(scores: np.ndarray, rate: float) -> Threshold:
    """The threshold that a new good image exceeds with probability at most `rate`, if exchangeable with the held-out.

    `scores` [n] are those of held-out good images (for pixels: the maxima of their maps), `rate` lies between 0 and 1.
    The value is the k-th smallest score, k = ceil((n + 1)(1 - rate)), and None when k > n. Raises InvalidInput for
    scores that are not finite or a rate outside (0, 1).
    """
    scores = _scores("calibration scores", scores)
    n = len(scores)
    allowed = math.floor((n + 1) * _exact(rate))  # of n + 1 exchangeable images, those that may be rejected
    value = float(np.sort(scores)[n - allowed]) if allowed else None  # the (n + 1 - allowed)-th smallest
    return Threshold(rate=float(rate), value=value, n=n, smallest_rate=1 / (n + 1))


def p_values(calibration_scores: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Conformal p-values float64 [m] of scores [m]: (1 + held-out scores [n] at least as high) / (n + 1).

    For a good image, P(p <= rate) <= rate; p <= rate exactly when the score exceeds `conformal_threshold(..., rate)`.
    """
    held_out = np.sort(_scores("calibration scores", calibration_scores))
    lower = np.searchsorted(held_out, _scores("scores", scores), side="left")
    return (1 + len(held_out) - lower) / (len(held_out) + 1)


def realised(scores: np.ndarray, labels: np.ndarray, threshold: Threshold) -> dict[str, float]:
    """What the threshold did on labelled images: `false_reject_rate` of the good, `miss_rate` of the anomalous.

    Scores [n]; labels bool [n], True for anomalous. Each rate comes with its 95 % Clopper-Pearson interval,
    `..._low` and `..._high`. A rate without images is absent; all are when the threshold has no value.
    """
    scores, labels = _scores("scores", scores), np.asarray(labels)
    if labels.shape != scores.shape or (labels.dtype != bool and len(labels)):
        raise InvalidInput(
            f"labels are {labels.dtype} {labels.shape} for {len(scores)} scores; give one bool a score, True: anomalous"
        )
    if threshold.value is None:
        return {}
    rejected, labels = scores > threshold.value, labels.astype(bool)
    return {
        **_rate("false_reject", rejected[~labels]),
        **_rate("miss", ~rejected[labels]),
    }


def clopper_pearson(hits: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a binomial probability seen `hits` times in `n` (Clopper and Pearson, 1934)."""
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


def _rate(name: str, hit: np.ndarray) -> dict[str, float]:
    if len(hit) == 0:
        return {}
    low, high = clopper_pearson(int(hit.sum()), len(hit))
    return {f"{name}_rate": float(hit.mean()), f"{name}_low": low, f"{name}_high": high}


def _exact(rate: float) -> Fraction:
    """The rate as written in decimals, so that 20 images at 0.05 give 1, not 0.99999."""
    if not 0 < rate < 1:
        raise InvalidInput(f"the false-reject rate is {rate}; give a share between 0 and 1, such as 0.05")
    return Fraction(str(float(rate)))


def _scores(what: str, scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise InvalidInput(f"{what} of shape {scores.shape} were given; give finite numbers, one an image, [n]")
    return scores
