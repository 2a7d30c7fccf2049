"""VAE-grad: Dehaene, Frigo, Combrexelle, Eline 2020, "Iterative energy-based projection on a normal data manifold for
anomaly localization", ICLR, arXiv:2002.03734.

The idea: a variational auto-encoder that knows good images blurs all of an image, not its defect alone. So what is
compared with the image is not the reconstruction, but the image itself, moved towards what the auto-encoder takes for
normal: by gradient descent on an energy, the reconstruction error plus an L1 distance to where the image began, which
keeps what need not change. The gradient is weighted pixel by pixel with the squared reconstruction error, so that
well-made pixels stay and others move fast. The map is the difference between the image and where it ends.

The paper's abstract says that much; its text was not to be had. Two public re-implementations, which agree on the
weighted gradient, give the settings:
- one that cuts images into patches of 128 px (the convolutions of Bergmann et al. 2019, arXiv:1807.02011, latent 100):
  the descent's rate of 0.5, the weight 0.05 of the L1 distance, pixels kept in [0, 1], and an end where the error has
  come down to the least one of the training images.
- dbbbbm/energy-projection-anomaly: 100 steps at most, whole colour images of 256 px, 250 epochs of batches of 64, Adam
  at 5e-4 with betas (0.5, 0.999). Its auto-encoder is not variational.

Ours:
- batch norm, and one more halving for each doubling of the image beyond 128 px, so that the last grid stays near 8.
- the loss is the sum of squared errors and the divergence from a standard normal: a decoder of variance 1/2.
- whole images, also of textures.
- the gradient flows through the auto-encoder, as the energy says; the re-implementations hold the reconstruction fixed.
- each image ends its descent by itself. With `patience`, the least error is that of the held-out images.
- the map is the mean absolute difference over the colours, and its maximum scores the image; the paper scores none.

Shapes: n images, c channels, h = w = image_size, g side of the last grid, z numbers of the latent vector.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveFloat, PositiveInt
from al_models.parts.epochs import moved
from al_models.parts.maps import to_maps
from al_models.trained import Generators, TrainedDetector, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

_GRID = 8
"""The last grid of the encoder has this side, or up to twice as much where the image's is no power of two."""


def halvings(size: int) -> int:
    """How often the encoder halves an image of this side."""
    return max(1, (size // _GRID).bit_length() - 1)


class Vae(nn.Module):
    """Images (n, 3, h, w) in [0, 1] -> copies, and the latent vector's mean and log-variance (n, z)."""

    def __init__(self, size: int, width: int, latent: int) -> None:
        """`width`: channels at first."""
        super().__init__()
        times = halvings(size)
        grid = -(-size // 2**times)
        self.side = grid * 2**times
        channels = ([width] * times + [2 * width, 4 * width])[-times:]  # after each halving
        encoder, decoder = [_conv(3, channels[0], 4, 2)], [nn.ConvTranspose2d(channels[0], 3, 4, 2, 1)]
        for before, c in itertools.pairwise(channels):
            encoder.append(_conv(before, c, 4, 2))
            decoder.append(_doubled(c, before))
            if c != channels[-1]:
                encoder.append(_conv(c, c, 3, 1))
                decoder.append(_conv(c, c, 3, 1))
        c, w1, w2 = channels[-1], width, 2 * width
        self.encoder = nn.Sequential(
            *encoder,  # (n, c, g, g)
            _conv(c, w2, 3, 1),
            _conv(w2, w1, 3, 1),
            nn.Conv2d(w1, 2 * latent, grid),  # (n, 2 z, 1, 1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(latent, w1, grid),
            _active(w1),
            _conv(w1, w2, 3, 1),
            _conv(w2, c, 3, 1),  # (n, c, g, g)
            *reversed(decoder),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(_resized(images, self.side)).float().flatten(1).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 20)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        copies = self.decoder(z[:, :, None, None]).float().sigmoid()
        return _resized(copies, images.shape[-1]), mean, log_variance


def _conv(inputs: int, outputs: int, side: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, side, stride, padding=1), _active(outputs))


def _doubled(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), _active(outputs))


def _active(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.LeakyReLU(0.2))


def _resized(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.interpolate(x, size=side, mode="bilinear", align_corners=False)


def error(images: Tensor, copies: Tensor) -> Tensor:
    """Sum of squared differences of each image: (n,)."""
    return (images - copies).square().flatten(1).sum(1)


@dataclass(kw_only=True)
class VaeGrad(TrainedDetector):
    """Projection on what a VAE takes for normal; learned: `network_`, `least_` (1,), the error at which a descent
    ends, and `curve_`."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, gradients_in_predict=True)
    training: ClassVar[Mapping[str, Any]] = {"betas": (0.5, 0.999)}
    quick: ClassVar[Mapping[str, Any]] = {
        "image_size": 64,
        "width": 8,
        "latent": 8,
        "epochs": 30,
        "batch_size": 3,
        "learning_rate": 5e-3,
        "steps": 5,
    }

    width: PositiveInt = 32
    """Channels of the first convolution."""
    latent: PositiveInt = 100
    """Numbers that an image is squeezed into."""
    divergence: NonNegativeFloat = 1.0
    """Weight of the latent vectors' divergence from a standard normal."""
    epochs: int = 250
    batch_size: int = 64
    learning_rate: float = 5e-4
    steps: PositiveInt = 100
    """Steps of the descent, at most."""
    rate: PositiveFloat = 0.5
    """How far a step of the descent goes: the paper's alpha."""
    stay: NonNegativeFloat = 0.05
    """Weight of the L1 distance to where the image began: the paper's lambda."""
    sigma: NonNegativeFloat = 0.0

    def _network(self) -> nn.Module:
        return Vae(self.image_size, self.width, self.latent)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        images = _pixels(batch)
        copies, mean, log_variance = network(images)
        divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)
        return (error(images, copies) + self.divergence * divergence).mean()

    def _finish(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        least = torch.tensor([torch.inf], device=runtime.device)
        for batch in source.batches(rows):
            with torch.no_grad():
                images = _pixels(moved(batch, runtime.device))
                least = torch.minimum(least, error(images, self.network_(images)[0]).amin())
        self.least_ = least

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        images = _pixels(batch)
        apart = (self._projected(network, images) - images).abs().mean(1)  # (n, h, w)
        return with_maximum(to_maps(apart, self.image_size, self.sigma))

    def _projected(self, network: nn.Module, start: Tensor) -> Tensor:
        """Images (n, 3, h, w) moved to what the network takes for normal, each until it has the error of a good one."""
        x, moving = start, torch.ones(len(start), dtype=torch.bool, device=start.device)
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            copies = network(x)[0]
            errors = error(x, copies)
            moving = moving & (errors.detach() > self.least_.to(x.device))
            if not moving.any():
                break
            energy = errors.sum() + self.stay * (x - start).abs().sum()  # no image's part depends on another
            (gradient,) = torch.autograd.grad(energy, x)
            step = self.rate * gradient * (x - copies).detach().square()
            # Beyond 1 an error's cube is larger than the error: a step would lead away, and the next one further.
            x = torch.where(moving[:, None, None, None], (x - step).clamp(0, 1), x)
        return x.detach()


def _pixels(batch: ImageBatch) -> Tensor:
    """Images float32 (n, 3, h, w) in [0, 1]."""
    return batch.images.permute(0, 3, 1, 2).float() / 255
