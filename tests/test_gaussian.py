"""Gaussians per position against numpy's covariance and scipy's Mahalanobis distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis

from al_models.parts import gaussian
from al_models.parts.gaussian import PositionGaussians, mahalanobis

EPSILON = 0.01


def samples(p=5, n=40, c=6, seed=0, offset=0.0):
    """Correlated channels, differently at each position: float32 (p, n, c)."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((p, n, c)) @ rng.standard_normal((p, c, c))
    return torch.from_numpy((mixed + rng.standard_normal((p, 1, c)) + offset).astype(np.float32))


def fitted(x, sizes):
    found = PositionGaussians(x.shape[0], x.shape[2])
    for part in x.split(sizes, dim=1):
        found.update(part)
    return found


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [16, 16, 8], [39, 1]], ids=["whole", "single", "batches", "last"])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_mean_and_covariance_are_numpys_however_the_images_are_split(sizes, offset):
    x = samples(offset=offset)
    found = fitted(x, sizes)
    assert found.count == 40
    for position, values in enumerate(x.double().numpy()):
        np.testing.assert_allclose(found.mean[position, 0], values.mean(0), rtol=1e-5, atol=1e-5)
        expected = np.cov(values, rowvar=False)
        np.testing.assert_allclose(found.scatter[position] / 39, expected, atol=3e-4 * np.abs(expected).max())


@pytest.mark.parametrize("n", [1, 3, 40], ids=["one image", "fewer images than channels", "more"])
def test_distances_are_scipys(n, monkeypatch):
    monkeypatch.setattr(gaussian, "_POSITIONS_AT_ONCE", 2)  # five positions: the last part is not full
    x, queries = samples(n=n), samples(n=4, seed=1)
    found = fitted(x, [n])
    distances = mahalanobis(queries, found.mean, found.whitening(EPSILON))
    assert distances.shape == (5, 4)
    for position, values in enumerate(x.double().numpy()):
        covariance = (np.cov(values, rowvar=False) if n > 1 else 0) + EPSILON * np.eye(6)
        inverse = np.linalg.inv(covariance)
        for row, query in enumerate(queries[position].double().numpy()):
            expected = scipy_mahalanobis(query, values.mean(0), inverse)
            assert float(distances[position, row]) == pytest.approx(expected, rel=2e-3)


def test_whitening_is_the_inverse_cholesky_factor():
    found = fitted(samples(), [40])
    covariance = found.scatter.double() / 39 + EPSILON * torch.eye(6, dtype=torch.float64)
    whitening = found.whitening(EPSILON)
    assert torch.equal(whitening, whitening.tril())
    identity = whitening.double() @ covariance @ whitening.double().mT
    torch.testing.assert_close(identity, torch.eye(6, dtype=torch.float64).expand(5, 6, 6), atol=1e-3, rtol=0)


def test_the_mean_is_at_distance_zero_of_itself():
    found = fitted(samples(), [40])
    mean = found.mean.clone()
    assert mahalanobis(mean, mean, found.whitening(EPSILON)).eq(0).all()


def test_the_given_samples_are_not_written_to():
    x = samples()
    before = x.clone()
    found = fitted(x, [16, 24])
    mahalanobis(x, found.mean, found.whitening(EPSILON))
    assert torch.equal(x, before)
