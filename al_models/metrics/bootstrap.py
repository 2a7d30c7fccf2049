"""How certain a metric is: the bootstrap over images, from per-image counts, and two methods compared on equal images.

Rubin, The Bayesian Bootstrap, Annals of Statistics 9, 1981: in each replicate every image gets a random positive
weight. The weights of good and of anomalous images are scaled apart, so that a replicate holds as many of each as the
test set does. They are gamma distributed with shape (m - 2) / m for m images of a kind, which makes the variance of a
weighted mean the unbiased s^2 / m (with Rubin's shape 1 it is too small by (m - 1) / (m + 1)).

Why not counts of drawn images (Poisson or multinomial)? A positive weight loses no image, so a metric that the test
set defines is defined in every replicate, however few its images; and a metric reaches 1 in a replicate only when it
is 1 on the test set. Simulated with normal scores (20 good and 58 anomalous images, 10 and 30, 60 and 110; classes 1 to
3 deviations apart), `interval` at 95 % holds the truth in 94-98 % of test sets for AUROC, 90-98 % for AP and 94-100 %
for F1-max; percentiles of multinomial counts in 90-93, 83-87 and 68-78 % where both were tried.

The weight is a function of (seed, image id, replicate) and, through shape and scale, of which images there are;
nothing depends on the order of images, on shards or on the method judged. So replicates of two methods on the same
images are pairs, and their differences tell how certain the difference is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from scipy import special

from al_models.errors import InvalidInput
from al_models.metrics.counts import threshold_key
from al_models.metrics.curves import PRO_LIMITS, Sweep, mean_overlap, pixel_metrics, pro_areas
from al_models.metrics.keys import N_KEYS
from al_models.metrics.per_image import ImageCounts

MOST_GROUPS = 128
"""Up to this many images of a kind each has its own weight; more share one with those of the same hash."""
_CELLS = 2**20
"""Replicates times distinct values worked on at once: 8 MiB an array."""
_SAME = 1e-12
"""Metrics closer than this are equal: rounding alone sets them apart."""
_TOO_FEW = "there are fewer than two images of a kind, so their spread is unknown"
_ALL_AGREE = "all replicates agree, so these images do not tell how certain it is"


@dataclass(frozen=True, eq=False)
class Replicates:
    """A metric on the test set, and on each re-weighted test set."""

    estimate: float
    """The metric with equal weights, as it is reported."""
    values: np.ndarray
    """float64 [n]: the metric in each replicate; NaN where it is undefined."""
    images: str
    """Fingerprint of the images, their kinds and the seed; replicates with equal fingerprints can be paired."""
    pairs: int | None = None
    """For image AUROC: how many disjoint pairs of a good and an anomalous image there are."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval for the metric on all images of this sort, not only on those tested."""

    low: float | None
    high: float | None
    """Both None when the images cannot tell."""
    confidence: float
    used: int
    """Number of replicates that the interval comes from."""
    undefined: int
    """Number of replicates left out, since the metric has no value in them."""
    note: str | None = None
    """Why there is no interval, or what a bound rests on."""


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same images, a minus b."""

    difference: float
    low: float | None
    high: float | None
    """Both None when the images cannot tell."""
    probability: float | None
    """Share of replicates in which a is higher, ties counted one half."""
    p_value: float | None
    """Two-sided, for no difference; of this comparison alone, so correct it when there are several."""
    confidence: float
    used: int
    """Number of replicates in which both metrics are defined."""
    undefined: int
    note: str | None = None


# --- replicates ---


def replicates(
    images: Sequence[ImageCounts],
    scores: Mapping[str, float],
    labels: Mapping[str, bool],
    n: int = 1000,
    seed: int = 0,
    pro_limits: Sequence[float] = PRO_LIMITS,
) -> dict[str, Replicates]:
    """All pixel and image metrics: `pixel_replicates` and `image_replicates` in one dictionary.

    `scores` and `labels` go by image id; they may hold images without pixel counts, whose masks are unknown.
    """
    if scores.keys() != labels.keys():
        odd = min(scores.keys() ^ labels.keys())
        raise InvalidInput(f"image {odd} has a score or a label but not both; give both for each image")
    ids = sorted(scores)
    values, kinds = np.array([scores[i] for i in ids], np.float64), np.array([labels[i] for i in ids], bool)
    return pixel_replicates(images, n, seed, pro_limits) | image_replicates(ids, values, kinds, n, seed)


def pixel_replicates(
    images: Sequence[ImageCounts], n: int = 1000, seed: int = 0, pro_limits: Sequence[float] = PRO_LIMITS
) -> dict[str, Replicates]:
    """The metrics of `PixelCounts.metrics` in n replicates; empty unless there are normal and anomalous pixels.

    An image with anomalous pixels is of the anomalous kind. With more than MOST_GROUPS images of a kind, those whose
    ids hash alike share a weight: the interval keeps its mean width, but comes from 128 groups rather than from all
    images, so that its width is uncertain by 6 %. Values between which no anomalous pixel of any image lies are added
    up first; no metric changes by that. Memory, whatever the number of images: 8 bytes x distinct values (at most
    63,487) x (good groups + 3 x anomalous groups, 4 x with annotated defects), at most 0.33 GB, and 0.1 GB to work in.
    """
    draws = _draws_of(images, n, seed)
    pixels = _Grouped.of(images, draws)
    if not (pixels.normal.any() and pixels.anomalous.any()):
        return {}
    return _all_replicates(lambda weights: pixels.metrics(weights, pro_limits), draws, pixels.normal.shape[1])


def threshold_replicates(
    images: Sequence[ImageCounts], threshold: float, n: int = 1000, seed: int = 0
) -> dict[str, Replicates]:
    """The rates of `PixelCounts.at_threshold` in n replicates; those without a meaning are absent.

    The threshold is taken as given: that it would come out differently from other held-out images is not in here.
    """
    draws, first = _draws_of(images, n, seed), threshold_key(threshold) + 1
    false, negatives, true, positives = np.zeros((4, draws.weights.shape[1]))
    for image, group in zip(images, draws.group, strict=True):
        false[group] += image.normal_counts[image.normal_keys >= first].sum()
        true[group] += image.regions.anomalous[image.regions.keys >= first].sum()
        negatives[group] += image.n_normal
        positives[group] += image.n_anomalous
    ratios = {
        "fpr_at_threshold": (false, negatives),
        "iou_at_threshold": (true, false + positives),
        "recall_at_threshold": (true, positives),
        "precision_at_threshold": (true, false + true),
    }
    needed = {"fpr_at_threshold": negatives}  # the others mean nothing without anomalous pixels
    ratios = {name: (a, b) for name, (a, b) in ratios.items() if b.any() and needed.get(name, positives).any()}
    return _all_replicates(
        lambda weights: {name: weights @ a / (weights @ b) for name, (a, b) in ratios.items()}, draws
    )


def image_replicates(
    ids: Sequence[str], scores: np.ndarray, labels: np.ndarray, n: int = 1000, seed: int = 0
) -> dict[str, Replicates]:
    """`image_auroc`, `image_ap` and `image_f1_max` in n replicates; empty unless there are both kinds of image.

    Scores float [m], finite; labels bool [m], True for anomalous. Images share weights as in `pixel_replicates`.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.shape != (len(ids),) or labels.shape != scores.shape or (labels.dtype != bool and len(labels)):
        raise InvalidInput(
            f"{len(ids)} ids, scores {scores.shape} and labels {labels.dtype} {labels.shape} were given; give one "
            "score and one bool an image"
        )
    if not np.isfinite(scores).all():
        raise InvalidInput(f"the score of image {ids[int(np.argmin(np.isfinite(scores)))]} is not finite")
    if labels.all() or not labels.any():
        return {}
    draws = _Draws.of(ids, labels, n, seed)
    values, place = np.unique(-scores, return_inverse=True)  # highest score first
    counts = np.zeros((draws.weights.shape[1], len(values)))
    np.add.at(counts, (draws.group, place), 1.0)

    def metrics(weights: np.ndarray) -> dict[str, np.ndarray]:
        first = draws.n_good
        sweep = Sweep.of_counts(weights[:, :first] @ counts[:first], weights[:, first:] @ counts[first:])
        found = {"image_auroc": sweep.auroc(), "image_ap": sweep.average_precision()}
        return found | {"image_f1_max": sweep.f1().max(axis=-1)}

    pairs = {"image_auroc": int(min(labels.sum(), (~labels).sum()))}
    return _all_replicates(metrics, draws, len(values), pairs)


