"""MLIR: Yan, Wang, Zhou, Chen 2021, "Unsupervised Anomaly Segmentation via Multilevel Image Reconstruction and Adaptive
Attention-Level Transition", IEEE Transactions on Instrumentation and Measurement 70.

The idea: an image is reconstructed from pretrained features of several levels, through a code too narrow for anything
that good images never show. Image and reconstruction are compared in the features of the same pretrained network, level
by level. An attention over the levels weights both the features that go into the reconstruction and the differences in
the comparison, so that both rely on the same levels. It is adapted during training and moves from level to level, as
suits the material.

The paper's text could not be consulted; this follows the survey's description (Tao et al. 2022, "Deep Learning for
Unsupervised Anomaly Localization in Industrial Images: A Survey"). Known from it are the reconstruction of the image,
the comparison in deep features (of VGG-19), and that one adaptive attention weights the levels of both.

Differs from the paper, or is our reading where the description is silent:
- The backbone is the offline one instead of VGG-19.
- All levels are averaged to the grid of the coarsest before they are encoded, since a finer code would pass defects on.
- A level's attention is the inverse of its usual difference on good images (a running mean), divided by the sum of
  these inverses. It begins equal and moves to the levels that good images can be reconstructed at, where a difference
  means most. Learned weights would instead neglect the difficult levels; here none can be neglected.
- Channels are standardised on the good images, and a level's difference is the mean square over its channels.
- The decoder, the training, and the loss (the weighted differences plus the mean squared error of the pixels) are ours.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the method's own form.

Shapes: n images, l levels, c channels of a level, d of the code; features (n, c, h, w), differences (n, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.backbone import cached_backbone, standardised
from al_models.parts.frame import FRAME
from al_models.parts.maps import SIGMA
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, Traits

_MOMENTUM = 0.05
"""Share of the newest batch in the usual differences."""
_FARTHEST = 1e4
"""Differences beyond it, in variances, are all as bad; half precision could not hold them."""


class Standardised(nn.Module):
    """Features (n, c, h, w) of one level, in standard deviations of the good images seen while training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.seen = nn.BatchNorm2d(channels, affine=False, momentum=None)  # None: the mean over all batches

    @torch.no_grad()
    def learn(self, x: Tensor) -> None:
        """Update the running mean and variance by the features (n, c, h, w) of good images."""
        self.seen(x.float())

    def forward(self, x: Tensor) -> Tensor:
        variance = self.seen.running_var
        # Channels that good images leave nearly constant would drown the others.
        deviation = torch.maximum(variance, 0.01 * variance.mean()).sqrt()
        deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        return (x.float() - self.seen.running_mean[:, None, None]) / deviation[:, None, None]


class Residual(nn.Module):
    """Two convolutions beside a skip connection: (n, d, h, w) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Reconstruction(nn.Module):
    """Standardised features of all levels -> the image (n, 3, size, size), as the backbone takes it."""

    def __init__(self, shapes: Sequence[tuple[int, int, int]], size: int, latent: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.grid = min(h for _, h, _ in shapes)
        self.levels = nn.ModuleList([Standardised(c) for c, _, _ in shapes])
        self.codes = nn.ModuleList([nn.Conv2d(c, latent, 1) for c, _, _ in shapes])
        self.register_buffer("usual", torch.ones(len(shapes)))  # difference of each level on good images
        layers: list[nn.Module] = [nn.Conv2d(latent, width, 3, padding=1), Residual(width)]
        side = self.grid
        while 4 * side < size:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), Residual(width)]
            side *= 2
        self.decode = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 3 * 16, 3, padding=1), nn.PixelShuffle(4))

    def attention(self) -> Tensor:
        """Weight of each level, in the reconstruction and in the comparison: (l,), its sum 1."""
        inverse = 1 / self.usual.clamp(min=1e-6)
        return inverse / inverse.sum()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        code = sum(
            weight * project(F.adaptive_avg_pool2d(level, self.grid))
            for weight, project, level in zip(self.attention(), self.codes, levels, strict=True)
        )
        image = self.decode(code)
        return F.interpolate(image, size=(self.size, self.size), mode="bilinear", align_corners=False)


@dataclass(kw_only=True)
class Mlir(FeatureTrainedDetector):
    """Deep differences between an image and its reconstruction, with one attention over the levels of both."""

    traits: ClassVar[Traits] = Traits(needs_images=True, trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"layers": (2, 3), "width": 16, "epochs": 4, "batch_size": 3}

    latent: PositiveInt = 16
    """Channels of the code, at each position of the coarsest level."""
    width: PositiveInt = 64
    """Channels of the decoder."""
    pixel_weight: NonNegativeFloat = 1.0
    """Weight of the pixels' mean squared error, beside 1 for the deep differences."""
    epochs: int = 40
    batch_size: int = 8
    learning_rate: float = 1e-3
    frame: float = FRAME
    sigma: NonNegativeFloat = SIGMA

    def _network(self) -> nn.Module:
        return Reconstruction(self._shapes(), self.image_size, self.latent, self.width)

    def _differences(self, network: nn.Module, batch: ImageBatch) -> tuple[Tensor, list[Tensor]]:
        """The reconstruction (n, 3, size, size), and its differences from the image at each level (n, h, w)."""
        good = [level(batch.features[layer]) for level, layer in zip(network.levels, self.layers, strict=True)]
        made = network(good)
        again = cached_backbone(self.feature_spec(), str(made.device)).features(made)
        return made, [
            (level(again[layer]) - x).square().mean(1).clamp(max=_FARTHEST)
            for layer, level, x in zip(self.layers, network.levels, good, strict=True)
        ]

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        for level, layer in zip(network.levels, self.layers, strict=True):
            level.learn(batch.features[layer])
        loss, means = self._loss_and_means(network, batch)
        network.usual.lerp_(means, _MOMENTUM)
        return loss

    def _held_out_loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return self._loss_and_means(network, batch)[0]

    def _loss_and_means(self, network: nn.Module, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """The loss of pixels and levels, and the mean difference of each level (l,), without a gradient."""
        made, differences = self._differences(network, batch)
        means = torch.stack([difference.mean() for difference in differences])
        pixels = F.mse_loss(made.float(), standardised(batch.images, self.feature_spec()))
        return (network.attention() * means).sum() + self.pixel_weight * pixels, means.detach()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        _, differences = self._differences(network, batch)
        maps = self._layer_maps(differences, self.layers)
        return with_maximum(sum(weight * values for weight, values in zip(network.attention(), maps, strict=True)))
