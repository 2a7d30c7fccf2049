"""What the calibrated thresholds promised and what they did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from al_models.calibration import RATES, Threshold, conformal_thresholds, expected_rate, realised

PROMISED_ALARMS = (1.0, 0.1, 0.01)
"""False alarms an image at which a method that promises them is held to its word."""


@dataclass(frozen=True, eq=False)
class Scored:
    """Labelled test images as thresholds see them."""

    scores: np.ndarray
    """float64 [n]: of the images."""
    maxima: np.ndarray
    """float64 [n]: the largest value of each map."""
    labels: np.ndarray
    """bool [n], True: anomalous."""


def asked_rates(asked: float) -> tuple[float, ...]:
    """The rate that decides, and those that are reported beside it."""
    return tuple(sorted({*RATES, asked}))


def kept_promises(
    held_out: Mapping[str, Sequence[float]], test: Scored, rates: Sequence[float]
) -> list[dict[str, Any]]:
    """For each asked rate, what the threshold of images and of pixels promised, and what it did to the test images.

    `held_out` holds `scores` and `map_maxima` of held-out good images. A pixel threshold promises that at most this
    share of good images shows any pixel above it.
    """
    by_score = conformal_thresholds(np.asarray(held_out["scores"]), rates)
    by_pixel = conformal_thresholds(np.asarray(held_out["map_maxima"]), rates)
    return [
        {
            "rate": one.rate,
            "image": _promise(one, test.scores, test.labels),
            "pixel": _promise(two, test.maxima, test.labels),
        }
        for one, two in zip(by_score, by_pixel, strict=True)
    ]


def alarms_of(alarms: Mapping[float, Sequence[int]]) -> list[dict[str, float]]:
    """For each promised number of false alarms an image: the mean `seen`, and in how many good `images`."""
    return [{"promised": p, "seen": float(np.mean(n)), "images": len(n)} for p, n in alarms.items() if n]


def _promise(threshold: Threshold, scores: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The threshold; the range its false-reject rate is expected in on so many new good images; what it was."""
    did, good = realised(scores, labels, threshold), int((~labels).sum())
    expected = expected_rate(threshold.n, threshold.rate, good) if good else None
    promise = {
        **asdict(threshold),
        "note": threshold.shortfall,
        "expected_interval": None if expected is None else [expected.low, expected.high],
    }
    for name in ("false_reject", "miss"):
        if f"{name}_rate" in did:
            promise |= {
                f"{name}_rate": did[f"{name}_rate"],
                f"{name}_interval": [did[f"{name}_low"], did[f"{name}_high"]],
            }
    return promise
