"""MLIR: one attention for both uses of the levels, differences written out, and gradients through a frozen network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from al_models.embedding.mlir import Mlir, Reconstruction, Standardised
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.sources import MemorySource
from al_models.types import Runtime

SIZE = 64
SMALL = {"image_size": SIZE, "layers": (2, 3), "latent": 3, "width": 8, "epochs": 1, "frame": 0.0}


def images(n=3, seed=0):
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, SIZE)[:, None, None] + np.linspace(0, 40, SIZE)[:, None] + np.array([0.0, 5.0, 10.0])
    return np.clip(ramp + rng.normal(0, 10, (n, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def batch(detector, pixels):
    source = MemorySource(pixels, detector, Runtime())
    return source.read(range(len(pixels)))


@pytest.fixture(scope="module")
def learned():
    return Mlir(**SMALL).fit(images())


def test_attention_goes_to_the_levels_that_are_made_again_best():
    network = Reconstruction([(2, 8, 8), (3, 4, 4)], 32, latent=2, width=4)
    assert network.attention().tolist() == [0.5, 0.5]
    network.usual.copy_(torch.tensor([0.3, 0.1]))
    torch.testing.assert_close(network.attention(), torch.tensor([0.25, 0.75]))
    network.usual.copy_(torch.tensor([0.0, 1.0]))  # a level without any difference
    assert torch.isfinite(network.attention()).all()


def test_a_level_without_attention_takes_no_part_in_the_reconstruction():
    network = Reconstruction([(2, 8, 8), (3, 4, 4)], 32, latent=2, width=4).eval()
    for code in network.codes:
        torch.nn.init.zeros_(code.bias)
    network.usual.copy_(torch.tensor([1e-6, 1e6]))
    fine, coarse = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)
    whole = network([fine, coarse])
    torch.testing.assert_close(whole, network([fine, -coarse]))
    assert not torch.allclose(whole, network([-fine, coarse]))


@pytest.mark.parametrize(("grid", "size"), [(16, 256), (14, 224), (4, 64), (10, 150), (7, 20)])
def test_the_image_is_made_at_its_size(grid, size):
    network = Reconstruction([(2, grid, grid)], size, latent=2, width=4)
    assert network([torch.randn(1, 2, grid, grid)]).shape == (1, 3, size, size)


def test_channels_are_in_standard_deviations_of_all_good_images():
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 7.0, 0.0]).view(
        3, 1, 1
    )
    level = Standardised(3)
    for part in x.split(2):
        level.learn(part)
    y = level(x)
    assert float(y.mean((0, 2, 3)).abs().max()) < 1e-5
    torch.testing.assert_close(y.std((0, 2, 3))[:2], torch.ones(2), rtol=0.1, atol=0)
    assert float(y[:, 2].abs().max()) == 0  # a constant channel divides by no zero


def test_the_loss_and_the_map_are_written_out(learned):
    network, given = learned.network_, batch(learned, images(2, seed=1))
    network.usual.copy_(torch.tensor([0.5, 1.5]))
    spec = learned.feature_spec()
    with torch.no_grad():
        good = [level(given.features[n]) for level, n in zip(network.levels, (2, 3), strict=True)]
        made = network(good)
        again = cached_backbone(spec).features(made)
        apart = [
            (level(again[n]) - x).square().mean(1) for level, n, x in zip(network.levels, (2, 3), good, strict=True)
        ]
        pixels = F.mse_loss(made, standardised(given.images, spec))
        loss = learned._held_out_loss(network, given)
        torch.testing.assert_close(loss, 0.75 * apart[0].mean() + 0.25 * apart[1].mean() + pixels)
    flat = Mlir(**SMALL, sigma=0.0).load_state(learned.state())
    flat.offsets_.zero_()
    whole = [F.interpolate(d[:, None], size=SIZE, mode="bilinear", align_corners=False)[:, 0] for d in apart]
    found = flat.predict(images(2, seed=1))
    np.testing.assert_allclose(found.maps, 0.75 * whole[0] + 0.25 * whole[1], rtol=1e-3)
    np.testing.assert_array_equal(found.scores, found.maps.max((1, 2)))


def test_the_decoder_learns_through_the_frozen_network_and_held_out_images_are_not_noted():
    detector = Mlir(**SMALL, pixel_weight=0.0)
    given = batch(detector, images())
    detector.shapes_ = torch.tensor([[n, *given.features[n].shape[1:]] for n in (2, 3)])
    network = detector._network()
    detector._loss(network, given).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.codes.parameters())
    assert not any(p.requires_grad for p in cached_backbone(detector.feature_spec()).network.parameters())
    noted = network.usual.clone()
    assert not torch.equal(noted, torch.ones(2))
    with torch.no_grad():
        detector._held_out_loss(network, given)
    assert torch.equal(network.usual, noted)
    assert int(network.levels[0].seen.num_batches_tracked) == 1
