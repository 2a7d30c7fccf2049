"""GANomaly: the networks are the published ones, the losses and the score are written out, and each turn is its own."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from al_models.checks import check_images, quick_detector
from al_models.errors import InvalidInput
from al_models.generative.ganomaly import CERTAIN, Decoder, Discriminator, Encoder, Ganomaly, Generator, inputs
from al_models.parts.maps import to_maps
from al_models.parts.train import seeded
from al_models.registry import create
from al_models.types import ImageBatch

SIDE = 32


def trained(**params):
    """A small one, and what it has learned from: (n, 3, s, s)."""
    detector = replace(quick_detector(Ganomaly), **params)
    images = check_images(detector.image_size)
    return detector.fit(images.train), inputs(torch.from_numpy(images.train.copy()), SIDE)


def untrained(**params):
    """A detector, its network in training mode, and images (n, 3, s, s)."""
    detector = Ganomaly(width=4, latent=6, **params)
    with seeded(0):
        network = detector._network().train()
    return detector, network, torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def mean(values):
    return float(values.double().mean())


def test_the_networks_are_the_published_ones():
    generator, discriminator = Generator(SIDE, 64, 100), Discriminator(SIDE, 64)
    kernels = [16 * 3 * 64, 16 * 64 * 128, 16 * 128 * 256]  # of 4 x 4, halving 32 to 4
    encoder = sum(kernels) + 16 * 256 * 100 + 2 * (128 + 256)  # the last 4 x 4 to the code, two batch norms
    decoder = sum(kernels) + 16 * 256 * 100 + 2 * (256 + 128 + 64)
    assert sum(p.numel() for p in generator.parameters()) == 2 * encoder + decoder
    assert sum(p.numel() for p in discriminator.parameters()) == encoder - 16 * 256 * 99
    assert discriminator.features(torch.rand(2, 3, SIDE, SIDE)).shape == (2, 256, 4, 4)


def test_weights_are_drawn_as_the_authors_draw_them():
    network = Ganomaly()._network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1.0, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.3)
            assert not module.bias.any()


@pytest.mark.parametrize("side", [16, 48, 64, 80, 144])
def test_any_multiple_of_16_is_coded_and_decoded(side):
    code = Encoder(side, 2, 5)(torch.rand(2, 3, side, side))
    assert code.shape == (2, 5)
    assert Decoder(side, 2, 5)(code).shape == (2, 3, side, side)


@pytest.mark.parametrize("side", [0, 8, 40])
def test_another_side_is_refused(side):
    with pytest.raises(InvalidInput, match=f"side = {side}, where a whole number .*16 divides is expected"):
        create("ganomaly", side=side)


def test_the_generators_loss_is_the_published_one():
    weights = {"adversarial_weight": 3.0, "contextual_weight": 7.0, "encoder_weight": 11.0}
    detector, network, x = untrained(**weights)
    with torch.no_grad():
        found = detector._generator_loss(network, x)
        decoded, code, again = network["generator"](x)
        real, made = (network["discriminator"].features(images) for images in (x, decoded))
    expected = 3 * mean((real - made) ** 2) + 7 * mean((x - decoded).abs()) + 11 * mean((code - again) ** 2)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_the_discriminators_loss_is_the_mean_of_both_cross_entropies():
    detector, network, x = untrained()
    with torch.no_grad():
        found = detector._discriminator_loss(network, x)
        real = torch.sigmoid(network["discriminator"](x))
        made = torch.sigmoid(network["discriminator"](network["generator"](x)[0]))
    assert found.item() == pytest.approx((-mean(real.log()) - mean((1 - made).log())) / 2, rel=1e-5)
    assert float(network["discriminator"].last_loss) == found.item()


def test_the_generator_learns_first_and_each_turn_teaches_its_own_module():
    detector, network, x = untrained()
    generator, discriminator = detector._turns(network)
    assert (generator.name, generator.module) == ("generator", network["generator"])
    assert (discriminator.name, discriminator.module) == ("discriminator", network["discriminator"])
    discriminator.loss(x).backward()
    assert all(p.grad is None for p in network["generator"].parameters())
    assert all(p.grad is not None for p in network["discriminator"].parameters())
    generator.loss(x).backward()
    assert all(p.grad is not None for p in network["generator"].parameters())


@pytest.mark.parametrize(("loss", "renewed"), [(0.9 * CERTAIN, True), (1.1 * CERTAIN, False)])
def test_a_discriminator_that_is_certain_begins_anew(loss, renewed):
    detector, network, x = untrained()
    discriminator = network["discriminator"]
    discriminator.last_loss.fill_(loss)
    before = discriminator.head.weight.clone()
    detector._generator_loss(network, x)
    assert torch.equal(before, discriminator.head.weight) != renewed


def test_the_score_is_of_the_codes_and_the_map_of_the_images():
    detector, x = trained(epochs=2)
    found = detector.predict(check_images(64).train)
    with torch.no_grad():
        decoded, code, again = detector.network_["generator"](x)
    np.testing.assert_allclose(found.scores, ((code - again) ** 2).sum(1) / detector.latent, rtol=1e-4)
    np.testing.assert_allclose(found.maps, to_maps((x - decoded).abs().sum(1) / 3, 64, sigma=0), rtol=1e-4, atol=1e-5)


def test_a_square_of_noise_stands_out_in_the_map():
    detector, _ = trained()
    images = check_images(64)
    for values, mask in zip(detector.predict(images.anomalous).maps, images.masks, strict=True):
        assert values[mask].mean() > 1.5 * values[~mask].mean()


def test_held_out_images_are_judged_by_what_needs_no_adversary():
    detector, x = trained(epochs=2, patience=5)
    network = detector.network_
    (_, _, judged), *_ = detector.curve()
    assert math.isfinite(judged)
    with torch.no_grad():
        decoded, code, again = network["generator"](x[:1])
        expected = 50 * F.l1_loss(decoded, x[:1]) + F.mse_loss(code, again)
        batch = ImageBatch(("0",), torch.from_numpy(check_images(64).train[:1].copy()))
        assert detector._held_out_loss(network, batch).item() == pytest.approx(expected.item(), rel=1e-5)
