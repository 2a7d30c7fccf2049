"""MlfSc: the contract, orthogonal matching pursuit against scikit-learn's, and maps and scores by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from al_models.embedding.mlf_sc import MlfSc, omp_residual
from al_models.types import ImageBatch, ImageSource, Runtime

SMALL = {
    **{"layers": (2,), "image_size": 24, "sigma": 0.0, "patches": 40},
    **{"grid": 12, "border": 1, "patch": 4, "stride": 2},
}


class FeatureSource(ImageSource):
    """Features made up in the test instead of computed from images."""

    def __init__(self, features: Mapping[int, Tensor], batch_size: int = 16) -> None:
        self.features, self.batch_size = features, batch_size
        self.ids = tuple(str(row) for row in range(len(next(iter(features.values())))))

    def read(self, rows: Sequence[int]) -> ImageBatch:
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {k: v[rows] for k, v in self.features.items()})


def waves(n: int, seed: int, channels: int = 3, grid: int = 12) -> Tensor:
    """Features with a simple structure to learn, and some noise: (n, c, grid, grid)."""
    generator = torch.Generator().manual_seed(seed)
    phase = 2 * torch.pi * torch.rand(n, channels, 1, 1, generator=generator)
    line = torch.arange(grid) * 0.9
    wave = torch.sin(line[None, None, :, None] + phase) + torch.cos(line[None, None, None] * 0.7 + phase)
    return wave + 0.1 * torch.randn(n, channels, grid, grid, generator=generator)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("seed", range(6))
def test_matching_pursuit_is_scikit_learns(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    c, m, d, k = 4, 25, 16, 3 + 2 * seed  # up to nearly as many atoms as values
    signals = torch.randn(c, m, d, generator=generator)
    dictionary = unit(torch.randn(c, k, d, generator=generator))
    for nonzeros in range(1, min(k, 6) + 1):
        found = omp_residual(signals, dictionary, nonzeros)
        for x, atoms, left in zip(signals, dictionary, found, strict=True):
            code = orthogonal_mp(atoms.T.double().numpy(), x.T.double().numpy(), n_nonzero_coefs=nonzeros)  # (k, m)
            np.testing.assert_allclose(left, x.numpy() - code.T @ atoms.double().numpy(), atol=2e-4)


def test_matching_pursuit_leaves_nothing_of_what_the_atoms_span() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.linalg.qr(torch.randn(1, 8, 8, generator=generator)).Q
    signals = torch.randn(1, 10, 3, generator=generator) @ atoms[:, :3]
    torch.testing.assert_close(omp_residual(signals, atoms, 3), torch.zeros_like(signals), atol=1e-5, rtol=0)
    torch.testing.assert_close(omp_residual(signals, atoms[:, 4:], 4), signals, atol=1e-5, rtol=0)


def test_equal_opposite_and_empty_atoms_are_not_used_twice() -> None:
    generator = torch.Generator().manual_seed(1)
    signals = torch.randn(1, 20, 6, generator=generator)
    one = unit(torch.randn(1, 1, 6, generator=generator))
    many = torch.cat([one, -one, one, torch.zeros_like(one)], dim=1)
    torch.testing.assert_close(omp_residual(signals, many, 4), omp_residual(signals, one, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(omp_residual(signals, torch.zeros(1, 3, 6), 2), signals)


def test_map_and_score_by_hand() -> None:
    """One image, two channels, against loops over patches with scikit-learn's pursuit."""
    features = waves(4, seed=2, channels=2)
    features[0, :, 6:9, 6:9] += torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(3)) * 3
    own = MlfSc(**SMALL, largest=1, atoms=4, nonzeros=2).fit(FeatureSource({2: features}))
    prediction = own.predict(FeatureSource({2: features}))

    x = features[0, :, 1:11, 1:11].numpy()
    x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), ddof=1, keepdims=True)
    places = [(top, left) for top in range(0, 7, 2) for left in range(0, 7, 2)]
    total, cover, worst = np.zeros((10, 10)), np.zeros((10, 10)), np.zeros(2)
    for top, left in places:
        errors = []
        for channel, dictionary in enumerate(own.dictionary_.numpy()):
            patch = x[channel, top : top + 4, left : left + 4].ravel()
            rebuilt = orthogonal_mp(dictionary.T, patch, n_nonzero_coefs=2) @ dictionary
            errors.append((patch - rebuilt) ** 2)
            worst[channel] = max(worst[channel], errors[-1].sum())
        total[top : top + 4, left : left + 4] += np.max(errors, axis=0).reshape(4, 4)
        cover[top : top + 4, left : left + 4] += 1
    assert prediction.scores[0] == pytest.approx(worst.mean(), rel=1e-3)
    grid = np.pad(total / cover, 1, mode="edge")
    upsampled = torch.nn.functional.interpolate(torch.from_numpy(grid)[None, None], size=24, mode="bilinear")[0, 0]
    np.testing.assert_allclose(prediction.maps[0], upsampled, atol=1e-3)


