"""FYD: what is warped comes back, the losses are those of all pairs, and alignment undoes a shift."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from al_models.embedding.fyd import (
    Focus,
    Fyd,
    chained,
    disagreement,
    inverse,
    pixel_distance,
    standard,
    warp,
)
from al_models.embedding.padim import Padim
from al_models.parts.gaussian import total_variance
from al_models.parts.patches import unit_of
from al_models.types import ImageBatch, ImageSource, Runtime

SIZE = 32
SHAPES = [(5, 16, 16), (7, 8, 8)]


class Stored(ImageSource):
    """Given images, and features of two layers."""

    batch_size = 4

    def __init__(self, n, seed=0):
        rng = np.random.default_rng(seed)
        self.images = torch.from_numpy(rng.integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8))
        self.layers = {
            i: torch.from_numpy(rng.standard_normal((n, *shape))).float() for i, shape in enumerate(SHAPES, 1)
        }
        self.ids = tuple(str(i) for i in range(n))

    def read(self, rows):
        rows = list(rows)
        return ImageBatch(
            tuple(self.ids[r] for r in rows), self.images[rows], {i: x[rows] for i, x in self.layers.items()}
        )


def fyd(**params):
    return Fyd(**{"layers": (1, 2), "image_size": SIZE, "epochs": 1, "batch_size": 4, "channels": 9, **params})


def affine(n, seed=0, reach=0.3):
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(2, 3) + reach * (2 * torch.rand(n, 2, 3, generator=generator) - 1)


def test_affine_maps_chain_and_invert():
    first, second = affine(4), affine(4, seed=1)
    identity = torch.eye(2, 3).expand(4, 2, 3)
    for one in (chained(first, inverse(first)), chained(inverse(first), first)):
        torch.testing.assert_close(one, identity, atol=1e-5, rtol=0)
    ramp = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 64, 64], align_corners=False)[0].permute(2, 0, 1)
    ramps = ramp.expand(4, 2, 64, 64)  # two linear pictures, which interpolation leaves exact
    twice, once = warp(warp(ramps, 0.5 * first), 0.5 * second), warp(ramps, chained(0.5 * first, 0.5 * second))
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=0)


def test_without_a_step_and_without_reach_it_is_padim():
    train, test = Stored(12), Stored(3, seed=1)
    detector = fyd(reach=0.0, learning_rate=1e-12).fit(train)
    found = detector.predict(test)
    for source in (train, test):
        for i in (1, 2):
            source.layers[i] = source.layers[i] / detector.scale_[i - 1]
    padim = Padim(layers=(1, 2), image_size=SIZE, channels=9).fit(train)
    # Both add 0.01 at the papers' scale; the features have it already.
    padim.epsilon /= float(unit_of(total_variance(len(train.ids), padim.mean_, padim.scatter_))) ** 2
    expected = padim.predict(test)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-3)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-3)


def test_the_transformers_start_from_the_image_as_it_is():
    batch = Stored(3).read(range(3))
    thetas, layers = Focus(SHAPES, reach=0.1).eval()(torch.rand(3, 3, 64, 64), list(batch.features.values()))
    assert len(thetas) == 3
    for theta in thetas:
        assert torch.equal(theta, torch.eye(2, 3).expand(3, 2, 3))
    for found, given in zip(layers, batch.features.values(), strict=True):
        torch.testing.assert_close(found, given, atol=1e-4, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_features_are_compared_over_all_pairs_and_positions(n):
    rng = np.random.default_rng(n)
    p, z = (torch.from_numpy(rng.standard_normal((n, 4, 2, 3))).float().requires_grad_() for _ in range(2))
    pairs = [(i, j) for i, j in itertools.product(range(n), range(n)) if i != j or n == 1]
    expected = [
        -float(F.cosine_similarity(p[i, :, y, x], z[j, :, y, x], dim=0).detach())
        for i, j in pairs
        for y, x in itertools.product(range(2), range(3))
    ]
    loss = disagreement(p, z)
    assert loss.item() == pytest.approx(np.mean(expected), abs=1e-6)
    loss.backward()
    assert z.grad is None
    assert p.grad.abs().max() > 0


def test_pixels_are_compared_by_their_l2_distance():
    images = torch.rand(3, 3, 4, 4)
    expected = np.mean([np.linalg.norm(images[i] - images[i - 1], axis=0).mean() for i in range(3)])
    assert float(pixel_distance(images)) == pytest.approx(expected, rel=1e-3)
    assert torch.equal(standard(torch.full((2, 3, 4, 4), 0.7)), torch.zeros(2, 3, 4, 4))


def test_a_defect_is_mapped_where_it_is_in_the_image():
    detector = fyd(reach=0.3, sigma=0.0)
    source = Stored(1)
    detector._set_up(source, [0], Runtime())
    detector._learn_offsets(source)
    network = detector._network().eval()
    with torch.no_grad():
        network.localiser.entries.bias.copy_(torch.tensor([-1.0, 0.2, 0.8, 0.1, -0.5, -1.0]))  # zoomed, turned, moved
    detector.network_ = network
    detector.mean_, detector.whitening_ = torch.zeros(256, 1, 9), torch.eye(9).repeat(256, 1, 1)
    features = {1: torch.zeros(1, *SHAPES[0]), 2: torch.zeros(1, *SHAPES[1])}
    features[1][:, :, 9:11, 5:7] = 5.0
    found = detector.predict(ImageBatch(("a",), source.images, features)).maps[0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert abs(row - 19.5) <= 1.5
    assert abs(column - 11.5) <= 1.5


def test_alignment_brings_shifted_images_together():
    ys, xs = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    source = Stored(4)
    for image, shift in zip(source.images, (-2, 2, 1, -1), strict=True):
        blob = torch.exp(-((ys - 15.5 - shift) ** 2 + (xs - 15.5 + shift) ** 2) / 40)
        image.copy_((40 + 180 * blob).to(torch.uint8)[..., None])
    detector = fyd(epochs=40, batch_size=4, reach=0.2).fit(source)
    small = detector._small(source.read(range(4)))
    with torch.no_grad():
        aligned = warp(small, detector.network_.localiser(small))
    assert pixel_distance(standard(aligned)) < 0.7 * pixel_distance(standard(small))


def test_half_of_each_whitening_is_saved():
    detector = fyd().fit(Stored(4))
    state = detector.state()
    assert state["whitening_"].shape == (256, 9 * 10 // 2)
    assert torch.equal(fyd().load_state(state).whitening_, detector.whitening_)
