"""FAVAE: the network is the published one, the loss and the map are its residuals, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from al_models.embedding.favae import Favae, FeatureVae
from al_models.parts.maps import to_maps
from al_models.types import ImageBatch, ImageSource, Runtime

SIZE = 32


class Given(ImageSource):
    """Images and features of two layers, the coarser one four times the finer one's red."""

    def __init__(self, n=4, seed=0, batch_size=4):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(0, 256, (n, SIZE, SIZE, 3), dtype=torch.uint8, generator=generator)
        self.layers = {1: torch.randn(n, 6, 8, 8, generator=generator), 2: torch.randn(n, 4, 4, 4, generator=generator)}
        self.batch_size, self.ids = batch_size, tuple(str(i) for i in range(n))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(
            tuple(self.ids[r] for r in rows), self.images[rows], {k: x[rows] for k, x in self.layers.items()}
        )


def favae(**params):
    return Favae(
        **{"frame": 0.0, "layers": (1, 2), "image_size": SIZE, "width": 4, "latent": 3, "epochs": 2, "batch_size": 2}
        | params
    )


def test_the_network_is_the_published_one():
    network = FeatureVae([(128, 64, 64), (256, 32, 32), (512, 16, 16)], side=128, width=128, latent=100)
    assert network.taps == [3, 2, 1]
    # (inputs, outputs, side of the kernel) of each layer that is followed by a batch norm
    down = [(3, 128, 4), (128, 128, 4), (128, 256, 3), (256, 256, 4), (256, 512, 3), (512, 512, 4), (512, 512, 3)]
    up = [(100, 32, 8), (32, 512, 3), (512, 512, 3), (512, 512, 4), (512, 256, 3), (256, 256, 4), (256, 128, 3)]
    normed = [*down, (512, 32, 3), *up, (128, 128, 4)]
    expected = sum(a * b * k * k + b + 2 * b for a, b, k in normed)
    expected += sum(a * b * k * k + b for a, b, k in [(32, 200, 8), (128, 3, 4)])
    expected += sum(2 * (c * c + c) for c in (128, 256, 512))  # the adapters
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("grids", [(64, 32, 16), (50, 25, 13), (16, 16, 16), (32, 8, 4)])
def test_layers_of_any_grid_are_regressed_from_the_level_nearest_in_size(grids):
    shapes = [(3 + i, grid, grid) for i, grid in enumerate(grids)]
    side = 16 * -(-2 * max(grids) // 16)
    network = FeatureVae(shapes, side=side, width=4, latent=2).eval()
    image, features, mean, log_variance = network(torch.rand(2, 3, side, side))
    assert image.shape == (2, 3, side, side)
    assert [tuple(x.shape[1:]) for x in features] == shapes
    assert mean.shape == log_variance.shape == (2, 2)
    levels = [side // 16, side // 8, side // 4, side // 2]
    for tap, grid in zip(network.taps, grids, strict=True):
        assert abs(levels[tap] - grid) == min(abs(level - grid) for level in levels)


def learned():
    return favae().fit(Given())


def parts(detector, source):
    """Of each image: residuals of the image and the layers (list of (n, c, h, w)), and the two of the latent vector."""
    images = source.images.permute(0, 3, 1, 2).float() / 255
    images = torch.nn.functional.interpolate(images, size=16, mode="bilinear", antialias=True)
    with torch.no_grad():
        image, features, mean, log_variance = detector.network_(images)
    residuals = [image - images]
    start = 0
    for layer, copy in zip((1, 2), features, strict=True):
        good = Given().layers[layer]
        spread = good.std((0, 2, 3), keepdim=True, unbiased=False)
        residuals.append(copy - (source.layers[layer] - good.mean((0, 2, 3), keepdim=True)) / spread)
        start += good.shape[1]
    return residuals, mean, log_variance


def test_the_map_is_the_residual_of_the_image_and_all_layers():
    detector, test = learned(), Given(2, seed=1)
    residuals, _, _ = parts(detector, test)
    expected = sum(to_maps((r**2).sum(1), SIZE) for r in residuals) / (3 + 6 + 4)
    np.testing.assert_allclose(detector.predict(test).maps, expected.numpy(), rtol=1e-3)


def test_the_loss_is_squared_errors_and_divergence_of_an_image():
    detector, test = learned(), Given(2, seed=1)
    residuals, mean, log_variance = parts(detector, test)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum()
    for weight in (0.0, 1.0, 5.0):
        detector.divergence = weight
        with torch.no_grad():
            found = detector._loss(detector.network_, test.read(range(2)))
        expected = (sum((r**2).sum() for r in residuals) + weight * divergence) / 2
        torch.testing.assert_close(float(found), float(expected), rtol=1e-3, atol=0)


def test_the_latent_vector_is_drawn_in_training_and_its_mean_in_prediction():
    network = FeatureVae([(3, 8, 8)], side=16, width=4, latent=3)
    x = torch.rand(2, 3, 16, 16)
    with torch.random.fork_rng():
        assert not torch.equal(network.train()(x)[0], network(x)[0])
        assert torch.equal(network.eval()(x)[0], network(x)[0])


def test_a_fit_depends_on_its_seed_alone():
    states = []
    for elsewhere, seed in ((1, 0), (2, 0), (2, 5)):
        with torch.random.fork_rng():
            torch.manual_seed(elsewhere)
            states.append(favae().fit(Given(), Runtime(seed=seed)).state())
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name])
    assert not np.array_equal(states[0]["network_.image.weight"], states[2]["network_.image.weight"])
