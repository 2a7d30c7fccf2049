"""SOMAD: the batch map, its Gaussians and its distances against their definitions, one patch and one unit at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from sklearn.covariance import oas

from al_models.embedding.somad import Somad, UnitGaussians, groups, radii, shrunk, smooth
from al_models.parts.patches import RECTIFIED
from al_models.types import ImageBatch, ImageSource, Runtime

SIZE = 8
RUNTIME = Runtime()


class Features(ImageSource):
    """Given features of one layer, float32 (n, c, h, w)."""

    def __init__(self, values, batch_size=3):
        self.values, self.batch_size = values, batch_size
        self.ids = tuple(str(i) for i in range(len(values)))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {1: self.values[rows]})


def features(n=5, c=3, seed=0, batch_size=3):
    rng = np.random.default_rng(seed)
    return Features(torch.from_numpy(rng.standard_normal((n, c, SIZE, SIZE)).astype(np.float32)), batch_size)


def somad(**params):
    # No smoothing and a map of the grid's own size: what comes out are the distances themselves.
    few = {"units": (4, 3), "epochs": (3, 2)}
    return Somad(**{"layers": (1,), "image_size": SIZE, "sigma": 0.0, **few, **params})


def patches(source):
    return source.values.permute(0, 2, 3, 1).reshape(-1, source.values.shape[1]).double().numpy()


def test_the_radius_falls_as_in_the_authors_code():
    found = radii((56, 56), (20, 15))
    assert len(found) == 35
    assert found[0] == 19
    assert found[19] == pytest.approx(19 / 6)
    assert found[20] == pytest.approx(56 / 12)
    assert found[-1] == 1
    assert all(np.diff(found[:20]) < 0)
    assert all(np.diff(found[20:]) < 0)
    assert min(radii((2, 1), (3, 3))) == 1  # on a small map the neighbourhood never vanishes
    assert len(radii((4, 4), (0, 2))) == 2


def test_smoothing_weighs_every_unit_by_its_distance_on_the_map():
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 6, 2)))
    places = np.array([(r, c) for r in range(4) for c in range(6)], float)
    weights = np.exp(-cdist(places, places, "sqeuclidean") / (2 * 1.7**2))
    expected = weights @ values.view(24, 2).numpy()
    np.testing.assert_allclose(smooth(values, 1.7).reshape(24, 2), expected, rtol=1e-12)


@pytest.mark.parametrize("m", [1, 31, 32, 33, 500])
@pytest.mark.parametrize("labels", [1, 7])
def test_groups_hold_every_row_once_with_its_own_label(m, labels):
    given = torch.from_numpy(np.random.default_rng(m).integers(0, labels, m))
    found, rows = groups(given)
    assert sorted(rows[rows >= 0].tolist()) == list(range(m))
    for label, members in zip(found, rows, strict=True):
        assert (given[members[members >= 0]] == label).all()
        assert (members >= 0).any()
    assert len(found) == sum(math.ceil(int(n) / 32) for n in torch.bincount(given))


def test_units_start_as_the_mean_over_images_at_their_place():
    source = features()
    detector = somad(units=(SIZE, SIZE))
    detector.kept_ = torch.arange(3)
    found, unit = detector._starting_units(source, RUNTIME)
    np.testing.assert_allclose(found.view(SIZE, SIZE, 3), source.values.mean(0).permute(1, 2, 0), atol=1e-6)
    assert (patches(source) / unit).var(0).mean() == pytest.approx(RECTIFIED)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_an_epoch_moves_each_unit_to_the_mean_of_its_neighbourhood(batch_size):
    source, radius = features(batch_size=batch_size), 1.3
    detector = somad()
    detector.kept_ = torch.arange(3)
    units = np.random.default_rng(1).standard_normal((12, 3)).astype(np.float32)
    x = patches(source)
    nearest = cdist(x, units).argmin(1)
    expected = np.empty((12, 3))
    for u in range(12):
        # The batch rule as Kohonen wrote it: every patch, weighted by how near its unit lies to this one on the map.
        squares = (nearest // 3 - u // 3) ** 2 + (nearest % 3 - u % 3) ** 2
        weights = np.exp(-squares / (2 * radius**2))
        expected[u] = (weights[:, None] * x).sum(0) / weights.sum()
    found = detector._epoch(torch.from_numpy(units), radius, source, RUNTIME)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_unit_too_far_from_every_patch_stays():
    source = Features(torch.zeros(2, 1, SIZE, SIZE))
    detector = somad(units=(60, 1), channels=1)
    detector.kept_ = torch.arange(1)
    units = torch.arange(60.0)[:, None]
    found = detector._epoch(units, 1.0, source, RUNTIME)
    assert torch.isfinite(found).all()
    assert float(found[0]) == 0
    assert float(found[59]) == 59  # exp(-59^2 / 2) is nothing in float64: there is no mean to move to


def test_neighbours_on_the_map_become_alike():
    rng = np.random.default_rng(3)
    source = Features(torch.from_numpy(rng.uniform(size=(8, 2, SIZE, SIZE)).astype(np.float32)))
    detector = somad(units=(6, 6), epochs=(8, 6))
    units = detector.fit(source).units_
    assert len(units) == 36
    apart = cdist(units, units)
    places = np.array([(r, c) for r in range(6) for c in range(6)], float)
    steps = cdist(places, places)
    assert apart[steps == 1].mean() < 0.5 * apart[steps > 2].mean()
    assert np.corrcoef(apart.ravel(), steps.ravel())[0, 1] > 0.9  # a square of data unfolds on the square map


@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize("split", [500, 7])
def test_units_have_the_mean_and_covariance_of_their_patches(shrink, split):
    rng = np.random.default_rng(5)
    c, epsilon = 4, 0.01
    units = np.concatenate([rng.standard_normal((3, c)) * 20, np.full((1, c), 1e4)]).astype(np.float32)
    owner = np.repeat([0, 1, 2], [300, 3, 1])  # many, fewer than channels, one; the fourth unit gets none
    x = (units[owner] + rng.standard_normal((304, c)) @ rng.standard_normal((c, c)) + 0.5).astype(np.float32)
    np.testing.assert_array_equal(cdist(x, units).argmin(1), owner)
    gaussians = UnitGaussians(torch.from_numpy(units))
    for part in torch.from_numpy(x).split(split):
        gaussians.update(part)
    held, means, whitening = gaussians.result(epsilon, shrink)
    np.testing.assert_array_equal(held, units[:3])
    for u in range(3):
        mine = x[owner == u].astype(np.float64)
        np.testing.assert_allclose(means[u, 0], mine.mean(0), rtol=1e-5, atol=1e-5)
        estimate = (lambda y: oas(y)[0]) if shrink else (lambda y: np.cov(y, rowvar=False))
        expected = estimate(mine) if len(mine) > 1 else np.zeros((c, c))
        precision = np.linalg.inv(expected + epsilon * np.eye(c))
        w = whitening[u].double().numpy()
        assert np.allclose(w, np.tril(w))
        np.testing.assert_allclose(w.T @ w, precision, rtol=2e-3, atol=2e-3 * np.abs(precision).max())


def test_shrinkage_leaves_what_is_round_and_makes_the_flat_round():
    round_ = 5 * torch.eye(3)[None]
    torch.testing.assert_close(shrunk(round_ * 4, torch.full((1, 1, 1), 4.0)), round_)
    flat = torch.diag(torch.tensor([9.0, 0.0, 0.0]))[None]
    assert float(torch.linalg.eigvalsh(shrunk(flat * 2, torch.full((1, 1, 1), 2.0))).min()) > 1
    assert not shrunk(torch.zeros(1, 3, 3), torch.ones(1, 1, 1)).any()


@pytest.mark.parametrize("neighbours", [1, 4, 99])
def test_a_patch_is_as_far_as_the_best_of_its_nearest_units(neighbours):
    train, test = features(8), features(2, seed=1)
    found = somad(neighbours=neighbours).fit(train)
    units, means = found.units_.numpy(), found.mean_[:, 0].double().numpy()
    precision = (found.whitening_.mT @ found.whitening_).double().numpy()
    prediction = found.predict(test)
    for x, value in zip(patches(test), prediction.maps.ravel(), strict=True):
        near = cdist(x[None], units)[0].argsort(kind="stable")[:neighbours]
        assert value == pytest.approx(min(scipy_mahalanobis(x, means[u], precision[u]) for u in near), rel=1e-3)
    np.testing.assert_array_equal(prediction.scores, prediction.maps.max((1, 2)))


def test_one_unit_is_one_gaussian_of_all_patches():
    train, test = features(8), features(2, seed=1)
    found = somad(units=(1, 1), shrink=False).fit(train).predict(test)
    x = patches(train)
    precision = np.linalg.inv(np.cov(x, rowvar=False) + 0.01 * x.var(0).mean() / RECTIFIED * np.eye(3))
    expected = [scipy_mahalanobis(q, x.mean(0), precision) for q in patches(test)]
    np.testing.assert_allclose(found.maps.ravel(), expected, rtol=1e-4)


def test_more_than_there_is_means_all_there_is():
    source = features(2, c=3)
    source.values[:, 1] = 4.0  # a channel without variance
    found = somad(channels=500, units=(20, 20), neighbours=1000, epochs=(1, 1)).fit(source)
    assert found.kept_.tolist() == [0, 1, 2]
    assert len(found.units_) <= 2 * SIZE * SIZE  # units without a patch are not kept
    assert np.isfinite(found.predict(source).maps).all()


def test_the_map_is_the_start_when_no_epoch_is_asked():
    source = features()
    found = somad(epochs=(0, 0), units=(SIZE, SIZE)).fit(source)
    start = source.values.mean(0).permute(1, 2, 0).reshape(-1, 3)
    assert all(float((start - unit).abs().amax(1).min()) < 1e-6 for unit in found.units_)
