"""AUPIMO: how much of each anomalous image is found while good images show next to no false pixel.

Bertoldo, Ameln, Vaidya, Akcay: AUPIMO, Redefining Visual Anomaly Detection Benchmarks with High Speed and Low
Tolerance, BMVC 2024, arXiv:2401.01984. The x-axis is shared by all images: the mean over the good images of each one's
false positive rate, in logarithm; the y-axis is an image's own recall; the area between two rates is divided by the
logarithm of their ratio, so that it lies in 0..1. Here the curve has a point at every distinct value instead of a
number of evenly spaced thresholds, and is linear in log FPR between them; at the two bounds it is cut exactly.

That area is linear in the image's anomalous pixels: each is worth the share of the (logarithmic) range of rates in
which its value is flagged. So one table of worth by key, from the good images, serves all anomalous ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from al_models.errors import InvalidInput
from al_models.metrics.keys import N_KEYS
from al_models.metrics.per_image import ImageCounts

FPR_BOUNDS = (1e-5, 1e-4)


@dataclass(frozen=True)
class Pimo:
    """AUPIMO of a set of images."""

    per_image: dict[str, float]
    """Anomalous image id -> AUPIMO in 0..1; empty when `reason` says why."""
    mean: float | None
    """Mean over the anomalous images; None when `reason` says why."""
    reason: str | None
    """Reason why there are no values; None when there are."""
    n_good: int
    """Good images that the shared FPR comes from."""
    smallest_fpr: float | None
    """The smallest shared FPR above 0 that occurs; values need one up to the lower bound."""


def aupimo(images: Sequence[ImageCounts], fpr_bounds: tuple[float, float] = FPR_BOUNDS) -> Pimo:
    """AUPIMO of each anomalous image and their mean.

    Good images, those without an anomalous pixel, give the shared FPR alone. The result does not depend on the order
    of the images. Raises InvalidInput unless 0 < lower bound < upper bound <= 1.
    """
    low, high = fpr_bounds
    if not 0 < low < high <= 1:
        raise InvalidInput(f"fpr_bounds are {fpr_bounds}; give two rates, 0 < lower < upper <= 1")
    anomalous = sorted((image for image in images if image.n_anomalous), key=lambda image: image.image_id)
    good = [image for image in images if not image.n_anomalous and image.n_normal]
    if not good:
        return Pimo({}, None, "there is no good image to measure the false positive rate on", 0, None)
    fpr = shared_fpr(good)
    smallest = float(fpr[fpr > 0].min())
    if not anomalous:
        return Pimo({}, None, "there is no anomalous image whose mask is known", len(good), smallest)
    if smallest > low:
        reason = (
            f"the smallest false positive rate that the good images show is {smallest:.3g}, above {low:g}: "
            "they have too few pixels, or too many share the highest values"
        )
        return Pimo({}, None, reason, len(good), smallest)
    worth = pixel_worth(fpr, fpr_bounds)
    values = {image.image_id: _mean_worth(image, worth) for image in anomalous}
    return Pimo(values, float(np.mean(list(values.values()))), None, len(good), smallest)


def shared_fpr(good: Iterable[ImageCounts]) -> np.ndarray:
    """Mean over good images of the share of their pixels at this key or above, float64 [65536], falling with the key.

    Images of one size are counted together in whole numbers, so the order of the images changes nothing.
    """
    by_pixels: dict[int, tuple[int, np.ndarray]] = {}
    for image in good:
        n, counts = by_pixels.get(image.n_normal, (0, np.zeros(N_KEYS, np.int64)))
        counts[image.normal_keys] += image.normal_counts
        by_pixels[image.n_normal] = (n + 1, counts)
    total = np.zeros(N_KEYS)
    for pixels, (_, counts) in sorted(by_pixels.items()):
        total += np.cumsum(counts[::-1])[::-1] / pixels
    return total / sum(n for n, _ in by_pixels.values())


def pixel_worth(fpr: np.ndarray, fpr_bounds: tuple[float, float] = FPR_BOUNDS) -> np.ndarray:
    """The share of the range of rates, in logarithm, in which a pixel of each key is flagged: float64 [65536] in 0..1.

    `fpr` [65536] is the shared FPR when this key and all above are flagged. As the rate passes from that of the keys
    above to that with the key itself, the pixel counts as flagged in proportion.
    """
    low, high = np.log(fpr_bounds)
    with np.errstate(divide="ignore"):
        after = np.log(fpr)
    before = np.append(after[1:], -np.inf)
    first = np.isneginf(before)  # flagged before, or with, the first false pixel: all along the range
    before[first] = after[first] = low - 1
    flagged = _flagged_up_to(high, before, after) - _flagged_up_to(low, before, after)
    return np.clip(flagged / (high - low), 0, 1)


def _flagged_up_to(x: float, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Integral up to log rate x of what rises from 0 at `before` to 1 at `after` and stays there."""
    width = after - before
    on_the_way = np.clip(x, before, after) - before
    ramp = np.divide(on_the_way**2, 2 * width, out=np.zeros(len(before)), where=width > 0)
    return ramp + np.maximum(x - after, 0)


def _mean_worth(image: ImageCounts, worth: np.ndarray) -> float:
    return float(np.dot(image.regions.anomalous, worth[image.regions.keys]) / image.n_anomalous)
