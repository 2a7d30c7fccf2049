"""Contrario: the contract, the chi-square tail, whitening with a mixture of moments, and what the NFA promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from al_models.embedding.contrario import Contrario, _Pooled, image_moments, log10_chi2_tail
from al_models.errors import InvalidInput
from al_models.types import ImageBatch, ImageSource, Runtime

SIZE, GRID = 64, 16


class FeatureSource(ImageSource):
    """Features made up in the test instead of computed from images."""

    def __init__(self, features: Mapping[int, Tensor], batch_size: int = 16) -> None:
        self.features, self.batch_size = features, batch_size
        self.ids = tuple(str(row) for row in range(len(next(iter(features.values())))))

    def read(self, rows: Sequence[int]) -> ImageBatch:
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {k: v[rows] for k, v in self.features.items()})


def noise(n: int, seed: int, channels: int = 3, grid: int = GRID) -> Tensor:
    """Correlated Gaussian features (n, c, grid, grid)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99)) + 2 * torch.eye(channels)
    white = torch.randn(n, channels, grid, grid, generator=generator)
    return torch.einsum("dc,nchw->ndhw", mix, white) + 5


def detector(**params: object) -> Contrario:
    """Small, with the blocks themselves as map: no border, no smoothing, one map pixel a position."""
    return Contrario(**{"layers": (2,), "image_size": GRID, "border": 0, "sigma": 0.0, **params})


@pytest.mark.parametrize("dof", [1, 2, 5, 24, 112, 1800])
def test_chi2_tail_is_scipys_and_goes_on_where_probabilities_underflow(dof: int) -> None:
    x = np.concatenate([np.linspace(0, 3 * dof, 50), dof + np.geomspace(1, 1e5, 80)])
    found = log10_chi2_tail(torch.from_numpy(x), dof).numpy()
    expected = -chi2.logsf(x, dof) / np.log(10)
    known = np.isfinite(expected) & (expected < 290)  # scipy underflows to infinity
    np.testing.assert_allclose(found[known], expected[known], rtol=1e-6, atol=1e-9)
    assert np.isfinite(found).all()
    assert (np.diff(found[50:]) > 0).all()
    # The density falls as exp(-x / 2) x ** (dof / 2 - 1).
    slope = (found[-1] - found[-2]) / (x[-1] - x[-2]) * 2 * np.log(10)
    assert slope == pytest.approx(1 - (dof - 2) / x[-1], abs=0.01)


def test_pooled_moments_are_those_of_all_positions_in_any_batches() -> None:
    x = noise(7, seed=1).double() + 1e4  # a large mean would show cancellation
    vectors = x.permute(1, 0, 2, 3).flatten(1).numpy()
    for batch in (1, 3, 7):
        pooled = _Pooled()
        for part in x.split(batch):
            pooled.update(*image_moments(part))
        np.testing.assert_allclose(pooled.mean, vectors.mean(1), rtol=1e-12)
        np.testing.assert_allclose(pooled.covariance, np.cov(vectors, bias=True), rtol=1e-9)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("components", [None, 2])
def test_distances_are_mahalanobis_to_the_mixture_of_image_and_good_images(
    share: float, components: int | None
) -> None:
    good, image = noise(4, seed=2).double(), (noise(1, seed=3) * 1.5 + 1).double()
    good_mean, good_covariance = (moment[0] for moment in image_moments(good.transpose(0, 1).flatten(2)[None]))
    own = detector(training_share=share, components=components)
    found = own._squared_distances(image, good_mean, good_covariance)

    # The mixture, as the moments of both sets of positions with weights.
    sets = [good.permute(0, 2, 3, 1).reshape(-1, 3).numpy(), image.permute(0, 2, 3, 1).reshape(-1, 3).numpy()]
    weights = np.concatenate([np.full(len(x), w / len(x)) for x, w in zip(sets, (share, 1 - share), strict=True)])
    both = np.concatenate(sets)
    centre = weights @ both
    covariance = (both - centre).T @ np.diag(weights) @ (both - centre)
    variances, axes = np.linalg.eigh(covariance)
    kept = slice(3 - (components or 3), 3)
    expected = (((sets[1] - centre) @ axes[:, kept]) ** 2 / variances[kept]).sum(1)
    np.testing.assert_allclose(found.flatten(), expected, rtol=1e-8)


def test_map_is_the_chi_square_nfa_over_all_blocks() -> None:
    x = noise(3, seed=4)
    x[1, :, 5, 9] += 40
    own = detector(tail="chi2", training_share=0.0, sizes=(1,)).fit(FeatureSource({2: x}))
    maps = own.predict(FeatureSource({2: x})).maps
    vectors = x[1].flatten(1).numpy().astype(float)
    centred = vectors - vectors.mean(1, keepdims=True)
    squared = (centred * np.linalg.solve(np.cov(vectors, bias=True), centred)).sum(0)
    nfa = GRID**2 * chi2.sf(squared, 3)
    np.testing.assert_allclose(maps[1].ravel(), -np.log10(nfa), rtol=1e-4, atol=1e-4)
    assert np.unravel_index(maps[1].argmax(), maps[1].shape) == (5, 9)


