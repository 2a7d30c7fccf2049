"""Whether new images come from where the model's images came from: one image (scope), or a batch of them (drift).

A batch is compared with the held-out good images, which the model has not learned from either. Each statistic of an
image (its score, how unusual its features are, brightness, contrast, sharpness) is put to the two-sample test of
Kolmogorov and Smirnov; the number of rejected images to the law of the threshold (`rejected_p_value`). Holm's
correction keeps the chance of any false alarm in a batch below `alpha`; of many nights, one in 1 / alpha alarms by
chance.

Images that are not independent of each other (ten exposures of one part) are less than their number: give one a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from al_models.calibration import rejected_p_value
from al_models.errors import InvalidInput
from al_models.metrics.ranks import holm

ALPHA = 0.01
FEWEST = 8
"""Images on either side from which on two distributions are compared; with fewer only a near-complete separation would
be significant."""
SCOPE_LIMIT = 6.0
"""Robust deviations above the median held-out image, in log distance, from which an image is out of scope."""
REJECTED = "rejected"


@dataclass(frozen=True)
class Change:
    """One statistic of a batch against the held-out images."""

    statistic: str
    p_value: float
    """Probability of such a difference, or a larger one, if nothing has changed."""
    adjusted: float
    """The same after Holm's correction for all statistics that were looked at."""
    changed: bool
    """Whether `adjusted` is at most alpha."""
    before: float
    """Median of the held-out images; the promised share for `rejected`."""
    now: float
    """Median of the batch; the rejected share for `rejected`."""
    n: int
    """Images of the batch."""


def changes(
    held_out: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    *,
    rejected: int | None = None,
    rate: float = 0.05,
    alpha: float = ALPHA,
) -> list[Change]:
    """The change of each statistic that both sides have, float [n] and [m], and last of `rejected` when it is given.

    `rejected` images have a score above the threshold set at the false-reject `rate` on the held-out scores
    (`held_out["score"]`). Statistics with fewer than FEWEST images on either side are left out. Raises InvalidInput for
    values that are not finite, and for more rejected images than there are.
    """
    found: dict[str, tuple[float, float, float, int]] = {}
    for name in held_out.keys() & batch.keys():
        old, new = _finite(name, held_out[name]), _finite(name, batch[name])
        if min(len(old), len(new)) >= FEWEST:
            p_value = float(stats.ks_2samp(old, new).pvalue)
            found[name] = p_value, float(np.median(old)), float(np.median(new)), len(new)
    if rejected is not None and len(batch.get("score", ())):
        n, m = len(held_out["score"]), len(batch["score"])
        found[REJECTED] = rejected_p_value(rejected, m, n, rate), rate, rejected / m, m
    adjusted = dict(zip(found, holm([one[0] for one in found.values()]), strict=True))
    order = sorted(found, key=lambda name: (name == REJECTED, name))
    return [Change(name, found[name][0], adjusted[name], adjusted[name] <= alpha, *found[name][1:]) for name in order]


@dataclass(frozen=True, eq=False)
class Scope:
    """The distribution of the pooled features of a model's images, from which those of new images are told apart."""

    mean: np.ndarray
    """float64 [d]: mean of the learned images' pooled features."""
    whitening: np.ndarray
    """float64 [d, d]: distance is |(x - mean) whitening|."""
    centre: float = 0.0
    """Median log distance of the held-out images."""
    spread: float = 1.0
    """Their robust deviation."""

    @staticmethod
    def of(learned: np.ndarray, held_out: np.ndarray) -> Scope:
        """From pooled features (mean over positions, all layers side by side), float [n, d] and [h, d].

        Covariance with the shrinkage of Ledoit and Wolf, 2004, so that fewer images than features do no harm. The
        centre and the spread come from the held-out images, whose distances are those of new images; a spread below a
        tenth is taken as a tenth, since few images can be alike by chance. Raises InvalidInput without images.
        """
        if not len(learned) or not len(held_out):
            raise InvalidInput(f"{len(learned)} learned and {len(held_out)} held-out images; give at least one of each")
        learned = np.asarray(learned, np.float64)
        d = learned.shape[1]
        from sklearn.covariance import ledoit_wolf  # a quarter of a second, and a warning where /dev/shm is sealed

        covariance = ledoit_wolf(learned)[0] if len(learned) > 1 else np.zeros((d, d))  # one image tells no spread
        covariance += 1e-9 * max(float(np.trace(covariance)) / len(covariance), 1e-12) * np.eye(len(covariance))
        scope = Scope(learned.mean(0), np.linalg.inv(np.linalg.cholesky(covariance)).T)
        logs = np.log(scope.distance(held_out))
        spread = 1.4826 * float(np.median(np.abs(logs - np.median(logs))))
        return Scope(scope.mean, scope.whitening, float(np.median(logs)), max(spread, 0.1))

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distance of pooled features [n, d] from the learned images' mean, float64 [n] above 0."""
        whitened = (np.asarray(features, np.float64) - self.mean) @ self.whitening
        return np.maximum(np.sqrt((whitened**2).sum(1)), 1e-12)

    def deviations(self, features: np.ndarray) -> np.ndarray:
        """Robust deviations of the log distance above the median held-out image, float64 [n]."""
        return (np.log(self.distance(features)) - self.centre) / self.spread

    def outside(self, features: np.ndarray, limit: float = SCOPE_LIMIT) -> np.ndarray:
        """Images out of scope, bool [n]: another product, another camera, darkness, which the model cannot judge."""
        return self.deviations(features) > limit


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise InvalidInput(f"{name} is of shape {values.shape} or not finite; give one finite number an image")
    return values
