"""Gaussians per position against numpy's covariance and scipy's Mahalanobis distance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis

from al_models.parts import gaussian
from al_models.parts.gaussian import (
    PositionGaussians,
    inverse_triangular,
    mahalanobis,
    pack_symmetric,
    unpack_symmetric,
    whitening,
)

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


def whitened(found):
    return whitening(found.count, found.scatter, EPSILON)


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
    distances = mahalanobis(queries, found.mean, whitened(found))
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
    white = whitened(found)
    assert torch.equal(white, white.tril())
    identity = white.double() @ covariance @ white.double().mT
    torch.testing.assert_close(identity, torch.eye(6, dtype=torch.float64).expand(5, 6, 6), atol=1e-3, rtol=0)


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_distances_do_not_depend_on_how_many_are_asked_for_at_once(channels):
    found = fitted(samples(c=channels), [40])
    queries = samples(n=9, c=channels, seed=1)
    one_by_one = [mahalanobis(part, found.mean, whitened(found)) for part in queries.split(1, dim=1)]
    together = mahalanobis(queries, found.mean, whitened(found))
    torch.testing.assert_close(together, torch.cat(one_by_one, dim=1), rtol=1e-5, atol=1e-6)


def test_the_mean_is_at_distance_zero_of_itself():
    found = fitted(samples(), [40])
    mean = found.mean.clone()
    assert mahalanobis(mean, mean, whitened(found)).eq(0).all()


def test_the_given_samples_are_not_written_to():
    x = samples()
    before = x.clone()
    found = fitted(x, [16, 24])
    mahalanobis(x, found.mean, whitened(found))
    assert torch.equal(x, before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_merge_to_what_all_images_give(order):
    x = samples(offset=300.0)
    shards = [fitted(part, [part.shape[1]]) for part in x.split([7, 1, 32], dim=1)]
    merged = PositionGaussians(5, 6)
    for index in order:
        merged.merge(shards[index])
    whole = fitted(x, [40])
    assert merged.count == 40
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(merged.scatter, whole.scatter, rtol=0, atol=3e-5 * float(whole.scatter.abs().max()))


def test_nothing_merged_into_nothing_is_nothing():
    empty = PositionGaussians(5, 6)
    empty.merge(PositionGaussians(5, 6))
    assert empty.count == 0
    assert not empty.mean.any()
    assert not empty.scatter.any()


def test_float32_is_enough_for_the_distances_of_half_precision_features():
    x = samples(n=60, c=30, offset=20.0).half().float()
    queries = samples(n=5, c=30, seed=1, offset=20.0)
    found = fitted(x, [16] * 3 + [12])
    exact = PositionGaussians.of(0, torch.zeros(5, 1, 30).double(), torch.zeros(5, 30, 30).double())
    exact.update(x.double())
    expected = mahalanobis(queries.double(), exact.mean, whitened(exact))
    torch.testing.assert_close(mahalanobis(queries, found.mean, whitened(found)).double(), expected, rtol=1e-3, atol=0)


def test_symmetric_matrices_survive_packing():
    scatter = fitted(samples(), [40]).scatter
    scatter = (scatter + scatter.mT) / 2
    packed = pack_symmetric(scatter)
    assert packed.shape == (5, 21)
    assert torch.equal(unpack_symmetric(packed, 6), scatter)


@pytest.mark.parametrize("size", [1, 2, 16, 17, 100])
def test_triangular_matrices_are_inverted(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(5, 2 * size + 1, size, generator=generator)
    lower = torch.linalg.cholesky(x.mT @ x / len(x) + 0.01 * torch.eye(size))
    found = inverse_triangular(lower)
    expected = torch.linalg.solve_triangular(lower.double(), torch.eye(size).double().expand(5, -1, -1), upper=False)
    assert torch.equal(found, found.tril())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