def mean_replicates(ids: Sequence[str], values: np.ndarray, n: int = 1000, seed: int = 0) -> Replicates | None:
    """The mean over images of what each image has by itself (its AUPIMO, its boundary F); None without images.

    Values float [m], one an image, finite.
    """
    values = np.asarray(values, np.float64)
    if values.shape != (len(ids),) or not np.isfinite(values).all():
        raise InvalidInput(
            f"values of shape {values.shape} were given for {len(ids)} images; give one finite number an id"
        )
    if len(ids) == 0:
        return None
    draws = _Draws.of(ids, np.ones(len(ids), bool), n, seed)
    total = np.bincount(draws.group, values, draws.weights.shape[1])
    found = draws.weights @ total / (draws.weights @ np.bincount(draws.group))
    return Replicates(float(values.mean()), found if draws.enough else np.full(n, np.nan), draws.fingerprint)


def _all_replicates(
    metrics: Callable[[np.ndarray], dict[str, np.ndarray]],
    draws: _Draws,
    width: int = 1,
    pairs: Mapping[str, int] | None = None,
) -> dict[str, Replicates]:
    """`metrics` turns weights [b, groups] into the metrics [b] of each replicate; `width` is the values it works on."""
    estimates = metrics(np.ones((1, draws.weights.shape[1])))
    values = {name: np.full(len(draws.weights), np.nan) for name in estimates}
    step = max(1, _CELLS // width)
    for start in range(0, len(draws.weights) if draws.enough else 0, step):
        for name, found in metrics(draws.weights[start : start + step]).items():
            values[name][start : start + step] = found
    return {
        name: Replicates(float(estimates[name][0]), values[name], draws.fingerprint, (pairs or {}).get(name))
        for name in estimates
    }


# --- what follows from them ---


def interval(found: Replicates, confidence: float = 0.95) -> Interval:
    """The interval of a metric that lies in 0..1: estimate -+ z standard deviations of the replicates, as logits.

    On the scale of logits the replicates spread evenly about the estimate, and the interval cannot leave 0..1.
    Percentiles, the usual choice, are centred on the replicates' mean instead: for metrics that pick the best of many
    thresholds this counts their optimism twice. Where all replicates agree they tell nothing. If that is because
    each anomalous image scores above each good one (or below), AUROC still has an exact bound: m disjoint pairs of
    images are all in order with probability AUROC^m, so AUROC >= ((1 - confidence) / 2)^(1 / m); other metrics have
    no interval then. Raises InvalidInput for values outside 0..1 or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    values = found.values[np.isfinite(found.values)]
    facts = {"confidence": confidence, "used": len(values), "undefined": len(found.values) - len(values)}
    if len(values) < 2:
        return Interval(None, None, **facts, note=_TOO_FEW)
    if values.min() < -_SAME or values.max() > 1 + _SAME:
        raise InvalidInput(
            f"replicates of {values.min():g} to {values.max():g} were given; the metric must lie in 0..1"
        )
    if np.ptp(values) <= _SAME:
        return _interval_of_constant(found, facts)
    half = float(special.ndtri((1 + confidence) / 2) * np.std(_logit(values), ddof=1))
    centre = _logit(np.array(found.estimate))
    return Interval(float(special.expit(centre - half)), float(special.expit(centre + half)), **facts)


def compare(a: Replicates, b: Replicates, confidence: float = 0.95) -> Comparison:
    """The difference a - b on the same images, with the interval and the p-value of the paired differences.

    The interval is difference -+ z standard deviations of the differences, the p-value its inversion. Simulated
    with two equal methods on 20 good and 58 anomalous images, 3-6 % of the p-values are below 0.05; with unequal ones
    the interval holds the true difference in 91-95 % (AUROC, F1-max) and 86-91 % (AP) of test sets. With 5 good and 10
    anomalous images F1-max is below 0.05 in 11 %, AUROC and AP hardly ever. Raises InvalidInput when the replicates
    come from different images, seeds or numbers of replicates: compare on the images both have.
    """
    _check_confidence(confidence)
    if a.images != b.images:
        raise InvalidInput(
            "the two methods were judged on different images or with different seeds; make replicates of both on the "
            "images they share, with one seed and number of replicates"
        )
    apart = a.values - b.values
    apart = apart[np.isfinite(apart)]
    facts = {"confidence": confidence, "used": len(apart), "undefined": len(a.values) - len(apart)}
    difference = a.estimate - b.estimate
    if len(apart) < 2:
        return Comparison(difference, None, None, None, None, **facts, note=_TOO_FEW)
    probability = float(np.mean(apart > _SAME) + np.mean(np.abs(apart) <= _SAME) / 2)
    spread = float(np.std(apart, ddof=1))
    if spread <= _SAME:
        p_value = 1.0 if abs(difference) <= _SAME else None
        return Comparison(difference, None, None, probability, p_value, **facts, note=_ALL_AGREE)
    half = float(special.ndtri((1 + confidence) / 2)) * spread
    p_value = float(2 * special.ndtr(-abs(difference) / spread))
    return Comparison(difference, difference - half, difference + half, probability, p_value, **facts)


def _interval_of_constant(found: Replicates, facts: dict[str, Any]) -> Interval:
    perfect = min(found.estimate, 1 - found.estimate) <= _SAME
    if found.pairs is None or not perfect:
        return Interval(None, None, **facts, note=_ALL_AGREE)
    bound = ((1 - facts["confidence"]) / 2) ** (1 / found.pairs)
    low, high = (bound, 1.0) if found.estimate > 0.5 else (0.0, 1 - bound)
    return Interval(low, high, **facts, note=f"all images are in order: the exact bound of {found.pairs} pairs")


def _logit(values: np.ndarray) -> np.ndarray:
    return special.logit(np.clip(values, _SAME, 1 - _SAME))


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InvalidInput(f"the confidence is {confidence}; give a share between 0 and 1, such as 0.95")


# --- weights ---


@dataclass(frozen=True, eq=False)
class _Draws:
    """The random weights of some images."""

    group: np.ndarray
    """Column of each image's weight, int [images]."""
    weights: np.ndarray
    """float64 [n, groups]; those of good images stand first, and each kind has mean 1 in each replicate."""
    n_good: int
    """Groups of good images."""
    enough: bool
    """Whether every kind has more than one group; of a single one no spread can be estimated."""
    fingerprint: str

    @staticmethod
    def of(ids: Sequence[str], anomalous: np.ndarray, n: int, seed: int) -> _Draws:
        """Draw n weights for each image or group of images."""
        if len(set(ids)) < len(ids):
            raise InvalidInput(f"image {Counter(ids).most_common(1)[0][0]} is given twice; give each image once")
        if n < 2:
            raise InvalidInput(f"{n} replicates were asked for; ask for at least 2, better 1000")
        names = np.empty(len(ids), object)
        parts = []
        for kind in (False, True):
            members = np.flatnonzero(anomalous == kind)
            names[members] = _group_names([ids[i] for i in members], kind)
            parts.append(sorted(set(names[members])))
        column = {name: i for i, name in enumerate(parts[0] + parts[1])}
        weights = [_weights(tuple(part), n, seed) for part in parts]
        return _Draws(
            group=np.array([column[name] for name in names], np.intp),
            weights=np.concatenate(weights, axis=1),
            n_good=len(parts[0]),
            enough=all(len(part) != 1 for part in parts),
            fingerprint=_digest(
                f"{n} {seed} " + " ".join(f"{i}={int(k)}" for i, k in sorted(zip(ids, anomalous, strict=True)))
            ).hex(),
        )


def _group_names(ids: Sequence[str], anomalous: bool) -> list[str]:
    if len(ids) <= MOST_GROUPS:
        return list(ids)
    kind = "anomalous" if anomalous else "good"
    return [f"{kind} group {int.from_bytes(_digest(i)) % MOST_GROUPS}" for i in ids]


@lru_cache(maxsize=8)  # 1 MiB each; all metrics of a cell, and all cells of a category, draw the same
def _weights(names: tuple[str, ...], n: int, seed: int) -> np.ndarray:
    """float64 [n, names], positive, of mean 1 in each row; read-only."""
    if not names:
        return np.zeros((n, 0))
    # The raw bits of Philox are fixed for ever, unlike numpy's distributions, which may change between versions.
    raw = [np.random.Philox(key=int.from_bytes(_digest(f"{seed} {name}"))).random_raw(n) for name in names]
    uniform = ((np.stack(raw, axis=1) >> np.uint64(11)) + 0.5) * 2.0**-53  # (n, names), neither 0 nor 1
    drawn = special.gammaincinv(max(len(names) - 2, 0.5) / len(names), uniform)
    drawn /= drawn.mean(axis=1, keepdims=True)
    drawn.flags.writeable = False
    return drawn


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()


def _draws_of(images: Sequence[ImageCounts], n: int, seed: int) -> _Draws:
    return _Draws.of(
        [image.image_id for image in images], np.array([image.n_anomalous > 0 for image in images], bool), n, seed
    )


# --- counts ---


@dataclass(frozen=True, eq=False)
class _Grouped:
    """Pixel counts by group of images, float64, in which they are exact; the t values stand highest first."""

    normal: np.ndarray
    """[groups, t]; groups of good images first."""
    anomalous: np.ndarray
    """[anomalous groups, t]."""
    overlap: np.ndarray
    """[anomalous groups, t], in units of 1 / REGION_UNITS."""
    n_regions: np.ndarray
    """[anomalous groups]."""
    saturated: np.ndarray | None
    """[anomalous groups, t]: saturated overlap of annotated defects; None without any."""
    n_defects: np.ndarray

    @staticmethod
    def of(images: Sequence[ImageCounts], draws: _Draws) -> _Grouped:
        """Add up the images of each group."""
        column, width = _columns(images)
        n_groups = draws.weights.shape[1]
        shape = (n_groups - draws.n_good, width)
        annotated = any(image.defects is not None and image.defects.n_regions for image in images)
        sums = _Grouped(
            normal=np.zeros((n_groups, width)),
            anomalous=np.zeros(shape),
            overlap=np.zeros(shape),
            n_regions=np.zeros(shape[0]),
            saturated=np.zeros(shape) if annotated else None,
            n_defects=np.zeros(shape[0]),
        )
        for image, group in zip(images, draws.group, strict=True):
            sums.normal[group] += np.bincount(column[image.normal_keys], image.normal_counts, width)
            if image.n_anomalous:
                sums._add_defects(group - draws.n_good, image, column)
        return sums

    def metrics(self, weights: np.ndarray, pro_limits: Sequence[float]) -> dict[str, np.ndarray]:
        """Pixel metrics [b] for weights [b, groups]."""
        of_defects = weights[:, weights.shape[1] - len(self.anomalous) :]
        normal, regions = weights @ self.normal, of_defects @ self.n_regions
        found = pixel_metrics(normal, of_defects @ self.anomalous, of_defects @ self.overlap, regions, pro_limits)
        if self.saturated is None:
            return found
        false = np.cumsum(normal, axis=-1)
        curve = mean_overlap(of_defects @ self.saturated, of_defects @ self.n_defects)
        areas = pro_areas(false / false[:, -1:], curve, pro_limits)
        return found | {f"spro_at_{limit:g}": area for limit, area in zip(pro_limits, areas, strict=True)}

    def _add_defects(self, row: int, image: ImageCounts, column: np.ndarray) -> None:
        width = self.anomalous.shape[1]
        at = column[image.regions.keys]
        self.anomalous[row] += np.bincount(at, image.regions.anomalous, width)
        self.overlap[row] += np.bincount(at, image.regions.overlap, width)
        self.n_regions[row] += image.regions.n_regions
        if self.saturated is not None and image.defects is not None:
            self.saturated[row] += np.bincount(column[image.defects.keys], image.defects.overlap, width)
            self.n_defects[row] += image.defects.n_regions


def _columns(images: Sequence[ImageCounts]) -> tuple[np.ndarray, int]:
    """A column for each key that occurs, highest key first, int [65536], and how many columns there are.

    Neighbours without anomalous pixels share one: between them recall and overlap stand still, so that no curve bends.
    """
    occurs, with_defect = np.zeros(N_KEYS, bool), np.zeros(N_KEYS, bool)
    for image in images:
        occurs[image.normal_keys] = True
        with_defect[image.regions.keys] = True
    keys = np.flatnonzero(occurs | with_defect)[::-1]
    defect = with_defect[keys]
    starts = defect.copy()
    starts[1:] |= defect[:-1]
    starts[:1] = True
    column = np.zeros(N_KEYS, np.intp)
    column[keys] = np.cumsum(starts) - 1
    return column, int(column.max()) + 1
