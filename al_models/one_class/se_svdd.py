"""SE-SVDD: Hu, Chen and Shao 2021, "A semantic-enhanced method based on deep SVDD for pixel-wise anomaly detection",
ICME, as described in the survey by Tao et al. 2022 (arXiv:2207.10298), reference [113]; the paper's text could not be
consulted.

The idea: deep SVDD (Ruff et al. 2018, "Deep one-class classification", ICML) maps good samples into a small hypersphere
and takes the squared distance from its centre as the anomaly score. Here it is applied pixel by pixel to pretrained
features of several levels, the finer ones enhanced by the semantics of the deeper ones, in one pipeline. That is all
that is known of the paper.

Our reading of the network: a 1 x 1 convolution brings each level's features to `width` channels. From the deepest level
upwards, these are upsampled and added to the next finer level's. At each level a 3 x 3 and a 1 x 1 convolution map a
position to its embedding, and each level has a hypersphere of its own. The map is the mean over the levels of the
distances, upsampled and smoothed (sigma 4); the image score is its maximum.

Differs from deep SVDD:
- Its pretraining as an auto-encoder is left out, since the features are pretrained.
- Channels are standardised by the good images' mean and deviation.
- A level's distances are divided by their mean under the initial weights, so that levels count alike.
- The network is narrow (32 channels). Without bias terms it can still become nearly constant in a long training, and
  narrow networks do so last.
- Along the rim, maps are brought to the level that good images have inside (`parts/frame.py`). On textures the rim
  would otherwise decide the score; `frame=0` is the method's own form.

Kept from deep SVDD and its authors' code: no bias terms and leaky ReLU, so that embeddings do not all collapse onto the
centre; as centre the mean embedding of all good positions under the initial weights, with coordinates near zero moved
away from it; the one-class objective (the mean squared distance, since every training image is good); Adam at 1e-4,
weight decay 1e-6, 50 epochs.

Shapes: n images, l levels, c channels of a level, h x w its positions, d coordinates of an embedding.
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
from al_models.parts.maps import SIGMA
from al_models.parts.patches import channel_moments, on_device, standard_layers
from al_models.parts.train import seeded
from al_models.trained import FeatureTrainedDetector, Generators, with_maximum
from al_models.types import ImageBatch, ImageSource, Runtime, Traits

_SLOPE = 0.1
_NEAR_ZERO = 0.1
"""Least absolute value of a centre's coordinate, as of deep SVDD's authors; weights of 0 would reach one of 0."""


class SemanticEmbedding(nn.Module):
    """Levels (n, c_l, h_l, w_l), finest first -> an embedding of each position: a list of (n, d, h_l, w_l)."""

    def __init__(self, channels: Sequence[int], width: int, dimensions: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.embed = nn.ModuleList(
            nn.Sequential(
                nn.LeakyReLU(_SLOPE),
                nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate", bias=False),
                nn.LeakyReLU(_SLOPE),
                nn.Conv2d(width, dimensions, 1, bias=False),
            )
            for _ in channels
        )
        self.apply(_initialise)

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        known: Tensor | None = None
        found: list[Tensor] = []
        for x, lateral, embed in zip(reversed(levels), reversed(self.lateral), reversed(self.embed), strict=True):
            own = lateral(x)
            if known is not None:
                own = own + F.interpolate(known, size=own.shape[2:], mode="bilinear", align_corners=False)
            known = own
            found.append(embed(known).float())
        return found[::-1]


def _initialise(module: nn.Module) -> None:
    # He et al. 2015 (arXiv:1502.01852), which keeps embeddings at the scale of the features: from torch's own, which
    # shrink, nearly all coordinates of the centre would be near zero, and what is learned first is to reach the centre.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)


def away_from_zero(centre: Tensor, least: float = _NEAR_ZERO) -> Tensor:
    """The centre with coordinates nearer to 0 than `least` moved to -`least` or `least`, by their sign."""
    return torch.where(centre < 0, centre.clamp(max=-least), centre.clamp(min=least))


@dataclass(kw_only=True)
class SeSvdd(FeatureTrainedDetector):
    """A hypersphere around the good positions of each level; learned beside the network: `mean_` and `deviation_` of
    all channels, `centre_` (l, d), and `spread_` (l,), the mean squared distance from it under the initial weights."""

    traits: ClassVar[Traits] = Traits(trains=True, graph=True)
    quick: ClassVar[Mapping[str, Any]] = {"layers": (2, 3), "width": 16, "dimensions": 8, "epochs": 2, "batch_size": 2}

    width: PositiveInt = 32
    """Channels that each level's features are brought to."""
    dimensions: PositiveInt = 32
    """Coordinates of an embedding."""
    epochs: int = 50
    batch_size: int = 8
    learning_rate: float = 1e-4
    weight_decay: float = 1e-6
    frame: float = FRAME
    sigma: NonNegativeFloat = SIGMA

    def _set_up(self, source: ImageSource, rows: Sequence[int], runtime: Runtime) -> None:
        super()._set_up(source, rows, runtime)
        self.mean_, self.deviation_ = channel_moments(source, rows, self._levels(), runtime.device)
        with seeded(runtime.seed, runtime.device):  # the same weights as those that training begins with
            network = self._network().to(runtime.device)
        sums = torch.zeros(2, len(self.layers), self.dimensions, dtype=torch.float64)  # of embeddings and their squares
        for batch in source.batches(rows):
            with torch.no_grad():
                embeddings = self._embeddings(network, on_device(batch, runtime.device))
            for level, z in enumerate(embeddings):
                z = z.double()
                sums[:, level] += torch.stack([z.mean((2, 3)).sum(0), z.square().mean((2, 3)).sum(0)]).cpu()
        # E |z - c|^2 follows from the moments of z, so one pass gives the centres and the mean distances from them.
        mean, squares = sums / len(rows)  # (l, d)
        centre = away_from_zero(mean)
        spread = (squares - 2 * mean * centre + centre**2).mean(1)
        self.centre_, self.spread_ = centre.float(), spread.float()

    def _levels(self) -> list[int]:
        """The layers, finest first."""
        return sorted(self.layers)

    def _network(self) -> nn.Module:
        channels = {layer: c for layer, (c, _, _) in zip(self.layers, self._shapes(), strict=True)}
        return SemanticEmbedding([channels[layer] for layer in self._levels()], self.width, self.dimensions)

    def _embeddings(self, network: nn.Module, features: Mapping[int, Tensor]) -> list[Tensor]:
        return network(standard_layers(features, self._levels(), self.mean_, self.deviation_))

    def _distances(self, network: nn.Module, batch: ImageBatch) -> list[Tensor]:
        """Squared distances of each level (n, h, w), mean over coordinates, over their mean under the first weights."""
        found = []
        for level, z in enumerate(self._embeddings(network, batch.features)):
            centre = self.centre_[level].to(z.device)[:, None, None]
            found.append((z - centre).square().mean(1) / self.spread_[level].to(z.device))
        return found

    def _loss(self, network: nn.Module, batch: ImageBatch) -> Tensor:
        return torch.stack([distance.mean() for distance in self._distances(network, batch)]).mean()

    def _judge(self, network: nn.Module, batch: ImageBatch, draws: Generators) -> tuple[Tensor, Tensor]:
        maps = self._layer_maps(self._distances(network, batch), self._levels())
        return with_maximum(torch.stack(maps).mean(0))
