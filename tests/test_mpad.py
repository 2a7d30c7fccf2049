"""MPAD: prototypes are K-means of the latent vectors, gradients pass them by, and the map is the sum of residuals."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import KMeans

from al_models.parts import train as training
from al_models.parts.maps import to_maps
from al_models.reconstruction.mpad import Mpad, Prototypes, ScaleAutoencoder
from al_models.types import ImageBatch, ImageSource


class Features(ImageSource):
    """Given features of some layers."""

    def __init__(self, layers, batch_size=4):
        self.layers, self.batch_size = layers, batch_size
        self.ids = tuple(str(i) for i in range(len(next(iter(layers.values())))))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {n: x[rows] for n, x in self.layers.items()})


def features(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Features(
        {
            1: torch.randn(n, 6, 16, 16, generator=generator) * 10 + 3,
            2: torch.randn(n, 4, 8, 8, generator=generator),
        }
    )


def mpad(**params):
    return Mpad(
        **{
            "frame": 0.0,
            "layers": (1, 2),
            "image_size": 32,
            "width": 8,
            "latent": 4,
            "prototypes": 5,
            "epochs": 2,
            "batch_size": 2,
        }
        | params
    )


def blobs(n=400, seed=0):
    """Latent vectors (1, 2, h, w) around four corners, and the corners."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
    z = corners[torch.arange(n) % 4] + 0.3 * torch.randn(n, 2, generator=generator)
    return z.view(1, 20, n // 20, 2).permute(0, 3, 1, 2), z


def test_prototypes_become_the_means_that_k_means_finds():
    latent, vectors = blobs()
    prototypes = Prototypes(4, 2, decay=0.5).train()
    prototypes.vectors.copy_(vectors[:4])
    prototypes.totals.copy_(vectors[:4])
    prototypes.counts.fill_(1.0)
    with training.seeded(0):
        for _ in range(60):
            prototypes(latent)
    expected = KMeans(4, n_init=5, random_state=0).fit(vectors.double().numpy()).cluster_centers_
    found = prototypes.vectors.numpy()
    np.testing.assert_allclose(found[np.lexsort(found.round().T)], expected[np.lexsort(expected.round().T)], atol=1e-3)


def test_a_prototype_that_nothing_comes_to_begins_anew():
    latent, _ = blobs()
    prototypes = Prototypes(5, 2, decay=0.0).train()
    with training.seeded(0):
        prototypes(latent)
        prototypes.vectors[0], prototypes.totals[0] = 100.0, 100.0
        prototypes(latent)
    assert float(prototypes.vectors.abs().max()) < 6


def test_the_nearest_prototype_takes_the_place_and_gradients_pass():
    prototypes = Prototypes(3, 2, decay=0.9).eval()
    prototypes.vectors.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [5.0, 5.0]]))
    latent = torch.tensor([[[[0.2, 3.9]], [[0.1, 4.0]]]], requires_grad=True)  # (1, 2, 1, 2)
    before = prototypes.vectors.clone()
    replaced, distance = prototypes(latent)
    torch.testing.assert_close(replaced, torch.tensor([[[[0.0, 5.0]], [[0.0, 5.0]]]]))
    torch.testing.assert_close(distance.item(), (0.2**2 + 0.1**2 + 1.1**2 + 1.0**2) / 4)
    replaced.sum().backward()
    torch.testing.assert_close(latent.grad, torch.ones_like(latent))
    assert torch.equal(prototypes.vectors, before)  # only a training moves them


def test_the_decoder_hears_of_prototypes_only():
    network = ScaleAutoencoder(channels=3, width=8, latent=4, prototypes=1, decay=0.9)
    with training.seeded(0):
        network.train()(torch.randn(2, 3, 8, 8))
    a, b = (network.eval()(x)[0] for x in (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)))
    torch.testing.assert_close(a, b)


def test_the_map_is_the_sum_of_the_scales_residuals():
    train, test = features(), features(2, seed=1)
    found = mpad().fit(train)
    expected = torch.zeros(2, 32, 32)
    for layer, network in zip((1, 2), found.network_, strict=True):
        mean = train.layers[layer].mean((0, 2, 3), keepdim=True)
        deviation = train.layers[layer].std((0, 2, 3), keepdim=True, unbiased=False)
        x = (test.layers[layer] - mean) / deviation
        with torch.no_grad():
            residual = sum((network(x)[0] - x)[:, c] ** 2 for c in range(x.shape[1])) / x.shape[1]
        expected += to_maps(residual, 32)
    np.testing.assert_allclose(found.predict(test).maps, expected.numpy(), rtol=1e-3)
