"""SOE: the random projection is uniform, and the map is the paper's low-rank Mahalanobis distance, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from al_models.embedding.soe import Soe, semi_orthogonal
from al_models.types import ImageBatch, ImageSource, Runtime

SIZE = 8
CHANNELS = 7  # three of layer 1, on the whole grid, and four of layer 2, on a quarter of it


class Features(ImageSource):
    """Given features of two layers."""

    def __init__(self, layers, batch_size=4):
        self.layers, self.batch_size = layers, batch_size
        self.ids = tuple(str(i) for i in range(len(layers[1])))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {n: x[rows] for n, x in self.layers.items()})


def features(n, seed=0, batch_size=4):
    rng = np.random.default_rng(seed)
    mixed = [
        rng.standard_normal((n, side, side, c)) @ np.random.default_rng(9).standard_normal((c, c)) + 2
        for side, c in ((SIZE, 3), (SIZE // 2, 4))
    ]
    return Features({i: torch.from_numpy(x.transpose(0, 3, 1, 2)).float() for i, x in enumerate(mixed, 1)}, batch_size)


def soe(**params):
    # No smoothing and a map of the grid's own size: what comes out are the distances themselves.
    return Soe(**{"layers": (1, 2), "image_size": SIZE, "sigma": 0.0, **params})


def stacked(source):
    """Both layers on the grid of the finer, by repetition: float64 (n, p, c)."""
    fine, coarse = (source.layers[i].double().numpy() for i in (1, 2))
    whole = np.concatenate([fine, coarse.repeat(2, axis=2).repeat(2, axis=3)], axis=1)
    return whole.reshape(len(whole), CHANNELS, -1).transpose(0, 2, 1)


@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (7, 3), (7, 7), (176, 100)])
def test_columns_are_orthonormal(shape):
    w = semi_orthogonal(*shape, torch.Generator().manual_seed(0))
    assert w.shape == shape
    torch.testing.assert_close(w.T @ w, torch.eye(shape[1]), atol=1e-6, rtol=0)


def test_the_projection_is_uniform_among_all():
    generator = torch.Generator().manual_seed(1)
    drawn = torch.stack([semi_orthogonal(4, 4, generator) for _ in range(2000)]).double()
    # Every entry has mean 0 and variance 1 / c; as QR leaves it, the first column has one sign throughout.
    assert float(drawn.mean(0).abs().max()) < 0.05
    assert float((drawn.square().mean(0) - 1 / 4).abs().max()) < 0.03
    assert 0.45 < float((torch.linalg.det(drawn) > 0).double().mean()) < 0.55


def epsilon(vectors):
    """The paper's 0.01 for features (n, p, c) that vary as rectified ones do; with n - 1 within a position."""
    variance = vectors.var(0, ddof=1).mean() + vectors.mean(0).var(0).mean()
    return 0.01 * variance / (0.5 - 0.5 / np.pi)


@pytest.mark.parametrize("n", [2, 5, 40], ids=["two images", "fewer images than dimensions", "many"])
@pytest.mark.parametrize("dimensions", [1, 5])
def test_distances_are_those_of_the_low_rank_precision(n, dimensions):
    train, test = features(n), features(3, seed=1)
    found = soe(dimensions=dimensions).fit(train, Runtime(seed=4))
    w = found.projection_.double().numpy()
    good, queries = stacked(train), stacked(test)
    expected = np.empty(queries.shape[:2])
    for p in range(good.shape[1]):
        covariance = np.cov(good[:, p], rowvar=False) + epsilon(good @ w) * np.eye(CHANNELS)
        precision = w @ np.linalg.inv(w.T @ covariance @ w) @ w.T
        away = queries[:, p] - good[:, p].mean(0)
        expected[:, p] = np.sqrt(np.einsum("nc,cd,nd->n", away, precision, away))
    prediction = found.predict(test)
    np.testing.assert_allclose(prediction.maps.reshape(3, -1), expected, rtol=2e-3)
    np.testing.assert_array_equal(prediction.scores, prediction.maps.max((1, 2)))


@pytest.mark.parametrize("asked", [CHANNELS, 500], ids=["all", "more than there are"])
def test_with_all_dimensions_nothing_is_lost(asked):
    train, test = features(20), features(3, seed=1)
    found = soe(dimensions=asked).fit(train)
    assert found.projection_.shape == (CHANNELS, CHANNELS)
    good, queries = stacked(train), stacked(test)
    maps = found.predict(test).maps.reshape(3, -1)
    for p in range(good.shape[1]):
        inverse = np.linalg.inv(np.cov(good[:, p], rowvar=False) + epsilon(good) * np.eye(CHANNELS))
        expected = [mahalanobis(query, good[:, p].mean(0), inverse) for query in queries[:, p]]
        np.testing.assert_allclose(maps[:, p], expected, rtol=2e-3)  # without any projection: W is a rotation


def test_a_constant_channel_is_borne():
    train, test = features(6), features(2, seed=1)
    train.layers[1][:, 0] = test.layers[1][:, 0] = 5.0
    assert np.isfinite(soe(dimensions=5).fit(train).predict(test).maps).all()


def test_the_seed_decides_the_projection():
    first, again, other = (soe(dimensions=3).fit(features(4), Runtime(seed=s)).projection_ for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_only_small_matrices_are_kept():
    state = soe(dimensions=3).fit(features(4)).state()
    assert {name: value.shape for name, value in state.items()} == {
        "projection_": (CHANNELS, 3),
        "mean_": (SIZE * SIZE, 1, 3),
        "scatter_": (SIZE * SIZE, 6),
        "count_": (),
        "offsets_": (len(soe().layers), 2),
    }
