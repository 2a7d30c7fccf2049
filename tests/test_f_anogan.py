"""f-AnoGAN: networks, losses and scores written out, and what learns in which phase."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from al_models.checks import check_images, quick_detector
from al_models.errors import InvalidInput
from al_models.generative.f_anogan import (
    ConvolutionThenHalf,
    DoubleThenConvolution,
    FAnogan,
    Generator,
    LayerNorm,
    Tower,
    gradient_penalty,
    inputs,
)
from al_models.parts.maps import to_maps
from al_models.parts.sources import MemorySource
from al_models.parts.train import seeded
from al_models.registry import create
from al_models.types import Runtime

SIDE = 32


def small(**params):
    return replace(quick_detector(FAnogan), **({"epochs": 2, "encoder_epochs": 2} | params))


def untrained(**params):
    """A detector, its network in training mode, and images (n, 3, s, s)."""
    detector = small(**params)
    with seeded(0):
        network = detector._network().train()
    return detector, network, torch.rand(5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def phases(detector, network):
    """Its phases; the second begins when the first has been taken for learned."""
    source = MemorySource(check_images(64).train, detector, Runtime())
    return detector._phases(network, source, range(6), [], Runtime())


def mean(values):
    return float(values.double().mean())


def test_a_halved_convolution_is_one_with_a_mean_behind_it():
    with seeded(0):
        layer, x = ConvolutionThenHalf(3, 5, 3), torch.randn(2, 3, 8, 6)
    expected = F.avg_pool2d(F.conv2d(x, layer.weight, layer.bias, padding=1), 2)
    torch.testing.assert_close(layer(x), expected)


def test_a_doubled_convolution_is_one_with_copies_before_it():
    with seeded(0):
        layer, x = DoubleThenConvolution(3, 5, 3), torch.randn(2, 3, 4, 6)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_the_networks_are_the_authors():
    d = 64
    critic, generator = Tower(64, d, 1, LayerNorm), Generator(64, d, 128)
    pairs = [(d, 2 * d), (2 * d, 4 * d), (4 * d, 8 * d), (8 * d, 8 * d)]
    # Shortcut with bias; two norms; one convolution without a bias, and one with.
    down = sum(a * b + b + 2 * a + 2 * a + 9 * a * a + 9 * a * b + b for a, b in pairs)
    up = sum(a * b + 2 * b + 2 * a + 9 * a * b + 9 * a * a for a, b in pairs)  # no biases
    flat = 4 * 4 * 8 * d
    assert sum(p.numel() for p in critic.parameters()) == 9 * 3 * d + d + down + flat + 1
    assert sum(p.numel() for p in generator.parameters()) == 129 * flat + up + 2 * d + 9 * d * 3 + 3
    x = torch.rand(1, 3, 64, 64)
    assert (critic.features(x).shape, critic(x).shape) == ((1, flat), (1, 1))
    assert generator(torch.randn(2, 128)).shape == (2, 3, 64, 64)


def test_weights_are_drawn_uniformly_at_the_authors_scale():
    block = Tower(SIDE, 16, 1, LayerNorm).features[1]
    for layer, wanted in [(block.shortcut[1], 2 / (16 + 32)), (block.residual[2], 4 / (9 * 32))]:
        assert layer.weight.var().item() == pytest.approx(wanted, rel=0.1)
        assert layer.weight.abs().max().item() <= (3 * wanted) ** 0.5


def test_the_critic_judges_each_image_alone():
    critic = Tower(SIDE, 2, 1, LayerNorm).train()
    x = torch.rand(4, 3, SIDE, SIDE)
    torch.testing.assert_close(critic(x)[:1], critic(x[:1]))


@pytest.mark.parametrize("side", [16, 40])
def test_a_side_that_leaves_no_whole_square_is_refused(side):
    with pytest.raises(InvalidInput, match=f"side = {side}, where a whole number of at least 32 and that 16 divides"):
        create("f_anogan", side=side)


def test_the_penalty_is_of_the_slope_and_teaches_the_critic():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    (weight,) = (p for p in critic.parameters() if p.ndim == 2)
    real, made = torch.rand(2, 3, 3, 2, 2)
    found = gradient_penalty(critic, real, made)
    length = float(weight.detach().norm())  # the slope of a linear critic, wherever it is taken
    assert found.item() == pytest.approx((length - 1) ** 2, rel=1e-5)
    found.backward()
    torch.testing.assert_close(weight.grad, 2 * (length - 1) * weight.detach() / length)


def test_the_penalty_is_taken_between_each_pair_of_images():
    seen = []
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    critic.register_forward_hook(lambda module, given, found: seen.append(given[0].detach()))
    real, made = torch.zeros(5, 3, 2, 2), torch.ones(5, 3, 2, 2)
    gradient_penalty(critic, real, made)
    (between,) = seen
    assert all(len(image.unique()) == 1 for image in between)  # one share an image
    shares = between[:, 0, 0, 0]
    assert len(shares.unique()) == 5
    assert bool(((shares > 0) & (shares < 1)).all())


def test_the_critic_and_the_generator_have_the_published_losses():
    detector, network, x = untrained(penalty_weight=7.0)
    critic, generator = network["critic"], network["generator"]
    with seeded(3):
        found = detector._critic_loss(network, x)
    with seeded(3):
        made = generator(torch.randn(5, detector.latent)).detach()
        penalty = gradient_penalty(critic, x, made).item()
    with torch.no_grad():
        assert found.item() == pytest.approx(mean(critic(made)) - mean(critic(x)) + 7 * penalty, rel=1e-4)
        with seeded(3):
            assert detector._generator_loss(network, x).item() == pytest.approx(-mean(critic(made)), rel=1e-4)


def test_each_turn_of_a_critic_draws_noise_of_its_own():
    detector, network, x = untrained()
    with seeded(0):
        assert not torch.equal(detector._made(network, x), detector._made(network, x))


def test_adversaries_take_turns_and_then_the_encoder_learns():
    detector, network, _ = untrained(critic_steps=5, max_minutes=6.0)
    first, second = phases(detector, network)
    critic, generator = first.turns
    assert (critic.name, critic.every, critic.module) == ("critic", 1, network["critic"])
    assert (generator.name, generator.every, generator.module) == ("generator", 5, network["generator"])
    assert (first.plan.optimiser, first.plan.betas, first.plan.max_minutes) == ("adam", (0.0, 0.9), 4.0)
    (encoder,) = second.turns
    assert (encoder.name, encoder.module) == ("encoder", network["encoder"])
    assert (second.plan.optimiser, second.plan.betas[1], second.plan.eps) == ("rmsprop", 0.9, 1e-10)
    assert (second.plan.learning_rate, second.plan.max_minutes) == (detector.encoder_learning_rate, 2.0)


def test_the_critics_loss_leaves_the_generator_alone_and_the_encoders_both():
    detector, network, x = untrained()
    stages = phases(detector, network)
    (first,) = islice(stages, 1)
    first.turns[0].loss(x).backward()
    assert all(p.grad is None for p in network["generator"].parameters())
    network.zero_grad()
    second = next(stages)
    second.turns[0].loss(x).backward()
    assert all(p.grad is not None for p in network["encoder"].parameters())
    assert all(p.grad is None for name in ("critic", "generator") for p in network[name].parameters())


def test_what_is_frozen_does_not_move():
    images = check_images(64).train
    short, long = (small(encoder_epochs=n).fit(images).network_ for n in (1, 4))
    for name in ("generator", "critic"):  # their averages, too
        for ours, theirs in zip(short[name].state_dict().values(), long[name].state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(short["encoder"].head.weight, long["encoder"].head.weight)


def test_the_score_and_the_encoders_loss_are_the_residuals_of_image_and_features():
    images = check_images(64).train
    detector = small(feature_weight=0.3).fit(images)
    network, x = detector.network_, inputs(torch.from_numpy(images.copy()), SIDE)
    with torch.no_grad():
        back = network["generator"](network["encoder"](x))
        features = network["critic"].features(x) - network["critic"].features(back)
        expected = ((x - back) ** 2).flatten(1).mean(1) + 0.3 * (features**2).mean(1)
        assert detector._encoder_loss(network, x).item() == pytest.approx(mean(expected), rel=1e-5)
    found = detector.predict(images)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4)
    np.testing.assert_allclose(found.maps, to_maps((x - back).abs().sum(1) / 3, 64, sigma=0), rtol=1e-4, atol=1e-5)


def test_patience_is_of_the_encoder():
    detector = small(patience=9).fit(check_images(64).train)
    judged = [held for _, _, held in detector.curve()]
    assert np.isnan(judged).tolist() == [True, True, False, False]
