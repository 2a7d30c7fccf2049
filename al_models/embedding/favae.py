"""FAVAE: Anomaly localization by modeling perceptual features (Dehaene and Eline 2020, arXiv:2008.05369).

The idea: a variational auto-encoder learns to reconstruct good images. Its decoder also has to predict the features
that a pretrained network has for the image: each feature layer is regressed from the decoder's layer of the same size.
All of it is decoded from one short latent vector, which represents good images only. The map is the squared residual of
the image and of all feature layers, upsampled and summed.

The paper's abstract says that much; its text could not be consulted. The settings are those of a public
re-implementation (xiahaifeng1995/FAVAE-anomaly-detection-localization).

Differs from the re-implementation:
- The VAE sees the image at twice the size of the finest layer's grid. For the default backbone at 256 px that is the
  same network on the same sizes.
- Feature channels are standardised by the good images' mean and deviation. Those of the default backbone have
  deviations around 10, beside which the image and the divergence would count for nothing.
- An epoch is the training images as they are, since features come from a store; there it is 10,000 turned and flipped
  images. Batches are therefore smaller (16 instead of 64), and the rate is 1e-3 instead of 0.005.
- The map is divided by the number of channels. The image score is its maximum.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the method's own form.

Kept from it: the auto-encoder of Bergmann et al. 2019 (arXiv:1807.02011) with 128 to 512 channels, batch norm and leaky
ReLU, latent size 100; feature layers (there VGG-16's conv2_2, conv3_3 and conv4_3 at 128 px) regressed by two 1 x 1
convolutions each; squared errors and the divergence from a standard normal, both summed, as the loss; Adam with weight
decay 1e-5; 100 epochs; sigma 4.

Shapes: n images, c channels, s side of the VAE's image, z numbers of the latent vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.frame import FRAME
from al_models.parts.maps import SIGMA, to_maps
from al_models.parts.patches import channel_moments, standard_layers
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

_HALVINGS = 4
"""How often the encoder halves: its last grid is a sixteenth of the image's side."""


class FeatureVae(nn.Module):
    """Images (n, 3, s, s) in [0, 1] -> image, feature layers, and the latent vector's mean and log-variance (n, z)."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], side: int, width: int, latent: int) -> None:
        """`shapes`: (c, h, w) of the layers to regress; `side`: a multiple of 16; `width`: channels at first."""
        super().__init__()
        self.shapes = list(shapes)
        base, narrow = side // 2**_HALVINGS, max(1, width // 4)
        w1, w2, w4 = width, 2 * width, 4 * width
        self.encoder = nn.Sequential(
            _conv(3, w1, 4, 2),  # (n, w, s / 2, s / 2)
            _conv(w1, w1, 4, 2),
            _conv(w1, w2, 3, 1),
            _conv(w2, w2, 4, 2),
            _conv(w2, w4, 3, 1),
            _conv(w4, w4, 4, 2),  # (n, 4 w, s / 16, s / 16)
            _conv(w4, w4, 3, 1),
            _conv(w4, narrow, 3, 1),
            nn.Conv2d(narrow, 2 * latent, base),  # (n, 2 z, 1, 1)
        )
        self.start = nn.Sequential(
            nn.ConvTranspose2d(latent, narrow, base),
            nn.BatchNorm2d(narrow),
            nn.LeakyReLU(0.2),
            _conv(narrow, w4, 3, 1),
            _conv(w4, w4, 3, 1),  # (n, 4 w, s / 16, s / 16)
        )
        self.levels = nn.ModuleList(
            [
                _double(w4, w4),  # (n, 4 w, s / 8, s / 8)
                nn.Sequential(_conv(w4, w2, 3, 1), _double(w2, w2)),  # (n, 2 w, s / 4, s / 4)
                nn.Sequential(_conv(w2, w1, 3, 1), _double(w1, w1)),  # (n, w, s / 2, s / 2)
            ]
        )
        self.image = nn.ConvTranspose2d(w1, 3, 4, 2, 1)
        sides, widths = [base, 2 * base, 4 * base, 8 * base], [w4, w4, w2, w1]
        self.taps = [min(range(4), key=lambda i: (abs(sides[i] - h), -i)) for _, h, _ in shapes]
        """The decoder's level nearest in size to each layer."""
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Conv2d(widths[tap], widths[tap], 1), nn.ReLU(), nn.Conv2d(widths[tap], c, 1))
            for tap, (c, _, _) in zip(self.taps, shapes, strict=True)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        mean, log_variance = self.encoder(images).float().flatten(1).chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 20)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        grids = [self.start(z[:, :, None, None])]
        for level in self.levels:
            grids.append(level(grids[-1]))
        features = [
            _resized(adapter(grids[tap]).float(), (h, w))
            for tap, adapter, (_, h, w) in zip(self.taps, self.adapters, self.shapes, strict=True)
        ]
        return self.image(grids[-1]).float().sigmoid(), features, mean, log_variance


def _conv(inputs: int, outputs: int, side: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, side, stride, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


def _double(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2))


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@dataclass(kw_only=True)
class Favae(FeatureTrainedDetector):
    """Feature-augmented VAE; learned beside the network: `mean_` and `deviation_` of all channels, layer by layer."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"layers": (2, 3), "width": 8, "latent": 8, "epochs": 4, "batch_size": 3}

    width: PositiveInt = 128
    """Channels of the first convolution."""
    latent: PositiveInt = 100
    """Size of an image's latent vector."""
    divergence: NonNegativeFloat = 1.0
    """Weight of the latent vectors' divergence from a standard normal."""
    epochs: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    frame: float = FRAME
    sigma: NonNegativeFloat = SIGMA

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self.mean_, self.deviation_ = channel_moments(source, rows, self.layers, runtime.device)

    def _side(self) -> int:
        """Side of the image that the VAE sees: twice the finest layer's, rounded up to what four halvings divide."""
        step = 2**_HALVINGS
        return step * -(-2 * max(h for _, h, _ in self._shapes()) // step)

    def _network(self) -> nn.Module:
        return FeatureVae(self._shapes(), self._side(), self.width, self.latent)

    def _residuals(self, network: nn.Module, batch: ImageBatch) -> tuple[list[Tensor], Tensor]:
        """Squared residuals, sums over channels (n, h, w), of the image and each layer; and the divergences (n,)."""
        images = batch.images.permute(0, 3, 1, 2).float() / 255  # (n, 3, size, size)
        images = F.interpolate(images, size=self._side(), mode="bilinear", antialias=True, align_corners=False)
        image, features, mean, log_variance = network(images)
        wanted = [images, *standard_layers(batch.features, self.layers, self.mean_, self.deviation_)]
        residuals = [(a - b).square().sum(1) for a, b in zip([image, *features], wanted, strict=True)]
        return residuals, 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(1)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        residuals, divergence = self._residuals(network, batch)
        return sum(residual.sum() for residual in residuals) / len(batch) + self.divergence * divergence.mean()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        residuals, _ = self._residuals(network, batch)
        image = to_maps(residuals[0], self.image_size, self.sigma)
        total = image + sum(self._layer_maps(residuals[1:], self.layers))
        return with_maximum(total / (3 + len(self.mean_)))
