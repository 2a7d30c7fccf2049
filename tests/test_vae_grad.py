"""VAE-grad: the network's shapes, its loss, and the descent of each image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from al_models.generative.vae_grad import Vae, VaeGrad, error, halvings
from al_models.parts.sources import MemorySource
from al_models.types import Runtime

SIZE = 32


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def learned():
    return VaeGrad(**{**VaeGrad.quick, "image_size": SIZE, "epochs": 2, "steps": 20}).fit(noise(4))


@pytest.mark.parametrize(("size", "times"), [(12, 1), (16, 1), (32, 2), (50, 2), (96, 3), (128, 4), (256, 5)])
def test_copies_have_the_size_of_the_images(size, times):
    network = Vae(size, 4, 6)
    copies, mean, log_variance = network(torch.rand(2, 3, size, size))
    assert halvings(size) == times
    assert copies.shape == (2, 3, size, size)
    assert mean.shape == log_variance.shape == (2, 6)
    assert copies.amin() >= 0
    assert copies.amax() <= 1


def test_at_128_pixels_the_encoder_is_bergmanns():
    convolutions = [m for m in Vae(128, 32, 100).encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    table = [(32, 4), (32, 4), (32, 3), (64, 4), (64, 3), (128, 4), (64, 3), (32, 3), (200, 8)]
    assert [(m.out_channels, m.kernel_size[0]) for m in convolutions] == table


def test_the_loss_is_the_error_and_the_divergence_of_the_latent_normal(learned):
    batch = MemorySource(noise(3), learned, Runtime()).read(range(3))
    x = batch.images.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        copies, mean, log_variance = learned.network_(x)
        squares = ((x - copies) ** 2).sum() / 3
        theirs = torch.distributions.Normal(mean, (log_variance / 2).exp())
        divergence = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(0.0, 1.0)).sum() / 3
        torch.testing.assert_close(learned._loss(learned.network_, batch), squares + divergence)


def projected(detector, start, **least):
    """Where a detector, of another least error if one is given, moves images (n, 3, h, w) to."""
    other = replace(detector).load_state(detector.state() | {f"{name}_": value for name, value in least.items()})
    return other._projected(other.network_, start)


def of_steps(detector, steps):
    return replace(detector, steps=steps).load_state(detector.state())


def images_of(n, seed):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def errors(detector, x):
    with torch.no_grad():
        return error(x, detector.network_(x)[0])


NOTHING = np.zeros(1, np.float32)
"""An error that no descent comes down to."""


def test_one_step_is_the_energys_gradient_times_the_squared_error(learned):
    start = images_of(2, 3)
    x = start.clone().requires_grad_()
    copies = learned.network_(x)[0]
    (x - copies).square().sum().backward()
    expected = (start - learned.rate * x.grad * (x - copies).detach().square()).clamp(0, 1)
    torch.testing.assert_close(projected(of_steps(learned, 1), start, least=NOTHING), expected)


def test_the_descent_lowers_the_error(learned):
    start = images_of(3, 4)
    trail = [start, *(projected(of_steps(learned, n), start, least=NOTHING) for n in (5, 20))]
    found = [errors(learned, x) for x in trail]
    assert (found[0] > found[1]).all()
    assert (found[1] > found[2]).all()


def test_images_stay_images_where_steps_are_too_long(learned):
    wild = replace(learned, rate=50.0).load_state(learned.state())
    ends = projected(wild, images_of(2, 6), least=NOTHING)
    assert 0 <= float(ends.min()) <= float(ends.max()) <= 1


def test_the_l1_distance_holds_images_back(learned):
    start = images_of(3, 4)
    moved = []
    for stay in (0.0, 0.2):
        detector = replace(learned, stay=stay).load_state(learned.state())
        moved.append((projected(detector, start, least=NOTHING) - start).abs().sum((1, 2, 3)))
    assert (moved[1] < moved[0]).all()


def test_each_image_ends_by_itself_at_the_first_step_with_the_error_of_a_good_one(learned):
    start = torch.cat([images_of(1, 5) * contrast + 0.5 * (1 - contrast) for contrast in (0.4, 0.7, 1.0)])
    trail = [start, *(projected(of_steps(learned, n), start, least=NOTHING) for n in range(1, 21))]
    found = torch.stack([errors(learned, x) for x in trail])  # (steps, n)
    least = found[10, 2] * 1.001  # what the last of them comes to at the tenth step
    first = (found <= least).int().argmax(0)
    assert first[2] == 10
    assert len(set(first.tolist())) > 1
    expected = torch.stack([trail[step][row] for row, step in enumerate(first.tolist())])
    ends = projected(learned, start, least=least[None].numpy())
    torch.testing.assert_close(ends, expected, rtol=1e-4, atol=1e-5)


def test_the_least_error_is_that_of_the_images_learned_from(learned):
    x = torch.from_numpy(noise(4)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        torch.testing.assert_close(learned.least_, error(x, learned.network_(x)[0]).amin()[None])
    assert learned.predict(noise(4)).scores.min() == 0  # of that image nothing moves