def test_every_layer_and_size_counts_as_tests() -> None:
    x = {1: noise(2, seed=5), 2: noise(2, seed=6, grid=8)}
    own = detector(layers=(1, 2), tail="chi2", sizes=(1, 3)).fit(FeatureSource(x))
    batch = FeatureSource(x).read([0, 1])
    flat = [torch.zeros_like(statistics) for statistics in own._statistics(batch, Runtime())]
    own._statistics = lambda batch, runtime: flat  # type: ignore[method-assign]
    tests = 2 * (GRID**2 + 8**2)
    np.testing.assert_allclose(own.predict(batch).maps, -np.log10(tests), rtol=1e-5)  # p = 1 everywhere


@pytest.mark.parametrize("tail", ["empirical", "chi2"])
def test_gaussian_features_raise_the_false_alarms_promised(tail: str) -> None:
    own = detector(tail=tail, training_share=0.5, sizes=(1, 3)).fit(FeatureSource({2: noise(100, seed=7)}))
    good = FeatureSource({2: noise(300, seed=8)}, batch_size=100)
    # The promise is about blocks, each layer and size alike, so that their sum is met whatever the dependence.
    for promised in (10.0, 1.0):
        seen = 0.0
        for batch in good:
            statistics = own._statistics(batch, Runtime())
            tests = sum(values[0].numel() for values in statistics)
            for row, values in enumerate(statistics):
                seen += float((own._rarity(row, values) - np.log10(tests) >= -np.log10(promised)).sum()) / len(good)
        if tail == "empirical":
            assert seen == pytest.approx(promised, rel=0.3)
        else:  # an average of 9 independent distances varies less than the one it is taken for
            assert 0.3 * promised < seen < 0.75 * promised
        assert (own.predict(good).scores >= -np.log10(promised)).mean() <= promised


def test_empirical_tail_is_the_share_of_good_blocks_then_an_exponential() -> None:
    train = noise(60, seed=9)
    own = detector(tail="empirical", training_share=1.0, sizes=(1,)).fit(FeatureSource({2: train}))
    statistics = own._statistics(FeatureSource({2: train}).read(range(60)), Runtime())[0].flatten()
    for share in (0.5, 0.1, 0.02):
        x = statistics.quantile(1 - share)
        assert float(10 ** -own._rarity(0, x)) == pytest.approx(share, rel=0.05)
    steps = own._rarity(0, torch.tensor([30.0, 40.0, 1e3, 1e4, 1e4 + 10], dtype=torch.float64))
    assert float(steps[1] - steps[0]) == pytest.approx(float(steps[4] - steps[3]), rel=1e-6)  # a straight line
    excess = statistics[statistics > own.start_[0]] - own.start_[0]
    assert float(own.scale_[0]) == pytest.approx(float(excess.mean()), rel=0.05)


def test_border_is_left_out_and_filled_from_inside() -> None:
    x = noise(3, seed=10)
    disturbed = x.clone()
    disturbed[..., 0] += 100  # the first column of positions
    own = detector(image_size=SIZE, border=4, sizes=(1,)).fit(FeatureSource({2: x}))
    clean, found = (own.predict(FeatureSource({2: f})).maps for f in (x, disturbed))
    np.testing.assert_array_equal(clean, found)
    narrow = detector(border=1, sizes=(1,)).fit(FeatureSource({2: x})).predict(FeatureSource({2: x})).maps
    np.testing.assert_array_equal(narrow[:, :, 0], narrow[:, :, 1])
    np.testing.assert_array_equal(narrow[:, 0], narrow[:, 1])


def test_whitening_by_the_image_alone_survives_more_channels_than_positions() -> None:
    x = {2: noise(2, seed=11, channels=40, grid=4)}
    prediction = detector(image_size=4, training_share=0.0).fit(FeatureSource(x)).predict(FeatureSource(x))
    assert np.isfinite(prediction.maps).all()


@pytest.mark.parametrize("tail", ["empirical", "chi2"])
def test_dead_and_duplicate_channels_and_one_image_are_no_trouble(tail: str) -> None:
    x = noise(1, seed=12)
    x = torch.cat([x, x[:, :1], torch.zeros(1, 1, GRID, GRID)], dim=1)
    own = detector(tail=tail, components=50).fit(FeatureSource({2: x}))
    bad = x.clone()
    bad[0, :, 4, 4] = 6e4  # as far as half precision goes
    maps = own.predict(FeatureSource({2: bad})).maps
    assert np.unravel_index(maps[0].argmax(), maps[0].shape) in {(4, 4), (3, 3), (3, 4), (3, 5), (4, 3), (4, 5), (5, 4)}
    assert maps.max() < 65504


def test_fitting_with_the_other_tail_forgets_the_first() -> None:
    own = detector().fit(FeatureSource({2: noise(2, seed=13)}))
    own.tail = "chi2"
    own.fit(FeatureSource({2: noise(2, seed=13)}))
    assert own.state_names() == ["covariance2_", "mean2_", "offsets_"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"border": 8}, "smaller border"),
    ],
)
def test_bad_parameters_are_named(params: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        detector(**params).fit(FeatureSource({2: noise(2, seed=14)}))
