"""VT-ADL: the mixture's likelihood against SciPy, the authors' sizes, and what the likelihood teaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import nn
from torch.nn import functional as F

from al_models.embedding.vt_adl import Block, Decoder, Density, Encoder, VtAdl, mixture_nll, patches_of
from al_models.parts.losses import ssim_loss
from al_models.types import ImageBatch

SIZES = {"image_size": 32, "patch": 8, "dim": 16, "depth": 1, "heads": 2, "hidden": 8, "gaussians": 3}
SMALL = SIZES | {"epochs": 1, "frame": 0.0}


def images(n=2, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def batch(pixels):
    return ImageBatch(tuple(str(i) for i in range(len(pixels))), torch.as_tensor(pixels))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_likelihood_is_that_of_the_mixture():
    rng = np.random.default_rng(0)
    x, logits, means, log_variances = (rng.normal(size=s) for s in ((2, 5, 4), (2, 5, 3), (2, 5, 3, 4), (2, 5, 3, 4)))
    found = mixture_nll(*(torch.tensor(a) for a in (x, logits, means, log_variances)))
    for place in np.ndindex(2, 5):
        weights = logits[place] - logsumexp(logits[place])
        each = [
            multivariate_normal.logpdf(x[place], mean, np.exp(log_variance))
            for mean, log_variance in zip(means[place], log_variances[place], strict=True)
        ]
        assert float(found[place]) == pytest.approx(-logsumexp(weights + each) / 4)


def test_the_likelihood_of_a_vector_far_from_all_gaussians_is_finite():
    x = torch.full((1, 512), 100.0, requires_grad=True)
    nll = mixture_nll(x, torch.tensor([[0.0, -200.0]]), torch.zeros(1, 2, 512), torch.zeros(1, 2, 512))
    assert nll.item() == pytest.approx(5000.9, abs=0.1)
    nll.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_no_gaussian_is_narrower_than_1():
    density = Density(4, 3)
    for sign in (-1e3, 1e3):
        nn.init.constant_(density.variances.weight, sign)
        assert bool((density(torch.randn(5, 4))[2] >= 0).all())


def test_patches_go_row_by_row():
    x = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    found = patches_of(x, 2)
    assert found.shape == (2, 6, 12)
    assert torch.equal(found[1, 4], x[1, :, 2:4, 2:4].flatten())


def test_the_papers_sizes():
    with torch.device("meta"):
        encoder, decoder, density = Encoder(64, 64, 512, 6, 8, 1024), Decoder(64 * 512, 512), Density(512, 150)
    block = 3 * 512 * 512 + 512 * 512 + 512 + 2 * 512 * 1024 + 1024 + 512 + 4 * 512
    assert count(Block(512, 8, 1024)) == block
    assert count(encoder) == 6 * block + 3 * 64 * 64 * 512 + 512 + 65 * 512 + 512
    assert count(density) == 512 * (150 + 2 * 150 * 512)
    assert decoder.summarise.weight.shape == (512, 4096 * 8)  # the authors' 4096 capsules of 8 into one of 512
    assert decoder.sizes == [16, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("size", [32, 100, 256])
def test_the_decoder_makes_images_of_any_size(size):
    assert Decoder(40, size)(torch.randn(2, 4, 10)).shape == (2, 3, size, size)


def test_the_loss_is_written_out_and_the_likelihood_teaches_the_encoder_too():
    detector, pixels = VtAdl(**SMALL, noise=0.0), images()
    network = detector._network()
    nll, made = network(batch(pixels).images.permute(0, 3, 1, 2) / 255)
    nll.mean().backward()
    touched = {name.partition(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert touched == {"density", "encoder"}
    truth = torch.tensor(pixels).permute(0, 3, 1, 2) / 255
    expected = 5 * F.mse_loss(made, truth) + 0.5 * ssim_loss(truth, made) + nll.mean()
    torch.testing.assert_close(detector._loss(network, batch(pixels)), expected)


def test_noise_is_added_while_training_alone():
    network, x = VtAdl(**SMALL, noise=5.0)._network(), torch.rand(2, 3, 32, 32)
    assert not torch.equal(network(x)[0], network(x)[0])
    network.eval()
    assert torch.equal(network(x)[0], network(x)[0])


def test_the_map_is_the_likelihood_of_the_patches():
    detector = VtAdl(**SMALL, sigma=0.0).fit(images(4))
    with torch.no_grad():
        nll, _ = detector.network_(torch.tensor(images(2, seed=1)).permute(0, 3, 1, 2) / 255)
    expected = F.interpolate(nll.view(2, 1, 4, 4), size=32, mode="bilinear", align_corners=False)[:, 0]
    found = detector.predict(images(2, seed=1))
    np.testing.assert_allclose(found.maps, expected.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.scores, found.maps.max((1, 2)))
