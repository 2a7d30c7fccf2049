"""SE-SVDD: the centre is where good positions lie under the initial weights, and the map is the distance from it."""

from __future__ import annotations

import numpy as np
import torch

from al_models.one_class.se_svdd import SemanticEmbedding, SeSvdd, away_from_zero
from al_models.parts.maps import to_maps
from al_models.parts.train import seeded
from al_models.types import ImageBatch, ImageSource, Runtime


class Features(ImageSource):
    """Given features of some layers."""

    def __init__(self, layers, batch_size=3):
        self.layers, self.batch_size = layers, batch_size
        self.ids = tuple(str(i) for i in range(len(next(iter(layers.values())))))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(tuple(self.ids[r] for r in rows), None, {n: x[rows] for n, x in self.layers.items()})


def features(n=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(n, 6, 16, 16, generator=generator) * 10 + 3
    return Features({1: fine, 2: torch.randn(n, 4, 8, 8, generator=generator)})


def svdd(**params):
    return SeSvdd(
        **{"frame": 0.0, "layers": (1, 2), "image_size": 32, "width": 8, "dimensions": 5, "epochs": 3, "batch_size": 2}
        | params
    )


def standardised(source, good):
    found = []
    for layer in (1, 2):
        mean, deviation = (
            f(good.layers[layer]) for f in (lambda x: x.mean((0, 2, 3)), lambda x: x.std((0, 2, 3), unbiased=False))
        )
        found.append((source.layers[layer] - mean[:, None, None]) / deviation[:, None, None])
    return found


def test_there_is_no_bias_that_could_carry_everything_to_the_centre():
    network = SemanticEmbedding([6, 4], width=8, dimensions=5)
    assert all(name.endswith("weight") for name, _ in network.named_parameters())
    nothing = network([torch.zeros(1, 6, 16, 16), torch.zeros(1, 4, 8, 8)])
    assert all(z.count_nonzero() == 0 for z in nothing)


def test_finer_levels_hear_of_deeper_ones_and_not_the_reverse():
    network = SemanticEmbedding([6, 4], width=8, dimensions=5)
    fine, deep = torch.randn(1, 6, 16, 16), torch.randn(1, 4, 8, 8)
    before, more_deep, more_fine = network([fine, deep]), network([fine, deep + 1]), network([fine + 1, deep])
    assert not torch.equal(before[0], more_deep[0])
    assert not torch.equal(before[0], more_fine[0])
    assert torch.equal(before[1], more_fine[1])


def test_the_centre_is_the_mean_under_the_weights_that_training_begins_with():
    source = features()
    found = svdd().fit(source, Runtime(seed=3))
    with seeded(3):
        network = found._network()
    with torch.no_grad():
        embeddings = network(standardised(source, source))
    for level, z in enumerate(embeddings):
        vectors = z.permute(0, 2, 3, 1).reshape(-1, 5)
        centre = away_from_zero(vectors.mean(0))
        torch.testing.assert_close(found.centre_[level], centre, rtol=1e-4, atol=1e-5)
        spread = (vectors - centre).square().mean()
        torch.testing.assert_close(found.spread_[level], spread, rtol=1e-4, atol=1e-6)


def test_coordinates_near_zero_are_moved_away_from_it():
    moved = away_from_zero(torch.tensor([0.0, 0.05, -0.05, 0.3, -2.0]), 0.1)
    torch.testing.assert_close(moved, torch.tensor([0.1, 0.1, -0.1, 0.3, -2.0]))


def test_the_loss_begins_at_one_and_falls():
    found = svdd(learning_rate=1e-3, epochs=20).fit(features())
    losses = found.curve_[:, 1]
    assert 0.9 < losses[0] < 1.02
    assert losses[-1] < 0.9 * losses[0]


def test_the_map_is_the_mean_over_levels_of_the_distance_from_the_centre():
    train, test = features(), features(2, seed=1)
    found = svdd().fit(train)
    with torch.no_grad():
        embeddings = found.network_(standardised(test, train))
    maps = []
    for level, z in enumerate(embeddings):
        distance = torch.zeros(z.shape[0], *z.shape[2:])
        for coordinate in range(5):
            distance += (z[:, coordinate] - found.centre_[level, coordinate]) ** 2 / 5 / found.spread_[level]
        maps.append(to_maps(distance, 32))
    np.testing.assert_allclose(found.predict(test).maps, (sum(maps) / 2).numpy(), rtol=1e-3)


def test_the_order_of_layers_changes_nothing():
    a, b = (svdd(layers=layers).fit(features()).predict(features(2, seed=1)).maps for layers in ((1, 2), (2, 1)))
    np.testing.assert_array_equal(a, b)
