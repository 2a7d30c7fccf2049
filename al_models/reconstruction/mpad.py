"""MPAD, as described: reference [50] of Tao et al. 2022, "Deep learning for unsupervised anomaly localization in
industrial images: a survey", arXiv:2207.10298; the paper itself could not be consulted.

The idea: an auto-encoder is trained on pretrained features of several scales. Its latent vectors are replaced by their
nearest K-means prototypes, so that the decoder is never told of anything that good images do not contain. The map is
the residual of the features over the scales. That is all that is known of the paper.

Our reading of the network: each scale (layer) has an auto-encoder of its own. Its encoder is a 3 x 3 convolution to
`width` channels, batch norm, ReLU, and a 1 x 1 convolution to the latent vector of a position; the decoder mirrors it.
Each latent vector is replaced by the nearest of the scale's prototypes before it is decoded, in training as in
prediction. Gradients pass straight through the replacement (van den Oord et al. 2017, arXiv:1711.00937).

Our reading of the prototypes: the first are drawn from the first batch's latent vectors. Then each training step
assigns its latent vectors to the prototypes as they are, moves each prototype towards the mean of those assigned to it,
and lowers the loss. The means are exponential averages that keep the share `decay` a step, since the encoder moves,
too. A prototype to which next to nothing was assigned is set onto a random latent vector of the batch.

Our reading of loss and map: the loss is the mean squared residual, summed over the scales, plus `commitment` times the
mean squared distance of latent vectors to their prototypes. Channels are standardised by the good images' mean and
deviation, and a scale's residual is the mean over its channels, so that every scale counts alike. The map is the sum of
the upsampled residuals, smoothed with sigma 4 as in all methods of its group; the image score is its maximum.

Differs from the paper:
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the method's own form.

Shapes: n images, c channels, h x w positions of a scale, k prototypes of d numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from al_models.parameters import NonNegativeFloat, PositiveInt
from al_models.parts.frame import FRAME
from al_models.parts.maps import SIGMA
from al_models.parts.neighbors import nearest
from al_models.parts.patches import as_vectors, channel_moments, standard_layers
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

_IDLE = 0.01
"""A prototype begins anew when it gets less than this share of its even share of the latent vectors."""


class Prototypes(nn.Module):
    """K-means prototypes of latent vectors, learned while the encoder of these learns; all are buffers, so that a
    training can resume."""

    vectors: Tensor
    totals: Tensor
    counts: Tensor

    def __init__(self, count: int, size: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", torch.zeros(count, size))  # (k, d)
        self.register_buffer("totals", torch.zeros(count, size))  # (k, d) forgetting sums of what was assigned
        self.register_buffer("counts", torch.zeros(count))  # (k,)

    def forward(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The prototypes of latent vectors float32 (n, d, h, w), through which gradients pass, and the mean squared
        distance to them."""
        n, d, h, w = latent.shape
        z = as_vectors(latent)  # (n * h * w, d)
        with torch.no_grad():
            rows = self._learn(z) if self.training else self._assign(z)
            chosen = self.vectors[rows]
        distance = (z - chosen).square().mean()
        replaced = (z + (chosen - z).detach()).view(n, h, w, d).permute(0, 3, 1, 2)
        return replaced, distance

    def _assign(self, z: Tensor) -> Tensor:
        return nearest(z.detach(), self.vectors)[1][:, 0]

    def _learn(self, z: Tensor) -> Tensor:
        """The rows of the prototypes nearest to latent vectors (m, d); these prototypes are moved towards them."""
        fresh = z[torch.randint(len(z), (len(self.vectors),), device=z.device)]
        if not self.counts.any():
            self.vectors.copy_(fresh)
            self.totals.copy_(fresh)
            self.counts.fill_(1.0)
        # A step of K-means by running averages: counts are relative to an even share, so that 1 is usual.
        rows = self._assign(z)
        shares = torch.bincount(rows, minlength=len(self.vectors)).to(z) * (len(self.vectors) / len(z))
        sums = torch.zeros_like(self.totals).index_add_(0, rows, z) * (len(self.vectors) / len(z))
        self.counts.lerp_(shares, 1 - self.decay)
        self.totals.lerp_(sums, 1 - self.decay)
        idle = self.counts < _IDLE
        self.totals.copy_(torch.where(idle[:, None], fresh, self.totals))
        self.counts.copy_(torch.where(idle, 1.0, self.counts))
        self.vectors.copy_(self.totals / self.counts[:, None])
        return rows


class ScaleAutoencoder(nn.Module):
    """One scale: (n, c, h, w) -> the same shape by way of prototypes, and the latent vectors' distance to them."""

    def __init__(self, channels: int, width: int, latent: int, prototypes: int, decay: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_neighbourhood(channels, width), nn.Conv2d(width, latent, 1))
        self.prototypes = Prototypes(prototypes, latent, decay)
        self.decoder = nn.Sequential(*_neighbourhood(latent, width), nn.Conv2d(width, channels, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        replaced, distance = self.prototypes(self.encoder(x).float())
        return self.decoder(replaced), distance


def _neighbourhood(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate"), nn.BatchNorm2d(outputs), nn.ReLU()


@dataclass(kw_only=True)
class Mpad(FeatureTrainedDetector):
    """Feature auto-encoders through prototypes; learned beside the network: `mean_` and `deviation_` of all channels,
    layer by layer."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {
        "layers": (2, 3),
        "width": 16,
        "latent": 8,
        "prototypes": 16,
        "epochs": 6,
        "batch_size": 2,
    }

    width: PositiveInt = 64
    """Channels between the features and the latent vectors."""
    latent: PositiveInt = 32
    """Size of a position's latent vector."""
    prototypes: PositiveInt = 256
    """Prototypes of each scale."""
    decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Share of the prototypes' running averages that a step keeps."""
    commitment: NonNegativeFloat = 0.25
    """Weight of the latent vectors' squared distance to their prototypes, beside 1 for the residual."""
    epochs: int = 100
    batch_size: int = 8
    frame: float = FRAME
    sigma: NonNegativeFloat = SIGMA

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self.mean_, self.deviation_ = channel_moments(source, rows, self.layers, runtime.device)

    def _network(self) -> nn.Module:
        return nn.ModuleList(
            ScaleAutoencoder(channels, self.width, self.latent, self.prototypes, self.decay)
            for channels, _, _ in self._shapes()
        )

    def _residuals(self, network: nn.Module, batch: ImageBatch) -> tuple[list[Tensor], Tensor]:
        """Squared residuals of each scale, mean over channels (n, h, w), and the distances to the prototypes."""
        residuals, distances = [], []
        layers = standard_layers(batch.features, self.layers, self.mean_, self.deviation_)
        for x, autoencoder in zip(layers, network, strict=True):
            copy, distance = autoencoder(x)
            residuals.append((copy.float() - x).square().mean(1))
            distances.append(distance)
        return residuals, torch.stack(distances)

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        residuals, distances = self._residuals(network, batch)
        return torch.stack([residual.mean() for residual in residuals]).sum() + self.commitment * distances.sum()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        residuals, _ = self._residuals(network, batch)
        return with_maximum(sum(self._layer_maps(residuals, self.layers)))