def test_what_was_never_seen_is_rebuilt_badly_and_where_it_is() -> None:
    own = MlfSc(**SMALL).fit(FeatureSource({2: waves(12, seed=4)}))
    test = waves(4, seed=5)
    test[3, :, 5:8, 5:8] += 2 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(6))
    prediction = own.predict(FeatureSource({2: test}))
    assert prediction.scores[3] > 2 * prediction.scores[:3].max()
    row, column = np.unravel_index(prediction.maps[3].argmax(), (24, 24))
    assert 8 <= row <= 18
    assert 8 <= column <= 18


def test_dictionaries_have_unit_atoms_for_each_channel_of_each_layer() -> None:
    features = {1: waves(3, seed=7, channels=2, grid=24), 2: waves(3, seed=8, channels=3, grid=6)}
    own = MlfSc(**{**SMALL, "layers": (1, 2)}).fit(FeatureSource(features))
    assert own.dictionary_.shape == (5, 5, 16)
    torch.testing.assert_close(own.dictionary_.norm(dim=2), torch.ones(5, 5))
    assert set(own.state()) == {"dictionary_", "channels_", "offsets_"}  # arrays, and nothing of scikit-learn


def test_a_subset_of_channels_is_seeded_and_no_larger_than_all() -> None:
    source = FeatureSource({2: waves(3, seed=9, channels=6)})
    chosen = [MlfSc(**SMALL, channels=3).fit(source, Runtime(seed=seed)).channels_.tolist() for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(channels) for channels in chosen}) > 1
    assert all(len(set(channels)) == 3 for channels in chosen)
    assert len(MlfSc(**SMALL, channels=99).fit(source).dictionary_) == 6


def test_the_sample_is_bounded_and_the_same_for_any_batch_size() -> None:
    features = {2: waves(7, seed=10)}
    samples = []
    for batch_size in (1, 3, 7):
        samples.append(MlfSc(**SMALL)._sample(FeatureSource(features, batch_size), Runtime()))
        assert samples[-1].shape == (3, 40, 16)
        torch.testing.assert_close(samples[0], samples[-1])
    assert MlfSc(**{**SMALL, "patches": 10**6})._sample(FeatureSource(features), Runtime()).shape[1] == 7 * 16


def test_fewer_patches_than_atoms_and_constant_channels_are_no_trouble() -> None:
    features = waves(1, seed=11)
    features[:, 1] = 2.5
    own = MlfSc(**{**SMALL, "patches": 3}, atoms=8).fit(FeatureSource({2: features}))
    prediction = own.predict(FeatureSource({2: features}))
    assert np.isfinite(prediction.maps).all()
    assert torch.isfinite(own.dictionary_).all()


def test_images_coded_in_parts_give_what_they_give_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FeatureSource({2: waves(5, seed=12)})
    own = MlfSc(**SMALL).fit(source)
    whole = own.predict(source)
    monkeypatch.setattr("al_models.embedding.mlf_sc._VALUES_AT_ONCE", 1)
    parts = own.predict(source)
    np.testing.assert_allclose(whole.maps, parts.maps, atol=1e-5)
    np.testing.assert_allclose(whole.scores, parts.scores, rtol=1e-5)
