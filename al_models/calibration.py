"""Thresholds and p-values from held-out good images alone.

Split conformal prediction: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World, 2005; Angelopoulos and
Bates, A Gentle Introduction to Conformal Prediction, arXiv:2107.07511, section 1. If the held-out good images and a
new good image are exchangeable (drawn alike, and none of them seen by the fit), the new one is equally likely to take
any rank among all n + 1, whatever the detector. The k-th smallest held-out score, k = ceil((n + 1)(1 - rate)), is
therefore exceeded with probability at most `rate`; no rate below 1 / (n + 1) can be had. The probability is over the
held-out images too: one particular threshold does somewhat worse or better, and `expected_rate` says by how much.

The same holds for pixels when each image's score is the maximum of its map: at most `rate` of the good images show any
pixel above the threshold. Bilinear resizing keeps that true, since it never raises a maximum, and so does rounding maps
and threshold to float16, since it never changes an order.

Labelled defects set nothing here: `missed` and `realised` report what a threshold that is fixed already does to them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

import numpy as np
from scipy import ndimage, special, stats

from al_models.errors import InvalidInput, unknown
from al_models.metrics.keys import HIGHEST, LOWEST, N_KEYS, keys_of
from al_models.metrics.regions import EIGHT_CONNECTED

CONFIDENCE = 0.95
RATES = (0.005, 0.01, 0.05)
"""False-reject rates for which thresholds are made by default."""
_IMAGE_UNITS = 2**40
"""A whole image in fixed point: shares of its pixels are kept within 5e-13, and int64 holds 8 million images."""
Per = Literal["pixel", "image"]
PER: tuple[Per, ...] = get_args(Per)


@dataclass(frozen=True)
class Threshold:
    """A score above which an image is rejected, and what it promises."""

    rate: float
    """Share of good images that may be rejected, as asked for."""
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


def conformal_thresholds(scores: np.ndarray, rates: Sequence[float] = RATES) -> tuple[Threshold, ...]:
    """The `conformal_threshold` of each rate from the same held-out scores [n], in the order asked.

    Each keeps its own promise; that all of them do at once is not promised. A lower rate never gets a lower value.
    """
    return tuple(conformal_threshold(scores, rate) for rate in rates)


@dataclass(frozen=True)
class RateRange:
    """The false-reject rate to expect of one threshold."""

    mean: float
    """Over all sets of held-out images; at most the rate asked for."""
    low: float
    high: float
    """Bounds between which the rate lies with probability `confidence`; below and above, it lies equally often."""
    confidence: float


def expected_rate(n: int, rate: float, n_new: int | None = None, confidence: float = CONFIDENCE) -> RateRange | None:
    """The share of good images that a threshold of n held-out ones rejects; None when n do not support the rate.

    Over all good images that share is distributed as Beta(l, n + 1 - l), l = floor((n + 1) rate), exactly so when no
    two scores are equal (Vovk, Conditional Validity of Inductive Conformal Predictors, ACML 2012; arXiv:2107.07511,
    section 3.2). With `n_new` it is the share of that many new images: beta-binomial, so wider. Where scores are equal,
    fewer are rejected: `mean` and `high` still bound the share, `low` does not. Raises InvalidInput for a rate or
    confidence outside (0, 1) or a negative number.
    """
    if n < 0 or (n_new is not None and n_new < 1):
        raise InvalidInput(f"n is {n} and n_new is {n_new}; give numbers of images, n_new at least 1")
    if not 0 < confidence < 1:
        raise InvalidInput(f"the confidence is {confidence}; give a share between 0 and 1, such as 0.95")
    allowed = math.floor((n + 1) * _exact(rate))
    if not allowed:
        return None
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if n_new is None:
        low, high = special.betaincinv(allowed, n + 1 - allowed, tails)
    else:
        low, high = stats.betabinom(n_new, allowed, n + 1 - allowed).ppf(tails) / n_new
    return RateRange(allowed / (n + 1), float(low), float(high), confidence)


def rejected_p_value(rejected: int, n_new: int, n: int, rate: float) -> float:
    """Probability that a threshold of n held-out images, set at `rate`, rejects at least `rejected` of n_new good ones.

    By the law of `expected_rate`, which knows how far the threshold itself may be off. 1 when n images do not support
    the rate, as there is no threshold then. Raises InvalidInput for more rejected images than there are.
    """
    if not 0 <= rejected <= n_new:
        raise InvalidInput(f"{rejected} of {n_new} images are said to be rejected; give a count between 0 and all")
    allowed = math.floor((n + 1) * _exact(rate))
    if not allowed or not n_new:
        return 1.0
    return float(stats.betabinom(n_new, allowed, n + 1 - allowed).sf(rejected - 1))


def p_values(calibration_scores: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Conformal p-values float64 [m] of scores [m]: (1 + held-out scores [n] at least as high) / (n + 1).

    For a good image, P(p <= rate) <= rate; p <= rate exactly when the score exceeds `conformal_threshold(..., rate)`.
    """
    held_out = np.sort(_scores("calibration scores", calibration_scores))
    lower = np.searchsorted(held_out, _scores("scores", scores), side="left")
    return (1 + len(held_out) - lower) / (len(held_out) + 1)


