"""DFR: the bottleneck is as wide as PCA says, and the map is the squared residual of the regions, written out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from al_models.embedding.dfr import Dfr, RegionAutoencoder, components_for, moments, regions
from al_models.types import ImageBatch, ImageSource

SIZE = 8


class Features(ImageSource):
    """Given features of some layers."""

    def __init__(self, layers, batch_size=4):
        self.layers, self.batch_size = layers, batch_size
        self.ids = tuple(str(i) for i in range(len(next(iter(layers.values())))))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {n: x[rows] for n, x in self.layers.items()})


def features(n=5, seed=0, rank=3, batch_size=4):
    """Two layers, six and four channels, that `rank` sources make up; a little noise."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).standard_normal((rank, 10))
    x = rng.standard_normal((n, SIZE, SIZE, rank)) @ mixing + 0.01 * rng.standard_normal((n, SIZE, SIZE, 10)) + 2
    x = torch.from_numpy(x.transpose(0, 3, 1, 2)).float()
    return Features({1: x[:, :6], 2: x[:, 6:, ::2, ::2].contiguous()}, batch_size)


def dfr(**params):
    # A region a pixel and no smoothing: what comes out are the residuals themselves.
    return Dfr(**{"layers": (1, 2), "image_size": SIZE, "region": 1, "epochs": 1, "frame": 0.0, **params})


def test_the_network_is_that_of_the_authors_code():
    network = RegionAutoencoder(channels=176, latent=40)
    widths = [
        layer.out_channels for layer in [*network.encoder, *network.decoder] if isinstance(layer, torch.nn.Conv2d)
    ]
    assert widths == [128, 80, 40, 80, 128, 176]
    steps = [176, *widths]
    weights = sum(a * b + b for a, b in pairwise(steps))
    norms = 2 * (128 + 80 + 80 + 128)
    assert sum(p.numel() for p in network.parameters()) == weights + norms
    x = torch.randn(1, 176, 3, 3)
    other = x.clone()
    other[..., 0, 0] += 1
    changed = (network.eval()(x) != network(other)).any(1)[0]
    assert changed.nonzero().tolist() == [[0, 0]]  # a region is judged by itself


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_the_bottleneck_is_as_wide_as_scikit_learns_pca(share):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 5, 12)) * np.arange(1, 13) ** 2 + 1000
    maps = torch.from_numpy(x.transpose(0, 3, 1, 2)).float()
    mean, covariance = moments([maps[:1], maps[1:]])
    vectors = maps.permute(0, 2, 3, 1).reshape(-1, 12).double().numpy()
    np.testing.assert_allclose(mean, vectors.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(vectors, rowvar=False, bias=True), rtol=1e-9, atol=1e-6)
    assert components_for(covariance, share) == PCA(share, svd_solver="full").fit(vectors).n_components_


def test_what_does_not_vary_needs_one_component():
    assert components_for(torch.zeros(4, 4, dtype=torch.float64), 0.9) == 1


def test_finer_layers_are_averaged_over_regions_and_coarser_ones_upsampled():
    fine, coarse = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 2, 2)
    found = regions({1: fine, 2: coarse}, (1, 2), side=4)
    assert found.shape == (2, 8, 4, 4)
    expected = fine.view(2, 3, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(found[:, :3], expected)
    upsampled = torch.nn.functional.interpolate(coarse, size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found[:, 3:], upsampled)


def test_the_map_is_the_mean_squared_residual_of_standardised_regions():
    train, test = features(), features(2, seed=1)
    found = dfr(learning_rate=1e-2).fit(train)
    assert int(found.latent_) == found.network_.encoder[-1].out_channels == 3
    maps = found.predict(test).maps
    stacked = regions(test.layers, (1, 2), SIZE)
    good = regions(train.layers, (1, 2), SIZE).permute(1, 0, 2, 3).reshape(10, -1).double()
    for image in range(2):
        for y, x in ((0, 0), (3, 5), (7, 7)):
            vector = (stacked[image, :, y, x] - good.mean(1)) / good.std(1, unbiased=False)
            with torch.no_grad():
                copy = found.network_(vector.float().view(1, -1, 1, 1)).flatten()
            expected = float((copy - vector).square().mean())
            np.testing.assert_allclose(maps[image, y, x], expected, rtol=1e-3)


def test_a_network_is_rebuilt_as_wide_as_it_was():
    found = dfr(variance=0.5).fit(features())
    again = dfr(variance=0.5).load_state(found.state())
    assert again.network_.encoder[-1].out_channels == int(found.latent_) < 3
    assert dfr(latent=7).fit(features()).network_.encoder[-1].out_channels == 7


def test_a_channel_that_is_dead_in_good_images_does_not_drown_the_others():
    train, test = features(), features(2, seed=1)
    train.layers[1][:, 0] = 0.0
    test.layers[1][:, 0] = 0.1
    assert float(dfr().fit(train).predict(test).maps.max()) < 100
