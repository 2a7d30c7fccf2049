"""DFR: Deep Feature Reconstruction for Unsupervised Anomaly Segmentation (Yang, Shi and Qi 2020, arXiv:2012.07122).

The idea: every region of 4 x 4 pixels is described by the features of all layers of a pretrained network, resized to
one grid and stacked. An auto-encoder of 1 x 1 convolutions, which sees one region at a time, learns to reconstruct the
regions of good images. Its bottleneck has as many channels as the principal components that hold 90 % of the variance
of good regions. What it cannot reconstruct is anomalous: the map is the squared residual, upsampled.

Differs from the paper:
- The ends of three stages of EfficientNet-Lite0 stand for layers 1 to 12 of VGG-19.
- The paper resizes each layer to the image and averages it over regions. Here layers finer than the regions are
  averaged over them and coarser ones upsampled to the finest grid, which gives the same up to the interpolation's blur,
  without maps at image size.
- Channels are standardised by the good images' mean and deviation. The authors' code leaves them as they are, so that
  PCA and loss are dominated by the channels of largest variance.
- The principal components are those of all training images, not of ten.
- The residual is averaged over the channels, as in the authors' code; the paper's sum is c times as large.
- The image score, which the paper leaves open, is the map's maximum.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the paper's form.

Kept from the paper and the authors' code (YoungGod/DFR): images of 256 px; channels c -> (c + 2d)/2 -> 2d -> d and
back, with batch norm and ReLU between; mean squared error; Adam at 1e-4, batches of 4, 700 epochs; no smoothing.

Shapes: n images, p = h * w regions, c channels of all layers, d of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.frame import FRAME
from al_models.parts.maps import to_maps
from al_models.parts.patches import as_vectors, channel_counts, deviations_of, on_device, stack_layers
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits


def regions(features: Mapping[int, Tensor], layers: Sequence[int], side: int) -> Tensor:
    """The layers stacked on one grid: (n, c_l, h_l, w_l) each -> float32 (n, c, h, w).

    h = w = `side`, or the finest layer's if that is coarser.
    """
    fitting = {
        layer: F.adaptive_avg_pool2d(features[layer].float(), side)
        if features[layer].shape[2] > side
        else features[layer]
        for layer in layers
    }
    return stack_layers(fitting, layers, mode="bilinear")


def moments(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean (c,) and covariance (c, c) over all positions of maps (n, c, h, w), in float64 and one pass."""
    count, shift, total, products = 0, None, None, None
    for batch in maps:
        for image in batch:
            vectors = as_vectors(image[None]).double()  # (p, c)
            if shift is None:
                shift = vectors.mean(0)  # near the mean, so that little cancels in the end
                total, products = torch.zeros_like(shift), torch.zeros(len(shift), len(shift)).to(shift)
            vectors -= shift
            total += vectors.sum(0)
            products += vectors.T @ vectors
            count += len(vectors)
    assert shift is not None  # fit refuses an empty source
    mean = total / count
    return shift + mean, products / count - mean[:, None] * mean


def components_for(covariance: Tensor, share: float) -> int:
    """Fewest principal components that hold more than this share of the variance; 1 where nothing varies."""
    variances = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)  # falling
    held = variances.cumsum(0) / variances.sum().clamp(min=1e-30)
    return min(len(variances), int((held <= share).sum()) + 1) if variances.sum() > 0 else 1


class RegionAutoencoder(nn.Module):
    """1 x 1 convolutions: (n, c, h, w) -> the same shape through d channels."""

    def __init__(self, channels: int, latent: int) -> None:
        super().__init__()
        wide, narrow = (channels + 2 * latent) // 2, 2 * latent
        self.encoder = nn.Sequential(
            *_layer(channels, wide), *_layer(wide, narrow), nn.Conv2d(narrow, latent, 1)
        )  # (n, d, h, w)
        self.decoder = nn.Sequential(*_layer(latent, narrow), *_layer(narrow, wide), nn.Conv2d(wide, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(kw_only=True)
class Dfr(FeatureTrainedDetector):
    """Auto-encoder of regional features; learned beside the network: `mean_`, `deviation_` (c,) and `latent_`, d."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"epochs": 4, "batch_size": 2, "learning_rate": 1e-3}

    region: PositiveInt = 4
    """Side of a region, in pixels."""
    latent: PositiveInt | None = None
    """Channels of the bottleneck; None: as many as principal components hold the share `variance`."""
    variance: Annotated[float, Gt(0), Lt(1)] = 0.9
    """Share of the features' variance that the bottleneck is to hold."""
    epochs: int = 700
    batch_size: int = 4
    learning_rate: float = 1e-4
    frame: float = FRAME
    sigma: NonNegativeFloat = 0.0

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)

        def maps() -> Iterable[Tensor]:
            done = 0
            for batch in source.batches(rows):
                yield self._regions(on_device(batch, runtime.device))
                done += len(batch)
                runtime.progress("fit Dfr: components", done, len(rows))

        # Standardised channels have the correlation matrix for covariance; it decides the width of the bottleneck.
        mean, covariance = moments(maps())
        variances = covariance.diagonal()
        deviation = deviations_of(variances)
        latent = self.latent or components_for(covariance / (deviation[:, None] * deviation), self.variance)
        self.mean_, self.deviation_ = mean.float().cpu(), deviation.float().cpu()
        self.latent_ = torch.tensor(latent)

    def _network(self) -> nn.Module:
        return RegionAutoencoder(len(self.mean_), int(self.latent_))

    def _regions(self, features: Mapping[int, Tensor]) -> Tensor:
        return regions(features, self.layers, max(1, self.image_size // self.region))

    def _residual(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        """Squared residuals of the standardised regions, mean over channels: float32 (n, h, w)."""
        x = self._regions(batch.features)
        mean, deviation = (value.to(x.device).view(1, -1, 1, 1) for value in (self.mean_, self.deviation_))
        x = (x - mean) / deviation
        return (network(x).float() - x).square().mean(1)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return self._residual(network, batch).mean()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        return with_maximum(
            to_maps(
                self._residual(network, batch),
                self.image_size,
                self.sigma,
                self._offset(channel_counts(batch.features, self.layers)),
            )
        )