def realised(scores: np.ndarray, labels: np.ndarray, threshold: Threshold) -> dict[str, float]:
    """The threshold's rates on labelled images: `false_reject_rate` of the good, `miss_rate` of the anomalous.

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


def missed(scores: np.ndarray, threshold: Threshold) -> dict[str, float]:
    """`miss_rate` of a few labelled defects, scores [m], with its 95 % interval `miss_low`, `miss_high`.

    It reports and never moves the threshold: one fitted to known defects would promise nothing for unknown ones. Empty
    without defects, or when the threshold has no value.
    """
    scores = _scores("scores of defects", scores)
    return realised(scores, np.ones(len(scores), bool), threshold)


def clopper_pearson(hits: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a binomial probability seen `hits` times in `n` (Clopper and Pearson, 1934)."""
    tail = (1 - confidence) / 2
    low = float(special.betaincinv(hits, n - hits + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


# --- maps ---


@dataclass(eq=False)
class HeldOutPixels:
    """The map values of held-out good images, from which other maps get p-values; 1 MiB whatever the images.

    Values count as rounded to float16; everything is exact from there on, and parts merge to the bit in any order.
    """

    shares: np.ndarray = field(default_factory=lambda: np.zeros(N_KEYS, np.int64))
    """int64 [65536]: sum over the images of the share of pixels with this key, in units of 2^-40 image."""
    maxima: np.ndarray = field(default_factory=lambda: np.zeros(N_KEYS, np.int64))
    """int64 [65536]: images by the key of their highest value."""
    ids: set[str] = field(default_factory=set)
    """Ids of the images."""

    def add(self, image_id: str, map: np.ndarray) -> None:
        """Add the map, float of any shape, of one image. Raises InvalidInput for a map `pixel_p_values` refuses."""
        if image_id in self.ids:
            raise InvalidInput(f"image {image_id} is held out already; add each image once")
        counts = np.bincount(_map_keys(map), minlength=N_KEYS)
        # The running share is rounded, not each value's: errors do not pile up, and an image sums to one exactly.
        running = np.rint(np.cumsum(counts[::-1]) / counts.sum() * _IMAGE_UNITS).astype(np.int64)
        self.shares += np.diff(running, prepend=0)[::-1]
        self.maxima[np.flatnonzero(counts)[-1]] += 1
        self.ids.add(image_id)

    def merge(self, other: HeldOutPixels) -> HeldOutPixels:
        """The images of both, as a new whole. Raises InvalidInput for an image in both."""
        both = self.ids & other.ids
        if both:
            raise InvalidInput(f"image {min(both)} is in both parts; merge parts that share no image")
        return HeldOutPixels(self.shares + other.shares, self.maxima + other.maxima, self.ids | other.ids)

    def p_by_key(self, per: Per) -> np.ndarray:
        """The p-value of each key, float64 [65536], falling as the key rises."""
        counts, unit = (self.shares, _IMAGE_UNITS) if per == "pixel" else (self.maxima, 1)
        at_least = np.cumsum(counts[::-1])[::-1]
        return (unit + at_least) / (unit * (len(self.ids) + 1))


def pixel_p_values(map: np.ndarray, held_out: HeldOutPixels, per: Per = "pixel") -> np.ndarray:
    """A p-value for each pixel of a map, float64 of the map's shape; higher values never get higher p.

    Both kinds hold on average over held-out images and a new good image that is exchangeable with them, whatever the
    dependence of pixels within an image:

    - per "pixel": (1 + sum over held-out images of the share of their pixels at least as high) / (n + 1). The
      expected share of the new image's pixels with p <= a is at most a. Nothing is said of all its pixels at once: a
      good image that is bright as a whole may have all of them below a.
    - per "image": (1 + held-out images with any pixel at least as high) / (n + 1). The probability that ANY pixel of
      the new image has p <= a is at most a. It is never below the former, and p <= a exactly where the (rounded) value
      exceeds `conformal_threshold(maxima, a)`. Most pixels are lower than all maxima: their p is 1.

    Neither falls below 1 / (n + 1). Counting each held-out pixel as an observation of its own would, but its promise
    fails: pixels of an image are alike, and one image in a hundred that is brighter all over puts a hundredth of all
    pixels beyond anything n images have shown, however many pixels each has. Equal values count as higher, which only
    raises p. Compare maps of the size that was held out: resized maps are smoother. Raises InvalidInput for NaN, inf
    or values beyond float16.
    """
    if per not in PER:
        raise unknown("kind of p-value", per, PER)
    map = np.asarray(map)
    return held_out.p_by_key(per)[_map_keys(map)].reshape(map.shape)


def log10_p_map(map: np.ndarray, held_out: HeldOutPixels, per: Per = "pixel") -> np.ndarray:
    """The map as -log10 of its `pixel_p_values`, float32 of its shape: 2 means 1 in 100, whatever the method.

    It lies in 0..log10(n + 1) (1.6 for 40 held-out images): beyond what they have shown, all values are equal. Apart
    from such ties the order of pixels stays, between images too. All 0 without held-out images. Memory: twice the map.
    """
    if per not in PER:
        raise unknown("kind of p-value", per, PER)
    map = np.asarray(map)
    evidence = np.log10(1 / held_out.p_by_key(per)).astype(np.float32)
    return evidence[_map_keys(map)].reshape(map.shape)


def _map_keys(map: np.ndarray) -> np.ndarray:
    """uint16 keys [pixels] of a map's values, rounded to float16. Raises InvalidInput for values beyond it."""
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes inf and is refused below
        keys = keys_of(np.asarray(map).ravel().astype(np.float16))
    if len(keys) == 0 or keys.min() < LOWEST or keys.max() > HIGHEST:
        raise InvalidInput(
            f"a map of shape {np.shape(map)} is empty, or holds NaN, inf or a value beyond float16; check the model "
            "that made it"
        )
    return keys


def false_alarms(map: np.ndarray, promised: float) -> int:
    """8-connected regions of a good image's map of -log10 NFA [h, w] where the number of false alarms is at most
    `promised`, above 0; their mean over good images is to be compared with it."""
    if not promised > 0:
        raise InvalidInput(f"{promised} false alarms an image were promised; give a number above 0, such as 1")
    return int(ndimage.label(np.asarray(map) >= -math.log10(promised), EIGHT_CONNECTED)[1])


# --- shared ---


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
