"""Gaussian fine-tuning: the Gaussians are Ledoit and Wolf's, the map is their distance, and the network learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from torch import nn

from al_models.embedding.gaussian_finetune import GaussianFinetune, Tuned, ledoit_wolf, vicinal
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.maps import to_maps
from al_models.parts.patches import RECTIFIED
from al_models.parts.sources import MemorySource
from al_models.types import ImageBatch, ImageSource, Runtime

SIZE = 64


class Stored(ImageSource):
    """Given images and features."""

    def __init__(self, features, images=None, batch_size=2):
        self.features, self.images, self.batch_size = features, images, batch_size
        self.ids = tuple(str(i) for i in range(len(next(iter(features.values())))))

    def read(self, rows):
        rows = list(rows)
        images = None if self.images is None else self.images[rows]
        return ImageBatch(tuple(self.ids[r] for r in rows), images, {n: x[rows] for n, x in self.features.items()})


def quick(**changes):
    return GaussianFinetune(**({"image_size": SIZE} | GaussianFinetune.quick | changes))


def noise(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(100, 156, (n, SIZE, SIZE, 3), dtype=np.uint8))


def source(detector, n, seed=0):
    images = noise(n, seed)
    batch = MemorySource(images.numpy(), detector, Runtime()).read(range(n))
    return Stored(batch.features, images)


@pytest.fixture(scope="module")
def learned():
    detector = quick(epochs=3, learning_rate=1e-4, batch_size=3)
    return detector.fit(source(detector, 6))


@pytest.mark.parametrize("n", [2, 8, 500])
def test_the_shrinkage_is_that_of_ledoit_and_wolf(n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((3, n, 6)) @ rng.standard_normal((3, 6, 6)) + 5
    centred = torch.from_numpy(x - x.mean(1, keepdims=True))
    found = ledoit_wolf(centred.mT @ centred, centred.square().sum(2).square().sum(1), n) / n
    np.testing.assert_allclose(found, [LedoitWolf().fit(vectors).covariance_ for vectors in x], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3], ids=["one image", "equal images"])
def test_features_without_any_spread_are_borne(n):
    detector = quick(layers=(1,))
    detector._set_up(Stored({1: torch.full((n, 2, 4, 4), 7.0)}), range(n), Runtime())
    torch.testing.assert_close(detector.whitening1_, 10 * torch.eye(2).expand(16, 2, 2))


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_each_position_of_each_layer_has_its_gaussian(batch_size):
    rng = np.random.default_rng(0)
    shapes = {1: (3, 2, 2), 2: (4, 1, 1)}
    layers = {i: torch.from_numpy(rng.standard_normal((7, *shape)) + 50).half() for i, shape in shapes.items()}
    detector, rows = quick(), [0, 2, 3, 4, 6]
    detector._set_up(Stored(layers, batch_size=batch_size), rows, Runtime())
    for number, (layer, values) in enumerate(layers.items()):
        unit = values.double() / float(detector.scale_[number])
        assert float(unit[rows].var((0, 2, 3), correction=0).mean()) == pytest.approx(RECTIFIED)
        for place, x in enumerate(unit[rows].flatten(2).permute(2, 0, 1).double().numpy()):
            covariance = LedoitWolf().fit(x).covariance_ + 0.01 * np.eye(x.shape[1])
            w = getattr(detector, f"whitening{layer}_")[place].double()
            np.testing.assert_allclose(getattr(detector, f"mean{layer}_")[place, 0], x.mean(0), rtol=1e-5)
            np.testing.assert_allclose(w.T @ w, np.linalg.inv(covariance), rtol=1e-4, atol=1e-4)


def test_the_map_sums_the_distances_of_tuned_features(learned):
    images = noise(2, seed=1)
    x = standardised(images, learned.feature_spec())
    expected = np.zeros((2, SIZE, SIZE))
    with torch.no_grad():
        layers = learned.network_.backbone(x)
    for layer, raw, scale in zip((1, 2), layers, learned.scale_, strict=True):
        features = raw / scale
        n, _, h, w = features.shape
        distances = np.empty((n, h * w))
        for place in range(h * w):
            whiten = getattr(learned, f"whitening{layer}_")[place].double().numpy()
            mean = getattr(learned, f"mean{layer}_")[place, 0].double().numpy()
            for row, vector in enumerate(features.flatten(2)[..., place].double().numpy()):
                distances[row, place] = mahalanobis(vector, mean, whiten.T @ whiten)
        expected += to_maps(torch.from_numpy(distances).view(n, h, w), SIZE, 4.0).numpy()
    # The features given are of no use here, and none are given.
    found = learned.predict(ImageBatch(("a", "b"), images))
    np.testing.assert_allclose(found.maps, expected, rtol=1e-4)
    np.testing.assert_array_equal(found.scores, found.maps.max((1, 2)))


def test_the_whole_network_is_tuned_and_the_shared_one_is_not(learned):
    pretrained = cached_backbone(learned.feature_spec()).network
    before, after = dict(pretrained.named_parameters()), dict(learned.network_.backbone.named_parameters())
    assert not any(parameter.requires_grad for parameter in before.values())
    # timm keeps a stage beyond the last layer asked for, which has no gradient.
    unmoved = {name for name, value in after.items() if torch.equal(value, before[name])}
    assert unmoved == {name for name, value in after.items() if value.grad is None}
    assert not any(name.startswith(("conv_stem", "blocks.0", "blocks.1", "blocks.2")) for name in unmoved)
    losses = learned.curve_[:, 1]
    assert losses[-1] < 0.98 * losses[0]


def test_held_out_images_are_judged_against_their_augmentations(learned):
    batch = ImageBatch(("a", "b"), noise(2, seed=2))
    x = standardised(batch.images, learned.feature_spec())
    with torch.no_grad():
        shares = [
            learned._mean_distance(learned.network_, x) / learned._mean_distance(learned.network_, a)
            for a in vicinal(x)
        ]
        torch.testing.assert_close(learned._held_out_loss(learned.network_, batch), torch.stack(shares).mean())
        assert float(shares[0]) < 1  # the hole is far from noise, where a network that forgot would see no difference


def test_augmentations_change_a_square_or_blend():
    x = torch.rand(2, 3, 8, 8)
    cut, mixed, blended = vicinal(x)
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[2:6, 2:6] = False
    for changed in (cut, mixed):
        assert torch.equal(changed[..., outside], x[..., outside])
    assert not cut[..., 2:6, 2:6].any()
    assert torch.equal(mixed[..., 2:6, 2:6], x[..., 0:4, 0:4])
    assert torch.equal(blended, blended.flip(3))


def test_batch_norms_keep_their_pretrained_statistics():
    network = Tuned(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).train()
    network(torch.randn(5, 3, 2, 2))
    assert network.training
    assert not network.backbone[1].running_mean.any()
    assert network.backbone[1].weight.requires_grad


def test_loading_a_state_leaves_the_callers_random_numbers_alone(learned):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    quick().load_state(learned.state())
    assert torch.equal(before, torch.get_rng_state())
