"""How well image scores separate anomalous images from good ones."""

from __future__ import annotations

import numpy as np

from al_models.errors import InvalidInput
from al_models.metrics.curves import Sweep


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`image_auroc`, `image_ap` and `image_f1_max`, fractions in 0..1; empty unless there are both kinds of image.

    Scores [n] are compared as float64, labels bool [n] are True for anomalous images; equal scores are flagged
    together. Raises InvalidInput for scores that are not finite, labels that are not bool, or lengths that differ.
    """
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    _check(scores, labels)
    values, place = np.unique(scores, return_inverse=True)
    positives = np.bincount(place[labels], minlength=len(values))
    negatives = np.bincount(place[~labels], minlength=len(values))
    sweep = Sweep.of_counts(negatives[::-1], positives[::-1])
    if not sweep.defined:
        return {}
    return {
        "image_auroc": float(sweep.auroc()),
        "image_ap": float(sweep.average_precision()),
        "image_f1_max": float(sweep.f1().max()),
    }


def _check(scores: np.ndarray, labels: np.ndarray) -> None:
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise InvalidInput(
            f"image_metrics was given scores of shape {scores.shape} and labels of shape {labels.shape}; "
            "give one score and one label an image"
        )
    if labels.dtype != bool and len(labels):
        raise InvalidInput(f"labels are {labels.dtype}; give bool, True for an anomalous image")
    if not np.isfinite(scores).all():
        first = int(np.argmin(np.isfinite(scores)))
        raise InvalidInput(f"score {first} is {scores[first]}; scores must be finite: check the model that gave it")
